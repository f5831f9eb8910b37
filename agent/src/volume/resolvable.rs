//! Whether a host may give its content up for another's (L6): only where the two are really split, and on the host whose
//! content goes. A pure function of what this copy holds and what the other hosts say; where it refuses, it names the
//! command that leads on.

use crate::config::{Name, PeerConfig};
use crate::standing::Answered;
use blockmirror_protocol::disk::superblock::{Role, Superblock};
use blockmirror_protocol::lineage::{self, Relation};
use blockmirror_protocol::succession;
use blockmirror_protocol::terms::{Claim, DataState};
use blockmirror_protocol::units::{GenerationId, HostId, Position};
use blockmirror_protocol::wire::message::Standing;

/// A host that was asked to resolve a split.
#[derive(Clone, Debug)]
pub(super) struct Resolver {
    /// The volume.
    pub(super) volume: Name,
    /// This host, and its name.
    pub(super) own: (HostId, String),
    /// What is durable here.
    pub(super) superblock: Superblock,
    /// The last epoch that is durable here.
    pub(super) position: Position,
    /// On a primary that another one was promoted after: who has its devices open.
    pub(super) openers: Option<Vec<String>>,
}

/// A host whose content may stay.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(super) struct Winner {
    /// What it is called.
    pub(super) name: String,
    /// How it stands.
    pub(super) standing: Standing,
}

impl Resolver {
    /// The host whose content stays; this host's goes.
    ///
    /// # Errors
    /// Why that is not done here or now, and what leads on.
    pub(super) fn winner(&self, keep: HostId, answers: &[(PeerConfig, Answered)]) -> Result<Winner, String> {
        if self.superblock.data == DataState::Empty {
            return Err("nothing to resolve: this copy is empty, and takes any primary's content".to_owned());
        }
        if keep == self.own.0 {
            return Err(self.others_must_yield(answers));
        }
        let Some((peer, answered)) = answers.iter().find(|(peer, _)| peer.host == keep) else {
            return Err("that host is none of the volume's".to_owned());
        };
        let (volume, name) = (&self.volume, &peer.name);
        let standing = answered.as_ref().map_err(|error| {
            format!("{name} must say how it stands before this host's content goes, and does not: {error}")
        })?;
        if !succession::is_usable(standing) {
            return Err(format!("{name} has no whole copy of {volume}, so it is not its content that stays"));
        }
        if !self.is_split_from(keep, standing) {
            return Err(format!(
                "nothing to resolve: this host has nothing that {name} lacks and would refuse"
            ));
        }
        self.must_be_free(volume, name)?;
        if standing.is_out_of_reach() {
            return Err(format!("the disk of {name} is not there or does not answer: bring it back first"));
        }
        let others = answers.iter().filter(|(peer, _)| peer.host != keep);
        let mut others = others.filter_map(|(peer, answered)| Some((peer, answered.as_ref().ok()?)));
        if let Some((primary, _)) = others.find(|(_, other)| other.role == Role::Primary && other.serves) {
            let primary = &primary.name;
            return Err(format!(
                "{primary} is the primary, so it is its content that this host would take: \
                 blockmirror resolve {volume} --keep {primary}"
            ));
        }
        Ok(Winner { name: name.to_string(), standing: standing.clone() })
    }

    /// Nothing is ever written under an open device (L5).
    fn must_be_free(&self, volume: &Name, winner: &Name) -> Result<(), String> {
        match &self.openers {
            Some(openers) => Err(format!(
                "{winner} was promoted, and this host becomes a replica when nobody has its device open; \
                 close it first: {}",
                openers.join(", ")
            )),
            None if self.superblock.role == Role::Primary => Err(format!(
                "this host is the primary, and nothing is written under an open device; first: \
                 blockmirror demote {volume}"
            )),
            None => Ok(()),
        }
    }

    /// This host's content stays: that is decided on the host whose content goes.
    fn others_must_yield(&self, answers: &[(PeerConfig, Answered)]) -> String {
        let (volume, own) = (&self.volume, &self.own.1);
        let said = answers.iter().filter_map(|(peer, answered)| Some((peer, answered.as_ref().ok()?)));
        let split: Vec<(&PeerConfig, &Standing)> =
            said.filter(|(peer, standing)| self.is_split_from(peer.host, standing)).collect();
        let steps: Vec<String> = split
            .iter()
            .map(|(peer, standing)| {
                let loser = &peer.name;
                match standing.role {
                    Role::Primary => format!(
                        "on {loser}: blockmirror demote {volume}, then there: blockmirror resolve {volume} --keep {own}"
                    ),
                    Role::Replica => format!("on {loser}: blockmirror resolve {volume} --keep {own}"),
                }
            })
            .collect();
        if !steps.is_empty() {
            let then = match self.superblock.role {
                Role::Primary => String::new(),
                Role::Replica => format!("; then here: blockmirror promote {volume} --force"),
            };
            return format!(
                "this host's content stays when the other's goes, which is decided there: {}{then}",
                steps.join("; ")
            );
        }
        let silent: Vec<&str> = answers
            .iter()
            .filter(|(_, answered)| answered.is_err())
            .map(|(peer, _)| peer.name.as_str())
            .collect();
        match silent.as_slice() {
            [] => "nothing to resolve: no other host has written what this one lacks".to_owned(),
            silent => format!("nothing is known to resolve, but {} does not answer", silent.join(", ")),
        }
    }

    /// Whether one of the two was recovered or set back to what it was before the other's content.
    pub(super) fn lacks_what_ended(&self, standing: &Standing) -> bool {
        self.superblock.ends.lacks(standing.marker) || standing.ends.lacks(self.position)
    }

    /// Whether one of the two would have to give something up to follow the other.
    fn is_split_from(&self, host: HostId, standing: &Standing) -> bool {
        let mine: &[GenerationId] = &self.superblock.lineage;
        if standing.fence.against(self.superblock.fence) == Claim::Rival && standing.data != DataState::Empty
        {
            // Each refuses the other, whoever wrote what (L5).
            return true;
        }
        if mine.is_empty() || standing.lineage.is_empty() || standing.data == DataState::Empty {
            return false;
        }
        if self.lacks_what_ended(standing) {
            return true;
        }
        let was_promoted = |fence: HostId, host| fence == host;
        match lineage::relation(mine, &standing.lineage) {
            Relation::Forked(_) | Relation::Unrelated => true,
            // A host that merely missed something follows by itself; one that was promoted doesn't.
            Relation::MineIsNewer => was_promoted(standing.fence.holder, host),
            Relation::TheirsIsNewer => was_promoted(self.superblock.fence.holder, self.own.0),
            Relation::Same => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use blockmirror_protocol::lineage::Ends;
    use blockmirror_protocol::terms::{Fence, Mode, Promise};
    use blockmirror_protocol::units::{BlockSize, CopyId, Epoch, Session, VolumeId};

    fn lineage(text: &str) -> Vec<GenerationId> {
        text.bytes().map(|byte| GenerationId([byte; 16])).collect()
    }

    fn fence(holder: u8) -> Fence {
        Fence { counter: 3, holder: HostId([holder; 32]) }
    }

    /// Host a (1), which was superseded by b (2) and is a replica.
    fn resolver(generations: &str) -> Resolver {
        let superblock = Superblock {
            volume: VolumeId([1; 16]),
            copy: CopyId([2; 16]),
            size_bytes: 1 << 20,
            block_size: BlockSize::default(),
            role: Role::Replica,
            data: DataState::Consistent,
            session: Session(0),
            fence: fence(2),
            position: Position::default(),
            source: fence(2),
            lineage: lineage(generations),
            adopted: 1,
            gap: 0,
            layers: 0,
            history: 0,
            mode: Mode::Async,
            promise: Promise::None,
            released: false,
            replaced: false,
            run: Epoch(0),
            ends: Ends::default(),
            agreed: 3,
        };
        let own = (HostId([1; 32]), "a".to_owned());
        Resolver {
            volume: "data".parse().unwrap(),
            own,
            superblock,
            position: Position::default(),
            openers: None,
        }
    }

    fn standing(generations: &str) -> Standing {
        Standing {
            role: Role::Primary,
            data: DataState::Consistent,
            can_roll_back: false,
            fence: fence(2),
            lineage: lineage(generations),
            marker: Position::default(),
            serves: true,
            dirty_bytes: 0,
            began: Vec::new(),
            silent_milliseconds: 0,
            ends: Ends::default(),
            replaced: false,
        }
    }

    fn says(name: &str, host: u8, answered: Answered) -> (PeerConfig, Answered) {
        let role = config::Role::Replica;
        (PeerConfig::new(name.parse().unwrap(), role, HostId([host; 32]), Vec::new()), answered)
    }

    const B: HostId = HostId([2; 32]);

    #[test]
    fn a_replica_that_is_split_from_another_host_may_take_its_content() {
        for (mine, theirs) in [("xa", "ba"), ("xa", "a"), ("x", "b")] {
            let winner = resolver(mine).winner(B, &[says("b", 2, Ok(standing(theirs)))]);
            assert_eq!(winner.map(|winner| winner.name), Ok("b".to_owned()), "{mine} {theirs}");
        }
    }

    /// Two that could not hear each other were promoted from the same number: each refused the other, and here it was said
    /// that there was nothing to resolve.
    #[test]
    fn a_replica_that_was_promoted_as_often_may_take_the_others_content_whoever_wrote() {
        for (mine, theirs) in [("ba", "ba"), ("a", "ba"), ("ba", "a"), ("ca", "ba")] {
            let mut resolver = resolver(mine);
            resolver.superblock.fence = fence(1);
            let winner = resolver.winner(B, &[says("b", 2, Ok(standing(theirs)))]);
            assert_eq!(winner.map(|winner| winner.name), Ok("b".to_owned()), "{mine} {theirs}");
        }
    }

    #[test]
    fn a_host_that_was_recovered_from_an_older_copy_is_split_from_one_that_has_more() {
        let position = |epoch| Position {
            generation: GenerationId([b'a'; 16]),
            epoch: Epoch(epoch),
            ..Position::default()
        };
        let ends = Ends::only(GenerationId([b'a'; 16]), Epoch(9));
        let older = Standing { ends: ends.clone(), ..standing("ba") };
        let yields = |position, standing: Standing| {
            Resolver { position, ..resolver("a") }.winner(B, &[says("b", 2, Ok(standing))]).is_ok()
        };
        assert!(yields(position(9), older.clone()), "this one has more");
        assert!(!yields(position(8), older), "this one has no more than was recovered");
        let mut recovered = resolver("ba");
        recovered.superblock.ends = ends;
        let before = Fence { counter: 2, holder: HostId([1; 32]) };
        let more = Standing { role: Role::Replica, fence: before, marker: position(9), ..standing("a") };
        assert!(recovered.winner(B, &[says("b", 2, Ok(more.clone()))]).is_ok(), "the other one has more");
        let no_more = Standing { marker: position(8), ..more };
        assert!(recovered.winner(B, &[says("b", 2, Ok(no_more))]).is_err());
    }

    #[test]
    fn where_nothing_is_split_nothing_is_resolved() {
        let older = Fence { counter: 2, holder: HostId([1; 32]) };
        let demoted = Standing { role: Role::Replica, serves: false, fence: older, ..standing("a") };
        for (mine, theirs) in [("ba", standing("ba")), ("a", standing("ba")), ("ba", demoted)] {
            let text = resolver(mine).winner(B, &[says("b", 2, Ok(theirs))]).unwrap_err();
            assert!(text.starts_with("nothing to resolve"), "{mine}: {text}");
        }
        let mut empty = resolver("");
        empty.superblock.data = DataState::Empty;
        let text = empty.winner(B, &[says("b", 2, Ok(standing("ba")))]).unwrap_err();
        assert!(text.starts_with("nothing to resolve"), "{text}");
        let own = resolver("ba").winner(HostId([1; 32]), &[says("b", 2, Ok(standing("ba")))]).unwrap_err();
        assert!(own.starts_with("nothing to resolve"), "{own}");
    }

    #[test]
    fn each_refusal_says_what_leads_on() {
        let silent = || Err("it does not answer".to_owned());
        let mixture = Standing { data: DataState::Inconsistent, ..standing("ba") };
        let other = Standing { role: Role::Replica, serves: false, ..standing("ba") };
        let mut primary = resolver("xa");
        primary.superblock.role = Role::Primary;
        let mut superseded = primary.clone();
        superseded.openers = Some(vec!["client".to_owned()]);
        let own = HostId([1; 32]);
        for (resolver, keep, answers, words) in [
            (resolver("xa"), B, vec![says("b", 2, silent())], "b must say how it stands"),
            (resolver("xa"), B, vec![says("b", 2, Ok(mixture))], "b has no whole copy"),
            (resolver("xa"), B, vec![], "none of the volume's"),
            (primary.clone(), B, vec![says("b", 2, Ok(other.clone()))], "first: blockmirror demote data"),
            (superseded, B, vec![says("b", 2, Ok(standing("ba")))], "close it first: client"),
            (
                resolver("xa"),
                B,
                vec![says("b", 2, Ok(other.clone())), says("c", 3, Ok(standing("ba")))],
                "blockmirror resolve data --keep c",
            ),
            (
                primary,
                own,
                vec![says("b", 2, Ok(other))],
                "decided there: on b: blockmirror resolve data --keep a",
            ),
            (
                resolver("xa"),
                own,
                vec![says("b", 2, Ok(standing("ba")))],
                "on b: blockmirror demote data, then there: blockmirror resolve data --keep a; \
                 then here: blockmirror promote data --force",
            ),
            (resolver("ba"), own, vec![says("b", 2, silent())], "b does not answer"),
        ] {
            let text = resolver.winner(keep, &answers).unwrap_err();
            assert!(text.contains(words), "{text:?} should say {words:?}");
        }
    }
}
