//! What all hosts that follow the newest generation have durably (D5).
//!
//! A replica keeps the extents that it applied in its own log until it hears here that nobody who could be taken for
//! its equal lacks them. While a replica has left the stream and no new generation has begun, it could be: nothing is
//! agreed in that time.

use super::generation::Next;
use super::{EPOCH_TIME, Session, Tracker};
use crate::units::{Epoch, Sequence, Time};
use std::collections::VecDeque;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Agreement {
    /// Epochs that ended and are not agreed, with their last writes.
    ended: VecDeque<(Epoch, Sequence)>,
    agreed: Epoch,
    told: Epoch,
    told_at: Time,
}

impl Tracker {
    /// An epoch ended.
    pub(super) fn note_epoch_end(&mut self, epoch: Epoch, sequence: Sequence) {
        if self.has_several_replicas() {
            self.agreement.ended.push_back((epoch, sequence));
        }
    }

    /// Tells replicas what is agreed, now and then.
    pub(super) fn agree(&mut self, now: Time) {
        self.note_left();
        if self.generations.next == Next::Left || !self.has_several_replicas() {
            return;
        }
        let follows = || self.sessions.values().filter(|session| session.is_in_sync());
        let Agreement { ended, agreed, told, told_at } = &mut self.agreement;
        if follows().next().is_none() {
            // Whoever is committed next keeps extents of up to the last one.
            let older = ended.len().saturating_sub(1);
            ended.drain(..older);
            return;
        }
        // A replica to which nothing of an epoch was streamed hears nothing of its end, so writes are compared.
        let is_everywhere =
            |last: Sequence| last <= self.local.durable && follows().all(|session| session.has_durably(last));
        while let Some((epoch, _)) = ended.front().filter(|(_, last)| is_everywhere(*last)) {
            *agreed = *epoch;
            ended.pop_front();
        }
        if *told < *agreed && now >= told_at.after(EPOCH_TIME) {
            (*told, *told_at) = (*agreed, now);
            let agreed = *agreed;
            self.sessions.values_mut().for_each(|session| session.tell_agreed(agreed));
        }
    }

    /// When replicas are told next.
    pub(super) fn agreement_timeout(&self) -> Option<Time> {
        let Agreement { agreed, told, told_at, .. } = &self.agreement;
        let is_told = self.generations.next != Next::Left && self.sessions.values().any(Session::is_in_sync);
        (told < agreed && is_told).then(|| told_at.after(EPOCH_TIME))
    }

    pub(super) fn has_several_replicas(&self) -> bool {
        self.sessions.len() > 1
    }
}
