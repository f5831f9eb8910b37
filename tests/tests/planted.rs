//! Each bug that is planted on purpose breaks a rule in one of the worlds that are always run; what the simulation
//! does not find here, it would not find when somebody makes the mistake.
//!
//! `cargo test -p blockmirror-tests --features planted --test planted`

use blockmirror_protocol::planted::{Bug, plant};
use blockmirror_tests::harness::seeds::{self, CHECKED, CHECKED_SECONDS, Failed};
use blockmirror_tests::harness::world::World;
use std::ops::Range;

/// A bug and a seed that has found it, a line each. It is tried before all others, which saves most of the time; where it finds
/// the bug no more, all are searched, and the line is to be replaced by what is printed.
const FOUND_BEFORE: &str = include_str!("planted.txt");

#[test]
fn each_planted_bug_is_found() {
    let mut unfound = Vec::new();
    for bug in Bug::ALL {
        // What fails is meant to, and is told below.
        let hook = std::panic::take_hook();
        seeds::note_places();
        let before = seed_of(bug).filter(|seed| CHECKED.contains(seed));
        let failed = before.and_then(|seed| first_of(bug, seed..seed + 1));
        let failed = failed.or_else(|| first_of(bug, CHECKED));
        std::panic::set_hook(hook);
        match failed {
            Some(Failed { seed, steps, message, .. }) => println!("{bug:?} {seed}, step {steps}: {message}"),
            None => unfound.push(bug),
        }
    }
    assert!(unfound.is_empty(), "no world finds {unfound:?}");
}

fn seed_of(bug: Bug) -> Option<u64> {
    let lines = FOUND_BEFORE.lines().filter_map(|line| line.split_once(' '));
    let mut of_bug = lines.filter(|(name, _)| *name == format!("{bug:?}"));
    of_bug.next().map(|(_, seed)| seed.parse().expect("a line has a bug and a seed"))
}

/// The first of these worlds that breaks a rule with this bug.
fn first_of(bug: Bug, seeds: Range<u64>) -> Option<Failed> {
    let outcome = seeds::run(seeds, true, |seed| {
        plant(Some(bug));
        World::from_seed(seed, CHECKED_SECONDS)
    });
    outcome.failed.into_iter().next()
}
