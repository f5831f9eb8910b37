//! A host is set back to what it was before: the hypervisor restores a snapshot of its disks, backing and metadata alike
//! (X4). By itself such a copy can't know; its primary must, or its replicas where it is the primary.

use super::consent::Agreed;
use super::disk::{Crash, Disk};
use super::files::Files;
use super::gap::{HistoryPoint, Layers};
use super::host::{Host, Shell};
use super::mirror::Mirror;
use super::promises::Promises;
use super::recovery::Adopting;
use super::world::World;
use blockmirror_protocol::disk::marker;
use blockmirror_protocol::disk::superblock::{self, Role, Superblock};
use blockmirror_protocol::lineage::{self, Relation};
use blockmirror_protocol::terms::DataState;
use blockmirror_protocol::units::{Mark, Session};
use std::collections::BTreeSet;

/// What a power loss left on a host's disks, and what the model knew of it then.
#[derive(Clone, Debug)]
pub struct Snapshot {
    disk: Disk,
    files: Files,
    layers: Layers,
    kept: Option<HistoryPoint>,
    agreed: Agreed,
    mirror: Mirror,
    known_lives: BTreeSet<(usize, u64)>,
    promises: Promises,
    adopting: Option<Adopting>,
}

impl World {
    /// A host loses power. At times its disks are remembered then; at other times they are what they were when
    /// they were remembered last.
    pub(super) fn set_back(&mut self, host: usize) {
        if !self.hosts[host].is_up() || self.hosts[host].must_remember {
            return;
        }
        self.crash(host, Crash::Power);
        match self.hosts[host].snapshot.clone() {
            Some(snapshot) if !self.random.once_in(4) && self.would_notice(host, &snapshot) => {
                self.must_remember(host, &snapshot);
                self.restore_snapshot(host, snapshot);
            }
            _ => {
                let it = &mut self.hosts[host];
                it.snapshot = Some(Snapshot {
                    disk: it.disk.clone(),
                    files: it.files.clone(),
                    layers: it.layers.clone(),
                    kept: it.kept.clone(),
                    agreed: it.agreed.clone(),
                    mirror: it.mirror.clone(),
                    known_lives: it.known_lives.clone(),
                    promises: it.promises.clone(),
                    adopting: it.adopting.clone(),
                });
            }
        }
        self.plan_restart(host);
    }

    /// Whether primaries know durably that the host was further than that. What they know is written within some seconds;
    /// where one crashes before, nobody can tell.
    fn would_notice(&self, host: usize, snapshot: &Snapshot) -> bool {
        let (before, mark) = (superblock_of(&snapshot.files), mark_of(&snapshot.files));
        let others = || self.hosts.iter().filter(|other| other.number != host);
        let is_noticed_by = |primary: &Host| {
            lineage::went_back(&primary.superblock.lineage, mark, primary.recover_map(host).known())
        };
        match before.role {
            Role::Replica => {
                let mut primaries = others().filter(|other| other.is_primary());
                !self.hosts[host].is_primary() && primaries.all(is_noticed_by)
            }
            Role::Primary => others().all(|other| {
                let superblock = other.durable_superblock();
                let relation = lineage::relation(&before.lineage, &superblock.lineage);
                let has_more = matches!(relation, Relation::TheirsIsNewer | Relation::Forked(_))
                    || before.ends.lacks(other.mark().position);
                match superblock.data {
                    _ if other.is_primary() => is_noticed_by(other),
                    DataState::Empty => true,
                    DataState::Inconsistent => {
                        has_more || other.mark().session > before.session || other.remembers(before.session)
                    }
                    DataState::Consistent => has_more,
                }
            }),
        }
    }

    /// The agents of those that know by nothing durable that a primary is set back don't end before it was told.
    fn must_remember(&mut self, host: usize, snapshot: &Snapshot) {
        let before = superblock_of(&snapshot.files);
        if before.role != Role::Primary {
            return;
        }
        for other in self.hosts.iter_mut().filter(|other| other.number != host) {
            let knows = other.mark().session > before.session;
            let is_whole = other.durable_superblock().data != DataState::Inconsistent;
            other.must_remember = !knows && !is_whole && other.remembers(before.session);
        }
    }

    fn restore_snapshot(&mut self, host: usize, snapshot: Snapshot) {
        let role = superblock_of(&snapshot.files).role;
        self.note(|| format!("host {host} is set back, {role:?}"));
        let it = &mut self.hosts[host];
        let Snapshot { disk, files, layers, kept, agreed, mirror, known_lives, promises, adopting } =
            snapshot;
        (it.disk, it.files, it.layers) = (disk, files, layers);
        (it.kept, it.agreed, it.mirror, it.known_lives) = (kept, agreed, mirror, known_lives);
        (it.promises, it.adopting) = (promises, adopting);
        it.expected = None;
        it.is_set_back = true;
        it.recover_superblock();
        self.differences.forget(host);
        for link in self.links.ids().filter(|link| [link.dialler, link.listener].contains(&host)) {
            self.links[link].united_by = None;
        }
    }
}

impl Host {
    /// Whether it is in a session, as a replica, that is newer than this one.
    fn remembers(&self, session: Session) -> bool {
        let Shell::Replica(shell) = &self.shell else { return false };
        shell.machine.session().is_some_and(|open| open > session)
    }
}

fn superblock_of(files: &Files) -> Superblock {
    let bytes = files.bytes(superblock::FILE_NAME, superblock::FILE_BYTES);
    Superblock::recover(&bytes).expect("a superblock is whole").1
}

/// How far a host is whose metadata says so.
pub(super) fn mark_of(files: &Files) -> Mark {
    let superblock = superblock_of(files);
    let marker = files.bytes(marker::FILE_NAME, marker::FILE_BYTES);
    let marked = marker::recover(&marker).map(|(_, mark)| mark).unwrap_or_default();
    let position = match superblock.role {
        Role::Primary => superblock.stands(),
        Role::Replica => lineage::later(&superblock.lineage, superblock.position, marked.position),
    };
    Mark { position, ..marked }
}
