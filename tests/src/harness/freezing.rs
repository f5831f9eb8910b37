//! A process is frozen for a while, as by a stopped virtual machine, and goes on as if nothing had been: what was under way has
//! ended, and its peers may have gone on without it. Where it is the machine that stopped, its clock did as well
//! ([`super::clocks`]).

use super::host::Shell;
use super::links::Channel;
use super::world::{Event, World};
use blockmirror_protocol::succession;
use blockmirror_protocol::tracker::Doubt;
use std::time::Duration;

/// How long it takes to ask the others who leads.
pub(super) const ASKING: Duration = Duration::from_millis(20);
/// A process is frozen for so many of the longest outages at most, and never for longer than this.
const OUTAGES: u32 = 20;
const LONGEST: Duration = Duration::from_secs(10);

impl World {
    /// Nothing happens on a host for a while.
    pub(super) fn freeze(&mut self, host: usize) {
        let is_up = matches!(self.hosts[host].shell, Shell::Primary(_) | Shell::Replica(_));
        if self.hosts[host].frozen_until > self.now || !is_up {
            return;
        }
        let longest = LONGEST.min(self.settings.outage * OUTAGES);
        let time = self.random.up_to(longest) + ASKING;
        self.freeze_for(host, time);
    }

    /// Nothing happens on a host for this time.
    pub(super) fn freeze_for(&mut self, host: usize, time: Duration) {
        let it = &self.hosts[host];
        if it.frozen_until > self.now || !matches!(it.shell, Shell::Primary(_) | Shell::Replica(_)) {
            return;
        }
        let until = self.now + time;
        self.note(|| format!("host {host} is frozen until {until:?}"));
        let it = &mut self.hosts[host];
        it.clock.sleep(self.now, until);
        it.frozen_until = until;
        let life = it.life;
        self.plan(until - self.now, Event::Thaw(host, life));
    }

    /// A host goes on: as a primary it asks who leads before it answers anything.
    pub(super) fn thaw(&mut self, host: usize, life: u64) {
        let now = self.clock(host);
        let it = &mut self.hosts[host];
        if life != it.life {
            return;
        }
        let Some(tracker) = it.tracker_mut() else { return };
        let doubt = tracker.note_absence(now);
        it.doubts.insert(doubt);
        let delay = self.random.up_to(ASKING);
        self.plan(delay, Event::Asked(host, life, doubt));
    }

    /// The others have said how they stand, those that could be reached.
    pub(super) fn asked(&mut self, host: usize, life: u64, doubt: Doubt) {
        let now = self.clock(host);
        if self.hosts[host].life != life || self.hosts[host].tracker().is_none() {
            return;
        }
        let others = self.hear_all(host);
        self.hosts[host].doubts.remove(&doubt);
        match succession::newest_fence(self.hosts[host].superblock.fence, &others) {
            Some(fence) => self.supersede(host, fence),
            None => self.hosts[host].tracker_mut().expect("it was looked at").trust(doubt, now),
        }
    }

    /// Whether an event is one of a host that is frozen, which takes it up when it goes on.
    pub(super) fn is_frozen(&self, event: &Event) -> Option<Duration> {
        let host = match event {
            Event::Request(host) | Event::Disk(host, _) | Event::File(host, _) => *host,
            Event::Promote(host, _)
            | Event::PromoteByRule(host, _)
            | Event::StepDown(host, _)
            | Event::TakeOver(_, host, _)
            | Event::TookOver(_, host, _)
            | Event::Stands(host, ..)
            | Event::Came(host, ..)
            | Event::Tell(host, _)
            | Event::Recover(_, host, _)
            | Event::LoseTwo(_, host, _)
            | Event::Judge(host, ..) => *host,
            Event::DiallerLost(link, _) | Event::Connect(link, _) => link.dialler,
            Event::Arrival(link, _, channel) if *channel == Channel::ToDialler => link.dialler,
            Event::Arrival(link, ..) | Event::Stray(link, _) | Event::ListenerLost(link, _) => link.listener,
            Event::Start(..) | Event::Mishap | Event::Thaw(..) | Event::Asked(..) => return None,
            Event::Restart(..) | Event::Crash(..) | Event::ReturnAlone(..) | Event::Sleep(..) => return None,
        };
        let it = &self.hosts[host];
        (it.is_up() && it.frozen_until > self.now).then_some(it.frozen_until)
    }
}
