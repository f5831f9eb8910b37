//! What backings hold.

use crate::harness::random::Random;
use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// The unit of tracking, in bytes.
pub const BLOCK_BYTES: u64 = 4096;
const PIECE_BYTES: u64 = 1 << 20;

/// Where two files differ first, in bytes; nothing when they are identical, their sizes too.
///
/// # Panics
/// When one can't be read.
#[must_use]
pub fn first_difference(one: &Path, other: &Path) -> Option<u64> {
    let (one, other) = (File::open(one).expect("a backing"), File::open(other).expect("a backing"));
    let size = |file: &File| file.metadata().expect("a file's status").size();
    let common = size(&one).min(size(&other));
    for start in (0..common).step_by(PIECE_BYTES as usize) {
        let length = PIECE_BYTES.min(common - start);
        let (ours, theirs) = (read(&one, start, length), read(&other, start, length));
        if ours != theirs {
            let at = ours.iter().zip(&theirs).position(|(ours, theirs)| ours != theirs);
            return Some(start + at.expect("they differ somewhere") as u64);
        }
    }
    (size(&one) != size(&other)).then_some(common)
}

fn read(file: &File, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, offset).expect("a backing can be read");
    bytes
}

/// How much space a file takes, in bytes.
///
/// # Panics
/// When there is no such file.
#[must_use]
pub fn allocated_bytes(path: &Path) -> u64 {
    path.metadata().expect("a file's status").blocks() * 512
}

/// Bytes that no other call gives.
pub fn noise(random: &mut Random, length: u64) -> Vec<u8> {
    (0..length.div_ceil(8)).flat_map(|_| random.next_number().to_le_bytes()).take(length as usize).collect()
}

/// A block that carries this stamp throughout; 0 is a block of zeroes.
#[must_use]
pub fn stamped(stamp: u64) -> Vec<u8> {
    stamp.to_le_bytes().repeat(BLOCK_BYTES as usize / 8)
}

/// The stamp of a block, if it carries one throughout.
///
/// # Panics
/// When it is no block.
#[must_use]
pub fn stamp_of(block: &[u8]) -> Option<u64> {
    let stamp = u64::from_le_bytes(*block.first_chunk().expect("a block is longer than a stamp"));
    (block == stamped(stamp)).then_some(stamp)
}
