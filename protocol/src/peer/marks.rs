//! What is marked for a replica: its dirty map in memory and in its file, and what is safe meanwhile (D1).
//!
//! A mark reaches the file late. Until it does, its write is named by [`Marks::first_unwritten`], and its extent stays in the
//! activity log. A file that can't be written says first that all is dirty, which takes no room, and then nothing any more:
//! what it would say is remembered by the activity log.

use super::{Action, Peer, State};
use crate::dirty_map::{DirtyMap, MapChanges};
use crate::disk::dirty_map::Base;
use crate::ranges::ByteRange;
use crate::terms::Mode;
use crate::units::{GenerationId, Sequence, Session, Time};
use std::ops::Range;
use std::time::Duration;

/// How long changes of a map stay in memory, where nothing waits for them.
const MAP_TIME: Duration = Duration::from_secs(1);

/// From so many failures in a row on the header of a map has failed, too.
const HEADER_FAILURES: u32 = 3;

/// The dirty map of a replica, in memory and in its file.
#[derive(Debug)]
pub(super) struct Marks {
    pub map: DirtyMap,
    /// Blocks of the map that were written, or that were compared: the others may well be the same there (R4). Forgotten
    /// at a restart, after which all that has a bit of its own counts as written.
    pub certain: DirtyMap,
    /// Whether the replica has what is absent on its primary (S4).
    pub is_source: bool,
    /// The first write that was marked since the map was last handed out for writing.
    unwritten: Option<Sequence>,
    writing: Option<Writing>,
    written_at: Time,
    /// Whether the last attempt failed, and the next one is not due.
    is_held: bool,
    /// How often in a row the file could not be written.
    failures: u32,
}

/// The map as it is being written to its file.
#[derive(Debug)]
struct Writing {
    /// The first write whose mark it has, and the file lacks.
    first: Option<Sequence>,
    /// Whether it has all that the linked replica said of itself.
    has_union: bool,
}

/// What a write of the map's file has come to.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Written {
    /// The file holds what it was to hold; whether all that the linked replica said of itself is in it.
    Durably { has_union: bool },
    /// What it holds is unknown: all of it is written again.
    Unknown,
    /// As before; and its pages are given up for a header that says that all is dirty.
    GivenUp,
}

impl Marks {
    /// The map as recovered, or full.
    pub fn new(map: DirtyMap) -> Self {
        Self {
            certain: map.of_single_bits(),
            map,
            is_source: false,
            unwritten: None,
            writing: None,
            written_at: Time::default(),
            is_held: false,
            failures: 0,
        }
    }

    /// A write that is not streamed: the blocks differ, and are not asked about before they are copied.
    pub fn mark(&mut self, blocks: Range<u64>, sequence: Sequence) {
        self.certain.mark(blocks.clone());
        self.mark_doubtful(blocks, sequence);
    }

    /// The blocks may differ, and may not (R4).
    pub fn mark_doubtful(&mut self, blocks: Range<u64>, sequence: Sequence) {
        // A block that is dirty already is in the file, or an earlier mark waits to be.
        if self.map.mark(blocks) {
            self.note_unwritten(sequence);
        }
    }

    /// All blocks may differ: the header says it, in place of a bit for each block in memory and on disk.
    pub fn mark_everything(&mut self, sequence: Sequence) {
        self.map.begin_anew(self.map.base());
        self.note_unwritten(sequence);
    }

    /// As [`Marks::mark_everything`], of a copy of which nothing is known; relative to this from now on.
    pub fn begin_anew(&mut self, base: Base, sequence: Sequence) {
        self.map.begin_anew(base);
        self.certain.clear(0..u64::MAX);
        self.note_unwritten(sequence);
    }

    fn note_unwritten(&mut self, sequence: Sequence) {
        self.unwritten = Some(self.unwritten.map_or(sequence, |first| first.min(sequence)));
    }

    /// Whether its file may be written now, if it lacks anything.
    pub fn may_be_written(&self) -> bool {
        self.writing.is_none() && !self.is_held
    }

    /// What is to be written to the file; nothing where it lacks nothing.
    pub fn take_changes(&mut self, has_union: bool) -> Option<MapChanges> {
        assert!(self.may_be_written(), "a map is written once at a time");
        if !self.map.has_changes() {
            return None;
        }
        self.writing = Some(Writing { first: self.unwritten.take(), has_union });
        Some(self.map.take_changes())
    }

    /// The file was written, or could not be.
    pub fn was_written(&mut self, written: bool, now: Time) -> Written {
        let Writing { first, has_union } = self.writing.take().expect("a map is written once at a time");
        (self.written_at, self.is_held) = (now, !written);
        self.failures = if written { 0 } else { self.failures + 1 };
        if written {
            return Written::Durably { has_union };
        }
        self.unwritten = [first, self.unwritten].into_iter().flatten().min();
        self.map.forget_written();
        if self.failures <= 1 || self.map.is_full() {
            return Written::Unknown;
        }
        // The pages can't be written, as when the disk of the state folder is full: "all is dirty" takes no more than the
        // header, whose place is there already. Better a full copy later than writes that wait for ever (W7).
        self.map.begin_anew(self.map.base());
        // The file says "clean" of blocks that are dirty now, so a write to one marks nothing new and yet is not safe:
        // nothing is until the header is written (D1).
        self.unwritten = Some(Sequence(1));
        Written::GivenUp
    }

    /// What is being written is from before what the linked replica says of itself.
    pub fn union_comes(&mut self) {
        self.writing.iter_mut().for_each(|writing| writing.has_union = false);
    }

    /// When the file is written by itself, if it lacks anything and is not being written.
    pub fn timeout(&self) -> Option<Time> {
        (self.map.has_changes() && self.writing.is_none()).then(|| self.written_at.after(MAP_TIME))
    }

    /// Whether the file is to be written by itself by now, also where it failed before.
    pub fn is_due(&mut self, now: Time) -> bool {
        let is_due = now >= self.written_at.after(MAP_TIME);
        self.is_held &= !is_due;
        is_due
    }

    /// The first write whose mark the file lacks.
    pub fn first_unwritten(&self) -> Option<Sequence> {
        let being_written = self.writing.as_ref().and_then(|writing| writing.first);
        [self.unwritten, being_written].into_iter().flatten().min()
    }

    /// Whether the file says exactly what memory does.
    pub fn is_saved(&self) -> bool {
        self.writing.is_none() && !self.map.has_changes()
    }

    /// Whether the last attempt to write the file failed.
    pub fn has_failed(&self) -> bool {
        self.failures > 0
    }

    /// Whether not even the header could be written, when the pages were given up already.
    pub fn is_out_of_reach(&self) -> bool {
        self.failures >= HEADER_FAILURES
    }
}

impl Peer {
    /// Everything up to this write is durable on the replica or durably in its map (D1); `last` is the newest write.
    pub(crate) fn safe_up_to(&self, last: Sequence) -> Sequence {
        let unacknowledged = match &self.state {
            State::Linked(link) if !link.spilled => link.window.oldest().map(|(sequence, _)| sequence),
            _ => None,
        };
        let first_unsafe = [unacknowledged, self.marks.first_unwritten()].into_iter().flatten().min();
        first_unsafe.map_or(last, |first| Sequence(first.0 - 1))
    }

    /// Blocks of extents that were active before a restart, or that the replica reports, may differ.
    pub(crate) fn mark_suspect(&mut self, range: ByteRange, before: Sequence) {
        self.answered.suspect();
        if range.length < self.size_bytes || self.marks.map.is_full() {
            return self.marks.mark_doubtful(range.blocks(self.block_size), before.next());
        }
        self.marks.mark_everything(before.next());
    }

    /// The map's file holds what [`Action::WriteMap`] said, or could not be written; then it is tried again later.
    pub fn handle_map_written(&mut self, written: bool, now: Time) {
        let written_as = self.marks.was_written(written, now);
        self.denial.was_written(written);
        self.word.was_written(written);
        let State::Linked(link) = &mut self.state else { return };
        match written_as {
            Written::Durably { has_union } => link.union_is_durable |= has_union,
            Written::GivenUp if link.phase().streams() => self.left |= link.break_off(&mut self.answered),
            Written::Unknown | Written::GivenUp => {}
        }
    }

    /// What is known of the replica goes to the map's file with the next write.
    pub(crate) fn save_known(&mut self) {
        self.marks.map.save_known();
    }

    /// Writes the map's file, if it lacks anything and is not being written.
    pub(crate) fn write_map(&mut self) {
        if !self.marks.may_be_written() {
            return;
        }
        // Worth a header of its own only where it says it no more.
        let (base, lacks_answered) = (self.marks.map.base(), self.lacks_answered());
        let denies = self.denial.may_be_said(base, self.mode == Mode::Sync, lacks_answered);
        if !denies || self.marks.map.has_changes() {
            self.marks.map.note_unanswered(denies);
        }
        let has_union = matches!(self.state, State::Linked(_));
        let Some(changes) = self.marks.take_changes(has_union) else { return };
        if changes.header.is_some() {
            self.denial.is_being_written(denies, base.generation);
            self.word.is_being_written(self.marks.map.given());
        }
        self.actions.push_back(Action::WriteMap(changes));
    }

    /// Whether the primary waits for replicas rather than going on without them.
    pub(crate) fn set_withholds(&mut self, withholds: bool) {
        self.denial.allow(withholds);
    }

    /// Whether an answer for all writes up to this one, in the generation `newest`, must wait: the map's file denies it. It is
    /// written then that this is so no more.
    pub(crate) fn holds_answer(&mut self, sequence: Sequence, newest: Option<GenerationId>) -> bool {
        let is_sync = self.mode == Mode::Sync;
        let follows = is_sync && self.may_follow();
        let is_there = is_sync && self.answered.is_kept(sequence);
        if !self.denial.contradicts(follows, is_there, newest) {
            return false;
        }
        if self.denial.take_back(follows, newest) {
            self.answered.forget();
        }
        self.write_map();
        true
    }

    /// Whether the map's file holds all marks.
    #[must_use]
    pub(crate) fn is_written(&self) -> bool {
        self.first_unwritten().is_none()
    }

    /// Whether not even the map's header could be written, when the pages were given up already: whoever waits for the
    /// map may wait for ever. What it would say is remembered by the activity log, whose extents stay active until the
    /// map is written (D1).
    #[must_use]
    pub(crate) fn map_is_out_of_reach(&self) -> bool {
        self.marks.is_out_of_reach()
    }

    /// The first write whose mark the map's file lacks.
    pub(crate) fn first_unwritten(&self) -> Option<Sequence> {
        self.marks.first_unwritten()
    }

    /// Whether the map's file says exactly what memory does.
    pub(crate) fn is_saved(&self) -> bool {
        self.marks.is_saved()
    }

    /// Above which number the next session must be, once it is durable that all may differ: before, a crash would leave a map
    /// that says "clean" and a number that says that nothing was lost.
    pub(crate) fn reused(&self) -> Option<Session> {
        self.reused.filter(|_| self.is_saved())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::units::{BlockSize, HostId, VolumeId};

    const BLOCKS: u64 = 64;

    fn clean() -> Marks {
        let (volume, host, size) = (VolumeId([1; 16]), HostId([2; 32]), BlockSize::default());
        let map = DirtyMap::full(volume, host, BLOCKS * size.bytes(), size).clean(Base::default());
        let mut marks = Marks::new(map);
        marks.take_changes(false);
        marks.was_written(true, Time::default());
        marks
    }

    fn at(seconds: u64) -> Time {
        Time(Duration::from_secs(seconds))
    }

    #[test]
    fn a_mark_is_unsafe_until_the_write_that_has_it_has_ended() {
        let mut marks = clean();
        assert!(marks.is_saved() && marks.first_unwritten().is_none());
        marks.mark(1..2, Sequence(7));
        assert!(marks.take_changes(false).is_some());
        marks.mark(2..3, Sequence(9));
        assert_eq!(marks.first_unwritten(), Some(Sequence(7)));
        assert_eq!(marks.was_written(true, at(1)), Written::Durably { has_union: false });
        assert_eq!(marks.first_unwritten(), Some(Sequence(9)), "that write did not have it");
        // A block that is marked already is in the file.
        marks.mark(1..2, Sequence(8));
        assert_eq!(marks.first_unwritten(), Some(Sequence(9)));
    }

    #[test]
    fn a_file_that_fails_is_tried_again_later_and_then_says_that_all_is_dirty() {
        let mut marks = clean();
        marks.mark(1..2, Sequence(7));
        let mut failed = Vec::new();
        for second in [10, 20, 30] {
            assert!(marks.is_due(at(second)) && marks.take_changes(false).is_some());
            failed.push(marks.was_written(false, at(second)));
            assert!(!marks.may_be_written() && marks.has_failed());
            assert!(!marks.is_due(at(second)) && marks.timeout() > Some(at(second)));
        }
        assert_eq!(failed, [Written::Unknown, Written::GivenUp, Written::Unknown]);
        assert!(marks.map.is_full() && marks.is_out_of_reach());
        assert_eq!(marks.first_unwritten(), Some(Sequence(1)), "the file says that clean blocks are");
        assert!(marks.is_due(at(40)) && marks.take_changes(false).is_some());
        assert_eq!(marks.was_written(true, at(40)), Written::Durably { has_union: false });
        assert!(marks.is_saved() && !marks.is_out_of_reach());
    }

    #[test]
    fn a_write_that_began_before_the_union_came_does_not_have_it() {
        let mut marks = clean();
        marks.mark(1..2, Sequence(1));
        assert!(marks.take_changes(true).is_some());
        marks.union_comes();
        assert_eq!(marks.was_written(true, at(1)), Written::Durably { has_union: false });
        marks.mark(2..3, Sequence(2));
        assert!(marks.take_changes(true).is_some());
        assert_eq!(marks.was_written(true, at(2)), Written::Durably { has_union: true });
    }
}
