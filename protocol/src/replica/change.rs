//! Changes of what a replica's superblock says. Each is one durable write, so a crash leaves it done or not begun.

use crate::disk::superblock::{LINEAGE_LIMIT, Superblock};
use crate::lineage;
use crate::units::{GenerationId, Position};
use crate::wire::message::{DataState, Fence, Mode};

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum StateChange {
    /// A primary of this fence greeted: lower ones are refused from now on, and nobody was demoted for us any more (L5).
    Follow(Fence),
    /// A resync begins: the content is no legal image until its commit, and the layer of pre-images, if there is one,
    /// leads back to what was (P1, P2).
    Begin {
        /// The primary that resyncs.
        source: Fence,
        /// The layer, or the one that was there already; 0 for none.
        gap: u64,
    },
    /// There is no room for pre-images, and the operator wants the resync to go on without (P2).
    GiveRollbackUp,
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
    },
    /// The primary was demoted when this replica had everything.
    Release,
}

impl StateChange {
    /// Makes the change.
    pub fn apply(&self, superblock: &mut Superblock) {
        match self {
            Self::Follow(fence) => (superblock.fence, superblock.released) = (*fence, false),
            Self::Begin { source, gap } => {
                superblock.data = DataState::Inconsistent;
                superblock.source = *source;
                superblock.gap = *gap;
                superblock.layers = superblock.layers.max(*gap);
            }
            Self::GiveRollbackUp => superblock.gap = 0,
            Self::Generation(generation) => {
                if superblock.lineage.first() != Some(generation) {
                    lineage::begin(&mut superblock.lineage, *generation, &[], LINEAGE_LIMIT);
                }
            }
            Self::Commit { position, lineage, mode } => {
                superblock.data = DataState::Consistent;
                superblock.position = *position;
                superblock.lineage.clone_from(lineage);
                superblock.lineage.truncate(LINEAGE_LIMIT);
                superblock.mode = *mode;
                superblock.gap = 0;
                superblock.adopted += 1;
            }
            Self::Release => superblock.released = true,
        }
    }
}
