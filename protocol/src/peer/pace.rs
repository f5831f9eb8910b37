//! How fast a resync goes: how much of it may be under way (R3), and how much it has done.
//!
//! While an application uses the volume, little is under way: as much as keeps a disk going that does nothing else. On
//! a long link that would be a limit of its own; so where even a lone copy takes long from its read to its
//! acknowledgement, more of them may be on the way, in proportion.
//!
//! The operator may set a limit in bytes a second. What was read and is not zero counts against it, before it is packed:
//! the next copy begins when its share of the time is over. No more is under way then than half a second's worth, or one
//! copy, so that a copy doesn't grow old before it is there.

use super::resync::COPY_BYTES;
use crate::units::Time;
use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::time::Duration;

/// How many bytes of copies may be under way when no application waits.
const IDLE_BYTES: u64 = 32 << 20;
/// How many bytes of copies may be under way while an application uses the volume.
const BUSY_BYTES: u64 = 512 << 10;
/// How many bytes one copy reads then.
const BUSY_COPY_BYTES: u64 = 128 << 10;
/// Where a copy takes longer than this though little is under way, it is the distance, not the disk: so many times as
/// much may be under way.
const BUSY_TIME: Duration = Duration::from_millis(5);
/// How long a stretch the rate is measured over.
const RATE_WINDOW: Duration = Duration::from_secs(2);

/// How much a resync may copy now.
#[derive(Debug)]
pub(super) struct Pace {
    done_bytes: u64,
    checkpoints: VecDeque<(Time, u64)>,
    /// The shortest time from a copy's read to its acknowledgement.
    fastest: Option<Duration>,
    /// Bytes a second.
    limit: Option<NonZeroU64>,
    /// When the limit lets the next copy begin.
    free_at: Time,
}

impl Pace {
    /// Nothing is done, and nothing limits it but what is said here.
    pub(super) fn new(now: Time, limit: Option<NonZeroU64>) -> Self {
        Self { done_bytes: 0, checkpoints: VecDeque::from([(now, 0)]), fastest: None, limit, free_at: now }
    }

    /// The operator wants so many bytes a second at most.
    pub(super) fn set_limit(&mut self, limit: Option<NonZeroU64>) {
        if self.limit != limit {
            // What was copied under another limit counts against that one.
            (self.limit, self.free_at) = (limit, Time::default());
        }
    }

    /// How many bytes of copies may be under way.
    pub(super) fn budget_bytes(&self, application_is_active: bool) -> u64 {
        let most =
            self.limit.map_or(IDLE_BYTES, |limit| (limit.get() / 2).clamp(BUSY_COPY_BYTES, IDLE_BYTES));
        if !application_is_active {
            return most;
        }
        let times = self.fastest.map_or(1, |fastest| fastest.as_micros() / BUSY_TIME.as_micros());
        most.min(BUSY_BYTES.saturating_mul(u64::try_from(times.max(1)).unwrap_or(u64::MAX)))
    }

    /// How many bytes one copy reads: few where others wait for them to be done.
    pub(super) fn copy_bytes(&self, application_is_active: bool) -> u64 {
        if application_is_active || self.limit.is_some() { BUSY_COPY_BYTES } else { COPY_BYTES }
    }

    /// Until when the limit lets no copy begin.
    pub(super) fn waits_until(&self, now: Time) -> Option<Time> {
        self.limit.and((now < self.free_at).then_some(self.free_at))
    }

    /// Content was read and is about to be sent.
    pub(super) fn spend(&mut self, bytes: u64, now: Time) {
        let Some(limit) = self.limit else { return };
        let share = Duration::from_secs_f64(bytes as f64 / limit.get() as f64);
        self.free_at = self.free_at.max(now).after(share);
    }

    /// A copy is durable on the replica.
    pub(super) fn done(&mut self, bytes: u64, took: Duration) {
        self.done_bytes += bytes;
        self.fastest = Some(self.fastest.map_or(took, |fastest| fastest.min(took)));
    }

    /// An acknowledgement has come.
    pub(super) fn note(&mut self, now: Time) {
        self.checkpoints.push_back((now, self.done_bytes));
        while self.checkpoints.len() > 2 && now.since(self.checkpoints[1].0) >= RATE_WINDOW {
            self.checkpoints.pop_front();
        }
    }

    /// Bytes copied, or found to be the same, and durable on the replica.
    pub(super) fn done_bytes(&self) -> u64 {
        self.done_bytes
    }

    /// Bytes a second, over the last seconds.
    pub(super) fn rate_bytes(&self, now: Time) -> u64 {
        let (since, before) = self.checkpoints[0];
        let seconds = now.since(since).as_secs_f64();
        if seconds > 0.0 { ((self.done_bytes - before) as f64 / seconds) as u64 } else { 0 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_application_leaves_little_room_on_a_short_link_and_more_on_a_long_one() {
        for (milliseconds, bytes) in
            [(1, BUSY_BYTES), (9, BUSY_BYTES), (40, 8 * BUSY_BYTES), (10_000, IDLE_BYTES)]
        {
            let mut pace = Pace::new(Time::default(), None);
            assert_eq!(pace.budget_bytes(true), BUSY_BYTES, "nothing is known");
            pace.done(1, Duration::from_millis(20_000));
            pace.done(1, Duration::from_millis(milliseconds));
            pace.done(1, Duration::from_millis(30_000));
            assert_eq!((pace.budget_bytes(true), pace.budget_bytes(false)), (bytes, IDLE_BYTES));
        }
    }

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let mut pace = Pace::new(Time::default(), None);
        let at = |seconds| Time::default().after(Duration::from_secs(seconds));
        for second in 1..=10 {
            pace.done(if second <= 5 { 100 } else { 10 }, Duration::ZERO);
            pace.note(at(second));
        }
        assert_eq!((pace.rate_bytes(at(10)), pace.done_bytes()), (10, 550));
        assert_eq!(Pace::new(at(1), None).rate_bytes(at(1)), 0);
    }

    #[test]
    fn a_limit_spaces_copies_and_keeps_little_under_way() {
        let at = |milliseconds| Time::default().after(Duration::from_millis(milliseconds));
        let mut pace = Pace::new(at(0), NonZeroU64::new(1 << 20));
        assert_eq!((pace.budget_bytes(false), pace.copy_bytes(false)), (512 << 10, 128 << 10));
        assert_eq!(pace.waits_until(at(0)), None);
        pace.spend(256 << 10, at(0));
        pace.spend(256 << 10, at(100));
        assert_eq!((pace.waits_until(at(499)), pace.waits_until(at(500))), (Some(at(500)), None));
        pace.spend(1 << 20, at(9000));
        assert_eq!(pace.waits_until(at(9999)), Some(at(10_000)), "time that was not used is not saved up");
        pace.set_limit(NonZeroU64::new(1 << 20));
        assert_eq!(pace.waits_until(at(9999)), Some(at(10_000)), "it is the same limit");
        pace.set_limit(NonZeroU64::new(2 << 20));
        assert_eq!(pace.waits_until(at(9999)), None, "what the old one cost is not paid under the new one");
    }
}
