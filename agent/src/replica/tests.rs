//! What a replica's shell adds to its machine: the clock that a primary's word is counted on.

use super::*;
use crate::clock::tests::sleep_like_a_machine;
use crate::state::Unrecovered;
use crate::state::holding::Compared;
use crate::state::metadata::tests::superblock;
use crate::storage::file::Access;
use crate::storage::{Engine, open_with};
use blockmirror_protocol::disk::superblock::Superblock;
use blockmirror_protocol::given::Given;
use blockmirror_protocol::lineage::Ends;
use blockmirror_protocol::promise::PATIENCE;
use blockmirror_protocol::terms::{Mode, Promise};
use blockmirror_protocol::units::{CopyId, Session, Stream};
use blockmirror_protocol::wire::VERSIONS;
use blockmirror_protocol::wire::message::{Grant, Hello};
use std::time::Duration;

const SIZE_BYTES: u64 = 1 << 20;

/// Runs a test the way a volume's thread runs.
fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    tokio::task::LocalSet::new().block_on(&runtime, test)
}

/// A replica in sync in the mode sync, whose primary gives its word while it is heard.
async fn open(folder: &Path) -> Rc<Replica> {
    let path = folder.join("image");
    File::create_image(&path, SIZE_BYTES).expect("it can be made");
    let backing = Rc::new(File::open_backing(&path, Access::ReadWrite).expect("it can be opened"));
    let config = format!(
        "name = \"data\"\nid = \"{}\"\nrole = \"replica\"\nbacking = \"{}\"\nsize_bytes = {SIZE_BYTES}\n\
         block_size_bytes = 4096\n",
        "01".repeat(16),
        path.display()
    );
    let config: VolumeConfig = toml::from_str(&config).expect("a configuration");
    let given = Given { promise: Promise::WhileHeard, counted: Vec::new() };
    let superblock = Superblock { size_bytes: SIZE_BYTES, mode: Mode::Sync, given, ..superblock() };
    let storage = open_with(Engine::Automatic).expect("a storage");
    let pool = BufferPool::new(1 << 20);
    let state = Unrecovered::create(&folder.join("state"), storage.clone(), pool.clone(), &superblock).await;
    let state = state.expect("a state folder").recover(&Compared::anew()).await.expect("it is whole");
    Replica::open(storage, backing, state, pool, folder, &config).await.expect("a volume")
}

fn hello(superblock: Superblock) -> Hello {
    Hello {
        versions: VERSIONS,
        features: 0,
        volume: superblock.volume,
        size_bytes: superblock.size_bytes,
        block_size: superblock.block_size,
        sector_bytes: 512,
        copy: CopyId([3; 16]),
        session: Session(1),
        stream: Stream(1),
        fence: superblock.fence,
        lineage: superblock.lineage,
        mode: Mode::Sync,
        members: Vec::new(),
        ends: Ends::default(),
    }
}

/// A host was suspended just after its primary's word. The primary answered alone when that was over, and died an hour later.
/// The host was resumed, its clock had stood still, and it was promoted without a word of the hour that was lost.
#[test]
fn a_primarys_word_is_over_after_a_sleep_that_is_longer() {
    run(async {
        let folder = tempfile::tempdir().expect("a folder");
        let replica = open(folder.path()).await;
        let (outgoing, mut source) = tokio::sync::mpsc::unbounded_channel();
        replica.drive(|inner| {
            inner.outgoing = Some(Outgoing {
                messages: outgoing,
                unread: Rc::default(),
                answers: super::content::Answers::default(),
            });
            inner.machine.handle_message(hello(replica.state.superblock()).into()).expect("it is taken");
        });
        let answer = source.recv().await.expect("it answers");
        assert!(matches!(answer, Message::Welcome(_)), "{answer:?}");
        let now = replica.now();
        replica.drive(|inner| inner.machine.ask_promise(now));
        let (session, number) = loop {
            if let Message::Renew(renew) = source.recv().await.expect("it asks") {
                break (renew.session, renew.number);
            }
        };
        let milliseconds = u64::try_from(PATIENCE.as_millis()).expect("a short time");
        replica.drive(|inner| {
            inner
                .machine
                .handle_message(Grant { session, number, milliseconds }.into())
                .expect("it is taken");
        });
        assert!(replica.is_promised());
        sleep_like_a_machine(Duration::from_secs(3600));
        assert!(!replica.is_promised());
    });
}
