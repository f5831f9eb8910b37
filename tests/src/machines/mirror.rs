//! A mirrored volume: a primary, its replicas, and the folder that all of it is in.

use super::content::first_difference;
use super::folder::Folder;
use super::host::Host;
use super::nbd::Client;
use blockmirror_agent::control::api::{Connection, PeerState, PeerStatus, VolumeState};

/// A primary and its replicas. Hosts go before the folder that they are in.
pub struct Mirror {
    /// The primary.
    pub primary: Host,
    /// The replicas.
    pub replicas: Vec<Host>,
    /// Where all of it is.
    pub folder: Folder,
}

impl Mirror {
    /// The volume `data` on the primary `a`, served by these devices, with a replica under each of these names, all of
    /// which are in sync.
    ///
    /// # Panics
    /// When any step fails.
    #[must_use]
    pub fn new(size_bytes: u64, devices: &str, replicas: &[&str]) -> Self {
        let folder = Folder::new();
        let primary = Host::new(&folder, "a");
        primary.create(size_bytes, devices);
        let mut mirror = Self { primary, replicas: Vec::new(), folder };
        replicas.iter().for_each(|name| mirror.add(name));
        // A volume without replicas is never in sync with all of them.
        if !mirror.replicas.is_empty() {
            mirror.wait_until_in_sync();
        }
        mirror
    }

    /// One more replica.
    ///
    /// # Panics
    /// When it can't join.
    pub fn add(&mut self, name: &str) {
        let replica = Host::new(&self.folder, name);
        replica.join(&self.primary, &replica.backing());
        self.replicas.push(replica);
    }

    /// The first replica.
    #[must_use]
    pub fn replica(&self) -> &Host {
        &self.replicas[0]
    }

    /// The first replica.
    #[must_use]
    pub fn replica_mut(&mut self) -> &mut Host {
        &mut self.replicas[0]
    }

    /// An NBD client of the primary.
    ///
    /// # Panics
    /// When it can't connect.
    #[must_use]
    pub fn client(&self) -> Client {
        Client::connect(&self.primary.socket()).expect("the primary serves its device")
    }

    /// The replica of this name, as the primary sees it now.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn peer(&self, name: &str) -> PeerStatus {
        let peers = self.primary.status().facts.peers;
        peers.into_iter().find(|peer| peer.name.as_str() == name).expect("the primary knows its replicas")
    }

    /// Waits until the primary sees a replica so.
    ///
    /// # Panics
    /// When it takes too long.
    pub fn wait_for_peer(&self, name: &str, what: &str, is_so: impl Fn(&PeerStatus) -> bool) -> PeerStatus {
        let is_it = |peer: &&PeerStatus| peer.name.as_str() == name && is_so(peer);
        let status =
            self.primary.wait_until(what, |status| status.facts.peers.iter().any(|peer| is_it(&peer)));
        status.facts.peers.into_iter().find(|peer| is_it(&peer)).expect("it was so")
    }

    /// Waits until the link to a replica is noticed to be lost.
    ///
    /// # Panics
    /// When it takes too long.
    pub fn wait_until_lost(&self, name: &str) -> PeerStatus {
        self.wait_for_peer(name, "the replica is lost", |peer| peer.connection != Connection::Connected)
    }

    /// Waits as an operator does, until the volume is said to be in sync.
    ///
    /// # Panics
    /// When it takes too long.
    pub fn wait_until_in_sync(&self) {
        self.primary.succeed(&["wait", "data", "--for", "in-sync", "--timeout", "90s"]);
    }

    /// Waits until every replica has everything, and nothing is on its way.
    ///
    /// # Panics
    /// When it takes too long.
    pub fn wait_until_quiet(&self) {
        self.wait_until_in_sync();
        self.primary.wait_until("all is quiet", |status| status.facts.peers.iter().all(is_quiet));
    }

    /// Waits until all is quiet; then all backings must be identical.
    ///
    /// # Panics
    /// When they differ.
    pub fn assert_identical(&self) {
        self.wait_until_quiet();
        self.replicas.iter().for_each(|replica| assert_identical(&self.primary, replica));
    }
}

/// Waits until a replica follows, and its primary has all its replicas in sync and nothing on its way; then the two must
/// be identical.
///
/// # Panics
/// When it takes too long, or they differ.
pub fn assert_identical(primary: &Host, replica: &Host) {
    // A replica that was killed is in sync there until the loss is noticed: the one that runs now must say that it follows.
    replica.wait_until("it follows", |status| status.state == VolumeState::Following);
    primary.wait_until("all is quiet", |status| status.facts.peers.iter().all(is_quiet));
    let difference = first_difference(&primary.backing(), &replica.backing());
    assert_eq!(difference, None, "{} differs from {} at this byte", replica.name(), primary.name());
}

fn is_quiet(peer: &PeerStatus) -> bool {
    peer.connection == Connection::Connected
        && peer.state == Some(PeerState::InSync)
        && (peer.out_of_sync_bytes, peer.lag_bytes) == (Some(0), Some(0))
}
