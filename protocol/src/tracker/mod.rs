//! The primary of one volume: when a write may proceed, what must be durable first, and when its reply may go out.
//!
//! A request is cut into pieces. A piece waits until its extents are in a durable record of the activity log (W2), then
//! gets its sequence number and epoch (W1, W3); at that moment every peer streams or marks it, and it goes
//! to the local backing as soon as nothing overlapping is under way. A request is answered when all its pieces have
//! ended and what the modes of its replicas demand has happened there (W4, see [`replies`]).
//!
//! # The contract
//!
//! `handle_*` takes an event and the time; [`Tracker::poll_action`] then hands out what the shell must do, until it is
//! empty; [`Tracker::poll_timeout`] says when to call [`Tracker::handle_timeout`]. The shell answers
//!
//! | action | with |
//! |---|---|
//! | [`Action::WriteLog`] | [`Tracker::handle_log_written`] |
//! | [`Action::WriteLocal`] | [`Tracker::handle_local_written`] |
//! | [`Action::SyncLocal`] | [`Tracker::handle_synced`] |
//! | [`Action::BeginGeneration`] | [`Tracker::handle_generation`] |
//! | [`Action::TellUpTo`] | [`Tracker::handle_told`] |
//! | [`Action::ReadDigest`] | [`Tracker::handle_digest`] |
//! | [`peer::Action::WriteMap`] | [`Tracker::handle_map_written`] |
//! | [`peer::Action::ReadCopy`] | [`Tracker::handle_copy_read`] |
//!
//! exactly once each. Payload never passes through: the shell keeps a request's data until its reply.
//!
//! # Bounds
//!
//! Requests and their pieces are bounded by the front ends; the active set by the record's size; the window of each
//! peer by its limit; copies under way by [`peer::resync`]; a dirty map by what is dirty.

mod action;
mod agreement;
mod copy_wait;
mod durability;
mod filling;
mod generation;
mod holds;
mod leading;
mod log;
mod pieces;
mod pipeline;
pub mod replies;
pub mod start;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod told;
mod words;

pub use action::{Action, Follower, LocalWrite, RequestId, Settings, Work, WriteFailed};
pub use leading::Doubt;

use crate::disk::activity_log::{CAPACITY, Recovered};
use crate::order::Order;
use crate::peer::resync::{CopyContent, CopyRead};
use crate::peer::{self, Circumstances, CompareResult, Handled, Identity, Peer, PeerError, Report};
use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use crate::rebuild::FetchId;
use crate::terms::Mode;
use crate::units::{EXTENT_BYTES, Epoch, GenerationId, HostId, Position, Sequence, Session, Time};
use crate::wire::message::{FetchFailed, Message};
use crate::wire::{PAYLOAD_LIMIT_BYTES, ZERO_LIMIT_BYTES};
use agreement::Agreement;
use durability::{Failures, Local};
use filling::Filling;
use generation::Generations;
use holds::{Hold, Holds};
use leading::Leading;
use log::Log;
use pieces::Requests;
use pipeline::Pipeline;
use replies::{ReplicaLoss, Replies};
use start::Start;
use std::collections::{BTreeMap, VecDeque};
use std::num::NonZeroU64;
use std::time::Duration;
use told::Told;
use words::Words;

/// How long writes may stay in an open epoch, unsynced here and unacknowledged there, at most.
const EPOCH_TIME: Duration = Duration::from_millis(250);
/// An epoch holds at most this much, in bytes (W3).
const EPOCH_BYTES: u64 = 16 << 20;
/// An active set that is smaller than this would be written anew all the time.
pub const LEAST_ACTIVE_EXTENTS: usize = 128;
/// How many pieces of one request may be under way, so that a request of 4 GiB doesn't starve others (W6).
const PIECES: u32 = 16;

/// A volume on its primary.
#[derive(Debug)]
pub struct Tracker {
    size_bytes: u64,
    generations: Generations,
    told: Told,
    /// Where the content stood when the volume was opened.
    opened: Position,
    order: Order<Admitted>,
    log: Log,
    requests: Requests,
    pipeline: Pipeline,
    last: Sequence,
    epoch: OpenEpoch,
    local: Local,
    failures: Failures,
    replies: Replies,
    words: Words,
    agreement: Agreement,
    peers: BTreeMap<HostId, Peer>,
    /// How many replicas have joined since the volume was opened.
    joined: u64,
    holds: Holds,
    /// While blocks of this host's own copy are absent.
    filling: Option<Filling>,
    closing: bool,
    leading: Leading,
    start: Start,
    actions: VecDeque<Action>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Admitted {
    Write(Sequence),
    Hold(u64),
    Landing(u64),
}

#[derive(Debug)]
struct OpenEpoch {
    number: Epoch,
    bytes: u64,
    /// When its first write was sequenced.
    since: Option<Time>,
}

impl Tracker {
    /// A volume that is opened as primary. `log` is what the activity log says; `peers` are the replicas, with their
    /// maps as recovered.
    #[must_use]
    pub fn new(settings: Settings, log: &Recovered, peers: Vec<Peer>) -> Self {
        let Settings {
            size_bytes,
            sector_bytes,
            lineage,
            lineage_limit,
            opened,
            first_epoch,
            loss,
            opened_at,
            patience,
            active_extents,
            owes_word,
            returned,
            absent,
        } = settings;
        assert!(active_extents <= CAPACITY, "the active set fits into a record");
        let serial = match log {
            Recovered::Active { serial, .. } | Recovered::Unsure { serial } => *serial,
        };
        let newest = lineage.first().copied().unwrap_or_default();
        let mut tracker = Self {
            size_bytes,
            generations: Generations::new(lineage, lineage_limit),
            told: Told::default(),
            opened,
            order: Order::new(sector_bytes),
            log: Log::new(serial, active_extents),
            requests: Requests::default(),
            pipeline: Pipeline::default(),
            last: Sequence(0),
            epoch: OpenEpoch { number: first_epoch, bytes: 0, since: None },
            local: Local::default(),
            failures: Failures::default(),
            replies: Replies::new(loss),
            words: Words::new(patience, owes_word.then(|| opened_at.after(patience))),
            agreement: Agreement::default(),
            peers: peers.into_iter().map(|peer| (peer.host(), peer)).collect(),
            joined: 0,
            holds: Holds::default(),
            filling: absent.map(Filling::new),
            closing: false,
            leading: Leading::default(),
            start: Start::default(),
            actions: VecDeque::new(),
        };
        if let Some(Filling { absent, .. }) = &tracker.filling {
            let source = tracker.peers.get_mut(&absent.source());
            source.into_iter().for_each(|peer| peer.set_source(true));
        }
        if let Some(released) = returned {
            tracker.await_released(&released);
        }
        tracker.assume_words();
        tracker.give_words(opened_at);
        for peer in tracker.peers.values_mut() {
            // What it confirmed last in an earlier run need not be recorded here.
            peer.opened_at(newest);
            peer.set_withholds(loss.blocks());
            // What an earlier run of the agent promised is not known any more.
            peer.keep_word(patience, Some(opened_at.after(patience)));
            match log {
                Recovered::Active { extents, .. } => {
                    for extent in extents {
                        let start = (u64::from(extent.0) * EXTENT_BYTES).min(size_bytes);
                        let end = (start + EXTENT_BYTES).min(size_bytes);
                        peer.mark_suspect(ByteRange::between(start, end), Sequence(0));
                    }
                }
                Recovered::Unsure { .. } => peer.mark_suspect(ByteRange::new(0, size_bytes), Sequence(0)),
            }
            peer.write_map();
        }
        // What an earlier run of the agent wrote and answered may still be in the disk's cache: a flush must cover it
        // (W4), and the log must remember it until it is durable (D1).
        tracker.local.running = Some((Sequence(0), Vec::new()));
        tracker.actions.push_back(Action::SyncLocal);
        tracker.collect();
        tracker
    }

    /// The next thing to do.
    pub fn poll_action(&mut self) -> Option<Action> {
        self.actions.pop_front()
    }

    /// When [`Tracker::handle_timeout`] has something to do.
    #[must_use]
    pub fn poll_timeout(&self) -> Option<Time> {
        let epoch = self.epoch.since.map(|since| since.after(EPOCH_TIME));
        let peers = self.peers.values().filter_map(Peer::poll_timeout);
        let waits = [
            self.reply_timeout(),
            self.agreement_timeout(),
            self.pipeline.copies_due(),
            self.told_timeout(),
            self.held_timeout(),
            self.fill_timeout(),
        ];
        let others = [epoch].into_iter().chain(self.log.timeouts()).chain(waits);
        peers.chain(others.flatten()).min()
    }

    /// An application asks for something. Ranges lie inside the volume and are 512-aligned.
    pub fn handle_request(&mut self, id: RequestId, work: Work, now: Time) {
        let rest = match work {
            Work::Write { range, .. } | Work::Zero { range, .. } => range,
            Work::Flush => ByteRange::default(),
        };
        assert!(rest.end() <= self.size_bytes, "front ends check ranges");
        self.requests.begin(id, work, rest, self.last, now);
        if self.leading.is_superseded {
            self.answer(id, Err(WriteFailed));
        } else if self.local.failed {
            self.fail(id);
        } else if work == Work::Flush {
            self.flush(id, now);
        } else if rest.is_empty() {
            self.answer(id, Ok(()));
        } else {
            self.cut(id);
            self.begin_arrivals(now);
        }
        self.drive(now);
    }

    /// An application reads, which is none of the tracker's business but for resyncs: they make way (R3).
    pub fn note_read(&mut self, now: Time) {
        self.requests.note_asked(now);
    }

    /// A record of the activity log is durable, or could not be written.
    pub fn handle_log_written(&mut self, written: bool, now: Time) {
        if written || planted(Bug::GoOnUnrecorded) {
            self.log.record_written();
            for piece in self.pipeline.take_claimed() {
                self.begin_if_active(piece, now);
            }
        } else {
            self.log.fail();
            self.fail_backing(now);
        }
        self.drive(now);
    }

    /// A write to the backing has ended.
    pub fn handle_local_written(&mut self, sequence: Sequence, ended: LocalWrite, now: Time) {
        let written = ended == LocalWrite::Written;
        let piece = self.pipeline.end(sequence);
        self.log.give_back(piece.range.extents(), Some(sequence));
        if !written {
            for peer in self.peers.values_mut() {
                peer.handle_failed_write(piece.range, sequence);
            }
        }
        if let Some(filling) = &mut self.filling {
            filling.absent.overwritten(sequence, written, now);
        }
        let freed = self.order.finish(Admitted::Write(sequence), piece.range);
        self.run(freed);
        self.done_piece(piece.request, written, now);
        if ended == LocalWrite::NotDurable {
            self.fail_backing(now);
        }
        self.begin_arrivals(now);
        self.drive(now);
    }

    /// A replica's map was written, or could not be.
    pub fn handle_map_written(&mut self, follower: Follower, written: bool, now: Time) {
        if let Some(peer) = self.peer_of(follower) {
            peer.handle_map_written(written, now);
        }
        self.free_log();
        self.begin_arrivals(now);
        self.drive(now);
    }

    /// The read of a copy has ended.
    pub fn handle_copy_read(&mut self, follower: Follower, read: CopyRead, content: CopyContent, now: Time) {
        match self.peer_of(follower) {
            Some(peer) => peer.handle_copy_read(read, content, now),
            // It was removed meanwhile: what was read is dropped.
            None => {
                let action = peer::Action::SendCopy { read, header: None };
                self.actions.push_back(Action::Peer { follower, action });
            }
        }
        self.drive(now);
    }

    /// A held range was read, or could not be: its writers go on.
    pub fn handle_digest(&mut self, hold: u64, digest: Option<[u8; 32]>, now: Time) {
        let Hold { follower, number, range } = self.holds.end(hold);
        let freed = self.order.finish(Admitted::Hold(hold), range);
        self.run(freed);
        if let Some(peer) = self.peer_of(follower) {
            peer.handle_local_digest(number, digest);
        }
        self.drive(now);
    }

    /// A connection to a replica is up. `session` is higher than any before, durably.
    pub fn handle_connected(&mut self, host: HostId, session: Session, identity: &Identity, now: Time) {
        self.start.hear(host);
        if let Some(link) = self.peers.get_mut(&host) {
            link.handle_connected(session, identity);
        }
        self.drive(now);
    }

    /// The connection to a replica is gone.
    pub fn handle_disconnected(&mut self, host: HostId, now: Time) {
        if let Some(peer) = self.peers.get_mut(&host) {
            peer.handle_disconnected(now);
        }
        if let Some(filling) = self.filling.as_mut().filter(|filling| filling.absent.source() == host) {
            filling.absent.source_lost();
        }
        self.drive(now);
    }

    /// A replica sent a control message.
    ///
    /// # Errors
    /// [`PeerError`] when the session must end; then [`Tracker::handle_disconnected`].
    pub fn handle_message(&mut self, host: HostId, message: Message, now: Time) -> Result<(), PeerError> {
        let Some(peer) = self.peers.get_mut(&host) else { return Ok(()) };
        if let Message::FetchFailed(FetchFailed { session, number }) = message
            && peer.session() == Some(session)
        {
            return self.fetch_failed(host, FetchId(number), now);
        }
        match peer.handle_message(message, self.last, now) {
            Ok(Handled::Sector(bytes)) => self.order.widen_sector(bytes.into()),
            Ok(_) => {}
            Err(why) => {
                self.is_estranged_from(host, &why);
                return Err(why);
            }
        }
        self.begin_arrivals(now);
        self.drive(now);
        Ok(())
    }

    /// A time-out of [`Tracker::poll_timeout`] has passed.
    pub fn handle_timeout(&mut self, now: Time) {
        if self.epoch.since.is_some_and(|since| now >= since.after(EPOCH_TIME)) {
            self.close_epoch();
            self.local.wanted = true;
            self.write_maps();
        }
        if self.log.is_full_for_long(now) {
            self.peers.values_mut().for_each(Peer::spill);
            self.begin_arrivals(now);
        }
        if self.log.has_idled(now) {
            // An epoch that a limit or a commit closed has had no sync here.
            self.local.wanted |= self.local.durable < self.last;
            self.log.let_idle_go(self.safe(), now);
            self.peers.values_mut().for_each(Peer::save_known);
            self.write_maps();
            self.write_log(true);
        }
        self.drive(now);
    }

    /// A replica joined.
    pub fn add_peer(&mut self, mut peer: Peer, now: Time) {
        peer.keep_word(self.words.patience, None);
        peer.set_withholds(self.replies.loss.blocks());
        self.joined += 1;
        peer.incarnation = self.joined;
        let host = peer.host();
        assert!(self.peers.insert(host, peer).is_none(), "a replica joins once");
        self.give_words(now);
        self.write_maps();
        self.drive(now);
    }

    /// A replica is one no more (X3): nothing waits for it, and what its map and window kept active is free. What is
    /// written from now on is another history than what it has (L1).
    pub fn remove_peer(&mut self, host: HostId, now: Time) {
        let Some(mut peer) = self.peers.remove(&host) else { return };
        peer.handle_disconnected(now);
        if peer.take_left() {
            self.generations.next = generation::Next::Left;
        }
        // It need not have heard that it was removed, and may be promoted as one that was promised something (W4).
        self.words.of_removed = self.words.of_removed.max(peer.promised());
        self.give_words(now);
        self.free_log();
        self.begin_arrivals(now);
        self.drive(now);
    }

    /// Compares the volume with a replica; [`Tracker::take_compared`] gives the result. Says whether it began.
    #[must_use]
    pub fn begin_compare(&mut self, host: HostId, now: Time) -> bool {
        let last = self.last;
        // Of what is absent there is nothing to compare.
        if self.filling.is_some() {
            return false;
        }
        let began = self.peers.get_mut(&host).is_some_and(|peer| peer.begin_compare(last));
        self.drive(now);
        began
    }

    /// Nobody waits for a compare with this replica any more. What of it is under way ends soon.
    pub fn cancel_compare(&mut self, host: HostId) {
        if let Some(peer) = self.peers.get_mut(&host) {
            peer.cancel_compare();
        }
    }

    /// The result of a compare that has ended.
    pub fn take_compared(&mut self, host: HostId) -> Option<CompareResult> {
        let last = self.last;
        let result = self.peers.get_mut(&host)?.take_compared(last);
        self.collect();
        result
    }

    /// Whether a compare with this replica is under way.
    #[must_use]
    pub fn is_comparing(&self, host: HostId) -> bool {
        self.peers.get(&host).is_some_and(Peer::is_comparing)
    }

    /// The operator chose another mode for a replica, or what happens while one is lost. Replies go by it from now on, except
    /// where that breaks a word that holds for ever; a replica that has none hears of its mode with the next session.
    pub fn configure(&mut self, modes: &[(HostId, Mode)], loss: ReplicaLoss, now: Time) {
        self.replies.loss = loss;
        self.peers.values_mut().for_each(|peer| peer.set_withholds(loss.blocks()));
        for (host, mode) in modes {
            if let Some(peer) = self.peers.get_mut(host) {
                peer.set_mode(*mode);
            }
        }
        self.give_words(now);
        self.drive(now);
    }

    /// The operator chose how many bytes a second a resync of a replica may copy at most.
    pub fn limit_resync(&mut self, host: HostId, limit: Option<NonZeroU64>, now: Time) {
        if let Some(peer) = self.peers.get_mut(&host) {
            peer.set_resync_limit(limit);
        }
        self.drive(now);
    }

    /// Something else wrote to the backing, nobody knows where: all of it is compared with every replica (X4).
    pub fn doubt_everything(&mut self, now: Time) {
        let last = self.last;
        self.peers.values_mut().for_each(|peer| peer.doubt_everything(last));
        self.write_maps();
        self.drive(now);
    }

    /// The volume is being demoted, after [`Tracker::close`] was called: every replica that has everything records that
    /// it does. [`Tracker::is_released`] says which ones have.
    pub fn release(&mut self, now: Time) {
        assert!(self.closing, "a volume is released when it is being closed");
        let newest = self.generations.newest();
        self.peers.values_mut().for_each(|peer| peer.release(newest));
        self.drive(now);
    }

    /// Whether this replica has recorded a release.
    #[must_use]
    pub fn is_released(&self, host: HostId) -> bool {
        self.peers.get(&host).is_some_and(Peer::is_released)
    }

    /// Whether this replica is in sync, and counts for its mode (W4).
    #[must_use]
    pub fn is_in_sync(&self, host: HostId) -> bool {
        self.peers.get(&host).is_some_and(Peer::is_in_sync)
    }

    /// The volume's generations, newest first.
    #[must_use]
    pub fn lineage(&self) -> &[GenerationId] {
        &self.generations.lineage
    }

    /// No request will come any more: make everything durable and leave an empty log where that is possible.
    /// Done when [`Tracker::is_closed`].
    pub fn close(&mut self, now: Time) {
        self.closing = true;
        self.close_epoch();
        self.local.wanted = true;
        self.peers.values_mut().for_each(Peer::save_known);
        self.write_maps();
        self.drive(now);
    }

    /// Whether everything that [`Tracker::close`] began has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        let is_idle = self.requests.is_empty()
            && self.local.running.is_none()
            && self.pipeline.first_under_way().is_none()
            && !self.generations.beginning
            && self.is_fill_idle()
            && !self.told.is_asked();
        let is_durable = self.local.opened && self.local.durable == self.last;
        let is_done = |peer: &Peer| peer.is_saved() || peer.map_is_out_of_reach();
        let is_saved = self.peers.values().all(is_done) && self.log.is_recorded();
        self.closing && is_idle && (is_durable && is_saved || self.local.failed)
    }

    /// The numbers of each replica, for status.
    pub fn reports(&self, now: Time) -> impl Iterator<Item = (HostId, Report)> + '_ {
        self.peers.iter().map(move |(host, peer)| (*host, peer.report(now)))
    }

    /// Whether the backing counts as failed until it is reopened (W5).
    #[must_use]
    pub fn has_failed(&self) -> bool {
        self.local.failed
    }

    /// The open epoch and the last write.
    #[must_use]
    pub fn position(&self) -> (Epoch, Sequence) {
        (self.epoch.number, self.last)
    }

    /// Where the content stands, as of the last epoch that ended.
    #[must_use]
    pub fn reached(&self) -> Position {
        match self.told.end() {
            Some(_) => Position {
                generation: self.generations.newest(),
                epoch: Epoch(self.epoch.number.0 - 1),
                sequence: self.last,
            },
            // No epoch of a run that wrote nothing is one of that generation.
            None => self.opened,
        }
    }

    /// How many extents are active.
    #[must_use]
    pub fn active_extents(&self) -> usize {
        self.log.len()
    }

    fn close_epoch(&mut self) {
        if self.epoch.since.is_some() {
            self.end_epoch();
        }
    }

    fn end_epoch(&mut self) {
        let (epoch, sequence) = (self.epoch.number, self.last);
        for peer in self.peers.values_mut() {
            peer.handle_epoch_end(epoch, sequence);
        }
        self.note_epoch_end(epoch, sequence);
        self.epoch = OpenEpoch { number: epoch.next(), bytes: 0, since: None };
    }

    /// Above which number the next session of any replica must be ([`crate::disk::superblock::Superblock::next_session`]).
    #[must_use]
    pub fn sessions_above(&self) -> Session {
        self.peers.values().filter_map(Peer::reused).max().unwrap_or_default()
    }

    /// Asks every connected replica to say that it is there.
    pub fn ask_marks(&mut self, now: Time) {
        self.peers.values_mut().for_each(Peer::ask_mark);
        self.drive(now);
    }

    /// Whether applications were answered something that this replica lacks; so for one that is not known here.
    #[must_use]
    pub fn lacks_answered(&self, host: HostId) -> bool {
        self.peers.get(&host).is_none_or(Peer::lacks_answered)
    }

    /// Whether applications were answered something that any replica lacks.
    #[must_use]
    pub fn any_lacks_answered(&self) -> bool {
        self.peers.values().any(Peer::lacks_answered)
    }

    /// The newest generation in which anything was answered that this replica may lack, or the one that the volume was opened
    /// with, where no more is known. Those after it were begun for nothing, also one that is just being recorded.
    #[must_use]
    pub fn answered_generation(&self, host: HostId) -> Option<GenerationId> {
        let known = self.peers.get(&host).and_then(Peer::answered_generation);
        if let Some(known) = known.filter(|known| self.generations.lineage.contains(known)) {
            return Some(known);
        }
        let Generations { lineage, unanswered, .. } = &self.generations;
        lineage.get((*unanswered).min(lineage.len().saturating_sub(1))).copied()
    }

    fn answer(&mut self, id: RequestId, result: Result<(), WriteFailed>) {
        self.requests.end(id);
        self.actions.push_back(Action::Reply { request: id, result });
    }

    /// Begins what nothing stands in the way of any more, after each event.
    fn drive(&mut self, now: Time) {
        self.local.wanted |= self.closing && self.local.durable < self.last;
        self.want_fill_sync(now);
        self.start_sync();
        self.fill(now);
        self.answer_failed();
        self.look_for_majority();
        self.look_for_released(now);
        self.answer_withheld();
        self.settle(now);
        self.drive_peers(now);
        self.end_waits(now);
        self.agree(now);
        self.look_ahead(now);
        if self.closing {
            if self.log_is_out_of_reach() && !self.local.failed {
                self.fail_backing(now);
            }
            self.log.let_go(self.safe());
            // What was marked when the links ended: nothing comes later that it could be written with.
            self.write_maps();
        }
        self.write_log(self.closing);
        self.collect();
    }

    fn drive_peers(&mut self, now: Time) {
        self.renew_words(now);
        self.note_left();
        let (log, has_several) = (&self.log, self.has_several_replicas());
        // Asked for with a commit only.
        let active = || if has_several { log.extents().collect() } else { Vec::new() };
        let may_commit: Vec<bool> = self.peers.keys().map(|host| self.may_commit(*host)).collect();
        let is_active = self.requests.were_asked_lately(now) || self.pipeline.first_under_way().is_some();
        let (mut epoch_end, mut generation) = (false, false);
        let (told_before, mut is_untold) = (self.told.end(), false);
        let opened = Some(self.opened).filter(|_| told_before.is_none());
        let absent = self.filling.as_ref().map(|filling| &filling.absent);
        let has_failed = self.local.failed;
        for (peer, may_commit) in self.peers.values_mut().zip(may_commit) {
            let circumstances = Circumstances {
                application_is_active: is_active,
                lineage: &self.generations.lineage,
                position: (Epoch(self.epoch.number.0 - 1), self.last),
                opened,
                told_before,
                may_commit,
                active: &active,
                absent,
                has_failed,
            };
            let wants = peer.drive(&self.order, &circumstances, now);
            epoch_end |= wants.epoch_end;
            generation |= wants.generation;
            is_untold |= wants.is_untold;
        }
        self.told.is_wanted |= is_untold;
        if epoch_end && self.may_tell(self.epoch.number) {
            self.end_epoch();
        }
        if generation {
            self.begin_generation();
        }
    }

    /// The peer, unless it was removed meanwhile.
    fn peer_of(&mut self, follower: Follower) -> Option<&mut Peer> {
        self.peers.get_mut(&follower.host).filter(|peer| peer.incarnation == follower.incarnation)
    }

    /// Moves the peers' actions to the tracker's, in order.
    fn collect(&mut self) {
        let mut wanted = Vec::new();
        for (host, peer) in &mut self.peers {
            let follower = Follower { host: *host, incarnation: peer.incarnation };
            while let Some(action) = peer.poll_action() {
                match action {
                    peer::Action::Hold { number, range } => wanted.push((follower, number, range)),
                    action => self.actions.push_back(Action::Peer { follower, action }),
                }
            }
        }
        if wanted.is_empty() {
            return;
        }
        for (follower, number, range) in wanted {
            let hold = self.holds.begin(Hold { follower, number, range });
            let peer = self.peer_of(follower).expect("it asked for the hold");
            peer.handle_hold(number, range);
            if self.order.admit(Admitted::Hold(hold), range) {
                self.run(vec![Admitted::Hold(hold)]);
            }
        }
        self.collect();
    }
}
