//! Storage through a small pool of threads, where the kernel or the container forbids io_uring.
//!
//! A job goes to a thread, which makes all its calls, and comes back through a channel to a task on the volume's
//! thread. Each operation costs two hops between threads; otherwise the semantics are those of the ring.

use super::file::File;
use super::job::{Job, Step};
use super::{Done, Operation, Storage, UnderWay, kernel};
use crate::buffer::BufferPool;
use crate::busy_poll;
use crate::crashes::Worker;
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, VecDeque};
use std::future::poll_fn;
use std::io;
use std::rc::Rc;
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::task::{Context, Poll, Waker};
use std::thread::JoinHandle;
use std::time::Instant;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// How many operations are carried out at once.
const THREADS: usize = 4;
/// How much memory for unaligned operations is kept for reuse, in bytes.
const POOL_BYTES: usize = 4 << 20;

/// A storage through a pool of threads.
pub struct Threads {
    shared: Rc<Shared>,
    fallback_reason: Option<String>,
}

/// What the handle and the task share that takes the finished jobs.
struct Shared {
    work: Arc<Work>,
    threads: RefCell<Vec<JoinHandle<()>>>,
    done: RefCell<Slab<Done>>,
    /// No longer than what the callers have under way.
    finished: RefCell<UnboundedReceiver<(usize, Job)>>,
    idle: RefCell<Vec<Box<dyn FnOnce()>>>,
    waker: RefCell<Option<Waker>>,
    closing: Cell<bool>,
    pool: BufferPool,
}

/// What the threads wait for.
#[derive(Default)]
struct Work {
    queue: Mutex<Queue>,
    changed: Condvar,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<(usize, Job)>,
    /// The calls that threads are making, by the numbers of their jobs.
    calls: BTreeMap<usize, UnderWay>,
    closed: bool,
}

impl Work {
    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().expect("no holder of the queue's lock panics")
    }

    /// The next job, as soon as there is one; none when the pool is closed.
    fn next(&self) -> Option<(usize, Job)> {
        let no_news = |queue: &mut Queue| queue.jobs.is_empty() && !queue.closed;
        let mut queue = self.changed.wait_while(self.lock(), no_news).expect("as for `lock`");
        if queue.closed { None } else { queue.jobs.pop_front() }
    }

    /// Makes a call, which the others can see meanwhile.
    fn call(&self, index: usize, job: &Job, step: Step) -> io::Result<usize> {
        self.lock().calls.insert(index, UnderWay { since: Instant::now(), ..job.under_way() });
        let result = kernel::call(job.fd(), step);
        self.lock().calls.remove(&index);
        result
    }
}

impl Threads {
    /// A pool for the calling thread, with the task that takes finished jobs. `fallback_reason` says why io_uring
    /// isn't used, where that wasn't asked for.
    ///
    /// # Errors
    /// When a thread can't be started.
    ///
    /// # Panics
    /// Outside of a `LocalSet`.
    pub fn new(fallback_reason: Option<String>) -> io::Result<Rc<Self>> {
        let (sender, finished) = unbounded_channel();
        let shared = Rc::new(Shared {
            work: Arc::default(),
            threads: RefCell::default(),
            done: RefCell::default(),
            finished: RefCell::new(finished),
            idle: RefCell::default(),
            waker: RefCell::default(),
            closing: Cell::new(false),
            pool: BufferPool::new(POOL_BYTES),
        });
        for _ in 0..THREADS {
            let (work, sender) = (Arc::clone(&shared.work), sender.clone());
            let builder = std::thread::Builder::new().name("storage".to_owned());
            let worker = Worker::current();
            let thread = builder.spawn(move || worker.works(|| serve(&work, &sender)))?;
            shared.threads.borrow_mut().push(thread);
        }
        let driven = Rc::clone(&shared);
        tokio::task::spawn_local(async move { poll_fn(|context| driven.turn(context)).await });
        Ok(Rc::new(Self { shared, fallback_reason }))
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.shared.closing.set(true);
        self.shared.wake();
    }
}

impl Storage for Threads {
    fn submit(&self, file: &Rc<File>, operation: Operation, done: Done) {
        let job = Job::new(file, operation, &self.shared.pool);
        let index = self.shared.done.borrow_mut().insert(done);
        self.shared.work.lock().jobs.push_back((index, job));
        self.shared.work.changed.notify_one();
    }

    fn kind(&self) -> &'static str {
        "threads"
    }

    fn fallback_reason(&self) -> Option<&str> {
        self.fallback_reason.as_deref()
    }

    fn oldest(&self) -> Option<UnderWay> {
        // What waits for a thread waits for these.
        self.shared.work.lock().calls.values().min_by_key(|call| call.since).cloned()
    }

    fn when_idle(&self, idle: Box<dyn FnOnce()>) {
        self.shared.idle.borrow_mut().push(idle);
        self.shared.wake();
    }
}

impl Shared {
    fn wake(&self) {
        if let Some(waker) = &*self.waker.borrow() {
            waker.wake_by_ref();
        }
    }

    /// Hands on what the threads have finished.
    fn turn(&self, context: &mut Context<'_>) -> Poll<()> {
        self.waker.replace(Some(context.waker().clone()));
        while let Poll::Ready(finished) = self.poll_finished(context) {
            busy_poll::note_event();
            let (index, job) = finished.expect("threads end after this task");
            let done = self.done.borrow_mut().remove(index);
            done(job.finish());
        }
        if !self.done.borrow().is_empty() {
            return Poll::Pending;
        }
        for idle in self.idle.take() {
            idle();
        }
        let may_end = self.closing.get() && self.done.borrow().is_empty();
        if may_end { Poll::Ready(()) } else { Poll::Pending }
    }

    fn poll_finished(&self, context: &mut Context<'_>) -> Poll<Option<(usize, Job)>> {
        self.finished.borrow_mut().poll_recv(context)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.work.lock().closed = true;
        self.work.changed.notify_all();
        for thread in self.threads.take() {
            thread.join().expect("a storage thread does not panic");
        }
    }
}

/// What a thread does.
fn serve(work: &Work, finished: &UnboundedSender<(usize, Job)>) {
    while let Some((index, mut job)) = work.next() {
        while let Some(step) = job.step() {
            job.ended(work.call(index, &job, step));
        }
        if finished.send((index, job)).is_err() {
            return;
        }
    }
}
