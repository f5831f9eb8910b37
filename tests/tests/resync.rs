//! Copying what a replica lacks, no more than that, and finding what it should not lack.

use blockmirror_agent::control::api::{Comparison, Connection, Difference, PeerStatus, VolumeState};
use blockmirror_tests::harness::random::Random;
use blockmirror_tests::machines::content::{BLOCK_BYTES, noise};
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::nbd::Client;
use blockmirror_tests::machines::programs::text;
use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

const MIB: u64 = 1 << 20;

/// Writes this many distinct blocks at random places, and flushes.
fn scatter(client: &mut Client, random: &mut Random, volume_bytes: u64, count: usize) {
    let mut written = BTreeSet::new();
    while written.len() < count {
        let block = random.below(volume_bytes / BLOCK_BYTES);
        if written.insert(block) {
            client.write(block * BLOCK_BYTES, &noise(random, BLOCK_BYTES)).expect("a write");
        }
    }
    client.flush().expect("a flush");
}

#[test]
fn after_a_cut_hardly_more_than_the_dirty_blocks_is_sent() {
    const BLOCKS: usize = 2000;
    let mirror = Mirror::new(256 * MIB, "nbd", &["b"]);
    let mut random = Random::new(1);
    let mut client = mirror.client();
    fill(&mut client, &mut random, 256 * MIB);
    mirror.assert_identical();

    // A busy host loses datagrams, which are sent again. What the agent sends too much it sends each time.
    let dirty_bytes = BLOCKS as u64 * BLOCK_BYTES;
    let mut tries = (0..3).map(|_| {
        mirror.replica().link().cut();
        mirror.wait_until_lost("b");
        scatter(&mut client, &mut random, 256 * MIB, BLOCKS);
        assert_eq!(
            mirror.peer("b").out_of_sync_bytes,
            Some(dirty_bytes),
            "each block is marked, and no other"
        );
        let before = mirror.replica().link().bytes_to_host();
        mirror.replica().link().mend();
        mirror.assert_identical();
        let sent = mirror.replica().link().bytes_to_host() - before;
        println!("{sent} bytes of UDP payload for {dirty_bytes} bytes that were dirty");
        assert!(sent >= dirty_bytes, "noise can't be sent in fewer bytes");
        sent
    });
    assert!(tries.any(|sent| sent * 10 <= dirty_bytes * 11), "more was sent than that, each time");
}

/// Content of which no two blocks are the same, and which says everything four times.
fn wordy(random: &mut Random, length: u64) -> Vec<u8> {
    noise(random, length / 4).chunks(64).flat_map(|said| said.repeat(4)).collect()
}

#[test]
fn over_a_long_link_what_shrinks_is_packed() {
    let mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    let mut random = Random::new(11);
    let mut client = mirror.client();
    mirror.wait_until_in_sync();
    // No compressor is slower than what may be on its way in so long a time.
    mirror.replica().link().delay(100);
    for (compression, offset) in [("lz4", 0), ("zstd", 32 * MIB)] {
        let said = mirror.primary.succeed(&["tune", "data", "b", "--compression", compression]);
        assert!(said.contains(&format!("compression {compression}")), "{said}");
        mirror.replica().link().cut();
        mirror.wait_until_lost("b");
        client.write(offset, &wordy(&mut random, 16 * MIB)).expect("a write");
        client.flush().expect("a flush");
        let before = mirror.replica().link().bytes_to_host();
        mirror.replica().link().mend();
        mirror.wait_until_in_sync();
        client.write(offset + 16 * MIB, &wordy(&mut random, 8 * MIB)).expect("a write");
        mirror.assert_identical();
        let sent = mirror.replica().link().bytes_to_host() - before;
        println!("{compression}: {sent} bytes of UDP payload for {} bytes of content", 24 * MIB);
        assert!(sent < 16 * MIB, "{compression}: {sent} bytes were sent");
    }
}

#[test]
fn a_limit_holds_a_resync_back_until_it_is_lifted() {
    let mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    let mut random = Random::new(12);
    let mut client = mirror.client();
    mirror.wait_until_in_sync();
    mirror.primary.refuse(&["tune", "data", "b", "--resync-limit", "1K"], 5, &["at least 64K", "pause"]);
    mirror.primary.refuse(&["tune", "data", "c", "--resync-limit", "1M"], 4, &["no peer \"c\""]);
    mirror.primary.succeed(&["tune", "data", "b", "--resync-limit", "64K"]);
    assert_eq!(mirror.peer("b").resync_limit_bytes, Some(64 << 10));
    mirror.replica().link().cut();
    mirror.wait_until_lost("b");
    fill(&mut client, &mut random, 64 * MIB);
    mirror.replica().link().mend();
    let some_is_done = |peer: &PeerStatus| peer.resync.as_ref().is_some_and(|resync| resync.done_bytes > 0);
    let peer = mirror.wait_for_peer("b", "the resync moves", some_is_done);
    let done = peer.resync.expect("it is under way").done_bytes;
    assert!(done < 32 * MIB, "{done} bytes in a moment, where 64K a second are allowed");
    mirror.primary.succeed(&["tune", "data", "b", "--resync-limit", "none"]);
    assert_eq!(mirror.peer("b").resync_limit_bytes, None);
    mirror.assert_identical();
}

/// Fills the whole volume with noise, and flushes.
fn fill(client: &mut Client, random: &mut Random, volume_bytes: u64) {
    for offset in (0..volume_bytes).step_by(MIB as usize) {
        client.write(offset, &noise(random, MIB)).expect("a write");
    }
    client.flush().expect("a flush");
}

#[test]
fn after_a_crash_digests_tell_what_of_the_active_extents_differs() {
    let mut mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    let mut random = Random::new(5);
    let mut client = mirror.client();
    fill(&mut client, &mut random, 64 * MIB);
    mirror.assert_identical();
    scatter(&mut client, &mut random, 64 * MIB, 32);
    mirror.wait_until_quiet();
    mirror.replica().link().cut();
    client.write_durably(9 * MIB, &noise(&mut random, BLOCK_BYTES)).expect("a write");
    mirror.primary.kill();
    mirror.primary.start();
    let marked = mirror.peer("b").out_of_sync_bytes.expect("the volume is served");
    assert!(marked >= 32 * MIB, "whole extents were active at the crash, not {marked} bytes");
    let before = mirror.replica().link().bytes_to_host();
    mirror.replica().link().mend();
    mirror.assert_identical();
    let sent = mirror.replica().link().bytes_to_host() - before;
    println!("{sent} bytes of UDP payload for {marked} bytes that might differ");
    assert!(sent < 2 * MIB, "one block differs, and {sent} bytes were sent");
}

#[test]
fn a_host_that_joins_with_a_good_copy_is_sent_only_what_differs() {
    let mut mirror = Mirror::new(64 * MIB, "nbd", &[]);
    let mut random = Random::new(6);
    fill(&mut mirror.client(), &mut random, 64 * MIB);
    let replica = Host::new(&mirror.folder, "b");
    std::fs::copy(mirror.primary.backing(), replica.backing()).expect("a copy");
    flip(&replica.backing(), 50 * MIB + 123);
    let token = mirror.primary.invite();
    replica.succeed(&["join", &token, "--backing", text(&replica.backing()), "--overwrite"]);
    mirror.replicas.push(replica);
    mirror.assert_identical();
    let sent = mirror.replica().link().bytes_to_host();
    println!("{sent} bytes of UDP payload to a copy that differs in one");
    assert!(sent < 2 * MIB, "one block differs, and {sent} bytes were sent");
}

#[test]
fn a_paused_replica_misses_what_is_written_until_it_is_resumed() {
    let mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    let mut random = Random::new(2);
    let mut client = mirror.client();
    assert_eq!(mirror.primary.succeed(&["pause", "data", "b"]), "paused data with b\n");
    let paused =
        mirror.wait_for_peer("b", "the replica is paused", |peer| peer.connection == Connection::Paused);
    assert_eq!(paused.out_of_sync_bytes, Some(0));
    scatter(&mut client, &mut random, 64 * MIB, 100);
    assert_eq!(mirror.peer("b").out_of_sync_bytes, Some(100 * BLOCK_BYTES));
    let status = mirror.primary.status();
    assert_eq!((status.state, status.action.as_str()), (VolumeState::Degraded, "blockmirror resume data b"));
    mirror.primary.refuse(&["wait", "data", "--for", "in-sync", "--timeout", "1s"], 6, &["paused", "400K"]);
    mirror.primary.refuse(&["compare", "data", "b"], 5, &["b is paused: blockmirror resume data b"]);
    mirror.primary.succeed(&["resume", "data", "b"]);
    mirror.assert_identical();
    assert_eq!(mirror.primary.status().state, VolumeState::Healthy);
}

#[test]
fn a_pause_on_the_replica_keeps_the_primary_away_over_restarts() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    mirror.replica().succeed(&["pause", "data", "a"]);
    mirror.wait_for_peer("b", "the primary is told why", |peer| peer.connection == Connection::Paused);
    mirror.replica_mut().stop();
    mirror.replica_mut().start();
    mirror.client().write_durably(0, &[7; 4096]).expect("a write");
    let status = mirror.replica().status();
    assert_eq!(status.facts.peers[0].connection, Connection::Paused);
    assert_eq!(status.action, "blockmirror resume data a");
    mirror.replica().succeed(&["resume", "data", "a"]);
    mirror.assert_identical();
}

/// Flips a bit of a file behind everybody's back, as a disk does that rots: without a cached page in between, and with the
/// times of before, by which the agent would notice it.
fn flip(path: &Path, offset: u64) {
    #[repr(align(4096))]
    struct Block([u8; 4096]);
    let file =
        File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).expect("a backing");
    let start = offset / BLOCK_BYTES * BLOCK_BYTES;
    let mut block = Box::new(Block([0; 4096]));
    file.read_exact_at(&mut block.0, start).expect("a block");
    block.0[(offset - start) as usize] ^= 1;
    let modified = file.metadata().and_then(|status| status.modified()).expect("a time");
    file.write_all_at(&block.0, start).expect("a block");
    file.set_modified(modified).expect("the time of before");
}

fn compare(mirror: &Mirror, code: i32) -> Comparison {
    let said = mirror.primary.tool(&["compare", "data", "b", "--json"]);
    assert_eq!(said.code, code, "{said:?}");
    serde_json::from_str(&said.output).expect("the answer is well formed")
}

/// The first one went on when it was interrupted, and the second was told that the replica was not in sync.
#[test]
fn a_compare_has_its_turn_after_one_that_was_interrupted() {
    let mut mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    mirror.wait_until_quiet();
    mirror.replica_mut().stall();
    let interrupted = mirror.primary.begin(&["compare", "data", "b"]);
    mirror.wait_for_peer("b", "it is being compared", |peer| peer.compare.is_some());
    let primary = &mirror.primary;
    let said = std::thread::scope(|scope| {
        let waiting = scope.spawn(|| primary.tool(&["compare", "data", "b", "--json"]));
        drop(interrupted);
        mirror.replicas[0].go_on();
        waiting.join().expect("it does not panic")
    });
    let comparison: Comparison = serde_json::from_str(&said.output).unwrap_or_else(|_| panic!("{said:?}"));
    assert_eq!((said.code, comparison.compared_bytes, comparison.different_bytes), (0, 64 * MIB, 0));
    mirror.replica_mut().stop();
    mirror.wait_until_lost("b");
    mirror.primary.refuse(&["compare", "data", "b"], 5, &["b is not in sync, so nothing can be compared"]);
}

#[test]
fn compare_finds_a_flipped_byte_and_has_it_repaired() {
    let mut mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    let mut random = Random::new(3);
    scatter(&mut mirror.client(), &mut random, 64 * MIB, 500);
    mirror.assert_identical();
    let clean = compare(&mirror, 0);
    assert_eq!((clean.compared_bytes, clean.different_bytes), (64 * MIB, 0));

    let flipped = 33 * MIB + 5 * BLOCK_BYTES + 77;
    // It must not look in between: the times of before are back a moment later.
    mirror.replica_mut().stall();
    flip(&mirror.replica().backing(), flipped);
    mirror.replica_mut().go_on();
    let found = compare(&mirror, 1);
    let holds = |range: &Difference| (range.offset..range.offset + range.length).contains(&flipped);
    assert!(matches!(&found.ranges[..], [range] if holds(range)), "{found:?}");
    assert_eq!(found.different_bytes, found.ranges[0].length);
    assert!(found.different_bytes <= 4 * MIB, "{found:?}");
    assert_eq!(found.action, "blockmirror wait data --for in-sync");
    mirror.assert_identical();
    assert_eq!(compare(&mirror, 0).different_bytes, 0, "what was found is repaired");
}

#[test]
fn agents_that_were_stopped_in_order_have_nothing_to_copy() {
    let mut mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    let mut random = Random::new(4);
    scatter(&mut mirror.client(), &mut random, 64 * MIB, 300);
    mirror.wait_until_quiet();
    mirror.primary.stop();
    mirror.replica_mut().stop();
    mirror.primary.start();
    let alone = mirror.primary.status().facts.peers;
    assert_eq!(alone[0].out_of_sync_bytes, Some(0), "{alone:?}");
    let before = mirror.replica().link().bytes_to_host();
    mirror.replica_mut().start();
    mirror.assert_identical();
    let sent = mirror.replica().link().bytes_to_host() - before;
    assert!(sent < MIB, "greetings alone are sent, not {sent} bytes");
}
