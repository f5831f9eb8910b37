//! A replica's host: what it keeps on disk, and the shell of its machine.

use super::disk::{Crash, Data, Disk, DiskOperation, Ended};
use super::files::{FileOperation, Files, Step};
use super::link::{Channel, Packet};
use super::model::{EpochKey, Image, SentFrame};
use super::primary::{VOLUME, digest, peer_of};
use super::settings::Settings;
use super::world::{Event, World};
use blockmirror_protocol::disk::superblock::{self, Role, Superblock};
use blockmirror_protocol::disk::{marker, slot_offset};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::replica::{self, Action, FrameId, Replica, StateChange};
use blockmirror_protocol::units::{CopyId, Epoch, HostId, Position, Sequence, Session as SessionNumber};
use blockmirror_protocol::wire::message::{DataState, Fence, Message};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

#[derive(Debug)]
enum DiskWork {
    Apply(FrameId),
    Sync,
    Digest(FrameId, ByteRange),
}

#[derive(Debug)]
enum FileWork {
    Marker,
    State(StateChange),
}

/// See the module.
#[derive(Debug)]
pub struct ReplicaHost {
    /// Which one it is.
    pub which: usize,
    /// The backing.
    pub disk: Disk,
    /// The metadata.
    pub files: Files,
    /// The machine, while the agent runs.
    pub machine: Option<Replica>,
    /// What the superblock says durably, as far as the agent knows.
    pub data: DataState,
    /// This copy.
    pub copy: CopyId,
    /// What the disk may hold, while the data are consistent.
    pub image: Option<Image>,
    /// Bytes of copies that were sent in this session.
    pub copied_bytes: u64,
    /// Bytes that were dirty when the session's first resync began, and the application's bytes before the session.
    pub dirty_at_link: (Option<u64>, u64),
    /// Whether a start is planned.
    pub start_is_planned: bool,
    pending: Option<(Position, Image)>,
    sent: Vec<SentFrame>,
    session: SessionNumber,
    last_durable: EpochKey,
    last_sent: Option<Sequence>,
    skips_are_announced: bool,
    superblock: Superblock,
    serial: u64,
    marker_serial: u64,
    next_frame: u64,
    payloads: BTreeMap<FrameId, Data>,
    disk_work: BTreeMap<DiskOperation, DiskWork>,
    file_work: BTreeMap<FileOperation, FileWork>,
    size_bytes: u64,
    window_bytes: u64,
}

impl ReplicaHost {
    /// A host that has just joined; `host` counts from 1.
    #[must_use]
    pub fn new(settings: &Settings, host: usize) -> Self {
        let superblock = Superblock {
            volume: VOLUME,
            copy: CopyId([host as u8 + 1; 16]),
            size_bytes: settings.size_bytes,
            block_size: settings.block_size,
            role: Role::Replica,
            data: DataState::Empty,
            session: SessionNumber(0),
            fence: Fence::default(),
            position: Position::default(),
            source: HostId([1; 32]),
            lineage: Vec::new(),
        };
        let mut host = Self {
            which: host - 1,
            disk: Disk::new(settings.sector_bytes[host]),
            files: Files::default(),
            machine: None,
            data: DataState::Empty,
            copy: superblock.copy,
            image: None,
            copied_bytes: 0,
            dirty_at_link: (None, 0),
            start_is_planned: false,
            pending: None,
            sent: Vec::new(),
            session: SessionNumber(0),
            last_durable: (0, 0),
            last_sent: None,
            skips_are_announced: true,
            superblock,
            serial: 0,
            marker_serial: 0,
            next_frame: 0,
            payloads: BTreeMap::new(),
            disk_work: BTreeMap::new(),
            file_work: BTreeMap::new(),
            size_bytes: settings.size_bytes,
            window_bytes: settings.window_bytes,
        };
        host.record_superblock_now();
        host
    }

    /// Whether nothing is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.disk_work.is_empty() && self.file_work.is_empty()
    }

    /// Payloads that are neither dropped nor written.
    #[must_use]
    pub fn held_payloads(&self) -> usize {
        self.payloads.len()
    }

    /// A session begins, when the application has written so many bytes.
    pub fn linked(&mut self, session: SessionNumber, written_bytes: u64) {
        self.session = session;
        self.copied_bytes = 0;
        self.dirty_at_link = (None, written_bytes);
        self.sent.clear();
        self.last_sent = None;
        self.skips_are_announced = false;
    }

    /// The primary announces a resync.
    pub fn resync_is_announced(&mut self, dirty_bytes: u64) {
        self.dirty_at_link.0.get_or_insert(dirty_bytes);
        self.skips_are_announced = true;
    }

    /// The primary sends a live frame.
    ///
    /// # Panics
    /// When writes were left out before it and the replica still counts as consistent (W3).
    pub fn frame_is_sent(&mut self, epoch: Epoch, sequence: Sequence, range: ByteRange, data: &Data) {
        if let Some(last) = self.last_sent.filter(|_| !self.skips_are_announced) {
            assert!(
                sequence <= last.next(),
                "W3: the stream leaves out writes between {last} and {sequence}"
            );
        }
        self.last_sent = Some(sequence);
        let frame: SentFrame = ((self.session.0, epoch.0), range, data.clone());
        for image in self.image.iter_mut().chain(self.pending.iter_mut().map(|(_, image)| image)) {
            image.sent(frame.clone());
        }
        self.sent.push(frame);
    }

    /// The primary sends a commit.
    pub fn commit_is_sent(&mut self, position: Position, image: impl FnOnce(Vec<SentFrame>) -> Image) {
        self.sent.retain(|((_, epoch), ..)| *epoch > position.epoch.0);
        let mut image = image(self.sent.clone());
        image.durable(self.last_durable);
        self.pending = Some((position, image));
        self.last_sent = None;
        self.skips_are_announced = false;
    }

    fn durable(&mut self, session: SessionNumber, epoch: Epoch) {
        let images = self.image.iter_mut().chain(self.pending.iter_mut().map(|(_, image)| image));
        images.for_each(|image| image.durable((session.0, epoch.0)));
        self.last_durable = (session.0, epoch.0);
    }

    fn state_is_durable(&mut self, change: &StateChange) {
        self.data = change.data;
        match change.data {
            DataState::Consistent => self.commit_is_durable(change.position),
            DataState::Inconsistent | DataState::Empty => self.image = None,
        }
    }

    fn commit_is_durable(&mut self, position: Option<Position>) {
        if let Some((_, image)) = self.pending.take_if(|(pending, _)| Some(*pending) == position) {
            self.image = Some(image);
        }
    }

    fn record_superblock_now(&mut self) {
        self.serial += 1;
        self.files.write_now(
            superblock::FILE_NAME,
            slot_offset(self.serial),
            &self.superblock.encode(self.serial),
        );
    }

    fn recover(&mut self) -> Replica {
        let bytes = self.files.bytes(superblock::FILE_NAME, superblock::FILE_BYTES);
        (self.serial, self.superblock) = Superblock::recover(&bytes).expect("a superblock is whole");
        self.data = self.superblock.data;
        match self.data {
            DataState::Consistent => self.commit_is_durable(Some(self.superblock.position)),
            DataState::Inconsistent | DataState::Empty => self.image = None,
        }
        assert_eq!(
            self.image.is_some(),
            self.data == DataState::Consistent,
            "the data state is what was recorded"
        );
        let bytes = self.files.bytes(marker::FILE_NAME, marker::FILE_BYTES);
        let (serial, position) = marker::recover(&bytes).unwrap_or_default();
        self.marker_serial = serial;
        let settings = replica::Settings {
            volume: VOLUME,
            copy: self.copy,
            size_bytes: self.size_bytes,
            block_size: self.superblock.block_size,
            sector_bytes: self.disk.sector_bytes() as u32,
            window_bytes: self.window_bytes,
        };
        Replica::new(settings, self.data, position, self.superblock.fence, self.superblock.lineage.clone())
    }
}

impl World {
    /// Starts a replica's agent, after ending the one that runs.
    pub fn start_replica(&mut self, which: usize) {
        if self.replicas[which].machine.is_some() {
            self.crash_replica(which, Crash::Process);
        }
        self.note(|| format!("replica {which} starts"));
        let host = &mut self.replicas[which];
        host.start_is_planned = false;
        host.machine = Some(host.recover());
    }

    /// Ends a replica's agent, or takes its host's power.
    pub fn crash_replica(&mut self, which: usize, crash: Crash) {
        self.note(|| format!("replica {which} crashes: {crash:?}"));
        self.check_image(which);
        let host = &mut self.replicas[which];
        host.machine = None;
        host.disk.crash(crash, &mut self.random);
        host.files.crash(&mut self.random);
        host.disk_work.clear();
        host.file_work.clear();
        host.payloads.clear();
        self.links[which].replica_side = None;
        self.cut(which);
        self.check_image(which);
    }

    /// A replica is thrown away, and another one joins in its place.
    pub fn replace_replica(&mut self, which: usize) {
        self.crash_replica(which, Crash::Power);
        self.note(|| format!("replica {which} is replaced"));
        let fresh = ReplicaHost::new(&self.settings, which + 1);
        let number = self.next_operation();
        let host = &mut self.replicas[which];
        *host = ReplicaHost { copy: CopyId([number as u8; 16]), next_frame: host.next_frame, ..fresh };
        host.copy.0[..8].copy_from_slice(&number.to_be_bytes());
        host.superblock.copy = host.copy;
        host.record_superblock_now();
        self.start_replica(which);
    }

    /// A replica receives a packet on a connection.
    pub fn replica_receives(&mut self, which: usize, connection: u64, packet: Packet) {
        let host = &mut self.replicas[which];
        let Some(machine) = &mut host.machine else { return };
        let result = match packet {
            Packet::Message(bytes) => {
                let message = Message::decode(&bytes[4..]).expect("a message reads back");
                if matches!(message, Message::Hello(_)) {
                    self.links[which].replica_side = Some(connection);
                }
                machine.handle_message(message)
            }
            Packet::Frame(header, data) => {
                host.next_frame += 1;
                let frame = FrameId(host.next_frame);
                host.payloads.insert(frame, data);
                machine.handle_frame(frame, header)
            }
        };
        if let Err(error) = result {
            assert!(machine.has_failed(), "replica {which}: {error}");
            self.cut(which);
        }
    }

    /// A replica finds out that a connection is gone.
    pub fn replica_lost(&mut self, which: usize, connection: u64) {
        let link = &mut self.links[which];
        if link.replica_side == Some(connection) {
            link.replica_side = None;
            if let Some(machine) = &mut self.replicas[which].machine {
                machine.handle_disconnected();
            }
        }
    }

    /// Carries out an action of a replica.
    pub fn act_replica(&mut self, which: usize, action: Action) {
        self.note(|| format!("replica {which}: {action:?}"));
        match action {
            Action::Apply { frame, range, zero } => {
                let id = self.start_replica_disk(which, DiskWork::Apply(frame));
                let host = &mut self.replicas[which];
                let data = if zero.is_some() { &Data::Fill(0) } else { &host.payloads[&frame] };
                host.disk.write(id, range, data, false);
            }
            Action::Drop(frame) => {
                self.replicas[which].payloads.remove(&frame).expect("a payload is dropped once");
            }
            Action::Sync => {
                let id = self.start_replica_disk(which, DiskWork::Sync);
                self.replicas[which].disk.sync(id);
            }
            Action::WriteMarker(position) => {
                let host = &mut self.replicas[which];
                host.marker_serial += 1;
                let page = Box::new(marker::encode(position, host.marker_serial));
                let offset = slot_offset(host.marker_serial);
                self.start_replica_file(which, marker::FILE_NAME, (offset, page), FileWork::Marker);
            }
            Action::WriteState(change) => {
                let host = &mut self.replicas[which];
                host.superblock.data = change.data;
                if let Some(position) = change.position {
                    host.superblock.position = position;
                }
                if let Some(lineage) = &change.lineage {
                    host.superblock.lineage.clone_from(lineage);
                }
                host.serial += 1;
                let page = (slot_offset(host.serial), Box::new(host.superblock.encode(host.serial)));
                self.start_replica_file(which, superblock::FILE_NAME, page, FileWork::State(change));
            }
            Action::ReadDigest { frame, range } => {
                let id = self.start_replica_disk(which, DiskWork::Digest(frame, range));
                self.replicas[which].disk.begin_read(id, range);
            }
            Action::Send(message) => {
                if let Message::Acknowledgement(acknowledgement) = &message {
                    self.replicas[which].durable(acknowledgement.session, acknowledgement.durable);
                }
                // What the machine says of a session goes back on that session's connection, or nowhere.
                let link = &self.links[which];
                if link.replica_side == Some(link.connection) {
                    self.send(which, Channel::ToPrimary, Packet::Message(message.encode()));
                }
            }
        }
    }

    /// A disk operation of a replica ended.
    pub fn replica_disk_ended(&mut self, which: usize, id: DiskOperation) {
        let fails = self.fails();
        let host = &mut self.replicas[which];
        let Some(ended) = host.disk.end(id, fails, &mut self.random) else { return };
        let machine = host.machine.as_mut().expect("a crash ends operations");
        match (host.disk_work.remove(&id).expect("it is known"), ended) {
            (DiskWork::Apply(frame), Ended::Done(good)) => {
                host.payloads.remove(&frame).expect("it was written");
                machine.handle_applied(frame, good);
            }
            (DiskWork::Sync, Ended::Done(good)) => machine.handle_synced(good),
            (DiskWork::Digest(frame, range), Ended::Read(data)) => {
                host.payloads.remove(&frame).expect("it was asked for");
                machine.handle_digest(frame, (!fails).then(|| digest(range, &data)));
            }
            (work, ended) => panic!("{work:?} ended as {ended:?}"),
        }
    }

    /// A metadata write of a replica ended.
    pub fn replica_file_ended(&mut self, which: usize, id: FileOperation) {
        let fails = self.fails();
        let host = &mut self.replicas[which];
        let Some(Step::Done(good)) = host.files.step(id, fails, &mut self.random) else { return };
        let machine = host.machine.as_mut().expect("a crash ends operations");
        match host.file_work.remove(&id).expect("it is known") {
            FileWork::Marker => machine.handle_marker_written(good),
            FileWork::State(change) => {
                machine.handle_state_written(good);
                if good {
                    host.state_is_durable(&change);
                }
            }
        }
    }

    /// The name of a replica.
    #[must_use]
    pub fn peer(&self, which: usize) -> HostId {
        peer_of(which)
    }

    fn start_replica_disk(&mut self, which: usize, work: DiskWork) -> DiskOperation {
        let id = DiskOperation(self.next_operation());
        self.replicas[which].disk_work.insert(id, work);
        self.plan_replica(which, Event::ReplicaDisk(which, id));
        id
    }

    fn start_replica_file(
        &mut self,
        which: usize,
        name: &str,
        (offset, page): (u64, Box<blockmirror_protocol::disk::Page>),
        work: FileWork,
    ) {
        let id = FileOperation(self.next_operation());
        let host = &mut self.replicas[which];
        host.files.write(id, name, VecDeque::from([vec![(offset, Some(page))]]));
        host.file_work.insert(id, work);
        self.plan_replica(which, Event::ReplicaFile(which, id));
    }

    fn plan_replica(&mut self, which: usize, event: Event) {
        let longest: Duration = self.settings.disk_delay[which + 1];
        let delay = self.random.up_to(longest);
        self.plan(delay, event);
    }
}
