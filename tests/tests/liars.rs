//! What a member sends that lies (X1): whatever it is, it makes no other host panic.

use blockmirror_tests::harness::seeds::{self, Failed};
use blockmirror_tests::harness::world::World;
use std::ops::Range;

const SEEDS: Range<u64> = 1..1001;
const SECONDS: u64 = 4;

/// What the model of the world says of broken promises is of no account here: nobody keeps any to a liar. A panic in the code
/// that ships is.
#[test]
fn no_host_panics_whatever_a_member_says() {
    let hook = std::panic::take_hook();
    seeds::note_places();
    let outcome = seeds::run(SEEDS, false, |seed| World::lying(seed, SECONDS));
    std::panic::set_hook(hook);
    println!(
        "{} worlds, {} steps, {} ended by the model",
        outcome.worlds,
        outcome.steps,
        outcome.failed.len()
    );
    let is_ours = |failed: &&Failed| !failed.place.starts_with("tests/");
    for Failed { seed, steps, message, place, .. } in outcome.failed.iter().filter(is_ours) {
        println!("seed {seed}, step {steps}, {place}: {message}");
    }
    assert!(outcome.failed.iter().filter(is_ours).count() == 0, "a lie makes a host panic");
}
