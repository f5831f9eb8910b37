//! `blockmirror invite`: prints a one-time token. The token alone goes to standard output, so that it can be piped.

use crate::client::Client;
use crate::output::{Error, Output, warn};
use blockmirror_agent::config::{Address, Name};
use blockmirror_agent::control::api::{
    InvitationState, InvitationStatus, InvitationsReply, InvitationsRequest, InviteRequest, RevokeRequest,
};
use blockmirror_agent::control::verbs::InvitationOf;
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
    /// Only list the tokens that were made, and what became of them
    #[arg(long, conflicts_with = "addresses")]
    list: bool,
    /// Take a token back, by the ID that --list tells
    #[arg(long, value_name = "ID", conflicts_with_all = ["addresses", "list"], value_parser = id)]
    revoke: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// An ID goes into a path as it is.
fn id(text: &str) -> Result<String, String> {
    match !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        true => Ok(text.to_ascii_lowercase()),
        false => Err("an ID is hexadecimal digits; --list tells them".to_owned()),
    }
}

/// Asks the agent for a token, and prints it.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let Arguments { name, expires, addresses, list, revoke, json } = arguments;
    if list {
        let reply = client.ask(&name, &InvitationsRequest).await?;
        return show_all(&reply, json, output);
    }
    if let Some(id) = revoke {
        let invitation = InvitationOf { volume: name, id };
        let reply = client.ask(&invitation, &RevokeRequest).await?;
        if !json {
            let InvitationOf { volume, id } = invitation;
            output.line(&format!(
                "revoked {id}; a host that joined with it stays: blockmirror remove-peer {volume} HOST"
            ))?;
        }
        return show_all(&reply, json, output);
    }
    let request = InviteRequest { expires_seconds: expires.0, addresses };
    let invitation = client.ask(&name, &request).await?;
    if json {
        return Ok(output.json(&invitation)?);
    }
    output.line(&invitation.token)?;
    let left = Seconds(invitation.expires_seconds);
    warn(&format!("on the new host, within {left}: blockmirror join - --backing PATH, and paste it"));
    Ok(())
}

/// One line for each.
fn show_all(reply: &InvitationsReply, json: bool, output: &mut Output) -> Result<(), Error> {
    if json {
        return Ok(output.json(reply)?);
    }
    let line = |invitation: &InvitationStatus| {
        let state = match invitation.state {
            InvitationState::Open => "open",
            InvitationState::Used => "used",
            InvitationState::Expired => "expired",
            InvitationState::Revoked => "revoked",
        };
        match invitation.left_seconds {
            Some(left) => format!("{}  {state}  {} left", invitation.id, Seconds(left)),
            None => format!("{}  {state}", invitation.id),
        }
    };
    Ok(output.lines(&reply.invitations.iter().map(line).collect::<Vec<_>>())?)
}
