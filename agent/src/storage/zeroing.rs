//! Making a range read as zeroes (W6), in steps of bounded size, in the best way that the file offers.
//!
//! A range whose space may be given back is punched out; else, or where the file can't, it is zeroed in place; and
//! where the file can't do that either, zeroes are written. In every case the range reads as zeroes afterwards: no
//! plain discard is used, which promises nothing. What the file refused is remembered with it, so that each way is
//! tried once. Units at the range's edges that hold other bytes too are read, modified and written.

use super::file::{Descriptor, Kind};
use super::job::{Step, Transfer};
use super::unaligned::Overwrite;
use crate::buffer::BufferPool;
use blockmirror_protocol::ranges::ByteRange;
use bytes::Bytes;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::LazyLock;
use std::sync::atomic::Ordering;

/// The most that one call clears, in bytes: a device that writes the zeroes itself serves others in between.
const LONGEST_CLEAR: u64 = 64 << 20;

/// The most zeroes that one call writes, in bytes.
const LONGEST_WRITE: usize = 1 << 20;

/// Aligned zeroes, shared by all.
static ZEROES: LazyLock<Bytes> = LazyLock::new(|| {
    let mut zeroes = BufferPool::new(0).take(LONGEST_WRITE);
    zeroes.fill(0);
    zeroes.freeze()
});

/// A range on its way to zero: first its edges, then what is between them.
pub(super) struct Zeroing {
    edges: [Option<Overwrite>; 2],
    /// What is left between the edges.
    rest: ByteRange,
    may_unmap: bool,
    call: Call,
}

/// The call that is with the kernel, or would be next.
#[derive(Clone, Copy)]
enum Call {
    Punch,
    ZeroRange,
    Write(Transfer),
}

impl Zeroing {
    pub(super) fn new(range: ByteRange, may_unmap: bool, descriptor: &Descriptor, pool: &BufferPool) -> Self {
        let alignment = descriptor.alignment;
        let range = within_file(range, descriptor);
        let edge = |part: ByteRange| {
            let zeroes = ZEROES.slice(..part.length as usize);
            (!part.is_empty()).then(|| Overwrite::new(part, zeroes, false, alignment, pool))
        };
        let first_whole = range.offset.next_multiple_of(alignment).min(range.end());
        let last_whole = (range.end() - range.end() % alignment).max(first_whole);
        Self {
            edges: [
                edge(ByteRange::between(range.offset, first_whole)),
                edge(ByteRange::between(last_whole, range.end())),
            ],
            rest: ByteRange::between(first_whole, last_whole),
            may_unmap,
            call: Call::Punch,
        }
    }

    /// The best way that the file is not known to refuse.
    fn choose_call(&mut self, descriptor: &Descriptor) {
        self.call = if self.may_unmap && descriptor.punches.load(Ordering::Relaxed) {
            Call::Punch
        } else if descriptor.zeroes_ranges.load(Ordering::Relaxed) {
            Call::ZeroRange
        } else {
            Call::Write(Transfer::new(self.piece(LONGEST_WRITE as u64)))
        };
    }

    /// The part of the rest that a call clears.
    fn piece(&self, longest: u64) -> ByteRange {
        ByteRange::new(self.rest.offset, self.rest.length.min(longest))
    }

    /// The edge that isn't finished yet.
    fn edge(&mut self) -> Option<&mut Overwrite> {
        for edge in &mut self.edges {
            if edge.as_mut().is_some_and(|edge| edge.step().is_none()) {
                *edge = None;
            }
        }
        self.edges.iter_mut().flatten().next()
    }

    pub(super) fn step(&mut self, descriptor: &Descriptor) -> Option<Step> {
        if let Some(edge) = self.edge() {
            return edge.step();
        }
        if self.rest.is_empty() {
            return None;
        }
        let write_goes_on = matches!(self.call, Call::Write(transfer) if !transfer.is_complete());
        if !write_goes_on {
            self.choose_call(descriptor);
        }
        let mode = match self.call {
            Call::Punch => libc::FALLOC_FL_PUNCH_HOLE,
            Call::ZeroRange => libc::FALLOC_FL_ZERO_RANGE,
            Call::Write(transfer) => {
                let length = self.piece(LONGEST_WRITE as u64).length as usize;
                return Some(transfer.write_step(&ZEROES[..length], false));
            }
        };
        Some(Step::Fallocate { mode: mode | libc::FALLOC_FL_KEEP_SIZE, range: self.piece(LONGEST_CLEAR) })
    }

    pub(super) fn succeeded(&mut self, length: usize, descriptor: &Descriptor) -> io::Result<()> {
        if let Some(edge) = self.edge() {
            return edge.succeeded(length, descriptor);
        }
        let cleared = match &mut self.call {
            Call::Punch | Call::ZeroRange => self.piece(LONGEST_CLEAR),
            Call::Write(transfer) => {
                transfer.has_written(length)?;
                if !transfer.is_complete() {
                    return Ok(());
                }
                self.piece(LONGEST_WRITE as u64)
            }
        };
        self.rest = ByteRange::between(cleared.end(), self.rest.end());
        Ok(())
    }

    /// Takes an error: a way that the file doesn't offer gives room to the next one.
    pub(super) fn failed(&mut self, error: io::Error, descriptor: &Descriptor) -> io::Result<()> {
        let refused = matches!(
            error.raw_os_error(),
            Some(libc::EOPNOTSUPP | libc::EINVAL | libc::ENOSYS | libc::EPERM)
        );
        let way = match self.call {
            Call::Punch => &descriptor.punches,
            Call::ZeroRange => &descriptor.zeroes_ranges,
            Call::Write(_) => return Err(error),
        };
        if !refused || self.edge().is_some() {
            return Err(error);
        }
        way.store(false, Ordering::Relaxed);
        Ok(())
    }
}

/// A metadata file reads as zeroes beyond its end and is not made longer for that; a backing is never asked for
/// more than it has.
fn within_file(range: ByteRange, descriptor: &Descriptor) -> ByteRange {
    if descriptor.kind != Kind::Metadata {
        return range;
    }
    // An error means that the size can't be told; then all of the range is cleared, which is right as well.
    let size_bytes = rustix::fs::fstat(&descriptor.fd)
        .map_or(u64::MAX, |status| u64::try_from(status.st_size).unwrap_or(u64::MAX));
    let end = size_bytes.checked_next_multiple_of(descriptor.alignment).unwrap_or(u64::MAX);
    range.intersection(ByteRange::between(0, end)).unwrap_or(ByteRange::new(range.offset, 0))
}

/// Whether a file's space can be given back so that it reads as zeroes, found out without changing its content.
pub(super) fn can_punch_beyond(fd: &impl AsRawFd, size_bytes: u64) -> bool {
    let Ok(offset) = i64::try_from(size_bytes.next_multiple_of(LONGEST_CLEAR)) else { return false };
    let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
    // SAFETY: the call takes no pointers.
    unsafe { libc::fallocate(fd.as_raw_fd(), mode, offset, LONGEST_WRITE as i64) == 0 }
}
