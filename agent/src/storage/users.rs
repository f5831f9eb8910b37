//! Who uses a device or an image file already: mounts, swap, the device mapper, md, loop devices.
//!
//! The kernel only says that a device is busy; here the operator is told by whom. Mounts of other mount namespaces
//! can't be seen, and remain "busy".
//!
//! Nothing here asks a file system about a file unless the backing itself lies in it: the image of another program's
//! loop device can be on a server that is gone, and whoever asks about it waits as long as that is.

use crate::system::{self, Holder, Mount};
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
    let mounts = system::mounts()?;
    let areas = system::swap_areas()?;
    for number in system::with_partitions(number)? {
        let device = system::device_path(number);
        if let Some(mount) = mounts.iter().find(|mount| is_of(mount, number)) {
            return Ok(Some(User::Mount { device, at: mount.at.clone() }));
        }
        if areas.iter().any(|area| is_device(area, number)) {
            return Ok(Some(User::Swap { area: device }));
        }
        if let Some(holder) = system::holders(number)?.into_iter().next() {
            return Ok(Some(User::Holder { device, holder: in_words(holder) }));
        }
    }
    Ok(None)
}

/// Who uses an image file without locking it.
pub(super) fn of_image(path: &Path, status: &Metadata) -> io::Result<Option<User>> {
    let real_path = fs::canonicalize(path)?;
    let mounts = system::mounts()?;
    let own_mount = system::mount_of(&mounts, &real_path).map(|mount| mount.number);
    let is_it = |other: &Path| {
        // Another name of the same file is in the same file system.
        let is_near = system::mount_of(&mounts, other).map(|mount| mount.number) == own_mount;
        let is_same = |other: Metadata| (other.dev(), other.ino()) == (status.dev(), status.ino());
        other == real_path || is_near && fs::metadata(other).is_ok_and(is_same)
    };
    if let Some(area) = system::swap_areas()?.into_iter().find(|area| is_it(area)) {
        return Ok(Some(User::Swap { area }));
    }
    for device in system::children(Path::new("/sys/block"))? {
        let Ok(backing) = system::read(&device.join("loop/backing_file")) else { continue };
        let backing = PathBuf::from(OsString::from_vec(backing));
        if !is_it(&backing) {
            continue;
        }
        let number = system::device_number(&device)?;
        let user = of_device(number)?;
        return Ok(Some(user.unwrap_or_else(|| User::Loop { device: system::device_path(number) })));
    }
    Ok(None)
}

/// Some file systems, like btrfs, have a number of their own: then the source tells.
fn is_of(mount: &Mount, number: u64) -> bool {
    mount.number == number || is_device(&mount.source, number)
}

/// Whether a path is the node of a device. Nodes are in `/dev`; what else a mount or an area is named by is left alone.
fn is_device(path: &Path, number: u64) -> bool {
    path.starts_with("/dev")
        && fs::metadata(path)
            .is_ok_and(|status| status.file_type().is_block_device() && status.rdev() == number)
}

/// The device, by the name that its owner gave it too.
fn in_words(holder: Holder) -> String {
    match holder.given_name {
        Some(name) => format!("{} ({name})", holder.kernel_name),
        None => holder.kernel_name,
    }
}
