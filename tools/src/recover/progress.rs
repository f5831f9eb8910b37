//! How far the work is: a bar where a person looks, else a line now and then.

use crate::output::{Bar, warn};
use blockmirror_agent::control::api::Progress;
use blockmirror_agent::verdict;
use std::cell::Cell;
use std::collections::VecDeque;
use std::convert::Infallible;
use std::io::{IsTerminal, stderr};
use std::time::Duration;
use tokio::time::Instant;

/// How often a bar moves.
const BAR_INTERVAL: Duration = Duration::from_millis(200);
/// How often a line is printed.
const LINE_INTERVAL: Duration = Duration::from_secs(5);
/// Over how many intervals the rate is measured.
const RATE_INTERVALS: usize = 25;

/// Counts what is done. One hand counts, another shows.
pub struct Meter {
    done_bytes: Cell<u64>,
    /// How much of it was done before the work began, and doesn't count for the rate.
    before_bytes: Cell<u64>,
    total_bytes: u64,
}

impl Meter {
    /// A meter of so much work, some of which is done.
    pub fn new(done_bytes: u64, total_bytes: u64) -> Self {
        Self { done_bytes: Cell::new(done_bytes), before_bytes: Cell::new(done_bytes), total_bytes }
    }

    /// It turns out that so much was done before the work began.
    pub fn begin_at(&self, bytes: u64) {
        self.before_bytes.set(bytes);
        self.set(bytes);
    }

    /// More is done.
    pub fn add(&self, bytes: u64) {
        self.set(self.done_bytes() + bytes);
    }

    /// So much is done in all.
    pub fn set(&self, bytes: u64) {
        self.done_bytes.set(bytes);
    }

    /// How much is done.
    pub fn done_bytes(&self) -> u64 {
        self.done_bytes.get()
    }
}

/// Shows a meter until it is dropped.
pub async fn show(work: &str, meter: &Meter) -> Infallible {
    let bar = stderr().is_terminal().then(|| Bar::new(work));
    let mut interval = tokio::time::interval(if bar.is_some() { BAR_INTERVAL } else { LINE_INTERVAL });
    // The first tick is at once.
    interval.tick().await;
    let mut seen = VecDeque::from([(Instant::now(), meter.done_bytes())]);
    loop {
        interval.tick().await;
        let progress = measure(&mut seen, meter);
        match &bar {
            Some(bar) => bar.show(&progress),
            None => warn(&format!("{work}: {}", verdict::progress(&progress))),
        }
    }
}

fn measure(seen: &mut VecDeque<(Instant, u64)>, meter: &Meter) -> Progress {
    let (now, done) = (Instant::now(), meter.done_bytes());
    seen.push_back((now, done));
    if seen.len() > RATE_INTERVALS {
        seen.pop_front();
    }
    let (since, before) = seen[0];
    let rate = done.saturating_sub(before.max(meter.before_bytes.get())) as f64
        / (now - since).as_secs_f64().max(0.001);
    Progress::new(done, meter.total_bytes, rate as u64)
}
