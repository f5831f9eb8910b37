//! One volume on this host: a thread, its own as a rule, that opens the backing and the metadata, serves the devices and
//! drives the shell of its role. Everything between a front end and the disk stays on that thread.
//!
//! Others talk to it by [`Ask`]s. A volume whose backing can't be opened is still there: it says why in its status,
//! refuses sessions, and tries again by itself (`awaiting`). The role is what the superblock says; a change of it is a task of its own that has the shell to
//! itself, while the volume goes on answering (`changes`).

mod awaiting;
mod changes;
mod company;
mod demotion;
mod devices;
mod membership;
mod opening;
mod promotable;
mod promotion;
mod pulse;
mod rebuilding;
mod recoveries;
mod resolution;
mod resolvable;
mod sessions;
mod status;
mod undoing;

use crate::buffer::BufferPool;
use crate::busy_poll;
use crate::clock::Moment;
use crate::config::{Mode, Name, PeerConfig, Role, VolumeConfig};
use crate::control::api::{Better, Elsewhere, Failure, Resolved, VolumeFacts};
use crate::crashes;
use crate::kept::Store;
use crate::primary::{Link, NotCompared, Primary};
use crate::recovery;
use crate::replica::Replica;
use crate::standing::Service;
use crate::state::StateError;
use crate::state::holding::Holding;
use crate::transport::{Connection, ControlReceiver, ControlSender, FrameReceiver, Peers};
use crate::troubles::Troubles;
use crate::words::with_causes;
use awaiting::{Awaiting, Disk};
use blockmirror_protocol::peer::CompareResult;
use blockmirror_protocol::succession::Claims;
use blockmirror_protocol::terms::Fence;
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::StreamPreamble;
use blockmirror_protocol::wire::message::{
    Fetching, Hello, Member, Members, Message, Refusal, Refused, Removal,
};
use changes::{Changing, Event};
pub use demotion::{Demoted, Switched};
use devices::Devices;
use opening::Others;
pub use promotion::Promoted;
pub(crate) use pulse::HUNG;
use pulse::Storages;
pub use pulse::{Pulse, Silence};
use recoveries::Ending;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{broadcast, oneshot};
use tokio::task::spawn_local;
pub use undoing::Undone;

/// How much free memory for buffers a volume keeps, in bytes.
const POOL_BYTES: usize = 64 << 20;

/// How long a volume may take to stop, less than the unit's `TimeoutStopSec`; how often it is looked whether it hangs; and
/// how long one that hangs has to end what it can.
const STOP_TIME: Duration = Duration::from_secs(45);
const STOP_LOOK: Duration = Duration::from_millis(500);
const STOP_GRACE: Duration = Duration::from_secs(3);
/// How long after a host could not be mirrored to, for want of a map, that is tried again.
const LINK_PAUSE: Duration = Duration::from_secs(5);
/// How long a volume's thread waits at its end for calls that its tasks have made on other threads.
const THREADS_TIME: Duration = Duration::from_secs(1);

/// What a volume needs to know of its host.
pub struct Surroundings {
    /// The volume's own state folder.
    pub state_folder: PathBuf,
    /// Where sockets and mount points go.
    pub run_folder: PathBuf,
    /// Where links to loop devices go.
    pub device_folder: PathBuf,
    /// Where what outlives the process is kept.
    pub store: Arc<Store>,
    /// The connections to other hosts.
    pub peers: Peers,
    /// Takes what the volume finds out that belongs into its configuration.
    pub learn: Learn,
    /// This host, as others are told of it.
    pub own: Member,
}

/// Takes what the volume of this name finds out, and waits for nothing.
pub type Learn = Arc<dyn Fn(&Name, Learned) + Send + Sync>;

/// What a volume finds out that belongs into its configuration.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Learned {
    /// The volume's hosts, as its primary tells them, the primary first, and those that were removed.
    Members(Members),
    /// Hosts that were removed, as another one tells.
    Removals(Vec<Removal>),
    /// What this host is, and which other one is the primary, if any is.
    Roles(Role, Option<HostId>),
}

/// Where the answer to something that the operator wants goes.
pub type Answer<Done> = oneshot::Sender<Result<Done, Failure>>;

/// What others want of a volume.
pub enum Ask {
    /// The facts for status.
    Facts(oneshot::Sender<VolumeFacts>),
    /// Whether applications can write here now, and for how long what they are served from has not answered.
    Serves(oneshot::Sender<Service>),
    /// A primary greets.
    Session(Box<Hello>, ControlSender, ControlReceiver),
    /// A primary opened a stream for the answers to what it fetches.
    Fetching(Fetching, ControlSender, ControlReceiver),
    /// A primary opened a stream of frames.
    Frames(StreamPreamble, FrameReceiver),
    /// Whether a recovery could begin; whether inconsistent content is wanted too.
    MayRecover(bool, oneshot::Sender<Result<(), Refused>>),
    /// A recovery begins; whether inconsistent content is wanted too.
    Recover(bool, ControlSender, Connection),
    /// A primary with this fence goes on from this host's copy.
    Lend(Fence, ControlSender, Connection),
    /// A recovery reads.
    Read(Message, ControlSender, ControlReceiver),
    /// A host is a peer no more: nothing is kept for it. Answered when it was told, if it could be.
    Part(HostId, oneshot::Sender<()>),
    /// A replica joined.
    AddPeer(PeerConfig, oneshot::Sender<Result<(), NotAdded>>),
    /// The configuration changed: peers were paused or resumed, or have other addresses or modes.
    Configure(Box<VolumeConfig>),
    /// Others reach this host at these addresses now.
    Moved(Vec<String>),
    /// The keys that two hosts use each.
    Doubled(BTreeSet<HostId>),
    /// Compare with a peer.
    Compare(HostId, oneshot::Sender<Result<CompareResult, NotCompared>>),
    /// Make this replica the primary; whether also where something may be lost.
    Promote(bool, Answer<Promoted>),
    /// Make this primary a replica.
    Demote(Answer<Demoted>),
    /// Make this primary a replica, and that peer the primary.
    Switch(HostId, Answer<Switched>),
    /// Give this host's content up for that host's; or, where it is only to be looked at, say what that would lose.
    Resolve(HostId, bool, Answer<Resolved>),
    /// Bring back what this host had before its content was given up.
    Undo(Answer<Undone>),
    /// Give up for good what could be brought back; says how many bytes that were.
    Forget(Answer<u64>),
    /// Whether this primary may take another disk, also where its copy is a good one.
    MayRebuild(bool, Answer<()>),
    /// Take the disk that the configuration names now.
    Rebuild(Answer<()>),
    /// Take the loop device away, or only if nobody uses it; says who had it open.
    Release(bool, Answer<Vec<String>>),
    /// The primary, this host, was demoted for this one.
    TakeOver(HostId, ControlSender),
    /// Stop serving, in order.
    Stop(oneshot::Sender<()>),
}

/// Why a host that joined is not mirrored to.
#[derive(Debug, thiserror::Error)]
pub enum NotAdded {
    /// What there was of it goes first.
    #[error("this host is just being removed from the volume; try again in a moment")]
    BeingRemoved,
    /// This host is no primary that counts.
    #[error("another host was promoted; use a token that it made")]
    Superseded,
    /// This host is no primary.
    #[error("only a primary takes replicas in")]
    Replica,
    /// The volume is not open, for this reason.
    #[error("the primary's volume is not open: {0}")]
    Closed(String),
    /// The volume's role is just being changed.
    #[error("the primary is just {0}; try again later")]
    Changing(&'static str),
    /// There is no map for it.
    #[error(transparent)]
    State(#[from] StateError),
}

/// A running volume, for other threads.
pub struct Handle {
    asks: UnboundedSender<Ask>,
    thread: Mutex<Option<JoinHandle<()>>>,
    pulse: Arc<Pulse>,
    is_open: Arc<AtomicBool>,
    known: Mutex<Known>,
}

/// What a volume said last.
#[derive(Default)]
struct Known {
    facts: Option<VolumeFacts>,
    /// Since when it says nothing.
    silent_since: Option<Instant>,
}

/// Ends when a volume is open, or is known not to open.
pub type Opened = oneshot::Receiver<()>;

impl Handle {
    /// Starts the volume on a thread of its own; or, where its writes wait for peers, on the transport's if no other volume
    /// is there: then packets and what they bring wake no thread but one. What it is asked before it is open waits.
    ///
    /// # Errors
    /// When no thread can be had.
    pub fn start(config: VolumeConfig, surroundings: Surroundings) -> std::io::Result<(Self, Opened)> {
        let (asks, source) = unbounded_channel();
        let (opened, has_opened) = oneshot::channel();
        let (pulse, is_open) = (Pulse::new(), Arc::new(AtomicBool::new(false)));
        let signs = Signs { pulse: pulse.clone(), is_open: is_open.clone(), opened };
        let handle =
            |thread| Self { asks, thread: Mutex::new(thread), pulse, is_open, known: Mutex::default() };
        let waits_for_peers = config.peers.iter().any(|peer| peer.mode != Mode::Async);
        let place = waits_for_peers.then(|| surroundings.peers.endpoint().place()).flatten();
        if let Some(place) = place {
            place
                .host(move || Box::pin(async move { tell(live(config, surroundings, source, signs).await) }));
            return Ok((handle(None), has_opened));
        }
        let thread = std::thread::Builder::new()
            .name(config.name.as_str().chars().take(15).collect())
            .spawn(move || run(config, surroundings, source, signs))?;
        Ok((handle(Some(thread)), has_opened))
    }

    /// The volume's signs of life.
    #[must_use]
    pub fn pulse(&self) -> &Pulse {
        &self.pulse
    }

    /// Whether it was open, or was known not to open, at least once.
    #[must_use]
    pub fn has_opened(&self) -> bool {
        self.is_open.load(Ordering::Acquire)
    }

    /// The facts for status, within this time. Where the volume does not answer: what it said last, if it ever did, and
    /// what is silent, if it is not just being opened.
    pub async fn facts(&self, limit: Duration) -> Result<VolumeFacts, (Option<VolumeFacts>, Silence)> {
        let asked = Instant::now();
        let facts = tokio::time::timeout(limit, self.answer(Ask::Facts)).await.ok().flatten();
        let mut known = self.known.lock().expect("no holder of the lock panics");
        if let Some(facts) = facts {
            *known = Known { facts: Some(facts.clone()), silent_since: None };
            return Ok(facts);
        }
        let since = *known.silent_since.get_or_insert(asked);
        let silence = self.pulse.silence().unwrap_or(Silence { lasted: since.elapsed(), path: None });
        Err((known.facts.clone(), silence))
    }

    /// Hands the volume something; dropped where its thread is gone.
    pub fn ask(&self, ask: Ask) {
        drop(self.asks.send(ask));
    }

    /// Asks and waits for the answer; nothing where the thread is gone.
    pub async fn answer<Answer>(&self, ask: impl FnOnce(oneshot::Sender<Answer>) -> Ask) -> Option<Answer> {
        let (sender, answer) = oneshot::channel();
        self.ask(ask(sender));
        answer.await.ok()
    }

    /// Stops the volume in order and waits for it.
    ///
    /// # Errors
    /// What does not answer, so that the volume can't end; its thread is left behind.
    pub async fn stop(&self) -> Result<(), Silence> {
        let began = Instant::now();
        let mut stopped = pin!(self.answer(Ask::Stop));
        // No answer means that the thread has ended already.
        while tokio::time::timeout(STOP_LOOK, &mut stopped).await.is_err() {
            let lasted = began.elapsed();
            let hung = self.pulse.hung().filter(|_| lasted >= STOP_GRACE);
            let late = (lasted >= STOP_TIME).then_some(Silence { lasted, path: None });
            if let Some(silence) = hung.or(late) {
                return Err(silence);
            }
        }
        let thread = self.thread.lock().expect("no holder of the lock panics").take();
        if let Some(thread) = thread {
            // Joining doesn't block: the thread answered with its last act. A panic of its own ended the process.
            let _ = thread.join();
        }
        Ok(())
    }
}

/// How a volume shows other threads that it lives.
struct Signs {
    pulse: Arc<Pulse>,
    is_open: Arc<AtomicBool>,
    opened: oneshot::Sender<()>,
}

fn run(config: VolumeConfig, surroundings: Surroundings, source: UnboundedReceiver<Ask>, signs: Signs) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return tracing::error!(volume = %config.name, "no runtime for the volume: {error}"),
    };
    let stopped = runtime.block_on(live(config, surroundings, source, signs));
    // A thread that waits for a disk which hangs is left behind.
    runtime.shutdown_timeout(THREADS_TIME);
    tell(stopped);
}

/// A volume from its opening to its end; gives whom to tell of that. Its last tasks have ended by then.
async fn live(
    config: VolumeConfig,
    surroundings: Surroundings,
    source: UnboundedReceiver<Ask>,
    signs: Signs,
) -> Option<oneshot::Sender<()>> {
    let worker = crashes::Worker::volume(&surroundings.state_folder);
    let tasks = tokio::task::LocalSet::new();
    worker
        .does(tasks.run_until(async move {
            spawn_local(busy_poll::stay_awake());
            let folder = surroundings.state_folder.clone();
            spawn_local({
                let folder = folder.clone();
                async move {
                    tokio::time::sleep(crashes::QUIET_TIME).await;
                    tidy(&folder);
                }
            });
            let storages = Storages::default();
            spawn_local(pulse::keep(signs.pulse, storages.clone()));
            let (mut volume, events) = Volume::open(config, surroundings, storages).await;
            signs.is_open.store(true, Ordering::Release);
            let _ = signs.opened.send(());
            let stopped = volume.serve(source, events).await;
            // It was stopped in order.
            tidy(&folder);
            stopped
        }))
        .await
}

/// A volume that does well begins to count its panics anew; one that is closed for them does not.
fn tidy(folder: &Path) {
    if crashes::obstacle(folder).is_none()
        && let Err(error) = crashes::forget(folder)
    {
        tracing::warn!("{} can't be tidied: {error}", folder.display());
    }
}

fn tell(stopped: Option<oneshot::Sender<()>>) {
    if let Some(stopped) = stopped {
        let _ = stopped.send(());
    }
}

/// A volume on its thread.
struct Volume {
    config: RefCell<VolumeConfig>,
    surroundings: Rc<Surroundings>,
    storage_kind: String,
    pool: BufferPool,
    storages: Storages,
    /// What the open backing is read with.
    disk: Option<Rc<Disk>>,
    awaiting: Awaiting,
    troubles: Rc<Troubles>,
    role: OpenRole,
    devices: Devices,
    /// Where others reach this host.
    addresses: RefCell<Vec<String>>,
    /// Who keeps a superseded primary's devices open, as last seen, in words.
    openers: Vec<String>,
    /// Hosts that were demoted for this one while it changed its role, and since when they wait.
    taking_over: Vec<(HostId, ControlSender, Moment)>,
    /// How large the backing was when it was first opened, in bytes.
    first_size: Cell<Option<u64>>,
    /// What tells whether something else writes to the backing, while that is open.
    holding: Option<Rc<Holding>>,
    /// What it told, until all was compared.
    touched: RefCell<Option<Touched>>,
    recovery: Rc<RefCell<Option<Rc<recovery::Source>>>>,
    /// What ends recoveries, for the streams on which they were asked for.
    endings: broadcast::Sender<Ending>,
    events: UnboundedSender<Event>,
    /// Hosts whose keys others use as well.
    doubled: BTreeSet<HostId>,
    /// Whether the volume was open since the agent started.
    has_opened: bool,
    /// Members' words that another host was promoted.
    claims: Rc<RefCell<Claims>>,
    /// Whether a replica's next question who the hosts are is due by itself.
    asks_members: bool,
    /// Whether hosts that could not be linked will be tried again.
    links_later: bool,
    /// When a primary last heard from another host, in seconds since 1970.
    company: Rc<Cell<Option<u64>>>,
    /// On a replica without a primary: a host that was heard and is to be promoted rather than this one.
    better: Option<Better>,
    /// On a replica without a primary: a host that was heard of and went on elsewhere.
    elsewhere: Option<Elsewhere>,
}

/// The backing was written by something else, as this run of the agent found. A replica's superblock says it for all runs.
struct Touched {
    /// When, in words.
    words: String,
    /// Whether what follows from it has to be done when the volume is opened next.
    is_due: bool,
}

enum OpenRole {
    Closed(String),
    Primary(Rc<Primary>, BTreeMap<HostId, Rc<Link>>),
    Replica(Rc<Replica>),
    /// The shell is in the hands of a change.
    Changing(Changing),
}

impl Volume {
    async fn open(
        config: VolumeConfig,
        surroundings: Surroundings,
        storages: Storages,
    ) -> (Self, UnboundedReceiver<Event>) {
        let (events, source) = unbounded_channel();
        let mut volume = Self {
            config: RefCell::new(config),
            addresses: RefCell::new(surroundings.own.addresses.clone()),
            surroundings: Rc::new(surroundings),
            storage_kind: String::new(),
            pool: BufferPool::new(POOL_BYTES),
            storages,
            disk: None,
            awaiting: Awaiting::default(),
            troubles: Rc::default(),
            role: OpenRole::Closed(String::new()),
            devices: Devices::default(),
            openers: Vec::new(),
            taking_over: Vec::new(),
            holding: None,
            touched: RefCell::default(),
            recovery: Rc::default(),
            endings: broadcast::channel(8).0,
            events,
            doubled: BTreeSet::new(),
            has_opened: false,
            claims: Rc::default(),
            asks_members: false,
            links_later: false,
            company: Rc::default(),
            better: None,
            elsewhere: None,
            first_size: Cell::new(None),
        };
        volume.reopen(Others::Ask).await;
        (volume, source)
    }

    fn name(&self) -> Name {
        self.config.borrow().name.clone()
    }

    fn link(&self, primary: &Rc<Primary>, peer: &PeerConfig) -> Rc<Link> {
        primary.limit_resync(peer.host, self.resync_limit(peer));
        let (events, host) = (self.events.clone(), peer.host);
        let superseded = move |told| drop(events.send(Event::Told(told)));
        let events = self.events.clone();
        let link = Link::new(peer, superseded, move || drop(events.send(Event::AskMembers(host))));
        link.set_doubled(self.doubled.contains(&host));
        spawn_local(link.clone().keep_linked(primary.clone(), self.surroundings.peers.clone()));
        link
    }

    /// How fast a resync of a peer may be: no faster than all together.
    fn resync_limit(&self, peer: &PeerConfig) -> Option<NonZeroU64> {
        let own = peer.resync_limit.and_then(|limit| NonZeroU64::new(limit.0));
        own.into_iter().chain(self.surroundings.peers.resync_limit().rate_bytes()).min()
    }

    /// Tells all links who the volume's hosts are.
    fn introduce(&self, links: &BTreeMap<HostId, Rc<Link>>) {
        let members = self.members();
        for link in links.values() {
            link.introduce(members.clone());
        }
    }

    /// Every host of the volume, this primary first, and those that were removed.
    fn members(&self) -> Members {
        let config = self.config.borrow();
        let addresses = self.addresses.borrow().clone();
        let own = Member { addresses, version: config.version, ..self.surroundings.own.clone() };
        let members = std::iter::once(own).chain(config.members()).collect();
        Members { members, removed: config.removals().collect() }
    }

    /// This host is reached elsewhere than before.
    fn tell_addresses(&self, addresses: Vec<String>) {
        *self.addresses.borrow_mut() = addresses;
        if let OpenRole::Primary(primary, links) = &self.role {
            self.introduce(links);
            primary.tell_members(self.members());
        }
    }

    /// Answers asks until it is told to stop; gives whom to tell that it did.
    async fn serve(
        &mut self,
        mut source: UnboundedReceiver<Ask>,
        mut events: UnboundedReceiver<Event>,
    ) -> Option<oneshot::Sender<()>> {
        loop {
            tokio::select! {
                ask = source.recv() => match ask? {
                    Ask::Stop(stopped) => {
                        self.stop(&mut events).await;
                        return Some(stopped);
                    }
                    ask => self.take(ask).await,
                },
                Some(event) = events.recv() => self.handle(event).await,
            }
        }
    }

    async fn take(&mut self, ask: Ask) {
        if matches!(ask, Ask::Promote(..) | Ask::Resolve(..) | Ask::Undo(_) | Ask::Forget(_)) {
            self.take_up_failed().await;
        }
        match ask {
            Ask::Facts(answer) => drop(answer.send(self.facts().await)),
            Ask::Serves(answer) => self.tell_service(answer),
            Ask::Session(greeting, sender, receiver) => self.begin_session(*greeting, sender, receiver).await,
            Ask::Fetching(fetching, sender, receiver) => self.answer_fetches(fetching, sender, receiver),
            Ask::Frames(preamble, frames) => self.take_frames(preamble, frames),
            Ask::MayRecover(accept_inconsistent, answer) => {
                drop(answer.send(self.recoverable(accept_inconsistent, None).map(|_| ())));
            }
            Ask::Recover(accept_inconsistent, sender, connection) => {
                self.begin_recovery(accept_inconsistent, sender, connection).await;
            }
            Ask::Lend(fence, sender, connection) => self.lend(fence, sender, connection).await,
            Ask::Read(first, sender, receiver) => self.read_for_recovery(first, sender, receiver),
            Ask::Part(host, answer) => self.part(host, answer),
            Ask::AddPeer(peer, answer) => drop(answer.send(self.add_peer(peer).await)),
            Ask::Configure(config) => {
                self.configure(*config);
                self.link_all().await;
            }
            Ask::Moved(addresses) => self.tell_addresses(addresses),
            Ask::Doubled(hosts) => self.keep_from(hosts),
            Ask::Compare(host, answer) => self.compare(host, answer),
            Ask::Promote(force, answer) => self.promote(force, answer),
            Ask::Demote(answer) => self.demote(answer, None).await,
            Ask::Switch(host, answer) => self.switch(host, answer, None).await,
            Ask::Resolve(keep, dry_run, answer) => self.resolve(keep, dry_run, answer).await,
            Ask::Undo(answer) => self.undo(answer),
            Ask::Forget(answer) => self.forget(answer),
            Ask::MayRebuild(overwrite, answer) => drop(answer.send(self.may_rebuild(overwrite).await)),
            Ask::Rebuild(answer) => self.rebuild(answer).await,
            Ask::Release(force, answer) => self.release(force, answer, None).await,
            Ask::TakeOver(host, sender) => self.take_over(host, sender),
            Ask::Stop(_) => unreachable!("the loop takes it"),
        }
    }

    async fn stop(&mut self, events: &mut UnboundedReceiver<Event>) {
        self.end_change(events).await;
        if let OpenRole::Primary(primary, _) = &self.role {
            if primary.superseded().is_none() {
                // Before anything fails because of the end.
                self.devices.leave().await;
            }
            // The front ends may hold writes back until those before are answered.
            primary.wait_no_more();
        }
        let devices = std::mem::take(&mut self.devices);
        devices.stop().await;
        match &self.role {
            OpenRole::Primary(primary, links) => {
                links.values().for_each(|link| link.stop());
                primary.close().await;
            }
            OpenRole::Replica(replica) => replica.close().await,
            OpenRole::Closed(_) | OpenRole::Changing(_) => {}
        }
        self.role = OpenRole::Closed(String::new());
        self.let_go().await;
    }

    /// Notes what the backing looks like that was open until now.
    async fn let_go(&mut self) {
        if let Some(holding) = self.holding.take() {
            holding.close().await;
        }
    }

    /// Something else wrote to the backing that is open here: nothing is in sync until all is compared (X4).
    async fn note_touched(&mut self, words: String) {
        tracing::warn!(
            volume = %self.name(),
            "{}: {words}; all of it is compared before anything counts as in sync",
            self.config.borrow().backing.display()
        );
        let is_due = !matches!(self.role, OpenRole::Primary(..));
        *self.touched.borrow_mut() = Some(Touched { words, is_due });
        match &self.role {
            OpenRole::Primary(primary, _) => primary.doubt_everything(),
            OpenRole::Replica(replica) => {
                replica.close().await;
                self.reopen(Others::Known).await;
            }
            // A promotion that nobody insists on is not recorded.
            OpenRole::Changing(change) => change.progress.is_touched.set(true),
            OpenRole::Closed(_) => {}
        }
    }

    /// Tells what is served, after a look whether the disk answers: one that hangs while nobody uses it shows by nothing
    /// else.
    fn tell_service(&self, answer: oneshot::Sender<Service>) {
        let (serves, disk, storages) = (self.serves(), self.disk.clone(), self.storages.clone());
        let missed = matches!(self.role, OpenRole::Closed(_)).then(|| self.awaiting.since()).flatten();
        spawn_local(async move {
            let answers = match &disk {
                // One that is used shows by what is under way that it hangs.
                Some(disk) if serves => disk.answers(awaiting::ANSWER_TIME).await,
                _ => storages.oldest().is_none_or(|call| call.since.elapsed() < HUNG),
            };
            let oldest = storages.oldest().filter(|_| !answers).map(|call| call.since);
            let since = oldest.into_iter().chain(missed).min();
            let silent = since.map(|since| since.elapsed().max(Duration::from_millis(1)));
            // Nobody waits any more when the answer took too long.
            let _ = answer.send(Service { serves, silent: silent.unwrap_or_default() });
        });
    }

    /// Whether applications can write.
    fn serves(&self) -> bool {
        match &self.role {
            OpenRole::Primary(primary, _) => primary.superseded().is_none() && primary.failure().is_none(),
            OpenRole::Replica(_) | OpenRole::Closed(_) | OpenRole::Changing(_) => false,
        }
    }

    /// Sees to it that a host that joined is mirrored to.
    async fn add_peer(&mut self, peer: PeerConfig) -> Result<(), NotAdded> {
        match &self.role {
            OpenRole::Primary(_, links) if links.contains_key(&peer.host) => return Ok(()),
            OpenRole::Primary(primary, _) if primary.has_peer(peer.host) => {
                return Err(NotAdded::BeingRemoved);
            }
            OpenRole::Primary(primary, _) if primary.superseded().is_some() => {
                return Err(NotAdded::Superseded);
            }
            OpenRole::Primary(..) => {}
            OpenRole::Replica(_) => return Err(NotAdded::Replica),
            OpenRole::Closed(text) => return Err(NotAdded::Closed(text.clone())),
            OpenRole::Changing(change) => {
                return Err(NotAdded::Changing(change.words));
            }
        }
        Ok(self.link_new(&peer).await?)
    }

    /// Sees to it that every host of the configuration is mirrored to: the save of one that joined may have come later than
    /// whoever asked for it waited. What fails is tried again in a while.
    pub(super) async fn link_all(&mut self) {
        let OpenRole::Primary(primary, links) = &self.role else { return };
        if primary.superseded().is_some() {
            return;
        }
        // One that is just being removed is linked when it is.
        let is_new = |peer: &&PeerConfig| !links.contains_key(&peer.host) && !primary.has_peer(peer.host);
        let new: Vec<PeerConfig> = self.config.borrow().peers.iter().filter(is_new).cloned().collect();
        let mut has_failed = false;
        for peer in new {
            if let Err(error) = self.link_new(&peer).await {
                tracing::error!(volume = %self.name(), peer = %peer.name, "{}; it is tried again", with_causes(&error));
                has_failed = true;
            }
        }
        // One attempt is awaited at a time, however often this is asked for.
        if has_failed && !std::mem::replace(&mut self.links_later, true) {
            self.later(LINK_PAUSE, Event::LinkAgain);
        }
    }

    async fn link_new(&mut self, peer: &PeerConfig) -> Result<(), StateError> {
        let OpenRole::Primary(primary, _) = &self.role else { return Ok(()) };
        let (primary, window_bytes) = (primary.clone(), self.config.borrow().window.0);
        primary.add_peer(peer.host, peer.mode.into(), window_bytes).await?;
        let link = self.link(&primary, peer);
        if let OpenRole::Primary(_, links) = &mut self.role {
            links.insert(peer.host, link);
        }
        if let OpenRole::Primary(_, links) = &self.role {
            self.introduce(links);
            if links.len() == 2 {
                // The one that was alone keeps no activity log (D5). It is greeted anew, and does then, before the new
                // one can have followed.
                links.values().filter(|link| link.host() != peer.host).for_each(|link| link.greet_anew());
            }
        }
        primary.tell_members(self.members());
        Ok(())
    }

    fn configure(&mut self, mut config: VolumeConfig) {
        // What the superblock says is newer than what the configuration did when it was changed.
        match &self.role {
            OpenRole::Primary(..) => config.set_roles(Role::Primary, None),
            OpenRole::Replica(_) => config.role = Role::Replica,
            OpenRole::Closed(_) | OpenRole::Changing(_) => config.role = self.config.borrow().role,
        }
        *self.config.borrow_mut() = config;
        let config = self.config.borrow();
        match &self.role {
            OpenRole::Primary(primary, links) => {
                let modes: Vec<_> = config.peers.iter().map(PeerConfig::wanted).collect();
                primary.configure(&modes, config.replica_loss());
                if !config.awaits_majority() {
                    primary.await_no_majority();
                }
                // A replica learns the modes, too: they go with the volume. Each link's next greeting tells of them.
                self.introduce(links);
                primary.tell_members(self.members());
                for peer in &config.peers {
                    if let Some(link) = links.get(&peer.host) {
                        link.configure(peer);
                        primary.limit_resync(peer.host, self.resync_limit(peer));
                    }
                }
            }
            OpenRole::Replica(replica) => {
                replica.configure(&config);
                if config.peers.iter().any(|peer| peer.paused && peer.role == Role::Primary) {
                    replica.leave();
                    replica.dismiss(paused());
                }
            }
            OpenRole::Closed(_) | OpenRole::Changing(_) => {}
        }
    }

    fn compare(&self, host: HostId, mut answer: oneshot::Sender<Result<CompareResult, NotCompared>>) {
        let OpenRole::Primary(primary, _) = &self.role else {
            return drop(answer.send(Err(NotCompared::NotPrimary)));
        };
        let (primary, troubles) = (primary.clone(), self.troubles.clone());
        spawn_local(async move {
            let result = tokio::select! {
                result = primary.compare(host) => result,
                // Nobody waits any more when the tool was interrupted.
                () = answer.closed() => return,
            };
            let is_well =
                |result: &CompareResult| result.different.is_empty() && result.unreadable.is_empty();
            if result.as_ref().is_ok_and(is_well) {
                troubles.forget();
            }
            drop(answer.send(result));
        });
    }
}

/// What a primary is told that this host's operator keeps away.
pub(crate) fn paused() -> Refused {
    Refused { refusal: Refusal::Paused, text: "the operator of the replica paused the link".to_owned() }
}

/// Says no on a control stream, and sees to it that it arrives.
pub(crate) fn refuse(sender: ControlSender, refusal: Refusal, text: String) {
    sender.end_with(Refused { refusal, text }, None);
}
