//! The writer: a process of its own, so that a device that dies or hangs takes nothing else with it.
//!
//! It says on standard output what it is about to do and what is durable, a line each; see [`Line`]. A line that says
//! "begin" was written before anything of the record is, and one that says "durable" after the call that made it so.
//! It ends when its standard input does; it ends with [`FAILED`] when a call fails, and at once when nobody listens.

use super::record::{self, APPENDED_LIMIT, Place, SLOT_BLOCKS, SLOTS, WHOLE_LIMIT, WHOLES};
use crate::harness::random::Random;
use crate::machines::content::BLOCK_BYTES;
use std::collections::VecDeque;
use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// The exit code after a call that failed.
pub const FAILED: i32 = 3;

/// How many threads write. Each has places of its own.
const THREADS: u64 = 2;
/// How many logs a thread keeps.
const LOGS: usize = 5;
/// How many records a log gets.
const LOG_RECORDS: u64 = 24;

/// What the writer says.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Line {
    /// It begins to write a record.
    Begin {
        /// The record's number.
        number: u64,
        /// Where it goes.
        place: Place,
        /// How many blocks it has in a slot; elsewhere 0.
        blocks: u64,
    },
    /// It begins to remove a log.
    Remove {
        /// The removal's number.
        number: u64,
        /// The log.
        place: Place,
    },
    /// What has this number is durable.
    Durable(u64),
}

impl fmt::Display for Line {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Begin { number, place, blocks } => write!(f, "begin {number} {place} {blocks}"),
            Self::Remove { number, place } => write!(f, "remove {number} {place}"),
            Self::Durable(number) => write!(f, "durable {number}"),
        }
    }
}

impl FromStr for Line {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = |error: std::num::ParseIntError| format!("{text}: {error}");
        let number = |text: &str| text.parse::<u64>().map_err(wrong);
        match text.split(' ').collect::<Vec<_>>()[..] {
            ["begin", name, place, blocks] => {
                Ok(Self::Begin { number: number(name)?, place: place.parse()?, blocks: number(blocks)? })
            }
            ["remove", name, place] => Ok(Self::Remove { number: number(name)?, place: place.parse()? }),
            ["durable", name] => Ok(Self::Durable(number(name)?)),
            _ => Err(format!("{text:?} is nothing that a writer says")),
        }
    }
}

/// What all threads share.
struct Shared {
    folder: PathBuf,
    next_number: AtomicU64,
    is_over: AtomicBool,
}

/// A thread's own.
struct Worker<'a> {
    shared: &'a Shared,
    thread: u64,
    random: Random,
    logs: VecDeque<u64>,
    records_of_newest: u64,
}

/// What has to be synced before records count as durable.
enum Target {
    File(File),
    Folder,
}

/// Writes into a folder until standard input ends; gives the process's exit code. `first_number` is larger than all
/// that was used before.
#[must_use]
pub fn run(folder: &Path, seed: u64, first_number: u64) -> i32 {
    let shared = Shared {
        folder: folder.to_owned(),
        next_number: AtomicU64::new(first_number),
        is_over: AtomicBool::new(false),
    };
    std::thread::scope(|scope| {
        for thread in 0..THREADS {
            let random = Random::new(seed ^ (thread + 1) << 40);
            let mut worker =
                Worker { shared: &shared, thread, random, logs: VecDeque::new(), records_of_newest: 0 };
            scope.spawn(move || {
                if let Err(error) = worker.work() {
                    eprintln!("the writer failed: {error}");
                    std::process::exit(FAILED);
                }
            });
        }
        // An error is as good an end as any.
        let _ = io::stdin().read_to_end(&mut Vec::new());
        shared.is_over.store(true, Ordering::Relaxed);
    });
    0
}

impl Worker<'_> {
    fn work(&mut self) -> io::Result<()> {
        self.find_logs()?;
        while !self.shared.is_over.load(Ordering::Relaxed) {
            let mut begun = Vec::new();
            let mut targets = Vec::new();
            for _ in 0..1 + self.random.below(3) {
                let (number, target) = self.begin_one()?;
                begun.push(number);
                targets.push(target);
            }
            for target in targets {
                self.sync(&target)?;
            }
            begun.into_iter().try_for_each(|number| say(Line::Durable(number)))?;
        }
        Ok(())
    }

    /// The logs that earlier writers left: they are not appended to, and removed in their turn.
    fn find_logs(&mut self) -> io::Result<()> {
        let mut numbers = Vec::new();
        for entry in fs::read_dir(&self.shared.folder)? {
            let place = Place::of_file(&entry?.file_name().to_string_lossy());
            if let Some(Place::Log(number)) = place {
                numbers.extend((number % THREADS == self.thread).then_some(number));
            }
        }
        numbers.sort_unstable();
        self.logs.extend(numbers);
        self.records_of_newest = LOG_RECORDS;
        Ok(())
    }

    fn sync(&mut self, target: &Target) -> io::Result<()> {
        match target {
            Target::File(file) if self.random.once_in(2) => file.sync_data(),
            Target::File(file) => file.sync_all(),
            Target::Folder => File::open(&self.shared.folder)?.sync_all(),
        }
    }

    /// Writes one record. It is durable once the target is synced, at the latest.
    fn begin_one(&mut self) -> io::Result<(u64, Target)> {
        match self.random.below(10) {
            0..5 => self.overwrite(),
            5..7 => self.replace(),
            _ => self.append_or_remove(),
        }
    }

    fn number(&self) -> u64 {
        self.shared.next_number.fetch_add(1, Ordering::Relaxed)
    }

    fn path(&self, place: Place) -> PathBuf {
        self.shared.folder.join(place.file_name())
    }

    fn overwrite(&mut self) -> io::Result<(u64, Target)> {
        let (slot, count) = (self.random.below(SLOTS), 1 + self.random.below(SLOT_BLOCKS));
        let place = Place::Slot { file: self.thread, slot };
        let number = self.number();
        say(Line::Begin { number, place, blocks: count })?;
        let file = File::options().write(true).create(true).truncate(false).open(self.path(place))?;
        file.write_all_at(&record::blocks(number, count), slot * SLOT_BLOCKS * BLOCK_BYTES)?;
        Ok((number, Target::File(file)))
    }

    fn replace(&mut self) -> io::Result<(u64, Target)> {
        let place = Place::Whole(self.random.below(WHOLES / THREADS) * THREADS + self.thread);
        let number = self.number();
        say(Line::Begin { number, place, blocks: 0 })?;
        let path = self.path(place);
        let new = path.with_extension("new");
        let mut file = File::create(&new)?;
        file.write_all(&record::stream(number, self.random.below(WHOLE_LIMIT)))?;
        file.sync_all()?;
        fs::rename(&new, &path)?;
        Ok((number, Target::Folder))
    }

    fn append_or_remove(&mut self) -> io::Result<(u64, Target)> {
        if self.logs.len() > LOGS
            && let Some(oldest) = self.logs.pop_front()
        {
            let (number, place) = (self.number(), Place::Log(oldest));
            say(Line::Remove { number, place })?;
            fs::remove_file(self.path(place))?;
            return Ok((number, Target::Folder));
        }
        let is_full = self.records_of_newest >= LOG_RECORDS;
        if is_full {
            // A log has the number of the first record that was ever meant for it, made to name its thread.
            let log = self.number() * THREADS + self.thread;
            self.logs.push_back(log);
            self.records_of_newest = 0;
        }
        self.records_of_newest += 1;
        let place = Place::Log(*self.logs.back().expect("there is one that is not full"));
        let number = self.number();
        say(Line::Begin { number, place, blocks: 0 })?;
        let mut file = File::options().append(true).create(true).open(self.path(place))?;
        file.write_all(&record::stream(number, self.random.below(APPENDED_LIMIT)))?;
        if is_full {
            file.sync_all()?;
            return Ok((number, Target::Folder));
        }
        Ok((number, Target::File(file)))
    }
}

/// One write call for a line, so that lines of several threads don't mix. Nobody to listen is an error like others.
fn say(line: Line) -> io::Result<()> {
    io::stdout().lock().write_all(format!("{line}\n").as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_written_as_they_are_read() {
        let place = Place::Slot { file: 0, slot: 31 };
        for line in [
            Line::Begin { number: 5, place, blocks: 3 },
            Line::Remove { number: 6, place: Place::Log(4) },
            Line::Durable(7),
        ] {
            assert_eq!(line.to_string().parse(), Ok(line));
        }
        for wrong in ["", "begin", "durable", "durable x", "begin 1 nowhere 0"] {
            assert!(wrong.parse::<Line>().is_err(), "{wrong}");
        }
    }
}
