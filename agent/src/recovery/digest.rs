//! The digest of a whole copy: BLAKE3 over its bytes from the first to the last, holes as the zeroes that they read
//! as.
//!
//! BLAKE3 is a tree, so chunks of a power of two are hashed each for itself, in any order and whenever their bytes are
//! at hand, and [`Subtrees`] merges their values into the ordinary hash of everything. Where in the copy a chunk lies
//! is a part of its value: one chunk of zeroes has another value than the next, so holes are hashed like data, only
//! not read.
//!
//! Values are kept for as long as the bytes can't change, which is the caller's duty to know. The hash is computed
//! piece by piece on the thread of the storage, which gets its turn between them.

use super::read_ahead::{PIECE_BYTES, Piece, ReadAhead};
use crate::buffer::BufferPool;
use crate::storage::file::File;
use crate::storage::{Error, Storage};
use blake3::hazmat::{ChainingValue, HasherExt, Mode, merge_subtrees_non_root, merge_subtrees_root};
use blockmirror_protocol::disk::recovery::CHUNK_BYTES;
use blockmirror_protocol::ranges::ByteRange;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::rc::Rc;

/// How many pieces are read ahead of the hash.
const DEPTH: usize = 8;

static ZEROES: [u8; PIECE_BYTES as usize] = [0; PIECE_BYTES as usize];

/// The values of a copy's chunks, as far as they are known. Streams of one thread share it.
pub struct Subtrees {
    size_bytes: u64,
    chunk_bytes: u64,
    known: RefCell<Known>,
}

#[derive(Default)]
struct Known {
    /// By the chunk's number. The only chunk of a small copy has its hash here, since it is the tree's root.
    values: BTreeMap<u64, ChainingValue>,
    bytes: u64,
}

impl Subtrees {
    /// Knows nothing yet of a copy of `size_bytes`, in chunks of [`CHUNK_BYTES`].
    #[must_use]
    pub fn new(size_bytes: u64) -> Rc<Self> {
        Self::with_chunks(size_bytes, CHUNK_BYTES)
    }

    fn with_chunks(size_bytes: u64, chunk_bytes: u64) -> Rc<Self> {
        assert!(chunk_bytes.is_power_of_two(), "chunks are subtrees");
        assert!(chunk_bytes >= blake3::CHUNK_LEN as u64, "a subtree has a leaf at least");
        Rc::new(Self { size_bytes, chunk_bytes, known: RefCell::default() })
    }

    /// How much is covered by values that are known, in bytes.
    #[must_use]
    pub fn known_bytes(&self) -> u64 {
        self.known.borrow().bytes
    }

    /// Whether a range begins and ends where chunks do.
    #[must_use]
    pub fn are_chunks(&self, range: ByteRange) -> bool {
        let ends_well = range.end() == self.size_bytes || range.end().is_multiple_of(self.chunk_bytes);
        range.offset.is_multiple_of(self.chunk_bytes) && ends_well && range.end() <= self.size_bytes
    }

    /// Forgets the value of a chunk, whose bytes are about to change.
    pub fn forget(&self, chunk: u64) {
        let mut known = self.known.borrow_mut();
        if known.values.remove(&chunk).is_some() {
            known.bytes -= self.range(chunk).length;
        }
    }

    /// The digest of everything, if the values of all chunks are known.
    #[must_use]
    pub fn digest(&self) -> Option<blake3::Hash> {
        let known = self.known.borrow();
        let mut values = known.values.values();
        match self.chunks() {
            chunks if chunks != known.values.len() as u64 => None,
            0 => Some(blake3::hash(&[])),
            1 => values.next().map(|root| blake3::Hash::from_bytes(*root)),
            chunks => {
                let left = merge(&mut values, left_of(chunks));
                let right = merge(&mut values, chunks - left_of(chunks));
                Some(merge_subtrees_root(&left, &right, Mode::Hash))
            }
        }
    }

    fn chunks(&self) -> u64 {
        self.size_bytes.div_ceil(self.chunk_bytes)
    }

    /// The bytes of a chunk.
    #[must_use]
    pub fn range(&self, chunk: u64) -> ByteRange {
        let start = chunk * self.chunk_bytes;
        ByteRange::between(start, self.size_bytes.min(start + self.chunk_bytes))
    }

    /// Bytes that don't change give the same value each time. Where they didn't, a disk or memory is faulty: neither
    /// value is believed, and the chunk is read once more for the digest.
    fn keep(&self, chunk: u64, value: ChainingValue) {
        let length = self.range(chunk).length;
        let known = &mut *self.known.borrow_mut();
        match known.values.entry(chunk) {
            Entry::Vacant(entry) => {
                entry.insert(value);
                known.bytes += length;
            }
            Entry::Occupied(entry) if *entry.get() != value => {
                entry.remove();
                known.bytes -= length;
            }
            Entry::Occupied(_) => {}
        }
    }

    /// The first chunks in a row that lack a value, not before chunk `from`.
    fn missing(&self, from: u64) -> Option<ByteRange> {
        let known = self.known.borrow();
        let mut first = from;
        let mut later = known.values.range(from..).map(|(chunk, _)| *chunk);
        let end = loop {
            match later.next() {
                Some(chunk) if chunk == first => first += 1,
                Some(chunk) => break chunk,
                None => break self.chunks(),
            }
        };
        (first < end).then(|| ByteRange::between(self.range(first).offset, self.range(end - 1).end()))
    }
}

/// How many of so many chunks make the left subtree: the largest power of two that leaves some for the right one.
fn left_of(chunks: u64) -> u64 {
    chunks.next_power_of_two() / 2
}

/// The value of the subtree over the next `chunks`.
fn merge<'a>(values: &mut impl Iterator<Item = &'a ChainingValue>, chunks: u64) -> ChainingValue {
    if chunks == 1 {
        return *values.next().expect("there is a value for each chunk");
    }
    let left = merge(values, left_of(chunks));
    let right = merge(values, chunks - left_of(chunks));
    merge_subtrees_non_root(&left, &right, Mode::Hash)
}

/// Hashes chunks in a row from their bytes in order, and keeps each value when its chunk is complete.
pub struct Hashing {
    subtrees: Rc<Subtrees>,
    rest: ByteRange,
    /// Of the chunk that `rest` begins in.
    hasher: blake3::Hasher,
}

impl Hashing {
    /// Begins with the first byte of a range of whole chunks.
    ///
    /// # Panics
    /// When the range isn't one: see [`Subtrees::are_chunks`].
    #[must_use]
    pub fn new(subtrees: Rc<Subtrees>, range: ByteRange) -> Self {
        assert!(subtrees.are_chunks(range), "whole chunks have values");
        Self { subtrees, rest: range, hasher: blake3::Hasher::new() }
    }

    /// Hashes the next bytes.
    ///
    /// # Panics
    /// When there are more than the range has.
    pub fn data(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() {
            let chunk = self.rest.offset / self.subtrees.chunk_bytes;
            let range = self.subtrees.range(chunk);
            if self.rest.offset == range.offset {
                // A reset would keep the offset of the chunk before.
                self.hasher = blake3::Hasher::new();
                self.hasher.set_input_offset(range.offset);
            }
            let (part, later) = bytes.split_at(bytes.len().min((range.end() - self.rest.offset) as usize));
            self.hasher.update(part);
            self.rest = ByteRange::between(self.rest.offset + part.len() as u64, self.rest.end());
            if self.rest.offset == range.end() {
                let value = match self.subtrees.chunks() {
                    1 => *self.hasher.finalize().as_bytes(),
                    _ => self.hasher.finalize_non_root(),
                };
                self.subtrees.keep(chunk, value);
            }
            bytes = later;
        }
    }

    /// Hashes so many zeroes, or as many as a piece has. Says how many.
    ///
    /// # Panics
    /// When there are more than the range has.
    pub fn zeroes(&mut self, length: u64) -> u64 {
        let length = length.min(PIECE_BYTES);
        self.data(&ZEROES[..length as usize]);
        length
    }

    /// How much was hashed of a chunk that isn't complete, in bytes.
    fn pending_bytes(&self) -> u64 {
        if self.rest.is_empty() { 0 } else { self.rest.offset % self.subtrees.chunk_bytes }
    }
}

/// Reads chunks in a row for their values.
pub struct Reading {
    pieces: ReadAhead,
    hashing: Hashing,
    /// What is left of a hole.
    zeroes_bytes: u64,
}

impl Reading {
    /// Hashes what `pieces` reads.
    ///
    /// # Panics
    /// When that isn't a range of whole chunks.
    #[must_use]
    pub fn new(pieces: ReadAhead, subtrees: Rc<Subtrees>) -> Self {
        let hashing = Hashing::new(subtrees, pieces.rest());
        Self { pieces, hashing, zeroes_bytes: 0 }
    }

    /// Reads and hashes the next piece, then lets others have their turn. False when there was none.
    ///
    /// # Errors
    /// [`Error`] when the file can't be read. The values of the chunks before stay.
    pub async fn step(&mut self) -> Result<bool, Error> {
        if self.zeroes_bytes == 0 {
            match self.pieces.next().await? {
                Some(Piece::Hole(range)) => self.zeroes_bytes = range.length,
                Some(Piece::Data(_, bytes)) => self.hashing.data(&bytes),
                None => return Ok(false),
            }
        }
        self.zeroes_bytes -= self.hashing.zeroes(self.zeroes_bytes);
        tokio::task::yield_now().await;
        Ok(true)
    }
}

/// A digest in the making: reads the chunks whose values nobody has.
pub struct Digesting {
    storage: Rc<dyn Storage>,
    file: Rc<File>,
    pool: BufferPool,
    subtrees: Rc<Subtrees>,
    reading: Option<Reading>,
    /// The chunks before this one had values or were read.
    next: u64,
}

impl Digesting {
    /// Begins to complete the values of a file.
    #[must_use]
    pub fn new(storage: Rc<dyn Storage>, file: Rc<File>, pool: BufferPool, subtrees: Rc<Subtrees>) -> Self {
        Self { storage, file, pool, subtrees, reading: None, next: 0 }
    }

    /// Goes on, up to about `bytes` further. Gives the digest when all values are there.
    ///
    /// # Errors
    /// [`Error`] when the file can't be read; the digest can be begun anew then.
    pub async fn proceed(&mut self, bytes: u64) -> Result<Option<blake3::Hash>, Error> {
        let until = self.done_bytes().saturating_add(bytes);
        while self.done_bytes() < until {
            if let Some(reading) = &mut self.reading {
                if !reading.step().await? {
                    self.reading = None;
                }
            } else if let Some(range) = self.subtrees.missing(self.next) {
                self.next = range.end().div_ceil(self.subtrees.chunk_bytes);
                self.reading = Some(self.read(range));
            } else if let Some(digest) = self.subtrees.digest() {
                return Ok(Some(digest));
            } else {
                // A value was forgotten meanwhile.
                self.next = 0;
            }
        }
        Ok(self.subtrees.digest())
    }

    /// How much has been hashed so far, in bytes, by this digest or before it.
    #[must_use]
    pub fn done_bytes(&self) -> u64 {
        let pending_bytes = self.reading.as_ref().map_or(0, |reading| reading.hashing.pending_bytes());
        // Another stream may complete the same chunk first.
        (self.subtrees.known_bytes() + pending_bytes).min(self.subtrees.size_bytes)
    }

    fn read(&self, range: ByteRange) -> Reading {
        let (storage, file) = (self.storage.clone(), self.file.clone());
        let pieces = ReadAhead::new(storage, file, self.pool.clone(), range, DEPTH);
        Reading::new(pieces, self.subtrees.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::faults::Faults;
    use crate::storage::file::Access;
    use std::os::unix::fs::FileExt;

    const CHUNK: u64 = 4096;

    /// Each chunk is like no other, except for every third, which is zero.
    fn content(size_bytes: u64) -> Vec<u8> {
        let byte = |at: u64| if at / CHUNK % 3 == 1 { 0 } else { ((at * 31) >> 3) as u8 ^ (at >> 11) as u8 };
        (0..size_bytes).map(byte).collect()
    }

    /// Hashes some chunks in a row, in pieces of some length.
    fn hash(subtrees: &Rc<Subtrees>, range: ByteRange, content: &[u8], piece: usize) {
        let mut hashing = Hashing::new(subtrees.clone(), range);
        let bytes = &content[range.offset as usize..range.end() as usize];
        bytes.chunks(piece).for_each(|piece| hashing.data(piece));
    }

    #[test]
    fn values_in_any_order_merge_to_the_ordinary_hash() {
        let whole = [1, 2, 3, 4, 5, 6, 7, 8, 9, 13, 16, 17].map(|chunks| chunks * CHUNK);
        for size in [512].into_iter().chain(whole.into_iter().flat_map(|size| [size - 512, size, size + 512]))
        {
            let (content, subtrees) = (content(size), Subtrees::with_chunks(size, CHUNK));
            // From the last to the first, odd ones after even ones.
            let chunks = subtrees.chunks();
            let order = (0..chunks).rev().filter(|chunk| chunk % 2 == 0);
            for chunk in order.chain((0..chunks).rev().filter(|chunk| chunk % 2 == 1)) {
                assert_eq!(subtrees.digest(), None);
                hash(&subtrees, subtrees.range(chunk), &content, 1000);
            }
            assert_eq!(subtrees.known_bytes(), size);
            assert_eq!(subtrees.digest(), Some(blake3::hash(&content)), "{size} bytes");
        }
    }

    #[test]
    fn chunks_in_a_row_are_told_apart_whatever_the_pieces_are() {
        let size = 7 * CHUNK + 512;
        let content = content(size);
        for piece in [512, 1 << 10, CHUNK as usize, 3 * CHUNK as usize, 1 << 20] {
            let subtrees = Subtrees::with_chunks(size, CHUNK);
            hash(&subtrees, ByteRange::between(2 * CHUNK, size), &content, piece);
            assert_eq!(subtrees.missing(0), Some(ByteRange::new(0, 2 * CHUNK)));
            hash(&subtrees, ByteRange::new(0, 2 * CHUNK), &content, piece);
            assert_eq!(subtrees.digest(), Some(blake3::hash(&content)), "pieces of {piece}");
        }
    }

    #[test]
    fn chunks_of_the_size_that_recoveries_have_merge_too() {
        let size = 3 * CHUNK_BYTES - 512;
        let (content, subtrees) = (content(size), Subtrees::new(size));
        for range in [ByteRange::between(CHUNK_BYTES, size), ByteRange::new(0, CHUNK_BYTES)] {
            hash(&subtrees, range, &content, PIECE_BYTES as usize);
        }
        assert_eq!(subtrees.digest(), Some(blake3::hash(&content)));
    }

    #[test]
    fn an_empty_copy_has_the_hash_of_nothing() {
        let subtrees = Subtrees::new(0);
        assert_eq!((subtrees.digest(), subtrees.missing(0)), (Some(blake3::hash(&[])), None));
    }

    #[test]
    fn only_whole_chunks_have_values() {
        let subtrees = Subtrees::with_chunks(5 * CHUNK + 512, CHUNK);
        for (start, end, whole) in [
            (0, CHUNK, true),
            (CHUNK, 3 * CHUNK, true),
            (4 * CHUNK, 5 * CHUNK + 512, true),
            (5 * CHUNK, 5 * CHUNK + 512, true),
            (0, 512, false),
            (512, CHUNK, false),
            (CHUNK + 512, 2 * CHUNK + 512, false),
            (5 * CHUNK, 6 * CHUNK, false),
        ] {
            assert_eq!(subtrees.are_chunks(ByteRange::between(start, end)), whole, "{start} to {end}");
        }
    }

    #[test]
    fn a_chunk_that_is_forgotten_or_hashed_to_two_values_has_none() {
        let (size, all) = (2 * CHUNK, ByteRange::new(0, 2 * CHUNK));
        let (mut content, subtrees) = (content(size), Subtrees::with_chunks(size, CHUNK));
        let before = blake3::hash(&content);
        hash(&subtrees, all, &content, 4096);
        hash(&subtrees, all, &content, 4096);
        assert_eq!(subtrees.digest(), Some(before), "hashed twice, it has the same value");

        content[0] ^= 1;
        hash(&subtrees, all, &content, 4096);
        assert_eq!((subtrees.digest(), subtrees.known_bytes()), (None, CHUNK));
        assert_eq!(subtrees.missing(0), Some(subtrees.range(0)));
        hash(&subtrees, subtrees.range(0), &content, 4096);
        assert_eq!(subtrees.digest(), Some(blake3::hash(&content)));

        subtrees.forget(1);
        subtrees.forget(1);
        assert_eq!((subtrees.digest(), subtrees.known_bytes()), (None, CHUNK));
    }

    #[test]
    fn a_digest_reads_only_what_has_no_value_and_no_hole() {
        const SECTION: u64 = 256 << 10;
        const SIZE: u64 = 16 * SECTION + 512;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("image");
        crate::storage::file::File::create_image(&path, SIZE).unwrap();
        let (image, mut bytes) =
            (std::fs::OpenOptions::new().write(true).open(&path).unwrap(), content(SIZE));
        let hole = (5 * SECTION) as usize..(9 * SECTION) as usize;
        image.write_all_at(&bytes[..hole.start], 0).unwrap();
        image.write_all_at(&bytes[hole.end..], hole.end as u64).unwrap();
        bytes[hole].fill(0);

        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            let faults = Faults::new(crate::storage::open().unwrap());
            let file = Rc::new(File::open_backing(&path, Access::ReadOnly).unwrap());
            let subtrees = Subtrees::with_chunks(SIZE, SECTION);
            let known = [ByteRange::new(0, 2 * SECTION), ByteRange::new(10 * SECTION, 5 * SECTION)];
            known.iter().for_each(|range| hash(&subtrees, *range, &bytes, 1 << 20));
            let mut digesting = Digesting::new(faults.clone(), file, BufferPool::new(0), subtrees.clone());
            let mut done_bytes = 7 * SECTION;
            assert_eq!(digesting.done_bytes(), done_bytes, "what is known is done");
            let digest = loop {
                match digesting.proceed(1000).await.unwrap() {
                    Some(digest) => break digest,
                    None => assert!(digesting.done_bytes() > done_bytes, "it gets on"),
                }
                done_bytes = digesting.done_bytes();
            };
            assert_eq!((digest, digesting.done_bytes()), (blake3::hash(&bytes), SIZE));
            // From 2 to 4, from 4 to the hole at 5; from its end at 9 to 10; from 15 to 16 and the last sector.
            assert_eq!(faults.submitted(), 5);
            let mut again = Digesting::new(faults.clone(), digesting.file, BufferPool::new(0), subtrees);
            assert_eq!(again.proceed(0).await.unwrap(), Some(digest));
            assert_eq!(faults.submitted(), 5);
        });
    }
}
