//! Storage through io_uring, on the volume's own thread.
//!
//! Submitting only queues. A driver task, woken once, runs after the tasks that were ready with it: all that those
//! submitted goes to the kernel in one call, which also fetches what has ended meanwhile. Between calls the ring's
//! descriptor is watched by the runtime like any socket, so a completion reaches the thread that waits for it without
//! passing through another one.
//!
//! The kernel reads and writes the memory of jobs that it has begun. Each job stays in its slot until its completion
//! was seen; a ring that is dropped before that waits for them.
//!
//! The kernel does its part of a completion when this thread enters it for whatever reason, without interrupting it
//! in between (`COOP_TASKRUN`, Linux 5.19): a wait for events ends with the completions in place. `DEFER_TASKRUN`
//! (6.1) isn't used, since it does that part only within a further call, and the ring's descriptor doesn't become
//! readable for what it has put off: a lone read or write took twice as many entries into the kernel with it.
//!
//! A file system in memory has no asynchronous I/O: the ring would hand each call to a thread of its own, and back,
//! for a copy that takes less time than that. Such a call is made on the spot. Where its pages were swapped out, it
//! waits for them: swap must not lie on a volume whose own backing is in memory.
//!
//! The kernel first tries each call on this thread, in a way that does not wait. A file system with a server waits all
//! the same (FUSE asks for a file's size before each read, seen with Linux 6.18), and a server that hangs would stop the
//! thread. Such a call is for a thread of the kernel's from the beginning.

use super::file::File;
use super::job::{Job, Step};
use super::{Done, Operation, Outcome, Storage, UnderWay, kernel};
use crate::buffer::BufferPool;
use crate::busy_poll;
use io_uring::types::{Fd, FsyncFlags};
use io_uring::{Builder, IoUring, Probe, cqueue, opcode, squeue};
use slab::Slab;
use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// How many calls one entry into the kernel takes at most.
const SUBMISSIONS: u32 = 256;
/// How many calls are with the kernel at most; what is submitted beyond that waits its turn.
const COMPLETIONS: u32 = 1024;
/// How much is copied or cleared on the spot in one turn, in bytes; then other tasks of the volume have theirs.
const BYTES_ON_THE_SPOT: u64 = 1 << 20;
/// How much memory for unaligned operations is kept for reuse, in bytes.
const POOL_BYTES: usize = 4 << 20;

/// Why io_uring can't be used.
#[derive(Debug, thiserror::Error)]
pub enum RingError {
    /// The kernel makes no ring.
    #[error(
        "io_uring is not available ({0}); allow it in the container or by sysctl kernel.io_uring_disabled"
    )]
    Unavailable(#[source] io::Error),
    /// The kernel lacks an operation.
    #[error("this kernel's io_uring cannot {0}; Linux 5.6 is the first that can")]
    TooOld(&'static str),
    /// The runtime can't watch the ring.
    #[error("the ring cannot be watched")]
    Unwatchable(#[source] io::Error),
}

/// A storage through io_uring.
pub struct Ring {
    shared: Rc<Shared>,
}

/// What the handle and the driver task share.
struct Shared {
    /// A second descriptor of the ring.
    watch: AsyncFd<OwnedFd>,
    queues: RefCell<Queues>,
    idle: RefCell<Vec<Box<dyn FnOnce()>>>,
    driver: Driver,
    pool: BufferPool,
}

/// How the driver task is reached.
#[derive(Default)]
struct Driver {
    waker: RefCell<Option<Waker>>,
    /// Whether it has been woken since its last turn.
    woken: Cell<bool>,
    /// Whether the handle is gone, so that the driver ends with the last operation.
    closing: Cell<bool>,
}

impl Driver {
    fn wake(&self) {
        if !self.woken.replace(true)
            && let Some(waker) = &*self.waker.borrow()
        {
            waker.wake_by_ref();
        }
    }

    fn begins_turn(&self, waker: &Waker) {
        self.woken.set(false);
        let mut slot = self.waker.borrow_mut();
        if !slot.as_ref().is_some_and(|known| known.will_wake(waker)) {
            *slot = Some(waker.clone());
        }
    }
}

impl Ring {
    /// A ring for the calling thread, with its driver task.
    ///
    /// # Errors
    /// [`RingError`] when io_uring can't be used here.
    ///
    /// # Panics
    /// Outside of a `LocalSet` of a tokio runtime with I/O enabled.
    pub fn new() -> Result<Rc<Self>, RingError> {
        let mut refusal = None;
        for choice in [Flags::Cooperative, Flags::Plain] {
            match choice.builder().build(SUBMISSIONS) {
                Ok(ring) => return Self::with(ring),
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) => refusal = Some(error),
                Err(error) => return Err(RingError::Unavailable(error)),
            }
        }
        Err(RingError::Unavailable(refusal.expect("a choice was made or refused")))
    }

    fn with(ring: IoUring) -> Result<Rc<Self>, RingError> {
        check_operations(&ring)?;
        let watch = watch(&ring).map_err(RingError::Unwatchable)?;
        let shared = Rc::new(Shared {
            watch,
            queues: RefCell::new(Queues::new(ring)),
            idle: RefCell::default(),
            driver: Driver::default(),
            pool: BufferPool::new(POOL_BYTES),
        });
        let driven = Rc::clone(&shared);
        tokio::task::spawn_local(async move { poll_fn(|context| driven.turn(context)).await });
        Ok(Rc::new(Self { shared }))
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.shared.driver.closing.set(true);
        self.shared.driver.wake();
    }
}

impl Storage for Ring {
    fn submit(&self, file: &Rc<File>, operation: Operation, done: Done) {
        let job = Job::new(file, operation, &self.shared.pool);
        self.shared.queues.borrow_mut().push(job, done);
        self.shared.driver.wake();
    }

    fn kind(&self) -> &'static str {
        "io_uring"
    }

    fn oldest(&self) -> Option<UnderWay> {
        let queues = self.shared.queues.borrow();
        let jobs = queues.jobs.iter().map(|(_, (job, _))| job);
        jobs.min_by_key(|job| job.moved()).map(Job::under_way)
    }

    fn when_idle(&self, idle: Box<dyn FnOnce()>) {
        self.shared.idle.borrow_mut().push(idle);
        self.shared.driver.wake();
    }
}

impl Shared {
    /// One turn of the driver: to the kernel, back from it, and on to those who wait.
    fn turn(&self, context: &mut Context<'_>) -> Poll<()> {
        self.driver.begins_turn(context.waker());
        while let Poll::Ready(readable) = self.watch.poll_read_ready(context) {
            readable.expect("the runtime outlives its tasks").clear_ready();
        }
        let mut queues = self.queues.borrow_mut();
        queues.exchange();
        let finished = std::mem::take(&mut queues.finished);
        if queues.can_go_on() {
            self.driver.wake();
        }
        drop(queues);
        for (done, outcome) in finished {
            done(outcome);
        }
        if !self.queues.borrow().jobs.is_empty() {
            return Poll::Pending;
        }
        for idle in self.idle.take() {
            idle();
        }
        let may_end = self.driver.closing.get() && self.queues.borrow().jobs.is_empty();
        if may_end { Poll::Ready(()) } else { Poll::Pending }
    }
}

/// How the ring is set up, best first.
#[derive(Clone, Copy, Debug)]
enum Flags {
    /// Linux 5.19: completions don't interrupt this thread.
    Cooperative,
    /// Linux 5.6.
    Plain,
}

impl Flags {
    fn builder(self) -> Builder {
        let mut builder = IoUring::builder();
        builder.setup_cqsize(COMPLETIONS);
        if matches!(self, Self::Cooperative) {
            builder.setup_submit_all().setup_taskrun_flag().setup_coop_taskrun();
        }
        builder
    }
}

/// Has the runtime tell when the ring has completions.
fn watch(ring: &IoUring) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: the ring's descriptor is open as long as the ring is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(ring.as_raw_fd()) }.try_clone_to_owned()?;
    // SAFETY: an owned descriptor stays the same and open as long as it exists.
    Ok(unsafe { AsyncFd::register_with_interest(fd, Interest::READABLE) }?)
}

fn check_operations(ring: &IoUring) -> Result<(), RingError> {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).map_err(|_| RingError::TooOld("list its operations"))?;
    let needed = [
        (opcode::Read::CODE, "read"),
        (opcode::Write::CODE, "write"),
        (opcode::Fsync::CODE, "sync"),
        (opcode::Fallocate::CODE, "allocate"),
    ];
    match needed.iter().find(|(code, _)| !probe.is_supported(*code)) {
        None => Ok(()),
        Some((_, name)) => Err(RingError::TooOld(name)),
    }
}

/// The jobs, and where each of them is.
struct Queues {
    ring: IoUring,
    jobs: Slab<(Job, Done)>,
    /// Jobs whose next step is to be made.
    waiting: VecDeque<usize>,
    /// How many steps the kernel has, or is about to get.
    in_flight: usize,
    finished: Vec<(Done, Outcome)>,
    #[cfg(test)]
    batches: usize,
}

impl Queues {
    fn new(ring: IoUring) -> Self {
        Self {
            ring,
            jobs: Slab::new(),
            waiting: VecDeque::new(),
            in_flight: 0,
            finished: Vec::new(),
            #[cfg(test)]
            batches: 0,
        }
    }

    fn push(&mut self, job: Job, done: Done) {
        let index = self.jobs.insert((job, done));
        self.waiting.push_back(index);
    }

    /// Gives waiting steps to the kernel and takes what it has ended.
    fn exchange(&mut self) {
        self.fill();
        self.enter();
        self.reap();
    }

    /// Whether another exchange gets further without waiting for the kernel.
    fn can_go_on(&mut self) -> bool {
        let room = self.in_flight < COMPLETIONS as usize;
        let submission = self.ring.submission();
        (room && !self.waiting.is_empty())
            || !submission.is_empty()
            || submission.taskrun()
            || submission.cq_overflow()
    }

    /// Moves waiting steps into the submission queue while there is room, or makes them on the spot.
    fn fill(&mut self) {
        let mut copied = 0;
        while self.in_flight < COMPLETIONS as usize && copied < BYTES_ON_THE_SPOT {
            let Some(&index) = self.waiting.front() else { return };
            let (job, _) = &mut self.jobs[index];
            match job.step() {
                None => self.go_on(index),
                Some(step) if job.is_in_memory() => {
                    job.ended(kernel::call(job.fd(), step));
                    copied += step.length();
                    self.go_on(index);
                }
                Some(step) => {
                    let flags = if job.is_served() { squeue::Flags::ASYNC } else { squeue::Flags::empty() };
                    let entry = entry_of(step, Fd(job.fd())).user_data(index as u64).flags(flags);
                    // SAFETY: the memory that the entry names belongs to the job, which owns a share of the descriptor
                    // too. It stays in its slot until `reap` has seen the completion; `drop` waits for that as well.
                    if unsafe { self.ring.submission().push(&entry) }.is_err() {
                        return;
                    }
                    self.in_flight += 1;
                }
            }
            self.waiting.pop_front();
        }
    }

    /// A step of a job ended: the next one waits for its turn, or the job is done.
    fn go_on(&mut self, index: usize) {
        let (job, _) = &mut self.jobs[index];
        if job.step().is_some() {
            self.waiting.push_back(index);
        } else {
            let (job, done) = self.jobs.remove(index);
            self.finished.push((done, job.finish()));
        }
    }

    /// The one call into the kernel: submits all entries, and fetches what the kernel has put off or kept back.
    fn enter(&mut self) {
        let submission = self.ring.submission();
        let needed = !submission.is_empty() || submission.taskrun() || submission.cq_overflow();
        drop(submission);
        if needed {
            self.call(0);
        }
    }

    fn call(&mut self, wait_for: usize) {
        #[cfg(test)]
        {
            self.batches += usize::from(!self.ring.submission().is_empty());
        }
        if let Err(error) = self.ring.submit_and_wait(wait_for) {
            // Entries that weren't taken stay in the queue for the next turn.
            let passes = matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN | libc::EBUSY));
            assert!(passes, "io_uring_enter failed in a way that only a broken ring explains: {error}");
        }
    }

    fn next_completion(&mut self) -> Option<cqueue::Entry> {
        self.ring.completion().next()
    }

    /// Takes all completions.
    fn reap(&mut self) {
        if !self.ring.completion().is_empty() {
            busy_poll::note_event();
        }
        while let Some(completion) = self.next_completion() {
            let index = completion.user_data() as usize;
            let result = match completion.result() {
                result if result < 0 => Err(io::Error::from_raw_os_error(-result)),
                result => Ok(result as usize),
            };
            self.in_flight -= 1;
            let (job, _) = &mut self.jobs[index];
            job.ended(result);
            self.go_on(index);
        }
    }
}

impl Drop for Queues {
    fn drop(&mut self) {
        while self.in_flight > 0 {
            self.call(1);
            self.reap();
        }
    }
}

fn entry_of(step: Step, fd: Fd) -> squeue::Entry {
    let short = |length| u32::try_from(length).expect("a transfer is shorter than the kernel's limit");
    match step {
        Step::Read { offset, start, length } => {
            opcode::Read::new(fd, start, short(length)).offset(offset).build()
        }
        Step::Write { offset, start, length, durable } => opcode::Write::new(fd, start, short(length))
            .offset(offset)
            .rw_flags(if durable { libc::RWF_DSYNC } else { 0 })
            .build(),
        Step::Fallocate { mode, range } => {
            opcode::Fallocate::new(fd, range.length).offset(range.offset).mode(mode).build()
        }
        Step::Sync => opcode::Fsync::new(fd).flags(FsyncFlags::DATASYNC).build(),
    }
}

#[cfg(test)]
impl Ring {
    /// A ring for each set of flags that this kernel takes.
    pub(super) fn of_every_kind() -> Vec<Rc<Self>> {
        [Flags::Cooperative, Flags::Plain]
            .into_iter()
            .filter_map(|flags| flags.builder().build(SUBMISSIONS).ok())
            .map(|ring| Self::with(ring).expect("a ring that can be made can be used"))
            .collect()
    }
    /// How often something was submitted to the kernel.
    pub(super) fn batches(&self) -> usize {
        self.shared.queues.borrow().batches
    }
}
