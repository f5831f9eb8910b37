//! The link of a primary to one replica: dials, greets, sends and receives, and begins again when it was lost.
//!
//! One task per replica. While a link is up it runs four loops that share nothing but the primary: one takes the
//! replica's messages to the tracker, three send what the tracker queued. When any of them ends, the link is over: the
//! queues are dropped, the tracker puts what was not acknowledged into the map, and the task backs off and dials anew.

use super::Primary;
use crate::config::{Compression, Mode, Name, PeerConfig};
use crate::transport::packing::{Frame, Packer};
use crate::transport::{Connection, FrameSender, Limit, Peers, SendError};
use blockmirror_protocol::peer::PeerError;
use blockmirror_protocol::succession::Succeeded;
use blockmirror_protocol::terms::Fence;
use blockmirror_protocol::units::{HostId, Session};
use blockmirror_protocol::wire::message::{Fetching, Members, Message, Parting, Refusal};
use blockmirror_protocol::wire::{HEADER_BYTES, StreamKind, StreamPreamble};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::pin::Pin;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// The first pause after a lost link, and the longest.
const BACK_OFF: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(10));
/// A link that lived so long begins its pauses anew.
const STABLE: Duration = Duration::from_secs(10);
/// How long a replica that is left may take to hear of it, and one that leaves to say why.
const PARTING_TIME: Duration = Duration::from_secs(1);
/// How many frames are handed to the transport at once.
const BATCH: usize = 64;
/// A replica that lets more messages wait to be read is left: it asks for answers without an end (X1).
const UNREAD_LIMIT: usize = 1 << 12;

/// So much payload is packed on another thread, in bytes: the volume's has better things to do meanwhile.
const PACKED_ELSEWHERE_BYTES: usize = 32 << 10;

/// What the tracker wants sent.
pub(super) enum Queued {
    Message(Message),
    Live([u8; HEADER_BYTES], Bytes),
    Bulk([u8; HEADER_BYTES], Bytes),
}

/// Where a link's senders find what to send. Bounded by the session's window and its copies under way, and by how many messages
/// a replica may leave unread.
pub(super) struct LinkQueues {
    control: UnboundedSender<Message>,
    live: UnboundedSender<Frame>,
    bulk: UnboundedSender<Frame>,
    /// How many messages wait to be sent.
    unread: Rc<Cell<usize>>,
}

struct LinkSources {
    control: UnboundedReceiver<Message>,
    live: UnboundedReceiver<Frame>,
    bulk: UnboundedReceiver<Frame>,
}

/// How a link is, for status.
#[derive(Clone, Debug, Default)]
pub struct LinkState {
    /// Whether the operator paused it.
    pub paused: bool,
    /// Whether the operator paused it on the replica.
    pub paused_there: bool,
    /// What went wrong last, in words; nothing while all is well.
    pub error: Option<String>,
    /// Whether the replica said that its backing failed.
    pub replica_failed: bool,
    /// Whether both hosts wrote after they were last in sync, or have no history in common: the operator decides.
    pub split: Option<Split>,
}

/// Why two hosts can't go on with each other by themselves (L3).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Split {
    /// Both wrote after they were last in sync, or were promoted at the same time.
    Brain,
    /// The other one has what this one lacks, which was recovered from an older copy or set back (X4).
    Beyond,
    /// Their histories have nothing in common.
    Strangers,
}

/// A replica and how it is reached.
pub struct Link {
    host: HostId,
    name: RefCell<Name>,
    addresses: RefCell<Vec<String>>,
    members: RefCell<Members>,
    state: RefCell<LinkState>,
    changed: Notify,
    stopped: Cell<bool>,
    /// Two hosts use the replica's key: nobody knows which of them a session is with.
    is_doubled: Cell<bool>,
    mode: Cell<Mode>,
    compression: Cell<Compression>,
    /// The session is to begin anew.
    restart: Cell<bool>,
    /// The replica is to be told that it is left.
    parts: Cell<bool>,
    /// Where messages of the session that is open go, and its number.
    session: RefCell<Option<(UnboundedSender<Message>, Session)>>,
    /// Set when [`Link::keep_linked`] has ended.
    ended: tokio::sync::watch::Sender<bool>,
    superseded: Box<dyn Fn(Succeeded)>,
    /// Called when it is time to ask this host who the volume's hosts are.
    asks: Box<dyn Fn()>,
}

/// Why a link ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error(transparent)]
    Connect(#[from] std::sync::Arc<crate::transport::ConnectError>),
    #[error(transparent)]
    State(#[from] crate::state::metadata::StateError),
    #[error(transparent)]
    Lost(#[from] crate::transport::Lost),
    #[error(transparent)]
    Send(#[from] SendError),
    #[error(transparent)]
    Receive(#[from] crate::transport::ReceiveError),
    #[error(transparent)]
    Peer(#[from] PeerError),
}

impl LinkQueues {
    fn new() -> (Self, LinkSources) {
        let (control, control_source) = unbounded_channel();
        let (live, live_source) = unbounded_channel();
        let (bulk, bulk_source) = unbounded_channel();
        let sources = LinkSources { control: control_source, live: live_source, bulk: bulk_source };
        (Self { control, live, bulk, unread: Rc::default() }, sources)
    }

    /// A queue whose other end is gone belongs to a link that is just ending.
    pub(super) fn push(&self, queued: Queued) {
        match queued {
            Queued::Message(message) => {
                self.unread.set(self.unread.get() + 1);
                drop(self.control.send(message));
            }
            Queued::Live(header, payload) => drop(self.live.send((header, payload))),
            Queued::Bulk(header, payload) => drop(self.bulk.send((header, payload))),
        }
    }
}

impl Link {
    /// A replica that is dialled by [`Link::keep_linked`]. `superseded` is called when it knows of a newer fence than
    /// this primary's (L5), `asks` when it was met anew, or doesn't know this host: it may know of removals (X3).
    #[must_use]
    pub fn new(
        config: &PeerConfig,
        superseded: impl Fn(Succeeded) + 'static,
        asks: impl Fn() + 'static,
    ) -> Rc<Self> {
        Rc::new(Self {
            host: config.host,
            name: RefCell::new(config.name.clone()),
            addresses: RefCell::new(addresses_of(config)),
            members: RefCell::default(),
            state: RefCell::new(LinkState { paused: config.paused, ..LinkState::default() }),
            changed: Notify::new(),
            stopped: Cell::new(false),
            is_doubled: Cell::new(false),
            mode: Cell::new(config.mode),
            compression: Cell::new(config.compression),
            restart: Cell::new(false),
            parts: Cell::new(false),
            session: RefCell::default(),
            ended: tokio::sync::watch::Sender::new(false),
            superseded: Box::new(superseded),
            asks: Box::new(asks),
        })
    }

    /// How the link is.
    #[must_use]
    pub fn state(&self) -> LinkState {
        self.state.borrow().clone()
    }

    /// Who is told to the replica as the volume's hosts, from the next session on.
    pub fn introduce(&self, members: Members) {
        *self.members.borrow_mut() = members;
    }

    /// The replica.
    #[must_use]
    pub fn host(&self) -> HostId {
        self.host
    }

    /// Ends the session; the next one tells the replica who the volume's hosts are.
    pub fn greet_anew(&self) {
        self.restart.set(true);
        self.changed.notify_one();
    }

    /// The operator paused the link or lets it go on, or chose another mode, which a new session begins with, or the
    /// replica is reached elsewhere.
    pub fn configure(&self, config: &PeerConfig) {
        *self.addresses.borrow_mut() = addresses_of(config);
        self.name.borrow_mut().clone_from(&config.name);
        if self.mode.replace(config.mode) != config.mode {
            self.restart.set(true);
            self.parts.set(true);
        }
        self.compression.set(config.compression);
        if !std::mem::replace(&mut self.state.borrow_mut().paused, config.paused) && config.paused {
            self.parts.set(true);
        }
        self.changed.notify_one();
    }

    /// Whether two hosts use the replica's key: no session is begun as long as that is so, and one that is open ends.
    pub fn set_doubled(&self, is_doubled: bool) {
        if self.is_doubled.replace(is_doubled) != is_doubled {
            self.changed.notify_one();
        }
    }

    /// Ends [`Link::keep_linked`].
    pub fn stop(&self) {
        self.stopped.set(true);
        self.changed.notify_one();
    }

    /// As [`Link::stop`]; the host, which is a peer no more, is told what was queued for it, and that it is left.
    pub fn part(&self) {
        self.parts.set(true);
        self.stop();
    }

    /// Waits for the end of [`Link::keep_linked`].
    pub async fn ended(&self) {
        // An error would mean that the sender is gone, which is here.
        let _ = self.ended.subscribe().wait_for(|ended| *ended).await;
    }

    fn may_link(&self) -> bool {
        !self.stopped.get() && !self.is_doubled.get() && !self.state.borrow().paused
    }

    /// Keeps a session with the replica open until [`Link::stop`].
    pub async fn keep_linked(self: Rc<Self>, primary: Rc<Primary>, peers: Peers) {
        let mut pause = BACK_OFF.0;
        while !self.stopped.get() {
            if !self.may_link() {
                self.changed.notified().await;
                continue;
            }
            self.restart.set(false);
            self.parts.set(false);
            let began = Instant::now();
            let ended = {
                let link = self.link(&primary, &peers);
                tokio::pin!(link);
                tokio::select! {
                    ended = &mut link => Some(ended),
                    () = self.interrupted() => {
                        if self.parts.take() && self.say_parting() {
                            // It ends when the replica has answered.
                            let _ = tokio::time::timeout(PARTING_TIME, link).await;
                        }
                        None
                    }
                }
            };
            self.session.take();
            primary.disconnected(self.host);
            let Some(Err(error)) = ended else { continue };
            self.note(&error, primary.state().superblock().fence);
            pause = if began.elapsed() >= STABLE { BACK_OFF.0 } else { (pause * 2).min(BACK_OFF.1) };
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.changed.notified() => {}
            }
        }
        self.ended.send_replace(true);
    }

    async fn interrupted(&self) {
        while self.may_link() && !self.restart.take() {
            self.changed.notified().await;
        }
    }

    /// What is replied from now on may be missing on the replica, and only the operator can say by how much: it is not to
    /// count for its mode (W4). Says whether there is a session to say so in.
    fn say_parting(&self) -> bool {
        let session = self.session.take();
        session.is_some_and(|(control, session)| {
            control.send(Parting { session, paused: self.state.borrow().paused }.into()).is_ok()
        })
    }

    /// What is wrong with a session, where a fence that the replica told of may be out of bounds, or that of a host that
    /// is none of the volume's (X2). This host's own promotions are nobody else's to tell.
    fn believed(&self, error: PeerError, own: Fence) -> PeerError {
        let PeerError::Superseded(fence) = error else { return error };
        let members = self.members.borrow();
        let is_own = members.members.first().is_some_and(|first| first.host == fence.holder);
        if !own.may_become(fence) {
            PeerError::Misbehaved("it tells of more promotions than there were")
        } else if fence.supersedes(own)
            && (is_own || members.members.iter().all(|known| known.host != fence.holder))
        {
            PeerError::Misbehaved("it tells of a promotion of a host that was not promoted")
        } else {
            error
        }
    }

    /// The host broke the protocol where it greeted as the primary: status says so.
    pub fn accuse(&self, error: &dyn std::error::Error) {
        let text = crate::words::with_causes(error);
        tracing::warn!(peer = %self.name.borrow(), "{text}");
        self.state.borrow_mut().error = Some(text);
    }

    /// Says once what is wrong; the same again is not news.
    fn note(&self, error: &LinkError, own: Fence) {
        let name = self.name.borrow();
        let text = crate::words::with_name(error, self.host, &name);
        let mut state = self.state.borrow_mut();
        state.paused_there =
            matches!(error, LinkError::Peer(PeerError::Refused(no)) if no.refusal == Refusal::Paused);
        if state.paused_there {
            state.error = None;
            return tracing::info!(peer = %name, "the mirroring is paused there");
        }
        if state.error.as_ref() != Some(&text) {
            tracing::warn!(peer = %name, "{text}");
        }
        state.error = Some(text);
        let LinkError::Peer(error) = error else { return };
        match error {
            PeerError::Refused(refused) => {
                state.replica_failed = refused.refusal == Refusal::Backing;
                state.split = match refused.refusal {
                    Refusal::SplitBrain => Some(Split::Brain),
                    Refusal::Beyond => Some(Split::Beyond),
                    _ => None,
                };
                if refused.refusal == Refusal::UnknownKey {
                    drop(state);
                    (self.asks)();
                }
            }
            PeerError::SplitBrain => state.split = Some(Split::Brain),
            PeerError::NothingInCommon => state.split = Some(Split::Strangers),
            PeerError::Superseded(fence) if fence.supersedes(own) => {
                drop(state);
                (self.superseded)(Succeeded { fence: *fence, by: self.host });
            }
            // Both were promoted, and neither before the other.
            PeerError::Superseded(_) => state.split = Some(Split::Brain),
            PeerError::Misbehaved(_)
            | PeerError::Incompatible(_)
            | PeerError::Reused
            | PeerError::SourceChanged => {}
        }
    }

    /// One session, from dialling to its end.
    async fn link(&self, primary: &Rc<Primary>, peers: &Peers) -> Result<(), LinkError> {
        let addresses = self.addresses.borrow().clone();
        let connection = peers.connection_to(self.host, &addresses).await?;
        let (mut sender, mut receiver) = connection.open_control().await?;
        let session = primary.next_session().await?;
        let (queues, mut sources) = LinkQueues::new();
        let unread = queues.unread.clone();
        *self.session.borrow_mut() = Some((queues.control.clone(), session));
        let members = self.members.borrow().clone();
        let identity = primary.identity(members.members.clone());
        primary.connected(self.host, session, &identity, queues);
        // Behind the greeting.
        primary.tell(self.host, members);
        let volume = identity.volume;
        let (is_parting, linked) = (Cell::new(false), Notify::new());
        let receive = async {
            loop {
                let message = receiver.receive().await?;
                let is_union = matches!(&message, Message::Union(union) if union.last);
                let has_parted = is_parting.get() && matches!(message, Message::Parted(_));
                let own = identity.fence;
                primary.message(self.host, message).map_err(|error| self.believed(error, own))?;
                if unread.get() > UNREAD_LIMIT {
                    return Err(PeerError::Misbehaved("it does not read what it is answered").into());
                }
                if has_parted {
                    return Ok(());
                }
                if is_union {
                    linked.notify_one();
                    let mut state = self.state.borrow_mut();
                    *state = LinkState { paused: state.paused, ..LinkState::default() };
                    (self.asks)();
                }
            }
        };
        let send_messages = async {
            while let Some(message) = sources.control.recv().await {
                // Not all of them are answers.
                unread.set(unread.get().saturating_sub(1));
                sender.send(&message).await?;
                if matches!(message, Message::Parting(_)) {
                    // The link ends when the replica has said that it counts on nothing.
                    is_parting.set(true);
                    std::future::pending::<()>().await;
                }
            }
            Ok(sender.finish().await?)
        };
        let preamble = |kind| StreamPreamble { volume, session, kind };
        let no_limit = Limit::default();
        let connection_of_fetches = &connection;
        let live = self.send_frames(&connection, preamble(StreamKind::Live), &mut sources.live, &no_limit);
        let limit = peers.resync_limit();
        let bulk = self.send_frames(&connection, preamble(StreamKind::Bulk), &mut sources.bulk, limit);
        let is_source = primary.rebuild().is_some_and(|rebuild| rebuild.source == self.host);
        let fetching = async {
            if !is_source {
                return std::future::pending().await;
            }
            // Before, the replica knows nothing of the session.
            linked.notified().await;
            if !primary.may_fetch_from(self.host) {
                // It is of a release that has nothing to answer: all else goes on.
                return std::future::pending().await;
            }
            let take = |is_awaited| async move {
                let (mut sender, receiver) = connection_of_fetches.open_control().await?;
                sender.send(&Fetching { volume, session, is_awaited }.into()).await?;
                primary.take_fetched(session, receiver.into_frames()).await?;
                Ok::<(), LinkError>(())
            };
            tokio::try_join!(take(true), take(false)).map(|_| ())
        };
        let ended: Result<(), LinkError> = tokio::select! {
            ended = receive => ended,
            ended = fetching => ended,
            ended = send_messages => ended,
            ended = after_a_word(live) => ended,
            ended = after_a_word(bulk) => ended,
        };
        ended
    }

    /// Sends the frames of one queue, many at a time, until the queue or the connection ends, or the replica takes no more
    /// of them.
    async fn send_frames(
        &self,
        connection: &Connection,
        preamble: StreamPreamble,
        source: &mut UnboundedReceiver<Frame>,
        limit: &Limit,
    ) -> Result<(), LinkError> {
        let mut frames = Vec::with_capacity(BATCH);
        let mut stream: Option<FrameSender> = None;
        let mut refused: Pin<Box<dyn Future<Output = SendError>>> = Box::pin(std::future::pending());
        let mut packer = None;
        loop {
            let count = tokio::select! {
                biased;
                count = source.recv_many(&mut frames, BATCH) => count,
                // The replica never answers what it did not take in: the session would get nowhere.
                error = &mut refused => return Err(error.into()),
            };
            if count == 0 {
                return Ok(());
            }
            limit.wait_for(payload_bytes(&frames) as u64).await;
            self.pack(&mut frames, connection, &mut packer).await;
            let sender = match &mut stream {
                Some(sender) => sender,
                none => {
                    let sender = none.insert(connection.open_frames(&preamble).await?);
                    refused = Box::pin(sender.refused());
                    sender
                }
            };
            for (header, payload) in frames.drain(..) {
                sender.queue(&header, payload);
            }
            sender.flush().await?;
        }
    }

    /// Packs what is about to be sent, if the operator wants that and the link is slow enough.
    async fn pack(&self, frames: &mut Vec<Frame>, connection: &Connection, packer: &mut Option<Packer>) {
        let Some(packing) = self.compression.get().packing() else {
            *packer = None;
            return;
        };
        let mut ours =
            packer.take().filter(|ours| ours.packing() == packing).unwrap_or_else(|| Packer::new(packing));
        let bytes = payload_bytes(frames);
        if bytes > 0 && ours.wants(bytes, connection.speed()) {
            if bytes < PACKED_ELSEWHERE_BYTES {
                ours.pack(frames);
            } else {
                let mut sent = std::mem::take(frames);
                let packed = crate::blocking::spawn(move || {
                    ours.pack(&mut sent);
                    (ours, sent)
                });
                (ours, *frames) =
                    packed.await.expect("packing does not panic, and the runtime outlives its tasks");
            }
        }
        *packer = Some(ours);
    }
}

/// The end of a stream of frames. A replica that ends its session says why on the control stream, at about the same time:
/// that it was promoted, for one (L5), must not be missed.
async fn after_a_word(sending: impl Future<Output = Result<(), LinkError>>) -> Result<(), LinkError> {
    let ended = sending.await;
    if let Err(LinkError::Send(SendError::Stopped(_))) = &ended {
        tokio::time::sleep(PARTING_TIME).await;
    }
    ended
}

fn addresses_of(config: &PeerConfig) -> Vec<String> {
    config.addresses.iter().map(|address| address.as_str().to_owned()).collect()
}

fn payload_bytes(frames: &[Frame]) -> usize {
    frames.iter().map(|(_, payload)| payload.len()).sum()
}
