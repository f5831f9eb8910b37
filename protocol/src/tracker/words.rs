//! What replicas may count on: what each is given its word on, and when that breaks (W4, [`crate::promise`]).
//!
//! What a replica may count on is another one than before when modes, replicas, or the operator's choice change. A word that
//! holds for ever is changed by a resync, one replica at a time.

use super::Tracker;
use super::replies::{Owed, ReplicaLoss};
use crate::given::Given;
use crate::peer::Peer;
use crate::planted::{Bug, planted};
use crate::terms::{Mode, Promise};
use crate::units::{HostId, Time};
use std::time::Duration;

/// What is given to all of them alike.
#[derive(Debug)]
pub(super) struct Words {
    /// For how long a word holds that holds for a time.
    pub patience: Duration,
    /// Until when hosts that were removed, or are not known any more, may count on nothing being answered without them.
    pub of_removed: Option<Time>,
    /// Whether any replica is given less than it is to count on, because another one counts on something else still.
    is_held_back: bool,
}

impl Words {
    /// Words that hold for so long. `of_removed` as above.
    pub fn new(patience: Duration, of_removed: Option<Time>) -> Self {
        Self { patience, of_removed, is_held_back: false }
    }
}

impl Tracker {
    /// What replicas in the mode sync are promised. Where some of those that must be in sync need not have anything
    /// durably, they prove nothing.
    pub(super) fn promise(&self) -> Promise {
        let ReplicaLoss::Block { min_replicas, .. } = self.replies.loss else { return Promise::WhileHeard };
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
        self.words.is_held_back = !self.peers.keys().zip(&given).all(is_all);
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
        if has_changed || self.words.is_held_back {
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
    pub(super) fn broken_by(&self, owed: Option<Owed>) -> Option<HostId> {
        let has_it = |host: HostId| {
            self.peers.get(&host).is_some_and(|peer| {
                let is_settled = owed.is_none_or(|owed| owed.is_settled_by(peer));
                peer.mode() == Mode::Sync && peer.is_in_sync() && is_settled
            })
        };
        self.peers.iter().find(|(_, peer)| !peer.allows(has_it)).map(|(host, _)| *host)
    }

    /// Until when a replica that is not in sync may count on nothing being answered without it.
    pub(super) fn word(&self) -> Option<Time> {
        let words = self.peers.values().filter_map(Peer::promised).chain(self.words.of_removed);
        words.filter(|_| !planted(Bug::BreakWord)).max()
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
