//! What is durable: syncs of the backing and the flushes that they answer, the log and the maps that must be written
//! before something else may happen, and what follows when one of them fails (W5).

use super::{Action, Peer, RequestId, Tracker, WriteFailed};
use crate::planted::{Bug, planted};
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

/// Failed requests whose error waits for the maps (W5), each with the newest write when it failed.
#[derive(Debug, Default)]
pub(super) struct Failures(Vec<(RequestId, Sequence)>);

impl Failures {
    /// Takes those that wait for nothing, where the first write whose mark a map lacks is this one.
    fn take_ready(&mut self, first_unwritten: Option<Sequence>) -> Vec<RequestId> {
        let is_ready = |last: Sequence| first_unwritten.is_none_or(|first| first > last);
        self.0.extract_if(.., |(_, last)| is_ready(*last)).map(|(id, _)| id).collect()
    }
}

impl Tracker {
    /// A sync of the backing has ended.
    pub fn handle_synced(&mut self, synced: bool, now: Time) {
        if synced && !self.local.failed && self.clears_absent() {
            return self.drive(now);
        }
        self.end_sync(synced, now);
        self.drive(now);
    }

    /// A sync has ended, and what follows from it for absent blocks is recorded.
    pub(super) fn end_sync(&mut self, synced: bool, now: Time) {
        let (covers, flushes) = self.local.running.take().expect("a sync ends once");
        if synced && !self.local.failed {
            self.local.durable = covers;
            self.local.opened = true;
            self.free_log();
            for flush in flushes {
                let sequence = self.requests.of(flush).sequence;
                self.owe(flush, sequence, true, now);
            }
            self.settled_absent(covers, now);
        } else {
            for flush in flushes {
                self.fail(flush);
            }
            self.lose_unsynced_fill();
            self.fail_backing(now);
        }
        self.begin_arrivals(now);
    }

    pub(super) fn flush(&mut self, id: RequestId, now: Time) {
        self.close_epoch();
        if self.local.durable == self.last && self.local.running.is_none() && !self.has_unsynced_fill() {
            return self.owe(id, self.last, true, now);
        }
        self.local.flushes.push(id);
        self.local.wanted = true;
    }

    /// Everything up to this write is durable here and, for each replica, there or in its map (D1).
    pub(super) fn safe(&self) -> Sequence {
        let peers = self.peers.values().map(|peer| peer.safe_up_to(self.last));
        let here = if planted(Bug::ReleaseExtentEarly) { self.last } else { self.local.durable };
        peers.chain([here]).min().expect("the chain is not empty")
    }

    pub(super) fn write_maps(&mut self) {
        for peer in self.peers.values_mut() {
            peer.write_map();
        }
    }

    pub(super) fn write_log(&mut self, tidy: bool) {
        if let Some((offset, record)) = self.log.next_record(tidy) {
            self.actions.push_back(Action::WriteLog { offset, record });
        }
    }

    /// The log may be overwritten once every map durably holds what it said, and the backing what was written then.
    pub(super) fn free_log(&mut self) {
        if !self.log.is_free() {
            if self.local.opened && self.peers.values().all(Peer::is_written) {
                self.log.free();
            }
            self.write_maps();
        }
    }

    /// Whether the log can't be freed, since a map that is to hold what it says can't be written at all: what waits for a
    /// record may wait for ever.
    pub(super) fn log_is_out_of_reach(&self) -> bool {
        let is_lost = |peer: &Peer| peer.map_is_out_of_reach() && !peer.is_written();
        !self.log.is_free() && self.local.opened && self.peers.values().any(is_lost)
    }

    pub(super) fn start_sync(&mut self) {
        if !self.local.wanted || self.local.running.is_some() || self.local.failed {
            return;
        }
        let complete = self.pipeline.first_under_way().map_or(self.last, |first| Sequence(first.0 - 1));
        let has_more = !self.local.flushes.is_empty() || self.has_unsynced_fill();
        if !has_more && complete == self.local.durable {
            // Where writes are under way, the sync is wanted when they have ended.
            self.local.wanted = complete < self.last;
            return;
        }
        self.local.wanted = false;
        self.local.running = Some((complete, std::mem::take(&mut self.local.flushes)));
        if let Some(filling) = &mut self.filling {
            filling.absent.sync_begins();
        }
        self.actions.push_back(Action::SyncLocal);
    }

    /// What came after the last good sync is not durable, and nothing is taken any more (W5).
    pub(super) fn fail_backing(&mut self, now: Time) {
        self.local.failed = true;
        self.local.wanted = false;
        self.log.wait_no_more();
        for flush in std::mem::take(&mut self.local.flushes) {
            self.fail(flush);
        }
        self.give_pieces_up(now);
    }

    /// A request failed: its error goes out when every map durably holds its blocks (W5).
    pub(super) fn fail(&mut self, id: RequestId) {
        self.failures.0.push((id, self.last));
        self.write_maps();
    }

    /// Answers the failed requests whose blocks every map durably holds, but for maps that can't be written at all. Marks
    /// of later writes don't hold them up.
    pub(super) fn answer_failed(&mut self) {
        if self.failures.0.is_empty() {
            return;
        }
        let awaited = self.peers.values().filter(|peer| !peer.map_is_out_of_reach());
        let written = awaited.filter_map(Peer::first_unwritten).min();
        for id in self.failures.take_ready(written) {
            self.answer(id, Err(WriteFailed));
        }
        if !self.failures.0.is_empty() {
            self.write_maps();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::replies::ReplicaLoss;
    use super::super::{Action, Follower, LocalWrite, RequestId, Tracker, Work, WriteFailed};
    use crate::dirty_map::DirtyMap;
    use crate::disk::activity_log::Recovered;
    use crate::peer::{self, Peer};
    use crate::promise::PATIENCE;
    use crate::ranges::ByteRange;
    use crate::terms::Mode;
    use crate::tracker::testing::{self, NOW, settings, tracker};
    use crate::units::{BlockSize, EXTENT_BYTES, Extent, GenerationId, HostId, Time, VolumeId};
    use std::collections::BTreeSet;
    use std::time::Duration;

    type Reply = (RequestId, Result<(), WriteFailed>);

    /// What is left for a test to see to.
    enum Told {
        Reply(RequestId, Result<(), WriteFailed>),
        WriteMap(Follower),
    }

    /// Carries out what is asked of the disk and the state folder, but for maps.
    fn carry_out(
        tracker: &mut Tracker,
        action: Action,
        writes: LocalWrite,
        syncs: bool,
        now: Time,
    ) -> Option<Told> {
        match action {
            Action::WriteLog { .. } => tracker.handle_log_written(true, now),
            Action::WriteLocal { sequence, .. } => tracker.handle_local_written(sequence, writes, now),
            Action::SyncLocal => tracker.handle_synced(syncs, now),
            Action::BeginGeneration { .. } => tracker.handle_generation(Some(GenerationId([2; 16])), now),
            Action::TellUpTo { .. } => tracker.handle_told(true, now),
            Action::Reply { request, result } => return Some(Told::Reply(request, result)),
            Action::Peer { follower, action: peer::Action::WriteMap(_) } => {
                return Some(Told::WriteMap(follower));
            }
            Action::ReadDigest { .. } | Action::Peer { .. } => panic!("no replica is connected"),
            Action::ReadLocal { .. }
            | Action::Land { .. }
            | Action::DropFetched(_)
            | Action::WriteAbsent(_)
            | Action::Filled => panic!("nothing is absent"),
        }
        None
    }

    /// Carries out what the tracker asks for, on a disk whose writes and syncs succeed or fail, and gives the replies.
    fn settle(
        tracker: &mut Tracker,
        writes: LocalWrite,
        syncs: bool,
    ) -> Vec<(RequestId, Result<(), WriteFailed>)> {
        let mut replies = Vec::new();
        while let Some(action) = tracker.poll_action() {
            match carry_out(tracker, action, writes, syncs, NOW) {
                Some(Told::Reply(request, result)) => replies.push((request, result)),
                Some(Told::WriteMap(_)) => panic!("there is no host"),
                None => {}
            }
        }
        replies
    }

    fn with(peers: Vec<Peer>) -> Tracker {
        tracker(peers, ReplicaLoss::Continue, PATIENCE)
    }

    fn opened() -> Tracker {
        let mut tracker = with(Vec::new());
        settle(&mut tracker, LocalWrite::Written, true);
        tracker
    }

    fn write(tracker: &mut Tracker, id: u64, fua: bool) {
        tracker.handle_request(RequestId(id), Work::Write { range: ByteRange::new(0, 4096), fua }, NOW);
    }

    #[test]
    fn a_durable_write_that_failed_counts_as_a_failed_sync() {
        // The write's own flush failed and lost what was answered before; the kernel tells of that once.
        let mut tracker = opened();
        write(&mut tracker, 1, false);
        assert_eq!(settle(&mut tracker, LocalWrite::Written, true), [(RequestId(1), Ok(()))]);
        write(&mut tracker, 2, true);
        assert_eq!(settle(&mut tracker, LocalWrite::NotDurable, true), [(RequestId(2), Err(WriteFailed))]);
        tracker.handle_request(RequestId(3), Work::Flush, NOW);
        assert_eq!(settle(&mut tracker, LocalWrite::Written, true), [(RequestId(3), Err(WriteFailed))]);
        assert!(tracker.has_failed());
    }

    #[test]
    fn a_failed_sync_is_never_forgotten() {
        let mut tracker = opened();
        write(&mut tracker, 1, false);
        settle(&mut tracker, LocalWrite::Written, true);
        tracker.handle_request(RequestId(2), Work::Flush, NOW);
        assert_eq!(settle(&mut tracker, LocalWrite::Written, false), [(RequestId(2), Err(WriteFailed))]);
        tracker.handle_request(RequestId(3), Work::Flush, NOW);
        assert_eq!(settle(&mut tracker, LocalWrite::Written, true), [(RequestId(3), Err(WriteFailed))]);
        write(&mut tracker, 4, false);
        assert_eq!(settle(&mut tracker, LocalWrite::Written, true), [(RequestId(4), Err(WriteFailed))]);
    }

    /// A replica that lacks nothing, and is not connected.
    fn away() -> Peer {
        let (host, block_size) = (HostId([2; 32]), BlockSize::default());
        let mut map = DirtyMap::full(VolumeId([1; 16]), host, EXTENT_BYTES, block_size);
        map.clear(0..EXTENT_BYTES / block_size.bytes());
        map.take_changes();
        Peer::new(host, map, EXTENT_BYTES, block_size, 1 << 20, Mode::Async)
    }

    /// The disk of the state folder gave errors while a replica was away: applications never got the error of a write
    /// that had failed, and a stop waited for them.
    /// Twenty seconds in which no map can be written. After ten of them the volume is closed: what was answered before, and
    /// since.
    fn close_without_maps(tracker: &mut Tracker, writes: LocalWrite) -> (Vec<Reply>, Vec<Reply>) {
        let (mut before, mut replies) = (Vec::new(), Vec::new());
        for second in 0..20 {
            let now = Time(Duration::from_secs(second));
            tracker.handle_timeout(now);
            if second == 10 {
                before = std::mem::take(&mut replies);
                tracker.close(now);
            }
            while let Some(action) = tracker.poll_action() {
                match carry_out(tracker, action, writes, true, now) {
                    Some(Told::Reply(request, result)) => replies.push((request, result)),
                    Some(Told::WriteMap(follower)) => tracker.handle_map_written(follower, false, now),
                    None => {}
                }
            }
        }
        (before, replies)
    }

    #[test]
    fn an_error_is_answered_and_the_volume_closes_though_no_map_can_be_written() {
        let mut tracker = with(vec![away()]);
        write(&mut tracker, 1, false);
        let (before, after) = close_without_maps(&mut tracker, LocalWrite::Failed);
        assert_eq!((before, after), (vec![(RequestId(1), Err(WriteFailed))], Vec::new()));
        assert!(tracker.is_closed());
        assert!(tracker.active_extents() > 0, "the log remembers what the map doesn't");
    }

    /// What the log of before the crash says must be in the maps before it is written over: it never was, and the agent's end
    /// took as long as it may, with a writer that waited.
    #[test]
    fn a_volume_closes_whose_log_was_never_free() {
        let log = Recovered::Active { serial: 1, extents: BTreeSet::from([Extent(0)]) };
        let settings = settings(ReplicaLoss::Continue, PATIENCE);
        let mut tracker = Tracker::new(settings, &log, vec![testing::following(1, Mode::Async)]);
        write(&mut tracker, 1, false);
        let (before, after) = close_without_maps(&mut tracker, LocalWrite::Written);
        assert_eq!(
            (before, after),
            (Vec::new(), vec![(RequestId(1), Err(WriteFailed))]),
            "there is no record of it"
        );
        assert!(tracker.is_closed());
    }

    /// A map that was being written when the volume was closed lacked what was marked meanwhile, and that was written a second
    /// later: an agent that was restarted kept its writers waiting for it.
    #[test]
    fn what_is_marked_before_the_end_is_written_at_once() {
        let mut tracker = with(vec![away()]);
        let now = Time(Duration::from_secs(10));
        let mut maps = Vec::new();
        // Carries everything out but the writing of maps, and tells how many were to be written so far, the last one whose.
        let mut settle = |tracker: &mut Tracker| {
            while let Some(action) = tracker.poll_action() {
                if let Some(Told::WriteMap(follower)) =
                    carry_out(tracker, action, LocalWrite::Written, true, now)
                {
                    maps.push(follower);
                }
            }
            (maps.len(), maps.last().copied())
        };
        let write = |tracker: &mut Tracker, id: u64, offset: u64| {
            tracker.handle_request(
                RequestId(id),
                Work::Write { range: ByteRange::new(offset, 4096), fua: false },
                now,
            );
        };
        write(&mut tracker, 1, 0);
        tracker.handle_timeout(now);
        let (count, follower) = settle(&mut tracker);
        let follower = follower.expect("the replica lacks a block");
        assert_eq!(count, 1);
        write(&mut tracker, 2, 4096);
        tracker.close(now);
        assert_eq!(settle(&mut tracker).0, 1, "one at a time");
        tracker.handle_map_written(follower, true, now);
        assert_eq!(settle(&mut tracker).0, 2);
        tracker.handle_map_written(follower, true, now);
        settle(&mut tracker);
        assert!(tracker.is_closed());
    }

    #[test]
    fn a_failed_write_alone_leaves_the_volume_at_work() {
        let mut tracker = opened();
        write(&mut tracker, 1, true);
        assert_eq!(settle(&mut tracker, LocalWrite::Failed, true), [(RequestId(1), Err(WriteFailed))]);
        write(&mut tracker, 2, false);
        tracker.handle_request(RequestId(3), Work::Flush, NOW);
        assert_eq!(
            settle(&mut tracker, LocalWrite::Written, true),
            [(RequestId(2), Ok(())), (RequestId(3), Ok(()))]
        );
    }
}
