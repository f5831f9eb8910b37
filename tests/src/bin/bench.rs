//! Measures Blockmirror and its peers in turns: `scripts/bench --help` says how.
//!
//! Needs root. A signal ends it early and in order, and what was measured until then is told. The exit code is 0 when
//! everything could be run, whatever was measured, and 1 when something could not.

use anyhow::{Result, bail};
use blockmirror_tests::bench::settings::Settings;
use blockmirror_tests::bench::{Bench, IS_OVER, groups, quic};
use blockmirror_tests::machines::programs::obstacle;
use clap::Parser;
use std::process::ExitCode;
use std::sync::atomic::Ordering;

extern "C" fn end_in_order(_: libc::c_int) {
    IS_OVER.store(true, Ordering::Relaxed);
}

fn end_in_order_by_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is allowed at any moment.
        unsafe { libc::signal(signal, end_in_order as *const () as libc::sighandler_t) };
    }
}

fn main() -> Result<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(("quic", rest)) = arguments.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        quic::be_server(rest)?;
        return Ok(ExitCode::SUCCESS);
    }
    let settings = Settings::parse();
    if settings.list {
        groups::ALL.iter().for_each(|group| println!("{:10} {}", group.name, group.about));
        return Ok(ExitCode::SUCCESS);
    }
    if let Some(obstacle) = obstacle(&["root", "fio", "losetup", "ip"]) {
        bail!("{obstacle}");
    }
    end_in_order_by_signals();
    let is_whole = Bench::new(settings)?.run()?;
    Ok(if is_whole { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
