//! `marker`: the last epoch that a replica has durably, written after each epoch's data sync (P3), and the last copies of
//! a resync, written after theirs.
//!
//! Two slots of one page each that take turns. A torn write leaves the marker before, which names an epoch that is
//! just as durable; so does a lost one.
//!
//! ```text
//!  0 magic "BMMARKER"   8 version (4)   12 CRC-32 of the rest (4)
//! 16 serial (8)        24 generation (16)   40 epoch (8)   48 sequence (8)
//! 56 session (8)       64 copies (8)        72 zero
//! ```
//!
//! Version 1 had zeroes from 56 on: no copy of any session.

use super::{MetadataError, PAGE_BYTES, Page, is_sealed, newest_of_two, seal};
use crate::units::{Epoch, GenerationId, Mark, Position, Sequence, Session};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The file's name in the volume's state folder.
pub const FILE_NAME: &str = "marker";
/// The file's size in bytes.
pub const FILE_BYTES: u64 = 2 * PAGE_BYTES as u64;
/// The newest layout that this release reads, and the one that it writes.
pub const VERSION: u32 = 2;

const WHAT: &str = "epoch marker";
pub(super) const MAGIC: [u8; 8] = *b"BMMARKER";
const CRC_AT: usize = 12;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct Raw {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    serial: U64,
    generation: [u8; 16],
    epoch: U64,
    sequence: U64,
    session: U64,
    copies: U64,
    rest: [u8; PAGE_BYTES - 72],
}

const _: () = assert!(size_of::<Raw>() == PAGE_BYTES);

/// The page to write at [`super::slot_offset`] of `serial`.
#[must_use]
pub fn encode(mark: Mark, serial: u64) -> Page {
    let Mark { position, session, copies } = mark;
    let raw = Raw {
        magic: MAGIC,
        version: U32::new(VERSION),
        crc: U32::ZERO,
        serial: U64::new(serial),
        generation: position.generation.0,
        epoch: U64::new(position.epoch.0),
        sequence: U64::new(position.sequence.0),
        session: U64::new(session.0),
        copies: U64::new(copies),
        rest: [0; PAGE_BYTES - 72],
    };
    let mut page: Page = zerocopy::transmute!(raw);
    seal(&mut page, CRC_AT);
    page
}

/// Reads the file: the newest whole marker and its serial number.
///
/// # Errors
/// [`MetadataError`] when neither slot is whole, or a newer release wrote one.
pub fn recover(file: &[u8]) -> Result<(u64, Mark), MetadataError> {
    newest_of_two(WHAT, file, |slot| {
        let raw = Raw::ref_from_bytes(slot).ok()?;
        if raw.magic != MAGIC || !is_sealed(slot, CRC_AT) {
            return None;
        }
        if raw.version.get() > VERSION {
            return Some(Err(MetadataError::TooNew { what: WHAT, found: raw.version.get(), known: VERSION }));
        }
        let position = Position {
            generation: GenerationId(raw.generation),
            epoch: Epoch(raw.epoch.get()),
            sequence: Sequence(raw.sequence.get()),
        };
        let mark = Mark { position, session: Session(raw.session.get()), copies: raw.copies.get() };
        Some(Ok((raw.serial.get(), mark)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mark(epoch: u64) -> Mark {
        let (generation, sequence) = (GenerationId([1; 16]), Sequence(10 * epoch));
        let position = Position { generation, epoch: Epoch(epoch), sequence };
        Mark { position, session: Session(4), copies: 5 }
    }

    #[test]
    fn the_page_has_these_golden_bytes() {
        let text: String = encode(mark(2), 3)[..72].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            text,
            "424d4d41524b4552020000005294e41a0300000000000000\
             010101010101010101010101010101010200000000000000140000000000000004000000000000000500000000000000"
        );
    }

    #[test]
    fn a_marker_of_version_1_reads_as_one_without_copies() {
        let mut page = encode(Mark { position: mark(2).position, ..Mark::default() }, 3);
        page[8] = 1;
        seal(&mut page, CRC_AT);
        let text: String = page[..56].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            text,
            "424d4d41524b455201000000ce40a8b20300000000000000\
             0101010101010101010101010101010102000000000000001400000000000000"
        );
        let file = [[0; PAGE_BYTES], page].concat();
        assert_eq!(recover(&file), Ok((3, Mark { position: mark(2).position, ..Mark::default() })));
    }

    #[test]
    fn a_torn_marker_leaves_the_one_before() {
        let mut file = [encode(mark(2), 2), encode(mark(1), 1)].concat();
        assert_eq!(recover(&file), Ok((2, mark(2))));
        file[100] ^= 0x40;
        assert_eq!(recover(&file), Ok((1, mark(1))));
        file[PAGE_BYTES + 20] ^= 0x40;
        assert_eq!(recover(&file), Err(MetadataError::Corrupted { what: WHAT }));
    }
}
