//! The peer's dirty map: marks, when its file is written, and what is safe meanwhile (D1).

use super::{Action, Peer, State};
use crate::ranges::ByteRange;
use crate::terms::Mode;
use crate::units::{GenerationId, Sequence, Session, Time};
use std::ops::Range;

/// From so many failures in a row on the header of a map has failed, too.
const HEADER_FAILURES: u32 = 3;

impl Peer {
    /// Everything up to this write is durable on the replica or durably in its map (D1); `last` is the newest write.
    pub(crate) fn safe_up_to(&self, last: Sequence) -> Sequence {
        let unacknowledged = match &self.state {
            State::Linked(link) if !link.spilled => link.window.oldest().map(|(sequence, _)| sequence),
            _ => None,
        };
        let first_unsafe = [unacknowledged, self.unwritten, self.being_written].into_iter().flatten().min();
        first_unsafe.map_or(last, |first| Sequence(first.0 - 1))
    }

    /// Blocks of extents that were active before a restart, or that the replica reports, may differ.
    pub(crate) fn mark_suspect(&mut self, range: ByteRange, before: Sequence) {
        self.answered.suspect();
        if range.length < self.size_bytes || self.map.is_full() {
            return self.mark_doubtful(range.blocks(self.block_size), before.next());
        }
        // The header says it, in place of a bit for each block in memory and on disk.
        self.map.begin_anew(self.map.base());
        self.note_unwritten(before.next());
    }

    /// The map's file holds what [`Action::WriteMap`] said, or could not be written; then it is tried again later.
    pub fn handle_map_written(&mut self, written: bool, now: Time) {
        assert!(self.writing_map, "a map is written once at a time");
        self.writing_map = false;
        self.map_written_at = now;
        self.map_failed = !written;
        self.map_failures = if written { 0 } else { self.map_failures + 1 };
        self.denial.was_written(written);
        self.word.was_written(written);
        if let State::Linked(link) = &mut self.state {
            link.union_is_durable |= written && self.writing_union;
        }
        let first = self.being_written.take();
        if !written {
            // What the file holds is unknown: all of it is written again.
            self.unwritten = [first, self.unwritten].into_iter().flatten().min();
            self.map.forget_written();
            if self.map_failures > 1 {
                self.give_the_map_up();
            }
        }
    }

    /// The map's pages can't be written, as when the disk of the state folder is full: "all is dirty" takes no more
    /// than the header, whose place is there already. Better a full copy later than writes that wait for ever (W7).
    fn give_the_map_up(&mut self) {
        if self.map.is_full() {
            return;
        }
        self.map.begin_anew(self.map.base());
        // The file says "clean" of blocks that are dirty now, so a write to one marks nothing new and yet is not safe:
        // nothing is until the header is written (D1).
        self.unwritten = Some(Sequence(1));
        if let State::Linked(link) = &mut self.state
            && link.phase().streams()
        {
            self.left |= link.break_off(&mut self.answered);
        }
    }

    /// What is known of the replica goes to the map's file with the next write.
    pub(crate) fn save_known(&mut self) {
        self.map.save_known();
    }

    /// Writes the map's file, if it lacks anything and is not being written.
    pub(crate) fn write_map(&mut self) {
        if self.writing_map || self.map_failed {
            return;
        }
        // Worth a header of its own only where it says it no more.
        let (base, lacks_answered) = (self.map.base(), self.lacks_answered());
        let denies = self.denial.may_be_said(base, self.mode == Mode::Sync, lacks_answered);
        if !denies || self.map.has_changes() {
            self.map.note_unanswered(denies);
        }
        if !self.map.has_changes() {
            return;
        }
        self.writing_map = true;
        self.writing_union = matches!(self.state, State::Linked(_));
        self.being_written = self.unwritten.take();
        let changes = self.map.take_changes();
        if changes.header.is_some() {
            self.denial.is_being_written(denies, base.generation);
            self.word.is_being_written(self.map.given());
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
        self.map_failures >= HEADER_FAILURES
    }

    /// The first write whose mark the map's file lacks.
    pub(crate) fn first_unwritten(&self) -> Option<Sequence> {
        [self.unwritten, self.being_written].into_iter().flatten().min()
    }

    /// Whether the file says exactly what memory does.
    pub(crate) fn is_saved(&self) -> bool {
        !self.writing_map && !self.map.has_changes()
    }

    /// Above which number the next session must be, once it is durable that all may differ: before, a crash would leave a map
    /// that says "clean" and a number that says that nothing was lost.
    pub(crate) fn reused(&self) -> Option<Session> {
        self.reused.filter(|_| self.is_saved())
    }

    /// A write that is not streamed: the blocks differ, and are not asked about before they are copied.
    pub(super) fn mark(&mut self, blocks: Range<u64>, sequence: Sequence) {
        self.certain.mark(blocks.clone());
        self.mark_doubtful(blocks, sequence);
    }

    /// The blocks may differ, and may not (R4).
    pub(super) fn mark_doubtful(&mut self, blocks: Range<u64>, sequence: Sequence) {
        // A block that is dirty already is in the file, or an earlier mark waits to be.
        if self.map.mark(blocks) {
            self.note_unwritten(sequence);
        }
    }

    fn note_unwritten(&mut self, sequence: Sequence) {
        self.unwritten = Some(self.unwritten.map_or(sequence, |first| first.min(sequence)));
    }
}
