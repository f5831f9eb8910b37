//! Disks and state folders that hang, for longer than any deadline between hosts (D4, X5): what is asked of them is neither done nor
//! refused, and then it is done late, or fails. At times the host loses power meanwhile, and of what was under way any part is there.
//!
//! What was promised holds all the time, and nobody else waits: a request on a primary whose own disks answer is answered when the
//! deadlines have passed, a replica that hangs is not said to be in sync beyond its deadline, no write begins whose record hangs,
//! and no replica tells of a marker that its state folder does not hold.

use super::disk::{Crash, DiskOperation};
use super::files::FileOperation;
use super::host::{Host, host_number};
use super::links::LinkId;
use super::world::{Event, World};
use blockmirror_protocol::disk::activity_log::Recovered;
use blockmirror_protocol::lineage;
use blockmirror_protocol::peer::{ACKNOWLEDGEMENT_DEADLINE, ReplicaState};
use blockmirror_protocol::planted::{Bug, planted};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::tracker::replies::ReplicaLoss;
use blockmirror_protocol::units::Mark;
use std::collections::BTreeSet;
use std::time::Duration;

/// How long something hangs at most: for about an outage, for longer than deadlines, and for longer than all of them together.
const LONGEST: [Duration; 3] = [Duration::from_millis(500), Duration::from_secs(12), Duration::from_secs(60)];
/// How long until what hangs is looked at again, at most.
const LOOK: Duration = Duration::from_millis(250);
/// How much longer than all deadlines a request may take, for what its own disk takes.
const SLACK: Duration = Duration::from_secs(3);

/// What hangs on a host.
#[derive(Debug, Default)]
pub struct Hangs {
    disk_until: Duration,
    state_until: Duration,
    /// Whether what hung has failed, when it ends.
    fails: bool,
    disk_operations: BTreeSet<DiskOperation>,
    file_operations: BTreeSet<FileOperation>,
}

impl Hangs {
    /// A crash ends whatever was under way.
    pub(super) fn crash(&mut self) {
        self.disk_operations.clear();
        self.file_operations.clear();
    }

    /// Nothing hangs for longer.
    pub(super) fn end(&mut self, now: Duration) {
        (self.disk_until, self.state_until) = (self.disk_until.min(now), self.state_until.min(now));
    }

    /// Whether an operation of the disk fails because it hung.
    pub(super) fn disk_has_failed(&mut self, id: DiskOperation) -> bool {
        self.disk_operations.remove(&id) && self.fails
    }

    /// The same for a write of metadata.
    pub(super) fn file_has_failed(&mut self, id: FileOperation) -> bool {
        self.file_operations.remove(&id) && self.fails
    }
}

impl Host {
    /// Until when its state folder neither takes nor gives anything.
    pub(super) fn state_is_out_until(&self) -> Duration {
        self.state_fails_until.max(self.hangs.state_until)
    }
}

impl World {
    /// The disk of a primary or of a replica hangs, its state folder, or both: they may be on one disk.
    pub(super) fn hang(&mut self, primary: usize, replica: usize) {
        let host = self.random.pick(&[primary, replica, replica]);
        let longest = self.random.pick(&LONGEST);
        let until = self.now + self.random.up_to(longest) + Duration::from_millis(1);
        let (disk, state) = self.random.pick(&[(true, false), (false, true), (true, true)]);
        let fails = self.random.once_in(3);
        self.note(|| format!("host {host} hangs until {until:?}: disk {disk}, state {state}, fails {fails}"));
        let it = &mut self.hosts[host];
        it.hangs.fails = fails;
        if disk {
            it.hangs.disk_until = until;
        }
        if state {
            it.hangs.state_until = until;
        }
        let life = it.life;
        // A demotion goes on then.
        self.plan_at(until, Event::StepDown(host, life));
        if self.random.once_in(4) {
            let wait = self.random.up_to(until - self.now);
            let crash = self.random.pick(&[Crash::Power, Crash::Power, Crash::Process]);
            self.plan(wait, Event::Crash(host, life, crash));
        }
    }

    /// A host crashes, if it lives still.
    pub(super) fn crash_amid(&mut self, host: usize, life: u64, crash: Crash) {
        if self.is_rough && self.hosts[host].life == life && self.hosts[host].is_up() {
            self.take_down(host, crash);
        }
    }

    /// Whether nothing can be read from a host's state folder just now.
    pub(super) fn state_hangs(&self, host: usize) -> bool {
        self.hosts[host].hangs.state_until > self.now
    }

    /// When an operation that hangs goes on.
    pub(super) fn is_hung(&mut self, event: &Event) -> Option<Duration> {
        let (until, host) = match event {
            Event::Disk(host, id) => {
                let hangs = &mut self.hosts[*host].hangs;
                if hangs.disk_until <= self.now {
                    return None;
                }
                hangs.disk_operations.insert(*id);
                (hangs.disk_until, *host)
            }
            Event::File(host, id) => {
                let hangs = &mut self.hosts[*host].hangs;
                if hangs.state_until <= self.now || planted(Bug::TakeHungForDone) {
                    return None;
                }
                hangs.file_operations.insert(*id);
                (hangs.state_until, *host)
            }
            _ => return None,
        };
        // It is looked at again before, where everything is to come to rest. What hung together does not end in its old order.
        let delay = self.random.up_to(self.settings.disk_delay[host]);
        Some(until.min(self.now + LOOK) + delay)
    }
}

impl World {
    /// What is checked after every step where anything hangs.
    ///
    /// # Panics
    /// When anything is not as it must be.
    pub(super) fn check_hanging(&self, host: usize) {
        if self.settings.hangs == 0 {
            return;
        }
        self.check_answered_in_time(host);
        self.check_in_sync_in_time(host);
    }

    /// Whatever hangs on other hosts, a request is answered when the deadlines have passed (W7, X5).
    fn check_answered_in_time(&self, host: usize) {
        let it = &self.hosts[host];
        if it.tracker().is_none() {
            return;
        }
        let is_ending = it.superseded.is_some() || it.demotion.is_some() || it.has_failed();
        let Some((id, sent)) = it.application.waiting.first_key_value() else { return };
        if is_ending {
            return;
        }
        let limit = match self.settings.loss {
            ReplicaLoss::Block { limit, .. } => limit,
            ReplicaLoss::Continue => Duration::ZERO,
        };
        let deadlines = ACKNOWLEDGEMENT_DEADLINE + self.settings.patience + limit;
        let own = it.hangs.disk_until.max(it.state_is_out_until()).max(it.frozen_until);
        let since = own.max(*sent).max(it.waited_at);
        assert!(
            self.now <= since + deadlines + SLACK,
            "W7: request {} waits since {sent:?}, and nothing has hung on host {host} since {own:?}: {}",
            id.0,
            self.describe()
        );
    }

    /// A replica that acknowledges nothing is not said to be in sync beyond its deadline (D4).
    fn check_in_sync_in_time(&self, host: usize) {
        let Some(tracker) = self.hosts[host].tracker() else { return };
        let in_sync =
            tracker.reports(self.clock(host)).filter(|(_, report)| report.state == ReplicaState::InSync);
        for link in in_sync.map(|(peer, _)| LinkId::new(host, host_number(peer))) {
            let oldest = self.links[link].unacknowledged.front();
            assert!(
                oldest.is_none_or(|(_, sent)| self.now <= *sent + ACKNOWLEDGEMENT_DEADLINE),
                "D4: over {link} all is said to be in sync, and {oldest:?} is not acknowledged"
            );
        }
    }

    /// A write begins on a primary: its extents are in the log that a crash would leave, whatever hangs (W2).
    pub(super) fn check_recorded(&self, host: usize, range: ByteRange) {
        if self.settings.hangs == 0 {
            return;
        }
        if let Recovered::Active { extents, .. } = self.hosts[host].recover_log() {
            let is_recorded = range.extents().all(|extent| extents.contains(&extent));
            assert!(is_recorded, "W2: {range:?} is written on host {host}, and its record is not durable");
        }
    }

    /// What a replica says to be durable here is in its state folder: one that comes back with less would be taken for one that
    /// was set back (P3, X4).
    pub(super) fn check_marked(&self, host: usize, told: Mark) {
        let it = &self.hosts[host];
        if self.settings.hangs > 0 {
            let found = it.mark();
            assert!(
                !lineage::went_back(&it.superblock.lineage, found, told),
                "P3: host {host} tells of {told:?}, and its files say {found:?}"
            );
        }
    }
}
