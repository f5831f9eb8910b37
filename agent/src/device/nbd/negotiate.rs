//! The server's side of the negotiation: from the greeting until the client has opened the export.
//!
//! What to say to an option is decided by [`Negotiation::respond`], which has no socket. The volume is the one export;
//! it has its own name and is also the default export, whose name is empty.
//!
//! Where TLS is required (the protocol's FORCEDTLS), there are two conversations. The first knows no export and agrees on
//! nothing: it hears of no option but to start TLS or to leave ([`ask_for_tls`]). The second is the ordinary one, inside
//! TLS. Nothing is read ahead, so what a client sent behind its wish for TLS is not lost in a buffer: it is taken for the
//! start of the handshake, fails as such, and the connection ends. It is never heard as an option.

use super::connection::Ended;
use super::request::{PAYLOAD_LIMIT_BYTES, REQUEST_UNIT_BYTES};
use crate::device::Geometry;
use blockmirror_protocol::nbd::Malformed;
use blockmirror_protocol::nbd::handshake::{
    CLIENT_FLAGS_BYTES, ClientFlags, ClientOption, ContextQuery, ExportQuery, OPTION_HEADER_BYTES,
    OptionHeader, greeting, option,
};
use blockmirror_protocol::nbd::option_reply::{
    ExportFlags, ExportSummary, Info, OptionReply, Refusal, export_name_reply, info,
};
use std::io;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

/// The longest data of an option that is looked at; a name is at most 4 KiB.
const OPTION_LIMIT_BYTES: u32 = 64 << 10;

/// The one kind of block status (section "Metadata contexts" of the protocol).
const ALLOCATION: &str = "base:allocation";
const BASE_NAMESPACE: &str = "base:";
/// How block status replies name it.
pub(super) const ALLOCATION_ID: u32 = 1;

/// What the two sides agreed on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub(super) struct Agreed {
    /// Replies are structured.
    pub(super) structured: bool,
    /// The client may ask for block status of `base:allocation`.
    pub(super) allocation: bool,
}

/// The first words on a connection.
pub(super) async fn greet<S: AsyncRead + AsyncWrite + Unpin>(socket: &mut S) -> Result<ClientFlags, Ended> {
    socket.write_all(&greeting()).await?;
    let mut flags = [0; CLIENT_FLAGS_BYTES];
    fill(socket, &mut flags).await?;
    Ok(ClientFlags::parse(flags)?)
}

/// Hears a client's options until it has opened the export, or left without (`None`).
pub(super) async fn negotiate<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut S,
    mut negotiation: Negotiation<'_>,
) -> Result<Option<Agreed>, Ended> {
    loop {
        let (number, data) = read_option(socket).await?;
        let mut out = Vec::new();
        let next = negotiation.respond(number, data.as_deref(), &mut out)?;
        say(socket, &out).await?;
        match next {
            Next::Listen => {}
            Next::Proceed => return Ok(Some(negotiation.agreed)),
            Next::Close => return Ok(None),
        }
    }
}

/// Hears a client's options until it wants TLS; false when it has left without, or can't.
pub(super) async fn ask_for_tls<S: AsyncRead + AsyncWrite + Unpin>(
    socket: &mut S,
    flags: ClientFlags,
) -> Result<bool, Ended> {
    loop {
        let (number, data) = read_option(socket).await?;
        let (reply, next) = without_tls(flags, number, data.as_deref());
        let mut out = Vec::new();
        reply.iter().for_each(|reply| reply.encode(number, &mut out));
        say(socket, &out).await?;
        match next {
            Next::Listen => {}
            Next::Proceed => return Ok(true),
            Next::Close => return Ok(false),
        }
    }
}

/// What is said to an option before there is TLS, where that is required.
fn without_tls(flags: ClientFlags, number: u32, data: Option<&[u8]>) -> (Option<OptionReply>, Next) {
    // Opening the export by its name has no reply that refuses it, and TLS is for clients that understand replies.
    if number == option::EXPORT_NAME || !flags.fixed_newstyle {
        return (None, Next::Close);
    }
    match number {
        option::ABORT => (Some(OptionReply::Acknowledged), Next::Close),
        option::START_TLS if data.is_some_and(<[u8]>::is_empty) => {
            (Some(OptionReply::Acknowledged), Next::Proceed)
        }
        option::START_TLS => {
            (Some(refuse(Refusal::Invalid, "the option to start tls has no data")), Next::Listen)
        }
        _ => {
            let reply =
                refuse(Refusal::TlsRequired, "this server wants tls, and a certificate: start tls first");
            (Some(reply), Next::Listen)
        }
    }
}

/// The next option's number and data, which is `None` when it is too long.
async fn read_option<S: AsyncRead + Unpin>(socket: &mut S) -> Result<(u32, Option<Vec<u8>>), Ended> {
    let mut header = [0; OPTION_HEADER_BYTES];
    fill(socket, &mut header).await?;
    let header = OptionHeader::parse(&header)?;
    Ok((header.option, read_data(socket, header.length).await?))
}

/// Sends all of it on its way, also through a socket that encrypts.
async fn say<S: AsyncWrite + Unpin>(socket: &mut S, bytes: &[u8]) -> Result<(), Ended> {
    socket.write_all(bytes).await?;
    Ok(socket.flush().await?)
}

/// The data of an option, or `None` when it is too long, after it was skipped.
async fn read_data<S: AsyncRead + Unpin>(socket: &mut S, length: u32) -> Result<Option<Vec<u8>>, Ended> {
    if length > OPTION_LIMIT_BYTES {
        let mut rest = socket.take(u64::from(length));
        let skipped = tokio::io::copy(&mut rest, &mut tokio::io::sink()).await?;
        return if skipped == u64::from(length) { Ok(None) } else { Err(Ended::Vanished) };
    }
    let mut data = vec![0; length as usize];
    fill(socket, &mut data).await?;
    Ok(Some(data))
}

/// Reads as many bytes as the target has.
async fn fill<S: AsyncRead + Unpin>(socket: &mut S, target: &mut [u8]) -> Result<(), Ended> {
    match socket.read_exact(target).await {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Err(Ended::Vanished),
        Err(error) => Err(error.into()),
    }
}

/// What comes after an option.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Next {
    /// Another option.
    Listen,
    /// What the options are for has come: the export is open, or TLS begins.
    Proceed,
    /// The connection ends, as the client wishes or as the protocol wants it.
    Close,
}

/// What is known of a client that hasn't opened the export yet.
pub(super) struct Negotiation<'a> {
    name: &'a str,
    geometry: Geometry,
    flags: ClientFlags,
    encrypted: bool,
    agreed: Agreed,
}

impl<'a> Negotiation<'a> {
    /// A client that has said nothing but its flags, inside TLS if that is `encrypted`.
    pub(super) fn new(name: &'a str, geometry: Geometry, flags: ClientFlags, encrypted: bool) -> Self {
        Self { name, geometry, flags, encrypted, agreed: Agreed::default() }
    }

    /// Appends what to say to an option, whose `data` is `None` where it was too long.
    fn respond(&mut self, number: u32, data: Option<&[u8]>, out: &mut Vec<u8>) -> Result<Next, Malformed> {
        if number == option::EXPORT_NAME {
            let Some(data) = data else { return Err(Malformed::TextTooLong) };
            return Ok(self.open_by_name(ClientOption::parse(number, data)?, out));
        }
        if !self.flags.fixed_newstyle {
            return Ok(Next::Close);
        }
        let Some(data) = data else {
            refuse(Refusal::TooBig, "the option's data is too long").encode(number, out);
            return Ok(Next::Listen);
        };
        let (replies, next) = match ClientOption::parse(number, data) {
            Ok(asked) => self.decide(asked),
            Err(malformed) => (vec![refuse(Refusal::Invalid, &malformed.to_string())], Next::Listen),
        };
        replies.iter().for_each(|reply| reply.encode(number, out));
        Ok(next)
    }

    /// `ExportName` can't be refused: an unknown name ends the connection.
    fn open_by_name(&mut self, asked: ClientOption, out: &mut Vec<u8>) -> Next {
        match asked {
            ClientOption::ExportName(name) if self.is_ours(&name) => {
                out.extend(export_name_reply(self.summary(), self.flags.no_zeroes));
                Next::Proceed
            }
            _ => Next::Close,
        }
    }

    fn decide(&mut self, asked: ClientOption) -> (Vec<OptionReply>, Next) {
        let replies = match asked {
            ClientOption::Abort => return (vec![OptionReply::Acknowledged], Next::Close),
            ClientOption::Go(query) if self.is_ours(&query.name) => {
                return (self.describe(&query), Next::Proceed);
            }
            ClientOption::Info(query) if self.is_ours(&query.name) => self.describe(&query),
            ClientOption::Go(_) | ClientOption::Info(_) => vec![unknown_export()],
            ClientOption::List => vec![OptionReply::Server(self.name.to_owned()), OptionReply::Acknowledged],
            ClientOption::StructuredReply => {
                self.agreed.structured = true;
                vec![OptionReply::Acknowledged]
            }
            ClientOption::ListMetaContext(query) => self.list_contexts(&query),
            ClientOption::SetMetaContext(query) => self.set_contexts(&query),
            ClientOption::StartTls if self.encrypted => {
                vec![refuse(Refusal::Invalid, "there is tls already")]
            }
            ClientOption::StartTls => vec![refuse(Refusal::Unsupported, "there is no TLS here")],
            ClientOption::ExportName(_) | ClientOption::Unknown(_) => vec![refuse(Refusal::Unsupported, "")],
        };
        (replies, Next::Listen)
    }

    fn is_ours(&self, name: &str) -> bool {
        name.is_empty() || name == self.name
    }

    fn summary(&self) -> ExportSummary {
        let both = ExportFlags::HAS_FLAGS
            .with(ExportFlags::FLUSH)
            .with(ExportFlags::MULTIPLE_CONNECTIONS)
            .with(ExportFlags::CACHE);
        let flags = if self.geometry.read_only {
            both.with(ExportFlags::READ_ONLY)
        } else {
            both.with(ExportFlags::FUA).with(ExportFlags::TRIM).with(ExportFlags::WRITE_ZEROES)
        };
        let flags = if self.agreed.structured { flags.with(ExportFlags::DONT_FRAGMENT) } else { flags };
        ExportSummary { size_bytes: self.geometry.size_bytes, flags }
    }

    /// Size and block sizes, whether asked for or not, and the name if asked for.
    fn describe(&self, query: &ExportQuery) -> Vec<OptionReply> {
        let preferred = self.geometry.preferred_bytes.clamp(REQUEST_UNIT_BYTES, PAYLOAD_LIMIT_BYTES);
        let block_size = Info::BlockSize {
            minimum: REQUEST_UNIT_BYTES,
            preferred: preferred.next_power_of_two(),
            maximum: PAYLOAD_LIMIT_BYTES,
        };
        let mut replies =
            vec![OptionReply::Info(Info::Export(self.summary())), OptionReply::Info(block_size)];
        if query.kinds.contains(&info::NAME) {
            replies.push(OptionReply::Info(Info::Name(self.name.to_owned())));
        }
        replies.push(OptionReply::Acknowledged);
        replies
    }

    fn list_contexts(&self, query: &ContextQuery) -> Vec<OptionReply> {
        if let Some(refusal) = self.refuse_contexts(query) {
            return vec![refusal];
        }
        let wanted = |text: &String| text == BASE_NAMESPACE || text == ALLOCATION;
        let found = query.queries.is_empty() || query.queries.iter().any(wanted);
        contexts(found, 0)
    }

    /// A selection replaces the one before, also when it is refused.
    fn set_contexts(&mut self, query: &ContextQuery) -> Vec<OptionReply> {
        self.agreed.allocation = false;
        if let Some(refusal) = self.refuse_contexts(query) {
            return vec![refusal];
        }
        self.agreed.allocation = query.queries.iter().any(|text| text == ALLOCATION);
        contexts(self.agreed.allocation, ALLOCATION_ID)
    }

    fn refuse_contexts(&self, query: &ContextQuery) -> Option<OptionReply> {
        if !self.agreed.structured {
            return Some(refuse(Refusal::Invalid, "ask for structured replies first"));
        }
        (!self.is_ours(&query.name)).then(unknown_export)
    }
}

fn contexts(allocation: bool, id: u32) -> Vec<OptionReply> {
    let context = allocation.then(|| OptionReply::MetaContext { id, name: ALLOCATION.to_owned() });
    context.into_iter().chain([OptionReply::Acknowledged]).collect()
}

fn refuse(reason: Refusal, message: &str) -> OptionReply {
    OptionReply::Error { reason, message: message.to_owned() }
}

fn unknown_export() -> OptionReply {
    refuse(Refusal::UnknownExport, "there is no export of this name; list the exports for those there are")
}
