//! Resident memory of the primary's agent: of a huge volume that is idle, with very many blocks dirty at random, and
//! while a replica is stalled and the window is full.

use crate::bench::Bench;
use crate::bench::agent::Agent;
use crate::bench::comparison::{Contestant, Part, Turn};
use crate::bench::fio::{Extent, Job, Pattern, measure};
use crate::bench::mirror::Mirror;
use crate::bench::place::{Place, PlaceKind};
use crate::bench::processes::{Server, until};
use crate::bench::quantity::{MEMORY, Quantity, Unit};
use crate::bench::report::Wanted;
use anyhow::Result;
use blockmirror_agent::config::DEFAULT_WINDOW;
use blockmirror_agent::quantity::Size;
use rustix::process::Signal;
use std::time::Duration;

/// The largest file of ext4 is a block less than 16 TiB.
pub const HUGE_BYTES: u64 = (16 << 40) - (4 << 20);
/// How many times the window is written to a stalled replica.
const WINDOWS: u64 = 10;
/// How long the replica is waited for until it no longer counts.
const NOTICED: Duration = Duration::from_secs(60);
/// Memory beyond that of an agent whose replica answers, as a multiple of the window.
const GROWTH: Quantity = Quantity::new("growth / window", Unit::Times);

/// Measures the group, and reports it.
///
/// # Errors
/// When it can't be set up, or the bench is interrupted.
pub fn run(bench: &Bench) -> Result<()> {
    let place = bench.main_place()?;
    idle(bench, &place)?;
    // Few large buffers, and many small ones.
    for job in [Job::new(Pattern::Write, 128 << 10, 8), Job::new(Pattern::RandomWrite, 4 << 10, 32)] {
        stalled(bench, &place, job)?;
    }
    // Where a trim of a hole costs nothing, since it is marking that is looked at.
    dirty(bench, &bench.place(PlaceKind::Tmpfs)?)
}

fn resident(server: &Server) -> Result<Turn> {
    Ok(Turn::new([(MEMORY, server.resident_bytes()? as f64)]))
}

fn bar(bench: &Bench, about: &str, measure: &str, limit_bytes: u64, reached: Option<f64>) {
    let reached = reached.map(|bytes| bytes / limit_bytes as f64);
    bench.bar(format!("memory: {about}"), measure, Wanted::AtMost(1.0), reached);
}

fn idle(bench: &Bench, place: &Place) -> Result<()> {
    let file = place.sparse("huge.img", HUGE_BYTES)?;
    let contestants = vec![Contestant::new("blockmirror", Part::Ours, || {
        let agent = Agent::start(bench, place, "a")?;
        agent.create("data", &file, "nbd")?;
        resident(agent.server()?)
    })];
    let outcome = bench.compare("memory", place.name(), "an idle volume of 16 TiB", contestants)?;
    bar(bench, "an idle volume of 16 TiB", "64 MiB", 64 << 20, outcome.table(MEMORY).ours());
    place.clear()
}

fn stalled(bench: &Bench, place: &Place, job: Job) -> Result<()> {
    let window = DEFAULT_WINDOW.0;
    let size_bytes = bench.settings.size.0.max(window * WINDOWS);
    let source = place.filled("primary.img", size_bytes)?;
    let contestants = vec![Contestant::new("blockmirror", Part::Ours, || {
        let (mirror, _) = Mirror::new(bench, place, &source, &place.path("replica.img"))?;
        // What a sync leaves in the pool of buffers is not what is looked at.
        let mut primary = mirror.primary;
        primary.end();
        primary.begin()?;
        primary.wait_until_in_sync()?;
        let mirror = Mirror { primary, ..mirror };
        // What the same writes take while the replica answers: requests under way, and pages of the program. No more of
        // them, since buffers that were once in the window stay in the pool.
        measure(&job, &[mirror.target()], Extent::Bytes(job.block_bytes * u64::from(job.depth)))?;
        mirror.primary.wait_until_in_sync()?;
        let server = mirror.primary.server()?;
        let before = server.resident_bytes()?;
        mirror.replica.server()?.signal(Signal::STOP)?;
        measure(&job, &[mirror.target()], Extent::Bytes(window * WINDOWS))?;
        let peak = server.peak_bytes()?;
        until("the replica counts as behind", NOTICED, || {
            Ok(mirror.primary.peer()?.out_of_sync_bytes.filter(|bytes| *bytes > 0))
        })?;
        let growth = peak.saturating_sub(before) as f64 / window as f64;
        Ok(resident(server)?.with(GROWTH, growth))
    })];
    let work =
        format!("{WINDOWS} times the window of {} to a stalled replica, {}", Size(window), job.words());
    let outcome = bench.compare("memory", place.name(), work, contestants)?;
    let about = format!("memory: a stalled replica, growth at the most, {}", job.words());
    bench.bar(about, "the window", Wanted::AtMost(1.0), outcome.table(GROWTH).ours());
    place.clear()
}

fn dirty(bench: &Bench, place: &Place) -> Result<()> {
    let size_bytes = bench.settings.size.0 * 1024;
    let source = place.sparse("sparse.img", size_bytes)?;
    let blocks = size_bytes / 4096 / 100;
    let contestants = vec![Contestant::new("blockmirror", Part::Ours, || {
        let (mirror, _) = Mirror::new(bench, place, &source, &place.path("replica.img"))?;
        mirror.pause()?;
        mirror.mark(blocks)?;
        resident(mirror.primary.server()?)
    })];
    let work = format!("{blocks} random blocks of {} dirty", Size(size_bytes));
    let outcome = bench.compare_turns("memory", place.name(), &work, contestants, 1)?;
    bar(bench, &work, "128 MiB", 128 << 20, outcome.table(MEMORY).ours());
    place.clear()
}
