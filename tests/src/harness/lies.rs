//! A member that lies (X1): at times what it sends is changed, repeated, or sent to another than it was meant for, with any
//! numbers. Nobody keeps a promise to it or by it. Where it may be the primary, only one thing is checked: that no rule's code panics.
//!
//! Beside a replica that lies ([`World::lying_beside`]), the honest hosts keep every promise to each other: all is checked there but
//! what that replica has, and what others take it for.

use super::links::{Channel, LinkId, Packet};
use super::random::Random;
use super::settings::Settings;
use super::world::World;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::{Epoch, GenerationId, Sequence, Session, Stream};
use blockmirror_protocol::wire::message::{Message, Standing};
use blockmirror_protocol::wire::{Body, FrameHeader};
use std::time::Duration;

/// How many hosts there are beside one that lies, with it.
const HOSTS: usize = 3;
/// How many packets of before are remembered, to be sent again.
const REMEMBERED: usize = 256;
/// Where a message's bytes begin, behind their length.
const PREFIX_BYTES: usize = 4;

/// Who lies, and how often.
#[derive(Debug)]
pub struct Lies {
    liar: usize,
    times: u64,
    /// Whether all is checked that honest hosts promise each other.
    is_beside: bool,
    sent: Vec<(Channel, Packet)>,
}

impl Lies {
    /// Whether it is this host that lies beside honest ones.
    pub(super) fn is_of(&self, host: usize) -> bool {
        self.is_beside && self.liar == host
    }
}

impl World {
    /// The world of a seed, in which one of the hosts lies.
    #[must_use]
    pub fn lying(seed: u64, seconds: u64) -> Self {
        let mut random = Random::new(seed);
        let settings = Settings::random(&mut random, seconds);
        let liar = random.below(settings.sector_bytes.len() as u64) as usize;
        let times = random.pick(&[2, 10, 50]);
        let mut world = Self::new(settings, random);
        world.lies = Some(Lies { liar, times, is_beside: false, sent: Vec::new() });
        world
    }

    /// The world of a seed, in which the last of three hosts lies, which is a replica, and no operator has a hand in anything.
    #[must_use]
    pub fn lying_beside(seed: u64, seconds: u64) -> Self {
        let mut random = Random::new(seed);
        let settings = Settings::random(&mut random, seconds);
        let settings = Settings {
            sector_bytes: vec![512; HOSTS],
            disk_delay: vec![Duration::from_millis(random.pick(&[2, 10])); HOSTS],
            has_operators: false,
            choices_change: false,
            members_change: false,
            disk_losses: 0,
            // A primary has from its source what that one says.
            rebuilds: false,
            set_backs: 0,
            touches: 0,
            sleeps: 0,
            rots: 0,
            hangs: 0,
            ..settings
        };
        let times = random.pick(&[2, 10, 50]);
        let mut world = Self::new(settings, random);
        world.lies = Some(Lies { liar: HOSTS - 1, times, is_beside: true, sent: Vec::new() });
        world
    }

    /// Whether this host is one that nobody can promise anything of.
    pub(super) fn is_liar(&self, host: usize) -> bool {
        self.lies.as_ref().is_some_and(|lies| lies.is_of(host))
    }

    /// What a host is heard to say of itself: nothing where that is no message.
    pub(super) fn lie_of_standing(&mut self, host: usize, standing: Standing) -> Option<Standing> {
        let times = self.lies.as_ref().filter(|lies| lies.liar == host).map_or(0, |lies| lies.times);
        if !self.is_rough || !self.random.once_in(times) {
            return Some(standing);
        }
        let bytes = Message::from(standing).encode().expect("it is short");
        let changed = changed_message(bytes, &mut self.random)?;
        match Message::decode(&changed[PREFIX_BYTES..]) {
            Ok(Message::Standing(standing)) => Some(standing),
            _ => None,
        }
    }

    /// What arrives in place of a packet: nothing where it is none that a connection would let through.
    pub(super) fn lie(&mut self, link: LinkId, channel: Channel, packet: Packet) -> Option<Packet> {
        let is_back = matches!(channel, Channel::ToDialler | Channel::Fetched);
        let speaker = if is_back { link.listener } else { link.dialler };
        let Some(lies) = &mut self.lies else { return Some(packet) };
        if lies.sent.len() < REMEMBERED {
            lies.sent.push((channel, packet.clone()));
        } else if self.random.once_in(4) {
            let place = self.random.below(REMEMBERED as u64) as usize;
            lies.sent[place] = (channel, packet.clone());
        }
        // In the end it is honest, so that worlds come to rest.
        if !self.is_rough || lies.liar != speaker || !self.random.once_in(lies.times) {
            return Some(packet);
        }
        let heard = match self.random.below(4) {
            0 => {
                let other = lies.sent[self.random.below(lies.sent.len() as u64) as usize].clone();
                let is_same_kind = other.0 == channel;
                if is_same_kind { other.1 } else { packet }
            }
            _ => packet,
        };
        let changed = match heard {
            Packet::Message(bytes) => changed_message(bytes, &mut self.random).map(Packet::Message),
            Packet::Frame(header, data) => {
                changed_frame(header, &mut self.random).map(|header| Packet::Frame(header, data))
            }
        };
        self.note(|| format!("{link}: host {speaker} lies: {changed:?}"));
        changed
    }
}

/// The message with some bytes changed, if it is one still.
fn changed_message(mut bytes: Vec<u8>, random: &mut Random) -> Option<Vec<u8>> {
    for _ in 0..random.below(4) {
        let place = PREFIX_BYTES + random.below((bytes.len() - PREFIX_BYTES).max(1) as u64) as usize;
        let Some(byte) = bytes.get_mut(place) else { continue };
        *byte = match random.below(4) {
            0 => 0,
            1 => 0xff,
            2 => byte.wrapping_add(1),
            _ => random.next_number() as u8,
        };
        if random.once_in(3) {
            // A number as large as any.
            bytes[place..].iter_mut().take(8).for_each(|byte| *byte = 0xff);
        }
    }
    Message::decode(&bytes[PREFIX_BYTES..]).is_ok().then_some(bytes)
}

fn number(before: u64, random: &mut Random) -> u64 {
    match random.below(8) {
        0 => 0,
        1 => u64::MAX,
        2 => before.wrapping_add(1),
        3 => before.wrapping_sub(1),
        4 => random.next_number(),
        5 => random.below(1 << 20),
        _ => before,
    }
}

/// The frame with other numbers, if it is one still.
fn changed_frame(header: FrameHeader, random: &mut Random) -> Option<FrameHeader> {
    // Its payload stays as long as it is.
    let place = |range: ByteRange, random: &mut Random| ByteRange {
        offset: number(range.offset / 512, random).wrapping_mul(512),
        ..range
    };
    let body = match header.body {
        Body::Write { range, epoch, sequence } => Body::Write {
            range: place(range, random),
            epoch: Epoch(number(epoch.0, random)),
            sequence: Sequence(number(sequence.0, random)),
        },
        Body::Zero { range, epoch, sequence, may_unmap } => Body::Zero {
            range: place(range, random),
            epoch: Epoch(number(epoch.0, random)),
            sequence: Sequence(number(sequence.0, random)),
            may_unmap,
        },
        Body::EpochEnd { epoch, sequence, cut } => Body::EpochEnd {
            epoch: Epoch(number(epoch.0, random)),
            sequence: Sequence(number(sequence.0, random)),
            cut: cut != random.once_in(4),
        },
        Body::Generation { .. } => {
            Body::Generation { generation: GenerationId([random.next_number() as u8; 16]) }
        }
        Body::Copy { range, number: copy } => {
            Body::Copy { range: place(range, random), number: number(copy, random) }
        }
        Body::CopyZero { range, number: copy } => {
            Body::CopyZero { range: place(range, random), number: number(copy, random) }
        }
        Body::Digest { range, number: asked } => {
            Body::Digest { range: place(range, random), number: number(asked, random) }
        }
        Body::CopyDigest { range, number: copy } => {
            Body::CopyDigest { range: place(range, random), number: number(copy, random) }
        }
        Body::Content { range } => Body::Content { range: place(range, random) },
        Body::ContentZero { range } => Body::ContentZero { range: place(range, random) },
        Body::Fetched { range, number: asked } => {
            Body::Fetched { range: place(range, random), number: number(asked, random) }
        }
        Body::FetchedZero { range, number: asked } => {
            Body::FetchedZero { range: place(range, random), number: number(asked, random) }
        }
    };
    let session = Session(number(header.session.0, random));
    let header = FrameHeader { session, stream: Stream(header.stream.0), body };
    body.range().offset.checked_add(body.range().length)?;
    let payload = vec![0; body.payload_bytes() as usize];
    let read = FrameHeader::decode(&header.encode(&payload)).ok()?.check(&payload).ok()?;
    (read == header).then_some(header)
}
