//! Up to which epoch of the newest generation replicas may be told, recorded before they are, so that a primary that is set back
//! is found out (X4).
//!
//! A primary whose disks are all set back to what they were some time ago can't know that by itself: nothing on them tells
//! of what came after. Its replicas can, where they are further than it ever was. So it records ahead up to which epoch of
//! its newest generation replicas may be told, and tells none of a later one before that is durable. What it greets with
//! after a restart is that bound ([`crate::lineage::Ends`]): a replica beyond it has what this host has lost.
//!
//! The bound is kept ahead by as many epochs as go by in about a second, and is lowered to what was told once nothing is
//! written any more; the first write after that waits for it, as it does for a record of the activity log. What was told
//! between the bound and the moment to which a host is set back is not noticed: about a second of a busy volume, and
//! nothing of one that rests.

use super::pipeline::{Piece, Wait};
use super::{Action, Tracker};
use crate::planted::{Bug, planted};
use crate::units::{Epoch, Time};
use std::time::Duration;

/// How long a bound holds before it is looked at again.
const LOOK_TIME: Duration = Duration::from_secs(2);
/// A bound that was reached sooner than this was too low.
const SHORT_TIME: Duration = Duration::from_secs(1);
/// At most so many epochs are told ahead.
const STEP_LIMIT: u64 = 1 << 20;

/// How far replicas may be told of the newest generation.
#[derive(Debug)]
pub(super) struct Told {
    /// The first epoch that no replica may be told of; nothing where the newest generation is not of this run, in which
    /// nothing was written in it.
    end: Option<Epoch>,
    /// The one that is being recorded.
    asked: Option<Epoch>,
    /// By how many epochs it is raised.
    step: u64,
    /// The open epoch when it was recorded, and when that was.
    at: (Epoch, Time),
    /// When it could not be recorded.
    failed_at: Option<Time>,
    /// Whether an epoch is to be told of that may not be yet.
    pub(super) is_wanted: bool,
}

impl Default for Told {
    fn default() -> Self {
        Self {
            end: None,
            asked: None,
            step: 1,
            at: (Epoch(0), Time::default()),
            failed_at: None,
            is_wanted: false,
        }
    }
}

impl Told {
    /// The bound that is recorded with a generation that begins with the epoch `first`.
    pub(super) fn first_end(first: Epoch) -> Epoch {
        first.next()
    }

    /// A generation began with this epoch, durably.
    pub(super) fn begin(&mut self, first: Epoch, now: Time) {
        (self.end, self.at) = (Some(Self::first_end(first)), (first, now));
    }

    /// The first epoch that no replica may be told of; nothing where nothing was written in this run.
    pub(super) fn end(&self) -> Option<Epoch> {
        self.end.map(|end| if planted(Bug::TellUnrecorded) { Epoch(u64::MAX) } else { end })
    }

    /// Whether one is being recorded.
    pub(super) fn is_asked(&self) -> bool {
        self.asked.is_some()
    }

    /// Whether replicas may be told of this epoch.
    fn covers(&self, epoch: Epoch) -> bool {
        self.end().is_none_or(|end| epoch < end)
    }

    /// The bound to record, if one is to be. `open` is the open epoch, and `is_active` tells whether something is written in
    /// it, or is about to be.
    fn next(&mut self, open: Epoch, is_active: bool, now: Time) -> Option<Epoch> {
        let end = self.end.filter(|_| self.asked.is_none())?;
        let ahead = end.0.saturating_sub(open.0);
        let (since, passed) = (now.since(self.at.1), open.0 - self.at.0.0);
        if (is_active || self.is_wanted) && ahead <= (self.step / 2).max(1) {
            self.step = if since < SHORT_TIME {
                (2 * self.step).min(STEP_LIMIT)
            } else {
                passed.clamp(1, STEP_LIMIT)
            };
            return Some(Epoch(open.0 + 1 + self.step));
        }
        if since < LOOK_TIME || ahead == 0 {
            return None;
        }
        self.step = passed.clamp(1, STEP_LIMIT);
        self.at = (open, now);
        let wanted = if is_active || passed > 0 { open.0 + 1 + self.step } else { open.0 };
        // Raising it can wait until it is needed. A lower one counts from now on: after a crash it may be there or not.
        let lower = Some(Epoch(wanted)).filter(|lower| *lower < end)?;
        self.end = Some(lower);
        Some(lower)
    }

    /// When [`Told::next`] is to be looked at.
    fn timeout(&self, open: Epoch) -> Option<Time> {
        let end = self.end.filter(|_| self.asked.is_none())?;
        let look = (end > open).then(|| self.at.1.after(LOOK_TIME));
        // What waits for it may be a replica's commit, which nothing else reminds of.
        let again = self.failed_at.filter(|_| self.is_wanted).map(|failed| failed.after(SHORT_TIME));
        look.into_iter().chain(again).min()
    }
}

impl Tracker {
    /// The bound that [`Action::TellUpTo`] asked for is durable, or could not be recorded.
    pub fn handle_told(&mut self, recorded: bool, now: Time) {
        let asked = self.told.asked.take().expect("a bound was asked for");
        let is_raised = asked > self.epoch.number;
        self.told.at = (self.epoch.number, now);
        self.told.failed_at = (!recorded).then_some(now);
        if recorded {
            self.told.end = Some(asked);
            self.told.is_wanted = false;
        }
        let held = self.pipeline.take_from_bound();
        if recorded || !is_raised || held.is_empty() {
            for piece in held {
                self.begin_if_active(piece, now);
            }
        } else {
            for piece in held {
                self.give_piece_up(piece, now);
            }
            self.fail_backing(now);
        }
        self.drive(now);
    }

    /// Whether a write must wait until replicas may be told of its epoch.
    pub(super) fn hold_for_told(&mut self, piece: Piece) -> bool {
        if self.peers.is_empty() || self.told.covers(self.epoch.number) {
            return false;
        }
        self.pipeline.wait(piece, Wait::Bound);
        true
    }

    /// Whether replicas may be told of this epoch; it is seen to that they may be soon.
    pub(super) fn may_tell(&mut self, epoch: Epoch) -> bool {
        let may_tell = self.told.covers(epoch);
        self.told.is_wanted |= !may_tell;
        may_tell
    }

    /// Asks for the next bound, where one is to be recorded.
    pub(super) fn look_ahead(&mut self, now: Time) {
        if self.peers.is_empty() && !self.told.is_asked() && self.pipeline.awaits_bound() {
            // Nobody is told of anything any more.
            for piece in self.pipeline.take_from_bound() {
                self.begin_if_active(piece, now);
            }
        }
        if !self.looks_ahead() {
            return;
        }
        let (waits, is_held) = (self.pipeline.awaits_record(), self.pipeline.awaits_bound());
        if self.told.failed_at.is_some_and(|failed| now.since(failed) < SHORT_TIME) && !is_held {
            return;
        }
        let is_active = self.epoch.since.is_some() || waits || is_held;
        if let Some(end) = self.told.next(self.epoch.number, is_active, now) {
            self.told.asked = Some(end);
            self.actions.push_back(Action::TellUpTo { end });
        }
    }

    pub(super) fn told_timeout(&self) -> Option<Time> {
        self.told.timeout(self.epoch.number).filter(|_| self.looks_ahead())
    }

    /// Whether a bound may be asked for.
    fn looks_ahead(&self) -> bool {
        let is_over = self.local.failed || self.leading.is_superseded;
        // The end of a primary waits for no more than it needs.
        let is_ending = self.closing && !self.pipeline.awaits_bound() && !self.told.is_wanted;
        !self.peers.is_empty() && !is_over && !is_ending && !self.generations.beginning
    }
}

#[cfg(test)]
mod tests {
    use super::super::replies::ReplicaLoss;
    use super::super::testing::{NOW, answers, carry_out, following, host, tracker};
    use super::super::{RequestId, Work};
    use super::*;
    use crate::promise::PATIENCE;
    use crate::ranges::ByteRange;
    use crate::terms::Mode;

    /// Opened with epoch 1 for the first one of its generation.
    fn begun() -> Told {
        let mut told = Told::default();
        told.begin(Epoch(1), NOW);
        told
    }

    /// The bound that is asked for when `open` is open, recorded at once.
    fn raise(told: &mut Told, open: u64, is_active: bool, now: Time) -> Option<u64> {
        let end = told.next(Epoch(open), is_active, now)?;
        (told.end, told.at) = (Some(end), (Epoch(open), now));
        Some(end.0)
    }

    #[test]
    fn a_busy_volume_is_ahead_by_more_and_more_and_one_that_rests_by_nothing() {
        let mut told = begun();
        let at = |milliseconds| NOW.after(Duration::from_millis(milliseconds));
        assert_eq!(raise(&mut told, 1, true, at(1)), Some(4), "two epochs more");
        assert_eq!(raise(&mut told, 2, true, at(2)), None);
        assert_eq!(raise(&mut told, 3, true, at(3)), Some(8));
        assert_eq!(raise(&mut told, 6, true, at(4)), Some(15));
        assert_eq!(told.timeout(Epoch(6)), Some(at(4).after(LOOK_TIME)));
        // Some epochs went by since, and then nothing did.
        assert_eq!(raise(&mut told, 8, false, at(2004)), Some(11));
        assert_eq!(raise(&mut told, 8, false, at(3000)), None);
        assert_eq!(raise(&mut told, 8, false, at(4004)), Some(8), "the open epoch is told to nobody");
        assert_eq!(told.timeout(Epoch(8)), None);
        assert!(told.covers(Epoch(7)) && !told.covers(Epoch(8)));
    }

    #[test]
    fn a_bound_that_is_wanted_and_could_not_be_recorded_is_asked_for_again() {
        let mut told = Told { end: Some(Epoch(1)), is_wanted: true, ..begun() };
        assert_eq!(told.timeout(Epoch(1)), None, "it is asked for at once");
        told.failed_at = Some(NOW);
        assert_eq!(told.timeout(Epoch(1)), Some(NOW.after(SHORT_TIME)));
        let again = NOW.after(SHORT_TIME);
        assert!(raise(&mut told, 1, false, again).is_some());
        // One that nobody waits for is asked for with the next write.
        (told.end, told.is_wanted) = (Some(Epoch(1)), false);
        assert_eq!(told.timeout(Epoch(1)), None);
    }

    #[test]
    fn a_slow_volume_is_ahead_by_one_epoch() {
        let mut told = begun();
        for second in 1..20 {
            let now = NOW.after(Duration::from_secs(3 * second));
            raise(&mut told, second, true, now);
            let end = told.end.unwrap().0;
            assert!(end > second && end <= second + 3, "{second}: {end}");
        }
    }

    /// A primary with a replica that is away, once its disk has done what it was asked for.
    fn opened() -> Tracker {
        let mut tracker = tracker(vec![following(2, Mode::Async)], ReplicaLoss::Continue, PATIENCE);
        answers(&mut tracker, NOW);
        tracker
    }

    /// Carries out all but the record of the bound: what that is to be, and the answers.
    fn answers_untold(tracker: &mut Tracker) -> (Option<Epoch>, Vec<(RequestId, bool)>) {
        let (mut asked, mut answers) = (None, Vec::new());
        while let Some(action) = tracker.poll_action() {
            match action {
                Action::TellUpTo { end } => asked = Some(end),
                action => answers.extend(carry_out(tracker, action, NOW)),
            }
        }
        (asked, answers)
    }

    fn request(tracker: &mut Tracker, id: u64, work: Work) {
        tracker.handle_request(RequestId(id), work, NOW);
    }

    const WRITE: Work = Work::Write { range: ByteRange { offset: 0, length: 4096 }, fua: false };

    #[test]
    fn a_write_waits_until_it_is_recorded_that_replicas_may_be_told_of_its_epoch() {
        let mut tracker = opened();
        request(&mut tracker, 1, WRITE);
        assert_eq!(answers_untold(&mut tracker), (Some(Epoch(4)), vec![(RequestId(1), true)]));
        request(&mut tracker, 2, Work::Flush);
        request(&mut tracker, 3, WRITE);
        assert_eq!(answers_untold(&mut tracker), (None, vec![(RequestId(2), true)]));
        tracker.handle_told(true, NOW);
        assert_eq!(answers(&mut tracker, NOW), [(RequestId(3), true)]);
    }

    /// The write 3 waits until replicas may be told of it.
    fn waiting() -> Tracker {
        let mut tracker = opened();
        request(&mut tracker, 1, WRITE);
        answers_untold(&mut tracker);
        request(&mut tracker, 2, Work::Flush);
        request(&mut tracker, 3, WRITE);
        answers_untold(&mut tracker);
        tracker
    }

    #[test]
    fn where_that_can_not_be_recorded_what_waits_for_it_fails() {
        let mut tracker = waiting();
        tracker.handle_told(false, NOW);
        assert_eq!(answers(&mut tracker, NOW), [(RequestId(3), false)]);
        assert!(tracker.has_failed());
    }

    #[test]
    fn a_write_goes_on_where_nobody_is_left_to_be_told() {
        let mut tracker = waiting();
        tracker.told.asked = None;
        tracker.remove_peer(host(2), NOW);
        assert_eq!(answers(&mut tracker, NOW), [(RequestId(3), true)]);
    }

    #[test]
    fn a_volume_without_replicas_tells_nobody() {
        let mut tracker = tracker(Vec::new(), ReplicaLoss::Continue, PATIENCE);
        answers(&mut tracker, NOW);
        for id in 0..20 {
            request(&mut tracker, 2 * id, WRITE);
            request(&mut tracker, 2 * id + 1, Work::Flush);
            assert_eq!(answers_untold(&mut tracker).0, None);
        }
    }
}
