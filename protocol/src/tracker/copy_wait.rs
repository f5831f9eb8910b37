//! Writers that wait for a copy, so that a resync ends (R2).
//!
//! A block that is rewritten faster than it can be copied stays dirty for ever: each copy is old before it is durable.
//! When few blocks remain and have for a while, writes to those that are dirty wait until the copy is durable on the
//! replica, each for a bounded time; then they are streamed. Writes to other blocks go on.

use super::Tracker;
use super::pipeline::{Piece, Wait};
use crate::peer::Peer;
use crate::units::{HostId, Time};
use std::collections::BTreeMap;
use std::time::Duration;

/// How long a write waits for a copy at most.
const PATIENCE: Duration = Duration::from_millis(200);

impl Tracker {
    /// Whether a write must wait for a copy of what it overwrites.
    pub(super) fn wait_for_copy(&mut self, piece: Piece, now: Time) -> bool {
        let waits = !self.closing && is_being_copied(&self.peers, &piece, now);
        if waits {
            self.pipeline.wait(piece, Wait::Copy(now.after(PATIENCE)));
        }
        waits
    }

    /// Writes whose copies are durable, or that have waited for long enough, go on.
    pub(super) fn end_waits(&mut self, now: Time) {
        let (peers, closing) = (&self.peers, self.closing);
        let goes_on =
            |piece: &Piece, until: Time| now >= until || closing || !is_being_copied(peers, piece, now);
        for piece in self.pipeline.take_from_copies(goes_on) {
            self.sequence(piece, now);
        }
    }
}

fn is_being_copied(peers: &BTreeMap<HostId, Peer>, piece: &Piece, now: Time) -> bool {
    peers.values().any(|peer| peer.wants_quiet(piece.range, now))
}
