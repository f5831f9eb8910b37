//! What a peer tells of itself: where the link is, what the replica has, how much is missing.
//!
//! Nothing here says "in sync" over a map that is not empty or an acknowledgement that is late (D4).

use super::{ACKNOWLEDGEMENT_DEADLINE, Peer, Phase, State, Verify};
use crate::peer::resync::Progress;
use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use crate::units::{Epoch, Time};
use std::time::Duration;

/// What a peer reports to status.
#[derive(Clone, PartialEq, Debug)]
pub struct Report {
    /// Where the link is.
    pub connection: Connection,
    /// What the replica has.
    pub state: ReplicaState,
    /// Bytes that may differ on the replica: the map, and what is sent but not acknowledged.
    pub out_of_sync_bytes: u64,
    /// Bytes in the map alone.
    pub map_bytes: u64,
    /// Bytes that are sent but not acknowledged as durable.
    pub lag_bytes: u64,
    /// How old the oldest of those is.
    pub lag: Duration,
    /// The last epoch of this session that is durable on the replica.
    pub durable: Epoch,
    /// When the replica was linked or the link was lost; attempts in between don't count.
    pub since: Time,
    /// How far a resync is, if one is under way.
    pub resync: Option<Progress>,
    /// How far a compare is, in bytes done and in total, if one is under way.
    pub compare: Option<(u64, u64)>,
    /// What can't be read here and so can't be copied, whole blocks; known while the replica is linked.
    pub unreadable: Vec<ByteRange>,
    /// Whether there is more of that than is remembered, so that the copying waits.
    pub more_unreadable: bool,
    /// Whether the map's file could not be written the last time.
    pub map_failed: bool,
    /// How many acknowledgements came, over all sessions.
    pub heard: u64,
    /// Whether the replica had gone back behind what was known to be durable there, and was not in sync since (X4).
    pub went_back: bool,
    /// Whether the replica was promised for ever that nothing is answered without it, or without so many others, and has not
    /// heard otherwise (W4).
    pub is_promised: bool,
}

/// Where the link to a replica is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Connection {
    /// No link.
    Disconnected,
    /// Shaking hands.
    Connecting,
    /// A session is open.
    Connected,
}

/// What a replica has, as far as the primary knows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplicaState {
    /// Everything that was acknowledged; nothing may differ.
    InSync,
    /// Not everything, and it is being copied.
    Resyncing,
    /// Connected, but acknowledgements are late or writes come faster than they can be sent.
    Behind,
    /// Not everything, and nothing is being done about it.
    OutOfSync,
}

impl Peer {
    /// Bytes that may differ on the replica: the map, and what is sent but not acknowledged.
    pub(super) fn out_of_sync_bytes(&self) -> u64 {
        let map_bytes = self.marks.map.dirty_blocks() * self.block_size.bytes();
        let unmarked_bytes = match &self.state {
            State::Linked(link) if !link.spilled => link.window.bytes(),
            _ => 0,
        };
        (map_bytes + unmarked_bytes).min(self.size_bytes)
    }

    /// The peer's numbers, for status.
    #[must_use]
    pub fn report(&self, now: Time) -> Report {
        let map_bytes = (self.marks.map.dirty_blocks() * self.block_size.bytes()).min(self.size_bytes);
        let mut report = Report {
            connection: Connection::Disconnected,
            state: ReplicaState::OutOfSync,
            out_of_sync_bytes: self.out_of_sync_bytes(),
            map_bytes,
            lag_bytes: 0,
            lag: Duration::ZERO,
            durable: Epoch(0),
            since: self.since,
            resync: None,
            compare: None,
            unreadable: Vec::new(),
            more_unreadable: false,
            map_failed: self.marks.has_failed(),
            heard: self.heard,
            went_back: self.went_back,
            is_promised: self.word.is_for_ever(),
        };
        match &self.state {
            State::Away => report,
            State::Greeting(_) => Report { connection: Connection::Connecting, ..report },
            State::Linked(link) => {
                report.connection = Connection::Connected;
                report.durable = link.durable;
                report.lag_bytes = link.window.bytes();
                report.lag = link.window.oldest().map_or(Duration::ZERO, |(_, sent)| now.since(sent));
                report.compare = link.verify.as_ref().map(Verify::progress);
                let (unreadable, is_all) = link.resync.unreadable();
                (report.unreadable, report.more_unreadable) = (unreadable, !is_all);
                let is_late = report.lag > ACKNOWLEDGEMENT_DEADLINE && !planted(Bug::OverlookLag);
                report.state = match link.phase() {
                    Phase::InSync if is_late => ReplicaState::Behind,
                    Phase::InSync => ReplicaState::InSync,
                    Phase::Draining => ReplicaState::Behind,
                    Phase::Beginning | Phase::Resyncing | Phase::Committing { .. } => ReplicaState::Resyncing,
                };
                if link.phase() != Phase::InSync {
                    report.resync = Some(link.resync.progress(&self.marks.map, now));
                }
                report
            }
        }
    }
}
