//! What the kernel tells in `/proc` and `/sys` about block devices: mounts, swap space, partitions, and the devices
//! that others are part of.
//!
//! Only text, names and what the kernel remembers of open files are read: no server behind a file system is asked about
//! anything, and no device is opened. One of them may be ours, served by the very thread that asks, or dead.

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, major, makedev, minor, statx};
use std::collections::HashSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

/// A line of `/proc/PID/mountinfo` (proc_pid_mountinfo(5)).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// The device's number.
    pub number: u64,
    /// Where it is mounted.
    pub at: PathBuf,
    /// The file system's type.
    pub kind: String,
    /// What is mounted, often a device's path.
    pub source: PathBuf,
}

/// The mounts that this process sees.
///
/// # Errors
/// When the table can't be read.
pub fn mounts() -> io::Result<Vec<Mount>> {
    mounts_of(Path::new("/proc/self"))
}

/// The mounts of all mount namespaces that have a process in them, each namespace once: of our own first, then each
/// with a process that is in it.
///
/// # Errors
/// When our own table can't be read.
pub fn mounts_everywhere() -> io::Result<Vec<(Option<Process>, Vec<Mount>)>> {
    let namespace = |process: &Path| fs::read_link(process.join("ns/mnt"));
    let own = Path::new("/proc/self");
    let mut known: HashSet<PathBuf> = namespace(own).into_iter().collect();
    let mut found = vec![(None, mounts_of(own)?)];
    for process in processes() {
        let folder = process.folder();
        // A process that can't be asked has ended, or is none of ours to ask.
        if namespace(&folder).is_ok_and(|namespace| known.insert(namespace))
            && let Ok(mounts) = mounts_of(&folder)
        {
            found.push((Some(process), mounts));
        }
    }
    Ok(found)
}

/// The mount that a path lies in, by the paths alone; of several at one place the last, which hides the others.
#[must_use]
pub fn mount_of<'a>(mounts: &'a [Mount], path: &Path) -> Option<&'a Mount> {
    // The last of those that are equally long.
    mounts
        .iter()
        .filter(|mount| path.starts_with(&mount.at))
        .max_by_key(|mount| mount.at.components().count())
}

fn mounts_of(process: &Path) -> io::Result<Vec<Mount>> {
    let table = fs::read(process.join("mountinfo"))?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(parse_mount).collect())
}

fn parse_mount(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let number = parse_number(std::str::from_utf8(fields.nth(2)?).ok()?)?;
    let at = unescape(fields.nth(1)?);
    // A varying number of optional fields ends with a single dash.
    fields.find(|field| *field == b"-")?;
    let kind = String::from_utf8(fields.next()?.to_vec()).ok()?;
    Some(Mount { number, at, kind, source: unescape(fields.next()?) })
}

/// The devices and files that the kernel swaps to.
///
/// # Errors
/// When the table can't be read; a kernel without swapping has none.
pub fn swap_areas() -> io::Result<Vec<PathBuf>> {
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

/// A process, by its number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process(pub u32);

impl Process {
    /// Where the kernel tells about it.
    #[must_use]
    pub fn folder(self) -> PathBuf {
        PathBuf::from(format!("/proc/{}", self.0))
    }

    /// The name of its program; none when it has ended.
    #[must_use]
    pub fn name(self) -> Option<String> {
        let name = read(&self.folder().join("comm")).ok()?;
        Some(String::from_utf8_lossy(&name).into_owned())
    }

    /// The numbers of the block devices that it has open, as far as we may know. Of a process that has ended, nothing.
    ///
    /// A device's name is the process's own: a container can have its node under any other.
    pub fn open_devices(self) -> impl Iterator<Item = u64> {
        let descriptors = fs::read_dir(self.folder().join("fd")).into_iter().flatten().flatten();
        descriptors.filter_map(|descriptor| open_device(&descriptor.path()))
    }
}

/// The number of the block device that a descriptor of `/proc/PID/fd` is open on, if it is one.
///
/// The link leads to the open file itself, by no path, and the kernel tells what it remembers of that.
fn open_device(descriptor: &Path) -> Option<u64> {
    let status = statx(CWD, descriptor, AtFlags::STATX_DONT_SYNC, StatxFlags::TYPE).ok()?;
    let is_device = FileType::from_raw_mode(status.stx_mode.into()) == FileType::BlockDevice;
    is_device.then(|| makedev(status.stx_rdev_major, status.stx_rdev_minor))
}

/// All processes but this one, in no order.
pub fn processes() -> impl Iterator<Item = Process> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    numbers.filter(|number| *number != std::process::id()).map(Process)
}

/// Where the kernel tells about a block device.
#[must_use]
pub fn device_folder(number: u64) -> PathBuf {
    let link = PathBuf::from(format!("/sys/dev/block/{}:{}", major(number), minor(number)));
    fs::canonicalize(&link).unwrap_or(link)
}

/// The size of a block device in bytes; nothing where there is no such device. Does not open it.
#[must_use]
pub fn size_bytes(number: u64) -> Option<u64> {
    let text = read(&device_folder(number).join("size")).ok()?;
    let sectors: u64 = std::str::from_utf8(&text).ok()?.parse().ok()?;
    sectors.checked_mul(512)
}

/// A device's node, by the kernel's name for it.
#[must_use]
pub fn device_path(number: u64) -> PathBuf {
    node(&device_folder(number))
}

/// The node of the device whose folder this is. The kernel writes a `!` for each `/` of a name.
fn node(folder: &Path) -> PathBuf {
    Path::new("/dev").join(file_name(folder).replace('!', "/"))
}

/// A device and its partitions, by their numbers.
///
/// # Errors
/// When the kernel's folder can't be read.
pub fn with_partitions(number: u64) -> io::Result<Vec<u64>> {
    let mut numbers = vec![number];
    for child in children(&device_folder(number))? {
        if child.join("partition").exists() {
            numbers.push(device_number(&child)?);
        }
    }
    Ok(numbers)
}

/// A block device's path and those of what shares its content: its partitions, or the disk that it is a partition of.
/// Just the path where it is no block device.
///
/// # Errors
/// When the kernel's folders can't be read.
pub fn sharing_content(path: &Path) -> io::Result<Vec<PathBuf>> {
    let number = fs::metadata(path).ok().filter(|status| status.file_type().is_block_device());
    let Some(number) = number.map(|status| status.rdev()) else { return Ok(vec![path.to_owned()]) };
    let folder = device_folder(number);
    let disk = folder.join("partition").exists().then(|| folder.parent().map(node)).flatten();
    let partitions = with_partitions(number)?.into_iter().skip(1).map(device_path);
    Ok(std::iter::once(path.to_owned()).chain(partitions).chain(disk).collect())
}

/// A device that another is a part of: one of the device mapper, of md, of bcache.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The kernel's name for it.
    pub kernel_name: String,
    /// The name that its owner gave it, of the device mapper alone.
    pub given_name: Option<String>,
}

/// The devices that this one is a part of.
///
/// # Errors
/// When the kernel's folder can't be read.
pub fn holders(number: u64) -> io::Result<Vec<Holder>> {
    let folders = children(&device_folder(number).join("holders"))?;
    let holder = |folder: &PathBuf| Holder {
        kernel_name: file_name(folder),
        given_name: read(&folder.join("dm/name"))
            .ok()
            .map(|name| String::from_utf8_lossy(&name).into_owned()),
    };
    Ok(folders.iter().map(holder).collect())
}

fn file_name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// The loop devices that are backed by this file, by the names that the kernel remembers: no file is looked at.
#[must_use]
pub fn loop_devices_on(file: &Path) -> Vec<PathBuf> {
    let devices = children(Path::new("/sys/block")).unwrap_or_default();
    let is_on_it = |device: &PathBuf| {
        read(&device.join("loop/backing_file")).is_ok_and(|name| name == file.as_os_str().as_bytes())
    };
    devices.into_iter().filter(is_on_it).map(|device| node(&device)).collect()
}

/// The entries of a folder of the kernel's; none when there is no such folder.
///
/// # Errors
/// When it is there and can't be read.
pub fn children(folder: &Path) -> io::Result<Vec<PathBuf>> {
    match fs::read_dir(folder) {
        Ok(entries) => entries.map(|entry| Ok(entry?.path())).collect(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// A value that the kernel tells, without the line's end.
///
/// # Errors
/// When it can't be read.
pub fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut value = fs::read(path)?;
    while value.pop_if(|byte| *byte == b'\n').is_some() {}
    Ok(value)
}

/// The number of the device whose folder this is.
///
/// # Errors
/// When it can't be read, or is none.
pub fn device_number(folder: &Path) -> io::Result<u64> {
    let text = read(&folder.join("dev"))?;
    parse_number(&String::from_utf8_lossy(&text))
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "the kernel names a device by two numbers"))
}

fn parse_number(text: &str) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_mountinfo_gives_number_place_type_and_source() {
        let line = b"36 35 98:5 / /mnt/two\\040words rw,noatime master:1 shared:2 - ext3 /dev/my\\134disk rw,errors=continue";
        let mount = Mount {
            number: makedev(98, 5),
            at: PathBuf::from("/mnt/two words"),
            kind: "ext3".to_owned(),
            source: PathBuf::from("/dev/my\\disk"),
        };
        assert_eq!(parse_mount(line), Some(mount));
        let fuse = b"37 35 0:52 / /run/x rw - fuse.blockmirror blockmirror:x rw,user_id=0";
        let fuse = parse_mount(fuse).expect("the optional fields may be missing");
        assert_eq!(
            (fuse.kind.as_str(), fuse.source.as_path()),
            ("fuse.blockmirror", Path::new("blockmirror:x"))
        );
        for wrong in
            [&b""[..], b"36 35 98 / /mnt rw - ext3 /dev/sda rw", b"36 35 98:5 / /mnt rw", b"nonsense"]
        {
            assert_eq!(parse_mount(wrong), None);
        }
    }

    #[test]
    fn a_path_lies_in_the_innermost_and_newest_mount() {
        let mount = |number, at: &str| Mount {
            number,
            at: PathBuf::from(at),
            kind: "ext4".to_owned(),
            source: PathBuf::from("/dev/sda"),
        };
        let mounts = [mount(1, "/"), mount(2, "/srv/data"), mount(3, "/srv/data"), mount(4, "/srv/dat")];
        for (path, number) in
            [("/srv/data/a.img", 3), ("/srv/data", 3), ("/srv/database", 1), ("/srv/dat/x", 4)]
        {
            assert_eq!(mount_of(&mounts, Path::new(path)).map(|mount| mount.number), Some(number), "{path}");
        }
        assert_eq!(mount_of(&[], Path::new("/x")), None);
    }

    #[test]
    fn only_whole_octal_escapes_are_undone() {
        for (text, path) in
            [("/a\\011b", "/a\tb"), ("/a\\", "/a\\"), ("/a\\09", "/a\\09"), ("/a\\999", "/a\\999")]
        {
            assert_eq!(unescape(text.as_bytes()), PathBuf::from(path));
        }
    }

    #[test]
    fn our_own_namespace_comes_first_and_no_namespace_twice() {
        let everywhere = mounts_everywhere().expect("the tables can be read");
        assert!(
            everywhere[0].0.is_none() && everywhere[0].1.iter().any(|mount| mount.at == Path::new("/proc"))
        );
        assert!(everywhere[1..].iter().all(|(process, _)| process.is_some()));
        assert!(processes().all(|process| process.0 != std::process::id()));
    }
}
