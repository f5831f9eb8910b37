//! One replica, seen from the primary: its dirty map, and the session with it while the link is up.
//!
//! # States
//!
//! ```text
//!            connected            welcomed, united                 map empty          epoch durable, committed
//!   Away ───────────────> Greeting ──────┬──────────────> Resyncing ─────────> Committing ─────────────> InSync
//!    ^                                   │                  ^    │                  ^                      │
//!    │ link lost, from any state         │ map empty        │    │ overflow         │ overflow             │
//!    │                                   └──────────────────┼────┼──────────────────┘ or failed write      │
//!    │                                                      │    v                                         │
//!    └                             window empty: Beginning ─┘  Draining <──────────────────────────────────┘
//! ```
//!
//! A link whose map is clean goes straight to *Committing*, and streams nothing before the commit is recorded: from then
//! on the replica's own maps of others are void. A write in that time marks, and the link goes to *Draining*.
//!
//! In *Away*, *Greeting*, *Draining* and *Beginning* every write only marks its blocks. In the others a write to clean
//! blocks is streamed, one to dirty blocks marks. So a block is never in both flows (R1): a block that is dirty while
//! live frames of it are unacknowledged exists only in *Draining*, where nothing is copied; copying begins when the
//! window is empty and the replica has recorded that it is inconsistent.
//!
//! # What a crash leaves
//!
//! Bits reach the disk late. Until they do, `Peer::safe_up_to` keeps their extents in the activity log (D1), and
//! a restart puts the log's extents into the map. Cleared bits that were not written are set again after a crash:
//! the blocks are copied once more.

mod answered;
mod denial;
mod expected;
mod following;
mod handshake;
mod marks;
mod newest;
mod pace;
mod phase;
mod report;
pub mod resync;
mod stream;
mod trials;
mod unreadable;
mod verify;
mod word;

use crate::dirty_map::{DirtyMap, MapChanges};
use crate::disk::dirty_map::Base;
use crate::given::Given;
use crate::order::Order;
use crate::planted::{Bug, planted};
use crate::promise::Granted;
use crate::ranges::ByteRange;
use crate::rebuild::{Absent, Asked};
use crate::terms::Mode;
use crate::units::RequestId;
use crate::units::{
    BlockSize, Epoch, Extent, GenerationId, HostId, Mark, Position, Sequence, Session, Stream, Time,
};
use crate::wire::message::{
    Acknowledgement, Committed, CopyDigest, FEATURE_FETCH, Fetch, Grant, Message, Parted, ReleaseRecorded,
    Renew, ResyncBegin, ResyncReady,
};
use crate::wire::{Body, FrameHeader};
use answered::{Answered, Followed};
use denial::Denial;
pub use handshake::{Handled, Identity, PeerError};
use marks::Marks;
use newest::Newest;
use phase::{Phase, Progress, Step};
pub use report::{Connection, ReplicaState, Report};
use resync::{CopyContent, CopyRead, Resync};
use std::collections::VecDeque;
use std::num::NonZeroU64;
use std::ops::Range;
use std::time::Duration;
use stream::Window;
pub(crate) use stream::frame_cost_bytes;
pub use verify::CompareResult;
use verify::Verify;
use word::Word;

/// How long an acknowledgement may be outstanding before the replica no longer counts as in sync (D4).
pub const ACKNOWLEDGEMENT_DEADLINE: Duration = Duration::from_secs(5);

/// A resync that has no more than so many blocks left to copy, for so long, asks their writers to wait (R2).
const TAIL_BLOCKS: u64 = 256;
const TAIL_TIME: Duration = Duration::from_secs(1);

/// What the shell must do for a peer.
#[derive(Debug)]
pub enum Action {
    /// Send a control message.
    Send(Message),
    /// Send a live frame; the payload is that part of the request's data.
    SendFrame {
        /// The frame.
        header: FrameHeader,
        /// Where the payload comes from; none where there is none.
        request: Option<RequestId>,
    },
    /// Write to the map's file: pages and holes, sync, header, sync; then [`Peer::handle_map_written`].
    WriteMap(MapChanges),
    /// Read this range of the backing; then [`Peer::handle_copy_read`].
    ReadCopy {
        /// Names the read.
        read: CopyRead,
        /// What to read.
        range: ByteRange,
        /// Whether the digest of the content is wanted, and not the content.
        digest: bool,
    },
    /// Send what the read gave, or drop it when there is no frame.
    SendCopy {
        /// Names the read.
        read: CopyRead,
        /// The frame; its body says whether there is payload.
        header: Option<FrameHeader>,
    },
    /// A compare needs writes to this range held; for the tracker, which carries it out itself.
    Hold {
        /// Which step of the compare.
        number: u64,
        /// What to hold.
        range: ByteRange,
    },
}

/// One replica, as its primary sees it: linked or not.
#[derive(Debug)]
pub struct Peer {
    host: HostId,
    /// Tells it from an earlier one with the same host, which was removed; the tracker's.
    pub(crate) incarnation: u64,
    block_size: BlockSize,
    size_bytes: u64,
    window_limit_bytes: u64,
    mode: Mode,
    marks: Marks,
    state: State,
    /// Whether a link that streamed was lost or broke off since this was last asked: the replica may have gone on alone,
    /// or lacks what comes now (L1).
    left: bool,
    newest: Newest,
    /// What the next link's first read will be named.
    next_read: CopyRead,
    /// How many bytes a second a resync may copy at most.
    resync_limit: Option<NonZeroU64>,
    /// The number of the next compare's first step.
    next_step: u64,
    since: Time,
    granted: Granted,
    answered: Answered,
    denial: Denial,
    word: Word,
    /// How many acknowledgements came.
    heard: u64,
    /// Whether the replica was found to have gone back, and was not in sync since (X4).
    went_back: bool,
    /// The number of a session that the replica knows and this primary, which was set back, does not.
    reused: Option<Session>,
    actions: VecDeque<Action>,
}

#[derive(Debug)]
enum State {
    Away,
    Greeting(Box<handshake::Greeting>),
    Linked(Box<Link>),
}

#[derive(Debug)]
struct Link {
    session: Session,
    stream: Stream,
    window_limit_bytes: u64,
    window: Window,
    /// The last write of the open epoch that was streamed.
    streamed: Option<Sequence>,
    /// While draining: the window's blocks are in the map too, so nothing depends on the replica's answer.
    spilled: bool,
    /// Whether what the replica said of itself is durable in the map. It is forgotten there when it adopts our content
    /// (D3).
    union_is_durable: bool,
    resync: Resync,
    progress: Progress,
    verify: Option<Verify>,
    durable: Epoch,
    /// The last live write that was sent, and the last one that the replica has received.
    sent: Sequence,
    received: Sequence,
    /// Since when only few blocks are left to copy.
    tail_since: Option<Time>,
    /// The replica's copy.
    copy: crate::units::CopyId,
    /// The newest epoch that the replica was told to be durable everywhere (D5).
    agreed: Epoch,
    /// Whether it was told so twice: the second time, it lets extents go that were idle since the first.
    agreed_twice: bool,
    /// How far a release is: asked for, recorded by the replica.
    released: Option<bool>,
    /// Whether the replica was told that it is passed over from now on.
    is_told_alone: bool,
    /// What both can, a bit each.
    features: u64,
}

impl Link {
    fn phase(&self) -> Phase {
        self.progress.phase()
    }

    /// Streams no more. Says whether the replica followed.
    fn break_off(&mut self, answered: &mut Answered) -> bool {
        let follows = self.phase().follows();
        answered.left(self.followed());
        self.progress.take(Step::BreakOff);
        follows
    }

    /// How far the replica got.
    fn followed(&self) -> Followed {
        let oldest = self.window.oldest().map(|(oldest, _)| oldest);
        Followed { sent: self.sent, received: self.received, oldest }
    }
}

/// A write as a peer sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LiveWrite {
    pub request: RequestId,
    pub range: ByteRange,
    pub epoch: Epoch,
    pub sequence: Sequence,
    /// For a write of zeroes, whether the space may be given back.
    pub zero: Option<bool>,
}

/// What the tracker knows that a peer goes on by.
pub(crate) struct Circumstances<'a> {
    /// Whether an application waits for the disk, or did a moment ago (R3).
    pub application_is_active: bool,
    /// The volume's generations, newest first.
    pub lineage: &'a [GenerationId],
    /// The last epoch that was closed, and the last write.
    pub position: (Epoch, Sequence),
    /// Where the content stood when the volume was opened, as long as nothing was written since.
    pub opened: Option<Position>,
    /// The first epoch of the newest generation that no replica may be told of (X4); nothing as long as nothing was written.
    pub told_before: Option<Epoch>,
    /// Whether the generation is one that a replica may be committed to (L1).
    pub may_commit: bool,
    /// The extents with writes that other replicas may lack; empty where there are no others (D5).
    pub active: &'a dyn Fn() -> Vec<Extent>,
    /// What of the primary's own copy is absent.
    pub absent: Option<&'a Absent>,
    /// Whether the primary's backing has failed. What it holds is copied to nobody who has an image.
    pub has_failed: bool,
}

/// What a peer needs from the tracker to go on.
#[derive(Clone, Copy, Default, Debug)]
pub(crate) struct Wants {
    /// An epoch must be closed for a commit.
    pub epoch_end: bool,
    /// A generation must begin before a commit.
    pub generation: bool,
    /// Replicas may not be told yet of the epoch that is to be committed.
    pub is_untold: bool,
}

impl LiveWrite {
    /// How much payload a frame for this part of the write has.
    fn payload_bytes(&self, part: ByteRange) -> u64 {
        if self.zero.is_some() { 0 } else { part.length }
    }
}

impl Peer {
    /// A replica that is not connected, with its map as recovered or [`DirtyMap::full`].
    #[must_use]
    pub fn new(
        host: HostId,
        map: DirtyMap,
        size_bytes: u64,
        block_size: BlockSize,
        window_limit_bytes: u64,
        mode: Mode,
    ) -> Self {
        let denial = Denial::new(map.is_unanswered(), map.base().generation, mode == Mode::Sync);
        let word = Word::new(map.given());
        let answered = Answered::new(!map.is_clean() && !denial.is_inherited());
        Self {
            host,
            incarnation: 0,
            block_size,
            size_bytes,
            window_limit_bytes,
            mode,
            marks: Marks::new(map),
            state: State::Away,
            left: false,
            newest: Newest::new(),
            next_read: CopyRead(0),
            resync_limit: None,
            next_step: 0,
            since: Time::default(),
            granted: Granted::default(),
            answered,
            denial,
            word,
            heard: 0,
            went_back: false,
            reused: None,
            actions: VecDeque::new(),
        }
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When `Peer::drive` has something to do by itself.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        let resync = match &self.state {
            State::Linked(link) if link.phase() == Phase::Resyncing => link.resync.timeout(),
            _ => None,
        };
        self.marks.timeout().into_iter().chain(resync).min()
    }

    /// The replica.
    #[must_use]
    pub fn host(&self) -> HostId {
        self.host
    }

    /// Whether it has answered a greeting of this primary: it has recorded that it follows it.
    pub(crate) fn is_heard(&self) -> bool {
        self.newest.is_heard()
    }

    /// The blocks that may differ.
    #[must_use]
    pub fn map(&self) -> &DirtyMap {
        &self.marks.map
    }

    /// A write was sequenced and is about to begin here: stream it or mark it (R1, W7).
    pub(crate) fn handle_write(&mut self, write: LiveWrite, now: Time) {
        let blocks = write.range.blocks(self.block_size);
        let State::Linked(link) = &mut self.state else {
            return self.marks.mark(blocks, write.sequence);
        };
        if !link.phase().streams() {
            link.resync.rewritten(&blocks);
            return self.marks.mark(blocks, write.sequence);
        }
        let parts: Vec<_> = self.marks.map.split(blocks.clone()).collect();
        let clean: Vec<ByteRange> = parts
            .iter()
            .filter(|(dirty, _)| !dirty || planted(Bug::SendBothVersions))
            .map(|(_, part)| ByteRange::of_blocks(part.clone(), self.block_size, self.size_bytes))
            .map(|bytes| bytes.intersection(write.range).expect("the part is the write's"))
            .collect();
        let payload_bytes = clean.iter().map(|range| write.payload_bytes(*range));
        if !link.window.has_room(payload_bytes, link.window_limit_bytes) {
            self.left |= link.break_off(&mut self.answered);
            link.resync.rewritten(&blocks);
            return self.marks.mark(blocks, write.sequence);
        }
        for (_, part) in parts.into_iter().filter(|(dirty, _)| *dirty) {
            let State::Linked(link) = &mut self.state else { unreachable!("the state was matched above") };
            link.resync.rewritten(&part);
            self.marks.mark(part, write.sequence);
        }
        for range in clean {
            self.stream(write, range, now);
        }
    }

    /// A local write failed: what the disk holds there now is unknown, and may differ from what was streamed (W5).
    pub(crate) fn handle_failed_write(&mut self, range: ByteRange, sequence: Sequence) {
        let blocks = range.blocks(self.block_size);
        self.marks.certain.mark(blocks.clone());
        self.distrust(blocks, sequence);
    }

    /// Blocks may differ that were taken for clean.
    fn distrust(&mut self, blocks: Range<u64>, sequence: Sequence) {
        if let State::Linked(link) = &mut self.state {
            link.resync.rewritten(&blocks);
            if link.phase().streams() {
                self.left |= link.break_off(&mut self.answered);
            }
        }
        self.marks.mark_doubtful(blocks, sequence);
    }

    /// Any block may differ, and none is known to (X4). `last` is the newest write.
    pub(crate) fn doubt_everything(&mut self, last: Sequence) {
        let whole = ByteRange::new(0, self.size_bytes);
        if let State::Linked(link) = &mut self.state {
            link.resync.rewritten(&whole.blocks(self.block_size));
            if link.phase().streams() {
                self.left |= link.break_off(&mut self.answered);
            }
        }
        self.mark_suspect(whole, last);
    }

    /// An epoch was closed (W3). The replica hears of it if it has frames of it, so that ends of epochs are as bounded
    /// as frames are, and that it claims no position that it doesn't have.
    pub(crate) fn handle_epoch_end(&mut self, epoch: Epoch, sequence: Sequence) {
        let State::Linked(link) = &mut self.state else { return };
        let streamed = link.streamed.take();
        let phase = link.phase();
        let cut = !phase.streams();
        let sequence = match phase {
            Phase::Committing { closed: None, streams: true, .. } => {
                link.progress.take(Step::Close(epoch, sequence));
                sequence
            }
            phase if phase.streams() && streamed.is_some() => sequence,
            // What was left out since the stream broke off is not the replica's.
            _ => match streamed {
                Some(last) => last,
                None => return,
            },
        };
        let header = FrameHeader {
            session: link.session,
            stream: link.stream,
            body: Body::EpochEnd { epoch, sequence, cut },
        };
        self.actions.push_back(Action::SendFrame { header, request: None });
    }

    /// Whether absent blocks of the primary are what this replica has. Then it is left where it is found to be another copy than
    /// it was, or to have gone back: nobody else has what is absent.
    pub(crate) fn set_source(&mut self, is_source: bool) {
        self.marks.is_source = is_source;
    }

    /// The session that is open.
    pub(crate) fn session(&self) -> Option<Session> {
        match &self.state {
            State::Linked(link) => Some(link.session),
            _ => None,
        }
    }

    /// Whether it is being resynced.
    pub(crate) fn is_resyncing(&self) -> bool {
        matches!(&self.state, State::Linked(link) if link.phase() == Phase::Resyncing)
    }

    /// Whether the replica may be asked for content.
    pub(crate) fn may_fetch(&self) -> bool {
        matches!(&self.state, State::Linked(link) if link.features & FEATURE_FETCH != 0)
    }

    /// Asks for content: see [`Peer::may_fetch`].
    pub(crate) fn fetch(&mut self, asked: Asked) {
        let State::Linked(link) = &self.state else { return };
        let Asked { id, range, is_awaited } = asked;
        let fetch = Fetch { session: link.session, number: id.0, range, is_awaited };
        self.actions.push_back(Action::Send(fetch.into()));
    }

    /// The read of a copy has ended. What was read for a link that was lost meanwhile is dropped.
    pub fn handle_copy_read(&mut self, read: CopyRead, content: CopyContent, now: Time) {
        let State::Linked(link) = &mut self.state else {
            return self.actions.push_back(Action::SendCopy { read, header: None });
        };
        let header = link.resync.read_ended(read, content, now).map(|(number, range)| FrameHeader {
            session: link.session,
            stream: link.stream,
            body: match content {
                CopyContent::Zero | CopyContent::Hole(_) => Body::CopyZero { range, number },
                CopyContent::Digest(_) => Body::CopyDigest { range, number },
                CopyContent::Data | CopyContent::Failed => Body::Copy { range, number },
            },
        });
        if let Some(header) = header.filter(|_| planted(Bug::ClearOnSend)) {
            self.marks.map.clear(header.body.range().blocks(self.block_size));
        }
        self.actions.push_back(Action::SendCopy { read, header });
    }

    /// The link was lost: what it had not acknowledged goes to the map (W7).
    pub fn handle_disconnected(&mut self, now: Time) {
        let state = std::mem::replace(&mut self.state, State::Away);
        if matches!(state, State::Linked(_)) {
            self.since = now;
        }
        self.actions
            .retain(|action| matches!(action, Action::WriteMap(_) | Action::SendCopy { header: None, .. }));
        let State::Linked(mut link) = state else { return };
        self.left |= link.break_off(&mut self.answered);
        self.answered.lost(link.followed(), self.mode);
        self.next_read = link.resync.next_read();
        if let Some((oldest, _)) = link.window.oldest().filter(|_| !planted(Bug::ForgetWindow)) {
            for range in link.window.ranges() {
                self.marks.mark_doubtful(range.blocks(self.block_size), oldest);
            }
        }
    }

    /// The application waits for room in the activity log that the window holds: its blocks go to the map, so that
    /// a slow replica blocks nobody (W7). What was sent still drains before anything is copied (R1).
    pub(crate) fn spill(&mut self) {
        let State::Linked(link) = &mut self.state else { return };
        if link.spilled || link.window.is_empty() {
            return;
        }
        link.spilled = true;
        self.left |= link.break_off(&mut self.answered);
        let (oldest, _) = link.window.oldest().expect("the window is not empty");
        let ranges: Vec<ByteRange> = link.window.ranges().collect();
        for range in ranges {
            let blocks = range.blocks(self.block_size);
            let State::Linked(link) = &mut self.state else { unreachable!("the state was matched above") };
            link.resync.rewritten(&blocks);
            self.marks.mark_doubtful(blocks, oldest);
        }
        self.write_map();
    }

    /// The replica is in sync and yet doesn't answer: it is in sync no more (D4).
    pub(crate) fn give_up(&mut self) {
        self.spill();
        let State::Linked(link) = &mut self.state else { return };
        if link.phase().follows() {
            self.left |= link.break_off(&mut self.answered);
        }
    }

    /// How many bytes the window takes, while there is one.
    pub(crate) fn window_limit_bytes(&self) -> Option<u64> {
        match &self.state {
            State::Linked(link) => Some(link.window_limit_bytes),
            _ => None,
        }
    }

    /// A control message of the linked replica.
    pub(crate) fn handle_linked(&mut self, message: Message, now: Time) -> Result<(), PeerError> {
        let State::Linked(link) = &mut self.state else {
            return Err(PeerError::Misbehaved("it spoke before it was greeted"));
        };
        match message {
            Message::Acknowledgement(Acknowledgement { session, durable, copies, received, mark })
                if session == link.session =>
            {
                if received > link.sent {
                    return Err(PeerError::Misbehaved("it acknowledged a write that was never sent"));
                }
                self.heard += 1;
                link.received = link.received.max(received);
                link.resync.durable(copies, &mut self.marks.map, &mut self.marks.certain, now)?;
                link.durable = link.durable.max(durable);
                link.window.durable(durable);
                self.marks.map.note_known(mark);
                self.confirm_followed();
                Ok(())
            }
            Message::ResyncReady(ResyncReady { session }) if session == link.session => {
                if link.phase() == Phase::Beginning {
                    link.progress.take(Step::Ready);
                    if self.word.counts_on_nothing() {
                        self.marks.map.note_given(&Given::NOTHING);
                    }
                }
                Ok(())
            }
            Message::Committed(Committed { session, position }) if session == link.session => {
                if let Phase::Committing { sent: Some(generation), closed, .. } = link.phase() {
                    link.durable = link.durable.max(closed.map_or(Epoch(0), |(epoch, _)| epoch));
                    link.progress.take(Step::Committed);
                    // It counts on new words from now on, and hears again when they hold no more.
                    link.is_told_alone = false;
                    self.since = now;
                    self.went_back = false;
                    self.answered.follows();
                    self.denial.follows();
                    self.marks.map.note_given(self.word.was_recorded());
                    self.marks.map.confirm(link.copy, generation);
                    let known = Mark { position, ..self.marks.map.known() };
                    self.marks.map.note_known(known);
                    self.newest.committed(generation);
                }
                Ok(())
            }
            Message::ReleaseRecorded(ReleaseRecorded { session }) if session == link.session => {
                if link.released.is_some() {
                    link.released = Some(true);
                }
                Ok(())
            }
            Message::CopyDigest(CopyDigest { session, number, digest }) if session == link.session => {
                link.resync.compared(number, digest, &mut self.marks.map, &mut self.marks.certain)
            }
            Message::Digest(digest) if digest.session == link.session => {
                self.handle_peer_digest(digest.number, digest.digest);
                Ok(())
            }
            Message::Renew(Renew { session, number }) if session == link.session => {
                if link.phase() == Phase::InSync && self.mode == Mode::Sync {
                    let milliseconds = self.granted.give(now);
                    self.actions.push_back(Action::Send(Grant { session, number, milliseconds }.into()));
                }
                Ok(())
            }
            Message::Parted(Parted { session }) if session == link.session => {
                self.granted.take_back();
                Ok(())
            }
            Message::Refused(refused) => Err(PeerError::Refused(refused)),
            Message::Superseded(superseded) => Err(PeerError::Superseded(superseded.fence)),
            _ => Err(PeerError::Misbehaved("it sent a message that does not fit the session")),
        }
    }

    /// Goes on where it can: begins a resync when the window has drained, picks copies, commits. Says what it needs
    /// for that.
    pub(crate) fn drive<Id>(
        &mut self,
        order: &Order<Id>,
        circumstances: &Circumstances<'_>,
        now: Time,
    ) -> Wants
    where
        Id: Copy + PartialEq + std::fmt::Debug,
    {
        if self.marks.is_due(now) {
            self.write_map();
        }
        self.tell_alone();
        let (is_clean, is_saved) = (self.marks.map.is_clean(), self.is_saved());
        let State::Linked(link) = &mut self.state else { return Wants::default() };
        if let Phase::Committing { streams: false, sent, .. } = link.phase()
            && (!is_clean || sent.is_none() && self.word.is_outdated())
        {
            self.left |= link.break_off(&mut self.answered);
        }
        if link.phase() == Phase::Draining && link.window.is_empty() {
            link.union_is_durable |= is_saved;
            if !link.union_is_durable {
                // Marks of writes need not be: the activity log has them, and under load some are always new.
                self.write_map();
                return Wants::default();
            }
            if circumstances.has_failed {
                return Wants::default();
            }
            link.progress.take(Step::Begin);
            link.spilled = false;
            let dirty_bytes = self.marks.map.dirty_blocks() * self.block_size.bytes();
            self.actions.push_back(Action::Send(ResyncBegin { session: link.session, dirty_bytes }.into()));
        }
        if link.phase() == Phase::Resyncing {
            let waits = circumstances.application_is_active;
            let Circumstances { absent, .. } = circumstances;
            while let Some(action) =
                link.resync.pick(&self.marks.map, &self.marks.certain, (order, *absent), waits, now)
            {
                self.actions.push_back(action);
            }
            link.tail_since =
                (self.marks.map.dirty_blocks() <= TAIL_BLOCKS).then(|| link.tail_since.unwrap_or(now));
            if self.marks.map.is_clean() && link.resync.is_idle() {
                link.progress.take(Step::AllCopied);
            }
        }
        let wants = self.commit(circumstances);
        self.drive_compare();
        wants
    }

    /// What the map is relative to.
    #[must_use]
    pub fn base(&self) -> Base {
        self.marks.map.base()
    }

    fn stream(&mut self, write: LiveWrite, range: ByteRange, now: Time) {
        let State::Linked(link) = &mut self.state else { unreachable!("only a linked session streams") };
        let LiveWrite { epoch, sequence, .. } = write;
        let body = match write.zero {
            Some(may_unmap) => Body::Zero { range, epoch, sequence, may_unmap },
            None => Body::Write { range, epoch, sequence },
        };
        link.window.push(sequence, epoch, range, write.payload_bytes(range), now);
        link.streamed = Some(sequence);
        link.sent = sequence;
        let header = FrameHeader { session: link.session, stream: link.stream, body };
        self.actions
            .push_back(Action::SendFrame { header, request: write.zero.is_none().then_some(write.request) });
    }
}

#[cfg(test)]
mod tests;
