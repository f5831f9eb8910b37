//! The pre-images of a replica in gap mode: what it can be rolled back to (P2).

use super::disk::{Disk, Value, sectors};
use super::mirror::Image;
use blockmirror_protocol::ranges::ByteRange;
use std::collections::BTreeMap;

/// One layer as the host's disk holds it: what sectors held when they were saved.
#[derive(Clone, Debug, Default)]
pub struct Layer {
    /// Its number.
    pub number: u64,
    /// The ranges that were saved, in order.
    pub saved: Vec<ByteRange>,
    contents: BTreeMap<u64, Value>,
}

impl Layer {
    /// An empty layer.
    #[must_use]
    pub fn new(number: u64) -> Self {
        Self { number, ..Self::default() }
    }

    /// Saves what ranges held; the first pre-image of a sector counts.
    pub fn save(&mut self, ranges: Vec<ByteRange>, contents: BTreeMap<u64, Value>) {
        for (sector, value) in contents {
            if !self.has(sector) {
                self.contents.insert(sector, value);
            }
        }
        self.saved.extend(ranges);
    }

    /// What a sector held, if it was saved.
    #[must_use]
    pub fn value(&self, sector: u64) -> Option<Value> {
        self.has(sector).then(|| self.contents.get(&sector).copied().unwrap_or_default())
    }

    /// What was saved: ranges and what their sectors held that was not zero.
    pub fn contents(&self) -> impl Iterator<Item = (ByteRange, Vec<(u64, Value)>)> + '_ {
        self.saved.iter().map(|range| {
            let held = self.contents.range(sectors(*range)).map(|(sector, value)| (*sector, *value));
            (*range, held.collect())
        })
    }

    fn has(&self, sector: u64) -> bool {
        self.saved.iter().any(|range| sectors(*range).contains(&sector))
    }
}

/// The image at the rollback point of a gap.
#[derive(Debug)]
pub struct RollbackPoint {
    /// The layer that leads back to it.
    pub layer: u64,
    /// What is legal there.
    pub image: Image,
}

impl RollbackPoint {
    /// Checks that rolling back after a power loss at this moment gives a legal image (P1, P2).
    ///
    /// # Panics
    /// When it might not.
    pub fn check(&mut self, disk: &Disk, layer: &Layer, host: usize) {
        self.image.check_with(disk, host, |sector| layer.value(sector));
    }

    /// The same, where the disk has changed.
    ///
    /// # Panics
    /// When it might not.
    pub fn check_changed(&mut self, disk: &Disk, layer: &Layer, changed: &[u64], host: usize) {
        self.image.check_changed_with(disk, changed, host, |sector| layer.value(sector));
    }
}
