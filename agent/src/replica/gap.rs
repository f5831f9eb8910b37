//! The layer of pre-images of a replica in gap mode: begun, filled and ended as the machine asks (P2).

use super::Replica;
use crate::pre_images::{Layer, LayerError, PreImages, SaveError, Shortage};
use blockmirror_protocol::disk::pre_images::Header;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::replica::Saved;
use blockmirror_protocol::units::Position;

impl Replica {
    /// Makes the layer that leads back to what the backing holds now.
    pub(super) async fn begin_layer(&self, point: Position) -> Saved {
        let superblock = self.state.superblock();
        let header = Header {
            layer: superblock.layers + 1,
            volume: superblock.volume,
            copy: superblock.copy,
            size_bytes: superblock.size_bytes,
            block_size: superblock.block_size,
            point,
            began_unix_seconds: crate::quantity::unix_seconds(),
            lineage: superblock.lineage,
        };
        match self.pre_images.begin(header).await {
            Ok(layer) => {
                self.point.set(Some(point_of(&layer)));
                *self.layer.lock().await = Some(layer);
                Saved::Done
            }
            Err(LayerError::Full(shortage)) => self.note_shortage(&shortage),
            Err(error) => {
                self.keep_error(&error);
                Saved::Failed
            }
        }
    }

    /// Saves what these ranges hold.
    pub(super) async fn save_pre_images(&self, ranges: &[ByteRange]) -> Saved {
        let mut layer = self.layer.lock().await;
        let layer = layer.as_mut().expect("a gap has a layer");
        match layer.save(&self.backing, ranges).await {
            Ok(()) => {
                self.point.set(Some(point_of(layer)));
                Saved::Done
            }
            Err(SaveError::Full(shortage)) => self.note_shortage(&shortage),
            Err(error @ SaveError::Storage(_)) => {
                self.keep_error(&error);
                Saved::Failed
            }
        }
    }

    fn note_shortage(&self, shortage: &Shortage) -> Saved {
        tracing::warn!("no room for pre-images: {}", crate::words::with_causes(shortage));
        Saved::Full
    }

    /// Removes a layer that nothing needs any more.
    pub(super) async fn end_layer(&self, number: u64) {
        let mut layer = self.layer.lock().await;
        if layer.as_ref().is_some_and(|layer| layer.header().layer == number) {
            *layer = None;
        }
        if let Err(error) = self.pre_images.remove(number).await {
            // It takes room until the volume is opened again, and no more.
            tracing::warn!("{}", crate::words::with_causes(&error));
        }
    }
}

/// When a layer was begun, in seconds since 1970, and how large it is.
pub(super) fn point_of(layer: &Layer) -> (u64, u64) {
    (layer.header().began_unix_seconds, layer.bytes())
}

/// The layer of the gap, and none of what others left behind.
pub(super) async fn open_layer(pre_images: &PreImages, gap: u64) -> Result<Option<Layer>, LayerError> {
    for (number, _) in pre_images.list()? {
        if number != gap {
            pre_images.remove(number).await?;
        }
    }
    if gap == 0 { Ok(None) } else { pre_images.open(gap).await.map(Some) }
}
