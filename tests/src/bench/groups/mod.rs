//! The groups of comparisons: each is a row of bars.

mod copy;
mod devices;
mod growth;
mod latency;
mod memory;
mod rebuild;
mod replica;
mod resync;
mod sync;
mod volumes;
mod wan;
mod zeroes;

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

const fn group(name: &'static str, about: &'static str, run: fn(&Bench) -> Result<()>) -> Group {
    Group { name, about, run }
}

/// All groups, in their order.
pub const ALL: &[Group] = &[
    group("nbd", "the NBD front end, without a replica", devices::nbd),
    group("loop", "the loop device, without a replica", devices::loops),
    group("replica", "writing with one asynchronous replica on this machine", replica::run),
    group("sync", "flushes and writes in mode sync", sync::run),
    group("copy", "initial sync and recover of random data", copy::run),
    group("rebuild", "another disk for a primary: served, read and filled", rebuild::run),
    group("zeroes", "first sync of a sparse volume", zeroes::run),
    group("resync", "resync of random blocks: bytes on the link, and time", resync::run),
    group("memory", "resident memory of the primary", memory::run),
    group("volumes", "a hundred idle volumes", volumes::run),
    group("growth", "how costs grow with sizes", growth::run),
    group("wan", "first sync over a long-distance link", wan::run),
    group("latency", "what applications feel of a resync", latency::run),
];

/// Their names, for the command line.
#[must_use]
pub fn names() -> PossibleValuesParser {
    ALL.iter().map(|group| group.name).collect::<Vec<_>>().into()
}
