//! A primary whose copy is being filled from a replica (S4): where [`Absent`] stands between requests, disk and the source.

use super::pipeline::{Piece, Wait};
use super::{Action, Admitted, RequestId, Tracker, WriteFailed};
use crate::peer::{Peer, PeerError};
use crate::ranges::ByteRange;
use crate::rebuild::{Absent, FetchId, Fetched, Landing, Need, Progress};
use crate::units::{HostId, Sequence, Session, Time};
use crate::wire::message::Refusal;
use std::collections::BTreeMap;

/// The absent blocks of a primary, and what the tracker keeps for them.
#[derive(Debug)]
pub(super) struct Filling {
    pub(super) absent: Absent,
    /// What was fetched, as it is written here, by the number of the write.
    landings: BTreeMap<u64, (Landing, bool)>,
    next: u64,
    /// Requests that are done here, and are answered when the bits of what they wrote are cleared durably; each with its last write
    /// and whether it promises that all is durable.
    unsettled: Vec<(RequestId, Sequence, bool)>,
    /// Whether the file is being written for the sync that has ended, and what that covers is reported afterwards.
    is_writing: bool,
    /// When a write of the file that failed is tried again.
    again_at: Option<Time>,
    /// Whether it is being recorded that nothing is absent.
    is_ending: bool,
    /// The session with the source, and whether it is resynced in it, as of the last look.
    seen: Option<(Session, bool)>,
    /// Whether the source's last greeting was answered so that it can be the source no more.
    is_source_lost: bool,
}

/// How long after a failure the file is written again.
const AGAIN: std::time::Duration = std::time::Duration::from_secs(1);

impl Filling {
    /// With these blocks absent.
    pub(super) fn new(absent: Absent) -> Self {
        Self {
            absent,
            landings: BTreeMap::new(),
            next: 0,
            unsettled: Vec::new(),
            is_writing: false,
            again_at: None,
            is_ending: false,
            seen: None,
            is_source_lost: false,
        }
    }
}

impl Tracker {
    /// An application reads, and some of it may be absent. Says whether it may read at once; else [`Action::ReadLocal`] says when,
    /// or [`Action::Reply`] that it can't.
    #[must_use]
    pub fn handle_read(&mut self, id: RequestId, range: ByteRange, now: Time) -> bool {
        self.requests.note_asked(now);
        let Some(filling) = &mut self.filling else { return true };
        if !filling.absent.is_missing(range) {
            return true;
        }
        if self.leading.is_superseded || self.local.failed || self.closing {
            self.actions.push_back(Action::Reply { request: id, result: Err(WriteFailed) });
        } else {
            filling.absent.wait(id, range);
            self.drive(now);
        }
        false
    }

    /// Whether any of these bytes are absent.
    #[must_use]
    pub fn is_missing(&self, range: ByteRange) -> bool {
        self.filling.as_ref().is_some_and(|filling| filling.absent.is_missing(range))
    }

    /// Whether a replica answers fetches, in the session that is open.
    #[must_use]
    pub fn may_fetch_from(&self, host: HostId) -> bool {
        self.peers.get(&host).is_some_and(Peer::may_fetch)
    }

    /// How far the rebuild is, while there is one.
    #[must_use]
    pub fn rebuild(&self) -> Option<Progress> {
        let Filling { absent, is_source_lost, .. } = self.filling.as_ref()?;
        Some(Progress { is_source_lost: *is_source_lost, ..absent.progress() })
    }

    /// The source sent what a fetch asked for. Says whether its content is needed, until [`Action::DropFetched`].
    ///
    /// # Errors
    /// [`PeerError`] when it was asked for nothing of the kind.
    pub fn handle_fetched(
        &mut self,
        host: HostId,
        session: Session,
        (id, range): (FetchId, ByteRange),
        content: Fetched,
        now: Time,
    ) -> Result<bool, PeerError> {
        let is_current = self.peers.get(&host).is_some_and(|peer| peer.session() == Some(session));
        let Some(filling) = self.filling.as_mut().filter(|_| is_current) else { return Ok(false) };
        if filling.absent.source() != host || filling.absent.asked(id) != Some(range) {
            return Err(PeerError::Misbehaved("it sent content that nobody asked for"));
        }
        let is_zero = content == Fetched::Zero;
        let parts = filling.absent.fetched(id, content);
        let is_needed = !parts.is_empty();
        let mut admitted = Vec::new();
        for part in parts {
            let landing = filling.next;
            filling.next += 1;
            filling.landings.insert(landing, (part, is_zero));
            if self.order.admit(Admitted::Landing(landing), part.range) {
                admitted.push(Admitted::Landing(landing));
            }
        }
        self.run(admitted);
        self.drive(now);
        Ok(is_needed)
    }

    /// The source could not read what a fetch asked for.
    ///
    /// # Errors
    /// [`PeerError`] when it was asked for nothing of the kind.
    pub(super) fn fetch_failed(&mut self, host: HostId, id: FetchId, now: Time) -> Result<(), PeerError> {
        let Some(filling) = &mut self.filling else { return Ok(()) };
        if filling.absent.source() != host || filling.absent.asked(id).is_none() {
            return Err(PeerError::Misbehaved("it could not read what nobody asked for"));
        }
        filling.absent.fetched(id, Fetched::Failed);
        self.drive(now);
        Ok(())
    }

    /// A landing that may run now.
    pub(super) fn land(&mut self, landing: u64) {
        let filling = self.filling.as_ref().expect("what lands was absent");
        let (part, is_zero) = filling.landings[&landing];
        self.actions.push_back(Action::Land { landing, part, is_zero });
    }

    /// A part of what was fetched was written to the backing, or could not be; then it is fetched again.
    pub fn handle_landed(&mut self, landing: u64, written: bool, now: Time) {
        let filling = self.filling.as_mut().expect("what lands was absent");
        let (part, _) = filling.landings.remove(&landing).expect("a landing ends once");
        if filling.absent.landed(part, written, now) {
            self.actions.push_back(Action::DropFetched(part.fetch));
        }
        let freed = self.order.finish(Admitted::Landing(landing), part.range);
        self.run(freed);
        self.drive(now);
    }

    /// The file of absent blocks was written, or could not be; then it is tried again.
    pub fn handle_absent_written(&mut self, written: bool, now: Time) {
        let filling = self.filling.as_mut().expect("its file is written");
        if written {
            filling.absent.written();
            self.end_sync(true, now);
        } else {
            filling.absent.not_written();
            filling.again_at = Some(now.after(AGAIN));
        }
        self.drive(now);
    }

    /// What a sync covers can't be recorded, and is not tried again: whoever waits for it hears so.
    fn give_sync_up(&mut self) {
        let Some(filling) = self.filling.as_mut().filter(|filling| filling.again_at.is_some()) else {
            return;
        };
        filling.again_at = None;
        if !std::mem::take(&mut filling.is_writing) {
            return;
        }
        let (_, flushes) = self.local.running.take().expect("it covers what is being recorded");
        let later = std::mem::take(&mut self.local.flushes);
        flushes.into_iter().chain(later).for_each(|flush| self.fail(flush));
    }

    /// It is recorded that nothing is absent, or could not be.
    pub fn handle_filled(&mut self, recorded: bool, now: Time) {
        let filling = self.filling.as_mut().expect("it was being filled");
        filling.is_ending = false;
        if recorded {
            let filling = self.filling.take().expect("it was looked at");
            assert!(filling.landings.is_empty(), "nothing is fetched that is there");
            let source = filling.absent.source();
            self.peers.get_mut(&source).into_iter().for_each(|peer| peer.set_source(false));
            // The other pieces of these were under way, and the file says nothing of any block any more.
            for (id, sequence, durable) in filling.unsettled {
                self.owe(id, sequence, durable, now);
            }
        } else {
            filling.again_at = Some(now.after(AGAIN));
        }
        self.drive(now);
    }

    /// Whether a piece must wait since it overwrites a part of a block that is not here.
    pub(super) fn wait_for_fill(&mut self, piece: Piece) -> bool {
        let Some(filling) = self.filling.as_mut().filter(|filling| filling.absent.lacks_edges(piece.range))
        else {
            return false;
        };
        filling.absent.want_edges(piece.range);
        self.pipeline.wait(piece, Wait::Fill);
        true
    }

    /// A piece has its place in the one order: says whether its answer waits for the file of absent blocks.
    pub(super) fn overwrite_absent(&mut self, sequence: Sequence, range: ByteRange) -> bool {
        let Some(filling) = &mut self.filling else { return false };
        let is_unsettled = filling.absent.is_unsettled(range);
        filling.absent.overwrite(sequence, range);
        is_unsettled
    }

    /// A request is done here, but the file says of what it wrote that it is absent.
    pub(super) fn settle_absent(&mut self, id: RequestId, sequence: Sequence, durable: bool) {
        let filling = self.filling.as_mut().expect("blocks that are unsettled");
        filling.unsettled.push((id, sequence, durable));
        self.local.wanted = true;
    }

    /// A sync has ended well. Says whether what it covers may be reported: the bits of what is durable are cleared first.
    pub(super) fn clears_absent(&mut self) -> bool {
        let Some(filling) = &mut self.filling else { return false };
        let Some(changes) = filling.absent.synced() else { return false };
        filling.is_writing = true;
        self.actions.push_back(Action::WriteAbsent(changes));
        true
    }

    /// A sync failed.
    pub(super) fn lose_unsynced_fill(&mut self) {
        if let Some(filling) = &mut self.filling {
            filling.absent.sync_failed();
        }
    }

    /// The session with a replica was refused or ended for this reason.
    pub(super) fn is_estranged_from(&mut self, host: HostId, why: &PeerError) {
        let Some(filling) = self.filling.as_mut().filter(|filling| filling.absent.source() == host) else {
            return;
        };
        filling.is_source_lost |= match why {
            PeerError::SplitBrain | PeerError::SourceChanged | PeerError::NothingInCommon => true,
            PeerError::Refused(no) => matches!(no.refusal, Refusal::SplitBrain | Refusal::Beyond),
            _ => false,
        };
    }

    /// Everything up to this write is durable, and what that means for absent blocks, too.
    pub(super) fn settled_absent(&mut self, covers: Sequence, now: Time) {
        let Some(filling) = &mut self.filling else { return };
        filling.is_writing = false;
        let settled: Vec<_> =
            filling.unsettled.extract_if(.., |(_, sequence, _)| *sequence <= covers).collect();
        self.local.wanted |= !filling.unsettled.is_empty();
        for (id, sequence, durable) in settled {
            self.owe(id, sequence, durable, now);
        }
    }

    /// What came here is made durable where nobody waits for it.
    pub(super) fn want_fill_sync(&mut self, now: Time) {
        self.local.wanted |= self.filling.as_ref().is_some_and(|filling| filling.absent.wants_sync(now));
    }

    /// Goes on where it can: asks the source, lets those go on whose blocks are here.
    pub(super) fn fill(&mut self, now: Time) {
        if self.filling.is_none() {
            return;
        }
        if self.fills_no_more() {
            self.give_sync_up();
            return self.give_filling_up(now);
        }
        self.record_absent_again(now);
        self.fetch(now);
        let Some(filling) = &mut self.filling else { return };
        for request in filling.absent.take_ready() {
            self.actions.push_back(Action::ReadLocal { request });
        }
        for request in filling.absent.take_unreadable() {
            self.actions.push_back(Action::Reply { request, result: Err(WriteFailed) });
        }
        let absent = &filling.absent;
        let is_idle = filling.landings.is_empty() && filling.unsettled.is_empty();
        if absent.is_filled() && is_idle && !filling.is_ending && filling.again_at.is_none() {
            filling.is_ending = true;
            self.actions.push_back(Action::Filled);
        }
        let lost = self.pipeline.take_from_fill(|piece| absent.has_unreadable_edges(piece.range));
        let ready = self.pipeline.take_from_fill(|piece| !absent.lacks_edges(piece.range));
        lost.into_iter().for_each(|piece| self.give_piece_up(piece, now));
        ready.into_iter().for_each(|piece| self.begin_if_active(piece, now));
        let is_reached = self.filling.as_ref().is_none_or(|filling| filling.seen.is_some());
        if (self.closing || self.start.refuses) && !is_reached {
            self.wait_for_fill_no_more(now);
        }
    }

    /// Whether nothing is fetched or recorded any more.
    fn fills_no_more(&self) -> bool {
        self.local.failed || self.leading.is_superseded
    }

    fn record_absent_again(&mut self, now: Time) {
        let Some(filling) = self.filling.as_mut() else { return };
        if filling.again_at.take_if(|at| now >= *at).is_some()
            && filling.is_writing
            && let Some(changes) = filling.absent.again()
        {
            self.actions.push_back(Action::WriteAbsent(changes));
        }
    }

    fn fetch(&mut self, now: Time) {
        let is_active = self.requests.were_asked_lately(now) || self.pipeline.first_under_way().is_some();
        let need = match is_active {
            _ if self.closing => Need::Wanted,
            true => Need::Little,
            false => Need::All,
        };
        let Some(filling) = &mut self.filling else { return };
        filling.absent.wake(now);
        let peer = self.peers.get_mut(&filling.absent.source()).filter(|peer| peer.may_fetch());
        let Some(peer) = peer else {
            filling.seen = None;
            return;
        };
        filling.is_source_lost = false;
        let seen = peer.session().map(|session| (session, peer.is_resyncing()));
        if std::mem::replace(&mut filling.seen, seen) != seen {
            filling.absent.prefer(peer.map());
        }
        while let Some(asked) = filling.absent.pick(need, now) {
            peer.fetch(asked);
        }
    }

    /// What waits for absent blocks is carried out no more.
    pub(super) fn give_filling_up(&mut self, now: Time) {
        let Some(filling) = &mut self.filling else { return };
        for (id, ..) in std::mem::take(&mut filling.unsettled) {
            match self.leading.is_superseded {
                true => self.answer(id, Err(WriteFailed)),
                false => self.fail(id),
            }
        }
        self.wait_for_fill_no_more(now);
    }

    /// Nothing waits until absent blocks are here any more.
    pub(super) fn wait_for_fill_no_more(&mut self, now: Time) {
        let reads = self.filling.as_mut().map(|filling| filling.absent.give_up());
        for request in reads.into_iter().flatten() {
            self.actions.push_back(Action::Reply { request, result: Err(WriteFailed) });
        }
        for piece in self.pipeline.take_from_fill(|_| true) {
            self.give_piece_up(piece, now);
        }
    }

    /// When [`Tracker::fill`] has something to do.
    pub(super) fn fill_timeout(&self) -> Option<Time> {
        let filling = self.filling.as_ref().filter(|_| !self.fills_no_more())?;
        let is_syncing = self.local.running.is_some();
        [filling.absent.timeout(is_syncing), filling.again_at].into_iter().flatten().min()
    }

    /// Whether nothing of a rebuild is being written.
    pub(super) fn is_fill_idle(&self) -> bool {
        self.filling.as_ref().is_none_or(|filling| {
            filling.landings.is_empty() && !filling.is_ending && filling.unsettled.is_empty()
        })
    }

    /// Whether a sync has something to cover beside writes.
    pub(super) fn has_unsynced_fill(&self) -> bool {
        self.filling
            .as_ref()
            .is_some_and(|filling| filling.absent.has_unsynced() || !filling.unsettled.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::super::testing::{NOW, answers, carry_out, following, host, settings};
    use super::super::{Settings, Work, replies::ReplicaLoss};
    use super::*;
    use crate::disk::activity_log::Recovered;
    use crate::promise::PATIENCE;
    use crate::rebuild::testing::all_absent;
    use crate::terms::Mode;
    use crate::units::EXTENT_BYTES;
    use std::collections::BTreeSet;

    fn rebuilding() -> Tracker {
        let absent = Some(all_absent(host(1), EXTENT_BYTES));
        let settings = Settings { absent, ..settings(ReplicaLoss::Continue, PATIENCE) };
        let log = Recovered::Active { serial: 0, extents: BTreeSet::new() };
        let mut tracker = Tracker::new(settings, &log, vec![following(1, Mode::Async)]);
        answers(&mut tracker, NOW);
        tracker
    }

    /// What is written and answered, in order.
    fn told(tracker: &mut Tracker) -> Vec<&'static str> {
        let mut told = Vec::new();
        while let Some(action) = tracker.poll_action() {
            told.extend(match &action {
                Action::WriteLocal { .. } => Some("write"),
                Action::SyncLocal => Some("sync"),
                Action::WriteAbsent(_) => Some("clear"),
                Action::Reply { .. } => Some("answer"),
                _ => None,
            });
            carry_out(tracker, action, NOW);
        }
        told
    }

    #[test]
    fn a_write_to_an_absent_block_is_answered_when_its_bit_is_cleared() {
        let mut tracker = rebuilding();
        let work = Work::Write { range: ByteRange::new(0, 4096), fua: false };
        tracker.handle_request(RequestId(1), work, NOW);
        assert_eq!(told(&mut tracker), ["write", "sync", "clear", "answer"]);
        tracker.handle_request(RequestId(2), work, NOW);
        assert_eq!(told(&mut tracker), ["write", "answer"], "it is a block like any other now");
    }

    #[test]
    fn what_overwrites_a_part_of_an_absent_block_waits_and_so_does_what_reads_it() {
        let mut tracker = rebuilding();
        let work = Work::Write { range: ByteRange::new(512, 512), fua: false };
        tracker.handle_request(RequestId(1), work, NOW);
        assert!(!tracker.handle_read(RequestId(2), ByteRange::new(8192, 512), NOW));
        assert!(tracker.handle_read(RequestId(3), ByteRange::new(0, 0), NOW));
        assert!(told(&mut tracker).is_empty());
        // The source can't be reached, and the volume is about to be closed.
        tracker.wait_no_more(NOW);
        let failed = answers(&mut tracker, NOW);
        assert_eq!(failed, [(RequestId(2), false), (RequestId(1), false)]);
        tracker.close(NOW);
        answers(&mut tracker, NOW);
        assert!(tracker.is_closed());
        assert!(tracker.is_missing(ByteRange::new(512, 512)));
        assert_eq!(tracker.rebuild().map(|progress| progress.missing_bytes), Some(EXTENT_BYTES));
    }

    #[test]
    fn what_comes_while_the_device_is_being_closed_does_not_wait_for_a_source_that_is_away() {
        let mut tracker = rebuilding();
        tracker.wait_no_more(NOW);
        let work = Work::Write { range: ByteRange::new(512, 512), fua: false };
        tracker.handle_request(RequestId(1), work, NOW);
        assert_eq!(answers(&mut tracker, NOW), [(RequestId(1), false)]);
    }

    /// Carries everything out but the writes of the file of absent blocks, which fail.
    fn without_the_file(tracker: &mut Tracker, now: Time) -> Vec<(RequestId, bool)> {
        let mut answers = Vec::new();
        while let Some(action) = tracker.poll_action() {
            match action {
                Action::WriteAbsent(_) => tracker.handle_absent_written(false, now),
                Action::Reply { request, result } => answers.push((request, result.is_ok())),
                action => drop(carry_out(tracker, action, now)),
            }
        }
        answers
    }

    #[test]
    fn what_waits_for_the_file_of_absent_blocks_hears_when_it_is_not_tried_again() {
        let write = Work::Write { range: ByteRange::new(0, 4096), fua: false };
        let begun = || {
            let mut tracker = rebuilding();
            tracker.handle_request(RequestId(1), write, NOW);
            assert_eq!(without_the_file(&mut tracker, NOW), []);
            tracker.handle_request(RequestId(2), Work::Flush, NOW);
            assert_eq!(without_the_file(&mut tracker, NOW), []);
            assert!(tracker.rebuild().unwrap().is_unrecorded);
            tracker
        };
        // Room that comes back is taken up.
        let mut tracker = begun();
        let later = tracker.poll_timeout().unwrap().max(NOW.after(AGAIN));
        tracker.handle_timeout(later);
        let mut answered = answers(&mut tracker, later);
        answered.sort_unstable_by_key(|(request, _)| request.0);
        assert_eq!(answered, [(RequestId(1), true), (RequestId(2), true)]);
        assert!(!tracker.rebuild().unwrap().is_unrecorded);
        // Another host was promoted.
        let mut tracker = begun();
        tracker.supersede(NOW);
        let mut answered = answers(&mut tracker, NOW);
        answered.sort_unstable_by_key(|(request, _)| request.0);
        assert_eq!(answered, [(RequestId(1), false), (RequestId(2), false)]);
        let filling = tracker.fill_timeout();
        assert_eq!(filling, None, "nothing is left to be done in time");
    }

    #[test]
    fn what_no_sync_covered_when_one_failed_is_read_by_nobody() {
        let mut tracker = rebuilding();
        let range = ByteRange::new(0, 4096);
        tracker.handle_request(RequestId(1), Work::Write { range, fua: false }, NOW);
        while let Some(action) = tracker.poll_action() {
            match action {
                Action::SyncLocal => tracker.handle_synced(false, NOW),
                action => drop(carry_out(&mut tracker, action, NOW)),
            }
        }
        assert!(tracker.is_missing(range));
        assert!(!tracker.handle_read(RequestId(2), range, NOW));
        assert_eq!(answers(&mut tracker, NOW), [(RequestId(2), false)]);
    }
}
