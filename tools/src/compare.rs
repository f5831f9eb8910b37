//! `blockmirror compare`: compares this host's copy with a peer's, by digests. Fails when they differ, or something can't be
//! read.

use crate::client::Client;
use crate::output::{Bar, Error, Output};
use blockmirror_agent::config::Name;
use blockmirror_agent::control::api::{CompareRequest, Comparison, Failure, FailureKind};
use blockmirror_agent::control::verbs::PeerOf;
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
    let subject = PeerOf { volume: name, peer };
    let comparison = tokio::select! {
        answer = client.ask(&subject, &CompareRequest) => answer?,
        never = show_progress(client, &subject) => match never {},
    };
    let PeerOf { volume, peer } = subject;
    match json {
        true => output.json(&comparison)?,
        false => output.lines(&lines(&comparison))?,
    }
    let message = match (comparison.different_bytes, comparison.unreadable_bytes) {
        (0, 0) => return Ok(()),
        (0, _) => format!("a part of {volume} can't be read here"),
        _ => format!("{volume} differs from the copy on {peer}"),
    };
    Err(Failure::new(FailureKind::Failed, message).into())
}

fn lines(comparison: &Comparison) -> Vec<String> {
    let mut lines = vec![format!("{} (took {})", comparison.verdict, Seconds(comparison.seconds))];
    for (ranges, what) in
        [(&comparison.ranges, ""), (&comparison.unreadable, ", in which something can't be read")]
    {
        for range in ranges.iter().take(SHOWN_RANGES) {
            lines.push(format!("  {} at byte {}{what}", Size(range.length), range.offset));
        }
        if ranges.len() > SHOWN_RANGES {
            lines.push(format!("  and {} more ranges{what}; --json lists them", ranges.len() - SHOWN_RANGES));
        }
    }
    if comparison.action != blockmirror_agent::verdict::NO_ACTION {
        lines.push(format!("action: {}", comparison.action));
    }
    lines
}

/// Follows the comparison in the status until it is dropped. A status that fails is left to the comparison's own answer.
async fn show_progress(client: &Client, PeerOf { volume, peer }: &PeerOf) -> Infallible {
    let bar = Bar::new(&format!("comparing {volume} with {peer}"));
    let mut second = tokio::time::interval(Duration::from_secs(1));
    loop {
        second.tick().await;
        let Ok(reply) = client.status(Some(volume)).await else { continue };
        let peers = reply.volumes.iter().flat_map(|volume| &volume.facts.peers);
        if let Some(progress) = peers.filter(|other| other.name == *peer).find_map(|peer| peer.compare) {
            bar.show(&progress);
        }
    }
}
