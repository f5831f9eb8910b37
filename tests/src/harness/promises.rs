//! What applications were told, and so what the primary's disk may hold (W4): kept beside the machine and without
//! looking into it.

use super::disk::{Disk, Value, sectors};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::tracker::{RequestId, Work};
use blockmirror_protocol::units::BlockSize;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Copy, Debug)]
struct Entry {
    value: Value,
    issued: u64,
    ended: Option<u64>,
    good: bool,
    durable: bool,
}

/// What each sector of the primary may hold, as an application can know it. What applications were answered, and so what must be there.
#[derive(Clone, Debug, Default)]
pub struct Promises {
    clock: u64,
    open: BTreeMap<RequestId, (Work, Value, u64)>,
    sectors: BTreeMap<u64, Vec<Entry>>,
    /// Sectors with a write that no flush covered.
    unflushed: BTreeSet<u64>,
    /// Sectors of which less is possible than when they were last checked.
    narrowed: BTreeSet<u64>,
    /// When a sync last failed.
    failed: u64,
}

/// What a replica in sync mode must still hold if it is promoted: what a primary promised while it was in sync.
#[derive(Clone, Debug)]
pub struct Expected {
    /// Which primary.
    pub primary: usize,
    /// What it promised while the replica counted.
    pub promises: Promises,
    /// All that it promised: what must be there where nothing objected to the promotion.
    pub all: Promises,
    /// Whether that primary's content is another one since: what it commits the replica to is not this.
    pub is_outdated: bool,
}

impl Promises {
    /// What a host that was just promoted promises: what its disk holds.
    #[must_use]
    pub fn of(disk: &Disk) -> Self {
        let entry = |value| Entry { value, issued: 0, ended: Some(0), good: true, durable: true };
        let sectors = disk.content().iter().map(|(sector, value)| (*sector, vec![entry(*value)]));
        Self { sectors: sectors.collect(), ..Self::default() }
    }

    /// A request was answered, if it was known here.
    pub fn reply_known(&mut self, id: RequestId, good: bool) {
        if self.open.contains_key(&id) {
            self.reply(id, good);
        }
    }

    /// A request was answered of which a replica that doesn't count need not have anything durably.
    pub fn reply_without(&mut self, id: RequestId, good: bool) {
        let Some((work, value, issued)) = self.open.remove(&id) else { return };
        let work = match work {
            Work::Write { range, .. } => Work::Write { range, fua: false },
            Work::Zero { range, may_unmap, .. } => Work::Zero { range, may_unmap, fua: false },
            Work::Flush => return,
        };
        self.open.insert(id, (work, value, issued));
        self.reply(id, good);
    }

    /// The primary starts again, and what its disk holds now counts like a later write.
    pub fn restarted(&mut self, disk: &Disk) {
        self.clock += 1;
        for (sector, entries) in self.sectors.iter_mut().filter(|(sector, _)| !disk.is_garbage(**sector)) {
            let again = Entry {
                value: disk.value(*sector),
                issued: self.clock,
                ended: Some(self.clock),
                good: true,
                durable: false,
            };
            entries.push(again);
            self.unflushed.insert(*sector);
        }
    }

    /// Every value that sectors may have after a crash of the primary.
    pub fn values(&self) -> BTreeMap<u64, BTreeSet<Value>> {
        let values = |entries: &Vec<Entry>| entries.iter().map(|entry| entry.value).collect();
        self.sectors.iter().map(|(sector, entries)| (*sector, values(entries))).collect()
    }

    /// Checks that a replica that is promoted has everything that was promised while it was in sync (W4), but for what an operator
    /// takes in its place.
    ///
    /// # Panics
    /// When it hasn't.
    pub fn check_known(&self, disk: &Disk, host: usize, is_taken: impl Fn(Value) -> bool) {
        let touched: BTreeSet<u64> = disk.touched().into_iter().chain(self.sectors.keys().copied()).collect();
        for sector in touched {
            let entries = self.sectors.get(&sector).map_or(&[][..], Vec::as_slice);
            for value in disk.possible(sector) {
                let known =
                    entries.iter().any(|entry| entry.value == value) || entries.is_empty() && value == 0;
                assert!(
                    known || is_taken(value),
                    "W4: host {host} is promoted, and sector {sector} is {value}, of {entries:?} that were promised"
                );
            }
        }
    }

    /// An application sends a request; what it writes is `value`.
    pub fn issue(&mut self, id: RequestId, work: Work, value: Value) {
        self.clock += 1;
        self.open.insert(id, (work, value, self.clock));
        let touched: Vec<u64> = match work {
            Work::Write { range, .. } => sectors(range).collect(),
            Work::Zero { range, .. } => {
                self.sectors.range(sectors(range)).map(|(sector, _)| *sector).collect()
            }
            Work::Flush => Vec::new(),
        };
        for sector in touched {
            if !self.sectors.contains_key(&sector) {
                let untouched = Entry { value: 0, issued: 0, ended: Some(0), good: true, durable: true };
                let zeroes = self.open.values().filter_map(|(work, _, issued)| match work {
                    Work::Zero { range, .. } if sectors(*range).contains(&sector) => Some(begun(0, *issued)),
                    _ => None,
                });
                let entries = [untouched].into_iter().chain(zeroes).collect();
                self.sectors.insert(sector, entries);
            }
            self.sectors.get_mut(&sector).expect("it was put there").push(begun(value, self.clock));
            self.unflushed.insert(sector);
        }
    }

    /// A request was answered.
    ///
    /// # Panics
    /// When it is not waiting for an answer.
    pub fn reply(&mut self, id: RequestId, good: bool) {
        self.clock += 1;
        let (work, _, issued) = self.open.remove(&id).expect("a request is answered once");
        match work {
            Work::Write { range, fua } | Work::Zero { range, fua, .. } => {
                for (sector, entries) in self.sectors.range_mut(sectors(range)) {
                    self.narrowed.insert(*sector);
                    for entry in entries.iter_mut().filter(|entry| entry.issued == issued) {
                        let durable = good && fua;
                        let good = good && (durable || issued > self.failed);
                        *entry = Entry { ended: Some(self.clock), good, durable, ..*entry };
                    }
                    forget(entries);
                }
            }
            Work::Flush if good => self.flushed(issued),
            Work::Flush => {}
        }
    }

    /// The primary died: nothing that is open will be answered.
    pub fn crash(&mut self) {
        self.clock += 1;
        self.open.clear();
        for entry in self.sectors.values_mut().flatten().filter(|entry| entry.ended.is_none()) {
            *entry = Entry { ended: Some(self.clock), good: false, ..*entry };
        }
    }

    /// The primary's host lost power: what its disk holds now, it holds durably.
    pub fn power_was_lost(&mut self, disk: &Disk) {
        // What is absent there is still on its way to the host that has it.
        for (sector, entries) in self.sectors.iter_mut().filter(|(sector, _)| !disk.is_garbage(**sector)) {
            let value = disk.value(*sector);
            entries.retain(|entry| entry.value == value);
            entries.drain(..entries.len().saturating_sub(1));
            entries.iter_mut().for_each(|entry| (entry.good, entry.durable) = (true, true));
        }
        self.unflushed.clear();
    }

    /// A sync of the primary's backing failed: what no flush covered may be gone, though it was answered (W5), or will
    /// be once the rest of it is written.
    pub fn sync_failed(&mut self) {
        self.clock += 1;
        self.failed = self.clock;
        for sector in &self.unflushed {
            let entries = self.sectors.get_mut(sector).expect("it has entries");
            entries.iter_mut().filter(|entry| !entry.durable).for_each(|entry| entry.good = false);
        }
    }

    /// What a request that waits for its answer asks for.
    ///
    /// # Panics
    /// When it doesn't wait.
    #[must_use]
    pub fn work(&self, id: RequestId) -> Work {
        self.open.get(&id).expect("a request is answered once").0
    }

    /// The number of a request's content, while it waits for its answer.
    #[must_use]
    pub fn value(&self, id: RequestId) -> Option<Value> {
        self.open.get(&id).map(|(_, value, _)| *value)
    }

    /// The bytes of blocks that open requests write.
    #[must_use]
    pub fn open_bytes(&self, block_size: BlockSize) -> u64 {
        let ranges = self.open.values().map(|(work, ..)| match work {
            Work::Write { range, .. } | Work::Zero { range, .. } => *range,
            Work::Flush => ByteRange::default(),
        });
        ranges
            .map(|range| range.blocks(block_size))
            .map(|blocks| (blocks.end - blocks.start) * block_size.bytes())
            .sum()
    }

    /// Checks that the disk holds only what it may, now and after a power loss at this moment.
    ///
    /// # Panics
    /// When an acknowledged write is lost.
    pub fn check(&mut self, disk: &Disk) {
        self.narrowed.clear();
        let touched: BTreeSet<u64> = disk.touched().into_iter().chain(self.sectors.keys().copied()).collect();
        touched.into_iter().for_each(|sector| self.check_sector(disk, sector));
    }

    /// The same, where the disk has changed or less is possible than before.
    ///
    /// # Panics
    /// When an acknowledged write is lost.
    pub fn check_changed(&mut self, disk: &Disk, changed: &[u64]) {
        let narrowed = std::mem::take(&mut self.narrowed);
        changed.iter().for_each(|sector| self.check_sector(disk, *sector));
        narrowed.into_iter().for_each(|sector| self.check_sector(disk, sector));
    }

    fn check_sector(&self, disk: &Disk, sector: u64) {
        let entries = self.sectors.get(&sector).map_or(&[][..], Vec::as_slice);
        for value in disk.possible(sector) {
            let known = entries.iter().any(|entry| entry.value == value) || entries.is_empty() && value == 0;
            assert!(known, "W4: sector {sector} may come back as {value}, of {entries:?}");
        }
        let value = disk.value(sector);
        let is_current = |entry: &Entry| {
            let later = |other: &Entry| other.good && entry.ended.is_some_and(|ended| ended < other.issued);
            entry.value == value && !entries.iter().any(later)
        };
        let fine = entries.iter().any(is_current) || entries.is_empty() && value == 0;
        assert!(fine, "W4: sector {sector} reads as {value}, of {entries:?}");
    }

    fn flushed(&mut self, issued: u64) {
        let sectors: Vec<u64> = self.unflushed.iter().copied().collect();
        for sector in sectors {
            self.narrowed.insert(sector);
            let entries = self.sectors.get_mut(&sector).expect("it has entries");
            for entry in entries.iter_mut() {
                entry.durable |= entry.good && entry.ended.is_some_and(|ended| ended <= issued);
            }
            forget(entries);
            if entries.iter().all(|entry| entry.durable) {
                self.unflushed.remove(&sector);
            }
        }
    }
}

fn begun(value: Value, issued: u64) -> Entry {
    Entry { value, issued, ended: None, good: false, durable: false }
}

/// Forgets what a durable, later write has made impossible.
fn forget(entries: &mut Vec<Entry>) {
    let newest = entries.iter().filter(|entry| entry.durable).map(|entry| entry.issued).max().unwrap_or(0);
    entries.retain(|entry| entry.ended.is_none_or(|ended| ended >= newest));
}
