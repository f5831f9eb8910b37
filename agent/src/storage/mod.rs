//! All descriptors of backings and metadata files, and the one way to read and write them.
//!
//! A [`Storage`] takes operations and calls back when each has ended. The io_uring ([`ring`]) and the thread-pool
//! ([`threads`]) implementations serve the same trait, and so does the storage that stops or fails at a given call
//! ([`faults`]). What an operation takes to carry out (the rest of a short transfer, the read-modify-write around an
//! unaligned one, the fallback of a zeroing that the file doesn't offer) is decided once, in `job`; the two
//! implementations only differ in how a single call reaches the kernel.
//!
//! Everything here belongs to one thread, the volume's: a storage is made inside its `LocalSet`, operations are
//! submitted there, and their outcomes arrive there.

mod calls;
mod cause;
mod claim;
mod direct;
pub mod faults;
pub mod file;
mod job;
mod kernel;
pub mod probe;
pub mod ring;
mod tally;
#[cfg(test)]
mod tests;
pub mod threads;
mod unaligned;
pub mod users;
mod writes;
mod zeroing;

use crate::buffer::Buffer;
use blockmirror_protocol::ranges::ByteRange;
use bytes::Bytes;
pub use calls::{drain, read, sync, write, zero};
pub use cause::Cause;
use file::File;
use ring::Ring;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Instant;
pub use tally::{Sectors, Tally};
use threads::Threads;
pub use writes::Writes;

/// One thing to do with an open file. Ranges are 512-aligned; where the file wants a larger alignment, the storage
/// reads, modifies and writes, and the caller keeps other operations off the widened range meanwhile.
///
/// A backing has a fixed size, and an operation beyond it fails. A metadata file grows with what is written, and
/// reads as zeroes beyond its end.
#[derive(Debug)]
pub enum Operation {
    /// Fill the whole buffer from `offset` on.
    Read {
        /// The first byte to read.
        offset: u64,
        /// What to fill; its length is how much to read.
        buffer: Buffer,
    },
    /// Write all of `data` at `offset`.
    Write {
        /// The first byte to write.
        offset: u64,
        /// What to write.
        data: Bytes,
        /// Whether the data is to be on stable storage when the operation ends.
        durable: bool,
    },
    /// Make the range read as zeroes.
    Zero {
        /// The bytes to clear, as many as one likes: the storage takes them in steps.
        range: ByteRange,
        /// Whether the range's space may be given back.
        may_unmap: bool,
    },
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
    pub source: io::Error,
}

impl Error {
    /// What kind of thing went wrong.
    #[must_use]
    pub fn cause(&self) -> Cause {
        Cause::of(&self.source)
    }
}

/// A call to the kernel that has not come back yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnderWay {
    /// Since when the kernel has it, or it waits behind those that the kernel has.
    pub since: Instant,
    /// The file or device.
    pub path: PathBuf,
}

/// Carries out operations in the background.
///
/// Operations go on when the last handle to the storage is dropped, as long as the runtime runs. When the runtime
/// ends first, those that the kernel has begun are waited for and the others forgotten; neither's `done` is called.
pub trait Storage {
    /// Begins an operation; `done` is called when it has ended, never before this returns. Operations on
    /// overlapping ranges that are under way together end in any order.
    fn submit(&self, file: &Rc<File>, operation: Operation, done: Done);

    /// What carries the operations out, in a word for `status`: `io_uring` or `threads`.
    fn kind(&self) -> &'static str;

    /// Why a slower kind than `io_uring` is in use, where that wasn't asked for.
    fn fallback_reason(&self) -> Option<&str> {
        None
    }

    /// The call to the kernel that is under way the longest; nothing where none is.
    fn oldest(&self) -> Option<UnderWay> {
        None
    }

    /// Calls `idle` once no operation is under way; see [`drain`]. The default suits a storage that has never
    /// anything under way when control is outside of it.
    fn when_idle(&self, idle: Box<dyn FnOnce()>) {
        idle();
    }
}

impl Operation {
    /// The operation in a word, as in [`Error::operation`].
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Read { .. } => "read",
            Self::Write { .. } => "write",
            Self::Zero { .. } => "zero",
            Self::Sync => "sync",
        }
    }

    /// The bytes that the operation names: none for a sync.
    ///
    /// # Panics
    /// When the end does not fit into 64 bits.
    #[must_use]
    pub fn range(&self) -> ByteRange {
        match self {
            Self::Read { offset, buffer } => ByteRange::new(*offset, buffer.len() as u64),
            Self::Write { offset, data, .. } => ByteRange::new(*offset, data.len() as u64),
            Self::Zero { range, .. } => *range,
            Self::Sync => ByteRange::default(),
        }
    }
}

/// The variable of the environment that forces the thread pool when it is `threads`.
pub const ENGINE_VARIABLE: &str = "BLOCKMIRROR_STORAGE";

/// Which implementation to use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// io_uring where it can be had, else threads.
    Automatic,
    /// Threads, though io_uring may be there.
    Threads,
}

/// The best storage that this kernel and container allow, for the calling thread, unless [`ENGINE_VARIABLE`] asks for
/// threads.
///
/// # Errors
/// When neither io_uring nor threads can be had.
///
/// # Panics
/// Outside of a `LocalSet` of a tokio runtime with I/O enabled.
pub fn open() -> io::Result<Rc<dyn Storage>> {
    let asked_for_threads = std::env::var_os(ENGINE_VARIABLE).is_some_and(|engine| engine == "threads");
    open_with(if asked_for_threads { Engine::Threads } else { Engine::Automatic })
}

/// A storage of this engine, for the calling thread.
///
/// # Errors
/// When neither io_uring nor threads can be had.
///
/// # Panics
/// Outside of a `LocalSet` of a tokio runtime with I/O enabled.
pub fn open_with(engine: Engine) -> io::Result<Rc<dyn Storage>> {
    if engine == Engine::Threads {
        return Ok(Threads::new(None)?);
    }
    match Ring::new() {
        Ok(ring) => Ok(ring),
        Err(error) => {
            tracing::warn!(%error, "io_uring cannot be used; disk i/o goes through a pool of threads");
            Ok(Threads::new(Some(error.to_string()))?)
        }
    }
}
