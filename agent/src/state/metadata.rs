//! The state folder of one volume: superblock, activity log, marker and a dirty map per peer.
//!
//! What the bytes mean is said in [`blockmirror_protocol::disk`]; here they are read once, when the volume is opened,
//! and written through the volume's storage. Every write is durable when its future ends, and in the order that the
//! layouts ask for. A folder whose superblock is damaged is not opened; a damaged activity log, marker or map only
//! costs time, because it counts as "everything may differ".

use crate::blocking::blocking;
use crate::buffer::BufferPool;
use crate::durable;
use crate::state::generations;
use crate::state::stored;
use crate::storage::file::{File, OpenError};
use crate::storage::{self, Storage};
use blockmirror_protocol::dirty_map::{DirtyMap, MapChanges};
use blockmirror_protocol::disk::dirty_map::Base;
use blockmirror_protocol::disk::superblock::Superblock;
use blockmirror_protocol::disk::{
    MetadataError, PAGE_BYTES, Page, activity_log, dirty_map, marker, slot_offset, superblock,
};
use blockmirror_protocol::given::Given;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::rewrite::{Part, Rewrite};
use blockmirror_protocol::units::{GenerationId, HostId, Mark};
use bytes::Bytes;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

/// Why a state folder can't be used.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// A file can't be opened or made.
    #[error("the volume's state can't be opened")]
    Open(#[from] OpenError),
    /// A file can't be read or written.
    #[error("the volume's state can't be read or written")]
    Storage(#[from] storage::Error),
    /// A file's content is of no use.
    #[error("the volume's state in {folder} can't be used")]
    Metadata {
        /// The folder.
        folder: PathBuf,
        /// What is wrong.
        source: MetadataError,
    },
    /// There is no number for another run as primary.
    #[error(
        "the numbers of a primary's epochs are used up: a host of the volume told of epochs that never were; recover \
         the content into a new volume"
    )]
    UsedUp,
    /// The folder can't be made or listed.
    #[error("the folder {folder} can't be made or read")]
    Folder {
        /// The folder.
        folder: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
}

/// An open state folder. All files are written by the volume's thread alone.
pub struct State {
    folder: PathBuf,
    storage: Rc<dyn Storage>,
    pool: BufferPool,
    superblock_file: Rc<File>,
    /// Whether the newest is there twice. If not, its twin is tried again with each change.
    has_twin: Cell<bool>,
    log_file: Rc<File>,
    marker_file: Rc<File>,
    superblock: RefCell<(u64, Superblock)>,
    /// One change of the superblock at a time.
    changing: tokio::sync::Mutex<()>,
    marker_serial: RefCell<u64>,
}

impl State {
    /// Makes the folder of a new volume or of a new copy of one. Nothing else may be there.
    ///
    /// # Errors
    /// [`StateError`] when a file exists already or can't be written.
    pub(super) async fn create(
        folder: &Path,
        storage: Rc<dyn Storage>,
        pool: BufferPool,
        superblock: &Superblock,
    ) -> Result<Self, StateError> {
        std::fs::create_dir_all(folder).map_err(|source| folder_error(folder, source))?;
        let log = File::create_metadata(folder.join(activity_log::FILE_NAME), activity_log::FILE_BYTES)?;
        let log = Rc::new(log);
        write_ring(&*storage, &log, 0, false).await?;
        drop(log);
        let marker_file = Rc::new(File::create_metadata(folder.join(marker::FILE_NAME), marker::FILE_BYTES)?);
        write_page(&*storage, &marker_file, slot_offset(1), &marker::encode(Mark::default(), 1)).await?;
        // The superblock comes last: a folder with one is complete.
        let file = File::create_metadata(folder.join(superblock::FILE_NAME), superblock::FILE_BYTES)?;
        let file = Rc::new(file);
        for place in superblock::places(1) {
            write_page(&*storage, &file, place, &superblock.encode(1)).await?;
        }
        drop(file);
        drop(marker_file);
        Self::open(folder, storage, pool).await
    }

    /// Notes when a generation began that is durable now; in words only, so nobody waits for it.
    pub fn note_generation(&self, generation: GenerationId) {
        let folder = self.folder.clone();
        crate::blocking::spawn(move || {
            if let Err(error) = generations::note(&folder, generation) {
                tracing::warn!(%error, "cannot note when a generation began in {}", folder.display());
            }
        });
    }

    /// Opens the folder and reads its superblock.
    ///
    /// # Errors
    /// [`StateError`] when a file is missing or the superblock is damaged.
    pub(super) async fn open(
        folder: &Path,
        storage: Rc<dyn Storage>,
        pool: BufferPool,
    ) -> Result<Self, StateError> {
        let superblock_file = open_file(folder.join(superblock::FILE_NAME)).await?;
        let length = superblock_file.size_bytes().min(superblock::FILE_BYTES);
        let (bytes, unread) =
            read(&*storage, &superblock_file, &pool, length - length % PAGE_BYTES as u64).await;
        let superblock = Superblock::recover(&bytes).map_err(|source| match (source, unread) {
            (MetadataError::Corrupted { .. }, Some(error)) => StateError::Storage(error),
            (source, _) => metadata_error(folder, source),
        })?;
        let made = make_twin(&*storage, &superblock_file, bytes).await;
        if let Err(error) = &made {
            tracing::warn!(
                "the superblock can't be kept twice, and is kept once: {}",
                crate::words::with_causes(error)
            );
        }
        Ok(Self {
            folder: folder.to_owned(),
            superblock_file,
            log_file: open_file(folder.join(activity_log::FILE_NAME)).await?,
            marker_file: open_file(folder.join(marker::FILE_NAME)).await?,
            has_twin: Cell::new(made.is_ok()),
            superblock: RefCell::new(superblock),
            changing: tokio::sync::Mutex::default(),
            marker_serial: RefCell::new(0),
            storage,
            pool,
        })
    }

    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    pub(super) fn storage(&self) -> &dyn Storage {
        &*self.storage
    }

    /// What the superblock says.
    #[must_use]
    pub fn superblock(&self) -> Superblock {
        self.superblock.borrow().1.clone()
    }

    /// Changes the superblock durably; one change after the other. Not cancel-safe: what was begun would be written all
    /// the same, perhaps over the next change.
    ///
    /// # Errors
    /// [`StateError`] when it can't be written; what [`State::superblock`] says is then unchanged.
    pub async fn change_superblock(&self, change: impl FnOnce(&mut Superblock)) -> Result<(), StateError> {
        let _one_at_a_time = self.changing.lock().await;
        let (serial, mut superblock) = self.superblock.borrow().clone();
        change(&mut superblock);
        let page = superblock.encode(serial + 1);
        let [slot, twin] = superblock::places(serial + 1);
        write_page(&*self.storage, &self.superblock_file, slot, &page).await?;
        if self.has_twin.get() {
            write_page(&*self.storage, &self.superblock_file, twin, &page).await?;
        } else {
            // At the place of either, so that the next change has room as well.
            let mut is_there = true;
            for place in [superblock::TWINS, superblock::TWINS + PAGE_BYTES as u64] {
                is_there &= write_page(&*self.storage, &self.superblock_file, place, &page).await.is_ok();
            }
            self.has_twin.set(is_there);
        }
        *self.superblock.borrow_mut() = (serial + 1, superblock);
        Ok(())
    }

    /// What the activity log says. One that is not whole is made whole again, and says that everything may be active
    /// until a later record says less.
    ///
    /// # Errors
    /// [`StateError`] when it is newer than this release.
    pub(super) async fn recover_log(&self) -> Result<activity_log::Recovered, StateError> {
        let (bytes, _) = read(&*self.storage, &self.log_file, &self.pool, activity_log::FILE_BYTES).await;
        let recovered =
            activity_log::recover(&bytes).map_err(|source| metadata_error(&self.folder, source))?;
        let activity_log::Recovered::Unsure { serial } = recovered else { return Ok(recovered) };
        match write_ring(&*self.storage, &self.log_file, serial, true).await {
            Ok(newest) => Ok(activity_log::Recovered::Unsure { serial: newest }),
            Err(error) => {
                tracing::warn!("{}", crate::words::with_causes(&error));
                Ok(recovered)
            }
        }
    }

    /// Writes a record that any block may differ, durably, before the volume is opened in a role.
    ///
    /// # Errors
    /// [`StateError`] when the log can't be read or written.
    pub(super) async fn log_everything(&self) -> Result<(), StateError> {
        let (activity_log::Recovered::Active { serial, .. } | activity_log::Recovered::Unsure { serial }) =
            self.recover_log().await?;
        let record = activity_log::encode_everything(serial + 1);
        let offset = activity_log::record_offset(serial + 1);
        Ok(storage::write(&*self.storage, &self.log_file, offset, self.page(&record), true).await?)
    }

    /// The file of the activity log, for its records.
    #[must_use]
    pub fn log_file(&self) -> &Rc<File> {
        &self.log_file
    }

    /// What the marker says; the beginning of all history when it is damaged or can't be read, because it only ever lags.
    ///
    /// # Errors
    /// [`StateError`] when it is newer than this release.
    pub(super) async fn recover_marker(&self) -> Result<Mark, StateError> {
        let (bytes, _) = read(&*self.storage, &self.marker_file, &self.pool, marker::FILE_BYTES).await;
        match marker::recover(&bytes) {
            Ok((serial, mark)) => {
                *self.marker_serial.borrow_mut() = serial;
                Ok(mark)
            }
            Err(MetadataError::Corrupted { .. }) => Ok(Mark::default()),
            Err(source) => Err(metadata_error(&self.folder, source)),
        }
    }

    /// Writes the marker durably. Calls must not overlap.
    ///
    /// # Errors
    /// [`StateError`] when it can't be written.
    pub async fn write_marker(&self, mark: Mark) -> Result<(), StateError> {
        let serial = *self.marker_serial.borrow() + 1;
        *self.marker_serial.borrow_mut() = serial;
        let page = marker::encode(mark, serial);
        write_page(&*self.storage, &self.marker_file, slot_offset(serial), &page).await?;
        Ok(())
    }

    /// The map of one peer, and its file, which is made where there is none: full then, and lost where what it says is damaged
    /// or can't be read.
    ///
    /// # Errors
    /// [`StateError`] when the file can't be opened or made, or is newer than this release.
    pub async fn open_map(&self, peer: HostId) -> Result<(DirtyMap, Rc<File>), StateError> {
        let Superblock { volume, size_bytes, block_size, adopted, .. } = self.superblock();
        let base = Base { adopted, ..Base::default() };
        let mut full = DirtyMap::full(volume, peer, size_bytes, block_size);
        full.begin_anew(base);
        let path = self.folder.join(dirty_map::file_name(peer));
        if !self.has_map(peer).await? {
            // Its header comes with it: one without would be a damaged map after a crash.
            let content = DirtyMap::file_of_everything(volume, peer, size_bytes, block_size, base, None);
            let made = path.clone();
            blocking(move || durable::create(&made, &content))
                .await
                .map_err(|source| folder_error(&self.folder, source))?;
        }
        let file = open_file(path.clone()).await?;
        let there = path.clone();
        let stored = blocking(move || stored::read_map(&there)).await;
        let map =
            map_of(full, &path, stored, adopted).map_err(|source| metadata_error(&self.folder, source))?;
        Ok((map, file))
    }

    /// Whether there is a file of a peer's map. One that can't be looked for is not one that isn't there: it may say what this copy
    /// wrote without the peer (D1).
    async fn has_map(&self, peer: HostId) -> Result<bool, StateError> {
        let path = self.folder.join(dirty_map::file_name(peer));
        blocking(move || path.try_exists()).await.map_err(|source| folder_error(&self.folder, source))
    }

    /// The same for a primary. Where there is none that holds, it says durably that all may differ, so that this host knows
    /// when it is a replica that it wrote without this peer.
    ///
    /// # Errors
    /// [`StateError`] when the file can't be opened or written, or is newer than this release.
    pub async fn open_map_of_follower(&self, peer: HostId) -> Result<(DirtyMap, Rc<File>), StateError> {
        let (map, file) = self.open_map(peer).await?;
        if !map.base().is_none() {
            return Ok((map, file));
        }
        let superblock = self.superblock();
        // What it was given its word on is not known.
        let folder = self.folder.clone();
        blocking(move || replace_map(&folder, peer, &superblock, None)).await?;
        self.open_map(peer).await
    }

    /// The map for a host that joins: all may differ, whatever a file says that was kept for it before.
    ///
    /// # Errors
    /// [`StateError`] when the file can't be written or opened.
    pub async fn new_map_of_follower(&self, peer: HostId) -> Result<(DirtyMap, Rc<File>), StateError> {
        let (folder, superblock) = (self.folder.clone(), self.superblock());
        blocking(move || replace_map(&folder, peer, &superblock, Some(&Given::NOTHING))).await?;
        self.open_map(peer).await
    }

    /// The maps of these peers, where there are any that still hold. A damaged one may have said anything, so it is full.
    ///
    /// # Errors
    /// [`StateError`] when a file can't be read, or is newer than this release.
    pub async fn valid_maps(&self, peers: &[HostId]) -> Result<BTreeMap<HostId, DirtyMap>, StateError> {
        let mut maps = BTreeMap::new();
        for peer in peers {
            if self.has_map(*peer).await? {
                let (map, _) = self.open_map(*peer).await?;
                if map.is_lost() || !map.base().is_none() {
                    maps.insert(*peer, map);
                }
            }
        }
        Ok(maps)
    }

    /// Writes a part of the metadata as a rewrite orders, durably.
    ///
    /// # Errors
    /// [`StateError`] when it can't be read or written.
    pub async fn rewrite(&self, rewrite: &mut Rewrite, part: Part) -> Result<(), StateError> {
        match part {
            Part::Map(peer) => {
                let (map, file) = self.open_map(peer).await?;
                let mut map = rewrite.map(&self.superblock(), peer, map);
                self.write_map(&file, map.take_changes()).await
            }
            Part::Absent(source) => self.begin_absent(source).await,
            Part::Mark(mark) => {
                self.log_everything().await?;
                self.recover_marker().await?;
                self.write_marker(mark).await
            }
            Part::Superblock(change) => {
                self.change_superblock(|superblock| rewrite.change(change, superblock)).await
            }
        }
    }

    /// The maps of hosts that are no peers any more say that all may differ: nobody marks in them, so they would lie if one
    /// came back, and without them nobody would know that this host wrote since. Damaged ones count as that already. Whoever
    /// has such a map open meanwhile, of a host that has just joined again, marks in a file that is gone: all may differ then.
    ///
    /// # Errors
    /// [`StateError`] when the folder can't be read or a map can't be written.
    pub async fn void_other_maps(&self, peers: &[HostId]) -> Result<(), StateError> {
        let (folder, superblock, peers) = (self.folder.clone(), self.superblock(), peers.to_vec());
        blocking(move || void_maps(&folder, &superblock, &peers)).await
    }

    /// Writes a map's changes: pages and holes, then, when they are durable, the header.
    ///
    /// # Errors
    /// [`StateError`] when any of it can't be written; what the file holds is then unknown.
    pub async fn write_map(&self, file: &Rc<File>, changes: MapChanges) -> Result<(), StateError> {
        let storage = &*self.storage;
        let has_pages = !(changes.pages.is_empty() && changes.holes.is_empty());
        for (offset, page) in &changes.pages {
            storage::write(storage, file, *offset, self.page(&page[..]), false).await?;
        }
        for hole in changes.holes {
            storage::zero(storage, file, hole, true).await?;
        }
        if has_pages {
            storage::sync(storage, file).await?;
        }
        if let Some((offset, page)) = changes.header {
            storage::write(storage, file, offset, self.page(&page[..]), true).await?;
        }
        Ok(())
    }

    /// The bytes in a buffer that direct I/O takes.
    #[must_use]
    pub fn page(&self, bytes: &[u8]) -> Bytes {
        let mut buffer = self.pool.take(bytes.len());
        buffer.copy_from_slice(bytes);
        buffer.freeze()
    }
}

pub(super) async fn open_file(path: PathBuf) -> Result<Rc<File>, StateError> {
    Ok(Rc::new(File::opened_when_free(move || File::open_metadata(&path)).await?))
}

/// Reads the beginning of a file page by page. One that can't be read is a damaged one, as media make them; the first
/// error is given too.
async fn read(
    storage: &dyn Storage,
    file: &Rc<File>,
    pool: &BufferPool,
    length: u64,
) -> (Vec<u8>, Option<storage::Error>) {
    let (mut bytes, mut first_error) = (Vec::with_capacity(length as usize), None);
    for page in ByteRange::new(0, length).split_at_multiples(PAGE_BYTES as u64) {
        match storage::read(storage, file, pool, page).await {
            Ok(content) => bytes.extend_from_slice(&content),
            Err(error) => {
                tracing::warn!("{}: it counts as damaged", crate::words::with_causes(&error));
                // No page is whole that says this.
                bytes.resize(bytes.len() + page.length as usize, 0xff);
                first_error.get_or_insert(error);
            }
        }
    }
    (bytes, first_error)
}

/// What the file of a peer's map says; `full`, lost, where that can't be read.
fn map_of(
    full: DirtyMap,
    path: &Path,
    stored: std::io::Result<stored::MapFile>,
    adopted: u64,
) -> Result<DirtyMap, MetadataError> {
    let recovered = match stored {
        Ok(stored) => DirtyMap::recover(&full, &stored.header, stored.pages),
        Err(error) => {
            tracing::warn!(path = %path.display(), "the map can't be read, so all blocks count as dirty: {error}");
            return Ok(full.lost());
        }
    };
    match recovered {
        Ok(mut map) => {
            if map.is_lost() {
                tracing::warn!(path = %path.display(), "the map's newest header is damaged: all blocks count as dirty");
            }
            if map.base().adopted != adopted {
                // What this copy adopted since is not in it (L2).
                map.begin_anew(full.base());
            }
            Ok(map)
        }
        Err(error @ MetadataError::TooNew { .. }) => Err(error),
        Err(damage) => {
            tracing::warn!(path = %path.display(), "{damage}: all blocks count as dirty");
            Ok(full.lost())
        }
    }
}

/// Writes a record into every place of the activity log, durably; the serial number of the last one.
async fn write_ring(
    storage: &dyn Storage,
    file: &Rc<File>,
    after: u64,
    is_everything: bool,
) -> Result<u64, storage::Error> {
    let mut newest = after;
    for (serial, record) in activity_log::ring_after(after, is_everything) {
        write_page(storage, file, activity_log::record_offset(serial), &record).await?;
        newest = serial;
    }
    Ok(newest)
}

/// Sees to it that the newest superblock is there twice, and that there is room for all its changes: an earlier release made the
/// file for its slots alone. `bytes`: what it says.
async fn make_twin(storage: &dyn Storage, file: &Rc<File>, mut bytes: Vec<u8>) -> Result<(), storage::Error> {
    while bytes.len() < superblock::FILE_BYTES as usize {
        write_page(storage, file, bytes.len() as u64, &[0; PAGE_BYTES]).await?;
        bytes.resize(bytes.len() + PAGE_BYTES, 0);
    }
    match Superblock::missing_twin(&bytes) {
        Some((place, page)) => write_page(storage, file, place, &page).await,
        None => Ok(()),
    }
}

async fn write_page(
    storage: &dyn Storage,
    file: &Rc<File>,
    offset: u64,
    page: &Page,
) -> Result<(), storage::Error> {
    let mut buffer = BufferPool::new(0).take(PAGE_BYTES);
    buffer.copy_from_slice(page);
    storage::write(storage, file, offset, buffer.freeze(), true).await
}

pub(super) fn metadata_error(folder: &Path, source: MetadataError) -> StateError {
    StateError::Metadata { folder: folder.to_owned(), source }
}

pub(super) fn folder_error(folder: &Path, source: std::io::Error) -> StateError {
    StateError::Folder { folder: folder.to_owned(), source }
}

/// A peer's map that says that all may differ, in the place of what is there, durably and whole.
fn replace_map(
    folder: &Path,
    peer: HostId,
    superblock: &Superblock,
    given: Option<&Given>,
) -> Result<(), StateError> {
    let Superblock { volume, size_bytes, block_size, .. } = *superblock;
    let base = superblock.base_of_everything();
    let file = DirtyMap::file_of_everything(volume, peer, size_bytes, block_size, base, given);
    durable::replace(&folder.join(dirty_map::file_name(peer)), &file)
        .map_err(|source| folder_error(folder, source))
}

/// All maps but those of these peers say that all may differ.
fn void_maps(folder: &Path, superblock: &Superblock, peers: &[HostId]) -> Result<(), StateError> {
    let kept: Vec<String> = peers.iter().map(|peer| dirty_map::file_name(*peer)).collect();
    let error = |source| folder_error(folder, source);
    for entry in std::fs::read_dir(folder).map_err(error)? {
        let entry = entry.map_err(error)?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with(dirty_map::FILE_PREFIX) || kept.contains(&name) {
            continue;
        }
        let file = stored::read_map(&entry.path()).map_err(error)?;
        let Ok((_, header)) = dirty_map::Header::recover(&file.header) else { continue };
        let is_void =
            header.full_from == 0 && header.base.adopted == superblock.adopted && !header.is_unanswered;
        if !is_void || header.base.is_none() {
            tracing::info!(map = %name, "all may differ from a host that is no peer any more");
            replace_map(folder, header.peer, superblock, Some(&Given::NOTHING))?;
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests;
