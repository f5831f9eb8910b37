//! Tortures real agents for a while: `torture [--seed S] [--seconds T] [--mode async|semi-sync|sync] [--hosts 2|3]
//! [--promotions never|sometimes|mostly] [--keep FOLDER]`.
//!
//! Needs root. A signal ends it early and in order. When something is not as it must be, it says what, with the
//! command that tries the same seed again, and leaves everything in the folder of `--keep`.

use anyhow::{Context, Result, bail};
use blockmirror_agent::config::Mode;
use blockmirror_tests::machines::programs::{obstacle, own};
use blockmirror_tests::torture::{IS_OVER, Promotions, Settings, Torture, writer};
use std::path::Path;
use std::sync::atomic::Ordering;
use std::time::Duration;

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Settings> {
    let mut settings = Settings {
        seed: u64::from(std::process::id()),
        time: Duration::from_secs(60),
        mode: Mode::Async,
        hosts: 2,
        promotions: Promotions::Never,
        writer: own("torture"),
        keep: None,
    };
    while let Some(name) = arguments.next() {
        let value = arguments.next().with_context(|| format!("{name} needs a value"))?;
        let number = || value.parse().with_context(|| format!("{name} needs a number, not {value}"));
        match name.as_str() {
            "--seed" => settings.seed = number()?,
            "--seconds" => settings.time = Duration::from_secs(number()?),
            "--hosts" if matches!(value.as_str(), "2" | "3") => settings.hosts = number()? as usize,
            "--hosts" => bail!("there are 2 or 3 hosts, not {value}"),
            "--promotions" => {
                let promotions =
                    Promotions::ALL.into_iter().find(|promotions| promotions.to_string() == value);
                settings.promotions = promotions
                    .with_context(|| format!("{value} is not how often: never, sometimes, mostly"))?;
            }
            "--keep" => settings.keep = Some(value.into()),
            "--mode" => {
                let modes = [Mode::Async, Mode::SemiSync, Mode::Sync];
                let mode = modes.into_iter().find(|mode| mode.to_string() == value);
                settings.mode =
                    mode.with_context(|| format!("{value} is no mode: async, semi-sync, sync"))?;
            }
            _ => bail!(
                "unknown option {name}; use --seed S, --seconds T, --mode MODE, --hosts N, --promotions HOW_OFTEN, \
                 --keep FOLDER"
            ),
        }
    }
    Ok(settings)
}

/// What a writer is started with; see [`writer`].
fn be_writer(arguments: &[String]) -> Result<i32> {
    let [folder, seed, first_number] = arguments else { bail!("a writer needs a folder and two numbers") };
    Ok(writer::run(Path::new(folder), seed.parse()?, first_number.parse()?))
}

extern "C" fn end_in_order(_: libc::c_int) {
    IS_OVER.store(true, Ordering::Relaxed);
}

fn end_in_order_by_signals() {
    for signal in [libc::SIGINT, libc::SIGTERM, libc::SIGHUP] {
        // SAFETY: the handler only stores to an atomic, which is allowed at any moment.
        unsafe { libc::signal(signal, end_in_order as *const () as libc::sighandler_t) };
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let Some(("writer", rest)) = arguments.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        std::process::exit(be_writer(rest)?);
    }
    let settings = parse(arguments.into_iter())?;
    if let Some(obstacle) = obstacle(&["root", "mkfs.ext4", "e2fsck", "tune2fs"]) {
        bail!("{obstacle}");
    }
    end_in_order_by_signals();
    let again = format!(
        "scripts/torture --seed {} --seconds {} --mode {} --hosts {} --promotions {}",
        settings.seed,
        settings.time.as_secs(),
        settings.mode,
        settings.hosts,
        settings.promotions,
    );
    println!("{again}");
    match std::panic::catch_unwind(|| Torture::new(settings).run()) {
        Ok(tally) => println!("{tally:?}"),
        Err(_) => bail!("failed; the same again: {again}"),
    }
    Ok(())
}
