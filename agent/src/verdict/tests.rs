//! Facts and the words for them.

use super::*;
use crate::config::{Compression, DeviceKind, Mode};
use crate::control::api::Resolved;
use crate::control::api::{
    Alone, Awaited, Better, Blocked, DeviceStatus, Elsewhere, Errors, FailureKind, Grown, Health, HostStatus,
    Hung, Panics, Rebuild, Rollback, STATUS_SCHEMA, Shrunk, Stake, StatusReply, Succession, WentOn,
};

fn peer(name: &str, role: Role) -> PeerStatus {
    PeerStatus {
        promised: false,
        name: name.parse().unwrap(),
        fingerprint: "07".repeat(32),
        role,
        addresses: vec![format!("{name}:7447").parse().unwrap()],
        connection: Connection::Connected,
        connection_seconds: Some(180),
        paused_there: false,
        path: None,
        error: None,
        mode: Mode::Async,
        compression: Compression::Lz4,
        resync_limit_bytes: Some(120 << 20),
        is_beyond: false,
        state: Some(PeerState::InSync),
        data: Some(CopyState::Consistent),
        out_of_sync_bytes: Some(0),
        lag_bytes: Some(0),
        lag_seconds: Some(0),
        heard: None,
        durable_epoch: None,
        resync: None,
        compare: None,
    }
}

fn replica(name: &str) -> PeerStatus {
    peer(name, Role::Replica)
}

/// A replica whose link is not there, with some bytes marked.
fn away(name: &str, connection: Connection, out_of_sync_bytes: u64) -> PeerStatus {
    let state = Some(PeerState::OutOfSync);
    PeerStatus { connection, state, out_of_sync_bytes: Some(out_of_sync_bytes), ..replica(name) }
}

fn resyncing(name: &str) -> PeerStatus {
    PeerStatus {
        state: Some(PeerState::Resyncing),
        data: Some(CopyState::Inconsistent),
        out_of_sync_bytes: Some(57 << 30),
        resync: Some(Progress::new(43 << 30, 100 << 30, 120 << 20)),
        ..replica(name)
    }
}

fn facts(role: Role, peers: Vec<PeerStatus>) -> VolumeFacts {
    VolumeFacts {
        name: "data".parse().unwrap(),
        id: "00".repeat(16),
        role,
        size_bytes: 100 << 30,
        block_size_bytes: 4096,
        backing: "/dev/vdb".into(),
        backing_error: None,
        storage: Some("io_uring".to_owned()),
        devices: Vec::new(),
        data: Some(CopyState::Consistent),
        epoch: Some(12),
        succession: Succession::default(),
        blocked: None,
        rebuild: None,
        health: Health::default(),
        touched: None,
        backing_users: Vec::new(),
        peers,
    }
}

fn check(facts: VolumeFacts, state: VolumeState, verdict: &str, action: &str) {
    let status = running(facts);
    assert_eq!((status.verdict.as_str(), status.state, status.action.as_str()), (verdict, state, action));
}

#[test]
fn a_primary_says_how_well_it_is_covered() {
    let gone = away("b", Connection::Disconnected, 12 << 20);
    let refused = PeerStatus {
        error: Some("connection refused".into()),
        connection: Connection::Connecting,
        ..gone.clone()
    };
    let look = "on b: blockmirror status data";
    let table = [
        (vec![replica("b")], VolumeState::Healthy, "healthy: b holds an identical copy", "none"),
        (
            vec![replica("b"), replica("c")],
            VolumeState::Healthy,
            "healthy: b and c hold identical copies",
            "none",
        ),
        (
            vec![],
            VolumeState::Degraded,
            "at risk: no replica has joined; this host has the only copy",
            "blockmirror invite data",
        ),
        (
            vec![gone.clone()],
            VolumeState::Degraded,
            "at risk: b is disconnected since 3m; 12M not copied yet",
            look,
        ),
        (
            vec![refused],
            VolumeState::Degraded,
            "at risk: b is disconnected since 3m (connection refused); 12M not copied yet",
            look,
        ),
        (
            vec![gone, replica("c")],
            VolumeState::Degraded,
            "degraded: c holds an identical copy; b is disconnected since 3m; 12M not copied yet",
            look,
        ),
        (
            vec![away("b", Connection::Disconnected, 0)],
            VolumeState::Degraded,
            "at risk: b is disconnected since 3m; nothing was written since",
            look,
        ),
        (
            vec![away("b", Connection::Paused, 4096)],
            VolumeState::Degraded,
            "at risk: b is paused since 3m; 4K not copied yet",
            "blockmirror resume data b",
        ),
        (
            vec![PeerStatus { paused_there: true, ..away("b", Connection::Paused, 0) }],
            VolumeState::Degraded,
            "at risk: b is paused there since 3m; nothing was written since",
            "on b: blockmirror resume data HOST",
        ),
        (
            vec![PeerStatus { connection_seconds: Some(600), ..away("b", Connection::Disconnected, 0) }],
            VolumeState::Degraded,
            "at risk: b is disconnected since 10m; nothing was written since",
            "on b: blockmirror status data; if it moved: blockmirror set-address data b ADDRESS:PORT",
        ),
        (
            vec![resyncing("b")],
            VolumeState::Syncing,
            "syncing: b has 43 % (43G of 100G, 120M/s, 8m 7s left) and is not usable until it has all",
            "none",
        ),
        (
            vec![
                PeerStatus { data: Some(CopyState::Consistent), resync: None, ..resyncing("b") },
                replica("c"),
            ],
            VolumeState::Syncing,
            "syncing: c holds an identical copy; b has a part",
            "none",
        ),
        (
            vec![PeerStatus { connection: Connection::Disconnected, ..resyncing("b") }],
            VolumeState::Degraded,
            "at risk: b is disconnected since 3m; 57G not copied yet; its copy is not usable until it has all",
            look,
        ),
        (
            vec![PeerStatus {
                state: Some(PeerState::Behind),
                out_of_sync_bytes: Some(12 << 20),
                lag_bytes: Some(4 << 20),
                lag_seconds: Some(7),
                durable_epoch: Some(4),
                ..replica("b")
            }],
            VolumeState::Degraded,
            "at risk: b is behind for 7s; 12M not copied yet",
            "none",
        ),
        (
            vec![PeerStatus {
                state: Some(PeerState::Failed),
                error: Some("input/output error".into()),
                out_of_sync_bytes: Some(4096),
                ..replica("b")
            }],
            VolumeState::Degraded,
            "at risk: b has failed (input/output error); 4K not copied yet",
            look,
        ),
        (
            vec![PeerStatus { state: None, out_of_sync_bytes: None, ..replica("b") }],
            VolumeState::Syncing,
            "syncing: b is connected and tells what it has",
            "none",
        ),
    ];
    for (peers, state, verdict, action) in table {
        check(facts(Role::Primary, peers), state, verdict, action);
    }
}

#[test]
fn writes_that_wait_for_a_replica_are_the_first_thing_that_is_said() {
    let blocked = Blocked {
        in_sync: 0,
        required: 1,
        requests: 3,
        oldest_seconds: 12,
        limit_seconds: Some(30),
        promised_to: None,
    };
    let gone = || vec![away("b", Connection::Disconnected, 4096)];
    check(
        VolumeFacts { blocked: Some(blocked.clone()), ..facts(Role::Primary, gone()) },
        VolumeState::Degraded,
        "blocked: writes wait until 1 replica is in sync, and fail after 30s (on_replica_loss); 3 wait, the oldest for \
         12s; b is disconnected since 3m; 4K not copied yet",
        "on b: blockmirror status data",
    );
    let none_yet = Blocked { in_sync: 1, required: 2, requests: 0, oldest_seconds: 0, ..blocked.clone() };
    let status = running(VolumeFacts { blocked: Some(none_yet), ..facts(Role::Primary, gone()) });
    assert!(status.verdict.contains("until 2 replicas are in sync (1 now)"), "{}", status.verdict);
    assert!(status.verdict.contains("none waits now"), "{}", status.verdict);
}

/// That replies go on without a replica that was promised otherwise is the operator's word against an older one of his.
#[test]
fn writes_that_wait_for_a_promise_say_who_has_it_and_how_it_ends() {
    let promised_to = Some("b".to_owned());
    let blocked = Blocked {
        in_sync: 0,
        required: 0,
        requests: 1,
        oldest_seconds: 12,
        limit_seconds: None,
        promised_to,
    };
    check(
        VolumeFacts {
            blocked: Some(blocked),
            ..facts(Role::Primary, vec![away("b", Connection::Disconnected, 4096)])
        },
        VolumeState::Degraded,
        "blocked: writes wait until b hears that they are answered without it: it was promised that they are not, and \
         could be promoted without them; 1 waits for 12s; b is disconnected since 3m; 4K not copied yet",
        "start b, or reach it; where it is lost for good: blockmirror remove-peer data b --force",
    );
}

/// An old primary whose successors were away served its old content, and status said no more than "at risk".
#[test]
fn a_primary_that_starts_alone_says_since_when_it_heard_from_nobody() {
    let alone = Alone {
        heard_at_unix_seconds: Some(1_700_000_000),
        heard_seconds: Some(32_400),
        hosts: 1,
        of: 3,
        majority: 2,
        is_awaited: false,
    };
    let with = |alone| {
        let peers =
            vec![away("b", Connection::Disconnected, 4096), away("c", Connection::Disconnected, 4096)];
        let mut facts = facts(Role::Primary, peers);
        facts.succession.alone = Some(alone);
        running(facts)
    };
    let status = with(alone);
    let words = "at risk: no other host was heard since 22:13:20 UTC, 9h ago: one may have been promoted; b is disconnected";
    assert!(status.verdict.starts_with(words), "{}", status.verdict);
    assert_eq!(status.action, "on b: blockmirror status data");

    let status = with(Alone { heard_at_unix_seconds: None, heard_seconds: None, is_awaited: true, ..alone });
    let words = "blocked: writes wait until 2 of 3 hosts were heard, this one included (start_alone); no other host was \
                 heard since the start: one may";
    assert!(status.verdict.starts_with(words), "{}", status.verdict);
    assert!(
        status
            .action
            .starts_with("on b: blockmirror status data; where no other host was promoted: start_alone")
    );

    let status = with(Alone { hosts: 2, of: 5, majority: 3, is_awaited: true, ..alone });
    let words = "blocked: writes wait until 3 of 5 hosts were heard, this one included (start_alone); b is";
    assert!(status.verdict.starts_with(words), "{}", status.verdict);
}

/// Other mirrors have said "UpToDate" over a map that was not empty.
#[test]
fn a_replica_is_never_called_in_sync_over_a_map_that_is_not_empty_or_not_known() {
    for out_of_sync_bytes in [Some(4096), None] {
        let status = running(facts(Role::Primary, vec![PeerStatus { out_of_sync_bytes, ..replica("b") }]));
        assert_eq!(status.state, VolumeState::Syncing);
        assert!(status.verdict.starts_with("syncing: b waits to be copied to; "), "{}", status.verdict);
        assert!(!status.verdict.contains("nothing was written"), "{}", status.verdict);
    }
}

#[test]
fn a_failed_primary_says_first_that_it_failed_and_where_the_data_is() {
    let failed = |peers| VolumeFacts {
        backing_error: Some("input/output error".into()),
        ..facts(Role::Primary, peers)
    };
    let unusable = PeerStatus { connection: Connection::Disconnected, ..resyncing("b") };
    for (peers, verdict, action) in [
        (
            vec![unusable.clone(), replica("c")],
            "failed: the backing /dev/vdb has failed (input/output error); c holds an identical copy",
            "blockmirror rebuild data --backing PATH --from c",
        ),
        (
            vec![
                unusable.clone(),
                away("c", Connection::Disconnected, 8192),
                away("d", Connection::Paused, 4096),
            ],
            "failed: the backing /dev/vdb has failed (input/output error); d has a usable copy; 4K not copied yet",
            "blockmirror rebuild data --backing PATH --from d",
        ),
        (
            vec![unusable.clone(), PeerStatus { data: None, ..away("c", Connection::Disconnected, 0) }],
            "failed: the backing /dev/vdb has failed (input/output error); c had everything when it was last heard of",
            "check the disk; if it is lost: blockmirror rebuild data --backing PATH --from c",
        ),
        (
            vec![unusable],
            "failed: the backing /dev/vdb has failed (input/output error); no replica is known to hold a usable copy",
            "check the disk, then: systemctl restart blockmirror-agent",
        ),
    ] {
        check(failed(peers), VolumeState::Failed, verdict, action);
    }
}

#[test]
fn a_primary_whose_disk_is_filled_says_from_whom_and_what_stands_in_the_way() {
    let rebuild = || Rebuild {
        source: "b".to_owned(),
        missing_bytes: 75 << 30,
        is_reached: true,
        waiting: 0,
        unreadable_bytes: 0,
        is_unrecorded: false,
        is_source_lost: false,
    };
    let with = |rebuild, peers| VolumeFacts { rebuild: Some(rebuild), ..facts(Role::Primary, peers) };
    let said = "the volume is served from b as far as it is not here yet; 25 % (25G of 100G) is on this host's disk; without b the \
                rest is lost";
    let of = "25 % (25G of 100G) is on this host's disk";
    let split = PeerStatus { state: Some(PeerState::SplitBrain), ..away("c", Connection::Connecting, 0) };
    for (facts, state, verdict, action) in [
        (with(rebuild(), vec![replica("b")]), VolumeState::Syncing, format!("rebuilding: {said}"), "none"),
        (
            with(Rebuild { unreadable_bytes: 4096, ..rebuild() }, vec![replica("b")]),
            VolumeState::Degraded,
            format!("rebuilding: {said}; 4K of the rest can't be read there: what needs them fails"),
            "on b: check the disk; what is overwritten here whole is not needed any more",
        ),
        (
            with(
                Rebuild { is_reached: false, waiting: 2, ..rebuild() },
                vec![away("b", Connection::Disconnected, 0)],
            ),
            VolumeState::Degraded,
            format!(
                "blocked: b is not connected, and alone has what this host's new disk lacks: reads of that wait for it; 2 wait; {of}"
            ),
            "start b, or reach it",
        ),
        (
            with(Rebuild { is_unrecorded: true, ..rebuild() }, vec![replica("b")]),
            VolumeState::Degraded,
            format!(
                "blocked: the state folder can't be written, where it is recorded which blocks are on this host's new disk: \
                 flushes wait, and writes to the others; {of}"
            ),
            "mend the state folder; it goes on by itself",
        ),
        (
            with(
                Rebuild { is_source_lost: true, is_reached: false, ..rebuild() },
                vec![away("b", Connection::Connecting, 0)],
            ),
            VolumeState::Degraded,
            format!(
                "blocked: the copy of b is not the one any more that this host's new disk is being filled from; reads of the \
                 rest wait: none waits now; {of}"
            ),
            "blockmirror rebuild data --backing PATH --from HOST --overwrite, or stop this agent, and on a replica: blockmirror \
             promote data",
        ),
    ] {
        check(facts, state, &verdict, action);
    }
    // What else is wrong comes first.
    let status = running(with(rebuild(), vec![replica("b"), split]));
    assert_eq!(status.state, VolumeState::SplitBrain);
    assert!(status.verdict.starts_with("split brain: "), "{}", status.verdict);
    assert!(status.verdict.ends_with(&format!("; rebuilding: {said}")), "{}", status.verdict);
}

/// A restart of the agent was advised, though it tries by itself, and the disk was named where something else was wrong.
#[test]
fn a_volume_that_cannot_be_opened_is_tried_again_by_itself() {
    let closed = |role| VolumeFacts {
        backing_error: Some("the superblock is damaged".to_owned()),
        health: Health { is_closed: true, ..Health::default() },
        ..facts(role, Vec::new())
    };
    for (role, consequence) in [
        (Role::Primary, "no replica is known to hold a usable copy"),
        (Role::Replica, "this copy is no longer updated"),
    ] {
        let verdict =
            format!("failed: the volume can't be opened (the superblock is damaged); {consequence}");
        check(closed(role), VolumeState::Failed, &verdict, "mend that, and it is opened by itself");
    }
}

#[test]
fn a_disk_whose_size_has_changed_is_named_with_both_sizes_and_with_what_to_do() {
    let shrunk = |role, peers| VolumeFacts {
        health: Health {
            is_closed: true,
            shrunk: Some(Shrunk { size_bytes: 8 << 20, volume_bytes: 16 << 20 }),
            ..Health::default()
        },
        backing_error: Some("/dev/vdb has 8388608 bytes, the volume 16777216".to_owned()),
        ..facts(role, peers)
    };
    let verdict = "failed: the backing /dev/vdb has become smaller than the volume: it has 8388608 bytes, and had \
                   16777216; what was beyond its end is not there";
    for (facts, action) in [
        (
            shrunk(Role::Replica, vec![peer("a", Role::Primary)]),
            "make /dev/vdb 16777216 bytes long again and it is opened by itself; what differs then is copied",
        ),
        (
            shrunk(Role::Primary, vec![away("b", Connection::Disconnected, 0)]),
            "with a disk of 16777216 bytes or more: blockmirror rebuild data --backing PATH --from b; only where nothing \
             was lost: make /dev/vdb 16777216 bytes long again and it is opened by itself",
        ),
        (
            shrunk(Role::Primary, Vec::new()),
            "only where nothing was lost: make /dev/vdb 16777216 bytes long again and it is opened by itself",
        ),
    ] {
        check(facts, VolumeState::Failed, verdict, action);
    }
}

/// Nothing was said of a device that had grown, whose operator expects the volume to be as large.
#[test]
fn a_disk_that_became_larger_is_named_with_both_sizes_and_nothing_else_is_wrong() {
    let grown = Some(Grown { size_bytes: 200 << 30, before_bytes: 100 << 30 });
    let words = "; warning: the backing /dev/vdb has become larger: it has 214748364800 bytes, and had 107374182400; the \
                 volume keeps its 107374182400 bytes, and what is beyond them is not mirrored";
    for (role, other, state, verdict) in [
        (Role::Primary, replica("b"), VolumeState::Healthy, "healthy: b holds an identical copy"),
        (Role::Replica, peer("a", Role::Primary), VolumeState::Following, "following a; consistent"),
    ] {
        let health = Health { grown, ..Health::default() };
        let facts = VolumeFacts { health, ..facts(role, vec![other]) };
        check(facts, state, &format!("{verdict}{words}"), "none");
    }
}

/// Applications were told that there is no space, and status said to make room.
#[test]
fn a_disk_that_became_smaller_while_it_was_open_is_named_with_both_sizes_and_with_the_way_out() {
    let shrunk = |role, peers| VolumeFacts {
        health: Health {
            shrunk: Some(Shrunk { size_bytes: 8 << 20, volume_bytes: 16 << 20 }),
            errors: Some(Errors { writes: 1, last: "input/output error".to_owned(), ..Errors::default() }),
            ..Health::default()
        },
        ..facts(role, peers)
    };
    let words = "the backing /dev/vdb has become smaller than the volume: it has 8388608 bytes, and had 16777216; what \
                 was beyond its end is not there; applications got errors (1 write), the first 0s and the last 0s ago: \
                 input/output error";
    for (facts, state, verdict, action) in [
        (
            shrunk(Role::Primary, vec![replica("b")]),
            VolumeState::Degraded,
            "degraded: b holds an identical copy",
            "stop what uses the device, then: blockmirror switch data --to b; /dev/vdb can be made 16777216 bytes long \
             again after that",
        ),
        (
            // What failed here can't be copied.
            shrunk(Role::Primary, vec![away("b", Connection::Connected, 4096)]),
            VolumeState::Syncing,
            "syncing: b waits to be copied to; 4K not copied yet",
            "stop what uses the device, then, on b: blockmirror promote data --force, which goes on with what it has; \
             /dev/vdb can be made 16777216 bytes long again after that",
        ),
        (
            shrunk(
                Role::Replica,
                vec![PeerStatus { connection: Connection::Connected, ..peer("a", Role::Primary) }],
            ),
            VolumeState::Following,
            "following a; consistent",
            "make /dev/vdb 16777216 bytes long again; what differs then is copied from the primary",
        ),
    ] {
        check(facts, state, &format!("{verdict}; {words}"), action);
    }
}

#[test]
fn a_volume_that_ended_the_agent_says_so_and_how_to_try_again() {
    let notes = "/var/lib/blockmirror/data/panics".into();
    let panics = Panics { times: 2, last: "at src/x.rs:1: no".to_owned(), notes };
    check(
        VolumeFacts {
            health: Health { panics: Some(panics), ..Health::default() },
            backing_error: Some("it ended the agent".to_owned()),
            ..facts(Role::Primary, vec![replica("b")])
        },
        VolumeState::Failed,
        "failed: this volume ended the agent 2 times in a row, which is a mistake of Blockmirror's (at src/x.rs:1: no); \
         it stays closed, so that other volumes are served, and its state is kept",
        "to try again: rm /var/lib/blockmirror/data/panics; systemctl restart blockmirror-agent",
    );
}

#[test]
fn a_disk_that_is_not_there_or_does_not_answer_is_named() {
    let with = |health, role, peers| VolumeFacts { health, ..facts(role, peers) };
    let awaited = Awaited { what: "/dev/vdb is not there".to_owned(), seconds: 20 };
    let awaits = || Health { awaited: Some(awaited.clone()), ..Health::default() };
    check(
        with(awaits(), Role::Primary, vec![away("b", Connection::Disconnected, 0)]),
        VolumeState::Awaiting,
        "awaiting: /dev/vdb is not there, for 20s; the device is served when it comes",
        "bring it back and it is taken up by itself; if it is lost: blockmirror rebuild data --backing PATH --from b",
    );
    check(
        with(awaits(), Role::Replica, vec![peer("a", Role::Primary)]),
        VolumeState::Awaiting,
        "awaiting: /dev/vdb is not there, for 20s; this copy is kept up again when it comes",
        "bring it back and it is taken up by itself",
    );
    let hangs =
        || Health { hung: Some(Hung { what: "/dev/vdb".to_owned(), seconds: 12 }), ..Health::default() };
    check(
        with(hangs(), Role::Primary, vec![replica("b")]),
        VolumeState::Hung,
        "hung: /dev/vdb has not answered for 12s; last known: healthy: b holds an identical copy",
        "check the disk; to go on without it, on b: blockmirror promote data",
    );
    let status = running(with(hangs(), Role::Primary, vec![away("b", Connection::Disconnected, 4096)]));
    assert_eq!((status.state, status.action.as_str()), (VolumeState::Hung, "check the disk"));
}

/// Writers had errors, and status said "healthy" and "none".
#[test]
fn errors_are_told_also_when_all_is_well_again() {
    let errors = |errors| Health { errors: Some(errors), ..Health::default() };
    let full = Errors {
        writes: 3,
        flushes: 1,
        no_room: 3,
        first_seconds: 90,
        last_seconds: 5,
        last: "no space left on device".to_owned(),
        ..Errors::default()
    };
    check(
        VolumeFacts { health: errors(full), ..facts(Role::Primary, vec![replica("b")]) },
        VolumeState::Degraded,
        "degraded: b holds an identical copy; applications got errors (3 writes, 1 flush), the first 1m 30s and the \
         last 5s ago: no space left on device",
        "make room for /dev/vdb, and fsck the file systems on the volume; a comparison that finds nothing ends this: \
         blockmirror compare data b",
    );
    let disk = Errors { copies: 2, last: "input/output error".to_owned(), ..Errors::default() };
    check(
        VolumeFacts { health: errors(disk), ..facts(Role::Replica, vec![peer("a", Role::Primary)]) },
        VolumeState::Following,
        "following a; consistent; the disk gave errors (2), the first 0s and the last 0s ago: input/output error",
        "check the disk of /dev/vdb; a restart of the agent ends this",
    );
    let stale = Health { stale: vec!["mounted at /mnt (ext4)".to_owned()], ..Health::default() };
    check(
        VolumeFacts { health: stale, ..facts(Role::Primary, vec![replica("b")]) },
        VolumeState::Degraded,
        "degraded: b holds an identical copy; the device of before the agent's start is still mounted at /mnt (ext4), \
         and gives errors only",
        "a stale mount: umount it, fsck the volume's device, mount that",
    );
}

#[test]
fn a_replica_says_what_its_copy_is_good_for() {
    let primary = peer("a", Role::Primary);
    let gone =
        PeerStatus { connection: Connection::Disconnected, connection_seconds: Some(300), ..primary.clone() };
    let look = "on a: blockmirror status data";
    let promote = "on a: blockmirror status data; if a is gone: blockmirror promote data";
    let table = [
        (CopyState::Consistent, primary.clone(), VolumeState::Following, "following a; consistent", "none"),
        (
            CopyState::Inconsistent,
            primary.clone(),
            VolumeState::Resyncing,
            "resyncing from a: not usable until complete",
            "none",
        ),
        (
            CopyState::Inconsistent,
            PeerStatus { resync: Some(Progress::new(1 << 30, 4 << 30, 0)), ..primary.clone() },
            VolumeState::Resyncing,
            "resyncing from a, 25 % (1G of 4G, not moving): not usable until complete",
            "none",
        ),
        (
            CopyState::Consistent,
            gone.clone(),
            VolumeState::Waiting,
            "primary a is not connected since 5m; this copy is consistent",
            promote,
        ),
        (
            CopyState::Inconsistent,
            gone.clone(),
            VolumeState::Waiting,
            "primary a is not connected since 5m; this copy is not usable: its resync is not complete",
            look,
        ),
        (
            CopyState::Consistent,
            PeerStatus { connection_seconds: Some(0), ..gone.clone() },
            VolumeState::Waiting,
            "primary a is not connected; this copy is consistent",
            promote,
        ),
        (
            CopyState::Empty,
            gone,
            VolumeState::Waiting,
            "primary a is not connected since 5m; this copy is not usable: nothing was copied yet",
            look,
        ),
        (
            CopyState::Consistent,
            PeerStatus { connection: Connection::Paused, ..primary.clone() },
            VolumeState::Waiting,
            "primary a is paused since 3m; this copy is consistent",
            "blockmirror resume data a",
        ),
        (
            CopyState::Consistent,
            PeerStatus { connection: Connection::Paused, paused_there: true, ..primary.clone() },
            VolumeState::Waiting,
            "primary a is paused there since 3m; this copy is consistent",
            "on a: blockmirror resume data HOST",
        ),
        (
            CopyState::Consistent,
            PeerStatus { connection: Connection::Disconnected, connection_seconds: Some(600), ..primary },
            VolumeState::Waiting,
            "primary a is not connected since 10m; this copy is consistent",
            "on a: blockmirror status data; if a is gone: blockmirror promote data; if it moved: \
             blockmirror set-address data a ADDRESS:PORT",
        ),
    ];
    for (data, peer, state, verdict, action) in table {
        check(
            VolumeFacts { data: Some(data), ..facts(Role::Replica, vec![replica("c"), peer]) },
            state,
            verdict,
            action,
        );
    }
    check(
        facts(Role::Replica, vec![]),
        VolumeState::Waiting,
        "no primary is known; this copy is consistent",
        "none",
    );
    check(
        VolumeFacts { backing_error: Some("no space left on device".into()), ..facts(Role::Replica, vec![]) },
        VolumeState::Failed,
        "failed: the backing /dev/vdb has failed (no space left on device); this copy is no longer updated",
        "check the disk; it is opened anew when the primary greets next, or this host is promoted",
    );
}

#[test]
fn a_superseded_primary_says_who_keeps_it_from_becoming_a_replica() {
    let superseded = |openers: &[&str]| VolumeFacts {
        succession: Succession {
            superseded_by: Some("b".to_owned()),
            openers: openers.iter().map(|&opener| opener.to_owned()).collect(),
            ..Succession::default()
        },
        ..facts(Role::Primary, vec![replica("b")])
    };
    check(
        superseded(&["NBD client process 7"]),
        VolumeState::Superseded,
        "superseded: b was promoted, so this host takes no writes; it becomes a replica of b when nobody has its \
         device open: NBD client process 7",
        "close the device: NBD client process 7",
    );
    check(
        superseded(&[]),
        VolumeState::Superseded,
        "superseded: b was promoted, so this host takes no writes; it becomes a replica of b",
        "none",
    );
}

#[test]
fn a_host_that_was_removed_is_told_so_and_not_to_promote() {
    let removed = Some(Removed { by: "a".parse().unwrap(), at_unix_seconds: 1_700_000_000 });
    let succession = Succession { removed, ..Succession::default() };
    check(
        VolumeFacts {
            succession: succession.clone(),
            ..facts(Role::Replica, vec![peer("a", Role::Primary)])
        },
        VolumeState::Removed,
        "removed: this host was removed from data by a at 22:13:20 UTC, and is not kept up; this copy is consistent",
        "to take it in again, on the primary: blockmirror invite data; here: blockmirror join - --backing /dev/vdb",
    );
    check(
        VolumeFacts { succession, ..facts(Role::Primary, vec![replica("b")]) },
        VolumeState::Healthy,
        "healthy: b holds an identical copy; this host was removed from data by a at 22:13:20 UTC",
        "none",
    );
}

#[test]
fn a_split_brain_is_told_on_both_sides_with_the_command() {
    let split = PeerStatus {
        connection: Connection::Disconnected,
        state: Some(PeerState::SplitBrain),
        ..replica("b")
    };
    let own = Succession { own_name: Some("a".to_owned()), ..Succession::default() };
    check(
        VolumeFacts { succession: own, ..facts(Role::Primary, vec![split]) },
        VolumeState::SplitBrain,
        "split brain: b and this host both wrote after they were last in sync, and neither takes the other's content",
        "to keep this host's content, on b: blockmirror resolve data --keep a; to keep b's, \
         here: blockmirror demote data, then blockmirror resolve data --keep b",
    );
    let succession =
        Succession { split_from: Some("a".to_owned()), split_seconds: Some(60), ..Succession::default() };
    check(
        VolumeFacts { succession, ..facts(Role::Replica, vec![peer("a", Role::Primary)]) },
        VolumeState::SplitBrain,
        "split brain since 1m: this host wrote alone after it was last in sync with a, and takes nothing from it; \
         this copy is consistent",
        "to keep a's content: blockmirror resolve data --keep a; --dry-run tells what that loses",
    );
}

#[test]
fn where_a_primary_was_set_back_both_sides_say_so() {
    let beyond = PeerStatus {
        connection: Connection::Disconnected,
        state: Some(PeerState::SplitBrain),
        is_beyond: true,
        ..replica("b")
    };
    let own = Succession { own_name: Some("a".to_owned()), ..Succession::default() };
    check(
        VolumeFacts { succession: own, ..facts(Role::Primary, vec![beyond]) },
        VolumeState::SplitBrain,
        "split brain: b has what this host lost, which was set back or recovered from an older copy; \
         neither takes the other's content",
        "to keep this host's content, on b: blockmirror resolve data --keep a; to keep b's, \
         here: blockmirror demote data, then blockmirror resolve data --keep b",
    );
    let succession =
        Succession { split_from: Some("a".to_owned()), is_beyond: true, ..Succession::default() };
    check(
        VolumeFacts { succession, ..facts(Role::Replica, vec![peer("a", Role::Primary)]) },
        VolumeState::SplitBrain,
        "split brain: a was set back, or recovered from an older copy, and lacks what this host has; \
         nothing is taken from it; this copy is consistent",
        "to keep a's content: blockmirror resolve data --keep a; --dry-run tells what that loses",
    );
}

#[test]
fn a_resolution_says_what_each_choice_loses_and_invents_no_times() {
    let known = |bytes| Stake { blocks: Some(bytes / 4096), bytes: Some(bytes), since_unix_seconds: None };
    let resolved = Resolved {
        loses: known(40 << 10),
        spares: known(0),
        copies_everything: false,
        is_kept_primary: true,
        can_be_undone: true,
    };
    let (data, b): (Name, Name) = ("data".parse().unwrap(), "b".parse().unwrap());
    assert_eq!(
        resolution(&data, &b, &resolved, false),
        (
            "keeping b's content gives up what only this host wrote: at most 40K in 10 blocks; what differs is copied \
             from b; what is overwritten is kept for an undo"
                .to_owned(),
            "keeping this host's content would give up what only b wrote: nothing".to_owned(),
            "blockmirror resolve data --keep b".to_owned(),
        )
    );
    let unknown = Stake { blocks: None, bytes: None, since_unix_seconds: Some(1_000_000_000) };
    let resolved = Resolved {
        loses: unknown,
        spares: known(4096),
        copies_everything: true,
        is_kept_primary: false,
        can_be_undone: true,
    };
    let (verdict, alternative, action) = resolution(&data, &b, &resolved, true);
    assert!(verdict.contains("it is not known how much, since 01:46:40 UTC, "), "{verdict}");
    assert!(verdict.contains("everything is copied from b"), "{verdict}");
    assert!(verdict.ends_with("comes back with: blockmirror undo data"), "{verdict}");
    assert!(alternative.ends_with("at most 4K in 1 block"), "{alternative}");
    assert_eq!(action, "on b: blockmirror promote data --force");
}

#[test]
fn a_host_that_gave_its_content_up_says_that_it_can_come_back() {
    let history = Some(Rollback { at_unix_seconds: 1_000_000_000, age_seconds: 120, bytes: 12 << 20 });
    let succession = Succession { history, ..Succession::default() };
    check(
        VolumeFacts { succession, ..facts(Role::Replica, vec![peer("a", Role::Primary)]) },
        VolumeState::Following,
        "following a; consistent; 12M kept for undo, of what this host had before 01:46:40 UTC, 2m ago: \
         blockmirror undo data, or blockmirror forget data",
        "none",
    );
}

#[test]
fn a_replica_says_who_took_over_unasked_and_what_is_kept() {
    let history = Some(Rollback { at_unix_seconds: 1_000_000_000, age_seconds: 120, bytes: 12 << 20 });
    let unagreed = Some("a".to_owned());
    let kept = "nobody here has agreed that a took over: what was overwritten since 01:46:40 UTC, 2m ago, is kept (12M); \
                blockmirror forget data agrees, blockmirror undo data brings it back";
    let primary = peer("a", Role::Primary);
    let succession = Succession { history, unagreed: unagreed.clone(), ..Succession::default() };
    check(
        VolumeFacts { succession: succession.clone(), ..facts(Role::Replica, vec![primary.clone()]) },
        VolumeState::Following,
        &format!("following a; consistent; {kept}"),
        "if a is to be the primary: blockmirror forget data; if not: blockmirror pause data a, then: blockmirror undo data",
    );
    let shortage = Some("there is no space left for /x: free some there".to_owned());
    let full = Succession { is_full: true, shortage, ..succession };
    check(
        VolumeFacts { succession: full.clone(), ..facts(Role::Replica, vec![primary.clone()]) },
        VolumeState::Waiting,
        &format!("paused: what a would overwrite can't be kept; this copy is consistent; {kept}"),
        "there is no space left for /x: free some there; it goes on by itself then",
    );
    check(
        VolumeFacts {
            succession: Succession { history: None, ..full },
            ..facts(Role::Replica, vec![primary.clone()])
        },
        VolumeState::Waiting,
        "paused: what a would overwrite can't be kept; this copy is consistent; nobody here has agreed that a took over: \
         blockmirror forget data does",
        "there is no space left for /x: free some there; it goes on by itself then",
    );
    // What it undid, it would keep again; there is nothing to say of that before.
    check(
        VolumeFacts {
            succession: Succession { unagreed, ..Succession::default() },
            ..facts(Role::Replica, vec![primary])
        },
        VolumeState::Following,
        "following a; consistent",
        "none",
    );
}

#[test]
fn a_replica_says_what_a_promotion_would_give() {
    let rollback = Some(Rollback { at_unix_seconds: 1_000_000_000, age_seconds: 120, bytes: 4096 });
    let primary = peer("a", Role::Primary);
    let gone =
        PeerStatus { connection: Connection::Disconnected, connection_seconds: Some(300), ..primary.clone() };
    let far = PeerStatus { resync: Some(Progress::new(1 << 30, 4 << 30, 0)), ..primary.clone() };
    let gap = || Succession { rollback, ..Succession::default() };
    let mixture = Some(CopyState::Inconsistent);
    let whole = Some(CopyState::Consistent);
    for (data, succession, peer, state, verdict, action) in [
        (
            mixture,
            gap(),
            far,
            VolumeState::Resyncing,
            "resyncing from a, 25 % (1G of 4G, not moving): can be rolled back to 01:46:40 UTC, 2m ago",
            "none",
        ),
        (
            mixture,
            gap(),
            gone.clone(),
            VolumeState::Waiting,
            "primary a is not connected since 5m; this copy can be rolled back to 01:46:40 UTC, 2m ago",
            "on a: blockmirror status data; if a is gone: blockmirror promote data",
        ),
        (
            mixture,
            Succession { is_full: true, ..gap() },
            gone.clone(),
            VolumeState::Waiting,
            "paused: no room for pre-images; this copy can be rolled back to 01:46:40 UTC, 2m ago",
            "raise pre_images in volumes/data.toml, or set when_full = \"go-on\" there; \
             then: systemctl restart blockmirror-agent",
        ),
        (
            whole,
            Succession { released: true, ..Succession::default() },
            gone.clone(),
            VolumeState::Waiting,
            "nobody is the primary: it was demoted, and this copy has everything",
            "to go on here: blockmirror promote data",
        ),
        (
            whole,
            Succession {
                better: Some(Better { name: "a".to_owned(), was_demoted: true, is_away: false }),
                ..Succession::default()
            },
            gone.clone(),
            VolumeState::Waiting,
            "nobody is the primary: a was demoted while this copy was out of its reach, and has everything; this copy is \
             consistent",
            "on a: blockmirror promote data",
        ),
        (
            whole,
            Succession {
                better: Some(Better { name: "c".to_owned(), was_demoted: false, is_away: false }),
                ..Succession::default()
            },
            gone.clone(),
            VolumeState::Waiting,
            "c has later content than this copy; this copy is consistent",
            "on c: blockmirror promote data",
        ),
        (
            whole,
            Succession {
                better: Some(Better { name: "c".to_owned(), was_demoted: false, is_away: true }),
                ..Succession::default()
            },
            gone.clone(),
            VolumeState::Waiting,
            "c has later content than this copy; this copy is consistent; the disk of c is not there or does not answer",
            "bring the disk of c back, then there: blockmirror promote data; if it is lost: blockmirror promote data --force",
        ),
        (
            whole,
            Succession {
                elsewhere: Some(Elsewhere { name: "c".to_owned(), how: WentOn::Serves, is_away: false }),
                ..Succession::default()
            },
            gone.clone(),
            VolumeState::Waiting,
            "c is the primary and serves, and does not write to this host; this copy is consistent",
            "on c: blockmirror status data",
        ),
        (
            whole,
            Succession {
                elsewhere: Some(Elsewhere { name: "c".to_owned(), how: WentOn::Promoted, is_away: false }),
                ..Succession::default()
            },
            gone.clone(),
            VolumeState::Waiting,
            "c was promoted while this host was out of its reach, and does not write to it; this copy is consistent",
            "on c: blockmirror status data; only if c is lost: blockmirror promote data --force, which begins a second history",
        ),
        (
            whole,
            Succession {
                elsewhere: Some(Elsewhere { name: "c".to_owned(), how: WentOn::Promoted, is_away: true }),
                ..Succession::default()
            },
            gone.clone(),
            VolumeState::Waiting,
            "c was promoted while this host was out of its reach, and does not write to it; this copy is consistent; the \
             disk of c is not there or does not answer",
            "bring the disk of c back; only if it is lost: blockmirror promote data --force, which begins a second history",
        ),
        (
            whole,
            Succession {
                elsewhere: Some(Elsewhere { name: "c".to_owned(), how: WentOn::Split, is_away: false }),
                ..Succession::default()
            },
            gone.clone(),
            VolumeState::Waiting,
            "c went on with a primary that was recovered from an older copy, or set back: each of the two copies has what \
             the other lacks; this copy is consistent",
            "on the host whose content stays: blockmirror promote data --force; the other one keeps what only it has until \
             blockmirror resolve data gives that up there",
        ),
        (
            whole,
            Succession { demoted: true, ..Succession::default() },
            gone.clone(),
            VolumeState::Waiting,
            "nobody is the primary: this host was demoted",
            "to go on here: blockmirror promote data",
        ),
        (
            whole,
            Succession { change: Some("being promoted".to_owned()), ..Succession::default() },
            gone,
            VolumeState::Changing,
            "changing: this host is just being promoted",
            "none",
        ),
    ] {
        check(VolumeFacts { data, succession, ..facts(Role::Replica, vec![peer]) }, state, verdict, action);
    }
}

#[test]
fn nobody_is_told_to_promote_beside_a_primary_that_answers() {
    for (connection, verdict, action) in [
        (
            Connection::Disconnected,
            "primary a is not connected since 3m; it answers, and serves the volume; this copy is consistent",
            "on a: blockmirror status data",
        ),
        (
            Connection::Paused,
            "primary a is paused since 3m; this copy is consistent",
            "blockmirror resume data a",
        ),
    ] {
        let elsewhere = Some(Elsewhere { name: "a".to_owned(), how: WentOn::Serves, is_away: false });
        let primary = PeerStatus { connection, ..peer("a", Role::Primary) };
        let succession = Succession { elsewhere, ..Succession::default() };
        check(
            VolumeFacts { succession, ..facts(Role::Replica, vec![primary]) },
            VolumeState::Waiting,
            verdict,
            action,
        );
    }
}

#[test]
fn a_stopped_agent_is_told_first() {
    for (role, data, verdict) in [
        (Role::Primary, None, "agent not running; the device is not served and nothing is mirrored"),
        (Role::Replica, None, "agent not running; this copy is not updated"),
        (
            Role::Replica,
            Some(CopyState::Consistent),
            "agent not running; this copy is not updated; this copy is consistent",
        ),
    ] {
        let status = stopped(VolumeFacts { data, ..facts(role, vec![]) });
        assert_eq!((status.verdict.as_str(), status.state), (verdict, VolumeState::Stopped));
        assert_eq!(status.action, "systemctl start blockmirror-agent");
    }
}

#[test]
fn a_device_that_is_open_to_everybody_is_told() {
    let device = DeviceStatus {
        kind: DeviceKind::Nbd,
        uri: Some("nbd://192.0.2.1:10809/data".to_owned()),
        path: None,
        error: None,
        warning: Some("nbd on 192.0.2.1:10809 asks nobody who they are".to_owned()),
    };
    check(
        VolumeFacts { devices: vec![device], ..facts(Role::Primary, vec![replica("b")]) },
        VolumeState::Healthy,
        "healthy: b holds an identical copy; warning: nbd on 192.0.2.1:10809 asks nobody who they are",
        "none",
    );
}

#[test]
fn a_device_that_is_not_served_is_told() {
    let device = DeviceStatus {
        kind: DeviceKind::Loop,
        uri: None,
        path: None,
        error: Some("no loop device is free".to_owned()),
        warning: None,
    };
    check(
        VolumeFacts { devices: vec![device], ..facts(Role::Primary, vec![replica("b")]) },
        VolumeState::Healthy,
        "healthy: b holds an identical copy; the loop device is not served (no loop device is free)",
        "none",
    );
}

#[test]
fn a_comparison_says_what_was_found_and_what_to_do() {
    let (volume, peer) = ("data".parse().unwrap(), "b".parse().unwrap());
    for (different, queued, verdict, action) in [
        (0, false, "identical: 100G compared with b, no difference", "none"),
        (
            4096,
            true,
            "different: 4K of 100G differ on b and are copied again",
            "blockmirror wait data --for in-sync",
        ),
        (
            4096,
            false,
            "different: 4K of 100G differ on b and were not repaired",
            "blockmirror compare data b",
        ),
    ] {
        let words = comparison(&volume, &peer, 100 << 30, different, 0, queued);
        assert_eq!((words.0.as_str(), words.1.as_str()), (verdict, action));
    }
    let action =
        "check the disk of this host; b may have what can't be read here: blockmirror switch data --to b";
    for (different, verdict) in [
        (0, "unreadable: regions of 8M can't be read here; no difference in the other 100G"),
        (
            4096,
            "unreadable: regions of 8M can't be read here; 4K of the other 100G differ on b and are copied again",
        ),
    ] {
        let words = comparison(&volume, &peer, 100 << 30, different, 8 << 20, true);
        assert_eq!((words.0.as_str(), words.1.as_str()), (verdict, action));
    }
}

#[test]
fn a_status_has_its_golden_form_in_json() {
    let reply = StatusReply {
        schema: STATUS_SCHEMA.to_owned(),
        host: HostStatus {
            name: "a".parse().unwrap(),
            fingerprint: Some("01".repeat(32)),
            version: Some("0.1.0".to_owned()),
            listen: Some("0.0.0.0:7447".parse().unwrap()),
        },
        volumes: vec![running(VolumeFacts {
            devices: vec![
                DeviceStatus {
                    kind: DeviceKind::Nbd,
                    uri: Some("nbd+unix:///data?socket=/run/blockmirror/data.nbd".to_owned()),
                    path: None,
                    error: None,
                    warning: None,
                },
                DeviceStatus {
                    kind: DeviceKind::Loop,
                    uri: None,
                    path: Some("/dev/blockmirror/data".into()),
                    error: None,
                    warning: None,
                },
            ],
            ..facts(Role::Primary, vec![resyncing("b")])
        })],
    };
    let text = serde_json::to_string_pretty(&reply).unwrap();
    assert_eq!(text, include_str!("status.json").trim_end());
    assert_eq!(serde_json::from_str::<StatusReply>(&text).unwrap(), reply);
}

#[test]
fn each_kind_of_failure_has_its_exit_code() {
    let kinds = [
        FailureKind::Failed,
        FailureKind::Usage,
        FailureKind::AgentNotRunning,
        FailureKind::NoSuchVolume,
        FailureKind::Refused,
        FailureKind::Timeout,
    ];
    assert_eq!(kinds.map(FailureKind::exit_code), [1, 2, 3, 4, 5, 6]);
    let names = serde_json::to_string(&kinds).unwrap();
    assert_eq!(names, r#"["failed","usage","agent-not-running","no-such-volume","refused","timeout"]"#);
}

#[test]
fn a_backing_that_something_else_uses_or_changed_is_named() {
    let touched = Some("something else wrote to it after it was closed here".to_owned());
    let status = running(VolumeFacts { touched, ..facts(Role::Primary, vec![resyncing("b")]) });
    assert!(
        status.verdict.ends_with(
            "; the backing /dev/vdb was changed by something else (something else wrote to it after it was closed \
             here): all of it is compared"
        ),
        "{}",
        status.verdict
    );
    // A replica's copy counts for less, whatever it was told before.
    let touched = Some("found by an earlier run of the agent".to_owned());
    let succession = Succession { released: true, ..Succession::default() };
    let primary = PeerStatus { connection: Connection::Disconnected, ..peer("a", Role::Primary) };
    let gone = facts(Role::Replica, vec![primary]);
    for (facts, verdict, action) in [
        (
            VolumeFacts { succession, ..gone.clone() },
            "it was demoted, and this copy had everything; this copy is not to be relied on: something else wrote to it; ",
            "to go on here: better promote another host that had everything; blockmirror promote data --force",
        ),
        (
            gone,
            "; this copy is not to be relied on: something else wrote to it; ",
            "; if a is gone: better promote another host",
        ),
    ] {
        let status = running(VolumeFacts { touched: touched.clone(), ..facts.clone() });
        assert!(status.verdict.contains(verdict), "{}", status.verdict);
        assert!(status.verdict.contains("was changed by something else"), "{}", status.verdict);
        assert!(status.action.contains(action), "{}", status.action);
        let status = stopped(VolumeFacts { touched: touched.clone(), ..facts });
        assert!(
            status.verdict.ends_with("not to be relied on: something else wrote to it"),
            "{}",
            status.verdict
        );
    }
    let backing_users = vec!["/dev/loop3".into()];
    let status =
        running(VolumeFacts { backing_users, ..facts(Role::Replica, vec![peer("a", Role::Primary)]) });
    assert!(status.verdict.ends_with("is not mirrored: losetup -d /dev/loop3"), "{}", status.verdict);
}
