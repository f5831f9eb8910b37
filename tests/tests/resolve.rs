//! Split brain, as its operator meets it: told, measured, resolved, with real agents (L6).

use blockmirror_agent::config::Role;
use blockmirror_agent::control::api::{CopyState, PeerState, Resolution, Undoing, VolumeState};
use blockmirror_agent::quantity::Size;
use blockmirror_agent::quantity::unix_seconds;
use blockmirror_protocol::disk::PAGE_BYTES;
use blockmirror_protocol::disk::pre_images::FIRST_BATCH;
use blockmirror_tests::harness::random::Random;
use blockmirror_tests::machines::content::{BLOCK_BYTES, first_difference, noise};
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::{Mirror, assert_identical};
use blockmirror_tests::machines::nbd::Client;
use blockmirror_tests::machines::patience::until;
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

const MIB: u64 = 1 << 20;
const SIZE_BYTES: u64 = 64 * MIB;

/// A client of whoever serves the volume.
fn client_of(host: &Host) -> Client {
    until("the volume is served", || Client::connect(&host.socket()).map_err(|error| error.to_string()))
}

/// Writes noise to a block in each of these MiB, and flushes.
fn write_blocks(client: &mut Client, random: &mut Random, places: std::ops::Range<u64>) {
    for place in places {
        client.write(place * MIB, &noise(random, BLOCK_BYTES)).expect("a write");
    }
    client.flush().expect("a flush");
}

/// A volume whose two hosts were both primary after they were last in sync: `a`, which wrote ten blocks alone and was
/// superseded, and `b`, which is the primary and wrote twenty others.
fn split() -> (Mirror, Random) {
    let mirror = Mirror::new(SIZE_BYTES, "nbd", &["b"]);
    let mut random = Random::new(20);
    let mut client = mirror.client();
    for offset in (0..SIZE_BYTES).step_by(MIB as usize) {
        client.write(offset, &noise(&mut random, MIB)).expect("a write");
    }
    client.flush().expect("a flush");
    mirror.assert_identical();
    let (a, b) = (&mirror.primary, mirror.replica());
    for host in [a, b] {
        host.link().cut();
    }
    mirror.wait_until_lost("b");
    write_blocks(&mut client, &mut random, 0..10);
    b.wait_until("the loss is noticed", |status| status.state == VolumeState::Waiting);
    b.succeed(&["promote", "data", "--force"]);
    write_blocks(&mut client_of(b), &mut random, 5..25);
    drop(client);
    for host in [a, b] {
        host.link().mend();
    }
    wait_until_split(b, a);
    (mirror, random)
}

fn wait_until_split(primary: &Host, replica: &Host) {
    primary.wait_until("the split is told", |status| status.state == VolumeState::SplitBrain);
    replica.wait_until("the split is told", |status| {
        status.state == VolumeState::SplitBrain && status.facts.role == Role::Replica
    });
}

fn resolution(host: &Host, arguments: &[&str]) -> Resolution {
    let said = host.succeed(&[&["resolve", "data", "--json"], arguments].concat());
    serde_json::from_str(&said).expect("the answer is well formed")
}

#[test]
fn the_loser_of_a_split_brain_is_measured_and_brought_back_by_map() {
    let (mirror, mut random) = split();
    let (a, b) = (&mirror.primary, mirror.replica());
    let status = a.status();
    assert!(status.action.contains("blockmirror resolve data --keep b"), "{status:?}");
    assert!(b.status().action.contains("on a: blockmirror resolve data --keep b"), "{:?}", b.status());

    // Only the host whose content goes carries it out.
    b.refuse(&["resolve", "data", "--keep", "b"], 5, &["on a: blockmirror resolve data --keep b"]);
    b.refuse(&["resolve", "data", "--keep", "a"], 5, &["first: blockmirror demote data"]);
    a.refuse(&["resolve", "data", "--keep", "a"], 5, &["on b: blockmirror demote data"]);
    a.refuse(&["resolve", "data", "--keep", "x"], 4, &["no peer"]);

    let looked = resolution(a, &["--keep", "b", "--dry-run"]);
    assert_eq!((looked.done, looked.copies_everything), (false, false));
    let lost = looked.loses.bytes.expect("the map says");
    assert!((10 * BLOCK_BYTES..=10 * 4 * MIB).contains(&lost), "{looked:?}");
    let spared = looked.spares.bytes.expect("b's map says");
    assert!((20 * BLOCK_BYTES..=32 * MIB).contains(&spared), "{looked:?}");
    let (lost_since, spared_since) = (looked.loses.since_unix_seconds, looked.spares.since_unix_seconds);
    // a began its generation when b was gone, and b after its promotion; both are told by the clock of this machine.
    assert!(
        lost_since.is_some() && lost_since <= spared_since && spared_since <= Some(unix_seconds()),
        "{looked:?}"
    );
    assert!(
        looked.verdict.contains(" blocks, since ") && looked.alternative.contains(" blocks, since "),
        "{looked:?}"
    );
    assert_eq!(looked.action, "blockmirror resolve data --keep b");
    assert_eq!(a.status().state, VolumeState::SplitBrain, "nothing was changed");

    let before = a.link().bytes_to_host();
    let done = resolution(a, &["--keep", "b"]);
    assert_eq!((done.done, done.loses.bytes, done.action.as_str()), (true, Some(lost), "none"));
    assert_identical(b, a);
    let sent = a.link().bytes_to_host() - before;
    assert!(sent <= lost + spared + 2 * MIB, "{sent} bytes were sent where {lost} and {spared} could differ");
    a.refuse(&["resolve", "data", "--keep", "b"], 5, &["nothing to resolve"]);
    b.refuse(&["resolve", "data", "--keep", "b"], 5, &["nothing to resolve"]);
    write_blocks(&mut client_of(b), &mut random, 30..40);
    assert_identical(b, a);
}

#[test]
fn a_split_brain_can_be_resolved_for_the_host_that_was_superseded() {
    let (mirror, mut random) = split();
    let (a, b) = (&mirror.primary, mirror.replica());
    let said = until("nobody has the device open", || {
        let said = b.tool(&["demote", "data"]);
        if said.code == 0 { Ok(said) } else { Err(said.error) }
    });
    assert!(said.output.contains("a may lack something"), "{said:?}");
    let done = resolution(b, &["--keep", "a"]);
    assert_eq!(done.action, "on a: blockmirror promote data --force");
    a.refuse(&["promote", "data"], 5, &["--force"]);
    a.succeed(&["promote", "data", "--force"]);
    assert_identical(a, b);
    write_blocks(&mut client_of(a), &mut random, 30..40);
    assert_identical(a, b);
}

/// The files of pre-images.
fn layers_of(host: &Host) -> Vec<PathBuf> {
    let files = fs::read_dir(host.state("")).expect("the state folder").map(|file| file.expect("a file"));
    files
        .filter(|file| file.file_name().to_string_lossy().starts_with("pre-images"))
        .map(|file| file.path())
        .collect()
}

#[test]
fn a_resolution_is_undone_byte_for_byte_and_the_other_choice_is_made() {
    let (mirror, mut random) = split();
    let (a, b) = (&mirror.primary, mirror.replica());
    let before = mirror.folder.join("before.img");
    fs::copy(a.backing(), &before).expect("a copy");
    a.refuse(&["undo", "data"], 5, &["nothing is kept here"]);
    a.refuse(&["forget", "data"], 5, &["nothing is kept here"]);

    let done = resolution(a, &["--keep", "b"]);
    assert_eq!(done.undo.as_deref(), Some("blockmirror undo data"));
    assert_identical(b, a);
    // What is written after the resync is saved as well.
    write_blocks(&mut client_of(b), &mut random, 20..50);
    assert_identical(b, a);
    let status = a.status();
    assert!(status.verdict.contains("kept for undo, of what this host had before"), "{status:?}");
    a.refuse(&["undo", "data"], 5, &["b is connected", "blockmirror pause data b"]);
    b.refuse(&["undo", "data"], 5, &["this host is the primary"]);

    a.succeed(&["pause", "data", "b"]);
    let said = until("the link is gone", || {
        let said = a.tool(&["undo", "data", "--json"]);
        if said.code == 0 { Ok(said.output) } else { Err(said.error) }
    });
    let undone: Undoing = serde_json::from_str(&said).expect("the answer is well formed");
    assert!(undone.restored_bytes >= 45 * BLOCK_BYTES, "{undone:?}");
    assert_eq!(first_difference(&a.backing(), &before), None, "all is as it was before the resolution");
    assert!(layers_of(a).is_empty(), "what was restored is not kept any longer");
    a.succeed(&["resume", "data", "b"]);
    wait_until_split(b, a);
    let looked = resolution(a, &["--keep", "b", "--dry-run"]);
    assert_eq!(looked.spares.bytes, None, "b's map is of what a was while it followed: {looked:?}");

    until("nobody has the device open", || {
        let said = b.tool(&["demote", "data"]);
        if said.code == 0 { Ok(()) } else { Err(said.error) }
    });
    resolution(b, &["--keep", "a"]);
    a.succeed(&["promote", "data", "--force"]);
    assert_identical(a, b);
    assert_eq!(first_difference(&a.backing(), &before), None, "a's content stayed");
}

#[test]
fn a_host_that_is_killed_in_an_undo_is_undone_once_more() {
    let (mut mirror, mut random) = split();
    let before = mirror.folder.join("before.img");
    fs::copy(mirror.primary.backing(), &before).expect("a copy");
    resolution(&mirror.primary, &["--keep", "b"]);
    // So that it takes a while: all of the volume is restored.
    for offset in (0..SIZE_BYTES).step_by(MIB as usize) {
        client_of(mirror.replica()).write(offset, &noise(&mut random, MIB)).expect("a write");
    }
    assert_identical(mirror.replica(), &mirror.primary);
    mirror.replica_mut().kill();
    mirror.primary.wait_until("the loss is noticed", |status| status.state == VolumeState::Waiting);
    let mut running = mirror.primary.begin(&["undo", "data"]);
    until("it is under way, or over", || {
        let status = mirror.primary.status();
        if running.has_ended() || status.state == VolumeState::Changing {
            Ok(())
        } else {
            Err(status.verdict)
        }
    });
    mirror.primary.kill();
    drop(running);
    mirror.primary.start();
    let a = &mirror.primary;
    if a.status().facts.succession.history.is_some() {
        a.succeed(&["undo", "data"]);
    }
    assert_eq!(first_difference(&a.backing(), &before), None, "all is as it was before the resolution");
    assert!(layers_of(a).is_empty());
    mirror.replica_mut().start();
    wait_until_split(mirror.replica(), &mirror.primary);
}

#[test]
fn nothing_is_given_up_for_a_history_that_can_not_be_read() {
    let (mut mirror, mut random) = split();
    resolution(&mirror.primary, &["--keep", "b"]);
    write_blocks(&mut client_of(mirror.replica()), &mut random, 0..50);
    assert_identical(mirror.replica(), &mirror.primary);
    mirror.replica_mut().kill();
    let a = &mirror.primary;
    a.wait_until("the loss is noticed", |status| status.state == VolumeState::Waiting);
    let layers = layers_of(a);
    let [layer] = &layers[..] else { panic!("one layer is kept: {layers:?}") };
    let file = fs::File::options().write(true).open(layer).expect("the layer");
    file.write_all_at(b"rotten", FIRST_BATCH + PAGE_BYTES as u64).expect("a write");
    let present = mirror.folder.join("present.img");
    fs::copy(a.backing(), &present).expect("a copy");
    let said = a.tool(&["undo", "data"]);
    assert!(said.code == 1 && said.error.contains("can't be used"), "{said:?}");
    assert_eq!(first_difference(&a.backing(), &present), None, "nothing was restored");
    let status = a.status();
    assert_eq!(status.facts.data, Some(CopyState::Consistent), "{status:?}");
    a.succeed(&["promote", "data", "--force"]);
    assert_eq!(a.status().facts.role, Role::Primary);
}

#[test]
fn what_is_kept_for_undo_outlives_restarts_and_is_forgotten_on_demand() {
    let (mut mirror, mut random) = split();
    resolution(&mirror.primary, &["--keep", "b"]);
    assert_identical(mirror.replica(), &mirror.primary);
    mirror.primary.kill();
    write_blocks(&mut client_of(mirror.replica()), &mut random, 20..50);
    mirror.primary.start();
    let (a, b) = (&mirror.primary, mirror.replica());
    assert_identical(b, a);
    assert!(a.status().facts.succession.history.is_some());
    assert_eq!(
        layers_of(a).len(),
        1,
        "the layer of the second resync has gone, that of the history is there"
    );
    let said = a.succeed(&["forget", "data"]);
    assert!(said.starts_with("nothing of data is kept for undo any more; it was "), "{said}");
    a.refuse(&["undo", "data"], 5, &["nothing is kept here"]);
    assert_eq!(a.status().verdict, "following b; consistent");
    until(
        "its layer is gone",
        || if layers_of(a).is_empty() { Ok(()) } else { Err("it is there".to_owned()) },
    );
    write_blocks(&mut client_of(b), &mut random, 0..50);
    assert_identical(b, a);
}

#[test]
fn what_is_forgotten_before_the_resync_is_not_kept_by_it() {
    let (mirror, _) = split();
    let (a, b) = (&mirror.primary, mirror.replica());
    // b can't dial a, and answers what a asks.
    a.link().cut();
    resolution(a, &["--keep", "b"]);
    a.succeed(&["forget", "data"]);
    a.link().mend();
    assert_identical(b, a);
    assert!(a.status().facts.succession.history.is_none());
    assert!(!a.log().contains("kept for undo, came back"), "{}", a.log());
    until(
        "its layer is gone",
        || if layers_of(a).is_empty() { Ok(()) } else { Err("it is there".to_owned()) },
    );
}

#[test]
fn a_history_that_finds_no_room_is_given_up_and_not_the_replica() {
    let (mut mirror, mut random) = split();
    mirror.primary.stop();
    mirror.primary.configure(|volume| volume.pre_images = Size(1 << 20));
    mirror.primary.start();
    let (a, b) = (&mirror.primary, mirror.replica());
    a.wait_until("the split is told", |status| status.state == VolumeState::SplitBrain);
    resolution(a, &["--keep", "b"]);
    assert_identical(b, a);
    for round in 0..8 {
        let mut client = client_of(b);
        for block in 0..64 {
            let offset = (round * 64 + block) * 16 * BLOCK_BYTES;
            client.write(offset, &noise(&mut random, BLOCK_BYTES)).expect("a write");
        }
        client.flush().expect("a flush");
    }
    assert_identical(b, a);
    a.wait_until("it is given up", |status| status.facts.succession.history.is_none());
    assert!(a.log().contains("what was kept for undo is given up"), "{}", a.log());
}

#[test]
fn a_history_whose_file_is_gone_is_given_up_and_not_the_replica() {
    let (mut mirror, _) = split();
    resolution(&mirror.primary, &["--keep", "b"]);
    assert_identical(mirror.replica(), &mirror.primary);
    assert!(mirror.primary.status().facts.succession.history.is_some());
    mirror.primary.stop();
    let layers = layers_of(&mirror.primary);
    assert!(!layers.is_empty());
    layers.iter().for_each(|layer| fs::remove_file(layer).expect("a file"));
    mirror.primary.start();
    assert_identical(mirror.replica(), &mirror.primary);
    let (facts, log) = (mirror.primary.status().facts, mirror.primary.log());
    assert_eq!((facts.backing_error, facts.succession.history.is_some()), (None, false));
    assert!(log.contains("what was kept for undo is given up"), "{log}");
}

#[test]
fn a_loser_that_cannot_reach_the_winner_keeps_its_content() {
    let (mut mirror, _) = split();
    mirror.replica_mut().stop();
    let a = &mirror.primary;
    a.refuse(&["resolve", "data", "--keep", "b"], 5, &["b must say how it stands"]);
    assert_eq!(a.status().facts.role, Role::Replica);
}

/// The two hosts of a volume whose primary is gone that could not hear each other, promoted from the same number.
fn rivals() -> (Mirror, Random) {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b", "c"]);
    let mut random = Random::new(21);
    write_blocks(&mut mirror.client(), &mut random, 0..16);
    mirror.assert_identical();
    mirror.primary.kill();
    mirror.replicas.iter().for_each(|host| host.link().cut());
    for (host, places) in mirror.replicas.iter().zip([0..8, 4..12]) {
        host.wait_until("the loss is noticed", |status| status.state == VolumeState::Waiting);
        host.succeed(&["promote", "data", "--force"]);
        write_blocks(&mut client_of(host), &mut random, places);
    }
    mirror.replicas.iter().for_each(|host| host.link().mend());
    (mirror, random)
}

/// Each refused the other for ever, and `resolve` found nothing that it could do.
#[test]
fn two_hosts_that_were_promoted_as_often_are_reconciled() {
    let (mut mirror, mut random) = rivals();
    let [b, c] = &mirror.replicas[..] else { panic!("there are two replicas") };
    b.wait_until("the split is told", |status| status.state == VolumeState::SplitBrain);
    until("nobody has the device open", || {
        let said = c.tool(&["demote", "data"]);
        if said.code == 0 { Ok(()) } else { Err(said.error) }
    });
    let done = resolution(c, &["--keep", "b"]);
    assert_eq!((done.done, done.action.as_str()), (true, "none"));
    mirror.primary.start();
    let [b, c] = &mirror.replicas[..] else { panic!("there are two replicas") };
    assert_identical(b, c);
    assert_identical(b, &mirror.primary);
    write_blocks(&mut client_of(b), &mut random, 0..16);
    assert_identical(b, c);
}

/// What an earlier `resolve` had kept was removed before there was room for what this one was to keep: it was refused,
/// said that nothing was given up, and nothing could be undone any more.
#[test]
fn a_refused_resolution_leaves_what_was_kept_before() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b", "c"]);
    let mut random = Random::new(22);
    write_blocks(&mut mirror.client(), &mut random, 0..16);
    mirror.assert_identical();
    for host in mirror.replicas.iter().chain([&mirror.primary]) {
        host.link().cut();
    }
    mirror.wait_until_lost("b");
    write_blocks(&mut mirror.client(), &mut random, 0..4);
    let before = mirror.folder.join("before.img");
    fs::copy(mirror.primary.backing(), &before).expect("a copy");
    for host in &mirror.replicas {
        host.wait_until("the loss is noticed", |status| status.state == VolumeState::Waiting);
        host.succeed(&["promote", "data", "--force"]);
        write_blocks(&mut client_of(host), &mut random, 4..12);
    }
    let (a, b) = (&mirror.primary, mirror.replica());
    a.link().mend();
    b.link().mend();
    wait_until_split(b, a);
    resolution(a, &["--keep", "b"]);
    b.wait_until("a follows", |status| {
        let mut peers = status.facts.peers.iter();
        peers.any(|peer| peer.name.as_str() == "a" && peer.state == Some(PeerState::InSync))
    });
    mirror.replica_mut().kill();
    mirror.primary.stop();
    mirror.primary.configure(|volume| volume.pre_images = Size(0));
    mirror.primary.start();
    mirror.replicas[1].link().mend();
    let a = &mirror.primary;
    a.refuse(&["resolve", "data", "--keep", "c"], 5, &["nothing was given up", "blockmirror undo data"]);
    a.succeed(&["undo", "data"]);
    assert_eq!(first_difference(&a.backing(), &before), None, "all is as it was before the first resolution");
}
