//! One operation as a future, for whoever waits for one thing at a time.

use super::file::File;
use super::{Error, Operation, Outcome, Storage};
use crate::buffer::{Buffer, BufferPool};
use blockmirror_protocol::ranges::ByteRange;
use bytes::Bytes;
use std::io;
use std::rc::Rc;
use tokio::sync::oneshot;

/// Reads a range into a buffer of the pool.
///
/// # Errors
/// [`Error`] when the range can't be read in full.
pub async fn read(
    storage: &dyn Storage,
    file: &Rc<File>,
    pool: &BufferPool,
    range: ByteRange,
) -> Result<Buffer, Error> {
    let length = usize::try_from(range.length).expect("a range that is read fits into memory");
    let operation = Operation::Read { offset: range.offset, buffer: pool.take(length) };
    Ok(carry_out(storage, file, operation).await?.expect("a read gives its buffer back"))
}

/// Writes all of `data` at `offset`; with `durable` it is on stable storage afterwards.
///
/// # Errors
/// [`Error`] when not all was written; any part of it may have been.
pub async fn write(
    storage: &dyn Storage,
    file: &Rc<File>,
    offset: u64,
    data: Bytes,
    durable: bool,
) -> Result<(), Error> {
    carry_out(storage, file, Operation::Write { offset, data, durable }).await.map(drop)
}

/// Makes a range read as zeroes; with `may_unmap` its space may be given back.
///
/// # Errors
/// [`Error`] when not all was cleared; any part of it may have been.
pub async fn zero(
    storage: &dyn Storage,
    file: &Rc<File>,
    range: ByteRange,
    may_unmap: bool,
) -> Result<(), Error> {
    carry_out(storage, file, Operation::Zero { range, may_unmap }).await.map(drop)
}

/// Makes everything durable whose write ended before.
///
/// # Errors
/// [`Error`]: then nothing is known to be durable that was written since the last sync that succeeded (W5).
pub async fn sync(storage: &dyn Storage, file: &Rc<File>) -> Result<(), Error> {
    carry_out(storage, file, Operation::Sync).await.map(drop)
}

/// Waits until no operation is under way: then no buffer is with the kernel, and nothing more changes on disk.
pub async fn drain(storage: &dyn Storage) {
    let (sender, idle) = oneshot::channel();
    // An error means that nobody waits any longer.
    storage.when_idle(Box::new(move || sender.send(()).unwrap_or_default()));
    // A storage that ended without a call is idle too.
    let _ = idle.await;
}

async fn carry_out(storage: &dyn Storage, file: &Rc<File>, operation: Operation) -> Outcome {
    let (name, offset) = (operation.name(), operation.range().offset);
    let (sender, outcome) = oneshot::channel();
    storage.submit(file, operation, Box::new(move |outcome| drop(sender.send(outcome))));
    outcome.await.unwrap_or_else(|_| {
        Err(Error {
            operation: name,
            path: file.path().display().to_string(),
            offset,
            source: io::Error::new(io::ErrorKind::BrokenPipe, "the storage was closed meanwhile"),
        })
    })
}
