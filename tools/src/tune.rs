//! `blockmirror tune`: sets how what goes to a peer is sent.

use crate::client::Client;
use crate::output::{Error, Output};
use blockmirror_agent::config::{Compression, Name};
use blockmirror_agent::control::api::TuneRequest;
use blockmirror_agent::control::verbs::PeerOf;
use blockmirror_agent::quantity::Size;
use clap::{ArgGroup, Args, ValueEnum};
use std::str::FromStr;

/// Which mirroring, and how. What isn't named stays.
#[derive(Args)]
#[command(group(ArgGroup::new("change").required(true).multiple(true).args(["compression", "resync_limit"])))]
pub struct Arguments {
    /// The volume
    name: Name,
    /// The peer
    peer: Name,
    /// Compress what is sent, where the link is slower than that takes
    #[arg(long, value_enum)]
    compression: Option<Way>,
    /// How much a resync may copy in a second, or "none"
    #[arg(long, value_name = "SIZE")]
    resync_limit: Option<Rate>,
}

/// The ways to compress, for the command line.
#[derive(Clone, Copy, ValueEnum)]
enum Way {
    /// Don't
    Off,
    /// Fast, shrinks less
    Lz4,
    /// Slower, shrinks more
    Zstd,
}

impl From<Way> for Compression {
    fn from(way: Way) -> Self {
        match way {
            Way::Off => Self::Off,
            Way::Lz4 => Self::Lz4,
            Way::Zstd => Self::Zstd,
        }
    }
}

/// Bytes a second; 0 where there is no limit.
#[derive(Clone, Copy)]
struct Rate(u64);

impl FromStr for Rate {
    type Err = <Size as FromStr>::Err;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "none" { Ok(Self(0)) } else { text.parse().map(|Size(bytes)| Self(bytes)) }
    }
}

/// Has the agent set it.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let Arguments { name, peer, compression, resync_limit } = arguments;
    let request = TuneRequest {
        compression: compression.map(Compression::from),
        resync_limit_bytes: resync_limit.map(|rate| rate.0),
    };
    let subject = PeerOf { volume: name, peer };
    let answer = client.ask(&subject, &request).await?;
    let limit = match answer.resync_limit_bytes {
        Some(bytes) => format!("at most {} a second", Size(bytes)),
        None => "without a limit of its own".to_owned(),
    };
    let (name, peer, compression) = (subject.volume, answer.name, answer.compression);
    output.line(&format!("to {peer}, {name} goes with compression {compression}, a resync {limit}"))?;
    Ok(())
}
