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
use crate::promise::Given;
use crate::terms::{Mode, Promise};
use crate::units::{HostId, Sequence, Time};
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
        self.owed.push_back(owed);
    }

    /// Answers what may be answered.
    pub(super) fn settle(&mut self, now: Time) {
        if self.owed.is_empty() {
            return;
        }
        self.note_left();
        let mut late = false;
        for mut owed in std::mem::take(&mut self.owed) {
            owed.due = self.next_due(owed, now);
            match self.verdict(owed, now) {
                Verdict::Answer => self.succeed(owed.request, owed.sequence),
                Verdict::Fail => self.answer(owed.request, Err(WriteFailed)),
                Verdict::Wait => self.owed.push_back(owed),
                Verdict::Late => {
                    late = true;
                    self.owed.push_back(owed);
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
        if let ReplicaLoss::Block { limit, .. } = &mut self.loss {
            *limit = Duration::ZERO;
        }
        self.start.refuses = true;
        self.fail_withheld();
        self.owed.iter_mut().for_each(|owed| owed.due = Some(now));
        self.drive(now);
    }

    /// Whether writes wait, or would wait, until more replicas are in sync.
    #[must_use]
    pub fn blocked(&self, now: Time) -> Option<Blocked> {
        let (min_replicas, limit) = match self.loss {
            ReplicaLoss::Block { min_replicas, limit } => (min_replicas, Some(limit)),
            ReplicaLoss::Continue => (0, None),
        };
        let counting = self.peers.values().filter(|peer| peer.mode() != Mode::Async);
        let (in_sync, all) =
            counting.fold((0, 0), |(in_sync, all), peer| (in_sync + usize::from(peer.is_in_sync()), all + 1));
        let required = min_replicas.min(all);
        let oldest = self.owed.iter().map(|owed| now.since(owed.since)).max().unwrap_or_default();
        let promised_to = self.promised_to().filter(|_| in_sync >= required);
        let blocked = Blocked { in_sync, required, requests: self.owed.len(), oldest, limit, promised_to };
        (in_sync < required || promised_to.is_some()).then_some(blocked)
    }

    /// When an answer must be thought about again.
    pub(super) fn reply_timeout(&self) -> Option<Time> {
        self.owed.iter().filter_map(|owed| owed.due).min()
    }

    /// What replicas in the mode sync are promised. Where some of those that must be in sync need not have anything
    /// durably, they prove nothing.
    pub(super) fn promise(&self) -> Promise {
        let ReplicaLoss::Block { min_replicas, .. } = self.loss else { return Promise::WhileHeard };
        let count = |mode| self.peers.values().filter(|peer| peer.mode() == mode).count();
        let (sync, semi_sync) = (count(Mode::Sync), count(Mode::SemiSync));
        match min_replicas.min(sync + semi_sync).saturating_sub(semi_sync) {
            0 => Promise::WhileHeard,
            durable => Promise::Replicas(durable as u32),
        }
    }

    /// What this replica is to count on from its next commit on: what the operator wants of it, unless another one may be promoted
    /// in its silence by another word. That one, as the primary, would not know what this one counts on. Then it is given what lets it
    /// be promoted only when it hears the others, and the rest once they count on no more than they are to.
    fn given_to(&self, host: HostId, now: Time) -> Given {
        let wanted = self.wanted_of(host);
        let others = || self.peers.iter().filter(|(other, _)| **other != host);
        match wanted.promise {
            Promise::Replicas(_) if wanted.bears_silence() => {
                let is_other = |(other, peer): (&HostId, &Peer)| {
                    peer.bears_silence_unlike(&self.wanted_of(*other), host, now)
                };
                match others().any(is_other) {
                    true => Given { promise: Promise::Replicas(1), ..wanted },
                    false => wanted,
                }
            }
            Promise::WhileHeard if others().any(|(_, peer)| peer.bears_silence_for_ever(host)) => {
                Given::NOTHING
            }
            _ => wanted,
        }
    }

    /// What the operator wants this replica to count on.
    fn wanted_of(&self, host: HostId) -> Given {
        let is_sync = |host: &HostId| self.peers.get(host).is_some_and(|it| it.mode() == Mode::Sync);
        match self.promise() {
            promise if !is_sync(&host) || promise == Promise::None => Given::NOTHING,
            Promise::Replicas(replicas) => {
                let counted =
                    self.peers.keys().copied().filter(|other| *other != host && is_sync(other)).collect();
                Given { promise: Promise::Replicas(replicas), counted }
            }
            promise => Given { promise, counted: Vec::new() },
        }
    }

    /// The modes, the replicas, or what is waited for are others than before: so is what replicas are to count on.
    pub(super) fn give_words(&mut self, now: Time) {
        let given: Vec<Given> = self.peers.keys().map(|host| self.given_to(*host, now)).collect();
        let is_all = |(host, given): (&HostId, &Given)| *given == self.wanted_of(*host);
        self.holds_words_back = !self.peers.keys().zip(&given).all(is_all);
        for (peer, given) in self.peers.values_mut().zip(given) {
            peer.give(given);
        }
    }

    /// Has a replica resynced that is to count on something else for ever, one at a time: the others stay in sync meanwhile.
    pub(super) fn renew_words(&mut self, now: Time) {
        if self.closing {
            // What is to be handed over is not resynced meanwhile.
            return;
        }
        let changes = self.peers.values_mut().map(Peer::take_change_of_word);
        let has_changed = changes.fold(false, |any, change| any | change);
        // What was given for some time is over some time.
        if has_changed || self.holds_words_back {
            self.give_words(now);
        }
        if self.peers.values().any(Peer::is_on_its_way) {
            return;
        }
        if let Some(peer) = self.peers.values_mut().find(|peer| peer.awaits_word()) {
            peer.give_up();
        }
    }

    /// What replicas may count on of which nothing is known is what an earlier release gave.
    pub(super) fn assume_words(&mut self) {
        let (promise, hosts): (_, Vec<HostId>) = (self.promise(), self.peers.keys().copied().collect());
        for (host, peer) in &mut self.peers {
            // It went by all hosts that it knew.
            let others = || hosts.iter().copied().filter(|other| other != host).collect();
            peer.assume_given(|| match promise {
                Promise::Replicas(_) => Given { promise, counted: others() },
                _ => Given { promise, counted: Vec::new() },
            });
        }
    }

    /// A replica that counts for ever on something that an answer would break now.
    #[must_use]
    pub fn promised_to(&self) -> Option<HostId> {
        self.broken_by(None)
    }

    /// A replica that counts for ever on something that this answer would break, or any later one.
    fn broken_by(&self, owed: Option<Owed>) -> Option<HostId> {
        let has_it = |host: HostId| {
            self.peers.get(&host).is_some_and(|peer| {
                let is_settled = owed.is_none_or(|owed| owed.is_settled_by(peer));
                peer.mode() == Mode::Sync && peer.is_in_sync() && is_settled
            })
        };
        self.peers.iter().find(|(_, peer)| !peer.allows(has_it)).map(|(host, _)| *host)
    }

    /// Until when a replica that is not in sync may count on nothing being answered without it.
    fn word(&self) -> Option<Time> {
        let words = self.peers.values().filter_map(Peer::promised).chain(self.word_of_removed);
        words.filter(|_| !planted(Bug::BreakWord)).max()
    }

    /// When an answer that waits must be thought about again.
    fn next_due(&self, owed: Owed, now: Time) -> Option<Time> {
        let limit = match self.loss {
            ReplicaLoss::Block { limit, .. } => Some(limit),
            ReplicaLoss::Continue => None,
        };
        let ends = [Some(ACKNOWLEDGEMENT_DEADLINE), limit].into_iter().flatten();
        ends.map(|end| owed.since.after(end)).chain(self.word()).filter(|end| *end > now).min()
    }

    /// Nothing that waits for replicas is answered well any more.
    pub(super) fn fail_owed(&mut self) {
        for owed in std::mem::take(&mut self.owed) {
            self.answer(owed.request, Err(WriteFailed));
        }
    }

    fn verdict(&mut self, owed: Owed, now: Time) -> Verdict {
        if self.start.is_awaited() {
            let is_over = match self.loss {
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
            let is_late = now >= owed.since.after(ACKNOWLEDGEMENT_DEADLINE);
            return if is_late { Verdict::Late } else { Verdict::Wait };
        }
        if let ReplicaLoss::Block { min_replicas, limit } = self.loss
            && in_sync < min_replicas.min(all)
        {
            return if now >= owed.since.after(limit) { Verdict::Fail } else { Verdict::Wait };
        }
        if self.broken_by(Some(owed)).is_some() {
            let is_over = match self.loss {
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
        let limit = match self.loss {
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
        let late: Vec<Owed> = self.owed.iter().filter(late).copied().collect();
        for peer in self.peers.values_mut() {
            let counts = peer.mode() != Mode::Async && peer.may_follow();
            if counts && late.iter().any(|owed| !owed.is_settled_by(peer)) {
                peer.give_up();
            }
        }
    }
}

impl Owed {
    fn is_settled_by(&self, peer: &Peer) -> bool {
        match peer.mode() {
            Mode::Async => true,
            Mode::Sync if self.durable && !planted(Bug::AnswerEarly) => peer.has_durably(self.sequence),
            Mode::SemiSync | Mode::Sync => peer.has_received(self.sequence),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{Given, Peer, Promise};
    use crate::dirty_map::DirtyMap;
    use crate::disk::activity_log::Recovered;
    use crate::disk::dirty_map::Base;
    use crate::promise::PATIENCE;
    use crate::terms::Mode;
    use crate::tracker::replies::ReplicaLoss;
    use crate::tracker::testing::{NOW, answers, following, host, settings, tracker, write};
    use crate::tracker::{RequestId, Settings, Tracker};
    use crate::units::{BlockSize, CopyId, EXTENT_BYTES, GenerationId, VolumeId};
    use std::collections::BTreeSet;
    use std::time::Duration;

    /// A replica that had everything when its primary ended, and counts on this for ever.
    fn given_for_ever(number: u8, mode: Mode, counted: &[u8]) -> Peer {
        let size = BlockSize::default();
        let base = Base { copy: CopyId([number; 16]), generation: GenerationId([1; 16]), adopted: 0 };
        let mut map = DirtyMap::full(VolumeId([1; 16]), host(number), EXTENT_BYTES, size).clean(base);
        let counted = counted.iter().map(|number| host(*number)).collect();
        map.note_given(&Given { promise: Promise::Replicas(1), counted });
        Peer::new(host(number), map, EXTENT_BYTES, size, 1 << 20, mode)
    }

    /// The primary went by what it was told last: the replica was promoted without force, and what was answered was gone.
    #[test]
    fn a_word_that_holds_for_ever_outlives_what_the_operator_chooses_since() {
        let block = |min_replicas| ReplicaLoss::Block { min_replicas, limit: Duration::from_secs(9) };
        for (loss, mode) in [
            (ReplicaLoss::Continue, Mode::Sync),
            (ReplicaLoss::Continue, Mode::Async),
            (block(0), Mode::Sync),
            (block(1), Mode::Async),
        ] {
            let mut tracker = tracker(vec![given_for_ever(2, mode, &[])], loss, PATIENCE);
            answers(&mut tracker, NOW);
            assert_eq!(write(&mut tracker, 1, NOW), [], "{loss:?} {mode:?}");
            assert_eq!(tracker.blocked(NOW).unwrap().promised_to, Some(host(2)));
            let later = NOW.after(2 * PATIENCE);
            tracker.handle_timeout(later);
            let failed = if loss == ReplicaLoss::Continue { vec![] } else { vec![(RequestId(1), false)] };
            assert_eq!(answers(&mut tracker, later), failed, "{loss:?} {mode:?}");
            // The operator insists.
            tracker.remove_peer(host(2), later);
            answers(&mut tracker, later);
            write(&mut tracker, 2, later);
            let at_last = later.after(PATIENCE);
            tracker.handle_timeout(at_last);
            answers(&mut tracker, at_last);
            assert_eq!(write(&mut tracker, 3, at_last), [(RequestId(3), true)], "{loss:?} {mode:?}");
        }
    }

    #[test]
    fn what_an_operator_changes_while_it_runs_breaks_no_word_either() {
        let block = ReplicaLoss::Block { min_replicas: 1, limit: PATIENCE };
        let mut tracker = tracker(vec![given_for_ever(2, Mode::Sync, &[])], block, PATIENCE);
        answers(&mut tracker, NOW);
        assert_eq!(write(&mut tracker, 1, NOW), []);
        tracker.configure(&[(host(2), Mode::Async)], ReplicaLoss::Continue, NOW);
        assert_eq!(answers(&mut tracker, NOW), []);
        // A host that joins does not count for it.
        tracker.add_peer(following(3, Mode::Sync), NOW);
        assert_eq!(answers(&mut tracker, NOW), []);
        assert_eq!(tracker.blocked(NOW).unwrap().promised_to, Some(host(2)));
    }

    #[test]
    fn what_was_promised_to_a_host_that_was_removed_holds_over_a_restart() {
        let settings = |owes_word| Settings { owes_word, ..settings(ReplicaLoss::Continue, PATIENCE) };
        let log = Recovered::Active { serial: 0, extents: BTreeSet::new() };
        for owes_word in [false, true] {
            let mut tracker = Tracker::new(settings(owes_word), &log, Vec::new());
            answers(&mut tracker, NOW);
            let at_once = write(&mut tracker, 1, NOW);
            assert_eq!(at_once.is_empty(), owes_word);
            let over = NOW.after(PATIENCE);
            tracker.handle_timeout(over);
            assert_eq!(answers(&mut tracker, over).is_empty(), !owes_word);
        }
    }

    /// With the peer the word was forgotten: the host, which need not have heard of its removal, could be promoted as one
    /// without which nothing is answered.
    #[test]
    fn what_was_promised_to_a_host_holds_when_it_is_removed() {
        let mut tracker = tracker(vec![following(1, Mode::Sync)], ReplicaLoss::Continue, PATIENCE);
        answers(&mut tracker, NOW);
        let removed = NOW.after(Duration::from_secs(1));
        tracker.remove_peer(host(1), removed);
        assert_eq!(write(&mut tracker, 1, removed), []);
        let over = NOW.after(PATIENCE);
        assert_eq!(tracker.poll_timeout().map(|due| due <= over), Some(true), "it is thought about again");
        tracker.handle_timeout(over);
        assert_eq!(answers(&mut tracker, over), [(RequestId(1), true)]);
    }
}
