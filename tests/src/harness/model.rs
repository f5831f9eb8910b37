//! What must be true, kept beside the machines and without looking into them.
//!
//! [`Promises`] knows what applications were told, and so what the primary's disk may hold (W4). [`History`] is the
//! one order of writes on a primary (W1). [`Image`] is what a consistent replica may hold (W3).

use super::disk::{Data, Disk, Value, put, sectors};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::tracker::{RequestId, Work};
use blockmirror_protocol::units::{BlockSize, Sequence};
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Copy, Debug)]
struct Entry {
    value: Value,
    issued: u64,
    ended: Option<u64>,
    good: bool,
    durable: bool,
}

/// What each sector of the primary may hold, as an application can know it. See the module.
#[derive(Debug, Default)]
pub struct Promises {
    clock: u64,
    open: BTreeMap<RequestId, (Work, Value, u64)>,
    sectors: BTreeMap<u64, Vec<Entry>>,
    /// Sectors with a write that no flush covered.
    unflushed: BTreeSet<u64>,
}

impl Promises {
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
                for (_, entries) in self.sectors.range_mut(sectors(range)) {
                    for entry in entries.iter_mut().filter(|entry| entry.issued == issued) {
                        *entry = Entry { ended: Some(self.clock), good, durable: good && fua, ..*entry };
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
        for (sector, entries) in &mut self.sectors {
            let value = disk.content().get(sector).copied().unwrap_or_default();
            entries.retain(|entry| entry.value == value);
            entries.drain(..entries.len().saturating_sub(1));
            entries.iter_mut().for_each(|entry| (entry.good, entry.durable) = (true, true));
        }
        self.unflushed.clear();
    }

    /// Whether a request waits for its answer.
    #[must_use]
    pub fn is_open(&self, id: RequestId) -> bool {
        self.open.contains_key(&id)
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

    /// How many requests wait for an answer.
    #[must_use]
    pub fn open_requests(&self) -> usize {
        self.open.len()
    }

    /// Checks that the disk holds only what it may, now and after a power loss at this moment.
    ///
    /// # Panics
    /// When an acknowledged write is lost.
    pub fn check(&self, disk: &Disk) {
        let touched: BTreeSet<u64> = disk.touched().into_iter().chain(self.sectors.keys().copied()).collect();
        for sector in touched {
            let entries = self.sectors.get(&sector).map_or(&[][..], Vec::as_slice);
            for value in disk.possible(sector) {
                let known =
                    entries.iter().any(|entry| entry.value == value) || entries.is_empty() && value == 0;
                assert!(known, "W4: sector {sector} may come back as {value}, of {entries:?}");
            }
            let value = disk.content().get(&sector).copied().unwrap_or_default();
            let is_current = |entry: &Entry| {
                let later =
                    |other: &Entry| other.good && entry.ended.is_some_and(|ended| ended < other.issued);
                entry.value == value && !entries.iter().any(later)
            };
            let fine = entries.iter().any(is_current) || entries.is_empty() && value == 0;
            assert!(fine, "W4: sector {sector} reads as {value}, of {entries:?}");
        }
    }

    fn flushed(&mut self, issued: u64) {
        let sectors: Vec<u64> = self.unflushed.iter().copied().collect();
        for sector in sectors {
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

/// The writes of one generation of a primary in their order. See the module.
#[derive(Debug, Default)]
pub struct History {
    base: BTreeMap<u64, Value>,
    writes: BTreeMap<Sequence, Vec<(ByteRange, Data)>>,
}

impl History {
    /// A generation that begins with this content.
    #[must_use]
    pub fn new(base: BTreeMap<u64, Value>) -> Self {
        Self { base, writes: BTreeMap::new() }
    }

    /// A write, or what a failed one left, has this place in the order.
    pub fn record(&mut self, sequence: Sequence, range: ByteRange, data: Data) {
        self.writes.entry(sequence).or_default().push((range, data));
    }

    /// The content after this write.
    #[must_use]
    pub fn content_at(&self, sequence: Sequence) -> BTreeMap<u64, Value> {
        let mut content = self.base.clone();
        for (range, data) in self.writes.range(..=sequence).flat_map(|(_, writes)| writes) {
            put(&mut content, *range, data);
        }
        content
    }
}

/// A primary's life and an epoch in it.
pub type EpochKey = (u64, u64);

/// A live frame as it was sent.
pub type SentFrame = (EpochKey, ByteRange, Data);

/// What a consistent replica may hold: the content at its last durable epoch, and any of the next one. See the module.
#[derive(Clone, Debug, Default)]
pub struct Image {
    base: BTreeMap<u64, Value>,
    frames: Vec<SentFrame>,
}

impl Image {
    /// The image at a commit, and the frames that were sent since.
    #[must_use]
    pub fn new(base: BTreeMap<u64, Value>, frames: Vec<SentFrame>) -> Self {
        Self { base, frames }
    }

    /// A frame was sent.
    pub fn sent(&mut self, frame: SentFrame) {
        self.frames.push(frame);
    }

    /// Epochs up to this one were acknowledged as durable.
    pub fn durable(&mut self, until: EpochKey) {
        let (durable, later) =
            std::mem::take(&mut self.frames).into_iter().partition(|(key, ..)| *key <= until);
        self.frames = later;
        let durable: Vec<SentFrame> = durable;
        for (_, range, data) in durable {
            put(&mut self.base, range, &data);
        }
    }

    /// Checks that a power loss at this moment leaves a legal image.
    ///
    /// # Panics
    /// When it might not.
    pub fn check(&self, disk: &Disk, who: usize) {
        let next = self.frames.iter().map(|(key, ..)| *key).min();
        let touched: BTreeSet<u64> = disk.touched().into_iter().chain(self.base.keys().copied()).collect();
        for sector in touched {
            let durable = self.base.get(&sector).copied().unwrap_or_default();
            for value in disk.possible(sector) {
                let in_next = || {
                    self.frames.iter().any(|(key, range, data)| {
                        Some(*key) == next && sectors(*range).contains(&sector) && data.at(sector) == value
                    })
                };
                assert!(
                    value == durable || in_next(),
                    "W3: sector {sector} of replica {who} may be {value}; it was {durable} in the last durable epoch"
                );
            }
        }
    }
}
