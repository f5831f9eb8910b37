//! Control streams: messages in both directions.

use super::error::{ReceiveError, SendError};
use super::frames::{FrameReceiver, FrameSender};
use super::stream::{Inbound, Outbound, Priority};
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::{LENGTH_BYTES, Message, decode_length};

/// Sends messages. Dropped, it ends the stream; what was sent still arrives while the connection lasts.
#[derive(Debug)]
pub struct ControlSender {
    stream: Outbound,
}

/// Receives messages. Dropped, it tells the peer to send no more.
#[derive(Debug)]
pub struct ControlReceiver {
    stream: Inbound,
    length: [u8; LENGTH_BYTES],
    length_filled: usize,
    body: Option<Vec<u8>>,
    body_filled: usize,
}

impl ControlSender {
    pub(super) fn new(stream: Outbound) -> Self {
        Self { stream }
    }

    /// Sends a message. It has left when this returns, as far as the windows allow; it has not arrived.
    ///
    /// Cancel-safe in that nothing is torn: a message once given goes out whole, with the next call if need be.
    ///
    /// # Errors
    /// [`SendError`] when the connection is lost or the peer does not read any longer.
    pub async fn send(&mut self, message: &Message) -> Result<(), SendError> {
        self.stream.queue(message.encode()?.into());
        self.stream.flush().await
    }

    /// Waits until the peer listens no more, or the connection is lost.
    pub fn refused(&self) -> impl Future<Output = SendError> + 'static + use<> {
        self.stream.refused()
    }

    /// Ends the stream and waits until the peer's host has everything, so that the connection may be closed.
    ///
    /// # Errors
    /// As for [`ControlSender::send`].
    pub async fn finish(mut self) -> Result<(), SendError> {
        self.stream.finish().await
    }

    /// Sends a last message, and sees to it that it arrives while the connection lasts: in a task of its own, because a
    /// host that has just died is waited for until the connection is given up, and the caller has better to do.
    ///
    /// A peer that may be sending too must not be told to stop before it has the message: then `receiver` is kept until
    /// it does.
    ///
    /// # Panics
    /// Outside of a tokio runtime.
    pub fn end_with(mut self, message: impl Into<Message>, receiver: Option<ControlReceiver>) {
        let message = message.into();
        tokio::spawn(async move {
            if self.send(&message).await.is_ok() {
                // An error means that the peer has gone.
                let _ = self.finish().await;
            }
            drop(receiver);
        });
    }

    /// Goes on with frames instead of messages: the answer to a read. They have the priority of bulk.
    #[must_use]
    pub fn into_frames(self) -> FrameSender {
        self.stream.set_priority(Priority::Bulk);
        FrameSender::new(self.stream)
    }

    /// As [`ControlSender::into_frames`], for what an application waits for.
    #[must_use]
    pub fn into_awaited_frames(self) -> FrameSender {
        self.stream.set_priority(Priority::Live);
        FrameSender::new(self.stream)
    }
}

impl ControlReceiver {
    pub(super) fn new(stream: Inbound) -> Self {
        Self { stream, length: [0; LENGTH_BYTES], length_filled: 0, body: None, body_filled: 0 }
    }

    /// The host that sends.
    #[must_use]
    pub fn peer(&self) -> HostId {
        self.stream.peer()
    }

    /// Waits for the next message. Cancel-safe.
    ///
    /// # Errors
    /// [`ReceiveError`]; after one nothing more comes.
    pub async fn receive(&mut self) -> Result<Message, ReceiveError> {
        loop {
            if let Some(message) = self.assemble()? {
                return Ok(message);
            }
            let between = self.length_filled == 0;
            self.stream.refill(between).await?;
        }
    }

    /// Goes on with frames instead of messages: the answer to a read.
    ///
    /// # Panics
    /// When a message was received in part, which [`ControlReceiver::receive`] leaves only when it fails or is
    /// cancelled.
    #[must_use]
    pub fn into_frames(self) -> FrameReceiver {
        assert_eq!(self.length_filled, 0, "frames begin after a whole message");
        FrameReceiver::new(self.stream)
    }

    fn assemble(&mut self) -> Result<Option<Message>, ReceiveError> {
        let peer = self.peer();
        let body = match &mut self.body {
            Some(body) => body,
            None => {
                self.length_filled += self.stream.take_into(&mut self.length[self.length_filled..]);
                if self.length_filled < LENGTH_BYTES {
                    return Ok(None);
                }
                let length =
                    decode_length(self.length).map_err(|error| ReceiveError::misbehaved(peer, error))?;
                self.body.insert(vec![0; length])
            }
        };
        self.body_filled += self.stream.take_into(&mut body[self.body_filled..]);
        if self.body_filled < body.len() {
            return Ok(None);
        }
        let message = Message::decode(body).map_err(|error| ReceiveError::misbehaved(peer, error))?;
        (self.body, self.body_filled, self.length_filled) = (None, 0, 0);
        Ok(Some(message))
    }
}
