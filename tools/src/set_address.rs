//! `blockmirror set-address`: says where a host is that can't be found.

use crate::client::Client;
use crate::output::{Error, Output};
use blockmirror_agent::config::{Address, Name};
use blockmirror_agent::control::api::AddressRequest;
use blockmirror_agent::control::verbs::PeerOf;
use clap::Args;

/// Which host, and where it is.
#[derive(Args)]
pub struct Arguments {
    /// A volume that both hosts have
    name: Name,
    /// The other host
    peer: Name,
    /// Where its agent listens; several, where it has several addresses
    #[arg(required = true, value_name = "ADDRESS:PORT")]
    addresses: Vec<Address>,
}

/// Has the agent set it.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let Arguments { name, peer, addresses } = arguments;
    let subject = PeerOf { volume: name, peer };
    let answer = client.ask(&subject, &AddressRequest { addresses }).await?;
    let addresses: Vec<&str> = answer.addresses.iter().map(|address| address.as_str()).collect();
    output.line(&format!("{} is looked for at {}", answer.name, addresses.join(", ")))?;
    Ok(())
}
