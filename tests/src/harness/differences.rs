//! Where copies differ, or might after a power loss, and whether anything durable remembers it (D1).
//!
//! The differences are kept up to date with the disks' changes, so that a crash can be thought of after every step.

use super::disk::{Disk, sectors};
use super::host::Host;
use super::links::LinkId;
use super::world::World;
use blockmirror_protocol::dirty_map::DirtyMap;
use blockmirror_protocol::disk::activity_log::Recovered;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::terms::DataState;
use blockmirror_protocol::units::{EXTENT_BYTES, Extent};
use std::collections::{BTreeMap, BTreeSet};

/// What a primary's files say, while they don't change.
#[derive(Debug, Default)]
struct Memory {
    changes: u64,
    log: Option<Recovered>,
    maps: BTreeMap<usize, DirtyMap>,
}

/// For each link from a primary, the sectors that may hold one thing here and another there. What may differ between copies, and who must know of it.
#[derive(Debug, Default)]
pub struct Differences {
    sectors: BTreeMap<LinkId, BTreeSet<u64>>,
    memories: BTreeMap<usize, Memory>,
}

impl Differences {
    /// A host has other disks, files or another role than before.
    pub fn forget(&mut self, host: usize) {
        self.sectors.retain(|link, _| link.dialler != host && link.listener != host);
        self.memories.remove(&host);
    }
}

impl Memory {
    /// Whether the files' content makes a sector's block dirty after a restart.
    fn remembers(&mut self, host: &Host, peer: usize, sector: u64) -> bool {
        if self.changes != host.files.changes() {
            *self = Self { changes: host.files.changes(), ..Self::default() };
        }
        let byte = sector * 512;
        let is_active = match self.log.get_or_insert_with(|| host.recover_log()) {
            Recovered::Active { extents, .. } => extents.contains(&Extent((byte / EXTENT_BYTES) as u32)),
            Recovered::Unsure { .. } => true,
        };
        let map = self.maps.entry(peer).or_insert_with(|| host.recover_map(peer));
        is_active || map.is_dirty(host.superblock.block_size.block_of(byte).0)
    }

    /// Whether the map for a peer is relative to this copy of it.
    fn knows(&mut self, host: &Host, peer: &Host) -> bool {
        if self.changes != host.files.changes() {
            *self = Self { changes: host.files.changes(), ..Self::default() };
        }
        let map = self.maps.entry(peer.number).or_insert_with(|| host.recover_map(peer.number));
        map.base().copy == peer.superblock.copy && peer.mirror.data != DataState::Empty
    }
}

impl World {
    /// Takes in what has changed on the disks, and checks that it may.
    pub(super) fn absorb(&mut self) {
        self.absorb_sources();
        let changed: Vec<Vec<u64>> = self.hosts.iter_mut().map(|host| host.disk.take_changed()).collect();
        let liar = (0..self.hosts.len()).find(|host| self.is_liar(*host));
        for (host, changed) in self.hosts.iter_mut().zip(&changed) {
            if Some(host.number) == liar {
                continue;
            }
            if host.is_primary() {
                host.promises.check_changed(&host.disk, changed);
            } else if let Some(image) = &mut host.mirror.image {
                image.check_changed(&host.disk, changed, host.number);
            } else if let Some(point) = &mut host.mirror.point {
                point.check_changed(&host.disk, host.layers.get(point.layer), changed, host.number);
            }
        }
        for link in self.links.ids() {
            if !self.hosts[link.dialler].is_primary() {
                continue;
            }
            let (here, there) = (&changed[link.dialler], &changed[link.listener]);
            let is_known = self.differences.sectors.contains_key(&link);
            if is_known && here.is_empty() && there.is_empty() {
                continue;
            }
            let changed = here.iter().chain(there).copied();
            let changed = if is_known { changed.collect() } else { self.touched(link) };
            let grown = self.compare(link, changed);
            self.check_remembered(link, &grown);
        }
    }

    /// If this primary crashed now, or has crashed: every block that differs, or might after a power loss, would be
    /// dirty after its restart (D1).
    ///
    /// # Panics
    /// When one is not.
    pub fn check_recovered(&mut self, primary: usize) {
        self.absorb();
        for link in self.links.of_dialler(primary) {
            let Some(sectors) = self.differences.sectors.remove(&link) else { continue };
            let all: Vec<u64> = sectors.iter().copied().collect();
            self.differences.sectors.insert(link, sectors);
            self.check_remembered(link, &all);
        }
    }

    /// At times, the same for a primary whose files have changed since.
    pub(super) fn check_recovered_by_chance(&mut self, primary: usize) {
        let changes = self.hosts[primary].files.changes();
        let memory = self.differences.memories.entry(primary).or_default();
        if memory.changes == changes {
            return;
        }
        let links: Vec<LinkId> = self.links.of_dialler(primary).collect();
        let sectors = |link: &LinkId| self.differences.sectors.get(link).map_or(0, BTreeSet::len) as u64;
        let cost: u64 = links.iter().map(sectors).sum();
        if self.random.once_in(2 + cost / 64) {
            self.check_recovered(primary);
        }
    }

    fn touched(&self, link: LinkId) -> Vec<u64> {
        let mut touched = self.hosts[link.dialler].disk.touched();
        touched.extend(self.hosts[link.listener].disk.touched());
        touched.into_iter().collect()
    }

    /// Looks again at sectors, and gives those that differ and did not before.
    fn compare(&mut self, link: LinkId, changed: Vec<u64>) -> Vec<u64> {
        let (here, there) = (&self.hosts[link.dialler].disk, &self.hosts[link.listener].disk);
        let volume = sectors(ByteRange::new(0, self.settings.size_bytes));
        let known = self.differences.sectors.entry(link).or_default();
        let mut grown = Vec::new();
        for sector in changed.into_iter().filter(|sector| volume.contains(sector)) {
            if there.is_rotten(sector) || !differs(here, there, sector) {
                known.remove(&sector);
            } else if known.insert(sector) {
                grown.push(sector);
            }
        }
        grown
    }

    fn check_remembered(&mut self, link: LinkId, sectors: &[u64]) {
        let (here, there) = (&self.hosts[link.dialler], &self.hosts[link.listener]);
        let memory = self.differences.memories.entry(link.dialler).or_default();
        // A host that was promoted since, or followed another one, tells what it has done in the next greeting.
        let fence = here.superblock.fence;
        let is_united = self.links[link].united_by == Some(fence) && there.superblock.fence == fence;
        if sectors.is_empty() || !is_united || !memory.knows(here, there) {
            return;
        }
        if self.lies.as_ref().is_some_and(|lies| lies.is_of(link.listener)) {
            return;
        }
        for sector in sectors {
            assert!(
                memory.remembers(here, link.listener, *sector),
                "D1: sector {sector} differs over {link}, {:?} here and {:?} there, and nothing remembers",
                here.disk.possible(*sector),
                there.disk.possible(*sector),
            );
        }
    }
}

/// Whether a sector may hold one thing here and another there.
fn differs(here: &Disk, there: &Disk, sector: u64) -> bool {
    let (mut here, there) = (here.possible(sector), there.possible(sector));
    here.extend(there);
    here.iter().any(|value| *value != here[0])
}
