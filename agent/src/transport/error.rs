//! What can go wrong on a connection that was established, by who is to blame.

use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::FrameError;
use blockmirror_protocol::wire::message::{MessageError, OverLimit};
use blockmirror_protocol::wire::preamble::PreambleError;

/// The connection is gone, and everything on it: reconnect.
#[derive(Debug, Clone, thiserror::Error)]
#[error("the connection to host {peer} is lost")]
pub struct Lost {
    /// The host at its other end.
    pub peer: HostId,
    /// Why: silence, the peer's decision, ours, or a broken rule of QUIC.
    pub source: quinn::ConnectionError,
}

/// Bytes that the peer should not have sent: close the connection.
#[derive(Debug, thiserror::Error)]
pub enum Misbehaviour {
    /// A frame that is none, breaks a limit or was damaged.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A message that is none or breaks a limit.
    #[error(transparent)]
    Message(#[from] MessageError),
    /// A stream that begins with something else than a preamble.
    #[error(transparent)]
    Preamble(#[from] PreambleError),
    /// A stream that was declared complete in the middle of something.
    #[error("the peer ended a stream in the middle of a frame or message")]
    Unfinished,
}

/// Why nothing could be sent.
#[derive(Debug, thiserror::Error)]
pub enum SendError {
    /// The connection is gone.
    #[error(transparent)]
    Lost(#[from] Lost),
    /// What is to be said fits into no message.
    #[error(transparent)]
    OverLimit(#[from] OverLimit),
    /// The peer reads this stream no longer.
    #[error("host {0} does not read this stream any longer")]
    Stopped(HostId),
}

/// Why nothing was received.
#[derive(Debug, thiserror::Error)]
pub enum ReceiveError {
    /// The connection is gone.
    #[error(transparent)]
    Lost(#[from] Lost),
    /// The peer has sent everything that it wanted to on this stream.
    #[error("host {0} has ended this stream")]
    Ended(HostId),
    /// The peer gave the stream up; what it had not sent yet will not come.
    #[error("host {0} has given this stream up")]
    Abandoned(HostId),
    /// The peer sent what it should not have.
    #[error("host {peer} breaks the protocol")]
    PeerMisbehaved {
        /// The host.
        peer: HostId,
        /// How.
        source: Misbehaviour,
    },
}

impl ReceiveError {
    pub(super) fn misbehaved(peer: HostId, how: impl Into<Misbehaviour>) -> Self {
        Self::PeerMisbehaved { peer, source: how.into() }
    }
}
