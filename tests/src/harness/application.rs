//! Applications on the primary's device: reads are not needed, since the checks look at the disks.

use super::host::host_id;
use super::promises::Expected;
use super::settings::Settings;
use super::world::{Event, World};
use blockmirror_protocol::lineage::{self, Relation};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::terms::Mode;
use blockmirror_protocol::tracker::replies::ReplicaLoss;
use blockmirror_protocol::tracker::{RequestId, Work};
use std::collections::BTreeMap;
use std::time::Duration;

/// How long any request may take, whatever happens to replicas (W7).
pub const PATIENCE: Duration = Duration::from_secs(60);

/// The applications on one host: what they wait for and have written.
#[derive(Debug, Default)]
pub struct Application {
    /// When each request that waits for its answer was sent.
    pub waiting: BTreeMap<RequestId, Duration>,
    /// How many bytes of blocks were written.
    pub written_bytes: u64,
    /// Whether the next request is planned.
    is_planned: bool,
}

impl World {
    /// Plans the next request on a host, if it is primary and applications are at work.
    pub(super) fn plan_request(&mut self, host: usize) {
        let it = &mut self.hosts[host];
        if self.is_busy && it.is_primary() && !std::mem::replace(&mut it.application.is_planned, true) {
            let pause = self.random.up_to(self.settings.think_time);
            self.plan(pause, Event::Request(host));
        }
    }

    /// Sends the next request, if there is room, and plans the one after.
    pub(super) fn next_request(&mut self, host: usize) {
        self.hosts[host].application.is_planned = false;
        self.plan_request(host);
        let it = &self.hosts[host];
        let is_open = it.demotion.is_none() && it.superseded.is_none();
        let has_room = is_open && it.application.waiting.len() < self.settings.concurrency;
        if self.is_busy && it.tracker().is_some() && has_room {
            self.read_by_chance(host);
            let work = self.random_work();
            self.request(host, work);
        }
    }

    /// Sends a request to a primary.
    pub fn request(&mut self, host: usize, work: Work) -> RequestId {
        self.last_request += 1;
        let number = self.last_request;
        let id = RequestId(number);
        let value = if matches!(work, Work::Zero { .. }) { 0 } else { number };
        self.note(|| format!("request {number}: {work:?}"));
        let now = self.clock(host);
        let it = &mut self.hosts[host];
        it.promises.issue(id, work, value);
        it.application.waiting.insert(id, now.0);
        for other in &mut self.hosts {
            if let Some(expected) = other.expected.as_mut().filter(|expected| expected.primary == host) {
                expected.promises.issue(id, work, value);
                expected.all.issue(id, work, value);
            }
        }
        let it = &mut self.hosts[host];
        if let Work::Write { range, .. } | Work::Zero { range, .. } = work {
            let blocks = range.blocks(self.settings.block_size);
            it.application.written_bytes += (blocks.end - blocks.start) * self.settings.block_size.bytes();
        }
        it.tracker_mut().expect("the host is primary").handle_request(id, work, now);
        id
    }

    /// A request was answered.
    ///
    /// # Panics
    /// When it was answered before, or fails without a failing disk.
    pub(super) fn replied(&mut self, host: usize, id: RequestId, good: bool) {
        self.note(|| format!("reply to {}: {good}", id.0));
        assert!(
            !good || self.hosts[host].doubts.is_empty(),
            "L5: host {host} answers before it knows whether it leads"
        );
        let it = &mut self.hosts[host];
        it.application.waiting.remove(&id).expect("a request is answered once");
        let may_wait =
            matches!(self.settings.loss, ReplicaLoss::Block { .. }) || self.settings.choices_change;
        let Settings { disk_failures, state_failures, bad_sectors, hangs, .. } = self.settings;
        // What waits for others fails when the primary is demoted.
        let is_ending = it.superseded.is_some() || it.demotion.is_some();
        let may_fail = disk_failures > 0
            || state_failures
            || bad_sectors
            || hangs > 0
            || is_ending
            || may_wait
            || self.lies.is_some();
        assert!(
            good || may_fail,
            "a request fails only with a disk, or when another host is or may be promoted"
        );
        let work = it.promises.work(id);
        if good && work != Work::Flush {
            let life = (host, it.life);
            it.known_lives.insert(life);
        }
        it.promises.reply(id, good);
        self.expect(host, id, work, good);
    }

    /// What was answered, replicas that count in sync mode must have too if they are promoted (W4).
    fn expect(&mut self, host: usize, id: RequestId, work: Work, good: bool) {
        let is_flush = work == Work::Flush;
        let honest = |peer: &usize| *peer != host && !self.is_liar(*peer);
        let peers: Vec<usize> = (0..self.hosts.len()).filter(honest).collect();
        for peer in peers {
            let is_sync = self.settings.modes[peer] == Mode::Sync;
            let counts = is_sync
                && self.hosts[host].tracker().is_some_and(|tracker| tracker.is_in_sync(host_id(peer)));
            let promises = &self.hosts[host].promises;
            let fresh = || Expected {
                primary: host,
                promises: promises.clone(),
                all: promises.clone(),
                is_outdated: false,
            };
            // One that was promoted meanwhile, or undone, follows nobody, which this primary may not know.
            let (leader, it) = (&self.hosts[host].superblock, &self.hosts[peer]);
            let relation = lineage::relation(&leader.lineage, &it.superblock.lineage);
            let is_kin = matches!(relation, Relation::Same | Relation::MineIsNewer);
            // Nor has one that was set back or recovered what it has confirmed.
            let follows = is_kin && !it.is_primary() && !it.is_set_back;
            let fresh = (counts && is_flush && good && follows).then(fresh);
            let it = &mut self.hosts[peer];
            if let Some(expected) = it.expected.as_mut().filter(|expected| expected.primary == host) {
                expected.all.reply_known(id, good);
            }
            match it.expected.as_mut().filter(|expected| expected.primary == host) {
                Some(expected) if counts => expected.promises.reply(id, good),
                Some(expected) => expected.promises.reply_without(id, good),
                None if fresh.is_some() => it.expected = fresh,
                None => {}
            }
        }
    }

    fn random_work(&mut self) -> Work {
        let (flushes, zeroes) = (self.settings.flushes, self.settings.zeroes);
        let fua = self.random.once_in(self.settings.durable_writes);
        if self.random.once_in(flushes) {
            Work::Flush
        } else if self.random.once_in(zeroes) {
            let limit = if self.random.once_in(3) { self.settings.size_bytes } else { 256 << 10 };
            Work::Zero { range: self.random_range(limit), may_unmap: self.random.once_in(2), fua }
        } else {
            Work::Write { range: self.random_range(self.settings.write_bytes), fua }
        }
    }

    pub(super) fn random_range(&mut self, longest: u64) -> ByteRange {
        let size = self.settings.size_bytes / 512;
        let at = if self.random.once_in(self.settings.cold_requests) {
            self.random.below(size)
        } else {
            let hot = self.random.pick(&self.settings.hot_spots) / 512;
            (hot + self.random.below(24)).min(size - 1)
        };
        let halvings = self.random.below(5);
        let length = 1 + self.random.below(((longest / 512) >> halvings).max(1));
        ByteRange::new(at * 512, length.min(size - at) * 512)
    }
}
