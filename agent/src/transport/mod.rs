//! All sockets between peers.
//!
//! An agent has one [`Endpoint`]: a UDP socket that dials and accepts QUIC connections, driven by a thread of its own.
//! A [`Connection`] is authenticated on both sides by the hosts' keys ([`HostKey`]) and shared by all volumes that two
//! hosts have in common; [`Peers`] keeps one per host. On it run control streams of messages ([`ControlSender`],
//! [`ControlReceiver`]) and one-way streams of frames ([`FrameSender`], [`FrameReceiver`]), which are used from the
//! volumes' own threads: what crosses a thread is a wake-up, not the bytes.
//!
//! This module knows what frames and messages look like and nothing of what they mean. Any host with a key may
//! connect: whether it may do what it asks for is for the receiver of its first message to decide, in bounded time.
//!
//! Errors are named for who is to blame: [`Lost`] (reconnect), [`Misbehaviour`] (close), and the peer's own decision to
//! end a stream.

pub mod bare;
mod connection;
mod control;
mod dial;
mod endpoint;
mod error;
mod frames;
mod handshakes;
pub mod key;
mod limit;
pub mod packing;
mod peers;
mod settings;
mod socket;
mod stream;
#[cfg(test)]
mod tests;
mod tls;

pub use connection::{CloseReason, Connection, Incoming, Statistics};
pub use control::{ControlReceiver, ControlSender};
pub use dial::{AttemptError, ConnectError, FailedAttempt};
pub use endpoint::{BindError, Endpoint, Place};
pub use error::{Lost, Misbehaviour, ReceiveError, SendError};
pub use frames::{FrameReceiver, FrameSender};
pub use handshakes::network;
pub use key::{HostKey, KeyError};
pub use limit::Limit;
pub use peers::{AskError, Peers};
pub use settings::Options;
