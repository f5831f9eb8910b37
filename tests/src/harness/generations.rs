//! Every generation that was begun, whether or not a lineage still names it: what hosts can no longer tell of their
//! histories, the model can.

use blockmirror_protocol::units::GenerationId;
use std::collections::{BTreeMap, BTreeSet};

/// All generations that were begun, by their names.
#[derive(Debug, Default)]
pub struct Generations(BTreeMap<GenerationId, Begun>);

#[derive(Debug)]
struct Begun {
    /// The newest generation of the host that began it.
    after: Option<GenerationId>,
    /// The life of the primary in which it was begun; none where nothing is answered in it.
    life: Option<(usize, u64)>,
}

impl Generations {
    /// A host with this lineage begins a generation.
    pub fn begin(&mut self, generation: GenerationId, lineage: &[GenerationId], life: Option<(usize, u64)>) {
        self.0.insert(generation, Begun { after: lineage.first().copied(), life });
    }

    /// Whether it was begun by anybody.
    #[must_use]
    pub fn is_known(&self, generation: GenerationId) -> bool {
        self.0.contains_key(&generation)
    }

    /// A generation, and all that it came after, newest first.
    fn history(&self, newest: GenerationId) -> impl Iterator<Item = GenerationId> + '_ {
        std::iter::successors(Some(newest), |generation| self.0.get(generation)?.after)
    }

    /// Whether whoever is at the one generation has been through the other.
    #[must_use]
    pub fn contains(&self, newest: GenerationId, older: GenerationId) -> bool {
        self.history(newest).any(|generation| generation == older)
    }

    /// The lives of primaries that whoever is at this generation knows of.
    #[must_use]
    pub fn lives(&self, newest: Option<GenerationId>) -> BTreeSet<(usize, u64)> {
        let history = newest.into_iter().flat_map(|newest| self.history(newest));
        history.filter_map(|generation| self.0.get(&generation)?.life).collect()
    }
}
