//! A host: what it keeps on disk, and the shell of the machine that runs there now.
//!
//! The superblock says which role the host starts in. What the model knows of a host outlives its agent.

use super::application::Application;
use super::clocks::Clock;
use super::consent::Agreed;
use super::demotion::Demotion;
use super::disk::{Crash, Disk, DiskOperation};
use super::files::{Batch, FileOperation, Files, Step};
use super::gap::{HistoryPoint, Layers};
use super::hanging::Hangs;
use super::history::History;
use super::links::LinkId;
use super::membership::Members;
use super::mirror::Mirror;
use super::primary::PrimaryShell;
use super::promises::{Expected, Promises};
use super::recovery::Adopting;
use super::replica::ReplicaShell;
use super::rewriting::{Purpose, Rewriting};
use super::set_back::Snapshot;
use super::settings::Settings;
use super::world::{Event, World};
use blockmirror_protocol::dirty_map::DirtyMap;
use blockmirror_protocol::disk::activity_log::{self, Recovered};
use blockmirror_protocol::disk::dirty_map::Base;
use blockmirror_protocol::disk::superblock::{self, Role, Superblock};
use blockmirror_protocol::disk::{PAGE_BYTES, dirty_map};
use blockmirror_protocol::given::Given;
use blockmirror_protocol::layers;
use blockmirror_protocol::planted::{Bug, planted};
use blockmirror_protocol::succession::{Claims, Decision};
use blockmirror_protocol::terms::{DataState, Fence};
use blockmirror_protocol::tracker::{Doubt, Tracker};
use blockmirror_protocol::units::{CopyId, Epoch, GenerationId, HostId, Mark, VolumeId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

/// The volume of all worlds.
pub const VOLUME: VolumeId = VolumeId([1; 16]);

/// What runs on a host.
#[derive(Debug)]
pub enum Shell {
    /// Nothing.
    Down,
    /// An agent whose volume is primary.
    Primary(Box<PrimaryShell>),
    /// An agent whose volume is a replica.
    Replica(Box<ReplicaShell>),
    /// An agent whose volume is made to say something else of itself.
    Rewriting(Box<Rewriting>),
}

/// One host: what is on its disks, and what runs on it.
#[derive(Debug)]
pub struct Host {
    /// Its number.
    pub number: usize,
    /// The backing.
    pub disk: Disk,
    /// The metadata.
    pub files: Files,
    /// What the superblock says, or will when it is written.
    pub superblock: Superblock,
    /// How often the agent was started.
    pub life: u64,
    /// Whether a start is planned.
    pub start_is_planned: bool,
    /// When it waited last, as a primary, for one that it had released: nothing is answered before that one follows (W4), which may take
    /// for longer than any deadline.
    pub waited_at: Duration,
    /// How many operations of its disk and its files have ended.
    pub ended_operations: u64,
    /// What runs.
    pub shell: Shell,
    /// The applications, while it is primary.
    pub application: Application,
    /// What they were told.
    pub promises: Promises,
    /// The order of writes in this life as primary.
    pub history: History,
    /// What the disk may hold, as a replica.
    pub mirror: Mirror,
    /// The layers of pre-images: of the gap, and of the history, which may be the same.
    pub layers: Layers,
    /// What the history leads back to.
    pub kept: Option<HistoryPoint>,
    /// Up to which fence it agrees to the holders, as far as the model knows.
    pub agreed: Agreed,
    /// What the disk must still hold, as a replica whose presence flushes waited for.
    pub expected: Option<Expected>,
    /// Whether nobody but its agent that runs knows that a primary was set back.
    pub must_remember: bool,
    /// What was decided of the promotion that is under way; nothing where an operator insists and has asked nobody yet.
    pub decided: Option<Decision>,
    /// Who held the fence before it.
    pub promoted_after: usize,
    /// Who the volume's hosts are, as far as it knows.
    pub members: Members,
    /// What it takes for the time.
    pub clock: Clock,
    /// Until when nothing happens here.
    pub frozen_until: Duration,
    /// Until when nothing can be written to its state folder.
    pub state_fails_until: Duration,
    /// Whether that is for want of room.
    pub state_is_full: bool,
    /// What of it hangs.
    pub hangs: Hangs,
    /// What it was told of promotions in this life.
    pub claims: Claims,
    /// Why it does not know whether it leads, as a primary that has asked the others.
    pub doubts: BTreeSet<Doubt>,
    /// Whether an operator keeps greetings away.
    pub is_held: bool,
    /// The demotion that is under way.
    pub demotion: Option<Demotion>,
    /// The fence that it is promoted after because its holder was demoted for it.
    pub takes_over: Option<Fence>,
    /// The fence that it was demoted with when it was promoted again because nobody took over.
    pub went_on_from: Option<Fence>,
    /// The fence of the host that was promoted since.
    pub superseded: Option<Fence>,
    /// Lives of primaries in which something was answered that this copy knows of.
    pub known_lives: BTreeSet<(usize, u64)>,
    /// Whether it is what it was before, and has adopted nothing since.
    pub is_set_back: bool,
    /// The copy that its disk was recovered from, until its metadata says so.
    pub adopting: Option<Adopting>,
    /// What its disks held when they were remembered last.
    pub snapshot: Option<Snapshot>,
    /// Whom greetings were taken from, by the number of their fences.
    pub followed: BTreeMap<u64, HostId>,
    /// The copies that have welcomed this host as a primary in this life, by their host.
    pub heard: BTreeMap<usize, CopyId>,
    /// Changes of the superblock that wait for the one that is being written.
    pub(super) superblock_work: VecDeque<SuperblockWork>,
    /// The number of the superblock that was last written whole.
    serial: u64,
}

/// What a primary wants its superblock to say.
#[derive(Debug)]
pub(super) enum SuperblockWork {
    /// The number of the next session, for this link.
    Session(LinkId),
    /// A generation, when those of the maps are kept.
    Generation { kept: Vec<GenerationId>, first: Epoch, end: Epoch },
    /// Up to which epoch others may be told.
    Told(Epoch),
    /// That nothing is absent any more.
    Filled,
}

/// The name of a host.
#[must_use]
pub fn host_id(number: usize) -> HostId {
    HostId([number as u8 + 1; 32])
}

/// The number of a host.
#[must_use]
pub fn host_number(id: HostId) -> usize {
    usize::from(id.0[0]) - 1
}

impl Host {
    /// A host whose volume is new; the first is its primary.
    #[must_use]
    pub fn new(settings: &Settings, number: usize) -> Self {
        let is_first = number == 0;
        let empty = Superblock::empty(
            VOLUME,
            CopyId([number as u8 + 1; 16]),
            settings.size_bytes,
            settings.block_size,
        );
        let superblock = match is_first {
            true => Superblock {
                role: Role::Primary,
                data: DataState::Consistent,
                fence: Fence { counter: 1, holder: host_id(0) },
                lineage: vec![GenerationId([0xff; 16])],
                agreed: 1,
                ..empty
            },
            false => empty,
        };
        let mut host = Self {
            number,
            disk: Disk::new(settings.sector_bytes[number]),
            files: Files::default(),
            superblock,
            life: 0,
            start_is_planned: false,
            waited_at: Duration::ZERO,
            ended_operations: 0,
            shell: Shell::Down,
            application: Application::default(),
            promises: Promises::default(),
            history: History::default(),
            mirror: Mirror::default(),
            layers: Layers::default(),
            kept: None,
            agreed: Agreed::up_to(u64::from(is_first)),
            expected: None,
            must_remember: false,
            decided: None,
            promoted_after: 0,
            members: Members::all(settings.sector_bytes.len(), number),
            clock: Clock::default(),
            frozen_until: Duration::ZERO,
            state_fails_until: Duration::ZERO,
            state_is_full: false,
            hangs: Hangs::default(),
            claims: Claims::default(),
            doubts: BTreeSet::new(),
            is_held: false,
            demotion: None,
            takes_over: None,
            went_on_from: None,
            superseded: None,
            known_lives: BTreeSet::new(),
            is_set_back: false,
            adopting: None,
            snapshot: None,
            followed: BTreeMap::new(),
            heard: BTreeMap::new(),
            superblock_work: VecDeque::new(),
            serial: 0,
        };
        for (serial, record) in activity_log::ring_after(0, false) {
            host.files.write_now(activity_log::FILE_NAME, activity_log::record_offset(serial), &record);
        }
        host.write_superblock_now();
        host
    }

    /// The machine of a primary, while one runs.
    #[must_use]
    pub fn tracker(&self) -> Option<&Tracker> {
        match &self.shell {
            Shell::Primary(shell) => Some(&shell.tracker),
            Shell::Down | Shell::Replica(_) | Shell::Rewriting(_) => None,
        }
    }

    /// The machine of a primary, while one runs.
    pub fn tracker_mut(&mut self) -> Option<&mut Tracker> {
        match &mut self.shell {
            Shell::Primary(shell) => Some(&mut shell.tracker),
            Shell::Down | Shell::Replica(_) | Shell::Rewriting(_) => None,
        }
    }

    /// The generations that it goes by: a primary knows more of them than it has recorded, where a copy was met while the
    /// newest was being recorded.
    #[must_use]
    pub fn known_lineage(&self) -> &[GenerationId] {
        self.tracker().map_or(&self.superblock.lineage, Tracker::lineage)
    }

    /// Whether an agent runs.
    #[must_use]
    pub fn is_up(&self) -> bool {
        !matches!(self.shell, Shell::Down)
    }

    /// Whether the host is primary, or will be when it starts.
    #[must_use]
    pub fn is_primary(&self) -> bool {
        let is_promoting = match &self.shell {
            Shell::Rewriting(rewriting) => matches!(rewriting.purpose, Purpose::Promotion(_)),
            Shell::Down | Shell::Primary(_) | Shell::Replica(_) => false,
        };
        self.superblock.role == Role::Primary && !is_promoting
    }

    /// Whether the machine counts its backing as failed.
    #[must_use]
    pub fn has_failed(&self) -> bool {
        match &self.shell {
            Shell::Down | Shell::Rewriting(_) => false,
            Shell::Primary(shell) => shell.tracker.has_failed(),
            Shell::Replica(shell) => shell.machine.has_failed(),
        }
    }

    /// Whether nothing is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        match &self.shell {
            Shell::Down => true,
            Shell::Rewriting(_) => false,
            Shell::Primary(shell) => shell.is_idle(),
            Shell::Replica(shell) => shell.is_idle(),
        }
    }

    /// What the activity log's file says.
    #[must_use]
    pub fn recover_log(&self) -> Recovered {
        let bytes = self.files.bytes(activity_log::FILE_NAME, activity_log::FILE_BYTES);
        activity_log::recover(&bytes).expect("the log is no newer than this code")
    }

    /// What the file of the map for another host says.
    #[must_use]
    pub fn recover_map(&self, peer: usize) -> DirtyMap {
        let Superblock { size_bytes, block_size, .. } = self.superblock;
        let fresh = DirtyMap::full(VOLUME, host_id(peer), size_bytes, block_size);
        let name = dirty_map::file_name(host_id(peer));
        let header = self.files.bytes(&name, 2 * PAGE_BYTES as u64);
        let pages = self.files.pages_from(&name, 2 * PAGE_BYTES as u64);
        let adopted = self.superblock.adopted;
        let is_there = header.iter().any(|byte| *byte != 0);
        let mut map = match DirtyMap::recover(&fresh, &header, pages) {
            Ok(map) => map,
            Err(_) if is_there => fresh.lost(),
            Err(_) => fresh,
        };
        if map.base().adopted != adopted {
            map.begin_anew(Base { adopted, ..Base::default() });
        }
        map
    }

    /// The map of a peer that a primary begins to send to: where there is none that holds, all may differ.
    pub(super) fn begin_map(&mut self, peer: usize) {
        if self.recover_map(peer).base().is_none() {
            self.void_map(peer);
        }
    }

    /// Nobody marks any more what a peer lacks.
    pub(super) fn void_map(&mut self, peer: usize) {
        let Superblock { size_bytes, block_size, .. } = self.superblock;
        let base = self.superblock.base_of_everything();
        let file = DirtyMap::file_of_everything(
            VOLUME,
            host_id(peer),
            size_bytes,
            block_size,
            base,
            Some(&Given::NOTHING),
        );
        let name = dirty_map::file_name(host_id(peer));
        self.files.remove(&name);
        for (page, offset) in file.chunks(PAGE_BYTES).zip((0..).step_by(PAGE_BYTES)) {
            self.files.write_now(&name, offset, page.try_into().expect("it is a page"));
        }
    }

    /// The superblock as it is to be written. One that could not be written is written in the same place again.
    pub(super) fn superblock_batches(&self) -> VecDeque<Batch> {
        let serial = self.serial + 1;
        let page = Box::new(self.superblock.encode(serial));
        let [slot, twin] = superblock::places(serial);
        VecDeque::from([vec![(slot, Some(page.clone()))], vec![(twin, Some(page))]])
    }

    /// The superblock was written.
    pub(super) fn superblock_written(&mut self) {
        self.serial += 1;
    }

    /// Writes the superblock at once, durably.
    pub(super) fn write_superblock_now(&mut self) {
        self.serial += 1;
        let page = self.superblock.encode(self.serial);
        for place in superblock::places(self.serial) {
            self.files.write_now(superblock::FILE_NAME, place, &page);
        }
    }

    pub(super) fn recover_superblock(&mut self) {
        let bytes = self.files.bytes(superblock::FILE_NAME, superblock::FILE_BYTES);
        (self.serial, self.superblock) = Superblock::recover(&bytes).expect("a superblock is whole");
    }

    /// The newest superblock is there twice again.
    pub(super) fn write_missing_twin(&mut self) {
        let bytes = self.files.bytes(superblock::FILE_NAME, superblock::FILE_BYTES);
        if let Some((place, page)) = Superblock::missing_twin(&bytes) {
            self.files.write_now(superblock::FILE_NAME, place, &page);
        }
    }

    /// How far it is, as its metadata says durably.
    pub(super) fn mark(&self) -> Mark {
        super::set_back::mark_of(&self.files)
    }

    /// What the superblock's file says.
    pub(super) fn durable_superblock(&self) -> Superblock {
        let bytes = self.files.bytes(superblock::FILE_NAME, superblock::FILE_BYTES);
        Superblock::recover(&bytes).expect("a superblock is whole").1
    }
}

impl World {
    /// Starts a host's agent in the role that its superblock says, after ending the one that runs.
    pub fn start(&mut self, host: usize) {
        if self.hosts[host].is_up() {
            self.crash(host, Crash::Process);
        }
        if self.state_is_out(host) {
            // The agent waits for it (X6).
            let delay = self.hosts[host].state_is_out_until() - self.now;
            return self.plan_start(host, delay);
        }
        self.rot(host);
        let it = &mut self.hosts[host];
        it.start_is_planned = false;
        it.life += 1;
        it.recover_superblock();
        it.write_missing_twin();
        let (life, role) = (it.life, it.superblock.role);
        self.note(|| format!("host {host} starts its life {life} as {role:?}"));
        match self.hosts[host].adopting.clone() {
            Some(adopting) => self.adopt(host, &adopting),
            None => self.open_volume(host),
        }
    }

    /// The volume is opened in the role that its superblock says.
    pub(super) fn open_volume(&mut self, host: usize) {
        match self.hosts[host].superblock.role {
            Role::Primary => self.start_primary(host, true),
            Role::Replica => self.start_replica(host),
        }
    }

    /// Ends a host's agent, or takes the host's power.
    pub fn crash(&mut self, host: usize, crash: Crash) {
        self.note(|| format!("host {host} crashes: {crash:?}"));
        self.expected_of(host, Promises::crash);
        self.check_disk(host);
        let it = &mut self.hosts[host];
        it.superblock_work.clear();
        it.heard.clear();
        it.hangs.crash();
        (it.is_held, it.demotion, it.superseded) = (false, None, None);
        it.clock.wake(self.now, it.frozen_until);
        it.frozen_until = Duration::ZERO;
        it.claims = Claims::default();
        it.doubts.clear();
        it.disk.crash(crash, &mut self.random);
        it.files.crash(&mut self.random);
        if self.settings.rebuilds {
            it.distrust_absent();
        }
        if let Shell::Rewriting(rewriting) = std::mem::replace(&mut it.shell, Shell::Down) {
            self.rewriting_has_crashed(host, rewriting.purpose);
        }
        let it = &mut self.hosts[host];
        (it.decided, it.takes_over) = (None, None);
        it.promises.crash();
        if crash == Crash::Power {
            it.promises.power_was_lost(&it.disk);
        }
        it.application.waiting.clear();
        self.check_disk(host);
        self.cut_off(host);
    }

    /// Does something with what replicas must still have of this primary's promises.
    pub(super) fn expected_of(&mut self, primary: usize, change: impl Fn(&mut Promises)) {
        for other in &mut self.hosts {
            if let Some(expected) = other.expected.as_mut().filter(|expected| expected.primary == primary) {
                change(&mut expected.promises);
                change(&mut expected.all);
            }
        }
    }

    /// Crashes a host that runs, and plans its start.
    pub fn take_down(&mut self, host: usize, crash: Crash) {
        if self.hosts[host].must_remember {
            return;
        }
        if self.hosts[host].is_up() {
            self.crash(host, crash);
        }
        self.plan_restart(host);
    }

    /// A host that is down starts again some time, if nobody has seen to that yet.
    pub(super) fn plan_restart(&mut self, host: usize) {
        if !self.hosts[host].start_is_planned {
            let delay = self.random.up_to(self.settings.outage);
            self.plan_start(host, delay);
        }
    }

    /// A host starts after this time, unless it is started before.
    pub(super) fn plan_start(&mut self, host: usize, delay: Duration) {
        let it = &mut self.hosts[host];
        it.start_is_planned = true;
        let life = it.life;
        self.plan(delay, Event::Start(host, life));
    }

    /// A replica is thrown away, and another one joins in its place; or its disk is, and its agent goes on with another.
    pub fn replace(&mut self, host: usize) {
        self.crash(host, Crash::Power);
        self.note(|| format!("host {host} is replaced"));
        let number = self.next_operation();
        let keeps_state = self.random.once_in(2);
        let life = self.hosts[host].life;
        let (members, clock) = (self.hosts[host].members.clone(), self.hosts[host].clock.clone());
        let mut fresh = Host { life, members, clock, ..Host::new(&self.settings, host) };
        if keeps_state {
            // Only its disk is another one: what the state folder says of the old one's content is of no use.
            let old = &mut self.hosts[host];
            old.recover_superblock();
            fresh.superblock = old.superblock.clone();
            layers::Purpose::ALL.into_iter().for_each(|purpose| fresh.superblock.layers.set(purpose, None));
            (fresh.files, fresh.serial) = (std::mem::take(&mut old.files), old.serial);
            fresh.followed = std::mem::take(&mut old.followed);
            fresh.agreed = old.agreed.clone();
        } else {
            (fresh.superblock.fence, fresh.superblock.agreed) = (Fence::default(), 0);
            fresh.superblock.lineage.clear();
        }
        fresh.superblock.role = Role::Replica;
        fresh.superblock.data = DataState::Empty;
        fresh.superblock.copy = CopyId([0xff; 16]);
        fresh.superblock.copy.0[..8].copy_from_slice(&number.to_be_bytes());
        fresh.write_superblock_now();
        self.hosts[host] = fresh;
        self.differences.forget(host);
        self.start(host);
    }

    /// A disk operation of a host ended.
    pub(super) fn disk_ended(&mut self, host: usize, id: DiskOperation) {
        let fails = self.fails() | self.hosts[host].hangs.disk_has_failed(id);
        let it = &mut self.hosts[host];
        let Some(ended) = it.disk.end(id, fails, &mut self.random) else { return };
        it.ended_operations += 1;
        match it.shell {
            Shell::Down => panic!("a crash ends operations"),
            Shell::Rewriting(_) => self.rewriting_disk_ended(host, id, &ended),
            Shell::Primary(_) => self.primary_disk_ended(host, id, ended, fails),
            Shell::Replica(_) => self.replica_disk_ended(host, id, ended, fails),
        }
    }

    /// A batch of a metadata write of a host ended.
    pub(super) fn file_ended(&mut self, host: usize, id: FileOperation) {
        let fails = self.fails() || self.state_fails(host);
        let is_taken_for_done = planted(Bug::TakeHungForDone) && self.state_hangs(host);
        let it = &mut self.hosts[host];
        let fails = fails | it.hangs.file_has_failed(id) | is_taken_for_done;
        let step = it.files.step(id, fails, &mut self.random);
        it.ended_operations += u64::from(step.is_some());
        match step {
            None => {}
            Some(Step::More) => self.plan_file(host, id),
            Some(Step::Done(good)) => {
                let good = good || is_taken_for_done;
                match it.shell {
                    Shell::Down => panic!("a crash ends operations"),
                    Shell::Rewriting(_) => self.rewriting_file_ended(host, good),
                    Shell::Primary(_) => self.primary_file_ended(host, id, good),
                    Shell::Replica(_) => self.replica_file_ended(host, id, good),
                }
            }
        }
    }

    /// Plans the end of a disk operation, which may take longer by so much.
    pub(super) fn plan_disk(&mut self, host: usize, id: DiskOperation, longer: Duration) {
        let delay = self.random.up_to(self.settings.disk_delay[host] + longer);
        self.plan(delay, Event::Disk(host, id));
    }

    /// Plans the end of a metadata write's next batch.
    pub(super) fn plan_file(&mut self, host: usize, id: FileOperation) {
        let delay = self.random.up_to(self.settings.disk_delay[host]);
        self.plan(delay, Event::File(host, id));
    }
}
