//! A flag in the header of a map's file: no write that it marks was answered, and none in a generation after the one that it
//! names. It is for the next run of this primary, which would take all marks for answered (see [`super::answered`]).
//!
//! It is said of a replica that answers wait for, as long as that is so. Before the first answer that leaves the replica out,
//! or is in a later generation, the file takes it back, durably; and it stays taken back until the replica follows again.

use crate::disk::dirty_map::Base;
use crate::planted::{Bug, planted};
use crate::units::GenerationId;

/// What a header says.
#[derive(Clone, Copy, Debug)]
struct Said {
    /// Whether it says, or may say, that nothing of what it marks was answered.
    denies: bool,
    /// The newest generation that the replica confirmed.
    generation: GenerationId,
}

/// What the map's file says of answers.
#[derive(Debug)]
pub(super) struct Denial {
    /// Whether the primary waits for replicas in the mode sync rather than going on without them.
    is_allowed: bool,
    /// What the file says, as far as it is known; and the header that is being written.
    file: Said,
    being_written: Option<Said>,
    /// Whether the file said it when this host was opened, and the replica did not follow since.
    is_inherited: bool,
    /// Whether something may have been answered that the replica lacks, since it followed last.
    is_taken_back: bool,
    /// The newest generation in which anything may have been answered.
    answered_in: Option<GenerationId>,
}

impl Denial {
    /// As a map's file says that is relative to `generation`. It means something only of a replica in the mode sync.
    pub(super) fn new(denies: bool, generation: GenerationId, is_sync: bool) -> Self {
        Self {
            is_allowed: false,
            file: Said { denies, generation },
            being_written: None,
            is_inherited: denies && is_sync,
            is_taken_back: false,
            answered_in: None,
        }
    }

    /// Whether it is known from a run before that nothing of what the map marks was answered.
    pub(super) fn is_inherited(&self) -> bool {
        self.is_inherited
    }

    /// This primary was opened at this generation, with a map that is relative to `base`.
    pub(super) fn opened_at(&mut self, generation: GenerationId, base: GenerationId) {
        // Nothing was answered in one that the map's file does not know, where that says so.
        self.answered_in = Some(if self.is_inherited { base } else { generation });
    }

    /// Whether it may be said at all: the primary waits for replicas rather than going on without them.
    pub(super) fn allow(&mut self, is_allowed: bool) {
        self.is_allowed = is_allowed;
    }

    /// The replica follows: it has, or will be sent, everything.
    pub(super) fn follows(&mut self) {
        (self.is_inherited, self.is_taken_back) = (false, false);
    }

    /// What was answered before was promised otherwise.
    pub(super) fn mode_changed(&mut self) {
        self.is_taken_back = true;
    }

    /// Something that the replica follows, or that leaves it out, was answered in this generation.
    pub(super) fn note_answered(&mut self, newest: Option<GenerationId>) {
        self.answered_in = newest;
    }

    /// Whether the next header may say it. All that was ever answered was answered in a generation that the replica confirmed,
    /// and is there: `lacks_answered` says whether that is known to be otherwise.
    pub(super) fn may_be_said(&self, base: Base, is_sync: bool, lacks_answered: bool) -> bool {
        let is_so = self.answered_in == Some(base.generation) && !lacks_answered;
        let is_met = !base.copy.is_none();
        self.is_allowed && is_sync && is_met && !self.is_taken_back && (is_so || planted(Bug::DenyAnswered))
    }

    /// A header is being written.
    pub(super) fn is_being_written(&mut self, denies: bool, generation: GenerationId) {
        self.being_written = Some(Said { denies, generation });
        // One that was not written wholly may be there.
        self.file.denies |= denies;
    }

    /// The header that was being written, if one was, is durable, or may not be.
    pub(super) fn was_written(&mut self, is_durable: bool) {
        if let Some(said) = self.being_written.take().filter(|_| is_durable) {
            self.file = said;
        }
    }

    /// Whether an answer in the generation `newest` contradicts the file. `follows`: it waited for the replica; else
    /// `is_there`: the replica has durably all that it speaks for.
    pub(super) fn contradicts(&self, follows: bool, is_there: bool, newest: Option<GenerationId>) -> bool {
        let is_covered = if follows { Some(self.file.generation) == newest } else { is_there };
        self.file.denies && !is_covered && !planted(Bug::DenyAnswered)
    }

    /// The next header must not contradict an answer in the generation `newest`. Whether what was written before this run may
    /// be answered with it, which was known not to be until now.
    pub(super) fn take_back(&mut self, follows: bool, newest: Option<GenerationId>) -> bool {
        self.is_taken_back |= !follows;
        self.answered_in = newest;
        std::mem::take(&mut self.is_inherited)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::CopyId;

    const A: GenerationId = GenerationId([b'a'; 16]);
    const B: GenerationId = GenerationId([b'b'; 16]);

    fn base(generation: GenerationId) -> Base {
        Base { copy: CopyId([2; 16]), generation, adopted: 0 }
    }

    /// Of a replica that follows in the generation A, with a file that denies.
    fn denied() -> Denial {
        let mut denial = Denial::new(false, A, true);
        denial.allow(true);
        denial.opened_at(A, A);
        denial.is_being_written(true, A);
        denial.was_written(true);
        denial
    }

    #[test]
    fn it_is_said_only_of_a_replica_that_answers_wait_for_and_that_was_met() {
        let denial = denied();
        assert!(denial.may_be_said(base(A), true, false));
        assert!(!denial.may_be_said(base(A), false, false), "in another mode");
        assert!(!denial.may_be_said(base(A), true, true), "something was answered that it lacks");
        assert!(!denial.may_be_said(base(B), true, false), "it is not known what was answered in which");
        assert!(!denial.may_be_said(Base { copy: CopyId::default(), ..base(A) }, true, false));
        let mut denial = denied();
        denial.mode_changed();
        assert!(!denial.may_be_said(base(A), true, false));
        let mut denial = denied();
        denial.allow(false);
        assert!(!denial.may_be_said(base(A), true, false), "the primary goes on without it");
    }

    #[test]
    fn an_answer_that_leaves_it_out_or_is_in_a_later_generation_contradicts() {
        let denial = denied();
        for (follows, is_there, newest, contradicts) in
            [(true, false, A, false), (true, true, B, true), (false, true, B, false), (false, false, A, true)]
        {
            assert_eq!(denial.contradicts(follows, is_there, Some(newest)), contradicts);
        }
        let unsaid = Denial::new(false, A, true);
        assert!(!unsaid.contradicts(false, false, Some(B)));
    }

    #[test]
    fn it_is_taken_back_until_the_replica_follows_and_only_a_durable_header_counts() {
        let mut denial = denied();
        assert!(!denial.take_back(false, Some(A)), "it is of this run");
        assert!(!denial.may_be_said(base(A), true, false));
        denial.is_being_written(false, A);
        denial.was_written(false);
        assert!(denial.contradicts(false, false, Some(A)), "the file may say it still");
        denial.is_being_written(false, A);
        denial.was_written(true);
        assert!(!denial.contradicts(false, false, Some(A)));
        denial.follows();
        assert!(denial.may_be_said(base(A), true, false));
        // One that failed may be there all the same.
        denial.is_being_written(true, A);
        denial.was_written(false);
        assert!(denial.contradicts(false, false, Some(A)));
    }

    #[test]
    fn what_is_inherited_ends_with_the_first_answer_that_may_speak_for_it() {
        let mut denial = Denial::new(true, A, true);
        denial.opened_at(B, A);
        denial.allow(true);
        assert!(denial.is_inherited() && denial.may_be_said(base(A), true, false), "B was begun for nothing");
        assert!(denial.take_back(false, Some(B)) && !denial.is_inherited());
        assert!(!Denial::new(true, A, false).is_inherited(), "in another mode it may lack anything");
    }
}
