//! The shell of a replica: its machine, the payloads that wait, and what is under way on the disk and in the files.

use super::disk::{Data, DiskOperation, Ended};
use super::files::{Batch, FileOperation};
use super::host::{Host, Shell, VOLUME};
use super::links::{Channel, LinkId, Packet};
use super::primary::digest;
use super::world::World;
use blockmirror_protocol::disk::{marker, slot_offset, superblock};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::replica::{self, Action, FrameId, Replica, StateChange};
use blockmirror_protocol::wire::FrameHeader;
use blockmirror_protocol::wire::message::Message;
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
pub struct ReplicaShell {
    /// The machine.
    pub machine: Replica,
    /// The link whose greeting was taken last.
    speaker: Option<LinkId>,
    marker_serial: u64,
    payloads: BTreeMap<FrameId, Data>,
    disk_work: BTreeMap<DiskOperation, DiskWork>,
    file_work: BTreeMap<FileOperation, FileWork>,
}

impl ReplicaShell {
    /// A replica as the files of its host say.
    fn recover(host: &Host, window_bytes: u64) -> Self {
        let bytes = host.files.bytes(marker::FILE_NAME, marker::FILE_BYTES);
        let (marker_serial, position) = marker::recover(&bytes).unwrap_or_default();
        let superblock = &host.superblock;
        let settings = replica::Settings {
            volume: VOLUME,
            copy: superblock.copy,
            size_bytes: superblock.size_bytes,
            block_size: superblock.block_size,
            sector_bytes: host.disk.sector_bytes() as u32,
            window_bytes,
        };
        let lineage = superblock.lineage.clone();
        Self {
            machine: Replica::new(settings, superblock.data, position, superblock.fence, lineage),
            speaker: None,
            marker_serial,
            payloads: BTreeMap::new(),
            disk_work: BTreeMap::new(),
            file_work: BTreeMap::new(),
        }
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
}

impl World {
    /// Opens a host's volume as a replica.
    pub(super) fn start_replica(&mut self, host: usize) {
        let it = &mut self.hosts[host];
        it.mirror.recovered(it.superblock.data, it.superblock.position);
        it.shell = Shell::Replica(Box::new(ReplicaShell::recover(it, self.settings.window_bytes)));
    }

    /// A host receives what is sent to it as a listener.
    pub(super) fn listener_receives(&mut self, link: LinkId, packet: Packet) {
        match packet {
            Packet::Message(bytes) => {
                let message = Message::decode(&bytes[4..]).expect("a message reads back");
                self.listener_hears(link, message);
            }
            Packet::Frame(header, data) => self.listener_takes(link, header, data),
        }
    }

    fn listener_hears(&mut self, link: LinkId, message: Message) {
        let Shell::Replica(shell) = &mut self.hosts[link.listener].shell else { return self.cut(link) };
        if let Message::Hello(hello) = &message {
            if let Some(refused) = shell.machine.objection(hello) {
                // The session that is open goes on.
                let refused = Message::from(refused);
                return self.send(link, Channel::ToDialler, Packet::Message(refused.encode()));
            }
            let before = shell.speaker.replace(link).filter(|before| *before != link);
            self.links[link].listener_side = Some(self.links[link].connection);
            if let Some(before) = before {
                self.links[before].listener_side = None;
                self.cut(before);
            }
        }
        if self.is_served(link) {
            let machine = self.machine_mut(link.listener);
            let result = machine.handle_message(message);
            self.end_if_refused(link, result);
        }
    }

    fn listener_takes(&mut self, link: LinkId, header: FrameHeader, data: Data) {
        if self.is_served(link) {
            let result = self.take_frame(link.listener, header, data);
            self.end_if_refused(link, result);
        }
    }

    /// A frame of a connection that was cut comes out of some buffer after its session: nothing of it may be written
    /// (R1).
    pub(super) fn stray(&mut self, link: LinkId, header: FrameHeader, data: Data) {
        let Shell::Replica(shell) = &self.hosts[link.listener].shell else { return };
        if shell.machine.session() != Some(header.session) {
            self.note(|| format!("{link} astray: {:?}", header.body));
            let result = self.take_frame(link.listener, header, data);
            assert_eq!(result, Ok(()), "a frame of an old session is nobody's mistake");
        }
    }

    fn take_frame(
        &mut self,
        host: usize,
        header: FrameHeader,
        data: Data,
    ) -> Result<(), replica::PrimaryMisbehaved> {
        let frame = FrameId(self.next_operation());
        let shell = self.replica_shell(host);
        shell.payloads.insert(frame, data);
        shell.machine.handle_frame(frame, header)
    }

    /// Whether a link's connection is the one that its listener serves.
    fn is_served(&self, id: LinkId) -> bool {
        let link = &self.links[id];
        matches!(self.hosts[id.listener].shell, Shell::Replica(_))
            && link.listener_side == Some(link.connection)
    }

    fn machine_mut(&mut self, host: usize) -> &mut Replica {
        let Shell::Replica(shell) = &mut self.hosts[host].shell else { panic!("the host is a replica") };
        &mut shell.machine
    }

    fn end_if_refused(&mut self, link: LinkId, result: Result<(), replica::PrimaryMisbehaved>) {
        if let Err(error) = result {
            assert!(self.hosts[link.listener].has_failed(), "host {}: {error}", link.listener);
            self.cut(link);
        }
    }

    /// Carries out an action of a replica.
    pub(super) fn act_replica(&mut self, host: usize, action: Action) {
        self.note(|| format!("host {host}: {action:?}"));
        match action {
            Action::Apply { frame, range, zero } => {
                let id = self.start_replica_disk(host, DiskWork::Apply(frame));
                let it = &mut self.hosts[host];
                let Shell::Replica(shell) = &it.shell else { panic!("the host is a replica") };
                let data = if zero.is_some() { &Data::Fill(0) } else { &shell.payloads[&frame] };
                it.disk.write(id, range, data, false);
            }
            Action::Drop(frame) => {
                let payload = self.replica_shell(host).payloads.remove(&frame);
                payload.expect("a payload is dropped once");
            }
            Action::Sync => {
                let id = self.start_replica_disk(host, DiskWork::Sync);
                self.hosts[host].disk.sync(id);
            }
            Action::WriteMarker(position) => {
                let shell = self.replica_shell(host);
                shell.marker_serial += 1;
                let serial = shell.marker_serial;
                let page = Box::new(marker::encode(position, serial));
                let batches = VecDeque::from([vec![(slot_offset(serial), Some(page))]]);
                self.start_replica_file(host, marker::FILE_NAME, batches, FileWork::Marker);
            }
            Action::WriteState(change) => self.write_state(host, change),
            Action::ReadDigest { frame, range } => {
                let id = self.start_replica_disk(host, DiskWork::Digest(frame, range));
                self.hosts[host].disk.begin_read(id, range);
            }
            Action::Send(message) => self.answer(host, &message),
        }
    }

    fn write_state(&mut self, host: usize, change: StateChange) {
        let superblock = &mut self.hosts[host].superblock;
        superblock.data = change.data;
        if let Some(position) = change.position {
            superblock.position = position;
        }
        if let Some(lineage) = &change.lineage {
            superblock.lineage.clone_from(lineage);
        }
        let batches = self.hosts[host].superblock_batches();
        self.start_replica_file(host, superblock::FILE_NAME, batches, FileWork::State(change));
    }

    /// What a replica's machine says goes back on the connection that it serves, or nowhere.
    fn answer(&mut self, host: usize, message: &Message) {
        let Some(speaker) = self.replica_shell(host).speaker else { return };
        let served = self.links[speaker].listener_side;
        let mirror = &mut self.hosts[host].mirror;
        match message {
            Message::Welcome(_) => mirror.session_begins(served.unwrap_or_default()),
            Message::Acknowledgement(acknowledgement) => mirror.acknowledged(acknowledgement.durable),
            _ => {}
        }
        if served == Some(self.links[speaker].connection) {
            self.send(speaker, Channel::ToDialler, Packet::Message(message.encode()));
        }
    }

    /// A disk operation of a replica ended.
    pub(super) fn replica_disk_ended(&mut self, host: usize, id: DiskOperation, ended: Ended, fails: bool) {
        let shell = self.replica_shell(host);
        match (shell.disk_work.remove(&id).expect("it is known"), ended) {
            (DiskWork::Apply(frame), Ended::Done(good)) => {
                shell.payloads.remove(&frame).expect("it was written");
                shell.machine.handle_applied(frame, good);
            }
            (DiskWork::Sync, Ended::Done(good)) => shell.machine.handle_synced(good),
            (DiskWork::Digest(frame, range), Ended::Read(data)) => {
                shell.payloads.remove(&frame).expect("it was asked for");
                shell.machine.handle_digest(frame, (!fails).then(|| digest(range, &data)));
            }
            (work, ended) => panic!("{work:?} ended as {ended:?}"),
        }
    }

    /// A metadata write of a replica ended.
    pub(super) fn replica_file_ended(&mut self, host: usize, id: FileOperation, good: bool) {
        let it = &mut self.hosts[host];
        let Shell::Replica(shell) = &mut it.shell else { panic!("the host is a replica") };
        match shell.file_work.remove(&id).expect("it is known") {
            FileWork::Marker => shell.machine.handle_marker_written(good),
            FileWork::State(change) => {
                shell.machine.handle_state_written(good);
                if good {
                    it.superblock_written();
                    it.mirror.state_is_durable(&change);
                }
            }
        }
    }

    fn replica_shell(&mut self, host: usize) -> &mut ReplicaShell {
        match &mut self.hosts[host].shell {
            Shell::Replica(shell) => shell,
            Shell::Down | Shell::Primary(_) => panic!("the host is a replica"),
        }
    }

    fn start_replica_disk(&mut self, host: usize, work: DiskWork) -> DiskOperation {
        let id = DiskOperation(self.next_operation());
        self.replica_shell(host).disk_work.insert(id, work);
        self.plan_disk(host, id, Duration::ZERO);
        id
    }

    fn start_replica_file(&mut self, host: usize, name: &str, batches: VecDeque<Batch>, work: FileWork) {
        let id = FileOperation(self.next_operation());
        self.hosts[host].files.write(id, name, batches);
        self.replica_shell(host).file_work.insert(id, work);
        self.plan_file(host, id);
    }
}
