//! The primary's disk is gone: its content comes back from the replica, and the volume goes on.

use blockmirror_agent::config::ConfigFolder;
use blockmirror_agent::control::api::{CopyState, PeerState, VolumeState};
use blockmirror_protocol::disk::recovery::RecoveryState;
use blockmirror_tests::harness::random::Random;
use blockmirror_tests::machines::content::{first_difference, noise, stamped};
use blockmirror_tests::machines::folder::Folder;
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::patience::until;
use blockmirror_tests::machines::programs::{succeed, text};
use blockmirror_tests::require;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

fn fill(mirror: &Mirror, size_bytes: u64) {
    let mut random = Random::new(1);
    let mut client = mirror.client();
    for offset in (0..size_bytes).step_by(MIB as usize) {
        client.write(offset, &noise(&mut random, MIB)).expect("a write");
    }
    client.flush().expect("a flush");
}

/// How much is durable in the target of an unfinished recovery, as its state beside the target says.
fn recovered_bytes(target: &Path) -> u64 {
    let folder = fs::read_dir(target.parent().expect("a folder")).expect("a folder");
    let paths = folder.map(|entry| entry.expect("an entry").path());
    let mut states = paths.filter_map(|path| RecoveryState::decode(&fs::read(path).ok()?).ok());
    states.next().map_or(0, |state| state.done_bytes())
}

#[test]
fn a_destroyed_backing_is_recovered_in_spite_of_three_kills() {
    const SIZE_BYTES: u64 = 512 * MIB;
    let mut mirror = Mirror::new(SIZE_BYTES, "nbd", &["b"]);
    fill(&mirror, SIZE_BYTES);
    mirror.assert_identical();
    mirror.primary.kill();
    let target = mirror.primary.backing();
    until("the killed agent has let go of its backing", || {
        let file = fs::File::open(&target).expect("a backing");
        file.try_lock().map_err(|error| error.to_string())
    });
    fs::remove_file(&target).expect("the disk is gone");

    // The replica serves a recovery once it has noticed that its primary is gone.
    mirror.replica().wait_until("the primary is gone", |status| status.verdict.contains("is not connected"));
    let link = mirror.replica().link();
    let address = link.address().to_string();
    let arguments = ["recover", "data", "--from", &address, "--to", text(&target)];
    for _ in 0..3 {
        let had = recovered_bytes(&target);
        let before = link.bytes_from_host();
        let mut running = mirror.primary.begin(&arguments);
        until("a part has arrived", || {
            assert!(!running.has_ended(), "the recovery is killed before its end");
            let arrived = link.bytes_from_host() - before;
            if arrived >= 150 * MIB { Ok(()) } else { Err(format!("{arrived} bytes")) }
        });
        let gone = || mirror.replica().log().matches("a recovery has gone away").count();
        let gone_before = gone();
        link.cut();
        until("what has arrived is noted", || {
            let has = recovered_bytes(&target);
            if has > had { Ok(()) } else { Err(format!("{has} bytes")) }
        });
        drop(running);
        link.mend();
        // Until then it sends on what nobody takes, which would count as arrived.
        until("the replica has noticed it", || {
            if gone() > gone_before { Ok(()) } else { Err(gone().to_string()) }
        });
    }
    let had = recovered_bytes(&target);
    let said = mirror.primary.tool(&[&arguments[..], &["--json"]].concat());
    assert_eq!(said.code, 0, "{said:?}");
    assert!(said.error.contains("going on where it was interrupted"), "{said:?}");
    let report: serde_json::Value = serde_json::from_str(&said.output).expect("JSON");
    // Of content, that is: datagrams that a busy host loses are sent again.
    assert_eq!(report["copied_bytes"], SIZE_BYTES - had, "what was there is not copied again");
    assert_eq!(first_difference(&target, &mirror.replica().backing()), None);

    mirror.primary.start();
    mirror.client().write_durably(3 * MIB, &stamped(1)).expect("the volume goes on");
    mirror.assert_identical();
}

#[test]
fn an_empty_backing_under_the_old_name_is_not_taken_for_the_volume() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    fill(&mirror, 16 * MIB);
    mirror.assert_identical();
    mirror.primary.stop();
    let backing = mirror.primary.backing();
    fs::remove_file(&backing).expect("the disk is gone");
    fs::File::create(&backing).and_then(|file| file.set_len(16 * MIB)).expect("another disk");
    mirror.primary.start();
    let status = mirror.primary.status();
    assert!(status.facts.backing_error.is_some(), "{status:?}");
    let address = mirror.replica().link().address().to_string();
    assert!(status.action.contains("blockmirror rebuild data --backing PATH --from b"), "{status:?}");
    let replica = fs::read(mirror.replica().backing()).expect("the replica's backing");
    assert!(replica.iter().any(|byte| *byte != 0), "nothing was copied from the empty disk");

    // Fetching it first works as well, into the new disk.
    mirror.primary.succeed(&["recover", "data", "--from", &address, "--to", text(&backing)]);
    mirror.primary.stop();
    mirror.primary.start();
    mirror.assert_identical();
    assert!(fs::read(&backing).expect("the primary's backing") == replica);
}

#[test]
fn a_backing_whose_recovery_was_interrupted_is_not_served() {
    // Served under maps that say that nothing differs, its old half would have counted as in sync.
    let mut mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    fill(&mirror, 64 * MIB);
    mirror.assert_identical();
    mirror.primary.stop();
    let (backing, address) = (mirror.primary.backing(), mirror.replica().link().address().to_string());
    let recover =
        ["recover", "data", "--from", &address, "--to", text(&backing), "--overwrite", "--retry", "0s"];
    recover_in_two_runs(&mut mirror.primary, &recover);
    mirror.primary.start();
    mirror.assert_identical();
}

#[test]
fn a_volume_moves_to_the_disk_that_it_was_recovered_into() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    fill(&mirror, 16 * MIB);
    mirror.assert_identical();
    mirror.primary.stop();
    let address = mirror.replica().link().address().to_string();
    let other = mirror.primary.path("other.img");
    mirror.primary.succeed(&["recover", "data", "--from", &address, "--to", text(&other)]);
    let folder = ConfigFolder::new(mirror.primary.path("config"));
    let mut volume = folder.load_volume(&"data".parse().expect("a name")).expect("the volume's file");
    volume.backing = other.clone();
    folder.save_volume(&volume).expect("the volume's file");
    mirror.primary.start();
    assert_eq!(mirror.primary.status().facts.backing_error, None);
    mirror.wait_until_in_sync();
    let replica = fs::read(mirror.replica().backing()).expect("the replica's backing");
    assert!(fs::read(&other).expect("the new backing") == replica);
}

#[test]
fn a_replicas_backing_whose_recovery_was_interrupted_is_not_opened_either() {
    // A replica that counts as consistent could be promoted, and its primary would copy only what its map says.
    let mut mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    fill(&mirror, 64 * MIB);
    mirror.assert_identical();
    mirror.primary.succeed(&["demote", "data"]);
    mirror.replica_mut().stop();
    let (backing, address) = (mirror.replica().backing(), mirror.primary.link().address().to_string());
    let recover =
        ["recover", "data", "--from", &address, "--to", text(&backing), "--overwrite", "--retry", "0s"];
    recover_in_two_runs(mirror.replica_mut(), &recover);
    mirror.replica_mut().start();
    until("the recovery that was killed is known to be gone", || {
        let said = mirror.primary.tool(&["promote", "data"]);
        if said.code == 0 { Ok(()) } else { Err(said.error) }
    });
    mirror.assert_identical();
}

#[test]
fn a_recovery_into_another_volumes_backing_is_refused() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    let mail = mirror.primary.path("mail.img");
    mirror.primary.succeed(&[
        "create",
        "mail",
        "--backing",
        text(&mail),
        "--size",
        "16M",
        "--device",
        "none",
    ]);
    mirror.primary.stop();
    fs::write(&mail, noise(&mut Random::new(2), 16 * MIB)).expect("the other volume's content");
    let before = fs::read(&mail).expect("the other volume's content");
    let address = mirror.replica().link().address().to_string();
    let recover = ["recover", "data", "--from", &address, "--to", text(&mail), "--overwrite"];
    mirror.primary.refuse(&recover, 5, &["the backing of another volume on this host", "mail.toml"]);
    assert!(fs::read(&mail).expect("the other volume's content") == before, "nothing is lost");
}

#[test]
fn a_recovery_into_the_disk_of_another_volumes_partition_is_refused() {
    require!("root", "losetup", "sfdisk", "partx");
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    let folder = Folder::new();
    let image = folder.join("disk");
    File::create(&image).and_then(|file| file.set_len(64 * MIB)).expect("a disk");
    let script =
        format!("printf 'start=2048, size=32768\\nstart=40960, size=32768\\n' | sfdisk -q {}", text(&image));
    succeed("sh", &["-c", &script]);
    let disk = PathBuf::from(succeed("losetup", &["--find", "--show", "--partscan", text(&image)]).trim());
    // A kernel that reads no partition tables learns of them from partx; detaching takes them away.
    succeed("partx", &["--update", text(&disk)]);
    let partition = |number: u32| format!("{}p{number}", disk.display());
    if !Path::new(&partition(1)).exists() {
        return eprintln!("skipped: needs nodes of partitions in /dev");
    }
    mirror.primary.succeed(&["create", "mail", "--backing", &partition(1), "--device", "none"]);
    mirror.primary.stop();
    let file = mirror.primary.path("config/volumes/mail.toml");
    let address = mirror.replica().link().address().to_string();
    let recover =
        |to: &str| ["recover", "data", "--from", &address, "--overwrite", "--to", to].map(str::to_owned);
    let refused = |mirror: &Mirror, to: &str, by: &str| {
        let arguments = recover(to);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        mirror.primary.refuse(&arguments, 5, &["shares a disk with, the backing of another volume", by]);
    };
    refused(&mirror, text(&disk), "mail.toml");
    refused(&mirror, &partition(1), "mail.toml");
    // By what is on record, without the configuration.
    fs::rename(&file, mirror.primary.path("aside")).expect("the volume's file");
    refused(&mirror, text(&disk), "mail");
    mirror.primary.succeed(&["recover", "data", "--from", &address, "--to", &partition(2)]);
}

#[test]
fn a_recovery_is_on_record_though_the_volumes_configuration_was_moved_away() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    fill(&mirror, 16 * MIB);
    mirror.assert_identical();
    mirror.primary.stop();
    let (file, aside) = (mirror.primary.path("config/volumes/data.toml"), mirror.primary.path("data.toml"));
    fs::rename(&file, &aside).expect("the volume's file");
    let (backing, token) = (mirror.primary.backing(), mirror.replica().invite());
    mirror.primary.succeed(&["recover", "data", "--token", &token, "--to", text(&backing), "--overwrite"]);
    assert!(record(&mirror.primary).starts_with("recovered from"));
    fs::rename(&aside, &file).expect("the volume's file");
    mirror.primary.start();
    mirror.assert_identical();
}

#[test]
fn a_recovery_that_the_volume_cannot_learn_of_leaves_the_backing_as_it_is() {
    // Emptied and not on record, it would have been served as the volume.
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    fill(&mirror, 16 * MIB);
    mirror.assert_identical();
    mirror.primary.stop();
    let (backing, obstacle) = (mirror.primary.backing(), mirror.primary.state("backing"));
    fs::remove_file(&obstacle).and_then(|()| fs::create_dir(&obstacle)).expect("an obstacle");
    let before = fs::read(&backing).expect("the backing");
    let address = mirror.replica().link().address().to_string();
    let recover = ["recover", "data", "--from", &address, "--to", text(&backing), "--overwrite"];
    mirror.primary.refuse(&recover, 1, &["cannot read"]);
    assert!(fs::read(&backing).expect("the backing") == before, "nothing is lost");
}

/// A volume on `a` with the replicas `b` and `c`, of which `b` was away while a block was written durably and `c` got it.
/// `a` was killed since and its disk is gone; `c` is stopped, and `b` runs. Gives what `c` holds.
fn left_behind(is_noticed: bool) -> (Mirror, Vec<u8>) {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b", "c"]);
    fill(&mirror, 16 * MIB);
    mirror.assert_identical();
    let mut client = mirror.client();
    if is_noticed {
        mirror.replicas[0].stop();
        mirror.wait_until_lost("b");
    } else {
        // The block is of the same generation as what `b` has.
        mirror.replicas[0].link().cut();
    }
    for stamp in 1..4 {
        client.write_durably(3 * MIB, &stamped(stamp)).expect("a write");
    }
    let backing = mirror.replicas[1].backing();
    until("c has what was written", || {
        let block = fs::read(&backing).expect("the backing")[3 * MIB as usize..][..4096].to_vec();
        if block == stamped(3) { Ok(()) } else { Err("not yet".to_owned()) }
    });
    mirror.wait_for_peer("c", "c has everything", |peer| peer.lag_bytes == Some(0));
    mirror.primary.kill();
    until("the killed agent has let go of its backing", || {
        let file = fs::File::open(mirror.primary.backing()).expect("a backing");
        file.try_lock().map_err(|error| error.to_string())
    });
    fs::remove_file(mirror.primary.backing()).expect("the disk is gone");
    mirror.replicas[1].stop();
    if is_noticed {
        mirror.replicas[0].start();
    } else {
        mirror.replicas[0].link().mend();
        mirror.replicas[0]
            .wait_until("the primary is gone", |status| status.verdict.contains("is not connected"));
    }
    let holds = fs::read(&backing).expect("the backing");
    (mirror, holds)
}

/// The arguments of a recovery of the primary's disk from `b`.
fn from_b(mirror: &Mirror) -> Vec<String> {
    let (from, to) = (mirror.replica().link().address().to_string(), mirror.primary.backing());
    ["recover", "data", "--from", &from, "--to", text(&to)].map(str::to_owned).to_vec()
}

fn recover_from_b(mirror: &Mirror, more: &[&str]) -> String {
    let arguments = from_b(mirror);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).chain(more.iter().copied()).collect();
    let said = mirror.primary.tool(&arguments);
    assert_eq!(said.code, 0, "{said:?}");
    said.error
}

fn is_split(mirror: &Mirror, name: &str) {
    mirror.wait_for_peer(name, "the split is told", |peer| {
        matches!(peer.state, Some(PeerState::SplitBrain | PeerState::Stranger))
    });
}

#[test]
fn a_primary_that_was_recovered_from_an_older_copy_overwrites_no_newer_one() {
    // It claimed the newest generation with the content of an older one, and all hosts were told to be in sync.
    for is_noticed in [true, false] {
        let (mut mirror, holds) = left_behind(is_noticed);
        let said = recover_from_b(&mirror, &[]);
        assert!(said.contains("c did not say how up to date it is"), "{said}");
        mirror.primary.start();
        mirror.wait_for_peer("b", "b follows", |peer| peer.state == Some(PeerState::InSync));
        mirror.client().write_durably(5 * MIB, &stamped(9)).expect("the volume goes on");
        mirror.replicas[1].start();
        is_split(&mirror, "c");
        let c = &mirror.replicas[1];
        c.wait_until("the split is told", |status| status.state == VolumeState::SplitBrain);
        assert!(fs::read(c.backing()).expect("the backing") == holds, "what only c has is kept");

        // The operator decides for what was recovered; what c had can still be brought back.
        c.succeed(&["resolve", "data", "--keep", "a"]);
        mirror.assert_identical();
        assert!(mirror.replicas[1].status().facts.succession.history.is_some());
    }
}

#[test]
fn a_recovered_primary_whose_operator_decides_for_the_newer_copy_gets_it() {
    let (mut mirror, holds) = left_behind(false);
    recover_from_b(&mirror, &[]);
    mirror.primary.start();
    mirror.replicas[1].start();
    is_split(&mirror, "c");
    mirror.wait_for_peer("b", "it follows what was recovered", |peer| peer.state == Some(PeerState::InSync));
    mirror.primary.succeed(&["demote", "data"]);
    let c = &mirror.replicas[1];
    mirror.primary.succeed(&["resolve", "data", "--keep", "c"]);
    c.succeed(&["promote", "data", "--force"]);
    // What b follows is a history of its own by now.
    mirror.replica().succeed(&["resolve", "data", "--keep", "c"]);
    c.wait_until("all are in sync", |status| status.state == VolumeState::Healthy);
    for host in [&mirror.primary, mirror.replica(), c] {
        assert!(fs::read(host.backing()).expect("the backing") == holds, "{} has it", host.name());
    }
}

#[test]
fn a_recovery_from_a_copy_that_is_not_the_newest_is_refused() {
    let (mut mirror, holds) = left_behind(true);
    mirror.replicas[1].start();
    let arguments = from_b(&mirror);
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let c = mirror.replicas[1].link().address().to_string();
    let advice =
        format!("c has later content than this peer; recover from it: blockmirror recover data --from {c}");
    mirror.primary.refuse(&arguments, 5, &[&advice, "--accept-older"]);
    let backing = mirror.primary.backing();
    assert!(!backing.exists(), "nothing was begun");
    mirror.primary.succeed(&["recover", "data", "--from", &c, "--to", text(&backing)]);
    mirror.primary.start();
    mirror.assert_identical();
    assert!(fs::read(&backing).expect("the backing") == holds);
}

#[test]
fn what_an_earlier_release_or_a_mixture_filled_is_no_source_for_a_host_with_another_copy() {
    for (content, is_known) in [("", false), (" holding a mixture", true)] {
        let (mut mirror, holds) = left_behind(true);
        recover_from_b(&mirror, &[]);
        let line = record(&mirror.primary);
        let (from, rest) = line.split_once(" holding ").expect("what was recovered is on record");
        let (_, into) = rest.split_once(" into ").expect("the target is on record");
        fs::write(mirror.primary.state("backing"), format!("{from}{content} into {into}")).expect("a record");
        mirror.primary.start();
        mirror.replicas[1].start();
        is_split(&mirror, "c");
        assert!(fs::read(mirror.replicas[1].backing()).expect("the backing") == holds);
        if is_known {
            // Not even the host that it came from takes it unasked: its copy may be whole by now.
            is_split(&mirror, "b");
            for replica in &mirror.replicas {
                replica.succeed(&["resolve", "data", "--keep", "a"]);
            }
            mirror.assert_identical();
        }
    }
}

#[test]
fn a_replica_that_was_recovered_is_as_good_as_what_it_was_recovered_from() {
    let (mut mirror, _) = left_behind(true);
    let (backing, b) = (mirror.replicas[1].backing(), mirror.replicas[0].link().address().to_string());
    fs::remove_file(&backing).expect("the disk is gone");
    mirror.replicas[1].succeed(&["recover", "data", "--from", &b, "--to", text(&backing)]);
    mirror.replicas[1].start();
    let c = &mirror.replicas[1];
    assert_eq!(c.status().facts.data, Some(CopyState::Consistent));
    assert_eq!(c.status().facts.epoch, mirror.replica().status().facts.epoch, "it claims no more");
    c.succeed(&["promote", "data", "--force"]);
    let mut client = blockmirror_tests::machines::nbd::Client::connect(&c.socket()).expect("it serves");
    client.write_durably(7 * MIB, &stamped(5)).expect("a write");
    until("b follows it", || match first_difference(&c.backing(), &mirror.replica().backing()) {
        None => Ok(()),
        Some(at) => Err(format!("they differ at {at}")),
    });
}

#[test]
fn a_token_is_not_used_up_by_a_recovery_that_is_refused() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    fill(&mirror, 16 * MIB);
    mirror.assert_identical();
    let (token, target) = (mirror.replica().invite(), mirror.primary.path("other.img"));
    let recover =
        ["recover", "data", "--token", &token, "--to", text(&target), "--retry", "0s", "--accept-older"];
    mirror.primary.refuse(&recover, 5, &["the primary is connected"]);
    mirror.primary.stop();
    mirror.replica().wait_until("the primary is gone", |status| status.verdict.contains("is not connected"));
    mirror.primary.succeed(&recover);
    assert_eq!(first_difference(&target, &mirror.replica().backing()), None);
    mirror.primary.refuse(&[&recover[..], &["--overwrite"]].concat(), 5, &["used already"]);
}

/// Begins a recovery into the backing of a host whose agent is stopped, interrupts it, sees that the volume is not opened
/// then, and completes it. A first run that ends before it is interrupted shows less.
fn recover_in_two_runs(host: &mut Host, recover: &[&str]) {
    let mut running = host.begin(recover);
    until("the recovery has begun", || {
        let record = record(host);
        if running.has_ended() || record.starts_with("being recovered") { Ok(()) } else { Err(record) }
    });
    drop(running);
    if record(host).starts_with("being recovered") {
        host.start();
        let error = host.status().facts.backing_error.expect("it is refused");
        assert!(error.contains("is not complete: run `blockmirror recover` again"), "{error}");
        host.stop();
    }
    host.succeed(recover);
    assert!(record(host).starts_with("recovered from"));
}

/// What a host's state folder says of its backing.
fn record(host: &Host) -> String {
    fs::read_to_string(host.state("backing")).unwrap_or_default()
}
