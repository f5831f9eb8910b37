//! The bench: Blockmirror and programs that do the same work, measured in one run, on the same backing, in turns.
//!
//! A *comparison* is one piece of work and its contestants: ours, peers, and what the machine can do without either.
//! Everybody is set up first, then turns go A B C A B C ([`comparison`]), and medians, spread and ratios are told
//! ([`report`]). Figures of two runs, or of two machines, are not compared: only ratios within one run mean anything.
//!
//! Nothing here fails on time: a bar that isn't met is told, and that is all. What can't be run has failed, except that
//! a peer whose program isn't installed is skipped with the reason. Each group of comparisons, a file in [`groups`], is
//! a row of bars.
//!
//! Everything that is started ends with its owner: agents, servers, mounts, loop devices, network namespaces. An
//! interrupt lets the owners go in order; when the bench is killed, the kernel ends what it started.

pub mod agent;
pub mod comparison;
pub mod fio;
pub mod groups;
pub mod loops;
pub mod machine;
pub mod mirror;
pub mod network;
pub mod peers;
pub mod place;
pub mod processes;
pub mod qemu_mirror;
pub mod quantity;
pub mod quic;
pub mod report;
pub mod rsync;
pub mod settings;
pub mod statistics;

use crate::machines::folder::Folder;
use anyhow::Result;
use comparison::{Contestant, Outcome, take_turns};
use place::{Place, PlaceKind};
use report::{Bar, Report, Wanted, show};
use serde_json::{Value, json};
use settings::Settings;
use std::cell::{Cell, RefCell};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

/// Set from outside, for instance by a signal: what runs comes to its end.
pub static IS_OVER: AtomicBool = AtomicBool::new(false);

/// What an earlier release is called that is measured beside this one.
pub const BEFORE: &str = "blockmirror before";

/// A run. Folders go last, with all mounts and loop devices in them.
pub struct Bench {
    /// How to measure.
    pub settings: Settings,
    report: RefCell<Report>,
    files: Folder,
    run: Folder,
    has_tmpfs: Cell<bool>,
}

impl Bench {
    /// Makes the folders.
    ///
    /// # Errors
    /// When they can't be made.
    pub fn new(settings: Settings) -> Result<Self> {
        std::fs::create_dir_all(&settings.folder)?;
        let files = Folder::within(&settings.folder.canonicalize()?)?;
        let run = Folder::within(&std::env::temp_dir())?;
        Ok(Self { settings, report: RefCell::default(), files, run, has_tmpfs: Cell::new(false) })
    }

    /// Runs the groups that were asked for, and tells what was measured. Returns whether everything could be run.
    ///
    /// # Errors
    /// When the JSON can't be written.
    pub fn run(self) -> Result<bool> {
        let machine = machine::describe();
        println!("{}", serde_json::to_string_pretty(&machine)?);
        for group in groups::ALL.iter().filter(|group| self.settings.wants(group.name)) {
            if IS_OVER.load(Ordering::Relaxed) {
                break;
            }
            println!("\n== {}: {}", group.name, group.about);
            if let Err(error) = (group.run)(&self) {
                println!("{} could not be run: {error:#}", group.name);
                self.report.borrow_mut().failed.push((group.name.to_owned(), format!("{error:#}")));
            }
            self.write_json(&machine)?;
            self.write_page(&machine)?;
        }
        println!("\n{}", self.report.borrow().markdown());
        println!(
            "all values are in {}, the tables in {}",
            self.settings.json.display(),
            self.page().display()
        );
        Ok(self.report.borrow().is_whole())
    }

    fn write_json(&self, machine: &Value) -> Result<()> {
        let settings = json!({
            "turns": self.settings.turns,
            "seconds": self.settings.seconds,
            "size_bytes": self.settings.size.0,
        });
        let value = self.report.borrow().json(machine, &settings, IS_OVER.load(Ordering::Relaxed));
        if let Some(folder) = self.settings.json.parent() {
            std::fs::create_dir_all(folder)?;
        }
        Ok(std::fs::write(&self.settings.json, serde_json::to_vec_pretty(&value)?)?)
    }

    fn page(&self) -> PathBuf {
        self.settings.json.with_extension("md")
    }

    /// The machine and all tables, for people.
    fn write_page(&self, machine: &Value) -> Result<()> {
        let Settings { turns, seconds, size, .. } = &self.settings;
        let began = format!("`scripts/bench --turns {turns} --seconds {seconds} --size {size}`");
        let page = format!("{began}\n\n{}\n{}", machine::markdown(machine), self.report.borrow().markdown());
        Ok(std::fs::write(self.page(), page)?)
    }

    /// The places to measure at.
    ///
    /// # Errors
    /// When one can't be made.
    pub fn places(&self) -> Result<Vec<Place>> {
        let kinds = [PlaceKind::Disk, PlaceKind::Tmpfs];
        let wanted = kinds.into_iter().filter(|kind| self.settings.place.is_none_or(|only| only == *kind));
        wanted.map(|kind| self.place(kind)).collect()
    }

    /// A place of this kind, for a group that wants no other.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn place(&self, kind: PlaceKind) -> Result<Place> {
        if kind == PlaceKind::Disk {
            return Place::disk(&self.files.join("disk"));
        }
        let folder = self.run.join("tmpfs");
        if self.has_tmpfs.replace(true) {
            rustix::mount::unmount(&folder, rustix::mount::UnmountFlags::empty())?;
        }
        let place = Place::tmpfs(&folder)?;
        if !place.is_direct {
            self.note("this kernel has no direct I/O on tmpfs: the agent writes through the cache there");
        }
        Ok(place)
    }

    /// The disk, unless only tmpfs was asked for.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn main_place(&self) -> Result<Place> {
        self.place(self.settings.place.unwrap_or(PlaceKind::Disk))
    }

    /// A short path for a socket, a log or a mount point.
    #[must_use]
    pub fn run_path(&self, name: &str) -> PathBuf {
        self.run.join(name)
    }

    /// Where sockets, logs and mount points are.
    #[must_use]
    pub fn run_folder(&self) -> &Path {
        self.run.path()
    }

    /// Measures, tells and keeps a comparison.
    ///
    /// # Errors
    /// When the bench is interrupted.
    pub fn compare(
        &self,
        group: &'static str,
        place: &'static str,
        work: impl Into<String>,
        contestants: Vec<Contestant<'_>>,
    ) -> Result<Outcome> {
        self.compare_turns(group, place, work, contestants, usize::from(self.settings.turns))
    }

    /// The same with so many turns, for what takes long and hardly varies.
    ///
    /// # Errors
    /// When the bench is interrupted.
    pub fn compare_turns(
        &self,
        group: &'static str,
        place: &'static str,
        work: impl Into<String>,
        contestants: Vec<Contestant<'_>>,
        turns: usize,
    ) -> Result<Outcome> {
        let outcome = Outcome { group, place, work: work.into(), ..Outcome::default() };
        let outcome = take_turns(contestants, turns, outcome);
        println!("{}", show(&outcome));
        self.report.borrow_mut().outcomes.push(outcome.clone());
        processes::go_on()?;
        Ok(outcome)
    }

    /// Keeps the bar against an earlier release, where one was measured beside this one. `ratio` is of what should be large.
    pub fn bar_to_before(&self, about: impl Into<String>, ratio: Option<f64>) {
        if self.settings.before.is_some() {
            self.bar(about, BEFORE, Wanted::AtLeast(0.97), ratio);
        }
    }

    /// Keeps a bar, and tells what was reached.
    pub fn bar(
        &self,
        about: impl Into<String>,
        measure: impl Into<String>,
        wanted: Wanted,
        reached: Option<f64>,
    ) {
        let bar = Bar { about: about.into(), measure: measure.into(), wanted, reached };
        self.report.borrow_mut().bars.push(bar);
    }

    /// Something that readers of the figures must know.
    pub fn note(&self, text: impl Into<String>) {
        let text = text.into();
        let notes = &mut self.report.borrow_mut().notes;
        if !notes.contains(&text) {
            println!("note: {text}");
            notes.push(text);
        }
    }
}
