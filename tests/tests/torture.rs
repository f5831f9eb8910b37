//! A short torture for every check; hours of it are had with `scripts/torture`.

use blockmirror_agent::config::Mode;
use blockmirror_tests::machines::programs::own;
use blockmirror_tests::require;
use blockmirror_tests::torture::{Settings, Torture};
use std::time::Duration;

/// Runs it for half a minute, with the seed of the environment or another each time.
fn torture(mode: Mode, hosts: usize) {
    let seed = std::env::var("BLOCKMIRROR_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    println!("seed {seed}; BLOCKMIRROR_SEED={seed} tries it again");
    let tally = Torture::new(Settings {
        seed,
        time: Duration::from_secs(30),
        mode,
        hosts,
        promotions: false,
        writer: own("torture"),
        keep: None,
    })
    .run();
    println!("{tally:?}");
}

#[test]
fn an_asynchronous_mirror_survives_whatever_happens_to_it() {
    require!("root", "mkfs.ext4", "e2fsck", "tune2fs");
    torture(Mode::Async, 2);
}

#[test]
fn a_synchronous_mirror_of_three_survives_whatever_happens_to_it() {
    require!("root", "mkfs.ext4", "e2fsck", "tune2fs");
    torture(Mode::Sync, 3);
}
