//! What a failure of the backing means for the volume and for whoever wrote.

use super::*;
use crate::content::allocation;
use crate::device::{Command, Request, Volume};
use crate::state::Unrecovered;
use crate::state::holding::Compared;
use crate::state::metadata::tests::superblock;
use crate::storage::faults::{Calls, Faults};
use crate::storage::file::Access;
use crate::storage::{Engine, open_with};
use blockmirror_protocol::disk::dirty_map::Base;
use blockmirror_protocol::disk::superblock::Role;
use blockmirror_protocol::units::{CopyId, GenerationId};
use std::io;
use std::path::Path;

const SIZE_BYTES: u64 = 1 << 20;

/// Runs a test the way a volume's thread runs.
fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, test)
}

/// A volume without peers, and the storage that its backing and its activity log are on.
async fn open(folder: &Path) -> (Rc<Primary>, Rc<Faults>) {
    let path = folder.join("image");
    File::create_image(&path, SIZE_BYTES).expect("it can be made");
    let backing = Rc::new(File::open_backing(&path, Access::ReadWrite).expect("it can be opened"));
    let config = format!(
        "name = \"data\"\nid = \"{}\"\nrole = \"primary\"\nbacking = \"{}\"\nsize_bytes = {SIZE_BYTES}\n\
         block_size_bytes = 65536\n",
        "01".repeat(16),
        path.display()
    );
    let config: VolumeConfig = toml::from_str(&config).expect("a configuration");
    let superblock = Superblock { role: Role::Primary, size_bytes: SIZE_BYTES, ..superblock() };
    let storage = open_with(Engine::Automatic).expect("a storage");
    let pool = BufferPool::new(1 << 20);
    let state = Unrecovered::create(&folder.join("state"), storage.clone(), pool.clone(), &superblock).await;
    let state = state.expect("a state folder").recover(&Compared::anew()).await.expect("it is whole");
    let faults = Faults::new(storage);
    let primary = Primary::open(faults.clone(), backing, state, pool, &config).await;
    (primary.expect("a volume"), faults)
}

/// Takes one answer.
struct Taker(Cell<Option<oneshot::Sender<Result<Answer, Errno>>>>);

impl Reply for Taker {
    fn complete(&self, _: u64, answer: Result<Answer, Errno>) {
        let sender = self.0.take().expect("a request is answered once");
        sender.send(answer).unwrap_or_else(|_| panic!("the test waits"));
    }
}

/// The error of a request, if it fails.
async fn error_of(primary: &Primary, command: Command) -> Option<i32> {
    let (sender, answer) = oneshot::channel();
    let reply = Rc::new(Taker(Cell::new(Some(sender))));
    Volume::submit(primary, Request { command, reply, cookie: 1 });
    answer.await.expect("it is answered").err().map(|errno| errno.0)
}

fn failure(errno: i32) -> storage::Outcome {
    let source = io::Error::from_raw_os_error(errno);
    Err(storage::Error { operation: "write", path: String::new(), offset: 0, source })
}

#[test]
fn a_full_disk_excuses_a_durable_write_only_where_the_error_is_its_own() {
    // Through the cache a durable write took the kernel's only report of an earlier write that found no room: it
    // counted as a failure of its own, and the next flush succeeded.
    use LocalWrite::{Failed, NotDurable, Written};
    for (outcome, durable, has_own_reason, ended) in [
        (Ok(None), false, false, Written),
        (Ok(None), true, false, Written),
        (failure(libc::ENOSPC), false, false, Failed),
        (failure(libc::ENOSPC), true, true, Failed),
        (failure(libc::EDQUOT), true, true, Failed),
        (failure(libc::ENOSPC), true, false, NotDurable),
        (failure(libc::EDQUOT), true, false, NotDurable),
        (failure(libc::EIO), false, true, Failed),
        (failure(libc::EIO), true, true, NotDurable),
        (failure(libc::EIO), true, false, NotDurable),
    ] {
        assert_eq!(
            how_ended(&outcome, durable, has_own_reason),
            ended,
            "{outcome:?}, {durable}, {has_own_reason}"
        );
    }
}

#[test]
fn what_a_backing_has_lost_is_told_as_an_error_not_as_a_hole() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    File::create_image(&path, 1 << 20).expect("it can be made");
    let backing = File::open_backing(&path, Access::ReadWrite).expect("it can be opened");
    rustix::fs::ftruncate(&backing, 1 << 19).expect("it can be cut off");
    let lost = run(allocation(&backing, ByteRange::new(1 << 19, 1 << 19)));
    assert!(matches!(lost, Err(Errno(libc::EIO))));
}

#[test]
fn a_write_that_finds_no_room_is_answered_so_and_the_next_one_goes_well() {
    // Applications were told of an I/O error: a guest saw a broken disk where its host would have paused it.
    run(async {
        let folder = tempfile::tempdir().expect("a folder");
        let (primary, faults) = open(folder.path()).await;
        let write = || Command::Write { offset: 0, data: Bytes::from(vec![1; 4096]), fua: false };
        let zero = || Command::Zero { range: ByteRange::new(0, 4096), may_unmap: true, fua: false };
        assert_eq!(error_of(&primary, write()).await, None);
        for (errno, told) in
            [(libc::ENOSPC, libc::ENOSPC), (libc::EDQUOT, libc::ENOSPC), (libc::EIO, libc::EIO)]
        {
            faults.fail(Calls::Writes, 1, errno);
            assert_eq!(error_of(&primary, write()).await, Some(told));
            assert_eq!(error_of(&primary, write()).await, None);
            faults.fail(Calls::Zeroings, 1, errno);
            assert_eq!(error_of(&primary, zero()).await, Some(told));
            assert_eq!(error_of(&primary, zero()).await, None);
        }
        faults.fail(Calls::Syncs, 1, libc::ENOSPC);
        assert_eq!(error_of(&primary, Command::Flush).await, Some(libc::EIO), "what was answered is lost");
        assert_eq!(error_of(&primary, write()).await, Some(libc::EIO), "and the backing failed");
    });
}

/// The task that ends the session of a host which was removed took away maps of the volume that was opened anew meanwhile.
#[test]
fn a_primary_that_was_retired_voids_nobodys_map() {
    run(async {
        let folder = tempfile::tempdir().expect("a folder");
        let (primary, _) = open(folder.path()).await;
        let other = HostId([2; 32]);
        let leave = async |primary: &Primary| {
            let (map, file) = primary.state.open_map(other).await.expect("a map");
            let adopted = primary.state.superblock().adopted;
            let base = Base { copy: CopyId([2; 16]), generation: GenerationId([1; 16]), adopted };
            let mut map = map.clean(base);
            primary.state.write_map(&file, map.take_changes()).await.expect("it is written");
            drop(file);
            primary.remove_peer(HostId([3; 32])).await.expect("it is left");
            primary.state.open_map(other).await.expect("a map").0.is_full()
        };
        assert!(leave(&primary).await, "nobody else uses the folder");
        primary.retire();
        assert!(!leave(&primary).await);
    });
}

#[test]
fn a_read_that_fails_is_news_once_until_one_succeeds() {
    // A client that tried a dead disk again and again filled the log, and the volume's thread waited for each line.
    let reads = Reads::default();
    let news = [false, true, true, true, false, true, true].map(|has_failed| reads.is_news(has_failed));
    assert_eq!(news, [false, true, false, false, false, true, false]);
    run(async {
        let folder = tempfile::tempdir().expect("a folder");
        let (primary, faults) = open(folder.path()).await;
        let read = || Command::Read(ByteRange::new(0, 4096));
        faults.fail(Calls::Reads, 1, libc::EIO);
        assert_eq!(error_of(&primary, read()).await, Some(libc::EIO));
        assert!(!primary.reads.is_news(true), "it was told");
        assert_eq!(error_of(&primary, read()).await, None);
        assert!(primary.reads.is_news(true), "a read has succeeded since");
    });
}
