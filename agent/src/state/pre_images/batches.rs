//! Batches on their way to the end of a layer's file, one durable after the other.

use super::{SaveError, Shortage};
use crate::buffer::{Buffer, BufferPool};
use crate::storage::file::File;
use crate::storage::{self, Cause, Storage};
use blockmirror_protocol::disk::PAGE_BYTES;
use blockmirror_protocol::disk::pre_images::{BATCH_LIMIT_BYTES, Batch, ENTRIES, Entry};
use blockmirror_protocol::layers::LayerId;
use std::rc::Rc;

/// Where batches go.
pub(super) struct Target<'a> {
    pub(super) storage: &'a dyn Storage,
    pub(super) pool: &'a BufferPool,
    pub(super) file: &'a Rc<File>,
    /// How far the file may grow, in bytes.
    pub(super) end_limit: u64,
    /// The limit of all layers, which that follows from.
    pub(super) limit_bytes: u64,
}

/// The batch that is being filled, and where it goes.
pub(super) struct Batches<'a> {
    target: Target<'a>,
    next: Batch,
    data: Vec<Buffer>,
}

impl<'a> Batches<'a> {
    /// Batches of a layer, the first of which has this serial number and place.
    pub(super) fn new(target: Target<'a>, layer: LayerId, serial: u64, at: u64) -> Self {
        Self { target, next: Batch { layer, serial, at, entries: Vec::new() }, data: Vec::new() }
    }

    /// Adds an entry; first writes the batch when it has no room for it.
    pub(super) async fn add(&mut self, entry: Entry, data: Option<Buffer>) -> Result<(), SaveError> {
        let is_full = self.next.entries.len() == ENTRIES
            || self.next.bytes() + entry.stored_bytes() > BATCH_LIMIT_BYTES;
        if is_full {
            self.write().await?;
        }
        self.next.entries.push(entry);
        self.data.extend(data);
        Ok(())
    }

    /// Writes what is left. Gives the serial number and the place of the batch after the last.
    pub(super) async fn finish(mut self) -> Result<(u64, u64), SaveError> {
        if !self.next.entries.is_empty() {
            self.write().await?;
        }
        Ok((self.next.serial, self.next.at))
    }

    async fn write(&mut self) -> Result<(), SaveError> {
        let (storage, file) = (self.target.storage, self.target.file);
        if self.next.end() > self.target.end_limit {
            return Err(Shortage::Limit { limit_bytes: self.target.limit_bytes }.into());
        }
        let content = self.content().freeze();
        storage::write(storage, file, self.next.at, content, true).await.map_err(|error| {
            match error.cause() {
                Cause::NoSpace => {
                    Shortage::Disk { path: file.path().to_owned(), source: error.source }.into()
                }
                Cause::Absent | Cause::Other => SaveError::Storage(error),
            }
        })?;
        let Batch { layer, serial, .. } = self.next;
        self.next = Batch { layer, serial: serial + 1, at: self.next.end(), entries: Vec::new() };
        self.data.clear();
        Ok(())
    }

    /// The batch's page and the data behind it, padded.
    fn content(&self) -> Buffer {
        let mut content = self.target.pool.take(self.next.bytes() as usize);
        let (page, mut rest) = content.split_at_mut(PAGE_BYTES);
        page.copy_from_slice(&self.next.encode());
        for data in &self.data {
            let (place, after) = rest.split_at_mut(data.len().next_multiple_of(PAGE_BYTES));
            place[..data.len()].copy_from_slice(data);
            place[data.len()..].fill(0);
            rest = after;
        }
        assert!(rest.is_empty(), "a batch's data is that of its entries");
        content
    }
}
