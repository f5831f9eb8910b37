//! What a primary knows of who leads when it has just started: another host may have been promoted while it was down, by
//! hosts that it has not heard yet (L5). The operator chooses whether it serves all the same, or answers no write and no
//! flush before a majority of the volume's hosts has spoken. Whoever knows of a promotion says so at once.

use super::Tracker;
use crate::units::{HostId, Time};
use std::collections::BTreeSet;

/// Whom a primary has heard since it started.
#[derive(Debug, Default)]
pub(super) struct Start {
    heard: BTreeSet<HostId>,
    /// Whether it waits for a majority.
    pub(super) awaits: bool,
    /// Whether what waits for a majority fails now.
    pub(super) refuses: bool,
}

impl Start {
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

    /// The operator knows that no other host was promoted.
    pub fn await_no_majority(&mut self, now: Time) {
        self.start.awaits = false;
        self.drive(now);
    }

    /// How many hosts were heard since the start.
    #[must_use]
    pub fn heard(&self) -> Heard {
        let of = self.sessions.len() + 1;
        let heard = self.start.heard.iter().filter(|host| self.sessions.contains_key(host)).count();
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
    use crate::tracker::RequestId;
    use crate::tracker::Tracker;
    use crate::tracker::replies::ReplicaLoss;
    use crate::tracker::testing::{NOW, answers, host, session, tracker, write};
    use crate::wire::message::Mode;
    use std::time::Duration;

    /// A primary with so many replicas that has just started.
    fn started(replicas: u8, loss: ReplicaLoss) -> Tracker {
        let sessions = (1..=replicas).map(|number| session(number, Mode::Async)).collect();
        tracker(sessions, loss, Duration::ZERO)
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

    #[test]
    fn a_majority_lets_go_what_waited_and_a_host_that_joins_later_changes_nothing() {
        let mut tracker = started(2, ReplicaLoss::Continue);
        answers(&mut tracker, NOW);
        tracker.start([], true, NOW);
        assert_eq!(write(&mut tracker, 1, NOW), []);
        tracker.start([host(2)], true, NOW);
        assert_eq!(answers(&mut tracker, NOW), [(RequestId(1), true)]);
        for number in 3..6 {
            tracker.add_session(session(number, Mode::Async), NOW);
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
