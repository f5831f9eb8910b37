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

    /// A host speaks to this one as to its primary.
    pub(super) fn note_heard(&mut self, host: HostId) {
        self.start.heard.insert(host);
    }

    /// A majority that was there once has spoken for good.
    pub(super) fn look_for_majority(&mut self) {
        let heard = self.heard();
        self.start.awaits &= heard.hosts < heard.majority;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::dirty_map::DirtyMap;
    use crate::disk::activity_log::Recovered;
    use crate::ranges::ByteRange;
    use crate::session::{self, Session};
    use crate::tracker::replies::ReplicaLoss;
    use crate::tracker::{Action, LEAST_ACTIVE_EXTENTS, LocalWrite, RequestId, Settings, Work};
    use crate::units::{BlockSize, EXTENT_BYTES, Epoch, GenerationId, VolumeId};
    use crate::wire::message::Mode;
    use std::time::Duration;

    const NOW: Time = Time(Duration::from_secs(1));

    fn host(number: u8) -> HostId {
        HostId([number; 32])
    }

    fn session(number: u8) -> Session {
        let size = BlockSize::default();
        let mut map = DirtyMap::full(VolumeId([1; 16]), host(number), EXTENT_BYTES, size);
        map.clear(0..EXTENT_BYTES / size.bytes());
        Session::new(host(number), map, EXTENT_BYTES, size, 1 << 20, Mode::Async)
    }

    /// A primary with so many replicas that has just started.
    fn tracker(replicas: u8, loss: ReplicaLoss) -> Tracker {
        let settings = Settings {
            size_bytes: EXTENT_BYTES,
            sector_bytes: 512,
            lineage: vec![GenerationId([1; 16])],
            lineage_limit: 8,
            first_epoch: Epoch(1),
            loss,
            opened_at: NOW,
            patience: Duration::ZERO,
            active_extents: LEAST_ACTIVE_EXTENTS,
        };
        let log = Recovered::Active { serial: 0, extents: BTreeSet::new() };
        Tracker::new(settings, &log, (1..=replicas).map(session).collect())
    }

    /// Carries out all that the tracker asks for; the answers that it gave.
    fn answers(tracker: &mut Tracker, now: Time) -> Vec<(RequestId, bool)> {
        let mut answers = Vec::new();
        while let Some(action) = tracker.poll_action() {
            match action {
                Action::Reply { request, result } => answers.push((request, result.is_ok())),
                Action::WriteLocal { sequence, .. } => {
                    tracker.handle_local_written(sequence, LocalWrite::Written, now);
                }
                Action::SyncLocal => tracker.handle_synced(true, now),
                Action::BeginGeneration { .. } => {
                    tracker.handle_generation(Some(GenerationId([2; 16])), now);
                }
                Action::WriteLog { .. } => tracker.handle_log_written(true, now),
                Action::Peer { peer, action: session::Action::WriteMap(_) } => {
                    tracker.handle_map_written(peer, true, now);
                }
                _ => {}
            }
        }
        answers
    }

    fn write(tracker: &mut Tracker, id: u64, now: Time) -> Vec<(RequestId, bool)> {
        let work = Work::Write { range: ByteRange::new(0, 4096), fua: false };
        tracker.handle_request(RequestId(id), work, now);
        answers(tracker, now)
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
            let mut tracker = tracker(replicas, ReplicaLoss::Continue);
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
        let mut tracker = tracker(2, ReplicaLoss::Continue);
        answers(&mut tracker, NOW);
        tracker.start([], true, NOW);
        assert_eq!(write(&mut tracker, 1, NOW), []);
        tracker.start([host(2)], true, NOW);
        assert_eq!(answers(&mut tracker, NOW), [(RequestId(1), true)]);
        for number in 3..6 {
            tracker.add_session(session(number), NOW);
        }
        answers(&mut tracker, NOW);
        assert_eq!(write(&mut tracker, 2, NOW), [(RequestId(2), true)]);
    }

    #[test]
    fn the_operator_lets_it_serve_and_does_not_wait_for_ever() {
        let mut served = tracker(1, ReplicaLoss::Continue);
        answers(&mut served, NOW);
        served.start([], true, NOW);
        assert_eq!(write(&mut served, 1, NOW), []);
        served.await_no_majority(NOW);
        assert_eq!(answers(&mut served, NOW), [(RequestId(1), true)]);

        let mut closed = tracker(1, ReplicaLoss::Continue);
        answers(&mut closed, NOW);
        closed.start([], true, NOW);
        assert_eq!(write(&mut closed, 1, NOW), []);
        closed.wait_no_more(NOW);
        assert_eq!(answers(&mut closed, NOW), [(RequestId(1), false)]);

        let limit = Duration::from_secs(30);
        let mut blocked = tracker(1, ReplicaLoss::Block { min_replicas: 1, limit });
        answers(&mut blocked, NOW);
        blocked.start([], true, NOW);
        assert_eq!(write(&mut blocked, 1, NOW), []);
        blocked.handle_timeout(NOW.after(limit));
        assert_eq!(answers(&mut blocked, NOW.after(limit)), [(RequestId(1), false)]);
    }
}
