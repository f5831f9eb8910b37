//! What the process as a whole needs, because it sits under file systems.

use std::fs::{File, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
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
/// process: a volume that lost its thread must not look alive, and what threads share may be half changed. What is not permitted is done without.
pub fn prepare() {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        hook(panic);
        crate::crashes::note(panic);
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

/// Opens a file that is there to be locked, for its owner alone: whoever may read one may lock it, and so keep the agent
/// from starting.
///
/// # Errors
/// When it can't be made, or its rights can't be set.
pub fn open_lock(path: &Path) -> io::Result<File> {
    let file = File::options().create(true).truncate(false).write(true).mode(0o600).open(path)?;
    file.set_permissions(Permissions::from_mode(0o600))?;
    Ok(file)
}

/// Claims a state folder for this process, as long as the answer lives.
///
/// # Errors
/// [`ClaimError`] when another process holds it, or the lock can't be made.
pub fn claim_folder(folder: &Path) -> Result<File, ClaimError> {
    let path = folder.join("lock");
    let io_error = |source| ClaimError::Io { path: path.clone(), source };
    let file = open_lock(&path).map_err(io_error)?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(ClaimError::Held(folder.to_owned())),
        Err(std::fs::TryLockError::Error(source)) => Err(io_error(source)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_is_for_its_owner_alone_also_one_of_an_earlier_release() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("lock");
        for mode in [None, Some(0o644)] {
            if let Some(mode) = mode {
                std::fs::set_permissions(&path, Permissions::from_mode(mode)).unwrap();
            }
            let lock = open_lock(&path).unwrap();
            assert_eq!(lock.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        }
    }
}
