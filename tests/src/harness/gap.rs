//! The pre-images of a replica: what it can be rolled back to in gap mode (P2), and what an undo brings back (L6).

use super::disk::{Disk, Value, sectors};
use super::mirror::Image;
use blockmirror_protocol::disk::superblock::Superblock;
use blockmirror_protocol::layers::{Catalog, LayerId};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::{GenerationId, Position};
use std::collections::{BTreeMap, BTreeSet};

/// One layer as the host's disk holds it: what sectors held when they were saved.
#[derive(Clone, Debug)]
pub struct Layer {
    /// Its name.
    pub name: LayerId,
    /// The ranges that were saved, in order.
    pub saved: Vec<ByteRange>,
    contents: BTreeMap<u64, Value>,
}

impl Layer {
    /// An empty layer.
    #[must_use]
    pub fn new(name: LayerId) -> Self {
        Self { name, saved: Vec::new(), contents: BTreeMap::new() }
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

/// The layers of a host, by their name.
#[derive(Clone, Debug, Default)]
pub struct Layers(BTreeMap<LayerId, Layer>);

impl Layers {
    /// Makes an empty layer.
    pub fn begin(&mut self, layer: LayerId) {
        self.0.insert(layer, Layer::new(layer));
    }

    /// Removes a layer.
    pub fn end(&mut self, layer: LayerId) {
        self.0.remove(&layer);
    }

    /// Removes all layers that the catalog does not name.
    pub fn keep(&mut self, catalog: &Catalog) {
        self.0.retain(|layer, _| catalog.contains(*layer));
    }

    /// A layer.
    ///
    /// # Panics
    /// When there is none of this name.
    #[must_use]
    pub fn get(&self, layer: LayerId) -> &Layer {
        self.0.get(&layer).unwrap_or_else(|| panic!("P2: there is no layer {layer}"))
    }

    /// The ranges of a layer, if there is one.
    #[must_use]
    pub fn saved(&self, layer: Option<LayerId>) -> Vec<ByteRange> {
        layer.map_or_else(Vec::new, |layer| self.get(layer).saved.clone())
    }

    /// Saves what ranges held in every layer.
    pub fn save(&mut self, ranges: &[ByteRange], contents: &BTreeMap<u64, Value>) {
        for layer in self.0.values_mut() {
            layer.save(ranges.to_vec(), contents.clone());
        }
    }
}

/// What a history leads back to (L6).
#[derive(Clone, Debug)]
pub struct HistoryPoint {
    /// The layer.
    pub layer: LayerId,
    /// The generations of that time.
    pub lineage: Vec<GenerationId>,
    /// The position of that time.
    pub position: Position,
    /// Lives of primaries in which something was answered that the copy knew of.
    pub known_lives: BTreeSet<(usize, u64)>,
    /// What sectors may have held.
    possible: BTreeMap<u64, BTreeSet<Value>>,
}

impl HistoryPoint {
    /// The point that a layer leads back to, now.
    #[must_use]
    pub fn now(disk: &Disk, layer: &Layer, superblock: &Superblock, lives: &BTreeSet<(usize, u64)>) -> Self {
        let touched = disk.touched().into_iter().chain(layer.contents.keys().copied());
        let possible = touched.map(|sector| (sector, values(disk, layer, sector)));
        Self {
            layer: layer.name,
            lineage: superblock.lineage.clone(),
            position: superblock.position,
            known_lives: lives.clone(),
            possible: possible.collect(),
        }
    }

    /// What sectors may have held.
    #[must_use]
    pub fn possible(&self) -> &BTreeMap<u64, BTreeSet<Value>> {
        &self.possible
    }

    /// Something else wrote to a sector of the disk that the layer doesn't restore.
    pub fn something_else_wrote(&mut self, sector: u64, value: Value) {
        self.possible.insert(sector, BTreeSet::from([value]));
    }

    /// Checks that restoring gives what was there, also after a power loss.
    ///
    /// # Panics
    /// When it might not.
    pub fn check(&self, disk: &Disk, layer: &Layer, host: usize) {
        let zero = BTreeSet::from([0]);
        let touched = disk.touched().into_iter().chain(self.possible.keys().copied());
        for sector in touched.filter(|sector| !disk.is_rotten(*sector)) {
            let legal = self.possible.get(&sector).unwrap_or(&zero);
            let found = values(disk, layer, sector);
            assert!(
                found.is_subset(legal),
                "L6: sector {sector} of host {host} may be {found:?} after an undo; it was one of {legal:?}"
            );
        }
    }
}

/// What a sector may hold when a layer is restored.
fn values(disk: &Disk, layer: &Layer, sector: u64) -> BTreeSet<Value> {
    match layer.value(sector) {
        Some(value) => BTreeSet::from([value]),
        None => disk.possible(sector).into_iter().collect(),
    }
}

/// The image at the rollback point of a gap.
#[derive(Clone, Debug)]
pub struct RollbackPoint {
    /// The layer that leads back to it.
    pub layer: LayerId,
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
