//! Which file or disk a volume's backing is.
//!
//! A backing carries nothing of ours, so an empty disk under the old name looks like the volume. The state folder
//! therefore keeps what tells this file or disk from another: for an image its inode and time of birth, for a disk the
//! name that its hardware or its maker gives it. A backing that is another one than recorded is not opened: as a
//! primary it would count as in sync with replicas that hold something else. A finished recovery forgets the record,
//! because what it wrote is the volume's content; the operator can do the same for a copy of his own making.
//!
//! Where nothing tells disks from each other (a loop device, an old file system), nothing is recorded.

use crate::durable;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// The record's name in the volume's state folder.
const FILE_NAME: &str = "backing";

/// Why a backing is not opened.
#[derive(Debug, thiserror::Error)]
pub enum BackingError {
    /// It is another one than the volume had.
    #[error(
        "{} is not the file or disk that the volume had (that was {expected}, this is {found}): recover the \
         content from a peer, or, if it is a true copy, remove {}",
        path.display(), record.display()
    )]
    Replaced {
        /// The backing.
        path: PathBuf,
        /// What is recorded.
        expected: String,
        /// What it is.
        found: String,
        /// The record.
        record: PathBuf,
    },
    /// The record or the backing can't be looked at.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Checks that a backing is the one on record, and records it where there is none.
///
/// # Errors
/// [`BackingError`] when it is another one, or can't be looked at.
pub fn check(state_folder: &Path, backing: &Path) -> Result<(), BackingError> {
    let record = state_folder.join(FILE_NAME);
    let io_error = |operation, path: &Path| {
        let path = path.to_owned();
        move |source| BackingError::Io { operation, path, source }
    };
    let Some(found) = identity(backing).map_err(io_error("look at", backing))? else { return Ok(()) };
    match std::fs::read_to_string(&record) {
        Ok(expected) if expected.trim() == found => Ok(()),
        Ok(expected) => {
            let expected = expected.trim().to_owned();
            Err(BackingError::Replaced { path: backing.to_owned(), expected, found, record })
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            durable::replace(&record, format!("{found}\n").as_bytes()).map_err(io_error("write", &record))
        }
        Err(error) => Err(io_error("read", &record)(error)),
    }
}

/// Forgets which backing a volume has: the next one that is opened is taken for it.
///
/// # Errors
/// When the record can't be removed.
pub fn forget(state_folder: &Path) -> io::Result<()> {
    match std::fs::remove_file(state_folder.join(FILE_NAME)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// What tells a file or disk from others, if anything does.
fn identity(path: &Path) -> io::Result<Option<String>> {
    let status = std::fs::metadata(path)?;
    if !status.is_file() {
        return Ok(disk_identity(status.rdev()));
    }
    let born = status.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok());
    Ok(born.map(|born| format!("image {} of {}.{:09}", status.ino(), born.as_secs(), born.subsec_nanos())))
}

/// The name that sysfs knows for a disk or a partition (Documentation/ABI/testing/sysfs-block).
fn disk_identity(device: u64) -> Option<String> {
    let folder = PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device)));
    let read = |file: PathBuf| {
        let text = std::fs::read_to_string(file).ok()?.trim().to_owned();
        (!text.is_empty()).then_some(text)
    };
    let partition = read(folder.join("partition"));
    let disk = if partition.is_some() { folder.join("..") } else { folder };
    let names = ["dm/uuid", "wwid", "device/wwid", "device/serial", "serial", "md/uuid"];
    let name = names.iter().find_map(|name| read(disk.join(name)))?;
    Some(match partition {
        Some(number) => format!("partition {number} of disk {name}"),
        None => format!("disk {name}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_file_under_the_old_name_is_refused_until_the_record_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let backing = folder.path().join("image");
        std::fs::write(&backing, [0; 512]).unwrap();
        if identity(&backing).unwrap().is_none() {
            return eprintln!("skipped: the file system keeps no times of birth");
        }
        check(folder.path(), &backing).unwrap();
        std::fs::write(&backing, [1; 512]).unwrap();
        check(folder.path(), &backing).unwrap();
        let moved = folder.path().join("moved");
        std::fs::rename(&backing, &moved).unwrap();
        check(folder.path(), &moved).unwrap();
        std::fs::copy(&moved, &backing).unwrap();
        let refused = check(folder.path(), &backing);
        assert!(matches!(refused, Err(BackingError::Replaced { .. })), "{refused:?}");
        forget(folder.path()).unwrap();
        check(folder.path(), &backing).unwrap();
        forget(folder.path()).unwrap();
        forget(folder.path()).unwrap();
    }
}
