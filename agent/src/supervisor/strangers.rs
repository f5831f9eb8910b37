//! Connections of keys that no volume knows: each has a while to get itself known. There are so many places, of which each
//! network gets a part: one address that sits in them with ever new keys keeps nobody else out (X1).

use crate::transport::network;
use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Arc, Mutex};

/// How many there may be at a time.
const MOST: usize = 64;
/// How many of them from one address of IPv4, or one network of IPv6 as a host has it.
const FROM_ONE: usize = 8;

/// How many connections of unknown hosts there are, by address. Clones are handles to the same places.
#[derive(Clone, Debug, Default)]
pub(super) struct Strangers(Arc<Mutex<HashMap<u128, usize>>>);

/// A place that is taken, until this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    strangers: Strangers,
    network: u128,
}

impl Strangers {
    /// A place for one from this address, if there is any.
    pub(super) fn admit(&self, address: IpAddr) -> Option<Place> {
        let network = network(address);
        let mut from = self.0.lock().expect("no holder of the lock panics");
        let has_room =
            from.values().sum::<usize>() < MOST && from.get(&network).is_none_or(|of| *of < FROM_ONE);
        has_room.then(|| {
            *from.entry(network).or_default() += 1;
            Place { strangers: self.clone(), network }
        })
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut from = self.strangers.0.lock().expect("no holder of the lock panics");
        let left = from.get(&self.network).map_or(0, |of| of - 1);
        match left {
            0 => drop(from.remove(&self.network)),
            left => drop(from.insert(self.network, left)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address(host: u8) -> IpAddr {
        IpAddr::from([192, 0, 2, host])
    }

    /// 64 keys of one address kept every new host from joining, for as long as they liked.
    #[test]
    fn one_network_takes_its_part_and_gives_it_back() {
        let strangers = Strangers::default();
        let mut first: Vec<Place> =
            (0..FROM_ONE).map(|_| strangers.admit(address(1)).expect("room")).collect();
        assert!(strangers.admit(address(1)).is_none());
        let of_one_host = |last: u16| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, last]);
        let other: Vec<Place> =
            (0..FROM_ONE as u16).filter_map(|last| strangers.admit(of_one_host(last))).collect();
        assert!(
            other.len() == FROM_ONE && strangers.admit(of_one_host(99)).is_none(),
            "it has a whole network"
        );
        first.pop();
        assert!(strangers.admit(address(1)).is_some());
        drop((first, other));
        let all: Vec<Place> = (0..=255).filter_map(|host| strangers.admit(address(host))).collect();
        assert_eq!(all.len(), MOST);
        drop(all);
        assert!(strangers.0.lock().unwrap().is_empty(), "nothing is kept of who has gone");
    }
}
