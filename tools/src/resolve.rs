//! `blockmirror resolve`: after a split brain, gives this host's content up for another's, or says what that would lose.

use crate::client::Client;
use crate::output::{Error, Output};
use crate::status;
use blockmirror_agent::config::Name;
use blockmirror_agent::control::api::ResolveRequest;
use clap::Args;

/// Whose content stays.
#[derive(Args)]
pub struct Arguments {
    /// The volume
    name: Name,
    /// The host whose content stays; this one's goes
    #[arg(long, value_name = "HOST")]
    keep: Name,
    /// Only tell what each choice would lose
    #[arg(long)]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Has the agent resolve the split, and says what each choice loses.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let Arguments { name, keep, dry_run, json } = arguments;
    let answer = client.ask(&name, &ResolveRequest { keep, dry_run }).await?;
    if json {
        return Ok(output.json(&answer)?);
    }
    output.lines(&[answer.verdict, answer.alternative])?;
    if !answer.done {
        let keep = &answer.keep;
        output.line(&format!("nothing was changed; to do it: blockmirror resolve {name} --keep {keep}"))?;
        return Ok(());
    }
    if answer.action != blockmirror_agent::verdict::NO_ACTION {
        output.line(&format!("to go on, {}", answer.action))?;
    }
    output.lines(&status::details(&[answer.volume]))?;
    Ok(())
}
