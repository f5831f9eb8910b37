//! Which files are refused as backings, and why.

use super::{LargeSectors, LoopDevice, Undo, command, text};
use crate::buffer::BufferPool;
use crate::storage::file::Part;
use crate::storage::file::{Access, File, OpenError};
use crate::storage::users::User;
use blockmirror_protocol::ranges::ByteRange;
use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use tempfile::TempDir;

const MEBIBYTE: u64 = 1 << 20;

fn refusal(path: &Path, access: Access) -> OpenError {
    File::open_backing(path, access).expect_err("it is refused")
}

fn user(path: &Path, access: Access) -> User {
    match refusal(path, access) {
        OpenError::InUse { user, .. } => user,
        other => panic!("not refused for its user: {other}"),
    }
}

fn image(size_bytes: u64) -> (TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    File::create_image(&path, size_bytes).expect("an image can be made");
    (folder, path)
}

#[test]
fn what_is_no_backing_is_refused_with_the_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name);
    fs::write(path("empty"), "").expect("it can be written");
    fs::write(path("odd"), "x").expect("it can be written");
    let refusals = [
        (path("missing"), "does not exist"),
        (folder.path().to_path_buf(), "neither a regular file nor a block device"),
        (Path::new("/dev/null").to_path_buf(), "neither a regular file nor a block device"),
        (path("empty"), "has a size of 0 bytes"),
        (path("odd"), "has a size of 1 bytes"),
    ];
    for (path, reason) in refusals {
        let message = refusal(&path, Access::ReadWrite).to_string();
        assert!(message.contains(reason), "{message}");
    }
}

#[test]
fn an_image_is_made_once_and_only_in_a_folder_that_exists() {
    let (folder, path) = image(MEBIBYTE);
    assert!(matches!(File::create_image(&path, MEBIBYTE), Err(OpenError::Exists { .. })));
    assert_eq!(fs::metadata(&path).expect("it is there").len(), MEBIBYTE);
    let elsewhere = folder.path().join("missing/image");
    assert!(matches!(File::create_image(elsewhere, MEBIBYTE), Err(OpenError::NoFolder { .. })));
    let odd = folder.path().join("odd");
    assert!(matches!(File::create_image(&odd, 513), Err(OpenError::UnusableSize { .. })));
    assert!(File::create_image(&odd, u64::MAX - 511).is_err());
    assert!(!odd.exists(), "nothing is left of an image that could not be made");
}

#[test]
fn metadata_is_written_when_it_is_made() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("log");
    let file = File::create_metadata(&path, 3 * MEBIBYTE + 4096).expect("it can be made");
    let range = ByteRange::new(0, 3 * MEBIBYTE + 4096);
    let parts: Vec<Part> = file.allocation(range).map(|part| part.expect("it is told")).collect();
    assert_eq!(parts, [Part { length: range.length, hole: false }]);
    assert!(matches!(File::create_metadata(&path, 0), Err(OpenError::Exists { .. })));
    assert!(matches!(File::open_metadata(folder.path()), Err(OpenError::WrongType { .. })));
}

#[test]
fn one_writer_or_several_readers_have_an_image() {
    let (_folder, path) = image(MEBIBYTE);
    let writer = File::open_backing(&path, Access::ReadWrite).expect("nobody has it");
    for access in [Access::ReadWrite, Access::ReadOnly] {
        assert_eq!(user(&path, access), User::Lock);
    }
    drop(writer);
    let readers = [(); 2].map(|()| File::open_backing(&path, Access::ReadOnly).expect("readers share"));
    assert_eq!(user(&path, Access::ReadWrite), User::Lock);
    drop(readers);
    File::open_backing(&path, Access::ReadWrite).expect("nobody has it any more");
}

/// A program that was being started by another thread had a copy of the descriptor for a moment, and with it the lock
/// of a file that was closed and opened again.
#[test]
fn a_claim_ends_with_the_file_though_a_copy_of_its_descriptor_is_left() {
    let (_folder, path) = image(MEBIBYTE);
    let writer = File::open_backing(&path, Access::ReadWrite).expect("nobody has it");
    let _copy = writer.as_fd().try_clone_to_owned().expect("a descriptor can be copied");
    drop(writer);
    File::open_backing(&path, Access::ReadWrite).expect("nobody has it any more");
}

#[test]
fn users_of_flock_are_met() {
    let (_folder, path) = image(MEBIBYTE);
    let other = fs::File::open(&path).expect("it can be opened");
    other.lock_shared().expect("nobody has it");
    File::open_backing(&path, Access::ReadOnly).expect("readers share");
    assert_eq!(user(&path, Access::ReadWrite), User::Lock);
    other.unlock().expect("it is locked");
    let _writer = File::open_backing(&path, Access::ReadWrite).expect("nobody has it any more");
    assert!(other.try_lock_shared().is_err());
}

#[test]
fn qemu_and_the_agent_keep_each_other_off() {
    let (_folder, path) = image(MEBIBYTE);
    let attempt = |arguments: &[&str]| {
        let mut all = vec!["-f", "raw"];
        all.extend(arguments);
        all.push(text(&path));
        command("qemu-io", &all)
    };
    if let Err(reason) = attempt(&["-c", "read 0 512"]) {
        eprintln!("skipped: {reason}");
        return;
    }
    let writer = File::open_backing(&path, Access::ReadWrite).expect("nobody has it");
    assert!(attempt(&["-r", "-c", "read 0 512"]).expect_err("it is locked").contains("lock"));
    drop(writer);
    let _reader = File::open_backing(&path, Access::ReadOnly).expect("nobody has it");
    attempt(&["-r", "-c", "read 0 512"]).expect("readers share");
    assert!(attempt(&["-c", "write 0 512"]).expect_err("it is being read").contains("lock"));
}

#[test]
fn a_virtual_machines_image_is_refused() {
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};
    let (_folder, path) = image(MEBIBYTE);
    let started = Command::new("qemu-io")
        .args(["-f", "raw", text(&path)])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn();
    let mut machine = match started {
        Ok(machine) => machine,
        Err(error) => return eprintln!("skipped: qemu-io: {error}"),
    };
    let mut input = machine.stdin.take().expect("it was asked for");
    writeln!(input, "write 0 512").expect("it listens");
    let output = BufReader::new(machine.stdout.take().expect("it was asked for"));
    let wrote = output.lines().map_while(Result::ok).any(|line| line.contains("wrote 512"));
    let users = [Access::ReadWrite, Access::ReadOnly].map(|access| File::open_backing(&path, access).err());
    drop(input);
    machine.wait().expect("it ends with its input");
    assert!(wrote, "qemu-io has the image open");
    for user in users {
        assert!(matches!(user, Some(OpenError::InUse { user: User::Lock, .. })), "{user:?}");
    }
}

#[test]
fn a_device_has_one_user() {
    let Some(device) = LoopDevice::new(MEBIBYTE, 512) else { return };
    let writer = File::open_backing(&device.path, Access::ReadWrite).expect("nobody has it");
    for access in [Access::ReadWrite, Access::ReadOnly] {
        assert_eq!(user(&device.path, access), User::Exclusive);
    }
    assert_eq!(user(&device.image, Access::ReadWrite), User::Loop { device: device.path.clone() });
    drop(writer);
    let _readers =
        [(); 2].map(|()| File::open_backing(&device.path, Access::ReadOnly).expect("readers share"));
    assert_eq!(user(&device.path, Access::ReadWrite), User::Lock);
}

#[test]
fn a_mounted_device_and_its_image_are_refused_with_the_mount_point() {
    let Some(device) = LoopDevice::new(16 * MEBIBYTE, 512) else { return };
    let folder = tempfile::tempdir().expect("a folder");
    let at = folder.path().join("mount point");
    fs::create_dir(&at).expect("it can be made");
    let mounted = command("mkfs.ext4", &["-q", text(&device.path)])
        .and_then(|_| command("mount", &[text(&device.path), text(&at)]));
    if let Err(reason) = mounted {
        return eprintln!("skipped: {reason}");
    }
    let _unmount = Undo("umount", vec![text(&at).to_owned()]);
    let expected = User::Mount { device: device.path.clone(), at: at.clone() };
    for access in [Access::ReadWrite, Access::ReadOnly] {
        assert_eq!(user(&device.path, access), expected);
        assert_eq!(user(&device.image, access), expected);
    }
    let message = refusal(&device.path, Access::ReadWrite).to_string();
    assert!(message.ends_with("mount point; unmount it first"), "{message}");
}

#[test]
fn a_device_under_another_is_refused_with_the_holders_name() {
    let Some(device) = LoopDevice::new(MEBIBYTE, 512) else { return };
    let name = format!("blockmirror-test-{}", std::process::id());
    let table = format!("0 2048 linear {} 0", device.path.display());
    if let Err(reason) = command("dmsetup", &["create", &name, "--table", &table]) {
        return eprintln!("skipped: {reason}");
    }
    let _remove = Undo("dmsetup", vec!["remove".to_owned(), "--retry".to_owned(), name.clone()]);
    let user = user(&device.path, Access::ReadWrite);
    assert!(matches!(&user, User::Holder { holder, .. } if holder.contains(&name)), "{user}");
}

#[test]
fn swap_space_is_refused() {
    let Some(device) = LoopDevice::new(MEBIBYTE, 512) else { return };
    let on = command("mkswap", &[text(&device.path)]).and_then(|_| command("swapon", &[text(&device.path)]));
    if let Err(reason) = on {
        return eprintln!("skipped: {reason}");
    }
    let _off = Undo("swapoff", vec![text(&device.path).to_owned()]);
    assert_eq!(user(&device.path, Access::ReadWrite), User::Swap { area: device.path.clone() });
}

#[test]
fn an_image_whose_size_direct_io_cannot_keep_is_opened_without_it() {
    let Some(mounted) = LargeSectors::new() else { return };
    for (name, size_bytes, direct) in [("whole", MEBIBYTE, true), ("odd", MEBIBYTE + 512, false)] {
        let path = mounted.folder.path().join(name);
        File::create_image(&path, size_bytes).expect("it can be made");
        let file = File::open_backing(&path, Access::ReadWrite).expect("it can be opened");
        let unit = if direct { 4096 } else { 512 };
        assert_eq!((file.is_direct(), file.alignment()), (direct, unit), "{name}");
    }
}

#[test]
fn holes_of_an_image_are_told_apart_from_data() {
    let (_folder, path) = image(4 * MEBIBYTE);
    let file = fs::OpenOptions::new().write(true).open(&path).expect("it can be opened");
    file.write_all_at(&[1; 65536], MEBIBYTE).expect("it can be written");
    drop(file);
    let file = File::open_backing(&path, Access::ReadOnly).expect("it can be opened");
    let parts = |range| file.allocation(range).collect::<Result<Vec<Part>, _>>().expect("it is told");
    let (hole, data) = (|length| Part { length, hole: true }, |length| Part { length, hole: false });
    let all = parts(ByteRange::new(0, 4 * MEBIBYTE));
    assert_eq!(all, [hole(MEBIBYTE), data(65536), hole(3 * MEBIBYTE - 65536)]);
    assert_eq!(parts(ByteRange::new(MEBIBYTE + 512, 1024)), [data(1024)]);
    assert_eq!(parts(ByteRange::new(0, 512)), [hole(512)]);
    assert_eq!(parts(ByteRange::new(512, 0)), []);
    for (range, is_hole) in [
        (ByteRange::new(0, MEBIBYTE), true),
        (ByteRange::new(0, MEBIBYTE + 512), false),
        (ByteRange::new(MEBIBYTE + 512, 512), false),
        (ByteRange::new(2 * MEBIBYTE, 2 * MEBIBYTE), true),
    ] {
        assert_eq!(file.is_hole(range), is_hole, "{range:?}");
    }
}

#[test]
fn what_an_image_has_lost_is_no_hole() {
    // The kernel answers alike for a hole up to the end and for what lies beyond it: an image that somebody cut off
    // below a volume was copied, kept as pre-images and told to clients as zeroes.
    let (_folder, path) = image(4 * MEBIBYTE);
    let file = File::open_backing(&path, Access::ReadWrite).expect("it can be opened");
    rustix::fs::ftruncate(&file, 2 * MEBIBYTE).expect("it can be cut off");
    let is_lost = |error: std::io::Error| error.kind() == std::io::ErrorKind::UnexpectedEof;
    for (range, is_there) in [
        (ByteRange::new(0, 2 * MEBIBYTE), true),
        (ByteRange::new(0, 2 * MEBIBYTE + 512), false),
        (ByteRange::new(3 * MEBIBYTE, 512), false),
    ] {
        assert_eq!(file.is_hole(range), is_there, "{range:?}");
        assert_eq!(file.hole_at(range).is_err_and(is_lost), !is_there, "{range:?}");
    }
    let whole = ByteRange::new(0, 4 * MEBIBYTE);
    rustix::io::pwrite(&file, &BufferPool::new(0).take(4096), 0).expect("it can be written");
    assert!(file.allocation(whole).any(|part| part.is_err_and(is_lost)));
    drop(file);
    let metadata = path.with_extension("metadata");
    let file = File::create_metadata(&metadata, 4096).expect("it can be made");
    assert!(file.is_hole(ByteRange::new(4096, 4096)), "a metadata file reads as zeroes beyond its end");
}

#[test]
fn what_a_killed_agent_left_under_way_is_waited_for() {
    // An agent was killed under load and started again at once: the kernel still carried out its operations, the
    // backing was claimed, and the volume stayed closed until somebody started the agent once more. A write to its
    // activity log could even have come after the new agent's own.
    let (folder, path) = image(MEBIBYTE);
    let metadata = folder.path().join("metadata");
    super::run(async {
        let held = File::open_backing(&path, Access::ReadWrite).expect("it can be opened");
        let held_too = File::create_metadata(&metadata, 4096).expect("it can be made");
        assert!(matches!(File::open_metadata(&metadata), Err(OpenError::InUse { user: User::Lock, .. })));
        let opening = tokio::task::spawn_local(async move {
            let backing = File::opened_when_free(move || File::open_backing(&path, Access::ReadWrite)).await;
            (backing, File::opened_when_free(move || File::open_metadata(&metadata)).await)
        });
        tokio::task::yield_now().await;
        drop((held, held_too));
        let (backing, metadata) = opening.await.expect("it ends");
        assert!(backing.is_ok() && metadata.is_ok());
    });
}
