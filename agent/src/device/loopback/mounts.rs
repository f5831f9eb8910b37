//! The kernel's table of mounts, and the mounting of a FUSE file.
//!
//! The table is read as text from `/proc`, which never asks the file systems themselves: one of them may be ours,
//! served by the very thread that asks, or dead.

use rustix::mount::{MountFlags, UnmountFlags};
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

/// The file system's type as the table shows it; what comes after the dot is for people.
const FUSE_TYPE: &str = "fuse.blockmirror";

/// One line of the table (`proc_pid_mountinfo(5)`).
#[derive(Debug, PartialEq, Eq)]
pub struct Mount {
    /// The device, as `major:minor`.
    pub device: String,
    /// Where it is mounted.
    pub point: PathBuf,
    /// The file system's type.
    pub kind: String,
    /// What is mounted, often a device's path.
    pub source: PathBuf,
}

/// Reads a table; lines that make no sense are left out.
pub fn parse(table: &[u8]) -> impl Iterator<Item = Mount> {
    table.split(|byte| *byte == b'\n').filter_map(parse_line)
}

fn parse_line(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let device = String::from_utf8(fields.nth(2)?.to_vec()).ok()?;
    let point = unescape(fields.nth(1)?);
    // A varying number of optional fields ends with a single dash.
    fields.find(|field| *field == b"-")?;
    let kind = String::from_utf8(fields.next()?.to_vec()).ok()?;
    Some(Mount { device, point, kind, source: unescape(fields.next()?) })
}

/// The table writes blanks and backslashes as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(byte) if *first == b'\\' => {
                bytes.push(byte);
                rest = &after[3..];
            }
            _ => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    std::ffi::OsString::from_vec(bytes).into()
}

/// How many mounts of ours are at this path, one above the other.
///
/// # Errors
/// When the table cannot be read.
pub fn count_ours(point: &Path) -> io::Result<usize> {
    let table = std::fs::read("/proc/self/mountinfo")?;
    Ok(parse(&table).filter(|mount| mount.kind == FUSE_TYPE && mount.point == point).count())
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_of_mounts_is_read_with_its_escapes_and_optional_fields() {
        let table = b"36 35 98:0 / /a\\040b\\134c rw,noatime master:1 shared:7 - ext4 /dev/loop7 rw\n\
                      37 35 0:52 / /run/x rw - fuse.blockmirror blockmirror:x rw,user_id=0\n\
                      nonsense\n";
        let mount = |device: &str, point: &str, kind: &str, source: &str| Mount {
            device: device.into(),
            point: point.into(),
            kind: kind.into(),
            source: source.into(),
        };
        let expected = [
            mount("98:0", "/a b\\c", "ext4", "/dev/loop7"),
            mount("0:52", "/run/x", "fuse.blockmirror", "blockmirror:x"),
        ];
        assert_eq!(parse(table).collect::<Vec<_>>(), expected);
    }
}
