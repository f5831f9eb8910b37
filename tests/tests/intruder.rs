//! A host of the volume that has gone bad, or whose key was stolen: it can't pass for the primary.

use blockmirror_agent::control::api::VolumeState;
use blockmirror_agent::transport::{Connection, ControlReceiver, ControlSender, Endpoint, HostKey, Incoming};
use blockmirror_protocol::disk::superblock::{self, Superblock};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::{Epoch, Sequence, Session, Stream};
use blockmirror_protocol::wire::message::{Fence, Hello, Message, Refusal, Superseded};
use blockmirror_protocol::wire::{Body, FrameHeader, StreamKind, StreamPreamble, VERSIONS};
use blockmirror_tests::harness::random::Random;
use blockmirror_tests::machines::content::{BLOCK_BYTES, first_difference, noise};
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::patience::until;
use std::fs;
use tokio::sync::mpsc;

const MIB: u64 = 1 << 20;

/// How many sessions the primary may have begun since the one with the replica.
const SESSIONS: u64 = 8;

fn superblock_of(host: &Host) -> Superblock {
    let bytes = fs::read(host.state(superblock::FILE_NAME)).expect("the primary's superblock");
    Superblock::recover(&bytes).expect("it is whole").1
}

/// Writes in the name of the primary, in every session that the replica may have with it.
async fn write_as(primary: &Superblock, connection: &Connection) {
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
async fn greet_as(primary: &Superblock, connection: &Connection) -> Message {
    greet(hello_of(primary), connection).await.expect("an answer")
}

/// What a greeting is answered with, if it is.
async fn greet(hello: Hello, connection: &Connection) -> Option<Message> {
    let (mut sender, mut receiver) = connection.open_control().await.expect("a stream");
    sender.send(&hello.into()).await.expect("a greeting");
    receiver.receive().await.ok()
}

fn hello_of(primary: &Superblock) -> Hello {
    Hello {
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
        ends: blockmirror_protocol::lineage::Ends::default(),
    }
}

/// The volume `data` on a, b and c, all in sync, with some content; c is stopped, and this is its key.
fn mirror_without_c() -> (Mirror, HostKey) {
    let mut mirror = Mirror::new(16 * MIB, "nbd", &["b", "c"]);
    let mut client = mirror.client();
    client.write(0, &noise(&mut Random::new(1), MIB)).expect("a write");
    client.flush().expect("a flush");
    drop(client);
    mirror.assert_identical();
    mirror.replicas[1].stop();
    let key = HostKey::load(&mirror.replicas[1].path("state/host.key")).expect("the key of c");
    (mirror, key)
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn endpoint(key: &HostKey) -> Endpoint {
    Endpoint::bind("127.0.0.1:0".parse().expect("an address"), key).expect("an endpoint")
}

/// A connection to a host, with the key of the endpoint.
async fn connect(endpoint: &Endpoint, host: &Host) -> Connection {
    let id = HostKey::load(&host.path("state/host.key")).expect("a key").id();
    endpoint.connect(&[host.link().address().to_string()], id).await.expect("c is a host of the volume")
}

/// Hands on each greeting that comes on a connection.
async fn take_greetings(
    connection: Connection,
    greeted: mpsc::UnboundedSender<(Connection, ControlSender, ControlReceiver)>,
) {
    while let Ok(incoming) = connection.accept().await {
        let Incoming::Control(sender, mut receiver) = incoming else { continue };
        if let Ok(Message::Hello(_)) = receiver.receive().await {
            // The test may have ended.
            let _ = greeted.send((connection.clone(), sender, receiver));
        }
    }
}

fn still_takes_writes(mirror: &Mirror, before: &Superblock) {
    let mut client = mirror.client();
    client.write(MIB, &noise(&mut Random::new(2), MIB)).expect("a write");
    client.flush().expect("a flush");
    assert_eq!(superblock_of(&mirror.primary).fence, before.fence);
    assert_ne!(mirror.primary.status().state, VolumeState::Superseded);
}

/// One greeting with the counter `u64::MAX` stopped the primary, durably, and the next promotion began at 0 again.
#[test]
fn a_member_that_greets_with_an_impossible_fence_stops_nobody() {
    let (mirror, key) = mirror_without_c();
    let before = superblock_of(&mirror.primary);
    let followed = superblock_of(mirror.replica()).fence;
    runtime().block_on(async {
        let endpoint = endpoint(&key);
        for host in [&mirror.primary, mirror.replica()] {
            for counter in [u64::MAX, Fence::COUNTERS, before.fence.counter + Fence::STEP + 1] {
                let fence = Fence { counter, holder: key.id() };
                let session = Session(before.session.0 + 1000);
                let connection = connect(&endpoint, host).await;
                let answer = greet(Hello { fence, session, ..hello_of(&before) }, &connection).await;
                assert!(matches!(answer, None | Some(Message::Refused(_))), "{counter}: {answer:?}");
            }
        }
        endpoint.close().await;
    });
    still_takes_writes(&mirror, &before);
    assert_eq!(superblock_of(mirror.replica()).fence, followed);
    let status = mirror.replica().status();
    let accused = status.facts.peers.iter().find(|peer| peer.name.as_str() == "c");
    let error = accused.and_then(|peer| peer.error.clone()).unwrap_or_default();
    assert!(error.contains("broke the protocol"), "b names c: {error:?}");
}

/// Any member could stop the primary by the claim that another one was promoted, which need not even exist.
#[test]
fn a_member_that_claims_the_promotion_of_another_one_stops_nobody_while_that_denies_it() {
    let (mirror, key) = mirror_without_c();
    let before = superblock_of(&mirror.primary);
    let b = HostKey::load(&mirror.replica().path("state/host.key")).expect("the key of b").id();
    let counter = before.fence.counter + 1;
    let stranger = HostKey::ephemeral().expect("a key").id();
    runtime().block_on(async {
        let endpoint = endpoint(&key);
        mirror.replicas[1].link().lead_to(endpoint.local_address());
        // Others dial as well, to ask or tell something else.
        let (greeted, mut greetings) = mpsc::unbounded_channel();
        let dialled = endpoint.clone();
        tokio::spawn(async move {
            while let Some(connection) = dialled.accept().await {
                tokio::spawn(take_greetings(connection, greeted.clone()));
            }
        });
        for holder in [stranger, b, before.fence.holder] {
            // The primary dials again whenever a session has ended.
            let (connection, mut sender, _receiver) = greetings.recv().await.expect("the primary greets c");
            let claim = Superseded { fence: Fence { counter, holder } };
            sender.send(&claim.into()).await.expect("the primary listens");
            until("the claim is judged", || {
                let log = mirror.primary.log();
                let words = match holder == b {
                    true => "c says that b was promoted, which that one denies",
                    false => "it tells of a promotion of a host that was not promoted",
                };
                if log.contains(words) { Ok(()) } else { Err(log) }
            });
            connection.close(blockmirror_agent::transport::CloseReason::Done, "");
        }
        endpoint.close().await;
    });
    still_takes_writes(&mirror, &before);
}

/// A primary that had not heard of a removal yet was stopped by the one that was removed.
#[test]
fn a_removed_host_that_promoted_itself_stops_no_primary_that_can_hear_of_the_removal() {
    let (mirror, key) = mirror_without_c();
    let before = superblock_of(&mirror.primary);
    mirror.replica().succeed(&["remove-peer", "data", "c", "--force"]);
    runtime().block_on(async {
        let endpoint = endpoint(&key);
        mirror.replicas[1].link().lead_to(endpoint.local_address());
        let (greeted, mut greetings) = mpsc::unbounded_channel();
        let dialled = endpoint.clone();
        tokio::spawn(async move {
            while let Some(connection) = dialled.accept().await {
                tokio::spawn(take_greetings(connection, greeted.clone()));
            }
        });
        let (connection, mut sender, _receiver) = greetings.recv().await.expect("the primary greets c");
        let claim = Superseded { fence: Fence { counter: before.fence.counter + 1, holder: key.id() } };
        sender.send(&claim.into()).await.expect("the primary listens");
        until("the claim is judged", || {
            let log = mirror.primary.log();
            let words = "c says that it was promoted, but c was removed from the volume";
            if log.contains(words) { Ok(()) } else { Err(log) }
        });
        // It is a stranger now.
        connection.closed().await;
        endpoint.close().await;
    });
    still_takes_writes(&mirror, &before);
    let status = mirror.primary.status();
    assert!(status.facts.peers.iter().all(|peer| peer.name.as_str() != "c"), "{status:?}");
}

/// Each connection has 256 MiB of room, and there was no limit to how many a key may have.
#[test]
fn a_member_has_four_connections_and_a_fifth_is_closed() {
    let (mirror, key) = mirror_without_c();
    runtime().block_on(async {
        let endpoint = endpoint(&key);
        let mut connections = Vec::new();
        for _ in 0..5 {
            connections.push(connect(&endpoint, &mirror.primary).await);
        }
        let lost = connections[4].closed().await;
        assert!(lost.source.to_string().contains("too many connections"), "{lost:?}");
        assert!(connections[..4].iter().all(Connection::is_live));
        endpoint.close().await;
    });
    still_takes_writes(&mirror, &superblock_of(&mirror.primary));
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
