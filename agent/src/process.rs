//! What the process as a whole needs, because it sits under file systems.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

/// From linux/prctl.h.
const PR_SET_IO_FLUSHER: libc::c_int = 57;

/// Another process uses the folder.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Another agent holds it.
    #[error("another agent uses {}; give this one folders of its own", .0.display())]
    Held(PathBuf),
    /// The lock's file can't be made.
    #[error("cannot lock {}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Tells the kernel that memory for this process must not be had by writing to the devices that it serves
/// (`PR_SET_IO_FLUSHER`, prctl(2)), keeps its memory from being swapped out, and makes a panic of any thread end the
/// process: a volume that lost its thread must not look alive. What is not permitted is done without.
pub fn prepare() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        hook(panic);
        std::process::abort();
    }));
    // SAFETY: the call takes plain numbers.
    if unsafe { libc::prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0) } != 0 {
        tracing::debug!("not permitted to be an i/o flusher: {}", io::Error::last_os_error());
    }
    lock_memory();
}

/// Keeps the process's memory from being swapped out. Not under a limit: the kernel would then refuse memory where it
/// otherwise gave some.
fn lock_memory() {
    let is_unlimited = rustix::process::getrlimit(rustix::process::Resource::Memlock).current.is_none();
    if !is_unlimited && !rustix::process::geteuid().is_root() {
        return tracing::warn!(
            "memory is not locked, and a swapped-out agent can stall its own devices: the limit is too low; \
             LimitMEMLOCK=infinity in the unit, or ulimit -l unlimited"
        );
    }
    // SAFETY: the call takes plain numbers.
    if unsafe { libc::mlockall(libc::MCL_CURRENT | libc::MCL_FUTURE | libc::MCL_ONFAULT) } != 0 {
        tracing::warn!("memory can't be locked: {}", io::Error::last_os_error());
    }
}

/// Claims a state folder for this process, as long as the answer lives.
///
/// # Errors
/// [`ClaimError`] when another process holds it, or the lock can't be made.
pub fn claim_folder(folder: &Path) -> Result<File, ClaimError> {
    let path = folder.join("lock");
    let io_error = |source| ClaimError::Io { path: path.clone(), source };
    let file = File::options().create(true).truncate(false).write(true).open(&path).map_err(io_error)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(ClaimError::Held(folder.to_owned())),
        Err(std::fs::TryLockError::Error(source)) => Err(io_error(source)),
    }
}
