//! `blockmirror join`: makes this host a replica of the volume that a token is for.

use crate::client::Client;
use crate::create::absolute;
use crate::output::{Error, Output};
use crate::status;
use blockmirror_agent::control::api::{JoinRequest, StatusReply};
use clap::Args;
use std::path::PathBuf;

/// What to join, and with which disk.
#[derive(Args)]
pub struct Arguments {
    /// What `blockmirror invite` printed on the primary
    token: String,
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
        token: arguments.token.trim().to_owned(),
        backing: absolute(&arguments.backing)?,
        overwrite: arguments.overwrite,
    };
    let reply: StatusReply = client.post_body("/v1/join", &request).await?;
    for volume in &reply.volumes {
        output.line(&format!("joined {}", volume.facts.name))?;
    }
    output.lines(&status::details(&reply.volumes))?;
    Ok(())
}
