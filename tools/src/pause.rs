//! `blockmirror pause`: stops mirroring with a peer.

use crate::client::Client;
use crate::output::{Error, Output};
use blockmirror_agent::config::Name;
use blockmirror_agent::control::api::PauseRequest;
use blockmirror_agent::control::verbs::PeerOf;
use clap::Args;

/// Which mirroring.
#[derive(Args)]
pub struct Arguments {
    /// The volume
    name: Name,
    /// The peer
    peer: Name,
}

/// Has the agent stop.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let Arguments { name, peer } = arguments;
    let subject = PeerOf { volume: name, peer };
    let answer = client.ask(&subject, &PauseRequest).await?;
    output.line(&format!("paused {} with {}", subject.volume, answer.name))?;
    Ok(())
}
