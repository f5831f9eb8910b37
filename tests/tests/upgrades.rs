//! Volumes that earlier releases left, as their agents were killed: in each role, in the middle of a resync, a promotion and an
//! undo, and after a split. This release opens them and goes on (`tests/state_folders`).
//!
//! Each archive is the folders of two hosts, `a` and `b`, that the programs of that release made:
//! `BLOCKMIRROR_PROGRAMS=FOLDER STATE_FOLDERS=superblock-7 cargo test -p blockmirror-tests --test upgrades -- --ignored make`.
//! Paths and addresses in the configuration are placeholders. An unpacked image is another file than the volume had: its
//! identity is put into the record of the backing, and the note of when it was last written is left away.

use blockmirror_agent::config::Role;
use blockmirror_agent::control::api::{CopyState, VolumeState};
use blockmirror_agent::state::backing;
use blockmirror_protocol::disk::superblock::Superblock;
use blockmirror_protocol::terms::DataState;
use blockmirror_tests::machines::content::{BLOCK_BYTES, stamp_of, stamped};
use blockmirror_tests::machines::folder::Folder;
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::{Mirror, assert_identical};
use blockmirror_tests::machines::nbd::Client;
use blockmirror_tests::machines::patience::until;
use blockmirror_tests::machines::programs::{succeed, text};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

const SIZE_BYTES: u64 = 16 << 20;
const BLOCKS: u64 = SIZE_BYTES / BLOCK_BYTES;
/// The stamps of what was written before anything happened, then on `a` alone, and then on `b` after it was promoted.
const BEFORE: u64 = 1;
const ON_A: u64 = 2;
const ON_B: u64 = 3;
/// What this release writes.
const NOW: u64 = 4;
/// What the two hosts were at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Moment {
    /// `b` was in sync.
    InSync,
    /// `b` was being copied to, and had pre-images of some of it.
    Resync,
    /// The same; `a` died, and `b` was just rolling back, to be the primary.
    Promotion,
    /// `b` was promoted while `a` went on.
    Split,
    /// The same; it was just recorded that `a`'s content is given up, and nothing of `b`'s had come yet.
    Resolution,
    /// It was given up, `a` follows, and what it had is just being brought back.
    Undo,
}

const MOMENTS: [Moment; 6] =
    [Moment::InSync, Moment::Resync, Moment::Promotion, Moment::Split, Moment::Resolution, Moment::Undo];

fn archive(release: &str, moment: Moment) -> PathBuf {
    let name = format!("{release}-{}.tar.gz", format!("{moment:?}").to_lowercase());
    Path::new(env!("CARGO_MANIFEST_DIR")).join("state_folders").join(name)
}

/// Writes a stamp to its blocks, and flushes.
fn write(host: &Host, stamp: u64) {
    let mut client =
        until("the volume is served", || Client::connect(&host.socket()).map_err(|error| error.to_string()));
    for block in places(stamp) {
        client.write(block * BLOCK_BYTES, &stamped(stamp)).expect("a write");
    }
    client.flush().expect("a flush");
}

/// The blocks that a stamp is written to: `BEFORE` to all, each other to a fifth of them.
fn places(stamp: u64) -> impl Iterator<Item = u64> {
    (0..BLOCKS).filter(move |block| stamp == BEFORE || block % 5 == stamp)
}

/// The content must be that of these writes, one after the other.
fn assert_holds(host: &Host, stamps: &[u64]) {
    let image = File::open(host.backing()).expect("a backing");
    for block in 0..BLOCKS {
        let mut bytes = vec![0; BLOCK_BYTES as usize];
        image.read_exact_at(&mut bytes, block * BLOCK_BYTES).expect("a backing can be read");
        let last = stamps.iter().rev().find(|stamp| places(**stamp).any(|place| place == block));
        assert_eq!(stamp_of(&bytes), last.copied(), "block {block} of {}", host.name());
    }
}

fn superblock(host: &Host) -> (u64, Superblock) {
    let bytes = fs::read(host.state("superblock")).expect("the superblock");
    Superblock::recover(&bytes).expect("the superblock is sound")
}

fn cut_and_write(mirror: &Mirror) {
    mirror.replica().link().cut();
    mirror.wait_until_lost("b");
    write(&mirror.primary, ON_A);
}

fn split() -> Mirror {
    let mirror = Mirror::new(SIZE_BYTES, "nbd", &["b"]);
    write(&mirror.primary, BEFORE);
    mirror.assert_identical();
    mirror.primary.link().cut();
    cut_and_write(&mirror);
    let b = mirror.replica();
    b.wait_until("the loss is noticed", |status| status.state == VolumeState::Waiting);
    b.succeed(&["promote", "data", "--force"]);
    write(b, ON_B);
    for host in [&mirror.primary, b] {
        host.link().mend();
    }
    mirror.primary.wait_until("the split is told", |status| {
        status.state == VolumeState::SplitBrain && status.facts.role == Role::Replica
    });
    mirror
}

/// A resync that goes on for longer than its making.
fn resync() -> Mirror {
    let mirror = Mirror::new(SIZE_BYTES, "nbd", &["b"]);
    write(&mirror.primary, BEFORE);
    mirror.assert_identical();
    cut_and_write(&mirror);
    mirror.primary.succeed(&["tune", "data", "b", "--resync-limit", "256K"]);
    mirror.replica().link().mend();
    mirror.wait_for_peer("b", "some of it is copied", |peer| {
        peer.out_of_sync_bytes.is_some_and(|left| (1..BLOCKS * BLOCK_BYTES / 6).contains(&left))
    });
    mirror
}

/// Begins what the tool is told, and stops the agent as soon as its superblock says so.
fn stop_amid(host: &mut Host, arguments: &[&str]) {
    let (before, _) = superblock(host);
    let mut running = host.begin(arguments);
    while superblock(host).0 == before {
        assert!(!running.has_ended(), "{arguments:?} is refused");
    }
    host.stall();
    assert_eq!(superblock(host).0, before + 1, "it was over too soon; make it again");
}

#[test]
#[ignore = "makes the archives, with the programs of an earlier release"]
fn make() {
    let release = std::env::var("STATE_FOLDERS").expect("the release's name");
    assert!(std::env::var_os("BLOCKMIRROR_PROGRAMS").is_some(), "these would be this release's programs");
    for moment in MOMENTS {
        let mut mirror = match moment {
            Moment::InSync => {
                let mirror = Mirror::new(SIZE_BYTES, "nbd", &["b"]);
                write(&mirror.primary, BEFORE);
                mirror.assert_identical();
                mirror
            }
            Moment::Resync | Moment::Promotion => resync(),
            Moment::Split | Moment::Resolution | Moment::Undo => split(),
        };
        match moment {
            Moment::Promotion => {
                mirror.primary.stall();
                stop_amid(mirror.replica_mut(), &["promote", "data", "--force"]);
            }
            Moment::Resolution => stop_amid(&mut mirror.primary, &["resolve", "data", "--keep", "b"]),
            Moment::Undo => {
                mirror.primary.succeed(&["resolve", "data", "--keep", "b"]);
                assert_identical(mirror.replica(), &mirror.primary);
                mirror.replica_mut().stall();
                mirror
                    .primary
                    .wait_until("the loss is noticed", |status| status.state == VolumeState::Waiting);
                stop_amid(&mut mirror.primary, &["undo", "data"]);
            }
            Moment::InSync | Moment::Resync | Moment::Split => {}
        }
        pack(&mut mirror, &archive(&release, moment));
    }
}

/// Kills both agents, and packs their folders.
fn pack(mirror: &mut Mirror, archive: &Path) {
    let addresses = [&mirror.primary, mirror.replica()].map(|host| host.link().address().to_string());
    mirror.primary.kill();
    mirror.replica_mut().kill();
    let folder = mirror.folder.path().to_owned();
    let [a, b] = addresses;
    for host in ["a", "b"] {
        let config = folder.join(host).join("config/volumes/data.toml");
        replace(&config, &[(text(&folder), "FOLDER"), (&a, "ADDRESS_A"), (&b, "ADDRESS_B")]);
    }
    fs::create_dir_all(archive.parent().expect("it is in a folder")).expect("a folder");
    let tar = ["--create", "--gzip", "--sparse", "--sort=name", "--owner=0", "--group=0", "--exclude=held"];
    let packed = ["a/config/volumes", "a/state", "a/data.img", "b/config/volumes", "b/state", "b/data.img"];
    let place = ["--file", text(archive), "--directory", text(&folder)];
    succeed("tar", &[&tar[..], &place, &packed].concat());
}

fn replace(path: &Path, words: &[(&str, &str)]) {
    let mut content = fs::read_to_string(path).expect("a file of text");
    for (word, other) in words {
        content = content.replace(word, other);
    }
    fs::write(path, content).expect("a file");
}

/// The two hosts as they were, whose agents do not run. Hosts go before the folder that they are in.
struct Pair {
    a: Host,
    b: Host,
    _folder: Folder,
}

impl Pair {
    fn new(archive: &Path) -> Self {
        let folder = Folder::new();
        succeed("tar", &["--extract", "--file", text(archive), "--directory", text(folder.path())]);
        let [a, b] = ["a", "b"].map(|name| Host::prepare(&folder, name));
        let [to_a, to_b] = [&a, &b].map(|host| host.link().address().to_string());
        for host in [&a, &b] {
            let words =
                [("FOLDER", text(folder.path())), ("ADDRESS_A", to_a.as_str()), ("ADDRESS_B", to_b.as_str())];
            replace(&host.path("config/volumes/data.toml"), &words);
            let identity = backing::identity(&host.backing()).expect("a backing");
            backing::record(&host.path("state/data"), &identity).expect("a record");
        }
        Self { a, b, _folder: folder }
    }

    fn start(&mut self) {
        self.a.start();
        self.b.start();
    }
}

/// Goes on from that moment until the two are in sync again, with what must be there. Gives who is the primary, and what was written.
fn go_on(pair: &mut Pair, moment: Moment) -> (bool, Vec<u64>) {
    match moment {
        Moment::InSync => {
            pair.start();
            (true, vec![BEFORE])
        }
        Moment::Resync => {
            pair.b.start();
            let status = pair.b.wait_until("it is open", |status| status.state == VolumeState::Waiting);
            assert_eq!(status.facts.data, Some(CopyState::Inconsistent), "{status:?}");
            pair.a.start();
            (true, vec![BEFORE, ON_A])
        }
        Moment::Promotion => {
            pair.b.start();
            pair.b.wait_until("it is open", |status| status.state == VolumeState::Waiting);
            assert_eq!(superblock(&pair.b).1.data, DataState::Inconsistent, "nothing is taken for done");
            pair.b.succeed(&["promote", "data", "--force"]);
            assert_holds(&pair.b, &[BEFORE]);
            write(&pair.b, ON_B);
            pair.a.start();
            pair.a.wait_until("the split is told", |status| {
                status.state == VolumeState::SplitBrain && status.facts.role == Role::Replica
            });
            pair.a.succeed(&["resolve", "data", "--keep", "b"]);
            (false, vec![BEFORE, ON_B])
        }
        Moment::Split => {
            pair.start();
            pair.a.wait_until("the split is told", |status| status.state == VolumeState::SplitBrain);
            pair.a.succeed(&["resolve", "data", "--keep", "b"]);
            (false, vec![BEFORE, ON_B])
        }
        Moment::Resolution => {
            pair.start();
            (false, vec![BEFORE, ON_B])
        }
        Moment::Undo => {
            pair.a.start();
            pair.a.wait_until("it is open", |status| status.state == VolumeState::Waiting);
            pair.a.succeed(&["undo", "data"]);
            assert_holds(&pair.a, &[BEFORE, ON_A]);
            pair.b.start();
            pair.a.wait_until("the split is told", |status| status.state == VolumeState::SplitBrain);
            pair.a.succeed(&["resolve", "data", "--keep", "b"]);
            (false, vec![BEFORE, ON_B])
        }
    }
}

/// Opens what a release left at each moment.
fn open(release: &str) {
    for moment in MOMENTS {
        println!("{moment:?}");
        let mut pair = Pair::new(&archive(release, moment));
        let (is_a, mut stamps) = go_on(&mut pair, moment);
        let (primary, replica) = if is_a { (&pair.a, &pair.b) } else { (&pair.b, &pair.a) };
        assert_identical(primary, replica);
        assert_holds(replica, &stamps);
        write(primary, NOW);
        stamps.push(NOW);
        assert_identical(primary, replica);
        assert_holds(replica, &stamps);
    }
}

#[test]
fn volumes_are_opened_whose_superblock_has_version_6_and_go_on() {
    open("superblock-6");
}

#[test]
fn volumes_are_opened_whose_superblock_has_version_7_and_go_on() {
    open("superblock-7");
}
