//! Layers on a real file system: what was saved is what is restored, wherever a crash tears the file or stops the host.

use super::*;
use crate::storage::faults::{Calls, Faults};
use crate::storage::file::Access;
use crate::storage::{Done, Engine, Operation, drain, open_with, write, zero};
use blockmirror_protocol::disk::pre_images::{Batch, ENTRIES};
use blockmirror_protocol::layers::LayerId;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::{BlockSize, CopyId, Epoch, GenerationId, Position, Sequence, VolumeId};
use std::cell::{Cell, RefCell};
use std::os::unix::fs::FileExt;
use std::process::Command;

const PAGE: u64 = 4096;
const MEBIBYTE: u64 = 1 << 20;
const SIZE: u64 = 8 * MEBIBYTE + 512;
const NO_LIMIT: u64 = u64::MAX;

/// Runs a test the way a volume's thread runs.
fn run<T>(test: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, test)
}

fn named(number: u64) -> LayerId {
    LayerId::new(number).unwrap()
}

fn header(number: u64) -> Header {
    let position = Position { generation: GenerationId([3; 16]), epoch: Epoch(4), sequence: Sequence(5) };
    Header {
        layer: named(number),
        volume: VolumeId([1; 16]),
        copy: CopyId([2; 16]),
        size_bytes: SIZE,
        block_size: BlockSize::default(),
        point: position,
        began_unix_seconds: 6,
        lineage: vec![GenerationId([3; 16])],
    }
}

/// A backing with a hole, written zeroes and data, a copy of it, and a folder for layers.
struct Host {
    folder: tempfile::TempDir,
    storage: Rc<dyn Storage>,
    backing: Rc<File>,
    original: Vec<u8>,
}

impl Host {
    fn new(engine: Engine) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let image = folder.path().join("image");
        let mut original = vec![0; SIZE as usize];
        original.chunks_mut(512).zip((1..=251).cycle()).for_each(|(sector, byte)| sector.fill(byte));
        let (hole, zeroes) = ([2, 4].map(|at| (at * MEBIBYTE) as usize), [6, 7].map(|at| at << 20));
        original[hole[0]..hole[1]].fill(0);
        original[zeroes[0]..zeroes[1]].fill(0);
        let file = fs::File::create(&image).unwrap();
        file.write_all_at(&original[..hole[0]], 0).unwrap();
        file.write_all_at(&original[hole[1]..], hole[1] as u64).unwrap();
        let backing = Rc::new(File::open_backing(&image, Access::ReadWrite).unwrap());
        Self { folder, storage: open_with(engine).unwrap(), backing, original }
    }

    fn store(&self, limit_bytes: u64) -> PreImages {
        self.store_through(self.storage.clone(), limit_bytes)
    }

    fn store_through(&self, storage: Rc<dyn Storage>, limit_bytes: u64) -> PreImages {
        PreImages::new(self.folder.path(), storage, BufferPool::new(16 << 20), limit_bytes)
    }

    fn path(&self, number: u64) -> PathBuf {
        self.folder.path().join(pre_images::file_name(named(number)))
    }

    fn content(&self) -> Vec<u8> {
        fs::read(self.backing.path()).unwrap()
    }

    fn overwrite_all(&self) {
        fs::OpenOptions::new()
            .write(true)
            .open(self.backing.path())
            .unwrap()
            .write_all_at(&vec![0xee; SIZE as usize], 0)
            .unwrap();
    }

    async fn restore(&self, layer: &Layer) {
        let mut contents = layer.contents();
        while let Some(images) = contents.next().await.unwrap() {
            for PreImage { range, data } in images {
                match data {
                    Some(data) => write(&*self.storage, &self.backing, range.offset, data, false).await,
                    None => zero(&*self.storage, &self.backing, range, false).await,
                }
                .unwrap();
            }
        }
    }

    /// What a layer restores is what the backing held at first, and nothing else is touched.
    #[track_caller]
    fn assert_restored(&self, saved: impl Iterator<Item = ByteRange>) {
        let mut expected = vec![0xee; SIZE as usize];
        for range in saved {
            let range = range.offset as usize..range.end() as usize;
            expected[range.clone()].copy_from_slice(&self.original[range]);
        }
        assert!(self.content() == expected);
    }
}

#[test]
fn everything_saved_is_restored_after_a_restart() {
    for engine in [Engine::Automatic, Engine::Threads] {
        run(async {
            let host = Host::new(engine);
            let store = host.store(NO_LIMIT);
            let mut layer = store.begin(header(9)).await.unwrap();
            // The end of the volume, single blocks out of order, a hole, zeroes, and more than one batch holds.
            let scattered: Vec<ByteRange> =
                (0..ENTRIES as u64 + 9).rev().map(|block| ByteRange::new(2 * block * PAGE, PAGE)).collect();
            let saves: [&[ByteRange]; 4] = [
                &[ByteRange::new(SIZE - 1024, 1024), ByteRange::new(512, 512)],
                &scattered,
                &[],
                &[ByteRange::new(2 * MEBIBYTE, 6 * MEBIBYTE - 4096)],
            ];
            for ranges in saves {
                layer.save(&host.backing, ranges).await.unwrap();
            }
            let saved: Vec<ByteRange> = layer.saved().collect();
            let bytes = layer.bytes();
            assert_eq!(fs::metadata(host.path(9)).unwrap().len(), bytes);
            drop(layer);
            host.overwrite_all();
            let layer = store.open(named(9)).await.unwrap();
            assert_eq!((layer.saved().collect::<Vec<_>>(), layer.bytes()), (saved.clone(), bytes));
            assert_eq!(layer.header(), &header(9));
            host.restore(&layer).await;
            host.assert_restored(saved.into_iter());
        });
    }
}

#[test]
fn zeroes_take_no_data_whether_they_are_a_hole_or_written() {
    run(async {
        let host = Host::new(Engine::Automatic);
        let mut layer = host.store(NO_LIMIT).begin(header(1)).await.unwrap();
        let ranges = [ByteRange::new(2 * MEBIBYTE, 2 * MEBIBYTE), ByteRange::new(6 * MEBIBYTE, MEBIBYTE)];
        layer.save(&host.backing, &ranges).await.unwrap();
        assert_eq!(layer.bytes(), 2 * PAGE, "a header and the page of one batch");
        let images = layer.contents().next().await.unwrap().unwrap();
        assert!(images.len() == 3 && images.iter().all(|image| image.data.is_none()));
    });
}

#[test]
fn the_first_pre_image_of_a_block_is_the_one_that_counts() {
    run(async {
        let host = Host::new(Engine::Automatic);
        let store = host.store(NO_LIMIT);
        let mut layer = store.begin(header(1)).await.unwrap();
        layer.save(&host.backing, &[ByteRange::new(PAGE, PAGE)]).await.unwrap();
        host.overwrite_all();
        let overlapping = [ByteRange::new(PAGE, PAGE), ByteRange::new(PAGE, PAGE)];
        let bytes = layer.bytes();
        layer.save(&host.backing, &overlapping).await.unwrap();
        assert_eq!(layer.bytes(), bytes);
        host.restore(&layer).await;
        host.assert_restored([ByteRange::new(PAGE, PAGE)].into_iter());
    });
}

/// A layer of two saves, its file's bytes, and where the second batch begins.
async fn two_batches(host: &Host, store: &PreImages) -> (Vec<u8>, usize) {
    let mut layer = store.begin(header(1)).await.unwrap();
    layer.save(&host.backing, &[ByteRange::new(0, 2 * PAGE)]).await.unwrap();
    let second = layer.bytes() as usize;
    let ranges = [ByteRange::new(MEBIBYTE, 2 * PAGE), ByteRange::new(5 * MEBIBYTE, PAGE)];
    layer.save(&host.backing, &ranges).await.unwrap();
    drop(layer);
    (fs::read(host.path(1)).unwrap(), second)
}

#[test]
fn a_batch_that_a_crash_tore_is_ignored_and_replaced() {
    run(async {
        let host = Host::new(Engine::Automatic);
        let store = host.store(NO_LIMIT);
        let (whole, second) = two_batches(&host, &store).await;
        let sectors = || (second..whole.len()).step_by(512);
        let lost = sectors().filter(|at| whole[*at..at + 512].iter().any(|byte| *byte != 0)).map(|at| {
            let mut torn = whole.clone();
            torn[at..at + 512].fill(0);
            torn
        });
        let torn: Vec<Vec<u8>> = lost.chain(sectors().map(|at| whole[..at].to_vec())).collect();
        assert_eq!(torn.len(), 1 + 3 * 8 + 4 * 8);
        for file in torn {
            fs::write(host.path(1), &file).unwrap();
            let mut layer = store.open(named(1)).await.unwrap();
            assert_eq!(layer.saved().collect::<Vec<_>>(), [ByteRange::new(0, 2 * PAGE)]);
            // The new batch is shorter: nothing of the torn one may be taken for what follows it.
            layer.save(&host.backing, &[ByteRange::new(7 * MEBIBYTE, PAGE)]).await.unwrap();
            let (saved, bytes): (Vec<_>, _) = (layer.saved().collect(), layer.bytes());
            drop(layer);
            assert_eq!(fs::metadata(host.path(1)).unwrap().len(), bytes);
            let layer = store.open(named(1)).await.unwrap();
            assert_eq!(layer.saved().collect::<Vec<_>>(), saved);
            let mut contents = layer.contents();
            while let Some(images) = contents.next().await.unwrap() {
                for PreImage { range, data } in images {
                    let place = range.offset as usize..range.end() as usize;
                    assert_eq!(data.unwrap(), host.original[place]);
                }
            }
        }
    });
}

#[test]
fn damage_before_the_last_batch_is_never_taken_for_its_end() {
    run(async {
        let host = Host::new(Engine::Automatic);
        let store = host.store(NO_LIMIT);
        let (whole, second) = two_batches(&host, &store).await;
        let damaged = |at: usize| {
            let mut file = whole.clone();
            file[at] ^= 1;
            fs::write(host.path(1), file).unwrap();
        };
        let is_unusable = |error: LayerError| {
            let text = crate::words::with_causes(&error);
            text.contains("pre-images-0000000000000001 can't be used") && text.contains("is damaged")
        };
        for at in [100, PAGE as usize, PAGE as usize + 60] {
            damaged(at);
            assert!(is_unusable(store.open(named(1)).await.err().unwrap()), "{at}");
        }
        // The data of a batch is looked at when it is needed.
        damaged(second - 1);
        let layer = store.open(named(1)).await.unwrap();
        assert!(is_unusable(layer.contents().next().await.err().unwrap()));
        drop(layer);
        // The second batch's page is torn, so the first was whole once; its data isn't now.
        let mut file = whole.clone();
        file[second] ^= 1;
        file[second - 1] ^= 1;
        fs::write(host.path(1), file).unwrap();
        assert!(is_unusable(store.open(named(1)).await.err().unwrap()));
        // No batch is as long as what stands here.
        let mut file = whole[..second].to_vec();
        file.resize(second + (4 << 20) + 1, 7);
        fs::write(host.path(1), file).unwrap();
        assert!(is_unusable(store.open(named(1)).await.err().unwrap()));
        // An entry beyond the volume's end.
        let (at, range) = (second as u64, ByteRange::new(SIZE, 512));
        let entries = vec![pre_images::Entry::of_zeroes(range)];
        let batch = Batch { layer: named(1), serial: 1, at, entries };
        fs::write(host.path(1), [&whole[..second], &batch.encode()].concat()).unwrap();
        assert!(is_unusable(store.open(named(1)).await.err().unwrap()));
        // Another layer's file under this name.
        fs::write(host.path(2), &whole).unwrap();
        assert!(matches!(
            store.open(named(2)).await.err().unwrap(),
            LayerError::Unusable { source: MetadataError::Foreign { .. }, .. }
        ));
    });
}

#[test]
fn a_save_without_room_leaves_the_layer_as_it_was() {
    run(async {
        let host = Host::new(Engine::Automatic);
        let limit = 6 * MEBIBYTE;
        let store = host.store(limit);
        let mut old = store.begin(header(1)).await.unwrap();
        old.save(&host.backing, &[ByteRange::new(0, MEBIBYTE)]).await.unwrap();
        drop(old);
        let mut layer = store.begin(header(2)).await.unwrap();
        layer.save(&host.backing, &[ByteRange::new(0, PAGE)]).await.unwrap();
        let before = (layer.saved().collect::<Vec<_>>(), layer.bytes());
        // Two batches: the first, of 4 MiB, has room, and the second has none.
        let large = [(0, 2), (4, 2), (7, 1)].map(|(at, length)| ByteRange::new(at << 20, length << 20));
        for _ in 0..2 {
            let error = layer.save(&host.backing, &large).await.unwrap_err();
            assert!(
                matches!(error, SaveError::Full(Shortage::Limit { limit_bytes }) if limit_bytes == limit)
            );
            assert_eq!((layer.saved().collect::<Vec<_>>(), layer.bytes()), before);
            assert_eq!(fs::metadata(host.path(2)).unwrap().len(), before.1);
        }
        let full = host.store(store.bytes().unwrap()).begin(header(3)).await;
        assert!(matches!(full, Err(LayerError::Full(Shortage::Limit { .. }))));
        assert!(!host.path(3).exists());
        store.remove(named(1)).await.unwrap();
        layer.save(&host.backing, &large).await.unwrap();
        assert_eq!(store.bytes().unwrap(), layer.bytes());
        assert_eq!(layer.bytes(), 5 * MEBIBYTE + 4 * PAGE);
    });
}

#[test]
fn each_failing_call_of_a_save_leaves_the_layer_as_it_was() {
    run(async {
        let host = Host::new(Engine::Automatic);
        let faults = Faults::new(host.storage.clone());
        let store = host.store_through(faults.clone(), NO_LIMIT);
        let mut layer = store.begin(header(1)).await.unwrap();
        layer.save(&host.backing, &[ByteRange::new(0, PAGE)]).await.unwrap();
        let before = (layer.saved().collect::<Vec<_>>(), layer.bytes());
        let all = [ByteRange::new(0, SIZE)];
        for (calls, count, errno) in [
            (Calls::Writes, 2, libc::ENOSPC),
            (Calls::Writes, 2, libc::EDQUOT),
            (Calls::Writes, 2, libc::EIO),
            (Calls::Reads, 7, libc::EIO),
            (Calls::Reads, 7, libc::ENOSPC),
        ] {
            for nth in 1..=count {
                faults.fail(calls, nth, errno);
                let error = layer.save(&host.backing, &all).await.unwrap_err();
                let is_full = matches!(error, SaveError::Full(Shortage::Disk { .. }));
                assert_eq!(is_full, calls == Calls::Writes && errno != libc::EIO, "{error:?}");
                // Reads that were under way beyond the one that failed end for themselves.
                drain(&*host.storage).await;
                assert_eq!((layer.saved().collect::<Vec<_>>(), layer.bytes()), before);
                assert_eq!(fs::metadata(host.path(1)).unwrap().len(), before.1);
            }
        }
        layer.save(&host.backing, &all).await.unwrap();
        host.overwrite_all();
        host.restore(&layer).await;
        assert!(host.content() == host.original);
    });
}

#[test]
fn layers_are_listed_counted_and_removed() {
    run(async {
        let host = Host::new(Engine::Automatic);
        let store = host.store(NO_LIMIT);
        assert_eq!(store.bytes().unwrap(), 0);
        for number in [0x10, 2] {
            drop(store.begin(header(number)).await.unwrap());
        }
        fs::write(host.path(0x20), [0; PAGE as usize]).unwrap();
        fs::write(host.path(0x21), header(5).encode()).unwrap();
        fs::write(host.folder.path().join("pre-images-x"), "not ours").unwrap();
        assert_eq!(store.list().unwrap(), [(named(2), header(2)), (named(0x10), header(0x10))]);
        assert_eq!(store.bytes().unwrap(), 4 * PAGE);
        store.remove(named(2)).await.unwrap();
        store.remove(named(2)).await.unwrap();
        assert_eq!(store.list().unwrap(), [(named(0x10), header(0x10))]);
        assert!(matches!(store.open(named(2)).await, Err(LayerError::Open(OpenError::NotFound { .. }))));
    });
}

#[test]
fn a_file_without_batches_is_replaced_and_one_with_some_is_kept() {
    run(async {
        let host = Host::new(Engine::Automatic);
        let store = host.store(NO_LIMIT);
        for unfinished in [vec![], vec![0; 100], vec![0; PAGE as usize]] {
            fs::write(host.path(1), unfinished).unwrap();
            drop(store.begin(header(1)).await.unwrap());
            assert_eq!(store.open(named(1)).await.unwrap().header(), &header(1));
        }
        let (whole, _) = two_batches(&host, &store).await;
        assert!(matches!(store.begin(header(1)).await, Err(LayerError::Exists { .. })));
        assert_eq!(fs::read(host.path(1)).unwrap(), whole);
    });
}

/// What a stretch of gap mode does: saves some ranges, overwrites them, and so on.
struct Gap {
    saves: Vec<Vec<ByteRange>>,
    has_begun: Cell<bool>,
    overwritten: RefCell<Vec<ByteRange>>,
}

impl Gap {
    fn new() -> Self {
        let scattered = (0..20).map(|block| ByteRange::new(3 * block * PAGE, PAGE)).collect();
        let saves = vec![
            vec![ByteRange::new(SIZE - 1024, 1024)],
            scattered,
            vec![ByteRange::new(MEBIBYTE, SIZE - 2 * MEBIBYTE)],
            vec![ByteRange::new(0, PAGE), ByteRange::new(4 * PAGE, PAGE)],
        ];
        Self { saves, has_begun: Cell::new(false), overwritten: RefCell::default() }
    }

    async fn pass(&self, host: &Host, storage: Rc<dyn Storage>) {
        let store = host.store_through(storage.clone(), NO_LIMIT);
        let mut layer = store.begin(header(1)).await.unwrap();
        self.has_begun.set(true);
        for ranges in &self.saves {
            layer.save(&host.backing, ranges).await.unwrap();
            for range in ranges {
                self.overwritten.borrow_mut().push(*range);
                let mut new = BufferPool::new(0).take(range.length as usize);
                new.fill(0xee);
                write(&*storage, &host.backing, range.offset, new.freeze(), false).await.unwrap();
            }
        }
    }
}

#[test]
fn a_crash_after_any_storage_call_leaves_the_way_back_open() {
    run(async {
        let host = Host::new(Engine::Automatic);
        let whole = Faults::new(host.storage.clone());
        Gap::new().pass(&host, whole.clone()).await;
        let calls = whole.submitted();
        assert!(calls > 35, "each read, batch and overwriting counts");
        for passing in 0..=calls {
            let host = Host::new(Engine::Automatic);
            let (gap, faults) = (Gap::new(), Faults::new(host.storage.clone()));
            faults.stop_after(passing);
            let has_ended = tokio::select! {
                biased;
                () = gap.pass(&host, faults.clone()) => true,
                () = faults.stopped() => false,
            };
            assert_eq!(has_ended, passing == calls);
            drain(&*host.storage).await;
            faults.forget_swallowed();
            let store = host.store(NO_LIMIT);
            if !gap.has_begun.get() {
                assert!(host.content() == host.original);
                drop(store.begin(header(1)).await.unwrap());
                continue;
            }
            let mut layer = store.open(named(1)).await.unwrap();
            let missing = |range: &ByteRange| !layer.saved().any(|saved| saved.contains(*range));
            assert!(!gap.overwritten.borrow().iter().any(missing));
            // One host is rolled back at once; another goes on first, and what has a pre-image keeps it.
            if passing % 2 == 0 {
                layer.save(&host.backing, &[ByteRange::new(0, SIZE)]).await.unwrap();
                host.overwrite_all();
            }
            host.restore(&layer).await;
            assert!(host.content() == host.original, "after {passing} of {calls} calls");
        }
    });
}

#[test]
fn a_layer_is_refused_while_another_holds_it() {
    run(async {
        let host = Host::new(Engine::Automatic);
        let layer = host.store(NO_LIMIT).begin(header(1)).await.unwrap();
        assert!(matches!(File::open_metadata(host.path(1)), Err(OpenError::InUse { .. })));
        drop(layer);
        assert!(File::open_metadata(host.path(1)).is_ok());
    });
}

#[test]
#[should_panic(expected = "a save is awaited to its end")]
fn a_layer_whose_save_was_dropped_takes_no_other() {
    run(async {
        let host = Host::new(Engine::Automatic);
        let faults = Faults::new(host.storage.clone());
        let mut layer = host.store_through(faults.clone(), NO_LIMIT).begin(header(1)).await.unwrap();
        faults.stop_after(0);
        let ranges = [ByteRange::new(0, PAGE)];
        tokio::select! {
            biased;
            _ = layer.save(&host.backing, &ranges) => unreachable!("the storage has stopped"),
            () = faults.stopped() => {}
        }
        let _ = layer.save(&host.backing, &ranges).await;
    });
}

/// A storage that notes what is done to layers.
struct Noting {
    inner: Rc<dyn Storage>,
    done: RefCell<Vec<&'static str>>,
}

impl Storage for Noting {
    fn submit(&self, file: &Rc<File>, operation: Operation, done: Done) {
        if file.path().to_str().unwrap().contains(pre_images::FILE_PREFIX) {
            let is_durable = matches!(operation, Operation::Write { durable: true, .. });
            self.done.borrow_mut().push(if is_durable { "durable write" } else { operation.name() });
        }
        self.inner.submit(file, operation, done);
    }

    fn kind(&self) -> &'static str {
        self.inner.kind()
    }
}

#[test]
fn all_writes_are_durable_and_an_opened_layer_is_synced_first() {
    run(async {
        let host = Host::new(Engine::Automatic);
        let noting = Rc::new(Noting { inner: host.storage.clone(), done: RefCell::default() });
        let store = host.store_through(noting.clone(), NO_LIMIT);
        let mut layer = store.begin(header(1)).await.unwrap();
        layer.save(&host.backing, &[ByteRange::new(0, PAGE)]).await.unwrap();
        drop(layer);
        drop(store.open(named(1)).await.unwrap());
        assert_eq!(noting.done.take(), ["durable write", "durable write", "sync"]);
    });
}

/// A small file system, unmounted when the value goes away.
struct SmallDisk(tempfile::TempDir);

impl SmallDisk {
    /// None, with the reason printed, where it can't be mounted.
    fn new(size_bytes: u64) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let size = format!("size={size_bytes}");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &size, "tmpfs"]).arg(folder.path()).output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(folder)),
            Ok(output) => {
                eprintln!("skipped: a small tmpfs: {}", String::from_utf8_lossy(&output.stderr).trim());
                None
            }
            Err(error) => {
                eprintln!("skipped: a small tmpfs: {error}");
                None
            }
        }
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        if let Err(error) = Command::new("umount").arg("-l").arg(self.0.path()).output() {
            eprintln!("not cleaned up: {error}");
        }
    }
}

#[test]
fn a_disk_that_is_full_leaves_the_layer_as_it_was() {
    for engine in [Engine::Automatic, Engine::Threads] {
        run(async {
            let host = Host::new(engine);
            let Some(disk) = SmallDisk::new(3 * MEBIBYTE) else { return };
            let pool = BufferPool::new(16 << 20);
            let store = PreImages::new(disk.0.path(), host.storage.clone(), pool, NO_LIMIT);
            let mut layer = store.begin(header(1)).await.unwrap();
            layer.save(&host.backing, &[ByteRange::new(0, PAGE)]).await.unwrap();
            let before = (layer.saved().collect::<Vec<_>>(), layer.bytes());
            for _ in 0..2 {
                let error = layer.save(&host.backing, &[ByteRange::new(0, SIZE)]).await.unwrap_err();
                assert!(matches!(error, SaveError::Full(Shortage::Disk { .. })), "{error:?}");
                assert_eq!((layer.saved().collect::<Vec<_>>(), layer.bytes()), before);
                assert_eq!(store.bytes().unwrap(), before.1);
            }
            layer.save(&host.backing, &[ByteRange::new(PAGE, MEBIBYTE)]).await.unwrap();
            drop(layer);
            host.overwrite_all();
            let layer = store.open(named(1)).await.unwrap();
            host.restore(&layer).await;
            host.assert_restored([ByteRange::new(0, MEBIBYTE + PAGE)].into_iter());
            fs::write(disk.0.path().join("filler"), vec![1; 3 << 20]).unwrap_err();
            assert!(matches!(store.begin(header(2)).await, Err(LayerError::Full(Shortage::Disk { .. }))));
        });
    }
}
