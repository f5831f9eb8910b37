//! What a one-way stream of frames begins with, so that the acceptor of a connection that many volumes share knows
//! whose stream it is before it reads a frame.

use crate::units::{Session, VolumeId};
use zerocopy::byteorder::little_endian::U64;
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The size of a preamble, in bytes.
pub const PREAMBLE_BYTES: usize = 32;

const MAGIC: [u8; 4] = *b"BMS1";

/// The preamble as it is sent.
///
/// ```text
///  0 magic "BMS1"     4 kind      5 zero (3)
///  8 session (8)     16 volume (16)
/// ```
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawPreamble {
    magic: [u8; 4],
    kind: u8,
    zero: [u8; 3],
    session: U64,
    volume: [u8; 16],
}

const _: () = assert!(size_of::<RawPreamble>() == PREAMBLE_BYTES);

/// What a one-way stream carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum StreamKind {
    /// Live frames, in the order of their sequence numbers.
    Live,
    /// Copies of a resync, and what else takes the bandwidth that live frames leave (R3).
    Bulk,
}

/// Whose a one-way stream is, and what it carries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct StreamPreamble {
    /// The volume.
    pub volume: VolumeId,
    /// The session that every frame of the stream belongs to.
    pub session: Session,
    /// What it carries.
    pub kind: StreamKind,
}

/// Bytes that no stream of this version begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PreambleError {
    /// The first bytes are not those of a stream of frames.
    #[error("the peer opened a stream that carries no frames")]
    NotAPreamble,
    /// The kind is unknown in this version.
    #[error("the peer opened a stream of the unknown kind {0}")]
    UnknownKind(u8),
}

impl StreamPreamble {
    /// The preamble's bytes.
    #[must_use]
    pub fn encode(&self) -> [u8; PREAMBLE_BYTES] {
        let kind = match self.kind {
            StreamKind::Live => 1,
            StreamKind::Bulk => 2,
        };
        zerocopy::transmute!(RawPreamble {
            magic: MAGIC,
            kind,
            zero: [0; 3],
            session: U64::new(self.session.0),
            volume: self.volume.0,
        })
    }

    /// Reads a preamble.
    ///
    /// # Errors
    /// [`PreambleError`] for bytes that no sender of this version could have made.
    pub fn decode(bytes: &[u8; PREAMBLE_BYTES]) -> Result<Self, PreambleError> {
        let raw: RawPreamble = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC || raw.zero != [0; 3] {
            return Err(PreambleError::NotAPreamble);
        }
        let kind = match raw.kind {
            1 => StreamKind::Live,
            2 => StreamKind::Bulk,
            kind => return Err(PreambleError::UnknownKind(kind)),
        };
        Ok(Self { volume: VolumeId(raw.volume), session: Session(raw.session.get()), kind })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn live() -> StreamPreamble {
        StreamPreamble { volume: VolumeId([9; 16]), session: Session(0x0102), kind: StreamKind::Live }
    }

    #[test]
    fn a_preamble_has_these_golden_bytes() {
        let text: String = live().encode().iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(
            text,
            "424d5331010000000201000000000000\
                          09090909090909090909090909090909"
        );
    }

    #[test]
    fn both_kinds_read_back() {
        for preamble in [live(), StreamPreamble { kind: StreamKind::Bulk, ..live() }] {
            assert_eq!(StreamPreamble::decode(&preamble.encode()), Ok(preamble));
        }
    }

    #[test]
    fn other_bytes_are_refused() {
        let rows = [
            (0, b'X', PreambleError::NotAPreamble),
            (4, 0, PreambleError::UnknownKind(0)),
            (4, 3, PreambleError::UnknownKind(3)),
            (7, 1, PreambleError::NotAPreamble),
        ];
        for (at, byte, error) in rows {
            let mut bytes = live().encode();
            bytes[at] = byte;
            assert_eq!(StreamPreamble::decode(&bytes), Err(error));
        }
    }
}
