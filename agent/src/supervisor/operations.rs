//! What the operator asks for, one answer each.

use super::{Supervisor, failed, refused};
use crate::config::{ADDRESSES, LEAST_RESYNC_LIMIT, Mode, Name, Role, VolumeConfig};
use crate::control::Operations;
use crate::control::api::{
    AddressRequest, COMPARISON_SCHEMA, Comparison, CreateRequest, DEMOTION_SCHEMA, Demotion, Difference,
    FORGETTING_SCHEMA, Failure, FailureKind, Forgetting, HostStatus, Hung, Invitation, InvitationsReply,
    InviteRequest, JoinRequest, ModeRequest, PEERS_SCHEMA, PROMOTION_SCHEMA, PeerRemoval, PeerState,
    PeerStatus, PeersReply, PromoteRequest, Promotion, RELEASE_SCHEMA, RESOLUTION_SCHEMA, Release,
    ReleaseRequest, RemovePeerRequest, Resolution, ResolveRequest, STATUS_SCHEMA, SWITCH_SCHEMA, StatusReply,
    Switch, SwitchRequest, TuneRequest, UNDOING_SCHEMA, Undoing, VolumeFacts, VolumeStatus,
};
use crate::primary::NotCompared;
use crate::quantity::{Seconds, Size};
use crate::verdict;
use crate::volume::{Answer, Ask, Handle, Silence};
use blockmirror_protocol::peer::CompareResult;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::HostId;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::{JoinHandle, JoinSet};

/// How long a volume may take to tell its facts: whoever asks is told within a second what is known.
const FACTS_TIME: Duration = Duration::from_millis(900);
/// How often it is looked whether a volume hangs that was told to do something.
const ORDER_LOOK: Duration = Duration::from_secs(1);
/// How many ranges an answer lists at most.
const LISTED_RANGES: usize = 100;

/// The operator's view of a supervisor.
pub struct Operator(pub Arc<Supervisor>);

impl Supervisor {
    pub(super) async fn status_of(&self, names: Vec<Name>) -> Result<StatusReply, Failure> {
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

    async fn set_paused(&self, volume: Name, peer: Name, paused: bool) -> Result<PeerStatus, Failure> {
        let host = self.peer_of(&volume, &peer).await?.host;
        self.change_config(&volume, |config| {
            for peer in config.peers.iter_mut().filter(|peer| peer.host == host) {
                peer.paused = paused;
            }
        })
        .await?;
        self.peer_status(volume, peer).await
    }

    async fn peer_status(&self, volume: Name, peer: Name) -> Result<PeerStatus, Failure> {
        let reply = self.status_of(vec![volume.clone()]).await?;
        let peers = reply.volumes.into_iter().flat_map(|volume| volume.facts.peers);
        peers
            .into_iter()
            .find(|status| status.name == peer)
            .ok_or_else(|| Failure::no_such_peer(&volume, &peer))
    }
}

impl Supervisor {
    pub(super) async fn one_status(&self, volume: &Name) -> Result<VolumeStatus, Failure> {
        let reply = self.status_of(vec![volume.clone()]).await?;
        reply.volumes.into_iter().next().ok_or_else(|| Failure::no_such_volume(volume))
    }

    /// Has a volume do something, which it goes on with when the tool goes away.
    async fn order<Done>(
        &self,
        volume: &Name,
        order: impl FnOnce(Answer<Done>) -> Ask,
    ) -> Result<Done, Failure> {
        let handle = self.handle_of(volume).await?;
        let is_silent = || handle.pulse().hung().filter(|silence| silence.path.is_none());
        if let Some(silence) = is_silent() {
            return Err(hangs(volume, &silence, "nothing was begun"));
        }
        let mut done = pin!(handle.answer(order));
        loop {
            match tokio::time::timeout(ORDER_LOOK, &mut done).await {
                Ok(Some(done)) => return done,
                Ok(None) => return Err(failed("the agent stops; look at the status later")),
                Err(_) => {}
            }
            if let Some(silence) = is_silent() {
                return Err(hangs(volume, &silence, "what was begun may go on when it answers"));
            }
        }
    }
}

impl Operations for Operator {
    async fn status(&self, volume: Option<Name>) -> Result<StatusReply, Failure> {
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

    async fn create(&self, request: CreateRequest) -> Result<StatusReply, Failure> {
        // A tool that goes away leaves the volume whole, not half made.
        let supervisor = self.0.clone();
        finish(tokio::spawn(async move { supervisor.make(request).await })).await
    }

    async fn invite(&self, volume: Name, request: InviteRequest) -> Result<Invitation, Failure> {
        self.0.invite_to(volume, request).await
    }

    async fn invitations(&self, volume: Name) -> Result<InvitationsReply, Failure> {
        self.0.invitations_of(volume).await
    }

    async fn revoke(&self, volume: Name, id: String) -> Result<InvitationsReply, Failure> {
        // What it let in ends, also where the tool goes away before the disk has answered.
        let supervisor = self.0.clone();
        finish(tokio::spawn(async move { supervisor.revoke(volume, id).await })).await
    }

    async fn remove_peer(
        &self,
        volume: Name,
        peer: Name,
        request: RemovePeerRequest,
    ) -> Result<PeerRemoval, Failure> {
        let supervisor = self.0.clone();
        finish(tokio::spawn(async move { supervisor.remove_peer(volume, peer, request).await })).await
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

    async fn set_mode(&self, volume: Name, peer: Name, request: ModeRequest) -> Result<PeerStatus, Failure> {
        let mut wanted = self.0.config_of_name(&volume).await?;
        let Some(host) = wanted.peer(&peer).map(|peer| peer.host) else {
            return Err(Failure::no_such_peer(&volume, &peer));
        };
        set_mode(&mut wanted, host, request.mode);
        if let Some(primary) = wanted.peers.iter().find(|peer| peer.role == Role::Primary) {
            let (primary, mode) = (&primary.name, request.mode);
            let replica = if *primary == peer { &self.0.name } else { &peer };
            return Err(refused(format!(
                "the modes of {volume} are those of its primary; on {primary}: blockmirror mode {volume} {replica} {mode}"
            )));
        }
        if let Some(shortfall) = wanted.shortfall().filter(|_| request.mode == Mode::Async) {
            return Err(refused(shortfall.to_string()));
        }
        self.0.change_config(&volume, |config| set_mode(config, host, request.mode)).await?;
        self.0.peer_status(volume, peer).await
    }

    async fn tune(&self, volume: Name, peer: Name, request: TuneRequest) -> Result<PeerStatus, Failure> {
        let limit = request.resync_limit_bytes.map(Size);
        if limit.is_some_and(|limit| limit.0 > 0 && limit < LEAST_RESYNC_LIMIT) {
            return Err(refused(
                "the limit of a resync is at least 64K a second; to stop it: pause".to_owned(),
            ));
        }
        let host = self.0.peer_of(&volume, &peer).await?.host;
        self.0
            .change_config(&volume, |config| {
                for peer in config.peers.iter_mut().filter(|peer| peer.host == host) {
                    peer.compression = request.compression.unwrap_or(peer.compression);
                    peer.resync_limit =
                        limit.map_or(peer.resync_limit, |limit| (limit.0 > 0).then_some(limit));
                }
            })
            .await?;
        self.0.peer_status(volume, peer).await
    }

    async fn set_address(
        &self,
        volume: Name,
        peer: Name,
        request: AddressRequest,
    ) -> Result<PeerStatus, Failure> {
        if request.addresses.is_empty() || request.addresses.len() > ADDRESSES {
            return Err(refused(format!("a host has one address at least, and at most {ADDRESSES}")));
        }
        let host = self.0.peer_of(&volume, &peer).await?.host;
        let volumes: Vec<Name> = self.0.volumes.lock().await.keys().cloned().collect();
        for name in volumes {
            let change = |config: &mut VolumeConfig| {
                for peer in config.peers.iter_mut().filter(|peer| peer.host == host) {
                    peer.addresses.clone_from(&request.addresses);
                }
            };
            self.0.change_config(&name, change).await?;
        }
        self.0.peer_status(volume, peer).await
    }

    async fn promote(&self, volume: Name, request: PromoteRequest) -> Result<Promotion, Failure> {
        let promoted = self.0.order(&volume, |answer| Ask::Promote(request.force, answer)).await?;
        Ok(Promotion {
            schema: PROMOTION_SCHEMA.to_owned(),
            volume: self.0.one_status(&volume).await?,
            milliseconds: milliseconds(promoted.took),
            rolled_back_to: promoted.rolled_back_to,
            unanswered: promoted.unanswered,
        })
    }

    async fn demote(&self, volume: Name) -> Result<Demotion, Failure> {
        let demoted = self.0.order(&volume, Ask::Demote).await?;
        Ok(Demotion {
            schema: DEMOTION_SCHEMA.to_owned(),
            volume: self.0.one_status(&volume).await?,
            released: demoted.released,
            unreleased: demoted.unreleased,
        })
    }

    async fn switch(&self, volume: Name, request: SwitchRequest) -> Result<Switch, Failure> {
        let host = self.0.peer_of(&volume, &request.to).await?.host;
        let switched = self.0.order(&volume, |answer| Ask::Switch(host, answer)).await?;
        Ok(Switch {
            schema: SWITCH_SCHEMA.to_owned(),
            volume: self.0.one_status(&volume).await?,
            to: request.to,
            milliseconds_without_writes: milliseconds(switched.without_writes),
        })
    }

    async fn resolve(&self, volume: Name, request: ResolveRequest) -> Result<Resolution, Failure> {
        let ResolveRequest { keep, dry_run } = request;
        let host = match keep == self.0.name {
            true => self.0.endpoint.id(),
            false => self.0.peer_of(&volume, &keep).await?.host,
        };
        let resolved = self.0.order(&volume, |answer| Ask::Resolve(host, dry_run, answer)).await?;
        let (verdict, alternative, action) = verdict::resolution(&volume, &keep, &resolved, !dry_run);
        Ok(Resolution {
            schema: RESOLUTION_SCHEMA.to_owned(),
            volume: self.0.one_status(&volume).await?,
            keep,
            done: !dry_run,
            loses: resolved.loses,
            spares: resolved.spares,
            copies_everything: resolved.copies_everything,
            undo: resolved.can_be_undone.then(|| format!("blockmirror undo {volume}")),
            verdict,
            alternative,
            action,
        })
    }

    async fn undo(&self, volume: Name) -> Result<Undoing, Failure> {
        let undone = self.0.order(&volume, Ask::Undo).await?;
        Ok(Undoing {
            schema: UNDOING_SCHEMA.to_owned(),
            volume: self.0.one_status(&volume).await?,
            restored_bytes: undone.restored_bytes,
            back_to: undone.back_to,
        })
    }

    async fn forget(&self, volume: Name) -> Result<Forgetting, Failure> {
        let forgotten_bytes = self.0.order(&volume, Ask::Forget).await?;
        let volume = self.0.one_status(&volume).await?;
        Ok(Forgetting { schema: FORGETTING_SCHEMA.to_owned(), volume, forgotten_bytes })
    }

    async fn release(&self, volume: Name, request: ReleaseRequest) -> Result<Release, Failure> {
        let users = self.0.order(&volume, |answer| Ask::Release(request.force, answer)).await?;
        Ok(Release { schema: RELEASE_SCHEMA.to_owned(), volume, users })
    }

    async fn compare(&self, volume: Name, peer: Name) -> Result<Comparison, Failure> {
        let known = self.0.peer_of(&volume, &peer).await?;
        if known.role == Role::Primary {
            let text = format!(
                "{peer} is the primary; a comparison runs there: on {peer}, compare {volume} with this host"
            );
            return Err(Failure::new(FailureKind::Refused, text));
        }
        if known.paused {
            let text = format!("{peer} is paused: blockmirror resume {volume} {peer}");
            return Err(Failure::new(FailureKind::Refused, text));
        }
        let host = known.host;
        let handle = self.0.handle_of(&volume).await?;
        let began = Instant::now();
        // The end of the volume's thread ends the compare.
        let result = handle.answer(|answer| Ask::Compare(host, answer)).await;
        let result = result.unwrap_or(Err(NotCompared::Ended));
        let result = result.map_err(|why| not_compared(&volume, &peer, why))?;
        Ok(comparison(volume, peer, &result, began))
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

/// Why an order is not waited for.
fn hangs(volume: &Name, silence: &Silence, consequence: &str) -> Failure {
    let (what, seconds) = (silence.what(), Seconds(silence.lasted.as_secs()));
    failed(format!(
        "{what} has not answered for {seconds}: a disk or the state folder hangs; {consequence}. \
         Look at blockmirror status {volume}; where a replica has everything, there: blockmirror promote {volume}"
    ))
}

fn milliseconds(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn not_compared(volume: &Name, peer: &Name, why: NotCompared) -> Failure {
    let first = format!("blockmirror wait {volume} --for in-sync");
    match why {
        NotCompared::NotPrimary => {
            refused(format!("this host is not the primary of {volume}, which compares"))
        }
        NotCompared::NotInSync => {
            refused(format!("{peer} is not in sync, so nothing can be compared: {first}"))
        }
        NotCompared::Ended => failed(format!(
            "the link to {peer} was lost, or this host is the primary no more: the comparison has not ended; {first}, then \
             compare again"
        )),
    }
}

fn comparison(volume: Name, peer: Name, result: &CompareResult, began: Instant) -> Comparison {
    let bytes_of = |ranges: &[ByteRange]| ranges.iter().map(|range| range.length).sum::<u64>();
    let listed = |ranges: &[ByteRange]| {
        let ranges = ranges.iter().take(LISTED_RANGES);
        ranges.map(|range| Difference { offset: range.offset, length: range.length }).collect()
    };
    let (different_bytes, unreadable_bytes) = (bytes_of(&result.different), bytes_of(&result.unreadable));
    let (verdict, action) = verdict::comparison(
        &volume,
        &peer,
        result.compared_bytes,
        different_bytes,
        unreadable_bytes,
        different_bytes > 0,
    );
    Comparison {
        schema: COMPARISON_SCHEMA.to_owned(),
        volume,
        peer,
        compared_bytes: result.compared_bytes,
        different_bytes,
        ranges: listed(&result.different),
        unreadable_bytes,
        unreadable: listed(&result.unreadable),
        seconds: began.elapsed().as_secs(),
        verdict,
        action,
    }
}

/// Waits for what goes on when the tool goes away.
pub(super) async fn finish<Done>(task: JoinHandle<Result<Done, Failure>>) -> Result<Done, Failure> {
    task.await.unwrap_or_else(|_| Err(failed("the agent failed inside; see its log")))
}

fn set_mode(config: &mut VolumeConfig, host: HostId, mode: Mode) {
    for peer in config.peers.iter_mut().filter(|peer| peer.host == host) {
        peer.mode = mode;
    }
}
