//! The shell of a replica: drives the pure replica, holds the frames' payload, writes the backing and its metadata.
//!
//! After a failure of the backing the machine takes nothing any more (W5). The next greeting finds
//! [`Replica::has_failed`], and the volume's thread opens the backing anew.

mod content;
mod gap;
mod promotion;
mod session;
#[cfg(test)]
mod tests;
mod undo;

use crate::buffer::BufferPool;
use crate::clock::Moment;
use crate::config::{Name, VolumeConfig};
use crate::state::pre_images::{Layer, LayerError, PreImages};
use crate::state::{Recovered, State};
use crate::storage::file::File;
use crate::storage::{self, Operation, Storage};
use crate::troubles::{Kind, Troubles};
use blockmirror_protocol::layers::LayerId;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::replica::consent;
use blockmirror_protocol::replica::{self, Action, FrameId, Settings, StateChange, Stored};
use blockmirror_protocol::terms::DataState;
use blockmirror_protocol::units::{HostId, Time};
use blockmirror_protocol::wire::message::{Member, Message};
use bytes::Bytes;
pub use promotion::{Progress, PromotionError};
pub use session::SessionError;
use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, HashMap};
use std::path::Path;
use std::rc::{Rc, Weak};
use std::time::Instant;
use tokio::sync::Notify;
use tokio::sync::mpsc::UnboundedSender;
use tokio::task::spawn_local;

/// That greetings of a primary are refused, because this host has what that one lacks (L3).
#[derive(Clone, Copy, Debug)]
pub struct Split {
    /// The primary.
    pub from: HostId,
    /// Since when.
    pub since: Instant,
    /// Whether that one was recovered from an older copy or set back (X4); else this host wrote alone.
    pub is_beyond: bool,
}

/// A volume on a replica. Lives on the volume's thread.
pub struct Replica {
    me: Weak<Self>,
    storage: Rc<dyn Storage>,
    backing: Rc<File>,
    state: Rc<State>,
    pool: BufferPool,
    pre_images: PreImages,
    /// The layers to roll back to and for an undo.
    layers: tokio::sync::Mutex<Vec<Layer>>,
    /// When each was begun, in seconds since 1970, and how large it is; told while they are being saved into.
    points: RefCell<BTreeMap<LayerId, (u64, u64)>>,
    /// What there was no room for at the last attempt to save pre-images.
    shortage: RefCell<Option<String>>,
    /// That a history was given up, or could not be.
    forgotten: Notify,
    /// Whose greetings are refused.
    split: Cell<Option<Split>>,
    /// Whether the primary said that its operator paused the mirroring.
    paused_there: Cell<bool>,
    /// The volume's name, for words to the operator.
    name: Name,
    inner: RefCell<Inner>,
    error: RefCell<Option<String>>,
    troubles: RefCell<Rc<Troubles>>,
    /// The session that is being served, and how it is told to end.
    current: Cell<u64>,
    /// The host whose greeting was taken last: frames come from nobody else.
    greeter: Cell<Option<HostId>>,
    /// Who broke the protocol last, and how, in words, until that host's next greeting is taken.
    accused: RefCell<Option<(HostId, String)>>,
    superseded: Notify,
    idle: Notify,
    /// How many layers are being removed, which takes long where they are large.
    ending_layers: Cell<usize>,
    /// When the connection of the primary came or went.
    since: Cell<Instant>,
    /// How many recoveries read the backing; no primary may write meanwhile.
    recoveries: Cell<usize>,
    members: RefCell<Vec<Member>>,
    /// How many sessions are being served or just ending.
    serving: Cell<usize>,
    opened: Moment,
}

struct Inner {
    machine: replica::Replica,
    next_frame: u64,
    payloads: HashMap<FrameId, Bytes>,
    outgoing: Option<Outgoing>,
}

/// Where what the machine wants sent goes in a session.
struct Outgoing {
    messages: UnboundedSender<Message>,
    /// How many of them wait to be sent.
    unread: Rc<Cell<usize>>,
    /// What a primary lacks of its own copy.
    answers: content::Answers,
}

/// Why a replica can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenReplicaError {
    /// Its metadata.
    #[error(transparent)]
    State(#[from] crate::state::StateError),
    /// Its pre-images, without which it can't be rolled back.
    #[error(transparent)]
    PreImages(#[from] LayerError),
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
        recovered: Recovered,
        pool: BufferPool,
        folder: &Path,
        config: &VolumeConfig,
    ) -> Result<Rc<Self>, OpenReplicaError> {
        let Recovered { state, log, mark } = recovered;
        let peers: Vec<HostId> = config.peers.iter().map(|peer| peer.host).collect();
        let pre_images = PreImages::new(folder, storage.clone(), pool.clone(), config.pre_images.0);
        let layers = gap::open_layers(&pre_images, &state).await?;
        let superblock = state.superblock();
        let settings = Settings {
            sector_bytes: u32::try_from(backing.alignment()).expect("a sector is small"),
            window_bytes: config.window.0,
            space: config.when_full.into(),
        };
        let (saved, kept) = (
            gap::saved_in(&layers, superblock.layers.rollback()),
            gap::saved_in(&layers, superblock.layers.undo()),
        );
        let stored = Stored { superblock, mark, log, maps: state.valid_maps(&peers).await?, saved, kept };
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
            shortage: RefCell::default(),
            forgotten: Notify::new(),
            split: Cell::new(None),
            paused_there: Cell::new(false),
            name: config.name.clone(),
            inner: RefCell::new(Inner { machine, next_frame: 0, payloads: HashMap::new(), outgoing: None }),
            error: RefCell::new(None),
            troubles: RefCell::default(),
            current: Cell::new(0),
            greeter: Cell::new(None),
            accused: RefCell::default(),
            superseded: Notify::new(),
            idle: Notify::new(),
            ending_layers: Cell::new(0),
            since: Cell::new(Instant::now()),
            recoveries: Cell::new(0),
            members: RefCell::default(),
            serving: Cell::new(0),
            opened: Moment::now(),
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

    /// Failures of the disk are counted there from now on.
    pub fn count_in(&self, troubles: Rc<Troubles>) {
        *self.troubles.borrow_mut() = troubles;
    }

    /// What became of the backing, in words, if it failed.
    #[must_use]
    pub fn error(&self) -> Option<String> {
        self.error.borrow().clone()
    }

    /// Which host broke the protocol last, and how.
    #[must_use]
    pub fn accused(&self) -> Option<(HostId, String)> {
        self.accused.borrow().clone()
    }

    /// A host broke the protocol: status says so.
    pub fn accuse(&self, host: HostId, text: String) {
        *self.accused.borrow_mut() = Some((host, text));
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

    /// Whether a primary's session is being served.
    #[must_use]
    pub fn is_served(&self) -> bool {
        self.inner.borrow().outgoing.is_some()
    }

    /// Keeps primaries away as long as the answer lives, and waits until nothing of an old session is being written. Only
    /// while none is served.
    pub async fn begin_recovery(&self) -> Recovery {
        self.recoveries.set(self.recoveries.get() + 1);
        let recovery = Recovery(self.me());
        self.settle().await;
        recovery
    }

    /// Waits until nothing is being written or removed.
    async fn settle(&self) {
        while !self.inner.borrow().machine.is_idle() || self.ending_layers.get() > 0 {
            self.idle.notified().await;
        }
    }

    /// Ends the session, of which the primary hears, and waits until nothing is being written.
    pub async fn close(&self) {
        self.drive(|inner| inner.machine.take_leave());
        self.end().await;
    }

    /// Ends the session without a word, and waits until nothing is being written: what the primary promised holds.
    pub async fn end(&self) {
        self.disconnect();
        self.settle().await;
        while self.serving.get() > 0 {
            self.idle.notified().await;
        }
        storage::drain(&*self.storage).await;
    }

    /// A moment on the machine's clock. What the primary promised is over here no later than there, also where this host slept
    /// meanwhile.
    fn now(&self) -> Time {
        Time(self.opened.elapsed())
    }

    /// Whether the primary's word holds that it has answered nothing without this replica (W4).
    #[must_use]
    pub fn is_promised(&self) -> bool {
        self.inner.borrow().machine.is_promised(self.now())
    }

    /// The primary is kept away, and goes on alone.
    pub fn leave(&self) {
        self.drive(|inner| {
            inner.machine.take_leave();
            inner.machine.note_behind();
        });
    }

    /// The operator made room for pre-images, or wants resyncs to go on without.
    pub fn configure(&self, config: &VolumeConfig) {
        self.pre_images.set_limit(config.pre_images.0);
        self.drive(|inner| inner.machine.handle_room(config.when_full.into()));
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
            Action::WriteMarker(mark) => {
                let me = self.me();
                spawn_local(async move {
                    let written = me.note_state(me.state.write_marker(mark).await);
                    me.drive(|inner| inner.machine.handle_marker_written(written));
                });
            }
            Action::WriteState(change) => {
                self.tell_of(inner, &change);
                let me = self.me();
                spawn_local(async move {
                    let is_forgotten = change == StateChange::Forget;
                    let is_commit = matches!(change, StateChange::Commit { .. });
                    let written = me.note_state(me.write_state(change).await);
                    me.drive(|inner| inner.machine.handle_state_written(written));
                    if is_commit {
                        // It counts from now on, and so must the primary's word.
                        let now = me.now();
                        me.drive(|inner| inner.machine.ask_promise(now));
                    }
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
                self.ending_layers.set(self.ending_layers.get() + 1);
                spawn_local(async move {
                    me.end_layer(layer).await;
                    me.ending_layers.set(me.ending_layers.get() - 1);
                    me.idle.notify_one();
                });
            }
            Action::ReadDigest { frame, range } => {
                let me = self.me();
                spawn_local(async move {
                    let digest = crate::content::digest(&*me.storage, &me.backing, &me.pool, range).await;
                    let digest = match digest {
                        Ok(digest) => Some(digest),
                        Err(error) => {
                            let text = crate::words::with_causes(&error);
                            tracing::warn!(volume = %me.name, "{text}: it is copied from the primary");
                            None
                        }
                    };
                    me.drive(|inner| {
                        inner.payloads.remove(&frame);
                        inner.machine.handle_digest(frame, digest);
                    });
                });
            }
            Action::SendContent { session, number, range, is_awaited } => {
                let Some(queue) = inner.outgoing.as_ref().map(|outgoing| outgoing.answers.queue(is_awaited))
                else {
                    return;
                };
                let me = self.me();
                spawn_local(async move { me.read_content(session, number, range, &queue).await });
            }
            Action::Send(message) => {
                if let Some(Outgoing { messages, unread, .. }) = &inner.outgoing {
                    // A session whose sender is gone is just ending; so is one whose primary doesn't read, which the
                    // sender finds.
                    if unread.get() <= session::UNREAD_LIMIT {
                        unread.set(unread.get() + 1);
                        drop(messages.send(message));
                    }
                }
            }
        }
    }

    fn apply(&self, inner: &mut Inner, frame: FrameId, range: ByteRange, zero: Option<bool>) {
        let data = inner.payloads.remove(&frame).expect("a frame's payload is kept until it is written");
        let Some(may_unmap) = zero else {
            return self.write(frame, Operation::Write { offset: range.offset, data, durable: false });
        };
        let me = self.me();
        spawn_local(async move {
            // A hole reads as zeroes already.
            if me.backing.find_hole(range).await.is_ok_and(|length| length == range.length) {
                return me.drive(|inner| inner.machine.handle_applied(frame, true));
            }
            me.write(frame, Operation::Zero { range, may_unmap });
        });
    }

    fn write(&self, frame: FrameId, operation: Operation) {
        self.submit(operation, move |replica, outcome| {
            let written = replica.note(outcome);
            replica.drive(|inner| inner.machine.handle_applied(frame, written));
        });
    }

    /// What the operator should hear of.
    fn tell_of(&self, inner: &Inner, change: &StateChange) {
        let (name, superblock) = (&self.name, self.state.superblock());
        match change {
            StateChange::Keep(_) => self.tell_of_unagreed(superblock.fence.holder),
            StateChange::Follow { fence, agrees: false } if superblock.layers.undo().is_some() => {
                self.tell_of_unagreed(fence.holder);
            }
            StateChange::Begin { source, rollback, keep } => {
                let bytes = inner.machine.undelivered_bytes(source.holder).unwrap_or(0);
                let is_first =
                    *rollback == superblock.layers.undo() && superblock.data == DataState::Consistent;
                let is_kept = *keep || is_first && bytes > 0 && consent::is_awaited(&superblock);
                if !is_kept {
                    return;
                }
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

    fn tell_of_unagreed(&self, primary: HostId) {
        let name = &self.name;
        tracing::warn!(
            volume = %name,
            "host {primary} took over, and nobody on this host has agreed to that; what it overwrites is kept: \
             blockmirror forget {name} agrees, blockmirror undo {name} brings it back"
        );
    }

    async fn write_state(&self, change: StateChange) -> Result<(), crate::state::StateError> {
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

    fn note_state(&self, outcome: Result<(), crate::state::StateError>) -> bool {
        let Err(error) = outcome else { return true };
        self.keep_error(&error);
        false
    }

    fn keep_error(&self, error: &dyn std::error::Error) {
        let text = crate::words::with_causes(error);
        tracing::error!("{text}");
        self.troubles.borrow().note(Kind::Copy, false, &text);
        self.error.borrow_mut().get_or_insert(text);
    }

    fn me(&self) -> Rc<Self> {
        self.me.upgrade().expect("whoever calls holds the volume")
    }
}
