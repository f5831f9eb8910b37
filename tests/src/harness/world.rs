//! Virtual time: what happens next, and who is told.

use super::clocks::Clock;
use super::differences::Differences;
use super::disk::{Crash, Data, DiskOperation};
use super::files::FileOperation;
use super::generations::Generations;
use super::host::{Host, Shell};
use super::lies::Lies;
use super::links::{Channel, LinkId, Links};
use super::random::Random;
use super::settings::Settings;
use super::touched::Foreign;
use blockmirror_protocol::handover::Event as Came;
use blockmirror_protocol::peer::CompareResult;
use blockmirror_protocol::succession::Succeeded;
use blockmirror_protocol::tracker::Doubt;
use blockmirror_protocol::wire::FrameHeader;
use std::collections::BTreeMap;
use std::time::Duration;

/// Something that happens at a planned time. Hosts are numbered.
#[derive(Clone, Debug)]
pub enum Event {
    /// The next request of the application on a host.
    Request(usize),
    /// The next mishap.
    Mishap,
    /// A disk operation of a host ends.
    Disk(usize, DiskOperation),
    /// A batch of a metadata write of a host ends.
    File(usize, FileOperation),
    /// A packet of a connection arrives.
    Arrival(LinkId, u64, Channel),
    /// A frame of a connection that was cut arrives all the same.
    Stray(LinkId, Box<(FrameHeader, Data)>),
    /// The dialler finds out that a connection is gone.
    DiallerLost(LinkId, u64),
    /// The listener finds out that a connection is gone.
    ListenerLost(LinkId, u64),
    /// The dialler, in this life, tries to connect.
    Connect(LinkId, u64),
    /// A host starts that has not been started since this life.
    Start(usize, u64),
    /// An operator goes on promoting a host, in this life.
    Promote(usize, u64),
    /// A replica, in this life, tells its primary what it was not asked, and asks for its word.
    Tell(usize, u64),
    /// An operator promotes a host, in this life, unless the rule objects.
    PromoteByRule(usize, u64),
    /// A host is suspended, in this life, for this time.
    Sleep(usize, u64, Duration),
    /// A host that was frozen, in this life, goes on.
    Thaw(usize, u64),
    /// It has asked the others who leads, which ends this doubt.
    Asked(usize, u64, Doubt),
    /// A primary, in this life, has asked the others about what it was told, which ends this doubt, if there was any.
    Judge(usize, u64, Succeeded, Option<Doubt>),
    /// An operator goes on recovering the content of the first host from that of the second, in this life.
    Recover(usize, usize, u64),
    /// Two hosts are lost that a third one, in this life, did not hear.
    LoseTwo([usize; 2], usize, u64),
    /// The dialler, which was demoted, is promoted again and reaches nobody; the listener is to be promoted later.
    ReturnAlone(LinkId),
    /// A host's agent ends and starts.
    Restart(usize),
    /// A host crashes, in this life.
    Crash(usize, u64, Crash),
    /// The second host hears that the first one was demoted for it, in this life.
    TakeOver(usize, usize, u64),
    /// The second host, which takes over from the first one, looks whether it is the primary.
    TookOver(usize, usize, u64),
    /// The first host, which was demoted in this life, asks the second one how it stands.
    Stands(usize, usize, u64),
    /// Something came of a step of a demotion, in this life.
    Came(usize, Box<Came>, u64),
    /// A primary that is demoted or superseded, in this life, looks whether it can step down.
    StepDown(usize, u64),
}

/// All hosts, their links, and the time.
#[derive(Debug)]
pub struct World {
    /// What the seed decided.
    pub settings: Settings,
    /// Where all chance comes from.
    pub random: Random,
    /// The time.
    pub now: Duration,
    /// The hosts, by their number; host 0 is the first primary.
    pub hosts: Vec<Host>,
    /// The links between them.
    pub links: Links,
    /// Where copies differ.
    pub differences: Differences,
    /// The number of the last request of any application, which is also its content.
    pub last_request: u64,
    /// What something else wrote to disks.
    pub foreign: Foreign,
    /// Where generations were begun.
    pub generations: Generations,
    /// How many events have happened.
    pub steps: u64,
    /// Whether disks may fail and mishaps happen.
    pub is_rough: bool,
    /// Whether applications make requests by themselves.
    pub is_busy: bool,
    /// Whether to print what happens.
    pub is_traced: bool,
    events: BTreeMap<(Duration, u64), Event>,
    planned: u64,
    operations: u64,
    early_timeouts: u32,
    /// Which host lies, if one does.
    pub lies: Option<Lies>,
    /// What compares with copies that have rotted came to.
    pub(super) compared: BTreeMap<LinkId, CompareResult>,
}

impl World {
    /// A world in which all hosts have started and nothing else has happened yet.
    #[must_use]
    pub fn new(settings: Settings, random: Random) -> Self {
        let hosts = settings.sector_bytes.len();
        let mut world = Self {
            random,
            now: Duration::ZERO,
            hosts: (0..hosts).map(|number| Host::new(&settings, number)).collect(),
            links: Links::new(hosts),
            differences: Differences::default(),
            last_request: 0,
            foreign: Foreign::default(),
            generations: Generations::default(),
            steps: 0,
            is_rough: settings.mishaps.is_some(),
            is_busy: false,
            is_traced: false,
            events: BTreeMap::new(),
            planned: 0,
            operations: 0,
            early_timeouts: 0,
            lies: None,
            compared: BTreeMap::new(),
            settings,
        };
        if world.settings.sleeps > 0 {
            world.hosts.iter_mut().for_each(|host| host.clock = Clock::uneven(&mut world.random));
        }
        (0..hosts).for_each(|host| world.start(host));
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
        self.is_busy = true;
        (0..self.hosts.len()).for_each(|host| self.plan_request(host));
        if let Some(pause) = self.settings.mishaps {
            self.plan(pause, Event::Mishap);
        }
        self.run_until(self.settings.duration);
        self.settle();
        self.think_again();
        self.compare_all();
        self.rot_and_compare();
        self.close();
    }

    /// Lets time pass.
    pub fn run_until(&mut self, end: Duration) {
        while self.step(end) {}
        self.now = self.now.max(end);
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

    /// Planned events like this happen now, in the order in which they were planned.
    pub(super) fn bring_forward(&mut self, is_like_this: impl Fn(&Event) -> bool) {
        let events: Vec<_> = self.events.extract_if(.., |_, event| is_like_this(event)).collect();
        self.events.extend(events.into_iter().map(|((_, planned), event)| ((self.now, planned), event)));
    }

    /// A number that names an operation, a connection or a copy; later ones are higher.
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

    /// The hosts whose agents run as primaries.
    #[must_use]
    pub fn primaries(&self) -> Vec<usize> {
        (0..self.hosts.len()).filter(|host| self.hosts[*host].tracker().is_some()).collect()
    }

    /// Lets the next thing happen, if it does before `end`.
    pub fn step(&mut self, end: Duration) -> bool {
        let event = self.events.first_key_value().map(|((at, _), _)| *at);
        let timeout = self.next_timeout();
        let Some(next) = event.into_iter().chain(timeout.map(|(at, _)| at)).min().filter(|next| *next <= end)
        else {
            return false;
        };
        self.steps += 1;
        match timeout.filter(|_| event != Some(next)) {
            Some((_, host)) => self.time_out(host, next),
            None => {
                self.early_timeouts = 0;
                let ((at, _), event) = self.events.pop_first().expect("there is one");
                self.now = self.now.max(at);
                self.happen(event);
            }
        }
        self.act();
        self.check_step();
        true
    }

    /// Carries out what the machines want done.
    pub fn act(&mut self) {
        loop {
            let mut acted = false;
            for host in 0..self.hosts.len() {
                acted |= self.act_host(host);
            }
            if !acted {
                return;
            }
        }
    }

    fn act_host(&mut self, host: usize) -> bool {
        let mut acted = false;
        loop {
            match &mut self.hosts[host].shell {
                Shell::Down | Shell::Rewriting(_) => return acted,
                Shell::Primary(shell) => {
                    let Some(action) = shell.tracker.poll_action() else { return acted };
                    self.act_primary(host, action);
                }
                Shell::Replica(shell) => {
                    let Some(action) = shell.machine.poll_action() else { return acted };
                    self.act_replica(host, action);
                }
            }
            acted = true;
        }
    }

    /// The first time-out of any primary.
    fn next_timeout(&self) -> Option<(Duration, usize)> {
        let timeouts = self.hosts.iter().filter_map(|host| {
            let at = self.when(host.number, host.tracker()?.poll_timeout()?);
            let is_frozen = host.frozen_until > self.now;
            let thawed = host.frozen_until + Duration::from_nanos(1);
            Some((if is_frozen { at.max(thawed) } else { at }, host.number))
        });
        timeouts.min()
    }

    fn time_out(&mut self, host: usize, at: Duration) {
        self.early_timeouts = if at <= self.now { self.early_timeouts + 1 } else { 0 };
        assert!(self.early_timeouts < 100, "the time-out of host {host} stays in the past");
        self.now = self.now.max(at);
        let now = self.clock(host);
        self.hosts[host].tracker_mut().expect("it has a time-out").handle_timeout(now);
    }

    fn happen(&mut self, event: Event) {
        if let Some(until) = self.is_frozen(&event) {
            return self.plan(until - self.now, event);
        }
        if let Some(until) = self.is_hung(&event) {
            return self.plan_at(until, event);
        }
        match event {
            Event::Request(host) => self.next_request(host),
            Event::Mishap => self.next_mishap(),
            Event::Disk(host, id) => self.disk_ended(host, id),
            Event::File(host, id) => self.file_ended(host, id),
            Event::Arrival(link, connection, channel) => self.arrive(link, connection, channel),
            Event::Stray(link, frame) => self.stray(link, frame.0, frame.1),
            Event::DiallerLost(link, connection) => self.dialler_lost(link, connection),
            Event::ListenerLost(link, connection) => self.listener_lost(link, connection),
            Event::Connect(link, life) => self.connect(link, life),
            Event::Start(host, life) if self.hosts[host].life == life => self.start(host),
            Event::Start(..) => {}
            Event::Promote(host, life) if self.hosts[host].life == life => self.promote(host),
            Event::Promote(..) => {}
            Event::TakeOver(primary, host, life) => self.heir_is_told(primary, host, life),
            Event::TookOver(primary, host, life) => self.took_over(primary, host, life),
            Event::Stands(host, to, life) => self.heir_stands(host, to, life),
            Event::Came(host, came, life) => self.came_of_demotion(host, *came, life),
            Event::StepDown(host, life) => self.step_down_if_superseded(host, life),
            Event::Recover(host, source, life) => self.recover(host, source, life),
            Event::LoseTwo(lost, host, life) => self.lose_two(lost, host, life),
            Event::ReturnAlone(link) => self.has_returned(link),
            Event::Restart(host) => self.take_down(host, Crash::Process),
            Event::Crash(host, life, crash) => self.crash_amid(host, life, crash),
            Event::PromoteByRule(host, life) if self.hosts[host].life == life => self.promote_by_rule(host),
            Event::PromoteByRule(..) => {}
            Event::Tell(host, life) => self.tell(host, life),
            Event::Sleep(host, life, time) if self.hosts[host].life == life => self.freeze_for(host, time),
            Event::Sleep(..) => {}
            Event::Thaw(host, life) => self.thaw(host, life),
            Event::Asked(host, life, doubt) => self.asked(host, life, doubt),
            Event::Judge(host, life, told, doubt) => self.judge(host, life, told, doubt),
        }
    }

    /// Whether an operation of a disk or a file fails now.
    pub fn fails(&mut self) -> bool {
        self.is_rough && self.random.once_in(self.settings.disk_failures)
    }
}
