//! The one-time token that the operator pastes on a new host.
//!
//! It says where the inviting host is, which key it has, which volume is meant, and holds the secret that lets its
//! bearer join once. The text is `bm1-` and base32 (RFC 4648, lower case, without padding), which survives terminals,
//! mail and a double click; white space from line breaks is ignored. The number in the prefix is the version.
//!
//! ```text
//! 0 length of all bytes (2)   2 host (32)   34 volume (16)   50 secret (32)
//! 82 volume's name            .. number of addresses (1)     .. addresses     .. checksum (4)
//! ```
//!
//! A text is its length (1) and its UTF-8; numbers are little-endian; the checksum is the beginning of the BLAKE3 of
//! all bytes before it. With the length and the checksum a paste that lost its end is told from one that was mistyped.

use blockmirror_protocol::units::{HostId, VolumeId};
use std::fmt;

const PREFIX: &str = "bm";
const VERSION: u32 = 1;
const ALPHABET: &[u8; 32] = b"abcdefghijklmnopqrstuvwxyz234567";
const LENGTH_BYTES: usize = 2;
const CHECKSUM_BYTES: usize = 4;

/// A secret that opens a volume once. It does not show in logs.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(pub [u8; 32]);

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(..)")
    }
}

/// What a token says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Token {
    /// Where the inviting agent listens, `address:port`.
    pub addresses: Vec<String>,
    /// The inviting host's key.
    pub host: HostId,
    /// The volume.
    pub volume: VolumeId,
    /// The volume's name.
    pub name: String,
    /// The invitation's secret.
    pub secret: Secret,
}

/// A text that is no token of use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TokenError {
    /// It does not begin as a token does.
    #[error("this is no token: a token begins with bm1- and is printed by `blockmirror invite`")]
    NotAToken,
    /// It was made by a newer Blockmirror.
    #[error("the token is of version {0}, which is newer than this Blockmirror: update it on this host")]
    Newer(u32),
    /// A character that no token has.
    #[error("the token has a {0:?} in it, which no token has: paste it again")]
    Character(char),
    /// Its end is missing.
    #[error("the token was cut off: {found} of {expected} bytes are there; paste all of it")]
    Truncated {
        /// How many bytes it should have.
        expected: usize,
        /// How many it has.
        found: usize,
    },
    /// It was changed.
    #[error("the token was damaged on its way: paste it again")]
    Damaged,
    /// A name or an address is longer than a token can carry, or there are too many addresses.
    #[error(
        "a token carries up to 255 addresses and texts of up to 255 bytes: shorten the name or the addresses"
    )]
    TooLong,
}

impl Token {
    /// The token's text.
    ///
    /// # Errors
    /// [`TokenError::TooLong`] when it carries more than a token can.
    pub fn encode(&self) -> Result<String, TokenError> {
        let mut bytes = vec![0; LENGTH_BYTES];
        bytes.extend_from_slice(&self.host.0);
        bytes.extend_from_slice(&self.volume.0);
        bytes.extend_from_slice(&self.secret.0);
        put_text(&mut bytes, &self.name)?;
        bytes.push(u8::try_from(self.addresses.len()).map_err(|_| TokenError::TooLong)?);
        self.addresses.iter().try_for_each(|address| put_text(&mut bytes, address))?;
        let length = u16::try_from(bytes.len() + CHECKSUM_BYTES).map_err(|_| TokenError::TooLong)?;
        bytes[..LENGTH_BYTES].copy_from_slice(&length.to_le_bytes());
        let checksum = checksum(&bytes);
        bytes.extend_from_slice(&checksum);
        Ok(format!("{PREFIX}{VERSION}-{}", to_base32(&bytes)))
    }

    /// Reads a token's text.
    ///
    /// # Errors
    /// [`TokenError`], which says what is wrong with the text.
    pub fn parse(text: &str) -> Result<Self, TokenError> {
        let text: String = text.split_whitespace().collect::<String>().to_ascii_lowercase();
        let (version, rest) =
            text.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')).ok_or(TokenError::NotAToken)?;
        match version.parse() {
            Ok(VERSION) => {}
            Ok(newer) if newer > VERSION => return Err(TokenError::Newer(newer)),
            _ => return Err(TokenError::NotAToken),
        }
        let bytes = from_base32(rest)?;
        let found = bytes.len();
        let Some((length, _)) = bytes.split_first_chunk() else {
            return Err(TokenError::Truncated { expected: LENGTH_BYTES, found });
        };
        let expected = usize::from(u16::from_le_bytes(*length));
        if found < expected {
            return Err(TokenError::Truncated { expected, found });
        }
        let (body, sum) = bytes.split_last_chunk::<CHECKSUM_BYTES>().ok_or(TokenError::Damaged)?;
        if found > expected || checksum(body) != *sum {
            return Err(TokenError::Damaged);
        }
        Self::from_body(body.get(LENGTH_BYTES..).ok_or(TokenError::Damaged)?).ok_or(TokenError::Damaged)
    }

    fn from_body(bytes: &[u8]) -> Option<Self> {
        let (host, bytes) = bytes.split_first_chunk()?;
        let (volume, bytes) = bytes.split_first_chunk()?;
        let (secret, mut bytes) = bytes.split_first_chunk()?;
        let name = take_text(&mut bytes)?;
        let (count, mut bytes) = bytes.split_first()?;
        let addresses = (0..*count).map(|_| take_text(&mut bytes)).collect::<Option<Vec<_>>>()?;
        let token =
            Self { addresses, host: HostId(*host), volume: VolumeId(*volume), name, secret: Secret(*secret) };
        bytes.is_empty().then_some(token)
    }
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    *blake3::hash(bytes).as_bytes().first_chunk().expect("a hash is longer than a checksum")
}

fn put_text(bytes: &mut Vec<u8>, text: &str) -> Result<(), TokenError> {
    bytes.push(u8::try_from(text.len()).map_err(|_| TokenError::TooLong)?);
    bytes.extend_from_slice(text.as_bytes());
    Ok(())
}

fn take_text(bytes: &mut &[u8]) -> Option<String> {
    let (length, rest) = bytes.split_first()?;
    let (text, rest) = rest.split_at_checked(usize::from(*length))?;
    *bytes = rest;
    String::from_utf8(text.to_vec()).ok()
}

/// By hand: none of the crates in use knows base32.
fn to_base32(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len().div_ceil(5) * 8);
    let (mut bits, mut count) = (0u32, 0);
    for byte in bytes {
        (bits, count) = (bits << 8 | u32::from(*byte), count + 8);
        while count >= 5 {
            count -= 5;
            text.push(char::from(ALPHABET[(bits >> count & 31) as usize]));
        }
        bits &= 0xff;
    }
    if count > 0 {
        text.push(char::from(ALPHABET[(bits << (5 - count) & 31) as usize]));
    }
    text
}

/// Bits beyond the last whole byte are dropped: where a text was cut within a byte, the length tells.
fn from_base32(text: &str) -> Result<Vec<u8>, TokenError> {
    let mut bytes = Vec::with_capacity(text.len() * 5 / 8);
    let (mut bits, mut count) = (0u32, 0);
    for character in text.chars() {
        let value = ALPHABET
            .iter()
            .position(|known| char::from(*known) == character)
            .ok_or(TokenError::Character(character))?;
        (bits, count) = (bits << 5 | value as u32, count + 5);
        if count >= 8 {
            count -= 8;
            bytes.push((bits >> count & 0xff) as u8);
        }
        bits &= 0xff;
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn token() -> Token {
        Token {
            addresses: vec!["10.0.0.1:7447".into(), "[fd00::1]:7447".into()],
            host: HostId([1; 32]),
            volume: VolumeId([2; 16]),
            name: "data".into(),
            secret: Secret([3; 32]),
        }
    }

    #[test]
    fn a_token_reads_back_also_in_capitals_and_over_several_lines() {
        let text = token().encode().unwrap();
        assert!(text.starts_with("bm1-"), "{text}");
        assert_eq!(Token::parse(&text), Ok(token()));
        let wrapped: String =
            text.to_uppercase().chars().map(|character| format!("{character}\n ")).collect();
        assert_eq!(Token::parse(&wrapped), Ok(token()));
    }

    #[test]
    fn a_token_has_this_golden_text() {
        let small = Token {
            addresses: vec!["b:1".into()],
            host: HostId([0; 32]),
            volume: VolumeId([0; 16]),
            name: "v".into(),
            secret: Secret([0; 32]),
        };
        let zeroes = "a".repeat(130);
        assert_eq!(small.encode().unwrap(), format!("bm1-lu{zeroes}c5qbanrdumoxyedla"));
    }

    #[test]
    fn a_token_that_was_cut_off_says_so_wherever_it_was_cut() {
        let text = token().encode().unwrap();
        for length in PREFIX.len() + 2..text.len() - 1 {
            let error = Token::parse(&text[..length]).unwrap_err();
            assert!(matches!(error, TokenError::Truncated { .. }), "{length}: {error:?}");
        }
    }

    #[test]
    fn other_texts_are_refused_with_what_is_wrong() {
        let text = token().encode().unwrap();
        let rows = [
            ("", TokenError::NotAToken),
            ("bm1", TokenError::NotAToken),
            ("hello-world", TokenError::NotAToken),
            ("bm0-aaaa", TokenError::NotAToken),
            ("bm2-aaaa", TokenError::Newer(2)),
            ("bm1-a0aa", TokenError::Character('0')),
            (&format!("{text}aaaa"), TokenError::Damaged),
            ("bm1-aaaa", TokenError::Damaged),
        ];
        for (text, error) in rows {
            assert_eq!(Token::parse(text), Err(error), "{text}");
        }
    }

    #[test]
    fn a_token_carries_no_more_than_it_can() {
        let long = Token { name: "n".repeat(256), ..token() };
        assert_eq!(long.encode(), Err(TokenError::TooLong));
        let many = Token { addresses: vec!["a".repeat(255); 255], ..token() };
        assert_eq!(Token::parse(&many.encode().unwrap()), Ok(many.clone()));
        let more = Token { addresses: vec!["a".into(); 256], ..token() };
        assert_eq!(more.encode(), Err(TokenError::TooLong));
    }

    #[test]
    fn a_secret_does_not_show() {
        assert!(!format!("{:?}", token()).contains("3, 3"));
    }

    proptest! {
        #[test]
        fn a_changed_character_is_noticed(at in 4usize..200, other in 0usize..32) {
            let text = token().encode().unwrap();
            // The last character's unused bits mean nothing.
            let at = 4 + (at - 4) % (text.len() - 5);
            let mut changed = text.clone().into_bytes();
            changed[at] = ALPHABET[other];
            let changed = String::from_utf8(changed).unwrap();
            prop_assert!(changed == text || Token::parse(&changed).is_err());
        }

        #[test]
        fn garbage_is_refused_without_a_panic(garbage in "bm1-[a-z2-7]{0,300}") {
            prop_assert!(Token::parse(&garbage).is_err());
        }
    }
}
