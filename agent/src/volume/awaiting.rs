//! What comes late is waited for (X6): a disk that is not plugged in yet, a file system that is not mounted, a state
//! folder without room. A volume that can't be opened tries again by itself, whatever was in the way; the check that
//! refused what is there now lets in what comes later.
//!
//! Looking at a disk may take for ever (X5), so it is done on a thread for that. One look is under way at a time; what
//! it found is taken when the volume tries next.

use super::changes::Event;
use super::{OpenRole, Volume};
use crate::buffer::BufferPool;
use crate::config::VolumeConfig;
use crate::control::api::{Awaited, Grown, Hung, Panics, Shrunk};
use crate::state::backing::{self, BackingError};
use crate::storage::file::{Access, File, OpenError};
use crate::storage::{self, Cause, Storage, UnderWay};
use crate::system;
use crate::volume::opening::{NotOpened, Others};
use crate::words::with_causes;
use blockmirror_protocol::ranges::ByteRange;
use std::cell::Cell;
use std::fs;
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tokio::task::{JoinHandle, spawn_local};

/// How soon a volume that could not be opened tries again at first, and at most how late.
const FIRST_PAUSE: Duration = Duration::from_millis(250);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How long a disk may take to be looked at before the volume goes on without, and where one look follows another.
const LOOK_TIME: Duration = Duration::from_secs(1);
const GLANCE_TIME: Duration = Duration::from_millis(50);
/// How long a backing that somebody else has claimed is waited for, and how often it is tried: what is left of a killed
/// agent has gone by then.
const CLAIM_TIME: Duration = Duration::from_secs(5);
const CLAIM_PAUSE: Duration = Duration::from_millis(50);
/// How long a disk may take to answer whoever asks just now how the volume is.
pub(super) const ANSWER_TIME: Duration = Duration::from_millis(600);
/// How much is read for that, in bytes.
const SAMPLE_BYTES: u64 = 4096;

/// Why a volume is not open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Unopened {
    /// Something is not there yet.
    Awaited(String),
    /// Something is wrong.
    Failed(String),
    /// The backing is smaller than the volume; in words as well.
    Shrunk(Shrunk, String),
    /// The volume ended the agent too often; in words as well.
    Panicked(Panics, String),
}

impl From<NotOpened> for Unopened {
    fn from(error: NotOpened) -> Self {
        Self::Failed(with_causes(&error))
    }
}

impl Unopened {
    pub(super) fn text(&self) -> &str {
        match self {
            Self::Awaited(text) | Self::Failed(text) | Self::Shrunk(_, text) | Self::Panicked(_, text) => {
                text
            }
        }
    }
}

/// A disk that is there, and silent.
#[derive(Debug, thiserror::Error)]
#[error("{} does not answer", path.display())]
pub(super) struct NoAnswer {
    path: PathBuf,
}

/// What a volume that is not open waits for.
#[derive(Default)]
pub(super) struct Awaiting {
    /// Why it is not open, and since when.
    obstacle: Option<(Unopened, Instant)>,
    /// The attempts since then: an alarm of an earlier one is none.
    attempts: u32,
    /// A look at the backing that has not ended.
    look: Option<JoinHandle<Result<File, Looked>>>,
}

/// What a look at a backing found that can't be opened.
enum Looked {
    Claimed(OpenError),
    Unopened(Unopened),
}

impl Awaiting {
    /// Whether the volume has not been open since it could not be opened.
    pub(super) fn is_retry(&self) -> bool {
        self.obstacle.is_some()
    }

    /// The volume is open.
    pub(super) fn has_come(&mut self) -> Option<Unopened> {
        self.attempts = 0;
        self.obstacle.take().map(|(obstacle, _)| obstacle)
    }

    /// The volume could not be opened. Says whether that is news, and when to try again.
    fn note(&mut self, obstacle: Unopened) -> (bool, Duration) {
        let is_news = self.obstacle.as_ref().is_none_or(|(known, _)| *known != obstacle);
        if is_news {
            self.obstacle = Some((obstacle, Instant::now()));
        }
        let pause = FIRST_PAUSE.saturating_mul(1 << self.attempts.min(8)).min(LONGEST_PAUSE);
        self.attempts += 1;
        (is_news, pause)
    }

    /// Since when it could not be opened for the present reason.
    pub(super) fn since(&self) -> Option<Instant> {
        self.obstacle.as_ref().map(|(_, since)| *since)
    }

    /// For status: what is not there yet.
    pub(super) fn awaited(&self) -> Option<Awaited> {
        let (obstacle, since) = self.obstacle.as_ref()?;
        let Unopened::Awaited(what) = obstacle else { return None };
        Some(Awaited { what: what.clone(), seconds: since.elapsed().as_secs() })
    }

    /// For status: that the volume stays closed for its panics.
    pub(super) fn panics(&self) -> Option<Panics> {
        match &self.obstacle {
            Some((Unopened::Panicked(panics, _), _)) => Some(panics.clone()),
            _ => None,
        }
    }

    /// For status: that the backing is smaller than the volume.
    pub(super) fn shrunk(&self) -> Option<Shrunk> {
        match &self.obstacle {
            Some((Unopened::Shrunk(shrunk, _), _)) => Some(*shrunk),
            _ => None,
        }
    }
}

impl Volume {
    /// Remembers why the volume is not open, and sees to it that it is tried again.
    pub(super) fn await_better(&mut self, obstacle: Unopened) {
        let text = obstacle.text().to_owned();
        let is_awaited = matches!(obstacle, Unopened::Awaited(_));
        let (is_news, pause) = self.awaiting.note(obstacle);
        let volume = self.name();
        match (is_news, is_awaited) {
            (true, true) => tracing::warn!(%volume, "{text}; the volume is opened when that is mended"),
            (true, false) => tracing::error!(%volume, "the volume can't be opened: {text}"),
            (false, _) => tracing::debug!(%volume, "the volume can't be opened: {text}"),
        }
        self.role = OpenRole::Closed(text);
        let (events, attempt) = (self.events.clone(), self.awaiting.attempts);
        spawn_local(async move {
            tokio::time::sleep(pause).await;
            drop(events.send(Event::TryAgain(attempt)));
        });
    }

    /// It is time for another attempt, if there was none meanwhile.
    pub(super) async fn try_again(&mut self, attempt: u32) {
        let is_due = self.awaiting.is_retry() && self.awaiting.attempts == attempt;
        if is_due && matches!(self.role, OpenRole::Closed(_)) {
            self.reopen(Others::Ask).await;
        }
    }

    /// Opens the backing, if it is there and answers.
    pub(super) async fn find_backing(&mut self, config: &VolumeConfig) -> Result<Rc<File>, Unopened> {
        let is_retry = self.awaiting.is_retry();
        let path = config.backing.display();
        if let Some(call) = self.storages.oldest().filter(|call| call.since.elapsed() >= LOOK_TIME) {
            // What the kernel was told before must have ended before anybody else writes.
            return Err(Unopened::Awaited(format!("{} does not answer", call.path.display())));
        }
        let began = Instant::now();
        loop {
            let mut look = self.awaiting.look.take().unwrap_or_else(|| {
                let (config, folder) = (config.clone(), self.surroundings.state_folder.clone());
                crate::blocking::spawn(move || look(&config, &folder))
            });
            let limit = if is_retry { GLANCE_TIME } else { LOOK_TIME };
            let Ok(looked) = tokio::time::timeout(limit, &mut look).await else {
                self.awaiting.look = Some(look);
                return Err(Unopened::Awaited(format!("{path} does not answer")));
            };
            match looked.unwrap_or_else(|panic| std::panic::resume_unwind(panic.into_panic())) {
                Ok(file) => return Ok(Rc::new(file)),
                Err(Looked::Unopened(obstacle)) => return Err(obstacle),
                Err(Looked::Claimed(error)) if is_retry || began.elapsed() >= CLAIM_TIME => {
                    return Err(Unopened::Failed(with_causes(&error)));
                }
                Err(Looked::Claimed(_)) => tokio::time::sleep(CLAIM_PAUSE).await,
            }
        }
    }

    /// For status: what has not answered for so long that it should be told. Looks at the disk, for a moment.
    pub(super) async fn hung(&self) -> Option<Hung> {
        let long = |call: &UnderWay| call.since.elapsed() >= ANSWER_TIME;
        let mut call = self.storages.oldest().filter(long);
        if call.is_none()
            && let Some(disk) = &self.disk
            && !disk.answers(ANSWER_TIME).await
        {
            call = self.storages.oldest().filter(long);
        }
        let call = call?;
        Some(Hung { what: call.path.display().to_string(), seconds: call.since.elapsed().as_secs() })
    }

    /// For status: that the backing is smaller than the volume, as it was when it was to be opened, or has become so since.
    pub(super) fn shrunk(&self) -> Option<Shrunk> {
        let volume_bytes = self.config.borrow().size_bytes;
        let size_bytes = self.disk.as_ref().and_then(|disk| disk.backing.shrunk_to());
        let open = size_bytes.filter(|size_bytes| *size_bytes < volume_bytes);
        if let (Some(_), Some(holding)) = (open, &self.holding) {
            holding.note_short();
        }
        open.map(|size_bytes| Shrunk { size_bytes, volume_bytes }).or_else(|| self.awaiting.shrunk())
    }

    /// For status: that the backing has become larger.
    pub(super) fn grown(&self) -> Option<Grown> {
        let (disk, before_bytes) = self.disk.as_ref().zip(self.first_size.get())?;
        let size_bytes = disk.backing.grown_to(before_bytes)?;
        Some(Grown { size_bytes, before_bytes })
    }

    /// Why nothing can be handed over: the disk does not answer.
    pub(super) async fn must_answer(&self, limit: Duration) -> Result<(), NoAnswer> {
        let Some(disk) = &self.disk else { return Ok(()) };
        match disk.answers(limit).await {
            true => Ok(()),
            false => Err(NoAnswer { path: disk.backing.path().to_owned() }),
        }
    }
}

/// Looks at a backing, and opens it where it is what the volume had. May take for ever.
fn look(config: &VolumeConfig, state_folder: &Path) -> Result<File, Looked> {
    let path = &config.backing;
    if let Some(text) = not_there(path) {
        return Err(Looked::Unopened(Unopened::Awaited(text)));
    }
    // One that is not the volume's is not even claimed: whoever recovers into it needs it.
    if let Err(error @ (BackingError::HalfRecovered { .. } | BackingError::Replaced { .. })) =
        backing::compare(state_folder, path)
    {
        return Err(Looked::Unopened(Unopened::Failed(with_causes(&error))));
    }
    let file = File::open_backing(path, Access::ReadWrite).map_err(|error| match error {
        error if error.is_claimed() => Looked::Claimed(error),
        OpenError::Io { source, .. } if Cause::of(&source) == Cause::Absent => {
            Looked::Unopened(Unopened::Awaited(format!("{} is a device without a disk", path.display())))
        }
        error => Looked::Unopened(Unopened::Failed(with_causes(&error))),
    })?;
    let shrunk = Shrunk { size_bytes: file.size_bytes(), volume_bytes: config.size_bytes };
    if shrunk.size_bytes < shrunk.volume_bytes {
        let text =
            format!("{} has {} bytes, the volume {}", path.display(), shrunk.size_bytes, shrunk.volume_bytes);
        return Err(Looked::Unopened(Unopened::Shrunk(shrunk, text)));
    }
    Ok(file)
}

/// What is missing, in words, where a disk or a file may still come.
fn not_there(path: &Path) -> Option<String> {
    let status = match fs::metadata(path) {
        Ok(status) => status,
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Some(format!("{} is not there", path.display()));
        }
        Err(_) => return None,
    };
    let is_empty =
        status.file_type().is_block_device() && system::size_bytes(status.rdev()).unwrap_or(0) == 0;
    is_empty.then(|| format!("{} is a device without a disk", path.display()))
}

/// An open backing, to see whether it answers.
pub(super) struct Disk {
    storage: Rc<dyn Storage>,
    backing: Rc<File>,
    pool: BufferPool,
    /// Whether a look is under way.
    is_asked: Cell<bool>,
    answered: Notify,
}

impl Disk {
    pub(super) fn new(storage: Rc<dyn Storage>, backing: Rc<File>, pool: BufferPool) -> Rc<Self> {
        Rc::new(Self { storage, backing, pool, is_asked: Cell::new(false), answered: Notify::new() })
    }

    /// Whether a small read comes back within this time, well or badly. One is under way at a time.
    pub(super) async fn answers(self: &Rc<Self>, limit: Duration) -> bool {
        if !self.is_asked.replace(true) {
            let disk = self.clone();
            spawn_local(async move {
                let sample = ByteRange::new(0, SAMPLE_BYTES.min(disk.backing.size_bytes()));
                // An error is an answer.
                let _ = storage::read(&*disk.storage, &disk.backing, &disk.pool, sample).await;
                disk.is_asked.set(false);
                disk.answered.notify_waiters();
            });
        }
        let answered = async {
            loop {
                let answered = self.answered.notified();
                if !self.is_asked.get() {
                    break;
                }
                answered.await;
            }
        };
        tokio::time::timeout(limit, answered).await.is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attempts_follow_each_other_later_and_later_and_the_same_obstacle_is_no_news() {
        let mut awaiting = Awaiting::default();
        let obstacle = || Unopened::Awaited("/srv/data.img is not there".to_owned());
        assert_eq!(awaiting.note(obstacle()), (true, FIRST_PAUSE));
        assert_eq!(awaiting.note(obstacle()), (false, FIRST_PAUSE * 2));
        for _ in 0..40 {
            assert!(awaiting.note(obstacle()).1 <= LONGEST_PAUSE);
        }
        assert_eq!(
            awaiting.awaited().map(|awaited| awaited.what),
            Some("/srv/data.img is not there".to_owned())
        );
        assert!(awaiting.note(Unopened::Failed("it is another one".to_owned())).0);
        assert_eq!(awaiting.awaited(), None);
        assert!(awaiting.has_come().is_some() && !awaiting.is_retry());
        assert_eq!(awaiting.note(obstacle()), (true, FIRST_PAUSE));
    }
}
