//! The front ends without a replica: what an application gets of the disk through us, and through programs that serve
//! the same kind of device from the same kind of file.
//!
//! All servers run all the time and have a file of their own; only one of them has a client at a time. Before a turn
//! the page cache forgets that server's file, so that reads come from the disk whoever serves them.

use crate::bench::agent::Agent;
use crate::bench::comparison::{Contestant, Part};
use crate::bench::fio::{Extent, Job, Target, measure};
use crate::bench::loops::{LoopDevice, nbdfuse, qemu_fuse};
use crate::bench::peers::{missing, nbd_server, nbdkit, qemu_nbd};
use crate::bench::place::{Place, drop_cache, is_cached};
use crate::bench::report::Wanted;
use crate::bench::{BEFORE, Bench};
use anyhow::{Context, Result};
use std::any::Any;
use std::path::{Path, PathBuf};

/// How a front end passes writes on.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Passing {
    /// A write is answered when the disk has it.
    Through,
    /// A write is answered when the page cache has it.
    Cached,
}

/// A served device.
struct FrontEnd {
    name: &'static str,
    part: Part,
    passing: Passing,
    target: Target,
    file: PathBuf,
    /// What serves it, to be ended after the turns.
    _owner: Box<dyn Any>,
}

/// All that there is, and why others are not.
#[derive(Default)]
struct FrontEnds {
    there: Vec<FrontEnd>,
    missing: Vec<(&'static str, String)>,
}

impl FrontEnds {
    /// Sets one up on a file of its own, if its programs are installed.
    fn add<Owner: 'static>(
        &mut self,
        (name, part, passing): (&'static str, Part, Passing),
        programs: &[&str],
        (place, size_bytes): (&Place, u64),
        set_up: impl FnOnce(&Path) -> Result<(Owner, Target)>,
    ) -> Result<()> {
        if let Some(reason) = missing(programs) {
            self.missing.push((name, reason));
            return Ok(());
        }
        let file = place.filled(&format!("{}.img", name.replace([' ', '/'], "-")), size_bytes)?;
        match set_up(&file).with_context(|| format!("{name} can't be set up")) {
            Ok((owner, target)) => {
                self.there.push(FrontEnd { name, part, passing, target, file, _owner: Box::new(owner) });
            }
            Err(error) if part == Part::Ours => return Err(error),
            Err(error) => self.missing.push((name, format!("{error:#}"))),
        }
        Ok(())
    }

    fn contestants<'a>(&'a self, job: Job, place: &'a Place, seconds: u64) -> Vec<Contestant<'a>> {
        let there = self.there.iter().map(|front_end| {
            // A cache answers a write faster than any disk, and on tmpfs there is no disk.
            let counts = !(job.pattern.writes() && place.is_disk() && front_end.passing == Passing::Cached);
            let part = if counts { front_end.part } else { Part::Aside };
            Contestant::new(front_end.name, part, move || {
                let only_once = place.is_disk() && !job.pattern.writes();
                if place.is_disk() {
                    drop_cache(&front_end.file)?;
                }
                let kept = only_once && is_cached(&front_end.file)?;
                if only_once {
                    // Looking makes the kernel read ahead.
                    drop_cache(&front_end.file)?;
                }
                let target = std::slice::from_ref(&front_end.target);
                let extent = if only_once { Extent::Once(seconds) } else { Extent::Seconds(seconds) };
                let turn = measure(&job, target, extent)?.turn(&job);
                Ok(turn.unless(kept.then(|| "the page cache had not forgotten the file".to_owned())))
            })
        });
        let missing = self.missing.iter();
        there
            .chain(missing.map(|(name, reason)| Contestant::skipped(*name, Part::Peer, reason.clone())))
            .collect()
    }
}

/// What the disk gives to a program that has it to itself.
const THE_FILE: &str = "the file itself";
const PLAIN_LOOP: &str = "plain loop";
const OURS: (&str, Part, Passing) = ("blockmirror", Part::Ours, Passing::Through);

/// The NBD front end.
///
/// # Errors
/// When ours can't be run, or the bench is interrupted.
pub fn nbd(bench: &Bench) -> Result<()> {
    for place in bench.places()? {
        let front_ends = nbd_servers(bench, &place)?;
        compare(bench, "nbd", &place, &front_ends)?;
        drop(front_ends);
        place.clear()?;
    }
    Ok(())
}

fn nbd_servers(bench: &Bench, place: &Place) -> Result<FrontEnds> {
    let at = (place, bench.settings.size.0);
    let mut all = FrontEnds::default();
    all.add(OURS, &[], at, |file| {
        let agent = Agent::start(bench, place, "a")?;
        agent.create("data", file, "nbd")?;
        let target = Target::Nbd(agent.uri("data"));
        Ok((agent, target))
    })?;
    if let Some(programs) = &bench.settings.before {
        all.add((BEFORE, Part::Aside, Passing::Through), &[], at, |file| {
            let mut agent = Agent::prepare(bench, place, "before-a")?.of_release(programs);
            agent.begin()?;
            agent.create("data", file, "nbd")?;
            let target = Target::Nbd(agent.uri("data"));
            Ok((agent, target))
        })?;
    }
    let cached = |name| (name, Part::Peer, Passing::Cached);
    all.add(("qemu-nbd", Part::Peer, Passing::Through), &["qemu-nbd"], at, |file| {
        let export = qemu_nbd(bench, place, "qemu", file)?;
        let target = Target::Nbd(export.uri.clone());
        Ok((export, target))
    })?;
    all.add(cached("nbdkit"), &["nbdkit"], at, |file| {
        let export = nbdkit(bench, place, "nbdkit", file)?;
        let target = Target::Nbd(export.uri.clone());
        Ok((export, target))
    })?;
    all.add(cached("nbd-server"), &["nbd-server"], at, |file| {
        let export = nbd_server(bench, "nbd-server", file)?;
        let target = Target::Nbd(export.uri.clone());
        Ok((export, target))
    })?;
    all.add((THE_FILE, Part::Limit, Passing::Through), &[], at, |file| {
        Ok(((), Target::File { path: file.to_owned(), is_direct: place.is_direct }))
    })?;
    Ok(all)
}

/// The loop device.
///
/// # Errors
/// When ours can't be run, or the bench is interrupted.
pub fn loops(bench: &Bench) -> Result<()> {
    for place in bench.places()? {
        let front_ends = loop_devices(bench, &place)?;
        compare(bench, "loop", &place, &front_ends)?;
        drop(front_ends);
        place.clear()?;
    }
    Ok(())
}

fn loop_devices(bench: &Bench, place: &Place) -> Result<FrontEnds> {
    let size_bytes = bench.settings.size.0;
    let at = (place, size_bytes);
    let mut all = FrontEnds::default();
    all.add(OURS, &[], at, |file| {
        let agent = Agent::start(bench, place, "a")?;
        agent.create("data", file, "loop")?;
        let target = Target::direct(&agent.device("data"));
        Ok((agent, target))
    })?;
    all.add(("qemu fuse", Part::Peer, Passing::Through), &["qemu-storage-daemon"], at, |file| {
        let device = qemu_fuse(bench, place, "qemu", file)?;
        let target = Target::direct(&device.device.path);
        Ok((device, target))
    })?;
    all.add(("nbdfuse qemu-nbd", Part::Peer, Passing::Through), &["nbdfuse", "qemu-nbd"], at, |file| {
        let device = nbdfuse(bench, "fuse-qemu", qemu_nbd(bench, place, "fuse-qemu-nbd", file)?, size_bytes)?;
        let target = Target::direct(&device.device.path);
        Ok((device, target))
    })?;
    all.add(("nbdfuse nbdkit", Part::Peer, Passing::Cached), &["nbdfuse", "nbdkit"], at, |file| {
        let device = nbdfuse(bench, "fuse-nbdkit", nbdkit(bench, place, "fuse-kit", file)?, size_bytes)?;
        let target = Target::direct(&device.device.path);
        Ok((device, target))
    })?;
    all.add((PLAIN_LOOP, Part::Limit, Passing::Through), &[], at, |file| {
        let device = LoopDevice::attach(file)?;
        let target = Target::direct(&device.path);
        Ok((device, target))
    })?;
    Ok(all)
}

/// All jobs, with their bars.
fn compare(bench: &Bench, group: &'static str, place: &Place, front_ends: &FrontEnds) -> Result<()> {
    for job in Job::FRONT_END {
        let contestants = front_ends.contestants(job, place, bench.settings.seconds);
        let outcome = bench.compare(group, place.name(), job.words(), contestants)?;
        let table = outcome.table(job.quantity());
        let best = table.ratio_to_best();
        let wanted = match (group, job.depth) {
            ("nbd", 32) if !place.is_disk() => 1.2,
            ("loop", 32) => 1.5,
            _ => 1.0,
        };
        let about = format!("{group}, {}: {}", place.name(), job.words());
        let measure =
            best.map_or_else(|| "the best peer".to_owned(), |(_, name)| format!("{name}, the best peer"));
        bench.bar(&about, measure, Wanted::AtLeast(wanted), best.map(|(ratio, _)| ratio));
        if group == "nbd" {
            bench.bar_to_before(&about, table.ratio_to(BEFORE));
        }
        let limit = if group == "loop" { PLAIN_LOOP } else { THE_FILE };
        bench.bar(about, limit, Wanted::Told, table.ratio_to(limit));
    }
    Ok(())
}
