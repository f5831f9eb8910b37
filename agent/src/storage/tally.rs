//! How much this host has handed to the kernel to write to a disk, in memory that outlives the process.
//!
//! The kernel counts what is written to a disk, by whomever. Here it is counted what this host hands over, before it does, in
//! one page of a file that is mapped: after a kill the page is as the last instruction left it. So whoever opens the disk
//! next in the same start of the system knows what the kernel's count may be at the most where nobody else wrote (X4).
//!
//! The page, version 1, in the host's byte order, which it never leaves, each field of eight bytes: magic; sectors of 512 bytes that were handed over to be
//! written, and to be discarded; and for each of them what the kernel's count was ahead of that when nothing was under way.
//! Each field is right by itself at each instant. A text follows, which says what the page is of.

use super::job::Step;
use crate::durable::Beside;
use rustix::mm::{MapFlags, ProtFlags, mlock, mmap, munmap};
use std::ffi::c_void;
use std::fs;
use std::io;
use std::path::Path;
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};

const MAGIC: u64 = u64::from_ne_bytes(*b"bmtally1");
const PAGE_BYTES: usize = 4096;
const TEXT: usize = size_of::<Page>();
const SECTOR: u64 = 512;

/// The beginning of the file.
#[repr(C)]
struct Page {
    magic: AtomicU64,
    written: AtomicU64,
    discarded: AtomicU64,
    written_ahead: AtomicI64,
    discarded_ahead: AtomicI64,
}

/// Sectors of 512 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Sectors {
    /// That were written, or zeroed.
    pub written: u64,
    /// That were discarded.
    pub discarded: u64,
}

impl Sectors {
    /// Whether one of the two counts is above the other one's.
    #[must_use]
    pub fn exceed(self, bound: Self) -> bool {
        self.written > bound.written || self.discarded > bound.discarded
    }
}

/// How much was written to one backing, in mapped memory. Any thread may count.
#[derive(Debug)]
pub struct Tally {
    page: NonNull<Page>,
}

// SAFETY: the mapping belongs to this value, and all that is done to it is atomic.
unsafe impl Send for Tally {}
// SAFETY: as above.
unsafe impl Sync for Tally {}

impl Tally {
    /// A new one in the place of what is at `path`, of a disk about which the kernel counts `now`, and nothing is under way.
    /// `of` says what it is of: what was counted for something else is worth nothing.
    ///
    /// # Errors
    /// When the file can't be made or mapped. What was there before is as it was then.
    pub fn begin(path: &Path, of: &str, now: Sectors) -> io::Result<Self> {
        let mut content = Vec::with_capacity(PAGE_BYTES);
        for field in [MAGIC, 0, 0, now.written, now.discarded] {
            content.extend_from_slice(&field.to_ne_bytes());
        }
        content.extend_from_slice(of.as_bytes());
        assert!(content.len() < PAGE_BYTES, "a name is shorter than a page");
        content.resize(PAGE_BYTES, 0);
        let beside = Beside::until_restart(path, &content)?;
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice replaces nothing.
        let start = unsafe { mmap(null_mut(), PAGE_BYTES, protection, MapFlags::SHARED, beside.file(), 0) }?;
        let page = NonNull::new(start.cast::<Page>()).ok_or(io::ErrorKind::OutOfMemory)?;
        let tally = Self { page };
        // SAFETY: this is the mapping. Where its page may not be locked it may be read from the file once more.
        let _ = unsafe { mlock(start, PAGE_BYTES) };
        beside.publish()?;
        Ok(tally)
    }

    /// What the kernel may count at the most of a disk where nobody else wrote, by what a process left at `path` that has
    /// ended; nothing where that is not known, or is of something else.
    #[must_use]
    pub fn left_at(path: &Path, of: &str) -> Option<Sectors> {
        let content = fs::read(path).ok()?;
        let text = content.get(TEXT..)?;
        let field = |place: usize| Some(u64::from_ne_bytes(*content.get(8 * place..)?.first_chunk()?));
        let is_of_it =
            text.strip_prefix(of.as_bytes()).is_some_and(|rest| rest.iter().all(|byte| *byte == 0));
        if field(0)? != MAGIC || !is_of_it {
            return None;
        }
        let bound = |count: u64, ahead: u64| count.wrapping_add(ahead);
        Some(Sectors { written: bound(field(1)?, field(3)?), discarded: bound(field(2)?, field(4)?) })
    }

    /// What the kernel may count at the most now where nobody else wrote.
    #[must_use]
    pub fn bound(&self) -> Sectors {
        let page = self.page();
        let bound = |count: &AtomicU64, ahead: &AtomicI64| {
            count.load(Ordering::Acquire).wrapping_add_signed(ahead.load(Ordering::Acquire))
        };
        Sectors {
            written: bound(&page.written, &page.written_ahead),
            discarded: bound(&page.discarded, &page.discarded_ahead),
        }
    }

    /// The kernel counts `now`, and nothing is under way.
    pub fn settle(&self, now: Sectors) {
        let page = self.page();
        let settle = |count: &AtomicU64, ahead: &AtomicI64, now: u64| {
            ahead.store(now.wrapping_sub(count.load(Ordering::Acquire)).cast_signed(), Ordering::Release);
        };
        settle(&page.written, &page.written_ahead, now.written);
        settle(&page.discarded, &page.discarded_ahead, now.discarded);
    }

    /// A step is handed to the kernel.
    pub(super) fn count(&self, step: &Step) {
        let sectors = step.length().div_ceil(SECTOR);
        let page = self.page();
        match step {
            Step::Read { .. } | Step::Sync => {}
            Step::Write { .. } => drop(page.written.fetch_add(sectors, Ordering::AcqRel)),
            Step::Fallocate { .. } => {
                // A disk that refuses to clear counts it, and again when zeroes are written in its place.
                page.written.fetch_add(2 * sectors, Ordering::AcqRel);
                page.discarded.fetch_add(sectors, Ordering::AcqRel);
            }
        }
    }

    fn page(&self) -> &Page {
        // SAFETY: it is mapped for as long as this value lives, aligned as pages are, and used by atomics alone.
        unsafe { self.page.as_ref() }
    }
}

impl Drop for Tally {
    fn drop(&mut self) {
        // SAFETY: mapped in `begin` with this length, and nothing borrows it any more.
        let unmapped = unsafe { munmap(self.page.as_ptr().cast::<c_void>(), PAGE_BYTES) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockmirror_protocol::ranges::ByteRange;
    use std::ptr::null;

    const OF: &str = "boot 7";

    fn sectors(written: u64, discarded: u64) -> Sectors {
        Sectors { written, discarded }
    }

    fn write(length: usize) -> Step {
        Step::Write { offset: 0, start: null(), length, durable: false }
    }

    #[test]
    fn what_was_handed_over_is_known_after_the_process_has_ended() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("data.writes");
        let tally = Tally::begin(&path, OF, sectors(1000, 10)).expect("a tally");
        let left = || Tally::left_at(&path, OF);
        assert_eq!(left(), Some(sectors(1000, 10)));
        tally.count(&write(4096));
        tally.count(&write(513));
        tally.count(&Step::Sync);
        tally.count(&Step::Read { offset: 0, start: null_mut(), length: 512 });
        assert_eq!((left(), tally.bound()), (Some(sectors(1010, 10)), sectors(1010, 10)));
        tally.count(&Step::Fallocate { mode: 0, range: ByteRange::new(0, 1024) });
        assert_eq!(left(), Some(sectors(1014, 12)));
        // Some of it never reached the disk.
        tally.settle(sectors(1008, 10));
        tally.count(&write(512));
        assert_eq!((left(), tally.bound()), (Some(sectors(1009, 10)), sectors(1009, 10)));
        drop(tally);
        assert_eq!(left(), Some(sectors(1009, 10)));
        assert!(sectors(1010, 10).exceed(sectors(1009, 10)) && sectors(0, 11).exceed(sectors(1009, 10)));
        assert!(!sectors(1009, 10).exceed(sectors(1009, 10)));
    }

    #[test]
    fn what_is_of_something_else_or_no_tally_is_not_believed() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("data.writes");
        assert_eq!(Tally::left_at(&path, OF), None);
        drop(Tally::begin(&path, OF, sectors(1, 0)).expect("a tally"));
        for other in ["boot", "boot 71", "", "another"] {
            assert_eq!(Tally::left_at(&path, other), None, "{other}");
        }
        // The bytes of version 1.
        let mut content = fs::read(&path).expect("the page");
        let mut version_1 = b"bmtally1".to_vec();
        for field in [0_u64, 0, 1, 0] {
            version_1.extend_from_slice(&field.to_ne_bytes());
        }
        version_1.extend_from_slice(b"boot 7\0");
        assert_eq!(content[..version_1.len()], version_1);
        content[7] = b'2';
        fs::write(&path, &content).expect("a page of a later version");
        assert_eq!(Tally::left_at(&path, OF), None);
        fs::write(&path, &content[..20]).expect("a short page");
        assert_eq!(Tally::left_at(&path, OF), None);
    }
}
