//! The one order of writes on a primary (W1), from one start of its agent to the next.

use super::disk::{Data, Disk, Value, put};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::Sequence;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

/// What a primary wrote, in its one order.
#[derive(Debug, Default)]
pub struct History {
    base: BTreeMap<u64, Value>,
    writes: BTreeMap<Sequence, Vec<(ByteRange, Data)>>,
    /// The content after all writes up to one.
    folded: (Sequence, BTreeMap<u64, Value>),
    /// What sectors have come back to when a sync failed.
    lost: BTreeMap<u64, BTreeSet<Value>>,
}

impl History {
    /// A life that begins with this content.
    #[must_use]
    pub fn new(base: BTreeMap<u64, Value>) -> Self {
        Self { folded: (Sequence(0), base.clone()), base, ..Self::default() }
    }

    /// A write, or what a failed one left, has this place in the order.
    pub fn record(&mut self, sequence: Sequence, range: ByteRange, data: Data) {
        self.writes.entry(sequence).or_default().push((range, data));
        if sequence <= self.folded.0 {
            self.folded = (Sequence(0), self.base.clone());
        }
    }

    /// A failed sync has given these sectors older values, which copies may have from now on: a replica that has the
    /// writes holds more than its primary.
    pub fn lost(&mut self, sectors: Vec<u64>, disk: &Disk) {
        for sector in sectors {
            self.lost.entry(sector).or_default().insert(disk.value(sector));
        }
    }

    /// What sectors may hold in a copy although they were written since.
    #[must_use]
    pub fn losses(&self) -> &BTreeMap<u64, BTreeSet<Value>> {
        &self.lost
    }

    /// The content after this write.
    pub fn content_at(&mut self, sequence: Sequence) -> &BTreeMap<u64, Value> {
        if sequence < self.folded.0 {
            self.folded = (Sequence(0), self.base.clone());
        }
        let (from, content) = &mut self.folded;
        let later = (Bound::Excluded(*from), Bound::Included(sequence));
        if sequence > *from {
            for (range, data) in self.writes.range(later).flat_map(|(_, writes)| writes) {
                put(content, *range, data);
            }
        }
        *from = sequence;
        content
    }
}
