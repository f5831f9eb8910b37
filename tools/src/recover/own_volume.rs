//! This host's own volume of what is recovered, whatever its role and even without its configuration: it must not be
//! opened from a target that is half filled, and must learn that what it is opened from next is a peer's content.

use crate::client::Client;
use crate::offline;
use crate::output::warn;
use blockmirror_agent::config::{Role, VolumeConfig};
use blockmirror_agent::control::api::{Failure, FailureKind};
use blockmirror_agent::state::backing::{self, BackingError};
use blockmirror_agent::system;
use blockmirror_protocol::adoption::Content;
use blockmirror_protocol::disk::superblock::{self, Superblock};
use blockmirror_protocol::units::{HostId, VolumeId};
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The volume of a stopped agent on this host, for which a backing is recovered.
pub struct OwnVolume {
    /// Its state folder.
    folder: PathBuf,
    config: Option<Configured>,
}

/// What the configuration says of it.
struct Configured {
    role: Role,
    file: PathBuf,
    /// Whether the target is its backing.
    is_target: bool,
}

impl OwnVolume {
    /// Finds it, if there is state of one. Refuses a target that is another volume's backing, a partition of it, or the
    /// disk that it is a partition of.
    pub fn find(id: VolumeId, target: &Path, client: &Client) -> Result<Option<Self>, Failure> {
        let config = offline::config_folder(client.run())?;
        let found = config.load_volumes().map_err(|mistake| failure(&mistake))?;
        for mistake in &found.mistakes {
            warn(&mistake.to_string());
        }
        let sharing = system::sharing_content(target).map_err(|error| failure(&error))?;
        let places: Vec<PathBuf> = sharing.iter().map(|path| place(path)).collect();
        let is_target = |volume: &VolumeConfig| place(&volume.backing) == places[0];
        let is_shared = |volume: &&VolumeConfig| volume.id != id && places.contains(&place(&volume.backing));
        if let Some(other) = found.volumes.iter().find(is_shared) {
            return Err(is_of_another(target, &config.volume_path(&other.name)));
        }
        let mut own = None;
        for (folder, volume) in states(&offline::state_folder(client.run())?)? {
            if volume == id {
                own = Some(folder);
            } else if sharing.iter().any(|path| backing::is_named(&folder, path)) {
                return Err(is_of_another(target, &folder));
            }
        }
        let volume = found.volumes.iter().find(|volume| volume.id == id);
        let config = volume.map(|volume| Configured {
            role: volume.role,
            file: config.volume_path(&volume.name),
            is_target: is_target(volume),
        });
        Ok(own.map(|folder| Self { folder, config }))
    }

    /// Whether the target has been the volume's backing since any recovery into it.
    pub fn has_served(&self, target: &Path) -> bool {
        backing::was_served(&self.folder, target)
    }

    /// Records that the target is being written to, if it is there.
    pub fn begin(&self, target: &Path, source: HostId) -> Result<(), Failure> {
        match target.exists() {
            true => {
                backing::record_recovery_begun(&self.folder, target, source).map_err(|error| failure(&error))
            }
            false => Ok(()),
        }
    }

    /// Records that the target is what the source has, and says how to go on.
    pub fn hand_over(&self, target: &Path, source: HostId, content: &Content) -> Result<(), Failure> {
        backing::record_recovery(&self.folder, target, source, content)
            .map_err(|error: BackingError| failure(&error))?;
        let shown = target.display();
        let how = match &self.config {
            None => format!(
                "write the volume's configuration anew, with {shown} as the backing, and restart the agent"
            ),
            Some(config) if config.is_target => "start the agent (or restart it)".to_owned(),
            Some(config) => {
                format!("name {shown} as the backing in {} and restart the agent", config.file.display())
            }
        };
        warn(&match &self.config {
            Some(Configured { role: Role::Replica, .. }) => {
                format!("{how}; this host is a replica, and its primary copies what differs")
            }
            _ => format!("to serve the volume from what was recovered, {how}"),
        });
        Ok(())
    }
}

/// The state folders of volumes, and whose they are. What has no superblock that can be read is none.
fn states(folder: &Path) -> Result<Vec<(PathBuf, VolumeId)>, Failure> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| failure(&error))?,
    };
    let volume = |path: PathBuf| {
        let bytes = fs::read(path.join(superblock::FILE_NAME)).ok()?;
        Some((path, Superblock::recover(&bytes).ok()?.1.volume))
    };
    Ok(entries.filter_map(|entry| volume(entry.ok()?.path())).collect())
}

fn is_of_another(target: &Path, by: &Path) -> Failure {
    let message = format!(
        "{} is, or shares a disk with, the backing of another volume on this host: use another target, or take that \
         volume away first ({})",
        target.display(),
        by.display()
    );
    Failure::new(FailureKind::Refused, message)
}

fn failure(error: &dyn std::error::Error) -> Failure {
    Failure::from_error(FailureKind::Failed, error)
}

/// Where a path leads; a file that is missing would be in its folder.
fn place(path: &Path) -> PathBuf {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let missing = || Some(folder.canonicalize().ok()?.join(path.file_name()?));
    path.canonicalize().ok().or_else(missing).unwrap_or_else(|| path.to_owned())
}
