//! All descriptors of backings and metadata files, and the one way to read and write them.
//!
//! A [`Storage`] takes operations and calls back when each has ended. The io_uring and the thread-pool
//! implementations serve the same trait, and so does the tests' storage that stops after a given call.

pub mod file;

use crate::buffer::Buffer;
use blockmirror_protocol::ranges::ByteRange;
use bytes::Bytes;
use file::File;
use std::rc::Rc;

/// One thing to do with an open file. Ranges are 512-aligned; where the file wants a larger alignment, the storage
/// reads, modifies and writes, and the caller keeps other operations off the widened range meanwhile.
#[derive(Debug)]
pub enum Operation {
    /// Fill the whole buffer from `offset` on.
    Read { offset: u64, buffer: Buffer },
    /// Write all of `data` at `offset`; with `durable` it is on stable storage when the operation ends.
    Write { offset: u64, data: Bytes, durable: bool },
    /// Make the range read as zeroes. `may_unmap` allows to give its space back.
    Zero { range: ByteRange, may_unmap: bool },
    /// Make every write that ended before this operation began durable.
    Sync,
}

/// What an operation that succeeded gives back: the buffer of a read.
pub type Outcome = Result<Option<Buffer>, Error>;

/// Takes the outcome of an operation, once, on the thread of the storage's owner.
pub type Done = Box<dyn FnOnce(Outcome)>;

/// An operation that failed: what, where, and the kernel's own error.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} {path} at byte {offset}")]
pub struct Error {
    /// `read`, `write`, `zero` or `sync`.
    pub operation: &'static str,
    /// The file or device.
    pub path: String,
    /// Where the operation began, in bytes.
    pub offset: u64,
    /// What the kernel said.
    pub source: std::io::Error,
}

/// Carries out operations in the background.
pub trait Storage {
    /// Begins an operation; `done` is called when it has ended, never before this returns. Operations on
    /// overlapping ranges that are under way together end in any order.
    fn submit(&self, file: &Rc<File>, operation: Operation, done: Done);

    /// What carries the operations out, in a word for `status`: `io_uring` or `threads`.
    fn kind(&self) -> &'static str;
}
