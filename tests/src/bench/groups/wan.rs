//! The first sync over a long-distance link of 40 ms and 100 Mbit/s, clean and with loss, as a part of what the link
//! carries.

use crate::bench::Bench;
use crate::bench::agent::{Agent, is_quiet};
use crate::bench::comparison::{Contestant, Part, Turn};
use crate::bench::mirror::Mirror;
use crate::bench::network::{Shape, Wan};
use crate::bench::quantity::{Quantity, Unit};
use crate::bench::report::Wanted;
use anyhow::{Context, Result};
use std::net::SocketAddr;
use std::time::Duration;

/// The congestion controllers that the agent offers, each a contestant.
const CONTROLLERS: [&str; 3] = ["cubic", "new-reno", "bbr"];
const RATE_MEGABITS: u32 = 100;
const ONE_WAY_MILLISECONDS: u32 = 20;
/// How much longer than a turn of fio a sync takes at the link's rate: it has a start to make up for.
const TURNS_OF_FIO: u64 = 5;
const SPEED: Quantity = Quantity::new("speed", Unit::BytesPerSecond);

/// Measures the group, and reports it.
///
/// # Errors
/// When it can't be set up, or the bench is interrupted.
pub fn run(bench: &Bench) -> Result<()> {
    let place = bench.main_place()?;
    let rate_bytes = u64::from(RATE_MEGABITS) * 1_000_000 / 8;
    let size_bytes = (rate_bytes * bench.settings.seconds * TURNS_OF_FIO).next_multiple_of(1 << 20);
    // What takes much longer than the link would need says enough by then.
    let longest = Duration::from_secs(2 * bench.settings.seconds * TURNS_OF_FIO);
    let source = place.filled("primary.img", size_bytes)?;
    for (loss_percent, words) in [(0.0, "clean"), (0.5, "0.5 % lost")] {
        let shape =
            Shape { delay_milliseconds: ONE_WAY_MILLISECONDS, rate_megabits: RATE_MEGABITS, loss_percent };
        let wan = Wan::new(bench, shape)?;
        let [near, far] =
            [0, 1].map(|end| (wan.ends[end].name(), SocketAddr::from((Wan::ADDRESSES[end], 7447))));
        let sync = &|controller: &str| -> Result<Turn> {
            let agent = |name, (end, address): (&str, SocketAddr)| {
                let agent = Agent::prepare_at(bench, &place, name, address, Some(end))?;
                agent.set("congestion", controller)?;
                Ok::<_, anyhow::Error>(agent)
            };
            let agents = [agent("a", near)?, agent("b", far)?];
            let (mirror, began) = Mirror::begin(agents, &source, &place.path("replica.img"))?;
            let peer = mirror.primary.wait_for_peer("it was copied for long enough", |peer| {
                is_quiet(peer) || began.elapsed() >= longest
            })?;
            let copied_bytes = size_bytes - peer.out_of_sync_bytes.context("it is known")?.min(size_bytes);
            Ok(Turn::new([(SPEED, copied_bytes as f64 / began.elapsed().as_secs_f64())]))
        };
        let contestants = CONTROLLERS
            .into_iter()
            .map(|name| Contestant::new(name, Part::Ours, move || sync(name)))
            .collect();
        let work = format!("first sync over 40 ms and {RATE_MEGABITS} Mbit/s, {words}");
        let outcome = bench.compare("wan", "", work, contestants)?;
        let best = CONTROLLERS.iter().filter_map(|name| outcome.table(SPEED).median(name)).reduce(f64::max);
        let wanted = if loss_percent > 0.0 { Wanted::Told } else { Wanted::AtLeast(0.9) };
        bench.bar(
            format!("wan: first sync, {words}"),
            "the link",
            wanted,
            best.map(|speed| speed / rate_bytes as f64),
        );
    }
    place.clear()
}
