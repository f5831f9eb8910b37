//! Operators who promote by the rule, not by force: only where what the hosts that can be heard say objects to nothing.
//! Then nothing is lost that was answered ([`Promises::check_known`](super::promises::Promises::check_known)).

use super::host::{Shell, host_id, host_number};
use super::links::LinkId;
use super::world::{Event, World};
use blockmirror_protocol::inquiry::{Inquiry, Known, Next};
use blockmirror_protocol::succession::{self, Candidate, Heard, Objection};
use blockmirror_protocol::wire::message::Standing;
use std::time::Duration;

/// How long an operator waits until what he said is recorded.
const LOOK: Duration = Duration::from_millis(50);

impl World {
    /// An operator promotes a replica, unless the rule objects.
    pub fn promote_by_rule(&mut self, host: usize) {
        if self.hosts[host].members.is_removed() || self.hosts[host].demotion.is_some() {
            return;
        }
        let others = self.hear_all(host);
        let Some(candidate) = self.candidate(host) else { return };
        if candidate.obstacle().is_some() {
            return;
        }
        let decision = match self.inquire(host, false, &others).decide(&candidate, &others) {
            Ok(decision) => decision,
            // He agrees at times, and looks again.
            Err(Objection::Kept) if self.random.once_in(2) => {
                self.forget(host);
                let life = self.hosts[host].life;
                return self.plan(LOOK, Event::PromoteByRule(host, life));
            }
            Err(_) => return,
        };
        self.note(|| format!("host {host} is promoted by the rule: {others:?}"));
        let holder = self.hosts[host].superblock.fence.holder;
        if !holder.is_none() {
            let it = &mut self.hosts[host];
            (it.decided, it.promoted_after) = (Some(decision), host_number(holder));
        }
        self.promote(host);
    }

    /// What is known before a promotion is decided. A connection that is dead is noticed at once or never, so that watching it
    /// changes nothing.
    pub(super) fn inquire(&self, host: usize, is_forced: bool, others: &[Heard]) -> Known {
        let is_connected = self.candidate(host).is_some_and(|candidate| candidate.is_connected);
        let inquiry = Inquiry::new(is_forced, self.clock(host));
        match inquiry.handle_answers(others, is_connected, self.clock(host)) {
            Next::Decide(known) => known,
            Next::Ask | Next::Watch => inquiry.handle_watched(is_connected),
        }
    }

    /// A replica that may be promoted.
    pub(super) fn candidate(&self, host: usize) -> Option<Candidate> {
        let it = &self.hosts[host];
        let Shell::Replica(shell) = &it.shell else { return None };
        let report = shell.machine.report();
        Some(Candidate {
            own: host_id(host),
            superblock: it.superblock.clone(),
            position: report.position,
            is_connected: report.connected,
            is_promised: shell.machine.is_promised(self.clock(host)),
        })
    }

    /// Whether a host answers another one's question.
    pub(super) fn reaches(&self, asker: usize, host: usize) -> bool {
        let now = self.now;
        let is_stalled = |link: LinkId| self.links[link].stalled_until > now;
        let links = [LinkId::new(asker, host), LinkId::new(host, asker)];
        let it = &self.hosts[host];
        it.is_up() && it.frozen_until <= now && !links.into_iter().any(is_stalled)
    }

    /// What a host says of itself when another one asks; nothing where it can't be reached.
    pub(super) fn hear(&mut self, asker: usize, host: usize) -> Option<Standing> {
        let is_heard = self.reaches(asker, host) && !self.state_hangs(host);
        if !is_heard || !self.hosts[host].members.contains(asker) {
            return None;
        }
        let it = &self.hosts[host];
        let superblock = it.durable_superblock();
        self.check_counted(host, &superblock);
        let (data, can_roll_back) = succession::counts_as(&superblock);
        let standing = Standing {
            role: superblock.role,
            data,
            can_roll_back,
            fence: superblock.fence,
            marker: it.mark().position,
            serves: it.tracker().is_some() && it.superseded.is_none() && !it.has_failed(),
            silent_milliseconds: 0,
            dirty_bytes: 0,
            began: Vec::new(),
            replaced: superblock.replaced,
            given: Box::new(succession::counts_on(&superblock)),
            ends: superblock.ends,
            lineage: superblock.lineage,
        };
        let heard = Some(standing).filter(|_| !self.random.once_in(8));
        heard.and_then(|standing| self.lie_of_standing(host, standing))
    }
}
