//! How far the recovery is, on disk: a chunk counts only once the target has been synced after it was written. After
//! a crash, what was written and not noted yet is copied again.

use super::target::Target;
use crate::output::warn;
use blockmirror_agent::control::api::{Failure, FailureKind};
use blockmirror_agent::durable;
use blockmirror_protocol::disk::MetadataError;
use blockmirror_protocol::disk::recovery::{CHUNK_BYTES, RecoveryState, SUFFIX};
use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt};
use std::path::{Path, PathBuf};

/// The state of a recovery and its file.
pub struct Journal {
    path: PathBuf,
    state: RecoveryState,
    /// Chunks that were written and are not known to be durable.
    written: Vec<u64>,
}

/// Where the state is kept by default: beside an image file, and with the agent's state for a device.
pub fn default_path(target: &Path, state_folder: &Path) -> PathBuf {
    let is_device = fs::metadata(target).is_ok_and(|status| status.file_type().is_block_device());
    let mut name = match is_device {
        false => return with_suffix(target.as_os_str().to_owned()),
        true => target.as_os_str().as_bytes().to_vec(),
    };
    name.iter_mut().filter(|byte| **byte == b'/').for_each(|byte| *byte = b'-');
    let name = String::from_utf8_lossy(&name);
    state_folder.join(with_suffix(name.trim_start_matches('-').to_owned().into()))
}

fn with_suffix(mut name: OsString) -> PathBuf {
    name.push(SUFFIX);
    name.into()
}

/// Reads what an earlier recovery left. One that is damaged is of no use, which is told.
pub fn load(path: &Path) -> Result<Option<RecoveryState>, Failure> {
    let failure = |error: &dyn std::error::Error| {
        let message = format!("cannot read {}: {error}", path.display());
        Failure::new(FailureKind::Failed, message)
    };
    let bytes = match fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.map_err(|error| failure(&error))?,
    };
    match RecoveryState::decode(&bytes) {
        Ok(state) => Ok(Some(state)),
        Err(error @ MetadataError::Corrupted { .. }) => {
            warn(&format!("{}: {error}; it is not used", path.display()));
            Ok(None)
        }
        Err(error) => Err(failure(&error)),
    }
}

impl Journal {
    /// Begins to keep a state. It is durable when this returns, so that from then on the target is known as ours.
    pub fn begin(path: PathBuf, state: RecoveryState) -> Result<Self, Failure> {
        let journal = Self { path, state, written: Vec::new() };
        if let Some(folder) = journal.path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            let made = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder);
            made.map_err(|error| journal.failure("write", &error))?;
        }
        journal.store()?;
        Ok(journal)
    }

    /// What is durable.
    pub fn state(&self) -> &RecoveryState {
        &self.state
    }

    /// Begins another state in the same file.
    pub fn begin_anew(&mut self, state: RecoveryState) -> Result<(), Failure> {
        self.written.clear();
        self.state = state;
        self.store()
    }

    /// Notes that all of a chunk was written.
    pub fn written(&mut self, chunk: u64) {
        self.written.push(chunk);
    }

    /// How much was written and is not noted as durable, in bytes.
    pub fn pending_bytes(&self) -> u64 {
        self.written.len() as u64 * CHUNK_BYTES
    }

    /// Makes what was written durable, and notes that. Gives the chunks that are durable now and weren't before.
    pub async fn commit(&mut self, target: &Target) -> Result<Vec<u64>, Failure> {
        if self.written.is_empty() {
            return Ok(Vec::new());
        }
        // What is written while the sync is under way is not covered by it.
        let written = std::mem::take(&mut self.written);
        target.sync().await.map_err(|error| Failure::from_error(FailureKind::Failed, &error))?;
        written.iter().for_each(|chunk| self.state.set(*chunk));
        self.store()?;
        Ok(written)
    }

    /// Removes the file: the recovery is complete.
    pub fn remove(self) -> Result<(), Failure> {
        fs::remove_file(&self.path).map_err(|error| self.failure("remove", &error))
    }

    fn store(&self) -> Result<(), Failure> {
        durable::replace(&self.path, &self.state.encode()).map_err(|error| self.failure("write", &error))
    }

    fn failure(&self, operation: &str, error: &io::Error) -> Failure {
        let path = self.path.display();
        let message = format!("cannot {operation} {path}: {error}; --state-file chooses another place");
        Failure::new(FailureKind::Failed, message)
    }
}
