//! The bytes of the table, version 1. Integers are in the host's byte order: the memory never leaves the host.
//!
//! | from | what |
//! |---|---|
//! | 0 | [`Header`] |
//! | 64 | what was agreed on with the kernel: minor version (0: nothing yet), features, the most that a write carries; 4 bytes each |
//! | 4 KiB | 512 slots of 128 bytes: the head of a request (80 bytes, as the kernel writes it), its sequence number (8), stage (4) and the place of its payload (4) |
//! | 68 KiB | 1024 small blocks of 128 KiB |
//! | then | 160 large blocks of 1 MiB |
//!
//! Blocks that were never used take no memory.

use super::blocks::Class;
use super::{Identity, TakeOverError};
use crate::device::loopback::kernel::MAX_TRANSFER_BYTES;
use blockmirror_protocol::units::SECTOR_BYTES;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

pub(super) const VERSION: u32 = 1;
const MAGIC: [u8; 8] = *b"bm-table";

/// How many requests there can be. The kernel sends at most 256 asynchronous ones, and the loop driver has 128 under way.
pub const SLOTS: usize = 512;
pub(super) const SMALL_BLOCKS: usize = 1024;
pub(super) const LARGE_BLOCKS: usize = 160;
pub(super) const SMALL_BYTES: usize = 128 << 10;
pub(super) const LARGE_BYTES: usize = MAX_TRANSFER_BYTES;

pub(super) const SESSION_AT: usize = 64;
const PAGE_BYTES: usize = 4096;
pub(super) const SLOTS_AT: usize = PAGE_BYTES;
pub(super) const SLOT_BYTES: usize = 128;
pub(super) const HEAD_BYTES: usize = 80;
pub(super) const SEQUENCE_AT: usize = HEAD_BYTES;
pub(super) const STAGE_AT: usize = SEQUENCE_AT + 8;
pub(super) const PLACE_AT: usize = STAGE_AT + 4;
const SMALL_AT: usize = SLOTS_AT + SLOTS * SLOT_BYTES;
const LARGE_AT: usize = SMALL_AT + SMALL_BLOCKS * SMALL_BYTES;
pub(super) const TABLE_BYTES: usize = LARGE_AT + LARGE_BLOCKS * LARGE_BYTES;

const _: () = {
    assert!(size_of::<Header>() == SESSION_AT);
    assert!(PLACE_AT + 4 <= SLOT_BYTES);
    assert!(SMALL_AT.is_multiple_of(PAGE_BYTES) && LARGE_AT.is_multiple_of(PAGE_BYTES));
};

/// What the table begins with. Written once.
#[derive(Clone, Copy, Debug, FromBytes, IntoBytes, KnownLayout, Immutable)]
#[repr(C)]
pub(super) struct Header {
    magic: [u8; 8],
    version: u32,
    slots: u32,
    small_blocks: u32,
    large_blocks: u32,
    volume: [u8; 16],
    size_bytes: u64,
    sector_bytes: u32,
    read_only: u32,
    /// The beginning of the BLAKE3 digest of what is before it.
    check: [u8; 8],
}

impl Header {
    pub(super) fn new(identity: Identity) -> Self {
        let mut header = Self {
            magic: MAGIC,
            version: VERSION,
            slots: SLOTS as u32,
            small_blocks: SMALL_BLOCKS as u32,
            large_blocks: LARGE_BLOCKS as u32,
            volume: identity.volume,
            size_bytes: identity.size_bytes,
            sector_bytes: SECTOR_BYTES as u32,
            read_only: identity.read_only.into(),
            check: [0; 8],
        };
        header.check = header.digest();
        header
    }

    fn digest(&self) -> [u8; 8] {
        let bytes = self.as_bytes();
        let digest = blake3::hash(&bytes[..bytes.len() - 8]);
        *digest.as_bytes().first_chunk().expect("a digest is longer")
    }

    /// Whether this version reads the table.
    pub(super) fn check_version(&self) -> Result<(), TakeOverError> {
        if self.magic != MAGIC {
            return Err(TakeOverError::Foreign);
        }
        if self.version > VERSION {
            return Err(TakeOverError::Newer { found: self.version, known: VERSION });
        }
        Ok(())
    }

    /// Whether this version reads the table, and it is that of this device.
    pub(super) fn check(&self, identity: Identity) -> Result<(), TakeOverError> {
        self.check_version()?;
        let wanted = Self::new(identity);
        let counts = |header: &Self| {
            (header.version, header.slots, header.small_blocks, header.large_blocks, header.sector_bytes)
        };
        if self.check != self.digest() || counts(self) != counts(&wanted) {
            return Err(TakeOverError::Damaged("its header"));
        }
        if self.volume != wanted.volume {
            return Err(TakeOverError::Other("it is another volume's"));
        }
        if self.size_bytes != wanted.size_bytes {
            return Err(TakeOverError::Other("it is of another size"));
        }
        if self.read_only != wanted.read_only {
            return Err(TakeOverError::Other(
                "it is writable where the volume is not, or the other way round",
            ));
        }
        Ok(())
    }
}

/// How far a request in a slot is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stage {
    /// It is not answered.
    Waiting,
    /// It may be answered.
    Answering,
    /// It is answered, and an older write that overlaps it is in the table.
    Answered,
}

impl Stage {
    pub(super) fn of(number: u32) -> Option<Self> {
        [Self::Waiting, Self::Answering, Self::Answered].get(number as usize).copied()
    }
}

/// Where a payload is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Place {
    /// There is none.
    Nowhere,
    /// In a block.
    In(Class, usize),
}

/// Added to the index of a large block.
const LARGE_FLAG: u32 = 1 << 16;

impl Place {
    pub(super) fn of(number: u32) -> Option<Self> {
        if number == 0 {
            return Some(Self::Nowhere);
        }
        let class = if number >= LARGE_FLAG { Class::Large } else { Class::Small };
        let index = if number >= LARGE_FLAG { number - LARGE_FLAG } else { number - 1 } as usize;
        (index < class.count()).then_some(Self::In(class, index))
    }

    pub(super) fn number(self) -> u32 {
        match self {
            Self::Nowhere => 0,
            Self::In(Class::Small, index) => index as u32 + 1,
            Self::In(Class::Large, index) => index as u32 + LARGE_FLAG,
        }
    }

    pub(super) fn block(self) -> Option<(Class, usize)> {
        match self {
            Self::Nowhere => None,
            Self::In(class, index) => Some((class, index)),
        }
    }
}

/// Where a block begins in the table.
pub(super) fn block_at(class: Class, index: usize) -> usize {
    let start = match class {
        Class::Small => SMALL_AT,
        Class::Large => LARGE_AT,
    };
    start + index * class.bytes()
}
