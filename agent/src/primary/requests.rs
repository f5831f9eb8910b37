//! What front ends ask of a volume: reads go straight to the backing, all else to the tracker.

use super::{Pending, Primary};
use crate::device::{Answer, Command, Errno, Geometry, Part, Reply, Request, Volume};
use crate::storage::Operation;
use crate::storage::file::File;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::tracker::{RequestId, Work};
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
            let answer = match outcome {
                Ok(buffer) => Ok(Answer::Data(buffer.expect("a read gives its buffer back"))),
                Err(error) => {
                    tracing::error!("{}", crate::words::with_causes(&error));
                    let _ = primary;
                    Err(Errno(libc::EIO))
                }
            };
            reply.complete(cookie, answer);
        });
    }

    fn answer_allocation(&self, range: ByteRange, reply: Rc<dyn Reply>, cookie: u64) {
        let backing = self.backing.clone();
        spawn_local(async move { reply.complete(cookie, allocation(&backing, range)) });
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
