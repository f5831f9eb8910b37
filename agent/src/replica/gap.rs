//! The layers of pre-images of a replica: to roll back to (P2) and for an undo (L6), begun, filled and ended as the machine
//! asks. The two may be one layer; where they are two, each saves what it lacks.

use super::{OpenReplicaError, Replica};
use crate::state::State;
use crate::state::pre_images::{Layer, LayerError, PreImages, SaveError, Shortage};
use crate::storage::file::OpenError;
use crate::words::with_causes;
use blockmirror_protocol::disk::MetadataError;
use blockmirror_protocol::disk::pre_images::Header;
use blockmirror_protocol::layers::LayerId;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::replica::Saved;
use blockmirror_protocol::units::Position;

impl Replica {
    /// Makes the layer that leads back to what the backing holds now.
    pub(super) async fn begin_layer(&self, point: Position) -> Saved {
        match self.try_begin_layer(point).await {
            Ok(_) => Saved::Done,
            Err(LayerError::Full(shortage)) => self.note_shortage(&shortage),
            Err(error) => {
                self.keep_error(&error);
                Saved::Failed
            }
        }
    }

    /// Makes the layer after the last one, and gives its name.
    pub(super) async fn try_begin_layer(&self, point: Position) -> Result<LayerId, LayerError> {
        let superblock = self.state.superblock();
        let header = Header {
            layer: superblock.layers.next(),
            volume: superblock.volume,
            copy: superblock.copy,
            size_bytes: superblock.size_bytes,
            block_size: superblock.block_size,
            point,
            began_unix_seconds: crate::quantity::unix_seconds(),
            lineage: superblock.lineage.clone(),
        };
        let begun = header.layer;
        // A layer that is being removed makes room first. One that was begun for a session that was lost then, and never
        // recorded, is begun again.
        let mut layers = self.layers.lock().await;
        layers.retain(|layer| superblock.layers.contains(layer.header().layer));
        let layer = self.pre_images.begin(header).await?;
        self.note_point(&layer);
        layers.push(layer);
        Ok(begun)
    }

    /// Saves what these ranges hold, in every layer that lacks it.
    pub(super) async fn save_pre_images(&self, ranges: &[ByteRange]) -> Saved {
        let mut layers = self.layers.lock().await;
        for layer in layers.iter_mut() {
            match layer.save(&self.backing, ranges).await {
                Ok(()) => self.note_point(layer),
                Err(SaveError::Full(shortage)) => return self.note_shortage(&shortage),
                Err(error @ SaveError::Unreadable(_)) => return self.note_unreadable(&with_causes(&error)),
                Err(error @ SaveError::Storage(_)) => {
                    self.keep_error(&error);
                    return Saved::Failed;
                }
            }
        }
        self.shortage.take();
        Saved::Done
    }

    /// What there was no room for at the last attempt, and what makes some.
    #[must_use]
    pub fn shortage(&self) -> Option<String> {
        self.shortage.borrow().clone()
    }

    fn note_shortage(&self, shortage: &Shortage) -> Saved {
        let text = with_causes(shortage);
        if self.is_new_shortage(&text) {
            tracing::warn!(volume = %self.name, "no room for pre-images: {text}");
        }
        Saved::Full
    }

    fn note_unreadable(&self, error: &str) -> Saved {
        let name = &self.name;
        if !self.inner.borrow().machine.must_keep() {
            tracing::warn!(volume = %name, "the resync goes on without a way back: {error}");
        } else if self.is_new_shortage(&format!(
            "{error}, and must be kept: mend the disk, or `blockmirror forget {name}`, which agrees to the primary"
        )) {
            tracing::warn!(volume = %name, "the resync waits: {error}");
        }
        Saved::Unreadable
    }

    fn is_new_shortage(&self, text: &str) -> bool {
        let before = self.shortage.replace(Some(text.to_owned()));
        before.as_deref() != Some(text)
    }

    fn note_point(&self, layer: &Layer) {
        let (layer, point) = point_of(layer);
        self.points.borrow_mut().insert(layer, point);
    }

    /// Removes a layer that nothing needs any more.
    pub(super) async fn end_layer(&self, ended: LayerId) {
        let mut layers = self.layers.lock().await;
        layers.retain(|layer| layer.header().layer != ended);
        self.points.borrow_mut().remove(&ended);
        if let Err(error) = self.pre_images.remove(ended).await {
            // It takes room until the volume is opened again, and no more.
            tracing::warn!("{}", with_causes(&error));
        }
    }

    /// When the layer was begun to which a promotion would roll back, in seconds since 1970, and how many bytes it
    /// takes; nothing outside of a resync.
    #[must_use]
    pub fn rollback_point(&self) -> Option<(u64, u64)> {
        let layer = self.state.superblock().layers.rollback()?;
        self.points.borrow().get(&layer).copied()
    }

    /// The same for what is kept for undo.
    #[must_use]
    pub fn history_point(&self) -> Option<(u64, u64)> {
        let layer = self.state.superblock().layers.undo()?;
        self.points.borrow().get(&layer).copied()
    }
}

/// A layer's name, when it was begun, in seconds since 1970, and how large it is.
pub(super) fn point_of(layer: &Layer) -> (LayerId, (u64, u64)) {
    (layer.header().layer, (layer.header().began_unix_seconds, layer.bytes()))
}

/// The layers to roll back to and for an undo. One that is damaged or gone is given up, durably: a copy that the primary
/// still brings up to date is worth more than one that is not opened. Those that the catalog does not name are removed
/// then: one that was begun and never recorded, or one whose removal a crash cut short.
pub(super) async fn open_layers(
    pre_images: &PreImages,
    state: &State,
) -> Result<Vec<Layer>, OpenReplicaError> {
    let catalog = state.superblock().layers;
    let mut layers = Vec::new();
    for named in catalog.known() {
        match pre_images.open(named).await {
            Ok(layer) => layers.push(layer),
            Err(error) if is_lost(&error) => {
                let what = match catalog.rollback() == Some(named) {
                    true => "the rollback point of the resync",
                    false => "what was kept for undo",
                };
                tracing::error!("{what} is given up: {}", with_causes(&error));
                state.change_superblock(|superblock| superblock.layers.give_up(named)).await?;
                if !state.superblock().layers.contains(named) {
                    pre_images.remove(named).await?;
                }
            }
            Err(error) => return Err(error.into()),
        }
    }
    let catalog = state.superblock().layers;
    for (left, _) in pre_images.list()?.into_iter().filter(|(layer, _)| !catalog.contains(*layer)) {
        pre_images.remove(left).await?;
    }
    Ok(layers)
}

/// Whether no later attempt could read the layer.
fn is_lost(error: &LayerError) -> bool {
    match error {
        LayerError::Unusable { source, .. } => !matches!(source, MetadataError::TooNew { .. }),
        error => matches!(error, LayerError::Open(OpenError::NotFound { .. })),
    }
}

/// What a layer has saved; nothing where there is none.
pub(super) fn saved_in(layers: &[Layer], of: Option<LayerId>) -> Vec<ByteRange> {
    layers.iter().filter(|layer| Some(layer.header().layer) == of).flat_map(Layer::saved).collect()
}
