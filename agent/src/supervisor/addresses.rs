//! Where others reach this host, when nobody said.

use crate::config::{ADDRESSES, Address};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// How many addresses others are told: what they take, and one that they may see.
pub(super) const TOLD: usize = ADDRESSES - 1;

/// The addresses to tell others: the one listened at, or those of all interfaces where that is all of them. Loopback
/// addresses come only where there is nothing else. A link-local one means another host on each link, so none is told.
pub(super) fn reachable(listen: SocketAddr) -> Vec<Address> {
    if !listen.ip().is_unspecified() {
        return vec![Address::from(listen)];
    }
    among(listen, interface_addresses())
}

/// Which of a host's addresses others are told, where it listens at all of one family or of both.
fn among(listen: SocketAddr, mut found: Vec<IpAddr>) -> Vec<Address> {
    found.retain(|address| (listen.is_ipv6() || address.is_ipv4()) && !is_local(*address));
    if found.is_empty() {
        found.push(IpAddr::V4(Ipv4Addr::LOCALHOST));
    }
    found.truncate(TOLD);
    found.into_iter().map(|ip| Address::from(SocketAddr::new(ip, listen.port()))).collect()
}

pub(super) fn is_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_loopback() || address.is_link_local(),
        IpAddr::V6(address) => address.is_loopback() || address.is_unicast_link_local(),
    }
}

/// The addresses of all interfaces that are up (getifaddrs(3)), which none of the crates in use asks for.
fn interface_addresses() -> Vec<IpAddr> {
    let mut list: *mut libc::ifaddrs = std::ptr::null_mut();
    // SAFETY: the call fills `list` with a list that is ours until freeifaddrs below.
    if unsafe { libc::getifaddrs(&raw mut list) } != 0 {
        return Vec::new();
    }
    let mut found = Vec::new();
    let mut at = list;
    while !at.is_null() {
        // SAFETY: `at` is an entry of the list, which is not freed yet.
        let entry = unsafe { &*at };
        at = entry.ifa_next;
        if entry.ifa_addr.is_null() || entry.ifa_flags & libc::IFF_UP as u32 == 0 {
            continue;
        }
        // SAFETY: the address is not null and begins with its family.
        let family = i32::from(unsafe { (*entry.ifa_addr).sa_family });
        if family == libc::AF_INET {
            // SAFETY: an address of this family is a sockaddr_in.
            let address = unsafe { &*entry.ifa_addr.cast::<libc::sockaddr_in>() };
            found.push(IpAddr::V4(Ipv4Addr::from(u32::from_be(address.sin_addr.s_addr))));
        } else if family == libc::AF_INET6 {
            // SAFETY: an address of this family is a sockaddr_in6.
            let address = unsafe { &*entry.ifa_addr.cast::<libc::sockaddr_in6>() };
            found.push(IpAddr::V6(Ipv6Addr::from(address.sin6_addr.s6_addr)));
        }
    }
    // SAFETY: the list came from getifaddrs, and no entry of it is used any more.
    unsafe { libc::freeifaddrs(list) };
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_is_listened_at_is_told_as_it_is() {
        let listen: SocketAddr = "127.0.0.1:7447".parse().unwrap();
        assert_eq!(reachable(listen), [Address::from(listen)]);
    }

    #[test]
    fn both_families_are_told_and_loopback_only_where_there_is_nothing_else() {
        let local = ["127.0.0.1", "::1", "169.254.1.1", "fe80::1"];
        let far = ["10.0.0.1", "fd00::1", "2001:db8::1"];
        let ips = |texts: &[&str]| texts.iter().map(|text| text.parse().unwrap()).collect::<Vec<IpAddr>>();
        let (both, four) = ("[::]:7".parse().unwrap(), "0.0.0.0:7".parse().unwrap());
        for (listen, found, told) in [
            (both, [local, ["::1"; 4]].concat(), &["127.0.0.1:7"][..]),
            (both, [&local[..], &far].concat(), &["10.0.0.1:7", "[fd00::1]:7", "[2001:db8::1]:7"]),
            (both, [&local[..], &far[1..2]].concat(), &["[fd00::1]:7"]),
            (four, [&local[..], &far].concat(), &["10.0.0.1:7"]),
        ] {
            let all = among(listen, ips(&found));
            assert_eq!(all.iter().map(Address::as_str).collect::<Vec<_>>(), told);
        }
        assert_eq!(among(both, vec![IpAddr::from([10, 0, 0, 1]); 99]).len(), TOLD);
    }

    #[test]
    fn all_interfaces_are_told_with_the_port_and_never_unspecified() {
        let told = reachable("0.0.0.0:7447".parse().unwrap());
        assert!(!told.is_empty());
        for address in told {
            let address: SocketAddr = address.as_str().parse().unwrap();
            assert!(!address.ip().is_unspecified() && address.port() == 7447);
        }
    }
}
