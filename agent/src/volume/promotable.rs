//! What stands against a promotion, in words, with the command that does better. The rule itself is
//! [`blockmirror_protocol::succession`].

use crate::config::{Name, PeerConfig, Role};
use crate::quantity::{Seconds, clock};
use crate::standing::Answered;
use blockmirror_protocol::inquiry::Known;
use blockmirror_protocol::succession::{Candidate, Decision, Heard, Objection, Obstacle};
use blockmirror_protocol::terms::{DataState, Promise};
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::Standing;

/// A replica that is to be promoted, and what there is to say of it.
#[derive(Clone, Debug)]
pub(super) struct Applicant {
    /// The volume.
    pub(super) volume: Name,
    /// What this host is called.
    pub(super) own_name: String,
    /// What the rule goes by.
    pub(super) candidate: Candidate,
    /// When the layer was begun that a rollback goes back to, in seconds since 1970.
    pub(super) rollback_at: Option<u64>,
    /// When the last write came that is durable here, in seconds since 1970; nothing where that isn't known.
    pub(super) last_written: Option<u64>,
    /// How long the link has been as it is.
    pub(super) link_seconds: u64,
    /// The present, in seconds since 1970.
    pub(super) now: u64,
    /// That something else wrote to this copy, if it was not compared since.
    pub(super) touched: Option<String>,
    /// Who took over and was not agreed to, and since when what it overwrites is kept, in seconds since 1970.
    pub(super) kept: Option<(String, u64)>,
}

/// What was said, as the rule takes it.
pub(super) fn heard(answers: &[(PeerConfig, Answered)]) -> Vec<Heard> {
    answers
        .iter()
        .map(|(peer, answered)| Heard { host: peer.host, standing: answered.as_ref().ok().cloned() })
        .collect()
}

impl Applicant {
    /// Why it can't be promoted at all.
    pub(super) fn obstacle(&self) -> Option<String> {
        let volume = &self.volume;
        let text = match self.candidate.obstacle()? {
            Obstacle::Empty => "this copy is empty: its first sync has not ended",
            Obstacle::Mixture => {
                "this copy is a mixture of old and new, and has no rollback point: its resync has not ended"
            }
        };
        Some(format!(
            "{text}; promote another replica, or bring the primary back ({volume} goes on by itself)"
        ))
    }

    /// Decides on its promotion, given what the others say; else why it should not be promoted now. What is not said there
    /// loses nothing.
    pub(super) fn decide(
        &self,
        answers: &[(PeerConfig, Answered)],
        known: Known,
    ) -> Result<Decision, String> {
        let decided = known.decide(&self.candidate, &heard(answers));
        decided.map_err(|objection| self.with_more(self.words(objection, answers)))
    }

    /// An objection, and what a promotion by force means beside it.
    fn with_more(&self, text: String) -> String {
        let more = [self.touched_words(), self.kept_words()];
        more.into_iter().flatten().fold(text, |text, more| match text.contains(&more) {
            true => text,
            false => format!("{text}; and {more}"),
        })
    }

    /// That something else wrote to this copy.
    fn touched_words(&self) -> Option<String> {
        self.touched.as_ref().map(|words| {
            format!(
                "this copy was changed by something else ({words}), and was not compared with a primary's since"
            )
        })
    }

    /// What a promotion would give up that nobody has agreed to, and what to do about that first.
    pub(super) fn kept_words(&self) -> Option<String> {
        let (primary, since) = self.kept.as_ref().filter(|_| self.candidate.gives_up_what_is_kept())?;
        let (volume, age) = (&self.volume, Seconds(self.now.saturating_sub(*since)));
        Some(format!(
            "nobody on {own} has agreed that {primary} took over: what was overwritten since {}, {age} ago, is kept; on \
             {own}, blockmirror undo {volume} brings it back, and blockmirror forget {volume} agrees",
            clock(*since),
            own = self.own_name,
        ))
    }

    /// Decides whether it takes over from the primary that was demoted for it, given what the others say; else why it should
    /// not.
    pub(super) fn decide_to_succeed(&self, answers: &[(PeerConfig, Answered)]) -> Result<Decision, String> {
        let decided = self.candidate.decide_to_succeed(&heard(answers));
        decided.map_err(|objection| self.with_more(self.words(objection, answers)))
    }

    fn words(&self, objection: Objection, answers: &[(PeerConfig, Answered)]) -> String {
        let name = |host: HostId| {
            let known = answers.iter().find(|(peer, _)| peer.host == host);
            known.map_or_else(|| "another host".to_owned(), |(peer, _)| peer.name.to_string())
        };
        let volume = &self.volume;
        // What a host would be told to do that can't do it now.
        let away = |host: HostId| {
            let (_, answered) = answers.iter().find(|(peer, _)| peer.host == host)?;
            let is_away = answered.as_ref().is_ok_and(Standing::is_out_of_reach);
            let name = name(host);
            is_away.then(|| {
                format!("the disk of {name} is not there or does not answer: bring it back, and promote {name} then")
            })
        };
        let promote_there = |host: HostId| {
            away(host).unwrap_or_else(|| format!("on {}: blockmirror promote {volume}", name(host)))
        };
        match objection {
            Objection::Serves(host) => self.reachable(&name(host)),
            Objection::Connected => {
                let primary = answers.iter().find(|(peer, _)| peer.role == Role::Primary);
                self.reachable(primary.map_or("the primary", |(peer, _)| peer.name.as_str()))
            }
            Objection::Promoted(host) => {
                let holder = name(host);
                let instead = away(host).unwrap_or_else(|| format!("use {holder}"));
                format!(
                    "{holder} was promoted after this copy was last in touch with a primary; promoting this one would \
                     begin a second history: {instead}, or --force"
                )
            }
            Objection::Later(host) => {
                let later = name(host);
                format!(
                    "{later} has later content than this copy; {}; --force promotes this one, and what only {later} \
                     has is given up",
                    promote_there(host)
                )
            }
            Objection::Split(host) => {
                let other = name(host);
                format!(
                    "{other} went on with the primary after that was recovered from an older copy, or set back: each of \
                     the two has what the other lacks; --force promotes this one, and {other} keeps what it has until \
                     blockmirror resolve {volume} gives that up there"
                )
            }
            Objection::Demoted(host) => {
                let holder = name(host);
                let when = match self.candidate.superblock.released {
                    true => "",
                    false => " while this copy was out of its reach",
                };
                format!(
                    "{holder} was the primary, was demoted{when}, and has everything; {}; --force promotes this one, and \
                     what only {holder} has is given up",
                    promote_there(host)
                )
            }
            Objection::Touched => {
                format!("{}; --force promotes it as it is", self.touched_words().unwrap_or_default())
            }
            Objection::Kept => {
                let kept = self.kept_words().unwrap_or_default();
                let back = match self.candidate.superblock.data {
                    DataState::Inconsistent => format!("; {}", self.rollback()),
                    DataState::Consistent | DataState::Empty => String::new(),
                };
                format!("{kept}; then promote, or --force, which gives up what is kept{back}")
            }
            Objection::Rollback => self.rollback(),
            Objection::Unheard(hosts) => {
                let has_answered = |host: &HostId| {
                    answers.iter().any(|(peer, answered)| peer.host == *host && answered.is_ok())
                };
                let (lost, silent): (Vec<HostId>, Vec<HostId>) = hosts.into_iter().partition(has_answered);
                let names = |hosts: Vec<HostId>| hosts.into_iter().map(name).collect::<Vec<_>>().join(", ");
                let why = match (lost.is_empty(), silent.is_empty()) {
                    (true, _) => format!(
                        "{} may have been promoted meanwhile, or have what is missing here, and cannot be asked",
                        names(silent)
                    ),
                    (false, true) => format!(
                        "{} may have had what is missing here, and has lost its copy since, or something else changed it",
                        names(lost)
                    ),
                    (false, false) => format!(
                        "{} may have what is missing here, and cannot be asked; {} may have had it, and has lost its copy since, \
                         or something else changed it",
                        names(silent),
                        names(lost)
                    ),
                };
                format!("{why}; --force promotes this copy all the same{}", self.missing())
            }
            Objection::Unpromised => self.unpromised(),
        }
    }

    fn reachable(&self, primary: &str) -> String {
        let (volume, own) = (&self.volume, &self.own_name);
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

    /// Nothing says that the primary answered nothing without this copy.
    fn unpromised(&self) -> String {
        let why = match self.candidate.superblock.given.promise {
            Promise::WhileHeard => {
                "this copy was in sync in the mode sync when it was last heard, but it may have gone on alone since \
                 (on_replica_loss = \"continue\")"
            }
            Promise::None | Promise::Replicas(_) => {
                "when it was last heard, this copy was not in sync in the mode sync"
            }
        };
        format!(
            "the primary does not answer (this host last heard of it {} ago), and {why}: what was written last may be \
             missing here; --force promotes this copy without that{}",
            Seconds(self.link_seconds),
            self.missing(),
        )
    }

    /// From when on something may be missing.
    fn missing(&self) -> String {
        let Some(at) = self.last_written else { return String::new() };
        let age = Seconds(self.now.saturating_sub(at));
        format!(" (the last write that it has is of {}, {age} ago)", clock(at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockmirror_protocol::disk::superblock::{self, Superblock};
    use blockmirror_protocol::given::Given;
    use blockmirror_protocol::inquiry::Inquiry;
    use blockmirror_protocol::layers::{Catalog, LayerId, Purpose};
    use blockmirror_protocol::terms::{Fence, Mode};
    use blockmirror_protocol::units::Time;
    use blockmirror_protocol::units::{
        BlockSize, CopyId, Epoch, GenerationId, Position, Sequence, Session, VolumeId,
    };
    use blockmirror_protocol::wire::message::Standing;

    const NOW: u64 = 1_000_000_000;

    fn position(epoch: u64) -> Position {
        Position { generation: GenerationId([b'a'; 16]), epoch: Epoch(epoch), sequence: Sequence(0) }
    }

    /// A consistent replica of a, called b, in this mode.
    fn applicant(mode: Mode, promise: Promise) -> Applicant {
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
            layers: Catalog::default(),
            mode,
            given: Given { promise, counted: Vec::new() },
            released: false,
            replaced: false,
            touched: false,
            run: Epoch(0),
            ends: blockmirror_protocol::lineage::Ends::default(),
            agreed: 3,
            heirs: Vec::new(),
        };
        let candidate = Candidate {
            own: HostId([2; 32]),
            superblock,
            position: position(7),
            is_connected: false,
            is_promised: false,
        };
        Applicant {
            volume: "data".parse().unwrap(),
            own_name: "b".to_owned(),
            candidate,
            rollback_at: None,
            last_written: Some(NOW - 3600),
            link_seconds: 90,
            now: NOW,
            touched: None,
            kept: None,
        }
    }

    fn objection(applicant: &Applicant, answers: &[(PeerConfig, Answered)]) -> Option<String> {
        let known = Inquiry::new(false, Time::default()).handle_watched(applicant.candidate.is_connected);
        applicant.decide(answers, known).err()
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
            silent_milliseconds: 0,
            ends: blockmirror_protocol::lineage::Ends::default(),
            replaced: false,
            given: Box::default(),
        }
    }

    fn silent(name: &str, host: u8) -> (PeerConfig, Answered) {
        let role = if host == 1 { Role::Primary } else { Role::Replica };
        (peer(name, host, role), Err("it does not answer".to_owned()))
    }

    fn says(name: &str, host: u8, standing: Standing) -> (PeerConfig, Answered) {
        (peer(name, host, Role::Replica), Ok(standing))
    }

    #[test]
    fn a_copy_that_something_else_changed_is_promoted_only_by_force() {
        let touched = Some("something else wrote to it after it was closed here".to_owned());
        let mut applicant = applicant(Mode::Sync, Promise::Replicas(1));
        (applicant.touched, applicant.candidate.superblock.touched) = (touched, true);
        let text = objection(&applicant, &[says("c", 3, standing(7))]).unwrap();
        assert!(text.contains("changed by something else") && text.contains("--force"), "{text}");
        // It was released when it had everything, and whoever released it has that still.
        applicant.candidate.superblock.released = true;
        let text = objection(&applicant, &[says("a", 1, standing(7))]).unwrap();
        let instead = "a was the primary, was demoted, and has everything; on a: blockmirror promote data";
        assert!(text.contains(instead) && text.contains("changed by something else"), "{text}");
        let text = applicant.decide_to_succeed(&[]).unwrap_err();
        assert!(text.contains("changed by something else"), "{text}");
    }

    /// One host that promoted itself overwrote all copies, and the next promotion gave up what was kept of them.
    #[test]
    fn what_a_promotion_gives_up_that_nobody_agreed_to_is_said_with_each_objection() {
        let mut applicant = applicant(Mode::Sync, Promise::Replicas(1));
        applicant.kept = Some(("a".to_owned(), NOW - 120));
        let silent_a = || vec![silent("a", 1)];
        assert_eq!(objection(&applicant, &silent_a()), None, "it was agreed to since");
        applicant.candidate.superblock.agreed = 2;
        applicant.candidate.superblock.layers.set(Purpose::Undo, LayerId::new(3));
        let kept = "nobody on b has agreed that a took over: what was overwritten since 01:44:40 UTC, 2m ago, is kept; on \
                    b, blockmirror undo data brings it back, and blockmirror forget data agrees";
        let force = "; then promote, or --force, which gives up what is kept";
        assert_eq!(objection(&applicant, &silent_a()), Some(format!("{kept}{force}")));
        let serving = Standing { role: superblock::Role::Primary, serves: true, ..standing(7) };
        let text = objection(&applicant, &[says("a", 1, serving)]).unwrap();
        assert!(text.starts_with("a is the primary and reachable") && text.ends_with(kept), "{text}");
    }

    #[test]
    fn each_objection_says_what_to_do() {
        let serving = Standing { role: superblock::Role::Primary, serves: true, ..standing(7) };
        let waits = || applicant(Mode::Sync, Promise::Replicas(1));
        let mut behind = waits();
        behind.candidate.superblock.fence.counter = 2;
        let mut gap = waits();
        gap.candidate.superblock.data = DataState::Inconsistent;
        gap.candidate.superblock.layers.set(Purpose::Rollback, LayerId::new(4));
        gap.rollback_at = Some(NOW - 120);
        let mut demoted = applicant(Mode::Async, Promise::None);
        demoted.candidate.superblock.fence.holder = HostId([2; 32]);
        let mut connected = waits();
        connected.candidate.is_connected = true;
        for (applicant, answers, words) in [
            (waits(), vec![says("a", 1, serving)], "on a: blockmirror switch data --to b"),
            (
                behind,
                vec![silent("a", 1), says("c", 3, standing(7))],
                "was promoted after this copy was last in touch",
            ),
            (waits(), vec![silent("a", 1), says("c", 3, standing(8))], "on c: blockmirror promote data"),
            (gap, vec![silent("a", 1)], "--force rolls it back to 01:44:40 UTC, 2m ago"),
            (applicant(Mode::Async, Promise::None), vec![silent("a", 1)], "last heard of it 1m 30s ago"),
            (
                applicant(Mode::SemiSync, Promise::None),
                vec![silent("a", 1)],
                "was not in sync in the mode sync",
            ),
            (
                applicant(Mode::Sync, Promise::WhileHeard),
                vec![silent("a", 1)],
                "may have gone on alone since",
            ),
            (
                applicant(Mode::Sync, Promise::WhileHeard),
                vec![silent("a", 1)],
                "the last write that it has is of 00:46:40 UTC, 1h ago",
            ),
            (
                applicant(Mode::Async, Promise::None),
                vec![says("a", 1, standing(7))],
                "was demoted while this copy was out of its reach, and has everything; on a: blockmirror promote data",
            ),
            (demoted, vec![silent("a", 1)], "a may have been promoted meanwhile"),
            (waits(), vec![silent("a", 1), silent("c", 3)], "c may have been promoted meanwhile"),
            (
                waits(),
                vec![silent("a", 1), says("c", 3, Standing { replaced: true, ..standing(7) })],
                "c may have had what is missing here, and has lost its copy since, or something else changed it; --force",
            ),
            // It can't be dialled from here, but its own connection lives.
            (connected, vec![silent("a", 1)], "a is the primary and reachable"),
        ] {
            let text = objection(&applicant, &answers).unwrap_or_default();
            assert!(text.contains(words), "{text:?} should say {words:?}");
        }
    }

    #[test]
    fn a_copy_that_can_not_be_promoted_says_why() {
        let mut empty = applicant(Mode::Sync, Promise::None);
        empty.candidate.superblock.data = DataState::Empty;
        assert!(empty.obstacle().unwrap().contains("this copy is empty"));
        let mut mixture = applicant(Mode::Sync, Promise::None);
        mixture.candidate.superblock.data = DataState::Inconsistent;
        assert!(mixture.obstacle().unwrap().contains("no rollback point"));
        assert_eq!(applicant(Mode::Async, Promise::None).obstacle(), None);
    }
}
