//! The units that the rules are stated in.
//!
//! Every index, count and identity is a type of its own, so that a block number cannot be passed for an extent
//! number or an epoch for a sequence number. Byte quantities stay plain `u64`, named with the unit last.

use std::fmt;
use std::time::Duration;

/// The smallest unit of addressing anywhere in Blockmirror, in bytes.
pub const SECTOR_BYTES: u64 = 512;

/// The size of an extent, the unit of the activity log, in bytes.
pub const EXTENT_BYTES: u64 = 4 << 20;

macro_rules! number {
    ($(#[$doc:meta])* $name:ident($inner:ty) $(, below $limit:expr)?) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, bincode::Encode)]
        pub struct $name(pub $inner);

        impl<Context> bincode::Decode<Context> for $name {
            fn decode<D: bincode::de::Decoder>(decoder: &mut D) -> Result<Self, bincode::error::DecodeError> {
                let number = <$inner>::decode(decoder)?;
                $(if number >= $limit {
                    return Err(bincode::error::DecodeError::Other(concat!("no ", stringify!($name), " is so high")));
                })?
                Ok(Self(number))
            }
        }

        bincode::impl_borrow_decode!($name);

        impl $name {
            /// The number after this one.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0 + 1)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self.0)
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

macro_rules! identity {
    ($(#[$doc:meta])* $name:ident, $bytes:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, bincode::Encode, bincode::Decode)]
        pub struct $name(pub [u8; $bytes]);

        impl $name {
            /// Reads the identity from its lower-case hexadecimal form.
            ///
            /// # Errors
            /// [`NotHexadecimal`] when the text has another length or another character.
            pub fn from_hex(text: &str) -> Result<Self, NotHexadecimal> {
                let mut bytes = [0; $bytes];
                if text.len() != 2 * $bytes || !text.is_ascii() {
                    return Err(NotHexadecimal);
                }
                for (byte, pair) in bytes.iter_mut().zip(text.as_bytes().chunks_exact(2)) {
                    let pair = std::str::from_utf8(pair).map_err(|_| NotHexadecimal)?;
                    *byte = u8::from_str_radix(pair, 16).map_err(|_| NotHexadecimal)?;
                }
                Ok(Self(bytes))
            }

            /// Whether no identity was given yet: all bytes are zero.
            #[must_use]
            pub fn is_none(&self) -> bool {
                self.0 == [0; $bytes]
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), self)
            }
        }
    };
}

/// A text that is not the hexadecimal form of an identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not a hexadecimal identity of the right length")]
pub struct NotHexadecimal;

identity!(
    /// The identity of a volume, the same on all its hosts.
    VolumeId,
    16
);
identity!(
    /// One uninterrupted stretch of a volume's history.
    GenerationId,
    16
);
identity!(
    /// One host's copy of a volume, drawn when the host created or joined it. A copy that was thrown away and
    /// joined anew has another identity, so no map that is relative to the old one is used for it.
    CopyId,
    16
);
identity!(
    /// A host, named by the SHA-256 fingerprint of its public key (SubjectPublicKeyInfo, DER).
    HostId,
    32
);

number!(
    /// The writes between two barriers, counted from 1 within a generation. The high bits count the runs of primaries
    /// ([`crate::lineage::first_epoch_after`]); none that another host tells of is in the last run, so that there is a
    /// next one.
    Epoch(u64), below Epoch::LIMIT
);

impl Epoch {
    /// Epochs of other hosts are below this.
    pub const LIMIT: u64 = u64::MAX << Self::RUN_BITS;
    /// How many low bits of the number count within one run of a primary; the rest count the runs.
    pub(crate) const RUN_BITS: u32 = 40;
}

number!(
    /// The place of a write in a volume's one order (W1), counted from 1.
    Sequence(u64)
);
number!(
    /// Names a request of a front end.
    RequestId(u64)
);
number!(
    /// One connection's life between two hosts for a volume; every frame carries it.
    Session(u64)
);
number!(
    /// A live stream within a session; raised when a stream is voided (R1).
    Stream(u32)
);
number!(
    /// A block, the unit of a dirty map.
    Block(u64)
);
number!(
    /// An extent, the unit of the activity log.
    Extent(u32)
);

/// A moment, as time since a start that the shell or the simulation chose. The machines know no clock.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub struct Time(pub Duration);

impl Time {
    /// This moment and so much later.
    #[must_use]
    pub fn after(self, duration: Duration) -> Self {
        Self(self.0 + duration)
    }

    /// How long ago `earlier` was; nothing if it lies ahead.
    #[must_use]
    pub fn since(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// The place of a write, or of an epoch's end, in a volume's history.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
pub struct Position {
    /// The stretch of history that the other two count in.
    pub generation: GenerationId,
    /// The epoch.
    pub epoch: Epoch,
    /// The last write at or before this place.
    pub sequence: Sequence,
}

/// How far a replica is, durably, as its own marker says. It never goes back but where the host was set back (X4).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
pub struct Mark {
    /// The last durable epoch; in a gap, the rollback point.
    pub position: Position,
    /// The last session in which copies became durable.
    pub session: Session,
    /// How many of its copies are, counted from the first without gaps.
    pub copies: u64,
}

/// The size of a block: a power of two from 4 KiB to 1 MiB.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BlockSize {
    shift: u8,
}

/// A block size that is not a power of two from 4 KiB to 1 MiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{0} is not a block size; use a power of two from 4K to 1M")]
pub struct NotABlockSize(pub u64);

impl Default for BlockSize {
    fn default() -> Self {
        Self { shift: 12 }
    }
}

impl BlockSize {
    /// A block size of so many bytes.
    ///
    /// # Errors
    /// [`NotABlockSize`] unless it is a power of two from 4 KiB to 1 MiB.
    pub fn new(bytes: u64) -> Result<Self, NotABlockSize> {
        if !bytes.is_power_of_two() || !(4 << 10..=1 << 20).contains(&bytes) {
            return Err(NotABlockSize(bytes));
        }
        Ok(Self { shift: bytes.trailing_zeros() as u8 })
    }

    /// The size in bytes.
    #[must_use]
    pub fn bytes(self) -> u64 {
        1 << self.shift
    }

    /// The block that holds this byte.
    #[must_use]
    pub fn block_of(self, offset: u64) -> Block {
        Block(offset >> self.shift)
    }

    /// Where a block starts, in bytes.
    #[must_use]
    pub fn offset_of(self, block: Block) -> u64 {
        block.0 << self.shift
    }

    /// How many blocks hold so many bytes.
    #[must_use]
    pub fn blocks_in(self, bytes: u64) -> u64 {
        bytes.div_ceil(self.bytes())
    }
}

impl bincode::Encode for BlockSize {
    fn encode<E: bincode::enc::Encoder>(&self, encoder: &mut E) -> Result<(), bincode::error::EncodeError> {
        self.bytes().encode(encoder)
    }
}

bincode::impl_borrow_decode!(BlockSize);

impl<Context> bincode::Decode<Context> for BlockSize {
    fn decode<D: bincode::de::Decoder>(decoder: &mut D) -> Result<Self, bincode::error::DecodeError> {
        Self::new(u64::decode(decoder)?).map_err(|_| bincode::error::DecodeError::Other("not a block size"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_identity_reads_back_from_its_text() {
        let id = VolumeId(*b"0123456789abcdef");
        assert_eq!(VolumeId::from_hex(&id.to_string()), Ok(id));
        for wrong in ["", "00", "zz313233343536373839616263646566", "é0313233343536373839616263646566"] {
            assert_eq!(VolumeId::from_hex(wrong), Err(NotHexadecimal), "{wrong}");
        }
    }

    #[test]
    fn a_block_size_is_a_power_of_two_between_its_limits() {
        for (bytes, good) in [
            (0, false),
            (512, false),
            (4096, true),
            (4097, false),
            (65536, true),
            (1 << 20, true),
            (2 << 20, false),
        ] {
            assert_eq!(BlockSize::new(bytes).is_ok(), good, "{bytes}");
        }
    }
}
