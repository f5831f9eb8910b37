//! Whether this host still leads (L5): another one may have been promoted while this process was away, or is said to have
//! been. Until the others were asked, requests that are done are kept back, so that nothing is answered that only a host
//! that leads may answer.
//!
//! Each reason to ask is a [`Doubt`] of its own: what was asked before a later one began says nothing about it.

use super::{RequestId, Tracker, WriteFailed};
use crate::planted::{Bug, planted};
use crate::units::{Sequence, Time};
use std::collections::BTreeSet;

/// A reason to ask the others whether this host still leads.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Doubt(u64);

/// Whether this primary leads still, and what is kept back until that is known.
#[derive(Debug, Default)]
pub(super) struct Leading {
    /// Another host may write now: nothing is taken any more.
    pub(super) is_superseded: bool,
    doubts: BTreeSet<Doubt>,
    begun: u64,
    /// Requests that are done, with the last write that each answer speaks for.
    withheld: Vec<(RequestId, Sequence)>,
}

impl Tracker {
    /// This host was away, as a process that was frozen or a machine that slept: another one may lead by now. As
    /// [`Tracker::doubt`]; and what was promised holds as if it had just been asked for.
    pub fn note_absence(&mut self, now: Time) -> Doubt {
        self.peers.values_mut().for_each(|peer| peer.renew_word(now));
        self.doubt(now)
    }

    /// Another host may lead. Answers that would tell of success are withheld until [`Tracker::trust`] has ended each such doubt.
    pub fn doubt(&mut self, now: Time) -> Doubt {
        let doubt = Doubt(self.leading.begun);
        self.leading.begun += 1;
        if !self.leading.is_superseded {
            self.leading.doubts.insert(doubt);
        }
        self.drive(now);
        doubt
    }

    /// As far as anybody knows who could be reached since this doubt began, this host still leads.
    pub fn trust(&mut self, doubt: Doubt, now: Time) {
        self.leading.doubts.remove(&doubt);
        self.drive(now);
    }

    /// Answers what was kept back, if there is no doubt any more.
    pub(super) fn answer_withheld(&mut self) {
        if self.is_in_doubt() {
            return;
        }
        // A replica may have been lost meanwhile.
        for (request, sequence) in std::mem::take(&mut self.leading.withheld) {
            if self.holds_answer(sequence) {
                self.leading.withheld.push((request, sequence));
            } else {
                self.succeed(request, sequence);
            }
        }
    }

    /// Whether it isn't known whether this host still leads.
    #[must_use]
    pub fn is_in_doubt(&self) -> bool {
        !self.leading.doubts.is_empty()
    }

    /// Another host was promoted: no write is taken or answered well any more. What is under way ends.
    pub fn supersede(&mut self, now: Time) {
        self.leading.is_superseded = true;
        self.leading.doubts.clear();
        self.fail_owed();
        self.fail_withheld();
        self.give_pieces_up(now);
        self.drive(now);
    }

    /// What was kept back is not answered well any more.
    pub(super) fn fail_withheld(&mut self) {
        for (request, _) in std::mem::take(&mut self.leading.withheld) {
            self.answer(request, Err(WriteFailed));
        }
    }

    /// Answers a request that is done wherever it must be; the answer speaks for all writes up to this one.
    pub(super) fn succeed(&mut self, id: RequestId, sequence: Sequence) {
        let is_in_doubt = self.is_in_doubt() && !planted(Bug::AnswerUnasked);
        // One that is about to be closed does not wait for what the others say.
        if self.leading.is_superseded || is_in_doubt && self.start.refuses {
            return self.answer(id, Err(WriteFailed));
        }
        if is_in_doubt {
            return self.leading.withheld.push((id, sequence));
        }
        let newest = self.generations.lineage.first().copied();
        self.peers.values_mut().for_each(|peer| peer.note_answered(sequence, newest));
        self.generations.unanswered = 0;
        self.answer(id, Ok(()));
    }
}

#[cfg(test)]
mod tests {
    use crate::terms::Mode;
    use crate::tracker::replies::ReplicaLoss;
    use crate::tracker::testing::{NOW, answers, following, tracker, write};
    use crate::tracker::{RequestId, Tracker};
    use std::time::Duration;

    fn opened() -> Tracker {
        let mut tracker = tracker(vec![following(1, Mode::Async)], ReplicaLoss::Continue, Duration::ZERO);
        answers(&mut tracker, NOW);
        tracker
    }

    /// A process that was frozen once more while it asked was told who led before.
    #[test]
    fn what_is_done_is_answered_when_the_last_doubt_has_ended() {
        let mut tracker = opened();
        let (absence, claim) = (tracker.note_absence(NOW), tracker.doubt(NOW));
        assert_eq!(write(&mut tracker, 1, NOW), []);
        tracker.trust(absence, NOW);
        assert!(answers(&mut tracker, NOW).is_empty() && tracker.is_in_doubt());
        tracker.trust(claim, NOW);
        assert_eq!(answers(&mut tracker, NOW), [(RequestId(1), true)]);
        assert_eq!(write(&mut tracker, 2, NOW), [(RequestId(2), true)]);
    }

    #[test]
    fn what_is_kept_back_fails_when_another_host_leads_or_this_one_is_closed() {
        let mut superseded = opened();
        let doubt = superseded.doubt(NOW);
        assert_eq!(write(&mut superseded, 1, NOW), []);
        superseded.supersede(NOW);
        assert_eq!(answers(&mut superseded, NOW), [(RequestId(1), false)]);
        superseded.trust(doubt, NOW);
        superseded.doubt(NOW);
        assert_eq!(write(&mut superseded, 2, NOW), [(RequestId(2), false)]);
        assert!(!superseded.is_in_doubt());

        let mut closed = opened();
        closed.doubt(NOW);
        assert_eq!(write(&mut closed, 1, NOW), []);
        closed.wait_no_more(NOW);
        assert_eq!(answers(&mut closed, NOW), [(RequestId(1), false)]);
        assert_eq!(write(&mut closed, 2, NOW), [(RequestId(2), false)]);
    }
}
