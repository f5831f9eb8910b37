//! The file of a primary's absent blocks, while its copy is being filled from a replica (S4).

use super::metadata::{State, StateError, folder_error, metadata_error, open_file};
use super::stored;
use crate::blocking::blocking;
use crate::durable;
use crate::storage::file::File;
use crate::storage::{self};
use blockmirror_protocol::disk::MetadataError;
use blockmirror_protocol::disk::absent::{self, Header};
use blockmirror_protocol::disk::superblock::Superblock;
use blockmirror_protocol::rebuild::{Absent, Changes};
use blockmirror_protocol::units::HostId;
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use std::rc::Rc;

impl State {
    /// Makes the file durably: all blocks are absent, and this host has them.
    ///
    /// # Errors
    /// [`StateError`] when it can't be written.
    pub(super) async fn begin_absent(&self, source: HostId) -> Result<(), StateError> {
        let path = self.folder().join(absent::FILE_NAME);
        let header = header(&self.superblock(), source);
        let page = header.encode();
        let begin = move || {
            durable::replace(&path, &[page, page].concat())?;
            let file = std::fs::OpenOptions::new().write(true).open(&path)?;
            // Writes wait for a bit that can't be cleared: the room for all of them is taken now.
            match fallocate(&file, FallocateFlags::empty(), 0, absent::file_bytes(header.blocks)) {
                // Where the file system can't, the file grows.
                Ok(()) | Err(Errno::OPNOTSUPP) => file.sync_all(),
                Err(error) => Err(error.into()),
            }
        };
        blocking(begin).await.map_err(|source| folder_error(self.folder(), source))
    }

    /// The absent blocks and their file, where a rebuild is under way. What is left of one that has ended is removed: of a primary
    /// whose copy is whole, or of a replica, which is copied to as to any other that is not.
    ///
    /// # Errors
    /// [`StateError`] when the file can't be read or removed, or is damaged: nobody knows then which blocks are newer here than
    /// anywhere else.
    pub async fn open_absent(&self) -> Result<Option<(Absent, Rc<File>)>, StateError> {
        let superblock = self.superblock();
        let path = self.folder().join(absent::FILE_NAME);
        let of_folder = |source| folder_error(self.folder(), source);
        let there = path.clone();
        let is_there = blocking(move || there.try_exists()).await.map_err(of_folder)?;
        let is_wanted = superblock.is_absent();
        match (is_there, is_wanted) {
            (false, false) => return Ok(None),
            (true, false) => {
                blocking(move || durable::remove(&path)).await.map_err(of_folder)?;
                return Ok(None);
            }
            (false, true) => {
                let source = MetadataError::Corrupted { what: "map of absent blocks" };
                return Err(metadata_error(self.folder(), source));
            }
            (true, true) => {}
        }
        let file = open_file(path.clone()).await?;
        let read = blocking(move || stored::read_absent(&path)).await.map_err(of_folder)?;
        let of_metadata = |source| metadata_error(self.folder(), source);
        let found = Header::recover(&read.header).map_err(of_metadata)?;
        let mut pages = Vec::new();
        for (page, pair) in &read.pages {
            let read = absent::decode(*page, [&pair[0], &pair[1]]).map_err(of_metadata)?;
            if let Some(missing) = read.missing {
                let whole = &pair[1 - missing];
                let place = absent::places(*page)[missing];
                storage::write(self.storage(), &file, place, self.page(&whole[..]), true).await?;
            }
            pages.push((*page, read));
        }
        let expected = header(&superblock, found.source);
        let absent = Absent::new(&expected, found, superblock.size_bytes, pages).map_err(of_metadata)?;
        Ok(Some((absent, file)))
    }

    /// Writes changes of the file: each page, then, when they are durable, its twin.
    ///
    /// # Errors
    /// [`StateError`] when any of it can't be written; what the file holds is then unknown.
    pub async fn write_absent(&self, file: &Rc<File>, changes: &Changes) -> Result<(), StateError> {
        for twin in 0..2 {
            for (page, bytes) in changes {
                let place = absent::places(*page)[twin];
                storage::write(self.storage(), file, place, self.page(&bytes[..]), false).await?;
            }
            storage::sync(self.storage(), file).await?;
        }
        Ok(())
    }

    /// Nothing is absent any more: says so durably, and removes the file.
    ///
    /// # Errors
    /// [`StateError`] when it can't be said. A file that can't be removed is no error: the next start does that.
    pub async fn end_absent(&self) -> Result<(), StateError> {
        self.change_superblock(Superblock::note_filled).await?;
        let path = self.folder().join(absent::FILE_NAME);
        if let Err(error) = blocking(move || durable::remove(&path)).await {
            tracing::warn!(
                "the map of absent blocks, which is not needed any more, can't be removed: {error}"
            );
        }
        Ok(())
    }
}

fn header(superblock: &Superblock, source: HostId) -> Header {
    let Superblock { volume, size_bytes, block_size, .. } = *superblock;
    Header { volume, source, blocks: block_size.blocks_in(size_bytes), block_size }
}
