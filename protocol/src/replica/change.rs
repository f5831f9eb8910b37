//! Changes of what a replica's superblock says. Each is one durable write, so a crash leaves it done or not begun.

use super::consent;
use crate::disk::superblock::{LINEAGE_LIMIT, Superblock};
use crate::given::Given;
use crate::layers::{LayerId, Purpose};
use crate::lineage::{self, Ends};
use crate::planted::{Bug, planted};
use crate::terms::{DataState, Fence, Mode};
use crate::units::{GenerationId, Position};

/// A change of the superblock.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StateChange {
    /// A primary greeted: lower fences are refused from now on, and nobody was demoted for us any more (L5).
    Follow {
        /// Its fence.
        fence: Fence,
        /// Whether it may overwrite this copy for good ([`consent`]).
        agrees: bool,
    },
    /// This layer keeps what the copy holds, or what the layer leads back to, from a primary to whom nobody has agreed
    /// (L6).
    Keep(LayerId),
    /// The primary went on without this replica, which so may lack what was replied: it counts for nothing until a
    /// commit.
    Behind,
    /// A resync begins: the content is no legal image until its commit, and the layer of pre-images, if there is one,
    /// leads back to what was (P1, P2).
    Begin {
        /// The primary that resyncs.
        source: Fence,
        /// The layer, or the one that was there already; none where there is no room for one.
        rollback: Option<LayerId>,
        /// Whether that layer is kept after the commit: this host had written what the primary lacks (L3).
        keep: bool,
    },
    /// There is no room for pre-images, and the operator wants the resync to go on without (P2).
    GiveRollbackUp,
    /// There is no room for what was kept for undo, or the operator wants it no more, and agrees to whom he follows (L6).
    Forget,
    /// A generation begins within a session (L1).
    Generation(GenerationId),
    /// The content is the primary's at this position (P1).
    Commit {
        /// The position.
        position: Position,
        /// The generations to adopt, newest first.
        lineage: Vec<GenerationId>,
        /// The mode in which the replica counts.
        mode: Mode,
        /// What it can count on when it is out of reach.
        given: Given,
        /// The fence of the primary.
        source: Fence,
    },
    /// The primary was demoted when this replica had everything.
    Release,
}

impl StateChange {
    /// Makes the change.
    pub fn apply(&self, superblock: &mut Superblock) {
        match self {
            Self::Follow { fence, agrees } => {
                (superblock.fence, superblock.released) = (*fence, false);
                superblock.heirs.clear();
                if *agrees {
                    consent::give(superblock);
                }
            }
            Self::Keep(layer) => superblock.keep_in(Some(*layer)),
            Self::Behind => (superblock.mode, superblock.given) = (Mode::Async, Given::NOTHING),
            Self::Begin { source, rollback, keep } => {
                if superblock.data == DataState::Empty && !planted(Bug::EmptyObjects) {
                    // What a copy held before it was emptied says nothing of what is in it now (L3).
                    superblock.lineage.clear();
                }
                superblock.data = DataState::Inconsistent;
                superblock.source = *source;
                superblock.layers.set(Purpose::Rollback, *rollback);
                if *keep {
                    superblock.keep_in(*rollback);
                }
            }
            Self::GiveRollbackUp => {
                if superblock.layers.undo() == superblock.layers.rollback() {
                    superblock.keep_in(None);
                    consent::give(superblock);
                }
                superblock.layers.set(Purpose::Rollback, None);
            }
            Self::Forget => {
                superblock.keep_in(None);
                consent::give(superblock);
            }
            Self::Generation(generation) => {
                if superblock.lineage.first() != Some(generation) {
                    lineage::begin(&mut superblock.lineage, *generation, &[], LINEAGE_LIMIT);
                }
            }
            Self::Commit { position, lineage, mode, given, source } => {
                superblock.data = DataState::Consistent;
                superblock.position = *position;
                superblock.lineage.clone_from(lineage);
                superblock.lineage.truncate(LINEAGE_LIMIT);
                superblock.mode = *mode;
                superblock.given.clone_from(given);
                superblock.source = *source;
                (superblock.replaced, superblock.touched) = (false, false);
                superblock.layers.set(Purpose::Rollback, None);
                superblock.adopted += 1;
                superblock.ends = Ends::default();
            }
            Self::Release => superblock.released = true,
        }
    }
}
