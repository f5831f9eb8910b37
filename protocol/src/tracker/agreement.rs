//! What all hosts that follow the newest generation have durably (D5).
//!
//! A replica keeps the extents that it applied in its own log until it hears here that nobody who could be taken for
//! its equal lacks them. While a replica has left the stream and no new generation has begun, it could be: nothing is
//! agreed in that time.

use super::generation::Next;
use super::{EPOCH_TIME, Tracker};
use crate::session::Told;
use crate::units::{Epoch, Sequence, Time};
use std::collections::VecDeque;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Agreement {
    /// Epochs that ended and are not agreed, with their last writes.
    ended: VecDeque<(Epoch, Sequence)>,
    agreed: Epoch,
    /// The last epoch that ended.
    closed: Epoch,
    told_at: Time,
}

impl Tracker {
    /// An epoch ended.
    pub(super) fn note_epoch_end(&mut self, epoch: Epoch, sequence: Sequence) {
        if self.has_several_replicas() {
            self.agreement.ended.push_back((epoch, sequence));
            self.agreement.closed = epoch;
        }
    }

    /// Tells replicas what is agreed, now and then.
    pub(super) fn agree(&mut self, now: Time) {
        if !self.has_several_replicas() {
            return;
        }
        self.note_left();
        self.advance_agreed();
        if self.agreement_timeout().is_some_and(|due| now >= due) {
            self.agreement.told_at = now;
            let told = self.told();
            self.sessions.values_mut().for_each(|session| session.tell_agreed(told));
        }
    }

    fn advance_agreed(&mut self) {
        let follows = || self.sessions.values().filter(|session| session.is_in_sync());
        let Agreement { ended, agreed, .. } = &mut self.agreement;
        if follows().next().is_none() {
            // Whoever is committed next keeps extents of up to the last one.
            let older = ended.len().saturating_sub(1);
            ended.drain(..older);
            return;
        }
        // A replica to which nothing of an epoch was streamed hears nothing of its end, so writes are compared.
        let is_everywhere =
            |last: Sequence| last <= self.local.durable && follows().all(|session| session.has_durably(last));
        while self.generations.next != Next::Left
            && let Some((epoch, _)) = ended.front().filter(|(_, last)| is_everywhere(*last))
        {
            *agreed = *epoch;
            ended.pop_front();
        }
    }

    /// What replicas are told.
    fn told(&self) -> Told {
        let Agreement { agreed, closed, .. } = self.agreement;
        Told { agreed: if self.generations.next == Next::Left { Epoch(0) } else { agreed }, closed }
    }

    /// When replicas are told next.
    pub(super) fn agreement_timeout(&self) -> Option<Time> {
        let told = self.told();
        let waits = self.sessions.values().any(|session| session.awaits(told).is_some());
        waits.then(|| self.agreement.told_at.after(EPOCH_TIME))
    }

    pub(super) fn has_several_replicas(&self) -> bool {
        self.sessions.len() > 1
    }
}
