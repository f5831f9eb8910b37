//! Which handshakes are taken while many are under way: nobody's may take all the room, and those of known hosts find some.
//!
//! Whoever dials from an address that no known host has shares the room for strangers, of which each network gets a part.
//! From a number of handshakes on, whoever dials must first prove to receive what is sent to its address, so that forged
//! addresses get no further than that number.

use blockmirror_protocol::units::HostId;
use std::collections::{HashMap, HashSet};
use std::net::{IpAddr, SocketAddr};

/// How many handshakes are under way at a time; more are refused.
const MOST: usize = 128;
/// How many of them are those of addresses that no known host has.
const STRANGERS: usize = 96;
/// How many of them come from one address of IPv4, or one network of IPv6 as a host has it.
const FROM_ONE: usize = 16;
/// The same for the address of a known host; several agents may have it.
const FROM_ONE_KNOWN: usize = 32;
/// From so many on, whoever dials must first prove to receive what is sent to its address.
const UNPROVEN: usize = 32;

/// How many addresses the names of one host may stand for, as far as room is kept for them.
const RESOLVED: usize = 64;

/// The hosts whose handshakes find room, and where they are.
#[derive(Debug, Default)]
pub(super) struct KnownHosts(HashMap<HostId, Places>);

#[derive(Debug, Default)]
struct Places {
    /// As they are given.
    given: HashSet<IpAddr>,
    /// What its names stood for when it was last dialled.
    resolved: HashSet<IpAddr>,
}

impl KnownHosts {
    /// Takes these for the known hosts, with the addresses that are given for them.
    pub(super) fn set(&mut self, hosts: HashMap<HostId, HashSet<IpAddr>>) {
        let mut before = std::mem::take(&mut self.0);
        let places = |(host, given)| {
            let resolved = before.remove(&host).map(|places| places.resolved).unwrap_or_default();
            (host, Places { given, resolved })
        };
        self.0 = hosts.into_iter().map(places).collect();
    }

    /// A host is dialled at these addresses, its names among them.
    pub(super) fn dialled(&mut self, host: HostId, targets: &[SocketAddr]) {
        if let Some(places) = self.0.get_mut(&host) {
            places.resolved =
                targets.iter().take(RESOLVED).map(|target| target.ip().to_canonical()).collect();
        }
    }

    /// Whether a known host may be there. Its form is the canonical one.
    fn are_at(&self, address: IpAddr) -> bool {
        self.0.values().any(|places| places.given.contains(&address) || places.resolved.contains(&address))
    }
}

/// What becomes of a handshake that somebody wants to begin.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Verdict {
    /// It is taken.
    Take,
    /// Whoever dials has to prove its address first.
    Prove,
    /// There is no room for it.
    Refuse,
}

/// Where a handshake comes from, as far as it is told apart from others.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub(super) struct Origin {
    network: u128,
    is_known: bool,
}

/// The network that an address counts for: each address of IPv4 for itself, of IPv6 what a host has.
#[must_use]
pub fn network(address: IpAddr) -> u128 {
    match address.to_canonical() {
        IpAddr::V4(address) => u128::from(address.to_ipv6_mapped()),
        IpAddr::V6(address) => u128::from(address) >> 64 << 64,
    }
}

impl Origin {
    /// The origin of an address. The known hosts' are told apart one by one.
    pub(super) fn new(address: IpAddr, known: &KnownHosts) -> Self {
        let address = address.to_canonical();
        let is_known = known.are_at(address);
        let network = match address {
            IpAddr::V6(address) if is_known => u128::from(address),
            address => network(address),
        };
        Self { network, is_known }
    }
}

/// The handshakes that are under way.
#[derive(Debug, Default)]
pub(super) struct Handshakes {
    from: HashMap<Origin, usize>,
    strangers: usize,
    all: usize,
}

impl Handshakes {
    /// What becomes of one more; `may_prove` tells whether its address can be asked to be proved yet.
    pub(super) fn judge(&self, origin: Origin, may_prove: bool) -> Verdict {
        let from = self.from.get(&origin).copied().unwrap_or(0);
        let has_room = match origin.is_known {
            true => from < FROM_ONE_KNOWN,
            false => from < FROM_ONE && self.strangers < STRANGERS,
        };
        match () {
            () if !has_room || self.all >= MOST => Verdict::Refuse,
            () if may_prove && self.all >= UNPROVEN => Verdict::Prove,
            () => Verdict::Take,
        }
    }

    /// One begins.
    pub(super) fn begin(&mut self, origin: Origin) {
        *self.from.entry(origin).or_default() += 1;
        self.strangers += usize::from(!origin.is_known);
        self.all += 1;
    }

    /// One has ended.
    pub(super) fn end(&mut self, origin: Origin) {
        let from = self.from.get_mut(&origin).expect("what ends has begun");
        *from -= 1;
        if *from == 0 {
            self.from.remove(&origin);
        }
        self.strangers -= usize::from(!origin.is_known);
        self.all -= 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_network_takes_its_part_and_strangers_theirs_and_a_known_host_finds_room() {
        let given = ["192.0.2.1", "2001:db8::1"].map(|text| text.parse().unwrap()).into();
        let mut known = KnownHosts::default();
        known.set([(HostId([1; 32]), given)].into());
        let origin = |text: &str| Origin::new(text.parse().unwrap(), &known);
        let mut handshakes = Handshakes::default();
        let mut take = |origin| {
            let mut count = 0;
            while handshakes.judge(origin, false) == Verdict::Take {
                handshakes.begin(origin);
                count += 1;
            }
            count
        };
        assert_eq!(take(origin("198.51.100.1")), FROM_ONE);
        assert_eq!(take(origin("::ffff:198.51.100.1")), 0, "the same by another family");
        assert_eq!(take(origin("2001:db8:0:1::1")), FROM_ONE);
        assert_eq!(take(origin("2001:db8:0:1:ffff::2")), 0, "of the same network");
        assert_eq!((2..99).map(|last| take(origin(&format!("198.51.100.{last}")))).sum::<usize>(), 64);
        assert_eq!(take(origin("2001:db8::2")), 0, "a neighbour of a known host is none");
        let first = origin("192.0.2.1");
        assert_eq!(handshakes.judge(first, true), Verdict::Prove);
        assert_eq!(handshakes.judge(first, false), Verdict::Take);
        assert_eq!(handshakes.judge(origin("203.0.113.1"), true), Verdict::Refuse);
        handshakes.end(origin("198.51.100.1"));
        assert_eq!(handshakes.judge(origin("203.0.113.1"), false), Verdict::Take);
        assert_eq!(Handshakes::default().judge(origin("203.0.113.1"), true), Verdict::Take);
    }
    #[test]
    fn room_is_kept_where_a_host_is_given_and_where_it_was_dialled_as_long_as_it_is_known() {
        let (host, other) = (HostId([1; 32]), HostId([2; 32]));
        let address = |last: u8| IpAddr::from([192, 0, 2, last]);
        let mut known = KnownHosts::default();
        known.dialled(host, &[SocketAddr::new(address(1), 7447)]);
        assert!(!known.are_at(address(1)), "nobody knows it");
        known.set([(host, HashSet::from([address(2)]))].into());
        known.dialled(host, &[SocketAddr::new(address(1), 7447), "[::ffff:192.0.2.3]:7447".parse().unwrap()]);
        assert!([1, 2, 3].map(address).into_iter().all(|address| known.are_at(address)));
        known.set([(host, HashSet::new()), (other, HashSet::new())].into());
        assert!(known.are_at(address(1)) && !known.are_at(address(2)));
        known.dialled(host, &[SocketAddr::new(address(4), 7447)]);
        assert!(known.are_at(address(4)) && !known.are_at(address(1)), "it has moved");
        known.set([(other, HashSet::new())].into());
        assert!(!known.are_at(address(4)));
    }
}
