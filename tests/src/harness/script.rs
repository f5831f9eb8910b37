//! Scripted worlds: hosts do what a test says, and only disks and links leave anything to chance.

use super::application::PATIENCE;
use super::host::host_id;
use super::links::LinkId;
use super::random::Random;
use super::settings::Settings;
use super::world::{Event, World};
use blockmirror_protocol::peer::{ReplicaState, Report};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::tracker::Work;
use std::time::Duration;

/// The host that is primary first.
pub const PRIMARY: usize = 0;
/// The host that is its replica.
pub const REPLICA: usize = 1;

/// How long anything takes at most that a script waits for.
const WAIT: Duration = Duration::from_secs(400);
/// How long a host is down.
const DOWN: Duration = Duration::from_millis(10);

/// The link from the first primary to its replica.
#[must_use]
pub fn link() -> LinkId {
    LinkId::new(PRIMARY, REPLICA)
}

/// A write that need not be durable.
#[must_use]
pub fn write(offset: u64, length: u64) -> Work {
    Work::Write { range: ByteRange::new(offset, length), fua: false }
}

impl World {
    /// A world whose replicas are all in sync.
    #[must_use]
    pub fn in_sync(settings: &Settings, seed: u64) -> Self {
        let mut world = Self::new(settings.clone(), Random::new(seed));
        world.settle();
        world
    }

    /// An application asks a primary for something.
    pub fn ask(&mut self, host: usize, work: Work) {
        self.request(host, work);
        self.act();
    }

    /// Lets milliseconds pass.
    pub fn pass(&mut self, milliseconds: u64) {
        self.run_until(self.now + Duration::from_millis(milliseconds));
    }

    /// Lets things happen until something is so.
    ///
    /// # Panics
    /// When it does not come to be.
    pub fn wait_until(&mut self, what: &str, is_so: impl Fn(&Self) -> bool) {
        let end = self.now + WAIT;
        while !is_so(self) {
            assert!(self.step(end), "it never comes to be that {what}: {}", self.describe());
        }
    }

    /// Cuts a link; nothing comes through until [`World::join`] or [`World::settle`].
    pub fn part(&mut self, link: LinkId) {
        self.cut(link);
        self.hold_up(link);
    }

    /// Nothing comes through a link until [`World::join`] or [`World::settle`], and nobody is told.
    pub fn hold_up(&mut self, link: LinkId) {
        self.links[link].stalled_until = self.now + PATIENCE * 1000;
    }

    /// A link is as good as new: what was held up goes on with the next connection.
    pub fn join(&mut self, link: LinkId) {
        self.links[link].stalled_until = self.now;
        self.cut(link);
    }

    /// Plans the start of every host that is down.
    pub fn start_all(&mut self) {
        let down: Vec<usize> = (0..self.hosts.len()).filter(|host| !self.hosts[*host].is_up()).collect();
        down.into_iter().for_each(|host| self.plan_start(host, DOWN));
    }

    /// An operator demotes a primary, for another host if there is one.
    pub fn step_aside(&mut self, from: usize, to: Option<usize>) {
        self.demote(from, to);
        self.act();
        // There may be nothing to close.
        let life = self.hosts[from].life;
        self.plan(Duration::ZERO, Event::StepDown(from, life));
    }

    /// An operator switches to another primary, and waits until that one writes.
    ///
    /// # Panics
    /// When it never does.
    pub fn switch(&mut self, from: usize, to: usize) {
        self.step_aside(from, Some(to));
        self.wait_until("the roles have changed", |world| {
            world.primaries() == [to] && world.hosts[from].is_up()
        });
    }

    /// An operator promotes a replica, and waits until it writes.
    ///
    /// # Panics
    /// When it never does.
    pub fn take_over(&mut self, host: usize) {
        self.promote(host);
        self.wait_until("the replica is promoted", |world| world.hosts[host].tracker().is_some());
    }

    /// What a primary says of a replica.
    ///
    /// # Panics
    /// When the dialler is no primary that runs.
    #[must_use]
    pub fn report(&self, link: LinkId) -> Report {
        let tracker = self.hosts[link.dialler].tracker().expect("the host is primary");
        let report =
            tracker.reports(self.clock(link.dialler)).find(|(peer, _)| *peer == host_id(link.listener));
        report.expect("every host knows every other").1
    }

    /// Whether a replica has everything, and its primary knows.
    #[must_use]
    pub fn is_in_sync(&self, link: LinkId) -> bool {
        let has_all = |report: Report| report.state == ReplicaState::InSync && report.out_of_sync_bytes == 0;
        self.hosts[link.dialler].tracker().is_some() && has_all(self.report(link))
    }

    /// The end of a story: all hosts start and come to rest, and nothing differs and nothing is left to do.
    ///
    /// # Panics
    /// When anything is not as it must be.
    pub fn finish(mut self) {
        self.start_all();
        self.settle();
        self.think_again();
        self.compare_all();
        self.close();
    }
}
