//! Where backings lie: on the disk, where all that counts goes to the disk, and on tmpfs, where only the programs' own
//! costs are left.

use super::processes::{command, go_on, run};
use crate::harness::random::Random;
use anyhow::{Context, Result};
use rustix::fs::{Advice, OFlags, fadvise};
use rustix::io::{Errno, ReadWriteFlags, preadv2};
use std::fs::{self, File};
use std::io::{IoSliceMut, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// How much of a file is written at once, in bytes.
const PIECE_BYTES: usize = 4 << 20;

/// A kind of place.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum PlaceKind {
    /// A folder on a disk.
    Disk,
    /// Memory.
    Tmpfs,
}

/// A place.
pub struct Place {
    /// Which it is.
    pub kind: PlaceKind,
    /// Its folder.
    pub folder: PathBuf,
    /// Whether files here can be opened for direct I/O.
    pub is_direct: bool,
}

impl Place {
    /// A folder on the disk.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn disk(folder: &Path) -> Result<Self> {
        Self::new(PlaceKind::Disk, folder)
    }

    /// A tmpfs of its own, mounted on a folder that is unmounted by its owner.
    ///
    /// # Errors
    /// When it can't be mounted.
    pub fn tmpfs(folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        run(command("mount", ["-t", "tmpfs", "-o", "size=75%", "blockmirror-bench"]).arg(folder))?;
        Self::new(PlaceKind::Tmpfs, folder)
    }

    fn new(kind: PlaceKind, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let probe = folder.join("probe");
        fs::write(&probe, "")?;
        let flags = i32::try_from(OFlags::DIRECT.bits())?;
        let is_direct = File::options().read(true).custom_flags(flags).open(&probe).is_ok();
        fs::remove_file(&probe)?;
        Ok(Self { kind, folder: folder.to_owned(), is_direct })
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self.kind {
            PlaceKind::Disk => "disk",
            PlaceKind::Tmpfs => "tmpfs",
        }
    }

    /// Whether it is on a disk.
    #[must_use]
    pub fn is_disk(&self) -> bool {
        self.kind == PlaceKind::Disk
    }

    /// A path here.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.join(name)
    }

    /// A file full of bytes that can't be compressed, allocated and durable. One that is there already is taken as it
    /// is, if it has the size.
    ///
    /// # Errors
    /// When it can't be written, or the bench is interrupted.
    pub fn filled(&self, name: &str, size_bytes: u64) -> Result<PathBuf> {
        let path = self.path(name);
        if path.metadata().is_ok_and(|found| found.len() == size_bytes) {
            return Ok(path);
        }
        let mut file = File::create(&path)?;
        let mut random = Random::new(size_bytes ^ name.len() as u64);
        let mut left = size_bytes;
        let mut piece = vec![0; PIECE_BYTES];
        while left > 0 {
            go_on()?;
            fill(&mut piece, &mut random);
            let length = (PIECE_BYTES as u64).min(left);
            file.write_all(&piece[..usize::try_from(length)?])
                .with_context(|| format!("cannot fill {}", path.display()))?;
            left -= length;
        }
        drop_cache(&path)?;
        Ok(path)
    }

    /// Removes all files, so that the next comparison has the room.
    ///
    /// # Errors
    /// When one can't be removed.
    pub fn clear(&self) -> Result<()> {
        for entry in fs::read_dir(&self.folder)? {
            let path = entry?.path();
            if path.is_file() {
                fs::remove_file(path)?;
            }
        }
        Ok(())
    }

    /// A file of this size that takes no room.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn sparse(&self, name: &str, size_bytes: u64) -> Result<PathBuf> {
        let path = self.path(name);
        File::create(&path)?.set_len(size_bytes)?;
        Ok(path)
    }
}

/// Writes incompressible pieces of this many bytes at these offsets.
///
/// # Errors
/// When they can't be written, or the bench is interrupted.
pub fn scatter(path: &Path, piece_bytes: usize, offsets: impl Iterator<Item = u64>) -> Result<()> {
    let file = File::options().write(true).open(path)?;
    let mut random = Random::new(piece_bytes as u64);
    let mut piece = vec![0; piece_bytes];
    for offset in offsets {
        go_on()?;
        fill(&mut piece, &mut random);
        file.write_all_at(&piece, offset)?;
    }
    Ok(file.sync_all()?)
}

fn fill(piece: &mut [u8], random: &mut Random) {
    for word in piece.chunks_mut(8) {
        word.copy_from_slice(&random.next_number().to_le_bytes()[..word.len()]);
    }
}

/// Whether the page cache has a part of a file, of which many are looked at.
///
/// # Errors
/// When it can't be opened or looked at.
pub fn is_cached(path: &Path) -> Result<bool> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let step = (file.metadata()?.len() / 256).max(1);
    let mut byte = [0];
    for part in 0..256 {
        let mut into = [IoSliceMut::new(&mut byte)];
        match preadv2(&file, &mut into, part * step, ReadWriteFlags::NOWAIT) {
            Ok(0) | Err(Errno::AGAIN) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(false)
}

/// Has memory of this size used and given back. A virtual machine's host may take back what was free for a while, and then
/// the first to use it again waits for it several times as long as for what it does there.
pub fn warm_memory(bytes: u64) {
    std::hint::black_box(vec![1_u8; usize::try_from(bytes).unwrap_or(0)]);
}

/// Makes a file durable and lets the page cache forget it, so that the next reader pays for reading.
///
/// # Errors
/// When it can't be opened or synced.
pub fn drop_cache(path: &Path) -> Result<()> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    file.sync_all()?;
    Ok(fadvise(&file, 0, None, Advice::DontNeed)?)
}
