//! Golden bytes of every message, bytes that no message has, and that what was written reads back.

use super::handshake::*;
use super::option_reply::*;
use super::transmission::*;
use super::{Malformed, TEXT_LIMIT_BYTES};
use proptest::prelude::*;

/// Bytes from groups of hexadecimal digits, so that a golden message shows its fields.
fn hex(text: &str) -> Vec<u8> {
    let digits: Vec<u8> = text.bytes().filter(|byte| !byte.is_ascii_whitespace()).collect();
    let byte = |pair: &[u8]| u8::from_str_radix(std::str::from_utf8(pair).unwrap(), 16).unwrap();
    digits.chunks_exact(2).map(byte).collect()
}

fn array<const N: usize>(text: &str) -> [u8; N] {
    hex(text).try_into().expect("a golden message has its length")
}

fn name(text: &str) -> String {
    text.to_owned()
}

#[test]
fn the_greeting_and_the_flags_have_their_bytes() {
    assert_eq!(greeting().to_vec(), hex("4e42444d41474943 49484156454f5054 0003"));
    for (text, fixed_newstyle, no_zeroes) in [
        ("00000000", false, false),
        ("00000001", true, false),
        ("00000002", false, true),
        ("00000003", true, true),
    ] {
        let flags = ClientFlags { fixed_newstyle, no_zeroes };
        assert_eq!(ClientFlags::parse(array(text)), Ok(flags));
        assert_eq!(flags.encode(), array(text));
    }
    assert_eq!(ClientFlags::parse(array("00000004")), Err(Malformed::UnknownFlags(4)));
}

#[test]
fn every_option_has_its_bytes() {
    let export = || ExportQuery { name: name("ab"), kinds: vec![1, 3] };
    let contexts = |queries: &[&str]| ContextQuery {
        name: name("ab"),
        queries: queries.iter().map(|query| name(query)).collect(),
    };
    let magic = "49484156454f5054";
    for (option, rest) in [
        (ClientOption::ExportName(name("ab")), "00000001 00000002 6162"),
        (ClientOption::Abort, "00000002 00000000"),
        (ClientOption::List, "00000003 00000000"),
        (ClientOption::StartTls, "00000005 00000000"),
        (ClientOption::Info(export()), "00000006 0000000c 00000002 6162 0002 0001 0003"),
        (ClientOption::Go(export()), "00000007 0000000c 00000002 6162 0002 0001 0003"),
        (ClientOption::StructuredReply, "00000008 00000000"),
        (ClientOption::ListMetaContext(contexts(&[])), "00000009 0000000a 00000002 6162 00000000"),
        (
            ClientOption::SetMetaContext(contexts(&["c:", ""])),
            "0000000a 00000014 00000002 6162 00000002 00000002 633a 00000000",
        ),
        (ClientOption::Unknown(77), "0000004d 00000000"),
    ] {
        let bytes = option.encode();
        assert_eq!(bytes, hex(&format!("{magic}{rest}")), "{option:?}");
        let header = OptionHeader::parse(bytes.first_chunk().unwrap()).unwrap();
        let data = &bytes[OPTION_HEADER_BYTES..];
        assert_eq!((header.option, header.length as usize), (option.number(), data.len()));
        assert_eq!(header.encode().as_slice(), &bytes[..OPTION_HEADER_BYTES]);
        assert_eq!(ClientOption::parse(header.option, data), Ok(option));
    }
}

#[test]
fn every_option_reply_has_its_bytes() {
    let summary = ExportSummary {
        size_bytes: 0x1234,
        flags: ExportFlags::HAS_FLAGS.with(ExportFlags::FLUSH).with(ExportFlags::MULTIPLE_CONNECTIONS),
    };
    let refused = |reason, message: &str| OptionReply::Error { reason, message: name(message) };
    let block_size = Info::BlockSize { minimum: 512, preferred: 4096, maximum: 64 << 20 };
    for (reply, rest) in [
        (OptionReply::Acknowledged, "00000001 00000000"),
        (OptionReply::Server(name("ab")), "00000002 00000006 00000002 6162"),
        (OptionReply::Info(Info::Export(summary)), "00000003 0000000c 0000 0000000000001234 0105"),
        (OptionReply::Info(Info::Name(name("ab"))), "00000003 00000004 0001 6162"),
        (OptionReply::Info(Info::Description(name("d"))), "00000003 00000003 0002 64"),
        (OptionReply::Info(block_size), "00000003 0000000e 0003 00000200 00001000 04000000"),
        (OptionReply::MetaContext { id: 1, name: name("c:d") }, "00000004 00000007 00000001 633a64"),
        (refused(Refusal::Unsupported, ""), "80000001 00000000"),
        (refused(Refusal::Policy, ""), "80000002 00000000"),
        (refused(Refusal::Invalid, "no"), "80000003 00000002 6e6f"),
        (refused(Refusal::Platform, ""), "80000004 00000000"),
        (refused(Refusal::TlsRequired, ""), "80000005 00000000"),
        (refused(Refusal::UnknownExport, ""), "80000006 00000000"),
        (refused(Refusal::ShuttingDown, ""), "80000007 00000000"),
        (refused(Refusal::BlockSizeRequired, ""), "80000008 00000000"),
        (refused(Refusal::TooBig, ""), "80000009 00000000"),
    ] {
        let mut bytes = Vec::new();
        reply.encode(7, &mut bytes);
        assert_eq!(bytes, hex(&format!("0003e889045565a9 00000007 {rest}")), "{reply:?}");
        let header = OptionReplyHeader::parse(bytes.first_chunk().unwrap()).unwrap();
        let data = &bytes[OPTION_REPLY_HEADER_BYTES..];
        assert_eq!((header.option, header.length as usize), (7, data.len()));
        assert_eq!(OptionReply::parse(header.kind, data), Ok(reply));
    }
    assert_eq!(export_name_reply(summary, true), hex("0000000000001234 0105"));
    let padded = export_name_reply(summary, false);
    assert_eq!((padded.len(), &padded[..10]), (134, hex("0000000000001234 0105").as_slice()));
    assert!(padded[10..].iter().all(|byte| *byte == 0));
}

#[test]
fn every_request_has_its_bytes() {
    for (kind, flags, rest) in [
        (CommandKind::Read, CommandFlags::DONT_FRAGMENT, "0004 0000"),
        (CommandKind::Write, CommandFlags::FUA, "0001 0001"),
        (CommandKind::Disconnect, CommandFlags::NONE, "0000 0002"),
        (CommandKind::Flush, CommandFlags::NONE, "0000 0003"),
        (CommandKind::Trim, CommandFlags::NONE, "0000 0004"),
        (CommandKind::Cache, CommandFlags::NONE, "0000 0005"),
        (CommandKind::WriteZeroes, CommandFlags::NO_HOLE.with(CommandFlags::FAST_ZERO), "0012 0006"),
        (CommandKind::BlockStatus, CommandFlags::ONE_DESCRIPTOR, "0008 0007"),
        (CommandKind::Unknown(0xffff), CommandFlags(0x8000), "8000 ffff"),
    ] {
        let request = RequestHeader { flags, kind, cookie: 7, offset: 0x1000, length: 0x200 };
        let bytes = array(&format!("25609513 {rest} 0000000000000007 0000000000001000 00000200"));
        assert_eq!(request.encode(), bytes, "{kind:?}");
        assert_eq!(RequestHeader::parse(&bytes), Ok(request));
    }
}

#[test]
fn every_reply_has_its_bytes() {
    for (failure, error) in [
        (None, "00000000"),
        (Some(Failure::NotPermitted), "00000001"),
        (Some(Failure::Io), "00000005"),
        (Some(Failure::NoMemory), "0000000c"),
        (Some(Failure::Invalid), "00000016"),
        (Some(Failure::NoSpace), "0000001c"),
        (Some(Failure::Overflow), "0000004b"),
        (Some(Failure::NotSupported), "0000005f"),
        (Some(Failure::ShuttingDown), "0000006c"),
    ] {
        let bytes = array(&format!("67446698 {error} 0000000000000007"));
        let reply = SimpleReply { failure, cookie: 7 };
        assert_eq!(reply.encode(), bytes);
        assert_eq!(SimpleReply::parse(&bytes), Ok(reply));
    }
    let done = "668e33ef 0001";
    assert_eq!(
        data_head(7, 0x1000, 0x200).to_vec(),
        hex(&format!("{done} 0001 0000000000000007 00000208 0000000000001000"))
    );
    assert_eq!(
        status_head(7, 1, 2).to_vec(),
        hex(&format!("{done} 0005 0000000000000007 00000014 00000001"))
    );
    let hole = Descriptor { length: 0x200, flags: Descriptor::HOLE | Descriptor::ZERO };
    assert_eq!(hole.encode().to_vec(), hex("00000200 00000003"));
    let failed = error_chunk(7, Failure::Io);
    assert_eq!(failed.to_vec(), hex(&format!("{done} 8001 0000000000000007 00000006 00000005 0000")));
}

#[test]
fn a_client_understands_every_chunk() {
    let header = ChunkHeader::parse(&array("668e33ef 0001 0001 0000000000000007 00000208")).unwrap();
    assert_eq!(header, ChunkHeader { done: true, kind: 1, cookie: 7, length: 0x208 });
    for (kind, payload, chunk) in [
        (0, "", Chunk::None),
        (1, "0000000000001000 0102", Chunk::Data { offset: 0x1000, data: vec![1, 2] }),
        (2, "0000000000001000 00000200", Chunk::Hole { offset: 0x1000, length: 0x200 }),
        (
            5,
            "00000001 00000200 00000003",
            Chunk::Status { context: 1, descriptors: vec![Descriptor { length: 0x200, flags: 3 }] },
        ),
        (0x8001, "00000005 0002 6e6f", Chunk::Error { failure: Failure::Io, message: name("no") }),
        (
            0x8002,
            "00000016 0000 0000000000000001",
            Chunk::Error { failure: Failure::Invalid, message: name("") },
        ),
    ] {
        assert_eq!(Chunk::parse(kind, &hex(payload)), Ok(chunk));
        for short in 0..hex(payload).len() {
            // A data chunk has as many bytes as it has, and a status chunk as many descriptors.
            if !(kind == 1 && short >= 8 || kind == 5 && short == 4) {
                assert_eq!(
                    Chunk::parse(kind, &hex(payload)[..short]),
                    Err(Malformed::Truncated),
                    "{kind} {short}"
                );
            }
        }
    }
    assert_eq!(Chunk::parse(3, &[]), Err(Malformed::UnknownKind(3)));
}

#[test]
fn a_wrong_magic_number_is_named() {
    let wrong = |expected: u64| Malformed::Magic { expected, found: 0 };
    assert_eq!(OptionHeader::parse(&[0; 16]), Err(wrong(OPTION_MAGIC)));
    assert_eq!(OptionReplyHeader::parse(&[0; 20]), Err(wrong(OPTION_REPLY_MAGIC)));
    assert_eq!(RequestHeader::parse(&[0; 28]), Err(wrong(u64::from(REQUEST_MAGIC))));
    assert_eq!(SimpleReply::parse(&[0; 16]), Err(wrong(u64::from(SIMPLE_REPLY_MAGIC))));
    assert_eq!(ChunkHeader::parse(&[0; 20]), Err(wrong(u64::from(CHUNK_MAGIC))));
}

#[test]
fn options_that_lie_about_their_lengths_are_refused() {
    for (option, data, error) in [
        (option::LIST, "00", Malformed::Trailing),
        (option::STRUCTURED_REPLY, "00", Malformed::Trailing),
        (option::GO, "", Malformed::Truncated),
        (option::GO, "00000000", Malformed::Truncated),
        (option::GO, "00000000 0001", Malformed::Truncated),
        (option::GO, "00000000 0000 00", Malformed::Trailing),
        (option::GO, "00000001", Malformed::Truncated),
        (option::GO, "ffffffff", Malformed::TextTooLong),
        (option::GO, "00000001 ff 0000", Malformed::NotText),
        (option::GO, "00000001 00 0000", Malformed::NotText),
        (option::SET_META_CONTEXT, "00000000 ffffffff", Malformed::Truncated),
        (option::SET_META_CONTEXT, "00000000 00000001 ffffffff", Malformed::TextTooLong),
    ] {
        assert_eq!(ClientOption::parse(option, &hex(data)), Err(error), "{option} {data}");
    }
    let long = vec![b'a'; TEXT_LIMIT_BYTES + 1];
    assert_eq!(ClientOption::parse(option::EXPORT_NAME, &long), Err(Malformed::TextTooLong));
    assert!(ClientOption::parse(option::EXPORT_NAME, &long[1..]).is_ok());
}

fn any_option() -> impl Strategy<Value = ClientOption> {
    let text = || "[a-z:\u{e4}]{0,12}";
    let export = (text(), prop::collection::vec(any::<u16>(), 0..4))
        .prop_map(|(name, kinds)| ExportQuery { name, kinds });
    let contexts = (text(), prop::collection::vec(text(), 0..4))
        .prop_map(|(name, queries)| ContextQuery { name, queries });
    prop_oneof![
        text().prop_map(ClientOption::ExportName),
        Just(ClientOption::List),
        Just(ClientOption::StructuredReply),
        export.clone().prop_map(ClientOption::Info),
        export.prop_map(ClientOption::Go),
        contexts.clone().prop_map(ClientOption::ListMetaContext),
        contexts.prop_map(ClientOption::SetMetaContext),
        (11u32..).prop_map(ClientOption::Unknown),
    ]
}

proptest! {
    #[test]
    fn an_option_reads_back_and_no_shorter_one_reads_the_same(option in any_option()) {
        let bytes = option.encode();
        let data = &bytes[OPTION_HEADER_BYTES..];
        prop_assert_eq!(ClientOption::parse(option.number(), data), Ok(option.clone()));
        for short in 0..data.len() {
            prop_assert_ne!(ClientOption::parse(option.number(), &data[..short]), Ok(option.clone()));
        }
    }

    #[test]
    fn a_request_reads_back(
        flags in any::<u16>(), kind in any::<u16>(), cookie in any::<u64>(), offset in any::<u64>(), length in any::<u32>()
    ) {
        let mut bytes = Vec::from(REQUEST_MAGIC.to_be_bytes());
        bytes.extend(flags.to_be_bytes());
        bytes.extend(kind.to_be_bytes());
        bytes.extend(cookie.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(length.to_be_bytes());
        let request = RequestHeader::parse(bytes.first_chunk().unwrap()).unwrap();
        prop_assert_eq!((request.flags.0, request.cookie, request.offset, request.length), (flags, cookie, offset, length));
        prop_assert_eq!(request.encode().to_vec(), bytes);
    }

    #[test]
    fn no_bytes_make_a_parser_panic(number in 0u32..12, data in prop::collection::vec(any::<u8>(), 0..64)) {
        let _ = ClientOption::parse(number, &data);
        let _ = OptionReply::parse(number, &data);
        let _ = OptionReply::parse(1 << 31 | number, &data);
        let _ = Chunk::parse(number as u16, &data);
        let _ = Chunk::parse(1 << 15 | number as u16, &data);
    }

    #[test]
    fn a_data_head_and_an_error_chunk_are_what_a_client_understands(
        cookie in any::<u64>(), offset in any::<u64>(), data in prop::collection::vec(any::<u8>(), 0..64)
    ) {
        let bytes = [data_head(cookie, offset, data.len() as u32).as_slice(), &data].concat();
        let header = ChunkHeader::parse(bytes.first_chunk().unwrap()).unwrap();
        prop_assert_eq!((header.done, header.cookie), (true, cookie));
        prop_assert_eq!(header.length as usize, bytes.len() - CHUNK_HEADER_BYTES);
        prop_assert_eq!(Chunk::parse(header.kind, &bytes[CHUNK_HEADER_BYTES..]), Ok(Chunk::Data { offset, data }));
        let bytes = error_chunk(cookie, Failure::NoSpace);
        let header = ChunkHeader::parse(bytes.first_chunk().unwrap()).unwrap();
        let failed = Chunk::Error { failure: Failure::NoSpace, message: String::new() };
        prop_assert_eq!(Chunk::parse(header.kind, &bytes[CHUNK_HEADER_BYTES..]), Ok(failed));
    }
}
