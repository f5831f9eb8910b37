//! The dirty map of one peer in memory: which blocks may differ there (D1-D4), and what of that is not on disk yet.
//!
//! Only pages with a dirty block take memory (4 KiB for 127 MiB of volume at the default block size), and a map that
//! begins full takes none: see `full_from` in [`crate::disk::dirty_map`], whose layout this writes and reads.
//!
//! The map decides nothing. Who may set bits, and above all who may clear them (D2, D3), is the session's business.

use crate::disk::MetadataError;
use crate::disk::dirty_map::{
    BLOCKS_PER_PAGE, Base, Bits, Header, WORDS_PER_PAGE, decode_bits, encode_bits, page_count, page_offset,
};
use crate::disk::{PAGE_BYTES, Page, slot_offset};
use crate::given::Given;
use crate::ranges::ByteRange;
use crate::units::{BlockSize, CopyId, GenerationId, HostId, Mark, Session, VolumeId};
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// The blocks that may differ on one peer, as memory holds them.
#[derive(Debug)]
pub struct DirtyMap {
    header: Header,
    serial: u64,
    header_changed: bool,
    /// Whether more is known of the peer than was handed out for writing.
    known_changed: bool,
    pages: BTreeMap<u64, MapPage>,
    /// Pages that differ from what was last handed out for writing, those below `unwritten_below` left out.
    changed: BTreeSet<u64>,
    /// All pages below this one count as different, since it isn't known what the file holds of them.
    unwritten_below: u64,
    /// The sum of the pages' counts.
    dirty_in_pages: u64,
    /// Whether the newest that its file said is gone.
    is_lost: bool,
}

#[derive(Clone, Debug)]
struct MapPage {
    bits: Box<Bits>,
    dirty: u64,
}

/// Writes that bring the file up to date. Pages and holes first, in any order; when they are durable, the header.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct MapChanges {
    /// Pages to write, by their offset in bytes.
    pub pages: Vec<(u64, Box<Page>)>,
    /// Where pages are to be made zero, in bytes.
    pub holes: Vec<ByteRange>,
    /// The header and its offset, to be written last.
    pub header: Option<(u64, Box<Page>)>,
}

impl MapChanges {
    /// Whether there is nothing to write.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.pages.is_empty() && self.holes.is_empty() && self.header.is_none()
    }

    fn add_hole(&mut self, pages: Range<u64>) {
        if pages.is_empty() {
            return;
        }
        let hole = ByteRange::new(page_offset(pages.start), (pages.end - pages.start) * PAGE_BYTES as u64);
        match self.holes.last_mut() {
            Some(before) if before.end() == hole.offset => before.length += hole.length,
            _ => self.holes.push(hole),
        }
    }
}

impl DirtyMap {
    /// The map for a peer of which nothing is known: every block is dirty, relative to no copy.
    #[must_use]
    pub fn full(volume: VolumeId, peer: HostId, size_bytes: u64, block_size: BlockSize) -> Self {
        let header = Header {
            volume,
            peer,
            base: Base::default(),
            known: Mark::default(),
            copied: None,
            is_unanswered: false,
            given: None,
            blocks: block_size.blocks_in(size_bytes),
            block_size,
            full_from: 0,
        };
        Self {
            header,
            serial: 0,
            header_changed: true,
            known_changed: false,
            pages: BTreeMap::new(),
            changed: BTreeSet::new(),
            unwritten_below: 0,
            dirty_in_pages: 0,
            is_lost: false,
        }
    }

    /// The whole file of a map that says, relative to `base`, that this peer may differ anywhere. A primary makes it for a peer
    /// that it has no map of, and for a host that is a peer no more, in whose map nobody marks. Either may come back with a
    /// copy of before, and be the primary later: then this host must say what it wrote without it (D1).
    #[must_use]
    pub fn file_of_everything(
        volume: VolumeId,
        peer: HostId,
        size_bytes: u64,
        block_size: BlockSize,
        base: Base,
        given: Option<&Given>,
    ) -> Vec<u8> {
        let mut map = Self::full(volume, peer, size_bytes, block_size);
        map.begin_anew(base);
        if let Some(given) = given {
            map.note_given(given);
        }
        let mut file = vec![0; page_offset(0) as usize];
        if let Some((offset, page)) = map.take_changes().header {
            file[offset as usize..offset as usize + PAGE_BYTES].copy_from_slice(&page[..]);
        }
        file
    }

    /// The same map with no dirty block, relative to this: the peer holds exactly what this host does.
    #[must_use]
    pub fn clean(self, base: Base) -> Self {
        let full_from = page_count(self.header.blocks);
        let header = Header { base, known: Mark::default(), is_unanswered: false, full_from, ..self.header };
        let mut map = Self { header, pages: BTreeMap::new(), dirty_in_pages: 0, is_lost: false, ..self };
        // Whatever the file holds is overwritten.
        map.forget_written();
        map
    }

    /// The map as its file says; a lost one where a newer header may have been there ([`DirtyMap::is_lost`]). `pages` are all pages
    /// of the file that hold data, by their page number; pages that are missing are clean.
    ///
    /// # Errors
    /// [`MetadataError`] when the header is damaged, newer than ours, or not this volume's and peer's. The caller
    /// begins anew with [`DirtyMap::full`], which is lost where anything was there.
    pub fn recover(
        expected: &Self,
        header: &[u8],
        pages: impl IntoIterator<Item = (u64, Box<Page>)>,
    ) -> Result<Self, MetadataError> {
        let is_unsure = Header::is_unsure(header);
        let (serial, header) = Header::recover(header)?;
        let ours = &expected.header;
        if (header.volume, header.peer, header.blocks, header.block_size)
            != (ours.volume, ours.peer, ours.blocks, ours.block_size)
        {
            return Err(MetadataError::Foreign { what: "dirty map" });
        }
        let mut map = Self {
            header,
            serial,
            header_changed: false,
            known_changed: false,
            pages: BTreeMap::new(),
            changed: BTreeSet::new(),
            unwritten_below: 0,
            dirty_in_pages: 0,
            is_lost: false,
        };
        for (page, bytes) in pages {
            let Some(bits) = decode_bits(page, &bytes) else { continue };
            if page < map.header.full_from.min(page_count(map.header.blocks)) {
                map.insert(page, Box::new(bits));
            }
        }
        if is_unsure {
            map.header.given = None;
            map.begin_anew(Base::default());
            return Ok(map.lost());
        }
        Ok(map)
    }

    /// The same map where what its file said can't be read any more.
    #[must_use]
    pub fn lost(self) -> Self {
        Self { is_lost: true, ..self }
    }

    /// Whether the newest that its file said is gone: it is full, relative to nothing, and may have been relative to what this copy
    /// is now, so nobody may take it for one that is of no concern.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.is_lost
    }

    /// The blocks that are dirty by a bit of their own, not because all from some page on are, as a map for memory alone.
    #[must_use]
    pub fn of_single_bits(&self) -> Self {
        let header = Header { full_from: page_count(self.header.blocks), ..self.header.clone() };
        Self {
            header,
            serial: 0,
            header_changed: false,
            known_changed: false,
            pages: self.pages.clone(),
            changed: BTreeSet::new(),
            unwritten_below: 0,
            dirty_in_pages: self.dirty_in_pages,
            is_lost: false,
        }
    }

    /// What the map is relative to.
    #[must_use]
    pub fn base(&self) -> Base {
        self.header.base
    }

    /// The map is relative to this copy of the peer, which confirmed this generation; its blocks stay as they are.
    pub fn confirm(&mut self, copy: CopyId, generation: GenerationId) {
        let base = Base { copy, generation, ..self.header.base };
        self.header_changed |= base != self.header.base;
        self.header.base = base;
    }

    /// How far the peer is known to be, durably.
    #[must_use]
    pub fn known(&self) -> Mark {
        self.header.known
    }

    /// The peer is this far, durably. The file need not say so at once: see [`DirtyMap::save_known`].
    pub fn note_known(&mut self, known: Mark) {
        self.known_changed |= known != self.header.known;
        self.header.known = known;
    }

    /// What is known of the peer counts as a change that the file lacks.
    pub fn save_known(&mut self) {
        self.header_changed |= self.known_changed;
    }

    /// The last session in which the peer may have been sent copies, durably; none where that is not known.
    #[must_use]
    pub fn copied(&self) -> Option<Session> {
        self.header.copied
    }

    /// The peer may be sent copies in this session as soon as the file says so.
    pub fn note_copied(&mut self, session: Session) {
        self.header_changed |= self.header.copied != Some(session);
        self.header.copied = Some(session);
    }

    /// Whether applications were answered nothing that the peer may lack.
    #[must_use]
    pub fn is_unanswered(&self) -> bool {
        self.header.is_unanswered
    }

    /// As [`DirtyMap::is_unanswered`], from now on.
    pub fn note_unanswered(&mut self, is_unanswered: bool) {
        self.header_changed |= self.header.is_unanswered != is_unanswered;
        self.header.is_unanswered = is_unanswered;
    }

    /// What the peer may count on, at the most, whatever became of it since (W4); nothing where that is not known.
    #[must_use]
    pub fn given(&self) -> Option<&Given> {
        self.header.given.as_ref()
    }

    /// As [`DirtyMap::given`], from now on. It is not given before the file says so.
    pub fn note_given(&mut self, given: &Given) {
        if self.header.given.as_ref() != Some(given) {
            self.header.given = Some(given.clone());
            self.header_changed = true;
        }
    }

    /// How many blocks may differ.
    #[must_use]
    pub fn dirty_blocks(&self) -> u64 {
        self.dirty_in_pages + self.header.blocks - self.full_from_block()
    }

    /// Whether no block may differ.
    #[must_use]
    pub fn is_clean(&self) -> bool {
        self.dirty_blocks() == 0
    }

    /// Whether every block is dirty, and the header alone says so.
    #[must_use]
    pub fn is_full(&self) -> bool {
        self.header.full_from == 0
    }

    /// Makes every block dirty, relative to this.
    pub fn begin_anew(&mut self, base: Base) {
        self.header.base = base;
        self.header.is_unanswered = false;
        self.header.full_from = 0;
        self.header_changed = true;
        self.pages.clear();
        self.changed.clear();
        self.unwritten_below = 0;
        self.dirty_in_pages = 0;
    }

    /// Makes blocks dirty. Says whether any of them was clean.
    pub fn mark(&mut self, blocks: Range<u64>) -> bool {
        let before = self.dirty_in_pages;
        for (page, part) in parts(blocks.start..blocks.end.min(self.full_from_block())) {
            let entry = self.pages.entry(page).or_insert_with(MapPage::clean);
            let added = entry.set(part);
            if added > 0 {
                self.dirty_in_pages += added;
                self.note_changed(page);
            }
        }
        self.dirty_in_pages > before
    }

    /// Makes blocks clean: the caller has a durable acknowledgement of newer content (D2).
    pub fn clear(&mut self, blocks: Range<u64>) {
        let blocks = blocks.start..blocks.end.min(self.header.blocks);
        if blocks.end > self.full_from_block() {
            self.spell_out((blocks.end - 1) / BLOCKS_PER_PAGE + 1);
        }
        for (page, part) in parts(blocks) {
            let Some(entry) = self.pages.get_mut(&page) else { continue };
            let removed = entry.unset(part);
            if entry.dirty == 0 {
                self.pages.remove(&page);
            }
            if removed > 0 {
                self.dirty_in_pages -= removed;
                self.note_changed(page);
            }
        }
    }

    /// The first run of blocks at or after `from` that are all dirty, at most `limit` long.
    #[must_use]
    pub fn next_dirty(&self, from: u64, limit: u64) -> Option<Range<u64>> {
        let start = self.find(from, true, u64::MAX)?;
        let wanted_end = start.saturating_add(limit).min(self.header.blocks);
        let end = self.find(start, false, wanted_end).map_or(wanted_end, |end| end.min(wanted_end));
        (start < end).then_some(start..end)
    }

    /// The parts of `blocks` in order, each all dirty or all clean.
    pub fn split(&self, blocks: Range<u64>) -> impl Iterator<Item = (bool, Range<u64>)> + '_ {
        let mut at = blocks.start;
        std::iter::from_fn(move || {
            if at >= blocks.end {
                return None;
            }
            let dirty = self.is_dirty(at);
            let end = self.find(at, !dirty, blocks.end).unwrap_or(blocks.end);
            let part = at..end.min(blocks.end);
            at = part.end;
            Some((dirty, part))
        })
    }

    /// Whether this block may differ.
    #[must_use]
    pub fn is_dirty(&self, block: u64) -> bool {
        if block >= self.full_from_block() {
            return block < self.header.blocks;
        }
        let (page, bit) = (block / BLOCKS_PER_PAGE, (block % BLOCKS_PER_PAGE) as usize);
        self.pages.get(&page).is_some_and(|page| page.bits[bit / 64] >> (bit % 64) & 1 == 1)
    }

    /// The bits of a page, by its number.
    #[must_use]
    pub fn bits_of(&self, page: u64) -> Bits {
        let full = if page >= self.header.full_from { u64::MAX } else { 0 };
        self.pages.get(&page).map_or([full; WORDS_PER_PAGE], |page| *page.bits)
    }

    /// Whether the file lacks anything of what memory holds.
    #[must_use]
    pub fn has_changes(&self) -> bool {
        self.header_changed || self.unwritten_below > 0 || !self.changed.is_empty()
    }

    /// What to write so that the file says what memory says now.
    pub fn take_changes(&mut self) -> MapChanges {
        let mut changes = MapChanges::default();
        let unwritten = 0..std::mem::take(&mut self.unwritten_below);
        let single = std::mem::take(&mut self.changed).into_iter().map(|page| page..page + 1);
        for range in std::iter::once(unwritten).chain(single) {
            let mut at = range.start;
            for (page, entry) in self.pages.range(range.clone()) {
                changes.add_hole(at..*page);
                changes.pages.push((page_offset(*page), Box::new(encode_bits(*page, &entry.bits))));
                at = page + 1;
            }
            changes.add_hole(at..range.end);
        }
        if std::mem::take(&mut self.header_changed) {
            self.known_changed = false;
            self.serial += 1;
            changes.header = Some((slot_offset(self.serial), Box::new(self.header.encode(self.serial))));
        }
        changes
    }

    /// What was last handed out may not be in the file: everything is handed out again.
    pub fn forget_written(&mut self) {
        self.header_changed = true;
        self.unwritten_below = self.header.full_from.min(page_count(self.header.blocks));
        // Pages above are not looked at.
        self.changed.clear();
    }

    fn note_changed(&mut self, page: u64) {
        if page >= self.unwritten_below {
            self.changed.insert(page);
        }
    }

    fn full_from_block(&self) -> u64 {
        self.header.full_from.saturating_mul(BLOCKS_PER_PAGE).min(self.header.blocks)
    }

    /// Raises `full_from` to `page`, with pages that say so for what lies between.
    fn spell_out(&mut self, page: u64) {
        for between in self.header.full_from..page {
            let first = between * BLOCKS_PER_PAGE;
            let mut entry = MapPage::clean();
            self.dirty_in_pages += entry.set(0..(self.header.blocks - first).min(BLOCKS_PER_PAGE) as usize);
            self.pages.insert(between, entry);
            self.note_changed(between);
        }
        self.header.full_from = page;
        self.header_changed = true;
    }

    fn insert(&mut self, page: u64, mut bits: Box<Bits>) {
        let valid = (self.header.blocks - page * BLOCKS_PER_PAGE).min(BLOCKS_PER_PAGE) as usize;
        for (word, bits) in bits.iter_mut().enumerate() {
            *bits &= mask(word, &(0..valid));
        }
        let dirty = bits.iter().map(|word| u64::from(word.count_ones())).sum();
        let replaced = (dirty > 0).then(|| self.pages.insert(page, MapPage { bits, dirty })).flatten();
        self.dirty_in_pages += dirty;
        self.dirty_in_pages -= replaced.map_or(0, |replaced| replaced.dirty);
    }

    /// The first block at or after `from` whose state is `dirty`; no page from `until` on is looked at.
    fn find(&self, from: u64, dirty: bool, until: u64) -> Option<u64> {
        let full_from = self.full_from_block();
        let mut at = from;
        while at < full_from.min(until) {
            let page = at / BLOCKS_PER_PAGE;
            let Some(entry) = self.pages.get(&page) else {
                if !dirty {
                    return Some(at);
                }
                let next =
                    self.pages.range(page + 1..).next().map_or(full_from, |(page, _)| page * BLOCKS_PER_PAGE);
                at = next.min(full_from);
                continue;
            };
            if let Some(bit) = entry.find((at % BLOCKS_PER_PAGE) as usize, dirty) {
                let found = page * BLOCKS_PER_PAGE + bit as u64;
                return (found < self.header.blocks).then_some(found);
            }
            at = (page + 1) * BLOCKS_PER_PAGE;
        }
        if at < full_from {
            return None;
        }
        let at = at.max(full_from);
        (dirty && at < self.header.blocks).then_some(at)
    }
}

impl MapPage {
    fn clean() -> Self {
        Self { bits: Box::new([0; WORDS_PER_PAGE]), dirty: 0 }
    }

    /// Sets bits and says how many were not set.
    fn set(&mut self, bits: Range<usize>) -> u64 {
        let mut added = 0;
        for word in bits.start / 64..bits.end.div_ceil(64) {
            let new = mask(word, &bits) & !self.bits[word];
            self.bits[word] |= new;
            added += u64::from(new.count_ones());
        }
        self.dirty += added;
        added
    }

    /// Clears bits and says how many were set.
    fn unset(&mut self, bits: Range<usize>) -> u64 {
        let mut removed = 0;
        for word in bits.start / 64..bits.end.div_ceil(64) {
            let gone = mask(word, &bits) & self.bits[word];
            self.bits[word] &= !gone;
            removed += u64::from(gone.count_ones());
        }
        self.dirty -= removed;
        removed
    }

    fn find(&self, from: usize, set: bool) -> Option<usize> {
        let looked_for = |word: usize| if set { self.bits[word] } else { !self.bits[word] };
        let first = looked_for(from / 64) & (u64::MAX << (from % 64));
        if first != 0 {
            return Some(from / 64 * 64 + first.trailing_zeros() as usize);
        }
        (from / 64 + 1..WORDS_PER_PAGE)
            .find(|word| looked_for(*word) != 0)
            .map(|word| word * 64 + looked_for(word).trailing_zeros() as usize)
    }
}

/// The bits of `word` that lie in `bits`.
fn mask(word: usize, bits: &Range<usize>) -> u64 {
    let low = bits.start.clamp(word * 64, word * 64 + 64) - word * 64;
    let high = bits.end.clamp(word * 64, word * 64 + 64) - word * 64;
    if low >= high { 0 } else { (u64::MAX << low) & (u64::MAX >> (64 - high)) }
}

/// The pages that blocks lie in, with the bits of each.
fn parts(blocks: Range<u64>) -> impl Iterator<Item = (u64, Range<usize>)> {
    let mut at = blocks.start;
    std::iter::from_fn(move || {
        (at < blocks.end).then(|| {
            let page = at / BLOCKS_PER_PAGE;
            let end = blocks.end.min((page + 1) * BLOCKS_PER_PAGE);
            let first = page * BLOCKS_PER_PAGE;
            let bits = (at - first) as usize..(end - first) as usize;
            at = end;
            (page, bits)
        })
    })
}

const _: () = assert!(WORDS_PER_PAGE * 8 + 32 == PAGE_BYTES);

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BLOCKS: u64 = 3 * BLOCKS_PER_PAGE + 777;

    fn fresh() -> DirtyMap {
        DirtyMap::full(VolumeId([1; 16]), HostId([2; 32]), BLOCKS * 4096, BlockSize::default())
    }

    /// The file, as a map's changes leave it.
    #[derive(Default)]
    struct Disk {
        header: Vec<u8>,
        pages: BTreeMap<u64, Box<Page>>,
    }

    impl Disk {
        fn apply(&mut self, changes: MapChanges) {
            let number = |offset: u64| offset / PAGE_BYTES as u64 - 2;
            for (offset, page) in changes.pages {
                self.pages.insert(number(offset), page);
            }
            for hole in changes.holes {
                self.pages.retain(|page, _| !(number(hole.offset)..number(hole.end())).contains(page));
            }
            if let Some((offset, page)) = changes.header {
                self.header.resize(2 * PAGE_BYTES, 0);
                self.header[offset as usize..][..PAGE_BYTES].copy_from_slice(&page[..]);
            }
        }

        fn recover(&self) -> DirtyMap {
            let pages = self.pages.iter().map(|(number, page)| (*number, page.clone()));
            DirtyMap::recover(&fresh(), &self.header, pages).unwrap()
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Mark(u64, u64),
        Clear(u64, u64),
        BeginAnew,
        Clean,
        /// What was handed out is written, and the map is read anew or lives on.
        Persist(bool),
        /// What was handed out is written in part, by these bits; not the header, which comes last.
        Fail(u64),
    }

    fn any_step() -> impl Strategy<Value = Step> {
        let place = || prop_oneof![0..BLOCKS, (0..4u64).prop_map(|page| (page * BLOCKS_PER_PAGE).max(2) - 2)];
        let length = || prop_oneof![1..200u64, 1..BLOCKS];
        prop_oneof![
            8 => (place(), length()).prop_map(|(at, length)| Step::Mark(at, length)),
            8 => (place(), length()).prop_map(|(at, length)| Step::Clear(at, length)),
            1 => Just(Step::BeginAnew),
            1 => Just(Step::Clean),
            4 => any::<bool>().prop_map(Step::Persist),
            2 => any::<u64>().prop_map(Step::Fail),
        ]
    }

    fn assert_same(map: &DirtyMap, model: &[bool]) {
        assert_eq!(map.dirty_blocks(), model.iter().filter(|dirty| **dirty).count() as u64);
        let mut at = 0;
        let mut covered = 0;
        while let Some(run) = map.next_dirty(at, 5000) {
            assert!(run.end - run.start <= 5000);
            assert!(run.clone().all(|block| model[block as usize]));
            covered += run.end - run.start;
            at = run.end;
        }
        assert_eq!(covered, map.dirty_blocks());
        let mut at = 0;
        for (dirty, part) in map.split(0..BLOCKS) {
            assert_eq!(part.start, at);
            assert!(part.clone().all(|block| model[block as usize] == dirty));
            at = part.end;
        }
        assert_eq!(at, BLOCKS);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]
        #[test]
        fn the_map_agrees_with_one_flag_per_block(steps in proptest::collection::vec(any_step(), 1..25)) {
            let (mut map, mut disk) = (fresh(), Disk::default());
            let mut model = vec![true; BLOCKS as usize];
            for step in steps {
                match step {
                    Step::Mark(at, length) => {
                        let end = (at + length).min(BLOCKS);
                        map.mark(at..end);
                        model[at as usize..end as usize].fill(true);
                    }
                    Step::Clear(at, length) => {
                        let end = (at + length).min(BLOCKS);
                        map.clear(at..end);
                        model[at as usize..end as usize].fill(false);
                    }
                    Step::BeginAnew => {
                        map.begin_anew(Base { copy: CopyId([7; 16]), ..map.base() });
                        model.fill(true);
                    }
                    Step::Clean => {
                        map = map.clean(Base::default());
                        model.fill(false);
                    }
                    Step::Fail(bits) => {
                        let mut changes = map.take_changes();
                        let mut left = bits;
                        let mut is_written = || {
                            left = left.rotate_right(1);
                            left & 1 == 1
                        };
                        changes.pages.retain(|_| is_written());
                        changes.holes.retain(|_| is_written());
                        changes.header = None;
                        disk.apply(changes);
                        map.forget_written();
                    }
                    Step::Persist(reads_anew) => {
                        disk.apply(map.take_changes());
                        prop_assert!(!map.has_changes());
                        let recovered = disk.recover();
                        assert_same(&recovered, &model);
                        if reads_anew {
                            map = recovered;
                        }
                    }
                }
                assert_same(&map, &model);
            }
        }
    }

    #[test]
    fn a_full_map_of_a_huge_volume_takes_no_memory() {
        let mut map = DirtyMap::full(VolumeId([1; 16]), HostId([2; 32]), 16 << 40, BlockSize::default());
        assert_eq!(map.dirty_blocks(), (16 << 40) / 4096);
        map.mark(0..1 << 32);
        map.clear(0..10);
        assert_eq!((map.pages.len(), map.take_changes().pages.len()), (1, 1));
        assert_eq!(map.next_dirty(0, u64::MAX), Some(10..1 << 32));
    }

    #[test]
    fn a_clean_map_of_a_huge_volume_takes_no_memory_and_one_write() {
        let map = DirtyMap::full(VolumeId([1; 16]), HostId([2; 32]), 16 << 40, BlockSize::default());
        let mut map = map.clean(Base::default());
        let pages = page_count((16 << 40) / 4096);
        map.mark(BLOCKS_PER_PAGE..BLOCKS_PER_PAGE + 1);
        assert_eq!((map.pages.len(), map.changed.len()), (1, 0));
        let changes = map.take_changes();
        let page = |number| page_offset(number)..page_offset(number + 1);
        assert_eq!(changes.pages.len(), 1);
        let holes: Vec<_> = changes.holes.iter().map(|hole| hole.offset..hole.end()).collect();
        assert_eq!(holes, [page(0), page_offset(2)..page_offset(pages)]);
        assert!(!map.has_changes());
    }

    /// The newest header said that all is dirty, and went bad: by the one before, written when all was clean, nothing differed any
    /// more, on disks that did.
    #[test]
    fn a_header_that_is_not_whole_makes_everything_dirty() {
        let size_bytes = 1 << 30;
        let full = DirtyMap::full(VolumeId([1; 16]), HostId([2; 32]), size_bytes, BlockSize::default());
        let base = Base { copy: CopyId([3; 16]), generation: GenerationId([4; 16]), adopted: 5 };
        let expected = DirtyMap::full(VolumeId([1; 16]), HostId([2; 32]), size_bytes, BlockSize::default());
        let mut map = full.clean(base);
        let mut file = vec![0; 2 * PAGE_BYTES];
        let write = |map: &mut DirtyMap, file: &mut Vec<u8>| {
            let (offset, page) = map.take_changes().header.expect("it has changed");
            file[offset as usize..offset as usize + PAGE_BYTES].copy_from_slice(&page[..]);
            offset as usize
        };
        write(&mut map, &mut file);
        assert_eq!(DirtyMap::recover(&expected, &file, []).unwrap().dirty_blocks(), 0, "the first one");
        map.begin_anew(base);
        let newest = write(&mut map, &mut file);
        assert_eq!(DirtyMap::recover(&expected, &file, []).unwrap().dirty_blocks(), size_bytes / 4096);
        file[newest + 300] ^= 1;
        let mut found = DirtyMap::recover(&expected, &file, []).unwrap();
        assert_eq!(
            (found.dirty_blocks(), found.base(), found.is_lost()),
            (size_bytes / 4096, Base::default(), true)
        );
        // The next header takes the place of the damaged one.
        assert_eq!(write(&mut found, &mut file), newest);
        let whole = DirtyMap::recover(&expected, &file, []).unwrap();
        assert_eq!((whole.is_lost(), whole.dirty_blocks()), (false, size_bytes / 4096));
    }

    #[test]
    fn a_map_of_another_volume_peer_or_size_is_refused() {
        let changes = fresh().take_changes();
        let (offset, page) = changes.header.unwrap();
        let mut header = vec![0; 2 * PAGE_BYTES];
        header[offset as usize..][..PAGE_BYTES].copy_from_slice(&page[..]);
        let other = DirtyMap::full(VolumeId([9; 16]), HostId([2; 32]), BLOCKS * 4096, BlockSize::default());
        assert_eq!(
            DirtyMap::recover(&other, &header, []).unwrap_err(),
            MetadataError::Foreign { what: "dirty map" }
        );
        header[offset as usize + 50] ^= 1;
        assert_eq!(
            DirtyMap::recover(&fresh(), &header, []).unwrap_err(),
            MetadataError::Corrupted { what: "dirty map" }
        );
    }
}
