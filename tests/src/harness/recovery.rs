//! A host's disk is lost, and its content is recovered from another host's copy (L4, X4): its state folder says what it had,
//! and what it holds now is what the copy was.

use super::disk::{Crash, Disk, Value};
use super::gap::Layers;
use super::host::{Shell, host_id};
use super::mirror::Mirror;
use super::promises::Promises;
use super::rewriting::Purpose;
use super::roles::generation;
use super::world::{Event, World};
use blockmirror_protocol::adoption::{Adoption, Content};
use blockmirror_protocol::disk::superblock::Role;
use blockmirror_protocol::rewrite::Rewrite;
use blockmirror_protocol::succession;
use blockmirror_protocol::terms::DataState;
use blockmirror_protocol::units::HostId;
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

/// The copy that is on a disk which the metadata says nothing of yet.
#[derive(Clone, Debug)]
pub struct Adopting {
    source: usize,
    content: Content,
    /// Whether nothing of it is on the disk.
    is_absent: bool,
}

impl Adopting {
    /// The host whose copy it is.
    #[must_use]
    pub fn source(&self) -> usize {
        self.source
    }
}

impl World {
    /// An operator recovers the content of a host whose disk is lost from that of another one, in this life, once nothing is
    /// written there any more. Nothing happens where that one is no replica with any content.
    pub(super) fn recover(&mut self, host: usize, source: usize, life: u64) {
        let is_lost_with_it = self.is_source(host);
        let rebuilds = self.settings.rebuilds.then(|| self.hosts[host].durable_superblock());
        let rebuilds = rebuilds.filter(|it| it.role == Role::Primary).map(|it| it.fence);
        let it = &mut self.hosts[source];
        let Shell::Replica(shell) = &mut it.shell else { return };
        let is_of_use =
            !is_lost_with_it && !shell.machine.has_failed() && it.superblock.data != DataState::Empty;
        if it.life != life || !is_of_use || !self.is_rough {
            if std::mem::take(&mut it.is_held) {
                self.cut_off(source);
            }
            return;
        }
        shell.machine.handle_disconnected();
        if !shell.machine.is_idle() || !shell.is_idle() {
            it.is_held = true;
            return self.plan(LOOK, Event::Recover(host, source, life));
        }
        if rebuilds.is_some_and(|fence| !shell.machine.is_lent_to(fence)) {
            // It is recorded first whose it is.
            it.is_held = shell.machine.lend(rebuilds.expect("it was looked at")).is_ok();
            if !it.is_held {
                return self.cut_off(source);
            }
            self.plan(LOOK, Event::Recover(host, source, life));
            return self.act();
        }
        let position = shell.machine.report().position;
        let (data, _) = succession::counts_as(&it.superblock);
        let superblock = it.superblock.clone();
        self.check_counted(source, &superblock);
        let it = &mut self.hosts[source];
        if self.settings.rebuilds {
            // What is served from there must not be lost there.
            it.disk.sync_now();
        }
        let copy = Copy {
            sectors: it.disk.content().clone(),
            content: Content::of(data, position, &it.superblock.lineage),
            mirror: it.mirror.clone(),
            known_lives: it.known_lives.clone(),
        };
        it.is_held = false;
        let is_older = self.hear_all(host).iter().any(|other| {
            other.standing.as_ref().is_some_and(|standing| copy.content.is_older_than(standing))
        });
        self.cut_off(source);
        let is_refused = self.settings.rebuilds && (is_older || copy.content == Content::Mixture);
        if is_refused || is_older && !self.random.once_in(4) {
            // It is refused; he knows better at times.
            return;
        }
        self.crash(host, Crash::Power);
        // A replica takes no mixture: its primary copies to it.
        if copy.content != Content::Mixture || self.hosts[host].is_primary() {
            self.note(|| format!("host {host} is recovered from {source}: {:?}", copy.content));
            self.exchange_disk(host, source, copy);
        }
        if rebuilds.is_some() && self.random.once_in(4) {
            // Another operator wants to go on elsewhere meanwhile.
            let other = self.random.below(self.hosts.len() as u64) as usize;
            let (wait, life) = (self.random.up_to(self.settings.outage * 4), self.hosts[other].life);
            self.plan(wait, Event::Promote(other, life));
        }
        self.plan_restart(host);
    }

    /// What the host that is down holds is another one's copy from now on.
    fn exchange_disk(&mut self, host: usize, source: usize, copy: Copy) {
        let Copy { sectors, content, mirror, known_lives } = copy;
        let it = &mut self.hosts[host];
        it.recover_superblock();
        if it.has_nothing_to_lose() {
            it.agrees_up_to(it.superblock.fence.counter);
        }
        let is_absent =
            self.settings.rebuilds && it.superblock.role == Role::Primary && content != Content::Mixture;
        let (sector_bytes, size_bytes) = (self.settings.sector_bytes[host], self.settings.size_bytes);
        it.disk = match is_absent {
            true => Disk::lacking(sector_bytes, size_bytes, sectors),
            false => Disk::holding(sector_bytes, sectors),
        };
        (it.layers, it.kept, it.expected) = (Layers::default(), None, None);
        (it.is_set_back, it.must_remember) = (true, false);
        let is_image = content != Content::Mixture;
        it.known_lives = if is_image { known_lives } else { BTreeSet::new() };
        match it.superblock.role {
            Role::Primary => {
                it.promises = Promises::of(&it.disk);
                self.take_content(host, is_image);
            }
            Role::Replica => it.mirror = mirror.of_recovered(is_image),
        }
        self.hosts[host].adopting = Some(Adopting { source, content, is_absent });
        for other in &mut self.hosts {
            // What is there now is not what it told them of.
            other.heard.remove(&host);
            let promised = other.expected.iter_mut().filter(|expected| expected.primary == host);
            promised.for_each(|expected| expected.is_outdated = true);
        }
        for link in self.links.ids().filter(|link| [link.dialler, link.listener].contains(&host)) {
            self.links[link].united_by = None;
        }
        self.differences.forget(host);
    }

    /// The agent starts, and finds another disk than it had.
    pub(super) fn adopt(&mut self, host: usize, adopting: &Adopting) {
        let number = self.next_operation();
        let it = &self.hosts[host];
        let Adopting { source, content, is_absent } = adopting;
        let adoption =
            Adoption { source: Some(host_id(*source)), content: Some(content), is_absent: *is_absent };
        let peers: Vec<HostId> = it.members.peers().into_iter().map(host_id).collect();
        let rewrite = Rewrite::adoption(&it.superblock, &peers, adoption, generation(host, number).0);
        self.begin_rewriting(host, rewrite, Purpose::Adoption);
    }
}
