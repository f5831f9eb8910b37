//! The agent's end is a pause (S1, S2): a file system on the volume's loop device, and whoever writes to it, outlive the
//! agent. It is killed, or stopped in order, and started again, many times in a row.

use blockmirror_agent::config::{DeviceKind, Mode, Role};
use blockmirror_agent::control::api::{Connection, VolumeStatus};
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::patience::until;
use blockmirror_tests::machines::programs::{own, run, succeed, text};
use blockmirror_tests::machines::systemd::Systemd;
use blockmirror_tests::require;
use blockmirror_tests::torture::disk::{FileSystem, examine};
use blockmirror_tests::torture::ledger::Ledger;
use blockmirror_tests::torture::load::Load;
use rustix::process::{Pid, Signal, kill_process};
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

const MIB: u64 = 1 << 20;

/// How often the agent ends in each test; thousands of times with `BLOCKMIRROR_PAUSES`.
fn pauses() -> u64 {
    let given = std::env::var("BLOCKMIRROR_PAUSES").ok();
    given.map_or(50, |given| given.parse().expect("BLOCKMIRROR_PAUSES is a number"))
}

/// Ends the primary's agent and starts it again while a writer writes, as often as wanted. The writer must not notice:
/// it ends with an error when a call fails. After each time the mirror comes in sync, and in the end everything that was
/// synced is there, and the copies are identical.
fn pause(mode: Mode, end: impl Fn(&mut Mirror)) {
    let mut mirror = Mirror::new(96 * MIB, "loop", &["b"]);
    mirror.primary.succeed(&["mode", "data", "b", &mode.to_string()]);
    mirror.wait_until_quiet();
    let device = mirror.primary.device();
    FileSystem::make(&device, true);
    let mounted = FileSystem::mount(&device, &mirror.folder.join("mount"));
    let ledger = Arc::new(Mutex::new(Ledger::default()));
    let mut load = Load::start(&own("torture"), &mounted.records(), 7, &ledger);
    for time in 0..pauses() {
        load.pass(20 + time % 7);
        end(&mut mirror);
        mirror.primary.start();
        load.pass(5);
        mirror.wait_until_in_sync();
    }
    load.end();
    mounted.unmount();
    let image = examine(&device, &mirror.folder.join("look"));
    let ledger = ledger.lock().expect("the writer makes sense");
    let checked = ledger.check(&image, ledger.now()).unwrap_or_else(|wrong| panic!("{wrong}"));
    assert!(checked.certain > 0 && checked.lost == 0, "{checked:?}");
    mirror.assert_identical();
    mirror.primary.stop();
    assert!(!mirror.primary.path("run/data.fuse").exists(), "a device that nobody uses goes with the agent");
}

#[test]
fn a_mounted_file_system_outlives_an_agent_that_is_killed() {
    require!("root", "mkfs.ext4", "e2fsck", "tune2fs");
    pause(Mode::Async, |mirror| mirror.primary.kill());
}

#[test]
fn a_mounted_file_system_outlives_an_agent_that_is_stopped() {
    require!("root", "mkfs.ext4", "e2fsck", "tune2fs");
    pause(Mode::Sync, |mirror| mirror.primary.stop());
}

/// A mirror whose primary has a file system on its device.
fn mounted() -> (FileSystem, Mirror) {
    let mirror = Mirror::new(32 * MIB, "loop", &["b"]);
    FileSystem::make(&mirror.primary.device(), false);
    let mounted = FileSystem::mount(&mirror.primary.device(), &mirror.folder.join("mount"));
    (mounted, mirror)
}

/// Writes a file and syncs it, which takes an agent.
fn write(mirror: &Mirror, name: &str) -> JoinHandle<std::io::Result<()>> {
    let path = mirror.folder.join("mount").join(name);
    std::thread::spawn(move || {
        let mut file = File::create(path)?;
        file.write_all(&[7; 100_000])?;
        file.sync_all()
    })
}

fn keeper(host: &Host) -> Pid {
    until("there is a keeper", || host.keeper().ok_or_else(|| host.log()))
}

fn loop_error(status: &VolumeStatus) -> String {
    status.facts.devices.iter().find_map(|device| device.error.clone()).unwrap_or_default()
}

/// Whether a loop device is attached to the volume's file.
fn is_attached(host: &Host) -> bool {
    let file = host.path("run/data.fuse");
    let devices = fs::read_dir("/sys/block").expect("a table of devices").flatten();
    let mut files =
        devices.filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok());
    files.any(|path| Path::new(path.trim_end()) == file)
}

#[test]
fn an_agent_that_stops_says_who_has_the_device_open_and_what_is_asked_meanwhile_waits() {
    require!("root", "mkfs.ext4");
    let (mounted, mut mirror) = mounted();
    mirror.primary.stop();
    let log = mirror.primary.log();
    let words = format!("stays, as it is mounted at {}", mirror.folder.join("mount").display());
    assert!(log.contains(&words), "{log}");
    let status = mirror.primary.tool(&["status", "data"]);
    assert!(status.output.contains("whoever uses it waits for the agent"), "{status:?}");
    let writer = write(&mirror, "file");
    mirror.primary.start();
    writer.join().expect("it does not panic").expect("it is answered by the next agent");
    mounted.unmount();
    mirror.primary.stop();
    assert!(!is_attached(&mirror.primary) && mirror.primary.keeper().is_none());
    assert!(!mirror.primary.device().is_symlink());
}

/// The keeper holds nothing but descriptors; one that ends before its time is replaced before that matters.
#[test]
fn a_keeper_that_is_killed_is_replaced() {
    require!("root", "mkfs.ext4");
    let (mounted, mut mirror) = mounted();
    for name in ["one", "two"] {
        let old = keeper(&mirror.primary);
        kill_process(old, Signal::KILL).expect("it is our process");
        until("another keeper has the device", || match mirror.primary.keeper() {
            Some(new) if new != old && table_of(new).is_some() => Ok(()),
            found => Err(format!("{found:?} {}", mirror.primary.log())),
        });
        mirror.primary.kill();
        let writer = write(&mirror, name);
        mirror.primary.start();
        writer.join().expect("it does not panic").expect("it is answered by the next agent");
    }
    mounted.unmount();
    mirror.assert_identical();
}

/// A folder in which nothing can be made.
struct ReadOnly(PathBuf);

impl ReadOnly {
    fn new(folder: PathBuf) -> Self {
        succeed("mount", &["--bind", "-o", "ro", text(&folder), text(&folder)]);
        Self(folder)
    }
}

impl Drop for ReadOnly {
    fn drop(&mut self) {
        run("umount", &[text(&self.0)]);
    }
}

/// The agent tried once, said so in its log, and held the device for kept.
#[test]
fn a_keeper_that_can_not_be_had_is_tried_for_until_it_can() {
    require!("root", "mkfs.ext4");
    let mut mirror = Mirror::new(32 * MIB, "nbd", &["b"]);
    mirror.primary.stop();
    // In the way of the keeper's socket.
    let in_the_way = mirror.primary.path("run/keeper.sock");
    fs::create_dir(&in_the_way).expect("a folder");
    mirror.primary.configure(|volume| volume.devices = vec![DeviceKind::Loop]);
    mirror.primary.start();
    let warnings = |status: &VolumeStatus| -> Vec<String> {
        status.facts.devices.iter().filter_map(|device| device.warning.clone()).collect()
    };
    let status = mirror.primary.wait_until("its device is not kept", |status| !warnings(status).is_empty());
    assert!(warnings(&status)[0].contains("does not outlive the agent"), "{status:?}");
    assert!(mirror.primary.keeper().is_none());
    fs::remove_dir(&in_the_way).expect("it is empty");
    mirror.primary.wait_until("its device is kept", |status| warnings(status).is_empty());
    // And one that ended and can't be replaced at once.
    FileSystem::make(&mirror.primary.device(), false);
    let mounted = FileSystem::mount(&mirror.primary.device(), &mirror.folder.join("mount"));
    let kept = keeper(&mirror.primary);
    let read_only = ReadOnly::new(mirror.primary.path("run"));
    kill_process(kept, Signal::KILL).expect("it is our process");
    mirror.primary.wait_until("its device is not kept", |status| !warnings(status).is_empty());
    drop(read_only);
    mirror.primary.wait_until("its device is kept again", |status| warnings(status).is_empty());
    mirror.primary.kill();
    let writer = write(&mirror, "file");
    mirror.primary.start();
    writer.join().expect("it does not panic").expect("it is answered by the next agent");
    mounted.unmount();
    mirror.assert_identical();
}

/// Where the keeper is gone together with the agent, it is as it ever was: errors, and a new device.
#[test]
fn a_device_that_nobody_kept_is_dead_and_the_next_agent_makes_another() {
    require!("root", "mkfs.ext4");
    let (mounted, mut mirror) = mounted();
    let keeper = keeper(&mirror.primary);
    mirror.primary.stall();
    kill_process(keeper, Signal::KILL).expect("it is our process");
    mirror.primary.kill();
    write(&mirror, "file").join().expect("it does not panic").expect_err("nobody can answer any more");
    mirror.primary.start();
    let status =
        mirror.primary.wait_until("the stale mount is told", |status| status.action.contains("stale mount"));
    assert!(status.verdict.contains("mounted at"), "{status:?}");
    mounted.abandon();
    mirror.assert_identical();
}

/// While the agent was away, another host was promoted: what waits must not be written, here or there.
#[test]
fn what_waits_for_an_agent_fails_where_another_host_was_promoted_meanwhile() {
    require!("root", "mkfs.ext4");
    let (mounted, mut mirror) = mounted();
    mirror.primary.succeed(&["mode", "data", "b", "sync"]);
    mirror.wait_until_quiet();
    mirror.primary.kill();
    let writer = write(&mirror, "file");
    mirror.replica().wait_until("the loss is noticed", |status| {
        status.facts.peers[0].connection != Connection::Connected
    });
    mirror.replica().succeed(&["promote", "data", "--force"]);
    mirror.primary.start();
    writer.join().expect("it does not panic").expect_err("this host is the primary no more");
    let log = mirror.primary.log();
    assert!(log.contains("is taken away: this host is a replica now"), "{log}");
    mirror.primary.wait_until("it is a replica", |status| status.facts.role == Role::Replica);
    mounted.abandon();
    until("the device is gone", || {
        if is_attached(&mirror.primary) { Err(mirror.primary.log()) } else { Ok(()) }
    });
    mirror.replica().succeed(&["wait", "data", "--for", "in-sync", "--timeout", "90s"]);
    let ended = || mirror.primary.keeper().map_or(Ok(()), |keeper| Err(format!("{keeper:?}")));
    until("the keeper ends, which has nothing to keep", ended);
}

/// What waits was asked of the disk that is gone: under a mounted file system, what another host has is other content.
#[test]
fn a_device_does_not_go_on_over_what_was_recovered_into_another_disk() {
    require!("root", "mkfs.ext4");
    let (mounted, mut mirror) = mounted();
    mirror.wait_until_in_sync();
    mirror.primary.stop();
    let writer = write(&mirror, "file");
    let backing = mirror.primary.backing();
    fs::remove_file(&backing).expect("the disk is gone");
    File::create(&backing).and_then(|file| file.set_len(32 * MIB)).expect("another disk");
    let address = mirror.replica().link().address().to_string();
    mirror.primary.succeed(&["recover", "data", "--from", &address, "--to", text(&backing)]);
    mirror.primary.start();
    writer.join().expect("it does not panic").expect_err("its disk is gone");
    let log = mirror.primary.log();
    assert!(log.contains("is taken away: the volume's content is another one now"), "{log}");
    mounted.abandon();
    mirror.assert_identical();
}

/// It was served by nobody and given up by nobody, until the disk was there again.
#[test]
fn what_waits_fails_on_a_replica_whose_disk_is_not_there() {
    require!("root", "mkfs.ext4");
    let (mounted, mut mirror) = mounted();
    mirror.primary.kill();
    let writer = write(&mirror, "file");
    mirror.replica().wait_until("the loss is noticed", |status| {
        status.facts.peers[0].connection != Connection::Connected
    });
    mirror.replica().succeed(&["promote", "data", "--force"]);
    let (backing, away) = (mirror.primary.backing(), mirror.primary.path("away.img"));
    fs::rename(&backing, &away).expect("the disk is not there");
    mirror.primary.start();
    writer.join().expect("it does not panic").expect_err("this host is the primary no more");
    mounted.abandon();
    fs::rename(&away, &backing).expect("the disk is there again");
    mirror.primary.wait_until("it is a replica", |status| status.facts.role == Role::Replica);
    mirror.replica().succeed(&["wait", "data", "--for", "in-sync", "--timeout", "90s"]);
}

#[test]
fn a_device_is_released_by_the_agent_or_without_one() {
    require!("root", "mkfs.ext4");
    let (mounted, mut mirror) = mounted();
    let in_use = ["the device is in use", "mounted at"];
    mirror.primary.refuse(&["release", "data"], 5, &in_use);
    mirror.primary.kill();
    mirror.primary.refuse(&["release", "data"], 5, &in_use);
    let writer = write(&mirror, "file");
    let said = mirror.primary.succeed(&["release", "data", "--force"]);
    assert!(said.contains("gives i/o errors to who has it open still: mounted at"), "{said}");
    writer.join().expect("it does not panic").expect_err("the device is gone");
    mounted.abandon();
    mirror.primary.refuse(&["release", "data"], 4, &["has left no loop device of data"]);
    mirror.primary.start();
    assert!(is_attached(&mirror.primary), "there is a new one");
    mirror.primary.succeed(&["release", "data"]);
    assert!(!is_attached(&mirror.primary));
    let status = mirror.primary.status();
    assert!(loop_error(&status).starts_with("it was released"), "{status:?}");
    mirror.primary.refuse(&["release", "data"], 5, &["has no loop device"]);
    mirror.primary.stop();
    mirror.primary.start();
    assert!(is_attached(&mirror.primary), "it is served again");
    mirror.assert_identical();
}

/// A process with a prober's name that has a device open until it is dropped.
struct Prober(Child);

impl Prober {
    /// `program` is where it is, for which any place will do.
    fn look_at(device: &Path, program: &Path) -> Self {
        if !program.exists() {
            std::os::unix::fs::symlink("/bin/sh", program).expect("a link");
        }
        let looked_at = File::open(device).expect("the device is served");
        let process = Command::new(program)
            .args(["-c", "read end"])
            .stdin(Stdio::piped())
            .stdout(looked_at)
            .spawn()
            .expect("a shell");
        Self(process)
    }
}

impl Drop for Prober {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The device was left hanging when the agent was stopped just after an umount, since udev had blkid look at it.
#[test]
fn whoever_just_looks_at_the_device_is_waited_for_when_it_is_released_or_the_agent_stops() {
    require!("root", "mkfs.ext4");
    let (mounted, mut mirror) = mounted();
    let (device, program) = (mirror.primary.device(), mirror.folder.join("blkid"));
    let waits = |log: &str| log.matches("waiting for those who have the device open: open by blkid").count();
    let until_it_waits = |log: &dyn Fn() -> String, before: usize| {
        until("whoever looks is waited for", || match log() {
            log if waits(&log) > before => Ok(()),
            log => Err(log),
        });
    };
    // Who stays keeps the prober from being waited for.
    let prober = Prober::look_at(&device, &program);
    mirror.primary.refuse(&["release", "data"], 5, &["the device is in use: mounted at", "open by blkid"]);
    mounted.unmount();
    assert_eq!(waits(&mirror.primary.log()), 0);
    // One that stays is waited for, too, and then named.
    mirror.primary.refuse(&["release", "data"], 5, &["the device is in use: open by blkid"]);
    assert_eq!(waits(&mirror.primary.log()), 1);
    std::thread::scope(|scope| {
        let host = &mirror.primary;
        let release = scope.spawn(|| host.succeed(&["release", "data"]));
        until_it_waits(&|| host.log(), 1);
        drop(prober);
        release.join().expect("it is released");
    });
    assert!(!is_attached(&mirror.primary));
    mirror.primary.stop();
    mirror.primary.start();
    let prober = Prober::look_at(&device, &program);
    let log = mirror.primary.path("log");
    std::thread::scope(|scope| {
        let stop = scope.spawn(|| mirror.primary.stop());
        until_it_waits(&|| fs::read_to_string(&log).expect("a log"), 2);
        drop(prober);
        stop.join().expect("it stops");
    });
    assert!(!is_attached(&mirror.primary), "{}", mirror.primary.log());
    mirror.primary.start();
    mirror.assert_identical();
}

/// The file that the table of requests lies in.
fn table_of(keeper: Pid) -> Option<PathBuf> {
    let files = fs::read_dir(format!("/proc/{}/fd", keeper.as_raw_nonzero())).expect("its files").flatten();
    let mut paths = files.map(|file| file.path());
    paths.find(|path| fs::metadata(path).is_ok_and(|status| status.is_file()))
}

/// An agent that was upgraded and set back again found what it could not read, and took it for nothing.
#[test]
fn an_agent_that_cannot_read_what_is_unanswered_leaves_it_to_one_that_can() {
    require!("root", "mkfs.ext4");
    let (mounted, mut mirror) = mounted();
    mirror.primary.kill();
    let writer = write(&mirror, "file");
    let table = table_of(keeper(&mirror.primary)).expect("the keeper has it");
    let table = File::options().write(true).open(table).expect("the table");
    let set_version =
        |version: u32| table.write_all_at(&version.to_ne_bytes(), 8).expect("it can be written");
    set_version(9);
    mirror.primary.start();
    let status = mirror.primary.wait_until("it is told", |status| loop_error(status).contains("version 9"));
    assert!(loop_error(&status).contains("stays as it is"), "{status:?}");
    assert!(is_attached(&mirror.primary));
    mirror.primary.refuse(&["release", "data"], 5, &["the device is in use"]);
    mirror.primary.refuse(&["demote", "data"], 5, &["the device is in use"]);
    mirror.primary.stop();
    assert!(!writer.is_finished(), "it waits");
    set_version(1);
    mirror.primary.start();
    writer.join().expect("it does not panic").expect("it is answered by an agent that can");
    mounted.unmount();
    mirror.assert_identical();
}

/// As after an upgrade of the host: the device lay with a keeper, and is to lie in the store that there is now.
#[test]
fn what_a_keeper_has_moves_to_a_systemd_that_keeps_it() {
    require!("root", "mkfs.ext4");
    let (mounted, mut mirror) = mounted();
    keeper(&mirror.primary);
    mirror.primary.kill();
    mirror.primary.run_under_systemd();
    let writer = write(&mirror, "file");
    mirror.primary.start();
    writer.join().expect("it does not panic").expect("it is answered by the next agent");
    let stored = mirror.primary.systemd().map(Systemd::names).unwrap_or_default();
    assert_eq!(stored, ["loop.data", "loop.data"]);
    let ended = || mirror.primary.keeper().map_or(Ok(()), |keeper| Err(format!("{keeper:?}")));
    until("the keeper ends, which has nothing to keep", ended);
    mounted.unmount();
    mirror.assert_identical();
    mirror.primary.stop();
}

/// systemd holds what else the keeper would: over a crash, a stop and a restart.
#[test]
fn under_systemd_its_store_keeps_the_device() {
    require!("root", "mkfs.ext4");
    let mut mirror = Mirror::new(32 * MIB, "loop", &["b"]);
    mirror.primary.stop();
    mirror.primary.run_under_systemd();
    mirror.primary.start();
    let stored = |host: &Host| host.systemd().map(Systemd::names).unwrap_or_default();
    assert_eq!(stored(&mirror.primary), ["loop.data", "loop.data"]);
    FileSystem::make(&mirror.primary.device(), false);
    let mounted = FileSystem::mount(&mirror.primary.device(), &mirror.folder.join("mount"));
    for (name, is_killed) in [("one", true), ("two", false), ("three", true)] {
        match is_killed {
            true => mirror.primary.kill(),
            false => mirror.primary.stop(),
        }
        let writer = write(&mirror, name);
        mirror.primary.start();
        writer.join().expect("it does not panic").expect("it is answered by the next agent");
        assert_eq!(stored(&mirror.primary), ["loop.data", "loop.data"]);
        assert!(mirror.primary.keeper().is_none(), "no keeper is needed");
    }
    mounted.unmount();
    mirror.assert_identical();
    mirror.primary.stop();
    until("nothing lies in the store", || match &stored(&mirror.primary)[..] {
        [] => Ok(()),
        names => Err(format!("{names:?}")),
    });
}

/// A client that connects again by itself, as a virtual machine's disk does, and waits meanwhile.
struct Reconnecting {
    process: Child,
    asked: ChildStdin,
    said: BufReader<ChildStdout>,
}

impl Reconnecting {
    fn connect(socket: &Path) -> Self {
        let image = format!(
            "driver=nbd,server.type=unix,server.path={},export=data,reconnect-delay=60",
            socket.display()
        );
        let mut process = Command::new("qemu-io")
            .args(["--image-opts", &image])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("qemu-io");
        let (asked, said) = (process.stdin.take().expect("a pipe"), process.stdout.take().expect("a pipe"));
        Self { process, asked, said: BufReader::new(said) }
    }

    fn ask(&mut self, command: &str) {
        writeln!(self.asked, "{command}").expect("it listens");
    }

    /// The next line that says what came of a command.
    fn answer(&mut self) -> String {
        loop {
            let mut line = String::new();
            let length = self.said.read_line(&mut line).expect("it talks");
            assert!(length > 0, "it has ended");
            let line = line.replace("qemu-io> ", "");
            if !line.trim().is_empty() && !line.contains("ops/sec") {
                return line.trim().to_owned();
            }
        }
    }
}

impl Drop for Reconnecting {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

#[test]
fn an_nbd_client_that_connects_again_finds_its_export_and_loses_nothing() {
    require!("root", "qemu-io");
    let mut mirror = Mirror::new(32 * MIB, "nbd", &["b"]);
    let mut client = Reconnecting::connect(&mirror.primary.socket());
    for (time, is_killed) in [(1, true), (2, false)] {
        client.ask(&format!("write -f -P {time} {time}M 64k"));
        assert_eq!(client.answer(), format!("wrote 65536/65536 bytes at offset {}", time * MIB));
        match is_killed {
            true => mirror.primary.kill(),
            false => mirror.primary.stop(),
        }
        client.ask(&format!("write -f -P {} 10M 64k", time + 8));
        mirror.primary.start();
        assert_eq!(client.answer(), format!("wrote 65536/65536 bytes at offset {}", 10 * MIB));
        for (value, place) in [(time, time), (time + 8, 10)] {
            client.ask(&format!("read -P {value} {place}M 64k"));
            assert_eq!(client.answer(), format!("read 65536/65536 bytes at offset {}", place * MIB));
        }
    }
    drop(client);
    mirror.wait_until_in_sync();
    mirror.assert_identical();
}
