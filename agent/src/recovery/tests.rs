//! The serving side against an image file, over a connection in one process.

use super::*;
use crate::storage::faults::{Calls, Faults};
use crate::storage::file::Access;
use crate::transport::{Connection, Endpoint, FrameReceiver, HostKey, Incoming, ReceiveError};
use blockmirror_protocol::disk::recovery::CHUNK_BYTES;
use blockmirror_protocol::terms::DataState;
use blockmirror_protocol::units::{BlockSize, CopyId, Position};
use blockmirror_protocol::wire::message::{AskDigest, ReadContent};
use std::os::unix::fs::FileExt;

const SIZE: u64 = (200 << 20) + 512;
const VOLUME: VolumeId = VolumeId([1; 16]);

struct Fixture {
    source: Source,
    faults: Rc<Faults>,
    content: Vec<u8>,
    asker: Connection,
    server: Connection,
    _endpoints: [Endpoint; 2],
    _folder: tempfile::TempDir,
}

fn endpoint() -> Endpoint {
    Endpoint::bind("127.0.0.1:0".parse().unwrap(), &HostKey::ephemeral().unwrap()).unwrap()
}

/// An image with holes, written zeroes, and data at both ends.
fn content() -> Vec<(u64, Vec<u8>)> {
    let noise = |length: usize, seed: u8| -> Vec<u8> {
        (0..length).map(|at| ((at * 31) >> 3) as u8 ^ (at >> 11) as u8 ^ seed).collect()
    };
    vec![
        (0, noise(3 << 20, 1)),
        (5 << 20, vec![0; 4 << 20]),
        ((9 << 20) + 512, noise(700_000 / 512 * 512, 2)),
        (SIZE - 512, noise(512, 3)),
    ]
}

impl Fixture {
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        File::create_image(&path, SIZE).unwrap();
        let image = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        let mut content = vec![0; SIZE as usize];
        for (offset, bytes) in self::content() {
            image.write_all_at(&bytes, offset).unwrap();
            content[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        }
        let backing = Rc::new(File::open_backing(&path, Access::ReadOnly).unwrap());
        let faults = Faults::new(storage::open().unwrap());
        let info = Recovering {
            volume: VOLUME,
            copy: CopyId([2; 16]),
            size_bytes: SIZE,
            block_size: BlockSize::default(),
            data: DataState::Consistent,
            position: Position::default(),
            lineage: Vec::new(),
        };
        let source = Source::new(faults.clone(), backing, BufferPool::new(16 << 20), info);
        let endpoints = [endpoint(), endpoint()];
        let addresses = [endpoints[1].local_address().to_string()];
        let asker = endpoints[0].connect(&addresses, endpoints[1].id()).await.unwrap();
        let server = endpoints[1].accept().await.unwrap();
        Self { source, faults, content, asker, server, _endpoints: endpoints, _folder: folder }
    }

    /// Asks `message`, serves the answer, and reads it with `read`.
    async fn ask<T>(
        &self,
        message: impl Into<Message>,
        read: impl AsyncFnOnce(ControlReceiver) -> T,
    ) -> (T, Result<(), ServeError>) {
        let message = message.into();
        let asking = async {
            let (mut sender, receiver) = self.asker.open_control().await.unwrap();
            sender.send(&message).await.unwrap();
            read(receiver).await
        };
        let serving = async {
            let Incoming::Control(sender, mut receiver) = self.server.accept().await.unwrap() else {
                panic!("a control stream was expected");
            };
            let first = receiver.receive().await.unwrap();
            serve(&self.source, first, sender, receiver).await
        };
        tokio::join!(asking, serving)
    }
}

fn on_a_volumes_thread(test: impl AsyncFnOnce(Fixture)) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async { test(Fixture::new().await).await });
}

fn read(offset: u64, length: u64) -> ReadContent {
    ReadContent { volume: VOLUME, range: ByteRange::new(offset, length) }
}

/// The frames of an answer, and how it ended.
async fn frames(receiver: ControlReceiver) -> (Vec<(Body, Bytes)>, ReceiveError) {
    let (mut receiver, pool): (FrameReceiver, _) = (receiver.into_frames(), BufferPool::new(0));
    let mut frames = Vec::new();
    loop {
        match receiver.receive(&pool).await {
            Ok((header, payload)) => frames.push((header.body, payload)),
            Err(end) => return (frames, end),
        }
    }
}

/// A digest, and how far it was in each report.
async fn digest(mut receiver: ControlReceiver) -> ([u8; 32], Vec<u64>) {
    let mut reports = Vec::new();
    loop {
        let Ok(Message::WholeDigest(told)) = receiver.receive().await else { panic!("a digest") };
        assert!(told.done_bytes <= SIZE);
        reports.push(told.done_bytes);
        if let Some(digest) = told.digest {
            return (digest, reports);
        }
    }
}

#[test]
fn a_read_is_answered_in_order_with_data_and_zeroes() {
    on_a_volumes_thread(async |fixture| {
        for range in
            [ByteRange::new(0, SIZE), ByteRange::new((9 << 20) - 1024, 4096), ByteRange::new(SIZE - 512, 512)]
        {
            let ((frames, end), served) = fixture.ask(read(range.offset, range.length), frames).await;
            served.unwrap();
            assert!(matches!(end, ReceiveError::Ended(_)), "{end:?}");
            let (mut at, mut sent) = (range.offset, 0);
            for (body, payload) in frames {
                let expected = &fixture.content[body.range().offset as usize..body.range().end() as usize];
                assert_eq!(body.range().offset, at);
                match body {
                    Body::Content { .. } => assert!(payload == expected, "{body:?}"),
                    Body::ContentZero { .. } => assert!(is_zero(expected), "{body:?}"),
                    other => panic!("{other:?}"),
                }
                (at, sent) = (body.range().end(), sent + payload.len());
            }
            assert_eq!(at, range.end());
            assert!(sent < 4 << 20, "zeroes are not sent as payload: {sent}");
        }
    });
}

#[test]
fn the_digest_is_that_of_all_bytes_and_progress_is_told() {
    on_a_volumes_thread(async |fixture| {
        let ((digest, reports), served) = fixture.ask(AskDigest { volume: VOLUME }, digest).await;
        served.unwrap();
        assert_eq!(digest, *blake3::hash(&fixture.content).as_bytes());
        assert_eq!((reports[0], reports[reports.len() - 1]), (0, SIZE));
        assert!(reports.is_sorted());
    });
}

/// The chunks that the tool asks for.
fn chunks() -> impl Iterator<Item = ByteRange> {
    (0..SIZE)
        .step_by(CHUNK_BYTES as usize)
        .map(|start| ByteRange::between(start, SIZE.min(start + CHUNK_BYTES)))
}

#[test]
fn what_was_served_is_not_read_again_for_the_digest() {
    on_a_volumes_thread(async |fixture| {
        let last = chunks().count() - 1;
        for (index, chunk) in chunks().enumerate() {
            if index != last {
                fixture.ask(read(chunk.offset, chunk.length), frames).await.1.unwrap();
            }
        }
        let before = fixture.faults.submitted();
        let ((digest, reports), served) = fixture.ask(AskDigest { volume: VOLUME }, digest).await;
        served.unwrap();
        assert_eq!(digest, *blake3::hash(&fixture.content).as_bytes());
        assert_eq!(reports, [SIZE - chunks().last().unwrap().length, SIZE], "what was served counts at once");
        let reads = fixture.faults.submitted() - before;
        assert_eq!(reads, 1, "the last sector lies in the chunk that was not served");

        let (again, served) = fixture.ask(AskDigest { volume: VOLUME }, self::digest).await;
        served.unwrap();
        assert_eq!((again.0, fixture.faults.submitted() - before), (digest, 1), "it is known from then on");
    });
}

#[test]
fn parts_of_chunks_that_were_served_are_read_for_the_digest() {
    on_a_volumes_thread(async |fixture| {
        for part in [read(0, CHUNK_BYTES - 512), read(512, CHUNK_BYTES), read(512, CHUNK_BYTES - 512)] {
            fixture.ask(part, frames).await.1.unwrap();
        }
        let ((digest, reports), served) = fixture.ask(AskDigest { volume: VOLUME }, digest).await;
        served.unwrap();
        assert_eq!(digest, *blake3::hash(&fixture.content).as_bytes());
        assert_eq!(reports[0], 0, "none of the chunks has a value");
    });
}

#[test]
fn a_read_that_fails_leaves_no_value() {
    on_a_volumes_thread(async |fixture| {
        fixture.faults.fail(Calls::Reads, 3, libc::EIO);
        let (_, served) = fixture.ask(read(0, CHUNK_BYTES), frames).await;
        assert!(matches!(served, Err(ServeError::Storage(_))), "{served:?}");
        let ((digest, reports), served) = fixture.ask(AskDigest { volume: VOLUME }, digest).await;
        served.unwrap();
        assert_eq!((digest, reports[0]), (*blake3::hash(&fixture.content).as_bytes(), 0));
    });
}

#[test]
fn a_chunk_that_reads_differently_the_second_time_is_read_once_more() {
    // It can't where disk and memory are sound. Neither answer is believed; the disk is asked again.
    on_a_volumes_thread(async |fixture| {
        fixture.ask(read(0, CHUNK_BYTES), frames).await.1.unwrap();
        let image = std::fs::OpenOptions::new().write(true).open(fixture.source.backing.path()).unwrap();
        image.write_all_at(&[0; 512], 512).unwrap();
        fixture.ask(read(0, CHUNK_BYTES), frames).await.1.unwrap();
        image.write_all_at(&fixture.content[512..1024], 512).unwrap();
        let ((digest, reports), served) = fixture.ask(AskDigest { volume: VOLUME }, digest).await;
        served.unwrap();
        assert_eq!((digest, reports[0]), (*blake3::hash(&fixture.content).as_bytes(), 0));
    });
}

#[test]
fn a_read_of_what_is_not_there_is_refused() {
    on_a_volumes_thread(async |fixture| {
        let other = ReadContent { volume: VolumeId([9; 16]), range: ByteRange::new(0, 512) };
        for read in
            [other, read(0, 0), read(0, 100), read(SIZE, 512), read(512, SIZE), read(u64::MAX - 1023, 512)]
        {
            let (answer, served) = fixture
                .ask(read.clone(), async |mut receiver: ControlReceiver| receiver.receive().await)
                .await;
            assert!(matches!(answer, Ok(Message::Refused(_))), "{read:?}: {answer:?}");
            assert!(matches!(served, Err(ServeError::PeerMisbehaved(_))), "{read:?}");
        }
    });
}

#[test]
fn a_backing_that_cannot_be_read_ends_the_stream_and_says_why() {
    on_a_volumes_thread(async |fixture| {
        fixture.faults.fail(Calls::Reads, 2, libc::EIO);
        let ((_, end), served) = fixture.ask(read(0, SIZE), frames).await;
        assert!(matches!(end, ReceiveError::Abandoned(_)), "{end:?}");
        let refusal = served.unwrap_err().refusal().unwrap();
        assert_eq!(refusal.refusal, Refusal::Backing);
        assert!(refusal.text.contains("at byte 1048576"), "{refusal:?}");

        fixture.faults.fail(Calls::Reads, 1, libc::EIO);
        let ask = AskDigest { volume: VOLUME };
        let (answer, served) = fixture
            .ask(ask, async |mut receiver: ControlReceiver| {
                let begun = receiver.receive().await;
                assert!(matches!(
                    begun,
                    Ok(Message::WholeDigest(WholeDigest { done_bytes: 0, digest: None }))
                ));
                receiver.receive().await
            })
            .await;
        assert!(
            matches!(answer, Ok(Message::Refused(Refused { refusal: Refusal::Backing, .. }))),
            "{answer:?}"
        );
        assert!(matches!(served, Err(ServeError::Storage(_))));
    });
}

#[test]
fn zeroes_are_found_in_their_unit() {
    let unit = ZERO_UNIT_BYTES;
    let mut bytes = vec![0; 4 * unit + 512];
    bytes[unit] = 1;
    bytes[3 * unit - 1] = 1;
    assert_eq!(
        zero_runs(&bytes),
        [(true, 0..unit), (false, unit..3 * unit), (true, 3 * unit..4 * unit + 512)]
    );
    assert_eq!(zero_runs(&[]), []);
    bytes[4 * unit + 511] = 1;
    assert_eq!(zero_runs(&bytes[4 * unit..]), [(false, 0..512)]);
}

#[test]
fn a_recovery_is_idle_only_while_nothing_is_being_answered() {
    let began = Instant::now();
    let activity = Activity { streams: Cell::new(0), last: Cell::new(began) };
    let (one, other) = (activity.begin(), activity.begin());
    assert_eq!(activity.idle_time(), None);
    drop(one);
    assert_eq!(activity.idle_time(), None);
    drop(other);
    assert!(activity.idle_time().is_some() && activity.last.get() > began, "it counts from the last answer");
}
