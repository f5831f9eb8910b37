//! The durable steps of a change of role, in their order, while all other I/O on this copy is stopped: a replica is promoted, its
//! content is given up for another host's, what was given up is brought back, or another backing took the place of the one before.
//!
//! A [`Rewrite`] gives one [`Order`] at a time. The shell carries it out, durably, before it asks for the next one. What is to
//! be written it gets from here: [`Rewrite::map`] for a map, [`Rewrite::change`] for the superblock. So no step can be left
//! out, done twice or in another order, and there is no second place where they stand. A crash between any two leaves a copy
//! of which the same rewrite can be done again.

use crate::adoption::{Adoption, Content};
use crate::dirty_map::DirtyMap;
use crate::disk::superblock::{Role, Superblock};
use crate::given::Given;
use crate::layers::LayerId;
use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use crate::replica::consent;
use crate::replica::promotion::{self, NotPromotable};
use crate::replica::resolve::{self, Keep};
use crate::replica::undo::{self, NotUndoable};
use crate::split::Concession;
use crate::succession::Decision;
use crate::terms::{DataState, Fence};
use crate::units::{GenerationId, HostId, Mark, Position};
use std::collections::VecDeque;

/// What the shell does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// Write a part of the metadata.
    Write(Part),
    /// Make this layer, durably and empty, which leads back to what the backing holds.
    BeginLayer(LayerId),
    /// Write every pre-image of this layer back.
    Restore {
        /// The layer.
        layer: LayerId,
    },
    /// Sync the backing (P5).
    Sync,
}

/// A part of the metadata that is written.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Part {
    /// The map for this peer, as [`Rewrite::map`] makes it of what is there.
    Map(HostId),
    /// The activity log, which says that everything may be active, and then this marker.
    Mark(Mark),
    /// The file of absent blocks, which says that all are, and that this host has them.
    Absent(HostId),
    /// The superblock, after [`Rewrite::change`].
    Superblock(Change),
}

/// What the superblock is made to say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Change {
    /// What is there is a mixture, or no primary's content any more, or less than was confirmed, until the end.
    Begin,
    /// What the copy is from now on.
    End,
}

/// Why a promotion that was decided on is not recorded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotRecorded {
    /// The primary may have gone on alone, where nothing else speaks for a promotion than its word that it does not.
    TooLate,
    /// Something else wrote to the copy meanwhile, and no operator insists (X4).
    Touched,
}

/// A replica that is to be promoted.
#[derive(Clone, Debug)]
pub struct Candidacy {
    /// This host.
    pub host: HostId,
    /// What was decided with what the others say.
    pub decision: Decision,
    /// The last epoch that is durable here; in a gap, the rollback point.
    pub position: Position,
    /// What a rollback restores.
    pub restored: Vec<ByteRange>,
}

impl Candidacy {
    /// What another host was given by the last primary, as this one keeps it, and as far as it is known. One that was heard says
    /// so itself: the primary may have ended when it had told one of the two of what its operator chose last. Of one that was
    /// not, this copy's own word tells; and of all where the operator insists, as against hosts that went another way.
    fn given_to(&self, peer: HostId, superblock: &Superblock) -> Option<Given> {
        let Decision { heard, is_forced, .. } = &self.decision;
        if let Some((_, given)) = heard.iter().find(|(host, _)| *host == peer && !is_forced) {
            return Some(given.kept_by(self.host));
        }
        let counts = superblock.given.counted.contains(&peer);
        counts.then(|| superblock.given.of_another(peer))
    }
}

/// What a history leads back to.
#[derive(Clone, Debug)]
pub struct Before {
    /// The generations of that time, newest first.
    pub lineage: Vec<GenerationId>,
    /// The position of that time.
    pub point: Position,
    /// What is restored.
    pub saved: Vec<ByteRange>,
    /// Names a generation that is begun where it is needed.
    pub own: GenerationId,
}

/// A change of what a copy says of itself, and how far it is.
#[derive(Clone, Debug)]
pub struct Rewrite {
    kind: Kind,
    orders: VecDeque<Order>,
    /// Layers of pre-images that lead back to nothing any more when all is done.
    ended: Vec<LayerId>,
    is_touched: bool,
}

#[derive(Clone, Debug)]
enum Kind {
    Promotion {
        candidacy: Candidacy,
        /// The peers of whom this host knows nothing that they lack.
        level: Vec<HostId>,
    },
    Undo(Before),
    Resolution {
        concession: Concession,
        /// The layer that keeps what the copy had.
        undo: Option<LayerId>,
    },
    Adoption {
        source: Option<HostId>,
        content: Option<Content>,
        /// Whether nothing of it is here yet.
        is_absent: bool,
        /// The generation that a primary's map for the source is relative to.
        vouched: GenerationId,
        fresh: [u8; 16],
    },
}

impl Rewrite {
    /// Makes a replica with these peers the primary (P1, P2, P5, L5).
    ///
    /// # Errors
    /// [`NotPromotable`] when nothing would make a legal image of the volume, or force alone makes it one.
    pub fn promotion(
        superblock: &Superblock,
        peers: &[HostId],
        candidacy: Candidacy,
    ) -> Result<Self, NotPromotable> {
        let raised =
            Superblock { fence: raised(superblock.fence, candidacy.decision.newest), ..superblock.clone() };
        promotion::must_be_promotable(&raised)?;
        // Nobody is asked again where a handover came to nothing, nor where it was noticed since.
        if superblock.touched && !candidacy.decision.is_forced && !planted(Bug::PromoteTouched) {
            return Err(NotPromotable::Touched);
        }
        let layers = &superblock.layers;
        let rollback = layers.rollback().filter(|_| superblock.data == DataState::Inconsistent);
        let orders =
            maps(peers)
                .chain(rollback.into_iter().flat_map(|layer| {
                    [Order::Write(Part::Superblock(Change::Begin)), Order::Restore { layer }]
                }))
                .chain([Order::Sync, Order::Write(Part::Superblock(Change::End))]);
        Ok(Self {
            kind: Kind::Promotion { candidacy, level: Vec::new() },
            orders: orders.collect(),
            ended: layers.of_known_purposes_alone(),
            is_touched: false,
        })
    }

    /// Brings back what a replica with these peers had (L6).
    ///
    /// # Errors
    /// [`NotUndoable`] when there is nothing to bring back.
    pub fn undo(superblock: &Superblock, peers: &[HostId], before: Before) -> Result<Self, NotUndoable> {
        let layer = undo::layer(superblock)?;
        let orders = maps(peers).chain([
            Order::Write(Part::Superblock(Change::Begin)),
            Order::Restore { layer },
            Order::Sync,
            Order::Write(Part::Superblock(Change::End)),
        ]);
        Ok(Self {
            kind: Kind::Undo(before),
            orders: orders.collect(),
            ended: superblock.layers.of_known_purposes_alone(),
            is_touched: false,
        })
    }

    /// Gives a copy's content up for another host's, and keeps it for an undo where there is anything to keep (L6).
    /// `is_unused`: whether the layer that there is for an undo, if any, has no pre-image yet. What was kept before goes with
    /// the write that names the new layer.
    #[must_use]
    pub fn resolution(superblock: &Superblock, concession: Concession, is_unused: bool) -> Self {
        let (undo, begun) = match resolve::keep(superblock, is_unused) {
            Keep::Nothing => (None, None),
            Keep::Layer(layer) => (Some(layer), None),
            Keep::NewLayer => (Some(superblock.layers.next()), Some(superblock.layers.next())),
        };
        // What the layer leads back to is durable before it is there.
        let begun = begun.into_iter().flat_map(|layer| [Order::Sync, Order::BeginLayer(layer)]);
        let mut after = superblock.clone();
        concession.record(&mut after, undo);
        Self {
            orders: begun.chain([Order::Write(Part::Superblock(Change::End))]).collect(),
            ended: superblock.layers.known().filter(|layer| !after.layers.contains(*layer)).collect(),
            is_touched: false,
            kind: Kind::Resolution { concession, undo },
        }
    }

    /// Has a host with these peers say what is known of a backing that took the place of another (L4, X4). `fresh` is random.
    #[must_use]
    pub fn adoption(
        superblock: &Superblock,
        peers: &[HostId],
        adoption: Adoption<'_>,
        fresh: [u8; 16],
    ) -> Self {
        let peers = if superblock.role == Role::Primary { peers } else { &[] };
        let mark = adoption.mark().filter(|_| superblock.role == Role::Replica);
        // Before any map says that the source lacks nothing.
        let absent = adoption.source.filter(|_| adoption.is_absent && superblock.role == Role::Primary);
        let absent = absent.map(|source| Order::Write(Part::Absent(source)));
        // Before it says that it is less far, it says that nobody may count on it.
        let first = mark.map(|_| Order::Write(Part::Superblock(Change::Begin)));
        let orders = absent
            .into_iter()
            .chain(maps(peers))
            .chain(first)
            .chain(mark.map(|mark| Order::Write(Part::Mark(mark))))
            .chain([Order::Write(Part::Superblock(Change::End))]);
        Self {
            orders: orders.collect(),
            ended: Vec::new(),
            is_touched: false,
            kind: Kind::Adoption {
                source: adoption.source,
                content: adoption.content.cloned(),
                is_absent: adoption.is_absent,
                vouched: GenerationId::default(),
                fresh,
            },
        }
    }

    /// Something else wrote to the copy meanwhile.
    pub fn note_touched(&mut self) {
        self.is_touched = true;
    }

    /// What is to be done next, once what was ordered before is durable; nothing when all is done. `is_promised`: whether the
    /// primary's word holds now ([`crate::replica::Replica::is_promised`]).
    ///
    /// # Errors
    /// [`NotRecorded`]; the host is what it was.
    pub fn next(&mut self, is_promised: bool) -> Result<Option<Order>, NotRecorded> {
        if let (Kind::Promotion { candidacy, .. }, Some(Order::Write(Part::Superblock(Change::End)))) =
            (&self.kind, self.orders.front())
        {
            let Decision { rests_on_word, is_forced, .. } = candidacy.decision;
            if rests_on_word && !is_promised {
                return Err(NotRecorded::TooLate);
            }
            if self.is_touched && !is_forced {
                return Err(NotRecorded::Touched);
            }
        }
        Ok(self.orders.pop_front())
    }

    /// The map to write for a peer, for a copy that says this of itself. `map` is as recovered, or full.
    #[must_use]
    pub fn map(&mut self, superblock: &Superblock, peer: HostId, map: DirtyMap) -> DirtyMap {
        let mut map = self.map_of(superblock, peer, map);
        // What it said of answers was of other content.
        map.note_unanswered(false);
        map
    }

    fn map_of(&mut self, superblock: &Superblock, peer: HostId, mut map: DirtyMap) -> DirtyMap {
        match &mut self.kind {
            Kind::Promotion { candidacy, level } => {
                // Those that counted here count on this host, too; the last primary was given no word.
                if peer == superblock.fence.holder {
                    map.note_given(&Given::NOTHING);
                } else if let Some(given) = candidacy.given_to(peer, superblock) {
                    map.note_given(&given);
                }
                let Candidacy { position, restored, .. } = candidacy;
                let map = promotion::map_for(map, superblock, peer, *position, restored);
                if map.is_clean() {
                    level.push(peer);
                }
                map
            }
            Kind::Undo(Before { lineage, saved, .. }) => undo::map_for(map, superblock, peer, lineage, saved),
            Kind::Resolution { .. } => unreachable!("no map is another one when a host yields"),
            Kind::Adoption { source, content, is_absent, vouched, .. } => {
                let base = map.base();
                if *source == Some(peer) {
                    *vouched = base.generation;
                }
                let adoption = Adoption { source: *source, content: content.as_ref(), is_absent: *is_absent };
                adoption.map_for(peer, superblock, map)
            }
        }
    }

    /// Makes the superblock say what was ordered.
    ///
    /// # Panics
    /// When the superblock of a promotion is another one than it was begun with.
    pub fn change(&self, change: Change, superblock: &mut Superblock) {
        match (&self.kind, change) {
            (Kind::Promotion { .. }, Change::Begin) => promotion::begin(superblock),
            (Kind::Promotion { candidacy, level }, Change::End) => {
                let Candidacy { host, decision, position, .. } = candidacy;
                let mut heirs = superblock.heirs.clone();
                heirs.extend(level.iter().filter(|peer| !superblock.heirs.contains(peer)));
                superblock.fence = raised(superblock.fence, decision.newest);
                promotion::record(superblock, *host, *position).expect("a number was found for it");
                if decision.is_forced {
                    superblock.note_followed();
                } else if superblock.has_returned() {
                    // The maps tell it no more once they are filled for another reason.
                    consent::bequeath(superblock, &heirs);
                }
            }
            (Kind::Undo(Before { lineage, own, .. }), Change::Begin) => {
                undo::begin(superblock, lineage, *own)
            }
            (Kind::Undo(Before { point, .. }), Change::End) => undo::record(superblock, *point),
            (Kind::Resolution { .. }, Change::Begin) => unreachable!("it is one write"),
            (Kind::Resolution { concession, undo }, Change::End) => concession.record(superblock, *undo),
            (Kind::Adoption { .. }, Change::Begin) => superblock.replaced = true,
            (Kind::Adoption { source, content, is_absent, vouched, fresh }, Change::End) => {
                let adoption = Adoption { source: *source, content: content.as_ref(), is_absent: *is_absent };
                adoption.record(superblock, *vouched, *fresh);
            }
        }
    }

    /// The layers of pre-images that lead back to nothing any more when all is done.
    #[must_use]
    pub fn ended_layers(&self) -> &[LayerId] {
        &self.ended
    }
}

fn maps(peers: &[HostId]) -> impl Iterator<Item = Order> + '_ {
    peers.iter().copied().map(|peer| Order::Write(Part::Map(peer)))
}

fn raised(fence: Fence, newest: Fence) -> Fence {
    if newest.supersedes(fence) { newest } else { fence }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::testing::{catalog, layer};
    use crate::replica::tests::superblock;
    use crate::terms::Promise;
    use crate::units::{Epoch, Sequence};

    const PEERS: [HostId; 2] = [HostId([3; 32]), HostId([4; 32])];
    const BEGIN: Order = Order::Write(Part::Superblock(Change::Begin));
    const END: Order = Order::Write(Part::Superblock(Change::End));

    fn candidacy(rests_on_word: bool) -> Candidacy {
        let generation = GenerationId([b'b'; 16]);
        Candidacy {
            host: HostId([2; 32]),
            decision: Decision { rests_on_word, ..Decision::default() },
            position: Position { generation, epoch: Epoch(7), sequence: Sequence(0) },
            restored: Vec::new(),
        }
    }

    fn forced(is_forced: bool) -> Candidacy {
        Candidacy { decision: Decision { is_forced, ..Decision::default() }, ..candidacy(false) }
    }

    fn told_of(newest: Fence) -> Candidacy {
        Candidacy { decision: Decision { newest, ..Decision::default() }, ..candidacy(false) }
    }

    fn orders(mut rewrite: Rewrite) -> Vec<Order> {
        std::iter::from_fn(|| rewrite.next(true).expect("the word holds")).collect()
    }

    #[test]
    fn everything_that_a_crash_must_not_lose_is_durable_before_the_superblock_says_so() {
        let maps = PEERS.map(|peer| Order::Write(Part::Map(peer)));
        let promotion = |superblock: &Superblock| Rewrite::promotion(superblock, &PEERS, candidacy(false));
        let consistent = superblock("ba");
        assert_eq!(orders(promotion(&consistent).unwrap()), [maps[0], maps[1], Order::Sync, END]);
        let gap = Superblock { data: DataState::Inconsistent, layers: catalog(5, 4), ..superblock("ba") };
        let rollback = promotion(&gap).unwrap();
        assert_eq!(rollback.ended_layers(), [layer(5), layer(4)]);
        let restore = Order::Restore { layer: layer(5) };
        assert_eq!(orders(rollback), [maps[0], maps[1], BEGIN, restore, Order::Sync, END]);
        let mixture = Superblock { layers: catalog(0, 4), ..gap };
        assert_eq!(promotion(&mixture).unwrap_err(), NotPromotable::Inconsistent);
        let before = Before {
            lineage: Vec::new(),
            point: Position::default(),
            saved: Vec::new(),
            own: GenerationId::default(),
        };
        let history = Superblock { layers: catalog(0, 4), ..superblock("ba") };
        let undo = Rewrite::undo(&history, &PEERS, before.clone()).unwrap();
        assert_eq!(
            orders(undo),
            [maps[0], maps[1], BEGIN, Order::Restore { layer: layer(4) }, Order::Sync, END]
        );
        assert_eq!(Rewrite::undo(&consistent, &PEERS, before).unwrap_err(), NotUndoable::NoHistory);
    }

    #[test]
    fn a_promotion_on_the_primarys_word_is_not_recorded_when_that_is_over() {
        let mut rewrite = Rewrite::promotion(&superblock("ba"), &[], candidacy(true)).unwrap();
        assert_eq!(rewrite.next(false), Ok(Some(Order::Sync)), "nothing is decided before");
        assert_eq!(rewrite.next(false), Err(NotRecorded::TooLate));
        let mut without = Rewrite::promotion(&superblock("ba"), &[], candidacy(false)).unwrap();
        assert_eq!((without.next(false), without.next(false)), (Ok(Some(Order::Sync)), Ok(Some(END))));
    }

    #[test]
    fn a_copy_that_something_else_writes_to_while_it_is_promoted_is_not_the_primarys_unless_that_is_forced() {
        for (candidacy, end) in [(candidacy(false), Err(NotRecorded::Touched)), (forced(true), Ok(Some(END)))]
        {
            let mut rewrite = Rewrite::promotion(&superblock("ba"), &[], candidacy).unwrap();
            rewrite.note_touched();
            assert_eq!(rewrite.next(true), Ok(Some(Order::Sync)), "nothing is decided before");
            assert_eq!(rewrite.next(true), end);
        }
    }

    #[test]
    fn a_primary_that_returns_waits_for_those_that_it_released_unless_it_is_forced() {
        for is_forced in [false, true] {
            let own = HostId([2; 32]);
            let demoted = Fence { counter: 3, holder: own };
            let mut it = Superblock { fence: demoted, source: demoted, ..superblock("ba") };
            let rewrite = Rewrite::promotion(&it, &[], forced(is_forced)).unwrap();
            rewrite.change(Change::End, &mut it);
            assert_eq!(it.has_returned(), !is_forced);
            it.note_followed();
            assert!(!it.has_returned());
        }
        let source = Fence { counter: 2, holder: HostId([1; 32]) };
        let mut other = Superblock { source, ..superblock("ba") };
        let rewrite = Rewrite::promotion(&other, &[], candidacy(false)).unwrap();
        rewrite.change(Change::End, &mut other);
        assert!(!other.has_returned(), "whom the other one released follows nobody else");
    }

    #[test]
    fn a_copy_that_something_else_wrote_to_is_the_volumes_content_once_it_is_promoted() {
        let mut it = Superblock { touched: true, ..superblock("ba") };
        // The primary that was demoted for another host goes on by itself, whatever was done to its disk meanwhile.
        let unasked = Rewrite::promotion(&it, &[], candidacy(false));
        assert_eq!(unasked.unwrap_err(), NotPromotable::Touched);
        let rewrite = Rewrite::promotion(&it, &[], forced(true)).unwrap();
        rewrite.change(Change::Begin, &mut it);
        assert!(it.touched, "it is not promoted yet");
        rewrite.change(Change::End, &mut it);
        assert!(!it.touched);
    }

    /// It took the dead primary for one that counts on it, and writes waited for that.
    #[test]
    fn a_promoted_host_keeps_what_its_primary_gave_those_that_counted_with_it_and_gave_that_one_nothing() {
        let (primary, other) = (HostId([1; 32]), HostId([9; 32]));
        let given = |replicas, counted: &[HostId]| Given {
            promise: Promise::Replicas(replicas),
            counted: counted.to_vec(),
        };
        let fence = Fence { counter: 3, holder: primary };
        let own = HostId([2; 32]);
        let unheard = Decision::default();
        let says = |given| Decision { heard: vec![(PEERS[0], given)], ..Decision::default() };
        for (replicas, decision, kept) in [
            (2, unheard.clone(), given(1, &[PEERS[1]])),
            (1, unheard, Given::NOTHING),
            // It was told before what this host was not, or not yet what this host was: it knows best.
            (1, says(given(2, &[own, PEERS[1]])), given(1, &[PEERS[1]])),
            (2, says(given(1, &[own, PEERS[1]])), Given::NOTHING),
            (2, says(Given::NOTHING), Given::NOTHING),
            (1, Decision { is_forced: true, ..says(given(2, &[own, PEERS[1]])) }, Given::NOTHING),
            // What this host answers does not count for it.
            (1, says(given(1, &[PEERS[1]])), given(1, &[PEERS[1]])),
        ] {
            let it = Superblock { fence, given: given(replicas, &PEERS), ..superblock("ba") };
            let candidacy = Candidacy { decision: decision.clone(), ..candidacy(false) };
            let mut rewrite = Rewrite::promotion(&it, &PEERS, candidacy).unwrap();
            let mut given_to = |peer| {
                let mut map = DirtyMap::full(it.volume, peer, it.size_bytes, it.block_size);
                // Of an earlier run of this host as the primary.
                map.note_given(&given(7, &[]));
                rewrite.map(&it, peer, map).given().cloned().unwrap()
            };
            assert_eq!(given_to(PEERS[0]), kept);
            assert_eq!(given_to(primary), Given::NOTHING);
            assert_eq!(given_to(other), given(7, &[]), "nothing is known of what it was given since");
        }
    }

    /// Its map of one that it waited for was filled, and after a restart it did not wait.
    #[test]
    fn a_primary_that_returns_records_who_may_count_as_one_that_lacks_nothing() {
        let own = HostId([2; 32]);
        let demoted = Fence { counter: 3, holder: own };
        let released = HostId([7; 32]);
        for (is_forced, awaited) in [(false, vec![released, PEERS[0]]), (true, Vec::new())] {
            let before =
                Superblock { fence: demoted, source: demoted, heirs: vec![released], ..superblock("ba") };
            let mut it = before.clone();
            let mut rewrite = Rewrite::promotion(&it, &PEERS, forced(is_forced)).unwrap();
            for (peer, lacks) in [(PEERS[0], false), (PEERS[1], true)] {
                let mut map = DirtyMap::full(it.volume, peer, it.size_bytes, it.block_size);
                map.begin_anew(before.base_of_everything());
                let map = if lacks { map } else { map.clean(before.base_of_everything()) };
                let _ = rewrite.map(&before, peer, map);
            }
            rewrite.change(Change::End, &mut it);
            assert_eq!(it.heirs, awaited);
            it.note_followed();
            assert!(it.heirs.is_empty());
        }
    }

    #[test]
    fn a_promotion_is_newer_than_all_that_any_host_told_of() {
        let newest = Fence { counter: 40, holder: HostId([9; 32]) };
        let mut it = superblock("ba");
        let rewrite = Rewrite::promotion(&it, &[], told_of(newest)).unwrap();
        rewrite.change(Change::End, &mut it);
        assert!(it.fence.supersedes(newest) && it.fence.holder == HostId([2; 32]));
        let used_up = Fence { counter: Fence::COUNTERS - 1, ..newest };
        let refused = Rewrite::promotion(&superblock("ba"), &[], told_of(used_up));
        assert_eq!(refused.unwrap_err(), NotPromotable::UsedUp);
    }

    #[test]
    fn an_adopted_primary_keeps_the_map_of_the_source_and_a_replica_writes_its_mark_first() {
        let content =
            Content::Image { position: candidacy(false).position, lineage: superblock("ba").lineage };
        let adoption = Adoption { source: Some(PEERS[0]), content: Some(&content), is_absent: false };
        let replica = Rewrite::adoption(&superblock("ba"), &PEERS, adoption, [1; 16]);
        assert_eq!(orders(replica), [BEGIN, Order::Write(Part::Mark(adoption.mark().unwrap())), END]);
        let primary = Superblock { role: Role::Primary, ..superblock("ba") };
        let mut rewrite = Rewrite::adoption(&primary, &PEERS, adoption, [1; 16]);
        for (peer, is_full) in [(PEERS[0], false), (PEERS[1], true)] {
            assert_eq!(rewrite.next(true), Ok(Some(Order::Write(Part::Map(peer)))));
            let full = DirtyMap::full(primary.volume, peer, primary.size_bytes, primary.block_size);
            let mut map = full.clean(Default::default());
            map.note_unanswered(true);
            let map = rewrite.map(&primary, peer, map);
            assert_eq!((map.is_full(), map.is_unanswered()), (is_full, false), "it was of other content");
        }
        assert_eq!(rewrite.next(true), Ok(Some(END)));
    }
}
