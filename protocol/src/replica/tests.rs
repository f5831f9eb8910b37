//! What a replica answers, records and refuses: greetings, commits and generations, digests, rollbacks.

use super::*;
use crate::disk::activity_log::Recovered;
use crate::disk::superblock::Role;
use crate::given::Given;
use crate::layers::Catalog;
use crate::layers::testing::{catalog, layer};
use crate::lineage::Ends;
use crate::terms::Fence;
use crate::units::{BlockSize, CopyId, GenerationId, HostId, Stream, VolumeId};
use crate::wire::VERSIONS;
use crate::wire::message::{Parting, Superseded, Union};
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

pub(crate) fn superblock(generations: &str) -> Superblock {
    Superblock {
        volume: VolumeId([1; 16]),
        copy: CopyId([2; 16]),
        size_bytes: 1 << 20,
        block_size: BlockSize::default(),
        role: Role::Replica,
        data: DataState::Consistent,
        session: Session(0),
        fence: fence(2, 2),
        position: Position::default(),
        source: fence(2, 2),
        lineage: lineage(generations),
        adopted: 0,
        layers: Catalog::default(),
        mode: Mode::Async,
        given: Given::NOTHING,
        released: false,
        replaced: false,
        touched: false,
        run: Epoch(0),
        ends: Ends::default(),
        agreed: 2,
        heirs: Vec::new(),
    }
}

fn replica_of(superblock: Superblock, saved: Vec<ByteRange>) -> Replica {
    let settings = Settings { sector_bytes: 512, window_bytes: 1 << 20, space: SpacePolicy::Pause };
    let log = Recovered::Active { serial: 0, extents: BTreeSet::new() };
    let (mark, maps) = (Mark::default(), BTreeMap::new());
    let kept = Vec::new();
    Replica::new(settings, Stored { superblock, mark, log, maps, saved, kept })
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
        session: Session(1),
        stream: Stream(1),
        fence,
        lineage: lineage(generations),
        mode: Mode::Async,
        members: Vec::new(),
        ends: Ends::default(),
    }
}

#[test]
fn what_a_recovered_primary_lacks_is_not_overwritten_though_it_is_of_the_same_generation() {
    // The primary's disk was recovered from a copy at epoch 8 of generation b; this one got more of that generation.
    let ends = Ends::only(GenerationId([b'b'; 16]), Epoch(9));
    for (theirs, data, epoch, is_split) in [
        ("ba", DataState::Consistent, 9, true),
        ("cba", DataState::Consistent, 9, true),
        ("cba", DataState::Inconsistent, 9, true),
        ("cba", DataState::Consistent, 8, false),
        // It followed a run in which nothing was written.
        ("cba", DataState::Consistent, (1 << 40) - 1, false),
        ("cba", DataState::Empty, 9, false),
    ] {
        let position =
            Position { generation: GenerationId([b'b'; 16]), epoch: Epoch(epoch), sequence: Sequence(0) };
        let replica = replica_of(Superblock { data, position, ..superblock("ba") }, Vec::new());
        let hello = Hello { ends: ends.clone(), ..hello(fence(2, 2), theirs) };
        let refusal = replica.objection(&hello).map(|refused| refused.refusal);
        assert_eq!(refusal, is_split.then_some(Refusal::Beyond), "{theirs} {data:?} {epoch}");
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

/// A copy whose disk was replaced keeps the generations of the old one in its superblock: they were compared, and the
/// primary refused for ever, while `resolve` said that there was nothing to resolve.
#[test]
fn an_empty_copy_takes_any_primarys_content() {
    let empty = Superblock { data: DataState::Empty, ..superblock("xa") };
    let mut replica = replica_of(empty, Vec::new());
    assert_eq!(replica.objection(&hello(fence(3, 3), "ba")), None);
    replica.greet(hello(fence(3, 3), "ba")).unwrap();
    let welcomed = drive(&mut replica, |action| matches!(action, Action::Send(Message::Welcome(_))));
    assert!(matches!(welcomed, Action::Send(Message::Welcome(welcome)) if welcome.data == DataState::Empty));
    replica
        .handle_message(ResyncBegin { session: Session(1), dirty_bytes: 1 << 20 }.into())
        .expect("a resync is announced");
    drive(&mut replica, |action| matches!(action, Action::Send(Message::ResyncReady(_))));
    replica.handle_disconnected();
    // Interrupted, it is a mixture of which the old generations say nothing.
    let again = Hello { session: Session(2), ..hello(fence(3, 3), "ba") };
    assert_eq!(replica.objection(&again), None);
}

#[test]
fn a_superseded_primary_is_told_so_before_histories_are_compared() {
    let mut replica = replica("ba");
    for old in [fence(1, 3), fence(2, 3)] {
        assert_eq!(replica.objection(&hello(old, "ca")), None);
        replica.greet(hello(old, "ca")).unwrap();
        let told = Superseded { fence: fence(2, 2) };
        assert_eq!(replica.poll_action(), Some(Action::Send(told.into())));
    }
}

/// Of two primaries the one that was promoted first greeted replicas which had seen later sessions, those of the
/// other one: they refused it for that, and it never heard of the other.
#[test]
fn a_superseded_primary_is_told_so_whatever_else_there_is_to_say() {
    let late = |replica: &mut Replica| replica.last_session = Session(9);
    let failed = |replica: &mut Replica| replica.failed = true;
    for spoil in [late as fn(&mut Replica), failed] {
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
            Action::WriteMarker(_) => replica.handle_marker_written(true),
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
        (superblock.data, superblock.layers) = (DataState::Inconsistent, catalog(1, 0));
        if is_rolled_back {
            promotion::begin(&mut superblock);
        }
        let mut replica = replica_of(superblock, vec![saved]);
        replica.greet(hello(fence(2, 2), "ba")).unwrap();
        let union = drive(&mut replica, |action| matches!(action, Action::Send(Message::Union(_))));
        assert_eq!(union, Action::Send(Union { ranges: told, last: true }.into()));
    }
}

/// The primary was set back to what it was within the session of a resync, of which nothing durable here told: a block that
/// had been written since was called the same.
#[test]
fn a_replica_in_a_resync_knows_of_which_epoch_it_was_told() {
    let generation = lineage("b")[0];
    let (nothing, everything) = (Vec::new(), vec![ByteRange::new(0, 1 << 20)]);
    for (end, expected) in [(None, &everything), (Some(7), &everything), (Some(8), &nothing)] {
        let mut replica =
            replica_of(Superblock { data: DataState::Inconsistent, ..superblock("") }, Vec::new());
        let is_union = |action: &Action| matches!(action, Action::Send(Message::Union(_)));
        let greeting = |session, end: Option<u64>| Hello {
            session: Session(session),
            ends: end.map_or_else(Ends::default, |end| Ends::only(generation, Epoch(end))),
            ..hello(fence(2, 2), "ba")
        };
        replica.greet(greeting(1, Some(8))).unwrap();
        let first = drive(&mut replica, is_union);
        assert_eq!(first, Action::Send(Union { ranges: Vec::new(), last: true }.into()));
        let body = Body::Write { range: ByteRange::new(0, 4096), epoch: Epoch(7), sequence: Sequence(1) };
        let header = FrameHeader { session: Session(1), stream: Stream(1), body };
        replica.handle_frame(FrameId(1), header).unwrap();
        drive(&mut replica, |action| matches!(action, Action::Apply { .. }));
        replica.handle_applied(FrameId(1), true);
        replica.handle_disconnected();
        replica.greet(greeting(2, end)).unwrap();
        let again = drive(&mut replica, is_union);
        assert_eq!(again, Action::Send(Union { ranges: expected.clone(), last: true }.into()), "{end:?}");
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
        replica.greet(hello(fence(2, 2), theirs)).unwrap();
        drive(&mut replica, is_welcome);
        assert_eq!(replica.superblock.mode, mode, "durably, before it answers");
    }
}

/// A replica whose resync was recorded.
fn resyncing() -> Replica {
    let mut replica = replica("a");
    replica.superblock.data = DataState::Inconsistent;
    replica.greet(hello(fence(2, 2), "a")).unwrap();
    drive(&mut replica, is_welcome);
    while let Some(action) = replica.poll_action() {
        assert!(matches!(action, Action::Send(_)), "{action:?}");
    }
    replica
}

fn copy_frame(body: Body) -> FrameHeader {
    FrameHeader { session: Session(1), stream: Stream(1), body }
}

#[test]
fn a_digest_for_a_resync_is_durable_with_the_sync_after_it() {
    let mut replica = resyncing();
    let range = ByteRange::new(0, 4096);
    replica.handle_frame(FrameId(1), copy_frame(Body::CopyDigest { range, number: 1 })).unwrap();
    assert_eq!(replica.poll_action(), Some(Action::ReadDigest { frame: FrameId(1), range }));
    assert_eq!(replica.poll_action(), None);
    replica.handle_digest(FrameId(1), Some([7; 32]));
    let answer = CopyDigest { session: Session(1), number: 1, digest: [7; 32] };
    assert_eq!(replica.poll_action(), Some(Action::Send(answer.into())));
    assert_eq!(replica.poll_action(), Some(Action::Sync));
    assert_eq!(replica.poll_action(), None, "not before the sync has ended");
    replica.handle_synced(true);
    let told = replica.poll_action();
    let is_durable = |message: &Message| matches!(message, Message::Acknowledgement(acknowledgement) if acknowledgement.copies == 1);
    assert!(matches!(&told, Some(Action::Send(message)) if is_durable(message)), "{told:?}");
}

/// It ended the replica, and was asked for again after each greeting: the copy that would have made the sector readable
/// never came.
#[test]
fn what_a_replica_cannot_read_differs() {
    let mut replica = resyncing();
    let range = ByteRange::new(0, 4096);
    replica.handle_frame(FrameId(1), copy_frame(Body::CopyDigest { range, number: 1 })).unwrap();
    assert_eq!(replica.poll_action(), Some(Action::ReadDigest { frame: FrameId(1), range }));
    replica.handle_digest(FrameId(1), None);
    let answer = CopyDigest { session: Session(1), number: 1, digest: UNREADABLE };
    assert_eq!(replica.poll_action(), Some(Action::Send(answer.into())));
    assert!(!replica.has_failed());
}

/// A resync of a consistent copy was announced, and its layer is there.
fn in_gap() -> Replica {
    let mut replica = replica("a");
    replica.greet(hello(fence(2, 2), "a")).unwrap();
    drive(&mut replica, is_welcome);
    replica.handle_message(ResyncBegin { session: Session(1), dirty_bytes: 4096 }.into()).unwrap();
    drive(&mut replica, |action| matches!(action, Action::BeginLayer(_)));
    replica.handle_layer_begun(Saved::Done);
    drive(&mut replica, |action| matches!(action, Action::Send(Message::ResyncReady(_))));
    let range = ByteRange::new(0, 4096);
    replica.handle_frame(FrameId(1), copy_frame(Body::Copy { range, number: 1 })).unwrap();
    assert_eq!(replica.poll_action(), Some(Action::SavePreImages { ranges: vec![range] }));
    replica
}

#[test]
fn a_pre_image_that_cannot_be_read_gives_up_the_way_back_and_the_copy_heals_it() {
    let mut replica = in_gap();
    replica.handle_saved(Saved::Unreadable);
    assert_eq!(
        replica.poll_action(),
        Some(Action::WriteState(StateChange::GiveRollbackUp)),
        "first, durably"
    );
    assert_eq!(replica.poll_action(), None);
    replica.handle_state_written(true);
    let applied = drive(&mut replica, |action| matches!(action, Action::Apply { .. }));
    assert_eq!(applied, Action::Apply { frame: FrameId(1), range: ByteRange::new(0, 4096), zero: None });
    assert!(!replica.has_failed() && !replica.report().is_full);
}

/// Frames of a session that had ended were to wait once more, and nothing came that they waited for.
#[test]
fn a_replica_that_fails_after_its_link_was_lost_comes_to_rest() {
    let mut replica = in_gap();
    replica.handle_disconnected();
    assert_eq!(replica.poll_action(), None);
    replica.handle_saved(Saved::Unreadable);
    assert_eq!(replica.poll_action(), Some(Action::WriteState(StateChange::GiveRollbackUp)));
    replica.handle_state_written(false);
    assert!(replica.has_failed() && replica.is_idle());
    assert_eq!(drive(&mut replica, |action| matches!(action, Action::Drop(_))), Action::Drop(FrameId(1)));
}

/// It was refused until its configuration changed or its agent was started anew, however much room was made.
#[test]
fn a_replica_that_had_no_room_tries_again_with_each_greeting() {
    let mut replica = in_gap();
    replica.handle_saved(Saved::Full);
    drive(&mut replica, |action| matches!(action, Action::Send(Message::Refused(_))));
    assert!(replica.report().is_full);
    let again = Hello { session: Session(2), ..hello(fence(2, 2), "a") };
    assert_eq!(replica.rejection(&again), None);
    replica.greet(again).unwrap();
    drive(&mut replica, is_welcome);
    assert!(replica.report().is_full, "until there was room");
    replica.handle_message(ResyncBegin { session: Session(2), dirty_bytes: 4096 }.into()).unwrap();
    drive(&mut replica, |action| matches!(action, Action::Send(Message::ResyncReady(_))));
    let range = ByteRange::new(0, 4096);
    let header =
        FrameHeader { session: Session(2), stream: Stream(1), body: Body::Copy { range, number: 1 } };
    replica.handle_frame(FrameId(2), header).unwrap();
    drive(&mut replica, |action| matches!(action, Action::SavePreImages { .. }));
    replica.handle_saved(Saved::Done);
    assert!(!replica.report().is_full);
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
    consistent.greet(hello(fence(2, 2), "a")).unwrap();
    drive(&mut consistent, is_welcome);
    let range = ByteRange::new(0, 4096);
    let header = copy_frame(Body::CopyDigest { range, number: 1 });
    assert!(consistent.handle_frame(FrameId(1), header).is_err());
}

/// A copy that was in sync in sync mode, and in a session.
fn in_sync() -> Replica {
    let mut replica = replica("a");
    replica.superblock.mode = Mode::Sync;
    replica.greet(hello(fence(2, 2), "a")).unwrap();
    drive(&mut replica, is_welcome);
    replica
}

/// What the primary of the session commits a copy to.
fn commit(position: Position, generations: &str) -> Message {
    let (lineage, active, mode) = (lineage(generations), Vec::new(), Mode::Async);
    Commit { session: Session(1), position, lineage, active, mode, given: Given::NOTHING }.into()
}

/// The next run of the agent knew of it no more.
#[test]
fn that_something_else_wrote_is_known_until_a_commit() {
    let mut it = Superblock { touched: true, ..superblock("ba") };
    for change in [
        StateChange::Follow { fence: fence(3, 3), agrees: true },
        StateChange::Keep(layer(1)),
        StateChange::Behind,
        StateChange::Begin { source: fence(3, 3), rollback: Some(layer(2)), keep: false },
        StateChange::GiveRollbackUp,
        StateChange::Forget,
        StateChange::Generation(lineage("c")[0]),
        StateChange::Release,
    ] {
        change.apply(&mut it);
        assert!(it.touched, "{change:?}");
    }
    let (position, lineage, source) = (Position::default(), lineage("ba"), fence(3, 3));
    let (mode, given) = (Mode::Async, Given::NOTHING);
    StateChange::Commit { position, lineage, mode, given, source }.apply(&mut it);
    assert!(!it.touched);
}

/// A commit mended the copy, an undo brought back what something else had written, and the copy counted as a good one.
#[test]
fn a_history_leads_back_to_what_something_else_wrote_also_after_a_commit() {
    let commit = || StateChange::Commit {
        position: Position::default(),
        lineage: lineage("ba"),
        mode: Mode::Async,
        given: Given::NOTHING,
        source: fence(3, 3),
    };
    type Change = fn(&mut Superblock);
    let touch: Change = Superblock::note_touched;
    let keep: Change = |it| StateChange::Keep(layer(1)).apply(it);
    let keep_gap: Change =
        |it| StateChange::Begin { source: fence(3, 3), rollback: Some(layer(1)), keep: true }.apply(it);
    let give_up: Change = |it| resolve::record(it, lineage("a"), Some(layer(1)), fence(3, 3));
    let mend: Change =
        |it| StateChange::Begin { source: fence(3, 3), rollback: Some(layer(2)), keep: false }.apply(it);
    let cases: [(&str, &[Change], bool); 7] = [
        ("kept as it was touched", &[touch, keep], true),
        ("the way back of a resync kept", &[touch, keep_gap], true),
        ("given up", &[touch, give_up], true),
        ("touched since it is kept", &[keep, mend, touch], true),
        ("kept twice", &[touch, keep, keep], true),
        ("never touched", &[keep], false),
        ("forgotten", &[touch, keep, |it| StateChange::Forget.apply(it)], false),
    ];
    for (what, changes, is_touched) in cases {
        let mut it = superblock("ba");
        changes.iter().for_each(|change| change(&mut it));
        commit().apply(&mut it);
        assert_eq!((it.touched, it.layers.is_undo_touched()), (false, is_touched), "{what}");
        if it.layers.undo().is_none() {
            continue;
        }
        undo::begin(&mut it, &lineage("a"), lineage("o")[0]);
        undo::record(&mut it, Position::default());
        assert_eq!((it.touched, it.layers.is_undo_touched()), (is_touched, false), "{what}");
    }
    // What is kept later is of the copy that was mended.
    let mut it = Superblock { layers: catalog(0, 1), ..superblock("ba") };
    it.layers.touch_undo();
    StateChange::Keep(layer(2)).apply(&mut it);
    assert!(!it.layers.is_undo_touched());
}

#[test]
fn a_copy_is_behind_before_the_layer_of_a_resync_is_begun() {
    let mut replica = in_sync();
    let begin = ResyncBegin { session: Session(1), dirty_bytes: 512 };
    replica.handle_message(begin.into()).unwrap();
    drive(&mut replica, |action| matches!(action, Action::BeginLayer(_)));
    assert_eq!(replica.superblock.mode, Mode::Async, "there may be no layer to be had");
}

#[test]
fn a_copy_is_behind_when_its_primary_parts_with_it() {
    let mut replica = in_sync();
    replica.handle_message(Parting { session: Session(1), paused: true }.into()).unwrap();
    drive(&mut replica, |action| *action == Action::WriteState(StateChange::Behind));
    replica.handle_disconnected();
    replica.handle_state_written(true);
    assert_eq!(replica.superblock.mode, Mode::Async, "also when the link is gone by then");
}

#[test]
fn a_copy_is_behind_when_an_epoch_is_cut_short() {
    for cut in [true, false] {
        let mut replica = in_sync();
        let body = Body::EpochEnd { epoch: Epoch(1), sequence: Sequence(0), cut };
        let header = FrameHeader { session: Session(1), stream: Stream(1), body };
        replica.handle_frame(FrameId(1), header).unwrap();
        let is_behind = |action| action == Action::WriteState(StateChange::Behind);
        assert_eq!(std::iter::from_fn(|| replica.poll_action()).any(is_behind), cut);
    }
}

#[test]
fn a_generation_that_begins_while_a_commit_is_recorded_is_recorded_before_its_first_write() {
    let mut replica = replica("a");
    replica.superblock.data = DataState::Inconsistent;
    replica.greet(hello(fence(2, 2), "a")).unwrap();
    drive(&mut replica, is_welcome);
    let session = Session(1);
    let position = Position { generation: lineage("a")[0], epoch: Epoch(1), sequence: Sequence(0) };
    replica.handle_message(commit(position, "a")).unwrap();
    drive(&mut replica, |action| matches!(action, Action::WriteState(StateChange::Commit { .. })));
    let range = ByteRange::new(0, 512);
    let write = Body::Write { range, epoch: Epoch(2), sequence: Sequence(1) };
    for (frame, body) in [Body::Generation { generation: lineage("b")[0] }, write].into_iter().enumerate() {
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
    replica.greet(hello(fence(2, 2), "a")).unwrap();
    drive(&mut replica, is_welcome);
    let session = Session(1);
    let position = Position { generation: lineage("c")[0], epoch: Epoch(1), sequence: Sequence(0) };
    replica.handle_message(commit(position, "cb")).unwrap();
    drive(&mut replica, |action| matches!(action, Action::Send(Message::Committed(_))));
    assert_eq!(replica.superblock.lineage, lineage("cb"));
    let body = Body::EpochEnd { epoch: Epoch(2), sequence: Sequence(0), cut: false };
    replica.handle_frame(FrameId(1), FrameHeader { session, stream: Stream(1), body }).unwrap();
    drive(&mut replica, |action| matches!(action, Action::Sync));
    replica.handle_synced(true);
    let marker = drive(&mut replica, |action| matches!(action, Action::WriteMarker(_)));
    let position = Position { epoch: Epoch(2), ..position };
    assert_eq!(marker, Action::WriteMarker(Mark { position, ..Mark::default() }));
}

/// A copy in sync followed a generation by stream, fell behind, and was resynced in the same session for so long that the
/// primary's lineage had no room for that one any more: the commit took it for one that had just begun, put it before those
/// of the commit, and the next greeting was a split.
#[test]
fn a_commit_replaces_a_generation_that_came_before_its_resync() {
    let mut replica = in_sync();
    let generation = lineage("b")[0];
    replica.handle_frame(FrameId(1), copy_frame(Body::Generation { generation })).unwrap();
    drive(&mut replica, |action| matches!(action, Action::Drop(_)));
    while replica.superblock.lineage != lineage("ba") {
        drive(&mut replica, |action| matches!(action, Action::WriteState(StateChange::Generation(_))));
        replica.handle_state_written(true);
    }
    replica.handle_message(ResyncBegin { session: Session(1), dirty_bytes: 4096 }.into()).unwrap();
    drive(&mut replica, |action| matches!(action, Action::BeginLayer(_)));
    replica.handle_layer_begun(Saved::Done);
    drive(&mut replica, |action| matches!(action, Action::Send(Message::ResyncReady(_))));
    let position = Position { generation: lineage("d")[0], epoch: Epoch(0), sequence: Sequence(0) };
    replica.handle_message(commit(position, "dc")).unwrap();
    drive(&mut replica, |action| matches!(action, Action::Send(Message::Committed(_))));
    assert_eq!(replica.superblock.lineage, lineage("dc"));
}

/// A primary that was set back to before a resync, and greeted until its sessions had higher numbers again, took the live
/// writes of that resync for nothing: no marker is written for them before the commit.
#[test]
fn the_marker_names_the_session_of_a_resync_before_anything_is_overwritten() {
    let mut replica = replica("a");
    replica.superblock.data = DataState::Inconsistent;
    replica.greet(hello(fence(2, 2), "a")).unwrap();
    drive(&mut replica, is_welcome);
    let session = Session(1);
    replica.handle_message(ResyncBegin { session, dirty_bytes: 4096 }.into()).unwrap();
    let mut began = Vec::new();
    while let Some(action) = replica.poll_action() {
        match action {
            Action::WriteMarker(mark) => {
                assert_eq!((mark, began.len()), (Mark { session, ..Mark::default() }, 0));
                assert_eq!(replica.poll_action(), None, "the resync begins when it is durable");
                began.push("marker");
                replica.handle_marker_written(true);
            }
            Action::WriteState(StateChange::Begin { .. }) => {
                began.push("begin");
                replica.handle_state_written(true);
            }
            Action::Send(Message::ResyncReady(_)) => began.push("ready"),
            _ => {}
        }
    }
    assert_eq!(began, ["marker", "begin", "ready"]);
}

/// A host that was set back in the middle of its first sync had nothing durable that named the copies since.
#[test]
fn the_marker_names_the_copies_that_are_durable_and_the_primary_is_told() {
    let mut replica = replica("a");
    replica.superblock.data = DataState::Inconsistent;
    replica.greet(hello(fence(2, 2), "a")).unwrap();
    drive(&mut replica, is_welcome);
    let session = Session(1);
    let body = Body::Copy { range: ByteRange::new(0, 4096), number: 1 };
    replica.handle_frame(FrameId(1), FrameHeader { session, stream: Stream(1), body }).unwrap();
    drive(&mut replica, |action| matches!(action, Action::Apply { .. }));
    replica.handle_applied(FrameId(1), true);
    drive(&mut replica, |action| matches!(action, Action::Sync));
    replica.handle_synced(true);
    let mark = Mark { session, copies: 1, ..Mark::default() };
    let told = |action: &Action| matches!(action, Action::Send(Message::Acknowledgement(_)));
    let Action::Send(Message::Acknowledgement(first)) = drive(&mut replica, told) else { unreachable!() };
    assert_eq!((first.copies, first.mark), (1, Mark::default()), "the marker is not durable yet");
    assert_eq!(
        drive(&mut replica, |action| matches!(action, Action::WriteMarker(_))),
        Action::WriteMarker(mark)
    );
    replica.handle_marker_written(true);
    replica.tell_mark();
    let Action::Send(Message::Acknowledgement(second)) = drive(&mut replica, told) else { unreachable!() };
    assert_eq!(second.mark, mark);
    replica.tell_mark();
    assert_eq!(replica.poll_action(), None, "it is told once");
}

#[test]
fn a_generation_that_comes_before_the_commit_that_it_overtook_is_in_what_is_committed() {
    for is_recorded in [false, true] {
        let mut replica = replica("a");
        replica.greet(hello(fence(2, 2), "a")).unwrap();
        drive(&mut replica, is_welcome);
        let session = Session(1);
        let body = Body::Generation { generation: lineage("b")[0] };
        replica.handle_frame(FrameId(1), FrameHeader { session, stream: Stream(1), body }).unwrap();
        drive(&mut replica, |action| matches!(action, Action::WriteState(StateChange::Generation(_))));
        if is_recorded {
            replica.handle_state_written(true);
        }
        let position = Position { generation: lineage("a")[0], epoch: Epoch(1), sequence: Sequence(0) };
        replica.handle_message(commit(position, "a")).unwrap();
        if !is_recorded {
            replica.handle_state_written(true);
        }
        drive(&mut replica, |action| matches!(action, Action::Send(Message::Committed(_))));
        assert_eq!(replica.superblock.lineage, lineage("ba"), "{is_recorded}");
    }
}

/// One greeting with the fence `u64::MAX` stopped a volume for good, and so did one session with the highest number.
#[test]
fn a_greeting_that_leaves_no_room_for_later_primaries_is_misbehaviour() {
    let in_session = |session| Hello { session: Session(session), ..hello(fence(2, 2), "ba") };
    let with_lineage = Hello { lineage: lineage(&"a".repeat(65)), ..hello(fence(2, 2), "ba") };
    for wrong in [
        hello(fence(3 + Fence::STEP, 3), "ba"),
        hello(fence(Fence::COUNTERS, 3), "ba"),
        hello(fence(u64::MAX, 3), "ba"),
        in_session(3 << 40),
        in_session(u64::MAX),
        with_lineage,
        Hello { members: vec![member("a"); 34], ..hello(fence(2, 2), "ba") },
        Hello { members: vec![member(&"a".repeat(64))], ..hello(fence(2, 2), "ba") },
    ] {
        let mut replica = replica("ba");
        replica.handle_message(wrong.into()).expect_err("it is out of bounds");
        assert_eq!(replica.poll_action(), None, "nothing is recorded of it");
    }
    for right in [hello(fence(2 + Fence::STEP, 3), "ba"), in_session((2 << 40) + 7)] {
        replica("ba").handle_message(right.into()).expect("it is in bounds");
    }
}

/// A replica stored such an epoch, and each start of a primary from it ended the process.
#[test]
fn primary_commits_an_epoch_that_leaves_no_room_for_a_next_run() {
    let commit = |epoch, active| Commit {
        session: Session(1),
        position: Position { epoch: Epoch(epoch), ..Position::default() },
        lineage: lineage("a"),
        active,
        mode: Mode::Async,
        given: Given::NOTHING,
    };
    for (commit, is_sound) in [
        (commit(u64::MAX, vec![]), false),
        (commit(Epoch::LIMIT - 1, vec![]), false),
        (commit(9 << 40, vec![]), true),
        (commit(9 << 40, vec![Extent(0)]), true),
        (commit(9 << 40, vec![Extent(1)]), false),
        (commit(9 << 40, vec![Extent(0); 2]), false),
    ] {
        let mut superblock = superblock("a");
        superblock.position.epoch = Epoch(7 << 40);
        let mut replica = replica_of(superblock, Vec::new());
        replica.greet(hello(fence(2, 2), "a")).unwrap();
        drive(&mut replica, is_welcome);
        let answer = replica.handle_message(commit.clone().into());
        assert_eq!(answer.is_ok(), is_sound, "{commit:?}");
    }
}

#[test]
fn primary_ends_an_epoch_that_leaves_no_room_for_a_next_run() {
    let mut superblock = superblock("a");
    superblock.position.epoch = Epoch(7 << 40);
    let mut replica = replica_of(superblock, Vec::new());
    replica.greet(hello(fence(2, 2), "a")).unwrap();
    drive(&mut replica, is_welcome);
    let mut end = |epoch| {
        let body = Body::EpochEnd { epoch: Epoch(epoch), sequence: Sequence(1), cut: false };
        replica.handle_frame(FrameId(1), FrameHeader { session: Session(1), stream: Stream(1), body })
    };
    end(Epoch::LIMIT - 1).expect_err("no run is so far ahead");
    end(8 << 40).expect("the next run");
}

#[test]
fn no_promotion_begins_where_its_numbers_are_used_up() {
    let full = |spoil: fn(&mut Superblock)| {
        let mut superblock = superblock("a");
        spoil(&mut superblock);
        superblock
    };
    for used_up in [
        full(|superblock| superblock.fence.counter = u64::MAX),
        full(|superblock| superblock.fence.counter = Fence::COUNTERS - 1),
        full(|superblock| superblock.position.epoch = Epoch(u64::MAX)),
    ] {
        assert_eq!(promotion::must_be_promotable(&used_up), Err(promotion::NotPromotable::UsedUp));
        let mut recorded = used_up.clone();
        if recorded.fence.counter > 2 {
            promotion::record(&mut recorded, HostId([2; 32]), Position::default())
                .expect_err("no number is left");
            assert_eq!(recorded, used_up);
        }
    }
}

/// 64 bytes on the wire cost kilobytes here, as many times as the primary liked.
#[test]
fn primary_asks_for_ten_thousand_digests_and_waits_for_none() {
    let mut replica = replica("a");
    replica.greet(hello(fence(2, 2), "a")).unwrap();
    drive(&mut replica, is_welcome);
    let body = Body::Digest { range: ByteRange::new(0, 1 << 20), number: 1 };
    let refused =
        (1..=10_000).position(|number| replica.handle_frame(FrameId(number), copy_frame(body)).is_err());
    assert_eq!(refused, Some(DIGEST_LIMIT));
    assert_eq!(replica.items.len(), DIGEST_LIMIT, "nothing is kept of the others");
}

#[test]
fn primary_sends_small_copies_that_fill_large_buffers() {
    let mut replica = resyncing();
    let small = |number| Body::Copy { range: ByteRange::new(0, 512), number };
    let refused = (1..=1 << 20)
        .find(|number| replica.handle_frame(FrameId(*number), copy_frame(small(*number))).is_err());
    assert_eq!(refused, Some(COPY_LIMIT_BYTES / 4096 + 1));
}

fn member(name: &str) -> Member {
    Member { name: name.into(), host: HostId([9; 32]), addresses: Vec::new(), mode: Mode::Async, version: 0 }
}

/// Thousands of equal names in one message occupied the supervisor for hours.
#[test]
fn primary_tells_of_five_thousand_hosts() {
    let mut replica = replica("a");
    let told =
        |count| crate::wire::message::Members { members: vec![member("a"); count], removed: Vec::new() };
    replica.handle_message(told(5000).into()).expect_err("no volume has so many");
    replica.handle_message(told(33).into()).expect("a volume may have so many");
}

/// The next thing to do that matters here.
fn next(replica: &mut Replica) -> Option<Action> {
    loop {
        match replica.poll_action()? {
            Action::WriteLog { .. } => replica.handle_log_written(true),
            Action::Send(_) => {}
            action => return Some(action),
        }
    }
}

/// A copy that was in sync with the host 2, and has been greeted by the host 3, which was promoted unasked.
fn greeted_unasked(superblock: Superblock, saved: Vec<ByteRange>) -> Replica {
    let mut replica = replica_of(superblock, saved);
    replica.greet(hello(fence(3, 3), "ba")).unwrap();
    let follow = StateChange::Follow { fence: fence(3, 3), agrees: false };
    assert_eq!(next(&mut replica), Some(Action::WriteState(follow)), "the fence counts at once");
    replica.handle_state_written(true);
    replica
}

/// The same, when the layer is there that keeps what it overwrites.
fn kept() -> Replica {
    let mut replica = greeted_unasked(superblock("a"), Vec::new());
    assert!(matches!(next(&mut replica), Some(Action::BeginLayer(_))));
    assert_eq!(next(&mut replica), None, "it is not answered before");
    replica.handle_layer_begun(Saved::Done);
    assert_eq!(next(&mut replica), Some(Action::WriteState(StateChange::Keep(layer(1)))));
    assert_eq!(next(&mut replica), None, "durably");
    replica.handle_state_written(true);
    drive(&mut replica, is_welcome);
    assert_eq!(next(&mut replica), None);
    replica
}

/// Any member could promote itself, overwrite all copies and commit: then nothing of what they had was left.
#[test]
fn what_a_host_overwrites_that_promoted_itself_is_kept_beyond_its_commit() {
    let mut replica = kept();
    replica.handle_message(ResyncBegin { session: Session(1), dirty_bytes: 4096 }.into()).unwrap();
    let begin =
        Action::WriteState(StateChange::Begin { source: fence(3, 3), rollback: Some(layer(1)), keep: false });
    // The resync shares the layer.
    drive(&mut replica, |action| *action == begin);
    replica.handle_state_written(true);
    drive(&mut replica, |action| matches!(action, Action::Send(Message::ResyncReady(_))));
    let range = ByteRange::new(0, 4096);
    replica.handle_frame(FrameId(1), copy_frame(Body::Copy { range, number: 1 })).unwrap();
    assert_eq!(next(&mut replica), Some(Action::SavePreImages { ranges: vec![range] }));
    replica.handle_saved(Saved::Done);
    drive(&mut replica, |action| matches!(action, Action::Apply { .. }));
    replica.handle_applied(FrameId(1), true);
    drive(&mut replica, |action| *action == Action::Sync);
    replica.handle_synced(true);
    let position = Position { generation: lineage("b")[0], ..Position::default() };
    replica.handle_message(commit(position, "ba")).unwrap();
    while let Some(action) = next(&mut replica) {
        match action {
            Action::WriteState(_) => replica.handle_state_written(true),
            Action::WriteMarker(_) => replica.handle_marker_written(true),
            _ => panic!("{action:?}"),
        }
    }
    assert_eq!(replica.superblock.layers, catalog(0, 1));
    assert!(consent::is_awaited(&replica.superblock));
    // A live frame is saved first, where it goes beyond what was saved.
    let body = Body::Write { range: ByteRange::new(0, 8192), epoch: Epoch(1), sequence: Sequence(1) };
    replica.handle_frame(FrameId(2), copy_frame(body)).unwrap();
    let ranges = vec![ByteRange::new(4096, 4096)];
    assert_eq!(next(&mut replica), Some(Action::SavePreImages { ranges }));
}

#[test]
fn a_resync_that_another_primary_goes_on_with_keeps_what_it_would_be_rolled_back_to() {
    let saved = ByteRange::new(8192, 4096);
    let mut gap = superblock("a");
    (gap.data, gap.layers) = (DataState::Inconsistent, catalog(4, 0));
    let mut replica = greeted_unasked(gap, vec![saved]);
    assert_eq!(next(&mut replica), Some(Action::WriteState(StateChange::Keep(layer(4)))));
    replica.handle_state_written(true);
    drive(&mut replica, is_welcome);
    assert_eq!(next(&mut replica), None);
    let body = Body::Write { range: saved, epoch: Epoch(1), sequence: Sequence(1) };
    replica.handle_frame(FrameId(1), copy_frame(body)).unwrap();
    assert!(matches!(next(&mut replica), Some(Action::Apply { .. })), "it is saved in both already");
}

#[test]
fn where_there_is_no_room_to_keep_anything_the_operator_decides() {
    let full = |space| {
        let mut replica = greeted_unasked(superblock("a"), Vec::new());
        replica.settings.space = space;
        drive(&mut replica, |action| matches!(action, Action::BeginLayer(_)));
        replica.handle_layer_begun(Saved::Full);
        replica
    };
    let mut paused = full(SpacePolicy::Pause);
    drive(&mut paused, |action| matches!(action, Action::Send(Message::Refused(_))));
    assert!(paused.report().is_full && paused.is_idle());
    let again = || Hello { session: Session(2), ..hello(fence(3, 3), "ba") };
    paused.greet(again()).unwrap();
    drive(&mut paused, |action| matches!(action, Action::BeginLayer(_)));
    paused.handle_layer_begun(Saved::Full);
    drive(&mut paused, |action| matches!(action, Action::Send(Message::Refused(_))));
    paused.agree();
    drive(&mut paused, |action| *action == Action::WriteState(StateChange::Forget));
    paused.handle_state_written(true);
    let mut gone_on = full(SpacePolicy::GoOn);
    paused.greet(Hello { session: Session(3), ..again() }).unwrap();
    for replica in [&mut paused, &mut gone_on] {
        drive(replica, is_welcome);
        assert_eq!((replica.superblock.layers.undo(), replica.superblock.agreed), (None, 3));
    }
}

#[test]
fn what_is_kept_from_a_host_that_promoted_itself_is_not_given_up_for_want_of_room() {
    for saved in [Saved::Full, Saved::Unreadable] {
        let mut replica = kept();
        let range = ByteRange::new(0, 4096);
        let body = Body::Write { range, epoch: Epoch(1), sequence: Sequence(1) };
        replica.handle_frame(FrameId(1), copy_frame(body)).unwrap();
        assert!(matches!(next(&mut replica), Some(Action::SavePreImages { .. })));
        replica.handle_saved(saved);
        drive(&mut replica, |action| matches!(action, Action::Send(Message::Refused(_))));
        assert_eq!((replica.superblock.layers.undo(), replica.report().is_full), (Some(layer(1)), true));
        // By its operator's word it goes on.
        replica.agree();
        drive(&mut replica, |action| *action == Action::WriteState(StateChange::Forget));
        replica.handle_state_written(true);
        assert!(!replica.must_keep() && replica.superblock.layers.undo().is_none());
    }
}

/// A greeting that is gone by the time its layer is there leaves nothing behind.
#[test]
fn a_layer_for_a_greeting_that_is_gone_is_begun_again() {
    let mut replica = greeted_unasked(superblock("a"), Vec::new());
    drive(&mut replica, |action| matches!(action, Action::BeginLayer(_)));
    replica.handle_disconnected();
    replica.handle_layer_begun(Saved::Done);
    assert_eq!((next(&mut replica), replica.superblock.layers.undo()), (None, None));
    replica.greet(hello(fence(3, 3), "ba")).unwrap();
    drive(&mut replica, |action| matches!(action, Action::BeginLayer(_)));
}

/// A primary of before, which had not heard of the newer promotion, wrote to the copy that the newer one was being rebuilt from.
#[test]
fn a_copy_that_is_lent_is_nobodys_who_was_promoted_before() {
    let mut replica = replica("ba");
    assert!(!replica.is_lent_to(fence(3, 3)));
    assert_eq!(replica.lend(fence(1, 3)), Err(NotLent::Superseded(fence(2, 2))));
    assert_eq!(replica.lend(fence(1 << 62, 3)), Err(NotLent::OutOfBounds));
    replica.lend(fence(3, 3)).unwrap();
    assert!(!replica.is_lent_to(fence(3, 3)), "it is not recorded yet");
    let follow = StateChange::Follow { fence: fence(3, 3), agrees: false };
    assert_eq!(next(&mut replica), Some(Action::WriteState(follow)));
    replica.handle_state_written(true);
    assert!(replica.is_lent_to(fence(3, 3)));
    replica.lend(fence(3, 3)).unwrap();
    assert_eq!(next(&mut replica), None, "it is lent already");
    replica.greet(hello(fence(2, 2), "ba")).unwrap();
    let told = replica.poll_action();
    assert!(
        matches!(&told, Some(Action::Send(Message::Superseded(no))) if no.fence == fence(3, 3)),
        "{told:?}"
    );
    let mixture = Superblock { data: DataState::Inconsistent, ..superblock("ba") };
    assert_eq!(replica_of(mixture, Vec::new()).lend(fence(3, 3)), Err(NotLent::NoImage));
}
