//! The shell of a replica: drives the pure replica, holds the frames' payload, writes the backing and its metadata.
//!
//! One session at a time. A session is a control stream, on which the primary's greeting came, and the streams of
//! frames that carry its number. A newer greeting takes the place of an older session at once; the machine answers it
//! only when everything of the old one has ended (R1).
//!
//! After a failure of the backing the machine takes nothing any more (W5). The next greeting finds
//! [`Replica::has_failed`], and the volume's thread opens the backing anew.

mod gap;
mod promotion;
mod undo;

use crate::buffer::BufferPool;
use crate::config::{Name, VolumeConfig};
use crate::metadata::State;
use crate::pre_images::{Layer, LayerError, PreImages};
use crate::storage::file::File;
use crate::storage::{self, Operation, Storage};
use crate::transport::FrameReceiver;
use crate::transport::{ControlReceiver, ControlSender};
use crate::transport::{ReceiveError, SendError};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::replica::{
    self, Action, FrameId, PrimaryMisbehaved, Settings, StateChange, Stored,
};
use blockmirror_protocol::units::{HostId, Session as SessionNumber};
use blockmirror_protocol::wire::FrameHeader;
use blockmirror_protocol::wire::message::{Hello, Member, Message, Refusal};
use bytes::Bytes;
pub use promotion::{Progress, PromotionError};
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::rc::{Rc, Weak};
use std::time::Instant;
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::spawn_local;

/// How many frames are taken in before others get their turn.
const BATCH: usize = 32;

/// A volume on a replica. Lives on the volume's thread.
pub struct Replica {
    me: Weak<Self>,
    storage: Rc<dyn Storage>,
    backing: Rc<File>,
    state: Rc<State>,
    pool: BufferPool,
    pre_images: PreImages,
    /// The layers of the gap and of the history.
    layers: tokio::sync::Mutex<Vec<Layer>>,
    /// When each was begun, in seconds since 1970, and how large it is; told while they are being saved into.
    points: RefCell<BTreeMap<u64, (u64, u64)>>,
    /// That a history was given up, or could not be.
    forgotten: Notify,
    /// Since when greetings are refused because this host wrote alone (L3), and whose.
    split: Cell<Option<(HostId, Instant)>>,
    /// The volume's name, for words to the operator.
    name: Name,
    inner: RefCell<Inner>,
    error: RefCell<Option<String>>,
    /// The session that is being served, and how it is told to end.
    current: Cell<u64>,
    superseded: Notify,
    idle: Notify,
    /// When the connection of the primary came or went.
    since: Cell<Instant>,
    /// How many recoveries read the backing; no primary may write meanwhile.
    recoveries: Cell<usize>,
    members: RefCell<Vec<Member>>,
}

struct Inner {
    machine: replica::Replica,
    next_frame: u64,
    payloads: HashMap<FrameId, Bytes>,
    outgoing: Option<UnboundedSender<Message>>,
}

/// Why a replica can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenReplicaError {
    /// Its metadata.
    #[error(transparent)]
    State(#[from] crate::metadata::StateError),
    /// Its pre-images, without which it can't be rolled back.
    #[error(transparent)]
    PreImages(#[from] LayerError),
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The primary can't be heard.
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    /// The primary can't be told.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The primary broke the protocol.
    #[error(transparent)]
    Misbehaved(#[from] PrimaryMisbehaved),
    /// A newer session took its place, or this host ended it.
    #[error("this host ended the session, or a newer one took its place")]
    Superseded,
}

impl SessionError {
    /// Whether the connection or the stream just ended.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(
            self,
            Self::Receive(ReceiveError::Lost(_) | ReceiveError::Ended(_) | ReceiveError::Abandoned(_))
        )
    }
}

/// Keeps primaries away while a recovery reads; see [`Replica::begin_recovery`].
pub struct Recovery(Rc<Replica>);

impl Drop for Recovery {
    fn drop(&mut self) {
        self.0.recoveries.set(self.0.recoveries.get() - 1);
    }
}

impl Replica {
    /// Opens a volume as replica.
    ///
    /// # Errors
    /// [`OpenReplicaError`] when metadata or pre-images can't be read.
    pub async fn open(
        storage: Rc<dyn Storage>,
        backing: Rc<File>,
        state: State,
        pool: BufferPool,
        folder: &Path,
        config: &VolumeConfig,
    ) -> Result<Rc<Self>, OpenReplicaError> {
        let mut superblock = state.superblock();
        let marker = state.recover_marker().await?;
        let peers: Vec<HostId> = config.peers.iter().map(|peer| peer.host).collect();
        let pre_images = PreImages::new(folder, storage.clone(), pool.clone(), config.pre_images.0);
        let (layers, has_history) = gap::open_layers(&pre_images, &superblock).await?;
        if !has_history {
            state.change_superblock(|superblock| superblock.history = 0).await?;
            superblock = state.superblock();
        }
        let settings = Settings {
            sector_bytes: u32::try_from(backing.alignment()).expect("a sector is small"),
            window_bytes: config.window.0,
            space: config.when_full.into(),
        };
        let (saved, kept) =
            (gap::saved_in(&layers, superblock.gap), gap::saved_in(&layers, superblock.history));
        let stored = Stored {
            superblock,
            marker,
            log: state.recover_log().await?,
            maps: state.valid_maps(&peers).await?,
            saved,
            kept,
        };
        let points = layers.iter().map(gap::point_of).collect();
        let machine = replica::Replica::new(settings, stored);
        Ok(Rc::new_cyclic(|me| Self {
            me: me.clone(),
            storage,
            backing,
            state: Rc::new(state),
            pool,
            pre_images,
            layers: tokio::sync::Mutex::new(layers),
            points: RefCell::new(points),
            forgotten: Notify::new(),
            split: Cell::new(None),
            name: config.name.clone(),
            inner: RefCell::new(Inner { machine, next_frame: 0, payloads: HashMap::new(), outgoing: None }),
            error: RefCell::new(None),
            current: Cell::new(0),
            superseded: Notify::new(),
            idle: Notify::new(),
            since: Cell::new(Instant::now()),
            recoveries: Cell::new(0),
            members: RefCell::default(),
        }))
    }

    /// What the superblock says.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// What the backing is read and written with.
    #[must_use]
    pub fn storage(&self) -> &Rc<dyn Storage> {
        &self.storage
    }

    /// The backing.
    #[must_use]
    pub fn backing(&self) -> &Rc<File> {
        &self.backing
    }

    /// The replica's numbers.
    #[must_use]
    pub fn report(&self) -> replica::Report {
        self.inner.borrow().machine.report()
    }

    /// When the primary's connection came or went.
    #[must_use]
    pub fn since(&self) -> Instant {
        self.since.get()
    }

    /// What became of the backing, in words, if it failed.
    #[must_use]
    pub fn error(&self) -> Option<String> {
        self.error.borrow().clone()
    }

    /// Whether the backing must be opened anew before the next session (W5).
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.inner.borrow().machine.has_failed()
    }

    /// The hosts of the volume, as the primary told last; empty before it did.
    #[must_use]
    pub fn members(&self) -> Vec<Member> {
        self.members.borrow().clone()
    }

    /// Whether a recovery reads the backing.
    #[must_use]
    pub fn is_recovering(&self) -> bool {
        self.recoveries.get() > 0
    }

    /// Keeps primaries away as long as the answer lives, and waits until nothing of an old session is being written.
    /// Nothing while a primary is connected.
    pub async fn begin_recovery(&self) -> Option<Recovery> {
        if self.inner.borrow().outgoing.is_some() {
            return None;
        }
        self.recoveries.set(self.recoveries.get() + 1);
        let recovery = Recovery(self.me());
        self.settle().await;
        Some(recovery)
    }

    /// Waits until nothing is being written.
    async fn settle(&self) {
        while !self.inner.borrow().machine.is_idle() {
            self.idle.notified().await;
        }
    }

    /// Serves a session from its greeting to its end. `learned` is called when the primary tells the volume's hosts.
    ///
    /// # Errors
    /// [`SessionError`]; the primary dials again by itself.
    pub async fn serve(
        &self,
        hello: Hello,
        mut sender: ControlSender,
        mut receiver: ControlReceiver,
        learned: impl Fn(Vec<Member>),
    ) -> Result<(), SessionError> {
        if let Some(no) = self.objection(&hello) {
            // The session that is being served goes on.
            sender.end_with(no);
            return Ok(());
        }
        let session = self.take_over();
        let (outgoing, mut source) = unbounded_channel();
        self.since.set(Instant::now());
        let members = hello.members.clone();
        self.drive(|inner| {
            inner.outgoing = Some(outgoing);
            inner.machine.handle_message(hello.into())
        })?;
        *self.members.borrow_mut() = members.clone();
        learned(members);
        let receive = async {
            loop {
                let message = receiver.receive().await?;
                if let Message::Members(members) = &message {
                    *self.members.borrow_mut() = members.members.clone();
                    learned(members.members.clone());
                }
                self.drive(|inner| inner.machine.handle_message(message))?;
            }
        };
        let send = async {
            while let Some(message) = source.recv().await {
                if matches!(message, Message::Refused(_) | Message::Superseded(_)) {
                    return Ok(message);
                }
                sender.send(&message).await?;
            }
            Err(SessionError::Superseded)
        };
        let ended: Result<Message, SessionError> = tokio::select! {
            ended = receive => ended,
            ended = send => ended,
            () = self.is_superseded(session) => Err(SessionError::Superseded),
        };
        if self.current.get() == session {
            self.since.set(Instant::now());
            self.drive(|inner| {
                inner.outgoing = None;
                inner.machine.handle_disconnected();
            });
        }
        // Whoever waits for the end of this session must not wait for a primary that doesn't answer any more.
        sender.end_with(ended?);
        Ok(())
    }

    /// Takes in the frames of one stream until it or its session ends.
    ///
    /// # Errors
    /// [`SessionError`] when the primary can't be heard or broke the protocol.
    pub async fn take_frames(
        &self,
        session: SessionNumber,
        mut frames: FrameReceiver,
    ) -> Result<(), SessionError> {
        let current = self.current.get();
        let mut count = 0;
        loop {
            let (header, payload) = tokio::select! {
                frame = frames.receive(&self.pool) => frame?,
                () = self.is_superseded(current) => return Ok(()),
            };
            self.take_frame(session, header, payload)?;
            while let Some((header, payload)) = frames.receive_now(&self.pool)? {
                self.take_frame(session, header, payload)?;
                count += 1;
                if count % BATCH == 0 {
                    tokio::task::yield_now().await;
                }
            }
            self.drive(|inner| inner.machine.acknowledge_receipt());
        }
    }

    /// Ends the session, and waits until nothing is being written.
    pub async fn close(&self) {
        self.disconnect();
        self.settle().await;
        storage::drain(&*self.storage).await;
    }

    /// The primary is kept away, and goes on alone.
    pub fn note_behind(&self) {
        self.drive(|inner| inner.machine.note_behind());
    }

    /// Ends the session that is being served, if any; the primary may dial again.
    pub fn disconnect(&self) {
        self.take_over();
        self.since.set(Instant::now());
        self.drive(|inner| {
            inner.outgoing = None;
            inner.machine.handle_disconnected();
        });
    }

    /// Ends the session of this number, unless a newer one took its place.
    pub fn end_session(&self, session: SessionNumber) {
        if self.inner.borrow().machine.session() == Some(session) {
            self.disconnect();
        }
    }

    /// The operator made room for pre-images, or wants resyncs to go on without.
    pub fn configure(&self, config: &VolumeConfig) {
        self.pre_images.set_limit(config.pre_images.0);
        self.drive(|inner| inner.machine.handle_room(config.when_full.into()));
    }

    /// Why a greeting is not taken, if it is not.
    fn objection(&self, hello: &Hello) -> Option<Message> {
        let inner = self.inner.borrow();
        let Some(mut refused) = inner.machine.objection(hello) else {
            let superseded = inner.machine.supersedes(hello.fence);
            // Whether a split is over is decided with the newest primary.
            if superseded.is_none() {
                self.split.set(None);
            }
            return superseded.map(Message::from);
        };
        if refused.refusal == Refusal::SplitBrain {
            let holder = hello.fence.holder;
            let known = self.split.get().filter(|(host, _)| *host == holder);
            self.split.set(known.or_else(|| Some((holder, Instant::now()))));
            let name = &self.name;
            refused
                .text
                .push_str(&format!("; `blockmirror resolve {name} --keep HOST` decides whose content stays"));
        }
        Some(refused.into())
    }

    /// Whose greetings are refused because this host wrote alone after the two were last in sync, and since when.
    #[must_use]
    pub fn split(&self) -> Option<(HostId, Instant)> {
        self.split.get()
    }

    /// Tells the session that is being served to end, and names the next one.
    fn take_over(&self) -> u64 {
        let session = self.current.get() + 1;
        self.current.set(session);
        self.superseded.notify_waiters();
        session
    }

    async fn is_superseded(&self, session: u64) {
        loop {
            let told = self.superseded.notified();
            if self.current.get() != session {
                return;
            }
            told.await;
        }
    }

    fn take_frame(
        &self,
        session: SessionNumber,
        header: FrameHeader,
        payload: Bytes,
    ) -> Result<(), PrimaryMisbehaved> {
        if header.session != session {
            return Err(PrimaryMisbehaved("a frame carries another session than its stream"));
        }
        self.drive(|inner| {
            let frame = FrameId(inner.next_frame);
            inner.next_frame += 1;
            inner.payloads.insert(frame, payload);
            inner.machine.handle_frame(frame, header)
        })
    }

    /// Feeds the machine an event, then carries out what it asks for.
    fn drive<Output>(&self, event: impl FnOnce(&mut Inner) -> Output) -> Output {
        let mut inner = self.inner.borrow_mut();
        let output = event(&mut inner);
        while let Some(action) = inner.machine.poll_action() {
            self.carry_out(&mut inner, action);
        }
        if inner.machine.is_idle() {
            self.idle.notify_one();
        }
        output
    }

    fn carry_out(&self, inner: &mut Inner, action: Action) {
        match action {
            Action::Apply { frame, range, zero } => self.apply(inner, frame, range, zero),
            Action::Drop(frame) => drop(inner.payloads.remove(&frame)),
            Action::Sync => self.submit(Operation::Sync, |replica, outcome| {
                let synced = replica.note(outcome);
                replica.drive(|inner| inner.machine.handle_synced(synced));
            }),
            Action::WriteMarker(position) => {
                let me = self.me();
                spawn_local(async move {
                    let written = me.note_state(me.state.write_marker(position).await);
                    me.drive(|inner| inner.machine.handle_marker_written(written));
                });
            }
            Action::WriteState(change) => {
                self.tell_of(inner, &change);
                let me = self.me();
                spawn_local(async move {
                    let is_forgotten = change == StateChange::Forget;
                    let written = me.note_state(me.write_state(change).await);
                    me.drive(|inner| inner.machine.handle_state_written(written));
                    if is_forgotten {
                        me.forgotten.notify_waiters();
                    }
                });
            }
            Action::WriteLog { offset, record } => {
                let operation =
                    Operation::Write { offset, data: self.state.page(&record[..]), durable: true };
                let (me, log) = (self.me(), self.state.log_file());
                let done = move |outcome| {
                    let written = me.note(outcome);
                    me.drive(|inner| inner.machine.handle_log_written(written));
                };
                self.storage.submit(log, operation, Box::new(done));
            }
            Action::BeginLayer(point) => {
                let me = self.me();
                spawn_local(async move {
                    let begun = me.begin_layer(point).await;
                    me.drive(|inner| inner.machine.handle_layer_begun(begun));
                });
            }
            Action::SavePreImages { ranges } => {
                let me = self.me();
                spawn_local(async move {
                    let saved = me.save_pre_images(&ranges).await;
                    me.drive(|inner| inner.machine.handle_saved(saved));
                });
            }
            Action::EndLayer(layer) => {
                let me = self.me();
                spawn_local(async move { me.end_layer(layer).await });
            }
            Action::ReadDigest { frame, range } => {
                let me = self.me();
                spawn_local(async move {
                    let digest = crate::primary::digest(&*me.storage, &me.backing, &me.pool, range).await;
                    let digest = match digest {
                        Ok(digest) => Some(digest),
                        Err(error) => {
                            me.note(Err(error));
                            None
                        }
                    };
                    me.drive(|inner| {
                        inner.payloads.remove(&frame);
                        inner.machine.handle_digest(frame, digest);
                    });
                });
            }
            Action::Send(message) => {
                if let Some(outgoing) = &inner.outgoing {
                    // A session whose sender is gone is just ending.
                    drop(outgoing.send(message));
                }
            }
        }
    }

    fn apply(&self, inner: &mut Inner, frame: FrameId, range: ByteRange, zero: Option<bool>) {
        let data = inner.payloads.remove(&frame).expect("a frame's payload is kept until it is written");
        let operation = match zero {
            Some(may_unmap) => {
                if self.backing.is_hole(range) {
                    // A hole reads as zeroes already.
                    let me = self.me();
                    spawn_local(async move { me.drive(|inner| inner.machine.handle_applied(frame, true)) });
                    return;
                }
                Operation::Zero { range, may_unmap }
            }
            None => Operation::Write { offset: range.offset, data, durable: false },
        };
        self.submit(operation, move |replica, outcome| {
            let written = replica.note(outcome);
            replica.drive(|inner| inner.machine.handle_applied(frame, written));
        });
    }

    /// What the operator should hear of.
    fn tell_of(&self, inner: &Inner, change: &StateChange) {
        let name = &self.name;
        match change {
            StateChange::Begin { source, keep: true, .. } => {
                let bytes = inner.machine.undelivered_bytes(source.holder).unwrap_or(0);
                tracing::warn!(
                    volume = %name,
                    "this host came back with at most {} that the primary lacks, and is overwritten; what it had is kept: \
                     blockmirror undo {name}, or blockmirror forget {name}",
                    crate::quantity::Size(bytes)
                );
            }
            StateChange::Forget => tracing::warn!(volume = %name, "what was kept for undo is given up"),
            _ => {}
        }
    }

    async fn write_state(&self, change: StateChange) -> Result<(), crate::metadata::StateError> {
        self.state.change_superblock(|superblock| change.apply(superblock)).await
    }

    fn submit(&self, operation: Operation, done: impl FnOnce(&Self, storage::Outcome) + 'static) {
        let me = self.me();
        self.storage.submit(&self.backing, operation, Box::new(move |outcome| done(&me, outcome)));
    }

    fn note(&self, outcome: storage::Outcome) -> bool {
        let Err(error) = outcome else { return true };
        self.keep_error(&error);
        false
    }

    fn note_state(&self, outcome: Result<(), crate::metadata::StateError>) -> bool {
        let Err(error) = outcome else { return true };
        self.keep_error(&error);
        false
    }

    fn keep_error(&self, error: &dyn std::error::Error) {
        let text = crate::words::with_causes(error);
        tracing::error!("{text}");
        self.error.borrow_mut().get_or_insert(text);
    }

    fn me(&self) -> Rc<Self> {
        self.me.upgrade().expect("whoever calls holds the volume")
    }
}
