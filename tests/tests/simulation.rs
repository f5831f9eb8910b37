//! The machines in virtual time: random worlds from their seeds. Those with a story are in `stories`.

use blockmirror_tests::harness::seeds::{self, CHECKED, CHECKED_SECONDS, Failed};
use blockmirror_tests::harness::world::World;

#[test]
fn random_worlds_keep_all_rules() {
    let outcome = seeds::run(CHECKED, false, |seed| World::from_seed(seed, CHECKED_SECONDS));
    println!("{} worlds, {} steps", outcome.worlds, outcome.steps);
    for Failed { seed, message, .. } in &outcome.failed {
        println!("seed {seed}: {message}");
        println!(
            "replay it: scripts/simulate --seeds 1 --first-seed {seed} --seconds {CHECKED_SECONDS} --trace"
        );
    }
    assert!(outcome.failed.is_empty(), "{} worlds broke a rule", outcome.failed.len());
}

#[test]
fn a_seed_replays_exactly() {
    let ends = [(); 2].map(|()| {
        let mut world = World::from_seed(7, 4);
        world.run();
        (world.steps, world.now)
    });
    assert_eq!(ends[0], ends[1]);
}
