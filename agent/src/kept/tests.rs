//! The keeper, on a thread in place of a process.

use super::keeper::{Holding, Keeper};
use super::*;
use rustix::fs::{MemfdFlags, memfd_create};
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};
use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::thread::JoinHandle;
use tempfile::TempDir;

/// Descriptors of the right kinds, and what tells the second one from others.
fn descriptors() -> (Descriptors, u64) {
    let session = File::open("/dev/null").expect("a device").into();
    let table = File::from(memfd_create("test", MemfdFlags::CLOEXEC).expect("memory"));
    let number = table.metadata().expect("a status").ino();
    (Descriptors { session, table: table.into() }, number)
}

fn number(descriptors: &Descriptors) -> u64 {
    File::from(descriptors.table.try_clone().expect("a descriptor")).metadata().expect("a status").ino()
}

fn socket(kind: SocketType) -> OwnedFd {
    socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC, None).expect("a socket")
}

/// A run folder with a keeper.
fn keeper() -> (TempDir, JoinHandle<io::Result<()>>) {
    let folder = tempfile::tempdir().expect("a folder");
    let listener = socket(SocketType::SEQPACKET);
    let address = SocketAddrUnix::new(folder.path().join("keeper.sock")).expect("an address");
    bind(&listener, &address).expect("a free name");
    listen(&listener, 8).expect("a socket that listens");
    (folder, std::thread::spawn(move || Holding::default().serve(&listener)))
}

fn find(folder: &TempDir) -> (Keeper, HashMap<String, Descriptors>) {
    Keeper::find(folder.path(), false).expect("the keeper answers")
}

#[test]
fn what_is_kept_is_found_by_the_next_and_the_keeper_ends_when_nothing_is() {
    let (folder, ended) = keeper();
    let (mut first, held) = find(&folder);
    assert!(held.is_empty());
    let ((one, one_number), (other, other_number)) = (descriptors(), descriptors());
    first.put("data", &one, &held).expect("it is kept");
    first.put("logs", &one, &held).expect("it is kept");
    // What comes later under a name takes its place.
    first.put("logs", &other, &held).expect("it is kept");
    drop((first, one, other));

    let (mut second, held) = find(&folder);
    let mut found: Vec<_> = held.iter().map(|(name, held)| (name.as_str(), number(held))).collect();
    found.sort_unstable();
    assert_eq!(found, [("data", one_number), ("logs", other_number)]);
    second.remove("data").expect("it is dropped");
    second.remove("nothing").expect("it is no mistake");
    drop(second);
    assert_eq!(find(&folder).1.keys().collect::<Vec<_>>(), ["logs"]);
    let (mut third, _) = find(&folder);
    third.remove("logs").expect("it is dropped");
    drop(third);
    ended.join().expect("it does not panic").expect("it ends well");
    let (_, held) = find(&folder);
    assert!(held.is_empty(), "one that has ended holds nothing");
}

#[test]
fn a_keeper_says_no_to_what_it_does_not_understand_and_goes_on() {
    let (folder, ended) = keeper();
    let connection = socket(SocketType::SEQPACKET);
    let address = SocketAddrUnix::new(folder.path().join("keeper.sock")).expect("an address");
    connect(&connection, &address).expect("the keeper is there");
    let (right, _) = descriptors();
    let two_tables = [right.table.as_fd(), right.table.as_fd()];
    for (text, descriptors, expected) in [
        ("2 list", &[][..], "1 no such order"),
        ("1 fetch data", &[], "1 no such order"),
        ("\u{1}\u{2}", &[], "1 no such order"),
        ("1 put data", &[], "1 no descriptors of the right kind"),
        ("1 put data", &right.both()[..1], "1 no descriptors of the right kind"),
        ("1 put data", &two_tables, "1 no descriptors of the right kind"),
        ("1 list", &[], "1 done"),
    ] {
        passing::send(&connection, text, descriptors).expect("it is sent");
        let (answer, _) = passing::receive(&connection).expect("it is received").expect("an answer");
        assert!(answer.starts_with(expected), "{text:?}: {answer:?}");
    }
    // A message that is longer than any ends the connection alone.
    let (mut other, held) = find(&folder);
    passing::send(&connection, &"x".repeat(600), &[]).expect("it is sent");
    assert!(matches!(passing::receive(&connection), Ok(None) | Err(_)));
    other.put("data", &right, &held).expect("it goes on");
    other.remove("data").expect("it goes on");
    drop(other);
    ended.join().expect("it does not panic").expect("it ends well");
}

#[test]
fn a_session_that_has_ended_is_let_go_once_no_agent_is_there() {
    let Ok(session) = File::open("/dev/fuse") else {
        return eprintln!("skipped: needs root and /dev/fuse");
    };
    let (folder, ended) = keeper();
    let (mut agent, held) = find(&folder);
    // One that was never mounted is as one that was unmounted.
    let (other, _) = descriptors();
    let dead = Descriptors { session: session.into(), table: other.table.try_clone().expect("a descriptor") };
    agent.put("dead", &dead, &held).expect("it is kept");
    agent.put("data", &other, &held).expect("it is kept");
    drop(agent);
    // It looks when it has noticed that the agent is gone.
    let mut agent = loop {
        let (agent, held) = find(&folder);
        assert!(held.contains_key("data"));
        if !held.contains_key("dead") {
            break agent;
        }
    };
    agent.remove("data").expect("it is dropped");
    drop(agent);
    ended.join().expect("it does not panic").expect("it ends well");
}

#[test]
fn a_store_that_keeps_nothing_says_so() {
    let store = Store::nowhere();
    store.put("data", descriptors().0).expect("it is no mistake");
    assert!(!store.holds("data") && store.get("data").is_none() && store.names().is_empty());
    store.remove("data");
    assert!(!store.is_the_last());
}

#[test]
fn a_socket_that_a_killed_keeper_left_is_no_keeper() {
    let folder = tempfile::tempdir().expect("a folder");
    let listener = socket(SocketType::SEQPACKET);
    let path = folder.path().join("keeper.sock");
    bind(&listener, &SocketAddrUnix::new(&path).expect("an address")).expect("a free name");
    drop(listener);
    assert!(fs::symlink_metadata(&path).is_ok());
    assert!(find(&folder).1.is_empty());
}
