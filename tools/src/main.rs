//! `blockmirror`: everything the operator types.
//!
//! Each verb is a file of its own. Results go to standard output, everything else to standard error; the exit code
//! tells why a command failed: 1 failed, 2 usage, 3 agent not running, 4 no such volume, 5 refused for safety,
//! 6 timeout, 130 interrupted. With `--json` the failure is an object, too. A reader that goes away, such as `head`, ends the
//! command quietly.

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

#[derive(Subcommand)]
enum Verb {
    /// Make a volume, with this host as its primary
    Create(create::Arguments),
    /// Print a one-time token with which another host joins a volume
    Invite(invite::Arguments),
    /// Make this host a replica
    Join(join::Arguments),
    /// List the other hosts of a volume
    Peers(peers::Arguments),
    /// Tell which copies are good, what is at risk and what to do
    Status(status::Arguments),
    /// Wait until the replicas of a volume have everything
    Wait(wait::Arguments),
    /// Make a host none of a volume's any more: its key is refused from then on
    RemovePeer(remove_peer::Arguments),
    /// Stop mirroring to a peer; what it misses is marked
    Pause(pause::Arguments),
    /// Go on mirroring to a peer
    Resume(resume::Arguments),
    /// Set when writes to a volume are answered while a peer is in sync
    Mode(mode::Arguments),
    /// Set how what goes to a peer is sent: compressed or not, and how fast a resync may be
    Tune(tune::Arguments),
    /// Say where a host is that can't be found
    SetAddress(set_address::Arguments),
    /// Make this replica the primary: when the old one is gone, or was demoted
    Promote(promote::Arguments),
    /// Make this primary a replica; nobody is the primary then
    Demote(demote::Arguments),
    /// Make this primary a replica, and a replica that is in sync the primary
    Switch(switch::Arguments),
    /// Give this host's content up for another's, after a split brain
    Resolve(resolve::Arguments),
    /// Bring back what this host had before its content was given up, or another host took over
    Undo(undo::Arguments),
    /// Give up for good what could be brought back, and agree to the primary
    Forget(forget::Arguments),
    /// Take the loop device away on this host, rather than have it wait for the agent
    Release(release::Arguments),
    /// Compare this host's copy with a peer's, by digests
    Compare(compare::Arguments),
    /// Copy a volume's content from a peer into a disk or an image file
    Recover(recover::Arguments),
    /// Print a file of metadata
    Inspect(inspect::Arguments),
    /// Look after the configuration's files
    #[command(subcommand)]
    Config(config::Arguments),
    /// Print a shell's completion script
    Completions(completions::Arguments),
}

fn main() -> ExitCode {
    let CommandLine { run, verb } = CommandLine::parse();
    let json = std::env::args_os().any(|argument| argument == "--json");
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return Error::from(error).report(json),
    };
    match runtime.block_on(carry_out(verb, Client::new(run), Output::default())) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => error.report(json),
    }
}

async fn carry_out(verb: Verb, client: Client, mut output: Output) -> Result<(), Error> {
    let output = &mut output;
    match verb {
        Verb::Create(arguments) => create::run(arguments, &client, output).await,
        Verb::Invite(arguments) => invite::run(arguments, &client, output).await,
        Verb::Join(arguments) => join::run(arguments, &client, output).await,
        Verb::Peers(arguments) => peers::run(arguments, &client, output).await,
        Verb::RemovePeer(arguments) => remove_peer::run(arguments, &client, output).await,
        Verb::Status(arguments) => status::run(arguments, &client, output).await,
        Verb::Wait(arguments) => wait::run(arguments, &client, output).await,
        Verb::Pause(arguments) => pause::run(arguments, &client, output).await,
        Verb::Resume(arguments) => resume::run(arguments, &client, output).await,
        Verb::Mode(arguments) => mode::run(arguments, &client, output).await,
        Verb::Tune(arguments) => tune::run(arguments, &client, output).await,
        Verb::SetAddress(arguments) => set_address::run(arguments, &client, output).await,
        Verb::Promote(arguments) => promote::run(arguments, &client, output).await,
        Verb::Demote(arguments) => demote::run(arguments, &client, output).await,
        Verb::Switch(arguments) => switch::run(arguments, &client, output).await,
        Verb::Resolve(arguments) => resolve::run(arguments, &client, output).await,
        Verb::Undo(arguments) => undo::run(arguments, &client, output).await,
        Verb::Forget(arguments) => forget::run(arguments, &client, output).await,
        Verb::Release(arguments) => release::run(arguments, &client, output).await,
        Verb::Compare(arguments) => compare::run(arguments, &client, output).await,
        Verb::Recover(arguments) => recover::run(arguments, &client, output).await,
        Verb::Inspect(arguments) => inspect::run(arguments, &client, output).await,
        Verb::Config(arguments) => config::run(arguments, &client, output).await,
        Verb::Completions(arguments) => completions::run(arguments, &client, output).await,
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
