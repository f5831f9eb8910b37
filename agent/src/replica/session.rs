//! Sessions with primaries, one at a time.
//!
//! A session is a control stream, on which the primary's greeting came, and the streams of frames that carry its number. A
//! newer greeting takes the place of an older session at once; the machine answers it only when everything of the old one
//! has ended (R1).

use super::content::Answers;
use super::{Outgoing, Replica, Split};
use crate::transport::{ControlReceiver, ControlSender, FrameReceiver, ReceiveError, SendError};
use blockmirror_protocol::replica::{FrameId, PrimaryMisbehaved};
use blockmirror_protocol::units::{HostId, Session};
use blockmirror_protocol::wire::FrameHeader;
use blockmirror_protocol::wire::message::{Hello, Members, Message, Refusal, Refused};
use bytes::Bytes;
use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::mpsc::unbounded_channel;

/// How many messages wait for a primary to read. What is on its way is beside that, and as much as the windows allow; a
/// primary of ours reads at once.
pub(super) const UNREAD_LIMIT: usize = 1 << 14;

/// How many frames are taken in before others get their turn.
const BATCH: usize = 32;

/// How often a primary is told what it has not asked for.
const TELL_TIME: Duration = Duration::from_secs(1);

/// How long a primary may take to hear that this replica takes its leave.
const LEAVE_TIME: Duration = Duration::from_secs(1);

/// Counts a session as being served as long as it lives.
struct Serving<'a>(&'a Replica);

impl<'a> Serving<'a> {
    fn of(replica: &'a Replica) -> Self {
        replica.serving.set(replica.serving.get() + 1);
        Self(replica)
    }
}

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.serving.set(self.0.serving.get() - 1);
        self.0.idle.notify_one();
    }
}

/// Why a session ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The primary can't be heard.
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    /// The primary can't be told.
    #[error(transparent)]
    Send(#[from] SendError),
    /// The primary broke the protocol.
    #[error(transparent)]
    Misbehaved(#[from] PrimaryMisbehaved),
    /// A newer session took its place, or this host ended it.
    #[error("this host ended the session, or a newer one took its place")]
    Superseded,
}

impl SessionError {
    /// Whether the primary broke the protocol.
    #[must_use]
    pub fn is_misbehaviour(&self) -> bool {
        matches!(self, Self::Misbehaved(_) | Self::Receive(ReceiveError::PeerMisbehaved { .. }))
    }

    /// Whether the connection or the stream just ended.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(
            self,
            Self::Receive(ReceiveError::Lost(_) | ReceiveError::Ended(_) | ReceiveError::Abandoned(_))
        )
    }
}

impl Replica {
    /// Serves a session from its greeting to its end. `learned` is called when the primary tells the volume's hosts.
    ///
    /// # Errors
    /// [`SessionError`]; the primary dials again by itself.
    pub async fn serve(
        &self,
        hello: Hello,
        mut sender: ControlSender,
        mut receiver: ControlReceiver,
        learned: impl Fn(Members),
    ) -> Result<(), SessionError> {
        // Checked before anything is ended for it.
        self.inner.borrow().machine.check_numbers(&hello)?;
        if let Some(no) = self.objection(&hello) {
            self.inner.borrow_mut().machine.note_rejected(&hello);
            // The session that is being served goes on.
            sender.end_with(no, Some(receiver));
            return Ok(());
        }
        let _serving = Serving::of(self);
        let session = self.take_over();
        self.paused_there.set(false);
        self.greeter.set(Some(receiver.peer()));
        let (messages, mut source) = unbounded_channel();
        let unread = Rc::new(Cell::new(0));
        self.since.set(Instant::now());
        let members = hello.members.clone();
        self.drive(|inner| {
            inner.outgoing = Some(Outgoing { messages, unread: unread.clone(), answers: Answers::default() });
            inner.machine.handle_message(hello.into())
        })?;
        self.accused.borrow_mut().take_if(|(host, _)| *host == receiver.peer());
        *self.members.borrow_mut() = members.clone();
        // Who was removed is told next.
        learned(Members { members, removed: Vec::new() });
        let receive = async {
            loop {
                let message = receiver.receive().await?;
                if matches!(message, Message::Hello(_)) {
                    // Who greets is judged where a stream begins: by its key, and by what is known of that host.
                    return Err(PrimaryMisbehaved("it greeted twice on one stream").into());
                }
                let told = match &message {
                    Message::Members(told) => Some(told.clone()),
                    _ => None,
                };
                if let Message::Parting(parting) = &message {
                    self.paused_there.set(parting.paused);
                }
                self.drive(|inner| inner.machine.handle_message(message))?;
                // They are within their bounds now.
                if let Some(told) = told {
                    *self.members.borrow_mut() = told.members.clone();
                    learned(told);
                }
            }
        };
        let send = async {
            while let Some(message) = source.recv().await {
                if unread.replace(unread.get() - 1) > UNREAD_LIMIT {
                    return Err(PrimaryMisbehaved("it does not read what it is answered").into());
                }
                if matches!(message, Message::Refused(_) | Message::Superseded(_)) {
                    return Ok(message);
                }
                sender.send(&message).await?;
            }
            Err(SessionError::Superseded)
        };
        let ended: Result<Message, SessionError> = tokio::select! {
            ended = receive => ended,
            ended = send => ended,
            () = self.is_superseded(session) => Err(SessionError::Superseded),
            () = self.keep_told() => unreachable!("it never ends"),
        };
        if self.current.get() == session {
            self.since.set(Instant::now());
            self.drive(|inner| {
                inner.outgoing = None;
                inner.machine.handle_disconnected();
            });
        }
        // That this replica takes its leave is what the primary waits for.
        while let Ok(message) = source.try_recv() {
            if matches!(message, Message::Parted(_)) {
                let said = async { sender.send(&message).await.is_ok() && sender.finish().await.is_ok() };
                // One that doesn't hear it finds out by itself.
                let _ = tokio::time::timeout(LEAVE_TIME, said).await;
                return Err(SessionError::Superseded);
            }
        }
        // Whoever waits for the end of this session must not wait for a primary that doesn't answer any more.
        sender.end_with(ended?, Some(receiver));
        Ok(())
    }

    /// Tells the primary now and then what no answer has told it.
    async fn keep_told(&self) {
        loop {
            tokio::time::sleep(TELL_TIME).await;
            let now = self.now();
            self.drive(|inner| {
                inner.machine.ask_promise(now);
                inner.machine.tell_mark();
            });
        }
    }

    /// Takes in the frames of one stream until it or its session ends. The primary leaves a session of which it hears that
    /// a stream is not taken in.
    ///
    /// # Errors
    /// [`SessionError`] when the primary can't be heard or broke the protocol.
    pub async fn take_frames(&self, session: Session, mut frames: FrameReceiver) -> Result<(), SessionError> {
        let current = self.current.get();
        if self.inner.borrow().machine.session() != Some(session) {
            return Ok(());
        }
        let mut count = 0;
        loop {
            let (header, payload) = tokio::select! {
                frame = frames.receive(&self.pool) => frame?,
                () = self.is_superseded(current) => return Ok(()),
            };
            self.take_frame(session, frames.peer(), header, payload)?;
            while let Some((header, payload)) = frames.receive_now(&self.pool)? {
                self.take_frame(session, frames.peer(), header, payload)?;
                count += 1;
                if count % BATCH == 0 {
                    tokio::task::yield_now().await;
                }
            }
            self.drive(|inner| inner.machine.acknowledge_receipt());
        }
    }

    /// Ends the session that is being served, if any; the primary may dial again.
    pub fn disconnect(&self) {
        self.take_over();
        self.since.set(Instant::now());
        self.drive(|inner| {
            inner.outgoing = None;
            inner.machine.handle_disconnected();
        });
    }

    /// Ends the session that is being served, if any, and tells the primary why.
    pub fn dismiss(&self, no: Refused) {
        self.drive(|inner| {
            if let Some(Outgoing { messages, unread, .. }) = &inner.outgoing {
                unread.set(unread.get() + 1);
                // A session that is ending by itself hears nothing any more.
                drop(messages.send(no.into()));
            }
        });
    }

    /// Whether the primary that greeted last said that its operator paused the mirroring.
    #[must_use]
    pub fn paused_there(&self) -> bool {
        self.paused_there.get()
    }

    /// Ends the session of this number, unless a newer one took its place.
    pub fn end_session(&self, session: Session) {
        if self.inner.borrow().machine.session() == Some(session) {
            self.disconnect();
        }
    }

    /// Why a greeting is not taken, if it is not.
    fn objection(&self, hello: &Hello) -> Option<Message> {
        let inner = self.inner.borrow();
        let Some(mut refused) = inner.machine.objection(hello) else {
            let superseded = inner.machine.supersedes(hello.fence);
            // Whether a split is over is decided with the newest primary.
            if superseded.is_none() {
                self.split.set(None);
            }
            return superseded.map(Message::from);
        };
        if matches!(refused.refusal, Refusal::SplitBrain | Refusal::Beyond) {
            let holder = hello.fence.holder;
            let is_beyond = refused.refusal == Refusal::Beyond;
            let known = self.split.get().filter(|split| split.from == holder);
            let since = known.map_or_else(Instant::now, |split| split.since);
            self.split.set(Some(Split { from: holder, since, is_beyond }));
            let name = &self.name;
            refused
                .text
                .push_str(&format!("; `blockmirror resolve {name} --keep HOST` decides whose content stays"));
        }
        Some(refused.into())
    }

    /// Whose greetings are refused because this host has what that one lacks.
    #[must_use]
    pub fn split(&self) -> Option<Split> {
        self.split.get()
    }

    /// Whose greeting was taken last.
    #[must_use]
    pub fn greeter(&self) -> Option<HostId> {
        self.greeter.get()
    }

    /// Tells the session that is being served to end, and names the next one.
    fn take_over(&self) -> u64 {
        let session = self.current.get() + 1;
        self.current.set(session);
        self.superseded.notify_waiters();
        session
    }

    pub(super) async fn is_superseded(&self, session: u64) {
        loop {
            let told = self.superseded.notified();
            if self.current.get() != session {
                return;
            }
            told.await;
        }
    }

    fn take_frame(
        &self,
        session: Session,
        sender: HostId,
        header: FrameHeader,
        payload: Bytes,
    ) -> Result<(), PrimaryMisbehaved> {
        if self.greeter.get() != Some(sender) {
            return Err(PrimaryMisbehaved("a frame comes from another host than the greeting"));
        }
        if header.session != session {
            return Err(PrimaryMisbehaved("a frame carries another session than its stream"));
        }
        self.drive(|inner| {
            let frame = FrameId(inner.next_frame);
            inner.next_frame += 1;
            inner.payloads.insert(frame, payload);
            inner.machine.handle_frame(frame, header)
        })
    }
}
