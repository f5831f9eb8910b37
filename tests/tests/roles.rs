//! Who may write: promotions, demotions, switches and superseded primaries, with real agents.

use blockmirror_agent::config::{ConfigFolder, Mode, OnReplicaLoss, Role};
use blockmirror_agent::control::api::{Connection, PeerState, PeerStatus, Promotion, Switch, VolumeState};
use blockmirror_agent::quantity::Size;
use blockmirror_protocol::disk::activity_log::{self, Recovered};
use blockmirror_tests::harness::random::Random;
use blockmirror_tests::machines::content::{BLOCK_BYTES, first_difference, noise, stamped};
use blockmirror_tests::machines::folder::Folder;
use blockmirror_tests::machines::host::{Host, Running};
use blockmirror_tests::machines::mirror::{Mirror, assert_identical};
use blockmirror_tests::machines::nbd::Client;
use blockmirror_tests::machines::patience::until;
use blockmirror_tests::machines::programs::{succeed, text};
use blockmirror_tests::require;
use std::fs::{self, File};
use std::sync::mpsc::channel;

const MIB: u64 = 1 << 20;

/// Writes noise to this many blocks, and flushes. Gives what was written.
fn scatter(client: &mut Client, random: &mut Random, blocks: u64, count: usize) -> Vec<(u64, Vec<u8>)> {
    let mut written = Vec::new();
    for _ in 0..count {
        let (offset, data) = (random.below(blocks) * BLOCK_BYTES, noise(random, BLOCK_BYTES));
        client.write(offset, &data).expect("a write");
        written.retain(|(other, _)| *other != offset);
        written.push((offset, data));
    }
    client.flush().expect("a flush");
    written
}

fn assert_holds(client: &mut Client, written: &[(u64, Vec<u8>)]) {
    for (offset, data) in written {
        assert!(client.read(*offset, BLOCK_BYTES).expect("a read") == *data, "the block at {offset} is lost");
    }
}

/// A client of whoever serves the volume.
fn client_of(host: &Host) -> Client {
    until("the volume is served", || Client::connect(&host.socket()).map_err(|error| error.to_string()))
}

/// Waits until a primary is in sync with all its replicas, and nothing is on its way.
fn wait_until_in_sync(primary: &Host) {
    primary.wait_until("all replicas are in sync", |status| {
        let peers = &status.facts.peers;
        status.state == VolumeState::Healthy
            && peers.iter().all(|peer| (peer.out_of_sync_bytes, peer.lag_bytes) == (Some(0), Some(0)))
    });
}

fn set_sync(mirror: &Mirror) {
    let said = mirror.primary.succeed(&["mode", "data", "b", "sync"]);
    assert_eq!(said, "data is mirrored to b in the mode sync\n");
    mirror.wait_for_peer("b", "the replica counts again", |peer| {
        peer.mode == Mode::Sync && peer.state == Some(PeerState::InSync)
    });
    // The replica records its mode with the commit of the session that the change began.
    mirror.wait_until_quiet();
}

#[test]
fn a_replica_takes_the_place_of_a_killed_primary_which_comes_back_as_its_replica() {
    let mut mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    set_sync(&mirror);
    let mut random = Random::new(1);
    for offset in (0..64 * MIB).step_by(MIB as usize) {
        mirror.client().write(offset, &noise(&mut random, MIB)).expect("a write");
    }
    let flushed = scatter(&mut mirror.client(), &mut random, 64 * MIB / BLOCK_BYTES, 200);
    mirror.primary.kill();

    let said = mirror.replica().succeed(&["promote", "data", "--json"]);
    let promotion: Promotion = serde_json::from_str(&said).expect("the answer is well formed");
    assert_eq!(promotion.unanswered, ["a"]);
    assert_eq!((promotion.volume.facts.role, promotion.rolled_back_to), (Role::Primary, None));
    let mut client = client_of(mirror.replica());
    assert_holds(&mut client, &flushed);
    scatter(&mut client, &mut random, 64 * MIB / BLOCK_BYTES, 100);

    let before = mirror.primary.link().bytes_to_host();
    mirror.primary.start();
    assert_identical(mirror.replica(), &mirror.primary);
    let status = mirror.primary.wait_until("it follows", |status| status.state == VolumeState::Following);
    assert_eq!(status.facts.role, Role::Replica);
    // What it may not have delivered is kept: its log says what was active when it was killed.
    assert!(status.verdict.starts_with("following b; consistent; "), "{status:?}");
    assert!(status.verdict.contains("nobody here has agreed that b took over"), "{status:?}");
    assert!(mirror.primary.log().contains("this host came back with at most"), "{}", mirror.primary.log());
    // Whatever was active at the crash may differ: extents of 4 MiB in 64 MiB, and all were. Digests tell that little does.
    let sent = mirror.primary.link().bytes_to_host() - before;
    assert!(sent <= 4 * MIB, "{sent} bytes were sent");

    // The new order outlives restarts of both.
    drop(client);
    mirror.primary.stop();
    mirror.replica_mut().stop();
    mirror.replica_mut().start();
    mirror.primary.start();
    assert_identical(mirror.replica(), &mirror.primary);
    assert_eq!(mirror.replica().status().facts.succession.fence, Some(2));
}

#[test]
fn a_mode_goes_with_the_volume_and_is_set_on_the_primary() {
    let mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    set_sync(&mirror);
    let (a, b) = (&mirror.primary, mirror.replica());
    a.succeed(&["switch", "data", "--to", "b"]);
    b.wait_until("a is mirrored to as b was", |status| {
        let peer = &status.facts.peers[0];
        (peer.mode, peer.state) == (Mode::Sync, Some(PeerState::InSync))
    });
    a.refuse(&["mode", "data", "b", "async"], 5, &["on b: blockmirror mode data a async"]);
    b.refuse(&["mode", "data", "c", "sync"], 4, &["no peer \"c\""]);
    b.succeed(&["mode", "data", "a", "async"]);
}

#[test]
fn a_replica_that_knows_that_it_is_behind_is_not_promoted_as_one_in_sync() {
    let mut mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    set_sync(&mirror);
    mirror.replica_mut().stop();
    scatter(&mut mirror.client(), &mut Random::new(1), 64 * MIB / BLOCK_BYTES, 10);
    // It comes back, hears of what it lacks, and can take none of it.
    mirror.replica().configure(|volume| volume.pre_images = Size(0));
    mirror.replica_mut().start();
    mirror.replica().wait_until("it has no room", |status| status.facts.succession.is_full);
    mirror.primary.kill();
    let b = mirror.replica();
    b.wait_until("the loss is noticed", |status| status.facts.peers[0].connection != Connection::Connected);
    b.refuse(&["promote", "data"], 5, &["was not in sync in the mode sync", "--force"]);
}

#[test]
fn a_copy_that_its_primarys_operator_paused_is_not_promoted_as_one_in_sync() {
    let mut mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    set_sync(&mirror);
    mirror.primary.succeed(&["pause", "data", "b"]);
    let b = mirror.replica();
    b.wait_until("the pause is noticed", |status| status.facts.peers[0].connection != Connection::Connected);
    // Answered, and nowhere but here.
    scatter(&mut mirror.client(), &mut Random::new(1), 64 * MIB / BLOCK_BYTES, 10);
    mirror.primary.kill();
    let b = mirror.replica();
    b.refuse(&["promote", "data"], 5, &["was not in sync in the mode sync", "--force"]);
}

#[test]
fn a_primary_that_was_stopped_in_order_comes_back_by_map() {
    let mut mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    set_sync(&mirror);
    let mut random = Random::new(2);
    for offset in (0..64 * MIB).step_by(MIB as usize) {
        mirror.client().write(offset, &noise(&mut random, MIB)).expect("a write");
    }
    mirror.client().flush().expect("a flush");
    mirror.wait_until_quiet();
    mirror.primary.stop();
    mirror.replica().succeed(&["promote", "data"]);
    scatter(&mut client_of(mirror.replica()), &mut random, 64 * MIB / BLOCK_BYTES, 100);
    let before = mirror.primary.link().bytes_to_host();
    mirror.primary.start();
    assert_identical(mirror.replica(), &mirror.primary);
    let sent = mirror.primary.link().bytes_to_host() - before;
    assert!(sent <= 2 * MIB, "{sent} bytes were sent for 100 blocks");
}

#[test]
fn a_switch_there_and_back_keeps_a_file_system_whole() {
    require!("root", "mkfs.ext4", "fsck.ext4", "losetup");
    let mirror = Mirror::new(64 * MIB, "nbd,loop", &["b"]);
    let (a, b) = (&mirror.primary, mirror.replica());
    succeed("mkfs.ext4", &["-q", text(&a.device())]);
    let mounted = mirror.folder.mount(&a.device(), "mounted");
    fs::write(mounted.path().join("first"), "written on a").expect("a file");
    a.refuse(&["switch", "data", "--to", "b"], 5, &["in use", "mounted"]);
    mounted.unmount();

    wait_until_in_sync(a);
    let said = a.succeed(&["switch", "data", "--to", "b", "--json"]);
    let switched: Switch = serde_json::from_str(&said).expect("the answer is well formed");
    println!("nobody could write for {} ms", switched.milliseconds_without_writes);
    assert!(!a.device().exists(), "a demoted primary serves no device");
    let mounted = mirror.folder.mount(&b.device(), "mounted");
    assert_eq!(fs::read_to_string(mounted.path().join("first")).expect("a file"), "written on a");
    fs::write(mounted.path().join("second"), "written on b").expect("a file");
    mounted.unmount();
    assert_identical(b, a);

    let said = b.succeed(&["switch", "data", "--to", "a"]);
    assert!(said.starts_with("a is the primary of data now; nobody could write for "), "{said}");
    succeed("fsck.ext4", &["-f", "-n", text(&a.device())]);
    let mounted = mirror.folder.mount(&a.device(), "mounted");
    assert_eq!(fs::read_to_string(mounted.path().join("second")).expect("a file"), "written on b");
    mounted.unmount();
    assert_identical(a, b);
    assert_eq!(a.status().facts.succession.fence, Some(3));
}

#[test]
fn a_demotion_waits_for_nobody_who_has_the_device_open() {
    let mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    let (a, b) = (&mirror.primary, mirror.replica());
    let mut random = Random::new(3);
    let mut client = mirror.client();
    let written = scatter(&mut client, &mut random, 16 * MIB / BLOCK_BYTES, 50);
    let process = format!("(pid {})", std::process::id());
    a.refuse(&["demote", "data"], 5, &["in use", &process]);
    scatter(&mut client, &mut random, 1, 1);
    drop(client);
    wait_until_in_sync(a);
    let said = until("the client has gone", || {
        let said = a.tool(&["demote", "data"]);
        if said.code == 0 { Ok(said.output) } else { Err(said.error) }
    });
    assert_eq!(
        said,
        "demoted data; nobody is the primary now\n\
         b has everything; to go on there: blockmirror promote data\n"
    );
    b.wait_until("the demotion is told", |status| {
        status.action == "to go on here: blockmirror promote data"
            && status.verdict.contains("this copy has everything")
    });
    assert!(a.status().verdict.contains("this host was demoted"));
    a.refuse(&["demote", "data"], 5, &["a replica of data"]);
    // It was demoted in order, so nothing has to be forced even in the mode async.
    b.succeed(&["promote", "data"]);
    let last: Vec<_> = written.into_iter().filter(|(offset, _)| *offset != 0).collect();
    assert_holds(&mut client_of(b), &last);
    assert_identical(b, a);
}

/// The new host was promoted by hand while the old primary still waited for a third one, and refused to take over; the
/// old one took that for its leave to go on. Neither was superseded by the other.
#[test]
fn a_promotion_by_hand_in_the_middle_of_a_switch_makes_no_second_primary() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b", "c"]);
    scatter(&mut mirror.client(), &mut Random::new(4), 16 * MIB / BLOCK_BYTES, 50);
    mirror.assert_identical();
    let [b, c] = &mut mirror.replicas[..] else { panic!("there are two replicas") };
    c.stall();
    let mut switching = mirror.primary.begin(&["switch", "data", "--to", "b"]);
    b.wait_until("it has everything, or took over already", |status| {
        status.action.contains("blockmirror promote data") || status.facts.role == Role::Primary
    });
    // Refused where the switch was quicker after all.
    b.tool(&["promote", "data"]);
    until("the switch ends", || if switching.has_ended() { Ok(()) } else { Err("it goes on".to_owned()) });
    c.go_on();
    b.wait_until("it is the primary", |status| status.facts.role == Role::Primary);
    mirror.primary.wait_until("it follows", |status| status.state == VolumeState::Following);
    assert_identical(b, &mirror.primary);
    assert_identical(b, c);
}

/// The replica called the demoted host its primary, and advised to promote by force, which would have lost what only that
/// host had.
#[test]
fn a_replica_that_was_away_when_its_primary_was_demoted_names_that_one() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    mirror.replica_mut().stop();
    scatter(&mut mirror.client(), &mut Random::new(4), 16 * MIB / BLOCK_BYTES, 50);
    mirror.primary.succeed(&["demote", "data"]);
    mirror.replica_mut().start();
    mirror.replica().wait_until("it names the best copy", |status| {
        status.verdict.contains("a was demoted") && status.action == "on a: blockmirror promote data"
    });
    mirror.replica().refuse(
        &["promote", "data"],
        5,
        &["a was the primary, was demoted", "on a: blockmirror promote data"],
    );
    mirror.primary.succeed(&["promote", "data"]);
    mirror.assert_identical();
}

/// A plain `promote` took the replica's word that it had been in sync: what its primary had answered without it was gone.
#[test]
fn a_replica_in_the_mode_sync_is_not_promoted_once_its_primary_answered_without_it() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    mirror.primary.succeed(&["mode", "data", "b", "sync"]);
    mirror.wait_until_in_sync();
    mirror.replica_mut().stop();
    mirror.client().write_durably(0, &[7; 4096]).expect("a write without the replica");
    mirror.primary.kill();
    mirror.replica_mut().start();
    mirror.replica().refuse(
        &["promote", "data"],
        5,
        &["may have gone on alone", "the last write that it has"],
    );
    mirror.replica().succeed(&["promote", "data", "--force"]);
}

/// A process that was stopped answered flushes after another host had been promoted.
#[test]
fn a_primary_that_was_frozen_answers_nothing_when_another_one_leads() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    mirror.primary.succeed(&["mode", "data", "b", "sync"]);
    mirror.wait_until_in_sync();
    let mut client = mirror.client();
    client.write_durably(0, &[7; 4096]).expect("a write in sync");
    mirror.primary.stall();
    let writer = std::thread::spawn(move || client.write_durably(4096, &[8; 4096]).is_ok());
    mirror.replica().succeed(&["promote", "data"]);
    mirror.primary.go_on();
    assert!(!writer.join().expect("the writer ends"), "it was answered by a primary that had been replaced");
    mirror
        .primary
        .wait_until("it follows, and nothing is split", |status| status.state == VolumeState::Following);
    mirror.replica().wait_until("both are in sync", |status| status.state == VolumeState::Healthy);
    assert_identical(mirror.replica(), &mirror.primary);
}

/// The same where writes wait for replicas: the primary answered nothing that the promoted host lacks, and yet a split brain was
/// reported, and an operator asked to decide.
#[test]
fn a_primary_that_was_frozen_while_writes_wait_for_replicas_is_no_side_of_a_split() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    mirror.primary.succeed(&["mode", "data", "b", "sync"]);
    mirror.primary.stop();
    mirror.primary.configure(|volume| {
        volume.on_replica_loss = OnReplicaLoss::Block;
        volume.block_seconds = 3600;
    });
    mirror.primary.start();
    mirror.wait_until_in_sync();
    let mut client = mirror.client();
    client.write_durably(0, &[7; 4096]).expect("a write in sync");
    // Writes are under way all the time, whenever it is that the process stops.
    let (begun, writes) = channel();
    let writer = std::thread::spawn(move || {
        let mut answered = |number: u64| client.write_durably(number % 2000 * 4096, &[8; 4096]).is_ok();
        (1..).take_while(|number| answered(*number) && begun.send(*number).is_ok()).last()
    });
    for _ in 0..20 {
        writes.recv().expect("it writes");
    }
    mirror.primary.stall();
    let b = mirror.replica();
    b.succeed(&["promote", "data"]);
    let mut on_b = Client::connect(&b.socket()).expect("b serves the volume");
    on_b.write_durably(8 * MIB, &[9; 4096]).expect("a write on the new primary");
    mirror.primary.go_on();
    let b = mirror.replica();
    let last = writer.join().expect("the writer ends").expect("some were answered");
    mirror.primary.wait_until("it follows by itself", |status| {
        assert_ne!(status.state, VolumeState::SplitBrain, "{status:?}");
        status.state == VolumeState::Following
    });
    b.wait_until("both are in sync", |status| {
        assert_ne!(status.state, VolumeState::SplitBrain, "{status:?}");
        status.state == VolumeState::Healthy
    });
    // All that was answered is there.
    for number in 1..=last {
        let there = on_b.read(number % 2000 * 4096, 4096).expect("a read");
        assert_eq!(there, [8; 4096], "write {number} of {last}");
    }
    assert_identical(mirror.replica(), &mirror.primary);
}

#[test]
fn a_promotion_that_could_lose_or_split_something_is_refused_with_the_reason() {
    let folder = Folder::new();
    let primary = Host::new(&folder, "a");
    primary.create(64 * MIB, "nbd");
    let mut mirror = Mirror { primary, replicas: Vec::new(), folder };
    // A replica that was never in sync.
    let mut random = Random::new(4);
    let replica = Host::prepare(&mirror.folder, "b");
    mirror.replicas.push(replica);
    mirror.replicas[0].start();
    mirror.primary.link().cut();
    mirror.primary.link().mend();
    let token = mirror.primary.invite();
    mirror.replicas[0].link().cut();
    mirror.replicas[0].succeed(&["join", &token, "--backing", text(&mirror.replicas[0].backing())]);
    mirror.replica().refuse(&["promote", "data"], 5, &["this copy is empty"]);
    mirror.replica().refuse(&["promote", "data", "--force"], 5, &["this copy is empty"]);
    mirror.replica().link().mend();
    wait_until_in_sync(&mirror.primary);

    let (a, b) = (&mirror.primary, mirror.replica());
    a.refuse(&["promote", "data"], 5, &["a is the primary of data already"]);
    b.refuse(&["promote", "data"], 5, &["on a: blockmirror switch data --to b"]);
    b.refuse(&["demote", "data"], 5, &["run this on a"]);
    // The link is paused, but the primary answers.
    a.succeed(&["pause", "data", "b"]);
    b.wait_until("the link is gone", |status| {
        status.facts.peers.iter().all(|peer| peer.connection != Connection::Connected)
    });
    b.refuse(&["promote", "data"], 5, &["on a: blockmirror switch data --to b"]);
    a.refuse(&["switch", "data", "--to", "b"], 5, &["b is paused", "blockmirror resume data b"]);
    a.succeed(&["resume", "data", "b"]);
    scatter(&mut mirror.client(), &mut random, 64 * MIB / BLOCK_BYTES, 50);
    wait_until_in_sync(a);
    mirror.primary.kill();
    let b = mirror.replica();
    b.wait_until("the loss is noticed", |status| status.state == VolumeState::Waiting);
    b.refuse(&["promote", "data"], 5, &["not in sync in the mode sync", "--force"]);
    b.succeed(&["promote", "data", "--force"]);
    assert_eq!(b.status().facts.role, Role::Primary);
}

#[test]
fn a_promotion_waits_for_no_answer_of_a_primary_that_fell_silent() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b", "c", "d", "e"]);
    wait_until_in_sync(&mirror.primary);
    mirror.primary.stall();
    // Whether a session's end is told to the primary, which could take until the connection is given up, was left to chance
    // once; so there are four, and each is promoted while its connection to the primary still seems to be there.
    std::thread::scope(|scope| {
        for replica in &mirror.replicas {
            scope.spawn(|| replica.succeed(&["promote", "data", "--force"]));
        }
    });
    mirror.primary.kill();
}

#[test]
fn a_primary_that_wrote_alone_after_another_was_promoted_is_kept_apart() {
    let mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    let (a, b) = (&mirror.primary, mirror.replica());
    let mut random = Random::new(5);
    let mut client = mirror.client();
    scatter(&mut client, &mut random, 16 * MIB / BLOCK_BYTES, 50);
    wait_until_in_sync(a);
    for host in [a, b] {
        host.link().cut();
    }
    mirror.wait_until_lost("b");
    scatter(&mut client, &mut random, 16 * MIB / BLOCK_BYTES, 10);
    b.wait_until("the loss is noticed", |status| status.state == VolumeState::Waiting);
    b.refuse(&["promote", "data"], 5, &["--force"]);
    b.succeed(&["promote", "data", "--force"]);
    scatter(&mut client_of(b), &mut random, 16 * MIB / BLOCK_BYTES, 10);
    for host in [a, b] {
        host.link().mend();
    }
    let process = format!("(pid {})", std::process::id());
    let status = a.wait_until("it is superseded", |status| {
        status.state == VolumeState::Superseded && !status.facts.succession.openers.is_empty()
    });
    assert!(status.verdict.contains("b was promoted") && status.verdict.contains(&process), "{status:?}");
    assert!(client.write(0, &[1; 4096]).is_err(), "a superseded primary takes no writes");
    drop(client);
    let resolve = "blockmirror resolve data --keep b";
    let status = a.wait_until("the split is told", |status| status.state == VolumeState::SplitBrain);
    assert!(status.facts.role == Role::Replica && status.action.contains(resolve), "{status:?}");
    let status = b.wait_until("the split is told", |status| status.state == VolumeState::SplitBrain);
    assert!(status.action.contains(resolve), "{status:?}");
    // The new primary goes on.
    scatter(&mut client_of(b), &mut random, 16 * MIB / BLOCK_BYTES, 10);
}

#[test]
fn a_replica_in_the_middle_of_a_resync_is_rolled_back_when_it_is_promoted() {
    let mut mirror = Mirror::new(256 * MIB, "nbd", &["b"]);
    let mut random = Random::new(6);
    let mut client = mirror.client();
    for offset in (0..256 * MIB).step_by(MIB as usize) {
        client.write(offset, &noise(&mut random, MIB)).expect("a write");
    }
    client.flush().expect("a flush");
    mirror.assert_identical();
    let before = mirror.folder.join("before.img");
    fs::copy(mirror.replica().backing(), &before).expect("a copy");

    mirror.replica().link().cut();
    mirror.wait_until_lost("b");
    for offset in (0..256 * MIB).step_by(MIB as usize) {
        client.write(offset, &noise(&mut random, MIB)).expect("a write");
    }
    client.flush().expect("a flush");
    drop(client);
    mirror.replica().link().mend();
    let status = mirror.replica().wait_until("it is overwritten", |status| {
        status.facts.succession.rollback.is_some_and(|point| point.bytes > MIB)
    });
    mirror.primary.kill();
    assert!(status.verdict.contains("can be rolled back to"), "{status:?}");

    let b = mirror.replica();
    b.refuse(&["promote", "data"], 5, &["in the middle of a resync", "--force rolls it back to"]);
    let said = b.succeed(&["promote", "data", "--force", "--json"]);
    let promotion: Promotion = serde_json::from_str(&said).expect("the answer is well formed");
    assert!(promotion.rolled_back_to.is_some());
    assert_eq!(first_difference(&b.backing(), &before), None, "all is as it was before the resync");
    assert!(
        !fs::read_dir(b.state("")).expect("the state folder").any(|entry| {
            entry.expect("an entry").file_name().to_string_lossy().starts_with("pre-images")
        })
    );
    // What only the old primary has is not overwritten by itself.
    scatter(&mut client_of(b), &mut random, 100, 10);
    mirror.primary.start();
    mirror.primary.wait_until("the split is told", |status| status.state == VolumeState::SplitBrain);
}

#[test]
fn a_third_host_follows_whoever_is_promoted() {
    let mut mirror = Mirror::new(32 * MIB, "nbd", &["b", "c"]);
    let mut random = Random::new(7);
    scatter(&mut mirror.client(), &mut random, 32 * MIB / BLOCK_BYTES, 200);
    mirror.wait_until_quiet();
    let has_two_peers = |host: &Host| {
        host.wait_until("it knows both others", |status| status.facts.peers.len() == 2);
    };
    mirror.replicas.iter().for_each(has_two_peers);
    mirror.primary.kill();
    let [b, c] = &mirror.replicas[..] else { panic!("there are two replicas") };
    for host in [b, c] {
        host.wait_until("the loss is noticed", |status| status.state == VolumeState::Waiting);
    }
    b.succeed(&["promote", "data", "--force"]);
    scatter(&mut client_of(b), &mut random, 32 * MIB / BLOCK_BYTES, 100);
    c.wait_until("it follows the new primary", |status| {
        status.verdict.starts_with("following b; consistent; nobody here has agreed that b took over")
    });
    c.refuse(&["promote", "data"], 5, &["on b: blockmirror switch data --to c"]);
    mirror.primary.start();
    let [b, c] = &mirror.replicas[..] else { panic!("there are two replicas") };
    assert_identical(b, &mirror.primary);
    assert_identical(b, c);
    c.succeed(&["forget", "data"]);
    b.succeed(&["switch", "data", "--to", "c"]);
    scatter(&mut client_of(c), &mut random, 32 * MIB / BLOCK_BYTES, 100);
    assert_identical(c, b);
    assert_identical(c, &mirror.primary);
    mirror.primary.wait_until("it follows the new primary", |status| {
        status.verdict.starts_with("following c; consistent")
    });
    // The configuration says on each host who is the primary.
    for (host, primary) in [(&mirror.primary, Some("c")), (b, Some("c")), (c, None)] {
        host.succeed(&["config", "check"]);
        let folder = ConfigFolder::new(host.path("config"));
        until("the configuration says so", || {
            let volume = folder.load_volume(&"data".parse().expect("a name")).expect("the file is right");
            let found = volume.peers.iter().find(|peer| peer.role == Role::Primary);
            let found = found.map(|peer| peer.name.to_string());
            if found.as_deref() == primary { Ok(()) } else { Err(format!("{volume:?}")) }
        });
    }
}

/// Has b ask the others whether it may be promoted, which takes a while, since c is stalled, and is refused in the end.
fn begin_promotion_that_is_refused(mirror: &mut Mirror) -> Running {
    mirror.replicas[1].stall();
    let b = mirror.replica();
    let asking = b.begin(&["promote", "data"]);
    b.wait_until("it asks the others", |status| status.facts.succession.change.is_some());
    asking
}

/// What the primary begins to send while the replica asks the others was dropped, and the session went on without it.
#[test]
fn a_replica_takes_what_comes_while_its_promotion_is_refused() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b", "c"]);
    let mut random = Random::new(8);
    scatter(&mut mirror.client(), &mut random, 16 * MIB / BLOCK_BYTES, 50);
    mirror.wait_until_quiet();
    // In its new session nothing is streamed yet: of no extent it may lack anything.
    until("no extent is active", || {
        let file = fs::read(mirror.replica().state(activity_log::FILE_NAME)).expect("a log");
        match activity_log::recover(&file) {
            Ok(Recovered::Active { extents, .. }) if extents.is_empty() => Ok(()),
            other => Err(format!("{other:?}")),
        }
    });
    mirror.replica_mut().stop();
    mirror.replica_mut().start();
    mirror.wait_until_quiet();
    let asking = begin_promotion_that_is_refused(&mut mirror);
    scatter(&mut mirror.client(), &mut random, 16 * MIB / BLOCK_BYTES, 50);
    mirror.replica().wait_until("it is refused", |status| status.facts.succession.change.is_none());
    drop(asking);
    mirror.replicas[1].go_on();
    mirror.assert_identical();
    let log = mirror.primary.log();
    assert!(!log.contains("does not read"), "the session ended: {log}");
}

/// What the operator changed in that time was saved, and nothing went by it.
#[test]
fn a_pause_while_a_promotion_is_refused_is_a_pause() {
    let mut mirror = Mirror::new(8 * MIB, "nbd", &["b", "c"]);
    mirror.wait_until_quiet();
    let asking = begin_promotion_that_is_refused(&mut mirror);
    mirror.replica().succeed(&["pause", "data", "a"]);
    mirror.replica().wait_until("it is refused", |status| status.facts.succession.change.is_none());
    drop(asking);
    mirror.wait_for_peer("b", "it is paused there", |peer| peer.paused_there);
    mirror.replicas[1].go_on();
}

/// The files of pre-images.
fn layers_of(host: &Host) -> usize {
    let files = fs::read_dir(host.state("")).expect("the state folder").map(|file| file.expect("a file"));
    files.filter(|file| file.file_name().to_string_lossy().starts_with("pre-images")).count()
}

/// Whoever is promoted, the others follow, and what he overwrote was gone with his commit, whoever he was.
#[test]
fn what_a_promoted_host_overwrites_is_kept_where_nobody_took_part_until_it_is_forgotten() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b", "c"]);
    let mut random = Random::new(10);
    scatter(&mut mirror.client(), &mut random, 16 * MIB / BLOCK_BYTES, 50);
    mirror.wait_until_quiet();
    mirror.primary.succeed(&["switch", "data", "--to", "b"]);
    scatter(&mut client_of(mirror.replica()), &mut random, 16 * MIB / BLOCK_BYTES, 50);
    wait_until_in_sync(mirror.replica());
    for host in [&mirror.primary, &mirror.replicas[1]] {
        let status = host.wait_until("it follows", |status| status.state == VolumeState::Following);
        assert_eq!((status.verdict.as_str(), status.action.as_str()), ("following b; consistent", "none"));
        assert_eq!((layers_of(host), status.facts.succession.unagreed), (0, None), "{}", host.name());
    }

    mirror.replica_mut().kill();
    let c = &mirror.replicas[1];
    c.wait_until("the loss is noticed", |status| status.state == VolumeState::Waiting);
    c.succeed(&["promote", "data", "--force"]);
    scatter(&mut client_of(c), &mut random, 16 * MIB / BLOCK_BYTES, 50);
    let a = &mirror.primary;
    // In a resync, what is kept is what a promotion rolls back to.
    c.wait_until("a is in sync", |status| {
        let is_it = |peer: &PeerStatus| peer.name.as_str() == "a" && peer.state == Some(PeerState::InSync);
        status.facts.peers.iter().any(is_it)
    });
    let status = a.wait_until("it says what it keeps", |status| {
        status.state == VolumeState::Following && status.facts.succession.history.is_some()
    });
    assert_eq!(status.facts.succession.unagreed.as_deref(), Some("c"), "{status:?}");
    let words =
        "following c; consistent; nobody here has agreed that c took over: what was overwritten since ";
    assert!(status.verdict.starts_with(words), "{status:?}");
    assert_eq!(
        status.action,
        "if c is to be the primary: blockmirror forget data; if not: blockmirror pause data c, then: blockmirror undo data"
    );
    assert!(a.log().contains("took over, and nobody on this host has agreed to that"), "{}", a.log());

    // Whoever is demoted for this host may be the one that nobody here has agreed to.
    let own = "nobody on a has agreed that c took over";
    a.refuse(&["promote", "data"], 5, &["on c: blockmirror switch data --to a", own]);
    mirror.replica_mut().start();
    let c = &mirror.replicas[1];
    wait_until_in_sync(c);
    let said = until("nobody has the device open", || {
        let said = c.tool(&["switch", "data", "--to", "a"]);
        if said.error.contains("in use") { Err(said.error) } else { Ok(said) }
    });
    assert!(said.code == 1 && said.error.contains(own), "{said:?}");
    assert!(said.error.contains("this host goes on as the primary"), "{said:?}");
    wait_until_in_sync(c);

    let a = &mirror.primary;
    a.succeed(&["forget", "data"]);
    a.wait_until("nothing is kept", |status| status.verdict == "following c; consistent");
    until("its layer is gone", || if layers_of(a) == 0 { Ok(()) } else { Err("it is there".to_owned()) });
    c.succeed(&["switch", "data", "--to", "a"]);
    assert_identical(a, c);
}

#[test]
fn a_host_without_room_to_keep_anything_waits_until_its_operator_agrees() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b", "c"]);
    let mut random = Random::new(11);
    scatter(&mut mirror.client(), &mut random, 16 * MIB / BLOCK_BYTES, 50);
    mirror.wait_until_quiet();
    mirror.replicas[1].stop();
    mirror.replicas[1].configure(|volume| volume.pre_images = Size(0));
    mirror.primary.kill();
    let b = mirror.replica();
    b.wait_until("the loss is noticed", |status| status.state == VolumeState::Waiting);
    b.succeed(&["promote", "data", "--force"]);
    scatter(&mut client_of(b), &mut random, 16 * MIB / BLOCK_BYTES, 50);
    let before = mirror.folder.join("before.img");
    fs::copy(mirror.replicas[1].backing(), &before).expect("a copy");

    mirror.replicas[1].start();
    let c = &mirror.replicas[1];
    let status = c.wait_until("it has no room", |status| status.facts.succession.is_full);
    assert_eq!(
        status.verdict,
        "paused: what b would overwrite can't be kept; this copy is consistent; nobody here has agreed that b took over: \
         blockmirror forget data does"
    );
    assert!(status.action.contains("raise `pre_images`"), "{status:?}");
    c.refuse(&["undo", "data"], 5, &["nothing is kept here"]);
    assert_eq!(first_difference(&c.backing(), &before), None, "nothing is overwritten");
    c.succeed(&["forget", "data"]);
    // The resync has to have a way back, whoever it is from.
    let is_agreed = "paused: no room for pre-images; this copy is consistent";
    c.wait_until("it is the resync that has no room", |status| status.verdict == is_agreed);
    mirror.replicas[1].stop();
    mirror.replicas[1].configure(|volume| volume.pre_images = Size(64 * MIB));
    mirror.replicas[1].start();
    let c = &mirror.replicas[1];
    mirror.replica().wait_until("it follows", |status| {
        let mut peers = status.facts.peers.iter();
        peers.any(|peer| peer.name.as_str() == "c" && peer.state == Some(PeerState::InSync))
    });
    assert_eq!(first_difference(&mirror.replica().backing(), &c.backing()), None, "it has all of it");
    c.wait_until("nothing is kept", |status| status.verdict == "following b; consistent");
}

#[test]
fn a_switch_that_does_not_come_to_be_leaves_the_primary_as_it_was() {
    let mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    let (a, b) = (&mirror.primary, mirror.replica());
    let mut random = Random::new(8);
    scatter(&mut mirror.client(), &mut random, 16 * MIB / BLOCK_BYTES, 50);
    mirror.wait_until_quiet();
    // The connection is not noticed to be dead yet.
    b.link().cut();
    let said = until("nobody has the device open", || {
        let said = a.tool(&["switch", "data", "--to", "b"]);
        if said.error.contains("in use") { Err(said.error) } else { Ok(said) }
    });
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.error.contains("this host goes on as the primary"), "{said:?}");
    // Its operator may promote b without a word, until it has heard that this did not come to be.
    assert!(said.error.contains("answers no write before b is heard"), "{said:?}");
    let status = a.wait_until("it waits for b", |status| !status.facts.succession.awaited.is_empty());
    assert!(
        status.verdict.contains("writes wait until b has heard that this host is the primary"),
        "{status:?}"
    );
    b.link().mend();
    let mut client = client_of(a);
    scatter(&mut client, &mut random, 16 * MIB / BLOCK_BYTES, 50);
    assert_eq!((a.status().facts.role, b.status().facts.role), (Role::Primary, Role::Replica));
    assert!(a.status().facts.succession.awaited.is_empty());
    assert_identical(a, b);
}

#[test]
fn a_switch_to_a_host_that_can_not_open_its_volume_makes_no_second_primary() {
    let mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    let mut random = Random::new(9);
    scatter(&mut mirror.client(), &mut random, 16 * MIB / BLOCK_BYTES, 50);
    mirror.wait_until_quiet();
    // It has its backing open, records that it is the primary, and then doesn't find the backing again.
    let (a, b) = (&mirror.primary, mirror.replica());
    let away = b.path("away");
    fs::rename(b.backing(), &away).expect("the backing is there");
    let said = until("nobody has the device open", || {
        let said = a.tool(&["switch", "data", "--to", "b"]);
        if said.error.contains("in use") { Err(said.error) } else { Ok(said) }
    });
    assert_eq!(said.code, 1, "{said:?}");
    assert!(said.error.contains("b is the primary now, but does not serve the volume"), "{said:?}");
    assert_eq!(a.status().facts.role, Role::Replica);
    let log = b.log();
    assert!(
        log.contains("was to take over as the primary and serves nothing") && log.contains("is not there"),
        "{log}"
    );
    fs::rename(&away, b.backing()).expect("nothing else is there");
    b.succeed(&["wait", "data", "--for", "device"]);
    scatter(&mut client_of(b), &mut random, 16 * MIB / BLOCK_BYTES, 50);
    assert_identical(b, a);
}

/// Whoever opened the device for a moment, as udev does after each close, made every second switch fail.
#[test]
fn whoever_just_looks_at_the_device_does_not_keep_it_from_being_handed_over() {
    require!("root", "losetup");
    let mirror = Mirror::new(16 * MIB, "loop", &["b"]);
    let (mut from, mut to) = (&mirror.primary, mirror.replica());
    let waits = |host: &Host| host.log().matches("waiting for those who have the device open").count();
    for _ in 0..4 {
        wait_until_in_sync(from);
        let before = waits(from);
        let look = File::open(from.device()).expect("the device is served");
        std::thread::scope(|scope| {
            let switch = scope.spawn(|| from.succeed(&["switch", "data", "--to", to.name()]));
            until("the switch waits for whoever looks", || match waits(from) - before {
                1 => Ok(()),
                waits => Err(format!("{waits} times")),
            });
            drop(look);
            switch.join().expect("the volume is handed over");
        });
        (from, to) = (to, from);
    }
    // Who stays is waited for, too, and then named.
    wait_until_in_sync(from);
    let _open = File::open(from.device()).expect("the device is served");
    let process = format!("(pid {})", std::process::id());
    from.refuse(&["demote", "data"], 5, &["the device is in use: open by", &process]);
    wait_until_in_sync(from);
}

/// Neither of the two asked anybody else: a second primary was made beside one that the first had not heard of, with the
/// same number.
#[test]
fn a_switch_notices_a_host_that_was_promoted_out_of_the_primarys_reach() {
    let mirror = Mirror::new(16 * MIB, "nbd", &["b", "c"]);
    mirror.client().write_durably(0, &stamped(1)).expect("a write");
    mirror.wait_until_quiet();
    let [b, c] = &mirror.replicas[..] else { panic!("there are two") };
    let a = &mirror.primary;
    // None of them greets c, and c greets nobody; all of them answer each other's questions.
    a.succeed(&["pause", "data", "c"]);
    c.succeed(&["pause", "data", "a"]);
    c.succeed(&["pause", "data", "b"]);
    c.wait_until("nobody is connected", |status| status.state == VolumeState::Waiting);
    c.succeed(&["promote", "data", "--force"]);
    let before = b.status().facts.succession.fence;
    until("nobody has the device open", || {
        let said = a.tool(&["switch", "data", "--to", "b"]);
        let is_refused = said.code != 0 && said.error.contains("b does not take over (c is the primary");
        if is_refused { Ok(()) } else { Err(format!("{said:?}")) }
    });
    assert_eq!((b.status().facts.role, b.status().facts.succession.fence), (Role::Replica, before));
    // The one that leads is followed, and not contradicted by a promotion with the same number.
    let status = a.wait_until("it is no primary any more", |status| status.facts.role == Role::Replica);
    assert_eq!(status.facts.succession.fence, c.status().facts.succession.fence);
    a.succeed(&["resume", "data", "c"]);
    c.succeed(&["resume", "data", "a"]);
    c.succeed(&["resume", "data", "b"]);
    c.wait_until("both follow", |status| status.state == VolumeState::Healthy);
    for host in [a, b] {
        assert_eq!(first_difference(&c.backing(), &host.backing()), None, "{} differs", host.name());
    }
}

/// The advice was to promote whichever host was looked at.
#[test]
fn the_host_with_the_latest_content_is_named_after_a_cut_and_after_a_restart_of_all() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b", "c"]);
    mirror.client().write_durably(0, &stamped(1)).expect("a write");
    mirror.wait_until_quiet();
    mirror.replicas[1].link().cut();
    mirror.wait_until_lost("c");
    mirror.client().write_durably(BLOCK_BYTES, &stamped(2)).expect("a write");
    mirror.wait_for_peer("b", "b has it", |peer| {
        (peer.state, peer.lag_bytes) == (Some(PeerState::InSync), Some(0))
    });
    mirror.primary.kill();
    mirror.replicas[1].link().mend();
    for is_restarted in [false, true] {
        if is_restarted {
            mirror.replicas.iter_mut().for_each(Host::stop);
            mirror.replicas.iter_mut().for_each(Host::start);
        }
        let [b, c] = &mirror.replicas[..] else { panic!("there are two") };
        let status = c.wait_until("b is named", |status| status.facts.succession.better.is_some());
        assert!(status.verdict.starts_with("b has later content than this copy"), "{status:?}");
        assert_eq!(status.action, "on b: blockmirror promote data");
        c.refuse(&["promote", "data"], 5, &["on b: blockmirror promote data"]);
        let status = b.wait_until("a is missed", |status| status.state == VolumeState::Waiting);
        assert_eq!(status.facts.succession.better, None, "{status:?}");
        assert!(status.action.ends_with("if a is gone: blockmirror promote data"), "{status:?}");
    }
    let [b, c] = &mirror.replicas[..] else { panic!("there are two") };
    // Nobody promised that a answers nothing without b.
    b.refuse(&["promote", "data"], 5, &["--force promotes this copy without that"]);
    b.succeed(&["promote", "data", "--force"]);
    c.wait_until("c follows", |status| status.state == VolumeState::Following);
    b.wait_until("c has everything", |status| {
        let mut peers = status.facts.peers.iter();
        peers.any(|peer| {
            peer.name.as_str() == "c" && (peer.state, peer.lag_bytes) == (Some(PeerState::InSync), Some(0))
        })
    });
    assert_eq!(first_difference(&b.backing(), &c.backing()), None);
}
