//! What the supervisor reads and writes of files: on other threads, since a file system may hang, and nobody waits for that
//! but who asked for it (X5).
//!
//! A call that is given up goes on on its thread, and may be carried out later. What it needs for itself, a turn among the
//! calls of one volume, it keeps until then: so no more than one thread is left behind for each.

use super::Supervisor;
use crate::config::Name;
use crate::state::invitations::{InvitationError, Invitations};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{Mutex, OwnedMutexGuard};
use tokio::task::spawn_blocking;

/// How long a folder of ours may take to answer.
pub(super) const ANSWER_TIME: Duration = Duration::from_secs(5);

/// A file system has not answered in time.
#[derive(Debug, thiserror::Error)]
#[error("{} does not answer: its disk or its file server hangs; what was begun may be done when it answers", path.display())]
pub(super) struct Silent {
    path: PathBuf,
}

impl Silent {
    /// The file system of this path.
    pub(super) fn at(path: &Path) -> Self {
        Self { path: path.to_owned() }
    }
}

/// A volume's turns: whoever changes one of its files waits until the change before is done.
pub(super) type Turns = Arc<Mutex<()>>;

/// What whoever has its turn holds.
pub(super) type Turn = OwnedMutexGuard<()>;

/// Makes a call that may wait for the file system of this path, and gives it up when it takes so long.
///
/// # Errors
/// [`Silent`] when it did.
pub(super) async fn in_time<T: Send + 'static>(
    path: &Path,
    limit: Duration,
    call: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Silent> {
    match tokio::time::timeout(limit, spawn_blocking(call)).await {
        Ok(Ok(value)) => Ok(value),
        Ok(Err(error)) => std::panic::resume_unwind(error.into_panic()),
        Err(_) => Err(Silent::at(path)),
    }
}

/// Waits for a turn at this path.
///
/// # Errors
/// [`Silent`] when the one before takes too long.
pub(super) async fn turn(path: &Path, turns: Turns, limit: Duration) -> Result<Turn, Silent> {
    let turn = tokio::time::timeout(limit, turns.lock_owned()).await;
    turn.map_err(|_| Silent::at(path))
}

/// Does something with the invitations that are kept in a volume's state folder, at its turn, which the caller has back.
pub(super) async fn with_invitations<T: Send + 'static>(
    folder: PathBuf,
    turns: Turns,
    limit: Duration,
    work: impl FnOnce(&mut Invitations) -> Result<T, InvitationError> + Send + 'static,
) -> Result<(T, Turn), InvitationError> {
    let hung = |Silent { path }| InvitationError::Silent { path };
    let turn = turn(&folder, turns, limit).await.map_err(hung)?;
    let path = folder.clone();
    let call = move || {
        let worked = Invitations::load(&folder).and_then(|mut invitations| work(&mut invitations));
        worked.map(|value| (value, turn))
    };
    in_time(&path, limit, call).await.map_err(hung)?
}

impl Supervisor {
    /// The turns of a volume at its invitations.
    pub(super) async fn turns_at_invitations(&self, volume: &Name) -> Turns {
        let volumes = self.volumes.lock().await;
        // Of a volume that is just gone nobody else changes anything.
        volumes.get(volume).map(|entry| entry.inviting.clone()).unwrap_or_default()
    }

    /// Does something with a volume's invitations, and gives what came of it with the turn at them.
    pub(super) async fn at_invitations<T: Send + 'static>(
        &self,
        volume: &Name,
        work: impl FnOnce(&mut Invitations) -> Result<T, InvitationError> + Send + 'static,
    ) -> Result<(T, Turn), InvitationError> {
        let turns = self.turns_at_invitations(volume).await;
        with_invitations(self.state_folder(volume), turns, ANSWER_TIME, work).await
    }
}
