//! What `blockmirror inspect` prints of each kind of file, whole and damaged, and what `blockmirror status` learns from
//! the same files while the agent is down.

use blockmirror_agent::config::{ConfigFolder, PeerConfig, Role, VolumeConfig};
use blockmirror_agent::control::api::{AgentRecord, CopyState, StatusReply};
use blockmirror_agent::control::record_path;
use blockmirror_protocol::disk::dirty_map::{
    BLOCKS_PER_PAGE, Base, Header, WORDS_PER_PAGE, encode_bits, page_offset,
};
use blockmirror_protocol::disk::pre_images::{Batch, Entry, FIRST_BATCH};
use blockmirror_protocol::disk::recovery::{CHUNK_BYTES, Key, RecoveryState, Subject};
use blockmirror_protocol::disk::superblock::Superblock;
use blockmirror_protocol::disk::{PAGE_BYTES, activity_log, dirty_map, marker, pre_images, superblock};
use blockmirror_protocol::given::Given;
use blockmirror_protocol::layers::{Catalog, LayerId};
use blockmirror_protocol::lineage::Ends;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::terms::{DataState, Fence, Mode};
use blockmirror_protocol::units::{
    BlockSize, CopyId, EXTENT_BYTES, Epoch, Extent, GenerationId, HostId, Mark, Position, Sequence, Session,
    VolumeId,
};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

const PEER: HostId = HostId([2; 32]);
const BLOCKS: u64 = 3 * BLOCKS_PER_PAGE;

fn position() -> Position {
    Position { generation: GenerationId([6; 16]), epoch: Epoch(7), sequence: Sequence(8) }
}

fn mark() -> Mark {
    Mark { position: position(), session: Session(9), copies: 10 }
}

fn a_superblock(role: superblock::Role) -> Superblock {
    Superblock {
        volume: VolumeId([1; 16]),
        copy: CopyId([3; 16]),
        size_bytes: BLOCKS * 4096,
        block_size: BlockSize::default(),
        role,
        data: DataState::Consistent,
        session: Session(4),
        fence: Fence { counter: 5, holder: HostId([5; 32]) },
        position: position(),
        source: Fence { counter: 4, holder: HostId([9; 32]) },
        lineage: vec![GenerationId([6; 16]), GenerationId([10; 16])],
        adopted: 2,
        layers: Catalog::new(3, LayerId::new(3), LayerId::new(2)),
        mode: Mode::Sync,
        given: Given::NOTHING,
        released: false,
        replaced: false,
        touched: false,
        run: Epoch(0),
        ends: Ends::default(),
        agreed: 4,
        heirs: vec![PEER],
    }
}

fn a_log(records: &[(u64, &[u32])]) -> Vec<u8> {
    let mut file = vec![0; activity_log::FILE_BYTES as usize];
    for (serial, record) in activity_log::ring_after(0, false) {
        let at = activity_log::record_offset(serial) as usize;
        file[at..at + record.len()].copy_from_slice(&record);
    }
    for (serial, extents) in records {
        let at = activity_log::record_offset(*serial) as usize;
        let record = activity_log::encode(extents.iter().copied().map(Extent), *serial);
        file[at..at + record.len()].copy_from_slice(&record);
    }
    file
}

/// A map with two runs in its first page, a hole for its second, and a third that is dirty by the header.
fn write_map(path: &Path) -> fs::File {
    let header = Header {
        volume: VolumeId([1; 16]),
        peer: PEER,
        base: Base { copy: CopyId([8; 16]), generation: GenerationId([6; 16]), adopted: 2 },
        known: mark(),
        copied: Some(Session(11)),
        given: None,
        is_unanswered: true,
        blocks: BLOCKS,
        block_size: BlockSize::default(),
        full_from: 2,
    };
    let mut bits = [0; WORDS_PER_PAGE];
    (bits[0], bits[1], bits[2]) = (1 << 1 | 1 << 63, 0b11, 1 << 5);
    let file = fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).open(path).unwrap();
    file.set_len(dirty_map::file_bytes(BLOCKS)).unwrap();
    file.write_all_at(&header.encode(1), PAGE_BYTES as u64).unwrap();
    file.write_all_at(&encode_bits(0, &bits), page_offset(0)).unwrap();
    file
}

fn tool(arguments: &[&str]) -> (Option<i32>, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_blockmirror")).args(arguments).output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

fn inspect(path: &Path) -> (Option<i32>, String, String) {
    tool(&["inspect", path.to_str().unwrap()])
}

#[track_caller]
fn assert_prints(path: &Path, expected: &str) {
    assert_eq!(inspect(path), (Some(0), expected.to_owned(), String::new()));
}

#[test]
fn a_superblock_is_printed_with_both_slots() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("any name");
    let superblock = Superblock { touched: true, ..a_superblock(superblock::Role::Replica) };
    let mut file = [superblock.encode(4), superblock.encode(5)].concat();
    fs::write(&path, &file).unwrap();
    let expected = "\
superblock
  slot 0:          serial 4, whole
  slot 1:          serial 5, whole, newest
  volume:          01010101010101010101010101010101
  copy:            03030303030303030303030303030303
  size:            381M (399507456 bytes)
  block:           4K
  role:            replica
  data:            consistent
  session:         4
  fence:           5, held by 0505050505050505050505050505050505050505050505050505050505050505
  generation:      06060606060606060606060606060606
  epoch:           7
  sequence:        8
  source:          4, held by 0909090909090909090909090909090909090909090909090909090909090909
  mode:            sync
  counts on:       nothing
  adopted:         2 times
  rollback point:  layer 3 of pre-images
  layers begun:    3
  kept for undo:   layer 2 of pre-images
  agreed to:       fences up to 4
  agreed to:       the next one, if it is held by 0202020202020202020202020202020202020202020202020202020202020202
  touched:         yes, something else wrote to the backing, and all is to be compared
  released:        no
  lineage 0:       06060606060606060606060606060606
  lineage 1:       0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a
";
    assert_prints(&path, expected);
    file[PAGE_BYTES + 100] ^= 1;
    fs::write(&path, &file).unwrap();
    let torn = expected.replace("4, whole", "4, whole, newest").replace("serial 5, whole, newest", "damaged");
    assert_prints(&path, &torn);
    file[100] ^= 1;
    fs::write(&path, &file).unwrap();
    let expected = "superblock\n  slot 0:  damaged\n  slot 1:  damaged\n";
    let errors = "blockmirror: the superblock is damaged: no whole copy of it was found\n";
    assert_eq!(inspect(&path), (Some(1), expected.to_owned(), errors.to_owned()));
}

#[test]
fn a_marker_is_printed_with_both_slots() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("marker");
    let newest = marker::encode(mark(), 3);
    fs::write(&path, [&[0; PAGE_BYTES], &newest[..]].concat()).unwrap();
    let expected = "\
marker
  slot 0:      empty
  slot 1:      serial 3, whole, newest
  generation:  06060606060606060606060606060606
  epoch:       7
  sequence:    8
  session:     9
  copies:      10
";
    assert_prints(&path, expected);
    fs::write(&path, marker::encode(mark(), 2)).unwrap();
    let expected = "\
marker
  slot 0:      serial 2, whole, newest
  slot 1:      missing
  generation:  06060606060606060606060606060606
  epoch:       7
  sequence:    8
  session:     9
  copies:      10
";
    assert_prints(&path, expected);
}

#[test]
fn an_activity_log_is_printed_with_all_records() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("activity-log");
    let mut file = a_log(&[(6, &[0, 1]), (7, &[0, 1, 4]), (8, &[1, 4])]);
    fs::write(&path, &file).unwrap();
    let expected = "\
activity log
  record 0:  serial 8, whole, newest: 2 extents
  record 1:  serial 1, whole: 0 extents
  record 2:  serial 2, whole: 0 extents
  record 3:  serial 3, whole: 0 extents
  record 4:  serial 4, whole: 0 extents
  record 5:  serial 5, whole: 0 extents
  record 6:  serial 6, whole: 2 extents
  record 7:  serial 7, whole: 3 extents
  active:    2 extents, 8M
  extent 1:  at byte 4194304
  extent 4:  at byte 16777216
";
    assert_prints(&path, expected);
    file[40] ^= 1;
    fs::write(&path, &file).unwrap();
    let expected = "\
activity log
  record 0:  damaged
  record 1:  serial 1, whole: 0 extents
  record 2:  serial 2, whole: 0 extents
  record 3:  serial 3, whole: 0 extents
  record 4:  serial 4, whole: 0 extents
  record 5:  serial 5, whole: 0 extents
  record 6:  serial 6, whole: 2 extents
  record 7:  serial 7, whole: 3 extents
  active:    any block may differ: the newest record says so, or is not whole
";
    assert_prints(&path, expected);
}

#[test]
fn a_dirty_map_is_printed_with_its_first_runs() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("map");
    let file = write_map(&path);
    let expected = "\
dirty map
  slot 0:      empty
  slot 1:      serial 1, whole, newest
  volume:      01010101010101010101010101010101
  peer:        0202020202020202020202020202020202020202020202020202020202020202
  base:        copy 08080808080808080808080808080808
  generation:  06060606060606060606060606060606
  adopted:     2 times
  copied:      in session 11
  counts on:   not known
  answered:    nothing that the peer lacks
  blocks:      97536 of 4K
  pages:       1 with dirty blocks, all whole
  dirty:       32517 blocks, 127.0M
  run:         4K at byte 4096
  run:         12K at byte 258048
  run:         4K at byte 544768
  run:         127M at byte 266338304
";
    assert_prints(&path, expected);
    file.write_all_at(&[1], page_offset(1) + 50).unwrap();
    let expected = "\
dirty map
  slot 0:      empty
  slot 1:      serial 1, whole, newest
  volume:      01010101010101010101010101010101
  peer:        0202020202020202020202020202020202020202020202020202020202020202
  base:        copy 08080808080808080808080808080808
  generation:  06060606060606060606060606060606
  adopted:     2 times
  copied:      in session 11
  counts on:   not known
  answered:    nothing that the peer lacks
  blocks:      97536 of 4K
  pages:       2 with dirty blocks, 1 of them damaged and counted as dirty
  dirty:       65029 blocks, 254.0M
  run:         4K at byte 4096
  run:         12K at byte 258048
  run:         4K at byte 544768
  run:         254M at byte 133169152
";
    assert_prints(&path, expected);
    file.write_all_at(&[1], PAGE_BYTES as u64 + 50).unwrap();
    assert_eq!(inspect(&path).0, Some(1));
}

#[test]
fn the_state_of_a_recovery_is_printed_without_its_key() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("state");
    let size_bytes = 9 * CHUNK_BYTES + 512;
    let (volume, copy) = (VolumeId([1; 16]), CopyId([3; 16]));
    let subject = Subject { volume, copy, size_bytes, position: position() };
    let mut state = RecoveryState::new(subject, 6, Key("secret".into()));
    for chunk in [0, 3, 9] {
        state.set(chunk);
    }
    let mut file = state.encode();
    fs::write(&path, &file).unwrap();
    let expected = "\
state of a recovery
  volume:      01010101010101010101010101010101
  copy:        03030303030303030303030303030303
  size:        144.0M (150995456 bytes)
  generation:  06060606060606060606060606060606
  epoch:       7
  sequence:    8
  key:         kept here
  durable:     3 of 10 chunks of 16M, 32.0M
";
    assert_prints(&path, expected);
    file[512] ^= 1;
    fs::write(&path, &file).unwrap();
    let errors = "blockmirror: the state of the recovery is damaged: no whole copy of it was found\n";
    assert_eq!(inspect(&path), (Some(1), "state of a recovery\n".to_owned(), errors.to_owned()));
}

/// A layer with two batches, of a block of data and 1 MiB of zeroes each, and where the second begins.
fn a_layer() -> (Vec<u8>, usize) {
    let header = pre_images::Header {
        layer: LayerId::new(11).unwrap(),
        volume: VolumeId([1; 16]),
        copy: CopyId([3; 16]),
        size_bytes: BLOCKS * 4096,
        block_size: BlockSize::default(),
        point: position(),
        began_unix_seconds: 1_700_000_000,
        lineage: vec![GenerationId([6; 16])],
    };
    let (mut file, mut second) = (header.encode().to_vec(), 0);
    for serial in 0..2 {
        second = file.len();
        let data = [serial as u8 + 1; PAGE_BYTES];
        let entries = vec![
            Entry::of_data(ByteRange::new(serial * 4096, 4096), &data),
            Entry::of_zeroes(ByteRange::new((serial + 1) << 20, 1 << 20)),
        ];
        let batch = Batch { layer: LayerId::new(11).unwrap(), serial, at: second as u64, entries };
        file.extend(batch.encode());
        file.extend(data);
    }
    (file, second)
}

#[test]
fn a_layer_of_pre_images_is_printed_with_what_it_holds() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("layer");
    let (whole, second) = a_layer();
    fs::write(&path, &whole).unwrap();
    let expected = "\
layer of pre-images
  layer:       11
  volume:      01010101010101010101010101010101
  copy:        03030303030303030303030303030303
  size:        381M (399507456 bytes)
  block:       4K
  began:       1700000000 seconds after the start of 1970
  generation:  06060606060606060606060606060606
  epoch:       7
  sequence:    8
  lineage 0:   06060606060606060606060606060606
  file:        20K (20480 bytes)
  batches:     2
  entries:     4, 8K of data and 2M of zeroes
  last batch:  whole
";
    assert_prints(&path, expected);
    let mut torn = whole.clone();
    *torn.last_mut().unwrap() ^= 1;
    fs::write(&path, &torn).unwrap();
    let one = expected
        .replace("batches:     2", "batches:     1")
        .replace("4, 8K of data and 2M of zeroes", "2, 4K of data and 1M of zeroes");
    let ignored = "not finished, and ignored: nothing of it was overwritten";
    assert_prints(&path, &one.replace("whole", ignored));
    let mut damaged = whole.clone();
    damaged[FIRST_BATCH as usize + 60] ^= 1;
    fs::write(&path, &damaged).unwrap();
    let (code, output, errors) = inspect(&path);
    assert!(code == Some(1) && output.contains("batches:     0"), "{output}");
    assert!(output.ends_with("last batch:  damaged, with what may follow it\n"), "{output}");
    assert_eq!(errors, "blockmirror: the layer of pre-images is damaged: no whole copy of it was found\n");
    fs::write(&path, &whole[..FIRST_BATCH as usize]).unwrap();
    assert!(inspect(&path).1.ends_with("last batch:  none yet\n"));
    let mut headless = whole[..second].to_vec();
    headless[8] ^= 1;
    fs::write(&path, &headless).unwrap();
    assert_eq!(inspect(&path), (Some(1), "layer of pre-images\n".to_owned(), errors));
}

#[test]
fn other_files_are_told_from_ours() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("other");
    let (code, _, errors) = inspect(&path);
    assert!(code == Some(1) && errors.contains("cannot read "), "{errors}");
    for bytes in [vec![], vec![0; 8192], b"BMSUPER".to_vec()] {
        fs::write(&path, bytes).unwrap();
        let (code, _, errors) = inspect(&path);
        assert!(code == Some(1) && errors.contains("is no metadata of Blockmirror"), "{errors}");
    }
}

fn volume(role: Role) -> VolumeConfig {
    let peer = |name: &str, host| PeerConfig::new(name.parse().unwrap(), Role::Replica, host, vec![]);
    let (name, backing) = ("data".parse().unwrap(), "/srv/data.img".into());
    VolumeConfig {
        devices: vec![],
        peers: vec![peer("b", PEER), peer("c", HostId([7; 32]))],
        ..VolumeConfig::new(name, VolumeId([1; 16]), role, backing, BLOCKS * 4096, BlockSize::default())
    }
}

/// The status of a stopped agent over these files, as JSON.
fn status(folder: &Path, role: Role) -> StatusReply {
    let run = folder.join("run");
    fs::create_dir_all(&run).unwrap();
    let (config, state) = (folder.join("etc"), folder.join("var"));
    ConfigFolder::new(&config).save_volume(&volume(role)).unwrap();
    let record = AgentRecord { pid: 1, config, state, listen: "0.0.0.0:7447".parse().unwrap() };
    fs::write(record_path(&run), serde_json::to_vec(&record).unwrap()).unwrap();
    let (code, output, errors) = tool(&["--run", run.to_str().unwrap(), "status", "--json"]);
    assert_eq!(code, Some(3), "{errors}");
    serde_json::from_str(&output).unwrap()
}

#[test]
fn a_stopped_primary_knows_what_its_replicas_may_lack() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("var/data");
    let out_of_sync = || {
        let facts = status(folder.path(), Role::Primary).volumes.remove(0).facts;
        (facts.data, facts.peers.iter().map(|peer| peer.out_of_sync_bytes).collect::<Vec<_>>())
    };
    assert_eq!(out_of_sync(), (None, vec![None, None]), "what is not known is not zero");

    fs::create_dir_all(&state).unwrap();
    let superblock = a_superblock(superblock::Role::Primary);
    fs::write(state.join(superblock::FILE_NAME), superblock.encode(2)).unwrap();
    fs::write(state.join(activity_log::FILE_NAME), a_log(&[])).unwrap();
    let map = write_map(&state.join(dirty_map::file_name(PEER)));
    let in_map = (BLOCKS_PER_PAGE + 5) * 4096;
    let consistent = Some(CopyState::Consistent);
    assert_eq!(out_of_sync(), (consistent, vec![Some(in_map), None]));

    // The first extent holds the five blocks of the first page, the last lies in the third.
    let extents = [0, 10, (BLOCKS * 4096 / EXTENT_BYTES) as u32];
    fs::write(state.join(activity_log::FILE_NAME), a_log(&[(9, &extents)])).unwrap();
    let united = BLOCKS_PER_PAGE * 4096 + 2 * EXTENT_BYTES;
    assert_eq!(out_of_sync(), (consistent, vec![Some(united), None]));

    let everything = (consistent, vec![Some(BLOCKS * 4096), None]);
    fs::write(state.join(activity_log::FILE_NAME), &a_log(&[])[..100]).unwrap();
    assert_eq!(out_of_sync(), everything, "a log that is not whole may have held anything");
    fs::write(state.join(activity_log::FILE_NAME), a_log(&[])).unwrap();
    map.write_all_at(&[1], PAGE_BYTES as u64 + 50).unwrap();
    assert_eq!(out_of_sync(), everything, "so may a map");
}

#[test]
fn a_stopped_replica_knows_its_copy_and_its_epoch() {
    let folder = tempfile::tempdir().unwrap();
    let state = folder.path().join("var/data");
    fs::create_dir_all(&state).unwrap();
    let superblock = a_superblock(superblock::Role::Replica);
    fs::write(state.join(superblock::FILE_NAME), superblock.encode(2)).unwrap();
    fs::write(state.join(marker::FILE_NAME), marker::encode(mark(), 2)).unwrap();
    let volume = status(folder.path(), Role::Replica).volumes.remove(0);
    assert_eq!((volume.facts.data, volume.facts.epoch), (Some(CopyState::Consistent), Some(7)));
    assert!(volume.verdict.contains("this copy is consistent"), "{}", volume.verdict);
    assert_eq!(volume.facts.peers[0].out_of_sync_bytes, None, "only the primary knows");
    let touched = Superblock { touched: true, ..superblock };
    fs::write(state.join(superblock::FILE_NAME), touched.encode(2)).unwrap();
    let volume = status(folder.path(), Role::Replica).volumes.remove(0);
    assert!(volume.verdict.contains("not to be relied on: something else wrote to it"), "{}", volume.verdict);
}
