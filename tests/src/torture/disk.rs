//! Volumes as file systems, and copies of them as a promotion would find them. Nothing here waits for ever: a device
//! that hangs is a failure to be told, after which the agents are killed, and it hangs no longer.

use super::image::Image;
use crate::machines::content::first_difference;
use crate::machines::host::Host;
use crate::machines::patience::{DEADLINE, until};
use crate::machines::programs::{run, succeed, text};
use blockmirror_agent::state::stored::{self, Ending};
use blockmirror_protocol::disk::superblock::{self, Superblock};
use blockmirror_protocol::disk::{PAGE_BYTES, pre_images};
use blockmirror_protocol::terms::DataState;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};

/// The folder of the records within the file system.
const RECORDS: &str = "records";

/// A mounted file system. Dropped, it is unmounted lazily.
pub struct FileSystem {
    at: PathBuf,
    is_mounted: bool,
}

impl FileSystem {
    /// Makes one on a device.
    ///
    /// # Panics
    /// When that fails.
    pub fn make(device: &Path, discards: bool) {
        let device = device.to_owned();
        within("the file system is made", move || {
            let options = "lazy_itable_init=0,lazy_journal_init=0";
            succeed("mkfs.ext4", &["-q", "-F", "-b", "4096", "-E", options, text(&device)]);
            if discards {
                succeed("tune2fs", &["-o", "discard", text(&device)]);
            }
        });
    }

    /// Mounts a device or an image.
    ///
    /// # Panics
    /// When that fails.
    #[must_use]
    pub fn mount(device: &Path, at: &Path) -> Self {
        fs::create_dir_all(at).expect("a mount point");
        let (device, point) = (device.to_owned(), at.to_owned());
        within("the file system is mounted", move || {
            succeed("mount", &[text(&device), text(&point)]);
        });
        Self { at: at.to_owned(), is_mounted: true }
    }

    /// The folder of the records, which is made where it is missing.
    ///
    /// # Panics
    /// When it can't be made.
    #[must_use]
    pub fn records(&self) -> PathBuf {
        let folder = self.at.join(RECORDS);
        let made = folder.clone();
        within("there is a folder", move || {
            fs::create_dir_all(&made)
                .and_then(|()| File::open(made.parent().expect("a mount point"))?.sync_all())
        })
        .expect("a folder");
        folder
    }

    /// Unmounts it.
    ///
    /// # Panics
    /// When that fails.
    pub fn unmount(mut self) {
        self.is_mounted = false;
        let at = self.at.clone();
        within("the file system is unmounted", move || {
            succeed("umount", &[text(&at)]);
        });
    }

    /// Unmounts it from a device that is dead.
    ///
    /// # Panics
    /// When that takes too long.
    pub fn abandon(mut self) {
        self.is_mounted = false;
        let at = self.at.clone();
        within("a dead device is unmounted", move || {
            if !run("umount", &[text(&at)]).status.success() {
                succeed("umount", &["--lazy", text(&at)]);
            }
        });
    }
}

impl Drop for FileSystem {
    fn drop(&mut self) {
        if self.is_mounted {
            run("umount", &["--lazy", text(&self.at)]);
        }
    }
}

/// What a device or an image holds. It is mounted for that, so that its journal is replayed, and must be without a
/// fault afterwards.
///
/// # Panics
/// When it has a fault.
#[must_use]
pub fn examine(device: &Path, at: &Path) -> Image {
    let file_system = FileSystem::mount(device, at);
    let records = at.join(RECORDS);
    let image = within("the records are read", move || Image::read(&records)).expect("records can be read");
    file_system.unmount();
    let device = device.to_owned();
    within("the file system is checked", move || {
        succeed("e2fsck", &["-f", "-n", text(&device)]);
    });
    image
}

/// What a host that was killed knows of its copy, or one that runs knew a moment ago.
///
/// # Panics
/// When there is none.
#[must_use]
pub fn superblock(host: &Host) -> Superblock {
    let bytes = fs::read(host.state(superblock::FILE_NAME)).expect("a superblock");
    Superblock::recover(&bytes).expect("one of its slots is whole").1
}

/// A copy of a killed host's backing as a promotion would find it: rolled back where a resync was under way. Nothing
/// where it is of no use to anybody.
///
/// # Panics
/// When it can't be copied, or its pre-images are damaged.
#[must_use]
pub fn promotable_copy(host: &Host, to: &Path) -> Option<Superblock> {
    wait_until_free(host);
    let superblock = superblock(host);
    let is_usable = superblock.data == DataState::Consistent || superblock.layers.rollback().is_some();
    if !is_usable {
        return None;
    }
    succeed("cp", &["--sparse=always", text(&host.backing()), text(to)]);
    if let Some(layer) = superblock.layers.rollback() {
        roll_back(to, &host.state(&pre_images::file_name(layer)));
    }
    Some(superblock)
}

/// The kernel carries out what a killed agent had begun.
fn wait_until_free(host: &Host) {
    until("the killed agent has let go of its backing", || {
        let file = File::open(host.backing()).expect("a backing");
        file.try_lock().map_err(|error| error.to_string())
    });
}

fn roll_back(copy: &Path, layer: &Path) {
    let file = File::open(layer).expect("the layer of a gap is there");
    let layer = stored::read_layer(layer).expect("a layer can be read");
    assert!(layer.header.is_ok() && layer.ending != Ending::Damaged, "the layer of a gap is damaged");
    let copy = File::options().write(true).open(copy).expect("a copy");
    for batch in &layer.batches {
        for (entry, place) in batch.places() {
            let mut data = vec![0; entry.range.length as usize];
            // Zeroes have no data, and no checksum.
            if entry.crc.is_some() {
                let data_begins = batch.at + PAGE_BYTES as u64;
                file.read_exact_at(&mut data, data_begins + place.offset).expect("a layer can be read");
                assert!(entry.is_of(&data), "a pre-image is damaged");
            }
            copy.write_all_at(&data, entry.range.offset).expect("a copy can be written");
        }
    }
}

/// Compares backings byte by byte.
///
/// # Panics
/// When they differ.
pub fn assert_identical(one: &Host, other: &Host) {
    let difference = first_difference(&one.backing(), &other.backing());
    assert_eq!(difference, None, "{} and {} differ at this byte", one.name(), other.name());
}

/// Does what may hang, on a thread that is left behind if it does.
///
/// # Panics
/// When it does, or panics itself.
pub fn within<Seen: Send + 'static>(what: &str, work: impl FnOnce() -> Seen + Send + 'static) -> Seen {
    let (sender, receiver) = channel();
    let thread = std::thread::spawn(move || {
        // Nobody listens any more where it took too long.
        let _ = sender.send(work());
    });
    match receiver.recv_timeout(DEADLINE) {
        Ok(seen) => seen,
        Err(RecvTimeoutError::Timeout) => panic!("waited in vain until {what}"),
        Err(RecvTimeoutError::Disconnected) => {
            std::panic::resume_unwind(thread.join().expect_err("it ended without an answer"))
        }
    }
}
