//! Schedules that break a simpler rule, each told in prose and then played: first those that the rules were attacked
//! with on paper, then what users of established mirrors report, then our own.
//!
//! Every story has some chances to go wrong in its own way, and the worlds check all rules all along. With the feature
//! `planted`, the stories are also played with the bug that they are about, and must go wrong then:
//!
//! `cargo test -p blockmirror-tests --features planted --test stories`

use blockmirror_protocol::dirty_map::DirtyMap;
use blockmirror_protocol::disk::activity_log::{self, CAPACITY, Recovered};
use blockmirror_protocol::disk::superblock::LINEAGE_LIMIT;
use blockmirror_protocol::lineage::{Relation, relation};
use blockmirror_protocol::peer::{self, Identity, Peer, PeerError, ReplicaState};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::terms::{DataState, Fence, Mode, Promise};
use blockmirror_protocol::tracker::replies::ReplicaLoss;
use blockmirror_protocol::tracker::{self, Action, Tracker, Work};
use blockmirror_protocol::units::{
    BlockSize, CopyId, EXTENT_BYTES, Epoch, GenerationId, Position, Session, Time,
};
use blockmirror_protocol::wire::message::{Message, Refusal, Refused};
use blockmirror_tests::harness::application::PATIENCE;
use blockmirror_tests::harness::disk::{Crash, Value};
use blockmirror_tests::harness::host::Shell;
use blockmirror_tests::harness::host::{VOLUME, host_id};
use blockmirror_tests::harness::links::{Link, LinkId};
use blockmirror_tests::harness::random::Random;
use blockmirror_tests::harness::script::{PRIMARY, REPLICA, link, write};
use blockmirror_tests::harness::settings::{Settings, lineage_limit};
use blockmirror_tests::harness::world::World;
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// How many chances each story gets to go wrong in its own way.
const CHANCES: u64 = 20;
/// How long until extents that lie idle have left the activity log, and the map is the only memory, in milliseconds.
const LOG_IS_IDLE: u64 = 20_000;
/// A third host, where there is one.
const THIRD: usize = 2;
/// And a fourth one.
const FOURTH: usize = 3;

const MEBIBYTE: u64 = 1 << 20;
/// How many blocks a resync copies that something happens in the middle of, and how far they are apart.
const BLOCKS: u64 = 200;
const APART: u64 = 64 << 10;

/// Worlds whose replicas are in sync.
fn in_sync(settings: &Settings) -> impl Iterator<Item = World> + '_ {
    (0..CHANCES).map(|seed| World::in_sync(settings, seed))
}

/// As many fast hosts.
fn hosts(count: usize) -> Settings {
    let disk_delay = vec![Duration::from_millis(2); count];
    Settings { sector_bytes: vec![512; count], disk_delay, ..Settings::scripted() }
}

/// Two hosts, of which the replica has a slow disk.
fn slow_replica(milliseconds: u64) -> Settings {
    let disk_delay = [2, milliseconds].map(Duration::from_millis).to_vec();
    Settings { disk_delay, ..Settings::scripted() }
}

/// The way back from one host to another.
fn back() -> LinkId {
    LinkId::new(REPLICA, PRIMARY)
}

/// Two hosts that were in sync, and the first copies of what the replica missed are durable there. Also what the replica
/// held when they were.
fn amid_resync(seed: u64) -> (World, BTreeMap<u64, Value>) {
    let mut world = World::in_sync(&slow_replica(50), seed);
    let write_all = |world: &mut World| {
        for block in 0..BLOCKS {
            world.ask(PRIMARY, write(block * APART, 4096));
            world.pass(5);
        }
    };
    write_all(&mut world);
    world.ask(PRIMARY, Work::Flush);
    world.pass(LOG_IS_IDLE);
    assert!(world.is_in_sync(link()));
    let point = world.hosts[REPLICA].disk.content().clone();
    world.part(link());
    write_all(&mut world);
    world.pass(LOG_IS_IDLE);
    world.join(link());
    world.wait_until("some copies are durable on the replica", |world| {
        world.hosts[PRIMARY].tracker().is_some() && world.report(link()).map_bytes < BLOCKS * 4096
    });
    assert_eq!(world.hosts[REPLICA].mirror.data, DataState::Inconsistent);
    (world, point)
}

/// [Two 512-byte neighbours in one 4 KiB sector.] Whoever has the large sector reads, modifies and writes all of it, so
/// the second must wait for the first on both sides, or one of them is undone (W1).
#[test]
fn neighbours_in_one_large_sector_are_both_kept() {
    for sector_bytes in [[512, 4096], [4096, 512], [4096, 4096]] {
        let settings = Settings { sector_bytes: sector_bytes.to_vec(), ..Settings::scripted() };
        for mut world in in_sync(&settings) {
            for neighbour in 0..8 {
                world.ask(PRIMARY, write(neighbour * 512, 512));
            }
            world.pass(100);
            assert_eq!(world.hosts[PRIMARY].disk.read(ByteRange::new(0, 4096)).len(), 8);
            world.finish();
        }
    }
}

/// [Replica durable, primary's power lost before its own sync.] The block reverts here and not there, and only the
/// activity log remembers: an extent stays in it until its writes are durable on both sides, however long it lies idle
/// (D1).
#[test]
fn a_block_that_reverts_after_the_replica_has_it_is_remembered() {
    for mut world in in_sync(&Settings::scripted()) {
        world.settings.sync_delay = Duration::from_secs(1_000_000);
        world.ask(PRIMARY, write(20 * MEBIBYTE, 8192));
        world.pass(LOG_IS_IDLE);
        assert!(world.hosts[REPLICA].disk.is_durable() && !world.hosts[PRIMARY].disk.is_durable());
        world.crash(PRIMARY, Crash::Power);
        world.settings.sync_delay = Duration::ZERO;
        world.finish();
    }
}

/// [The target's own map was ignored.] A primary writes what its replica never gets, and dies; the replica is promoted.
/// When the old primary comes back as its replica, the new one's map and both logs know nothing of the block. Only the
/// target's own map does, and the union of both must be copied, or the block stays different for ever (D3).
#[test]
fn what_only_the_target_knows_of_is_copied() {
    for mut world in in_sync(&Settings::scripted()) {
        world.part(link());
        world.ask(PRIMARY, write(20 * MEBIBYTE, 8192));
        world.pass(LOG_IS_IDLE);
        world.crash(PRIMARY, Crash::Power);
        let log = world.hosts[PRIMARY].recover_log();
        assert!(matches!(log, Recovered::Active { extents, .. } if extents.is_empty()));
        world.take_over(REPLICA);
        world.ask(REPLICA, write(40 * MEBIBYTE, 4096));
        world.pass(LOG_IS_IDLE);
        world.finish();
    }
}

/// [A queued live frame landed after the newer copy.] A live frame is still being written, waits for its turn or is in
/// some buffer on the way when its session ends; the next session copies newer content of the block. The old frame must
/// not land after it (R1).
#[test]
fn a_frame_of_an_old_session_never_lands_after_a_newer_copy() {
    for mut world in in_sync(&slow_replica(800)) {
        for _ in 0..4 {
            world.ask(PRIMARY, write(4096, 4096));
            world.ask(PRIMARY, Work::Flush);
            world.pass(20);
        }
        world.hold_up(link());
        world.ask(PRIMARY, write(4096, 4096));
        world.pass(5);
        world.join(link());
        world.ask(PRIMARY, write(4096, 4096));
        world.pass(5000);
        world.finish();
    }
}

/// A block is rewritten faster than it can be copied over a long link, so each copy is old before it is durable: without
/// making its writers wait, the resync would go on for as long as they do (R2).
#[test]
fn a_resync_ends_although_a_block_is_rewritten_all_the_time() {
    let settings = Settings { link_delay: Duration::from_millis(60), ..Settings::scripted() };
    for mut world in in_sync(&settings) {
        world.cut(link());
        for _ in 0..1000 {
            world.ask(PRIMARY, write(8192, 4096));
            world.pass(5);
        }
        assert_eq!(world.report(link()).state, ReplicaState::InSync, "{}", world.describe());
        world.finish();
    }
}

/// [Rollback revived blocks whose bits had been cleared.] In the middle of a resync, copies are durable on the replica
/// and their bits cleared on the primary, durably. The primary dies, and the promoted replica rolls back: those blocks
/// hold old content again, and no map of the old primary says so. Before anything is restored, it is in the map of the
/// promoted one (P2).
#[test]
fn blocks_that_a_rollback_revives_are_remembered() {
    for seed in 0..CHANCES {
        let (mut world, _) = amid_resync(seed);
        world.hold_up(link());
        // Until the cleared bits are in the map's file.
        world.pass(3000);
        world.crash(PRIMARY, Crash::Power);
        world.take_over(REPLICA);
        world.finish();
    }
}

/// [Replaying both versions of a sector and dying between them.] A sector was written twice, in two epochs, and the link
/// breaks before either is durable there. A replica that dies between the two versions, both sent once more, holds an
/// image that never was. Here the window goes to the map instead: the sector is copied once, with its last value, and
/// what is written to it meanwhile marks and is not streamed (P3, R1).
#[test]
fn a_sector_of_a_lost_window_is_sent_once_with_its_last_value() {
    for mut world in in_sync(&slow_replica(200)) {
        for _ in 0..2 {
            world.ask(PRIMARY, write(4096, 512));
            world.ask(PRIMARY, Work::Flush);
        }
        world.pass(10);
        let lost = world.links[link()].connection;
        world.part(link());
        world.wait_until("the primary knows", |world| world.report(link()).lag_bytes == 0);
        world.join(link());
        world.wait_until("the block is being compared or copied", |world| {
            let Link { connection, copied_bytes, compared_bytes, .. } = world.links[link()];
            connection > lost && copied_bytes + compared_bytes > 0
        });
        let Link { copied_bytes, compared_bytes, .. } = world.links[link()];
        let most = copied_bytes.max(compared_bytes);
        assert_eq!(most, 4096, "each block of the window counts once, however often it was written");
        world.ask(PRIMARY, write(4096, 512));
        world.wait_until("it is written here", |world| world.hosts[PRIMARY].application.waiting.is_empty());
        let report = world.report(link());
        assert!(report.map_bytes == 0 || report.lag_bytes == 0, "R1: a dirty block is streamed too");
        let moment = world.random.up_to(Duration::from_millis(400));
        world.run_until(world.now + moment);
        world.crash(REPLICA, Crash::Power);
        world.finish();
    }
}

/// Reported of others: silent divergence while both sides say that they are in sync, because a change of state cleared a
/// map that was not empty. Here a resync is interrupted again and again, by everything that changes a state, and no bit
/// is lost over it (D3, D4).
#[test]
fn no_change_of_state_clears_a_map() {
    for mut world in in_sync(&slow_replica(50)) {
        world.part(link());
        for block in 0..BLOCKS {
            world.ask(PRIMARY, write(block * APART, 4096));
        }
        world.pass(1000);
        for change in 0..8 {
            world.join(link());
            let moment = world.random.up_to(Duration::from_millis(300));
            world.run_until(world.now + moment);
            match change % 4 {
                0 => world.cut(link()),
                1 => world.crash(REPLICA, Crash::Power),
                2 => world.crash(PRIMARY, Crash::Process),
                _ => world.crash(PRIMARY, Crash::Power),
            }
            world.start_all();
            world.pass(1500);
        }
        world.finish();
    }
}

/// Reported of others: a map that is stale on one side, so that blocks stay "out of sync" for ever, or differ and are
/// not. A host has a map for another one, and then adopts that one's content: when it is promoted again, nothing of the
/// old map counts, in either direction (L2).
#[test]
fn a_map_from_before_a_resync_means_nothing_after_it() {
    for mut world in in_sync(&Settings::scripted()) {
        world.switch(PRIMARY, REPLICA);
        world.settle();
        world.part(back());
        world.ask(REPLICA, write(20 * MEBIBYTE, 8192));
        world.pass(LOG_IS_IDLE);
        assert_eq!(world.report(back()).map_bytes, 8192);
        world.crash(REPLICA, Crash::Process);
        // The operator gives up what the other one had written.
        world.take_over(PRIMARY);
        world.ask(PRIMARY, write(40 * MEBIBYTE, 4096));
        world.pass(LOG_IS_IDLE);
        world.start_all();
        world.settle();
        world.switch(PRIMARY, REPLICA);
        world.settle();
        assert_eq!((world.report(back()).map_bytes, world.links[back()].copied_bytes), (0, 0));
        world.finish();
    }
}

/// The other direction: a third host has missed something when the roles change. The old primary's map says what; the new
/// primary has none, and what it begins with says nothing of that host (L2).
#[test]
fn a_new_primary_does_not_vouch_for_a_host_that_was_away() {
    for mut world in in_sync(&hosts(3)) {
        let away = LinkId::new(PRIMARY, THIRD);
        world.part(away);
        world.ask(PRIMARY, write(20 * MEBIBYTE, 8192));
        world.pass(LOG_IS_IDLE);
        assert_eq!(world.report(away).map_bytes, 8192);
        world.switch(PRIMARY, REPLICA);
        world.finish();
    }
}

/// A primary dies when one of its two replicas has a write that the other lacks, and both have the same generation. The
/// one that has it, or the one that hasn't, is promoted: both logs say where the two may differ (D5).
#[test]
fn two_replicas_whose_primary_died_are_reconciled() {
    for (promoted, late) in [(REPLICA, THIRD), (THIRD, REPLICA)] {
        for mut world in in_sync(&hosts(3)) {
            world.ask(PRIMARY, write(0, 4096));
            world.pass(LOG_IS_IDLE);
            world.hold_up(LinkId::new(PRIMARY, THIRD));
            world.ask(PRIMARY, write(20 * MEBIBYTE, 8192));
            world.pass(400);
            world.crash(PRIMARY, Crash::Power);
            world.take_over(promoted);
            let between = LinkId::new(promoted, late);
            world.wait_until("the other one follows", |world| world.is_in_sync(between));
            world.check_equal(between);
            world.finish();
        }
    }
}

/// Reported of others: false split brain. Two hosts that saw no writes never diverge, whatever they go through: power
/// losses, roles that change while the other is away, a primary that comes back and finds another one (L1).
#[test]
fn hosts_that_saw_no_writes_are_never_split() {
    for mut world in in_sync(&Settings::scripted()) {
        world.ask(PRIMARY, write(20 * MEBIBYTE, 8192));
        world.pass(LOG_IS_IDLE);
        for (from, to) in [(PRIMARY, REPLICA), (REPLICA, PRIMARY), (PRIMARY, REPLICA)] {
            let between = LinkId::new(to, from);
            assert!(world.is_in_sync(LinkId::new(from, to)));
            world.crash(from, Crash::Power);
            world.crash(to, Crash::Power);
            world.start(to);
            world.take_over(to);
            world.pass(1000);
            world.start_all();
            // By themselves: no operator decides anything.
            world.wait_until("the other one follows", |world| {
                world.primaries() == [to] && world.is_in_sync(between)
            });
            let lineage = |host: usize| &world.hosts[host].superblock.lineage;
            assert_eq!(relation(lineage(to), lineage(from)), Relation::Same);
            assert_eq!(world.links[between].copied_bytes, 0, "there is nothing to copy");
        }
        world.finish();
    }
}

/// A primary that waits for its replica rather than answer alone has answered nothing that the replica lacks: when that is
/// promoted there is no split brain, however often the primary was started anew with what waited in its map.
#[test]
fn what_a_blocked_primary_never_answered_is_no_side_of_a_split() {
    let limit = Duration::from_secs(3);
    let blocks = ReplicaLoss::Block { min_replicas: 1, limit };
    let settings = Settings { modes: vec![Mode::Sync; 2], loss: blocks, ..Settings::scripted() };
    for crash in [Crash::Process, Crash::Power] {
        for mut world in in_sync(&settings) {
            world.hold_up(link());
            world.ask(PRIMARY, write(20 * MEBIBYTE, 8192));
            world.pass(LOG_IS_IDLE);
            for _ in 0..2 {
                world.crash(PRIMARY, crash);
                world.start(PRIMARY);
                world.pass(5000);
            }
            world.take_over(REPLICA);
            world.ask(REPLICA, write(40 * MEBIBYTE, 8192));
            world.pass(1000);
            world.join(link());
            world.join(back());
            // By itself: no operator decides anything.
            world
                .wait_until("it follows", |world| world.primaries() == [REPLICA] && world.is_in_sync(back()));
            world.finish();
        }
    }
}

/// What replicas count on for ever changes with what operators choose, and each hears of it when it is resynced. They are
/// resynced one after another: were all out of sync at once, nothing would be answered meanwhile, and nobody could be
/// promoted. And at no time may one be promoted in the silence of another that counts on more than it knows (W4).
#[test]
fn replicas_are_given_another_word_one_at_a_time() {
    let waits = |min_replicas| ReplicaLoss::Block { min_replicas, limit: Duration::from_secs(3) };
    let modes = vec![Mode::Sync; 4];
    let settings = Settings { modes: modes.clone(), loss: waits(1), ..hosts(4) };
    let replicas = [REPLICA, THIRD, 3];
    for mut world in in_sync(&settings).take(5) {
        let promises = |world: &World| replicas.map(|host| world.hosts[host].superblock.given.promise);
        let is_in_sync = |world: &World, host: usize| world.is_in_sync(LinkId::new(PRIMARY, host));
        for (loss, wanted) in [
            (waits(3), Promise::Replicas(3)),
            (waits(2), Promise::Replicas(2)),
            (ReplicaLoss::Continue, Promise::WhileHeard),
            (waits(3), Promise::Replicas(3)),
            (waits(1), Promise::Replicas(1)),
        ] {
            assert!(replicas.iter().all(|host| is_in_sync(&world, *host)));
            world.choose(loss, modes.clone());
            let mut waited = BTreeSet::new();
            while promises(&world) != [wanted; 3] || !replicas.iter().all(|host| is_in_sync(&world, *host)) {
                let end = world.now + Duration::from_secs(400);
                assert!(world.step(end), "it never comes to an end: {}", world.describe());
                let out: Vec<_> = replicas.iter().filter(|host| !is_in_sync(&world, **host)).collect();
                assert!(out.len() <= 1, "several are out of sync after {loss:?}");
                waited.extend(out.into_iter().copied());
                for (one, other) in (0..3).flat_map(|one| (0..3).map(move |other| (one, other))) {
                    let promises = promises(&world);
                    let (own, its) = (promises[one], promises[other]);
                    let knows = match own {
                        // It is promoted when all others are heard, or not at all.
                        Promise::None | Promise::Replicas(0 | 1) => true,
                        Promise::WhileHeard => !matches!(its, Promise::Replicas(2..)),
                        Promise::Replicas(own) => !matches!(its, Promise::Replicas(its) if its > own),
                    };
                    let is_candidate =
                        is_in_sync(&world, replicas[one]) && is_in_sync(&world, replicas[other]);
                    assert!(knows || !is_candidate, "after {loss:?}: {promises:?}");
                }
            }
            assert_eq!(waited.len(), 3, "each hears of it when it is resynced: {loss:?}");
        }
        world.finish();
    }
}

/// The operator chooses otherwise while a commit with a word that holds for ever is on its way. The primary took what it was to
/// give next for what it had given, and answered alone (W4); at rest the two are compared.
#[test]
fn a_word_that_is_on_its_way_is_not_forgotten_for_the_next_one() {
    let waits = ReplicaLoss::Block { min_replicas: 1, limit: Duration::from_secs(3) };
    let modes = vec![Mode::Sync; 2];
    let settings = Settings { modes: modes.clone(), ..Settings::scripted() };
    for mut world in in_sync(&settings) {
        world.choose(waits, modes.clone());
        world.wait_until("the commit is sent", |world| world.report(link()).is_promised);
        assert_eq!(world.hosts[REPLICA].superblock.given.promise, Promise::None, "it has not arrived");
        world.choose(ReplicaLoss::Continue, modes.clone());
        world.finish();
    }
}

/// The primary dies when it has told one replica of a new word, and not the other: the one that is promoted took the word of
/// the other for its own one, answered without it, and that one, cut off, was promoted as if nothing could have been
/// answered without it. Nothing that was answered is lost without force (W4).
#[test]
fn a_promoted_host_answers_nothing_without_those_whose_word_it_may_not_know() {
    let waits = |min_replicas| ReplicaLoss::Block { min_replicas, limit: Duration::from_secs(3600) };
    let modes = vec![Mode::Sync; 3];
    let settings = Settings { modes: modes.clone(), loss: waits(2), ..hosts(3) };
    for mut world in in_sync(&settings) {
        let word = |world: &World, host: usize| world.hosts[host].superblock.given.promise;
        let before = word(&world, REPLICA);
        world.choose(waits(1), modes.clone());
        let told = |world: &World| {
            [REPLICA, THIRD].into_iter().find(|host| ![before, Promise::None].contains(&word(world, *host)))
        };
        world.wait_until("one has heard", |world| told(world).is_some());
        let to = told(&world).expect("it was waited for");
        let untold = REPLICA + THIRD - to;
        assert_eq!(word(&world, untold), before);
        world.crash(PRIMARY, Crash::Power);
        while world.primaries() != [to] {
            world.pass(100);
            world.promote_by_rule(to);
        }
        let cut_off = [PRIMARY, to].map(|other| [LinkId::new(other, untold), LinkId::new(untold, other)]);
        cut_off.as_flattened().iter().for_each(|link| world.part(*link));
        world.start_all();
        let ago = LinkId::new(to, PRIMARY);
        world.wait_until("the old primary follows", |world| {
            world.primaries() == [to] && world.is_in_sync(ago)
        });
        world.ask(to, write(0, 4096));
        world.pass(2000);
        world.promote_by_rule(untold);
        world.pass(1000);
        let is_answered = world.hosts[to].application.waiting.is_empty();
        assert!(!is_answered || world.primaries() == [to], "W4: what was answered is lost without force");
        cut_off.as_flattened().iter().for_each(|link| world.join(*link));
        world.finish();
    }
}

/// The opposite: both hosts wrote alone, the first one after a restart. They are never taken for one history, so nothing
/// that either answered goes before an operator says so (L1, L3).
#[test]
fn hosts_that_both_wrote_alone_are_never_taken_for_one() {
    for mut world in in_sync(&Settings::scripted()) {
        world.crash(PRIMARY, Crash::Power);
        world.hold_up(link());
        world.start_all();
        world.pass(100);
        world.ask(PRIMARY, write(20 * MEBIBYTE, 8192));
        world.pass(1000);
        world.crash(PRIMARY, Crash::Power);
        world.take_over(REPLICA);
        world.ask(REPLICA, write(40 * MEBIBYTE, 8192));
        world.pass(1000);
        world.start_all();
        world.pass(5000);
        let lineage = |host: usize| &world.hosts[host].superblock.lineage;
        assert!(matches!(relation(lineage(PRIMARY), lineage(REPLICA)), Relation::Forked(_)));
        assert!(world.hosts[PRIMARY].disk.value(20 * MEBIBYTE / 512) != 0, "it is still there");
        world.finish();
    }
}

/// Reported of others: a full copy after a crash or a power loss. Here the primary dies amid writes, and what is copied
/// are the extents that the activity log says; the log is durable before a write begins, so it is enough, too (W2, D1).
#[test]
fn after_a_crash_only_active_extents_are_copied() {
    for crash in [Crash::Process, Crash::Power] {
        for mut world in in_sync(&Settings::scripted()) {
            world.ask(PRIMARY, write(8 * MEBIBYTE, 8192));
            world.pass(LOG_IS_IDLE);
            for place in [20, 41] {
                world.ask(PRIMARY, write(place * MEBIBYTE, 8192));
                let moment = world.random.up_to(Duration::from_millis(8));
                world.run_until(world.now + moment);
            }
            world.crash(PRIMARY, crash);
            world.start_all();
            world.settle();
            let copied = world.links[link()].copied_bytes;
            assert!(copied <= 2 * EXTENT_BYTES, "{copied} bytes were copied");
            world.finish();
        }
    }
}

/// Reported of others: the replica is of no use while it is resynced. Here it is promoted in the middle of that, and
/// holds exactly what it held when it was last in sync (P1, P2).
#[test]
fn a_replica_promoted_amid_a_resync_is_what_it_was_before() {
    let mut rolled_back = 0;
    for seed in 0..CHANCES {
        let (mut world, point) = amid_resync(seed);
        let adopted = world.hosts[REPLICA].superblock.adopted;
        let moment = world.random.up_to(Duration::from_millis(50));
        world.run_until(world.now + moment);
        world.crash(PRIMARY, Crash::Process);
        if seed % 2 == 0 {
            world.crash(REPLICA, Crash::Power);
            world.start(REPLICA);
        }
        assert_ne!(*world.hosts[REPLICA].disk.content(), point, "something was copied");
        world.take_over(REPLICA);
        let [source, promoted] = [PRIMARY, REPLICA].map(|host| world.hosts[host].disk.content());
        if world.hosts[REPLICA].superblock.adopted == adopted {
            assert_eq!(*promoted, point);
            rolled_back += 1;
        } else {
            assert_eq!(promoted, source, "the resync was over");
        }
        world.ask(REPLICA, write(0, 4096));
        world.pass(1000);
        assert!(world.hosts[REPLICA].application.waiting.is_empty());
        world.finish();
    }
    assert!(rolled_back > CHANCES / 2);
}

/// Reported of others: retries in a storm, thousands of times a second. A session that was refused says nothing more by
/// itself, however long it is left alone: when to greet again is the shell's to decide, which backs off (R5).
#[test]
fn a_refused_greeting_is_not_repeated() {
    let (peer, size_bytes, block_size) = (host_id(REPLICA), 1 << 20, BlockSize::default());
    let map = DirtyMap::full(VOLUME, peer, size_bytes, block_size);
    let replica = Peer::new(peer, map, size_bytes, block_size, 1 << 20, Mode::Async);
    let lineage = vec![GenerationId([1; 16])];
    let settings = tracker::Settings {
        size_bytes,
        sector_bytes: 512,
        lineage: lineage.clone(),
        lineage_limit: 4,
        opened: Position::default(),
        first_epoch: Epoch(1),
        loss: ReplicaLoss::Continue,
        opened_at: Time::default(),
        patience: PATIENCE,
        active_extents: CAPACITY,
        owes_word: false,
        returned: None,
        absent: None,
    };
    let log = Recovered::Active { serial: 0, extents: BTreeSet::new() };
    let mut tracker = Tracker::new(settings, &log, vec![replica]);
    let identity = Identity {
        volume: VOLUME,
        size_bytes,
        block_size,
        sector_bytes: 512,
        copy: CopyId([1; 16]),
        adopted: 0,
        fence: Fence { counter: 1, holder: host_id(PRIMARY) },
        lineage,
        members: Vec::new(),
        ends: blockmirror_protocol::lineage::Ends::default(),
    };
    let mut now = Time::default();
    for attempt in 1..4 {
        tracker.handle_connected(peer, Session(attempt), &identity, now);
        assert_eq!(greetings(&mut tracker, now), 1);
        let refused = Refused { refusal: Refusal::Space, text: "there is no room".into() };
        let answer = tracker.handle_message(peer, Message::Refused(refused.clone()), now);
        assert_eq!(answer, Err(PeerError::Refused(refused)));
        tracker.handle_disconnected(peer, now);
        let mut said = greetings(&mut tracker, now);
        for _ in 0..1000 {
            let Some(next) = tracker.poll_timeout() else { break };
            assert!(next > now, "it waits in between");
            now = next;
            tracker.handle_timeout(now);
            said += greetings(&mut tracker, now);
        }
        assert_eq!(said, 0);
        now = now.after(Duration::from_secs(3600));
    }
}

/// Carries out what a tracker wants, and counts what it sends.
fn greetings(tracker: &mut Tracker, now: Time) -> usize {
    let mut sent = 0;
    while let Some(action) = tracker.poll_action() {
        match action {
            Action::SyncLocal => tracker.handle_synced(true, now),
            Action::WriteLog { .. } => tracker.handle_log_written(true, now),
            Action::Peer { follower, action: peer::Action::WriteMap(_) } => {
                tracker.handle_map_written(follower, true, now);
            }
            Action::Peer { action: peer::Action::Send(Message::Hello(_)), .. } => sent += 1,
            other => panic!("nothing else is to be done: {other:?}"),
        }
    }
    sent
}

/// The link is up and nothing arrives: applications go on, and what is kept for the replica stays bounded (W7).
#[test]
fn a_stalled_replica_blocks_nobody() {
    for mut world in in_sync(&Settings::scripted()).take(4) {
        world.links[link()].stalled_until = world.now + PATIENCE * 3;
        for number in 0..2000 {
            world.ask(PRIMARY, write(number * 4096, 4096));
            if number % 3 == 0 {
                world.ask(PRIMARY, Work::Flush);
            }
            world.pass(5);
        }
        world.pass(1000);
        assert!(world.hosts[PRIMARY].application.waiting.is_empty());
        assert_ne!(world.report(link()).state, ReplicaState::InSync);
        world.finish();
    }
}

/// An agent dies and leaves writes in the disk's cache. The flush that the next one answers covers them too (W4).
#[test]
fn a_flush_after_a_restart_covers_what_was_written_before_it() {
    for mut world in in_sync(&Settings::scripted()) {
        world.ask(PRIMARY, write(8192, 4096));
        world.pass(20);
        world.crash(PRIMARY, Crash::Process);
        world.start(PRIMARY);
        world.act();
        world.ask(PRIMARY, Work::Flush);
        world.pass(100);
        assert!(world.hosts[PRIMARY].application.waiting.is_empty());
        world.crash(PRIMARY, Crash::Power);
        world.finish();
    }
}

/// A restart finds active extents whose blocks are all dirty in the map already. The map has nothing to be written,
/// and nothing may wait for it.
#[test]
fn a_restart_with_a_full_map_takes_writes_at_once() {
    let mut world = World::new(Settings::scripted(), Random::new(1));
    world.links[link()].stalled_until = PATIENCE;
    for _ in 0..3 {
        world.ask(PRIMARY, write(8192, 4096));
        world.pass(2000);
        assert!(world.hosts[PRIMARY].application.waiting.is_empty());
        world.crash(PRIMARY, Crash::Process);
        world.start(PRIMARY);
        world.act();
    }
    world.finish();
}

/// The same stories with the bug that each is about.
#[cfg(feature = "planted")]
mod planted {
    use blockmirror_protocol::planted::{Bug, plant};

    /// With this bug, the story goes wrong.
    fn breaks(bug: Bug, story: fn()) {
        plant(Some(bug));
        let told = std::panic::catch_unwind(story);
        plant(None);
        assert!(told.is_err(), "{bug:?} changes nothing in this story");
    }

    #[test]
    fn an_extent_that_leaves_the_log_early_forgets_a_block_that_reverts() {
        breaks(Bug::ReleaseExtentEarly, super::a_block_that_reverts_after_the_replica_has_it_is_remembered);
    }

    #[test]
    fn a_union_that_is_ignored_leaves_a_block_different() {
        breaks(Bug::IgnoreUnion, super::what_only_the_target_knows_of_is_copied);
    }

    #[test]
    fn a_frame_that_is_not_told_by_its_session_lands_late() {
        breaks(Bug::OldFrameLands, super::a_frame_of_an_old_session_never_lands_after_a_newer_copy);
    }

    #[test]
    fn a_rollback_that_marks_nothing_revives_blocks() {
        breaks(Bug::RollBackUnmarked, super::blocks_that_a_rollback_revives_are_remembered);
    }

    #[test]
    fn a_dirty_block_that_is_streamed_is_sent_twice() {
        breaks(Bug::SendBothVersions, super::a_sector_of_a_lost_window_is_sent_once_with_its_last_value);
    }

    #[test]
    fn a_window_that_is_forgotten_is_not_sent_at_all() {
        breaks(Bug::ForgetWindow, super::a_sector_of_a_lost_window_is_sent_once_with_its_last_value);
    }

    #[test]
    fn a_handshake_that_clears_a_map_is_noticed() {
        breaks(Bug::DropBitsAtHandshake, super::no_change_of_state_clears_a_map);
    }

    #[test]
    fn replicas_that_are_taken_for_equal_differ() {
        breaks(Bug::TakeForEqual, super::two_replicas_whose_primary_died_are_reconciled);
    }

    #[test]
    fn a_generation_that_goes_on_hides_a_split() {
        breaks(Bug::KeepGeneration, super::hosts_that_both_wrote_alone_are_never_taken_for_one);
    }

    #[test]
    fn a_write_before_its_record_is_forgotten_in_a_crash() {
        breaks(Bug::SkipLog, super::after_a_crash_only_active_extents_are_copied);
    }

    #[test]
    fn a_host_that_follows_whoever_promoted_itself_has_nothing_to_bring_back() {
        breaks(Bug::FollowUnagreed, super::what_a_host_overwrites_that_promoted_itself_comes_back);
    }

    #[test]
    fn an_overwritten_block_without_a_pre_image_does_not_come_back() {
        breaks(Bug::OverwriteUnsaved, super::a_replica_promoted_amid_a_resync_is_what_it_was_before);
    }
}

/// Any host of a volume can promote itself: by a mistake, or with a key that was stolen. The others follow, are resynced
/// and written to, and what they had was gone with the commit. It is kept beyond that, and an undo gives exactly that (L6).
#[test]
fn what_a_host_overwrites_that_promoted_itself_comes_back() {
    for mut world in in_sync(&hosts(3)) {
        write_here_and_there(&mut world, PRIMARY);
        let before = world.hosts[REPLICA].disk.content().clone();
        let between = LinkId::new(THIRD, REPLICA);
        world.crash(PRIMARY, Crash::Power);
        world.part(between);
        world.take_over(THIRD);
        for block in 0..BLOCKS {
            world.ask(THIRD, write(block * APART, 4096));
            world.pass(5);
        }
        world.join(between);
        world.wait_until("the other one was resynced", |world| world.is_in_sync(between));
        world.ask(THIRD, write(2 * MEBIBYTE + 4096, 8192));
        world.pass(LOG_IS_IDLE);
        world.check_equal(between);
        assert_ne!(*world.hosts[REPLICA].disk.content(), before);
        assert!(world.undo(REPLICA), "something is kept");
        world.wait_until("it is brought back", |world| {
            matches!(world.hosts[REPLICA].shell, Shell::Replica(_))
        });
        assert_eq!(*world.hosts[REPLICA].disk.content(), before);
        world.finish();
    }
}

/// How much was copied and compared since the hosts of a link last met.
fn handled(world: &World, link: LinkId) -> u64 {
    world.links[link].copied_bytes + world.links[link].compared_bytes
}

/// Writes here and there, until everybody has all of it and the primary knows.
fn write_here_and_there(world: &mut World, primary: usize) {
    for place in 0..8 {
        world.ask(primary, write(place * 5 * MEBIBYTE, 8192));
        world.pass(20);
    }
    world.ask(primary, Work::Flush);
    world.wait_until("all have all of it", |world| {
        let others = (0..world.hosts.len()).filter(|host| *host != primary);
        let mut links = others.map(|host| LinkId::new(primary, host));
        links.all(|link| world.is_in_sync(link) && world.report(link).lag_bytes == 0)
    });
    // Until the replicas have heard so.
    world.pass(1000);
}

/// A replica that was away while nothing was written was said to differ in all that its activity log still named, and so
/// was everybody after a switch in order: megabytes were compared, and the replicas were "not usable" meanwhile (D5).
#[test]
fn nothing_is_copied_or_compared_where_nothing_was_written() {
    for count in [2, 3] {
        for mut world in in_sync(&hosts(count)) {
            let assert_unhandled = |world: &World, primary: usize, what: &str| {
                for host in (0..count).filter(|host| *host != primary) {
                    assert_eq!(handled(world, LinkId::new(primary, host)), 0, "{what}, {count} hosts");
                }
            };
            write_here_and_there(&mut world, PRIMARY);
            for host in 1..count {
                let link = LinkId::new(PRIMARY, host);
                world.cut(link);
                world.wait_until("the link is lost", |world| !world.is_in_sync(link));
                world.wait_until("it follows again", |world| world.is_in_sync(link));
            }
            assert_unhandled(&world, PRIMARY, "links were cut");
            write_here_and_there(&mut world, PRIMARY);
            world.switch(PRIMARY, REPLICA);
            world.settle();
            assert_unhandled(&world, REPLICA, "the roles were switched");
            write_here_and_there(&mut world, REPLICA);
            world.step_aside(REPLICA, None);
            world.wait_until("nobody is primary", |world| {
                world.primaries().is_empty() && world.hosts[REPLICA].is_up()
            });
            world.take_over(REPLICA);
            world.settle();
            assert_unhandled(&world, REPLICA, "a primary was demoted and promoted");
            world.finish();
        }
    }
}

/// The replica had recorded that it has everything, and would have been promoted without a word.
#[test]
fn a_primary_that_was_demoted_and_promoted_again_answers_when_the_released_replica_knows() {
    for mut world in in_sync(&hosts(2)) {
        let link = LinkId::new(PRIMARY, REPLICA);
        write_here_and_there(&mut world, PRIMARY);
        world.step_aside(PRIMARY, None);
        world.wait_until("it is released", |world| {
            world.primaries().is_empty() && world.hosts[REPLICA].superblock.released
        });
        world.wait_until("it is a replica", |world| matches!(world.hosts[PRIMARY].shell, Shell::Replica(_)));
        while matches!(world.hosts[PRIMARY].shell, Shell::Replica(_)) {
            // At times somebody does not answer.
            world.promote_by_rule(PRIMARY);
            world.pass(1);
        }
        world.hold_up(link);
        world.wait_until("it is promoted", |world| world.hosts[PRIMARY].tracker().is_some());
        world.ask(PRIMARY, write(0, 4096));
        world.pass(5000);
        for start in 1.. {
            let waiting = &world.hosts[PRIMARY].application.waiting;
            assert_eq!(
                waiting.len(),
                1,
                "start {start}: the other one may be promoted without a word for it"
            );
            if start == 3 {
                break;
            }
            // It knows the same after a restart, also where a write waited and where its log named one.
            world.crash(PRIMARY, Crash::Process);
            world.start(PRIMARY);
            world.ask(PRIMARY, write(0, 4096));
            world.pass(5000);
        }
        world.join(link);
        world.wait_until("it is answered", |world| world.hosts[PRIMARY].application.waiting.is_empty());
        assert!(!world.hosts[REPLICA].superblock.released);
        world.finish();
    }
}

/// The last but one replica was removed while the primary was about to tell what all have: it was never told, since one
/// that is alone keeps no log, and yet there was always something to do at once.
#[test]
fn a_primary_that_is_left_with_one_replica_comes_to_rest() {
    for milliseconds in [0, 5, 50, 200] {
        for mut world in in_sync(&hosts(3)) {
            world.ask(PRIMARY, write(0, 4096));
            world.ask(PRIMARY, Work::Flush);
            world.pass(milliseconds);
            world.remove_member(PRIMARY, THIRD);
            world.pass(2000);
            world.finish();
        }
    }
}

/// A host was removed while another one was away, which listened to it as before when it came back.
#[test]
fn a_host_that_was_away_hears_of_a_removal_before_it_listens_to_the_removed_one() {
    for mut world in in_sync(&hosts(3)) {
        world.crash(THIRD, Crash::Process);
        world.take_over(REPLICA);
        world.remove_member(REPLICA, PRIMARY);
        world.start_all();
        world.wait_until("it follows the new primary", |world| world.is_in_sync(LinkId::new(REPLICA, THIRD)));
        assert!(!world.hosts[THIRD].members.contains(PRIMARY));
        world.wait_until("the removed one hears", |world| world.hosts[PRIMARY].members.is_removed());
        world.take_in(REPLICA, PRIMARY);
        world.wait_until("it follows", |world| world.is_in_sync(LinkId::new(REPLICA, PRIMARY)));
        world.finish();
    }
}

/// One replica follows all the time, and in its session more generations begin than any lineage has room for, because another one
/// comes and goes. A third one is away meanwhile. Its generation is what its primary's map is relative to, so that goes on naming
/// it: when the third one is back it is copied what it lacks, and nobody takes it for equal or for unrelated (L2).
#[test]
fn more_generations_than_a_lineage_holds_begin_while_a_replica_is_away() {
    for mut world in in_sync(&hosts(4)).take(3) {
        let (away, restless) = (LinkId::new(PRIMARY, THIRD), LinkId::new(PRIMARY, FOURTH));
        write_here_and_there(&mut world, PRIMARY);
        let before = world.hosts[THIRD].superblock.lineage[0];
        world.part(away);
        world.wait_until("its primary knows", |world| !world.is_in_sync(away));
        let session = world.links[link()].connection;
        let begun = begin_generations(&mut world, restless, LINEAGE_LIMIT as u64 + 8);
        let lineage = &world.hosts[PRIMARY].superblock.lineage;
        assert!(begun.len() > LINEAGE_LIMIT && lineage.len() <= lineage_limit(4), "{}", begun.len());
        assert!(lineage.contains(&before), "the generation of the one that is away is named still");
        assert_eq!(world.links[link()].connection, session, "the first one has followed all the time");
        world.check_equal(link());
        let (at, now) = (&world.hosts[REPLICA].superblock, &world.hosts[PRIMARY].superblock);
        assert_eq!(at.lineage.first(), now.lineage.first());
        world.join(away);
        world.wait_until("it follows", |world| world.is_in_sync(away));
        let copied_bytes = world.links[away].copied_bytes;
        assert!((1..world.settings.size_bytes / 2).contains(&copied_bytes), "{copied_bytes}");
        world.check_equal(away);
        world.finish();
    }
}

/// Reported of others: "unrelated data" after several promotions, because those that had taken turns named a few generations only,
/// and none that the one had which was away. Here two hosts take turns, and the third one comes back and is copied what it lacks by
/// itself (L3). Where they took more turns than a lineage has room for, nothing tells any more what the third one had: then it is
/// taken for nothing, neither for equal nor for new, until an operator decides whose content counts (rule 10 of L3).
#[test]
fn a_host_that_was_away_for_several_promotions_is_no_stranger() {
    for (turns, is_known) in [(4, true), (lineage_limit(3) as u64 + 5, false)] {
        for mut world in in_sync(&hosts(3)).take(5) {
            write_here_and_there(&mut world, PRIMARY);
            world.crash(THIRD, Crash::Power);
            for turn in 0..turns {
                let (from, to) = if turn % 2 == 0 { (PRIMARY, REPLICA) } else { (REPLICA, PRIMARY) };
                let link = LinkId::new(from, to);
                world.ask(from, write(turn * APART, 4096));
                world.wait_until("all is there", |world| {
                    world.is_in_sync(link) && world.report(link).lag_bytes == 0
                });
                world.step_aside(from, None);
                world.wait_until("nobody is primary", |world| {
                    world.primaries().is_empty() && matches!(world.hosts[from].shell, Shell::Replica(_))
                });
                world.take_over(to);
            }
            let before = world.hosts[THIRD].superblock.lineage.clone();
            let primary = world.primaries()[0];
            let back = LinkId::new(primary, THIRD);
            world.start_all();
            match is_known {
                true => world.wait_until("it follows", |world| world.is_in_sync(back)),
                false => {
                    world.pass(10_000);
                    assert!(!world.is_in_sync(back) && world.links[back].copied_bytes == 0);
                    assert_eq!(world.hosts[THIRD].superblock.lineage, before);
                }
            }
            world.finish();
        }
    }
}

/// Reported of others: a new peer that inherited "in sync", when the primary crashed and nothing of its activity log was left. What
/// was under way is known to nobody then, and the new peer never had it. Without its log a primary says of nobody that it has
/// everything before all was looked at (D1, D4).
#[test]
fn a_new_peer_is_not_in_sync_after_a_crash_without_an_activity_log() {
    for mut world in in_sync(&hosts(3)) {
        let joined = LinkId::new(PRIMARY, THIRD);
        write_here_and_there(&mut world, PRIMARY);
        world.replace(THIRD);
        world.wait_until("it has everything", |world| world.is_in_sync(joined));
        world.hold_up(joined);
        world.ask(PRIMARY, write(20 * MEBIBYTE, 8192));
        let moment = world.random.up_to(Duration::from_millis(20));
        world.run_until(world.now + moment);
        world.crash(PRIMARY, Crash::Power);
        world.hosts[PRIMARY].files.remove(activity_log::FILE_NAME);
        assert_eq!(world.hosts[PRIMARY].recover_log(), Recovered::Unsure { serial: 0 });
        // The agent makes it whole before it goes on.
        for (serial, record) in activity_log::ring_after(0, true) {
            let offset = activity_log::record_offset(serial);
            world.hosts[PRIMARY].files.write_now(activity_log::FILE_NAME, offset, &record);
        }
        world.start(PRIMARY);
        world.act();
        for host in [REPLICA, THIRD] {
            let report = world.report(LinkId::new(PRIMARY, host));
            assert_eq!(
                (report.state, report.map_bytes),
                (ReplicaState::OutOfSync, world.settings.size_bytes)
            );
        }
        world.join(joined);
        world.wait_until("all was looked at", |world| world.is_in_sync(joined));
        world.check_equal(joined);
        world.finish();
    }
}

/// The same where the primary ends, and the one that has followed for so long is promoted. Of more generations than it has room for
/// it knows the newest ones, since nobody tells it which of them others may be at. So it takes the one that was away for nothing, until
/// an operator decides (rule 10 of L3).
#[test]
fn a_replica_that_followed_for_long_takes_a_host_that_was_away_for_nothing() {
    for (rounds, is_known) in [(8, true), (LINEAGE_LIMIT as u64 + 8, false)] {
        for mut world in in_sync(&hosts(4)).take(3) {
            let (away, restless) = (LinkId::new(PRIMARY, THIRD), LinkId::new(PRIMARY, FOURTH));
            write_here_and_there(&mut world, PRIMARY);
            world.crash(THIRD, Crash::Power);
            world.wait_until("its primary knows", |world| !world.is_in_sync(away));
            begin_generations(&mut world, restless, rounds);
            world.crash(PRIMARY, Crash::Power);
            world.take_over(REPLICA);
            world.ask(REPLICA, write(0, 4096));
            let back = LinkId::new(REPLICA, THIRD);
            world.start(THIRD);
            world.act();
            match is_known {
                true => world.wait_until("it follows", |world| world.is_in_sync(back)),
                false => {
                    world.pass(10_000);
                    assert!(!world.is_in_sync(back) && world.links[back].copied_bytes == 0);
                }
            }
            world.finish();
        }
    }
}

/// A replica comes and goes, and each time a generation begins. Gives them.
fn begin_generations(world: &mut World, restless: LinkId, rounds: u64) -> BTreeSet<GenerationId> {
    let mut begun = BTreeSet::new();
    for round in 0..rounds {
        world.cut(restless);
        world.wait_until("it is lost", |world| !world.is_in_sync(restless));
        world.ask(PRIMARY, write(round * APART, 4096));
        world.wait_until("it is answered", |world| world.hosts[PRIMARY].application.waiting.is_empty());
        world.wait_until("it follows again", |world| world.is_in_sync(restless));
        begun.extend(world.hosts[PRIMARY].superblock.lineage.first().copied());
    }
    begun
}
