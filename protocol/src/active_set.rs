//! The active set: which extents may hold writes that are unfinished, unsynced or unreplicated (W2, D1).
//!
//! A write claims its extents before it is sequenced and gives them back when it has ended locally. An extent without
//! claims stays in the set, where it costs nothing, until its place is needed or it has been idle; it leaves only when
//! its last write is *safe*: durable here and on each peer, or durably in that peer's map. The caller knows what is
//! safe and passes it in.
//!
//! The set in memory is always a superset of what the newest record says, but for extents whose record is being
//! written: those are not active yet, and nothing is written there.

use crate::units::{Extent, Sequence};
use std::collections::{BTreeMap, BTreeSet};

/// How many places are freed at once, so that a workload of cold extents does not write a record for each.
const BATCH: usize = 64;

/// The extents that may hold such writes.
#[derive(Debug)]
pub(crate) struct ActiveSet {
    /// How many extents there may be, but for adopted ones.
    limit: usize,
    extents: BTreeMap<Extent, Entry>,
    serial: u64,
    writing: bool,
    /// Whether the set holds less than the newest record does.
    shrunk: bool,
    /// Extents that wait for a record.
    wanted: usize,
    clock: u64,
}

#[derive(Debug)]
struct Entry {
    state: EntryState,
    claims: u32,
    last: Sequence,
    touched: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum EntryState {
    /// In no record yet.
    Wanted,
    /// In the record that is being written.
    Recording,
    /// In a durable record.
    Active,
}

/// How a claim went.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Claim {
    /// All extents are active: the write may begin.
    Active,
    /// Claimed; the write may begin when [`ActiveSet::are_active`] says so.
    Wait,
    /// Not claimed: the set is full of extents that are not safe.
    Full,
}

impl ActiveSet {
    /// The set after a restart: nothing is active, and the next record goes after `serial`. No more than `limit` extents
    /// are active at once, where the caller has records that hold no more.
    pub(crate) fn new(serial: u64, limit: usize) -> Self {
        Self { limit, extents: BTreeMap::new(), serial, writing: false, shrunk: true, wanted: 0, clock: 0 }
    }

    /// Claims extents for one write. Where places are needed, the longest untouched extents whose last write is at
    /// most `safe` leave the set.
    pub(crate) fn claim(&mut self, extents: impl Iterator<Item = Extent> + Clone, safe: Sequence) -> Claim {
        let missing = extents.clone().filter(|extent| !self.extents.contains_key(extent)).count();
        assert!(missing <= self.limit, "a piece of a write touches few extents");
        if self.extents.len() + missing > self.limit {
            let keep: BTreeSet<Extent> = extents.clone().collect();
            let needed = self.extents.len() + missing - self.limit;
            self.evict(needed.max(BATCH), safe, &keep);
            if self.extents.len() + missing > self.limit {
                return Claim::Full;
            }
        }
        self.clock += 1;
        let (clock, mut all_active, mut added) = (self.clock, true, 0);
        for extent in extents {
            let entry = self.extents.entry(extent).or_insert_with(|| {
                added += 1;
                Entry { state: EntryState::Wanted, claims: 0, last: Sequence(0), touched: clock }
            });
            entry.claims += 1;
            entry.touched = clock;
            all_active &= entry.state == EntryState::Active;
        }
        self.wanted += added;
        if all_active { Claim::Active } else { Claim::Wait }
    }

    /// Whether all of these are in a durable record.
    pub(crate) fn are_active(&self, mut extents: impl Iterator<Item = Extent>) -> bool {
        extents.all(|extent| self.extents.get(&extent).is_some_and(|entry| entry.state == EntryState::Active))
    }

    /// Puts extents into the set that hold writes up to `last` which others may lack; beyond its limit, others may go.
    pub(crate) fn adopt(&mut self, extents: impl Iterator<Item = Extent>, last: Sequence) {
        for extent in extents {
            let entry = self.extents.entry(extent).or_insert_with(|| {
                self.wanted += 1;
                Entry { state: EntryState::Wanted, claims: 0, last, touched: self.clock }
            });
            entry.last = entry.last.max(last);
        }
    }

    /// The newest record says more than it should.
    pub(crate) fn shrink(&mut self) {
        self.shrunk = true;
    }

    /// Gives claims back; `last` is the write's sequence number, if it came to have one.
    pub(crate) fn give_back(&mut self, extents: impl Iterator<Item = Extent>, last: Option<Sequence>) {
        for extent in extents {
            let entry = self.extents.get_mut(&extent).expect("a claimed extent stays in the set");
            assert!(entry.claims > 0, "a claim is given back once");
            entry.claims -= 1;
            entry.last = entry.last.max(last.unwrap_or_default());
        }
    }

    /// Lets extents go that were not touched since the last call but one, and are safe.
    pub(crate) fn let_idle_go(&mut self, before: u64, safe: Sequence) {
        let count = self.extents.len();
        self.extents.retain(|_, entry| !(entry.is_free(safe) && entry.touched <= before));
        self.shrunk |= self.extents.len() < count;
    }

    /// The count of claims so far, to be passed to [`ActiveSet::let_idle_go`] later.
    pub(crate) fn clock(&self) -> u64 {
        self.clock
    }

    /// The number of the next record, of all extents in the set, if one is needed and none is being written. One that
    /// only shrinks the set is worth writing when `tidy`.
    pub(crate) fn next_record(&mut self, tidy: bool) -> Option<u64> {
        if self.writing || !(self.wanted > 0 || tidy && self.shrunk) {
            return None;
        }
        self.writing = true;
        self.shrunk = false;
        self.wanted = 0;
        self.serial += 1;
        for entry in self.extents.values_mut() {
            if entry.state == EntryState::Wanted {
                entry.state = EntryState::Recording;
            }
        }
        Some(self.serial)
    }

    /// The record that was being written is durable.
    pub(crate) fn record_written(&mut self) {
        assert!(self.writing, "a record is written once");
        self.writing = false;
        for entry in self.extents.values_mut() {
            if entry.state == EntryState::Recording {
                entry.state = EntryState::Active;
            }
        }
    }

    /// Whether no record is being written and the newest says what the set holds.
    pub(crate) fn is_recorded(&self) -> bool {
        !self.writing && self.wanted == 0 && !self.shrunk
    }

    /// The extents in the set.
    pub(crate) fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        self.extents.keys().copied()
    }

    /// The extents in the set with writes that are not safe.
    pub(crate) fn unsafe_extents(&self, safe: Sequence) -> impl Iterator<Item = Extent> + '_ {
        self.extents
            .iter()
            .filter(move |(_, entry)| entry.claims > 0 || entry.last > safe)
            .map(|(extent, _)| *extent)
    }

    /// How many extents are in the set.
    pub(crate) fn len(&self) -> usize {
        self.extents.len()
    }

    fn evict(&mut self, count: usize, safe: Sequence, keep: &BTreeSet<Extent>) {
        let mut free: Vec<(u64, Extent)> = self
            .extents
            .iter()
            .filter(|(extent, entry)| entry.is_free(safe) && !keep.contains(extent))
            .map(|(extent, entry)| (entry.touched, *extent))
            .collect();
        free.sort_unstable();
        for (_, extent) in free.into_iter().take(count) {
            self.extents.remove(&extent);
            self.shrunk = true;
        }
    }
}

impl Entry {
    fn is_free(&self, safe: Sequence) -> bool {
        self.claims == 0 && self.state == EntryState::Active && self.last <= safe
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::activity_log;

    fn extents(range: std::ops::Range<u32>) -> impl Iterator<Item = Extent> + Clone {
        range.map(Extent)
    }

    #[test]
    fn arrivals_share_a_record_and_a_hot_extent_needs_none() {
        let mut set = ActiveSet::new(0, activity_log::CAPACITY);
        assert_eq!(set.claim(extents(0..2), Sequence(0)), Claim::Wait);
        assert_eq!(set.claim(extents(5..6), Sequence(0)), Claim::Wait);
        assert!(set.next_record(false).is_some());
        assert_eq!(set.claim(extents(9..10), Sequence(0)), Claim::Wait);
        assert!(set.next_record(false).is_none(), "one record is written at a time");
        set.record_written();
        assert!(set.are_active(extents(0..2)) && set.are_active(extents(5..6)));
        assert!(!set.are_active(extents(9..10)), "it came after the record was made");
        assert_eq!(set.claim(extents(0..2), Sequence(0)), Claim::Active);
        assert!(set.next_record(false).is_some());
    }

    #[test]
    fn an_extent_leaves_only_when_its_last_write_is_safe() {
        let mut set = ActiveSet::new(0, activity_log::CAPACITY);
        let all = activity_log::CAPACITY as u32;
        assert_eq!(set.claim(extents(0..all), Sequence(0)), Claim::Wait);
        set.next_record(false).unwrap();
        set.record_written();
        assert_eq!(set.claim(extents(all..all + 1), Sequence(9)), Claim::Full, "all are claimed");
        set.give_back(extents(0..all), Some(Sequence(7)));
        assert_eq!(set.claim(extents(all..all + 1), Sequence(6)), Claim::Full, "write 7 is not safe");
        assert_eq!(set.claim(extents(all..all + 1), Sequence(7)), Claim::Wait);
        assert_eq!(set.len(), activity_log::CAPACITY + 1 - BATCH);
    }

    #[test]
    fn idle_extents_leave_with_the_next_tidy_record() {
        let mut set = ActiveSet::new(0, activity_log::CAPACITY);
        set.claim(extents(0..3), Sequence(0));
        set.next_record(false).unwrap();
        set.record_written();
        set.give_back(extents(0..3), Some(Sequence(1)));
        let before = set.clock();
        set.claim(extents(2..3), Sequence(0));
        set.give_back(extents(2..3), Some(Sequence(2)));
        set.let_idle_go(before, Sequence(2));
        assert_eq!(set.len(), 1);
        assert!(set.next_record(false).is_none() && set.next_record(true).is_some());
    }
}
