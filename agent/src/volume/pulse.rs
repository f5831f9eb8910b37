//! Whether a volume is alive, as other threads see it (X5).
//!
//! A disk, a file server or a state folder that hangs shows in one of two ways. The volume's thread goes on, and a call
//! to the kernel does not come back: the thread tells that with each beat. Or the thread itself waits in the kernel:
//! then no beat comes. Neither is found out by asking the volume, which may never answer.

use crate::storage::{Storage, UnderWay};
use std::cell::RefCell;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

/// How often a volume's thread shows that it is alive.
const BEAT: Duration = Duration::from_millis(250);
/// What takes longer is told. A busy machine is late by less.
const NEWS: Duration = Duration::from_secs(1);
/// What takes longer counts as hung: nothing is waited for any more that depends on it. A connected replica that is
/// silent for as long counts as lost.
pub(crate) const HUNG: Duration = blockmirror_protocol::inquiry::HUNG;

/// What does not answer, and for how long.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Silence {
    /// For how long.
    pub lasted: Duration,
    /// The file or device that the kernel was asked for; nothing where the volume's thread shows no sign of life.
    pub path: Option<PathBuf>,
}

impl Silence {
    /// Whether it is long enough to go on without.
    #[must_use]
    pub fn is_hung(&self) -> bool {
        self.lasted >= HUNG
    }

    /// What it is, in words.
    #[must_use]
    pub fn what(&self) -> String {
        match &self.path {
            Some(path) => path.display().to_string(),
            None => "the volume's thread".to_owned(),
        }
    }
}

/// A volume's signs of life.
#[derive(Debug)]
pub struct Pulse {
    last: Mutex<Beat>,
}

#[derive(Debug)]
struct Beat {
    at: Instant,
    oldest: Option<UnderWay>,
}

impl Pulse {
    /// Of a volume that is just beginning.
    #[must_use]
    pub fn new() -> Arc<Self> {
        Arc::new(Self { last: Mutex::new(Beat { at: Instant::now(), oldest: None }) })
    }

    /// What of the volume is silent for so long that it is worth telling.
    #[must_use]
    pub fn silence(&self) -> Option<Silence> {
        self.silence_at(Instant::now())
    }

    fn silence_at(&self, now: Instant) -> Option<Silence> {
        let beat = self.lock();
        let call = beat.oldest.clone();
        let silent = Silence { lasted: now.saturating_duration_since(beat.at), path: None };
        let waits = call
            .map(|call| Silence { lasted: now.saturating_duration_since(call.since), path: Some(call.path) });
        // The call that a silent thread waits for is more to the point than its silence.
        waits.into_iter().chain([silent]).find(|silence| silence.lasted >= NEWS)
    }

    /// What counts as hung.
    #[must_use]
    pub fn hung(&self) -> Option<Silence> {
        self.silence().filter(Silence::is_hung)
    }

    fn beat(&self, oldest: Option<UnderWay>) {
        *self.lock() = Beat { at: Instant::now(), oldest };
    }

    fn lock(&self) -> MutexGuard<'_, Beat> {
        self.last.lock().expect("no holder of the lock panics")
    }
}

/// The storages of a volume: that of the present role, and those of earlier ones with calls that have not come back.
#[derive(Clone, Default)]
pub(super) struct Storages(Rc<RefCell<Vec<Rc<dyn Storage>>>>);

impl Storages {
    pub(super) fn add(&self, storage: Rc<dyn Storage>) {
        let mut storages = self.0.borrow_mut();
        storages.retain(|old| old.oldest().is_some());
        storages.push(storage);
    }

    /// The call that is under way the longest.
    pub(super) fn oldest(&self) -> Option<UnderWay> {
        self.0.borrow().iter().filter_map(|storage| storage.oldest()).min_by_key(|call| call.since)
    }
}

/// Beats for a volume, on its thread, as long as that lives.
pub(super) async fn keep(pulse: Arc<Pulse>, storages: Storages) {
    let mut ticks = tokio::time::interval(BEAT);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        pulse.beat(storages.oldest());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_that_does_not_come_back_is_told_and_so_is_a_thread_without_a_beat() {
        let pulse = Pulse::new();
        let path = PathBuf::from("/srv/data.img");
        let now = Instant::now();
        assert_eq!(pulse.silence_at(now), None);
        pulse.beat(Some(UnderWay { since: now, path: path.clone() }));
        assert_eq!(pulse.silence_at(now + NEWS / 2), None, "this may be a disk at work");
        let later = now + NEWS;
        let waits = Silence { lasted: NEWS, path: Some(path) };
        assert_eq!(pulse.silence_at(later), Some(waits.clone()));
        assert!(!waits.is_hung());
        assert!(pulse.silence_at(now + HUNG).is_some_and(|silence| silence.is_hung()));
        pulse.beat(None);
        let later = Instant::now() + HUNG;
        let silence = pulse.silence_at(later).expect("no beat came");
        assert_eq!((silence.path.clone(), silence.is_hung()), (None, true));
        assert_eq!(silence.what(), "the volume's thread");
    }
}
