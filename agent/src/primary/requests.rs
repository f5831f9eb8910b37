//! What front ends ask of a volume: reads go straight to the backing, all else to the tracker. And what they are answered
//! where the backing fails.

use super::{Inner, Pending, Primary};
use crate::device::{Answer, Command, Errno, Geometry, Part, Reply, Request, Volume, blocking};
use crate::storage::file::File;
use crate::storage::{self, Operation};
use crate::troubles::{Kind, Troubles};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::tracker::{LocalWrite, RequestId, Work};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use tokio::task::spawn_local;

impl Volume for Primary {
    fn geometry(&self) -> Geometry {
        let preferred_bytes =
            u32::try_from(self.backing.alignment().max(4096)).expect("an alignment is small");
        Geometry { size_bytes: self.size_bytes, read_only: false, preferred_bytes }
    }

    fn submit(&self, request: Request) {
        let Request { command, reply, cookie } = request;
        let mut kind = Kind::Write;
        let (work, offset, data) = match command {
            Command::Read(range) => return self.read(range, reply, cookie),
            Command::Allocation(range) => return self.answer_allocation(range, reply, cookie),
            Command::Write { offset, data, fua } => {
                let range = ByteRange::new(offset, data.len() as u64);
                (Work::Write { range, fua }, offset, data)
            }
            Command::Zero { range, may_unmap, fua } => {
                (Work::Zero { range, may_unmap, fua }, 0, Bytes::new())
            }
            Command::Flush => {
                kind = Kind::Flush;
                (Work::Flush, 0, Bytes::new())
            }
        };
        // A reply must not come before this returns, and the tracker may answer these at once.
        let at_once = matches!(work, Work::Flush)
            || self.superseded.get().is_some()
            || self.inner.borrow().tracker.has_failed();
        let reply: Rc<dyn Reply> = if at_once { Rc::new(Later(reply)) } else { reply };
        self.drive(|inner, now| {
            let id = RequestId(inner.next_request);
            inner.next_request += 1;
            inner.requests.insert(id, Pending { offset, data, kind, reply, cookie, failure: None });
            inner.tracker.handle_request(id, work, now);
        });
    }
}

impl Primary {
    fn read(&self, range: ByteRange, reply: Rc<dyn Reply>, cookie: u64) {
        if self.absence.is_news() {
            // Driving notices it, and doubts who leads.
            self.drive(|_, _| ());
        }
        let is_in_doubt = {
            let mut inner = self.inner.borrow_mut();
            inner.tracker.note_read(self.now());
            inner.tracker.is_in_doubt()
        };
        if is_in_doubt {
            let primary = self.me();
            spawn_local(async move {
                match primary.settles().await {
                    true => primary.read(range, reply, cookie),
                    false => reply.complete(cookie, Err(Errno(libc::EIO))),
                }
            });
            return;
        }
        let length = usize::try_from(range.length).expect("front ends limit reads");
        let operation = Operation::Read { offset: range.offset, buffer: self.pool.take(length) };
        self.submit(&self.backing, operation, move |primary, outcome| {
            reply.complete(cookie, primary.reads.answer(outcome));
        });
    }

    /// Waits until it is known whether this host still leads, and says whether it does; also where that is not to be waited
    /// for.
    async fn settles(&self) -> bool {
        loop {
            let settled = self.settled.notified();
            if self.superseded.get().is_some() || self.waits_no_more.get() {
                return false;
            }
            if !self.inner.borrow().tracker.is_in_doubt() {
                return true;
            }
            settled.await;
        }
    }

    fn answer_allocation(&self, range: ByteRange, reply: Rc<dyn Reply>, cookie: u64) {
        let backing = self.backing.clone();
        spawn_local(async move { reply.complete(cookie, allocation(&backing, range).await) });
    }
}

impl Inner {
    /// Keeps why a piece of a request was not written, for its answer. Only while the backing is as good as before is
    /// a lack of space told, for which an application may wait and try again.
    pub(super) fn note_failure(&mut self, request: RequestId, ended: LocalWrite, found_no_room: bool) {
        let errno = match ended {
            LocalWrite::Written => return,
            LocalWrite::Failed if found_no_room => libc::ENOSPC,
            LocalWrite::Failed | LocalWrite::NotDurable => libc::EIO,
        };
        let pending = self.requests.get_mut(&request).expect("a request is answered after its last piece");
        pending.failure.get_or_insert(Errno(errno));
    }
}

/// How a write to the backing ended. `has_own_reason`: an error is about this very write, not about what the kernel's
/// cache lost before.
pub(super) fn how_ended(outcome: &storage::Outcome, durable: bool, has_own_reason: bool) -> LocalWrite {
    match outcome {
        Ok(_) => LocalWrite::Written,
        // The kernel doesn't tell whether a durable write or its sync failed. A full disk is the former, but for the
        // cache: its sync tells of earlier writes that found no room, and tells it once.
        Err(error) if durable && !(has_own_reason && is_full(error)) => LocalWrite::NotDurable,
        Err(_) => LocalWrite::Failed,
    }
}

/// Whether an operation failed because there was no room for it.
pub(super) fn is_full(error: &storage::Error) -> bool {
    matches!(error.source.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT))
}

/// How the last read of a volume went.
#[derive(Default)]
pub(crate) struct Reads {
    have_failed: Cell<bool>,
    troubles: RefCell<Rc<Troubles>>,
}

impl Reads {
    /// Failures are counted there from now on.
    pub(crate) fn count_in(&self, troubles: Rc<Troubles>) {
        *self.troubles.borrow_mut() = troubles;
    }

    /// Where failures are counted.
    pub(crate) fn troubles(&self) -> Rc<Troubles> {
        self.troubles.borrow().clone()
    }

    /// The answer to a read. Clients try again and again, and whoever logs waits for it: a failure is an error in the
    /// log once, until a read succeeds.
    pub(crate) fn answer(&self, outcome: storage::Outcome) -> Result<Answer, Errno> {
        let is_news = self.is_news(outcome.is_err());
        outcome.map(|buffer| Answer::Data(buffer.expect("a read gives its buffer back"))).map_err(|error| {
            let text = crate::words::with_causes(&error);
            self.troubles.borrow().note(Kind::Read, false, &text);
            if is_news {
                tracing::error!("{text}");
            } else {
                tracing::debug!("{text}");
            }
            Errno(libc::EIO)
        })
    }

    /// Whether a read failed, and the one before it did not.
    pub(super) fn is_news(&self, has_failed: bool) -> bool {
        !self.have_failed.replace(has_failed) && has_failed
    }
}

/// A reply that goes out after the call that caused it has returned.
struct Later(Rc<dyn Reply>);

impl Reply for Later {
    fn complete(&self, cookie: u64, answer: Result<Answer, Errno>) {
        let reply = self.0.clone();
        spawn_local(async move { reply.complete(cookie, answer) });
    }
}

/// Which parts of a range are allocated.
pub(crate) async fn allocation(backing: &File, range: ByteRange) -> Result<Answer, Errno> {
    let look = move |file: &File| file.allocation(range).take(256).collect::<io::Result<Vec<Part>>>();
    let file = backing.share();
    let parts = if file.knows_its_holes() { look(&file) } else { blocking(move || look(&file)).await };
    match parts {
        Ok(parts) => Ok(Answer::Allocation(parts)),
        Err(error) => Err(Errno(error.raw_os_error().unwrap_or(libc::EIO))),
    }
}
