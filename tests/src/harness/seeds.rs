//! Many worlds at once, one to a thread at a time.

use super::world::World;
use std::any::Any;
use std::cell::Cell;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::available_parallelism;
use std::time::Duration;

/// The seeds whose worlds are run whenever everything is checked.
pub const CHECKED: Range<u64> = 1..6501;
/// How long mishaps and requests go on in those, in seconds.
pub const CHECKED_SECONDS: u64 = 4;

thread_local! {
    static PLACE: Cell<Option<String>> = const { Cell::new(None) };
}

/// A seed whose world broke a rule.
#[derive(Debug)]
pub struct Failed {
    /// Which.
    pub seed: u64,
    /// After how many steps.
    pub steps: u64,
    /// At which time of the world.
    pub at: Duration,
    /// What the check said.
    pub message: String,
    /// The file and the line that say so, where [`note_places`] was called.
    pub place: String,
}

/// How a run of seeds went.
#[derive(Debug, Default)]
pub struct Outcome {
    /// How many worlds were run.
    pub worlds: u64,
    /// How many steps they made.
    pub steps: u64,
    /// Those that failed, by their seed.
    pub failed: Vec<Failed>,
}

impl Outcome {
    /// Runs one world, and adds how that went.
    pub fn run(&mut self, seed: u64, world: &mut World) {
        let failed = run_one(seed, world);
        self.add(world, failed);
    }

    fn add(&mut self, world: &World, failed: Option<Failed>) {
        self.worlds += 1;
        self.steps += world.steps;
        self.failed.extend(failed);
    }
}

/// Runs the worlds of these seeds on all processors, each made by `make` on the thread that runs it. With `first` it
/// stops soon after one has failed.
///
/// # Panics
/// When a thread can't be started.
pub fn run(seeds: Range<u64>, first: bool, make: impl Fn(u64) -> World + Sync) -> Outcome {
    let (next, outcome) = (AtomicU64::new(seeds.start), Mutex::new(Outcome::default()));
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed >= seeds.end {
                return;
            }
            let mut world = make(seed);
            let failed = run_one(seed, &mut world);
            if first && failed.is_some() {
                next.store(seeds.end, Ordering::Relaxed);
            }
            outcome.lock().expect("no thread panics while it adds").add(&world, failed);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let mut outcome = outcome.into_inner().expect("no thread panics while it adds");
    outcome.failed.sort_unstable_by_key(|failed| failed.seed);
    outcome
}

fn run_one(seed: u64, world: &mut World) -> Option<Failed> {
    let payload = catch_unwind(AssertUnwindSafe(|| world.run())).err()?;
    let message = text_of(payload.as_ref());
    let place = PLACE.take().unwrap_or_default();
    Some(Failed { seed, steps: world.steps, at: world.now, message, place })
}

/// From now on a panic says nothing by itself; where it was is told with the seed.
pub fn note_places() {
    std::panic::set_hook(Box::new(|info| {
        PLACE.set(info.location().map(|place| format!("{}:{}", place.file(), place.line())));
    }));
}

fn text_of(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| payload.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_owned()
}
