//! Which generation is the newest that a replica has recorded, as far as its primary knows (L1, L2).
//!
//! A replica records a generation when it begins in its stream, or with a commit. The primary's map is relative to the last
//! one of which it knows that; any of those that were offered since may be recorded as well. None of them is pruned.

use crate::planted::{Bug, planted};
use crate::units::{Epoch, GenerationId};

/// The newest generation of a replica, as far as it is known.
#[derive(Debug)]
pub(super) struct Newest {
    /// Whether it may be the primary's newest one.
    may_be_ours: bool,
    /// Generations that the replica may have recorded since the one that the map is relative to, oldest first, each with
    /// the first epoch in it: it has recorded that one when it has the epoch durably.
    offered: Vec<(GenerationId, Epoch)>,
    /// Whether the replica has said in this run which one it is.
    is_heard: bool,
}

impl Newest {
    pub fn new() -> Self {
        Self { may_be_ours: true, offered: Vec::new(), is_heard: false }
    }

    /// Whether the replica has said which one it is.
    pub fn is_heard(&self) -> bool {
        self.is_heard
    }

    /// Whether it may be the primary's newest one.
    pub fn may_be_ours(&self) -> bool {
        self.may_be_ours
    }

    /// The replica says which one it is; none where it has none.
    pub fn heard(&mut self, newest: Option<GenerationId>) {
        self.is_heard = true;
        self.offered.clear();
        self.offered.extend(newest.map(|newest| (newest, Epoch(u64::MAX))));
    }

    /// The replica may have recorded it in an earlier run of the primary, which is opened at it.
    pub fn may_be(&mut self, generation: GenerationId) {
        self.offered.push((generation, Epoch(u64::MAX)));
    }

    /// A commit offers it: only the answer tells that it has it.
    pub fn offer(&mut self, generation: GenerationId) {
        self.may_be_ours = true;
        self.may_be(generation);
    }

    /// A generation began, with this epoch; `follows` where the replica records it with the stream.
    pub fn began(&mut self, generation: GenerationId, epoch: Epoch, follows: bool) {
        self.may_be_ours = follows;
        if follows {
            self.offered.push((generation, epoch));
        }
    }

    /// The replica says that it has recorded what the commit offered.
    pub fn committed(&mut self, generation: GenerationId) {
        let place = self.offered.iter().position(|(offered, _)| *offered == generation);
        self.offered.drain(..place.map_or(0, |place| place + 1));
    }

    /// The newest one that a replica in sync has recorded by now, which has all up to this epoch durably; nothing where that
    /// is no news.
    pub fn recorded_by(&mut self, durable: Epoch) -> Option<GenerationId> {
        let place = self.offered.iter().rposition(|(_, first)| *first <= durable)?;
        self.offered.drain(..=place).next_back().map(|(generation, _)| generation)
    }

    /// Which generations of this lineage it may be, where the map is relative to `base`. The one after that may have been
    /// followed in an earlier run, which ended before that was recorded.
    pub fn candidates(
        &self,
        base: GenerationId,
        lineage: &[GenerationId],
    ) -> impl Iterator<Item = GenerationId> {
        let place = lineage.iter().position(|generation| *generation == base);
        let next =
            place.filter(|_| !self.is_heard).and_then(|place| lineage.get(place.checked_sub(1)?)).copied();
        let known = (!planted(Bug::PruneFollowed)).then_some(&self.offered);
        let offered = known.into_iter().flatten().map(|(generation, _)| *generation);
        std::iter::once(base).chain(next.filter(|_| known.is_some())).chain(offered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generation(letter: u8) -> GenerationId {
        GenerationId([letter; 16])
    }

    fn candidates(newest: &Newest) -> String {
        let lineage: Vec<_> = "dcba".bytes().map(generation).collect();
        newest.candidates(generation(b'a'), &lineage).map(|it| char::from(it.0[0])).collect()
    }

    #[test]
    fn whatever_was_offered_may_be_recorded_until_the_replica_says_so() {
        let mut newest = Newest::new();
        assert_eq!(candidates(&newest), "ab", "an earlier run may have begun it");
        newest.heard(Some(generation(b'a')));
        assert_eq!(candidates(&newest), "aa");
        newest.offer(generation(b'b'));
        newest.began(generation(b'c'), Epoch(9), true);
        assert_eq!((candidates(&newest), newest.may_be_ours()), ("aabc".to_owned(), true));
        newest.committed(generation(b'b'));
        assert_eq!(newest.recorded_by(Epoch(8)), None);
        assert_eq!(newest.recorded_by(Epoch(9)), Some(generation(b'c')));
        newest.began(generation(b'd'), Epoch(12), false);
        assert_eq!((candidates(&newest), newest.may_be_ours()), ("a".to_owned(), false));
    }
}
