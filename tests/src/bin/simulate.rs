//! Runs the simulation over many seeds: `simulate --seeds N [--first-seed S] [--seconds T] [--trace] [--plant BUG]`.
//!
//! A seed that fails is printed with the command that replays it. Seeds run on all processors, but with `--trace`. Bugs can
//! be planted where this was built with the feature `planted`.

use anyhow::{Context, Result, bail};
use blockmirror_protocol::planted::Bug;
use blockmirror_tests::harness::seeds::{self, Failed, Outcome};
use blockmirror_tests::harness::world::World;
use std::ops::Range;
use std::time::Instant;

struct Options {
    seeds: u64,
    first_seed: u64,
    seconds: u64,
    is_traced: bool,
    planted: Option<Bug>,
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options { seeds: 100, first_seed: 1, seconds: 30, is_traced: false, planted: None };
    while let Some(name) = arguments.next() {
        if name == "--trace" {
            options.is_traced = true;
            continue;
        }
        if name == "--plant" {
            let bug = arguments.next().context("--plant needs a name")?;
            let found = Bug::ALL.into_iter().find(|known| format!("{known:?}") == bug);
            options.planted = Some(found.with_context(|| format!("there is no bug {bug}"))?);
            continue;
        }
        let place = match name.as_str() {
            "--seeds" => &mut options.seeds,
            "--first-seed" => &mut options.first_seed,
            "--seconds" => &mut options.seconds,
            _ => bail!(
                "unknown option {name}; use --seeds N, --first-seed S, --seconds T, --trace, --plant BUG"
            ),
        };
        let value = arguments.next().with_context(|| format!("{name} needs a number"))?;
        *place = value.parse().with_context(|| format!("{name} needs a number, not {value}"))?;
    }
    Ok(options)
}

fn main() -> Result<()> {
    let options = parse(std::env::args().skip(1))?;
    let seeds = options.first_seed..options.first_seed + options.seeds;
    let began = Instant::now();
    if options.planted.is_some() && !cfg!(feature = "planted") {
        bail!("bugs can be planted with --features blockmirror-tests/planted only");
    }
    let make = |seed| {
        sow(options.planted);
        World::from_seed(seed, options.seconds)
    };
    let outcome = if options.is_traced { trace(seeds, make) } else { run(seeds, make) };
    let (took, steps) = (began.elapsed().as_secs_f64(), outcome.steps as f64);
    for Failed { seed, steps, at, message, .. } in &outcome.failed {
        eprintln!("seed {seed} failed at step {steps}, {at:?}: {message}");
    }
    println!(
        "{} seeds, {} steps, {} failed; {:.0} seeds/s, {:.0} steps/s",
        outcome.worlds,
        outcome.steps,
        outcome.failed.len(),
        outcome.worlds as f64 / took,
        steps / took
    );
    if let Some(Failed { seed, .. }) = outcome.failed.first() {
        bail!(
            "{} seeds failed; replay one: scripts/simulate --seeds 1 --first-seed {seed} --seconds {}",
            outcome.failed.len(),
            options.seconds
        );
    }
    Ok(())
}

#[cfg(feature = "planted")]
fn sow(bug: Option<Bug>) {
    blockmirror_protocol::planted::plant(bug);
}

#[cfg(not(feature = "planted"))]
const fn sow(_: Option<Bug>) {}

fn run(seeds: Range<u64>, make: impl Fn(u64) -> World + Sync) -> Outcome {
    // What failed is told at the end, in order.
    seeds::note_places();
    seeds::run(seeds, false, make)
}

/// One after the other, and with the place of a panic.
fn trace(seeds: Range<u64>, make: impl Fn(u64) -> World) -> Outcome {
    let mut outcome = Outcome::default();
    for seed in seeds {
        let mut world = make(seed);
        world.is_traced = true;
        outcome.run(seed, &mut world);
        eprintln!("seed {seed}: {} steps, {:?}", world.steps, world.now);
    }
    outcome
}
