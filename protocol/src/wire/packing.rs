//! Payloads that are compressed on their way. Which bytes those are is for the shell; here is how a frame says so.
//!
//! The word in the header is zero where the payload is as it is. Else its highest byte names the way, and the lower
//! three say how many bytes follow the header: fewer than the payload has, so that a packed frame is never longer than
//! a plain one. The checksum is that of the unpacked payload, from the primary's buffer to the replica's write (P4).

use super::{FrameError, HEADER_BYTES, PAYLOAD_LIMIT_BYTES};
use std::ops::Range;

/// How a payload is packed.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Packing {
    /// One LZ4 block, without a frame.
    Lz4,
    /// One Zstandard frame (RFC 8878).
    Zstd,
}

/// Where the word is in a header.
pub(super) const PLACE: Range<usize> = 56..60;

const LENGTH_BITS: u32 = 24;

const _: () = assert!(PAYLOAD_LIMIT_BYTES < 1 << LENGTH_BITS);

/// Makes an encoded header one of a frame whose payload follows packed, in so many bytes.
///
/// # Panics
/// When those are none, or as many as three bytes can't count: our own mistake.
pub fn set(header: &mut [u8; HEADER_BYTES], packing: Packing, packed_bytes: usize) {
    assert!((1..1 << LENGTH_BITS).contains(&packed_bytes), "a packed payload is shorter than the plain one");
    let way: u32 = match packing {
        Packing::Lz4 => 1,
        Packing::Zstd => 2,
    };
    let word = way << LENGTH_BITS | packed_bytes as u32;
    header[PLACE].copy_from_slice(&word.to_le_bytes());
}

pub(super) fn decode(word: u32, payload_bytes: u32) -> Result<Option<(Packing, u32)>, FrameError> {
    let length = word & ((1 << LENGTH_BITS) - 1);
    let packing = match word >> LENGTH_BITS {
        _ if word == 0 => return Ok(None),
        1 => Packing::Lz4,
        2 => Packing::Zstd,
        _ => return Err(FrameError::BadPacking { word, payload: payload_bytes }),
    };
    if length == 0 || length >= payload_bytes {
        return Err(FrameError::BadPacking { word, payload: payload_bytes });
    }
    Ok(Some((packing, length)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranges::ByteRange;
    use crate::units::{Session, Stream};
    use crate::wire::{Body, FrameHeader};

    fn encoded(payload: &[u8]) -> (FrameHeader, [u8; HEADER_BYTES]) {
        let body = Body::Copy { range: ByteRange::new(0, payload.len() as u64), number: 1 };
        let header = FrameHeader { session: Session(7), stream: Stream(0), body };
        (header, header.encode(payload))
    }

    #[test]
    fn a_packed_frame_has_these_golden_bytes_and_the_plain_ones_checksum() {
        let payload = [0x5a; 512];
        let (header, plain) = encoded(&payload);
        for (packing, word) in [(Packing::Lz4, [0x0b, 0, 0, 1]), (Packing::Zstd, [0x0b, 0, 0, 2])] {
            let mut bytes = plain;
            set(&mut bytes, packing, 11);
            assert_eq!((&bytes[..56], &bytes[PLACE], &bytes[60..]), (&plain[..56], &word[..], &plain[60..]));
            let frame = FrameHeader::decode(&bytes).unwrap();
            assert_eq!((frame.payload_bytes(), frame.packed()), (512, Some((packing, 11))));
            assert_eq!(frame.check(&payload), Ok(header));
        }
    }

    #[test]
    fn a_packing_that_no_sender_would_choose_is_refused() {
        let (_, plain) = encoded(&[0x5a; 512]);
        for word in [512 | 1 << 24, 513 | 2 << 24, 1 << 24, 11 | 3 << 24, 11] {
            let mut bytes = plain;
            bytes[PLACE].copy_from_slice(&u32::to_le_bytes(word));
            assert_eq!(FrameHeader::decode(&bytes), Err(FrameError::BadPacking { word, payload: 512 }));
        }
    }

    #[test]
    fn a_frame_without_payload_is_never_packed() {
        let body = Body::CopyZero { range: ByteRange::new(0, 512), number: 1 };
        let mut bytes = FrameHeader { session: Session(7), stream: Stream(0), body }.encode(&[]);
        set(&mut bytes, Packing::Lz4, 1);
        let refused = FrameHeader::decode(&bytes);
        assert_eq!(refused, Err(FrameError::BadPacking { word: 1 | 1 << 24, payload: 0 }));
    }
}
