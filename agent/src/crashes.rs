//! Panics, remembered over restarts: the process ends with each. A volume that ends it twice in a row stays closed, so that
//! the others are served (X1, X5). An agent that is ended twice in a row by what works for no volume waits before it goes on, longer
//! each time, so that whatever starts it again doesn't do that in a loop.
//!
//! The hook writes a line into the volume's state folder, or the agent's, before the process ends. The lines go when the volume
//! has been open for a while, or the agent has run so long. A power cut or a kill leaves none, so these count for nothing.

use crate::durable;
use crate::words::printable;
use serde::{Deserialize, Serialize};
use std::cell::RefCell;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// The file's name in the volume's state folder.
pub const FILE_NAME: &str = "panics";
/// The file's name in the agent's state folder.
pub const AGENT_FILE_NAME: &str = "agent.panics";
/// So often a volume may end the process before it stays closed, and anything else before the agent waits.
const LIMIT: usize = 2;
/// How long an agent waits at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(64);
/// A volume that was open for so long without a panic begins to count anew.
pub const QUIET_TIME: Duration = Duration::from_secs(600);
/// No line is longer, in characters.
const LINE_LIMIT: usize = 500;

/// How a volume ended the agent, which is a mistake in the program.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Panics {
    /// How often in a row.
    pub times: usize,
    /// The last, in words.
    pub last: String,
    /// The file that remembers it: without it the volume is opened again.
    pub notes: PathBuf,
}

thread_local! {
    static FOLDER: RefCell<Option<Arc<Path>>> = const { RefCell::new(None) };
}

/// Where panics of threads are noted that work for no volume.
static AGENT: OnceLock<PathBuf> = OnceLock::new();

/// Panics of threads that work for no volume are from now on noted in the agent's state folder. Gives how long to wait before
/// anything is done, and after what, where the agent was ended too often by them.
#[must_use]
pub fn watch_agent(state: &Path) -> Option<(Duration, Panics)> {
    let notes = AGENT.get_or_init(|| state.join(AGENT_FILE_NAME));
    let is_old = || notes.metadata().ok()?.modified().ok()?.elapsed().ok();
    if is_old().is_some_and(|age| age >= QUIET_TIME) {
        // Where it can't be removed, it is waited for nothing.
        let _ = durable::remove(notes);
    }
    let panics = read(notes)?;
    let doublings = u32::try_from(panics.times - LIMIT).unwrap_or(u32::MAX).min(16);
    Some((Duration::from_secs(1 << doublings).min(LONGEST_PAUSE), panics))
}

/// The agent does well: what was is forgotten.
///
/// # Errors
/// When the file can't be removed.
pub fn forget_of_agent(state: &Path) -> io::Result<()> {
    durable::remove(&state.join(AGENT_FILE_NAME))
}

/// For whom a thread works: a panic of it is one of the volume with that state folder, or of none.
#[derive(Clone, Debug)]
pub struct Worker(Option<Arc<Path>>);

impl Worker {
    /// A volume with this state folder.
    #[must_use]
    pub fn volume(folder: &Path) -> Self {
        Self(Some(folder.into()))
    }

    /// Whoever this thread works for now.
    #[must_use]
    pub fn current() -> Self {
        Self(FOLDER.with(|mine| mine.borrow().clone()))
    }

    /// Does some work for it.
    pub fn works<T>(&self, work: impl FnOnce() -> T) -> T {
        let _working = Working { before: FOLDER.with(|mine| mine.replace(self.0.clone())) };
        work()
    }

    /// Does work for it that others, who share the thread, do theirs in between of.
    pub async fn does<T>(&self, work: impl Future<Output = T>) -> T {
        let mut work = std::pin::pin!(work);
        std::future::poll_fn(|context| self.works(|| work.as_mut().poll(context))).await
    }
}

/// Gives the thread back to whoever it worked for before.
struct Working {
    before: Option<Arc<Path>>,
}

impl Drop for Working {
    fn drop(&mut self) {
        FOLDER.with(|mine| drop(mine.replace(self.before.take())));
    }
}

/// Remembers a panic of this thread. For the panic's hook: nothing in it panics.
pub fn note(panic: &dyn std::fmt::Display) {
    let folder = FOLDER.try_with(|mine| mine.try_borrow().ok().and_then(|folder| folder.clone()));
    let of_volume = folder.ok().flatten().map(|folder| folder.join(FILE_NAME));
    if let Some(notes) = of_volume.or_else(|| AGENT.get().cloned()) {
        // Where it can't be written, all is tried once more.
        let _ = append(&notes, &panic.to_string());
    }
}

fn append(notes: &Path, text: &str) -> io::Result<()> {
    let mut file = File::options().create(true).append(true).open(notes)?;
    file.write_all(format!("{}\n", printable(text, LINE_LIMIT)).as_bytes())?;
    file.sync_all()
}

/// Why a volume is not opened, where it has ended the process too often.
#[must_use]
pub fn obstacle(folder: &Path) -> Option<Panics> {
    read(&folder.join(FILE_NAME))
}

/// What is noted there, if that is too much.
fn read(notes: &Path) -> Option<Panics> {
    let text = fs::read_to_string(notes).ok()?;
    let times = text.lines().count();
    let last = text.lines().last().filter(|_| times >= LIMIT)?.to_owned();
    Some(Panics { times, last, notes: notes.to_owned() })
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
                let text = "panicked at src/x.rs:1:\nthere is a number for each run";
                Worker::volume(&volume).works(|| note(&text));
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

    /// A panic of the transport's thread, on which a volume may be served, closed that volume; one of a thread that a volume
    /// had for what blocks counted against the agent.
    #[tokio::test]
    async fn a_panic_counts_for_whoever_is_being_worked_for() {
        let folder = tempfile::tempdir().unwrap();
        let volume = folder.path().join("a");
        fs::create_dir(&volume).unwrap();
        let panics = || fs::read_to_string(volume.join(FILE_NAME)).unwrap_or_default().lines().count();
        let worker = Worker::volume(&volume);
        let work = async {
            note(&"of the volume");
            tokio::task::yield_now().await;
            note(&"of the volume");
            crate::blocking::blocking(|| note(&"of its thread for what blocks")).await;
            crate::blocking::spawn(|| note(&"of another one")).await.unwrap();
        };
        let other = async {
            note(&"of a task on the same thread");
            tokio::task::yield_now().await;
            note(&"of a task on the same thread");
        };
        tokio::join!(worker.does(work), other);
        note(&"of the thread, afterwards");
        assert_eq!(panics(), 4);
    }

    const CHILD: &str = "BLOCKMIRROR_TEST_PANICS";

    /// Not a test of its own: what the next one runs.
    #[test]
    fn ends_by_a_panic() {
        let Ok(folder) = std::env::var(CHILD) else { return };
        let folder = Path::new(&folder);
        let waits = watch_agent(folder);
        println!("\nwaits {:?}", waits.map(|(pause, panics)| (pause.as_secs(), panics.times)));
        crate::process::prepare();
        std::thread::spawn(move || {
            let of_volume = std::env::var("VOLUME").is_ok();
            let fails = || panic!("there is a number for each run");
            let volume = PathBuf::from(std::env::var(CHILD).unwrap()).join("volume");
            if of_volume { Worker::volume(&volume).works(fails) } else { fails() }
        });
        std::thread::park();
    }

    #[test]
    fn a_panic_of_any_thread_ends_the_process_is_noted_and_makes_no_loop() {
        use std::os::unix::process::ExitStatusExt;
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("volume")).unwrap();
        let ends = |of_volume: bool| {
            let mut child = std::process::Command::new(std::env::current_exe().unwrap());
            child.args(["--exact", "crashes::tests::ends_by_a_panic", "--nocapture"]);
            child.env(CHILD, folder.path());
            if of_volume {
                child.env("VOLUME", "");
            }
            let output = child.output().unwrap();
            assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
            let text = String::from_utf8(output.stdout).unwrap();
            text.lines().find_map(|line| Some(line.strip_prefix("waits ")?.to_owned())).unwrap()
        };
        assert_eq!([ends(true), ends(true), ends(true)], ["None", "None", "None"]);
        let panics = obstacle(&folder.path().join("volume")).expect("the volume stays closed");
        assert!(panics.times == 3 && panics.last.contains("there is a number for each run"), "{panics:?}");
        let waits = [(); 5].map(|()| ends(false));
        assert_eq!(waits, ["None", "None", "Some((1, 2))", "Some((2, 3))", "Some((4, 4))"]);
        forget_of_agent(folder.path()).unwrap();
        assert_eq!(ends(false), "None");
    }
}
