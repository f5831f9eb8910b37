//! A small NBD client that does one thing at a time, notices when the server goes away, and can vanish itself.

use blockmirror_protocol::nbd::handshake::{
    ClientFlags, ClientOption, ExportQuery, GREETING_BYTES, greeting, option,
};
use blockmirror_protocol::nbd::option_reply::{OptionReply, OptionReplyHeader};
use blockmirror_protocol::nbd::transmission::{
    CommandFlags, CommandKind, RequestHeader, SIMPLE_REPLY_BYTES, SimpleReply,
};
use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

/// After how much silence the server counts as gone.
const SILENCE: Duration = Duration::from_secs(60);

/// A connection to an export. An error of any call means that it is of no use any more.
pub struct Client {
    socket: UnixStream,
    next_cookie: u64,
}

impl Client {
    /// Connects to a server, and opens its default export.
    ///
    /// # Errors
    /// What the kernel said, or `InvalidData` when the server refuses.
    pub fn connect(path: &Path) -> io::Result<Self> {
        let socket = UnixStream::connect(path)?;
        socket.set_read_timeout(Some(SILENCE))?;
        let mut client = Self { socket, next_cookie: 0 };
        if client.array::<GREETING_BYTES>()? != greeting() {
            return Err(io::ErrorKind::InvalidData.into());
        }
        client.socket.write_all(&ClientFlags { fixed_newstyle: true, no_zeroes: true }.encode())?;
        let query = ExportQuery { name: String::new(), kinds: Vec::new() };
        client.socket.write_all(&ClientOption::Go(query).encode())?;
        loop {
            let header = OptionReplyHeader::parse(&client.array()?).map_err(io::Error::other)?;
            assert_eq!(header.option, option::GO, "a reply names its option");
            let data = client.bytes(header.length as usize)?;
            match OptionReply::parse(header.kind, &data).map_err(io::Error::other)? {
                OptionReply::Acknowledged => return Ok(client),
                OptionReply::Error { .. } => return Err(io::ErrorKind::InvalidData.into()),
                _ => {}
            }
        }
    }

    /// Reads a range.
    ///
    /// # Errors
    /// When the server fails it or is gone.
    pub fn read(&mut self, offset: u64, length: u64) -> io::Result<Vec<u8>> {
        self.begin_read(offset, length)?;
        self.finish_read(length)
    }

    /// Asks for a read, and does not wait for the answer.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn begin_read(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.ask(CommandKind::Read, CommandFlags::NONE, offset, length, &[])
    }

    /// Waits for so many bytes that the last request was to read.
    ///
    /// # Errors
    /// When the server fails it or is gone.
    pub fn finish_read(&mut self, length: u64) -> io::Result<Vec<u8>> {
        self.answer()?;
        self.bytes(length as usize)
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// When the server fails it or is gone.
    pub fn write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.ask(CommandKind::Write, CommandFlags::NONE, offset, data.len() as u64, data)?;
        self.answer()
    }

    /// Writes bytes durably.
    ///
    /// # Errors
    /// When the server fails it or is gone.
    pub fn write_durably(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.ask(CommandKind::Write, CommandFlags::FUA, offset, data.len() as u64, data)?;
        self.answer()
    }

    /// Gives a range's space back; it reads as zeroes then.
    ///
    /// # Errors
    /// When the server fails it or is gone.
    pub fn trim(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.ask(CommandKind::Trim, CommandFlags::NONE, offset, length, &[])?;
        self.answer()
    }

    /// Writes zeroes, and keeps the space.
    ///
    /// # Errors
    /// When the server fails it or is gone.
    pub fn zero(&mut self, offset: u64, length: u64) -> io::Result<()> {
        self.ask(CommandKind::WriteZeroes, CommandFlags::NO_HOLE, offset, length, &[])?;
        self.answer()
    }

    /// Makes durable what was written.
    ///
    /// # Errors
    /// When the server fails it or is gone.
    pub fn flush(&mut self) -> io::Result<()> {
        self.ask(CommandKind::Flush, CommandFlags::NONE, 0, 0, &[])?;
        self.answer()
    }

    /// Asks for a write, and does not wait for the answer.
    ///
    /// # Errors
    /// When the server is gone.
    pub fn begin_write(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.ask(CommandKind::Write, CommandFlags::NONE, offset, data.len() as u64, data)
    }

    /// Waits for the answer to the last request.
    ///
    /// # Errors
    /// When the server fails it or is gone.
    pub fn finish(&mut self) -> io::Result<()> {
        self.answer()
    }

    fn ask(
        &mut self,
        kind: CommandKind,
        flags: CommandFlags,
        offset: u64,
        length: u64,
        data: &[u8],
    ) -> io::Result<()> {
        self.next_cookie += 1;
        let length = u32::try_from(length).expect("a test's ranges fit into a request");
        let header = RequestHeader { flags, kind, cookie: self.next_cookie, offset, length };
        self.socket.write_all(&[&header.encode(), data].concat())
    }

    /// Takes the answer to the last request.
    fn answer(&mut self) -> io::Result<()> {
        let bytes: [u8; SIMPLE_REPLY_BYTES] = self.array()?;
        let reply = SimpleReply::parse(&bytes).map_err(io::Error::other)?;
        assert_eq!(reply.cookie, self.next_cookie, "one request is under way at a time");
        match reply.failure {
            None => Ok(()),
            Some(failure) => Err(io::Error::other(format!("the server says {failure:?}"))),
        }
    }

    fn bytes(&mut self, count: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; count];
        self.socket.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.socket.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}
