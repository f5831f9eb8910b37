//! `blockmirror compare`: compares this host's copy with a peer's, by digests. Fails when they differ.

use crate::client::Client;
use crate::output::{Bar, Error, Output};
use blockmirror_agent::config::Name;
use blockmirror_agent::control::api::{Comparison, Failure, FailureKind};
use blockmirror_agent::quantity::{Seconds, Size};
use clap::Args;
use std::convert::Infallible;
use std::time::Duration;

/// How many different ranges people are shown; `--json` has all that the agent told.
const SHOWN_RANGES: usize = 20;

/// What to compare.
#[derive(Args)]
pub struct Arguments {
    /// The volume
    name: Name,
    /// The peer whose copy to compare with
    peer: Name,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Compares, and shows how far it is meanwhile.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let Arguments { name, peer, json } = arguments;
    let path = format!("/v1/volumes/{name}/peers/{peer}/compare");
    let comparison: Comparison = tokio::select! {
        answer = client.post(&path) => answer?,
        never = show_progress(client, &name, &peer) => match never {},
    };
    match json {
        true => output.json(&comparison)?,
        false => output.lines(&lines(&comparison))?,
    }
    match comparison.different_bytes {
        0 => Ok(()),
        _ => Err(Failure::new(FailureKind::Failed, format!("{name} differs from the copy on {peer}")).into()),
    }
}

fn lines(comparison: &Comparison) -> Vec<String> {
    let mut lines = vec![format!("{} (took {})", comparison.verdict, Seconds(comparison.seconds))];
    for range in comparison.ranges.iter().take(SHOWN_RANGES) {
        lines.push(format!("  {} at byte {}", Size(range.length), range.offset));
    }
    if comparison.ranges.len() > SHOWN_RANGES {
        lines
            .push(format!("  and {} more ranges; --json lists them", comparison.ranges.len() - SHOWN_RANGES));
    }
    if comparison.action != blockmirror_agent::verdict::NO_ACTION {
        lines.push(format!("action: {}", comparison.action));
    }
    lines
}

/// Follows the comparison in the status until it is dropped. A status that fails is left to the comparison's own answer.
async fn show_progress(client: &Client, name: &Name, peer: &Name) -> Infallible {
    let bar = Bar::new(&format!("comparing {name} with {peer}"));
    let mut second = tokio::time::interval(Duration::from_secs(1));
    loop {
        second.tick().await;
        let Ok(reply) = client.status(Some(name)).await else { continue };
        let peers = reply.volumes.iter().flat_map(|volume| &volume.facts.peers);
        if let Some(progress) = peers.filter(|other| other.name == *peer).find_map(|peer| peer.compare) {
            bar.show(&progress);
        }
    }
}
