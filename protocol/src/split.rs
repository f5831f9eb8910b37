//! Split brain: two hosts went on after a common past, and the operator decides whose content stays (L6). Here is whether two
//! copies are split, whether one of them may be given up for the other, and what it says of itself then
//! ([`crate::replica::resolve`]).

use crate::disk::dirty_map::Base;
use crate::disk::superblock::{Role, Superblock};
use crate::layers::LayerId;
use crate::lineage::{self, Relation};
use crate::replica::resolve;
use crate::succession::{self, Heard};
use crate::terms::{Claim, DataState, Fence};
use crate::units::{GenerationId, HostId, Position};
use crate::wire::message::Standing;

/// One of the copies, as its own host knows it.
#[derive(Clone, Debug)]
pub struct Side {
    /// The host.
    pub own: HostId,
    /// What is durable there.
    pub superblock: Superblock,
    /// The last epoch that is durable there.
    pub position: Position,
}

/// Why a host's content is not given up for another's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Objection {
    /// It is empty, and takes any primary's content.
    Empty,
    /// It is its own content that is to stay: that is decided on the other host.
    Own,
    /// The other one is no host of the volume.
    Unknown,
    /// The other one must say how it stands, and is silent.
    Silent,
    /// The other one's copy can't be a source.
    NoSource,
    /// The two are not split: this one has nothing that the other one lacks and would refuse.
    NotSplit,
    /// It is the primary: nothing is written under an open device (L5).
    Primary,
    /// The other one's disk is not there, or does not answer.
    OutOfReach,
    /// This host is the primary, so it is that one's content which is taken.
    OtherPrimary(HostId),
}

/// What a host says of itself once its content is given up.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Concession {
    /// The generations that the two have in common; none where everything is copied.
    lineage: Vec<GenerationId>,
    /// The fence of the host that stays.
    winner: Fence,
}

impl Side {
    /// Whether one of the two would have to give something up to follow the other, which is that host's and stands so.
    #[must_use]
    pub fn is_split_from(&self, host: HostId, standing: &Standing) -> bool {
        let mine: &[GenerationId] = &self.superblock.lineage;
        if standing.fence.against(self.superblock.fence) == Claim::Rival && standing.data != DataState::Empty
        {
            // Each refuses the other, whoever wrote what (L5).
            return true;
        }
        if mine.is_empty() || standing.data == DataState::Empty {
            return false;
        }
        if standing.lineage.is_empty() {
            // It gave up what it had. If it was promoted since, what it holds is nobody else's, though it wrote nothing yet.
            return standing.fence.holder == host;
        }
        if self.lacks_what_ended(standing) {
            return true;
        }
        match lineage::relation(mine, &standing.lineage) {
            Relation::Forked(_) | Relation::Unrelated => true,
            // A host that merely missed something follows by itself; one that was promoted doesn't.
            Relation::MineIsNewer => standing.fence.holder == host,
            Relation::TheirsIsNewer => self.superblock.fence.holder == self.own,
            Relation::Same => false,
        }
    }

    /// Whether one of the two was recovered or set back to what it was before the other's content. No map says what the one
    /// has had that the other was set back from: there is nothing in common to go on from.
    #[must_use]
    pub fn lacks_what_ended(&self, standing: &Standing) -> bool {
        self.superblock.ends.lacks(standing.marker) || standing.ends.lacks(self.position)
    }

    /// How the host stands whose content stays; this one's may go.
    ///
    /// # Errors
    /// [`Objection`]: why not, or not now.
    pub fn yields_to<'a>(&self, keep: HostId, others: &'a [Heard]) -> Result<&'a Standing, Objection> {
        if keep == self.own {
            return Err(Objection::Own);
        }
        let other = others.iter().find(|other| other.host == keep).ok_or(Objection::Unknown)?;
        let standing = other.standing.as_ref().ok_or(Objection::Silent)?;
        let is_rival = standing.fence.against(self.superblock.fence) == Claim::Rival;
        // One that follows a host which was promoted as often refuses the other one also where it is empty.
        if self.superblock.data == DataState::Empty && !is_rival {
            return Err(Objection::Empty);
        }
        if !succession::is_usable(standing) {
            return Err(Objection::NoSource);
        }
        if !self.is_split_from(keep, standing) {
            return Err(Objection::NotSplit);
        }
        if self.superblock.role == Role::Primary {
            return Err(Objection::Primary);
        }
        if standing.is_out_of_reach() {
            return Err(Objection::OutOfReach);
        }
        let serves = |other: &&Heard| {
            let standing = other.standing.as_ref();
            other.host != keep
                && standing.is_some_and(|standing| standing.role == Role::Primary && standing.serves)
        };
        match others.iter().find(serves) {
            Some(primary) => Err(Objection::OtherPrimary(primary.host)),
            None => Ok(standing),
        }
    }

    /// What it says of itself once its content is given up for that of a host that stands so. `map` is what its map for that
    /// host is relative to, where there is one.
    #[must_use]
    pub fn concession(&self, winner: &Standing, map: Option<Base>) -> Concession {
        let lineage = match self.lacks_what_ended(winner) {
            true => Vec::new(),
            false => {
                let Superblock { lineage, adopted, .. } = &self.superblock;
                resolve::yielded(lineage, &winner.lineage, map, *adopted)
            }
        };
        Concession { lineage, winner: winner.fence }
    }
}

impl Concession {
    /// Whether everything is copied, since nothing is known that the two have in common.
    #[must_use]
    pub fn copies_everything(&self) -> bool {
        self.lineage.is_empty()
    }

    /// Makes the superblock say so, in one durable write. `undo` is the layer that keeps what the copy had
    /// ([`resolve::keep`]).
    pub fn record(&self, superblock: &mut Superblock, undo: Option<LayerId>) {
        resolve::record(superblock, self.lineage.clone(), undo, self.winner);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    use crate::lineage::Ends;
    use crate::units::Epoch;

    const A: HostId = HostId([1; 32]);
    const B: HostId = HostId([2; 32]);
    const C: HostId = HostId([3; 32]);

    fn lineage(text: &str) -> Vec<GenerationId> {
        text.bytes().map(|byte| GenerationId([byte; 16])).collect()
    }

    fn fence(holder: HostId) -> Fence {
        Fence { counter: 3, holder }
    }

    /// Host a, which was superseded by b and is a replica.
    fn side(generations: &str) -> Side {
        let mut superblock = crate::replica::tests::superblock(generations);
        superblock.role = Role::Replica;
        superblock.fence = fence(B);
        superblock.ends = Ends::default();
        Side { own: A, superblock, position: Position::default() }
    }

    fn standing(generations: &str) -> Standing {
        Standing {
            role: Role::Primary,
            data: DataState::Consistent,
            can_roll_back: false,
            fence: fence(B),
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

    fn says(host: HostId, standing: Option<Standing>) -> Heard {
        Heard { host, standing }
    }

    fn yields(side: &Side, theirs: Standing) -> Result<(), Objection> {
        side.yields_to(B, &[says(B, Some(theirs))]).map(drop)
    }

    #[test]
    fn a_replica_that_is_split_from_another_host_may_take_its_content() {
        // The last one gave its content up, and was promoted before it got another one.
        for (mine, theirs) in [("xa", "ba"), ("xa", "a"), ("x", "b"), ("xa", "")] {
            assert_eq!(yields(&side(mine), standing(theirs)), Ok(()), "{mine} {theirs}");
        }
    }

    /// Two that could not hear each other were promoted from the same number: each refused the other, and here it was said
    /// that there was nothing to resolve.
    #[test]
    fn a_replica_that_was_promoted_as_often_may_take_the_others_content_whoever_wrote() {
        for (mine, theirs) in [("ba", "ba"), ("a", "ba"), ("ba", "a"), ("ca", "ba")] {
            let mut side = side(mine);
            side.superblock.fence = fence(A);
            assert_eq!(yields(&side, standing(theirs)), Ok(()), "{mine} {theirs}");
            side.superblock.data = DataState::Empty;
            assert_eq!(yields(&side, standing(theirs)), Ok(()), "empty, and it refuses the other one");
        }
    }

    #[test]
    fn a_host_that_was_recovered_from_an_older_copy_is_split_from_one_that_has_more() {
        let generation = GenerationId([b'a'; 16]);
        let position = |epoch| Position { generation, epoch: Epoch(epoch), ..Position::default() };
        let ends = Ends::only(generation, Epoch(9));
        let older = Standing { ends: ends.clone(), ..standing("ba") };
        let at = |epoch| Side { position: position(epoch), ..side("a") };
        assert_eq!(yields(&at(9), older.clone()), Ok(()), "this one has more");
        assert!(at(9).concession(&older, None).copies_everything());
        let objection = yields(&at(8), older);
        assert_eq!(objection, Err(Objection::NotSplit), "this one has no more than was recovered");
        let mut recovered = side("ba");
        recovered.superblock.ends = ends;
        let before = Fence { counter: 2, holder: A };
        let more = Standing { role: Role::Replica, fence: before, marker: position(9), ..standing("a") };
        assert_eq!(yields(&recovered, more.clone()), Ok(()), "the other one has more");
        let no_more = Standing { marker: position(8), ..more };
        assert_eq!(yields(&recovered, no_more), Err(Objection::NotSplit));
    }

    #[test]
    fn what_may_not_be_given_up_is_objected_to() {
        let older = Fence { counter: 2, holder: A };
        let replica = |generations| Standing { role: Role::Replica, serves: false, ..standing(generations) };
        let mixture = Standing { data: DataState::Inconsistent, ..standing("ba") };
        let mut empty = side("");
        empty.superblock.data = DataState::Empty;
        let mut primary = side("xa");
        primary.superblock.role = Role::Primary;
        for (side, keep, others, objection) in [
            (side("ba"), B, vec![says(B, Some(standing("ba")))], Objection::NotSplit),
            (side("a"), B, vec![says(B, Some(standing("ba")))], Objection::NotSplit),
            (
                side("ba"),
                B,
                vec![says(B, Some(Standing { fence: older, ..replica("a") }))],
                Objection::NotSplit,
            ),
            (empty, B, vec![says(B, Some(standing("ba")))], Objection::Empty),
            (side("xa"), A, vec![says(B, Some(standing("ba")))], Objection::Own),
            (side("xa"), B, vec![says(B, None)], Objection::Silent),
            (side("xa"), B, vec![], Objection::Unknown),
            (side("xa"), B, vec![says(B, Some(mixture))], Objection::NoSource),
            (primary, B, vec![says(B, Some(replica("ba")))], Objection::Primary),
            (
                side("xa"),
                B,
                vec![says(B, Some(replica("ba"))), says(C, Some(standing("ba")))],
                Objection::OtherPrimary(C),
            ),
        ] {
            assert_eq!(side.yields_to(keep, &others).map(drop), Err(objection));
        }
    }

    #[test]
    fn what_is_given_up_goes_back_to_what_the_map_vouches_for() {
        let base = Base { generation: GenerationId([b'a'; 16]), adopted: 1, ..Base::default() };
        let mut yielded = side("xa");
        yielded.superblock.adopted = 1;
        let concession = yielded.concession(&standing("ba"), Some(base));
        assert!(!concession.copies_everything());
        concession.record(&mut yielded.superblock, LayerId::new(7));
        assert_eq!(
            (yielded.superblock.lineage, yielded.superblock.layers.undo()),
            (lineage("a"), LayerId::new(7))
        );
        assert!(side("xa").concession(&standing("ba"), None).copies_everything());
    }
}
