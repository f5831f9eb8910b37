//! Replies on their way to the client: built from the volume's answers, written many at a time.

use super::negotiate::{ALLOCATION_ID, Agreed};
use super::request::PAYLOAD_LIMIT_BYTES;
use crate::buffer::Buffer;
use crate::device::{Answer, Errno, Part};
use blockmirror_protocol::nbd::transmission::{
    CommandFlags, CommandKind, DATA_HEAD_BYTES, Descriptor, Failure, RequestHeader, SimpleReply, data_head,
    error_chunk, status_head,
};
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::AsyncWrite;

/// How many pieces one write of the socket gathers: head and body of 64 replies.
const PIECES: usize = 128;

/// The most parts that one block status reply tells; the client asks again for the rest.
const PARTS_LIMIT: usize = 16 << 10;

/// Big enough for the head of any reply.
const HEAD_BYTES: usize = DATA_HEAD_BYTES;

/// A reply as bytes. The head lies in the frame itself, the body where the volume left it.
pub(super) struct Frame {
    head: [u8; HEAD_BYTES],
    head_length: usize,
    body: Body,
    /// What its request took of the connection's memory, in bytes; given back when it is written.
    memory_bytes: u64,
}

enum Body {
    None,
    Data(Buffer),
    Descriptors(Vec<u8>),
}

impl Frame {
    fn new(start: &[u8], body: Body) -> Self {
        let mut head = [0; HEAD_BYTES];
        head[..start.len()].copy_from_slice(start);
        Self { head, head_length: start.len(), body, memory_bytes: 0 }
    }

    /// The same frame, which keeps so many bytes of the connection's memory until it is written.
    pub(super) fn holding(self, memory_bytes: u64) -> Self {
        Self { memory_bytes, ..self }
    }

    /// The reply to a request that the volume has answered.
    ///
    /// # Panics
    /// When the answer is not of the request's kind: the volume is ours.
    pub(super) fn answering(request: &RequestHeader, agreed: Agreed, answer: Result<Answer, Errno>) -> Self {
        match answer {
            Ok(Answer::Done) => {
                assert!(
                    !matches!(request.kind, CommandKind::Read | CommandKind::BlockStatus),
                    "a question is answered with more than that it was asked"
                );
                Self::succeeded(request.cookie)
            }
            Ok(Answer::Data(data)) => Self::data(request, agreed, data),
            Ok(Answer::Allocation(parts)) => Self::allocation(request, &parts),
            Err(errno) => Self::failed(request.cookie, agreed, failure_of(errno)),
        }
    }

    /// The reply to a request that has no other answer than that it is done.
    pub(super) fn succeeded(cookie: u64) -> Self {
        Self::new(&SimpleReply { failure: None, cookie }.encode(), Body::None)
    }

    /// The reply to a request that failed.
    pub(super) fn failed(cookie: u64, agreed: Agreed, failure: Failure) -> Self {
        if agreed.structured {
            Self::new(&error_chunk(cookie, failure), Body::None)
        } else {
            Self::new(&SimpleReply { failure: Some(failure), cookie }.encode(), Body::None)
        }
    }

    fn data(request: &RequestHeader, agreed: Agreed, data: Buffer) -> Self {
        assert_eq!(request.kind, CommandKind::Read, "only a read is answered with data");
        assert_eq!(
            data.len(),
            request.length as usize,
            "a read is answered with as many bytes as it asked for"
        );
        if agreed.structured {
            let head = data_head(request.cookie, request.offset, request.length);
            Self::new(&head, Body::Data(data))
        } else {
            let head = SimpleReply { failure: None, cookie: request.cookie }.encode();
            Self::new(&head, Body::Data(data))
        }
    }

    fn allocation(request: &RequestHeader, parts: &[Part]) -> Self {
        assert_eq!(request.kind, CommandKind::BlockStatus, "only a question for parts is answered with them");
        assert!(!parts.is_empty(), "the allocation of a range has at least one part");
        assert!(
            parts.iter().map(|part| part.length).sum::<u64>() <= u64::from(request.length),
            "the parts of a range are together no longer than the range"
        );
        let one = request.flags.contains(CommandFlags::ONE_DESCRIPTOR);
        let told = &parts[..parts.len().min(if one { 1 } else { PARTS_LIMIT })];
        let descriptors: Vec<u8> = told.iter().flat_map(|part| descriptor(*part).encode()).collect();
        let head = status_head(request.cookie, ALLOCATION_ID, told.len() as u32);
        Self::new(&head, Body::Descriptors(descriptors))
    }

    fn pieces(&self) -> [&[u8]; 2] {
        let body: &[u8] = match &self.body {
            Body::None => &[],
            Body::Data(data) => data,
            Body::Descriptors(descriptors) => descriptors,
        };
        [&self.head[..self.head_length], body]
    }

    fn len(&self) -> usize {
        self.pieces().iter().map(|piece| piece.len()).sum()
    }
}

fn descriptor(part: Part) -> Descriptor {
    let flags = if part.hole { Descriptor::HOLE | Descriptor::ZERO } else { 0 };
    Descriptor { length: u32::try_from(part.length).expect("no part is longer than its range"), flags }
}

/// The protocol knows few errors; what it has no word for is an I/O error.
fn failure_of(errno: Errno) -> Failure {
    match errno.0 {
        libc::EPERM | libc::EACCES | libc::EROFS => Failure::NotPermitted,
        libc::ENOMEM => Failure::NoMemory,
        libc::EINVAL => Failure::Invalid,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => Failure::NoSpace,
        libc::EOVERFLOW => Failure::Overflow,
        libc::EOPNOTSUPP => Failure::NotSupported,
        libc::ESHUTDOWN => Failure::ShuttingDown,
        _ => Failure::Io,
    }
}

/// The replies that were not yet written, in the order in which they will be.
#[derive(Default)]
pub(super) struct Outgoing {
    frames: VecDeque<Frame>,
    /// How much of the first frame was written.
    written: usize,
    memory_bytes: u64,
    sent_bytes: u64,
}

impl Outgoing {
    pub(super) fn push(&mut self, frame: Frame) {
        self.memory_bytes += frame.memory_bytes;
        self.frames.push_back(frame);
    }

    pub(super) fn len(&self) -> usize {
        self.frames.len()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// How many bytes the socket has taken so far.
    pub(super) fn sent_bytes(&self) -> u64 {
        self.sent_bytes
    }

    /// How much of the connection's memory the frames keep, in bytes.
    pub(super) fn memory_bytes(&self) -> u64 {
        self.memory_bytes
    }

    /// Writes all there is, as much at a time as the socket takes. Ready when nothing is left, here or in a socket that
    /// encrypts.
    pub(super) fn poll_send<S: AsyncWrite + Unpin>(
        &mut self,
        socket: &mut S,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<()>> {
        while !self.is_empty() {
            let mut pieces = [IoSlice::new(&[]); PIECES];
            let count = self.gather(&mut pieces);
            let written = ready!(Pin::new(&mut *socket).poll_write_vectored(cx, &pieces[..count]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.advance(written);
        }
        Pin::new(socket).poll_flush(cx)
    }

    /// Puts what comes next into `pieces` and says how many it became.
    fn gather<'a>(&'a self, pieces: &mut [IoSlice<'a>; PIECES]) -> usize {
        let mut count = 0;
        let mut skip = self.written;
        for piece in self.frames.iter().take(PIECES / 2).flat_map(Frame::pieces) {
            let skipped = skip.min(piece.len());
            skip -= skipped;
            if skipped < piece.len() {
                pieces[count] = IoSlice::new(&piece[skipped..]);
                count += 1;
            }
        }
        count
    }

    fn advance(&mut self, written: usize) {
        self.written += written;
        self.sent_bytes += written as u64;
        while let Some(first) = self.frames.front()
            && first.len() <= self.written
        {
            self.written -= first.len();
            self.memory_bytes -= first.memory_bytes;
            self.frames.pop_front();
        }
    }
}

const _: () = assert!(PAYLOAD_LIMIT_BYTES as u64 + 8 <= u32::MAX as u64, "a read fits into one chunk");
