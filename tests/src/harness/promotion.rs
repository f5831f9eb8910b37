//! Operators promote replicas; what that means for the model.

use super::host::{Shell, host_id};
use super::mirror::Mirror;
use super::promises::Promises;
use super::rewriting::Purpose;
use super::world::{Event, World};
use blockmirror_protocol::replica::promotion::{self, NotPromotable};
use blockmirror_protocol::rewrite::{Candidacy, Rewrite};
use blockmirror_protocol::terms::DataState;
use blockmirror_protocol::units::HostId;
use std::time::Duration;

/// How long an operator waits before looking again whether a replica has come to rest, at most.
const LOOK: Duration = Duration::from_millis(50);

impl World {
    /// An operator promotes a replica, whatever that loses. Nothing happens where that is impossible.
    pub fn promote(&mut self, host: usize) {
        // It is just changing its role.
        if self.hosts[host].demotion.is_some() {
            return;
        }
        if !matches!(self.hosts[host].shell, Shell::Replica(_)) {
            self.hosts[host].decided = None;
        }
        let peers = self.hosts[host].members.peers();
        let it = &mut self.hosts[host];
        let Shell::Replica(shell) = &mut it.shell else {
            it.is_held = false;
            return;
        };
        if promotion::must_be_promotable(&it.superblock).is_err() {
            it.decided = None;
            if std::mem::take(&mut it.is_held) {
                // It was possible when its session was ended, and is no more: it goes on as a replica.
                self.cut_off(host);
            }
            return;
        }
        shell.machine.handle_disconnected();
        if !shell.machine.is_idle() || !shell.is_idle() {
            it.is_held = true;
            let life = it.life;
            return self.plan(LOOK, Event::Promote(host, life));
        }
        if shell.machine.has_failed() {
            (it.is_held, it.decided) = (false, None);
            return;
        }
        let superblock = it.superblock.clone();
        self.check_counted(host, &superblock);
        if self.hosts[host].decided.is_none() {
            let others = self.hear_all(host);
            let candidate = self.candidate(host).expect("it is a replica");
            let known = self.inquire(host, true, &others);
            self.hosts[host].decided = Some(known.decide(&candidate, &others).expect("an operator insists"));
        }
        let it = &mut self.hosts[host];
        let Shell::Replica(shell) = &mut it.shell else { unreachable!("it was looked at") };
        let decision = it.decided.clone().expect("it was decided");
        let candidacy = Candidacy {
            host: host_id(host),
            decision,
            position: shell.machine.report().position,
            restored: it.layers.saved(it.superblock.layers.rollback()),
        };
        let peers: Vec<HostId> = peers.into_iter().map(host_id).collect();
        let rewrite = match Rewrite::promotion(&it.superblock, &peers, candidacy) {
            Ok(rewrite) => rewrite,
            Err(NotPromotable::Touched) => {
                self.note(|| format!("host {host} is not promoted without force"));
                let it = &mut self.hosts[host];
                (it.is_held, it.decided, it.takes_over) = (false, None, None);
                return self.cut_off(host);
            }
            Err(error) => panic!("it was asked: {error}"),
        };
        self.note(|| format!("host {host} is being promoted"));
        self.cut_off(host);
        for link in self.links.ids().filter(|link| link.listener == host) {
            // What a rollback restores, this host's own maps remember.
            self.links[link].united_by = None;
        }
        let it = &mut self.hosts[host];
        it.is_held = false;
        let Shell::Replica(shell) = std::mem::replace(&mut it.shell, Shell::Down) else {
            unreachable!("it was looked at")
        };
        self.begin_rewriting(host, rewrite, Purpose::Promotion(Box::new(shell.machine)));
    }

    /// The host is the primary from now on.
    pub(super) fn promoted(&mut self, host: usize) {
        self.note(|| format!("host {host} is promoted"));
        let it = &mut self.hosts[host];
        it.start_is_planned = false;
        it.life += 1;
        self.start_primary(host, false);
    }

    /// The superblock says durably that the host is primary.
    pub(super) fn promotion_is_recorded(&mut self, host: usize) {
        let it = &mut self.hosts[host];
        // Of the superblock that says that it is promoted already.
        let holder = it.promoted_after;
        let is_by_rule = it.decided.take().is_some_and(|decision| !decision.is_forced);
        if let Some(fence) = it.takes_over.take() {
            let before = &self.hosts[holder];
            assert!(
                before.went_on_from != Some(fence),
                "L5: host {host} takes over from {holder}, which was promoted again because nobody did"
            );
        }
        self.take_content(host, is_by_rule);
        if let Some(expected) = self.hosts[host].expected.take() {
            let it = &self.hosts[host];
            if is_by_rule && expected.primary == holder {
                expected.all.check_known(&it.disk, host, |_| false);
            }
            expected.promises.check_known(&it.disk, host, |value| self.is_taken(value));
        }
        let it = &mut self.hosts[host];
        it.promises = Promises::of(&it.disk);
        for other in &mut self.hosts {
            // Whoever was released by it may be promoted without a word until it follows this promotion. Force waits for
            // nobody.
            let is_released = other.superblock.released && other.superblock.fence.holder == host_id(host);
            other.expected.take_if(|expected| expected.primary == host && !(is_by_rule && is_released));
        }
        let it = &mut self.hosts[host];
        it.agrees_up_to(it.superblock.fence.counter);
        it.kept = None;
        it.mirror = Mirror::default();
        it.mirror.data = DataState::Consistent;
        self.differences.forget(host);
    }
}
