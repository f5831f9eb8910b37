//! Torture: real agents, a real file system on a real loop device, a writer that knows what it was promised, and
//! everything that can happen to a host and a link, at random.
//!
//! [`Torture::run`] goes on for a while and then brings everything back together. One seed decides what happens in
//! which order and what is written; the machine decides how long each thing takes. What it did is printed line by line.
//!
//! What is checked, and when:
//!
//! - When the primary was killed and has come back: its file system is without a fault, and has every record whose
//!   sync was answered ([`ledger`]).
//! - When a replica was killed: its copy, rolled back where a resync was under way, is a state that a power cut could
//!   have left (P1): a file system without a fault, with every record up to some moment and nothing later. The moment
//!   is not before the last at which the replica was seen to have everything, and in sync mode not before the last
//!   answer that was given with it (L1: the primary's generation says that no other was given since).
//! - When a replica was promoted: the same, of its device. Then that is the truth, and the old primary follows.
//! - In a lull: all backings are identical.

pub mod disk;
pub mod image;
pub mod ledger;
pub mod load;
mod mishaps;
mod promotions;
pub mod record;
mod sites;
pub mod writer;

use crate::harness::random::Random;
use crate::machines::folder::Folder;
use crate::machines::patience::until;
use crate::machines::programs::{run, text};
use blockmirror_agent::config::Mode;
use disk::FileSystem;
use image::Image;
use ledger::{Ledger, Moment};
use load::Load;
use sites::Site;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// Set from outside, for instance by a signal: what runs comes to its end.
pub static IS_OVER: AtomicBool = AtomicBool::new(false);

const SIZE_BYTES: u64 = 96 << 20;
const NAMES: [&str; 3] = ["a", "b", "c"];

/// How to torture.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Decides all that can be decided.
    pub seed: u64,
    /// How long, until everything is brought together again.
    pub time: Duration,
    /// When writes and flushes are answered.
    pub mode: Mode,
    /// How many hosts there are: 2 or 3.
    pub hosts: usize,
    /// How often replicas are promoted, and primaries demoted.
    pub promotions: Promotions,
    /// The program that is the writer when its first argument is `writer`.
    pub writer: PathBuf,
    /// Where everything is copied to when it fails.
    pub keep: Option<PathBuf>,
}

/// How often another host becomes the primary.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Promotions {
    /// Not at all.
    Never,
    /// Now and then, among all else that can happen.
    Sometimes,
    /// Whenever a primary is lost or stopped, and in between; little else happens.
    Mostly,
}

impl Promotions {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::Never, Self::Sometimes, Self::Mostly];
}

impl std::fmt::Display for Promotions {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(match self {
            Self::Never => "never",
            Self::Sometimes => "sometimes",
            Self::Mostly => "mostly",
        })
    }
}

/// What a run was worth.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// How many things happened.
    pub mishaps: u64,
    /// How many copies and devices were checked.
    pub checks: u64,
    /// How many of those were rolled back before.
    pub rollbacks: u64,
    /// How many promotions and switches there were.
    pub promotions: u64,
    /// How many records were begun.
    pub records: u64,
}

/// One run: its hosts, its file system, and who writes to it. What uses the devices goes before the hosts, and those before the folder.
pub struct Torture {
    load: Option<Load>,
    mounted: Option<FileSystem>,
    sites: Vec<Site>,
    folder: Folder,
    primary: usize,
    ledger: Arc<Mutex<Ledger>>,
    random: Random,
    settings: Settings,
    began: Instant,
    tally: Tally,
}

impl Torture {
    /// A volume on hosts that are in sync, with a file system that is being written to.
    ///
    /// # Panics
    /// When any step fails.
    #[must_use]
    pub fn new(settings: Settings) -> Self {
        let folder = Folder::new();
        let sites = sites::make(&folder, &NAMES[..settings.hosts], SIZE_BYTES, settings.mode);
        let mut torture = Self {
            load: None,
            mounted: None,
            sites,
            folder,
            primary: 0,
            ledger: Arc::default(),
            random: Random::new(settings.seed),
            settings,
            began: Instant::now(),
            tally: Tally::default(),
        };
        torture.wait_for_device();
        FileSystem::make(&torture.device(), torture.random.once_in(2));
        torture.start_load();
        torture
    }

    /// Lets things happen until the time is over, and then brings everything together.
    ///
    /// # Panics
    /// When anything is not as it must be; the message says what.
    pub fn run(mut self) -> Tally {
        while self.began.elapsed() < self.settings.time && !IS_OVER.load(Ordering::Relaxed) {
            self.sample();
            self.let_happen();
            self.tally.mishaps += 1;
            self.go_on();
        }
        self.end();
        self.tally
    }

    /// Lets the writer write a little. Where it may wait for a replica that doesn't answer, the next thing mostly happens
    /// while it does.
    fn go_on(&mut self) {
        let count = self.random.below(120);
        let may_wait = self.settings.mode != Mode::Async && self.sites.iter().any(Site::is_broken);
        if !may_wait || self.random.once_in(5) {
            self.load().pass(count);
        }
    }

    fn end(&mut self) {
        self.say("the time is over");
        self.come_together();
        self.say("the agents stop");
        self.sites.iter_mut().for_each(|site| site.host.stop());
        self.assert_identical();
        self.say("all backings are identical");
    }

    fn say(&self, what: &str) {
        println!("[{:8.2}] {what}", self.began.elapsed().as_secs_f64());
    }

    fn name(&self, site: usize) -> &str {
        self.sites[site].host.name()
    }

    fn device(&self) -> PathBuf {
        self.sites[self.primary].host.device()
    }

    fn load(&mut self) -> &mut Load {
        self.load.as_mut().expect("the writer runs")
    }

    fn now(&self) -> Moment {
        self.ledger.lock().expect("the writer makes sense").now()
    }

    fn replicas(&self) -> Vec<usize> {
        (0..self.sites.len()).filter(|site| *site != self.primary).collect()
    }

    fn some_replica(&mut self) -> usize {
        let replicas = self.replicas();
        self.random.pick(&replicas)
    }

    /// Where a file system is mounted to be looked at.
    fn look(&self) -> PathBuf {
        self.folder.join("look")
    }

    fn wait_for_device(&self) {
        let host = &self.sites[self.primary].host;
        until("the primary serves its device", || {
            let path = host.device();
            if path.exists() { Ok(()) } else { Err(format!("{:?}", host.status().facts.devices)) }
        });
    }

    /// Mounts the primary's device, and starts a writer in it.
    fn start_load(&mut self) {
        let mounted = FileSystem::mount(&self.device(), &self.folder.join("mount"));
        let seed = self.random.next_number();
        self.load = Some(Load::start(&self.settings.writer, &mounted.records(), seed, &self.ledger));
        self.mounted = Some(mounted);
    }

    /// Ends the writer and unmounts the device, in order.
    fn end_load(&mut self) {
        self.load.take().expect("the writer runs").end();
        self.mounted.take().expect("it is mounted").unmount();
    }

    /// Ends the writer and unmounts the device, which is dead.
    fn abandon_load(&mut self) {
        self.load.take().expect("the writer runs").kill();
        self.mounted.take().expect("it is mounted").abandon();
    }

    /// Looks into a device or an image, which must hold everything up to `floor`.
    fn check(&mut self, device: &Path, floor: Moment, whose: &str) -> Image {
        let image = disk::examine(device, &self.look());
        let checked = self.ledger.lock().expect("the writer makes sense").check(&image, floor);
        self.tally.checks += 1;
        match checked {
            Ok(checked) => {
                let (certain, lost, now) = (checked.certain, checked.lost, self.now().0);
                let behind = now - checked.moment.0;
                self.say(&format!(
                    "{whose} is right: {behind} of {now} lines behind, {certain} places are certain, {lost} records lost"
                ));
            }
            Err(wrong) => panic!("{whose} is not what was written: {wrong}"),
        }
        image
    }
}

impl Drop for Torture {
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Some(keep) = &self.settings.keep
        {
            // Only what holds still is worth anything.
            self.sites.iter_mut().for_each(Site::make_sure_that_it_is_down);
            let copied = run("cp", &["--archive", "--sparse=always", text(self.folder.path()), text(keep)]);
            eprintln!("kept in {}: {}", keep.display(), copied.status);
        }
    }
}
