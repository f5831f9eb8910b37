//! Which file or disk a volume's backing is.
//!
//! A backing carries nothing of ours, so an empty disk under the old name looks like the volume. The state folder
//! therefore keeps what tells this file or disk from another: for an image its inode and time of birth, for a disk the
//! name that its hardware or its maker gives it. A backing that is another one than recorded is not opened: as a
//! primary it would count as in sync with replicas that hold something else. A finished recovery says so in the record,
//! and from whom; an operator who made a true copy himself removes it. Either way the volume is told that the content
//! is not what its maps are relative to.
//!
//! The record's first line is the identity, or what a recovery says of itself; a second line may name a file or disk that
//! a recovery filled elsewhere, for when the configuration is changed to it. A disk that has no name of its own, as many
//! virtual ones, is known by where it is plugged in: one that takes its place there is not told from it.

use crate::durable;
use blockmirror_protocol::units::HostId;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// The record's name in the volume's state folder.
const FILE_NAME: &str = "backing";
/// What the record of a recovery begins with, before the source's fingerprint.
const RECOVERED: &str = "recovered from ";
/// What stands between the source and the target.
const INTO: &str = " into ";
/// What it begins with as long as the recovery is not complete.
const RECOVERING: &str = "being recovered from ";

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
    /// A recovery into it was interrupted.
    #[error(
        "a recovery into {} is not complete: run `blockmirror recover` again until it is, or, if the content is \
         whole all the same, remove {}",
        path.display(), record.display()
    )]
    HalfRecovered {
        /// The backing.
        path: PathBuf,
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

/// How a backing and its record go together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Match {
    /// It is the one on record, or nothing tells.
    Same,
    /// It takes the place of the one before; [`record`] ends that.
    Adopted {
        /// What is to be recorded.
        identity: String,
        /// The host whose copy it was recovered from.
        source: Option<HostId>,
    },
}

/// Compares a backing with the record.
///
/// # Errors
/// [`BackingError`] when it is another one, or can't be looked at.
pub fn compare(state_folder: &Path, backing: &Path) -> Result<Match, BackingError> {
    let record = state_folder.join(FILE_NAME);
    let found = identity(backing).map_err(io_error("look at", backing))?;
    let recorded = match std::fs::read_to_string(&record) {
        Ok(recorded) => recorded.trim().to_owned(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Ok(Match::Adopted { identity: found, source: None });
        }
        Err(error) => return Err(io_error("read", &record)(error)),
    };
    let recovered = recorded.lines().filter_map(|line| line.strip_prefix(RECOVERED)?.split_once(INTO));
    if let Some((source, _)) = recovered.into_iter().find(|(_, target)| *target == found) {
        return Ok(Match::Adopted { identity: found, source: HostId::from_hex(source).ok() });
    }
    let expected = recorded.lines().next().unwrap_or_default();
    if expected.starts_with(RECOVERING) {
        return Err(BackingError::HalfRecovered { path: backing.to_owned(), record });
    }
    if expected == found {
        return Ok(Match::Same);
    }
    let expected = expected.to_owned();
    Err(BackingError::Replaced { path: backing.to_owned(), expected, found, record })
}

/// Whether the state folder is of a volume that was opened: not what an attempt to make one has left.
#[must_use]
pub fn is_on_record(state_folder: &Path) -> bool {
    state_folder.join(FILE_NAME).exists()
}

/// Records durably which backing the volume has from now on.
///
/// # Errors
/// [`BackingError::Io`] when the record can't be written.
pub fn record(state_folder: &Path, identity: &str) -> Result<(), BackingError> {
    let record = state_folder.join(FILE_NAME);
    durable::replace(&record, format!("{identity}\n").as_bytes()).map_err(io_error("write", &record))
}

/// Records durably that the backing was filled with a peer's content, and may be opened again.
///
/// # Errors
/// [`BackingError::Io`] when the record can't be written, or the backing not looked at.
pub fn record_recovery(state_folder: &Path, backing: &Path, source: HostId) -> Result<(), BackingError> {
    record(state_folder, &recovered_into(backing, source)?)
}

/// Records durably that a recovery writes to the backing: until it has ended, the volume is not opened from it.
///
/// # Errors
/// [`BackingError::Io`] when the record can't be written.
pub fn record_recovery_begun(state_folder: &Path, source: HostId) -> Result<(), BackingError> {
    record(state_folder, &format!("{RECOVERING}{source}"))
}

/// Records durably that a peer's content was recovered into another file or disk than the backing, which may take the
/// backing's place.
///
/// # Errors
/// [`BackingError::Io`] when the record can't be read or written, or the target not looked at.
pub fn record_recovery_elsewhere(
    state_folder: &Path,
    target: &Path,
    source: HostId,
) -> Result<(), BackingError> {
    let path = state_folder.join(FILE_NAME);
    let recorded = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        read => read.map_err(io_error("read", &path))?,
    };
    let expected = recorded.lines().next().unwrap_or("nothing");
    record(state_folder, &format!("{expected}\n{}", recovered_into(target, source)?))
}

fn recovered_into(target: &Path, source: HostId) -> Result<String, BackingError> {
    let identity = identity(target).map_err(io_error("look at", target))?;
    Ok(format!("{RECOVERED}{source}{INTO}{identity}"))
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BackingError {
    let path = path.to_owned();
    move |source| BackingError::Io { operation, path, source }
}

/// What tells a file or disk from others.
fn identity(path: &Path) -> io::Result<String> {
    let status = std::fs::metadata(path)?;
    if !status.is_file() {
        return disk_identity(status.rdev());
    }
    let born =
        status.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    Ok(format!("image {} of {}.{:09}", status.ino(), born.as_secs(), born.subsec_nanos()))
}

/// The name that sysfs knows for a disk or a partition (Documentation/ABI/testing/sysfs-block), or else the place that
/// the kernel sees it at, down to the slot. A path in /dev is neither: the next start may lead it to another disk.
fn disk_identity(device: u64) -> io::Result<String> {
    let folder = PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device)));
    if let Some(name) = disk_name(folder.clone()) {
        return Ok(name);
    }
    let place = std::fs::canonicalize(folder)?;
    let place = place.strip_prefix("/sys/devices").unwrap_or(&place);
    Ok(format!("the disk at {}", place.display()))
}

fn disk_name(folder: PathBuf) -> Option<String> {
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
    fn another_file_under_the_old_name_is_refused_until_a_recovery_is_on_record() {
        let folder = tempfile::tempdir().unwrap();
        let backing = folder.path().join("image");
        std::fs::write(&backing, [0; 512]).unwrap();
        let Match::Adopted { identity, source: None } = compare(folder.path(), &backing).unwrap() else {
            panic!("nothing is on record yet");
        };
        record(folder.path(), &identity).unwrap();
        std::fs::write(&backing, [1; 512]).unwrap();
        assert_eq!(compare(folder.path(), &backing).unwrap(), Match::Same);
        let moved = folder.path().join("moved");
        std::fs::rename(&backing, &moved).unwrap();
        assert_eq!(compare(folder.path(), &moved).unwrap(), Match::Same);
        std::fs::copy(&moved, &backing).unwrap();
        let refused = compare(folder.path(), &backing);
        assert!(matches!(refused, Err(BackingError::Replaced { .. })), "{refused:?}");
        record_recovery_elsewhere(folder.path(), &backing, HostId([8; 32])).unwrap();
        assert_eq!(compare(folder.path(), &moved).unwrap(), Match::Same);
        let adopted = compare(folder.path(), &backing).unwrap();
        assert!(matches!(adopted, Match::Adopted { source: Some(HostId([8, ..])), .. }), "{adopted:?}");
        record_recovery_begun(folder.path(), HostId([7; 32])).unwrap();
        let half = compare(folder.path(), &backing);
        assert!(matches!(half, Err(BackingError::HalfRecovered { .. })), "{half:?}");
        record_recovery(folder.path(), &backing, HostId([7; 32])).unwrap();
        let adopted = compare(folder.path(), &backing).unwrap();
        assert!(matches!(adopted, Match::Adopted { source: Some(HostId([7, ..])), .. }), "{adopted:?}");
        let other = compare(folder.path(), &moved);
        assert!(matches!(other, Err(BackingError::Replaced { .. })), "it was not recovered into: {other:?}");
    }
}
