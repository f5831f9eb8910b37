//! One open layer: saves what blocks hold, and gives back what they held.

use super::batches::{Batches, Target};
use super::saved::Saved;
use super::{LayerError, PreImages, SaveError};
use crate::buffer::is_zero;
use crate::buffer::{Buffer, BufferPool};
use crate::storage::file::File;
use crate::storage::{self, Storage};
use blockmirror_protocol::disk::PAGE_BYTES;
use blockmirror_protocol::disk::pre_images::{
    BATCH_LIMIT_BYTES, Batch, ENTRY_LIMIT_BYTES, Entry, FIRST_BATCH, Header,
};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::SECTOR_BYTES;
use bytes::Bytes;
use std::rc::Rc;
use tokio::task::spawn_local;

/// How much is read from the backing at a time, in bytes: as much as a batch takes.
const READ_BYTES: u64 = BATCH_LIMIT_BYTES;
/// How many reads of the backing are under way together.
const READS: usize = 64;

/// What a range held before it was overwritten.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct PreImage {
    /// The range of the volume.
    pub range: ByteRange,
    /// What it held, in memory that direct I/O takes; none for zeroes.
    pub data: Option<Bytes>,
}

/// What stands behind a layer's last batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Tail {
    /// The file's end.
    Nothing,
    /// What a crash or a failed save left, to be cut off.
    Leftover,
    /// What is being saved.
    Growing,
}

/// An open layer of pre-images.
pub struct Layer {
    store: PreImages,
    header: Header,
    file: Rc<File>,
    /// The next batch's number.
    serial: u64,
    /// The next batch's place, in bytes.
    end: u64,
    saved: Saved,
    tail: Tail,
}

impl Layer {
    pub(super) fn new(store: PreImages, header: Header, file: Rc<File>, batches: Vec<Batch>) -> Self {
        let mut saved = Saved::default();
        batches.iter().flat_map(|batch| &batch.entries).for_each(|entry| saved.add(entry.range));
        let end = batches.last().map_or(FIRST_BATCH, Batch::end);
        Self { store, header, file, serial: batches.len() as u64, end, saved, tail: Tail::Nothing }
    }

    /// Takes the file's length, as it was found.
    pub(super) fn note_length(&mut self, length_bytes: u64) {
        if length_bytes > self.end {
            self.tail = Tail::Leftover;
        }
    }

    /// What the layer leads back to.
    #[must_use]
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// The ranges that have a pre-image here, in order; neighbours are joined.
    pub fn saved(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.saved.ranges()
    }

    /// How much the layer takes on disk, in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.end
    }

    /// Saves what these ranges of the backing hold, durably. What has a pre-image here already is left out, since the
    /// first one is the one that counts. Nobody writes to the ranges meanwhile.
    ///
    /// A range is cut at multiples of 1 MiB only, so what is found again after a crash are whole blocks if the ranges
    /// were. Memory is bounded: a batch that is being filled, one that is being written, and as much read ahead.
    ///
    /// # Errors
    /// [`SaveError`]; the layer is then as it was before.
    ///
    /// # Panics
    /// When a range is not of whole sectors of the volume, or an earlier save was dropped before its end: its
    /// operations may still be under way, so the layer has to be opened anew.
    pub async fn save(&mut self, backing: &Rc<File>, ranges: &[ByteRange]) -> Result<(), SaveError> {
        assert!(self.tail != Tail::Growing, "a save is awaited to its end");
        let missing = self.missing(ranges);
        if missing.is_empty() {
            return Ok(());
        }
        if self.tail == Tail::Leftover {
            self.cut()?;
        }
        self.tail = Tail::Growing;
        match self.append(backing, &missing).await {
            Ok((serial, end)) => {
                (self.serial, self.end, self.tail) = (serial, end, Tail::Nothing);
                missing.into_iter().for_each(|range| self.saved.add(range));
                Ok(())
            }
            Err(error) => {
                self.tail = Tail::Leftover;
                // It gives the space back now; should it fail, the next save tries again.
                if let Err(error) = self.cut() {
                    tracing::warn!("{}", crate::words::with_causes(&error));
                }
                Err(error)
            }
        }
    }

    /// Reads all pre-images back, batch by batch.
    #[must_use]
    pub fn contents(&self) -> Contents<'_> {
        Contents { layer: self, serial: 0, at: FIRST_BATCH }
    }

    fn missing(&self, ranges: &[ByteRange]) -> Vec<ByteRange> {
        let whole = ByteRange::new(0, self.header.size_bytes);
        let mut wanted = Saved::default();
        for range in ranges {
            assert!(range.is_aligned(SECTOR_BYTES), "whole sectors are saved");
            assert!(whole.contains(*range), "only the volume's content is saved");
            wanted.add(*range);
        }
        wanted.ranges().flat_map(|range| self.saved.missing(range)).collect()
    }

    /// Writes batches behind the last one. Gives the number and the place of the one after them.
    async fn append(&self, backing: &Rc<File>, missing: &[ByteRange]) -> Result<(u64, u64), SaveError> {
        let PreImages { storage, pool, .. } = &self.store;
        let limit_bytes = self.store.limit_bytes.get();
        let room = limit_bytes.saturating_sub(self.used_bytes()?);
        let end_limit = self.end.saturating_add(room);
        let target = Target { storage: &**storage, pool, file: &self.file, end_limit, limit_bytes };
        let mut batches = Batches::new(target, self.header.layer, self.serial, self.end);
        for group in groups(missing) {
            // All begin at once; their content is taken in order.
            let reads: Vec<_> = group
                .into_iter()
                .map(|range| {
                    let (storage, backing, pool) = (Rc::clone(storage), Rc::clone(backing), pool.clone());
                    (range, spawn_local(async move { content(&*storage, &backing, &pool, range).await }))
                })
                .collect();
            for (range, read) in reads {
                let read = read.await.expect("a read neither panics nor is aborted");
                match read.map_err(SaveError::Unreadable)? {
                    Some(data) => batches.add(Entry::of_data(range, &data), Some(data)).await?,
                    None => batches.add(Entry::of_zeroes(range), None).await?,
                }
            }
        }
        batches.finish().await
    }

    /// What all layers take.
    fn used_bytes(&self) -> Result<u64, storage::Error> {
        self.store
            .find_files()
            .map(|files| files.iter().map(|file| file.bytes).sum())
            .map_err(|source| self.failed("measure", source))
    }

    /// Cuts off what stands behind the last batch. The next batch makes it durable.
    fn cut(&mut self) -> Result<(), storage::Error> {
        rustix::fs::ftruncate(&*self.file, self.end).map_err(|error| self.failed("cut", error.into()))?;
        self.tail = Tail::Nothing;
        Ok(())
    }

    fn failed(&self, operation: &'static str, source: std::io::Error) -> storage::Error {
        storage::Error { operation, path: self.file.path().display().to_string(), offset: self.end, source }
    }
}

/// The ranges in pieces of which each is an entry, some at a time.
fn groups(ranges: &[ByteRange]) -> impl Iterator<Item = Vec<ByteRange>> + '_ {
    let pieces = ranges.iter().flat_map(|range| range.split_at_multiples(ENTRY_LIMIT_BYTES));
    let mut pieces = pieces.peekable();
    std::iter::from_fn(move || {
        let mut group = vec![pieces.next()?];
        let mut bytes = group[0].length;
        while group.len() < READS
            && let Some(piece) = pieces.next_if(|piece| bytes + piece.length <= READ_BYTES)
        {
            bytes += piece.length;
            group.push(piece);
        }
        Some(group)
    })
}

/// What a range of the backing holds; nothing for zeroes.
async fn content(
    storage: &dyn Storage,
    backing: &Rc<File>,
    pool: &BufferPool,
    range: ByteRange,
) -> Result<Option<Buffer>, storage::Error> {
    if backing.is_hole(range) {
        return Ok(None);
    }
    let data = storage::read(storage, backing, pool, range).await?;
    Ok((!is_zero(&data)).then_some(data))
}

/// Reads a layer's pre-images back, for as long as it is not saved into.
pub struct Contents<'a> {
    layer: &'a Layer,
    serial: u64,
    at: u64,
}

impl Contents<'_> {
    /// The pre-images of the next batch, each checked; nothing after the last. No two of a layer overlap.
    ///
    /// # Errors
    /// [`LayerError`] when the file can't be read, or is damaged: then what this gave before is still right.
    pub async fn next(&mut self) -> Result<Option<Vec<PreImage>>, LayerError> {
        if self.serial == self.layer.serial {
            return Ok(None);
        }
        let page = self.read(ByteRange::new(self.at, PAGE_BYTES as u64)).await?;
        let batch = Batch::decode(&page, self.layer.header.layer, self.serial, self.at);
        let batch = batch.ok_or_else(|| self.damaged())?;
        let data = self.read(ByteRange::between(self.at + PAGE_BYTES as u64, batch.end())).await?;
        if !batch.is_whole(&data) {
            return Err(self.damaged());
        }
        let images = batch.places().map(|(entry, place)| PreImage {
            range: entry.range,
            data: entry.crc.map(|_| data.slice(place.offset as usize..place.end() as usize)),
        });
        (self.serial, self.at) = (self.serial + 1, batch.end());
        Ok(Some(images.collect()))
    }

    async fn read(&self, range: ByteRange) -> Result<Bytes, LayerError> {
        if range.is_empty() {
            return Ok(Bytes::new());
        }
        let PreImages { storage, pool, .. } = &self.layer.store;
        Ok(storage::read(&**storage, &self.layer.file, pool, range).await?.freeze())
    }

    fn damaged(&self) -> LayerError {
        LayerError::Unusable { path: self.layer.file.path().to_owned(), source: Header::corrupted() }
    }
}
