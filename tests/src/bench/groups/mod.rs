//! The groups of comparisons: each is a row of bars.

mod copy;
mod devices;

use super::Bench;
use anyhow::Result;
use clap::builder::PossibleValuesParser;

/// A group.
pub struct Group {
    /// What it is called on the command line.
    pub name: &'static str,
    /// What it measures.
    pub about: &'static str,
    /// Measures it.
    pub run: fn(&Bench) -> Result<()>,
}

/// All groups, in their order.
pub const ALL: &[Group] = &[
    Group { name: "nbd", about: "the NBD front end, without a replica", run: devices::nbd },
    Group { name: "loop", about: "the loop device, without a replica", run: devices::loops },
    Group { name: "copy", about: "initial sync and recover of random data", run: copy::run },
];

/// Their names, for the command line.
#[must_use]
pub fn names() -> PossibleValuesParser {
    ALL.iter().map(|group| group.name).collect::<Vec<_>>().into()
}
