//! The activity log of a primary: which extents are active, when a record may be written, and how writes wait for room
//! (W2, W7, D1).
//!
//! The log of before a restart may be overwritten only once every map durably holds what it said, and the backing what was
//! written then ([`Log::free`]). An extent leaves when its last write is safe, and was not touched for [`IDLE_TIME`], or its
//! place is needed.

use crate::active_set::{ActiveSet, Claim};
use crate::disk::{Page, activity_log};
use crate::units::{Extent, Sequence, Time};
use std::time::Duration;

/// How long an extent stays active without a write.
const IDLE_TIME: Duration = Duration::from_secs(5);
/// How long writes wait for replicas to acknowledge what fills the activity log.
const FULL_TIME: Duration = Duration::from_millis(100);

/// A primary's activity log.
#[derive(Debug)]
pub(super) struct Log {
    set: ActiveSet,
    /// Whether records may be written.
    is_free: bool,
    /// Whether a record could not be written: no other one is.
    has_failed: bool,
    /// Since when extents may be idle, and the count of claims then.
    idle: Option<(Time, u64)>,
    /// Since when writes wait because the set is full.
    full_since: Option<Time>,
}

impl Log {
    /// The log after a restart, whose newest record has this number. No more than so many extents are active at once.
    pub fn new(serial: u64, active_extents: usize) -> Self {
        let set = ActiveSet::new(serial, active_extents);
        Self { set, is_free: false, has_failed: false, idle: None, full_since: None }
    }

    /// Claims extents for a piece, where writes up to `safe` are durable here and on each peer, or in its map.
    pub fn claim(
        &mut self,
        extents: impl Iterator<Item = Extent> + Clone,
        safe: Sequence,
        now: Time,
    ) -> Claim {
        let claim = self.set.claim(extents, safe);
        match claim {
            Claim::Full => drop(self.full_since.get_or_insert(now)),
            Claim::Active | Claim::Wait => self.full_since = None,
        }
        claim
    }

    /// Whether all of these are in a durable record.
    pub fn are_active(&self, extents: impl Iterator<Item = Extent>) -> bool {
        self.set.are_active(extents)
    }

    /// Gives a piece's claims back; `last` is its sequence number, if it came to have one.
    pub fn give_back(&mut self, extents: impl Iterator<Item = Extent>, last: Option<Sequence>) {
        self.set.give_back(extents, last);
    }

    /// A write is under way: from now on its extents may become idle.
    pub fn is_used(&mut self, now: Time) {
        self.idle.get_or_insert((now, self.set.clock()));
    }

    /// Nothing waits for room any more.
    pub fn wait_no_more(&mut self) {
        self.full_since = None;
    }

    /// Whether writes have waited for room for so long that the windows' blocks go to the maps; once in that time.
    pub fn is_full_for_long(&mut self, now: Time) -> bool {
        let is_over = self.full_since.is_some_and(|since| now >= since.after(FULL_TIME));
        if is_over {
            self.full_since = Some(now);
        }
        is_over
    }

    /// Whether extents may have been idle for long enough; once in that time.
    pub fn has_idled(&self, now: Time) -> bool {
        self.idle.is_some_and(|(since, _)| now >= since.after(IDLE_TIME))
    }

    /// Lets extents go that were idle since this was last asked for.
    pub fn let_idle_go(&mut self, safe: Sequence, now: Time) {
        let Some((_, before)) = self.idle else { return };
        self.set.let_idle_go(before, safe);
        self.idle = (self.set.len() > 0).then(|| (now, self.set.clock()));
    }

    /// Lets all extents go that can.
    pub fn let_go(&mut self, safe: Sequence) {
        self.set.let_idle_go(u64::MAX, safe);
    }

    /// When [`Log::is_full_for_long`] or [`Log::has_idled`] will be so.
    pub fn timeouts(&self) -> [Option<Time>; 2] {
        let idle = self.idle.map(|(since, _)| since.after(IDLE_TIME));
        [idle, self.full_since.map(|since| since.after(FULL_TIME))]
    }

    /// Whether records may be written.
    pub fn is_free(&self) -> bool {
        self.is_free
    }

    /// Records may be written: what the log of before the restart said is durable elsewhere.
    pub fn free(&mut self) {
        self.is_free = true;
    }

    /// The next record, and where it goes in the file, if one is needed and may be written. One that only shrinks the set is
    /// worth writing when `tidy`.
    pub fn next_record(&mut self, tidy: bool) -> Option<(u64, Box<Page>)> {
        if !self.is_free || self.has_failed {
            return None;
        }
        let serial = self.set.next_record(tidy)?;
        Some((
            activity_log::record_offset(serial),
            Box::new(activity_log::encode(self.set.extents(), serial)),
        ))
    }

    /// The record that was being written is durable.
    pub fn record_written(&mut self) {
        self.set.record_written();
    }

    /// The record could not be written. Without its log the volume can't take writes: nothing would remember them (W2).
    pub fn fail(&mut self) {
        self.has_failed = true;
    }

    /// Whether no record is being written and the newest says what is active.
    pub fn is_recorded(&self) -> bool {
        self.set.is_recorded()
    }

    /// How many extents are active.
    pub fn len(&self) -> usize {
        self.set.len()
    }

    /// The active extents.
    pub fn extents(&self) -> impl Iterator<Item = Extent> + '_ {
        self.set.extents()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(milliseconds: u64) -> Time {
        Time(Duration::from_millis(milliseconds))
    }

    /// A log of which these are active.
    fn active(range: std::ops::Range<u32>) -> Log {
        let mut log = Log::new(0, 128);
        log.claim(extents(range), Sequence(0), at(0));
        log.free();
        assert!(log.next_record(false).is_some());
        log.record_written();
        log
    }

    fn extents(range: std::ops::Range<u32>) -> impl Iterator<Item = Extent> + Clone {
        range.map(Extent)
    }

    #[test]
    fn no_record_is_written_before_the_old_log_is_held_elsewhere_nor_after_a_failure() {
        let mut log = Log::new(7, 128);
        assert_eq!(log.claim(extents(0..1), Sequence(0), at(0)), Claim::Wait);
        assert!(log.next_record(true).is_none());
        log.free();
        let (offset, _) = log.next_record(false).expect("an extent waits for it");
        assert_eq!(offset, activity_log::record_offset(8));
        assert!(log.next_record(true).is_none() && !log.is_recorded(), "one at a time");
        log.record_written();
        assert!(log.are_active(extents(0..1)) && log.is_recorded());
        log.claim(extents(1..2), Sequence(0), at(0));
        log.fail();
        assert!(log.next_record(true).is_none());
    }

    #[test]
    fn a_full_log_is_told_of_as_long_as_writes_wait_for_room() {
        let mut log = active(0..128);
        assert!(!log.is_full_for_long(at(1000)), "nothing waits");
        assert_eq!(log.claim(extents(200..201), Sequence(0), at(1000)), Claim::Full);
        assert_eq!(log.claim(extents(200..201), Sequence(0), at(1050)), Claim::Full);
        assert!(!log.is_full_for_long(at(1099)) && log.is_full_for_long(at(1100)));
        assert!(!log.is_full_for_long(at(1101)) && log.is_full_for_long(at(1200)));
        log.give_back(extents(0..128), Some(Sequence(1)));
        assert_eq!(log.claim(extents(200..201), Sequence(1), at(1201)), Claim::Wait);
        assert!(!log.is_full_for_long(at(9000)));
    }

    #[test]
    fn an_extent_is_idle_when_nothing_wrote_to_it_from_one_look_to_the_next() {
        let mut log = active(0..2);
        log.give_back(extents(0..2), Some(Sequence(1)));
        log.is_used(at(0));
        log.claim(extents(1..2), Sequence(0), at(0));
        log.give_back(extents(1..2), Some(Sequence(2)));
        assert!(!log.has_idled(at(4999)) && log.has_idled(at(5000)));
        log.let_idle_go(Sequence(2), at(5000));
        assert_eq!(log.extents().collect::<Vec<_>>(), [Extent(1)], "it was touched since");
        log.let_idle_go(Sequence(1), at(10_000));
        assert_eq!(log.len(), 1, "it is not safe");
        log.let_go(Sequence(2));
        assert_eq!(log.len(), 0);
    }
}
