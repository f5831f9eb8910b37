//! A disk that may lose, keep or tear what no sync covered.
//!
//! Content is a sparse map from sector (512 bytes) to a value, the number of the write that put it there; 0 stands for
//! zeroes. Beside the newest value the disk remembers all older ones that a power loss may bring back. A disk with
//! larger physical sectors reads, modifies and writes: what it read of the neighbours when the write began, it writes
//! back when the write ends.
//!
//! A sync that fails drops what it was to cover, in part or whole, as a kernel drops dirty pages.
//!
//! The disk insists on W1: writes that share a physical sector never run at the same time.

use super::random::Random;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::SECTOR_BYTES;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// What a sector holds: the number of the write that put it there, or 0 for zeroes.
pub type Value = u64;

/// What a read gives of a sector that holds nothing of the volume.
pub const GARBAGE: Value = 1 << 47;

/// Content of a range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Data {
    /// Every sector holds this.
    Fill(Value),
    /// These sectors hold these values, all others of the range zeroes. Ascending.
    Sparse(Vec<(u64, Value)>),
}

/// The sectors of a range.
#[must_use]
pub fn sectors(range: ByteRange) -> Range<u64> {
    range.offset / SECTOR_BYTES..range.end() / SECTOR_BYTES
}

impl Data {
    /// How many bytes the range begins with that hold nothing.
    #[must_use]
    pub fn hole_bytes(&self, range: ByteRange) -> u64 {
        match self {
            Self::Fill(_) => 0,
            Self::Sparse(values) => {
                let first = values.first().map_or(range.end(), |(sector, _)| sector * SECTOR_BYTES);
                first - range.offset
            }
        }
    }

    /// What a sector of the range holds.
    #[must_use]
    pub fn at(&self, sector: u64) -> Value {
        match self {
            Self::Fill(value) => *value,
            Self::Sparse(values) => {
                values.binary_search_by_key(&sector, |(at, _)| *at).map_or(0, |index| values[index].1)
            }
        }
    }

    /// The sectors of `range` that are not zero.
    #[must_use]
    pub fn not_zero(&self, range: ByteRange) -> Vec<(u64, Value)> {
        match self {
            Self::Fill(0) => Vec::new(),
            Self::Fill(value) => sectors(range).map(|sector| (sector, *value)).collect(),
            Self::Sparse(values) => {
                let range = sectors(range);
                values.iter().copied().filter(|(at, _)| range.contains(at)).collect()
            }
        }
    }
}

/// Puts data into sparse content.
pub fn put(content: &mut BTreeMap<u64, Value>, range: ByteRange, data: &Data) {
    let old: Vec<u64> = content.range(sectors(range)).map(|(sector, _)| *sector).collect();
    for sector in old {
        content.remove(&sector);
    }
    content.extend(data.not_zero(range));
}

/// Names an operation under way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct DiskOperation(pub u64);

#[derive(Clone, Debug)]
enum Running {
    /// One that has to read around itself what can't be read fails, and writes nothing.
    Write {
        range: ByteRange,
        data: Data,
        durable: bool,
        fails: bool,
    },
    Sync {
        until: u64,
    },
    Read {
        range: ByteRange,
        before: Vec<(u64, Value)>,
    },
}

/// How an operation ended.
#[derive(Debug)]
pub enum Ended {
    /// A write or sync, well or not.
    Done(bool),
    /// A read.
    Read(Data),
}

/// What a crash does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Crash {
    /// The agent dies: what ended stays, what was under way is done in part.
    Process,
    /// The host loses power: what no sync covered may also be lost, whole or in part.
    Power,
}

/// One host's backing.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    sector_bytes: u64,
    content: BTreeMap<u64, Value>,
    /// Of sectors that changed since the last sync: the durable value, then each later one, with when it was written.
    versions: BTreeMap<u64, Vec<(u64, Value)>>,
    running: BTreeMap<DiskOperation, Running>,
    clock: u64,
    changes: u64,
    /// Sectors that may hold something new since the last [`Disk::take_changed`], with repetitions.
    changed: Vec<u64>,
    lost: Vec<u64>,
    /// Sectors that can't be read until they are written.
    bad: BTreeSet<u64>,
    /// Sectors that have rotted, whatever was written to them since.
    rotten: BTreeSet<u64>,
    /// Sectors that hold nothing of the volume: what counts is what another host holds, which [`Disk::content`] gives.
    garbage: BTreeSet<u64>,
    /// What that other host holds.
    truth: BTreeMap<u64, Value>,
    /// Whether there is such a host; else garbage is content like any other.
    is_lacking: bool,
}

impl Disk {
    /// A disk of zeroes.
    #[must_use]
    pub fn new(sector_bytes: u64) -> Self {
        Self {
            sector_bytes,
            content: BTreeMap::new(),
            versions: BTreeMap::new(),
            running: BTreeMap::new(),
            clock: 0,
            changes: 0,
            changed: Vec::new(),
            lost: Vec::new(),
            bad: BTreeSet::new(),
            rotten: BTreeSet::new(),
            garbage: BTreeSet::new(),
            truth: BTreeMap::new(),
            is_lacking: false,
        }
    }

    /// A disk of so many bytes that holds nothing of the volume, of which this is the content elsewhere.
    #[must_use]
    pub fn lacking(sector_bytes: u64, size_bytes: u64, content: BTreeMap<u64, Value>) -> Self {
        let garbage = (0..size_bytes / SECTOR_BYTES).collect();
        Self { garbage, truth: content.clone(), is_lacking: true, ..Self::holding(sector_bytes, content) }
    }

    /// Whether any sector holds nothing of the volume, or may after a power loss.
    #[must_use]
    pub fn has_garbage(&self) -> bool {
        let may_be = |versions: &Vec<(u64, Value)>| versions.iter().any(|(_, value)| *value == GARBAGE);
        !self.garbage.is_empty() || self.versions.values().any(may_be)
    }

    /// Whether a sector holds nothing of the volume.
    #[must_use]
    pub fn is_garbage(&self, sector: u64) -> bool {
        self.garbage.contains(&sector)
    }

    /// Whether what another host holds counts where a sector holds nothing.
    #[must_use]
    pub fn is_lacking(&self) -> bool {
        self.is_lacking
    }

    /// Another host holds this, which counts here where a sector holds nothing.
    pub fn set_truth(&mut self, sector: u64, value: Value) {
        self.truth.insert(sector, value);
        if self.garbage.contains(&sector) {
            self.set(sector, GARBAGE);
        }
    }

    /// Whatever sectors of this range hold, it is not believed.
    pub fn distrust(&mut self, range: ByteRange) {
        for sector in sectors(range) {
            self.versions.remove(&sector);
            if !self.garbage.contains(&sector) {
                self.set(sector, GARBAGE);
            }
        }
    }

    /// The sectors that [`Disk::take_changed`] will give, with repetitions.
    #[must_use]
    pub fn peek_changed(&self) -> Vec<u64> {
        self.changed.clone()
    }

    /// What other hosts hold counts here no more: what is on the disk does.
    pub fn forget_truth(&mut self) {
        let garbage = std::mem::take(&mut self.garbage);
        self.truth.clear();
        self.changes += u64::from(!garbage.is_empty());
        self.changed.extend(&garbage);
        self.content.extend(garbage.into_iter().map(|sector| (sector, GARBAGE)));
        self.is_lacking = false;
    }

    /// What counts as the content of a sector that holds this.
    fn counted(&self, sector: u64, value: Value) -> Value {
        match value == GARBAGE && self.is_lacking {
            true => self.truth.get(&sector).copied().unwrap_or_default(),
            false => value,
        }
    }

    /// What is on the disk.
    fn raw(&self, sector: u64) -> Value {
        if self.garbage.contains(&sector) { GARBAGE } else { self.value(sector) }
    }

    /// A disk that holds this durably.
    #[must_use]
    pub fn holding(sector_bytes: u64, content: BTreeMap<u64, Value>) -> Self {
        Self { content, ..Self::new(sector_bytes) }
    }

    /// The physical sector in bytes.
    #[must_use]
    pub fn sector_bytes(&self) -> u64 {
        self.sector_bytes
    }

    /// A sector holds something else, durably, which nobody of ours wrote. Nothing is being written.
    pub fn replace(&mut self, sector: u64, value: Value) {
        self.versions.remove(&sector);
        self.content.insert(sector, value);
        self.changes += 1;
        self.changed.push(sector);
    }

    /// A sector rots: it holds something else, and nobody knows.
    pub fn rot(&mut self, sector: u64, value: Value) {
        self.replace(sector, value);
        self.rotten.insert(sector);
    }

    /// Whether a sector has rotted.
    #[must_use]
    pub fn is_rotten(&self, sector: u64) -> bool {
        self.rotten.contains(&sector)
    }

    /// Whether any has.
    #[must_use]
    pub fn has_rotten(&self) -> bool {
        !self.rotten.is_empty()
    }

    /// What has rotted is mended.
    pub fn forget_rotten(&mut self) {
        self.rotten.clear();
    }

    /// What reads give: the sectors that are not zero.
    #[must_use]
    pub fn content(&self) -> &BTreeMap<u64, Value> {
        &self.content
    }

    /// What a read of a sector gives.
    #[must_use]
    pub fn value(&self, sector: u64) -> Value {
        self.content.get(&sector).copied().unwrap_or_default()
    }

    /// The sectors that hold something else, or may after a power loss, than at the last call.
    pub fn take_changed(&mut self) -> Vec<u64> {
        let mut changed = std::mem::take(&mut self.changed);
        changed.sort_unstable();
        changed.dedup();
        changed
    }

    /// What a read of a range gives.
    #[must_use]
    pub fn read(&self, range: ByteRange) -> Vec<(u64, Value)> {
        if self.garbage.range(sectors(range)).next().is_none() {
            return self.counted_in(range);
        }
        let held = sectors(range).map(|sector| (sector, self.raw(sector)));
        held.filter(|(_, value)| *value != 0).collect()
    }

    /// What counts as the content of a range.
    #[must_use]
    pub fn counted_in(&self, range: ByteRange) -> Vec<(u64, Value)> {
        self.content.range(sectors(range)).map(|(sector, value)| (*sector, *value)).collect()
    }

    /// The physical sector around a sector can't be read any more, until it is written.
    pub fn spoil(&mut self, sector: u64) {
        let range = ByteRange::new(sector * SECTOR_BYTES, SECTOR_BYTES).widened(self.sector_bytes);
        self.bad.extend(sectors(range));
    }

    /// Everything can be read again.
    pub fn heal(&mut self) {
        self.bad.clear();
    }

    /// The physical sectors that can't be read, as far as it is asked for them.
    #[must_use]
    pub fn unreadable(&self, limit: usize) -> Vec<ByteRange> {
        let sector = |at: &u64| ByteRange::new(at * SECTOR_BYTES, SECTOR_BYTES).widened(self.sector_bytes);
        let mut unreadable: Vec<ByteRange> = self.bad.iter().map(sector).collect();
        unreadable.dedup();
        unreadable.truncate(limit);
        unreadable
    }

    /// Whether a range can be read.
    #[must_use]
    pub fn can_read(&self, range: ByteRange) -> bool {
        self.bad.range(sectors(range)).next().is_none()
    }

    /// Raised with each change of content.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Whether no operation is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.running.is_empty()
    }

    /// Whether everything is durable.
    #[must_use]
    pub fn is_durable(&self) -> bool {
        self.versions.is_empty()
    }

    /// Begins a write.
    ///
    /// # Panics
    /// When it shares a physical sector with a write that is under way (W1).
    pub fn write(&mut self, id: DiskOperation, range: ByteRange, data: &Data, durable: bool) {
        let wide = range.widened(self.sector_bytes);
        for running in self.running.values() {
            if let Running::Write { range: other, .. } = running {
                assert!(!other.overlaps(wide), "W1: {range:?} is written while {other:?} is");
            }
        }
        let edge = |at| ByteRange::new(at, SECTOR_BYTES).widened(self.sector_bytes);
        let fails = wide.offset != range.offset && !self.can_read(edge(range.offset))
            || wide.end() != range.end() && !self.can_read(edge(range.end() - SECTOR_BYTES));
        let data = if wide == range { data.clone() } else { self.modify(wide, range, data) };
        let affected = self.affected(wide, &data);
        self.changed.extend(affected);
        self.running.insert(id, Running::Write { range: wide, data, durable, fails });
    }

    /// All of it is synced while nothing is written.
    pub fn sync_now(&mut self) {
        assert!(self.running.is_empty(), "nothing is being written");
        self.make_durable(self.clock);
        self.versions.clear();
    }

    /// Begins a sync.
    pub fn sync(&mut self, id: DiskOperation) {
        self.running.insert(id, Running::Sync { until: self.clock });
    }

    /// Begins a read. A write that runs beside it may be seen in part.
    pub fn begin_read(&mut self, id: DiskOperation, range: ByteRange) {
        let before = self.read(range);
        self.running.insert(id, Running::Read { range, before });
    }

    /// Ends an operation, unless a crash ended it before. One that fails is done in part.
    pub fn end(&mut self, id: DiskOperation, fails: bool, random: &mut Random) -> Option<Ended> {
        Some(match self.running.remove(&id)? {
            Running::Write { range, data, fails: true, .. } => {
                self.note_dropped(range, &data);
                Ended::Done(false)
            }
            Running::Write { range, data, durable, .. } => {
                if fails {
                    self.apply_in_part(range, &data, random);
                    if durable && random.once_in(2) {
                        self.lose(self.clock, random);
                    }
                } else {
                    self.apply(range, &data, durable);
                }
                Ended::Done(!fails)
            }
            Running::Sync { until } => {
                if fails {
                    self.lose(until, random);
                } else {
                    self.make_durable(until);
                }
                Ended::Done(!fails)
            }
            Running::Read { range, before } => {
                let (before, after) = (Data::Sparse(before), Data::Sparse(self.read(range)));
                let touched: BTreeSet<u64> = [&before, &after]
                    .into_iter()
                    .flat_map(|data| data.not_zero(range))
                    .map(|(at, _)| at)
                    .collect();
                let seen = touched.into_iter().map(|sector| {
                    let data = if random.once_in(2) { &before } else { &after };
                    (sector, data.at(sector))
                });
                Ended::Read(Data::Sparse(seen.filter(|(_, value)| *value != 0).collect()))
            }
        })
    }

    /// Crashes the host or its agent.
    pub fn crash(&mut self, crash: Crash, random: &mut Random) {
        self.lost.clear();
        for running in std::mem::take(&mut self.running).into_values() {
            match running {
                Running::Write { range, data, fails: true, .. } => self.note_dropped(range, &data),
                Running::Write { range, data, .. } => self.apply_in_part(range, &data, random),
                Running::Sync { .. } | Running::Read { .. } => {}
            }
        }
        if crash == Crash::Process {
            return;
        }
        // Some disks lose nothing, some everything, some any of it.
        let manner = random.below(3);
        for (sector, versions) in std::mem::take(&mut self.versions) {
            let survivor = match manner {
                0 => 0,
                1 => versions.len() - 1,
                _ => random.below(versions.len() as u64) as usize,
            };
            self.set(sector, versions[survivor].1);
        }
    }

    /// The sectors that a failed sync has given an older value since the last call.
    pub fn take_lost(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.lost)
    }

    /// Every value that a sector may turn out to hold after a power loss now, what is under way included; some may come
    /// more than once.
    #[must_use]
    pub fn possible(&self, sector: u64) -> Vec<Value> {
        let mut values: Vec<Value> = match self.versions.get(&sector) {
            Some(versions) => versions.iter().map(|(_, value)| self.counted(sector, *value)).collect(),
            None => vec![self.value(sector)],
        };
        for running in self.running.values() {
            if let Running::Write { range, data, fails: false, .. } = running
                && sectors(*range).contains(&sector)
            {
                values.push(self.counted(sector, data.at(sector)));
            }
        }
        values
    }

    /// Sectors for which [`Disk::possible`] may give anything but zero.
    #[must_use]
    pub fn touched(&self) -> BTreeSet<u64> {
        let mut touched: BTreeSet<u64> = self.content.keys().chain(self.versions.keys()).copied().collect();
        for running in self.running.values() {
            if let Running::Write { range, data, fails: false, .. } = running {
                touched.extend(data.not_zero(*range).into_iter().map(|(sector, _)| sector));
            }
        }
        touched
    }

    fn modify(&self, wide: ByteRange, range: ByteRange, data: &Data) -> Data {
        let mut values: BTreeMap<u64, Value> = self.read(wide).into_iter().collect();
        put(&mut values, range, data);
        Data::Sparse(values.into_iter().collect())
    }

    fn apply(&mut self, range: ByteRange, data: &Data, durable: bool) {
        self.clock += 1;
        if !self.bad.is_empty() {
            for sector in sectors(range) {
                self.bad.remove(&sector);
            }
        }
        for sector in self.affected(range, data) {
            self.changed.push(sector);
            self.store(sector, data.at(sector), durable);
        }
    }

    fn apply_in_part(&mut self, range: ByteRange, data: &Data, random: &mut Random) {
        self.clock += 1;
        let (begin, length) = (range.offset / SECTOR_BYTES, range.length / SECTOR_BYTES);
        let manner = random.below(4);
        let cut = begin + random.below(length + 1);
        for sector in self.affected(range, data) {
            self.changed.push(sector);
            let done = match manner {
                0 => false,
                1 => sector < cut,
                2 => random.once_in(2),
                _ => true,
            };
            if done {
                self.store(sector, data.at(sector), false);
            }
        }
    }

    /// A write ended without a trace: what it would have left is possible no more.
    fn note_dropped(&mut self, range: ByteRange, data: &Data) {
        let affected = self.affected(range, data);
        self.changed.extend(affected);
    }

    /// The sectors of a range that hold anything, or will.
    fn affected(&self, range: ByteRange, data: &Data) -> BTreeSet<u64> {
        let held = self.content.range(sectors(range)).map(|(sector, _)| *sector);
        let older = self.versions.range(sectors(range)).map(|(sector, _)| *sector);
        let lacking = self.garbage.range(sectors(range)).copied();
        held.chain(older)
            .chain(lacking)
            .chain(data.not_zero(range).into_iter().map(|(sector, _)| sector))
            .collect()
    }

    fn store(&mut self, sector: u64, value: Value, durable: bool) {
        let old = self.raw(sector);
        if durable {
            self.versions.remove(&sector);
        } else if old != value {
            self.versions.entry(sector).or_insert_with(|| vec![(0, old)]).push((self.clock, value));
        }
        self.set(sector, value);
    }

    fn set(&mut self, sector: u64, value: Value) {
        self.changes += 1;
        self.changed.push(sector);
        match value == GARBAGE && self.is_lacking {
            true => self.garbage.insert(sector),
            false => self.garbage.remove(&sector),
        };
        let value = self.counted(sector, value);
        if value == 0 {
            self.content.remove(&sector);
        } else {
            self.content.insert(sector, value);
        }
    }

    fn make_durable(&mut self, until: u64) {
        let changed = &mut self.changed;
        self.versions.retain(|sector, versions| {
            let newest = versions.iter().rposition(|(written, _)| *written <= until).unwrap_or(0);
            if newest > 0 {
                changed.push(*sector);
            }
            versions.drain(..newest);
            versions.len() > 1
        });
    }

    /// A sync failed: of what it was to cover, any version of a sector stays, and that is durable then. The kernel
    /// tells of this once; a later sync succeeds (W5).
    fn lose(&mut self, until: u64, random: &mut Random) {
        let manner = random.below(3);
        for (sector, mut versions) in std::mem::take(&mut self.versions) {
            let covered = versions.iter().rposition(|(written, _)| *written <= until).unwrap_or(0);
            let survivor = match manner {
                0 => 0,
                1 => covered,
                _ => random.below(covered as u64 + 1) as usize,
            };
            versions.drain(survivor + 1..=covered);
            versions.drain(..survivor);
            let (_, newest) = *versions.last().expect("the survivor is there");
            if versions.len() > 1 {
                self.versions.insert(sector, versions);
            }
            self.changed.push(sector);
            if self.raw(sector) != newest {
                self.set(sector, newest);
                self.lost.push(sector);
            }
        }
    }
}
