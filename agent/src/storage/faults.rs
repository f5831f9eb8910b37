//! A storage that fails or stops where a test wants it to. For tests only.
//!
//! It counts the operations that pass through it on their way to another storage. From a given one on it can swallow
//! them, as a host that crashes there would; and it can fail a given read, write, zeroing or sync.

use super::file::File;
use super::{Done, Error, Operation, Storage, UnderWay};
use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use tokio::sync::Notify;

/// Which operations count for a failure.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Calls {
    /// Reads.
    Reads,
    /// Writes, durable or not.
    Writes,
    /// Zeroings.
    Zeroings,
    /// Syncs; a durable write is none.
    Syncs,
    /// Every operation.
    All,
}

impl Calls {
    fn include(self, operation: &Operation) -> bool {
        match self {
            Self::Reads => matches!(operation, Operation::Read { .. }),
            Self::Writes => matches!(operation, Operation::Write { .. }),
            Self::Zeroings => matches!(operation, Operation::Zero { .. }),
            Self::Syncs => matches!(operation, Operation::Sync),
            Self::All => true,
        }
    }
}

/// A failure to come.
#[derive(Debug)]
struct Failure {
    calls: Calls,
    /// How many of these calls still pass before the one that fails.
    passing: u64,
    errno: i32,
}

/// A storage that fails or stops on request.
pub struct Faults {
    inner: Rc<dyn Storage>,
    submitted: Cell<u64>,
    /// How many operations are still carried out.
    allowed: Cell<u64>,
    stopped: Notify,
    swallowed: RefCell<Vec<(Operation, Done)>>,
    failures: RefCell<Vec<Failure>>,
}

impl Faults {
    /// Passes everything on to `inner`, until told otherwise.
    #[must_use]
    pub fn new(inner: Rc<dyn Storage>) -> Rc<Self> {
        Rc::new(Self {
            inner,
            submitted: Cell::new(0),
            allowed: Cell::new(u64::MAX),
            stopped: Notify::new(),
            swallowed: RefCell::default(),
            failures: RefCell::default(),
        })
    }

    /// Lets `count` further operations pass and swallows what comes after them: it neither happens nor ends.
    pub fn stop_after(&self, count: u64) {
        self.allowed.set(count);
    }

    /// Returns once an operation was swallowed. Those that passed may still be under way.
    pub async fn stopped(&self) {
        loop {
            let next = self.stopped.notified();
            if self.has_stopped() {
                return;
            }
            next.await;
        }
    }

    /// Whether an operation was swallowed.
    #[must_use]
    pub fn has_stopped(&self) -> bool {
        !self.swallowed.borrow().is_empty()
    }

    /// Drops what was swallowed, with all that waits for it and that its callbacks own.
    pub fn forget_swallowed(&self) {
        // Taken out first: dropping a callback may come back here.
        drop(self.swallowed.take());
    }

    /// Fails the `nth` of these calls from now on, counted from 1, with this error of the kernel, without making it.
    ///
    /// # Panics
    /// When `nth` is zero.
    pub fn fail(&self, calls: Calls, nth: u64, errno: i32) {
        let passing = nth.checked_sub(1).expect("calls are counted from 1");
        self.failures.borrow_mut().push(Failure { calls, passing, errno });
    }

    /// How many operations were submitted so far, whatever became of them.
    #[must_use]
    pub fn submitted(&self) -> u64 {
        self.submitted.get()
    }

    /// The error that this operation is to end with, if its turn has come.
    fn failure_of(&self, operation: &Operation) -> Option<i32> {
        let mut failures = self.failures.borrow_mut();
        let mut due = None;
        for (index, failure) in failures.iter_mut().enumerate() {
            if failure.calls.include(operation) {
                match failure.passing.checked_sub(1) {
                    Some(passing) => failure.passing = passing,
                    None => due = due.or(Some(index)),
                }
            }
        }
        due.map(|index| failures.remove(index).errno)
    }
}

impl Storage for Faults {
    fn submit(&self, file: &Rc<File>, operation: Operation, done: Done) {
        self.submitted.set(self.submitted.get() + 1);
        let Some(allowed) = self.allowed.get().checked_sub(1) else {
            self.swallowed.borrow_mut().push((operation, done));
            self.stopped.notify_waiters();
            return;
        };
        self.allowed.set(allowed);
        let Some(errno) = self.failure_of(&operation) else {
            return self.inner.submit(file, operation, done);
        };
        let error = Error {
            operation: operation.name(),
            path: file.path().display().to_string(),
            offset: operation.range().offset,
            source: io::Error::from_raw_os_error(errno),
        };
        tokio::task::spawn_local(async move { done(Err(error)) });
    }

    fn oldest(&self) -> Option<UnderWay> {
        self.inner.oldest()
    }

    fn kind(&self) -> &'static str {
        self.inner.kind()
    }

    fn fallback_reason(&self) -> Option<&str> {
        self.inner.fallback_reason()
    }

    fn when_idle(&self, idle: Box<dyn FnOnce()>) {
        self.inner.when_idle(idle);
    }
}
