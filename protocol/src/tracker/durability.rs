//! What is durable: syncs of the backing and the flushes that they answer, the log and the maps that must be written
//! before something else may happen, and what follows when one of them fails (W5).

use super::{Action, RequestId, Session, Tracker, WriteFailed};
use crate::units::{Sequence, Time};

/// What is durable on the local backing.
#[derive(Debug, Default)]
pub(super) struct Local {
    pub(super) durable: Sequence,
    /// Whether a sync has covered what was written before the volume was opened.
    pub(super) opened: bool,
    /// What the running sync covers, and the flushes that it answers.
    pub(super) running: Option<(Sequence, Vec<RequestId>)>,
    pub(super) wanted: bool,
    pub(super) flushes: Vec<RequestId>,
    pub(super) failed: bool,
}

impl Tracker {
    /// A sync of the backing has ended.
    pub fn handle_synced(&mut self, synced: bool, now: Time) {
        let (covers, flushes) = self.local.running.take().expect("a sync ends once");
        if synced && !self.local.failed {
            self.local.durable = covers;
            self.local.opened = true;
            self.free_log();
            for flush in flushes {
                self.answer(flush, Ok(()));
            }
        } else {
            for flush in flushes {
                self.fail(flush);
            }
            self.fail_backing();
        }
        self.begin_arrivals(now);
        self.drive(now);
    }

    pub(super) fn flush(&mut self, id: RequestId) {
        self.close_epoch();
        if self.local.durable == self.last && self.local.running.is_none() {
            return self.answer(id, Ok(()));
        }
        self.local.flushes.push(id);
        self.local.wanted = true;
    }

    /// Everything up to this write is durable here and, for each replica, there or in its map (D1).
    pub(super) fn safe(&self) -> Sequence {
        let sessions = self.sessions.values().map(|session| session.safe_up_to(self.last));
        sessions.chain([self.local.durable]).min().expect("the chain is not empty")
    }

    pub(super) fn write_maps(&mut self) {
        for session in self.sessions.values_mut() {
            session.write_map();
        }
    }

    pub(super) fn write_log(&mut self, tidy: bool) {
        if !self.log_is_free || self.log_failed {
            return;
        }
        if let Some((offset, record)) = self.activity.next_record(tidy) {
            self.actions.push_back(Action::WriteLog { offset, record });
        }
    }

    /// The log may be overwritten once every map durably holds what it said, and the backing what was written then.
    pub(super) fn free_log(&mut self) {
        if !self.log_is_free {
            self.log_is_free = self.local.opened && self.sessions.values().all(Session::is_written);
            self.write_maps();
        }
    }

    pub(super) fn start_sync(&mut self) {
        if !self.local.wanted || self.local.running.is_some() || self.local.failed {
            return;
        }
        let complete = self.under_way.keys().next().map_or(self.last, |first| Sequence(first.0 - 1));
        if self.local.flushes.is_empty() && complete == self.local.durable {
            // Where writes are under way, the sync is wanted when they have ended.
            self.local.wanted = complete < self.last;
            return;
        }
        self.local.wanted = false;
        self.local.running = Some((complete, std::mem::take(&mut self.local.flushes)));
        self.actions.push_back(Action::SyncLocal);
    }

    /// What came after the last good sync is not durable, and nothing is taken any more (W5).
    pub(super) fn fail_backing(&mut self) {
        self.local.failed = true;
        self.local.wanted = false;
        self.full_since = None;
        for flush in std::mem::take(&mut self.local.flushes) {
            self.fail(flush);
        }
        for piece in std::mem::take(&mut self.claimed) {
            self.activity.give_back(piece.range.extents(), None);
            self.piece_ended(piece.request, false);
        }
        for piece in std::mem::take(&mut self.arrivals) {
            self.piece_ended(piece.request, false);
        }
    }

    /// A request failed: its error goes out when every map durably holds its blocks (W5).
    pub(super) fn fail(&mut self, id: RequestId) {
        self.failed_replies.push((id, self.last));
        self.write_maps();
    }

    /// Answers the failed requests whose blocks every map durably holds. Marks of later writes don't hold them up.
    pub(super) fn answer_failed(&mut self) {
        if self.failed_replies.is_empty() {
            return;
        }
        let written = self.sessions.values().filter_map(Session::first_unwritten).min();
        let (ready, rest): (Vec<_>, Vec<_>) = std::mem::take(&mut self.failed_replies)
            .into_iter()
            .partition(|(_, last)| written.is_none_or(|first| first > *last));
        self.failed_replies = rest;
        for (id, _) in ready {
            self.answer(id, Err(WriteFailed));
        }
        if !self.failed_replies.is_empty() {
            self.write_maps();
        }
    }
}
