//! Each host has a clock of its own. It runs a little faster or slower than the time, as promises between hosts allow for; and
//! it stands still while the host is suspended, but for what a replica counts on: that follows a clock which counts the sleep,
//! as the agent's does (W4).

use super::random::Random;
use super::world::World;
use blockmirror_protocol::planted::{Bug, planted};
use blockmirror_protocol::units::Time;
use std::time::Duration;

/// By how many thousandths clocks are fast or slow. Two of them differ by less than a replica counts on its primary's word for
/// less.
const DRIFTS: [i128; 3] = [-20, 0, 20];

/// What a host's clocks show.
#[derive(Clone, Debug, Default)]
pub struct Clock {
    /// Whether it stands still in sleep at all.
    stops: bool,
    /// By how many thousandths it is fast.
    drift: i128,
    /// For how long it has stood still, or will have when the sleep is over that goes on.
    stood_still: Duration,
    /// Where it stands, in a sleep; where it last stood, after one.
    stands_at: Duration,
}

impl Clock {
    /// One that stands still in sleep.
    pub fn uneven(random: &mut Random) -> Self {
        Self { stops: true, drift: random.pick(&DRIFTS), ..Self::default() }
    }

    /// What it shows, sleep included.
    fn counting_sleep(&self, now: Duration) -> Duration {
        of_nanoseconds(nanoseconds(now) * (1000 + self.drift) / 1000)
    }

    /// What it shows, sleep left out.
    fn standing_still(&self, now: Duration) -> Duration {
        self.counting_sleep(now).saturating_sub(self.stood_still).max(self.stands_at)
    }

    /// When it will show this, sleep left out.
    fn when(&self, shown: Duration) -> Duration {
        let counted = nanoseconds(shown + self.stood_still) * 1000;
        let rounded_up = counted + (999 + self.drift);
        of_nanoseconds(rounded_up / (1000 + self.drift))
    }

    /// The host sleeps from one time to another.
    pub fn sleep(&mut self, now: Duration, until: Duration) {
        if self.stops {
            self.stands_at = self.standing_still(now);
            self.stood_still += self.counting_sleep(until) - self.counting_sleep(now);
        }
    }

    /// A sleep ends before its time.
    pub fn wake(&mut self, now: Duration, until: Duration) {
        if self.stops && until > now {
            self.stood_still -= self.counting_sleep(until) - self.counting_sleep(now);
        }
    }
}

impl World {
    /// What the machine of a host takes for the time. That of a primary may stand still: it only waits for longer.
    #[must_use]
    pub fn clock(&self, host: usize) -> Time {
        let it = &self.hosts[host];
        match it.tracker().is_none() && !planted(Bug::SleepingWord) {
            true => Time(it.clock.counting_sleep(self.now)),
            false => self.clock_of_primary(host),
        }
    }

    /// The same for one that is about to start as a primary.
    pub(super) fn clock_of_primary(&self, host: usize) -> Time {
        Time(self.hosts[host].clock.standing_still(self.now))
    }

    /// When the clock of a primary will show this.
    pub(super) fn when(&self, host: usize, shown: Time) -> Duration {
        self.hosts[host].clock.when(shown.0)
    }
}

fn nanoseconds(time: Duration) -> i128 {
    time.as_nanos() as i128
}

fn of_nanoseconds(time: i128) -> Duration {
    Duration::from_nanos(u64::try_from(time).expect("a world's time is short"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_clock_shows_what_it_will_show() {
        let at = Duration::from_millis;
        for drift in DRIFTS {
            let mut clock = Clock { stops: true, drift, ..Clock::default() };
            clock.sleep(at(1000), at(3000));
            assert_eq!(clock.standing_still(at(2000)), clock.standing_still(at(1000)));
            assert!(clock.counting_sleep(at(2000)) > clock.counting_sleep(at(1000)));
            clock.sleep(at(4000), at(9000));
            clock.wake(at(5000), at(9000));
            for shown in [2_500_000_001, 3_000_000_000, 77_777_777_777].map(Duration::from_nanos) {
                let when = clock.when(shown);
                assert!(clock.standing_still(when) >= shown, "{drift}: {shown:?}");
                assert!(clock.standing_still(when - Duration::from_nanos(2)) < shown, "{drift}: {shown:?}");
            }
        }
    }
}
