//! The numbers of the transport, each with its reason.

use super::key::{HostKey, random};
use crate::config::Congestion;
use quinn::congestion::{BbrConfig, ControllerFactory, CubicConfig, NewRenoConfig};
use quinn::crypto::{CryptoError, HmacKey};
use quinn::{
    ConnectionId, ConnectionIdGenerator, EndpointConfig, IdleTimeout, MtuDiscoveryConfig, ServerConfig,
    TransportConfig, VarInt,
};
use std::sync::Arc;
use std::time::Duration;

/// What may be set differently than by default, for tests and unusual links.
#[derive(Clone, Debug)]
pub struct Options {
    /// How often an idle connection says that it lives.
    pub keep_alive: Duration,
    /// After how much silence a connection counts as lost.
    pub idle_timeout: Duration,
    /// How long one address may take to answer a dial.
    pub connect_timeout: Duration,
    /// The largest packet that path MTU discovery tries, in bytes of UDP payload.
    pub packet_limit_bytes: u16,
    /// The size of the socket's two buffers in the kernel, in bytes.
    pub socket_buffer_bytes: usize,
    /// How many bytes of one stream may be under way or unread, in bytes. It bounds a stream's speed to this much per
    /// round trip.
    pub stream_window_bytes: u32,
    /// The same for all streams of a connection together. It is many times a stream's, so that some volumes whose
    /// disks are stuck leave room for the others on the same connection.
    pub connection_window_bytes: u32,
    /// What decides how much may be on its way.
    pub congestion: Congestion,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            keep_alive: Duration::from_millis(1500),
            // Four tries: a few lost packets are not taken for a cut link. The time begins anew with the first try after
            // the last sign of life (RFC 9000, section 10.1), so a cut is noticed when both times have passed.
            idle_timeout: Duration::from_secs(6),
            connect_timeout: Duration::from_secs(4),
            // Jumbo frames with room above; larger packets gain little more.
            packet_limit_bytes: 16_000,
            socket_buffer_bytes: 4 << 20,
            // 10 Gb/s over 13 ms, 1 Gb/s over 130 ms.
            stream_window_bytes: 16 << 20,
            connection_window_bytes: CONNECTION_WINDOW_BYTES,
            congestion: Congestion::default(),
        }
    }
}

/// Long enough that no two of a host's connections have one name.
const CONNECTION_ID_BYTES: usize = 8;
/// How much of what a known peer sends waits here to be read, at most, over all of its streams.
const CONNECTION_WINDOW_BYTES: u32 = 256 << 20;
/// How many of the largest packets may be on their way before the first acknowledgement. Ten packets are what QUIC begins
/// with, of the smallest size; then the first probes of the path's MTU fill the window, and quinn-proto up to 0.11.19
/// holds back the end of a connection while it is full (quinn issue 2785): a peer would notice by silence only.
const INITIAL_PACKETS: u64 = 10;
/// How many streams of each direction a known peer may have open at a time: some per volume, for hundreds of volumes.
const STREAMS: u32 = 1024;
/// The same for whoever has connected and is not known yet: anybody can make a key.
pub(super) const STRANGER_WINDOW_BYTES: u32 = 512 << 10;
pub(super) const STRANGER_STREAMS: u32 = 8;

/// How many handshakes wait to be begun, and how many bytes each may have sent by then.
const WAITING_HANDSHAKES: usize = 256;
const WAITING_BYTES: u64 = 64 << 10;

impl Options {
    pub(super) fn transport(&self) -> Arc<TransportConfig> {
        Arc::new(self.transport_with(self.connection_window_bytes, STREAMS))
    }

    fn transport_with(&self, window_bytes: u32, streams: u32) -> TransportConfig {
        let mut discovery = MtuDiscoveryConfig::default();
        discovery.upper_bound(self.packet_limit_bytes);
        let idle_timeout = IdleTimeout::try_from(self.idle_timeout)
            .expect("an idle time-out is shorter than QUIC's longest");
        let mut config = TransportConfig::default();
        config
            .keep_alive_interval(Some(self.keep_alive))
            .max_idle_timeout(Some(idle_timeout))
            .mtu_discovery_config(Some(discovery))
            .stream_receive_window(VarInt::from_u32(self.stream_window_bytes))
            .receive_window(VarInt::from_u32(window_bytes))
            .send_window(u64::from(self.connection_window_bytes))
            .max_concurrent_bidi_streams(VarInt::from_u32(streams))
            .max_concurrent_uni_streams(VarInt::from_u32(streams))
            .congestion_controller_factory(self.controller())
            .datagram_receive_buffer_size(None);
        config
    }

    fn controller(&self) -> Arc<dyn ControllerFactory + Send + Sync> {
        let initial_window = INITIAL_PACKETS * u64::from(self.packet_limit_bytes);
        match self.congestion {
            Congestion::Cubic => {
                let mut cubic = CubicConfig::default();
                cubic.initial_window(initial_window);
                Arc::new(cubic)
            }
            Congestion::NewReno => {
                let mut new_reno = NewRenoConfig::default();
                new_reno.initial_window(initial_window);
                Arc::new(new_reno)
            }
            Congestion::Bbr => {
                let mut bbr = BbrConfig::default();
                bbr.initial_window(initial_window);
                Arc::new(bbr)
            }
        }
    }

    pub(super) fn endpoint(&self, key: &HostKey) -> EndpointConfig {
        let mut config = EndpointConfig::new(Arc::new(ResetKey(*key.reset_secret())));
        config
            .cid_generator(|| Box::new(RandomIds))
            .max_udp_payload_size(self.packet_limit_bytes)
            .expect("a packet's limit is at least 1200 bytes");
        config
    }

    pub(super) fn server(&self, crypto: Arc<dyn quinn::crypto::ServerConfig>) -> ServerConfig {
        let mut config = ServerConfig::with_crypto(crypto);
        config
            .transport_config(Arc::new(self.transport_with(STRANGER_WINDOW_BYTES, STRANGER_STREAMS)))
            .max_incoming(WAITING_HANDSHAKES)
            .incoming_buffer_size(WAITING_BYTES)
            .incoming_buffer_size_total(WAITING_BYTES * WAITING_HANDSHAKES as u64);
        config
    }
}

/// Gives an accepted connection the room that a known peer has, on its first one: with each further one half of what the
/// one before has, all of a peer's take less than twice that (X1).
pub(super) fn trust(connection: &quinn::Connection, others: usize) {
    connection.set_receive_window(VarInt::from_u32(CONNECTION_WINDOW_BYTES >> others.min(8)));
    connection.set_max_concurrent_bi_streams(VarInt::from_u32(STREAMS));
    connection.set_max_concurrent_uni_streams(VarInt::from_u32(STREAMS));
}

/// Names connections at random. The usual generator signs its names with a key of the process and drops packets with
/// others unanswered, so no peer would be told of a restart.
struct RandomIds;

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        ConnectionId::new(&random::<CONNECTION_ID_BYTES>())
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

/// Makes the tokens by which a peer is told that a connection of before a restart is gone (RFC 9000, section 10.3).
/// The key outlives the restart, so a peer learns at once what it would otherwise take an idle time-out to notice.
struct ResetKey([u8; 32]);

impl HmacKey for ResetKey {
    fn sign(&self, data: &[u8], signature_out: &mut [u8]) {
        signature_out.copy_from_slice(blake3::keyed_hash(&self.0, data).as_bytes());
    }

    fn signature_len(&self) -> usize {
        blake3::OUT_LEN
    }

    fn verify(&self, data: &[u8], signature: &[u8]) -> Result<(), CryptoError> {
        let expected = blake3::keyed_hash(&self.0, data);
        let signature = signature.try_into().map_err(|_| CryptoError)?;
        // Hashes compare in constant time.
        if expected == blake3::Hash::from_bytes(signature) { Ok(()) } else { Err(CryptoError) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// It took ten seconds: the time-out alone was eight.
    #[test]
    fn an_idle_link_that_is_cut_is_noticed_within_the_time_that_is_promised() {
        let Options { keep_alive, idle_timeout, .. } = Options::default();
        assert!(keep_alive + idle_timeout < Duration::from_secs(8));
        assert!(keep_alive * 3 < idle_timeout, "some lost packets are not taken for a cut");
    }
}
