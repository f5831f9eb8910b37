//! `activity-log`: the extents that may hold unfinished, unsynced or unreplicated writes (W2, D1).
//!
//! A ring of records. Each holds the *whole* active set, so the newest whole record says everything. Record n goes to
//! place n mod [`RECORDS`]; one is written at a time, durably, before any write that needs it begins.
//!
//! ```text
//!  0 magic "BMACTLOG"   8 version (4)   12 CRC-32 of the rest (4)
//! 16 serial (8)        24 extents (4)   28 zero (4)
//! 32 extent numbers (4 each), ascending; then zero up to the record's end
//! ```
//!
//! A count of 2^32 - 1 stands for all extents (version 2).
//!
//! # What a crash leaves
//!
//! A write of record n that was lost leaves record n-1: no write relied on n yet. A torn write leaves the same, but
//! cannot be told from a record n that was durable and went bad later. So a place that should hold n and is not whole
//! makes the set *unsure*: every block counts as dirty. That costs time, never data. A new log has a record in each
//! place, so that zeroes, which a file system may give back for what it lost, are damage as well.

use super::{MetadataError, PAGE_BYTES, is_sealed, seal};
use crate::planted::{Bug, planted};
use crate::units::Extent;
use std::collections::BTreeSet;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The file's name in the volume's state folder.
pub const FILE_NAME: &str = "activity-log";
/// How many records the ring has.
pub const RECORDS: u64 = 8;
/// The size of one record, in bytes.
pub const RECORD_BYTES: usize = PAGE_BYTES;
/// The file's size in bytes.
pub const FILE_BYTES: u64 = RECORDS * RECORD_BYTES as u64;
/// How many extents can be active at once: 3.9 GiB of hot data.
pub const CAPACITY: usize = (RECORD_BYTES - HEADER_BYTES) / 4;
/// The newest layout that this release reads, and the one that it writes.
pub const VERSION: u32 = 2;

const WHAT: &str = "activity log";
const HEADER_BYTES: usize = 32;
/// The count that stands for all extents.
const EVERYTHING: u32 = u32::MAX;
pub(super) const MAGIC: [u8; 8] = *b"BMACTLOG";
const CRC_AT: usize = 12;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    serial: U64,
    count: U32,
    zero: U32,
    extents: [U32; CAPACITY],
}

const _: () = assert!(size_of::<Raw>() == RECORD_BYTES);

/// One record's bytes.
pub type Record = [u8; RECORD_BYTES];

/// What a record says: its serial number and its extents, none for all there are.
pub type Content = (u64, Option<BTreeSet<Extent>>);

/// What the log says after a restart.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Recovered {
    /// Blocks of these extents may differ; the newest record has this serial number.
    Active {
        /// The newest record's serial number; 0 when none was ever written.
        serial: u64,
        /// The extents.
        extents: BTreeSet<Extent>,
    },
    /// The newest record is not whole: any block may differ.
    Unsure {
        /// The serial number after which the next record goes.
        serial: u64,
    },
}

/// The place of a record in the file, in bytes.
#[must_use]
pub fn record_offset(serial: u64) -> u64 {
    serial % RECORDS * RECORD_BYTES as u64
}

/// The record to write at [`record_offset`] of `serial`, which counts from 1.
///
/// # Panics
/// When there are more than [`CAPACITY`] extents.
#[must_use]
pub fn encode(extents: impl IntoIterator<Item = Extent>, serial: u64) -> Record {
    let mut raw = Raw {
        magic: MAGIC,
        version: U32::new(VERSION),
        crc: U32::ZERO,
        serial: U64::new(serial),
        count: U32::ZERO,
        zero: U32::ZERO,
        extents: [U32::ZERO; CAPACITY],
    };
    let mut count = 0;
    for extent in extents {
        assert!(count < CAPACITY, "the active set fits into a record");
        raw.extents[count] = U32::new(extent.0);
        count += 1;
    }
    raw.count = U32::new(count as u32);
    let mut record: Record = zerocopy::transmute!(raw);
    seal(&mut record, CRC_AT);
    record
}

/// The record that says that any block may differ, where no list of extents would do.
#[must_use]
pub fn encode_everything(serial: u64) -> Record {
    let mut record = encode([], serial);
    record[24..28].copy_from_slice(&EVERYTHING.to_le_bytes());
    seal(&mut record, CRC_AT);
    record
}

/// The records of a log, one for each place, after that of this serial number: all empty, or all of everything. Those of
/// a new log come after 0.
pub fn ring_after(serial: u64, is_everything: bool) -> impl Iterator<Item = (u64, Record)> {
    (serial + 1..=serial + RECORDS).map(move |serial| {
        let record = if is_everything { encode_everything(serial) } else { encode([], serial) };
        (serial, record)
    })
}

/// Reads the ring.
///
/// # Errors
/// [`MetadataError::TooNew`] for a newer layout. Damage is no error here: see [`Recovered::Unsure`].
pub fn recover(file: &[u8]) -> Result<Recovered, MetadataError> {
    let mut newest: Option<Content> = None;
    for record in file.chunks_exact(RECORD_BYTES).take(RECORDS as usize) {
        let Some((serial, extents)) = decode(record)? else { continue };
        if newest.as_ref().is_none_or(|(best, _)| *best < serial) {
            newest = Some((serial, extents));
        }
    }
    let Some((serial, extents)) = newest else { return Ok(Recovered::Unsure { serial: 0 }) };
    let next = record_offset(serial.wrapping_add(1)) as usize;
    let after = file.get(next..next + RECORD_BYTES);
    let is_whole = after.is_some_and(|after| matches!(decode(after), Ok(Some(_))));
    if !is_whole && !planted(Bug::TrustOlderRecord) {
        return Ok(Recovered::Unsure { serial: serial.saturating_add(1) });
    }
    Ok(match extents {
        Some(extents) => Recovered::Active { serial, extents },
        None => Recovered::Unsure { serial },
    })
}

/// Reads one record; nothing when it is not whole.
///
/// # Errors
/// [`MetadataError::TooNew`] for a newer layout.
pub fn decode(record: &[u8]) -> Result<Option<Content>, MetadataError> {
    let Ok(raw) = Raw::ref_from_bytes(record) else { return Ok(None) };
    if raw.magic != MAGIC || !is_sealed(record, CRC_AT) {
        return Ok(None);
    }
    if raw.version.get() > VERSION {
        return Err(MetadataError::TooNew { what: WHAT, found: raw.version.get(), known: VERSION });
    }
    if raw.count.get() == EVERYTHING {
        return Ok(Some((raw.serial.get(), None)));
    }
    let extents = raw.extents.get(..raw.count.get() as usize);
    Ok(extents
        .map(|extents| (raw.serial.get(), Some(extents.iter().map(|extent| Extent(extent.get())).collect()))))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(extents: &[u32]) -> BTreeSet<Extent> {
        extents.iter().copied().map(Extent).collect()
    }

    fn ring(records: &[(u64, &[u32])]) -> Vec<u8> {
        let mut file = vec![0; FILE_BYTES as usize];
        for (serial, record) in ring_after(0, false) {
            file[record_offset(serial) as usize..][..RECORD_BYTES].copy_from_slice(&record);
        }
        for (serial, extents) in records {
            let at = record_offset(*serial) as usize;
            file[at..at + RECORD_BYTES].copy_from_slice(&encode(set(extents), *serial));
        }
        file
    }

    #[test]
    fn a_record_has_these_golden_bytes() {
        let record = encode(set(&[1, 0x0203_0405]), 6);
        let text: String = record[..44].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            text,
            "424d4143544c4f4702000000f5b36efd0600000000000000020000000000000001000000050403020\
             0000000"
        );
    }

    #[test]
    fn a_record_of_version_1_is_read() {
        let text = "424d4143544c4f470100000066e332a906000000000000000200000000000000010000000504030200000000";
        let mut record = [0; RECORD_BYTES];
        for (at, byte) in record.iter_mut().take(text.len() / 2).enumerate() {
            *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap();
        }
        assert_eq!(decode(&record), Ok(Some((6, Some(set(&[1, 0x0203_0405]))))));
    }

    #[test]
    fn the_newest_record_says_everything() {
        let none = Recovered::Active { serial: 8, extents: set(&[]) };
        assert_eq!(recover(&ring(&[])), Ok(none));
        let newest = Recovered::Active { serial: 12, extents: set(&[7]) };
        let records: [(u64, &[u32]); 4] = [(9, &[1]), (10, &[1]), (11, &[2, 3]), (12, &[7])];
        assert_eq!(recover(&ring(&records)), Ok(newest));
        let full: Vec<u32> = (0..CAPACITY as u32).collect();
        assert_eq!(recover(&ring(&[(9, &full)])), Ok(Recovered::Active { serial: 9, extents: set(&full) }));
    }

    #[test]
    fn a_record_may_stand_for_all_extents() {
        let mut file = ring(&[(9, &[1])]);
        let at = record_offset(10) as usize;
        file[at..at + RECORD_BYTES].copy_from_slice(&encode_everything(10));
        assert_eq!(recover(&file), Ok(Recovered::Unsure { serial: 10 }));
        for serial in 11..18 {
            let at = record_offset(serial) as usize;
            file[at..at + RECORD_BYTES].copy_from_slice(&encode(set(&[2]), serial));
            assert_eq!(
                recover(&file),
                Ok(Recovered::Active { serial, extents: set(&[2]) }),
                "an old one is harmless"
            );
        }
    }

    /// A file system that had lost the file's content gave zeroes back, which counted as a log that nothing was ever
    /// written to: after a crash under writes all copies were "in sync", and differed.
    #[test]
    fn zeroes_say_nothing_of_what_was_active() {
        assert_eq!(recover(&vec![0; FILE_BYTES as usize]), Ok(Recovered::Unsure { serial: 0 }));
        for serial in 9..20 {
            let mut file = ring(&[]);
            for (serial, extent) in (9..=serial).zip(0..) {
                let at = record_offset(serial) as usize;
                file[at..at + RECORD_BYTES].copy_from_slice(&encode(set(&[extent]), serial));
            }
            assert!(matches!(recover(&file), Ok(Recovered::Active { .. })));
            file[record_offset(serial) as usize..][..RECORD_BYTES].fill(0);
            assert_eq!(recover(&file), Ok(Recovered::Unsure { serial }), "a hole where {serial} was");
        }
    }

    #[test]
    fn a_newest_record_that_is_not_whole_makes_everything_dirty() {
        let mut file = ring(&[(9, &[1]), (10, &[1, 2])]);
        file[record_offset(10) as usize + 40] ^= 1;
        assert_eq!(recover(&file), Ok(Recovered::Unsure { serial: 10 }));
        assert!(matches!(recover(&ring(&[(9, &[1])])[..RECORD_BYTES]), Ok(Recovered::Unsure { .. })));
        assert!(matches!(recover(&[]), Ok(Recovered::Unsure { .. })));
    }

    #[test]
    fn a_ring_that_was_not_whole_is_one_again_when_it_says_everything() {
        let mut file = ring(&[(9, &[1]), (10, &[1, 2])]);
        file[record_offset(10) as usize + 40] ^= 1;
        for (serial, record) in ring_after(10, true) {
            assert!(matches!(recover(&file), Ok(Recovered::Unsure { .. })), "before {serial}");
            file[record_offset(serial) as usize..][..RECORD_BYTES].copy_from_slice(&record);
        }
        assert_eq!(recover(&file), Ok(Recovered::Unsure { serial: 18 }));
        file[record_offset(19) as usize..][..RECORD_BYTES].copy_from_slice(&encode(set(&[3]), 19));
        assert_eq!(recover(&file), Ok(Recovered::Active { serial: 19, extents: set(&[3]) }));
    }

    /// A record whose number is the last one there is ended the process: the place of the next one was counted too far.
    #[test]
    fn a_record_with_the_highest_number_makes_everything_suspect() {
        let mut file = vec![0; FILE_BYTES as usize];
        let place = record_offset(u64::MAX) as usize;
        file[place..place + RECORD_BYTES].copy_from_slice(&encode([], u64::MAX));
        assert_eq!(recover(&file), Ok(Recovered::Unsure { serial: u64::MAX }));
    }
}
