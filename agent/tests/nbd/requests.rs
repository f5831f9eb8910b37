//! Negotiation and requests, one by one.

use crate::harness::{Harness, NAME};
use crate::raw::{Raw, Said};
use blockmirror_agent::device::{Errno, Geometry};
use blockmirror_protocol::nbd::handshake::*;
use blockmirror_protocol::nbd::option_reply::*;
use blockmirror_protocol::nbd::transmission::*;
use blockmirror_protocol::ranges::ByteRange;
use std::os::unix::fs::PermissionsExt;

const MIB: u64 = 1 << 20;
const NONE: CommandFlags = CommandFlags::NONE;

fn query(name: &str, kinds: &[u16]) -> ExportQuery {
    ExportQuery { name: name.to_owned(), kinds: kinds.to_vec() }
}

fn contexts(queries: &[&str]) -> ContextQuery {
    ContextQuery { name: NAME.to_owned(), queries: queries.iter().map(|text| (*text).to_owned()).collect() }
}

fn refusal(replies: &[OptionReply]) -> Option<Refusal> {
    match replies {
        [OptionReply::Error { reason, .. }] => Some(*reason),
        _ => None,
    }
}

#[test]
fn the_name_of_the_export_is_told_to_whom_asks() {
    let harness = Harness::start(MIB);
    let mut raw = Raw::connect(&harness.socket());
    raw.flags(true, true);
    let name = OptionReply::Info(Info::Name(NAME.to_owned()));
    assert!(raw.ask(&ClientOption::Info(query("", &[info::NAME]))).contains(&name));
    assert!(!raw.ask(&ClientOption::Info(query("", &[info::BLOCK_SIZE]))).contains(&name));
    let listed = raw.ask(&ClientOption::List);
    assert_eq!(listed, [OptionReply::Server(NAME.to_owned()), OptionReply::Acknowledged]);
    for option in [ClientOption::Info(query("other", &[])), ClientOption::Go(query("other", &[]))] {
        assert_eq!(refusal(&raw.ask(&option)), Some(Refusal::UnknownExport));
    }
    assert_eq!(raw.ask(&ClientOption::Abort), [OptionReply::Acknowledged]);
    assert!(raw.is_closed());
}

#[test]
fn contexts_are_found_by_what_is_asked() {
    let harness = Harness::start(MIB);
    let mut raw = Raw::connect(&harness.socket());
    raw.flags(true, true);
    let early = raw.ask(&ClientOption::SetMetaContext(contexts(&["base:allocation"])));
    assert_eq!(refusal(&early), Some(Refusal::Invalid), "structured replies come first");
    raw.ask(&ClientOption::StructuredReply);
    for (queries, listed, set) in [
        (&[][..], true, false),
        (&["base:allocation"], true, true),
        (&["base:"], true, false),
        (&[""], false, false),
        (&["base:other"], false, false),
        (&["qemu:dirty-bitmap:x"], false, false),
        (&["x:", "base:allocation"], true, true),
    ] {
        for (option, found) in [
            (ClientOption::ListMetaContext(contexts(queries)), listed),
            (ClientOption::SetMetaContext(contexts(queries)), set),
        ] {
            let replies = raw.ask(&option);
            assert_eq!(replies.len(), 1 + usize::from(found), "{option:?}");
            assert_eq!(replies.last(), Some(&OptionReply::Acknowledged));
        }
    }
    let other = ContextQuery { name: "other".to_owned(), queries: vec![] };
    assert_eq!(refusal(&raw.ask(&ClientOption::SetMetaContext(other))), Some(Refusal::UnknownExport));
}

#[test]
fn an_export_opened_by_its_name_is_padded_unless_agreed_otherwise() {
    let harness = Harness::start(MIB);
    for (fixed_newstyle, no_zeroes, length) in [(true, true, 10), (true, false, 134), (false, false, 134)] {
        let mut raw = Raw::connect(&harness.socket());
        raw.flags(fixed_newstyle, no_zeroes);
        raw.send(&ClientOption::ExportName(NAME.to_owned()).encode());
        let reply = raw.bytes(length);
        assert_eq!(reply[..8], MIB.to_be_bytes());
        raw.request(CommandKind::Read, NONE, 7, 0, 512);
        assert_eq!(raw.reply(), (7, Said::Simple(None)));
        assert_eq!(raw.bytes(512), [0; 512]);
    }
    let mut raw = Raw::connect(&harness.socket());
    raw.flags(true, true);
    raw.send(&ClientOption::ExportName("other".to_owned()).encode());
    assert!(raw.is_closed());
}

#[test]
fn requests_that_cannot_be_served_say_why() {
    let harness = Harness::start(MIB);
    let sizes = [(Failure::Invalid, 100, 512), (Failure::Invalid, 0, 100), (Failure::Invalid, 0, 0)];
    for structured in [false, true] {
        let mut raw = Raw::open(&harness.socket(), structured);
        let mut check = |kind, flags, offset, length: u32, failure| {
            raw.request(kind, flags, 7, offset, length);
            if kind == CommandKind::Write {
                raw.send(&vec![1; length as usize]);
            }
            let wanted = if structured {
                Said::Chunk(Chunk::Error { failure, message: String::new() })
            } else {
                Said::Simple(Some(failure))
            };
            assert_eq!(raw.reply(), (7, wanted), "{kind:?} {flags:?} {offset} {length}");
        };
        for (failure, offset, length) in sizes {
            for kind in [CommandKind::Read, CommandKind::Write, CommandKind::Trim, CommandKind::WriteZeroes] {
                check(kind, NONE, offset, length, failure);
            }
        }
        for offset in [MIB, MIB - 512, u64::MAX - 511] {
            check(CommandKind::Read, NONE, offset, 1024, Failure::Invalid);
            check(CommandKind::Trim, NONE, offset, 1024, Failure::Invalid);
            check(CommandKind::Cache, NONE, offset, 1024, Failure::Invalid);
            check(CommandKind::Write, NONE, offset, 1024, Failure::NoSpace);
            check(CommandKind::WriteZeroes, NONE, offset, 1024, Failure::NoSpace);
        }
        check(CommandKind::Read, NONE, 0, (64 << 20) + 512, Failure::Invalid);
        check(CommandKind::Write, NONE, 0, (64 << 20) + 512, Failure::Invalid);
        check(CommandKind::Unknown(99), NONE, 0, 512, Failure::Invalid);
        check(CommandKind::Read, CommandFlags::NO_HOLE, 0, 512, Failure::Invalid);
        check(CommandKind::Write, CommandFlags(0x8000), 0, 512, Failure::Invalid);
        check(CommandKind::Flush, CommandFlags::ONE_DESCRIPTOR, 0, 0, Failure::Invalid);
        check(CommandKind::WriteZeroes, CommandFlags::FAST_ZERO, 0, 512, Failure::Invalid);
        if !structured {
            check(CommandKind::BlockStatus, NONE, 0, 512, Failure::Invalid);
            check(CommandKind::Read, CommandFlags::DONT_FRAGMENT, 0, 512, Failure::Invalid);
        }
    }
    assert!(
        harness.look(|served| served.volume.content(ByteRange::new(0, MIB))).iter().all(|byte| *byte == 0)
    );
}

#[test]
fn a_read_only_volume_refuses_to_be_changed() {
    let harness = Harness::start_with(Geometry { size_bytes: MIB, read_only: true, preferred_bytes: 4096 });
    let mut raw = Raw::open(&harness.socket(), false);
    for kind in [CommandKind::Write, CommandKind::Trim, CommandKind::WriteZeroes] {
        raw.request(kind, NONE, 7, 0, 512);
        if kind == CommandKind::Write {
            raw.send(&[1; 512]);
        }
        assert_eq!(raw.reply(), (7, Said::Simple(Some(Failure::NotPermitted))));
    }
    raw.request(CommandKind::Flush, NONE, 8, 0, 0);
    assert_eq!(raw.reply(), (8, Said::Simple(None)));
}

#[test]
fn structured_reads_and_block_status_come_in_one_chunk() {
    let harness = Harness::start(MIB);
    let mut raw = Raw::open(&harness.socket(), true);
    raw.request(CommandKind::Write, CommandFlags::FUA, 1, 8192, 4096);
    raw.send(&[9; 4096]);
    assert_eq!(raw.reply(), (1, Said::Simple(None)));
    raw.request(CommandKind::Read, CommandFlags::DONT_FRAGMENT, 2, 8192, 512);
    let data = Chunk::Data { offset: 8192, data: vec![9; 512] };
    assert_eq!(raw.reply(), (2, Said::Chunk(data)));
    let hole = |length| Descriptor { length, flags: Descriptor::HOLE | Descriptor::ZERO };
    let all = vec![hole(8192), Descriptor { length: 4096, flags: 0 }, hole((MIB - 12288) as u32)];
    for (flags, descriptors) in [(NONE, all), (CommandFlags::ONE_DESCRIPTOR, vec![hole(8192)])] {
        raw.request(CommandKind::BlockStatus, flags, 3, 0, MIB as u32);
        assert_eq!(raw.reply(), (3, Said::Chunk(Chunk::Status { context: 1, descriptors })));
    }
    raw.request(CommandKind::Cache, NONE, 4, 0, MIB as u32);
    assert_eq!(raw.reply(), (4, Said::Simple(None)));
}

#[test]
fn a_range_of_nearly_4_gib_reaches_the_volume_whole() {
    let harness = Harness::start(8 << 30);
    let mut raw = Raw::open(&harness.socket(), false);
    let length = u32::MAX - 511;
    raw.request(CommandKind::Trim, NONE, 1, 4096, length);
    assert_eq!(raw.reply(), (1, Said::Simple(None)));
    raw.request(CommandKind::WriteZeroes, CommandFlags::FUA, 2, 4096, length);
    assert_eq!(raw.reply(), (2, Said::Simple(None)));
    let whole = ByteRange::new(4096, u64::from(length));
    assert_eq!(harness.look(|served| served.volume.zeroed()), [(whole, true, false), (whole, true, true)]);
}

#[test]
fn the_errors_of_the_volume_reach_the_client() {
    let harness = Harness::start(MIB);
    let mut raw = Raw::open(&harness.socket(), false);
    for (errno, failure) in [
        (5, Failure::Io),
        (28, Failure::NoSpace),
        (30, Failure::NotPermitted),
        (95, Failure::NotSupported),
        (110, Failure::Io),
    ] {
        harness.look(move |served| served.volume.fail(Some(Errno(errno))));
        raw.request(CommandKind::Read, NONE, 7, 0, 512);
        assert_eq!(raw.reply(), (7, Said::Simple(Some(failure))), "errno {errno}");
    }
}

#[test]
fn replies_come_in_the_order_of_the_answers() {
    let harness = Harness::start(MIB);
    let mut raw = Raw::open(&harness.socket(), false);
    harness.look(|served| served.volume.hold(true));
    for cookie in 0..32 {
        raw.request(CommandKind::Write, NONE, cookie, cookie * 4096, 4096);
        raw.send(&[cookie as u8; 4096]);
    }
    harness.until(|served| served.volume.waiting() == 32);
    harness.look(|served| served.volume.hold(false));
    for cookie in (0..32).rev() {
        assert_eq!(raw.reply(), (cookie, Said::Simple(None)));
    }
}

#[test]
fn a_connection_stops_listening_at_its_limits_and_goes_on_after() {
    let harness = Harness::start(256 * MIB);
    for (length, count, begun) in [(512, 200, 128), (16 << 20, 6, 4)] {
        let mut raw = Raw::open(&harness.socket(), false);
        harness.look(|served| served.volume.hold(true));
        for cookie in 0..count {
            raw.request(CommandKind::Read, NONE, cookie, 0, length);
        }
        harness.until(move |served| served.volume.waiting() == begun);
        // Whatever the connection could still do, it has the chance to do.
        let mut chances = 1000;
        harness.until(move |served| {
            chances -= 1;
            assert_eq!(served.volume.waiting(), begun, "a request was begun beyond the limit");
            chances == 0
        });
        harness.look(|served| served.volume.hold(false));
        let mut cookies: Vec<u64> = (0..count)
            .map(|_| {
                let (cookie, said) = raw.reply();
                assert_eq!((said, raw.bytes(length as usize).len()), (Said::Simple(None), length as usize));
                cookie
            })
            .collect();
        cookies.sort_unstable();
        assert_eq!(cookies, (0..count).collect::<Vec<_>>());
    }
}

#[test]
fn a_client_that_leaves_gets_its_outstanding_replies() {
    let harness = Harness::start(MIB);
    let mut raw = Raw::open(&harness.socket(), false);
    harness.look(|served| served.volume.hold(true));
    raw.request(CommandKind::Flush, NONE, 1, 0, 0);
    raw.request(CommandKind::Disconnect, NONE, 2, 0, 0);
    harness.until(|served| served.volume.waiting() == 1);
    harness.look(|served| served.volume.hold(false));
    assert_eq!(raw.reply(), (1, Said::Simple(None)));
    assert!(raw.is_closed());
    harness.until(|served| served.unix.connections() == 0);
}

#[test]
fn who_has_the_volume_open_is_known() {
    let harness = Harness::start(MIB);
    let waiting = Raw::connect(&harness.socket());
    let open = Raw::open(&harness.socket(), false);
    let clients = harness.look(|served| served.unix.clients());
    assert_eq!(
        clients.iter().map(ToString::to_string).collect::<Vec<_>>(),
        [format!("process {}", std::process::id())]
    );
    drop((waiting, open));
    harness.until(|served| served.unix.connections() == 0);
}

#[test]
fn only_the_owner_can_open_the_socket() {
    let harness = Harness::start(MIB);
    let mode = std::fs::metadata(harness.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o7777, 0o600);
}
