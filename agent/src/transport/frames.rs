//! Streams of frames.
//!
//! A sender hands the caller's own memory to the connection, which keeps it until the peer has acknowledged it. A
//! receiver copies each payload once, from the packets into an aligned buffer that can go to the disk as it is, and
//! checks the frame's checksum over that very memory (P4). A packed payload is unpacked in between.

use super::error::{Misbehaviour, ReceiveError, SendError};
use super::packing::Unpacker;
use super::stream::{Inbound, Outbound};
use crate::buffer::{Buffer, BufferPool};
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::preamble::PREAMBLE_BYTES;
use blockmirror_protocol::wire::{FrameHeader, HEADER_BYTES, StreamPreamble, UncheckedFrame};
use bytes::Bytes;

/// Sends frames. Dropped without [`FrameSender::finish`], it gives the stream up: what has not arrived by then will
/// not, as a voided live stream wants (R1).
#[derive(Debug)]
pub struct FrameSender {
    stream: Outbound,
    finished: bool,
}

/// Receives frames. Dropped, it tells the peer to send no more.
#[derive(Debug)]
pub struct FrameReceiver {
    stream: Inbound,
    head: [u8; HEADER_BYTES],
    head_filled: usize,
    payload: Option<Payload>,
    unpacker: Unpacker,
}

/// A frame whose header is there and whose payload is on its way.
#[derive(Debug)]
struct Payload {
    frame: UncheckedFrame,
    /// As it is sent: packed, or not.
    buffer: Buffer,
    filled: usize,
}

impl FrameSender {
    pub(super) fn new(stream: Outbound) -> Self {
        Self { stream, finished: false }
    }

    pub(super) fn queue_preamble(&mut self, preamble: &StreamPreamble) {
        self.stream.queue(Bytes::copy_from_slice(&preamble.encode()));
    }

    /// Puts a frame behind those that wait for [`FrameSender::flush`], without waiting itself: several frames go out
    /// best together. `payload` is not copied.
    pub fn queue(&mut self, header: &[u8; HEADER_BYTES], payload: Bytes) {
        self.stream.queue(Bytes::copy_from_slice(header));
        self.stream.queue(payload);
    }

    /// How many bytes wait for [`FrameSender::flush`].
    #[must_use]
    pub fn queued_bytes(&self) -> usize {
        self.stream.queued_bytes()
    }

    /// Hands the frames that wait over to the connection, as its windows allow. They have left when this returns, as
    /// far as the windows allow; they have not arrived. Cancel-safe: what is left goes out with the next call.
    ///
    /// # Errors
    /// [`SendError`] when the connection is lost or the peer does not read any longer.
    pub async fn flush(&mut self) -> Result<(), SendError> {
        self.stream.flush().await
    }

    /// Sends a frame: [`FrameSender::queue`] and [`FrameSender::flush`].
    ///
    /// # Errors
    /// As for [`FrameSender::flush`].
    pub async fn send(&mut self, header: &[u8; HEADER_BYTES], payload: Bytes) -> Result<(), SendError> {
        self.queue(header, payload);
        self.flush().await
    }

    /// Waits until the peer wants no more of this stream, or the connection is lost: a stream on which nothing is sent tells
    /// of that by nothing else. The answer outlives the sender.
    pub fn refused(&self) -> impl Future<Output = SendError> + 'static + use<> {
        self.stream.refused()
    }

    /// Declares the stream complete and waits until the peer's host has all of it.
    ///
    /// # Errors
    /// As for [`FrameSender::flush`].
    pub async fn finish(mut self) -> Result<(), SendError> {
        self.stream.finish().await?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for FrameSender {
    fn drop(&mut self) {
        if !self.finished {
            self.stream.abandon();
        }
    }
}

impl FrameReceiver {
    pub(super) fn new(stream: Inbound) -> Self {
        Self { stream, head: [0; HEADER_BYTES], head_filled: 0, payload: None, unpacker: Unpacker::default() }
    }

    /// The host that sends.
    #[must_use]
    pub fn peer(&self) -> HostId {
        self.stream.peer()
    }

    /// Waits for the next frame, whose payload it puts into a buffer of `pool`. Cancel-safe.
    ///
    /// # Errors
    /// [`ReceiveError`]; after one nothing more comes.
    pub async fn receive(&mut self, pool: &BufferPool) -> Result<(FrameHeader, Bytes), ReceiveError> {
        loop {
            if let Some(frame) = self.assemble(pool)? {
                return Ok(frame);
            }
            let between = self.head_filled == 0;
            self.stream.refill(between).await?;
        }
    }

    /// The next frame, if it came together with the one before.
    ///
    /// # Errors
    /// As for [`FrameReceiver::receive`].
    pub fn receive_now(&mut self, pool: &BufferPool) -> Result<Option<(FrameHeader, Bytes)>, ReceiveError> {
        self.assemble(pool)
    }

    /// Waits for what a one-way stream begins with. Cancel-safe.
    pub(super) async fn preamble(&mut self) -> Result<StreamPreamble, ReceiveError> {
        loop {
            self.head_filled += self.stream.take_into(&mut self.head[self.head_filled..PREAMBLE_BYTES]);
            if let Some(bytes) = self.head[..self.head_filled].first_chunk() {
                self.head_filled = 0;
                return StreamPreamble::decode(bytes).map_err(|error| self.misbehaved(error));
            }
            self.stream.refill(false).await?;
        }
    }

    fn assemble(&mut self, pool: &BufferPool) -> Result<Option<(FrameHeader, Bytes)>, ReceiveError> {
        if self.payload.is_none() && !self.begin_payload(pool)? {
            return Ok(None);
        }
        let payload = self.payload.as_mut().expect("a payload was begun");
        payload.filled += self.stream.take_into(&mut payload.buffer[payload.filled..]);
        if payload.filled < payload.buffer.len() {
            return Ok(None);
        }
        let Payload { frame, mut buffer, .. } = self.payload.take().expect("a payload was begun");
        self.head_filled = 0;
        if let Some((packing, _)) = frame.packed() {
            let packed = std::mem::replace(&mut buffer, pool.take(frame.payload_bytes()));
            let unpacked = self.unpacker.unpack(&frame, packing, &packed, &mut buffer);
            unpacked.map_err(|error| self.misbehaved(error))?;
        }
        let header = frame.check(&buffer).map_err(|error| self.misbehaved(error))?;
        Ok(Some((header, if buffer.is_empty() { Bytes::new() } else { buffer.freeze() })))
    }

    /// Reads a header, if all of it is there. Its limits were checked before a buffer of its size is taken.
    fn begin_payload(&mut self, pool: &BufferPool) -> Result<bool, ReceiveError> {
        self.head_filled += self.stream.take_into(&mut self.head[self.head_filled..]);
        if self.head_filled < HEADER_BYTES {
            return Ok(false);
        }
        let frame = FrameHeader::decode(&self.head).map_err(|error| self.misbehaved(error))?;
        let buffer = pool.take(frame.packed().map_or(frame.payload_bytes(), |(_, bytes)| bytes));
        self.payload = Some(Payload { frame, buffer, filled: 0 });
        Ok(true)
    }

    fn misbehaved(&self, how: impl Into<Misbehaviour>) -> ReceiveError {
        ReceiveError::misbehaved(self.peer(), how)
    }
}
