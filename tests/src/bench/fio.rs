//! fio: the one client of everything that takes requests, and the measure of the disk.

use super::comparison::Turn;
use super::processes::{command, run};
use super::quantity::{P50, P99, RATE, SPEED};
use anyhow::{Context, Result, ensure};
use serde_json::Value;
use std::path::{Path, PathBuf};

/// The order of requests.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Pattern {
    /// Random reads.
    RandomRead,
    /// Random writes.
    RandomWrite,
    /// Reads one after the other.
    Read,
    /// Writes one after the other.
    Write,
    /// Random trims.
    RandomTrim,
}

impl Pattern {
    fn name(self) -> &'static str {
        match self {
            Self::RandomRead => "randread",
            Self::RandomWrite => "randwrite",
            Self::Read => "read",
            Self::Write => "write",
            Self::RandomTrim => "randtrim",
        }
    }

    /// Whether it writes.
    #[must_use]
    pub fn writes(self) -> bool {
        matches!(self, Self::RandomWrite | Self::Write)
    }
}

/// What to ask for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Job {
    /// In which order.
    pub pattern: Pattern,
    /// The size of a request in bytes.
    pub block_bytes: u64,
    /// How many are under way at a time.
    pub depth: u32,
    /// Whether each write is followed by a flush, which is measured by itself.
    pub flushes: bool,
    /// How many requests there are per second at most.
    pub rate: Option<u32>,
}

impl Job {
    /// A job that never flushes, at full speed.
    #[must_use]
    pub const fn new(pattern: Pattern, block_bytes: u64, depth: u32) -> Self {
        Self { pattern, block_bytes, depth, flushes: false, rate: None }
    }

    /// What is asked of every front end: 4 KiB at random at depth 1 and 32, 128 KiB in order at depth 8.
    pub const FRONT_END: [Self; 6] = [
        Self::new(Pattern::RandomRead, 4 << 10, 1),
        Self::new(Pattern::RandomWrite, 4 << 10, 1),
        Self::new(Pattern::RandomRead, 4 << 10, 32),
        Self::new(Pattern::RandomWrite, 4 << 10, 32),
        Self::new(Pattern::Read, 128 << 10, 8),
        Self::new(Pattern::Write, 128 << 10, 8),
    ];

    /// Those of them that write.
    pub fn writing() -> impl Iterator<Item = Self> {
        Self::FRONT_END.into_iter().filter(|job| job.pattern.writes())
    }

    /// In words.
    #[must_use]
    pub fn words(&self) -> String {
        let order = match self.pattern {
            Pattern::RandomRead => "random read",
            Pattern::RandomWrite => "random write",
            Pattern::Read => "sequential read",
            Pattern::Write => "sequential write",
            Pattern::RandomTrim => "random trim",
        };
        format!("{} KiB {order}, depth {}", self.block_bytes >> 10, self.depth)
    }

    /// Whether requests are so large that bytes are what counts.
    #[must_use]
    pub fn is_large(&self) -> bool {
        self.block_bytes > 16 << 10
    }

    /// What a bar is about: bytes per second of large requests, else requests per second.
    #[must_use]
    pub fn quantity(&self) -> super::quantity::Quantity {
        if self.is_large() { SPEED } else { RATE }
    }
}

/// What to send the requests to.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Target {
    /// An NBD export.
    Nbd(String),
    /// A file or a block device, with direct I/O where that is possible.
    File {
        /// Its path.
        path: PathBuf,
        /// Whether the page cache is passed by.
        is_direct: bool,
    },
}

impl Target {
    /// A file or a device with direct I/O.
    #[must_use]
    pub fn direct(path: &Path) -> Self {
        Self::File { path: path.to_owned(), is_direct: true }
    }
}

/// How long a job goes on.
#[derive(Clone, Copy, PartialEq, Debug)]
pub enum Extent {
    /// For so many seconds.
    Seconds(u64),
    /// For so many seconds at most, and until everything was read once: a second time would be from the page cache.
    Once(u64),
    /// Until so many bytes were moved.
    Bytes(u64),
}

/// What fio measured. Times are in seconds.
#[derive(Clone, Copy, PartialEq, Debug, Default)]
pub struct Measured {
    /// Requests per second.
    pub rate: f64,
    /// Bytes per second.
    pub speed: f64,
    /// How long it took, a flush at the end included.
    pub seconds: f64,
    /// The middle of all latencies.
    pub p50: f64,
    /// What one request in a hundred exceeded.
    pub p99: f64,
    /// The same of flushes, where there were some.
    pub flush_p50: f64,
    /// The same of flushes, where there were some.
    pub flush_p99: f64,
}

impl Measured {
    /// What a comparison of front ends keeps.
    #[must_use]
    pub fn turn(&self, job: &Job) -> Turn {
        let main = if job.is_large() { (SPEED, self.speed) } else { (RATE, self.rate) };
        Turn::new([main, (P50, self.p50), (P99, self.p99)])
    }
}

/// Runs a job against one target, or against several at the same time, each by a process of its own; then rates and
/// speeds are those of one of them on average, and latencies those of all.
///
/// # Errors
/// When fio fails, or the bench is interrupted.
pub fn measure(job: &Job, targets: &[Target], extent: Extent) -> Result<Measured> {
    let mut fio = command("fio", ["--output-format=json", "--group_reporting", "--percentile_list=50:99"]);
    fio.args(["--randrepeat=0", "--thread", "--fallocate=none"]);
    fio.arg(format!("--rw={}", job.pattern.name()));
    fio.arg(format!("--bs={}", job.block_bytes)).arg(format!("--iodepth={}", job.depth));
    match extent {
        Extent::Seconds(seconds) => {
            fio.args(["--time_based", "--ramp_time=300ms"]).arg(format!("--runtime={seconds}"));
        }
        Extent::Once(seconds) => {
            fio.arg(format!("--runtime={seconds}"));
        }
        Extent::Bytes(bytes) => {
            fio.arg(format!("--io_size={bytes}"));
        }
    }
    if job.pattern.writes() {
        fio.arg("--end_fsync=1");
    }
    if let Some(rate) = job.rate {
        fio.arg(format!("--rate_iops={rate}"));
    }
    for (number, target) in targets.iter().enumerate() {
        fio.arg(format!("--name=job{number}"));
        match target {
            Target::Nbd(uri) => {
                // NBD has one kind of flush, and fio's engine knows it by this name only.
                fio.args(job.flushes.then_some("--fsync=1"));
                fio.arg("--ioengine=nbd").arg(format!("--uri={uri}"))
            }
            Target::File { path, is_direct } => {
                let engine = if job.depth == 1 { "psync" } else { "io_uring" };
                fio.args(job.flushes.then_some("--fdatasync=1"));
                fio.arg(format!("--ioengine={engine}"));
                fio.arg(format!("--direct={}", u8::from(*is_direct)));
                fio.arg("--filename").arg(path)
            }
        };
    }
    let output = run(&mut fio)?;
    understand(&output.stdout, job, targets.len())
}

fn understand(output: &[u8], job: &Job, jobs: usize) -> Result<Measured> {
    // Before the JSON there may be warnings.
    let begin = output.iter().position(|byte| *byte == b'{').context("fio said nothing")?;
    let value: Value = serde_json::from_slice(&output[begin..]).context("fio's words are no JSON")?;
    let result = &value["jobs"][0];
    ensure!(result["error"] == 0, "fio failed: {}", String::from_utf8_lossy(output));
    let direction = &result[match job.pattern {
        Pattern::RandomRead | Pattern::Read => "read",
        Pattern::RandomWrite | Pattern::Write => "write",
        Pattern::RandomTrim => "trim",
    }];
    let number = |value: &Value| value.as_f64().unwrap_or(0.0);
    let percentile = |latency: &Value, name: &str| number(&latency["percentile"][name]) / 1e9;
    let (answered, flush) = (&direction["clat_ns"], &result["sync"]["lat_ns"]);
    Ok(Measured {
        rate: number(&direction["iops"]) / jobs as f64,
        speed: number(&direction["bw_bytes"]) / jobs as f64,
        seconds: number(&direction["runtime"]) / 1e3,
        p50: percentile(answered, "50.000000"),
        p99: percentile(answered, "99.000000"),
        flush_p50: percentile(flush, "50.000000"),
        flush_p99: percentile(flush, "99.000000"),
    })
}
