//! Panics that volumes cause, remembered over restarts: the process ends with each, and a volume that ends it twice in a
//! row stays closed, so that the others are served (X1, X5).
//!
//! The hook writes a line into the volume's state folder before the process ends. The lines go when the volume has been
//! open for a while. A power cut or a kill leaves none, so these count for nothing.

use crate::control::api::Panics;
use crate::durable;
use crate::words::printable;
use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The file's name in the volume's state folder.
pub const FILE_NAME: &str = "panics";
/// So often a volume may end the process before it stays closed.
const LIMIT: usize = 2;
/// A volume that was open for so long without a panic begins to count anew.
pub const QUIET_TIME: Duration = Duration::from_secs(600);
/// No line is longer, in characters.
const LINE_LIMIT: usize = 500;

thread_local! {
    static FOLDER: RefCell<Option<PathBuf>> = const { RefCell::new(None) };
}

/// A panic of this thread is from now on one of the volume with this state folder.
pub fn watch(folder: &Path) {
    FOLDER.with(|mine| *mine.borrow_mut() = Some(folder.to_owned()));
}

/// Remembers a panic of this thread, if it works for a volume. For the panic's hook: nothing in it panics.
pub fn note(panic: &dyn std::fmt::Display) {
    let folder = FOLDER.try_with(|mine| mine.try_borrow().ok().and_then(|folder| folder.clone()));
    if let Ok(Some(folder)) = folder {
        // Where it can't be written, the volume is tried once more.
        let _ = append(&folder, &panic.to_string());
    }
}

fn append(folder: &Path, text: &str) -> io::Result<()> {
    let mut file = File::options().create(true).append(true).open(folder.join(FILE_NAME))?;
    file.write_all(format!("{}\n", printable(text, LINE_LIMIT)).as_bytes())?;
    file.sync_all()
}

/// Why a volume is not opened, where it has ended the process too often.
#[must_use]
pub fn obstacle(folder: &Path) -> Option<Panics> {
    let notes = folder.join(FILE_NAME);
    let text = fs::read_to_string(&notes).ok()?;
    let times = text.lines().count();
    let last = text.lines().last().filter(|_| times >= LIMIT)?.to_owned();
    Some(Panics { times, last, notes })
}

/// The volume does well: what was is forgotten.
///
/// # Errors
/// When the file can't be removed.
pub fn forget(folder: &Path) -> io::Result<()> {
    durable::remove(&folder.join(FILE_NAME))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_that_ended_the_process_twice_in_a_row_stays_closed_until_that_is_forgotten() {
        let folder = tempfile::tempdir().unwrap();
        let (volume, other) = (folder.path().join("a"), folder.path().join("b"));
        [&volume, &other].into_iter().for_each(|folder| fs::create_dir(folder).unwrap());
        let panics = || {
            let volume = volume.clone();
            let thread = std::thread::spawn(move || {
                watch(&volume);
                note(&"panicked at src/x.rs:1:\nthere is a number for each run");
            });
            thread.join().unwrap();
        };
        panics();
        assert_eq!(obstacle(&volume), None, "once may be chance");
        panics();
        let Panics { times, last, notes } = obstacle(&volume).expect("it stays closed");
        assert_eq!((times, notes), (2, volume.join(FILE_NAME)));
        assert!(last.contains("there is a number for each run") && !last.contains('\n'), "{last}");
        assert_eq!(obstacle(&other), None, "others are opened");
        forget(&volume).unwrap();
        forget(&volume).unwrap();
        assert_eq!(obstacle(&volume), None);
        note(&"of a thread that works for no volume");
        assert!(fs::read_dir(&other).unwrap().next().is_none());
    }
}
