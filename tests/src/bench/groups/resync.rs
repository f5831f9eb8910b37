//! A resync of one random block in a hundred: what goes over the link, and how long it takes, against reading as many
//! random blocks from the one disk and writing them to the other.
//!
//! Both agents are in a network of their own, all of whose traffic is counted: what the bar says of frames holds for
//! everything, with acknowledgements and the headers of all layers.

use crate::bench::Bench;
use crate::bench::comparison::{Contestant, Outcome, Part, Turn};
use crate::bench::fio::{Extent, Job, Pattern, Target, measure};
use crate::bench::mirror::Mirror;
use crate::bench::network::Namespace;
use crate::bench::place::{Place, drop_cache};
use crate::bench::quantity::{Quantity, TIME, Unit};
use crate::bench::report::Wanted;
use crate::bench::statistics::ratio;
use anyhow::Result;
use blockmirror_agent::quantity::Size;

const OURS: &str = "blockmirror";
const READS: &str = "random reads";
const WRITES: &str = "random writes";
/// How many bytes the link carried for each byte that was dirty.
const CARRIED: Quantity = Quantity::new("carried / dirty", Unit::Times);

/// Measures the group, and reports it.
///
/// # Errors
/// When it can't be set up, or the bench is interrupted.
pub fn run(bench: &Bench) -> Result<()> {
    for place in bench.places()? {
        let outcome = compare(bench, &place)?;
        let about = |what: &str| format!("resync, {}: {what}", place.name());
        let (carried, times) = (outcome.table(CARRIED), outcome.table(TIME));
        bench.bar(about("bytes on the link"), "dirty bytes", Wanted::AtMost(1.05), carried.ours());
        let both = times.median(READS).zip(times.median(WRITES)).map(|(reads, writes)| reads + writes);
        let reached = times.ours().zip(both).and_then(|(ours, both)| ratio(ours, both));
        let wanted = if place.is_disk() { Wanted::AtMost(1.0) } else { Wanted::Told };
        bench.bar(about("time"), "random reads and then writes of the blocks", wanted, reached);
        place.clear()?;
    }
    Ok(())
}

fn compare(bench: &Bench, place: &Place) -> Result<Outcome> {
    let size_bytes = bench.settings.size.0 * 4;
    let dirty_bytes = size_bytes / 100 / 4096 * 4096;
    let source = place.filled("primary.img", size_bytes)?;
    let target = place.path("replica.img");
    let network = Namespace::new("resync")?;
    let (mirror, _) = Mirror::in_network(bench, place, &network, &source, &target)?;
    let job = |pattern| Job::new(pattern, 4096, 32);
    let other = place.filled("other.img", size_bytes)?;
    let disk = |pattern| -> Result<Turn> {
        drop_cache(&other)?;
        let file = Target::File { path: other.clone(), is_direct: place.is_direct };
        let measured = measure(&job(pattern), &[file], Extent::Bytes(dirty_bytes))?;
        Ok(Turn::new([(TIME, dirty_bytes as f64 / measured.speed)]))
    };
    let contestants = vec![
        Contestant::new(OURS, Part::Ours, || {
            mirror.pause()?;
            measure(&job(Pattern::RandomWrite), &[mirror.target()], Extent::Bytes(dirty_bytes))?;
            let marked = mirror.marked()?;
            let before = network.carried_bytes()?;
            let seconds = mirror.catch_up()?;
            let carried = network.carried_bytes()? - before;
            Ok(Turn::new([(TIME, seconds), (CARRIED, carried as f64 / marked as f64)]))
        }),
        Contestant::new(READS, Part::Limit, || disk(Pattern::RandomRead)),
        Contestant::new(WRITES, Part::Limit, || disk(Pattern::RandomWrite)),
    ];
    let work = format!("{} of {} in random blocks of 4 KiB", Size(dirty_bytes), Size(size_bytes));
    bench.compare("resync", place.name(), work, contestants)
}
