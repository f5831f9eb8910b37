//! The connections between hosts: streams that are ordered each by itself, and cuts that drop what is on its way, or
//! let frames of it come much later.
//!
//! Any host may dial any other. A link is named by its two hosts; messages go both ways on it, frames from the dialler
//! to the listener.

use super::disk::Data;
use super::host::Shell;
use super::random::Random;
use super::world::{Event, World};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::terms::Fence;
use blockmirror_protocol::units::Epoch;
use blockmirror_protocol::wire::FrameHeader;
use std::collections::{BTreeMap, VecDeque};
use std::fmt;
use std::ops::{Index, IndexMut};
use std::time::Duration;

/// What a frame costs in the window besides its payload.
const FRAME_BYTES: u64 = 128;

/// Names a link: the host that connects, and the one that it connects to.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct LinkId {
    /// Who connects and sends frames.
    pub dialler: usize,
    /// Who receives them.
    pub listener: usize,
}

impl LinkId {
    /// The link over which one host reaches another.
    #[must_use]
    pub fn new(dialler: usize, listener: usize) -> Self {
        Self { dialler, listener }
    }
}

impl fmt::Display for LinkId {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}>{}", self.dialler, self.listener)
    }
}

/// One stream of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Channel {
    /// Control messages to the listener.
    ToListener,
    /// Control messages to the dialler.
    ToDialler,
    /// Live frames.
    Live,
    /// Copies.
    Bulk,
    /// What the listener sends of its content to the dialler, which lacks it.
    Fetched,
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
    window_bytes: u64,
}

/// One link. One link from a dialling host to a listening one.
#[derive(Debug, Default)]
pub struct Link {
    /// Which connection this is or was; no two of a world have the same, and later ones are higher.
    pub connection: u64,
    /// Whether packets still arrive.
    pub is_up: bool,
    /// Nothing arrives before this.
    pub stalled_until: Duration,
    /// The disks' changes when both sides were last compared.
    pub compared_at: Option<u64>,
    /// The connection that the dialler believes in.
    pub dialler_side: Option<u64>,
    /// The connection that the listener serves.
    pub listener_side: Option<u64>,
    /// Bytes of copies that were sent on this connection.
    pub copied_bytes: u64,
    /// Copies that were sent on this connection and are not known to be durable, by number.
    pub copies: BTreeMap<u64, ByteRange>,
    /// Epochs of which live frames were sent on this connection and that are not known to be durable, with when the first of
    /// them was.
    pub unacknowledged: VecDeque<(Epoch, Duration)>,
    /// Bytes that the listener was asked to compare on this connection.
    pub compared_bytes: u64,
    /// Bytes that were dirty when its first resync began.
    pub dirty_bytes: Option<u64>,
    /// The fence by which the dialler last took in what the listener said of itself: from then on its own memory says
    /// what differs.
    pub united_by: Option<Fence>,
    /// What the dialler's application had written before it.
    pub written_before_bytes: u64,
    queues: [Queue; 5],
}

impl Link {
    /// Opens a new connection when the dialler's application has written so much.
    fn open(&mut self, connection: u64, written_bytes: u64) {
        *self = Self {
            connection,
            is_up: true,
            dialler_side: Some(connection),
            listener_side: self.listener_side,
            stalled_until: self.stalled_until,
            united_by: self.united_by,
            written_before_bytes: written_bytes,
            ..Self::default()
        };
    }

    /// Ends the connection, and gives the frames that were on their way.
    fn cut(&mut self) -> impl Iterator<Item = (FrameHeader, Data)> + use<> {
        self.is_up = false;
        self.queues[Channel::Fetched as usize].packets.clear();
        let packets = std::mem::take(&mut self.queues).into_iter().flat_map(|queue| queue.packets);
        packets.filter_map(|packet| match packet {
            Packet::Message(_) => None,
            Packet::Frame(header, data) => Some((header, data)),
        })
    }

    fn send(
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
        queue.window_bytes += window_bytes(&packet);
        queue.packets.push_back(packet);
        queue.last_arrival = queue.last_arrival.max(now + random.up_to(delay));
        Some(queue.last_arrival)
    }

    /// Takes the packet that has arrived.
    fn arrived(&mut self, channel: Channel, connection: u64) -> Option<Packet> {
        if !self.is_up || self.connection != connection {
            return None;
        }
        let queue = &mut self.queues[channel as usize];
        let packet = queue.packets.pop_front()?;
        queue.window_bytes -= window_bytes(&packet);
        Some(packet)
    }

    /// Bytes of live frames that were sent and have not arrived.
    #[must_use]
    pub fn live_bytes(&self) -> u64 {
        self.queues[Channel::Live as usize].window_bytes
    }
}

fn window_bytes(packet: &Packet) -> u64 {
    match packet {
        Packet::Message(_) => 0,
        Packet::Frame(header, _) => header.body.payload_bytes() + FRAME_BYTES,
    }
}

/// All links of a world.
#[derive(Debug)]
pub struct Links {
    hosts: usize,
    links: Vec<Link>,
}

impl Links {
    /// The links between so many hosts, all down.
    #[must_use]
    pub fn new(hosts: usize) -> Self {
        Self { hosts, links: (0..hosts * hosts).map(|_| Link::default()).collect() }
    }

    /// Their names.
    pub fn ids(&self) -> impl Iterator<Item = LinkId> + use<> {
        let hosts = self.hosts;
        (0..hosts).flat_map(move |dialler| Self::from(hosts, dialler))
    }

    /// The names of those over which one host reaches the others.
    pub fn of_dialler(&self, dialler: usize) -> impl Iterator<Item = LinkId> + use<> {
        Self::from(self.hosts, dialler)
    }

    fn from(hosts: usize, dialler: usize) -> impl Iterator<Item = LinkId> {
        (0..hosts).filter(move |listener| *listener != dialler).map(move |to| LinkId::new(dialler, to))
    }
}

impl Index<LinkId> for Links {
    type Output = Link;

    fn index(&self, id: LinkId) -> &Link {
        &self.links[id.dialler * self.hosts + id.listener]
    }
}

impl IndexMut<LinkId> for Links {
    fn index_mut(&mut self, id: LinkId) -> &mut Link {
        &mut self.links[id.dialler * self.hosts + id.listener]
    }
}

impl World {
    /// A connection comes up, known to its dialler alone until its greeting arrives.
    pub fn open(&mut self, id: LinkId) {
        let connection = self.next_operation();
        self.cut(id);
        let application = &self.hosts[id.dialler].application;
        let open_bytes = self.hosts[id.dialler].promises.open_bytes(self.settings.block_size);
        let written_bytes = application.written_bytes - open_bytes;
        self.links[id].open(connection, written_bytes);
    }

    /// Sends a packet over a link, unless nothing arrives there any more.
    pub fn send(&mut self, id: LinkId, channel: Channel, packet: Packet) {
        let (now, delay) = (self.now, self.settings.link_delay);
        let link = &mut self.links[id];
        if let Some(at) = link.send(channel, packet, now, delay, &mut self.random) {
            let connection = link.connection;
            self.plan_at(at, Event::Arrival(id, connection, channel));
        }
    }

    /// A packet of this connection arrives, if the connection is still there and not stalled.
    pub(super) fn arrive(&mut self, id: LinkId, connection: u64, channel: Channel) {
        let link = &mut self.links[id];
        if link.connection == connection && link.stalled_until > self.now {
            let later = link.stalled_until;
            return self.plan_at(later, Event::Arrival(id, connection, channel));
        }
        let Some(packet) = link.arrived(channel, connection) else { return };
        let Some(packet) = self.lie(id, channel, packet) else { return self.cut(id) };
        match channel {
            Channel::ToDialler => self.dialler_receives(id, packet),
            Channel::Fetched => self.dialler_fetches(id, packet),
            Channel::ToListener | Channel::Live | Channel::Bulk => self.listener_receives(id, packet),
        }
    }

    /// Cuts a link; both sides find out later.
    pub fn cut(&mut self, id: LinkId) {
        let link = &mut self.links[id];
        if std::mem::take(&mut link.is_up) {
            self.note(|| format!("link {id} is cut"));
        }
        let link = &mut self.links[id];
        let frames = link.cut();
        if self.random.once_in(2) {
            self.lead_astray(id, frames);
        }
        let link = &self.links[id];
        let (dialler, listener) = (link.dialler_side, link.listener_side);
        if let Some(connection) = dialler {
            let delay = self.random.up_to(self.settings.outage);
            self.plan(delay, Event::DiallerLost(id, connection));
        }
        if let Some(connection) = listener {
            let delay = self.random.up_to(self.settings.outage);
            self.plan(delay, Event::ListenerLost(id, connection));
        }
    }

    /// Frames of a connection that was cut may still come out of some buffer, whatever has happened since.
    fn lead_astray(&mut self, id: LinkId, frames: impl Iterator<Item = (FrameHeader, Data)>) {
        for (header, data) in frames {
            let delay = self.random.up_to(self.settings.outage * 4);
            self.plan(delay, Event::Stray(id, Box::new((header, data))));
        }
    }

    /// A host is gone, and so are its sides of all its links.
    pub(super) fn cut_off(&mut self, host: usize) {
        for id in self.links.ids() {
            if id.dialler == host {
                self.links[id].dialler_side = None;
            } else if id.listener == host {
                self.links[id].listener_side = None;
            } else {
                continue;
            }
            self.cut(id);
        }
    }

    /// A listener finds out that a connection is gone.
    pub(super) fn listener_lost(&mut self, id: LinkId, connection: u64) {
        let link = &mut self.links[id];
        if link.listener_side != Some(connection) {
            return;
        }
        link.listener_side = None;
        if let Shell::Replica(shell) = &mut self.hosts[id.listener].shell {
            shell.machine.handle_disconnected();
        }
    }
}
