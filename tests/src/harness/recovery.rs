//! A host's disk is lost, and its content is recovered from another host's copy (L4, X4): its state folder says what it had,
//! and what it holds now is what the copy was.

use super::disk::{Crash, Disk, Value};
use super::gap::Layers;
use super::host::{Shell, host_id, host_number};
use super::mirror::Mirror;
use super::promises::Promises;
use super::roles::generation;
use super::world::{Event, World};
use blockmirror_protocol::adoption::{Adoption, Content};
use blockmirror_protocol::disk::superblock::Role;
use blockmirror_protocol::disk::{PAGE_BYTES, activity_log, dirty_map, marker, slot_offset};
use blockmirror_protocol::units::GenerationId;
use blockmirror_protocol::wire::message::DataState;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How long an operator waits before looking again whether a source has come to rest, at most.
const LOOK: Duration = Duration::from_millis(50);

/// A copy, as it was read while no primary wrote to it.
struct Copy {
    sectors: BTreeMap<u64, Value>,
    content: Content,
    mirror: Mirror,
    known_lives: BTreeSet<(usize, u64)>,
}

impl World {
    /// An operator recovers the content of a host whose disk is lost from that of another one, in this life, once nothing is
    /// written there any more. Nothing happens where that one is no replica with any content.
    pub(super) fn recover(&mut self, host: usize, source: usize, life: u64) {
        let it = &mut self.hosts[source];
        let Shell::Replica(shell) = &mut it.shell else { return };
        if it.life != life || shell.machine.has_failed() || it.superblock.data == DataState::Empty {
            it.is_held = false;
            return;
        }
        shell.machine.handle_disconnected();
        if !shell.machine.is_idle() || !shell.is_idle() {
            it.is_held = true;
            return self.plan(LOOK, Event::Recover(host, source, life));
        }
        let report = shell.machine.report();
        let copy = Copy {
            sectors: it.disk.content().clone(),
            content: Content::of(report.data, report.position, &it.superblock.lineage),
            mirror: it.mirror.clone(),
            known_lives: it.known_lives.clone(),
        };
        it.is_held = false;
        let is_older = self.hear_all(host).iter().any(|other| {
            other.standing.as_ref().is_some_and(|standing| copy.content.is_older_than(standing))
        });
        self.cut_off(source);
        if is_older && !self.random.once_in(4) {
            // It is refused; he knows better at times.
            return;
        }
        self.crash(host, Crash::Power);
        // A replica takes no mixture: its primary copies to it.
        if copy.content != Content::Mixture || self.hosts[host].is_primary() {
            self.note(|| format!("host {host} is recovered from {source}: {:?}", copy.content));
            self.adopt(host, source, copy);
        }
        self.plan_restart(host);
    }

    /// What the host that is down holds is another one's copy from now on.
    fn adopt(&mut self, host: usize, source: usize, copy: Copy) {
        let number = self.next_operation();
        let fresh = generation(host, number);
        let Copy { sectors, content, mirror, known_lives } = copy;
        let it = &mut self.hosts[host];
        it.recover_superblock();
        if it.has_nothing_to_lose() {
            it.agrees_up_to(it.superblock.fence.counter);
        }
        it.disk = Disk::holding(self.settings.sector_bytes[host], sectors);
        let adoption = Adoption { source: Some(host_id(source)), content: Some(&content) };
        let vouched = self.adopt_metadata(host, adoption);
        let it = &mut self.hosts[host];
        adoption.record(&mut it.superblock, vouched, fresh.0);
        it.write_superblock_now();
        (it.layers, it.kept, it.expected) = (Layers::default(), None, None);
        it.is_set_back = true;
        let is_image = content != Content::Mixture;
        it.known_lives = if is_image { known_lives } else { BTreeSet::new() };
        match it.superblock.role {
            Role::Primary => it.promises = Promises::of(&it.disk),
            Role::Replica => it.mirror = mirror.of_recovered(is_image),
        }
        if it.superblock.lineage.first() == Some(&fresh) {
            self.generations.begin(fresh, &[], None);
        }
        for other in &mut self.hosts {
            // What is there now is not what it told them of.
            other.heard.remove(&host);
        }
        for link in self.links.ids().filter(|link| [link.dialler, link.listener].contains(&host)) {
            self.links[link].united_by = None;
        }
        self.differences.forget(host);
    }

    /// Gives the generation that the map for the source is relative to.
    fn adopt_metadata(&mut self, host: usize, adoption: Adoption<'_>) -> GenerationId {
        let it = &mut self.hosts[host];
        let mut vouched = GenerationId::default();
        match it.superblock.role {
            Role::Primary => {
                for peer in it.members.peers() {
                    let mut map = it.recover_map(peer);
                    if adoption.source.map(host_number) == Some(peer) {
                        vouched = map.base().generation;
                    }
                    if !adoption.keeps_map(host_id(peer)) {
                        map.begin_anew(map.base());
                        for (offset, page) in
                            super::files::batches_of_map(map.take_changes()).into_iter().flatten()
                        {
                            let page = page.map_or([0; PAGE_BYTES], |page| *page);
                            it.files.write_now(&dirty_map::file_name(host_id(peer)), offset, &page);
                        }
                    }
                }
            }
            Role::Replica => {
                if let Some(mark) = adoption.mark() {
                    for (serial, record) in activity_log::ring_after(0, true) {
                        let offset = activity_log::record_offset(serial);
                        it.files.write_now(activity_log::FILE_NAME, offset, &record);
                    }
                    let bytes = it.files.bytes(marker::FILE_NAME, marker::FILE_BYTES);
                    let serial = marker::recover(&bytes).map_or(0, |(serial, _)| serial) + 1;
                    it.files.write_now(marker::FILE_NAME, slot_offset(serial), &marker::encode(mark, serial));
                }
            }
        }
        vouched
    }
}
