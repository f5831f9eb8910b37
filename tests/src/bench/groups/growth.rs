//! How the cost of things grows with the size of a volume, which should be not at all, and with what a resync has to do,
//! which should be in proportion.

use crate::bench::Bench;
use crate::bench::agent::Agent;
use crate::bench::comparison::{Contestant, Outcome, Part, Turn};
use crate::bench::groups::memory::HUGE_BYTES;
use crate::bench::mirror::Mirror;
use crate::bench::place::{Place, PlaceKind};
use crate::bench::quantity::{Quantity, TIME, Unit};
use crate::bench::report::Wanted;
use crate::bench::statistics::{exponent, ratio};
use anyhow::Result;
use std::cell::RefCell;
use std::time::Instant;

const SIZES: [(&str, u64); 3] = [("1 GiB", 1 << 30), ("1 TiB", 1 << 40), ("16 TiB", HUGE_BYTES)];
const CREATE: Quantity = Quantity::new("create", Unit::Seconds);
const OPEN: Quantity = Quantity::new("open", Unit::Seconds);
const STATUS: Quantity = Quantity::new("status", Unit::Seconds);
const FIRST_SYNC: Quantity = Quantity::new("first sync, empty", Unit::Seconds);
const RESYNC: Quantity = Quantity::new("resync of one block", Unit::Seconds);
/// The size of the volume whose blocks are dirty, in bytes: room for the most of them.
const DIRTY_BYTES: u64 = 1 << 40;
const FEWEST: u64 = 1000;

/// Measures the group, and reports it.
///
/// # Errors
/// When it can't be set up, or the bench is interrupted.
pub fn run(bench: &Bench) -> Result<()> {
    // Sparse files of any size, and trims that cost nothing.
    let place = bench.place(PlaceKind::Tmpfs)?;
    size(bench, &place)?;
    dirty(bench, &place)
}

fn size(bench: &Bench, place: &Place) -> Result<()> {
    let open = |size_bytes| -> Result<Turn> {
        let file = place.sparse("volume.img", size_bytes)?;
        let mut agent = Agent::start(bench, place, "a")?;
        let create = timed(|| agent.create("data", &file, "nbd"))?;
        agent.end();
        let open = timed(|| agent.begin())?;
        let status = timed(|| agent.tool(&["status"]).map(drop))?;
        Ok(Turn::new([(CREATE, create), (OPEN, open), (STATUS, status)]))
    };
    let contestants = sizes().map(|(name, bytes)| Contestant::new(name, Part::Ours, move || open(bytes)));
    let outcome = bench.compare("growth", place.name(), "an empty volume", contestants.collect())?;
    [CREATE, OPEN, STATUS].iter().for_each(|quantity| bar(bench, &outcome, *quantity, Wanted::AtMost(1.5)));

    // Each is made once, since the largest takes minutes, and stays for the turns of its resyncs.
    let mirrors: RefCell<Vec<Mirror>> = RefCell::default();
    let contestants = sizes().map(|(name, bytes)| {
        let mirrors = &mirrors;
        Contestant::new(name, Part::Ours, move || {
            let number = mirrors.borrow().len();
            let agent = |role: &str| Agent::prepare(bench, place, &format!("{role}{number}"));
            let source = place.sparse(&format!("volume-{number}.img"), bytes)?;
            let target = place.path(&format!("replica-{number}.img"));
            let (mirror, first) = Mirror::of([agent("a")?, agent("b")?], &source, &target)?;
            mirrors.borrow_mut().push(mirror);
            Ok(Turn::new([(FIRST_SYNC, first.synced)]))
        })
    });
    let outcome = bench.compare_turns("growth", place.name(), "a new replica", contestants.collect(), 1)?;
    bar(bench, &outcome, FIRST_SYNC, Wanted::Told);

    let mirrors = mirrors.into_inner();
    let contestants = sizes().zip(&mirrors).map(|((name, _), mirror)| {
        Contestant::new(name, Part::Ours, move || {
            mirror.pause()?;
            mirror.mark(1)?;
            Ok(Turn::new([(RESYNC, mirror.catch_up()?)]))
        })
    });
    let outcome = bench.compare("growth", place.name(), "one dirty block", contestants.collect())?;
    bar(bench, &outcome, RESYNC, Wanted::AtMost(1.5));
    drop(mirrors);
    place.clear()
}

fn sizes() -> impl Iterator<Item = (&'static str, u64)> {
    SIZES.into_iter()
}

/// The largest against the smallest.
fn bar(bench: &Bench, outcome: &Outcome, quantity: Quantity, wanted: Wanted) {
    let table = outcome.table(quantity);
    let [least, _, most] = SIZES.map(|(name, _)| table.median(name));
    let reached = most.zip(least).and_then(|(most, least)| ratio(most, least));
    bench.bar(format!("growth: {}, of 16 TiB", quantity.name), "of 1 GiB", wanted, reached);
}

fn timed(work: impl FnOnce() -> Result<()>) -> Result<f64> {
    let began = Instant::now();
    work()?;
    Ok(began.elapsed().as_secs_f64())
}

fn dirty(bench: &Bench, place: &Place) -> Result<()> {
    let file = place.sparse("volume.img", DIRTY_BYTES)?;
    let (mirror, _) = Mirror::new(bench, place, &file, &place.path("replica.img"))?;
    let mirror = &mirror;
    let counts: Vec<u64> = std::iter::successors(Some(FEWEST), |count| Some(count * 10))
        .take_while(|count| *count <= bench.settings.most_dirty)
        .collect();
    let contestants = counts
        .iter()
        .map(|count| {
            Contestant::new(format!("{count} blocks"), Part::Ours, move || {
                mirror.pause()?;
                mirror.mark(*count)?;
                Ok(Turn::new([(TIME, mirror.catch_up()?)]))
            })
        })
        .collect();
    let outcome = bench.compare("growth", place.name(), "resync of random blocks of 1 TiB", contestants)?;
    let steps = counts.windows(2).map(|pair| step(&outcome, pair[0], pair[1]));
    let steepest = steps.collect::<Option<Vec<f64>>>().and_then(|steps| steps.into_iter().reduce(f64::max));
    bench.bar("growth: resync, steepest exponent", "linear", Wanted::AtMost(1.1), steepest);
    Ok(())
}

fn step(outcome: &Outcome, from: u64, to: u64) -> Option<f64> {
    let point = |count: u64| Some((count as f64, outcome.table(TIME).median(&format!("{count} blocks"))?));
    exponent(point(from)?, point(to)?)
}
