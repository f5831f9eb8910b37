//! Who copies to whom: two hosts' generations compared (L3), and when a map may be believed (L2).
//!
//! A lineage is a host's list of generations, newest first. A generation is begun by the first write after anything that
//! could have let another host go on alone (L1), so two hosts that both went on have different newest generations over
//! a common one, and a host that merely missed something has a newest generation that the other one's lineage contains.

use crate::units::{Epoch, GenerationId, Mark, Position};

/// How many low bits of an epoch's number count within one run of a primary; the rest count the runs.
pub(crate) const RUN_BITS: u32 = 40;

/// No host misses more runs of primaries than this: an epoch further ahead is a mistake or a lie.
const RUN_STEP: u64 = 1 << 16;

/// Where what a primary holds of a generation ends, where that may be before the generation did: its content was
/// recovered from a copy that lacked what came after, or it was set back to what it was before (X4). Nothing is
/// known where no generation is named.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
pub struct End {
    /// The generation.
    pub generation: GenerationId,
    /// The first epoch of it that is not in this host's content.
    pub epoch: Epoch,
    /// The first epoch that is again: that of the first run that began with this content. 0 as long as none has.
    pub until: Epoch,
}

impl End {
    /// Whether a copy with this lineage and at this position has what the content that ends here lacks.
    #[must_use]
    pub fn lacks(&self, lineage: &[GenerationId], position: Position) -> bool {
        !self.generation.is_none()
            && lineage.first() == Some(&self.generation)
            && position.generation == self.generation
            && (self.epoch..self.until).contains(&position.epoch)
    }
}

/// How two lineages stand to each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Relation {
    /// The newest generation is the same: by map.
    Same,
    /// Theirs is contained in mine: they missed what came after it.
    MineIsNewer,
    /// Mine is contained in theirs: I missed what came after it.
    TheirsIsNewer,
    /// Both went on after this generation: split brain.
    Forked(GenerationId),
    /// Nothing is in common.
    Unrelated,
}

/// Compares two lineages, both newest first.
#[must_use]
pub fn relation(mine: &[GenerationId], theirs: &[GenerationId]) -> Relation {
    match (mine.first(), theirs.first()) {
        (Some(newest), Some(other)) if newest == other => Relation::Same,
        (Some(_), Some(other)) if mine.contains(other) => Relation::MineIsNewer,
        (Some(newest), Some(_)) if theirs.contains(newest) => Relation::TheirsIsNewer,
        _ => match mine.iter().find(|generation| theirs.contains(generation)) {
            Some(common) => Relation::Forked(*common),
            None => Relation::Unrelated,
        },
    }
}

/// Whether a map that began when the peer's newest generation was `base`, kept by the host of this lineage ever since,
/// says what differs on a peer whose newest generation is `theirs` (L2). No `base` stands for any generation of mine.
#[must_use]
pub fn map_covers(mine: &[GenerationId], base: GenerationId, theirs: GenerationId) -> bool {
    let place = |wanted: GenerationId| mine.iter().position(|generation| *generation == wanted);
    match place(theirs) {
        Some(_) if base.is_none() => true,
        Some(theirs) => place(base).is_some_and(|base| theirs <= base),
        None => false,
    }
}

/// Puts a new generation at the head. Where there is no room, the oldest one goes that no peer may need (L2), and the
/// oldest of all where peers may need more than there is room for.
pub fn begin(lineage: &mut Vec<GenerationId>, generation: GenerationId, kept: &[GenerationId], limit: usize) {
    lineage.insert(0, generation);
    while lineage.len() > limit {
        let oldest = lineage.iter().rposition(|generation| !kept.contains(generation));
        lineage.remove(oldest.filter(|place| *place > 0).unwrap_or(lineage.len() - 1));
    }
}

/// Whether a replica that is `found` there has gone back behind what was `known` to be durable on it (X4): then nothing
/// that was remembered of it holds.
#[must_use]
pub fn went_back(lineage: &[GenerationId], found: Mark, known: Mark) -> bool {
    let is_same = (found.position.generation, found.position.epoch)
        == (known.position.generation, known.position.epoch);
    let is_earlier = !is_same && later(lineage, found.position, known.position) == known.position;
    is_earlier || (found.session, found.copies) < (known.session, known.copies)
}

/// The later one of two positions of the history that this lineage names. A position in a generation that it doesn't
/// contain comes before all others.
#[must_use]
pub fn later(lineage: &[GenerationId], one: Position, other: Position) -> Position {
    let rank = |position: &Position| {
        let place = lineage.iter().position(|generation| *generation == position.generation);
        (place.map_or(0, |place| lineage.len() - place), position.epoch)
    };
    if rank(&other) > rank(&one) { other } else { one }
}

/// The first epoch of a primary's next run, when an earlier position is `before`; nothing where the numbers are used up.
/// So no two runs, on whichever hosts, use the same number within a generation: one position never names two histories.
#[must_use]
pub fn first_epoch_after(before: Epoch) -> Option<Epoch> {
    let run = (before.0 >> RUN_BITS) + 1;
    Some(Epoch(run.checked_shl(RUN_BITS)?))
        .filter(|epoch| epoch.0 < Epoch::LIMIT && epoch.0 >> RUN_BITS == run)
}

/// Whether a copy that got to `known` may be told of this epoch. One that has followed nobody yet may be told of any.
#[must_use]
pub fn may_follow(known: Epoch, epoch: Epoch) -> bool {
    known == Epoch(0) || epoch.0 >> RUN_BITS <= (known.0 >> RUN_BITS) + RUN_STEP
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{Sequence, Session};

    fn lineage(text: &str) -> Vec<GenerationId> {
        text.bytes().map(|byte| GenerationId([byte; 16])).collect()
    }

    #[test]
    fn lineages_compare_as_the_table_says() {
        let common = |byte| Relation::Forked(GenerationId([byte; 16]));
        for (mine, theirs, expected) in [
            ("a", "a", Relation::Same),
            ("cba", "cba", Relation::Same),
            ("cba", "c", Relation::Same),
            ("ba", "a", Relation::MineIsNewer),
            ("dcba", "ba", Relation::MineIsNewer),
            ("a", "ba", Relation::TheirsIsNewer),
            ("ca", "ba", common(b'a')),
            ("dcba", "xyba", common(b'b')),
            ("a", "b", Relation::Unrelated),
            ("", "b", Relation::Unrelated),
            ("", "", Relation::Unrelated),
        ] {
            assert_eq!(relation(&lineage(mine), &lineage(theirs)), expected, "{mine} {theirs}");
        }
    }

    #[test]
    fn a_content_lacks_what_came_after_its_end_and_before_its_own_first_run() {
        let end = End { generation: GenerationId([b'b'; 16]), epoch: Epoch(9), until: Epoch(1 << 40) };
        let position = |byte, epoch| Position {
            generation: GenerationId([byte; 16]),
            epoch: Epoch(epoch),
            sequence: Sequence(0),
        };
        for (end, theirs, position, lacks) in [
            (end, "ba", position(b'b', 9), true),
            (end, "ba", position(b'b', 700), true),
            (end, "ba", position(b'b', 8), false),
            // It followed since.
            (end, "ba", position(b'b', 1 << 40), false),
            (end, "cba", position(b'c', 9), false),
            // Nothing of the newest generation is durable there.
            (end, "ba", position(b'a', 10), false),
            (end, "a", position(b'a', 10), false),
            (End { until: Epoch(0), ..end }, "ba", position(b'b', 9), false),
            (End::default(), "", Position::default(), false),
        ] {
            assert_eq!(end.lacks(&lineage(theirs), position), lacks, "{end:?} {theirs} {position:?}");
        }
    }

    #[test]
    fn a_map_covers_its_base_and_what_the_peer_confirmed_since() {
        let covers = |base: &str, theirs: &str| {
            let one = |text: &str| lineage(text).first().copied().unwrap_or_default();
            map_covers(&lineage("dcba"), one(base), one(theirs))
        };
        assert!(covers("b", "b") && covers("b", "c") && covers("b", "d"));
        assert!(!covers("b", "a"), "what happened before the map began is not in it");
        assert!(!covers("b", "x") && !covers("x", "b"));
        assert!(covers("", "a") && !covers("", "x"));
    }

    #[test]
    fn generations_that_maps_refer_to_are_never_pruned() {
        let mut generations = lineage("dcba");
        begin(&mut generations, GenerationId([b'e'; 16]), &lineage("a"), 4);
        assert_eq!(generations, lineage("edca"));
        // However many a peer makes us think that it may need.
        begin(&mut generations, GenerationId([b'f'; 16]), &lineage("edca"), 4);
        assert_eq!(generations, lineage("fedc"));
    }

    #[test]
    fn a_replica_goes_back_by_its_epochs_or_by_its_copies() {
        let mark = |byte, epoch, session, copies| Mark {
            position: Position {
                generation: GenerationId([byte; 16]),
                epoch: Epoch(epoch),
                sequence: Sequence(epoch),
            },
            session: Session(session),
            copies,
        };
        let known = mark(b'a', 9, 4, 10);
        for (found, has_gone_back) in [
            (known, false),
            (mark(b'a', 10, 4, 10), false),
            (mark(b'b', 1, 4, 10), false),
            (mark(b'a', 9, 5, 1), false),
            (mark(b'a', 8, 4, 10), true),
            (mark(b'x', 20, 4, 10), true),
            (mark(b'a', 9, 4, 9), true),
            (mark(b'a', 9, 3, 30), true),
        ] {
            assert_eq!(went_back(&lineage("ba"), found, known), has_gone_back, "{found:?}");
        }
        assert!(!went_back(&lineage("ba"), mark(b'x', 0, 0, 0), Mark::default()), "nothing was known");
    }

    #[test]
    fn positions_follow_each_other_by_generation_then_epoch() {
        let position = |byte, epoch| Position {
            generation: GenerationId([byte; 16]),
            epoch: Epoch(epoch),
            sequence: Sequence(0),
        };
        let later = |one, other| later(&lineage("ba"), one, other);
        assert_eq!(later(position(b'a', 9), position(b'b', 1)), position(b'b', 1));
        assert_eq!(later(position(b'a', 9), position(b'a', 8)), position(b'a', 9));
        assert_eq!(later(position(b'a', 1), position(b'x', 8)), position(b'a', 1));
    }

    #[test]
    fn runs_have_numbers_until_these_are_used_up() {
        for (before, first) in [
            (0, Some(1 << 40)),
            ((3 << 40) + 7, Some(4 << 40)),
            (Epoch::LIMIT - 1, None),
            (Epoch::LIMIT - (2 << 40), Some(Epoch::LIMIT - (1 << 40))),
            (u64::MAX, None),
        ] {
            assert_eq!(first_epoch_after(Epoch(before)), first.map(Epoch), "{before}");
        }
    }

    #[test]
    fn an_epoch_is_no_more_than_some_runs_ahead() {
        let run = |number: u64| Epoch((number << 40) + 5);
        assert!(may_follow(Epoch(0), run(1 << 20)), "a new copy knows of nothing");
        assert!(may_follow(run(7), run(3)) && may_follow(run(7), run(7 + RUN_STEP)));
        assert!(!may_follow(run(7), run(8 + RUN_STEP)));
    }

    /// A host that gossiped of more peers than there are, each at another generation, ended the process.
    #[test]
    fn more_generations_than_there_is_room_for_end_nothing() {
        let mut generations = lineage("dcba");
        begin(&mut generations, GenerationId([b'e'; 16]), &lineage("dcba"), 4);
        assert_eq!(generations, lineage("edcb"));
    }
}
