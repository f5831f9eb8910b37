//! A backing that something else writes, while no agent holds it or behind its back: noticed, named, and compared before
//! anything counts as in sync (X4).

use blockmirror_agent::control::api::{CopyState, PeerState, VolumeState, VolumeStatus};
use blockmirror_protocol::disk::superblock::{self, Superblock};
use blockmirror_tests::harness::random::Random;
use blockmirror_tests::machines::content::{first_difference, noise};
use blockmirror_tests::machines::folder::Folder;
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::{Mirror, assert_identical};
use blockmirror_tests::machines::nbd::Client;
use blockmirror_tests::machines::patience::until;
use blockmirror_tests::machines::programs::{succeed, text};
use blockmirror_tests::require;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;
const SIZE_BYTES: u64 = 32 * MIB;
/// Far from what is looked at first, and never written by the volume's applications.
const PLACE: u64 = 21 * MIB + 4096 * 3;

fn mirrored(replicas: &[&str]) -> Mirror {
    let mirror = Mirror::new(SIZE_BYTES, "nbd", replicas);
    let mut random = Random::new(3);
    let mut client = mirror.client();
    for offset in (0..16 * MIB).step_by(MIB as usize) {
        client.write(offset, &noise(&mut random, MIB)).expect("a write");
    }
    client.flush().expect("a flush");
    drop(client);
    mirror.assert_identical();
    mirror
}

/// Writes what the agent doesn't know of.
fn touch(backing: &Path) {
    let file = File::options().write(true).open(backing).expect("the backing");
    file.write_all_at(&noise(&mut Random::new(4), 4096), PLACE).expect("a write");
    file.sync_all().expect("a sync");
}

/// Waits until a killed agent has let go of its backing, and its host has noted that it wrote nothing more.
fn let_go(host: &Host) {
    until("the killed agent has let go of its backing", || {
        let file = File::open(host.backing()).expect("a backing");
        file.try_lock().map_err(|error| error.to_string())
    });
}

/// Waits until the host has noted what its backing looks like when nothing is written.
fn wait_until_noted(host: &Host) {
    until("the host has written nothing for a while", || {
        let note = fs::read_to_string(host.path("run/data.held")).unwrap_or_default();
        if note.starts_with("quiet") { Ok(()) } else { Err(note) }
    });
}

fn is_named(status: &VolumeStatus) -> bool {
    status.verdict.contains("was changed by something else")
}

fn was_told(host: &Host, words: &str) {
    assert!(host.log().contains(words), "{}: {}", host.name(), host.log());
}

#[test]
fn a_primarys_image_that_was_written_while_the_agent_was_stopped_is_compared() {
    let mut mirror = mirrored(&["b", "c"]);
    mirror.primary.stop();
    touch(&mirror.primary.backing());
    mirror.replicas[0].link().cut();
    mirror.primary.start();
    let named = mirror.primary.wait_until("it is named", is_named);
    assert_ne!(named.state, VolumeState::Healthy);
    mirror.replicas[0].link().mend();
    mirror.assert_identical();
    was_told(&mirror.primary, "something else wrote to it after it was closed here");
    mirror.primary.wait_until("all is compared", |status| !is_named(status));
    // What was compared once is not doubted again.
    mirror.primary.stop();
    mirror.primary.start();
    mirror.wait_until_in_sync();
    assert_eq!(mirror.primary.log().matches("something else wrote").count(), 1, "{}", mirror.primary.log());
}

#[test]
fn a_primarys_image_that_was_written_after_the_agent_was_killed_is_compared() {
    let mut mirror = mirrored(&["b"]);
    wait_until_noted(&mirror.primary);
    mirror.primary.kill();
    let_go(&mirror.primary);
    touch(&mirror.primary.backing());
    mirror.primary.start();
    mirror.assert_identical();
    was_told(&mirror.primary, "something else wrote to it after the agent was killed");
}

#[test]
fn an_agent_that_is_stopped_or_killed_doubts_nothing_that_it_wrote_itself() {
    let mut mirror = mirrored(&["b"]);
    let mut random = Random::new(9);
    for round in 0..4 {
        let mut client = mirror.client();
        client.write_durably(round * MIB, &noise(&mut random, 4096)).expect("a write");
        drop(client);
        match round {
            0 => mirror.primary.stop(),
            1 => mirror.primary.kill(),
            2 => {
                wait_until_noted(&mirror.primary);
                mirror.primary.kill();
            }
            _ => {
                mirror.replicas[0].kill();
                mirror.replicas[0].start();
                continue;
            }
        }
        mirror.primary.start();
        mirror.assert_identical();
    }
    mirror.assert_identical();
    for host in [&mirror.primary, mirror.replica()] {
        assert!(!host.log().contains("something else"), "{}", host.log());
    }
}

#[test]
fn a_replicas_image_that_was_written_while_its_agent_was_away_is_repaired() {
    for is_killed in [false, true] {
        let mut mirror = mirrored(&["b"]);
        if is_killed {
            wait_until_noted(mirror.replica());
            mirror.replicas[0].kill();
            let_go(mirror.replica());
        } else {
            mirror.replicas[0].stop();
        }
        touch(&mirror.replica().backing());
        mirror.primary.link().cut();
        mirror.replicas[0].link().cut();
        mirror.replicas[0].start();
        let status = mirror.replica().wait_until("it is named", is_named);
        assert_eq!(status.facts.data, Some(CopyState::Consistent));
        mirror.replicas[0].link().mend();
        mirror.primary.link().mend();
        mirror.replica().wait_until("all is compared", |status| !is_named(status));
        mirror.wait_for_peer("b", "b is in sync", |peer| peer.state == Some(PeerState::InSync));
        assert_eq!(first_difference(&mirror.primary.backing(), &mirror.replica().backing()), None);
    }
}

#[test]
fn a_replica_that_something_else_changed_is_not_promoted_without_force() {
    let mut mirror = mirrored(&["b"]);
    mirror.replicas[0].stop();
    touch(&mirror.replica().backing());
    mirror.primary.stop();
    mirror.replicas[0].start();
    mirror.replica().refuse(&["promote", "data"], 5, &["was changed by something else", "--force"]);
    mirror.replica().succeed(&["promote", "data", "--force"]);
    mirror.primary.start();
    assert_identical(mirror.replica(), &mirror.primary);
}

/// Demotes the primary.
fn demote(mirror: &Mirror) {
    until("nobody has the device open", || {
        let said = mirror.primary.tool(&["demote", "data"]);
        if said.code == 0 { Ok(()) } else { Err(said.error) }
    });
}

/// The run that noticed it was the only one that knew: the next one said that this copy had everything, promoted it without
/// force, and overwrote the good one.
#[test]
fn a_replica_that_something_else_changed_is_known_as_such_by_each_later_run() {
    let mut mirror = mirrored(&["b"]);
    demote(&mirror);
    mirror.replicas[0].stop();
    mirror.primary.stop();
    touch(&mirror.replica().backing());
    for is_killed in [false, true, false] {
        mirror.replicas[0].start();
        let b = mirror.replica();
        let status = b.wait_until("it is named", is_named);
        assert!(!status.verdict.contains("this copy has everything"), "{}", status.verdict);
        assert!(status.action.contains("--force"), "{}", status.action);
        b.refuse(&["promote", "data"], 5, &["was changed by something else", "--force"]);
        match is_killed {
            true => {
                wait_until_noted(b);
                mirror.replicas[0].kill();
                let_go(mirror.replica());
            }
            false => mirror.replicas[0].stop(),
        }
    }
    let offline = mirror.replica().tool(&["status", "data"]);
    assert!(offline.output.contains("something else wrote to it"), "{}", offline.output);
    // The one that has everything is the better one, and what it has is not lost.
    let before = fs::read(mirror.primary.backing()).expect("a's content");
    mirror.replicas[0].start();
    mirror.primary.start();
    let b = mirror.replica();
    b.refuse(&["promote", "data"], 5, &["on a: blockmirror promote data", "was changed by something else"]);
    mirror.primary.succeed(&["promote", "data"]);
    mirror.assert_identical();
    assert!(fs::read(mirror.primary.backing()).expect("a's content") == before, "a lost what only it had");
    let b = mirror.replica();
    b.wait_until("all is compared", |status| !is_named(status));
    // What was compared once is not doubted again.
    mirror.replicas[0].stop();
    mirror.replicas[0].start();
    assert!(!is_named(&mirror.replica().status()));
    mirror.assert_identical();
}

/// It was taken for a copy as good as any other, and the good one was compared with it.
#[test]
fn nothing_is_recovered_from_a_replica_that_something_else_changed_unless_that_is_wanted() {
    let mut mirror = mirrored(&["b", "c"]);
    mirror.replicas[0].stop();
    touch(&mirror.replicas[0].backing());
    mirror.primary.stop();
    let recover = |mirror: &Mirror, from: usize, name: &str, more: &[&str]| {
        let (from, target) = (&mirror.replicas[from], mirror.primary.path(name));
        let address = from.link().address().to_string();
        let arguments = ["recover", "data", "--from", &address, "--to", text(&target), "--retry", "0s"];
        let said = mirror.primary.tool(&[&arguments[..], more].concat());
        if said.code == 0 {
            assert_eq!(first_difference(&from.backing(), &target), None);
        }
        said
    };
    for _ in 0..2 {
        mirror.replicas[0].start();
        let said = recover(&mirror, 0, "recovered.img", &[]);
        assert!(
            said.code == 5 && said.error.contains("c has later content than this peer"),
            "{}",
            said.error
        );
        mirror.replicas[0].stop();
    }
    assert_eq!(recover(&mirror, 1, "good.img", &[]).code, 0);
    // Also where there is no better one.
    mirror.replicas[1].stop();
    mirror.replicas[0].start();
    let said = recover(&mirror, 0, "recovered.img", &[]);
    assert!(said.code == 5 && said.error.contains("was changed by something else"), "{}", said.error);
    assert!(said.error.contains("--accept-inconsistent"), "{}", said.error);
    let said = recover(&mirror, 0, "recovered.img", &["--accept-inconsistent"]);
    assert_eq!(said.code, 0, "{}", said.error);
    assert!(said.output.contains("something else wrote to it"), "{}", said.output);
}

/// It was demoted when it had everything, and others were told to promote it.
#[test]
fn no_host_advises_to_promote_another_one_that_something_else_changed() {
    let mut mirror = mirrored(&["b", "c"]);
    mirror.replicas[1].stop();
    demote(&mirror);
    mirror.replicas[0].stop();
    mirror.replicas[1].start();
    mirror.replicas[1].refuse(&["promote", "data"], 5, &["on a: blockmirror promote data"]);
    mirror.primary.stop();
    touch(&mirror.primary.backing());
    for _ in 0..2 {
        mirror.primary.start();
        let said = mirror.replicas[1].tool(&["promote", "data"]);
        assert!(said.code == 5 && !said.error.contains("on a:"), "{}", said.error);
        mirror.primary.refuse(&["promote", "data"], 5, &["was changed by something else"]);
        mirror.primary.stop();
    }
}

#[test]
fn what_is_written_to_an_image_behind_the_agents_back_is_noticed_while_it_runs() {
    for is_replica in [false, true] {
        let mirror = mirrored(&["b"]);
        let host = if is_replica { mirror.replica() } else { &mirror.primary };
        wait_until_noted(host);
        touch(&host.backing());
        until("it is noticed", || {
            let log = host.log();
            if log.contains("something else wrote to it while it was open here") { Ok(()) } else { Err(log) }
        });
        until("the copies are identical", || {
            match first_difference(&mirror.primary.backing(), &mirror.replica().backing()) {
                None => Ok(()),
                Some(at) => Err(format!("they differ at {at}")),
            }
        });
        mirror.assert_identical();
    }
}

#[test]
fn a_loop_device_on_the_image_of_a_volume_is_named() {
    require!("root", "losetup");
    let mirror = mirrored(&["b"]);
    let image = mirror.replica().backing();
    let device = succeed("losetup", &["--find", "--show", "--read-only", text(&image)]);
    let named = mirror.replica().wait_until("the loop device is named", |status| {
        status.verdict.contains(&format!("losetup -d {}", device.trim()))
    });
    succeed("losetup", &["--detach", device.trim()]);
    assert_eq!(named.facts.backing_users.len(), 1);
    mirror.replica().wait_until("it is gone", |status| status.facts.backing_users.is_empty());
}

#[test]
fn a_disk_that_was_written_while_the_agent_was_stopped_or_after_it_was_killed_is_compared() {
    require!("root", "losetup");
    let folder = Folder::new();
    let image = folder.join("disk");
    File::create(&image).and_then(|file| file.set_len(SIZE_BYTES)).expect("a disk");
    let disk = folder.attach(&image);
    let mut primary = Host::new(&folder, "a");
    primary.succeed(&["create", "data", "--backing", text(&disk), "--device", "nbd"]);
    let replica = Host::new(&folder, "b");
    replica.join(&primary, &replica.backing());
    let in_sync = |primary: &Host| {
        primary.succeed(&["wait", "data", "--for", "in-sync", "--timeout", "90s"]);
    };
    in_sync(&primary);
    // What it has itself begun to write is known also where it is killed in the middle.
    for (round, when) in
        ["after it was closed here", "after the agent was killed", "after the agent was killed"]
            .into_iter()
            .enumerate()
    {
        for is_touched in [false, true] {
            let random = &mut Random::new(5 + 2 * round as u64 + u64::from(is_touched));
            let mut client = Client::connect(&primary.socket()).expect("the primary serves its device");
            client.write_durably(MIB, &noise(random, 64 << 10)).expect("a write");
            client.zero(4 * MIB, MIB).expect("zeroes");
            match round {
                0 => primary.stop(),
                1 => {
                    wait_until_noted(&primary);
                    primary.kill();
                }
                _ => primary.kill(),
            }
            until("the killed agent has let go of its disk", || {
                use std::os::unix::fs::OpenOptionsExt;
                let opened = File::options().read(true).custom_flags(libc::O_EXCL).open(&disk);
                opened.map(drop).map_err(|error| error.to_string())
            });
            let content = noise(random, 4 << 20);
            if is_touched {
                let file = File::options().write(true).open(&disk).expect("the disk");
                file.write_all_at(&content, PLACE).and_then(|()| file.sync_all()).expect("a write");
            }
            let told = primary.log().matches("something else wrote").count();
            primary.start();
            in_sync(&primary);
            let now_told = primary.log().matches("something else wrote").count();
            assert_eq!(now_told - told, usize::from(is_touched), "{when}: {}", primary.log());
            if is_touched {
                let mut copied = vec![0; content.len()];
                File::open(replica.backing())
                    .and_then(|file| file.read_exact_at(&mut copied, PLACE))
                    .expect("a read");
                assert!(copied == content, "what was written is on the replica when it counts as in sync");
                was_told(&primary, when);
            }
        }
    }
    drop((primary, replica));
}

/// What a hypervisor keeps of a host at one moment: the volume's state and its backing, with their times.
struct Snapshot {
    state: PathBuf,
    backing: PathBuf,
}

impl Snapshot {
    fn of(host: &mut Host) -> Self {
        let kept = Self { state: host.path("kept-state"), backing: host.path("kept.img") };
        host.stall();
        succeed("cp", &["--archive", text(&host.path("state/data")), text(&kept.state)]);
        succeed("cp", &["--archive", "--sparse=always", text(&host.backing()), text(&kept.backing)]);
        host.go_on();
        kept
    }

    /// Sets the host back to it. The agent does not run.
    fn restore(&self, host: &Host) {
        let state = host.path("state/data");
        fs::remove_dir_all(&state).expect("the state");
        succeed("cp", &["--archive", text(&self.state), text(&state)]);
        // Into the file that there is: the same file system and the same file, as after a hypervisor's restore.
        succeed("cp", &["--preserve=timestamps", text(&self.backing), text(&host.backing())]);
    }
}

/// What is set back lacks this, which all hosts have.
fn write_after_the_snapshot(mirror: &Mirror) {
    mirror.wait_until_in_sync();
    let mut client = mirror.client();
    client.write_durably(PLACE, &noise(&mut Random::new(8), MIB)).expect("a write after the snapshot");
    drop(client);
    mirror.wait_until_quiet();
}

/// Its marker was sent and not read: the primary called a copy of last week "in sync", by a map of today.
#[test]
fn a_replica_that_was_set_back_is_brought_up_to_date() {
    // Its host stops in order, or goes down, or is set back while the primary is down as well.
    for case in ["stopped", "killed", "both"] {
        let mut mirror = mirrored(&["b"]);
        let snapshot = Snapshot::of(mirror.replica_mut());
        write_after_the_snapshot(&mirror);
        if case == "both" {
            mirror.primary.stop();
        }
        match case {
            "stopped" => mirror.replica_mut().stop(),
            _ => mirror.replica_mut().kill(),
        }
        let_go(mirror.replica());
        snapshot.restore(mirror.replica());
        mirror.replica_mut().start();
        if case == "both" {
            mirror.primary.start();
        }
        println!("{case}");
        mirror.assert_identical();
    }
}

/// A replica that has what its primary lacks.
fn is_split(status: &VolumeStatus) -> bool {
    status.state == VolumeState::SplitBrain
}

/// Waits until the primary has recorded that it told its replicas of nothing after the last epoch, as it does when nothing
/// is written any more.
fn wait_until_it_rests(primary: &Host) {
    until("the primary tells of nothing ahead", || {
        let bytes = fs::read(primary.state(superblock::FILE_NAME)).map_err(|error| error.to_string())?;
        let (_, superblock) = Superblock::recover(&bytes).map_err(|error| error.to_string())?;
        let newest = superblock.lineage.first().copied().unwrap_or_default();
        let (end, open) = (superblock.ends.of(newest), primary.status().facts.epoch);
        if end.map(|end| end.0) == open { Ok(()) } else { Err(format!("{end:?} and {open:?}")) }
    });
}

/// A mirror whose primary was set back behind a write that was answered and mirrored.
fn with_a_primary_set_back() -> Mirror {
    let mut mirror = mirrored(&["b"]);
    wait_until_it_rests(&mirror.primary);
    let snapshot = Snapshot::of(&mut mirror.primary);
    write_after_the_snapshot(&mirror);
    mirror.primary.kill();
    let_go(&mirror.primary);
    snapshot.restore(&mirror.primary);
    mirror.primary.start();
    mirror
}

/// Its replica had more of the same generation, and was called in sync over it; or lost it to the next copy.
#[test]
fn what_a_primary_lost_that_was_set_back_is_not_overwritten_on_its_replica() {
    for kept in ["a", "b"] {
        let mirror = with_a_primary_set_back();
        let (a, b) = (&mirror.primary, mirror.replica());
        let before = fs::read(b.backing()).expect("b's content");
        a.wait_until("the split is told", is_split);
        let told = b.wait_until("the split is told there", is_split);
        assert!(told.verdict.contains("set back"), "{}", told.verdict);
        // What it writes now is no reason to take it for newer.
        let mut client = mirror.client();
        client.write_durably(MIB, &noise(&mut Random::new(9), 4096)).expect("a write");
        drop(client);
        assert!(fs::read(b.backing()).expect("b's content") == before, "b was written to");
        match kept {
            "a" => {
                b.succeed(&["resolve", "data", "--keep", "a"]);
                mirror.assert_identical();
            }
            _ => {
                until("nobody has the device open", || {
                    let said = a.tool(&["demote", "data"]);
                    if said.code == 0 { Ok(()) } else { Err(said.error) }
                });
                a.succeed(&["resolve", "data", "--keep", "b"]);
                b.succeed(&["promote", "data", "--force"]);
                assert_identical(b, a);
                assert!(fs::read(b.backing()).expect("b's content") == before, "b lost what only it had");
            }
        }
    }
}

/// The map of its successor said that it had everything, as it did when it was demoted.
#[test]
fn a_primary_of_before_that_was_set_back_is_brought_up_to_date() {
    let mut mirror = mirrored(&["b"]);
    let snapshot = Snapshot::of(&mut mirror.primary);
    write_after_the_snapshot(&mirror);
    until("nobody has the device open", || {
        let said = mirror.primary.tool(&["switch", "data", "--to", "b"]);
        if said.code == 0 { Ok(()) } else { Err(said.error) }
    });
    mirror.primary.kill();
    let_go(&mirror.primary);
    snapshot.restore(&mirror.primary);
    mirror.primary.start();
    assert_identical(mirror.replica(), &mirror.primary);
}

/// Status said no more of it than what opening had failed with.
#[test]
fn an_image_that_was_cut_off_is_named_with_both_sizes_and_taken_up_when_it_has_its_size_again() {
    let mut mirror = mirrored(&["b"]);
    let image = mirror.replica().backing();
    let resize = |size_bytes| {
        let file = File::options().write(true).open(&image).expect("the backing");
        file.set_len(size_bytes).expect("another size");
    };
    mirror.replica_mut().stop();
    resize(8 * MIB);
    mirror.replica_mut().start();
    let status = mirror.replica().wait_until("it is named", |status| status.facts.health.shrunk.is_some());
    assert_eq!(status.state, VolumeState::Failed);
    assert!(status.verdict.contains("it has 8388608 bytes, and had 33554432"), "{status:?}");
    assert!(status.action.contains("33554432 bytes long again and it is opened by itself"), "{status:?}");
    resize(SIZE_BYTES);
    mirror.assert_identical();
    let status = mirror.replica().status();
    assert_eq!((status.state, status.facts.health.shrunk), (VolumeState::Following, None));
}

/// A loop device that becomes as large as its image is made.
struct Device {
    path: PathBuf,
    image: PathBuf,
}

impl Device {
    fn new(mirror: &Folder) -> Self {
        let image = mirror.join("device.img");
        File::create(&image).and_then(|file| file.set_len(SIZE_BYTES)).expect("an image");
        Self { path: mirror.attach(&image), image }
    }

    fn resize(&self, size_bytes: u64) {
        let file = File::options().write(true).open(&self.image).expect("the image");
        file.set_len(size_bytes).expect("another size");
        succeed("losetup", &["--set-capacity", text(&self.path)]);
    }
}

/// Its applications were told that there is no space left, and status said to make room.
#[test]
fn a_primarys_device_that_became_smaller_is_named_and_another_host_can_go_on() {
    require!("root");
    let folder = Folder::new();
    let device = Device::new(&folder);
    let primary = Host::new(&folder, "a");
    primary.succeed(&["create", "data", "--backing", text(&device.path), "--device", "nbd"]);
    let mut mirror = Mirror { primary, replicas: Vec::new(), folder };
    mirror.add("b");
    let content = noise(&mut Random::new(3), SIZE_BYTES);
    let mut client = mirror.client();
    for (number, part) in content.chunks(MIB as usize).enumerate() {
        client.write(number as u64 * MIB, part).expect("a write");
    }
    client.flush().expect("a flush");
    mirror.wait_until_quiet();
    device.resize(8 * MIB);
    let (a, b) = (&mirror.primary, mirror.replica());
    let sizes = "it has 8388608 bytes, and had 33554432";
    let status = a.wait_until("it is named", |status| status.facts.health.shrunk.is_some());
    assert_eq!(status.state, VolumeState::Degraded);
    assert!(status.verdict.contains(sizes), "{status:?}");
    assert!(status.action.contains("blockmirror switch data --to b"), "{status:?}");
    client.read(9 * MIB, 4096).expect_err("a read beyond its end");
    let errors = a.status().facts.health.errors.expect("it is counted");
    assert_eq!((errors.reads, errors.no_room), (1, 0), "{errors:?}");
    assert!(errors.last.contains("the device has 8388608 bytes now, and had 33554432"), "{errors:?}");
    drop(client);
    until("nobody has the device open", || {
        let said = a.tool(&["switch", "data", "--to", "b"]);
        if said.code == 0 { Ok(()) } else { Err(said.error) }
    });
    let status = a.wait_until("it is not opened", |status| status.facts.health.is_closed);
    assert_eq!(status.state, VolumeState::Failed);
    assert!(status.verdict.contains(sizes), "{status:?}");
    // What it lost reads as zeroes now, also where nothing was written since.
    device.resize(SIZE_BYTES);
    b.wait_until("a follows", |status| status.state == VolumeState::Healthy);
    assert_eq!(first_difference(&device.image, &b.backing()), None, "in sync over a copy that lost content");
    was_told(a, "it was smaller for a while");
}

/// What it lost was called in sync once the device had its size again.
#[test]
fn a_replicas_device_that_was_smaller_for_a_while_is_compared() {
    require!("root");
    let mut mirror = Mirror::new(SIZE_BYTES, "nbd", &[]);
    let device = Device::new(&mirror.folder);
    let replica = Host::new(&mirror.folder, "b");
    replica.join(&mirror.primary, &device.path);
    mirror.replicas.push(replica);
    let mut client = mirror.client();
    client.write_durably(PLACE, &noise(&mut Random::new(5), 4096)).expect("a write");
    mirror.wait_until_quiet();
    device.resize(8 * MIB);
    let b = mirror.replica();
    let status = b.wait_until("it is named", |status| status.facts.health.shrunk.is_some());
    assert!(status.verdict.contains("it has 8388608 bytes, and had 33554432"), "{status:?}");
    device.resize(SIZE_BYTES);
    let words = "it was smaller for a while";
    until("it is noticed", || if b.log().contains(words) { Ok(()) } else { Err(b.log()) });
    b.wait_until("all was compared", |status| status.facts.touched.is_none());
    mirror.wait_until_quiet();
    let difference = first_difference(&mirror.primary.backing(), &device.image);
    assert_eq!(difference, None, "in sync over a copy that lost content");
    assert!(!b.log().contains("something else wrote"), "{}", b.log());
}

/// Nothing was said of it, and of an image that something else had written to it.
#[test]
fn a_device_or_an_image_that_became_larger_is_named_with_both_sizes() {
    require!("root");
    let mut mirror = Mirror::new(SIZE_BYTES, "nbd", &["b"]);
    let device = Device::new(&mirror.folder);
    let replica = Host::new(&mirror.folder, "c");
    replica.join(&mirror.primary, &device.path);
    mirror.replicas.push(replica);
    mirror.wait_until_quiet();
    device.resize(SIZE_BYTES + 8 * MIB);
    let [b, c] = &mut mirror.replicas[..] else { panic!("there are two") };
    let status = c.wait_until("it is named", |status| status.facts.health.grown.is_some());
    assert_eq!(status.state, VolumeState::Following, "{status:?}");
    let sizes = "it has 41943040 bytes, and had 33554432";
    assert!(status.verdict.contains(&format!("has become larger: {sizes}")), "{status:?}");
    b.stop();
    let image = File::options().write(true).open(b.backing()).expect("the backing");
    image.set_len(SIZE_BYTES + 8 * MIB).expect("another size");
    b.start();
    was_told(b, &format!("something else made it larger after it was closed here: {sizes}"));
    b.wait_until("all was compared", |status| status.facts.touched.is_none());
    mirror.wait_until_quiet();
    assert_eq!(mirror.replicas[1].status().facts.touched, None, "the device was not written to");
}
