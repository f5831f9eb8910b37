//! The requests that the kernel handed over and that are not answered, in memory that outlives the process (S1, S2).
//!
//! The kernel forgets what a process did with a request that it read from `/dev/fuse`; it waits for the answer, from
//! whoever has that descriptor. So each request is read straight into a slot of this table, and the table is kept
//! together with the descriptor. The successor of an agent that ended finds in it what is unanswered, executes that in the
//! old order, and only then reads what is new.
//!
//! **A slot** holds a request while the first word of its head, the request's length, is not zero. It is zero before the
//! kernel fills the head, in the very call that takes the request off the kernel's queue, and is made zero again when the
//! answer has been written. Whenever the process ends, a request is therefore in the kernel's queue, or in a slot, or
//! answered. All pages that the kernel writes to are in memory before: where it had to find one, and the process was being
//! killed, it would fail the request.
//!
//! **What was answered is not executed again after something newer** (S2). These hold:
//! 1. Slots carry sequence numbers in the order in which their requests were read.
//! 2. An answer is written, and the slot cleared, without anything being read in between: one thread does both.
//! 3. A write that is answered stays in the table, as *answered*, while an older write that overlaps it is there; it does
//!    not matter whether that one is answered.
//!
//! The successor executes everything in the table in the order of the numbers, before it reads anything. Let W be a write
//! in the table whose answer may have arrived: the process ended between writing the answer and clearing the slot. Whatever
//! was issued in the knowledge of that answer was not read (2), so it is executed after W. Let N be a newer write that
//! overlaps W and was executed: it was issued without that knowledge, and is in the table still (3), so it is executed again
//! after W. So each byte ends with what the last write to it brought, in the order in which they were read (W1). An answer to
//! a request that was answered already is refused by the kernel, which knows no such request any more.
//! Reads, and flushes, may be executed any number of times.
//!
//! **What this does not cover**: of two overlapping writes that are both unanswered, the volume may execute the newer one first,
//! where the older one waits for the activity log. Whoever had them under way at the same time, and read the older one's
//! content after both, finds the newer one's after a kill. File systems have no two such writes under way.
//!
//! **Payloads** are read into blocks of the same memory. A small one is copied into a small block, then the slot is made
//! to say so in one store; a large one stays where it was read. Disks and replicas take the payload from the block, unless
//! too many are in use: then from a copy, so that a slow replica does not keep the kernel's requests out.
//!
//! The memory can't be swapped out, where the kernel knows how (6.4): the swap space may lie on this very device.

mod blocks;
mod layout;
mod memory;
#[cfg(test)]
mod tests;

use super::kernel::{self, Call, Head, Malformed, Session};
use crate::buffer::BufferPool;
use blockmirror_protocol::ranges::ByteRange;
use blocks::{Block, Blocks, Class, Payload};
use bytes::Bytes;
pub use layout::SLOTS;
use layout::{Place, Stage};
use memory::Memory;
use std::collections::BTreeMap;
use std::io::{self, IoSliceMut};
use std::os::fd::{BorrowedFd, OwnedFd};
use std::sync::Arc;

/// A write of up to so many bytes is copied out of the block that it was read into, which is large enough for any
/// request. So it does not take up such a block while it is on its way to disks and replicas. Up to here the copy was
/// measured to cost no throughput.
const COPIED_BYTES: usize = layout::SMALL_BYTES;

/// What a device is: a successor must serve the same.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The volume.
    pub volume: [u8; 16],
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Whether writes are refused.
    pub read_only: bool,
}

/// Why a table can't be taken over.
#[derive(Debug, thiserror::Error)]
pub enum TakeOverError {
    /// It is none.
    #[error("what is kept is no table of requests")]
    Foreign,
    /// A newer version made it.
    #[error(
        "the table of requests is of version {found}, this agent reads up to {known}; start the newer agent again"
    )]
    Newer {
        /// Its version.
        found: u32,
        /// The newest that is read.
        known: u32,
    },
    /// It contradicts itself.
    #[error("the table of requests is damaged: {0}")]
    Damaged(&'static str),
    /// It is that of another device.
    #[error("the device that is kept is not this one: {0}")]
    Other(&'static str),
    /// The memory can't be had.
    #[error("cannot use the table of requests")]
    Io(#[from] io::Error),
}

/// Where a request is in the table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Slot(usize);

impl Slot {
    /// Its number, as a cookie for the volume.
    #[must_use]
    pub fn cookie(self) -> u64 {
        self.0 as u64
    }

    /// Its number, below [`SLOTS`].
    #[must_use]
    pub fn index(self) -> usize {
        self.0
    }

    /// The slot of a cookie.
    ///
    /// # Panics
    /// When it is none.
    #[must_use]
    pub fn of(cookie: u64) -> Self {
        let slot = usize::try_from(cookie).ok().filter(|slot| *slot < SLOTS);
        Self(slot.expect("a cookie is the number of a slot"))
    }
}

/// A request in the table.
#[derive(Clone, Copy, Debug)]
pub struct Arrived {
    /// Where it is.
    pub slot: Slot,
    /// The kernel's number for it.
    pub unique: u64,
    /// What is asked, if that can be understood.
    pub call: Result<Call, Malformed>,
    /// Whether the kernel waits for the answer, as far as that is known. Otherwise it is executed again only for those
    /// that are older.
    pub is_awaited: bool,
}

/// What is known of a slot that holds a request.
#[derive(Default)]
struct Held {
    sequence: u64,
    payload: Option<Arc<Block>>,
    /// It was executed and answered, and stays for an older one.
    is_answered: bool,
}

/// The table of one device.
pub struct Table {
    memory: Arc<Memory>,
    blocks: Arc<Blocks>,
    held: Vec<Held>,
    /// No slab: a request may have any slot of the memory that a predecessor left, and there are never more.
    free: Vec<Slot>,
    next_sequence: u64,
    /// Where the next payload is read into.
    inbox: Option<Arc<Block>>,
    /// The writes in the table, by sequence number.
    writes: BTreeMap<u64, (Slot, ByteRange)>,
    /// How many of them are answered.
    answered: usize,
}

impl Table {
    /// An empty one.
    ///
    /// # Errors
    /// When no memory can be had.
    pub fn new(identity: Identity) -> io::Result<Self> {
        let memory = Arc::new(Memory::create(layout::TABLE_BYTES)?);
        memory.write_header(layout::Header::new(identity));
        Ok(Self::empty(memory))
    }

    fn empty(memory: Arc<Memory>) -> Self {
        Self {
            blocks: Blocks::new(memory.clone()),
            memory,
            held: (0..SLOTS).map(|_| Held::default()).collect(),
            free: (0..SLOTS).rev().map(Slot).collect(),
            next_sequence: 1,
            inbox: None,
            writes: BTreeMap::new(),
            answered: 0,
        }
    }

    /// Takes over the table that an agent left, and gives what is in it, the oldest first.
    ///
    /// # Errors
    /// [`TakeOverError`]; the table is as it was.
    pub fn take_over(file: OwnedFd, identity: Identity) -> Result<(Self, Vec<Arrived>), TakeOverError> {
        let memory = Memory::open(file, layout::TABLE_BYTES)?;
        memory.read_header()?.check(identity)?;
        let mut table = Self::empty(Arc::new(memory));
        table.session().transpose().map_err(|()| TakeOverError::Damaged("what was agreed on"))?;
        let mut found = Vec::new();
        for slot in (0..SLOTS).map(Slot) {
            if table.memory.length(slot.0) > 0 {
                found.push(table.find(slot)?);
            }
        }
        table.free.retain(|slot| table.memory.length(slot.0) == 0);
        found.sort_by_key(|arrived| table.held[arrived.slot.0].sequence);
        let sequence = |arrived: &Arrived| table.held[arrived.slot.0].sequence;
        if found.windows(2).any(|pair| sequence(&pair[0]) == sequence(&pair[1])) {
            return Err(TakeOverError::Damaged("two requests with one number"));
        }
        table.next_sequence = found.last().map_or(1, |last| sequence(last) + 1);
        Ok((table, found))
    }

    /// What a slot of an earlier agent holds.
    fn find(&mut self, slot: Slot) -> Result<Arrived, TakeOverError> {
        let state = self.memory.state(slot.0);
        let stage = Stage::of(state.stage).ok_or(TakeOverError::Damaged("a request's stage"))?;
        let place = Place::of(state.place).ok_or(TakeOverError::Damaged("the place of a payload"))?;
        if state.sequence == 0 || state.sequence == u64::MAX {
            return Err(TakeOverError::Damaged("a request's number"));
        }
        let arrived = self.parse(slot, self.memory.length(slot.0) as usize, stage != Stage::Answered);
        self.held[slot.0] = Held { sequence: state.sequence, payload: None, is_answered: false };
        if let Ok(Call::Write { length, .. }) = arrived.call {
            let (class, index) = place.block().ok_or(TakeOverError::Damaged("a write without a payload"))?;
            let block = Some(length as usize).filter(|length| *length <= class.bytes());
            let block = block.and_then(|_| self.blocks.claim(class, index));
            let block = block.ok_or(TakeOverError::Damaged("two payloads at one place"))?;
            self.held[slot.0].payload = Some(block);
        }
        Ok(arrived)
    }

    /// The memory, to be kept.
    #[must_use]
    pub fn file(&self) -> BorrowedFd<'_> {
        self.memory.file()
    }

    /// What was agreed on with the kernel, once that has happened; an error where that is none of what this version agrees
    /// on.
    #[must_use]
    pub fn session(&self) -> Option<Result<Session, ()>> {
        let kept = self.memory.session()?;
        Some(Session::of(kept).ok_or(()))
    }

    /// Notes what is agreed on, before the kernel is told.
    pub fn agree(&self, session: Session) {
        self.memory.set_session(session.to_keep());
    }

    /// Where the next request is to be read into; nothing while the table is full.
    pub fn inbox(&mut self) -> Option<[IoSliceMut<'_>; 2]> {
        let slot = *self.free.last()?;
        if self.inbox.is_none() {
            self.inbox = Some(self.blocks.take(Class::Large)?);
        }
        let block = self.inbox.as_ref()?;
        self.memory.prepare(slot.0, self.next_sequence, Place::In(Class::Large, block.index()));
        // SAFETY: the slot is free and the block this table's alone, and both slices end before either is used again.
        unsafe { Some([IoSliceMut::new(self.memory.head_mut(slot.0)), IoSliceMut::new(block.bytes_mut())]) }
    }

    /// Waits until a block is free, where [`Self::inbox`] gave nothing for want of one.
    pub fn room(&self) -> impl Future<Output = ()> + 'static {
        let blocks = self.blocks.clone();
        async move { blocks.room().await }
    }

    /// A request was read into the inbox.
    pub fn arrived(&mut self, received: usize) -> Arrived {
        let slot = self.free.pop().expect("it was read into a free slot");
        self.held[slot.0] = Held { sequence: self.next_sequence, payload: None, is_answered: false };
        self.next_sequence += 1;
        self.parse(slot, received, true)
    }

    /// Nothing came of reading into the inbox; what the kernel may have begun to write there is no request.
    pub fn nothing_arrived(&mut self) {
        if let Some(slot) = self.free.last() {
            self.memory.clear(slot.0);
        }
    }

    fn parse(&self, slot: Slot, received: usize, is_awaited: bool) -> Arrived {
        let head = self.memory.head(slot.0);
        let parsed = kernel::parse(&head, received);
        Arrived {
            slot,
            unique: kernel::unique(&head),
            call: parsed.map(|received| received.call),
            is_awaited,
        }
    }

    /// The request in this slot is executed, and changes this range.
    pub fn note_write(&mut self, slot: Slot, range: ByteRange) {
        self.writes.insert(self.held[slot.0].sequence, (slot, range));
    }

    /// The payload of a write. Taken once.
    pub fn payload(&mut self, slot: Slot, length: usize, pool: &BufferPool) -> Bytes {
        let block = match self.held[slot.0].payload.clone() {
            Some(block) => block,
            None => self.keep_payload(slot, length),
        };
        if self.blocks.is_plenty(block.class()) {
            return Payload::new(block, length).into_bytes();
        }
        let mut copy = pool.take(length);
        // SAFETY: nobody writes to a block whose slot holds a write.
        copy.copy_from_slice(unsafe { block.bytes(length) });
        copy.freeze()
    }

    /// Sees to it that the inbox can be read into again.
    fn keep_payload(&mut self, slot: Slot, length: usize) -> Arc<Block> {
        let inbox = self.inbox.take().expect("the payload was read into it");
        let block = if length <= COPIED_BYTES {
            let small =
                self.blocks.take(Class::Small).expect("there are more of them than slots and lent ones");
            // SAFETY: both blocks are this table's alone: the small one was free, the inbox is not yet read into again.
            unsafe { small.bytes_mut()[..length].copy_from_slice(inbox.bytes(length)) };
            self.memory.set_place(slot.0, Place::In(Class::Small, small.index()));
            self.inbox = Some(inbox);
            small
        } else {
            inbox
        };
        self.held[slot.0].payload = Some(block.clone());
        block
    }

    /// An answer to the request in this slot is written now.
    pub fn begin_answer(&self, slot: Slot) {
        self.memory.set_stage(slot.0, Stage::Answering);
    }

    /// The answer was written, or none is due: it leaves the table, unless an older write overlaps it.
    pub fn end_answer(&mut self, slot: Slot) {
        if self.has_older_below(slot) {
            self.memory.set_stage(slot.0, Stage::Answered);
            self.held[slot.0].is_answered = true;
            self.answered += 1;
            return;
        }
        self.clear(slot);
        if self.answered > 0 {
            self.clear_answered();
        }
    }

    /// Whether an older write in the table overlaps this one.
    fn has_older_below(&self, slot: Slot) -> bool {
        let sequence = self.held[slot.0].sequence;
        let Some((_, range)) = self.writes.get(&sequence) else { return false };
        self.writes.range(..sequence).any(|(_, (_, older))| older.overlaps(*range))
    }

    /// Clears those that were answered and are not needed any more.
    fn clear_answered(&mut self) {
        let answered: Vec<Slot> = self
            .writes
            .values()
            .map(|(slot, _)| *slot)
            .filter(|slot| self.held[slot.0].is_answered)
            .collect();
        for slot in answered {
            if !self.has_older_below(slot) {
                self.answered -= 1;
                self.clear(slot);
            }
        }
    }

    fn clear(&mut self, slot: Slot) {
        self.memory.clear(slot.0);
        let held = std::mem::take(&mut self.held[slot.0]);
        self.writes.remove(&held.sequence);
        self.free.push(slot);
        if self.free.len() == 1 {
            self.blocks.tell_room();
        }
    }

    /// How many requests are in the table.
    #[cfg(test)]
    fn count(&self) -> usize {
        SLOTS - self.free.len()
    }
}

const _: () = assert!(size_of::<Head>() <= layout::HEAD_BYTES);
