//! How hosts find each other: addresses and names that change, both families.

use blockmirror_agent::control::api::{Connection, PeerState, PeerStatus, VolumeState};
use blockmirror_tests::harness::random::Random;
use blockmirror_tests::machines::content::{first_difference, noise};
use blockmirror_tests::machines::folder::Folder;
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::network::Network;
use blockmirror_tests::machines::programs::{succeed, text};
use blockmirror_tests::require;

const MIB: u64 = 1 << 20;

fn addresses(peer: &PeerStatus) -> Vec<&str> {
    peer.addresses.iter().map(|address| address.as_str()).collect()
}

/// Waits until a host knows the peer with this key by this name, and reaches it at these addresses alone.
fn wait_until_known(host: &Host, fingerprint: &str, name: &str, at: &[&str]) {
    host.wait_until("a peer is known by its new name and address", |status| {
        let peer = status.facts.peers.iter().find(|peer| peer.fingerprint == fingerprint);
        peer.is_some_and(|peer| peer.name.as_str() == name && addresses(peer) == at)
    });
}

/// Only primaries dialled, and a primary knew the old address alone: the replica never came back. Its new name was seen
/// by nobody.
#[test]
fn a_host_that_moved_and_was_renamed_is_found_by_all_others_and_known_by_its_new_name() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b", "c"]);
    let fingerprint = mirror.peer("b").fingerprint;
    mirror.replica_mut().stop();
    mirror.replica_mut().settle("bb");
    mirror.replica_mut().start();
    let address = mirror.replica().link().address().to_string();
    for host in [&mirror.primary, &mirror.replicas[1]] {
        wait_until_known(host, &fingerprint, "bb", &[&address]);
    }
    mirror.assert_identical();
    // A primary that moved is found in the same way, and speaks for itself.
    let fingerprint = fingerprint_of(mirror.replica(), "a");
    mirror.primary.stop();
    mirror.primary.settle("aa");
    mirror.primary.start();
    let address = mirror.primary.link().address().to_string();
    for host in &mirror.replicas {
        wait_until_known(host, &fingerprint, "aa", &[&address]);
    }
    mirror.wait_until_in_sync();
    // Nobody dials the old addresses any more: everybody's files say where the others are.
    mirror.primary.succeed(&["switch", "data", "--to", "bb"]);
    for host in [&mirror.primary, &mirror.replicas[1]] {
        host.wait_until("it follows", |status| status.state == VolumeState::Following);
    }
}

/// The key of a peer, by the name that a host knows it by.
fn fingerprint_of(host: &Host, name: &str) -> String {
    let peers = host.status().facts.peers;
    peers.into_iter().find(|peer| peer.name.as_str() == name).expect("it is a peer").fingerprint
}

/// Hosts `a` and `b` of a network, `a` with a volume that `b` mirrors.
fn mirror_within(network: &Network) -> Mirror {
    let folder = Folder::new();
    let [mut a, mut b] = ["a", "b"].map(|name| Host::within(network, &folder, name));
    a.start();
    b.start();
    a.create(16 * MIB, "nbd");
    b.join(&a, &b.backing());
    let mirror = Mirror { primary: a, replicas: vec![b], folder };
    mirror.wait_until_in_sync();
    mirror
}

/// The token named the loopback address, and the new host asked itself.
#[test]
fn hosts_of_either_family_alone_and_of_both_find_each_other_with_nothing_configured() {
    require!("root", "ip", "nsenter");
    for (given, at) in [
        (&[("a", "fd00:77::1/64"), ("b", "fd00:77::2/64")][..], &["[fd00:77::2]:7447"][..]),
        (&[("a", "10.77.0.1/24"), ("b", "10.77.0.2/24")], &["10.77.0.2:7447"]),
        (
            &[("a", "10.77.0.1/24"), ("a", "fd00:77::1/64"), ("b", "10.77.0.2/24"), ("b", "fd00:77::2/64")],
            &["10.77.0.2:7447", "[fd00:77::2]:7447"],
        ),
    ] {
        let network = Network::new(&["a", "b"]);
        given.iter().for_each(|(host, address)| network.give(host, address));
        let mirror = mirror_within(&network);
        let found = mirror.peer("b");
        let mut addresses = addresses(&found);
        addresses.sort_unstable();
        assert_eq!(addresses, at);
    }
}

/// The interface that this host's volume is mirrored over gets another address, and the other family's, while all runs.
#[test]
fn a_replica_whose_address_changes_while_it_runs_goes_on_following() {
    require!("root", "ip", "nsenter");
    let network = Network::new(&["a", "b"]);
    network.give("a", "10.77.0.1/24");
    network.give("b", "10.77.0.2/24");
    let mirror = mirror_within(&network);
    let fingerprint = mirror.peer("b").fingerprint;
    network.at("b", "addr del 10.77.0.2/24 dev eth0");
    network.give("b", "10.77.0.40/24");
    wait_until_known(&mirror.primary, &fingerprint, "b", &["10.77.0.40:7447"]);
    mirror.assert_identical();
    // The primary's, too. The replica hears of it on the way that is open.
    let fingerprint = fingerprint_of(mirror.replica(), "a");
    network.at("a", "addr del 10.77.0.1/24 dev eth0");
    network.give("a", "10.77.0.10/24");
    wait_until_known(mirror.replica(), &fingerprint, "a", &["10.77.0.10:7447"]);
    mirror.assert_identical();
}

/// Neither side of a pause was told by the other: one took it for a loss, and what was resumed was resynced.
#[test]
fn a_pause_is_told_to_the_other_side_and_replicas_are_shown_as_reachable() {
    let mirror = Mirror::new(16 * MIB, "nbd", &["b", "c"]);
    let (a, b) = (&mirror.primary, mirror.replica());
    let state = |host: &Host, name: &str| {
        let peers = host.status().facts.peers;
        let peer = peers.into_iter().find(|peer| peer.name.as_str() == name).expect("it is a peer");
        (peer.connection, peer.paused_there)
    };
    b.wait_until("the other replica is reachable", |status| {
        status.facts.peers.iter().any(|peer| peer.connection == Connection::Reachable)
    });
    for (here, there, name) in [(a, b, "b"), (b, a, "a")] {
        here.succeed(&["pause", "data", name]);
        there.wait_until("it knows that it is paused", |status| {
            status
                .facts
                .peers
                .iter()
                .any(|peer| (peer.connection, peer.paused_there) == (Connection::Paused, true))
        });
        assert!(there.status().action.contains(&format!("on {}: blockmirror resume data", here.name())));
        assert_eq!(state(here, name), (Connection::Paused, false));
        here.succeed(&["resume", "data", name]);
        mirror.wait_until_in_sync();
    }
}

/// Both hosts moved at once, so that neither knows where the other is.
#[test]
fn a_host_that_nobody_finds_is_found_where_the_operator_says_while_all_runs() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    mirror.primary.stop();
    mirror.replica_mut().stop();
    mirror.primary.settle("a");
    mirror.replica_mut().settle("b");
    mirror.primary.start();
    mirror.replica_mut().start();
    let address = mirror.replica().link().address().to_string();
    mirror.wait_until_lost("b");
    mirror.primary.succeed(&["set-address", "data", "b", &address]);
    mirror.assert_identical();
    let path = mirror.peer("b").path.expect("the path is shown");
    assert_eq!((path.address.as_str(), path.black_holes), (address.as_str(), 0));
}

/// The data path went on when a path's MTU shrank and nobody said so, and is to; status shows that it did.
#[test]
fn a_resync_goes_on_over_a_path_that_shrinks_and_status_says_so() {
    require!("root", "ip", "nsenter");
    let network = Network::new(&["a", "b"]);
    network.give("a", "10.77.0.1/24");
    network.give("b", "10.77.0.2/24");
    let mut mirror = mirror_within(&network);
    mirror.wait_for_peer("b", "the path's MTU is found", |peer| {
        peer.path.as_ref().is_some_and(|path| path.packet_bytes > 1400)
    });
    let mut random = Random::new(1);
    mirror.primary.succeed(&["pause", "data", "b"]);
    for offset in (0..16 * MIB).step_by(MIB as usize) {
        mirror.client().write(offset, &noise(&mut random, MIB)).expect("a write");
    }
    mirror.primary.succeed(&["tune", "data", "b", "--resync-limit", "2M"]);
    mirror.primary.succeed(&["resume", "data", "b"]);
    mirror.wait_for_peer("b", "some of it is copied", |peer| {
        peer.resync.as_ref().is_some_and(|resync| (1..resync.total_bytes).contains(&resync.done_bytes))
    });
    network.at_hub("link set to-b mtu 1300");
    mirror.wait_for_peer("b", "the hole is noticed", |peer| {
        peer.path.as_ref().is_some_and(|path| path.black_holes > 0 && path.packet_bytes < 1300)
    });
    mirror.primary.succeed(&["tune", "data", "b", "--resync-limit", "none"]);
    mirror.assert_identical();
    mirror.replicas.clear();
}

/// A virtual machine and its clone had one key: whichever answered was "in sync", and nobody told them apart.
#[test]
fn two_hosts_with_one_key_are_named_and_not_in_sync_until_one_is_gone() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    mirror.replica_mut().stop();
    let mut clone = Host::prepare(&mirror.folder, "clone");
    for folder in ["config/volumes", "state"] {
        let (from, to) = (mirror.replica().path(folder), clone.path(folder));
        succeed("cp", &["-r", text(&from), text(&to)]);
    }
    mirror.replica_mut().start();
    mirror.wait_until_in_sync();
    clone.start();
    let status = mirror
        .primary
        .wait_until("the two are told apart", |status| status.facts.peers[0].state == Some(PeerState::Twins));
    assert_eq!(status.state, VolumeState::Degraded);
    assert!(status.verdict.starts_with("two hosts use the key of b: at "), "{status:?}");
    let address = mirror.replica().link().address();
    assert!(status.facts.peers[0].addresses.iter().any(|known| *known == address.into()), "{status:?}");
    // Neither is mirrored to, as nobody knows which of the two it would be.
    mirror.wait_for_peer("b", "its session ends", |peer| peer.connection == Connection::Disconnected);
    mirror.client().write_durably(0, &[1; 4096]).expect("the primary goes on");
    assert_ne!(first_difference(&mirror.primary.backing(), &mirror.replica().backing()), None);
    clone.kill();
    mirror.assert_identical();
}
