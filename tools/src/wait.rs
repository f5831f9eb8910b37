//! `blockmirror wait`: waits until the replicas of a volume have everything, or until its device can be opened.

use crate::client::Client;
use crate::output::{Bar, Error, Output};
use blockmirror_agent::config::{Name, Role};
use blockmirror_agent::control::api::{Failure, FailureKind, PeerStatus, VolumeState, VolumeStatus};
use blockmirror_agent::quantity::Seconds;
use clap::{Args, ValueEnum};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// How often the agent is asked.
const INTERVAL: Duration = Duration::from_millis(250);
/// How soon after the first time: by then a replica in sync has spoken.
const FIRST_INTERVAL: Duration = Duration::from_millis(20);

/// What to wait for.
#[derive(Args)]
pub struct Arguments {
    /// The volume
    name: Name,
    /// What to wait for
    #[arg(long = "for", value_name = "GOAL")]
    goal: Goal,
    /// Give up after this time, such as 10m; by default never
    #[arg(long, value_name = "TIME")]
    timeout: Option<Seconds>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Goal {
    /// Every replica has everything
    InSync,
    /// The volume's devices can be opened here, also where its disk comes late
    Device,
}

/// Asks until it is so.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let Arguments { name, goal, timeout } = arguments;
    let started = Instant::now();
    let bar = Bar::new(&format!("copying {name}"));
    // What was written before is in this epoch or in an earlier one.
    let (mut epoch, mut is_asked_again) = (None, false);
    // A replica that has just died is noticed late: each must say once more that it has everything.
    let mut heard: BTreeMap<Name, Option<u64>> = BTreeMap::new();
    loop {
        let reply = client.status(Some(&name)).await?;
        let Some(volume) = reply.volumes.first() else { return Err(Failure::no_such_volume(&name).into()) };
        if matches!(goal, Goal::Device) {
            if is_served(volume)? {
                return Ok(output.line(&format!("{name}  {}", volume.verdict))?);
            }
            give_up_after(timeout, started, || format!("{name} is not served yet; {}", volume.verdict))?;
            tokio::time::sleep(INTERVAL).await;
            continue;
        }
        let epoch = *epoch.get_or_insert(volume.facts.epoch);
        let mut has_spoken = |peer: &PeerStatus| {
            let before = *heard.entry(peer.name.clone()).or_insert(peer.heard);
            peer.heard.is_none() || peer.heard > before
        };
        let has_all = |peer: &PeerStatus| has_arrived(peer, epoch) && has_spoken(peer);
        if is_in_sync(volume)? && volume.facts.peers.iter().all(has_all) {
            drop(bar);
            return Ok(output.line(&format!("{name}  {}", volume.verdict))?);
        }
        give_up_after(timeout, started, || format!("{name} is not in sync yet; {}", volume.verdict))?;
        if let Some(progress) = volume.facts.peers.iter().find_map(|peer| peer.resync) {
            bar.show(&progress);
        }
        let is_first = !std::mem::replace(&mut is_asked_again, true);
        tokio::time::sleep(if is_first { FIRST_INTERVAL } else { INTERVAL }).await;
    }
}

fn give_up_after(
    timeout: Option<Seconds>,
    started: Instant,
    message: impl FnOnce() -> String,
) -> Result<(), Failure> {
    match timeout {
        Some(timeout) if started.elapsed() >= Duration::from_secs(timeout.0) => {
            Err(Failure::new(FailureKind::Timeout, message()))
        }
        _ => Ok(()),
    }
}

/// Whether applications can open the volume; an error where waiting does not help.
fn is_served(volume: &VolumeStatus) -> Result<bool, Failure> {
    let facts = &volume.facts;
    let failed = |message: String| Err(Failure::new(FailureKind::Failed, message));
    if facts.health.mistake.is_some() {
        return failed(volume.verdict.clone());
    }
    if facts.role == Role::Replica && facts.succession.change.is_none() {
        return failed(
            "this host is a replica of the volume, and serves no device; wait on the primary".to_owned(),
        );
    }
    Ok(facts.role == Role::Primary
        && !facts.devices.is_empty()
        && facts.devices.iter().all(|device| device.error.is_none()))
}

/// Whether everything up to an epoch is durable on a peer. A replica in sync may still be owed the latest writes.
fn has_arrived(peer: &PeerStatus, epoch: Option<u64>) -> bool {
    peer.lag_bytes == Some(0)
        || epoch.is_some_and(|epoch| peer.durable_epoch.is_some_and(|durable| durable >= epoch))
}

/// Whether every replica has everything; an error where waiting does not help.
fn is_in_sync(volume: &VolumeStatus) -> Result<bool, Failure> {
    let facts = &volume.facts;
    if facts.role == Role::Replica {
        let primary = facts.peers.iter().find(|peer| peer.role == Role::Primary);
        let place = primary.map_or_else(|| "the primary".to_owned(), |peer| peer.name.to_string());
        let message = format!("only the primary knows what its replicas lack; wait on {place}");
        return Err(Failure::new(FailureKind::Failed, message));
    }
    match volume.state {
        VolumeState::Healthy => Ok(true),
        VolumeState::Failed => Err(Failure::new(FailureKind::Failed, volume.verdict.clone())),
        _ => Ok(false),
    }
}
