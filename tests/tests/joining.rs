//! Joins that are cut short: neither side is left with half of one.

use blockmirror_agent::control::api::VolumeState;
use blockmirror_agent::token::{Secret, Token};
use blockmirror_agent::transport::{CloseReason, Connection, Endpoint, HostKey, Incoming};
use blockmirror_protocol::terms::Mode;
use blockmirror_protocol::units::{BlockSize, VolumeId};
use blockmirror_protocol::wire::message::{Join, Joined, Member, Message, Refusal};
use blockmirror_tests::machines::folder::Folder;
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::programs::text;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

const MIB: u64 = 1 << 20;
const VOLUME: VolumeId = VolumeId([7; 16]);

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime")
}

fn endpoint(key: &HostKey) -> Endpoint {
    Endpoint::bind("127.0.0.1:0".parse().expect("an address"), key).expect("an endpoint")
}

fn key(folder: &Folder, name: &str) -> HostKey {
    let path = folder.join(name);
    std::fs::create_dir(&path).expect("a folder");
    HostKey::load_or_create(&path).expect("a key")
}

/// What the primary `p` of a volume does that loses its answers to those who join, as long as it is told to.
struct Primary {
    endpoint: Endpoint,
    is_lost: AtomicBool,
    joins: AtomicU32,
}

impl Primary {
    async fn serve(self: Arc<Self>) {
        while let Some(connection) = self.endpoint.accept().await {
            tokio::spawn(self.clone().converse(connection));
        }
    }

    async fn converse(self: Arc<Self>, connection: Connection) {
        while let Ok(incoming) = connection.accept().await {
            let Incoming::Control(mut sender, mut receiver) = incoming else { continue };
            let Ok(Message::Join(join)) = receiver.receive().await else { continue };
            if !join.ask_only {
                self.joins.fetch_add(1, Ordering::Relaxed);
                if self.is_lost.load(Ordering::Relaxed) {
                    connection.close(CloseReason::Done, "the link is cut");
                    return;
                }
            }
            let member = |name: &str, host, address: String| Member {
                name: name.to_owned(),
                host,
                addresses: vec![address],
                mode: Mode::Async,
                version: 0,
            };
            let own = member("p", self.endpoint.id(), self.endpoint.local_address().to_string());
            let joined = Joined {
                volume: VOLUME,
                name: "data".to_owned(),
                size_bytes: 8 * MIB,
                block_size: BlockSize::default(),
                members: vec![own, member(&join.name, connection.peer(), join.listen[0].clone())],
            };
            // Whoever asked may be gone.
            let _ = sender.send(&joined.into()).await;
            let _ = sender.finish().await;
        }
    }
}

/// The volume was discarded, and the primary kept a member that was not there.
#[test]
fn a_join_whose_answer_is_lost_keeps_the_volume_and_is_done_when_it_is_repeated() {
    let folder = Folder::new();
    let primary = Arc::new(Primary {
        endpoint: endpoint(&key(&folder, "p")),
        is_lost: AtomicBool::new(true),
        joins: AtomicU32::new(0),
    });
    let served = primary.clone();
    let serving = std::thread::spawn(move || runtime().block_on(served.serve()));
    let token = Token {
        addresses: vec![primary.endpoint.local_address().to_string()],
        host: primary.endpoint.id(),
        volume: VOLUME,
        name: "data".to_owned(),
        secret: Secret([9; 32]),
    };
    let token = token.encode().expect("a token");
    let host = Host::new(&folder, "b");
    let join = ["join", &token, "--backing", text(&host.backing())].map(str::to_owned);
    let join: Vec<&str> = join.iter().map(String::as_str).collect();
    host.refuse(
        &join,
        1,
        &["it is not known whether the primary has taken this host in", "run the same command again"],
    );
    assert!(primary.joins.load(Ordering::Relaxed) > 1, "it is asked again by itself");
    let status = host.status();
    assert_eq!(status.state, VolumeState::Waiting, "{status:?}");
    primary.is_lost.store(false, Ordering::Relaxed);
    host.succeed(&join);
    assert_eq!(host.statuses().len(), 1);
    runtime().block_on(primary.endpoint.close());
    serving.join().expect("the primary ends well");
}

/// Joins as the host of this endpoint would, and gives the answer.
async fn join(endpoint: &Endpoint, host: &Host, token: &Token) -> Message {
    let id = HostKey::load(&host.path("state/host.key")).expect("a key").id();
    let connection = endpoint.connect(&[host.link().address().to_string()], id).await.expect("it is reached");
    let (mut sender, mut receiver) = connection.open_control().await.expect("a stream");
    let join = Join {
        volume: token.volume,
        secret: token.secret.0,
        name: "b".to_owned(),
        listen: vec![endpoint.local_address().to_string()],
        ask_only: false,
    };
    sender.send(&join.into()).await.expect("it is sent");
    let answer = receiver.receive().await.expect("an answer");
    connection.close(CloseReason::Done, "the link is cut");
    answer
}

/// A token that it had used itself was of no use to a host that had not heard so.
#[test]
fn a_host_that_was_taken_in_is_told_so_again_and_nobody_else_is_taken_in_with_its_token() {
    let folder = Folder::new();
    let host = Host::new(&folder, "a");
    host.create(8 * MIB, "nbd");
    let token = Token::parse(&host.invite()).expect("a token");
    let keys = ["b", "c"].map(|name| key(&folder, name));
    runtime().block_on(async {
        let [b, c] = keys.each_ref().map(endpoint);
        for _ in 0..3 {
            let Message::Joined(joined) = join(&b, &host, &token).await else { panic!("it is taken in") };
            assert_eq!(joined.members.len(), 2, "{joined:?}");
        }
        let Message::Refused(no) = join(&c, &host, &token).await else { panic!("it is refused") };
        assert_eq!(no.refusal, Refusal::Token, "{no:?}");
    });
    let peers = host.status().facts.peers;
    assert_eq!(peers.len(), 1, "{peers:?}");
    // One that was removed since is none of the volume's.
    host.succeed(&["remove-peer", "data", "b", "--force"]);
    runtime().block_on(async {
        let b = endpoint(&keys[0]);
        let Message::Refused(no) = join(&b, &host, &token).await else { panic!("it is refused") };
        assert_eq!(no.refusal, Refusal::Token, "{no:?}");
    });
}
