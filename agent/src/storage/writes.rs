//! Whether a backing is just being written by this host, for whoever wants to know whether somebody else does.

use super::job::Step;
use super::{Operation, Tally};
use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// Counts the writes of one open file. The first one after a quiet time leaves a mark in another file before it begins.
#[derive(Debug)]
pub struct Writes {
    begun: AtomicU64,
    under_way: AtomicU64,
    is_quiet: AtomicBool,
    note: fs::File,
    mark: &'static [u8],
    /// How much of it there is, where that is wanted.
    tally: Option<Tally>,
}

/// A write under way.
#[derive(Debug)]
pub(super) struct Writing(Arc<Writes>);

impl Writes {
    /// Of a file that nothing was written to yet; `mark` is written at the beginning of `note`.
    pub(super) fn new(note: fs::File, mark: &'static [u8], tally: Option<Tally>) -> Self {
        let (begun, under_way) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { begun, under_way, is_quiet: AtomicBool::new(false), note, mark, tally }
    }

    /// How much of it there is, where that is counted.
    #[must_use]
    pub fn tally(&self) -> Option<&Tally> {
        self.tally.as_ref()
    }

    pub(super) fn begin(self: &Arc<Self>, operation: &Operation) -> Option<Writing> {
        if !matches!(operation, Operation::Write { .. } | Operation::Zero { .. }) {
            return None;
        }
        if self.is_quiet.swap(false, Ordering::AcqRel) {
            // It is not synced: it is for whoever comes after a kill. Without it, that one finds too much changed.
            let _ = self.note.write_all_at(self.mark, 0);
        }
        self.begun.fetch_add(1, Ordering::AcqRel);
        self.under_way.fetch_add(1, Ordering::AcqRel);
        Some(Writing(self.clone()))
    }

    /// How many writes have begun so far.
    #[must_use]
    pub fn begun(&self) -> u64 {
        self.begun.load(Ordering::Acquire)
    }

    /// Whether none is under way.
    #[must_use]
    pub fn is_idle(&self) -> bool {
        self.under_way.load(Ordering::Acquire) == 0
    }

    /// Whether none has begun since [`Writes::become_quiet`].
    #[must_use]
    pub fn is_quiet(&self) -> bool {
        self.is_quiet.load(Ordering::Acquire)
    }

    /// The next write leaves the mark. For the thread that submits them, while none is under way.
    pub fn become_quiet(&self) {
        self.is_quiet.store(true, Ordering::Release);
    }
}

impl Writing {
    /// A step of it is handed to the kernel.
    pub(super) fn count(&self, step: &Step) {
        if let Some(tally) = &self.0.tally {
            tally.count(step);
        }
    }
}

impl Drop for Writing {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(1, Ordering::AcqRel);
    }
}
