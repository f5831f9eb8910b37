//! An open backing or metadata file: its descriptor, and what the descriptor can do.
//!
//! A backing is opened by one agent for writing, or by several for reading only: the claim on it (an exclusive open
//! of a device, locks on an image file) lasts as long as any operation on it. It has neither header nor trailer of
//! ours, and its size never changes. Metadata files grow, and are claimed as image files are.
//!
//! The kernel finishes a killed agent's operations after the process is gone, and the claims end only then. What such
//! an operation writes must not come after what the next agent does: [`File::opened_when_free`] waits for its end.
//!
//! Direct I/O is used where the file takes it, so that no write waits in a cache that could need this very device to
//! make room. Where it doesn't, [`File::is_direct`] says so: everything else works, and syncs are as good.

use super::users::{self, User};
use super::zeroing::can_punch_beyond;
use super::{Tally, Writes, claim, direct};
use crate::blocking::blocking;
use crate::durable::sync_folder_of;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::SECTOR_BYTES;
use rustix::fs::{AtFlags, FallocateFlags, SeekFrom, StatxFlags, fallocate, seek, statx};
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// How often, and how long apart, a file that is claimed is tried: 5 s in all.
const CLAIM_ATTEMPTS: u32 = 100;
const CLAIM_PAUSE: Duration = Duration::from_millis(50);

/// `RAMFS_MAGIC` of `linux/magic.h`.
const RAMFS_MAGIC: i64 = 0x8584_58f6;
/// File systems whose content is with a server, or is looked after together with other hosts: any call may wait for those
/// (`linux/magic.h`; `fs/ceph/super.h`, `fs/smb/client/cifsglob.h` and `fs/gfs2`'s headers for the others).
const SERVED: [i64; 11] = [
    libc::FUSE_SUPER_MAGIC,
    libc::NFS_SUPER_MAGIC,
    libc::SMB_SUPER_MAGIC,
    libc::AFS_SUPER_MAGIC,
    libc::CODA_SUPER_MAGIC,
    libc::OCFS2_SUPER_MAGIC,
    0xfe53_4d42, // SMB2
    0xff53_4d42, // CIFS
    0x00c3_6400, // Ceph
    0x0102_1997, // 9P
    0x0116_1970, // GFS2
];

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// To read and write it, alone.
    ReadWrite,
    /// To read it, with others who only read it.
    ReadOnly,
}

/// What a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A backing in a regular file.
    Image,
    /// A backing on a block device.
    BlockDevice,
    /// A metadata file of ours.
    Metadata,
}

/// A part of a file or disk, as it is allocated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// How many bytes.
    pub length: u64,
    /// Whether it is a hole, which reads as zeroes.
    pub hole: bool,
}

/// An open file or block device.
#[derive(Debug)]
pub struct File {
    descriptor: Arc<Descriptor>,
}

/// What an operation under way needs of its file, on whatever thread it is carried out. The descriptor, and the claim
/// on the backing with it, lasts until the last operation ended.
#[derive(Debug)]
pub(super) struct Descriptor {
    pub(super) fd: OwnedFd,
    pub(super) path: PathBuf,
    pub(super) kind: Kind,
    pub(super) size_bytes: u64,
    /// Offsets and lengths of calls are multiples of this.
    pub(super) alignment: u64,
    /// Memory of calls starts at a multiple of this.
    pub(super) memory_alignment: usize,
    pub(super) direct: bool,
    /// Whether the bytes are in memory, so that a call copies them and doesn't wait for a disk.
    pub(super) in_memory: bool,
    /// Whether a call may wait for a server, also one that is told not to wait.
    pub(super) served: bool,
    /// Whether a durable write is durable by its flag alone. FUSE does not tell its server of the flag where a write is
    /// direct and asynchronous (seen with Linux 6.18), so a sync follows there.
    pub(super) writes_durably: bool,
    /// Whether holes can be punched; cleared when the file refuses.
    pub(super) punches: AtomicBool,
    /// Whether ranges can be zeroed in place; cleared when the file refuses.
    pub(super) zeroes_ranges: AtomicBool,
    /// What a backing was found to be before it was opened.
    pub(super) found: Option<fs::Metadata>,
    /// Who wants to know of writes, if anybody does.
    pub(super) writes: OnceLock<Arc<Writes>>,
}

impl Descriptor {
    /// Whether a call can transfer this range to or from this memory.
    pub(super) fn takes(&self, range: ByteRange, memory: &[u8]) -> bool {
        range.is_aligned(self.alignment) && memory.as_ptr().addr().is_multiple_of(self.memory_alignment)
    }
}

impl Descriptor {
    /// Whether the file is as long as it was when it was opened, as far as the kernel knows without asking anybody; only
    /// metadata files may change. What was cut off reads as zeroes when the file is made longer again, so a write beyond
    /// its end would hide that content was lost.
    pub(super) fn check_size(&self) -> io::Result<()> {
        if self.kind == Kind::Image && self.present_size_bytes()? < self.size_bytes {
            return Err(super::job::cut_off());
        }
        Ok(())
    }

    /// How many bytes it has now, as far as the kernel knows without asking anybody or waiting for a disk.
    fn present_size_bytes(&self) -> io::Result<u64> {
        match self.kind {
            // A seek to its end may wait for what is under way.
            Kind::BlockDevice => device_size_bytes(&self.fd),
            // Its server may hang, and is not asked.
            _ if self.served => {
                let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
                Ok(statx(&self.fd, "", flags, StatxFlags::SIZE)?.stx_size)
            }
            _ => Ok(rustix::fs::fstat(&self.fd)?.st_size.cast_unsigned()),
        }
    }

    /// See [`File::check_end`].
    fn check_end(&self, range: ByteRange) -> io::Result<()> {
        let size_bytes = rustix::fs::fstat(&self.fd)?.st_size.cast_unsigned();
        if self.kind != Kind::Metadata && size_bytes < range.end() {
            return Err(super::job::cut_off());
        }
        Ok(())
    }

    /// What an error is about that came of the size of a backing: one that was made smaller gives errors that speak of
    /// other things, of no space for one.
    pub(super) fn explained(&self, error: io::Error) -> io::Error {
        let what = match self.kind {
            Kind::BlockDevice => "the device",
            Kind::Image => "the file",
            Kind::Metadata => return error,
        };
        match self.present_size_bytes() {
            Ok(size_bytes) if size_bytes != self.size_bytes => {
                let text = format!(
                    "{what} has {size_bytes} bytes now, and had {} when it was opened ({error})",
                    self.size_bytes
                );
                io::Error::new(error.kind(), text)
            }
            _ => error,
        }
    }
}

impl Drop for Descriptor {
    fn drop(&mut self) {
        claim::release(&self.fd);
    }
}

/// Why a file can't be opened or created.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// There is nothing at the path.
    #[error("{} does not exist; create it or correct the path", path.display())]
    NotFound {
        /// The path.
        path: PathBuf,
    },
    /// There is a file already where one was to be created.
    #[error("{} exists already; choose another path or remove it", path.display())]
    Exists {
        /// The path.
        path: PathBuf,
    },
    /// The folder of a file to be created does not exist.
    #[error("the folder {} does not exist; create it first", path.display())]
    NoFolder {
        /// The folder.
        path: PathBuf,
    },
    /// A folder, a socket, or the like.
    #[error("{} is neither a regular file nor a block device", path.display())]
    WrongType {
        /// The path.
        path: PathBuf,
    },
    /// The size is zero, or not a multiple of 512.
    #[error("{} has a size of {size_bytes} bytes; use one that is a multiple of 512 and not zero", path.display())]
    UnusableSize {
        /// The path.
        path: PathBuf,
        /// Its size.
        size_bytes: u64,
    },
    /// Somebody else uses it.
    #[error("{} is in use: {user}", path.display())]
    InUse {
        /// The path.
        path: PathBuf,
        /// Who, as far as can be told.
        user: User,
    },
    /// The kernel refused.
    #[error("cannot {operation} {}", path.display())]
    Io {
        /// What was tried.
        operation: &'static str,
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl OpenError {
    /// Whether somebody else holds the file, who may be about to let go of it.
    #[must_use]
    pub fn is_claimed(&self) -> bool {
        matches!(self, Self::InUse { user: User::Exclusive | User::Lock, .. })
    }
}

/// Turns the kernel's errors about one path into [`OpenError`]s.
struct About<'a>(&'a Path);

impl About<'_> {
    fn cannot(&self, operation: &'static str) -> impl FnOnce(io::Error) -> OpenError {
        let path = self.0.to_path_buf();
        move |source| match source.kind() {
            io::ErrorKind::NotFound => OpenError::NotFound { path },
            _ => OpenError::Io { operation, path, source },
        }
    }

    fn used_by(&self, user: User) -> OpenError {
        OpenError::InUse { path: self.0.to_path_buf(), user }
    }
}

impl File {
    /// Opens an image file or block device as a backing, and claims it as long as the file or an operation on it
    /// lasts.
    ///
    /// # Errors
    /// [`OpenError`]: it doesn't exist, is of another type, has an unusable size, or is in use.
    pub fn open_backing(path: impl AsRef<Path>, access: Access) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let about = About(path);
        let status = fs::metadata(path).map_err(about.cannot("look at"))?;
        let kind = match status.file_type() {
            file_type if file_type.is_file() => Kind::Image,
            file_type if file_type.is_block_device() => Kind::BlockDevice,
            _ => return Err(OpenError::WrongType { path: path.to_path_buf() }),
        };
        let users = match kind {
            Kind::BlockDevice => users::of_device(status.rdev()),
            _ => users::of_image(path, &status),
        };
        if let Some(user) = users.map_err(about.cannot("find out who uses"))? {
            return Err(about.used_by(user));
        }
        let claimed = claim::open(path, kind, access).map_err(about.cannot("open"))?;
        let (fd, direct) = claimed.map_err(|user| about.used_by(user))?;
        let size_bytes =
            seek(&fd, SeekFrom::End(0)).map_err(|error| about.cannot("measure")(error.into()))?;
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(OpenError::UnusableSize { path: path.to_path_buf(), size_bytes });
        }
        let mut file = Self::with(fd, path, kind, size_bytes, direct).map_err(about.cannot("examine"))?;
        Arc::get_mut(&mut file.descriptor).expect("nobody shares it yet").found = Some(status);
        Ok(file)
    }

    /// Makes an image file of `size_bytes` that reads as zeroes and takes no space yet. It is durable when this
    /// returns.
    ///
    /// # Errors
    /// [`OpenError`]: the file exists, its folder doesn't, the size is unusable, or the kernel refuses.
    pub fn create_image(path: impl AsRef<Path>, size_bytes: u64) -> Result<(), OpenError> {
        let path = path.as_ref();
        if size_bytes == 0 || !size_bytes.is_multiple_of(SECTOR_BYTES) {
            return Err(OpenError::UnusableSize { path: path.to_path_buf(), size_bytes });
        }
        create(path, |file| file.set_len(size_bytes))
    }

    /// Opens a metadata file, and claims it as a backing is.
    ///
    /// # Errors
    /// [`OpenError`]: it doesn't exist, is no regular file, or is in use.
    pub fn open_metadata(path: impl AsRef<Path>) -> Result<Self, OpenError> {
        let path = path.as_ref();
        let about = About(path);
        let status = fs::metadata(path).map_err(about.cannot("look at"))?;
        if !status.is_file() {
            return Err(OpenError::WrongType { path: path.to_path_buf() });
        }
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        let (fd, direct) = direct::open(path, &options, 0).map_err(about.cannot("open"))?;
        if !claim::lock(&fd, Kind::Metadata, Access::ReadWrite).map_err(about.cannot("lock"))? {
            return Err(about.used_by(User::Lock));
        }
        Self::with(fd, path, Kind::Metadata, status.len(), direct).map_err(about.cannot("examine"))
    }

    /// Makes a metadata file whose first `initial_size_bytes` are written as zeroes, so that overwriting them later
    /// allocates nothing. It is durable when this returns.
    ///
    /// # Errors
    /// [`OpenError`]: the file exists, its folder doesn't, or the kernel refuses.
    pub fn create_metadata(path: impl AsRef<Path>, initial_size_bytes: u64) -> Result<Self, OpenError> {
        create(path.as_ref(), |file| write_zeroes(file, initial_size_bytes))?;
        Self::open_metadata(path)
    }

    /// Opens a file as `open` does, on a thread for calls that may hang. One that is claimed by somebody else is tried
    /// again for some seconds, in which what is left of a killed agent has gone.
    ///
    /// # Errors
    /// What `open` gives, or gives at last.
    pub async fn opened_when_free(
        open: impl Fn() -> Result<Self, OpenError> + Clone + Send + 'static,
    ) -> Result<Self, OpenError> {
        for _ in 0..CLAIM_ATTEMPTS {
            match blocking(open.clone()).await {
                Err(error) if error.is_claimed() => tokio::time::sleep(CLAIM_PAUSE).await,
                opened => return opened,
            }
        }
        blocking(open).await
    }

    fn with(fd: OwnedFd, path: &Path, kind: Kind, size_bytes: u64, direct: bool) -> io::Result<Self> {
        let alignment = direct::settle(&fd, kind, size_bytes, direct)?;
        let punches = match kind {
            Kind::BlockDevice => direct::device_clears_itself(&fd)?,
            Kind::Image | Kind::Metadata => can_punch_beyond(&fd, size_bytes),
        };
        // A device's node tells of the file system that the node is in.
        let file_system = match kind {
            Kind::BlockDevice => 0,
            Kind::Image | Kind::Metadata => rustix::fs::fstatfs(&fd)?.f_type,
        };
        let descriptor = Descriptor {
            fd,
            path: path.to_path_buf(),
            kind,
            size_bytes,
            alignment: alignment.map_or(SECTOR_BYTES, |alignment| alignment.offset_bytes),
            memory_alignment: alignment.map_or(1, |alignment| alignment.memory_bytes),
            direct: alignment.is_some(),
            in_memory: matches!(file_system, libc::TMPFS_MAGIC | RAMFS_MAGIC),
            served: SERVED.contains(&file_system),
            writes_durably: file_system != libc::FUSE_SUPER_MAGIC,
            punches: AtomicBool::new(punches),
            zeroes_ranges: AtomicBool::new(true),
            found: None,
            writes: OnceLock::new(),
        };
        Ok(Self { descriptor: Arc::new(descriptor) })
    }

    pub(super) fn descriptor(&self) -> &Arc<Descriptor> {
        &self.descriptor
    }

    /// As on a file system that does not make writes durable by their flag.
    #[cfg(test)]
    pub(super) fn without_durable_writes(mut self) -> Self {
        Arc::get_mut(&mut self.descriptor).expect("nobody shares it yet").writes_durably = false;
        self
    }

    /// What a backing was found to be before it was opened: trying whether holes can be punched changes its times.
    #[must_use]
    pub fn found(&self) -> Option<&fs::Metadata> {
        self.descriptor.found.as_ref()
    }

    /// Counts writes from now on, and how much they write in `tally`; the first one after each quiet time leaves `mark` at
    /// the beginning of `note`. Only the first call for a file does that.
    pub fn watch_writes(&self, note: fs::File, mark: &'static [u8], tally: Option<Tally>) -> Arc<Writes> {
        self.descriptor.writes.get_or_init(|| Arc::new(Writes::new(note, mark, tally))).clone()
    }

    /// The path that the file was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.descriptor.path
    }

    /// What the file is.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.descriptor.kind
    }

    /// The file's size when it was opened, in bytes. A backing keeps it; a metadata file can grow.
    #[must_use]
    pub fn size_bytes(&self) -> u64 {
        self.descriptor.size_bytes
    }

    /// The size that a backing has now, in bytes, where that is less than it was when it was opened. No disk and no server
    /// is waited for.
    #[must_use]
    pub fn shrunk_to(&self) -> Option<u64> {
        self.descriptor.present_size_bytes().ok().filter(|size_bytes| *size_bytes < self.size_bytes())
    }

    /// The size that a backing has now, in bytes, where that is more than it was before.
    #[must_use]
    pub fn grown_to(&self, before_bytes: u64) -> Option<u64> {
        self.descriptor.present_size_bytes().ok().filter(|size_bytes| *size_bytes > before_bytes)
    }

    /// The unit, in bytes, that is read, modified and written when an operation covers a part of it. At least 512.
    #[must_use]
    pub fn alignment(&self) -> u64 {
        self.descriptor.alignment
    }

    /// Whether direct I/O is in use. Without it writes pass through the kernel's cache, which is worth a warning.
    #[must_use]
    pub fn is_direct(&self) -> bool {
        self.descriptor.direct
    }

    /// Whether space can be given back so that it reads as zeroes; else zeroes are written.
    #[must_use]
    pub fn can_unmap(&self) -> bool {
        self.descriptor.punches.load(Ordering::Relaxed)
    }

    /// Whether all of a range is known to be a hole, which reads as zeroes.
    #[must_use]
    pub fn is_hole(&self, range: ByteRange) -> bool {
        self.hole_at(range).is_ok_and(|length| length == range.length)
    }

    /// The same file. What it is used for on another thread keeps it open, and claimed.
    #[must_use]
    pub fn share(&self) -> Self {
        Self { descriptor: self.descriptor.clone() }
    }

    /// Whether the kernel tells of holes without asking a disk or a server.
    #[must_use]
    pub fn knows_its_holes(&self) -> bool {
        self.descriptor.in_memory || self.kind() == Kind::BlockDevice
    }

    /// As [`File::hole_at`], on another thread where the kernel may have to wait for a disk.
    ///
    /// # Errors
    /// As there.
    pub async fn find_hole(&self, range: ByteRange) -> io::Result<u64> {
        if self.knows_its_holes() {
            return self.hole_at(range);
        }
        let file = self.share();
        blocking(move || file.hole_at(range)).await
    }

    /// The length in bytes of the hole that a range begins with; 0 where it begins with data, or that can't be told.
    ///
    /// Asks the kernel once, for the next data: the end of data is never looked for, which takes some file systems
    /// (tmpfs) a walk over all of it.
    ///
    /// # Errors
    /// The kernel's; and as a read's, when the backing was cut off below it and ends before the range does.
    pub fn hole_at(&self, range: ByteRange) -> io::Result<u64> {
        if self.kind() == Kind::BlockDevice {
            return Ok(0);
        }
        match seek(self, SeekFrom::Data(range.offset)) {
            Ok(data_at) => Ok(data_at.min(range.end()).saturating_sub(range.offset)),
            // The same answer for a hole up to the file's end and for what lies beyond that.
            Err(rustix::io::Errno::NXIO) => self.check_end(range).map(|()| range.length),
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(0),
            Err(error) => Err(error.into()),
        }
    }

    /// Refuses a range that the file doesn't hold any more, as a read of it does. What a metadata file has beyond its
    /// end reads as zeroes.
    fn check_end(&self, range: ByteRange) -> io::Result<()> {
        self.descriptor.check_end(range)
    }

    /// Which parts of a range are allocated, in order and without gaps; neighbours differ. Where that can't be told,
    /// as on a block device, everything is. A hole reads as zeroes.
    ///
    /// Each step asks the kernel, synchronously. After an error there is nothing more.
    pub fn allocation(&self, range: ByteRange) -> impl Iterator<Item = io::Result<Part>> + '_ {
        let mut rest = range;
        std::iter::from_fn(move || {
            if rest.is_empty() {
                return None;
            }
            let part = self.part_at(rest);
            let length = part.as_ref().map_or(rest.length, |part| part.length);
            rest = ByteRange::between(rest.offset + length, rest.end());
            Some(part)
        })
    }

    /// The part that the range starts with.
    fn part_at(&self, range: ByteRange) -> io::Result<Part> {
        let whole = |hole| Ok(Part { length: range.length, hole });
        match self.hole_at(range)? {
            0 => {}
            length => return Ok(Part { length, hole: true }),
        }
        if self.kind() == Kind::BlockDevice {
            return whole(false);
        }
        let end = match seek(self, SeekFrom::Hole(range.offset)) {
            Ok(end) => end,
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NXIO) => {
                return whole(false);
            }
            Err(error) => return Err(error.into()),
        };
        if end <= range.offset {
            // Somebody changed the file between the two questions; data is the safe answer.
            return whole(false);
        }
        Ok(Part { length: end.min(range.end()) - range.offset, hole: false })
    }
}

impl AsFd for File {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.descriptor.fd.as_fd()
    }
}

/// Makes a file, fills it, and makes both it and its name durable. Nothing is left of it after an error.
fn create(path: &Path, fill: impl FnOnce(&mut fs::File) -> io::Result<()>) -> Result<(), OpenError> {
    let about = About(path);
    let folder = match path.parent() {
        Some(folder) if folder != Path::new("") => folder,
        _ => Path::new("."),
    };
    if !folder.is_dir() {
        return Err(OpenError::NoFolder { path: folder.to_path_buf() });
    }
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let mut file = options.open(path).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => OpenError::Exists { path: path.to_path_buf() },
        _ => about.cannot("create")(error),
    })?;
    let made = fill(&mut file).and_then(|()| file.sync_all()).and_then(|()| sync_folder_of(path));
    if made.is_err() {
        // What went wrong first is what matters; the file that couldn't be made may also refuse to be removed.
        let _ = fs::remove_file(path);
    }
    made.map_err(about.cannot("create"))
}

/// `BLKGETSIZE64` of `linux/fs.h`.
fn device_size_bytes(fd: &OwnedFd) -> io::Result<u64> {
    const BLKGETSIZE64: libc::Ioctl = 0x8008_1272;
    let mut size_bytes = 0_u64;
    // SAFETY: the kernel writes 64 bits to the place, which is as long and lives on.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), BLKGETSIZE64, &raw mut size_bytes) };
    if result == 0 { Ok(size_bytes) } else { Err(io::Error::last_os_error()) }
}

fn write_zeroes(file: &mut fs::File, size_bytes: u64) -> io::Result<()> {
    if size_bytes == 0 {
        return Ok(());
    }
    match fallocate(&*file, FallocateFlags::empty(), 0, size_bytes) {
        // It only keeps the file in one piece; writing allocates as well.
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP) => {}
        Err(error) => return Err(error.into()),
    }
    let zeroes = vec![0; 1 << 20];
    for piece in ByteRange::new(0, size_bytes).split_at_multiples(zeroes.len() as u64) {
        file.write_all(&zeroes[..piece.length as usize])?;
    }
    Ok(())
}
