//! A state folder that fails for a while, and works again: its disk is full, or answers with errors. What needed a record is
//! neither answered nor acknowledged meanwhile; the host starts again once it can be written.

use super::world::{Event, World};
use std::time::Duration;

/// It fails for so many of the longest outages at most.
const OUTAGES: u32 = 4;

impl World {
    /// Nothing can be written to a host's state folder for a while.
    pub(super) fn fail_state(&mut self, host: usize) {
        if self.state_fails(host) {
            return;
        }
        let time = self.random.up_to(self.settings.outage * OUTAGES) + Duration::from_millis(1);
        let is_full = self.random.once_in(2);
        self.note(|| format!("the state folder of host {host} fails for {time:?}, full: {is_full}"));
        let it = &mut self.hosts[host];
        (it.state_fails_until, it.state_is_full) = (self.now + time, is_full);
        let life = it.life;
        // A demotion goes on then.
        self.plan(time, Event::StepDown(host, life));
    }

    /// Whether nothing comes of what is written to a host's state folder just now.
    pub(super) fn state_is_out(&self, host: usize) -> bool {
        self.hosts[host].state_is_out_until() > self.now
    }

    /// Whether nothing can be written to a host's state folder just now.
    pub(super) fn state_fails(&self, host: usize) -> bool {
        self.hosts[host].state_fails_until > self.now
    }
}
