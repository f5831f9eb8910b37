//! What the replica may count on (W4), and when it may be given something else: [`Given`] is in its map's file before it is
//! given, and stays there until the replica has heard otherwise.

use crate::given::Given;
use crate::terms::Promise;
use crate::units::HostId;

/// What a replica may count on, as it is wanted, sent, recorded and held.
#[derive(Debug)]
pub(super) struct Word {
    /// What the replica may count on, at the most.
    held: Given,
    /// What the next commit gives it.
    wanted: Given,
    /// What the last commit that was sent gives it.
    sent: Given,
    /// Whether it may still count on what it was given for some time, before what it was sent since.
    may_be_timed: bool,
    /// Whether what it may count on is another one than when this was last asked.
    has_changed: bool,
    /// What the map's file says, as far as that is known; and what is being written.
    file: Option<Given>,
    being_written: Option<Given>,
}

impl Word {
    /// As the map's file says; nothing where that does not know.
    pub(super) fn new(file: Option<&Given>) -> Self {
        let file = file.cloned();
        let held = file.clone().unwrap_or_default();
        // Whether the file is there is not known before it was written in this run.
        let (wanted, file, being_written) = (Given::NOTHING, None, None);
        let sent = Given::NOTHING;
        Self { held, wanted, sent, may_be_timed: false, has_changed: true, file, being_written }
    }

    /// What it may count on is not known, and this is what it would have been given.
    pub(super) fn assume(&mut self, given: Given) {
        self.hold(given);
    }

    fn hold(&mut self, given: Given) {
        self.has_changed |= self.held != given;
        self.held = given;
    }

    /// Whether what it may count on is another one than when this was last asked.
    pub(super) fn take_change(&mut self) -> bool {
        std::mem::take(&mut self.has_changed)
    }

    /// Whether it may be promoted while `peer` is silent, by another word than `given`, if there is one. One that holds for a time
    /// counts where `is_timed`: that time may not be over.
    pub(super) fn bears_silence_of(&self, other: HostId, given: Option<&Given>, is_timed: bool) -> bool {
        let may_be_timed = self.may_be_timed && is_timed;
        let bears_it = match self.held.promise {
            Promise::WhileHeard => is_timed,
            // One that it does not know is none that it waits to hear.
            Promise::Replicas(_) => self.held.bears_silence() || !self.held.counted.contains(&other),
            Promise::None => false,
        };
        may_be_timed || bears_it && given.is_none_or(|given| self.held != *given)
    }

    /// The next commit is to give it this.
    pub(super) fn want(&mut self, given: Given) {
        self.wanted = given;
    }

    /// What the next commit gives it.
    pub(super) fn wanted(&self) -> &Given {
        &self.wanted
    }

    /// Whether it was given it for ever.
    pub(super) fn is_for_ever(&self) -> bool {
        self.held.is_for_ever()
    }

    /// Whether it counts for ever on what it is not to count on any more: then it has to be resynced, where it counts on nothing.
    pub(super) fn is_outdated(&self) -> bool {
        self.held != self.wanted && self.held.is_for_ever()
    }

    /// Whether a new commit gives it something else that holds for ever, or takes that away, or gives it a word at all.
    pub(super) fn is_news(&self) -> bool {
        let is_first = self.held.promise == Promise::None;
        self.held != self.wanted && (self.held.is_for_ever() || self.wanted.is_for_ever() || is_first)
    }

    /// Whether it may count on its primary's word for some time, as far as is known.
    pub(super) fn holds_for_a_time(&self) -> bool {
        self.held.promise == Promise::WhileHeard
    }

    /// Whether an answer without it breaks no word that holds for ever. `has_it` says of another replica whether it has all
    /// that the answer speaks for.
    pub(super) fn allows(&self, has_it: impl Fn(HostId) -> bool) -> bool {
        self.held.allows(has_it)
    }

    /// Its copy is being resynced, as it has recorded: it can't be promoted without force. Says whether it counted for ever on
    /// something until now.
    pub(super) fn counts_on_nothing(&mut self) -> bool {
        let is_over = self.held.is_for_ever();
        if is_over {
            self.hold(Given::NOTHING);
        }
        is_over
    }

    /// What the map's file has to say before the commit, if it does not.
    pub(super) fn to_record(&self) -> Option<&Given> {
        let is_there = self.file.as_ref() == Some(&self.wanted);
        Some(&self.wanted).filter(|wanted| wanted.promise != Promise::None && !is_there)
    }

    /// The commit is sent: it may be recorded there.
    pub(super) fn is_sent(&mut self) {
        if self.wanted.promise != Promise::None {
            self.may_be_timed |= self.holds_for_a_time() && self.held != self.wanted;
            self.hold(self.wanted.clone());
        }
        self.sent = self.wanted.clone();
    }

    /// The commit is recorded there. Gives what the map's file may say from now on.
    pub(super) fn was_recorded(&mut self) -> &Given {
        self.has_changed |= std::mem::take(&mut self.may_be_timed);
        // Something else may be wanted since.
        self.hold(self.sent.clone());
        &self.held
    }

    /// A header that says this is being written.
    pub(super) fn is_being_written(&mut self, given: Option<&Given>) {
        self.being_written = given.cloned();
        // The one that was there may be, still.
        self.file = None;
    }

    /// The header that was being written, if one was, is durable, or may not be.
    pub(super) fn was_written(&mut self, is_durable: bool) {
        if let Some(given) = self.being_written.take() {
            self.file = Some(given).filter(|_| is_durable);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const B: HostId = HostId([2; 32]);
    const C: HostId = HostId([3; 32]);

    fn for_ever(counted: &[HostId]) -> Given {
        Given { promise: Promise::Replicas(1), counted: counted.to_vec() }
    }

    /// One that was given this, and has heard of it.
    fn given(given: Given) -> Word {
        let mut word = Word::new(Some(&Given::NOTHING));
        word.want(given);
        record(&mut word);
        word.is_sent();
        word.was_recorded();
        word
    }

    fn record(word: &mut Word) {
        let given = word.to_record().cloned();
        word.is_being_written(given.as_ref());
        word.was_written(true);
    }

    #[test]
    fn nothing_is_given_before_the_file_says_so() {
        let mut word = Word::new(Some(&for_ever(&[B])));
        word.want(for_ever(&[B]));
        assert_eq!(word.to_record(), Some(&for_ever(&[B])), "the file may be gone");
        word.is_being_written(Some(&for_ever(&[B])));
        word.was_written(false);
        assert!(word.to_record().is_some(), "what it says is not known");
        record(&mut word);
        assert_eq!(word.to_record(), None);
        word.want(Given::NOTHING);
        assert_eq!(word.to_record(), None, "that it counts on nothing can be told later");
    }

    #[test]
    fn what_holds_for_ever_holds_until_it_is_resynced() {
        let mut word = given(for_ever(&[B]));
        word.want(Given { promise: Promise::WhileHeard, counted: Vec::new() });
        assert!(word.is_outdated() && !word.allows(|_| false) && word.allows(|host| host == B));
        assert!(!word.allows(|host| host == C), "a host that joined does not count for it");
        assert!(word.counts_on_nothing() && !word.counts_on_nothing());
        assert!(!word.is_outdated() && word.allows(|_| false));
    }

    #[test]
    fn a_commit_that_may_be_recorded_counts() {
        let mut word = Word::new(None);
        word.want(for_ever(&[B]));
        assert!(word.allows(|_| false) && word.is_news() && !word.is_outdated());
        record(&mut word);
        word.is_sent();
        assert!(!word.allows(|_| false) && !word.is_news());
        // It is to count on nothing: until it has recorded that, it may not.
        word.want(Given::NOTHING);
        word.is_sent();
        assert!(!word.allows(|_| false));
        assert_eq!(word.was_recorded(), &Given::NOTHING);
        assert!(word.allows(|_| false));
    }

    /// The operator chose something else while a commit was on its way: the word that it gave was forgotten.
    #[test]
    fn what_it_counts_on_is_what_it_was_sent_and_not_what_is_wanted_since() {
        let mut word = given(Given::NOTHING);
        word.want(for_ever(&[]));
        record(&mut word);
        word.is_sent();
        word.want(Given { promise: Promise::WhileHeard, counted: Vec::new() });
        assert_eq!(word.was_recorded(), &for_ever(&[]));
        assert!(word.is_news() && !word.allows(|_| false), "it has to hear of that");
    }

    /// It was sent a word that lets nobody be silent, and may still go by the one before.
    #[test]
    fn one_that_may_not_have_recorded_its_new_word_may_be_promoted_by_the_old_one() {
        let timed = Given { promise: Promise::WhileHeard, counted: Vec::new() };
        let mut word = given(timed.clone());
        assert!(word.take_change() && !word.take_change());
        assert!(word.bears_silence_of(B, None, true) && !word.bears_silence_of(B, None, false));
        assert!(!word.bears_silence_of(B, Some(&timed), true), "it is what it is meant to be");
        word.want(for_ever(&[B]));
        record(&mut word);
        word.is_sent();
        assert!(word.take_change() && word.bears_silence_of(B, Some(&for_ever(&[B])), true));
        word.was_recorded();
        assert!(word.take_change() && !word.bears_silence_of(B, None, true), "it waits to hear it");
        assert!(word.bears_silence_of(C, None, true), "which it does not know");
        let two = Given { promise: Promise::Replicas(2), counted: vec![B, C] };
        let word = given(two.clone());
        assert!(word.bears_silence_of(B, Some(&timed), false) && !word.bears_silence_of(B, Some(&two), true));
    }
}
