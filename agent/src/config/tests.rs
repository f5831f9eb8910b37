//! The configuration's files: what they look like, what is found wrong with them.

use super::*;
use blockmirror_protocol::wire::message::Member;
use std::fs;

const GOLDEN: &str = r#"# A volume of Blockmirror, kept by the agent. To change it, stop the agent, edit it,
# run `blockmirror config check` and start the agent. Comments are lost when the agent saves it.
name = "data"
id = "000102030405060708090a0b0c0d0e0f"
role = "primary"
backing = "/srv/data.img"
size_bytes = 107374182400
block_size_bytes = 4096
devices = ["nbd", "loop"]
nbd_listen = "127.0.0.1:10809"
nbd_tls = "/etc/blockmirror/nbd-tls"
window = "64M"
activity_log = "1G"
on_replica_loss = "block"
min_replicas = 1
block_seconds = 20
start_alone = "serve"
pre_images = "2G"
when_full = "go-on"

[[peer]]
name = "b"
role = "replica"
host = "0707070707070707070707070707070707070707070707070707070707070707"
addresses = ["192.0.2.2:7447", "b.example.org:7447"]
paused = false
mode = "semi-sync"
compression = "zstd"
resync_limit = "100M"
"#;

fn example() -> VolumeConfig {
    VolumeConfig {
        name: "data".parse().unwrap(),
        id: VolumeId(std::array::from_fn(|index| index as u8)),
        role: Role::Primary,
        backing: "/srv/data.img".into(),
        size_bytes: 100 << 30,
        block_size: BlockSize::default(),
        devices: DeviceKind::defaults(),
        nbd_listen: Some("127.0.0.1:10809".parse().unwrap()),
        nbd_tls: Some("/etc/blockmirror/nbd-tls".into()),
        window: DEFAULT_WINDOW,
        activity_log: Size(1 << 30),
        on_replica_loss: OnReplicaLoss::Block,
        min_replicas: 1,
        block_seconds: 20,
        start_alone: Some(StartAlone::Serve),
        pre_images: Size(2 << 30),
        when_full: WhenFull::GoOn,
        peers: vec![PeerConfig {
            name: "b".parse().unwrap(),
            role: Role::Replica,
            host: HostId([7; 32]),
            addresses: vec!["192.0.2.2:7447".parse().unwrap(), "b.example.org:7447".parse().unwrap()],
            paused: false,
            mode: Mode::SemiSync,
            compression: Compression::Zstd,
            resync_limit: Some(Size(100 << 20)),
            version: 0,
        }],
        version: 0,
        removal: None,
        removed: Vec::new(),
    }
}

fn folder() -> (tempfile::TempDir, ConfigFolder) {
    let temporary = tempfile::tempdir().unwrap();
    let folder = ConfigFolder::new(temporary.path().join("etc/blockmirror"));
    (temporary, folder)
}

/// What loading finds wrong with a volume file of this text, without the folder's path.
fn mistake_in(text: &str) -> String {
    let (_temporary, folder) = folder();
    fs::create_dir_all(folder.path().join("volumes")).unwrap();
    fs::write(folder.volume_path(&"data".parse().unwrap()), text).unwrap();
    let mut found = folder.load_volumes().unwrap();
    assert_eq!((found.volumes.len(), found.mistakes.len()), (0, 1), "{text}");
    let message = found.mistakes.remove(0).to_string();
    message.strip_prefix(&format!("{}/volumes/", folder.path().display())).unwrap().to_owned()
}

#[test]
fn a_saved_volume_is_readable_text_and_reads_back() {
    let (_temporary, folder) = folder();
    folder.save_volume(&example()).unwrap();
    assert_eq!(fs::read_to_string(folder.volume_path(&example().name)).unwrap(), GOLDEN);
    assert_eq!(folder.load_volume(&example().name).unwrap(), example());
    let again =
        VolumeConfig { peers: Vec::new(), nbd_listen: None, nbd_tls: None, devices: Vec::new(), ..example() };
    folder.save_volume(&again).unwrap();
    let found = folder.load_volumes().unwrap();
    assert!(found.mistakes.is_empty());
    assert_eq!(found.volumes, [again]);
    let names: Vec<_> = fs::read_dir(folder.path().join("volumes")).unwrap().collect();
    assert_eq!(names.len(), 1, "nothing is left beside the volume's file");
}

#[test]
fn what_is_left_out_has_its_default() {
    let (_temporary, folder) = folder();
    let kept = |line: &&str| !["devices", "nbd_", "window", "paused"].iter().any(|key| line.starts_with(key));
    let text: Vec<&str> = GOLDEN.lines().filter(kept).collect();
    fs::create_dir_all(folder.path().join("volumes")).unwrap();
    fs::write(folder.volume_path(&example().name), text.join("\n")).unwrap();
    assert_eq!(
        folder.load_volume(&example().name).unwrap(),
        VolumeConfig { nbd_listen: None, nbd_tls: None, ..example() }
    );
    assert_eq!(folder.load_agent().unwrap(), AgentConfig::default());
    assert!(!AgentConfig::default().host_name().as_str().is_empty());
}

#[test]
fn an_unknown_key_is_named_with_its_line_and_the_nearest_one() {
    for (from, to, message) in [
        ("backing", "bakcing", r#"data.toml:6: unknown key "bakcing"; did you mean "backing"?"#),
        ("window", "windows", r#"data.toml:12: unknown key "windows"; did you mean "window"?"#),
        ("paused", "pause", r#"data.toml:26: unknown key "pause"; did you mean "paused"?"#),
        ("[[peer]]", "[[peers]]", r#"data.toml:21: unknown key "peers"; did you mean "peer"?"#),
        ("window", "quux", r#"data.toml:12: unknown key "quux"; remove it"#),
    ] {
        assert_eq!(mistake_in(&GOLDEN.replacen(from, to, 1)), message);
    }
}

#[test]
fn a_wrong_value_is_told_with_its_line() {
    for (from, to, message) in [
        (
            "\"primary\"",
            "\"boss\"",
            r#"data.toml:5: unknown variant "boss", expected "primary" or "replica""#,
        ),
        ("107374182400", "\"100G\"", r#"data.toml:7: invalid type: string "100G", expected u64"#),
        ("107374182400", "513", "data.toml:7: a volume's size is a multiple of 512 bytes, up to 16384T"),
        ("107374182400", "0", "data.toml:7: a volume's size is a multiple of 512 bytes, up to 16384T"),
        ("4096", "5000", "data.toml:8: 5000 is not a block size; use a power of two from 4K to 1M"),
        (
            "\"64M\"",
            "\"64Q\"",
            r#"data.toml:12: "64Q" is not a size; write a whole number of bytes, or a number with K, M, G or T (powers of 1024)"#,
        ),
        ("\"64M\"", "\"64K\"", "data.toml:12: the window is at least 2M"),
        ("\"1G\"", "\"8G\"", "data.toml:13: the activity log covers from 512M to 4064M"),
        ("/srv", "srv", r#"data.toml:6: the path of a backing begins with "/""#),
        ("000102", "00010", "data.toml:4: the id of a volume is 32 hexadecimal digits"),
        ("\"0707", "\"xx07", "data.toml:24: the fingerprint of a host's key is 64 hexadecimal digits"),
        (
            "org:7447",
            "org",
            r#"data.toml:25: "b.example.org" is not an address; write ADDRESS:PORT, such as 192.0.2.1:7447 or [2001:db8::1]:7447"#,
        ),
        ("127.0.0.1:10809", "x", "data.toml:10: invalid socket address syntax"),
        (
            "/etc/blockmirror/nbd-tls",
            "required",
            r#"data.toml:11: nbd_tls is the folder of the certificates, a path that begins with "/""#,
        ),
        ("role = \"primary\"\n", "", r#"data.toml:1: missing field "role""#),
        ("window = \"64M\"", "window = ", "data.toml:12: "),
    ] {
        let found = mistake_in(&GOLDEN.replacen(from, to, 1));
        assert!(
            found == message || message.ends_with(": ") && found.starts_with(message),
            "{found}\n{message}"
        );
        assert!(!found.contains('\n'), "{found}");
    }
    assert!(
        mistake_in(&GOLDEN.replacen("\"data\"", "\"Data\"", 1))
            .starts_with("data.toml:3: \"Data\" is not a name")
    );
}

#[test]
fn statements_that_contradict_each_other_are_found() {
    let second_peer = GOLDEN[GOLDEN.find("\n[[peer]]").unwrap()..].to_owned();
    for (text, message) in [
        (format!("{GOLDEN}{second_peer}"), r#"data.toml: the peer "b" is listed twice; remove one"#),
        (
            format!("{GOLDEN}{}", second_peer.replace("\"b\"", "\"c\"")),
            r#"data.toml: the peers "b" and "c" have the same host key; remove one"#,
        ),
        (
            GOLDEN.replace("role = \"replica\"", "role = \"primary\""),
            "data.toml: more than one host is the primary; make all but one a replica",
        ),
        (
            GOLDEN.replace("nbd_listen = \"127.0.0.1:10809\"\n", ""),
            "data.toml: nbd_tls is for the export over TCP, which needs nbd_listen; set that too, or remove nbd_tls",
        ),
        (
            GOLDEN.replacen("\"data\"", "\"other\"", 1),
            r#"data.toml: the file of the volume "other" is called "other.toml"; rename the file or the volume"#,
        ),
    ] {
        assert_eq!(mistake_in(&text), message);
    }
}

#[test]
fn a_volume_that_contradicts_itself_is_not_saved() {
    let (_temporary, folder) = folder();
    let mut volume = example();
    volume.peers[0].role = Role::Primary;
    assert!(matches!(
        folder.save_volume(&volume),
        Err(Mistake::Contradictory { what: Contradiction::TwoPrimaries, .. })
    ));
    assert!(!folder.path().exists());
}

#[test]
fn all_that_contradicts_in_a_file_is_told() {
    let (_temporary, folder) = folder();
    folder.save_volume(&example()).unwrap();
    let path = folder.volume_path(&example().name);
    let mut volume = example();
    volume.peers[0].role = Role::Primary;
    volume.peers.push(volume.peers[0].clone());
    fs::write(path.with_file_name("other.toml"), toml::to_string(&volume).unwrap()).unwrap();
    let found = folder.load_volumes().unwrap();
    let told: Vec<String> = found.mistakes.iter().map(ToString::to_string).collect();
    let parts = ["listed twice", "primar", "other.toml: ", "same id"];
    assert_eq!((told.len(), found.volumes.len()), (parts.len(), 1), "{told:?}");
    for (mistake, part) in told.iter().zip(parts) {
        assert!(mistake.contains(part), "{part}: {mistake}");
    }
}

#[test]
fn two_volumes_share_neither_id_nor_backing_and_a_bad_file_hides_no_good_one() {
    let (_temporary, folder) = folder();
    let named = |name: &str, id: u8, backing: &str| VolumeConfig {
        name: name.parse().unwrap(),
        id: VolumeId([id; 16]),
        backing: backing.into(),
        ..example()
    };
    for volume in
        [named("a", 1, "/srv/a"), named("b", 1, "/srv/b"), named("c", 3, "/srv/a"), named("d", 4, "/srv/d")]
    {
        folder.save_volume(&volume).unwrap();
    }
    fs::write(folder.path().join("volumes/.e.toml"), "hidden").unwrap();
    fs::write(folder.path().join("volumes/e.toml.old"), "not ours").unwrap();
    fs::write(folder.path().join("volumes/e.toml"), [0xff]).unwrap();
    let found = folder.load_volumes().unwrap();
    let names: Vec<&str> = found.volumes.iter().map(|volume| volume.name.as_str()).collect();
    assert_eq!(names, ["a", "d"]);
    let ends = ["same id as the volume \"a\"", "same backing as the volume \"a\"", "e.toml: cannot read it"];
    assert_eq!(found.mistakes.len(), ends.len());
    for (mistake, end) in found.mistakes.iter().zip(ends) {
        assert!(mistake.to_string().contains(end), "{mistake}");
    }
}

#[test]
fn the_agents_own_file_is_read() {
    let (_temporary, folder) = folder();
    fs::create_dir_all(folder.path()).unwrap();
    let path = folder.path().join("agent.toml");
    fs::write(
        &path,
        "name = \"a\"\nlisten = \"[::]:7447\"\nadvertise = [\"a:7447\"]\ncongestion = \"bbr\"\n",
    )
    .unwrap();
    let agent = folder.load_agent().unwrap();
    assert_eq!((agent.host_name().as_str(), agent.listen), ("a", Some("[::]:7447".parse().unwrap())));
    assert_eq!(agent.advertise, ["a:7447".parse().unwrap()]);
    assert_eq!(agent.congestion, Congestion::Bbr);
    assert_eq!(agent.busy_poll(), Duration::from_micros(200), "unless something else is said");
    fs::write(&path, "busy_poll_microseconds = 0\n").unwrap();
    assert_eq!(folder.load_agent().unwrap().busy_poll(), Duration::ZERO);
    fs::write(&path, "busy_poll_microseconds = 10001\n").unwrap();
    let mistake = folder.load_agent().unwrap_err().to_string();
    assert!(mistake.contains("for 10000 microseconds at most"), "{mistake}");
    fs::write(&path, "\n\nadvertize = []\n").unwrap();
    let mistake = folder.load_agent().unwrap_err().to_string();
    assert!(
        mistake.ends_with("agent.toml:3: unknown key \"advertize\"; did you mean \"advertise\"?"),
        "{mistake}"
    );
}

fn member(name: &str, number: u8, mode: Mode) -> Member {
    let (host, mode) = (HostId([number; 32]), mode.into());
    Member {
        name: name.to_owned(),
        host,
        addresses: vec![format!("192.0.2.{number}:7447")],
        mode,
        version: 0,
    }
}

#[test]
fn hosts_of_one_long_name_get_names_of_their_own() {
    let mut config = example();
    for number in 0..12 {
        let peer = config.peer_of(&member(&"y".repeat(80), number, Mode::Async), Role::Replica);
        config.peers.retain(|known| known.host != peer.host);
        config.peers.push(peer);
    }
    assert_eq!(config.contradictions(), []);
    assert!(config.peers.last().unwrap().name.as_str().ends_with("-12"));
}

#[test]
fn a_replica_learns_the_promises_that_it_would_keep_as_the_primary() {
    let mut config = VolumeConfig { role: Role::Replica, ..example() };
    config.peers.clear();
    let told = |own, third| [member("a", 1, Mode::Async), member("b", 2, own), member("c", 3, third)];
    let own = Name::nearest("b");
    let known = |config: &VolumeConfig| -> Vec<_> {
        config.peers.iter().map(|peer| (peer.name.to_string(), peer.role, peer.mode)).collect()
    };
    config.learn(&told(Mode::Sync, Mode::SemiSync), HostId([2; 32]), &own);
    let expected =
        [("a".to_owned(), Role::Primary, Mode::Sync), ("c".to_owned(), Role::Replica, Mode::SemiSync)];
    assert_eq!(known(&config), expected);
    config.learn(&told(Mode::Async, Mode::Sync), HostId([2; 32]), &own);
    assert_eq!(config.peers.iter().map(|peer| peer.mode).collect::<Vec<_>>(), [Mode::Async, Mode::Sync]);
    // A primary goes by its own word.
    config.set_roles(Role::Primary, None);
    config.learn(&told(Mode::Sync, Mode::Async), HostId([2; 32]), &own);
    assert_eq!(config.peers.iter().map(|peer| peer.mode).collect::<Vec<_>>(), [Mode::Async, Mode::Sync]);
}

#[test]
fn addresses_that_lead_nowhere_take_no_others_place() {
    let mut config = VolumeConfig { role: Role::Replica, ..example() };
    config.peers.clear();
    let own = Name::nearest("b");
    let mut tells = |addresses: &[&str]| {
        let addresses = addresses.iter().map(|&address| address.to_owned()).collect();
        config.learn(&[Member { addresses, ..member("a", 1, Mode::Async) }], HostId([2; 32]), &own);
        config.peers[0].addresses.iter().map(|address| address.as_str().to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(tells(&["127.0.0.1:1"]), ["127.0.0.1:1"]);
    assert_eq!(tells(&["127.0.0.1:2"]), ["127.0.0.1:2"], "there is nothing better");
    assert_eq!(tells(&["192.0.2.1:3"]), ["192.0.2.1:3"]);
    for nowhere in [&["127.0.0.1:2", "[::1]:2", "localhost:2"][..], &[]] {
        assert_eq!(tells(nowhere), ["192.0.2.1:3"], "{nowhere:?}");
    }
    assert_eq!(tells(&["127.0.0.1:2", "192.0.2.2:4"]), ["127.0.0.1:2", "192.0.2.2:4"]);
}

/// A replica that had moved told another one so; the primary, which had not heard yet, made it forget.
#[test]
fn what_a_host_says_of_itself_counts_more_than_what_the_primary_says_of_it() {
    let mut config = VolumeConfig { role: Role::Replica, ..example() };
    config.peers.clear();
    let own = Name::nearest("b");
    let at = |name: &str, key, address: &str| Member {
        addresses: vec![address.to_owned()],
        ..member(name, key, Mode::Async)
    };
    let known = |config: &VolumeConfig, key| {
        let peer = config.peers.iter().find(|peer| peer.host == HostId([key; 32])).unwrap();
        let addresses: Vec<_> = peer.addresses.iter().map(|address| address.as_str().to_owned()).collect();
        (peer.name.to_string(), addresses.join(" "))
    };
    let said = |name: &str, addresses: &str| (name.to_owned(), addresses.to_owned());
    let told = [at("a", 1, "192.0.2.1:1"), at("b", 2, "192.0.2.2:1"), at("c", 3, "192.0.2.3:1")];
    config.learn(&told, HostId([2; 32]), &own);
    let moved = vec!["192.0.2.33:1".parse().unwrap()];
    assert_eq!(config.meet(HostId([3; 32]), "cc", moved.clone(), &own), Some(Name::nearest("cc")));
    assert_eq!(config.meet(HostId([3; 32]), "cc", moved.clone(), &own), None, "that is no news");
    assert_eq!(known(&config, 3), said("cc", "192.0.2.33:1"));
    config.learn(&told, HostId([2; 32]), &own);
    assert_eq!(known(&config, 3), said("cc", "192.0.2.3:1 192.0.2.33:1"), "either may be right");
    config.meet(HostId([3; 32]), "cc", moved, &own);
    assert_eq!(known(&config, 3), said("cc", "192.0.2.33:1"), "the old one is forgotten");
    // The primary speaks for itself.
    config.learn(&[at("aa", 1, "192.0.2.11:1")], HostId([2; 32]), &own);
    assert_eq!(known(&config, 1), said("aa", "192.0.2.11:1"));
    // Nobody has the name of another one, or of this host.
    for (name, known_by) in [("aa", "aa-2"), ("b", "b-2"), ("C", "c")] {
        config.meet(HostId([3; 32]), name, Vec::new(), &own);
        assert_eq!(known(&config, 3), said(known_by, "192.0.2.33:1"));
        assert_eq!(config.contradictions(), []);
    }
    assert_eq!(config.meet(HostId([9; 32]), "x", Vec::new(), &own), None, "that is no member");
}

#[test]
fn replies_that_should_wait_for_more_replicas_than_can_count_are_a_mistake() {
    let mut config = example();
    assert_eq!(config.shortfall(), None);
    config.start_alone = None;
    assert!(config.awaits_majority(), "who chose to wait for replicas waits for hosts, too");
    config.start_alone = Some(StartAlone::Serve);
    assert!(!config.awaits_majority());
    config.min_replicas = 2;
    let text = config.shortfall().unwrap().to_string();
    assert!(
        text.contains("min_replicas is 2, but the replicas of a mode that replies wait for are 1"),
        "{text}"
    );
    config.min_replicas = 0;
    assert!(config.shortfall().is_some(), "that is on_replica_loss = \"continue\" by another name");
    config.on_replica_loss = OnReplicaLoss::Continue;
    assert_eq!(config.shortfall(), None);
    config.on_replica_loss = OnReplicaLoss::Block;
    config.role = Role::Replica;
    assert_eq!(config.shortfall(), None, "it concerns a primary");
}

#[test]
fn a_primary_that_tells_of_ever_more_hosts_fills_no_memory() {
    let mut config = VolumeConfig { role: Role::Replica, ..example() };
    config.peers.clear();
    for first in 0..100_u32 {
        let host = |number: u32| {
            let bytes = [number.to_le_bytes(), (number ^ 1).to_le_bytes()].concat().repeat(4);
            Member { host: HostId(bytes.try_into().expect("32 bytes")), ..member("a", 1, Mode::Async) }
        };
        let told: Vec<Member> = (0..33).map(|number| host(1000 + 33 * first + number)).collect();
        config.learn(&told, HostId([2; 32]), &"b".parse().expect("a name"));
    }
    assert_eq!(config.peers.len(), PEERS_LIMIT);
}
