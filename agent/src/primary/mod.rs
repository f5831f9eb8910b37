//! The shell of a primary: drives the tracker, holds the requests' data, reads and writes the backing.
//!
//! Front ends call [`submit`](crate::device::Volume::submit) on the volume's own thread; the tracker decides, and its actions are carried out
//! on the spot: an operation is queued with the storage, a frame with its link, a reply with its front end. Nothing
//! here waits, and nothing decides.

mod demotion;
mod filling;
mod link;
mod requests;
#[cfg(test)]
mod tests;

use crate::absence;
use crate::buffer::{BufferPool, is_zero};
use crate::config::{PeerConfig, VolumeConfig};
use crate::content::{Reads, digest};
use crate::device::{Answer, Errno, Reply};
use crate::quantity::unix_seconds;
use crate::state::{Recovered, State};
use crate::storage::file::File;
use crate::storage::{self, Cause, Operation, Storage};
use crate::troubles::{Kind, Troubles};
use blockmirror_protocol::disk::activity_log;
use blockmirror_protocol::disk::superblock::LINEAGE_LIMIT;
use blockmirror_protocol::disk::superblock::Superblock;
use blockmirror_protocol::handover;
use blockmirror_protocol::peer::resync::{COPY_BYTES, CopyContent, CopyRead};
use blockmirror_protocol::peer::{self, CompareResult, Identity, Peer, PeerError};
use blockmirror_protocol::promise::PATIENCE;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::terms::{Fence, Mode};
use blockmirror_protocol::tracker::replies::{Blocked, ReplicaLoss};
use blockmirror_protocol::tracker::start::Heard;
use blockmirror_protocol::tracker::{
    self, Action, Doubt, Follower, LocalWrite, RequestId, Tracker, WriteFailed,
};
use blockmirror_protocol::units::{Epoch, GenerationId, HostId, Sequence, Session, Time};
use blockmirror_protocol::wire::message::{Member, Members, Message};
use bytes::Bytes;
use filling::Filling;
pub use link::{Link, LinkState, Split};
use link::{LinkQueues, Queued};
use requests::how_ended;
use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::num::NonZeroU64;
use std::rc::{Rc, Weak};
use std::time::{Duration, Instant};
use tokio::sync::{Notify, oneshot};
use tokio::task::spawn_local;

/// How often it is looked whether the disk hangs, while it is waited for.
const HANG_LOOK: Duration = Duration::from_millis(250);

/// A frame that is a smaller share of its request than one in so many is copied, if the request is larger than that.
const PINNED_SHARE: usize = 64;
const PINNED_BYTES: usize = 1 << 20;

/// A volume on its primary. Lives on the volume's thread.
pub struct Primary {
    me: Weak<Self>,
    started: Instant,
    storage: Rc<dyn Storage>,
    backing: Rc<File>,
    state: Rc<State>,
    pool: BufferPool,
    size_bytes: u64,
    inner: RefCell<Inner>,
    /// What the timer waits for, and how it is told of something earlier.
    armed: Cell<Option<Time>>,
    earlier: Notify,
    /// What became of the backing, in words, once it failed.
    error: RefCell<Option<String>>,
    reads: Reads,
    closed: Notify,
    /// Told when a compare may have ended.
    compare_ended: Notify,
    /// Told of everything that a replica says.
    heard: Notify,
    absence: absence::Watch,
    /// Told when the process was away: others are to be asked who leads, which ends these doubts.
    away: Notify,
    absences: RefCell<Vec<Doubt>>,
    /// Told when it is known who leads.
    settled: Notify,
    /// The volume is opened anew: nothing of this one is to stay.
    retired: Cell<bool>,
    superseded: Cell<Option<Fence>>,
    /// The volume is about to be closed.
    waits_no_more: Cell<bool>,
    session_numbers: tokio::sync::Mutex<()>,
}

struct Inner {
    tracker: Tracker,
    next_request: u64,
    requests: HashMap<RequestId, Pending>,
    maps: HashMap<HostId, Rc<File>>,
    links: HashMap<HostId, LinkQueues>,
    copies: HashMap<(Follower, CopyRead), Bytes>,
    filling: Filling,
    compares: HashMap<HostId, oneshot::Sender<Option<CompareResult>>>,
    /// Held by whoever compares with a replica.
    compare_turns: HashMap<HostId, Rc<tokio::sync::Mutex<()>>>,
}

/// Why there is no result of a compare.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotCompared {
    /// This host is not the primary.
    NotPrimary,
    /// The replica is not in sync.
    NotInSync,
    /// The link was lost, or this host is the primary no more.
    Ended,
}

/// A compare that somebody waits for.
struct Begun<'primary> {
    primary: &'primary Primary,
    peer: HostId,
}

impl Drop for Begun<'_> {
    fn drop(&mut self) {
        self.primary.drive(|inner, _| {
            if inner.compares.remove(&self.peer).is_some() {
                inner.tracker.cancel_compare(self.peer);
            }
        });
    }
}

struct Pending {
    offset: u64,
    data: Bytes,
    kind: Kind,
    reply: Rc<dyn Reply>,
    cookie: u64,
    /// What its first piece that failed failed for.
    failure: Option<Errno>,
}

impl Primary {
    /// Opens a volume as primary: its epochs get numbers that no earlier run used, durably, and what the activity log of
    /// before says goes to the maps of all replicas (D1).
    ///
    /// # Errors
    /// [`crate::state::StateError`] when the metadata can't be read or written.
    pub async fn open(
        storage: Rc<dyn Storage>,
        backing: Rc<File>,
        recovered: Recovered,
        pool: BufferPool,
        config: &VolumeConfig,
    ) -> Result<Rc<Self>, crate::state::StateError> {
        let Recovered { state, log, mark: _ } = recovered;
        let run = state.superblock().next_run().ok_or(crate::state::StateError::UsedUp)?;
        state.change_superblock(|superblock| superblock.begin_run(run)).await?;
        let superblock = state.superblock();
        let hosts: Vec<HostId> = config.peers.iter().map(|peer| peer.host).collect();
        state.void_other_maps(&hosts).await?;
        if let activity_log::Recovered::Unsure { .. } = log {
            tracing::warn!("the activity log's newest record is not whole: all blocks count as dirty");
        }
        let (mut sessions, mut maps) = (Vec::new(), HashMap::new());
        for (peer, mode) in config.peers.iter().map(PeerConfig::wanted) {
            let (map, file) = state.open_map_of_follower(peer).await?;
            let (size, block_size) = (superblock.size_bytes, superblock.block_size);
            sessions.push(Peer::new(peer, map, size, block_size, config.window.0, mode));
            maps.insert(peer, file);
        }
        let returned = superblock.returned();
        let (absent, filling) = Filling::open(&state).await?;
        let settings = tracker::Settings {
            size_bytes: superblock.size_bytes,
            sector_bytes: backing.alignment(),
            lineage: superblock.lineage,
            lineage_limit: LINEAGE_LIMIT,
            opened: superblock.position,
            first_epoch: superblock.run,
            loss: config.replica_loss(),
            opened_at: Time::default(),
            patience: PATIENCE,
            active_extents: config.active_extents(),
            owes_word: config.may_owe_word(unix_seconds()),
            returned,
            absent,
        };
        let tracker = Tracker::new(settings, &log, sessions);
        let primary = Rc::new_cyclic(|me| Self {
            me: me.clone(),
            started: Instant::now(),
            storage,
            backing,
            state: Rc::new(state),
            pool,
            size_bytes: superblock.size_bytes,
            inner: RefCell::new(Inner {
                tracker,
                next_request: 0,
                requests: HashMap::new(),
                maps,
                links: HashMap::new(),
                copies: HashMap::new(),
                filling,
                compares: HashMap::new(),
                compare_turns: HashMap::new(),
            }),
            armed: Cell::new(None),
            earlier: Notify::new(),
            error: RefCell::new(None),
            reads: Reads::default(),
            closed: Notify::new(),
            compare_ended: Notify::new(),
            heard: Notify::new(),
            absence: absence::Watch::new(),
            away: Notify::new(),
            absences: RefCell::default(),
            settled: Notify::new(),
            retired: Cell::new(false),
            superseded: Cell::new(None),
            waits_no_more: Cell::new(false),
            session_numbers: tokio::sync::Mutex::new(()),
        });
        primary.drive(|_, _| ());
        spawn_local(primary.clone().keep_time());
        Ok(primary)
    }

    /// What the superblock says.
    #[must_use]
    pub fn state(&self) -> &State {
        &self.state
    }

    /// A moment on the machines' clock.
    #[must_use]
    pub fn now(&self) -> Time {
        Time(self.started.elapsed())
    }

    /// What became of the backing, in words, if it counts as failed (W5).
    #[must_use]
    pub fn failure(&self) -> Option<String> {
        let has_failed = self.inner.borrow().tracker.has_failed();
        has_failed.then(|| self.error.borrow().clone().unwrap_or_default())
    }

    /// Tells every connected replica who the volume's hosts are now.
    pub fn tell_members(&self, members: Members) {
        let inner = self.inner.borrow();
        for link in inner.links.values() {
            link.push(Queued::Message(members.clone().into()));
        }
    }

    fn tell(&self, peer: HostId, members: Members) {
        self.inner.borrow_mut().queue(peer, Queued::Message(members.into()));
    }

    /// The open epoch and each replica's numbers.
    #[must_use]
    pub fn reports(&self) -> (u64, HashMap<HostId, peer::Report>) {
        let inner = self.inner.borrow();
        (inner.tracker.position().0.0, inner.tracker.reports(self.now()).collect())
    }

    /// A replica that was promised for ever what an answer would break now.
    #[must_use]
    pub fn promised_to(&self) -> Option<HostId> {
        self.inner.borrow().tracker.promised_to()
    }

    /// Whether writes wait, or would wait, until more replicas are in sync.
    #[must_use]
    pub fn blocked(&self) -> Option<Blocked> {
        self.inner.borrow().tracker.blocked(self.now())
    }

    /// The volume was just opened, after these hosts said how they stand: see [`Tracker::start`].
    pub fn start(&self, heard: Vec<HostId>, awaits: bool) {
        self.drive(|inner, now| inner.tracker.start(heard, awaits, now));
    }

    /// The hosts that are waited for since this one was demoted and promoted again: see [`Tracker::released`].
    #[must_use]
    pub fn awaited(&self) -> Vec<HostId> {
        self.inner.borrow().tracker.released().collect()
    }

    /// The operator knows that no other host was promoted.
    pub fn await_no_majority(&self) {
        self.drive(|inner, now| inner.tracker.await_no_majority(now));
    }

    /// How many hosts were heard since the start.
    #[must_use]
    pub fn heard(&self) -> Heard {
        self.inner.borrow().tracker.heard()
    }

    /// A replica joined: its blocks are all dirty.
    ///
    /// # Errors
    /// [`crate::state::StateError`] when its map can't be made.
    pub async fn add_peer(
        &self,
        peer: HostId,
        mode: Mode,
        window_bytes: u64,
    ) -> Result<(), crate::state::StateError> {
        // One that was removed may have a map that could not be made to say so.
        let (map, file) = self.state.new_map_of_follower(peer).await?;
        let superblock = self.state.superblock();
        let replica = Peer::new(peer, map, superblock.size_bytes, superblock.block_size, window_bytes, mode);
        self.drive(|inner, now| {
            inner.maps.insert(peer, file);
            inner.tracker.add_peer(replica, now);
        });
        Ok(())
    }

    /// Whether this host is a replica, also one that is just being removed.
    #[must_use]
    pub fn has_peer(&self, peer: HostId) -> bool {
        self.inner.borrow().maps.contains_key(&peer)
    }

    /// A replica is one no more: nothing waits for it, and its map says that all may differ (X3). Its link goes on until it
    /// is ended. Nothing is done where the volume is opened anew meanwhile: the maps are another one's now, which knows who
    /// its peers are.
    ///
    /// # Errors
    /// [`crate::state::StateError`] when its map can't be written; the next start tries again.
    pub async fn remove_peer(&self, peer: HostId) -> Result<(), crate::state::StateError> {
        if self.retired.get() {
            return Ok(());
        }
        let others: Vec<HostId> = self.drive(|inner, now| {
            inner.tracker.remove_peer(peer, now);
            inner.maps.remove(&peer);
            inner.copies.retain(|(follower, _), _| follower.host != peer);
            inner.maps.keys().copied().collect()
        });
        self.state.void_other_maps(&others).await
    }

    /// The operator chose other modes, or what happens while a replica is lost.
    pub fn configure(&self, modes: &[(HostId, Mode)], loss: ReplicaLoss) {
        self.drive(|inner, now| inner.tracker.configure(modes, loss, now));
    }

    /// Something else wrote to the backing: all of it is compared with every replica.
    pub fn doubt_everything(&self) {
        self.drive(|inner, now| inner.tracker.doubt_everything(now));
    }

    /// How many bytes a second a resync of a replica may copy at most.
    pub fn limit_resync(&self, peer: HostId, limit: Option<NonZeroU64>) {
        self.drive(|inner, now| inner.tracker.limit_resync(peer, limit, now));
    }

    /// Compares the volume with a replica, after the compares with it that others wait for. It ends when the future is
    /// dropped.
    ///
    /// # Errors
    /// [`NotCompared`].
    pub async fn compare(&self, peer: HostId) -> Result<CompareResult, NotCompared> {
        let turns = self.inner.borrow_mut().compare_turns.entry(peer).or_default().clone();
        let _turn = turns.lock().await;
        let is_comparing = || self.inner.borrow().tracker.is_comparing(peer);
        // What one asked for that was given up is still to come.
        loop {
            let ended = self.compare_ended.notified();
            if !is_comparing() {
                break;
            }
            ended.await;
        }
        let (sender, result) = oneshot::channel();
        let began = self.drive(|inner, now| {
            let began = inner.tracker.begin_compare(peer, now);
            if began {
                inner.compares.insert(peer, sender);
            }
            began
        });
        if !began {
            return Err(NotCompared::NotInSync);
        }
        let _begun = Begun { primary: self, peer };
        result.await.ok().flatten().ok_or(NotCompared::Ended)
    }

    /// Makes everything durable and waits for it. No request may come any more.
    pub async fn close(&self) {
        self.drive(|inner, now| inner.tracker.close(now));
        while !self.inner.borrow().tracker.is_closed() {
            self.closed.notified().await;
        }
        storage::drain(&*self.storage).await;
    }

    /// The volume is about to be closed: what waits until more replicas are in sync fails now.
    pub fn wait_no_more(&self) {
        self.drive(|inner, now| inner.tracker.wait_no_more(now));
        self.waits_no_more.set(true);
        self.settled.notify_waiters();
    }

    /// Ends when a call to the kernel has been under way for so long.
    pub async fn hangs(&self, limit: Duration) {
        while self.storage.oldest().is_none_or(|call| call.since.elapsed() < limit) {
            tokio::time::sleep(HANG_LOOK).await;
        }
    }

    /// The number of a new session, higher than any before, durably.
    async fn next_session(self: &Rc<Self>) -> Result<Session, crate::state::StateError> {
        let primary = self.clone();
        let recording = async move {
            let _one_at_a_time = primary.session_numbers.lock().await;
            let above = primary.inner.borrow().tracker.sessions_above();
            let next = primary.state.superblock().next_session(above);
            primary.state.change_superblock(|superblock| superblock.session = next).await?;
            Ok(next)
        };
        // A link that is interrupted must not leave its write under way where the next change begins its own.
        spawn_local(recording).await.expect("recording neither panics nor is cancelled")
    }

    fn identity(&self, members: Vec<Member>) -> Identity {
        let superblock = self.state.superblock();
        Identity {
            volume: superblock.volume,
            size_bytes: superblock.size_bytes,
            block_size: superblock.block_size,
            sector_bytes: u32::try_from(self.backing.alignment()).expect("a sector is small"),
            copy: superblock.copy,
            adopted: superblock.adopted,
            fence: superblock.fence,
            lineage: self.inner.borrow().tracker.lineage().to_vec(),
            members,
            ends: superblock.ends,
        }
    }

    fn connected(&self, peer: HostId, session: Session, identity: &Identity, queues: LinkQueues) {
        self.drive(|inner, now| {
            inner.links.insert(peer, queues);
            inner.tracker.handle_connected(peer, session, identity, now);
        });
    }

    fn disconnected(&self, peer: HostId) {
        self.drive(|inner, now| {
            inner.links.remove(&peer);
            inner.tracker.handle_disconnected(peer, now);
        });
    }

    fn message(&self, peer: HostId, message: Message) -> Result<(), PeerError> {
        let handled = self.drive(|inner, now| inner.tracker.handle_message(peer, message, now));
        self.heard.notify_waiters();
        handled
    }

    /// How far the rebuild of this host's copy is, while there is one (S4).
    #[must_use]
    pub fn rebuild(&self) -> Option<blockmirror_protocol::rebuild::Progress> {
        self.inner.borrow().tracker.rebuild()
    }

    /// Whether this primary may be demoted in order, perhaps for another host.
    ///
    /// # Errors
    /// As [`handover::may_begin`].
    pub fn may_be_demoted(&self, to: Option<HostId>) -> Result<(), HostId> {
        handover::may_begin(&self.inner.borrow().tracker, to)
    }

    /// Feeds the tracker an event, then carries out what it asks for.
    fn drive<Output>(&self, event: impl FnOnce(&mut Inner, Time) -> Output) -> Output {
        let mut inner = self.inner.borrow_mut();
        let now = self.now();
        self.look_for_absence(&mut inner, now);
        let output = event(&mut inner, now);
        while let Some(action) = inner.tracker.poll_action() {
            self.carry_out(&mut inner, action);
        }
        if !inner.compare_turns.is_empty() {
            inner.end_compares();
            self.compare_ended.notify_waiters();
        }
        let next = inner.tracker.poll_timeout();
        if let Some(next) = next
            && self.armed.get().is_none_or(|armed| next < armed)
        {
            self.armed.set(Some(next));
            self.earlier.notify_one();
        }
        if inner.tracker.is_closed() {
            self.closed.notify_one();
        }
        output
    }

    /// A process that was away answers nothing before others were asked who leads.
    fn look_for_absence(&self, inner: &mut Inner, now: Time) {
        if self.absence.was_away() {
            self.absences.borrow_mut().push(inner.tracker.note_absence(now));
            self.away.notify_one();
        }
    }

    /// Waits until the process was away, and it isn't known who leads: then others are to be asked, and this primary told by
    /// [`Primary::trust`], with these doubts, or by [`Primary::supersede`].
    pub async fn was_away(&self) -> Vec<Doubt> {
        self.away.notified().await;
        self.absences.take()
    }

    /// Another host may lead: nothing is answered until others were asked, and this primary told as in
    /// [`Primary::was_away`].
    #[must_use]
    pub fn doubt(&self) -> Doubt {
        self.drive(|inner, now| inner.tracker.doubt(now))
    }

    /// Nobody who could be reached since these doubts began knows of another primary.
    pub fn trust(&self, doubts: impl IntoIterator<Item = Doubt>) {
        self.drive(|inner, now| doubts.into_iter().for_each(|doubt| inner.tracker.trust(doubt, now)));
        self.settled.notify_waiters();
    }

    /// Asks every connected replica to say that it is there; its report counts that as heard.
    pub fn ask_marks(&self) {
        self.drive(|inner, now| inner.tracker.ask_marks(now));
    }

    /// Calls the tracker back when it asked for that.
    async fn keep_time(self: Rc<Self>) {
        let me = Rc::downgrade(&self);
        drop(self);
        while let Some(primary) = me.upgrade().filter(|primary| !primary.retired.get()) {
            let next = primary.inner.borrow().tracker.poll_timeout();
            primary.armed.set(next);
            let due = next.map(|next| primary.started + next.0);
            tokio::select! {
                () = sleep_until(due) => primary.drive(|inner, now| inner.tracker.handle_timeout(now)),
                () = primary.earlier.notified() => {}
            }
        }
    }

    fn carry_out(&self, inner: &mut Inner, action: Action) {
        match action {
            Action::WriteLog { offset, record } => {
                let operation =
                    Operation::Write { offset, data: self.state.page(&record[..]), durable: true };
                self.submit(self.state.log_file(), operation, |primary, outcome| {
                    let written = primary.note(outcome);
                    primary.drive(|inner, now| inner.tracker.handle_log_written(written, now));
                });
            }
            Action::WriteLocal { sequence, request, range, zero, durable } => {
                self.write(inner, sequence, request, range, zero, durable);
            }
            Action::BeginGeneration { kept, first, end } => self.begin_generation(kept, first, end),
            Action::TellUpTo { end } => self.tell_up_to(end),
            Action::SyncLocal => self.submit(&self.backing, Operation::Sync, |primary, outcome| {
                let synced = primary.note(outcome);
                primary.drive(|inner, now| inner.tracker.handle_synced(synced, now));
            }),
            Action::ReadLocal { request } => self.read_filled(inner, request),
            Action::Land { landing, part, is_zero } => self.land(inner, landing, part, is_zero),
            Action::DropFetched(fetch) => inner.filling.drop_fetched(fetch),
            Action::WriteAbsent(changes) => self.write_absent(inner, changes),
            Action::Filled => self.filled(),
            Action::Reply { request, result } => {
                if inner.filling.fail_read(request) {
                    return;
                }
                let pending = inner.requests.remove(&request).expect("a request is answered once");
                let answer = match result {
                    Ok(()) => Ok(Answer::Done),
                    Err(WriteFailed) => {
                        self.count_failure(inner, &pending);
                        Err(pending.failure.unwrap_or(Errno(libc::EIO)))
                    }
                };
                pending.reply.complete(pending.cookie, answer);
            }
            Action::ReadDigest { hold, range } => {
                let primary = self.me();
                spawn_local(async move {
                    let digest = primary.digest(range).await;
                    primary.drive(|inner, now| inner.tracker.handle_digest(hold, digest, now));
                });
            }
            Action::Peer { follower, action } => self.carry_out_for(inner, follower, action),
        }
    }

    /// Keeps for status that a request failed. That another host was promoted is told otherwise.
    fn count_failure(&self, inner: &Inner, pending: &Pending) {
        if self.superseded.get().is_some() {
            return;
        }
        let is_own = pending.failure.is_some() || inner.tracker.has_failed();
        let error = self.error.borrow().clone().filter(|_| is_own);
        let text = error.unwrap_or_else(|| "too few replicas were in sync in time".to_owned());
        let found_no_room = pending.failure == Some(Errno(libc::ENOSPC));
        self.reads.troubles().note(pending.kind, found_no_room, &text);
    }

    /// What applications are answered with an error is counted there from now on.
    pub fn count_in(&self, troubles: Rc<Troubles>) {
        self.reads.count_in(troubles);
    }

    fn begin_generation(&self, kept: Vec<GenerationId>, first: Epoch, end: Epoch) {
        let primary = self.me();
        spawn_local(async move {
            let generation = GenerationId(crate::transport::key::random());
            let is_followed = primary.awaited().is_empty();
            let change = |superblock: &mut Superblock| {
                superblock.begin_generation(generation, &kept, LINEAGE_LIMIT, (first, end));
                // Before anything is written that one of them may lack.
                if is_followed {
                    superblock.note_followed();
                }
            };
            let generation = primary.record(change).await.then_some(generation);
            generation.into_iter().for_each(|generation| primary.state.note_generation(generation));
            primary.drive(|inner, now| inner.tracker.handle_generation(generation, now));
        });
    }

    fn tell_up_to(&self, end: Epoch) {
        let primary = self.me();
        spawn_local(async move {
            let is_followed = primary.awaited().is_empty();
            let change = |superblock: &mut Superblock| {
                superblock.tell_up_to(end);
                if is_followed {
                    superblock.note_followed();
                }
            };
            let recorded = primary.record(change).await;
            primary.drive(|inner, now| inner.tracker.handle_told(recorded, now));
        });
    }

    /// Changes the superblock for the tracker. Says whether that is durable.
    async fn record(&self, change: impl FnOnce(&mut Superblock)) -> bool {
        let recorded = self.state.change_superblock(change).await;
        if let Err(error) = &recorded {
            let text = crate::words::with_causes(error);
            tracing::error!("{text}");
            self.error.borrow_mut().get_or_insert(text);
        }
        recorded.is_ok()
    }

    fn carry_out_for(&self, inner: &mut Inner, follower: Follower, action: peer::Action) {
        match action {
            peer::Action::Send(message) => inner.queue(follower.host, Queued::Message(message)),
            peer::Action::SendFrame { header, request } => {
                let payload =
                    request.map_or_else(Bytes::new, |request| inner.frame_data(request, header.body.range()));
                inner.queue(follower.host, Queued::Live(header.encode(&payload), payload));
            }
            peer::Action::WriteMap(changes) => {
                let file = inner.maps[&follower.host].clone();
                let primary = self.me();
                spawn_local(async move {
                    let written = primary.state.write_map(&file, changes).await;
                    if let Err(error) = &written {
                        tracing::error!("{}", crate::words::with_causes(error));
                    }
                    primary
                        .drive(|inner, now| inner.tracker.handle_map_written(follower, written.is_ok(), now));
                });
            }
            peer::Action::ReadCopy { read, range, digest } => {
                let primary = self.me();
                spawn_local(async move {
                    let (content, data) = primary.read_copy(range, digest).await;
                    primary.drive(|inner, now| {
                        inner.copies.insert((follower, read), data);
                        // What it does not take up, it says to drop.
                        inner.tracker.handle_copy_read(follower, read, content, now);
                    });
                });
            }
            peer::Action::SendCopy { read, header } => {
                let payload = inner.copies.remove(&(follower, read)).unwrap_or_default();
                if let Some(header) = header {
                    inner.queue(follower.host, Queued::Bulk(header.encode(&payload), payload));
                }
            }
            peer::Action::Hold { .. } => unreachable!("the tracker carries holds out itself"),
        }
    }

    fn write(
        &self,
        inner: &Inner,
        sequence: Sequence,
        request: RequestId,
        range: ByteRange,
        zero: Option<bool>,
        durable: bool,
    ) {
        let operation = match zero {
            Some(may_unmap) => Operation::Zero { range, may_unmap },
            None => Operation::Write { offset: range.offset, data: inner.data(request, range), durable },
        };
        let is_zero = zero.is_some();
        self.submit(&self.backing, operation, move |primary, outcome| {
            // A zeroing makes no sync, so what it fails for is its own.
            let has_own_reason = is_zero || primary.backing.is_direct();
            let ended = how_ended(&outcome, durable, has_own_reason);
            let found_no_room = outcome.as_ref().is_err_and(|error| error.cause() == Cause::NoSpace);
            let written = primary.note(outcome);
            if written && is_zero && durable {
                // A zeroing has no durable form of its own.
                return primary.submit(&primary.backing, Operation::Sync, move |primary, outcome| {
                    let synced = primary.note(outcome);
                    let ended = if synced { LocalWrite::Written } else { LocalWrite::NotDurable };
                    primary.drive(|inner, now| {
                        inner.note_failure(request, ended, false);
                        inner.tracker.handle_local_written(sequence, ended, now);
                    });
                });
            }
            primary.drive(|inner, now| {
                inner.note_failure(request, ended, found_no_room);
                inner.tracker.handle_local_written(sequence, ended, now);
            });
        });
    }

    /// Reads a range for a copy: nothing for zeroes, where its digest is wanted, and where the disk failed.
    async fn read_copy(&self, range: ByteRange, digest: bool) -> (CopyContent, Bytes) {
        // Where it can't be told, or the backing was cut off, the read tells.
        let hole_bytes = self.backing.find_hole(range).await.unwrap_or(0);
        if hole_bytes == range.length || range.length > COPY_BYTES {
            return (CopyContent::Hole(hole_bytes), Bytes::new());
        }
        match storage::read(&*self.storage, &self.backing, &self.pool, range).await {
            Ok(buffer) if is_zero(&buffer) => (CopyContent::Zero, Bytes::new()),
            Ok(buffer) if digest => (CopyContent::Digest(blake3::hash(&buffer).into()), Bytes::new()),
            Ok(buffer) => (CopyContent::Data, buffer.freeze()),
            Err(error) => {
                tracing::error!("{}", crate::words::with_causes(&error));
                (CopyContent::Failed, Bytes::new())
            }
        }
    }

    async fn digest(&self, range: ByteRange) -> Option<[u8; 32]> {
        let digest = digest(&*self.storage, &self.backing, &self.pool, range).await;
        if let Err(error) = &digest {
            tracing::error!("{}", crate::words::with_causes(error));
        }
        digest.ok()
    }

    fn submit(
        &self,
        file: &Rc<File>,
        operation: Operation,
        done: impl FnOnce(&Self, storage::Outcome) + 'static,
    ) {
        let me = self.me();
        self.storage.submit(file, operation, Box::new(move |outcome| done(&me, outcome)));
    }

    /// Keeps a failure for status, and says whether there was none.
    fn note(&self, outcome: storage::Outcome) -> bool {
        let Err(error) = outcome else { return true };
        let text = crate::words::with_causes(&error);
        let before = self.error.borrow_mut().replace(text.clone());
        // A disk that fails, fails often; the first time is the news.
        match before {
            None => tracing::error!("{text}"),
            Some(_) => tracing::debug!("{text}"),
        }
        false
    }

    fn me(&self) -> Rc<Self> {
        self.me.upgrade().expect("whoever calls holds the volume")
    }
}

impl Inner {
    fn data(&self, request: RequestId, range: ByteRange) -> Bytes {
        let pending = self.requests.get(&request).expect("a request's data is kept until its reply");
        let start = usize::try_from(range.offset - pending.offset).expect("a request fits into memory");
        pending.data.slice(start..start + usize::try_from(range.length).expect("a request fits into memory"))
    }

    /// As [`Inner::data`], for a frame that may wait long: a small part doesn't keep all of a large request in memory.
    fn frame_data(&self, request: RequestId, range: ByteRange) -> Bytes {
        let data = self.data(request, range);
        let whole = self.requests[&request].data.len();
        if data.len() < whole / PINNED_SHARE && whole > PINNED_BYTES {
            return Bytes::copy_from_slice(&data);
        }
        data
    }

    /// Hands something to the sender of a link; dropped where the link is gone.
    fn queue(&mut self, peer: HostId, queued: Queued) {
        if let Some(link) = self.links.get(&peer) {
            link.push(queued);
        }
    }

    fn end_compares(&mut self) {
        let peers: Vec<HostId> = self.compares.keys().copied().collect();
        for peer in peers {
            let result = self.tracker.take_compared(peer);
            if result.is_some() || !self.tracker.is_comparing(peer) {
                let sender = self.compares.remove(&peer).expect("it was listed");
                // Nobody waits any more when the tool was interrupted.
                drop(sender.send(result));
            }
        }
    }
}

async fn sleep_until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}
