//! What a replica in the mode sync is promised: its primary answers no write without it before the replica knows that it does, or
//! the time of the promise is over (W4).
//!
//! A replica that is out of its primary's reach can't see whether that one goes on alone. So the primary binds itself. Where
//! the operator chose that it goes on, it does so only when the replica has heard of it, or when the time has passed for
//! which it last gave its word: the replica asks again and again, counts from when it *asked*, and the primary from when
//! the question came, so the primary's time is never over first. For the same reason a replica's clock goes on while its
//! machine sleeps. Where the operator chose that it waits, the word holds for ever, and is recorded with the commit. A
//! promotion that rests on neither loses what was answered meanwhile.
//!
//! A word that holds for ever says which hosts count for it. It outlives what the operator changes on the primary, of which a
//! replica that is away hears nothing: that replies go on, or wait for fewer; modes; hosts that join or are removed. So the
//! primary keeps, in the replica's map, what it gave ([`crate::given::Given`]), before it gives it, and answers nothing that breaks it
//! before the replica has heard that it counts on nothing: it has, when it has recorded that its copy is being resynced. Or the
//! operator says with --force that the replica is a member no more.
//!
//! A word may let its replica be promoted while others are silent ([`crate::given::Given::bears_silence`]). That is right as long as all count on
//! the same. So a primary gives such a word only while nobody else may be promoted by another one (`tracker/words`), and
//! whoever is promoted keeps what those say that it hears ([`crate::rewrite::Candidacy`]).

use crate::units::{Session, Time};
use crate::wire::message::{Grant, Renew};
use std::collections::VecDeque;
use std::time::Duration;

/// How long a primary keeps its word to a replica that it doesn't hear any more. Longer than it takes to notice that a
/// primary is gone and to ask all others how they stand.
pub const PATIENCE: Duration = Duration::from_secs(25);

/// A replica counts on this share of the time less: two hosts' clocks differ, though never by so much.
const MARGIN: u32 = 20;

/// No primary gives its word for longer. Whoever is told of a longer time would count on it when the primary has long
/// gone on alone.
const LONGEST: Duration = Duration::from_secs(600);

/// More questions than this wait for no answer.
const ASKED: usize = 16;

/// A word that is given for longer than any primary gives it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct TooLong;

/// A primary's side of the promise to one replica that holds for a time.
#[derive(Debug)]
pub struct Granted {
    /// Until when the replica may count on nothing being answered without it.
    until: Option<Time>,
    /// For how long the next word is given.
    patience: Duration,
}

impl Default for Granted {
    fn default() -> Self {
        Self { until: None, patience: PATIENCE }
    }
}

impl Granted {
    /// Gives the word anew, from now on. Gives for how long, in milliseconds.
    pub fn give(&mut self, now: Time) -> u64 {
        self.until = self.until.max(Some(now.after(self.patience)));
        self.patience.as_millis() as u64
    }

    /// The replica has heard that it counts on nothing any more.
    pub fn take_back(&mut self) {
        self.until = None;
    }

    /// The replica may have this host's word from before; the next one is given for so long.
    pub fn keep(&mut self, patience: Duration, until: Option<Time>) {
        self.patience = patience;
        self.until = self.until.max(until);
    }

    /// This host was away: whatever it gave holds for as long as if it had just been asked.
    pub fn renew(&mut self, now: Time) {
        if self.until.is_some() {
            self.until = self.until.max(Some(now.after(self.patience)));
        }
    }

    /// Until when it holds, unless it was taken back or never given; that may be over.
    #[must_use]
    pub fn until(&self) -> Option<Time> {
        self.until
    }

    /// Whether the replica may count on it.
    #[must_use]
    pub fn holds(&self, now: Time) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

/// A replica's side of the promise. It is held in memory alone: a replica that was restarted is sure of nothing.
#[derive(Debug, Default)]
pub struct Held {
    /// Questions without an answer, and when each was asked.
    asked: VecDeque<(u64, Time)>,
    next: u64,
    until: Option<Time>,
}

impl Held {
    /// Asks the primary for its word, from now on.
    pub fn ask(&mut self, session: Session, now: Time) -> Renew {
        let number = self.next;
        self.next += 1;
        self.asked.push_back((number, now));
        if self.asked.len() > ASKED {
            self.asked.pop_front();
        }
        Renew { session, number }
    }

    /// The primary gave its word.
    ///
    /// # Errors
    /// [`TooLong`] where that is for longer than any primary gives it.
    pub fn granted(&mut self, grant: &Grant) -> Result<(), TooLong> {
        let time = Duration::from_millis(grant.milliseconds);
        if time > LONGEST {
            return Err(TooLong);
        }
        if let Some(place) = self.asked.iter().position(|(number, _)| *number == grant.number) {
            let (_, asked) = self.asked.drain(..=place).next_back().expect("it was found there");
            let until = asked.after(time - time / MARGIN);
            self.until = self.until.max(Some(until));
        }
        Ok(())
    }

    /// The primary may go on alone from now on.
    pub fn give_up(&mut self) {
        self.asked.clear();
        self.until = None;
    }

    /// Whether the primary has answered nothing without this replica.
    #[must_use]
    pub fn holds(&self, now: Time) -> bool {
        self.until.is_some_and(|until| now < until)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(seconds: u64) -> Time {
        Time(Duration::from_secs(seconds))
    }

    fn grant(number: u64) -> Grant {
        Grant { session: Session(1), number, milliseconds: 20_000 }
    }

    #[test]
    fn the_word_counts_from_the_question_and_a_little_shorter() {
        let mut held = Held::default();
        assert!(!held.holds(at(0)));
        let renew = held.ask(Session(1), at(10));
        assert!(!held.holds(at(10)), "a question is no answer");
        held.granted(&grant(renew.number)).unwrap();
        assert!(held.holds(at(28)) && !held.holds(at(29)));
        // An answer that was overtaken by a later one shortens nothing.
        let (first, second) = (held.ask(Session(1), at(11)), held.ask(Session(1), at(12)));
        held.granted(&grant(second.number)).unwrap();
        held.granted(&grant(first.number)).unwrap();
        assert!(held.holds(at(30)));
    }

    #[test]
    fn nobody_promises_for_longer_than_primaries_do() {
        let mut held = Held::default();
        let number = held.ask(Session(1), at(10)).number;
        for milliseconds in [600_001, u64::MAX] {
            held.granted(&Grant { milliseconds, ..grant(number) }).unwrap_err();
            assert!(!held.holds(at(10)));
        }
        held.granted(&Grant { milliseconds: 600_000, ..grant(number) }).unwrap();
        assert!(held.holds(at(570)));
    }

    #[test]
    fn answers_to_what_was_given_up_count_for_nothing() {
        let mut held = Held::default();
        let renew = held.ask(Session(1), at(10));
        held.give_up();
        held.granted(&grant(renew.number)).unwrap();
        assert!(!held.holds(at(10)));
    }

    #[test]
    fn questions_that_nobody_answers_take_no_room() {
        let mut held = Held::default();
        let last = (0..1000).map(|second| held.ask(Session(1), at(second)).number).last().unwrap();
        assert_eq!(held.asked.len(), ASKED);
        held.granted(&grant(last)).unwrap();
        assert!(held.holds(at(1000)));
    }
}
