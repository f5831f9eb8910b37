//! What a primary lacks of its own copy is read here for it (S4).

use super::Replica;
use crate::buffer::is_zero;
use crate::storage;
use crate::transport::{ControlSender, SendError};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::replica::NotLent;
use blockmirror_protocol::terms::Fence;
use blockmirror_protocol::units::{Session, Stream};
use blockmirror_protocol::wire::message::Fetching;
use blockmirror_protocol::wire::{Body, FrameHeader};
use bytes::Bytes;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Where the answers of a session wait to be sent: those that somebody waits for, and all others.
pub(super) struct Answers([(UnboundedSender<Answer>, Option<UnboundedReceiver<Answer>>); 2]);

impl Default for Answers {
    fn default() -> Self {
        Self([(); 2].map(|()| {
            let (queue, source) = unbounded_channel();
            (queue, Some(source))
        }))
    }
}

impl Answers {
    pub(super) fn queue(&self, is_awaited: bool) -> UnboundedSender<Answer> {
        self.0[usize::from(is_awaited)].0.clone()
    }

    /// What is to be sent; once.
    fn take(&mut self, is_awaited: bool) -> Option<UnboundedReceiver<Answer>> {
        self.0[usize::from(is_awaited)].1.take()
    }
}

/// The answer to one fetch.
pub(super) struct Answer {
    header: FrameHeader,
    payload: Bytes,
    number: u64,
}

impl Replica {
    /// A primary with this fence goes on from this copy, while a recovery keeps all others away. Says whether that is recorded.
    ///
    /// # Errors
    /// [`NotLent`].
    pub async fn lend(&self, fence: Fence) -> Result<bool, NotLent> {
        self.drive(|inner| inner.machine.lend(fence))?;
        self.settle().await;
        Ok(self.inner.borrow().machine.is_lent_to(fence))
    }

    /// Reads what the primary asked for, and hands it to the session.
    pub(super) async fn read_content(
        &self,
        session: Session,
        number: u64,
        range: ByteRange,
        queue: &UnboundedSender<Answer>,
    ) {
        // Where it can't be told, the read tells.
        let is_hole = self.backing.find_hole(range).await.is_ok_and(|length| length == range.length);
        let payload = match is_hole {
            true => Bytes::new(),
            false => match storage::read(&*self.storage, &self.backing, &self.pool, range).await {
                Ok(buffer) if is_zero(&buffer) => Bytes::new(),
                Ok(buffer) => buffer.freeze(),
                Err(error) => {
                    self.keep_error(&error);
                    return self.drive(|inner| inner.machine.handle_fetched(session, number, false));
                }
            },
        };
        let body = match payload.is_empty() {
            true => Body::FetchedZero { range, number },
            false => Body::Fetched { range, number },
        };
        // A session whose sender is gone is just ending.
        drop(queue.send(Answer {
            header: FrameHeader { session, stream: Stream(1), body },
            payload,
            number,
        }));
    }

    /// Sends the answers of a session, those that somebody waits for or all others, as long as it lasts.
    pub(crate) async fn answer_fetches(
        &self,
        fetching: Fetching,
        sender: ControlSender,
    ) -> Result<(), SendError> {
        let Fetching { session, is_awaited, .. } = fetching;
        let current = self.current.get();
        let taken = {
            let mut inner = self.inner.borrow_mut();
            // One that comes late is of a session that has ended.
            let outgoing = match inner.machine.session() == Some(session) {
                true => inner.outgoing.as_mut(),
                false => None,
            };
            outgoing.and_then(|outgoing| outgoing.answers.take(is_awaited))
        };
        let Some(mut answers) = taken else { return Ok(()) };
        let mut frames = if is_awaited { sender.into_awaited_frames() } else { sender.into_frames() };
        loop {
            let answer = tokio::select! {
                answer = answers.recv() => answer,
                () = self.is_superseded(current) => return Ok(()),
            };
            let Some(Answer { header, payload, number }) = answer else { return Ok(()) };
            frames.send(&header.encode(&payload), payload).await?;
            self.drive(|inner| inner.machine.handle_fetched(session, number, true));
        }
    }
}
