//! The one clock that counts the time for which the machine sleeps.
//!
//! [`std::time::Instant`] stands still while the machine is suspended, and other hosts go on. So whatever another host limits,
//! and is not to be counted on any longer here, is measured with this clock: a primary's word, for one (W4). What this host
//! limits for another's sake may stand still with it: then it waits longer.

use std::time::Duration;

/// A moment since the machine was started.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Moment(Duration);

impl Moment {
    /// This moment.
    #[must_use]
    pub fn now() -> Self {
        Self(since_boot())
    }

    /// How long ago that was, the machine's sleep included.
    #[must_use]
    pub fn elapsed(self) -> Duration {
        since_boot().saturating_sub(self.0)
    }
}

/// The time since the machine was started, its sleep included. Nobody sets this clock.
#[must_use]
pub fn since_boot() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::Boottime);
    let nanoseconds = u32::try_from(time.tv_nsec).expect("less than a second");
    let counted = Duration::new(time.tv_sec.unsigned_abs(), nanoseconds);
    #[cfg(test)]
    let counted = counted + tests::SLEPT.get();
    counted
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use std::cell::Cell;
    use std::process::Command;

    thread_local! {
        /// How long the machine has slept, for the tests of one thread.
        pub(super) static SLEPT: Cell<Duration> = const { Cell::new(Duration::ZERO) };
    }

    /// What a machine's sleep looks like to this thread: this clock goes on, and [`std::time::Instant`] does not.
    pub(crate) fn sleep_like_a_machine(time: Duration) {
        SLEPT.set(SLEPT.get() + time);
    }

    /// How much more a time namespace says that the machine slept.
    const OFFSET_SECONDS: u64 = 864_000;
    const INSIDE: &str = "BLOCKMIRROR_TEST_IN_TIME_NAMESPACE";

    #[test]
    fn the_clock_is_the_kernels_that_counts_sleep() {
        // The test runs itself in a namespace where nothing but this one of the kernel's clocks is set forward.
        let ahead = || {
            let monotonic = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
            since_boot().as_secs().saturating_sub(monotonic.tv_sec.unsigned_abs())
        };
        if let Ok(outside) = std::env::var(INSIDE) {
            let outside: u64 = outside.parse().expect("a number");
            let gained = ahead() - outside;
            assert!((OFFSET_SECONDS - 1..=OFFSET_SECONDS + 1).contains(&gained), "{gained} s");
            return;
        }
        let offset = OFFSET_SECONDS.to_string();
        let namespace = ["--time", "--boottime", &offset, "--fork"];
        let attempt = Command::new("unshare").args(namespace).arg("true").output();
        match attempt {
            Ok(output) if output.status.success() => {}
            Ok(output) => {
                return eprintln!("skipped: no time namespace: {}", String::from_utf8_lossy(&output.stderr));
            }
            Err(error) => return eprintln!("skipped: unshare: {error}"),
        }
        let output = Command::new("unshare")
            .args(namespace)
            .arg(std::env::current_exe().expect("this test"))
            .args(["--exact", "clock::tests::the_clock_is_the_kernels_that_counts_sleep"])
            .env(INSIDE, ahead().to_string())
            .output()
            .expect("it can be run");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }
}
