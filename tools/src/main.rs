//! `blockmirror`: everything the operator types.
//!
//! Each verb is a file of its own, and a row of the table below. Results go to standard output, everything else to standard
//! error; the exit code tells why a command failed: 1 failed, 2 usage, 3 agent not running, 4 no such volume, 5 refused for
//! safety, 6 timeout, 130 interrupted. With `--json` the failure is an object, too. A reader that goes away, such as `head`,
//! ends the command quietly.

#![forbid(unsafe_code)]

mod client;
mod compare;
mod completions;
mod config;
mod create;
mod demote;
mod forget;
mod inspect;
mod invite;
mod join;
mod mode;
mod offline;
mod output;
mod pause;
mod peers;
mod promote;
mod rebuild;
mod recover;
mod release;
mod remove_peer;
mod resolve;
mod resume;
mod set_address;
mod status;
mod switch;
mod token;
mod tune;
mod undo;
mod wait;

use clap::{Parser, Subcommand};
use client::Client;
use output::{Error, Output};
use std::path::PathBuf;
use std::process::ExitCode;

/// Mirrors block devices to other hosts.
#[derive(Parser)]
#[command(name = "blockmirror", version, propagate_version = true)]
struct CommandLine {
    /// The run folder of the agent to talk to
    #[arg(long, value_name = "DIR", default_value = "/run/blockmirror", global = true)]
    run: PathBuf,
    #[command(subcommand)]
    verb: Verb,
}

/// The verbs, from rows of a name and the file that has its arguments and carries it out.
macro_rules! verbs {
    ($($(#[$words:meta])* $verb:ident: $file:ident,)*) => {
        #[derive(Subcommand)]
        enum Verb {
            $($(#[$words])* $verb($file::Arguments),)*
        }

        impl Verb {
            async fn carry_out(self, client: &Client, output: &mut Output) -> Result<(), Error> {
                match self {
                    $(Self::$verb(arguments) => $file::run(arguments, client, output).await,)*
                }
            }
        }
    };
}

verbs! {
    /// Make a volume, with this host as its primary
    Create: create,
    /// Print a one-time token with which another host joins a volume
    Invite: invite,
    /// Make this host a replica
    Join: join,
    /// List the other hosts of a volume
    Peers: peers,
    /// Tell which copies are good, what is at risk and what to do
    Status: status,
    /// Wait until the replicas of a volume have everything
    Wait: wait,
    /// Make a host none of a volume's any more: its key is refused from then on
    RemovePeer: remove_peer,
    /// Stop mirroring to a peer; what it misses is marked
    Pause: pause,
    /// Go on mirroring to a peer
    Resume: resume,
    /// Set when writes to a volume are answered while a peer is in sync
    Mode: mode,
    /// Set how what goes to a peer is sent: compressed or not, and how fast a resync may be
    Tune: tune,
    /// Say where a host is that can't be found
    SetAddress: set_address,
    /// Make this replica the primary: when the old one is gone, or was demoted
    Promote: promote,
    /// Make this primary a replica; nobody is the primary then
    Demote: demote,
    /// Make this primary a replica, and a replica that is in sync the primary
    Switch: switch,
    /// Give this host's content up for another's, after a split brain
    Resolve: resolve,
    /// Bring back what this host had before its content was given up, or another host took over
    Undo: undo,
    /// Give up for good what could be brought back, and agree to the primary
    Forget: forget,
    /// Take the loop device away on this host, rather than have it wait for the agent
    Release: release,
    /// Compare this host's copy with a peer's, by digests
    Compare: compare,
    /// Give this primary another disk: it serves from a replica at once, and is filled meanwhile
    Rebuild: rebuild,
    /// Copy a volume's content from a peer into a disk or an image file
    Recover: recover,
    /// Print a file of metadata
    Inspect: inspect,
    /// Look after the configuration's files
    #[command(subcommand)]
    Config: config,
    /// Print a shell's completion script
    Completions: completions,
}

fn main() -> ExitCode {
    let CommandLine { run, verb } = CommandLine::parse();
    let json = std::env::args_os().any(|argument| argument == "--json");
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Error::from(error).report(json),
    };
    match runtime.block_on(verb.carry_out(&Client::new(run), &mut Output::default())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(json),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        CommandLine::command().debug_assert();
    }
}
