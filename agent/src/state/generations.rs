//! When generations began: told to the operator who has to choose between two histories (L6).
//!
//! A text file in the volume's state folder, a line for each generation that this host began: its identity, and the
//! second since 1970. Nothing but words depends on it. So it is written behind the back of whoever begins a generation,
//! without a sync; where a crash took a line, the time is not known.

use crate::durable;
use crate::quantity::unix_seconds;
use blockmirror_protocol::units::GenerationId;
use std::collections::HashMap;
use std::fs::OpenOptions;
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// The file's name in the state folder.
pub const FILE_NAME: &str = "generations";

/// A longer file, in bytes, loses its older half.
const LIMIT_BYTES: usize = 64 << 10;

/// Notes that a generation begins now. Blocks as a file system does.
///
/// # Errors
/// The kernel's.
pub fn note(folder: &Path, generation: GenerationId) -> io::Result<()> {
    let path = folder.join(FILE_NAME);
    let known = std::fs::read(&path).unwrap_or_default();
    if known.len() > LIMIT_BYTES {
        let newer = &known[known.len() / 2..];
        let line = newer.iter().position(|byte| *byte == b'\n').map_or(newer.len(), |end| end + 1);
        durable::replace(&path, &newer[line..])?;
    }
    let mut file = OpenOptions::new().append(true).create(true).mode(0o600).open(&path)?;
    // One write, so that two of them don't mix.
    file.write_all(format!("{generation} {}\n", unix_seconds()).as_bytes())
}

/// When each of these began, in seconds since 1970; 0 where it isn't known.
#[must_use]
pub fn of_lineage(folder: &Path, lineage: &[GenerationId]) -> Vec<u64> {
    let known = read(folder);
    lineage.iter().map(|generation| known.get(generation).copied().unwrap_or(0)).collect()
}

/// The generations that this host knows of. Lines that make no sense are no lines.
fn read(folder: &Path) -> HashMap<GenerationId, u64> {
    let text = std::fs::read(folder.join(FILE_NAME)).unwrap_or_default();
    let line = |line: &str| {
        let (generation, second) = line.split_once(' ')?;
        Some((GenerationId::from_hex(generation).ok()?, second.parse().ok()?))
    };
    String::from_utf8_lossy(&text).lines().filter_map(line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_noted_is_known_and_what_makes_no_sense_is_not() {
        let folder = tempfile::tempdir().unwrap();
        assert!(read(folder.path()).is_empty());
        let (one, other) = (GenerationId([1; 16]), GenerationId([2; 16]));
        note(folder.path(), one).unwrap();
        let path = folder.path().join(FILE_NAME);
        let mut text = std::fs::read(&path).unwrap();
        text.extend(b"\xff 12\n0101 7\nhere\n");
        std::fs::write(&path, text).unwrap();
        note(folder.path(), other).unwrap();
        let known = read(folder.path());
        assert_eq!(known.len(), 2);
        assert!(known[&one] > 1_700_000_000 && known[&other] >= known[&one]);
    }

    #[test]
    fn the_file_does_not_grow_for_ever_and_keeps_the_newest() {
        let folder = tempfile::tempdir().unwrap();
        let generation = |number: u16| {
            let mut id = [0; 16];
            id[..2].copy_from_slice(&number.to_le_bytes());
            GenerationId(id)
        };
        for number in 0..3000 {
            note(folder.path(), generation(number)).unwrap();
        }
        let known = read(folder.path());
        assert!((700..1700).contains(&known.len()), "{}", known.len());
        assert!(known.contains_key(&generation(2999)) && known.contains_key(&generation(2400)));
    }
}
