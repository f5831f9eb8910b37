//! Coming to rest: nothing goes wrong any more, everything is brought into sync, compared, and closed.

use super::application::PATIENCE;
use super::disk::Crash;
use super::host::{Shell, host_id, host_number};
use super::links::LinkId;
use super::world::{Event, World};
use blockmirror_protocol::disk::activity_log::Recovered;
use blockmirror_protocol::peer::ReplicaState;
use blockmirror_protocol::tracker::Work;
use std::collections::BTreeSet;
use std::fmt::Write;
use std::time::Duration;

/// How long the hosts have to come to rest once nothing goes wrong any more.
pub(super) const SETTLING: Duration = Duration::from_secs(400);
/// How many sectors that can't be read are overwritten at a time, at most.
const OVERWRITTEN: usize = 8;
/// How long closing may take.
const CLOSING: Duration = Duration::from_secs(80);

impl World {
    /// Ends all mishaps and requests, and waits until every replica is in sync.
    ///
    /// # Panics
    /// When that takes too long.
    pub fn settle(&mut self) {
        (self.is_rough, self.is_busy) = (false, false);
        for host in &mut self.hosts {
            host.state_fails_until = host.state_fails_until.min(self.now);
            host.hangs.end(self.now);
        }
        self.end_stalls();
        let end = self.now + SETTLING;
        self.reunite();
        self.make_room();
        self.come_to_rest(end);
    }

    /// No link stalls any more: what is on its way comes now, in the order in which it was sent.
    fn end_stalls(&mut self) {
        let now = self.now;
        let stalled: BTreeSet<_> =
            self.links.ids().filter(|link| self.links[*link].stalled_until > now).collect();
        self.bring_forward(|event| matches!(event, Event::Arrival(link, ..) if stalled.contains(link)));
        for link in self.links.ids() {
            self.links[link].stalled_until = now;
        }
    }

    /// An operator has second thoughts about what was given up, and then decides for one of the two again.
    ///
    /// # Panics
    /// When coming to rest takes too long.
    pub(super) fn think_again(&mut self) {
        let undone: Vec<usize> = (0..self.hosts.len()).filter(|host| self.undo(*host)).collect();
        let end = self.now + SETTLING;
        while self.hosts.iter().any(|host| matches!(host.shell, Shell::Rewriting(_))) {
            assert!(self.step(end), "an undo does not end: {}", self.describe());
        }
        if !undone.is_empty() {
            let host = self.random.pick(&undone);
            if self.random.once_in(2) {
                self.promote(host);
            }
            self.come_to_rest(self.now + SETTLING);
        }
    }

    fn come_to_rest(&mut self, end: Duration) {
        self.agree_on_primary();
        while !self.is_settled() {
            assert!(self.step(end), "R2: the hosts do not come to rest: {}", self.describe());
            if self.steps.is_multiple_of(64) {
                // What was being recorded may have made two hosts' histories part.
                self.is_agreed();
                self.overwrite_unreadable();
                self.relent();
            }
        }
        self.check_at_rest();
    }

    /// Applications write to what primaries can't read: only that heals it.
    fn overwrite_unreadable(&mut self) {
        for host in self.primaries() {
            let it = &self.hosts[host];
            if it.superseded.is_some() || it.demotion.is_some() || !it.application.waiting.is_empty() {
                continue;
            }
            for range in it.disk.unreadable(OVERWRITTEN) {
                self.ask(host, Work::Write { range, fua: false });
            }
        }
    }

    /// Compares every primary with every replica through the machines themselves; nothing may differ.
    ///
    /// # Panics
    /// When something does, or a compare does not end.
    pub fn compare_all(&mut self) {
        // What can't be read differs.
        self.hosts.iter_mut().for_each(|host| host.disk.heal());
        for link in self.replicating() {
            self.begin_compare(link);
        }
        let end = self.now + PATIENCE * 20;
        while self.is_comparing() {
            assert!(self.step(end), "a compare does not end: {}", self.describe());
        }
    }

    /// The operator interrupts a compare over a link.
    pub fn cancel_compare(&mut self, link: LinkId) {
        if let Some(tracker) = self.hosts[link.dialler].tracker_mut() {
            tracker.cancel_compare(host_id(link.listener));
            self.note(|| format!("the compare over {link} is interrupted"));
        }
    }

    /// Begins a compare over a link.
    pub fn begin_compare(&mut self, link: LinkId) {
        let now = self.clock(link.dialler);
        if let Some(tracker) = self.hosts[link.dialler].tracker_mut() {
            let began = tracker.begin_compare(host_id(link.listener), now);
            self.note(|| format!("compare over {link}: {began}"));
            self.act();
        }
    }

    /// Closes the volume on every primary, and checks that nothing is left to do after a power loss.
    ///
    /// # Panics
    /// When closing does not end, or leaves anything.
    pub fn close(&mut self) {
        let primaries = self.primaries();
        for host in &primaries {
            let now = self.clock(*host);
            self.hosts[*host].tracker_mut().expect("it is primary").close(now);
        }
        self.act();
        let end = self.now + CLOSING;
        for host in primaries {
            while !self.hosts[host].tracker().is_some_and(|tracker| tracker.is_closed()) {
                assert!(self.step(end), "closing does not end: {}", self.describe());
            }
            self.check_closed(host);
        }
    }

    /// How things stand, for messages.
    #[must_use]
    pub fn describe(&self) -> String {
        let mut text = format!("at {:?}", self.now);
        for host in &self.hosts {
            let now = self.clock(host.number);
            let waiting = host.application.waiting.len();
            let _ = write!(text, "; host {}: {waiting} wait", host.number);
            match &host.shell {
                Shell::Down => text.push_str(", down"),
                Shell::Rewriting(_) => text.push_str(", being rewritten"),
                Shell::Replica(shell) => {
                    let _ = write!(text, ", {:?}, failed {}", shell.machine.report(), host.has_failed());
                }
                Shell::Primary(shell) => {
                    let _ = write!(text, ", failed {}", host.has_failed());
                    for (_, report) in shell.tracker.reports(now) {
                        let (bytes, lag) = (report.out_of_sync_bytes, report.lag_bytes);
                        let _ = write!(text, ", {:?} {:?} {bytes} {lag}", report.connection, report.state);
                    }
                }
            }
        }
        text
    }

    /// The links from primaries that run to all others.
    pub(super) fn replicating(&self) -> Vec<LinkId> {
        self.primaries().into_iter().flat_map(|host| self.links.of_dialler(host)).collect()
    }

    fn is_comparing(&self) -> bool {
        self.replicating().into_iter().any(|link| {
            let tracker = self.hosts[link.dialler].tracker();
            tracker.is_some_and(|tracker| tracker.is_comparing(host_id(link.listener)))
        })
    }

    /// Whether every request is answered, every replica in sync and every disk idle.
    fn is_settled(&self) -> bool {
        self.hosts.iter().all(|host| {
            let now = self.clock(host.number);
            let is_in_sync = host.tracker().is_none_or(|tracker| {
                let mut reports = tracker.reports(now);
                reports.all(|(peer, report)| {
                    // A host may have crashed without the primary's knowing.
                    let is_up = self.links[LinkId::new(host.number, host_number(peer))].is_up;
                    is_up && report.state == ReplicaState::InSync && report.out_of_sync_bytes == 0
                })
            });
            let is_at_rest = host.is_idle() && host.application.waiting.is_empty();
            host.is_up() && !host.has_failed() && is_at_rest && is_in_sync
        })
    }

    /// Nothing is under way and all copies are equal.
    fn check_at_rest(&mut self) {
        for host in 0..self.hosts.len() {
            self.check_disk(host);
            match &self.hosts[host].shell {
                Shell::Down | Shell::Rewriting(_) => panic!("every host is up"),
                Shell::Replica(shell) => {
                    assert_eq!(shell.held_payloads(), 0, "every payload is dropped or written");
                }
                Shell::Primary(shell) => {
                    assert_eq!(shell.held_copies(), 0, "every read for a copy is sent or dropped");
                }
            }
        }
        for link in self.replicating() {
            if self.is_liar(link.listener) || self.is_liar(link.dialler) {
                continue;
            }
            self.check_equal(link);
            self.check_word(link);
        }
    }

    /// A primary knows whether a replica counts on its word for ever, whatever operators chose while that was on its way (W4).
    fn check_word(&self, link: LinkId) {
        let given = &self.hosts[link.listener].superblock.given;
        let is_known = self.report(link).is_promised == given.is_for_ever();
        assert!(is_known, "W4: over {link} the replica counts on {given:?}, and its primary does not know");
    }

    /// A primary that was closed left nothing to do.
    fn check_closed(&mut self, host: usize) {
        assert!(self.hosts[host].disk.is_durable(), "closing makes everything durable");
        self.crash(host, Crash::Power);
        self.check_recovered(host);
        let log = self.hosts[host].recover_log();
        assert!(
            matches!(&log, Recovered::Active { extents, .. } if extents.is_empty()) || self.settings.rots > 0,
            "closing leaves an empty log, not {log:?}"
        );
        for link in self.links.of_dialler(host) {
            let map = self.hosts[host].recover_map(link.listener);
            assert!(map.is_clean(), "closing leaves the maps as they are");
        }
    }
}
