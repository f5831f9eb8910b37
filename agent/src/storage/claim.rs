//! The claim on a backing, so that no two programs write it at once.
//!
//! A block device is opened exclusively (`O_EXCL`), which the kernel grants to one holder: a mount, swap, the device
//! mapper, md, or one program. An image file, and a device too, is locked: as a whole by whoever writes it, with a
//! lock of the open file description and with `flock`, so that programs which use either notice. qemu locks single
//! bytes (`block/file-posix.c`): 101 while it writes an image, 201 while it lets nobody else write. A reader of ours
//! looks at the one and locks the other, and shares its own lock below those with further readers.

use super::direct;
use super::file::{Access, Kind};
use super::users::User;
use blockmirror_protocol::ranges::ByteRange;
use rustix::fs::{FlockOperation, flock};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

/// Where our readers lock.
const READERS: ByteRange = ByteRange { offset: 0, length: 100 };
/// Locked by qemu while it writes.
const QEMU_WRITES: ByteRange = ByteRange { offset: 101, length: 1 };
/// Locked by qemu, and by our readers, while nobody else may write.
const OTHERS_MUST_NOT_WRITE: ByteRange = ByteRange { offset: 201, length: 1 };
/// What our writers lock: all there is and will be, which the kernel calls a length of zero.
const EVERYTHING: ByteRange = ByteRange { offset: 0, length: 0 };

/// How often, and how long apart, a busy device is tried.
const BUSY_ATTEMPTS: u32 = 5;
const BUSY_PAUSE: Duration = Duration::from_millis(20);

/// Opens a backing and claims it. Says whether it is open for direct I/O, or who has claimed it already.
pub(super) fn open(path: &Path, kind: Kind, access: Access) -> io::Result<Result<(OwnedFd, bool), User>> {
    let mut options = OpenOptions::new();
    options.read(true).write(access == Access::ReadWrite);
    let exclusive = if kind == Kind::BlockDevice { libc::O_EXCL } else { 0 };
    let Some(opened) = open_unless_busy(path, &options, exclusive)? else {
        return Ok(Err(User::Exclusive));
    };
    let (fd, direct) = match access {
        Access::ReadWrite => opened,
        // Nobody holds a device now; readers don't hold it against each other.
        Access::ReadOnly => {
            drop(opened);
            direct::open(path, &options, 0)?
        }
    };
    Ok(if lock(&fd, kind, access)? { Ok((fd, direct)) } else { Err(User::Lock) })
}

/// Opens a file; not when it is busy and stays so for a moment. A program that another thread is just starting has
/// our descriptors until it runs, also one that was closed here meanwhile.
fn open_unless_busy(path: &Path, options: &OpenOptions, flags: i32) -> io::Result<Option<(OwnedFd, bool)>> {
    for _ in 0..BUSY_ATTEMPTS {
        match direct::open(path, options, flags) {
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => std::thread::sleep(BUSY_PAUSE),
            opened => return opened.map(Some),
        }
    }
    Ok(None)
}

/// Ends the locks, also where a program that is just being started has a copy of the descriptor.
pub(super) fn release(fd: &OwnedFd) {
    // Closing the descriptor is all that is left to do when this fails.
    let _ = set_lock(fd, libc::F_UNLCK, EVERYTHING);
    let _ = flock(fd, FlockOperation::NonBlockingUnlock);
}

/// Locks the file; not when somebody else's lock is in the way.
pub(super) fn lock(fd: &OwnedFd, kind: Kind, access: Access) -> io::Result<bool> {
    let locked = match access {
        Access::ReadWrite => set_lock(fd, libc::F_WRLCK, EVERYTHING)?,
        Access::ReadOnly => {
            set_lock(fd, libc::F_RDLCK, READERS)?
                && set_lock(fd, libc::F_RDLCK, OTHERS_MUST_NOT_WRITE)?
                && !is_locked(fd, QEMU_WRITES)?
        }
    };
    // udev takes this lock on a device whenever it looks at it, and would be kept from looking by ours.
    if !locked || kind == Kind::BlockDevice {
        return Ok(locked);
    }
    let operation = match access {
        Access::ReadWrite => FlockOperation::NonBlockingLockExclusive,
        Access::ReadOnly => FlockOperation::NonBlockingLockShared,
    };
    match flock(fd, operation) {
        Ok(()) => Ok(true),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn record(kind: i32, range: ByteRange) -> libc::flock {
    // SAFETY: the record consists of integers, for all of which zero is a value.
    let mut record: libc::flock = unsafe { std::mem::zeroed() };
    record.l_type = kind as libc::c_short;
    record.l_whence = libc::SEEK_SET as libc::c_short;
    record.l_start = range.offset as libc::off_t;
    record.l_len = range.length as libc::off_t;
    record
}

fn set_lock(fd: &OwnedFd, kind: i32, range: ByteRange) -> io::Result<bool> {
    let record = record(kind, range);
    // SAFETY: the kernel reads the record, which outlives the call.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_SETLK, &raw const record) } == 0 {
        return Ok(true);
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::EACCES) => Ok(false),
        _ => Err(error),
    }
}

fn is_locked(fd: &OwnedFd, range: ByteRange) -> io::Result<bool> {
    let mut record = record(libc::F_WRLCK, range);
    // SAFETY: the kernel reads and fills the record, which outlives the call.
    if unsafe { libc::fcntl(fd.as_raw_fd(), libc::F_OFD_GETLK, &raw mut record) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(record.l_type != libc::F_UNLCK as libc::c_short)
}
