//! A host's metadata files: pages of bytes that a crash may tear in units of 512 bytes.
//!
//! What is written goes through the protocol's real encoders, and comes back through its real decoders.

use super::random::Random;
use blockmirror_protocol::dirty_map::MapChanges;
use blockmirror_protocol::disk::{PAGE_BYTES, Page};
use std::collections::{BTreeMap, VecDeque};

const TORN_BYTES: usize = 512;

/// Names a write of metadata under way.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct FileOperation(pub u64);

/// Pages to write at once, by their offset; none for a hole.
pub type Batch = Vec<(u64, Option<Box<Page>>)>;

/// The batches of a map's changes: pages and holes, then the header.
#[must_use]
pub fn batches_of_map(changes: MapChanges) -> VecDeque<Batch> {
    let pages = changes.pages.into_iter().map(|(offset, page)| (offset, Some(page)));
    let holes = changes.holes.iter().flat_map(|hole| (hole.offset..hole.end()).step_by(PAGE_BYTES));
    let holes = holes.map(|offset| (offset, None));
    let header = changes.header.into_iter().map(|(offset, page)| (offset, Some(page)));
    let batches: [Batch; 2] = [pages.chain(holes).collect(), header.collect()];
    batches.into_iter().filter(|batch| !batch.is_empty()).collect()
}

/// What is left to do of a write after a step.
#[derive(Debug, PartialEq, Eq)]
pub enum Step {
    /// Another batch follows.
    More,
    /// It has ended, well or not.
    Done(bool),
}

/// The files of one host, by name.
#[derive(Clone, Debug, Default)]
pub struct Files {
    files: BTreeMap<String, BTreeMap<u64, Page>>,
    changes: u64,
    running: BTreeMap<FileOperation, (String, VecDeque<Batch>)>,
}

impl Files {
    /// Raised with each change of any file.
    #[must_use]
    pub fn changes(&self) -> u64 {
        self.changes
    }

    /// Begins a durable write of some batches, one after the other.
    pub fn write(&mut self, id: FileOperation, name: &str, batches: VecDeque<Batch>) {
        self.running.insert(id, (name.into(), batches));
    }

    /// Writes one page at once, durably.
    pub fn write_now(&mut self, name: &str, offset: u64, page: &Page) {
        self.changes += 1;
        self.files.entry(name.into()).or_default().insert(offset, *page);
    }

    /// Removes a file; what is being written to it goes nowhere.
    pub fn remove(&mut self, name: &str) {
        self.changes += 1;
        self.files.remove(name);
        self.running.values_mut().filter(|(running, _)| running == name).for_each(|(running, _)| {
            "removed".clone_into(running);
        });
    }

    /// The offsets of a file's pages that hold data.
    #[must_use]
    pub fn offsets(&self, name: &str) -> Vec<u64> {
        let pages = self.files.get(name).into_iter().flatten();
        pages.filter(|(_, page)| page.iter().any(|byte| *byte != 0)).map(|(offset, _)| *offset).collect()
    }

    /// Bits of a page change by themselves.
    pub fn flip(&mut self, name: &str, offset: u64, byte: usize, bits: u8) {
        self.changes += 1;
        self.files.entry(name.into()).or_default().entry(offset).or_insert([0; PAGE_BYTES])[byte] ^= bits;
    }

    /// The names of all files.
    #[must_use]
    pub fn names(&self) -> Vec<String> {
        self.files.keys().cloned().collect()
    }

    /// Ends the next batch of a write, unless a crash ended it before. One that fails is done in part.
    pub fn step(&mut self, id: FileOperation, fails: bool, random: &mut Random) -> Option<Step> {
        let (name, batches) = self.running.get_mut(&id)?;
        let batch = batches.pop_front().unwrap_or_default();
        self.changes += 1;
        let file = self.files.entry(name.clone()).or_default();
        if fails {
            tear(file, &batch, random);
        } else {
            for (offset, page) in batch {
                file.insert(offset, page.map_or([0; PAGE_BYTES], |page| *page));
            }
        }
        if !fails && !batches.is_empty() {
            return Some(Step::More);
        }
        self.running.remove(&id);
        Some(Step::Done(!fails))
    }

    /// Crashes the host: of each write that is under way, any part is there.
    pub fn crash(&mut self, random: &mut Random) {
        self.changes += 1;
        for (name, mut batches) in std::mem::take(&mut self.running).into_values() {
            if let Some(batch) = batches.pop_front() {
                tear(self.files.entry(name).or_default(), &batch, random);
            }
        }
    }

    /// The first bytes of a file.
    #[must_use]
    pub fn bytes(&self, name: &str, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        for (offset, page) in self.files.get(name).into_iter().flatten() {
            if let Some(place) = bytes.get_mut(*offset as usize..*offset as usize + PAGE_BYTES) {
                place.copy_from_slice(page);
            }
        }
        bytes
    }

    /// The pages of a file from `offset` on that hold data, by their number from there.
    #[must_use]
    pub fn pages_from(&self, name: &str, offset: u64) -> Vec<(u64, Box<Page>)> {
        let pages = self.files.get(name).into_iter().flat_map(|file| file.range(offset..));
        let held = pages.filter(|(_, page)| page.iter().any(|byte| *byte != 0));
        held.map(|(at, page)| ((at - offset) / PAGE_BYTES as u64, Box::new(*page))).collect()
    }
}

fn tear(file: &mut BTreeMap<u64, Page>, batch: &Batch, random: &mut Random) {
    for (offset, new) in batch {
        let manner = random.below(3);
        let page = file.entry(*offset).or_insert([0; PAGE_BYTES]);
        for start in (0..PAGE_BYTES).step_by(TORN_BYTES) {
            if manner == 0 || manner == 1 && random.once_in(2) {
                let part = start..start + TORN_BYTES;
                match new {
                    Some(new) => page[part.clone()].copy_from_slice(&new[part]),
                    None => page[part].fill(0),
                }
            }
        }
    }
}
