//! The mounting of a FUSE file, and its undoing.

use crate::system;
use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The file system's type as the table shows it; what comes after the dot is for people.
const FUSE_TYPE: &str = "fuse.blockmirror";

/// How many mounts of ours are at this path, one above the other.
///
/// # Errors
/// When the table cannot be read.
pub fn count_ours(point: &Path) -> io::Result<usize> {
    let mounts = system::mounts()?;
    Ok(mounts.iter().filter(|mount| mount.kind == FUSE_TYPE && mount.at == point).count())
}

/// Mounts the FUSE session of `fuse`, an open `/dev/fuse`, on a regular file; its root is then a regular file as well.
///
/// Only root's processes may use it. The loop driver opens nothing itself and does its reads and writes without asking
/// for rights, so users who may open the loop device don't need `allow_other` here.
///
/// # Errors
/// What mount(2) says.
pub fn mount_file(
    fuse: &File,
    source: &str,
    point: &Path,
    read_only: bool,
    max_read: usize,
) -> io::Result<()> {
    let options = format!(
        "fd={},rootmode={:o},user_id={},group_id={},max_read={max_read}",
        fuse.as_raw_fd(),
        libc::S_IFREG | 0o600,
        rustix::process::geteuid().as_raw(),
        rustix::process::getegid().as_raw(),
    );
    let options = CString::new(options).expect("the options have no zero byte");
    let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::NOATIME;
    if read_only {
        flags |= MountFlags::RDONLY;
    }
    Ok(rustix::mount::mount(
        source,
        point.as_os_str().as_bytes(),
        FUSE_TYPE,
        flags,
        Some(options.as_c_str()),
    )?)
}

/// Unmounts what is at a path, unless it is in use.
///
/// # Errors
/// What umount2(2) says; `EBUSY` when it is in use.
pub fn unmount(point: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(point, UnmountFlags::NOFOLLOW)?)
}

/// Ends the session of what is at a path, so that its users get errors, and takes it out of the tree of files.
///
/// # Errors
/// What umount2(2) says.
pub fn unmount_by_force(point: &Path) -> io::Result<()> {
    Ok(rustix::mount::unmount(point, UnmountFlags::NOFOLLOW | UnmountFlags::FORCE | UnmountFlags::DETACH)?)
}
