//! What a primary's own copy lacks, and how it comes to have it (S4): absent blocks, what is fetched of them, what waits for that.
//!
//! A primary with a new backing serves at once. All of its blocks are absent then: their content is that of one replica, the source.
//! A block is fetched from there when an application reads it or writes a part of it, and in time all of them are. One that is
//! overwritten whole is not fetched.
//!
//! # The rule
//!
//! *As long as a block's bit is set in the file, nothing that was answered is in it here alone.* So after any crash a block with a
//! bit is what the source has, and it may be fetched again. A bit is cleared in the file once the block's content is durable
//! on the backing; a write to a block with a bit is answered after that.
//!
//! A block may be marked in the map for the source as well, as what was written last is after a crash. It is fetched as any other: what
//! the source has counts. Then it is copied there, since the source may have it in its memory only, and lose it (D2, D3).
//!
//! # The states of a block
//!
//! ```text
//!   missing ──> fetched, or overwritten whole ──> here, not durable ──> durable ──> its bit is cleared in the file: present
//!      ^                   │
//!      └───────────────────┘ that failed, or the source was lost
//! ```
//!
//! A fetch that the source can't read is asked for again in halves. A single block that it can't read is *unreadable*: what needs it
//! fails, nothing else does, and it is asked for again when it is wanted again.
//!
//! # Bounds
//!
//! Fetches by [`FETCHES`] and their bytes; waiting reads by the front ends, and what is wanted by them; memory by what is neither all
//! absent nor all present.

use crate::dirty_map::DirtyMap;
use crate::disk::absent::{self, Header};
use crate::disk::dirty_map::{BLOCKS_PER_PAGE, Base, page_count};
use crate::disk::{MetadataError, Page};
use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use crate::units::{HostId, RequestId, Sequence, Time};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::ops::Range;
use std::time::Duration;

/// How many bytes one fetch asks for at most.
pub const FETCH_BYTES: u64 = 1 << 20;
/// How many fetches are under way at most. The source takes as many.
pub const FETCHES: usize = 64;
/// How many bytes are fetched at a time that nobody waits for, when no application uses the volume, and when one does (R3).
const IDLE_BYTES: u64 = 16 << 20;
const BUSY_BYTES: u64 = 1 << 20;
/// So many bytes, or what has waited for so long, are made durable where nobody waits for it.
const SYNC_BYTES: u64 = 64 << 20;
const SYNC_TIME: Duration = Duration::from_secs(1);
/// How long nothing is fetched after content could not be written here, or read there.
const PAUSE: Duration = Duration::from_secs(1);

/// Names a fetch. Never used twice while a primary is open.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct FetchId(pub u64);

/// A fetch that is asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Asked {
    /// Names it.
    pub id: FetchId,
    /// Whole blocks.
    pub range: ByteRange,
    /// Whether somebody waits for it.
    pub is_awaited: bool,
}

/// A part of what was fetched, as it is written here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Landing {
    /// What it is part of.
    pub fetch: FetchId,
    /// Whole blocks.
    pub range: ByteRange,
}

/// How much is fetched.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Need {
    /// Only what somebody waits for.
    Wanted,
    /// Little beside that: an application uses the volume (R3).
    Little,
    /// As much as goes.
    All,
}

/// What a fetch gave.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fetched {
    /// Bytes, as many as were asked for.
    Data,
    /// The range reads as zeroes.
    Zero,
    /// The source could not read it.
    Failed,
}

/// The changes of the file, each a page of bits by its number. The shell writes all of them at the first of their
/// [`absent::places`], durably, then at the second, durably.
pub type Changes = Vec<(u64, Box<Page>)>;

/// How far a rebuild is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Progress {
    /// The replica that has what is absent.
    pub source: HostId,
    /// Bytes of blocks that are not here.
    pub missing_bytes: u64,
    /// How many requests wait for some of them.
    pub waiting: usize,
    /// Bytes of blocks that the source can't read.
    pub unreadable_bytes: u64,
    /// Whether the file can't be written: flushes wait, and so does what is written to blocks that are absent.
    pub is_unrecorded: bool,
    /// Whether that replica can be it no more: its copy is another one, or it is no replica of this primary.
    pub is_source_lost: bool,
}

/// The blocks that are absent on a primary.
#[derive(Debug)]
pub struct Absent {
    header: Header,
    size_bytes: u64,
    /// Blocks whose bit is set in memory: absent, or here and not known to be durable.
    bits: DirtyMap,
    /// Those of them whose content is here.
    here: DirtyMap,
    /// The number of the newest change of the file.
    serial: u64,
    /// Blocks that are being overwritten whole, by the write that does.
    overwriting: BTreeMap<Sequence, Vec<Range<u64>>>,
    fetches: BTreeMap<FetchId, Fetch>,
    next: FetchId,
    /// Blocks of fetches, start to end; disjoint.
    under_way: BTreeMap<u64, u64>,
    /// What of them nobody waits for, in bytes.
    filling_bytes: u64,
    /// What is to be fetched first, in this order, as far as it is not asked for.
    wanted: VecDeque<Range<u64>>,
    /// What is to be fetched next, though nobody waits for it.
    early: VecDeque<Range<u64>>,
    /// Blocks that the source can't read.
    unreadable: BTreeSet<u64>,
    /// Where the search for missing blocks goes on.
    cursor: u64,
    paused_until: Option<Time>,
    reads: Vec<(RequestId, Range<u64>)>,
    /// Blocks that came here since the last sync began, and since when there are some.
    unsynced: Vec<Range<u64>>,
    unsynced_bytes: u64,
    unsynced_since: Option<Time>,
    /// Those that the running sync covers.
    syncing: Vec<Range<u64>>,
    /// Those whose bits are cleared in memory, and perhaps not in the file.
    clearing: Vec<Range<u64>>,
    is_writing: bool,
}

#[derive(Debug)]
struct Fetch {
    blocks: Range<u64>,
    /// Whether nobody waited for it when it was asked for, so that it counts among what is filled.
    fills: bool,
    /// Whether anybody waits for it.
    is_wanted: bool,
    /// What was overwritten since it was asked for.
    rewritten: Vec<Range<u64>>,
    /// How many landings are under way, once the content is here.
    landings: Option<usize>,
}

impl Absent {
    /// What the header of the file and its pages of bits say. `pages` are all that were ever written, by their number.
    ///
    /// # Errors
    /// [`MetadataError`] when the file is of another volume than these blocks.
    pub fn new(
        expected: &Header,
        header: Header,
        size_bytes: u64,
        pages: impl IntoIterator<Item = (u64, absent::Read)>,
    ) -> Result<Self, MetadataError> {
        if (Header { source: header.source, ..*expected }) != header {
            return Err(MetadataError::Foreign { what: "map of absent blocks" });
        }
        let of_memory = || DirtyMap::full(header.volume, header.source, size_bytes, header.block_size);
        let (mut bits, mut serial) = (of_memory(), 0);
        for (page, read) in pages {
            serial = serial.max(read.serial);
            let blocks = absent::blocks_of(page, header.blocks);
            let is_set = |block: u64| {
                let bit = (block - blocks.start) as usize;
                read.bits[bit / 64] >> (bit % 64) & 1 == 1
            };
            let mut at = blocks.start;
            while let Some(start) = (at..blocks.end).find(|block| !is_set(*block)) {
                at = (start..blocks.end).find(|block| is_set(*block)).unwrap_or(blocks.end);
                bits.clear(start..at);
            }
        }
        Ok(Self {
            header,
            size_bytes,
            bits,
            here: of_memory().clean(Base::default()),
            serial,
            overwriting: BTreeMap::new(),
            fetches: BTreeMap::new(),
            next: FetchId(1),
            under_way: BTreeMap::new(),
            filling_bytes: 0,
            wanted: VecDeque::new(),
            early: VecDeque::new(),
            unreadable: BTreeSet::new(),
            cursor: 0,
            paused_until: None,
            reads: Vec::new(),
            unsynced: Vec::new(),
            unsynced_bytes: 0,
            unsynced_since: None,
            syncing: Vec::new(),
            clearing: Vec::new(),
            is_writing: false,
        })
    }

    /// The replica that has what is absent.
    #[must_use]
    pub fn source(&self) -> HostId {
        self.header.source
    }

    /// How far the rebuild is.
    #[must_use]
    pub fn progress(&self) -> Progress {
        let missing = self.bits.dirty_blocks() - self.here.dirty_blocks();
        let missing_bytes = (missing * self.header.block_size.bytes()).min(self.size_bytes);
        Progress {
            source: self.source(),
            missing_bytes,
            waiting: self.reads.len(),
            unreadable_bytes: self.unreadable.len() as u64 * self.header.block_size.bytes(),
            is_unrecorded: !self.is_writing && !self.clearing.is_empty(),
            is_source_lost: false,
        }
    }

    /// Whether every block is here, durably, and the file says so.
    #[must_use]
    pub fn is_filled(&self) -> bool {
        self.bits.is_clean() && self.clearing.is_empty() && !self.is_writing
    }

    /// Whether the content of any of these bytes is not here.
    #[must_use]
    pub fn is_missing(&self, range: ByteRange) -> bool {
        self.missing(self.blocks(range)).next().is_some()
    }

    /// The first of these blocks whose content is not here, with those that follow.
    #[must_use]
    pub fn next_missing(&self, blocks: &Range<u64>) -> Option<Range<u64>> {
        self.missing(blocks.clone()).next().filter(|_| !planted(Bug::CopyAbsent))
    }

    /// Whether a write to this range must wait: it overwrites parts of blocks that are not here.
    #[must_use]
    pub fn lacks_edges(&self, range: ByteRange) -> bool {
        self.edges(range).into_iter().any(|edge| self.missing(edge).next().is_some())
    }

    /// A write to this range waits for the blocks that it overwrites parts of.
    pub fn want_edges(&mut self, range: ByteRange) {
        self.edges(range).into_iter().for_each(|edge| self.want(edge));
    }

    /// A read that waits until what it reads is here.
    pub fn wait(&mut self, read: RequestId, range: ByteRange) {
        self.want(self.blocks(range));
        self.reads.push((read, self.blocks(range)));
    }

    fn want(&mut self, blocks: Range<u64>) {
        self.unreadable.retain(|block| !blocks.contains(block));
        for fetch in self.fetches.values_mut().filter(|fetch| overlap(&fetch.blocks, &blocks)) {
            fetch.is_wanted = true;
        }
        if !blocks.is_empty() {
            self.wanted.push_back(blocks);
        }
    }

    /// A session with the source has begun, of which this is the map. What is marked there is fetched before other blocks: its copies
    /// wait for that.
    pub fn prefer(&mut self, marked: &DirtyMap) {
        let mut at = 0;
        self.early.clear();
        while let Some(run) = marked.next_dirty(at, u64::MAX) {
            at = run.end;
            self.early.extend(self.missing(run).collect::<Vec<_>>());
        }
    }

    /// Reads that wait for nothing any more.
    pub fn take_ready(&mut self) -> Vec<RequestId> {
        let ready: Vec<RequestId> = self
            .reads
            .iter()
            .filter(|(_, blocks)| self.missing(blocks.clone()).next().is_none())
            .map(|(read, _)| *read)
            .collect();
        self.reads.retain(|(read, _)| !ready.contains(read));
        ready
    }

    /// Reads that need what the source can't read.
    pub fn take_unreadable(&mut self) -> Vec<RequestId> {
        let Self { reads, unreadable, .. } = self;
        let failed = reads.extract_if(.., |(_, blocks)| unreadable.range(blocks.clone()).next().is_some());
        failed.map(|(read, _)| read).collect()
    }

    /// Whether a write to this range overwrites parts of blocks that the source can't read.
    #[must_use]
    pub fn has_unreadable_edges(&self, range: ByteRange) -> bool {
        self.edges(range).into_iter().any(|edge| self.unreadable.range(edge).next().is_some())
    }

    /// All reads that wait: they are carried out no more.
    pub fn give_up(&mut self) -> Vec<RequestId> {
        self.reads.drain(..).map(|(read, _)| read).collect()
    }

    /// Whether an answer for a write to this range must wait until bits are cleared in the file.
    #[must_use]
    pub fn is_unsettled(&self, range: ByteRange) -> bool {
        let blocks = self.blocks(range);
        let is_clearing = |cleared: &Range<u64>| cleared.start < blocks.end && blocks.start < cleared.end;
        let is_set = self.bits.next_dirty(blocks.start, 1).is_some_and(|next| next.start < blocks.end);
        (is_set || self.clearing.iter().any(is_clearing)) && !planted(Bug::AnswerAbsent)
    }

    /// A write got its place in the order: what it overwrites whole is not fetched, and what is being fetched of it lands nowhere.
    pub fn overwrite(&mut self, sequence: Sequence, range: ByteRange) {
        let whole = self.whole_blocks(range);
        for fetch in self.fetches.values_mut().filter(|fetch| overlap(&fetch.blocks, &whole)) {
            fetch.rewritten.push(whole.clone());
        }
        let blocks: Vec<Range<u64>> = self.missing(whole).collect();
        if !blocks.is_empty() {
            self.overwriting.insert(sequence, blocks);
        }
    }

    /// A write has ended here. What it overwrote whole is here, unless it failed.
    pub fn overwritten(&mut self, sequence: Sequence, written: bool, now: Time) {
        for blocks in self.overwriting.remove(&sequence).unwrap_or_default() {
            if written {
                self.came(blocks, now);
            }
        }
    }

    /// The next blocks to fetch, if there is room for more.
    pub fn pick(&mut self, need: Need, now: Time) -> Option<Asked> {
        self.wake(now);
        if self.paused_until.is_some() || self.fetches.len() >= FETCHES {
            return None;
        }
        let (blocks, is_wanted) = match self.next_of(|absent| &mut absent.wanted) {
            Some(blocks) => (blocks, true),
            None => {
                let most = match need {
                    Need::Wanted => 0,
                    Need::Little => BUSY_BYTES,
                    Need::All => IDLE_BYTES,
                };
                if self.filling_bytes >= most {
                    return None;
                }
                (self.next_of(|absent| &mut absent.early).or_else(|| self.next_in_sequence())?, false)
            }
        };
        let range = self.range(blocks.clone());
        if !is_wanted {
            self.filling_bytes += range.length;
        }
        let id = self.next;
        self.next = FetchId(id.0 + 1);
        self.under_way.insert(blocks.start, blocks.end);
        self.fetches.insert(
            id,
            Fetch { blocks, fills: !is_wanted, is_wanted, rewritten: Vec::new(), landings: None },
        );
        Some(Asked { id, range, is_awaited: is_wanted })
    }

    /// What a fetch asked for, if its content did not come yet.
    #[must_use]
    pub fn asked(&self, id: FetchId) -> Option<ByteRange> {
        let fetch = self.fetches.get(&id).filter(|fetch| fetch.landings.is_none())?;
        Some(self.range(fetch.blocks.clone()))
    }

    /// What a fetch asked for has come: gives what of it is to be written here.
    ///
    /// # Panics
    /// When it is not awaited.
    pub fn fetched(&mut self, id: FetchId, content: Fetched) -> Vec<Landing> {
        let fetch = self.fetches.get_mut(&id).expect("it was asked for");
        assert!(fetch.landings.is_none(), "it comes once");
        if content == Fetched::Failed {
            self.failed(id);
            return Vec::new();
        }
        let (blocks, mut rewritten) = (fetch.blocks.clone(), fetch.rewritten.clone());
        if planted(Bug::LandOverNewer) {
            rewritten.clear();
        }
        let parts: Vec<Range<u64>> = match planted(Bug::LandOverNewer) {
            true => vec![blocks],
            false => self.missing(blocks).flat_map(|part| without(part, &rewritten)).collect(),
        };
        let landings: Vec<Landing> =
            parts.into_iter().map(|part| Landing { fetch: id, range: self.range(part) }).collect();
        self.fetches.get_mut(&id).expect("it was looked at").landings = Some(landings.len());
        if landings.is_empty() {
            self.end(id);
        }
        landings
    }

    /// The source could not read what a fetch asked for. It is asked for again in halves, until it is known which blocks those are.
    fn failed(&mut self, id: FetchId) {
        let Fetch { blocks, is_wanted, .. } = self.end(id);
        let middle = blocks.start + (blocks.end - blocks.start) / 2;
        if middle == blocks.start {
            self.unreadable.insert(middle);
            return;
        }
        let again = if is_wanted { &mut self.wanted } else { &mut self.early };
        again.push_front(middle..blocks.end);
        again.push_front(blocks.start..middle);
    }

    /// A landing was written, or could not be. Says whether it was the last one of its fetch.
    ///
    /// # Panics
    /// When it was not under way.
    pub fn landed(&mut self, landing: Landing, written: bool, now: Time) -> bool {
        let fetch = self.fetches.get_mut(&landing.fetch).expect("it is under way");
        let landings = fetch.landings.as_mut().expect("its content has come");
        *landings -= 1;
        let is_last = *landings == 0;
        let is_wanted = fetch.is_wanted;
        if is_last {
            self.end(landing.fetch);
        }
        let blocks = self.blocks(landing.range);
        if written {
            self.came(blocks, now);
        } else {
            self.paused_until = Some(now.after(PAUSE));
            if is_wanted {
                self.wanted.push_front(blocks);
            }
        }
        is_last
    }

    /// The link to the source is gone: what it was asked for does not come. What has come lands all the same.
    pub fn source_lost(&mut self) {
        let asked = self.fetches.iter().filter(|(_, fetch)| fetch.landings.is_none());
        let asked: Vec<FetchId> = asked.map(|(id, _)| *id).collect();
        for id in asked {
            let Fetch { blocks, is_wanted, .. } = self.end(id);
            if is_wanted {
                self.wanted.push_back(blocks);
            }
        }
        // Another disk may be there when it is back.
        self.unreadable.clear();
    }

    /// A sync of the backing failed: of what no earlier one covered, nobody knows what is here (W5).
    pub fn sync_failed(&mut self) {
        if planted(Bug::ReadUnsynced) {
            return;
        }
        let uncertain: Vec<Range<u64>> = self.syncing.drain(..).chain(self.unsynced.drain(..)).collect();
        uncertain.into_iter().for_each(|blocks| self.here.clear(blocks));
        (self.unsynced_bytes, self.unsynced_since) = (0, None);
    }

    /// Whether what came here is to be made durable now.
    #[must_use]
    pub fn wants_sync(&self, now: Time) -> bool {
        let is_due = self.unsynced_since.is_some_and(|since| now >= since.after(SYNC_TIME));
        let is_all = self.bits.dirty_blocks() == self.here.dirty_blocks();
        !self.unsynced.is_empty() && (is_due || is_all || self.unsynced_bytes >= SYNC_BYTES)
    }

    /// Whether anything came here that no sync covers.
    #[must_use]
    pub fn has_unsynced(&self) -> bool {
        !self.unsynced.is_empty()
    }

    /// When [`Absent::wants_sync`] or [`Absent::pick`] says something else, if nothing happens before. `is_syncing`: a sync runs, and
    /// the next one follows it.
    #[must_use]
    pub fn timeout(&self, is_syncing: bool) -> Option<Time> {
        let sync = self.unsynced_since.map(|since| since.after(SYNC_TIME)).filter(|_| !is_syncing);
        [sync, self.paused_until].into_iter().flatten().min()
    }

    /// Time has passed.
    pub fn wake(&mut self, now: Time) {
        self.paused_until.take_if(|until| now >= *until);
    }

    /// A sync of the backing begins, which covers what came before.
    pub fn sync_begins(&mut self) {
        assert!(self.syncing.is_empty(), "there is one sync at a time");
        self.syncing = std::mem::take(&mut self.unsynced);
        (self.unsynced_bytes, self.unsynced_since) = (0, None);
    }

    /// The sync has ended: what it covers is durable. Gives what is to be written to the file before anybody hears of it.
    pub fn synced(&mut self) -> Option<Changes> {
        let mut synced = std::mem::take(&mut self.syncing);
        if planted(Bug::ClearAbsentEarly) {
            synced.append(&mut self.unsynced);
        }
        let mut pages = BTreeSet::new();
        for blocks in &synced {
            for (is_set, part) in self.bits.split(blocks.clone()).collect::<Vec<_>>() {
                if is_set {
                    self.bits.clear(part.clone());
                    self.here.clear(part.clone());
                    pages.extend(part.start / BLOCKS_PER_PAGE..=(part.end - 1) / BLOCKS_PER_PAGE);
                }
            }
        }
        self.clearing = synced;
        self.changes(pages)
    }

    /// The file could not be written, or what it holds is unknown: what it is to say in all pages that were changed.
    pub fn again(&mut self) -> Option<Changes> {
        let pages = self.clearing.iter().filter(|blocks| !blocks.is_empty());
        let pages =
            pages.flat_map(|blocks| blocks.start / BLOCKS_PER_PAGE..=(blocks.end - 1) / BLOCKS_PER_PAGE);
        let pages = pages.collect();
        self.changes(pages)
    }

    /// The file was written.
    pub fn written(&mut self) {
        self.is_writing = false;
        self.clearing.clear();
    }

    /// The file could not be written.
    pub fn not_written(&mut self) {
        self.is_writing = false;
    }

    fn changes(&mut self, pages: BTreeSet<u64>) -> Option<Changes> {
        if pages.is_empty() {
            self.clearing.clear();
            return None;
        }
        self.serial += 1;
        self.is_writing = true;
        let serial = self.serial;
        let page = |page| (page, Box::new(absent::encode(page, serial, &self.bits.bits_of(page))));
        assert!(pages.last() < Some(&page_count(self.header.blocks)), "a bit is the volume's");
        Some(pages.into_iter().map(page).collect())
    }

    /// Content of these blocks is here.
    fn came(&mut self, blocks: Range<u64>, now: Time) {
        let set: Vec<Range<u64>> =
            self.bits.split(blocks).filter(|(is_set, _)| *is_set).map(|(_, part)| part).collect();
        for part in set {
            self.here.mark(part.clone());
            self.unreadable.retain(|block| !part.contains(block));
            self.unsynced_bytes += self.range(part.clone()).length;
            self.unsynced.push(part);
            self.unsynced_since.get_or_insert(now);
        }
    }

    fn end(&mut self, id: FetchId) -> Fetch {
        let fetch = self.fetches.remove(&id).expect("a fetch ends once");
        self.under_way.remove(&fetch.blocks.start);
        if fetch.fills {
            self.filling_bytes -= self.range(fetch.blocks.clone()).length;
        }
        fetch
    }

    /// The first of these that may be asked for. Those of which all is asked for, or here, are done with.
    fn next_of(&mut self, queue: impl Fn(&mut Self) -> &mut VecDeque<Range<u64>>) -> Option<Range<u64>> {
        while let Some(first) = queue(self).front().cloned() {
            if let Some(found) = self.find(first) {
                return Some(found);
            }
            queue(self).pop_front();
        }
        None
    }

    fn next_in_sequence(&mut self) -> Option<Range<u64>> {
        let next = self.find(self.cursor..self.header.blocks);
        let next = next.or_else(|| self.find(0..self.cursor))?;
        self.cursor = next.end;
        Some(next)
    }

    /// The first of these blocks that may be fetched, with those that follow.
    fn find(&self, within: Range<u64>) -> Option<Range<u64>> {
        let most = (FETCH_BYTES / self.header.block_size.bytes()).max(1);
        let mut at = within.start;
        while at < within.end {
            let mut run = self.missing(at..within.end).next()?;
            run.end = run.end.min(run.start + most);
            at = run.end;
            let before = self.under_way.range(..=run.start).next_back().map(|(_, end)| *end);
            if let Some(end) = before.filter(|end| *end > run.start) {
                at = end;
                continue;
            }
            if let Some((start, _)) = self.under_way.range(run.clone()).next() {
                run.end = *start;
                at = run.end;
            }
            if let Some(unreadable) = self.unreadable.range(run.clone()).next() {
                if *unreadable == run.start {
                    at = run.start + 1;
                    continue;
                }
                run.end = *unreadable;
                at = run.end;
            }
            let overwritten = self.overwriting.values().flatten().filter(|blocks| overlap(blocks, &run));
            let overwritten: Vec<Range<u64>> = overwritten.cloned().collect();
            if let Some(free) = without(run, &overwritten).into_iter().next() {
                return Some(free);
            }
        }
        None
    }

    /// The parts of these blocks that are not here.
    fn missing(&self, blocks: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let set = self.bits.split(blocks).filter(|(is_set, _)| *is_set);
        set.flat_map(|(_, part)| self.here.split(part)).filter(|(is_here, _)| !*is_here).map(|(_, part)| part)
    }

    fn blocks(&self, range: ByteRange) -> Range<u64> {
        range.blocks(self.header.block_size)
    }

    fn range(&self, blocks: Range<u64>) -> ByteRange {
        ByteRange::of_blocks(blocks, self.header.block_size, self.size_bytes)
    }

    /// The blocks that a range holds parts of, before those that it holds all of, and after them.
    fn edges(&self, range: ByteRange) -> [Range<u64>; 2] {
        let (blocks, whole) = (self.blocks(range), self.whole_blocks(range));
        if whole.is_empty() {
            return [blocks, 0..0];
        }
        [blocks.start..whole.start, whole.end..blocks.end]
    }

    /// The blocks that a range holds all of; the last one of the volume may be shorter than the others.
    fn whole_blocks(&self, range: ByteRange) -> Range<u64> {
        let size = self.header.block_size;
        let start = size.blocks_in(range.offset);
        let end =
            if range.end() == self.size_bytes { self.header.blocks } else { size.block_of(range.end()).0 };
        start..end.max(start)
    }
}

fn overlap(one: &Range<u64>, other: &Range<u64>) -> bool {
    one.start < other.end && other.start < one.end
}

/// What is left of a range without these.
fn without(range: Range<u64>, taken: &[Range<u64>]) -> Vec<Range<u64>> {
    let mut left = vec![range];
    for taken in taken {
        left = left
            .into_iter()
            .flat_map(|part| {
                let before = part.start..part.end.min(taken.start);
                let after = part.start.max(taken.end)..part.end;
                if overlap(&part, taken) { vec![before, after] } else { vec![part] }
            })
            .filter(|part| part.start < part.end)
            .collect();
    }
    left
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;
    use crate::units::{BlockSize, VolumeId};

    /// All of so many bytes are absent, and this host has them.
    pub(crate) fn all_absent(source: HostId, size_bytes: u64) -> Absent {
        let block_size = BlockSize::default();
        let header = Header {
            volume: VolumeId([1; 16]),
            source,
            blocks: block_size.blocks_in(size_bytes),
            block_size,
        };
        Absent::new(&header, header, size_bytes, []).expect("it is the volume's")
    }
}

#[cfg(test)]
mod tests {
    use super::testing::all_absent;
    use super::*;
    use crate::disk::dirty_map::{Bits, WORDS_PER_PAGE};
    use crate::units::{BlockSize, VolumeId};

    const SOURCE: HostId = HostId([2; 32]);
    const BLOCK: u64 = 4096;
    /// The last block is shorter than the others.
    const SIZE: u64 = 999 * BLOCK + 512;
    const NOW: Time = Time(Duration::from_secs(5));

    fn range(blocks: Range<u64>) -> ByteRange {
        ByteRange::of_blocks(blocks, BlockSize::default(), SIZE)
    }

    fn marked(blocks: Range<u64>) -> DirtyMap {
        let full = DirtyMap::full(VolumeId([1; 16]), SOURCE, SIZE, BlockSize::default());
        let mut map = full.clean(Base::default());
        map.mark(blocks);
        map
    }

    fn picked(absent: &mut Absent, need: Need, now: Time) -> Option<(FetchId, ByteRange)> {
        let Asked { id, range, is_awaited } = absent.pick(need, now)?;
        assert_eq!(is_awaited, need == Need::Wanted);
        Some((id, range))
    }

    fn pick(absent: &mut Absent) -> Option<(FetchId, ByteRange)> {
        picked(absent, Need::All, NOW)
    }

    fn land(absent: &mut Absent, id: FetchId, content: Fetched) -> Vec<ByteRange> {
        let landings = absent.fetched(id, content);
        for landing in &landings {
            absent.landed(*landing, true, NOW);
        }
        landings.into_iter().map(|landing| landing.range).collect()
    }

    /// What the file says after these changes.
    fn read_back(changes: Vec<Changes>) -> Absent {
        let mut file: BTreeMap<u64, Box<Page>> = BTreeMap::new();
        changes.into_iter().for_each(|changes| file.extend(changes));
        let pages = file.iter().map(|(page, bytes)| (*page, absent::decode(*page, [bytes, bytes]).unwrap()));
        let header = all_absent(SOURCE, SIZE).header;
        Absent::new(&header, header, SIZE, pages).unwrap()
    }

    #[test]
    fn everything_is_fetched_once_and_counts_when_the_file_says_so() {
        let (mut absent, mut changes) = (all_absent(SOURCE, SIZE), Vec::new());
        let mut fetched = Vec::new();
        while let Some((id, range)) = pick(&mut absent) {
            assert_eq!(absent.asked(id), Some(range));
            assert_eq!(land(&mut absent, id, Fetched::Data), [range]);
            fetched.push(range);
        }
        let whole = ByteRange::new(0, SIZE);
        assert_eq!(fetched, whole.split_at_multiples(FETCH_BYTES).collect::<Vec<_>>());
        assert!(!absent.is_missing(whole) && absent.is_unsettled(whole) && !absent.is_filled());
        assert!(absent.wants_sync(NOW), "nothing else will come");
        absent.sync_begins();
        assert!(absent.is_unsettled(whole));
        changes.push(absent.synced().expect("bits are cleared"));
        assert!(absent.is_unsettled(whole) && !absent.is_filled(), "the file does not say so yet");
        absent.written();
        assert!(!absent.is_unsettled(whole) && absent.is_filled());
        assert!(read_back(changes).is_filled());
    }

    #[test]
    fn a_crash_leaves_what_the_file_says() {
        let mut absent = all_absent(SOURCE, SIZE);
        let (first, _) = pick(&mut absent).unwrap();
        let (second, _) = pick(&mut absent).unwrap();
        land(&mut absent, first, Fetched::Zero);
        absent.sync_begins();
        // It came after the sync began.
        land(&mut absent, second, Fetched::Data);
        let changes = absent.synced().unwrap();
        let after = read_back(vec![changes.clone()]);
        assert!(!after.is_missing(range(0..256)) && after.is_missing(range(256..257)));
        // A change that could not be written is in the next one.
        absent.not_written();
        assert!(absent.is_unsettled(range(0..1)));
        let again = absent.again().unwrap();
        assert!(again[0].1 != changes[0].1, "it is a later change");
        assert!(!read_back(vec![again]).is_missing(range(0..256)));
        absent.written();
        absent.sync_begins();
        let next = absent.synced().unwrap();
        absent.written();
        assert!(!read_back(vec![next]).is_missing(range(0..512)));
        assert_eq!(read_back(Vec::new()).progress().missing_bytes, SIZE);
    }

    #[test]
    fn what_is_fetched_lands_nowhere_over_what_was_written_since() {
        let mut absent = all_absent(SOURCE, SIZE);
        let (id, fetched) = pick(&mut absent).unwrap();
        // The edges of this are of blocks that it holds parts of.
        absent.overwrite(Sequence(1), ByteRange::new(10 * BLOCK + 512, 3 * BLOCK));
        absent.overwrite(Sequence(2), range(20..21));
        absent.overwritten(Sequence(2), true, NOW);
        absent.overwrite(Sequence(3), range(30..31));
        absent.overwritten(Sequence(3), false, NOW);
        let parts = [0..11, 13..20, 21..30, 31..256].map(range);
        assert_eq!(land(&mut absent, id, Fetched::Data), parts);
        assert_eq!(fetched, range(0..256));
        assert!(absent.is_missing(range(11..12)), "the write has not ended");
        absent.overwritten(Sequence(1), true, NOW);
        assert!(!absent.is_missing(range(0..30)) && absent.is_missing(range(30..31)));
        absent.cursor = 0;
        assert_eq!(pick(&mut absent).unwrap().1, range(30..31), "what failed is fetched again");
    }

    #[test]
    fn a_write_waits_for_the_blocks_that_it_holds_parts_of() {
        let mut absent = all_absent(SOURCE, SIZE);
        let whole = range(7..9);
        assert!(!absent.lacks_edges(whole));
        assert!(!absent.lacks_edges(range(998..1000)), "the last block ends with the volume");
        assert!(absent.lacks_edges(ByteRange::new(7 * BLOCK + 512, 512)));
        let across = ByteRange::new(100 * BLOCK - 512, 2 * BLOCK);
        assert!(absent.lacks_edges(across));
        absent.want_edges(across);
        absent.wait(RequestId(5), range(500..501));
        let wanted: Vec<ByteRange> =
            (0..3).map(|_| picked(&mut absent, Need::Wanted, NOW).unwrap().1).collect();
        assert_eq!(wanted, [range(99..100), range(101..102), range(500..501)]);
        assert_eq!(picked(&mut absent, Need::Wanted, NOW), None);
        for id in [1, 2] {
            land(&mut absent, FetchId(id), Fetched::Data);
            assert_eq!(absent.lacks_edges(across), id == 1);
        }
        assert!(absent.take_ready().is_empty());
        land(&mut absent, FetchId(3), Fetched::Data);
        assert_eq!(absent.take_ready(), [RequestId(5)]);
        assert!(absent.take_ready().is_empty() && absent.give_up().is_empty());
    }

    #[test]
    fn what_is_marked_is_fetched_first_and_what_the_source_did_not_send_once_more() {
        let mut absent = all_absent(SOURCE, SIZE);
        let (first, _) = pick(&mut absent).unwrap();
        land(&mut absent, first, Fetched::Data);
        absent.overwrite(Sequence(1), range(300..301));
        absent.prefer(&marked(200..400));
        let fetched: Vec<_> = (0..4).map(|_| pick(&mut absent).unwrap()).collect();
        let ranges: Vec<ByteRange> = fetched.iter().map(|(_, range)| *range).collect();
        assert_eq!(ranges, [256..300, 301..400, 400..656, 656..912].map(range));
        // Somebody waits for it by now.
        absent.wait(RequestId(1), range(320..321));
        absent.source_lost();
        assert_eq!(absent.asked(fetched[0].0), None);
        let again: Vec<ByteRange> =
            (0..3).map(|_| picked(&mut absent, Need::Wanted, NOW).unwrap().1).collect();
        assert_eq!(again, [320..321, 301..320, 321..400].map(range));
        assert_eq!(picked(&mut absent, Need::Wanted, NOW), None);
    }

    #[test]
    fn what_can_not_be_written_here_is_fetched_again_later() {
        let mut absent = all_absent(SOURCE, SIZE);
        let (id, fetched) = pick(&mut absent).unwrap();
        let landings = absent.fetched(id, Fetched::Data);
        assert!(absent.landed(landings[0], false, NOW), "there is no room for it");
        assert!(absent.is_missing(fetched) && !absent.has_unsynced());
        assert_eq!((pick(&mut absent), absent.timeout(false)), (None, Some(NOW.after(PAUSE))));
        absent.cursor = 0;
        assert_eq!(picked(&mut absent, Need::All, NOW.after(PAUSE)).unwrap().1, fetched);
    }

    #[test]
    fn what_the_source_can_not_read_costs_what_needs_it_and_nothing_else() {
        const BAD: u64 = 77;
        let mut absent = all_absent(SOURCE, SIZE);
        absent.wait(RequestId(1), range(70..80));
        absent.wait(RequestId(2), range(78..79));
        let mut asked = 0;
        while let Some(Asked { id, range: fetched, .. }) = absent.pick(Need::All, NOW) {
            asked += 1;
            match fetched.overlaps(range(BAD..BAD + 1)) {
                true => assert!(absent.fetched(id, Fetched::Failed).is_empty()),
                false => drop(land(&mut absent, id, Fetched::Data)),
            }
        }
        assert!(asked < 20, "{asked}: it is found in halves");
        assert_eq!((absent.take_ready(), absent.take_unreadable()), (vec![RequestId(2)], vec![RequestId(1)]));
        assert_eq!(absent.progress().missing_bytes, BLOCK);
        assert_eq!(absent.progress().unreadable_bytes, BLOCK);
        let part = ByteRange::new(BAD * BLOCK, 512);
        assert!(absent.has_unreadable_edges(part) && !absent.has_unreadable_edges(range(BAD..BAD + 1)));
        // Whoever wants it again has it asked for again.
        absent.want_edges(part);
        let Asked { id, .. } = absent.pick(Need::Wanted, NOW).unwrap();
        absent.fetched(id, Fetched::Failed);
        absent.overwrite(Sequence(1), range(BAD..BAD + 1));
        absent.overwritten(Sequence(1), true, NOW);
        assert_eq!(absent.progress().unreadable_bytes, 0);
        assert!(!absent.is_missing(ByteRange::new(0, SIZE)));
    }

    #[test]
    fn what_a_sync_that_failed_was_to_cover_is_not_here() {
        let mut absent = all_absent(SOURCE, SIZE);
        for is_covered in [true, false] {
            let (id, _) = pick(&mut absent).unwrap();
            land(&mut absent, id, Fetched::Data);
            if is_covered {
                absent.sync_begins();
            }
        }
        assert!(!absent.is_missing(range(0..512)));
        absent.sync_failed();
        assert!(absent.is_missing(range(0..1)) && absent.is_missing(range(511..512)));
        assert!(!absent.has_unsynced() && !absent.wants_sync(NOW.after(SYNC_TIME)));
    }

    #[test]
    fn the_file_of_another_volume_is_refused() {
        let header = all_absent(SOURCE, SIZE).header;
        let other = Header { blocks: header.blocks + 1, ..header };
        assert!(Absent::new(&header, other, SIZE, []).is_err());
        let bits: Box<Bits> = Box::new([0; WORDS_PER_PAGE]);
        let read = absent::Read { serial: 7, bits, missing: None };
        let absent = Absent::new(&header, header, SIZE, [(0, read)]).unwrap();
        assert!(absent.is_filled() && absent.serial == 7);
    }
}
