//! A primary and a replica on this machine.

use super::Bench;
use super::agent::{Agent, is_in_sync};
use super::fio::{Extent, Job, Pattern, Target, measure};
use super::network::Namespace;
use super::place::Place;
use super::processes::{PATIENCE, until};
use anyhow::{Context, Result};
use blockmirror_agent::control::api::PeerStatus;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Instant;

/// A volume with a replica, both served by agents of ours.
pub struct Mirror {
    /// The primary, which serves the volume `data` over NBD.
    pub primary: Agent,
    /// Its replica.
    pub replica: Agent,
}

/// How long the first sync took, in seconds.
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct FirstSync {
    /// From the command to join until that has ended.
    pub joined: f64,
    /// From the command to join until nothing was missing.
    pub synced: f64,
}

impl Mirror {
    /// A volume of a file that exists, and a replica in a file that is made.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn new(bench: &Bench, place: &Place, source: &Path, target: &Path) -> Result<(Self, FirstSync)> {
        let agents = [Agent::prepare(bench, place, "a")?, Agent::prepare(bench, place, "b")?];
        Self::of(agents, source, target)
    }

    /// The same, by programs of another release.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn of_release(
        bench: &Bench,
        place: &Place,
        programs: &Path,
        source: &Path,
        target: &Path,
    ) -> Result<(Self, FirstSync)> {
        let agent = |name| Ok::<_, anyhow::Error>(Agent::prepare(bench, place, name)?.of_release(programs));
        Self::of([agent("before-a")?, agent("before-b")?], source, target)
    }

    /// The same, in a network of its own whose traffic can be counted.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn in_network(
        bench: &Bench,
        place: &Place,
        network: &Namespace,
        source: &Path,
        target: &Path,
    ) -> Result<(Self, FirstSync)> {
        let agent = |name, port| {
            let address = SocketAddr::from(([127, 0, 0, 1], port));
            Agent::prepare_at(bench, place, name, address, Some(network.name()))
        };
        Self::of([agent("a", 7447)?, agent("b", 7448)?], source, target)
    }

    /// The same, of agents that were prepared.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn of(agents: [Agent; 2], source: &Path, target: &Path) -> Result<(Self, FirstSync)> {
        let (mirror, began) = Self::begin(agents, source, target)?;
        let joined = began.elapsed().as_secs_f64();
        mirror.primary.wait_until_in_sync()?;
        let synced = began.elapsed().as_secs_f64();
        Ok((mirror, FirstSync { joined, synced }))
    }

    /// The same, which has joined and is not waited for. Gives when it began to join, too.
    ///
    /// # Errors
    /// When it can't be made.
    pub fn begin(
        [mut primary, mut replica]: [Agent; 2],
        source: &Path,
        target: &Path,
    ) -> Result<(Self, Instant)> {
        if target.exists() {
            std::fs::remove_file(target)?;
        }
        primary.begin()?;
        primary.create("data", source, "nbd")?;
        replica.begin()?;
        let token = primary.tool(&["invite", "data"])?;
        let target = target.to_str().context("paths are text")?;
        let began = Instant::now();
        replica.tool(&["join", token.trim(), "--backing", target])?;
        Ok((Self { primary, replica }, began))
    }

    /// What requests are sent to.
    #[must_use]
    pub fn target(&self) -> Target {
        Target::Nbd(self.primary.uri("data"))
    }

    /// Ends both agents and starts them again.
    ///
    /// # Errors
    /// When they don't come up.
    pub fn start_again(&mut self) -> Result<()> {
        self.primary.end();
        self.replica.end();
        self.replica.begin()?;
        self.primary.begin()?;
        self.primary.wait_until_in_sync()
    }

    /// Stops mirroring, so that writes mark.
    ///
    /// # Errors
    /// When that fails.
    pub fn pause(&self) -> Result<()> {
        self.primary.wait_until_in_sync()?;
        self.primary.tool(&["pause", "data", self.replica.name()]).map(drop)
    }

    /// Begins to copy what was marked.
    ///
    /// # Errors
    /// When that fails.
    pub fn resume(&self) -> Result<()> {
        self.primary.tool(&["resume", "data", self.replica.name()]).map(drop)
    }

    /// Marks so many random blocks of 4 KiB by trimming them, which takes no room. Returns how many bytes are marked.
    ///
    /// # Errors
    /// When that fails.
    pub fn mark(&self, blocks: u64) -> Result<u64> {
        let job = Job::new(Pattern::RandomTrim, 4096, 32);
        measure(&job, &[self.target()], Extent::Bytes(blocks * 4096))?;
        self.marked()
    }

    /// How many bytes the paused replica lacks.
    ///
    /// # Errors
    /// When the agent doesn't know.
    pub fn marked(&self) -> Result<u64> {
        let look = || Ok(self.primary.peer()?.out_of_sync_bytes.filter(|bytes| *bytes > 0));
        until("something is marked", PATIENCE, look)
    }

    /// How long a paused replica takes to get everything, in seconds.
    ///
    /// # Errors
    /// When that fails.
    pub fn catch_up(&self) -> Result<f64> {
        let began = Instant::now();
        self.resume()?;
        self.primary.wait_until_in_sync()?;
        Ok(began.elapsed().as_secs_f64())
    }

    /// Why what was just written must not count: the replica didn't keep up, and was left behind.
    ///
    /// # Errors
    /// When the agent doesn't answer.
    pub fn fell_behind(&self) -> Result<Option<String>> {
        let peer: PeerStatus = self.primary.peer()?;
        let reason =
            || format!("the window overflowed: {:?}, {:?} bytes", peer.state, peer.out_of_sync_bytes);
        Ok((!is_in_sync(&peer)).then(reason))
    }
}
