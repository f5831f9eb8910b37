//! The bytes of the NBD protocol: fixed newstyle negotiation and transmission, bytes <-> values.
//!
//! The source of every constant and layout is the protocol's own description,
//! <https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md>; comments name its sections. All integers are
//! big-endian. [`handshake`] and [`option_reply`] are what is said until an export is
//! open, [`transmission`] what follows.
//!
//! Parsers take bytes from a stranger: whatever is wrong with them comes back as [`Malformed`]. Which answer that
//! deserves, and every limit except the one on texts, is the caller's business. The server's side is complete; of the
//! client's side there is what tests and small tools need.

pub mod handshake;
pub mod option_reply;
#[cfg(test)]
mod tests;
pub mod transmission;

/// The longest text that the protocol allows (section "Conventions"), in bytes.
pub const TEXT_LIMIT_BYTES: usize = 4096;

/// Bytes that are not what the protocol wants at their place.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// A message starts with another number than its kind does.
    #[error("the magic number is {found:#x} and not {expected:#x}")]
    Magic {
        /// What the protocol wants.
        expected: u64,
        /// What was there.
        found: u64,
    },
    /// The message's own lengths say that it is longer than it is.
    #[error("a message ends too early")]
    Truncated,
    /// The message's own lengths say that it is shorter than it is.
    #[error("a message goes on after its end")]
    Trailing,
    /// A text is not UTF-8 or holds a NUL.
    #[error("a text is not utf-8")]
    NotText,
    /// A text is longer than [`TEXT_LIMIT_BYTES`].
    #[error("a text is longer than {TEXT_LIMIT_BYTES} bytes")]
    TextTooLong,
    /// A flag that the protocol does not know, in a place where it may not be ignored.
    #[error("flags {0:#x} are not known")]
    UnknownFlags(u32),
    /// A number that names no kind of message.
    #[error("there is no message of kind {0:#x}")]
    UnknownKind(u32),
}

/// Takes big-endian values off the front of a message.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn new(message: &'a [u8]) -> Self {
        Self { rest: message }
    }

    fn bytes(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.rest.split_at_checked(count).ok_or(Malformed::Truncated)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.rest.split_first_chunk::<N>().ok_or(Malformed::Truncated)?;
        self.rest = rest;
        Ok(*taken)
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        self.array().map(u16::from_be_bytes)
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        self.array().map(u32::from_be_bytes)
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        self.array().map(u64::from_be_bytes)
    }

    fn magic(&mut self, expected: u64) -> Result<(), Malformed> {
        let found = self.u64()?;
        if found == expected { Ok(()) } else { Err(Malformed::Magic { expected, found }) }
    }

    fn magic_u32(&mut self, expected: u32) -> Result<(), Malformed> {
        let (expected, found) = (u64::from(expected), u64::from(self.u32()?));
        if found == expected { Ok(()) } else { Err(Malformed::Magic { expected, found }) }
    }

    fn text(&mut self, length: usize) -> Result<String, Malformed> {
        if length > TEXT_LIMIT_BYTES {
            return Err(Malformed::TextTooLong);
        }
        let bytes = self.bytes(length)?;
        let text = std::str::from_utf8(bytes).map_err(|_| Malformed::NotText)?;
        if text.contains('\0') { Err(Malformed::NotText) } else { Ok(text.to_owned()) }
    }

    /// A text behind its own 32-bit length.
    fn counted_text(&mut self) -> Result<String, Malformed> {
        let length = self.u32()? as usize;
        self.text(length)
    }

    fn remaining_text(&mut self) -> Result<String, Malformed> {
        self.text(self.rest.len())
    }

    fn end(self) -> Result<(), Malformed> {
        if self.rest.is_empty() { Ok(()) } else { Err(Malformed::Trailing) }
    }
}

/// The length of a part of a message as the wire's 32 bits.
///
/// # Panics
/// When a message of ours is longer than 4 GiB.
fn wire_length(length: usize) -> u32 {
    u32::try_from(length).expect("a message of ours is shorter than 4 GiB")
}

fn put_counted_text(text: &str, out: &mut Vec<u8>) {
    out.extend_from_slice(&wire_length(text.len()).to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Writes big-endian pieces one after the other into a message of a fixed size, which they must fill.
macro_rules! message {
    ($size:expr; $($piece:expr),+ $(,)?) => {{
        let mut message = [0; $size];
        let mut place = 0;
        $(
            let piece = $piece.to_be_bytes();
            message[place..place + piece.len()].copy_from_slice(&piece);
            place += piece.len();
        )+
        assert_eq!(place, $size, "the pieces fill the message");
        message
    }};
}
use message;
