//! What the operator asks for, one answer each.

use super::{Supervisor, failed};
use crate::config::{Name, Role};
use crate::control::Operations;
use crate::control::api::{
    COMPARISON_SCHEMA, Comparison, CreateRequest, Difference, Failure, FailureKind, HostStatus, Invitation,
    InviteRequest, JoinRequest, PEERS_SCHEMA, PeerStatus, PeersReply, STATUS_SCHEMA, StatusReply,
};
use crate::verdict;
use crate::volume::Ask;
use blockmirror_protocol::session::CompareResult;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// How long a volume may take to tell its facts.
const FACTS_TIME: Duration = Duration::from_secs(5);
/// How many ranges an answer lists at most.
const LISTED_RANGES: usize = 100;

/// The operator's view of a supervisor.
pub struct Operator(pub Arc<Supervisor>);

impl Supervisor {
    pub(super) async fn status_of(&self, names: Vec<Name>) -> Result<StatusReply, Failure> {
        let mut volumes = Vec::new();
        for name in names {
            let handle = self.handle_of(&name).await?;
            let facts = tokio::time::timeout(FACTS_TIME, handle.answer(Ask::Facts)).await;
            let facts = facts.ok().flatten().ok_or_else(|| {
                failed(format!("the volume {name} does not answer: its disk hangs; see the agent's log"))
            })?;
            volumes.push(verdict::running(facts));
        }
        Ok(StatusReply {
            schema: STATUS_SCHEMA.to_owned(),
            host: HostStatus {
                name: self.name.clone(),
                fingerprint: Some(self.endpoint.id().to_string()),
                version: Some(env!("CARGO_PKG_VERSION").to_owned()),
                listen: Some(self.endpoint.local_address()),
            },
            volumes,
        })
    }

    async fn set_paused(&self, volume: Name, peer: Name, paused: bool) -> Result<PeerStatus, Failure> {
        let host = self.peer_of(&volume, &peer).await?.host;
        self.change_config(&volume, |config| {
            for peer in config.peers.iter_mut().filter(|peer| peer.host == host) {
                peer.paused = paused;
            }
        })
        .await?;
        let reply = self.status_of(vec![volume.clone()]).await?;
        let peers = reply.volumes.into_iter().flat_map(|volume| volume.facts.peers);
        peers
            .into_iter()
            .find(|status| status.name == peer)
            .ok_or_else(|| Failure::no_such_peer(&volume, &peer))
    }
}

impl Operations for Operator {
    async fn status(&self, volume: Option<Name>) -> Result<StatusReply, Failure> {
        let names = match volume {
            Some(name) => vec![name],
            None => self.0.volumes.lock().await.keys().cloned().collect(),
        };
        self.0.status_of(names).await
    }

    async fn create(&self, request: CreateRequest) -> Result<StatusReply, Failure> {
        // A tool that goes away leaves the volume whole, not half made.
        let supervisor = self.0.clone();
        finish(tokio::spawn(async move { supervisor.make(request).await })).await
    }

    async fn invite(&self, volume: Name, request: InviteRequest) -> Result<Invitation, Failure> {
        self.0.invite_to(volume, request).await
    }

    async fn join(&self, request: JoinRequest) -> Result<StatusReply, Failure> {
        let supervisor = self.0.clone();
        finish(tokio::spawn(async move { supervisor.join_with(request).await })).await
    }

    async fn peers(&self, volume: Name) -> Result<PeersReply, Failure> {
        let reply = self.0.status_of(vec![volume.clone()]).await?;
        let peers = reply.volumes.into_iter().flat_map(|volume| volume.facts.peers).collect();
        Ok(PeersReply { schema: PEERS_SCHEMA.to_owned(), volume, peers })
    }

    async fn pause(&self, volume: Name, peer: Name) -> Result<PeerStatus, Failure> {
        self.0.set_paused(volume, peer, true).await
    }

    async fn resume(&self, volume: Name, peer: Name) -> Result<PeerStatus, Failure> {
        self.0.set_paused(volume, peer, false).await
    }

    async fn compare(&self, volume: Name, peer: Name) -> Result<Comparison, Failure> {
        let known = self.0.peer_of(&volume, &peer).await?;
        if known.role == Role::Primary {
            let text = format!(
                "{peer} is the primary; a comparison runs there: on {peer}, compare {volume} with this host"
            );
            return Err(Failure::new(FailureKind::Refused, text));
        }
        let host = known.host;
        let handle = self.0.handle_of(&volume).await?;
        let began = Instant::now();
        let result = handle.answer(|answer| Ask::Compare(host, answer)).await.flatten();
        let result = result.ok_or_else(|| {
            let text = format!(
                "{peer} is not in sync, or fell out of it while it was compared; \
                 run `blockmirror wait {volume} --for in-sync` on the primary and compare again"
            );
            Failure::new(FailureKind::Refused, text)
        })?;
        Ok(comparison(volume, peer, &result, began))
    }
}

fn comparison(volume: Name, peer: Name, result: &CompareResult, began: Instant) -> Comparison {
    let different_bytes = result.different.iter().map(|range| range.length).sum();
    let (verdict, action) =
        verdict::comparison(&volume, &peer, result.compared_bytes, different_bytes, different_bytes > 0);
    let ranges = result.different.iter().take(LISTED_RANGES);
    Comparison {
        schema: COMPARISON_SCHEMA.to_owned(),
        volume,
        peer,
        compared_bytes: result.compared_bytes,
        different_bytes,
        ranges: ranges.map(|range| Difference { offset: range.offset, length: range.length }).collect(),
        seconds: began.elapsed().as_secs(),
        verdict,
        action,
    }
}

async fn finish(task: JoinHandle<Result<StatusReply, Failure>>) -> Result<StatusReply, Failure> {
    task.await.unwrap_or_else(|_| Err(failed("the agent failed inside; see its log")))
}
