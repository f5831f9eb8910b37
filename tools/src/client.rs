//! The way to the agent: HTTP over its Unix socket, one connection per request.

use blockmirror_agent::config::Name;
use blockmirror_agent::control::api::{Failure, FailureKind, StatusReply, StatusRequest};
use blockmirror_agent::control::socket_path;
use blockmirror_agent::control::verbs::Verb;
use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper::{Request, Response, body::Incoming};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::net::UnixStream;

/// An agent that doesn't tell its status within this time hangs.
const STATUS_TIMEOUT: Duration = Duration::from_secs(10);

/// Knows where the agent listens.
pub struct Client {
    run: PathBuf,
}

impl Client {
    /// A client of the agent with this run folder.
    pub fn new(run: PathBuf) -> Self {
        Self { run }
    }

    /// The agent's run folder.
    pub fn run(&self) -> &Path {
        &self.run
    }

    /// How things stand, for all volumes or one.
    pub async fn status(&self, volume: Option<&Name>) -> Result<StatusReply, Failure> {
        match tokio::time::timeout(STATUS_TIMEOUT, self.ask(&volume.cloned(), &StatusRequest)).await {
            Ok(reply) => reply,
            Err(_) => {
                let message = "the agent does not answer; look at its log: journalctl -u blockmirror-agent";
                Err(Failure::new(FailureKind::Timeout, message))
            }
        }
    }

    /// Asks for something, or to do something.
    pub async fn ask<V: Verb>(&self, subject: &V::Subject, request: &V) -> Result<V::Reply, Failure> {
        // The only values that cannot be written are paths that are not UTF-8.
        let body = request.body().map_err(|error| Failure::from_error(FailureKind::Usage, &error))?;
        let stream = self.connect().await?;
        let request = Request::builder()
            .method(V::METHOD)
            .uri(V::address(subject))
            .header("host", "agent")
            .header("content-type", "application/json")
            .body(Full::new(body.into()))
            .expect("names and constants make a valid request");
        let response = exchange(stream, request).await.map_err(|error| {
            let lost = Failure::from_error(FailureKind::Failed, &error);
            let message = format!("the agent went away before it answered; look at its status ({lost})");
            Failure::new(FailureKind::Failed, message)
        })?;
        understand(response)
    }

    async fn connect(&self) -> Result<UnixStream, Failure> {
        let path = socket_path(&self.run);
        UnixStream::connect(&path).await.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Failure::new(
                FailureKind::AgentNotRunning,
                format!(
                    "the agent is not running (no socket at {}); start blockmirror-agent",
                    path.display()
                ),
            ),
            io::ErrorKind::PermissionDenied => Failure::new(
                FailureKind::Failed,
                format!("no right to open {}; run this command as root", path.display()),
            ),
            _ => Failure::new(FailureKind::Failed, format!("cannot open {}: {error}", path.display())),
        })
    }
}

/// Sends a request and reads the whole answer.
async fn exchange(stream: UnixStream, request: Request<Full<Bytes>>) -> hyper::Result<Response<Bytes>> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let answered = async {
        let (head, body): (_, Incoming) = sender.send_request(request).await?.into_parts();
        Ok(Response::from_parts(head, body.collect().await?.to_bytes()))
    };
    // The connection is driven here and not in a task of its own, so that it ends with the request.
    tokio::pin!(answered, connection);
    tokio::select! {
        biased;
        answer = &mut answered => answer,
        ended = &mut connection => { ended?; answered.await }
    }
}

fn understand<T: DeserializeOwned>(response: Response<Bytes>) -> Result<T, Failure> {
    let unknown = |_| {
        let message = "the agent's answer is not understood; use a tool of the agent's version";
        Failure::new(FailureKind::Failed, message)
    };
    if response.status().is_success() {
        return serde_json::from_slice(response.body()).map_err(unknown);
    }
    Err(serde_json::from_slice(response.body()).unwrap_or_else(unknown))
}
