//! When a generation begins (L1).
//!
//! A generation is begun by the first write after anything that could have let another host go on alone: the volume
//! was opened, or a replica left the stream. Its name is durable here before that write begins, and goes to every
//! replica that follows before the write does. A volume that sees no writes stays in its generation, so that hosts
//! which saw none never diverge.
//!
//! Two things besides writes need one: a reply that is given without a replica whose mode requires it, and the commit
//! of a replica while another one may have the same newest generation and yet lack some of it. Else those two could be
//! taken for equals when the primary is gone (D5).

use super::pipeline::{Piece, Wait};
use super::told::Told;
use super::{Action, Peer, Tracker};
use crate::lineage;
use crate::planted::{Bug, planted};
use crate::units::{Epoch, GenerationId, Time};

/// Where the next generation is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    /// The newest one goes on.
    NotWanted,
    /// The volume was opened: the first write begins one.
    Opened,
    /// A replica left the stream: what is done without it begins one.
    Left,
}

/// The volume's generations, and what the next one waits for.
#[derive(Debug)]
pub(super) struct Generations {
    pub(super) lineage: Vec<GenerationId>,
    limit: usize,
    pub(super) next: Next,
    pub(super) beginning: bool,
    /// The first epoch of the one that is beginning.
    first: Epoch,
    /// How many of the newest ones were begun since anything was answered.
    pub(super) unanswered: usize,
}

impl Generations {
    pub(super) fn new(lineage: Vec<GenerationId>, limit: usize) -> Self {
        let next = if planted(Bug::KeepGeneration) { Next::NotWanted } else { Next::Opened };
        Self { lineage, limit, next, beginning: false, first: Epoch(0), unanswered: 0 }
    }

    pub(super) fn newest(&self) -> GenerationId {
        self.lineage.first().copied().unwrap_or_default()
    }
}

impl Tracker {
    /// A generation that [`Action::BeginGeneration`] asked for is durable at the head of the lineage, or could not be
    /// recorded.
    pub fn handle_generation(&mut self, generation: Option<GenerationId>, now: Time) {
        assert!(self.generations.beginning, "a generation was asked for");
        self.generations.beginning = false;
        let held = self.pipeline.take_from_generation();
        match generation {
            Some(generation) => {
                self.generations.next = Next::NotWanted;
                self.generations.unanswered += 1;
                self.told.begin(self.generations.first, now);
                let (kept, limit, epoch) =
                    (self.kept_generations(), self.generations.limit, self.epoch.number);
                lineage::begin(&mut self.generations.lineage, generation, &kept, limit);
                for peer in self.peers.values_mut() {
                    // One that left meanwhile was told nothing of the generation, and is not a part of it.
                    peer.take_left();
                    peer.handle_generation(generation, epoch);
                }
                self.collect();
                for piece in held {
                    self.begin_if_active(piece, now);
                }
            }
            None => {
                for piece in held {
                    self.give_piece_up(piece, now);
                }
                self.fail_backing(now);
            }
        }
        self.drive(now);
    }

    /// Whether a write must wait for a generation; the first one that does begins it.
    pub(super) fn hold_for_generation(&mut self, piece: Piece) -> bool {
        self.note_left();
        if self.generations.next == Next::NotWanted && !self.generations.beginning {
            return false;
        }
        self.pipeline.wait(piece, Wait::Generation);
        self.begin_generation();
        true
    }

    /// Asks for a generation, unless one is just beginning. The epoch closes, so that none is in two.
    pub(super) fn begin_generation(&mut self) {
        if !std::mem::replace(&mut self.generations.beginning, true) {
            self.close_epoch();
            let (kept, first) = (self.kept_generations(), self.epoch.number);
            self.generations.first = first;
            self.actions.push_back(Action::BeginGeneration { kept, first, end: Told::first_end(first) });
        }
    }

    /// Replicas that left the stream make a generation wanted.
    pub(super) fn note_left(&mut self) {
        for peer in self.peers.values_mut() {
            if peer.take_left() {
                self.generations.next = Next::Left;
            }
        }
    }

    /// Whether a replica may be committed to the newest generation: no other one may have it and lack some of it.
    pub(super) fn may_commit(&self, host: crate::units::HostId) -> bool {
        let others = || self.peers.values().filter(|peer| peer.host() != host);
        !self.generations.beginning
            && self.generations.next != Next::Left
            && !others().any(Peer::may_lag_within_newest)
    }

    /// The generations that a peer's newest one may be, and those that maps are relative to: they are not pruned (L2).
    /// One that a peer followed by stream is its newest one, and its map is relative to an older one.
    fn kept_generations(&self) -> Vec<GenerationId> {
        self.peers.values().flat_map(|peer| peer.newest_there(&self.generations.lineage)).collect()
    }
}
