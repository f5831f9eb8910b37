//! The primary's host: what it keeps on disk, and the shell of its tracker and sessions.

use super::disk::{Crash, Data, Disk, DiskOperation, Ended};
use super::files::{Batch, FileOperation, Files, Step, batches_of_map};
use super::link::{Channel, Packet};
use super::model::{History, Image};
use super::settings::Settings;
use super::world::{Event, World};
use blockmirror_protocol::dirty_map::DirtyMap;
use blockmirror_protocol::disk::activity_log::{self, Recovered};
use blockmirror_protocol::disk::superblock::{self, LINEAGE_LIMIT, Role, Superblock};
use blockmirror_protocol::disk::{PAGE_BYTES, dirty_map, slot_offset};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::session::resync::{CopyContent, CopyRead};
use blockmirror_protocol::session::{self, Identity, PeerError, Session};
use blockmirror_protocol::tracker::{Action, LocalWrite, RequestId, Tracker};
use blockmirror_protocol::units::{
    CopyId, GenerationId, HostId, Position, Sequence, Session as SessionNumber, Time, VolumeId,
};
use blockmirror_protocol::wire::message::{DataState, Fence, Message};
use blockmirror_protocol::wire::{Body, FrameHeader};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

/// The volume of all worlds.
pub const VOLUME: VolumeId = VolumeId([1; 16]);

#[derive(Debug)]
enum DiskWork {
    Write(Sequence, ByteRange, bool),
    Sync,
    Copy(usize, CopyRead, ByteRange),
    Digest(u64, ByteRange),
}

#[derive(Debug)]
enum FileWork {
    Log,
    Map(usize),
    Session(usize),
}

/// See the module.
#[derive(Debug)]
pub struct Primary {
    /// The backing.
    pub disk: Disk,
    /// The metadata.
    pub files: Files,
    /// The machine, while the agent runs.
    pub tracker: Option<Tracker>,
    /// How often the agent was started.
    pub life: u64,
    /// The order of writes since.
    pub history: History,
    /// Whether a start is planned.
    pub start_is_planned: bool,
    superblock: Superblock,
    serial: u64,
    disk_work: BTreeMap<DiskOperation, DiskWork>,
    file_work: BTreeMap<FileOperation, FileWork>,
    copies: BTreeMap<(usize, CopyRead), (ByteRange, Data)>,
}

/// The name of a replica.
#[must_use]
pub fn peer_of(which: usize) -> HostId {
    HostId([which as u8 + 2; 32])
}

fn which_of(peer: HostId) -> usize {
    usize::from(peer.0[0]) - 2
}

/// Stands for a digest of content.
#[must_use]
pub fn digest(range: ByteRange, data: &Data) -> [u8; 32] {
    let mut sum = range.offset ^ 0x5bd1_e995;
    for (sector, value) in data.not_zero(range) {
        sum = (sum ^ sector).wrapping_mul(0x100_0000_01b3).rotate_left(17);
        sum = (sum ^ value).wrapping_mul(0x100_0000_01b3).rotate_left(29);
    }
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&sum.to_le_bytes());
    bytes
}

impl Primary {
    /// A host whose volume is new.
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        let superblock = Superblock {
            volume: VOLUME,
            copy: CopyId([1; 16]),
            size_bytes: settings.size_bytes,
            block_size: settings.block_size,
            role: Role::Primary,
            data: DataState::Consistent,
            session: SessionNumber(0),
            fence: Fence { counter: 1, holder: HostId([1; 32]) },
            position: Position::default(),
            source: HostId::default(),
            lineage: Vec::new(),
        };
        let mut files = Files::default();
        files.write_now(superblock::FILE_NAME, slot_offset(1), &superblock.encode(1));
        Self {
            disk: Disk::new(settings.sector_bytes[0]),
            files,
            tracker: None,
            life: 0,
            history: History::default(),
            start_is_planned: false,
            superblock,
            serial: 1,
            disk_work: BTreeMap::new(),
            file_work: BTreeMap::new(),
            copies: BTreeMap::new(),
        }
    }

    /// Whether nothing is under way, and nothing is kept for longer than needed.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.disk_work.is_empty() && self.file_work.is_empty()
    }

    /// Reads that were neither sent nor dropped.
    #[must_use]
    pub fn held_copies(&self) -> usize {
        self.copies.len()
    }

    /// What the activity log's file says.
    #[must_use]
    pub fn recover_log(&self) -> Recovered {
        let bytes = self.files.bytes(activity_log::FILE_NAME, activity_log::FILE_BYTES);
        activity_log::recover(&bytes).expect("the log is no newer than this code")
    }

    /// What the file of a replica's map says.
    #[must_use]
    pub fn recover_map(&self, which: usize) -> DirtyMap {
        let Superblock { size_bytes, block_size, .. } = self.superblock;
        let fresh = DirtyMap::full(VOLUME, peer_of(which), size_bytes, block_size);
        let name = dirty_map::file_name(peer_of(which));
        let header = self.files.bytes(&name, 2 * PAGE_BYTES as u64);
        let pages = self.files.pages_from(&name, 2 * PAGE_BYTES as u64);
        DirtyMap::recover(&fresh, &header, pages).unwrap_or(fresh)
    }

    fn identity(&self) -> Identity {
        Identity {
            volume: VOLUME,
            size_bytes: self.superblock.size_bytes,
            block_size: self.superblock.block_size,
            sector_bytes: self.disk.sector_bytes() as u32,
            copy: self.superblock.copy,
            fence: self.superblock.fence,
            lineage: self.superblock.lineage.clone(),
            members: Vec::new(),
        }
    }

    fn superblock_page(&mut self) -> (u64, Box<[u8; PAGE_BYTES]>) {
        self.serial += 1;
        (slot_offset(self.serial), Box::new(self.superblock.encode(self.serial)))
    }
}

impl World {
    /// Starts the primary's agent, after ending the one that runs: metadata is recovered and a generation begins.
    pub fn start_primary(&mut self) {
        if self.primary.tracker.is_some() {
            self.crash_primary(Crash::Process);
        }
        let primary = &mut self.primary;
        primary.start_is_planned = false;
        primary.life += 1;
        let bytes = primary.files.bytes(superblock::FILE_NAME, superblock::FILE_BYTES);
        (primary.serial, primary.superblock) = Superblock::recover(&bytes).expect("a superblock is whole");
        let mut generation = [0; 16];
        generation[..8].copy_from_slice(&primary.life.to_le_bytes());
        primary.superblock.lineage.insert(0, GenerationId(generation));
        primary.superblock.lineage.truncate(LINEAGE_LIMIT);
        let (offset, page) = primary.superblock_page();
        primary.files.write_now(superblock::FILE_NAME, offset, &page);
        primary.history = History::new(primary.disk.content().clone());
        self.check_recovered();
        let primary = &mut self.primary;
        let Superblock { size_bytes, block_size, .. } = primary.superblock;
        let window = self.settings.window_bytes;
        let sessions = (0..self.replicas.len())
            .map(|which| {
                Session::new(peer_of(which), primary.recover_map(which), size_bytes, block_size, window)
            })
            .collect();
        let log = primary.recover_log();
        let lineage = primary.superblock.lineage.clone();
        primary.tracker =
            Some(Tracker::new(size_bytes, primary.disk.sector_bytes(), lineage, &log, sessions));
        let life = primary.life;
        self.note(|| format!("the primary starts its life {life}"));
        for which in 0..self.replicas.len() {
            self.plan_connect(which);
        }
    }

    /// Ends the primary's agent, or takes its host's power.
    pub fn crash_primary(&mut self, crash: Crash) {
        self.note(|| format!("the primary crashes: {crash:?}"));
        self.promises.check(&self.primary.disk);
        let primary = &mut self.primary;
        primary.tracker = None;
        primary.disk.crash(crash, &mut self.random);
        primary.files.crash(&mut self.random);
        primary.disk_work.clear();
        primary.file_work.clear();
        primary.copies.clear();
        self.promises.crash();
        if crash == Crash::Power {
            self.promises.power_was_lost(&self.primary.disk);
        }
        self.promises.check(&self.primary.disk);
        self.application.waiting.clear();
        for which in 0..self.links.len() {
            self.links[which].primary_side = None;
            self.cut(which);
        }
    }

    /// Carries out an action of the tracker.
    pub fn act_primary(&mut self, action: Action) {
        match action {
            Action::WriteLog { offset, record } => {
                let batches = VecDeque::from([vec![(offset, Some(record))]]);
                self.start_file(activity_log::FILE_NAME, batches, FileWork::Log);
            }
            Action::WriteLocal { sequence, request, range, zero, durable } => {
                let data = Data::Fill(self.content_of(request, zero.is_some()));
                self.primary.history.record(sequence, range, data.clone());
                let id = self.start_disk(DiskWork::Write(sequence, range, durable));
                self.primary.disk.write(id, range, &data, durable);
            }
            Action::SyncLocal => {
                let id = self.start_disk(DiskWork::Sync);
                self.primary.disk.sync(id);
            }
            Action::Reply { request, result } => self.replied(request, result.is_ok()),
            Action::ReadDigest { hold, range } => {
                let id = self.start_disk(DiskWork::Digest(hold, range));
                self.primary.disk.begin_read(id, range);
            }
            Action::Peer { peer, action } => self.act_session(which_of(peer), action),
        }
    }

    /// A disk operation of the primary ended.
    pub fn primary_disk_ended(&mut self, id: DiskOperation) {
        let fails = self.fails();
        let Some(ended) = self.primary.disk.end(id, fails, &mut self.random) else { return };
        let now = Time(self.now);
        let primary = &mut self.primary;
        let tracker = primary.tracker.as_mut().expect("a crash ends operations");
        match (primary.disk_work.remove(&id).expect("it is known"), ended) {
            (DiskWork::Write(sequence, range, durable), Ended::Done(good)) => {
                if !good {
                    let left = Data::Sparse(primary.disk.read(range));
                    primary.history.record(sequence, range, left);
                }
                let ended = match good {
                    true => LocalWrite::Written,
                    false if durable => LocalWrite::NotDurable,
                    false => LocalWrite::Failed,
                };
                tracker.handle_local_written(sequence, ended, now);
            }
            (DiskWork::Sync, Ended::Done(good)) => tracker.handle_synced(good, now),
            (DiskWork::Copy(which, read, range), Ended::Read(data)) => {
                let content = match &data {
                    _ if fails => CopyContent::Failed,
                    Data::Sparse(values) if values.is_empty() => CopyContent::Zero,
                    _ => CopyContent::Data,
                };
                primary.copies.insert((which, read), (range, data));
                tracker.handle_copy_read(peer_of(which), read, content, now);
            }
            (DiskWork::Digest(hold, range), Ended::Read(data)) => {
                tracker.handle_digest(hold, (!fails).then(|| digest(range, &data)), now);
            }
            (work, ended) => panic!("{work:?} ended as {ended:?}"),
        }
    }

    /// A batch of a metadata write of the primary ended.
    pub fn primary_file_ended(&mut self, id: FileOperation) {
        let fails = self.fails();
        match self.primary.files.step(id, fails, &mut self.random) {
            None => {}
            Some(Step::More) => {
                let delay = self.random.up_to(self.settings.disk_delay[0]);
                self.plan(delay, Event::PrimaryFile(id));
            }
            Some(Step::Done(good)) => {
                let now = Time(self.now);
                let tracker = self.primary.tracker.as_mut().expect("a crash ends operations");
                match self.primary.file_work.remove(&id).expect("it is known") {
                    FileWork::Log => tracker.handle_log_written(good, now),
                    FileWork::Map(which) => tracker.handle_map_written(peer_of(which), good, now),
                    FileWork::Session(which) => self.session_recorded(which, good),
                }
            }
        }
    }

    /// The primary receives a control message.
    pub fn primary_receives(&mut self, which: usize, packet: Packet) {
        let Packet::Message(bytes) = packet else { panic!("the primary receives no frames") };
        let message = Message::decode(&bytes[4..]).expect("a message reads back");
        self.note(|| format!("primary <- {which}: {message:?}"));
        let now = Time(self.now);
        let Some(tracker) = &mut self.primary.tracker else { return };
        match tracker.handle_message(peer_of(which), message, now) {
            Ok(()) => {}
            Err(PeerError::Refused(_)) => self.cut(which),
            Err(error) => panic!("replica {which}: {error}"),
        }
    }

    /// The primary finds out that a connection is gone.
    pub fn primary_lost(&mut self, which: usize, connection: u64) {
        if self.links[which].primary_side != Some(connection) {
            return;
        }
        self.note(|| format!("the primary lost {which}"));
        self.links[which].primary_side = None;
        let now = Time(self.now);
        if let Some(tracker) = &mut self.primary.tracker {
            tracker.handle_disconnected(peer_of(which), now);
            self.plan_connect(which);
        }
    }

    /// The primary tries to connect: first the session's number is made durable.
    pub fn connect(&mut self, which: usize, life: u64) {
        let primary = &mut self.primary;
        if life != primary.life || primary.tracker.is_none() || self.links[which].primary_side.is_some() {
            return;
        }
        let is_busy = primary.file_work.values().any(|work| matches!(work, FileWork::Session(_)));
        if is_busy || self.replicas[which].machine.is_none() {
            return self.plan_connect(which);
        }
        primary.superblock.session = primary.superblock.session.next();
        let (offset, page) = primary.superblock_page();
        let batches = VecDeque::from([vec![(offset, Some(page))]]);
        self.start_file(superblock::FILE_NAME, batches, FileWork::Session(which));
    }

    fn plan_connect(&mut self, which: usize) {
        let delay = self.random.up_to(Duration::from_secs(1));
        self.plan(delay, Event::Connect(which, self.primary.life));
    }

    fn session_recorded(&mut self, which: usize, good: bool) {
        if !good || self.replicas[which].machine.is_none() {
            return self.plan_connect(which);
        }
        self.links[which].open();
        let session = self.primary.superblock.session;
        let rewritten = self.application.written_bytes - self.promises.open_bytes(self.settings.block_size);
        self.replicas[which].linked(session, rewritten);
        let identity = self.primary.identity();
        let now = Time(self.now);
        let tracker = self.primary.tracker.as_mut().expect("a crash ends operations");
        tracker.handle_connected(peer_of(which), session, &identity, now);
    }

    fn act_session(&mut self, which: usize, action: session::Action) {
        match action {
            session::Action::Send(message) => {
                self.note(|| format!("primary -> {which}: {message:?}"));
                match &message {
                    Message::Commit(commit) => {
                        let position = commit.position;
                        let content = self.primary.history.content_at(position.sequence);
                        self.replicas[which].commit_is_sent(position, |frames| Image::new(content, frames));
                    }
                    Message::ResyncBegin(begin) => {
                        self.replicas[which].resync_is_announced(begin.dirty_bytes)
                    }
                    _ => {}
                }
                self.send(which, Channel::ToReplica, Packet::Message(message.encode()));
            }
            session::Action::SendFrame { header, request } => {
                let data = Data::Fill(request.map_or(0, |request| self.content_of(request, false)));
                if let Body::Write { epoch, sequence, range } | Body::Zero { epoch, sequence, range, .. } =
                    header.body
                {
                    self.primary.history.record(sequence, range, data.clone());
                    self.replicas[which].frame_is_sent(epoch, sequence, range, &data);
                }
                self.send_frame(which, Channel::Live, header, data);
            }
            session::Action::WriteMap(changes) => {
                let name = dirty_map::file_name(peer_of(which));
                self.start_file(&name, batches_of_map(changes), FileWork::Map(which));
            }
            session::Action::ReadCopy { read, range } => {
                let id = self.start_disk(DiskWork::Copy(which, read, range));
                self.primary.disk.begin_read(id, range);
            }
            session::Action::SendCopy { read, header } => self.send_copy(which, read, header),
            session::Action::Hold { .. } => panic!("the tracker carries out holds itself"),
        }
    }

    fn send_copy(&mut self, which: usize, read: CopyRead, header: Option<FrameHeader>) {
        let (range, data) = self.primary.copies.remove(&(which, read)).expect("the read has ended");
        let Some(header) = header else { return };
        assert_eq!(header.body.range(), range, "a copy is of what was read");
        if self.links[which].is_up {
            self.replicas[which].copied_bytes += range.length;
            self.check_copied(which);
        }
        self.send_frame(which, Channel::Bulk, header, data);
    }

    fn send_frame(&mut self, which: usize, channel: Channel, header: FrameHeader, data: Data) {
        self.note(|| format!("primary => {which}: {:?}", header.body));
        if header.body.payload_bytes() == 0 {
            let frame = FrameHeader::decode(&header.encode(&[])).and_then(|frame| frame.check(&[]));
            assert_eq!(frame, Ok(header), "a frame reads back");
        }
        self.send(which, channel, Packet::Frame(header, data));
    }

    /// Sends a packet over a link.
    pub fn send(&mut self, which: usize, channel: Channel, packet: Packet) {
        let (now, delay) = (self.now, self.settings.link_delay);
        let link = &mut self.links[which];
        if let Some(at) = link.send(channel, packet, now, delay, &mut self.random) {
            let connection = link.connection;
            self.plan_at(at, Event::Arrival(which, connection, channel));
        }
    }

    fn content_of(&self, request: RequestId, is_zero: bool) -> u64 {
        let value = self.promises.value(request).expect("a request's data is needed only until its reply");
        if is_zero { 0 } else { value }
    }

    fn start_disk(&mut self, work: DiskWork) -> DiskOperation {
        let id = DiskOperation(self.next_operation());
        let longer = if matches!(work, DiskWork::Sync) { self.settings.sync_delay } else { Duration::ZERO };
        self.primary.disk_work.insert(id, work);
        let delay = self.random.up_to(self.settings.disk_delay[0] + longer);
        self.plan(delay, Event::PrimaryDisk(id));
        id
    }

    fn start_file(&mut self, name: &str, batches: VecDeque<Batch>, work: FileWork) {
        let id = FileOperation(self.next_operation());
        self.primary.files.write(id, name, batches);
        self.primary.file_work.insert(id, work);
        let delay = self.random.up_to(self.settings.disk_delay[0]);
        self.plan(delay, Event::PrimaryFile(id));
    }
}
