//! What a primary has given a replica its word on (W4); [`crate::promise`] says how it is kept.

use crate::planted::{Bug, planted};
use crate::terms::{MEMBERS_LIMIT, Promise};
use crate::units::HostId;

/// What a primary has given a replica its word on, and counts with.
#[derive(Clone, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
pub struct Given {
    /// The promise.
    pub promise: Promise,
    /// Where it holds for ever: the other replicas that count for it, at most [`MEMBERS_LIMIT`]. Whatever is answered is
    /// durable on so many of these, or on the one that it is given to.
    pub counted: Vec<HostId>,
}

impl Given {
    /// Nothing, as to a replica that is not in the mode sync.
    pub const NOTHING: Self = Self { promise: Promise::None, counted: Vec::new() };

    /// Whether a primary may say so.
    #[must_use]
    pub fn is_sound(&self) -> bool {
        self.counted.len() <= MEMBERS_LIMIT
    }

    /// Whether it holds until the replica hears otherwise.
    #[must_use]
    pub fn is_for_ever(&self) -> bool {
        matches!(self.promise, Promise::Replicas(_))
    }

    /// Whether one that was given this may be promoted while another one that counts is silent: it takes it for certain that
    /// nothing was answered that only silent ones have.
    #[must_use]
    pub fn bears_silence(&self) -> bool {
        match self.promise {
            Promise::WhileHeard => true,
            Promise::Replicas(replicas) => replicas > 1,
            Promise::None => false,
        }
    }

    /// Whether an answer without the replica keeps the word: so many that count have all that it speaks for. Where
    /// the word holds for a time, that time decides.
    #[must_use]
    pub fn allows(&self, has_it: impl Fn(HostId) -> bool) -> bool {
        match self.promise {
            Promise::Replicas(replicas) => {
                let there = self.counted.iter().filter(|host| has_it(**host)).count();
                there >= replicas as usize || planted(Bug::ForgetPromise)
            }
            Promise::None | Promise::WhileHeard => true,
        }
    }

    /// Which of those that count may have something that the replica lacks, as far as it hears: those that are not usable.
    /// Nothing where they are too few for an answer.
    #[must_use]
    pub fn in_doubt(&self, is_usable: impl Fn(HostId) -> bool) -> Vec<HostId> {
        let unusable: Vec<HostId> = self.counted.iter().copied().filter(|host| !is_usable(*host)).collect();
        match self.promise {
            Promise::Replicas(replicas) if unusable.len() < replicas as usize => Vec::new(),
            _ => unusable,
        }
    }

    /// What another one of those that count, `peer`, was given by the same primary, as the one that was given this keeps it when
    /// it is the primary itself. It was given the same, unless the primary ended before both had heard of what its operator chose
    /// last.
    #[must_use]
    pub fn of_another(&self, peer: HostId) -> Self {
        match self.counted.contains(&peer) {
            true => self.kept_by(peer),
            false => Self::NOTHING,
        }
    }

    /// What is left of this when `host` is the primary: whatever it answers is there, if it counts.
    #[must_use]
    pub fn kept_by(&self, host: HostId) -> Self {
        match self.promise {
            Promise::Replicas(_) if !self.counted.contains(&host) => self.clone(),
            Promise::Replicas(replicas) if replicas > 1 => {
                let counted = self.counted.iter().copied().filter(|other| *other != host).collect();
                Self { promise: Promise::Replicas(replicas - 1), counted }
            }
            _ => Self::NOTHING,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: HostId = HostId([1; 32]);
    const B: HostId = HostId([2; 32]);
    const C: HostId = HostId([3; 32]);

    fn of(replicas: u32, counted: &[HostId]) -> Given {
        Given { promise: Promise::Replicas(replicas), counted: counted.to_vec() }
    }

    fn while_heard() -> Given {
        Given { promise: Promise::WhileHeard, counted: Vec::new() }
    }

    #[test]
    fn an_answer_keeps_the_word_where_enough_that_count_have_it() {
        for (given, there, expected) in [
            (of(1, &[A, B]), vec![B], true),
            (of(2, &[A, B]), vec![B], false),
            (of(2, &[A, B]), vec![A, B], true),
            (of(1, &[A, B]), vec![C], false),
            (while_heard(), vec![], true),
            (Given::NOTHING, vec![], true),
        ] {
            assert_eq!(given.allows(|host| there.contains(&host)), expected, "{given:?} {there:?}");
        }
    }

    #[test]
    fn those_are_in_doubt_of_whom_an_answer_may_be() {
        for (given, usable, expected) in [
            // One of them has it, and it may be the silent one.
            (of(1, &[A, B]), vec![A], vec![B]),
            // Two have it, and one alone is silent.
            (of(2, &[A, B]), vec![A], vec![]),
            (of(2, &[A, B]), vec![], vec![A, B]),
            (of(1, &[A, B]), vec![A, B], vec![]),
        ] {
            assert_eq!(given.in_doubt(|host| usable.contains(&host)), expected, "{given:?} {usable:?}");
        }
        let bears =
            [of(1, &[A, B]), of(2, &[A, B]), while_heard(), Given::NOTHING].map(|it| it.bears_silence());
        assert_eq!(bears, [false, true, true, false]);
    }

    #[test]
    fn a_primary_that_counted_is_one_less_to_count_on() {
        assert_eq!(of(2, &[A, B]).kept_by(A), of(1, &[B]));
        assert_eq!(of(1, &[A, B]).kept_by(A), Given::NOTHING, "whatever it answers is there");
        assert_eq!(of(2, &[A, B]).kept_by(C), of(2, &[A, B]), "it does not count");
        assert_eq!(while_heard().kept_by(A), Given::NOTHING);
        assert_eq!(
            (of(2, &[A, B]).of_another(B), of(2, &[A, B]).of_another(C)),
            (of(1, &[A]), Given::NOTHING)
        );
    }
}
