//! Who has a loop device open: file systems, processes, other devices.

use super::{Folders, MIB, Mounted, Served, memory, obstacle, require, run, text};
use crate::device::openers::look;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

/// A process with a file open; killed when dropped.
struct Holding(Child);

impl Holding {
    fn new(path: &Path) -> Self {
        let file = OwnedFd::from(File::open(path).expect("it can be opened"));
        let child = Command::new("sleep").arg("600").stdin(Stdio::from(file)).spawn();
        Self(child.expect("sleep(1) starts"))
    }
}

impl Drop for Holding {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A command that is run when the value goes away.
struct Undo(&'static str, Vec<String>);

impl Drop for Undo {
    fn drop(&mut self) {
        let _ = Command::new(self.0).args(&self.1).status();
    }
}

#[test]
fn a_process_that_has_the_device_open_is_named_once_with_its_number() {
    require!();
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    let _own = File::open(&served.device).expect("a device");
    assert_eq!(served.openers(), [""; 0], "what this process has open does not count");
    let process = Holding::new(&served.link);
    assert_eq!(served.openers(), [format!("open by sleep (pid {})", process.0.id())]);
    drop(process);
    assert_eq!(served.openers(), [""; 0]);
}

#[test]
fn a_process_that_has_the_device_open_by_another_name_is_named() {
    // A container that has the device under a name of its own was missed, and a switch went on while it wrote.
    require!();
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    let number = std::fs::metadata(&served.device).expect("a device").rdev();
    let node = folders.folder.path().join("disk in a container");
    let (mode, kind) = (Mode::RUSR | Mode::WUSR, FileType::BlockDevice);
    let made = mknodat(CWD, &node, kind, mode, number).map_err(std::io::Error::from);
    let _own = match made.and_then(|()| File::open(&node)) {
        Ok(own) => own,
        Err(error) => return eprintln!("skipped: needs device nodes in temporary folders: {error}"),
    };
    assert_eq!(served.openers(), [""; 0], "what this process has open does not count");
    let process = Holding::new(&node);
    assert_eq!(served.openers(), [format!("open by sleep (pid {})", process.0.id())]);
    drop(process);
    assert_eq!(served.openers(), [""; 0]);
}

#[test]
fn every_place_where_the_device_is_mounted_is_named_with_the_kind() {
    require!("mkfs.ext4");
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    run("mkfs.ext4", &["-q", served.path()]);
    assert_eq!(served.openers(), [""; 0]);
    let (one, two) = (Mounted::new(served.path()), Mounted::new(served.path()));
    let mut found = served.openers();
    let mut expected = [&one, &two].map(|mounted| format!("mounted at {} (ext4)", mounted.path().display()));
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
}

#[test]
fn a_mount_in_a_namespace_of_its_own_is_found_with_a_process_that_sees_it() {
    require!("mkfs.ext4", "unshare");
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    run("mkfs.ext4", &["-q", served.path()]);
    let at = tempfile::tempdir().expect("a folder");
    let script = format!("mount {} {} && echo mounted && exec sleep 600", served.path(), text(at.path()));
    let started = Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", &script])
        .stdout(Stdio::piped())
        .spawn();
    let mut process = Holding(started.expect("unshare(1) starts"));
    let mut said = String::new();
    let output = process.0.stdout.take().expect("it was asked for");
    std::io::BufRead::read_line(&mut std::io::BufReader::new(output), &mut said).expect("it says something");
    assert_eq!(said, "mounted\n");
    let found = served.openers();
    let begins = format!("mounted at {} (ext4) in the mount namespace of ", at.path().display());
    let ends = format!("(pid {})", process.0.id());
    assert!(found.len() == 1 && found[0].starts_with(&begins) && found[0].ends_with(&ends), "{found:?}");
}

#[test]
fn a_file_system_that_was_unmounted_lazily_still_counts() {
    require!("mkfs.ext4");
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    run("mkfs.ext4", &["-q", served.path()]);
    let mounted = Mounted::new(served.path());
    let file = File::create(mounted.path().join("file")).expect("a file");
    run("umount", &["--lazy", text(mounted.path())]);
    let found = served.openers();
    assert!(found.len() == 1 && found[0].contains("out of sight"), "{found:?}");
    drop(file);
}

#[test]
fn a_loop_device_on_the_device_and_a_mounted_partition_are_named() {
    require!("mkfs.ext4", "sfdisk", "losetup", "partx");
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    {
        let above = run("losetup", &["--find", "--show", served.path()]).trim().to_owned();
        let _detach = Undo("losetup", vec!["--detach".to_owned(), above.clone()]);
        assert_eq!(served.openers(), [format!("used by {above}")]);
    }
    let script =
        format!("printf 'start=2048, size={}\\n' | sfdisk -q --no-reread {}", 64 * MIB / 512, served.path());
    run("sh", &["-c", &script]);
    run("partx", &["--add", served.path()]);
    let partitioned = Undo("partx", vec!["--delete".to_owned(), served.path().to_owned()]);
    let partition = format!("{}p1", served.path());
    if !Path::new(&partition).exists() {
        return eprintln!("skipped: needs nodes of partitions in /dev");
    }
    run("mkfs.ext4", &["-q", &partition]);
    let mounted = Mounted::new(&partition);
    let expected =
        format!("mounted at {} (ext4), through its partition {partition}", mounted.path().display());
    assert_eq!(served.openers(), [expected]);
    drop(mounted);
    drop(partitioned);
    assert_eq!(served.openers(), [""; 0]);
}

#[test]
fn swap_space_and_parts_of_other_devices_are_named() {
    require!("mkswap", "swapon", "dmsetup");
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    let name = format!("blockmirror-openers-{}", std::process::id());
    let table = format!("0 2048 linear {} 0", served.path());
    let made =
        Command::new("dmsetup").args(["create", &name, "--table", &table]).output().expect("dmsetup(8)");
    if made.status.success() {
        let _remove = Undo("dmsetup", vec!["remove".to_owned(), "--retry".to_owned(), name.clone()]);
        assert_eq!(served.openers(), [format!("used by /dev/mapper/{name}")]);
    } else {
        eprintln!("skipped: dmsetup: {}", String::from_utf8_lossy(&made.stderr).trim());
    }
    run("mkswap", &[served.path()]);
    let on = Command::new("swapon").arg(served.path()).output().expect("swapon(8)");
    if on.status.success() {
        let _off = Undo("swapoff", vec![served.path().to_owned()]);
        assert_eq!(served.openers(), ["used as swap space"]);
    } else {
        eprintln!("skipped: swapon: {}", String::from_utf8_lossy(&on.stderr).trim());
    }
}

#[test]
fn a_device_that_is_not_there_counts_as_perhaps_used() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let found = runtime.block_on(look("/dev/no such device".into(), true)).words();
    assert!(!found.is_empty() && found[0].starts_with("perhaps in use"), "{found:?}");
}

/// A prober that opened the device a moment before it was taken away made room for a mount, which was cut off then.
#[test]
fn nobody_can_mount_a_claimed_device_while_it_is_taken_away_and_who_just_looks_is_waited_for() {
    require!("mkfs.ext4");
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    run("mkfs.ext4", &["-q", served.path()]);
    let device = served.device.clone();
    served.claim();
    let prober = Holding::new(&device);
    let at = tempfile::tempdir().expect("a folder");
    let mounts =
        || Command::new("mount").args([text(&device), text(at.path())]).status().expect("mount(8) starts");
    assert!(!mounts().success(), "the device is claimed");
    let stopping = std::thread::spawn(move || served.stop());
    while std::fs::symlink_metadata(folders.site().device_folder.join("data")).is_ok() {
        std::thread::yield_now();
    }
    assert!(!mounts().success(), "the device is being taken away");
    drop(prober);
    stopping.join().expect("it does not panic").expect("a clean stop");
    assert_eq!(folders.leftovers(), [""; 0]);
}
