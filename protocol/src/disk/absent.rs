//! `absent`: which blocks of a primary's own copy are not there, and which replica has them (S4).
//!
//! The file is there as long as a rebuild is. It begins with a header, and then has a page of bits for every so many blocks; a set
//! bit is an absent block. A page that was never written, which is a hole, says that all of its blocks are absent: so the file
//! of a volume of any size begins as one header.
//!
//! Everything is kept twice, one page after the other, and written so: first the one, durably, then its twin. A bit that was cleared
//! vouches for what was written since and answered, so it must not come back: of a page that a crash tore, or that went bad, the
//! twin says what counts. Of two whole ones the higher serial number does. Where neither is whole, nobody knows which of the blocks
//! are newer here than anywhere else, and the file is refused.
//!
//! ```text
//! header   0 magic "BMABSENT"    8 version (4)   12 CRC-32 of the rest (4)   16 volume (16)   32 source (32)
//!         64 blocks (8)         72 block bytes (4)                           76 zero
//! bits     0 magic "ABST"        4 CRC-32 of the rest (4)   8 page number (8)   16 serial (8)   24 zero (8)
//!         32 bits, the lowest of the first byte first
//! ```

use super::dirty_map::{BLOCKS_PER_PAGE, Bits, WORDS_PER_PAGE, page_count};
use super::{MetadataError, PAGE_BYTES, Page, is_sealed, seal};
use crate::units::{BlockSize, HostId, VolumeId};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The file's name in the volume's state folder.
pub const FILE_NAME: &str = "absent";
/// The newest layout that this release reads, and the one that it writes.
pub const VERSION: u32 = 1;

const WHAT: &str = "map of absent blocks";
pub(super) const MAGIC: [u8; 8] = *b"BMABSENT";
const CRC_AT: usize = 12;
const BITS_MAGIC: [u8; 4] = *b"ABST";
const BITS_CRC_AT: usize = 4;
/// A page and its twin.
const PAIR_BYTES: u64 = 2 * PAGE_BYTES as u64;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    volume: [u8; 16],
    source: [u8; 32],
    blocks: U64,
    block_bytes: U32,
    rest: [u8; PAGE_BYTES - 76],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBits {
    magic: [u8; 4],
    crc: U32,
    page: U64,
    serial: U64,
    zero: U64,
    words: [U64; WORDS_PER_PAGE],
}

const _: () = assert!(size_of::<RawHeader>() == PAGE_BYTES && size_of::<RawBits>() == PAGE_BYTES);

/// What the header says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// The volume.
    pub volume: VolumeId,
    /// The replica whose content the absent blocks are.
    pub source: HostId,
    /// The volume's size in blocks.
    pub blocks: u64,
    /// The tracking block.
    pub block_size: BlockSize,
}

/// What a page of bits and its twin say.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Read {
    /// The number of the change that wrote it; 0 where it was never written.
    pub serial: u64,
    /// A set bit is an absent block. Those past the volume's end mean nothing.
    pub bits: Box<Bits>,
    /// Which of the two is to be written again, as the other one says.
    pub missing: Option<usize>,
}

/// The size of the file in bytes for a volume of so many blocks, most of it holes.
#[must_use]
pub fn file_bytes(blocks: u64) -> u64 {
    (1 + page_count(blocks)) * PAIR_BYTES
}

/// Where the header goes, in bytes: it and its twin.
pub const HEADER_PLACES: [u64; 2] = [0, PAGE_BYTES as u64];

/// Where a page of bits goes, in bytes: it and its twin.
#[must_use]
pub fn places(page: u64) -> [u64; 2] {
    let first = (1 + page) * PAIR_BYTES;
    [first, first + PAGE_BYTES as u64]
}

impl Header {
    /// The page to write at both [`HEADER_PLACES`].
    #[must_use]
    pub fn encode(&self) -> Page {
        let raw = RawHeader {
            magic: MAGIC,
            version: U32::new(VERSION),
            crc: U32::ZERO,
            volume: self.volume.0,
            source: self.source.0,
            blocks: U64::new(self.blocks),
            block_bytes: U32::new(self.block_size.bytes() as u32),
            rest: [0; PAGE_BYTES - 76],
        };
        let mut page: Page = zerocopy::transmute!(raw);
        seal(&mut page, CRC_AT);
        page
    }

    /// Reads the first two pages of the file.
    ///
    /// # Errors
    /// [`MetadataError`] when neither is whole, or a newer release wrote one.
    pub fn recover(file: &[u8]) -> Result<Self, MetadataError> {
        for page in file.chunks_exact(PAGE_BYTES).take(2) {
            if let Some(header) = Self::decode(page)? {
                return Ok(header);
            }
        }
        Err(MetadataError::Corrupted { what: WHAT })
    }

    fn decode(page: &[u8]) -> Result<Option<Self>, MetadataError> {
        let Ok(raw) = RawHeader::ref_from_bytes(page) else { return Ok(None) };
        if raw.magic != MAGIC || !is_sealed(page, CRC_AT) {
            return Ok(None);
        }
        if raw.version.get() > VERSION {
            return Err(MetadataError::TooNew { what: WHAT, found: raw.version.get(), known: VERSION });
        }
        let block_size = BlockSize::new(raw.block_bytes.get().into())
            .map_err(|_| MetadataError::Corrupted { what: WHAT })?;
        Ok(Some(Self {
            volume: VolumeId(raw.volume),
            source: HostId(raw.source),
            blocks: raw.blocks.get(),
            block_size,
        }))
    }
}

/// The page to write at both [`places`] of this page of bits. `serial` is at least 1, and higher than that of any earlier change.
#[must_use]
pub fn encode(page: u64, serial: u64, bits: &Bits) -> Page {
    let raw = RawBits {
        magic: BITS_MAGIC,
        crc: U32::ZERO,
        page: U64::new(page),
        serial: U64::new(serial),
        zero: U64::ZERO,
        words: bits.map(U64::new),
    };
    let mut bytes: Page = zerocopy::transmute!(raw);
    seal(&mut bytes, BITS_CRC_AT);
    bytes
}

/// Reads a page of bits and its twin.
///
/// # Errors
/// [`MetadataError`] when something was written there and neither is whole.
pub fn decode(page: u64, pair: [&Page; 2]) -> Result<Read, MetadataError> {
    let is_hole = |bytes: &Page| bytes.iter().all(|byte| *byte == 0);
    let whole = |bytes: &Page| {
        let raw: RawBits = zerocopy::transmute!(*bytes);
        let is_whole = raw.magic == BITS_MAGIC && raw.page.get() == page && is_sealed(bytes, BITS_CRC_AT);
        is_whole.then(|| (raw.serial.get(), Box::new(raw.words.map(U64::get))))
    };
    let read = |(serial, bits), missing| Ok(Read { serial, bits, missing });
    match pair.map(whole) {
        [Some(first), Some(second)] if first.0 == second.0 => read(first, None),
        [Some(first), Some(second)] if first.0 > second.0 => read(first, Some(1)),
        [Some(_), Some(second)] => read(second, Some(0)),
        [Some(first), None] => read(first, Some(1)),
        [None, Some(second)] => read(second, Some(0)),
        // The first change of a page was never durable where its twin was not begun.
        [None, None] if is_hole(pair[1]) => {
            let missing = (!is_hole(pair[0])).then_some(0);
            read((0, Box::new([u64::MAX; WORDS_PER_PAGE])), missing)
        }
        [None, None] => Err(MetadataError::Corrupted { what: WHAT }),
    }
}

/// The blocks that a page of bits stands for, in a volume of so many blocks.
#[must_use]
pub fn blocks_of(page: u64, blocks: u64) -> std::ops::Range<u64> {
    (page * BLOCKS_PER_PAGE).min(blocks)..((page + 1) * BLOCKS_PER_PAGE).min(blocks)
}

#[cfg(test)]
mod tests {
    use super::*;

    const HOLE: Page = [0; PAGE_BYTES];

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn torn(page: &Page) -> Page {
        let mut torn = *page;
        torn[512..1024].fill(7);
        torn
    }

    #[test]
    fn header_and_bits_have_these_golden_bytes() {
        let header = Header {
            volume: VolumeId([1; 16]),
            source: HostId([2; 32]),
            blocks: 0x1_0000,
            block_size: BlockSize::default(),
        };
        let page = header.encode();
        assert_eq!(
            hex(&page[..80]),
            "424d414253454e54010000008c43f55001010101010101010101010101010101\
             0202020202020202020202020202020202020202020202020202020202020202\
             00000100000000000010000000000000"
        );
        assert!(page[80..].iter().all(|byte| *byte == 0));
        let (bad, mut newer) = (torn(&page), page);
        newer[8] = 2;
        seal(&mut newer, CRC_AT);
        assert_eq!(Header::recover(&[page, bad].concat()), Ok(header));
        assert_eq!(Header::recover(&[bad, page].concat()), Ok(header));
        assert_eq!(Header::recover(&[bad, bad].concat()), Err(MetadataError::Corrupted { what: WHAT }));
        let too_new = MetadataError::TooNew { what: WHAT, found: 2, known: 1 };
        assert_eq!(Header::recover(&[newer, newer].concat()), Err(too_new));
        let mut bits = [0; WORDS_PER_PAGE];
        (bits[0], bits[507]) = (0b101, 1 << 63);
        let page = encode(7, 9, &bits);
        assert_eq!(
            hex(&page[..40]),
            "414253544298951f0700000000000000090000000000000000000000000000000500000000000000"
        );
        assert_eq!(page[PAGE_BYTES - 1], 0x80);
        assert_eq!(decode(7, [&page, &page]), Ok(Read { serial: 9, bits: Box::new(bits), missing: None }));
    }

    #[test]
    fn a_page_that_was_never_written_says_that_all_is_absent() {
        let all = |missing| Ok(Read { serial: 0, bits: Box::new([u64::MAX; WORDS_PER_PAGE]), missing });
        assert_eq!(decode(3, [&HOLE, &HOLE]), all(None));
        let page = encode(3, 1, &[0; WORDS_PER_PAGE]);
        assert_eq!(decode(3, [&torn(&page), &HOLE]), all(Some(0)), "that change was not durable");
    }

    #[test]
    fn whichever_of_the_two_is_not_whole_the_other_one_counts() {
        let (old, new) = (encode(3, 4, &[6; WORDS_PER_PAGE]), encode(3, 5, &[2; WORDS_PER_PAGE]));
        let read =
            |serial, bits, missing| Ok(Read { serial, bits: Box::new([bits; WORDS_PER_PAGE]), missing });
        for (pair, expected) in [
            ([new, new], read(5, 2, None)),
            // In the order in which they are written, with a crash at each moment.
            ([torn(&new), old], read(4, 6, Some(0))),
            ([new, old], read(5, 2, Some(1))),
            ([new, torn(&new)], read(5, 2, Some(1))),
            // One went bad.
            ([torn(&new), new], read(5, 2, Some(0))),
            ([HOLE, new], read(5, 2, Some(0))),
            ([new, HOLE], read(5, 2, Some(1))),
        ] {
            assert_eq!(decode(3, [&pair[0], &pair[1]]), expected);
        }
        let corrupted = Err(MetadataError::Corrupted { what: WHAT });
        assert_eq!(decode(3, [&torn(&new), &torn(&new)]), corrupted);
        assert_eq!(decode(2, [&new, &new]), corrupted, "another page's");
        assert_eq!(decode(3, [&HOLE, &torn(&new)]), corrupted);
    }

    #[test]
    fn nothing_overlaps_and_the_file_holds_all() {
        let blocks = 2 * BLOCKS_PER_PAGE + 1;
        let places: Vec<u64> = HEADER_PLACES.into_iter().chain((0..3).flat_map(places)).collect();
        let expected: Vec<u64> = (0..8).map(|page| page * PAGE_BYTES as u64).collect();
        assert_eq!((places, file_bytes(blocks)), (expected, 8 * PAGE_BYTES as u64));
        assert_eq!(blocks_of(2, blocks), 2 * BLOCKS_PER_PAGE..blocks);
    }
}
