//! Where the content goes: an image file or a block device.
//!
//! Nothing that holds data is written to unasked. A target belongs to an unfinished recovery when that one's state
//! names it: a file by its inode, a device by what its disk calls itself, since a path may lead to another disk after
//! a restart.

use blockmirror_agent::buffer::BufferPool;
use blockmirror_agent::control::api::{Failure, FailureKind};
use blockmirror_agent::quantity::Size;
use blockmirror_agent::storage::file::{Access, File, Kind, OpenError};
use blockmirror_agent::storage::users::User;
use blockmirror_agent::storage::{self, Storage, probe};
use blockmirror_protocol::ranges::ByteRange;
use bytes::Bytes;
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::Duration;
use tokio::time::Instant;

/// How much free memory is kept for frames, in bytes.
const POOL_BYTES: usize = 32 << 20;

/// How long a lock on the target is waited for, and how often it is tried.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(2);
const CLAIM_INTERVAL: Duration = Duration::from_millis(50);

/// What is at the target's path before anything is done.
pub struct Found {
    path: PathBuf,
    /// Nothing where there is no file yet, or one without a byte.
    file: Option<File>,
}

/// A target that is being written.
pub struct Target {
    storage: Rc<dyn Storage>,
    file: Rc<File>,
    pool: BufferPool,
}

impl Found {
    /// Looks, and claims what is there.
    pub async fn look(path: &Path) -> Result<Self, Failure> {
        let file = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Ok(status) if status.is_file() && status.len() == 0 => None,
            _ => Some(claim(path).await?),
        };
        Ok(Self { path: path.to_owned(), file })
    }

    /// Names what is there, for a recovery's state; nothing where there is nothing.
    pub fn identity(&self) -> Result<Option<u64>, Failure> {
        self.file.as_ref().map(identity).transpose()
    }

    /// Refuses what holds data.
    pub fn refuse_data(&self) -> Result<(), Failure> {
        let Some(file) = &self.file else { return Ok(()) };
        let content = probe::what_is_on(file)
            .map_err(|error| failed(&format!("cannot read {}: {error}", self.path.display())))?;
        content.map_or(Ok(()), |content| {
            let path = self.path.display();
            let message = format!("{path} holds {content}; add --overwrite to lose that");
            Err(Failure::new(FailureKind::Refused, message))
        })
    }

    /// Refuses a disk that is too small.
    pub fn must_hold(&self, size_bytes: u64) -> Result<(), Failure> {
        match &self.file {
            Some(file) if file.kind() == Kind::BlockDevice && file.size_bytes() < size_bytes => {
                let (has, needed, path) = (Size(file.size_bytes()), Size(size_bytes), file.path().display());
                Err(failed(&format!("{path} has {has} and the volume {needed}; use a larger disk")))
            }
            _ => Ok(()),
        }
    }

    /// Gives the target the volume's size and opens it. What an image file that is not `ours` held is gone then.
    pub fn prepare(self, size_bytes: u64, ours: bool, storage: Rc<dyn Storage>) -> Result<Target, Failure> {
        let Self { path, file } = self;
        let file = match file {
            Some(file) if file.kind() == Kind::BlockDevice => file,
            Some(file) if ours && file.size_bytes() == size_bytes => file,
            Some(file) => {
                resize(&path, &file, size_bytes)?;
                // The storage knows a backing's size from when it was opened.
                drop(file);
                open(&path)?
            }
            None => {
                create(&path, size_bytes)?;
                open(&path)?
            }
        };
        Ok(Target { storage, file: Rc::new(file), pool: BufferPool::new(POOL_BYTES) })
    }
}

impl Target {
    /// Names the target, for a recovery's state.
    pub fn identity(&self) -> Result<u64, Failure> {
        identity(&self.file)
    }

    /// What carries out its operations.
    pub fn storage(&self) -> &Rc<dyn Storage> {
        &self.storage
    }

    /// The open file.
    pub fn file(&self) -> &Rc<File> {
        &self.file
    }

    /// Where frames are put.
    pub fn pool(&self) -> &BufferPool {
        &self.pool
    }

    /// Writes content.
    pub async fn write(&self, offset: u64, data: Bytes) -> Result<(), storage::Error> {
        storage::write(&*self.storage, &self.file, offset, data, false).await
    }

    /// Makes a range read as zeroes; where it is a hole, it does already.
    pub async fn zero(&self, range: ByteRange) -> Result<(), storage::Error> {
        if self.file.allocation(range).all(|part| part.is_ok_and(|part| part.hole)) {
            return Ok(());
        }
        storage::zero(&*self.storage, &self.file, range, true).await
    }

    /// Makes everything durable that was written.
    pub async fn sync(&self) -> Result<(), storage::Error> {
        storage::sync(&*self.storage, &self.file).await
    }

    /// Waits until nothing is being written any more.
    pub async fn drain(&self) {
        storage::drain(&*self.storage).await;
    }
}

fn failed(message: &str) -> Failure {
    Failure::new(FailureKind::Failed, message)
}

/// Opens a backing. The kernel lets go of what a killed process held only a moment after it has ended, so a lock is
/// waited for.
async fn claim(path: &Path) -> Result<File, Failure> {
    let started = Instant::now();
    loop {
        match File::open_backing(path, Access::ReadWrite) {
            Err(OpenError::InUse { user: User::Lock | User::Exclusive, .. })
                if started.elapsed() < CLAIM_TIMEOUT =>
            {
                tokio::time::sleep(CLAIM_INTERVAL).await;
            }
            opened => return opened.map_err(|error| open_failure(&error)),
        }
    }
}

fn open(path: &Path) -> Result<File, Failure> {
    File::open_backing(path, Access::ReadWrite).map_err(|error| open_failure(&error))
}

fn open_failure(error: &OpenError) -> Failure {
    let kind = match error {
        OpenError::InUse { .. } => FailureKind::Refused,
        _ => FailureKind::Failed,
    };
    Failure::from_error(kind, error)
}

/// Empties an image file and gives it a size. The claim on the file holds meanwhile.
fn resize(path: &Path, file: &File, size_bytes: u64) -> Result<(), Failure> {
    let emptied = file.as_fd().try_clone_to_owned().map(fs::File::from).and_then(|file| {
        file.set_len(0)?;
        file.set_len(size_bytes)?;
        file.sync_all()
    });
    emptied.map_err(|error| failed(&format!("cannot resize {}: {error}", path.display())))
}

fn create(path: &Path, size_bytes: u64) -> Result<(), Failure> {
    match File::create_image(path, size_bytes) {
        Err(OpenError::Exists { .. }) => {
            let sized = fs::OpenOptions::new().write(true).open(path).and_then(|file| {
                file.set_len(size_bytes)?;
                file.sync_all()
            });
            sized.map_err(|error| failed(&format!("cannot resize {}: {error}", path.display())))
        }
        created => created.map_err(|error| open_failure(&error)),
    }
}

fn identity(file: &File) -> Result<u64, Failure> {
    let unknown = |error| failed(&format!("cannot look at {}: {error}", file.path().display()));
    let status =
        fs::File::from(file.as_fd().try_clone_to_owned().map_err(unknown)?).metadata().map_err(unknown)?;
    Ok(match file.kind() {
        Kind::BlockDevice => device_identity(status.rdev(), file.size_bytes()),
        Kind::Image | Kind::Metadata => status.ino(),
    })
}

/// A hash over what the kernel knows a disk by that stays with it; where that is nothing, over what stays until the
/// disk is taken out or the host restarts.
fn device_identity(device: u64, size_bytes: u64) -> u64 {
    let (major, minor) = (device >> 8 & 0xfff | device >> 32 & !0xfff, device & 0xff | device >> 12 & !0xff);
    let folder = PathBuf::from(format!("/sys/dev/block/{major}:{}", minor & 0xffff_ffff));
    // A partition's folder lies in its disk's.
    let partition = fs::read_to_string(folder.join("partition")).ok();
    let disk = match partition {
        Some(_) => fs::canonicalize(&folder).ok().and_then(|path| path.parent().map(Path::to_owned)),
        None => Some(folder),
    };
    let read = |name: &str| disk.as_ref().and_then(|disk| fs::read_to_string(disk.join(name)).ok());
    let lasting = ["wwid", "device/wwid", "serial", "device/serial", "dm/uuid", "loop/backing_file"];
    let mut names: Vec<Option<String>> = lasting.into_iter().map(read).collect();
    if names.iter().all(Option::is_none) {
        names = vec![read("diskseq"), fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()];
    }
    let text = format!("{size_bytes} {partition:?} {names:?}");
    let hash = blake3::hash(text.as_bytes());
    u64::from_le_bytes(*hash.as_bytes().first_chunk().expect("a hash has 32 bytes"))
}
