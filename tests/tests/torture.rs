//! A short torture for every check; hours of it are had with `scripts/torture`.

use blockmirror_agent::config::Mode;
use blockmirror_tests::machines::programs::own;
use blockmirror_tests::require;
use blockmirror_tests::torture::{Promotions, Settings, Torture};
use std::time::Duration;

/// Runs it for a minute, with this seed or that of the environment. What real hosts make of it differs each time.
fn torture(seed: u64, mode: Mode, hosts: usize, promotions: Promotions) {
    let given = std::env::var("BLOCKMIRROR_SEED").ok().and_then(|seed| seed.parse().ok());
    let seed = given.unwrap_or(seed);
    println!("seed {seed}; BLOCKMIRROR_SEED={seed} tries it again");
    let tally = Torture::new(Settings {
        seed,
        time: Duration::from_secs(60),
        mode,
        hosts,
        promotions,
        writer: own("torture"),
        keep: None,
    })
    .run();
    println!("{tally:?}");
}

#[test]
fn an_asynchronous_mirror_survives_whatever_happens_to_it() {
    require!("root", "mkfs.ext4", "e2fsck", "tune2fs");
    torture(21, Mode::Async, 2, Promotions::Sometimes);
}

#[test]
fn a_synchronous_mirror_of_three_survives_whatever_happens_to_it() {
    require!("root", "mkfs.ext4", "e2fsck", "tune2fs");
    torture(34, Mode::Sync, 3, Promotions::Sometimes);
}

#[test]
fn a_mirror_of_three_survives_whoever_is_its_primary() {
    require!("root", "mkfs.ext4", "e2fsck", "tune2fs");
    torture(55, Mode::SemiSync, 3, Promotions::Mostly);
}
