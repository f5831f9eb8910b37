//! Who uses a device or an image file already: mounts, swap, the device mapper, md, loop devices.
//!
//! The kernel only says that a device is busy; here the operator is told by whom. Mounts of other mount namespaces
//! can't be seen, and remain "busy".

use rustix::fs::{major, makedev, minor};
use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// Who uses a backing, and how to end that.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum User {
    /// A file system on it is mounted.
    #[error("{} is mounted at {}; unmount it first", device.display(), at.display())]
    Mount {
        /// The device or one of its partitions.
        device: PathBuf,
        /// The mount point.
        at: PathBuf,
    },
    /// The kernel swaps to it.
    #[error("{} is active swap space; run swapoff first", area.display())]
    Swap {
        /// The device, one of its partitions, or the file.
        area: PathBuf,
    },
    /// It is a part of another device: of the device mapper, of md, of bcache.
    #[error("{} is part of {holder}; remove it from there first", device.display())]
    Holder {
        /// The device or one of its partitions.
        device: PathBuf,
        /// The other device's name.
        holder: String,
    },
    /// A loop device is backed by it.
    #[error("it backs {}; detach that with `losetup -d` first", device.display())]
    Loop {
        /// The loop device.
        device: PathBuf,
    },
    /// Something has it open exclusively.
    #[error("another program has opened it exclusively; stop that first")]
    Exclusive,
    /// Something has locked it.
    #[error("another program has locked it; stop the agent or virtual machine that uses it first")]
    Lock,
}

/// Who uses a block device or one of its partitions.
pub(super) fn of_device(number: u64) -> io::Result<Option<User>> {
    let mounts = mounts()?;
    let areas = swap_areas()?;
    for number in with_partitions(number)? {
        let device = device_path(number);
        if let Some(mount) = mounts.iter().find(|mount| mount.is_of(number)) {
            return Ok(Some(User::Mount { device, at: mount.at.clone() }));
        }
        if areas.iter().any(|area| is_device(area, number)) {
            return Ok(Some(User::Swap { area: device }));
        }
        if let Some(holder) = holder_of(number)? {
            return Ok(Some(User::Holder { device, holder }));
        }
    }
    Ok(None)
}

/// Who uses an image file without locking it.
pub(super) fn of_image(path: &Path, status: &Metadata) -> io::Result<Option<User>> {
    let is_it = |other: &Path| {
        fs::metadata(other).is_ok_and(|other| (other.dev(), other.ino()) == (status.dev(), status.ino()))
    };
    if let Some(area) = swap_areas()?.into_iter().find(|area| is_it(area)) {
        return Ok(Some(User::Swap { area }));
    }
    let real_path = fs::canonicalize(path)?;
    for device in children(Path::new("/sys/block"))? {
        let Ok(backing) = read(&device.join("loop/backing_file")) else { continue };
        let backing = PathBuf::from(OsString::from_vec(backing));
        if backing != real_path && !is_it(&backing) {
            continue;
        }
        let number = device_number(&device)?;
        let user = of_device(number)?;
        return Ok(Some(user.unwrap_or_else(|| User::Loop { device: device_path(number) })));
    }
    Ok(None)
}

/// Where the kernel tells about a block device.
pub(super) fn device_folder(number: u64) -> PathBuf {
    let link = PathBuf::from(format!("/sys/dev/block/{}:{}", major(number), minor(number)));
    fs::canonicalize(&link).unwrap_or(link)
}

/// The device's node, by the kernel's name for it.
fn device_path(number: u64) -> PathBuf {
    let folder = device_folder(number);
    let name = folder.file_name().unwrap_or_default().to_string_lossy().replace('!', "/");
    Path::new("/dev").join(name)
}

fn is_device(path: &Path, number: u64) -> bool {
    fs::metadata(path).is_ok_and(|status| status.file_type().is_block_device() && status.rdev() == number)
}

fn with_partitions(number: u64) -> io::Result<Vec<u64>> {
    let mut numbers = vec![number];
    for child in children(&device_folder(number))? {
        if child.join("partition").exists() {
            numbers.push(device_number(&child)?);
        }
    }
    Ok(numbers)
}

/// The device that this one is a part of, by the name that its owner gave it.
fn holder_of(number: u64) -> io::Result<Option<String>> {
    let Some(holder) = children(&device_folder(number).join("holders"))?.into_iter().next() else {
        return Ok(None);
    };
    let kernel_name = holder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    Ok(Some(match read(&holder.join("dm/name")) {
        Ok(name) => format!("{kernel_name} ({})", String::from_utf8_lossy(&name)),
        Err(_) => kernel_name,
    }))
}

/// The entries of a folder of the kernel's; none when there is no such folder.
fn children(folder: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// A value that the kernel tells, without the line's end.
fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut value = fs::read(path)?;
    while value.last() == Some(&b'\n') {
        value.pop();
    }
    Ok(value)
}

/// The number in a device's folder.
fn device_number(folder: &Path) -> io::Result<u64> {
    let text = read(&folder.join("dev"))?;
    parse_number(&String::from_utf8_lossy(&text))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the kernel names a device by two numbers"))
}

fn parse_number(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// A line of `/proc/self/mountinfo` (proc_pid_mountinfo(5)).
#[derive(Debug, PartialEq, Eq)]
struct Mount {
    number: u64,
    at: PathBuf,
    source: PathBuf,
}

impl Mount {
    /// Some file systems, like btrfs, have a number of their own: then the source tells.
    fn is_of(&self, number: u64) -> bool {
        self.number == number || is_device(&self.source, number)
    }
}

fn mounts() -> io::Result<Vec<Mount>> {
    Ok(fs::read("/proc/self/mountinfo")?.split(|byte| *byte == b'\n').filter_map(parse_mount).collect())
}

fn parse_mount(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let number = parse_number(std::str::from_utf8(fields.nth(2)?).ok()?)?;
    let at = unescape(fields.nth(1)?);
    // Optional fields end with a dash; the file system's type and the source follow.
    let source = unescape(fields.skip_while(|field| *field != b"-").nth(2)?);
    Some(Mount { number, at, source })
}

fn swap_areas() -> io::Result<Vec<PathBuf>> {
    let table = match fs::read("/proc/swaps") {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        table => table?,
    };
    let lines = table.split(|byte| *byte == b'\n').skip(1);
    Ok(lines.filter_map(|line| line.split(|byte| b" \t".contains(byte)).next()).map(unescape).collect())
}

/// A path as the kernel prints it: blanks and the like as a backslash and three octal digits.
fn unescape(text: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text;
    while let Some((&first, tail)) = rest.split_first() {
        let digits = (first == b'\\').then(|| tail.get(..3)).flatten();
        let escaped = digits.and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        bytes.push(escaped.unwrap_or(first));
        rest = if escaped.is_some() { &tail[3..] } else { tail };
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_gives_number_place_and_source() {
        let line = b"36 35 98:5 / /mnt/two\\040words rw,noatime master:1 shared:2 - ext3 /dev/my\\134disk rw,errors=continue";
        let mount = Mount {
            number: makedev(98, 5),
            at: PathBuf::from("/mnt/two words"),
            source: PathBuf::from("/dev/my\\disk"),
        };
        assert_eq!(parse_mount(line), Some(mount));
        for wrong in [&b""[..], b"36 35 98 / /mnt rw - ext3 /dev/sda rw", b"36 35 98:5 / /mnt rw"] {
            assert_eq!(parse_mount(wrong), None);
        }
    }

    #[test]
    fn only_whole_octal_escapes_are_undone() {
        for (text, path) in
            [("/a\\011b", "/a\tb"), ("/a\\", "/a\\"), ("/a\\09", "/a\\09"), ("/a\\999", "/a\\999")]
        {
            assert_eq!(unescape(text.as_bytes()), PathBuf::from(path));
        }
    }
}
