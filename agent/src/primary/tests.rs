//! What a failure of the backing means for the volume and for whoever wrote.

use super::*;
use crate::storage::file::Access;
use std::io;

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
    let lost = allocation(&backing, ByteRange::new(1 << 19, 1 << 19));
    assert!(matches!(lost, Err(Errno(libc::EIO))));
}
