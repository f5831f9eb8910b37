//! What front ends ask of a volume: reads go straight to the backing, all else to the tracker.

use super::{Pending, Primary};
use crate::device::{Answer, Command, Errno, Geometry, Part, Reply, Request, Volume};
use crate::storage::file::File;
use crate::storage::{self, Operation};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::tracker::{RequestId, Work};
use bytes::Bytes;
use std::cell::Cell;
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
            Command::Flush => (Work::Flush, 0, Bytes::new()),
        };
        // A reply must not come before this returns, and the tracker may answer these at once.
        let at_once = matches!(work, Work::Flush)
            || self.superseded.get().is_some()
            || self.inner.borrow().tracker.has_failed();
        let reply: Rc<dyn Reply> = if at_once { Rc::new(Later(reply)) } else { reply };
        self.drive(|inner, now| {
            let id = RequestId(inner.next_request);
            inner.next_request += 1;
            inner.requests.insert(id, Pending { offset, data, reply, cookie, failure: None });
            inner.tracker.handle_request(id, work, now);
        });
    }
}

impl Primary {
    fn read(&self, range: ByteRange, reply: Rc<dyn Reply>, cookie: u64) {
        self.inner.borrow_mut().tracker.note_read(self.now());
        let length = usize::try_from(range.length).expect("front ends limit reads");
        let operation = Operation::Read { offset: range.offset, buffer: self.pool.take(length) };
        self.submit(&self.backing, operation, move |primary, outcome| {
            reply.complete(cookie, primary.reads.answer(outcome));
        });
    }

    fn answer_allocation(&self, range: ByteRange, reply: Rc<dyn Reply>, cookie: u64) {
        let backing = self.backing.clone();
        spawn_local(async move { reply.complete(cookie, allocation(&backing, range)) });
    }
}

/// How the last read of a volume went.
#[derive(Default)]
pub(crate) struct Reads {
    have_failed: Cell<bool>,
}

impl Reads {
    /// The answer to a read. Clients try again and again, and whoever logs waits for it: a failure is an error in the
    /// log once, until a read succeeds.
    pub(crate) fn answer(&self, outcome: storage::Outcome) -> Result<Answer, Errno> {
        let is_news = self.is_news(outcome.is_err());
        outcome.map(|buffer| Answer::Data(buffer.expect("a read gives its buffer back"))).map_err(|error| {
            let text = crate::words::with_causes(&error);
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
pub(crate) fn allocation(backing: &File, range: ByteRange) -> Result<Answer, Errno> {
    let parts: Result<Vec<Part>, std::io::Error> = backing.allocation(range).take(256).collect();
    match parts {
        Ok(parts) => Ok(Answer::Allocation(parts)),
        Err(error) => Err(Errno(error.raw_os_error().unwrap_or(libc::EIO))),
    }
}
