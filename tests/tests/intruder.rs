//! A host of the volume that has gone bad, or whose key was stolen: it can't pass for the primary, and where it promotes
//! itself, what it overwrites comes back.

use blockmirror_agent::control::api::{CopyState, VolumeState};
use blockmirror_agent::transport::{
    CloseReason, Connection, ControlReceiver, ControlSender, Endpoint, FrameSender, HostKey, Incoming,
    Options,
};
use blockmirror_protocol::disk::marker;
use blockmirror_protocol::disk::superblock::{self, Superblock};
use blockmirror_protocol::given::Given;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::terms::{DataState, Fence, Mode};
use blockmirror_protocol::units::{Epoch, GenerationId, Position, Sequence, Session, Stream, VolumeId};
use blockmirror_protocol::wire::message::{
    AskMark, Commit, Committed, Hello, Member, Message, Refusal, Release, Renew, ResyncBegin, ResyncReady,
    Superseded, TakeOver, Union, Welcome,
};
use blockmirror_protocol::wire::{Body, FrameHeader, StreamKind, StreamPreamble, VERSIONS};
use blockmirror_tests::harness::random::Random;
use blockmirror_tests::machines::content::{BLOCK_BYTES, first_difference, noise};
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::patience::{DEADLINE, until};
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
    greeted: mpsc::UnboundedSender<(Connection, ControlSender, ControlReceiver, Hello)>,
) {
    while let Ok(incoming) = connection.accept().await {
        let Incoming::Control(sender, mut receiver) = incoming else { continue };
        if let Ok(Message::Hello(hello)) = receiver.receive().await {
            // The test may have ended.
            let _ = greeted.send((connection.clone(), sender, receiver, hello));
        }
    }
}

/// From now on the primary dials this endpoint where it wants the replica, which is stopped. Gives its greetings; frames are
/// taken in by nobody.
fn greetings_to(
    replica: &Host,
    endpoint: &Endpoint,
) -> mpsc::UnboundedReceiver<(Connection, ControlSender, ControlReceiver, Hello)> {
    replica.link().lead_to(endpoint.local_address());
    let (greeted, greetings) = mpsc::unbounded_channel();
    let dialled = endpoint.clone();
    tokio::spawn(async move {
        while let Some(connection) = dialled.accept().await {
            tokio::spawn(take_greetings(connection, greeted.clone()));
        }
    });
    greetings
}

/// Answers a greeting as the replica would, which may differ in these ranges.
async fn welcome(replica: &Host, session: Session, sender: &mut ControlSender, ranges: Vec<ByteRange>) {
    let (superblock, marker) = (superblock_of(replica), fs::read(replica.state("marker")).expect("a marker"));
    let (_, mark) = marker::recover(&marker).expect("it is whole");
    let welcome = Welcome {
        version: VERSIONS.1,
        features: 0,
        session,
        copy: superblock.copy,
        data: DataState::Consistent,
        can_roll_back: false,
        source: superblock.source,
        mark,
        fence: superblock.fence,
        lineage: superblock.lineage.clone(),
        sector_bytes: 512,
        window_bytes: 1 << 20,
    };
    sender.send(&welcome.into()).await.expect("the primary listens");
    sender.send(&Union { ranges, last: true }.into()).await.expect("the primary listens");
}

/// Waits for what the primary is to say.
async fn hear_primary<Said>(
    receiver: &mut ControlReceiver,
    wanted: impl Fn(&Message) -> Option<Said>,
) -> Said {
    loop {
        let message = receiver.receive().await.expect("the primary goes on");
        if let Some(said) = wanted(&message) {
            return said;
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
            let (connection, mut sender, _receiver, _) =
                greetings.recv().await.expect("the primary greets c");
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
            connection.close(CloseReason::Done, "");
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
        let (connection, mut sender, _receiver, _) = greetings.recv().await.expect("the primary greets c");
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

/// What it was answered was kept in memory until it read it.
#[test]
fn a_primary_that_reads_no_answers_is_left_and_named() {
    /// More than wait to be read and are on their way together.
    const QUESTIONS: usize = 40_000;
    let (mut mirror, _) = mirror_without_c();
    let primary = superblock_of(&mirror.primary);
    let key = HostKey::load(&mirror.primary.path("state/host.key")).expect("the key of a");
    mirror.primary.kill();
    let answers = runtime().block_on(async {
        let options = Options { stream_window_bytes: 64 << 10, ..Options::default() };
        let endpoint = Endpoint::bind_with("127.0.0.1:0".parse().expect("an address"), &key, &options);
        let endpoint = endpoint.expect("an endpoint");
        let connection = connect(&endpoint, mirror.replica()).await;
        let hello = hello_of(&primary);
        let session = hello.session;
        let (mut sender, mut receiver) = connection.open_control().await.expect("a stream");
        sender.send(&hello.into()).await.expect("a greeting");
        assert!(matches!(receiver.receive().await.expect("an answer"), Message::Welcome(_)));
        for _ in 0..QUESTIONS {
            // The replica may leave before all of them were asked.
            if sender.send(&AskMark { session }.into()).await.is_err() {
                break;
            }
        }
        let mut answers = 0;
        while receiver.receive().await.is_ok() {
            answers += 1;
        }
        endpoint.close().await;
        answers
    });
    assert!(answers < QUESTIONS, "all of them were answered");
    let status = mirror.replica().wait_until("it is named", |status| {
        let accused = status.facts.peers.iter().find(|peer| peer.name.as_str() == "a");
        accused.is_some_and(|peer| peer.error.as_ref().is_some_and(|error| error.contains("does not read")))
    });
    assert_eq!(status.facts.data, Some(CopyState::Consistent), "{status:?}");
}

/// What it was promised each time that it asked was kept in memory until it read it.
#[test]
fn a_replica_that_reads_no_answers_is_left_and_named() {
    /// More than wait to be read and are on their way together.
    const QUESTIONS: u64 = 200_000;
    let (mirror, key) = mirror_without_c();
    mirror.primary.succeed(&["mode", "data", "c", "sync"]);
    let replica = &mirror.replicas[1];
    runtime().block_on(async {
        let options = Options { stream_window_bytes: 64 << 10, ..Options::default() };
        let endpoint = Endpoint::bind_with("127.0.0.1:0".parse().expect("an address"), &key, &options);
        let endpoint = endpoint.expect("an endpoint");
        let mut greetings = greetings_to(replica, &endpoint);
        let (_, mut sender, mut receiver, hello) = greetings.recv().await.expect("the primary greets c");
        let session = hello.session;
        welcome(replica, session, &mut sender, Vec::new()).await;
        let commit = |message: &Message| match message {
            Message::Commit(commit) => Some(commit.position),
            _ => None,
        };
        let position = hear_primary(&mut receiver, commit).await;
        sender.send(&Committed { session, position }.into()).await.expect("the primary listens");
        for number in 0..QUESTIONS {
            // The primary may leave before all of them were asked.
            if sender.send(&Renew { session, number }.into()).await.is_err() {
                break;
            }
        }
        mirror.primary.wait_until("it is named", |status| {
            let peer = status.facts.peers.iter().find(|peer| peer.name.as_str() == "c");
            peer.is_some_and(|peer| peer.error.as_ref().is_some_and(|error| error.contains("does not read")))
        });
        endpoint.close().await;
    });
}

/// The primary waited for an answer to what it had sent, and nothing came any more.
#[test]
fn a_replica_that_takes_no_frames_is_greeted_anew() {
    let (mirror, key) = mirror_without_c();
    let replica = &mirror.replicas[1];
    runtime().block_on(async {
        let endpoint = endpoint(&key);
        let mut greetings = greetings_to(replica, &endpoint);
        let (_, mut sender, mut receiver, hello) = greetings.recv().await.expect("the primary greets c");
        let session = hello.session;
        // One copy, or one question, and nothing more until that is answered.
        welcome(replica, session, &mut sender, vec![ByteRange::new(0, BLOCK_BYTES)]).await;
        hear_primary(&mut receiver, |message| matches!(message, Message::ResyncBegin(_)).then_some(())).await;
        sender.send(&ResyncReady { session }.into()).await.expect("the primary listens");
        let again = tokio::time::timeout(DEADLINE, greetings.recv()).await;
        let (_, _, _, next) = again.expect("it is greeted again in time").expect("it is greeted again");
        assert!(next.session > session);
        // Until then the session was open on this side.
        drop((sender, receiver));
        endpoint.close().await;
    });
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

/// A session of c as the primary of b, after a promotion that nobody ordered.
struct Usurper {
    connection: Connection,
    sender: ControlSender,
    receiver: ControlReceiver,
    streams: Vec<FrameSender>,
    volume: VolumeId,
    session: Session,
    /// Its generations, the last one its own.
    lineage: Vec<GenerationId>,
    /// The last epoch.
    epoch: Epoch,
    sequence: Sequence,
    copies: u64,
}

impl Usurper {
    /// Greets b, which takes it for the primary.
    async fn greets(endpoint: &Endpoint, b: &Host, primary: &Superblock, key: &HostKey, raised: u64) -> Self {
        let connection = connect(endpoint, b).await;
        let (sender, receiver) = connection.open_control().await.expect("a stream");
        let fence = Fence { counter: primary.fence.counter + raised, holder: key.id() };
        let session = Session(primary.session.0 + 1000 * raised);
        let own = GenerationId([raised as u8; 16]);
        let lineage = [vec![own], superblock_of(b).lineage].concat();
        let (volume, epoch) = (primary.volume, Epoch(0));
        let (sequence, copies) = (Sequence(0), 0);
        let streams = Vec::new();
        let mut it =
            Self { connection, sender, receiver, streams, volume, session, lineage, epoch, sequence, copies };
        let member = Member {
            host: key.id(),
            name: "c".to_owned(),
            addresses: vec![endpoint.local_address().to_string()],
            mode: Mode::Async,
            version: 0,
        };
        let lineage = it.lineage.clone();
        let hello = Hello { fence, session, lineage, members: vec![member], ..hello_of(primary) };
        it.say(hello.into()).await;
        it.epoch = it
            .hear(|message| match message {
                Message::Welcome(welcome) => Some(welcome.mark.position.epoch),
                _ => None,
            })
            .await;
        it.hear(|message| matches!(message, Message::Union(union) if union.last).then_some(())).await;
        it
    }

    async fn say(&mut self, message: Message) {
        self.sender.send(&message).await.expect("b listens");
    }

    /// Waits for an answer, and passes over others.
    async fn hear<Answer>(&mut self, wanted: impl Fn(&Message) -> Option<Answer>) -> Answer {
        loop {
            let message = self.receiver.receive().await.expect("b answers");
            assert!(!matches!(message, Message::Refused(_) | Message::Superseded(_)), "{message:?}");
            if let Some(answer) = wanted(&message) {
                return answer;
            }
        }
    }

    /// A stream that ends would end the session, so each stays open.
    async fn send(&mut self, kind: StreamKind, frames: Vec<(Body, Vec<u8>)>) {
        let session = self.session;
        let preamble = StreamPreamble { volume: self.volume, session, kind };
        let sender = self.connection.open_frames(&preamble).await.expect("a stream");
        self.streams.push(sender);
        let sender = self.streams.last_mut().expect("it was just opened");
        for (body, payload) in frames {
            let header = FrameHeader { session, stream: Stream(1), body };
            sender.send(&header.encode(&payload), payload.into()).await.expect("b listens");
        }
        sender.flush().await.expect("b listens");
    }

    /// Announces a resync, and overwrites these blocks by copies.
    async fn resyncs(&mut self, blocks: std::ops::Range<u64>, garbage: u8) {
        let (session, dirty_bytes) = (self.session, (blocks.end - blocks.start) * BLOCK_BYTES);
        self.say(ResyncBegin { session, dirty_bytes }.into()).await;
        self.hear(|message| matches!(message, Message::ResyncReady(_)).then_some(())).await;
        let mut frames = Vec::new();
        for block in blocks {
            self.copies += 1;
            let range = ByteRange::new(block * BLOCK_BYTES, BLOCK_BYTES);
            frames.push((Body::Copy { range, number: self.copies }, vec![garbage; BLOCK_BYTES as usize]));
        }
        self.send(StreamKind::Bulk, frames).await;
        let copies = self.copies;
        let is_durable = |message: &Message| matches!(message, Message::Acknowledgement(acknowledgement) if acknowledgement.copies == copies);
        self.hear(|message| is_durable(message).then_some(())).await;
    }

    /// Overwrites these blocks by live writes, and ends their epoch.
    async fn writes(&mut self, blocks: std::ops::Range<u64>, garbage: u8) {
        self.epoch = self.epoch.next();
        let mut frames = Vec::new();
        for block in blocks {
            self.sequence = self.sequence.next();
            let range = ByteRange::new(block * BLOCK_BYTES, BLOCK_BYTES);
            let body = Body::Write { range, epoch: self.epoch, sequence: self.sequence };
            frames.push((body, vec![garbage; BLOCK_BYTES as usize]));
        }
        let end = Body::EpochEnd { epoch: self.epoch, sequence: self.sequence, cut: false };
        frames.push((end, Vec::new()));
        self.send(StreamKind::Live, frames).await;
        let epoch = self.epoch;
        let is_durable = |message: &Message| matches!(message, Message::Acknowledgement(acknowledgement) if acknowledgement.durable == epoch);
        self.hear(|message| is_durable(message).then_some(())).await;
    }

    async fn commits(&mut self) {
        let (session, lineage) = (self.session, self.lineage.clone());
        let position = Position { generation: lineage[0], epoch: self.epoch, sequence: self.sequence };
        let (active, mode) = (Vec::new(), Mode::Async);
        self.say(Commit { session, position, lineage, active, mode, given: Given::NOTHING }.into()).await;
        self.hear(|message| matches!(message, Message::Committed(_)).then_some(())).await;
    }

    /// Says that it is demoted for b, and has it take over.
    async fn hands_over(&mut self) -> Message {
        let (session, generation) = (self.session, self.lineage[0]);
        self.say(Release { session, generation }.into()).await;
        self.hear(|message| matches!(message, Message::ReleaseRecorded(_)).then_some(())).await;
        let (mut sender, mut receiver) = self.connection.open_control().await.expect("a stream");
        sender.send(&TakeOver { volume: self.volume }.into()).await.expect("b listens");
        receiver.receive().await.expect("an answer")
    }
}

/// Whoever had a member's key could promote itself, and overwrite all copies: the replicas dropped what they had kept at
/// the commit, and again when they were promoted for it.
#[test]
fn a_member_that_promotes_itself_destroys_no_copy() {
    let (mirror, key) = mirror_without_c();
    let (primary, b) = (superblock_of(&mirror.primary), mirror.replica());
    let before = mirror.folder.join("before.img");
    fs::copy(b.backing(), &before).expect("a copy");
    runtime().block_on(async {
        let endpoint = endpoint(&key);
        let mut c = Usurper::greets(&endpoint, b, &primary, &key, 1).await;
        c.resyncs(0..64, 0xbd).await;
        c.writes(32..96, 0xbe).await;
        c.commits().await;
        c.writes(64..128, 0xbf).await;
        let answer = c.hands_over().await;
        assert!(
            matches!(&answer, Message::Refused(no) if no.text.contains("nobody on b has agreed that c took over")),
            "{answer:?}"
        );
        // Once more, as if it had been promoted after a demotion in order.
        c.connection.close(CloseReason::Done, "");
        let mut c = Usurper::greets(&endpoint, b, &primary, &key, 2).await;
        c.commits().await;
        c.writes(0..160, 0xc0).await;
        let status = b.status();
        assert_eq!(status.facts.succession.unagreed.as_deref(), Some("c"), "{status:?}");
        assert!(status.verdict.contains("nobody here has agreed that c took over"), "{status:?}");
        assert!(status.action.contains("blockmirror pause data c, then: blockmirror undo data"), "{status:?}");
        c.connection.close(CloseReason::Done, "");
        endpoint.close().await;
    });
    assert_ne!(first_difference(&b.backing(), &before), None, "it was overwritten");
    b.succeed(&["pause", "data", "c"]);
    until("its session is over", || {
        let said = b.tool(&["undo", "data"]);
        if said.code == 0 { Ok(()) } else { Err(said.error) }
    });
    assert_eq!(first_difference(&b.backing(), &before), None, "all is as it was before c came");
}

/// Only the first greeting of a stream was held against the key of its connection: a second one passed for any host's.
#[test]
fn a_member_that_greets_again_on_its_stream_passes_for_nobody() {
    let (mirror, key) = mirror_without_c();
    let (primary, b) = (superblock_of(&mirror.primary), mirror.replica());
    runtime().block_on(async {
        let endpoint = endpoint(&key);
        let mut c = Usurper::greets(&endpoint, b, &primary, &key, 1).await;
        let fence = Fence { counter: primary.fence.counter + 2, ..primary.fence };
        let session = Session(primary.session.0 + 3000);
        let lineage = c.lineage.clone();
        c.say(Hello { fence, session, lineage, ..hello_of(&primary) }.into()).await;
        while c.receiver.receive().await.is_ok() {}
        endpoint.close().await;
    });
    assert_eq!(superblock_of(b).fence.holder, key.id(), "a was promoted, says c");
    until("it is named", || {
        let log = b.log();
        if log.contains("it greeted twice on one stream") { Ok(()) } else { Err(log) }
    });
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
