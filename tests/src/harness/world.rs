//! Virtual time: what happens next, and who is told.

use super::application::Application;
use super::disk::DiskOperation;
use super::files::FileOperation;
use super::link::{Channel, Link};
use super::model::Promises;
use super::primary::Primary;
use super::random::Random;
use super::replica::ReplicaHost;
use super::settings::Settings;
use blockmirror_protocol::units::Time;
use std::collections::BTreeMap;
use std::time::Duration;

/// How long the hosts have to come to rest once nothing goes wrong any more.
const SETTLING: Duration = Duration::from_secs(400);

/// Something that happens at a planned time.
#[derive(Clone, Debug)]
pub enum Event {
    /// The application's next request.
    Request,
    /// The next mishap.
    Mishap,
    /// A disk operation of the primary ends.
    PrimaryDisk(DiskOperation),
    /// A batch of a metadata write of the primary ends.
    PrimaryFile(FileOperation),
    /// A disk operation of a replica ends.
    ReplicaDisk(usize, DiskOperation),
    /// A batch of a metadata write of a replica ends.
    ReplicaFile(usize, FileOperation),
    /// A packet arrives.
    Arrival(usize, u64, Channel),
    /// The primary finds out that a connection is gone.
    PrimaryLost(usize, u64),
    /// A replica finds out that a connection is gone.
    ReplicaLost(usize, u64),
    /// The primary, in this life, tries to connect.
    Connect(usize, u64),
    /// The primary starts.
    StartPrimary,
    /// A replica starts.
    StartReplica(usize),
}

/// See the module.
#[derive(Debug)]
pub struct World {
    /// What the seed decided.
    pub settings: Settings,
    /// Where all chance comes from.
    pub random: Random,
    /// The time.
    pub now: Duration,
    /// The primary.
    pub primary: Primary,
    /// The replicas.
    pub replicas: Vec<ReplicaHost>,
    /// The link to each replica.
    pub links: Vec<Link>,
    /// The applications.
    pub application: Application,
    /// What they were told.
    pub promises: Promises,
    /// How many events have happened.
    pub steps: u64,
    /// Whether disks may fail and mishaps happen.
    pub is_rough: bool,
    /// Whether to print what happens.
    pub is_traced: bool,
    events: BTreeMap<(Duration, u64), Event>,
    planned: u64,
    operations: u64,
    early_timeouts: u32,
}

impl World {
    /// A world in which nothing has happened yet.
    #[must_use]
    pub fn new(settings: Settings, random: Random) -> Self {
        let hosts = settings.sector_bytes.len();
        let mut world = Self {
            random,
            now: Duration::ZERO,
            primary: Primary::new(&settings),
            replicas: (1..hosts).map(|host| ReplicaHost::new(&settings, host)).collect(),
            links: (1..hosts).map(|_| Link::default()).collect(),
            application: Application::default(),
            promises: Promises::default(),
            steps: 0,
            is_rough: settings.mishaps.is_some(),
            is_traced: false,
            events: BTreeMap::new(),
            planned: 0,
            operations: 0,
            early_timeouts: 0,
            settings,
        };
        for which in 0..world.replicas.len() {
            world.start_replica(which);
        }
        world.start_primary();
        world
    }

    /// A world from its seed.
    #[must_use]
    pub fn from_seed(seed: u64, seconds: u64) -> Self {
        let mut random = Random::new(seed);
        let settings = Settings::random(&mut random, seconds);
        Self::new(settings, random)
    }

    /// Lets everything happen that the seed holds, then lets the hosts come to rest, and checks all along.
    ///
    /// # Panics
    /// When anything is not as it must be.
    pub fn run(&mut self) {
        let pause = self.settings.think_time;
        self.plan(pause, Event::Request);
        if let Some(pause) = self.settings.mishaps {
            self.plan(pause, Event::Mishap);
        }
        self.run_until(self.settings.duration);
        self.settle();
        self.compare_all();
        self.close();
    }

    /// Lets time pass.
    pub fn run_until(&mut self, end: Duration) {
        while self.step(end) {}
        self.now = self.now.max(end);
    }

    /// Ends all mishaps and requests, and waits until every replica is in sync.
    ///
    /// # Panics
    /// When that takes too long.
    pub fn settle(&mut self) {
        self.is_rough = false;
        self.application.is_quiet = true;
        for link in &mut self.links {
            link.stalled_until = self.now;
        }
        let end = self.now + SETTLING;
        while !self.is_settled() {
            assert!(self.step(end), "R2: the hosts do not come to rest: {}", self.describe());
        }
        self.check_at_rest();
    }

    /// Plans an event.
    pub fn plan(&mut self, delay: Duration, event: Event) {
        self.plan_at(self.now + delay, event);
    }

    /// Plans an event for a time.
    pub fn plan_at(&mut self, at: Duration, event: Event) {
        self.planned += 1;
        self.events.insert((at.max(self.now), self.planned), event);
    }

    /// A number that names an operation.
    pub fn next_operation(&mut self) -> u64 {
        self.operations += 1;
        self.operations
    }

    /// Prints what happens, if that is wanted.
    pub fn note(&self, text: impl FnOnce() -> String) {
        if self.is_traced {
            eprintln!("{:>12.6} {}", self.now.as_secs_f64(), text());
        }
    }

    /// Lets the next thing happen, if it does before `end`.
    pub fn step(&mut self, end: Duration) -> bool {
        let event = self.events.first_key_value().map(|((at, _), _)| *at);
        let timeout = self.primary.tracker.as_ref().and_then(|tracker| tracker.poll_timeout()).map(|at| at.0);
        let Some(next) = event.into_iter().chain(timeout).min().filter(|next| *next <= end) else {
            return false;
        };
        self.steps += 1;
        if event != Some(next) {
            self.early_timeouts = if next <= self.now { self.early_timeouts + 1 } else { 0 };
            assert!(self.early_timeouts < 100, "the primary's time-out stays in the past");
            self.now = self.now.max(next);
            let now = Time(self.now);
            self.primary.tracker.as_mut().expect("it has a time-out").handle_timeout(now);
        } else {
            self.early_timeouts = 0;
            let ((at, _), event) = self.events.pop_first().expect("there is one");
            self.now = self.now.max(at);
            self.happen(event);
        }
        self.act();
        self.check_step();
        true
    }

    /// Carries out what the machines want done.
    pub fn act(&mut self) {
        loop {
            let mut acted = false;
            while let Some(action) = self.primary.tracker.as_mut().and_then(|tracker| tracker.poll_action()) {
                self.act_primary(action);
                acted = true;
            }
            for which in 0..self.replicas.len() {
                while let Some(action) =
                    self.replicas[which].machine.as_mut().and_then(|machine| machine.poll_action())
                {
                    self.act_replica(which, action);
                    acted = true;
                }
            }
            if !acted {
                return;
            }
        }
    }

    fn happen(&mut self, event: Event) {
        match event {
            Event::Request => self.next_request(),
            Event::Mishap => self.next_mishap(),
            Event::PrimaryDisk(id) => self.primary_disk_ended(id),
            Event::PrimaryFile(id) => self.primary_file_ended(id),
            Event::ReplicaDisk(which, id) => self.replica_disk_ended(which, id),
            Event::ReplicaFile(which, id) => self.replica_file_ended(which, id),
            Event::Arrival(which, connection, channel) => self.arrive(which, connection, channel),
            Event::PrimaryLost(which, connection) => self.primary_lost(which, connection),
            Event::ReplicaLost(which, connection) => self.replica_lost(which, connection),
            Event::Connect(which, life) => self.connect(which, life),
            Event::StartPrimary => self.start_primary(),
            Event::StartReplica(which) => self.start_replica(which),
        }
    }

    fn arrive(&mut self, which: usize, connection: u64, channel: Channel) {
        let link = &mut self.links[which];
        if link.stalled_until > self.now {
            let later = link.stalled_until;
            return self.plan_at(later, Event::Arrival(which, connection, channel));
        }
        let Some(packet) = link.arrived(channel, connection) else { return };
        if channel == Channel::ToPrimary {
            self.primary_receives(which, packet);
        } else {
            self.replica_receives(which, connection, packet);
        }
    }

    /// Cuts the link to a replica; both sides find out later.
    pub fn cut(&mut self, which: usize) {
        self.note(|| format!("link {which} is cut"));
        let link = &mut self.links[which];
        link.cut();
        let (primary, replica) = (link.primary_side, link.replica_side);
        let longest = Duration::from_secs(2);
        if let Some(connection) = primary {
            let delay = self.random.up_to(longest);
            self.plan(delay, Event::PrimaryLost(which, connection));
        }
        if let Some(connection) = replica {
            let delay = self.random.up_to(longest);
            self.plan(delay, Event::ReplicaLost(which, connection));
        }
    }

    /// Whether a disk operation fails now.
    pub fn fails(&mut self) -> bool {
        self.is_rough && self.random.once_in(self.settings.disk_failures)
    }
}
