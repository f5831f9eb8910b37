//! `blockmirror switch`: makes this primary a replica, and a replica that is in sync the primary, with nothing lost.

use crate::client::Client;
use crate::output::{Error, Output};
use crate::promote::seconds;
use blockmirror_agent::config::Name;
use blockmirror_agent::control::api::SwitchRequest;
use clap::Args;

/// What to hand over, and to whom.
#[derive(Args)]
pub struct Arguments {
    /// The volume
    name: Name,
    /// The new primary
    #[arg(long, value_name = "HOST")]
    to: Name,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Has the agent hand over, and says how long nobody could write.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let Arguments { name, to, json } = arguments;
    let done = client.ask(&name, &SwitchRequest { to }).await?;
    if json {
        return Ok(output.json(&done)?);
    }
    let pause = seconds(done.milliseconds_without_writes);
    output.line(&format!("{} is the primary of {name} now; nobody could write for {pause}", done.to))?;
    Ok(())
}
