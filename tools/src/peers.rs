//! `blockmirror peers`: lists the other hosts of a volume, with the fingerprints to compare by eye.

use crate::client::Client;
use crate::output::{Error, Output, aligned};
use crate::status::connection;
use blockmirror_agent::config::Name;
use blockmirror_agent::control::api::{PeerStatus, PeersRequest};
use clap::Args;

/// Of which volume.
#[derive(Args)]
pub struct Arguments {
    /// The volume
    name: Name,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Lists the peers.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let reply = client.ask(&arguments.name, &PeersRequest).await?;
    if arguments.json {
        return Ok(output.json(&reply)?);
    }
    if reply.peers.is_empty() {
        return Ok(output.line(&format!("{} has no peers; blockmirror invite {0} asks one", reply.volume))?);
    }
    output.lines(&aligned(&reply.peers.iter().map(row).collect::<Vec<_>>()))?;
    Ok(())
}

fn row(peer: &PeerStatus) -> Vec<String> {
    let addresses: Vec<&str> = peer.addresses.iter().map(|address| address.as_str()).collect();
    vec![
        peer.name.to_string(),
        peer.role.to_string(),
        connection(peer.connection).to_owned(),
        addresses.join(" "),
        peer.fingerprint.clone(),
    ]
}
