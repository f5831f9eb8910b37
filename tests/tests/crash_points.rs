//! Every crash point: each thing that hosts do is done again and again from the same seed, and each time a host, or two
//! at once, stop one disk or file operation later, until the thing is over before they would stop.
//!
//! Then everything starts again, comes to rest, and is compared; the worlds check all rules all along. What was begun
//! and not over when a host stopped is done in part, as its disk likes it.

use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::terms::{DataState, Mode};
use blockmirror_protocol::tracker::Work;
use blockmirror_protocol::units::EXTENT_BYTES;
use blockmirror_tests::harness::disk::Crash;
use blockmirror_tests::harness::host::{Host, Shell};
use blockmirror_tests::harness::links::LinkId;
use blockmirror_tests::harness::random::Random;
use blockmirror_tests::harness::script::{PRIMARY, REPLICA, link, write};
use blockmirror_tests::harness::settings::Settings;
use blockmirror_tests::harness::world::World;
use std::time::Duration;

/// How often each point is tried, in another mode each time.
const SEEDS: u64 = 9;
/// No operation has more points than this.
const POINTS: u64 = 2000;
/// How long nothing at all may happen in an operation.
const LONGEST: Duration = Duration::from_secs(60);

/// Each of the two first hosts alone, and both.
const EITHER_OR_BOTH: &[&[usize]] = &[&[PRIMARY], &[REPLICA], &[PRIMARY, REPLICA]];

/// Something that hosts do. `begin` is where it starts from, `go` starts it, `is_over` says when it has ended; where
/// hosts have stopped, `then` comes before everything starts again.
#[derive(Clone, Copy)]
struct Operation {
    name: &'static str,
    hosts: usize,
    /// Those that may stop in the middle, each group at once.
    stopping: &'static [&'static [usize]],
    begin: fn(&mut World),
    go: fn(&mut World),
    is_over: fn(&World) -> bool,
    then: fn(&mut World),
}

/// Where hosts stop. It tells its name when something goes wrong there.
struct Point<'a> {
    operation: &'a str,
    hosts: &'a [usize],
    crash: Crash,
    seed: u64,
    ended: u64,
}

impl Drop for Point<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let Self { operation, hosts, crash, seed, ended } = self;
            eprintln!("{operation}: {hosts:?} stop ({crash:?}) after {ended} operations, seed {seed}");
        }
    }
}

impl Operation {
    /// Does it once for each point. Gives how many points there are.
    fn try_every_point(&self) -> u64 {
        let mut points = 0;
        for seed in 0..SEEDS {
            for hosts in self.stopping {
                for crash in [Crash::Process, Crash::Power] {
                    let point = |ended| Point { operation: self.name, hosts, crash, seed, ended };
                    let count = (0..POINTS).find(|ended| self.is_over_before(&point(*ended)));
                    points += count.expect("an operation is over after a while");
                }
            }
        }
        points
    }

    /// Stops the hosts after so many operations of their disks and files, unless it is over before.
    fn is_over_before(&self, point: &Point<'_>) -> bool {
        let mut world = World::new(self.settings(point.seed), Random::new(point.seed));
        let ended = |world: &World| -> u64 {
            point.hosts.iter().map(|host| world.hosts[*host].ended_operations).sum()
        };
        (self.begin)(&mut world);
        let last = ended(&world) + point.ended;
        (self.go)(&mut world);
        world.act();
        let end = world.now + LONGEST;
        while ended(&world) < last {
            if (self.is_over)(&world) {
                world.finish();
                return true;
            }
            assert!(world.step(end), "it never ends: {}", world.describe());
        }
        for host in point.hosts {
            if world.hosts[*host].is_up() {
                world.crash(*host, point.crash);
            }
        }
        (self.then)(&mut world);
        world.finish();
        false
    }

    fn settings(&self, seed: u64) -> Settings {
        let mode = [Mode::Async, Mode::SemiSync, Mode::Sync][(seed % 3) as usize];
        Settings {
            size_bytes: 3 * EXTENT_BYTES,
            sector_bytes: (0..self.hosts as u64)
                .map(|host| [512, 4096][((seed + host) % 2) as usize])
                .collect(),
            disk_delay: vec![Duration::from_millis(3); self.hosts],
            modes: vec![mode; self.hosts],
            outage: Duration::from_millis(50),
            ..Settings::scripted()
        }
    }
}

/// Every host is idle, every request answered, and whoever can be in sync is.
fn is_quiet(world: &World) -> bool {
    let links = || world.links.ids().filter(|link| world.hosts[link.dialler].tracker().is_some());
    let is_at_rest = world.hosts.iter().all(|host| host.is_idle() && host.application.waiting.is_empty());
    let is_followed = |link: LinkId| world.is_in_sync(link) || !world.hosts[link.listener].is_up();
    is_at_rest && !world.primaries().is_empty() && links().all(is_followed)
}

/// Some content everywhere, durable on both sides.
fn settle_with_content(world: &mut World) {
    world.settle();
    for place in 0..6 {
        world.ask(PRIMARY, write(place << 21, 8192));
    }
    world.ask(PRIMARY, Work::Flush);
    world.wait_until("all hosts are quiet", is_quiet);
}

/// The same, long ago: nothing is active.
fn settle_and_rest(world: &mut World) {
    settle_with_content(world);
    world.pass(20_000);
}

/// Overwrites some of it, in several extents, with neighbours in one sector.
fn overwrite(world: &mut World, host: usize) {
    for (offset, length) in
        [(0, 4096), (4096, 512), (4608, 512), (2 << 21, 8192), (5 << 21, 1024), (1024, 4096)]
    {
        world.ask(host, write(offset, length));
    }
}

/// A replica that lacks what was overwritten.
fn fall_behind(world: &mut World) {
    settle_with_content(world);
    world.part(link());
    overwrite(world, PRIMARY);
    world.wait_until("the link is known to be gone", |world| {
        let listener = world.links[link()].listener_side;
        listener.is_none() && world.report(link()).lag_bytes == 0 && world.hosts[PRIMARY].is_idle()
    });
}

/// A replica in a gap, and its primary gone after it has forgotten, durably, what it had copied: neither its map nor its
/// log says any more what a rollback revives.
fn lose_the_primary_amid_a_resync(world: &mut World) {
    fall_behind(world);
    world.pass(20_000);
    let missing = world.report(link()).map_bytes;
    world.join(link());
    world.wait_until("some of it is copied", |world| world.report(link()).map_bytes < missing);
    world.hold_up(link());
    world.pass(3000);
    assert_eq!(world.hosts[REPLICA].mirror.data, DataState::Inconsistent);
    world.crash(PRIMARY, Crash::Power);
}

/// The primary is gone, and the replica goes on in its place with what it has.
fn replace_the_primary(world: &mut World) {
    if world.hosts[PRIMARY].is_up() {
        world.crash(PRIMARY, Crash::Power);
    }
    if !world.hosts[REPLICA].is_up() {
        world.start(REPLICA);
    }
    world.take_over(REPLICA);
}

fn is_promoted(world: &World) -> bool {
    world.hosts[REPLICA].tracker().is_some() && world.hosts[REPLICA].is_idle()
}

fn is_demoted(world: &World) -> bool {
    matches!(world.hosts[PRIMARY].shell, Shell::Replica(_))
}

/// Tries all points of these, each on its own thread.
fn try_all(operations: &[Operation]) {
    std::thread::scope(|scope| {
        for operation in operations {
            scope.spawn(|| {
                let points = operation.try_every_point();
                println!("{}: {points} points", operation.name);
                assert!(points > 0, "{} does something", operation.name);
            });
        }
    });
}

#[test]
fn a_volume_that_is_opened_and_first_copied() {
    try_all(&[Operation {
        name: "opening",
        hosts: 2,
        stopping: EITHER_OR_BOTH,
        begin: |_| {},
        go: |_| {},
        is_over: is_quiet,
        then: |_| {},
    }]);
}

#[test]
fn writes_and_flushes() {
    let writes = Operation {
        name: "writes",
        hosts: 2,
        stopping: EITHER_OR_BOTH,
        begin: settle_and_rest,
        go: |world| overwrite(world, PRIMARY),
        is_over: is_quiet,
        then: |_| {},
    };
    let flushes = Operation {
        name: "writes and flushes",
        go: |world| {
            overwrite(world, PRIMARY);
            world.ask(PRIMARY, Work::Flush);
            let range = ByteRange::new(1 << 21, 4096);
            world.ask(PRIMARY, Work::Write { range, fua: true });
            let range = ByteRange::new(512, 3 << 20);
            world.ask(PRIMARY, Work::Zero { range, may_unmap: true, fua: false });
            world.ask(PRIMARY, Work::Flush);
        },
        ..writes
    };
    let three_hosts =
        Operation { name: "writes to three hosts", hosts: 3, stopping: EITHER_OR_BOTH, ..writes };
    let last_ones =
        Operation { name: "a primary's last writes and flushes", then: replace_the_primary, ..flushes };
    try_all(&[writes, flushes, three_hosts, last_ones]);
}

#[test]
fn a_resync_and_its_gap() {
    let resync = Operation {
        name: "a resync",
        hosts: 2,
        stopping: EITHER_OR_BOTH,
        begin: fall_behind,
        go: |world| world.join(link()),
        is_over: is_quiet,
        then: |_| {},
    };
    let with_writes = Operation {
        name: "a resync while applications write",
        begin: |world| {
            fall_behind(world);
            world.join(link());
            world.wait_until("the gap has begun", |world| {
                world.hosts[REPLICA].superblock.layers.rollback().is_some()
            });
        },
        go: |world| {
            overwrite(world, PRIMARY);
            world.ask(PRIMARY, write(3 << 21, 4096));
            world.ask(PRIMARY, Work::Flush);
        },
        ..resync
    };
    try_all(&[resync, with_writes]);
}

#[test]
fn promotions() {
    let consistent = Operation {
        name: "a promotion",
        hosts: 2,
        stopping: &[&[REPLICA]],
        begin: |world| {
            settle_with_content(world);
            overwrite(world, PRIMARY);
            world.pass(5);
            world.crash(PRIMARY, Crash::Power);
            world.wait_until("the replica is idle", |world| world.hosts[REPLICA].is_idle());
        },
        go: |world| world.promote(REPLICA),
        is_over: is_promoted,
        then: |_| {},
    };
    let rollback = Operation { name: "a rollback", begin: lose_the_primary_amid_a_resync, ..consistent };
    let three_hosts = Operation { name: "a promotion among three hosts", hosts: 3, ..consistent };
    try_all(&[consistent, rollback, three_hosts]);
}

#[test]
fn demotions_and_switches() {
    let demotion = Operation {
        name: "a demotion",
        hosts: 2,
        stopping: EITHER_OR_BOTH,
        begin: settle_with_content,
        go: |world| {
            overwrite(world, PRIMARY);
            world.step_aside(PRIMARY, None);
        },
        is_over: is_demoted,
        then: |_| {},
    };
    let switch = Operation {
        name: "a switch",
        go: |world| {
            overwrite(world, PRIMARY);
            world.step_aside(PRIMARY, Some(REPLICA));
        },
        is_over: |world| is_demoted(world) && is_promoted(world) && is_quiet(world),
        ..demotion
    };
    try_all(&[demotion, switch]);
}

#[test]
fn hosts_that_come_back() {
    let primary = Operation {
        name: "a primary that comes back",
        hosts: 2,
        stopping: EITHER_OR_BOTH,
        begin: |world| {
            settle_with_content(world);
            overwrite(world, PRIMARY);
            world.pass(8);
            world.crash(PRIMARY, Crash::Power);
        },
        go: |world| world.start(PRIMARY),
        is_over: is_quiet,
        then: |_| {},
    };
    let replica = Operation {
        name: "a replica that comes back",
        begin: |world| {
            settle_with_content(world);
            overwrite(world, PRIMARY);
            world.pass(8);
            world.crash(REPLICA, Crash::Power);
        },
        go: |world| world.start(REPLICA),
        ..primary
    };
    let superseded = Operation {
        name: "a primary that finds another one",
        begin: |world| {
            // Nothing in its log says that it may have more than the other one.
            settle_and_rest(world);
            world.crash(PRIMARY, Crash::Power);
            world.take_over(REPLICA);
            overwrite(world, REPLICA);
            world.pass(100);
        },
        go: |world| world.start(PRIMARY),
        is_over: |world| is_demoted(world) && is_quiet(world),
        ..primary
    };
    let forked = Operation {
        name: "a primary that finds another one and has writes of its own",
        begin: |world| {
            fall_behind(world);
            world.crash(PRIMARY, Crash::Power);
            world.take_over(REPLICA);
            overwrite(world, REPLICA);
            world.pass(100);
            world.join(link());
        },
        is_over: |world| is_demoted(world) && world.hosts.iter().all(Host::is_idle),
        ..superseded
    };
    try_all(&[primary, replica, superseded, forked]);
}
