//! How this host mirrors with another one: whether, in which mode, how fast, to which address, and whether both have the same.

use super::Operator;
use crate::config::{ADDRESSES, LEAST_RESYNC_LIMIT, Mode, Name, Role, VolumeConfig};
use crate::control::api::{
    AddressRequest, COMPARISON_SCHEMA, CompareRequest, Comparison, Difference, Failure, FailureKind,
    ModeRequest, PauseRequest, PeerStatus, ResumeRequest, TuneRequest,
};
use crate::control::verbs::{CarryOut, PeerOf};
use crate::primary::NotCompared;
use crate::quantity::Size;
use crate::supervisor::rebuilding::must_not_be_source;
use crate::supervisor::{Supervisor, failed, refused};
use crate::verdict;
use crate::volume::Ask;
use blockmirror_protocol::peer::CompareResult;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::HostId;
use std::time::Instant;

/// How many ranges an answer lists at most.
const LISTED_RANGES: usize = 100;

impl CarryOut<PauseRequest> for Operator {
    async fn carry_out(&self, peer: PeerOf, _: PauseRequest) -> Result<PeerStatus, Failure> {
        self.0.set_paused(peer, true).await
    }
}

impl CarryOut<ResumeRequest> for Operator {
    async fn carry_out(&self, peer: PeerOf, _: ResumeRequest) -> Result<PeerStatus, Failure> {
        self.0.set_paused(peer, false).await
    }
}

impl CarryOut<ModeRequest> for Operator {
    async fn carry_out(
        &self,
        PeerOf { volume, peer }: PeerOf,
        request: ModeRequest,
    ) -> Result<PeerStatus, Failure> {
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
}

impl CarryOut<TuneRequest> for Operator {
    async fn carry_out(
        &self,
        PeerOf { volume, peer }: PeerOf,
        request: TuneRequest,
    ) -> Result<PeerStatus, Failure> {
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
}

impl CarryOut<AddressRequest> for Operator {
    async fn carry_out(
        &self,
        PeerOf { volume, peer }: PeerOf,
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
}

impl CarryOut<CompareRequest> for Operator {
    async fn carry_out(
        &self,
        PeerOf { volume, peer }: PeerOf,
        _: CompareRequest,
    ) -> Result<Comparison, Failure> {
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

impl Supervisor {
    async fn set_paused(&self, PeerOf { volume, peer }: PeerOf, paused: bool) -> Result<PeerStatus, Failure> {
        let host = self.peer_of(&volume, &peer).await?.host;
        if paused {
            must_not_be_source(&self.one_status(&volume).await?, &peer)?;
        }
        self.change_config(&volume, |config| {
            for peer in config.peers.iter_mut().filter(|peer| peer.host == host) {
                peer.paused = paused;
            }
        })
        .await?;
        self.peer_status(volume, peer).await
    }
}

fn set_mode(config: &mut VolumeConfig, host: HostId, mode: Mode) {
    for peer in config.peers.iter_mut().filter(|peer| peer.host == host) {
        peer.mode = mode;
    }
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
