//! How a replica becomes the primary: the steps of [`promotion`] carried out, each durably before the next.
//!
//! A crash or an end of the agent between two of them leaves a replica that can be promoted again, or go on as one.

use super::Replica;
use super::gap::saved_in;
use crate::metadata::StateError;
use crate::pre_images::{LayerError, PreImage};
use crate::storage;
use blockmirror_protocol::replica::promotion::{self, NotPromotable, Step};
use blockmirror_protocol::replica::undo::NotUndoable;
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::Fence;
use std::cell::Cell;

/// How far a promotion is, and whether it is to end early.
#[derive(Debug, Default)]
pub struct Progress {
    /// How much a rollback has restored, and how much it restores in all, in bytes.
    pub restored_bytes: Cell<(u64, u64)>,
    /// Whether it is to stop where that is possible: the agent ends.
    pub is_over: Cell<bool>,
}

/// Why a replica was not promoted.
#[derive(Debug, thiserror::Error)]
pub enum PromotionError {
    /// It holds no legal image.
    #[error(transparent)]
    NotPromotable(#[from] NotPromotable),
    /// Nothing was kept that could be brought back.
    #[error(transparent)]
    NotUndoable(#[from] NotUndoable),
    /// Its metadata can't be read or written.
    #[error(transparent)]
    State(#[from] StateError),
    /// Whether the last step was recorded can't be told.
    #[error("it can't be told whether the promotion was recorded")]
    Unrecorded(#[source] StateError),
    /// Its pre-images can't be read.
    #[error(transparent)]
    PreImages(#[from] LayerError),
    /// Its backing can't be written.
    #[error(transparent)]
    Storage(#[from] storage::Error),
    /// Its disk or its metadata failed while the session ended.
    #[error(
        "the replica's disk or state folder failed as its session ended; see its log, and run the same command again"
    )]
    Failed,
    /// The primary may go on alone by now.
    #[error(
        "it took so long that the primary may have gone on alone meanwhile; what would be lost now is said when the same \
         command is run again"
    )]
    TooLate,
    /// The agent ends; the next promotion begins anew.
    #[error("the agent stops before everything is restored; run the same command again when it runs")]
    Interrupted,
}

impl Replica {
    /// Makes this copy that of a primary, durably. The session is over and nothing is being written
    /// ([`Replica::close`]); afterwards the volume has to be opened anew, however this ended. `newest` is the newest
    /// fence that any host told of. `on_word`: nothing is lost only as long as the primary's word holds.
    ///
    /// # Errors
    /// [`PromotionError`]; it is a replica still, unless that is [`PromotionError::Unrecorded`].
    pub async fn promote(
        &self,
        host: HostId,
        peers: &[HostId],
        newest: Fence,
        on_word: bool,
        progress: &Progress,
    ) -> Result<(), PromotionError> {
        self.must_be_sound()?;
        let mut superblock = self.state.superblock();
        superblock.fence.counter = superblock.fence.counter.max(newest.counter);
        let steps = promotion::steps(&superblock)?;
        let position = self.report().position;
        for step in steps {
            match step {
                Step::WriteMaps => {
                    let restored = saved_in(&self.layers.lock().await, superblock.gap);
                    self.state.write_promoted_maps(peers, position, &restored).await?;
                }
                Step::Begin => self.state.change_superblock(promotion::begin).await?,
                Step::Restore { layer } => self.restore(layer, progress).await?,
                Step::Sync => storage::sync(&*self.storage, &self.backing).await?,
                Step::Record if on_word && !self.is_promised() => return Err(PromotionError::TooLate),
                Step::Record => {
                    let change = |superblock: &mut blockmirror_protocol::disk::superblock::Superblock| {
                        if newest.supersedes(superblock.fence) {
                            superblock.fence = newest;
                        }
                        promotion::record(superblock, host, position).expect("steps found a number for it");
                    };
                    let recorded = self.state.change_superblock(change).await;
                    recorded.map_err(PromotionError::Unrecorded)?;
                }
            }
        }
        for layer in [superblock.gap, superblock.history].into_iter().filter(|layer| *layer != 0) {
            self.end_layer(layer).await;
        }
        Ok(())
    }

    /// Where something failed as the session ended, what is on disk may be newer than what is known here: a commit that
    /// was recorded all the same, to which a rollback would not lead back.
    pub(super) fn must_be_sound(&self) -> Result<(), PromotionError> {
        if self.has_failed() { Err(PromotionError::Failed) } else { Ok(()) }
    }

    /// Writes every pre-image of a layer back.
    pub(super) async fn restore(&self, number: u64, progress: &Progress) -> Result<(), PromotionError> {
        let layers = self.layers.lock().await;
        let layer = layers.iter().find(|layer| layer.header().layer == number);
        let layer = layer.expect("what leads back is open");
        let total = layer.saved().map(|range| range.length).sum();
        progress.restored_bytes.set((0, total));
        let mut contents = layer.contents();
        while let Some(batch) = contents.next().await? {
            if progress.is_over.get() {
                return Err(PromotionError::Interrupted);
            }
            for PreImage { range, data } in batch {
                match data {
                    Some(data) => {
                        storage::write(&*self.storage, &self.backing, range.offset, data, false).await?;
                    }
                    None => storage::zero(&*self.storage, &self.backing, range, true).await?,
                }
                let (done, total) = progress.restored_bytes.get();
                progress.restored_bytes.set((done + range.length, total));
            }
        }
        Ok(())
    }
}
