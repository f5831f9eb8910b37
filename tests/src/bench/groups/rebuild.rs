//! A primary whose disk is lost (S4): how soon it serves, what the first reads cost, what applications feel while another disk is
//! filled, and how long that takes, against `recover` from the same replica.

use crate::bench::Bench;
use crate::bench::agent::Agent;
use crate::bench::comparison::{Contestant, Part, Turn};
use crate::bench::fio::{Extent, Job, Pattern, Target, measure};
use crate::bench::mirror::Mirror;
use crate::bench::place::{Place, drop_cache, warm_memory};
use crate::bench::processes::{PATIENCE, until};
use crate::bench::quantity::{P50, P99, Quantity, SPEED, Unit};
use crate::bench::report::Wanted;
use anyhow::{Context, Result};
use std::path::PathBuf;
use std::time::Instant;

const RECOVER: &str = "recover";
const REMOTE: &str = "reads from the replica's export";
const WHOLE: &str = "the same of a whole disk";
/// From the command until it has ended: the volume is served then.
const SERVED: Quantity = Quantity::detail("served after", Unit::Seconds);
/// How many reads are the first ones: few enough that what they read is not there yet.
const FIRST: u64 = 64;
/// How often the application reads, per second: rarely enough that it is not a load by itself.
const RATE: u32 = 500;

/// What is rebuilt.
struct Rebuilding<'a> {
    bench: &'a Bench,
    place: &'a Place,
    mirror: Mirror,
    size_bytes: u64,
    replica: PathBuf,
}

/// Measures the group, and reports it.
///
/// # Errors
/// When it can't be set up, or the bench is interrupted.
pub fn run(bench: &Bench) -> Result<()> {
    for place in bench.places()? {
        compare(bench, &place)?;
        place.clear()?;
    }
    Ok(())
}

fn compare(bench: &Bench, place: &Place) -> Result<()> {
    let size_bytes = bench.settings.size.0;
    let source = place.filled("primary.img", size_bytes)?;
    let replica = place.path("replica.img");
    let (mirror, _) = Mirror::new(bench, place, &source, &replica)?;
    let rebuilding = Rebuilding { bench, place, mirror, size_bytes, replica };
    let about = |what: &str| format!("rebuild, {}: {what}", place.name());
    let size = blockmirror_agent::quantity::Size(size_bytes);

    let contestants = vec![
        Contestant::new("rebuild", Part::Ours, || rebuilding.fill()),
        Contestant::new(RECOVER, Part::Limit, || rebuilding.recover()),
    ];
    let outcome = bench.compare("rebuild", place.name(), format!("{size} of random data"), contestants)?;
    bench.bar(about("fill"), RECOVER, Wanted::AtLeast(1.0 / 1.1), outcome.table(SPEED).ratio_to(RECOVER));

    let first = Job::new(Pattern::RandomRead, 4 << 10, 1);
    let extent = Extent::Bytes(FIRST * (4 << 10));
    let export = Target::Nbd(rebuilding.mirror.replica.uri("data"));
    let contestants = vec![
        Contestant::new("first reads", Part::Ours, || {
            rebuilding.begin()?;
            let measured = measure(&first, &[rebuilding.mirror.target()], extent)?;
            rebuilding.wait_until_filled()?;
            Ok(measured.turn(&first))
        }),
        Contestant::new(REMOTE, Part::Limit, || {
            drop_cache(&rebuilding.replica)?;
            Ok(measure(&first, std::slice::from_ref(&export), extent)?.turn(&first))
        }),
    ];
    let outcome = bench.compare("rebuild", place.name(), "first 4 KiB random reads, depth 1", contestants)?;
    bench.bar(about("first reads, p50"), REMOTE, Wanted::Told, outcome.table(P50).ratio_to(REMOTE));

    let job = Job { rate: Some(RATE), ..Job::new(Pattern::RandomRead, 4 << 10, 1) };
    let extent = Extent::Seconds(bench.settings.seconds);
    let contestants = vec![
        Contestant::new("while it is filled", Part::Ours, || {
            rebuilding.begin()?;
            let measured = measure(&job, &[rebuilding.mirror.target()], extent)?;
            let has_ended = rebuilding.mirror.primary.volume()?.facts.rebuild.is_none();
            rebuilding.wait_until_filled()?;
            let reason = || "it was filled before; take a larger --size".to_owned();
            Ok(measured.turn(&job).unless(has_ended.then(reason)))
        }),
        Contestant::new(WHOLE, Part::Limit, || {
            Ok(measure(&job, &[rebuilding.mirror.target()], extent)?.turn(&job))
        }),
    ];
    let work = format!("4 KiB random read, depth 1, {RATE} a second");
    let outcome = bench.compare("rebuild", place.name(), work, contestants)?;
    bench.bar(
        about("p99 while it is filled"),
        WHOLE,
        Wanted::AtMost(2.0),
        outcome.table(P99).ratio_to(WHOLE),
    );
    Ok(())
}

impl Rebuilding<'_> {
    /// The primary goes on with a new file. Gives how long the command took, in seconds, and when it began.
    fn begin(&self) -> Result<(f64, Instant)> {
        let backing = self.mirror.primary.volume()?.facts.backing;
        let names = ["rebuilt.img", "again.img"].map(|name| self.place.path(name));
        let other = names.iter().find(|name| **name != backing).context("there are two")?;
        if other.exists() {
            std::fs::remove_file(other)?;
        }
        drop_cache(&self.replica)?;
        warm_memory(2 * self.size_bytes);
        let began = Instant::now();
        let path = other.to_str().context("paths are text")?;
        self.mirror.primary.tool(&["rebuild", "data", "--backing", path, "--overwrite"])?;
        Ok((began.elapsed().as_secs_f64(), began))
    }

    fn wait_until_filled(&self) -> Result<()> {
        let look = || Ok(self.mirror.primary.volume()?.facts.rebuild.is_none().then_some(()));
        until("the disk is filled", PATIENCE, look)?;
        self.mirror.primary.wait_until_in_sync()
    }

    fn fill(&self) -> Result<Turn> {
        let (served, began) = self.begin()?;
        self.wait_until_filled()?;
        let speed = self.size_bytes as f64 / began.elapsed().as_secs_f64();
        Ok(Turn::new([(SPEED, speed), (SERVED, served)]))
    }

    /// What a host without an agent does.
    fn recover(&self) -> Result<Turn> {
        // A replica that is being written to is not recovered from.
        self.mirror.pause()?;
        let token = self.mirror.replica.tool(&["invite", "data"])?;
        let host = Agent::prepare(self.bench, self.place, "c")?;
        let target = self.place.path("recovered.img");
        let to = target.to_str().context("paths are text")?;
        drop_cache(&self.replica)?;
        warm_memory(2 * self.size_bytes);
        let began = Instant::now();
        host.tool(&["recover", "data", "--token", token.trim(), "--to", to])?;
        let speed = self.size_bytes as f64 / began.elapsed().as_secs_f64();
        std::fs::remove_file(&target)?;
        self.mirror.resume()?;
        self.mirror.primary.wait_until_in_sync()?;
        Ok(Turn::new([(SPEED, speed)]))
    }
}
