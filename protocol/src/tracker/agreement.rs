//! What all hosts that follow the newest generation have durably (D5).
//!
//! A replica keeps the extents that it applied in its own log until it hears here that nobody who could be taken for
//! its equal lacks them. While a replica has left the stream and no new generation has begun, it could be: nothing is
//! agreed in that time.

use super::generation::Next;
use super::{EPOCH_TIME, Tracker};
use crate::units::{Epoch, Sequence, Time};
use std::collections::VecDeque;

/// Up to which epoch all who follow have everything durably.
#[derive(Debug, Default)]
pub(super) struct Agreement {
    /// Epochs that ended and are not agreed, with their last writes.
    ended: VecDeque<(Epoch, Sequence)>,
    /// The last epoch that is agreed, and its last write.
    agreed: (Epoch, Sequence),
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
        if !self.has_several_replicas() {
            return;
        }
        self.note_left();
        self.advance_agreed();
        // Before the end there is no time to lose: a replica that is promoted takes what its log says for different.
        if self.agreement_timeout().is_some_and(|due| self.closing || now >= due) {
            self.agreement.told_at = now;
            let agreed = self.told();
            self.peers.values_mut().for_each(|peer| peer.tell_agreed(agreed));
        }
    }

    fn advance_agreed(&mut self) {
        // One that was sent a commit may have recorded it, and be taken for an equal.
        let follows = || self.peers.values().filter(|peer| peer.may_follow());
        let Agreement { ended, agreed, .. } = &mut self.agreement;
        if follows().next().is_none() {
            // Whoever is committed next keeps extents of up to the last one.
            let older = ended.len().saturating_sub(1);
            ended.drain(..older);
            return;
        }
        // A replica to which nothing of an epoch was streamed hears nothing of its end, so writes are compared.
        let is_everywhere =
            |last: Sequence| last <= self.local.durable && follows().all(|peer| peer.has_durably(last));
        while self.generations.next != Next::Left
            && ended.front().is_some_and(|(_, last)| is_everywhere(*last))
        {
            *agreed = ended.pop_front().expect("it was looked at");
        }
    }

    /// What replicas are told.
    fn told(&self) -> (Epoch, Sequence) {
        if self.generations.next == Next::Left { Default::default() } else { self.agreement.agreed }
    }

    /// When replicas are told next.
    pub(super) fn agreement_timeout(&self) -> Option<Time> {
        let agreed = self.told();
        // One that is left alone keeps no log any more (X3).
        let waits = self.has_several_replicas() && self.peers.values().any(|peer| peer.awaits(agreed));
        waits.then(|| self.agreement.told_at.after(EPOCH_TIME))
    }

    pub(super) fn has_several_replicas(&self) -> bool {
        self.peers.len() > 1
    }
}
