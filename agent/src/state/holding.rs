//! Whether a backing was written by something else, as far as the system tells (X4).
//!
//! While a host holds a backing it keeps notes. `held`, in the volume's state folder, is durable: it says that the backing is
//! open, since which start of the system, and about when an image was last written here; or, once it was closed in order,
//! what it looked like: the times of an image, the kernel's count of a disk's writes, and a digest of what others write
//! first (both ends, where file systems keep what changes with each mount, and samples in between). The others are in the
//! run folder, cost next to nothing, and tell the next agent of the same start of the system what was when this one was
//! killed: `NAME.held` says what the times or counts were when this host last wrote nothing, or that it is just writing;
//! `NAME.writes` how much it has handed to the kernel to write to a disk ([`Tally`]).
//!
//! When the backing is opened it is compared with the notes. After a crash of the system, anything that was written since
//! the system started was not written by this host, nor an image long after it was last written here. After a kill in the
//! middle of writes, a disk tells more writes than this host has begun; the times of an image tell, to some seconds.
//!
//! What is noticed of a replica's backing is in its superblock before the note says that it is open again, and stays there until
//! all was compared with a primary's: a copy that something else wrote to counts for less, whichever run of the agent noticed it
//! ([`blockmirror_protocol::succession::counts_as`]).
//!
//! While it is held, the times or counts must not change when this host writes nothing, and a disk must never have more
//! writes than this host has begun.

use crate::blocking::blocking;
use crate::buffer::BufferPool;
use crate::durable;
use crate::storage::file::{File, Kind};
use crate::storage::{self, Sectors, Storage, Tally, Writes};
use crate::system;
use blockmirror_protocol::ranges::ByteRange;
use std::cell::{Cell, RefCell};
use std::fs;
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::rc::{Rc, Weak};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinHandle;

/// The durable note, and one that earlier releases kept beside it.
const NOTE: &str = "held";
const EARLIER_NOW: &str = "held-now";

/// The words of the notes.
const OPEN: &str = "open";
const CLOSED: &str = "closed";
const TOUCHED: &str = "touched";
const QUIET: &str = "quiet";
const BUSY: &str = "busy ";

/// Why all is to be compared of a backing that was open, in words.
const WRITTEN: &str = "something else wrote to it while it was open here";
/// The same of one of which an earlier run of the agent found it, as the superblock says.
pub const EARLIER: &str = "found by an earlier run of the agent";
/// The same of one that something else made smaller: what was beyond its end is gone.
const SMALLER: &str = "it was smaller for a while";

/// How often it is looked whether this host writes.
const LOOK_TIME: Duration = Duration::from_millis(250);
/// How much later than the last note this host itself may have written to an image, in seconds: looks are late on a host
/// that has much to do.
const BUSY_SECONDS: i64 = 3;
/// How old the durable note may be of when an image was last written here, and how much later than it says this host
/// itself may have written before the system went down, in seconds.
const KEPT_SECONDS: i64 = 30;
const LOST_SECONDS: i64 = 120;
/// How long the last look at a backing may take when it is closed.
const CLOSE_TIME: Duration = Duration::from_secs(5);

/// How much of each end is looked at, and how many places in between, in bytes.
const EDGE_BYTES: u64 = 1 << 20;
const SAMPLES: u64 = 16;
const SAMPLE_BYTES: u64 = 4096;

/// What the kernel tells of a backing.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Looks {
    /// An image: when it was modified and changed, in seconds and nanoseconds, and its size. That it was changed, and not
    /// modified, is no write: it was moved, or has another owner. The note of a closed one has a digest besides.
    Image { modified: (i64, i64), changed: (i64, i64), size_bytes: u64 },
    /// A disk: which one it is since the start of the system, and how many sectors were written and discarded since then.
    Disk { sequence: String, written: u64, discarded: u64 },
}

/// This start of the system: its name, and when it was, in seconds since 1970.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Boot {
    name: String,
    at: i64,
}

/// What the notes say.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Noted {
    /// Nothing: an earlier release had it, or nobody.
    Nothing,
    /// All is to be compared, for the reason that these words give.
    Touched(String),
    /// It was closed in order.
    Closed { boot: String, looks: Looks, digest: String },
    /// It was open, since this start of the system.
    Open {
        boot: String,
        /// About when an image was last written here, in seconds since 1970.
        written_at: Option<i64>,
        /// What was noted last: with the second in which this host was known to write, where it did.
        now: Option<(Option<i64>, String, Looks)>,
        /// What the kernel counts of a disk at the most where nobody else wrote.
        bound: Option<Sectors>,
    },
}

/// Where the notes are.
#[derive(Clone, Debug)]
pub struct Notes {
    /// The volume's state folder.
    state_folder: PathBuf,
    /// What it looks like while it is open.
    now: PathBuf,
    /// How much was written.
    tally: PathBuf,
}

/// A backing that is open here, and what is noted of it meanwhile. Lives on the volume's thread.
pub struct Holding {
    notes: Notes,
    storage: Rc<dyn Storage>,
    backing: Rc<File>,
    pool: BufferPool,
    writes: Arc<Writes>,
    now: fs::File,
    boot: Boot,
    /// What it looked like when this host last wrote nothing.
    quiet: RefCell<Option<Looks>>,
    begun: Cell<u64>,
    /// About when an image was last written here, as the durable note says; and that note, while it is made.
    kept: Cell<i64>,
    keeping: RefCell<Option<JoinHandle<()>>>,
    /// Whether it was said that something else writes, since this host last wrote nothing.
    is_told: Cell<bool>,
    /// Whether the durable note says that something else wrote. Then it stays so until the next opening.
    is_noted: Cell<bool>,
    /// Whether it has become smaller since it was opened.
    is_short: Cell<bool>,
    touched: Box<dyn Fn(String)>,
}

impl Notes {
    /// Of a volume of this name.
    #[must_use]
    pub fn new(state_folder: &Path, run_folder: &Path, name: &str) -> Self {
        let now = run_folder.join(format!("{name}.held"));
        let tally = run_folder.join(format!("{name}.writes"));
        Self { state_folder: state_folder.to_owned(), now, tally }
    }

    fn note(&self) -> PathBuf {
        self.state_folder.join(NOTE)
    }

    /// Says durably that it is open.
    fn note_open(&self, boot: &Boot, written_at: Option<i64>) -> io::Result<()> {
        let written_at = written_at.map_or_else(String::new, |at| format!("{at}\n"));
        durable::replace(&self.note(), format!("{OPEN}\n{}\n{written_at}", boot.name).as_bytes())
    }
}

/// That a backing was compared with what is noted of it, and what was noticed: no role is opened before that was done.
#[derive(Debug)]
pub struct Compared {
    touched: Option<String>,
}

impl Compared {
    /// Of a backing that has just taken the place of another: the metadata says what is known of it.
    #[must_use]
    pub fn anew() -> Self {
        Self { touched: None }
    }

    /// Of one that something else made smaller.
    #[must_use]
    pub fn smaller() -> Self {
        Self { touched: Some(SMALLER.to_owned()) }
    }

    /// With what was noticed before and not recorded yet, in words, where nothing is noticed now.
    #[must_use]
    pub fn or_earlier(self, touched: Option<String>) -> Self {
        Self { touched: self.touched.or(touched) }
    }

    /// That something else wrote to it, in words.
    #[must_use]
    pub fn touched(&self) -> Option<&str> {
        self.touched.as_deref()
    }
}

impl Holding {
    /// Compares what the backing looked like before it was opened with the notes.
    ///
    /// # Errors
    /// When the backing can't be read.
    pub async fn compare(
        notes: &Notes,
        storage: &Rc<dyn Storage>,
        backing: &Rc<File>,
        pool: &BufferPool,
    ) -> Result<Compared, storage::Error> {
        let Some((boot, looks)) = boot().zip(backing.found().and_then(looks_of)) else {
            return Ok(Compared { touched: None });
        };
        let (read, of) = (notes.clone(), looks.clone());
        let noted = blocking(move || read_notes(&read, &of)).await;
        if let Some(words) = judge(&noted, &looks, &boot) {
            return Ok(Compared { touched: Some(words) });
        }
        if let Noted::Closed { digest: before, .. } = &noted
            && *before != digest(storage, backing, pool).await?
        {
            let words = "its content is not what it was when it was closed here".to_owned();
            return Ok(Compared { touched: Some(words) });
        }
        Ok(Compared { touched: None })
    }

    /// Notes that the backing is held from now on. `touched` is called once it is noticed that something else writes.
    /// Nothing may be written before this returns.
    ///
    /// # Errors
    /// When the notes can't be written.
    pub async fn begin(
        notes: Notes,
        storage: Rc<dyn Storage>,
        backing: Rc<File>,
        pool: BufferPool,
        touched: impl Fn(String) + 'static,
    ) -> io::Result<Option<Rc<Self>>> {
        let Some(boot) = boot().filter(|_| backing.is_direct() || backing.kind() == Kind::Image) else {
            // What is written late would be counted late.
            blocking(move || durable::remove(&notes.note())).await?;
            return Ok(None);
        };
        let looks = looks(&backing).await;
        if looks.is_none() {
            tracing::warn!(
                "{}: the kernel does not count what is written to it (iostats is off): what something else writes is not noticed",
                backing.path().display()
            );
        }
        let tally = looks.as_ref().and_then(|looks| {
            let tally = Tally::begin(&notes.tally, &looks.tally_of(&boot)?, looks.sectors()?);
            tally.inspect_err(|error| tracing::warn!(%error, "cannot count what is written to the disk")).ok()
        });
        let now = fs::File::options().create(true).truncate(false).write(true).open(&notes.now)?;
        let holding = Rc::new(Self {
            storage,
            writes: backing.watch_writes(now.try_clone()?, BUSY.as_bytes(), tally),
            backing,
            pool,
            now,
            boot,
            quiet: RefCell::default(),
            begun: Cell::new(0),
            kept: Cell::new(looks.as_ref().and_then(Looks::modified).unwrap_or_default()),
            keeping: RefCell::default(),
            is_told: Cell::new(false),
            is_noted: Cell::new(false),
            is_short: Cell::new(false),
            touched: Box::new(touched),
            notes,
        });
        let written_at = looks.as_ref().and_then(Looks::modified);
        if let Some(looks) = looks {
            holding.note_quiet(looks)?;
        }
        let (notes, boot) = (holding.notes.clone(), holding.boot.clone());
        blocking(move || {
            notes.note_open(&boot, written_at)?;
            durable::remove(&notes.state_folder.join(EARLIER_NOW))
        })
        .await?;
        tokio::task::spawn_local(look(Rc::downgrade(&holding)));
        Ok(Some(holding))
    }

    /// Notes what the backing looks like, where everything that was written has ended.
    pub async fn close(self: Rc<Self>) {
        let closing = async {
            let Some((_, now)) = self.looks_at_rest().await else { return Ok(()) };
            if self.is_touched(&now) || self.is_noted.get() {
                return Ok(());
            }
            let keeping = self.keeping.take();
            if let Some(keeping) = keeping {
                keeping.await?;
            }
            // The times of an image are not durable by a sync of its data alone.
            let synced = self.backing.as_fd().try_clone_to_owned();
            let digest = digest(&self.storage, &self.backing, &self.pool).await.map_err(io::Error::other)?;
            crate::blocking::spawn(move || fs::File::from(synced?).sync_all()).await??;
            let Some(looks) = looks(&self.backing).await else { return Ok(()) };
            let text = format!("{CLOSED}\n{}\n{}\n{digest}\n", self.boot.name, looks.text());
            let note = self.notes.note();
            blocking(move || durable::replace(&note, text.as_bytes())).await?;
            let _ = fs::remove_file(&self.notes.now);
            let _ = fs::remove_file(&self.notes.tally);
            Ok(())
        };
        let closed: io::Result<()> = tokio::time::timeout(CLOSE_TIME, closing).await.unwrap_or(Ok(()));
        if let Err(error) = closed {
            tracing::warn!(%error, "cannot note what the backing looks like; the next start compares what it can");
        }
    }

    /// What it looks like while this host writes nothing, and how many writes had begun by then; nothing where it writes.
    async fn looks_at_rest(&self) -> Option<(u64, Looks)> {
        let begun = self.writes.begun();
        if !self.writes.is_idle() {
            return None;
        }
        let looks = looks(&self.backing).await?;
        // What this host began to write meanwhile may show or not.
        (self.writes.begun() == begun).then_some((begun, looks))
    }

    /// Whether something else has written. Where this host writes too, an image doesn't tell that.
    fn is_touched(&self, now: &Looks) -> bool {
        let quiet = self.quiet.borrow();
        let changed = self.writes.is_quiet() && quiet.as_ref().is_some_and(|before| before.was_written(now));
        // What this host has begun is counted before the kernel does, and read after its count was.
        let bound = self.writes.tally().map(Tally::bound);
        changed || now.sectors().zip(bound).is_some_and(|(sectors, bound)| sectors.exceed(bound))
    }

    /// Notes what it looks like, while this host writes nothing.
    fn note_quiet(&self, looks: Looks) -> io::Result<()> {
        let text = format!("{QUIET}\n{}\n{}\n", self.boot.name, looks.text());
        self.now.write_all_at(text.as_bytes(), 0)?;
        if let Some((tally, sectors)) = self.writes.tally().zip(looks.sectors()) {
            tally.settle(sectors);
        }
        *self.quiet.borrow_mut() = Some(looks);
        self.is_told.set(false);
        self.writes.become_quiet();
        Ok(())
    }

    /// Notes what it looks like while this host writes, so that what it wrote itself until it was killed is not taken for
    /// another's.
    fn note_busy(&self, looks: &Looks) {
        let text = format!("{BUSY}\n{}\n{}\n", self.boot.name, looks.text());
        if let Err(error) = self.now.write_all_at(text.as_bytes(), 0) {
            tracing::debug!(%error, "cannot note what the backing looks like");
        }
    }

    /// Sees to it that the durable note says about when an image was last written here.
    fn keep_time(&self, looks: &Looks) {
        let mut keeping = self.keeping.borrow_mut();
        let is_made = keeping.as_ref().is_some_and(|keeping| !keeping.is_finished());
        let is_due = |at: &i64| *at >= self.kept.get() + KEPT_SECONDS && !is_made && !self.is_noted.get();
        let Some(at) = looks.modified().filter(is_due) else { return };
        self.kept.set(at);
        let (notes, boot) = (self.notes.clone(), self.boot.clone());
        *keeping = Some(crate::blocking::spawn(move || {
            if let Err(error) = notes.note_open(&boot, Some(at)) {
                tracing::debug!(%error, "cannot note when the backing was written");
            }
        }));
    }

    /// Notes durably that all is to be compared and why, before the notes say what the backing looks like since: whatever
    /// becomes of this process, it is done.
    async fn note_touched(&self, words: &str) {
        if self.is_noted.replace(true) {
            return;
        }
        let keeping = self.keeping.take();
        let (path, text) = (self.notes.note(), format!("{TOUCHED}\n{words}\n"));
        let noting = async {
            if let Some(keeping) = keeping {
                keeping.await?;
            }
            crate::blocking::spawn(move || durable::replace(&path, text.as_bytes())).await?
        };
        let noted: io::Result<()> = noting.await;
        if let Err(error) = noted {
            tracing::warn!(%error, "cannot note that something else wrote to the backing");
        }
    }

    /// Somebody else saw that the backing has become smaller.
    pub fn note_short(&self) {
        self.is_short.set(true);
    }

    /// One look. Nothing is submitted between its end and what follows of it: that happens on this thread.
    async fn look(&self) {
        if self.backing.shrunk_to().is_some() {
            // What is left of it is what it was. What was beyond its end can't be, once that is there again.
            return self.note_short();
        }
        if self.is_short.take() {
            self.note_touched(SMALLER).await;
            *self.quiet.borrow_mut() = None;
            return (self.touched)(SMALLER.to_owned());
        }
        let before = self.begun.get();
        let at_rest = self.looks_at_rest().await;
        let is_resting = at_rest.as_ref().is_some_and(|(begun, _)| *begun == before);
        self.begun.set(at_rest.as_ref().map_or_else(|| self.writes.begun(), |(begun, _)| *begun));
        let now = match at_rest {
            Some((_, now)) if is_resting => now,
            _ => {
                *self.quiet.borrow_mut() = None;
                let Some(now) = looks(&self.backing).await else { return };
                self.note_busy(&now);
                now
            }
        };
        self.keep_time(&now);
        let is_touched = self.is_touched(&now);
        if is_touched && !self.is_told.replace(true) {
            let sizes = self.quiet.borrow().as_ref().and_then(|before| before.growth(&now));
            let words =
                sizes.map_or_else(|| WRITTEN.to_owned(), |sizes| larger("while it was open here", &sizes));
            self.note_touched(&words).await;
            (self.touched)(words);
        }
        // From now on this is what it looks like.
        if is_resting
            && (is_touched || self.quiet.borrow().is_none())
            && let Err(error) = self.note_quiet(now)
        {
            tracing::debug!(%error, "cannot note what the backing looks like");
        }
    }
}

async fn look(holding: Weak<Holding>) {
    loop {
        tokio::time::sleep(LOOK_TIME).await;
        let Some(holding) = holding.upgrade() else { return };
        holding.look().await;
    }
}

/// That something else made an image larger, which need not be all that it did.
fn larger(since: &str, sizes: &str) -> String {
    format!("something else made it larger {since}: {sizes}")
}

/// What is noticed, in words. A digest that was noted is for the caller to compare.
fn judge(noted: &Noted, looks: &Looks, boot: &Boot) -> Option<String> {
    let written = |since: &str| Some(format!("something else wrote to it {since}"));
    let changed = |before: &Looks, since: &str| match before.growth(looks) {
        Some(sizes) => Some(larger(since, &sizes)),
        None => written(since),
    };
    let unknown = || Some("it is not known what it looked like when the agent was killed".to_owned());
    match noted {
        Noted::Nothing => None,
        Noted::Touched(words) => Some(words.clone()),
        Noted::Closed { boot: then, looks: before, .. } => {
            let is_told = before.is_kept() || *then == boot.name;
            if is_told && before.was_written(looks) {
                changed(before, "after it was closed here")
            } else {
                None
            }
        }
        Noted::Open { boot: then, written_at, .. } if *then != boot.name => match looks {
            Looks::Image { modified, .. } if modified.0 > boot.at => {
                written("after this system started, before it was opened here")
            }
            Looks::Image { modified, .. } if written_at.is_some_and(|at| modified.0 > at + LOST_SECONDS) => {
                written("after it was last written here")
            }
            Looks::Disk { written: sectors, discarded, .. } if *sectors + *discarded > 0 => {
                written("after this system started, before it was opened here")
            }
            Looks::Image { .. } | Looks::Disk { .. } => None,
        },
        Noted::Open { now: Some((busy, then, before)), bound, .. } if *then == boot.name => {
            let is_written = match (busy, before, looks) {
                (Some(busy), Looks::Image { modified, .. }, Looks::Image { modified: now, .. }) => {
                    now.0 > modified.0.max(*busy) + BUSY_SECONDS || now < modified
                }
                (Some(_), Looks::Disk { sequence, .. }, Looks::Disk { sequence: now, .. }) => {
                    let Some((now_written, bound)) = looks.sectors().zip(*bound) else { return unknown() };
                    sequence != now || now_written.exceed(bound)
                }
                _ => before.was_written(looks),
            };
            if is_written { changed(before, "after the agent was killed") } else { None }
        }
        Noted::Open { .. } => unknown(),
    }
}

impl Looks {
    /// Whether a start of the system leaves it as it is.
    fn is_kept(&self) -> bool {
        matches!(self, Self::Image { .. })
    }

    /// When an image was modified, in seconds since 1970.
    fn modified(&self) -> Option<i64> {
        match self {
            Self::Image { modified, .. } => Some(modified.0),
            Self::Disk { .. } => None,
        }
    }

    /// What the kernel counts of a disk.
    fn sectors(&self) -> Option<Sectors> {
        match *self {
            Self::Image { .. } => None,
            Self::Disk { written, discarded, .. } => Some(Sectors { written, discarded }),
        }
    }

    /// What a tally of a disk is of.
    fn tally_of(&self, boot: &Boot) -> Option<String> {
        match self {
            Self::Image { .. } => None,
            Self::Disk { sequence, .. } => Some(format!("{} {sequence}", boot.name)),
        }
    }

    /// Whether what looks like `now` was written since it looked so.
    fn was_written(&self, now: &Self) -> bool {
        match (self, now) {
            (
                Self::Image { modified, size_bytes, .. },
                Self::Image { modified: then, size_bytes: size, .. },
            ) => modified != then || size_bytes != size,
            _ => self != now,
        }
    }

    /// Both sizes in words, where an image has become larger.
    fn growth(&self, now: &Self) -> Option<String> {
        match (self, now) {
            (Self::Image { size_bytes: before, .. }, Self::Image { size_bytes: now, .. }) if now > before => {
                Some(format!("it has {now} bytes, and had {before}"))
            }
            _ => None,
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Image { modified, changed, size_bytes } => {
                format!("image {}.{} {}.{} {size_bytes}", modified.0, modified.1, changed.0, changed.1)
            }
            Self::Disk { sequence, written, discarded } => format!("disk {sequence} {written} {discarded}"),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let mut words = text.split(' ');
        let time = |text: &str| {
            let (seconds, nanoseconds) = text.split_once('.')?;
            Some((seconds.parse().ok()?, nanoseconds.parse().ok()?))
        };
        match words.next()? {
            "image" => Some(Self::Image {
                modified: time(words.next()?)?,
                changed: time(words.next()?)?,
                size_bytes: words.next()?.parse().ok()?,
            }),
            "disk" => Some(Self::Disk {
                sequence: words.next()?.to_owned(),
                written: words.next()?.parse().ok()?,
                discarded: words.next()?.parse().ok()?,
            }),
            _ => None,
        }
    }
}

/// What the kernel tells of an open backing; nothing where it doesn't. It is asked on another thread: a file server
/// may hang.
async fn looks(backing: &File) -> Option<Looks> {
    let file = fs::File::from(backing.as_fd().try_clone_to_owned().ok()?);
    crate::blocking::spawn(move || looks_of(&file.metadata().ok()?)).await.ok()?
}

fn looks_of(status: &fs::Metadata) -> Option<Looks> {
    if !status.file_type().is_block_device() {
        return Some(Looks::Image {
            modified: (status.mtime(), status.mtime_nsec()),
            changed: (status.ctime(), status.ctime_nsec()),
            size_bytes: status.len(),
        });
    }
    // Documentation/admin-guide/iostats.rst: the seventh number is of sectors written, the fourteenth of sectors
    // discarded. A flush counts as a write, of none.
    let folder = system::device_folder(status.rdev());
    let counts = String::from_utf8(system::read(&folder.join("stat")).ok()?).ok()?;
    let count = |place| counts.split_whitespace().nth(place)?.parse().ok();
    let disk = if folder.join("partition").exists() { folder.parent()?.to_owned() } else { folder };
    // Where the kernel is told not to count, nothing seems to be written.
    if system::read(&disk.join("queue/iostats")).is_ok_and(|counts| counts.trim_ascii() == b"0") {
        return None;
    }
    // A kernel that doesn't count disks gives them no other name to tell by.
    let sequence = system::read(&disk.join("diskseq")).unwrap_or_default();
    let sequence = String::from_utf8(sequence).ok().filter(|text| !text.is_empty());
    Some(Looks::Disk {
        sequence: sequence.unwrap_or_else(|| "-".to_owned()),
        written: count(6)?,
        discarded: count(13).unwrap_or(0),
    })
}

fn boot() -> Option<Boot> {
    let name = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?.trim().to_owned();
    let counts = fs::read_to_string("/proc/stat").ok()?;
    let at = counts.lines().find_map(|line| line.strip_prefix("btime "))?.trim().parse().ok()?;
    Some(Boot { name, at })
}

/// Reads the notes of a backing that looks so.
fn read_notes(notes: &Notes, looks: &Looks) -> Noted {
    let note = fs::read_to_string(notes.note()).unwrap_or_default();
    let mut lines = note.lines();
    let closed = |mut lines: std::str::Lines<'_>| {
        let boot = lines.next()?.to_owned();
        let looks = Looks::parse(lines.next()?)?;
        Some(Noted::Closed { boot, looks, digest: lines.next()?.to_owned() })
    };
    match lines.next() {
        Some(TOUCHED) => Noted::Touched(lines.next().unwrap_or(WRITTEN).to_owned()),
        Some(CLOSED) => closed(lines).unwrap_or(Noted::Nothing),
        Some(OPEN) => {
            let boot = lines.next().unwrap_or_default().to_owned();
            let written_at = lines.next().and_then(|at| at.parse().ok());
            let earlier = notes.state_folder.join(EARLIER_NOW);
            let now = if earlier.exists() { &earlier } else { &notes.now };
            // The mark alone is written with the first write after a quiet time.
            let marked = fs::metadata(now).map_or(0, |note| note.mtime());
            let noted = parse_now(&fs::read_to_string(now).unwrap_or_default());
            let now = noted.map(|(is_quiet, boot, looks)| ((!is_quiet).then_some(marked), boot, looks));
            let of = looks.tally_of(&Boot { name: boot.clone(), at: 0 });
            let bound = of.and_then(|of| Tally::left_at(&notes.tally, &of));
            Noted::Open { boot, written_at, now, bound }
        }
        _ => Noted::Nothing,
    }
}

fn parse_now(text: &str) -> Option<(bool, String, Looks)> {
    let mut lines = text.lines();
    let is_quiet = lines.next()? == QUIET;
    let boot = lines.next()?.to_owned();
    Some((is_quiet, boot, Looks::parse(lines.next()?)?))
}

/// The digest of what others write first.
async fn digest(
    storage: &Rc<dyn Storage>,
    backing: &Rc<File>,
    pool: &BufferPool,
) -> Result<String, storage::Error> {
    let size = backing.size_bytes();
    let edge = EDGE_BYTES.min(size);
    let step = (size / (SAMPLES + 1)).max(SAMPLE_BYTES) & !(SAMPLE_BYTES - 1);
    let samples = (1..=SAMPLES).map(|number| ByteRange::new(number * step, SAMPLE_BYTES));
    let edges = [ByteRange::new(0, edge), ByteRange::between(size - edge, size)];
    let mut hasher = blake3::Hasher::new();
    for range in edges.into_iter().chain(samples.filter(|range| range.end() <= size)) {
        hasher.update(&storage::read(&**storage, backing, pool, range).await?);
    }
    Ok(hasher.finalize().to_hex().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image(modified: (i64, i64)) -> Looks {
        Looks::Image { modified, changed: modified, size_bytes: 1 << 20 }
    }

    fn disk(sequence: &str, written: u64) -> Looks {
        Looks::Disk { sequence: sequence.to_owned(), written, discarded: 0 }
    }

    #[test]
    fn what_something_else_wrote_is_noticed() {
        let boot = Boot { name: "now".to_owned(), at: 1000 };
        let closed =
            |boot: &str, looks| Noted::Closed { boot: boot.to_owned(), looks, digest: String::new() };
        let open = |boot: &str, now: Option<(bool, &str, Looks)>| Noted::Open {
            boot: boot.to_owned(),
            written_at: None,
            now: now.map(|(is_quiet, boot, looks)| ((!is_quiet).then_some(0), boot.to_owned(), looks)),
            bound: None,
        };
        let marked = |at, looks| Noted::Open {
            boot: "now".to_owned(),
            written_at: None,
            now: Some((Some(at), "now".to_owned(), looks)),
            bound: None,
        };
        let counted = |sequence, written, discarded| Noted::Open {
            boot: "now".to_owned(),
            written_at: None,
            now: Some((Some(0), "now".to_owned(), disk(sequence, 5))),
            bound: Some(Sectors { written, discarded }),
        };
        let kept = |at| Noted::Open { boot: "then".to_owned(), written_at: Some(at), now: None, bound: None };
        let (before, later) = (image((1500, 1)), image((1500, 2)));
        let moved = Looks::Image { modified: (1500, 1), changed: (1500, 2), size_bytes: 1 << 20 };
        for (noted, looks, is_noticed) in [
            (Noted::Nothing, image((9, 9)), false),
            (Noted::Touched(WRITTEN.to_owned()), image((9, 9)), true),
            (closed("now", before.clone()), before.clone(), false),
            (closed("then", before.clone()), before.clone(), false),
            (closed("then", before.clone()), later.clone(), true),
            // It was moved away and back.
            (closed("then", before.clone()), moved, false),
            (closed("now", disk("7", 5)), disk("7", 5), false),
            (closed("now", disk("7", 5)), disk("7", 6), true),
            (closed("now", disk("7", 5)), disk("8", 5), true),
            // The counts began anew: the digest tells.
            (closed("then", disk("7", 5)), disk("7", 1), false),
            // The agent was killed.
            (open("now", Some((true, "now", before.clone()))), before.clone(), false),
            (open("now", Some((true, "now", before.clone()))), later.clone(), true),
            (open("now", Some((false, "now", before.clone()))), later.clone(), false),
            (open("now", Some((false, "now", before.clone()))), image((1503, 0)), false),
            (open("now", Some((false, "now", before.clone()))), image((1504, 0)), true),
            // It was killed right after the first write for a long time.
            (marked(1600, before.clone()), image((1600, 5)), false),
            (marked(1600, before.clone()), image((1604, 0)), true),
            (marked(1600, later.clone()), before.clone(), true),
            (open("now", Some((true, "now", disk("7", 5)))), disk("7", 6), true),
            // It was killed while it wrote, and had begun that much.
            (counted("7", 9, 0), disk("7", 9), false),
            (counted("7", 9, 0), disk("7", 10), true),
            (counted("7", 9, 0), disk("7", 7), false),
            (counted("7", 9, 0), disk("8", 6), true),
            (counted("7", 9, 0), Looks::Disk { sequence: "7".to_owned(), written: 9, discarded: 1 }, true),
            (open("now", Some((false, "now", disk("7", 5)))), disk("7", 6), true),
            (open("now", None), before.clone(), true),
            // The system went down.
            (open("then", Some((true, "then", before.clone()))), image((999, 0)), false),
            (open("then", None), later, true),
            // It was written in a start of the system in which it was not opened here.
            (kept(800), image((920, 0)), false),
            (kept(800), image((921, 0)), true),
            (kept(800), image((1001, 0)), true),
            (open("then", None), disk("7", 0), false),
            (open("then", None), disk("7", 1), true),
        ] {
            assert_eq!(judge(&noted, &looks, &boot).is_some(), is_noticed, "{noted:?} {looks:?}");
        }
    }

    /// It was told as something else's write, which nobody had made.
    #[test]
    fn an_image_that_was_made_larger_is_told_with_both_sizes() {
        let boot = Boot { name: "now".to_owned(), at: 1000 };
        let sized = |size_bytes| Looks::Image { modified: (1500, 1), changed: (1500, 1), size_bytes };
        let closed = Noted::Closed { boot: "now".to_owned(), looks: sized(8192), digest: String::new() };
        let killed = Noted::Open {
            boot: "now".to_owned(),
            written_at: None,
            now: Some((None, "now".to_owned(), sized(8192))),
            bound: None,
        };
        for (noted, since) in [(closed, "after it was closed here"), (killed, "after the agent was killed")] {
            let words =
                |size_bytes| judge(&noted, &sized(size_bytes), &boot).expect("another size is noticed");
            assert_eq!(
                words(12288),
                format!("something else made it larger {since}: it has 12288 bytes, and had 8192")
            );
            assert_eq!(words(4096), format!("something else wrote to it {since}"));
        }
    }

    #[test]
    fn the_notes_are_read_back_as_they_were_written() {
        for looks in [image((1, 23)), disk("7", 5), disk("-", 0)] {
            assert_eq!(Looks::parse(&looks.text()), Some(looks.clone()));
            let text = format!("{QUIET}\nboot\n{}\n", looks.text());
            assert_eq!(parse_now(&text), Some((true, "boot".to_owned(), looks.clone())));
            let busy = text.replacen(QUIET, BUSY, 1);
            assert_eq!(parse_now(&busy), Some((false, "boot".to_owned(), looks)));
        }
        assert_eq!(BUSY.len(), QUIET.len(), "one takes the place of the other");
        assert_eq!(parse_now(""), None);
        assert_eq!(Looks::parse("image 1.2"), None);
    }
}
