//! The shell of a primary: its tracker, and what the tracker has under way on the disk and in the files.

use super::disk::{Data, DiskOperation, Ended};
use super::files::{Batch, FileOperation};
use super::history::History;
use super::host::{Shell, VOLUME, host_id, host_number};
use super::links::LinkId;
use super::world::World;
use blockmirror_protocol::disk::activity_log;
use blockmirror_protocol::disk::superblock::{self, LINEAGE_LIMIT, Superblock};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::session::resync::{CopyContent, CopyRead};
use blockmirror_protocol::session::{Identity, Session};
use blockmirror_protocol::tracker::{Action, LocalWrite, RequestId, Tracker};
use blockmirror_protocol::units::{GenerationId, Sequence, Time};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

#[derive(Debug)]
pub(super) enum DiskWork {
    Write(Sequence, ByteRange, bool),
    Sync,
    Copy(usize, CopyRead, ByteRange),
    Digest(u64, ByteRange),
}

#[derive(Debug)]
pub(super) enum FileWork {
    Log,
    Map(usize),
    Session(LinkId),
}

/// See the module.
#[derive(Debug)]
pub struct PrimaryShell {
    /// The machine.
    pub tracker: Tracker,
    /// What was read for copies to each host, and neither sent nor dropped yet.
    pub(super) copies: BTreeMap<(usize, CopyRead), (ByteRange, Data)>,
    disk_work: BTreeMap<DiskOperation, DiskWork>,
    file_work: BTreeMap<FileOperation, FileWork>,
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

impl PrimaryShell {
    /// Whether nothing is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.disk_work.is_empty() && self.file_work.is_empty()
    }

    /// Reads that were neither sent nor dropped.
    #[must_use]
    pub fn held_copies(&self) -> usize {
        self.copies.len()
    }

    /// Whether a session's number is being recorded.
    pub(super) fn is_connecting(&self) -> bool {
        self.file_work.values().any(|work| matches!(work, FileWork::Session(_)))
    }
}

impl World {
    /// Opens a host's volume as primary: metadata is recovered and a generation begins.
    pub(super) fn start_primary(&mut self, host: usize) {
        let peers: Vec<usize> = (0..self.hosts.len()).filter(|peer| *peer != host).collect();
        let it = &mut self.hosts[host];
        let mut generation = [0; 16];
        generation[..8].copy_from_slice(&it.life.to_le_bytes());
        generation[15] = host as u8;
        it.superblock.lineage.insert(0, GenerationId(generation));
        it.superblock.lineage.truncate(LINEAGE_LIMIT);
        it.write_superblock_now();
        it.history = History::new(it.disk.content().clone());
        self.check_recovered(host);
        let it = &mut self.hosts[host];
        let Superblock { size_bytes, block_size, .. } = it.superblock;
        let window = self.settings.window_bytes;
        let session_of =
            |peer| Session::new(host_id(peer), it.recover_map(peer), size_bytes, block_size, window);
        let sessions = peers.into_iter().map(session_of).collect();
        let (log, lineage) = (it.recover_log(), it.superblock.lineage.clone());
        it.shell = Shell::Primary(Box::new(PrimaryShell {
            tracker: Tracker::new(size_bytes, it.disk.sector_bytes(), lineage, &log, sessions),
            copies: BTreeMap::new(),
            disk_work: BTreeMap::new(),
            file_work: BTreeMap::new(),
        }));
        for link in self.links.of_dialler(host) {
            self.plan_connect(link);
        }
        self.plan_request(host);
    }

    /// What a primary says of itself.
    pub(super) fn identity(&self, host: usize) -> Identity {
        let it = &self.hosts[host];
        Identity {
            volume: VOLUME,
            size_bytes: it.superblock.size_bytes,
            block_size: it.superblock.block_size,
            sector_bytes: it.disk.sector_bytes() as u32,
            copy: it.superblock.copy,
            fence: it.superblock.fence,
            lineage: it.superblock.lineage.clone(),
            members: Vec::new(),
        }
    }

    /// Carries out an action of a tracker.
    pub(super) fn act_primary(&mut self, host: usize, action: Action) {
        match action {
            Action::WriteLog { offset, record } => {
                let batches = VecDeque::from([vec![(offset, Some(record))]]);
                self.start_primary_file(host, activity_log::FILE_NAME, batches, FileWork::Log);
            }
            Action::WriteLocal { sequence, request, range, zero, durable } => {
                let data = Data::Fill(self.content_of(host, request, zero.is_some()));
                self.hosts[host].history.record(sequence, range, data.clone());
                let id = self.start_primary_disk(host, DiskWork::Write(sequence, range, durable));
                self.hosts[host].disk.write(id, range, &data, durable);
            }
            Action::SyncLocal => {
                let id = self.start_primary_disk(host, DiskWork::Sync);
                self.hosts[host].disk.sync(id);
            }
            Action::Reply { request, result } => self.replied(host, request, result.is_ok()),
            Action::ReadDigest { hold, range } => {
                let id = self.start_primary_disk(host, DiskWork::Digest(hold, range));
                self.hosts[host].disk.begin_read(id, range);
            }
            Action::Peer { peer, action } => self.act_session(LinkId::new(host, host_number(peer)), action),
        }
    }

    /// A disk operation of a primary ended.
    pub(super) fn primary_disk_ended(&mut self, host: usize, id: DiskOperation, ended: Ended, fails: bool) {
        let now = Time(self.now);
        let it = &mut self.hosts[host];
        let Shell::Primary(shell) = &mut it.shell else { panic!("the host is primary") };
        let tracker = &mut shell.tracker;
        match (shell.disk_work.remove(&id).expect("it is known"), ended) {
            (DiskWork::Write(sequence, range, durable), Ended::Done(good)) => {
                if !good {
                    let left = Data::Sparse(it.disk.read(range));
                    it.history.record(sequence, range, left);
                }
                let ended = match good {
                    true => LocalWrite::Written,
                    false if durable => LocalWrite::NotDurable,
                    false => LocalWrite::Failed,
                };
                tracker.handle_local_written(sequence, ended, now);
            }
            (DiskWork::Sync, Ended::Done(good)) => tracker.handle_synced(good, now),
            (DiskWork::Copy(peer, read, range), Ended::Read(data)) => {
                let content = match &data {
                    _ if fails => CopyContent::Failed,
                    Data::Sparse(values) if values.is_empty() => CopyContent::Zero,
                    _ => CopyContent::Data,
                };
                shell.copies.insert((peer, read), (range, data));
                tracker.handle_copy_read(host_id(peer), read, content, now);
            }
            (DiskWork::Digest(hold, range), Ended::Read(data)) => {
                tracker.handle_digest(hold, (!fails).then(|| digest(range, &data)), now);
            }
            (work, ended) => panic!("{work:?} ended as {ended:?}"),
        }
        if fails {
            self.take_losses(host);
        }
    }

    /// What a failed sync has lost, applications and replicas may notice (W5).
    fn take_losses(&mut self, host: usize) {
        let it = &mut self.hosts[host];
        let lost = it.disk.take_lost();
        if it.has_failed() {
            it.promises.sync_failed();
            it.history.lost(lost, &it.disk);
        }
    }

    /// A metadata write of a primary ended.
    pub(super) fn primary_file_ended(&mut self, host: usize, id: FileOperation, good: bool) {
        let now = Time(self.now);
        let Shell::Primary(shell) = &mut self.hosts[host].shell else { panic!("the host is primary") };
        match shell.file_work.remove(&id).expect("it is known") {
            FileWork::Log => shell.tracker.handle_log_written(good, now),
            FileWork::Map(peer) => shell.tracker.handle_map_written(host_id(peer), good, now),
            FileWork::Session(link) => self.session_recorded(link, good),
        }
    }

    pub(super) fn content_of(&self, host: usize, request: RequestId, is_zero: bool) -> u64 {
        let value = self.hosts[host].promises.value(request);
        let value = value.expect("a request's data is needed only until its reply");
        if is_zero { 0 } else { value }
    }

    pub(super) fn start_primary_disk(&mut self, host: usize, work: DiskWork) -> DiskOperation {
        let id = DiskOperation(self.next_operation());
        let longer = if matches!(work, DiskWork::Sync) { self.settings.sync_delay } else { Duration::ZERO };
        let Shell::Primary(shell) = &mut self.hosts[host].shell else { panic!("the host is primary") };
        shell.disk_work.insert(id, work);
        self.plan_disk(host, id, longer);
        id
    }

    pub(super) fn start_primary_file(
        &mut self,
        host: usize,
        name: &str,
        batches: VecDeque<Batch>,
        work: FileWork,
    ) {
        let id = FileOperation(self.next_operation());
        let it = &mut self.hosts[host];
        it.files.write(id, name, batches);
        let Shell::Primary(shell) = &mut it.shell else { panic!("the host is primary") };
        shell.file_work.insert(id, work);
        self.plan_file(host, id);
    }

    pub(super) fn start_superblock_write(&mut self, host: usize, work: FileWork) {
        let batches = self.hosts[host].superblock_batches();
        self.start_primary_file(host, superblock::FILE_NAME, batches, work);
    }
}
