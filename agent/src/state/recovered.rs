//! The one way from a state folder to a state that a role may be opened with.
//!
//! An [`Unrecovered`] one says who this copy is, and lets that be corrected: by the word of another host that was promoted, or by
//! what is known of a backing that took the place of another. [`Unrecovered::recover`] asks for the comparison of the backing
//! with the notes (X4), makes log and superblock say what came of it, and then reads the activity log (D1) and the marker. Only
//! what it gives is taken by a primary or a replica, so none of that can be left out, nor come in another order. A crash in
//! between leaves a state that is recovered anew.

use super::holding::Compared;
use super::metadata::{State, StateError};
use crate::buffer::BufferPool;
use crate::storage::Storage;
use blockmirror_protocol::disk::activity_log;
use blockmirror_protocol::disk::superblock::Superblock;
use blockmirror_protocol::rewrite::{Part, Rewrite};
use blockmirror_protocol::units::Mark;
use std::path::Path;
use std::rc::Rc;

/// An open state folder whose log and marker nobody has read yet.
pub struct Unrecovered(State);

/// A state that a role may be opened with.
pub struct Recovered {
    /// The open folder.
    pub(crate) state: State,
    /// Where an earlier run may have left blocks that differ.
    pub(crate) log: activity_log::Recovered,
    /// How far a replica's content certainly is.
    pub(crate) mark: Mark,
}

impl Unrecovered {
    /// Makes the folder of a new volume or of a new copy of one. Nothing else may be there.
    ///
    /// # Errors
    /// [`StateError`] when a file exists already or can't be written.
    pub async fn create(
        folder: &Path,
        storage: Rc<dyn Storage>,
        pool: BufferPool,
        superblock: &Superblock,
    ) -> Result<Self, StateError> {
        State::create(folder, storage, pool, superblock).await.map(Self)
    }

    /// Opens the folder and reads its superblock.
    ///
    /// # Errors
    /// [`StateError`] when a file is missing or the superblock is damaged.
    pub async fn open(folder: &Path, storage: Rc<dyn Storage>, pool: BufferPool) -> Result<Self, StateError> {
        State::open(folder, storage, pool).await.map(Self)
    }

    /// What the superblock says.
    #[must_use]
    pub fn superblock(&self) -> Superblock {
        self.0.superblock()
    }

    /// Changes the superblock durably.
    ///
    /// # Errors
    /// [`StateError`] when it can't be written.
    pub async fn change_superblock(&self, change: impl FnOnce(&mut Superblock)) -> Result<(), StateError> {
        self.0.change_superblock(change).await
    }

    /// Writes a part of the metadata as a rewrite orders, durably.
    ///
    /// # Errors
    /// [`StateError`] when it can't be read or written.
    pub async fn rewrite(&self, rewrite: &mut Rewrite, part: Part) -> Result<(), StateError> {
        self.0.rewrite(rewrite, part).await
    }

    /// Takes in what the comparison of the backing found, durably, and reads what an earlier run left.
    ///
    /// # Errors
    /// [`StateError`] when a file can't be read or written, or is newer than this release.
    pub async fn recover(self, compared: &Compared) -> Result<Recovered, StateError> {
        let Self(state) = self;
        if compared.touched().is_some() {
            state.log_everything().await?;
            state.change_superblock(Superblock::note_touched).await?;
        }
        let log = state.recover_log().await?;
        let mark = state.recover_marker().await?;
        Ok(Recovered { state, log, mark })
    }
}

#[cfg(test)]
mod tests {
    use super::super::metadata::tests::superblock;
    use super::*;
    use crate::storage;
    use blockmirror_protocol::units::Epoch;

    fn pool() -> BufferPool {
        BufferPool::new(1 << 20)
    }

    #[test]
    fn what_is_recovered_knows_of_the_backing_what_the_comparison_found() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let folder = tempfile::tempdir().unwrap();
            let storage = storage::open().unwrap();
            drop(Unrecovered::create(folder.path(), storage.clone(), pool(), &superblock()).await.unwrap());
            let open = || Unrecovered::open(folder.path(), storage.clone(), pool());
            let as_it_was = open().await.unwrap().recover(&Compared::anew()).await.unwrap();
            assert!(matches!(as_it_was.log, activity_log::Recovered::Active { .. }));
            assert!(!as_it_was.state.superblock().touched);
            let mut mark = as_it_was.mark;
            mark.position.epoch = Epoch(7);
            as_it_was.state.write_marker(mark).await.unwrap();
            drop(as_it_was);
            let touched = Compared::anew().or_earlier(Some("somebody wrote to it".to_owned()));
            let touched = open().await.unwrap().recover(&touched).await.unwrap();
            assert!(matches!(touched.log, activity_log::Recovered::Unsure { .. }), "any block may differ");
            assert!(touched.state.superblock().touched);
            assert_eq!(
                touched.mark, mark,
                "the marker that was written last is read, and the next one follows it"
            );
        });
    }
}
