//! What direct I/O on a file demands, and whether it can be had.
//!
//! The kernel is asked (`STATX_DIOALIGN`, Linux 6.1); an older one tells the sector size of a device, and a file is
//! tried out by reading from it.

use super::file::Kind;
use crate::buffer::BufferPool;
use rustix::fs::{AtFlags, OFlags, StatxFlags, fcntl_getfl, fcntl_setfl, ioctl_blksszget, statx};
use std::fs::OpenOptions;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// What the kernel's memory alignment can be at most: our buffers' own.
const MEMORY_LIMIT: u32 = crate::buffer::ALIGNMENT as u32;

/// `STATX_DIOALIGN` of `linux/stat.h`.
const STATX_DIOALIGN: StatxFlags = StatxFlags::from_bits_retain(0x2000);

/// What direct I/O wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Alignment {
    /// Of offsets and lengths, in bytes; at least 512.
    pub(super) offset_bytes: u64,
    /// Of memory, in bytes.
    pub(super) memory_bytes: usize,
}

/// Opens a file for direct I/O, or without where that is refused. Says which.
pub(super) fn open(path: &Path, options: &OpenOptions, flags: i32) -> io::Result<(OwnedFd, bool)> {
    let mut options = options.clone();
    match options.custom_flags(flags | libc::O_DIRECT).open(path) {
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
            Ok((options.custom_flags(flags).open(path)?.into(), false))
        }
        opened => Ok((opened?.into(), true)),
    }
}

/// The alignment that the file wants; none when direct I/O can't be had or its unit doesn't divide a backing's size,
/// which must not grow. Then the descriptor is switched to buffered I/O.
pub(super) fn settle(
    fd: &OwnedFd,
    kind: Kind,
    size_bytes: u64,
    direct: bool,
) -> io::Result<Option<Alignment>> {
    if !direct {
        return Ok(None);
    }
    let fits =
        |alignment: &Alignment| kind == Kind::Metadata || size_bytes.is_multiple_of(alignment.offset_bytes);
    let alignment = find(fd, kind, size_bytes)?.filter(fits);
    if alignment.is_none() {
        fcntl_setfl(fd, fcntl_getfl(fd)? - OFlags::DIRECT)?;
    }
    Ok(alignment)
}

fn find(fd: &OwnedFd, kind: Kind, size_bytes: u64) -> io::Result<Option<Alignment>> {
    let known = statx(fd, "", AtFlags::EMPTY_PATH, STATX_DIOALIGN);
    if let Ok(known) = known
        && known.stx_mask & STATX_DIOALIGN.bits() != 0
    {
        let (offset, memory) = (known.stx_dio_offset_align, known.stx_dio_mem_align);
        let usable = offset.is_power_of_two() && memory.is_power_of_two() && memory <= MEMORY_LIMIT;
        return Ok(usable
            .then(|| Alignment { offset_bytes: u64::from(offset.max(512)), memory_bytes: memory as usize }));
    }
    let unit = match kind {
        Kind::BlockDevice => Some(ioctl_blksszget(fd)?),
        Kind::Image | Kind::Metadata => try_out(fd, size_bytes)?,
    };
    Ok(unit.map(|unit| Alignment { offset_bytes: u64::from(unit.max(512)), memory_bytes: unit as usize }))
}

/// The smallest unit that the file lets read. A file that is too short to tell gets the largest.
fn try_out(fd: &OwnedFd, size_bytes: u64) -> io::Result<Option<u32>> {
    let mut buffer = BufferPool::new(0).take(4096);
    for unit in [512, 1024, 2048, 4096] {
        if size_bytes < 2 * u64::from(unit) {
            return Ok(Some(4096));
        }
        match rustix::io::pread(fd, &mut buffer[..unit as usize], u64::from(unit)) {
            Ok(_) => return Ok(Some(unit)),
            Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(None)
}

/// Whether a block device clears ranges by itself, so that none has to be written.
pub(super) fn device_clears_itself(fd: &impl AsFd) -> io::Result<bool> {
    let number = rustix::fs::fstat(fd)?.st_rdev;
    let device = crate::system::device_folder(number);
    // A partition has no queue of its own.
    let limit = ["queue/write_zeroes_max_bytes", "../queue/write_zeroes_max_bytes"]
        .iter()
        .find_map(|name| std::fs::read_to_string(device.join(name)).ok());
    Ok(limit.is_some_and(|limit| limit.trim().parse::<u64>().is_ok_and(|bytes| bytes > 0)))
}
