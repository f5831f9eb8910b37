//! Bytes from peers, disks and clients, changed at random: whatever comes, no parser panics or takes more memory than its input is
//! worth, and what it makes of the bytes reads back as the same. Everything is from seeds, so that a failure is found again.
//!
//! [`PARSERS`] is the table of all of them; one in the source that is not named there fails a test. A page's checksum is made good
//! again for half of the inputs: what a disk gives back may well be whole and nonsense.

use blockmirror_protocol::disk::{
    PAGE_BYTES, absent, activity_log, dirty_map, marker, pre_images, recovery, superblock,
};
use blockmirror_protocol::given::Given;
use blockmirror_protocol::layers::LayerId;
use blockmirror_protocol::lineage::Ends;
use blockmirror_protocol::nbd::handshake::{
    self, ClientFlags, ClientOption, ContextQuery, ExportQuery, OptionHeader,
};
use blockmirror_protocol::nbd::option_reply::{
    self, ExportFlags, ExportSummary, Info, OptionReply, OptionReplyHeader,
};
use blockmirror_protocol::nbd::transmission::{
    self, Chunk, ChunkHeader, CommandFlags, CommandKind, Failure, RequestHeader, SimpleReply,
};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::terms::{DataState, Fence, Mode, Promise, Role};
use blockmirror_protocol::units::{
    BlockSize, CopyId, Epoch, Extent, GenerationId, HostId, Mark, Position, Sequence, Session, Stream,
    VolumeId,
};
use blockmirror_protocol::wire::message::{self, LENGTH_BYTES, Message};
use blockmirror_protocol::wire::{
    Body, FrameHeader, HEADER_BYTES, Packing, StreamKind, StreamPreamble, packing, preamble,
};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::fmt::Debug;
use std::fs;
use std::path::Path;

/// How many changed inputs each parser gets.
const INPUTS: u64 = 60_000;
/// What a parser may take at once, in bytes, whatever its input claims: twice the longest message.
const MOST_BYTES: usize = 2 * message::LIMIT_BYTES;

/// Counts what a thread takes at once.
struct Counting;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: all is handed on to the system's allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(layout.size()));
        // SAFETY: the caller keeps to the contract of the same function.
        unsafe { System.alloc(layout) }
    }

    // SAFETY: the caller keeps to the contract of the same function of the system's allocator.
    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps to the contract of the same function.
        unsafe { System.dealloc(place, layout) }
    }

    // SAFETY: the caller keeps to the contract of the same function of the system's allocator.
    unsafe fn realloc(&self, place: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        LARGEST.set(LARGEST.get().max(size));
        // SAFETY: the caller keeps to the contract of the same function.
        unsafe { System.realloc(place, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// Something that reads bytes which others made.
struct Parser {
    /// Its source file below `protocol/src`, and its name there.
    place: (&'static str, &'static str),
    /// Valid inputs.
    samples: fn() -> Vec<Vec<u8>>,
    /// Where the CRC-32 of all other bytes of a page is, if the input is pages.
    seal: Option<usize>,
    /// Reads an input; what it is taken for must read back as the same.
    read: fn(&[u8]),
}

/// A value reads back as itself.
fn reads_back<Value: PartialEq + Debug>(value: Value, again: impl Fn(&Value) -> Option<Value>) {
    assert_eq!(again(&value).as_ref(), Some(&value), "it does not read back");
}

/// Every parser of bytes from peers, disks and clients.
const PARSERS: &[Parser] = &[
    Parser { place: ("wire/message.rs", "decode"), samples: messages, seal: None, read: read_message },
    Parser {
        place: ("wire/message.rs", "decode_length"),
        samples: || vec![vec![1, 0, 0, 0]],
        seal: None,
        read: |bytes| {
            if let Some(length) = bytes.first_chunk().and_then(|bytes| message::decode_length(*bytes).ok()) {
                assert!(length <= message::LIMIT_BYTES);
            }
        },
    },
    Parser { place: ("wire/mod.rs", "decode"), samples: frames, seal: None, read: read_frame },
    Parser {
        place: ("wire/preamble.rs", "decode"),
        samples: || {
            let preamble = |kind| StreamPreamble { volume: VOLUME, session: Session(7), kind };
            [StreamKind::Live, StreamKind::Bulk].map(|kind| preamble(kind).encode().to_vec()).to_vec()
        },
        seal: None,
        read: |bytes| {
            let read = |bytes: &[u8]| {
                StreamPreamble::decode(bytes.first_chunk::<{ preamble::PREAMBLE_BYTES }>()?).ok()
            };
            read(bytes).into_iter().for_each(|value| reads_back(value, |value| read(&value.encode())));
        },
    },
    Parser {
        place: ("disk/superblock.rs", "recover"),
        samples: || vec![[superblock().encode(4), superblock().encode(5)].concat()],
        seal: Some(12),
        read: |bytes| {
            let slots = |(serial, value): &(u64, superblock::Superblock)| value.encode(*serial).to_vec();
            if let Ok(found) = superblock::Superblock::recover(bytes) {
                // What an older release said of a generation that its lineage does not name is not written again.
                let mut found = found;
                found.1.ends.keep(&found.1.lineage);
                reads_back(found, |found| superblock::Superblock::recover(&slots(found)).ok());
            }
        },
    },
    Parser {
        place: ("disk/activity_log.rs", "recover"),
        samples: || vec![activity_log::ring_after(5, false).flat_map(|(_, record)| record).collect()],
        seal: Some(12),
        read: |bytes| {
            let _ = activity_log::recover(bytes);
        },
    },
    Parser {
        place: ("disk/activity_log.rs", "decode"),
        samples: || {
            vec![
                activity_log::encode([Extent(1), Extent(9)], 3).to_vec(),
                activity_log::encode_everything(4).to_vec(),
            ]
        },
        seal: Some(12),
        read: |bytes| {
            let Ok(Some(content)) = activity_log::decode(bytes) else { return };
            reads_back(content, |(serial, extents)| {
                let record = match extents {
                    Some(extents) => activity_log::encode(extents.iter().copied(), *serial),
                    None => activity_log::encode_everything(*serial),
                };
                activity_log::decode(&record).ok().flatten()
            });
        },
    },
    Parser {
        place: ("disk/dirty_map.rs", "recover"),
        samples: || vec![[map_header().encode(2), map_header().encode(3)].concat()],
        seal: Some(12),
        read: |bytes| {
            let _ = dirty_map::Header::is_unsure(bytes);
            if let Ok(found) = dirty_map::Header::recover(bytes) {
                reads_back(found, |(serial, header)| {
                    dirty_map::Header::recover(&header.encode(*serial)).ok()
                });
            }
        },
    },
    Parser {
        place: ("disk/dirty_map.rs", "decode_bits"),
        samples: || vec![dirty_map::encode_bits(3, &[0xf0; dirty_map::WORDS_PER_PAGE]).to_vec()],
        seal: Some(4),
        read: |bytes| {
            let Some(page) = bytes.first_chunk::<PAGE_BYTES>() else { return };
            if let Some(bits) = dirty_map::decode_bits(3, page) {
                reads_back(bits, |bits| dirty_map::decode_bits(3, &dirty_map::encode_bits(3, bits)));
            }
        },
    },
    Parser {
        place: ("disk/absent.rs", "recover"),
        samples: || vec![[absent_header().encode(), absent_header().encode()].concat()],
        seal: Some(12),
        read: |bytes| {
            if let Ok(found) = absent::Header::recover(bytes) {
                reads_back(found, |header| absent::Header::recover(&header.encode()).ok());
            }
        },
    },
    Parser {
        place: ("disk/absent.rs", "decode"),
        samples: || vec![absent::encode(3, 7, &[0xf0; dirty_map::WORDS_PER_PAGE]).to_vec()],
        seal: Some(4),
        read: |bytes| {
            let Some(page) = bytes.first_chunk::<PAGE_BYTES>() else { return };
            // Of a page that was never written, there is nothing to read back.
            if let Ok(found) = absent::decode(3, [page, page])
                && found.serial > 0
            {
                reads_back(found, |read| {
                    let page = absent::encode(3, read.serial, &read.bits);
                    absent::decode(3, [&page, &page]).ok()
                });
            }
        },
    },
    Parser {
        place: ("disk/marker.rs", "recover"),
        samples: || vec![[marker::encode(mark(), 2), marker::encode(mark(), 1)].concat()],
        seal: Some(12),
        read: |bytes| {
            if let Ok(found) = marker::recover(bytes) {
                reads_back(found, |(serial, mark)| marker::recover(&marker::encode(*mark, *serial)).ok());
            }
        },
    },
    Parser {
        place: ("disk/pre_images.rs", "decode"),
        samples: || vec![layer_header().encode().to_vec(), batch().encode().to_vec()],
        seal: Some(12),
        read: |bytes| {
            if let Ok(header) = pre_images::Header::decode(bytes) {
                reads_back(header, |header| pre_images::Header::decode(&header.encode()).ok());
            }
            let pre_images::Batch { layer, serial, at, .. } = batch();
            let _ = pre_images::is_followed(bytes, layer, serial, at);
            if let Some(batch) = pre_images::Batch::decode(bytes, layer, serial, at) {
                assert!(batch.bytes() <= pre_images::BATCH_LIMIT_BYTES && !batch.is_whole(&[0]));
                reads_back(batch, |batch| pre_images::Batch::decode(&batch.encode(), layer, serial, at));
            }
        },
    },
    Parser {
        place: ("disk/recovery.rs", "decode"),
        samples: || {
            let position = mark().position;
            let subject = recovery::Subject { volume: VOLUME, copy: COPY, size_bytes: 9 << 22, position };
            vec![recovery::RecoveryState::new(subject, 6, recovery::Key("pem".into())).encode()]
        },
        seal: Some(12),
        read: |bytes| {
            if let Ok(state) = recovery::RecoveryState::decode(bytes) {
                assert!(state.done_bytes() <= state.subject.size_bytes);
                reads_back(state, |state| recovery::RecoveryState::decode(&state.encode()).ok());
            }
        },
    },
    Parser {
        place: ("nbd/handshake.rs", "parse"),
        samples: client_options,
        seal: None,
        read: |bytes| {
            let flags = bytes.first_chunk().and_then(|bytes| ClientFlags::parse(*bytes).ok());
            flags
                .into_iter()
                .for_each(|flags| reads_back(flags, |flags| ClientFlags::parse(flags.encode()).ok()));
            let read = |bytes: &[u8]| {
                let (head, data) = bytes.split_first_chunk::<{ handshake::OPTION_HEADER_BYTES }>()?;
                ClientOption::parse(OptionHeader::parse(head).ok()?.option, data).ok()
            };
            read(bytes).into_iter().for_each(|option| reads_back(option, |option| read(&option.encode())));
        },
    },
    Parser {
        place: ("nbd/option_reply.rs", "parse"),
        samples: option_replies,
        seal: None,
        read: |bytes| {
            let read = |bytes: &[u8]| {
                let (head, data) =
                    bytes.split_first_chunk::<{ option_reply::OPTION_REPLY_HEADER_BYTES }>()?;
                OptionReply::parse(OptionReplyHeader::parse(head).ok()?.kind, data).ok()
            };
            let encode = |reply: &OptionReply| {
                let mut out = Vec::new();
                reply.encode(7, &mut out);
                out
            };
            read(bytes).into_iter().for_each(|reply| reads_back(reply, |reply| read(&encode(reply))));
        },
    },
    Parser {
        place: ("nbd/transmission.rs", "parse"),
        samples: transmissions,
        seal: None,
        read: |bytes| {
            let request = |bytes: &[u8]| {
                RequestHeader::parse(bytes.first_chunk::<{ transmission::REQUEST_BYTES }>()?).ok()
            };
            request(bytes).into_iter().for_each(|value| reads_back(value, |value| request(&value.encode())));
            let reply = |bytes: &[u8]| {
                SimpleReply::parse(bytes.first_chunk::<{ transmission::SIMPLE_REPLY_BYTES }>()?).ok()
            };
            reply(bytes).into_iter().for_each(|value| reads_back(value, |value| reply(&value.encode())));
            if let Some((head, payload)) = bytes.split_first_chunk::<{ transmission::CHUNK_HEADER_BYTES }>()
                && let Ok(header) = ChunkHeader::parse(head)
            {
                let _ = Chunk::parse(header.kind, payload);
            }
        },
    },
];

const VOLUME: VolumeId = VolumeId([1; 16]);
const COPY: CopyId = CopyId([2; 16]);

fn mark() -> Mark {
    let position = Position { generation: GenerationId([3; 16]), epoch: Epoch(4), sequence: Sequence(5) };
    Mark { position, session: Session(6), copies: 7 }
}

fn fence() -> Fence {
    Fence { counter: 3, holder: HostId([4; 32]) }
}

fn given() -> Given {
    Given { promise: Promise::Replicas(1), counted: vec![HostId([5; 32])] }
}

fn lineage() -> Vec<GenerationId> {
    vec![GenerationId([3; 16]), GenerationId([8; 16])]
}

fn superblock() -> superblock::Superblock {
    superblock::Superblock {
        role: Role::Replica,
        data: DataState::Consistent,
        fence: fence(),
        source: fence(),
        lineage: lineage(),
        position: mark().position,
        mode: Mode::Sync,
        given: given(),
        ends: Ends::only(GenerationId([3; 16]), Epoch(9)),
        heirs: vec![HostId([6; 32])],
        ..superblock::Superblock::empty(VOLUME, COPY, 1 << 30, BlockSize::default())
    }
}

fn absent_header() -> absent::Header {
    let block_size = BlockSize::default();
    absent::Header { volume: VolumeId([1; 16]), source: HostId([2; 32]), blocks: 99, block_size }
}

fn map_header() -> dirty_map::Header {
    dirty_map::Header {
        volume: VOLUME,
        peer: HostId([2; 32]),
        base: dirty_map::Base { copy: COPY, generation: GenerationId([3; 16]), adopted: 4 },
        known: mark(),
        copied: Some(Session(5)),
        is_unanswered: true,
        given: Some(given()),
        blocks: 1 << 18,
        block_size: BlockSize::default(),
        full_from: 2,
    }
}

fn layer_header() -> pre_images::Header {
    pre_images::Header {
        layer: LayerId::new(1).expect("a layer"),
        volume: VOLUME,
        copy: COPY,
        size_bytes: 1 << 30,
        block_size: BlockSize::default(),
        point: mark().position,
        began_unix_seconds: 6,
        lineage: lineage(),
    }
}

fn batch() -> pre_images::Batch {
    let data = pre_images::Entry::of_data(ByteRange::new(512, 512), &[7; 512]);
    let entries = vec![data, pre_images::Entry::of_zeroes(ByteRange::new(8192, 4096))];
    pre_images::Batch {
        layer: LayerId::new(1).expect("a layer"),
        serial: 2,
        at: pre_images::FIRST_BATCH,
        entries,
    }
}

fn standing() -> message::Standing {
    message::Standing {
        role: Role::Replica,
        data: DataState::Consistent,
        can_roll_back: false,
        fence: fence(),
        lineage: lineage(),
        marker: mark().position,
        serves: false,
        dirty_bytes: 7,
        began: vec![8],
        silent_milliseconds: 12,
        ends: Ends::only(GenerationId([3; 16]), Epoch(10)),
        replaced: true,
        given: Box::new(given()),
    }
}

/// A message of each kind.
fn all_messages() -> Vec<Message> {
    let (session, volume, host, block_size) = (Session(7), VOLUME, HostId([9; 32]), BlockSize::default());
    let position = mark().position;
    let (name, listen) = ("b".to_owned(), vec!["h:1".to_owned()]);
    let member =
        message::Member { name: name.clone(), host, addresses: listen.clone(), mode: Mode::Sync, version: 0 };
    let members = vec![member];
    let removal = message::Removal { host, name: name.clone(), by: "a".into(), at_seconds: 5, version: 1 };
    let range = ByteRange::new(512, 4096);
    vec![
        message::Hello {
            versions: (1, 2),
            features: 0,
            volume,
            size_bytes: 1 << 30,
            block_size,
            sector_bytes: 512,
            copy: COPY,
            session,
            stream: Stream(1),
            fence: fence(),
            lineage: lineage(),
            mode: Mode::Sync,
            members: members.clone(),
            ends: Ends::only(GenerationId([3; 16]), Epoch(9)),
        }
        .into(),
        message::Welcome {
            version: 1,
            features: 0,
            session,
            copy: COPY,
            data: DataState::Inconsistent,
            can_roll_back: true,
            source: fence(),
            mark: mark(),
            fence: fence(),
            lineage: lineage(),
            sector_bytes: 512,
            window_bytes: 1 << 20,
        }
        .into(),
        message::Union { ranges: vec![range, range], last: true }.into(),
        message::Refused { refusal: message::Refusal::Busy, text: "no".into() }.into(),
        message::ResyncBegin { session, dirty_bytes: 5 }.into(),
        message::ResyncReady { session }.into(),
        message::Commit {
            session,
            position,
            lineage: lineage(),
            active: vec![Extent(1)],
            mode: Mode::Sync,
            given: given(),
        }
        .into(),
        message::Committed { session, position }.into(),
        message::Acknowledgement {
            session,
            received: Sequence(1),
            durable: Epoch(2),
            copies: 3,
            mark: mark(),
        }
        .into(),
        message::Digest { session, number: 1, digest: [2; 32] }.into(),
        message::Members { members: members.clone(), removed: vec![removal] }.into(),
        message::Join {
            volume,
            secret: [1; 32],
            name: name.clone(),
            listen: listen.clone(),
            ask_only: false,
        }
        .into(),
        message::Joined { volume, name: name.clone(), size_bytes: 1 << 30, block_size, members }.into(),
        message::Recover { name: name.clone(), secret: Some([1; 32]), accept_inconsistent: true }.into(),
        message::Recovering {
            volume,
            copy: COPY,
            size_bytes: 1 << 30,
            block_size,
            data: DataState::Consistent,
            position,
            lineage: lineage(),
        }
        .into(),
        message::ReadContent { volume, range }.into(),
        message::AskDigest { volume }.into(),
        message::WholeDigest { done_bytes: 5, digest: Some([1; 32]) }.into(),
        message::Superseded { fence: fence() }.into(),
        message::Agreed { session, epoch: Epoch(1) }.into(),
        message::Release { session, generation: GenerationId([3; 16]) }.into(),
        message::ReleaseRecorded { session }.into(),
        message::AskStanding { volume }.into(),
        standing().into(),
        message::TakeOver { volume }.into(),
        message::TookOver { fence: fence() }.into(),
        message::CopyDigest { session, number: 1, digest: [2; 32] }.into(),
        message::Parting { session, paused: true }.into(),
        message::Renew { session, number: 1 }.into(),
        message::Grant { session, number: 1, milliseconds: 1000 }.into(),
        message::Parted { session }.into(),
        message::Alone { session }.into(),
        message::AskMark { session }.into(),
        message::Fetch { session, number: 1, range: ByteRange::new(512, 1024), is_awaited: true }.into(),
        message::FetchFailed { session, number: 1 }.into(),
        message::Fetching { volume, session, is_awaited: true }.into(),
        message::Lend { volume, fence: Fence { counter: 2, holder: host } }.into(),
        message::AskOthers { name: name.clone(), secret: None }.into(),
        message::Others {
            own: Box::new(standing()),
            others: vec![message::Other {
                name: name.clone(),
                host,
                addresses: listen.clone(),
                standing: Some(standing()),
            }],
        }
        .into(),
        message::AskMembers { volume }.into(),
        message::Whereabouts { name, listen, instance: [1; 16] }.into(),
    ]
}

fn messages() -> Vec<Vec<u8>> {
    all_messages()
        .iter()
        .map(|message| message.encode().expect("it is short")[LENGTH_BYTES..].to_vec())
        .collect()
}

fn read_message(bytes: &[u8]) {
    if let Ok(message) = Message::decode(bytes) {
        reads_back(message, |message| Message::decode(&message.encode().ok()?[LENGTH_BYTES..]).ok());
    }
}

fn frames() -> Vec<Vec<u8>> {
    let range = ByteRange::new(8192, 1024);
    let (epoch, sequence, number) = (Epoch(3), Sequence(99), 5);
    let bodies = [
        Body::Write { range, epoch, sequence },
        Body::Zero { range, epoch, sequence, may_unmap: true },
        Body::EpochEnd { epoch, sequence, cut: true },
        Body::Generation { generation: GenerationId([1; 16]) },
        Body::Copy { range, number },
        Body::CopyZero { range, number },
        Body::CopyDigest { range, number },
        Body::Digest { range, number },
        Body::Content { range },
        Body::ContentZero { range },
    ];
    let encode = |body: Body| {
        let payload = vec![0; body.payload_bytes() as usize];
        FrameHeader { session: Session(7), stream: Stream(2), body }.encode(&payload)
    };
    let mut frames: Vec<Vec<u8>> = bodies.map(|body| encode(body).to_vec()).to_vec();
    let mut packed = encode(bodies[0]);
    packing::set(&mut packed, Packing::Lz4, 11);
    frames.push(packed.to_vec());
    frames
}

fn read_frame(bytes: &[u8]) {
    let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else { return };
    let Ok(frame) = FrameHeader::decode(header) else { return };
    assert!(frame.payload_bytes() <= 1 << 20, "no more is read than a payload may have");
    assert!(frame.packed().is_none_or(|(_, length)| length < frame.payload_bytes()));
    let payload = vec![0; frame.payload_bytes()];
    if let Ok(header) = frame.check(&payload) {
        let again =
            |header: &FrameHeader| FrameHeader::decode(&header.encode(&payload)).ok()?.check(&payload).ok();
        reads_back(header, again);
    }
}

fn client_options() -> Vec<Vec<u8>> {
    let export = ExportQuery { name: "data".into(), kinds: vec![0, 3] };
    let contexts =
        ContextQuery { name: "data".into(), queries: vec!["base:allocation".into(), "base:".into()] };
    let options = [
        ClientOption::ExportName("data".into()),
        ClientOption::Abort,
        ClientOption::List,
        ClientOption::StartTls,
        ClientOption::Info(export.clone()),
        ClientOption::Go(export),
        ClientOption::StructuredReply,
        ClientOption::ListMetaContext(contexts.clone()),
        ClientOption::SetMetaContext(contexts),
        ClientOption::Unknown(99),
    ];
    let flags = ClientFlags { fixed_newstyle: true, no_zeroes: true }.encode().to_vec();
    options.iter().map(ClientOption::encode).chain([flags]).collect()
}

fn option_replies() -> Vec<Vec<u8>> {
    let export = ExportSummary { size_bytes: 1 << 30, flags: ExportFlags::HAS_FLAGS };
    let replies = [
        OptionReply::Acknowledged,
        OptionReply::Server("data".into()),
        OptionReply::Info(Info::Export(export)),
        OptionReply::Info(Info::Name("data".into())),
        OptionReply::Info(Info::Description("a volume".into())),
        OptionReply::Info(Info::BlockSize { minimum: 512, preferred: 4096, maximum: 1 << 20 }),
        OptionReply::MetaContext { id: 1, name: "base:allocation".into() },
        OptionReply::Error { reason: option_reply::Refusal::Policy, message: "no".into() },
    ];
    let encode = |reply: &OptionReply| {
        let mut out = Vec::new();
        reply.encode(7, &mut out);
        out
    };
    replies.iter().map(encode).collect()
}

fn transmissions() -> Vec<Vec<u8>> {
    let request = RequestHeader {
        flags: CommandFlags::FUA,
        kind: CommandKind::Write,
        cookie: 1,
        offset: 512,
        length: 4096,
    };
    let status = transmission::status_head(3, 1, 2).to_vec();
    vec![
        request.encode().to_vec(),
        SimpleReply { failure: Some(Failure::Io), cookie: 2 }.encode().to_vec(),
        [&transmission::data_head(3, 512, 16)[..], &[7; 16]].concat(),
        [&status[..], &[1; 16]].concat(),
        transmission::error_chunk(4, Failure::NoSpace).to_vec(),
    ]
}

/// Numbers from a seed.
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// Changes an input in a few places.
fn change(bytes: &mut Vec<u8>, numbers: &mut Numbers) {
    for _ in 0..=numbers.below(4) {
        let at = numbers.below(bytes.len());
        match numbers.below(9) {
            0 if !bytes.is_empty() => bytes[at] ^= 1 << numbers.below(8),
            1 if !bytes.is_empty() => bytes[at] = numbers.next() as u8,
            2 => bytes.iter_mut().skip(at).take(8).for_each(|byte| *byte = 0xff),
            3 => bytes.iter_mut().skip(at).take(8).for_each(|byte| *byte = 0),
            4 => bytes.truncate(at),
            5 => bytes.insert(at, numbers.next() as u8),
            6 => {
                let part: Vec<u8> = bytes.iter().copied().skip(at).take(1 + numbers.below(64)).collect();
                bytes.splice(at..at, part);
            }
            7 => {
                // A count of a few, where many places hold one.
                let few = numbers.next() as u8 % 4;
                bytes.iter_mut().skip(at).take(1).for_each(|byte| *byte = few);
            }
            _ => {
                let other = numbers.below(bytes.len());
                if !bytes.is_empty() {
                    bytes.swap(at, other);
                }
            }
        }
    }
}

/// Makes the checksums of pages good; of a file that is not whole pages, that of all of it.
fn seal(bytes: &mut [u8], at: usize) {
    let unit = if bytes.len().is_multiple_of(PAGE_BYTES) { PAGE_BYTES } else { bytes.len().max(1) };
    for page in bytes.chunks_exact_mut(unit).filter(|page| page.len() > at + 4) {
        let mut crc = crc32fast::Hasher::new();
        crc.update(&page[..at]);
        crc.update(&page[at + 4..]);
        page[at..at + 4].copy_from_slice(&crc.finalize().to_le_bytes());
    }
}

/// Reads it, and says so if that takes too much memory.
fn read(parser: &Parser, bytes: &[u8]) {
    LARGEST.set(0);
    (parser.read)(bytes);
    let largest = LARGEST.get();
    assert!(largest <= MOST_BYTES, "it takes {largest} bytes at once for {} bytes", bytes.len());
}

#[test]
fn no_parser_panics_at_whatever_it_is_given() {
    for (parser, seed) in PARSERS.iter().zip(1..) {
        let (file, name) = parser.place;
        let samples = (parser.samples)();
        samples.iter().for_each(|sample| read(parser, sample));
        for input in 0..INPUTS {
            let mut numbers = Numbers(seed << 32 | (input + 1));
            for _ in 0..4 {
                numbers.next();
            }
            let mut bytes = samples[numbers.below(samples.len())].clone();
            change(&mut bytes, &mut numbers);
            if let Some(at) = parser.seal.filter(|_| numbers.below(2) == 0) {
                seal(&mut bytes, at);
            }
            let told = std::panic::catch_unwind(|| read(parser, &bytes));
            assert!(told.is_ok(), "{file}, {name}: input {input} of seed {seed}: {bytes:02x?}");
        }
    }
}

/// Each valid input is taken for something: else the table would test nothing.
#[test]
fn a_message_of_each_kind_is_changed() {
    let kinds: Vec<u16> = messages().iter().map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]])).collect();
    assert_eq!(kinds, Message::TAGS, "a message of each kind, in the order of their tags");
    for (bytes, message) in messages().iter().zip(all_messages()) {
        assert_eq!(Message::decode(bytes).expect("it is one"), message);
    }
}

/// Whoever writes another parser is told to put it into the table.
#[test]
fn no_parser_is_left_out() {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../protocol/src");
    let mut found = Vec::new();
    for folder in ["wire", "disk", "nbd"] {
        for entry in fs::read_dir(source.join(folder)).expect("it is there") {
            let path = entry.expect("it can be read").path();
            if path.is_dir() || path.ends_with("tests.rs") {
                continue;
            }
            let file = format!("{folder}/{}", path.file_name().expect("it has a name").display());
            let text = fs::read_to_string(&path).expect("it is text");
            let text = text.split("mod tests {").next().expect("there is a beginning");
            for line in text.lines().filter_map(|line| line.trim_start().strip_prefix("pub fn ")) {
                let name = line.split(['(', '<']).next().expect("it has a name").to_owned();
                if ["decode", "recover", "parse", "read"]
                    .iter()
                    .any(|verb| name.split('_').any(|word| word == *verb))
                {
                    found.push((file.clone(), name));
                }
            }
        }
    }
    found.sort();
    found.dedup();
    let mut known: Vec<_> =
        PARSERS.iter().map(|parser| (parser.place.0.to_owned(), parser.place.1.to_owned())).collect();
    known.sort();
    assert_eq!(found, known, "the table has every parser");
}
