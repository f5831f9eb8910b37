//! A replica is being promoted: the steps that [`promotion`] names, one after the other, on this host's disk and files.
//! A crash between any two leaves a replica.

use super::disk::{Data, DiskOperation, Ended};
use super::files::{FileOperation, batches_of_map};
use super::host::{Shell, host_id};
use super::mirror::Mirror;
use super::promises::Promises;
use super::world::{Event, World};
use blockmirror_protocol::disk::{dirty_map, superblock};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::replica::Replica;
use blockmirror_protocol::replica::promotion::{self, Step};
use blockmirror_protocol::units::{Position, Time};
use blockmirror_protocol::wire::message::DataState;
use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

/// How long an operator waits before looking again whether a replica has come to rest, at most.
const LOOK: Duration = Duration::from_millis(50);

/// See the module.
#[derive(Debug)]
pub struct Promotion {
    /// The machine of the replica that it was: what it knows of its primary's word.
    machine: Replica,
    steps: VecDeque<Step>,
    position: Position,
    restored: Vec<ByteRange>,
    /// Hosts whose maps are not written yet.
    peers: VecDeque<usize>,
    writing: Option<FileOperation>,
    disk: BTreeSet<DiskOperation>,
    has_begun_step: bool,
}

impl World {
    /// An operator promotes a replica, whatever that loses. Nothing happens where that is impossible.
    pub fn promote(&mut self, host: usize) {
        if !matches!(self.hosts[host].shell, Shell::Replica(_)) {
            let it = &mut self.hosts[host];
            (it.is_promoted_by_rule, it.is_promoted_on_word) = (false, false);
        }
        let peers = self.hosts[host].members.peers().into();
        let it = &mut self.hosts[host];
        let Shell::Replica(shell) = &mut it.shell else {
            it.is_held = false;
            return;
        };
        let Ok(steps) = promotion::steps(&it.superblock) else {
            if std::mem::take(&mut it.is_held) {
                // It was possible when its session was ended, and is no more: it goes on as a replica.
                self.cut_off(host);
            }
            return;
        };
        shell.machine.handle_disconnected();
        if !shell.machine.is_idle() || !shell.is_idle() {
            it.is_held = true;
            let life = it.life;
            return self.plan(LOOK, Event::Promote(host, life));
        }
        if shell.machine.has_failed() {
            it.is_held = false;
            return;
        }
        let restored = it.layers.saved(it.superblock.gap);
        self.note(|| format!("host {host} is being promoted: {steps:?}"));
        self.cut_off(host);
        for link in self.links.ids().filter(|link| link.listener == host) {
            // What a rollback restores, this host's own maps remember.
            self.links[link].united_by = None;
        }
        let it = &mut self.hosts[host];
        it.is_held = false;
        let Shell::Replica(shell) = std::mem::replace(&mut it.shell, Shell::Down) else {
            unreachable!("it was looked at")
        };
        it.shell = Shell::Promoting(Box::new(Promotion {
            position: shell.machine.report().position,
            machine: shell.machine,
            steps: steps.into(),
            restored,
            peers,
            writing: None,
            disk: BTreeSet::new(),
            has_begun_step: false,
        }));
        self.go_on_promoting(host);
    }

    fn promotion(&mut self, host: usize) -> &mut Promotion {
        match &mut self.hosts[host].shell {
            Shell::Promoting(promotion) => promotion,
            _ => panic!("the host is being promoted"),
        }
    }

    fn go_on_promoting(&mut self, host: usize) {
        loop {
            let promotion = self.promotion(host);
            if promotion.writing.is_some() || !promotion.disk.is_empty() {
                return;
            }
            let Some(step) = promotion.steps.front().copied() else { return };
            let is_done = match step {
                Step::WriteMaps => !self.write_next_map(host),
                _ if std::mem::replace(&mut promotion.has_begun_step, true) => true,
                Step::Begin => {
                    let it = &mut self.hosts[host];
                    promotion::begin(&mut it.superblock);
                    let batches = it.superblock_batches();
                    self.promotion_file(host, superblock::FILE_NAME, batches);
                    false
                }
                Step::Restore { .. } => {
                    self.restore(host);
                    false
                }
                Step::Sync => {
                    let id = self.promotion_disk(host);
                    self.hosts[host].disk.sync(id);
                    false
                }
                Step::Record if !self.holds_word(host) => {
                    // The primary may have gone on alone.
                    return self.take_down(host, super::disk::Crash::Process);
                }
                Step::Record => {
                    let position = self.promotion(host).position;
                    let it = &mut self.hosts[host];
                    promotion::record(&mut it.superblock, host_id(host), position).expect("a number is left");
                    let batches = it.superblock_batches();
                    self.promotion_file(host, superblock::FILE_NAME, batches);
                    false
                }
            };
            if is_done {
                let promotion = self.promotion(host);
                promotion.steps.pop_front();
                promotion.has_begun_step = false;
                if step == Step::Record {
                    return self.promoted(host);
                }
            }
        }
    }

    /// Whether nothing is lost as far as a promotion rests on the word of the primary.
    fn holds_word(&mut self, host: usize) -> bool {
        let now = Time(self.now);
        !self.hosts[host].is_promoted_on_word || self.promotion(host).machine.is_promised(now)
    }

    /// Writes the next map, if there is one.
    fn write_next_map(&mut self, host: usize) -> bool {
        let promotion = self.promotion(host);
        let Some(peer) = promotion.peers.pop_front() else { return false };
        let (restored, position) = (promotion.restored.clone(), promotion.position);
        let it = &self.hosts[host];
        let map = it.recover_map(peer);
        let mut map = promotion::map_for(map, &it.superblock, host_id(peer), position, &restored);
        let batches = batches_of_map(map.take_changes());
        self.promotion_file(host, &dirty_map::file_name(host_id(peer)), batches);
        true
    }

    fn restore(&mut self, host: usize) {
        let contents: Vec<(ByteRange, Data)> = {
            let it = &self.hosts[host];
            let contents = it.layers.get(it.superblock.gap).contents();
            contents.map(|(range, held)| (range, Data::Sparse(held))).collect()
        };
        for (range, data) in contents {
            let id = self.promotion_disk(host);
            self.hosts[host].disk.write(id, range, &data, false);
        }
    }

    /// The host is the primary from now on.
    fn promoted(&mut self, host: usize) {
        self.note(|| format!("host {host} is promoted"));
        // What was answered while that was being recorded for too long, it lacks.
        let holds_word = self.holds_word(host);
        self.hosts[host].is_promoted_by_rule &= holds_word;
        self.hosts[host].superblock_written();
        self.promotion_is_recorded(host);
        let it = &mut self.hosts[host];
        it.start_is_planned = false;
        it.life += 1;
        self.start_primary(host, false);
    }

    /// The superblock says durably that the host is primary.
    pub(super) fn promotion_is_recorded(&mut self, host: usize) {
        let it = &mut self.hosts[host];
        // Of the superblock that says that it is promoted already.
        let holder = it.promoted_after;
        let is_by_rule = std::mem::take(&mut it.is_promoted_by_rule);
        it.is_promoted_on_word = false;
        if let Some(expected) = it.expected.take() {
            if is_by_rule && expected.primary == holder {
                expected.all.check_known(&it.disk, host);
            }
            expected.promises.check_known(&it.disk, host);
        }
        it.promises = Promises::of(&it.disk);
        for other in &mut self.hosts {
            other.expected.take_if(|expected| expected.primary == host);
        }
        let it = &mut self.hosts[host];
        it.agrees_up_to(it.superblock.fence.counter);
        it.kept = None;
        it.mirror = Mirror::default();
        it.mirror.data = DataState::Consistent;
        self.differences.forget(host);
    }

    fn promotion_disk(&mut self, host: usize) -> DiskOperation {
        let id = DiskOperation(self.next_operation());
        self.promotion(host).disk.insert(id);
        self.plan_disk(host, id, Duration::ZERO);
        id
    }

    fn promotion_file(&mut self, host: usize, name: &str, batches: VecDeque<super::files::Batch>) {
        let id = FileOperation(self.next_operation());
        self.promotion(host).writing = Some(id);
        self.hosts[host].files.write(id, name, batches);
        self.plan_file(host, id);
    }

    /// A disk operation of a promotion ended.
    pub(super) fn promotion_disk_ended(&mut self, host: usize, id: DiskOperation, ended: &Ended) {
        self.promotion(host).disk.remove(&id);
        self.end_of_operation(host, matches!(ended, Ended::Done(true)));
    }

    /// A metadata write of a promotion ended.
    pub(super) fn promotion_file_ended(&mut self, host: usize, good: bool) {
        self.promotion(host).writing = None;
        self.end_of_operation(host, good);
    }

    /// A promotion that something failed of is given up: the host starts again as it was.
    fn end_of_operation(&mut self, host: usize, good: bool) {
        if good {
            self.go_on_promoting(host);
        } else {
            self.take_down(host, super::disk::Crash::Process);
        }
    }
}
