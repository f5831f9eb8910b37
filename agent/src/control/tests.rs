//! The control socket from the outside: who gets it, and what raw requests are answered.

use super::api::{Failure, FailureKind, HostStatus, STATUS_SCHEMA, StatusReply};
use super::verbs::{CarryOut, Subject, Verb, table};
use super::*;
use crate::config::Name;
use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::Notify;

/// Knows one volume, "data", and nothing else. A comparison with "endless" begins and is never done.
#[derive(Default)]
struct Fake {
    comparison_began: Notify,
    comparison_was_dropped: Arc<Notify>,
}

struct OnDrop(Arc<Notify>);

impl Drop for OnDrop {
    fn drop(&mut self) {
        self.0.notify_one();
    }
}

/// Answers every verb of the table.
impl<V: Verb> CarryOut<V> for Fake {
    async fn carry_out(&self, subject: V::Subject, request: V) -> Result<V::Reply, Failure> {
        let names = subject.names();
        let said = serde_json::to_value(&request).unwrap();
        if (V::WORD, &names[..]) == ("compare", &["data", "endless"]) {
            let _guard = OnDrop(self.comparison_was_dropped.clone());
            self.comparison_began.notify_one();
            std::future::pending::<()>().await;
        }
        let text = |field: &str| said[field].as_str().unwrap_or_default();
        let name = |text: &str| text.parse::<Name>().unwrap();
        let failure = match V::WORD {
            "status" => match subject.query().filter(|query| query != "volume=data") {
                None => return Ok(serde_json::from_value(status()).unwrap()),
                Some(query) => Failure::no_such_volume(&name(query.strip_prefix("volume=").unwrap())),
            },
            "volumes" => Failure::new(FailureKind::Refused, format!("{} is mounted", text("backing"))),
            "join" => Failure::new(FailureKind::Timeout, "the primary does not answer"),
            "invite" => Failure::new(FailureKind::Failed, "no address"),
            "promote" | "release" => {
                let message = format!("{} is in use; force: {}", names[0], said["force"]);
                Failure::new(FailureKind::Refused, message)
            }
            "switch" => Failure::no_such_peer(&name(names[0]), &name(text("to"))),
            "resolve" => Failure::no_such_peer(&name(names[0]), &name(text("keep"))),
            _ => match names[..] {
                [volume, peer] => Failure::no_such_peer(&name(volume), &name(peer)),
                _ => Failure::no_such_volume(&name(names[0])),
            },
        };
        Err(failure)
    }
}

/// The status of a host without volumes.
fn status() -> serde_json::Value {
    let host = HostStatus { name: "a".parse().unwrap(), fingerprint: None, version: None, listen: None };
    let reply = StatusReply { schema: STATUS_SCHEMA.to_owned(), host, volumes: Vec::new() };
    serde_json::to_value(reply).unwrap()
}

fn record() -> AgentRecord {
    AgentRecord {
        pid: 7,
        config: "/etc/blockmirror".into(),
        state: "/var/lib/blockmirror".into(),
        listen: "0.0.0.0:7447".parse().unwrap(),
    }
}

#[test]
fn one_agent_owns_a_run_folder_and_the_next_replaces_what_it_left() {
    let temporary = tempfile::tempdir().unwrap();
    let run = temporary.path().join("run/blockmirror");
    let first = ControlSocket::claim(&run, &record()).unwrap();
    let mode = std::fs::metadata(socket_path(&run)).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let read = std::fs::read(record_path(&run)).unwrap();
    assert_eq!(serde_json::from_slice::<AgentRecord>(&read).unwrap(), record());
    let second = ControlSocket::claim(&run, &record());
    assert!(matches!(second, Err(ControlError::AgentRunning(folder)) if folder == run));
    assert!(socket_path(&run).exists(), "a second agent leaves the first one's socket alone");
    drop(first);
    assert!(!socket_path(&run).exists());
    assert!(record_path(&run).exists(), "the tool finds a stopped agent's folders");
    // A killed agent leaves its socket.
    drop(UnixListener::bind(socket_path(&run)).unwrap());
    assert!(socket_path(&run).exists());
    let third = ControlSocket::claim(&run, &record()).unwrap();
    std::os::unix::net::UnixStream::connect(socket_path(&run)).unwrap();
    drop(third);
}

/// The status and body that a request gets.
async fn ask(run: &Path, method: &str, path: &str, body: &str) -> (u16, String) {
    let mut stream = tokio::net::UnixStream::connect(socket_path(run)).await.unwrap();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: agent\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.unwrap();
    // The agent may answer before it has read a body that is too long.
    let _ = stream.write_all(body.as_bytes()).await;
    let mut answer = Vec::new();
    let _ = stream.read_to_end(&mut answer).await;
    let answer = String::from_utf8(answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

#[tokio::test]
async fn requests_are_checked_before_they_reach_an_operation() {
    let temporary = tempfile::tempdir().unwrap();
    let run = temporary.path();
    let socket = ControlSocket::claim(run, &record()).unwrap();
    let questions = async {
        let create = r#"{"name":"data","backing":"/dev/vdb","size_bytes":null,"devices":["nbd"],"block_size_bytes":null}"#;
        let long = " ".repeat(BODY_TOO_LONG_BYTES);
        let table = [
            ("GET", "/v1/status", "", 200, r#""schema":"blockmirror/status/v1""#),
            ("GET", "/v1/status?volume=data", "", 200, r#""volumes":[]"#),
            ("GET", "/v1/status?volume=other", "", 404, r#"no volume \"other\""#),
            ("GET", "/v1/status?volume=..", "", 400, "is not a name"),
            ("GET", "/v1/status?nonsense", "", 400, "usage"),
            ("POST", "/v1/status", "", 400, "does not know this request"),
            ("GET", "/v2/status", "", 400, "does not know this request"),
            ("POST", "/v1/volumes", create, 409, "/dev/vdb is mounted"),
            ("POST", "/v1/volumes", "{}", 400, "missing field `name`"),
            ("POST", "/v1/volumes", "{", 400, "usage"),
            ("POST", "/v1/volumes", &create.replace("nbd", "fuse"), 400, "unknown variant `fuse`"),
            ("POST", "/v1/volumes", &create.replace("devices", "device"), 400, "unknown field `device`"),
            ("POST", "/v1/volumes", &long, 400, "usage"),
            ("POST", "/v1/join", r#"{"token":"t","backing":"/b","overwrite":false}"#, 504, "timeout"),
            (
                "POST",
                "/v1/volumes/data/invite",
                r#"{"expires_seconds":1,"addresses":["b"]}"#,
                400,
                "is not an address",
            ),
            (
                "POST",
                "/v1/volumes/data/invite",
                r#"{"expires_seconds":1,"addresses":["b:1"]}"#,
                500,
                "no address",
            ),
            ("GET", "/v1/volumes/DATA/peers", "", 400, "is not a name"),
            ("GET", "/v1/volumes/%2e%2e/peers", "", 400, "is not a name"),
            ("GET", "/v1/volumes/%ff/peers", "", 400, "usage"),
            ("POST", "/v1/volumes/data/peers/b/pause", "", 404, r#"no peer \"b\" of data"#),
            ("POST", "/v1/volumes/data/peers/b/resume", "", 404, "no peer"),
            ("POST", "/v1/volumes/data/peers/b/compare", "", 404, "no peer"),
            ("POST", "/v1/volumes/data/peers/b/mode", r#"{"mode":"sync"}"#, 404, "no peer"),
            ("POST", "/v1/volumes/data/peers/b/tune", r#"{"compression":"lz4"}"#, 404, "no peer"),
            ("POST", "/v1/volumes/data/peers/b/mode", r#"{"mode":"often"}"#, 400, "unknown variant"),
            ("POST", "/v1/volumes/data/promote", r#"{"force":true}"#, 409, "force: true"),
            ("POST", "/v1/volumes/data/promote", "", 400, "usage"),
            ("POST", "/v1/volumes/data/demote", "", 404, "no-such-volume"),
            ("POST", "/v1/volumes/data/switch", r#"{"to":"b"}"#, 404, r#"no peer \"b\" of data"#),
            ("POST", "/v1/volumes/data/switch", r#"{"to":".."}"#, 400, "is not a name"),
            (
                "POST",
                "/v1/volumes/data/resolve",
                r#"{"keep":"b","dry_run":true}"#,
                404,
                r#"no peer \"b\" of data"#,
            ),
            ("POST", "/v1/volumes/data/undo", "", 404, "no-such-volume"),
            ("POST", "/v1/volumes/data/forget", "", 404, "no-such-volume"),
            ("POST", "/v1/volumes/data/release", r#"{"force":true}"#, 409, "data is in use; force: true"),
            ("POST", "/v1/volumes/data/release", "{}", 400, "missing field"),
            ("POST", "/v1/volumes/data/resolve", r#"{"keep":"b"}"#, 400, "missing field"),
        ];
        for (method, path, body, status, part) in table {
            let answer = ask(run, method, path, body).await;
            assert!(answer.0 == status && answer.1.contains(part), "{method} {path}: {answer:?}");
        }
    };
    tokio::select! {
        ended = socket.serve(Arc::new(Fake::default())) => panic!("the server ended: {ended:?}"),
        () = questions => {}
    }
}

#[test]
fn no_two_verbs_are_asked_for_at_one_place() {
    let mut places = BTreeSet::new();
    for row in table() {
        let place = (row.method.to_string(), row.pattern.clone());
        assert!(places.insert(place), "another verb is asked for where {row:?} is");
    }
}

#[tokio::test]
async fn each_verb_of_the_table_is_answered() {
    let temporary = tempfile::tempdir().unwrap();
    let run = temporary.path();
    let socket = ControlSocket::claim(run, &record()).unwrap();
    let questions = async {
        for row in table() {
            let path = row.pattern.replace(['{', '}'], "");
            let answer = ask(run, row.method.as_str(), &path, "").await;
            assert!(!answer.1.contains("does not know this request"), "{row:?}: {answer:?}");
        }
    };
    tokio::select! {
        ended = socket.serve(Arc::new(Fake::default())) => panic!("the server ended: {ended:?}"),
        () = questions => {}
    }
}

#[tokio::test]
async fn an_operation_is_dropped_when_the_tool_goes_away() {
    let temporary = tempfile::tempdir().unwrap();
    let run = temporary.path();
    let socket = ControlSocket::claim(run, &record()).unwrap();
    let fake = Arc::new(Fake::default());
    let interrupted = async {
        tokio::select! {
            answer = ask(run, "POST", "/v1/volumes/data/peers/endless/compare", "") => panic!("{answer:?}"),
            () = fake.comparison_began.notified() => {}
        }
        fake.comparison_was_dropped.notified().await;
    };
    tokio::select! {
        ended = socket.serve(fake.clone()) => panic!("the server ended: {ended:?}"),
        () = interrupted => {}
    }
}

/// More than the server takes, and more than a socket buffers.
const BODY_TOO_LONG_BYTES: usize = 1 << 20;
