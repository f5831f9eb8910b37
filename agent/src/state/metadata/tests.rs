//! A host that stops after any storage call: what its state folder says afterwards is what it said before or what was
//! being written, never neither.

use super::*;
use crate::storage::faults::{Calls, Faults};
use crate::storage::{Engine, drain, open_with};
use blockmirror_protocol::disk::dirty_map::BLOCKS_PER_PAGE;
use blockmirror_protocol::disk::superblock::Role;
use blockmirror_protocol::given::Given;
use blockmirror_protocol::layers::Catalog;
use blockmirror_protocol::rewrite::{Candidacy, Order, Part, Rewrite};
use blockmirror_protocol::succession::Decision;
use blockmirror_protocol::terms::{DataState, Fence, Mode};
use blockmirror_protocol::units::{
    BlockSize, CopyId, Epoch, GenerationId, Mark, Position, Sequence, Session, VolumeId,
};
use std::cell::Cell;

const SIZE_BYTES: u64 = 1 << 30;
const PEERS: [HostId; 2] = [HostId([3; 32]), HostId([4; 32])];

/// What a replica's state folder says that is in sync.
pub(crate) fn superblock() -> Superblock {
    Superblock {
        volume: VolumeId([1; 16]),
        copy: CopyId([2; 16]),
        size_bytes: SIZE_BYTES,
        block_size: BlockSize::default(),
        role: Role::Replica,
        data: DataState::Consistent,
        session: Session(0),
        fence: Fence { counter: 1, holder: HostId([3; 32]) },
        position: Position::default(),
        source: Fence::default(),
        lineage: vec![GenerationId([5; 16])],
        adopted: 1,
        layers: Catalog::default(),
        mode: Mode::Async,
        given: Given::NOTHING,
        released: false,
        replaced: false,
        touched: false,
        run: blockmirror_protocol::units::Epoch(0),
        ends: blockmirror_protocol::lineage::Ends::default(),
        agreed: 1,
        heirs: Vec::new(),
    }
}

fn base() -> Base {
    Base { copy: CopyId([6; 16]), generation: GenerationId([5; 16]), adopted: 1 }
}

fn position(epoch: u64) -> Position {
    Position { generation: GenerationId([5; 16]), epoch: Epoch(epoch), sequence: Sequence(epoch) }
}

fn mark(epoch: u64) -> Mark {
    Mark { position: position(epoch), session: Session(epoch), copies: 0 }
}

/// Runs a test the way a volume's thread runs.
fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test)
}

fn pool() -> BufferPool {
    BufferPool::new(1 << 20)
}

/// Changes something in a prepared folder, stopped after no storage call, after one, and so on until it has ended. Each
/// time the folder is opened again, and `check` sees it and whether the change had ended.
async fn stop_after_each_call(
    prepare: impl AsyncFn(&State),
    change: impl AsyncFn(&State),
    check: impl AsyncFn(&State, bool),
) {
    for passing in 0.. {
        let folder = tempfile::tempdir().unwrap();
        let storage = open_with(Engine::Automatic).unwrap();
        let state = State::create(folder.path(), storage.clone(), pool(), &superblock()).await.unwrap();
        prepare(&state).await;
        drop(state);
        let faults = Faults::new(storage.clone());
        let state = State::open(folder.path(), faults.clone(), pool()).await.unwrap();
        state.recover_marker().await.unwrap();
        faults.stop_after(passing);
        let has_ended = ends(change(&state), &faults).await;
        drop(state);
        drain(&*storage).await;
        faults.forget_swallowed();
        let state = State::open(folder.path(), storage, pool()).await.unwrap();
        check(&state, has_ended).await;
        if has_ended {
            assert!(passing > 0, "a change takes a storage call");
            return;
        }
    }
}

/// Whether something ends before its storage stops.
async fn ends(change: impl Future<Output = ()>, faults: &Faults) -> bool {
    tokio::select! {
        biased;
        () = change => true,
        () = faults.stopped() => false,
    }
}

/// The dirty blocks of a map.
fn dirty(map: &DirtyMap) -> Vec<u64> {
    let mut at = 0;
    let runs = std::iter::from_fn(|| {
        let run = map.next_dirty(at, u64::MAX)?;
        at = run.end;
        Some(run)
    });
    runs.flatten().collect()
}

#[test]
fn a_folder_is_complete_or_not_opened_and_made_again() {
    run(async {
        for passing in 0.. {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("volume");
            let storage = open_with(Engine::Automatic).unwrap();
            let faults = Faults::new(storage.clone());
            faults.stop_after(passing);
            let has_ended = ends(
                async { drop(State::create(&path, faults.clone(), pool(), &superblock()).await.unwrap()) },
                &faults,
            )
            .await;
            drain(&*storage).await;
            faults.forget_swallowed();
            match State::open(&path, storage.clone(), pool()).await {
                Ok(state) => {
                    assert_eq!(state.superblock(), superblock());
                    assert_eq!(state.recover_marker().await.unwrap(), Mark::default());
                    let log = state.recover_log().await.unwrap();
                    assert!(
                        matches!(log, activity_log::Recovered::Active { extents, .. } if extents.is_empty())
                    );
                }
                Err(error) => {
                    assert!(!has_ended, "{error:?}");
                    assert!(matches!(error, StateError::Open(_) | StateError::Metadata { .. }), "{error:?}");
                    std::fs::remove_dir_all(&path).unwrap();
                    State::create(&path, storage, pool(), &superblock()).await.unwrap();
                }
            }
            if has_ended {
                assert!(passing > 2, "marker, superblock, and what opening reads");
                return;
            }
        }
    });
}

#[test]
fn a_superblock_says_what_it_said_or_what_it_was_to_say() {
    run(async {
        let changes = Cell::new(0);
        stop_after_each_call(
            async |_| changes.set(0),
            async |state| {
                for number in 1..4 {
                    let session = Session(number);
                    state.change_superblock(|superblock| superblock.session = session).await.unwrap();
                    assert_eq!(state.superblock().session, session);
                    changes.set(number);
                }
            },
            async |state, _| {
                let Session(found) = state.superblock().session;
                assert!((changes.get()..=changes.get() + 1).contains(&found), "{found} after {changes:?}");
                assert_eq!(Superblock { session: Session(0), ..state.superblock() }, superblock());
            },
        )
        .await;
    });
}

#[test]
fn a_marker_names_the_epoch_before_or_the_one_that_was_written() {
    run(async {
        let markers = Cell::new(0);
        stop_after_each_call(
            async |_| markers.set(0),
            async |state| {
                for epoch in 1..4 {
                    state.write_marker(mark(epoch)).await.unwrap();
                    markers.set(epoch);
                }
            },
            async |state, _| {
                let found = state.recover_marker().await.unwrap().position.epoch.0;
                assert!((markers.get()..=markers.get() + 1).contains(&found), "{found} after {markers:?}");
                // What is written next takes the other place.
                state.write_marker(mark(found + 1)).await.unwrap();
                assert_eq!(state.recover_marker().await.unwrap(), mark(found + 1));
            },
        )
        .await;
    });
}

#[test]
fn a_map_keeps_every_block_that_is_dirty_before_and_after() {
    run(async {
        // A page that gets more dirty blocks, one that becomes clean, a new one, and another confirmed generation.
        let (page, generation) = (BLOCKS_PER_PAGE, GenerationId([7; 16]));
        let before = [1, 2, page + 5];
        let after = [2, 3, 2 * page + 9];
        let map_of = |state: &State, blocks: [u64; 3]| {
            let superblock = state.superblock();
            let map =
                DirtyMap::full(superblock.volume, PEERS[0], superblock.size_bytes, superblock.block_size);
            let mut map = map.clean(base());
            blocks.into_iter().for_each(|block| assert!(map.mark(block..block + 1)));
            map
        };
        stop_after_each_call(
            async |state| {
                let (_, file) = state.open_map(PEERS[0]).await.unwrap();
                state.write_map(&file, map_of(state, before).take_changes()).await.unwrap();
            },
            async |state| {
                let (mut map, file) = state.open_map(PEERS[0]).await.unwrap();
                assert_eq!(dirty(&map), before);
                before.into_iter().for_each(|block| map.clear(block..block + 1));
                after.into_iter().for_each(|block| _ = map.mark(block..block + 1));
                map.confirm(base().copy, generation);
                state.write_map(&file, map.take_changes()).await.unwrap();
            },
            async |state, has_ended| {
                let (map, _) = state.open_map(PEERS[0]).await.unwrap();
                let found = dirty(&map);
                assert!(found.contains(&2), "it is dirty in both, and not in {found:?}");
                assert!(found.iter().all(|block| before.contains(block) || after.contains(block)));
                if map.base().generation == generation {
                    assert_eq!(found, after, "the header comes last");
                } else {
                    assert_eq!(map.base(), base());
                }
                assert!(!has_ended || map.base().generation == generation);
            },
        )
        .await;
    });
}

/// What a promotion begins with.
async fn write_promoted_maps(state: &State, restored: &[ByteRange]) {
    let candidacy = Candidacy {
        host: HostId([2; 32]),
        decision: Decision::default(),
        position: Position::default(),
        restored: restored.to_vec(),
    };
    let replica = Superblock { role: Role::Replica, data: DataState::Consistent, ..state.superblock() };
    let mut rewrite = Rewrite::promotion(&replica, &PEERS, candidacy).unwrap();
    while let Ok(Some(Order::Write(part @ Part::Map(_)))) = rewrite.next(true) {
        state.rewrite(&mut rewrite, part).await.unwrap();
    }
}

#[test]
fn the_maps_of_a_promotion_know_what_is_restored_or_nothing() {
    run(async {
        let restored = [ByteRange::new(1 << 20, 8192), ByteRange::new(900 << 20, 4096)];
        let blocks = [256, 257, 900 << 8];
        stop_after_each_call(
            async |state| {
                // The first peer's map was kept; there is none of the second.
                let (map, file) = state.open_map(PEERS[0]).await.unwrap();
                let mut map = map.clean(base());
                map.mark(7..8);
                state.write_map(&file, map.take_changes()).await.unwrap();
            },
            async |state| write_promoted_maps(state, &restored).await,
            async |state, has_ended| {
                let (kept, _) = state.open_map(PEERS[0]).await.unwrap();
                let (new, _) = state.open_map(PEERS[1]).await.unwrap();
                assert_eq!(kept.base(), base());
                assert!(kept.is_dirty(7), "what was known stays known");
                if !new.is_full() {
                    assert_eq!(dirty(&new), blocks);
                    assert_eq!(new.base(), Base { copy: CopyId::default(), ..base() });
                }
                if has_ended || !new.is_full() {
                    assert_eq!(dirty(&kept), [&[7], &blocks[..]].concat());
                }
                assert!(!has_ended || !new.is_full());
                // Whoever promotes again gets there.
                write_promoted_maps(state, &restored).await;
                for (peer, other) in [(PEERS[0], &[7][..]), (PEERS[1], &[])] {
                    let (map, _) = state.open_map(peer).await.unwrap();
                    assert_eq!(dirty(&map), [other, &blocks].concat());
                }
            },
        )
        .await;
    });
}

#[test]
fn a_damaged_map_may_have_said_anything() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let storage = open_with(Engine::Automatic).unwrap();
        let state = State::create(folder.path(), storage, pool(), &superblock()).await.unwrap();
        let (damaged, absent) = (HostId([7; 32]), HostId([8; 32]));
        state.open_map(damaged).await.unwrap();
        std::fs::write(folder.path().join(dirty_map::file_name(damaged)), vec![0xff; 3 * PAGE_BYTES])
            .unwrap();
        let maps = state.valid_maps(&[damaged, absent]).await.unwrap();
        assert_eq!(maps.keys().collect::<Vec<_>>(), [&damaged]);
        assert!(maps[&damaged].is_full(), "a replica tells its primary of all of it (D3)");
    });
}

/// A file that could not be looked for was taken for one that was not there.
#[test]
fn a_map_that_cannot_be_looked_for_is_not_replaced() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let storage = open_with(Engine::Automatic).unwrap();
        let state = State::create(folder.path(), storage, pool(), &superblock()).await.unwrap();
        let path = folder.path().join(dirty_map::file_name(PEERS[0]));
        std::os::unix::fs::symlink(&path, &path).unwrap();
        assert!(matches!(state.open_map(PEERS[0]).await, Err(StateError::Folder { .. })));
        assert!(matches!(state.valid_maps(&PEERS).await, Err(StateError::Folder { .. })));
        assert!(path.is_symlink(), "what is there stays");
    });
}

/// The state folder of an earlier release, on a disk that is full.
#[test]
fn a_superblock_that_there_is_no_room_for_twice_is_kept_once_until_there_is() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join(superblock::FILE_NAME);
        let storage = open_with(Engine::Automatic).unwrap();
        drop(State::create(folder.path(), storage.clone(), pool(), &superblock()).await.unwrap());
        drain(&*storage).await;
        let file = std::fs::File::options().write(true).open(&path).unwrap();
        file.set_len(superblock::TWINS).unwrap();
        let faults = Faults::new(storage.clone());
        faults.fail(Calls::Writes, 1, libc::ENOSPC);
        let state = State::open(folder.path(), faults.clone(), pool()).await.unwrap();
        assert_eq!(state.superblock(), superblock());
        // The slot is written, and its twin is not.
        faults.fail(Calls::Writes, 2, libc::ENOSPC);
        state.change_superblock(|superblock| superblock.agreed = 7).await.unwrap();
        assert_eq!((state.superblock().agreed, state.has_twin.get()), (7, false));
        // There is room again.
        state.change_superblock(|superblock| superblock.agreed = 8).await.unwrap();
        assert!(state.has_twin.get());
        let bytes = std::fs::read(&path).unwrap();
        let [slot, twin] = superblock::places(3).map(|place| &bytes[place as usize..][..PAGE_BYTES]);
        assert_eq!(slot, twin);
        // From now on a change is durable when both are.
        faults.fail(Calls::Writes, 2, libc::ENOSPC);
        assert!(state.change_superblock(|superblock| superblock.agreed = 9).await.is_err());
        assert_eq!(state.superblock().agreed, 8);
        drop(state);
        drain(&*storage).await;
        let state = State::open(folder.path(), storage.clone(), pool()).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), superblock::FILE_BYTES);
        drop(state);
        drain(&*storage).await;
    });
}

/// Media give errors rather than flipped bits, and one in the older of two slots kept a volume closed whose newer one was
/// whole.
#[test]
fn a_page_that_cannot_be_read_is_a_damaged_one() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let storage = open_with(Engine::Automatic).unwrap();
        let state = State::create(folder.path(), storage.clone(), pool(), &superblock()).await.unwrap();
        state.write_marker(mark(1)).await.unwrap();
        state.write_marker(mark(2)).await.unwrap();
        drop(state);
        drain(&*storage).await;
        // The superblock's two slots and their twins, the marker's slots, the eight places of the log.
        for unreadable in 0..14 {
            let faults = Faults::new(storage.clone());
            faults.fail(Calls::Reads, unreadable + 1, libc::EIO);
            let state = State::open(folder.path(), faults, pool()).await.unwrap();
            assert_eq!(state.superblock(), superblock());
            let marker = state.recover_marker().await.unwrap();
            assert!([mark(1), mark(2), Mark::default()].contains(&marker), "{marker:?}");
            let is_unsure =
                matches!(state.recover_log().await.unwrap(), activity_log::Recovered::Unsure { .. });
            assert!(unreadable >= 6 || !is_unsure, "{unreadable}");
            drop(state);
            drain(&*storage).await;
        }
        // Nothing else of the superblock was ever written, and its twin is damaged: the error is told, and not called damage.
        let [slot, twin] = superblock::places(1);
        let path = folder.path().join(superblock::FILE_NAME);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[twin as usize..][..7].copy_from_slice(b"damaged");
        std::fs::write(&path, bytes).unwrap();
        let faults = Faults::new(storage.clone());
        faults.fail(Calls::Reads, 1 + slot / PAGE_BYTES as u64, libc::EIO);
        let opened = State::open(folder.path(), faults, pool()).await;
        assert!(matches!(opened, Err(StateError::Storage(_))));
        drain(&*storage).await;
        // Opened, it is there twice again.
        drop(State::open(folder.path(), storage.clone(), pool()).await.unwrap());
        let bytes = std::fs::read(folder.path().join(superblock::FILE_NAME)).unwrap();
        assert_eq!(bytes[slot as usize..][..PAGE_BYTES], bytes[twin as usize..][..PAGE_BYTES]);
    });
}

#[test]
fn a_log_that_was_lost_says_everything_until_a_record_says_less() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let storage = open_with(Engine::Automatic).unwrap();
        drop(State::create(folder.path(), storage.clone(), pool(), &superblock()).await.unwrap());
        drain(&*storage).await;
        let path = folder.path().join(activity_log::FILE_NAME);
        for length in [0, activity_log::FILE_BYTES / 2, activity_log::FILE_BYTES] {
            let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
            file.set_len(0).unwrap();
            file.set_len(length).unwrap();
            drop(file);
            let state = State::open(folder.path(), storage.clone(), pool()).await.unwrap();
            let activity_log::Recovered::Unsure { serial } = state.recover_log().await.unwrap() else {
                panic!("a log of {length} zeroes says nothing");
            };
            let again = state.recover_log().await.unwrap();
            assert!(matches!(again, activity_log::Recovered::Unsure { .. }), "nobody knows more by now");
            let activity_log::Recovered::Unsure { serial: newest } = again else { unreachable!() };
            assert!(newest >= serial);
            let record = activity_log::encode([], newest + 1);
            let offset = activity_log::record_offset(newest + 1);
            storage::write(&*storage, state.log_file(), offset, state.page(&record), true).await.unwrap();
            let less = state.recover_log().await.unwrap();
            assert!(matches!(less, activity_log::Recovered::Active { extents, .. } if extents.is_empty()));
        }
    });
}

#[test]
fn a_peers_map_that_cannot_be_read_is_full() {
    let superblock = superblock();
    let full = || DirtyMap::full(superblock.volume, PEERS[0], superblock.size_bytes, superblock.block_size);
    let unreadable = Err(std::io::Error::from_raw_os_error(libc::EIO));
    let map = map_of(full(), Path::new("map"), unreadable, superblock.adopted).unwrap();
    assert!(map.is_full() && map.is_lost());
}

/// A host wrote without a peer that was removed, forgot that, and was followed by nobody's map when that one came back with a
/// copy of before.
#[test]
fn what_is_written_without_a_host_is_known_when_it_comes_back() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let storage = open_with(Engine::Automatic).unwrap();
        let state = State::create(folder.path(), storage, pool(), &superblock()).await.unwrap();
        let (removed, met, new) = (HostId([6; 32]), HostId([7; 32]), HostId([8; 32]));
        for peer in [removed, met] {
            let (map, file) = state.open_map_of_follower(peer).await.unwrap();
            let mut map = map.clean(base());
            state.write_map(&file, map.take_changes()).await.unwrap();
        }
        state.void_other_maps(&[met, new]).await.unwrap();
        state.open_map_of_follower(new).await.unwrap();
        let maps = state.valid_maps(&[removed, met, new]).await.unwrap();
        let full: Vec<bool> = maps.values().map(DirtyMap::is_full).collect();
        assert_eq!((maps.len(), full), (3, vec![true, false, true]));
        // A map that was voided stays so, until another's content is adopted.
        state.void_other_maps(&[met, new]).await.unwrap();
        assert!(state.valid_maps(&[removed]).await.unwrap()[&removed].is_full());
        state.change_superblock(|superblock| superblock.adopted += 1).await.unwrap();
        assert!(state.valid_maps(&[removed, met, new]).await.unwrap().is_empty());
    });
}

/// Its map could not be voided when it was removed, as without room: it joined again as one that lacks nothing.
#[test]
fn a_host_that_joins_lacks_everything_whatever_was_kept_for_it() {
    run(async {
        let folder = tempfile::tempdir().unwrap();
        let storage = open_with(Engine::Automatic).unwrap();
        let state = State::create(folder.path(), storage, pool(), &superblock()).await.unwrap();
        let peer = HostId([6; 32]);
        let (map, file) = state.open_map_of_follower(peer).await.unwrap();
        let mut map = map.clean(base());
        state.write_map(&file, map.take_changes()).await.unwrap();
        drop(file);
        assert!(state.open_map_of_follower(peer).await.unwrap().0.is_clean());
        assert!(state.new_map_of_follower(peer).await.unwrap().0.is_full());
        assert!(state.open_map_of_follower(peer).await.unwrap().0.is_full(), "the file says so");
        // One that is void, and denies that anything of it was answered, is so no more once nobody marks in it.
        let (mut map, file) = state.open_map_of_follower(peer).await.unwrap();
        map.note_unanswered(true);
        state.write_map(&file, map.take_changes()).await.unwrap();
        drop(file);
        state.void_other_maps(&[]).await.unwrap();
        assert!(!state.open_map_of_follower(peer).await.unwrap().0.is_unanswered());
    });
}
