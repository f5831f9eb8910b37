//! Bugs on purpose, for the simulation to find: what it never finds, it does not check.
//!
//! Without the feature `planted` none exists: [`planted`] is a constant. With it, one bug at a time is planted for the
//! calling thread.

#[cfg(feature = "planted")]
use std::cell::Cell;

/// A mistake that breaks a rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// A bit is cleared when its copy is sent, not when the replica has it durably (D2).
    ClearOnSend,
    /// A replica starts an epoch before the one before it is durable (W3).
    NextEpochEarly,
    /// A write does not wait for its extents' record in the activity log (W2).
    SkipLog,
    /// An extent leaves the activity log before its writes are durable here (D1).
    ReleaseExtentEarly,
    /// The window's blocks are not put into the map when the link drops (W7, D3).
    ForgetWindow,
    /// Blocks are read for a copy while a write to them is under way here (D2).
    CopyWhileWriting,
    /// A frame of an older session is written (R1).
    OldFrameLands,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 7] = [
        Self::ClearOnSend,
        Self::NextEpochEarly,
        Self::SkipLog,
        Self::ReleaseExtentEarly,
        Self::ForgetWindow,
        Self::CopyWhileWriting,
        Self::OldFrameLands,
    ];
}

#[cfg(feature = "planted")]
thread_local! {
    static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
}

/// Plants a bug for this thread, in the place of the one before.
#[cfg(feature = "planted")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether this bug is planted.
#[cfg(feature = "planted")]
pub(crate) fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Whether this bug is planted: never, without the feature.
#[cfg(not(feature = "planted"))]
pub(crate) const fn planted(_: Bug) -> bool {
    false
}
