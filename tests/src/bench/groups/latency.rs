//! What applications feel of a resync (R3): the front end's 99th percentile at 4 KiB and depth 1 while many gigabytes are
//! copied, against the same without.

use crate::bench::Bench;
use crate::bench::comparison::{Contestant, Part};
use crate::bench::fio::{Extent, Job, Pattern, measure};
use crate::bench::mirror::Mirror;
use crate::bench::quantity::P99;
use crate::bench::report::Wanted;
use anyhow::Result;
use blockmirror_agent::control::api::PeerState;

const WITHOUT: &str = "without a resync";
/// How often the application writes, per second: rarely enough that it is not a load by itself.
const RATE: u32 = 500;

/// Measures the group, and reports it.
///
/// # Errors
/// When it can't be set up, or the bench is interrupted.
pub fn run(bench: &Bench) -> Result<()> {
    let place = bench.main_place()?;
    let size_bytes = bench.settings.size.0 * 4;
    let source = place.filled("primary.img", size_bytes)?;
    let (mirror, _) = Mirror::new(bench, &place, &source, &place.path("replica.img"))?;
    let job = Job { rate: Some(RATE), ..Job::new(Pattern::RandomWrite, 4 << 10, 1) };
    let extent = Extent::Seconds(bench.settings.seconds);
    let contestants = vec![
        Contestant::new("with a resync", Part::Ours, || {
            mirror.pause()?;
            let all = Job::new(Pattern::Write, 1 << 20, 8);
            measure(&all, &[mirror.target()], Extent::Bytes(size_bytes))?;
            mirror.resume()?;
            let is_resyncing = |state| state == Some(PeerState::Resyncing);
            mirror.primary.wait_for_peer("a resync is under way", |peer| is_resyncing(peer.state))?;
            let measured = measure(&job, &[mirror.target()], extent)?;
            let has_ended = !is_resyncing(mirror.primary.peer()?.state);
            mirror.primary.wait_until_in_sync()?;
            let reason = || "the resync had ended before; take a larger --size".to_owned();
            Ok(measured.turn(&job).unless(has_ended.then(reason)))
        }),
        Contestant::new(WITHOUT, Part::Limit, || Ok(measure(&job, &[mirror.target()], extent)?.turn(&job))),
    ];
    let work = format!("4 KiB random write, depth 1, {RATE} a second");
    let outcome = bench.compare("latency", place.name(), work, contestants)?;
    let about = format!("latency, {}: p99 with a resync", place.name());
    bench.bar(about, WITHOUT, Wanted::AtMost(2.0), outcome.table(P99).ratio_to(WITHOUT));
    drop(mirror);
    place.clear()
}
