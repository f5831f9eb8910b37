//! `blockmirror pause` and `blockmirror resume`: stop and go on mirroring with a peer.

use crate::client::Client;
use crate::output::{Error, Output};
use blockmirror_agent::config::Name;
use blockmirror_agent::control::api::PeerStatus;
use clap::Args;

/// Which mirroring.
#[derive(Args)]
pub struct Arguments {
    /// The volume
    name: Name,
    /// The peer
    peer: Name,
}

/// What the operator wants.
pub enum Wish {
    /// Stop mirroring.
    Pause,
    /// Go on.
    Resume,
}

/// Asks the agent to stop or go on.
pub async fn run(
    wish: Wish,
    arguments: Arguments,
    client: &Client,
    output: &mut Output,
) -> Result<(), Error> {
    let Arguments { name, peer } = arguments;
    let (verb, done) = match wish {
        Wish::Pause => ("pause", "paused"),
        Wish::Resume => ("resume", "resumed"),
    };
    let answer: PeerStatus = client.post(&format!("/v1/volumes/{name}/peers/{peer}/{verb}")).await?;
    output.line(&format!("{done} {name} with {}", answer.name))?;
    Ok(())
}
