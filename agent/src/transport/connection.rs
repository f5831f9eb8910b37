//! A connection between two hosts, shared by all volumes that they have in common.

use super::control::{ControlReceiver, ControlSender};
use super::error::{Lost, Misbehaviour, ReceiveError, SendError};
use super::frames::{FrameReceiver, FrameSender};
use super::stream::{Inbound, Outbound, Priority};
use super::{settings, tls};
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::{StreamKind, StreamPreamble};
use quinn::VarInt;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Mutex;

/// A connection whose peer has proved to have its key. Clones are handles to the same connection, for any thread; it
/// is closed when the last handle and the last stream are dropped.
#[derive(Clone, Debug)]
pub struct Connection {
    pub(super) quic: quinn::Connection,
    peer: HostId,
    /// A one-way stream that was accepted and whose preamble has not come yet.
    unrouted: Arc<Mutex<Option<FrameReceiver>>>,
}

/// What the peer opened.
#[derive(Debug)]
pub enum Incoming {
    /// A control stream; the peer's first message says what for.
    Control(ControlSender, ControlReceiver),
    /// A stream of frames, and whose it is.
    Frames(StreamPreamble, FrameReceiver),
}

/// Why a connection is closed, for the peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CloseReason {
    /// It is not needed any longer.
    Done = 0,
    /// The agent stops.
    ShuttingDown = 1,
    /// The peer broke the protocol.
    Misbehaved = 2,
    /// The peer may not do what it asked for.
    Refused = 3,
}

/// How a connection does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Statistics {
    /// The time that an answer takes on the wire.
    pub round_trip: Duration,
    /// The largest packet that the path carries, in bytes of UDP payload.
    pub packet_bytes: u16,
    /// How many packets were sent.
    pub sent_packets: u64,
    /// How many of them were lost, probes of the path's limit not counted.
    pub lost_packets: u64,
    /// How often the path turned out to carry less than it did before.
    pub black_holes: u64,
    /// How many bytes were sent, headers included.
    pub sent_bytes: u64,
    /// How many bytes were received, headers included.
    pub received_bytes: u64,
}

impl Connection {
    /// Nothing where the peer has no key, which a finished handshake excludes.
    pub(super) fn new(quic: quinn::Connection) -> Option<Self> {
        let peer = tls::peer_of(&quic)?;
        Some(Self { quic, peer, unrouted: Arc::default() })
    }

    /// The host at the other end, by the key that it has proved to have.
    #[must_use]
    pub fn peer(&self) -> HostId {
        self.peer
    }

    /// The address that the peer is reached at.
    #[must_use]
    pub fn remote_address(&self) -> SocketAddr {
        let address = self.quic.remote_address();
        SocketAddr::new(address.ip().to_canonical(), address.port())
    }

    /// A number that tells this connection from this endpoint's others.
    #[must_use]
    pub fn number(&self) -> usize {
        self.quic.stable_id()
    }

    /// Whether the connection is not lost or closed yet, as far as is known here.
    #[must_use]
    pub fn is_live(&self) -> bool {
        self.quic.close_reason().is_none()
    }

    /// How fast the link is, in bytes a second, as congestion control sees it: what may be on its way in the time of a
    /// round trip. Less than the link could carry where it was never full.
    #[must_use]
    pub fn speed(&self) -> f64 {
        let path = self.quic.stats().path;
        path.cwnd as f64 / path.rtt.as_secs_f64().max(1e-6)
    }

    /// Whether two handles are to the same connection.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        self.quic.stable_id() == other.quic.stable_id()
    }

    /// Waits until the connection is lost or closed.
    pub async fn closed(&self) -> Lost {
        self.lost(self.quic.closed().await)
    }

    /// Gives an accepted connection the room that a known peer has: anybody can make a key and connect, so until then it
    /// is held short. Each further connection of a peer that has `others` gets half of the room of the one before.
    pub fn trust(&self, others: usize) {
        settings::trust(&self.quic, others);
    }

    /// Closes the connection at once; what has not arrived yet will not. The peer is told why.
    pub fn close(&self, reason: CloseReason, text: &str) {
        self.quic.close(VarInt::from_u32(reason as u32), text.as_bytes());
    }

    /// Opens a control stream. The peer learns of it with the first message.
    ///
    /// # Errors
    /// [`Lost`] when the connection is gone.
    pub async fn open_control(&self) -> Result<(ControlSender, ControlReceiver), Lost> {
        let (send, receive) = self.quic.open_bi().await.map_err(|source| self.lost(source))?;
        Ok(self.control(send, receive))
    }

    /// Opens a stream of frames and sends its preamble. Live frames go out before bulk, and messages before both.
    ///
    /// # Errors
    /// [`SendError`] when the connection is gone.
    pub async fn open_frames(&self, preamble: &StreamPreamble) -> Result<FrameSender, SendError> {
        let priority = match preamble.kind {
            StreamKind::Live => Priority::Live,
            StreamKind::Bulk => Priority::Bulk,
        };
        let quic = self.quic.open_uni().await.map_err(|source| self.lost(source))?;
        let mut sender = FrameSender::new(Outbound::new(quic, self.peer, priority));
        sender.queue_preamble(preamble);
        sender.flush().await?;
        Ok(sender)
    }

    /// Waits for the next stream that the peer opens. Cancel-safe.
    ///
    /// # Errors
    /// [`ReceiveError::Lost`], and [`ReceiveError::PeerMisbehaved`] for a stream that begins with something else than a
    /// preamble.
    pub async fn accept(&self) -> Result<Incoming, ReceiveError> {
        let mut unrouted = self.unrouted.lock().await;
        loop {
            tokio::select! {
                streams = self.quic.accept_bi() => {
                    let (send, receive) = streams.map_err(|source| self.lost(source))?;
                    let (sender, receiver) = self.control(send, receive);
                    return Ok(Incoming::Control(sender, receiver));
                }
                stream = self.quic.accept_uni(), if unrouted.is_none() => {
                    let stream = stream.map_err(|source| self.lost(source))?;
                    *unrouted = Some(FrameReceiver::new(Inbound::new(stream, self.peer)));
                }
                preamble = preamble_of(&mut unrouted), if unrouted.is_some() => {
                    let receiver = unrouted.take().expect("its preamble was awaited");
                    match preamble {
                        Ok(preamble) => return Ok(Incoming::Frames(preamble, receiver)),
                        Err(error) if was_given_up(&error) => {}
                        Err(error) => return Err(error),
                    }
                }
            }
        }
    }

    /// How the connection does.
    #[must_use]
    pub fn statistics(&self) -> Statistics {
        let statistics = self.quic.stats();
        Statistics {
            round_trip: statistics.path.rtt,
            packet_bytes: statistics.path.current_mtu,
            sent_packets: statistics.path.sent_packets,
            lost_packets: statistics.path.lost_packets,
            black_holes: statistics.path.black_holes_detected,
            sent_bytes: statistics.udp_tx.bytes,
            received_bytes: statistics.udp_rx.bytes,
        }
    }

    fn control(
        &self,
        send: quinn::SendStream,
        receive: quinn::RecvStream,
    ) -> (ControlSender, ControlReceiver) {
        let sender = ControlSender::new(Outbound::new(send, self.peer, Priority::Control));
        (sender, ControlReceiver::new(Inbound::new(receive, self.peer)))
    }

    fn lost(&self, source: quinn::ConnectionError) -> Lost {
        Lost { peer: self.peer, source }
    }
}

async fn preamble_of(unrouted: &mut Option<FrameReceiver>) -> Result<StreamPreamble, ReceiveError> {
    match unrouted {
        Some(receiver) => receiver.preamble().await,
        None => std::future::pending().await,
    }
}

/// Whether the opener changed its mind before its stream began.
fn was_given_up(error: &ReceiveError) -> bool {
    matches!(
        error,
        ReceiveError::Abandoned(_) | ReceiveError::PeerMisbehaved { source: Misbehaviour::Unfinished, .. }
    )
}
