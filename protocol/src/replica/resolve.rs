//! Split brain: both hosts went on after a common past, and the operator decides whose content stays (L6).
//!
//! The host whose content goes yields: it forgets its own generations, so that the other's contain its newest one, and
//! is brought back by the union of both maps since the fork. What it had is kept in a layer of pre-images, the history,
//! for as long as the operator may want it back ([`super::undo`]).

use super::consent;
use crate::disk::dirty_map::Base;
use crate::disk::superblock::Superblock;
use crate::layers::LayerId;
use crate::lineage::{self, Ends};
use crate::planted::{Bug, planted};
use crate::terms::{Claim, DataState, Fence, Mode};
use crate::units::GenerationId;

/// The lineage of a host that yields to one with the lineage `winner`: what the two have in common, if this host's map
/// for the other says everything that it wrote since, else none, which has everything copied. `map` is what that map
/// is relative to, and `adopted` how often this host adopted another's content.
#[must_use]
pub(crate) fn yielded(
    mine: &[GenerationId],
    winner: &[GenerationId],
    map: Option<Base>,
    adopted: u64,
) -> Vec<GenerationId> {
    let Some(fork) = mine.iter().position(|generation| winner.contains(generation)) else {
        return Vec::new();
    };
    if fork == 0 {
        // It went on in no generation of its own, and is at odds with the other one for its fence alone.
        return mine.to_vec();
    }
    let is_known = map.is_some_and(|base| {
        base.adopted == adopted
            && !base.generation.is_none()
            && lineage::map_covers(mine, base.generation, mine[fork])
    });
    if is_known { mine[fork..].to_vec() } else { Vec::new() }
}

/// Which layer is to keep what a host has that yields, or that follows another primary ([`consent`]).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Keep {
    /// None: the host holds a mixture without a way back, or what it has may go.
    Nothing,
    /// The one that leads back to it already.
    Layer(LayerId),
    /// A new one, which has to be there durably first. It takes the place of an older history.
    NewLayer,
}

/// Which layer is to keep what a host has that yields. `is_unused` tells whether the history that there is, if any, has no
/// pre-image yet. What was overwritten before anybody agreed is kept on: since then the host has had nothing of its own.
#[must_use]
pub fn keep(superblock: &Superblock, is_unused: bool) -> Keep {
    match (superblock.data, superblock.layers.rollback(), superblock.layers.undo()) {
        (_, _, Some(undo)) if consent::is_awaited(superblock) => Keep::Layer(undo),
        (DataState::Inconsistent, None, _) | (DataState::Empty, _, _) => Keep::Nothing,
        (DataState::Inconsistent, Some(rollback), _) => Keep::Layer(rollback),
        (DataState::Consistent, _, Some(undo)) if is_unused => Keep::Layer(undo),
        (DataState::Consistent, _, _) => Keep::NewLayer,
    }
}

/// What the superblock says once a host has yielded, in one durable write. `undo` is the layer that keeps what it
/// had. `winner` is the fence of the host that it yields to: where it was promoted as often as that one, it
/// follows it from now on (L5). A lower one stays refused.
pub(crate) fn record(
    superblock: &mut Superblock,
    lineage: Vec<GenerationId>,
    undo: Option<LayerId>,
    winner: Fence,
) {
    if winner.against(superblock.fence) != Claim::Older && !planted(Bug::KeepEqualFence) {
        superblock.fence = winner;
    }
    superblock.agreed = superblock.agreed.max(winner.counter);
    // They had everything of what is given up, and were to be promoted after another fence.
    superblock.heirs.clear();
    superblock.lineage = lineage;
    if !superblock.lineage.contains(&superblock.position.generation) {
        // It has all that the two have in common.
        superblock.position = superblock.stands();
    }
    superblock.keep_in(undo);
    superblock.ends = Ends::default();
    (superblock.mode, superblock.source) = (Mode::Async, Fence::default());
    (superblock.released, superblock.replaced) = (false, true);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Epoch, HostId, Position, Sequence};

    fn lineage(text: &str) -> Vec<GenerationId> {
        text.bytes().map(|byte| GenerationId([byte; 16])).collect()
    }

    /// Two hosts that could not hear each other were promoted from the same number, and each refused the other for ever.
    #[test]
    fn a_host_that_yields_follows_the_winner_that_was_promoted_as_often() {
        let fence = |counter, holder| Fence { counter, holder: HostId([holder; 32]) };
        for (own, winner, expected) in [
            (fence(4, 3), fence(4, 2), fence(4, 2)),
            (fence(3, 3), fence(4, 2), fence(4, 2)),
            // Whoever was promoted before it may not write, whatever is in its copy.
            (fence(5, 3), fence(4, 2), fence(5, 3)),
        ] {
            let mut superblock = crate::replica::tests::superblock("ca");
            superblock.fence = own;
            record(&mut superblock, lineage("a"), LayerId::new(1), winner);
            assert_eq!(superblock.fence, expected);
        }
    }

    /// It said that it stood in a generation which the winner had never heard of, and was taken for set back (X4).
    #[test]
    fn a_host_that_yields_has_all_that_the_two_have_in_common() {
        let generation = |byte| GenerationId([byte; 16]);
        let mut superblock = crate::replica::tests::superblock("ca");
        superblock.run = Epoch(40);
        superblock.ends = Ends::only(generation(b'a'), Epoch(30));
        superblock.position =
            Position { generation: generation(b'c'), epoch: Epoch(41), sequence: Sequence(0) };
        let stands = |superblock: &Superblock, lineage| {
            let mut yielded = superblock.clone();
            record(&mut yielded, lineage, LayerId::new(1), Fence::default());
            (yielded.position.generation, yielded.position.epoch)
        };
        assert_eq!(stands(&superblock, lineage("a")), (generation(b'a'), Epoch(29)));
        superblock.ends = Ends::default();
        assert_eq!(stands(&superblock, lineage("a")), (generation(b'a'), Epoch(39)), "another host began it");
        assert_eq!(stands(&superblock, lineage("ca")), (generation(b'c'), Epoch(41)));
    }

    #[test]
    fn a_host_that_yields_keeps_what_is_common_if_its_map_reaches_back_to_the_fork() {
        let base =
            |byte, adopted| Some(Base { generation: GenerationId([byte; 16]), adopted, ..Base::default() });
        for (mine, winner, map, expected) in [
            ("cba", "xba", base(b'b', 1), "ba"),
            ("dcba", "xa", base(b'a', 1), "a"),
            ("dcba", "xa", base(b'c', 1), ""),
            ("cba", "xba", base(b'b', 0), ""),
            ("cba", "xba", None, ""),
            ("cba", "xyz", base(b'a', 1), ""),
            ("ba", "a", base(b'a', 1), "a"),
            ("ba", "xba", None, "ba"),
        ] {
            assert_eq!(
                yielded(&lineage(mine), &lineage(winner), map, 1),
                lineage(expected),
                "{mine} {winner}"
            );
        }
    }
}
