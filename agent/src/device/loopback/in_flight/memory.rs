//! The table's memory: a file without a name that is mapped here, and kept by whoever has its descriptor.
//!
//! What the words of a slot mean to another process is decided by the order in which they are stored. A process that
//! ends leaves all stores that it made, and none that it did not.

use super::TakeOverError;
use super::layout::{
    Header, PLACE_AT, Place, SEQUENCE_AT, SESSION_AT, SLOT_BYTES, SLOTS_AT, STAGE_AT, Stage,
};
use crate::device::loopback::kernel::{Head, Kept};
use rustix::fs::{MemfdFlags, Mode, OFlags, fstat, ftruncate, memfd_create, openat};
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};
use std::ffi::c_void;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::ptr::{NonNull, null_mut};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use zerocopy::{FromBytes, IntoBytes};

/// The mapped memory of a table, which a later process maps as well.
pub(super) struct Memory {
    file: OwnedFd,
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the mapping belongs to this value, and any thread may use and end it.
unsafe impl Send for Memory {}
// SAFETY: shared references give atomics, copies, and pointers whose users say why they may.
unsafe impl Sync for Memory {}

/// The words of a slot besides its head.
pub(super) struct SlotState {
    pub(super) sequence: u64,
    pub(super) stage: u32,
    pub(super) place: u32,
}

impl Memory {
    /// New memory, all of it zero.
    pub(super) fn create(bytes: usize) -> io::Result<Self> {
        let file = match unswappable() {
            Ok(file) => file,
            Err(error) => {
                tracing::debug!(%error, "the kernel has no memory that can't be swapped out; this can, when unused");
                memfd_create("blockmirror", MemfdFlags::CLOEXEC)?
            }
        };
        ftruncate(&file, bytes as u64)?;
        Self::map(file, bytes)
    }

    /// The memory of an earlier process.
    pub(super) fn open(file: OwnedFd, bytes: usize) -> Result<Self, TakeOverError> {
        let found = fstat(&file).map_err(io::Error::from)?.st_size;
        if found < SESSION_AT as i64 {
            return Err(TakeOverError::Foreign);
        }
        // A version with another size is told by its header, which is there.
        let mapped = usize::try_from(found).unwrap_or(bytes).min(bytes);
        let memory = Self::map(file, mapped)?;
        if mapped < bytes {
            let newer = memory.read_header()?.check_version();
            return Err(newer.err().unwrap_or(TakeOverError::Damaged("its size")));
        }
        Ok(memory)
    }

    fn map(file: OwnedFd, bytes: usize) -> io::Result<Self> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at a place of the kernel's choice replaces nothing.
        let start = unsafe { mmap(null_mut(), bytes, protection, MapFlags::SHARED, &file, 0) }?;
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::from_raw_os_error(libc::ENOMEM))?;
        Ok(Self { file, start, bytes })
    }

    pub(super) fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// A pointer into the memory.
    pub(super) fn at(&self, offset: usize) -> NonNull<u8> {
        assert!(offset < self.bytes, "it is within the table");
        // SAFETY: it lies within the mapping.
        unsafe { self.start.add(offset) }
    }

    fn word(&self, offset: usize) -> &AtomicU32 {
        // SAFETY: the word lies within the mapping, which lives as long as `self`; every offset is a multiple of four.
        unsafe { AtomicU32::from_ptr(self.at(offset).as_ptr().cast()) }
    }

    fn long_word(&self, offset: usize) -> &AtomicU64 {
        // SAFETY: as above; every offset is a multiple of eight.
        unsafe { AtomicU64::from_ptr(self.at(offset).as_ptr().cast()) }
    }

    pub(super) fn write_header(&self, header: Header) {
        let bytes = header.as_bytes();
        // SAFETY: the header lies within the mapping, which nobody else has yet.
        unsafe { self.at(0).copy_from_nonoverlapping(NonNull::from(bytes).cast(), bytes.len()) };
    }

    pub(super) fn read_header(&self) -> Result<Header, TakeOverError> {
        let mut bytes = [0u8; size_of::<Header>()];
        // SAFETY: the header lies within the mapping, and nobody writes to it any more.
        unsafe { NonNull::from(&mut bytes).cast().copy_from_nonoverlapping(self.at(0), bytes.len()) };
        Header::read_from_bytes(&bytes).map_err(|_| TakeOverError::Foreign)
    }

    pub(super) fn session(&self) -> Option<Kept> {
        let word = |index: usize| self.word(SESSION_AT + 4 * index).load(Ordering::Acquire);
        let minor = word(0);
        (minor != 0).then(|| Kept { minor, features: word(1), max_write: word(2) })
    }

    pub(super) fn set_session(&self, kept: Kept) {
        let word = |index: usize| self.word(SESSION_AT + 4 * index);
        word(1).store(kept.features, Ordering::Release);
        word(2).store(kept.max_write, Ordering::Release);
        // The last one makes it count.
        word(0).store(kept.minor, Ordering::Release);
    }

    fn slot(slot: usize) -> usize {
        SLOTS_AT + slot * SLOT_BYTES
    }

    /// The request's length, its head's first word; 0 where there is none.
    pub(super) fn length(&self, slot: usize) -> u32 {
        self.word(Self::slot(slot)).load(Ordering::Acquire)
    }

    pub(super) fn state(&self, slot: usize) -> SlotState {
        let at = Self::slot(slot);
        SlotState {
            sequence: self.long_word(at + SEQUENCE_AT).load(Ordering::Acquire),
            stage: self.word(at + STAGE_AT).load(Ordering::Acquire),
            place: self.word(at + PLACE_AT).load(Ordering::Acquire),
        }
    }

    /// Makes a free slot ready for the kernel.
    pub(super) fn prepare(&self, slot: usize, sequence: u64, place: Place) {
        let at = Self::slot(slot);
        // SAFETY: the slot is free: nobody reads its head.
        unsafe { self.at(at).write_bytes(0, size_of::<Head>()) };
        self.long_word(at + SEQUENCE_AT).store(sequence, Ordering::Release);
        self.word(at + STAGE_AT).store(Stage::Waiting as u32, Ordering::Release);
        self.word(at + PLACE_AT).store(place.number(), Ordering::Release);
    }

    pub(super) fn set_stage(&self, slot: usize, stage: Stage) {
        self.word(Self::slot(slot) + STAGE_AT).store(stage as u32, Ordering::Release);
    }

    pub(super) fn set_place(&self, slot: usize, place: Place) {
        self.word(Self::slot(slot) + PLACE_AT).store(place.number(), Ordering::Release);
    }

    /// From here on the slot holds no request.
    pub(super) fn clear(&self, slot: usize) {
        self.word(Self::slot(slot)).store(0, Ordering::Release);
    }

    pub(super) fn head(&self, slot: usize) -> Head {
        let mut head = [0; size_of::<Head>()];
        // SAFETY: the head lies within the mapping, and the kernel has ended writing to it.
        unsafe {
            NonNull::from(&mut head).cast().copy_from_nonoverlapping(self.at(Self::slot(slot)), head.len())
        };
        head
    }

    /// The head as the kernel is to fill it.
    ///
    /// # Safety
    /// Nothing else reads or writes it while the slice lives.
    #[expect(clippy::mut_from_ref, reason = "the memory is shared; the caller says why nobody else uses it")]
    pub(super) unsafe fn head_mut(&self, slot: usize) -> &mut [u8] {
        // SAFETY: it lies within the mapping, and is the caller's alone.
        unsafe { std::slice::from_raw_parts_mut(self.at(Self::slot(slot)).as_ptr(), size_of::<Head>()) }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped in `map` with this length, and whoever uses it has a share of this value.
        let unmapped = unsafe { munmap(self.start.as_ptr().cast::<c_void>(), self.bytes) };
        debug_assert!(unmapped.is_ok(), "{unmapped:?}");
    }
}

/// A file on a file system of its own in memory that is never swapped out (tmpfs(5), `noswap`, Linux 6.4).
fn unswappable() -> io::Result<OwnedFd> {
    let system = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC)?;
    fsconfig_set_flag(&system, "noswap")?;
    // No bound but the table's own.
    fsconfig_set_string(&system, "size", "0")?;
    fsconfig_set_string(&system, "mode", "0700")?;
    fsconfig_create(&system)?;
    let mount = fsmount(&system, FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty())?;
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(openat(&mount, ".", flags, Mode::RUSR | Mode::WUSR)?)
}
