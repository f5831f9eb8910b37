//! Whether a replica may be promoted without losing anything, and if not, what would be lost and which command does
//! better. A pure function of what this copy holds and what the other hosts say.

use crate::config::{Name, PeerConfig, Role};
use crate::quantity::{Seconds, clock};
use crate::standing::{Answered, is_later, newer_fence};
use blockmirror_protocol::disk::superblock::{self, Superblock};
use blockmirror_protocol::units::{HostId, Position};
use blockmirror_protocol::wire::message::{DataState, Mode};

/// A replica that is to be promoted.
#[derive(Clone, Debug)]
pub(super) struct Candidate {
    /// The volume.
    pub(super) volume: Name,
    /// This host, and its name.
    pub(super) own: (HostId, String),
    /// What is durable here.
    pub(super) superblock: Superblock,
    /// The last durable epoch; in a gap, the rollback point.
    pub(super) position: Position,
    /// When the layer was begun that a rollback goes back to, in seconds since 1970.
    pub(super) rollback_at: Option<u64>,
    /// Whether a primary is connected, and not just not noticed to be gone.
    pub(super) is_connected: bool,
    /// How long that has been so.
    pub(super) link_seconds: u64,
    /// The present, in seconds since 1970.
    pub(super) now: u64,
}

impl Candidate {
    /// Why it can't be promoted at all.
    pub(super) fn obstacle(&self) -> Option<String> {
        let volume = &self.volume;
        let text = match (self.superblock.data, self.superblock.gap) {
            (DataState::Empty, _) => "this copy is empty: its first sync has not ended",
            (DataState::Inconsistent, 0) => {
                "this copy is a mixture of old and new, and has no rollback point: its resync has not ended"
            }
            _ => return None,
        };
        Some(format!(
            "{text}; promote another replica, or bring the primary back ({volume} goes on by itself)"
        ))
    }

    /// Why it should not be promoted now, given what the others say; what is not said here loses nothing.
    pub(super) fn objection(&self, answers: &[(PeerConfig, Answered)]) -> Option<String> {
        let standings =
            || answers.iter().filter_map(|(peer, answered)| Some((peer, answered.as_ref().ok()?)));
        let volume = &self.volume;
        if let Some((primary, _)) =
            standings().find(|(_, standing)| standing.role == superblock::Role::Primary && standing.serves)
        {
            return Some(self.reachable(primary.name.as_str()));
        }
        if self.is_connected {
            let primary = answers.iter().find(|(peer, _)| peer.role == Role::Primary);
            return Some(self.reachable(primary.map_or("the primary", |(peer, _)| peer.name.as_str())));
        }
        if let Some(fence) = newer_fence(self.superblock.fence, answers) {
            let holder = answers.iter().find(|(peer, _)| peer.host == fence.holder);
            let holder = holder.map_or_else(|| "another host".to_owned(), |(peer, _)| peer.name.to_string());
            return Some(format!(
                "{holder} was promoted after this copy was last in touch with a primary; promoting this one would \
                 begin a second history: use {holder}, or --force"
            ));
        }
        if self.superblock.released {
            return None;
        }
        if let Some((later, _)) =
            standings().find(|(_, standing)| is_later(standing, &self.superblock.lineage, self.position))
        {
            let name = &later.name;
            return Some(format!(
                "{name} has later content than this copy; on {name}: blockmirror promote {volume}; \
                 --force promotes this one, and what only {name} has is given up"
            ));
        }
        if self.superblock.data == DataState::Inconsistent {
            return Some(self.rollback());
        }
        if self.superblock.fence.holder == self.own.0 {
            return self.unheard(answers);
        }
        match self.superblock.mode {
            Mode::Sync => None,
            Mode::Async | Mode::SemiSync => Some(format!(
                "the primary does not answer (this host last heard of it {} ago), and when it did, this copy was not \
                 in sync in the mode sync: what was written last may be missing here; --force promotes this copy without \
                 that",
                Seconds(self.link_seconds),
            )),
        }
    }

    fn reachable(&self, primary: &str) -> String {
        let (volume, own) = (&self.volume, &self.own.1);
        format!(
            "{primary} is the primary and reachable; to change over without losing anything, on {primary}: \
             blockmirror switch {volume} --to {own}"
        )
    }

    fn rollback(&self) -> String {
        let back = match self.rollback_at {
            Some(at) => format!("{}, {} ago", clock(at), Seconds(self.now.saturating_sub(at))),
            None => "where it was before".to_owned(),
        };
        format!(
            "this copy is in the middle of a resync; --force rolls it back to {back}, and all that was written on the \
             primary since then is given up"
        )
    }

    /// This host was demoted by its operator: others may have been promoted since.
    fn unheard(&self, answers: &[(PeerConfig, Answered)]) -> Option<String> {
        let silent: Vec<&str> = answers
            .iter()
            .filter(|(_, answered)| answered.is_err())
            .map(|(peer, _)| peer.name.as_str())
            .collect();
        (!silent.is_empty()).then(|| {
            format!(
                "{} may have been promoted since this host was demoted, and does not answer; \
                 --force promotes this copy all the same",
                silent.join(", ")
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockmirror_protocol::units::{BlockSize, CopyId, Epoch, GenerationId, Sequence, Session, VolumeId};
    use blockmirror_protocol::wire::message::{Fence, Standing};

    const NOW: u64 = 1_000_000_000;

    fn position(epoch: u64) -> Position {
        Position { generation: GenerationId([b'a'; 16]), epoch: Epoch(epoch), sequence: Sequence(0) }
    }

    /// A consistent replica of a, called b, in this mode.
    fn candidate(mode: Mode) -> Candidate {
        let fence = Fence { counter: 3, holder: HostId([1; 32]) };
        let superblock = Superblock {
            volume: VolumeId([1; 16]),
            copy: CopyId([2; 16]),
            size_bytes: 1 << 20,
            block_size: BlockSize::default(),
            role: superblock::Role::Replica,
            data: DataState::Consistent,
            session: Session(0),
            fence,
            position: position(7),
            source: fence,
            lineage: vec![GenerationId([b'a'; 16])],
            adopted: 1,
            gap: 0,
            layers: 0,
            history: 0,
            mode,
            released: false,
        };
        Candidate {
            volume: "data".parse().unwrap(),
            own: (HostId([2; 32]), "b".to_owned()),
            superblock,
            position: position(7),
            rollback_at: None,
            is_connected: false,
            link_seconds: 90,
            now: NOW,
        }
    }

    fn peer(name: &str, host: u8, role: Role) -> PeerConfig {
        PeerConfig::new(name.parse().unwrap(), role, HostId([host; 32]), Vec::new())
    }

    fn standing(epoch: u64) -> Standing {
        Standing {
            role: superblock::Role::Replica,
            data: DataState::Consistent,
            can_roll_back: false,
            fence: Fence { counter: 3, holder: HostId([1; 32]) },
            lineage: vec![GenerationId([b'a'; 16])],
            marker: position(epoch),
            serves: false,
            dirty_bytes: 0,
            began: Vec::new(),
        }
    }

    fn silent() -> (PeerConfig, Answered) {
        (peer("a", 1, Role::Primary), Err("it does not answer".to_owned()))
    }

    fn says(name: &str, host: u8, standing: Standing) -> (PeerConfig, Answered) {
        (peer(name, host, Role::Replica), Ok(standing))
    }

    #[test]
    fn what_loses_nothing_is_not_objected_to() {
        let sync = candidate(Mode::Sync);
        assert_eq!(sync.objection(&[silent()]), None);
        assert_eq!(sync.objection(&[silent(), says("c", 3, standing(7))]), None);
        let mut released = candidate(Mode::Async);
        released.superblock.released = true;
        assert_eq!(released.objection(&[silent()]), None);
        // A primary whose disk has failed serves nobody.
        let failed = Standing { role: superblock::Role::Primary, ..standing(9) };
        let failed = Standing { lineage: vec![GenerationId([b'x'; 16])], ..failed };
        assert_eq!(sync.objection(&[says("a", 1, failed)]), None);
        let mut demoted = candidate(Mode::Async);
        demoted.superblock.fence.holder = HostId([2; 32]);
        assert_eq!(demoted.objection(&[says("c", 3, standing(7))]), None);
    }

    #[test]
    fn each_objection_says_what_to_do() {
        let serving = Standing { role: superblock::Role::Primary, serves: true, ..standing(7) };
        let mut behind = candidate(Mode::Sync);
        behind.superblock.fence.counter = 2;
        let mut gap = candidate(Mode::Sync);
        (gap.superblock.data, gap.superblock.gap) = (DataState::Inconsistent, 4);
        gap.rollback_at = Some(NOW - 120);
        let mut demoted = candidate(Mode::Async);
        demoted.superblock.fence.holder = HostId([2; 32]);
        let newer = vec![GenerationId([b'b'; 16]), GenerationId([b'a'; 16])];
        for (candidate, answers, words) in [
            (candidate(Mode::Sync), vec![says("a", 1, serving)], "on a: blockmirror switch data --to b"),
            (behind, vec![says("c", 3, standing(7))], "was promoted after this copy was last in touch"),
            (candidate(Mode::Sync), vec![says("c", 3, standing(8))], "on c: blockmirror promote data"),
            (
                candidate(Mode::Sync),
                vec![says("c", 3, Standing { lineage: newer, ..standing(1) })],
                "c has later content",
            ),
            (gap, vec![silent()], "--force rolls it back to 01:44:40 UTC, 2m ago"),
            (candidate(Mode::Async), vec![silent()], "last heard of it 1m 30s ago"),
            (candidate(Mode::SemiSync), vec![silent()], "was not in sync in the mode sync"),
            (demoted, vec![silent()], "a may have been promoted since this host was demoted"),
        ] {
            let text = candidate.objection(&answers).unwrap_or_default();
            assert!(text.contains(words), "{text:?} should say {words:?}");
        }
        // It can't be dialled from here, but its own connection lives.
        let connected = Candidate { is_connected: true, ..candidate(Mode::Sync) };
        let text = connected.objection(&[silent()]).unwrap();
        assert!(text.contains("a is the primary and reachable"), "{text}");
    }

    #[test]
    fn a_copy_that_is_no_image_of_the_volume_is_never_promoted() {
        let mut empty = candidate(Mode::Sync);
        empty.superblock.data = DataState::Empty;
        assert!(empty.obstacle().unwrap().contains("this copy is empty"));
        let mut mixture = candidate(Mode::Sync);
        mixture.superblock.data = DataState::Inconsistent;
        assert!(mixture.obstacle().unwrap().contains("no rollback point"));
        mixture.superblock.gap = 3;
        assert_eq!(mixture.obstacle(), None);
        assert_eq!(candidate(Mode::Async).obstacle(), None);
    }
}
