//! How a replica becomes the primary: the orders of a [`Rewrite`] carried out, each durably before the next.
//!
//! A crash or an end of the agent between two of them leaves a replica that can be promoted again, or go on as one.

use super::Replica;
use super::gap::saved_in;
use crate::state::StateError;
use crate::state::pre_images::{LayerError, PreImage};
use crate::storage;
use blockmirror_protocol::layers::LayerId;
use blockmirror_protocol::replica::promotion::NotPromotable;
use blockmirror_protocol::replica::undo::NotUndoable;
use blockmirror_protocol::rewrite::{Candidacy, Change, NotRecorded, Order, Part, Rewrite};
use blockmirror_protocol::succession::Decision;
use blockmirror_protocol::units::HostId;
use std::cell::Cell;

/// How far a promotion is, and whether it is to end early.
#[derive(Debug, Default)]
pub struct Progress {
    /// How much a rollback has restored, and how much it restores in all, in bytes.
    pub restored_bytes: Cell<(u64, u64)>,
    /// Whether it is to stop where that is possible: the agent ends.
    pub is_over: Cell<bool>,
    /// Whether something else was seen to write to the backing meanwhile.
    pub is_touched: Cell<bool>,
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
    /// ([`Replica::close`]); afterwards the volume has to be opened anew, however this ended.
    ///
    /// # Errors
    /// [`PromotionError`]; it is a replica still, unless that is [`PromotionError::Unrecorded`].
    pub async fn promote(
        &self,
        host: HostId,
        peers: &[HostId],
        decision: Decision,
        progress: &Progress,
    ) -> Result<(), PromotionError> {
        self.must_be_sound()?;
        let superblock = self.state.superblock();
        let restored = saved_in(&self.layers.lock().await, superblock.layers.rollback());
        let position = self.report().position;
        let candidacy = Candidacy { host, decision, position, restored };
        let rewrite = Rewrite::promotion(&superblock, peers, candidacy)?;
        self.rewrite(rewrite, progress, PromotionError::Unrecorded).await
    }

    /// Carries a rewrite out. `unrecorded` is what it means when the last write of the superblock fails.
    pub(super) async fn rewrite(
        &self,
        mut rewrite: Rewrite,
        progress: &Progress,
        unrecorded: fn(StateError) -> PromotionError,
    ) -> Result<(), PromotionError> {
        loop {
            if progress.is_touched.get() {
                rewrite.note_touched();
            }
            let next = rewrite.next(self.is_promised()).map_err(|error| match error {
                NotRecorded::TooLate => PromotionError::TooLate,
                NotRecorded::Touched => NotPromotable::Touched.into(),
            })?;
            let Some(order) = next else { break };
            match order {
                Order::Write(part) => {
                    let written = self.state.rewrite(&mut rewrite, part).await;
                    written.map_err(|error| match part {
                        Part::Superblock(Change::End) => unrecorded(error),
                        _ => error.into(),
                    })?;
                }
                Order::BeginLayer(layer) => {
                    let begun = self.try_begin_layer(self.report().position).await?;
                    assert_eq!(begun, layer, "nothing else begins a layer meanwhile");
                }
                Order::Restore { layer } => self.restore(layer, progress).await?,
                Order::Sync => storage::sync(&*self.storage, &self.backing).await?,
            }
        }
        for layer in rewrite.ended_layers() {
            self.end_layer(*layer).await;
        }
        Ok(())
    }

    /// Where something failed as the session ended, what is on disk may be newer than what is known here: a commit that
    /// was recorded all the same, to which a rollback would not lead back.
    pub(super) fn must_be_sound(&self) -> Result<(), PromotionError> {
        if self.has_failed() { Err(PromotionError::Failed) } else { Ok(()) }
    }

    /// Writes every pre-image of a layer back.
    pub(super) async fn restore(&self, restored: LayerId, progress: &Progress) -> Result<(), PromotionError> {
        let layers = self.layers.lock().await;
        let layer = layers.iter().find(|layer| layer.header().layer == restored);
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
