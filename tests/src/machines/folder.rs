//! A test's folder, and whatever of the kernel's hangs on it: mounts below it, loop devices on files in it.

use super::programs::{run, succeed, text};
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A folder that takes its mounts and loop devices with it when it is dropped.
pub struct Folder {
    folder: TempDir,
}

/// Fills the file system of a folder, until the file that is given is removed.
///
/// # Panics
/// When no file can be made.
#[must_use]
pub fn fill(folder: &Path) -> PathBuf {
    let filler = folder.join("filler");
    let mut file = File::create(&filler).expect("a file");
    while file.write_all(&[1; 4096]).is_ok() {}
    filler
}

impl Folder {
    /// A new one.
    ///
    /// # Panics
    /// When there is no place for temporary files.
    #[must_use]
    #[expect(clippy::new_without_default, reason = "making a folder is no default")]
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder") }
    }

    /// A new one in another.
    ///
    /// # Errors
    /// When it can't be made there.
    pub fn within(parent: &Path) -> io::Result<Self> {
        Ok(Self { folder: tempfile::Builder::new().prefix("bm-").tempdir_in(parent)? })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    /// A path in it.
    #[must_use]
    pub fn join(&self, name: &str) -> PathBuf {
        self.path().join(name)
    }

    /// Mounts a device or an image in the folder, under this name.
    ///
    /// # Panics
    /// When it can't be mounted.
    #[must_use]
    pub fn mount(&self, device: &Path, name: &str) -> Mounted {
        let at = self.join(name);
        fs::create_dir_all(&at).expect("a mount point");
        succeed("mount", &[text(device), text(&at)]);
        Mounted { at: Some(at) }
    }

    /// Attaches a loop device to a file in the folder.
    ///
    /// # Panics
    /// When it can't be attached.
    #[must_use]
    pub fn attach(&self, file: &Path) -> PathBuf {
        PathBuf::from(succeed("losetup", &["--find", "--show", text(file)]).trim())
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        // What can't be taken away is told by the program that tried. Loop devices go twice: some are only free when
        // a mount that lies on another has gone.
        detach_below(self.path());
        unmount_below(self.path());
        detach_below(self.path());
    }
}

/// A mounted file system; unmounted when dropped.
pub struct Mounted {
    at: Option<PathBuf>,
}

impl Mounted {
    /// Where it is mounted.
    ///
    /// # Panics
    /// Never: it is mounted as long as it lives.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.at.as_deref().expect("it is mounted until it is unmounted")
    }

    /// Unmounts it.
    ///
    /// # Panics
    /// When that fails.
    pub fn unmount(mut self) {
        let at = self.at.take().expect("it is mounted until it is unmounted");
        succeed("umount", &[text(&at)]);
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if let Some(at) = &self.at {
            run("umount", &["--lazy", text(at)]);
        }
    }
}

/// The mounts below a folder, the last mounted first.
fn unmount_below(folder: &Path) {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let points: Vec<&str> = table.lines().filter_map(|line| line.split(' ').nth(4)).collect();
    for point in points.into_iter().rev().filter(|point| Path::new(point).starts_with(folder)) {
        run("umount", &["--lazy", point]);
    }
}

fn detach_below(folder: &Path) {
    for device in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let Ok(backing) = fs::read_to_string(device.path().join("loop/backing_file")) else { continue };
        if Path::new(backing.trim_end()).starts_with(folder) {
            let device = Path::new("/dev").join(device.file_name());
            run("losetup", &["--detach", text(&device)]);
        }
    }
}
