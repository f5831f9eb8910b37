//! Reading, writing, zeroing and syncing, against a plain vector of bytes.

use super::{LargeSectors, LoopDevice, Numbers, command, run, storages, text};
use crate::buffer::BufferPool;
use crate::storage::file::Part;
use crate::storage::file::{Access, File, Kind};
use crate::storage::ring::Ring;
use crate::storage::{Engine, Operation, Outcome, Storage, drain, open_with, read, sync, write, zero};
use blockmirror_protocol::ranges::ByteRange;
use bytes::Bytes;
use std::any::Any;
use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::atomic::Ordering;

const MEBIBYTE: u64 = 1 << 20;

/// A file and what must live as long as it.
struct Place {
    name: &'static str,
    file: Rc<File>,
    _below: Box<dyn Any>,
}

impl Place {
    fn new(name: &'static str, file: File, below: impl Any) -> Self {
        Self { name, file: Rc::new(file), _below: Box::new(below) }
    }

    /// An image file in this folder.
    fn image(name: &'static str, folder: PathBuf, below: impl Any, size_bytes: u64) -> Self {
        let path = folder.join("image");
        File::create_image(&path, size_bytes).expect("an image can be made");
        Self::new(name, File::open_backing(&path, Access::ReadWrite).expect("it can be opened"), below)
    }
}

/// An image of a mebibyte.
fn some_image() -> Place {
    let folder = tempfile::tempdir().expect("a folder");
    Place::image("image", folder.path().to_path_buf(), folder, MEBIBYTE)
}

/// Images, a metadata file, and devices: with alignments of 512 and 4096 bytes, and one without direct I/O.
fn places(size_bytes: u64) -> Vec<Place> {
    let mut places = Vec::new();
    for (name, root) in [("image", "/var/tmp"), ("image in memory", "/dev/shm")] {
        let folder = tempfile::tempdir_in(root).expect("a folder");
        places.push(Place::image(name, folder.path().to_path_buf(), folder, size_bytes));
        let in_memory = places[places.len() - 1].file.descriptor().in_memory;
        assert_eq!(in_memory, name == "image in memory", "{name}");
    }
    let folder = tempfile::tempdir().expect("a folder");
    let file = File::create_metadata(folder.path().join("metadata"), size_bytes / 2).expect("it can be made");
    places.push(Place::new("metadata", file, folder));
    for (name, sector) in [("device with 512-byte sectors", 512), ("device with 4096-byte sectors", 4096)] {
        if let Some(device) = LoopDevice::new(size_bytes, sector) {
            let file = File::open_backing(&device.path, Access::ReadWrite).expect("it can be opened");
            assert_eq!((file.kind(), file.is_direct()), (Kind::BlockDevice, true));
            assert!(!file.descriptor().in_memory, "its node is, and the device is not");
            assert_eq!((file.alignment(), file.size_bytes()), (u64::from(sector), size_bytes));
            places.push(Place::new(name, file, device));
        }
    }
    if let Some(mounted) = LargeSectors::new() {
        let folder = mounted.folder.path().to_path_buf();
        places.push(Place::image("image on 4096-byte sectors", folder, mounted, size_bytes));
    }
    if let Some(mounted) = LargeSectors::new() {
        let folder = mounted.folder.path().to_path_buf();
        let place = Place::image("image without direct i/o", folder, mounted, size_bytes + 512);
        assert!(!place.file.is_direct());
        places.push(place);
    }
    places
}

/// Sectors full of a number, at an address that is off by `skew` bytes from what direct I/O likes.
fn content(length: u64, numbers: &mut Numbers, skew: usize) -> Bytes {
    let mut buffer = BufferPool::new(0).take(length as usize + skew);
    for sector in buffer[skew..].chunks_mut(512) {
        sector.fill(numbers.below(255) as u8 + 1);
    }
    buffer.freeze().slice(skew..)
}

/// A range of whole sectors.
fn some_range(numbers: &mut Numbers, size_bytes: u64, longest: u64) -> ByteRange {
    let offset = numbers.below(size_bytes / 512) * 512;
    let length = (numbers.below(longest / 512) + 1) * 512;
    ByteRange::new(offset, length.min(size_bytes - offset))
}

async fn check_against_a_vector(storage: &dyn Storage, file: &Rc<File>, size_bytes: u64, seed: u64) {
    let (mut numbers, pool) = (Numbers(seed), BufferPool::new(1 << 20));
    zero(storage, file, ByteRange::new(0, size_bytes), true).await.expect("everything can be zeroed");
    let mut model = vec![0; size_bytes as usize];
    for round in 0..120 {
        let range = some_range(&mut numbers, size_bytes, 64 << 10);
        let place = range.offset as usize..range.end() as usize;
        match numbers.below(4) {
            0 => {
                let found = read(storage, file, &pool, range).await.expect("a range can be read");
                assert_eq!(found[..], model[place], "round {round}: {range:?}");
            }
            1 => {
                let may_unmap = numbers.below(2) == 0;
                zero(storage, file, range, may_unmap).await.expect("a range can be zeroed");
                model[place].fill(0);
            }
            kind => {
                let skew = [0, 512, 8, 1][numbers.below(4) as usize];
                let data = content(range.length, &mut numbers, skew);
                model[place].copy_from_slice(&data);
                write(storage, file, range.offset, data, kind == 2).await.expect("a range can be written");
            }
        }
    }
    sync(storage, file).await.expect("the file can be synced");
    let all = read(storage, file, &pool, ByteRange::new(0, size_bytes)).await.expect("all can be read");
    assert!(all[..] == model[..], "all bytes are those of the model");
}

#[test]
fn operations_do_to_a_file_what_they_do_to_a_vector() {
    run(async {
        for place in places(2 * MEBIBYTE) {
            for (index, storage) in storages().into_iter().enumerate() {
                eprintln!("{} on {}", storage.kind(), place.name);
                let seed = 0x9e37_79b9_7f4a_7c15 + index as u64;
                check_against_a_vector(&*storage, &place.file, 2 * MEBIBYTE, seed).await;
            }
        }
    });
}

#[test]
fn zeroing_falls_back_to_what_the_file_offers() {
    run(async {
        for place in places(3 * MEBIBYTE) {
            for storage in storages() {
                let descriptor = place.file.descriptor();
                for (punches, zeroes_ranges) in [(true, true), (false, true), (false, false)] {
                    descriptor.punches.store(punches, Ordering::Relaxed);
                    descriptor.zeroes_ranges.store(zeroes_ranges, Ordering::Relaxed);
                    check_zeroing(&*storage, &place.file).await;
                }
            }
        }
    });
}

/// Zeroes all but the first and the last sector.
async fn check_zeroing(storage: &dyn Storage, file: &Rc<File>) {
    let (mut numbers, pool) = (Numbers(77), BufferPool::new(0));
    let data = content(3 * MEBIBYTE, &mut numbers, 0);
    write(storage, file, 0, data.clone(), false).await.expect("it can be written");
    let range = ByteRange::between(512, 3 * MEBIBYTE - 512);
    zero(storage, file, range, true).await.expect("it can be zeroed");
    let found = read(storage, file, &pool, ByteRange::new(0, 3 * MEBIBYTE)).await.expect("it can be read");
    let (first, last) = (512, found.len() - 512);
    assert_eq!((&found[..first], &found[last..]), (&data[..first], &data[last..]));
    assert!(found[first..last].iter().all(|byte| *byte == 0));
}

#[test]
fn a_thousand_operations_under_way_all_end() {
    run(async {
        for place in places(4 * MEBIBYTE) {
            for storage in storages() {
                let (sum, count) = (Rc::new(Cell::new(0)), 1500);
                for index in 0..count {
                    let sum = Rc::clone(&sum);
                    let data = Bytes::from(vec![1; 4096]);
                    let operation = Operation::Write { offset: index % 1024 * 4096, data, durable: false };
                    let done = move |outcome: Outcome| {
                        assert!(outcome.expect("it can be written").is_none());
                        sum.set(sum.get() + 1);
                    };
                    storage.submit(&place.file, operation, Box::new(done));
                }
                assert_eq!(sum.get(), 0, "nothing ends before its submission returned");
                drain(&*storage).await;
                assert_eq!(sum.get(), count);
            }
        }
    });
}

#[test]
fn a_callback_may_submit_the_next_operation() {
    fn chain(storage: &Rc<dyn Storage>, file: &Rc<File>, log: &Rc<RefCell<Vec<u64>>>, left: u64) {
        let again = (Rc::clone(storage), Rc::clone(file), Rc::clone(log));
        let done = move |outcome: Outcome| {
            outcome.expect("it can be synced");
            again.2.borrow_mut().push(left);
            if left > 0 {
                chain(&again.0, &again.1, &again.2, left - 1);
            }
        };
        storage.submit(file, Operation::Sync, Box::new(done));
    }
    run(async {
        let place = some_image();
        for storage in storages() {
            let log = Rc::default();
            chain(&storage, &place.file, &log, 5);
            drain(&*storage).await;
            assert_eq!(*log.borrow(), [5, 4, 3, 2, 1, 0]);
        }
    });
}

#[test]
fn operations_beyond_a_backing_fail_and_leave_it_as_it_is() {
    run(async {
        for place in places(MEBIBYTE).into_iter().filter(|place| place.file.kind() != Kind::Metadata) {
            for storage in storages() {
                let last = ByteRange::new(place.file.size_bytes() - 512, 512);
                let (pool, beyond) = (BufferPool::new(0), ByteRange::new(last.offset, 1024));
                let data = Bytes::from(vec![1; 1024]);
                let errors = [
                    read(&*storage, &place.file, &pool, beyond).await.map(drop),
                    write(&*storage, &place.file, beyond.offset, data, false).await,
                    zero(&*storage, &place.file, beyond, true).await,
                ];
                for (error, operation) in errors.into_iter().zip(["read", "write", "zero"]) {
                    let error = error.expect_err("the range is beyond the end");
                    assert_eq!((error.operation, error.offset), (operation, beyond.offset));
                    assert_eq!(error.source.kind(), std::io::ErrorKind::InvalidInput);
                }
                let found = read(&*storage, &place.file, &pool, last).await.expect("it can be read");
                assert!(found.iter().all(|byte| *byte == 0));
            }
        }
    });
}

#[test]
fn a_backing_that_was_cut_short_fails_to_read() {
    run(async {
        for storage in storages() {
            let place = some_image();
            let shorter =
                std::fs::OpenOptions::new().write(true).open(place.file.path()).expect("it is there");
            shorter.set_len(MEBIBYTE / 2 + 100).expect("it can be cut");
            let range = ByteRange::new(MEBIBYTE / 2 - 4096, 8192);
            let error =
                read(&*storage, &place.file, &BufferPool::new(0), range).await.expect_err("it is short");
            assert_eq!(error.source.kind(), std::io::ErrorKind::UnexpectedEof);
        }
    });
}

/// Zeroing past the end succeeded, and a write there made the image longer: what was cut off read as zeroes from then
/// on.
#[test]
fn a_backing_that_was_cut_short_takes_nothing_that_would_hide_it() {
    run(async {
        for storage in storages() {
            let place = some_image();
            let shorter =
                std::fs::OpenOptions::new().write(true).open(place.file.path()).expect("it is there");
            shorter.set_len(MEBIBYTE / 2).expect("it can be cut");
            for offset in [0, MEBIBYTE - 4096] {
                let data = Bytes::from(vec![9; 4096]);
                let range = ByteRange::new(offset, 4096);
                for ended in [
                    write(&*storage, &place.file, offset, data, false).await,
                    zero(&*storage, &place.file, range, true).await,
                    zero(&*storage, &place.file, range, false).await,
                ] {
                    let error = ended.expect_err("it is short");
                    assert_eq!(error.source.kind(), std::io::ErrorKind::UnexpectedEof, "{error}");
                }
            }
            let size = std::fs::metadata(place.file.path()).expect("it is there").len();
            assert_eq!(size, MEBIBYTE / 2, "it is no longer than it was");
        }
    });
}

/// FUSE has no word for a durable write: what was acknowledged was in its server's cache.
#[test]
fn a_durable_write_is_synced_where_its_flag_does_nothing() {
    use crate::storage::job::{Job, Step};
    let Place { file, _below, .. } = some_image();
    let file = Rc::try_unwrap(file).expect("nobody else has it").without_durable_writes();
    for (durable, offset, length) in [(true, 0, 4096), (true, 512, 512), (false, 0, 4096)] {
        let data = Bytes::from(vec![9; length]);
        let mut job = Job::new(&file, Operation::Write { offset, data, durable }, &BufferPool::new(0));
        let mut last = None;
        while let Some(step) = job.step() {
            last = Some(step);
            job.ended(Ok(step.length() as usize));
        }
        assert_eq!(last == Some(Step::Sync), durable, "{last:?}");
        job.finish().expect("it is written");
    }
}

#[test]
fn a_metadata_file_reads_as_zeroes_beyond_its_end_and_grows() {
    run(async {
        for storage in storages() {
            let folder = tempfile::tempdir().expect("a folder");
            let path = folder.path().join("map");
            let file = Rc::new(File::create_metadata(&path, 4096).expect("it can be made"));
            let pool = BufferPool::new(0);
            let size = || std::fs::metadata(&path).expect("it is there").len();
            for range in [ByteRange::new(512, 8192), ByteRange::new(MEBIBYTE, 512)] {
                let found = read(&*storage, &file, &pool, range).await.expect("it can be read");
                assert!(found.iter().all(|byte| *byte == 0));
            }
            zero(&*storage, &file, ByteRange::new(2048, 1 << 40), true).await.expect("it can be zeroed");
            assert_eq!(size(), 4096, "zeroing does not make a file longer");
            let data = Bytes::from(vec![9; 4096]);
            write(&*storage, &file, MEBIBYTE, data.clone(), true).await.expect("it can be written");
            assert_eq!(size(), MEBIBYTE + 4096);
            let found =
                read(&*storage, &file, &pool, ByteRange::new(MEBIBYTE, 4096)).await.expect("as before");
            assert_eq!(found[..], data[..]);
            let parts: Vec<Part> = file
                .allocation(ByteRange::new(0, MEBIBYTE + 4096))
                .map(|part| part.expect("it is told"))
                .collect();
            assert_eq!(parts.last(), Some(&Part { length: 4096, hole: false }));
            assert!(parts.len() > 1, "there is a hole before what was written");
            zero(&*storage, &file, ByteRange::new(MEBIBYTE, 4096), true).await.expect("it can be zeroed");
            let hole = Part { length: 8192, hole: true };
            let mut parts = file.allocation(ByteRange::new(MEBIBYTE - 4096, 8192));
            assert_eq!(parts.next().expect("there is one").expect("it is told"), hole);
            assert!(parts.next().is_none());
        }
    });
}

#[test]
fn what_was_submitted_together_enters_the_kernel_together() {
    run(async {
        let Some(ring) = Ring::of_every_kind().into_iter().next() else { return };
        let place = some_image();
        for batch in [1, 64] {
            let before = ring.batches();
            let done = Rc::new(Cell::new(0));
            for index in 0..batch {
                let (done, data) = (Rc::clone(&done), Bytes::from(vec![1; 4096]));
                let operation = Operation::Write { offset: index * 4096, data, durable: false };
                ring.submit(&place.file, operation, Box::new(move |_| done.set(done.get() + 1)));
            }
            assert_eq!(ring.batches(), before, "submitting alone does not enter the kernel");
            tokio::task::yield_now().await;
            assert_eq!(ring.batches(), before + 1, "{batch} operations are one batch");
            drain(&*ring).await;
            assert_eq!(done.get(), batch);
        }
    });
}

#[test]
fn a_runtime_that_ends_leaves_nothing_with_the_kernel() {
    let place = some_image();
    let calls = Rc::new(Cell::new(0));
    for index in 0..storages_count() {
        // The storages go away with the runtime, while the kernel has their buffers.
        run(async {
            let storage = Rc::clone(&storages()[index]);
            for _ in 0..64 {
                let calls = Rc::clone(&calls);
                let data = Bytes::from(vec![1; 65536]);
                let operation = Operation::Write { offset: 0, data, durable: true };
                storage.submit(&place.file, operation, Box::new(move |_| calls.set(calls.get() + 1)));
            }
            tokio::task::yield_now().await;
        });
    }
    assert_eq!(Rc::strong_count(&calls), 1, "each callback was called or dropped");
}

fn storages_count() -> usize {
    run(async { storages().len() })
}

#[test]
fn operations_go_on_when_the_handle_is_gone() {
    run(async {
        let place = some_image();
        for storage in storages() {
            let (sender, ended) = tokio::sync::oneshot::channel();
            let done = move |outcome: Outcome| sender.send(outcome.is_ok()).expect("the test waits");
            storage.submit(&place.file, Operation::Sync, Box::new(done));
            drop(storage);
            assert_eq!(ended.await, Ok(true));
        }
    });
}

#[test]
fn the_thread_pool_can_be_asked_for_and_else_is_explained() {
    run(async {
        let asked_for = open_with(Engine::Threads).expect("threads can be started");
        assert_eq!((asked_for.kind(), asked_for.fallback_reason()), ("threads", None));
        let found = open_with(Engine::Automatic).expect("there is a storage");
        assert_eq!(found.fallback_reason().is_some(), found.kind() == "threads");
    });
}

#[test]
fn a_device_that_became_larger_while_it_was_open_is_noticed() {
    let Some(device) = LoopDevice::new(MEBIBYTE, 512) else { return };
    let file = File::open_backing(&device.path, Access::ReadWrite).expect("it can be opened");
    assert_eq!(file.grown_to(MEBIBYTE), None);
    let image = std::fs::File::options().write(true).open(&device.image).expect("the image");
    image.set_len(2 * MEBIBYTE).expect("another size");
    command("losetup", &["--set-capacity", text(&device.path)]).expect("the device follows");
    assert_eq!((file.grown_to(MEBIBYTE), file.size_bytes()), (Some(2 * MEBIBYTE), MEBIBYTE));
}

/// The kernel says that there is no space left, or that nothing was read.
#[test]
fn a_device_that_became_smaller_while_it_was_open_is_told_with_both_sizes() {
    run(async {
        let Some(device) = LoopDevice::new(2 * MEBIBYTE, 512) else { return };
        let file = Rc::new(File::open_backing(&device.path, Access::ReadWrite).expect("it can be opened"));
        let resize = |size_bytes| {
            let image = std::fs::File::options().write(true).open(&device.image).expect("the image");
            image.set_len(size_bytes).expect("another size");
            command("losetup", &["--set-capacity", text(&device.path)]).expect("the device follows");
        };
        for storage in storages() {
            assert_eq!(file.shrunk_to(), None);
            resize(MEBIBYTE);
            assert_eq!(file.shrunk_to(), Some(MEBIBYTE));
            let (pool, range) = (BufferPool::new(0), ByteRange::new(MEBIBYTE, 4096));
            let data = Bytes::from(vec![1; 4096]);
            let errors = [
                write(&*storage, &file, range.offset, data.clone(), false).await.expect_err("no such place"),
                write(&*storage, &file, range.offset, data.clone(), true).await.expect_err("no such place"),
                zero(&*storage, &file, range, true).await.expect_err("no such place"),
                read(&*storage, &file, &pool, range).await.expect_err("no such place"),
            ];
            for error in errors {
                let words = "the device has 1048576 bytes now, and had 2097152 when it was opened";
                assert!(error.source.to_string().starts_with(words), "{error:?}");
                assert_eq!(error.source.raw_os_error(), None, "it is no lack of space: {error:?}");
            }
            write(&*storage, &file, 0, data, true).await.expect("what is left can be written");
            resize(2 * MEBIBYTE);
        }
    });
}
