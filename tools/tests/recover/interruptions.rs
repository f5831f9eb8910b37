//! Recoveries that don't run through.

use super::host::{Host, VOLUME};
use super::*;
use blockmirror_agent::state::backing;
use blockmirror_protocol::disk::superblock::{self, Superblock};
use blockmirror_protocol::units::{BlockSize, CopyId};
use blockmirror_protocol::wire::message::{Refusal, Refused};

fn done(scene: &Scene) -> u64 {
    scene.state().map_or(0, |state| state.done_chunks())
}

/// Changes a byte of a file on disk.
fn change(path: &Path, at: u64) {
    let file = fs::File::options().read(true).write(true).open(path).unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[!byte[0]], at).unwrap();
    file.sync_all().unwrap();
}

#[test]
fn a_recovery_that_is_killed_three_times_goes_on_where_it_was() {
    let scene = Scene::new();
    for allowed in [2, 5, 9] {
        scene.host.allow(allowed);
        let mut running = scene.start(&[]);
        running.wait_until(|| done(&scene) == allowed);
        running.kill();
    }
    scene.host.allow(u64::MAX);
    let ended = scene.recover(&[]).good();
    assert!(ended.errors.contains("going on where it was interrupted"), "{}", ended.errors);
    scene.assert_recovered();
    let mut reads = scene.host.seen().reads;
    reads.sort_unstable();
    let once: Vec<u64> = (0..CHUNKS).map(|chunk| chunk * CHUNK_BYTES).collect();
    assert_eq!(reads, once, "what was durable was not read again");
}

#[test]
fn a_recovery_that_is_killed_at_any_place_ends_well() {
    let scene = Scene::new();
    for reads in [1, 7, 11, 14] {
        let mut running = scene.start(&[]);
        running.wait_until(|| scene.host.seen().reads.len() >= reads);
        running.kill();
    }
    scene.recover(&[]).good();
    scene.assert_recovered();
}

#[test]
fn an_interrupted_recovery_notes_what_it_has() {
    let scene = Scene::new();
    scene.host.allow(3);
    let mut running = scene.start(&[]);
    running.wait_until(|| done(&scene) == 3);
    running.interrupt();
    running.end().bad(130, "are there; run the same command again to go on where it was");
    assert_eq!(done(&scene), 3);
    scene.host.allow(u64::MAX);
    scene.recover(&[]).good();
    scene.assert_recovered();
}

#[test]
fn a_connection_that_is_lost_again_and_again_is_dialled_again() {
    let scene = Scene::new();
    scene.host.set(|knobs| knobs.cut_after = Some(9));
    let ended = scene.recover(&[]).good();
    assert!(ended.errors.contains("; trying again"), "{}", ended.errors);
    assert!(scene.host.seen().peers.len() >= 2);
    scene.assert_recovered();
}

#[test]
fn a_peer_that_stays_away_ends_it_with_advice() {
    let scene = Scene::new();
    let refused = Refused { refusal: Refusal::Busy, text: "another recovery reads it".into() };
    scene.host.allow(2);
    let mut running = scene.start(&["--retry", "0s"]);
    running.wait_until(|| done(&scene) == 2);
    scene.host.set(|knobs| (knobs.cut_after, knobs.refuse) = (Some(0), Some(refused)));
    scene.host.allow(3);
    running.end().bad(1, "run the same command again to go on");
    scene.recover(&[]).bad(5, "the peer refuses: another recovery reads it");
    scene.host.set(|knobs| (knobs.cut_after, knobs.refuse) = (None, None));
    scene.host.allow(u64::MAX);
    scene.recover(&[]).good();
    scene.assert_recovered();
}

/// The notes of a recovery whose end a power loss had cut off let it overwrite what applications had written since.
#[test]
fn a_target_that_was_served_since_is_not_overwritten_unasked() {
    let scene = Scene::new();
    scene.host.allow(4);
    let mut running = scene.start(&[]);
    running.wait_until(|| done(&scene) == 4);
    running.kill();
    let folder = scene.path("var").join(NAME);
    fs::create_dir_all(&folder).unwrap();
    let superblock = Superblock::empty(VOLUME, CopyId([4; 16]), SIZE, BlockSize::default());
    fs::write(folder.join(superblock::FILE_NAME), superblock.encode(1)).unwrap();
    let Ok(backing::Match::Adopted { identity, .. }) = backing::compare(&folder, &scene.target()) else {
        panic!("nothing is recorded")
    };
    // The agent opened it.
    backing::record(&folder, &identity).unwrap();
    let before = fs::read(scene.target()).unwrap();
    scene.host.allow(u64::MAX);
    scene.recover(&[]).bad(5, "--overwrite");
    assert!(fs::read(scene.target()).unwrap() == before, "it was not asked for");
    let ended = scene.recover(&["--overwrite"]).good();
    assert!(
        ended.errors.contains("was the volume's backing after the interrupted recovery"),
        "{}",
        ended.errors
    );
    assert_eq!(scene.host.seen().reads.len() as u64, 4 + CHUNKS);
}

#[test]
fn a_copy_that_has_changed_since_is_recovered_from_the_start() {
    let scene = Scene::new();
    scene.host.allow(4);
    let mut running = scene.start(&[]);
    running.wait_until(|| done(&scene) == 4);
    running.kill();
    scene.host.set(|knobs| knobs.epoch = 2);
    scene.host.allow(u64::MAX);
    let ended = scene.recover(&[]).good();
    assert!(ended.errors.contains("beginning from the start"), "{}", ended.errors);
    assert_eq!(scene.host.seen().reads.len() as u64, 4 + CHUNKS);
    scene.assert_recovered();
}

#[test]
fn a_recovery_by_token_goes_on_as_the_same_peer() {
    let scene = Scene::new();
    scene.host.set(|knobs| knobs.secret = Some([7; 32]));
    let token = scene.host.token(7);
    scene.host.allow(2);
    let command = || scene.command(&scene.target(), &["--token", &token]);
    let mut running = Running(Some(command().spawn().unwrap()));
    running.wait_until(|| done(&scene) == 2);
    running.kill();
    scene.host.allow(u64::MAX);
    Ended::from(command().output().unwrap()).good();
    scene.assert_recovered();
    let peers = scene.host.seen().peers;
    assert!(peers.len() == 2 && peers[0] == peers[1] && peers[0] != scene.key, "{peers:?}");
}

#[test]
fn a_copy_that_changes_while_it_is_read_is_recovered_from_the_start() {
    // What was read back of the old content must not count for the new one.
    let scene = Scene::new();
    scene.host.allow(4);
    let mut running = scene.start(&[]);
    running.wait_until(|| done(&scene) == 4);
    change(&scene.path("image"), 0);
    scene.host.set(|knobs| (knobs.epoch, knobs.cut_after) = (2, Some(12)));
    scene.host.allow(u64::MAX);
    let ended = running.end().good();
    assert!(ended.errors.contains("has changed meanwhile; beginning from the start"), "{}", ended.errors);
    scene.assert_recovered();
}

#[test]
fn content_that_changes_between_two_connections_is_noticed() {
    // As long as a connection lasts it can't change, and the digest is of what was sent. What came over an earlier
    // connection is read for it.
    let scene = Scene::new();
    scene.host.allow(4);
    let mut running = scene.start(&[]);
    running.wait_until(|| done(&scene) == 4);
    scene.host.set(|knobs| (knobs.cut_after, knobs.change_at) = (Some(12), Some(0)));
    scene.host.allow(u64::MAX);
    running.end().bad(1, "run the command again with --from-start");
    assert_eq!(scene.host.seen().peers.len(), 2);
    scene.recover(&[]).bad(1, "run the command again with --from-start");
    scene.recover(&["--from-start"]).good();
    scene.assert_recovered();
}

#[test]
fn a_target_that_changes_behind_the_tools_back_is_noticed() {
    let scene = Scene::new();
    scene.host.allow(4);
    let mut running = scene.start(&[]);
    running.wait_until(|| done(&scene) == 4);
    running.kill();
    change(&scene.target(), CHUNK_BYTES + (5 << 20));
    scene.host.allow(u64::MAX);
    for _ in 0..2 {
        scene.recover(&[]).bad(1, "the target is not what the peer has");
    }
    scene.recover(&["--from-start"]).good();
    scene.assert_recovered();
}

#[test]
fn a_target_that_was_replaced_is_not_taken_for_the_old_one() {
    let scene = Scene::new();
    scene.host.allow(2);
    let mut running = scene.start(&[]);
    running.wait_until(|| done(&scene) == 2);
    running.kill();
    scene.host.allow(u64::MAX);
    fs::write(scene.path("other"), vec![5; 4096]).unwrap();
    fs::rename(scene.path("other"), scene.target()).unwrap();
    scene.recover(&[]).bad(5, "--overwrite");
    assert_eq!(fs::read(scene.target()).unwrap(), vec![5; 4096]);
    scene.recover(&["--overwrite"]).good();
    scene.assert_recovered();
}

#[test]
fn another_host_of_the_same_address_is_not_trusted() {
    let scene = Scene::new();
    let other = Host::start(&scene.path("image"));
    let key = scene.host.id.to_string();
    let more = ["--from", &other.address, "--peer-key", &key];
    let ended = Ended::from(scene.command(&scene.target(), &more).output().unwrap());
    ended.bad(5, &format!("has the key {}, not the expected {key}", other.id));
}
