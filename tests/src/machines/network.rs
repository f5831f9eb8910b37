//! A network of its own for some hosts: a namespace each, joined by a bridge, with whatever addresses a test gives them.
//!
//! A bridge drops what is too long for the next link and tells nobody, as a path does whose ICMP messages are filtered.

use crate::bench::network::Namespace;
use crate::machines::programs::succeed;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU32, Ordering};

/// A network namespace of a test. Dropped, it is gone; the hosts in it go before.
pub struct Network {
    hub: Namespace,
    hosts: BTreeMap<String, Namespace>,
}

impl Network {
    /// A network of these hosts. Each has an interface `eth0`, without an address.
    ///
    /// # Panics
    /// When it can't be made.
    #[must_use]
    pub fn new(hosts: &[&str]) -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let number = COUNT.fetch_add(1, Ordering::Relaxed);
        let namespace = |name: &str| Namespace::new(&format!("{number}-{name}")).expect("a namespace");
        let hub = namespace("hub");
        let hosts = hosts.iter().map(|host| ((*host).to_owned(), namespace(host))).collect();
        let network = Self { hub, hosts };
        network.at_hub("link add name bridge type bridge mcast_snooping 0");
        network.at_hub("link set bridge up");
        for (host, namespace) in &network.hosts {
            let far = namespace.name();
            network.at_hub(&format!("link add name to-{host} type veth peer name eth0 netns {far}"));
            network.at_hub(&format!("link set to-{host} master bridge up"));
            // Bundles of packets pass a bridge whatever the next link takes.
            network.at(host, "link set eth0 up gso_max_segs 1");
        }
        network
    }

    /// Has ip(8) do something in a host's namespace.
    ///
    /// # Panics
    /// When it fails.
    pub fn at(&self, host: &str, arguments: &str) {
        ip(&self.hosts[host], arguments);
    }

    /// Has ip(8) do something where the hosts are joined: the port of each is called `to-HOST`.
    ///
    /// # Panics
    /// When it fails.
    pub fn at_hub(&self, arguments: &str) {
        ip(&self.hub, arguments);
    }

    /// Gives a host an address that can be used at once.
    ///
    /// # Panics
    /// When it fails.
    pub fn give(&self, host: &str, address: &str) {
        let unverified = if address.contains(':') { " nodad" } else { "" };
        self.at(host, &format!("addr add {address} dev eth0{unverified}"));
    }

    /// The path of a host's namespace.
    #[must_use]
    pub fn path(&self, host: &str) -> String {
        format!("/run/netns/{}", self.hosts[host].name())
    }
}

fn ip(namespace: &Namespace, arguments: &str) {
    let arguments: Vec<&str> = ["-n", namespace.name()].into_iter().chain(arguments.split(' ')).collect();
    succeed("ip", &arguments);
}
