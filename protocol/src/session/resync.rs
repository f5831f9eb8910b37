//! Copying dirty blocks to one replica while the volume is in use (R1-R5, D2).
//!
//! A copy goes through: *picked* (its blocks are dirty, no write to them is unfinished here, no other copy of them is
//! under way), *reading*, *sent*, *durable on the replica*; only then are its bits cleared, except for blocks that
//! were written after it was picked. A write that finds its block dirty only marks it and is remembered in the copy.
//!
//! Blocks that may well be the same on the replica are compared first (R4; `doubt` says when that pays). A comparison
//! goes the way of a copy, with a request for the replica's digest in the place of the content: *picked*, *digested*
//! here, *asked*, *answered*. Where the digests are the same, its bits too are cleared when it is *durable*: what the
//! replica read may not have been. Where they differ, the blocks are certain to, and are picked again. What reads as
//! zeroes here is not compared: the frame that says so is as small as the question.
//!
//! The dirty map itself is the resumption point: what was copied is clean, so an interrupted resync goes on where it
//! was (R5).

use super::doubt::{Choice, Doubt};
use super::pace::Pace;
use super::{Action, PeerError, TAIL_BLOCKS};
use crate::dirty_map::DirtyMap;
use crate::order::Order;
use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use crate::units::{BlockSize, Time};
use crate::wire::ZERO_LIMIT_BYTES;
use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU64;
use std::ops::Range;
use std::time::Duration;

/// How many bytes one copy reads at most.
pub const COPY_BYTES: u64 = 1 << 20;
/// How many bytes are compared at once: little enough to copy when a single block of them differs, and much beside the
/// two messages that it takes. More where there were only zeroes before, of which a frame may cover as much as a copy.
const COMPARED_BYTES: u64 = 256 << 10;
/// How many copies may be under way, whatever their size.
const COPIES: usize = 512;
/// How long a range whose local read failed is left alone.
const READ_RETRY: Duration = Duration::from_secs(5);
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
    /// Until when the operator's limit holds back a copy for which there is room.
    paced_until: Option<Time>,
    doubt: Doubt,
    /// How many bytes the next copy covers at most: more than one may read where there were only zeroes before, since a
    /// hole of any size is found with one question, and told in one frame.
    copied_bytes: u64,
    /// How many copies may be read at once until it is known what is at the cursor: one where data begins after a hole,
    /// twice as many for each that finds data. Else a lone piece of data would have many small copies of the hole
    /// behind it.
    reads: usize,
    /// How many bytes the next comparison takes at most.
    compared_bytes: u64,
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
            blocked_until: None,
            doubt: Doubt::default(),
            copied_bytes: COPY_BYTES,
            reads: COPIES,
            compared_bytes: COMPARED_BYTES,
            pace: Pace::new(now, limit),
            paced_until: None,
        }
    }

    /// The next blocks to read for a copy, if there is room for one. Those that are not `certain` may be compared first.
    pub(super) fn pick<Id>(
        &mut self,
        map: &DirtyMap,
        certain: &DirtyMap,
        order: &Order<Id>,
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
        if self.under_way_bytes >= budget || count >= COPIES || self.reading.len() >= self.reads {
            return None;
        }
        // The last blocks are free: writers may be waiting for their copies (R2).
        self.paced_until = self.pace.waits_until(now).filter(|_| map.dirty_blocks() > TAIL_BLOCKS);
        if self.paced_until.is_some() {
            return None;
        }
        let found =
            self.find(map, order, self.cursor, u64::MAX).or_else(|| self.find(map, order, 0, self.cursor))?;
        let in_holes = self.copied_bytes > COPY_BYTES;
        let limit = (self.pace.copy_bytes(application_is_active) / self.block_size.bytes()).max(1);
        let end = if in_holes { found.end } else { found.start + limit };
        let (blocks, step) = self.choose(found.start..found.end.min(end), certain)?;
        self.cursor = blocks.end;
        self.under_way.insert(blocks.start, blocks.end);
        let range = ByteRange::of_blocks(blocks.clone(), self.block_size, self.size_bytes);
        let weight_bytes = range.length.min(COPY_BYTES);
        self.under_way_bytes += weight_bytes;
        let id = self.next_read;
        self.next_read = CopyRead(id.0 + 1);
        self.reading.insert(id, Copy { blocks, rewritten: Vec::new(), step, weight_bytes, picked: now });
        Some(Action::ReadCopy { read: id, range, digest: step != Step::Copy })
    }

    /// What of these blocks is copied or compared now; nothing while it is open whether to compare.
    fn choose(&mut self, found: Range<u64>, certain: &DirtyMap) -> Option<(Range<u64>, Step)> {
        let (is_certain, part) = certain.split(found.clone()).next().expect("something was found");
        match self.doubt.choice() {
            Choice::Copy => {
                self.doubt.copied((found.end - found.start) * self.block_size.bytes());
                Some((found, Step::Copy))
            }
            _ if is_certain => Some((part, Step::Copy)),
            Choice::Wait => None,
            Choice::Compare => {
                self.doubt.asked();
                let limit = (self.compared_bytes / self.block_size.bytes()).max(1);
                Some((part.start..part.end.min(part.start + limit), Step::Compare(None)))
            }
        }
    }

    /// The first dirty blocks from `from` on that begin before `until`, are in no copy and under no unfinished write.
    fn find<Id>(&self, map: &DirtyMap, order: &Order<Id>, from: u64, until: u64) -> Option<Range<u64>>
    where
        Id: std::marker::Copy + PartialEq + std::fmt::Debug,
    {
        let blocks = |bytes: u64| (bytes / self.block_size.bytes()).max(1);
        let mut limit = blocks(self.copied_bytes);
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
                if limit > blocks(COPY_BYTES) {
                    limit = blocks(COPY_BYTES);
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
            (Step::Compare(_), CopyContent::Digest(digest)) => {
                self.compared_bytes = COMPARED_BYTES;
                Step::Compare(Some(digest))
            }
            (Step::Compare(_), _) => {
                self.doubt.taken_back();
                Step::Copy
            }
            (step, _) => step,
        };
        if let CopyContent::Hole(bytes) = content {
            self.keep_hole(&mut copy, bytes)?;
        }
        let range = ByteRange::of_blocks(copy.blocks.clone(), self.block_size, self.size_bytes);
        match content {
            CopyContent::Failed => {
                self.forget(&copy.blocks, copy.weight_bytes);
                self.blocked_until = Some(now.after(READ_RETRY));
                return None;
            }
            CopyContent::Hole(_) | CopyContent::Zero => {}
            CopyContent::Data => {
                self.found_data();
                self.pace.spend(range.length, now);
            }
            CopyContent::Digest(_) => self.found_data(),
        }
        self.sent.push_back(copy);
        Some((self.first_number + self.sent.len() as u64 - 1, range))
    }

    /// Cuts a copy to the hole that its range begins with; nothing is left of it where that has no block. What is next is
    /// read in large ranges as long as there is no end of holes, else with care.
    fn keep_hole(&mut self, copy: &mut Copy, bytes: u64) -> Option<()> {
        let range = ByteRange::of_blocks(copy.blocks.clone(), self.block_size, self.size_bytes);
        if bytes >= range.length {
            (self.copied_bytes, self.compared_bytes) = (ZERO_LIMIT_BYTES, ZERO_LIMIT_BYTES);
            return Some(());
        }
        assert!(range.length > COPY_BYTES, "what one copy may read is read");
        (self.copied_bytes, self.compared_bytes, self.reads) = (COPY_BYTES, COMPARED_BYTES, 1);
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

    fn found_data(&mut self) {
        self.copied_bytes = COPY_BYTES;
        self.reads = (self.reads * 2).min(COPIES);
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
        self.doubt.answered(is_same);
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
        self.blocked_until.or(self.paced_until)
    }

    /// The operator wants so many bytes a second at most.
    pub(super) fn set_limit(&mut self, limit: Option<NonZeroU64>) {
        self.pace.set_limit(limit);
    }

    /// Whether the last read failed.
    pub(super) fn is_blocked(&self) -> bool {
        self.blocked_until.is_some()
    }

    pub(super) fn progress(&self, map: &DirtyMap, now: Time) -> Progress {
        let done_bytes = self.pace.done_bytes();
        Progress {
            done_bytes,
            total_bytes: done_bytes + map.dirty_blocks() * self.block_size.bytes(),
            rate_bytes: self.pace.rate_bytes(now),
        }
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
mod tests {
    use super::*;
    use crate::disk::dirty_map::Base;
    use crate::units::{HostId, VolumeId};

    const BLOCKS: u64 = 1024;

    /// A resync of a replica of which every block is dirty and none is certain to differ.
    struct Harness {
        resync: Resync,
        map: DirtyMap,
        certain: DirtyMap,
    }

    impl Harness {
        fn new() -> Self {
            Self::of(BLOCKS)
        }

        fn of(blocks: u64) -> Self {
            let size = BlockSize::default();
            let map = DirtyMap::full(VolumeId([1; 16]), HostId([2; 32]), blocks * size.bytes(), size);
            let certain = map.of_single_bits().clean(Base::default());
            let resync = Resync::new(size, blocks * size.bytes(), CopyRead(0), None, Time::default());
            Self { resync, map, certain }
        }

        /// The reads that it asks for, with whether a digest is wanted.
        fn picks(&mut self) -> Vec<(CopyRead, ByteRange, bool)> {
            let order = Order::<u8>::new(512);
            let picked = std::iter::from_fn(|| {
                match self.resync.pick(&self.map, &self.certain, &order, false, Time::default())? {
                    Action::ReadCopy { read, range, digest } => Some((read, range, digest)),
                    action => panic!("it asks for {action:?}"),
                }
            });
            picked.collect()
        }

        fn read(&mut self, read: CopyRead, content: CopyContent) -> u64 {
            self.resync.read_ended(read, content, Time::default()).expect("it is sent").0
        }

        /// Asks about the next blocks, and gives the request's number and the blocks.
        fn ask(&mut self) -> (u64, Range<u64>) {
            let (read, range, digest) = self.picks()[0];
            assert!(digest);
            (self.read(read, CopyContent::Digest([1; 32])), range.blocks(BlockSize::default()))
        }

        fn compared(&mut self, number: u64, digest: [u8; 32]) -> Result<(), PeerError> {
            self.resync.compared(number, digest, &mut self.map, &mut self.certain)
        }

        fn durable(&mut self, number: u64) -> Result<(), PeerError> {
            self.resync.durable(number, &mut self.map, &mut self.certain, Time::default())
        }
    }

    #[test]
    fn blocks_that_are_the_same_are_clean_once_that_is_durable() {
        let mut harness = Harness::new();
        let (number, blocks) = harness.ask();
        harness.resync.rewritten(&(3..5));
        harness.compared(number, [1; 32]).unwrap();
        assert!(harness.map.is_dirty(0), "what the replica read may be lost");
        harness.durable(number).unwrap();
        for block in blocks {
            assert_eq!(harness.map.is_dirty(block), (3..5).contains(&block), "block {block}");
        }
    }

    #[test]
    fn blocks_that_differ_stay_dirty_and_are_copied() {
        let mut harness = Harness::new();
        let (number, blocks) = harness.ask();
        harness.compared(number, [2; 32]).unwrap();
        let picks = harness.picks();
        let is_copy =
            |(_, range, digest): &(_, ByteRange, _)| range.blocks(BlockSize::default()) == blocks && !digest;
        let (read, ..) = *picks.iter().find(|pick| is_copy(pick)).expect("they are picked again");
        harness.durable(number).unwrap();
        assert!(blocks.clone().all(|block| harness.map.is_dirty(block)));
        let copied = harness.read(read, CopyContent::Data);
        harness.durable(copied).unwrap();
        assert!(!blocks.clone().any(|block| harness.map.is_dirty(block) || harness.certain.is_dirty(block)));
        let bytes = (blocks.end - blocks.start) * BlockSize::default().bytes();
        assert_eq!(harness.resync.pace.done_bytes(), bytes, "they count once");
    }

    #[test]
    fn holes_are_copied_in_large_ranges_and_nothing_else_is() {
        for are_certain in [true, false] {
            copy_a_half_that_is_a_hole(are_certain);
        }
    }

    fn copy_a_half_that_is_a_hole(are_certain: bool) {
        let blocks = 256 * BLOCKS;
        let mut harness = Harness::of(blocks);
        if are_certain {
            harness.certain.mark(0..blocks);
        }
        let mut longest = 0;
        let mut done = 0;
        // The second half is no hole.
        let half = blocks / 2 * BlockSize::default().bytes();
        while harness.map.dirty_blocks() > 0 {
            for (read, range, digest) in harness.picks() {
                longest = longest.max(range.length);
                let content = match () {
                    () if range.end() <= half || range.length > COPY_BYTES => {
                        CopyContent::Hole(range.end().min(half).saturating_sub(range.offset))
                    }
                    () if digest => CopyContent::Digest([1; 32]),
                    () => CopyContent::Data,
                };
                let sent = harness.resync.read_ended(read, content, Time::default());
                let Some((number, range)) = sent else {
                    assert_eq!(content, CopyContent::Hole(0));
                    continue;
                };
                if let CopyContent::Digest(digest) = content {
                    harness.compared(number, digest).unwrap();
                }
                harness.durable(number).unwrap();
                done += range.length;
            }
        }
        assert_eq!((done, harness.map.dirty_blocks()), (2 * half, 0));
        assert_eq!(longest, ZERO_LIMIT_BYTES);
    }

    #[test]
    fn a_hole_behind_a_lone_piece_of_data_takes_few_copies() {
        let mut harness = Harness::of(256 * BLOCKS);
        harness.certain.mark(0..256 * BLOCKS);
        let data = ByteRange::new(300 << 20, 1 << 20);
        let mut copies = 0;
        while harness.map.dirty_blocks() > 0 {
            for (read, range, _) in harness.picks() {
                let content = match range.overlaps(data) {
                    true if range.length <= COPY_BYTES => CopyContent::Data,
                    true => CopyContent::Hole(data.offset.saturating_sub(range.offset)),
                    false => CopyContent::Hole(range.length),
                };
                if harness.resync.read_ended(read, content, Time::default()).is_some() {
                    copies += 1;
                }
            }
            let last = harness.resync.first_number + harness.resync.sent.len() as u64 - 1;
            harness.durable(last).unwrap();
        }
        assert!(copies < 56, "{copies} copies of a gibibyte, 32 of them before the first was read");
    }

    #[test]
    fn a_write_in_a_large_range_narrows_it_no_further_than_a_copy() {
        let mut harness = Harness::of(4 * BLOCKS);
        harness.certain.mark(0..4 * BLOCKS);
        harness.resync.copied_bytes = 4 * COPY_BYTES;
        let mut order = Order::<u8>::new(512);
        let _ = order.admit(1, ByteRange::new(3 * COPY_BYTES, 4096));
        let picked = harness.resync.pick(&harness.map, &harness.certain, &order, false, Time::default());
        let Some(Action::ReadCopy { range, .. }) = picked else { panic!("{picked:?}") };
        assert_eq!(range, ByteRange::new(0, COPY_BYTES));
    }

    #[test]
    fn written_blocks_are_not_asked_about() {
        let mut harness = Harness::new();
        harness.certain.mark(0..10);
        let picks = harness.picks();
        assert_eq!((picks[0].1.blocks(BlockSize::default()), picks[0].2), (0..10, false));
        assert!(picks[1].2);
    }

    #[test]
    fn a_replica_that_makes_digests_up_is_found_out() {
        let mut harness = Harness::new();
        let (number, _) = harness.ask();
        assert!(harness.compared(number + 1, [1; 32]).is_err(), "nothing of that number was asked");
        assert!(harness.compared(number - 1, [1; 32]).is_err());
        harness.compared(number, [1; 32]).unwrap();
        assert!(harness.compared(number, [1; 32]).is_err(), "it answered that already");
        let mut harness = Harness::new();
        let (unanswered, _) = harness.ask();
        assert!(harness.durable(unanswered).is_err(), "it has not answered that");
    }

    #[test]
    fn a_limit_holds_copies_back_and_says_until_when() {
        let mut harness = Harness::new();
        harness.certain.mark(0..BLOCKS);
        harness.resync.set_limit(NonZeroU64::new(1 << 20));
        let picked = harness.picks();
        let bytes: u64 = picked.iter().map(|(_, range, _)| range.length).sum();
        assert_eq!(
            (bytes, picked[0].1.length),
            (512 << 10, 128 << 10),
            "half a second's worth, in small copies"
        );
        let numbers: Vec<u64> =
            picked.iter().map(|(read, _, _)| harness.read(*read, CopyContent::Data)).collect();
        let last = *numbers.last().expect("something was sent");
        harness.resync.durable(last, &mut harness.map, &mut harness.certain, Time::default()).unwrap();
        assert_eq!(harness.picks(), [], "its share of the time is not over");
        let until = Time::default().after(Duration::from_millis(500));
        assert_eq!(harness.resync.timeout(), Some(until));
        harness.map.clear(128..BLOCKS - 256);
        assert_eq!(harness.picks().len(), 4, "the last blocks don't wait");
        harness.resync.set_limit(None);
        assert_eq!(harness.resync.pace.copy_bytes(false), COPY_BYTES);
    }
}
