//! An operator brings back what a host gave up (L6): the steps that [`undo`] names, while its agent is down.

use super::disk::Crash;
use super::gap::{HistoryPoint, Layer};
use super::host::{Host, Shell, host_id};
use super::mirror::Mirror;
use super::promises::Promises;
use super::rewriting::Purpose;
use super::roles::generation;
use super::world::World;
use blockmirror_protocol::replica::{StateChange, undo};
use blockmirror_protocol::rewrite::{Before, Rewrite};
use blockmirror_protocol::units::HostId;

impl Host {
    /// A change of the superblock is durable: what was there before a history began is remembered.
    pub(super) fn note_history(&mut self, change: &StateChange) {
        if let StateChange::Follow { fence, .. } = change
            && self.has_nothing_to_lose()
        {
            self.agrees_up_to(fence.counter);
        }
        let Self { superblock, disk, layers, .. } = self;
        if self.kept.as_ref().is_some_and(|kept| Some(kept.layer) != superblock.layers.undo()) {
            self.kept = None;
        }
        if matches!(change, StateChange::Begin { keep: true, .. } | StateChange::Keep(_)) {
            let layer = layers.get(superblock.layers.undo().expect("it was made to say so"));
            self.kept = Some(HistoryPoint::now(disk, layer, superblock, &self.known_lives));
        }
    }

    /// The agent starts: what it left behind is removed, and a history that it had just begun is remembered.
    pub(super) fn recover_history(&mut self) {
        let Self { superblock, disk, layers, .. } = self;
        layers.keep(&superblock.layers);
        self.kept.take_if(|kept| Some(kept.layer) != superblock.layers.undo());
        if let Some(undo) = superblock.layers.undo().filter(|_| self.kept.is_none()) {
            let layer = layers.get(undo);
            let was_gap = superblock.layers.rollback() == Some(undo);
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
        if let Some(kept) =
            self.kept.as_ref().filter(|kept| Some(kept.layer) == self.superblock.layers.undo())
        {
            kept.check(&self.disk, self.layers.get(kept.layer), self.number);
        }
    }
}

impl World {
    /// An operator brings back what a replica had. Says whether there was anything.
    pub fn undo(&mut self, host: usize) -> bool {
        let it = &self.hosts[host];
        let is_replica = matches!(it.shell, Shell::Replica(_));
        if !is_replica || undo::layer(&it.superblock).is_err() || it.has_failed() || self.state_is_out(host) {
            return false;
        }
        if self.is_source(host) {
            // What is absent elsewhere would be nowhere: that rebuild could not go on.
            return false;
        }
        self.crash(host, Crash::Process);
        let number = self.next_operation();
        self.hosts[host].recover_superblock();
        // A commit that was being written may be there.
        self.recover_mirror(host);
        let it = &mut self.hosts[host];
        it.recover_history();
        let Some(point) = it.kept.clone() else {
            self.start(host);
            return false;
        };
        let before = Before {
            lineage: point.lineage.clone(),
            point: point.position,
            saved: it.layers.saved(Some(point.layer)),
            own: generation(host, number),
        };
        let peers: Vec<HostId> = it.members.peers().into_iter().map(host_id).collect();
        let Ok(rewrite) = Rewrite::undo(&it.superblock, &peers, before) else {
            self.start(host);
            return false;
        };
        self.note(|| format!("host {host} is undone"));
        self.begin_rewriting(host, rewrite, Purpose::Undo(point));
        true
    }

    /// It is durable that only the history leads back to an image.
    pub(super) fn undo_is_begun(&mut self, host: usize, point: &HistoryPoint) {
        let it = &mut self.hosts[host];
        it.agreed.withdraw(it.superblock.fence.counter);
        it.mirror = Mirror::of_point(point);
        (it.expected, it.known_lives) = (None, point.known_lives.clone());
        for link in self.links.ids().filter(|link| link.listener == host) {
            // What is restored, this host's own maps remember.
            self.links[link].united_by = None;
        }
        for other in &mut self.hosts {
            // What is brought back is not what it told them of.
            other.heard.remove(&host);
        }
        self.differences.forget(host);
    }

    /// It is durable that the copy is what it was.
    pub(super) fn undo_is_recorded(&mut self, host: usize, point: &HistoryPoint) {
        let it = &mut self.hosts[host];
        point.check(&it.disk, &Layer::new(point.layer), host);
        it.mirror = Mirror::of_primary(&it.disk, &Promises::default());
        it.kept = None;
        it.known_lives = point.known_lives.clone();
        self.differences.forget(host);
    }
}
