//! Reads a backing from front to back, some pieces ahead of whoever uses them, so that the disk and the user work at
//! the same time. What the file knows to be a hole isn't read.

use crate::buffer::BufferPool;
use crate::storage::file::File;
use crate::storage::{Error, Operation, Outcome, Storage};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::SECTOR_BYTES;
use bytes::Bytes;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use tokio::sync::oneshot;

/// How much is read at a time, in bytes.
pub const PIECE_BYTES: u64 = 1 << 20;

/// How much of a hole is told at a time, in bytes: so that nobody who splits it is busy for long.
const HOLE_BYTES: u64 = 4 << 30;

/// A part of a range that was read.
#[derive(Debug)]
pub enum Piece {
    /// It reads as zeroes, and the file has no space for it.
    Hole(ByteRange),
    /// Its bytes; at most [`PIECE_BYTES`].
    Data(ByteRange, Bytes),
}

/// Reads a range in order.
pub struct ReadAhead {
    storage: Rc<dyn Storage>,
    file: Rc<File>,
    pool: BufferPool,
    /// What was not begun yet.
    rest: ByteRange,
    depth: usize,
    under_way: VecDeque<UnderWay>,
}

enum UnderWay {
    Hole(ByteRange),
    Read(ByteRange, oneshot::Receiver<Outcome>),
}

impl ReadAhead {
    /// Reads `range`, with `depth` pieces under way at a time. The first reads begin with the first
    /// [`ReadAhead::next`].
    #[must_use]
    pub fn new(
        storage: Rc<dyn Storage>,
        file: Rc<File>,
        pool: BufferPool,
        range: ByteRange,
        depth: usize,
    ) -> Self {
        Self { storage, file, pool, rest: range, depth, under_way: VecDeque::new() }
    }

    /// The range whose pieces were not begun yet.
    pub(super) fn rest(&self) -> ByteRange {
        self.rest
    }

    /// The next piece; nothing after the last.
    ///
    /// # Errors
    /// [`Error`] when a piece can't be read.
    pub async fn next(&mut self) -> Result<Option<Piece>, Error> {
        while self.under_way.len() < self.depth && !self.rest.is_empty() {
            let begun = self.begin()?;
            self.under_way.push_back(begun);
        }
        match self.under_way.pop_front() {
            None => Ok(None),
            Some(UnderWay::Hole(range)) => Ok(Some(Piece::Hole(range))),
            Some(UnderWay::Read(range, outcome)) => {
                let outcome = outcome.await.unwrap_or_else(|_| {
                    Err(self.error(range.offset, io::Error::other("the storage was closed meanwhile")))
                });
                let buffer = outcome?.expect("a read gives its buffer back");
                Ok(Some(Piece::Data(range, buffer.freeze())))
            }
        }
    }

    fn begin(&mut self) -> Result<UnderWay, Error> {
        if let Some(hole) = self.hole()? {
            self.rest = ByteRange::between(hole.end(), self.rest.end());
            return Ok(UnderWay::Hole(hole));
        }
        let end = self.rest.end().min((self.rest.offset / PIECE_BYTES + 1) * PIECE_BYTES);
        let range = ByteRange::between(self.rest.offset, end);
        self.rest = ByteRange::between(end, self.rest.end());
        let buffer = self.pool.take(range.length as usize);
        let (sender, outcome) = oneshot::channel();
        let done = Box::new(move |outcome| drop(sender.send(outcome)));
        self.storage.submit(&self.file, Operation::Read { offset: range.offset, buffer }, done);
        Ok(UnderWay::Read(range, outcome))
    }

    /// The hole that `rest` begins with, if it begins with one. Holes count from sector to sector, whatever the file
    /// system says.
    fn hole(&self) -> Result<Option<ByteRange>, Error> {
        let length = self.file.hole_at(self.rest).map_err(|source| self.error(self.rest.offset, source))?;
        let end = self.rest.offset + length.min(HOLE_BYTES);
        let whole_sectors = end - end % SECTOR_BYTES;
        let is_hole = whole_sectors > self.rest.offset;
        Ok(is_hole.then(|| ByteRange::between(self.rest.offset, whole_sectors)))
    }

    fn error(&self, offset: u64, source: io::Error) -> Error {
        Error { operation: "read", path: self.file.path().display().to_string(), offset, source }
    }
}
