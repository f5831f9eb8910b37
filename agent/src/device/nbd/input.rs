//! What was read from a client's socket and not yet looked at.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use tokio::io::{AsyncRead, ReadBuf};

/// How much one read of the socket may bring, in bytes: 31 writes of 4 KiB at once.
const CAPACITY: usize = 128 << 10;

/// A read buffer that is filled at its end and emptied from its front.
pub(super) struct Input {
    bytes: Box<[u8]>,
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn new() -> Self {
        Self { bytes: vec![0; CAPACITY].into_boxed_slice(), start: 0, end: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.end - self.start
    }

    pub(super) fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The next `N` bytes, once all of them are here.
    pub(super) fn take_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let array = *self.bytes[self.start..self.end].first_chunk()?;
        self.start += N;
        Some(array)
    }

    /// Up to `limit` bytes of what is here.
    pub(super) fn take(&mut self, limit: usize) -> &[u8] {
        let taken = self.start..self.start + self.len().min(limit);
        self.start = taken.end;
        &self.bytes[taken]
    }

    /// Reads from the socket what there is, up to `limit` bytes; 0 at its end.
    ///
    /// # Panics
    /// When there is no room: whoever calls this has taken all that makes up a whole message.
    pub(super) fn poll_fill<S: AsyncRead + Unpin>(
        &mut self,
        socket: &mut S,
        cx: &mut Context<'_>,
        limit: usize,
    ) -> Poll<io::Result<usize>> {
        self.bytes.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.len());
        let room = limit.min(CAPACITY - self.end);
        assert!(room > 0, "there is room for more input");
        let count = ready!(poll_read(socket, cx, &mut self.bytes[self.end..self.end + room]))?;
        self.end += count;
        Poll::Ready(Ok(count))
    }
}

/// Reads from the socket what there is; 0 at its end.
pub(super) fn poll_read<S: AsyncRead + Unpin>(
    socket: &mut S,
    cx: &mut Context<'_>,
    target: &mut [u8],
) -> Poll<io::Result<usize>> {
    let mut target = ReadBuf::new(target);
    ready!(Pin::new(socket).poll_read(cx, &mut target))?;
    Poll::Ready(Ok(target.filled().len()))
}
