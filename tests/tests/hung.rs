//! Disks and file servers that hang, ours and those of others (X5): what does not answer stops nobody but who needs it, and
//! whoever waits is told.

use blockmirror_agent::config::{ConfigFolder, Mode, VolumeConfig};
use blockmirror_agent::control::api::{Connection, VolumeState, VolumeStatus};
use blockmirror_agent::transport::{Endpoint, HostKey};
use blockmirror_protocol::wire::message::{AskStanding, Message, Refusal};
use blockmirror_tests::machines::folder::{Folder, Mounted, fill};
use blockmirror_tests::machines::hanging::Hanging;
use blockmirror_tests::machines::host::{Host, Running};
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::nbd::Client;
use blockmirror_tests::machines::patience::until;
use blockmirror_tests::machines::programs::{run, succeed, text};
use blockmirror_tests::require;
use std::fs;
use std::path::{Path, PathBuf};
use tokio::task::JoinSet;

const MIB: u64 = 1 << 20;

/// A volume `data` on a disk that can hang, mirrored to `b` in this mode, and another volume beside it on `a`.
struct Scene {
    /// Goes on before the hosts end.
    disk: Hanging,
    mirror: Mirror,
    device: PathBuf,
}

impl Scene {
    fn new(mode: Mode) -> Self {
        let folder = Folder::new();
        let mut disk = Hanging::new(&folder, "disk", 8 * MIB);
        let device = disk.device();
        let primary = Host::new(&folder, "a");
        primary.succeed(&["create", "data", "--backing", text(&device), "--device", "nbd"]);
        let mut mirror = Mirror { primary, replicas: Vec::new(), folder };
        mirror.add("b");
        mirror.primary.succeed(&["mode", "data", "b", &mode.to_string()]);
        mirror.wait_until_quiet();
        let other = mirror.primary.path("other.img");
        mirror.primary.succeed(&[
            "create",
            "other",
            "--backing",
            text(&other),
            "--size",
            "8M",
            "--device",
            "nbd",
        ]);
        Self { mirror, disk, device }
    }

    fn wait_until_hung(&self) -> VolumeStatus {
        self.mirror.primary.wait_until("it is told that the disk hangs", |status| {
            status.facts.health.hung.as_ref().is_some_and(|hung| hung.seconds >= 5)
        })
    }
}

/// The volume that does not hang is served as ever.
fn assert_other_is_served(host: &Host) {
    let mut client = Client::connect(&host.path("run/other.nbd")).expect("it is served");
    client.write_durably(0, &[1; 4096]).expect("it is written");
}

#[test]
fn a_hung_disk_is_told_and_the_other_host_takes_over_without_force() {
    require!("root", "losetup", "qemu-storage-daemon");
    let mut scene = Scene::new(Mode::Sync);
    scene.mirror.client().write_durably(0, &[7; 4096]).expect("a write");
    scene.mirror.wait_until_quiet();
    scene.disk.stall();
    let status = scene.wait_until_hung();
    assert_eq!(status.state, VolumeState::Hung);
    assert!(
        status.verdict.starts_with(&format!("hung: {} has not answered for", text(&scene.device))),
        "{status:?}"
    );
    assert!(status.action.contains("on b: blockmirror promote data"), "{status:?}");
    let all = scene.mirror.primary.statuses();
    assert_eq!(all.len(), 2, "each volume has its line: {all:?}");
    assert_eq!(all[1].facts.health.hung, None, "the other one is well: {all:?}");
    assert_other_is_served(&scene.mirror.primary);
    let words = ["does not answer", "blockmirror promote data"];
    scene.mirror.primary.refuse(&["demote", "data"], 5, &words);
    scene.mirror.primary.refuse(&["switch", "data", "--to", "b"], 5, &words);

    scene.mirror.replica().succeed(&["promote", "data"]);
    let mut client = Client::connect(&scene.mirror.replica().socket()).expect("b serves");
    assert_eq!(client.read(0, 4096).expect("a read"), [7; 4096]);
    client.write_durably(4096, &[8; 4096]).expect("a write");
    drop(client);
    scene.disk.go_on();
    // The old primary follows when its disk answers.
    scene.mirror.primary.wait_until("a follows b", |status| status.state == VolumeState::Following);
    scene.mirror.replica().wait_until("all is well", |status| status.state == VolumeState::Healthy);
    scene.mirror.primary.stop();
}

#[test]
fn an_agent_whose_disk_hangs_ends_when_it_is_told_to_and_names_the_disk() {
    require!("root", "losetup", "qemu-storage-daemon");
    let mut scene = Scene::new(Mode::Async);
    scene.disk.stall();
    let mut client = scene.mirror.client();
    client.begin_write(0, &[7; 4096]).expect("it is taken");
    scene.wait_until_hung();
    let ended = scene.mirror.primary.terminate();
    assert_eq!(ended.code(), Some(1), "{}", scene.mirror.primary.log());
    let log = scene.mirror.primary.log();
    let words = format!("{} has not answered for", text(&scene.device));
    assert!(log.contains(&words) && log.contains("the agent ends without having ended the volume"), "{log}");
    // It starts without the disk, too, and takes it up when it answers.
    scene.mirror.primary.start();
    let status = scene.mirror.primary.wait_until("the disk is awaited", |status| {
        matches!(status.state, VolumeState::Awaiting | VolumeState::Failed)
    });
    assert!(status.verdict.contains(text(&scene.device)), "{status:?}");
    assert_other_is_served(&scene.mirror.primary);
    scene.disk.go_on();
    scene.mirror.primary.wait_until("it is served", |status| status.state == VolumeState::Healthy);
    scene.mirror.primary.stop();
}

/// An image whose file server hangs is asked for holes and written on other threads than the volume's, also where that is
/// the transport's.
#[test]
fn an_image_whose_server_hangs_stops_neither_its_thread_nor_the_transport() {
    require!("root", "losetup", "qemu-storage-daemon");
    let folder = Folder::new();
    let primary = Host::new(&folder, "a");
    let disk = Hanging::new(&folder, "disk", 8 * MIB);
    primary.succeed(&["create", "data", "--backing", text(disk.file()), "--device", "nbd"]);
    let device = disk.file().to_owned();
    let mut scene = Scene { disk, mirror: Mirror { primary, replicas: Vec::new(), folder }, device };
    let (disk, mirror) = (&scene.disk, &mut scene.mirror);
    mirror.add("b");
    mirror.primary.succeed(&["mode", "data", "b", "sync"]);
    mirror.wait_until_quiet();
    // From here on the volume lives on the transport's thread.
    mirror.primary.stop();
    mirror.primary.start();
    mirror.wait_until_in_sync();
    let mut client = mirror.client();
    disk.stall();
    client.begin_write(0, &[7; 4096]).expect("it is taken");
    let hangs = |status: &VolumeStatus| {
        let hung = status.facts.health.hung.as_ref();
        hung.is_some_and(|hung| hung.what == text(disk.file()) && hung.seconds >= 5)
    };
    mirror.primary.wait_until("it is told that the disk hangs", hangs);
    // By now the kernel has forgotten what the server last told of the file, and asks before it reads.
    let mut reader = mirror.client();
    reader.begin_read(0, 4096).expect("it is taken");
    mirror.primary.refuse(&["demote", "data"], 5, &["does not answer"]);
    mirror.primary.wait_until("the thread goes on", hangs);
    assert_eq!(mirror.peer("b").connection, Connection::Connected, "the transport goes on");
    disk.go_on();
    mirror.primary.wait_until("all is well", |status| status.state == VolumeState::Healthy);
    client.finish().expect("the write is answered");
    assert_eq!(reader.finish_read(4096).expect("the read is answered"), [7; 4096]);
    drop((client, reader));
    mirror.primary.stop();
}

/// A loop device of another program was on an image whose server hung: each look for the users of an image asked about
/// that image too, and `create`, `promote` and with them the agent waited for a server that was none of theirs.
#[test]
fn a_hung_image_of_another_program_stops_nothing() {
    require!("root", "losetup", "qemu-storage-daemon");
    let folder = Folder::new();
    let mut host = Host::new(&folder, "a");
    let mut theirs = Hanging::new(&folder, "theirs", 8 * MIB);
    let _device = theirs.device();
    theirs.stall();
    host.create(8 * MIB, "nbd");
    Client::connect(&host.socket()).expect("it is served").write_durably(0, &[1; 4096]).expect("a write");
    // What was asked of the hung image itself is answered in words.
    host.refuse(&["create", "hung", "--backing", text(theirs.file())], 1, &["does not answer"]);
    assert_eq!(host.statuses().len(), 1);
    host.stop();
    theirs.go_on();
    drop(theirs);
}

/// A volume `data` and another one on a host; one file of the agent's, at this path in its folder, is on a server that can
/// hang.
fn with_a_file_that_can_hang(path: &str) -> (Hanging, Host, Folder) {
    let folder = Folder::new();
    let host = Host::new(&folder, "a");
    host.create(8 * MIB, "nbd");
    let other = host.path("other.img");
    host.succeed(&["create", "other", "--backing", text(&other), "--size", "8M", "--device", "nbd"]);
    (Hanging::new(&folder, &format!("a/{path}"), 4096), host, folder)
}

/// All that does not need the file goes on.
fn assert_nothing_else_waits(host: &Host) {
    let statuses = host.statuses();
    assert_eq!(statuses.len(), 2, "{statuses:?}");
    assert!(statuses.iter().all(|status| status.state == VolumeState::Degraded), "{statuses:?}");
    let mut client = Client::connect(&host.socket()).expect("it is served");
    client.write_durably(0, &[1; 4096]).expect("it is written");
    assert_other_is_served(host);
    host.succeed(&["invite", "other"]);
}

/// The invitations were read on the main thread: neither the status nor the end of the agent came.
#[test]
fn a_state_folder_that_hangs_stops_only_who_needs_it() {
    require!("root", "qemu-storage-daemon");
    let (file, mut host, _folder) = with_a_file_that_can_hang("state/data/invitations.toml");
    file.stall();
    let waiting: Vec<Running> = (0..3).map(|_| host.begin(&["invite", "data"])).collect();
    host.refuse(&["invite", "data", "--list"], 1, &["state/data does not answer"]);
    assert_nothing_else_waits(&host);
    drop(waiting);
    host.stop();
    // The next one starts all the same.
    host.start();
    host.wait_until("the volume is served", |status| status.state == VolumeState::Degraded);
    assert_nothing_else_waits(&host);
    host.stop();
}

/// The file of a volume was written under the lock that status and the stop of the agent need.
#[test]
fn a_configuration_that_hangs_stops_only_who_changes_it() {
    require!("root", "mkfs.ext4", "fsfreeze");
    let (mut mirror, mounted) = with_config_disk(&["b"]);
    let frozen = Frozen::new(mounted.path());
    let host = &mirror.primary;
    let waiting: Vec<Running> = (0..3).map(|_| host.begin(&["pause", "data", "b"])).collect();
    host.refuse(&["pause", "data", "b"], 1, &["config/volumes/data.toml does not answer"]);
    assert_eq!(host.status().state, VolumeState::Healthy);
    let mut client = Client::connect(&host.socket()).expect("it is served");
    client.write_durably(0, &[1; 4096]).expect("it is written");
    drop((client, waiting, frozen));
    mirror.primary.stop();
}

/// A file system that writes nothing as long as this lives.
struct Frozen(PathBuf);

impl Frozen {
    fn new(point: &Path) -> Self {
        succeed("fsfreeze", &["--freeze", text(point)]);
        Self(point.to_owned())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        run("fsfreeze", &["--unfreeze", text(&self.0)]);
    }
}

/// A mirror whose primary has its configuration on a file system of its own, which is mounted there.
fn with_config_disk(replicas: &[&str]) -> (Mirror, Mounted) {
    let mut mirror = Mirror::new(8 * MIB, "nbd", replicas);
    mirror.primary.stop();
    let mounted = mirror.primary.move_config(&mirror.folder);
    mirror.primary.start();
    if !replicas.is_empty() {
        mirror.wait_until_quiet();
    }
    (mirror, mounted)
}

fn saved(host: &Host) -> VolumeConfig {
    let folder = ConfigFolder::new(host.path("config"));
    folder.load_volume(&"data".parse().expect("a name")).expect("the file is right")
}

/// What hosts say of themselves they say once: it was lost where the configuration had no room for it.
#[test]
fn what_hosts_tell_is_kept_when_the_disk_of_the_configuration_has_room_again() {
    require!("root", "mkfs.ext4");
    let (mut mirror, mounted) = with_config_disk(&["b"]);
    let filler = fill(mounted.path());
    mirror.replica_mut().stop();
    mirror.replica_mut().settle("c");
    mirror.replica_mut().start();
    until("it can't be kept", || {
        let log = mirror.primary.log();
        match log.contains("goes into the configuration when that can be done") {
            true => Ok(()),
            false => Err(log),
        }
    });
    let names =
        |volume: &VolumeConfig| volume.peers.iter().map(|peer| peer.name.to_string()).collect::<Vec<_>>();
    assert_eq!(names(&saved(&mirror.primary)), ["b"]);
    fs::remove_file(&filler).expect("it is there");
    mirror.wait_for_peer("c", "it is known by its name", |peer| peer.connection == Connection::Connected);
    assert_eq!(names(&saved(&mirror.primary)), ["c"]);
    mirror.primary.stop();
}

/// The peer was in the configuration then, and nobody ever spoke to it.
#[test]
fn a_host_whose_joining_is_saved_late_is_linked() {
    require!("root", "mkfs.ext4", "fsfreeze");
    let (mut mirror, mounted) = with_config_disk(&[]);
    let token = mirror.primary.invite();
    let host = Host::new(&mirror.folder, "b");
    let frozen = Frozen::new(mounted.path());
    let image = host.backing();
    let join = ["join", &token, "--backing", text(&image)];
    host.refuse(&join, 5, &["config/volumes/data.toml does not answer"]);
    drop(frozen);
    mirror.wait_for_peer("b", "it is called, and has no such volume", |peer| {
        peer.error.as_ref().is_some_and(|error| error.contains("no such volume"))
    });
    // The token was used; whoever it let in may say it again.
    host.succeed(&join);
    mirror.replicas.push(host);
    mirror.wait_until_in_sync();
    mirror.assert_identical();
    mirror.primary.stop();
}

/// The file said one thing then, and the agent went by another until it was started anew.
#[test]
fn what_the_disk_of_the_configuration_takes_late_is_carried_out() {
    require!("root", "mkfs.ext4", "fsfreeze");
    let (mut mirror, mounted) = with_config_disk(&["b"]);
    let frozen = Frozen::new(mounted.path());
    mirror.primary.refuse(&["pause", "data", "b"], 1, &["config/volumes/data.toml does not answer"]);
    assert_eq!(mirror.peer("b").connection, Connection::Connected);
    drop(frozen);
    mirror.wait_for_peer("b", "it is paused", |peer| peer.connection == Connection::Paused);
    assert!(saved(&mirror.primary).peers[0].paused);
    mirror.primary.stop();
}

/// Each question about how a host stands has the state folder read: a peer may ask as often as it likes, and each had a thread
/// that waited there.
#[test]
fn questions_about_a_state_folder_that_hangs_have_one_thread_and_all_others_are_told_so() {
    require!("root", "qemu-storage-daemon");
    const QUESTIONS: usize = 6;
    let mut mirror = Mirror::new(8 * MIB, "nbd", &["b"]);
    mirror.replica_mut().stop();
    let key = HostKey::load(&mirror.replica().path("state/host.key")).expect("the key of b");
    let id = HostKey::load(&mirror.primary.path("state/host.key")).expect("the key of a").id();
    let folder = ConfigFolder::new(mirror.primary.path("config"));
    let volume = folder.load_volume(&"data".parse().expect("a name")).expect("the volume's file").id;
    // It hides the superblock from whoever opens it now.
    let file = Hanging::new(&mirror.folder, "a/state/data/superblock", 8192);
    file.stall();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    runtime.block_on(async {
        let endpoint = Endpoint::bind("127.0.0.1:0".parse().expect("an address"), &key).expect("an endpoint");
        let address = mirror.primary.link().address().to_string();
        let connection = endpoint.connect(&[address], id).await.expect("a is reached");
        let mut asked = JoinSet::new();
        for _ in 0..QUESTIONS {
            let connection = connection.clone();
            asked.spawn(async move {
                let (mut sender, mut receiver) = connection.open_control().await.expect("a stream");
                sender.send(&AskStanding { volume }.into()).await.expect("it is sent");
                match receiver.receive().await.expect("an answer") {
                    Message::Refused(no) => no.refusal,
                    other => panic!("{other:?}"),
                }
            });
        }
        for _ in 1..QUESTIONS {
            let refusal = asked.join_next().await.expect("they were asked").expect("they are answered");
            assert_eq!(refusal, Refusal::Busy);
        }
        file.go_on();
        // This one had its turn.
        let refusal = asked.join_next().await.expect("it was asked").expect("it is answered");
        assert_eq!(refusal, Refusal::Backing);
    });
    mirror.client().write_durably(0, &[1; 4096]).expect("the volume is served");
    drop(file);
    mirror.primary.stop();
}
