//! Split brain: both hosts went on after a common past, and the operator decides whose content stays (L6).
//!
//! The host whose content goes yields: it forgets its own generations, so that the other's contain its newest one, and
//! is brought back by the union of both maps since the fork. What it had is saved as it is overwritten, because it is
//! consistent when the resync begins (P2).

use crate::disk::dirty_map::Base;
use crate::lineage;
use crate::units::GenerationId;

/// The lineage of a host that yields to one with the lineage `winner`: what the two have in common, if this host's map
/// for the other says everything that it wrote since, else none, which has everything copied. `map` is what that map
/// is relative to, and `adopted` how often this host adopted another's content.
#[must_use]
pub fn yielded(
    mine: &[GenerationId],
    winner: &[GenerationId],
    map: Option<Base>,
    adopted: u64,
) -> Vec<GenerationId> {
    let Some(fork) = mine.iter().position(|generation| winner.contains(generation)) else {
        return Vec::new();
    };
    let is_known = map.is_some_and(|base| {
        base.adopted == adopted
            && !base.generation.is_none()
            && lineage::map_covers(mine, base.generation, mine[fork])
    });
    if is_known { mine[fork..].to_vec() } else { Vec::new() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lineage(text: &str) -> Vec<GenerationId> {
        text.bytes().map(|byte| GenerationId([byte; 16])).collect()
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
        ] {
            assert_eq!(
                yielded(&lineage(mine), &lineage(winner), map, 1),
                lineage(expected),
                "{mine} {winner}"
            );
        }
    }
}
