//! The replica's own activity log: extents with live frames that other replicas may lack (D5).
//!
//! Two replicas whose primary died may each have frames that the other lacks. Both keep the extents of what they
//! applied in their logs until the primary says that everybody has it; whoever of them is promoted marks its own log's
//! extents for the other, and hears of the other's in the greeting (D3). A volume with one replica needs none of this.
//!
//! Until the next commit, the log also says what it said when the replica was opened: it may be that of a primary which
//! has become a replica, with writes that it never synced or sent. The same holds for what it said when a resync began:
//! a promotion in the middle of it rolls back to that time.

use super::{Action, FrameId, Replica};
use crate::disk::activity_log::{self, Recovered};
use crate::ranges::ByteRange;
use crate::tracker::activity::{ActiveSet, Claim};
use crate::units::{EXTENT_BYTES, Epoch, Extent, Sequence};
use std::collections::{BTreeSet, VecDeque};

/// See the module.
#[derive(Debug)]
pub(super) struct Log {
    set: ActiveSet,
    /// What the log said when the replica was opened, and when a resync began, until a commit makes it void.
    inherited: BTreeSet<Extent>,
    /// Whether it may have said anything.
    is_unsure: bool,
    /// Whether the session's volume has other replicas.
    pub(super) is_wanted: bool,
    agreed: Epoch,
    /// The count of claims when the last agreement came.
    clock: u64,
    /// Frames whose turn has come and whose extents are not in a durable record, or have no place in the set.
    claimed: Vec<FrameId>,
    homeless: VecDeque<FrameId>,
    writing: bool,
    /// Extents of a commit that waits for their record.
    adopting: Option<Vec<Extent>>,
}

impl Log {
    pub(super) fn new(recovered: &Recovered) -> Self {
        let (serial, inherited, is_unsure) = match recovered {
            Recovered::Active { serial, extents } => (*serial, extents.clone(), false),
            Recovered::Unsure { serial } => (*serial, BTreeSet::new(), true),
        };
        Self {
            set: ActiveSet::new(serial, activity_log::CAPACITY),
            inherited,
            is_unsure,
            is_wanted: false,
            agreed: Epoch(0),
            clock: 0,
            claimed: Vec::new(),
            homeless: VecDeque::new(),
            writing: false,
            adopting: None,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        !self.writing && self.claimed.is_empty() && self.homeless.is_empty()
    }

    /// Ranges that another host may have otherwise.
    pub(super) fn suspects(&self, size_bytes: u64) -> Vec<ByteRange> {
        if self.is_unsure {
            return vec![ByteRange::new(0, size_bytes)];
        }
        let extents: BTreeSet<Extent> = self.inherited.iter().copied().chain(self.set.extents()).collect();
        extents
            .into_iter()
            .map(|extent| u64::from(extent.0) * EXTENT_BYTES)
            .map(|start| ByteRange::between(start.min(size_bytes), (start + EXTENT_BYTES).min(size_bytes)))
            .filter(|range| !range.is_empty())
            .collect()
    }

    /// A resync begins: what the log says now belongs to the rollback point, and is kept until a commit makes that void.
    /// So whatever is told of later epochs lets none of it go.
    pub(super) fn keep_for_rollback(&mut self) {
        self.inherited.extend(self.set.extents());
        if self.inherited.len() > activity_log::CAPACITY {
            self.inherited.clear();
            self.is_unsure = true;
        }
    }

    fn safe(&self) -> Sequence {
        // The set's clock counts epochs here.
        Sequence(self.agreed.0)
    }
}

impl Replica {
    /// A live frame's turn has come: its extents must be in the log before it is applied.
    pub(super) fn apply_when_logged(&mut self, frame: FrameId, range: ByteRange) {
        match self.log.set.claim(range.extents(), self.log.safe()) {
            Claim::Active => self.apply_claimed(frame),
            Claim::Wait => self.log.claimed.push(frame),
            Claim::Full => self.log.homeless.push_back(frame),
        }
    }

    /// The record that [`Action::WriteLog`] asked for is durable, or could not be written.
    pub fn handle_log_written(&mut self, written: bool) {
        assert!(std::mem::take(&mut self.log.writing), "a record is written once");
        if !written {
            return self.fail();
        }
        self.log.set.record_written();
        for frame in std::mem::take(&mut self.log.claimed) {
            if self.log.set.are_active(self.items[&frame].body.range().extents()) {
                self.apply_claimed(frame);
            } else {
                self.log.claimed.push(frame);
            }
        }
        self.go_on();
    }

    /// Everything up to this epoch is durable wherever it may be missed, or a commit will tell of it.
    pub(super) fn agreed(&mut self, epoch: Epoch) {
        self.log.agreed = self.log.agreed.max(epoch);
        let safe = self.log.safe();
        self.log.set.let_idle_go(self.log.clock, safe);
        self.log.clock = self.log.set.clock();
        for frame in std::mem::take(&mut self.log.homeless) {
            self.apply_when_logged(frame, self.items[&frame].body.range());
        }
        self.go_on();
    }

    /// A frame whose extents were claimed was applied, or will never be.
    pub(super) fn give_back(&mut self, range: ByteRange, epoch: Option<Epoch>) {
        self.log.set.give_back(range.extents(), epoch.map(|epoch| Sequence(epoch.0)));
    }

    /// The extents of a commit go to the log before the commit is recorded.
    pub(super) fn adopt_extents(&mut self, extents: Vec<Extent>, epoch: Epoch) {
        // What was agreed before the commit does not hold for what it brings.
        self.log.agreed = Epoch(0);
        self.log.set.adopt(extents.iter().copied(), Sequence(epoch.0));
        self.log.adopting = Some(extents);
    }

    /// Whether the extents of a commit are in a durable record.
    pub(super) fn has_adopted_extents(&mut self) -> bool {
        let is_done = !self.log.writing
            && self
                .log
                .adopting
                .as_ref()
                .is_some_and(|extents| self.log.set.are_active(extents.iter().copied()));
        if is_done {
            self.log.adopting = None;
        }
        is_done
    }

    /// The commit is recorded: what the log said before is void.
    pub(super) fn log_is_void(&mut self) {
        if !self.log.inherited.is_empty() || self.log.is_unsure {
            self.log.inherited.clear();
            self.log.is_unsure = false;
            self.log.set.shrink();
        }
    }

    /// Writes a record if one is needed; one that only says less waits until nothing else is to do.
    pub(super) fn write_log(&mut self) {
        let tidy = self.order.is_idle() && self.sync.is_none();
        let Some(serial) = self.log.set.next_record(tidy) else { return };
        let all: BTreeSet<Extent> =
            self.log.inherited.iter().copied().chain(self.log.set.extents()).collect();
        let record = if self.log.is_unsure || all.len() > activity_log::CAPACITY {
            activity_log::encode_everything(serial)
        } else {
            activity_log::encode(all, serial)
        };
        self.log.writing = true;
        let offset = activity_log::record_offset(serial);
        self.actions.push_back(Action::WriteLog { offset, record: Box::new(record) });
    }

    /// Gives up what waits for the log, when its session ends.
    pub(super) fn drop_unlogged(&mut self) {
        let claimed = std::mem::take(&mut self.log.claimed);
        for frame in &claimed {
            self.give_back(self.items[frame].body.range(), None);
        }
        self.forget_unclaimed(claimed);
        let homeless: Vec<FrameId> = self.log.homeless.drain(..).collect();
        self.forget_unclaimed(homeless);
        self.log.adopting = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_told_in_a_resync_lets_nothing_go_that_a_rollback_needs() {
        let mut log = Log::new(&Recovered::Active { serial: 0, extents: BTreeSet::new() });
        let write = |log: &mut Log, extent, epoch| {
            assert_eq!(log.set.claim([Extent(extent)].into_iter(), log.safe()), Claim::Wait);
            log.set.next_record(false).expect("a record is needed");
            log.set.record_written();
            log.set.give_back([Extent(extent)].into_iter(), Some(Sequence(epoch)));
        };
        write(&mut log, 5, 7);
        log.keep_for_rollback();
        write(&mut log, 6, 8);
        log.set.let_idle_go(log.set.clock(), Sequence(9));
        assert_eq!(log.set.extents().count(), 0, "all of it is safe");
        assert_eq!(log.suspects(1 << 30), [ByteRange::new(5 * EXTENT_BYTES, EXTENT_BYTES)]);
    }
}
