//! A host is set back to what it was before: the hypervisor restores a snapshot of its disks, backing and metadata alike
//! (X4). By itself such a copy can't know; its primary must.

use super::disk::{Crash, Disk};
use super::files::Files;
use super::gap::{HistoryPoint, Layers};
use super::mirror::Mirror;
use super::world::{Event, World};
use blockmirror_protocol::disk::marker;
use blockmirror_protocol::disk::superblock::{self, Superblock};
use blockmirror_protocol::lineage;
use blockmirror_protocol::units::Mark;
use std::collections::BTreeSet;

/// What a power loss left on a host's disks, and what the model knew of it then.
#[derive(Clone, Debug)]
pub struct Snapshot {
    disk: Disk,
    files: Files,
    layers: Layers,
    kept: Option<HistoryPoint>,
    mirror: Mirror,
    known_lives: BTreeSet<(usize, u64)>,
}

impl World {
    /// A replica's host loses power. At times its disks are remembered then; at other times they are what they were when
    /// they were remembered last.
    pub(super) fn set_back(&mut self, host: usize) {
        if !self.hosts[host].is_up() || self.hosts[host].is_primary() {
            return;
        }
        self.crash(host, Crash::Power);
        match self.hosts[host].snapshot.clone() {
            Some(snapshot) if self.random.once_in(2) && self.would_notice(host, &snapshot) => {
                self.restore_snapshot(host, snapshot);
            }
            _ => {
                let it = &mut self.hosts[host];
                it.snapshot = Some(Snapshot {
                    disk: it.disk.clone(),
                    files: it.files.clone(),
                    layers: it.layers.clone(),
                    kept: it.kept.clone(),
                    mirror: it.mirror.clone(),
                    known_lives: it.known_lives.clone(),
                });
            }
        }
        let delay = self.random.up_to(self.settings.outage);
        self.hosts[host].start_is_planned = true;
        self.plan(delay, Event::Start(host));
    }

    /// Whether primaries know durably that the host was further than that. What they know is written within some seconds;
    /// where one crashes before, nobody can tell.
    fn would_notice(&self, host: usize, snapshot: &Snapshot) -> bool {
        let superblock = snapshot.files.bytes(superblock::FILE_NAME, superblock::FILE_BYTES);
        let (_, Superblock { lineage, position, .. }) =
            Superblock::recover(&superblock).expect("a superblock is whole");
        let marker = snapshot.files.bytes(marker::FILE_NAME, marker::FILE_BYTES);
        let marked = marker::recover(&marker).map(|(_, mark)| mark).unwrap_or_default();
        let mark = Mark { position: lineage::later(&lineage, position, marked.position), ..marked };
        let mut primaries = self.hosts.iter().filter(|other| other.is_primary());
        primaries.all(|primary| {
            lineage::went_back(&primary.superblock.lineage, mark, primary.recover_map(host).known())
        })
    }

    fn restore_snapshot(&mut self, host: usize, snapshot: Snapshot) {
        self.note(|| format!("host {host} is set back"));
        let it = &mut self.hosts[host];
        let Snapshot { disk, files, layers, kept, mirror, known_lives } = snapshot;
        (it.disk, it.files, it.layers) = (disk, files, layers);
        (it.kept, it.mirror, it.known_lives) = (kept, mirror, known_lives);
        it.expected = None;
        it.is_set_back = true;
        it.recover_superblock();
        self.differences.forget(host);
        for link in self.links.ids().filter(|link| link.listener == host) {
            self.links[link].united_by = None;
        }
    }
}
