//! `blockmirror invite`: prints a one-time token. The token alone goes to standard output, so that it can be piped.

use crate::client::Client;
use crate::output::{Error, Output, warn};
use blockmirror_agent::config::{Address, Name};
use blockmirror_agent::control::api::{Invitation, InviteRequest};
use blockmirror_agent::quantity::Seconds;
use clap::Args;

/// Whom to invite.
#[derive(Args)]
pub struct Arguments {
    /// The volume
    name: Name,
    /// How long the token is good for, such as 30m
    #[arg(long, value_name = "TIME", default_value = "1h")]
    expires: Seconds,
    /// Where the new host reaches this one; by default what the agent advertises
    #[arg(long = "address", value_name = "ADDR:PORT")]
    addresses: Vec<Address>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Asks the agent for a token, and prints it.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let request = InviteRequest { expires_seconds: arguments.expires.0, addresses: arguments.addresses };
    let path = format!("/v1/volumes/{}/invite", arguments.name);
    let invitation: Invitation = client.post_body(&path, &request).await?;
    if arguments.json {
        return Ok(output.json(&invitation)?);
    }
    output.line(&invitation.token)?;
    let left = Seconds(invitation.expires_seconds);
    warn(&format!("on the new host, within {left}: blockmirror join TOKEN --backing PATH"));
    Ok(())
}
