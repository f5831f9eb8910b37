//! Writing with one asynchronous replica on the same machine and the same disk: against fio writing both files at once,
//! which is all that the disk can do, and against qemu's mirror, which answers when both have it.
//!
//! A write that was only marked, since the window was full, was not mirrored: a turn after which the replica is not in
//! sync counts for nothing. How long the replica takes to have the rest is told beside the rate.

use crate::bench::comparison::{Contestant, Part};
use crate::bench::fio::{Extent, Job, Target, measure};
use crate::bench::mirror::Mirror;
use crate::bench::peers::missing;
use crate::bench::place::Place;
use crate::bench::qemu_mirror::QemuMirror;
use crate::bench::quantity::{Quantity, Unit};
use crate::bench::report::Wanted;
use crate::bench::{BEFORE, Bench};
use anyhow::Result;
use std::time::Instant;

const QEMU: &str = "qemu mirror";
const BOTH: &str = "fio, both files";
/// How long the replica takes to have everything when the writer has ended.
const DRAINED: Quantity = Quantity::detail("drained after", Unit::Seconds);

/// Measures the group, and reports it.
///
/// # Errors
/// When ours can't be set up, or the bench is interrupted.
pub fn run(bench: &Bench) -> Result<()> {
    for place in bench.places()? {
        compare(bench, &place)?;
        place.clear()?;
    }
    Ok(())
}

fn compare(bench: &Bench, place: &Place) -> Result<()> {
    let (size_bytes, extent) = (bench.settings.size.0, Extent::Seconds(bench.settings.seconds));
    let source = place.filled("primary.img", size_bytes)?;
    let (mirror, _) = Mirror::new(bench, place, &source, &place.path("replica.img"))?;
    let both = [place.filled("near.img", size_bytes)?, place.filled("far.img", size_bytes)?];
    let qemu = match missing(&["qemu-storage-daemon", "qemu-nbd"]) {
        Some(reason) => Err(reason),
        None => {
            let (near, far) =
                (place.filled("qemu-near.img", size_bytes)?, place.filled("qemu-far.img", size_bytes)?);
            QemuMirror::start(bench, place, &near, &far).map_err(|error| format!("{error:#}"))
        }
    };
    let before = match &bench.settings.before {
        Some(programs) => {
            let source = place.filled("before-primary.img", size_bytes)?;
            Some(Mirror::of_release(bench, place, programs, &source, &place.path("before-replica.img"))?.0)
        }
        None => None,
    };
    let turn_of = |mirror: &Mirror, job: &Job| {
        let measured = measure(job, &[mirror.target()], extent)?;
        let fell_behind = mirror.fell_behind()?;
        let began = Instant::now();
        mirror.primary.wait_until_in_sync()?;
        Ok(measured.turn(job).with(DRAINED, began.elapsed().as_secs_f64()).unless(fell_behind))
    };
    for job in Job::writing() {
        let files =
            both.each_ref().map(|path| Target::File { path: path.clone(), is_direct: place.is_direct });
        let mut contestants = vec![Contestant::new("blockmirror", Part::Ours, || turn_of(&mirror, &job))];
        if let Some(before) = &before {
            contestants.push(Contestant::new(BEFORE, Part::Aside, || turn_of(before, &job)));
        }
        contestants.push(match &qemu {
            Ok(qemu) => Contestant::new(QEMU, Part::Peer, || {
                Ok(measure(&job, &[Target::Nbd(qemu.uri.clone())], extent)?.turn(&job))
            }),
            Err(reason) => Contestant::skipped(QEMU, Part::Peer, reason.clone()),
        });
        contestants.push(Contestant::new(
            BOTH,
            Part::Limit,
            || Ok(measure(&job, &files, extent)?.turn(&job)),
        ));
        let outcome = bench.compare("replica", place.name(), job.words(), contestants)?;
        let table = outcome.table(job.quantity());
        let about = format!("replica, {}: {}", place.name(), job.words());
        bench.bar_to_before(&about, table.ratio_to(BEFORE));
        // Without a disk there is nothing that both wait for, and fio has no processes to pass data between.
        let of_both = if place.is_disk() { Wanted::AtLeast(0.9) } else { Wanted::Told };
        bench.bar(&about, "fio writing both files at once", of_both, table.ratio_to(BOTH));
        let twice = if job.is_large() { Wanted::Told } else { Wanted::AtLeast(2.0) };
        bench.bar(about, "qemu's mirror, write-blocking", twice, table.ratio_to(QEMU));
    }
    Ok(())
}
