//! `map-PEER`: the blocks that may differ on one peer.
//!
//! Two header slots of one page that take turns, then pages of bits. A page of bits that is all zero is clean, and
//! stays a hole in the file. A page that is neither zero nor whole counts as dirty throughout, so torn and damaged
//! pages cost time, never data; the activity log covers bits that were not written yet (D1).
//!
//! A write of a header that was torn leaves the one before, which nothing newer relied on yet. It can't be told from a header that
//! was durable and went bad later, and the one before that may say of blocks that they are clean which the newer one called dirty. So
//! where a slot is neither zero nor whole, every block counts as dirty ([`Header::is_unsure`]). The next header goes to that slot.
//! Zeroes are taken for a slot that was never written: every header is synced, so no file system gives them back for one.
//!
//! From `full_from` on, every block is dirty and the pages are not looked at: so a map of a volume of any size begins
//! as one header. Raising `full_from` is written only after the pages below it.
//!
//! ```text
//! header   0 magic "BMDIRTY\0"   8 version (4)   12 CRC-32 of the rest (4)   16 serial (8)
//!         24 volume (16)        40 peer (32)     72 copy of the peer that the map is relative to (16)
//!         88 blocks (8)         96 block bytes (4) 100 zero (4)   104 full_from, a page number (8)
//!        112 generation (16)   128 adopted (8)
//!        136 known of the peer: generation (16), epoch (8), sequence (8), session (8), copies (8)
//!        184 session of the last copies (8)    192 whether nothing of it was answered (1)
//!        193 promise (1)  194 zero (2)  196 replicas of the promise (4)  200 hosts that count for it: how many (4)
//!        204 zero (4)     208 up to 33 hosts (32)                                           1264 zero
//! bits     0 magic "BITS"        4 CRC-32 of the rest (4)   8 page number (8)   16 zero (16)
//!         32 bits, the lowest of the first byte first
//! ```
//!
//! Version 1 had zeroes from 112 on: no generation, nothing adopted. That is what a map of that time means. Version 2 had
//! zeroes from 136 on: nothing is known. Version 3 had zeroes from 184 on: the session of the last copies is not known. Version 4 had
//! zeroes from 192 on: any of it may have been answered. Version 5 had zeroes from 193 on: the peer may count on anything.

use super::{
    MetadataError, PAGE_BYTES, Page, is_sealed, newest_of_two, promise_of, raw_hosts, raw_promise, seal,
};
use crate::given::Given;
use crate::planted::{Bug, planted};
use crate::terms::MEMBERS_LIMIT;
use crate::units::{
    BlockSize, CopyId, Epoch, GenerationId, HostId, Mark, Position, Sequence, Session, VolumeId,
};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What the names of all maps' files begin with.
pub const FILE_PREFIX: &str = "map-";
/// The newest layout that this release reads, and the one that it writes.
pub const VERSION: u32 = 6;
/// How many 64-bit words of bits a page holds.
pub const WORDS_PER_PAGE: usize = (PAGE_BYTES - BITS_HEADER_BYTES) / 8;
/// How many blocks a page stands for.
pub const BLOCKS_PER_PAGE: u64 = WORDS_PER_PAGE as u64 * 64;

const FIRST_WITH_COPIED: u32 = 4;
const UNKNOWN_PROMISE: u8 = 3;
const FIRST_WITH_GIVEN: u32 = 6;
const UNKNOWN_SESSION: u64 = u64::MAX;
const WHAT: &str = "dirty map";
pub(super) const MAGIC: [u8; 8] = *b"BMDIRTY\0";
const CRC_AT: usize = 12;
const BITS_MAGIC: [u8; 4] = *b"BITS";
const BITS_CRC_AT: usize = 4;
const BITS_HEADER_BYTES: usize = 32;
const HEADER_PAGES: u64 = 2;

/// The bits of one page.
pub type Bits = [u64; WORDS_PER_PAGE];

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    serial: U64,
    volume: [u8; 16],
    peer: [u8; 32],
    base: [u8; 16],
    blocks: U64,
    block_bytes: U32,
    zero: U32,
    full_from: U64,
    generation: [u8; 16],
    adopted: U64,
    known_generation: [u8; 16],
    known_epoch: U64,
    known_sequence: U64,
    known_session: U64,
    known_copies: U64,
    copied: U64,
    unanswered: u8,
    promise: u8,
    zero_too: [u8; 2],
    promise_replicas: U32,
    counted_length: U32,
    zero_again: U32,
    counted: [[u8; 32]; MEMBERS_LIMIT],
    rest: [u8; PAGE_BYTES - 208 - 32 * MEMBERS_LIMIT],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBits {
    magic: [u8; 4],
    crc: U32,
    page: U64,
    zero: [u8; 16],
    words: [U64; WORDS_PER_PAGE],
}

const _: () = assert!(size_of::<RawHeader>() == PAGE_BYTES && size_of::<RawBits>() == PAGE_BYTES);

/// What a map is relative to (L2): it says what differs from the peer's content only if all of this still holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Base {
    /// The copy of the peer; none where it isn't known, or no session ever began.
    pub copy: CopyId,
    /// The newest generation that the peer had when the map began, or a newer one that it confirmed since; none for
    /// any of ours.
    pub generation: GenerationId,
    /// How often this host had adopted another's content when the map began.
    pub adopted: u64,
}

impl Base {
    /// Whether the map was never in use: no session began, and no promotion made it.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.copy.is_none() && self.generation.is_none()
    }
}

/// What the header says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// The volume.
    pub volume: VolumeId,
    /// The peer.
    pub peer: HostId,
    /// What the map is relative to.
    pub base: Base,
    /// How far the peer was known to be; it may be further (X4).
    pub known: Mark,
    /// The last session in which the peer may have been sent copies; none where that is not known, as of a new map or of one
    /// that an earlier release wrote. The peer knows of later ones only where this host was set back (X4).
    pub copied: Option<Session>,
    /// Whether applications were answered nothing that the peer may lack, as it is in the mode sync with a primary that
    /// blocks: after a promotion of the peer nothing is lost with the marks (L6).
    pub is_unanswered: bool,
    /// What the peer may count on, at the most, whatever became of it since (W4); nothing where that is not known, as of a map
    /// that an earlier release wrote.
    pub given: Option<Given>,
    /// The volume's size in blocks.
    pub blocks: u64,
    /// The tracking block.
    pub block_size: BlockSize,
    /// From this page on every block is dirty.
    pub full_from: u64,
}

/// The file's name in the volume's state folder.
#[must_use]
pub fn file_name(peer: HostId) -> String {
    format!("{FILE_PREFIX}{}", &peer.to_string()[..16])
}

/// How many pages of bits a volume of so many blocks has.
#[must_use]
pub fn page_count(blocks: u64) -> u64 {
    blocks.div_ceil(BLOCKS_PER_PAGE)
}

/// The size of the file in bytes, most of it holes.
#[must_use]
pub fn file_bytes(blocks: u64) -> u64 {
    (HEADER_PAGES + page_count(blocks)) * PAGE_BYTES as u64
}

/// The place of a page of bits in the file, in bytes.
#[must_use]
pub fn page_offset(page: u64) -> u64 {
    (HEADER_PAGES + page) * PAGE_BYTES as u64
}

impl Header {
    /// The page to write at [`super::slot_offset`] of `serial`.
    #[must_use]
    pub fn encode(&self, serial: u64) -> Page {
        let (promise, replicas) =
            self.given.as_ref().map_or((UNKNOWN_PROMISE, 0), |given| raw_promise(given.promise));
        let counted = self.given.as_ref().map_or(&[][..], |given| &given.counted);
        let raw = RawHeader {
            magic: MAGIC,
            version: U32::new(VERSION),
            crc: U32::ZERO,
            serial: U64::new(serial),
            volume: self.volume.0,
            peer: self.peer.0,
            base: self.base.copy.0,
            blocks: U64::new(self.blocks),
            block_bytes: U32::new(self.block_size.bytes() as u32),
            zero: U32::ZERO,
            full_from: U64::new(self.full_from),
            generation: self.base.generation.0,
            adopted: U64::new(self.base.adopted),
            known_generation: self.known.position.generation.0,
            known_epoch: U64::new(self.known.position.epoch.0),
            known_sequence: U64::new(self.known.position.sequence.0),
            known_session: U64::new(self.known.session.0),
            known_copies: U64::new(self.known.copies),
            copied: U64::new(self.copied.map_or(UNKNOWN_SESSION, |session| session.0)),
            unanswered: u8::from(self.is_unanswered),
            promise,
            zero_too: [0; 2],
            promise_replicas: U32::new(replicas),
            counted_length: U32::new(counted.len() as u32),
            zero_again: U32::ZERO,
            counted: raw_hosts(counted),
            rest: [0; PAGE_BYTES - 208 - 32 * MEMBERS_LIMIT],
        };
        let mut page: Page = zerocopy::transmute!(raw);
        seal(&mut page, CRC_AT);
        page
    }

    /// Reads the first two pages of the file: the newest whole header and its serial number.
    ///
    /// # Errors
    /// [`MetadataError`] when neither slot is whole, or a newer release wrote one.
    pub fn recover(file: &[u8]) -> Result<(u64, Self), MetadataError> {
        newest_of_two(WHAT, file, |slot| Self::decode(slot).transpose())
    }

    /// Whether a newer header than the one that was recovered from these pages may have been there: any block may be dirty.
    #[must_use]
    pub fn is_unsure(file: &[u8]) -> bool {
        let is_damaged =
            |slot: &[u8]| slot.iter().any(|byte| *byte != 0) && matches!(Self::decode(slot), Ok(None));
        file.chunks_exact(PAGE_BYTES).take(2).any(is_damaged) && !planted(Bug::TrustOlderHeader)
    }

    fn decode(slot: &[u8]) -> Result<Option<(u64, Self)>, MetadataError> {
        let Ok(raw) = RawHeader::ref_from_bytes(slot) else { return Ok(None) };
        if raw.magic != MAGIC || !is_sealed(slot, CRC_AT) {
            return Ok(None);
        }
        if raw.version.get() > VERSION {
            return Err(MetadataError::TooNew { what: WHAT, found: raw.version.get(), known: VERSION });
        }
        let block_size = BlockSize::new(raw.block_bytes.get().into())
            .map_err(|_| MetadataError::Corrupted { what: WHAT })?;
        let corrupted = || MetadataError::Corrupted { what: WHAT };
        let given = if raw.version.get() < FIRST_WITH_GIVEN || raw.promise == UNKNOWN_PROMISE {
            None
        } else {
            let promise = promise_of(raw.promise, raw.promise_replicas.get()).ok_or_else(corrupted)?;
            let counted = raw.counted.get(..raw.counted_length.get() as usize).ok_or_else(corrupted)?;
            Some(Given { promise, counted: counted.iter().map(|host| HostId(*host)).collect() })
        };
        let header = Self {
            volume: VolumeId(raw.volume),
            peer: HostId(raw.peer),
            base: Base {
                copy: CopyId(raw.base),
                generation: GenerationId(raw.generation),
                adopted: raw.adopted.get(),
            },
            known: Mark {
                position: Position {
                    generation: GenerationId(raw.known_generation),
                    epoch: Epoch(raw.known_epoch.get()),
                    sequence: Sequence(raw.known_sequence.get()),
                },
                session: Session(raw.known_session.get()),
                copies: raw.known_copies.get(),
            },
            copied: (raw.version.get() >= FIRST_WITH_COPIED && raw.copied.get() != UNKNOWN_SESSION)
                .then(|| Session(raw.copied.get())),
            is_unanswered: raw.unanswered == 1,
            given,
            blocks: raw.blocks.get(),
            block_size,
            full_from: raw.full_from.get(),
        };
        Ok(Some((raw.serial.get(), header)))
    }
}

/// The bytes of a page of bits.
#[must_use]
pub fn encode_bits(page: u64, bits: &Bits) -> Page {
    let raw = RawBits {
        magic: BITS_MAGIC,
        crc: U32::ZERO,
        page: U64::new(page),
        zero: [0; 16],
        words: bits.map(U64::new),
    };
    let mut bytes: Page = zerocopy::transmute!(raw);
    seal(&mut bytes, BITS_CRC_AT);
    bytes
}

/// Reads a page of bits: none when it is clean, all set when it is not whole or is another page's.
#[must_use]
pub fn decode_bits(page: u64, bytes: &Page) -> Option<Bits> {
    if bytes.iter().all(|byte| *byte == 0) {
        return None;
    }
    let raw: RawBits = zerocopy::transmute!(*bytes);
    if raw.magic != BITS_MAGIC || raw.page.get() != page || !is_sealed(bytes, BITS_CRC_AT) {
        if planted(Bug::TornPageIsClean) {
            return None;
        }
        return Some([u64::MAX; WORDS_PER_PAGE]);
    }
    Some(raw.words.map(U64::get))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terms::Promise;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// A page that begins with these bytes; the rest is zero.
    fn page(text: &str) -> Page {
        let mut page = [0; PAGE_BYTES];
        for (at, byte) in page.iter_mut().take(text.len() / 2).enumerate() {
            *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).unwrap();
        }
        page
    }

    fn header_of(given: Option<Given>) -> Header {
        Header {
            volume: VolumeId([1; 16]),
            peer: HostId([2; 32]),
            base: Base { copy: CopyId([3; 16]), generation: GenerationId([4; 16]), adopted: 5 },
            known: Mark {
                position: Position {
                    generation: GenerationId([6; 16]),
                    epoch: Epoch(7),
                    sequence: Sequence(8),
                },
                session: Session(9),
                copies: 10,
            },
            copied: Some(Session(11)),
            is_unanswered: true,
            given,
            blocks: 0x1_0000,
            block_size: BlockSize::default(),
            full_from: 2,
        }
    }

    #[test]
    fn a_header_of_version_2_knows_nothing_of_the_peer() {
        let start = "424d444952545900020000009303b7c809000000000000000101010101010101010101010101010102020202\
             02020202020202020202020202020202020202020202020202020202030303030303030303030303030303\
             0300000100000000000010000000000000020000000000000004040404040404040404040404040404050000\
             0000000000";
        let (serial, header) = Header::recover(&page(start)).unwrap();
        assert_eq!((serial, header.base.adopted, header.full_from), (9, 5, 2));
        assert_eq!(header.known, Mark::default());
    }

    #[test]
    fn a_header_of_version_3_does_not_know_when_the_peer_was_sent_copies() {
        let text = "424d4449525459000300000059a99fba09000000000000000101010101010101010101010101010102020202\
                    02020202020202020202020202020202020202020202020202020202030303030303030303030303030303\
                    0300000100000000000010000000000000020000000000000004040404040404040404040404040404050000\
                    000000000006060606060606060606060606060606070000000000000008000000000000000900000000000000\
                    0a00000000000000";
        let (_, header) = Header::recover(&page(text)).unwrap();
        assert_eq!((header.known.session, header.known.copies, header.copied), (Session(9), 10, None));
    }

    #[test]
    fn a_header_of_version_4_denies_nothing() {
        let text = "424d4449525459000400000077456a9c09000000000000000101010101010101010101010101010102020202\
                    02020202020202020202020202020202020202020202020202020202030303030303030303030303030303\
                    0300000100000000000010000000000000020000000000000004040404040404040404040404040404050000\
                    000000000006060606060606060606060606060606070000000000000008000000000000000900000000000000\
                    0a000000000000000b00000000000000";
        let (_, header) = Header::recover(&page(text)).unwrap();
        assert_eq!((header.copied, header.is_unanswered), (Some(Session(11)), false));
    }

    #[test]
    fn a_header_of_version_5_does_not_know_what_the_peer_counts_on() {
        let text = "424d44495254590005000000a8100bba09000000000000000101010101010101010101010101010102020202\
                    02020202020202020202020202020202020202020202020202020202030303030303030303030303030303\
                    0300000100000000000010000000000000020000000000000004040404040404040404040404040404050000\
                    000000000006060606060606060606060606060606070000000000000008000000000000000900000000000000\
                    0a000000000000000b0000000000000001";
        let (_, header) = Header::recover(&page(text)).unwrap();
        assert_eq!((header.is_unanswered, header.given), (true, None));
        let unknown = header_of(None);
        assert_eq!(Header::recover(&unknown.encode(9)), Ok((9, unknown)), "it is kept unknown");
    }

    #[test]
    fn header_and_bits_have_these_golden_bytes() {
        let header =
            header_of(Some(Given { promise: Promise::Replicas(12), counted: vec![HostId([13; 32])] }));
        let page = header.encode(9);
        assert_eq!(Header::recover(&page), Ok((9, header)));
        assert_eq!(
            hex(&page[..240]),
            "424d44495254590006000000c6a68585090000000000000001010101010101010101010101010101020202\
             02020202020202020202020202020202020202020202020202020202020303030303030303030303030303\
             03030000010000000000001000000000000002000000000000000404040404040404040404040404040405\
             00000000000000060606060606060606060606060606060700000000000000080000000000000009000000\
             000000000a000000000000000b00000000000000010200000c00000001000000000000000d0d0d0d0d0d0d\
             0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d0d"
        );
        let mut bits = [0; WORDS_PER_PAGE];
        (bits[0], bits[507]) = (0b101, 1 << 63);
        let page = encode_bits(7, &bits);
        assert_eq!(decode_bits(7, &page), Some(bits));
        assert_eq!(
            hex(&page[..40]),
            "424954539dcbc3e30700000000000000000000000000000000000000000000000500000000000000"
        );
        assert_eq!(page[PAGE_BYTES - 1], 0x80);
    }

    #[test]
    fn a_header_of_version_1_is_relative_to_any_generation() {
        let text = "424d44495254590001000000cadb6df709000000000000000101010101010101010101010101010102020202\
                    02020202020202020202020202020202020202020202020202020202030303030303030303030303030303\
                    03000001000000000000100000000000000200000000000000";
        let (_, header) = Header::recover(&page(text)).unwrap();
        assert_eq!(header.base, Base { copy: CopyId([3; 16]), ..Base::default() });
    }

    #[test]
    fn a_page_that_is_not_whole_is_dirty_throughout() {
        assert_eq!(decode_bits(0, &[0; PAGE_BYTES]), None);
        let whole = encode_bits(1, &[1; WORDS_PER_PAGE]);
        let all = Some([u64::MAX; WORDS_PER_PAGE]);
        assert_eq!(decode_bits(2, &whole), all, "another page's bits");
        for sector in 0..8 {
            let mut torn = whole;
            torn[sector * 512..(sector + 1) * 512].fill(0);
            assert_eq!(decode_bits(1, &torn), all, "sector {sector} was not written");
        }
    }
}
