//! Zeroes and holes: a sparse volume with data in one place of a hundred, against a volume that is only that data.

use crate::bench::Bench;
use crate::bench::comparison::{Contestant, Part, Turn};
use crate::bench::mirror::Mirror;
use crate::bench::place::scatter;
use crate::bench::quantity::TIME;
use crate::bench::report::Wanted;
use anyhow::Result;
use blockmirror_agent::quantity::Size;

const DENSE: &str = "the data alone";
/// How much data there is in one place, in bytes.
const PIECE_BYTES: u64 = 1 << 20;

/// Measures the group, and reports it.
///
/// # Errors
/// When it can't be set up, or the bench is interrupted.
pub fn run(bench: &Bench) -> Result<()> {
    for place in bench.places()? {
        let size_bytes = bench.settings.size.0 * 16;
        let step = PIECE_BYTES * 100;
        let data_bytes = size_bytes.div_ceil(step) * PIECE_BYTES;
        let sparse = place.sparse("sparse.img", size_bytes)?;
        scatter(&sparse, usize::try_from(PIECE_BYTES)?, (0..size_bytes).step_by(usize::try_from(step)?))?;
        let dense = place.filled("dense.img", data_bytes)?;
        let sync = |source| {
            let (_, times) = Mirror::new(bench, &place, source, &place.path("replica.img"))?;
            Ok(Turn::new([(TIME, times.synced)]))
        };
        let contestants = vec![
            Contestant::new("sparse", Part::Ours, || sync(&sparse)),
            Contestant::new(DENSE, Part::Limit, || sync(&dense)),
        ];
        let work = format!("first sync of {} with {} of data", Size(size_bytes), Size(data_bytes));
        let outcome = bench.compare("zeroes", place.name(), work, contestants)?;
        let about = format!("zeroes, {}: first sync", place.name());
        bench.bar(
            about,
            "a volume of the data alone",
            Wanted::AtMost(1.1),
            outcome.table(TIME).ratio_to(DENSE),
        );
        place.clear()?;
    }
    Ok(())
}
