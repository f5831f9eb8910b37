//! Copying a whole volume of random data to a new host, and back: against programs that copy a file over the network,
//! against what the disk reads and writes, and against what raw quinn carries.
//!
//! Everybody copies the same file, which the page cache has forgotten, into a new file, and has ended when the copy is
//! durable. Before each copy, memory for it is used and given back, so that nobody pays for the host's.

use crate::bench::Bench;
use crate::bench::agent::Agent;
use crate::bench::comparison::{Contestant, Outcome, Part, Table, Turn};
use crate::bench::fio::{Extent, Job, Pattern, Target, measure};
use crate::bench::mirror::Mirror;
use crate::bench::peers::{missing, qemu_nbd_tcp, tls_keys};
use crate::bench::place::{Place, drop_cache, warm_memory};
use crate::bench::processes::{self, command};
use crate::bench::quantity::{Quantity, SPEED, Unit};
use crate::bench::quic::RawQuic;
use crate::bench::report::Wanted;
use crate::bench::rsync::{Daemon, Secure};
use anyhow::{Context, Result, ensure};
use std::cell::RefCell;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

const SYNC: &str = "initial sync";
const RECOVER: &str = "recover";
const READ: &str = "disk read";
const WRITE: &str = "disk write";
const BOTH_WAYS: &str = "disk read and write at once";
const QUIC: &str = "raw quinn";
const NBDCOPY: &str = "nbdcopy";
const NBDCOPY_TLS: &str = "nbdcopy, TLS";
const QEMU_IMG: &str = "qemu-img convert";
const RSYNC: &str = "rsync";
const RSYNC_SSH: &str = "rsync, ssh";

/// How long was waited until the replica was known to be one, before anything was copied.
const JOINED: Quantity = Quantity::detail("until joined", Unit::Seconds);

/// What is copied, and where to.
struct Copying<'a> {
    bench: &'a Bench,
    place: &'a Place,
    source: PathBuf,
    size_bytes: u64,
}

/// Measures the group, and reports it.
///
/// # Errors
/// When something can't be set up, or the bench is interrupted.
pub fn run(bench: &Bench) -> Result<()> {
    for place in bench.places()? {
        let outcome = compare(bench, &place)?;
        bars(bench, &place, &outcome);
        place.clear()?;
    }
    Ok(())
}

fn compare(bench: &Bench, place: &Place) -> Result<Outcome> {
    let size_bytes = bench.settings.size.0;
    let source = place.filled("source.img", size_bytes)?;
    let quic = RawQuic::start(bench)?;
    let work = format!("{} of random data", blockmirror_agent::quantity::Size(size_bytes));
    let mirror = RefCell::new(None);
    let copying = Copying { bench, place, source, size_bytes };
    let mut contestants = vec![
        Contestant::new(SYNC, Part::Ours, || copying.initial_sync(&mirror)),
        Contestant::new(RECOVER, Part::Ours, || copying.recover(&mirror)),
    ];
    contestants.extend(copying.nbd_clients()?);
    contestants.extend(copying.rsync()?);
    let job = |pattern| Job::new(pattern, 1 << 20, 8);
    contestants
        .push(Contestant::new(READ, Part::Limit, || copying.disk(&job(Pattern::Read), &copying.source)));
    contestants.push(Contestant::new(WRITE, Part::Limit, || {
        copying.disk(&job(Pattern::Write), &copying.new_target()?)
    }));
    contestants.push(Contestant::new(BOTH_WAYS, Part::Limit, || copying.disk_both_ways(&job)));
    contestants.push(Contestant::new(QUIC, Part::Limit, || {
        Ok(Turn::new([(SPEED, size_bytes as f64 / quic.send(size_bytes)?)]))
    }));
    bench.compare("copy", place.name(), work, contestants)
}

impl<'a> Copying<'a> {
    /// A new file to copy into.
    fn new_target(&self) -> Result<PathBuf> {
        self.place.sparse("target.img", self.size_bytes)
    }

    /// What goes before each turn.
    fn prepare(&self, source: &Path) -> Result<()> {
        drop_cache(source)?;
        warm_memory(2 * self.size_bytes);
        Ok(())
    }

    fn turn(&self, seconds: f64) -> Turn {
        Turn::new([(SPEED, self.size_bytes as f64 / seconds)])
    }

    fn disk(&self, job: &Job, file: &Path) -> Result<Turn> {
        self.prepare(&self.source)?;
        let target = Target::File { path: file.to_owned(), is_direct: self.place.is_direct };
        let measured = measure(job, &[target], Extent::Bytes(self.size_bytes))?;
        Ok(self.turn(measured.seconds))
    }

    /// What a copy on one disk comes down to: one file is read while another is written.
    fn disk_both_ways(&self, job: &impl Fn(Pattern) -> Job) -> Result<Turn> {
        self.prepare(&self.source)?;
        let target = |path| [Target::File { path, is_direct: self.place.is_direct }];
        let (from, to) = (target(self.source.clone()), target(self.new_target()?));
        let (reading, writing) = (job(Pattern::Read), job(Pattern::Write));
        let extent = Extent::Bytes(self.size_bytes);
        let (read, written) = std::thread::scope(|scope| {
            let reader = scope.spawn(|| measure(&reading, &from, extent));
            let written = measure(&writing, &to, extent);
            (reader.join().expect("measuring doesn't panic"), written)
        });
        Ok(self.turn(read?.seconds.max(written?.seconds)))
    }

    /// Makes a volume of the file and a replica of it. The time is from the command to join until nothing is missing.
    fn initial_sync(&self, made: &RefCell<Option<Mirror>>) -> Result<Turn> {
        // That of the turn before is still there where nothing was recovered from it.
        drop(made.take());
        self.prepare(&self.source)?;
        let target = self.place.path("replica.img");
        let (mirror, times) = Mirror::new(self.bench, self.place, &self.source, &target)?;
        *made.borrow_mut() = Some(mirror);
        Ok(self.turn(times.synced).with(JOINED, times.joined))
    }

    /// Fetches the content back from the replica that the turn before made. The digests of both sides are compared at
    /// the end, which is part of the time.
    fn recover(&self, made: &RefCell<Option<Mirror>>) -> Result<Turn> {
        let mirror = made.take().context("the initial sync has failed")?;
        self.prepare(&self.place.path("replica.img"))?;
        // A replica that is being written to is not recovered from.
        mirror.pause()?;
        let token = mirror.replica.tool(&["invite", "data"])?;
        let host = Agent::prepare(self.bench, self.place, "c")?;
        let target = self.place.path("recovered.img");
        let to = target.to_str().context("paths are text")?;
        let began = Instant::now();
        host.tool(&["recover", "data", "--token", token.trim(), "--to", to])?;
        let seconds = began.elapsed().as_secs_f64();
        ensure!(target.metadata()?.len() == self.size_bytes, "not all of it was recovered");
        std::fs::remove_file(&target)?;
        Ok(self.turn(seconds))
    }

    /// A copier from the file to an NBD server on TCP.
    fn nbd_client(
        &'a self,
        name: &'static str,
        keys: Option<PathBuf>,
        client: impl Fn(&str) -> Command + 'a,
    ) -> Contestant<'a> {
        let (bench, place) = (self.bench, self.place);
        Contestant::new(name, Part::Peer, move || {
            self.prepare(&self.source)?;
            let target = self.new_target()?;
            let (export, _) = qemu_nbd_tcp(bench, place, "target", &target, keys.as_deref())?;
            let began = Instant::now();
            processes::run(&mut client(&export.uri))?;
            Ok(self.turn(began.elapsed().as_secs_f64()))
        })
    }

    fn nbd_clients(&'a self) -> Result<Vec<Contestant<'a>>> {
        let nbdcopy = |uri: &str| {
            let mut nbdcopy = command("nbdcopy", ["--flush"]);
            nbdcopy.arg(&self.source).arg(uri);
            nbdcopy
        };
        let convert = |uri: &str| {
            let cache = if self.place.is_direct { "none" } else { "writeback" };
            let mut convert = command("qemu-img", ["convert", "-n", "-f", "raw", "-O", "raw", "-T", cache]);
            convert.arg(&self.source).arg(uri);
            convert
        };
        let keys = tls_keys(self.bench)?;
        let all = [
            (["nbdcopy", "qemu-nbd"], self.nbd_client(NBDCOPY, None, nbdcopy)),
            (["nbdcopy", "qemu-nbd"], self.nbd_client(NBDCOPY_TLS, Some(keys), nbdcopy)),
            (["qemu-img", "qemu-nbd"], self.nbd_client(QEMU_IMG, None, convert)),
        ];
        let if_there = |(programs, contestant): ([&str; 2], Contestant<'a>)| match missing(&programs) {
            None => contestant,
            Some(reason) => Contestant::skipped(contestant.name, Part::Peer, reason),
        };
        Ok(all.into_iter().map(if_there).collect())
    }

    fn rsync(&'a self) -> Result<Vec<Contestant<'a>>> {
        let mut all = Vec::new();
        all.push(match missing(&["rsync"]) {
            Some(reason) => Contestant::skipped(RSYNC, Part::Peer, reason),
            None => {
                let daemon = Daemon::start(self.bench, &self.place.folder)?;
                Contestant::new(RSYNC, Part::Peer, move || self.rsync_turn(daemon.command(&self.source)))
            }
        });
        all.push(match missing(&["rsync", "ssh", "ssh-keygen", "sshd"]) {
            Some(reason) => Contestant::skipped(RSYNC_SSH, Part::Peer, reason),
            None => match Secure::start(self.bench) {
                Ok(server) => Contestant::new(RSYNC_SSH, Part::Peer, move || {
                    self.rsync_turn(server.command(&self.source, &self.place.folder))
                }),
                Err(error) => Contestant::skipped(RSYNC_SSH, Part::Peer, format!("{error:#}")),
            },
        });
        Ok(all)
    }

    fn rsync_turn(&self, mut command: Command) -> Result<Turn> {
        self.prepare(&self.source)?;
        let target = self.place.path("rsync.img");
        let began = Instant::now();
        processes::run(&mut command)?;
        let turn = self.turn(began.elapsed().as_secs_f64());
        std::fs::remove_file(target)?;
        Ok(turn)
    }
}

/// The value of a contestant as a multiple of another's.
fn between(table: &Table, one: &str, other: &str) -> Option<f64> {
    crate::bench::statistics::ratio(table.median(one)?, table.median(other)?)
}

fn bars(bench: &Bench, place: &Place, outcome: &Outcome) {
    let table = outcome.table(SPEED);
    for work in [SYNC, RECOVER] {
        let about = format!("copy, {}: {work}", place.name());
        if place.is_disk() {
            let disk = [READ, WRITE].into_iter().filter_map(|limit| between(&table, work, limit));
            let disk = disk.reduce(f64::max);
            let quic = between(&table, work, QUIC);
            // Of two limits the nearer one counts.
            let reached = [disk.map(|ratio| ratio / 0.9), quic.map(|ratio| ratio / 0.7)];
            let best = reached.into_iter().flatten().reduce(f64::max);
            bench.bar(
                &about,
                "0.9 of the disk's slower direction, or 0.7 of raw quinn",
                Wanted::AtLeast(1.0),
                best,
            );
            bench.bar(&about, "the disk's slower direction", Wanted::Told, disk);
            bench.bar(&about, BOTH_WAYS, Wanted::Told, between(&table, work, BOTH_WAYS));
            bench.bar(&about, QUIC, Wanted::Told, quic);
        }
        let wanted = [
            (NBDCOPY, 1.0),
            (QEMU_IMG, 1.0),
            (NBDCOPY_TLS, 3.0),
            (RSYNC, 2.0),
            (RSYNC_SSH, 2.0),
            (QUIC, 0.7),
        ];
        for (peer, least) in wanted {
            let is_bar = !place.is_disk() && !matches!(peer, RSYNC_SSH | QUIC);
            let wanted = if is_bar { Wanted::AtLeast(least) } else { Wanted::Told };
            if !(place.is_disk() && peer == QUIC) {
                bench.bar(&about, peer, wanted, between(&table, work, peer));
            }
        }
    }
}
