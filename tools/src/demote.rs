//! `blockmirror demote`: makes this primary a replica, in order.

use crate::client::Client;
use crate::output::{Error, Output};
use blockmirror_agent::config::Name;
use blockmirror_agent::control::api::DemoteRequest;
use clap::Args;

/// What to demote.
#[derive(Args)]
pub struct Arguments {
    /// The volume
    name: Name,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Has the agent demote, and says where the volume can be promoted.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let Arguments { name, json } = arguments;
    let done = client.ask(&name, &DemoteRequest).await?;
    if json {
        return Ok(output.json(&done)?);
    }
    output.line(&format!("demoted {name}; nobody is the primary now"))?;
    for host in &done.released {
        output.line(&format!("{host} has everything; to go on there: blockmirror promote {name}"))?;
    }
    for host in &done.unreleased {
        output.line(&format!("{host} may lack something, and is promoted with --force only"))?;
    }
    Ok(())
}
