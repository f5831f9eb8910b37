//! What the operator gives up on this host, and brings back (L6): a layer of pre-images keeps it in between.

use super::Replica;
use super::gap::saved_in;
use super::promotion::{Progress, PromotionError};
use crate::state::pre_images::Layer;
use crate::transport::key;
use blockmirror_protocol::replica::consent;
use blockmirror_protocol::replica::undo;
use blockmirror_protocol::rewrite::{Before, Rewrite};
use blockmirror_protocol::split::Concession;
use blockmirror_protocol::units::{GenerationId, HostId};
use std::time::Duration;

/// How long it may take to record that nothing is kept any more.
const FORGET_TIME: Duration = Duration::from_secs(10);

impl Replica {
    /// Gives this host's own generations up, durably, and keeps what it has for an undo. The session is over and nothing
    /// is being written ([`Replica::close`]); afterwards the volume has to be opened anew, however this ended. Says whether
    /// it can be undone.
    ///
    /// # Errors
    /// [`PromotionError`] when there is no room to keep it, or something can't be written; nothing is given up then, nor
    /// what was kept before.
    pub async fn yield_to(&self, concession: &Concession) -> Result<bool, PromotionError> {
        self.must_be_sound()?;
        let superblock = self.state.superblock();
        let is_unused = saved_in(&self.layers.lock().await, superblock.layers.undo()).is_empty();
        let rewrite = Rewrite::resolution(&superblock, concession.clone(), is_unused);
        self.rewrite(rewrite, &Progress::default(), PromotionError::State).await?;
        Ok(self.state.superblock().layers.undo().is_some())
    }

    /// Makes this copy what it was before its content was given up, durably; as for [`Replica::yield_to`] otherwise.
    ///
    /// # Errors
    /// [`PromotionError`]; nothing was done where there is nothing to bring back or what was kept can't be read, else it
    /// can be undone again.
    pub async fn undo(&self, peers: &[HostId], progress: &Progress) -> Result<(), PromotionError> {
        self.must_be_sound()?;
        let superblock = self.state.superblock();
        let kept = undo::layer(&superblock)?;
        let own = GenerationId(key::random());
        let before = {
            let layers = self.layers.lock().await;
            let layer = layers.iter().find(|layer| layer.header().layer == kept);
            let layer = layer.expect("a history has a layer");
            // All of it must be good before the content that is there is given up for it.
            let mut contents = layer.contents();
            while contents.next().await?.is_some() {}
            let header = layer.header().clone();
            Before { lineage: header.lineage, point: header.point, saved: layer.saved().collect(), own }
        };
        let rewrite = Rewrite::undo(&superblock, peers, before)?;
        self.rewrite(rewrite, progress, PromotionError::State).await?;
        self.state.note_generation(own);
        Ok(())
    }

    /// The operator agrees to the primary: what was kept for undo is given up, durably; what is being received goes on.
    pub async fn forget(&self) {
        if !self.has_reason_to_forget() {
            return;
        }
        let told = self.forgotten.notified();
        self.drive(|inner| inner.machine.agree());
        // A replica whose disk fails meanwhile records nothing any more; the superblock says what was done.
        let _ = tokio::time::timeout(FORGET_TIME, told).await;
    }

    /// Whether anything is kept, or would be if there were room.
    #[must_use]
    pub fn has_reason_to_forget(&self) -> bool {
        let superblock = self.state.superblock();
        superblock.layers.undo().is_some() || self.report().is_full && !consent::is_given(&superblock)
    }

    /// How many bytes were saved for undo.
    pub async fn kept_bytes(&self) -> u64 {
        let layers = self.layers.lock().await;
        let kept =
            layers.iter().filter(|layer| Some(layer.header().layer) == self.state.superblock().layers.undo());
        kept.flat_map(Layer::saved).map(|range| range.length).sum()
    }
}
