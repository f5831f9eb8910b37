//! The operator's command against an agent with canned answers: what is asked, what is printed, how it exits.

mod fake;

use blockmirror_agent::config::{ConfigFolder, DeviceKind, PeerConfig, Role, VolumeConfig};
use blockmirror_agent::control::api::{
    Connection, Failure, FailureKind, NetworkPath, StatusReply, VolumeState,
};
use blockmirror_protocol::units::{BlockSize, HostId, VolumeId};
use fake::{Agent, Ended, Fake, command, resyncing, run, volume};
use std::io::{BufRead, BufReader};
use std::process::Stdio;

fn healthy() -> Fake {
    Fake::with([volume("data", Role::Primary), volume("other", Role::Primary)])
}

fn good(output: &str) -> Ended {
    Ended { code: 0, output: output.to_owned(), errors: String::new() }
}

fn bad(code: i32, message: &str) -> Ended {
    Ended { code, output: String::new(), errors: format!("blockmirror: {message}\n") }
}

#[test]
fn create_asks_for_a_volume_and_says_what_is_next() {
    let agent = Agent::start(healthy());
    let ended = agent.tool(&["create", "new", "--backing", "srv/new.img", "--size", "1.5G"]);
    let expected = "\
created new
new  primary  at risk: no replica has joined; this host has the only copy
  action:  blockmirror invite new
  backing: /srv/new.img, 100G, consistent
  devices: /dev/blockmirror/new
";
    assert_eq!(ended, good(expected));
    let more = ["--device", "nbd", "--device", "nbd", "--block-size", "64K"];
    assert_eq!(agent.tool(&[&["create", "new", "--backing", "/dev/vdb"], &more[..]].concat()).code, 0);
    assert_eq!(agent.tool(&["create", "new", "--backing", "/dev/vdb", "--device", "none"]).code, 0);
    assert_eq!(
        agent.asked(),
        [
            r#"create {"name":"new","backing":"/srv/new.img","size_bytes":1610612736,"devices":["nbd","loop"],"block_size_bytes":null}"#,
            r#"create {"name":"new","backing":"/dev/vdb","size_bytes":null,"devices":["nbd"],"block_size_bytes":65536}"#,
            r#"create {"name":"new","backing":"/dev/vdb","size_bytes":null,"devices":[],"block_size_bytes":null}"#,
        ]
    );
    assert_eq!(
        agent.tool(&["create", "new", "--backing", "/mounted"]),
        bad(5, "the backing is mounted; unmount it first")
    );
}

#[test]
fn a_wrong_command_line_exits_with_2_and_asks_nothing() {
    let agent = Agent::start(healthy());
    for (arguments, part) in [
        (vec![], "Usage"),
        (vec!["create", "New", "--backing", "/b"], "is not a name"),
        (vec!["create", "new"], "--backing"),
        (vec!["create", "new", "--backing", "/b", "--size", "100GB"], "is not a size"),
        (vec!["create", "new", "--backing", "/b", "--block-size", "5000"], "not a block size"),
        (
            vec!["create", "new", "--backing", "/b", "--device", "nbd,none"],
            "\"none\" goes with no other device",
        ),
        (vec!["invite", "data", "--expires", "soon"], "is not a length of time"),
        (vec!["invite", "data", "--address", "b"], "is not an address"),
        (vec!["wait", "data"], "--for"),
        (vec!["completions", "tcsh"], "tcsh"),
    ] {
        let ended = agent.tool(&arguments);
        assert!(ended.code == 2 && ended.errors.contains(part), "{arguments:?}: {ended:?}");
    }
    assert!(agent.asked().is_empty());
}

#[test]
fn invite_prints_the_token_alone_and_the_rest_beside() {
    let agent = Agent::start(healthy());
    let ended = agent.tool(&["invite", "data"]);
    assert_eq!((ended.code, ended.output.as_str()), (0, "bm1-token\n"));
    assert_eq!(
        ended.errors,
        "blockmirror: on the new host, within 1h: blockmirror join - --backing PATH, and paste it\n"
    );
    let more = ["--expires", "30m", "--address", "a:7447", "--address", "[::1]:7447", "--json"];
    let ended = agent.tool(&[&["invite", "data"], &more[..]].concat());
    let json: serde_json::Value = serde_json::from_str(&ended.output).unwrap();
    assert_eq!(json["schema"], "blockmirror/invitation/v1");
    assert_eq!(json["token"], "bm1-token");
    assert_eq!(
        agent.asked(),
        [
            r#"invite data {"expires_seconds":3600,"addresses":[]}"#,
            r#"invite data {"expires_seconds":1800,"addresses":["a:7447","[::1]:7447"]}"#,
        ]
    );
}

#[test]
fn join_hands_the_token_on_and_tells_why_not() {
    let agent = Agent::start(healthy());
    let ended = agent.tool(&["join", " bm1-token\n", "--backing", "/dev/vdb", "--overwrite"]);
    assert!(ended.output.starts_with("joined data\ndata  replica  following a; consistent\n"), "{ended:?}");
    assert_eq!(agent.asked(), [r#"join {"token":"bm1-token","backing":"/dev/vdb","overwrite":true}"#]);
    let join = |token| agent.tool(&["join", token, "--backing", "/dev/vdb"]);
    assert_eq!(join("expired"), bad(1, "the token is expired; ask for a new one"));
    assert_eq!(join("lost"), bad(6, "the primary does not answer"));
}

#[test]
fn invitations_are_listed_and_revoked() {
    let agent = Agent::start(healthy());
    let listed = "0badcafe  open  10m left\n0badf00d  used\n";
    assert_eq!(agent.tool(&["invite", "data", "--list"]), good(listed));
    let revoked = "revoked 0badcafe; a host that joined with it stays: blockmirror remove-peer data HOST\n";
    let ended = agent.tool(&["invite", "data", "--revoke", "0BADCAFE"]);
    assert_eq!(ended, good(&format!("{revoked}{listed}")));
    assert_eq!(agent.asked(), ["revoke data 0badcafe"]);
    assert_eq!(agent.tool(&["invite", "data", "--revoke", "../x"]).code, 2);
}

#[test]
fn a_removal_says_who_hears_of_it() {
    let agent = Agent::start(healthy());
    let ended = agent.tool(&["remove-peer", "data", "b", "--dry-run"]);
    let text = "b would be removed from data: its connections end, its key is refused, and nothing is kept for it; \
                c hears of it from any other host, when it can be reached\n";
    assert_eq!(ended, good(text));
    agent.tool(&["remove-peer", "data", "b", "--force"]);
    assert_eq!(
        agent.asked(),
        [
            r#"remove data b {"force":false,"dry_run":true}"#,
            r#"remove data b {"force":true,"dry_run":false}"#
        ]
    );
}

#[test]
fn peers_are_listed_with_their_keys() {
    let agent = Agent::start(healthy());
    let line = format!("b  replica  connected  b:7447  {}\n", "07".repeat(32));
    assert_eq!(agent.tool(&["peers", "data"]), good(&line));
    let json: serde_json::Value =
        serde_json::from_str(&agent.tool(&["peers", "data", "--json"]).output).unwrap();
    assert_eq!(json["schema"], "blockmirror/peers/v1");
    assert_eq!(json["peers"][0]["name"], "b");
}

#[test]
fn pause_and_resume_name_a_volume_and_a_peer() {
    let agent = Agent::start(healthy());
    assert_eq!(agent.tool(&["pause", "data", "b"]), good("paused data with b\n"));
    assert_eq!(agent.tool(&["resume", "data", "b"]), good("resumed data with b\n"));
    assert_eq!(agent.asked(), ["pause data b", "resume data b"]);
    assert_eq!(
        agent.tool(&["pause", "data", "x"]),
        bad(4, "no peer \"x\" of data; blockmirror peers data lists them")
    );
}

#[test]
fn promote_says_what_it_did_or_why_not() {
    let agent = Agent::start(healthy());
    assert_eq!(agent.tool(&["promote", "data"]), bad(5, "a is the primary and reachable"));
    let details = "\
other  primary  healthy: b holds an identical copy
  action:  none
  backing: /srv/other.img, 100G, consistent
  devices: /dev/blockmirror/other
  peer:    b  replica  connected 3m  in-sync  0 out of sync
";
    let expected = Ended {
        output: format!("promoted other in 1.2 s\n{details}"),
        errors: "blockmirror: a did not say how they stand\n".to_owned(),
        code: 0,
    };
    assert_eq!(agent.tool(&["promote", "other"]), expected);
    let ended = agent.tool(&["promote", "data", "--force"]);
    assert!(ended.output.contains("its content is that of 01:46:40 UTC\n"), "{ended:?}");
    let json: serde_json::Value =
        serde_json::from_str(&agent.tool(&["promote", "other", "--json"]).output).unwrap();
    assert_eq!(json["schema"], "blockmirror/promotion/v1");
    assert_eq!(json["milliseconds"], 1234);
    assert_eq!(
        agent.asked(),
        ["promote data false", "promote other false", "promote data true", "promote other false"]
    );
    assert_eq!(agent.tool(&["promote", "nope"]).code, 4);
}

#[test]
fn demote_and_switch_say_who_can_write_now() {
    let agent = Agent::start(healthy());
    let expected = "\
demoted data; nobody is the primary now
b has everything; to go on there: blockmirror promote data
c may lack something, and is promoted with --force only
";
    assert_eq!(agent.tool(&["demote", "data"]), good(expected));
    let expected = "b is the primary of data now; nobody could write for 0.8 s\n";
    assert_eq!(agent.tool(&["switch", "data", "--to", "b"]), good(expected));
    assert_eq!(agent.tool(&["switch", "data", "--to", "x"]).code, 4);
    let json: serde_json::Value =
        serde_json::from_str(&agent.tool(&["switch", "data", "--to", "b", "--json"]).output).unwrap();
    assert_eq!(json["milliseconds_without_writes"], 850);
}

#[test]
fn resolve_says_what_each_choice_loses_and_whether_anything_was_done() {
    let agent = Agent::start(healthy());
    let expected = "\
keeping b's content gives up 40K
keeping this host's content would give up nothing
nothing was changed; to do it: blockmirror resolve data --keep b
";
    assert_eq!(agent.tool(&["resolve", "data", "--keep", "b", "--dry-run"]), good(expected));
    let ended = agent.tool(&["resolve", "data", "--keep", "b"]);
    assert!(ended.code == 0 && ended.output.starts_with("keeping b's content gives up 40K\n"), "{ended:?}");
    assert!(!ended.output.contains("nothing was changed"), "{ended:?}");
    let json: serde_json::Value =
        serde_json::from_str(&agent.tool(&["resolve", "data", "--keep", "b", "--json"]).output).unwrap();
    assert_eq!(
        (&json["schema"], &json["done"], &json["loses"]["bytes"]),
        (&"blockmirror/resolution/v1".into(), &true.into(), &40960.into())
    );
    assert_eq!(agent.tool(&["resolve", "other", "--keep", "b"]), bad(5, "nothing to resolve"));
    assert_eq!(agent.tool(&["resolve", "data", "--keep", "x"]).code, 4);
    assert_eq!(agent.tool(&["resolve", "data"]).code, 2);
    assert_eq!(agent.asked()[0], r#"resolve data {"keep":"b","dry_run":true}"#);
}

#[test]
fn release_says_who_has_the_device_open_still() {
    let agent = Agent::start(healthy());
    let users = "mounted at /srv/data (ext4)";
    assert_eq!(agent.tool(&["release", "data"]), bad(5, &format!("the device is in use: {users}")));
    let expected = format!(
        "the loop device of data is gone on this host\nit gives i/o errors to who has it open still: {users}\n"
    );
    assert_eq!(agent.tool(&["release", "data", "--force"]), good(&expected));
    let json: serde_json::Value =
        serde_json::from_str(&agent.tool(&["release", "data", "--force", "--json"]).output).unwrap();
    assert_eq!(json["schema"], "blockmirror/release/v1");
    assert_eq!(agent.tool(&["release", "nope"]).code, 4);
    let asked = ["release data false", "release data true", "release data true", "release nope false"];
    assert_eq!(agent.asked(), asked);
}

#[test]
fn rebuild_says_from_whom_the_volume_is_served() {
    let agent = Agent::start(healthy());
    let expected = "data is served from b from now on, and copied to /dev/new meanwhile\nc did not say how up to date it is: \
                    if it has later content, it keeps that, and is in a split with this host\nhow far it is: blockmirror \
                    status data\n";
    let arguments = ["rebuild", "data", "--backing", "/dev/new", "--from", "b"];
    assert_eq!(agent.tool(&arguments), good(expected));
    let json: serde_json::Value =
        serde_json::from_str(&agent.tool(&[&arguments[..], &["--json"]].concat()).output).unwrap();
    assert_eq!((&json["schema"], &json["source"]), (&"blockmirror/rebuilding/v1".into(), &"b".into()));
    assert_eq!(agent.tool(&["rebuild", "nope", "--backing", "/dev/new", "--overwrite"]).code, 4);
    let asked = ["data /dev/new b false", "data /dev/new b false", "nope /dev/new  true"];
    assert_eq!(agent.asked(), asked.map(|asked| format!("rebuild {asked}")));
}

#[test]
fn undo_and_forget_say_how_much_came_back_or_went() {
    let agent = Agent::start(healthy());
    let ended = agent.tool(&["undo", "data"]);
    let expected = "data is again what this host had at 01:46:40 UTC; 12M were restored\n";
    assert!(ended.code == 0 && ended.output.starts_with(expected), "{ended:?}");
    assert_eq!(agent.tool(&["undo", "other"]), bad(5, "nothing is kept here"));
    assert_eq!(
        agent.tool(&["forget", "data"]),
        good("nothing of data is kept for undo any more; it was 12M\n")
    );
    let json: serde_json::Value =
        serde_json::from_str(&agent.tool(&["undo", "data", "--json"]).output).unwrap();
    assert_eq!(json["schema"], "blockmirror/undoing/v1");
    assert_eq!(agent.tool(&["forget", "nope"]).code, 4);
    assert_eq!(agent.asked(), ["undo data", "undo other", "forget data", "undo data", "forget nope"]);
}

#[test]
fn mode_names_a_volume_a_peer_and_a_mode() {
    let agent = Agent::start(healthy());
    let expected = "data is mirrored to b in the mode semi-sync\n";
    assert_eq!(agent.tool(&["mode", "data", "b", "semi-sync"]), good(expected));
    assert_eq!(agent.asked(), ["mode data b semi-sync"]);
    assert_eq!(agent.tool(&["mode", "data", "b", "often"]).code, 2);
}

#[test]
fn tune_names_what_is_to_change() {
    let agent = Agent::start(healthy());
    let expected = "to b, data goes with compression lz4, a resync at most 40M a second\n";
    let said = agent.tool(&["tune", "data", "b", "--compression", "lz4", "--resync-limit", "40M"]);
    assert_eq!(said, good(expected));
    agent.tool(&["tune", "data", "b", "--resync-limit", "none"]);
    assert_eq!(agent.asked(), ["tune data b Some(Lz4) Some(41943040)", "tune data b None Some(0)"]);
    for wrong in [&["tune", "data", "b"][..], &["tune", "data", "b", "--resync-limit", "much"]] {
        assert_eq!(agent.tool(wrong).code, 2);
    }
}

/// A program that asked for JSON was told in prose.
#[test]
fn a_failure_is_json_where_json_was_asked_for_and_a_peer_that_is_not_there_has_one_code() {
    let agent = Agent::start(healthy());
    let said = agent.tool(&["status", "nobody", "--json"]);
    let failure: Failure = serde_json::from_str(&said.errors).expect("it is an object");
    assert_eq!((said.code, failure.kind), (4, FailureKind::NoSuchVolume));
    assert!(said.output.is_empty(), "{said:?}");
    for verb in ["pause", "resume", "compare"] {
        let said = agent.tool(&[verb, "data", "x"]);
        assert_eq!(said.code, 4, "{said:?}");
        assert!(said.errors.starts_with("blockmirror: no peer"), "{said:?}");
    }
}

#[test]
fn set_address_takes_one_address_or_several() {
    let agent = Agent::start(healthy());
    let said = agent.tool(&["set-address", "data", "b", "192.0.2.2:7447", "[2001:db8::2]:7447"]);
    assert_eq!(said, good("b is looked for at 192.0.2.2:7447, [2001:db8::2]:7447\n"));
    let asked = r#"set-address data b [Address("192.0.2.2:7447"), Address("[2001:db8::2]:7447")]"#;
    assert_eq!(agent.asked(), [asked]);
    for wrong in [&["set-address", "data", "b"][..], &["set-address", "data", "b", "192.0.2.2"]] {
        assert_eq!(agent.tool(wrong).code, 2);
    }
}

#[test]
fn a_path_that_shrank_is_told_with_its_packets() {
    let mut facts = volume("data", Role::Primary);
    facts.peers[0].path = Some(NetworkPath {
        address: "192.0.2.2:7447".parse().unwrap(),
        packet_bytes: 1200,
        round_trip_microseconds: 12_340,
        sent_packets: 1000,
        lost_packets: 7,
        black_holes: 2,
    });
    let said = Agent::start(Fake::with([facts])).tool(&["status", "data"]).output;
    let path = "  path:    b  192.0.2.2:7447  12.34 ms there and back, packets of 1200 bytes, which shrank 2 times, \
                7 of 1000 lost\n";
    assert!(said.contains(path), "{said}");
}

#[test]
fn compare_fails_when_the_copies_differ() {
    let agent = Agent::start(healthy());
    let identical = "identical: 100G compared with b, no difference (took 1m 30s)\n";
    assert_eq!(agent.tool(&["compare", "data", "b"]), good(identical));
    let different = Ended {
        code: 1,
        output: "\
different: 4K of 100G differ on b and are copied again (took 1m 30s)
  4K at byte 8192
action: blockmirror wait other --for in-sync
"
        .to_owned(),
        errors: "blockmirror: other differs from the copy on b\n".to_owned(),
    };
    assert_eq!(agent.tool(&["compare", "other", "b"]), different);
    let json: serde_json::Value =
        serde_json::from_str(&agent.tool(&["compare", "other", "b", "--json"]).output).unwrap();
    assert_eq!(
        (json["schema"].as_str(), json["different_bytes"].as_u64()),
        (Some("blockmirror/comparison/v1"), Some(4096))
    );
}

#[test]
fn compare_tells_what_can_not_be_read_and_fails() {
    let agent = Agent::start(Fake::with([volume("unreadable", Role::Primary)]));
    let ended = Ended {
        code: 1,
        output: "\
unreadable: regions of 4M can't be read here; no difference in the other 100G (took 1m 30s)
  4M at byte 4194304, in which something can't be read
action: check the disk of this host; b may have what can't be read here: blockmirror switch unreadable --to b
"
        .to_owned(),
        errors: "blockmirror: a part of unreadable can't be read here\n".to_owned(),
    };
    assert_eq!(agent.tool(&["compare", "unreadable", "b"]), ended);
}

#[test]
fn status_is_one_line_for_what_is_well_and_leads_with_what_is_not() {
    let mut gone = volume("gone", Role::Primary);
    gone.peers[0].connection = Connection::Disconnected;
    gone.peers[0].out_of_sync_bytes = Some(12 << 20);
    gone.peers[0].error = Some("connection refused".to_owned());
    gone.storage = Some("threads".to_owned());
    let agent = Agent::start(Fake::with([
        volume("data", Role::Primary),
        volume("far", Role::Replica),
        gone,
        resyncing(volume("vm", Role::Primary)),
    ]));
    let expected = "\
gone  primary  at risk: b is disconnected since 3m (connection refused); 12M not copied yet
  action:  on b: blockmirror status gone
  backing: /srv/gone.img, 100G, consistent
  devices: /dev/blockmirror/gone
  storage: threads; io_uring cannot be used here and would be faster
  peer:    b  replica  disconnected 3m  in-sync  12M out of sync, connection refused
vm  primary  syncing: b has 43 % (43G of 100G, 120M/s, 8m 7s left) and is not usable until it has all
  action:  none
  backing: /srv/vm.img, 100G, consistent
  devices: /dev/blockmirror/vm
  peer:    b  replica  connected 3m  resyncing  57G out of sync, resync 43 % (43G of 100G, 120M/s, 8m 7s left)
data  primary  in sync with b           100G  /dev/blockmirror/data
far   replica  following a; consistent  100G  /srv/far.img
";
    assert_eq!(agent.tool(&["status"]), good(expected));
    let expected = "\
data  primary  healthy: b holds an identical copy
  action:  none
  backing: /srv/data.img, 100G, consistent
  devices: /dev/blockmirror/data
  peer:    b  replica  connected 3m  in-sync  0 out of sync
";
    assert_eq!(agent.tool(&["status", "data"]), good(expected));
    let nothing = Agent::start(Fake::with([]));
    let expected = "no volumes on a; make one with blockmirror create NAME --backing PATH\n";
    assert_eq!(nothing.tool(&["status"]), good(expected));
}

#[test]
fn status_in_json_has_its_schema() {
    let agent = Agent::start(Fake::with([resyncing(volume("data", Role::Primary))]));
    let ended = agent.tool(&["status", "--json"]);
    assert_eq!((ended.code, ended.errors.as_str()), (0, ""));
    let json: serde_json::Value = serde_json::from_str(&ended.output).unwrap();
    assert_eq!(json["schema"], "blockmirror/status/v1");
    let volume = &json["volumes"][0];
    for key in
        ["name", "id", "role", "state", "size_bytes", "backing", "devices", "verdict", "action", "peers"]
    {
        assert!(!volume[key].is_null(), "{key}");
    }
    assert_eq!((&volume["storage"], &volume["block_size_bytes"]), (&"io_uring".into(), &4096.into()));
    assert_eq!(volume["devices"][0]["kind"], "loop");
    let peer = &volume["peers"][0];
    for key in ["name", "connection", "state", "out_of_sync_bytes", "lag_bytes", "lag_seconds"] {
        assert!(!peer[key].is_null(), "{key}");
    }
    for key in ["done_bytes", "total_bytes", "rate", "eta_seconds"] {
        assert!(peer["resync"][key].is_u64(), "{key}");
    }
}

#[test]
fn an_unknown_volume_exits_with_4() {
    let agent = Agent::start(healthy());
    let missing = bad(4, "no volume \"nope\" on this host; blockmirror status lists them");
    for arguments in [
        &["status", "nope"][..],
        &["invite", "nope"],
        &["peers", "nope"],
        &["pause", "nope", "b"],
        &["compare", "nope", "b"],
        &["wait", "nope", "--for", "in-sync"],
    ] {
        assert_eq!(agent.tool(arguments), missing, "{arguments:?}");
    }
}

#[test]
fn wait_ends_when_the_replica_has_everything_or_time_is_up() {
    let agent = Agent::start(healthy().resyncing_for(2));
    let wait = |more: &[&str]| agent.tool(&[&["wait", "data", "--for", "in-sync"], more].concat());
    let late = "data is not in sync yet; syncing: b has 43 % (43G of 100G, 120M/s, 8m 7s left) \
                and is not usable until it has all";
    assert_eq!(wait(&["--timeout", "0s"]), bad(6, late));
    assert_eq!(wait(&[]), good("data  healthy: b holds an identical copy\n"));
}

#[test]
fn wait_does_not_wait_for_what_never_comes() {
    let mut failed = volume("failed", Role::Primary);
    failed.backing_error = Some("input/output error".to_owned());
    let agent = Agent::start(Fake::with([failed, volume("far", Role::Replica)]));
    let wait = |name| agent.tool(&["wait", name, "--for", "in-sync"]);
    let broken =
        "failed: the backing /srv/failed.img has failed (input/output error); b holds an identical copy";
    assert_eq!(wait("failed"), bad(1, broken));
    assert_eq!(wait("far"), bad(1, "only the primary knows what its replicas lack; wait on a"));
}

fn configured(name: &str, id: u8) -> VolumeConfig {
    let b = PeerConfig::new(
        "b".parse().unwrap(),
        Role::Replica,
        HostId([7; 32]),
        vec!["b:7447".parse().unwrap()],
    );
    let backing = format!("/srv/{name}.img").into();
    let (name, id, block_size) = (name.parse().unwrap(), VolumeId([id; 16]), BlockSize::default());
    VolumeConfig {
        devices: vec![DeviceKind::Loop],
        peers: vec![b],
        ..VolumeConfig::new(name, id, Role::Primary, backing, 100 << 30, block_size)
    }
}

#[test]
fn without_an_agent_status_tells_what_the_files_know_and_exits_with_3() {
    let mut agent = Agent::start(healthy());
    agent.stop();
    let folder = ConfigFolder::new(agent.config());
    folder.save_volume(&configured("data", 1)).unwrap();
    let socket = agent.run().join("agent.sock");
    let message =
        format!("the agent is not running (no socket at {}); start blockmirror-agent", socket.display());
    let expected = "\
data  primary  agent not running; the device is not served and nothing is mirrored
  action:  systemctl start blockmirror-agent
  backing: /srv/data.img, 100G
  devices: loop is not served (agent not running)
  peer:    b  replica  disconnected
";
    let expected = Ended { output: expected.to_owned(), ..bad(3, &message) };
    assert_eq!(agent.tool(&["status"]), expected);
    assert_eq!(agent.tool(&["status", "data"]), expected);
    let ended = agent.tool(&["status", "--json"]);
    let reply: StatusReply = serde_json::from_str(&ended.output).unwrap();
    assert_eq!((ended.code, reply.volumes[0].state), (3, VolumeState::Stopped));
    assert_eq!(reply.volumes[0].facts.peers[0].out_of_sync_bytes, None, "what is not known is not zero");
    assert_eq!(agent.tool(&["status", "nope"]).code, 4);
    for arguments in [&["peers", "data"][..], &["pause", "data", "b"], &["wait", "data", "--for", "in-sync"]]
    {
        assert_eq!(agent.tool(arguments), bad(3, &message));
    }
    std::fs::write(folder.volume_path(&"bad".parse().unwrap()), "bakcing = 1").unwrap();
    let ended = agent.tool(&["status"]);
    assert_eq!(ended.output, expected.output);
    assert!(
        ended.errors.contains("bad.toml:1: unknown key \"bakcing\"; did you mean \"backing\"?\n"),
        "{ended:?}"
    );
}

#[test]
fn config_check_reports_every_mistake_without_an_agent() {
    let temporary = tempfile::tempdir().unwrap();
    let folder = ConfigFolder::new(temporary.path().join("etc"));
    folder.save_volume(&configured("data", 1)).unwrap();
    let etc = folder.path().display().to_string();
    let check = || run(temporary.path(), &["config", "check", "--config", &etc]);
    assert_eq!(check(), good(&format!("{etc} is right; volumes: 1\n")));
    folder.save_volume(&configured("twin", 1)).unwrap();
    assert_eq!(check().errors, format!("blockmirror: 1 mistake in {etc}\n"));
    std::fs::write(folder.path().join("agent.toml"), "\nlisten = 7447\n").unwrap();
    let expected = Ended {
        output: format!(
            "{etc}/agent.toml:2: invalid type: integer \"7447\", expected socket address\n\
             {etc}/volumes/twin.toml: it has the same id as the volume \"data\"; remove one of the files\n"
        ),
        ..bad(1, &format!("2 mistakes in {etc}"))
    };
    assert_eq!(check(), expected);
}

#[test]
fn completions_are_printed_for_each_shell() {
    let temporary = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let ended = run(temporary.path(), &["completions", shell]);
        assert!(ended.code == 0 && ended.output.contains("blockmirror"), "{shell}");
    }
}

#[test]
fn a_watched_status_goes_on_until_its_reader_leaves_and_ends_quietly() {
    let agent = Agent::start(healthy());
    for (arguments, start) in
        [(&["status", "--watch"][..], "data "), (&["status", "--watch", "--json"], "{\"schema\"")]
    {
        let mut child =
            command(&agent.run(), arguments).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let seen = lines.by_ref().map(Result::unwrap).filter(|line| line.starts_with(start)).take(2).count();
        assert_eq!(seen, 2);
        drop(lines);
        assert_eq!(Ended::from(child.wait_with_output().unwrap()), good(""));
    }
}
