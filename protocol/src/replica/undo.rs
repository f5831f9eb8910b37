//! What the operator gave up is brought back: the pre-images of the history are restored (L6).
//!
//! The host is then what it was before: its content, its generations, and so the split. Every block that is restored is
//! durably in its maps of all peers first: their own maps of this host were cleared while it followed them. From there to
//! the end it counts as a mixture that the same layer leads back from, so a crash in the middle leaves a replica that can
//! be undone once more, or promoted. Nobody who overwrote it is agreed to any more ([`super::consent`]). Where something
//! else wrote to what is brought back, the copy says so again (X4).

use super::consent;
use crate::dirty_map::DirtyMap;
use crate::disk::dirty_map::Base;
use crate::disk::superblock::{LINEAGE_LIMIT, Role, Superblock};
use crate::layers::{LayerId, Purpose};
use crate::lineage;
use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use crate::terms::{DataState, Fence, Mode};
use crate::units::{GenerationId, HostId, Position};

/// Why nothing can be undone.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum NotUndoable {
    /// A primary keeps no history.
    #[error("this host is the primary; a promotion gives up what was kept for undo")]
    Primary,
    /// Nothing was kept, or it was forgotten.
    #[error("nothing is kept here that could be brought back")]
    NoHistory,
}

/// The layer that keeps what a replica had.
///
/// # Errors
/// [`NotUndoable`] when there is nothing to bring back.
pub fn layer(superblock: &Superblock) -> Result<LayerId, NotUndoable> {
    match (superblock.role, superblock.layers.undo()) {
        (Role::Primary, _) => Err(NotUndoable::Primary),
        (Role::Replica, None) => Err(NotUndoable::NoHistory),
        (Role::Replica, Some(layer)) => Ok(layer),
    }
}

/// The map to write for a peer. `map` is as recovered, or full; `before` are the generations to which the history leads
/// back.
///
/// A map that still holds is kept, with the blocks that will be restored. For the primary whose content this copy adopted
/// since, these are all that differ, but for what that one has in its own map; so the map reaches back to what the two
/// have in common. Of any other peer nothing is known: all may differ.
#[must_use]
pub(crate) fn map_for(
    mut map: DirtyMap,
    superblock: &Superblock,
    peer: HostId,
    before: &[GenerationId],
    restored: &[ByteRange],
) -> DirtyMap {
    let (base, adopted) = (map.base(), superblock.adopted);
    if base.is_none() || base.adopted != adopted {
        let is_before = superblock.lineage.first().is_none_or(|newest| before.contains(newest));
        let is_consistent = superblock.data == DataState::Consistent;
        let is_adopted = is_consistent && !is_before && superblock.source.holder == peer;
        let fork = before.iter().find(|generation| superblock.lineage.contains(generation));
        match fork.filter(|_| is_adopted && !map.is_lost()) {
            Some(fork) => map = map.clean(Base { generation: *fork, adopted, ..Base::default() }),
            None => {
                let generation = before.last().copied().unwrap_or_default();
                map.begin_anew(Base { generation, adopted, ..Base::default() });
            }
        }
    }
    for range in restored.iter().filter(|_| !planted(Bug::UndoUnmarked)) {
        map.mark(range.blocks(superblock.block_size));
    }
    map
}

/// What the superblock says while the history is restored. Where a primary contains the generations to which it leads
/// back, as after a return with undelivered writes, a generation of its `own` is begun: that primary would overwrite what
/// was just restored.
pub(crate) fn begin(superblock: &mut Superblock, before: &[GenerationId], own: GenerationId) {
    let is_contained = before.first().is_none_or(|newest| superblock.lineage.contains(newest));
    superblock.lineage = before.to_vec();
    if is_contained {
        lineage::begin(&mut superblock.lineage, own, &[], LINEAGE_LIMIT);
    }
    superblock.data = DataState::Inconsistent;
    superblock.layers.set(Purpose::Rollback, superblock.layers.undo());
    (superblock.mode, superblock.source) = (Mode::Async, Fence::default());
    (superblock.released, superblock.replaced) = (false, true);
    // What something else wrote before it was kept comes back as well.
    superblock.touched |= superblock.layers.is_undo_touched() && !planted(Bug::UndoTouched);
    consent::withdraw(superblock);
}

/// What the superblock says when the history is restored; `point` is the position to which it leads back.
pub(crate) fn record(superblock: &mut Superblock, point: Position) {
    superblock.data = DataState::Consistent;
    superblock.position = point;
    superblock.layers.set(Purpose::Rollback, None);
    superblock.keep_in(None);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::Catalog;
    use crate::layers::testing::catalog;
    use crate::units::{BlockSize, CopyId, Session, VolumeId};

    const B: HostId = HostId([2; 32]);

    fn lineage(text: &str) -> Vec<GenerationId> {
        text.bytes().map(|byte| GenerationId([byte; 16])).collect()
    }

    /// A replica that had "xa", and has adopted "ba" from the host b.
    fn superblock() -> Superblock {
        let fence = Fence { counter: 2, holder: B };
        Superblock {
            volume: VolumeId([1; 16]),
            copy: CopyId([2; 16]),
            size_bytes: 1 << 20,
            block_size: BlockSize::default(),
            role: Role::Replica,
            data: DataState::Consistent,
            session: Session(0),
            fence,
            position: Position::default(),
            source: fence,
            lineage: lineage("ba"),
            adopted: 1,
            layers: catalog(0, 3),
            mode: Mode::Async,
            given: crate::given::Given::NOTHING,
            released: false,
            replaced: false,
            touched: false,
            run: crate::units::Epoch(0),
            ends: crate::lineage::Ends::default(),
            agreed: 2,
            heirs: Vec::new(),
        }
    }

    fn map(base: Base) -> DirtyMap {
        DirtyMap::full(VolumeId([1; 16]), B, 1 << 20, BlockSize::default()).clean(base)
    }

    #[test]
    fn only_a_replica_with_a_history_is_undone() {
        assert_eq!(layer(&superblock()), Ok(crate::layers::testing::layer(3)));
        let none = Superblock { layers: Catalog::default(), ..superblock() };
        assert_eq!(layer(&none), Err(NotUndoable::NoHistory));
        let primary = Superblock { role: Role::Primary, ..superblock() };
        assert_eq!(layer(&primary), Err(NotUndoable::Primary));
    }

    #[test]
    fn a_host_that_is_undone_is_split_again_and_a_crash_leaves_a_way_back() {
        let (mut it, own) = (superblock(), GenerationId([b'o'; 16]));
        begin(&mut it, &lineage("xa"), own);
        assert_eq!(
            (&it.lineage, it.data, it.layers.rollback()),
            (&lineage("xa"), DataState::Inconsistent, LayerId::new(3))
        );
        assert!(layer(&it).is_ok(), "it can be done once more");
        assert!(crate::replica::promotion::must_be_promotable(&it).is_ok());
        record(&mut it, Position::default());
        assert_eq!((it.data, it.layers.known().count()), (DataState::Consistent, 0));
        // A primary that contains all of them would take what was restored for old.
        let mut returned = superblock();
        begin(&mut returned, &lineage("a"), own);
        assert_eq!(returned.lineage, lineage("oa"));
    }

    #[test]
    fn maps_say_what_an_undo_makes_different() {
        let restored = [ByteRange::new(8192, 4096)];
        let void = || map(Base { generation: GenerationId([b'a'; 16]), adopted: 0, ..Base::default() });
        let of =
            |map, superblock: &Superblock, peer| map_for(map, superblock, peer, &lineage("xca"), &restored);
        let adopted = Superblock { lineage: lineage("bca"), ..superblock() };
        let source = of(void(), &adopted, B);
        assert_eq!((source.dirty_blocks(), source.is_dirty(2)), (1, true));
        assert_eq!((source.base().generation, source.base().adopted), (GenerationId([b'c'; 16]), 1));
        // Nothing is known of others, nor before it has adopted anything, nor in the middle of a resync.
        let other = of(void(), &adopted, HostId([3; 32]));
        assert!(other.is_full() && other.base().generation == GenerationId([b'a'; 16]));
        let yielded = Superblock { lineage: lineage("ca"), ..adopted.clone() };
        assert!(of(void(), &yielded, B).is_full());
        let mixture = Superblock { data: DataState::Inconsistent, ..adopted.clone() };
        assert!(of(void(), &mixture, B).is_full());
        assert!(of(void().lost(), &adopted, B).is_full(), "it may have been of what was adopted");
        let mut kept = map(Base { generation: GenerationId([b'x'; 16]), adopted: 1, ..Base::default() });
        kept.mark(0..1);
        let kept = of(kept, &adopted, HostId([3; 32]));
        assert_eq!((kept.dirty_blocks(), kept.base().generation), (2, GenerationId([b'x'; 16])));
    }
}
