//! The bytes of `/dev/fuse` as values, both ways (`include/uapi/linux/fuse.h`).
//!
//! This is the part of the interface that a mount with one regular file as its root needs, from version 7.34 of it
//! (Linux 5.15) on; the structures are in `layout`.
//!
//! A request is a 40-byte header and a body. All that is ever looked at in a body lies in its first 40 bytes, and
//! exactly 40 bytes of a write's body come before its payload. So a request is read into two pieces of memory, a
//! [`Head`] of 80 bytes and a buffer for what comes after: parsing needs the head alone, and a payload starts where
//! the buffer starts, aligned for direct I/O.

use super::layout::{
    AllocateIn, AttributesOut, InHeader, InitIn, InitOut, OpenIn, OpenOut, OutHeader, SetAttributesIn,
    StatisticsOut, TransferIn, WriteOut,
};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// The request's header and the part of its body that is parsed.
pub type Head = [u8; HEADER_BYTES + BODY_BYTES];

const HEADER_BYTES: usize = 40;
const BODY_BYTES: usize = 40;

/// The interface's major version.
const MAJOR: u32 = 7;
/// The oldest minor version that is served, Linux 5.15's.
const OLDEST_MINOR: u32 = 34;
/// The newest minor version whose layouts are the ones below.
const NEWEST_MINOR: u32 = 38;

/// The most that one write or read carries, in bytes.
pub const MAX_TRANSFER_BYTES: usize = 1 << 20;
const MAX_PAGES: u16 = 256;
/// How many asynchronous requests the kernel sends before it makes their submitters wait. The loop driver has at most
/// 128 under way, of which those over [`MAX_TRANSFER_BYTES`] count twice.
const MAX_BACKGROUND: u16 = 256;

/// The root's node id.
const ROOT: u64 = 1;

/// How long the kernel may believe the attributes, in seconds: they never change.
const ATTRIBUTES_VALID_SECONDS: u64 = u32::MAX as u64;

/// `FUSE_ASYNC_READ`, `FUSE_BIG_WRITES`, `FUSE_ASYNC_DIO` and `FUSE_MAX_PAGES`. No write-back cache.
const FEATURES: u32 = 1 << 0 | 1 << 5 | 1 << 15 | 1 << 22;
/// `FOPEN_DIRECT_IO` and `FOPEN_PARALLEL_DIRECT_WRITES`; kernels before 6.0 ignore the second.
const OPEN_FLAGS: u32 = 1 << 0 | 1 << 6;
/// `FATTR_SIZE`: the size is to be set.
const SET_SIZE: u32 = 1 << 3;

/// What the kernel asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    /// Agree on a version and on features (`FUSE_INIT`).
    Initialise(Offer),
    /// The file's attributes (`FUSE_GETATTR`).
    Attributes,
    /// Change attributes, the size among them where one is given (`FUSE_SETATTR`).
    SetAttributes {
        /// The new size in bytes.
        size: Option<u64>,
    },
    /// Open the file (`FUSE_OPEN`).
    Open {
        /// Whether for writing.
        write: bool,
    },
    /// Read (`FUSE_READ`).
    Read {
        /// The first byte.
        offset: u64,
        /// How many bytes.
        length: u32,
    },
    /// Write the payload (`FUSE_WRITE`).
    Write {
        /// The first byte.
        offset: u64,
        /// How many bytes; the payload is exactly as long.
        length: u32,
    },
    /// Allocate, punch or zero (`FUSE_FALLOCATE`).
    Allocate {
        /// The first byte.
        offset: u64,
        /// How many bytes.
        length: u64,
        /// The `FALLOC_FL_*` bits.
        mode: u32,
    },
    /// Make durable what was written (`FUSE_FSYNC`).
    Synchronise,
    /// The file system's figures (`FUSE_STATFS`).
    Statistics,
    /// Something that needs no work and always succeeds: a descriptor was closed, the file released, the mount
    /// destroyed, rights checked.
    Notice,
    /// Something that gets no reply: an inode forgotten, a request interrupted.
    Silent,
    /// A name in a file that is no folder (`FUSE_LOOKUP`).
    Lookup,
    /// An operation that isn't served, with its number. The kernel has a fallback for each.
    Unknown(u32),
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Received {
    /// The kernel's number for it, repeated in the reply.
    pub unique: u64,
    /// What is asked.
    pub call: Call,
}

/// Bytes that are no request of a version that is served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the kernel's request number {opcode} is {received} bytes long, which does not fit it")]
pub struct Malformed {
    /// The operation's number, or 0 where not even that came.
    opcode: u32,
    received: usize,
}

/// What the kernel offers when a session begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Offer {
    major: u32,
    minor: u32,
    features: u32,
}

#[cfg(test)]
impl Offer {
    /// An offer, for tests.
    pub fn of(major: u32, minor: u32, features: u32) -> Self {
        Self { major, minor, features }
    }
}

/// What was agreed on when the session began: all that is needed to go on serving it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Session {
    minor: u32,
}

/// What was agreed on, as it is kept for another process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    /// The interface's minor version; not 0.
    pub minor: u32,
    /// The features that are used.
    pub features: u32,
    /// The most that one write carries, in bytes.
    pub max_write: u32,
}

/// The kernel's FUSE is too old or too strange.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "the kernel speaks FUSE {}.{} (features {:#x}); Linux 5.15 or newer is needed",
    .0.major, .0.minor, .0.features
)]
pub struct Unserved(Offer);

impl Session {
    /// Agrees on what both sides know.
    ///
    /// # Errors
    /// [`Unserved`] when the kernel lacks something that Linux 5.15 has.
    pub fn negotiate(offer: Offer) -> Result<Self, Unserved> {
        if offer.major != MAJOR || offer.minor < OLDEST_MINOR || offer.features & FEATURES != FEATURES {
            return Err(Unserved(offer));
        }
        Ok(Self { minor: offer.minor.min(NEWEST_MINOR) })
    }

    /// What another process needs to go on with it.
    #[must_use]
    pub fn to_keep(self) -> Kept {
        Kept { minor: self.minor, features: FEATURES, max_write: MAX_TRANSFER_BYTES as u32 }
    }

    /// What another process agreed on, where this version would have agreed on the same.
    #[must_use]
    pub fn of(kept: Kept) -> Option<Self> {
        let session = Self { minor: kept.minor };
        let is_known = (OLDEST_MINOR..=NEWEST_MINOR).contains(&kept.minor);
        (is_known && session.to_keep() == kept).then_some(session)
    }

    /// The body of the reply to `FUSE_INIT`.
    #[must_use]
    pub fn reply(self) -> impl Body {
        InitOut {
            major: MAJOR,
            minor: self.minor,
            max_readahead: 0,
            flags: FEATURES,
            max_background: MAX_BACKGROUND,
            congestion_threshold: MAX_BACKGROUND / 4 * 3,
            max_write: MAX_TRANSFER_BYTES as u32,
            time_granularity: 1,
            max_pages: MAX_PAGES,
            unused: [0; 17],
        }
    }
}

/// The kernel's number for the request that a head is of.
#[must_use]
pub fn unique(head: &Head) -> u64 {
    let (header, _) = InHeader::read_from_prefix(head).expect("a head is longer than a header");
    header.unique
}

/// Parses a request of which `received` bytes came, the first of them in `head`.
///
/// # Errors
/// [`Malformed`] when it is not as long as its header, operation or payload length demands.
pub fn parse(head: &Head, received: usize) -> Result<Received, Malformed> {
    let (header, body) = InHeader::read_from_prefix(head).expect("a head is longer than a header");
    if received < HEADER_BYTES || header.length as usize != received {
        return Err(Malformed { opcode: if received < 8 { 0 } else { header.opcode }, received });
    }
    let body = &body[..BODY_BYTES.min(received - HEADER_BYTES)];
    let call = parse_call(header.opcode, body, received);
    let call = call.ok_or(Malformed { opcode: header.opcode, received })?;
    Ok(Received { unique: header.unique, call })
}

fn parse_call(opcode: u32, body: &[u8], received: usize) -> Option<Call> {
    Some(match opcode {
        1 => Call::Lookup,
        2 | 36 | 42 => Call::Silent,
        3 => Call::Attributes,
        4 => {
            let set: SetAttributesIn = prefix(body)?;
            Call::SetAttributes { size: (set.valid & SET_SIZE != 0).then_some(set.size) }
        }
        14 => {
            let open: OpenIn = prefix(body)?;
            Call::Open { write: open.flags & libc::O_ACCMODE as u32 != libc::O_RDONLY as u32 }
        }
        15 => {
            let read: TransferIn = prefix(body)?;
            Call::Read { offset: read.offset, length: read.size }
        }
        16 => {
            let write: TransferIn = prefix(body)?;
            (received - HEADER_BYTES - BODY_BYTES == write.size as usize).then_some(())?;
            Call::Write { offset: write.offset, length: write.size }
        }
        17 => Call::Statistics,
        18 | 25 | 34 | 38 => Call::Notice,
        20 => Call::Synchronise,
        26 => {
            let InitIn { major, minor, features, .. } = prefix(body)?;
            Call::Initialise(Offer { major, minor, features })
        }
        43 => {
            let AllocateIn { offset, length, mode, .. } = prefix(body)?;
            Call::Allocate { offset, length, mode }
        }
        other => Call::Unknown(other),
    })
}

fn prefix<T: FromBytes>(body: &[u8]) -> Option<T> {
    T::read_from_prefix(body).ok().map(|(value, _)| value)
}

/// Something that is sent as the body of a reply.
pub trait Body: IntoBytes + Immutable {}
impl<T: IntoBytes + Immutable> Body for T {}

/// The header of a reply with `body_bytes` after it; `error` is a positive error number of the kernel, or 0.
#[must_use]
pub fn reply_header(unique: u64, error: i32, body_bytes: usize) -> impl Body {
    let length =
        u32::try_from(size_of::<OutHeader>() + body_bytes).expect("a reply is at most a transfer long");
    OutHeader { length, error: -error, unique }
}

/// The reply to `FUSE_GETATTR` and `FUSE_SETATTR`.
#[must_use]
pub fn attributes(size_bytes: u64, read_only: bool, preferred_bytes: u32) -> impl Body {
    AttributesOut {
        valid_seconds: ATTRIBUTES_VALID_SECONDS,
        valid_nanoseconds: 0,
        padding: 0,
        inode: ROOT,
        size: size_bytes,
        sectors: size_bytes / 512,
        times: [0; 3],
        nanoseconds: [0; 3],
        mode: libc::S_IFREG | if read_only { 0o400 } else { 0o600 },
        links: 1,
        uid: 0,
        gid: 0,
        device: 0,
        preferred_bytes,
        flags: 0,
    }
}

/// The reply to `FUSE_OPEN`.
#[must_use]
pub fn opened() -> impl Body {
    OpenOut { handle: 0, flags: OPEN_FLAGS, unused: 0 }
}

/// The reply to `FUSE_WRITE`.
#[must_use]
pub fn written(length: u32) -> impl Body {
    WriteOut { length, padding: 0 }
}

/// The reply to `FUSE_STATFS`. The loop driver takes the granularity of its discards from the block size.
#[must_use]
pub fn statistics(size_bytes: u64) -> impl Body {
    const BLOCK_BYTES: u32 = 4096;
    StatisticsOut {
        blocks: size_bytes / u64::from(BLOCK_BYTES),
        free_blocks: 0,
        available_blocks: 0,
        files: 1,
        free_files: 0,
        block_bytes: BLOCK_BYTES,
        name_bytes: 255,
        fragment_bytes: BLOCK_BYTES,
        padding: [0; 7],
    }
}

const _: () = {
    assert!(size_of::<InHeader>() == HEADER_BYTES);
    assert!(size_of::<TransferIn>() == BODY_BYTES);
    assert!(MAX_PAGES as usize * 4096 == MAX_TRANSFER_BYTES);
};

#[cfg(test)]
mod tests {
    use super::*;

    /// A request as the kernel sends it, its numbers in the order of the C structs.
    fn request(opcode: u32, body: &[&[u8]], payload_bytes: usize) -> (Head, usize) {
        let body = body.concat();
        let received = HEADER_BYTES + body.len() + payload_bytes;
        let mut bytes = Vec::new();
        bytes.extend((received as u32).to_ne_bytes());
        bytes.extend(opcode.to_ne_bytes());
        bytes.extend(77u64.to_ne_bytes());
        bytes.extend([0; 24]);
        bytes.extend(body);
        bytes.resize(bytes.len().max(80), 0xee);
        (bytes[..80].try_into().expect("80 bytes"), received)
    }

    fn call(opcode: u32, body: &[&[u8]], payload_bytes: usize) -> Option<Call> {
        let (head, received) = request(opcode, body, payload_bytes);
        parse(&head, received).ok().map(|received| {
            assert_eq!(received.unique, 77);
            received.call
        })
    }

    fn long(number: u64) -> [u8; 8] {
        number.to_ne_bytes()
    }

    fn short(number: u32) -> [u8; 4] {
        number.to_ne_bytes()
    }

    #[test]
    fn each_request_of_the_kernel_is_understood() {
        let transfer: [&[u8]; 5] = [&long(0), &long(8192), &short(4096), &short(0), &[0; 16]];
        assert_eq!(call(15, &transfer, 0), Some(Call::Read { offset: 8192, length: 4096 }));
        assert_eq!(call(16, &transfer, 4096), Some(Call::Write { offset: 8192, length: 4096 }));
        let open = |flags: i32| call(14, &[&short(flags as u32), &short(0)], 0);
        assert_eq!(open(libc::O_RDONLY | libc::O_CLOEXEC), Some(Call::Open { write: false }));
        assert_eq!(open(libc::O_WRONLY), Some(Call::Open { write: true }));
        assert_eq!(open(libc::O_RDWR), Some(Call::Open { write: true }));
        let allocate: [&[u8]; 5] = [&long(0), &long(512), &long(1 << 40), &short(3), &short(0)];
        let expected = Call::Allocate { offset: 512, length: 1 << 40, mode: 3 };
        assert_eq!(call(43, &allocate, 0), Some(expected));
        let set = |valid| call(4, &[&short(valid), &short(0), &long(0), &long(9), &[0; 64]], 0);
        assert_eq!(set(SET_SIZE | 1), Some(Call::SetAttributes { size: Some(9) }));
        assert_eq!(set(1 << 5), Some(Call::SetAttributes { size: None }));
        let offer = Offer { major: 7, minor: 34, features: 0xffff_ffff };
        let init = call(26, &[&short(7), &short(34), &short(0), &short(0xffff_ffff)], 0);
        assert_eq!(init, Some(Call::Initialise(offer)));
        for (opcode, expected) in [
            (1, Call::Lookup),
            (2, Call::Silent),
            (3, Call::Attributes),
            (17, Call::Statistics),
            (18, Call::Notice),
            (20, Call::Synchronise),
            (22, Call::Unknown(22)),
            (25, Call::Notice),
            (36, Call::Silent),
            (42, Call::Silent),
            (9999, Call::Unknown(9999)),
        ] {
            assert_eq!(call(opcode, &[&[0; 40]], 0), Some(expected), "{opcode}");
        }
    }

    #[test]
    fn a_request_of_the_wrong_length_is_refused() {
        let transfer: [&[u8]; 5] = [&long(0), &long(8192), &short(4096), &short(0), &[0; 16]];
        for (opcode, body, payload) in [
            (15, &transfer[..4], 0),
            (16, &transfer[..], 4095),
            (16, &transfer[..], 0),
            (16, &transfer[..4], 0),
            (43, &transfer[..3], 0),
            (14, &[][..], 0),
            (26, &[][..], 0),
        ] {
            assert_eq!(call(opcode, body, payload), None, "{opcode}");
        }
        let (head, received) = request(3, &[&[0; 16]], 0);
        assert_eq!(parse(&head, received - 1), Err(Malformed { opcode: 3, received: received - 1 }));
        assert_eq!(parse(&head, 4), Err(Malformed { opcode: 0, received: 4 }));
    }

    #[test]
    fn a_session_needs_what_linux_5_15_has_and_ignores_what_is_newer() {
        let offer = |major, minor, features| Session::negotiate(Offer { major, minor, features });
        assert_eq!(offer(7, 34, FEATURES), Ok(Session { minor: 34 }));
        assert_eq!(offer(7, 99, u32::MAX), Ok(Session { minor: NEWEST_MINOR }));
        assert!(offer(7, 33, u32::MAX).is_err());
        assert!(offer(8, 0, u32::MAX).is_err());
        assert!(offer(7, 34, FEATURES & !1).is_err());
    }

    #[test]
    fn replies_are_the_bytes_that_the_kernel_expects() {
        let header = reply_header(77, libc::EIO, 8);
        assert_eq!(header.as_bytes(), [&short(24)[..], &(-5i32).to_ne_bytes(), &long(77)].concat());
        let open = opened();
        assert_eq!(open.as_bytes(), [&long(0)[..], &short(0x41), &short(0)].concat());
        let init = Session { minor: 36 }.reply();
        let expected: [&[u8]; 10] = [
            &short(7),
            &short(36),
            &short(0),
            &short(0x0040_8021),
            &256u16.to_ne_bytes(),
            &192u16.to_ne_bytes(),
            &short(1 << 20),
            &short(1),
            &256u16.to_ne_bytes(),
            &[0; 34],
        ];
        assert_eq!(init.as_bytes(), expected.concat());
    }
}
