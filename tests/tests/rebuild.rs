//! A primary has lost its disk: the volume is served from a replica at once, and another disk is filled meanwhile (S4).

use blockmirror_agent::control::api::{VolumeState, VolumeStatus};
use blockmirror_tests::harness::random::Random;
use blockmirror_tests::machines::content::{first_difference, noise, stamp_of, stamped};
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::patience::until;
use blockmirror_tests::machines::programs::{succeed, text};
use blockmirror_tests::require;
use std::fs;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;
const SIZE_BYTES: u64 = 64 * MIB;
/// So much delay on the way to the source that a rebuild is under way for a while, in milliseconds.
const FAR: u64 = 50;

/// A volume on `a` with these replicas, full of noise, whose primary was killed and has lost its disk.
fn without_a_disk(replicas: &[&str], devices: &str) -> Mirror {
    let mut mirror = Mirror::new(SIZE_BYTES, devices, replicas);
    fill(&mirror);
    mirror.assert_identical();
    lose_disk(&mut mirror);
    mirror.primary.start();
    mirror
}

fn fill(mirror: &Mirror) {
    let mut random = Random::new(1);
    let mut client = mirror.client();
    // The last quarter stays a hole.
    for offset in (0..SIZE_BYTES / 4 * 3).step_by(MIB as usize) {
        client.write(offset, &noise(&mut random, MIB)).expect("a write");
    }
    client.flush().expect("a flush");
}

fn lose_disk(mirror: &mut Mirror) {
    mirror.primary.kill();
    let backing = mirror.primary.backing();
    until("the killed agent has let go of its backing", || {
        let file = fs::File::open(&backing).expect("a backing");
        file.try_lock().map_err(|error| error.to_string())
    });
    fs::remove_file(&backing).expect("the disk is gone");
    for replica in &mirror.replicas {
        replica.wait_until("the primary is gone", |status| status.verdict.contains("is not connected"));
    }
}

fn rebuild(host: &Host, backing: &Path, more: &[&str]) -> String {
    let arguments = [&["rebuild", "data", "--backing", text(backing)], more].concat();
    host.succeed(&arguments)
}

fn wait_until_filled(host: &Host) {
    host.wait_until("the disk is filled", |status| {
        status.facts.rebuild.is_none() && status.state == VolumeState::Healthy
    });
}

/// What a file holds there.
fn held(path: &Path, offset: u64, length: u64) -> Vec<u8> {
    fs::read(path).expect("a file")[offset as usize..(offset + length) as usize].to_vec()
}

#[test]
fn a_lost_disk_is_served_at_once_and_filled_while_it_is_written_to() {
    let mut mirror = without_a_disk(&["b"], "nbd");
    assert!(mirror.primary.status().facts.backing_error.is_some());
    let (source, other) = (mirror.replica().backing(), mirror.primary.path("other.img"));
    mirror.replica().link().delay(FAR);
    let said = rebuild(&mirror.primary, &other, &[]);
    assert!(said.contains("data is served from b"), "{said}");
    let is_rebuilt =
        |status: &VolumeStatus| status.facts.rebuild.is_some() && status.verdict.contains("served from b");
    mirror.primary.wait_until("it is served from b", is_rebuilt);
    let mut client = mirror.client();
    // From the end on, where the filling comes last.
    for offset in [SIZE_BYTES - 4096, 47 * MIB + 512, 13 * MIB, 0] {
        assert!(
            client.read(offset, 8192.min(SIZE_BYTES - offset)).expect("a read")
                == held(&source, offset, 8192.min(SIZE_BYTES - offset)),
            "{offset}"
        );
    }
    // A part of a block, whole blocks, a trim, each of what is not here yet.
    client.write(46 * MIB + 512, &[7; 512]).expect("a write");
    client.write_durably(45 * MIB, &stamped(9)).expect("a write");
    client.trim(44 * MIB, 64 << 10).expect("a trim");
    let part = client.read(46 * MIB, 4096).expect("a read");
    assert!(part[512..1024] == [7; 512] && part[..512] == held(&source, 46 * MIB, 512));
    assert_eq!(stamp_of(&client.read(45 * MIB, 4096).expect("a read")), Some(9));
    assert!(client.read(44 * MIB, 64 << 10).expect("a read").iter().all(|byte| *byte == 0));
    mirror.replica().link().delay(0);
    wait_until_filled(&mirror.primary);
    mirror.wait_until_quiet();
    assert_eq!(first_difference(&other, &source), None);
    assert!(!mirror.primary.state("absent").exists(), "nothing is left of it");
    // It is a volume like any other.
    drop(client);
    mirror.primary.stop();
    mirror.primary.start();
    mirror.client().write_durably(0, &stamped(1)).expect("it goes on");
    mirror.wait_until_quiet();
    assert_eq!(first_difference(&other, &source), None);
}

#[test]
fn a_rebuild_goes_on_after_every_kill_and_what_was_answered_is_there() {
    let mut mirror = without_a_disk(&["b"], "nbd");
    let other = mirror.primary.path("other.img");
    mirror.replica().link().delay(FAR);
    rebuild(&mirror.primary, &other, &[]);
    let mut random = Random::new(3);
    let mut written = Vec::new();
    for stamp in 1..=6 {
        let mut client = mirror.client();
        for _ in 0..8 {
            let offset = random.below(SIZE_BYTES / 4096) * 4096;
            client.write_durably(offset, &stamped(stamp)).expect("a write");
            written.retain(|(at, _)| *at != offset);
            written.push((offset, stamp));
        }
        if stamp % 2 == 1 {
            mirror.primary.kill()
        } else {
            mirror.replica_mut().kill()
        }
        if stamp % 2 == 1 { mirror.primary.start() } else { mirror.replica_mut().start() }
    }
    assert!(mirror.primary.status().facts.rebuild.is_some(), "it is under way all the time");
    let mut client = mirror.client();
    for (offset, stamp) in &written {
        assert_eq!(stamp_of(&client.read(*offset, 4096).expect("a read")), Some(*stamp), "{offset}");
    }
    mirror.replica().link().delay(0);
    wait_until_filled(&mirror.primary);
    mirror.wait_until_quiet();
    assert_eq!(first_difference(&other, &mirror.replica().backing()), None);
}

#[test]
fn what_only_the_source_has_waits_for_it() {
    let mirror = without_a_disk(&["b"], "nbd");
    let other = mirror.primary.path("other.img");
    mirror.replica().link().delay(FAR);
    rebuild(&mirror.primary, &other, &[]);
    let mut client = mirror.client();
    let first = client.read(0, 4096).expect("a read");
    mirror.replica().link().cut();
    let blocked =
        mirror.primary.wait_until("the source is missed", |status| status.state == VolumeState::Degraded);
    assert!(
        blocked.verdict.contains("b is not connected") && blocked.action.contains("start b"),
        "{blocked:?}"
    );
    client.begin_read(47 * MIB, 4096).expect("a request");
    mirror.primary.wait_until("the read waits", |status| {
        status.facts.rebuild.as_ref().is_some_and(|rebuild| rebuild.waiting > 0)
    });
    // What is here is served all the same.
    assert!(mirror.client().read(0, 4096).expect("a read") == first);
    mirror.replica().link().delay(0);
    mirror.replica().link().mend();
    assert!(client.finish_read(4096).expect("the read") == held(&mirror.replica().backing(), 47 * MIB, 4096));
    wait_until_filled(&mirror.primary);
}

#[test]
fn a_file_system_is_mounted_from_a_disk_that_is_not_filled() {
    require!("root", "losetup", "mkfs.ext4", "/dev/fuse");
    let mut mirror = Mirror::new(SIZE_BYTES, "loop", &["b"]);
    succeed("mkfs.ext4", &["-q", text(&mirror.primary.device())]);
    let file = {
        let mounted = mirror.folder.mount(&mirror.primary.device(), "before");
        let content = noise(&mut Random::new(4), 8 * MIB);
        fs::write(mounted.path().join("file"), &content).expect("a file");
        mounted.unmount();
        content
    };
    mirror.assert_identical();
    lose_disk(&mut mirror);
    mirror.primary.start();
    let other = mirror.primary.path("other.img");
    mirror.replica().link().delay(FAR);
    rebuild(&mirror.primary, &other, &[]);
    let device: PathBuf = mirror.primary.device();
    let mounted = mirror.folder.mount(&device, "after");
    fs::write(mounted.path().join("more"), &file[..MIB as usize]).expect("a file");
    assert!(fs::read(mounted.path().join("file")).expect("the file") == file);
    mirror.replica().link().delay(0);
    wait_until_filled(&mirror.primary);
    assert!(fs::read(mounted.path().join("more")).expect("the file") == file[..MIB as usize]);
    mounted.unmount();
    succeed("e2fsck", &["-fn", text(&device)]);
    mirror.wait_until_quiet();
    assert_eq!(first_difference(&other, &mirror.replica().backing()), None);
}

#[test]
fn what_would_lose_something_or_lead_nowhere_is_refused() {
    let mut mirror = Mirror::new(SIZE_BYTES, "nbd", &["b"]);
    fill(&mirror);
    mirror.assert_identical();
    let (small, other) = (mirror.primary.path("small.img"), mirror.primary.path("other.img"));
    fs::File::create(&small).and_then(|file| file.set_len(MIB)).expect("a small disk");
    let arguments =
        |backing: &Path| ["rebuild", "data", "--backing", text(backing)].map(str::to_owned).to_vec();
    let refuse = |host: &Host, backing: &Path, more: &[&str], words: &[&str]| {
        let arguments = arguments(backing);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(more.iter().copied()).collect();
        host.refuse(&arguments, 5, words);
    };
    refuse(&mirror.primary, &other, &[], &["copy is a good one", "--overwrite"]);
    refuse(mirror.replica(), &other, &[], &["is a replica"]);
    assert!(!other.exists(), "nothing was made");
    lose_disk(&mut mirror);
    mirror.primary.start();
    refuse(&mirror.primary, &small, &[], &["the volume needs"]);
    mirror.replica_mut().stop();
    refuse(&mirror.primary, &other, &[], &["no host that was heard"]);
    refuse(&mirror.primary, &other, &["--from", "b"], &["does not say how it stands"]);
    mirror.replica_mut().start();
    rebuild(&mirror.primary, &other, &["--from", "b"]);
    wait_until_filled(&mirror.primary);
}

/// The agent runs, and its replica is connected, when the operator goes on with another disk; and with another one once more.
#[test]
fn a_running_primary_takes_another_disk_and_another_one_before_that_is_filled() {
    let mirror = Mirror::new(SIZE_BYTES, "nbd", &["b"]);
    fill(&mirror);
    mirror.assert_identical();
    mirror.replica().link().delay(FAR);
    let (second, third) = (mirror.primary.path("second.img"), mirror.primary.path("third.img"));
    rebuild(&mirror.primary, &second, &["--overwrite"]);
    mirror.client().write_durably(47 * MIB, &stamped(3)).expect("a write");
    let refused = |arguments: &[&str], words: &[&str]| mirror.primary.refuse(arguments, 5, words);
    let again = ["rebuild", "data", "--backing", text(&third)];
    refused(&again, &["a rebuild of this host is under way", "--overwrite"]);
    // What is absent here is on b alone.
    refused(&["remove-peer", "data", "b", "--force"], &["b alone has", "new disk lacks"]);
    refused(&["pause", "data", "b"], &["b alone has", "new disk lacks"]);
    refused(&["switch", "data", "--to", "b"], &["is being filled from b", "promote data"]);
    mirror.replica().wait_until("b has what was written", |_| {
        stamp_of(&held(&mirror.replica().backing(), 47 * MIB, 4096)) == Some(3)
    });
    rebuild(&mirror.primary, &third, &["--overwrite"]);
    assert_eq!(mirror.primary.status().facts.backing, third);
    assert_eq!(stamp_of(&mirror.client().read(47 * MIB, 4096).expect("a read")), Some(3));
    mirror.client().write_durably(46 * MIB, &stamped(4)).expect("a write");
    mirror.replica().link().delay(0);
    wait_until_filled(&mirror.primary);
    mirror.wait_until_quiet();
    assert_eq!(first_difference(&third, &mirror.replica().backing()), None);
    assert_eq!(stamp_of(&held(&third, 46 * MIB, 4096)), Some(4));
}

/// The source is promoted while a rebuild is under way: this host becomes its replica, and all of it is copied.
#[test]
fn a_primary_that_is_being_filled_follows_its_source_when_that_is_promoted() {
    let mut mirror = without_a_disk(&["b"], "nbd");
    let other = mirror.primary.path("other.img");
    mirror.replica().link().delay(FAR);
    rebuild(&mirror.primary, &other, &[]);
    mirror.client().write_durably(47 * MIB, &stamped(5)).expect("a write");
    mirror.wait_until_quiet();
    mirror.replica().link().cut();
    mirror.replica().succeed(&["promote", "data", "--force"]);
    mirror.replica().link().delay(0);
    mirror.replica().link().mend();
    mirror.primary.wait_until("it follows b", |status| status.state == VolumeState::Following);
    mirror.replica().wait_until("b has a replica", |status| status.state == VolumeState::Healthy);
    assert!(!mirror.primary.state("absent").exists(), "a replica is copied to as a whole");
    mirror.replica_mut().stop();
    assert_eq!(first_difference(&other, &mirror.replica().backing()), None);
}
