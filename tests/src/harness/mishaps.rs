//! What goes wrong.

use super::disk::Crash;
use super::host::{Shell, host_id};
use super::links::LinkId;

use super::world::{Event, World};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::terms::Mode;
use blockmirror_protocol::tracker::Tracker;
use blockmirror_protocol::tracker::replies::ReplicaLoss;
use blockmirror_protocol::units::SECTOR_BYTES;
use std::time::Duration;

/// How long a link stalls at most, as often as the longest outage.
const STALL_OUTAGES: u32 = 20;
/// How long a demotion takes when nothing is in its way.
const RELEASED: Duration = Duration::from_millis(1100);

impl World {
    /// Lets something go wrong, and plans the next time.
    pub(super) fn next_mishap(&mut self) {
        let Some(pause) = self.settings.mishaps.filter(|_| self.is_rough) else { return };
        let pause = self.random.up_to(pause);
        self.plan(pause, Event::Mishap);
        let primaries: Vec<usize> =
            (0..self.hosts.len()).filter(|host| self.hosts[*host].is_primary()).collect();
        if primaries.is_empty() || self.settings.has_operators && self.random.once_in(6) {
            return self.change_roles(&primaries);
        }
        let primary = self.random.pick(&primaries);
        let links: Vec<LinkId> = self.links.of_dialler(primary).collect();
        let link = self.random.pick(&links);
        let crash = self.random.pick(&[Crash::Process, Crash::Power]);
        // What was promised to a promoted copy that was set back, nobody can know.
        if !self.settings.has_operators && self.random.once_in(self.settings.set_backs) {
            let host = self.random.pick(&[primary, link.listener]);
            return self.set_back(host);
        }
        if self.random.once_in(self.settings.hangs) {
            return self.hang(primary, link.listener);
        }
        if self.random.once_in(20) {
            let host = self.random.pick(&[primary, link.listener]);
            return self.freeze(host);
        }
        if self.random.once_in(self.settings.disk_losses) {
            return self.lose_disk(primary, link.listener);
        }
        let rebuild = self.hosts[primary].tracker().and_then(Tracker::rebuild);
        if self.settings.rebuilds && self.random.once_in(if rebuild.is_some() { 3 } else { 12 }) {
            return self.go_on_elsewhere(primary);
        }
        if self.settings.members_change && self.random.once_in(8) {
            return self.change_members(primary);
        }
        if self.settings.choices_change && self.random.once_in(6) {
            return self.change_choices();
        }
        if self.settings.state_failures && self.random.once_in(12) {
            let host = self.random.pick(&[primary, link.listener]);
            return self.fail_state(host);
        }
        if self.settings.has_operators && self.random.once_in(10) {
            return self.isolate(link);
        }
        if self.random.once_in(self.settings.sleeps) {
            return self.sleep_apart(link);
        }
        if self.settings.has_operators && self.random.once_in(self.settings.returns) {
            return self.return_alone(link);
        }
        match self.random.below(if self.settings.bad_sectors { 20 } else { 16 }) {
            0..=3 => self.cut(link),
            4..=6 => self.take_down(link.listener, crash),
            7..=10 => self.take_down(primary, crash),
            11 => {
                self.take_down(link.listener, crash);
                self.take_down(primary, crash);
            }
            12 => self.stall(link),
            13 => self.make_room(),
            14 if self.random.once_in(3) => self.cancel_compare(link),
            14 => self.begin_compare(link),
            16.. => {
                let host = self.random.pick(&[primary, link.listener]);
                self.spoil(host);
            }
            _ => {
                let host = link.listener;
                if self.random.once_in(3) && self.hosts[host].is_up() && !self.is_source(host) {
                    self.replace(host);
                }
            }
        }
    }

    /// The operators change a mode, or what happens while a host is lost.
    fn change_choices(&mut self) {
        let (mut loss, mut modes) = (self.settings.loss, self.settings.modes.clone());
        if self.random.once_in(2) {
            let limit = Duration::from_millis(100);
            let waits = |min_replicas| ReplicaLoss::Block { min_replicas, limit };
            loss = self.random.pick(&[ReplicaLoss::Continue, waits(1), waits(2)]);
        } else {
            let host = self.random.below(modes.len() as u64) as usize;
            modes[host] = self.random.pick(&[Mode::Async, Mode::SemiSync, Mode::Sync]);
        }
        self.choose(loss, modes);
    }

    /// What happens while a host is lost, and the hosts' modes, are these for all primaries from now on, later ones included.
    pub fn choose(&mut self, loss: ReplicaLoss, modes: Vec<Mode>) {
        self.note(|| format!("the operators choose {loss:?} and {modes:?}"));
        let by_host: Vec<_> = modes.iter().enumerate().map(|(host, mode)| (host_id(host), *mode)).collect();
        (self.settings.loss, self.settings.modes) = (loss, modes);
        for primary in self.primaries() {
            let now = self.clock(primary);
            let tracker = self.hosts[primary].tracker_mut().expect("it is primary");
            tracker.configure(&by_host, loss, now);
        }
        self.act();
    }

    /// Operators change roles, wisely or not.
    fn change_roles(&mut self, primaries: &[usize]) {
        let hosts: Vec<usize> = (0..self.hosts.len()).collect();
        let host = self.random.pick(&hosts);
        match (primaries.first(), self.random.below(6)) {
            (_, 5) => {
                let keep = self.random.pick(&hosts);
                self.resolve(host, keep);
            }
            (_, 3) => drop(self.undo(host)),
            (_, 4) => self.forget(host),
            (Some(primary), 0) => self.demote(*primary, None),
            (Some(primary), 1) if *primary != host => self.demote(*primary, Some(host)),
            _ if self.random.once_in(2) => self.promote_by_rule(host),
            _ => self.promote(host),
        }
    }

    /// The operators make room for pre-images, wherever a replica waits for it.
    pub(super) fn make_room(&mut self) {
        for host in &mut self.hosts {
            if let Shell::Replica(shell) = &mut host.shell {
                shell.machine.handle_room(self.settings.space);
            }
        }
    }

    /// A sector of a host's disk goes bad: one that was written, where there is any. What a primary can't read stays uncopied
    /// until it is written.
    fn spoil(&mut self, host: usize) {
        if !matches!(self.hosts[host].shell, Shell::Replica(_) | Shell::Primary(_)) {
            return;
        }
        let written: Vec<u64> = self.hosts[host].disk.content().keys().copied().collect();
        let sector = match written.is_empty() {
            true => self.random.below(self.settings.size_bytes / SECTOR_BYTES),
            false => self.random.pick(&written),
        };
        let range = ByteRange::new(sector * SECTOR_BYTES, SECTOR_BYTES);
        if range.widened(self.settings.sector_bytes[host]).end() > self.settings.size_bytes {
            // No disk ends within a physical sector.
            return;
        }
        self.note(|| format!("sector {sector} of host {host} goes bad"));
        self.hosts[host].disk.spoil(sector);
    }

    /// A primary and a replica don't reach each other for a while, and an operator wants to promote the replica meanwhile.
    fn isolate(&mut self, link: LinkId) {
        let time = self.random.up_to(self.settings.patience * 2);
        let life = self.hosts[link.listener].life;
        self.note(|| format!("link {link} is dead for {time:?}"));
        self.cut(link);
        for link in [link, LinkId::new(link.listener, link.dialler)] {
            self.links[link].stalled_until = self.now + time;
        }
        let wait = self.random.up_to(time);
        self.plan(wait, Event::PromoteByRule(link.listener, life));
        if self.settings.choices_change {
            // The replica hears nothing of it.
            self.change_choices();
        }
        let others: Vec<usize> =
            (0..self.hosts.len()).filter(|host| ![link.dialler, link.listener].contains(host)).collect();
        if self.settings.disk_losses > 0 && !others.is_empty() && self.random.once_in(2) {
            let third = self.random.pick(&others);
            self.plan(wait * 9 / 10, Event::LoseTwo([link.dialler, third], link.listener, life));
        }
        let is_peer = self.hosts[link.dialler].members.contains(link.listener);
        if self.settings.members_change && is_peer && self.random.once_in(2) {
            // Another operator thinks that it is gone for good; and at times its own one thinks so of that one.
            self.remove_member(link.dialler, link.listener);
            if self.hosts[link.listener].is_up() && self.random.once_in(2) {
                self.remove_member(link.listener, link.dialler);
                self.plan(wait, Event::Promote(link.listener, life));
            }
        }
    }

    /// A primary and a replica don't reach each other for a while, and one of them is suspended for some of it. An operator wants
    /// to promote the replica before they do again.
    fn sleep_apart(&mut self, link: LinkId) {
        let host = self.random.pick(&[link.dialler, link.listener, link.listener]);
        let patience = self.settings.patience;
        let (before, after) = (self.random.up_to(patience / 4), self.random.up_to(patience / 2));
        let sleep = patience + self.random.up_to(patience);
        self.note(|| format!("link {link} is dead for {:?}", before + sleep + after));
        self.cut(link);
        for link in [link, LinkId::new(link.listener, link.dialler)] {
            self.links[link].stalled_until = self.now + before + sleep + after;
        }
        let life = self.hosts[host].life;
        self.plan(before, Event::Sleep(host, life, sleep));
        let (wait, life) = (self.random.up_to(after), self.hosts[link.listener].life);
        self.plan(before + sleep + wait, Event::PromoteByRule(link.listener, life));
    }

    /// A primary is demoted and promoted again, with or without force, and from then on reaches nobody. An operator wants to
    /// promote a replica later.
    fn return_alone(&mut self, link: LinkId) {
        self.demote(link.dialler, None);
        let wait = self.random.up_to(self.settings.outage);
        self.plan(RELEASED + wait, Event::ReturnAlone(link));
    }

    /// It goes on when the primary is a replica.
    pub(super) fn has_returned(&mut self, link: LinkId) {
        let (host, replica) = (link.dialler, link.listener);
        if !self.is_rough || self.primaries().contains(&host) {
            return;
        }
        match self.random.once_in(3) {
            true => self.promote(host),
            false => self.promote_by_rule(host),
        }
        let time = self.settings.outage * STALL_OUTAGES;
        self.note(|| format!("host {host} is alone for {time:?}"));
        for other in (0..self.hosts.len()).filter(|other| *other != host) {
            for link in [LinkId::new(host, other), LinkId::new(other, host)] {
                self.cut(link);
                self.links[link].stalled_until = self.now + time;
            }
        }
        if !self.random.once_in(3) {
            let wait = self.random.up_to(self.settings.outage);
            self.plan(wait, Event::Restart(host));
        }
        let life = self.hosts[replica].life;
        let wait = self.random.up_to(time);
        self.plan(wait, Event::PromoteByRule(replica, life));
    }

    /// An operator goes on with another host than the primary, which may not hear of it for a while; and loses that one's disk.
    fn go_on_elsewhere(&mut self, primary: usize) {
        let hosts: Vec<usize> = (0..self.hosts.len()).collect();
        let host = self.random.pick(&hosts);
        let by_rule = self.random.once_in(2);
        if self.random.once_in(2) {
            self.take_down(primary, Crash::Process);
        }
        match by_rule {
            true => self.promote_by_rule(host),
            false => self.promote(host),
        }
        let source = self.random.pick(&hosts);
        if source != host && source != primary {
            let (wait, life) = (self.random.up_to(self.settings.outage), self.hosts[source].life);
            self.plan(wait, Event::Recover(host, source, life));
        }
    }

    /// The disk of a primary or of a replica is lost, and recovered from any other host.
    fn lose_disk(&mut self, primary: usize, replica: usize) {
        let host = match self.settings.rebuilds && self.is_source(replica) {
            true => primary,
            false => self.random.pick(&[primary, replica]),
        };
        let others: Vec<usize> = (0..self.hosts.len()).filter(|other| *other != host).collect();
        let source = self.random.pick(&others);
        let life = self.hosts[source].life;
        self.recover(host, source, life);
    }

    /// The power of a primary is lost and the disk of one that it went on with, which is recovered from a host, in this life,
    /// that was out of their reach; an operator wants to promote that one then.
    pub(super) fn lose_two(&mut self, [primary, third]: [usize; 2], host: usize, life: u64) {
        if !self.is_rough || !self.hosts[primary].is_primary() {
            return;
        }
        self.take_down(primary, Crash::Power);
        self.recover(third, host, life);
        let wait = self.random.up_to(self.settings.outage);
        self.plan(wait, Event::PromoteByRule(host, life));
    }

    fn stall(&mut self, link: LinkId) {
        let until = self.now + self.random.up_to(self.settings.outage * STALL_OUTAGES);
        self.note(|| format!("link {link} stalls until {until:?}"));
        self.links[link].stalled_until = until;
    }
}
