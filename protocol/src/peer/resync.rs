//! Copying dirty blocks to one replica while the volume is in use (R1-R5, D2).
//!
//! A copy goes through: *picked* (its blocks are dirty, no write to them is unfinished here, no other copy of them is
//! under way), *reading*, *sent*, *durable on the replica*; only then are its bits cleared, except for blocks that
//! were written after it was picked. A write that finds its block dirty only marks it and is remembered in the copy.
//!
//! Blocks that may well be the same on the replica are compared first (R4; `trials` says when that pays). A comparison
//! goes the way of a copy, with a request for the replica's digest in the place of the content: *picked*, *digested*
//! here, *asked*, *answered*. Where the digests are the same, its bits too are cleared when it is *durable*: what the
//! replica read may not have been. Where they differ, the blocks are certain to, and are picked again. What reads as
//! zeroes here is not compared: the frame that says so is as small as the question.
//!
//! Where the local disk fails to read several blocks, they are read again in halves, so that only those that can't be read
//! stay dirty (`unreadable`). While there is one the replica is not in sync (D4).
//!
//! The dirty map itself is the resumption point: what was copied is clean, so an interrupted resync goes on where it
//! was (R5).

use super::expected::Expected;
use super::pace::Pace;
use super::trials::{Choice, Trials};
use super::unreadable::{Cut, FIRST_WAIT, Unreadable};
use super::{Action, PeerError, TAIL_BLOCKS};
use crate::dirty_map::DirtyMap;
use crate::order::Order;
use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use crate::rebuild::Absent;
use crate::units::{BlockSize, Time};
use crate::wire::ZERO_LIMIT_BYTES;
use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU64;
use std::ops::Range;

/// How many bytes one copy reads at most.
pub const COPY_BYTES: u64 = 1 << 20;
/// How many bytes are compared at once: little enough to copy when a single block of them differs, and much beside the
/// two messages that it takes.
const COMPARED_BYTES: u64 = 256 << 10;
/// How many copies may be under way, whatever their size.
const COPIES: usize = 512;
/// Names a read of a copy. Never used twice for one replica, so that a read of a lost link is not taken for a new one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct CopyRead(pub u64);

/// What the read of a copy gave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CopyContent {
    /// Bytes that are not all zero.
    Data,
    /// The BLAKE3 digest of such bytes, where that was asked for.
    Digest([u8; 32]),
    /// Only zeroes were read (R4).
    Zero,
    /// The range begins with a hole of so many bytes, which reads as zeroes. A range of up to [`COPY_BYTES`] is one
    /// altogether, or is read; of a longer one the rest is left for another copy, and where it begins with data, all.
    Hole(u64),
    /// The local disk failed to read.
    Failed,
}

/// How far a resync is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// Bytes copied, or found to be the same, and durable on the replica.
    pub done_bytes: u64,
    /// Those and what is still dirty.
    pub total_bytes: u64,
    /// Bytes a second, over the last seconds.
    pub rate_bytes: u64,
}

/// The copies for one link that are picked, read, sent, or not durable there.
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
    unreadable: Unreadable,
    /// More can't be read than is remembered: until when nothing is.
    blocked_until: Option<Time>,
    /// Until when the operator's limit holds back a copy for which there is room.
    paced_until: Option<Time>,
    trials: Trials,
    expected: Expected,
    pace: Pace,
}

#[derive(Debug)]
struct Copy {
    blocks: Range<u64>,
    rewritten: Vec<Range<u64>>,
    step: Step,
    /// What it takes of the budget, in bytes: a large range of zeroes is no more on the way than one copy.
    weight_bytes: u64,
    picked: Time,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The blocks' content is read, or was sent.
    Copy,
    /// Their digest is read, or was asked for; then this is ours.
    Compare(Option<[u8; 32]>),
    /// The digests are the same.
    Same,
    /// They were not, and the blocks may be in another copy already. Keeps its number's place.
    Different,
}

impl Resync {
    /// Nothing under way.
    pub(super) fn new(
        block_size: BlockSize,
        size_bytes: u64,
        first_read: CopyRead,
        limit: Option<NonZeroU64>,
        now: Time,
    ) -> Self {
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
            unreadable: Unreadable::default(),
            blocked_until: None,
            trials: Trials::default(),
            expected: Expected::HOLE,
            pace: Pace::new(now, limit),
            paced_until: None,
        }
    }

    /// The next blocks to read for a copy, if there is room for one. Those that are not `certain` may be compared first. `here`: what
    /// is being written here, and what is absent.
    pub(super) fn pick<Id>(
        &mut self,
        map: &DirtyMap,
        certain: &DirtyMap,
        here: (&Order<Id>, Option<&Absent>),
        application_is_active: bool,
        now: Time,
    ) -> Option<Action>
    where
        Id: std::marker::Copy + PartialEq + std::fmt::Debug,
    {
        let budget = self.pace.budget_bytes(application_is_active);
        let count = self.reading.len() + self.sent.len();
        if self.blocked_until.is_some_and(|until| now < until) {
            return None;
        }
        (self.blocked_until, self.paced_until) = (None, None);
        self.unreadable.wake(now);
        if self.unreadable.are_all(map) {
            return None;
        }
        if self.under_way_bytes >= budget
            || count >= COPIES
            || matches!(self.expected, Expected::Asked { .. })
        {
            return None;
        }
        // The last blocks are free: writers may be waiting for their copies (R2).
        self.paced_until = self.pace.waits_until(now).filter(|_| map.dirty_blocks() > TAIL_BLOCKS);
        if self.paced_until.is_some() {
            return None;
        }
        let found =
            self.find(map, here, self.cursor, u64::MAX).or_else(|| self.find(map, here, 0, self.cursor))?;
        let (mut blocks, step) = self.choose(found, certain)?;
        let asks = self.expected.may_be_hole() && blocks.end - blocks.start > self.blocks(COPY_BYTES);
        if !asks {
            let copy_bytes = self.pace.copy_bytes(application_is_active);
            let most = if step == Step::Copy { copy_bytes } else { copy_bytes.min(COMPARED_BYTES) };
            blocks.end = blocks.end.min(blocks.start + self.blocks(most));
        }
        self.cursor = blocks.end;
        self.under_way.insert(blocks.start, blocks.end);
        let range = ByteRange::of_blocks(blocks.clone(), self.block_size, self.size_bytes);
        let weight_bytes = range.length.min(COPY_BYTES);
        self.under_way_bytes += weight_bytes;
        let id = self.next_read;
        self.next_read = CopyRead(id.0 + 1);
        self.expected = match self.expected {
            Expected::Piece { copies, .. } if asks => Expected::Asked { read: id, copies },
            Expected::Piece { copies, left } => Expected::Piece { copies, left: left.saturating_sub(1) },
            expected => expected,
        };
        self.reading.insert(id, Copy { blocks, rewritten: Vec::new(), step, weight_bytes, picked: now });
        Some(Action::ReadCopy { read: id, range, digest: step != Step::Copy })
    }

    /// What of these blocks is copied or compared now; nothing while it is open whether to compare.
    fn choose(&mut self, found: Range<u64>, certain: &DirtyMap) -> Option<(Range<u64>, Step)> {
        let (is_certain, part) = certain.split(found.clone()).next().expect("something was found");
        match self.trials.choice() {
            Choice::Copy => Some((found, Step::Copy)),
            _ if is_certain => Some((part, Step::Copy)),
            Choice::Wait => None,
            Choice::Compare => {
                self.trials.asked();
                Some((part, Step::Compare(None)))
            }
        }
    }

    /// The first dirty blocks from `from` on that begin before `until`, are in no copy, under no unfinished write, and not absent.
    fn find<Id>(
        &self,
        map: &DirtyMap,
        (order, absent): (&Order<Id>, Option<&Absent>),
        from: u64,
        until: u64,
    ) -> Option<Range<u64>>
    where
        Id: std::marker::Copy + PartialEq + std::fmt::Debug,
    {
        let mut limit = self.blocks(if self.expected.may_be_hole() { ZERO_LIMIT_BYTES } else { COPY_BYTES });
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
            match absent.and_then(|absent| absent.next_missing(&run)) {
                Some(missing) if missing.start == run.start => {
                    at = missing.end;
                    continue;
                }
                Some(missing) => run.end = missing.start,
                None => {}
            }
            match self.unreadable.cut(&run) {
                Cut::Until(end) => run.end = end,
                Cut::From(start) => {
                    at = start;
                    continue;
                }
            }
            let range = ByteRange::of_blocks(run.clone(), self.block_size, self.size_bytes);
            if order.is_busy(range) && !planted(Bug::CopyWhileWriting) {
                if limit > self.blocks(COPY_BYTES) {
                    limit = self.blocks(COPY_BYTES);
                    continue;
                }
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
        let mut copy = self.reading.remove(&id)?;
        copy.step = match (copy.step, content) {
            (Step::Compare(_), CopyContent::Digest(digest)) => Step::Compare(Some(digest)),
            (Step::Compare(_), _) => {
                self.trials.taken_back();
                Step::Copy
            }
            (step, _) => step,
        };
        let picked = ByteRange::of_blocks(copy.blocks.clone(), self.block_size, self.size_bytes);
        self.expected = self.expected.found(id, content, picked.length);
        if let CopyContent::Hole(bytes) = content {
            self.keep_hole(&mut copy, bytes)?;
        }
        let range = ByteRange::of_blocks(copy.blocks.clone(), self.block_size, self.size_bytes);
        match content {
            CopyContent::Failed => {
                self.forget(&copy.blocks, copy.weight_bytes);
                if !self.unreadable.failed(&copy.blocks, !copy.rewritten.is_empty(), now) {
                    self.blocked_until = Some(now.after(FIRST_WAIT));
                } else if copy.blocks.end - copy.blocks.start > 1 {
                    // Its halves come next, so that few are remembered.
                    self.cursor = self.cursor.min(copy.blocks.start);
                }
                return None;
            }
            CopyContent::Data => {
                self.trials.copied(range.length);
                self.pace.spend(range.length, now);
            }
            CopyContent::Hole(_) | CopyContent::Zero | CopyContent::Digest(_) => {}
        }
        self.unreadable.read(&copy.blocks);
        self.sent.push_back(copy);
        Some((self.first_number + self.sent.len() as u64 - 1, range))
    }

    /// Cuts a copy to the hole that its range begins with; nothing is left of it where that has no block.
    fn keep_hole(&mut self, copy: &mut Copy, bytes: u64) -> Option<()> {
        let range = ByteRange::of_blocks(copy.blocks.clone(), self.block_size, self.size_bytes);
        if bytes >= range.length {
            return Some(());
        }
        assert!(range.length > COPY_BYTES, "what one copy may read is read");
        let whole =
            std::mem::replace(&mut copy.blocks.end, copy.blocks.start + bytes / self.block_size.bytes());
        self.cursor = self.cursor.min(copy.blocks.end);
        self.forget(&(copy.blocks.start..whole), copy.weight_bytes);
        if copy.blocks.is_empty() {
            return None;
        }
        copy.rewritten.retain_mut(|written| {
            written.end = written.end.min(copy.blocks.end);
            written.start < written.end
        });
        copy.weight_bytes = bytes.min(COPY_BYTES);
        self.under_way.insert(copy.blocks.start, copy.blocks.end);
        self.under_way_bytes += copy.weight_bytes;
        Some(())
    }

    /// A write was sequenced to blocks that are dirty: copies that were picked before it do not make them clean.
    pub(super) fn rewritten(&mut self, blocks: &Range<u64>) {
        self.unreadable.written(blocks);
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

    /// The replica's digest of blocks that it was asked about.
    pub(super) fn compared(
        &mut self,
        number: u64,
        digest: [u8; 32],
        map: &mut DirtyMap,
        certain: &mut DirtyMap,
    ) -> Result<(), PeerError> {
        let index = number.checked_sub(self.first_number).and_then(|index| usize::try_from(index).ok());
        let copy = index.and_then(|index| self.sent.get_mut(index));
        let Some((copy, ours)) = copy.and_then(|copy| match copy.step {
            Step::Compare(ours) => Some((copy, ours)),
            _ => None,
        }) else {
            return Err(PeerError::Misbehaved("it sent a digest that it was not asked for"));
        };
        let is_same = ours == Some(digest);
        copy.step = if is_same { Step::Same } else { Step::Different };
        let (blocks, weight_bytes) = (copy.blocks.clone(), copy.weight_bytes);
        if !is_same {
            certain.mark(blocks.clone());
            self.forget(&blocks, weight_bytes);
        } else if planted(Bug::ClearOnMatch) {
            map.clear(blocks);
        }
        self.trials.answered(is_same);
        Ok(())
    }

    /// All copies up to `number` are durable on the replica, and what it has of blocks that are the same: their bits are
    /// cleared (D2).
    pub(super) fn durable(
        &mut self,
        number: u64,
        map: &mut DirtyMap,
        certain: &mut DirtyMap,
        now: Time,
    ) -> Result<(), PeerError> {
        if number >= self.first_number + self.sent.len() as u64 {
            return Err(PeerError::Misbehaved("it acknowledged a copy that was never sent"));
        }
        while self.first_number <= number {
            let copy = self.sent.pop_front().expect("it was sent");
            self.first_number += 1;
            match copy.step {
                Step::Compare(_) => {
                    return Err(PeerError::Misbehaved("it acknowledged a digest that it did not send"));
                }
                Step::Different => continue,
                Step::Copy | Step::Same => {}
            }
            self.forget(&copy.blocks, copy.weight_bytes);
            let range = ByteRange::of_blocks(copy.blocks.clone(), self.block_size, self.size_bytes);
            self.pace.done(range.length, now.since(copy.picked));
            for clean in copy.clean() {
                map.clear(clean.clone());
                certain.clear(clean);
            }
        }
        self.pace.note(now);
        Ok(())
    }

    /// Whether no copy is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.reading.is_empty() && self.sent.is_empty()
    }

    /// When to try again after a failed read, or when the operator's limit allows it.
    pub(super) fn timeout(&self) -> Option<Time> {
        let waits = self.blocked_until.or(self.paced_until);
        if waits.is_some() { waits } else { self.unreadable.timeout() }
    }

    /// The operator wants so many bytes a second at most.
    pub(super) fn set_limit(&mut self, limit: Option<NonZeroU64>) {
        self.pace.set_limit(limit);
    }

    /// What can't be read here, and whether that is all.
    pub(super) fn unreadable(&self) -> (Vec<ByteRange>, bool) {
        (self.unreadable.ranges(self.block_size, self.size_bytes), self.blocked_until.is_none())
    }

    /// Whether a block can't be read here, as far as is known.
    pub(super) fn is_unreadable(&self, block: u64) -> bool {
        self.unreadable.has(block)
    }

    pub(super) fn progress(&self, map: &DirtyMap, now: Time) -> Progress {
        let done_bytes = self.pace.done_bytes();
        Progress {
            done_bytes,
            total_bytes: done_bytes + map.dirty_blocks() * self.block_size.bytes(),
            rate_bytes: self.pace.rate_bytes(now),
        }
    }

    /// How many blocks so many bytes are; at least one.
    fn blocks(&self, bytes: u64) -> u64 {
        (bytes / self.block_size.bytes()).max(1)
    }

    fn forget(&mut self, blocks: &Range<u64>, weight_bytes: u64) {
        self.under_way.remove(&blocks.start);
        self.under_way_bytes -= weight_bytes;
    }
}

impl Copy {
    /// The blocks that were not written since they were picked.
    fn clean(mut self) -> Vec<Range<u64>> {
        self.rewritten.sort_unstable_by_key(|range| range.start);
        let mut clean = Vec::new();
        let mut clean_from = self.blocks.start;
        for rewritten in self.rewritten {
            if clean_from < rewritten.start {
                clean.push(clean_from..rewritten.start);
            }
            clean_from = clean_from.max(rewritten.end);
        }
        if clean_from < self.blocks.end {
            clean.push(clean_from..self.blocks.end);
        }
        clean
    }
}

#[cfg(test)]
mod tests;
