//! A volume's state folder, read without changing it: for the status of a volume that is not served or whose agent is
//! stopped, for `inspect`, and for opening a dirty map or a layer of pre-images.

use crate::config::{Role, VolumeConfig};
use blockmirror_protocol::dirty_map::DirtyMap;
use blockmirror_protocol::disk::activity_log::{self, Recovered};
use blockmirror_protocol::disk::dirty_map::Base;
use blockmirror_protocol::disk::pre_images::{self, BATCH_LIMIT_BYTES, Batch, FIRST_BATCH};
use blockmirror_protocol::disk::superblock::{self, Superblock};
use blockmirror_protocol::disk::{MetadataError, PAGE_BYTES, Page, absent, dirty_map, marker};
use blockmirror_protocol::layers::LayerId;
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

impl Stored {
    /// What is known where nothing can be read.
    #[must_use]
    pub fn nothing(volume: &VolumeConfig) -> Self {
        Self { out_of_sync_bytes: vec![None; volume.peers.len()], ..Self::default() }
    }
}

/// What a host knows of what another one lacks.
#[derive(Debug)]
pub struct Undelivered {
    /// What its map is relative to.
    pub base: Base,
    /// How many blocks may differ, by its map and its activity log, and how many bytes that are.
    pub blocks: u64,
    /// The same in bytes.
    pub bytes: u64,
}

/// The file of a dirty map.
pub struct MapFile {
    /// The two slots of the header.
    pub header: Vec<u8>,
    /// The pages of bits that are not all zero, by their number.
    pub pages: Vec<(u64, Box<Page>)>,
}

/// The file of absent blocks.
pub struct AbsentFile {
    /// The header and its twin.
    pub header: Vec<u8>,
    /// The pages of bits of which anything was written, by their number, each with its twin.
    pub pages: Vec<(u64, Box<[Page; 2]>)>,
}

/// The file of a layer of pre-images.
pub struct LayerFile {
    /// The header. Where it is of no use, nothing else was read.
    pub header: Result<pre_images::Header, MetadataError>,
    /// The batches, without a last one that is not whole. Of the last alone the data was checked.
    pub batches: Vec<Batch>,
    /// The file's length in bytes.
    pub length_bytes: u64,
    /// What follows the batches.
    pub ending: Ending,
}

/// What follows the batches of a layer.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Ending {
    /// Nothing.
    Whole,
    /// A batch that a crash kept from becoming whole: nothing of it was overwritten.
    Unfinished,
    /// What had been whole once.
    Damaged,
}

/// Reads the state folder of a volume.
#[must_use]
pub fn read(folder: &Path, volume: &VolumeConfig) -> Stored {
    let file = |name: &str| std::fs::read(folder.join(name)).ok();
    let superblock = file(superblock::FILE_NAME).and_then(|bytes| Superblock::recover(&bytes).ok());
    let Some((_, superblock)) = superblock.filter(|(_, superblock)| superblock.volume == volume.id) else {
        return Stored::nothing(volume);
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
        marker: marker.map(|(_, mark)| mark.position).filter(|position| position.epoch.0 > 0),
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

/// What this host wrote that another one lacks, as far as its map of that one still says it (L2), in either role.
#[must_use]
pub fn undelivered(
    folder: &Path,
    volume: &VolumeConfig,
    superblock: &Superblock,
    host: HostId,
) -> Option<Undelivered> {
    let file = read_map(&folder.join(dirty_map::file_name(host))).ok()?;
    let full = DirtyMap::full(volume.id, host, volume.size_bytes, volume.block_size);
    let mut map = DirtyMap::recover(&full, &file.header, file.pages).ok()?;
    let base = map.base();
    if base.is_none() || base.adopted != superblock.adopted {
        return None;
    }
    let log = std::fs::read(folder.join(activity_log::FILE_NAME)).unwrap_or_default();
    match activity_log::recover(&log).ok()? {
        Recovered::Active { extents, .. } => mark(&mut map, volume, &extents),
        Recovered::Unsure { .. } => map.begin_anew(base),
    }
    let blocks = map.dirty_blocks();
    let bytes = (blocks * volume.block_size.bytes()).min(volume.size_bytes);
    Some(Undelivered { base, blocks, bytes })
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

/// Reads the file of absent blocks, of which most is holes.
///
/// # Errors
/// What the kernel said.
pub fn read_absent(path: &Path) -> io::Result<AbsentFile> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    let first = absent::places(0)[0];
    let header = read_up_to(&file, ByteRange::new(0, first), length)?;
    let (mut pages, mut offset) = (Vec::new(), first);
    while let Some(data) = next_data(&file, offset)? {
        let page = (data - first) / (2 * PAGE_BYTES as u64);
        let [at, twin] = absent::places(page);
        let mut pair = Box::new([[0; PAGE_BYTES]; 2]);
        for (place, bytes) in [at, twin].into_iter().zip(&mut pair[..]) {
            let there = read_up_to(&file, ByteRange::new(place, PAGE_BYTES as u64), length)?;
            bytes[..there.len()].copy_from_slice(&there);
        }
        pages.push((page, pair));
        offset = twin + PAGE_BYTES as u64;
    }
    Ok(AbsentFile { header, pages })
}

/// Reads the header of a layer of pre-images.
///
/// # Errors
/// What the kernel said.
pub fn read_layer_header(path: &Path) -> io::Result<Result<pre_images::Header, MetadataError>> {
    let file = File::open(path)?;
    let length = file.metadata()?.len();
    Ok(pre_images::Header::decode(&read_up_to(&file, ByteRange::new(0, FIRST_BATCH), length)?))
}

/// Reads a layer of pre-images: the header, what all batches list, and the data of the last one.
///
/// # Errors
/// What the kernel said.
pub fn read_layer(path: &Path) -> io::Result<LayerFile> {
    let header = read_layer_header(path)?;
    let file = File::open(path)?;
    let length_bytes = file.metadata()?.len();
    let mut layer = LayerFile { header, batches: Vec::new(), length_bytes, ending: Ending::Whole };
    let Ok(header) = &layer.header else { return Ok(layer) };
    let mut at = FIRST_BATCH;
    while at < length_bytes {
        let page = read_up_to(&file, ByteRange::new(at, PAGE_BYTES as u64), length_bytes)?;
        let serial = layer.batches.len() as u64;
        let Some(batch) = Batch::decode(&page, header.layer, serial, at) else { break };
        if batch.entries.iter().any(|entry| entry.range.end() > header.size_bytes) {
            layer.ending = Ending::Damaged;
            return Ok(layer);
        }
        at = batch.end();
        layer.batches.push(batch);
    }
    layer.ending = ending(&file, header.layer, &layer.batches, length_bytes)?;
    // What stands behind the last batch is a batch of its own; where there is nothing, the last one is it.
    if layer.ending == Ending::Unfinished && length_bytes <= at {
        layer.batches.pop();
    }
    Ok(layer)
}

/// How a layer ends whose batches' pages are whole, up to where the next one would be. A batch was durable before the
/// next was begun, so anything behind it says that it was whole.
fn ending(file: &File, layer: LayerId, batches: &[Batch], length: u64) -> io::Result<Ending> {
    let at = batches.last().map_or(FIRST_BATCH, Batch::end);
    let last_is_whole = match batches.last() {
        None => true,
        Some(last) => {
            let data = ByteRange::between(last.at + PAGE_BYTES as u64, last.end());
            last.is_whole(&read_up_to(file, data, length)?)
        }
    };
    if length <= at {
        return Ok(if last_is_whole { Ending::Whole } else { Ending::Unfinished });
    }
    if !last_is_whole || length - at > BATCH_LIMIT_BYTES {
        return Ok(Ending::Damaged);
    }
    let rest = read_up_to(file, ByteRange::between(at, length), length)?;
    let was_durable = pre_images::is_followed(&rest, layer, batches.len() as u64, at);
    Ok(if was_durable { Ending::Damaged } else { Ending::Unfinished })
}

/// Reads what there is of a range of a file that is so long.
fn read_up_to(file: &File, range: ByteRange, length: u64) -> io::Result<Vec<u8>> {
    let there = ByteRange::new(0, length).intersection(range).unwrap_or_default();
    let mut bytes = vec![0; there.length as usize];
    file.read_exact_at(&mut bytes, range.offset)?;
    Ok(bytes)
}

/// The first byte at or after `offset` that is not in a hole.
fn next_data(file: &File, offset: u64) -> io::Result<Option<u64>> {
    match seek(file, SeekFrom::Data(offset)) {
        Ok(data) => Ok(Some(data)),
        Err(rustix::io::Errno::NXIO) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
