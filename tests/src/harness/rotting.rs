//! Bits that rot in what was durable, and are found when a host starts: one page of its metadata does not fit its checksum any more.
//! At the end some rot in copies at rest, which only a compare can find.
//!
//! What each format survives is said in `protocol::disk`: that a page of a superblock is lost where its twin is whole, and either slot
//! of a marker; and any record of the activity log or page of a map, which then make dirty whatever they stood for. Never is a
//! difference forgotten: that is what [`super::differences`] insists on before the host goes on.

use super::files::Files;
use super::host::host_id;
use super::links::LinkId;
use super::rest::SETTLING;
use super::world::World;
use blockmirror_protocol::disk::superblock::{self, Superblock};
use blockmirror_protocol::disk::{PAGE_BYTES, activity_log, dirty_map, marker};
use blockmirror_protocol::peer::{CompareResult, ReplicaState};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::{EXTENT_BYTES, SECTOR_BYTES};
use std::collections::BTreeSet;

/// Where a map's headers end.
const HEADERS_END: u64 = 2 * PAGE_BYTES as u64;
/// How many sectors of a copy rot at once at most.
const SECTORS: u64 = 4;
/// Every value from here on is what something rotted to: no world has so many requests, and nothing else writes so many.
const ROTTEN: u64 = 1 << 48;

/// The offsets of a file's pages that may rot.
fn may_rot(files: &Files, name: &str) -> Vec<u64> {
    let slots = |length| {
        let bytes = files.bytes(name, length);
        let both = bytes.chunks_exact(PAGE_BYTES).all(|page| page.iter().any(|byte| *byte != 0));
        (bytes, both)
    };
    match name {
        superblock::FILE_NAME => {
            let (bytes, _) = slots(superblock::FILE_BYTES);
            let serial = |page: &[u8]| Superblock::recover(page).map_or(0, |(serial, _)| serial);
            let pages: Vec<u64> = bytes.chunks_exact(PAGE_BYTES).map(serial).collect();
            let newest = pages.iter().max().copied().unwrap_or_default();
            let is_twice = pages.iter().filter(|serial| **serial == newest).count() == 2;
            // What was torn is not there twice, and no more of it goes bad.
            let may = is_twice && pages.iter().all(|serial| *serial > 0);
            (0..).step_by(PAGE_BYTES).take(if may { pages.len() } else { 0 }).collect()
        }
        marker::FILE_NAME if slots(marker::FILE_BYTES).1 => vec![0, PAGE_BYTES as u64],
        activity_log::FILE_NAME => (0..activity_log::FILE_BYTES).step_by(PAGE_BYTES).collect(),
        name if name.starts_with(dirty_map::FILE_PREFIX) => files.offsets(name),
        _ => Vec::new(),
    }
}

impl World {
    /// At times a page of the metadata of a host that is about to start has rotted.
    pub(super) fn rot(&mut self, host: usize) {
        let rots = self.settings.rots;
        if rots == 0 || !self.is_rough || !self.random.once_in(rots) {
            return;
        }
        let files = &self.hosts[host].files;
        let names = files.names().into_iter();
        let pages = names.map(|name| (may_rot(files, &name), name));
        let pages: Vec<(Vec<u64>, String)> = pages.filter(|(pages, _)| !pages.is_empty()).collect();
        if pages.is_empty() {
            return;
        }
        let maps = pages.iter().filter(|(_, name)| name.starts_with(dirty_map::FILE_PREFIX));
        let maps: Vec<(Vec<u64>, String)> = maps.cloned().collect();
        let pages = if maps.is_empty() || self.random.once_in(3) { pages } else { maps };
        let (offsets, name) = pages[self.random.below(pages.len() as u64) as usize].clone();
        // What a map's header says of all blocks at once is the most that one page can lose.
        let headers: Vec<u64> = offsets.iter().copied().filter(|offset| *offset < HEADERS_END).collect();
        let is_map =
            name.starts_with(dirty_map::FILE_PREFIX) && !headers.is_empty() && self.random.once_in(2);
        let offset = self.random.pick(if is_map { &headers } else { &offsets });
        let (byte, bit) = (self.random.below(PAGE_BYTES as u64), self.random.below(8));
        self.note(|| format!("a bit of {name} of host {host} rots, in the page at {offset}"));
        self.hosts[host].files.flip(&name, offset, byte as usize, 1 << bit);
    }

    /// Sectors of a replica that is in sync rot, and nobody knows. A compare finds the extents that they are in, and no others; and
    /// then they are copied again.
    ///
    /// # Panics
    /// When it finds others, or they stay as they are.
    pub(super) fn rot_and_compare(&mut self) {
        let links: Vec<LinkId> = self.replicating();
        if self.settings.rots == 0 || links.is_empty() {
            return;
        }
        let link = self.random.pick(&links);
        let sectors: BTreeSet<u64> = (0..=self.random.below(SECTORS))
            .map(|_| self.random.below(self.settings.size_bytes / SECTOR_BYTES))
            .collect();
        for sector in &sectors {
            let value = ROTTEN + self.next_operation();
            self.note(|| format!("sector {sector} of host {} rots", link.listener));
            self.hosts[link.listener].disk.rot(*sector, value);
        }
        self.begin_compare(link);
        let end = self.now + SETTLING;
        let mut found = None;
        while found.is_none() {
            assert!(self.step(end), "a compare does not end: {}", self.describe());
            found = self.compared.remove(&link);
        }
        let CompareResult { different, .. } = found.expect("it was looked at");
        let of = |sector: &u64| {
            let start = sector * SECTOR_BYTES / EXTENT_BYTES * EXTENT_BYTES;
            ByteRange::between(start, (start + EXTENT_BYTES).min(self.settings.size_bytes))
        };
        let mut rotten: Vec<ByteRange> = sectors.iter().map(of).collect();
        rotten.dedup();
        assert_eq!(different, rotten, "D4: a compare over {link} finds what has rotted, and no more");
        let is_mended = |world: &Self| {
            let tracker = world.hosts[link.dialler].tracker();
            let mut reports =
                tracker.into_iter().flat_map(|tracker| tracker.reports(world.clock(link.dialler)));
            let (_, report) =
                reports.find(|(peer, _)| *peer == host_id(link.listener)).expect("it is a peer");
            report.state == ReplicaState::InSync && report.out_of_sync_bytes == 0
        };
        while !is_mended(self) {
            assert!(self.step(end), "R2: what has rotted is not copied again: {}", self.describe());
        }
        self.hosts[link.listener].disk.forget_rotten();
        self.check_equal(link);
        self.differences.forget(link.listener);
    }
}
