//! A volume's state folder, read without changing it: for the status of a volume that is not served or whose agent is
//! stopped, for `inspect`, and for opening a dirty map.

use crate::config::{Role, VolumeConfig};
use blockmirror_protocol::dirty_map::DirtyMap;
use blockmirror_protocol::disk::activity_log::{self, Recovered};
use blockmirror_protocol::disk::superblock::{self, Superblock};
use blockmirror_protocol::disk::{PAGE_BYTES, Page, dirty_map, marker};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::{EXTENT_BYTES, Extent, HostId, Position};
use rustix::fs::{SeekFrom, seek};
use std::collections::BTreeSet;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

/// What a state folder says about a volume. What can't be read is not known.
#[derive(Debug, Default)]
pub struct Stored {
    /// The superblock.
    pub superblock: Option<Superblock>,
    /// The last epoch that is durable here.
    pub marker: Option<Position>,
    /// How much may differ on each peer, in the order of the configuration; nothing where this host keeps no map.
    pub out_of_sync_bytes: Vec<Option<u64>>,
}

/// The file of a dirty map.
pub struct MapFile {
    /// The two slots of the header.
    pub header: Vec<u8>,
    /// The pages of bits that are not all zero, by their number.
    pub pages: Vec<(u64, Box<Page>)>,
}

/// Reads the state folder of a volume.
#[must_use]
pub fn read(folder: &Path, volume: &VolumeConfig) -> Stored {
    let file = |name: &str| std::fs::read(folder.join(name)).ok();
    let superblock = file(superblock::FILE_NAME).and_then(|bytes| Superblock::recover(&bytes).ok());
    let Some((_, superblock)) = superblock.filter(|(_, superblock)| superblock.volume == volume.id) else {
        return Stored { out_of_sync_bytes: vec![None; volume.peers.len()], ..Stored::default() };
    };
    let marker = file(marker::FILE_NAME).and_then(|bytes| marker::recover(&bytes).ok());
    // A log that is missing says as little as a damaged one.
    let log = activity_log::recover(&file(activity_log::FILE_NAME).unwrap_or_default()).ok();
    let out_of_sync = |host| match volume.role {
        Role::Primary => out_of_sync_bytes(folder, volume, host, log.as_ref()),
        Role::Replica => None,
    };
    Stored {
        superblock: Some(superblock),
        marker: marker.map(|(_, position)| position).filter(|position| position.epoch.0 > 0),
        out_of_sync_bytes: volume.peers.iter().map(|peer| out_of_sync(peer.host)).collect(),
    }
}

/// What is marked as different or may be by the activity log (D1). A map or a log that is damaged counts as
/// everything, as it does for the agent.
fn out_of_sync_bytes(
    folder: &Path,
    volume: &VolumeConfig,
    host: HostId,
    log: Option<&Recovered>,
) -> Option<u64> {
    let file = match read_map(&folder.join(dirty_map::file_name(host))) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
        read => read.ok()?,
    };
    let full = DirtyMap::full(volume.id, host, volume.size_bytes, volume.block_size);
    let mut map = DirtyMap::recover(&full, &file.header, file.pages).unwrap_or(full);
    match log? {
        Recovered::Active { extents, .. } => mark(&mut map, volume, extents),
        Recovered::Unsure { .. } => return Some(volume.size_bytes),
    }
    Some((map.dirty_blocks() * volume.block_size.bytes()).min(volume.size_bytes))
}

fn mark(map: &mut DirtyMap, volume: &VolumeConfig, extents: &BTreeSet<Extent>) {
    let whole = ByteRange::new(0, volume.size_bytes);
    for extent in extents {
        let range = ByteRange::new(u64::from(extent.0) * EXTENT_BYTES, EXTENT_BYTES);
        if let Some(range) = range.intersection(whole) {
            map.mark(range.blocks(volume.block_size));
        }
    }
}

/// Reads a dirty map's file, of which most is holes.
///
/// # Errors
/// What the kernel said.
pub fn read_map(path: &Path) -> io::Result<MapFile> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let mut header = vec![0; dirty_map::page_offset(0).min(length) as usize];
    file.read_exact_at(&mut header, 0)?;
    let (mut pages, mut offset) = (Vec::new(), dirty_map::page_offset(0));
    while let Some(data) = next_data(&file, offset)? {
        let page = (data - dirty_map::page_offset(0)) / PAGE_BYTES as u64;
        let at = dirty_map::page_offset(page);
        let mut bytes = Box::new([0; PAGE_BYTES]);
        // A page that was cut off is not whole, and thereby dirty.
        let there = length.saturating_sub(at).min(PAGE_BYTES as u64) as usize;
        file.read_exact_at(&mut bytes[..there], at)?;
        if bytes.iter().any(|byte| *byte != 0) {
            pages.push((page, bytes));
        }
        offset = at + PAGE_BYTES as u64;
    }
    Ok(MapFile { header, pages })
}

/// The first byte at or after `offset` that is not in a hole.
fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(offset)) {
        Ok(data) => Ok(Some(data)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
