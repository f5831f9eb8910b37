//! What goes wrong.

use super::disk::Crash;
use super::world::{Event, World};
use std::time::Duration;

impl World {
    /// Lets something go wrong, and plans the next time.
    pub fn next_mishap(&mut self) {
        let Some(pause) = self.settings.mishaps.filter(|_| self.is_rough) else { return };
        let pause = self.random.up_to(pause);
        self.plan(pause, Event::Mishap);
        let which = self.random.below(self.replicas.len() as u64) as usize;
        let crash = self.random.pick(&[Crash::Process, Crash::Power]);
        match self.random.below(16) {
            0..=3 => self.cut(which),
            4..=6 => self.take_replica_down(which, crash),
            7..=10 => self.take_primary_down(crash),
            11 => {
                self.take_replica_down(which, crash);
                self.take_primary_down(crash);
            }
            12 | 13 => self.stall(which),
            14 => self.begin_compare(which),
            _ => {
                if self.random.once_in(3) && self.replicas[which].machine.is_some() {
                    self.replace_replica(which);
                }
            }
        }
    }

    fn take_replica_down(&mut self, which: usize, crash: Crash) {
        if self.replicas[which].machine.is_some() {
            self.crash_replica(which, crash);
        }
        if !std::mem::replace(&mut self.replicas[which].start_is_planned, true) {
            let delay = self.random.up_to(Duration::from_secs(3));
            self.plan(delay, Event::StartReplica(which));
        }
    }

    fn take_primary_down(&mut self, crash: Crash) {
        if self.primary.tracker.is_some() {
            self.crash_primary(crash);
        }
        if !std::mem::replace(&mut self.primary.start_is_planned, true) {
            let delay = self.random.up_to(Duration::from_secs(1));
            self.plan(delay, Event::StartPrimary);
        }
    }

    fn stall(&mut self, which: usize) {
        let until = self.now + self.random.up_to(Duration::from_secs(30));
        self.note(|| format!("link {which} stalls until {until:?}"));
        self.links[which].stalled_until = until;
    }
}
