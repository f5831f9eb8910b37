//! Small files that are replaced whole: after a crash a file has its old content or its new one, never a mixture.
//!
//! The new content goes to a file beside the old one, is made durable, and takes the name in one step; the folder is
//! synced last, so that success means the name is durable too. A crash may leave the file beside, which the next
//! write removes. Files are readable by their owner alone: what is kept this way is secret.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Replaces the file at `path`, or creates it.
///
/// # Errors
/// The kernel's error; the file then has its old content or, where only the last step failed, its new one.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let beside = write_beside(path, content)?;
    std::fs::rename(beside, path)?;
    sync_folder_of(path)
}

/// Removes a file, if it is there, durably.
///
/// # Errors
/// What the kernel said.
pub fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.and_then(|()| sync_folder_of(path)),
    }
}

/// Creates the file at `path` unless there is one already.
///
/// # Errors
/// `AlreadyExists` where there is one, which is left as it is; otherwise the kernel's error.
pub fn create(path: &Path, content: &[u8]) -> io::Result<()> {
    let beside = write_beside(path, content)?;
    let linked = std::fs::hard_link(&beside, path);
    std::fs::remove_file(&beside)?;
    linked?;
    sync_folder_of(path)
}

/// Two processes never share the file beside, so neither can publish the other's half-written content.
fn write_beside(path: &Path, content: &[u8]) -> io::Result<PathBuf> {
    let mut name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let beside = path.with_file_name(name);
    // Whatever is there, left by a crash or put there by somebody who may write to the folder, is neither followed nor
    // written to.
    remove(&beside)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&beside)?;
    file.set_permissions(std::fs::Permissions::from_mode(0o600))?;
    file.write_all(content)?;
    file.sync_all()?;
    Ok(beside)
}

fn sync_folder_of(path: &Path) -> io::Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_for_its_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        replace(&path, b"a longer first content").unwrap();
        replace(&path, b"second").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"second");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    }

    #[test]
    fn a_link_that_somebody_put_beside_is_not_followed() {
        let folder = tempfile::tempdir().unwrap();
        let (path, other) = (folder.path().join("file"), folder.path().join("other"));
        std::fs::write(&other, b"of somebody else").unwrap();
        let beside = folder.path().join(format!("file.new-{}", std::process::id()));
        std::os::unix::fs::symlink(&other, &beside).unwrap();
        replace(&path, b"secret").unwrap();
        assert_eq!(std::fs::read(&other).unwrap(), b"of somebody else");
        assert_eq!(std::fs::read(&path).unwrap(), b"secret");
        std::fs::hard_link(&other, &beside).unwrap();
        replace(&path, b"another").unwrap();
        assert_eq!(std::fs::read(&other).unwrap(), b"of somebody else");
    }

    #[test]
    fn a_file_that_exists_is_not_created_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        create(&path, b"first").unwrap();
        assert_eq!(create(&path, b"second").unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(std::fs::read(&path).unwrap(), b"first");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "nothing is left beside it");
    }
}
