//! What applications do with the device, and what the volume gets to see of it.

use super::super::in_flight::Table;
use super::super::{fuse, identity, life};
use super::{Folders, MIB, SIZE_BYTES, Served, exercise_file_system, memory, obstacle, require, run, text};
use crate::blocking::blocking;
use crate::buffer::BufferPool;
use crate::device::{Errno, Volume};
use blockmirror_protocol::ranges::ByteRange;
use std::fs::{self, File, OpenOptions};
use std::io::{Seek, SeekFrom};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

#[test]
fn ext4_lives_on_it() {
    require!("mkfs.ext4", "e2fsck");
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    run("mkfs.ext4", &["-q", text(&served.link)]);
    exercise_file_system(served.path());
    run("e2fsck", &["-f", "-n", served.path()]);
    assert!(memory.seen().flushes > 0);
    served.stop().expect("a clean stop");
    assert_eq!(folders.leftovers(), [""; 0]);
}

#[test]
fn xfs_lives_on_it() {
    require!("mkfs.xfs", "xfs_repair");
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    run("mkfs.xfs", &["-q", served.path()]);
    exercise_file_system(served.path());
    run("xfs_repair", &["-n", served.path()]);
    served.stop().expect("a clean stop");
}

#[test]
fn the_loop_device_does_direct_io_and_shows_whose_it_is() {
    require!("losetup");
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    let shown =
        run("losetup", &["--noheadings", "--raw", "--output", "DIO,LOG-SEC,RO", "--list", served.path()]);
    assert_eq!(shown.split_whitespace().collect::<Vec<_>>(), ["1", "512", "0"]);
    let attached = fs::read_to_string(format!("/sys/block/{}/loop/backing_file", &served.path()[5..]));
    assert_eq!(Path::new(attached.expect("an attached file").trim()), folders.mount_point());
    assert_eq!(fs::read_link(&served.link).expect("a link"), served.device);
    assert_eq!(size_of_device(&served.device), SIZE_BYTES);
}

/// A block device's size, which its metadata does not tell.
fn size_of_device(path: &Path) -> u64 {
    File::open(path).expect("a device").seek(SeekFrom::End(0)).expect("a size")
}

#[test]
fn discards_and_zeroing_arrive_as_ranges() {
    require!("blkdiscard", "fallocate");
    let (folders, memory) = (Folders::new(), memory());
    memory.write(0, &[7; 40 << 20]);
    let served = Served::start(&folders, &memory).expect("a device");
    let at = |offset: u64, length: u64| [offset.to_string(), length.to_string()];
    let [offset, length] = at(MIB, 3 * MIB);
    run("blkdiscard", &["--offset", &offset, "--length", &length, served.path()]);
    let [offset, length] = at(10 * MIB, 5 * MIB);
    run(
        "fallocate",
        &["--zero-range", "--keep-size", "--offset", &offset, "--length", &length, served.path()],
    );
    let [offset, length] = at(20 * MIB, 6 * MIB);
    run("fallocate", &["--punch-hole", "--offset", &offset, "--length", &length, served.path()]);
    let [offset, length] = at(30 * MIB, MIB);
    run("blkdiscard", &["--zeroout", "--offset", &offset, "--length", &length, served.path()]);
    let zeroed = memory.seen().zeroed;
    let total = |offset: u64, length: u64, may_unmap| {
        let area = ByteRange::new(offset, length);
        let parts = zeroed.iter().filter(|(range, unmap)| area.contains(*range) && *unmap == may_unmap);
        parts.map(|(range, _)| range.length).sum::<u64>()
    };
    assert_eq!(total(MIB, 3 * MIB, true), 3 * MIB, "{zeroed:?}");
    assert_eq!(total(10 * MIB, 5 * MIB, false), 5 * MIB, "{zeroed:?}");
    assert_eq!(total(20 * MIB, 6 * MIB, true), 6 * MIB, "{zeroed:?}");
    assert_eq!(total(30 * MIB, MIB, false), MIB, "{zeroed:?}");
    assert!(memory.read(ByteRange::new(MIB, 3 * MIB)).iter().all(|byte| *byte == 0));
    assert!(memory.read(ByteRange::new(4 * MIB, 6 * MIB)).iter().all(|byte| *byte == 7));
    assert_eq!(memory.seen().writes, 0, "nothing was written to zero it");
}

#[test]
fn a_sync_of_the_device_arrives_as_a_flush() {
    require!();
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    let device = OpenOptions::new().write(true).open(&served.device).expect("a device");
    device.write_all_at(&[5; 8192], 4096).expect("a write");
    let before = memory.seen();
    device.sync_all().expect("a sync");
    let after = memory.seen();
    assert!(after.flushes > before.flushes, "{before:?} {after:?}");
    assert_eq!(&memory.read(ByteRange::new(4096, 8192))[..], [5; 8192]);
}

#[test]
fn errors_of_the_volume_reach_the_application() {
    require!();
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    let device = OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(&served.device);
    let device = device.expect("a device");
    let mut block = BufferPool::new(0).take(4096);
    for failure in [libc::EIO, libc::ENOSPC, 0, 4096] {
        memory.fail(Some(Errno(failure)));
        assert!(device.read_exact_at(&mut block, MIB).is_err(), "{failure}");
        assert!(device.write_all_at(&block, MIB).is_err(), "{failure}");
        assert!(device.sync_all().is_err(), "{failure}");
    }
    memory.fail(None);
    device.write_all_at(&block, MIB).expect("a write");
    device.sync_all().expect("a sync");
}

#[test]
fn many_random_writes_read_back_as_written() {
    require!("fio");
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    run(
        "fio",
        &[
            "--name=verify",
            &format!("--filename={}", served.path()),
            "--rw=randwrite",
            "--bsrange=512-2m",
            "--blockalign=512",
            "--size=64m",
            "--direct=1",
            "--ioengine=libaio",
            "--iodepth=32",
            "--verify=crc32c",
            "--verify_fatal=1",
            "--verify_state_save=0",
        ],
    );
    let seen = memory.seen();
    assert!(seen.writes > 0 && seen.reads > 0, "{seen:?}");
}

#[test]
fn a_read_only_volume_is_a_read_only_device() {
    require!("mkfs.ext4");
    let (folders, written) = (Folders::new(), memory());
    written.write(MIB, &[9; 4096]);
    let memory = written.copy(true);
    let served = Served::start(&folders, &memory).expect("a device");
    let mut block = [0; 4096];
    File::open(&served.device).expect("a device").read_exact_at(&mut block, MIB).expect("a read");
    assert_eq!(block, [9; 4096]);
    assert_eq!(size_of_device(&served.device), SIZE_BYTES);
    let ro = fs::read_to_string(format!("/sys/block/{}/ro", &served.path()[5..])).expect("an attribute");
    assert_eq!(ro.trim(), "1");
    let made = Command::new("mkfs.ext4").args(["-q", "-F", served.path()]).output().expect("mkfs.ext4");
    assert!(!made.status.success());
    let refused = OpenOptions::new().write(true).open(folders.mount_point()).expect_err("a refusal");
    assert_eq!(refused.raw_os_error(), Some(libc::EROFS));
    assert_eq!(memory.seen().writes, 0);
}

#[test]
fn the_file_itself_takes_aligned_requests_within_its_size_only() {
    require!();
    let (folders, memory) = (Folders::new(), memory());
    let _served = Served::start(&folders, &memory).expect("a device");
    let file = OpenOptions::new().read(true).write(true).open(folders.mount_point()).expect("the file");
    let errno = |result: std::io::Result<usize>| result.expect_err("a refusal").raw_os_error();
    file.write_all_at(&[3; 1024], 512).expect("an aligned write");
    assert_eq!(errno(file.write_at(&[3; 100], 512)), Some(libc::EINVAL));
    assert_eq!(errno(file.write_at(&[3; 512], 100)), Some(libc::EINVAL));
    assert_eq!(errno(file.read_at(&mut [0; 100], 512)), Some(libc::EINVAL));
    assert_eq!(errno(file.write_at(&[3; 1024], SIZE_BYTES - 512)), Some(libc::ENOSPC));
    assert_eq!(file.read_at(&mut [0; 1024], SIZE_BYTES - 512).expect("a short read"), 512);
    assert_eq!(file.read_at(&mut [0; 1024], SIZE_BYTES).expect("an empty read"), 0);
    assert_eq!(file.metadata().expect("attributes").len(), SIZE_BYTES);
    assert_eq!(file.set_len(4096).expect_err("a refusal").raw_os_error(), Some(libc::EPERM));
    file.set_len(SIZE_BYTES).expect("no change");
    let mut large = BufferPool::new(0).take(3 << 20);
    file.read_exact_at(&mut large, 0).expect("a large read");
    assert!(large[512..1536].iter().all(|byte| *byte == 3) && large[1536] == 0);
}

/// The loop driver has the file synchronised when it is attached, which is answered at once. The device is announced before
/// the driver's call returns: whoever wrote and flushed by then was answered at once, too, with nothing durable.
#[test]
fn a_flush_in_a_devices_first_moment_is_one_where_something_was_written() {
    require!();
    let (folders, memory) = (Folders::new(), memory());
    let seen = memory.clone();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let flushes = tokio::task::LocalSet::new().block_on(&runtime, async {
        let (place, fuse, _) = life::mount(&folders.site(), false).expect("it is mounted");
        let table = Table::new(identity(&folders.site(), memory.geometry())).expect("a table");
        let server = fuse::Server::new(fuse, table, Vec::new(), Rc::new(memory), BufferPool::new(4 << 20));
        let server = server.expect("the runtime watches it");
        let served = server.clone();
        let serving = tokio::task::spawn_local(async move { served.serve().await });
        let point = place.mount_point.clone();
        let flushes = blocking(move || {
            let file = File::options().read(true).write(true).open(point)?;
            file.sync_all()?;
            let as_the_driver_does = seen.seen().flushes;
            file.write_all_at(&[1; 4096], 0)?;
            file.sync_all()?;
            std::io::Result::Ok((as_the_driver_does, seen.seen().flushes))
        });
        let flushes = flushes.await;
        blocking(move || life::take_away(&place)).await;
        serving.abort();
        flushes
    });
    assert_eq!(flushes.expect("the file is served"), (0, 1));
}
