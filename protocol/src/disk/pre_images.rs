//! `pre-images-LAYER`: what blocks held before they were overwritten in one stretch of gap mode, or by the winner of a
//! split brain (P2, L6).
//!
//! A header of one page, written whole before anything else, then batches without gaps. A batch is a page that lists
//! its entries, and then their data in the same order, each padded with zeroes to a whole page. An entry of zeroes has
//! no data. Entries of a layer never overlap, so they may be restored in any order.
//!
//! ```text
//! header   0 magic "BMPREIMG"     8 version (4)      12 CRC-32 of the rest (4)
//!         16 layer (8)           24 size in bytes (8)
//!         32 volume (16)         48 copy (16)
//!         64 block bytes (4)     68 lineage length (4)
//!         72 when the layer began, in seconds since 1970 (8)
//!         80 point: generation (16), epoch (8), sequence (8)
//!        112 lineage: up to 64 generations of 16 bytes, newest first; then zero
//! batch    0 magic "BMPREBAT"     8 version (4)      12 CRC-32 of the page's rest (4)
//!         16 layer (8)           24 serial, from 0 without gaps (8)
//!         32 place in the file (8)                   40 entries (4)    44 zero (4)
//!         48 entries of 20 bytes: offset (8), length (4), kind (4): 0 zeroes, 1 data, CRC-32 of the data (4)
//!       4088 zero (8)
//! ```
//!
//! # What a crash leaves
//!
//! A batch is durable as a whole before the next is begun, and before any block in it is overwritten. So the last one
//! alone can be torn, and then nothing of it was overwritten: it is ignored, and the next takes its place once the
//! file was cut there. A batch that is not whole although a later one was begun ([`is_followed`]) was durable once:
//! that is damage, and the layer can't be relied on. A last batch that went bad after it was durable cannot be told
//! from a torn one.
//!
//! # Upgrades
//!
//! Batches have the version of their file's header.

use super::superblock::LINEAGE_LIMIT;
use super::{MetadataError, PAGE_BYTES, Page, is_sealed, seal};
use crate::layers::LayerId;
use crate::ranges::ByteRange;
use crate::units::{BlockSize, CopyId, Epoch, GenerationId, Position, SECTOR_BYTES, Sequence, VolumeId};
use zerocopy::byteorder::little_endian::{U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// What the names of all layers' files begin with.
pub const FILE_PREFIX: &str = "pre-images-";
/// The newest layout that this release reads, and the one that it writes.
pub const VERSION: u32 = 1;
/// Where the first batch is, in bytes.
pub const FIRST_BATCH: u64 = PAGE_BYTES as u64;
/// How many entries a batch holds at most.
pub const ENTRIES: usize = (PAGE_BYTES - BATCH_HEADER_BYTES) / ENTRY_BYTES;
/// How long what one entry stands for is at most, in bytes.
pub const ENTRY_LIMIT_BYTES: u64 = 1 << 20;
/// How long a batch is at most, with its page, in bytes.
pub const BATCH_LIMIT_BYTES: u64 = 4 << 20;

const WHAT: &str = "layer of pre-images";
pub(super) const MAGIC: [u8; 8] = *b"BMPREIMG";
pub(super) const BATCH_MAGIC: [u8; 8] = *b"BMPREBAT";
const CRC_AT: usize = 12;
const BATCH_HEADER_BYTES: usize = 48;
const ENTRY_BYTES: usize = 20;
const HEADER_REST: usize = PAGE_BYTES - 112 - 16 * LINEAGE_LIMIT;
const KIND_ZEROES: u32 = 0;
const KIND_DATA: u32 = 1;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    layer: U64,
    size_bytes: U64,
    volume: [u8; 16],
    copy: [u8; 16],
    block_bytes: U32,
    lineage_length: U32,
    began: U64,
    generation: [u8; 16],
    epoch: U64,
    sequence: U64,
    lineage: [[u8; 16]; LINEAGE_LIMIT],
    rest: [u8; HEADER_REST],
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawEntry {
    offset: U64,
    length: U32,
    kind: U32,
    crc: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct RawBatch {
    magic: [u8; 8],
    version: U32,
    crc: U32,
    layer: U64,
    serial: U64,
    at: U64,
    count: U32,
    zero: U32,
    entries: [RawEntry; ENTRIES],
    rest: [u8; PAGE_BYTES - BATCH_HEADER_BYTES - ENTRY_BYTES * ENTRIES],
}

const _: () = assert!(size_of::<RawHeader>() == PAGE_BYTES && size_of::<RawBatch>() == PAGE_BYTES);
const _: () = assert!(size_of::<RawEntry>() == ENTRY_BYTES);
const _: () = assert!(ENTRY_LIMIT_BYTES + PAGE_BYTES as u64 <= BATCH_LIMIT_BYTES);

/// What a layer is a part of, and the point that it leads back to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// The layer.
    pub layer: LayerId,
    /// The volume.
    pub volume: VolumeId,
    /// The copy whose old content this is.
    pub copy: CopyId,
    /// The volume's size in bytes.
    pub size_bytes: u64,
    /// The tracking block.
    pub block_size: BlockSize,
    /// The point that restoring all entries leads back to.
    pub point: Position,
    /// When the layer began, in seconds since 1970.
    pub began_unix_seconds: u64,
    /// The generations of the content at the point, newest first; at most [`LINEAGE_LIMIT`].
    pub lineage: Vec<GenerationId>,
}

/// What one range held.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// The range of the volume: whole sectors, at least one, at most [`ENTRY_LIMIT_BYTES`].
    pub range: ByteRange,
    /// The CRC-32 of its data; none for zeroes.
    pub crc: Option<u32>,
}

/// Some entries, which became durable together.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Batch {
    /// The layer.
    pub layer: LayerId,
    /// The batch's number in its layer, counted from 0.
    pub serial: u64,
    /// Where the batch is in the file, in bytes.
    pub at: u64,
    /// At least one, at most [`ENTRIES`], together at most [`BATCH_LIMIT_BYTES`].
    pub entries: Vec<Entry>,
}

/// The file's name in the volume's state folder.
#[must_use]
pub fn file_name(layer: LayerId) -> String {
    format!("{FILE_PREFIX}{:016x}", layer.number())
}

/// The layer whose file has this name; none for another file's.
#[must_use]
pub fn layer_of(file_name: &str) -> Option<LayerId> {
    let layer = LayerId::new(u64::from_str_radix(file_name.strip_prefix(FILE_PREFIX)?, 16).ok()?)?;
    (self::file_name(layer) == file_name).then_some(layer)
}

/// Whether a batch later than `serial` is in the bytes that stand at `at` in a layer's file.
#[must_use]
pub fn is_followed(bytes: &[u8], layer: LayerId, serial: u64, at: u64) -> bool {
    bytes.chunks_exact(PAGE_BYTES).zip(0u64..).any(|(page, index)| {
        let place = at + index * PAGE_BYTES as u64;
        Batch::parse(page)
            .is_some_and(|batch| batch.layer == layer && batch.serial > serial && batch.at == place)
    })
}

impl Header {
    /// The file's first page.
    ///
    /// # Panics
    /// When the lineage is longer than its limit.
    #[must_use]
    pub fn encode(&self) -> Page {
        assert!(self.lineage.len() <= LINEAGE_LIMIT, "a lineage is pruned before it is recorded");
        let mut lineage = [[0; 16]; LINEAGE_LIMIT];
        for (slot, generation) in lineage.iter_mut().zip(&self.lineage) {
            *slot = generation.0;
        }
        let raw = RawHeader {
            magic: MAGIC,
            version: U32::new(VERSION),
            crc: U32::ZERO,
            layer: U64::new(self.layer.number()),
            size_bytes: U64::new(self.size_bytes),
            volume: self.volume.0,
            copy: self.copy.0,
            block_bytes: U32::new(self.block_size.bytes() as u32),
            lineage_length: U32::new(self.lineage.len() as u32),
            began: U64::new(self.began_unix_seconds),
            generation: self.point.generation.0,
            epoch: U64::new(self.point.epoch.0),
            sequence: U64::new(self.point.sequence.0),
            lineage,
            rest: [0; HEADER_REST],
        };
        let mut page: Page = zerocopy::transmute!(raw);
        seal(&mut page, CRC_AT);
        page
    }

    /// Reads the file's first page.
    ///
    /// # Errors
    /// [`MetadataError`] when it is damaged or a newer release wrote it.
    pub fn decode(page: &[u8]) -> Result<Self, MetadataError> {
        let corrupted = || MetadataError::Corrupted { what: WHAT };
        let raw = RawHeader::ref_from_bytes(page).map_err(|_| corrupted())?;
        if raw.magic != MAGIC || !is_sealed(page, CRC_AT) {
            return Err(corrupted());
        }
        if raw.version.get() > VERSION {
            return Err(MetadataError::TooNew { what: WHAT, found: raw.version.get(), known: VERSION });
        }
        let lineage = raw.lineage.get(..raw.lineage_length.get() as usize).ok_or_else(corrupted)?;
        Ok(Self {
            layer: LayerId::new(raw.layer.get()).ok_or_else(corrupted)?,
            volume: VolumeId(raw.volume),
            copy: CopyId(raw.copy),
            size_bytes: raw.size_bytes.get(),
            block_size: BlockSize::new(raw.block_bytes.get().into()).map_err(|_| corrupted())?,
            point: Position {
                generation: GenerationId(raw.generation),
                epoch: Epoch(raw.epoch.get()),
                sequence: Sequence(raw.sequence.get()),
            },
            began_unix_seconds: raw.began.get(),
            lineage: lineage.iter().map(|generation| GenerationId(*generation)).collect(),
        })
    }

    /// What an error about a layer says when its content is not whole.
    #[must_use]
    pub fn corrupted() -> MetadataError {
        MetadataError::Corrupted { what: WHAT }
    }

    /// What an error says about a layer that is another's.
    #[must_use]
    pub fn foreign() -> MetadataError {
        MetadataError::Foreign { what: WHAT }
    }
}

impl Entry {
    /// An entry of a range that held this.
    ///
    /// # Panics
    /// When the data is not as long as the range.
    #[must_use]
    pub fn of_data(range: ByteRange, data: &[u8]) -> Self {
        assert_eq!(range.length, data.len() as u64, "an entry's data is all of its range");
        Self { range, crc: Some(crc32fast::hash(data)) }
    }

    /// An entry of a range that read as zeroes.
    #[must_use]
    pub fn of_zeroes(range: ByteRange) -> Self {
        Self { range, crc: None }
    }

    /// Whether this is the data that was saved.
    #[must_use]
    pub fn is_of(&self, data: &[u8]) -> bool {
        self.range.length == data.len() as u64 && self.crc == Some(crc32fast::hash(data))
    }

    /// How many bytes of the file the data takes.
    #[must_use]
    pub fn stored_bytes(&self) -> u64 {
        self.crc.map_or(0, |_| self.range.length.next_multiple_of(PAGE_BYTES as u64))
    }

    fn is_valid(&self) -> bool {
        let Self { range, .. } = self;
        !range.is_empty() && range.length <= ENTRY_LIMIT_BYTES && range.is_aligned(SECTOR_BYTES)
    }

    fn parse(raw: &RawEntry) -> Option<Self> {
        let (offset, length) = (raw.offset.get(), u64::from(raw.length.get()));
        offset.checked_add(length)?;
        let crc = match (raw.kind.get(), raw.crc.get()) {
            (KIND_ZEROES, 0) => None,
            (KIND_DATA, crc) => Some(crc),
            _ => return None,
        };
        Some(Self { range: ByteRange::new(offset, length), crc }).filter(Self::is_valid)
    }
}

impl Batch {
    /// How many bytes of the file the batch takes, with its page.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        PAGE_BYTES as u64 + self.entries.iter().map(Entry::stored_bytes).sum::<u64>()
    }

    /// Where the next batch is, in bytes.
    #[must_use]
    pub fn end(&self) -> u64 {
        self.at + self.bytes()
    }

    /// The entries in order, each with the place of its data behind the batch's page, in bytes.
    pub fn places(&self) -> impl Iterator<Item = (Entry, ByteRange)> + '_ {
        let mut start = 0;
        self.entries.iter().map(move |entry| {
            let place = ByteRange::new(start, entry.crc.map_or(0, |_| entry.range.length));
            start += entry.stored_bytes();
            (*entry, place)
        })
    }

    /// Whether the bytes behind the batch's page are the data of all its entries.
    #[must_use]
    pub fn is_whole(&self, data: &[u8]) -> bool {
        self.places().filter(|(entry, _)| entry.crc.is_some()).all(|(entry, place)| {
            data.get(place.offset as usize..place.end() as usize).is_some_and(|data| entry.is_of(data))
        })
    }

    /// The batch's page, which goes to [`Batch::at`].
    ///
    /// # Panics
    /// When there is no entry, or too many, or one of them is longer than its limit or no whole sectors, or the place
    /// is no multiple of a page.
    #[must_use]
    pub fn encode(&self) -> Page {
        assert!(self.is_valid(), "a batch keeps to its limits");
        let nothing = RawEntry { offset: U64::ZERO, length: U32::ZERO, kind: U32::ZERO, crc: U32::ZERO };
        let mut entries = [nothing; ENTRIES];
        for (slot, entry) in entries.iter_mut().zip(&self.entries) {
            *slot = RawEntry {
                offset: U64::new(entry.range.offset),
                length: U32::new(entry.range.length as u32),
                kind: U32::new(if entry.crc.is_some() { KIND_DATA } else { KIND_ZEROES }),
                crc: U32::new(entry.crc.unwrap_or(0)),
            };
        }
        let raw = RawBatch {
            magic: BATCH_MAGIC,
            version: U32::new(VERSION),
            crc: U32::ZERO,
            layer: U64::new(self.layer.number()),
            serial: U64::new(self.serial),
            at: U64::new(self.at),
            count: U32::new(self.entries.len() as u32),
            zero: U32::ZERO,
            entries,
            rest: [0; PAGE_BYTES - BATCH_HEADER_BYTES - ENTRY_BYTES * ENTRIES],
        };
        let mut page: Page = zerocopy::transmute!(raw);
        seal(&mut page, CRC_AT);
        page
    }

    /// Reads the page at `at`; nothing unless it is the whole page of this very batch.
    #[must_use]
    pub fn decode(page: &[u8], layer: LayerId, serial: u64, at: u64) -> Option<Self> {
        Self::parse(page).filter(|batch| (batch.layer, batch.serial, batch.at) == (layer, serial, at))
    }

    fn parse(page: &[u8]) -> Option<Self> {
        let raw = RawBatch::ref_from_bytes(page).ok()?;
        if raw.magic != BATCH_MAGIC || raw.version.get() != VERSION || !is_sealed(page, CRC_AT) {
            return None;
        }
        let entries = raw.entries.get(..raw.count.get() as usize)?;
        let entries = entries.iter().map(Entry::parse).collect::<Option<Vec<_>>>()?;
        let (layer, serial, at) = (LayerId::new(raw.layer.get())?, raw.serial.get(), raw.at.get());
        Some(Self { layer, serial, at, entries }).filter(Self::is_valid)
    }

    fn is_valid(&self) -> bool {
        (1..=ENTRIES).contains(&self.entries.len())
            && self.entries.iter().all(Entry::is_valid)
            && self.bytes() <= BATCH_LIMIT_BYTES
            && self.at >= FIRST_BATCH
            && self.at.is_multiple_of(PAGE_BYTES as u64)
            && self.at.checked_add(BATCH_LIMIT_BYTES).is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::testing::layer;

    const PAGE: u64 = PAGE_BYTES as u64;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn header() -> Header {
        Header {
            layer: layer(0x0102_0304),
            volume: VolumeId([1; 16]),
            copy: CopyId([2; 16]),
            size_bytes: 1 << 30,
            block_size: BlockSize::default(),
            point: Position { generation: GenerationId([3; 16]), epoch: Epoch(4), sequence: Sequence(5) },
            began_unix_seconds: 6,
            lineage: vec![GenerationId([3; 16]), GenerationId([7; 16])],
        }
    }

    /// A batch of 512 bytes, zeroes, and two pages; and the data behind its page.
    fn batch() -> (Batch, Vec<u8>) {
        let mut data = vec![0; 3 * PAGE_BYTES];
        data[..512].fill(8);
        data[PAGE_BYTES..].fill(9);
        let entries = vec![
            Entry::of_data(ByteRange::new(512, 512), &data[..512]),
            Entry::of_zeroes(ByteRange::new(1 << 20, 1 << 20)),
            Entry::of_data(ByteRange::new(3 << 20, 2 * PAGE), &data[PAGE_BYTES..]),
        ];
        (Batch { layer: layer(0x0102_0304), serial: 1, at: 3 * PAGE, entries }, data)
    }

    #[test]
    fn a_header_has_these_golden_bytes() {
        let page = header().encode();
        assert_eq!(
            hex(&page[..144]),
            "424d505245494d47010000009e75f83a04030201000000000000004000000000010101010101010101010101\
             0101010102020202020202020202020202020202001000000200000006000000000000000303030303030303\
             0303030303030303040000000000000005000000000000000303030303030303030303030303030307070707\
             070707070707070707070707"
        );
        assert!(page[144..].iter().all(|byte| *byte == 0));
        assert_eq!(Header::decode(&page), Ok(header()));
    }

    #[test]
    fn a_batch_has_these_golden_bytes() {
        let (batch, data) = batch();
        let page = batch.encode();
        assert_eq!(
            hex(&page[..108]),
            "424d50524542415401000000a3e6d6c104030201000000000100000000000000003000000000000003000000\
             000000000002000000000000000200000100000001efa6e30000100000000000000010000000000000000000\
             000030000000000000200000010000002857bf35"
        );
        assert!(page[108..].iter().all(|byte| *byte == 0));
        assert_eq!(Batch::decode(&page, batch.layer, 1, 3 * PAGE), Some(batch.clone()));
        assert_eq!((batch.bytes(), batch.end()), (4 * PAGE, 7 * PAGE));
        let places: Vec<_> = batch.places().map(|(_, place)| (place.offset, place.length)).collect();
        assert_eq!(places, [(0, 512), (PAGE, 0), (PAGE, 2 * PAGE)]);
        assert!(batch.is_whole(&data));
    }

    #[test]
    fn damage_is_noticed_wherever_it_is() {
        let (whole, (batch, _)) = (header().encode(), batch());
        let page = batch.encode();
        for at in 0..PAGE_BYTES {
            let (mut damaged, mut damaged_batch) = (whole, page);
            damaged[at] ^= 1;
            damaged_batch[at] ^= 1;
            assert_eq!(Header::decode(&damaged), Err(Header::corrupted()), "{at}");
            assert_eq!(Batch::decode(&damaged_batch, batch.layer, 1, 3 * PAGE), None, "{at}");
        }
        assert_eq!(Header::decode(&whole[..4095]), Err(Header::corrupted()));
        let mut newer = whole;
        newer[8] = 2;
        seal(&mut newer, CRC_AT);
        assert!(matches!(Header::decode(&newer), Err(MetadataError::TooNew { found: 2, .. })));
    }

    #[test]
    fn another_batch_is_not_taken_for_this_one() {
        let (batch, _) = batch();
        let page = batch.encode();
        for (layer, serial, at) in
            [(layer(1), 1, 3 * PAGE), (batch.layer, 2, 3 * PAGE), (batch.layer, 1, 4 * PAGE)]
        {
            assert_eq!(Batch::decode(&page, layer, serial, at), None);
        }
    }

    #[test]
    fn entries_that_nobody_writes_are_refused_though_they_are_sealed() {
        let (batch, _) = batch();
        let forge = |at: usize, bytes: &[u8]| {
            let mut page = batch.encode();
            page[at..at + bytes.len()].copy_from_slice(bytes);
            seal(&mut page, CRC_AT);
            Batch::decode(&page, batch.layer, 1, 3 * PAGE).is_some()
        };
        assert!(forge(48, &1024u64.to_le_bytes()));
        for (at, bytes, what) in [
            (48, &u64::MAX.to_le_bytes()[..], "an end beyond 64 bits"),
            (48, &513u64.to_le_bytes(), "half a sector"),
            (56, &0u32.to_le_bytes(), "nothing"),
            (56, &((1u32 << 20) + 512).to_le_bytes(), "too long"),
            (60, &2u32.to_le_bytes(), "a kind to come"),
            (60, &0u32.to_le_bytes(), "zeroes with a checksum"),
            (40, &0u32.to_le_bytes(), "no entry"),
            (40, &4u32.to_le_bytes(), "an entry that is empty"),
            (40, &203u32.to_le_bytes(), "more entries than there is room for"),
        ] {
            assert!(!forge(at, bytes), "{what}");
        }
        let each = Entry { range: ByteRange::new(0, 1 << 20), crc: Some(0) };
        assert!(Batch { entries: vec![each; 3], ..batch.clone() }.is_valid());
        assert!(!Batch { entries: vec![each; 4], ..batch }.is_valid(), "longer than a batch can be");
    }

    #[test]
    fn a_torn_batch_is_not_whole_whichever_sector_is_missing() {
        let (batch, data) = batch();
        let file = [&batch.encode()[..], &data].concat();
        // The first entry's padding and the page's end are zero in any case.
        let says_something = |sector: &&usize| file[**sector * 512..][..512].iter().any(|byte| *byte != 0);
        let sectors: Vec<usize> = (0..file.len() / 512).collect();
        assert_eq!(sectors.iter().filter(says_something).count(), 1 + 1 + 16);
        for sector in sectors.iter().filter(says_something) {
            let mut torn = file.clone();
            torn[sector * 512..][..512].fill(0);
            let decoded = Batch::decode(&torn[..PAGE_BYTES], batch.layer, 1, 3 * PAGE);
            assert!(decoded.is_none_or(|batch| !batch.is_whole(&torn[PAGE_BYTES..])), "{sector}");
        }
        assert!(!batch.is_whole(&data[..data.len() - 1]));
        assert!(!batch.is_whole(&[]));
    }

    #[test]
    fn a_batch_in_what_follows_is_found_only_where_it_belongs() {
        let (batch, data) = batch();
        let tail = [&vec![7; 2 * PAGE_BYTES][..], &batch.encode(), &data].concat();
        assert!(is_followed(&tail, batch.layer, 0, PAGE));
        assert!(!is_followed(&tail, batch.layer, 1, PAGE), "the batch itself");
        assert!(!is_followed(&tail, batch.layer, 0, 2 * PAGE), "a copy of it in the data");
        assert!(!is_followed(&tail, layer(1), 0, PAGE), "another layer's");
        assert!(!is_followed(&[], batch.layer, 0, PAGE));
    }

    #[test]
    fn a_layer_is_known_by_its_file_name() {
        assert_eq!(file_name(layer(0xab)), "pre-images-00000000000000ab");
        assert_eq!(layer_of(&file_name(layer(u64::MAX))), Some(layer(u64::MAX)));
        for name in [
            "pre-images-",
            "pre-images-ab",
            "pre-images-00000000000000AB",
            "pre-images-+0000000000000ab",
            "pre-images-00000000000000ab.new-1",
            "map-00000000000000ab",
        ] {
            assert_eq!(layer_of(name), None, "{name}");
        }
    }
}
