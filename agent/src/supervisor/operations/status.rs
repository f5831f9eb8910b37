//! How things stand, as far as the volumes tell in time.

use super::Operator;
use crate::config::{Name, VolumeConfig};
use crate::control::api::{
    Failure, HostStatus, Hung, PEERS_SCHEMA, PeerState, PeerStatus, PeersReply, PeersRequest, STATUS_SCHEMA,
    StatusReply, StatusRequest, VolumeFacts, VolumeStatus,
};
use crate::control::verbs::CarryOut;
use crate::supervisor::Supervisor;
use crate::verdict;
use crate::volume::Handle;
use std::time::Duration;
use tokio::task::JoinSet;

/// How long a volume may take to tell its facts: whoever asks is told within a second what is known.
const FACTS_TIME: Duration = Duration::from_millis(900);

impl CarryOut<StatusRequest> for Operator {
    async fn carry_out(&self, volume: Option<Name>, _: StatusRequest) -> Result<StatusReply, Failure> {
        let names = match volume {
            Some(name) => vec![name],
            None => {
                let mut names: Vec<Name> = self.0.volumes.lock().await.keys().cloned().collect();
                names.extend(self.0.lock_mistakes().keys().cloned());
                names
            }
        };
        self.0.status_of(names).await
    }
}

impl CarryOut<PeersRequest> for Operator {
    async fn carry_out(&self, volume: Name, _: PeersRequest) -> Result<PeersReply, Failure> {
        let reply = self.0.status_of(vec![volume.clone()]).await?;
        let peers = reply.volumes.into_iter().flat_map(|volume| volume.facts.peers).collect();
        Ok(PeersReply { schema: PEERS_SCHEMA.to_owned(), volume, peers })
    }
}

impl Supervisor {
    pub(in crate::supervisor) async fn status_of(&self, names: Vec<Name>) -> Result<StatusReply, Failure> {
        // All at once: one that is silent makes only its own line late.
        let (mut asked, mut wrong) = (JoinSet::new(), Vec::new());
        for name in names {
            if let Some(mistake) = self.mistake_of(&name) {
                wrong.push(verdict::misconfigured(name, mistake));
                continue;
            }
            let (handle, config) = (self.handle_of(&name).await?, self.config_of_name(&name).await?);
            let twins: Vec<_> = config.peers.iter().map(|peer| self.twins(peer.host)).collect();
            asked.spawn(async move {
                let mut facts = facts_of(&handle, &config).await;
                for (peer, places) in facts.peers.iter_mut().zip(twins) {
                    if places.is_some() {
                        (peer.state, peer.error) = (Some(PeerState::Twins), places);
                    }
                }
                verdict::running(facts)
            });
        }
        let mut volumes = asked.join_all().await;
        volumes.extend(wrong);
        volumes.sort_by(|one, other| one.facts.name.cmp(&other.facts.name));
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

    pub(in crate::supervisor) async fn one_status(&self, volume: &Name) -> Result<VolumeStatus, Failure> {
        let reply = self.status_of(vec![volume.clone()]).await?;
        reply.volumes.into_iter().next().ok_or_else(|| Failure::no_such_volume(volume))
    }

    pub(super) async fn peer_status(&self, volume: Name, peer: Name) -> Result<PeerStatus, Failure> {
        let reply = self.status_of(vec![volume.clone()]).await?;
        let peers = reply.volumes.into_iter().flat_map(|volume| volume.facts.peers);
        peers
            .into_iter()
            .find(|status| status.name == peer)
            .ok_or_else(|| Failure::no_such_peer(&volume, &peer))
    }
}

/// What is known of a volume, soon.
async fn facts_of(handle: &Handle, config: &VolumeConfig) -> VolumeFacts {
    let (known, silence) = match handle.facts(FACTS_TIME).await {
        Ok(facts) => return facts,
        Err(silent) => silent,
    };
    let mut facts = known.unwrap_or_else(|| VolumeFacts::unknown(config));
    if handle.has_opened() || silence.is_hung() {
        facts.health.hung = Some(Hung { what: silence.what(), seconds: silence.lasted.as_secs() });
    } else {
        facts.succession.change = Some("opening the volume".to_owned());
    }
    facts
}
