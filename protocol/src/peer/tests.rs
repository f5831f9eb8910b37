//! A peer from its greeting on: what its map says and when that is durable, when a resync begins, what is told of a
//! generation.

use super::answered::Followed;
use super::handshake::Identity;
use super::handshake::tests::{fence, lineage, welcome};
use super::*;
use crate::dirty_map::MapChanges;
use crate::disk::PAGE_BYTES;
use crate::disk::dirty_map::Header;
use crate::terms::DataState;
use crate::units::{CopyId, EXTENT_BYTES, Mark, Position, Session, VolumeId};
use crate::wire::message::{Digest, Renew, Union, Welcome};
use std::collections::BTreeMap;

const BLOCKS: u64 = 256;

fn peer_with(map: impl Fn(DirtyMap) -> DirtyMap) -> Peer {
    let (host, block_size) = (HostId([2; 32]), BlockSize::default());
    let size_bytes = BLOCKS * block_size.bytes();
    let map = map(DirtyMap::full(VolumeId([1; 16]), host, size_bytes, block_size));
    Peer::new(host, map, size_bytes, block_size, 1 << 20, Mode::Async)
}

/// The primary with these generations greets, and this is the answer.
fn greet(peer: &mut Peer, generations: &str, welcome: Welcome) {
    let identity = Identity {
        volume: VolumeId([1; 16]),
        size_bytes: BLOCKS * BlockSize::default().bytes(),
        block_size: BlockSize::default(),
        sector_bytes: 512,
        copy: CopyId([1; 16]),
        adopted: 0,
        fence: fence(1),
        lineage: lineage(generations),
        members: Vec::new(),
        ends: crate::lineage::Ends::default(),
    };
    peer.handle_connected(welcome.session, &identity);
    for message in [welcome.into(), Union { ranges: Vec::new(), last: true }.into()] {
        peer.handle_message(message, Sequence(0), Time::default()).unwrap();
    }
}

fn circumstances(lineage: &[GenerationId]) -> Circumstances<'_> {
    let position = (Epoch(7), Sequence(3));
    Circumstances {
        application_is_active: false,
        lineage,
        position,
        opened: None,
        told_before: None,
        may_commit: true,
        active: &Vec::new,
        absent: None,
        has_failed: false,
    }
}

fn relative_to(copy: u8) -> Base {
    Base { copy: CopyId([copy; 16]), generation: GenerationId([b'a'; 16]), adopted: 0 }
}

/// The full map was relative to the primary's newest generation, which the replica only has when it was committed:
/// each interruption began a copy of the whole volume anew.
#[test]
fn what_was_copied_by_a_full_map_counts_after_an_interruption() {
    let mut peer = peer_with(|map| map.clean(relative_to(9)));
    greet(&mut peer, "ba", welcome(DataState::Consistent, false, fence(1), "a"));
    assert!(peer.map().is_full(), "the map was another copy's");
    peer.marks.map.clear(0..100);
    peer.handle_disconnected(Time::default());
    greet(&mut peer, "ba", welcome(DataState::Inconsistent, false, fence(1), "a"));
    assert_eq!(peer.map().dirty_blocks(), BLOCKS - 100);
}

#[test]
fn a_generation_that_begins_before_a_clean_replica_has_recorded_its_commit_is_told_to_it() {
    let mut peer = peer_with(|map| map.clean(relative_to(2)));
    greet(&mut peer, "a", welcome(DataState::Consistent, false, fence(1), "a"));
    peer.drive(&Order::<u8>::new(512), &circumstances(&lineage("a")), Time::default());
    peer.handle_generation(GenerationId([b'b'; 16]), Epoch(8));
    let told = std::iter::from_fn(|| peer.poll_action()).filter_map(|action| match action {
        Action::Send(Message::Commit(commit)) => Some(commit.position.generation),
        Action::SendFrame { header, .. } => match header.body {
            Body::Generation { generation } => Some(generation),
            _ => None,
        },
        _ => None,
    });
    assert_eq!(told.collect::<Vec<_>>(), [GenerationId([b'a'; 16]), GenerationId([b'b'; 16])]);
}

/// Answers as the replica would until it is in sync. Gives how often it was told that it is passed over.
fn bring_into_sync(peer: &mut Peer, epoch: Epoch) -> usize {
    let (number, now) = (Session(1), Time::default());
    let mut told = 0;
    for _ in 0..8 {
        peer.drive(&Order::<u8>::new(512), &circumstances(&lineage("a")), now);
        peer.handle_epoch_end(epoch, Sequence(3));
        while let Some(action) = peer.poll_action() {
            let answer: Message = match action {
                Action::WriteMap(_) => {
                    peer.handle_map_written(true, now);
                    continue;
                }
                Action::Send(Message::Alone(_)) => {
                    told += 1;
                    Parted { session: number }.into()
                }
                Action::Send(Message::ResyncBegin(_)) => ResyncReady { session: number }.into(),
                Action::Send(Message::Commit(commit)) => {
                    Committed { session: number, position: commit.position }.into()
                }
                Action::SendFrame { header, .. } => {
                    assert!(matches!(header.body, Body::EpochEnd { .. }), "{header:?}");
                    let (mark, received) = (Mark::default(), Sequence(0));
                    Acknowledgement { session: number, durable: epoch, copies: 0, received, mark }.into()
                }
                _ => continue,
            };
            peer.handle_message(answer, Sequence(3), now).unwrap();
        }
    }
    assert!(peer.is_in_sync());
    told
}

/// Only the first time in a link: at the second, what waited for the replica waited until its word was over.
#[test]
fn a_replica_is_told_each_time_that_it_is_passed_over() {
    let mut peer = peer_with(|map| map.clean(relative_to(2)));
    peer.set_mode(Mode::Sync);
    greet(&mut peer, "a", welcome(DataState::Consistent, false, fence(1), "a"));
    assert_eq!(bring_into_sync(&mut peer, Epoch(8)), 0);
    for epoch in [9, 10] {
        let renew = Renew { session: Session(1), number: epoch };
        peer.handle_message(renew.into(), Sequence(3), Time::default()).unwrap();
        assert!(peer.granted.until().is_some());
        peer.give_up();
        assert_eq!(bring_into_sync(&mut peer, Epoch(epoch)), 1);
        assert!(peer.granted.until().is_none());
    }
}

/// A primary that was set back gave numbers to other replicas and to greetings that came to nothing, until this one's was
/// above what the replica had: its copies of a session that is forgotten were taken for known.
#[test]
fn a_replica_with_copies_of_a_session_that_is_forgotten_may_differ_anywhere() {
    let number = |counter: u64, number| Session((counter << 40) + number);
    let own = fence(1).counter;
    for (copied, had, is_believed) in [
        (Some(number(own, 5)), number(own, 5), true),
        (Some(number(own, 5)), number(own, 12), false),
        // It was promoted again since it was set back.
        (Some(number(own - 1, 5)), number(own - 1, 12), false),
        (Some(Session(0)), number(own, 1), false),
        // Another primary's.
        (Some(number(own - 2, 5)), number(own - 1, 12), true),
        // The map is new, or an earlier release wrote it.
        (None, number(own, 12), true),
    ] {
        let mut peer = peer_with(|map| {
            let mut map = map.clean(relative_to(2));
            copied.into_iter().for_each(|session| map.note_copied(session));
            map
        });
        let mut welcome = welcome(DataState::Consistent, false, fence(1), "a");
        (welcome.session, welcome.mark) = (number(own, 14), Mark { session: had, ..Mark::default() });
        greet(&mut peer, "a", welcome);
        assert_eq!(peer.map().is_clean(), is_believed, "{copied:?}, {had:?}");
        assert_eq!(peer.map().copied(), Some(number(own, 14)));
    }
}

/// No copy is sent before the map's file says that there may be some of this session.
#[test]
fn a_resync_begins_when_the_map_names_its_session() {
    let mut peer = peer_with(|mut map| {
        map.begin_anew(relative_to(2));
        map.take_changes();
        map
    });
    greet(&mut peer, "a", welcome(DataState::Consistent, false, fence(1), "a"));
    let mut written = Vec::new();
    for is_written in [false, true] {
        peer.drive(&Order::<u8>::new(512), &circumstances(&lineage("a")), Time::default());
        for action in std::iter::from_fn(|| peer.poll_action()) {
            match action {
                Action::WriteMap(changes) => written.extend(changes.header),
                Action::Send(Message::ResyncBegin(_)) => assert!(is_written, "it begins at once"),
                _ => {}
            }
        }
        if !is_written {
            peer.handle_map_written(true, Time::default());
        }
    }
    let header = written.first().expect("the header is written");
    let mut file = vec![0; 2 * PAGE_BYTES];
    file[header.0 as usize..][..PAGE_BYTES].copy_from_slice(&header.1[..]);
    let (_, header) = Header::recover(&file).unwrap();
    assert_eq!(header.copied, Some(Session(1)));
    assert!(matches!(&peer.state, State::Linked(link) if link.phase() == Phase::Beginning));
}

/// Under load some write had always been marked since the map was last written, so that a resync never began.
#[test]
fn a_resync_begins_when_the_replicas_union_is_durable_whatever_is_written_meanwhile() {
    let mut peer = peer_with(|map| map.clean(relative_to(2)));
    let begins = |peer: &mut Peer| {
        peer.drive(&Order::<u8>::new(512), &circumstances(&lineage("a")), Time::default());
        let mut actions = std::iter::from_fn(|| peer.poll_action());
        actions.any(|action| matches!(action, Action::Send(Message::ResyncBegin(_))))
    };
    peer.marks.mark(7..8, Sequence(1));
    peer.write_map();
    greet(&mut peer, "a", welcome(DataState::Consistent, false, fence(1), "a"));
    peer.mark_suspect(ByteRange::new(0, 4096), Sequence(1));
    assert!(!begins(&mut peer));
    peer.handle_map_written(true, Time::default());
    assert!(!begins(&mut peer), "what was being written then had not all of it");
    peer.marks.mark(8..9, Sequence(2));
    peer.handle_map_written(true, Time::default());
    assert!(peer.first_unwritten().is_some());
    assert!(begins(&mut peer));
}

#[test]
fn that_everything_may_differ_takes_no_more_than_the_header() {
    let mut peer = peer_with(|map| map.clean(relative_to(2)));
    peer.mark_suspect(ByteRange::new(0, BLOCKS * BlockSize::default().bytes()), Sequence(4));
    assert_eq!(peer.map().dirty_blocks(), BLOCKS);
    assert_eq!(peer.first_unwritten(), Some(Sequence(5)));
    let changes = peer.marks.map.take_changes();
    assert!(changes.pages.is_empty() && changes.header.is_some(), "{changes:?}");
}

/// The map's file could not be written twice in a row, and only clean blocks were to be noted. All blocks are dirty
/// in memory then, but clean in the file: a write to one of them was taken for safe, and its extent left the
/// activity log before anything on disk remembered it.
#[test]
fn nothing_is_safe_until_a_map_that_was_given_up_is_written() {
    let (size_bytes, block_size) = (1 << 20, BlockSize::default());
    let mut map = DirtyMap::full(VolumeId([1; 16]), HostId([2; 32]), size_bytes, block_size);
    map.clear(0..255);
    map.take_changes();
    let mut peer = Peer::new(HostId([2; 32]), map, size_bytes, block_size, 1 << 20, Mode::Async);
    let order = Order::<u8>::new(512);
    peer.marks.map.clear(255..256);
    for second in [1, 3] {
        peer.drive(&order, &circumstances(&lineage("a")), Time(Duration::from_secs(second)));
        peer.handle_map_written(false, Time(Duration::from_secs(second)));
    }
    assert!(peer.map().is_full());
    peer.marks.mark(7..8, Sequence(5));
    assert_eq!(peer.safe_up_to(Sequence(5)), Sequence(0));
    peer.drive(&order, &circumstances(&lineage("a")), Time(Duration::from_secs(5)));
    assert_eq!(peer.safe_up_to(Sequence(5)), Sequence(0), "the header is being written");
    peer.handle_map_written(true, Time(Duration::from_secs(5)));
    assert_eq!(peer.safe_up_to(Sequence(5)), Sequence(5));
}

/// The generations that a replica follows by stream are its newest ones, and were pruned, since its map was relative to
/// the one of its last commit: it came back to a primary that did not know them, and was told of a split brain.
#[test]
fn a_generation_that_a_replica_followed_is_kept_while_it_is_away() {
    use crate::lineage::{self, Relation};
    let begun = |number: u8| GenerationId([number; 16]);
    let mut generations = lineage("a");
    let mut peer = peer_with(|map| map.clean(relative_to(2)));
    greet(&mut peer, "a", welcome(DataState::Consistent, false, fence(1), "a"));
    peer.drive(&Order::<u64>::new(512), &circumstances(&generations), Time::default());
    let committed = Committed { session: Session(1), position: Default::default() };
    peer.handle_message(committed.into(), Sequence(0), Time::default()).unwrap();
    assert!(peer.is_in_sync());
    let mut begin = |peer: &mut Peer, generation, epoch| {
        let kept: Vec<_> = peer.newest_there(&generations).collect();
        lineage::begin(&mut generations, generation, &kept, 4);
        peer.handle_generation(generation, Epoch(epoch));
        generations.clone()
    };
    // One that it has recorded, and one of which nothing is known.
    let mut followed = lineage("a");
    for (number, is_durable) in [(1, true), (2, false)] {
        begin(&mut peer, begun(number), u64::from(number) * 10);
        followed.insert(0, begun(number));
        let range = ByteRange::new(0, 4096);
        let (epoch, sequence) = (Epoch(u64::from(number) * 10), Sequence(u64::from(number)));
        peer.handle_write(
            LiveWrite { request: RequestId(1), range, epoch, sequence, zero: None },
            Time::default(),
        );
        peer.handle_epoch_end(epoch, sequence);
        if is_durable {
            let durable = Acknowledgement {
                session: Session(1),
                received: sequence,
                durable: epoch,
                copies: 0,
                mark: Default::default(),
            };
            peer.handle_message(durable.into(), sequence, Time::default()).unwrap();
            assert_eq!(peer.base().generation, begun(1), "its map is relative to what it has");
        }
    }
    peer.handle_disconnected(Time::default());
    for number in 3..90 {
        let mine = begin(&mut peer, begun(number), u64::from(number) * 10);
        for newest in [&followed[1..], &followed] {
            assert_eq!(lineage::relation(newest, &mine), Relation::TheirsIsNewer, "{number}");
        }
    }
    // The same after a restart of the primary, which remembers what the map's file says.
    let map = peer.marks.map.base();
    let restarted = peer_with(|fresh| fresh.clean(map));
    let kept: Vec<_> = restarted.newest_there(&generations).collect();
    assert!(kept.contains(&begun(1)) && kept.contains(&begun(2)), "{kept:?}");
}

/// A replica in sync with so many extents, and what it asks for when it is driven.
fn comparable(extents: u64) -> (Peer, impl Fn(&mut Peer) -> Vec<Action>) {
    let (host, block_size) = (HostId([2; 32]), BlockSize::default());
    let size_bytes = extents * EXTENT_BYTES;
    let map = DirtyMap::full(VolumeId([1; 16]), host, size_bytes, block_size).clean(relative_to(2));
    let mut peer = Peer::new(host, map, size_bytes, block_size, 1 << 20, Mode::Async);
    greet(&mut peer, "a", welcome(DataState::Consistent, false, fence(1), "a"));
    let drive = |peer: &mut Peer| {
        peer.drive(&Order::<u8>::new(512), &circumstances(&lineage("a")), Time::default());
        std::iter::from_fn(|| peer.poll_action()).collect::<Vec<_>>()
    };
    drive(&mut peer);
    let committed = Committed { session: Session(1), position: Position::default() };
    peer.handle_message(committed.into(), Sequence(3), Time::default()).unwrap();
    (peer, drive)
}

fn held(actions: Vec<Action>) -> Vec<(u64, ByteRange)> {
    let held = actions.into_iter().filter_map(|action| match action {
        Action::Hold { number, range } => Some((number, range)),
        _ => None,
    });
    held.collect()
}

/// One that was interrupted went on to its end, and the next one was told that the replica is not in sync. A replica ends
/// the session of a primary that has more digests under way than a compare has steps.
#[test]
fn a_compare_that_nobody_waits_for_ends_with_what_is_under_way() {
    let (mut peer, drive) = comparable(9);
    assert!(peer.begin_compare(Sequence(3)));
    let steps = held(drive(&mut peer));
    peer.cancel_compare();
    assert!(peer.is_comparing() && !peer.begin_compare(Sequence(3)), "digests are under way");
    for (step, range) in steps {
        assert!(peer.is_comparing());
        peer.handle_hold(step, range);
        peer.handle_local_digest(step, Some([7; 32]));
        let digest = Digest { session: Session(1), number: step, digest: [7; 32] };
        peer.handle_message(digest.into(), Sequence(3), Time::default()).unwrap();
        assert_eq!(held(drive(&mut peer)), []);
    }
    assert!(!peer.is_comparing() && peer.take_compared(Sequence(3)).is_none());
    assert!(peer.begin_compare(Sequence(3)));
    peer.cancel_compare();
    assert!(!peer.is_comparing(), "nothing was under way");
}

/// It ended at the first sector that could not be read, and said that the replica was not in sync.
#[test]
fn a_compare_goes_on_past_what_can_not_be_read_here_and_tells_it() {
    let (mut peer, drive) = comparable(5);
    let (number, block_size) = (Session(1), BlockSize::default());
    assert!(peer.begin_compare(Sequence(3)));
    loop {
        let held = held(drive(&mut peer));
        if held.is_empty() {
            break;
        }
        for (step, range) in held {
            peer.handle_hold(step, range);
            let extent = range.offset / EXTENT_BYTES;
            peer.handle_local_digest(step, (extent != 1 && extent != 3).then_some([7; 32]));
            let there = if extent == 4 { [8; 32] } else { [7; 32] };
            let digest = Digest { session: number, number: step, digest: there };
            peer.handle_message(digest.into(), Sequence(3), Time::default()).unwrap();
        }
    }
    let extent = |number| ByteRange::new(number * EXTENT_BYTES, EXTENT_BYTES);
    assert_eq!(peer.take_compared(Sequence(3)), None, "the mark of what differs is not durable");
    peer.handle_map_written(true, Time::default());
    let result = peer.take_compared(Sequence(3)).expect("it has ended");
    assert_eq!(result.unreadable, [extent(1), extent(3)]);
    assert_eq!(result.different, [extent(4)]);
    assert_eq!(result.compared_bytes, 3 * EXTENT_BYTES);
    assert!(!peer.map().is_dirty(EXTENT_BYTES / block_size.bytes()), "there is nothing to copy");
}

/// What a map's file holds after these changes of an empty one, as the next run of a primary reads it.
fn reread(changes: &[MapChanges], mode: Mode) -> Peer {
    let (host, block_size) = (HostId([2; 32]), BlockSize::default());
    let size_bytes = BLOCKS * block_size.bytes();
    let (mut headers, mut pages) = (vec![0; 2 * PAGE_BYTES], BTreeMap::new());
    for changes in changes {
        pages.extend(
            changes.pages.iter().map(|(offset, page)| (*offset / PAGE_BYTES as u64 - 2, page.clone())),
        );
        if let Some((offset, header)) = &changes.header {
            headers[*offset as usize..*offset as usize + PAGE_BYTES].copy_from_slice(&header[..]);
        }
    }
    let full = DirtyMap::full(VolumeId([1; 16]), host, size_bytes, block_size);
    let map = DirtyMap::recover(&full, &headers, pages).expect("the file is whole");
    Peer::new(host, map, size_bytes, block_size, 1 << 20, mode)
}

fn map_changes(peer: &mut Peer) -> Option<MapChanges> {
    std::iter::from_fn(|| peer.poll_action()).find_map(|action| match action {
        Action::WriteMap(changes) => Some(changes),
        _ => None,
    })
}

/// Of a replica that answers wait for, and nothing of it is in a file.
fn denial() -> Denial {
    let mut denial = Denial::new(false, GenerationId([b'a'; 16]), true);
    denial.allow(true);
    denial
}

/// A write that waits for the replica is in the map, and after a restart counted as one that was answered: where the replica
/// had been promoted meanwhile, that was reported as a split brain.
#[test]
fn what_waited_for_a_replica_is_known_to_be_unanswered_after_a_restart() {
    const A: GenerationId = GenerationId([b'a'; 16]);
    let later = Some(GenerationId([b'b'; 16]));
    let mut peer = peer_with(|map| map.clean(relative_to(2)));
    (peer.mode, peer.denial) = (Mode::Sync, denial());
    peer.opened_at(A);
    peer.answered.follows();
    peer.note_answered(Sequence(3), Some(A));
    peer.answered.left(Followed { sent: Sequence(3), received: Sequence(3), oldest: None });
    peer.marks.mark(7..8, Sequence(4));
    peer.write_map();
    let mut written = vec![map_changes(&mut peer).expect("it has a mark")];
    peer.handle_map_written(true, Time::default());
    let opened = |written: &[MapChanges], mode| {
        let mut peer = reread(written, mode);
        peer.set_withholds(true);
        peer.opened_at(GenerationId([b'b'; 16]));
        peer
    };
    assert!(!peer.lacks_answered() && !opened(&written, Mode::Sync).lacks_answered());
    assert_eq!(opened(&written, Mode::Sync).answered_generation(), Some(A), "b was begun for nothing");
    // What is promised in another mode does not wait for the replica.
    assert!(opened(&written, Mode::Async).lacks_answered());

    // Once the operator lets writes be answered without it, the file must have taken that back before the first one is.
    let next = opened(&written, Mode::Sync);
    assert!(!peer.holds_answer(Sequence(3), later), "the replica has that durably");
    // In the next run a flush speaks for what was written before, which the application may have read.
    for (mut peer, last) in [(peer, 4), (next, 0)] {
        let last = Sequence(last);
        assert!(peer.holds_answer(last, later));
        assert!(peer.answered_generation().is_none());
        assert!(map_changes(&mut peer).is_some(), "the file must not say it any more");
        peer.handle_map_written(false, Time::default());
        assert!(peer.holds_answer(last, later), "the file may say it still");
        assert!(peer.marks.is_due(Time(Duration::from_secs(10))));
        peer.write_map();
        written.extend(map_changes(&mut peer));
        peer.handle_map_written(true, Time::default());
        assert!(!peer.holds_answer(last, later));
        peer.note_answered(last, later);
        assert!(peer.lacks_answered());
        let opened = opened(&written, Mode::Sync);
        assert!(opened.lacks_answered() && opened.answered_generation().is_none());
        written.truncate(1);
    }
}

/// What is answered in a generation that the file does not say that the replica confirmed, as where it follows again, would be
/// taken for answered in none.
#[test]
fn before_an_answer_in_a_new_generation_the_file_knows_that_the_replica_has_it() {
    let later = GenerationId([b'b'; 16]);
    let mut peer = peer_with(|map| map.clean(relative_to(2)));
    (peer.mode, peer.denial) = (Mode::Sync, denial());
    peer.opened_at(GenerationId([b'a'; 16]));
    peer.marks.mark(7..8, Sequence(1));
    peer.write_map();
    peer.handle_map_written(true, Time::default());
    greet(&mut peer, "a", welcome(DataState::Consistent, false, fence(1), "a"));
    let State::Linked(link) = &mut peer.state else { panic!("it is linked") };
    link.progress = Progress::new(true);
    let generation = GenerationId([b'a'; 16]);
    for step in [Step::Close(Epoch(1), Sequence(1)), Step::Commit(generation), Step::Committed] {
        link.progress.take(step);
    }
    peer.answered.follows();
    peer.marks.map.confirm(CopyId([2; 16]), later);
    while peer.poll_action().is_some() {}
    assert!(!peer.holds_answer(Sequence(2), Some(GenerationId([b'a'; 16]))));
    assert!(peer.holds_answer(Sequence(2), Some(later)));
    let changes = map_changes(&mut peer).expect("the header");
    let (_, header) = Header::recover(&changes.header.expect("it is new").1[..]).expect("it is whole");
    assert_eq!((header.base.generation, header.is_unanswered), (later, true));
    peer.handle_map_written(true, Time::default());
    assert!(!peer.holds_answer(Sequence(2), Some(later)));
}

/// What a replica has received and not made durable is gone with its session, and what it was sent may never come: an answer
/// for that without it leaves it out, though its link is not lost yet.
#[test]
fn an_answer_for_what_a_replica_may_lose_is_not_denied() {
    const A: GenerationId = GenerationId([b'a'; 16]);
    let left = |followed: Followed| {
        let mut peer = peer_with(|map| map.clean(relative_to(2)));
        (peer.mode, peer.denial) = (Mode::Sync, denial());
        peer.opened_at(A);
        peer.answered.follows();
        peer.answered.left(followed);
        peer.marks.mark(7..8, Sequence(4));
        peer.write_map();
        peer.handle_map_written(true, Time::default());
        peer
    };
    for (received, oldest) in [(5, Some(5)), (3, Some(4)), (3, Some(5))] {
        let oldest = oldest.map(Sequence);
        let followed = Followed { sent: Sequence(5), received: Sequence(received), oldest };
        assert!(left(followed).holds_answer(Sequence(5), Some(A)), "{followed:?}");
    }
    let all = Followed { sent: Sequence(5), received: Sequence(5), oldest: None };
    assert!(!left(all).holds_answer(Sequence(5), Some(A)));
    // It was answered in another mode, before it was promised anything.
    let mut peer = left(all);
    peer.set_mode(Mode::Async);
    peer.set_mode(Mode::Sync);
    assert!(!peer.denial.may_be_said(peer.marks.map.base(), true, false));
}

/// One whose answers don't wait for it may lack what was answered at any time.
#[test]
fn a_map_that_a_primary_in_another_mode_goes_on_with_must_not_deny_anything() {
    let mut peer = peer_with(|map| map.clean(relative_to(2)));
    peer.denial = Denial::new(true, GenerationId([b'a'; 16]), false);
    peer.answered.follows();
    assert!(peer.holds_answer(Sequence(1), None));
}
