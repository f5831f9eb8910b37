//! What status tells: it is never calmer than reality.

use blockmirror_agent::control::api::VolumeState;
use blockmirror_agent::crashes;
use blockmirror_tests::machines::folder::Folder;
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::nbd::Client;
use blockmirror_tests::machines::programs::{succeed, text};
use blockmirror_tests::require;
use std::fs;

const MIB: u64 = 1 << 20;

/// Writers got errors since the backing's file system was full, and status said "healthy" and "none".
#[test]
fn errors_that_writers_got_are_told_until_a_comparison_finds_nothing() {
    require!("root");
    let folder = Folder::new();
    let small = folder.join("small");
    fs::create_dir(&small).expect("a mount point");
    succeed("mount", &["-t", "tmpfs", "-o", "size=4m", "small", text(&small)]);
    let image = small.join("data.img");
    let primary = Host::new(&folder, "a");
    primary.succeed(&["create", "data", "--backing", text(&image), "--size", "16M", "--device", "nbd"]);
    let mut mirror = Mirror { primary, replicas: Vec::new(), folder };
    mirror.add("b");
    mirror.wait_until_quiet();
    let mut client = mirror.client();
    let mut failed = 0;
    for number in 0..8 {
        failed += u64::from(client.write(number * MIB, &[7; MIB as usize]).is_err());
    }
    assert!(failed > 0, "the file system has no room for all of it");
    let errors = |host: &Host| host.status().facts.health.errors;
    let told = errors(&mirror.primary).expect("there were errors");
    assert_eq!((told.writes, told.no_room, told.reads), (failed, failed, 0));
    succeed("mount", &["-o", "remount,size=64m", text(&small)]);
    for number in 0..8 {
        client.write(number * MIB, &[8; MIB as usize]).expect("there is room now");
    }
    mirror.primary.wait_until("all is copied", |status| {
        status.facts.peers.iter().all(|peer| peer.out_of_sync_bytes == Some(0) && peer.lag_bytes == Some(0))
    });
    let status = mirror.primary.status();
    assert_eq!(status.state, VolumeState::Degraded, "{status:?}");
    assert!(status.verdict.contains("applications got errors"), "{status:?}");
    assert!(status.action.contains("blockmirror compare data b"), "{status:?}");
    mirror.primary.succeed(&["compare", "data", "b"]);
    let status = mirror.primary.wait_until("it is healthy", |status| status.state == VolumeState::Healthy);
    assert_eq!(status.facts.health.errors, None);
    mirror.primary.stop();
}

/// The volume was not in the list at all, and the exit code was 0.
#[test]
fn a_volume_with_a_mistake_in_its_file_is_told_as_failed_with_file_and_line() {
    let folder = Folder::new();
    let mut host = Host::new(&folder, "a");
    host.create(8 * MIB, "nbd");
    let other = host.path("other.img");
    host.succeed(&["create", "other", "--backing", text(&other), "--size", "8M", "--device", "nbd"]);
    host.stop();
    let file = host.path("config/volumes/data.toml");
    let right = fs::read_to_string(&file).expect("the file");
    fs::write(&file, format!("on_replica_loss = \"blok\"\n{right}")).expect("the file");
    host.start();
    let place = format!("{}:1", text(&file));
    for arguments in [&["status"][..], &["status", "data"]] {
        let said = host.tool(arguments);
        assert_eq!(said.code, 1, "{said:?}");
        assert!(said.output.contains(&place) && said.error.contains(&place), "{said:?}");
    }
    host.refuse(&["promote", "data"], 1, &[&place]);
    Client::connect(&host.path("run/other.nbd")).expect("the other one is served");
    fs::write(&file, right).expect("the file");
    host.stop();
    host.start();
    assert_eq!(host.status().state, VolumeState::Degraded);
}

/// What each panic of a volume's thread leaves in its state folder, and what is done about two of them, was shown by no
/// agent.
#[test]
fn a_volume_that_ended_the_agent_twice_stays_closed_and_says_how_to_try_again() {
    let folder = Folder::new();
    let mut host = Host::new(&folder, "a");
    host.create(8 * MIB, "nbd");
    let other = host.path("other.img");
    host.succeed(&["create", "other", "--backing", text(&other), "--size", "8M", "--device", "nbd"]);
    let notes = host.state(crashes::FILE_NAME);
    let note = |times: usize| {
        let line = "panicked at src/x.rs:1: there is a number for each run\n";
        fs::write(&notes, line.repeat(times)).expect("a note");
    };
    host.kill();
    note(1);
    host.start();
    host.wait_until("once may be chance", |status| status.state == VolumeState::Degraded);
    host.kill();
    note(2);
    host.start();
    let status = host.wait_until("it stays closed", |status| status.state == VolumeState::Failed);
    assert!(status.verdict.contains("ended the agent 2 times in a row"), "{status:?}");
    assert!(status.verdict.contains("there is a number for each run"), "{status:?}");
    assert!(Client::connect(&host.socket()).is_err(), "it serves nobody");
    Client::connect(&host.path("run/other.nbd")).expect("the other one is served");
    // It is closed for as long as nobody says otherwise.
    host.stop();
    host.start();
    let status = host.wait_until("it is closed still", |status| status.state == VolumeState::Failed);
    let command = status.action.strip_prefix("to try again: rm ").expect("a command");
    let (path, restart) = command.split_once("; ").expect("two commands");
    assert_eq!(restart, "systemctl restart blockmirror-agent");
    succeed("rm", &[path]);
    host.stop();
    host.start();
    host.wait_until("it is served again", |status| status.state == VolumeState::Degraded);
    Client::connect(&host.socket()).expect("it is served").write_durably(0, &[1; 4096]).expect("a write");
}

/// The session under a mounted file system had ended: the new device was well, and the mount gave errors only.
#[test]
fn a_mount_whose_device_is_dead_is_told_until_it_is_gone() {
    require!("root", "losetup", "mkfs.ext4");
    let mut mirror = Mirror::new(32 * MIB, "loop", &["b"]);
    succeed("mkfs.ext4", &["-q", text(&mirror.primary.device())]);
    let mounted = mirror.folder.mount(&mirror.primary.device(), "mounted");
    mirror.primary.lose();
    mirror.primary.start();
    let status = mirror.primary.wait_until("the stale mount is told", |status| {
        status.state == VolumeState::Degraded && status.action.contains("stale mount")
    });
    assert!(status.verdict.contains(&format!("mounted at {}", mounted.path().display())), "{status:?}");
    mounted.unmount();
    mirror.primary.wait_until("all is well", |status| status.state == VolumeState::Healthy);
    mirror.primary.stop();
}
