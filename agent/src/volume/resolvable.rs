//! Whether a host may give its content up for another's (L6), in words: where it refuses, it names the command that leads
//! on. The rule is [`Side::yields_to`].

use super::promotable::heard;
use crate::config::{Name, PeerConfig};
use crate::standing::Answered;
use blockmirror_protocol::disk::superblock::Role;
use blockmirror_protocol::split::{Objection, Side};
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::Standing;

/// A host that was asked to resolve a split.
#[derive(Clone, Debug)]
pub(super) struct Resolver {
    /// The volume.
    pub(super) volume: Name,
    /// This host's name.
    pub(super) own_name: String,
    /// Its copy.
    pub(super) side: Side,
    /// On a primary that another one was promoted after: who has its devices open.
    pub(super) openers: Option<Vec<String>>,
}

impl Resolver {
    /// How the host stands whose content stays; this host's goes.
    ///
    /// # Errors
    /// Why that is not done here or now, and what leads on.
    pub(super) fn winner(
        &self,
        keep: HostId,
        answers: &[(PeerConfig, Answered)],
    ) -> Result<Standing, String> {
        let objection = match self.side.yields_to(keep, &heard(answers)) {
            Ok(standing) => return Ok(standing.clone()),
            Err(objection) => objection,
        };
        let (volume, kept) = (&self.volume, answers.iter().find(|(peer, _)| peer.host == keep));
        let name = kept.map_or_else(String::new, |(peer, _)| peer.name.to_string());
        Err(match objection {
            Objection::Empty => {
                "nothing to resolve: this copy is empty, and takes any primary's content".to_owned()
            }
            Objection::Own => self.others_must_yield(answers),
            Objection::Unknown => "that host is none of the volume's".to_owned(),
            Objection::Silent => {
                let error = kept.and_then(|(_, answered)| answered.as_ref().err()).cloned();
                format!(
                    "{name} must say how it stands before this host's content goes, and does not: {}",
                    error.unwrap_or_default()
                )
            }
            Objection::NoSource => {
                format!("{name} has no whole copy of {volume}, so it is not its content that stays")
            }
            Objection::NotSplit => {
                format!("nothing to resolve: this host has nothing that {name} lacks and would refuse")
            }
            Objection::Primary => match &self.openers {
                Some(openers) => format!(
                    "{name} was promoted, and this host becomes a replica when nobody has its device open; \
                     close it first: {}",
                    openers.join(", ")
                ),
                None => format!(
                    "this host is the primary, and nothing is written under an open device; first: \
                     blockmirror demote {volume}"
                ),
            },
            Objection::OutOfReach => {
                format!("the disk of {name} is not there or does not answer: bring it back first")
            }
            Objection::OtherPrimary(primary) => {
                let primary = answers.iter().find(|(peer, _)| peer.host == primary);
                let primary = primary.map_or_else(String::new, |(peer, _)| peer.name.to_string());
                format!(
                    "{primary} is the primary, so it is its content that this host would take: \
                     blockmirror resolve {volume} --keep {primary}"
                )
            }
        })
    }

    /// This host's content stays: that is decided on the host whose content goes.
    fn others_must_yield(&self, answers: &[(PeerConfig, Answered)]) -> String {
        let (volume, own) = (&self.volume, &self.own_name);
        let said = answers.iter().filter_map(|(peer, answered)| Some((peer, answered.as_ref().ok()?)));
        let split: Vec<(&PeerConfig, &Standing)> =
            said.filter(|(peer, standing)| self.side.is_split_from(peer.host, standing)).collect();
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
            let then = match self.side.superblock.role {
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
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config;
    use blockmirror_protocol::disk::superblock::Superblock;
    use blockmirror_protocol::lineage::Ends;
    use blockmirror_protocol::terms::{DataState, Fence};
    use blockmirror_protocol::units::{BlockSize, CopyId, GenerationId, Position, VolumeId};

    fn lineage(text: &str) -> Vec<GenerationId> {
        text.bytes().map(|byte| GenerationId([byte; 16])).collect()
    }

    fn fence(holder: u8) -> Fence {
        Fence { counter: 3, holder: HostId([holder; 32]) }
    }

    /// Host a (1), which was superseded by b (2) and is a replica.
    fn resolver(generations: &str) -> Resolver {
        let empty = Superblock::empty(VolumeId([1; 16]), CopyId([2; 16]), 1 << 20, BlockSize::default());
        let superblock = Superblock {
            data: DataState::Consistent,
            fence: fence(2),
            source: fence(2),
            lineage: lineage(generations),
            adopted: 1,
            agreed: 3,
            heirs: Vec::new(),
            ..empty
        };
        let side = Side { own: HostId([1; 32]), superblock, position: Position::default() };
        Resolver { volume: "data".parse().unwrap(), own_name: "a".to_owned(), side, openers: None }
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
            given: Box::default(),
        }
    }

    fn says(name: &str, host: u8, answered: Answered) -> (PeerConfig, Answered) {
        let role = config::Role::Replica;
        (PeerConfig::new(name.parse().unwrap(), role, HostId([host; 32]), Vec::new()), answered)
    }

    const B: HostId = HostId([2; 32]);

    #[test]
    fn where_nothing_is_split_nothing_is_resolved() {
        let older = Fence { counter: 2, holder: HostId([1; 32]) };
        let demoted = Standing { role: Role::Replica, serves: false, fence: older, ..standing("a") };
        for (mine, theirs) in [("ba", standing("ba")), ("a", standing("ba")), ("ba", demoted)] {
            let text = resolver(mine).winner(B, &[says("b", 2, Ok(theirs))]).unwrap_err();
            assert!(text.starts_with("nothing to resolve"), "{mine}: {text}");
        }
        let mut empty = resolver("");
        empty.side.superblock.data = DataState::Empty;
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
        primary.side.superblock.role = Role::Primary;
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
