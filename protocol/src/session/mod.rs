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
//! In *Away*, *Greeting*, *Draining* and *Beginning* every write only marks its blocks. In the others a write to clean
//! blocks is streamed, one to dirty blocks marks. So a block is never in both flows (R1): a block that is dirty while
//! live frames of it are unacknowledged exists only in *Draining*, where nothing is copied; copying begins when the
//! window is empty and the replica has recorded that it is inconsistent.
//!
//! # What a crash leaves
//!
//! Bits reach the disk late. Until they do, `Session::safe_up_to` keeps their extents in the activity log (D1), and
//! a restart puts the log's extents into the map. Cleared bits that were not written are set again after a crash:
//! the blocks are copied once more.

mod handshake;
mod report;
pub mod resync;
mod stream;
mod verify;

use crate::dirty_map::{DirtyMap, MapChanges};
use crate::order::Order;
use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use crate::tracker::RequestId;
use crate::units::{
    BlockSize, CopyId, Epoch, HostId, Position, Sequence, Session as SessionNumber, Stream, Time,
};
use crate::wire::message::{Acknowledgement, Commit, Committed, Message, ResyncBegin, ResyncReady};
use crate::wire::{Body, FrameHeader};
pub use handshake::{Handled, Identity, PeerError};
pub use report::{Connection, ReplicaState, Report};
use resync::{CopyContent, CopyRead, Resync};
use std::collections::VecDeque;
use std::time::Duration;
pub(crate) use stream::FRAME_COST_BYTES;
use stream::Window;
pub use verify::CompareResult;
use verify::Verify;

/// How long an acknowledgement may be outstanding before the replica no longer counts as in sync (D4).
pub const ACKNOWLEDGEMENT_DEADLINE: Duration = Duration::from_secs(5);

/// How long changes of a map stay in memory, where nothing waits for them.
const MAP_TIME: Duration = Duration::from_secs(1);

/// What the shell must do for a session.
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
    /// Write to the map's file: pages and holes, sync, header, sync; then [`Session::handle_map_written`].
    WriteMap(MapChanges),
    /// Read this range of the backing; then [`Session::handle_copy_read`].
    ReadCopy {
        /// Names the read.
        read: CopyRead,
        /// What to read.
        range: ByteRange,
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

/// See the module.
#[derive(Debug)]
pub struct Session {
    peer: HostId,
    block_size: BlockSize,
    size_bytes: u64,
    window_limit_bytes: u64,
    map: DirtyMap,
    /// The first write that was marked since the map was last handed out for writing.
    unwritten: Option<Sequence>,
    /// The same for what is being written now.
    being_written: Option<Sequence>,
    writing_map: bool,
    map_written_at: Time,
    map_failed: bool,
    /// How often in a row the map's file could not be written.
    map_failures: u32,
    state: State,
    /// What the next link's first read will be named.
    next_read: CopyRead,
    /// The number of the next compare's first step.
    next_step: u64,
    since: Time,
    actions: VecDeque<Action>,
}

#[derive(Debug)]
enum State {
    Away,
    Greeting(handshake::Greeting),
    Linked(Box<Link>),
}

#[derive(Debug)]
struct Link {
    session: SessionNumber,
    stream: Stream,
    window_limit_bytes: u64,
    window: Window,
    /// The last write of the open epoch that was streamed.
    streamed: Option<Sequence>,
    /// While draining: the window's blocks are in the map too, so nothing depends on the replica's answer.
    spilled: bool,
    resync: Resync,
    phase: Phase,
    verify: Option<Verify>,
    durable: Epoch,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Draining,
    Beginning,
    Resyncing,
    /// `epoch` is the one that closed after the last copy; `sent` once it was durable.
    Committing {
        closed: Option<(Epoch, Sequence)>,
        sent: bool,
    },
    InSync,
}

impl Phase {
    fn streams(self) -> bool {
        matches!(self, Self::Resyncing | Self::Committing { .. } | Self::InSync)
    }
}

/// A write as a session sees it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LiveWrite {
    pub request: RequestId,
    pub range: ByteRange,
    pub epoch: Epoch,
    pub sequence: Sequence,
    /// For a write of zeroes, whether the space may be given back.
    pub zero: Option<bool>,
}

impl LiveWrite {
    /// How much payload a frame for this part of the write has.
    fn payload_bytes(&self, part: ByteRange) -> u64 {
        if self.zero.is_some() { 0 } else { part.length }
    }
}

impl Session {
    /// A replica that is not connected, with its map as recovered or [`DirtyMap::full`].
    #[must_use]
    pub fn new(
        peer: HostId,
        map: DirtyMap,
        size_bytes: u64,
        block_size: BlockSize,
        window_limit_bytes: u64,
    ) -> Self {
        Self {
            peer,
            block_size,
            size_bytes,
            window_limit_bytes,
            map,
            unwritten: None,
            being_written: None,
            writing_map: false,
            map_written_at: Time::default(),
            map_failed: false,
            map_failures: 0,
            state: State::Away,
            next_read: CopyRead(0),
            next_step: 0,
            since: Time::default(),
            actions: VecDeque::new(),
        }
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When `Session::drive` has something to do by itself.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        let map = (self.map.has_changes() && !self.writing_map).then(|| self.map_written_at.after(MAP_TIME));
        let resync = match &self.state {
            State::Linked(link) if link.phase == Phase::Resyncing => link.resync.timeout(),
            _ => None,
        };
        map.into_iter().chain(resync).min()
    }

    /// The replica.
    #[must_use]
    pub fn peer(&self) -> HostId {
        self.peer
    }

    /// The blocks that may differ.
    #[must_use]
    pub fn map(&self) -> &DirtyMap {
        &self.map
    }

    /// Everything up to this write is durable on the replica or durably in its map (D1); `last` is the newest write.
    pub(crate) fn safe_up_to(&self, last: Sequence) -> Sequence {
        let unacknowledged = match &self.state {
            State::Linked(link) if !link.spilled => link.window.oldest().map(|(sequence, _)| sequence),
            _ => None,
        };
        let first_unsafe = [unacknowledged, self.unwritten, self.being_written].into_iter().flatten().min();
        first_unsafe.map_or(last, |first| Sequence(first.0 - 1))
    }

    /// Blocks of extents that were active before a restart, or that the replica reports, may differ.
    pub(crate) fn mark_suspect(&mut self, range: ByteRange, before: Sequence) {
        self.mark(range.blocks(self.block_size), before.next());
    }

    /// A write was sequenced and is about to begin here: stream it or mark it (R1, W7).
    pub(crate) fn handle_write(&mut self, write: LiveWrite, now: Time) {
        let blocks = write.range.blocks(self.block_size);
        let State::Linked(link) = &mut self.state else {
            return self.mark(blocks, write.sequence);
        };
        if !link.phase.streams() {
            link.resync.rewritten(&blocks);
            return self.mark(blocks, write.sequence);
        }
        let parts: Vec<_> = self.map.split(blocks.clone()).collect();
        let clean: Vec<ByteRange> = parts
            .iter()
            .filter(|(dirty, _)| !dirty)
            .map(|(_, part)| ByteRange::of_blocks(part.clone(), self.block_size, self.size_bytes))
            .map(|bytes| bytes.intersection(write.range).expect("the part is the write's"))
            .collect();
        let payload_bytes = clean.iter().map(|range| write.payload_bytes(*range));
        if !link.window.has_room(payload_bytes, link.window_limit_bytes) {
            link.phase = Phase::Draining;
            link.resync.rewritten(&blocks);
            return self.mark(blocks, write.sequence);
        }
        for (_, part) in parts.into_iter().filter(|(dirty, _)| *dirty) {
            let State::Linked(link) = &mut self.state else { unreachable!("the state was matched above") };
            link.resync.rewritten(&part);
            self.mark(part, write.sequence);
        }
        for range in clean {
            self.stream(write, range, now);
        }
    }

    /// A local write failed: what the disk holds there now is unknown, and may differ from what was streamed (W5).
    pub(crate) fn handle_failed_write(&mut self, range: ByteRange, sequence: Sequence) {
        let blocks = range.blocks(self.block_size);
        if let State::Linked(link) = &mut self.state {
            link.resync.rewritten(&blocks);
            if link.phase.streams() {
                link.phase = Phase::Draining;
            }
        }
        self.mark(blocks, sequence);
    }

    /// An epoch was closed (W3). The replica hears of it if it has frames of it, so that ends of epochs are as bounded
    /// as frames are, and that it claims no position that it doesn't have.
    pub(crate) fn handle_epoch_end(&mut self, epoch: Epoch, sequence: Sequence) {
        let State::Linked(link) = &mut self.state else { return };
        let streamed = link.streamed.take();
        let sequence = match &mut link.phase {
            Phase::Committing { closed: closed @ None, .. } => {
                *closed = Some((epoch, sequence));
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
            body: Body::EpochEnd { epoch, sequence },
        };
        self.actions.push_back(Action::SendFrame { header, request: None });
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
                CopyContent::Zero => Body::CopyZero { range, number },
                CopyContent::Data | CopyContent::Failed => Body::Copy { range, number },
            },
        });
        if let Some(header) = header.filter(|_| planted(Bug::ClearOnSend)) {
            self.map.clear(header.body.range().blocks(self.block_size));
        }
        self.actions.push_back(Action::SendCopy { read, header });
    }

    /// The map's file holds what [`Action::WriteMap`] said, or could not be written; then it is tried again later.
    pub fn handle_map_written(&mut self, written: bool, now: Time) {
        assert!(self.writing_map, "a map is written once at a time");
        self.writing_map = false;
        self.map_written_at = now;
        self.map_failed = !written;
        self.map_failures = if written { 0 } else { self.map_failures + 1 };
        let first = self.being_written.take();
        if !written {
            // What the file holds is unknown: all of it is written again.
            self.unwritten = [first, self.unwritten].into_iter().flatten().min();
            self.map.forget_written();
            if self.map_failures > 1 {
                self.give_the_map_up();
            }
        }
    }

    /// The map's pages can't be written, as when the disk of the state folder is full: "all is dirty" takes no more
    /// than the header, whose place is there already. Better a full copy later than writes that wait for ever (W7).
    fn give_the_map_up(&mut self) {
        if self.map.is_full() {
            return;
        }
        self.map.begin_anew(self.map.base());
        // The file says "clean" of blocks that are dirty now, so a write to one marks nothing new and yet is not safe:
        // nothing is until the header is written (D1).
        self.unwritten = Some(Sequence(1));
        if let State::Linked(link) = &mut self.state
            && link.phase.streams()
        {
            link.phase = Phase::Draining;
        }
    }

    /// Writes the map's file, if it lacks anything and is not being written.
    pub(crate) fn write_map(&mut self) {
        if self.writing_map || self.map_failed || !self.map.has_changes() {
            return;
        }
        self.writing_map = true;
        self.being_written = self.unwritten.take();
        self.actions.push_back(Action::WriteMap(self.map.take_changes()));
    }

    /// Whether the map's file holds all marks.
    #[must_use]
    pub(crate) fn is_written(&self) -> bool {
        self.first_unwritten().is_none()
    }

    /// The first write whose mark the map's file lacks.
    pub(crate) fn first_unwritten(&self) -> Option<Sequence> {
        [self.unwritten, self.being_written].into_iter().flatten().min()
    }

    /// Whether the file says exactly what memory does.
    pub(crate) fn is_saved(&self) -> bool {
        !self.writing_map && !self.map.has_changes()
    }

    /// The link was lost: what it had not acknowledged goes to the map (W7).
    pub fn handle_disconnected(&mut self, now: Time) {
        let state = std::mem::replace(&mut self.state, State::Away);
        if matches!(state, State::Linked(_)) {
            self.since = now;
        }
        self.actions
            .retain(|action| matches!(action, Action::WriteMap(_) | Action::SendCopy { header: None, .. }));
        let State::Linked(link) = state else { return };
        self.next_read = link.resync.next_read();
        if let Some((oldest, _)) = link.window.oldest().filter(|_| !planted(Bug::ForgetWindow)) {
            for range in link.window.ranges() {
                self.mark(range.blocks(self.block_size), oldest);
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
        link.phase = Phase::Draining;
        let (oldest, _) = link.window.oldest().expect("the window is not empty");
        let ranges: Vec<ByteRange> = link.window.ranges().collect();
        for range in ranges {
            let blocks = range.blocks(self.block_size);
            let State::Linked(link) = &mut self.state else { unreachable!("the state was matched above") };
            link.resync.rewritten(&blocks);
            self.mark(blocks, oldest);
        }
        self.write_map();
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
            Message::Acknowledgement(Acknowledgement { session, durable, copies, .. })
                if session == link.session =>
            {
                if !link.resync.durable(copies, &mut self.map, now) {
                    return Err(PeerError::Misbehaved("it acknowledged a copy that was never sent"));
                }
                link.durable = link.durable.max(durable);
                link.window.durable(durable);
                Ok(())
            }
            Message::ResyncReady(ResyncReady { session }) if session == link.session => {
                if link.phase == Phase::Beginning {
                    link.phase = Phase::Resyncing;
                }
                Ok(())
            }
            Message::Committed(Committed { session, .. }) if session == link.session => {
                if matches!(link.phase, Phase::Committing { sent: true, .. }) {
                    link.phase = Phase::InSync;
                    self.since = now;
                }
                Ok(())
            }
            Message::Digest(digest) if digest.session == link.session => {
                self.handle_peer_digest(digest.number, digest.digest);
                Ok(())
            }
            Message::Refused(refused) => Err(PeerError::Refused(refused)),
            _ => Err(PeerError::Misbehaved("it sent a message that does not fit the session")),
        }
    }

    /// Goes on where it can: begins a resync when the window has drained, picks copies, commits. Says whether an
    /// epoch must be closed for it.
    pub(crate) fn drive<Id>(
        &mut self,
        order: &Order<Id>,
        application_waits: bool,
        lineage: &[crate::units::GenerationId],
        now: Time,
    ) -> bool
    where
        Id: Copy + PartialEq + std::fmt::Debug,
    {
        if now >= self.map_written_at.after(MAP_TIME) {
            self.map_failed = false;
            self.write_map();
        }
        let State::Linked(link) = &mut self.state else { return false };
        if link.phase == Phase::Draining && link.window.is_empty() {
            link.phase = Phase::Beginning;
            link.spilled = false;
            let dirty_bytes = self.map.dirty_blocks() * self.block_size.bytes();
            self.actions.push_back(Action::Send(ResyncBegin { session: link.session, dirty_bytes }.into()));
        }
        if link.phase == Phase::Resyncing {
            while let Some((read, range)) = link.resync.pick(&self.map, order, application_waits, now) {
                self.actions.push_back(Action::ReadCopy { read, range });
            }
            if self.map.is_clean() && link.resync.is_idle() {
                link.phase = Phase::Committing { closed: None, sent: false };
            }
        }
        if let Phase::Committing { closed: Some((epoch, sequence)), sent: sent @ false } = &mut link.phase
            && link.durable >= *epoch
        {
            *sent = true;
            let generation = lineage.first().copied().unwrap_or_default();
            let position = Position { generation, epoch: *epoch, sequence: *sequence };
            let commit = Commit { session: link.session, position, lineage: lineage.to_vec() };
            self.actions.push_back(Action::Send(commit.into()));
        }
        let wants_epoch_end = matches!(link.phase, Phase::Committing { closed: None, .. });
        self.drive_compare();
        wants_epoch_end
    }

    /// The copy of the replica that the map is relative to.
    #[must_use]
    pub fn base(&self) -> CopyId {
        self.map.base()
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
        let header = FrameHeader { session: link.session, stream: link.stream, body };
        self.actions
            .push_back(Action::SendFrame { header, request: write.zero.is_none().then_some(write.request) });
    }

    fn mark(&mut self, blocks: std::ops::Range<u64>, sequence: Sequence) {
        // A block that is dirty already is in the file, or an earlier mark waits to be.
        if self.map.mark(blocks) {
            self.unwritten = Some(self.unwritten.map_or(sequence, |first| first.min(sequence)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::VolumeId;

    /// The map's file could not be written twice in a row, and only clean blocks were to be noted. All blocks are dirty
    /// in memory then, but clean in the file: a write to one of them was taken for safe, and its extent left the
    /// activity log before anything on disk remembered it.
    #[test]
    fn nothing_is_safe_until_a_map_that_was_given_up_is_written() {
        let (size_bytes, block_size) = (1 << 20, BlockSize::default());
        let mut map = DirtyMap::full(VolumeId([1; 16]), HostId([2; 32]), size_bytes, block_size);
        map.clear(0..255);
        map.take_changes();
        let mut session = Session::new(HostId([2; 32]), map, size_bytes, block_size, 1 << 20);
        let order = Order::<u8>::new(512);
        session.map.clear(255..256);
        for second in [1, 3] {
            session.drive(&order, false, &[], Time(Duration::from_secs(second)));
            session.handle_map_written(false, Time(Duration::from_secs(second)));
        }
        assert!(session.map().is_full());
        session.mark(7..8, Sequence(5));
        assert_eq!(session.safe_up_to(Sequence(5)), Sequence(0));
        session.drive(&order, false, &[], Time(Duration::from_secs(5)));
        assert_eq!(session.safe_up_to(Sequence(5)), Sequence(0), "the header is being written");
        session.handle_map_written(true, Time(Duration::from_secs(5)));
        assert_eq!(session.safe_up_to(Sequence(5)), Sequence(5));
    }
}
