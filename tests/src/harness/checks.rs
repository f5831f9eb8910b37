//! What is compared with the model, and when.

use super::application::PATIENCE;
use super::disk::{Crash, sectors};
use super::world::World;
use blockmirror_protocol::disk::activity_log::Recovered;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::session::ReplicaState;
use blockmirror_protocol::units::{Block, EXTENT_BYTES, Extent, Time};
use blockmirror_protocol::wire::message::DataState;
use std::collections::BTreeSet;
use std::time::Duration;

/// How often the costly checks are made, in steps; less often where there is much to check.
const OFTEN: u64 = 256;
/// What a frame costs in the window besides its payload.
const FRAME_BYTES: u64 = 128;
/// How long closing may take.
const CLOSING: Duration = Duration::from_secs(20);

impl World {
    /// What can be checked after every step, and at times more.
    ///
    /// # Panics
    /// When anything is not as it must be.
    pub fn check_step(&mut self) {
        self.restart_failed();
        if let Some((id, sent)) = self.application.waiting.first_key_value() {
            assert!(
                self.now <= *sent + PATIENCE,
                "W7: request {} waits since {sent:?}: {}",
                id.0,
                self.describe()
            );
        }
        for which in 0..self.links.len() {
            let live_bytes = self.links[which].live_bytes(FRAME_BYTES);
            assert!(live_bytes <= 3 * self.settings.window_bytes, "W7: {live_bytes} bytes are on their way");
        }
        let pause = OFTEN * (1 + self.primary.disk.content().len() as u64 / 2048);
        if self.steps.is_multiple_of(pause) {
            self.promises.check(&self.primary.disk);
            (0..self.replicas.len()).for_each(|which| self.check_image(which));
        }
        if self.steps.is_multiple_of(pause / 8) {
            self.check_recovered();
        }
        if self.application.waiting.is_empty() && self.primary.disk.is_idle() {
            self.check_in_sync();
        }
        self.take_compared();
    }

    /// A replica whose data are consistent is a legal image now, and after a power loss now (W3, P1).
    pub fn check_image(&self, which: usize) {
        let host = &self.replicas[which];
        if let Some(image) = &host.image {
            image.check(&host.disk, which);
        }
    }

    /// No more was copied than was dirty when the session began, and what became dirty since.
    ///
    /// # Panics
    /// When more was.
    pub fn check_copied(&self, which: usize) {
        let host = &self.replicas[which];
        let (dirty, written) = host.dirty_at_link;
        let block = self.settings.block_size.bytes();
        let limit = dirty.unwrap_or(0) + self.application.written_bytes - written + block;
        let copied = host.copied_bytes;
        assert!(
            copied <= limit || self.settings.disk_failures > 0,
            "R5: {copied} bytes were copied where {limit} were dirty"
        );
    }

    /// If the primary crashed now, or has crashed: every block that differs, or might after a power loss, would be
    /// dirty after its restart (D1).
    ///
    /// # Panics
    /// When one is not.
    pub fn check_recovered(&self) {
        let log = self.primary.recover_log();
        for which in 0..self.replicas.len() {
            let host = &self.replicas[which];
            let map = self.primary.recover_map(which);
            if map.base() != host.copy || host.data == DataState::Empty {
                continue;
            }
            for sector in self.differing(which) {
                let byte = sector * 512;
                let block = self.settings.block_size.block_of(byte);
                let is_active = match &log {
                    Recovered::Active { extents, .. } => {
                        extents.contains(&Extent((byte / EXTENT_BYTES) as u32))
                    }
                    Recovered::Unsure { .. } => true,
                };
                let Block(number) = block;
                assert!(
                    is_active || map.is_dirty(number),
                    "D1: sector {sector} (block {number}) differs on replica {which}, {:?} here and {:?} there, and nothing remembers",
                    self.primary.disk.possible(sector),
                    host.disk.possible(sector),
                );
            }
        }
    }

    /// Nothing is under way and all copies are equal.
    ///
    /// # Panics
    /// When they are not.
    pub fn check_at_rest(&mut self) {
        self.promises.check(&self.primary.disk);
        for which in 0..self.replicas.len() {
            self.check_image(which);
            self.check_equal(which);
            assert_eq!(self.replicas[which].held_payloads(), 0, "every payload is dropped or written");
        }
        assert_eq!(self.primary.held_copies(), 0, "every read for a copy is sent or dropped");
    }

    /// Whether every request is answered, every replica in sync and every disk idle.
    pub fn is_settled(&mut self) -> bool {
        let now = Time(self.now);
        let Some(tracker) = &self.primary.tracker else { return false };
        let all_in_sync = tracker
            .reports(now)
            .all(|(_, report)| report.state == ReplicaState::InSync && report.out_of_sync_bytes == 0);
        let is_idle = self.primary.is_idle() && self.replicas.iter().all(|host| host.is_idle());
        all_in_sync && is_idle && self.application.waiting.is_empty() && !tracker.has_failed()
    }

    /// Compares the volume with every replica through the machines themselves; nothing may differ.
    pub fn compare_all(&mut self) {
        for which in 0..self.replicas.len() {
            self.begin_compare(which);
        }
        let end = self.now + PATIENCE * 20;
        while (0..self.replicas.len()).any(|which| {
            let peer = self.peer(which);
            self.primary.tracker.as_ref().is_some_and(|tracker| tracker.is_comparing(peer))
        }) {
            assert!(self.step(end), "a compare does not end: {}", self.describe());
        }
    }

    /// Begins a compare with a replica.
    pub fn begin_compare(&mut self, which: usize) {
        let (peer, now) = (self.peer(which), Time(self.now));
        if let Some(tracker) = &mut self.primary.tracker {
            let began = tracker.begin_compare(peer, now);
            self.note(|| format!("compare with {which}: {began}"));
            self.act();
        }
    }

    /// Closes the volume, and checks that nothing is left to do after a power loss.
    ///
    /// # Panics
    /// When closing does not end, or leaves anything.
    pub fn close(&mut self) {
        let now = Time(self.now);
        self.primary.tracker.as_mut().expect("the primary is up").close(now);
        self.act();
        let end = self.now + CLOSING;
        while !self.primary.tracker.as_ref().is_some_and(|tracker| tracker.is_closed()) {
            assert!(self.step(end), "closing does not end: {}", self.describe());
        }
        assert!(self.primary.disk.is_durable(), "closing makes everything durable");
        self.crash_primary(Crash::Power);
        self.check_recovered();
        let log = self.primary.recover_log();
        assert!(
            matches!(&log, Recovered::Active { extents, .. } if extents.is_empty()),
            "closing leaves an empty log, not {log:?}"
        );
        for which in 0..self.replicas.len() {
            assert!(self.primary.recover_map(which).is_clean(), "closing leaves the maps as they are");
        }
    }

    /// How things stand, for messages.
    #[must_use]
    pub fn describe(&self) -> String {
        let now = Time(self.now);
        let reports: Vec<_> = self
            .primary
            .tracker
            .iter()
            .flat_map(|tracker| tracker.reports(now))
            .map(|(_, report)| (report.connection, report.state, report.out_of_sync_bytes, report.lag_bytes))
            .collect();
        let replicas: Vec<_> = self
            .replicas
            .iter()
            .map(|host| host.machine.as_ref().map(|machine| (machine.report(), machine.has_failed())))
            .collect();
        format!("at {:?}: {reports:?}; {replicas:?}; {:?}", self.now, self.application.waiting.len())
    }

    fn restart_failed(&mut self) {
        let has_failed = self.primary.tracker.as_ref().is_some_and(|tracker| tracker.has_failed());
        if has_failed && !std::mem::replace(&mut self.primary.start_is_planned, true) {
            self.plan(Duration::from_secs(2), super::world::Event::StartPrimary);
        }
        for which in 0..self.replicas.len() {
            let host = &mut self.replicas[which];
            let has_failed = host.machine.as_ref().is_some_and(|machine| machine.has_failed());
            if has_failed && !std::mem::replace(&mut host.start_is_planned, true) {
                self.plan(Duration::from_secs(2), super::world::Event::StartReplica(which));
            }
        }
    }

    /// Sectors that may hold one thing here and another there.
    fn differing(&self, which: usize) -> BTreeSet<u64> {
        let (here, there) = (&self.primary.disk, &self.replicas[which].disk);
        let mut touched = here.touched();
        touched.extend(there.touched());
        let volume = sectors(ByteRange::new(0, self.settings.size_bytes));
        let differs = |sector: &u64| {
            if here.is_certain(*sector) && there.is_certain(*sector) {
                return here.content().get(sector) != there.content().get(sector);
            }
            let mut values = here.possible(*sector);
            values.extend(there.possible(*sector));
            values.len() > 1
        };
        touched.into_iter().filter(|sector| volume.contains(sector)).filter(differs).collect()
    }

    /// Nobody is told "in sync" while anything differs (D4).
    fn check_in_sync(&mut self) {
        let now = Time(self.now);
        let Some(tracker) = &self.primary.tracker else { return };
        let in_sync: Vec<bool> = tracker
            .reports(now)
            .map(|(_, report)| report.state == ReplicaState::InSync && report.lag_bytes == 0)
            .collect();
        for (which, in_sync) in in_sync.into_iter().enumerate() {
            let changes = self.primary.disk.changes() + self.replicas[which].disk.changes();
            if in_sync && self.links[which].is_up && self.links[which].compared_at != changes {
                self.links[which].compared_at = changes;
                self.check_equal(which);
            }
        }
    }

    fn check_equal(&self, which: usize) {
        let (here, there) = (self.primary.disk.content(), self.replicas[which].disk.content());
        if here != there {
            let touched: BTreeSet<u64> = here.keys().chain(there.keys()).copied().collect();
            let sector = touched.into_iter().find(|sector| here.get(sector) != there.get(sector));
            let sector = sector.expect("they differ");
            panic!(
                "D4: replica {which} is in sync but sector {sector} is {:?} here and {:?} there",
                here.get(&sector),
                there.get(&sector)
            );
        }
    }

    fn take_compared(&mut self) {
        for which in 0..self.replicas.len() {
            let peer = self.peer(which);
            let Some(tracker) = &mut self.primary.tracker else { return };
            if let Some(result) = tracker.take_compared(peer) {
                let is_fine = result.different.is_empty() || self.settings.disk_failures > 0;
                assert!(
                    is_fine,
                    "a compare with replica {which} finds differences in {:?}",
                    result.different
                );
            }
        }
        self.act();
    }
}
