//! What comes late: disks and file systems that are not there when the agent starts. They are waited for, status says so,
//! and the volume is opened by itself when they come (X6).

use blockmirror_agent::config::StartAlone;
use blockmirror_agent::control::api::{VolumeState, VolumeStatus};
use blockmirror_tests::machines::folder::Folder;
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::nbd::Client;
use blockmirror_tests::machines::network::Network;
use blockmirror_tests::machines::patience::until;
use blockmirror_tests::machines::programs::{succeed, text};
use blockmirror_tests::require;
use std::fs::{self, File};
use std::io::Write;
use std::net::TcpListener;
use std::path::Path;

const MIB: u64 = 1 << 20;

/// The host's status says that this is awaited, and that nothing has to be typed for it.
fn assert_awaits(host: &Host, path: &Path) {
    let status = host.wait_until("the disk is awaited", |status| status.state == VolumeState::Awaiting);
    let awaited = status.facts.health.awaited.as_ref().expect("the state says so");
    assert!(awaited.what.contains(text(path)), "{status:?}");
    assert!(status.verdict.starts_with("awaiting: "), "{status:?}");
    assert!(status.action.starts_with("bring it back and it is taken up by itself"), "{status:?}");
}

fn is_healthy(status: &VolumeStatus) -> bool {
    status.state == VolumeState::Healthy
}

#[test]
fn an_image_that_comes_late_is_taken_up_on_both_sides() {
    let mut mirror = Mirror::new(8 * MIB, "nbd", &["b"]);
    mirror.client().write_durably(0, &[1; 4096]).expect("a write");
    mirror.wait_until_quiet();
    let away = mirror.folder.join("away");
    let image = mirror.replica().backing();
    mirror.replica_mut().stop();
    fs::rename(&image, &away).expect("a name");
    mirror.replica_mut().start();
    assert_awaits(mirror.replica(), &image);
    fs::rename(&away, &image).expect("a name");
    mirror.replica().wait_until("it follows again", |status| status.state == VolumeState::Following);

    let image = mirror.primary.backing();
    mirror.primary.stop();
    fs::rename(&image, &away).expect("a name");
    mirror.primary.start();
    assert_awaits(&mirror.primary, &image);
    let advice = "if it is lost: blockmirror rebuild data --backing PATH --from b";
    assert!(mirror.primary.status().action.contains(advice), "{:?}", mirror.primary.status());
    fs::rename(&away, &image).expect("a name");
    mirror.primary.wait_until("it is served again", is_healthy);
    assert_eq!(mirror.primary.status().facts.health.awaited, None);
    mirror.client().write_durably(4096, &[2; 4096]).expect("a write");
    mirror.assert_identical();
}

/// Another file under the old name is refused, and lets itself be replaced by the right one: a file system that was not
/// mounted hid nothing of it.
#[test]
fn the_right_image_is_taken_up_after_a_wrong_one_stood_in_its_place() {
    let mut mirror = Mirror::new(8 * MIB, "nbd", &[]);
    let (image, away) = (mirror.primary.backing(), mirror.folder.join("away"));
    mirror.primary.stop();
    fs::rename(&image, &away).expect("a name");
    File::create(&image).and_then(|file| file.set_len(8 * MIB)).expect("another image");
    mirror.primary.start();
    let status = mirror.primary.wait_until("it is refused", |status| status.state == VolumeState::Failed);
    assert!(status.verdict.contains("is not the file or disk that the volume had"), "{status:?}");
    fs::rename(&away, &image).expect("a name");
    mirror.primary.wait_until("the right one is served", |status| status.state == VolumeState::Degraded);
    mirror.client().write_durably(0, &[1; 4096]).expect("a write");
}

/// The operator said who leads; that the disk was away for a moment just then made a start of it, which waits for others.
#[test]
fn a_promotion_whose_disk_comes_late_waits_for_no_majority() {
    let mut mirror = Mirror::new(8 * MIB, "nbd", &["b"]);
    mirror.client().write_durably(0, &[1; 4096]).expect("a write");
    mirror.wait_until_quiet();
    mirror.replica_mut().stop();
    mirror.replica().configure(|volume| volume.start_alone = Some(StartAlone::Wait));
    mirror.replica_mut().start();
    mirror.replica().wait_until("it follows", |status| status.state == VolumeState::Following);
    mirror.primary.kill();
    let (image, away) = (mirror.replica().backing(), mirror.folder.join("away"));
    fs::rename(&image, &away).expect("a name");
    // It is the primary then, and can't be opened as one yet.
    mirror.replica().tool(&["promote", "data", "--force"]);
    assert_awaits(mirror.replica(), &image);
    fs::rename(&away, &image).expect("a name");
    let status = mirror.replica().wait_until("it is served", |status| status.state == VolumeState::Degraded);
    assert!(!status.facts.succession.alone.is_some_and(|alone| alone.is_awaited), "{status:?}");
    let mut client = Client::connect(&mirror.replica().socket()).expect("it is served");
    client.write_durably(0, &[2; 4096]).expect("it is answered");
}

#[test]
fn a_file_system_that_is_mounted_late_is_taken_up() {
    require!("root");
    let folder = Folder::new();
    let mut host = Host::new(&folder, "a");
    let point = folder.join("point");
    fs::create_dir(&point).expect("a mount point");
    // A bind mount of a folder that stays: what is in it outlives the mount.
    let store = folder.join("store");
    fs::create_dir(&store).expect("a folder");
    let bind = || succeed("mount", &["--bind", text(&store), text(&point)]);
    bind();
    let image = point.join("data.img");
    host.succeed(&["create", "data", "--backing", text(&image), "--size", "8M", "--device", "nbd"]);
    host.stop();
    succeed("umount", &[text(&point)]);
    host.start();
    assert_awaits(&host, &image);
    // As a unit does that a mount waits for.
    let mut waiting = host.begin(&["wait", "data", "--for", "device"]);
    assert!(!waiting.has_ended());
    bind();
    until("the device is served", || waiting.has_ended().then_some(()).ok_or_else(|| host.log()));
    host.succeed(&["wait", "data", "--for", "device"]);
    assert_eq!(host.status().state, VolumeState::Degraded);
    host.stop();
}

#[test]
fn a_device_without_a_disk_is_awaited_until_it_has_one() {
    require!("root", "losetup");
    let folder = Folder::new();
    let mut host = Host::new(&folder, "a");
    let image = folder.join("raw.img");
    File::create(&image).and_then(|file| file.set_len(8 * MIB)).expect("an image");
    let device = folder.attach(&image);
    host.succeed(&["create", "data", "--backing", text(&device), "--device", "nbd"]);
    host.stop();
    succeed("losetup", &["--detach", text(&device)]);
    host.start();
    assert_awaits(&host, &device);
    succeed("losetup", &[text(&device), text(&image)]);
    host.wait_until("it is served", |status| status.state == VolumeState::Degraded);
    host.stop();
}

/// The operator was told to promote a host that could not serve anything.
#[test]
fn a_host_whose_disk_is_not_there_is_named_with_that() {
    let mut mirror = Mirror::new(8 * MIB, "nbd", &["b"]);
    mirror.replica().link().cut();
    mirror.wait_until_lost("b");
    mirror.client().write_durably(0, &[1; 4096]).expect("a write");
    until("nobody has the device open", || {
        let said = mirror.primary.tool(&["demote", "data"]);
        if said.code == 0 { Ok(()) } else { Err(said.error) }
    });
    mirror.primary.stop();
    let (image, away) = (mirror.primary.backing(), mirror.folder.join("away"));
    fs::rename(&image, &away).expect("a name");
    mirror.primary.start();
    assert_awaits(&mirror.primary, &image);
    mirror.replica().link().mend();
    let status = mirror.replica().wait_until("the other host is heard", |status| {
        status.facts.succession.better.as_ref().is_some_and(|better| better.is_away)
    });
    assert!(status.action.starts_with("bring the disk of a back"), "{status:?}");
    let words = ["has everything; the disk of a is not there or does not answer"];
    mirror.replica().refuse(&["promote", "data"], 5, &words);
    fs::rename(&away, &image).expect("a name");
    mirror
        .replica()
        .wait_until("it can be promoted", |status| status.action == "on a: blockmirror promote data");
    mirror.replica().refuse(&["promote", "data"], 5, &["on a: blockmirror promote data"]);
}

/// The host's status says why the export over TCP is not served; the Unix socket is.
fn assert_unserved(host: &Host, words: &str) {
    let status = host.wait_until("the export is awaited", |status| status.verdict.contains(words));
    assert!(status.facts.devices.iter().any(|device| device.error.is_none()), "{status:?}");
    Client::connect(&host.socket()).expect("the socket is served");
}

fn serves(host: &Host, address: &str) {
    host.wait_until("the export is served", |status| {
        let is_there = |uri: &String| uri.starts_with(&format!("nbd://{address}/"));
        status.facts.devices.iter().any(|device| device.error.is_none() && device.uri.iter().any(is_there))
    });
}

/// It was tried once, when the volume was opened.
#[test]
fn an_address_of_the_export_that_comes_late_is_served_when_it_is_there() {
    require!("root", "ip", "nsenter");
    let network = Network::new(&["a"]);
    let folder = Folder::new();
    let mut host = Host::within(&network, &folder, "a");
    host.start();
    host.create(8 * MIB, "nbd");
    host.stop();
    let address = "192.0.2.1:10809";
    host.configure(|volume| volume.nbd_listen = Some(address.parse().expect("an address")));
    host.start();
    assert_unserved(&host, "192.0.2.1 is no address of this host now");
    network.give("a", "192.0.2.1/24");
    serves(&host, address);
    assert!(host.status().verdict.contains("is not encrypted"), "{:?}", host.status());
    host.stop();
}

#[test]
fn a_port_of_the_export_that_is_in_use_is_told_and_served_when_it_is_free() {
    let other = TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = other.local_addr().expect("it is bound").to_string();
    let folder = Folder::new();
    let mut host = Host::new(&folder, "a");
    host.create(8 * MIB, "nbd");
    host.stop();
    host.configure(|volume| volume.nbd_listen = Some(address.parse().expect("an address")));
    host.start();
    assert_unserved(&host, &format!("{address} is in use by another program"));
    drop(other);
    serves(&host, &address);
    // Nobody serves it any more when the volume is not served.
    host.stop();
    TcpListener::bind(&address).expect("the port is free");
}

/// It was tried once, when the volume was opened.
#[test]
fn a_loop_device_whose_place_is_taken_is_served_when_it_is_free() {
    require!("root");
    let folder = Folder::new();
    let mut host = Host::new(&folder, "a");
    host.create(8 * MIB, "loop,nbd");
    host.stop();
    let place = host.device();
    fs::create_dir_all(&place).expect("something else is there");
    host.start();
    let words = format!("the loop device is not served (cannot make the link {}", place.display());
    assert_unserved(&host, &words);
    fs::remove_dir(&place).expect("it is free");
    host.wait_until("the loop device is served", |status| {
        status.facts.devices.iter().all(|device| device.error.is_none())
    });
    let data = [7; 4096];
    fs::OpenOptions::new()
        .write(true)
        .open(&place)
        .and_then(|mut file| file.write_all(&data))
        .expect("a write");
    assert_eq!(fs::read(&place).expect("a read")[..4096], data);
    // One that was released is not tried.
    host.succeed(&["release", "data"]);
    host.stop();
}
