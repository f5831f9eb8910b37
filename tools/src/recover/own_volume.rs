//! This host's own volume of what is recovered, whatever its role: it must not be opened from a target that is half
//! filled, and must learn that what it is opened from next is a peer's content.

use crate::client::Client;
use crate::offline;
use crate::output::warn;
use blockmirror_agent::backing::{self, BackingError};
use blockmirror_agent::config::{Role, VolumeConfig};
use blockmirror_agent::control::api::{Failure, FailureKind};
use blockmirror_protocol::units::{HostId, VolumeId};
use std::path::{Path, PathBuf};

/// See the module.
pub struct OwnVolume {
    role: Role,
    /// Its state folder.
    folder: PathBuf,
    /// Its configuration's file.
    file: PathBuf,
    /// Whether the target is its backing.
    is_target: bool,
}

impl OwnVolume {
    /// Finds it, if there is one that has state. Refuses a target that is another volume's backing.
    pub fn find(id: VolumeId, target: &Path, client: &Client) -> Result<Option<Self>, Failure> {
        let config = offline::config_folder(client.run())?;
        let found =
            config.load_volumes().map_err(|mistake| Failure::from_error(FailureKind::Failed, &mistake))?;
        for mistake in &found.mistakes {
            warn(&format!("{mistake}; nothing is known of that volume"));
        }
        let target_place = place(target);
        let is_target = |volume: &VolumeConfig| place(&volume.backing) == target_place;
        if let Some(other) = found.volumes.iter().find(|volume| volume.id != id && is_target(volume)) {
            let (name, target, file) = (&other.name, target.display(), config.volume_path(&other.name));
            let message = format!(
                "{target} is the backing of the volume {name} on this host, which is another one: use another \
                 target, or take that volume away first ({})",
                file.display()
            );
            return Err(Failure::new(FailureKind::Refused, message));
        }
        let Some(volume) = found.volumes.iter().find(|volume| volume.id == id) else { return Ok(None) };
        let folder = offline::state_folder(client.run())?.join(volume.name.as_str());
        // With its state gone too, there is nothing that could take the old content for the new.
        Ok(folder.exists().then(|| Self {
            role: volume.role,
            folder,
            file: config.volume_path(&volume.name),
            is_target: is_target(volume),
        }))
    }

    /// Records that the target is being written to, where it is the backing.
    pub fn begin(&self, source: HostId) -> Result<(), Failure> {
        match self.is_target {
            true => backing::record_recovery_begun(&self.folder, source).map_err(|error| failure(&error)),
            false => Ok(()),
        }
    }

    /// Records that the target is what the source has, and says how to go on.
    pub fn hand_over(&self, target: &Path, source: HostId) -> Result<(), Failure> {
        let (shown, file) = (target.display(), self.file.display());
        let recorded = match self.is_target {
            true => backing::record_recovery(&self.folder, target, source),
            false => backing::record_recovery_elsewhere(&self.folder, target, source),
        };
        recorded.map_err(|error| failure(&error))?;
        let how = match self.is_target {
            true => "start the agent (or restart it)".to_owned(),
            false => format!("name {shown} as the backing in {file} and restart the agent"),
        };
        warn(&match self.role {
            Role::Primary => format!("to serve the volume from what was recovered, {how}"),
            Role::Replica => format!("{how}; this host is a replica, and its primary copies what differs"),
        });
        Ok(())
    }
}

fn failure(error: &BackingError) -> Failure {
    Failure::from_error(FailureKind::Failed, error)
}

/// Where a path leads; a file that is missing would be in its folder.
fn place(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let missing = || Some(folder.canonicalize().ok()?.join(path.file_name()?));
    path.canonicalize().ok().or_else(missing).unwrap_or_else(|| path.to_owned())
}
