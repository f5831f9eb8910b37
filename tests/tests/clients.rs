//! Programs that are not ours, as clients of a mirrored volume.

use blockmirror_tests::harness::random::Random;
use blockmirror_tests::machines::content::{first_difference, noise};
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::nbd::Client;
use blockmirror_tests::machines::programs::{run, succeed, text};
use blockmirror_tests::require;
use std::fs;

const MIB: u64 = 1 << 20;

#[test]
fn what_nbdcopy_brings_in_is_on_the_replica_and_comes_out_there() {
    require!("nbdcopy", "nbdinfo");
    let mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    let source = mirror.folder.join("source");
    let mut content = noise(&mut Random::new(1), 64 * MIB);
    content[16 * MIB as usize..24 * MIB as usize].fill(0);
    fs::write(&source, &content).expect("a source");
    succeed("nbdcopy", &["--flush", text(&source), &mirror.primary.uri()]);
    mirror.assert_identical();
    assert_eq!(first_difference(&source, &mirror.replica().backing()), None);

    let information = succeed("nbdinfo", &["--json", &mirror.replica().uri()]);
    let information: serde_json::Value = serde_json::from_str(&information).expect("nbdinfo prints JSON");
    let export = &information["exports"][0];
    assert_eq!(export["is_read_only"], true, "{information}");
    assert_eq!(export["export-size"], 64 * MIB, "{information}");
    for (host, name) in [(&mirror.primary, "from a"), (mirror.replica(), "from b")] {
        let out = mirror.folder.join(name);
        succeed("nbdcopy", &[&host.uri(), text(&out)]);
        assert_eq!(first_difference(&source, &out), None, "{name}");
    }
}

#[test]
fn the_replica_lets_nobody_write() {
    require!("qemu-io");
    let mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    let refused = run("qemu-io", &["-f", "raw", "-c", "write -P 1 0 4096", &mirror.replica().uri()]);
    assert!(!refused.status.success(), "{refused:?}");
    let mut client = Client::connect(&mirror.replica().socket()).expect("the replica serves its export");
    assert!(client.write(0, &[1; 4096]).is_err());
    mirror.assert_identical();
}

#[test]
fn qemu_writes_zeroes_and_discards_and_all_of_it_arrives() {
    require!("qemu-io");
    let mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    let commands = [
        "write -P 0x11 0 32M",
        "write -P 0x22 512 1024",
        "write -z 1M 3M",
        "write -z -u 8M 2M",
        "discard 12M 8M",
        "write -f -P 0x33 13M 4k",
        "aio_write -P 0x44 40M 4M",
        "aio_write -P 0x55 48M 4M",
        "aio_flush",
        "flush",
        "read -P 0x22 512 1024",
        "read -P 0 1M 3M",
        "read -P 0 8M 2M",
        "read -P 0x33 13M 4k",
        "read -P 0x44 40M 4M",
    ];
    let arguments: Vec<&str> = commands.iter().flat_map(|command| ["-c", *command]).collect();
    let uri = mirror.primary.uri();
    let said = succeed("qemu-io", &[&["-f", "raw"], &arguments[..], &[&uri]].concat());
    assert!(!said.contains("failed"), "{said}");
    mirror.assert_identical();
    let arguments = ["-r", "-f", "raw", "-c", "read -P 0x22 512 1024", "-c", "read -P 0 1M 3M"];
    let said = succeed(
        "qemu-io",
        &[&arguments[..], &["-c", "read -P 0x33 13M 4k", &mirror.replica().uri()]].concat(),
    );
    assert!(!said.contains("failed"), "{said}");
}

#[test]
fn fio_verifies_what_it_wrote_while_it_is_mirrored() {
    require!("fio");
    let engines = succeed("fio", &["--enghelp"]);
    if !engines.contains("nbd") {
        return eprintln!("skipped: needs fio with its nbd engine");
    }
    let mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    let uri = format!("--uri={}", mirror.primary.uri());
    let folder = format!("--aux-path={}", text(mirror.folder.path()));
    let arguments = [
        "--name=verify",
        "--ioengine=nbd",
        &uri,
        &folder,
        "--rw=randwrite",
        "--bssplit=512/10:4k/60:64k/30",
        "--size=64M",
        "--io_size=96M",
        "--iodepth=16",
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        "--fsync=64",
        "--randseed=7",
        "--verify_state_save=0",
    ];
    succeed("fio", &arguments);
    mirror.assert_identical();
}

#[test]
fn a_client_that_vanishes_with_requests_under_way_costs_nobody_anything() {
    let mirror = Mirror::new(64 * MIB, "nbd", &["b"]);
    let mut random = Random::new(2);
    let mut other = mirror.client();
    for round in 0..8 {
        let mut client = mirror.client();
        for _ in 0..40 {
            let offset = random.below(512) * 65_536;
            client.begin_write(offset, &noise(&mut random, 65_536)).expect("the server listens");
        }
        drop(client);
        let stamp = [round + 1; 4096];
        other.write_durably(60 * MIB, &stamp).expect("another client is served");
        assert_eq!(other.read(60 * MIB, 4096).expect("another client is served"), stamp);
    }
    other.flush().expect("another client is served");
    mirror.assert_identical();
}
