//! What the writer writes: records that say which they are, and where they belong.
//!
//! A record's number is never used twice. A slot is overwritten in place, in blocks that each carry the number and a
//! checksum; a file is replaced as a whole by a rename; a log is appended to, and removed in the end.

use crate::harness::random::Random;
use crate::machines::content::{BLOCK_BYTES, noise};
use std::fmt;
use std::str::FromStr;

/// The slots of a file.
pub const SLOTS: u64 = 32;
/// How many blocks a slot has.
pub const SLOT_BLOCKS: u64 = 12;
/// How many files there are to replace.
pub const WHOLES: u64 = 8;
/// How long the payload of an appended record is at most, in bytes.
pub const APPENDED_LIMIT: u64 = 40 << 10;
/// How long the payload of a replaced file is at most, in bytes.
pub const WHOLE_LIMIT: u64 = 200 << 10;

const BLOCK_MAGIC: [u8; 8] = *b"TORTBLOK";
const STREAM_MAGIC: [u8; 8] = *b"TORTLONG";
const BLOCK_HEADER: usize = 24;
/// How long the header of an appended or replaced record is, in bytes.
pub const STREAM_HEADER: usize = 24;

/// Where a record belongs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Place {
    /// A part of a file that is overwritten in place.
    Slot {
        /// The file.
        file: u64,
        /// The part.
        slot: u64,
    },
    /// A file that is replaced by a rename.
    Whole(u64),
    /// A file that is appended to. Its name is never used again.
    Log(u64),
}

impl Place {
    /// The name of the file.
    #[must_use]
    pub fn file_name(self) -> String {
        match self {
            Self::Slot { file, .. } => format!("slots-{file}"),
            Self::Whole(number) => format!("whole-{number}"),
            Self::Log(number) => format!("log-{number}"),
        }
    }

    /// The place that a file is, unless it is one with slots.
    #[must_use]
    pub fn of_file(name: &str) -> Option<Self> {
        let (kind, number) = name.split_once('-')?;
        let number = number.parse().ok()?;
        match kind {
            "whole" => Some(Self::Whole(number)),
            "log" => Some(Self::Log(number)),
            _ => None,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Slot { file, slot } => write!(f, "slots-{file}/{slot}"),
            place => f.write_str(&place.file_name()),
        }
    }
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let slot = || {
            let (file, slot) = text.strip_prefix("slots-")?.split_once('/')?;
            Some(Self::Slot { file: file.parse().ok()?, slot: slot.parse().ok()? })
        };
        slot().or_else(|| Self::of_file(text)).ok_or_else(|| format!("{text} is no place"))
    }
}

/// The blocks of a record in a slot.
#[must_use]
pub fn blocks(number: u64, count: u64) -> Vec<u8> {
    let mut random = Random::new(number);
    let block = |index: u64| {
        let mut bytes = BLOCK_MAGIC.to_vec();
        bytes.extend(number.to_le_bytes());
        bytes.extend((index as u32).to_le_bytes());
        bytes.extend([0; 4]);
        bytes.extend(noise(&mut random, BLOCK_BYTES - BLOCK_HEADER as u64));
        seal(bytes, BLOCK_HEADER)
    };
    (0..count).flat_map(block).collect()
}

/// What a block of a slot holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cell {
    /// Nothing was ever written, or it was lost.
    Blank,
    /// A block of the record of this number.
    Of(u64),
    /// No whole block of a record, or not the one that belongs there.
    Damaged,
}

/// What the block of this index in a slot holds.
#[must_use]
pub fn cell(block: &[u8], index: u64) -> Cell {
    if block.iter().all(|byte| *byte == 0) {
        return Cell::Blank;
    }
    let field = |at: usize| u32::from_le_bytes(*block[at..].first_chunk().expect("a block is long enough"));
    let is_whole = block.len() as u64 == BLOCK_BYTES
        && block[..8] == BLOCK_MAGIC
        && u64::from(field(16)) == index
        && is_sealed(block, BLOCK_HEADER);
    if is_whole { Cell::Of(number_of(block)) } else { Cell::Damaged }
}

/// A record for a file: its header and this much payload.
#[must_use]
pub fn stream(number: u64, payload: u64) -> Vec<u8> {
    let mut bytes = STREAM_MAGIC.to_vec();
    bytes.extend(number.to_le_bytes());
    bytes.extend((payload as u32).to_le_bytes());
    bytes.extend([0; 4]);
    bytes.extend(noise(&mut Random::new(number), payload));
    seal(bytes, STREAM_HEADER)
}

/// The number and the length of the record that these bytes begin with, if it is whole.
#[must_use]
pub fn first_record(bytes: &[u8]) -> Option<(u64, usize)> {
    let header = bytes.get(..STREAM_HEADER)?;
    let payload = u32::from_le_bytes(*header[16..].first_chunk()?) as usize;
    let record = bytes.get(..STREAM_HEADER + payload)?;
    let is_whole = header[..8] == STREAM_MAGIC && is_sealed(record, STREAM_HEADER);
    is_whole.then(|| (number_of(record), record.len()))
}

fn number_of(record: &[u8]) -> u64 {
    u64::from_le_bytes(*record[8..].first_chunk().expect("a record has a header"))
}

/// The checksum is the header's last field, and covers everything but itself.
fn seal(mut record: Vec<u8>, header: usize) -> Vec<u8> {
    let sum = checksum(&record, header);
    record[header - 4..header].copy_from_slice(&sum.to_le_bytes());
    record
}

fn is_sealed(record: &[u8], header: usize) -> bool {
    record[header - 4..header] == checksum(record, header).to_le_bytes()
}

fn checksum(record: &[u8], header: usize) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&record[..header - 4]);
    hasher.update(&record[header..]);
    hasher.finalize()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_are_known_again_and_any_other_bytes_are_not() {
        let mut slot = blocks(7, 3);
        let cells = |slot: &[u8]| -> Vec<Cell> {
            let blocks = slot.chunks(BLOCK_BYTES as usize).zip(0..);
            blocks.map(|(block, index)| cell(block, index)).collect()
        };
        assert_eq!(cells(&slot), [Cell::Of(7); 3]);
        slot[..4096].fill(0);
        slot[5000] ^= 1;
        assert_eq!(cells(&slot), [Cell::Blank, Cell::Damaged, Cell::Of(7)]);
        assert_eq!(cell(&slot[8192..], 0), Cell::Damaged, "it belongs elsewhere");

        let mut file = stream(8, 100);
        file.extend(stream(9, 0));
        assert_eq!(first_record(&file), Some((8, 124)));
        assert_eq!(first_record(&file[124..]), Some((9, 24)));
        assert_eq!(first_record(&file[..123]), None);
        file[30] ^= 1;
        assert_eq!(first_record(&file), None);
    }

    #[test]
    fn places_are_written_as_they_are_read() {
        for place in [Place::Slot { file: 1, slot: 2 }, Place::Whole(3), Place::Log(4)] {
            assert_eq!(place.to_string().parse(), Ok(place));
        }
        for wrong in ["", "slots-1", "log-", "whole-x", "whole-2.new"] {
            assert!(wrong.parse::<Place>().is_err(), "{wrong}");
        }
    }
}
