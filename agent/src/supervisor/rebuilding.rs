//! `rebuild`: another disk for a primary that has lost its own. Here is decided from whom; the volume does the rest (S4).

use super::making::{in_time, is_same, must_be_blank, prepare};
use super::operations::{Operator, finish};
use super::{Supervisor, failed, refused};
use crate::blocking::blocking;
use crate::config::{Name, PeerConfig, VolumeConfig};
use crate::control::api::{Failure, REBUILDING_SCHEMA, Rebuild, RebuildRequest, Rebuilding, VolumeStatus};
use crate::control::verbs::CarryOut;
use crate::quantity::Size;
use crate::standing;
use crate::state::backing::{self, BackingError};
use crate::state::stored;
use crate::transport::ControlReceiver;
use crate::volume::Ask;
use crate::words::with_causes;
use blockmirror_protocol::adoption::Content;
use blockmirror_protocol::source::{self, NoSource};
use blockmirror_protocol::succession::Heard;
use blockmirror_protocol::terms::Fence;
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::{Lend, Message, Recovering};
use std::path::Path;
use std::time::Duration;

/// How long other hosts may take to say how they stand.
const OTHERS_TIME: Duration = Duration::from_secs(2);
/// How long the source may take to make all that it has durable.
const SOURCE_TIME: Duration = Duration::from_secs(30);

impl CarryOut<RebuildRequest> for Operator {
    async fn carry_out(&self, volume: Name, request: RebuildRequest) -> Result<Rebuilding, Failure> {
        // A tool that goes away leaves it done or not begun.
        let supervisor = self.0.clone();
        finish(tokio::spawn(async move { supervisor.rebuild(volume, request).await })).await
    }
}

impl Supervisor {
    async fn rebuild(&self, volume: Name, request: RebuildRequest) -> Result<Rebuilding, Failure> {
        let _one_at_a_time = self.making.lock().await;
        let RebuildRequest { backing, from, overwrite } = request;
        let config = self.config_of_name(&volume).await?;
        let named = match from {
            Some(name) => Some(self.peer_of(&volume, &name).await?.host),
            None => None,
        };
        self.order(&volume, |answer| Ask::MayRebuild(overwrite, answer)).await?;
        self.must_be_nobodys(&volume, &backing).await?;
        let (chosen, silent, fence) = self.source_of(&config, named).await?;
        if chosen.paused {
            return Err(refused(format!("{0} is paused: blockmirror resume {volume} {0}", chosen.name)));
        }
        // It is what it says as long as this is held: no primary writes there.
        let (info, held) = self.hold(&config, &chosen, fence).await?;
        let (path, size_bytes) = (backing.clone(), config.size_bytes);
        let prepared = in_time(&backing, move || {
            let prepared = prepare(&path, Some(size_bytes))?;
            if !prepared.made {
                must_be_blank(&path, overwrite)?;
            }
            Ok(prepared)
        })
        .await?;
        let content = Content::of(info.data, info.position, &info.lineage);
        let (folder, path, source) = (self.state_folder(&volume), backing.clone(), chosen.host);
        let taken = async {
            // Somebody may have opened the device meanwhile.
            self.order(&volume, |answer| Ask::MayRebuild(overwrite, answer)).await?;
            let recorded = blocking(move || backing::record_rebuild(&folder, &path, source, &content)).await;
            recorded.map_err(|error| failed(with_causes(&error)))?;
            // A crash from here on leaves a volume that is opened so.
            self.change_config(&volume, |config| config.backing.clone_from(&backing)).await
        };
        if let Err(failure) = taken.await {
            let (folder, path) = (self.state_folder(&volume), backing.clone());
            let undone = blocking(move || {
                backing::forget_rebuild(&folder, &path)?;
                Ok::<_, BackingError>(if prepared.made { std::fs::remove_file(&path).err() } else { None })
            });
            match undone.await {
                Ok(None) => {}
                Ok(Some(error)) => tracing::warn!("{} is left: {error}", backing.display()),
                Err(error) => tracing::warn!("{}", with_causes(&error)),
            }
            return Err(failure);
        }
        drop(held);
        self.order(&volume, Ask::Rebuild).await?;
        Ok(Rebuilding {
            schema: REBUILDING_SCHEMA.to_owned(),
            volume: self.one_status(&volume).await?,
            source: chosen.name,
            silent,
        })
    }

    /// No volume has it but this one.
    async fn must_be_nobodys(&self, volume: &Name, backing: &Path) -> Result<(), Failure> {
        let others: Vec<_> = {
            let volumes = self.volumes.lock().await;
            let others = volumes.values().filter(|entry| entry.config.name != *volume);
            others.map(|entry| (entry.config.name.clone(), entry.config.backing.clone())).collect()
        };
        for (other, its_backing) in others {
            if is_same(backing, its_backing).await {
                return Err(refused(format!("{} is the backing of the volume {other}", backing.display())));
            }
        }
        Ok(())
    }

    /// The host to rebuild from, those that did not say how they stand, and the fence of this host.
    async fn source_of(
        &self,
        config: &VolumeConfig,
        named: Option<HostId>,
    ) -> Result<(PeerConfig, Vec<Name>, Fence), Failure> {
        let (folder, known) = (self.state_folder(&config.name), config.clone());
        let own = blocking(move || stored::read(&folder, &known)).await.superblock;
        let Some(own) = own else {
            return Err(failed("the volume's state can't be read; see blockmirror status"));
        };
        let answers = standing::ask_all(&self.peers, config.id, &config.peers, OTHERS_TIME).await;
        let heard = |(peer, answered): &(PeerConfig, standing::Answered)| Heard {
            host: peer.host,
            standing: answered.as_ref().ok().cloned(),
        };
        let heard: Vec<Heard> = answers.iter().map(heard).collect();
        let source = source::choose((own.fence, own.lineage.first().copied()), &heard, named)
            .map_err(|no| refused(words(config, no)))?;
        let peer = config.peers.iter().find(|peer| peer.host == source.host);
        let peer = peer.cloned().expect("it was asked");
        let silent = answers.into_iter().filter(|(_, answered)| answered.is_err());
        Ok((peer, silent.map(|(peer, _)| peer.name).collect(), own.fence))
    }

    /// Has the source follow this primary, make all durable that it has, and keep primaries away as long as the answer lives.
    async fn hold(
        &self,
        config: &VolumeConfig,
        source: &PeerConfig,
        fence: Fence,
    ) -> Result<(Recovering, ControlReceiver), Failure> {
        let name = &source.name;
        let lost = |error: &dyn std::error::Error| {
            failed(format!(
                "{name} does not lend its copy: {}; a release that can't is upgraded first",
                with_causes(error)
            ))
        };
        let asking = async {
            let addresses: Vec<String> =
                source.addresses.iter().map(|address| address.as_str().to_owned()).collect();
            let connection = self.peers.connection_to(source.host, &addresses).await;
            let connection = connection.map_err(|error| failed(with_causes(&*error)))?;
            let (mut sender, mut receiver) = connection.open_control().await.map_err(|error| lost(&error))?;
            let lend = Lend { volume: config.id, fence };
            sender.send(&lend.into()).await.map_err(|error| lost(&error))?;
            match receiver.receive().await.map_err(|error| lost(&error))? {
                Message::Recovering(info) if info.volume == config.id => Ok((info, receiver)),
                Message::Superseded(newer) => {
                    Err(refused(words(config, NoSource::Promoted(newer.fence.holder))))
                }
                Message::Refused(no) => Err(refused(format!("{name} says no: {}", no.text))),
                _ => Err(failed(format!("{name} answered with something else"))),
            }
        };
        let held = tokio::time::timeout(SOURCE_TIME, asking).await;
        held.unwrap_or_else(|_| Err(failed(format!("{name} does not answer"))))
    }
}

/// Whether this primary can do without a peer: not as long as it is the only one that has what is absent here.
pub(super) fn must_not_be_source(status: &VolumeStatus, peer: &Name) -> Result<(), Failure> {
    let facts = &status.facts;
    let is_source = |rebuild: &&Rebuild| rebuild.source == peer.as_str();
    facts.rebuild.as_ref().filter(is_source).map_or(Ok(()), |rebuild| {
        Err(refused(format!(
            "{peer} alone has {} of {} that this host's new disk lacks yet: wait until it is here (blockmirror wait {1} --for \
             in-sync), or rebuild from another host",
            Size(rebuild.missing_bytes),
            facts.name
        )))
    })
}

/// Why nothing is rebuilt.
fn words(config: &VolumeConfig, no: NoSource) -> String {
    let name_of = |host: HostId| {
        let known = config.peers.iter().find(|peer| peer.host == host);
        known.map_or_else(|| format!("host {host}"), |peer| peer.name.to_string())
    };
    let volume = &config.name;
    match no {
        NoSource::Promoted(holder) => format!(
            "{} was promoted and serves the volume now; this host becomes its replica, also with another disk",
            name_of(holder)
        ),
        NoSource::Silent(host) => format!("{} does not say how it stands; start it, or reach it", name_of(host)),
        NoSource::Unfit(host) => format!(
            "the copy of {0} is no image of the volume now: its disk is not there, or a resync did not end; blockmirror \
             status {volume} there says which",
            name_of(host)
        ),
        NoSource::Behind { named, better } => format!(
            "{} has later content than {}: --from {0}",
            name_of(better),
            name_of(named)
        ),
        NoSource::Lacks(host) => format!(
            "{0} lacks what this host answered without it, and it is on the disk that is lost, or with a host that does not \
             say how it stands; --from {0} gives that up",
            name_of(host)
        ),
        NoSource::Nobody => {
            "no host that was heard has an image of the volume that can be read now; start one that has, or reach it"
                .to_owned()
        }
    }
}
