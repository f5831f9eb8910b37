//! `blockmirror release`: takes a volume's loop device away on this host.
//!
//! A device in use outlives the agent, and waits for the next one. This is for the operator who does not want that: also
//! while no agent runs.

use crate::client::Client;
use crate::output::{Error, Output};
use blockmirror_agent::config::Name;
use blockmirror_agent::control::api::{Failure, FailureKind, RELEASE_SCHEMA, Release, ReleaseRequest};
use blockmirror_agent::device::loopback::{LeftBehind, StartError};
use clap::Args;
use std::path::Path;

/// What to release.
#[derive(Args)]
pub struct Arguments {
    /// The volume
    name: Name,
    /// Take it away even while it is in use: its users get I/O errors
    #[arg(long)]
    force: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Has the agent take the device away, or does it in its place while it does not run.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let Arguments { name, force, json } = arguments;
    let done = match client.ask(&name, &ReleaseRequest { force }).await {
        Err(failure) if failure.kind == FailureKind::AgentNotRunning => {
            without_agent(&name, client.run(), force)?
        }
        answered => answered?,
    };
    if json {
        return Ok(output.json(&done)?);
    }
    output.line(&format!("the loop device of {name} is gone on this host"))?;
    for user in &done.users {
        output.line(&format!("it gives i/o errors to who has it open still: {user}"))?;
    }
    Ok(())
}

fn without_agent(name: &Name, run: &Path, force: bool) -> Result<Release, Failure> {
    let failed = |error: StartError| Failure::from_error(FailureKind::Failed, &error);
    let Some(left) = LeftBehind::find(name.as_str(), run).map_err(failed)? else {
        let text = format!("the agent does not run, and has left no loop device of {name}");
        return Err(Failure::new(FailureKind::NoSuchVolume, text));
    };
    let users = left.users();
    if !users.is_empty() && !force {
        let text = format!(
            "the device is in use: {}; start the agent and close it, or with --force its users get i/o errors",
            users.join(", ")
        );
        return Err(Failure::new(FailureKind::Refused, text));
    }
    left.end().map_err(failed)?;
    Ok(Release { schema: RELEASE_SCHEMA.to_owned(), volume: name.clone(), users })
}
