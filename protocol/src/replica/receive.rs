//! What a primary sends, taken in: greetings, which drain the session before, and frames, which are checked before any
//! of them is believed.
//!
//! A greeting is compared with this copy's history first (L3): where this host wrote what the primary's lineage does not
//! contain, as a primary that went on alone did, nothing is overwritten until the operator decides.

use super::gap::runs;
use super::{
    Action, COPY_LIMIT_BYTES, Copies, DIGEST_COST_BYTES, DIGEST_LIMIT_BYTES, FrameId, Item, Link, Marker,
    PrimaryMisbehaved, Replica, StateChange,
};
use crate::disk::superblock::Superblock;
use crate::lineage::{self, Relation};
use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use crate::session::FRAME_COST_BYTES;
use crate::units::{Epoch, Sequence};
use crate::wire::message::{
    DataState, Fence, Hello, Message, Mode, RANGES_PER_UNION, Refusal, Refused, Superseded, Union, Welcome,
};
use crate::wire::{Body, FrameHeader, VERSIONS};
use std::collections::VecDeque;

/// No more ranges than this are told apart in a greeting; beyond it, any block may differ.
const UNION_LIMIT: usize = 1 << 20;

/// Whether whoever greets with `fence` may not write, because `newest` was given to another host since, or to one of the
/// same number (L5).
fn is_superseded(fence: Fence, newest: Fence) -> bool {
    let is_rival = fence.counter == newest.counter && fence.holder != newest.holder;
    fence.counter < newest.counter || is_rival && !planted(Bug::FollowEqualFence)
}

impl Replica {
    pub(super) fn greet(&mut self, hello: Hello) {
        if let Some(answer) = self.rejection(&hello) {
            self.actions.push_back(Action::Send(answer));
            return;
        }
        self.unlink();
        self.greeting = Some(hello);
        self.go_on();
    }

    /// What a greeting is answered with that is not taken. One that is taken takes the place of the session that is open.
    #[must_use]
    pub fn rejection(&self, hello: &Hello) -> Option<Message> {
        let refused = self.objection(hello).map(Message::from);
        refused.or_else(|| self.supersedes(hello.fence).map(Message::from))
    }

    /// Why a greeting is refused, if it is. One from a host that another one was promoted after has another answer.
    #[must_use]
    pub fn objection(&self, hello: &Hello) -> Option<Refused> {
        let Superblock { volume, size_bytes, block_size, .. } = self.superblock;
        let refused = |refusal, text: &str| Some(Refused { refusal, text: text.into() });
        if hello.versions.0 > VERSIONS.1 || hello.versions.1 < VERSIONS.0 {
            return refused(Refusal::Version, "no common protocol version; upgrade the older agent");
        }
        if (hello.volume, hello.size_bytes, hello.block_size) != (volume, size_bytes, block_size) {
            return refused(Refusal::Unrelated, "the volume's identity, size or block size differs here");
        }
        if is_superseded(hello.fence, self.superblock.fence) {
            // It is told so, whatever else there is to say, and becomes a replica (L5); whose content counts is decided
            // when another primary greets.
            return None;
        }
        if self.failed {
            return refused(Refusal::Backing, "the replica's backing failed; see the replica's log");
        }
        if self.gap.is_full {
            return Some(self.no_room());
        }
        if hello.session <= self.last_session {
            return refused(Refusal::Other, "the session is not newer than the last one");
        }
        match lineage::relation(&self.superblock.lineage, &hello.lineage) {
            Relation::MineIsNewer | Relation::Forked(_) => refused(
                Refusal::SplitBrain,
                "split brain: this host wrote alone after the two were last in sync",
            ),
            Relation::Same | Relation::TheirsIsNewer | Relation::Unrelated => None,
        }
    }

    /// Whether a greeting of this fence comes from a host that another one was promoted after (L5).
    #[must_use]
    pub fn supersedes(&self, fence: Fence) -> Option<Superseded> {
        let newest = self.superblock.fence;
        is_superseded(fence, newest).then_some(Superseded { fence: newest })
    }

    pub(super) fn unlink(&mut self) {
        let Some(link) = self.link.take() else { return };
        // The ends of epochs were dropped on arrival.
        let held = link
            .queue
            .into_iter()
            .filter(|(_, body)| !matches!(body, Body::EpochEnd { .. } | Body::Generation { .. }));
        self.actions.extend(held.map(|(frame, _)| Action::Drop(frame)));
        for frame in self.order.drop_waiting() {
            self.items.remove(&frame);
            self.actions.push_back(Action::Drop(frame));
        }
        self.drop_unlogged();
        self.drop_unsaved();
        self.commit = None;
    }

    /// Answers a greeting once everything of the old session has ended.
    pub(super) fn welcome(&mut self) {
        if !self.is_idle() {
            return;
        }
        let Some(hello) = self.greeting.take() else { return };
        if let Some(answer) = self.rejection(&hello) {
            // What was being recorded when it came may have changed the lineage (L3).
            self.actions.push_back(Action::Send(answer));
            return;
        }
        if hello.fence != self.superblock.fence || self.superblock.released {
            let follow = StateChange::Follow(hello.fence);
            self.greeting = Some(hello);
            return self.change_state(follow, None);
        }
        if self.superblock.mode != Mode::Async && hello.lineage.first() != self.superblock.lineage.first() {
            // Something was replied without this replica, which begins a generation (L1).
            self.greeting = Some(hello);
            return self.change_state(StateChange::Behind, None);
        }
        self.log.is_wanted = hello.members.len() > 2 && !planted(Bug::TakeForEqual);
        self.last_session = hello.session;
        self.order.widen_sector(hello.sector_bytes.clamp(512, 1 << 16).next_power_of_two().into());
        self.marker = Marker::default();
        self.link = Some(Link {
            session: hello.session,
            stream: hello.stream,
            generation: hello.lineage.first().copied().unwrap_or_default(),
            generation_came: false,
            announced: false,
            release: None,
            beginning: false,
            mode: hello.mode,
            fence: hello.fence,
            received: Sequence(0),
            receipt: Sequence(0),
            open: None,
            closed: Epoch(0),
            ended: None,
            queue: VecDeque::new(),
            live_under_way: 0,
            live_bytes: 0,
            durable: Epoch(0),
            copies: Copies::default(),
            resync: None,
        });
        let welcome = Welcome {
            version: VERSIONS.1.min(hello.versions.1),
            features: 0,
            session: hello.session,
            copy: self.superblock.copy,
            data: self.superblock.data,
            can_roll_back: self.is_in_gap(),
            source: self.superblock.source,
            marker: self.position,
            fence: self.superblock.fence,
            lineage: self.superblock.lineage.clone(),
            sector_bytes: self.settings.sector_bytes,
            window_bytes: self.settings.window_bytes,
        };
        self.actions.push_back(Action::Send(welcome.into()));
        self.send_union(hello.fence);
    }

    /// Says what may differ here from what the primary has: blocks that this host wrote as primary and that one lacks,
    /// extents that were active here (D3, D5), and what another primary's resync overwrote.
    fn send_union(&mut self, primary: Fence) {
        let Superblock { block_size, size_bytes, source, .. } = self.superblock;
        let mut ranges = self.log.suspects(size_bytes);
        if let Some(map) = self.maps.get(&primary.holder) {
            ranges.extend(runs(map, block_size, size_bytes).take(UNION_LIMIT + 1));
        }
        if self.is_in_gap() && source != primary {
            ranges.extend(self.gap.overwritten(block_size, size_bytes).take(UNION_LIMIT + 1));
        }
        if ranges.len() > UNION_LIMIT {
            ranges = vec![ByteRange::new(0, size_bytes)];
        }
        let mut parts = ranges.chunks(RANGES_PER_UNION).peekable();
        if parts.peek().is_none() {
            self.actions.push_back(Action::Send(Union { ranges: Vec::new(), last: true }.into()));
        }
        while let Some(part) = parts.next() {
            let last = parts.peek().is_none();
            self.actions.push_back(Action::Send(Union { ranges: part.to_vec(), last }.into()));
        }
    }

    /// Takes a frame in. Says whether its payload is needed.
    pub(super) fn accept(&mut self, frame: FrameId, header: FrameHeader) -> Result<bool, PrimaryMisbehaved> {
        if planted(Bug::OldFrameLands) && self.link.as_ref().is_some_and(|link| link.session > header.session)
        {
            return Ok(self.land(frame, header.body));
        }
        let Some(link) = self.link.as_mut().filter(|link| link.session == header.session) else {
            return Ok(false);
        };
        if header.stream != link.stream {
            return Ok(false);
        }
        if header.body.range().end() > self.superblock.size_bytes {
            return Err(PrimaryMisbehaved("a frame reaches past the volume's end"));
        }
        // Ends of epochs take no room in the window, but there is at most one for each frame that does.
        if link.queue.len() as u64 * FRAME_COST_BYTES > 2 * self.settings.window_bytes {
            return Err(PrimaryMisbehaved("it sent more frames than the window holds"));
        }
        match header.body {
            Body::Write { epoch, sequence, .. } | Body::Zero { epoch, sequence, .. } => {
                link.live_bytes += header.body.payload_bytes() + FRAME_COST_BYTES;
                if link.live_bytes > self.settings.window_bytes {
                    return Err(PrimaryMisbehaved("it sent more than the window holds"));
                }
                if !link.is_open(epoch) || sequence < link.received {
                    return Err(PrimaryMisbehaved("a frame came outside its epoch or out of order"));
                }
                link.received = sequence;
                link.queue.push_back((frame, header.body));
                Ok(true)
            }
            Body::EpochEnd { epoch, cut, .. } => {
                if !link.is_open(epoch) {
                    return Err(PrimaryMisbehaved("an epoch ended that was not open"));
                }
                (link.open, link.closed) = (None, epoch);
                link.queue.push_back((frame, header.body));
                if cut {
                    self.note_behind();
                }
                Ok(false)
            }
            Body::Generation { .. } => {
                if link.open.is_some() {
                    return Err(PrimaryMisbehaved("a generation began within an epoch"));
                }
                link.queue.push_back((frame, header.body));
                Ok(false)
            }
            Body::Digest { .. } => {
                link.queue.push_back((frame, header.body));
                Ok(true)
            }
            Body::Copy { number, .. } | Body::CopyZero { number, .. } => {
                if self.superblock.data == DataState::Consistent {
                    return Err(PrimaryMisbehaved("it sent a copy without announcing a resync"));
                }
                link.copies.begin(number)?;
                link.copies.under_way_bytes += header.body.weight_bytes();
                if link.copies.under_way_bytes > COPY_LIMIT_BYTES {
                    return Err(PrimaryMisbehaved("it sent more copies than agreed"));
                }
                self.admit(frame, header.body);
                Ok(true)
            }
            Body::CopyDigest { number, range } => {
                if self.superblock.data == DataState::Consistent {
                    return Err(PrimaryMisbehaved("it compares for a resync that it did not announce"));
                }
                link.copies.begin(number)?;
                link.copies.digest_bytes += range.length + DIGEST_COST_BYTES;
                if link.copies.digest_bytes > DIGEST_LIMIT_BYTES {
                    return Err(PrimaryMisbehaved("it asked for more digests than agreed"));
                }
                self.admit(frame, header.body);
                Ok(true)
            }
            Body::Content { .. } | Body::ContentZero { .. } => {
                Err(PrimaryMisbehaved("it sent content that nobody asked for"))
            }
        }
    }

    /// Writes a live frame of an older session: [`Bug::OldFrameLands`].
    fn land(&mut self, frame: FrameId, body: Body) -> bool {
        let is_write = matches!(body, Body::Write { .. } | Body::Zero { .. });
        if let Some(link) = self.link.as_mut().filter(|_| is_write) {
            link.live_under_way += 1;
            link.live_bytes += body.payload_bytes() + FRAME_COST_BYTES;
            self.admit(frame, body);
        }
        is_write
    }

    pub(super) fn admit(&mut self, frame: FrameId, body: Body) {
        let session = self.link.as_ref().expect("frames are admitted in a session").session;
        self.items.insert(frame, Item { session, body, claimed: None });
        if self.order.admit(frame, body.range()) {
            self.run(vec![frame]);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Settings, SpacePolicy, StateChange, Stored, promotion};
    use super::*;
    use crate::disk::activity_log::Recovered;
    use crate::disk::superblock::Role;
    use crate::ranges::ByteRange;
    use crate::units::{
        BlockSize, CopyId, GenerationId, HostId, Position, Session as SessionNumber, Stream, VolumeId,
    };
    use crate::wire::message::ResyncBegin;
    use crate::wire::message::{Commit, CopyDigest, Message};
    use std::collections::{BTreeMap, BTreeSet};

    fn lineage(text: &str) -> Vec<GenerationId> {
        text.bytes().map(|byte| GenerationId([byte; 16])).collect()
    }

    fn fence(counter: u64, holder: u8) -> Fence {
        Fence { counter, holder: HostId([holder; 32]) }
    }

    /// A copy that follows the fence (2, host 2), with these generations.
    fn replica(generations: &str) -> Replica {
        replica_of(superblock(generations), Vec::new())
    }

    fn superblock(generations: &str) -> Superblock {
        Superblock {
            volume: VolumeId([1; 16]),
            copy: CopyId([2; 16]),
            size_bytes: 1 << 20,
            block_size: BlockSize::default(),
            role: Role::Replica,
            data: DataState::Consistent,
            session: SessionNumber(0),
            fence: fence(2, 2),
            position: Position::default(),
            source: fence(2, 2),
            lineage: lineage(generations),
            adopted: 0,
            gap: 0,
            layers: 0,
            history: 0,
            mode: Mode::Async,
            released: false,
        }
    }

    fn replica_of(superblock: Superblock, saved: Vec<ByteRange>) -> Replica {
        let settings = Settings { sector_bytes: 512, window_bytes: 1 << 20, space: SpacePolicy::Pause };
        let log = Recovered::Active { serial: 0, extents: BTreeSet::new() };
        let (marker, maps) = (Position::default(), BTreeMap::new());
        let kept = Vec::new();
        Replica::new(settings, Stored { superblock, marker, log, maps, saved, kept })
    }

    fn hello(fence: Fence, generations: &str) -> Hello {
        Hello {
            versions: VERSIONS,
            features: 0,
            volume: VolumeId([1; 16]),
            size_bytes: 1 << 20,
            block_size: BlockSize::default(),
            sector_bytes: 512,
            copy: CopyId([3; 16]),
            session: SessionNumber(1),
            stream: Stream(1),
            fence,
            lineage: lineage(generations),
            mode: Mode::Async,
            members: Vec::new(),
        }
    }

    #[test]
    fn a_copy_with_writes_of_its_own_lets_no_primary_overwrite_them() {
        for (mine, theirs, refusal) in [
            ("ba", "ba", None),
            ("a", "ba", None),
            ("", "ba", None),
            ("ca", "ba", Some(Refusal::SplitBrain)),
            ("cba", "ba", Some(Refusal::SplitBrain)),
            // The primary says that there is nothing in common.
            ("x", "ba", None),
        ] {
            let refused = replica(mine).objection(&hello(fence(3, 3), theirs));
            assert_eq!(refused.map(|refused| refused.refusal), refusal, "{mine} {theirs}");
        }
    }

    #[test]
    fn a_superseded_primary_is_told_so_before_histories_are_compared() {
        let mut replica = replica("ba");
        for old in [fence(1, 3), fence(2, 3)] {
            assert_eq!(replica.objection(&hello(old, "ca")), None);
            replica.greet(hello(old, "ca"));
            let told = Superseded { fence: fence(2, 2) };
            assert_eq!(replica.poll_action(), Some(Action::Send(told.into())));
        }
    }

    /// Of two primaries the one that was promoted first greeted replicas which had seen later sessions, those of the
    /// other one: they refused it for that, and it never heard of the other.
    #[test]
    fn a_superseded_primary_is_told_so_whatever_else_there_is_to_say() {
        let late = |replica: &mut Replica| replica.last_session = SessionNumber(9);
        let failed = |replica: &mut Replica| replica.failed = true;
        let full = |replica: &mut Replica| replica.gap.is_full = true;
        for spoil in [late as fn(&mut Replica), failed, full] {
            let mut replica = replica("ba");
            spoil(&mut replica);
            let told = Superseded { fence: fence(2, 2) };
            assert_eq!(replica.rejection(&hello(fence(1, 3), "ba")), Some(told.into()));
            let refused = replica.rejection(&hello(fence(2, 2), "ba"));
            assert!(matches!(refused, Some(Message::Refused(_))), "{refused:?}");
        }
    }

    /// Does what the replica asks for, up to what is wanted.
    fn drive(replica: &mut Replica, is_wanted: impl Fn(&Action) -> bool) -> Action {
        loop {
            match replica.poll_action().expect("it has something to do") {
                action if is_wanted(&action) => return action,
                Action::WriteState(_) => replica.handle_state_written(true),
                Action::WriteLog { .. } => replica.handle_log_written(true),
                Action::Send(_) | Action::EndLayer(_) | Action::Drop(_) => {}
                _ => panic!("it has nothing else to do"),
            }
        }
    }

    /// A host that gave up what it had, all of it, and was being resynced has no map that could tell of what a rollback
    /// has restored: the primary of the resync went on with the bits that it had cleared.
    #[test]
    fn what_a_rollback_began_to_restore_is_told_to_the_primary_of_the_resync() {
        let saved = ByteRange::new(8192, 4096);
        for (is_rolled_back, told) in [(false, vec![]), (true, vec![saved])] {
            let mut superblock = superblock("");
            (superblock.data, superblock.gap, superblock.layers) = (DataState::Inconsistent, 1, 1);
            if is_rolled_back {
                promotion::begin(&mut superblock);
            }
            let mut replica = replica_of(superblock, vec![saved]);
            replica.greet(hello(fence(2, 2), "ba"));
            let union = drive(&mut replica, |action| matches!(action, Action::Send(Message::Union(_))));
            assert_eq!(union, Action::Send(Union { ranges: told, last: true }.into()));
        }
    }

    #[test]
    fn a_replica_that_failed_comes_to_rest() {
        let mut replica = replica("a");
        replica.change_state(StateChange::Forget, None);
        replica.change_state(StateChange::Behind, None);
        replica.handle_log_written(true);
        replica.fail();
        replica.change_state(StateChange::Behind, None);
        assert!(!replica.is_idle(), "one is being recorded");
        replica.handle_state_written(false);
        assert!(replica.is_idle(), "nothing is waited for that will never be");
    }

    fn is_welcome(action: &Action) -> bool {
        matches!(action, Action::Send(Message::Welcome(_)))
    }

    #[test]
    fn a_copy_that_is_told_of_replies_without_it_counts_no_more() {
        for (theirs, mode) in [("a", Mode::Sync), ("ba", Mode::Async)] {
            let mut replica = replica("a");
            replica.superblock.mode = Mode::Sync;
            replica.greet(hello(fence(2, 2), theirs));
            drive(&mut replica, is_welcome);
            assert_eq!(replica.superblock.mode, mode, "durably, before it answers");
        }
    }

    /// A replica whose resync was recorded.
    fn resyncing() -> Replica {
        let mut replica = replica("a");
        replica.superblock.data = DataState::Inconsistent;
        replica.greet(hello(fence(2, 2), "a"));
        drive(&mut replica, is_welcome);
        while let Some(action) = replica.poll_action() {
            assert!(matches!(action, Action::Send(_)), "{action:?}");
        }
        replica
    }

    fn copy_frame(body: Body) -> FrameHeader {
        FrameHeader { session: SessionNumber(1), stream: Stream(1), body }
    }

    #[test]
    fn a_digest_for_a_resync_is_durable_with_the_sync_after_it() {
        let mut replica = resyncing();
        let range = ByteRange::new(0, 4096);
        replica.handle_frame(FrameId(1), copy_frame(Body::CopyDigest { range, number: 1 })).unwrap();
        assert_eq!(replica.poll_action(), Some(Action::ReadDigest { frame: FrameId(1), range }));
        assert_eq!(replica.poll_action(), None);
        replica.handle_digest(FrameId(1), Some([7; 32]));
        let answer = CopyDigest { session: SessionNumber(1), number: 1, digest: [7; 32] };
        assert_eq!(replica.poll_action(), Some(Action::Send(answer.into())));
        assert_eq!(replica.poll_action(), Some(Action::Sync));
        assert_eq!(replica.poll_action(), None, "not before the sync has ended");
        replica.handle_synced(true);
        let told = replica.poll_action();
        let is_durable = |message: &Message| matches!(message, Message::Acknowledgement(acknowledgement) if acknowledgement.copies == 1);
        assert!(matches!(&told, Some(Action::Send(message)) if is_durable(message)), "{told:?}");
    }

    #[test]
    fn a_replica_that_can_not_read_for_a_digest_has_failed() {
        let mut replica = resyncing();
        let range = ByteRange::new(0, 4096);
        replica.handle_frame(FrameId(1), copy_frame(Body::CopyDigest { range, number: 1 })).unwrap();
        replica.handle_digest(FrameId(1), None);
        assert!(replica.has_failed());
    }

    #[test]
    fn a_primary_that_asks_for_digests_without_bound_or_resync_is_sent_away() {
        let mut replica = resyncing();
        let mut ask = |number| {
            let range = ByteRange::new(0, 1 << 20);
            replica.handle_frame(FrameId(number), copy_frame(Body::CopyDigest { range, number }))
        };
        let refused = (1..).find(|number| ask(*number).is_err());
        assert_eq!(refused, Some(DIGEST_LIMIT_BYTES / ((1 << 20) + DIGEST_COST_BYTES) + 1));
        let mut consistent = self::replica("a");
        consistent.greet(hello(fence(2, 2), "a"));
        drive(&mut consistent, is_welcome);
        let range = ByteRange::new(0, 4096);
        let header = copy_frame(Body::CopyDigest { range, number: 1 });
        assert!(consistent.handle_frame(FrameId(1), header).is_err());
    }

    /// A copy that was in sync in sync mode, and in a session.
    fn in_sync() -> Replica {
        let mut replica = replica("a");
        replica.superblock.mode = Mode::Sync;
        replica.greet(hello(fence(2, 2), "a"));
        drive(&mut replica, is_welcome);
        replica
    }

    #[test]
    fn a_copy_is_behind_before_the_layer_of_a_resync_is_begun() {
        let mut replica = in_sync();
        let begin = ResyncBegin { session: SessionNumber(1), dirty_bytes: 512 };
        replica.handle_message(begin.into()).unwrap();
        drive(&mut replica, |action| matches!(action, Action::BeginLayer(_)));
        assert_eq!(replica.superblock.mode, Mode::Async, "there may be no layer to be had");
    }

    #[test]
    fn a_copy_is_behind_when_an_epoch_is_cut_short() {
        for cut in [true, false] {
            let mut replica = in_sync();
            let body = Body::EpochEnd { epoch: Epoch(1), sequence: Sequence(0), cut };
            let header = FrameHeader { session: SessionNumber(1), stream: Stream(1), body };
            replica.handle_frame(FrameId(1), header).unwrap();
            let is_behind = |action| action == Action::WriteState(StateChange::Behind);
            assert_eq!(std::iter::from_fn(|| replica.poll_action()).any(is_behind), cut);
        }
    }

    #[test]
    fn a_generation_that_begins_while_a_commit_is_recorded_is_recorded_before_its_first_write() {
        let mut replica = replica("a");
        replica.superblock.data = DataState::Inconsistent;
        replica.greet(hello(fence(2, 2), "a"));
        drive(&mut replica, is_welcome);
        let session = SessionNumber(1);
        let position = Position { generation: lineage("a")[0], epoch: Epoch(1), sequence: Sequence(0) };
        let (active, mode) = (Vec::new(), Mode::Async);
        let commit = Commit { session, position, lineage: lineage("a"), active, mode };
        replica.handle_message(commit.into()).unwrap();
        drive(&mut replica, |action| matches!(action, Action::WriteState(StateChange::Commit { .. })));
        let range = ByteRange::new(0, 512);
        let write = Body::Write { range, epoch: Epoch(2), sequence: Sequence(1) };
        for (frame, body) in [Body::Generation { generation: lineage("b")[0] }, write].into_iter().enumerate()
        {
            let header = FrameHeader { session, stream: Stream(1), body };
            replica.handle_frame(FrameId(frame as u64), header).unwrap();
        }
        replica.handle_state_written(true);
        drive(&mut replica, |action| matches!(action, Action::Apply { .. }));
        assert_eq!(replica.superblock.lineage, lineage("ba"));
    }

    /// A primary whose replicas left the stream often within one session had no room for the generation that the session
    /// began with: the commit took it for one that had just begun, and the next greeting for a split.
    #[test]
    fn a_commit_replaces_what_was_the_newest_generation_before_a_resync() {
        let mut replica = replica("a");
        replica.superblock.data = DataState::Inconsistent;
        replica.greet(hello(fence(2, 2), "a"));
        drive(&mut replica, is_welcome);
        let session = SessionNumber(1);
        let position = Position { generation: lineage("c")[0], epoch: Epoch(1), sequence: Sequence(0) };
        let commit =
            Commit { session, position, lineage: lineage("cb"), active: Vec::new(), mode: Mode::Async };
        replica.handle_message(commit.into()).unwrap();
        drive(&mut replica, |action| matches!(action, Action::Send(Message::Committed(_))));
        assert_eq!(replica.superblock.lineage, lineage("cb"));
        let body = Body::EpochEnd { epoch: Epoch(2), sequence: Sequence(0), cut: false };
        replica.handle_frame(FrameId(1), FrameHeader { session, stream: Stream(1), body }).unwrap();
        drive(&mut replica, |action| matches!(action, Action::Sync));
        replica.handle_synced(true);
        let marker = drive(&mut replica, |action| matches!(action, Action::WriteMarker(_)));
        assert_eq!(marker, Action::WriteMarker(Position { epoch: Epoch(2), ..position }));
    }

    #[test]
    fn a_generation_that_comes_before_the_commit_that_it_overtook_is_in_what_is_committed() {
        for is_recorded in [false, true] {
            let mut replica = replica("a");
            replica.greet(hello(fence(2, 2), "a"));
            drive(&mut replica, is_welcome);
            let session = SessionNumber(1);
            let body = Body::Generation { generation: lineage("b")[0] };
            replica.handle_frame(FrameId(1), FrameHeader { session, stream: Stream(1), body }).unwrap();
            drive(&mut replica, |action| matches!(action, Action::WriteState(StateChange::Generation(_))));
            if is_recorded {
                replica.handle_state_written(true);
            }
            let position = Position { generation: lineage("a")[0], epoch: Epoch(1), sequence: Sequence(0) };
            let (active, mode) = (Vec::new(), Mode::Async);
            let commit = Commit { session, position, lineage: lineage("a"), active, mode };
            replica.handle_message(commit.into()).unwrap();
            if !is_recorded {
                replica.handle_state_written(true);
            }
            drive(&mut replica, |action| matches!(action, Action::Send(Message::Committed(_))));
            assert_eq!(replica.superblock.lineage, lineage("ba"), "{is_recorded}");
        }
    }
}
