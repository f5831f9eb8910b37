//! Writers that wait for a copy, so that a resync ends (R2).
//!
//! A block that is rewritten faster than it can be copied stays dirty for ever: each copy is old before it is durable.
//! When few blocks remain and have for a while, writes to those that are dirty wait until the copy is durable on the
//! replica, each for a bounded time; then they are streamed. Writes to other blocks go on.

use super::{Piece, Tracker};
use crate::session::Session;
use crate::units::Time;
use std::time::Duration;

/// How long a write waits for a copy at most.
const PATIENCE: Duration = Duration::from_millis(200);

/// See the module.
#[derive(Debug)]
pub(super) struct Waiting {
    piece: Piece,
    until: Time,
}

impl Tracker {
    /// Whether a write must wait for a copy of what it overwrites.
    pub(super) fn wait_for_copy(&mut self, piece: Piece, now: Time) -> bool {
        let waits = !self.closing && self.is_being_copied(&piece, now);
        if waits {
            self.waiting.push(Waiting { piece, until: now.after(PATIENCE) });
        }
        waits
    }

    /// Writes whose copies are durable, or that have waited for long enough, go on.
    pub(super) fn end_waits(&mut self, now: Time) {
        if self.waiting.is_empty() {
            return;
        }
        for waiting in std::mem::take(&mut self.waiting) {
            let is_over = now >= waiting.until || self.closing;
            if is_over || !self.is_being_copied(&waiting.piece, now) {
                self.sequence(waiting.piece, now);
            } else {
                self.waiting.push(waiting);
            }
        }
    }

    /// When a write has waited for long enough.
    pub(super) fn wait_timeout(&self) -> Option<Time> {
        self.waiting.iter().map(|waiting| waiting.until).min()
    }

    /// Gives up the writes that wait, which nobody will carry out any more.
    pub(super) fn take_waiting(&mut self) -> Vec<Piece> {
        std::mem::take(&mut self.waiting).into_iter().map(|waiting| waiting.piece).collect()
    }

    fn is_being_copied(&self, piece: &Piece, now: Time) -> bool {
        self.sessions.values().any(|session: &Session| session.wants_quiet(piece.range, now))
    }
}
