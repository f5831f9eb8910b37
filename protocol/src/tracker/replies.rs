//! When a request that is done here may be answered: what its mode demands of the replicas (W4).
//!
//! A replica counts for its mode only while it is in sync. While one that should count doesn't, the operator's choice
//! holds: go on without it, which begins a generation first (L1), or wait, for a bounded time, until enough are in sync.
//! A replica that is in sync and yet doesn't answer stops being in sync after the deadline of acknowledgements (D4), so
//! that a hanging one blocks nobody who chose to go on (W7).

use super::generation::Next;
use super::{RequestId, Tracker, WriteFailed};
use crate::peer::{ACKNOWLEDGEMENT_DEADLINE, Peer};
use crate::planted::{Bug, planted};
use crate::terms::Mode;
use crate::units::{HostId, Sequence, Time};
use std::collections::VecDeque;
use std::time::Duration;

/// What happens while a replica that writes should wait for is not in sync.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum ReplicaLoss {
    /// Replies go on without it.
    #[default]
    Continue,
    /// Replies wait until so many replicas are in sync, and fail after this time.
    Block {
        /// How many replicas of a mode other than async must be in sync; no more than there are.
        min_replicas: usize,
        /// How long a reply waits at most.
        limit: Duration,
    },
}

impl ReplicaLoss {
    /// Whether replies wait.
    pub(crate) fn blocks(self) -> bool {
        matches!(self, Self::Block { .. })
    }
}

/// That too few replicas are in sync for a write to be answered, where the operator chose to wait.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Blocked {
    /// How many replicas of a mode other than async are in sync.
    pub in_sync: usize,
    /// How many it takes.
    pub required: usize,
    /// How many requests wait.
    pub requests: usize,
    /// How long the oldest of them has waited.
    pub oldest: Duration,
    /// After how long they fail; nothing where they wait until the operator decides otherwise.
    pub limit: Option<Duration>,
    /// The replica that was promised that nothing is answered without it, or more of the others, where writes wait for it
    /// to hear otherwise.
    pub promised_to: Option<HostId>,
}

/// A request that is done here and waits for replicas.
#[derive(Debug, Clone, Copy)]
pub(super) struct Owed {
    request: RequestId,
    /// The last write that the answer speaks for.
    sequence: Sequence,
    /// Whether it promises that everything up to there is durable.
    durable: bool,
    since: Time,
    /// When it must be thought about again.
    due: Option<Time>,
}

/// Requests that are done here and wait for replicas.
#[derive(Debug)]
pub(super) struct Replies {
    /// What happens while a replica is lost that they should wait for.
    pub loss: ReplicaLoss,
    /// Oldest first.
    owed: VecDeque<Owed>,
}

impl Replies {
    /// None is owed.
    pub fn new(loss: ReplicaLoss) -> Self {
        Self { loss, owed: VecDeque::new() }
    }
}

enum Verdict {
    Answer,
    Wait,
    /// In-sync replicas don't answer.
    Late,
    Fail,
}

impl Tracker {
    /// A request is done here; it is answered when its replicas are, too.
    pub(super) fn owe(&mut self, request: RequestId, sequence: Sequence, durable: bool, now: Time) {
        if self.leading.is_superseded {
            // No replica that it could wait for comes back.
            return self.answer(request, Err(WriteFailed));
        }
        if self.peers.values().all(|peer| peer.mode() == Mode::Async)
            && !self.start.is_awaited()
            && self.word().is_none_or(|until| now >= until)
            && self.peers.values().all(|peer| peer.allows(|_| false))
            && !self.holds_answer(sequence)
        {
            return self.succeed(request, sequence);
        }
        let mut owed = Owed { request, sequence, durable, since: now, due: None };
        owed.due = self.next_due(owed, now);
        self.replies.owed.push_back(owed);
    }

    /// Answers what may be answered.
    pub(super) fn settle(&mut self, now: Time) {
        if self.replies.owed.is_empty() {
            return;
        }
        self.note_left();
        let mut late = false;
        for mut owed in std::mem::take(&mut self.replies.owed) {
            owed.due = self.next_due(owed, now);
            match self.verdict(owed, now) {
                Verdict::Answer => self.succeed(owed.request, owed.sequence),
                Verdict::Fail => self.answer(owed.request, Err(WriteFailed)),
                Verdict::Wait => self.replies.owed.push_back(owed),
                Verdict::Late => {
                    late = true;
                    self.replies.owed.push_back(owed);
                }
            }
        }
        if late {
            self.give_late_ones_up(now);
            self.settle(now);
        }
    }

    /// The volume is about to be closed: what waits until more replicas are in sync, or more hosts are heard, fails now, not
    /// at the end of the operator's patience. What replicas in sync are about to confirm is waited for as before.
    pub fn wait_no_more(&mut self, now: Time) {
        if let ReplicaLoss::Block { limit, .. } = &mut self.replies.loss {
            *limit = Duration::ZERO;
        }
        self.start.refuses = true;
        self.fail_withheld();
        self.wait_for_fill_no_more(now);
        self.replies.owed.iter_mut().for_each(|owed| owed.due = Some(now));
        self.drive(now);
    }

    /// Whether writes wait, or would wait, until more replicas are in sync.
    #[must_use]
    pub fn blocked(&self, now: Time) -> Option<Blocked> {
        let (min_replicas, limit) = match self.replies.loss {
            ReplicaLoss::Block { min_replicas, limit } => (min_replicas, Some(limit)),
            ReplicaLoss::Continue => (0, None),
        };
        let counting = self.peers.values().filter(|peer| peer.mode() != Mode::Async);
        let (in_sync, all) =
            counting.fold((0, 0), |(in_sync, all), peer| (in_sync + usize::from(peer.is_in_sync()), all + 1));
        let required = min_replicas.min(all);
        let oldest = self.replies.owed.iter().map(|owed| now.since(owed.since)).max().unwrap_or_default();
        let promised_to = self.promised_to().filter(|_| in_sync >= required);
        let blocked =
            Blocked { in_sync, required, requests: self.replies.owed.len(), oldest, limit, promised_to };
        (in_sync < required || promised_to.is_some()).then_some(blocked)
    }

    /// When an answer must be thought about again.
    pub(super) fn reply_timeout(&self) -> Option<Time> {
        self.replies.owed.iter().filter_map(|owed| owed.due).min()
    }

    /// When an answer that waits must be thought about again.
    fn next_due(&self, owed: Owed, now: Time) -> Option<Time> {
        let limit = match self.replies.loss {
            ReplicaLoss::Block { limit, .. } => Some(limit),
            ReplicaLoss::Continue => None,
        };
        let ends = [Some(ACKNOWLEDGEMENT_DEADLINE), limit].into_iter().flatten();
        ends.map(|end| owed.since.after(end)).chain(self.word()).filter(|end| *end > now).min()
    }

    /// Nothing that waits for replicas is answered well any more.
    pub(super) fn fail_owed(&mut self) {
        for owed in std::mem::take(&mut self.replies.owed) {
            self.answer(owed.request, Err(WriteFailed));
        }
    }

    fn verdict(&mut self, owed: Owed, now: Time) -> Verdict {
        if self.start.is_awaited() {
            let is_over = match self.replies.loss {
                ReplicaLoss::Block { limit, .. } => now >= owed.since.after(limit),
                ReplicaLoss::Continue => self.start.refuses,
            };
            return if is_over { Verdict::Fail } else { Verdict::Wait };
        }
        let required = || self.peers.values().filter(|peer| peer.mode() != Mode::Async);
        let in_sync = required().filter(|peer| peer.is_in_sync()).count();
        let all = required().count();
        // One that was sent a commit may have recorded it: promoted, it would be taken for one that was in sync.
        if required().any(|peer| peer.may_follow() && !owed.is_settled_by(peer)) {
            let is_late =
                now >= owed.since.after(ACKNOWLEDGEMENT_DEADLINE) && !planted(Bug::AwaitLateReplica);
            return if is_late { Verdict::Late } else { Verdict::Wait };
        }
        if let ReplicaLoss::Block { min_replicas, limit } = self.replies.loss
            && in_sync < min_replicas.min(all)
        {
            return if now >= owed.since.after(limit) { Verdict::Fail } else { Verdict::Wait };
        }
        if self.broken_by(Some(owed)).is_some() {
            let is_over = match self.replies.loss {
                ReplicaLoss::Block { limit, .. } => now >= owed.since.after(limit),
                ReplicaLoss::Continue => self.start.refuses,
            };
            return if is_over { Verdict::Fail } else { Verdict::Wait };
        }
        if self.word().is_some_and(|until| now < until) {
            return Verdict::Wait;
        }
        if in_sync < all && self.generations.next == Next::Left {
            // What is answered without a replica must not be taken for what that replica has (L1).
            self.begin_generation();
        }
        if self.generations.beginning && in_sync < all {
            return Verdict::Wait;
        }
        if !self.holds_answer(owed.sequence) {
            return Verdict::Answer;
        }
        // A map that can't be written at all may never say so.
        let limit = match self.replies.loss {
            ReplicaLoss::Block { limit, .. } => limit,
            ReplicaLoss::Continue => ACKNOWLEDGEMENT_DEADLINE,
        };
        let is_over = self.start.refuses || now >= owed.since.after(limit);
        let is_lost = self.peers.values().any(Peer::map_is_out_of_reach);
        if is_over && is_lost { Verdict::Fail } else { Verdict::Wait }
    }

    /// Whether an answer must wait until the map of each replica that it leaves out may say so.
    pub(super) fn holds_answer(&mut self, sequence: Sequence) -> bool {
        let (mut is_held, newest) = (false, self.generations.lineage.first().copied());
        for peer in self.peers.values_mut() {
            is_held |= peer.holds_answer(sequence, newest);
        }
        is_held
    }

    /// In-sync replicas that hold an answer up for longer than the deadline are in sync no more.
    fn give_late_ones_up(&mut self, now: Time) {
        let late = |owed: &&Owed| now >= owed.since.after(ACKNOWLEDGEMENT_DEADLINE);
        let late: Vec<Owed> = self.replies.owed.iter().filter(late).copied().collect();
        for peer in self.peers.values_mut() {
            let counts = peer.mode() != Mode::Async && peer.may_follow();
            if counts && late.iter().any(|owed| !owed.is_settled_by(peer)) {
                peer.give_up();
            }
        }
    }
}

impl Owed {
    pub(super) fn is_settled_by(&self, peer: &Peer) -> bool {
        match peer.mode() {
            Mode::Async => true,
            Mode::Sync if self.durable && !planted(Bug::AnswerEarly) => peer.has_durably(self.sequence),
            Mode::SemiSync | Mode::Sync => peer.has_received(self.sequence),
        }
    }
}
