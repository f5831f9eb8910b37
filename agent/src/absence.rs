//! Notices that this process was away: stopped, or its machine asleep, while its peers went on without it.
//!
//! A thread notes the time again and again. Whoever is about to answer something compares: where the last note is too old,
//! nothing ran in between, and another host may have been promoted since. It takes at least three seconds until one is.

use crate::clock;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// How often the time is noted.
const TICK: Duration = Duration::from_millis(250);
/// A note that is older than this tells of an absence, in milliseconds.
const ABSENCE_MILLISECONDS: u64 = 1500;

static NOTED: AtomicU64 = AtomicU64::new(0);
static ABSENCES: AtomicU64 = AtomicU64::new(0);
static STARTED: Once = Once::new();

/// What is compared with; made before anything is answered.
#[derive(Debug)]
pub struct Watch {
    seen: std::cell::Cell<u64>,
}

impl Watch {
    /// Counts absences from now on.
    #[must_use]
    pub fn new() -> Self {
        STARTED.call_once(|| {
            NOTED.store(now(), Ordering::Relaxed);
            let thread = std::thread::Builder::new().name("absence".to_owned());
            if let Err(error) = thread.spawn(note_the_time) {
                tracing::error!("no thread notes the time, so a frozen agent is not noticed: {error}");
                NOTED.store(u64::MAX, Ordering::Relaxed);
            }
        });
        Self { seen: std::cell::Cell::new(ABSENCES.load(Ordering::Acquire)) }
    }

    /// Whether the process was away since this was last asked.
    pub fn was_away(&self) -> bool {
        let is_news = self.is_news();
        self.seen.set(ABSENCES.load(Ordering::Acquire));
        is_news
    }

    /// The same, for one who looks and leaves it to be noticed.
    pub fn is_news(&self) -> bool {
        look();
        self.seen.get() != ABSENCES.load(Ordering::Acquire)
    }
}

impl Default for Watch {
    fn default() -> Self {
        Self::new()
    }
}

fn note_the_time() {
    loop {
        std::thread::sleep(TICK);
        look();
        NOTED.fetch_max(now(), Ordering::AcqRel);
    }
}

/// Counts an absence, if there was one since the last note. Of several threads that find it, one does.
fn look() {
    let (noted, now) = (NOTED.load(Ordering::Acquire), now());
    if now.saturating_sub(noted) > ABSENCE_MILLISECONDS
        && NOTED.compare_exchange(noted, now, Ordering::AcqRel, Ordering::Relaxed).is_ok()
    {
        ABSENCES.fetch_add(1, Ordering::AcqRel);
    }
}

/// The time since the machine started, sleep included, in milliseconds.
fn now() -> u64 {
    u64::try_from(clock::since_boot().as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_watch_hears_of_an_absence_once() {
        let (one, other) = (Watch::new(), Watch::new());
        ABSENCES.fetch_add(1, Ordering::AcqRel);
        assert!(one.was_away() && other.was_away());
        let before = ABSENCES.load(Ordering::Acquire);
        let again = one.was_away();
        assert_eq!(again, ABSENCES.load(Ordering::Acquire) != before, "only a new absence is news");
    }
}
