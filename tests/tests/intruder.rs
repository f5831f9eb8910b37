//! A host of the volume that has gone bad, or whose key was stolen: it can't pass for the primary.

use blockmirror_agent::transport::{Endpoint, HostKey};
use blockmirror_protocol::disk::superblock::{self, Superblock};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::{Epoch, Sequence, Session, Stream};
use blockmirror_protocol::wire::message::{Hello, Message, Refusal};
use blockmirror_protocol::wire::{Body, FrameHeader, StreamKind, StreamPreamble, VERSIONS};
use blockmirror_tests::harness::random::Random;
use blockmirror_tests::machines::content::{BLOCK_BYTES, first_difference, noise};
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::patience::until;
use std::fs;

const MIB: u64 = 1 << 20;

/// How many sessions the primary may have begun since the one with the replica.
const SESSIONS: u64 = 8;

fn superblock_of(host: &Host) -> Superblock {
    let bytes = fs::read(host.state(superblock::FILE_NAME)).expect("the primary's superblock");
    Superblock::recover(&bytes).expect("it is whole").1
}

/// Writes in the name of the primary, in every session that the replica may have with it.
async fn write_as(primary: &Superblock, connection: &blockmirror_agent::transport::Connection) {
    let payload = vec![0xbd; BLOCK_BYTES as usize];
    for number in primary.session.0.saturating_sub(SESSIONS)..=primary.session.0 {
        let session = Session(number);
        let preamble = StreamPreamble { volume: primary.volume, session, kind: StreamKind::Live };
        let (range, epoch) = (ByteRange::new(0, BLOCK_BYTES), Epoch(1 << 62));
        let body = Body::Write { range, epoch, sequence: Sequence(1 << 40) };
        let header = FrameHeader { session, stream: Stream(1), body };
        let mut sender = connection.open_frames(&preamble).await.expect("a stream");
        sender.queue(&header.encode(&payload), payload.clone().into());
        // The replica may give the stream up before it has ended.
        let _ = sender.finish().await;
    }
}

/// What the replica answers to a greeting in the name of the primary.
async fn greet_as(primary: &Superblock, connection: &blockmirror_agent::transport::Connection) -> Message {
    let (mut sender, mut receiver) = connection.open_control().await.expect("a stream");
    let hello = Hello {
        versions: VERSIONS,
        features: 0,
        volume: primary.volume,
        size_bytes: primary.size_bytes,
        block_size: primary.block_size,
        sector_bytes: 512,
        copy: primary.copy,
        session: Session(primary.session.0 + 1000),
        stream: Stream(1),
        fence: primary.fence,
        lineage: primary.lineage.clone(),
        mode: primary.mode,
        members: Vec::new(),
    };
    sender.send(&hello.into()).await.expect("a greeting");
    receiver.receive().await.expect("an answer")
}

#[test]
fn a_replica_takes_nothing_from_another_host_in_the_name_of_the_primary() {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b", "c"]);
    let mut client = mirror.client();
    client.write(0, &noise(&mut Random::new(1), MIB)).expect("a write");
    client.flush().expect("a flush");
    mirror.assert_identical();
    mirror.replicas[1].stop();

    let key = HostKey::load(&mirror.replicas[1].path("state/host.key")).expect("the key of c");
    let (primary, b) = (superblock_of(&mirror.primary), &mirror.replicas[0]);
    let id = HostKey::load(&b.path("state/host.key")).expect("the key of b").id();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    let answer = runtime.block_on(async {
        let endpoint = Endpoint::bind("127.0.0.1:0".parse().expect("an address"), &key).expect("an endpoint");
        let addresses = [b.link().address().to_string()];
        let connection = endpoint.connect(&addresses, id).await.expect("c is a host of the volume");
        write_as(&primary, &connection).await;
        let answer = greet_as(&primary, &connection).await;
        endpoint.close().await;
        answer
    });
    assert!(matches!(&answer, Message::Refused(no) if no.refusal == Refusal::Role), "{answer:?}");
    until("the frames are noticed", || {
        let log = b.log();
        if log.contains("a frame comes from another host than the greeting") { Ok(()) } else { Err(log) }
    });
    assert_eq!(first_difference(&mirror.primary.backing(), &b.backing()), None, "b differs at this byte");
    assert_eq!(superblock_of(&mirror.primary).session, primary.session, "its session with b goes on");
    mirror.replicas[1].start();
    mirror.assert_identical();
}
