//! The control socket from the outside: who gets it, and what raw requests are answered.

use super::api::{FailureKind, HostStatus, STATUS_SCHEMA};
use super::*;
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

impl Operations for Fake {
    async fn status(&self, volume: Option<Name>) -> Result<StatusReply, Failure> {
        if let Some(name) = volume.filter(|name| name.as_str() != "data") {
            return Err(Failure::no_such_volume(&name));
        }
        let host = HostStatus { name: "a".parse().unwrap(), fingerprint: None, version: None, listen: None };
        Ok(StatusReply { schema: STATUS_SCHEMA.to_owned(), host, volumes: Vec::new() })
    }

    async fn create(&self, request: CreateRequest) -> Result<StatusReply, Failure> {
        Err(Failure::new(FailureKind::Refused, format!("{} is mounted", request.backing.display())))
    }

    async fn invite(&self, _: Name, _: InviteRequest) -> Result<Invitation, Failure> {
        Err(Failure::new(FailureKind::Failed, "no address"))
    }

    async fn invitations(&self, volume: Name) -> Result<InvitationsReply, Failure> {
        Err(Failure::no_such_volume(&volume))
    }

    async fn revoke(&self, volume: Name, _: String) -> Result<InvitationsReply, Failure> {
        Err(Failure::no_such_volume(&volume))
    }

    async fn remove_peer(
        &self,
        volume: Name,
        peer: Name,
        _: RemovePeerRequest,
    ) -> Result<PeerRemoval, Failure> {
        Err(Failure::no_such_peer(&volume, &peer))
    }

    async fn join(&self, _: JoinRequest) -> Result<StatusReply, Failure> {
        Err(Failure::new(FailureKind::Timeout, "the primary does not answer"))
    }

    async fn peers(&self, volume: Name) -> Result<PeersReply, Failure> {
        Err(Failure::no_such_volume(&volume))
    }

    async fn pause(&self, volume: Name, peer: Name) -> Result<PeerStatus, Failure> {
        Err(Failure::no_such_peer(&volume, &peer))
    }

    async fn resume(&self, volume: Name, peer: Name) -> Result<PeerStatus, Failure> {
        Err(Failure::no_such_peer(&volume, &peer))
    }

    async fn set_mode(&self, volume: Name, peer: Name, _: ModeRequest) -> Result<PeerStatus, Failure> {
        Err(Failure::no_such_peer(&volume, &peer))
    }

    async fn tune(&self, volume: Name, peer: Name, _: TuneRequest) -> Result<PeerStatus, Failure> {
        Err(Failure::no_such_peer(&volume, &peer))
    }

    async fn set_address(&self, volume: Name, peer: Name, _: AddressRequest) -> Result<PeerStatus, Failure> {
        Err(Failure::no_such_peer(&volume, &peer))
    }

    async fn promote(&self, volume: Name, request: PromoteRequest) -> Result<Promotion, Failure> {
        Err(Failure::new(FailureKind::Refused, format!("{volume} has a primary; force: {}", request.force)))
    }

    async fn demote(&self, volume: Name) -> Result<Demotion, Failure> {
        Err(Failure::no_such_volume(&volume))
    }

    async fn switch(&self, volume: Name, request: SwitchRequest) -> Result<Switch, Failure> {
        Err(Failure::no_such_peer(&volume, &request.to))
    }

    async fn resolve(&self, volume: Name, request: ResolveRequest) -> Result<Resolution, Failure> {
        Err(Failure::no_such_peer(&volume, &request.keep))
    }

    async fn undo(&self, volume: Name) -> Result<Undoing, Failure> {
        Err(Failure::no_such_volume(&volume))
    }

    async fn forget(&self, volume: Name) -> Result<Forgetting, Failure> {
        Err(Failure::no_such_volume(&volume))
    }

    async fn release(&self, volume: Name, request: ReleaseRequest) -> Result<Release, Failure> {
        Err(Failure::new(FailureKind::Refused, format!("{volume} is in use; force: {}", request.force)))
    }

    async fn compare(&self, volume: Name, peer: Name) -> Result<Comparison, Failure> {
        if peer.as_str() == "endless" {
            let _guard = OnDrop(self.comparison_was_dropped.clone());
            self.comparison_began.notify_one();
            std::future::pending::<()>().await;
        }
        Err(Failure::no_such_peer(&volume, &peer))
    }
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
