//! What the replica records: markers and changes of its superblock, one after the other, each durably before what depends
//! on it.

use super::{Action, Replica, StateChange};
use crate::layers::{LayerId, Purpose};
use crate::planted::{Bug, planted};
use crate::terms::DataState;
use crate::units::{Epoch, Session};
use crate::wire::message::{Commit, Committed, Message, ReleaseRecorded, ResyncReady};
use std::collections::VecDeque;

/// A message that a change is answered with once it is durable, in that session alone.
type Answer = Option<(Message, Session)>;

/// Changes of the superblock, made one after the other. They are bounded by what one session asks for.
#[derive(Debug, Default)]
pub(super) struct Changes {
    waiting: VecDeque<(StateChange, Answer)>,
    /// Whether the first one is being written.
    is_writing: bool,
}

impl Changes {
    /// Adds one after those before it.
    pub fn add(&mut self, change: StateChange, answer: Answer) {
        self.waiting.push_back((change, answer));
    }

    /// The next one to write, if none is being written and this one `may` be.
    pub fn begin(&mut self, may: impl Fn(&StateChange) -> bool) -> Option<&StateChange> {
        let (change, _) = self.waiting.front().filter(|(change, _)| !self.is_writing && may(change))?;
        self.is_writing = true;
        Some(change)
    }

    /// The one that was being written is durable, or could not be written.
    pub fn end(&mut self) -> (StateChange, Answer) {
        assert!(std::mem::take(&mut self.is_writing), "a state is written once");
        self.waiting.pop_front().expect("it was being written")
    }

    /// Nothing is written any more but what is being written.
    pub fn drop_unbegun(&mut self) {
        self.waiting.truncate(usize::from(self.is_writing));
    }

    /// Those that are not durable, in order.
    pub fn iter(&self) -> impl Iterator<Item = &StateChange> {
        self.waiting.iter().map(|(change, _)| change)
    }

    /// Whether any of them is so.
    pub fn any(&self, is_so: impl Fn(&StateChange) -> bool) -> bool {
        self.iter().any(is_so)
    }

    /// Whether all that was to be recorded is.
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty()
    }
}

/// What is known of the primary since the last commit, in memory alone (X4).
#[derive(Debug, Default)]
pub(super) struct Uncommitted {
    /// Whether it greeted with the number of a session that it had opened before: it was set back, and what it knows of this
    /// copy is of before.
    pub primary_went_back: bool,
    /// The last epoch of which a write came in a resync: of how far its primary was, this copy says nothing durable before its
    /// commit.
    pub told: Epoch,
}

impl Replica {
    /// The marker is durable, or could not be written.
    pub fn handle_marker_written(&mut self, written: bool) {
        let mark = self.marker.writing.take().expect("a marker is written once");
        if !written {
            return self.fail();
        }
        (self.marker.durable, self.marker.is_told) = (mark, false);
        self.go_on();
    }

    /// The superblock is durable, or could not be written.
    pub fn handle_state_written(&mut self, written: bool) {
        let (change, answer) = self.changes.end();
        if !written {
            return self.fail();
        }
        let (rollback, undo) = (self.superblock.layers.rollback(), self.superblock.layers.undo());
        change.apply(&mut self.superblock);
        match change {
            StateChange::Commit { position, .. } => {
                self.position = position;
                self.uncommitted = Uncommitted::default();
                self.maps.clear();
                self.log_is_void();
                self.end_gap(rollback);
                let session = answer.as_ref().map(|(_, session)| *session);
                if let Some(link) = self.link.as_mut().filter(|link| Some(link.session) == session) {
                    // Those that began while this copy was being resynced were not streamed.
                    link.generation = self.superblock.lineage.first().copied().unwrap_or_default();
                    link.generation_came = false;
                }
            }
            StateChange::GiveRollbackUp => self.rollback_is_given_up(rollback),
            StateChange::Forget => self.history_is_forgotten(undo),
            StateChange::Generation(generation) => {
                if let Some(link) = &mut self.link
                    && link.beginning
                {
                    link.beginning = false;
                    (link.generation, link.generation_came) = (generation, true);
                }
            }
            StateChange::Release => self.tidy_log(),
            StateChange::Begin { .. } => {
                let session = answer.as_ref().map(|(_, session)| *session);
                if let Some(link) = self.link.as_mut().filter(|link| Some(link.session) == session) {
                    // The commit of this resync is sent later, and its lineage is newer than whatever came so far.
                    link.generation_came = false;
                }
            }
            StateChange::Keep(layer) => self.keeps(layer),
            StateChange::Follow { .. } | StateChange::Behind => {}
        }
        if let Some((answer, session)) = answer
            && self.link.as_ref().is_some_and(|link| link.session == session)
        {
            self.actions.push_back(Action::Send(answer));
        }
        self.go_on();
    }

    /// Begins a resync that was announced, when nothing else is being recorded.
    pub(super) fn begin_resync(&mut self) {
        let is_busy = self.commit.is_some() || !self.changes.is_empty() || !self.gap.is_idle();
        let Some(link) = self.link.as_mut().filter(|link| link.announced && !is_busy) else { return };
        link.announced = false;
        if self.superblock.data == DataState::Consistent {
            if let Some(layer) = self.unused_history() {
                return self.record_begin(Some(layer), false);
            }
            self.begin_layer(Purpose::Rollback);
        } else {
            self.record_begin(self.superblock.layers.rollback(), false);
        }
    }

    /// Records a release once this replica has what it is about: the generation comes by another stream.
    pub(super) fn record_release(&mut self) {
        let superblock = &self.superblock;
        let Some(link) = &mut self.link else { return };
        let has_all =
            superblock.data == DataState::Consistent && link.queue.is_empty() && link.live_bytes == 0;
        if !has_all || link.release.is_none() || superblock.lineage.first() != link.release.as_ref() {
            return;
        }
        link.release = None;
        let session = link.session;
        let answer = (ReleaseRecorded { session }.into(), session);
        self.changes.add(StateChange::Release, Some(answer));
    }

    pub(super) fn record_begin(&mut self, rollback: Option<LayerId>, keep: bool) {
        let Some(link) = &self.link else { return };
        let (session, source) = (link.session, link.fence);
        // A host that errs in one of these ways is found out by the name of the session, too: it must be by its own rule.
        let is_left_out = [Bug::IgnoreEnds, Bug::KeepMaps, Bug::CountRecovered].into_iter().any(planted);
        if self.marker.durable.session != session && !is_left_out {
            // Before anything is overwritten it is known in which session: a primary that is set back to before it has
            // marked nothing of what it sent in it (X4).
            self.marker.copies = Some((session, 0));
        }
        let answer = (ResyncReady { session }.into(), session);
        self.change_state(StateChange::Begin { source, rollback, keep }, Some(answer));
    }

    /// Records a commit once its extents are in the log.
    pub(super) fn start_commit(&mut self) {
        if self.commit.is_none() || !self.has_adopted_extents() {
            return;
        }
        let (commit, session) = self.commit.take().expect("it was looked at");
        let Commit { position, mut lineage, mode, given, .. } = commit;
        let Some(link) = self.link.as_ref().filter(|link| link.session == session) else { return };
        // One that began after the commit was sent may have come before it, by the other stream: one at the most. What
        // was the newest before a resync may be so old by now that the primary's lineage has no room for it.
        let being_recorded = self.changes.iter().filter_map(|change| match change {
            StateChange::Generation(generation) => Some(*generation),
            _ => None,
        });
        for came in link.generation_came.then_some(link.generation).into_iter().chain(being_recorded) {
            if !lineage.contains(&came) {
                lineage.insert(0, came);
            }
        }
        let answer = (Committed { session, position }.into(), session);
        let source = link.fence;
        let change = StateChange::Commit { position, lineage, mode, given, source };
        self.changes.add(change, Some(answer));
    }

    /// Writes the marker of the last durable epoch and copies when the one before is durable.
    pub(super) fn write_marker(&mut self) {
        let marker = &mut self.marker;
        if marker.writing.is_some() || marker.waiting.is_none() && marker.copies.is_none() {
            return;
        }
        let mut mark = marker.durable;
        mark.position = marker.waiting.take().unwrap_or(mark.position);
        (mark.session, mark.copies) = marker.copies.take().unwrap_or((mark.session, mark.copies));
        marker.writing = Some(mark);
        self.actions.push_back(Action::WriteMarker(mark));
    }

    /// Records a change after those before it; nothing where the replica has failed.
    pub(super) fn change_state(&mut self, change: StateChange, answer: Option<(Message, Session)>) {
        if self.failed {
            return;
        }
        self.changes.add(change, answer);
        self.go_on();
    }

    pub(super) fn write_state(&mut self) {
        // A resync begins when the marker names its session.
        let names = self.marker.writing.is_some() || self.marker.copies.is_some();
        if let Some(change) =
            self.changes.begin(|change| !(names && matches!(change, StateChange::Begin { .. })))
        {
            self.actions.push_back(Action::WriteState(change.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_made_one_after_the_other() {
        let mut changes = Changes::default();
        changes.add(StateChange::Behind, None);
        changes.add(StateChange::Forget, None);
        assert_eq!(changes.begin(|_| false), None);
        assert_eq!(changes.begin(|_| true), Some(&StateChange::Behind));
        assert_eq!(changes.begin(|_| true), None, "one is being written");
        changes.add(StateChange::Release, None);
        changes.drop_unbegun();
        assert_eq!(changes.iter().collect::<Vec<_>>(), [&StateChange::Behind]);
        assert_eq!(changes.end(), (StateChange::Behind, None));
        assert!(changes.is_empty());
    }
}
