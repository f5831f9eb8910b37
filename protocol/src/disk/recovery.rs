//! `TARGET.blockmirror-recovery`: how far a recovery by the operator's tool is, so that it can go on.
//!
//! The file is small (a bit for each 16 MiB) and replaced whole, so that after a crash it is the old one or the new
//! one. A chunk's bit is set only once the chunk is durable in the target; what was written since is written again.
//!
//! ```text
//!   0 magic "BMRECOV\0"     8 version (4)    12 CRC-32 of the rest (4)
//!  16 size in bytes (8)    24 chunk in bytes (8)
//!  32 volume (16)          48 copy (16)
//!  64 position: generation (16), epoch (8), sequence (8)
//!  96 what names the target (8)               104 key length (4)   108 zero (4)
//! 112 the key that the peer knows the tool by, in PEM, then zero (400)
//! 512 a bit for each chunk, the lowest of the first byte first, to the end of the file
//! ```

use super::{MetadataError, is_sealed, seal};
use crate::ranges::ByteRange;
use crate::units::{CopyId, Epoch, GenerationId, Position, Sequence, VolumeId};
use std::fmt;
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What is put behind the target's path to name the file.
pub const SUFFIX: &str = ".blockmirror-recovery";
/// The newest layout that this release reads, and the one that it writes.
pub const VERSION: u32 = 1;
/// What one bit stands for, in bytes.
pub const CHUNK_BYTES: u64 = 16 << 20;
/// The longest key, in bytes.
pub const KEY_LIMIT_BYTES: usize = 400;

const WHAT: &str = "state of the recovery";
pub(super) const MAGIC: [u8; 8] = *b"BMRECOV\0";
const CRC_AT: usize = 12;
const HEADER_BYTES: usize = 512;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    size_bytes: U64,
    chunk_bytes: U64,
    volume: [u8; 16],
    copy: [u8; 16],
    generation: [u8; 16],
    epoch: U64,
    sequence: U64,
    target: U64,
    key_bytes: U32,
    zero: U32,
    key: [u8; KEY_LIMIT_BYTES],
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);

/// A private key in PEM. It does not show in logs.
#[derive(Clone, PartialEq, Eq, Default)]
pub struct Key(pub String);

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "Key()" } else { "Key(..)" })
    }
}

/// What is being recovered. A recovery goes on only if all of this is as it was.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Subject {
    /// The volume.
    pub volume: VolumeId,
    /// The copy that is read.
    pub copy: CopyId,
    /// The volume's size in bytes.
    pub size_bytes: u64,
    /// The position that the copy is at.
    pub position: Position,
}

/// How far a recovery is.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RecoveryState {
    /// What is recovered.
    pub subject: Subject,
    /// Names the target, so that another file or disk of the same path is told from it.
    pub target: u64,
    /// The key that the peer knows the tool by, where it isn't the host's own.
    pub key: Key,
    bits: Vec<u8>,
}

impl Subject {
    /// How many chunks the volume has.
    #[must_use]
    pub fn chunks(&self) -> u64 {
        self.size_bytes.div_ceil(CHUNK_BYTES)
    }

    /// The bytes of a chunk.
    #[must_use]
    pub fn chunk(&self, index: u64) -> ByteRange {
        let start = index * CHUNK_BYTES;
        ByteRange::between(start, self.size_bytes.min(start + CHUNK_BYTES))
    }

    fn bitmap_bytes(&self) -> u64 {
        self.chunks().div_ceil(8)
    }
}

impl RecoveryState {
    /// A recovery that has nothing yet.
    #[must_use]
    pub fn new(subject: Subject, target: u64, key: Key) -> Self {
        let bits =
            vec![0; usize::try_from(subject.bitmap_bytes()).expect("a map of chunks fits into memory")];
        Self { subject, target, key, bits }
    }

    /// Whether a chunk is durable in the target.
    ///
    /// # Panics
    /// When there is no such chunk.
    #[must_use]
    pub fn has(&self, chunk: u64) -> bool {
        assert!(chunk < self.subject.chunks(), "the chunk is one of the volume's");
        self.bits[(chunk / 8) as usize] & 1 << (chunk % 8) != 0
    }

    /// Notes that a chunk is durable in the target.
    ///
    /// # Panics
    /// When there is no such chunk.
    pub fn set(&mut self, chunk: u64) {
        assert!(chunk < self.subject.chunks(), "the chunk is one of the volume's");
        self.bits[(chunk / 8) as usize] |= 1 << (chunk % 8);
    }

    /// The chunks that are not durable yet, in order.
    pub fn missing(&self) -> impl Iterator<Item = u64> + '_ {
        (0..self.subject.chunks()).filter(|chunk| !self.has(*chunk))
    }

    /// How many chunks are durable.
    #[must_use]
    pub fn done_chunks(&self) -> u64 {
        self.bits.iter().map(|byte| u64::from(byte.count_ones())).sum()
    }

    /// How many bytes are durable.
    #[must_use]
    pub fn done_bytes(&self) -> u64 {
        let last = self.subject.chunks().checked_sub(1).filter(|last| self.has(*last));
        let short = last.map_or(0, |last| CHUNK_BYTES - self.subject.chunk(last).length);
        self.done_chunks() * CHUNK_BYTES - short
    }

    /// The file's bytes.
    ///
    /// # Panics
    /// When the key is longer than its limit.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let Subject { volume, copy, size_bytes, position } = self.subject;
        let mut key = [0; KEY_LIMIT_BYTES];
        key[..self.key.0.len()].copy_from_slice(self.key.0.as_bytes());
        let raw = RawHeader {
            magic: MAGIC,
            version: U32::new(VERSION),
            crc: U32::ZERO,
            size_bytes: U64::new(size_bytes),
            chunk_bytes: U64::new(CHUNK_BYTES),
            volume: volume.0,
            copy: copy.0,
            generation: position.generation.0,
            epoch: U64::new(position.epoch.0),
            sequence: U64::new(position.sequence.0),
            target: U64::new(self.target),
            key_bytes: U32::new(self.key.0.len() as u32),
            zero: U32::ZERO,
            key,
        };
        let mut bytes = [raw.as_bytes(), &self.bits].concat();
        seal(&mut bytes, CRC_AT);
        bytes
    }

    /// Reads the file.
    ///
    /// # Errors
    /// [`MetadataError`] when it is damaged or a newer release wrote it.
    pub fn decode(file: &[u8]) -> Result<Self, MetadataError> {
        let corrupted = || MetadataError::Corrupted { what: WHAT };
        let (raw, bits) = RawHeader::ref_from_prefix(file).map_err(|_| corrupted())?;
        if raw.magic != MAGIC || !is_sealed(file, CRC_AT) {
            return Err(corrupted());
        }
        if raw.version.get() > VERSION {
            return Err(MetadataError::TooNew { what: WHAT, found: raw.version.get(), known: VERSION });
        }
        let position = Position {
            generation: GenerationId(raw.generation),
            epoch: Epoch(raw.epoch.get()),
            sequence: Sequence(raw.sequence.get()),
        };
        let subject = Subject {
            volume: VolumeId(raw.volume),
            copy: CopyId(raw.copy),
            size_bytes: raw.size_bytes.get(),
            position,
        };
        let key = raw.key.get(..raw.key_bytes.get() as usize).ok_or_else(corrupted)?;
        let key = Key(String::from_utf8(key.to_vec()).map_err(|_| corrupted())?);
        let beyond = subject.chunks() % 8;
        let strays = beyond != 0 && bits.last().is_some_and(|last| last >> beyond != 0);
        if raw.chunk_bytes.get() != CHUNK_BYTES || bits.len() as u64 != subject.bitmap_bytes() || strays {
            return Err(corrupted());
        }
        Ok(Self { subject, target: raw.target.get(), key, bits: bits.to_vec() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> RecoveryState {
        let position = Position { generation: GenerationId([3; 16]), epoch: Epoch(4), sequence: Sequence(5) };
        let size_bytes = 9 * CHUNK_BYTES + 512;
        let subject = Subject { volume: VolumeId([1; 16]), copy: CopyId([2; 16]), size_bytes, position };
        let mut state = RecoveryState::new(subject, 6, Key("pem".into()));
        for chunk in [0, 3, 9] {
            state.set(chunk);
        }
        state
    }

    #[test]
    fn the_file_has_these_golden_bytes() {
        let file = sample().encode();
        assert_eq!(file.len(), 514);
        let text: String = file[..120].iter().chain(&file[510..]).map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            text,
            "424d5245434f56000100000022767a320002000900000000000000010000000001010101010101010101010101010101\
             020202020202020202020202020202020303030303030303030303030303030304000000000000000500000000000000\
             0600000000000000030000000000000070656d000000000000000902"
        );
        assert_eq!(RecoveryState::decode(&file), Ok(sample()));
    }

    #[test]
    fn damage_is_noticed_wherever_it_is() {
        let file = sample().encode();
        for at in 0..file.len() {
            let mut damaged = file.clone();
            damaged[at] ^= 1;
            assert_eq!(RecoveryState::decode(&damaged), Err(MetadataError::Corrupted { what: WHAT }), "{at}");
            assert!(RecoveryState::decode(&file[..at]).is_err(), "{at}");
        }
        let mut newer = file;
        newer[8] = 2;
        seal(&mut newer, CRC_AT);
        assert!(matches!(RecoveryState::decode(&newer), Err(MetadataError::TooNew { found: 2, .. })));
    }

    #[test]
    fn what_is_durable_is_counted_in_bytes() {
        let state = sample();
        assert_eq!(state.missing().collect::<Vec<_>>(), [1, 2, 4, 5, 6, 7, 8]);
        assert_eq!((state.done_chunks(), state.done_bytes()), (3, 2 * CHUNK_BYTES + 512));
        assert_eq!(state.subject.chunk(9), ByteRange::new(9 * CHUNK_BYTES, 512));
        assert!(!format!("{state:?}").contains("pem"), "the key does not show");
    }
}
