//! What happens. Each leaves a primary that is written to; the rest may stay as broken as it is.

use super::disk::{promotable_copy, superblock};
use super::sites::{Condition, is_in_sync};
use super::{Promotions, Torture};
use crate::machines::patience::until;
use blockmirror_agent::config::Mode;
use std::fs;
use std::time::Duration;

/// How long something is broken for a moment, at most: less than it takes to be noticed, or hardly more.
const MOMENT: Duration = Duration::from_millis(2500);

impl Torture {
    /// One thing of all that can happen.
    pub(super) fn let_happen(&mut self) {
        if self.settings.promotions == Promotions::Mostly {
            return self.let_roles_change();
        }
        let replica = self.some_replica();
        match self.random.below(100) {
            0..42 => self.change_replica(replica),
            42..54 => self.look_into_replica(replica),
            54..62 => self.interrupt_resync(replica),
            62..76 => self.lose_primary(),
            76..82 => self.restart_primary(),
            82..87 => self.pause_primary(),
            87..92 => self.lull(),
            92..95 => {
                self.say("everything is healed");
                self.wait_until_in_sync();
            }
            _ if self.settings.promotions == Promotions::Sometimes => self.hand_over(),
            _ => self.change_replica(replica),
        }
    }

    /// One thing of those after which another host may be the primary, or of what makes that harder.
    fn let_roles_change(&mut self) {
        let replica = self.some_replica();
        match self.random.below(10) {
            0..2 => self.change_replica(replica),
            2..5 => self.lose_primary(),
            5 if self.random.once_in(2) => self.restart_primary(),
            5 => self.pause_primary(),
            _ => self.hand_over(),
        }
    }

    /// What is broken is repaired, what works is broken.
    fn change_replica(&mut self, replica: usize) {
        let name = self.name(replica).to_owned();
        let choice = self.random.below(6);
        let moment = self.random.up_to(MOMENT);
        let site = &self.sites[replica];
        match (site.condition, site.is_cut, choice) {
            (Condition::Down, _, _) => {
                self.say(&format!("{name} is started"));
                self.sites[replica].host.start();
                self.sites[replica].condition = Condition::Up;
            }
            (Condition::Stalled, _, _) => {
                self.say(&format!("{name} goes on"));
                self.sites[replica].host.go_on();
                self.sites[replica].condition = Condition::Up;
            }
            (Condition::Up, true, _) => {
                self.say(&format!("the link to {name} is mended"));
                self.sites[replica].host.link().mend();
                self.sites[replica].is_cut = false;
            }
            (Condition::Up, false, 0) => {
                self.say(&format!("{name} is killed"));
                self.sites[replica].make_sure_that_it_is_down();
            }
            (Condition::Up, false, 1) => {
                self.say(&format!("{name} is stopped"));
                self.sites[replica].host.stop();
                self.sites[replica].condition = Condition::Down;
            }
            (Condition::Up, false, 2) => {
                self.say(&format!("the link to {name} is cut"));
                self.sites[replica].host.link().cut();
                self.sites[replica].is_cut = true;
            }
            (Condition::Up, false, 3) => {
                self.say(&format!("the link to {name} is cut for {moment:?}"));
                self.sites[replica].host.link().cut();
                std::thread::sleep(moment);
                self.sites[replica].host.link().mend();
            }
            (Condition::Up, false, 4) => {
                self.say(&format!("{name} stalls"));
                self.sites[replica].host.stall();
                self.sites[replica].condition = Condition::Stalled;
            }
            (Condition::Up, false, _) => {
                self.say(&format!("{name} stalls for {moment:?}"));
                self.sites[replica].host.stall();
                std::thread::sleep(moment);
                self.sites[replica].host.go_on();
            }
        }
    }

    /// A replica is killed, and looked at as if it were to be promoted (P1).
    fn look_into_replica(&mut self, replica: usize) {
        let name = self.name(replica).to_owned();
        let Some(floor) = self.floor(replica) else {
            return self.say(&format!("{name} has another history"));
        };
        self.say(&format!("{name} is killed and looked into"));
        self.sites[replica].make_sure_that_it_is_down();
        let copy = self.folder.join("copy");
        let superblock = promotable_copy(&self.sites[replica].host, &copy);
        let superblock =
            superblock.unwrap_or_else(|| panic!("{name} can't be promoted: a rollback point is missing"));
        let rolled_back = superblock.layers.rollback().is_some();
        self.tally.rollbacks += u64::from(rolled_back);
        let whose = if rolled_back { format!("{name}, rolled back,") } else { name };
        self.check(&copy, floor, &whose);
        fs::remove_file(copy).expect("our own copy");
    }

    /// A replica misses something, and is killed while that is being copied to it.
    fn interrupt_resync(&mut self, replica: usize) {
        self.say(&format!("{} is killed, and again in its resync", self.name(replica)));
        self.sites[replica].make_sure_that_it_is_down();
        let most = if self.settings.mode == Mode::Async { 2000 } else { 300 };
        let count = self.random.below(most);
        self.load().pass(count);
        self.sites[replica].heal();
        let site = &self.sites[replica];
        until("a resync is under way or has ended", || {
            let host = &self.sites[self.primary].host;
            let peers = host.status().facts.peers;
            let peer = peers.iter().find(|peer| peer.name.as_str() == site.host.name());
            let is_in_sync = peer.is_some_and(is_in_sync);
            if is_in_sync || superblock(&site.host).layers.rollback().is_some() {
                Ok(())
            } else {
                Err(format!("{peer:?}"))
            }
        });
        std::thread::sleep(self.random.up_to(MOMENT / 10));
        self.look_into_replica(replica);
    }

    /// The primary is killed under load, and with it sometimes a replica. It comes back, or a replica takes its place.
    fn lose_primary(&mut self) {
        let victim = self.some_replica();
        let both = self.random.once_in(4);
        if both && self.random.once_in(2) {
            self.say(&format!("{} is killed at the same time", self.name(victim)));
            self.sites[victim].make_sure_that_it_is_down();
        }
        self.say(&format!("the primary {} is killed", self.name(self.primary)));
        let primary = self.primary;
        self.sites[primary].make_sure_that_it_is_down();
        if both {
            self.sites[victim].make_sure_that_it_is_down();
        }
        self.abandon_load();
        if self.settings.promotions != Promotions::Never && self.random.once_in(2) && self.promote_another() {
            return;
        }
        self.sites[primary].host.start();
        self.sites[primary].condition = Condition::Up;
        self.go_on_with_primary();
    }

    /// The primary's agent is stopped in order and started again.
    fn restart_primary(&mut self) {
        self.say("the primary is stopped and started");
        self.end_load();
        let primary = &mut self.sites[self.primary].host;
        primary.stop();
        primary.start();
        self.go_on_with_primary();
    }

    /// The primary's agent ends under load and is started again. The writer, which would fail with any of its calls, goes on.
    fn pause_primary(&mut self) {
        let is_killed = self.random.once_in(2);
        let words = if is_killed { "killed" } else { "stopped" };
        self.say(&format!("the primary's agent is {words} and started, and its writer goes on"));
        let primary = &mut self.sites[self.primary].host;
        match is_killed {
            true => primary.kill(),
            false => primary.stop(),
        }
        primary.start();
        self.load().pass(1);
    }

    /// It has everything that was answered, whatever happened to it.
    fn go_on_with_primary(&mut self) {
        self.wait_for_device();
        let whose = format!("the primary {}", self.name(self.primary));
        self.check(&self.device(), self.now(), &whose);
        self.start_load();
    }

    /// Nothing is written for a while.
    fn lull(&mut self) {
        self.say("a lull");
        self.come_together();
        self.start_load();
    }
}
