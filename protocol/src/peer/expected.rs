//! What a resync expects at its cursor, which decides how much its next copy covers.
//!
//! A hole of any size is found with one question, which waits for no disk, and told in one frame; of data a copy takes
//! what it may read. Data in a file with holes may be a lone piece, and many small copies of the hole behind it would be
//! slow. So where data begins after a hole, one copy is made before a hole is asked for again, then two, and twice as
//! many each time, until it is a long stretch of data.

use super::resync::{CopyContent, CopyRead};

/// After a gap of so many copies without a hole, none is asked for until one is found.
const LONGEST_GAP: usize = 32;

/// What a resync expects where it copies next.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Expected {
    /// A long stretch of data.
    Data,
    /// Data, with so many copies `left` before a hole is asked for; they were `copies` altogether.
    Piece { copies: usize, left: usize },
    /// This read asks for a hole, after so many copies. Until it is known, nothing else is picked.
    Asked { read: CopyRead, copies: usize },
}

impl Expected {
    /// A hole was found, or nothing is known: the next copy asks.
    pub(super) const HOLE: Self = Self::Piece { copies: 0, left: 0 };

    /// Data for so many copies.
    fn data(copies: usize) -> Self {
        if copies > LONGEST_GAP { Self::Data } else { Self::Piece { copies, left: copies } }
    }

    /// What is expected now that a read of so many bytes has ended.
    pub(super) fn found(self, read: CopyRead, content: CopyContent, bytes: u64) -> Self {
        match (self, content) {
            (Self::Asked { read: asked, copies }, _) if asked == read => match content {
                CopyContent::Hole(0) => Self::data((copies * 2).max(1)),
                CopyContent::Hole(hole) if hole < bytes => Self::data(1),
                CopyContent::Hole(_) | CopyContent::Zero => Self::HOLE,
                CopyContent::Data | CopyContent::Digest(_) | CopyContent::Failed => Self::Data,
            },
            (Self::Asked { .. }, _) => self,
            (_, CopyContent::Hole(hole)) if hole >= bytes => Self::HOLE,
            _ => self,
        }
    }

    /// Whether a hole is asked for, where enough is dirty.
    pub(super) fn may_be_hole(self) -> bool {
        matches!(self, Self::Piece { left: 0, .. })
    }
}
