//! `blockmirror config`: looks after the configuration's files. Needs no agent.

use crate::client::Client;
use crate::offline;
use crate::output::{Error, Output};
use blockmirror_agent::config::{ConfigFolder, Mistake, VolumeConfig};
use blockmirror_agent::control::api::{Failure, FailureKind};
use clap::{Args, Subcommand};
use std::path::PathBuf;

/// What to do with the files.
#[derive(Subcommand)]
pub enum Arguments {
    /// Report everything that is wrong in the configuration's files
    Check(CheckArguments),
}

/// Which files.
#[derive(Args)]
pub struct CheckArguments {
    /// The configuration's folder; by default that of the agent
    #[arg(long, value_name = "DIR")]
    config: Option<PathBuf>,
}

/// Does it.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    match arguments {
        Arguments::Check(arguments) => check(arguments, client, output),
    }
}

/// Reports each mistake on a line of its own; fails if there is any.
fn check(arguments: CheckArguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let folder = match arguments.config {
        Some(path) => ConfigFolder::new(path),
        None => offline::config_folder(client.run())?,
    };
    let found = folder.load_volumes();
    let good = found.as_ref().map_or(0, |found| found.volumes.len());
    let wrong = folder.load_agent().err().into_iter().chain(match found {
        Ok(found) => found.mistakes.into_iter().chain(shortfalls(&folder, &found.volumes)).collect(),
        Err(mistake) => vec![mistake],
    });
    let wrong: Vec<String> =
        wrong.map(|mistake| Failure::from_error(FailureKind::Failed, &mistake).message).collect();
    output.lines(&wrong)?;
    let path = folder.path().display();
    match wrong.len() {
        0 => Ok(output.line(&format!("{path} is right; volumes: {good}"))?),
        1 => Err(Failure::new(FailureKind::Failed, format!("1 mistake in {path}")).into()),
        several => Err(Failure::new(FailureKind::Failed, format!("{several} mistakes in {path}")).into()),
    }
}

/// What each volume promises and can't keep. It is served all the same, so this is no mistake to the agent.
fn shortfalls(folder: &ConfigFolder, volumes: &[VolumeConfig]) -> Vec<Mistake> {
    let path = |volume: &VolumeConfig| folder.volume_path(&volume.name);
    let found = volumes.iter().filter_map(|volume| Some((path(volume), volume.shortfall()?)));
    found.map(|(path, what)| Mistake::Contradictory { path, what }).collect()
}
