//! The shell of a primary: its tracker, and what the tracker has under way on the disk and in the files.

use super::disk::{Data, DiskOperation, Ended};
use super::files::{Batch, FileOperation};
use super::history::History;
use super::host::{Shell, SuperblockWork, VOLUME, host_id};
use super::links::LinkId;
use super::promises::Promises;
use super::rebuilding::Rebuilding;
use super::settings::lineage_limit;
use super::world::World;
use blockmirror_protocol::disk::superblock::{self, Superblock};
use blockmirror_protocol::disk::{activity_log, dirty_map};
use blockmirror_protocol::lineage::Ends;
use blockmirror_protocol::peer::resync::{COPY_BYTES, CopyContent, CopyRead};
use blockmirror_protocol::peer::{Identity, Peer};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::terms::Mode;
use blockmirror_protocol::tracker::replies::ReplicaLoss;
use blockmirror_protocol::tracker::{self, Action, Follower, LocalWrite, RequestId, Tracker};
use blockmirror_protocol::units::{GenerationId, Sequence};
use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

#[derive(Debug)]
pub(super) enum DiskWork {
    Write(Sequence, ByteRange, bool),
    Sync,
    /// A part of what was fetched.
    Land(u64),
    /// For a copy, or for its digest.
    Copy(Follower, CopyRead, ByteRange, bool),
    Digest(u64, ByteRange),
}

#[derive(Debug)]
pub(super) enum FileWork {
    Log,
    Map(Follower),
    Peer(LinkId),
    /// And where what went before ended until then.
    Generation(GenerationId, Ends),
    /// What the superblock said before.
    Told(Ends),
    /// The file of absent blocks.
    Absent,
    /// That nothing is absent any more.
    Filled,
}

/// The shell of a primary, and what it has under way.
#[derive(Debug)]
pub struct PrimaryShell {
    /// The machine.
    pub tracker: Tracker,
    /// What was read for copies to each host, and neither sent nor dropped yet.
    pub(super) copies: BTreeMap<(Follower, CopyRead), (ByteRange, Data)>,
    pub(super) rebuilding: Rebuilding,
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

    /// Whether the superblock is being written.
    pub(super) fn is_recording(&self) -> bool {
        let is_recording = |work: &FileWork| {
            matches!(
                work,
                FileWork::Peer(_) | FileWork::Generation(..) | FileWork::Told(_) | FileWork::Filled
            )
        };
        self.file_work.values().any(is_recording)
    }
}

impl World {
    /// Opens a host's volume as primary: metadata is recovered and a generation begins. Where its agent `starts`, a host that
    /// waits for replicas also waits for a majority of the hosts.
    pub(super) fn start_primary(&mut self, host: usize, starts: bool) {
        let (peers, now) = (self.hosts[host].members.peers(), self.clock_of_primary(host));
        self.void_other_maps(host);
        let it = &mut self.hosts[host];
        let absent = it.open_absent();
        let run = it.superblock.next_run();
        it.superblock.begin_run(run.expect("a run is left"));
        it.write_superblock_now();
        it.history = History::new(it.disk.content().clone());
        let disk = std::mem::take(&mut self.hosts[host].disk);
        self.expected_of(host, |promises| promises.restarted(&disk));
        self.hosts[host].disk = disk;
        self.check_recovered(host);
        let it = &mut self.hosts[host];
        let Superblock { size_bytes, block_size, .. } = it.superblock;
        let window = self.settings.window_bytes;
        let modes = &self.settings.modes;
        let session_of = |peer| {
            let map = it.recover_map(peer);
            Peer::new(host_id(peer), map, size_bytes, block_size, window, modes[peer])
        };
        let sessions = peers.into_iter().map(session_of).collect();
        let log = it.recover_log();
        let settings = tracker::Settings {
            size_bytes,
            sector_bytes: it.disk.sector_bytes(),
            lineage: it.superblock.lineage.clone(),
            lineage_limit: lineage_limit(self.settings.sector_bytes.len()),
            opened: it.superblock.position,
            first_epoch: it.superblock.run,
            loss: self.settings.loss,
            opened_at: now,
            patience: self.settings.patience,
            active_extents: self.settings.active_extents,
            returned: it.superblock.returned(),
            owes_word: it.members.removed().any(|removed| modes[removed] == Mode::Sync),
            absent,
        };
        let mut tracker = Tracker::new(settings, &log, sessions);
        if starts {
            tracker.start([], matches!(self.settings.loss, ReplicaLoss::Block { .. }), now);
        }
        it.shell = Shell::Primary(Box::new(PrimaryShell {
            tracker,
            copies: BTreeMap::new(),
            rebuilding: Rebuilding::default(),
            disk_work: BTreeMap::new(),
            file_work: BTreeMap::new(),
        }));
        for link in self.links.of_dialler(host) {
            self.plan_connect(link);
        }
        self.plan_request(host);
    }

    /// The maps of hosts that are none of the volume's any more say that all may differ.
    fn void_other_maps(&mut self, host: usize) {
        let hosts = self.hosts.len();
        let it = &mut self.hosts[host];
        let peers = it.members.peers();
        let names = it.files.names();
        for other in (0..hosts).filter(|other| *other != host) {
            let is_there = names.contains(&dirty_map::file_name(host_id(other)));
            match peers.contains(&other) {
                true => it.begin_map(other),
                false if is_there => it.void_map(other),
                false => {}
            }
        }
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
            adopted: it.superblock.adopted,
            fence: it.superblock.fence,
            lineage: it.known_lineage().to_vec(),
            members: self.members_of(host),
            ends: it.superblock.ends.clone(),
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
                self.check_recorded(host, range);
                self.hosts[host].history.record(sequence, range, data.clone());
                let id = self.start_primary_disk(host, DiskWork::Write(sequence, range, durable));
                self.hosts[host].disk.write(id, range, &data, durable);
            }
            Action::BeginGeneration { kept, first, end } => {
                let work = SuperblockWork::Generation { kept, first, end };
                self.hosts[host].superblock_work.push_back(work);
                self.record_next(host);
            }
            Action::TellUpTo { end } => {
                self.hosts[host].superblock_work.push_back(SuperblockWork::Told(end));
                self.record_next(host);
            }
            Action::SyncLocal => {
                let id = self.start_primary_disk(host, DiskWork::Sync);
                self.hosts[host].disk.sync(id);
            }
            Action::ReadLocal { request } => self.read_here(host, request),
            Action::Land { landing, part, is_zero } => self.land(host, landing, part, is_zero),
            Action::DropFetched(fetch) => self.drop_fetched(host, fetch),
            Action::WriteAbsent(changes) => self.write_absent(host, &changes),
            Action::Filled => {
                self.check_filled(host);
                self.hosts[host].superblock_work.push_back(SuperblockWork::Filled);
                self.record_next(host);
            }
            Action::Reply { request, .. } if self.read_failed(host, request) => {}
            Action::Reply { request, result } => self.replied(host, request, result.is_ok()),
            Action::ReadDigest { hold, range } => {
                let id = self.start_primary_disk(host, DiskWork::Digest(hold, range));
                self.hosts[host].disk.begin_read(id, range);
            }
            Action::Peer { follower, action } => self.act_for_peer(host, follower, action),
        }
    }

    /// A disk operation of a primary ended.
    pub(super) fn primary_disk_ended(&mut self, host: usize, id: DiskOperation, ended: Ended, fails: bool) {
        let now = self.clock(host);
        let it = &mut self.hosts[host];
        let Shell::Primary(shell) = &mut it.shell else { panic!("the host is primary") };
        let tracker = &mut shell.tracker;
        match (shell.disk_work.remove(&id).expect("it is known"), ended) {
            (DiskWork::Write(sequence, range, durable), Ended::Done(good)) => {
                if !good {
                    let left = Data::Sparse(it.disk.counted_in(range));
                    it.history.record(sequence, range, left);
                }
                let ended = match good {
                    true => LocalWrite::Written,
                    false if durable => LocalWrite::NotDurable,
                    false => LocalWrite::Failed,
                };
                tracker.handle_local_written(sequence, ended, now);
            }
            (DiskWork::Land(landing), Ended::Done(good)) => tracker.handle_landed(landing, good, now),
            (DiskWork::Sync, Ended::Done(good)) => tracker.handle_synced(good, now),
            (DiskWork::Copy(peer, read, range, is_digest), Ended::Read(data)) => {
                let is_hole = |data: &Data| data.hole_bytes(range) == range.length;
                let content = match &data {
                    _ if fails => CopyContent::Failed,
                    // Where there is a hole, nothing is read.
                    data if is_hole(data) && read.0 % 2 == 1 || range.length > COPY_BYTES => {
                        CopyContent::Hole(data.hole_bytes(range))
                    }
                    _ if !it.disk.can_read(range) => CopyContent::Failed,
                    data if is_hole(data) => CopyContent::Zero,
                    data if is_digest => CopyContent::Digest(digest(range, data)),
                    _ => CopyContent::Data,
                };
                shell.copies.insert((peer, read), (range, data));
                tracker.handle_copy_read(peer, read, content, now);
            }
            (DiskWork::Digest(hold, range), Ended::Read(data)) => {
                let is_read = !fails && it.disk.can_read(range);
                tracker.handle_digest(hold, is_read.then(|| digest(range, &data)), now);
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
            self.expected_of(host, Promises::sync_failed);
        }
    }

    /// A metadata write of a primary ended.
    pub(super) fn primary_file_ended(&mut self, host: usize, id: FileOperation, good: bool) {
        let now = self.clock(host);
        let Shell::Primary(shell) = &mut self.hosts[host].shell else { panic!("the host is primary") };
        match shell.file_work.remove(&id).expect("it is known") {
            FileWork::Log => shell.tracker.handle_log_written(good, now),
            FileWork::Map(peer) => shell.tracker.handle_map_written(peer, good, now),
            FileWork::Peer(link) => {
                self.session_recorded(link, good);
                self.record_next(host);
            }
            FileWork::Absent => shell.tracker.handle_absent_written(good, now),
            FileWork::Filled => {
                shell.tracker.handle_filled(good, now);
                let it = &mut self.hosts[host];
                match good {
                    true => it.superblock_written(),
                    false => it.superblock.note_absent(),
                }
                self.record_next(host);
            }
            FileWork::Told(before) => {
                shell.tracker.handle_told(good, now);
                let it = &mut self.hosts[host];
                match good {
                    true => it.superblock_written(),
                    false => it.superblock.ends = before,
                }
                self.record_next(host);
            }
            FileWork::Generation(generation, before) => {
                shell.tracker.handle_generation(good.then_some(generation), now);
                let it = &mut self.hosts[host];
                if good {
                    it.superblock_written();
                } else {
                    it.superblock.lineage.retain(|other| *other != generation);
                    it.superblock.ends = before;
                }
                self.record_next(host);
            }
        }
    }

    /// Records what waits for the superblock, one thing at a time.
    pub(super) fn record_next(&mut self, host: usize) {
        let (number, limit) = (self.next_operation(), lineage_limit(self.hosts.len()));
        let it = &mut self.hosts[host];
        let Shell::Primary(shell) = &it.shell else { return };
        if shell.is_recording() {
            return;
        }
        let is_followed = shell.tracker.released().next().is_none();
        let work = match it.superblock_work.pop_front() {
            None => return,
            Some(SuperblockWork::Session(link)) => {
                it.superblock.session = it.superblock.next_session(shell.tracker.sessions_above());
                FileWork::Peer(link)
            }
            Some(SuperblockWork::Filled) => {
                it.superblock.note_filled();
                FileWork::Filled
            }
            Some(SuperblockWork::Told(end)) => {
                let before = it.superblock.ends.clone();
                it.superblock.tell_up_to(end);
                if is_followed {
                    it.superblock.note_followed();
                }
                FileWork::Told(before)
            }
            Some(SuperblockWork::Generation { kept, first, end }) => {
                let mut generation = GenerationId([host as u8; 16]);
                generation.0[..8].copy_from_slice(&number.to_le_bytes());
                self.generations.begin(generation, &it.superblock.lineage, Some((host, it.life)));
                let before = it.superblock.ends.clone();
                it.superblock.begin_generation(generation, &kept, limit, (first, end));
                if is_followed {
                    it.superblock.note_followed();
                }
                FileWork::Generation(generation, before)
            }
        };
        self.start_superblock_write(host, work);
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
