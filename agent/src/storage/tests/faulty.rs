//! The storage that fails and stops on request.

use super::{run, storages};
use crate::storage::faults::{Calls, Faults};
use crate::storage::file::File;
use crate::storage::{Operation, Storage, drain, sync, write};
use bytes::Bytes;
use std::cell::Cell;
use std::rc::Rc;

fn metadata() -> (tempfile::TempDir, Rc<File>) {
    let folder = tempfile::tempdir().expect("a folder");
    let file = File::create_metadata(folder.path().join("file"), 4096).expect("it can be made");
    (folder, Rc::new(file))
}

#[test]
fn the_nth_call_of_a_kind_fails_and_the_others_do_not() {
    run(async {
        let (_folder, file) = metadata();
        for storage in storages() {
            let faults = Faults::new(storage);
            faults.fail(Calls::Syncs, 2, libc::EIO);
            let mut errors = Vec::new();
            for round in 0..3 {
                let data = Bytes::from(vec![round; 4096]);
                write(&*faults, &file, 0, data, true).await.expect("writes pass");
                errors.push(sync(&*faults, &file).await.err().and_then(|error| error.source.raw_os_error()));
            }
            assert_eq!(errors, [None, Some(libc::EIO), None]);
            assert_eq!(faults.submitted(), 6);
        }
    });
}

#[test]
fn after_the_stop_nothing_happens_and_nothing_ends() {
    run(async {
        let (_folder, file) = metadata();
        for storage in storages() {
            let faults = Faults::new(storage);
            faults.stop_after(2);
            let ended = Rc::new(Cell::new(0));
            for byte in 1..=4 {
                let (ended, data) = (Rc::clone(&ended), Bytes::from(vec![byte; 512]));
                let operation = Operation::Write { offset: u64::from(byte) * 512, data, durable: false };
                faults.submit(&file, operation, Box::new(move |_| ended.set(ended.get() + 1)));
            }
            faults.stopped().await;
            drain(&*faults).await;
            assert_eq!((ended.get(), Rc::strong_count(&ended)), (2, 3));
            faults.forget_swallowed();
            assert_eq!((ended.get(), Rc::strong_count(&ended)), (2, 1));
            let content = std::fs::read(file.path()).expect("it can be read");
            let first_bytes: Vec<u8> = content.chunks(512).take(6).map(|sector| sector[0]).collect();
            assert_eq!(first_bytes, [0, 1, 2, 0, 0, 0]);
            write(&*storages()[0], &file, 0, Bytes::from(vec![0; 4096]), true)
                .await
                .expect("it can be reset");
        }
    });
}
