//! Reads and writes that the file doesn't take as they are: because a range has an edge inside of the file's
//! alignment unit, or because the memory starts at an address that direct I/O refuses.
//!
//! Both go through a buffer of whole units. A write first reads the units at its edges, so that the bytes around the
//! range are written back as they were: whoever submits it keeps others off those units meanwhile. A crash in the
//! middle leaves what a crash in the middle of any write leaves, in units of the disk's own sector.

use super::file::Descriptor;
use super::job::{Step, Transfer};
use crate::buffer::{Buffer, BufferPool};
use blockmirror_protocol::ranges::ByteRange;
use bytes::Bytes;
use std::io;
use std::ops::Range;

/// Where the bytes of `inner` are in memory that starts at `outer`.
fn within(inner: ByteRange, outer: ByteRange) -> Range<usize> {
    let start = usize::try_from(inner.offset - outer.offset).expect("a range in memory fits into it");
    start..start + inner.length as usize
}

/// A read of the whole units around a range, of which the range's bytes are handed on.
pub(super) struct ReadAround {
    range: ByteRange,
    widened: ByteRange,
    buffer: Buffer,
    units: Buffer,
    transfer: Transfer,
}

impl ReadAround {
    pub(super) fn new(range: ByteRange, buffer: Buffer, alignment: u64, pool: &BufferPool) -> Self {
        let widened = range.widened(alignment);
        let units = pool.take(widened.length as usize);
        Self { range, widened, buffer, units, transfer: Transfer::new(widened) }
    }

    pub(super) fn step(&mut self) -> Option<Step> {
        (!self.transfer.is_complete()).then(|| self.transfer.read_step(&mut self.units))
    }

    pub(super) fn succeeded(&mut self, length: usize, descriptor: &Descriptor) -> io::Result<()> {
        self.transfer.has_read(length, &mut self.units, descriptor)?;
        if self.transfer.is_complete() {
            self.buffer.copy_from_slice(&self.units[within(self.range, self.widened)]);
        }
        Ok(())
    }

    pub(super) fn into_buffer(self) -> Buffer {
        self.buffer
    }
}

/// What a write through a buffer of whole units does now.
enum Phase {
    /// Reads a unit at the range's edge, then the one at the other edge, where that is needed too.
    Edge { unit: ByteRange, transfer: Transfer, then: Option<ByteRange> },
    /// Writes all units.
    Write(Transfer),
}

/// A write of the whole units around a range.
pub(super) struct Overwrite {
    range: ByteRange,
    widened: ByteRange,
    data: Bytes,
    durable: bool,
    units: Buffer,
    phase: Phase,
}

impl Overwrite {
    pub(super) fn new(
        range: ByteRange,
        data: Bytes,
        durable: bool,
        alignment: u64,
        pool: &BufferPool,
    ) -> Self {
        let widened = range.widened(alignment);
        let units = pool.take(widened.length as usize);
        let [first, last] = edges(range, alignment);
        let phase = Phase::Write(Transfer::new(widened));
        let mut overwrite = Self { range, widened, data, durable, units, phase };
        overwrite.begin(first.or(last), last.filter(|_| first.is_some()));
        overwrite
    }

    /// Goes on to the next edge, or to the write.
    fn begin(&mut self, edge: Option<ByteRange>, then: Option<ByteRange>) {
        self.phase = match edge {
            Some(unit) => Phase::Edge { unit, transfer: Transfer::new(unit), then },
            None => {
                self.units[within(self.range, self.widened)].copy_from_slice(&self.data);
                Phase::Write(Transfer::new(self.widened))
            }
        };
    }

    pub(super) fn step(&mut self) -> Option<Step> {
        match &self.phase {
            Phase::Edge { unit, transfer, .. } => {
                Some(transfer.read_step(&mut self.units[within(*unit, self.widened)]))
            }
            Phase::Write(transfer) => {
                (!transfer.is_complete()).then(|| transfer.write_step(&self.units, self.durable))
            }
        }
    }

    pub(super) fn succeeded(&mut self, length: usize, descriptor: &Descriptor) -> io::Result<()> {
        match &mut self.phase {
            Phase::Edge { unit, transfer, then } => {
                transfer.has_read(length, &mut self.units[within(*unit, self.widened)], descriptor)?;
                if transfer.is_complete() {
                    let next = then.take();
                    self.begin(next, None);
                }
                Ok(())
            }
            Phase::Write(transfer) => transfer.has_written(length),
        }
    }
}

/// The units that hold bytes of the range and others: at its start and, if that is another one, at its end.
fn edges(range: ByteRange, alignment: u64) -> [Option<ByteRange>; 2] {
    let widened = range.widened(alignment);
    let last_start = widened.end().saturating_sub(alignment);
    let first = (range.offset != widened.offset).then(|| ByteRange::new(widened.offset, alignment));
    let last = (range.end() != widened.end()).then(|| ByteRange::new(last_start, alignment));
    [first, last.filter(|last| Some(*last) != first)]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_units_with_other_bytes_are_read_before_a_write() {
        let unit = |offset| Some(ByteRange::new(offset, 4096));
        for (start, end, expected) in [
            (0, 4096, [None, None]),
            (4096, 4096, [None, None]),
            (512, 1024, [unit(0), None]),
            (512, 4096, [unit(0), None]),
            (0, 512, [None, unit(0)]),
            (512, 8704, [unit(0), unit(8192)]),
            (4096, 12800, [None, unit(12288)]),
            (4608, 12288, [unit(4096), None]),
        ] {
            assert_eq!(edges(ByteRange::between(start, end), 4096), expected, "{start}..{end}");
        }
    }
}
