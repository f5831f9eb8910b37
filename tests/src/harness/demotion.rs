//! Operators demote primaries and switch ([`blockmirror_protocol::handover`]). What one host says to the other is late, lost
//! or not answered; what was not answered may arrive all the same.

use super::disk::Crash;
use super::host::{Host, Shell, host_id, host_number};
use super::roles::generation;
use super::world::{Event, World};
use blockmirror_protocol::handover::{self, End, Event as Came, Handover, Outcome, Step};
use blockmirror_protocol::succession::{self, Decision};
use blockmirror_protocol::terms::Fence;
use blockmirror_protocol::units::HostId;
use std::time::Duration;

/// How long a demotion waits until all is durable, and for replicas to record that they have everything, at most.
const CLOSE: Duration = Duration::from_secs(60);
const RELEASE: Duration = Duration::from_secs(1);
/// How long it takes at most until it is looked again whether a host has become the primary.
const LOOK: Duration = Duration::from_millis(50);

/// A primary that is being demoted, or was and does not know yet whether another one took over.
#[derive(Debug)]
pub struct Demotion {
    handover: Handover,
    /// When what the step waits for is not waited for any longer.
    until: Duration,
    /// Whether another host was asked, which is the step.
    is_asked: bool,
}

impl World {
    /// An operator demotes a primary: its device is closed first.
    pub fn demote(&mut self, host: usize, to: Option<usize>) {
        let (now, clock) = (self.now, self.clock(host));
        let it = &mut self.hosts[host];
        if it.demotion.is_some() || it.superseded.is_some() {
            return;
        }
        let (life, fence) = (it.life, it.superblock.fence);
        let Some(tracker) = it.tracker_mut() else { return };
        if handover::may_begin(tracker, to.map(host_id)).is_err() {
            return;
        }
        tracker.wait_no_more(clock);
        tracker.close(clock);
        let handover = Handover::new(fence, to.map(host_id));
        it.demotion = Some(Demotion { handover, until: now + CLOSE, is_asked: false });
        self.plan(CLOSE, Event::StepDown(host, life));
        self.note(|| format!("host {host} is being demoted for {to:?}"));
    }

    /// Demotions go on where they can.
    pub(super) fn go_on_demoting(&mut self) {
        for host in 0..self.hosts.len() {
            while self.hosts[host].demotion.is_some() && self.go_on_demoting_host(host) {}
        }
    }

    /// Whether a step of a host's demotion has come to its end.
    fn go_on_demoting_host(&mut self, host: usize) -> bool {
        let (now, clock, count) = (self.now, self.clock(host), self.hosts.len());
        let it = &mut self.hosts[host];
        let life = it.life;
        let demotion = it.demotion.as_ref().expect("it is being demoted");
        let is_over = now >= demotion.until;
        let step = demotion.handover.step().map_err(Clone::clone);
        match step {
            Ok(Step::Close) => {
                let is_closed = it.tracker().is_none_or(|tracker| tracker.is_closed());
                if is_closed || is_over {
                    return self.came(host, Came::Closed(is_closed));
                }
            }
            Ok(Step::Record(by)) => {
                // Changes of the superblock are made one after the other.
                let is_recording = matches!(&it.shell, Shell::Primary(shell) if shell.is_recording());
                if now < it.state_is_out_until() || is_recording {
                    return false;
                }
                let tracker = it.tracker().expect("it is not recorded yet");
                let end = match by {
                    Some(fence) => End::superseded(tracker, it.superblock.fence, fence),
                    None => End::in_order(tracker, it.superblock.fence),
                };
                let number = self.next_operation();
                let own = end.needs_generation().then(|| generation(host, number));
                if by.is_some() {
                    self.crash(host, Crash::Process);
                    self.hosts[host].recover_superblock();
                    self.record_demotion(host, end, own);
                    self.note(|| format!("host {host} has stepped down for another promotion"));
                    self.start(host);
                    return false;
                }
                self.record_demotion(host, end, own);
                self.hosts[host].demotion.as_mut().expect("it is being demoted").until = now + RELEASE;
                self.plan(RELEASE, Event::StepDown(host, life));
                return self.came(host, Came::Recorded(true));
            }
            Ok(Step::Release) => {
                let to = demotion.handover.to();
                let tracker = it.tracker_mut().expect("it is closed");
                // Of those that have acknowledged everything by now.
                tracker.release(clock);
                let hosts = (0..count).map(host_id);
                let released: Vec<_> = hosts.filter(|host| tracker.is_released(*host)).collect();
                if is_over || to.is_some_and(|to| released.contains(&to)) {
                    return self.become_replica(host, released);
                }
            }
            Ok(Step::AskAll) => {
                let ours = it.superblock.fence;
                let leads = succession::newest_fence(ours, &self.hear_all(host));
                return self.came(host, Came::Leads(leads));
            }
            Ok(Step::TakeOver(to) | Step::Ask(to)) => {
                let demotion = it.demotion.as_mut().expect("it is being demoted");
                if std::mem::replace(&mut demotion.is_asked, true) {
                    return false;
                }
                let (asks, to) = (matches!(step, Ok(Step::Ask(_))), host_number(to));
                let (outage, is_lost) = (self.settings.outage, self.goes_wrong(6));
                let delay = self.random.up_to(outage);
                if asks {
                    self.plan(delay, Event::Stands(host, to, life));
                    return false;
                }
                // What is not answered in time may arrive all the same.
                if !is_lost {
                    self.plan(delay, Event::TakeOver(host, to, life));
                }
                if self.goes_wrong(3) {
                    let patience = self.random.up_to(outage);
                    self.plan(patience, Event::Came(host, Box::new(Came::Unanswered), life));
                } else if is_lost {
                    self.plan(delay, Event::Came(host, Box::new(Came::Unanswered), life));
                }
            }
            Err(outcome) => {
                self.hosts[host].demotion = None;
                self.demotion_ended(host, outcome);
            }
        }
        false
    }

    /// Something came of the step of a demotion, in that life.
    pub(super) fn came_of_demotion(&mut self, host: usize, came: Came, life: u64) {
        if self.hosts[host].life == life && self.hosts[host].demotion.is_some() {
            self.came(host, came);
            self.go_on_demoting();
        }
    }

    /// A primary that is being demoted hears that another host was promoted with this fence.
    pub(super) fn superseded_amid_demotion(&mut self, host: usize, fence: Fence) {
        let demotion = self.hosts[host].demotion.as_ref().expect("it is being demoted");
        if let Ok(Step::Close | Step::Record(None)) = demotion.handover.step() {
            self.came(host, Came::Superseded(fence));
        }
    }

    /// Whether the demotion of a host has got further by what came of its step.
    fn came(&mut self, host: usize, came: Came) -> bool {
        let demotion = self.hosts[host].demotion.as_mut().expect("it is being demoted");
        let before = demotion.handover.step().ok();
        let is_answer = matches!(before, Some(Step::TakeOver(_) | Step::Ask(_)));
        demotion.handover.handle(came);
        demotion.is_asked &= demotion.handover.step().ok() == before && !is_answer;
        true
    }

    /// The primary is gone, and the host is opened as the replica that its superblock says that it is.
    fn become_replica(&mut self, host: usize, released: Vec<HostId>) -> bool {
        let demotion = self.hosts[host].demotion.take();
        self.crash(host, Crash::Process);
        // At times it can't be recorded.
        if !self.goes_wrong(6) {
            self.hosts[host].recover_superblock();
            self.hosts[host].bequeaths(&released);
        }
        self.note(|| format!("host {host} has stepped down"));
        self.start(host);
        if !self.hosts[host].is_up() {
            // Its agent waits for the state folder, and whoever demoted it hears no more.
            return false;
        }
        self.hosts[host].demotion = demotion;
        self.came(host, Came::Released(released))
    }

    /// How a host that was demoted goes on.
    fn demotion_ended(&mut self, host: usize, outcome: Outcome) {
        self.note(|| format!("the demotion of host {host} ended: {outcome:?}"));
        match outcome {
            Outcome::Undurable | Outcome::Unrecorded => {
                self.crash(host, Crash::Process);
                self.start(host);
            }
            Outcome::GoesOn(_) => {
                let it = &mut self.hosts[host];
                it.went_on_from = Some(it.superblock.fence);
                let decision = Decision { newest: it.superblock.fence, ..Decision::default() };
                (it.decided, it.promoted_after) = (Some(decision), host);
                self.promote(host);
            }
            // The greeting tells it whom it follows.
            Outcome::TakenOver { .. }
            | Outcome::Superseded { .. }
            | Outcome::Demoted(_)
            | Outcome::Unknown => {}
        }
    }

    /// A host hears that the primary was demoted for it.
    pub(super) fn heir_is_told(&mut self, primary: usize, host: usize, life: u64) {
        let fence = self.hosts[host].superblock.fence;
        let others = self.hear_all(host);
        let is_reached = self.reaches(primary, host) && self.hosts[host].members.contains(primary);
        let answer = match &self.hosts[host].shell {
            _ if !is_reached => Some(Came::Unanswered),
            Shell::Primary(_) if self.hosts[host].superseded.is_none() => Some(Came::TookOver(fence)),
            Shell::Primary(_) => Some(Came::Refused),
            Shell::Down | Shell::Rewriting(_) => Some(Came::Unanswered),
            Shell::Replica(_) => {
                let candidate = self.candidate(host).expect("it is a replica");
                let is_heir = candidate.is_heir_of(host_id(primary));
                let decided = candidate.decide_to_succeed(&others).ok().filter(|_| is_heir);
                let is_refused = decided.is_none();
                self.hosts[host].decided = decided;
                is_refused.then_some(Came::Refused)
            }
        };
        if let Some(answer) = answer {
            return self.came_of_demotion(primary, answer, life);
        }
        let it = &mut self.hosts[host];
        it.promoted_after = primary;
        it.takes_over = Some(fence);
        self.note(|| format!("host {host} takes over from {primary}"));
        self.promote(host);
        self.plan(LOOK, Event::TookOver(primary, host, life));
    }

    /// A host that takes over answers once it is the primary.
    pub(super) fn took_over(&mut self, primary: usize, host: usize, life: u64) {
        let it = &self.hosts[host];
        let is_on_its_way = it.is_held || matches!(it.shell, Shell::Rewriting(_));
        if is_on_its_way {
            return self.plan(LOOK, Event::TookOver(primary, host, life));
        }
        let fence = it.superblock.fence;
        let is_lost = !self.reaches(primary, host) || self.goes_wrong(6);
        let came =
            if serves(&self.hosts[host]) && !is_lost { Came::TookOver(fence) } else { Came::Unanswered };
        self.came_of_demotion(primary, came, life);
    }

    /// Whether something does that does so once in so many times.
    fn goes_wrong(&mut self, times: u64) -> bool {
        self.is_rough && self.random.once_in(times)
    }

    /// A host that was demoted asks the one that it was demoted for how it stands.
    pub(super) fn heir_stands(&mut self, host: usize, to: usize, life: u64) {
        let stands = self.hear(host, to).map(Box::new);
        self.came_of_demotion(host, Came::Stands(stands), life);
    }
}

/// Whether a host is a primary that nobody was promoted after.
fn serves(host: &Host) -> bool {
    matches!(host.shell, Shell::Primary(_)) && host.superseded.is_none()
}
