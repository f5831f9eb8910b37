//! `blockmirror remove-peer`: makes a host none of a volume's any more.

use crate::client::Client;
use crate::output::{Error, Output};
use blockmirror_agent::config::Name;
use blockmirror_agent::control::api::RemovePeerRequest;
use blockmirror_agent::control::verbs::PeerOf;
use clap::Args;

/// Whom to remove.
#[derive(Args)]
pub struct Arguments {
    /// The volume
    name: Name,
    /// The host
    peer: Name,
    /// Remove it even if this host then has the only copy, or another host is the primary
    #[arg(long)]
    force: bool,
    /// Only tell what that would do
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Has the agent remove the host, and tells who knows.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let Arguments { name, peer, force, dry_run, json } = arguments;
    let subject = PeerOf { volume: name, peer };
    let done = client.ask(&subject, &RemovePeerRequest { force, dry_run }).await?;
    if json {
        return Ok(output.json(&done)?);
    }
    Ok(output.line(&done.verdict)?)
}
