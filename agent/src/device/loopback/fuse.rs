//! The FUSE server of one file: requests from `/dev/fuse` to the volume, its answers straight back.
//!
//! It runs on the volume's own thread. One task reads requests while there are any, several for each time that it is
//! woken, and hands each to the volume; an answer is written to `/dev/fuse` on the spot, from whatever called
//! [`Reply::complete`]. The kernel numbers the requests; what has to be remembered of one until its answer comes is
//! kept in a table whose indices are the cookies, so that nothing is allocated for a request but its data.
//!
//! What the session agreed on is one small value, [`Session`]; everything else that is kept here dies with the
//! requests that are under way.
//!
//! Nothing in this file may wait for the file that it serves: whoever opens it, or calls the kernel in a way that makes
//! the loop driver do so, must be on another thread.

use super::kernel::{self, Call, Head, MAX_TRANSFER_BYTES, Malformed, Session, Unserved};
use crate::buffer::{Buffer, BufferPool};
use crate::busy_poll;
use crate::device::row::Row;
use crate::device::{Answer, Command, Errno, Geometry, Reply, Request, Volume};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::SECTOR_BYTES;
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::fs::File;
use std::future::poll_fn;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::rc::Rc;
use std::task::Poll;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use zerocopy::IntoBytes;

/// A connection that ends shows only as an error.
const EVENTS: Interest = Interest::READABLE.add(Interest::ERROR);

/// How many requests are taken in a row before the runtime looks for events.
const BATCH: usize = 64;

/// A write of up to so many bytes is copied out of the memory that it was read into, which is large enough for any
/// request. So it does not pin that memory while it is on its way to disks and replicas: what a write holds is at most
/// eight times its size. Up to here the copy was measured to cost no throughput.
const COPIED_BYTES: usize = 128 << 10;

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
    session: Cell<Option<Session>>,
    /// Whether a flush is one: others than the agent may have the file open, or something was written.
    flushes: Cell<bool>,
    waiting: RefCell<WaitingTable>,
}

/// Where requests are read into.
struct Inbox {
    head: Head,
    rest: Buffer,
}

/// What came of looking for a request.
enum Arrival {
    Request(usize),
    Nothing,
    /// The mount is gone.
    End,
}

impl Server {
    /// A server of `volume` on `fuse`, an open and mounted `/dev/fuse` in non-blocking mode. `session` is what was
    /// agreed on with the kernel before, where the descriptor is one that was served already.
    ///
    /// # Errors
    /// When the runtime cannot watch the descriptor.
    pub fn new(
        fuse: File,
        session: Option<Session>,
        volume: Rc<dyn Volume>,
        pool: BufferPool,
    ) -> io::Result<Rc<Self>> {
        // SAFETY: a `File` owns its descriptor, gives back the same one each time, and nothing here replaces it.
        let fuse = unsafe { AsyncFd::register_with_interest(fuse, EVENTS) }?;
        let (flushes, geometry) = (Cell::new(session.is_some()), volume.geometry());
        let (session, waiting) = (Cell::new(session), RefCell::default());
        Ok(Rc::new(Self { fuse, volume, geometry, pool, session, flushes, waiting }))
    }

    /// From here on, others than the agent may use the file. Before, the loop driver has it synchronised when it is
    /// attached, which nobody asked for: that must not wait for replicas. The device is announced before the driver's call
    /// returns, so whoever writes by then is somebody else, and has flushes that are some.
    pub fn make_public(&self) {
        self.flushes.set(true);
    }

    /// What was agreed on with the kernel, once that has happened: what another server of the same descriptor needs.
    #[must_use]
    pub fn session(&self) -> Option<Session> {
        self.session.get()
    }

    /// Serves until the mount is gone.
    ///
    /// # Errors
    /// [`ServeError`] when the session cannot go on; the file answers "not connected" once the server is dropped.
    pub async fn serve(self: &Rc<Self>) -> Result<(), ServeError> {
        let mut inbox = Inbox { head: [0; size_of::<Head>()], rest: self.pool.take(MAX_TRANSFER_BYTES) };
        'woken: loop {
            let mut ready = self.fuse.ready(EVENTS).await.map_err(ServeError::Read)?;
            let mut row = Row::first();
            for count in 1..=BATCH {
                match self.receive(&mut inbox).map_err(ServeError::Read)? {
                    Arrival::Request(received) => {
                        busy_poll::note_event();
                        self.dispatch(&mut inbox, received)?;
                        row.take();
                    }
                    Arrival::Nothing => {
                        ready.clear_ready();
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

    fn receive(&self, inbox: &mut Inbox) -> io::Result<Arrival> {
        let mut pieces = [IoSliceMut::new(&mut inbox.head), IoSliceMut::new(&mut inbox.rest)];
        loop {
            let error = match self.fuse.get_ref().read_vectored(&mut pieces) {
                Ok(received) => return Ok(Arrival::Request(received)),
                Err(error) => error,
            };
            match error.raw_os_error() {
                Some(libc::EAGAIN) => return Ok(Arrival::Nothing),
                Some(libc::ENODEV) => return Ok(Arrival::End),
                // ENOENT: the request was withdrawn while it was being read.
                Some(libc::EINTR | libc::ENOENT) => {}
                _ => return Err(error),
            }
        }
    }

    fn dispatch(self: &Rc<Self>, inbox: &mut Inbox, received: usize) -> Result<(), ServeError> {
        let kernel::Received { unique, call } = kernel::parse(&inbox.head, received)?;
        let Geometry { size_bytes, read_only, preferred_bytes } = self.geometry;
        match call {
            Call::Initialise(offer) => match Session::negotiate(offer) {
                Ok(session) => {
                    self.session.set(Some(session));
                    self.send(unique, session.reply().as_bytes());
                }
                Err(unserved) => {
                    self.refuse(unique, libc::EPROTO);
                    return Err(unserved.into());
                }
            },
            Call::SetAttributes { size: Some(size) } if size != size_bytes => {
                self.refuse(unique, libc::EPERM)
            }
            Call::Attributes | Call::SetAttributes { .. } => {
                self.send(unique, kernel::attributes(size_bytes, read_only, preferred_bytes).as_bytes());
            }
            Call::Open { write: true } if read_only => self.refuse(unique, libc::EROFS),
            Call::Open { .. } => self.send(unique, kernel::opened().as_bytes()),
            Call::Read { offset, length } => self.read(unique, offset, length),
            Call::Write { offset, length } => self.write(unique, offset, length, inbox),
            Call::Allocate { offset, length, mode } => self.allocate(unique, offset, length, mode),
            Call::Synchronise if !self.flushes.get() => self.send(unique, &[]),
            Call::Synchronise => self.submit(unique, Expected::Nothing, Command::Flush),
            Call::Statistics => self.send(unique, kernel::statistics(size_bytes).as_bytes()),
            Call::Notice => self.send(unique, &[]),
            Call::Silent => {}
            Call::Lookup => self.refuse(unique, libc::ENOTDIR),
            Call::Unknown(_) => self.refuse(unique, libc::ENOSYS),
        }
        Ok(())
    }

    fn read(self: &Rc<Self>, unique: u64, offset: u64, length: u32) {
        // As with any file, a read ends at the end.
        let length = u64::from(length).min(self.geometry.size_bytes.saturating_sub(offset));
        let range = ByteRange { offset, length };
        if !range.is_aligned(SECTOR_BYTES) {
            return self.refuse(unique, libc::EINVAL);
        }
        if range.is_empty() {
            return self.send(unique, &[]);
        }
        self.submit(unique, Expected::Bytes(length as usize), Command::Read(range));
    }

    fn write(self: &Rc<Self>, unique: u64, offset: u64, length: u32, inbox: &mut Inbox) {
        if self.geometry.read_only {
            return self.refuse(unique, libc::EROFS);
        }
        if !offset.is_multiple_of(SECTOR_BYTES) || !u64::from(length).is_multiple_of(SECTOR_BYTES) {
            return self.refuse(unique, libc::EINVAL);
        }
        if offset > self.geometry.size_bytes || u64::from(length) > self.geometry.size_bytes - offset {
            return self.refuse(unique, libc::ENOSPC);
        }
        let data = self.payload(inbox, length as usize);
        self.submit(unique, Expected::Written(length), Command::Write { offset, data, fua: false });
    }

    /// Takes a write's payload out of the inbox.
    fn payload(&self, inbox: &mut Inbox, length: usize) -> Bytes {
        if length <= COPIED_BYTES {
            let mut copy = self.pool.take(length);
            copy.copy_from_slice(&inbox.rest[..length]);
            return copy.freeze();
        }
        let mut whole = std::mem::replace(&mut inbox.rest, self.pool.take(MAX_TRANSFER_BYTES));
        whole.truncate(length);
        whole.freeze()
    }

    fn allocate(self: &Rc<Self>, unique: u64, offset: u64, length: u64, mode: u32) {
        const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;
        let may_unmap = match mode as i32 {
            PUNCH => true,
            ZERO => false,
            _ => return self.refuse(unique, libc::EOPNOTSUPP),
        };
        if self.geometry.read_only {
            return self.refuse(unique, libc::EROFS);
        }
        let length = length.min(self.geometry.size_bytes.saturating_sub(offset));
        let range = ByteRange { offset, length };
        if !range.is_aligned(SECTOR_BYTES) {
            return self.refuse(unique, libc::EINVAL);
        }
        if range.is_empty() {
            return self.send(unique, &[]);
        }
        self.submit(unique, Expected::Nothing, Command::Zero { range, may_unmap, fua: false });
    }

    fn submit(self: &Rc<Self>, unique: u64, expected: Expected, command: Command) {
        if matches!(command, Command::Write { .. } | Command::Zero { .. }) {
            self.flushes.set(true);
        }
        let cookie = self.waiting.borrow_mut().insert(Waiting { unique, expected });
        self.volume.submit(Request { command, reply: self.clone(), cookie });
    }

    fn send(&self, unique: u64, body: &[u8]) {
        let header = kernel::reply_header(unique, 0, body.len());
        let Err(error) = self.write_reply(&[IoSlice::new(header.as_bytes()), IoSlice::new(body)]) else {
            return;
        };
        if !is_moot(&error) {
            tracing::warn!(unique, %error, "cannot answer the kernel's request; failing it");
            self.refuse(unique, libc::EIO);
        }
    }

    fn refuse(&self, unique: u64, errno: i32) {
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
        let Waiting { unique, expected } = self.waiting.borrow_mut().remove(cookie);
        match (expected, answer) {
            (_, Err(Errno(errno))) => self.refuse(unique, errno),
            (Expected::Nothing, Ok(Answer::Done)) => self.send(unique, &[]),
            (Expected::Written(length), Ok(Answer::Done)) => {
                self.send(unique, kernel::written(length).as_bytes());
            }
            (Expected::Bytes(length), Ok(Answer::Data(data))) => {
                assert_eq!(data.len(), length, "a volume reads as many bytes as it was asked for");
                self.send(unique, &data);
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
    unique: u64,
    expected: Expected,
}

/// The requests that the volume has, each at the index that is its cookie. Never longer than the most that were under
/// way together, which the kernel bounds.
#[derive(Default)]
struct WaitingTable {
    slots: Vec<Option<Waiting>>,
    free: Vec<usize>,
}

impl WaitingTable {
    fn insert(&mut self, waiting: Waiting) -> u64 {
        let slot = self.free.pop().unwrap_or_else(|| {
            self.slots.push(None);
            self.slots.len() - 1
        });
        self.slots[slot] = Some(waiting);
        slot as u64
    }

    fn remove(&mut self, cookie: u64) -> Waiting {
        let slot = cookie as usize;
        let waiting = self.slots[slot].take().expect("a volume answers each request once");
        self.free.push(slot);
        waiting
    }
}
