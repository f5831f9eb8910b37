//! The blocks of the table that payloads lie in: which are free, and who uses the others.
//!
//! A block is used by the slot whose request's payload it holds, and by all to whom the payload was lent: disks and
//! replicas, on any thread. It is free when the last of them has let go.

use super::layout::{LARGE_BLOCKS, LARGE_BYTES, SLOTS, SMALL_BLOCKS, SMALL_BYTES, block_at};
use super::memory::Memory;
use bytes::Bytes;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::mm::{Advice, madvise};
use std::sync::{Arc, Mutex, MutexGuard};
use tokio::sync::Notify;

/// A size of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Class {
    Small,
    Large,
}

impl Class {
    pub(super) const fn bytes(self) -> usize {
        match self {
            Self::Small => SMALL_BYTES,
            Self::Large => LARGE_BYTES,
        }
    }

    pub(super) const fn count(self) -> usize {
        match self {
            Self::Small => SMALL_BLOCKS,
            Self::Large => LARGE_BLOCKS,
        }
    }

    /// So many are kept for requests to come: payloads are lent only while more are free. Of the small ones, one for each
    /// slot; of the large ones, as many as the loop driver has under way.
    const fn reserve(self) -> usize {
        match self {
            Self::Small => SLOTS,
            Self::Large => 128,
        }
    }

    /// So many free ones keep the memory that they had; together they take no more than 64 MiB.
    const fn warm(self) -> usize {
        (32 << 20) / self.bytes()
    }
}

/// The blocks of a table's memory that are taken, and those that are free.
pub(super) struct Blocks {
    memory: Arc<Memory>,
    free: Mutex<[Free; 2]>,
    /// Told when there is room where there was none.
    room: Notify,
}

struct Free {
    class: Class,
    /// The last one is used next. No slab: the blocks lie in shared memory, and a successor finds some in use.
    indices: Vec<usize>,
    /// Which blocks have memory, and how many of the free ones do.
    has_memory: Vec<bool>,
    warm: usize,
}

impl Free {
    fn new(class: Class) -> Self {
        let indices = (0..class.count()).rev().collect();
        Self { class, indices, has_memory: vec![false; class.count()], warm: 0 }
    }

    fn take(&mut self) -> Option<usize> {
        let index = self.indices.pop()?;
        self.warm -= usize::from(self.has_memory[index]);
        Some(index)
    }
}

impl Blocks {
    pub(super) fn new(memory: Arc<Memory>) -> Arc<Self> {
        let free = [Free::new(Class::Small), Free::new(Class::Large)];
        Arc::new(Self { memory, free: Mutex::new(free), room: Notify::new() })
    }

    fn lock(&self) -> MutexGuard<'_, [Free; 2]> {
        self.free.lock().expect("no holder of the lock panics")
    }

    /// A free block. All of a large one is in memory.
    pub(super) fn take(self: &Arc<Self>, class: Class) -> Option<Arc<Block>> {
        let (index, has_memory) = {
            let free = &mut self.lock()[class as usize];
            let index = free.take()?;
            (index, std::mem::replace(&mut free.has_memory[index], true))
        };
        let block = Block { blocks: self.clone(), class, index };
        if class == Class::Large && !has_memory {
            block.fill();
        }
        Some(Arc::new(block))
    }

    /// A block that is used already, if it is free.
    pub(super) fn claim(self: &Arc<Self>, class: Class, index: usize) -> Option<Arc<Block>> {
        let free = &mut self.lock()[class as usize];
        let at = free.indices.iter().position(|free| *free == index)?;
        free.indices.remove(at);
        let block = Block { blocks: self.clone(), class, index };
        // What it holds stays. The rest of it may never have been mapped in this process.
        free.has_memory[index] = block.populate();
        Some(Arc::new(block))
    }

    /// Whether so many are free that payloads can be lent.
    pub(super) fn is_plenty(&self, class: Class) -> bool {
        self.lock()[class as usize].indices.len() > class.reserve()
    }

    pub(super) async fn room(&self) {
        self.room.notified().await;
    }

    pub(super) fn tell_room(&self) {
        self.room.notify_one();
    }

    fn give_back(&self, class: Class, index: usize) {
        let free = &mut self.lock()[class as usize];
        let is_first = free.indices.is_empty();
        if free.warm >= free.class.warm() && self.drop_memory(class, index) {
            free.has_memory[index] = false;
            // Used when no other is left.
            free.indices.insert(0, index);
        } else {
            free.warm += usize::from(free.has_memory[index]);
            free.indices.push(index);
        }
        if is_first {
            self.tell_room();
        }
    }

    /// Gives a free block's memory back to the kernel. Says whether that was possible.
    fn drop_memory(&self, class: Class, index: usize) -> bool {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        let (offset, length) = (block_at(class, index) as u64, class.bytes() as u64);
        fallocate(self.memory.file(), flags, offset, length).is_ok()
    }
}

/// A block that is in use.
pub(super) struct Block {
    blocks: Arc<Blocks>,
    class: Class,
    index: usize,
}

impl Block {
    pub(super) fn class(&self) -> Class {
        self.class
    }

    pub(super) fn index(&self) -> usize {
        self.index
    }

    fn start(&self) -> *mut u8 {
        self.blocks.memory.at(block_at(self.class, self.index)).as_ptr()
    }

    /// Its first bytes.
    ///
    /// # Safety
    /// Nobody writes to it while the slice lives.
    pub(super) unsafe fn bytes(&self, length: usize) -> &[u8] {
        assert!(length <= self.class.bytes(), "a payload fits its block");
        // SAFETY: it lies within the mapping; the rest is the caller's to know.
        unsafe { std::slice::from_raw_parts(self.start(), length) }
    }

    /// All of it, to be written to.
    ///
    /// # Safety
    /// Nothing else reads or writes it while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "the memory is shared; the caller says why nobody else uses it")]
    pub(super) unsafe fn bytes_mut(&self) -> &mut [u8] {
        // SAFETY: it lies within the mapping; the rest is the caller's to know.
        unsafe { std::slice::from_raw_parts_mut(self.start(), self.class.bytes()) }
    }

    /// Has the kernel find memory for all of it, and map it. Says whether it could.
    fn populate(&self) -> bool {
        // SAFETY: the block is mapped, and the advice changes no content.
        unsafe { madvise(self.start().cast(), self.class.bytes(), Advice::LinuxPopulateWrite) }.is_ok()
    }

    /// The same, on any kernel, for a block that was free.
    fn fill(&self) {
        if !self.populate() {
            // SAFETY: the block was free: nobody reads or writes it.
            unsafe { self.bytes_mut() }.fill(0);
        }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        self.blocks.give_back(self.class, self.index);
    }
}

/// A payload that is lent.
pub(super) struct Payload {
    block: Arc<Block>,
    length: usize,
}

impl Payload {
    pub(super) fn new(block: Arc<Block>, length: usize) -> Self {
        Self { block, length }
    }

    pub(super) fn into_bytes(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Payload {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: a payload is not written to any more, and its block is not free before this is dropped.
        unsafe { self.block.bytes(self.length) }
    }
}
