//! What a replica's metadata says when it becomes the primary (P1, P2, P5, L5), step by step: [`crate::rewrite`].
//!
//! All steps may be done again, so a crash between any two leaves a replica that can be promoted once more, or go on as one:
//! whatever a rollback has restored is in the maps by then, and they are a part of what it says in a greeting (D3).
//!
//! A map that this copy has kept since it was a primary is still good; for every other peer a clean one is made. It is
//! relative to the newest generation here: a peer that has the same one differs only in the extents of the two
//! activity logs (D5), and to any other peer the map does not apply (L2). Of the primary from before it is known that it
//! has all that this host got from it: where it says less, it was set back (X4).

use super::consent;
use crate::dirty_map::DirtyMap;
use crate::disk::dirty_map::Base;
use crate::disk::superblock::{LINEAGE_LIMIT, Role, Superblock};
use crate::given::Given;
use crate::layers::Purpose;
use crate::lineage;
use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use crate::terms::{DataState, Fence, Mode};
use crate::units::{GenerationId, HostId, Mark, Position};

/// Why a replica can't be promoted, whatever it would lose.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotPromotable {
    /// Nothing was ever copied.
    #[error("the replica is empty: its first sync has not ended")]
    Empty,
    /// A mixture without a way back.
    #[error("the replica is inconsistent and has no rollback point")]
    Inconsistent,
    /// It is the primary already.
    #[error("this host is the primary already")]
    Primary,
    /// Something else wrote to it, and the operator has not said that it is to be the volume's content all the same (X4).
    #[error(
        "something else wrote to this copy, and it was not compared with a primary's since; --force promotes it as it is"
    )]
    Touched,
    /// So many promotions were never made: a host of the volume has told of them.
    #[error(
        "the counter of promotions or of runs is used up; a host of the volume told of promotions that never were"
    )]
    UsedUp,
}

/// Whether a replica can be promoted, whatever it would lose.
///
/// # Errors
/// [`NotPromotable`] when no step would make a legal image of the volume.
pub fn must_be_promotable(superblock: &Superblock) -> Result<(), NotPromotable> {
    if superblock.role == Role::Primary {
        return Err(NotPromotable::Primary);
    }
    // The promotion must have a number, and the epochs that come after it.
    if superblock.fence.raised(HostId::default()).is_none() || superblock.next_run().is_none() {
        return Err(NotPromotable::UsedUp);
    }
    match (superblock.data, superblock.layers.rollback()) {
        (DataState::Empty, _) => Err(NotPromotable::Empty),
        (DataState::Inconsistent, None) => Err(NotPromotable::Inconsistent),
        (DataState::Consistent | DataState::Inconsistent, _) => Ok(()),
    }
}

/// The map to write for a peer: the one that was kept, if it is still good, else a clean one, with every block that a
/// rollback will restore (P2). `map` is as recovered, or full; `position` is the replica's last one.
#[must_use]
pub(crate) fn map_for(
    mut map: DirtyMap,
    superblock: &Superblock,
    peer: HostId,
    position: Position,
    restored: &[ByteRange],
) -> DirtyMap {
    let (base, adopted) = (map.base(), superblock.adopted);
    if map.is_lost() {
        map.begin_anew(superblock.base_of_everything());
    } else if base.is_none() || base.adopted != adopted {
        let generation = superblock.lineage.first().copied().unwrap_or_default();
        map = map.clean(Base { generation, adopted, ..Base::default() });
        if peer == superblock.source.holder && position.generation == generation {
            map.note_known(Mark { position, ..Mark::default() });
        }
    }
    for range in restored.iter().filter(|_| !planted(Bug::RollBackUnmarked)) {
        map.mark(range.blocks(superblock.block_size));
    }
    map
}

/// What the superblock says while a layer is restored: the content is no primary's any more. Where that is cut short and
/// the primary of the resync comes back, the bits that it cleared are told to it again; and where there are no generations
/// that its map could be relative to, the map counts for nothing.
pub(crate) fn begin(superblock: &mut Superblock) {
    superblock.source = Fence::default();
}

/// What the superblock says once `host` is promoted; `position` is the replica's last one.
///
/// # Errors
/// [`NotPromotable::UsedUp`] where the fence can't be raised; nothing is changed then.
pub(crate) fn record(
    superblock: &mut Superblock,
    host: HostId,
    position: Position,
) -> Result<(), NotPromotable> {
    superblock.fence = superblock.fence.raised(host).ok_or(NotPromotable::UsedUp)?;
    consent::give(superblock);
    superblock.role = Role::Primary;
    superblock.data = DataState::Consistent;
    superblock.position = position;
    superblock.layers.set(Purpose::Rollback, None);
    superblock.keep_in(None);
    (superblock.released, superblock.replaced) = (false, false);
    // Where something else wrote to it, the operator takes it as it is.
    superblock.touched = false;
    superblock.heirs.clear();
    Ok(())
}

/// What the superblock says once a primary is demoted, or met the newer `fence`; `position` is where it got to. A
/// generation of its `own` is begun for what it answered and never delivered to the host that was promoted: that is not
/// lost without the operator's word (L3, L6). Where there is nothing of that, the generations go that are newer than the one
/// in which anything was `answered` last: what was written in them is in the maps, and nobody misses it.
pub fn record_demotion(
    superblock: &mut Superblock,
    fence: Fence,
    mut position: Position,
    own: Option<GenerationId>,
    answered: Option<GenerationId>,
) {
    match own {
        Some(own) => lineage::begin(&mut superblock.lineage, own, &[], LINEAGE_LIMIT),
        None => {
            let place = |newest| superblock.lineage.iter().position(|generation| *generation == newest);
            let begun = answered.and_then(place).unwrap_or(0);
            superblock.lineage.drain(..begun);
            position.generation = superblock.lineage.first().copied().unwrap_or_default();
        }
    }
    superblock.role = Role::Replica;
    superblock.fence = fence;
    superblock.heirs.clear();
    // Of what is absent here, no map of the new primary's says that it differs: it is to take this copy for nobody's (S4).
    let is_whole = superblock.data == DataState::Consistent || planted(Bug::DemoteAbsent);
    superblock.source = if is_whole { fence } else { Fence::default() };
    superblock.position = position;
    (superblock.mode, superblock.given, superblock.released) = (Mode::Async, Given::NOTHING, false);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{BlockSize, Epoch, Sequence, VolumeId};

    /// The map said that it differs nowhere, whatever its host had been set back to.
    #[test]
    fn the_primary_of_before_is_known_to_have_what_came_from_it() {
        let host = |number| HostId([number; 32]);
        let mut superblock = crate::replica::tests::superblock("ba");
        superblock.source = Fence { counter: 2, holder: host(2) };
        let generation = superblock.lineage[0];
        let position = Position { generation, epoch: Epoch(9), sequence: Sequence(0) };
        let known = |peer, position| {
            let map = DirtyMap::full(VolumeId([1; 16]), peer, 1 << 20, BlockSize::default());
            map_for(map, &superblock, peer, position, &[]).known().position
        };
        assert_eq!(known(host(2), position), position);
        assert_eq!(known(host(3), position), Position::default(), "another replica may have less");
        // Nothing of the newest generation is durable here: others may have it in any state.
        let older = Position { generation: superblock.lineage[1], ..position };
        assert_eq!(known(host(2), older), Position::default());
    }

    /// A map that could not be read was taken for that of a host that nothing was written without: what the two differed in, nobody
    /// knew any more (D1).
    #[test]
    fn a_map_that_is_lost_says_that_all_may_differ() {
        let superblock = crate::replica::tests::superblock("ba");
        let lost = DirtyMap::full(VolumeId([1; 16]), HostId([3; 32]), 1 << 20, BlockSize::default()).lost();
        let map = map_for(lost, &superblock, HostId([3; 32]), Position::default(), &[]);
        assert!(map.is_full() && map.base() == superblock.base_of_everything());
    }
}
