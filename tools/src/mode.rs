//! `blockmirror mode`: sets when writes and flushes are answered while a peer is in sync.

use crate::client::Client;
use crate::output::{Error, Output};
use blockmirror_agent::config::{Mode, Name};
use blockmirror_agent::control::api::ModeRequest;
use blockmirror_agent::control::verbs::PeerOf;
use clap::{Args, ValueEnum};

/// Which mirroring, and how.
#[derive(Args)]
pub struct Arguments {
    /// The volume
    name: Name,
    /// The peer
    peer: Name,
    /// When writes and flushes are answered
    #[arg(value_enum)]
    mode: Wish,
}

/// The modes, for the command line.
#[derive(Clone, Copy, ValueEnum)]
enum Wish {
    /// When they are done here
    Async,
    /// When the peer has received them, too
    SemiSync,
    /// A write when the peer has received it, a flush when the peer has it durably, too
    Sync,
}

impl From<Wish> for Mode {
    fn from(wish: Wish) -> Self {
        match wish {
            Wish::Async => Self::Async,
            Wish::SemiSync => Self::SemiSync,
            Wish::Sync => Self::Sync,
        }
    }
}

/// Has the agent set the mode.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let Arguments { name, peer, mode } = arguments;
    let subject = PeerOf { volume: name, peer };
    let answer = client.ask(&subject, &ModeRequest { mode: mode.into() }).await?;
    let name = subject.volume;
    output.line(&format!("{name} is mirrored to {} in the mode {}", answer.name, answer.mode))?;
    Ok(())
}
