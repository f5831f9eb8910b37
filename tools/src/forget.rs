//! `blockmirror forget`: gives up for good what could be brought back.

use crate::client::Client;
use crate::output::{Error, Output};
use blockmirror_agent::config::Name;
use blockmirror_agent::control::api::ForgetRequest;
use blockmirror_agent::quantity::Size;
use clap::Args;

/// What to forget.
#[derive(Args)]
pub struct Arguments {
    /// The volume
    name: Name,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Has the agent give it up, and says how much it was.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let Arguments { name, json } = arguments;
    let done = client.ask(&name, &ForgetRequest).await?;
    if json {
        return Ok(output.json(&done)?);
    }
    let bytes = Size(done.forgotten_bytes);
    output.line(&format!("nothing of {name} is kept for undo any more; it was {bytes}"))?;
    Ok(())
}
