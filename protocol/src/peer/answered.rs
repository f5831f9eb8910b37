//! Whether applications were answered something that a replica lacks: the question after another host was promoted. Only
//! what both sides answered makes a split brain.
//!
//! What the replica follows is in its window until it has it durably. Once it follows no more, an answer that speaks for a
//! write after the last one that it was sent leaves it out; so does one for a write that was in the window when the link
//! was lost.
//!
//! Over a restart, what the map's file marks counts as answered, unless the file says that it was not: so it does of a
//! replica in the mode sync as long as the primary waits for it. Before the first answer that leaves it out, the file
//! says that no more.

use crate::terms::Mode;
use crate::units::Sequence;

/// How far a replica got that follows, or did last.
#[derive(Clone, Copy, Debug)]
pub(super) struct Followed {
    /// The last write that it was sent.
    pub sent: Sequence,
    /// The last one that it has received.
    pub received: Sequence,
    /// The first one that it may not have durably.
    pub oldest: Option<Sequence>,
}

impl Followed {
    /// The last write that it has durably, and all before it.
    fn durable(self) -> Sequence {
        self.oldest.map_or(self.sent, |oldest| Sequence(oldest.0.saturating_sub(1)))
    }
}

/// What applications were answered that the replica may lack.
#[derive(Debug)]
pub(super) struct Answered {
    /// The newest write that an answer spoke for.
    newest: Sequence,
    /// While it does not follow: the last write that it may have.
    there: Option<Sequence>,
    /// The last write that it had durably when it left, where it did in this run.
    kept: Option<Sequence>,
    /// Whether something was answered that it lacks.
    lacks: bool,
    /// Whether it may lack something of which it is not known whether it was answered: what its log names, or this host's
    /// of a run before.
    may_lack: bool,
}

impl Answered {
    /// Of a replica that was not heard in this run. `lacks` says whether its map has anything that may have been answered.
    pub(super) fn new(lacks: bool) -> Self {
        Self { newest: Sequence(0), there: Some(Sequence(0)), kept: None, lacks, may_lack: false }
    }

    /// An answer speaks for all writes up to this one.
    pub(super) fn note(&mut self, sequence: Sequence) {
        self.newest = self.newest.max(sequence);
        self.lacks |= self.there.is_some_and(|there| sequence > there);
    }

    /// Whether an answer for all writes up to this one leaves it out; of one that follows, that is not known here.
    pub(super) fn leaves_out(&self, sequence: Sequence) -> bool {
        self.there.is_none_or(|there| sequence > there)
    }

    /// Whether all that an answer up to this write speaks for is surely there, and stays there, while it does not follow. Of
    /// what was written before this run nothing is known.
    pub(super) fn is_kept(&self, sequence: Sequence) -> bool {
        sequence > Sequence(0) && self.kept.is_some_and(|kept| sequence <= kept)
    }

    /// What it holds is not what it was known to hold: it may lack all that was ever answered.
    pub(super) fn forget(&mut self) {
        self.lacks = true;
    }

    /// It may lack more than what was written since it followed.
    pub(super) fn suspect(&mut self) {
        self.may_lack = true;
    }

    /// It follows from now on, and has or will be sent everything.
    pub(super) fn follows(&mut self) {
        (self.there, self.kept, self.lacks, self.may_lack) = (None, None, false, false);
    }

    /// It is not sent what is written any more. What it was sent before may still arrive.
    pub(super) fn left(&mut self, followed: Followed) {
        if self.there.is_none() {
            (self.there, self.kept) = (Some(followed.sent), Some(followed.durable()));
        }
    }

    /// Its link was lost.
    pub(super) fn lost(&mut self, followed: Followed, mode: Mode) {
        self.left(followed);
        self.lacks |= self.misses(followed, mode);
        if let Some(oldest) = followed.oldest {
            let durable = Sequence(oldest.0.saturating_sub(1));
            (self.there, self.kept) = (self.there.min(Some(durable)), self.kept.min(Some(durable)));
        }
    }

    /// Whether something was answered that it lacks, or may lack if its host fails now.
    pub(super) fn lacks(&self, followed: Option<Followed>, mode: Mode) -> bool {
        // In the mode sync what a log names was promised to nobody without it.
        let may_lack = self.may_lack && mode != Mode::Sync;
        self.lacks || may_lack || followed.is_some_and(|followed| self.misses(followed, mode))
    }

    /// One in the mode sync lacks what it did not receive: what it received and did not keep, as a disk does that loses its
    /// cache, was no promise (W4).
    fn misses(&self, followed: Followed, mode: Mode) -> bool {
        match mode {
            Mode::Sync => followed.oldest.is_some() && self.newest.min(followed.sent) > followed.received,
            Mode::Async | Mode::SemiSync => followed.oldest.is_some_and(|oldest| oldest <= self.newest),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MODES: [Mode; 3] = [Mode::Async, Mode::SemiSync, Mode::Sync];

    fn followed(sent: u64, received: u64, oldest: Option<u64>) -> Followed {
        Followed { sent: Sequence(sent), received: Sequence(received), oldest: oldest.map(Sequence) }
    }

    fn following() -> Answered {
        let mut answered = Answered::new(true);
        assert!(answered.lacks(None, Mode::Sync));
        answered.follows();
        answered
    }

    #[test]
    fn what_was_written_and_not_answered_is_no_loss() {
        for mode in MODES {
            let mut answered = following();
            answered.note(Sequence(3));
            // All up to the third are there; two more are on their way when the link is lost, and wait for it.
            let last = followed(5, 3, Some(4));
            assert!(!answered.lacks(Some(last), mode));
            answered.lost(last, mode);
            answered.note(Sequence(3));
            assert!(!answered.lacks(None, mode), "{mode:?}");
            // Then they are answered alone.
            answered.note(Sequence(4));
            assert!(answered.lacks(None, mode), "{mode:?}");
        }
    }

    #[test]
    fn what_was_answered_and_had_not_arrived_is() {
        for mode in MODES {
            let mut answered = following();
            answered.note(Sequence(4));
            let last = followed(4, 3, Some(4));
            assert!(answered.lacks(Some(last), mode));
            answered.lost(last, mode);
            assert!(answered.lacks(None, mode), "{mode:?}");
            answered.follows();
            assert!(!answered.lacks(Some(followed(5, 5, None)), mode));
        }
    }

    #[test]
    fn what_arrived_and_was_not_durable_counts_in_all_modes_but_sync() {
        for mode in MODES {
            let mut answered = following();
            answered.note(Sequence(4));
            answered.lost(followed(4, 4, Some(3)), mode);
            assert_eq!(answered.lacks(None, mode), mode != Mode::Sync, "{mode:?}");
        }
    }

    #[test]
    fn one_that_left_the_stream_lacks_what_is_answered_from_then_on() {
        for mode in MODES {
            let mut answered = following();
            answered.left(followed(5, 3, Some(4)));
            answered.note(Sequence(3));
            assert!(!answered.lacks(Some(followed(5, 3, Some(4))), mode));
            // What was left in its window arrives.
            answered.left(followed(5, 5, None));
            answered.note(Sequence(5));
            assert!(!answered.lacks(Some(followed(5, 5, None)), mode));
            answered.note(Sequence(6));
            assert!(answered.lacks(Some(followed(5, 5, None)), mode), "{mode:?}");
        }
    }

    #[test]
    fn one_that_is_not_what_it_was_known_to_be_may_lack_what_was_answered_before() {
        for mode in MODES {
            // What is in the log of a run before, or in its own.
            let mut answered = Answered::new(false);
            answered.suspect();
            assert_eq!(answered.lacks(None, mode), mode != Mode::Sync, "{mode:?}");
            // It was set back, or is another copy.
            let mut answered = following();
            answered.lost(followed(5, 5, None), mode);
            answered.forget();
            assert!(answered.lacks(None, mode), "{mode:?}");
            answered.follows();
            assert!(!answered.lacks(None, mode), "{mode:?}");
        }
    }

    #[test]
    fn an_answer_before_it_was_ever_heard_leaves_it_out() {
        let mut answered = Answered::new(false);
        answered.note(Sequence(0));
        assert!(!answered.lacks(None, Mode::Async));
        answered.note(Sequence(1));
        assert!(answered.lacks(None, Mode::Async));
    }
}
