//! `blockmirror promote`: makes this replica the primary.

use crate::client::Client;
use crate::output::{Error, Output, warn};
use crate::status;
use blockmirror_agent::config::Name;
use blockmirror_agent::control::api::PromoteRequest;
use blockmirror_agent::quantity::clock;
use clap::Args;

/// What to promote.
#[derive(Args)]
pub struct Arguments {
    /// The volume
    name: Name,
    /// Promote even if something is lost, or another primary may still be writing
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Has the agent promote, and shows the volume.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let Arguments { name, force, json } = arguments;
    let done = client.ask(&name, &PromoteRequest { force }).await?;
    if json {
        return Ok(output.json(&done)?);
    }
    output.line(&format!("promoted {name} in {}", seconds(done.milliseconds)))?;
    if let Some(at) = done.rolled_back_to {
        output.line(&format!("its content is that of {}", clock(at)))?;
    }
    output.lines(&status::details(&[done.volume]))?;
    if !done.unanswered.is_empty() {
        warn(&format!("{} did not say how they stand", done.unanswered.join(", ")));
    }
    Ok(())
}

/// `1.5 s`
pub fn seconds(milliseconds: u64) -> String {
    format!("{}.{} s", milliseconds / 1000, milliseconds % 1000 / 100)
}
