//! What is sent between hosts.
//!
//! A session has one control stream of [`message::Message`]s and one-way streams of frames: live frames in the order
//! of their sequence numbers, and copies (resync). A one-way stream begins with a [`StreamPreamble`]. A frame is a
//! [`FrameHeader`] and its payload; one CRC-32 covers both from the primary's buffer to the replica's write (P4). All
//! numbers are little-endian.
//!
//! # Versions, newest first
//!
//! | version | since | why |
//! |---|---|---|
//! | 9 | 0.6 | a host says what it counts on as a replica |
//! | 8 | 0.6 | a promise that holds for ever says which hosts count for it |
//! | 6 | 0.6 | hosts say who, where and how far they are: markers, ends of content, silent disks; replicas are promised not to be left without a word; members are removed |
//! | 5 | 0.5 | payloads may be packed |
//! | 4 | 0.4 | hosts say when their generations began; holes are copied in ranges of up to 64 MiB |
//! | 3 | 0.3 | digests of doubtful blocks are compared before they are copied |
//! | 2 | 0.2 | modes, generations that begin within a session, fences, promotion; ends of epochs that were cut short |
//! | 1 | first release | |

pub mod message;
pub mod packing;
pub mod preamble;

pub use packing::Packing;
pub use preamble::{StreamKind, StreamPreamble};

use crate::ranges::ByteRange;
use crate::units::{Epoch, GenerationId, SECTOR_BYTES, Sequence, Session, Stream};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

/// The protocol's name in the TLS handshake (ALPN).
pub const ALPN: &[u8] = b"blockmirror/1";

/// The oldest and the newest version of frames and messages that this code speaks.
pub const VERSIONS: (u16, u16) = (9, 9);

/// What a frame takes at the most besides its payload: its header, and the records of it here, in the link and in the
/// transport, whose queues double when they grow.
pub(crate) const FRAME_COST_BYTES: u64 = 512;

/// No frame carries more payload than this, in bytes. A receiver may offer less.
pub const PAYLOAD_LIMIT_BYTES: u32 = 1 << 20;

/// No zero frame covers more than this, in bytes, so that none occupies a replica for long.
pub const ZERO_LIMIT_BYTES: u64 = 64 << 20;

/// The smallest buffer that a payload is held in.
pub(crate) const BUFFER_BYTES: u64 = 4096;

/// The size of a frame's header, in bytes.
pub const HEADER_BYTES: usize = 64;

const MAGIC: [u8; 4] = *b"BMF1";
const FLAG_MAY_UNMAP: u8 = 1;
const FLAG_CUT: u8 = 2;

/// The header as it is sent.
///
/// ```text
///  0 magic "BMF1"     4 kind      5 flags     6 zero (2)
///  8 session (8)     16 stream (4)           20 payload bytes (4)
/// 24 offset (8)      32 length (8)
/// 40 epoch (8)       48 number (8)
/// 56 packing (4)     60 CRC-32 of bytes 0..56, four zeroes, and the payload as it was before it was packed (4)
/// ```
///
/// "Payload bytes" are those before packing, too. See [`packing`] for what follows the header where there is one.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned, Clone, Copy)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 4],
    kind: u8,
    flags: u8,
    zero: U16,
    session: U64,
    stream: U32,
    payload_bytes: U32,
    offset: U64,
    length: U64,
    epoch: U64,
    number: U64,
    packing: U32,
    crc: U32,
}

const _: () = assert!(size_of::<RawHeader>() == HEADER_BYTES);

/// What a frame says. `range`s are 512-aligned and not empty.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Body {
    /// A live write; the payload is as long as the range.
    Write {
        /// Where the payload goes.
        range: ByteRange,
        /// The epoch that it belongs to.
        epoch: Epoch,
        /// Its place in the volume's order (W1).
        sequence: Sequence,
    },
    /// A live write of zeroes, without payload (W6).
    Zero {
        /// What reads as zeroes from now on.
        range: ByteRange,
        /// The epoch that it belongs to.
        epoch: Epoch,
        /// Its place in the volume's order (W1).
        sequence: Sequence,
        /// Whether the space may be given back.
        may_unmap: bool,
    },
    /// All live frames of an epoch have been sent (W3). Not sent for an epoch without frames, but before a commit.
    EpochEnd {
        /// The epoch that ends.
        epoch: Epoch,
        /// The last write in it or before it, as far as the replica was sent them.
        sequence: Sequence,
        /// Whether writes of the epoch were left out: what is durable then is no more than the epoch before.
        cut: bool,
    },
    /// A generation begins: what follows belongs to it, and is not written before it is recorded (L1). Comes between
    /// epochs.
    Generation {
        /// Its name.
        generation: GenerationId,
    },
    /// Content of dirty blocks; the payload is as long as the range.
    Copy {
        /// Where the payload goes.
        range: ByteRange,
        /// The copy's number, counted from 1 within the session without gaps.
        number: u64,
    },
    /// Dirty blocks that read as zeroes (R4).
    CopyZero {
        /// What reads as zeroes from now on.
        range: ByteRange,
        /// The copy's number, counted with those of [`Body::Copy`].
        number: u64,
    },
    /// A request for the digest of dirty blocks, which need not be copied where it is the primary's (R4).
    CopyDigest {
        /// What to read.
        range: ByteRange,
        /// The request's number, counted with those of [`Body::Copy`].
        number: u64,
    },
    /// A request, in the live stream's order, for the digest of a range as it is after all frames before.
    Digest {
        /// What to read.
        range: ByteRange,
        /// Names the answer.
        number: u64,
    },
    /// The answer to a read by the operator's tool: content; the payload is as long as the range.
    Content {
        /// Where the payload was read.
        range: ByteRange,
    },
    /// The answer to a read by the operator's tool: the range reads as zeroes.
    ContentZero {
        /// What reads as zeroes.
        range: ByteRange,
    },
    /// The answer of a replica to [`message::Fetch`]: content; the payload is as long as the range.
    Fetched {
        /// Where the payload was read.
        range: ByteRange,
        /// The number of what asked for it.
        number: u64,
    },
    /// The answer of a replica to [`message::Fetch`]: the range reads as zeroes.
    FetchedZero {
        /// What reads as zeroes.
        range: ByteRange,
        /// The number of what asked for it.
        number: u64,
    },
}

/// A frame's header in parts.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct FrameHeader {
    /// The session that the frame belongs to.
    pub session: Session,
    /// The live stream within the session.
    pub stream: Stream,
    /// What it says.
    pub body: Body,
}

/// A header that was read, and the checksum that its payload has yet to meet.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct UncheckedFrame {
    header: FrameHeader,
    payload_bytes: u32,
    packed: Option<(Packing, u32)>,
    crc_so_far: u32,
    crc: u32,
}

/// Bytes that are no frame of ours: the peer misbehaved, or the bytes were damaged on their way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// The first bytes are not those of a frame.
    #[error("the peer sent bytes that are no frame")]
    NotAFrame,
    /// The kind is unknown in this version.
    #[error("the peer sent a frame of unknown kind {0}")]
    UnknownKind(u8),
    /// Range and payload do not fit each other, the kind or the limits.
    #[error(
        "the peer sent a frame of kind {kind} with offset {offset}, length {length} and {payload} bytes of payload"
    )]
    BadRange {
        /// The frame's kind.
        kind: u8,
        /// The range's first byte.
        offset: u64,
        /// The range's bytes.
        length: u64,
        /// The payload's bytes.
        payload: u32,
    },
    /// No epoch is so high.
    #[error("the peer sent a frame of epoch {0}, which is out of bounds")]
    BadEpoch(u64),
    /// The payload is packed in a way that no sender of this version would.
    #[error("the peer sent a frame whose packing is {word:08x}, for {payload} bytes of payload")]
    BadPacking {
        /// What the header says of the packing.
        word: u32,
        /// The payload's bytes, before it was packed.
        payload: u32,
    },
    /// What came does not unpack to what the header promised.
    #[error("the peer sent a packed payload that does not unpack to {payload} bytes")]
    NotUnpacked {
        /// The payload's bytes, before it was packed.
        payload: u32,
    },
    /// The checksum differs (P4).
    #[error("a frame was damaged on its way: its checksum is {found:08x}, not {expected:08x}")]
    Damaged {
        /// What the header says.
        expected: u32,
        /// What was computed.
        found: u32,
    },
}

struct Fields {
    kind: u8,
    flags: u8,
    range: ByteRange,
    epoch: u64,
    number: u64,
    has_payload: bool,
}

impl Body {
    fn fields(self) -> Fields {
        let fields = |kind, range, epoch, number, has_payload| Fields {
            kind,
            flags: 0,
            range,
            epoch,
            number,
            has_payload,
        };
        match self {
            Self::Write { range, epoch, sequence } => fields(1, range, epoch.0, sequence.0, true),
            Self::Zero { range, epoch, sequence, may_unmap } => Fields {
                flags: if may_unmap { FLAG_MAY_UNMAP } else { 0 },
                ..fields(2, range, epoch.0, sequence.0, false)
            },
            Self::EpochEnd { epoch, sequence, cut } => Fields {
                flags: if cut { FLAG_CUT } else { 0 },
                ..fields(3, ByteRange::default(), epoch.0, sequence.0, false)
            },
            Self::Copy { range, number } => fields(4, range, 0, number, true),
            Self::CopyZero { range, number } => fields(5, range, 0, number, false),
            Self::Digest { range, number } => fields(6, range, 0, number, false),
            Self::Content { range } => fields(7, range, 0, 0, true),
            Self::ContentZero { range } => fields(8, range, 0, 0, false),
            Self::Generation { generation } => {
                let (first, second) = generation.0.split_at(8);
                let number = |bytes: &[u8]| u64::from_le_bytes(bytes.try_into().expect("half of 16 bytes"));
                fields(9, ByteRange::default(), number(first), number(second), false)
            }
            Self::CopyDigest { range, number } => fields(10, range, 0, number, false),
            Self::Fetched { range, number } => fields(11, range, 0, number, true),
            Self::FetchedZero { range, number } => fields(12, range, 0, number, false),
        }
    }

    /// The bytes of payload that follow the header.
    #[must_use]
    pub fn payload_bytes(self) -> u64 {
        let fields = self.fields();
        if fields.has_payload { fields.range.length } else { 0 }
    }

    /// What a copy takes of what may be under way, in bytes: the whole buffer that a payload is held in; of a range of
    /// zeroes, however long, no more than of the largest payload.
    #[must_use]
    pub fn weight_bytes(self) -> u64 {
        self.range().length.min(u64::from(PAYLOAD_LIMIT_BYTES)).next_multiple_of(BUFFER_BYTES)
    }

    /// The range that the frame is about, if any.
    #[must_use]
    pub fn range(self) -> ByteRange {
        self.fields().range
    }
}

impl FrameHeader {
    /// The header's bytes, with the checksum over them and `payload`.
    ///
    /// # Panics
    /// When the payload is not as long as the body says, or the range breaks the limits: our own mistake.
    #[must_use]
    pub fn encode(&self, payload: &[u8]) -> [u8; HEADER_BYTES] {
        let fields = self.body.fields();
        assert_eq!(
            self.body.payload_bytes(),
            payload.len() as u64,
            "a frame's payload is as long as its range"
        );
        let mut raw = RawHeader {
            magic: MAGIC,
            kind: fields.kind,
            flags: fields.flags,
            zero: U16::ZERO,
            session: U64::new(self.session.0),
            stream: U32::new(self.stream.0),
            payload_bytes: U32::new(u32::try_from(payload.len()).expect("a payload is within its limit")),
            offset: U64::new(fields.range.offset),
            length: U64::new(fields.range.length),
            epoch: U64::new(fields.epoch),
            number: U64::new(fields.number),
            packing: U32::ZERO,
            crc: U32::ZERO,
        };
        assert!(range_is_sound(&raw), "a frame's range is within its limits: {:?}", self.body);
        let mut crc = crc32fast::Hasher::new();
        // The packing is zero so far.
        crc.update(&raw.as_bytes()[..60]);
        crc.update(payload);
        raw.crc = U32::new(crc.finalize());
        zerocopy::transmute!(raw)
    }

    /// Reads a header. The frame counts only once [`UncheckedFrame::check`] has seen its payload.
    ///
    /// # Errors
    /// [`FrameError`] for bytes that no sender of this version could have made, whatever the checksum.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<UncheckedFrame, FrameError> {
        let raw: RawHeader = zerocopy::transmute!(*bytes);
        if raw.magic != MAGIC {
            return Err(FrameError::NotAFrame);
        }
        if !range_is_sound(&raw) {
            return Err(FrameError::BadRange {
                kind: raw.kind,
                offset: raw.offset.get(),
                length: raw.length.get(),
                payload: raw.payload_bytes.get(),
            });
        }
        let range = ByteRange::new(raw.offset.get(), raw.length.get());
        let (epoch, number) = (Epoch(raw.epoch.get()), raw.number.get());
        let sequence = Sequence(number);
        if matches!(raw.kind, 1..=3) && epoch.0 >= Epoch::LIMIT {
            return Err(FrameError::BadEpoch(epoch.0));
        }
        let body = match raw.kind {
            1 => Body::Write { range, epoch, sequence },
            2 => Body::Zero { range, epoch, sequence, may_unmap: raw.flags & FLAG_MAY_UNMAP != 0 },
            3 => Body::EpochEnd { epoch, sequence, cut: raw.flags & FLAG_CUT != 0 },
            4 => Body::Copy { range, number },
            5 => Body::CopyZero { range, number },
            6 => Body::Digest { range, number },
            7 => Body::Content { range },
            8 => Body::ContentZero { range },
            9 => Body::Generation { generation: generation(epoch.0, number) },
            10 => Body::CopyDigest { range, number },
            11 => Body::Fetched { range, number },
            12 => Body::FetchedZero { range, number },
            kind => return Err(FrameError::UnknownKind(kind)),
        };
        let mut covered = *bytes;
        covered[packing::PLACE].fill(0);
        Ok(UncheckedFrame {
            packed: packing::decode(raw.packing.get(), raw.payload_bytes.get())?,
            header: FrameHeader {
                session: Session(raw.session.get()),
                stream: Stream(raw.stream.get()),
                body,
            },
            payload_bytes: raw.payload_bytes.get(),
            crc_so_far: crc32fast::hash(&covered[..60]),
            crc: raw.crc.get(),
        })
    }
}

/// The 16 bytes of a generation take the places of epoch and number.
fn generation(first: u64, second: u64) -> GenerationId {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&first.to_le_bytes());
    bytes[8..].copy_from_slice(&second.to_le_bytes());
    GenerationId(bytes)
}

fn range_is_sound(raw: &RawHeader) -> bool {
    let (offset, length, payload) = (raw.offset.get(), raw.length.get(), u64::from(raw.payload_bytes.get()));
    if matches!(raw.kind, 3 | 9) {
        return (offset, length, payload) == (0, 0, 0);
    }
    let (has_payload, limit) = match raw.kind {
        1 | 4 | 7 | 11 => (true, u64::from(PAYLOAD_LIMIT_BYTES)),
        6 => (false, crate::units::EXTENT_BYTES),
        10 => (false, u64::from(PAYLOAD_LIMIT_BYTES)),
        _ => (false, ZERO_LIMIT_BYTES),
    };
    length > 0
        && length <= limit
        && payload == if has_payload { length } else { 0 }
        && offset.is_multiple_of(SECTOR_BYTES)
        && length.is_multiple_of(SECTOR_BYTES)
        && offset.checked_add(length).is_some()
}

impl UncheckedFrame {
    /// How many bytes the payload has, once it is unpacked; never more than [`PAYLOAD_LIMIT_BYTES`].
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        self.payload_bytes as usize
    }

    /// How the payload is packed, if it is, and how many bytes follow the header then: fewer than the payload has.
    #[must_use]
    pub fn packed(&self) -> Option<(Packing, usize)> {
        self.packed.map(|(packing, bytes)| (packing, bytes as usize))
    }

    /// What to say of a payload that can't be unpacked.
    #[must_use]
    pub fn not_unpacked(&self) -> FrameError {
        FrameError::NotUnpacked { payload: self.payload_bytes }
    }

    /// The header, now that header and unpacked payload are known to be what the sender's buffer held (P4).
    ///
    /// # Errors
    /// [`FrameError::Damaged`] when the checksum differs.
    pub fn check(self, payload: &[u8]) -> Result<FrameHeader, FrameError> {
        let mut crc = crc32fast::Hasher::new_with_initial_len(self.crc_so_far, 60);
        crc.update(payload);
        let found = crc.finalize();
        if found != self.crc || payload.len() != self.payload_bytes() {
            return Err(FrameError::Damaged { expected: self.crc, found });
        }
        Ok(self.header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header(body: Body) -> FrameHeader {
        FrameHeader { session: Session(7), stream: Stream(2), body }
    }

    fn sample_bodies() -> Vec<(Body, usize)> {
        let range = ByteRange::new(8192, 1024);
        let (epoch, sequence) = (Epoch(3), Sequence(99));
        vec![
            (Body::Write { range, epoch, sequence }, 1024),
            (Body::Zero { range, epoch, sequence, may_unmap: true }, 0),
            (Body::Zero { range, epoch, sequence, may_unmap: false }, 0),
            (Body::EpochEnd { epoch, sequence, cut: false }, 0),
            (Body::Copy { range, number: 5 }, 1024),
            (Body::CopyZero { range, number: 6 }, 0),
            (Body::Digest { range, number: 7 }, 0),
            (Body::Content { range }, 1024),
            (Body::ContentZero { range }, 0),
            (Body::Fetched { range, number: 7 }, 1024),
            (Body::FetchedZero { range, number: 7 }, 0),
            (Body::EpochEnd { epoch, sequence, cut: true }, 0),
            (Body::Generation { generation: GenerationId(*b"0123456789abcdef") }, 0),
            (Body::CopyDigest { range, number: 8 }, 0),
        ]
    }

    #[test]
    fn a_header_has_these_golden_bytes() {
        let body = Body::Write {
            range: ByteRange::new(0x1000, 512),
            epoch: Epoch(0x22),
            sequence: Sequence(0x3333),
        };
        let bytes = header(body).encode(&[0xab; 512]);
        let expected = "424d4631010000000700000000000000020000000002000000100000000000000002000000000000\
                        2200000000000000333300000000000000000000bc7c258a";
        let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(text, expected);
    }

    #[test]
    fn a_request_for_a_digest_has_these_golden_bytes() {
        let bytes = header(Body::CopyDigest { range: ByteRange::new(0x1000, 512), number: 9 }).encode(&[]);
        let expected = "424d46310a0000000700000000000000020000000000000000100000000000000002000000000000\
                        0000000000000000090000000000000000000000acb69887";
        let text: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(text, expected);
    }

    #[test]
    fn every_kind_reads_back_with_its_payload() {
        for (body, length) in sample_bodies() {
            let payload = vec![0x5a; length];
            let unchecked = FrameHeader::decode(&header(body).encode(&payload)).unwrap();
            assert_eq!(unchecked.payload_bytes(), length);
            assert_eq!(unchecked.check(&payload), Ok(header(body)));
        }
    }

    proptest! {
        #[test]
        fn a_flipped_bit_is_never_taken_for_a_frame(which in 0usize..12, bit in 0usize..64 * 8 + 1024 * 8) {
            let (body, length) = sample_bodies()[which];
            let mut bytes = header(body).encode(&vec![0x5a; length]).to_vec();
            bytes.resize(64 + length, 0x5a);
            let bit = bit % (bytes.len() * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            let (head, payload) = bytes.split_at(64);
            let frame = FrameHeader::decode(head.try_into().unwrap()).and_then(|frame| frame.check(payload));
            prop_assert!(frame.is_err(), "{:?}", frame);
        }

        #[test]
        fn garbage_is_refused_without_a_panic(bytes in proptest::collection::vec(any::<u8>(), 64)) {
            let mut head: [u8; 64] = bytes.try_into().unwrap();
            head[..4].copy_from_slice(&MAGIC);
            if let Ok(frame) = FrameHeader::decode(&head) {
                prop_assert!(frame.payload_bytes() <= PAYLOAD_LIMIT_BYTES as usize);
            }
        }
    }
}
