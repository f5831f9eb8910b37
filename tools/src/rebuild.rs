//! `blockmirror rebuild`: another disk for a primary, which serves at once and is filled meanwhile.

use crate::client::Client;
use crate::output::{Error, Output};
use blockmirror_agent::config::Name;
use blockmirror_agent::control::api::RebuildRequest;
use clap::Args;
use std::path::PathBuf;

/// What to rebuild, and on what.
#[derive(Args)]
pub struct Arguments {
    /// The volume
    name: Name,
    /// The disk or image file that is to hold the content on this host; an image is made
    #[arg(long, value_name = "PATH")]
    backing: PathBuf,
    /// The host to rebuild from; by default one that none has later content than
    #[arg(long, value_name = "HOST")]
    from: Option<Name>,
    /// Destroy what is on the disk, and give this host's copy up where it is a good one
    #[arg(long)]
    overwrite: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Has the agent begin, and says what happens next.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let Arguments { name, backing, from, overwrite, json } = arguments;
    let backing = std::path::absolute(&backing)?;
    let begun = client.ask(&name, &RebuildRequest { backing, from, overwrite }).await?;
    if json {
        return Ok(output.json(&begun)?);
    }
    output.line(&format!(
        "{name} is served from {} from now on, and copied to {} meanwhile",
        begun.source,
        begun.volume.facts.backing.display()
    ))?;
    for host in &begun.silent {
        output.line(&format!(
            "{host} did not say how up to date it is: if it has later content, it keeps that, and is in a split with this host"
        ))?;
    }
    output.line(&format!("how far it is: blockmirror status {name}"))?;
    Ok(())
}
