//! Small files that are replaced whole: a reader finds the old content or the new one, never a mixture.
//!
//! The new content goes to a file beside the old one and takes the name in one step. Where it is to outlive a crash of the
//! system, it is made durable before that, and the folder is synced last, so that success means the name is durable too.
//! A crash may leave the file beside, which nobody reads; what fails leaves none, since there may be no room. Files are readable by their owner alone, unless the function's
//! name says otherwise: much of what is kept this way is secret.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

/// Replaces the file at `path`, or creates it.
///
/// # Errors
/// The kernel's error; the file then has its old content or, where only the last step failed, its new one.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    Beside::write(path, content, Readers::Owner)?.publish_durably()
}

/// As [`replace`], with a file that others may read, as far as the process's mask lets them.
///
/// # Errors
/// As [`replace`].
pub fn replace_for_all_to_read(path: &Path, content: &[u8]) -> io::Result<()> {
    Beside::write(path, content, Readers::Others)?.publish_durably()
}

/// As [`replace_for_all_to_read`], for what is of no use after the system has restarted: nothing is synced.
///
/// # Errors
/// The kernel's error; the file then has its old content.
pub fn replace_until_restart(path: &Path, content: &[u8]) -> io::Result<()> {
    Beside::write(path, content, Readers::Others)?.publish()
}

/// Creates the file at `path` unless there is one already.
///
/// # Errors
/// `AlreadyExists` where there is one, which is left as it is; otherwise the kernel's error.
pub fn create(path: &Path, content: &[u8]) -> io::Result<()> {
    let beside = Beside::write(path, content, Readers::Owner)?;
    beside.file.sync_all()?;
    fs::hard_link(&beside.path, path)?;
    drop(beside);
    sync_folder_of(path)
}

/// Removes a file, if it is there, durably.
///
/// # Errors
/// What the kernel said.
pub fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed.and_then(|()| sync_folder_of(path)),
    }
}

/// Makes durable which names there are in the folder of a file.
///
/// # Errors
/// What the kernel said.
pub fn sync_folder_of(path: &Path) -> io::Result<()> {
    // The folder of a relative path of one part is the empty path.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(folder)?.sync_all()
}

/// Who may read a file besides its owner.
#[derive(Clone, Copy)]
enum Readers {
    Owner,
    Others,
}

/// New content beside the file whose place it is to take. Until it is published, what was there before is as it was. Dropped,
/// it is gone.
pub struct Beside<'a> {
    file: File,
    path: PathBuf,
    place: &'a Path,
    is_published: bool,
}

impl<'a> Beside<'a> {
    /// New content that is of no use after the system has restarted, for a caller who does something with the file before it is
    /// published.
    ///
    /// # Errors
    /// The kernel's error.
    pub fn until_restart(place: &'a Path, content: &[u8]) -> io::Result<Self> {
        Self::write(place, content, Readers::Others)
    }

    /// Two processes never share the file beside, so neither can publish the other's half-written content.
    fn write(place: &'a Path, content: &[u8], readers: Readers) -> io::Result<Self> {
        let mut name = place.file_name().ok_or(io::ErrorKind::InvalidInput)?.to_owned();
        name.push(format!(".new-{}", std::process::id()));
        let path = place.with_file_name(name);
        // Whatever is there, left by a crash or put there by somebody who may write to the folder, is neither followed nor
        // written to.
        remove(&path)?;
        let mut options = OpenOptions::new();
        options.read(true).write(true).create_new(true);
        let file = match readers {
            Readers::Owner => options.mode(0o600).open(&path)?,
            Readers::Others => options.open(&path)?,
        };
        let mut beside = Self { file, path, place, is_published: false };
        if matches!(readers, Readers::Owner) {
            beside.file.set_permissions(fs::Permissions::from_mode(0o600))?;
        }
        beside.file.write_all(content)?;
        Ok(beside)
    }

    /// The file, open for reading and writing.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// It takes its place. A crash of the system may leave the place empty, or with a part of the content.
    ///
    /// # Errors
    /// The kernel's error; what was there before is there still.
    pub fn publish(mut self) -> io::Result<()> {
        fs::rename(&self.path, self.place)?;
        self.is_published = true;
        Ok(())
    }

    fn publish_durably(self) -> io::Result<()> {
        self.file.sync_all()?;
        let place = self.place;
        self.publish()?;
        sync_folder_of(place)
    }
}

impl Drop for Beside<'_> {
    fn drop(&mut self) {
        if !self.is_published {
            // What is left takes room, and is in nobody's way.
            let _ = fs::remove_file(&self.path);
        }
    }
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
    fn what_can_not_take_its_place_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        std::fs::create_dir(&path).unwrap();
        assert!(replace(&path, b"content").is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1, "the folder alone");
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
