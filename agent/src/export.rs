//! A replica's read-only export: what follows the primary can be looked at over NBD, and nothing else.
//!
//! Reads go straight to the backing. They see what is written there at that moment, which is a mixture of the epoch
//! that is being applied and the one before: good for a look, not for a backup.

use crate::buffer::BufferPool;
use crate::content::{Reads, allocation};
use crate::device::{Answer, Command, Errno, Geometry, Reply, Request, Volume};
use crate::storage::file::File;
use crate::storage::{Operation, Storage};
use crate::troubles::Troubles;
use std::rc::Rc;
use tokio::task::spawn_local;

/// A replica's content, as front ends read it.
pub struct Export {
    storage: Rc<dyn Storage>,
    backing: Rc<File>,
    pool: BufferPool,
    size_bytes: u64,
    reads: Rc<Reads>,
}

impl Export {
    /// The first `size_bytes` of a backing, to read.
    #[must_use]
    pub fn new(storage: Rc<dyn Storage>, backing: Rc<File>, pool: BufferPool, size_bytes: u64) -> Rc<Self> {
        Rc::new(Self { storage, backing, pool, size_bytes, reads: Rc::default() })
    }
}

impl Export {
    /// Reads that fail are counted there from now on.
    pub fn count_in(&self, troubles: Rc<Troubles>) {
        self.reads.count_in(troubles);
    }
}

impl Volume for Export {
    fn geometry(&self) -> Geometry {
        let preferred_bytes =
            u32::try_from(self.backing.alignment().max(4096)).expect("an alignment is small");
        Geometry { size_bytes: self.size_bytes, read_only: true, preferred_bytes }
    }

    fn submit(&self, request: Request) {
        let Request { command, reply, cookie } = request;
        match command {
            Command::Read(range) => {
                let length = usize::try_from(range.length).expect("front ends limit reads");
                let operation = Operation::Read { offset: range.offset, buffer: self.pool.take(length) };
                let reads = self.reads.clone();
                let done = move |outcome| reply.complete(cookie, reads.answer(outcome));
                self.storage.submit(&self.backing, operation, Box::new(done));
            }
            Command::Allocation(range) => {
                let backing = self.backing.clone();
                spawn_local(async move { reply.complete(cookie, allocation(&backing, range).await) });
            }
            Command::Flush => later(reply, cookie, Ok(Answer::Done)),
            Command::Write { .. } | Command::Zero { .. } => later(reply, cookie, Err(Errno(libc::EROFS))),
        }
    }
}

/// Answers after the call that asked has returned.
fn later(reply: Rc<dyn Reply>, cookie: u64, answer: Result<Answer, Errno>) {
    spawn_local(async move { reply.complete(cookie, answer) });
}
