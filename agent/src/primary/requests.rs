//! What front ends ask of a volume: reads go straight to the backing, all else to the tracker. And what they are answered
//! where the backing fails.

use super::{Inner, Pending, Primary};
use crate::content::allocation;
use crate::device::{Answer, Command, Errno, Geometry, Reply, Request, Volume};
use crate::storage::file::Part;
use crate::storage::{self, Cause, Operation};
use crate::troubles::Kind;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::tracker::{LocalWrite, RequestId, Work};
use bytes::Bytes;
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
            return self.read_when_settled(range, reply, cookie);
        }
        if !self.reads_at_once(range, &reply, cookie) {
            return;
        }
        self.read_backing(range, reply, cookie);
    }

    pub(super) fn read_backing(&self, range: ByteRange, reply: Rc<dyn Reply>, cookie: u64) {
        let length = usize::try_from(range.length).expect("front ends limit reads");
        let operation = Operation::Read { offset: range.offset, buffer: self.pool.take(length) };
        self.submit(&self.backing, operation, move |primary, outcome| {
            reply.complete(cookie, primary.reads.answer(outcome));
        });
    }

    /// A read that goes on when it is known that this host leads.
    pub(super) fn read_when_settled(&self, range: ByteRange, reply: Rc<dyn Reply>, cookie: u64) {
        let primary = self.me();
        spawn_local(async move {
            match primary.settles().await {
                true => primary.read(range, reply, cookie),
                false => reply.complete(cookie, Err(Errno(libc::EIO))),
            }
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
        if self.inner.borrow().tracker.is_missing(range) {
            // What is absent is no hole.
            let whole = Part { length: range.length, hole: false };
            return Later(reply).complete(cookie, Ok(Answer::Allocation(vec![whole])));
        }
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
        Err(error) if durable && !(has_own_reason && error.cause() == Cause::NoSpace) => {
            LocalWrite::NotDurable
        }
        Err(_) => LocalWrite::Failed,
    }
}

/// A reply that goes out after the call that caused it has returned.
pub(super) struct Later(pub(super) Rc<dyn Reply>);

impl Reply for Later {
    fn complete(&self, cookie: u64, answer: Result<Answer, Errno>) {
        let reply = self.0.clone();
        spawn_local(async move { reply.complete(cookie, answer) });
    }
}
