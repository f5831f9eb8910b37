//! Which of several operations on byte ranges may run now (W1): overlapping ones run one after the other in the order
//! in which they were admitted, all others run together.
//!
//! Used for the writes of a primary and for the frames of a replica. Overlap is judged in the larger physical sector
//! of the hosts, because whoever has the larger one reads, modifies and writes all of it.

use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use std::collections::{BTreeMap, VecDeque};

/// Operations under way and in waiting; `Id` names one.
#[derive(Debug)]
pub struct Order<Id> {
    sector_bytes: u64,
    /// By first byte. No two overlap.
    running: BTreeMap<u64, (u64, Id)>,
    /// In the order of admission; each overlaps something that runs or an earlier one here.
    waiting: VecDeque<(Id, ByteRange)>,
}

impl<Id: Copy + PartialEq + std::fmt::Debug> Order<Id> {
    /// Nothing under way; overlap is judged in sectors of so many bytes.
    #[must_use]
    pub fn new(sector_bytes: u64) -> Self {
        let sector_bytes = if planted(Bug::NarrowSectors) { 512 } else { sector_bytes };
        Self { sector_bytes, running: BTreeMap::new(), waiting: VecDeque::new() }
    }

    /// Judges overlap in sectors of at least so many bytes from now on.
    pub fn widen_sector(&mut self, sector_bytes: u64) {
        if !planted(Bug::NarrowSectors) {
            self.sector_bytes = self.sector_bytes.max(sector_bytes);
        }
    }

    /// Admits an operation and says whether it may run now; else [`Order::finish`] will name it.
    #[must_use]
    pub fn admit(&mut self, id: Id, range: ByteRange) -> bool {
        let range = range.widened(self.sector_bytes);
        let free = !self.is_running(range) && !self.waiting.iter().any(|(_, other)| other.overlaps(range));
        if free {
            self.running.insert(range.offset, (range.end(), id));
        } else {
            self.waiting.push_back((id, range));
        }
        free
    }

    /// Ends a running operation and names those that may run now, in order.
    ///
    /// # Panics
    /// When it is not running.
    pub fn finish(&mut self, id: Id, range: ByteRange) -> Vec<Id> {
        let start = range.widened(self.sector_bytes).offset;
        // The sector may have been widened meanwhile; the operation is then found by its own, narrower start.
        let start = match self.running.get(&start) {
            Some((_, other)) if *other == id => start,
            _ => *self.running.iter().find(|(_, (_, other))| *other == id).expect("it is running").0,
        };
        self.running.remove(&start);
        self.start_waiting()
    }

    /// Whether an operation on bytes of this range runs or waits.
    #[must_use]
    pub fn is_busy(&self, range: ByteRange) -> bool {
        let range = range.widened(self.sector_bytes);
        self.is_running(range) || self.waiting.iter().any(|(_, other)| other.overlaps(range))
    }

    /// Whether nothing runs or waits.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// How many operations run.
    #[must_use]
    pub fn running(&self) -> usize {
        self.running.len()
    }

    /// Forgets the operations in waiting; those that run still end through [`Order::finish`].
    pub fn drop_waiting(&mut self) -> Vec<Id> {
        self.waiting.drain(..).map(|(id, _)| id).collect()
    }

    fn is_running(&self, range: ByteRange) -> bool {
        // Running ranges are disjoint, so only the last one that starts before the end can reach into the range.
        self.running.range(..range.end()).next_back().is_some_and(|(_, (end, _))| *end > range.offset)
    }

    fn start_waiting(&mut self) -> Vec<Id> {
        let mut started = Vec::new();
        let mut passed_over: Vec<ByteRange> = Vec::new();
        let mut index = 0;
        while index < self.waiting.len() {
            let (id, range) = self.waiting[index];
            if self.is_running(range) || passed_over.iter().any(|other| other.overlaps(range)) {
                passed_over.push(range);
                index += 1;
            } else {
                self.waiting.remove(index);
                self.running.insert(range.offset, (range.end(), id));
                started.push(id);
            }
        }
        started
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn neighbours_in_one_sector_wait_for_each_other() {
        let mut fine = Order::new(512);
        assert!(fine.admit(1, ByteRange::new(0, 512)) && fine.admit(2, ByteRange::new(512, 512)));
        let mut coarse = Order::new(4096);
        assert!(coarse.admit(1, ByteRange::new(0, 512)));
        assert!(!coarse.admit(2, ByteRange::new(512, 512)));
        assert!(coarse.is_busy(ByteRange::new(3584, 512)) && !coarse.is_busy(ByteRange::new(4096, 512)));
        assert_eq!(coarse.finish(1, ByteRange::new(0, 512)), [2]);
    }

    proptest! {
        #[test]
        fn overlapping_operations_run_in_order_and_all_run(
            ranges in proptest::collection::vec((0u64..40, 1u64..12), 1..60),
            choices in proptest::collection::vec(any::<usize>(), 200),
        ) {
            let ranges: Vec<ByteRange> =
                ranges.into_iter().map(|(at, length)| ByteRange::new(at * 512, length * 512)).collect();
            let mut order = Order::new(1024);
            let (mut running, mut finished, mut next) = (Vec::new(), Vec::new(), 0);
            for choice in choices.into_iter().chain(std::iter::repeat(0)) {
                if choice % 2 == 0 && next < ranges.len() {
                    if order.admit(next, ranges[next]) {
                        running.push(next);
                    }
                    next += 1;
                } else if !running.is_empty() {
                    let id = running.swap_remove(choice / 2 % running.len());
                    running.extend(order.finish(id, ranges[id]));
                    finished.push(id);
                } else if next == ranges.len() {
                    break;
                }
                // The oracle: nothing runs beside something that it overlaps, or before an earlier one that it overlaps.
                for (index, id) in running.iter().enumerate() {
                    let wide = ranges[*id].widened(1024);
                    let beside = running[index + 1..].iter().any(|other| ranges[*other].widened(1024).overlaps(wide));
                    prop_assert!(!beside);
                    let earlier_is_done = (0..*id)
                        .filter(|other| ranges[*other].widened(1024).overlaps(wide))
                        .all(|other| finished.contains(&other));
                    prop_assert!(earlier_is_done);
                }
            }
            prop_assert_eq!(finished.len(), ranges.len());
            prop_assert!(order.is_idle());
        }
    }
}
