//! The two directions of a QUIC stream, under messages and frames alike.
//!
//! Both keep what is unfinished in themselves, not in a future: a caller that stops waiting loses nothing, and goes on
//! with its next call.

use super::error::{Lost, Misbehaviour, ReceiveError, SendError};
use crate::busy_poll;
use blockmirror_protocol::units::HostId;
use bytes::{Buf, Bytes};
use quinn::{ReadError, RecvStream, SendStream, StoppedError, VarInt, WriteError};

/// The code of a stream that its sender gave up.
const ABANDONED: VarInt = VarInt::from_u32(1);

/// How many pieces are taken from a connection at a time: as much as some wake-ups bring, in one locking.
const PIECES: usize = 64;

/// Which streams' bytes go out first: higher numbers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Priority {
    Bulk = 0,
    Live = 1,
    Control = 2,
}

/// The sending direction.
#[derive(Debug)]
pub(super) struct Outbound {
    quic: SendStream,
    peer: HostId,
    queue: Vec<Bytes>,
    /// How many of the queue's pieces were handed over.
    sent: usize,
}

impl Outbound {
    pub(super) fn new(quic: SendStream, peer: HostId, priority: Priority) -> Self {
        let stream = Self { quic, peer, queue: Vec::new(), sent: 0 };
        stream.set_priority(priority);
        stream
    }

    /// It has no effect on a stream that is closed already, where none is needed.
    pub(super) fn set_priority(&self, priority: Priority) {
        let _ = self.quic.set_priority(priority as i32);
    }

    /// Puts a piece behind those that wait to be sent.
    pub(super) fn queue(&mut self, piece: Bytes) {
        if !piece.is_empty() {
            self.queue.push(piece);
        }
    }

    pub(super) fn queued_bytes(&self) -> usize {
        self.queue[self.sent..].iter().map(Bytes::len).sum()
    }

    /// Hands everything that waits over to the connection, as its windows allow. Cancel-safe.
    pub(super) async fn flush(&mut self) -> Result<(), SendError> {
        while self.sent < self.queue.len() {
            let written = self.quic.write_chunks(&mut self.queue[self.sent..]).await;
            self.sent += written.map_err(|error| self.failure(error))?.chunks;
        }
        self.queue.clear();
        self.sent = 0;
        Ok(())
    }

    /// Sends what waits, declares the stream complete, and waits until the peer's host has all of it.
    pub(super) async fn finish(&mut self) -> Result<(), SendError> {
        self.flush().await?;
        if self.quic.finish().is_err() {
            return Err(SendError::Stopped(self.peer));
        }
        match self.quic.stopped().await {
            Ok(None) => Ok(()),
            Ok(Some(_)) | Err(StoppedError::ZeroRttRejected) => Err(SendError::Stopped(self.peer)),
            Err(StoppedError::ConnectionLost(source)) => Err(Lost { peer: self.peer, source }.into()),
        }
    }

    /// Waits until the peer wants no more of this stream, or the connection is lost.
    pub(super) fn refused(&self) -> impl Future<Output = SendError> + 'static + use<> {
        let (stopped, peer) = (self.quic.stopped(), self.peer);
        async move {
            match stopped.await {
                Err(StoppedError::ConnectionLost(source)) => Lost { peer, source }.into(),
                Ok(_) | Err(StoppedError::ZeroRttRejected) => SendError::Stopped(peer),
            }
        }
    }

    /// Gives the stream up: what has not arrived yet will not. It has no effect on a stream that has ended.
    pub(super) fn abandon(&mut self) {
        let _ = self.quic.reset(ABANDONED);
    }

    fn failure(&self, error: WriteError) -> SendError {
        match error {
            WriteError::ConnectionLost(source) => Lost { peer: self.peer, source }.into(),
            WriteError::Stopped(_) | WriteError::ClosedStream | WriteError::ZeroRttRejected => {
                SendError::Stopped(self.peer)
            }
        }
    }
}

/// The receiving direction.
#[derive(Debug)]
pub(super) struct Inbound {
    quic: RecvStream,
    peer: HostId,
    pieces: Vec<Bytes>,
    /// The first piece with unread bytes, and the end of those that were received.
    unread: std::ops::Range<usize>,
}

impl Inbound {
    pub(super) fn new(quic: RecvStream, peer: HostId) -> Self {
        Self { quic, peer, pieces: vec![Bytes::new(); PIECES], unread: 0..0 }
    }

    pub(super) fn peer(&self) -> HostId {
        self.peer
    }

    /// Copies as much of what has come as `target` holds; gives how much that was.
    pub(super) fn take_into(&mut self, target: &mut [u8]) -> usize {
        let mut taken = 0;
        while taken < target.len() && !self.unread.is_empty() {
            let piece = &mut self.pieces[self.unread.start];
            let count = piece.len().min(target.len() - taken);
            piece.copy_to_slice(&mut target[taken..taken + count]);
            taken += count;
            if piece.is_empty() {
                *piece = Bytes::new();
                self.unread.start += 1;
            }
        }
        taken
    }

    /// Waits for more bytes. `between` says whether the stream may end here, between two messages or frames.
    /// Cancel-safe.
    pub(super) async fn refill(&mut self, between: bool) -> Result<(), ReceiveError> {
        debug_assert!(self.unread.is_empty(), "everything that came before was taken");
        match self.quic.read_chunks(&mut self.pieces).await {
            Ok(Some(count)) => {
                busy_poll::note_event();
                self.unread = 0..count;
                Ok(())
            }
            Ok(None) if between => Err(ReceiveError::Ended(self.peer)),
            Ok(None) => Err(ReceiveError::misbehaved(self.peer, Misbehaviour::Unfinished)),
            Err(ReadError::ConnectionLost(source)) => Err(Lost { peer: self.peer, source }.into()),
            Err(
                ReadError::Reset(_)
                | ReadError::ClosedStream
                | ReadError::IllegalOrderedRead
                | ReadError::ZeroRttRejected,
            ) => Err(ReceiveError::Abandoned(self.peer)),
        }
    }
}
