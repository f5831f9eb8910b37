//! A client that says exactly what a test wants it to.

use crate::harness::NAME;
use blockmirror_protocol::nbd::handshake::*;
use blockmirror_protocol::nbd::option_reply::*;
use blockmirror_protocol::nbd::transmission::*;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

pub struct Raw {
    pub socket: UnixStream,
}

/// A reply to a request: simple, with the bytes of a read that succeeded, or the only chunk of a structured one.
#[derive(Debug, PartialEq, Eq)]
pub enum Said {
    Simple(Option<Failure>),
    Chunk(Chunk),
}

impl Raw {
    /// Connects and takes the greeting.
    pub fn connect(path: &Path) -> Self {
        let socket = UnixStream::connect(path).unwrap();
        socket.set_read_timeout(Some(Duration::from_secs(60))).unwrap();
        let mut raw = Self { socket };
        assert_eq!(raw.array::<GREETING_BYTES>(), greeting());
        raw
    }

    /// Connects and opens the export.
    pub fn open(path: &Path, structured: bool) -> Self {
        let mut raw = Self::connect(path);
        raw.flags(true, true);
        if structured {
            assert_eq!(raw.ask(&ClientOption::StructuredReply), [OptionReply::Acknowledged]);
            let query = ContextQuery { name: NAME.to_owned(), queries: vec!["base:allocation".to_owned()] };
            assert_eq!(raw.ask(&ClientOption::SetMetaContext(query)).len(), 2);
        }
        let replies = raw.ask(&ClientOption::Go(ExportQuery { name: String::new(), kinds: vec![] }));
        assert_eq!(replies.last(), Some(&OptionReply::Acknowledged));
        raw
    }

    pub fn flags(&mut self, fixed_newstyle: bool, no_zeroes: bool) {
        self.send(&ClientFlags { fixed_newstyle, no_zeroes }.encode());
    }

    pub fn send(&mut self, bytes: &[u8]) {
        self.socket.write_all(bytes).unwrap();
    }

    pub fn bytes(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.socket.read_exact(&mut bytes).unwrap();
        bytes
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        self.bytes(N).try_into().unwrap()
    }

    /// Sends an option and takes its replies up to the last.
    pub fn ask(&mut self, option: &ClientOption) -> Vec<OptionReply> {
        self.send(&option.encode());
        self.option_replies(option.number())
    }

    /// Takes the replies to an option up to the last.
    pub fn option_replies(&mut self, option: u32) -> Vec<OptionReply> {
        let mut replies = Vec::new();
        loop {
            let header = OptionReplyHeader::parse(&self.array()).unwrap();
            assert_eq!(header.option, option);
            let data = self.bytes(header.length as usize);
            replies.push(OptionReply::parse(header.kind, &data).unwrap());
            if matches!(replies.last(), Some(OptionReply::Acknowledged | OptionReply::Error { .. })) {
                return replies;
            }
        }
    }

    pub fn request(&mut self, kind: CommandKind, flags: CommandFlags, cookie: u64, offset: u64, length: u32) {
        self.send(&RequestHeader { flags, kind, cookie, offset, length }.encode());
    }

    /// Takes a reply without data, or a structured one.
    pub fn reply(&mut self) -> (u64, Said) {
        let start: [u8; 16] = self.array();
        if let Ok(simple) = SimpleReply::parse(&start) {
            return (simple.cookie, Said::Simple(simple.failure));
        }
        let rest: [u8; 4] = self.array();
        let header = ChunkHeader::parse([start.as_slice(), &rest].concat().first_chunk().unwrap()).unwrap();
        assert!(header.done, "each reply has one chunk");
        let payload = self.bytes(header.length as usize);
        (header.cookie, Said::Chunk(Chunk::parse(header.kind, &payload).unwrap()))
    }

    /// Whether the server has closed the connection, with nothing left to say.
    pub fn is_closed(&mut self) -> bool {
        match self.socket.read(&mut [0]) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}
