//! A host says something else of itself, order by order, while nothing else goes on there: it is promoted, gives its content
//! up, is undone, or takes another disk for its own ([`blockmirror_protocol::rewrite`]). A crash between any two orders leaves what it left.

use super::disk::{Crash, Data, DiskOperation, Ended};
use super::files::{Batch, FileOperation, batches_of_map};
use super::gap::HistoryPoint;
use super::host::{Shell, host_number};
use super::replica::LAYERS;
use super::resolution::Yielding;
use super::world::World;
use blockmirror_protocol::disk::activity_log::{self, Recovered};
use blockmirror_protocol::disk::superblock::{self, Superblock};
use blockmirror_protocol::disk::{absent, dirty_map, marker, slot_offset};
use blockmirror_protocol::layers::LayerId;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::replica::Replica;
use blockmirror_protocol::rewrite::{Change, NotRecorded, Order, Part, Rewrite};
use blockmirror_protocol::succession::Decision;
use blockmirror_protocol::units::{HostId, Mark};
use std::collections::{BTreeSet, VecDeque};
use std::time::Duration;

/// What is to become of the host.
#[derive(Debug)]
pub enum Purpose {
    /// The primary. The machine of the replica that it was knows its primary's word.
    Promotion(Box<Replica>),
    /// What it was before its content was given up.
    Undo(HistoryPoint),
    /// A replica of the host that its content is given up for.
    Resolution(Box<Yielding>),
    /// What another host's copy was.
    Adoption,
}

/// A rewrite that is under way, and what of it.
#[derive(Debug)]
pub struct Rewriting {
    rewrite: Rewrite,
    /// What it is for.
    pub purpose: Purpose,
    /// What is being carried out.
    order: Option<Order>,
    /// Writes of the metadata that follow the one that is under way.
    next_writes: VecDeque<(String, VecDeque<Batch>)>,
    /// Pre-images that are written back after the one that is under way.
    next_restores: VecDeque<(ByteRange, Data)>,
    writing: Option<FileOperation>,
    /// The layer that is being made, which is what is written.
    begun: Option<LayerId>,
    disk: BTreeSet<DiskOperation>,
}

impl Rewriting {
    /// Nothing of it is done yet.
    #[must_use]
    pub fn new(rewrite: Rewrite, purpose: Purpose) -> Self {
        Self {
            rewrite,
            purpose,
            order: None,
            next_writes: VecDeque::new(),
            next_restores: VecDeque::new(),
            writing: None,
            begun: None,
            disk: BTreeSet::new(),
        }
    }
}

impl World {
    /// The host, on which nothing runs, begins a rewrite.
    pub(super) fn begin_rewriting(&mut self, host: usize, rewrite: Rewrite, purpose: Purpose) {
        self.hosts[host].shell = Shell::Rewriting(Box::new(Rewriting::new(rewrite, purpose)));
        self.go_on_rewriting(host);
    }

    fn rewriting(&mut self, host: usize) -> &mut Rewriting {
        match &mut self.hosts[host].shell {
            Shell::Rewriting(rewriting) => rewriting,
            _ => panic!("the host is being rewritten"),
        }
    }

    /// Whether nothing is lost as far as a promotion rests on the word of the primary.
    pub(super) fn holds_word(&mut self, host: usize) -> bool {
        let now = self.clock(host);
        let Purpose::Promotion(machine) = &self.rewriting(host).purpose else { return true };
        let is_promised = machine.is_promised(now);
        let rests_on_word = |decision: &Decision| decision.rests_on_word;
        is_promised || !self.hosts[host].decided.as_ref().is_some_and(rests_on_word)
    }

    fn go_on_rewriting(&mut self, host: usize) {
        loop {
            let rewriting = self.rewriting(host);
            if rewriting.writing.is_some() || !rewriting.disk.is_empty() {
                return;
            }
            if let Some((name, batches)) = rewriting.next_writes.pop_front() {
                return self.rewrite_file(host, &name, batches);
            }
            if let Some((range, data)) = rewriting.next_restores.pop_front() {
                let id = self.rewrite_disk(host);
                return self.hosts[host].disk.write(id, range, &data, false);
            }
            if let Some(Order::Write(Part::Superblock(change))) = rewriting.order.take() {
                self.hosts[host].superblock_written();
                self.rewrite_is_recorded(host, change);
            }
            let now = self.clock(host);
            let rewriting = self.rewriting(host);
            let is_promised = match &rewriting.purpose {
                Purpose::Promotion(machine) => machine.is_promised(now),
                Purpose::Undo(_) | Purpose::Resolution(_) | Purpose::Adoption => true,
            };
            match rewriting.rewrite.next(is_promised) {
                // The primary may have gone on alone.
                Err(NotRecorded::TooLate) => return self.take_down(host, Crash::Process),
                Err(error @ NotRecorded::Touched) => {
                    unreachable!("nothing writes to it meanwhile: {error:?}")
                }
                Ok(None) => return self.rewritten(host),
                Ok(Some(order)) => {
                    rewriting.order = Some(order);
                    self.carry_out_order(host, order);
                }
            }
        }
    }

    fn carry_out_order(&mut self, host: usize, order: Order) {
        match order {
            Order::Write(Part::Map(peer)) => self.rewrite_map(host, peer),
            Order::Write(Part::Mark(mark)) => self.rewrite_mark(host, mark),
            Order::Write(Part::Absent(source)) => {
                let it = &mut self.hosts[host];
                it.files.remove(absent::FILE_NAME);
                let batches = it.absent_batches(source);
                self.rewrite_file(host, absent::FILE_NAME, batches);
            }
            Order::Write(Part::Superblock(change)) => {
                let mut said = self.hosts[host].superblock.clone();
                self.rewriting(host).rewrite.change(change, &mut said);
                self.rewrite_is_begun(&said);
                let it = &mut self.hosts[host];
                it.superblock = said;
                let batches = it.superblock_batches();
                self.rewrite_file(host, superblock::FILE_NAME, batches);
            }
            Order::BeginLayer(layer) => {
                self.rewriting(host).begun = Some(layer);
                self.rewrite_file(host, LAYERS, VecDeque::new());
            }
            Order::Restore { layer } => self.restore(host, layer),
            Order::Sync => {
                let id = self.rewrite_disk(host);
                self.hosts[host].disk.sync(id);
            }
        }
    }

    fn rewrite_map(&mut self, host: usize, peer: HostId) {
        let it = &self.hosts[host];
        let (map, superblock) = (it.recover_map(host_number(peer)), it.superblock.clone());
        let mut map = self.rewriting(host).rewrite.map(&superblock, peer, map);
        let batches = batches_of_map(map.take_changes());
        if !batches.is_empty() {
            self.rewrite_file(host, &dirty_map::file_name(peer), batches);
        }
    }

    fn rewrite_mark(&mut self, host: usize, mark: Mark) {
        let it = &self.hosts[host];
        let serial = match it.recover_log() {
            Recovered::Active { serial, .. } | Recovered::Unsure { serial } => serial,
        };
        let log = activity_log::ring_after(serial, true)
            .map(|(serial, record)| vec![(activity_log::record_offset(serial), Some(Box::new(record)))]);
        let bytes = it.files.bytes(marker::FILE_NAME, marker::FILE_BYTES);
        let serial = marker::recover(&bytes).map_or(0, |(serial, _)| serial) + 1;
        let page =
            VecDeque::from([vec![(slot_offset(serial), Some(Box::new(marker::encode(mark, serial))))]]);
        let log = log.collect();
        self.rewriting(host).next_writes.push_back((marker::FILE_NAME.to_owned(), page));
        self.rewrite_file(host, activity_log::FILE_NAME, log);
    }

    fn restore(&mut self, host: usize, layer: LayerId) {
        let contents = self.hosts[host].layers.get(layer).contents();
        let contents = contents.map(|(range, held)| (range, Data::Sparse(held))).collect();
        self.rewriting(host).next_restores = contents;
    }

    fn rewrite_disk(&mut self, host: usize) -> DiskOperation {
        let id = DiskOperation(self.next_operation());
        self.rewriting(host).disk.insert(id);
        self.plan_disk(host, id, Duration::ZERO);
        id
    }

    fn rewrite_file(&mut self, host: usize, name: &str, batches: VecDeque<Batch>) {
        let id = FileOperation(self.next_operation());
        self.rewriting(host).writing = Some(id);
        self.hosts[host].files.write(id, name, batches);
        self.plan_file(host, id);
    }

    /// A disk operation of a rewrite ended.
    pub(super) fn rewriting_disk_ended(&mut self, host: usize, id: DiskOperation, ended: &Ended) {
        self.rewriting(host).disk.remove(&id);
        self.end_of_operation(host, matches!(ended, Ended::Done(true)));
    }

    /// A metadata write of a rewrite ended.
    pub(super) fn rewriting_file_ended(&mut self, host: usize, good: bool) {
        let rewriting = self.rewriting(host);
        rewriting.writing = None;
        if let Some(layer) = rewriting.begun.take().filter(|_| good) {
            self.hosts[host].layers.begin(layer);
        }
        self.end_of_operation(host, good);
    }

    /// A rewrite that something failed of is given up: the host starts again as it was.
    fn end_of_operation(&mut self, host: usize, good: bool) {
        if good {
            self.go_on_rewriting(host);
        } else {
            self.take_down(host, Crash::Process);
        }
    }

    /// The superblock is going to say this: a generation of its own is known to the model before it may be durable.
    fn rewrite_is_begun(&mut self, said: &Superblock) {
        if let [newest, before @ ..] = &said.lineage[..]
            && !self.generations.is_known(*newest)
        {
            self.generations.begin(*newest, before, None);
        }
    }

    /// What the superblock was made to say is durable.
    fn rewrite_is_recorded(&mut self, host: usize, change: Change) {
        match (&self.rewriting(host).purpose, change) {
            (Purpose::Undo(point), Change::Begin) => {
                let point = point.clone();
                self.undo_is_begun(host, &point);
            }
            (Purpose::Undo(point), Change::End) => {
                let point = point.clone();
                self.undo_is_recorded(host, &point);
            }
            (Purpose::Promotion(_), Change::End) => {
                // What was answered while that was being recorded for too long, it lacks.
                if !self.holds_word(host) {
                    self.hosts[host].decided = None;
                }
                self.promotion_is_recorded(host);
            }
            (Purpose::Resolution(yielding), Change::End) => {
                let yielding = yielding.clone();
                self.resolution_is_recorded(host, &yielding);
            }
            (Purpose::Adoption, Change::End) => self.hosts[host].adopting = None,
            (Purpose::Promotion(_) | Purpose::Resolution(_) | Purpose::Adoption, Change::Begin) => {}
        }
    }

    /// All is done: the volume is opened anew.
    fn rewritten(&mut self, host: usize) {
        let Shell::Rewriting(rewriting) = std::mem::replace(&mut self.hosts[host].shell, Shell::Down) else {
            unreachable!("it was rewritten")
        };
        match rewriting.purpose {
            Purpose::Promotion(_) => self.promoted(host),
            Purpose::Undo(_) | Purpose::Resolution(_) => self.start(host),
            Purpose::Adoption => self.open_volume(host),
        }
    }

    /// The host whose rewrite a crash has ended goes by what its superblock says.
    pub(super) fn rewriting_has_crashed(&mut self, host: usize, purpose: Purpose) {
        let it = &mut self.hosts[host];
        it.recover_superblock();
        match purpose {
            Purpose::Promotion(_) if it.is_primary() => self.promotion_is_recorded(host),
            Purpose::Promotion(_) => {}
            Purpose::Undo(point) => match (it.superblock.layers.undo(), it.superblock.layers.rollback()) {
                (None, _) => self.undo_is_recorded(host, &point),
                (undo, rollback) if undo == rollback && it.mirror.point.is_none() => {
                    self.undo_is_begun(host, &point)
                }
                _ => {}
            },
            Purpose::Resolution(yielding) if yielding.is_said_by(&it.superblock) => {
                self.resolution_is_recorded(host, &yielding);
            }
            // It is done again from the beginning.
            Purpose::Resolution(_) | Purpose::Adoption => {}
        }
    }
}
