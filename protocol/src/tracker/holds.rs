//! Ranges that are held for a compare: writes to them wait until both sides' digests are of one position.

use super::Follower;
use crate::ranges::ByteRange;
use std::collections::HashMap;

/// A step of a compare that holds a range.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Hold {
    /// For whom.
    pub follower: Follower,
    /// Which step of its compare.
    pub number: u64,
    /// What is held.
    pub range: ByteRange,
}

/// The holds that are under way, each by a name of its own. There is one step of a compare for a peer at a time, and so
/// few holds.
#[derive(Debug, Default)]
pub(super) struct Holds {
    held: HashMap<u64, Hold>,
    next: u64,
}

impl Holds {
    /// Begins one, and gives its name.
    pub fn begin(&mut self, hold: Hold) -> u64 {
        let name = self.next;
        self.next += 1;
        self.held.insert(name, hold);
        name
    }

    /// The one of this name.
    ///
    /// # Panics
    /// When it has ended.
    pub fn of(&self, name: u64) -> Hold {
        self.held[&name]
    }

    /// Ends the one of this name.
    ///
    /// # Panics
    /// When it has ended.
    pub fn end(&mut self, name: u64) -> Hold {
        self.held.remove(&name).expect("a held range is read once")
    }
}
