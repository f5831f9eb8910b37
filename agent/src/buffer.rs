//! The agent's one kind of buffer: memory aligned for direct I/O, taken from a pool and given back by itself.
//!
//! A [`Buffer`] is filled once, by the front end or the network, then frozen into [`Bytes`] that the local write and
//! every send share without a copy; the memory returns to its pool when the last of them is dropped, on whatever
//! thread that happens. A buffer's content is not cleared between uses: whoever takes one fills all that it hands on.

use bytes::Bytes;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::alloc::{Layout, handle_alloc_error};
use std::collections::VecDeque;
use std::ffi::c_void;
use std::ops::{Deref, DerefMut};
use std::ptr::{NonNull, null_mut};
use std::sync::{Arc, Mutex};

/// The alignment of every buffer's start, in bytes: enough for direct I/O on any disk.
pub const ALIGNMENT: usize = 4096;

/// Capacities are powers of two from this one on, so that freed memory fits the next request.
const SMALLEST: usize = 4096;
const CLASSES: usize = 16;
/// How much is mapped at a time for buffers that are no larger, in bytes.
const RUN_BYTES: usize = 1 << 20;
/// A pool that keeps less has each buffer mapped by itself: what is left of some runs would fill it.
const SMALLEST_WITH_RUNS: usize = 16 * RUN_BYTES;

/// How many bytes of memory a buffer of `length` bytes takes.
#[must_use]
pub fn capacity_for(length: usize) -> usize {
    length.max(SMALLEST).next_power_of_two()
}

/// A shared pool of aligned memory. Clones are handles to the same pool.
#[derive(Clone)]
pub struct BufferPool {
    shared: Arc<Shared>,
}

struct Shared {
    /// How many free bytes the pool keeps; more goes back to the kernel.
    keep_bytes: usize,
    free: Mutex<Free>,
}

#[derive(Default)]
struct Free {
    bytes: usize,
    /// The last one is used next, and the first one given up.
    by_class: [VecDeque<Memory>; CLASSES],
}

impl BufferPool {
    /// A pool that keeps at most `keep_bytes` of used memory for reuse.
    #[must_use]
    pub fn new(keep_bytes: usize) -> Self {
        Self { shared: Arc::new(Shared { keep_bytes, free: Mutex::default() }) }
    }

    /// A buffer of `length` bytes whose content is unspecified (but initialised).
    #[must_use]
    pub fn take(&self, length: usize) -> Buffer {
        let capacity = capacity_for(length);
        let class = class_of(capacity);
        let reused = (class < CLASSES).then(|| self.shared.lock().take(class)).flatten();
        let memory = reused.unwrap_or_else(|| self.shared.grow(capacity));
        Buffer { memory: Some(memory), length, pool: self.shared.clone() }
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Free> {
        self.free.lock().expect("no holder of the pool's lock panics")
    }

    /// A new piece of memory; small ones are mapped by the run, and what is left of that is free for the next.
    fn grow(&self, capacity: usize) -> Memory {
        let has_runs = self.keep_bytes >= SMALLEST_WITH_RUNS;
        let count = if has_runs { (RUN_BYTES / capacity).max(1) } else { 1 };
        let mut pieces = Run::cut(capacity, count);
        let memory = pieces.pop().expect("a run has a piece");
        if !pieces.is_empty() {
            let mut free = self.lock();
            free.bytes += pieces.len() * capacity;
            free.by_class[class_of(capacity)].extend(pieces);
        }
        memory
    }
}

impl Free {
    fn take(&mut self, class: usize) -> Option<Memory> {
        let memory = self.by_class[class].pop_back()?;
        self.bytes -= memory.capacity;
        Some(memory)
    }

    /// Keeps memory for reuse, and gives what is too much then: memory of other sizes first, because it is this size that
    /// is in use. A piece that isn't kept stays mapped until all of its run is given up, so it must not happen to each.
    fn put(&mut self, memory: Memory, keep_bytes: usize) -> Vec<Memory> {
        let class = class_of(memory.capacity);
        let mut too_much = Vec::new();
        if class >= CLASSES || memory.capacity > keep_bytes {
            return vec![memory];
        }
        while self.bytes + memory.capacity > keep_bytes {
            let mut others = (0..CLASSES).rev().filter(|other| *other != class);
            let Some(other) = others.find_map(|other| self.by_class[other].pop_front()) else {
                too_much.push(memory);
                return too_much;
            };
            self.bytes -= other.capacity;
            too_much.push(other);
        }
        self.bytes += memory.capacity;
        self.by_class[class].push_back(memory);
        too_much
    }
}

fn class_of(capacity: usize) -> usize {
    (capacity / SMALLEST).trailing_zeros() as usize
}

/// Memory of the kernel, cut into pieces of one size. It goes back when the last piece is dropped.
///
/// The general allocator keeps a header before each piece of memory, which costs a whole page where pieces are aligned
/// to pages: buffers of 4 KiB would take twice their size.
struct Run {
    start: NonNull<c_void>,
    bytes: usize,
}

// SAFETY: the memory is owned by this value and its pieces alone, and any thread may give it back.
unsafe impl Send for Run {}
// SAFETY: shared references give no access to the memory.
unsafe impl Sync for Run {}

impl Run {
    /// `count` pieces of `capacity` bytes, a power of two from [`SMALLEST`] on. They take no memory before they are
    /// written to.
    fn cut(capacity: usize, count: usize) -> Vec<Memory> {
        let bytes = capacity * count;
        let (protection, flags) = (ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE);
        // SAFETY: a new mapping at a place of the kernel's choice replaces nothing.
        let mapped = unsafe { mmap_anonymous(null_mut(), bytes, protection, flags) };
        let start = mapped.ok().and_then(NonNull::new).unwrap_or_else(|| {
            handle_alloc_error(
                Layout::from_size_align(bytes, ALIGNMENT).expect("a run is shorter than memory"),
            )
        });
        let run = Arc::new(Self { start, bytes });
        let piece = |index| {
            // SAFETY: the piece lies within the mapping.
            let start = unsafe { start.cast::<u8>().add(index * capacity) };
            Memory { start, capacity, run: run.clone() }
        };
        (0..count).map(piece).collect()
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // SAFETY: mapped in `cut` with this length, and no piece is left.
        let unmapped = unsafe { munmap(self.start.as_ptr(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

/// A piece of a run, which is never handed out twice.
struct Memory {
    start: NonNull<u8>,
    capacity: usize,
    /// Mapped as long as this is.
    #[cfg_attr(not(test), expect(dead_code, reason = "it is kept to be dropped"))]
    run: Arc<Run>,
}

// SAFETY: the memory belongs to this value alone.
unsafe impl Send for Memory {}
// SAFETY: shared references give no access to the memory.
unsafe impl Sync for Memory {}

/// Aligned memory with one owner.
pub struct Buffer {
    memory: Option<Memory>,
    length: usize,
    pool: Arc<Shared>,
}

impl Buffer {
    /// Makes the content immutable and shareable; the memory returns to the pool with the last clone.
    #[must_use]
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }

    /// Shortens the buffer to its first `length` bytes.
    ///
    /// # Panics
    /// When it is shorter than that.
    pub fn truncate(&mut self, length: usize) {
        assert!(length <= self.length, "a buffer is only ever shortened");
        self.length = length;
    }

    fn start(&self) -> NonNull<u8> {
        self.memory.as_ref().expect("a buffer has its memory until it is dropped").start
    }
}

impl Deref for Buffer {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: `length` is at most the capacity, all of which is initialised and owned by this buffer.
        unsafe { std::slice::from_raw_parts(self.start().as_ptr(), self.length) }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as for `deref`, and the buffer is borrowed mutably.
        unsafe { std::slice::from_raw_parts_mut(self.start().as_ptr(), self.length) }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self
    }
}

impl std::fmt::Debug for Buffer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Buffer({} bytes)", self.length)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let memory = self.memory.take().expect("a buffer is dropped once");
        let too_much = self.pool.lock().put(memory, self.pool.keep_bytes);
        // Without the lock: it may go back to the kernel.
        drop(too_much);
    }
}

/// Whether all bytes are zero. A machine word at a time, so that it costs next to nothing beside the read.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // SAFETY: every bit pattern is a valid u128.
    let (head, words, tail) = unsafe { bytes.align_to::<u128>() };
    let edges = head.iter().chain(tail).all(|byte| *byte == 0);
    edges && words.chunks(64).all(|chunk| chunk.iter().fold(0, |any, word| any | word) == 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn memory_is_aligned_and_comes_back_with_the_last_clone() {
        let pool = BufferPool::new(1 << 20);
        let mut buffer = pool.take(5000);
        assert_eq!((buffer.len(), buffer.as_ptr() as usize % ALIGNMENT), (5000, 0));
        buffer.fill(7);
        let start = buffer.as_ptr();
        let bytes = buffer.freeze();
        let slice = bytes.slice(4096..5000);
        drop(bytes);
        assert!(slice.iter().all(|byte| *byte == 7));
        drop(slice);
        assert_eq!(pool.take(8192).as_ptr(), start, "the same memory serves the next request of its class");
    }

    #[test]
    fn a_pool_keeps_no_more_than_it_was_told() {
        let pool = BufferPool::new(8192);
        drop([pool.take(4096), pool.take(4096), pool.take(4096), pool.take(1 << 31)]);
        assert_eq!(pool.shared.lock().bytes, 8192);
    }

    #[test]
    fn small_buffers_lie_side_by_side() {
        let pool = BufferPool::new(SMALLEST_WITH_RUNS);
        let mut buffers: Vec<Buffer> = (0..RUN_BYTES / SMALLEST).map(|_| pool.take(512)).collect();
        let mut starts: Vec<usize> = buffers.iter().map(|buffer| buffer.as_ptr() as usize).collect();
        starts.sort_unstable();
        assert!(starts.windows(2).all(|pair| pair[1] - pair[0] == SMALLEST), "{starts:x?}");
        assert_eq!(pool.shared.lock().bytes, 0);
        for (index, buffer) in (0u32..).zip(&mut buffers) {
            buffer.fill(index as u8);
        }
        let second_run = pool.take(512);
        assert!(
            buffers.iter().zip(0u32..).all(|(buffer, index)| buffer.iter().all(|byte| *byte == index as u8))
        );
        drop((buffers, second_run));
        assert_eq!(pool.shared.lock().bytes, 2 * RUN_BYTES);
    }

    #[test]
    fn what_is_in_use_is_kept_in_place_of_what_was() {
        let pool = BufferPool::new(SMALLEST_WITH_RUNS);
        let large: Vec<Buffer> = (0..16).map(|_| pool.take(1 << 20)).collect();
        drop(large);
        assert_eq!(pool.shared.lock().bytes, SMALLEST_WITH_RUNS);
        // One in ten stays, as in a window that a replica doesn't acknowledge.
        let mut window = Vec::new();
        for _ in 0..2000 {
            let reads: Vec<Buffer> = (0..9).map(|_| pool.take(4096)).collect();
            window.push(pool.take(4096));
            drop(reads);
        }
        let runs =
            window.iter().map(|buffer| Arc::as_ptr(&buffer.memory.as_ref().expect("it has memory").run));
        let runs = runs.collect::<HashSet<_>>().len();
        assert!(runs <= window.len() * 4096 / RUN_BYTES + 2, "{runs} runs for {} pieces", window.len());
        let kept = pool.shared.lock().bytes;
        assert!(kept <= SMALLEST_WITH_RUNS, "{kept}");
    }
}
