//! What is checked after every step. What has changed on the disks, and whether it may have, is checked in [`super::differences`].

use super::application::PATIENCE;
use super::links::LinkId;
use super::settings::Settings;
use super::world::World;
use blockmirror_protocol::disk::activity_log::CAPACITY;
use blockmirror_protocol::peer::ReplicaState;
use blockmirror_protocol::tracker::Tracker;
use std::collections::BTreeSet;

impl World {
    /// What is checked after every step.
    ///
    /// # Panics
    /// When anything is not as it must be.
    pub(super) fn check_step(&mut self) {
        self.restart_failed();
        self.go_on_demoting();
        self.absorb();
        self.check_fences();
        for host in 0..self.hosts.len() {
            if self.hosts[host].is_primary() {
                self.note_waiting(host);
                self.check_bounds(host);
                self.check_hanging(host);
                self.check_recovered_by_chance(host);
                self.check_in_sync(host);
                self.take_compared(host);
            }
        }
        self.act();
    }

    /// All of a host's disk: a primary's holds what applications were promised (W4), that of a replica whose data are
    /// consistent is a legal image (W3, P1), now and after a power loss now.
    ///
    /// # Panics
    /// When it does not.
    pub fn check_disk(&mut self, host: usize) {
        if self.is_liar(host) {
            return;
        }
        let it = &mut self.hosts[host];
        if it.is_primary() {
            it.promises.check(&it.disk);
        } else if let Some(image) = &mut it.mirror.image {
            image.check(&it.disk, host);
        } else if let Some(point) = &mut it.mirror.point {
            point.check(&it.disk, it.layers.get(point.layer), host);
        }
        if !it.is_primary() {
            it.check_history();
        }
    }

    /// No more was copied than was dirty when the session began, and what became dirty since; nor was more compared.
    ///
    /// # Panics
    /// When more was.
    pub(super) fn check_copied(&self, id: LinkId) {
        let link = &self.links[id];
        let block = self.settings.block_size.bytes();
        let written_bytes = self.hosts[id.dialler].application.written_bytes - link.written_before_bytes;
        let limit = link.dirty_bytes.unwrap_or(0) + written_bytes + block;
        let (copied, compared) = (link.copied_bytes, link.compared_bytes);
        let Settings { disk_failures, bad_sectors, state_failures, hangs, rots, .. } = self.settings;
        // What can't be recorded is copied again.
        let may_grow = disk_failures > 0
            || bad_sectors
            || state_failures
            || hangs > 0
            || rots > 0
            || self.is_liar(id.listener);
        assert!(
            copied.max(compared) <= limit || may_grow,
            "R5: {copied} bytes were copied and {compared} compared where {limit} were dirty"
        );
    }

    /// A replica holds what its primary holds.
    ///
    /// # Panics
    /// When it does not.
    pub fn check_equal(&self, link: LinkId) {
        let (here, there) =
            (self.hosts[link.dialler].disk.content(), self.hosts[link.listener].disk.content());
        if here != there {
            let touched: BTreeSet<u64> = here.keys().chain(there.keys()).copied().collect();
            let sector = touched.into_iter().find(|sector| here.get(sector) != there.get(sector));
            let sector = sector.expect("they differ");
            panic!(
                "D4: over {link} all is in sync but sector {sector} is {:?} here and {:?} there",
                here.get(&sector),
                there.get(&sector)
            );
        }
    }

    /// One that was released may be out of reach for longer than any deadline, and must know before anything is answered (W4).
    fn note_waiting(&mut self, host: usize) {
        let waits = |tracker: &Tracker| tracker.released().next().is_some();
        if self.hosts[host].tracker().is_some_and(waits) {
            self.hosts[host].waited_at = self.now;
        }
    }

    /// No request waits for ever, and what is on its way is bounded (W7).
    fn check_bounds(&self, host: usize) {
        // Requests of 4 GiB take turns in a small activity log.
        let turns = (CAPACITY / self.settings.active_extents) as u32;
        if let Some((id, sent)) = self.hosts[host].application.waiting.first_key_value() {
            assert!(
                self.clock(host).0 <= *sent.max(&self.hosts[host].waited_at) + PATIENCE * turns,
                "W7: request {} waits since {sent:?}: {}",
                id.0,
                self.describe()
            );
        }
        for link in self.links.of_dialler(host) {
            let live_bytes = self.links[link].live_bytes();
            assert!(live_bytes <= 3 * self.settings.window_bytes, "W7: {live_bytes} bytes are on their way");
        }
    }

    fn restart_failed(&mut self) {
        for host in 0..self.hosts.len() {
            let it = &self.hosts[host];
            if it.has_failed() && !it.start_is_planned {
                // Its machine goes on for a while as one that has failed.
                self.plan_start(host, self.settings.outage);
            }
        }
    }

    /// Nobody is told "in sync" while anything differs (D4). A primary that counts as failed may have lost what its
    /// replica has; after its restart it copies what its log remembers (W5, D1).
    fn check_in_sync(&mut self, host: usize) {
        let it = &self.hosts[host];
        let Some(tracker) = it.tracker() else { return };
        if tracker.has_failed() || !it.application.waiting.is_empty() || !it.disk.is_idle() {
            return;
        }
        let in_sync: Vec<usize> = tracker
            .reports(self.clock(host))
            .filter(|(_, report)| report.state == ReplicaState::InSync && report.lag_bytes == 0)
            .map(|(peer, _)| super::host::host_number(peer))
            .collect();
        for link in in_sync.into_iter().map(|peer| LinkId::new(host, peer)) {
            let changes = self.hosts[host].disk.changes() + self.hosts[link.listener].disk.changes();
            if self.hosts[link.listener].disk.has_rotten() || self.is_liar(link.listener) {
                // Nobody can know.
                continue;
            }
            if self.links[link].is_up && self.links[link].compared_at.replace(changes) != Some(changes) {
                self.check_equal(link);
            }
        }
    }

    fn take_compared(&mut self, host: usize) {
        for link in self.links.of_dialler(host) {
            let Some(tracker) = self.hosts[host].tracker_mut() else { return };
            if let Some(result) = tracker.take_compared(super::host::host_id(link.listener)) {
                if self.hosts[link.listener].disk.has_rotten() {
                    self.compared.insert(link, result);
                    continue;
                }
                let Settings { disk_failures, bad_sectors, hangs, .. } = self.settings;
                let may_fail = disk_failures > 0 || bad_sectors || hangs > 0;
                let is_fine = result.different.is_empty() || may_fail || self.is_liar(link.listener);
                assert!(is_fine, "a compare over {link} finds differences in {:?}", result.different);
            }
        }
    }
}
