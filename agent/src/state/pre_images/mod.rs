//! The store of pre-images: what a replica's blocks held before they were overwritten in gap mode (P2), or by the
//! winner of a split brain (L6).
//!
//! A stretch of gap mode is a *layer*, a file of the state folder whose bytes
//! [`blockmirror_protocol::disk::pre_images`] describes. [`PreImages`] knows all layers of a volume; a [`Layer`] is one
//! that is open, to save into it or to restore from it. Everything belongs to the volume's thread; what waits long for
//! the file system (making and removing files, reading a whole layer) is done aside.
//!
//! # Durability
//!
//! - A layer's name and its first page are durable before [`PreImages::begin`] ends; only then may it be named in the
//!   superblock.
//! - A batch is one write that is durable by itself (`RWF_DSYNC`) rather than a write and a sync. It extends the file,
//!   and such a write covers whatever is needed to read the data back: the file's new size and its new extents too.
//! - An opened layer is synced before anything in it is relied on: the batches of an agent that was killed, not its
//!   host, can be read before they are durable.
//! - What a crash or a failed save left behind the last batch is cut off before the next batch is written. So at the
//!   file's end there is nothing, or one batch that is not whole; an older batch is never taken for the next one.
//!
//! A save that fails leaves the layer as it was. What it had saved is saved again; the blocks still have that content,
//! as nobody overwrites a block whose save failed.

mod batches;
mod layer;
mod saved;
#[cfg(test)]
mod tests;

pub use layer::{Contents, Layer, PreImage};

use crate::buffer::BufferPool;
use crate::durable;
use crate::state::stored::{self, Ending};
use crate::storage::file::{File, OpenError};
use crate::storage::{self, Cause, Storage};
use blockmirror_protocol::disk::pre_images::{self, FIRST_BATCH, Header};
use blockmirror_protocol::disk::{MetadataError, PAGE_BYTES};
use blockmirror_protocol::layers::LayerId;
use std::cell::Cell;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Why there is no room for more pre-images.
#[derive(Debug, thiserror::Error)]
pub enum Shortage {
    /// All layers together may not take more.
    #[error(
        "pre-images may take {limit_bytes} bytes: raise `pre_images` in the volume's file, or `blockmirror forget` \
         what is kept for undo, if anything is"
    )]
    Limit {
        /// The limit.
        limit_bytes: u64,
    },
    /// The file system, or what we may use of it, is full.
    #[error("there is no space left for {}: free some there", path.display())]
    Disk {
        /// The layer's file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Why a layer can't be begun, opened, read or removed.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// There is no room for another one.
    #[error("the layer of pre-images can't be begun")]
    Full(#[from] Shortage),
    /// A layer of this number holds pre-images already.
    #[error("{} exists already: use another number", path.display())]
    Exists {
        /// Its file.
        path: PathBuf,
    },
    /// Its file can't be opened or made.
    #[error("the layer of pre-images can't be opened")]
    Open(#[from] OpenError),
    /// Its file can't be read or written.
    #[error("the layer of pre-images can't be read or written")]
    Storage(#[from] storage::Error),
    /// What the file holds is of no use.
    #[error("{} can't be used", path.display())]
    Unusable {
        /// Its file.
        path: PathBuf,
        /// What is wrong.
        source: MetadataError,
    },
    /// The kernel refused something else.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Why pre-images were not saved. The layer is as it was before.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// There is no room for them.
    #[error("pre-images can't be saved")]
    Full(#[from] Shortage),
    /// The backing can't be read.
    #[error("what is to be saved can't be read")]
    Unreadable(#[source] storage::Error),
    /// The layer can't be written.
    #[error("pre-images can't be saved")]
    Storage(#[from] storage::Error),
}

/// All layers of pre-images in a volume's state folder.
#[derive(Clone)]
pub struct PreImages {
    folder: PathBuf,
    storage: Rc<dyn Storage>,
    pool: BufferPool,
    limit_bytes: Rc<Cell<u64>>,
}

/// A file that has the name of a layer.
struct Found {
    layer: LayerId,
    path: PathBuf,
    bytes: u64,
}

impl PreImages {
    /// Sets another limit, in bytes, for all layers together.
    pub fn set_limit(&self, limit_bytes: u64) {
        self.limit_bytes.set(limit_bytes);
    }

    /// The layers in this folder, which together may take `limit_bytes` of disk.
    #[must_use]
    pub fn new(folder: &Path, storage: Rc<dyn Storage>, pool: BufferPool, limit_bytes: u64) -> Self {
        Self { folder: folder.to_owned(), storage, pool, limit_bytes: Rc::new(Cell::new(limit_bytes)) }
    }

    /// Begins a layer. It is durable, and empty, when this ends. A file of its number without any batch, such as a
    /// crash in here leaves, is replaced.
    ///
    /// # Errors
    /// [`LayerError`]: there is no room, a layer of that number has batches, or the file can't be made.
    ///
    /// # Panics
    /// When the lineage is longer than its limit.
    pub async fn begin(&self, header: Header) -> Result<Layer, LayerError> {
        let path = self.path(header.layer);
        let page = header.encode();
        let about = path.clone();
        aside(move || remove_unfinished(&about)).await?;
        let limit_bytes = self.limit_bytes.get();
        if self.bytes()?.saturating_add(FIRST_BATCH) > limit_bytes {
            return Err(Shortage::Limit { limit_bytes }.into());
        }
        let about = path.clone();
        let made = aside(move || File::create_metadata(about, FIRST_BATCH)).await;
        let file = Rc::new(made.map_err(|error| match error {
            OpenError::Io { path, source, .. } if Cause::of(&source) == Cause::NoSpace => {
                Shortage::Disk { path, source }.into()
            }
            error => LayerError::Open(error),
        })?);
        let mut buffer = self.pool.take(PAGE_BYTES);
        buffer.copy_from_slice(&page);
        storage::write(&*self.storage, &file, 0, buffer.freeze(), true).await?;
        Ok(Layer::new(self.clone(), header, file, Vec::new()))
    }

    /// Opens a layer that was begun: reads all that it lists, and checks the data of its last batch. A last batch that
    /// is not whole is ignored.
    ///
    /// # Errors
    /// [`LayerError`]: there is none, it is damaged, a newer release's or another layer's, or it can't be read.
    pub async fn open(&self, layer: LayerId) -> Result<Layer, LayerError> {
        let path = self.path(layer);
        let there = path.clone();
        let file = Rc::new(File::opened_when_free(move || File::open_metadata(&there)).await?);
        storage::sync(&*self.storage, &file).await?;
        let about = path.clone();
        let read = aside(move || stored::read_layer(&about)).await;
        let stored = read.map_err(|source| cannot("read", &path, source))?;
        let unusable = |source| LayerError::Unusable { path: path.clone(), source };
        let header = stored.header.map_err(unusable)?;
        if header.layer != layer {
            return Err(unusable(Header::foreign()));
        }
        match stored.ending {
            Ending::Damaged => return Err(unusable(Header::corrupted())),
            Ending::Unfinished => {
                tracing::info!(path = %path.display(), "ignored a last batch that was not finished");
            }
            Ending::Whole => {}
        }
        let mut layer = Layer::new(self.clone(), header, file, stored.batches);
        layer.note_length(stored.length_bytes);
        Ok(layer)
    }

    /// Removes a layer, durably, if it is there.
    ///
    /// # Errors
    /// [`LayerError`] when its file can't be removed.
    pub async fn remove(&self, layer: LayerId) -> Result<(), LayerError> {
        let path = self.path(layer);
        let about = path.clone();
        aside(move || durable::remove(&about)).await.map_err(|source| cannot("remove", &path, source))
    }

    /// All layers and what their headers say, in the order in which they were begun. Files without a usable header are left out, with a line in
    /// the log.
    ///
    /// # Errors
    /// [`LayerError`] when the folder can't be read.
    pub fn list(&self) -> Result<Vec<(LayerId, Header)>, LayerError> {
        let mut layers = Vec::new();
        for Found { layer, path, .. } in self.files()? {
            match read_header(&path, layer) {
                Ok(header) => layers.push((layer, header)),
                Err(error) => tracing::warn!("{}: ignored", crate::words::with_causes(&error)),
            }
        }
        layers.sort_by_key(|(layer, _)| *layer);
        Ok(layers)
    }

    /// How much all layers take, in bytes, damaged ones too.
    ///
    /// # Errors
    /// [`LayerError`] when the folder can't be read.
    pub fn bytes(&self) -> Result<u64, LayerError> {
        Ok(self.files()?.iter().map(|file| file.bytes).sum())
    }

    fn files(&self) -> Result<Vec<Found>, LayerError> {
        self.find_files().map_err(|source| cannot("list", &self.folder, source))
    }

    fn find_files(&self) -> io::Result<Vec<Found>> {
        let mut files = Vec::new();
        for entry in fs::read_dir(&self.folder)? {
            let entry = entry?;
            if let Some(layer) = entry.file_name().to_str().and_then(pre_images::layer_of) {
                files.push(Found { layer, path: entry.path(), bytes: entry.metadata()?.len() });
            }
        }
        Ok(files)
    }

    fn path(&self, layer: LayerId) -> PathBuf {
        self.folder.join(pre_images::file_name(layer))
    }
}

/// Removes a layer's file that has no batch.
fn remove_unfinished(path: &Path) -> Result<(), LayerError> {
    match fs::metadata(path) {
        Ok(file) if file.len() > FIRST_BATCH => Err(LayerError::Exists { path: path.to_owned() }),
        Ok(_) => durable::remove(path).map_err(|source| cannot("remove", path, source)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        Err(source) => Err(cannot("look at", path, source)),
    }
}

fn read_header(path: &Path, layer: LayerId) -> Result<Header, LayerError> {
    let unusable = |source| LayerError::Unusable { path: path.to_owned(), source };
    let header = stored::read_layer_header(path).map_err(|source| cannot("read", path, source))?;
    let header = header.map_err(unusable)?;
    if header.layer == layer { Ok(header) } else { Err(unusable(Header::foreign())) }
}

fn cannot(operation: &'static str, path: &Path, source: io::Error) -> LayerError {
    LayerError::Io { operation, path: path.to_owned(), source }
}

/// Does what waits for the file system without keeping the volume's thread.
async fn aside<Value: Send + 'static>(work: impl FnOnce() -> Value + Send + 'static) -> Value {
    crate::blocking::spawn(work).await.expect("work that is done aside neither panics nor is aborted")
}
