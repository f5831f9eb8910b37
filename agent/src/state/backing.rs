//! Which file or disk a volume's backing is.
//!
//! A backing carries nothing of ours, so an empty disk under the old name looks like the volume. The state folder
//! therefore keeps what tells this file or disk from another: for an image its inode and time of birth, for a disk the
//! name that its hardware or its maker gives it. A backing that is another one than recorded is not opened: as a
//! primary it would count as in sync with replicas that hold something else. A finished recovery says so in the record,
//! and from whom; an operator who made a true copy himself removes it. Either way the volume is told that the content
//! is not what its maps are relative to.
//!
//! A finished recovery also records of what history the content is that it copied: that, and nothing newer, is what the
//! host claims from then on, whatever it had before its disk was lost (X4, L4).
//!
//! The record's first line is the identity of what was served last. A recovery adds, or puts in its place where that is
//! the target, that the target is being filled, and at the end, that it was: the configuration may be changed to it
//! then. A disk that has no name of its own, as many virtual ones, is known by where it is plugged in: one that takes its
//! place there is not told from it.

use crate::durable;
use blockmirror_protocol::adoption::Content;
use blockmirror_protocol::units::{Epoch, GenerationId, HostId, Position, Sequence};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// The record's name in the volume's state folder.
const FILE_NAME: &str = "backing";
/// What the line of a recovery begins with, before the source's fingerprint.
const RECOVERED: &str = "recovered from ";
/// What it begins with as long as the recovery is not complete.
const RECOVERING: &str = "being recovered from ";
/// What the line of a rebuild begins with: nothing of the content is there yet, and it is served from the source.
const REBUILT: &str = "to be rebuilt from ";
/// What stands between the source and what its copy was; earlier releases did not say that.
const HOLDING: &str = " holding ";
/// What its copy was where it was no legal image of the volume.
const MIXTURE: &str = "a mixture";
/// What stands between the position of its content and its generations, and between these.
const OF: &str = " of ";
const AND: &str = ",";
/// What stands between the source and the target's identity.
const INTO: &str = " into ";
/// What the identity of a disk begins with that has no name.
const PLACE: &str = "the disk at ";

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
    /// It is the one on record.
    Same,
    /// It is the one on record, which an earlier release knew by this path; [`record`] ends that.
    Renamed {
        /// What is to be recorded.
        identity: String,
    },
    /// It takes the place of the one before; [`record`] ends that.
    Adopted {
        /// What is to be recorded.
        identity: String,
        /// The recovery that filled it; nothing where it is new, or the operator says that it is a true copy.
        recovered: Option<Recovered>,
    },
}

/// A recovery that is complete.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recovered {
    /// The host whose copy was recovered.
    pub source: HostId,
    /// What that was; nothing where an earlier release recovered it.
    pub content: Option<Content>,
    /// Whether nothing of it is on the backing yet (S4).
    pub is_absent: bool,
}

/// What was recovered, as the record says it.
fn text_of(content: &Content) -> String {
    match content {
        Content::Mixture => MIXTURE.to_owned(),
        Content::Image { position: Position { generation, epoch, sequence }, lineage } => {
            let lineage: Vec<String> = lineage.iter().map(ToString::to_string).collect();
            format!("{generation}/{}/{}{OF}{}", epoch.0, sequence.0, lineage.join(AND))
        }
    }
}

/// Reads what [`text_of`] wrote.
fn content_of(text: &str) -> Option<Content> {
    if text == MIXTURE {
        return Some(Content::Mixture);
    }
    let (position, lineage) = text.split_once(OF)?;
    let mut parts = position.split('/');
    let position = Position {
        generation: GenerationId::from_hex(parts.next()?).ok()?,
        epoch: Epoch(parts.next()?.parse().ok()?),
        sequence: Sequence(parts.next()?.parse().ok()?),
    };
    let lineage = lineage.split(AND).filter(|text| !text.is_empty());
    let lineage = lineage.map(|text| GenerationId::from_hex(text).ok()).collect::<Option<_>>()?;
    Some(Content::Image { position, lineage })
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
            return Ok(Match::Adopted { identity: found, recovered: None });
        }
        Err(error) => return Err(io_error("read", &record)(error)),
    };
    let lines = || recorded.lines();
    if lines().any(|line| line.starts_with(RECOVERING) && is_into(line, &found)) {
        return Err(BackingError::HalfRecovered { path: backing.to_owned(), record });
    }
    if let Some(recovered) = lines().filter(|line| is_into(line, &found)).find_map(recovered) {
        return Ok(Match::Adopted { identity: found, recovered: Some(recovered) });
    }
    let expected = lines().next().unwrap_or_default().to_owned();
    if expected == found {
        return Ok(Match::Same);
    }
    if expected == at_path(backing) {
        return Ok(Match::Renamed { identity: found });
    }
    Err(BackingError::Replaced { path: backing.to_owned(), expected, found, record })
}

/// Whether a line is about a recovery into this file or disk. Earlier releases did not say into what.
fn is_into(line: &str, identity: &str) -> bool {
    [RECOVERED, RECOVERING, REBUILT].iter().any(|what| line.starts_with(what))
        && line.split_once(INTO).is_none_or(|(_, target)| target == identity)
}

/// Whom the content of a finished recovery is from, and what it is. What can't be read of that is not known.
fn recovered(line: &str) -> Option<Recovered> {
    let (rest, is_absent) = match line.strip_prefix(REBUILT) {
        Some(rest) => (rest, true),
        None => (line.strip_prefix(RECOVERED)?, false),
    };
    let from = rest.split_once(INTO).map_or(rest, |(from, _)| from);
    let (source, content) = from.split_once(HOLDING).unwrap_or((from, ""));
    let source = HostId::from_hex(source).unwrap_or_default();
    Some(Recovered { source, content: content_of(content), is_absent })
}

/// Whether a file or disk is one that the record names. One that can't be looked at is none.
#[must_use]
pub fn is_named(state_folder: &Path, path: &Path) -> bool {
    let recorded = std::fs::read_to_string(state_folder.join(FILE_NAME)).unwrap_or_default();
    identity(path).is_ok_and(|found| recorded.lines().any(|line| is_about(line, &found)))
}

fn is_about(line: &str, identity: &str) -> bool {
    line == identity || line.split_once(INTO).is_some_and(|(_, target)| target == identity)
}

/// Whether the state folder is of a volume that was opened, or can't be looked into: not what an attempt to make one has left.
#[must_use]
pub fn is_on_record(state_folder: &Path) -> bool {
    state_folder.join(FILE_NAME).try_exists().unwrap_or(true)
}

/// Removes the record, durably: the volume did not come to be.
///
/// # Errors
/// [`BackingError::Io`] when it can't be removed.
pub fn forget(state_folder: &Path) -> Result<(), BackingError> {
    let record = state_folder.join(FILE_NAME);
    durable::remove(&record).map_err(io_error("remove", &record))
}

/// Records durably which backing the volume has from now on.
///
/// # Errors
/// [`BackingError::Io`] when the record can't be written.
pub fn record(state_folder: &Path, identity: &str) -> Result<(), BackingError> {
    let record = state_folder.join(FILE_NAME);
    durable::replace(&record, format!("{identity}\n").as_bytes()).map_err(io_error("write", &record))
}

/// Records durably that a recovery writes to a file or disk: until it has ended, no volume is opened from that.
///
/// # Errors
/// [`BackingError::Io`] when the record can't be read or written, or the target not looked at.
pub fn record_recovery_begun(state_folder: &Path, target: &Path, source: HostId) -> Result<(), BackingError> {
    record_recovering(state_folder, target, &format!("{RECOVERING}{source}{INTO}"))
}

/// Whether a file or disk was opened as the volume's backing, and no recovery into it was begun since. One that can't be
/// looked at was not.
#[must_use]
pub fn was_served(state_folder: &Path, path: &Path) -> bool {
    let recorded = std::fs::read_to_string(state_folder.join(FILE_NAME)).unwrap_or_default();
    identity(path).is_ok_and(|found| {
        let has = |of: fn(&str, &str) -> bool| recorded.lines().any(|line| of(line, &found));
        has(|line, found| line == found) && !has(is_into)
    })
}

/// Records durably that a file or disk was filled with a peer's content, and may be opened as the volume's backing.
///
/// # Errors
/// [`BackingError::Io`] when the record can't be read or written, or the target not looked at.
pub fn record_recovery(
    state_folder: &Path,
    target: &Path,
    source: HostId,
    content: &Content,
) -> Result<(), BackingError> {
    record_recovering(
        state_folder,
        target,
        &format!("{RECOVERED}{source}{HOLDING}{}{INTO}", text_of(content)),
    )
}

/// Records durably that a file or disk is to hold what a peer does, and is served from there until then.
///
/// # Errors
/// [`BackingError::Io`] when the record can't be read or written, or the target not looked at.
pub fn record_rebuild(
    state_folder: &Path,
    target: &Path,
    source: HostId,
    content: &Content,
) -> Result<(), BackingError> {
    record_recovering(state_folder, target, &format!("{REBUILT}{source}{HOLDING}{}{INTO}", text_of(content)))
}

/// Puts a line about the target in the place of whatever the record says of it.
/// A file or disk that [`record_rebuild`] named is not taken after all.
///
/// # Errors
/// As [`record_rebuild`].
pub fn forget_rebuild(state_folder: &Path, target: &Path) -> Result<(), BackingError> {
    let path = state_folder.join(FILE_NAME);
    let recorded = std::fs::read_to_string(&path).map_err(io_error("read", &path))?;
    let identity = identity(target).map_err(io_error("look at", target))?;
    let is_it = |line: &str| line.starts_with(REBUILT) && is_into(line, &identity);
    let lines: Vec<&str> = recorded.lines().filter(|line| !is_it(line)).collect();
    record(state_folder, &lines.join("\n"))
}

fn record_recovering(state_folder: &Path, target: &Path, what: &str) -> Result<(), BackingError> {
    let path = state_folder.join(FILE_NAME);
    let recorded = match std::fs::read_to_string(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
        read => read.map_err(io_error("read", &path))?,
    };
    let identity = identity(target).map_err(io_error("look at", target))?;
    let other = recorded.lines().filter(|line| !is_about(line, &identity) && !is_into(line, &identity));
    let lines: Vec<String> = other
        .filter(|line| *line != at_path(target))
        .map(str::to_owned)
        .chain([format!("{what}{identity}")])
        .collect();
    record(state_folder, &lines.join("\n"))
}

fn io_error(operation: &'static str, path: &Path) -> impl FnOnce(io::Error) -> BackingError {
    let path = path.to_owned();
    move |source| BackingError::Io { operation, path, source }
}

/// What tells a file or disk from others.
///
/// # Errors
/// The kernel's, when it can't be looked at.
pub fn identity(path: &Path) -> io::Result<String> {
    let status = std::fs::metadata(path)?;
    if !status.is_file() {
        return Ok(disk_identity(status.rdev()).unwrap_or_else(|| at_path(path)));
    }
    let born =
        status.created().ok().and_then(|time| time.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
    Ok(format!("image {} of {}.{:09}", status.ino(), born.as_secs(), born.subsec_nanos()))
}

/// What a disk is called that nothing else is known of.
fn at_path(path: &Path) -> String {
    format!("{PLACE}{}", path.display())
}

/// The name that sysfs knows for a disk or a partition (Documentation/ABI/testing/sysfs-block), or else where it is
/// plugged in. A path in /dev is neither: the next start may lead it to another disk.
fn disk_identity(device: u64) -> Option<String> {
    let folder = PathBuf::from(format!("/sys/dev/block/{}:{}", libc::major(device), libc::minor(device)));
    disk_name(folder.clone()).or_else(|| {
        let place = place_of(&std::fs::canonicalize(&folder).ok()?)?;
        let partition = std::fs::read_to_string(folder.join("partition"));
        Some(match partition {
            Ok(number) => format!("partition {} of {PLACE}{place}", number.trim()),
            Err(_) => format!("{PLACE}{place}"),
        })
    })
}

/// The slot of a disk, by its folder in sysfs, without what the kernel counts as it finds devices. A virtual device has
/// none.
fn place_of(folder: &Path) -> Option<String> {
    let place = folder.strip_prefix("/sys/devices").ok()?.to_str()?;
    let (place, _) = place.split_once("/block/").filter(|_| !place.starts_with("virtual/"))?;
    let is_counted = |part: &&str| {
        let counted = ["virtio", "host"].iter().find_map(|name| part.strip_prefix(name));
        !counted.is_some_and(|number| number.bytes().all(|byte| byte.is_ascii_digit()))
    };
    // Of a SCSI address, "2:0:0:1" and "target2:0:0", the first number is the host's. A PCI address has two colons.
    let without_host = |part: &str| {
        let address = part.strip_prefix("target").or((part.matches(':').count() == 3).then_some(part));
        match address.and_then(|address| address.split_once(':')) {
            Some((_, rest)) => format!("*:{rest}"),
            None => part.to_owned(),
        }
    };
    Some(place.split('/').filter(is_counted).map(without_host).collect::<Vec<_>>().join("/"))
}

fn disk_name(folder: PathBuf) -> Option<String> {
    let read = |file: PathBuf| {
        let text = std::fs::read_to_string(file).ok()?.trim().to_owned();
        (!text.is_empty()).then_some(text)
    };
    let partition = read(folder.join("partition"));
    let disk = if partition.is_some() { folder.join("..") } else { folder };
    let names = [
        "dm/uuid",
        "wwid",
        "device/wwid",
        "device/serial",
        "serial",
        "md/uuid",
        "dm/name",
        "loop/backing_file",
    ];
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
        let Match::Adopted { identity, recovered: None } = compare(folder.path(), &backing).unwrap() else {
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
        let record_path = folder.path().join(FILE_NAME);
        for source in [8, 7] {
            record_recovery_begun(folder.path(), &backing, HostId([source; 32])).unwrap();
            let half = compare(folder.path(), &backing);
            assert!(matches!(half, Err(BackingError::HalfRecovered { .. })), "{half:?}");
            assert_eq!(compare(folder.path(), &moved).unwrap(), Match::Same, "it was not written to");
            let source = HostId([source; 32]);
            record_recovery(folder.path(), &backing, source, &Content::Mixture).unwrap();
            let recovered = Some(Recovered { source, content: Some(Content::Mixture), is_absent: false });
            assert_eq!(
                compare(folder.path(), &backing).unwrap(),
                Match::Adopted { identity: super::identity(&backing).unwrap(), recovered }
            );
            assert_eq!(compare(folder.path(), &moved).unwrap(), Match::Same);
            assert_eq!(std::fs::read_to_string(&record_path).unwrap().lines().count(), 2);
        }
        assert!(is_named(folder.path(), &moved) && is_named(folder.path(), &backing));
        // What was served is filled anew: then it is not what was served.
        record_recovery_begun(folder.path(), &moved, HostId([7; 32])).unwrap();
        let half = compare(folder.path(), &moved);
        assert!(matches!(half, Err(BackingError::HalfRecovered { .. })), "{half:?}");
        assert!(matches!(compare(folder.path(), &backing), Ok(Match::Adopted { .. })), "it is whole");
        std::fs::remove_file(&moved).unwrap();
        std::fs::write(&moved, [2; 512]).unwrap();
        let other = compare(folder.path(), &moved);
        assert!(matches!(other, Err(BackingError::Replaced { .. })), "it was not recovered into: {other:?}");
    }

    #[test]
    fn what_earlier_releases_recorded_is_understood() {
        let folder = tempfile::tempdir().unwrap();
        let backing = folder.path().join("image");
        std::fs::write(&backing, [0; 512]).unwrap();
        record(folder.path(), &format!("{RECOVERED}{}", HostId([8; 32]))).unwrap();
        let recovered = |source| {
            let Ok(Match::Adopted { recovered, .. }) = compare(folder.path(), &backing) else {
                panic!("it was recovered into");
            };
            assert_eq!(recovered.as_ref().map(|recovered| recovered.source), Some(HostId([source; 32])));
            recovered.unwrap().content
        };
        assert_eq!(recovered(8), None);
        record(
            folder.path(),
            &format!("{RECOVERED}{}{INTO}{}", HostId([8; 32]), identity(&backing).unwrap()),
        )
        .unwrap();
        assert_eq!(recovered(8), None);
        record(folder.path(), &format!("{RECOVERING}{}", HostId([8; 32]))).unwrap();
        let half = compare(folder.path(), &backing);
        assert!(matches!(half, Err(BackingError::HalfRecovered { .. })), "{half:?}");
        record_recovery(folder.path(), &backing, HostId([7; 32]), &Content::Mixture).unwrap();
        assert_eq!(recovered(7), Some(Content::Mixture));
        // What can't be read says nothing.
        let damaged = format!("{RECOVERED}{}{HOLDING}x/1/2{OF}{INTO}", HostId([8; 32]));
        record(folder.path(), &format!("{damaged}{}", identity(&backing).unwrap())).unwrap();
        assert_eq!(recovered(8), None);
    }

    #[test]
    fn what_was_recovered_is_read_back_as_it_was_recorded() {
        let generation = |byte| GenerationId([byte; 16]);
        let position = Position { generation: generation(1), epoch: Epoch(1 << 41), sequence: Sequence(7) };
        for lineage in [vec![], vec![generation(1)], vec![generation(1), generation(0xab)]] {
            let content = Content::Image { position, lineage };
            assert_eq!(content_of(&text_of(&content)), Some(content));
        }
        assert_eq!(content_of(&text_of(&Content::Mixture)), Some(Content::Mixture));
        assert_eq!(content_of(""), None);
    }

    #[test]
    fn a_slot_is_told_without_what_the_kernel_counts() {
        for (folder, place) in [
            ("pci0000:00/0000:00:02.0/virtio1/block/vda", Some("pci0000:00/0000:00:02.0")),
            (
                "pci0000:00/0000:00:10.0/host2/target2:0:0/2:0:0:1/block/sdb/sdb1",
                Some("pci0000:00/0000:00:10.0/*:0:0/*:0:0:1"),
            ),
            ("virtual/block/loop3", None),
        ] {
            assert_eq!(place_of(&Path::new("/sys/devices").join(folder)).as_deref(), place, "{folder}");
        }
    }
}
