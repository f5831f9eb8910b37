//! Copying dirty blocks to one replica while the volume is in use (R1-R5, D2).
//!
//! A copy goes through: *picked* (its blocks are dirty, no write to them is unfinished here, no other copy of them is
//! under way), *reading*, *sent*, *durable on the replica*; only then are its bits cleared, except for blocks that
//! were written after it was picked. A write that finds its block dirty only marks it and is remembered in the copy.
//!
//! The dirty map itself is the resumption point: what was copied is clean, so an interrupted resync goes on where it
//! was (R5).

use crate::dirty_map::DirtyMap;
use crate::order::Order;
use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use crate::units::{BlockSize, Time};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;
use std::time::Duration;

/// How many bytes one copy holds at most.
const COPY_BYTES: u64 = 1 << 20;
/// How many bytes of copies may be under way when no application waits.
const IDLE_BYTES: u64 = 32 << 20;
/// How many bytes of copies may be under way while an application's write waits (R3).
const BUSY_BYTES: u64 = 4 << 20;
/// How many copies may be under way, whatever their size.
const COPIES: usize = 512;
/// How long a range whose local read failed is left alone.
const READ_RETRY: Duration = Duration::from_secs(5);
/// How long a stretch the rate is measured over.
const RATE_WINDOW: Duration = Duration::from_secs(2);

/// Names a read of a copy. Never used twice for one replica, so that a read of a lost link is not taken for a new one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct CopyRead(pub u64);

/// What the read of a copy gave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CopyContent {
    /// Bytes that are not all zero.
    Data,
    /// Only zeroes (R4).
    Zero,
    /// The local disk failed to read.
    Failed,
}

/// How far a resync is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// Bytes copied and durable on the replica.
    pub done_bytes: u64,
    /// Those and what is still dirty.
    pub total_bytes: u64,
    /// Bytes a second, over the last seconds.
    pub rate_bytes: u64,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Resync {
    block_size: BlockSize,
    size_bytes: u64,
    /// Where the search for dirty blocks goes on.
    cursor: u64,
    reading: BTreeMap<CopyRead, Copy>,
    /// In the order of their numbers; the first has number `first_number`.
    sent: VecDeque<Copy>,
    first_number: u64,
    next_read: CopyRead,
    /// Blocks of copies under way, start to end; disjoint.
    under_way: BTreeMap<u64, u64>,
    under_way_bytes: u64,
    blocked_until: Option<Time>,
    done_bytes: u64,
    checkpoints: VecDeque<(Time, u64)>,
}

#[derive(Debug)]
struct Copy {
    blocks: Range<u64>,
    rewritten: Vec<Range<u64>>,
}

impl Resync {
    pub(super) fn new(block_size: BlockSize, size_bytes: u64, first_read: CopyRead, now: Time) -> Self {
        Self {
            block_size,
            size_bytes,
            cursor: 0,
            reading: BTreeMap::new(),
            sent: VecDeque::new(),
            first_number: 1,
            next_read: first_read,
            under_way: BTreeMap::new(),
            under_way_bytes: 0,
            blocked_until: None,
            done_bytes: 0,
            checkpoints: VecDeque::from([(now, 0)]),
        }
    }

    /// The next blocks to read for a copy, if there is room for one.
    pub(super) fn pick<Id>(
        &mut self,
        map: &DirtyMap,
        order: &Order<Id>,
        application_waits: bool,
        now: Time,
    ) -> Option<(CopyRead, ByteRange)>
    where
        Id: std::marker::Copy + PartialEq + std::fmt::Debug,
    {
        let budget = if application_waits { BUSY_BYTES } else { IDLE_BYTES };
        let count = self.reading.len() + self.sent.len();
        if self.blocked_until.is_some_and(|until| now < until) {
            return None;
        }
        self.blocked_until = None;
        if self.under_way_bytes >= budget || count >= COPIES {
            return None;
        }
        let blocks =
            self.find(map, order, self.cursor, u64::MAX).or_else(|| self.find(map, order, 0, self.cursor))?;
        self.cursor = blocks.end;
        self.under_way.insert(blocks.start, blocks.end);
        let range = ByteRange::of_blocks(blocks.clone(), self.block_size, self.size_bytes);
        self.under_way_bytes += range.length;
        let id = self.next_read;
        self.next_read = CopyRead(id.0 + 1);
        self.reading.insert(id, Copy { blocks, rewritten: Vec::new() });
        Some((id, range))
    }

    /// The first dirty blocks from `from` on that begin before `until`, are in no copy and under no unfinished write.
    fn find<Id>(&self, map: &DirtyMap, order: &Order<Id>, from: u64, until: u64) -> Option<Range<u64>>
    where
        Id: std::marker::Copy + PartialEq + std::fmt::Debug,
    {
        let limit = (COPY_BYTES / self.block_size.bytes()).max(1);
        let mut at = from;
        loop {
            let mut run = map.next_dirty(at, limit).filter(|run| run.start < until)?;
            if let Some((_, end)) =
                self.under_way.range(..=run.start).next_back().filter(|(_, end)| **end > run.start)
            {
                at = *end;
                continue;
            }
            if let Some((start, _)) = self.under_way.range(run.start..run.end).next() {
                run.end = *start;
            }
            let range = ByteRange::of_blocks(run.clone(), self.block_size, self.size_bytes);
            if order.is_busy(range) && !planted(Bug::CopyWhileWriting) {
                // Another run, or the same one later, when the write has ended; narrow to a single block first so
                // that one hot block doesn't hold up its neighbours.
                let free = run.clone().find(|block| {
                    let range = ByteRange::of_blocks(*block..*block + 1, self.block_size, self.size_bytes);
                    !order.is_busy(range)
                });
                match free {
                    Some(block) => return Some(block..block + 1),
                    None => at = run.end,
                }
                continue;
            }
            return Some(run);
        }
    }

    /// What the next read will be named.
    pub(super) fn next_read(&self) -> CopyRead {
        self.next_read
    }

    /// The read of a copy has ended. Gives the number and range to send, unless the read failed or was a lost link's.
    pub(super) fn read_ended(
        &mut self,
        id: CopyRead,
        content: CopyContent,
        now: Time,
    ) -> Option<(u64, ByteRange)> {
        let copy = self.reading.remove(&id)?;
        let range = ByteRange::of_blocks(copy.blocks.clone(), self.block_size, self.size_bytes);
        if content == CopyContent::Failed {
            self.forget(&copy);
            self.blocked_until = Some(now.after(READ_RETRY));
            return None;
        }
        self.sent.push_back(copy);
        Some((self.first_number + self.sent.len() as u64 - 1, range))
    }

    /// A write was sequenced to blocks that are dirty: copies that were picked before it do not make them clean.
    pub(super) fn rewritten(&mut self, blocks: &Range<u64>) {
        if self.under_way.range(..blocks.end).next_back().is_none_or(|(_, end)| *end <= blocks.start) {
            return;
        }
        for copy in self.reading.values_mut().chain(&mut self.sent) {
            let (start, end) = (copy.blocks.start.max(blocks.start), copy.blocks.end.min(blocks.end));
            if start < end && copy.rewritten.last() != Some(&(start..end)) {
                copy.rewritten.push(start..end);
            }
        }
    }

    /// All copies up to `number` are durable on the replica: their bits are cleared (D2).
    ///
    /// Answers whether such a number was ever sent.
    #[must_use]
    pub(super) fn durable(&mut self, number: u64, map: &mut DirtyMap, now: Time) -> bool {
        if number >= self.first_number + self.sent.len() as u64 {
            return false;
        }
        while self.first_number <= number {
            let mut copy = self.sent.pop_front().expect("it was sent");
            self.first_number += 1;
            self.forget(&copy);
            copy.rewritten.sort_unstable_by_key(|range| range.start);
            let mut clean_from = copy.blocks.start;
            for rewritten in copy.rewritten {
                if clean_from < rewritten.start {
                    map.clear(clean_from..rewritten.start);
                }
                clean_from = clean_from.max(rewritten.end);
            }
            if clean_from < copy.blocks.end {
                map.clear(clean_from..copy.blocks.end);
            }
            self.done_bytes += ByteRange::of_blocks(copy.blocks, self.block_size, self.size_bytes).length;
        }
        self.checkpoints.push_back((now, self.done_bytes));
        while self.checkpoints.len() > 2 && now.since(self.checkpoints[1].0) >= RATE_WINDOW {
            self.checkpoints.pop_front();
        }
        true
    }

    /// Whether no copy is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.reading.is_empty() && self.sent.is_empty()
    }

    /// When to try again after a failed read.
    pub(super) fn timeout(&self) -> Option<Time> {
        self.blocked_until
    }

    /// Whether the last read failed.
    pub(super) fn is_blocked(&self) -> bool {
        self.blocked_until.is_some()
    }

    pub(super) fn progress(&self, map: &DirtyMap, now: Time) -> Progress {
        let (since, before) = self.checkpoints[0];
        let seconds = now.since(since).as_secs_f64();
        let rate = if seconds > 0.0 { (self.done_bytes - before) as f64 / seconds } else { 0.0 };
        Progress {
            done_bytes: self.done_bytes,
            total_bytes: self.done_bytes + map.dirty_blocks() * self.block_size.bytes(),
            rate_bytes: rate as u64,
        }
    }

    fn forget(&mut self, copy: &Copy) {
        self.under_way.remove(&copy.blocks.start);
        self.under_way_bytes -=
            ByteRange::of_blocks(copy.blocks.clone(), self.block_size, self.size_bytes).length;
    }
}
