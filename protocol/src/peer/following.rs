//! How a replica comes to follow the newest generation, and counts: the commit, generations that begin within a session,
//! what is agreed and released, and what it has of what was written (L1, W4, D5).

use super::{Action, Circumstances, Peer, Phase, State, Step, TAIL_TIME, Wants};
use crate::given::Given;
use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use crate::terms::Mode;
use crate::units::{Epoch, GenerationId, HostId, Position, Sequence, Time};
use crate::wire::message::{Agreed, Alone, AskMark, Commit, Release};
use crate::wire::{Body, FrameHeader};
use std::num::NonZeroU64;
use std::ops::Range;
use std::time::Duration;

impl Peer {
    /// Commits when everything up to the epoch that closed after the last copy is durable on the replica.
    pub(super) fn commit(&mut self, circumstances: &Circumstances<'_>) -> Wants {
        let State::Linked(link) = &self.state else { return Wants::default() };
        if !matches!(link.phase(), Phase::Committing { sent: None, .. }) || !self.has_recorded_word() {
            return Wants::default();
        }
        let State::Linked(link) = &mut self.state else { return Wants::default() };
        if let Phase::Committing { closed: None, streams: false, .. } = link.phase() {
            // The replica has everything, and had before this session.
            let (epoch, sequence) = circumstances.position;
            link.progress.take(Step::Close(epoch, sequence));
            (link.sent, link.received) = (sequence, sequence);
        }
        let Phase::Committing { closed: Some((epoch, sequence)), streams, .. } = link.phase() else {
            return Wants { epoch_end: true, ..Wants::default() };
        };
        if streams && link.durable < epoch && !planted(Bug::CommitAtLastCopy) {
            return Wants::default();
        }
        if !circumstances.may_commit {
            return Wants { generation: true, ..Wants::default() };
        }
        if circumstances.told_before.is_some_and(|end| epoch >= end) {
            return Wants { is_untold: true, ..Wants::default() };
        }
        let generation = circumstances.lineage.first().copied().unwrap_or_default();
        link.progress.take(Step::Commit(generation));
        self.newest.offer(generation);
        let commit = Commit {
            session: link.session,
            position: circumstances.opened.unwrap_or(Position { generation, epoch, sequence }),
            lineage: circumstances.lineage.to_vec(),
            active: (circumstances.active)(),
            mode: self.mode,
            given: self.word.wanted().clone(),
        };
        self.word.is_sent();
        self.actions.push_back(Action::Send(commit.into()));
        Wants::default()
    }

    /// Whether the map's file says what the commit gives the replica its word on. It is written, where it does not.
    fn has_recorded_word(&mut self) -> bool {
        let Some(given) = self.word.to_record() else { return true };
        self.marks.map.note_given(given);
        self.write_map();
        false
    }

    /// What the replica is to count on from the next commit on.
    pub(crate) fn give(&mut self, given: Given) {
        self.word.want(given);
    }

    /// Whether what the replica may count on is another one than when this was last asked.
    pub(crate) fn take_change_of_word(&mut self) -> bool {
        self.word.take_change()
    }

    /// Whether the replica may be promoted while `peer` is silent, by another word than `given`.
    pub(crate) fn bears_silence_unlike(&self, given: &Given, other: HostId, now: Time) -> bool {
        let is_timed = self.may_follow() || self.granted.holds(now);
        self.word.bears_silence_of(other, Some(given), is_timed)
    }

    /// Whether it may be so by a word that holds for ever.
    pub(crate) fn bears_silence_for_ever(&self, other: HostId) -> bool {
        self.word.is_for_ever() && self.word.bears_silence_of(other, None, false)
    }

    /// Whether the replica follows, and has to be resynced for what it is to count on for ever, or no more: it would hear of it
    /// with the next session only.
    pub(crate) fn awaits_word(&self) -> bool {
        self.may_follow() && self.word.is_news()
    }

    /// Whether it is connected, and is being brought into sync.
    pub(crate) fn is_on_its_way(&self) -> bool {
        matches!(&self.state, State::Linked(link) if link.phase() != Phase::InSync)
    }

    /// What the replica may count on is not known, and it may be this, as it would have been given it.
    pub(crate) fn assume_given(&mut self, given: impl FnOnce() -> Given) {
        if self.marks.map.given().is_none() && self.mode == Mode::Sync {
            self.word.assume(given());
        }
    }

    /// Whether an answer without the replica breaks no word that holds for ever. `has_it` says of another replica whether it
    /// has all that the answer speaks for.
    pub(crate) fn allows(&self, has_it: impl Fn(HostId) -> bool) -> bool {
        self.may_follow() || self.word.allows(has_it)
    }

    /// A generation began, durably: what is streamed from here on, in epochs from this one on, belongs to it (L1).
    pub(crate) fn handle_generation(&mut self, generation: GenerationId, epoch: Epoch) {
        // One that is being resynced records it with its commit only.
        self.newest.began(generation, epoch, self.may_follow());
        let State::Linked(link) = &mut self.state else { return };
        // One that had everything from the beginning follows with its commit, though nothing was streamed yet.
        if link.phase().streams() || link.phase().follows() {
            let body = Body::Generation { generation };
            let header = FrameHeader { session: link.session, stream: link.stream, body };
            self.actions.push_back(Action::SendFrame { header, request: None });
        }
    }

    /// A replica in sync records a generation before it writes the first frame of it: from then on the map is relative to
    /// that one (L2).
    pub(super) fn confirm_followed(&mut self) {
        let State::Linked(link) = &self.state else { return };
        let is_told = link.phase() == Phase::InSync && !planted(Bug::PruneFollowed);
        if is_told && let Some(recorded) = self.newest.recorded_by(link.durable) {
            self.marks.map.confirm(link.copy, recorded);
        }
    }

    /// This primary was opened at this generation, which may be the replica's newest one too.
    pub(crate) fn opened_at(&mut self, generation: GenerationId) {
        self.newest.may_be(generation);
        self.denial.opened_at(generation, self.marks.map.base().generation);
    }

    /// Which generations of this lineage the replica's newest one may be.
    pub(crate) fn newest_there(&self, lineage: &[GenerationId]) -> impl Iterator<Item = GenerationId> {
        self.newest.candidates(self.marks.map.base().generation, lineage)
    }

    /// Whether the replica is in sync, or may be: it was sent a commit.
    pub(crate) fn may_follow(&self) -> bool {
        matches!(&self.state, State::Linked(link) if link.phase().follows())
    }

    /// Whether the replica is to be told that this epoch, with that last write, is agreed (D5), for the first or the second
    /// time. It must have all of it itself: with its commit it took extents over that others need not keep any more.
    pub(crate) fn awaits(&self, (epoch, last): (Epoch, Sequence)) -> bool {
        let State::Linked(link) = &self.state else { return false };
        let is_news = link.agreed < epoch || link.agreed == epoch && !link.agreed_twice;
        link.phase() == Phase::InSync && is_news && self.has_durably(last)
    }

    /// Everything up to the end of this epoch is durable on all hosts that follow the generation (D5).
    pub(crate) fn tell_agreed(&mut self, agreed: (Epoch, Sequence)) {
        if self.awaits(agreed)
            && let State::Linked(link) = &mut self.state
        {
            link.agreed_twice = link.agreed == agreed.0;
            link.agreed = agreed.0;
            self.actions.push_back(Action::Send(Agreed { session: link.session, epoch: agreed.0 }.into()));
        }
    }

    /// The primary is being demoted: an in-sync replica that has everything records that it does. Nothing is written
    /// any more.
    pub(crate) fn release(&mut self, generation: GenerationId) {
        let State::Linked(link) = &mut self.state else { return };
        if link.phase() == Phase::InSync && link.window.is_empty() && link.released.is_none() {
            link.released = Some(false);
            self.actions.push_back(Action::Send(Release { session: link.session, generation }.into()));
        }
    }

    /// Whether the replica has recorded a release.
    #[must_use]
    pub fn is_released(&self) -> bool {
        matches!(&self.state, State::Linked(link) if link.released == Some(true))
    }

    /// Whether a write to this range should wait for a copy: few blocks have been left to copy for a while, and this is
    /// one of them (R2).
    pub(crate) fn wants_quiet(&self, range: ByteRange, now: Time) -> bool {
        let State::Linked(link) = &self.state else { return false };
        let is_tail = link.tail_since.is_some_and(|since| now >= since.after(TAIL_TIME));
        let mut parts = self.marks.map.split(range.blocks(self.block_size));
        // What can't be read is copied after the write, not before it.
        let waits = |mut part: Range<u64>| part.any(|block| !link.resync.is_unreadable(block));
        link.phase() == Phase::Resyncing && is_tail && parts.any(|(is_dirty, part)| is_dirty && waits(part))
    }

    /// Whether the replica is in sync, and so counts for its mode (W4).
    #[must_use]
    pub fn is_in_sync(&self) -> bool {
        let counts = |phase: Phase| {
            phase == Phase::InSync || phase == Phase::Resyncing && planted(Bug::CountResyncing)
        };
        matches!(&self.state, State::Linked(link) if counts(link.phase()))
    }

    /// When the replica counts, writes and flushes are answered by this.
    #[must_use]
    pub fn mode(&self) -> Mode {
        self.mode
    }

    /// The operator chose another mode: replies go by it from now on, and the replica hears of it with the next session.
    pub(crate) fn set_mode(&mut self, mode: Mode) {
        if mode != self.mode {
            self.denial.mode_changed();
        }
        self.mode = mode;
    }

    /// The operator chose how many bytes a second a resync may copy at most.
    pub(crate) fn set_resync_limit(&mut self, limit: Option<NonZeroU64>) {
        self.resync_limit = limit;
        if let State::Linked(link) = &mut self.state {
            link.resync.set_limit(limit);
        }
    }

    /// A replica that is not in sync any more hears that it will be passed over, and answers that it counts on nothing.
    pub(super) fn tell_alone(&mut self) {
        let State::Linked(link) = &mut self.state else { return };
        let is_passed_over = matches!(link.phase(), Phase::Draining | Phase::Beginning | Phase::Resyncing);
        if self.granted.until().is_some()
            && is_passed_over
            && !std::mem::replace(&mut link.is_told_alone, true)
        {
            self.actions.push_back(Action::Send(Alone { session: link.session }.into()));
        }
    }

    /// Until when the replica may count on nothing being answered without it, if it is not in sync.
    pub(crate) fn promised(&self) -> Option<Time> {
        self.granted.until().filter(|_| !self.may_follow())
    }

    /// The replica may have this host's word from before, whatever is known here.
    pub(crate) fn keep_word(&mut self, patience: Duration, until: Option<Time>) {
        self.granted.keep(patience, until.filter(|_| self.word.holds_for_a_time()));
    }

    /// This host was away: whatever it promised holds for as long as if it had just been asked.
    pub(crate) fn renew_word(&mut self, now: Time) {
        self.granted.renew(now);
    }

    /// Something is answered for all writes up to this one, in the generation `newest`.
    pub(crate) fn note_answered(&mut self, sequence: Sequence, newest: Option<GenerationId>) {
        self.answered.note(sequence);
        if self.answered.leaves_out(sequence) {
            self.denial.note_answered(newest);
        }
    }

    /// Whether applications were answered something that the replica lacks.
    #[must_use]
    pub fn lacks_answered(&self) -> bool {
        let followed = match &self.state {
            State::Linked(link) => Some(link.followed()),
            _ => None,
        };
        self.answered.lacks(followed, self.mode)
    }

    /// Where it is known from a run before that nothing was answered that the replica lacks: the newest generation that it
    /// confirmed. Later ones were begun for nothing.
    pub(crate) fn answered_generation(&self) -> Option<GenerationId> {
        let confirmed = Some(self.marks.map.base().generation).filter(|generation| !generation.is_none());
        confirmed.filter(|_| self.denial.is_inherited() && !self.lacks_answered())
    }

    /// Asks the replica to say that it is there.
    pub(crate) fn ask_mark(&mut self) {
        if let State::Linked(link) = &self.state {
            self.actions.push_back(Action::Send(AskMark { session: link.session }.into()));
        }
    }

    /// Whether an in-sync replica has received every write up to this one.
    pub(crate) fn has_received(&self, sequence: Sequence) -> bool {
        match &self.state {
            State::Linked(link) => link.received >= sequence.min(link.sent),
            _ => false,
        }
    }

    /// Whether an in-sync replica has every write up to this one durably.
    pub(crate) fn has_durably(&self, sequence: Sequence) -> bool {
        match &self.state {
            State::Linked(link) => link.window.oldest().is_none_or(|(oldest, _)| oldest > sequence),
            _ => false,
        }
    }

    /// Whether the replica left the stream since this was last asked.
    pub(crate) fn take_left(&mut self) -> bool {
        std::mem::take(&mut self.left)
    }

    /// Whether the replica may have the newest generation, and yet lack some of it. What it confirmed in an earlier run
    /// need not be recorded here, so any replica may have the generation that this run began with.
    pub(crate) fn may_lag_within_newest(&self) -> bool {
        let was_met = !self.marks.map.base().is_none();
        was_met && self.newest.may_be_ours() && !self.is_in_sync() && !self.marks.map.is_clean()
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Identity, LiveWrite};
    use super::*;
    use crate::dirty_map::DirtyMap;
    use crate::disk::dirty_map::Base;
    use crate::terms::{DataState, Fence};
    use crate::units::RequestId;
    use crate::units::{BlockSize, CopyId, HostId, Mark, Session, VolumeId};
    use crate::wire::VERSIONS;
    use crate::wire::message::{Acknowledgement, Committed, Union, Welcome};

    const PEER: HostId = HostId([2; 32]);
    const SESSION: Session = Session(1);
    const NOW: Time = Time(std::time::Duration::ZERO);

    /// A peer that lacks nothing, up to the point where the commit is sent.
    fn committing() -> Peer {
        let (size_bytes, block_size, copy) = (1 << 20, BlockSize::default(), CopyId([2; 16]));
        let (lineage, fence) = (vec![GenerationId([1; 16])], Fence { counter: 1, holder: HostId([1; 32]) });
        let base = Base { copy, generation: lineage[0], adopted: 0 };
        let map = DirtyMap::full(VolumeId([1; 16]), PEER, size_bytes, block_size).clean(base);
        let mut peer = Peer::new(PEER, map, size_bytes, block_size, 1 << 20, Mode::Sync);
        let identity = Identity {
            volume: VolumeId([1; 16]),
            size_bytes,
            block_size,
            sector_bytes: 512,
            copy: CopyId([1; 16]),
            adopted: 0,
            fence,
            lineage: lineage.clone(),
            members: Vec::new(),
            ends: crate::lineage::Ends::default(),
        };
        peer.handle_connected(SESSION, &identity);
        let welcome = Welcome {
            version: VERSIONS.1,
            features: 0,
            session: SESSION,
            copy,
            data: DataState::Consistent,
            can_roll_back: false,
            source: fence,
            mark: Mark::default(),
            fence,
            lineage: lineage.clone(),
            sector_bytes: 512,
            window_bytes: 1 << 20,
        };
        for message in [welcome.into(), Union { ranges: Vec::new(), last: true }.into()] {
            peer.handle_message(message, Sequence(0), NOW).unwrap();
        }
        let position = (Epoch(1), Sequence(0));
        let (application_is_active, may_commit, active) = (false, true, &Vec::new);
        peer.commit(&Circumstances {
            application_is_active,
            lineage: &lineage,
            position,
            opened: None,
            told_before: None,
            may_commit,
            active,
            absent: None,
            has_failed: false,
        });
        peer
    }

    #[test]
    fn a_replica_that_was_sent_a_commit_may_follow_and_is_told_of_what_it_has_alone() {
        let mut peer = committing();
        // It may have recorded the commit, and be promoted as an equal.
        assert!(peer.may_follow() && !peer.is_in_sync());
        let committed = Committed { session: SESSION, position: Position::default() };
        peer.handle_message(committed.into(), Sequence(0), NOW).unwrap();
        assert!(peer.may_follow() && peer.is_in_sync());
        let (range, request) = (ByteRange::new(0, 512), RequestId(1));
        peer.handle_write(
            LiveWrite { request, range, epoch: Epoch(2), sequence: Sequence(1), zero: None },
            NOW,
        );
        let agreed = (Epoch(2), Sequence(1));
        assert!(!peer.awaits(agreed), "its log may be the only one that names the write's extent");
        peer.handle_epoch_end(Epoch(2), Sequence(1));
        let (received, durable) = (Sequence(1), Epoch(2));
        let durable = Acknowledgement { session: SESSION, received, durable, ..Acknowledgement::default() };
        peer.handle_message(durable.into(), Sequence(1), NOW).unwrap();
        assert!(peer.awaits(agreed));
    }
}
