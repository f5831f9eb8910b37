//! One volume on this host: a thread of its own that opens the backing and the metadata, serves the devices and drives
//! the shell of its role. Everything between a front end and the disk stays on that thread.
//!
//! Others talk to it by [`Ask`]s. A volume whose backing can't be opened is still there: it says why in its status,
//! and refuses sessions.

mod devices;
mod status;

use crate::backing;
use crate::buffer::BufferPool;
use crate::config::{Name, PeerConfig, Role, VolumeConfig};
use crate::control::api::VolumeFacts;
use crate::export::Export;
use crate::metadata::State;
use crate::primary::{Peer, Primary};
use crate::recovery;
use crate::replica::{Recovery, Replica};
use crate::storage::file::{Access, File, OpenError};
use crate::storage::{self, Storage};
use crate::transport::{Connection, ControlReceiver, ControlSender, FrameReceiver, Peers, key};
use crate::words::{with_causes, with_name};
use blockmirror_protocol::disk::superblock::Superblock;
use blockmirror_protocol::session::CompareResult;
use blockmirror_protocol::units::{CopyId, HostId};
use blockmirror_protocol::wire::StreamPreamble;
use blockmirror_protocol::wire::message::{DataState, Hello, Member, Message, Recovering, Refusal, Refused};
use devices::Devices;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Mutex;
use std::thread::JoinHandle;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{broadcast, oneshot};
use tokio::task::spawn_local;

/// How much free memory for buffers a volume keeps, in bytes.
const POOL_BYTES: usize = 64 << 20;

/// What a volume needs to know of its host.
pub struct Surroundings {
    /// The volume's own state folder.
    pub state_folder: PathBuf,
    /// Where sockets and mount points go.
    pub run_folder: PathBuf,
    /// Where links to loop devices go.
    pub device_folder: PathBuf,
    /// The connections to other hosts.
    pub peers: Peers,
    /// Takes the volume's hosts when the primary tells them.
    pub learned: UnboundedSender<(Name, Vec<Member>)>,
    /// This host, as others are told of it.
    pub own: Member,
}

/// What others want of a volume.
pub enum Ask {
    /// The facts for status.
    Facts(oneshot::Sender<VolumeFacts>),
    /// A primary greets.
    Session(Box<Hello>, ControlSender, ControlReceiver),
    /// A primary opened a stream of frames.
    Frames(StreamPreamble, FrameReceiver),
    /// A recovery begins; whether inconsistent content is wanted too.
    Recover(bool, ControlSender, Connection),
    /// A recovery reads.
    Read(Message, ControlSender, ControlReceiver),
    /// A replica joined.
    AddPeer(PeerConfig, oneshot::Sender<Result<(), String>>),
    /// The configuration changed: peers were paused or resumed, or have other addresses.
    Configure(Box<VolumeConfig>),
    /// Compare with a peer.
    Compare(HostId, oneshot::Sender<Option<CompareResult>>),
    /// Stop serving, in order.
    Stop(oneshot::Sender<()>),
}

/// A running volume, for other threads.
pub struct Handle {
    asks: UnboundedSender<Ask>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Handle {
    /// Starts the volume's thread and waits until the volume is open or is known not to open.
    ///
    /// # Errors
    /// When no thread can be had.
    pub async fn start(config: VolumeConfig, surroundings: Surroundings) -> std::io::Result<Self> {
        let (asks, source) = unbounded_channel();
        let (opened, is_open) = oneshot::channel();
        let thread = std::thread::Builder::new()
            .name(config.name.as_str().chars().take(15).collect())
            .spawn(move || run(config, surroundings, source, opened))?;
        // An error means that the thread died; the next ask will tell.
        let _ = is_open.await;
        Ok(Self { asks, thread: Mutex::new(Some(thread)) })
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
    pub async fn stop(&self) {
        // No answer means that the thread has ended already.
        let _ = self.answer(Ask::Stop).await;
        let thread = self.thread.lock().expect("no holder of the lock panics").take();
        if let Some(thread) = thread {
            // Joining doesn't block: the thread answered with its last act. A panic of its own ended the process.
            let _ = thread.join();
        }
    }
}

fn run(
    config: VolumeConfig,
    surroundings: Surroundings,
    source: UnboundedReceiver<Ask>,
    opened: oneshot::Sender<()>,
) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = match runtime {
        Ok(runtime) => runtime,
        Err(error) => return tracing::error!(volume = %config.name, "no runtime for the volume: {error}"),
    };
    let local = tokio::task::LocalSet::new();
    let served = local.run_until(async move {
        let mut volume = Volume::open(config, surroundings).await;
        let _ = opened.send(());
        volume.serve(source).await
    });
    let stopped = runtime.block_on(served);
    // The last tasks end before the one that asked is told.
    drop(local);
    drop(runtime);
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
    role: OpenRole,
    devices: Devices,
    recovery: Rc<RefCell<Option<Rc<recovery::Source>>>>,
    /// Reads of recoveries that failed, for the streams on which they were asked for.
    refusals: broadcast::Sender<Refused>,
}

enum OpenRole {
    Closed(String),
    Primary(Rc<Primary>, BTreeMap<HostId, Rc<Peer>>),
    Replica(Rc<Replica>),
}

impl Volume {
    async fn open(config: VolumeConfig, surroundings: Surroundings) -> Self {
        let mut volume = Self {
            config: RefCell::new(config),
            surroundings: Rc::new(surroundings),
            storage_kind: String::new(),
            pool: BufferPool::new(POOL_BYTES),
            role: OpenRole::Closed(String::new()),
            devices: Devices::default(),
            recovery: Rc::default(),
            refusals: broadcast::channel(1).0,
        };
        volume.reopen().await;
        volume
    }

    /// Opens the backing and what depends on it, or remembers why that is not possible.
    async fn reopen(&mut self) {
        // The old role's claim on the backing is given back before the backing is claimed anew.
        *self.recovery.borrow_mut() = None;
        self.role = OpenRole::Closed(String::new());
        match self.try_open().await {
            Ok(role) => self.role = role,
            Err(text) => {
                tracing::error!(volume = %self.config.borrow().name, "the volume can't be opened: {text}");
                self.role = OpenRole::Closed(text);
            }
        }
    }

    async fn try_open(&mut self) -> Result<OpenRole, String> {
        let config = self.config.borrow().clone();
        let storage = storage::open().map_err(|error| format!("no storage can be had: {error}"))?;
        self.storage_kind = storage.kind().to_owned();
        let (backing, state) = open_parts(&config, &self.surroundings, &storage, &self.pool).await?;
        if !backing.is_direct() {
            tracing::warn!(volume = %config.name, "the backing refuses direct I/O; it is written through the cache");
        }
        match config.role {
            Role::Primary => self.open_primary(&config, storage, backing, state).await,
            Role::Replica => self.open_replica(&config, storage, backing, state).await,
        }
    }

    async fn open_primary(
        &mut self,
        config: &VolumeConfig,
        storage: Rc<dyn Storage>,
        backing: Rc<File>,
        state: State,
    ) -> Result<OpenRole, String> {
        let peers: Vec<_> = config.peers.iter().map(PeerConfig::wanted).collect();
        let (loss, window_bytes) = (config.replica_loss(), config.window.0);
        let primary = Primary::open(storage, backing, state, self.pool.clone(), &peers, loss, window_bytes)
            .await
            .map_err(|error| with_causes(&error))?;
        let mut links = BTreeMap::new();
        for peer in &config.peers {
            links.insert(peer.host, self.link(&primary, peer));
        }
        self.devices = Devices::start(config, &self.surroundings, primary.clone(), &self.pool).await;
        self.introduce(&links);
        Ok(OpenRole::Primary(primary, links))
    }

    async fn open_replica(
        &mut self,
        config: &VolumeConfig,
        storage: Rc<dyn Storage>,
        backing: Rc<File>,
        state: State,
    ) -> Result<OpenRole, String> {
        let superblock = state.superblock();
        let folder = &self.surroundings.state_folder;
        let replica =
            Replica::open(storage.clone(), backing.clone(), state, self.pool.clone(), folder, config)
                .await
                .map_err(|error| with_causes(&error))?;
        let export = Export::new(storage.clone(), backing.clone(), self.pool.clone(), superblock.size_bytes);
        self.devices = Devices::start_export(config, &self.surroundings, export, &self.pool);
        Ok(OpenRole::Replica(replica))
    }

    fn link(&self, primary: &Rc<Primary>, peer: &PeerConfig) -> Rc<Peer> {
        let link = Peer::new(peer);
        spawn_local(link.clone().keep_linked(primary.clone(), self.surroundings.peers.clone()));
        link
    }

    /// Tells all links who the volume's hosts are.
    fn introduce(&self, links: &BTreeMap<HostId, Rc<Peer>>) {
        let members = self.members();
        for link in links.values() {
            link.introduce(members.clone());
        }
    }

    /// Every host of the volume, this primary first.
    fn members(&self) -> Vec<Member> {
        std::iter::once(self.surroundings.own.clone()).chain(self.config.borrow().members()).collect()
    }

    /// Answers asks until it is told to stop; gives whom to tell that it did.
    async fn serve(&mut self, mut source: UnboundedReceiver<Ask>) -> Option<oneshot::Sender<()>> {
        while let Some(ask) = source.recv().await {
            match ask {
                Ask::Stop(stopped) => {
                    self.stop().await;
                    return Some(stopped);
                }
                Ask::Facts(answer) => drop(answer.send(self.facts().await)),
                Ask::Session(hello, sender, receiver) => self.begin_session(*hello, sender, receiver).await,
                Ask::Frames(preamble, frames) => self.take_frames(preamble, frames),
                Ask::Recover(accept_inconsistent, sender, connection) => {
                    self.begin_recovery(accept_inconsistent, sender, connection).await;
                }
                Ask::Read(first, sender, receiver) => self.read_for_recovery(first, sender, receiver),
                Ask::AddPeer(peer, answer) => drop(answer.send(self.add_peer(peer).await)),
                Ask::Configure(config) => self.configure(*config),
                Ask::Compare(host, answer) => self.compare(host, answer),
            }
        }
        None
    }

    async fn stop(&mut self) {
        let devices = std::mem::take(&mut self.devices);
        devices.stop().await;
        match &self.role {
            OpenRole::Primary(primary, links) => {
                links.values().for_each(|link| link.stop());
                primary.close().await;
            }
            OpenRole::Replica(replica) => replica.close().await,
            OpenRole::Closed(_) => {}
        }
        self.role = OpenRole::Closed(String::new());
    }

    async fn begin_session(&mut self, hello: Hello, sender: ControlSender, receiver: ControlReceiver) {
        if matches!(&self.role, OpenRole::Replica(replica) if replica.is_recovering()) {
            let text = "a recovery reads this replica; replication goes on when it has ended".to_owned();
            return refuse(sender, Refusal::Busy, text);
        }
        if let OpenRole::Replica(replica) = &self.role
            && replica.has_failed()
        {
            replica.close().await;
            std::mem::take(&mut self.devices).stop().await;
            self.reopen().await;
        } else if matches!(self.role, OpenRole::Closed(_)) && self.config.borrow().role == Role::Replica {
            self.reopen().await;
        }
        let config = self.config.borrow();
        let name = config.name.clone();
        match &self.role {
            OpenRole::Replica(replica) => {
                let primary = config.peers.iter().find(|peer| peer.role == Role::Primary).cloned();
                let (replica, learned) = (replica.clone(), self.surroundings.learned.clone());
                spawn_local(async move {
                    let learned = |members| drop(learned.send((name.clone(), members)));
                    match replica.serve(hello, sender, receiver, learned).await {
                        Ok(()) => {}
                        Err(error) => {
                            let text = primary.map(|peer| with_name(&error, peer.host, &peer.name));
                            tracing::info!(volume = %name, "{}", text.unwrap_or_else(|| with_causes(&error)));
                        }
                    }
                });
            }
            OpenRole::Primary(..) => {
                refuse(sender, Refusal::Role, "this host is a primary of the volume itself".to_owned());
            }
            OpenRole::Closed(text) => refuse(sender, Refusal::Backing, text.clone()),
        }
    }

    fn take_frames(&self, preamble: StreamPreamble, frames: FrameReceiver) {
        let OpenRole::Replica(replica) = &self.role else { return };
        let (replica, name) = (replica.clone(), self.config.borrow().name.clone());
        spawn_local(async move {
            if let Err(error) = replica.take_frames(preamble.session, frames).await {
                // The end of the control stream is told; this is news only where the frames themselves are wrong.
                if !error.is_lost() {
                    tracing::warn!(volume = %name, "{}", with_causes(&error));
                }
                replica.end_session(preamble.session);
            }
        });
    }

    async fn add_peer(&mut self, peer: PeerConfig) -> Result<(), String> {
        let OpenRole::Primary(primary, _) = &self.role else {
            return Err("only a primary takes replicas in".to_owned());
        };
        let primary = primary.clone();
        let window_bytes = self.config.borrow().window.0;
        if matches!(&self.role, OpenRole::Primary(_, links) if links.contains_key(&peer.host)) {
            return Ok(());
        }
        primary
            .add_peer(peer.host, peer.mode.into(), window_bytes)
            .await
            .map_err(|error| with_causes(&error))?;
        let link = self.link(&primary, &peer);
        if let OpenRole::Primary(_, links) = &mut self.role {
            links.insert(peer.host, link);
        }
        if let OpenRole::Primary(primary, links) = &self.role {
            self.introduce(links);
            primary.tell_members(self.members());
        }
        Ok(())
    }

    fn configure(&mut self, config: VolumeConfig) {
        *self.config.borrow_mut() = config;
        let config = self.config.borrow();
        for peer in &config.peers {
            match &self.role {
                OpenRole::Primary(_, links) => {
                    if let Some(link) = links.get(&peer.host) {
                        link.configure(peer);
                    }
                }
                OpenRole::Replica(replica) if peer.paused && peer.role == Role::Primary => {
                    replica.disconnect()
                }
                OpenRole::Replica(_) | OpenRole::Closed(_) => {}
            }
        }
    }

    fn compare(&self, host: HostId, answer: oneshot::Sender<Option<CompareResult>>) {
        let OpenRole::Primary(primary, _) = &self.role else {
            return drop(answer.send(None));
        };
        let primary = primary.clone();
        spawn_local(async move { drop(answer.send(primary.compare(host).await)) });
    }

    async fn begin_recovery(
        &mut self,
        accept_inconsistent: bool,
        sender: ControlSender,
        connection: Connection,
    ) {
        let OpenRole::Replica(replica) = &self.role else {
            let text = match &self.role {
                OpenRole::Closed(text) if !text.is_empty() => text.clone(),
                _ => "this host is the volume's primary; recover from a replica".to_owned(),
            };
            return refuse(sender, Refusal::Role, text);
        };
        if replica.has_failed() {
            let text = "the backing of this replica has failed; see its log".to_owned();
            return refuse(sender, Refusal::Backing, text);
        }
        let data = replica.report().data;
        if data == DataState::Empty || data == DataState::Inconsistent && !accept_inconsistent {
            let text = "this copy is not consistent: its first sync or a resync did not end; \
                        use another replica, or accept a mixture with --accept-inconsistent";
            return refuse(sender, Refusal::Backing, text.to_owned());
        }
        let Some(guard) = replica.begin_recovery().await else {
            let text = "the primary is connected and writes to this replica; stop it or pause the link first";
            return refuse(sender, Refusal::Busy, text.to_owned());
        };
        let superblock = replica.state().superblock();
        let info = Recovering {
            volume: superblock.volume,
            copy: superblock.copy,
            size_bytes: superblock.size_bytes,
            block_size: superblock.block_size,
            data,
            position: replica.report().position,
        };
        let source = recovery::Source::new(
            replica.storage().clone(),
            replica.backing().clone(),
            self.pool.clone(),
            info.clone(),
        );
        *self.recovery.borrow_mut() = Some(Rc::new(source));
        let refusals = self.refusals.subscribe();
        let (kept, replica) = (self.recovery.clone(), replica.clone());
        spawn_local(async move {
            serve_recovery(guard, info, sender, connection, refusals).await;
            if !replica.is_recovering() {
                // What was kept for reads holds the backing's claim.
                *kept.borrow_mut() = None;
            }
        });
    }

    fn read_for_recovery(&self, first: Message, sender: ControlSender, receiver: ControlReceiver) {
        let source = self.recovery.borrow().clone();
        match (&self.role, source) {
            (OpenRole::Replica(replica), Some(source)) if replica.is_recovering() => {
                let (refusals, name) = (self.refusals.clone(), self.config.borrow().name.clone());
                spawn_local(async move {
                    let Err(error) = recovery::serve(&source, first, sender, receiver).await else { return };
                    tracing::info!(volume = %name, "{}", with_causes(&error));
                    // Frames can't carry a reason: it goes out where the recovery was asked for.
                    if let Some(no) = error.refusal() {
                        drop(refusals.send(no));
                    }
                });
            }
            _ => refuse(sender, Refusal::Other, "no recovery was begun on this connection".to_owned()),
        }
    }
}

/// Keeps primaries away while the recovery's connection lives, and tells why a read failed.
async fn serve_recovery(
    guard: Recovery,
    info: Recovering,
    mut sender: ControlSender,
    connection: Connection,
    mut refusals: broadcast::Receiver<Refused>,
) {
    if sender.send(&info.into()).await.is_ok() {
        tokio::select! {
            _ = connection.closed() => {}
            Ok(no) = refusals.recv() => {
                if sender.send(&no.into()).await.is_ok() {
                    // The recovery hangs up when it has read that.
                    connection.closed().await;
                }
            }
        }
    }
    drop(guard);
}

/// Says no on a control stream, and sees to it that it arrives.
pub(crate) fn refuse(mut sender: ControlSender, refusal: Refusal, text: String) {
    tokio::task::spawn(async move {
        if sender.send(&Refused { refusal, text }.into()).await.is_ok() {
            // An error means that the peer has gone.
            let _ = sender.finish().await;
        }
    });
}

/// Opens backing and state, and checks that they belong together.
async fn open_parts(
    config: &VolumeConfig,
    surroundings: &Surroundings,
    storage: &Rc<dyn Storage>,
    pool: &BufferPool,
) -> Result<(Rc<File>, State), String> {
    let state = State::open(&surroundings.state_folder, storage.clone(), pool.clone())
        .await
        .map_err(|error| with_causes(&error))?;
    let superblock = state.superblock();
    if (superblock.volume, superblock.size_bytes, superblock.block_size)
        != (config.id, config.size_bytes, config.block_size)
    {
        let folder = surroundings.state_folder.display();
        return Err(format!(
            "the configuration names another id, size or block size than the state in {folder}"
        ));
    }
    let file = File::opened_when_free(|| File::open_backing(&config.backing, Access::ReadWrite))
        .await
        .map_err(|error| match error {
            OpenError::NotFound { path } => format!("{} is gone", path.display()),
            error => with_causes(&error),
        })?;
    if file.size_bytes() < config.size_bytes {
        let (has, wants) = (file.size_bytes(), config.size_bytes);
        return Err(format!("{} has {has} bytes, the volume {wants}", config.backing.display()));
    }
    adopt(config, surroundings, &state).await?;
    Ok((Rc::new(file), state))
}

/// Where the backing took the place of another one, makes the metadata say that its content is unknown to peers:
/// all maps are full but that of the peer it was recovered from, and a replica's copy is a new one.
async fn adopt(config: &VolumeConfig, surroundings: &Surroundings, state: &State) -> Result<(), String> {
    let folder = &surroundings.state_folder;
    let compared = backing::compare(folder, &config.backing).map_err(|error| with_causes(&error))?;
    let backing::Match::Adopted { identity, source } = compared else { return Ok(()) };
    let state_error = |error: crate::metadata::StateError| with_causes(&error);
    match config.role {
        Role::Primary => {
            for peer in config.peers.iter().filter(|peer| Some(peer.host) != source) {
                let (mut map, file) = state.open_map(peer.host).await.map_err(state_error)?;
                let base = map.base();
                map.begin_anew(base);
                state.write_map(&file, map.take_changes()).await.map_err(state_error)?;
            }
        }
        Role::Replica => {
            let copy = CopyId(key::random());
            let change = |superblock: &mut Superblock| {
                (superblock.copy, superblock.data) = (copy, DataState::Empty);
            };
            state.change_superblock(change).await.map_err(state_error)?;
        }
    }
    // Only now: a crash before this does it all again.
    backing::record(folder, &identity).map_err(|error| with_causes(&error))
}
