//! An operator brings back what a host gave up (L6): the steps that [`undo`] names, while its agent is down.

use super::disk::{Crash, Data, DiskOperation};
use super::files::batches_of_map;
use super::gap::HistoryPoint;
use super::host::{Host, Shell, host_id};
use super::mirror::Mirror;
use super::promises::Promises;
use super::roles::generation;
use super::world::World;
use blockmirror_protocol::disk::{PAGE_BYTES, dirty_map};
use blockmirror_protocol::replica::resolve::{self, Keep};
use blockmirror_protocol::replica::{StateChange, undo};
use blockmirror_protocol::wire::message::DataState;

impl Host {
    /// A change of the superblock is durable: what was there before a history began is remembered.
    pub(super) fn note_history(&mut self, change: &StateChange) {
        if let StateChange::Follow { fence, .. } = change
            && self.has_nothing_to_lose()
        {
            self.agrees_up_to(fence.counter);
        }
        let Self { superblock, disk, layers, .. } = self;
        if self.kept.as_ref().is_some_and(|kept| kept.layer != superblock.history) {
            self.kept = None;
        }
        if matches!(change, StateChange::Begin { keep: true, .. } | StateChange::Keep(_)) {
            let layer = layers.get(superblock.history);
            self.kept = Some(HistoryPoint::now(disk, layer, superblock, &self.known_lives));
        }
    }

    /// The layer that keeps what this host has now, before it yields; 0 for none.
    pub(super) fn keep_what_it_has(&mut self) -> u64 {
        let is_unused = self.layers.saved(self.superblock.history).is_empty();
        let history = match resolve::keep(&self.superblock, is_unused) {
            Keep::Nothing => return 0,
            Keep::Layer(layer) => layer,
            Keep::NewLayer => {
                self.layers.begin(self.superblock.layers + 1);
                self.superblock.layers + 1
            }
        };
        if self.kept.as_ref().is_none_or(|kept| kept.layer != history) {
            let layer = self.layers.get(history);
            self.kept = Some(HistoryPoint::now(&self.disk, layer, &self.superblock, &self.known_lives));
        }
        history
    }

    /// The agent starts: what it left behind is removed, and a history that it had just begun is remembered.
    pub(super) fn recover_history(&mut self) {
        let Self { superblock, disk, layers, .. } = self;
        layers.keep([superblock.gap, superblock.history]);
        self.kept.take_if(|kept| kept.layer != superblock.history);
        if superblock.history != 0 && self.kept.is_none() {
            let layer = layers.get(superblock.history);
            let was_gap = superblock.gap == superblock.history;
            assert!(layer.saved.is_empty() || was_gap, "L6: the history was begun unseen");
            self.kept = Some(HistoryPoint::now(disk, layer, superblock, &self.known_lives));
        }
        self.check_history();
    }

    /// Restoring the history gives what was there.
    ///
    /// # Panics
    /// When it might not.
    pub(super) fn check_history(&self) {
        if let Some(kept) = self.kept.as_ref().filter(|kept| kept.layer == self.superblock.history) {
            kept.check(&self.disk, self.layers.get(kept.layer), self.number);
        }
    }
}

impl World {
    /// An operator brings back what a replica had. Says whether there was anything.
    pub fn undo(&mut self, host: usize) -> bool {
        let it = &self.hosts[host];
        let is_replica = matches!(it.shell, Shell::Replica(_));
        if !is_replica || undo::steps(&it.superblock).is_err() || it.has_failed() || self.state_fails(host) {
            return false;
        }
        self.crash(host, Crash::Process);
        self.hosts[host].recover_superblock();
        self.hosts[host].recover_history();
        let Some(point) = self.hosts[host].kept.take() else {
            self.start(host);
            return false;
        };
        self.note(|| format!("host {host} is undone"));
        // At times the host stops in the middle, and is undone once more.
        while !self.bring_back(host, &point) {
            self.hosts[host].kept = Some(point.clone());
            self.crash(host, Crash::Power);
            self.hosts[host].recover_superblock();
            self.hosts[host].recover_history();
        }
        let it = &mut self.hosts[host];
        undo::record(&mut it.superblock, point.position);
        it.write_superblock_now();
        (it.expected, it.known_lives) = (None, point.known_lives);
        it.mirror = Mirror::of_primary(&it.disk, &Promises::default());
        for link in self.links.ids().filter(|link| link.listener == host) {
            // What was restored, this host's own maps remember.
            self.links[link].united_by = None;
        }
        for other in &mut self.hosts {
            // What was brought back is not what it told them of.
            other.heard.remove(&host);
        }
        self.differences.forget(host);
        self.start(host);
        true
    }

    /// Carries out the steps up to the sync. Says whether nothing came between.
    fn bring_back(&mut self, host: usize, point: &HistoryPoint) -> bool {
        self.write_undone_maps(host, point);
        let number = self.next_operation();
        let it = &mut self.hosts[host];
        self.generations.begin(generation(host, number), &point.lineage, None);
        undo::begin(&mut it.superblock, &point.lineage, generation(host, number));
        it.agreed = it.agreed.min(it.superblock.fence.counter.saturating_sub(1));
        it.write_superblock_now();
        // Only the history leads back from here.
        it.mirror = Mirror::default();
        it.mirror.data = DataState::Inconsistent;
        let is_whole = !self.random.once_in(3);
        self.restore_history(host, point, is_whole);
        is_whole
    }

    fn write_undone_maps(&mut self, host: usize, point: &HistoryPoint) {
        for peer in self.hosts[host].members.peers() {
            let it = &mut self.hosts[host];
            let saved = it.layers.saved(point.layer);
            let (map, id) = (it.recover_map(peer), host_id(peer));
            let mut map = undo::map_for(map, &it.superblock, id, &point.lineage, &saved);
            for (offset, page) in batches_of_map(map.take_changes()).into_iter().flatten() {
                let page = page.map_or([0; PAGE_BYTES], |page| *page);
                it.files.write_now(&dirty_map::file_name(id), offset, &page);
            }
        }
    }

    /// Restores all of the history, and syncs; else some of it.
    fn restore_history(&mut self, host: usize, point: &HistoryPoint, is_whole: bool) {
        let contents: Vec<_> = self.hosts[host].layers.get(point.layer).contents().collect();
        for (range, held) in contents {
            if !is_whole && self.random.once_in(2) {
                continue;
            }
            let id = DiskOperation(self.next_operation());
            let it = &mut self.hosts[host];
            it.disk.write(id, range, &Data::Sparse(held), false);
            it.disk.end(id, false, &mut self.random);
        }
        if !is_whole {
            return;
        }
        let id = DiskOperation(self.next_operation());
        let it = &mut self.hosts[host];
        it.disk.sync(id);
        it.disk.end(id, false, &mut self.random);
        point.check(&it.disk, &super::gap::Layer::new(point.layer), host);
    }
}
