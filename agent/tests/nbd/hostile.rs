//! Clients that break the protocol or vanish, and sockets that are in the way.

use crate::harness::{Harness, NAME};
use crate::memory::Memory;
use crate::raw::{Raw, Said};
use blockmirror_agent::buffer::BufferPool;
use blockmirror_agent::device::Geometry;
use blockmirror_agent::device::nbd::{CONNECTION_LIMIT, ListenError, Offer, Server};
use blockmirror_protocol::nbd::handshake::*;
use blockmirror_protocol::nbd::option_reply::*;
use blockmirror_protocol::nbd::transmission::*;
use blockmirror_protocol::ranges::ByteRange;
use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::rc::Rc;

const MIB: u64 = 1 << 20;
const NONE: CommandFlags = CommandFlags::NONE;

/// A client is served, whatever the others did.
fn assert_serving(harness: &Harness) {
    let mut raw = Raw::open(&harness.socket(), false);
    raw.request(CommandKind::Flush, NONE, 1, 0, 0);
    assert_eq!(raw.reply(), (1, Said::Simple(None)));
}

#[test]
fn unknown_and_damaged_options_are_refused_and_the_next_one_is_heard() {
    let harness = Harness::start(MIB);
    let mut raw = Raw::connect(&harness.socket());
    raw.flags(true, true);
    for (number, data, reason) in [
        (99, &b"whatever"[..], Refusal::Unsupported),
        (u32::MAX, b"", Refusal::Unsupported),
        (option::START_TLS, b"", Refusal::Unsupported),
        (option::START_TLS, b"x", Refusal::Invalid),
        (option::LIST, b"x", Refusal::Invalid),
        (option::GO, b"", Refusal::Invalid),
        (option::GO, b"\0\0\0\x20ab", Refusal::Invalid),
        (option::GO, b"\xff\xff\xff\xff", Refusal::Invalid),
        (option::SET_META_CONTEXT, b"\0\0\0\0\xff\xff\xff\xff", Refusal::Invalid),
        (option::GO, &[0; 1 << 20], Refusal::TooBig),
        (99, &[0; 1 << 20], Refusal::TooBig),
    ] {
        raw.send(&OptionHeader { option: number, length: data.len() as u32 }.encode());
        raw.send(data);
        let replies = raw.option_replies(number);
        assert!(
            matches!(&replies[..], [OptionReply::Error { reason: found, .. }] if *found == reason),
            "option {number}: {replies:?}"
        );
    }
    assert_eq!(raw.ask(&ClientOption::StructuredReply), [OptionReply::Acknowledged]);
}

/// As many silent clients as there are places kept all others out for a minute.
#[test]
fn clients_that_never_open_the_export_make_room_for_those_that_do() {
    let harness = Harness::start(MIB);
    let mut silent: Vec<Raw> = (0..CONNECTION_LIMIT).map(|_| Raw::connect(&harness.socket())).collect();
    let opened: Vec<Raw> = (0..3).map(|_| Raw::open(&harness.socket(), false)).collect();
    assert!(silent[..3].iter_mut().all(Raw::is_closed), "the oldest ones gave way");
    for patient in &mut silent[3..] {
        patient.flags(true, true);
        assert_eq!(patient.ask(&ClientOption::StructuredReply), [OptionReply::Acknowledged]);
    }
    drop(opened);
    assert_serving(&harness);
}

#[test]
fn a_client_that_cannot_be_understood_is_closed() {
    let harness = Harness::start(MIB);
    let mut unknown_flags = Raw::connect(&harness.socket());
    unknown_flags.send(&[0xff; 4]);
    assert!(unknown_flags.is_closed());

    let mut wrong_option_magic = Raw::connect(&harness.socket());
    wrong_option_magic.flags(true, true);
    wrong_option_magic.send(&[0x55; 16]);
    assert!(wrong_option_magic.is_closed());

    let mut old_client_with_new_option = Raw::connect(&harness.socket());
    old_client_with_new_option.flags(false, false);
    old_client_with_new_option.send(&ClientOption::List.encode());
    assert!(old_client_with_new_option.is_closed());

    let mut endless_name = Raw::connect(&harness.socket());
    endless_name.flags(true, true);
    endless_name.send(&OptionHeader { option: option::EXPORT_NAME, length: 5000 }.encode());
    endless_name.send(&[b'a'; 5000]);
    assert!(endless_name.is_closed());

    let mut wrong_request_magic = Raw::open(&harness.socket(), false);
    wrong_request_magic.send(&[0x55; REQUEST_BYTES]);
    assert!(wrong_request_magic.is_closed());
    assert_serving(&harness);
}

#[test]
fn a_client_that_vanishes_in_the_middle_of_anything_is_forgotten() {
    let harness = Harness::start(MIB);
    let write =
        RequestHeader { flags: NONE, kind: CommandKind::Write, cookie: 1, offset: 0, length: 65536 }.encode();
    let option = OptionHeader { option: option::GO, length: u32::MAX }.encode();
    drop(Raw::connect(&harness.socket()));
    for count in [1, 4, 10, 20, 40] {
        let mut raw = Raw::connect(&harness.socket());
        raw.flags(true, true);
        raw.send(&[&option[..], &[0; 64]].concat()[..count]);
    }
    for count in [1, 27, 28, 29, 40000, 65536 + 27] {
        let mut raw = Raw::open(&harness.socket(), false);
        raw.send(&[&write[..], &vec![1; 65536]].concat()[..count]);
    }
    harness.until(|served| served.unix.connections() == 0);
    let untouched = harness.look(|served| served.volume.content(ByteRange::new(0, MIB)));
    assert!(untouched.iter().all(|byte| *byte == 0), "a write that never arrived whole was carried out");
    assert_serving(&harness);
}

#[test]
fn requests_of_a_client_that_vanished_are_finished_and_their_answers_dropped() {
    let harness = Harness::start(64 * MIB);
    harness.look(|served| served.volume.hold(true));
    let mut leaving = Raw::open(&harness.socket(), false);
    for cookie in 0..8 {
        leaving.request(CommandKind::Write, NONE, cookie, cookie * 4096, 4096);
        leaving.send(&[7; 4096]);
        leaving.request(CommandKind::Read, NONE, cookie, 0, 4 << 20);
    }
    let mut breaking = Raw::open(&harness.socket(), true);
    breaking.request(CommandKind::Read, NONE, 1, 0, MIB as u32);
    harness.until(|served| served.volume.waiting() == 17);
    drop(leaving);
    breaking.send(&[0x55; REQUEST_BYTES]);
    assert!(breaking.is_closed(), "who breaks the protocol does not get its answers");
    harness.look(|served| served.volume.hold(false));
    harness.until(|served| served.volume.waiting() == 0 && served.unix.connections() == 0);
    let written = harness.look(|served| served.volume.content(ByteRange::new(0, 8 * 4096)));
    assert!(written.iter().all(|byte| *byte == 7));
    assert_serving(&harness);
}

#[test]
fn a_client_that_never_reads_its_replies_is_not_served_without_bound() {
    let harness = Harness::start(64 * MIB);
    let mut deaf = Raw::open(&harness.socket(), false);
    let read = RequestHeader { flags: NONE, kind: CommandKind::Read, cookie: 1, offset: 0, length: 1 << 20 }
        .encode();
    deaf.socket.set_nonblocking(true).unwrap();
    // Ends when the server no longer reads and the kernel's buffers are full.
    while deaf.socket.write(&read).is_ok() {}
    assert_serving(&harness);
    drop(deaf);
    harness.until(|served| served.unix.connections() == 0);
}

#[test]
fn a_stopped_server_closes_its_connections_with_requests_under_way() {
    let harness = Harness::start(MIB);
    harness.look(|served| served.volume.hold(true));
    let mut raw = Raw::open(&harness.socket(), false);
    raw.request(CommandKind::Flush, NONE, 1, 0, 0);
    harness.until(|served| served.volume.waiting() == 1);
    drop(harness);
    assert!(raw.is_closed());
}

/// Runs `test` where servers can be started.
fn on_a_servers_thread(test: impl AsyncFnOnce(Rc<Memory>, BufferPool)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let pool = BufferPool::new(0);
    let geometry = Geometry { size_bytes: MIB, read_only: false, preferred_bytes: 4096 };
    let volume = Memory::new(geometry, pool.clone());
    tokio::task::LocalSet::new().block_on(&runtime, test(volume, pool));
}

#[test]
fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    on_a_servers_thread(async |volume, pool| {
        let start = |path: &Path| Server::unix(path, Offer::new(NAME, volume.clone(), pool.clone()));
        drop(UnixListener::bind(&path).unwrap());
        assert!(path.exists(), "a process that dies leaves its socket behind");
        let first = start(&path).expect("nobody accepts on the old socket");
        assert!(matches!(start(&path), Err(ListenError::AlreadyServed { .. })));
        first.stop().await;
        assert!(!path.exists());
        let second = start(&path).expect("the first server has stopped");
        std::fs::remove_file(&path).unwrap();
        let third = start(&path).expect("somebody has removed the socket");
        drop(second);
        assert!(path.exists(), "the second server has left the third one's socket alone");
        drop(third);
        assert!(!path.exists());
    });
}

#[test]
fn a_file_that_is_no_socket_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("socket");
    std::fs::write(&path, "precious").unwrap();
    on_a_servers_thread(async |volume, pool| {
        let refused = Server::unix(&path, Offer::new(NAME, volume, pool));
        assert!(matches!(refused, Err(ListenError::NotASocket { .. })));
    });
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}
