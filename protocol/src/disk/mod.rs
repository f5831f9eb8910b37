//! Every persistent byte that is not the volume's own content.
//!
//! A replica's backing carries nothing of ours; all metadata lies in files of the volume's state folder, and a
//! recovery's beside its target. Each module here describes one file's layout, once, beside its constants. Numbers are
//! little-endian. Everything in the state folder is written in units of [`PAGE_BYTES`] with a CRC-32, and read back into types that cannot be wrong: a page that a crash tore is
//! told from a good one, and what it means that it is gone is said where the layout is.
//!
//! # Upgrades
//!
//! Every file carries its layout's version. A newer version than ours is refused, never guessed at; an older one is
//! read by the module that knows it and written back as the newest.

pub mod absent;
pub mod activity_log;
pub mod dirty_map;
mod kind;
pub mod marker;
pub mod pre_images;
pub mod recovery;
pub mod superblock;

pub use kind::FileKind;

use crate::terms::Promise;
use crate::units::HostId;

/// The unit in which metadata is written, in bytes.
pub const PAGE_BYTES: usize = 4096;

/// One page of a metadata file.
pub type Page = [u8; PAGE_BYTES];

/// Metadata that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MetadataError {
    /// No copy of it is whole.
    #[error("the {what} is damaged: no whole copy of it was found")]
    Corrupted {
        /// Which file.
        what: &'static str,
    },
    /// A newer release wrote it.
    #[error("the {what} has version {found}, newer than {known}: use the release that wrote it")]
    TooNew {
        /// Which file.
        what: &'static str,
        /// The version on disk.
        found: u32,
        /// The newest that this release reads.
        known: u32,
    },
    /// It belongs to something else.
    #[error("the {what} belongs to another volume, peer or size")]
    Foreign {
        /// Which file.
        what: &'static str,
    },
}

/// Puts the CRC-32 of all other bytes of a page at `at`.
fn seal(page: &mut [u8], at: usize) {
    let crc = checksum(page, at);
    page[at..at + 4].copy_from_slice(&crc.to_le_bytes());
}

/// Whether the CRC-32 at `at` is that of all other bytes.
fn is_sealed(page: &[u8], at: usize) -> bool {
    page.len() > at + 4 && page[at..at + 4] == checksum(page, at).to_le_bytes()
}

fn checksum(page: &[u8], at: usize) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(&page[..at]);
    crc.update(&page[at + 4..]);
    crc.finalize()
}

/// Picks the newest whole copy among the two slots of a file. A slot whose write was torn or lost leaves the other.
fn newest_of_two<Value>(
    what: &'static str,
    bytes: &[u8],
    decode: impl Fn(&[u8]) -> Option<Result<(u64, Value), MetadataError>>,
) -> Result<(u64, Value), MetadataError> {
    newest(what, &bytes[..bytes.len().min(2 * PAGE_BYTES)], decode)
}

/// Picks the newest whole copy among these pages; of several, the first.
fn newest<Value>(
    what: &'static str,
    bytes: &[u8],
    decode: impl Fn(&[u8]) -> Option<Result<(u64, Value), MetadataError>>,
) -> Result<(u64, Value), MetadataError> {
    let pages = bytes.chunks_exact(PAGE_BYTES);
    let whole: Vec<_> = pages.filter_map(decode).collect::<Result<_, _>>()?;
    whole.into_iter().rev().max_by_key(|(serial, _)| *serial).ok_or(MetadataError::Corrupted { what })
}

/// Where the copy with this serial number goes: the slots take turns.
#[must_use]
pub fn slot_offset(serial: u64) -> u64 {
    (serial % 2) * PAGE_BYTES as u64
}
/// A promise as it is on disk: its kind, and of how many replicas it is.
fn raw_promise(promise: Promise) -> (u8, u32) {
    match promise {
        Promise::None => (0, 0),
        Promise::WhileHeard => (1, 0),
        Promise::Replicas(replicas) => (2, replicas),
    }
}

/// The promise that these stand for.
fn promise_of(kind: u8, replicas: u32) -> Option<Promise> {
    match kind {
        0 => Some(Promise::None),
        1 => Some(Promise::WhileHeard),
        2 => Some(Promise::Replicas(replicas)),
        _ => None,
    }
}

/// The hosts, as they are on disk. There is room for all of them.
fn raw_hosts<const LIMIT: usize>(hosts: &[HostId]) -> [[u8; 32]; LIMIT] {
    let mut raw = [[0; 32]; LIMIT];
    for (slot, host) in raw.iter_mut().zip(hosts) {
        *slot = host.0;
    }
    raw
}
