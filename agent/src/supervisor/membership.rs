//! Members that are removed (X3): by the operator here, or as others tell. The key of one that was removed is listened to no
//! more, its connections end, and whoever asks hears of it.

use super::learning::Lesson;
use super::operations::{Operator, finish};
use super::rebuilding::must_not_be_source;
use super::{Supervisor, refused};
use crate::config::{Mode, OnReplicaLoss, PeerConfig, Role, VolumeConfig};
use crate::control::api::{
    Connection as Link, Failure, PEER_REMOVAL_SCHEMA, PeerRemoval, PeerStatus, RemovePeerRequest,
    VolumeStatus,
};
use crate::control::verbs::{CarryOut, PeerOf};
use crate::quantity::unix_seconds;
use crate::standing;
use crate::transport::Connection;
use crate::verdict;
use crate::volume::{Ask, Handle, Learned};
use blockmirror_protocol::membership;
use blockmirror_protocol::terms::Fence;
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::{AskMembers, Member, Members, Refused};
use std::time::Duration;

/// How long others may take to say whether whoever comes was removed. What it wants waits for that.
const HEARSAY_TIME: Duration = Duration::from_secs(1);
/// How long a volume may take to end its sessions with a host: news of other volumes wait for it.
const PART_TIME: Duration = Duration::from_secs(2);

/// What of a host was listened to.
pub(super) struct Heard {
    connection: Connection,
    /// The fence of its last greeting.
    fence: Option<Fence>,
}

impl CarryOut<RemovePeerRequest> for Operator {
    async fn carry_out(&self, peer: PeerOf, request: RemovePeerRequest) -> Result<PeerRemoval, Failure> {
        let supervisor = self.0.clone();
        finish(tokio::spawn(async move { supervisor.remove_peer(peer, request).await })).await
    }
}

impl Supervisor {
    /// Removes a host from a volume, or says what that would do.
    async fn remove_peer(
        &self,
        PeerOf { volume, peer }: PeerOf,
        request: RemovePeerRequest,
    ) -> Result<PeerRemoval, Failure> {
        let removed = self.peer_of(&volume, &peer).await?;
        let status = self.one_status(&volume).await?;
        let blocks = self.config_of_name(&volume).await?.on_replica_loss == OnReplicaLoss::Block;
        // By force as well: what is absent would be nowhere.
        must_not_be_source(&status, &peer)?;
        if let Some(text) = objection(&status, &removed, blocks).filter(|_| !request.force) {
            return Err(refused(text));
        }
        if !request.dry_run {
            self.change_config(&volume, |config| config.remove(removed.host, &self.name, unix_seconds()))
                .await?;
            tracing::info!(%volume, %peer, "removed from the volume by the operator");
        }
        let others = status.facts.peers.iter().filter(|other| other.name != peer);
        let (told, untold): (Vec<&PeerStatus>, Vec<&PeerStatus>) = others
            .partition(|other| status.facts.role == Role::Primary && other.connection == Link::Connected);
        let names =
            |peers: Vec<&PeerStatus>| peers.iter().map(|peer| peer.name.to_string()).collect::<Vec<_>>();
        let (told, untold) = (names(told), names(untold));
        let verdict = verdict::peer_removal(&volume, &peer, &told, &untold, !request.dry_run);
        Ok(PeerRemoval {
            schema: PEER_REMOVAL_SCHEMA.to_owned(),
            volume,
            peer,
            done: !request.dry_run,
            told,
            untold,
            verdict,
        })
    }

    /// Leaves hosts that are peers of a volume no more. A connection that no other volume shares ends.
    pub(super) async fn part(&self, handle: &Handle, hosts: Vec<HostId>) {
        for host in &hosts {
            // No answer means that the volume's thread has ended, and its sessions with it, or that it hangs.
            let _ = tokio::time::timeout(PART_TIME, handle.answer(|answer| Ask::Part(*host, answer))).await;
            if !self.knows(*host).await {
                self.peers.disconnect(*host);
            }
        }
        if !hosts.is_empty() {
            self.parted.send_replace(());
        }
    }

    /// Who the volume's hosts are, for one of them, or for one that was removed.
    pub(super) async fn tell_members(&self, ask: AskMembers, asker: HostId) -> Result<Members, Refused> {
        let config = self.config_of(ask.volume).await.ok_or_else(super::admission::unknown_volume)?;
        if let Some(removal) = config.told_removal_of(asker) {
            return Ok(Members { members: Vec::new(), removed: vec![removal] });
        }
        if config.peers.iter().all(|peer| peer.host != asker) {
            return Err(super::incoming::unknown_key(&config, asker));
        }
        Ok(self.members_of(&config))
    }

    /// Every host of a volume, this one first, and those that were removed.
    pub(super) fn members_of(&self, config: &VolumeConfig) -> Members {
        let own = Member { version: config.version, ..self.own_member() };
        let members = std::iter::once(own).chain(config.members()).collect();
        Members { members, removed: config.removals().collect() }
    }

    /// Before anything is done for a host that comes over a new connection, or greets with a new fence: hears from all others
    /// that can be reached whether it was removed while this host was away. Says whether it is a member. `fence` is that of
    /// its greeting, where it greets.
    pub(super) async fn may_be_heard(
        &self,
        config: &VolumeConfig,
        fence: Option<Fence>,
        connection: &Connection,
    ) -> bool {
        let (volume, peer) = (config.id, connection.peer());
        if config.peers.iter().all(|known| known.host != peer) {
            return false;
        }
        let is_known =
            |heard: &Heard| heard.connection.is_same(connection) && (fence.is_none() || fence == heard.fence);
        if self.heard.lock().await.get(&(volume, peer)).is_some_and(is_known) {
            return true;
        }
        let others: Vec<PeerConfig> =
            config.peers.iter().filter(|other| other.host != peer).cloned().collect();
        let removals = standing::ask_removals(&self.peers, volume, others, HEARSAY_TIME).await;
        if !removals.is_empty() {
            self.learn(&config.name, Lesson::Found(Learned::Removals(removals.clone())));
        }
        // A removal that can't be saved holds all the same.
        let is_removed = |known: &PeerConfig| {
            let mut told = removals.iter().filter(|removal| removal.host == known.host);
            told.any(|removal| membership::is_removal(removal.version, known.version))
        };
        let peers = self.config_of(volume).await.map(|config| config.peers).unwrap_or_default();
        let is_member = peers.iter().any(|known| known.host == peer && !is_removed(known));
        if is_member {
            let heard = Heard { connection: connection.clone(), fence };
            self.heard.lock().await.insert((volume, peer), heard);
        }
        is_member
    }
}

/// Why a host is not removed here and now, unless the operator insists. `blocks`: the volume's primary waits for replicas.
fn objection(status: &VolumeStatus, removed: &PeerConfig, blocks: bool) -> Option<String> {
    let (facts, name, host) = (&status.facts, &status.facts.name, &removed.name);
    if facts.role == Role::Replica {
        let primary = facts.peers.iter().find(|peer| peer.role == Role::Primary);
        let is_primary = primary.is_some_and(|primary| primary.name == *host);
        let Some(primary) = primary.filter(|primary| primary.connection == Link::Connected) else {
            // Only the primary knows whether it was.
            return (blocks && !is_primary && removed.mode == Mode::Sync).then(|| {
                format!(
                    "{host} may have been promised that nothing is answered without it (on_replica_loss = \"block\"), and need \
                     not hear that it is removed: it could be promoted without --force there, and lacks what is written from \
                     then on; remove it on the primary of {name}, or with --force where it never comes back as a primary"
                )
            });
        };
        return Some(match primary.name == *host {
            true => format!(
                "{host} is the primary of {name} and writes to this host: switch or promote first; --force removes it \
                 all the same, and nobody is the primary then"
            ),
            false => format!(
                "{} is the primary of {name}; there: blockmirror remove-peer {name} {host}; --force removes it here all \
                 the same, and the others hear of it from this host",
                primary.name
            ),
        });
    }
    let (last, others): (Vec<&PeerStatus>, Vec<&PeerStatus>) =
        facts.peers.iter().filter(|peer| verdict::is_in_sync(peer)).partition(|peer| peer.name == *host);
    if !last.is_empty() && others.is_empty() {
        return Some(format!(
            "{host} is the only replica of {name} that is in sync: without it this host has the only copy; let another \
             one join first, or remove it all the same with --force"
        ));
    }
    let removed = facts.peers.iter().find(|peer| peer.name == *host);
    removed.filter(|removed| removed.promised).map(|_| {
        format!(
            "{host} was promised that nothing is answered without it, or without so many other replicas, and need not hear that \
             it is removed: it could be promoted without --force there, and lacks what is written from then on; let it hear \
             of another mode first (blockmirror mode {name} {host} async), or remove it with --force"
        )
    })
}
