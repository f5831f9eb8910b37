//! What the tracker does with what comes late.

use super::replies::ReplicaLoss;
use super::testing::{NOW, answers, host, tracker};
use super::{Action, Follower, Tracker};
use crate::dirty_map::DirtyMap;
use crate::peer::resync::{CopyContent, CopyRead};
use crate::peer::{self, Peer};
use crate::terms::Mode;
use crate::units::{BlockSize, EXTENT_BYTES, VolumeId};
use std::time::Duration;

/// A replica that has just joined, whose map is being written.
fn join(tracker: &mut Tracker) -> Follower {
    let size = BlockSize::default();
    let map = DirtyMap::full(VolumeId([1; 16]), host(1), EXTENT_BYTES, size);
    tracker.add_peer(Peer::new(host(1), map, EXTENT_BYTES, size, 1 << 20, Mode::Async), NOW);
    let mut joined = None;
    while let Some(action) = tracker.poll_action() {
        if let Action::Peer { follower, action: peer::Action::WriteMap(_) } = action {
            joined = Some(follower);
        }
    }
    joined.expect("its map is written")
}

/// A host was removed and joined again while its map was being written and a copy for it was read: the new peer took
/// both for its own.
#[test]
fn what_was_begun_for_a_host_that_was_removed_does_not_reach_it_when_it_has_joined_again() {
    let mut tracker = tracker(Vec::new(), ReplicaLoss::Continue, Duration::ZERO);
    answers(&mut tracker, NOW);
    let first = join(&mut tracker);
    tracker.remove_peer(host(1), NOW);
    let second = join(&mut tracker);
    assert_eq!((first.host, second.host), (host(1), host(1)));
    tracker.handle_map_written(first, true, NOW);
    tracker.handle_map_written(second, true, NOW);
    tracker.handle_copy_read(first, CopyRead(0), CopyContent::Data, NOW);
    let mut dropped = Vec::new();
    while let Some(action) = tracker.poll_action() {
        if let Action::Peer { follower, action: peer::Action::SendCopy { read, header } } = action {
            dropped.push((follower, read, header));
        }
    }
    assert_eq!(dropped, [(first, CopyRead(0), None)]);
}
