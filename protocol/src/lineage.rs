//! Who copies to whom: two hosts' generations compared (L3), and when a map may be believed (L2).
//!
//! A lineage is a host's list of generations, newest first. A generation is begun by the first write after anything that
//! could have let another host go on alone (L1), so two hosts that both went on have different newest generations over
//! a common one, and a host that merely missed something has a newest generation that the other one's lineage contains.

use crate::units::{Epoch, GenerationId, Mark, Position};

/// No host misses more runs of primaries than this: an epoch further ahead is a mistake or a lie.
const RUN_STEP: u64 = 1 << 16;

/// Where what a primary holds of generations ends, for those that it began itself, and for the one that its content was
/// recovered at: the first epoch of each that is not in its content. A copy that is further in one of them has what this
/// host has lost, as where it was set back to what it was before (X4).
#[derive(Clone, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
pub struct Ends(Vec<(GenerationId, Epoch)>);

impl Ends {
    /// The content ends before this epoch of this generation, and nothing is known of others.
    #[must_use]
    pub fn only(generation: GenerationId, epoch: Epoch) -> Self {
        Self(vec![(generation, epoch)])
    }

    /// The first epoch of this generation that is not there, where it is known.
    #[must_use]
    pub fn of(&self, generation: GenerationId) -> Option<Epoch> {
        self.0.iter().find(|(known, _)| *known == generation).map(|(_, epoch)| *epoch)
    }

    /// This is the first epoch of this generation that is not there.
    pub fn set(&mut self, generation: GenerationId, epoch: Epoch) {
        match self.0.iter_mut().find(|(known, _)| *known == generation) {
            Some((_, end)) => *end = epoch,
            None => self.0.push((generation, epoch)),
        }
    }

    /// Keeps what is known of the generations of this lineage.
    pub fn keep(&mut self, lineage: &[GenerationId]) {
        self.0.retain(|(generation, _)| lineage.contains(generation));
    }

    /// How many generations there are of which an end is known.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether nothing is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Every generation of which an end is known, with that.
    pub fn iter(&self) -> impl Iterator<Item = (GenerationId, Epoch)> + '_ {
        self.0.iter().copied()
    }

    /// Whether a copy at this position has what the content lacks that ends so. A generation is written in one run of a
    /// primary. One that is opened later and writes nothing tells of its content as of the last epoch before its own run:
    /// that is no epoch in which anything was written.
    #[must_use]
    pub fn lacks(&self, position: Position) -> bool {
        let run = |epoch: Epoch| epoch.0 >> Epoch::RUN_BITS;
        let is_written = run(position.epoch) == run(position.epoch.next());
        self.of(position.generation).is_some_and(|end| {
            position.epoch >= end && is_written && (run(end) == 0 || run(end) == run(position.epoch))
        })
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
    let run = (before.0 >> Epoch::RUN_BITS) + 1;
    Some(Epoch(run.checked_shl(Epoch::RUN_BITS)?))
        .filter(|epoch| epoch.0 < Epoch::LIMIT && epoch.0 >> Epoch::RUN_BITS == run)
}

/// Whether a copy that got to `known` may be told of this epoch. One that has followed nobody yet may be told of any.
#[must_use]
pub fn may_follow(known: Epoch, epoch: Epoch) -> bool {
    known == Epoch(0) || epoch.0 >> Epoch::RUN_BITS <= (known.0 >> Epoch::RUN_BITS) + RUN_STEP
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
    fn a_content_lacks_what_came_after_its_end() {
        let generation = |byte| GenerationId([byte; 16]);
        let run = 1 << Epoch::RUN_BITS;
        let mut ends = Ends::only(generation(b'b'), Epoch(9));
        ends.set(generation(b'c'), Epoch(run + 20));
        ends.set(generation(b'b'), Epoch(1));
        let position = |byte, epoch| Position {
            generation: generation(byte),
            epoch: Epoch(epoch),
            sequence: Sequence(0),
        };
        for (position, lacks) in [
            // Nothing of it is there, in whichever run it was written.
            (position(b'b', 1), true),
            (position(b'b', 7 * run), true),
            (position(b'b', 0), false),
            (position(b'c', run + 19), false),
            (position(b'c', run + 20), true),
            // Those were opened later and wrote nothing.
            (position(b'c', 2 * run - 1), false),
            (position(b'c', 3 * run - 1), false),
            // Others may have begun that one.
            (position(b'a', 700), false),
            (Position::default(), false),
        ] {
            assert_eq!(ends.lacks(position), lacks, "{position:?}");
        }
        ends.keep(&lineage("ca"));
        assert_eq!((ends.of(generation(b'b')), ends.of(generation(b'c'))), (None, Some(Epoch(run + 20))));
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
