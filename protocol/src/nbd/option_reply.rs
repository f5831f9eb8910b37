//! What a server says to the options of the negotiation.
//!
//! Each option is answered with one or several [`OptionReply`]s, the last of which is `Acknowledged` or `Error`.
//! `ExportName` alone has a reply of another form, [`export_name_reply`].

use super::{Malformed, Reader, message, put_counted_text, wire_length};

/// The start of each reply to an option (section "Option haggling").
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// The length of an option reply's header, in bytes.
pub const OPTION_REPLY_HEADER_BYTES: usize = 20;
/// The padding after the reply to `NBD_OPT_EXPORT_NAME` which `NO_ZEROES` saves, in bytes.
const EXPORT_NAME_PADDING_BYTES: usize = 124;

/// The numbers of the kinds of information about an export (`NBD_OPT_INFO`).
pub mod info {
    /// `NBD_INFO_EXPORT`
    pub const EXPORT: u16 = 0;
    /// `NBD_INFO_NAME`
    pub const NAME: u16 = 1;
    /// `NBD_INFO_DESCRIPTION`
    pub const DESCRIPTION: u16 = 2;
    /// `NBD_INFO_BLOCK_SIZE`
    pub const BLOCK_SIZE: u16 = 3;
}

/// The numbers of the replies that are not errors (section "Option reply types").
mod reply {
    pub const ACKNOWLEDGED: u32 = 1;
    pub const SERVER: u32 = 2;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const ERROR_BIT: u32 = 1 << 31;
}

/// What an export can do (section "Transmission flags").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportFlags(pub u16);

impl ExportFlags {
    /// `NBD_FLAG_HAS_FLAGS`, which is always set.
    pub const HAS_FLAGS: Self = Self(1);
    /// `NBD_FLAG_READ_ONLY`
    pub const READ_ONLY: Self = Self(1 << 1);
    /// `NBD_FLAG_SEND_FLUSH`
    pub const FLUSH: Self = Self(1 << 2);
    /// `NBD_FLAG_SEND_FUA`
    pub const FUA: Self = Self(1 << 3);
    /// `NBD_FLAG_SEND_TRIM`
    pub const TRIM: Self = Self(1 << 5);
    /// `NBD_FLAG_SEND_WRITE_ZEROES`
    pub const WRITE_ZEROES: Self = Self(1 << 6);
    /// `NBD_FLAG_SEND_DF`: a read may ask for its data in one piece. Only with structured replies.
    pub const DONT_FRAGMENT: Self = Self(1 << 7);
    /// `NBD_FLAG_CAN_MULTI_CONN`: a flush on one connection covers the replies given on all.
    pub const MULTIPLE_CONNECTIONS: Self = Self(1 << 8);
    /// `NBD_FLAG_SEND_CACHE`
    pub const CACHE: Self = Self(1 << 10);

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

/// Size and abilities of an export.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExportSummary {
    /// The size in bytes.
    pub size_bytes: u64,
    /// What it can do.
    pub flags: ExportFlags,
}

/// The reply to `ExportName`, the only one without a header.
#[must_use]
pub fn export_name_reply(export: ExportSummary, no_zeroes: bool) -> Vec<u8> {
    let mut reply = message!(10; export.size_bytes, export.flags.0).to_vec();
    if !no_zeroes {
        reply.resize(reply.len() + EXPORT_NAME_PADDING_BYTES, 0);
    }
    reply
}

/// What stands before the data of a reply to an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option that is replied to.
    pub option: u32,
    /// The reply's kind.
    pub kind: u32,
    /// How many bytes of data follow.
    pub length: u32,
}

impl OptionReplyHeader {
    /// Reads the header.
    ///
    /// # Errors
    /// [`Malformed::Magic`].
    pub fn parse(bytes: &[u8; OPTION_REPLY_HEADER_BYTES]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        reader.magic(OPTION_REPLY_MAGIC)?;
        Ok(Self { option: reader.u32()?, kind: reader.u32()?, length: reader.u32()? })
    }

    fn encode(self) -> [u8; OPTION_REPLY_HEADER_BYTES] {
        message!(OPTION_REPLY_HEADER_BYTES; OPTION_REPLY_MAGIC, self.option, self.kind, self.length)
    }
}

/// A server's reply to an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OptionReply {
    /// Granted, or the end of several replies.
    Acknowledged,
    /// The name of an export.
    Server(String),
    /// Something about an export.
    Info(Info),
    /// A kind of block status.
    MetaContext {
        /// What replies name it by; without meaning in an answer to `ListMetaContext`.
        id: u32,
        /// Its name, `NAMESPACE:LEAF`.
        name: String,
    },
    /// Refused.
    Error {
        /// Why.
        reason: Refusal,
        /// The same for people; may be empty.
        message: String,
    },
}

/// Something about an export.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Info {
    /// Its size and abilities.
    Export(ExportSummary),
    /// Its name.
    Name(String),
    /// What it is, for people.
    Description(String),
    /// Which lengths and offsets it takes, in bytes.
    BlockSize {
        /// All lengths and offsets must be multiples of this.
        minimum: u32,
        /// Multiples of this are served best.
        preferred: u32,
        /// The longest payload.
        maximum: u32,
    },
}

/// Why an option is refused (section "Option reply types").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// `NBD_REP_ERR_UNSUP`: the server does not know or have it.
    Unsupported,
    /// `NBD_REP_ERR_POLICY`: the server was told not to.
    Policy,
    /// `NBD_REP_ERR_INVALID`: malformed, or not possible at this point.
    Invalid,
    /// `NBD_REP_ERR_PLATFORM`
    Platform,
    /// `NBD_REP_ERR_TLS_REQD`
    TlsRequired,
    /// `NBD_REP_ERR_UNKNOWN`: no export has the name.
    UnknownExport,
    /// `NBD_REP_ERR_SHUTDOWN`
    ShuttingDown,
    /// `NBD_REP_ERR_BLOCK_SIZE_REQD`
    BlockSizeRequired,
    /// `NBD_REP_ERR_TOO_BIG`
    TooBig,
}

impl Refusal {
    const ALL: [Self; 9] = [
        Self::Unsupported,
        Self::Policy,
        Self::Invalid,
        Self::Platform,
        Self::TlsRequired,
        Self::UnknownExport,
        Self::ShuttingDown,
        Self::BlockSizeRequired,
        Self::TooBig,
    ];

    fn kind(self) -> u32 {
        let number = match self {
            Self::Unsupported => 1,
            Self::Policy => 2,
            Self::Invalid => 3,
            Self::Platform => 4,
            Self::TlsRequired => 5,
            Self::UnknownExport => 6,
            Self::ShuttingDown => 7,
            Self::BlockSizeRequired => 8,
            Self::TooBig => 9,
        };
        reply::ERROR_BIT | number
    }

    fn of_kind(kind: u32) -> Result<Self, Malformed> {
        Self::ALL.into_iter().find(|refusal| refusal.kind() == kind).ok_or(Malformed::UnknownKind(kind))
    }
}

impl OptionReply {
    /// Appends the reply to `option`, header included.
    pub fn encode(&self, option: u32, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        let kind = match self {
            Self::Acknowledged => reply::ACKNOWLEDGED,
            Self::Server(name) => {
                put_counted_text(name, &mut data);
                reply::SERVER
            }
            Self::Info(info) => {
                info.encode(&mut data);
                reply::INFO
            }
            Self::MetaContext { id, name } => {
                data.extend_from_slice(&id.to_be_bytes());
                data.extend_from_slice(name.as_bytes());
                reply::META_CONTEXT
            }
            Self::Error { reason, message } => {
                data.extend_from_slice(message.as_bytes());
                reason.kind()
            }
        };
        let header = OptionReplyHeader { option, kind, length: wire_length(data.len()) };
        out.extend_from_slice(&header.encode());
        out.extend_from_slice(&data);
    }

    /// Reads the data of a reply of this kind, as a client does.
    ///
    /// # Errors
    /// [`Malformed`].
    pub fn parse(kind: u32, data: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(data);
        let parsed = match kind {
            reply::ACKNOWLEDGED => Self::Acknowledged,
            reply::SERVER => {
                let name = reader.counted_text()?;
                reader.remaining_text()?;
                Self::Server(name)
            }
            reply::INFO => Self::Info(Info::parse(&mut reader)?),
            reply::META_CONTEXT => Self::MetaContext { id: reader.u32()?, name: reader.remaining_text()? },
            error => Self::Error { reason: Refusal::of_kind(error)?, message: reader.remaining_text()? },
        };
        reader.end()?;
        Ok(parsed)
    }
}

impl Info {
    fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Export(export) => {
                out.extend_from_slice(&message!(12; info::EXPORT, export.size_bytes, export.flags.0));
            }
            Self::Name(name) => {
                out.extend_from_slice(&info::NAME.to_be_bytes());
                out.extend_from_slice(name.as_bytes());
            }
            Self::Description(description) => {
                out.extend_from_slice(&info::DESCRIPTION.to_be_bytes());
                out.extend_from_slice(description.as_bytes());
            }
            Self::BlockSize { minimum, preferred, maximum } => {
                out.extend_from_slice(&message!(14; info::BLOCK_SIZE, minimum, preferred, maximum));
            }
        }
    }

    fn parse(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        Ok(match reader.u16()? {
            info::EXPORT => {
                Self::Export(ExportSummary { size_bytes: reader.u64()?, flags: ExportFlags(reader.u16()?) })
            }
            info::NAME => Self::Name(reader.remaining_text()?),
            info::DESCRIPTION => Self::Description(reader.remaining_text()?),
            info::BLOCK_SIZE => {
                Self::BlockSize { minimum: reader.u32()?, preferred: reader.u32()?, maximum: reader.u32()? }
            }
            other => return Err(Malformed::UnknownKind(u32::from(other))),
        })
    }
}
