//! What a volume's metadata says once its backing was replaced: no more than what the new content is known to be (L4, X4).
//!
//! After a recovery that is the source's history up to the position of its copy: a host that has more is found by its
//! generations, or by where this content ends ([`Ends`]), and is never overwritten unasked. A mixture is a history of its
//! own. Of what an earlier release recovered, only as much is claimed as this host's map vouches for. Where blocks of others
//! may differ is not known in any of these cases but one: on the source of a recovery, they are what this host's map says.
//!
//! What the copy is comes last. What is written before ([`crate::rewrite`]) only says that less is known and that nobody may
//! count on it, so a crash in between does no harm, and the next start does it all again.

use crate::dirty_map::DirtyMap;
use crate::disk::dirty_map::Base;
use crate::disk::superblock::{Role, Superblock};
use crate::given::Given;
use crate::layers::Purpose;
use crate::lineage::Ends;
use crate::planted::{Bug, planted};
use crate::succession::is_later;
use crate::terms::{DataState, Fence, Mode};
use crate::units::{CopyId, Epoch, GenerationId, HostId, Mark, Position};
use crate::wire::message::Standing;

/// A copy as it was recovered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Content {
    /// A mixture of old and new, taken all the same: it is no history's.
    Mixture,
    /// A legal image of the volume.
    Image {
        /// The last epoch that is in it.
        position: Position,
        /// The copy's generations, newest first.
        lineage: Vec<GenerationId>,
    },
}

impl Content {
    /// What a copy is that holds this.
    #[must_use]
    pub fn of(data: DataState, position: Position, lineage: &[GenerationId]) -> Self {
        match data {
            DataState::Consistent => Self::Image { position, lineage: lineage.to_vec() },
            DataState::Empty | DataState::Inconsistent => Self::Mixture,
        }
    }

    /// Whether a host that stands so has later content than this, which whoever recovers had better take. A primary that
    /// does not serve may be the one whose disk is lost.
    #[must_use]
    pub fn is_older_than(&self, standing: &Standing) -> bool {
        let is_lost = standing.role == Role::Primary && !standing.serves;
        !is_lost
            && match self {
                Self::Mixture => standing.data == DataState::Consistent || standing.can_roll_back,
                Self::Image { position, lineage } => is_later(standing, lineage, *position, &Ends::default()),
            }
    }
}

/// A backing that took the place of another.
#[derive(Clone, Copy, Debug)]
pub struct Adoption<'a> {
    /// The host whose copy was recovered; nothing where the backing is new, or the operator says that it is a true copy.
    pub source: Option<HostId>,
    /// What that was; nothing where an earlier release recovered it.
    pub content: Option<&'a Content>,
    /// Whether nothing of it is on the backing yet: a primary serves it from the source, and fills the backing meanwhile (S4).
    pub is_absent: bool,
}

impl Adoption<'_> {
    /// Whether a primary's map for this host still says where the two may differ; if not, it begins anew.
    #[must_use]
    pub fn keeps_map(&self, peer: HostId) -> bool {
        self.source == Some(peer) || planted(Bug::KeepMaps)
    }

    /// A primary's map for a host.
    #[must_use]
    pub fn map_for(&self, peer: HostId, superblock: &Superblock, mut map: DirtyMap) -> DirtyMap {
        let base = map.base();
        match self.content {
            // Whatever this host had that the source lacks is on the old disk. The two have the same as long as all is absent.
            Some(Content::Image { position, lineage }) if self.is_absent && self.source == Some(peer) => {
                let generation = lineage.first().copied().unwrap_or_default();
                let base = Base { copy: CopyId::default(), generation, adopted: superblock.adopted };
                let mut map = map.clean(base);
                map.note_known(Mark { position: *position, ..Mark::default() });
                map
            }
            _ => {
                if !self.keeps_map(peer) {
                    map.begin_anew(base);
                }
                map
            }
        }
    }

    /// On a replica, how far it is: to be written once everything counts as active in its log, for what the source had begun of
    /// its next epoch is here as well (D5). Nothing where it holds no image.
    #[must_use]
    pub fn mark(&self) -> Option<Mark> {
        match self.content {
            Some(Content::Image { position, .. }) if !self.is_absent => {
                Some(Mark { position: *position, ..Mark::default() })
            }
            Some(Content::Image { .. } | Content::Mixture) | None => None,
        }
    }

    /// What the superblock says then. `vouched` is the generation that a primary's map for the source is relative to;
    /// `fresh` is random, and names what is begun.
    pub fn record(&self, superblock: &mut Superblock, vouched: GenerationId, fresh: [u8; 16]) {
        match superblock.role {
            Role::Primary if planted(Bug::ClaimLost) => {}
            Role::Primary => self.record_primary(superblock, vouched, GenerationId(fresh)),
            // Only a primary serves what is not here.
            Role::Replica if self.is_absent => {
                Self { content: None, ..*self }.record_replica(superblock, CopyId(fresh));
            }
            Role::Replica => self.record_replica(superblock, CopyId(fresh)),
        }
    }

    fn record_primary(&self, superblock: &mut Superblock, vouched: GenerationId, fresh: GenerationId) {
        if self.source.is_none() {
            return;
        }
        superblock.ends = Ends::default();
        match self.content {
            Some(Content::Image { position, lineage }) => {
                superblock.lineage.clone_from(lineage);
                let generation = lineage.first().copied().unwrap_or_default();
                // Where no epoch of it was durable there, nothing of it is here.
                let held = position.generation == generation;
                let end = if held { position.epoch.next() } else { Epoch(1) };
                superblock.ends = Ends::only(generation, end);
                // The next run's epochs come after those of both.
                superblock.run = superblock.run.max(position.epoch);
            }
            Some(Content::Mixture) => superblock.lineage = vec![fresh],
            None => match superblock.lineage.iter().position(|generation| *generation == vouched) {
                Some(known) => drop(superblock.lineage.drain(..known)),
                None => superblock.lineage = vec![fresh],
            },
        }
        match self.is_absent {
            true => superblock.note_absent(),
            false => superblock.note_filled(),
        }
    }

    /// Whatever this host has noted is of the old disk: its position, what it had in common with others, and the layers.
    fn record_replica(&self, superblock: &mut Superblock, copy: CopyId) {
        superblock.copy = copy;
        superblock.layers.set(Purpose::Rollback, None);
        superblock.ends = Ends::default();
        superblock.keep_in(None);
        (superblock.mode, superblock.given) = (Mode::Async, Given::NOTHING);
        (superblock.released, superblock.replaced) = (false, true);
        // What something else wrote is on the old disk.
        superblock.touched = false;
        match self.content {
            Some(Content::Image { position, lineage }) => {
                (superblock.data, superblock.position) = (DataState::Consistent, *position);
                (superblock.lineage, superblock.source) = (lineage.clone(), Fence::default());
                superblock.adopted += 1;
            }
            Some(Content::Mixture) | None => {
                (superblock.data, superblock.lineage) = (DataState::Empty, Vec::new());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::replica::tests::superblock;
    use crate::units::Sequence;

    const SOURCE: HostId = HostId([3; 32]);
    const FRESH: [u8; 16] = [1; 16];

    fn generations(text: &str) -> Vec<GenerationId> {
        text.bytes().map(|byte| GenerationId([byte; 16])).collect()
    }

    fn position(byte: u8, epoch: u64) -> Position {
        Position { generation: GenerationId([byte; 16]), epoch: Epoch(epoch), sequence: Sequence(0) }
    }

    fn adopted(role: Role, content: Option<&Content>, vouched: u8) -> Superblock {
        let adoption = Adoption { source: Some(SOURCE), content, is_absent: false };
        let before = superblock("cba");
        let mut superblock = Superblock { role, run: Epoch(900), adopted: 1, touched: true, ..before };
        adoption.record(&mut superblock, GenerationId([vouched; 16]), FRESH);
        superblock
    }

    fn image(at: Position, lineage: &str) -> Content {
        Content::Image { position: at, lineage: generations(lineage) }
    }

    #[test]
    fn a_recovered_primary_claims_what_the_copy_had_and_ends_there() {
        let end = |byte, epoch| Ends::only(GenerationId([byte; 16]), Epoch(epoch));
        for (content, lineage, ends, epoch) in [
            (Some(image(position(b'b', 30), "ba")), "ba", end(b'b', 31), 900),
            (Some(image(position(b'b', 1000), "ba")), "ba", end(b'b', 1001), 1000),
            // The source had recorded a generation of which no epoch was durable there.
            (Some(image(position(b'a', 30), "ba")), "ba", end(b'b', 1), 900),
            // Its history may be another one.
            (Some(image(position(b'x', 30), "xa")), "xa", end(b'x', 31), 900),
            // What was known of the source is what it had confirmed.
            (None, "ba", Ends::default(), 900),
        ] {
            let superblock = adopted(Role::Primary, content.as_ref(), b'b');
            assert_eq!(superblock.lineage, generations(lineage), "{content:?}");
            assert_eq!((superblock.ends, superblock.run), (ends, Epoch(epoch)), "{content:?}");
        }
        let own = vec![GenerationId(FRESH)];
        assert_eq!(adopted(Role::Primary, Some(&Content::Mixture), b'b').lineage, own, "it is nobody's");
        assert_eq!(adopted(Role::Primary, None, b'x').lineage, own, "no map vouches for it");
    }

    #[test]
    fn a_true_copy_on_another_disk_claims_what_this_host_had() {
        let before = superblock("ba");
        let mut primary = Superblock { role: Role::Primary, ..before };
        let expected = primary.clone();
        let adoption = Adoption { source: None, content: None, is_absent: false };
        adoption.record(&mut primary, GenerationId::default(), FRESH);
        assert_eq!(primary, expected);
        assert!(!adoption.keeps_map(SOURCE), "what others lack of it is not known");
    }

    #[test]
    fn a_recovered_replica_is_what_the_copy_was_and_a_mixture_is_nothing() {
        let content = image(position(b'b', 30), "ba");
        let after = adopted(Role::Replica, Some(&content), 0);
        assert_eq!((after.data, after.position), (DataState::Consistent, position(b'b', 30)));
        assert_eq!((after.lineage, after.source), (generations("ba"), Fence::default()));
        assert_eq!((after.adopted, after.copy), (2, CopyId(FRESH)), "maps of others are of the old disk");
        assert_eq!((after.given, after.released, after.replaced), (Given::NOTHING, false, true));
        assert!(!after.touched, "that was the old disk");
        for content in [Some(Content::Mixture), None] {
            let after = adopted(Role::Replica, content.as_ref(), 0);
            assert_eq!((after.data, after.lineage, after.copy), (DataState::Empty, vec![], CopyId(FRESH)));
            assert_eq!(
                Adoption { source: Some(SOURCE), content: content.as_ref(), is_absent: false }.mark(),
                None
            );
        }
    }
}
