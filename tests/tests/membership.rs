//! Hosts that are removed from a volume while everything runs (X3), and what tokens let their bearers do.

use blockmirror_agent::config::{ConfigFolder, VolumeConfig};
use blockmirror_agent::control::api::{Connection, PeerState, VolumeState};
use blockmirror_agent::token::Token;
use blockmirror_agent::transport::{Connection as Transport, ControlReceiver, Endpoint, HostKey, Incoming};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::VolumeId;
use blockmirror_protocol::wire::message::{Message, ReadContent, Recover, Refusal, TakeOver};
use blockmirror_tests::machines::content::stamped;
use blockmirror_tests::machines::host::Host;
use blockmirror_tests::machines::mirror::Mirror;
use blockmirror_tests::machines::patience::until;
use blockmirror_tests::machines::programs::{own, text};
use std::io::Write;
use std::process::{Command, Stdio};
use tokio::sync::mpsc;

const MIB: u64 = 1 << 20;

fn config(host: &Host) -> VolumeConfig {
    let folder = ConfigFolder::new(host.path("config"));
    folder.load_volume(&"data".parse().expect("a name")).expect("the volume's file is right")
}

fn members(host: &Host) -> Vec<String> {
    let mut names: Vec<String> = config(host).peers.iter().map(|peer| peer.name.to_string()).collect();
    names.sort();
    names
}

/// Waits until a host has heard that `name` was removed, and lists these others.
fn wait_until_heard(host: &Host, name: &str, others: &[&str]) {
    until(&format!("{} has heard of the removal", host.name()), || {
        let is_told = config(host).removed.iter().any(|removed| removed.name.as_str() == name);
        let found = members(host);
        if is_told && found == others { Ok(()) } else { Err(format!("{found:?}\n{}", host.log())) }
    });
}

fn wait_until_it_knows(host: &Host, by: &str) {
    let status = host.wait_until("it knows", |status| status.state == VolumeState::Removed);
    let words = format!("this host was removed from data by {by} at");
    assert!(status.verdict.contains(&words), "{status:?}");
    assert!(!status.action.contains("promote"), "{status:?}");
}

#[test]
fn a_replica_that_is_connected_is_removed_everywhere_and_joins_again() {
    let mirror = Mirror::new(16 * MIB, "nbd", &["b", "c"]);
    let (a, b, c) = (&mirror.primary, &mirror.replicas[0], &mirror.replicas[1]);
    let said = a.succeed(&["remove-peer", "data", "b", "--dry-run"]);
    assert!(said.contains("b would be removed from data") && said.contains("c are told"), "{said}");
    assert_eq!(members(a), ["b", "c"], "nothing was done");
    let said = a.succeed(&["remove-peer", "data", "b"]);
    assert!(said.contains("b was removed from data"), "{said}");
    wait_until_heard(a, "b", &["c"]);
    wait_until_heard(c, "b", &["a"]);
    wait_until_it_knows(b, "a");
    mirror.client().write_durably(0, &stamped(1)).expect("a write");
    assert!(!a.path("state/data").read_dir().expect("a folder").any(|entry| {
        let name = entry.expect("an entry").file_name();
        name.to_string_lossy().contains(&config(a).removed[0].host.to_string())
    }));
    // What it could do by its key is over, also when it promotes itself.
    b.refuse(&["promote", "data"], 5, &["b was removed from data by a", "--force"]);
    b.succeed(&["promote", "data", "--force"]);
    b.wait_until("it is refused", |status| {
        status.facts.peers.iter().all(|peer| {
            peer.error.as_ref().is_some_and(|error| error.contains("b was removed from data by a"))
        })
    });
    assert_eq!(a.status().state, VolumeState::Healthy);
    assert_eq!(c.status().state, VolumeState::Following);
    assert!(b.status().verdict.contains("this host was removed from data by a"), "{:?}", b.status());

    // By a new token it is a member again, for all.
    b.succeed(&["demote", "data"]);
    b.join(a, &b.backing());
    let told = |host: &Host, others: &[&str]| {
        until("it is a member again", || {
            let config = config(host);
            let is_over = config.removed.is_empty() && config.removal.is_none();
            if is_over && members(host) == others { Ok(()) } else { Err(format!("{config:?}")) }
        });
    };
    told(a, &["b", "c"]);
    told(c, &["a", "b"]);
    told(b, &["a", "c"]);
}

#[test]
fn a_host_that_was_away_hears_of_a_removal_before_it_listens_to_the_removed_one() {
    let mut mirror = Mirror::new(16 * MIB, "none", &["b", "c"]);
    mirror.replicas[1].stop();
    mirror.wait_until_lost("c");
    mirror.primary.succeed(&["remove-peer", "data", "b", "--force"]);
    wait_until_it_knows(&mirror.replicas[0], "a");
    mirror.replicas[0].succeed(&["promote", "data", "--force"]);
    // c is back, and a may not dial it for a while: b does, with a newer fence than any that c knows.
    mirror.replicas[1].start();
    wait_until_heard(&mirror.replicas[1], "b", &["a"]);
    mirror.wait_for_peer("c", "c has everything", |peer| peer.state == Some(PeerState::InSync));
    let status = mirror.replicas[1].status();
    assert_eq!(status.state, VolumeState::Following, "{status:?}");
    assert_eq!(status.facts.succession.fence, Some(1), "it took no fence of b's: {status:?}");
}

/// It read the whole volume from a host that had not heard of the removal: a greeting alone was a reason to ask.
#[test]
fn a_removed_host_gets_no_content_from_one_that_was_away() {
    let id = |host: &Host| HostKey::load(&host.path("state/host.key")).expect("its key").id();
    type Question = fn(VolumeId) -> Message;
    let questions: [(&str, Question); 3] = [
        ("a recovery", |_| {
            Recover { name: "data".to_owned(), secret: None, accept_inconsistent: false }.into()
        }),
        ("a read", |volume| ReadContent { volume, range: ByteRange::new(0, 4096) }.into()),
        ("a takeover", |volume| TakeOver { volume }.into()),
    ];
    for (what, question) in questions {
        let mut mirror = Mirror::new(16 * MIB, "none", &["b", "c"]);
        mirror.wait_until_quiet();
        mirror.replicas.iter_mut().for_each(Host::stop);
        mirror.wait_until_lost("b");
        mirror.wait_until_lost("c");
        mirror.primary.succeed(&["remove-peer", "data", "c", "--force"]);
        // b can ask the others. None of them can dial it, and tell it without being asked.
        let [b, c] = &mut mirror.replicas[..] else { panic!("there are two") };
        b.link().cut();
        let key = HostKey::load(&c.path("state/host.key")).expect("its key");
        b.start();
        let answer = in_a_runtime(async {
            let endpoint = bind(&key);
            let addresses = [b.listens_at().to_string()];
            let connection = endpoint.connect(&addresses, id(b)).await.expect("it is reached");
            let (mut sender, mut receiver) = connection.open_control().await.expect("a stream");
            sender.send(&question(config(b).id)).await.expect("a question");
            let answer = receiver.receive().await.expect("an answer");
            endpoint.close().await;
            answer
        });
        assert!(
            matches!(&answer, Message::Refused(no) if no.refusal == Refusal::UnknownKey),
            "{what}: {answer:?}"
        );
        wait_until_heard(b, "c", &["a"]);
    }
}

#[test]
fn a_replica_that_was_away_when_it_was_removed_is_told_and_a_third_host_tells_the_primary() {
    let mut mirror = Mirror::new(16 * MIB, "none", &["b", "c"]);
    mirror.replicas[0].stop();
    mirror.wait_until_lost("b");
    // The primary is away as well: a replica that no primary writes to may remove somebody.
    mirror.replicas[1].refuse(&["remove-peer", "data", "b"], 5, &["a is the primary of data; there:"]);
    mirror.primary.stop();
    mirror.replicas[1].wait_until("the primary is lost", |status| {
        status.facts.peers.iter().all(|peer| peer.connection == Connection::Disconnected)
    });
    mirror.replicas[1].succeed(&["remove-peer", "data", "b"]);
    mirror.replicas[0].start();
    wait_until_it_knows(&mirror.replicas[0], "c");
    mirror.primary.start();
    wait_until_heard(&mirror.primary, "b", &["c"]);
    wait_until_it_knows(&mirror.replicas[0], "c");
}

#[test]
fn the_last_copy_is_not_removed_unless_the_operator_insists() {
    let mirror = Mirror::new(16 * MIB, "nbd", &["b"]);
    let words = ["b is the only replica of data that is in sync", "--force"];
    mirror.primary.refuse(&["remove-peer", "data", "b"], 5, &words);
    mirror.primary.refuse(&["remove-peer", "data", "nobody"], 4, &["no peer \"nobody\" of data"]);
    mirror.primary.succeed(&["mode", "data", "b", "sync"]);
    mirror.wait_until_in_sync();
    mirror.primary.succeed(&["remove-peer", "data", "b", "--force"]);
    // Nothing waits for it any more.
    mirror.client().write_durably(0, &stamped(1)).expect("a write");
    let status = mirror.primary.status();
    assert!(status.verdict.contains("no replica has joined"), "{status:?}");
    wait_until_it_knows(mirror.replica(), "a");
}

#[test]
fn a_token_from_standard_input_is_in_no_argument_and_one_that_was_revoked_is_of_no_use() {
    let mirror = Mirror::new(16 * MIB, "none", &[]);
    let (a, b) = (&mirror.primary, Host::new(&mirror.folder, "b"));
    let token = a.invite();
    let id = |line: &str| line.split_whitespace().next().expect("an id").to_owned();
    let list = a.succeed(&["invite", "data", "--list"]);
    assert!(list.contains("open") && list.contains("left") && !list.contains(&token), "{list}");
    a.succeed(&["invite", "data", "--revoke", &id(&list)]);
    let backing = b.backing();
    b.refuse(&["join", &token, "--backing", text(&backing)], 5, &["the token was revoked"]);
    a.refuse(&["invite", "data", "--revoke", "00"], 5, &["no invitation \"00\" of data"]);

    let token = a.invite();
    let mut command = Command::new(own("blockmirror"));
    command.arg("--run").arg(b.path("run")).args(["join", "-", "--backing", text(&backing)]);
    let mut join = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn().expect("the tool starts");
    // It waits for the token, so it can be looked at.
    let arguments = std::fs::read(format!("/proc/{}/cmdline", join.id())).expect("it is our process");
    assert!(!String::from_utf8_lossy(&arguments).contains(&token));
    writeln!(join.stdin.take().expect("a pipe"), "{token}").expect("it reads");
    assert!(join.wait().expect("it is our process").success(), "{}", b.log());
    mirror.wait_until_in_sync();
    let list = a.succeed(&["invite", "data", "--list"]);
    assert!(list.contains("revoked") && list.contains("used"), "{list}");

    let file = mirror.folder.join("token");
    std::fs::write(&file, a.invite()).expect("a file");
    let c = Host::new(&mirror.folder, "c");
    c.succeed(&["join", "--token-file", text(&file), "--backing", text(&c.backing())]);
}

/// Asks a host for a recovery of the volume `name`, with a key of one's own or that of `key`, and gives the answer.
async fn ask_to_recover(
    endpoint: &Endpoint,
    host: &Host,
    name: &str,
    secret: Option<[u8; 32]>,
) -> (Message, ControlReceiver, Transport) {
    let id = HostKey::load(&host.path("state/host.key")).expect("its key").id();
    let addresses = [host.link().address().to_string()];
    let connection = endpoint.connect(&addresses, id).await.expect("it is reached");
    let (mut sender, mut receiver) = connection.open_control().await.expect("a stream");
    let recover = Recover { name: name.to_owned(), secret, accept_inconsistent: false };
    sender.send(&recover.into()).await.expect("a question");
    (receiver.receive().await.expect("an answer"), receiver, connection)
}

fn in_a_runtime<Output>(work: impl Future<Output = Output>) -> Output {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(work)
}

fn bind(key: &HostKey) -> Endpoint {
    Endpoint::bind("127.0.0.1:0".parse().expect("an address"), key).expect("an endpoint")
}

#[test]
fn a_token_for_a_recovery_that_cannot_be_is_not_used_up_and_lets_nobody_read_later() {
    let mirror = Mirror::new(16 * MIB, "none", &["b"]);
    let a = &mirror.primary;
    let token = a.invite();
    let secret = Some(Token::parse(&token).expect("a token").secret.0);
    in_a_runtime(async {
        let endpoint = bind(&HostKey::ephemeral().expect("a key"));
        let refusal = async |name: &str, secret| match ask_to_recover(&endpoint, a, name, secret).await.0 {
            Message::Refused(no) => (no.refusal, no.text),
            answer => panic!("{answer:?}"),
        };
        assert_eq!(refusal("data", secret).await.0, Refusal::Role, "a primary gives nothing away");
        assert_eq!(refusal("data", None).await.0, Refusal::UnknownKey, "nor is the key let in by that");
        // Whoever has no right hears the same of a volume that is there and of one that is not.
        assert_eq!(refusal("data", None).await, refusal("none", None).await);
        let wrong = Some([7; 32]);
        assert_eq!(refusal("data", wrong).await, refusal("none", wrong).await);
        endpoint.close().await;
    });
    let c = Host::new(&mirror.folder, "c");
    c.succeed(&["join", &token, "--backing", text(&c.backing())]);
}

#[test]
fn a_recovery_that_nobody_reads_does_not_hold_up_a_forced_promotion_and_ends_with_its_token() {
    let mut mirror = Mirror::new(16 * MIB, "none", &["b"]);
    let b = &mirror.replicas[0];
    let token = b.invite();
    let secret = Some(Token::parse(&token).expect("a token").secret.0);
    mirror.primary.kill();
    b.wait_until("the primary is gone", |status| status.verdict.contains("is not connected"));
    in_a_runtime(async {
        let endpoint = bind(&HostKey::ephemeral().expect("a key"));
        let (answer, _stream, connection) = ask_to_recover(&endpoint, b, "data", secret).await;
        assert!(matches!(answer, Message::Recovering(_)), "{answer:?}");
        let list = b.succeed(&["invite", "data", "--list"]);
        let id = list.split_whitespace().next().expect("an id");
        b.succeed(&["invite", "data", "--revoke", id]);
        connection.closed().await;
        endpoint.close().await;

        let key = HostKey::load(&mirror.primary.path("state/host.key")).expect("its key");
        let endpoint = bind(&key);
        let (answer, _stream, connection) = ask_to_recover(&endpoint, b, "data", None).await;
        assert!(matches!(answer, Message::Recovering(_)), "{answer:?}");
        b.refuse(&["promote", "data"], 5, &["a recovery reads this replica", "--force ends it"]);
        b.succeed(&["promote", "data", "--force"]);
        connection.closed().await;
        endpoint.close().await;
    });
}

/// What a host that does not answer is asked on a connection, until that ends.
async fn note_questions(connection: Transport, asked: mpsc::UnboundedSender<Message>) {
    while let Ok(incoming) = connection.accept().await {
        let Incoming::Control(_sender, mut receiver) = incoming else { continue };
        if let Ok(question) = receiver.receive().await {
            // The test may have ended.
            let _ = asked.send(question);
        }
    }
}

/// It asked each host twice every five seconds.
#[test]
fn a_replica_that_is_alone_asks_each_host_once_at_a_time_who_the_hosts_are() {
    let mut mirror = Mirror::new(16 * MIB, "none", &["b", "c"]);
    mirror.replicas[1].stop();
    let key = HostKey::load(&mirror.replicas[1].path("state/host.key")).expect("the key of c");
    mirror.primary.kill();
    in_a_runtime(async {
        let endpoint = bind(&key);
        mirror.replicas[1].link().lead_to(endpoint.local_address());
        let (asked, mut questions) = mpsc::unbounded_channel();
        let dialled = endpoint.clone();
        tokio::spawn(async move {
            while let Some(connection) = dialled.accept().await {
                tokio::spawn(note_questions(connection, asked.clone()));
            }
        });
        let (mut standings, mut members) = (0, 0);
        while standings < 3 {
            match questions.recv().await.expect("b asks") {
                Message::AskStanding(_) => standings += 1,
                Message::AskMembers(_) => members += 1,
                _ => {}
            }
        }
        assert!((2..=3).contains(&members), "{members}");
        endpoint.close().await;
    });
}
