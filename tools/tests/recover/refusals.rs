//! What is refused, by whom, and with which exit code.

use super::host::VOLUME;
use super::*;
use blockmirror_agent::config::{ConfigFolder, PeerConfig, Role, VolumeConfig};
use blockmirror_agent::storage::file::{Access, File};
use blockmirror_protocol::units::{BlockSize, VolumeId};
use blockmirror_protocol::wire::message::{Refusal, Refused};

#[test]
fn a_host_that_is_not_known_is_not_trusted_at_first_sight() {
    let scene = Scene::new();
    let from = ["--from", &scene.host.address];
    let advice = format!("has the key {0}; if that is right, add --peer-key {0}", scene.host.id);
    Ended::from(scene.command(&scene.target(), &from).output().unwrap()).bad(5, &advice);
    assert!(scene.host.seen().peers.is_empty() && !scene.target().exists());
}

fn configure(scene: &Scene, id: VolumeId, hosts: &[HostId]) {
    let peers = hosts.iter().enumerate().map(|(index, host)| {
        PeerConfig::new(format!("host{index}").parse().unwrap(), Role::Replica, *host, vec![])
    });
    let (name, backing) = (NAME.parse().unwrap(), "/srv/data.img".into());
    let volume = VolumeConfig {
        devices: vec![],
        peers: peers.collect(),
        ..VolumeConfig::new(name, id, Role::Primary, backing, SIZE, BlockSize::default())
    };
    ConfigFolder::new(scene.path("etc")).save_volume(&volume).unwrap();
}

#[test]
fn a_host_of_the_configured_volume_is_known() {
    let scene = Scene::new();
    let from = ["--from", &scene.host.address];
    let run = || Ended::from(scene.command(&scene.target(), &from).output().unwrap());
    configure(&scene, VOLUME, &[HostId([7; 32]), HostId([8; 32])]);
    run().bad(5, "which is of no host of the volume data");
    configure(&scene, VolumeId([9; 16]), &[HostId([7; 32]), scene.host.id]);
    run().bad(5, "is another one of the same name");
    configure(&scene, VOLUME, &[HostId([7; 32]), scene.host.id]);
    run().good();
    scene.assert_recovered();
}

#[test]
fn a_wrong_token_or_key_lets_nobody_in() {
    let scene = Scene::new();
    scene.host.set(|knobs| (knobs.secret, knobs.member) = (Some([7; 32]), Some(HostId([7; 32]))));
    let run =
        |token: &str| Ended::from(scene.command(&scene.target(), &["--token", token]).output().unwrap());
    run(&scene.host.token(6)).bad(5, "the peer refuses: the token is wrong");
    scene.recover(&[]).bad(5, "the peer refuses: the key is no member's");
    let token = scene.host.token(7);
    let mut other = Command::new(env!("CARGO_BIN_EXE_blockmirror"));
    other.arg("--run").arg(scene.path("run")).args(["recover", "other", "--token", &token, "--to", "/none"]);
    Ended::from(other.output().unwrap()).bad(2, "the token is for the volume \"data\"");
    assert!(!scene.target().exists());
    run(&token).good();
    scene.assert_recovered();
}

#[test]
fn content_that_is_older_than_another_hosts_is_taken_only_when_asked_for() {
    let scene = Scene::new();
    scene.host.set(|knobs| knobs.other = Some(Some(1)));
    let advice =
        "c has later content than this peer; recover from it: blockmirror recover data --from c:7447";
    scene.recover(&[]).bad(5, advice);
    assert!(!scene.target().exists() && scene.host.seen().peers.is_empty(), "nothing was begun");
    let ended = scene.recover(&["--accept-older"]).good();
    assert!(ended.errors.contains("c has later content"), "{}", ended.errors);
    scene.assert_recovered();
}

#[test]
fn a_host_that_does_not_say_what_it_has_is_named() {
    let scene = Scene::new();
    scene.host.set(|knobs| knobs.other = Some(None));
    let ended = scene.recover(&[]).good();
    assert!(ended.errors.contains("c did not say how up to date it is"), "{}", ended.errors);
    scene.assert_recovered();
    scene.host.set(|knobs| knobs.other = Some(Some(0)));
    let ended = scene.recover(&["--overwrite"]).good();
    assert!(!ended.errors.contains("c "), "{}", ended.errors);
}

#[test]
fn a_host_that_comes_back_with_later_content_in_the_middle_is_noticed_at_the_end() {
    let scene = Scene::new();
    scene.host.allow(1);
    let mut running = scene.start(&[]);
    running.wait_until(|| !scene.host.seen().reads.is_empty());
    scene.host.set(|knobs| knobs.other = Some(Some(1)));
    scene.host.allow(u64::MAX);
    running.end().bad(5, "c has later content");
    assert!(scene.state().is_some(), "it is not complete");
    scene.recover(&["--accept-older"]).good();
    scene.assert_recovered();
}

#[test]
fn refusals_have_their_exit_codes() {
    let scene = Scene::new();
    for (refusal, code) in [
        (Refusal::UnknownVolume, 4),
        (Refusal::Busy, 5),
        (Refusal::Role, 5),
        (Refusal::Backing, 5),
        (Refusal::Version, 1),
        (Refusal::Other, 1),
    ] {
        let refused = Refused { refusal, text: "not\x1b[2J now".into() };
        scene.host.set(|knobs| knobs.refuse = Some(refused));
        scene.recover(&[]).bad(code, "the peer refuses: not\u{fffd}[2J now\n");
    }
}

#[test]
fn inconsistent_content_is_given_out_only_when_asked_for() {
    let scene = Scene::new();
    scene.host.set(|knobs| knobs.inconsistent = true);
    scene.recover(&[]).bad(5, "--accept-inconsistent");
    let ended = scene.recover(&["--accept-inconsistent"]).good();
    assert!(ended.output.contains("warning: the peer's copy is a mixture"), "{}", ended.output);
    scene.assert_recovered();
}

#[test]
fn a_file_that_holds_data_is_overwritten_only_when_asked_to() {
    let scene = Scene::new();
    fs::write(scene.target(), vec![1; 8192]).unwrap();
    scene.recover(&[]).bad(5, "add --overwrite to lose that");
    assert_eq!(fs::read(scene.target()).unwrap(), vec![1; 8192]);
    scene.recover(&["--overwrite"]).good();
    scene.assert_recovered();
    scene.recover(&[]).bad(5, "add --overwrite to lose that");
    scene.recover(&["--overwrite"]).good();
    scene.assert_recovered();
}

#[test]
fn a_file_without_data_is_used_whatever_its_size() {
    for size in [0, SIZE, SIZE + (1 << 20), 512] {
        let scene = Scene::new();
        fs::File::create(scene.target()).unwrap().set_len(size).unwrap();
        scene.recover(&[]).good();
        scene.assert_recovered();
    }
}

#[test]
fn a_file_that_is_in_use_is_refused() {
    let scene = Scene::new();
    File::create_image(scene.target(), SIZE).unwrap();
    let _held = File::open_backing(scene.target(), Access::ReadWrite).unwrap();
    scene.recover(&["--overwrite"]).bad(5, "is in use");
}

#[test]
fn a_peer_whose_disk_fails_says_so() {
    let scene = Scene::new();
    scene.host.set(|knobs| knobs.fail_read = Some(3));
    scene.recover(&[]).bad(5, "the peer refuses: cannot read ");
    scene.recover(&[]).good();
    scene.assert_recovered();
}
