//! A volume's whole life under a file system: made, mounted, filled, given back, looked at on the replica.

use blockmirror_agent::config::{OnReplicaLoss, StartAlone, VolumeConfig};
use blockmirror_agent::control::api::PeerState;
use blockmirror_tests::harness::random::Random;
use blockmirror_tests::machines::content::{allocated_bytes, first_difference, noise};
use blockmirror_tests::machines::folder::Mounted;
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::programs::{succeed, text};
use blockmirror_tests::require;
use std::fs::{self, File};
use std::io::Write;

const MIB: u64 = 1 << 20;

/// Many small files, large ones, some of which go again.
fn fill(mounted: &Mounted, random: &mut Random) {
    let folder = mounted.path();
    for number in 0..200 {
        let length = random.below(20_000);
        fs::write(folder.join(format!("small {number}")), noise(random, length)).expect("a small file");
    }
    for number in 0..4 {
        let mut large = File::create(folder.join(format!("large {number}"))).expect("a file");
        large.write_all(&noise(random, 8 * MIB)).expect("a large file");
        large.sync_all().expect("a sync");
    }
    for number in (0..200).step_by(3) {
        fs::remove_file(folder.join(format!("small {number}"))).expect("a small file");
    }
}

/// Fills a file system on the volume's loop device while it is mirrored, checks both copies, then gives space back.
fn live(mirror: &Mirror, check: &dyn Fn(&str)) {
    let mut random = Random::new(1);
    let device = mirror.primary.device();
    let mounted = mirror.folder.mount(&device, "mounted");
    fill(&mounted, &mut random);
    mounted.unmount();
    mirror.assert_identical();
    check(text(&mirror.replica().backing()));

    let mounted = mirror.folder.mount(&device, "mounted");
    let before = allocated_bytes(&mirror.replica().backing());
    for number in 0..4 {
        fs::remove_file(mounted.path().join(format!("large {number}"))).expect("a large file");
    }
    // A file system may free the blocks of removed files in the background, but not later than this.
    mounted.unmount();
    let mounted = mirror.folder.mount(&device, "mounted");
    succeed("fstrim", &[text(mounted.path())]);
    mounted.unmount();
    mirror.assert_identical();
    let after = allocated_bytes(&mirror.replica().backing());
    assert!(
        after + 24 * MIB < before,
        "a trim gives space back on the replica: {before} before, {after} after"
    );
    check(text(&mirror.replica().backing()));
    let volume = mirror.primary.status().facts;
    assert_eq!(volume.backing_error, None);
}

#[test]
fn ext4_lives_on_a_volume_and_is_whole_on_the_replica() {
    require!("root", "mkfs.ext4", "fsck.ext4", "fstrim", "losetup");
    let mut mirror = Mirror::new(192 * MIB, "nbd,loop", &["b"]);
    succeed("mkfs.ext4", &["-q", text(&mirror.primary.device())]);
    live(&mirror, &|image| {
        succeed("fsck.ext4", &["-f", "-n", image]);
    });
    mirror.primary.stop();
    mirror.replica_mut().stop();
    let difference = first_difference(&mirror.primary.backing(), &mirror.replica().backing());
    assert_eq!(difference, None, "what is stopped in order stays identical");
    assert!(!mirror.primary.device().exists(), "a stopped agent leaves no device");
}

#[test]
fn xfs_lives_on_a_volume_and_is_whole_on_the_replica() {
    require!("root", "mkfs.xfs", "xfs_repair", "fstrim", "losetup");
    let mirror = Mirror::new(384 * MIB, "loop", &["b"]);
    succeed("mkfs.xfs", &["-q", text(&mirror.primary.device())]);
    live(&mirror, &|image| {
        succeed("xfs_repair", &["-n", "-f", image]);
    });
}

#[test]
fn a_discard_of_the_whole_device_leaves_holes_on_both_sides() {
    require!("root", "blkdiscard", "losetup");
    let mirror = Mirror::new(64 * MIB, "loop", &["b"]);
    let device = mirror.primary.device();
    let mut random = Random::new(2);
    let mut file = File::options().write(true).open(&device).expect("the device");
    file.write_all(&noise(&mut random, 64 * MIB)).expect("the device is filled");
    file.sync_all().expect("a sync");
    drop(file);
    mirror.assert_identical();
    assert!(allocated_bytes(&mirror.replica().backing()) >= 64 * MIB);
    succeed("blkdiscard", &[text(&device)]);
    mirror.assert_identical();
    for host in [&mirror.primary, mirror.replica()] {
        assert!(allocated_bytes(&host.backing()) < MIB, "{} has given the space back", host.name());
    }
}

#[test]
fn a_raw_device_carries_a_replica_as_well_as_an_image_does() {
    require!("root", "losetup");
    let mut mirror = Mirror::new(64 * MIB, "nbd", &[]);
    let image = mirror.folder.join("raw.img");
    File::create(&image).and_then(|file| file.set_len(64 * MIB)).expect("an image");
    let device = mirror.folder.attach(&image);
    let replica = Host::new(&mirror.folder, "b");
    replica.join(&mirror.primary, &device);
    mirror.wait_until_in_sync();
    let mut random = Random::new(3);
    let mut client = mirror.client();
    for offset in [0, 5 * MIB, 64 * MIB - 70_000 / 512 * 512] {
        client.write(offset, &noise(&mut random, 70_000 / 512 * 512)).expect("a write");
    }
    client.trim(5 * MIB, MIB / 2).expect("a trim");
    client.flush().expect("a flush");
    mirror.wait_until_quiet();
    // The device's own cache must not answer for the image.
    succeed("blockdev", &["--flushbufs", text(&device)]);
    assert_eq!(first_difference(&mirror.primary.backing(), &image), None);
    mirror.replicas.push(replica);
}

/// Writes wait for replicas, for longer than any test.
fn wait_for_replicas(volume: &mut VolumeConfig) {
    volume.on_replica_loss = OnReplicaLoss::Block;
    volume.block_seconds = 3600;
}

/// The stop ended the sessions first, and then waited for requests that needed them, as long as the operator had told
/// writers to wait.
#[test]
fn a_primary_whose_writers_wait_for_replicas_stops_when_it_is_told_to() {
    let mut mirror = Mirror::new(8 * MIB, "nbd", &["b"]);
    mirror.primary.succeed(&["mode", "data", "b", "sync"]);
    mirror.wait_until_quiet();
    mirror.primary.stop();
    mirror.primary.configure(wait_for_replicas);
    mirror.primary.start();
    mirror.wait_until_in_sync();
    // Writers are at work while the agent stops.
    let mut client = mirror.client();
    for number in 0..64 {
        client.begin_write(number * 4096, &[7; 4096]).expect("it is taken");
    }
    mirror.primary.stop();
    // There is no replica.
    mirror.replica_mut().stop();
    mirror.primary.start();
    let mut client = mirror.client();
    client.begin_write(0, &[8; 4096]).expect("it is taken");
    mirror.primary.wait_until("a write waits", |status| {
        status.facts.blocked.as_ref().is_some_and(|blocked| blocked.requests == 1)
    });
    mirror.primary.stop();
    mirror.primary.start();
    mirror.replica_mut().start();
    mirror.wait_until_in_sync();
    mirror.assert_identical();
}

/// The same with a loop device: it stays, and what waits is answered once an agent can (S1).
#[test]
fn writers_of_a_loop_device_that_wait_for_replicas_wait_over_the_agents_end() {
    require!("root");
    let mut mirror = Mirror::new(8 * MIB, "loop", &["b"]);
    mirror.primary.succeed(&["mode", "data", "b", "sync"]);
    mirror.wait_until_quiet();
    mirror.replica_mut().stop();
    mirror.primary.stop();
    mirror.primary.configure(wait_for_replicas);
    mirror.primary.start();
    let device = mirror.primary.device();
    let writer = std::thread::spawn(move || {
        let mut file = File::options().write(true).open(device).expect("the device");
        file.write_all(&[7; 4096]).and_then(|()| file.sync_all())
    });
    mirror.primary.wait_until("a write waits", |status| {
        status.facts.blocked.as_ref().is_some_and(|blocked| blocked.requests > 0)
    });
    mirror.primary.stop();
    mirror.primary.start();
    mirror.primary.wait_until("the write waits still", |status| {
        status.facts.blocked.as_ref().is_some_and(|blocked| blocked.requests > 0)
    });
    mirror.replica_mut().start();
    writer.join().expect("it doesn't panic").expect("the write is answered when the replica is back");
    mirror.assert_identical();
}

/// The loop driver synchronises the file that it is attached to: an agent whose volume was to wait for its replicas, of
/// which none was there, had no device before that was given up.
#[test]
fn a_primary_that_waits_for_its_replicas_starts_without_them_and_says_that_writes_wait() {
    require!("root");
    let mut mirror = Mirror::new(8 * MIB, "loop,nbd", &["b"]);
    mirror.primary.succeed(&["mode", "data", "b", "sync"]);
    mirror.wait_until_quiet();
    mirror.replica_mut().stop();
    mirror.primary.stop();
    mirror.primary.configure(wait_for_replicas);
    mirror.primary.start();
    let status = mirror.primary.wait_until("the devices are served", |status| {
        status.facts.devices.iter().all(|device| device.error.is_none())
    });
    let blocked = status.facts.blocked.expect("a replica is missing");
    assert_eq!((blocked.in_sync, blocked.required, blocked.requests), (0, 1, 0));

    let mut client = mirror.client();
    let writer = std::thread::spawn(move || client.write(0, &[7; 4096]));
    let status = mirror.primary.wait_until("a write waits", |status| {
        status.facts.blocked.as_ref().is_some_and(|blocked| blocked.requests == 1)
    });
    assert!(status.verdict.starts_with("blocked: writes wait until 1 replica is in sync"), "{status:?}");
    mirror.replica_mut().start();
    writer.join().expect("it doesn't panic").expect("the write is answered when the replica is back");
    mirror.wait_until_quiet();
    assert_eq!(mirror.primary.status().facts.blocked, None);
    mirror.assert_identical();
}

/// A mirror whose replica counts on it for good that nothing is answered without it, is cut off, and hears nothing of what
/// its primary's operator chooses then: to go on. A write waits for that.
fn left_to_wait() -> (Mirror, std::thread::JoinHandle<bool>) {
    let mut mirror = Mirror::new(8 * MIB, "nbd", &["b"]);
    mirror.primary.succeed(&["mode", "data", "b", "sync"]);
    mirror.primary.stop();
    mirror.primary.configure(wait_for_replicas);
    mirror.primary.start();
    mirror.wait_until_in_sync();
    mirror.client().write_durably(0, &[1; 4096]).expect("a write");
    mirror.replica().link().cut();
    mirror.wait_until_lost("b");
    mirror.primary.stop();
    mirror.primary.configure(|volume| volume.on_replica_loss = OnReplicaLoss::Continue);
    mirror.primary.start();
    let mut client = mirror.client();
    let writer = std::thread::spawn(move || client.write(0, &[2; 4096]).is_ok());
    let status = mirror.primary.wait_until("a write waits", |status| {
        status.facts.blocked.as_ref().is_some_and(|blocked| blocked.requests == 1)
    });
    let words = "blocked: writes wait until b hears that they are answered without it: it was promised";
    assert!(status.verdict.starts_with(words), "{status:?}");
    assert!(status.action.contains("blockmirror remove-peer data b --force"), "{status:?}");
    mirror.primary.refuse(&["remove-peer", "data", "b"], 5, &["b was promised that nothing", "--force"]);
    (mirror, writer)
}

/// The primary went by what it was told last: what it answered then was lost with it, and nobody objected to the promotion.
#[test]
fn a_primary_keeps_its_word_to_a_replica_that_has_not_heard_that_its_operator_chose_otherwise() {
    let (mut mirror, writer) = left_to_wait();
    mirror.primary.kill();
    let b = mirror.replica_mut();
    b.wait_until("the primary is gone", |status| status.verdict.contains("is not connected"));
    b.succeed(&["promote", "data"]);
    let content = std::fs::read(b.backing()).expect("its backing");
    assert!(content[..4096] == [1; 4096], "all that was answered is there");
    // What keeps its connection ends with the mirror.
    drop(mirror);
    assert!(!writer.join().expect("it doesn't panic"), "it was not answered");
}

#[test]
fn what_waits_for_a_replicas_word_is_answered_when_that_has_heard() {
    let (mirror, writer) = left_to_wait();
    mirror.replica().link().mend();
    assert!(writer.join().expect("it doesn't panic"), "it is answered");
    mirror.wait_until_quiet();
    assert_eq!(mirror.primary.status().facts.blocked, None);
    mirror.assert_identical();
}

/// An old primary whose successors were away served its old content at once, and status said no more than "at risk".
#[test]
fn a_primary_that_starts_alone_says_so_and_waits_for_a_majority_where_the_operator_wants_that() {
    require!("root");
    let mut mirror = Mirror::new(8 * MIB, "loop,nbd", &["b", "c"]);
    mirror.wait_until_quiet();
    mirror.primary.stop();
    mirror.replicas.iter_mut().for_each(Host::stop);
    mirror.primary.start();
    let status = mirror.primary.wait_until("it says since when it is alone", |status| {
        status.facts.succession.alone.is_some_and(|alone| alone.heard_at_unix_seconds.is_some())
    });
    assert!(status.verdict.starts_with("at risk: no other host was heard since "), "{status:?}");
    mirror.client().write_durably(0, &[6; 4096]).expect("it serves: that is the default");

    mirror.primary.stop();
    mirror.primary.configure(|volume| volume.start_alone = Some(StartAlone::Wait));
    mirror.primary.start();
    let status = mirror.primary.wait_until("the devices are served", |status| {
        status.facts.devices.iter().all(|device| device.error.is_none())
    });
    assert!(status.verdict.starts_with("blocked: writes wait until 2 of 3 hosts were heard"), "{status:?}");
    let mut client = mirror.client();
    assert_eq!(client.read(0, 4096).expect("reads go on"), [6; 4096]);
    client.begin_write(0, &[7; 4096]).expect("it is taken");
    // Only what waits fails when the agent stops.
    mirror.primary.stop();
    assert!(client.finish().is_err(), "nothing is answered alone");
    mirror.primary.start();
    let mut client = mirror.client();
    client.begin_write(0, &[8; 4096]).expect("it is taken");
    mirror.replicas[1].start();
    client.finish().expect("two of three have spoken");
    let status = mirror.primary.wait_until("c is in sync", |status| {
        status
            .facts
            .peers
            .iter()
            .any(|peer| peer.name.as_str() == "c" && peer.state == Some(PeerState::InSync))
    });
    assert_eq!(status.facts.succession.alone, None);
    mirror.replica_mut().start();
    mirror.wait_until_quiet();
    mirror.assert_identical();
}
