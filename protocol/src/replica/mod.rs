//! A replica of one volume: receives frames, writes epochs in order, marks what is durable, acknowledges.
//!
//! # Rules
//!
//! - A frame of epoch e+1 is not written before e is durable on the backing (W3), nor before the marker of e-1 is
//!   durable (P3); until then it waits in memory, bounded by the window that [`crate::wire::message::Welcome`] offers.
//! - Overlapping frames are written in the order of their arrival (W1).
//! - An acknowledgement follows the sync that it tells of: durable epochs and durable copies share one sync (D2).
//! - A new greeting drains the old session: what waits is dropped, what is being written ends, and only then is the
//!   greeting answered. So nothing of an old session lands after a read for the new one (R1).
//! - "Inconsistent" is durable before the first frame of a resync is written, "consistent" only on the primary's
//!   commit, when everything before it is durable (P1).
//!
//! # The contract
//!
//! As for the tracker: `handle_*` takes an event, [`Replica::poll_action`] hands out what to do, and each action that
//! names an answer gets it exactly once. There are no time-outs. The shell holds the payload of each frame under its
//! [`FrameId`] until [`Action::Drop`], or until the write that [`Action::Apply`] asked for has ended.
//!
//! # What a crash leaves
//!
//! On the disk, every frame of the durable epochs and some of the next one: a state that a power cut could have left
//! on the primary's disk. What was not acknowledged is in the primary's window or map, and comes again.

mod receive;

use crate::disk::superblock::LINEAGE_LIMIT;
use crate::order::Order;
use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use crate::session::FRAME_COST_BYTES;
use crate::units::{
    BlockSize, CopyId, Epoch, GenerationId, Position, Sequence, Session as SessionNumber, Stream, VolumeId,
};
use crate::wire::message::{
    Acknowledgement, Commit, Committed, DataState, Digest, Fence, Hello, Message, Refusal, Refused,
    ResyncBegin, ResyncReady,
};
use crate::wire::{Body, FrameHeader};
use std::collections::{BTreeSet, HashMap, VecDeque};

/// A sync is worth its time once so many bytes of copies wait for it, or when no more are under way.
const COPY_SYNC_BYTES: u64 = 8 << 20;
/// No primary has more bytes of copies under way.
const COPY_LIMIT_BYTES: u64 = 128 << 20;

/// Names a frame and its payload.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FrameId(pub u64);

/// What the shell must do.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Write the frame's payload, or zeroes, to the backing; then [`Replica::handle_applied`].
    Apply {
        /// The frame.
        frame: FrameId,
        /// Where.
        range: ByteRange,
        /// For a write of zeroes, whether the space may be given back.
        zero: Option<bool>,
    },
    /// Forget the frame's payload.
    Drop(FrameId),
    /// Make all ended writes durable on the backing; then [`Replica::handle_synced`].
    Sync,
    /// Write the marker, durably; then [`Replica::handle_marker_written`].
    WriteMarker(Position),
    /// Record this in the superblock, durably; then [`Replica::handle_state_written`].
    WriteState(StateChange),
    /// Read and digest (BLAKE3) a range; then [`Replica::handle_digest`].
    ReadDigest {
        /// The frame that asked.
        frame: FrameId,
        /// What to read.
        range: ByteRange,
    },
    /// Send a control message to the primary.
    Send(Message),
}

/// A change of what the superblock says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct StateChange {
    /// What the backing holds.
    pub data: DataState,
    /// Where that was so, for a commit.
    pub position: Option<Position>,
    /// The generations to adopt, for a commit.
    pub lineage: Option<Vec<GenerationId>>,
}

/// The primary broke the protocol; the session must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the primary broke the protocol: {0}")]
pub struct PrimaryMisbehaved(pub &'static str);

/// What is fixed for a replica while it is open.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The volume.
    pub volume: VolumeId,
    /// This copy.
    pub copy: CopyId,
    /// The volume's size in bytes.
    pub size_bytes: u64,
    /// The tracking block.
    pub block_size: BlockSize,
    /// The backing's physical sector, in bytes.
    pub sector_bytes: u32,
    /// How many bytes of live frames may wait in memory.
    pub window_bytes: u64,
}

/// What a replica reports to status.
#[derive(Clone, PartialEq, Debug)]
pub struct Report {
    /// Whether a session is open.
    pub connected: bool,
    /// What the backing holds.
    pub data: DataState,
    /// The last durable epoch.
    pub position: Position,
    /// Bytes received that are not durable yet.
    pub waiting_bytes: u64,
    /// How far a resync is: bytes written, and bytes expected.
    pub resync: Option<(u64, u64)>,
}

/// See the module.
#[derive(Debug)]
pub struct Replica {
    settings: Settings,
    data: DataState,
    fence: Fence,
    lineage: Vec<GenerationId>,
    position: Position,
    order: Order<FrameId>,
    items: HashMap<FrameId, Item>,
    link: Option<Link>,
    /// A greeting that waits for the old session to drain.
    greeting: Option<Hello>,
    last_session: SessionNumber,
    sync: Option<SyncScope>,
    marker: Marker,
    state_changes: VecDeque<(StateChange, Message, SessionNumber)>,
    writing_state: bool,
    failed: bool,
    actions: VecDeque<Action>,
}

#[derive(Debug)]
struct Link {
    session: SessionNumber,
    stream: Stream,
    generation: GenerationId,
    received: Sequence,
    /// The epoch that arriving frames belong to, until its end.
    open: Option<Epoch>,
    /// The last epoch that has ended.
    closed: Epoch,
    /// The epoch whose frames are all being written or written already.
    ended: Option<(Epoch, Sequence)>,
    /// Frames of later epochs, and what came after them.
    queue: VecDeque<(FrameId, Body)>,
    live_under_way: usize,
    live_bytes: u64,
    durable: Epoch,
    copies: Copies,
    resync: Option<(u64, u64)>,
}

#[derive(Debug, Default)]
struct Copies {
    received: u64,
    /// All up to this one are written.
    written: u64,
    written_beyond: BTreeSet<u64>,
    /// All up to this one are durable.
    durable: u64,
    under_way: usize,
    under_way_bytes: u64,
    unsynced_bytes: u64,
    written_bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct Item {
    session: SessionNumber,
    body: Body,
}

#[derive(Debug)]
struct SyncScope {
    session: Option<SessionNumber>,
    epoch: Option<(Epoch, Sequence)>,
    copies: u64,
}

#[derive(Debug, Default)]
struct Marker {
    writing: bool,
    waiting: Option<Position>,
}

impl Replica {
    /// A replica as its metadata says.
    #[must_use]
    pub fn new(
        settings: Settings,
        data: DataState,
        marker: Position,
        fence: Fence,
        lineage: Vec<GenerationId>,
    ) -> Self {
        Self {
            settings,
            data,
            fence,
            lineage,
            position: marker,
            order: Order::new(settings.sector_bytes.into()),
            items: HashMap::new(),
            link: None,
            greeting: None,
            last_session: SessionNumber(0),
            sync: None,
            marker: Marker::default(),
            state_changes: VecDeque::new(),
            writing_state: false,
            failed: false,
            actions: VecDeque::new(),
        }
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// The primary's link is gone: what waits is dropped, what is being written ends.
    pub fn handle_disconnected(&mut self) {
        self.greeting = None;
        self.unlink();
    }

    /// A control message of the primary.
    ///
    /// # Errors
    /// [`PrimaryMisbehaved`] when the session must end.
    pub fn handle_message(&mut self, message: Message) -> Result<(), PrimaryMisbehaved> {
        if let Message::Hello(hello) = message {
            self.greet(hello);
            return Ok(());
        }
        if let Message::Members(_) = message {
            // For the shell, which keeps the members' addresses.
            return Ok(());
        }
        let Some(link) = &mut self.link else {
            return Err(PrimaryMisbehaved("it spoke before it greeted"));
        };
        let session = link.session;
        match message {
            Message::ResyncBegin(ResyncBegin { session: theirs, dirty_bytes }) if theirs == session => {
                let already = link.copies.written_bytes;
                link.resync = Some((already, dirty_bytes));
                let change = StateChange { data: DataState::Inconsistent, position: None, lineage: None };
                self.change_state(change, ResyncReady { session }.into(), session);
                Ok(())
            }
            Message::Commit(Commit { session: theirs, position, mut lineage }) if theirs == session => {
                if position.epoch > link.durable {
                    return Err(PrimaryMisbehaved("it committed an epoch that is not durable here"));
                }
                link.resync = None;
                lineage.truncate(LINEAGE_LIMIT);
                let change = StateChange {
                    data: DataState::Consistent,
                    position: Some(position),
                    lineage: Some(lineage),
                };
                self.change_state(change, Committed { session, position }.into(), session);
                Ok(())
            }
            _ => Err(PrimaryMisbehaved("it sent a message that does not fit the session")),
        }
    }

    /// A frame has arrived whole.
    ///
    /// # Errors
    /// [`PrimaryMisbehaved`] when the session must end; the frame is dropped.
    pub fn handle_frame(&mut self, frame: FrameId, header: FrameHeader) -> Result<(), PrimaryMisbehaved> {
        let accepted = self.accept(frame, header);
        if !matches!(accepted, Ok(true)) {
            self.actions.push_back(Action::Drop(frame));
        }
        self.go_on();
        accepted.map(|_| ())
    }

    /// A frame was written to the backing, or could not be.
    pub fn handle_applied(&mut self, frame: FrameId, written: bool) {
        let item = self.items.remove(&frame).expect("a frame is written once");
        let freed = self.order.finish(frame, item.body.range());
        self.run(freed);
        if !written {
            return self.fail();
        }
        if let Some(link) = self.link.as_mut().filter(|link| link.session == item.session) {
            link.applied(item.body);
        }
        self.go_on();
    }

    /// A range was digested for a compare, or could not be read.
    pub fn handle_digest(&mut self, frame: FrameId, digest: Option<[u8; 32]>) {
        let item = self.items.remove(&frame).expect("a range is digested once");
        let freed = self.order.finish(frame, item.body.range());
        self.run(freed);
        let Some(digest) = digest else { return self.fail() };
        if let Some(link) = self.link.as_mut().filter(|link| link.session == item.session)
            && let Body::Digest { number, .. } = item.body
        {
            link.live_under_way -= 1;
            self.actions.push_back(Action::Send(Digest { session: item.session, number, digest }.into()));
        }
        self.go_on();
    }

    /// The backing was synced, or could not be: then nothing of it is acknowledged (W5).
    pub fn handle_synced(&mut self, synced: bool) {
        let scope = self.sync.take().expect("a sync ends once");
        if !synced {
            return self.fail();
        }
        if let Some(link) = self.link.as_mut().filter(|link| Some(link.session) == scope.session) {
            link.copies.durable = scope.copies;
            if let Some((epoch, sequence)) = scope.epoch {
                link.durable = epoch;
                link.ended = None;
                self.position = Position { generation: link.generation, epoch, sequence };
                assert!(self.marker.waiting.is_none(), "an epoch waits for the marker before the last");
                self.marker.waiting = Some(self.position);
            }
            let acknowledgement = Acknowledgement {
                session: link.session,
                received: link.received,
                durable: link.durable,
                copies: link.copies.durable,
            };
            self.actions.push_back(Action::Send(acknowledgement.into()));
        }
        self.go_on();
    }

    /// The marker is durable, or could not be written.
    pub fn handle_marker_written(&mut self, written: bool) {
        assert!(self.marker.writing, "a marker is written once");
        self.marker.writing = false;
        if !written {
            return self.fail();
        }
        self.go_on();
    }

    /// The superblock is durable, or could not be written.
    pub fn handle_state_written(&mut self, written: bool) {
        assert!(self.writing_state, "a state is written once");
        self.writing_state = false;
        let (change, answer, session) = self.state_changes.pop_front().expect("it was being written");
        if !written {
            return self.fail();
        }
        self.data = change.data;
        if let Some(lineage) = change.lineage {
            self.lineage = lineage;
        }
        if self.link.as_ref().is_some_and(|link| link.session == session) {
            self.actions.push_back(Action::Send(answer));
        }
        self.go_on();
    }

    /// Whether the backing failed: it must be reopened before the next session (W5).
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.failed
    }

    /// The session that is open, if any.
    #[must_use]
    pub fn session(&self) -> Option<SessionNumber> {
        self.link.as_ref().map(|link| link.session)
    }

    /// Whether nothing is being written.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.order.is_idle() && self.sync.is_none() && !self.marker.writing && !self.writing_state
    }

    /// The replica's numbers, for status.
    #[must_use]
    pub fn report(&self) -> Report {
        Report {
            connected: self.link.is_some(),
            data: self.data,
            position: self.position,
            waiting_bytes: self.link.as_ref().map_or(0, |link| link.live_bytes),
            resync: self.link.as_ref().and_then(|link| {
                let (before, expected) = link.resync?;
                Some((link.copies.written_bytes - before, expected))
            }),
        }
    }

    fn run(&mut self, frames: Vec<FrameId>) {
        for frame in frames {
            let body = self.items[&frame].body;
            let range = body.range();
            self.actions.push_back(match body {
                Body::Digest { .. } => Action::ReadDigest { frame, range },
                Body::Zero { may_unmap, .. } => Action::Apply { frame, range, zero: Some(may_unmap) },
                Body::CopyZero { .. } => Action::Apply { frame, range, zero: Some(true) },
                _ => Action::Apply { frame, range, zero: None },
            });
        }
    }

    /// Whatever can go on goes on.
    fn go_on(&mut self) {
        if self.failed {
            return;
        }
        self.write_marker();
        self.start_queued();
        self.start_sync();
        self.write_state();
        self.welcome();
    }

    /// Writes the marker of the last durable epoch when the one before is durable.
    fn write_marker(&mut self) {
        if !self.marker.writing
            && let Some(position) = self.marker.waiting.take()
        {
            self.marker.writing = true;
            self.actions.push_back(Action::WriteMarker(position));
        }
    }

    /// Begins to write the queued frames of the epoch that may be written now.
    fn start_queued(&mut self) {
        while let Some(link) = &mut self.link {
            let Some((frame, body)) = link.queue.front().copied() else { return };
            // An ended epoch must become durable first (W3), and then the marker of the one before it (P3).
            let is_ended = link.ended.is_some() && !planted(Bug::NextEpochEarly);
            if is_ended || self.marker.waiting.is_some() {
                return;
            }
            link.queue.pop_front();
            if let Body::EpochEnd { epoch, sequence } = body {
                link.ended = Some((epoch, sequence));
            } else {
                link.live_under_way += 1;
                self.admit(frame, body);
            }
        }
    }

    fn start_sync(&mut self) {
        if self.sync.is_some() {
            return;
        }
        let Some(link) = &mut self.link else { return };
        let epoch = link.ended.filter(|_| link.live_under_way == 0);
        let copies = &mut link.copies;
        let copies_wait = copies.written > copies.durable
            && (copies.unsynced_bytes >= COPY_SYNC_BYTES || copies.under_way == 0);
        if epoch.is_some() || copies_wait {
            copies.unsynced_bytes = 0;
            self.sync = Some(SyncScope { session: Some(link.session), epoch, copies: copies.written });
            self.actions.push_back(Action::Sync);
        }
    }

    fn change_state(&mut self, change: StateChange, answer: Message, session: SessionNumber) {
        self.state_changes.push_back((change, answer, session));
        self.go_on();
    }

    fn write_state(&mut self) {
        if !self.writing_state
            && let Some((change, ..)) = self.state_changes.front()
        {
            self.writing_state = true;
            self.actions.push_back(Action::WriteState(change.clone()));
        }
    }

    /// The backing or its metadata failed: nothing is acknowledged any more (W5).
    fn fail(&mut self) {
        if !self.failed {
            self.failed = true;
            let text = "the replica's disk failed or is full; see the replica's log".into();
            self.actions.push_back(Action::Send(Refused { refusal: Refusal::Backing, text }.into()));
        }
        self.unlink();
    }
}

impl Link {
    /// Whether a frame of this epoch may come now: epochs come one after the other, each up to its end. One in which
    /// nothing was streamed to this replica may be left out.
    fn is_open(&mut self, epoch: Epoch) -> bool {
        epoch > self.closed && *self.open.get_or_insert(epoch) == epoch
    }

    /// A frame of this session was written.
    fn applied(&mut self, body: Body) {
        match body {
            Body::Copy { number, range } | Body::CopyZero { number, range } => {
                self.copies.under_way -= 1;
                self.copies.under_way_bytes -= range.length;
                self.copies.unsynced_bytes += range.length;
                self.copies.written_bytes += range.length;
                self.copies.written_beyond.insert(number);
                while self.copies.written_beyond.remove(&(self.copies.written + 1)) {
                    self.copies.written += 1;
                }
            }
            _ => {
                self.live_under_way -= 1;
                self.live_bytes -= body.payload_bytes() + FRAME_COST_BYTES;
            }
        }
    }
}
