//! `blockmirror resume`: goes on mirroring with a peer.

use crate::client::Client;
use crate::output::{Error, Output};
use blockmirror_agent::config::Name;
use blockmirror_agent::control::api::ResumeRequest;
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

/// Has the agent go on.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let Arguments { name, peer } = arguments;
    let subject = PeerOf { volume: name, peer };
    let answer = client.ask(&subject, &ResumeRequest).await?;
    output.line(&format!("resumed {} with {}", subject.volume, answer.name))?;
    Ok(())
}
