//! Operators see to one primary that everybody can follow; and a primary that learns of another one steps down.

use super::disk::Crash;
use super::host::{Host, Shell, host_number};
use super::mirror::Mirror;
use super::world::{Event, World};
use blockmirror_protocol::handover::End;
use blockmirror_protocol::lineage::{self, Relation};
use blockmirror_protocol::replica::promotion;
use blockmirror_protocol::terms::{Claim, DataState, Fence};
use blockmirror_protocol::units::GenerationId;
use std::time::Duration;

/// How long operators look for one primary that everybody can follow.
const AGREEING: Duration = Duration::from_secs(400);
/// How much happens until they look again.
const STEPS: u32 = 16;
impl World {
    /// Another host was promoted with this fence: no write is taken any more (L5). The applications close the device
    /// some time later.
    pub(super) fn supersede(&mut self, host: usize, fence: Fence) {
        let now = self.clock(host);
        let outage = self.settings.outage;
        let delay = self.random.up_to(outage);
        let it = &mut self.hosts[host];
        let life = it.life;
        if it.demotion.is_some() {
            return self.superseded_amid_demotion(host, fence);
        }
        if !it.superseded.is_none_or(|known| fence.supersedes(known)) {
            return;
        }
        let Some(tracker) = it.tracker_mut() else { return };
        tracker.supersede(now);
        it.superseded = Some(fence);
        self.note(|| format!("host {host} is superseded by {fence:?}"));
        self.plan(delay, Event::StepDown(host, life));
    }

    /// A primary that is superseded becomes a replica.
    pub(super) fn step_down_if_superseded(&mut self, host: usize, life: u64) {
        let number = self.next_operation();
        if self.state_is_out(host) {
            // It takes no writes; it becomes a replica when it can record that.
            let delay = self.hosts[host].state_is_out_until() - self.now;
            return self.plan(delay, Event::StepDown(host, life));
        }
        let it = &self.hosts[host];
        let (Some(fence), true, Some(tracker)) = (it.superseded, it.life == life, it.tracker()) else {
            return self.go_on_demoting();
        };
        let end = End::superseded(tracker, it.superblock.fence, fence);
        let own = end.needs_generation().then(|| generation(host, number));
        self.crash(host, Crash::Process);
        self.hosts[host].recover_superblock();
        self.record_demotion(host, end, own);
        self.note(|| format!("host {host} has stepped down"));
        self.start(host);
    }

    /// The superblock says that the host is a replica.
    pub(super) fn record_demotion(&mut self, host: usize, end: End, own: Option<GenerationId>) {
        let it = &mut self.hosts[host];
        if let Some(own) = own {
            self.generations.begin(own, &it.superblock.lineage, None);
        }
        end.record(&mut it.superblock, own);
        it.write_superblock_now();
        it.mirror = match it.superblock.data {
            DataState::Consistent => Mirror::of_primary(&it.disk, &it.promises),
            // What is absent there is what the disk holds from now on, whatever that is.
            _ => Mirror::of_mixture(),
        };
        it.disk.forget_truth();
        self.differences.forget(host);
    }

    /// Operators see to it that there is one primary that everybody can follow.
    ///
    /// # Panics
    /// When that takes too long.
    pub(super) fn agree_on_primary(&mut self) {
        let end = self.now + AGREEING;
        while !self.is_agreed() {
            // What they have done takes its time.
            for _ in 0..STEPS {
                assert!(self.step(end), "operators find no primary to follow: {}", self.describe());
            }
        }
    }

    /// Whether there is one primary that everybody can follow; if not, operators do something about it.
    pub(super) fn is_agreed(&mut self) -> bool {
        let is_steady = |host: &Host| {
            let is_open = matches!(host.shell, Shell::Primary(_) | Shell::Replica(_));
            is_open
                && !host.is_held
                && !host.has_failed()
                && host.demotion.is_none()
                && host.superseded.is_none()
        };
        if !self.hosts.iter().all(is_steady) {
            return false;
        }
        let primaries = self.primaries();
        let fence_of = |host: usize| self.hosts[host].superblock.fence;
        let newest = primaries
            .iter()
            .copied()
            .reduce(|newest, host| if fence_of(host).supersedes(fence_of(newest)) { host } else { newest });
        let Some(primary) = newest else {
            let can_be = |host: &usize| {
                promotion::must_be_promotable(&self.hosts[*host].superblock).is_ok() && !self.is_liar(*host)
            };
            let candidates: Vec<usize> = (0..self.hosts.len()).filter(can_be).collect();
            let host = self.random.pick(&candidates);
            self.promote(host);
            return false;
        };
        let fence = self.hosts[primary].superblock.fence;
        if let Some(rival) = primaries.into_iter().find(|rival| *rival != primary) {
            // One with a lower fence steps down by itself when the two meet; of rivals, one is demoted.
            if fence.against(self.hosts[rival].superblock.fence) == Claim::Rival {
                self.demote(rival, None);
            }
            return false;
        }
        let mut newer = self.hosts.iter().map(|host| host.superblock.fence);
        if let Some(newer) = newer.find(|newer| fence.against(*newer) == Claim::Older) {
            // It hears so, and steps down. What it was promoted with before it was thrown away, nobody else may tell it:
            // somebody is promoted once more.
            if newer.holder == fence.holder {
                self.demote(primary, None);
            }
            return false;
        }
        let strays: Vec<usize> =
            (0..self.hosts.len()).filter(|host| self.cannot_follow(*host, primary)).collect();
        strays.iter().for_each(|host| self.resolve(*host, primary));
        strays.is_empty()
    }

    /// Whether a host has something that it would lose by following this primary, or refuses it for another reason.
    fn cannot_follow(&self, host: usize, primary: usize) -> bool {
        let (it, leader) = (&self.hosts[host].superblock, &self.hosts[primary].superblock);
        if host == primary || it.data == DataState::Empty || it.lineage.is_empty() {
            return host != primary && leader.fence.is_refused_by(it.fence);
        }
        let relation = lineage::relation(self.hosts[primary].known_lineage(), &it.lineage);
        !matches!(relation, Relation::Same | Relation::MineIsNewer)
            || leader.fence.is_refused_by(it.fence)
            || self.is_beyond(host, primary)
    }

    /// Whether a replica has what its primary lacks, because that was set back (X4).
    fn is_beyond(&self, host: usize, primary: usize) -> bool {
        self.hosts[primary].superblock.ends.lacks(self.hosts[host].mark().position)
    }

    /// No fence belongs to two hosts that take writes, and nobody follows two hosts of one fence (L5).
    pub(super) fn check_fences(&self) {
        let mut holders = Vec::new();
        for host in self.hosts.iter().filter(|host| host.tracker().is_some() && host.superseded.is_none()) {
            let fence = host.superblock.fence;
            assert_eq!(
                host_number(fence.holder),
                host.number,
                "L5: host {} writes by another's fence",
                host.number
            );
            assert!(!holders.contains(&fence), "L5: two hosts write by the fence {fence:?}");
            holders.push(fence);
        }
    }
}

/// A generation's name.
pub(super) fn generation(host: usize, number: u64) -> GenerationId {
    let mut generation = GenerationId([host as u8; 16]);
    generation.0[..8].copy_from_slice(&number.to_le_bytes());
    generation
}
