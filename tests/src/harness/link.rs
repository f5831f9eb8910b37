//! The connection between the primary and one replica: streams that are ordered each by itself, and cuts that drop
//! everything on its way.

use super::disk::Data;
use super::random::Random;
use blockmirror_protocol::wire::FrameHeader;
use std::collections::VecDeque;
use std::time::Duration;

/// One stream of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Channel {
    /// Control messages to the replica.
    ToReplica,
    /// Control messages to the primary.
    ToPrimary,
    /// Live frames.
    Live,
    /// Copies.
    Bulk,
}

/// What a stream carries.
#[derive(Clone, Debug)]
pub enum Packet {
    /// A control message's bytes.
    Message(Vec<u8>),
    /// A frame and its payload.
    Frame(FrameHeader, Data),
}

#[derive(Debug, Default)]
struct Queue {
    packets: VecDeque<Packet>,
    last_arrival: Duration,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Link {
    /// Which connection this is; raised with each.
    pub connection: u64,
    /// Whether packets still arrive.
    pub is_up: bool,
    /// Nothing arrives before this.
    pub stalled_until: Duration,
    /// The disks' changes when both sides were last compared.
    pub compared_at: u64,
    /// The connection that the primary believes in.
    pub primary_side: Option<u64>,
    /// The connection that the replica believes in.
    pub replica_side: Option<u64>,
    queues: [Queue; 4],
}

impl Link {
    /// Opens a new connection and gives its number.
    pub fn open(&mut self) -> u64 {
        self.cut();
        self.connection += 1;
        self.is_up = true;
        self.primary_side = Some(self.connection);
        self.connection
    }

    /// Drops everything on its way.
    pub fn cut(&mut self) {
        self.is_up = false;
        self.queues = Default::default();
    }

    /// Sends a packet, unless nothing arrives any more, and says when it arrives.
    pub fn send(
        &mut self,
        channel: Channel,
        packet: Packet,
        now: Duration,
        delay: Duration,
        random: &mut Random,
    ) -> Option<Duration> {
        if !self.is_up {
            return None;
        }
        let queue = &mut self.queues[channel as usize];
        queue.packets.push_back(packet);
        queue.last_arrival = queue.last_arrival.max(now + random.up_to(delay));
        Some(queue.last_arrival)
    }

    /// Takes the packet that has arrived.
    pub fn arrived(&mut self, channel: Channel, connection: u64) -> Option<Packet> {
        if !self.is_up || self.connection != connection {
            return None;
        }
        self.queues[channel as usize].packets.pop_front()
    }

    /// Bytes of live frames that were sent and have not arrived, with so many for each frame.
    #[must_use]
    pub fn live_bytes(&self, frame_bytes: u64) -> u64 {
        let packets = self.queues[Channel::Live as usize].packets.iter();
        packets
            .map(|packet| match packet {
                Packet::Message(_) => 0,
                Packet::Frame(header, _) => header.body.payload_bytes() + frame_bytes,
            })
            .sum()
    }
}
