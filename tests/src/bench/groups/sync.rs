//! Mode sync: what a flush costs that is answered when the replica is durable, too, and what a plain write costs, which
//! waits for a round trip and for no remote disk.
//!
//! The parts that it is made of are measured in the same turns: a write and a flush of a file on this disk, the same of
//! two files at once, since both copies are on one disk here, and the transport's round trip by raw quinn.

use crate::bench::comparison::{Contestant, Outcome, Part, Turn};
use crate::bench::fio::{Extent, Job, Measured, Pattern, Target, measure};
use crate::bench::mirror::Mirror;
use crate::bench::place::Place;
use crate::bench::quantity::{Quantity, Unit};
use crate::bench::quic::RawQuic;
use crate::bench::report::Wanted;
use crate::bench::statistics::{Summary, ratio};
use crate::bench::{BEFORE, Bench};
use anyhow::{Context, Result};
use std::path::PathBuf;

const OURS: &str = "mode sync";
const ASYNC: &str = "mode async";
const LOCAL: &str = "the file";
const BOTH: &str = "both files at once";
const PING: &str = "raw quinn";

const FLUSH: Quantity = Quantity::new("flush p50", Unit::Seconds);
const WRITE: Quantity = Quantity::new("write p50", Unit::Seconds);
const ROUND_TRIP: Quantity = Quantity::new("round trip p50", Unit::Seconds);
const PINGS: usize = 2000;

/// Measures the group, and reports it.
///
/// # Errors
/// When ours can't be set up, or the bench is interrupted.
pub fn run(bench: &Bench) -> Result<()> {
    for place in bench.places()? {
        let outcome = compare(bench, &place)?;
        bars(bench, &place, &outcome);
        place.clear()?;
    }
    Ok(())
}

/// One write at a time, each followed by a flush.
fn flushes() -> Job {
    Job { flushes: true, ..Job::new(Pattern::RandomWrite, 4 << 10, 1) }
}

fn turn(measured: &Measured) -> Turn {
    Turn::new([(FLUSH, measured.flush_p50)])
}

fn compare(bench: &Bench, place: &Place) -> Result<Outcome> {
    let (size_bytes, extent) = (bench.settings.size.0, Extent::Seconds(bench.settings.seconds));
    let source = place.filled("primary.img", size_bytes)?;
    let (mirror, _) = Mirror::new(bench, place, &source, &place.path("replica.img"))?;
    let mirror = in_mode_sync(mirror)?;
    let before = match &bench.settings.before {
        Some(programs) => {
            let source = place.filled("before-primary.img", size_bytes)?;
            let target = place.path("before-replica.img");
            Some(in_mode_sync(Mirror::of_release(bench, place, programs, &source, &target)?.0)?)
        }
        None => None,
    };
    let file = |path: PathBuf| Target::File { path, is_direct: place.is_direct };
    let both = [file(place.filled("near.img", size_bytes)?), file(place.filled("far.img", size_bytes)?)];
    let quic = RawQuic::start(bench)?;
    let writes = Job::new(Pattern::RandomWrite, 4 << 10, 1);
    // Flushes and plain writes are two jobs: a write after a flush finds another disk than one after a write.
    let both_jobs = |targets: &[Target]| -> Result<Turn> {
        let flushing = measure(&flushes(), targets, extent)?;
        Ok(turn(&flushing).with(WRITE, measure(&writes, targets, extent)?.p50))
    };
    let in_mode = |mirror: &Mirror, mode: &str| -> Result<Turn> {
        mirror.primary.tool(&["mode", "data", mirror.replica.name(), mode])?;
        mirror.primary.wait_until_in_sync()?;
        let turn = both_jobs(&[mirror.target()])?;
        Ok(turn.unless(mirror.fell_behind()?))
    };
    let mut contestants = vec![
        Contestant::new(OURS, Part::Ours, || in_mode(&mirror, "sync")),
        Contestant::new(ASYNC, Part::Limit, || in_mode(&mirror, "async")),
        Contestant::new(LOCAL, Part::Limit, || both_jobs(&both[..1])),
        Contestant::new(BOTH, Part::Limit, || both_jobs(&both)),
        Contestant::new(PING, Part::Limit, || {
            let times = Summary::of(&quic.ping(PINGS)?).context("there were pings")?;
            Ok(Turn::new([(ROUND_TRIP, times.median)]))
        }),
    ];
    if let Some(before) = &before {
        contestants.insert(1, Contestant::new(BEFORE, Part::Aside, || in_mode(before, "sync")));
    }
    bench.compare("sync", place.name(), "4 KiB random writes and flushes, depth 1", contestants)
}

/// A volume that is in this mode when it is opened lives on the transport's thread.
fn in_mode_sync(mut mirror: Mirror) -> Result<Mirror> {
    mirror.primary.tool(&["mode", "data", mirror.replica.name(), "sync"])?;
    mirror.primary.wait_until_in_sync()?;
    mirror.start_again()?;
    Ok(mirror)
}

fn ratio_of(one: Option<f64>, other: Option<f64>) -> Option<f64> {
    ratio(one?, other?)
}

fn bars(bench: &Bench, place: &Place, outcome: &Outcome) {
    let median = |quantity, contestant| outcome.table(quantity).median(contestant);
    let round_trip = median(ROUND_TRIP, PING);
    let about = |what: &str| format!("sync, {}: {what}", place.name());
    for (what, quantity) in [("flush p50", FLUSH), ("write p50", WRITE)] {
        let ratio = ratio_of(median(quantity, BEFORE), median(quantity, OURS));
        bench.bar_to_before(about(&format!("{what}, as a rate")), ratio);
    }
    let flush = |local| {
        // The remote disk is as fast as this one, so that of the two the one behind the round trip is the later.
        ratio(median(FLUSH, OURS)?, round_trip? + median(FLUSH, local)?)
    };
    let measure = "max(local sync, round trip + remote sync)";
    // On tmpfs a sync is nothing, so that only the programs themselves are left.
    let wanted = if place.is_disk() { Wanted::AtMost(1.15) } else { Wanted::Told };
    bench.bar(about("flush p50"), measure, wanted, flush(LOCAL));
    bench.bar(about("flush p50"), format!("{measure}, both at once"), Wanted::Told, flush(BOTH));
    let write = || ratio(median(WRITE, OURS)?, round_trip? + median(WRITE, ASYNC)?);
    bench.bar(about("write p50"), "one in mode async, and a round trip", Wanted::AtMost(1.15), write());
}
