//! A tracker whose disk and maps do at once what they are asked for, for unit tests.

use super::replies::ReplicaLoss;
use super::{Action, LEAST_ACTIVE_EXTENTS, LocalWrite, RequestId, Settings, Tracker, Work};
use crate::dirty_map::DirtyMap;
use crate::disk::activity_log::Recovered;
use crate::disk::dirty_map::Base;
use crate::peer::{self, Peer};
use crate::ranges::ByteRange;
use crate::terms::Mode;
use crate::units::{BlockSize, CopyId, EXTENT_BYTES, Epoch, GenerationId, HostId, Position, Time, VolumeId};
use std::collections::BTreeSet;
use std::time::Duration;

pub(super) const NOW: Time = Time(Duration::from_secs(1));

pub(crate) fn host(number: u8) -> HostId {
    HostId([number; 32])
}

/// A replica that had everything when its primary ended.
pub(crate) fn following(number: u8, mode: Mode) -> Peer {
    let size = BlockSize::default();
    let base = Base { copy: CopyId([number; 16]), generation: GenerationId([1; 16]), adopted: 0 };
    let map = DirtyMap::full(VolumeId([1; 16]), host(number), EXTENT_BYTES, size).clean(base);
    Peer::new(host(number), map, EXTENT_BYTES, size, 1 << 20, mode)
}

/// A replica whose map says that it may lack anything.
pub(crate) fn lagging(number: u8) -> Peer {
    let size = BlockSize::default();
    let map = DirtyMap::full(VolumeId([1; 16]), host(number), EXTENT_BYTES, size);
    Peer::new(host(number), map, EXTENT_BYTES, size, 1 << 20, Mode::Async)
}

/// What a primary is opened with.
pub(super) fn settings(loss: ReplicaLoss, patience: Duration) -> Settings {
    Settings {
        size_bytes: EXTENT_BYTES,
        sector_bytes: 512,
        lineage: vec![GenerationId([1; 16])],
        lineage_limit: 8,
        opened: Position::default(),
        first_epoch: Epoch(1),
        loss,
        opened_at: NOW,
        patience,
        active_extents: LEAST_ACTIVE_EXTENTS,
        owes_word: false,
        returned: None,
        absent: None,
    }
}

/// A primary that has just started.
pub(crate) fn tracker(peers: Vec<Peer>, loss: ReplicaLoss, patience: Duration) -> Tracker {
    let log = Recovered::Active { serial: 0, extents: BTreeSet::new() };
    Tracker::new(settings(loss, patience), &log, peers)
}

/// Carries out all that the tracker asks for; the answers that it gave.
pub(super) fn answers(tracker: &mut Tracker, now: Time) -> Vec<(RequestId, bool)> {
    let mut answers = Vec::new();
    while let Some(action) = tracker.poll_action() {
        answers.extend(carry_out(tracker, action, now));
    }
    answers
}

/// Carries an action out; the answer, where it is one.
pub(super) fn carry_out(tracker: &mut Tracker, action: Action, now: Time) -> Option<(RequestId, bool)> {
    match action {
        Action::Reply { request, result } => return Some((request, result.is_ok())),
        Action::WriteLocal { sequence, .. } => {
            tracker.handle_local_written(sequence, LocalWrite::Written, now);
        }
        Action::SyncLocal => tracker.handle_synced(true, now),
        Action::BeginGeneration { .. } => tracker.handle_generation(Some(GenerationId([2; 16])), now),
        Action::TellUpTo { .. } => tracker.handle_told(true, now),
        Action::WriteLog { .. } => tracker.handle_log_written(true, now),
        Action::Land { landing, .. } => tracker.handle_landed(landing, true, now),
        Action::WriteAbsent(_) => tracker.handle_absent_written(true, now),
        Action::Filled => tracker.handle_filled(true, now),
        Action::Peer { follower, action: peer::Action::WriteMap(_) } => {
            tracker.handle_map_written(follower, true, now);
        }
        Action::ReadDigest { .. }
        | Action::ReadLocal { .. }
        | Action::DropFetched(_)
        | Action::Peer { .. } => {}
    }
    None
}

/// Asks for a write of one block, and gives the answers that come at once.
pub(super) fn write(tracker: &mut Tracker, id: u64, now: Time) -> Vec<(RequestId, bool)> {
    let work = Work::Write { range: ByteRange::new(0, 4096), fua: false };
    tracker.handle_request(RequestId(id), work, now);
    answers(tracker, now)
}
