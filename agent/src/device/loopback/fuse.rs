//! The FUSE server of one file: requests from `/dev/fuse` to the volume, its answers straight back.
//!
//! It runs on the volume's own thread. One task reads requests while there are any, several for each time that it is
//! woken, and hands each to the volume; an answer is written to `/dev/fuse` on the spot, from whatever called
//! [`Reply::complete`]. The place of a request in the table is the cookie that the volume gets.
//!
//! What the session agreed on, and every request that is not answered, is in a table that outlives the process
//! ([`in_flight`](super::in_flight)): a server that takes it over first executes what it finds there.
//!
//! Nothing in this file may wait for the file that it serves: whoever opens it, or calls the kernel in a way that makes
//! the loop driver do so, must be on another thread.

use super::in_flight::{Arrived, SLOTS, Slot, Table};
use super::instants::{self, Instant};
use super::kernel::{self, Call, Malformed, Session, Unserved};
use crate::buffer::BufferPool;
use crate::busy_poll;
use crate::device::row::Row;
use crate::device::{Answer, Command, Errno, Geometry, Reply, Request, Volume};
use crate::kept::Descriptors;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::SECTOR_BYTES;
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::future::poll_fn;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::task::Poll;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::Notify;
use zerocopy::IntoBytes;

/// A connection that ends shows only as an error.
const EVENTS: Interest = Interest::READABLE.add(Interest::ERROR);

/// How many requests are taken in a row before the runtime looks for events.
const BATCH: usize = 64;

/// Why a session ended before its mount did.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// Reading requests failed.
    #[error("cannot read requests from /dev/fuse")]
    Read(#[source] io::Error),
    /// The kernel's version does not do.
    #[error(transparent)]
    Unserved(#[from] Unserved),
    /// The kernel sent something that is no request.
    #[error(transparent)]
    Malformed(#[from] Malformed),
}

/// Serves one volume as the one file of a FUSE session.
pub struct Server {
    fuse: AsyncFd<File>,
    volume: Rc<dyn Volume>,
    geometry: Geometry,
    pool: BufferPool,
    table: RefCell<Table>,
    /// What an earlier server did not answer.
    left: RefCell<Vec<Arrived>>,
    /// Whether a flush is one: others than the agent may have the file open, or something was written.
    flushes: Cell<bool>,
    /// Whether what fails is left to the next server.
    leaves: Cell<bool>,
    /// The requests that the volume has, each at its slot.
    waiting: RefCell<Vec<Option<Waiting>>>,
    under_way: Cell<usize>,
    /// Told when there are none.
    idle: Notify,
}

/// What came of looking for a request.
enum Arrival {
    Request(Arrived),
    Nothing,
    /// There is no place for another one.
    Full,
    /// The mount is gone.
    End,
}

/// Where an answer goes.
#[derive(Clone, Copy)]
struct Asked {
    slot: Slot,
    unique: u64,
    /// Whether there is one to be given.
    is_awaited: bool,
}

impl Server {
    /// A server of `volume` on `fuse`, an open and mounted `/dev/fuse` in non-blocking mode. The table is new, or was taken
    /// over together with `fuse`: then `left` is what it held.
    ///
    /// # Errors
    /// When the runtime cannot watch the descriptor.
    pub fn new(
        fuse: File,
        table: Table,
        left: Vec<Arrived>,
        volume: Rc<dyn Volume>,
        pool: BufferPool,
    ) -> io::Result<Rc<Self>> {
        // SAFETY: a `File` owns its descriptor, gives back the same one each time, and nothing here replaces it.
        let fuse = unsafe { AsyncFd::register_with_interest(fuse, EVENTS) }?;
        Ok(Rc::new(Self {
            fuse,
            geometry: volume.geometry(),
            volume,
            pool,
            table: RefCell::new(table),
            left: RefCell::new(left),
            flushes: Cell::default(),
            leaves: Cell::default(),
            waiting: RefCell::new(vec![None; SLOTS]),
            under_way: Cell::default(),
            idle: Notify::new(),
        }))
    }

    /// From here on, others than the agent may use the file. Before, the loop driver has it synchronised when it is
    /// attached, which nobody asked for: that must not wait for replicas. The device is announced before the driver's call
    /// returns, so whoever writes by then is somebody else, and has flushes that are some.
    pub fn make_public(&self) {
        self.flushes.set(true);
    }

    /// From here on, what fails does so because the agent ends: it is left to the next server.
    pub fn leave(&self) {
        self.leaves.set(true);
    }

    /// Waits until the volume has no request of this server any more.
    pub async fn is_idle(&self) {
        loop {
            let idle = self.idle.notified();
            if self.under_way.get() == 0 {
                return;
            }
            idle.await;
        }
    }

    /// What is to be kept for the next server: the descriptor and the table.
    ///
    /// # Errors
    /// When there are no more descriptors.
    pub fn to_keep(&self) -> io::Result<Descriptors> {
        let session = self.fuse.get_ref().as_fd().try_clone_to_owned()?;
        let table = self.table.borrow().file().try_clone_to_owned()?;
        Ok(Descriptors { session, table })
    }

    /// Serves until the mount is gone.
    ///
    /// # Errors
    /// [`ServeError`] when the session cannot go on; the file answers "not connected" once the server is dropped.
    pub async fn serve(self: &Rc<Self>) -> Result<(), ServeError> {
        self.finish_left()?;
        'woken: loop {
            let mut ready = self.fuse.ready(EVENTS).await.map_err(ServeError::Read)?;
            let mut row = Row::first();
            for count in 1..=BATCH {
                match self.receive().map_err(ServeError::Read)? {
                    Arrival::Request(arrived) => {
                        instants::pass(Instant::Arrived);
                        busy_poll::note_event();
                        self.dispatch(arrived)?;
                        row.take();
                    }
                    Arrival::Nothing => {
                        ready.clear_ready();
                        continue 'woken;
                    }
                    Arrival::Full => {
                        let room = self.table.borrow().room();
                        room.await;
                        continue 'woken;
                    }
                    Arrival::End => return Ok(()),
                }
                if row.is_complete() && count < BATCH {
                    others_have_their_turn().await;
                    row.next();
                }
            }
            // Only after a full batch: yielding makes the runtime look for events once more, which is a system call.
            tokio::task::yield_now().await;
        }
    }

    /// Executes what an earlier server did not answer, before anything new is read (S2).
    fn finish_left(self: &Rc<Self>) -> Result<(), ServeError> {
        for arrived in std::mem::take(&mut *self.left.borrow_mut()) {
            let Arrived { slot, unique, call, is_awaited } = arrived;
            match call {
                Ok(_) => self.dispatch(arrived)?,
                Err(malformed) => {
                    tracing::error!(
                        unique,
                        "an unanswered request can't be understood and fails: {malformed}"
                    );
                    self.refuse(Asked { slot, unique, is_awaited }, libc::EIO);
                }
            }
        }
        Ok(())
    }

    fn receive(&self) -> io::Result<Arrival> {
        let mut table = self.table.borrow_mut();
        loop {
            let Some(mut inbox) = table.inbox() else { return Ok(Arrival::Full) };
            instants::pass(Instant::Ready);
            let error = match self.fuse.get_ref().read_vectored(&mut inbox) {
                Ok(received) => return Ok(Arrival::Request(table.arrived(received))),
                Err(error) => error,
            };
            table.nothing_arrived();
            match error.raw_os_error() {
                Some(libc::EAGAIN) => return Ok(Arrival::Nothing),
                Some(libc::ENODEV) => return Ok(Arrival::End),
                // ENOENT: the request was withdrawn while it was being read.
                Some(libc::EINTR | libc::ENOENT) => {}
                _ => return Err(error),
            }
        }
    }

    fn dispatch(self: &Rc<Self>, arrived: Arrived) -> Result<(), ServeError> {
        let Arrived { slot, unique, call, is_awaited } = arrived;
        let asked = Asked { slot, unique, is_awaited };
        let Geometry { size_bytes, read_only, preferred_bytes } = self.geometry;
        match call? {
            Call::Initialise(offer) => match Session::negotiate(offer) {
                Ok(session) => {
                    self.table.borrow().agree(session);
                    self.send(asked, session.reply().as_bytes());
                }
                Err(unserved) => {
                    self.refuse(asked, libc::EPROTO);
                    return Err(unserved.into());
                }
            },
            Call::SetAttributes { size: Some(size) } if size != size_bytes => self.refuse(asked, libc::EPERM),
            Call::Attributes | Call::SetAttributes { .. } => {
                self.send(asked, kernel::attributes(size_bytes, read_only, preferred_bytes).as_bytes());
            }
            Call::Open { write: true } if read_only => self.refuse(asked, libc::EROFS),
            Call::Open { .. } => self.send(asked, kernel::opened().as_bytes()),
            Call::Read { offset, length } => self.read(asked, offset, length),
            Call::Write { offset, length } => self.write(asked, offset, length),
            Call::Allocate { offset, length, mode } => self.allocate(asked, offset, length, mode),
            Call::Synchronise if !self.flushes.get() => self.send(asked, &[]),
            Call::Synchronise => self.submit(asked, Expected::Nothing, Command::Flush),
            Call::Statistics => self.send(asked, kernel::statistics(size_bytes).as_bytes()),
            Call::Notice => self.send(asked, &[]),
            Call::Silent => self.table.borrow_mut().end_answer(slot),
            Call::Lookup => self.refuse(asked, libc::ENOTDIR),
            Call::Unknown(_) => self.refuse(asked, libc::ENOSYS),
        }
        Ok(())
    }

    fn read(self: &Rc<Self>, asked: Asked, offset: u64, length: u32) {
        // As with any file, a read ends at the end.
        let length = u64::from(length).min(self.geometry.size_bytes.saturating_sub(offset));
        let range = ByteRange { offset, length };
        if !range.is_aligned(SECTOR_BYTES) {
            return self.refuse(asked, libc::EINVAL);
        }
        if range.is_empty() {
            return self.send(asked, &[]);
        }
        self.submit(asked, Expected::Bytes(length as usize), Command::Read(range));
    }

    fn write(self: &Rc<Self>, asked: Asked, offset: u64, length: u32) {
        if self.geometry.read_only {
            return self.refuse(asked, libc::EROFS);
        }
        if !offset.is_multiple_of(SECTOR_BYTES) || !u64::from(length).is_multiple_of(SECTOR_BYTES) {
            return self.refuse(asked, libc::EINVAL);
        }
        if offset > self.geometry.size_bytes || u64::from(length) > self.geometry.size_bytes - offset {
            return self.refuse(asked, libc::ENOSPC);
        }
        let data = {
            let mut table = self.table.borrow_mut();
            table.note_write(asked.slot, ByteRange::new(offset, length.into()));
            table.payload(asked.slot, length as usize, &self.pool)
        };
        self.submit(asked, Expected::Written(length), Command::Write { offset, data, fua: false });
    }

    fn allocate(self: &Rc<Self>, asked: Asked, offset: u64, length: u64, mode: u32) {
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        let may_unmap = match mode as i32 {
            PUNCH => true,
            ZERO => false,
            _ => return self.refuse(asked, libc::EOPNOTSUPP),
        };
        if self.geometry.read_only {
            return self.refuse(asked, libc::EROFS);
        }
        let length = length.min(self.geometry.size_bytes.saturating_sub(offset));
        let range = ByteRange { offset, length };
        if !range.is_aligned(SECTOR_BYTES) {
            return self.refuse(asked, libc::EINVAL);
        }
        if range.is_empty() {
            return self.send(asked, &[]);
        }
        self.table.borrow_mut().note_write(asked.slot, range);
        self.submit(asked, Expected::Nothing, Command::Zero { range, may_unmap, fua: false });
    }

    fn submit(self: &Rc<Self>, asked: Asked, expected: Expected, command: Command) {
        if matches!(command, Command::Write { .. } | Command::Zero { .. }) {
            self.flushes.set(true);
        }
        let waiting = Waiting { asked, expected };
        let before = self.waiting.borrow_mut()[asked.slot.index()].replace(waiting);
        assert!(before.is_none(), "a slot holds one request");
        self.under_way.set(self.under_way.get() + 1);
        self.volume.submit(Request { command, reply: self.clone(), cookie: asked.slot.cookie() });
    }

    fn send(&self, asked: Asked, body: &[u8]) {
        let Asked { unique, .. } = asked;
        self.answer(asked, || {
            let header = kernel::reply_header(unique, 0, body.len());
            match self.write_reply(&[IoSlice::new(header.as_bytes()), IoSlice::new(body)]) {
                Err(error) if !is_moot(&error) => {
                    tracing::warn!(unique, %error, "cannot answer the kernel's request; failing it");
                    self.fail(unique, libc::EIO);
                }
                _ => {}
            }
        });
    }

    fn refuse(&self, asked: Asked, errno: i32) {
        self.answer(asked, || self.fail(asked.unique, errno));
    }

    /// Notes before and after that an answer is written (S2).
    fn answer(&self, asked: Asked, write: impl FnOnce()) {
        if asked.is_awaited {
            self.table.borrow().begin_answer(asked.slot);
            instants::pass(Instant::Answering);
            write();
            instants::pass(Instant::Answered);
        }
        self.table.borrow_mut().end_answer(asked.slot);
    }

    fn fail(&self, unique: u64, errno: i32) {
        // The kernel takes only numbers in this range; anything else would leave the request unanswered.
        let errno = if (1..512).contains(&errno) { errno } else { libc::EIO };
        let header = kernel::reply_header(unique, errno, 0);
        let Err(error) = self.write_reply(&[IoSlice::new(header.as_bytes())]) else { return };
        if !is_moot(&error) {
            tracing::error!(unique, errno, %error, "cannot fail the kernel's request; it will hang");
        }
    }

    fn write_reply(&self, pieces: &[IoSlice<'_>]) -> io::Result<()> {
        // A reply is taken whole or not at all, and never waits.
        self.fuse.get_ref().write_vectored(pieces).map(|_| ())
    }
}

/// Lets those of the volume's tasks go on that can, without a look for events.
async fn others_have_their_turn() {
    let mut had_it = false;
    poll_fn(|context| {
        if std::mem::replace(&mut had_it, true) {
            return Poll::Ready(());
        }
        context.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

/// Whether a reply could not be delivered because nobody waits for it any more: the request was withdrawn, the mount
/// is gone or the connection was aborted.
fn is_moot(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::ENOENT | libc::ENODEV | libc::EPERM | libc::ENOTCONN | libc::ECONNABORTED)
    )
}

impl Reply for Server {
    fn complete(&self, cookie: u64, answer: Result<Answer, Errno>) {
        let waiting = self.waiting.borrow_mut()[Slot::of(cookie).index()].take();
        let Waiting { asked, expected } = waiting.expect("a volume answers each request once");
        self.under_way.set(self.under_way.get() - 1);
        if self.under_way.get() == 0 {
            self.idle.notify_waiters();
        }
        match (expected, answer) {
            (_, Err(_)) if self.leaves.get() => {}
            (_, Err(Errno(errno))) => self.refuse(asked, errno),
            (Expected::Nothing, Ok(Answer::Done)) => self.send(asked, &[]),
            (Expected::Written(length), Ok(Answer::Done)) => {
                self.send(asked, kernel::written(length).as_bytes());
            }
            (Expected::Bytes(length), Ok(Answer::Data(data))) => {
                assert_eq!(data.len(), length, "a volume reads as many bytes as it was asked for");
                self.send(asked, &data);
            }
            (expected, Ok(answer)) => panic!("a volume answered {answer:?} where {expected:?} was asked for"),
        }
    }
}

/// What kind of answer a request gets.
#[derive(Clone, Copy, Debug)]
enum Expected {
    Nothing,
    Bytes(usize),
    Written(u32),
}

/// A request that the volume has.
#[derive(Clone, Copy)]
struct Waiting {
    asked: Asked,
    expected: Expected,
}
