//! How to measure, as the command line says.

use super::groups;
use super::place::PlaceKind;
use blockmirror_agent::quantity::Size;
use clap::Parser;
use std::path::PathBuf;

/// Measures Blockmirror and its peers, in turns, on this machine. Needs root.
#[derive(Clone, Debug, Parser)]
#[command(name = "scripts/bench")]
pub struct Settings {
    /// How many turns each contestant has
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub turns: u16,
    /// How long a turn of fio takes
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(1..))]
    pub seconds: u64,
    /// Run these groups only
    #[arg(long, value_name = "GROUP", value_delimiter = ',', value_parser = groups::names())]
    pub only: Vec<String>,
    /// Measure there only; by default at both
    #[arg(long)]
    pub place: Option<PlaceKind>,
    /// The size of volumes that are written to
    #[arg(long, default_value = "1G")]
    pub size: Size,
    /// Measure an earlier release beside this one, in the groups nbd, replica and sync: the folder with its programs
    #[arg(long, value_name = "FOLDER")]
    pub before: Option<PathBuf>,
    /// Where backings on the disk are made
    #[arg(long, value_name = "FOLDER", default_value = "target/bench")]
    pub folder: PathBuf,
    /// Where all values are written to
    #[arg(long, value_name = "FILE", default_value = "target/bench/bench.json")]
    pub json: PathBuf,
    /// How many dirty blocks the longest resync of the group `growth` has
    #[arg(long, value_name = "COUNT", default_value_t = 1_000_000)]
    pub most_dirty: u64,
    /// Say which groups there are, and do nothing else
    #[arg(long)]
    pub list: bool,
}

impl Settings {
    /// Whether a group was asked for.
    #[must_use]
    pub fn wants(&self, group: &str) -> bool {
        self.only.is_empty() || self.only.iter().any(|only| only == group)
    }
}
