//! What the operator is refused, with the exit code and the words.

use blockmirror_tests::machines::content::{first_difference, stamped};
use blockmirror_tests::machines::folder::Folder;
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::patience::until;
use blockmirror_tests::machines::programs::{own, run, succeed, text};
use blockmirror_tests::require;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

const MIB: u64 = 1 << 20;

fn image(folder: &Folder, name: &str, size_bytes: u64) -> PathBuf {
    let path = folder.join(name);
    File::create(&path).and_then(|file| file.set_len(size_bytes)).expect("an image");
    path
}

fn refuse_create(host: &Host, backing: &Path, more: &[&str], code: i32, words: &[&str]) {
    let arguments = ["create", "other", "--backing", text(backing), "--device", "none"];
    host.refuse(&[&arguments[..], more].concat(), code, words);
    host.refuse(&["status", "other"], 4, &["no volume \"other\""]);
}

fn refuse_join(host: &Host, token: &str, backing: &Path, code: i32, words: &[&str]) {
    host.refuse(&["join", token, "--backing", text(backing)], code, words);
    host.refuse(&["status", "data"], 4, &["no volume \"data\""]);
}

#[test]
fn a_backing_that_others_use_is_refused() {
    require!("root", "mkfs.ext4", "losetup");
    let folder = Folder::new();
    let host = Host::new(&folder, "a");
    let device = folder.attach(&image(&folder, "device.img", 32 * MIB));
    succeed("mkfs.ext4", &["-q", text(&device)]);
    let mounted = folder.mount(&device, "mounted");
    let at = format!("is mounted at {}; unmount it first", mounted.path().display());
    refuse_create(&host, &device, &[], 5, &[&at]);
    refuse_create(&host, &folder.join("device.img"), &[], 5, &["is mounted at"]);
    mounted.unmount();
    refuse_create(&host, &folder.join("device.img"), &[], 5, &["it backs /dev/loop", "losetup -d"]);

    let locked = image(&folder, "locked.img", MIB);
    let lock = File::open(&locked).expect("an image");
    lock.lock().expect("a lock");
    refuse_create(&host, &locked, &[], 5, &["another program has locked it"]);
    drop(lock);
    host.succeed(&["create", "other", "--backing", text(&locked), "--device", "none"]);
}

#[test]
fn a_backing_of_another_volume_or_agent_is_refused() {
    let folder = Folder::new();
    let (one, other) = (Host::new(&folder, "a"), Host::new(&folder, "b"));
    one.create(16 * MIB, "none");
    refuse_create(&one, &one.backing(), &[], 5, &["is the backing of the volume data"]);
    refuse_create(&other, &one.backing(), &[], 5, &["another program has locked it"]);
    let new = folder.join("new.img");
    let twice = ["create", "data", "--backing", text(&new), "--size", "16M"];
    one.refuse(&twice, 5, &["there is a volume data on this host already"]);
    assert!(!new.exists(), "what is refused is not made");
}

#[test]
fn a_backing_of_a_wrong_size_or_type_is_refused() {
    let folder = Folder::new();
    let host = Host::new(&folder, "a");
    let missing = folder.join("missing.img");
    refuse_create(&host, &missing, &[], 2, &["does not exist; give --size to make it"]);
    refuse_create(&host, &missing, &["--size", "1000"], 2, &["multiple of 512"]);
    refuse_create(&host, &missing, &["--size", "0"], 2, &["0"]);
    refuse_create(&host, &missing, &["--size", "16M", "--block-size", "5K"], 2, &["power of two"]);
    assert!(!missing.exists(), "what is refused is not made");
    refuse_create(&host, &image(&folder, "odd.img", 5000), &[], 5, &["5000 bytes", "multiple of 512"]);
    refuse_create(&host, &image(&folder, "empty.img", 0), &[], 5, &["multiple of 512"]);
    let small = image(&folder, "small.img", MIB);
    refuse_create(&host, &small, &["--size", "2M"], 5, &["has 1048576 bytes, the volume needs 2097152"]);
    refuse_create(&host, folder.path(), &[], 5, &["neither a regular file nor a block device"]);
    refuse_create(
        &host,
        &folder.join("no/such/folder.img"),
        &["--size", "1M"],
        1,
        &["does not exist; create it"],
    );
}

#[test]
fn a_replica_destroys_no_data_unless_it_is_told_to() {
    require!("mkfs.ext4");
    let mut mirror = Mirror::new(32 * MIB, "nbd", &[]);
    mirror.client().write_durably(0, &stamped(1)).expect("a write");
    let replica = Host::new(&mirror.folder, "b");
    let used = image(&mirror.folder, "used.img", 32 * MIB);
    succeed("mkfs.ext4", &["-q", "-L", "precious", text(&used)]);
    let before = fs::read(&used).expect("an image");
    let token = mirror.primary.invite();
    refuse_join(&replica, &token, &used, 5, &["an ext4 file system labelled \"precious\"", "--overwrite"]);
    let letter = image(&mirror.folder, "letter.img", 32 * MIB);
    fs::write(mirror.folder.join("text"), "a letter").expect("a file");
    succeed(
        "dd",
        &[
            "if=/dev/urandom",
            &format!("of={}", letter.display()),
            "bs=4096",
            "count=1",
            "seek=5000",
            "conv=notrunc",
        ],
    );
    refuse_join(&replica, &token, &letter, 5, &["carries", "--overwrite"]);
    let small = image(&mirror.folder, "small.img", 16 * MIB);
    refuse_join(&replica, &token, &small, 5, &["has 16777216 bytes, the volume needs 33554432"]);
    assert!(fs::read(&used).expect("an image") == before, "what is refused is not touched");
    assert!(mirror.primary.status().facts.peers.is_empty(), "nobody joined");

    // A refusal on the replica's side uses no token up.
    replica.succeed(&["join", &token, "--backing", text(&used), "--overwrite"]);
    mirror.wait_until_quiet();
    assert_eq!(first_difference(&mirror.primary.backing(), &used), None);
    mirror.replicas.push(replica);
}

#[test]
fn a_token_that_is_wrong_used_or_expired_is_refused() {
    let folder = Folder::new();
    let primary = Host::new(&folder, "a");
    primary.create(16 * MIB, "none");
    let (one, other) = (Host::new(&folder, "b"), Host::new(&folder, "c"));
    let token = primary.invite();
    refuse_join(&one, "nonsense", &one.backing(), 2, &["this is no token"]);
    refuse_join(&one, &token[..token.len() / 2], &one.backing(), 2, &["the token was cut off"]);
    let mut letters: Vec<char> = token.chars().collect();
    let middle = letters.len() / 2;
    letters[middle] = if letters[middle] == 'a' { 'b' } else { 'a' };
    let damaged: String = letters.into_iter().collect();
    refuse_join(&one, &damaged, &one.backing(), 2, &["damaged on its way"]);
    one.join(&primary, &one.backing());
    one.refuse(&["join", &token, "--backing", text(&folder.join("x.img"))], 5, &["there is a volume data"]);

    other.succeed(&["join", &token, "--backing", text(&other.backing())]);
    let third = Host::new(&folder, "d");
    refuse_join(&third, &token, &third.backing(), 5, &["the token was used already"]);
    let brief = primary.succeed(&["invite", "data", "--expires", "1s"]);
    until("the token has expired", || {
        let said = third.tool(&["join", brief.trim(), "--backing", text(&third.path("no/folder/x.img"))]);
        if said.error.contains("the token has expired") { Ok(()) } else { Err(format!("{said:?}")) }
    });
    refuse_join(&third, brief.trim(), &third.backing(), 5, &["the token has expired"]);
    primary.refuse(&["invite", "nothing"], 4, &["no volume \"nothing\" on this host"]);
    assert!(!third.backing().exists(), "what is refused is not made");
}

#[test]
fn a_stopped_agent_and_unknown_names_have_exit_codes_of_their_own() {
    let folder = Folder::new();
    let mut host = Host::new(&folder, "a");
    host.create(16 * MIB, "none");
    host.refuse(
        &["status", "nothing"],
        4,
        &["no volume \"nothing\" on this host; blockmirror status lists them"],
    );
    host.refuse(&["wait", "nothing", "--for", "in-sync"], 4, &["no volume \"nothing\""]);
    host.refuse(&["pause", "data", "nobody"], 4, &["no peer \"nobody\" of data"]);
    host.refuse(&["compare", "data", "nobody"], 4, &["no peer \"nobody\" of data"]);
    host.refuse(
        &["wait", "data", "--for", "in-sync", "--timeout", "1s"],
        6,
        &["not in sync yet", "no replica"],
    );
    host.stop();
    for arguments in [&["invite", "data"][..], &["peers", "data"], &["wait", "data", "--for", "in-sync"]] {
        host.refuse(arguments, 3, &["the agent is not running", "start blockmirror-agent"]);
    }
    let said = host.tool(&["status", "data"]);
    assert_eq!(said.code, 3, "{said:?}");
    assert!(said.output.contains("agent not running; the device is not served"), "{said:?}");
}

#[test]
fn two_agents_do_not_share_a_state_folder() {
    let folder = Folder::new();
    let host = Host::new(&folder, "a");
    let state = host.path("state");
    let output = run(
        text(&own("blockmirror-agent")),
        &[
            "--config",
            text(&host.path("config")),
            "--state",
            text(&state),
            "--run",
            text(&folder.join("run")),
            "--listen",
            "127.0.0.1:0",
        ],
    );
    let error = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{error}");
    assert!(error.contains("another agent uses") && error.contains("folders of its own"), "{error}");
}

#[test]
fn the_state_of_a_volume_whose_configuration_is_gone_is_not_taken_for_a_failed_attempt() {
    let folder = Folder::new();
    let mut host = Host::new(&folder, "a");
    host.create(16 * MIB, "none");
    host.stop();
    let (file, aside) = (host.path("config/volumes/data.toml"), host.path("data.toml"));
    fs::rename(&file, &aside).expect("the volume's file");
    host.start();
    let new = host.path("new.img");
    let arguments = ["create", "data", "--backing", text(&new), "--size", "1M"];
    host.refuse(
        &arguments,
        5,
        &["holds the state of a volume data", "put", "back, or move that folder away"],
    );
    host.stop();
    fs::rename(&aside, &file).expect("the volume's file");
    host.start();
    assert_eq!(host.status().facts.backing_error, None);
}

#[test]
fn a_host_of_the_primarys_name_is_not_taken_in() {
    let folder = Folder::new();
    let one = Host::new(&folder, "a");
    one.create(16 * MIB, "none");
    let other = Host::prepare(&folder, "b");
    let file = other.path("config/agent.toml");
    let settings = fs::read_to_string(&file).expect("settings").replace("name = \"b\"", "name = \"a\"");
    fs::write(&file, settings).expect("settings");
    let mut other = other;
    other.start();
    refuse_join(&other, &one.invite(), &other.backing(), 5, &["are both called a", "agent.toml"]);
}
