//! `blockmirror join`: makes this host a replica of the volume that a token is for.

use crate::client::Client;
use crate::create::absolute;
use crate::output::{Error, Output};
use crate::{status, token};
use blockmirror_agent::control::api::JoinRequest;
use clap::Args;
use std::path::PathBuf;

/// What to join, and with which disk.
#[derive(Args)]
pub struct Arguments {
    /// What `blockmirror invite` printed on the primary; `-` reads it from standard input, so that no other user sees it
    #[arg(required_unless_present = "token_file", conflicts_with = "token_file")]
    token: Option<String>,
    /// A file that holds it
    #[arg(long, value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// An image file, made where it is missing, or a block device
    #[arg(long, value_name = "PATH")]
    backing: PathBuf,
    /// Use the backing even if it holds data, which is lost
    #[arg(long)]
    overwrite: bool,
}

/// Asks the agent to join, and shows the volume.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let request = JoinRequest {
        token: token::read(arguments.token.as_deref(), arguments.token_file.as_deref())?,
        backing: absolute(&arguments.backing)?,
        overwrite: arguments.overwrite,
    };
    let reply = client.ask(&(), &request).await?;
    for volume in &reply.volumes {
        output.line(&format!("joined {}", volume.facts.name))?;
    }
    output.lines(&status::details(&reply.volumes))?;
    Ok(())
}
