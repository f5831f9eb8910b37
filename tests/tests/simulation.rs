//! The machines in virtual time: random worlds from their seeds, and the stories that broke simpler rules.

use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::tracker::Work;
use blockmirror_tests::harness::application::PATIENCE;
use blockmirror_tests::harness::disk::Crash;
use blockmirror_tests::harness::host::host_id;
use blockmirror_tests::harness::links::LinkId;
use blockmirror_tests::harness::random::Random;
use blockmirror_tests::harness::seeds::{self, CHECKED, CHECKED_SECONDS, Failed};
use blockmirror_tests::harness::settings::Settings;
use blockmirror_tests::harness::world::{Event, World};
use std::time::Duration;

/// How many chances each story gets to go wrong in its own way.
const CHANCES: u64 = 20;

const PRIMARY: usize = 0;
const REPLICA: usize = 1;

fn link() -> LinkId {
    LinkId::new(PRIMARY, REPLICA)
}

fn write(offset: u64, length: u64) -> Work {
    Work::Write { range: ByteRange::new(offset, length), fua: false }
}

/// Worlds with a replica that is in sync.
fn in_sync(settings: &Settings) -> impl Iterator<Item = World> + '_ {
    (0..CHANCES).map(|seed| {
        let mut world = World::new(settings.clone(), Random::new(seed));
        world.settle();
        world
    })
}

fn request(world: &mut World, work: Work) {
    world.request(PRIMARY, work);
    world.act();
}

fn pass(world: &mut World, milliseconds: u64) {
    let end = world.now + Duration::from_millis(milliseconds);
    world.run_until(end);
}

fn finish(mut world: World) {
    world.settle();
    world.compare_all();
    world.close();
}

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

/// Two neighbours of 512 bytes in one sector of 4 KiB: whoever has the large sector reads, modifies and writes all of
/// it, so the second must wait for the first on both sides, or one of them is undone (W1).
#[test]
fn neighbours_in_one_large_sector_are_both_kept() {
    for sector_bytes in [[512, 4096], [4096, 512], [4096, 4096]] {
        let settings = Settings { sector_bytes: sector_bytes.to_vec(), ..Settings::scripted() };
        for mut world in in_sync(&settings) {
            for neighbour in 0..8 {
                request(&mut world, write(neighbour * 512, 512));
            }
            pass(&mut world, 100);
            assert_eq!(world.hosts[PRIMARY].disk.read(ByteRange::new(0, 4096)).len(), 8);
            finish(world);
        }
    }
}

/// The replica has an epoch durably when the primary loses power before its own sync: the block reverts here and not
/// there, and only the activity log remembers (D1).
#[test]
fn a_block_that_reverts_after_the_replica_has_it_is_remembered() {
    for mut world in in_sync(&Settings::scripted()) {
        world.settings.sync_delay = Duration::from_secs(10_000);
        request(&mut world, write(20 << 20, 8192));
        pass(&mut world, 1000);
        assert!(world.hosts[REPLICA].disk.is_durable() && !world.hosts[PRIMARY].disk.is_durable());
        world.crash(PRIMARY, Crash::Power);
        world.settings.sync_delay = Duration::ZERO;
        world.plan(Duration::from_millis(10), Event::Start(PRIMARY));
        pass(&mut world, 100);
        finish(world);
    }
}

/// A live frame is still being written, or waits for its turn, when its session ends; the next session copies newer
/// content of the block. The old frame must not land after it (R1).
#[test]
fn a_frame_of_an_old_session_never_lands_after_a_newer_copy() {
    let slow = Duration::from_millis(800);
    let settings = Settings { disk_delay: vec![Duration::from_millis(2), slow], ..Settings::scripted() };
    for mut world in in_sync(&settings) {
        for _ in 0..4 {
            request(&mut world, write(4096, 4096));
            request(&mut world, Work::Flush);
            pass(&mut world, 20);
        }
        world.cut(link());
        pass(&mut world, 5);
        request(&mut world, write(4096, 4096));
        pass(&mut world, 2000);
        finish(world);
    }
}

/// The link is up and nothing arrives: applications go on, and what is kept for the replica stays bounded (W7).
#[test]
fn a_stalled_replica_blocks_nobody() {
    for mut world in in_sync(&Settings::scripted()).take(4) {
        world.links[link()].stalled_until = world.now + PATIENCE * 10;
        for number in 0..2000 {
            request(&mut world, write(number * 4096, 4096));
            if number % 3 == 0 {
                request(&mut world, Work::Flush);
            }
            pass(&mut world, 5);
        }
        pass(&mut world, 1000);
        assert!(world.hosts[PRIMARY].application.waiting.is_empty());
        finish(world);
    }
}

/// An agent dies and leaves writes in the disk's cache. The flush that the next one answers covers them too (W4).
#[test]
fn a_flush_after_a_restart_covers_what_was_written_before_it() {
    for mut world in in_sync(&Settings::scripted()) {
        request(&mut world, write(8192, 4096));
        pass(&mut world, 20);
        world.crash(PRIMARY, Crash::Process);
        world.start(PRIMARY);
        world.act();
        request(&mut world, Work::Flush);
        pass(&mut world, 100);
        assert!(world.hosts[PRIMARY].application.waiting.is_empty());
        world.crash(PRIMARY, Crash::Power);
        world.plan(Duration::from_millis(10), Event::Start(PRIMARY));
        pass(&mut world, 100);
        finish(world);
    }
}

/// A restart finds active extents whose blocks are all dirty in the map already. The map has nothing to be written,
/// and nothing may wait for it.
#[test]
fn a_restart_with_a_full_map_takes_writes_at_once() {
    let mut world = World::new(Settings::scripted(), Random::new(1));
    world.links[link()].stalled_until = PATIENCE;
    for _ in 0..3 {
        request(&mut world, write(8192, 4096));
        pass(&mut world, 2000);
        assert!(world.hosts[PRIMARY].application.waiting.is_empty());
        world.crash(PRIMARY, Crash::Process);
        world.start(PRIMARY);
        world.act();
    }
    finish(world);
}

/// A block is rewritten faster than it can be copied over a long link, so each copy is old before it is durable: without
/// making its writers wait, the resync would go on for as long as they do (R2).
#[test]
fn a_resync_ends_although_a_block_is_rewritten_all_the_time() {
    let settings = Settings { link_delay: Duration::from_millis(60), ..Settings::scripted() };
    for mut world in in_sync(&settings) {
        let link = LinkId::new(0, 1);
        world.cut(link);
        for _ in 0..1000 {
            request(&mut world, write(8192, 4096));
            pass(&mut world, 5);
        }
        let tracker = world.hosts[0].tracker().expect("it is primary");
        assert!(tracker.is_in_sync(host_id(1)), "{}", world.describe());
        finish(world);
    }
}
