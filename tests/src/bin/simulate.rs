//! Runs the simulation over many seeds: `simulate --seeds N [--first-seed S] [--seconds T] [--trace]`.
//!
//! A seed that fails is printed with the command that replays it.

use anyhow::{Context, Result, bail};
use blockmirror_tests::harness::world::World;
use std::panic::{AssertUnwindSafe, catch_unwind};

struct Options {
    seeds: u64,
    first_seed: u64,
    seconds: u64,
    is_traced: bool,
}

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Options> {
    let mut options = Options { seeds: 100, first_seed: 1, seconds: 30, is_traced: false };
    while let Some(name) = arguments.next() {
        if name == "--trace" {
            options.is_traced = true;
            continue;
        }
        let place = match name.as_str() {
            "--seeds" => &mut options.seeds,
            "--first-seed" => &mut options.first_seed,
            "--seconds" => &mut options.seconds,
            _ => bail!("unknown option {name}; use --seeds N, --first-seed S, --seconds T, --trace"),
        };
        let value = arguments.next().with_context(|| format!("{name} needs a number"))?;
        *place = value.parse().with_context(|| format!("{name} needs a number, not {value}"))?;
    }
    Ok(options)
}

fn main() -> Result<()> {
    let options = parse(std::env::args().skip(1))?;
    let (mut steps, mut failed) = (0, Vec::new());
    for seed in options.first_seed..options.first_seed + options.seeds {
        let mut world = World::from_seed(seed, options.seconds);
        world.is_traced = options.is_traced;
        if catch_unwind(AssertUnwindSafe(|| world.run())).is_err() {
            eprintln!("seed {seed} failed at step {}, {:?}", world.steps, world.now);
            failed.push(seed);
        }
        steps += world.steps;
        if options.is_traced {
            eprintln!("seed {seed}: {} steps, {:?}", world.steps, world.now);
        }
    }
    println!("{} seeds, {steps} steps, {} failed", options.seeds, failed.len());
    if let Some(seed) = failed.first() {
        bail!(
            "seeds {failed:?} failed; replay one: scripts/simulate --seeds 1 --first-seed {seed} --seconds {}",
            options.seconds
        );
    }
    Ok(())
}
