//! Staying awake between events that follow each other closely.
//!
//! A thread that sleeps until its next request, completion or packet pays for being woken: 30 us and more where that takes
//! another core out of its sleep, which is as long as a fast disk needs. So a thread that has just had an event looks for
//! the next one for a moment before it sleeps ([`stay_awake`], a task beside its others, which yields to them).
//!
//! How long it looks is learned from the events themselves (`Patience`): up to the longest that is allowed where they
//! come closely, and not at all where they don't, so that an idle volume costs nothing. And it looks only on time that
//! nobody wants: while fewer threads of this process have events than there are cores, which leaves one for the
//! application; and when it looked in vain it offers its core to others, and sleeps if somebody took it.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::marker::PhantomData;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Poll, Waker};
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

/// The longest that a thread looks for the next event, unless the operator chose otherwise.
pub const DEFAULT_LONGEST: Duration = Duration::from_micros(200);
/// Where learning begins.
const SHORTEST: Duration = Duration::from_micros(4);
/// A thread that gives its core away and has it again sooner than this was alone on it.
const ALONE: Duration = Duration::from_micros(25);
/// A thread without an event for so long, and for longer than any looks for one, doesn't count as busy.
const BUSY: Duration = Duration::from_millis(1);
/// How many threads take part; others sleep at once.
const PLACES: usize = 64;

static LONGEST_NANOS: AtomicU64 = AtomicU64::new(0);
/// When each thread had its last event, as a [`stamp`]; 0 where there is no thread.
static LAST_EVENTS: [AtomicU64; PLACES] = [const { AtomicU64::new(0) }; PLACES];
/// How many places were ever taken: those behind need not be looked at.
static PLACES_USED: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static THREAD: Thread = const { Thread::new() };
}

/// Lets all threads that [`stay_awake`] look for the next event for so long at the most. Not at all where it is zero, as
/// before the first call, or where there is one core only.
pub fn allow(longest: Duration) {
    let longest = if cores() > 1 { longest } else { Duration::ZERO };
    LONGEST_NANOS.store(nanos(longest), Ordering::Relaxed);
}

/// Something came for this thread: the next thing may follow soon.
pub fn note_event() {
    let longest = longest();
    if !longest.is_zero() {
        THREAD.with(|thread| thread.note_event(longest));
    }
}

/// Keeps this thread from sleeping at once after an event, for as long as the future is polled. One such task is enough
/// for a thread; another one ends at once.
pub async fn stay_awake() {
    let Some(_place) = Place::take() else { return };
    loop {
        poll_fn(|context| THREAD.with(|thread| thread.poll_event(context.waker()))).await;
        let mut in_vain = 0;
        while THREAD.with(Thread::looks_on) {
            // The runtime looks for events, and its other tasks have their turn.
            tokio::task::yield_now().await;
            in_vain = if THREAD.with(|thread| thread.is_new.take()) { 0 } else { in_vain + 1 };
            // What the runtime has just found may wait behind this task, so one look in vain means nothing.
            if in_vain > 1 && !is_alone() {
                break;
            }
        }
    }
}

/// Offers the core to others. Whether nobody took it for long.
fn is_alone() -> bool {
    let before = Instant::now();
    std::thread::yield_now();
    before.elapsed() < ALONE
}

struct Thread {
    place: Cell<Option<usize>>,
    last: Cell<Option<Instant>>,
    patience: Cell<Patience>,
    /// There was an event since the task looked last.
    is_new: Cell<bool>,
    waker: RefCell<Option<Waker>>,
}

impl Thread {
    const fn new() -> Self {
        Self {
            place: Cell::new(None),
            last: Cell::new(None),
            patience: Cell::new(Patience(Duration::ZERO)),
            is_new: Cell::new(false),
            waker: RefCell::new(None),
        }
    }

    fn note_event(&self, longest: Duration) {
        let Some(place) = self.place.get() else { return };
        let now = Instant::now();
        if let Some(last) = self.last.replace(Some(now)) {
            self.patience.set(self.patience.get().after(now - last, longest));
        }
        LAST_EVENTS[place].store(stamp(now), Ordering::Relaxed);
        self.is_new.set(true);
        if !self.patience.get().0.is_zero() {
            let waker = self.waker.take();
            waker.into_iter().for_each(Waker::wake);
        }
    }

    /// Ready when it pays to look for an event that follows the last one.
    fn poll_event(&self, waker: &Waker) -> Poll<()> {
        if self.is_new.take() && self.looks_on() {
            return Poll::Ready(());
        }
        self.waker.replace(Some(waker.clone()));
        Poll::Pending
    }

    fn looks_on(&self) -> bool {
        let Some(last) = self.last.get() else { return false };
        let now = Instant::now();
        self.patience.get().lasts(now - last) && has_time(busy_threads(now), cores())
    }
}

/// Whether a core is left to others even if each busy thread of this process keeps one.
fn has_time(busy: usize, cores: usize) -> bool {
    busy < cores
}

fn busy_threads(now: Instant) -> usize {
    let since = stamp(now).saturating_sub(nanos(BUSY.max(longest())));
    let places = &LAST_EVENTS[..PLACES_USED.load(Ordering::Relaxed)];
    busy(places.iter().map(|last| last.load(Ordering::Relaxed)), since)
}

/// How many threads had their last event after this.
fn busy(last_events: impl Iterator<Item = u64>, since: u64) -> usize {
    last_events.filter(|last| *last > since).count()
}

/// How long to look for an event after the last one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Patience(Duration);

impl Patience {
    /// Whether there is still some, so long after the last event.
    fn lasts(self, waited: Duration) -> bool {
        waited < self.0
    }

    /// What another event teaches, which came so long after the one before: more patience would have met it, or no
    /// patience that is allowed.
    fn after(self, gap: Duration, longest: Duration) -> Self {
        if gap > longest {
            let half = self.0 / 2;
            Self(if half < SHORTEST { Duration::ZERO } else { half })
        } else if gap > self.0 {
            Self((self.0 * 2).max(SHORTEST).min(longest))
        } else {
            self
        }
    }
}

/// The calling thread's place among those that count, which it keeps to itself. Free again when it is dropped.
struct Place(usize, PhantomData<*const ()>);

impl Place {
    fn take() -> Option<Self> {
        if THREAD.with(|thread| thread.place.get()).is_some() {
            return None;
        }
        let now = stamp(Instant::now());
        let is_free =
            |place: &AtomicU64| place.compare_exchange(0, now, Ordering::Relaxed, Ordering::Relaxed).is_ok();
        let index = LAST_EVENTS.iter().position(is_free)?;
        PLACES_USED.fetch_max(index + 1, Ordering::Relaxed);
        THREAD.with(|thread| thread.place.set(Some(index)));
        Some(Self(index, PhantomData))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        LAST_EVENTS[self.0].store(0, Ordering::Relaxed);
        // At the thread's own end there is nothing left to reset.
        let _ = THREAD.try_with(|thread| {
            thread.place.set(None);
            thread.is_new.set(false);
            drop(thread.waker.take());
        });
    }
}

/// A moment in nanoseconds since the first that was asked for; never 0.
fn stamp(now: Instant) -> u64 {
    static BEGINNING: OnceLock<Instant> = OnceLock::new();
    nanos(now.saturating_duration_since(*BEGINNING.get_or_init(|| now))).max(1)
}

fn cores() -> usize {
    static CORES: OnceLock<usize> = OnceLock::new();
    *CORES.get_or_init(|| available_parallelism().map_or(1, usize::from))
}

fn longest() -> Duration {
    Duration::from_nanos(LONGEST_NANOS.load(Ordering::Relaxed))
}

/// 584 years fit.
fn nanos(duration: Duration) -> u64 {
    u64::try_from(duration.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_micros(200);

    fn after(patience: u64, gaps: &[u64]) -> u128 {
        let begun = Patience(Duration::from_micros(patience));
        let learned =
            gaps.iter().fold(begun, |patience, gap| patience.after(Duration::from_micros(*gap), LONGEST));
        learned.0.as_micros()
    }

    #[test]
    fn patience_grows_with_events_that_it_would_have_met() {
        assert_eq!(after(0, &[50]), 4);
        assert_eq!(after(0, &[50; 4]), 32);
        assert_eq!(after(0, &[50; 100]), 64, "what meets them is enough");
        assert_eq!(after(0, &[200; 100]), 200, "never more than is allowed");
        assert_eq!(after(64, &[1, 2, 63]), 64);
    }

    #[test]
    fn patience_goes_where_events_are_far_apart() {
        assert_eq!(after(64, &[201]), 32);
        assert_eq!(after(64, &[1_000_000; 10]), 0);
        assert_eq!(after(4, &[201]), 0);
        // A request now and then, each followed by its completion: the completion is met.
        let now_and_then = [2000, 60].repeat(50);
        assert_eq!(after(64, &now_and_then), 64);
    }

    #[test]
    fn a_thread_looks_as_long_as_its_patience_lasts_and_a_core_is_left() {
        let patience = Patience(Duration::from_micros(64));
        assert!(patience.lasts(Duration::from_micros(63)) && !patience.lasts(Duration::from_micros(64)));
        assert!(!Patience(Duration::ZERO).lasts(Duration::ZERO), "there is none");
        assert!(has_time(1, 2) && !has_time(2, 2) && !has_time(1, 1));
    }

    #[test]
    fn only_threads_with_recent_events_are_busy() {
        assert_eq!(busy([0, 5, 11, 12].into_iter(), 10), 2);
        assert_eq!(busy([0, 0].into_iter(), 0), 0, "where there is no thread there is no event");
    }

    #[test]
    fn a_thread_has_one_place_and_gives_it_back() {
        let place = Place::take().expect("64 threads are more than a test has");
        let index = place.0;
        assert!(Place::take().is_none(), "it has one");
        assert_ne!(LAST_EVENTS[index].load(Ordering::Relaxed), 0);
        drop(place);
        assert!(Place::take().is_some());
    }

    #[test]
    fn a_thread_sleeps_again_when_nothing_follows() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            LONGEST_NANOS.store(nanos(LONGEST), Ordering::Relaxed);
            let awake = tokio::task::spawn_local(stay_awake());
            tokio::task::yield_now().await;
            for _ in 0..100 {
                note_event();
            }
            let sleeps = || THREAD.with(|thread| !thread.is_new.get() && thread.waker.borrow().is_some());
            assert!(!sleeps(), "there were events");
            for _ in 0..10_000_000 {
                if sleeps() {
                    break;
                }
                tokio::task::yield_now().await;
            }
            assert!(sleeps() && !awake.is_finished());
            allow(Duration::ZERO);
            awake.abort();
            assert!(awake.await.unwrap_err().is_cancelled());
            assert_eq!(THREAD.with(|thread| thread.place.get()), None);
        });
    }
}
