//! What a member sends that lies (X1): whatever it is, it makes no other host panic; and beside a replica that lies, the honest hosts
//! keep what they promised each other.

use blockmirror_tests::harness::seeds::{self, Failed};
use blockmirror_tests::harness::world::World;
use std::ops::Range;
use std::sync::Mutex;

/// What happens at a panic is the whole process's: the tests take turns.
static TURN: Mutex<()> = Mutex::new(());

const SEEDS: Range<u64> = 1..1001;
const SECONDS: u64 = 4;
/// Nothing ends these before their time, so that there are fewer.
const BESIDE: Range<u64> = 1..151;

/// What the model of the world says of broken promises is of no account here: nobody keeps any to a liar. A panic in the code
/// that ships is.
#[test]
fn no_host_panics_whatever_a_member_says() {
    let _turn = TURN.lock();
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

/// A replica that lies may stop its primary, since a promotion is believed of a member (X2). What the honest hosts have, and what was
/// promised of it, stays what it is: no difference between them is forgotten, no flush that was answered is lost, and what is kept for
/// anybody is bounded.
#[test]
fn honest_hosts_keep_their_promises_beside_a_replica_that_lies() {
    let _turn = TURN.lock();
    let hook = std::panic::take_hook();
    seeds::note_places();
    let outcome = seeds::run(BESIDE, false, |seed| World::lying_beside(seed, SECONDS));
    std::panic::set_hook(hook);
    println!("{} worlds, {} steps", outcome.worlds, outcome.steps);
    for Failed { seed, steps, message, place, .. } in &outcome.failed {
        println!("seed {seed}, step {steps}, {place}: {message}");
    }
    assert!(outcome.failed.is_empty(), "{} worlds broke a promise", outcome.failed.len());
}
