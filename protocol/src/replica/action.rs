//! What goes into the replica, and what it asks for.

use super::{SpacePolicy, StateChange};
use crate::dirty_map::DirtyMap;
use crate::disk::activity_log::{self, Recovered};
use crate::disk::superblock::Superblock;
use crate::layers::LayerId;
use crate::ranges::ByteRange;
use crate::terms::DataState;
use crate::units::{HostId, Mark, Position, Session};
use crate::wire::message::Message;
use std::collections::BTreeMap;

/// Names a frame and its payload.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct FrameId(pub u64);

/// What the shell must do.
#[derive(Debug, PartialEq)]
pub enum Action {
    /// Write the frame's payload, or zeroes, to the backing; then [`super::Replica::handle_applied`].
    Apply {
        /// The frame.
        frame: FrameId,
        /// Where.
        range: ByteRange,
        /// For a write of zeroes, whether the space may be given back.
        zero: Option<bool>,
    },
    /// Forget the frame's payload.
    Drop(FrameId),
    /// Make all ended writes durable on the backing; then [`super::Replica::handle_synced`].
    Sync,
    /// Write the marker, durably; then [`super::Replica::handle_marker_written`].
    WriteMarker(Mark),
    /// Record this in the superblock, durably; then [`super::Replica::handle_state_written`].
    WriteState(StateChange),
    /// Write a record to the activity log, durably; then [`super::Replica::handle_log_written`].
    WriteLog {
        /// Where in the log, in bytes.
        offset: u64,
        /// What.
        record: Box<activity_log::Record>,
    },
    /// Make the layer after the superblock's last one, durably, with the marker as its point; then
    /// [`super::Replica::handle_layer_begun`].
    BeginLayer(Position),
    /// Add the content of these ranges to the layer of the gap and to the history, where those lack it, durably; then
    /// [`super::Replica::handle_saved`].
    SavePreImages {
        /// Whole blocks, in order.
        ranges: Vec<ByteRange>,
    },
    /// The layer is needed neither to roll back nor to undo any more.
    EndLayer(LayerId),
    /// Read and digest (BLAKE3) a range; then [`super::Replica::handle_digest`].
    ReadDigest {
        /// The frame that asked.
        frame: FrameId,
        /// What to read.
        range: ByteRange,
    },
    /// Read a range and send it to the primary, in a frame of its own; then [`super::Replica::handle_fetched`].
    SendContent {
        /// The session that it is for.
        session: Session,
        /// What asked for it.
        number: u64,
        /// What to read.
        range: ByteRange,
        /// Whether somebody waits for it.
        is_awaited: bool,
    },
    /// Send a control message to the primary.
    Send(Message),
}

/// The primary broke the protocol; the session must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the primary broke the protocol: {0}")]
pub struct PrimaryMisbehaved(pub &'static str);

/// What is set for a replica while it is open.
#[derive(Clone, Copy, Debug)]
pub struct Settings {
    /// The backing's physical sector, in bytes.
    pub sector_bytes: u32,
    /// How many bytes of live frames may wait in memory.
    pub window_bytes: u64,
    /// What happens when there is no room for pre-images.
    pub space: SpacePolicy,
}

/// What a replica knows durably when it is opened.
#[derive(Debug)]
pub struct Stored {
    /// The superblock.
    pub superblock: Superblock,
    /// The marker.
    pub mark: Mark,
    /// The activity log: its own, or that of the primary that it was.
    pub log: Recovered,
    /// Its maps of other hosts, where they are not void.
    pub maps: BTreeMap<HostId, DirtyMap>,
    /// The ranges with a pre-image in the layer of the gap.
    pub saved: Vec<ByteRange>,
    /// The ranges with a pre-image in the history.
    pub kept: Vec<ByteRange>,
}

/// What a replica reports to status.
#[derive(Clone, PartialEq, Debug)]
pub struct Report {
    /// Whether a session is open.
    pub connected: bool,
    /// What the backing holds.
    pub data: DataState,
    /// Whether a resync waits for room for pre-images.
    pub is_full: bool,
    /// The last durable epoch; in a gap, the rollback point.
    pub position: Position,
    /// Bytes received that are not durable yet.
    pub waiting_bytes: u64,
    /// How far a resync is: bytes written, and bytes expected.
    pub resync: Option<(u64, u64)>,
}
