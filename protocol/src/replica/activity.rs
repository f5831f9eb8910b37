//! The replica's own activity log: extents with live frames that other replicas may lack (D5).
//!
//! Two replicas whose primary died may each have frames that the other lacks. Both keep the extents of what they
//! applied in their logs until the primary says that everybody has it; whoever of them is promoted marks its own log's
//! extents for the other, and hears of the other's in the greeting (D3). A volume with one replica needs none of this.
//!
//! Until the next commit, the log also says what it said when the replica was opened: it may be that of a primary which
//! has become a replica, with writes that it never synced or sent.
//!
//! No frame waits for room in the log: where it would name more extents than a record holds, the record says everything.
//! In memory the set is exact, and has an entry for each extent of the volume at most.

use super::{Action, FrameId, Replica};
use crate::active_set::{ActiveSet, Claim};
use crate::disk::activity_log::{self, Recovered};
use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use crate::units::{EXTENT_BYTES, Epoch, Extent, Sequence};
use std::collections::BTreeSet;

/// A replica's own activity log.
#[derive(Debug)]
pub(super) struct Log {
    set: ActiveSet,
    /// What the log said when the replica was opened, until a commit makes it void.
    inherited: BTreeSet<Extent>,
    /// Whether it may have said anything.
    is_unsure: bool,
    /// Whether the session's volume has other replicas.
    pub(super) is_wanted: bool,
    agreed: Epoch,
    /// The count of claims when the last agreement came.
    clock: u64,
    /// Frames whose turn has come and whose extents are not in a durable record.
    claimed: Vec<FrameId>,
    writing: bool,
    /// Extents of a commit that waits for their record.
    adopting: Option<Vec<Extent>>,
}

impl Log {
    pub(super) fn new(recovered: &Recovered) -> Self {
        let (serial, inherited, is_unsure) = match recovered {
            Recovered::Active { serial, extents } => (*serial, extents.clone(), false),
            Recovered::Unsure { serial } => (*serial, BTreeSet::new(), !planted(Bug::TrustTouched)),
        };
        Self {
            set: ActiveSet::new(serial, usize::MAX),
            inherited,
            is_unsure,
            is_wanted: false,
            agreed: Epoch(0),
            clock: 0,
            claimed: Vec::new(),
            writing: false,
            adopting: None,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        !self.writing && self.claimed.is_empty()
    }

    /// Ranges that another host may have otherwise.
    pub(super) fn suspects(&self, size_bytes: u64) -> Vec<ByteRange> {
        if self.is_unsure {
            return vec![ByteRange::new(0, size_bytes)];
        }
        // An extent whose writes everybody has stays in the log until it is idle, and differs nowhere.
        let lacked = self.set.unsafe_extents(self.safe());
        let extents: BTreeSet<Extent> = self.inherited.iter().copied().chain(lacked).collect();
        extents
            .into_iter()
            .map(|extent| u64::from(extent.0) * EXTENT_BYTES)
            .map(|start| ByteRange::between(start.min(size_bytes), (start + EXTENT_BYTES).min(size_bytes)))
            .filter(|range| !range.is_empty())
            .collect()
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
            Claim::Full => unreachable!("a replica's set has no limit"),
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

    /// Everything up to this epoch is durable wherever it may be missed.
    pub(super) fn agreed(&mut self, epoch: Epoch) {
        self.log.agreed = self.log.agreed.max(epoch);
        if self.superblock.released {
            return self.tidy_log();
        }
        let safe = self.log.safe();
        self.log.set.let_idle_go(self.log.clock, safe);
        self.log.clock = self.log.set.clock();
        self.go_on();
    }

    /// The primary was demoted, and nothing more comes from it: what everybody has is to be in the log of whoever is
    /// promoted no longer, or that one would take it for different on everybody.
    pub(super) fn tidy_log(&mut self) {
        let safe = self.log.safe();
        self.log.set.let_idle_go(u64::MAX, safe);
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
        let Log { set, inherited, .. } = &self.log;
        // One that a record can't hold is not gathered first.
        let is_everything = self.log.is_unsure || set.len() > activity_log::CAPACITY;
        let all: BTreeSet<Extent> = match is_everything {
            true => BTreeSet::new(),
            false => inherited.iter().copied().chain(set.extents()).collect(),
        };
        let record = if is_everything || all.len() > activity_log::CAPACITY {
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
        self.log.adopting = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_a_record_can_not_hold_says_everything_and_lets_no_frame_wait() {
        let mut log = Log::new(&Recovered::Active { serial: 0, extents: BTreeSet::new() });
        let extents = (0..2 * activity_log::CAPACITY as u32).map(Extent);
        for extent in extents.clone() {
            assert_eq!(log.set.claim([extent].into_iter(), log.safe()), Claim::Wait);
            log.set.give_back([extent].into_iter(), Some(Sequence(7)));
        }
        assert_eq!(log.set.len(), extents.len());
        log.set.next_record(false).expect("a record is needed");
        log.set.record_written();
        log.agreed = Epoch(7);
        let safe = log.safe();
        log.set.let_idle_go(log.set.clock(), safe);
        assert_eq!(log.set.len(), 0, "what is agreed leaves it");
    }
}
