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

impl Arguments {
    /// The peer, as the agent is told of it.
    pub fn peer(self) -> PeerOf {
        PeerOf { volume: self.name, peer: self.peer }
    }
}

/// Has the agent stop.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let subject = arguments.peer();
    let answer = client.ask(&subject, &PauseRequest).await?;
    output.line(&format!("paused {} with {}", subject.volume, answer.name))?;
    Ok(())
}
