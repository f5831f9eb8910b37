//! `blockmirror undo`: brings back what this host had before its content was given up.

use crate::client::Client;
use crate::output::{Error, Output};
use crate::status;
use blockmirror_agent::config::Name;
use blockmirror_agent::control::api::UndoRequest;
use blockmirror_agent::quantity::{Size, clock};
use clap::Args;

/// What to bring back.
#[derive(Args)]
pub struct Arguments {
    /// The volume
    name: Name,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Has the agent restore it, and shows the volume.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let Arguments { name, json } = arguments;
    let done = client.ask(&name, &UndoRequest).await?;
    if json {
        return Ok(output.json(&done)?);
    }
    let (at, bytes) = (clock(done.back_to), Size(done.restored_bytes));
    output.line(&format!("{name} is again what this host had at {at}; {bytes} were restored"))?;
    output.lines(&status::details(&[done.volume]))?;
    Ok(())
}
