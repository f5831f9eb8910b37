//! What goes into the tracker, and what it asks for.

use super::replies::ReplicaLoss;
use crate::disk::activity_log::Record;
use crate::peer;
use crate::ranges::ByteRange;
use crate::rebuild::{Absent, Changes, FetchId, Landing};
pub use crate::units::RequestId;
use crate::units::{Epoch, GenerationId, HostId, Position, Sequence, Time};
use std::time::Duration;

/// What an application asks for. Reads change nothing and don't come here.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Work {
    /// Write a range; with `fua` durably before the reply.
    Write {
        /// Where.
        range: ByteRange,
        /// Whether it must be durable.
        fua: bool,
    },
    /// Make a range read as zeroes.
    Zero {
        /// Where.
        range: ByteRange,
        /// Whether its space may be given back.
        may_unmap: bool,
        /// Whether it must be durable.
        fua: bool,
    },
    /// Make everything durable that was answered before.
    Flush,
}

/// A replica, as actions and what comes back of them name it. A host that was removed and joins again is another one, so
/// that nothing which was begun before comes back to it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Follower {
    /// The host.
    pub host: HostId,
    pub(super) incarnation: u64,
}

/// What the shell must do.
#[derive(Debug)]
pub enum Action {
    /// Write a record to the activity log, durably.
    WriteLog {
        /// Where in the log, in bytes.
        offset: u64,
        /// What.
        record: Box<Record>,
    },
    /// Write to the backing.
    WriteLocal {
        /// Names the write.
        sequence: Sequence,
        /// The request whose data it is part of.
        request: RequestId,
        /// Where.
        range: ByteRange,
        /// For a write of zeroes, whether the space may be given back.
        zero: Option<bool>,
        /// Whether it must be durable when it ends.
        durable: bool,
    },
    /// Make all ended writes durable on the backing.
    SyncLocal,
    /// Draw a generation's name and record it durably at the head of the lineage, by
    /// [`crate::disk::superblock::Superblock::begin_generation`].
    BeginGeneration {
        /// Generations that are not to be pruned (L2).
        kept: Vec<GenerationId>,
        /// The first epoch of it.
        first: Epoch,
        /// The first epoch of it that no replica is told of before [`Action::TellUpTo`].
        end: Epoch,
    },
    /// Record durably up to which epoch of the newest generation replicas may be told (X4), by
    /// [`crate::disk::superblock::Superblock::tell_up_to`].
    TellUpTo {
        /// The first epoch that they may not be told of.
        end: Epoch,
    },
    /// Answer a request. Its data is not needed any more.
    Reply {
        /// The request.
        request: RequestId,
        /// How it ended.
        result: Result<(), WriteFailed>,
    },
    /// Read and digest (BLAKE3) a range that is held for a compare.
    ReadDigest {
        /// Names the hold.
        hold: u64,
        /// What to read.
        range: ByteRange,
    },
    /// Carry out a read that waited for absent blocks: [`super::Tracker::handle_read`].
    ReadLocal {
        /// The read.
        request: RequestId,
    },
    /// Write a part of what was fetched to the backing; then [`super::Tracker::handle_landed`].
    Land {
        /// Names the write.
        landing: u64,
        /// What of it, and where.
        part: Landing,
        /// Whether it reads as zeroes.
        is_zero: bool,
    },
    /// What was fetched is not needed any more.
    DropFetched(FetchId),
    /// Write to the file of absent blocks; then [`super::Tracker::handle_absent_written`].
    WriteAbsent(Changes),
    /// Nothing is absent any more: record durably that this copy is whole, and remove the file; then
    /// [`super::Tracker::handle_filled`].
    Filled,
    /// Something for one peer.
    Peer {
        /// The replica.
        follower: Follower,
        /// What.
        action: peer::Action,
    },
}

/// What a tracker is opened with.
#[derive(Debug)]
pub struct Settings {
    /// The volume's size in bytes.
    pub size_bytes: u64,
    /// The backing's physical sector, in bytes.
    pub sector_bytes: u64,
    /// The volume's generations, newest first.
    pub lineage: Vec<GenerationId>,
    /// How many generations it may hold: two for each peer, and two more, are enough.
    pub lineage_limit: usize,
    /// Where the content stands, as the superblock says once its run has begun.
    pub opened: Position,
    /// The number of the first epoch, by [`crate::disk::superblock::Superblock::next_run`]; durably recorded.
    pub first_epoch: Epoch,
    /// What happens while a replica that writes should wait for is lost.
    pub loss: ReplicaLoss,
    /// When the volume was opened, and for how long a primary keeps its word to a replica that it doesn't hear.
    pub opened_at: Time,
    /// See `opened_at`; [`crate::promise::PATIENCE`].
    pub patience: Duration,
    /// How many extents may be active at once: at least [`super::LEAST_ACTIVE_EXTENTS`], at most
    /// [`crate::disk::activity_log::CAPACITY`].
    pub active_extents: usize,
    /// Whether hosts that were removed may count on nothing being answered without them, by the word of an earlier run.
    pub owes_word: bool,
    /// Where this host was demoted in order and promoted again itself, those that the superblock says had everything then
    /// ([`crate::disk::superblock::Superblock::returned`]).
    pub returned: Option<Vec<HostId>>,
    /// What of this host's own copy is absent, while a rebuild is under way (S4).
    pub absent: Option<Absent>,
}

/// How a write to the backing ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LocalWrite {
    /// It is written, and durable if that was asked for.
    Written,
    /// It is not written, or in part. What was written before is none the worse for it.
    Failed,
    /// It was to be durable and may not be, and neither may what was written before: a failed sync (W5).
    NotDurable,
}

/// The backing failed a write or a sync, or has failed before and was not reopened (W5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the backing failed")]
pub struct WriteFailed;
