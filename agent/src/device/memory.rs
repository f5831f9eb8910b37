//! A volume in memory, for the tests of the front ends: it holds only what was written, remembers what it was asked
//! for, and insists on what a volume may rely on.

use super::{Answer, Command, Errno, Geometry, Part, Request, Volume};
use crate::buffer::{Buffer, BufferPool};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::SECTOR_BYTES;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};

const BLOCK_BYTES: u64 = 4096;

/// A volume in memory. Clones are handles to the same one, and may be on other threads.
#[derive(Clone)]
pub struct Memory {
    geometry: Geometry,
    pool: BufferPool,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    blocks: HashMap<u64, Box<[u8]>>,
    seen: Seen,
    failure: Option<Errno>,
}

/// What a volume was asked for so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Seen {
    /// How many reads.
    pub reads: usize,
    /// How many writes.
    pub writes: usize,
    /// How many flushes.
    pub flushes: usize,
    /// The ranges that were to be zeroed, and whether their space may be given back.
    pub zeroed: Vec<(ByteRange, bool)>,
}

impl Memory {
    /// A volume of zeroes.
    pub fn new(size_bytes: u64, read_only: bool, pool: BufferPool) -> Self {
        let geometry = Geometry { size_bytes, read_only, preferred_bytes: 4096 };
        Self { geometry, pool, state: Arc::default() }
    }

    /// What was asked for so far.
    pub fn seen(&self) -> Seen {
        self.lock().seen.clone()
    }

    /// From now on everything fails with this error, or nothing.
    pub fn fail(&self, failure: Option<Errno>) {
        self.lock().failure = failure;
    }

    /// Another volume with the same content.
    pub fn copy(&self, read_only: bool) -> Self {
        let copy = Self::new(self.geometry.size_bytes, read_only, self.pool.clone());
        copy.lock().blocks = self.lock().blocks.clone();
        copy
    }

    /// The content of a range.
    pub fn read(&self, range: ByteRange) -> Buffer {
        let mut buffer = self.pool.take(range.length as usize);
        self.lock().read(range, &mut buffer);
        buffer
    }

    /// Puts content there, past all front ends.
    pub fn write(&self, offset: u64, data: &[u8]) {
        self.lock().write(offset, data);
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of the lock panics")
    }

    fn check(&self, range: ByteRange) {
        assert!(range.is_aligned(SECTOR_BYTES), "{range:?} is not aligned");
        assert!(range.end() <= self.geometry.size_bytes, "{range:?} is beyond the end");
        assert!(!range.is_empty(), "{range:?} is empty");
    }

    fn check_write(&self, range: ByteRange) {
        self.check(range);
        assert!(!self.geometry.read_only, "{range:?} is written on a read-only volume");
    }

    fn answer(&self, command: Command) -> Result<Answer, Errno> {
        if let Some(failure) = self.lock().failure {
            return Err(failure);
        }
        match command {
            Command::Read(range) => {
                self.check(range);
                self.lock().seen.reads += 1;
                return Ok(Answer::Data(self.read(range)));
            }
            Command::Write { offset, data, fua: _ } => {
                self.check_write(ByteRange::new(offset, data.len() as u64));
                assert!(
                    (data.as_ptr() as usize).is_multiple_of(SECTOR_BYTES as usize),
                    "data is not aligned"
                );
                let mut state = self.lock();
                state.seen.writes += 1;
                state.write(offset, &data);
            }
            Command::Zero { range, may_unmap, fua: _ } => {
                self.check_write(range);
                let mut state = self.lock();
                state.seen.zeroed.push((range, may_unmap));
                state.zero(range);
            }
            Command::Flush => self.lock().seen.flushes += 1,
            Command::Allocation(range) => {
                self.check(range);
                return Ok(Answer::Allocation(self.lock().allocation(range)));
            }
        }
        Ok(Answer::Done)
    }
}

impl Volume for Memory {
    fn geometry(&self) -> Geometry {
        self.geometry
    }

    fn submit(&self, request: Request) {
        let memory = self.clone();
        tokio::task::spawn_local(async move {
            request.reply.complete(request.cookie, memory.answer(request.command));
        });
    }
}

impl State {
    fn read(&self, range: ByteRange, target: &mut [u8]) {
        for part in range.split_at_multiples(BLOCK_BYTES) {
            let target = &mut target[(part.offset - range.offset) as usize..][..part.length as usize];
            match self.blocks.get(&(part.offset / BLOCK_BYTES)) {
                Some(block) => target.copy_from_slice(&block[within(part)]),
                None => target.fill(0),
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        for part in ByteRange::new(offset, data.len() as u64).split_at_multiples(BLOCK_BYTES) {
            let source = &data[(part.offset - offset) as usize..][..part.length as usize];
            let empty = || vec![0; BLOCK_BYTES as usize].into();
            let block = self.blocks.entry(part.offset / BLOCK_BYTES).or_insert_with(empty);
            block[within(part)].copy_from_slice(source);
        }
    }

    fn zero(&mut self, range: ByteRange) {
        self.blocks.retain(|index, block| {
            let whole = ByteRange::new(index * BLOCK_BYTES, BLOCK_BYTES);
            let Some(shared) = whole.intersection(range) else { return true };
            block[within(shared)].fill(0);
            shared != whole
        });
    }

    fn allocation(&self, range: ByteRange) -> Vec<Part> {
        let mut parts: Vec<Part> = Vec::new();
        for part in range.split_at_multiples(BLOCK_BYTES) {
            let hole = !self.blocks.contains_key(&(part.offset / BLOCK_BYTES));
            match parts.last_mut() {
                Some(last) if last.hole == hole => last.length += part.length,
                _ => parts.push(Part { length: part.length, hole }),
            }
        }
        parts
    }
}

/// Where in its block a part is that lies in one.
fn within(part: ByteRange) -> std::ops::Range<usize> {
    let start = (part.offset % BLOCK_BYTES) as usize;
    start..start + part.length as usize
}
