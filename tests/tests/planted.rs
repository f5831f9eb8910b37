//! Each bug that is planted on purpose breaks a rule in one of the worlds that are always run; what the simulation
//! does not find here, it would not find when somebody makes the mistake.
//!
//! `cargo test -p blockmirror-tests --features planted --test planted`

use blockmirror_protocol::planted::{Bug, plant};
use blockmirror_tests::harness::seeds::{self, CHECKED, CHECKED_SECONDS};
use blockmirror_tests::harness::world::World;

#[test]
fn each_planted_bug_is_found() {
    let mut unfound = Vec::new();
    for bug in Bug::ALL {
        // What fails is meant to, and is told below.
        let hook = std::panic::take_hook();
        seeds::note_places();
        let outcome = seeds::run(CHECKED, true, |seed| {
            plant(Some(bug));
            World::from_seed(seed, CHECKED_SECONDS)
        });
        std::panic::set_hook(hook);
        match outcome.failed.first() {
            Some(failed) => {
                println!("{bug:?}: seed {}, step {}: {}", failed.seed, failed.steps, failed.message)
            }
            None => unfound.push(bug),
        }
    }
    assert!(unfound.is_empty(), "no world finds {unfound:?}");
}
