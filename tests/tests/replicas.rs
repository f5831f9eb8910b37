//! Several replicas of one volume: each follows by itself, and knows the others.

use blockmirror_agent::config::{ConfigFolder, Role};
use blockmirror_agent::control::api::{Connection, PeerState, VolumeState};
use blockmirror_tests::harness::random::Random;
use blockmirror_tests::machines::content::{BLOCK_BYTES, first_difference, noise};
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::nbd::Client;
use blockmirror_tests::machines::patience::until;

const MIB: u64 = 1 << 20;

fn write_blocks(client: &mut Client, random: &mut Random, blocks: std::ops::Range<u64>) {
    for block in blocks {
        client.write(block * BLOCK_BYTES, &noise(random, BLOCK_BYTES)).expect("a write");
    }
    client.flush().expect("a flush");
}

#[test]
fn two_replicas_are_identical_and_each_has_a_map_of_its_own() {
    let mut mirror = Mirror::new(64 * MIB, "nbd", &["b", "c"]);
    let mut random = Random::new(1);
    let mut client = mirror.client();
    write_blocks(&mut client, &mut random, 0..500);
    mirror.assert_identical();

    mirror.primary.succeed(&["pause", "data", "b"]);
    mirror.wait_for_peer("b", "b is paused", |peer| peer.connection == Connection::Paused);
    write_blocks(&mut client, &mut random, 1000..1100);
    mirror.replicas[1].kill();
    mirror.wait_until_lost("c");
    write_blocks(&mut client, &mut random, 1100..1150);
    assert_eq!(mirror.peer("b").out_of_sync_bytes, Some(150 * BLOCK_BYTES), "since its pause");
    // What c was sent and did not confirm before it was lost may be marked as well.
    let lacks = mirror.peer("c").out_of_sync_bytes.expect("the primary keeps a map");
    assert!((50..=150).contains(&(lacks / BLOCK_BYTES)), "{lacks}");

    mirror.replicas[1].start();
    let back = mirror.wait_for_peer("c", "c has everything", |peer| {
        peer.connection == Connection::Connected
            && peer.state == Some(PeerState::InSync)
            && peer.out_of_sync_bytes == Some(0)
    });
    assert_eq!(back.name.as_str(), "c");
    assert_eq!(mirror.peer("b").out_of_sync_bytes, Some(150 * BLOCK_BYTES), "c's return is none of b's");
    assert_eq!(mirror.primary.status().state, VolumeState::Degraded);
    mirror.primary.succeed(&["resume", "data", "b"]);
    mirror.assert_identical();
}

#[test]
fn one_replica_that_is_lost_holds_up_neither_writes_nor_the_other() {
    let mirror = Mirror::new(64 * MIB, "nbd", &["b", "c"]);
    let mut random = Random::new(2);
    let mut client = mirror.client();
    mirror.replicas[0].link().cut();
    // More than a window, which is kept for a replica that does not answer.
    for offset in (0..64 * MIB).chain(0..64 * MIB).step_by(MIB as usize) {
        client.write(offset, &noise(&mut random, MIB)).expect("a write");
    }
    client.flush().expect("a flush");
    mirror.wait_for_peer("c", "c has everything", |peer| {
        peer.state == Some(PeerState::InSync)
            && (peer.out_of_sync_bytes, peer.lag_bytes) == (Some(0), Some(0))
    });
    mirror.replicas[0].link().mend();
    mirror.assert_identical();
}

/// What a host's configuration says about the volume's other hosts.
fn peers_in_configuration(host: &Host) -> Vec<(String, Role, Vec<String>)> {
    let folder = ConfigFolder::new(host.path("config"));
    let volume = folder.load_volume(&"data".parse().expect("a name")).expect("the volume's file is right");
    let mut peers: Vec<_> = volume
        .peers
        .iter()
        .map(|peer| {
            let addresses = peer.addresses.iter().map(ToString::to_string).collect();
            (peer.name.to_string(), peer.role, addresses)
        })
        .collect();
    peers.sort_by(|one, other| one.0.cmp(&other.0));
    peers
}

#[test]
fn replicas_learn_of_each_other_also_when_they_were_away() {
    let mut mirror = Mirror::new(16 * MIB, "none", &["b", "c"]);
    let address = |host: &Host| vec![host.link().address().to_string()];
    let expected = |others: &[(&Host, Role)]| -> Vec<_> {
        others.iter().map(|(host, role)| (host.name().to_owned(), *role, address(host))).collect()
    };
    let knows = |host: &Host, others: &[(&Host, Role)]| {
        until("the others are in the configuration", || {
            let found = peers_in_configuration(host);
            if found == expected(others) { Ok(()) } else { Err(format!("{found:?}")) }
        });
    };
    let [b, c] = &mirror.replicas[..] else { panic!("there are two replicas") };
    knows(b, &[(&mirror.primary, Role::Primary), (c, Role::Replica)]);
    knows(c, &[(&mirror.primary, Role::Primary), (b, Role::Replica)]);

    mirror.replicas[0].stop();
    mirror.add("d");
    mirror.replicas[0].start();
    mirror.assert_identical();
    let [b, c, d] = &mirror.replicas[..] else { panic!("there are three replicas") };
    let primary = (&mirror.primary, Role::Primary);
    knows(b, &[primary, (c, Role::Replica), (d, Role::Replica)]);
    knows(c, &[primary, (b, Role::Replica), (d, Role::Replica)]);
    knows(d, &[primary, (b, Role::Replica), (c, Role::Replica)]);
}

#[test]
fn a_replica_that_was_taken_out_and_put_back_is_copied_anew() {
    // Its old map said that nothing differed, and nobody had marked in it while it was no peer.
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    let mut random = Random::new(4);
    write_blocks(&mut mirror.client(), &mut random, 0..50);
    mirror.assert_identical();
    let folder = ConfigFolder::new(mirror.primary.path("config"));
    let with_b = folder.load_volume(&"data".parse().expect("a name")).expect("the volume's file");
    let mut without_b = with_b.clone();
    without_b.peers.clear();

    mirror.primary.stop();
    folder.save_volume(&without_b).expect("the volume's file");
    mirror.primary.start();
    write_blocks(&mut mirror.client(), &mut random, 100..150);
    mirror.primary.stop();
    folder.save_volume(&with_b).expect("the volume's file");
    mirror.primary.start();
    mirror.assert_identical();
}

#[test]
fn a_replica_that_its_primary_does_not_know_joins_again() {
    // A crash in the middle of a join leaves the replica's side alone; there is no command to take it away.
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    let mut random = Random::new(5);
    write_blocks(&mut mirror.client(), &mut random, 0..50);
    mirror.assert_identical();
    let folder = ConfigFolder::new(mirror.primary.path("config"));
    let mut volume = folder.load_volume(&"data".parse().expect("a name")).expect("the volume's file");
    volume.peers.clear();
    mirror.primary.stop();
    folder.save_volume(&volume).expect("the volume's file");
    mirror.primary.start();
    write_blocks(&mut mirror.client(), &mut random, 20..80);

    let token = mirror.primary.invite();
    let other = mirror.replica().path("other.img");
    let other = other.to_str().expect("a path");
    mirror.replica().refuse(
        &["join", &token, "--backing", other],
        5,
        &["there is a volume data on this host already"],
    );
    mirror.replica().join(&mirror.primary, &mirror.replica().backing());
    mirror.assert_identical();
}

/// A replica that was alone with its primary keeps no activity log. It must begin with one when another one joins, or
/// what it has and the other lacks is known to nobody when it is promoted (D5).
#[test]
fn a_second_replica_gets_what_only_the_first_had_when_their_primary_died() {
    let mut mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    let mut random = Random::new(5);
    write_blocks(&mut mirror.client(), &mut random, 0..500);
    mirror.assert_identical();
    mirror.add("c");
    mirror.assert_identical();
    write_blocks(&mut mirror.client(), &mut random, 0..10);
    mirror.assert_identical();

    mirror.replicas[1].link().cut();
    write_blocks(&mut mirror.client(), &mut random, 2000..2010);
    mirror.wait_for_peer("b", "b has everything", |peer| {
        peer.state == Some(PeerState::InSync)
            && (peer.out_of_sync_bytes, peer.lag_bytes) == (Some(0), Some(0))
    });
    mirror.primary.kill();
    mirror.replicas[1].link().mend();
    mirror.replicas[0].succeed(&["promote", "data", "--force"]);
    mirror.replicas[0].wait_until("c has everything", |status| {
        status.facts.peers.iter().any(|peer| {
            peer.name.as_str() == "c"
                && peer.state == Some(PeerState::InSync)
                && (peer.out_of_sync_bytes, peer.lag_bytes) == (Some(0), Some(0))
        })
    });
    let difference = first_difference(&mirror.replicas[0].backing(), &mirror.replicas[1].backing());
    assert_eq!(difference, None, "c differs from b at this byte");
}
