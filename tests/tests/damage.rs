//! Damaged metadata, mistakes in the configuration, disks that are full: what is concerned says so, the rest goes on.

use blockmirror_agent::config::Role;
use blockmirror_agent::control::api::{PeerState, VolumeState};
use blockmirror_protocol::disk::pre_images::{self, Header};
use blockmirror_protocol::disk::superblock::{self, Superblock};
use blockmirror_protocol::disk::{PAGE_BYTES, slot_offset};
use blockmirror_protocol::layers::{LayerId, Purpose};
use blockmirror_tests::harness::random::Random;
use blockmirror_tests::machines::content::{BLOCK_BYTES, first_difference, noise, stamped};
use blockmirror_tests::machines::folder::Folder;
use blockmirror_tests::machines::hanging::Hanging;
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::nbd::Client;
use blockmirror_tests::machines::programs::{succeed, text};
use blockmirror_tests::require;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

/// Flips every byte of a range of a file.
fn flip(path: &Path, range: std::ops::Range<usize>) {
    let mut bytes = fs::read(path).expect("the file");
    let end = range.end.min(bytes.len());
    bytes[range.start..end].iter_mut().for_each(|byte| *byte ^= 0xff);
    fs::write(path, bytes).expect("the file");
}

/// Makes the checksum of a changed page right: at 12, of all the rest.
fn seal(page: &mut [u8]) {
    let mut checksum = crc32fast::Hasher::new();
    [&page[..12], &page[16..]].iter().for_each(|part| checksum.update(part));
    page[12..16].copy_from_slice(&checksum.finalize().to_le_bytes());
}

/// The dirty map of the primary for its only replica.
fn map_of(host: &Host) -> PathBuf {
    let entries = fs::read_dir(host.path("state/data")).expect("a folder");
    let mut maps = entries.map(|entry| entry.expect("an entry").path()).filter(|path| {
        let name = path.file_name().expect("an entry has a name").to_string_lossy();
        name.contains("map")
    });
    maps.next().expect("the primary keeps a map")
}

#[test]
fn an_unknown_key_keeps_its_volume_away_and_no_other() {
    let folder = Folder::new();
    let mut host = Host::new(&folder, "a");
    host.create(16 * MIB, "nbd");
    host.succeed(&["create", "other", "--backing", text(&host.path("other.img")), "--size", "16M"]);
    host.stop();
    let file = host.path("config/volumes/other.toml");
    let text = fs::read_to_string(&file).expect("the volume's file");
    fs::write(&file, text.replace("block_size_bytes", "blok_size_bytes")).expect("the volume's file");
    let line = text.lines().position(|line| line.starts_with("block_size_bytes")).expect("it is there") + 1;
    host.start();
    let place = format!("{}:{line}: unknown key \"blok_size_bytes\"", file.display());
    assert!(host.log().contains(&place), "{place}: {}", host.log());
    host.refuse(&["status", "other"], 1, &["other.toml:", "did you mean"]);
    let mut client = Client::connect(&host.socket()).expect("data is served");
    client.write_durably(0, &stamped(1)).expect("a write");
    let run = host.tool(&["config", "check"]);
    assert_eq!(run.code, 1, "{run:?}");
    assert!(run.output.contains(&place) && run.output.contains("did you mean"), "{run:?}");
}

#[test]
fn a_damaged_superblock_is_told_in_the_status_and_the_agent_runs_on() {
    for damage in [
        |path: &Path| flip(path, 0..superblock::FILE_BYTES as usize),
        |path: &Path| {
            File::options().write(true).open(path).and_then(|file| file.set_len(100)).expect("a file")
        },
        |path: &Path| fs::remove_file(path).expect("a file"),
    ] {
        let folder = Folder::new();
        let mut host = Host::new(&folder, "a");
        host.create(16 * MIB, "nbd");
        host.succeed(&["create", "other", "--backing", text(&host.path("other.img")), "--size", "16M"]);
        host.stop();
        damage(&host.state("superblock"));
        host.start();
        let status = host.status();
        assert_eq!(status.state, VolumeState::Failed);
        assert!(status.verdict.contains("superblock"), "{}", status.verdict);
        let other = host.succeed(&["status", "other", "--json"]);
        assert!(other.contains("no replica has joined"), "{other}");
    }
}

/// Opening a volume removed every layer of pre-images that it did not know, also what a later release had kept.
#[test]
fn a_layer_that_a_later_release_keeps_for_its_own_purpose_stays() {
    const CATALOG: usize = 1272;
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    let replica = mirror.replica_mut();
    replica.stop();
    let (kept, left) = (LayerId::new(7).expect("a layer"), LayerId::new(5).expect("a layer"));
    let bytes = fs::read(replica.state("superblock")).expect("the superblock");
    let (serial, mut superblock) = Superblock::recover(&bytes).expect("it is whole");
    for layer in [left, kept] {
        let header = Header {
            layer,
            volume: superblock.volume,
            copy: superblock.copy,
            size_bytes: superblock.size_bytes,
            block_size: superblock.block_size,
            point: superblock.position,
            began_unix_seconds: 1,
            lineage: superblock.lineage.clone(),
        };
        fs::write(replica.state(&pre_images::file_name(layer)), header.encode()).expect("the layer");
    }
    superblock.layers.set(Purpose::Undo, Some(kept));
    let mut page = superblock.encode(serial + 1);
    // Layer, purposes, touched: for nothing that this release knows.
    page[CATALOG + 8..CATALOG + 12].copy_from_slice(&(1_u32 << 20).to_le_bytes());
    seal(&mut page);
    let file = File::options().write(true).open(replica.state("superblock")).expect("the superblock");
    file.write_all_at(&page, slot_offset(serial + 1)).expect("the superblock");
    replica.start();
    mirror.wait_until_in_sync();
    let mut client = mirror.client();
    client.write_durably(0, &stamped(1)).expect("a write");
    mirror.replica_mut().stop();
    let replica = mirror.replica();
    assert!(replica.state(&pre_images::file_name(kept)).exists());
    assert!(!replica.state(&pre_images::file_name(left)).exists(), "nothing names it");
    let bytes = fs::read(replica.state("superblock")).expect("the superblock");
    let (_, superblock) = Superblock::recover(&bytes).expect("it is whole");
    assert!(superblock.layers.contains(kept) && superblock.layers.undo().is_none(), "{superblock:?}");
}

#[test]
fn metadata_of_a_newer_release_are_left_alone_and_no_order_is_taken() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    mirror.primary.stop();
    let replica = mirror.replica_mut();
    replica.stop();
    let superblock = replica.state("superblock");
    let mut before = fs::read(&superblock).expect("the superblock");
    for slot in before.chunks_mut(PAGE_BYTES) {
        // The version comes after the magic number.
        slot[8..12].copy_from_slice(&99_u32.to_le_bytes());
        seal(slot);
    }
    fs::write(&superblock, &before).expect("the superblock");
    replica.start();
    let status = replica.status();
    let error = status.facts.backing_error.clone().unwrap_or_default();
    assert!(
        error.contains("has version 99") && error.contains("use the release that wrote it"),
        "{status:?}"
    );
    let words = ["not open here", "use the release that wrote it"];
    replica.refuse(&["promote", "data", "--force"], 5, &words);
    replica.refuse(&["demote", "data"], 5, &words);
    replica.refuse(&["switch", "data", "--to", "a"], 5, &words);
    replica.refuse(&["resolve", "data", "--keep", "a"], 5, &words);
    replica.refuse(&["undo", "data"], 5, &words);
    assert!(fs::read(&superblock).expect("the superblock") == before, "nothing was changed");
}

/// Of two slots, the newest that went bad was taken for one that was torn: the host was a replica again.
#[test]
fn a_promotion_is_remembered_whichever_page_of_the_superblock_goes_bad() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    mirror.primary.kill();
    let host = mirror.replica_mut();
    host.succeed(&["promote", "data", "--force"]);
    for page in 0..superblock::FILE_BYTES as usize / PAGE_BYTES {
        host.kill();
        flip(&host.state("superblock"), page * PAGE_BYTES..(page + 1) * PAGE_BYTES);
        host.start();
        let status = host.status();
        assert_eq!(
            (status.facts.role, status.facts.backing_error.clone()),
            (Role::Primary, None),
            "{status:?}"
        );
        let mut client = Client::connect(&host.socket()).expect("it serves its device");
        client.write_durably(0, &stamped(page as u64 + 1)).expect("a write");
    }
}

#[test]
fn half_of_a_superblock_is_enough() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    mirror.primary.stop();
    // The older of the two copies is behind by a session number at most, which the next one raises again.
    flip(&mirror.primary.state("superblock"), 0..4096);
    mirror.primary.start();
    mirror.client().write_durably(0, &stamped(1)).expect("a write");
    mirror.assert_identical();
}

/// Damages a file of the primary while it is away, and the replica's copy of a block with it: as what it lacks is not
/// known any more, all of it must be copied.
fn all_is_copied_after(damage: impl Fn(&Host)) {
    let mut mirror = Mirror::new(32 * MIB, "nbd", &["b"]);
    let mut client = mirror.client();
    for block in (0..32 * MIB / BLOCK_BYTES).step_by(3) {
        client.write(block * BLOCK_BYTES, &stamped(block + 1)).expect("a write");
    }
    client.flush().expect("a flush");
    mirror.wait_until_quiet();
    mirror.primary.stop();
    mirror.replica_mut().stop();
    damage(&mirror.primary);
    let backing = File::options().write(true).open(mirror.replica().backing()).expect("a backing");
    backing.write_all_at(&stamped(12_345), 7 * MIB).expect("a write behind everybody's back");
    mirror.primary.start();
    assert_eq!(mirror.peer("b").out_of_sync_bytes, Some(32 * MIB), "everything may differ");
    mirror.replica_mut().start();
    mirror.assert_identical();
}

#[test]
fn a_damaged_activity_log_makes_everything_be_copied() {
    all_is_copied_after(|host| flip(&host.state("activity-log"), 0..usize::MAX));
}

#[test]
fn a_missing_end_of_the_activity_log_makes_everything_be_copied() {
    all_is_copied_after(|host| {
        let file = File::options().write(true).open(host.state("activity-log"));
        file.and_then(|file| file.set_len(4096)).expect("a file");
    });
}

#[test]
fn a_damaged_map_makes_everything_be_copied() {
    all_is_copied_after(|host| flip(&map_of(host), 0..usize::MAX));
}

/// A map that can't be read was taken, at a promotion, for that of a host that nothing was written without: the two were said to be
/// in sync, and differed (D1).
#[test]
fn a_primary_that_returns_with_a_damaged_map_copies_everything() {
    for damaged in [0..PAGE_BYTES, PAGE_BYTES..2 * PAGE_BYTES, 0..2 * PAGE_BYTES] {
        let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
        mirror.replica().link().cut();
        mirror.wait_until_lost("b");
        for stamp in 1..=8 {
            mirror.client().write_durably(stamp * MIB, &stamped(stamp)).expect("a write");
        }
        let host = &mut mirror.primary;
        host.succeed(&["demote", "data"]);
        host.stop();
        flip(&map_of(host), damaged.clone());
        host.start();
        host.succeed(&["promote", "data", "--force"]);
        let left = mirror.peer("b").out_of_sync_bytes;
        assert_eq!(left, Some(16 * MIB), "everything may differ, with bytes {damaged:?} damaged");
        mirror.replica().link().mend();
        mirror.assert_identical();
    }
}

#[test]
fn a_missing_map_makes_everything_be_copied() {
    all_is_copied_after(|host| fs::remove_file(map_of(host)).expect("a file"));
}

#[test]
fn a_damaged_marker_costs_nothing() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    mirror.client().write_durably(0, &stamped(1)).expect("a write");
    mirror.wait_until_quiet();
    mirror.replica_mut().stop();
    flip(&mirror.replica().state("marker"), 0..usize::MAX);
    mirror.client().write_durably(MIB, &stamped(2)).expect("a write");
    mirror.replica_mut().start();
    mirror.assert_identical();
}

#[test]
fn a_full_disk_under_a_replica_is_told_and_heals_when_there_is_space() {
    require!("root", "mkfs.ext4", "losetup");
    let mirror = Mirror::new(64 * MIB, "nbd", &[]);
    let disk = mirror.folder.join("disk.img");
    File::create(&disk).and_then(|file| file.set_len(96 * MIB)).expect("an image");
    succeed("mkfs.ext4", &["-q", text(&disk)]);
    let mounted = mirror.folder.mount(&mirror.folder.attach(&disk), "disk");
    let filler = mounted.path().join("filler");
    fs::write(&filler, vec![1; 50 << 20]).expect("there is space for a while");
    let mut replica = Host::new(&mirror.folder, "b");
    replica.join(&mirror.primary, &mounted.path().join("data.img"));
    mirror.wait_until_in_sync();

    let mut random = Random::new(1);
    let mut client = mirror.client();
    for offset in (0..64 * MIB).step_by(MIB as usize) {
        client.write(offset, &noise(&mut random, MIB)).expect("the primary is not concerned");
    }
    client.flush().expect("the primary is not concerned");
    let failed =
        mirror.wait_for_peer("b", "the replica has failed", |peer| peer.state == Some(PeerState::Failed));
    let error = failed.error.unwrap_or_default();
    assert!(error.contains("the replica's disk failed or is full"), "{error}");
    replica.wait_until("the replica tells why", |status| {
        status.state == VolumeState::Failed && status.verdict.contains("No space left on device")
    });
    let status = mirror.primary.status();
    assert_eq!(status.state, VolumeState::Degraded);
    client.write_durably(0, &stamped(1)).expect("the primary is not concerned");

    fs::remove_file(&filler).expect("the filler");
    mirror.wait_until_quiet();
    let backing = mounted.path().join("data.img");
    let difference = first_difference(&mirror.primary.backing(), &backing);
    assert_eq!(difference, None);
    replica.stop();
    mounted.unmount();
}

/// It was told to restart its agent first: nobody greeted it any more, by which it would have been opened anew.
#[test]
fn a_replica_that_failed_is_promoted_without_a_restart_when_its_disk_is_well_again() {
    require!("root", "mkfs.ext4", "losetup");
    let mut mirror = Mirror::new(64 * MIB, "nbd", &[]);
    let disk = mirror.folder.join("disk.img");
    File::create(&disk).and_then(|file| file.set_len(96 * MIB)).expect("an image");
    succeed("mkfs.ext4", &["-q", text(&disk)]);
    let mounted = mirror.folder.mount(&mirror.folder.attach(&disk), "disk");
    let filler = mounted.path().join("filler");
    fs::write(&filler, vec![1; 50 << 20]).expect("there is space for a while");
    let mut replica = Host::new(&mirror.folder, "b");
    replica.join(&mirror.primary, &mounted.path().join("data.img"));
    mirror.wait_until_in_sync();
    let mut client = mirror.client();
    client.write_durably(0, &stamped(7)).expect("a write");
    mirror.wait_until_quiet();
    // What the replica can't take keeps no session of it for long.
    let mut random = Random::new(1);
    for offset in (MIB..64 * MIB).step_by(MIB as usize) {
        client.write(offset, &noise(&mut random, MIB)).expect("the primary is not concerned");
    }
    drop(client);
    let status = replica.wait_until("it has failed", |status| {
        status.state == VolumeState::Failed && !status.facts.health.is_closed
    });
    assert!(status.action.starts_with("check the disk; it is opened anew"), "{status:?}");
    mirror.primary.kill();
    fs::remove_file(&filler).expect("the filler");
    replica.succeed(&["promote", "data", "--force"]);
    let mut client = Client::connect(&replica.socket()).expect("it serves");
    assert_eq!(client.read(0, BLOCK_BYTES).expect("a read"), stamped(7));
    client.write_durably(0, &stamped(8)).expect("a write");
    drop(client);
    replica.stop();
    mounted.unmount();
}

/// One bad sector on the primary left a whole mebibyte uncopied, and held all copying up for seconds.
#[test]
fn a_replica_has_all_but_the_block_that_its_primary_cannot_read() {
    require!("root", "qemu-storage-daemon");
    const BAD_BLOCK: u64 = 1125;
    let folder = Folder::new();
    let primary = Host::new(&folder, "a");
    let disk = Hanging::with_bad_sector(&folder, "disk", 8 * MIB, BAD_BLOCK * 8);
    primary.succeed(&["create", "data", "--backing", text(disk.file()), "--device", "nbd"]);
    let mut mirror = Mirror { primary, replicas: Vec::new(), folder };
    let content = noise(&mut Random::new(11), 8 * MIB);
    // One at a time: the server takes one write's bytes for another's where several come at once.
    let mut client = mirror.client();
    for (number, part) in content.chunks(64 << 10).enumerate() {
        client.write((number as u64) << 16, part).expect("writes succeed");
    }
    drop(client);
    let replica = Host::new(&mirror.folder, "b");
    let backing = replica.backing();
    replica.join(&mirror.primary, &backing);
    mirror.replicas.push(replica);
    let left = mirror.wait_for_peer("b", "all that can be read is copied", |peer| {
        peer.out_of_sync_bytes == Some(BLOCK_BYTES) && peer.error.is_some()
    });
    assert_ne!(left.state, Some(PeerState::InSync));
    let place = BAD_BLOCK * BLOCK_BYTES;
    let words =
        format!("4K can't be read here and so can't be copied (bytes {place} to {})", place + BLOCK_BYTES);
    assert!(left.error.as_ref().is_some_and(|error| error.starts_with(&words)), "{left:?}");
    let copied = fs::read(&backing).expect("the replica's image");
    let differs = |block: &u64| {
        let range = (block * BLOCK_BYTES) as usize..((block + 1) * BLOCK_BYTES) as usize;
        copied[range.clone()] != content[range]
    };
    let different: Vec<u64> = (0..8 * MIB / BLOCK_BYTES).filter(differs).collect();
    assert_eq!(different, [BAD_BLOCK]);
    mirror.primary.stop();
}
