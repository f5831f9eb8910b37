//! How fast a resync goes: how much of it may be under way (R3), and how much it has done.
//!
//! While an application uses the volume, little is under way: as much as keeps a disk going that does nothing else. On
//! a long link that would be a limit of its own; so where even a lone copy takes long from its read to its
//! acknowledgement, more of them may be on the way, in proportion.

use crate::units::Time;
use std::collections::VecDeque;
use std::time::Duration;

/// How many bytes of copies may be under way when no application waits.
pub(super) const IDLE_BYTES: u64 = 32 << 20;
/// How many bytes of copies may be under way while an application uses the volume.
pub(super) const BUSY_BYTES: u64 = 512 << 10;
/// How many bytes one copy reads then.
pub(super) const BUSY_COPY_BYTES: u64 = 128 << 10;
/// Where a copy takes longer than this though little is under way, it is the distance, not the disk: so many times as
/// much may be under way.
const BUSY_TIME: Duration = Duration::from_millis(5);
/// How long a stretch the rate is measured over.
const RATE_WINDOW: Duration = Duration::from_secs(2);

/// See the module.
#[derive(Debug)]
pub(super) struct Pace {
    done_bytes: u64,
    checkpoints: VecDeque<(Time, u64)>,
    /// The shortest time from a copy's read to its acknowledgement.
    fastest: Option<Duration>,
}

impl Pace {
    /// Nothing is done.
    pub(super) fn new(now: Time) -> Self {
        Self { done_bytes: 0, checkpoints: VecDeque::from([(now, 0)]), fastest: None }
    }

    /// How many bytes of copies may be under way.
    pub(super) fn budget_bytes(&self, application_is_active: bool) -> u64 {
        if !application_is_active {
            return IDLE_BYTES;
        }
        let times = self.fastest.map_or(1, |fastest| fastest.as_micros() / BUSY_TIME.as_micros());
        IDLE_BYTES.min(BUSY_BYTES.saturating_mul(u64::try_from(times.max(1)).unwrap_or(u64::MAX)))
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
            let mut pace = Pace::new(Time::default());
            assert_eq!(pace.budget_bytes(true), BUSY_BYTES, "nothing is known");
            pace.done(1, Duration::from_millis(20_000));
            pace.done(1, Duration::from_millis(milliseconds));
            pace.done(1, Duration::from_millis(30_000));
            assert_eq!((pace.budget_bytes(true), pace.budget_bytes(false)), (bytes, IDLE_BYTES));
        }
    }

    #[test]
    fn the_rate_is_that_of_the_last_seconds() {
        let mut pace = Pace::new(Time::default());
        let at = |seconds| Time::default().after(Duration::from_secs(seconds));
        for second in 1..=10 {
            pace.done(if second <= 5 { 100 } else { 10 }, Duration::ZERO);
            pace.note(at(second));
        }
        assert_eq!((pace.rate_bytes(at(10)), pace.done_bytes()), (10, 550));
        assert_eq!(Pace::new(at(1)).rate_bytes(at(1)), 0);
    }
}
