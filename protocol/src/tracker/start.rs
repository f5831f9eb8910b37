//! What a primary knows of who leads when it has just started: another host may have been promoted while it was down, by
//! hosts that it has not heard yet (L5). The operator chooses whether it serves all the same, or answers no write and no
//! flush before a majority of the volume's hosts has spoken. Whoever knows of a promotion says so at once.

use super::replies::ReplicaLoss;
use super::{Peer, Tracker, WriteFailed};
use crate::planted::{Bug, planted};
use crate::units::{HostId, Time};
use std::collections::BTreeSet;

/// Whom a primary has heard since it started.
#[derive(Debug, Default)]
pub(super) struct Start {
    heard: BTreeSet<HostId>,
    /// Whether it waits for a majority.
    awaits: bool,
    /// Hosts that may have recorded that they have everything, before this one was promoted again.
    released: BTreeSet<HostId>,
    /// Since when writes wait for these.
    held_since: Option<Time>,
    /// Whether what waits for a majority fails now.
    pub(super) refuses: bool,
}

impl Start {
    /// Whether no write and no flush is answered yet.
    pub(super) fn is_awaited(&self) -> bool {
        self.awaits || !self.released.is_empty()
    }

    /// A host speaks to this one as to its primary.
    pub(super) fn hear(&mut self, host: HostId) {
        self.heard.insert(host);
    }
}

/// How many hosts a primary has heard since it started.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Heard {
    /// How many of the volume's hosts, this one included.
    pub hosts: usize,
    /// How many there are.
    pub of: usize,
    /// How many are a majority.
    pub majority: usize,
    /// Whether writes and flushes wait for a majority.
    pub is_awaited: bool,
}

impl Tracker {
    /// The volume was just opened, as it was when it was closed or this host went down, after these hosts said how they
    /// stand and none knew of another primary. Where it `awaits` a majority, no write and no flush is answered before.
    pub fn start(&mut self, heard: impl IntoIterator<Item = HostId>, awaits: bool, now: Time) {
        self.start.heard.extend(heard);
        self.start.awaits = awaits;
        self.drive(now);
    }

    /// This host was demoted in order and promoted again. Whoever had everything then could be promoted without force, until
    /// it follows this promotion, too: those that are recorded, and whoever lacks nothing by its map. Until then nothing is
    /// written. What fills a map without a write does not say that its host lacked anything then.
    pub(super) fn await_released(&mut self, recorded: &[HostId]) {
        let is_recorded = |host: &HostId| recorded.contains(host) && !planted(Bug::WriteUnfollowed);
        let had_all = |(host, peer): &(&HostId, &Peer)| peer.map().is_clean() || is_recorded(host);
        self.start.released = self.peers.iter().filter(had_all).map(|(host, _)| *host).collect();
    }

    /// Whoever has answered this primary's greeting has recorded that it follows it; whoever is removed is nobody's.
    pub(super) fn look_for_released(&mut self, now: Time) {
        if self.start.released.is_empty() {
            return;
        }
        let peers = &self.peers;
        let follows = |host: &HostId| peers.get(host).is_none_or(Peer::is_heard);
        self.start.released.retain(|host| !follows(host));
        if self.start.released.is_empty() {
            self.start.held_since = None;
        }
        self.begin_arrivals(now);
    }

    /// Whether what arrives waits because hosts that were released do not follow yet. What has waited for longer than the
    /// operator wants fails.
    pub(super) fn holds_arrivals(&mut self, now: Time) -> bool {
        // What fails anyway waits for nobody.
        let is_over = self.local.failed || self.leading.is_superseded;
        if self.start.released.is_empty() || is_over || planted(Bug::WriteUnfollowed) {
            return false;
        }
        if self.pipeline.has_arrived() {
            self.start.held_since.get_or_insert(now);
        }
        if self.start.refuses || self.held_timeout().is_some_and(|at| now >= at) {
            self.start.held_since = None;
            let held: BTreeSet<_> =
                self.pipeline.take_arrived().into_iter().map(|piece| piece.request).collect();
            held.into_iter().for_each(|request| self.answer(request, Err(WriteFailed)));
        }
        true
    }

    /// When what waits for hosts that were released fails.
    pub(super) fn held_timeout(&self) -> Option<Time> {
        let ReplicaLoss::Block { limit, .. } = self.replies.loss else { return None };
        let is_over = self.local.failed || self.leading.is_superseded;
        self.start.held_since.filter(|_| !is_over).map(|since| since.after(limit))
    }

    /// The hosts that are waited for because they may count as such that lack nothing (W4).
    pub fn released(&self) -> impl Iterator<Item = HostId> + '_ {
        self.start.released.iter().copied()
    }

    /// The operator knows that no other host was promoted.
    pub fn await_no_majority(&mut self, now: Time) {
        self.start.awaits = false;
        self.drive(now);
    }

    /// How many hosts were heard since the start.
    #[must_use]
    pub fn heard(&self) -> Heard {
        let of = self.peers.len() + 1;
        let heard = self.start.heard.iter().filter(|host| self.peers.contains_key(host)).count();
        Heard { hosts: heard + 1, of, majority: of / 2 + 1, is_awaited: self.start.awaits }
    }

    /// A majority that was there once has spoken for good.
    pub(super) fn look_for_majority(&mut self) {
        let heard = self.heard();
        self.start.awaits &= heard.hosts < heard.majority;
    }
}

#[cfg(test)]
mod tests {
    use crate::disk::activity_log::Recovered;
    use crate::ranges::ByteRange;
    use crate::terms::Mode;
    use crate::tracker::replies::ReplicaLoss;
    use crate::tracker::testing::{NOW, answers, following, host, settings, tracker, write};
    use crate::tracker::{RequestId, Settings, Tracker};
    use crate::units::{HostId, Sequence};
    use std::collections::BTreeSet;
    use std::time::Duration;

    /// A primary with so many replicas that has just started.
    fn started(replicas: u8, loss: ReplicaLoss) -> Tracker {
        let peers = (1..=replicas).map(|number| following(number, Mode::Async)).collect();
        tracker(peers, loss, Duration::ZERO)
    }

    #[test]
    fn nothing_is_answered_before_a_majority_was_heard() {
        for (replicas, heard, is_majority) in [
            (0, 0, true),
            (1, 0, false),
            (1, 1, true),
            (2, 0, false),
            (2, 1, true),
            (4, 1, false),
            (4, 2, true),
        ] {
            let mut tracker = started(replicas, ReplicaLoss::Continue);
            answers(&mut tracker, NOW);
            // One that is no host of the volume has no say.
            tracker.start((1..=heard).chain([99]).map(host), true, NOW);
            let expected = if is_majority { vec![(RequestId(1), true)] } else { Vec::new() };
            assert_eq!(write(&mut tracker, 1, NOW), expected, "{heard} of {replicas}");
            assert_eq!(tracker.heard().is_awaited, !is_majority, "{heard} of {replicas}");
        }
    }

    /// Each released host may be promoted without a word for what is answered behind its back.
    #[test]
    fn a_primary_that_was_demoted_and_promoted_again_answers_when_all_follow_it_that_had_everything() {
        let returned_after = |recorded: &[HostId]| {
            let log = Recovered::Active { serial: 1, extents: BTreeSet::new() };
            let returned = Some(recorded.to_vec());
            let settings = Settings { returned, ..settings(ReplicaLoss::Continue, Duration::ZERO) };
            // The third lacks something.
            let mut behind = following(3, Mode::Async);
            behind.mark_suspect(ByteRange::new(0, 4096), Sequence(0));
            let peers = vec![following(1, Mode::Async), following(2, Mode::Async), behind];
            Tracker::new(settings, &log, peers)
        };
        let returned = || returned_after(&[]);
        // Its map may be full for another reason, as where something else wrote to the backing here.
        let recorded = returned_after(&[host(3), host(99)]);
        assert_eq!(recorded.released().collect::<Vec<_>>(), [host(1), host(2), host(3)]);
        let mut tracker = returned();
        answers(&mut tracker, NOW);
        assert_eq!(tracker.released().collect::<Vec<_>>(), [host(1), host(2)]);
        assert_eq!(write(&mut tracker, 1, NOW), []);
        tracker.remove_peer(host(1), NOW);
        assert_eq!(answers(&mut tracker, NOW), [], "the other one may still be promoted");
        tracker.remove_peer(host(2), NOW);
        assert_eq!(answers(&mut tracker, NOW), [(RequestId(1), true)]);
        // Nothing is waited for on the way down.
        let mut closed = returned();
        answers(&mut closed, NOW);
        assert_eq!(write(&mut closed, 1, NOW), []);
        closed.wait_no_more(NOW);
        assert_eq!(answers(&mut closed, NOW), [(RequestId(1), false)]);
        // What waits is in no map, so whoever starts next waits for the same.
        let mut again = returned();
        answers(&mut again, NOW);
        assert_eq!(write(&mut again, 1, NOW), []);
        for number in [1, 2] {
            assert!(again.peers[&host(number)].map().is_clean(), "{number}");
        }
        // Nor is it waited for longer than the operator wants.
        let limit = Duration::from_secs(30);
        let mut blocked = returned();
        blocked.replies.loss = ReplicaLoss::Block { min_replicas: 1, limit };
        answers(&mut blocked, NOW);
        assert_eq!(write(&mut blocked, 1, NOW), []);
        assert_eq!(blocked.poll_timeout(), Some(NOW.after(limit)));
        blocked.handle_timeout(NOW.after(limit));
        assert_eq!(answers(&mut blocked, NOW.after(limit)), [(RequestId(1), false)]);
    }

    #[test]
    fn a_majority_lets_go_what_waited_and_a_host_that_joins_later_changes_nothing() {
        let mut tracker = started(2, ReplicaLoss::Continue);
        answers(&mut tracker, NOW);
        tracker.start([], true, NOW);
        assert_eq!(write(&mut tracker, 1, NOW), []);
        tracker.start([host(2)], true, NOW);
        assert_eq!(answers(&mut tracker, NOW), [(RequestId(1), true)]);
        for number in 3..6 {
            tracker.add_peer(following(number, Mode::Async), NOW);
        }
        answers(&mut tracker, NOW);
        assert_eq!(write(&mut tracker, 2, NOW), [(RequestId(2), true)]);
    }

    #[test]
    fn the_operator_lets_it_serve_and_does_not_wait_for_ever() {
        let mut served = started(1, ReplicaLoss::Continue);
        answers(&mut served, NOW);
        served.start([], true, NOW);
        assert_eq!(write(&mut served, 1, NOW), []);
        served.await_no_majority(NOW);
        assert_eq!(answers(&mut served, NOW), [(RequestId(1), true)]);

        let mut closed = started(1, ReplicaLoss::Continue);
        answers(&mut closed, NOW);
        closed.start([], true, NOW);
        assert_eq!(write(&mut closed, 1, NOW), []);
        closed.wait_no_more(NOW);
        assert_eq!(answers(&mut closed, NOW), [(RequestId(1), false)]);

        let limit = Duration::from_secs(30);
        let mut blocked = started(1, ReplicaLoss::Block { min_replicas: 1, limit });
        answers(&mut blocked, NOW);
        blocked.start([], true, NOW);
        assert_eq!(write(&mut blocked, 1, NOW), []);
        blocked.handle_timeout(NOW.after(limit));
        assert_eq!(answers(&mut blocked, NOW.after(limit)), [(RequestId(1), false)]);
    }
}
