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
//!   commit, when everything before it is durable (P1). In between, a replica that was consistent saves what it
//!   overwrites (`gap`).
//! - A generation is durable here before its first frame is written (L1), a higher fence before it is answered (L5).
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

mod action;
mod activity;
mod change;
pub mod consent;
mod gap;
mod lending;
pub mod promotion;
mod receive;
mod recording;
pub mod resolve;
pub mod undo;

pub use action::{Action, FrameId, PrimaryMisbehaved, Report, Settings, Stored};
pub use change::StateChange;
pub use gap::{Saved, SpacePolicy};
pub use lending::NotLent;

use crate::dirty_map::DirtyMap;
use crate::disk::superblock::{LINEAGE_LIMIT, Superblock};
use crate::lineage;
use crate::order::Order;
use crate::planted::{Bug, planted};
use crate::promise::{Held, TooLong};
use crate::ranges::ByteRange;
use crate::rebuild::{FETCH_BYTES, FETCHES};
use crate::terms::{DataState, Mode, Promise};
use crate::units::{
    EXTENT_BYTES, Epoch, Extent, GenerationId, HostId, Mark, Position, SECTOR_BYTES, Sequence, Session,
    Stream, Time,
};
use crate::wire::FRAME_COST_BYTES;
use crate::wire::message::{
    Acknowledgement, Alone, AskMark, Commit, CopyDigest, Digest, Fetch, FetchFailed, Hello, Member, Message,
    Parted, Parting, Refusal, Refused, Release, ResyncBegin, UNREADABLE,
};
use crate::wire::{Body, FrameHeader};
use activity::Log;
use gap::Gap;
use recording::{Changes, Uncommitted};
use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};

/// A sync is worth its time once so many bytes of copies wait for it, or when no more are under way.
const COPY_SYNC_BYTES: u64 = 8 << 20;
/// No primary has more bytes of copies under way, by their weight.
const COPY_LIMIT_BYTES: u64 = 128 << 20;
/// No primary asks for the digests of more bytes at the same time, each with what it takes beside its content: so much
/// memory is used to read them.
const DIGEST_LIMIT_BYTES: u64 = 64 << 20;
const DIGEST_COST_BYTES: u64 = 16 << 10;
/// No primary compares more extents at the same time.
const DIGEST_LIMIT: usize = 4;

/// A volume on its replica.
#[derive(Debug)]
pub struct Replica {
    settings: Settings,
    /// What is durable of it.
    superblock: Superblock,
    maps: BTreeMap<HostId, DirtyMap>,
    gap: Gap,
    log: Log,
    position: Position,
    order: Order<FrameId>,
    items: HashMap<FrameId, Item>,
    link: Option<Link>,
    /// A greeting that waits for the old session to drain.
    greeting: Option<Hello>,
    last_session: Session,
    uncommitted: Uncommitted,
    sync: Option<SyncScope>,
    marker: Marker,
    promise: Held,
    changes: Changes,
    /// A commit whose extents go to the log first.
    commit: Option<(Commit, Session)>,
    failed: bool,
    actions: VecDeque<Action>,
}

#[derive(Debug)]
struct Link {
    session: Session,
    stream: Stream,
    /// The newest generation here, as far as this session knows.
    generation: GenerationId,
    /// Whether it came by a frame, and no commit since.
    generation_came: bool,
    /// A resync was announced and is not recorded yet.
    announced: bool,
    /// A release that was announced and is not recorded yet: the generation that it is of.
    release: Option<GenerationId>,
    /// A generation that is being recorded.
    beginning: bool,
    mode: Mode,
    /// The fence of the primary.
    fence: crate::terms::Fence,
    received: Sequence,
    /// The last write whose receipt was acknowledged.
    receipt: Sequence,
    /// The epoch that arriving frames belong to, until its end.
    open: Option<Epoch>,
    /// The last epoch that has ended.
    closed: Epoch,
    /// The epoch whose frames are all being written or written already.
    ended: Option<Ended>,
    /// Frames of later epochs, and what came after them.
    queue: VecDeque<(FrameId, Body)>,
    live_under_way: usize,
    live_bytes: u64,
    /// Digests for a compare that are not answered.
    digests: usize,
    /// Reads for the primary that have not ended.
    fetches: usize,
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
    /// What digests under way take.
    digest_bytes: u64,
    unsynced_bytes: u64,
    written_bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct Item {
    session: Session,
    body: Body,
    /// The epoch for which its extents are claimed in the log, or wait to be.
    claimed: Option<Epoch>,
}

/// An epoch of which every frame has come.
#[derive(Debug, Clone, Copy)]
struct Ended {
    epoch: Epoch,
    sequence: Sequence,
    cut: bool,
}

#[derive(Debug)]
struct SyncScope {
    session: Option<Session>,
    epoch: Option<Ended>,
    copies: u64,
}

#[derive(Debug, Default)]
struct Marker {
    /// What the file says.
    durable: Mark,
    writing: Option<Mark>,
    /// The end of an epoch that it is to say.
    waiting: Option<Position>,
    /// Copies that it is to name.
    copies: Option<(Session, u64)>,
    /// Whether the primary was told what it says.
    is_told: bool,
}

impl Replica {
    /// A replica as its metadata says.
    #[must_use]
    pub fn new(settings: Settings, stored: Stored) -> Self {
        let Stored { superblock, mark, log, maps, saved, kept } = stored;
        Self {
            settings,
            position: lineage::later(&superblock.lineage, superblock.position, mark.position),
            maps,
            gap: Gap::new(&superblock, &saved, &kept),
            log: Log::new(&log),
            superblock,
            order: Order::new(settings.sector_bytes.into()),
            items: HashMap::new(),
            link: None,
            greeting: None,
            last_session: Session(0),
            uncommitted: Uncommitted::default(),
            sync: None,
            marker: Marker { durable: mark, ..Marker::default() },
            promise: Held::default(),
            changes: Changes::default(),
            commit: None,
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
            return self.greet(hello);
        }
        if let Message::Members(told) = message {
            // The shell keeps the members' addresses.
            return match Member::are_sound(&told.members) {
                true => Ok(()),
                false => {
                    Err(PrimaryMisbehaved("it tells of more hosts, names or addresses than a volume has"))
                }
            };
        }
        let Some(link) = &mut self.link else {
            // After a refusal, what was on its way still comes.
            let was_refused = self.failed || self.gap.is_full;
            return if was_refused { Ok(()) } else { Err(PrimaryMisbehaved("it spoke before it greeted")) };
        };
        let session = link.session;
        if let Message::Commit(commit) = &message {
            let (position, lineage) =
                (self.superblock.position.epoch.max(self.position.epoch), &commit.lineage);
            if !lineage::may_follow(position, commit.position.epoch) {
                return Err(PrimaryMisbehaved("it committed an epoch that is further ahead than runs go"));
            }
            if lineage.len() > LINEAGE_LIMIT {
                return Err(PrimaryMisbehaved("its lineage is longer than any"));
            }
            let extents = self.superblock.size_bytes.div_ceil(EXTENT_BYTES);
            let is_sound = |extent: &Extent| u64::from(extent.0) < extents;
            if commit.active.len() as u64 > extents || !commit.active.iter().all(is_sound) {
                return Err(PrimaryMisbehaved("it committed extents that the volume doesn't have"));
            }
        }
        match message {
            Message::ResyncBegin(ResyncBegin { session: theirs, dirty_bytes }) if theirs == session => {
                link.resync = Some((link.copies.written_bytes, dirty_bytes));
                link.announced = true;
                self.part();
                self.go_on();
                Ok(())
            }
            Message::Commit(commit) if commit.session == session => {
                let has_frames = link.received > Sequence(0) || link.copies.received > 0;
                let is_early = commit.position.epoch > link.durable && !planted(Bug::CommitAtLastCopy);
                if !commit.given.is_sound() {
                    return Err(PrimaryMisbehaved("it promises on behalf of more hosts than a volume has"));
                }
                if is_early && has_frames {
                    return Err(PrimaryMisbehaved("it committed an epoch that is not durable here"));
                }
                link.resync = None;
                let extents = if self.log.is_wanted { commit.active.clone() } else { Vec::new() };
                self.adopt_extents(extents, commit.position.epoch);
                self.commit = Some((commit, session));
                self.go_on();
                Ok(())
            }
            Message::Parting(Parting { session: theirs, .. }) | Message::Alone(Alone { session: theirs })
                if theirs == session =>
            {
                self.part();
                Ok(())
            }
            Message::Grant(grant) if grant.session == session => {
                let granted = self.promise.granted(&grant);
                granted.map_err(|TooLong| PrimaryMisbehaved("it promises for longer than primaries do"))
            }
            Message::AskMark(AskMark { session: theirs }) if theirs == session => {
                self.acknowledge();
                Ok(())
            }
            Message::Fetch(Fetch { session: theirs, number, range, is_awaited }) if theirs == session => {
                let is_sound = range.is_aligned(SECTOR_BYTES)
                    && (1..=FETCH_BYTES.max(self.superblock.block_size.bytes())).contains(&range.length)
                    && range.end() <= self.superblock.size_bytes;
                if !is_sound || link.fetches >= FETCHES {
                    return Err(PrimaryMisbehaved(
                        "it asked for more content at once than agreed, or for none",
                    ));
                }
                link.fetches += 1;
                self.actions.push_back(Action::SendContent { session, number, range, is_awaited });
                Ok(())
            }
            Message::Agreed(agreed) if agreed.session == session => {
                self.agreed(agreed.epoch);
                Ok(())
            }
            Message::Release(Release { session: theirs, generation }) if theirs == session => {
                link.release = Some(generation);
                self.go_on();
                Ok(())
            }
            _ => Err(PrimaryMisbehaved("it sent a message that does not fit the session")),
        }
    }

    /// The primary goes on without this replica: it counts no more, durably, until a commit (W4).
    pub fn note_behind(&mut self) {
        self.promise.give_up();
        let is_noted = self.changes.any(|change| *change == StateChange::Behind);
        if self.superblock.mode != Mode::Async && !is_noted {
            self.change_state(StateChange::Behind, None);
        }
    }

    /// The primary is going to answer without this replica, and hears that it may.
    fn part(&mut self) {
        self.note_behind();
        if let Some(link) = &self.link {
            self.actions.push_back(Action::Send(Parted { session: link.session }.into()));
        }
    }

    /// Nothing is counted on any more: this host ends its session, and its primary need not wait for it.
    pub fn take_leave(&mut self) {
        if self.superblock.given.promise == Promise::WhileHeard {
            self.promise.give_up();
            if let Some(link) = &self.link {
                self.actions.push_back(Action::Send(Parted { session: link.session }.into()));
            }
        }
    }

    /// Asks the primary not to go on without this replica. For the shell, now and then.
    pub fn ask_promise(&mut self, now: Time) {
        if let Some(link) =
            self.link.as_ref().filter(|_| self.superblock.given.promise == Promise::WhileHeard)
        {
            let renew = self.promise.ask(link.session, now);
            self.actions.push_back(Action::Send(renew.into()));
        }
    }

    /// Whether the primary's word holds, so that it has answered nothing that is missing here (W4).
    #[must_use]
    pub fn is_promised(&self, now: Time) -> bool {
        let is_in_sync = self.superblock.data == DataState::Consistent && self.superblock.mode == Mode::Sync;
        is_in_sync && self.superblock.given.promise == Promise::WhileHeard && self.promise.holds(now)
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
        if let Some(epoch) = item.claimed {
            self.give_back(item.body.range(), Some(epoch));
        }
        self.run(freed);
        if !written {
            return self.fail();
        }
        if let Some(link) = self.link.as_mut().filter(|link| link.session == item.session) {
            link.applied(item.body);
        }
        self.go_on();
    }

    /// A range was digested for a compare or a resync, or could not be read.
    pub fn handle_digest(&mut self, frame: FrameId, digest: Option<[u8; 32]>) {
        let item = self.items.remove(&frame).expect("a range is digested once");
        let freed = self.order.finish(frame, item.body.range());
        self.run(freed);
        if digest.is_none() && planted(Bug::UnreadableEndsReplica) {
            return self.fail();
        }
        // What can't be read differs from whatever the primary has: the copy that follows makes it readable.
        let digest = digest.unwrap_or(UNREADABLE);
        let session = item.session;
        if let Some(link) = self.link.as_mut().filter(|link| link.session == session) {
            let answer = match item.body {
                Body::Digest { number, .. } => {
                    link.live_under_way -= 1;
                    link.digests -= 1;
                    Digest { session, number, digest }.into()
                }
                Body::CopyDigest { number, range } => {
                    link.copies.digest_bytes -= range.length + DIGEST_COST_BYTES;
                    link.copies.ended(number, range);
                    CopyDigest { session, number, digest }.into()
                }
                _ => unreachable!("only what asks for a digest is answered with one"),
            };
            self.actions.push_back(Action::Send(answer));
        }
        self.go_on();
    }

    /// What the primary asked for was read and handed on, or could not be read.
    pub fn handle_fetched(&mut self, session: Session, number: u64, read: bool) {
        let Some(link) = self.link.as_mut().filter(|link| link.session == session) else { return };
        link.fetches -= 1;
        if !read {
            self.actions.push_back(Action::Send(FetchFailed { session, number }.into()));
        }
    }

    /// The backing was synced, or could not be: then nothing of it is acknowledged (W5).
    pub fn handle_synced(&mut self, synced: bool) {
        let scope = self.sync.take().expect("a sync ends once");
        if !synced {
            return self.fail();
        }
        if let Some(link) = self.link.as_mut().filter(|link| Some(link.session) == scope.session) {
            if scope.copies > link.copies.durable {
                self.marker.copies = Some((link.session, scope.copies));
            }
            link.copies.durable = scope.copies;
            if let Some(Ended { epoch, sequence, cut }) = scope.epoch {
                link.durable = epoch;
                link.ended = None;
                // An epoch that was cut short is no more than a part of the next state, and in a gap the marker stays
                // at the rollback point.
                if !cut && self.superblock.data == DataState::Consistent {
                    self.position = Position { generation: link.generation, epoch, sequence };
                    assert!(self.marker.waiting.is_none(), "an epoch waits for the marker before the last");
                    self.marker.waiting = Some(self.position);
                }
            }
            self.acknowledge();
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
    pub fn session(&self) -> Option<Session> {
        self.link.as_ref().map(|link| link.session)
    }

    /// Whether nothing is being written.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        let is_written = self.marker.writing.is_none() && self.changes.is_empty();
        self.order.is_idle() && self.sync.is_none() && is_written && self.gap.is_idle() && self.log.is_idle()
    }

    /// The replica's numbers, for status.
    #[must_use]
    pub fn report(&self) -> Report {
        Report {
            connected: self.link.is_some(),
            data: self.superblock.data,
            is_full: self.gap.was_full,
            position: self.position,
            waiting_bytes: self.link.as_ref().map_or(0, |link| link.live_bytes),
            resync: self.link.as_ref().and_then(|link| {
                let (before, expected) = link.resync?;
                Some(((link.copies.written_bytes - before).min(expected), expected))
            }),
        }
    }

    fn run(&mut self, frames: Vec<FrameId>) {
        for frame in frames {
            let body = self.items[&frame].body;
            let range = body.range();
            match body {
                Body::Digest { .. } | Body::CopyDigest { .. } => {
                    self.actions.push_back(Action::ReadDigest { frame, range })
                }
                Body::Write { epoch, .. } | Body::Zero { epoch, .. } if self.log.is_wanted => {
                    self.items.get_mut(&frame).expect("it was looked at").claimed = Some(epoch);
                    self.apply_when_logged(frame, range);
                }
                _ => self.apply_claimed(frame),
            }
        }
    }

    /// A frame's extents are in the log, where that is needed.
    fn apply_claimed(&mut self, frame: FrameId) {
        let range = self.items[&frame].body.range();
        if self.saves() && !planted(Bug::OverwriteUnsaved) {
            self.apply_when_saved(frame, range);
        } else {
            self.apply(frame);
        }
    }

    /// Nothing stands between a frame and the backing any more.
    fn apply(&mut self, frame: FrameId) {
        let body = self.items[&frame].body;
        let zero = match body {
            Body::Zero { may_unmap, .. } => Some(may_unmap),
            Body::CopyZero { .. } => Some(true),
            _ => None,
        };
        self.actions.push_back(Action::Apply { frame, range: body.range(), zero });
    }

    /// These frames had their turn and will not be applied; their claims in the log are given back.
    fn forget(&mut self, frames: Vec<FrameId>) {
        for frame in &frames {
            let item = self.items[frame];
            if item.claimed.is_some() {
                self.give_back(item.body.range(), None);
            }
        }
        self.forget_unclaimed(frames);
    }

    /// As [`Replica::forget`], for frames that hold no claim any more.
    fn forget_unclaimed(&mut self, frames: Vec<FrameId>) {
        for frame in frames {
            let item = self.items.remove(&frame).expect("a frame that waits is known");
            self.actions.push_back(Action::Drop(frame));
            // Whatever waited for it was dropped before, or is of a newer session and has its turn now.
            let freed = self.order.finish(frame, item.body.range());
            self.run(freed);
        }
    }

    /// Says what has come and what is durable.
    fn acknowledge(&mut self) {
        let mark = self.mark();
        let Some(link) = &mut self.link else { return };
        self.marker.is_told = true;
        link.receipt = link.received;
        let acknowledgement = Acknowledgement {
            session: link.session,
            received: link.received,
            durable: link.durable,
            copies: link.copies.durable,
            mark,
        };
        self.actions.push_back(Action::Send(acknowledgement.into()));
    }

    /// Whatever can go on goes on.
    fn go_on(&mut self) {
        if self.failed {
            return;
        }
        self.write_marker();
        self.start_queued();
        self.start_saving();
        self.start_sync();
        self.write_log();
        self.start_commit();
        self.begin_resync();
        self.record_release();
        self.write_state();
        self.welcome();
    }

    /// Replicas whose receipt counts say what has come (W4). For the shell, when it has handed over what arrived
    /// together.
    pub fn acknowledge_receipt(&mut self) {
        if let Some(link) = &self.link
            && link.mode != Mode::Async
            && link.received > link.receipt
        {
            self.acknowledge();
        }
    }

    /// What is durable here, as the next greeting will hear.
    fn mark(&self) -> Mark {
        let Superblock { lineage, position, .. } = &self.superblock;
        let marked = match self.marker.writing {
            Some(writing) if planted(Bug::TellUnmarked) => writing,
            _ => self.marker.durable,
        };
        Mark { position: lineage::later(lineage, *position, marked.position), ..marked }
    }

    /// Tells the primary what the marker says, where it has not heard. For the shell, now and then.
    pub fn tell_mark(&mut self) {
        if !self.marker.is_told {
            self.acknowledge();
        }
    }

    /// Begins to write the queued frames of the epoch that may be written now.
    fn start_queued(&mut self) {
        while let Some(link) = &mut self.link {
            let Some((frame, body)) = link.queue.front().copied() else { return };
            // An ended epoch must become durable first (W3), and then the marker of the one before it (P3).
            let is_ended = link.ended.is_some() && !planted(Bug::NextEpochEarly);
            if is_ended || self.marker.waiting.is_some() || link.beginning {
                return;
            }
            link.queue.pop_front();
            if let Body::EpochEnd { epoch, sequence, cut } = body {
                link.ended = Some(Ended { epoch, sequence, cut });
            } else if let Body::Generation { generation } = body {
                let is_committing = self.changes.any(|change| matches!(change, StateChange::Commit { .. }));
                if self.superblock.data == DataState::Consistent || is_committing {
                    link.beginning = true;
                    self.changes.add(StateChange::Generation(generation), None);
                } else {
                    // A commit that is not being recorded yet brings it.
                    (link.generation, link.generation_came) = (generation, true);
                }
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

    /// The backing or its metadata failed: nothing is acknowledged any more (W5).
    fn fail(&mut self) {
        if !self.failed {
            self.failed = true;
            // What is not being recorded yet never will be.
            self.changes.drop_unbegun();
            // The primary need not wait for it.
            self.take_leave();
            let text = "the replica's disk failed or is full; see the replica's log".into();
            self.actions.push_back(Action::Send(Refused { refusal: Refusal::Backing, text }.into()));
        }
        self.unlink();
    }
}

impl Copies {
    /// A frame with a number was taken in. Says whether that is as agreed.
    fn begin(&mut self, number: u64) -> Result<(), PrimaryMisbehaved> {
        if number != self.received + 1 {
            return Err(PrimaryMisbehaved("its copies are not numbered without gaps"));
        }
        self.received = number;
        self.under_way += 1;
        Ok(())
    }

    /// A copy was written, or a digest was read. What was read may not be durable either (D2).
    fn ended(&mut self, number: u64, range: ByteRange) {
        self.under_way -= 1;
        self.unsynced_bytes += range.length;
        self.written_bytes += range.length;
        self.written_beyond.insert(number);
        while self.written_beyond.remove(&(self.written + 1)) {
            self.written += 1;
        }
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
                self.copies.under_way_bytes -= body.weight_bytes();
                self.copies.ended(number, range);
            }
            _ => {
                self.live_under_way -= 1;
                self.live_bytes -= body.payload_bytes() + FRAME_COST_BYTES;
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
