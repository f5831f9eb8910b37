//! The digest of a whole copy: BLAKE3 over its bytes from the first to the last, holes as the zeroes that they read
//! as. The hash is computed piece by piece on the thread of the storage, which gets its turn between them.

use super::read_ahead::{PIECE_BYTES, Piece, ReadAhead};
use crate::buffer::BufferPool;
use crate::storage::file::File;
use crate::storage::{Error, Storage};
use blockmirror_protocol::ranges::ByteRange;
use std::rc::Rc;

/// How many pieces are read ahead of the hash.
const DEPTH: usize = 8;

static ZEROES: [u8; PIECE_BYTES as usize] = [0; PIECE_BYTES as usize];

/// A digest in the making.
pub struct Digesting {
    pieces: ReadAhead,
    hasher: blake3::Hasher,
    done_bytes: u64,
    size_bytes: u64,
    /// What is left of a hole.
    zeroes_bytes: u64,
}

impl Digesting {
    /// Begins the digest of a file's first `size_bytes`.
    #[must_use]
    pub fn new(storage: Rc<dyn Storage>, file: Rc<File>, pool: BufferPool, size_bytes: u64) -> Self {
        let pieces = ReadAhead::new(storage, file, pool, ByteRange::new(0, size_bytes), DEPTH);
        Self { pieces, hasher: blake3::Hasher::new(), done_bytes: 0, size_bytes, zeroes_bytes: 0 }
    }

    /// Goes on, up to about `bytes` further. Gives the digest when all is read.
    ///
    /// # Errors
    /// [`Error`] when the file can't be read; what was read so far is of no use then.
    pub async fn proceed(&mut self, bytes: u64) -> Result<Option<blake3::Hash>, Error> {
        let until = self.done_bytes.saturating_add(bytes).min(self.size_bytes);
        while self.done_bytes < until {
            if self.zeroes_bytes > 0 {
                let length = self.zeroes_bytes.min(PIECE_BYTES);
                self.zeroes_bytes -= length;
                self.take(&ZEROES[..length as usize]);
            } else {
                match self.pieces.next().await? {
                    Some(Piece::Hole(range)) => self.zeroes_bytes = range.length,
                    Some(Piece::Data(_, bytes)) => self.take(&bytes),
                    None => unreachable!("the pieces cover the whole size"),
                }
            }
            tokio::task::yield_now().await;
        }
        Ok((self.done_bytes == self.size_bytes).then(|| self.hasher.finalize()))
    }

    /// How many bytes were read so far.
    #[must_use]
    pub fn done_bytes(&self) -> u64 {
        self.done_bytes
    }

    fn take(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.done_bytes += bytes.len() as u64;
    }
}
