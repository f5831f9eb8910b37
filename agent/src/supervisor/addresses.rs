//! Where others reach this host, when nobody said.

use crate::config::Address;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// The addresses to tell others: the one listened at, or those of all interfaces where that is all of them. Loopback
/// addresses come only where there is nothing else.
pub(super) fn reachable(listen: SocketAddr) -> Vec<Address> {
    if !listen.ip().is_unspecified() {
        return vec![Address::from(listen)];
    }
    let mut found = interface_addresses();
    found.retain(|address| (listen.is_ipv6() || address.is_ipv4()) && !is_local(*address));
    if found.is_empty() {
        found.push(IpAddr::V4(Ipv4Addr::LOCALHOST));
    }
    found.into_iter().map(|ip| Address::from(SocketAddr::new(ip, listen.port()))).collect()
}

fn is_local(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => address.is_loopback() || address.is_link_local(),
        IpAddr::V6(address) => address.is_loopback() || address.is_unicast_link_local(),
    }
}

/// The addresses of all interfaces that are up (getifaddrs(3)).
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
    fn all_interfaces_are_told_with_the_port_and_never_unspecified() {
        let told = reachable("0.0.0.0:7447".parse().unwrap());
        assert!(!told.is_empty());
        for address in told {
            let address: SocketAddr = address.as_str().parse().unwrap();
            assert!(!address.ip().is_unspecified() && address.port() == 7447);
        }
    }
}
