//! What can be told while the agent does not run: from its files alone, which are only read. The configuration says
//! which volumes there are, the metadata what they hold.

use blockmirror_agent::config::{ConfigFolder, DeviceKind, Mistake, Name, PeerConfig, VolumeConfig};
use blockmirror_agent::control::api::{
    AgentRecord, DeviceStatus, Failure, FailureKind, HostStatus, PeerStatus, Removed, STATUS_SCHEMA,
    StatusReply, Succession, VolumeFacts,
};
use blockmirror_agent::control::record_path;
use blockmirror_agent::device::loopback::LeftBehind;
use blockmirror_agent::state::holding::EARLIER;
use blockmirror_agent::state::stored::{self, Stored};
use blockmirror_agent::verdict;
use std::io;
use std::path::{Path, PathBuf};

/// Where an agent keeps its configuration that left no record.
const DEFAULT_CONFIG: &str = "/etc/blockmirror";

/// Where an agent keeps its metadata that left no record.
const DEFAULT_STATE: &str = "/var/lib/blockmirror";

/// The configuration's folder of the agent that has, or last had, this run folder.
pub fn config_folder(run: &Path) -> Result<ConfigFolder, Failure> {
    let folder = record(run)?.map_or_else(|| DEFAULT_CONFIG.into(), |record| record.config);
    Ok(ConfigFolder::new(folder))
}

/// The folder of its metadata.
pub fn state_folder(run: &Path) -> Result<PathBuf, Failure> {
    Ok(record(run)?.map_or_else(|| DEFAULT_STATE.into(), |record| record.state))
}

fn record(run: &Path) -> Result<Option<AgentRecord>, Failure> {
    let path = record_path(run);
    let failure = |error: &dyn std::error::Error| {
        let message = format!("cannot read {}: {error}", path.display());
        Failure::new(FailureKind::Failed, message)
    };
    match std::fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failure(&error)),
        Ok(text) => serde_json::from_slice(&text).map(Some).map_err(|error| failure(&error)),
    }
}

/// How things stood, and what is wrong with files that could not be used.
pub fn status(run: &Path, asked: Option<&Name>) -> Result<(StatusReply, Vec<String>), Failure> {
    let folder = config_folder(run)?;
    let mistake = |mistake: Mistake| Failure::from_error(FailureKind::Failed, &mistake);
    let (volumes, mistakes) = match asked {
        Some(name) => (vec![one_volume(&folder, name)?], Vec::new()),
        None => {
            let found = folder.load_volumes().map_err(mistake)?;
            (found.volumes, found.mistakes)
        }
    };
    let name = folder.load_agent().map_err(mistake)?.host_name();
    let host = HostStatus { name, fingerprint: None, version: None, listen: None };
    let state = state_folder(run)?;
    let facts =
        |volume: &VolumeConfig| facts(volume, &stored::read(&state.join(volume.name.as_str()), volume), run);
    let volumes = volumes.iter().map(|volume| verdict::stopped(facts(volume))).collect();
    let warnings = mistakes.into_iter().map(|each| mistake(each).message).collect();
    Ok((StatusReply { schema: STATUS_SCHEMA.to_owned(), host, volumes }, warnings))
}

fn one_volume(folder: &ConfigFolder, name: &Name) -> Result<VolumeConfig, Failure> {
    folder.load_volume(name).map_err(|mistake| match &mistake {
        Mistake::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
            Failure::no_such_volume(name)
        }
        _ => Failure::from_error(FailureKind::Failed, &mistake),
    })
}

/// What is stored about a volume: its configuration and its metadata.
fn facts(volume: &VolumeConfig, stored: &Stored, run: &Path) -> VolumeFacts {
    let peers = volume.peers.iter().zip(&stored.out_of_sync_bytes);
    VolumeFacts {
        devices: volume.devices.iter().map(|&kind| unserved(kind, &volume.name, run)).collect(),
        data: stored.superblock.as_ref().map(|superblock| superblock.data.into()),
        touched: stored
            .superblock
            .as_ref()
            .filter(|superblock| superblock.touched)
            .map(|_| EARLIER.to_owned()),
        epoch: stored.marker.map(|position| position.epoch.0),
        succession: Succession { removed: volume.removal.as_ref().map(Removed::from), ..succession(stored) },
        peers: peers.map(|(config, out_of_sync)| peer(config, *out_of_sync)).collect(),
        ..VolumeFacts::unknown(volume)
    }
}

/// What the superblock says of who may write.
fn succession(stored: &Stored) -> Succession {
    let Some(superblock) = &stored.superblock else { return Succession::default() };
    Succession {
        fence: Some(superblock.fence.counter).filter(|counter| *counter > 0),
        released: superblock.released,
        ..Succession::default()
    }
}

fn unserved(kind: DeviceKind, name: &Name, run: &Path) -> DeviceStatus {
    // What can't be looked at is not told.
    let is_left = kind == DeviceKind::Loop && matches!(LeftBehind::find(name.as_str(), run), Ok(Some(_)));
    let error = match is_left {
        true => "agent not running; whoever uses it waits for the agent",
        false => "agent not running",
    };
    DeviceStatus { kind, uri: None, path: None, error: Some(error.to_owned()), warning: None }
}

fn peer(peer: &PeerConfig, out_of_sync_bytes: Option<u64>) -> PeerStatus {
    PeerStatus { out_of_sync_bytes, ..PeerStatus::unknown(peer) }
}
