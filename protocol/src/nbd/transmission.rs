//! Transmission: requests and replies once an export is open.
//!
//! A client sends [`RequestHeader`]s, a write's payload right behind its header. A reply names its request by the
//! client's cookie and comes in any order: as a [`SimpleReply`] (a read's data right behind it), or, once structured
//! replies were negotiated, as chunks, of which the last says so. One chunk is enough for each answer here: [`data_head`],
//! [`status_head`] and [`error_chunk`] begin it, and the bytes they announce follow from wherever they lie.

use super::{Malformed, Reader, message};

/// `NBD_REQUEST_MAGIC` (section "Request message").
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
/// `NBD_SIMPLE_REPLY_MAGIC` (section "Simple reply message").
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
/// `NBD_STRUCTURED_REPLY_MAGIC` (section "Structured reply chunk message").
pub const CHUNK_MAGIC: u32 = 0x668e_33ef;

/// The length of a request's header, in bytes.
pub const REQUEST_BYTES: usize = 28;
/// The length of a simple reply, in bytes, without the data of a read.
pub const SIMPLE_REPLY_BYTES: usize = 16;
/// The length of a chunk's header, in bytes.
pub const CHUNK_HEADER_BYTES: usize = 20;
/// The length of what stands before the bytes of a data chunk.
pub const DATA_HEAD_BYTES: usize = CHUNK_HEADER_BYTES + 8;
/// The length of what stands before the descriptors of a block status chunk.
pub const STATUS_HEAD_BYTES: usize = CHUNK_HEADER_BYTES + 4;
/// The length of an error chunk without a message.
pub const ERROR_CHUNK_BYTES: usize = CHUNK_HEADER_BYTES + 6;
/// The length of one descriptor of a block status chunk.
pub const DESCRIPTOR_BYTES: usize = 8;

/// What is asked (section "Request types").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandKind {
    /// `NBD_CMD_READ`
    Read,
    /// `NBD_CMD_WRITE`; its payload follows the header.
    Write,
    /// `NBD_CMD_DISC`; has no reply.
    Disconnect,
    /// `NBD_CMD_FLUSH`
    Flush,
    /// `NBD_CMD_TRIM`
    Trim,
    /// `NBD_CMD_CACHE`
    Cache,
    /// `NBD_CMD_WRITE_ZEROES`
    WriteZeroes,
    /// `NBD_CMD_BLOCK_STATUS`
    BlockStatus,
    /// Another number.
    Unknown(u16),
}

impl CommandKind {
    fn from_wire(number: u16) -> Self {
        match number {
            0 => Self::Read,
            1 => Self::Write,
            2 => Self::Disconnect,
            3 => Self::Flush,
            4 => Self::Trim,
            5 => Self::Cache,
            6 => Self::WriteZeroes,
            7 => Self::BlockStatus,
            other => Self::Unknown(other),
        }
    }

    fn to_wire(self) -> u16 {
        match self {
            Self::Read => 0,
            Self::Write => 1,
            Self::Disconnect => 2,
            Self::Flush => 3,
            Self::Trim => 4,
            Self::Cache => 5,
            Self::WriteZeroes => 6,
            Self::BlockStatus => 7,
            Self::Unknown(number) => number,
        }
    }
}

/// How it is to be done (section "Command flags").
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct CommandFlags(pub u16);

impl CommandFlags {
    /// No flag.
    pub const NONE: Self = Self(0);
    /// `NBD_CMD_FLAG_FUA`: durable before the reply.
    pub const FUA: Self = Self(1);
    /// `NBD_CMD_FLAG_NO_HOLE`: zeroes must not give space back.
    pub const NO_HOLE: Self = Self(1 << 1);
    /// `NBD_CMD_FLAG_DF`: a read's data in one chunk.
    pub const DONT_FRAGMENT: Self = Self(1 << 2);
    /// `NBD_CMD_FLAG_REQ_ONE`: one descriptor is enough.
    pub const ONE_DESCRIPTOR: Self = Self(1 << 3);
    /// `NBD_CMD_FLAG_FAST_ZERO`: zero faster than by writing, or not at all.
    pub const FAST_ZERO: Self = Self(1 << 4);

    /// These flags and those.
    #[must_use]
    pub fn with(self, more: Self) -> Self {
        Self(self.0 | more.0)
    }

    /// Whether all of `flags` are set.
    #[must_use]
    pub fn contains(self, flags: Self) -> bool {
        self.0 & flags.0 == flags.0
    }
}

/// A request without its payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RequestHeader {
    /// How.
    pub flags: CommandFlags,
    /// What.
    pub kind: CommandKind,
    /// The client's name for the request; replies carry it.
    pub cookie: u64,
    /// The first byte concerned.
    pub offset: u64,
    /// How many bytes. Not checked: any client can claim 4 GiB.
    pub length: u32,
}

impl RequestHeader {
    /// Reads the header.
    ///
    /// # Errors
    /// [`Malformed::Magic`], after which nothing on the connection makes sense.
    pub fn parse(bytes: &[u8; REQUEST_BYTES]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        reader.magic_u32(REQUEST_MAGIC)?;
        Ok(Self {
            flags: CommandFlags(reader.u16()?),
            kind: CommandKind::from_wire(reader.u16()?),
            cookie: reader.u64()?,
            offset: reader.u64()?,
            length: reader.u32()?,
        })
    }

    /// The header as bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; REQUEST_BYTES] {
        message!(
            REQUEST_BYTES;
            REQUEST_MAGIC, self.flags.0, self.kind.to_wire(), self.cookie, self.offset, self.length
        )
    }
}

/// Why a request failed (section "Error values").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// `NBD_EPERM`
    NotPermitted,
    /// `NBD_EIO`
    Io,
    /// `NBD_ENOMEM`
    NoMemory,
    /// `NBD_EINVAL`
    Invalid,
    /// `NBD_ENOSPC`
    NoSpace,
    /// `NBD_EOVERFLOW`
    Overflow,
    /// `NBD_ENOTSUP`
    NotSupported,
    /// `NBD_ESHUTDOWN`
    ShuttingDown,
}

impl Failure {
    const ALL: [Self; 8] = [
        Self::NotPermitted,
        Self::Io,
        Self::NoMemory,
        Self::Invalid,
        Self::NoSpace,
        Self::Overflow,
        Self::NotSupported,
        Self::ShuttingDown,
    ];

    fn to_wire(self) -> u32 {
        match self {
            Self::NotPermitted => 1,
            Self::Io => 5,
            Self::NoMemory => 12,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::Overflow => 75,
            Self::NotSupported => 95,
            Self::ShuttingDown => 108,
        }
    }

    fn from_wire(number: u32) -> Result<Self, Malformed> {
        Self::ALL
            .into_iter()
            .find(|failure| failure.to_wire() == number)
            .ok_or(Malformed::UnknownKind(number))
    }
}

/// A reply that is not structured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SimpleReply {
    /// Why the request failed, if it did. The data of a read follows only where it did not.
    pub failure: Option<Failure>,
    /// The request's cookie.
    pub cookie: u64,
}

impl SimpleReply {
    /// The reply as bytes.
    #[must_use]
    pub fn encode(self) -> [u8; SIMPLE_REPLY_BYTES] {
        let error = self.failure.map_or(0, Failure::to_wire);
        message!(SIMPLE_REPLY_BYTES; SIMPLE_REPLY_MAGIC, error, self.cookie)
    }

    /// Reads a reply, as a client does.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(bytes: &[u8; SIMPLE_REPLY_BYTES]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        reader.magic_u32(SIMPLE_REPLY_MAGIC)?;
        let failure = match reader.u32()? {
            0 => None,
            error => Some(Failure::from_wire(error)?),
        };
        Ok(Self { failure, cookie: reader.u64()? })
    }
}

/// The numbers of the kinds of chunks (section "Structured reply types").
mod chunk {
    pub const NONE: u16 = 0;
    pub const OFFSET_DATA: u16 = 1;
    pub const OFFSET_HOLE: u16 = 2;
    pub const BLOCK_STATUS: u16 = 5;
    pub const ERROR: u16 = (1 << 15) + 1;
    pub const ERROR_OFFSET: u16 = (1 << 15) + 2;
    /// `NBD_REPLY_FLAG_DONE`
    pub const DONE: u16 = 1;
}

/// What stands before the only chunk of a successful read: `length` bytes from `offset` on follow.
#[must_use]
pub fn data_head(cookie: u64, offset: u64, length: u32) -> [u8; DATA_HEAD_BYTES] {
    let payload = length.checked_add(8).expect("a read is far shorter than 4 GiB");
    message!(DATA_HEAD_BYTES; CHUNK_MAGIC, chunk::DONE, chunk::OFFSET_DATA, cookie, payload, offset)
}

/// What stands before the only chunk of a block status reply: so many descriptors for the context `context` follow.
#[must_use]
pub fn status_head(cookie: u64, context: u32, descriptors: u32) -> [u8; STATUS_HEAD_BYTES] {
    let payload = descriptors.checked_mul(8).and_then(|bytes| bytes.checked_add(4));
    let payload = payload.expect("a block status reply is far shorter than 4 GiB");
    message!(STATUS_HEAD_BYTES; CHUNK_MAGIC, chunk::DONE, chunk::BLOCK_STATUS, cookie, payload, context)
}

/// The only chunk of a request that failed, without a message for people.
#[must_use]
pub fn error_chunk(cookie: u64, failure: Failure) -> [u8; ERROR_CHUNK_BYTES] {
    message!(
        ERROR_CHUNK_BYTES;
        CHUNK_MAGIC, chunk::DONE, chunk::ERROR, cookie, 6u32, failure.to_wire(), 0u16
    )
}

/// One part of a block status reply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// How many bytes it is about.
    pub length: u32,
    /// What is said about them, in the context's own terms.
    pub flags: u32,
}

impl Descriptor {
    /// In `base:allocation`: `NBD_STATE_HOLE`, no space is taken.
    pub const HOLE: u32 = 1;
    /// In `base:allocation`: `NBD_STATE_ZERO`, reads as zeroes.
    pub const ZERO: u32 = 2;

    /// The descriptor as bytes.
    #[must_use]
    pub fn encode(self) -> [u8; DESCRIPTOR_BYTES] {
        message!(DESCRIPTOR_BYTES; self.length, self.flags)
    }
}

/// What stands before a chunk's payload.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkHeader {
    /// No further chunk answers this request.
    pub done: bool,
    /// The chunk's kind.
    pub kind: u16,
    /// The request's cookie.
    pub cookie: u64,
    /// How many bytes follow.
    pub length: u32,
}

impl ChunkHeader {
    /// Reads the header, as a client does.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(bytes: &[u8; CHUNK_HEADER_BYTES]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        reader.magic_u32(CHUNK_MAGIC)?;
        let flags = reader.u16()?;
        if flags & !chunk::DONE != 0 {
            return Err(Malformed::UnknownFlags(u32::from(flags)));
        }
        Ok(Self { done: flags != 0, kind: reader.u16()?, cookie: reader.u64()?, length: reader.u32()? })
    }
}

/// A chunk as a client understands it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Chunk {
    /// Nothing: the request succeeded.
    None,
    /// Bytes of a read.
    Data {
        /// Where they begin.
        offset: u64,
        /// The bytes.
        data: Vec<u8>,
    },
    /// Zeroes of a read.
    Hole {
        /// Where they begin.
        offset: u64,
        /// How many.
        length: u32,
    },
    /// Block status in one context.
    Status {
        /// The context's number from the negotiation.
        context: u32,
        /// The parts, in order.
        descriptors: Vec<Descriptor>,
    },
    /// The request failed.
    Error {
        /// Why.
        failure: Failure,
        /// The same for people; may be empty.
        message: String,
    },
}

impl Chunk {
    /// Reads the payload of a chunk of this kind.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(kind: u16, payload: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(payload);
        let parsed = match kind {
            chunk::NONE => Self::None,
            chunk::OFFSET_DATA => {
                let offset = reader.u64()?;
                let data = reader.bytes(payload.len() - 8)?.to_vec();
                Self::Data { offset, data }
            }
            chunk::OFFSET_HOLE => Self::Hole { offset: reader.u64()?, length: reader.u32()? },
            chunk::BLOCK_STATUS => {
                let context = reader.u32()?;
                let mut descriptors = Vec::new();
                while !reader.rest.is_empty() {
                    descriptors.push(Descriptor { length: reader.u32()?, flags: reader.u32()? });
                }
                Self::Status { context, descriptors }
            }
            chunk::ERROR | chunk::ERROR_OFFSET => {
                let failure = Failure::from_wire(reader.u32()?)?;
                let length = usize::from(reader.u16()?);
                let message = reader.text(length)?;
                if kind == chunk::ERROR_OFFSET {
                    reader.u64()?;
                }
                Self::Error { failure, message }
            }
            other => return Err(Malformed::UnknownKind(u32::from(other))),
        };
        reader.end()?;
        Ok(parsed)
    }
}
