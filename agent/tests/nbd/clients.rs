//! libnbd, qemu and fio as clients.

use crate::harness::{Harness, NAME, has, run, succeed};
use blockmirror_agent::device::Geometry;
use blockmirror_agent::device::nbd::in_words;
use blockmirror_protocol::ranges::ByteRange;
use std::path::Path;

const MIB: u64 = 1 << 20;

fn text(path: &Path) -> String {
    path.to_str().unwrap().to_owned()
}

/// Bytes that differ from place to place.
fn pattern(length: u64) -> Vec<u8> {
    (0..length / 8).flat_map(|index| (index.wrapping_mul(0x9e37_79b9_7f4a_7c15)).to_le_bytes()).collect()
}

#[test]
fn nbdinfo_sees_size_and_abilities() {
    if !has("nbdinfo") {
        return;
    }
    let harness = Harness::start(64 * MIB);
    for uri in [harness.uri(), harness.uri_of(NAME), harness.tcp_uri()] {
        let found: serde_json::Value =
            serde_json::from_str(&succeed("nbdinfo", &["--json", &uri])).expect("nbdinfo prints json");
        assert_eq!((&found["protocol"], &found["structured"]), (&"newstyle-fixed".into(), &true.into()));
        let export = &found["exports"][0];
        assert_eq!(export["export-size"], 64 * MIB);
        assert_eq!(export["contexts"], serde_json::json!(["base:allocation"]));
        for (ability, has_it) in [
            ("is_read_only", false),
            ("can_cache", true),
            ("can_df", true),
            ("can_fast_zero", false),
            ("can_flush", true),
            ("can_fua", true),
            ("can_multi_conn", true),
            ("can_trim", true),
            ("can_zero", true),
        ] {
            assert_eq!(export[ability], has_it, "{ability}");
        }
        assert_eq!(
            (&export["block_size_minimum"], &export["block_size_preferred"], &export["block_size_maximum"]),
            (&512.into(), &4096.into(), &(64 * MIB).into())
        );
    }
}

#[test]
fn nbdinfo_lists_the_one_export() {
    if !has("nbdinfo") {
        return;
    }
    let harness = Harness::start(MIB);
    let listed: serde_json::Value =
        serde_json::from_str(&succeed("nbdinfo", &["--list", "--json", &harness.uri()])).unwrap();
    assert_eq!(listed["exports"].as_array().unwrap().len(), 1);
    assert_eq!(listed["exports"][0]["export-name"], NAME);
    let other = run("nbdinfo", &[&harness.uri_of("other")]);
    assert!(!other.status.success(), "no other name is served");
}

#[test]
fn a_read_only_volume_says_so() {
    if !has("nbdinfo") || !has("qemu-io") {
        return;
    }
    let harness = Harness::start_with(Geometry { size_bytes: MIB, read_only: true, preferred_bytes: 4096 });
    assert!(succeed("nbdinfo", &[&harness.uri()]).contains("is_read_only: true"));
    succeed("qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 0 1M", &harness.uri()]);
}

#[test]
fn nbdinfo_maps_what_is_allocated() {
    if !has("nbdinfo") || !has("qemu-io") {
        return;
    }
    let harness = Harness::start(4 * MIB);
    let uri = harness.uri();
    succeed("qemu-io", &["-f", "raw", "-c", "write -P 7 1M 1M", "-c", "write -P 7 3M 64k", &uri]);
    let map: serde_json::Value =
        serde_json::from_str(&succeed("nbdinfo", &["--map", "--json", &uri])).unwrap();
    let found: Vec<(u64, u64, u64)> = map
        .as_array()
        .unwrap()
        .iter()
        .map(|part| {
            let number = |field: &str| part[field].as_u64().unwrap();
            (number("offset"), number("length"), number("type"))
        })
        .collect();
    let kib = 1024;
    assert_eq!(
        found,
        [
            (0, MIB, 3),
            (MIB, MIB, 0),
            (2 * MIB, MIB, 3),
            (3 * MIB, 64 * kib, 0),
            (3 * MIB + 64 * kib, MIB - 64 * kib, 3),
        ]
    );
}

#[test]
fn nbdcopy_gets_back_what_it_put_there() {
    if !has("nbdcopy") {
        return;
    }
    let harness = Harness::start(48 * MIB);
    let (source, copy) = (harness.file("source"), harness.file("copy"));
    let mut content = pattern(48 * MIB);
    content[(8 * MIB) as usize..(20 * MIB) as usize].fill(0);
    std::fs::write(&source, &content).unwrap();
    for (size, there, back) in
        [("65536", harness.uri(), harness.tcp_uri()), ("33554432", harness.tcp_uri(), harness.uri())]
    {
        let request = format!("--request-size={size}");
        let connections = "--connections=4";
        succeed("nbdcopy", &["--flush", &request, connections, &text(&source), &there]);
        assert!(harness.look(|served| served.volume.flushes()) > 0, "nbdcopy was asked to flush");
        succeed("nbdcopy", &[&request, connections, &back, &text(&copy)]);
        assert!(std::fs::read(&copy).unwrap() == content, "requests of {size} bytes return other content");
        std::fs::remove_file(&copy).unwrap();
    }
    harness.until(|served| served.unix.connections() + served.tcp.connections() == 0);
}

#[test]
fn qemu_reads_what_it_wrote_discarded_and_zeroed() {
    if !has("qemu-io") {
        return;
    }
    let harness = Harness::start(16 * MIB);
    let printed = succeed(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-d",
            "unmap",
            "-t",
            "writeback",
            "-c",
            "write -P 0x11 0 1M",
            "-c",
            "write -P 0x22 1M 64k",
            "-c",
            "write -f -P 0x33 1536k 512",
            "-c",
            "discard 64k 64k",
            "-c",
            "write -z 256k 64k",
            "-c",
            "write -z -u 512k 64k",
            "-c",
            "flush",
            "-c",
            "read -P 0x11 0 64k",
            "-c",
            "read -P 0 64k 64k",
            "-c",
            "read -P 0x11 128k 128k",
            "-c",
            "read -P 0 256k 64k",
            "-c",
            "read -P 0 512k 64k",
            "-c",
            "read -P 0x22 1M 64k",
            "-c",
            "read -P 0x33 1536k 512",
            "-c",
            "read -P 0 1537k 510k",
            &harness.uri_of(NAME),
        ],
    );
    assert!(!printed.contains("verification failed"), "{printed}");
    let (zeroed, durable) = harness.look(|served| (served.volume.zeroed(), served.volume.durable_writes()));
    let kib = |start: u64| ByteRange::new(start << 10, 64 << 10);
    let unmapped: Vec<(ByteRange, bool)> = zeroed.iter().map(|(range, unmap, _)| (*range, *unmap)).collect();
    assert_eq!(unmapped, [(kib(64), true), (kib(256), false), (kib(512), true)]);
    assert_eq!(durable, 1, "one write asked to be durable");
}

#[test]
fn fio_verifies_over_several_connections() {
    if !has("fio") {
        return;
    }
    if !String::from_utf8_lossy(&run("fio", &["--enghelp"]).stdout).contains("nbd") {
        eprintln!("skipped: this fio has no nbd engine");
        return;
    }
    let harness = Harness::start(64 * MIB);
    let folder = text(harness.socket().parent().unwrap());
    for (block, depth) in [("4k-4k", "32"), ("512-96k", "8")] {
        let arguments = [
            "--name=verify".to_owned(),
            "--ioengine=nbd".to_owned(),
            format!("--uri={}", harness.uri()),
            format!("--bsrange={block}"),
            format!("--iodepth={depth}"),
            format!("--aux-path={folder}"),
            "--rw=randrw".to_owned(),
            "--size=8M".to_owned(),
            "--offset_increment=16M".to_owned(),
            "--numjobs=4".to_owned(),
            "--verify=crc32c".to_owned(),
            "--verify_state_save=0".to_owned(),
            "--do_verify=1".to_owned(),
            "--thread".to_owned(),
        ];
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        succeed("fio", &arguments);
    }
    harness.until(|served| served.unix.connections() == 0);
}

#[test]
fn who_has_the_volume_open_is_told_in_words() {
    if !has("qemu-io") {
        return;
    }
    use std::io::{BufRead, BufReader, Write};
    use std::process::{Command, Stdio};
    let harness = Harness::start(MIB);
    let _own = crate::raw::Raw::open(&harness.socket(), false);
    let open = |uri: &str| {
        let mut client = Command::new("qemu-io")
            .args(["-f", "raw", uri])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("qemu-io starts");
        // It has opened the export once it carries out a command.
        writeln!(client.stdin.as_ref().unwrap(), "write 0 512").unwrap();
        let output = BufReader::new(client.stdout.take().unwrap());
        assert!(output.lines().map_while(Result::ok).any(|line| line.contains("wrote 512")));
        client
    };
    let mut local = open(&harness.uri());
    let mut remote = open(&harness.tcp_uri());
    let (unix, tcp) = harness.look(|served| (served.unix.clients(), served.tcp.clients()));
    let found = in_words([&unix[..], &unix, &tcp].concat());
    for client in [&mut local, &mut remote] {
        drop(client.stdin.take());
        client.wait().expect("it ends with its input");
    }
    let expected = [format!("NBD client qemu-io (pid {})", local.id()), format!("NBD client {}", tcp[0])];
    assert_eq!(found, expected, "each once, and not what this process has open");
}
