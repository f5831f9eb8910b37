//! `blockmirror completions`: prints a shell's completion script.

use crate::CommandLine;
use crate::client::Client;
use crate::output::{Error, Output};
use clap::{Args, CommandFactory};
use clap_complete::Shell;

/// For which shell.
#[derive(Args)]
pub struct Arguments {
    /// The shell
    shell: Shell,
}

/// Prints the script.
pub async fn run(arguments: Arguments, _: &Client, output: &mut Output) -> Result<(), Error> {
    let mut script = Vec::new();
    clap_complete::generate(arguments.shell, &mut CommandLine::command(), "blockmirror", &mut script);
    output.bytes(&script)?;
    Ok(())
}
