//! Fixed newstyle negotiation: from the first byte until an export is open.
//!
//! The server greets ([`greeting`]); the client answers with its [`ClientFlags`] and then sends options, each an
//! [`OptionHeader`] and its data, until `Go` or `ExportName` opens the export. What the server says to an option is
//! in [`super::option_reply`].

use super::{Malformed, Reader, message, put_counted_text, wire_length};

/// `NBDMAGIC`, the first eight bytes on a connection (section "Newstyle negotiation").
pub const GREETING_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// `IHAVEOPT`, the start of the newstyle greeting's second half and of each option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;

/// The length of the greeting, in bytes.
pub const GREETING_BYTES: usize = 18;
/// The length of the client's flags, in bytes.
pub const CLIENT_FLAGS_BYTES: usize = 4;
/// The length of an option's header, in bytes.
pub const OPTION_HEADER_BYTES: usize = 16;

/// `NBD_FLAG_FIXED_NEWSTYLE` and `NBD_FLAG_C_FIXED_NEWSTYLE` (section "Flag fields").
const FIXED_NEWSTYLE: u32 = 1;
/// `NBD_FLAG_NO_ZEROES` and `NBD_FLAG_C_NO_ZEROES`.
const NO_ZEROES: u32 = 2;

/// The numbers of the options that have a meaning here (section "Option types").
pub mod option {
    /// `NBD_OPT_EXPORT_NAME`
    pub const EXPORT_NAME: u32 = 1;
    /// `NBD_OPT_ABORT`
    pub const ABORT: u32 = 2;
    /// `NBD_OPT_LIST`
    pub const LIST: u32 = 3;
    /// `NBD_OPT_STARTTLS`
    pub const START_TLS: u32 = 5;
    /// `NBD_OPT_INFO`
    pub const INFO: u32 = 6;
    /// `NBD_OPT_GO`
    pub const GO: u32 = 7;
    /// `NBD_OPT_STRUCTURED_REPLY`
    pub const STRUCTURED_REPLY: u32 = 8;
    /// `NBD_OPT_LIST_META_CONTEXT`
    pub const LIST_META_CONTEXT: u32 = 9;
    /// `NBD_OPT_SET_META_CONTEXT`
    pub const SET_META_CONTEXT: u32 = 10;
}

/// What a server says first: both magic numbers, fixed newstyle, and that the client may ask for no zeroes.
#[must_use]
pub fn greeting() -> [u8; GREETING_BYTES] {
    message!(GREETING_BYTES; GREETING_MAGIC, OPTION_MAGIC, (FIXED_NEWSTYLE | NO_ZEROES) as u16)
}

/// What the client made of the greeting.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientFlags {
    /// The client understands replies to options.
    pub fixed_newstyle: bool,
    /// The padding after the reply to `ExportName` is left out.
    pub no_zeroes: bool,
}

impl ClientFlags {
    /// Reads the flags.
    ///
    /// # Errors
    /// [`Malformed::UnknownFlags`], after which the connection must be closed.
    pub fn parse(bytes: [u8; CLIENT_FLAGS_BYTES]) -> Result<Self, Malformed> {
        let flags = u32::from_be_bytes(bytes);
        if flags & !(FIXED_NEWSTYLE | NO_ZEROES) != 0 {
            return Err(Malformed::UnknownFlags(flags));
        }
        Ok(Self { fixed_newstyle: flags & FIXED_NEWSTYLE != 0, no_zeroes: flags & NO_ZEROES != 0 })
    }

    /// The flags as bytes.
    #[must_use]
    pub fn encode(self) -> [u8; CLIENT_FLAGS_BYTES] {
        let fixed_newstyle = if self.fixed_newstyle { FIXED_NEWSTYLE } else { 0 };
        let no_zeroes = if self.no_zeroes { NO_ZEROES } else { 0 };
        (fixed_newstyle | no_zeroes).to_be_bytes()
    }
}

/// What stands before an option's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option; see [`option`].
    pub option: u32,
    /// How many bytes of data follow. Not checked: any client can claim 4 GiB.
    pub length: u32,
}

impl OptionHeader {
    /// Reads the header.
    ///
    /// # Errors
    /// [`Malformed::Magic`], after which nothing on the connection makes sense.
    pub fn parse(bytes: &[u8; OPTION_HEADER_BYTES]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(bytes);
        reader.magic(OPTION_MAGIC)?;
        Ok(Self { option: reader.u32()?, length: reader.u32()? })
    }

    /// The header as bytes.
    #[must_use]
    pub fn encode(self) -> [u8; OPTION_HEADER_BYTES] {
        message!(OPTION_HEADER_BYTES; OPTION_MAGIC, self.option, self.length)
    }
}

/// What a client asks during negotiation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ClientOption {
    /// Open the export of this name, or close the connection.
    ExportName(String),
    /// End the connection.
    Abort,
    /// Name the exports.
    List,
    /// Go on encrypted.
    StartTls,
    /// Describe an export.
    Info(ExportQuery),
    /// Describe an export and open it.
    Go(ExportQuery),
    /// Use structured replies.
    StructuredReply,
    /// Which kinds of block status are there?
    ListMetaContext(ContextQuery),
    /// Use these kinds of block status.
    SetMetaContext(ContextQuery),
    /// An option that this server has never heard of.
    Unknown(u32),
}

/// The data of `Info` and `Go`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExportQuery {
    /// The export; empty for the default one.
    pub name: String,
    /// The kinds of information that the client wants; see [`super::option_reply::info`].
    pub kinds: Vec<u16>,
}

/// The data of `ListMetaContext` and `SetMetaContext`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ContextQuery {
    /// The export; empty for the default one.
    pub name: String,
    /// What the client looks for, each `NAMESPACE:LEAF`.
    pub queries: Vec<String>,
}

impl ClientOption {
    /// Reads the data of the option with this number.
    ///
    /// # Errors
    /// [`Malformed`], which deserves `NBD_REP_ERR_INVALID`.
    pub fn parse(option: u32, data: &[u8]) -> Result<Self, Malformed> {
        let mut reader = Reader::new(data);
        let parsed = match option {
            option::EXPORT_NAME => Self::ExportName(reader.remaining_text()?),
            option::ABORT => return Ok(Self::Abort),
            option::LIST => Self::List,
            option::START_TLS => Self::StartTls,
            option::INFO => Self::Info(ExportQuery::parse(&mut reader)?),
            option::GO => Self::Go(ExportQuery::parse(&mut reader)?),
            option::STRUCTURED_REPLY => Self::StructuredReply,
            option::LIST_META_CONTEXT => Self::ListMetaContext(ContextQuery::parse(&mut reader)?),
            option::SET_META_CONTEXT => Self::SetMetaContext(ContextQuery::parse(&mut reader)?),
            other => return Ok(Self::Unknown(other)),
        };
        reader.end()?;
        Ok(parsed)
    }

    /// The option's number.
    #[must_use]
    pub fn number(&self) -> u32 {
        match self {
            Self::ExportName(_) => option::EXPORT_NAME,
            Self::Abort => option::ABORT,
            Self::List => option::LIST,
            Self::StartTls => option::START_TLS,
            Self::Info(_) => option::INFO,
            Self::Go(_) => option::GO,
            Self::StructuredReply => option::STRUCTURED_REPLY,
            Self::ListMetaContext(_) => option::LIST_META_CONTEXT,
            Self::SetMetaContext(_) => option::SET_META_CONTEXT,
            Self::Unknown(number) => *number,
        }
    }

    /// The option as a client sends it, header included.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut data = Vec::new();
        match self {
            Self::ExportName(name) => data.extend_from_slice(name.as_bytes()),
            Self::Info(query) | Self::Go(query) => query.encode(&mut data),
            Self::ListMetaContext(query) | Self::SetMetaContext(query) => query.encode(&mut data),
            Self::Abort | Self::List | Self::StartTls | Self::StructuredReply | Self::Unknown(_) => {}
        }
        let header = OptionHeader { option: self.number(), length: wire_length(data.len()) };
        [header.encode().as_slice(), &data].concat()
    }
}

impl ExportQuery {
    fn parse(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let name = reader.counted_text()?;
        let count = reader.u16()?;
        let kinds = (0..count).map(|_| reader.u16()).collect::<Result<_, _>>()?;
        Ok(Self { name, kinds })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        put_counted_text(&self.name, out);
        let count = u16::try_from(self.kinds.len()).expect("a client asks for few kinds of information");
        out.extend_from_slice(&count.to_be_bytes());
        self.kinds.iter().for_each(|kind| out.extend_from_slice(&kind.to_be_bytes()));
    }
}

impl ContextQuery {
    /// Reads name and queries. The queries are collected as they come: a count alone reserves no memory.
    fn parse(reader: &mut Reader<'_>) -> Result<Self, Malformed> {
        let name = reader.counted_text()?;
        let count = reader.u32()?;
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(reader.counted_text()?);
        }
        Ok(Self { name, queries })
    }

    fn encode(&self, out: &mut Vec<u8>) {
        put_counted_text(&self.name, out);
        out.extend_from_slice(&wire_length(self.queries.len()).to_be_bytes());
        self.queries.iter().for_each(|query| put_counted_text(query, out));
    }
}
