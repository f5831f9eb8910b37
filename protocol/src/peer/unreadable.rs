//! Which blocks can't be read here, so that everything around them is copied all the same.
//!
//! A disk fails a read as a whole, and does not say which of its sectors it could not read. So a range of several blocks
//! whose read failed is read again in two halves, and so on down to single blocks. A single block whose read failed is
//! *unreadable*: it stays dirty, is left alone for a while that doubles with each failure, and is in no read with others
//! until one of it succeeds. A write to it makes it due at once, since that heals a sector.
//!
//! Only so many are remembered, which bounds memory on a disk that fails altogether; there the whole resync waits.

use crate::dirty_map::DirtyMap;
use crate::ranges::ByteRange;
use crate::units::{BlockSize, Time};
use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

/// How long a block whose read failed is left alone: at first, and at most.
pub(super) const FIRST_WAIT: Duration = Duration::from_secs(5);
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// How many unreadable blocks, and how many halves that are still to be read, are remembered.
const LIMIT: usize = 1024;

/// Blocks that could not be read, and when they are tried again.
#[derive(Debug, Default)]
pub(super) struct Unreadable {
    /// Parts of ranges whose read failed, start to end; disjoint. No read crosses an edge of one.
    parts: BTreeMap<u64, u64>,
    blocks: BTreeMap<u64, Retry>,
    /// When the first of the blocks that wait is due.
    due: Option<Time>,
}

/// When an unreadable block is read again.
#[derive(Debug, Clone, Copy)]
struct Retry {
    /// None: as soon as it can be.
    at: Option<Time>,
    wait: Duration,
}

/// What of a run of dirty blocks may be read at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Cut {
    /// It up to here.
    Until(u64),
    /// Nothing before here.
    From(u64),
}

impl Unreadable {
    /// Time has passed: blocks that have waited for long enough are due.
    pub(super) fn wake(&mut self, now: Time) {
        if self.due.is_none_or(|due| now < due) {
            return;
        }
        for retry in self.blocks.values_mut() {
            retry.at = retry.at.filter(|at| now < *at);
        }
        self.note_due();
    }

    /// When [`Unreadable::wake`] has something to do.
    pub(super) fn timeout(&self) -> Option<Time> {
        self.due
    }

    /// Whether all that is dirty waits.
    pub(super) fn are_all(&self, map: &DirtyMap) -> bool {
        !self.blocks.is_empty()
            && self.blocks.values().all(|retry| retry.at.is_some())
            && map.dirty_blocks() <= self.blocks.len() as u64
    }

    /// What of a run may be read at once.
    pub(super) fn cut(&self, run: &Range<u64>) -> Cut {
        if self.blocks.is_empty() && self.parts.is_empty() {
            return Cut::Until(run.end);
        }
        match self.blocks.get(&run.start) {
            Some(Retry { at: Some(_), .. }) => return Cut::From(run.start + 1),
            Some(Retry { at: None, .. }) => return Cut::Until(run.start + 1),
            None => {}
        }
        let mut end = run.end;
        if let Some((block, _)) = self.blocks.range(run.clone()).next() {
            end = *block;
        }
        if let Some((_, part)) =
            self.parts.range(..=run.start).next_back().filter(|(_, end)| **end > run.start)
        {
            end = end.min(*part);
        } else if let Some((part, _)) = self.parts.range(run.clone()).next() {
            end = end.min(*part);
        }
        Cut::Until(end)
    }

    /// Blocks were read.
    pub(super) fn read(&mut self, blocks: &Range<u64>) {
        self.forget_parts(blocks);
        let known: Vec<u64> = self.blocks.range(blocks.clone()).map(|(block, _)| *block).collect();
        for block in &known {
            self.blocks.remove(block);
        }
        if !known.is_empty() {
            self.note_due();
        }
    }

    /// Blocks could not be read together. Says whether there was room to remember that. What was `rewritten` meanwhile may
    /// have been healed.
    pub(super) fn failed(&mut self, blocks: &Range<u64>, rewritten: bool, now: Time) -> bool {
        self.forget_parts(blocks);
        if blocks.end - blocks.start == 1 {
            return self.failed_alone(blocks.start, rewritten, now);
        }
        if self.parts.len() >= LIMIT {
            return false;
        }
        let middle = blocks.start + (blocks.end - blocks.start) / 2;
        self.parts.extend([(blocks.start, middle), (middle, blocks.end)]);
        true
    }

    /// Blocks are written: what can't be read of them may be healed by that.
    pub(super) fn written(&mut self, blocks: &Range<u64>) {
        let mut waited = false;
        for (_, retry) in self.blocks.range_mut(blocks.clone()) {
            waited |= retry.at.take().is_some();
        }
        if waited {
            self.note_due();
        }
    }

    /// Whether a block is known to be unreadable.
    pub(super) fn has(&self, block: u64) -> bool {
        self.blocks.contains_key(&block)
    }

    /// What can't be read, in order; neighbours as one range.
    pub(super) fn ranges(&self, block_size: BlockSize, size_bytes: u64) -> Vec<ByteRange> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for block in self.blocks.keys() {
            match runs.last_mut() {
                Some(run) if run.end == *block => run.end += 1,
                _ => runs.push(*block..*block + 1),
            }
        }
        runs.into_iter().map(|run| ByteRange::of_blocks(run, block_size, size_bytes)).collect()
    }

    fn failed_alone(&mut self, block: u64, rewritten: bool, now: Time) -> bool {
        let known = self.blocks.get(&block);
        if known.is_none() && self.blocks.len() >= LIMIT {
            return false;
        }
        let wait = known.map_or(FIRST_WAIT, |retry| (retry.wait * 2).min(LONGEST_WAIT));
        let retry = match rewritten {
            true => Retry { at: None, wait: FIRST_WAIT },
            false => Retry { at: Some(now.after(wait)), wait },
        };
        self.blocks.insert(block, retry);
        self.note_due();
        true
    }

    fn forget_parts(&mut self, blocks: &Range<u64>) {
        let before = self.parts.range(..blocks.start).next_back().filter(|(_, end)| **end > blocks.start);
        let inside = self.parts.range(blocks.clone());
        let touched: Vec<(u64, u64)> =
            before.into_iter().chain(inside).map(|(start, end)| (*start, *end)).collect();
        for (start, end) in touched {
            self.parts.remove(&start);
            if start < blocks.start {
                self.parts.insert(start, blocks.start);
            }
            if end > blocks.end {
                self.parts.insert(blocks.end, end);
            }
        }
    }

    fn note_due(&mut self) {
        self.due = self.blocks.values().filter_map(|retry| retry.at).min();
    }
}
