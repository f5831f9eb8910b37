//! The catalog of a copy's layers of pre-images: which there are, and what each is for.
//!
//! A layer leads back to what the backing held when it was begun. It is kept for as long as it has a purpose:
//!
//! - *rollback*: a resync goes on, and the content is a mixture until its commit (P2);
//! - *undo*: what this host had before its content was given up (L6).
//!
//! One layer may have both. A purpose that this release does not know is one that a later release gave: such a layer is
//! neither opened nor removed here, and stays in the catalog. There are always two places more than such layers, so that any
//! release can begin one to roll back to and one for an undo.
//!
//! The catalog is a part of the superblock, so a layer gets and loses its purpose in the same durable write that says what
//! the content is. A crash before that write leaves a file that no entry names; it is removed at the next start, or the next layer takes its number.

use std::num::NonZeroU64;

/// How many layers a copy has at most.
pub const LAYERS_LIMIT: usize = 8;

/// How many of them may have a purpose that this release does not know.
const LATER_LIMIT: usize = LAYERS_LIMIT - Purpose::ALL.len();

/// Names a layer of a copy. Numbers grow, and none is given twice to layers that had a purpose.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct LayerId(NonZeroU64);

impl LayerId {
    /// The layer of this number; 0 names none.
    #[must_use]
    pub fn new(number: u64) -> Option<Self> {
        NonZeroU64::new(number).map(Self)
    }

    /// Its number.
    #[must_use]
    pub fn number(self) -> u64 {
        self.0.get()
    }
}

impl std::fmt::Display for LayerId {
    fn fmt(&self, to: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0.fmt(to)
    }
}

/// What a layer is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// It leads a mixture back to the last legal image (P2).
    Rollback,
    /// It brings back what this host had before its content was given up (L6).
    Undo,
}

impl Purpose {
    /// All that this release knows.
    pub const ALL: [Self; 2] = [Self::Rollback, Self::Undo];

    /// Its bit among a layer's purposes, on disk too.
    const fn bit(self) -> u32 {
        match self {
            Self::Rollback => 1,
            Self::Undo => 2,
        }
    }
}

/// A layer and its purposes, as the superblock lists it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Entry {
    pub layer: LayerId,
    /// A bit for each purpose, and those of later releases.
    pub purposes: u32,
    /// Whether an undo brings back what something else wrote (X4).
    pub is_touched: bool,
}

/// The layers of a copy.
#[derive(Clone, PartialEq, Eq, Default, Debug)]
pub struct Catalog {
    /// The number of the last layer that had a purpose.
    last: u64,
    /// At most [`LAYERS_LIMIT`], of which [`LATER_LIMIT`] at most have a purpose that is not known; each has a purpose, and each
    /// purpose that is known is that of one layer at most.
    entries: Vec<Entry>,
}

impl Catalog {
    /// The catalog of a copy that has begun so many layers, of which these are there still.
    #[must_use]
    pub fn new(last: u64, rollback: Option<LayerId>, undo: Option<LayerId>) -> Self {
        let mut catalog = Self { last, entries: Vec::new() };
        catalog.set(Purpose::Rollback, rollback);
        catalog.set(Purpose::Undo, undo);
        catalog
    }

    /// The catalog as it was recorded; nothing where it contradicts itself.
    pub(crate) fn recorded(last: u64, entries: Vec<Entry>) -> Option<Self> {
        let known = Purpose::ALL.iter().fold(0, |all, purpose| all | purpose.bit());
        let is_sound = |(place, entry): (usize, &Entry)| {
            let others = || entries[..place].iter();
            entry.purposes != 0
                && entry.layer.number() <= last
                && others().all(|other| other.layer != entry.layer)
                && others().all(|other| other.purposes & entry.purposes & known == 0)
        };
        let later = entries.iter().filter(|entry| entry.purposes & !known != 0).count();
        let sound = later <= LATER_LIMIT && entries.iter().enumerate().all(is_sound);
        sound.then_some(Self { last, entries })
    }

    /// The number of the last layer that had a purpose; 0 where none had.
    #[must_use]
    pub fn last(&self) -> u64 {
        self.last
    }

    pub(crate) fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// What the next layer is called.
    ///
    /// # Panics
    /// After 2⁶⁴ layers.
    #[must_use]
    pub fn next(&self) -> LayerId {
        LayerId::new(self.last.checked_add(1).expect("layers are begun one after the other"))
            .expect("it is not 0")
    }

    /// The layer of this purpose.
    #[must_use]
    pub fn of(&self, purpose: Purpose) -> Option<LayerId> {
        self.entry(purpose).map(|entry| entry.layer)
    }

    /// The layer that leads a mixture back, while a resync goes on (P2).
    #[must_use]
    pub fn rollback(&self) -> Option<LayerId> {
        self.of(Purpose::Rollback)
    }

    /// The layer that keeps what this host had before its content was given up (L6).
    #[must_use]
    pub fn undo(&self) -> Option<LayerId> {
        self.of(Purpose::Undo)
    }

    /// Whether a layer has a purpose, be it one that this release does not know.
    #[must_use]
    pub fn contains(&self, layer: LayerId) -> bool {
        self.entries.iter().any(|entry| entry.layer == layer)
    }

    /// The layers with a purpose that this release knows, each once.
    pub fn known(&self) -> impl Iterator<Item = LayerId> + '_ {
        let is_known =
            |entry: &&Entry| Purpose::ALL.iter().any(|purpose| entry.purposes & purpose.bit() != 0);
        self.entries.iter().filter(is_known).map(|entry| entry.layer)
    }

    /// The layers that nobody needs once all purposes are given up that this release knows.
    #[must_use]
    pub fn of_known_purposes_alone(&self) -> Vec<LayerId> {
        let mut without = self.clone();
        Purpose::ALL.into_iter().for_each(|purpose| without.set(purpose, None));
        self.known().filter(|layer| !without.contains(*layer)).collect()
    }

    /// From now on this layer is the one of this purpose, or none is. Whichever had it loses it.
    pub fn set(&mut self, purpose: Purpose, layer: Option<LayerId>) {
        if self.of(purpose) == layer {
            return;
        }
        for entry in &mut self.entries {
            if entry.purposes & purpose.bit() != 0 {
                entry.purposes &= !purpose.bit();
                entry.is_touched &= purpose != Purpose::Undo;
            }
        }
        self.entries.retain(|entry| entry.purposes != 0);
        let Some(layer) = layer else { return };
        self.last = self.last.max(layer.number());
        match self.entries.iter_mut().find(|entry| entry.layer == layer) {
            Some(entry) => entry.purposes |= purpose.bit(),
            None => {
                assert!(
                    self.entries.len() < LAYERS_LIMIT,
                    "two places are left for the purposes that are known"
                );
                self.entries.push(Entry { layer, purposes: purpose.bit(), is_touched: false });
            }
        }
    }

    /// The layer has no purpose any more, as far as this release knows them.
    pub fn give_up(&mut self, layer: LayerId) {
        for purpose in Purpose::ALL {
            if self.of(purpose) == Some(layer) {
                self.set(purpose, None);
            }
        }
    }

    /// Whether an undo brings back what something else wrote (X4).
    #[must_use]
    pub fn is_undo_touched(&self) -> bool {
        self.entry(Purpose::Undo).is_some_and(|entry| entry.is_touched)
    }

    /// An undo brings back what something else wrote; nothing where there is none.
    pub(crate) fn touch_undo(&mut self) {
        let undo = self.entries.iter_mut().find(|entry| entry.purposes & Purpose::Undo.bit() != 0);
        undo.into_iter().for_each(|entry| entry.is_touched = true);
    }

    fn entry(&self, purpose: Purpose) -> Option<&Entry> {
        self.entries.iter().find(|entry| entry.purposes & purpose.bit() != 0)
    }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::{Catalog, LayerId};

    /// The layer of this number.
    pub(crate) fn layer(number: u64) -> LayerId {
        LayerId::new(number).expect("layers are counted from 1")
    }

    /// A catalog with the layers of these numbers to roll back to and for an undo; 0 for none.
    pub(crate) fn catalog(rollback: u64, undo: u64) -> Catalog {
        Catalog::new(rollback.max(undo), LayerId::new(rollback), LayerId::new(undo))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(number: u64) -> Option<LayerId> {
        LayerId::new(number)
    }

    #[test]
    fn a_layer_is_there_as_long_as_it_has_a_purpose() {
        let mut catalog = Catalog::default();
        assert_eq!(Some(catalog.next()), layer(1));
        catalog.set(Purpose::Rollback, layer(1));
        catalog.set(Purpose::Undo, layer(1));
        assert_eq!((catalog.rollback(), catalog.undo(), catalog.known().count()), (layer(1), layer(1), 1));
        catalog.touch_undo();
        catalog.set(Purpose::Rollback, None);
        assert_eq!((catalog.rollback(), catalog.undo(), catalog.is_undo_touched()), (None, layer(1), true));
        catalog.set(Purpose::Undo, layer(2));
        assert!(!catalog.contains(LayerId::new(1).unwrap()) && !catalog.is_undo_touched());
        catalog.give_up(LayerId::new(2).unwrap());
        assert_eq!((catalog.entries().len(), catalog.last()), (0, 2));
        assert_eq!(Some(catalog.next()), layer(3), "no number is given twice");
    }

    #[test]
    fn what_a_later_release_keeps_a_layer_for_stays() {
        let entry =
            |number, purposes| Entry { layer: LayerId::new(number).unwrap(), purposes, is_touched: false };
        let mut catalog = Catalog::recorded(9, vec![entry(4, 4), entry(5, 2 | 8), entry(6, 4)]).unwrap();
        assert_eq!((catalog.undo(), catalog.known().count()), (layer(5), 1));
        assert_eq!(catalog.of_known_purposes_alone(), []);
        catalog.set(Purpose::Undo, None);
        catalog.set(Purpose::Rollback, layer(10));
        catalog.give_up(LayerId::new(10).unwrap());
        assert_eq!(catalog.entries(), [entry(4, 4), entry(5, 8), entry(6, 4)]);
    }

    /// A catalog with no room for a way back would have ended the process at the next resync.
    #[test]
    fn there_is_room_for_a_way_back_however_much_a_later_release_keeps() {
        let later = (1..=6).map(|number| {
            let layer = LayerId::new(number).unwrap();
            Entry { layer, purposes: if number < 3 { 4 | 1 << (number - 1) } else { 4 }, is_touched: false }
        });
        let mut catalog = Catalog::recorded(9, later.collect()).unwrap();
        catalog.set(Purpose::Undo, layer(10));
        catalog.set(Purpose::Rollback, layer(11));
        assert_eq!((catalog.undo(), catalog.rollback()), (layer(10), layer(11)));
        assert_eq!(catalog.entries().len(), LAYERS_LIMIT);
        assert_eq!(Catalog::recorded(11, catalog.entries().to_vec()), Some(catalog));
    }

    #[test]
    fn a_catalog_that_contradicts_itself_is_none() {
        let entry =
            |number, purposes| Entry { layer: LayerId::new(number).unwrap(), purposes, is_touched: false };
        for (last, entries) in [
            (9, vec![entry(1, 0)]),
            (9, vec![entry(10, 1)]),
            (9, vec![entry(1, 1), entry(1, 2)]),
            (9, vec![entry(1, 1), entry(2, 3)]),
            (9, (1..=7).map(|number| entry(number, 4)).collect()),
            (9, (1..=7).map(|number| entry(number, if number == 1 { 5 } else { 4 })).collect()),
        ] {
            assert_eq!(Catalog::recorded(last, entries.clone()), None, "{entries:?}");
        }
    }
}
