//! Many idle volumes, each with a replica: what they cost, and how long it takes to open them and to tell their status.

use crate::bench::Bench;
use crate::bench::agent::{Agent, is_quiet};
use crate::bench::comparison::{Contestant, Part, Turn};
use crate::bench::processes::{PATIENCE, until};
use crate::bench::quantity::{Quantity, Unit};
use crate::bench::report::Wanted;
use anyhow::Result;
use std::time::{Duration, Instant};

const COUNT: usize = 100;
const SIZE_BYTES: u64 = 16 << 20;
/// How long nothing happens while processor time is counted.
const IDLE: Duration = Duration::from_secs(20);

const OPEN: Quantity = Quantity::new("until all are open", Unit::Seconds);
const STATUS: Quantity = Quantity::new("blockmirror status", Unit::Seconds);
const LOAD: Quantity = Quantity::new("part of a core", Unit::Times);

/// Measures the group, and reports it.
///
/// # Errors
/// When it can't be set up, or the bench is interrupted.
pub fn run(bench: &Bench) -> Result<()> {
    let place = bench.main_place()?;
    let mut agents = [Agent::start(bench, &place, "a")?, Agent::start(bench, &place, "b")?];
    for number in 0..COUNT {
        let name = format!("v{number}");
        agents[0].create(&name, &place.sparse(&format!("{name}.img"), SIZE_BYTES)?, "nbd")?;
        agents[1].join(&agents[0], &name, &place.path(&format!("{name}-b.img")))?;
    }
    let contestants = vec![Contestant::new("blockmirror", Part::Ours, || {
        let [primary, _] = &mut agents;
        wait_until_quiet(primary)?;
        primary.end();
        let began = Instant::now();
        primary.begin()?;
        let open = began.elapsed().as_secs_f64();
        wait_until_quiet(primary)?;
        let before = primary.server()?.cpu_seconds()?;
        let began = Instant::now();
        // There is no condition to wait for: it is nothing that is measured.
        std::thread::sleep(IDLE);
        let load = (primary.server()?.cpu_seconds()? - before) / began.elapsed().as_secs_f64();
        let began = Instant::now();
        primary.tool(&["status"])?;
        Ok(Turn::new([(OPEN, open), (LOAD, load), (STATUS, began.elapsed().as_secs_f64())]))
    })];
    let work = format!("{COUNT} idle volumes with a replica each");
    let outcome = bench.compare("volumes", place.name(), &work, contestants)?;
    let bars = [(LOAD, "a hundredth of a core", 0.01), (OPEN, "2 seconds", 2.0), (STATUS, "100 ms", 0.1)];
    for (quantity, words, limit) in bars {
        let reached = outcome.table(quantity).ours().map(|value| value / limit);
        bench.bar(format!("volumes: {work}: {}", quantity.name), words, Wanted::AtMost(1.0), reached);
    }
    drop(agents);
    place.clear()
}

fn wait_until_quiet(agent: &Agent) -> Result<()> {
    until("all volumes are in sync", PATIENCE, || {
        let volumes = agent.status()?.volumes;
        let are_quiet = volumes.iter().all(|volume| volume.facts.peers.iter().all(is_quiet));
        Ok((volumes.len() == COUNT && are_quiet).then_some(()))
    })
}
