//! Who may take over: whether a replica may be promoted without losing anything that an application was answered, as far
//! as the hosts that can be heard know. A pure function of what this copy holds and what the others say; the words for it
//! are made elsewhere.

use crate::disk::superblock::{Role, Superblock};
use crate::given::Given;
use crate::lineage::{self, Ends, Relation};
use crate::membership;
use crate::planted::{Bug, planted};
use crate::replica::consent;
use crate::terms::{DataState, Fence, Mode, Promise};
use crate::units::{GenerationId, HostId, Position};
use crate::wire::message::Standing;
use std::collections::{BTreeMap, BTreeSet};

/// A replica that is to be promoted.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// This host.
    pub own: HostId,
    /// What is durable here.
    pub superblock: Superblock,
    /// The last durable epoch; in a gap, the rollback point.
    pub position: Position,
    /// Whether a primary is connected, and not just not noticed to be gone.
    pub is_connected: bool,
    /// Whether the primary's word holds that it answers nothing without this replica: see
    /// [`crate::replica::Replica::is_promised`].
    pub is_promised: bool,
}

/// What another host of the volume says of itself; nothing where it is silent.
#[derive(Clone, Debug)]
pub struct Heard {
    /// The host.
    pub host: HostId,
    /// How it stands.
    pub standing: Option<Standing>,
}

/// That a replica is promoted, as it was decided with what the other hosts said.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Decision {
    /// The newest fence that any host told of.
    pub newest: Fence,
    /// Whether nothing is lost only as long as the primary's word holds.
    pub rests_on_word: bool,
    /// Whether the operator wants it whatever that loses: then nobody is waited for who might be promoted as well.
    pub is_forced: bool,
    /// The hosts that said how they stand, each with what it counts on.
    pub heard: Vec<(HostId, Given)>,
}

/// Why a replica can't be promoted at all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Obstacle {
    /// Nothing was ever copied.
    Empty,
    /// A mixture without a way back.
    Mixture,
}

/// Why a replica should not be promoted now. To do it all the same is the operator's decision.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Objection {
    /// This host is the primary, and serves.
    Serves(HostId),
    /// A primary is connected that does not answer.
    Connected,
    /// This host was promoted after this copy was last in touch with a primary.
    Promoted(HostId),
    /// This host has later content.
    Later(HostId),
    /// This host follows the same promotion of the same primary, and each of the two copies has what the other lacks: the
    /// primary was recovered from an older copy, or set back, and went on from there.
    Split(HostId),
    /// This host was the primary and was demoted: it has everything.
    Demoted(HostId),
    /// Something else wrote to this copy, which was not compared with a primary's since.
    Touched,
    /// What a primary overwrote here is kept, and nobody has agreed to it: a promotion gives it up.
    Kept,
    /// This copy is in the middle of a resync: a promotion rolls it back.
    Rollback,
    /// Any of these may have been promoted, or have more, and they are silent.
    Unheard(Vec<HostId>),
    /// The primary may have answered something that is missing here.
    Unpromised,
}

impl Candidate {
    /// Why it can't be promoted, whatever that loses.
    #[must_use]
    pub fn obstacle(&self) -> Option<Obstacle> {
        match (self.superblock.data, self.superblock.layers.rollback()) {
            (DataState::Empty, _) => Some(Obstacle::Empty),
            (DataState::Inconsistent, None) => Some(Obstacle::Mixture),
            _ => None,
        }
    }

    /// Whether a promotion gives up what is kept because nobody has agreed to who overwrote it. In the first resync it
    /// doesn't: that is what is rolled back to.
    #[must_use]
    pub fn gives_up_what_is_kept(&self) -> bool {
        let layers = &self.superblock.layers;
        consent::is_awaited(&self.superblock) && layers.undo() != layers.rollback()
    }

    /// Whether it takes over from a primary that says that it was demoted for it: it has recorded that it has all that that
    /// one had, and gives up nothing that nobody has agreed to.
    #[must_use]
    pub fn is_heir_of(&self, primary: HostId) -> bool {
        let Superblock { released, fence, .. } = &self.superblock;
        *released && fence.holder == primary && !self.gives_up_what_is_kept()
    }

    /// Whether a host follows the same promotion, and has what this copy lacks, which has what that host lacks.
    fn is_split_from(&self, standing: &Standing) -> bool {
        let Superblock { fence, lineage, ends, .. } = &self.superblock;
        // One without generations gave up what it had.
        let is_rival = is_usable(standing) && standing.fence == *fence && !standing.lineage.is_empty();
        is_rival
            && match lineage::relation(lineage, &standing.lineage) {
                Relation::Forked(_) | Relation::Unrelated => true,
                Relation::TheirsIsNewer => standing.ends.lacks(self.position),
                Relation::MineIsNewer => ends.lacks(standing.marker),
                Relation::Same => false,
            }
    }

    /// Why it should not be promoted now, given what the others say. What is not objected to loses nothing that was
    /// answered, as far as anybody who can be heard knows.
    #[must_use]
    pub fn objection(&self, others: &[Heard]) -> Option<Objection> {
        let Superblock { fence, lineage, data, mode, given, released, replaced, touched, ends, .. } =
            &self.superblock;
        let touched = *touched && !planted(Bug::PromoteTouched);
        let heard = || others.iter().filter_map(|other| Some((other.host, other.standing.as_ref()?)));
        if let Some((primary, _)) =
            heard().find(|(_, standing)| standing.role == Role::Primary && standing.serves)
        {
            return Some(Objection::Serves(primary));
        }
        if self.is_connected {
            return Some(Objection::Connected);
        }
        if let Some(newer) = newest_fence(*fence, others) {
            return Some(Objection::Promoted(newer.holder));
        }
        if let Some((other, _)) = heard().find(|(_, standing)| self.is_split_from(standing)) {
            return Some(Objection::Split(other));
        }
        // Whoever was released by the same primary may have been promoted since; that one itself hears of it first.
        let silent = |is_holder: bool| -> Vec<HostId> {
            let silent = others.iter().filter(|other| other.standing.is_none());
            silent.map(|other| other.host).filter(|host| is_holder || *host != fence.holder).collect()
        };
        let unheard = |silent: Vec<HostId>| (!silent.is_empty()).then_some(Objection::Unheard(silent));
        let gives_up = self.gives_up_what_is_kept().then_some(Objection::Kept);
        if *released && !touched {
            return gives_up.or_else(|| unheard(silent(false)));
        }
        // It has all that any other one has.
        let is_demoted = |(host, standing): (HostId, &Standing)| {
            host == fence.holder && is_whole(standing) && !standing.ends.lacks(self.position)
        };
        if fence.holder != self.own && heard().any(is_demoted) {
            return Some(Objection::Demoted(fence.holder));
        }
        if let Some((later, _)) =
            heard().find(|(_, standing)| is_later(standing, lineage, self.position, ends))
        {
            return Some(Objection::Later(later));
        }
        if touched {
            return Some(Objection::Touched);
        }
        if gives_up.is_some() {
            return gives_up;
        }
        if *data == DataState::Inconsistent {
            return Some(Objection::Rollback);
        }
        if fence.holder == self.own && !replaced {
            return unheard(silent(true));
        }
        match given.promise {
            Promise::WhileHeard if self.is_promised => None,
            // What was answered is on so many of the others, or here. Those that were heard have nothing later.
            Promise::Replicas(_) if *mode == Mode::Sync => {
                // One that counts and is a member no more says nothing, either. One that does not count may have been promoted.
                let others = others.iter().map(|other| other.host).filter(|host| *host != fence.holder);
                let counted: BTreeSet<HostId> = others.chain(given.counted.iter().copied()).collect();
                let all = Given { promise: given.promise, counted: counted.into_iter().collect() };
                let standing = |host| heard().find(|(heard, _)| *heard == host);
                unheard(all.in_doubt(|host| standing(host).is_some_and(|(_, its)| holds_its_own(its))))
            }
            Promise::None | Promise::WhileHeard | Promise::Replicas(_) => Some(Objection::Unpromised),
        }
    }

    /// Decides on its promotion, given what the others say; `is_forced` where the operator wants it whatever is objected to.
    ///
    /// # Errors
    /// The objection.
    pub(crate) fn decide(&self, others: &[Heard], is_forced: bool) -> Result<Decision, Objection> {
        if let Some(objection) = self.objection(others).filter(|_| !is_forced) {
            return Err(objection);
        }
        // Where nothing else speaks for it, only the primary's word does.
        let without_word = Self { is_promised: false, ..self.clone() };
        let rests_on_word = !is_forced && without_word.objection(others).is_some();
        Ok(Decision { rests_on_word, is_forced, ..self.decision(others) })
    }

    /// Decides whether it takes over from the primary that was just demoted for it, given what all others say.
    ///
    /// # Errors
    /// The objection.
    pub fn decide_to_succeed(&self, others: &[Heard]) -> Result<Decision, Objection> {
        match self.objection_to_succeeding(others) {
            Some(objection) => Err(objection),
            None => Ok(self.decision(others)),
        }
    }

    fn decision(&self, others: &[Heard]) -> Decision {
        let counts_on = |other: &Heard| other.standing.as_ref().map(|standing| (*standing.given).clone());
        let heard = others.iter().filter_map(|other| Some((other.host, counts_on(other)?)));
        Decision {
            newest: fence_to_raise(self.own, self.superblock.fence, others),
            heard: heard.filter(|(_, given)| given.is_sound()).collect(),
            ..Decision::default()
        }
    }

    /// Why it should not take over from the primary that was just demoted for it, given what all others say: that one
    /// need not know of a host that was promoted out of its reach, and was promoted again itself where its word comes late.
    /// Nobody's silence stands against it. Whoever was released with this host is promoted by force alone while the two hand
    /// over.
    fn objection_to_succeeding(&self, others: &[Heard]) -> Option<Objection> {
        // Its connection is that of the one that was demoted.
        let candidate = Self { is_connected: false, ..self.clone() };
        candidate.objection(others).filter(|objection| !matches!(objection, Objection::Unheard(_)))
    }
}

/// What a copy that says this of itself counts as for others, and for whoever recovers from it, and whether it can roll back
/// to what counts. One that something else wrote to is a mixture without a way back: what was written is in no layer (X4).
#[must_use]
pub fn counts_as(superblock: &Superblock) -> (DataState, bool) {
    match superblock.data {
        DataState::Consistent | DataState::Inconsistent
            if superblock.touched && !planted(Bug::CountTouched) =>
        {
            (DataState::Inconsistent, false)
        }
        data => (data, superblock.layers.rollback().is_some()),
    }
}

/// What a host whose superblock says this counts on as a replica, as far as it could be promoted without force by that. One that
/// was released counts on its primary no more: it hears all others before it is promoted.
#[must_use]
pub fn counts_on(superblock: &Superblock) -> Given {
    let is_counting =
        superblock.role == Role::Replica && superblock.mode == Mode::Sync && !superblock.released;
    if is_counting { superblock.given.clone() } else { Given::NOTHING }
}

/// Whether a copy can be the source of another one, now or when it is promoted (L4).
#[must_use]
pub fn is_usable(standing: &Standing) -> bool {
    match standing.data {
        DataState::Consistent => true,
        DataState::Inconsistent => standing.can_roll_back,
        DataState::Empty => false,
    }
}

/// Whether a copy can be a source and still has all that primaries have copied to it, or that it had as one: it was neither
/// recovered from another one since, nor given up, nor brought back to what it was.
fn holds_its_own(standing: &Standing) -> bool {
    is_usable(standing) && (!standing.replaced || planted(Bug::CountRecovered))
}

/// Whether a former primary that is a replica now still has all that it had.
fn is_whole(standing: &Standing) -> bool {
    standing.role == Role::Replica && standing.data == DataState::Consistent && holds_its_own(standing)
}

/// The newest fence that any of these knows of, if it is newer than `ours` (L5). What they tell of must be in bounds, and
/// the promotion of one of them, which knows best itself whether it was promoted (X2).
#[must_use]
pub fn newest_fence(ours: Fence, others: &[Heard]) -> Option<Fence> {
    let known = others.iter().filter_map(|other| Some(other.standing.as_ref()?.fence));
    let is_credible = |fence: &Fence| {
        let holder = others.iter().find(|other| other.host == fence.holder);
        ours.may_become(*fence) && holder.is_some_and(|holder| !denies(holder.standing.as_ref(), *fence))
    };
    Fence::newest(known.filter(|fence| fence.supersedes(ours) && is_credible(fence)))
}

/// The fence to begin a promotion of this host with, so that the next one is newer than all that others go by: the newest
/// that they know of, also where that is a promotion of this host itself, of which it knows nothing since it lost its state.
#[must_use]
pub fn fence_to_raise(own: HostId, ours: Fence, others: &[Heard]) -> Fence {
    let known = others.iter().filter_map(|other| Some(other.standing.as_ref()?.fence));
    let forgotten = known.filter(|fence| fence.holder == own && ours.may_become(*fence));
    Fence::newest(forgotten.chain(newest_fence(ours, others)).chain([ours])).unwrap_or(ours)
}

/// Whether the holder of a fence, asked how it stands, knows of no such promotion. One that has lost its copy since
/// can't say.
#[must_use]
pub fn denies(standing: Option<&Standing>, fence: Fence) -> bool {
    let of_its_copy = standing.filter(|standing| standing.data != DataState::Empty);
    of_its_copy.is_some_and(|standing| fence.supersedes(standing.fence))
}

/// A member's word that another host was promoted, or that it was itself.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Succeeded {
    /// The fence that it tells of.
    pub fence: Fence,
    /// Who says so.
    pub by: HostId,
}

/// What a running primary makes of such a word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Judgement {
    /// Another host leads.
    Superseded,
    /// This host is a member of the volume no more: neither its word nor its promotion counts (X3).
    Removed(HostId),
    /// The one that is said to have been promoted knows nothing of that (X2).
    Denied,
}

/// What a running primary has heard of that kind.
#[derive(Debug, Default)]
pub struct Claims {
    /// Whose word is being judged.
    judged: BTreeSet<HostId>,
    /// The last fence that each spoke of whose holder denied it.
    denied: BTreeMap<HostId, Fence>,
}

/// How much a word counts before it is judged.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Weight {
    /// It is being judged: a link that begins anew meanwhile is told the same again.
    Nothing,
    /// The one that it is about has denied it before. It is judged once more, and answers go on: one member could stop them
    /// by saying it again and again.
    Denied,
    /// Nothing is answered until it is judged.
    Doubt,
}

impl Claims {
    /// A member's word has come, which is to be judged unless it counts for nothing.
    pub fn hear(&mut self, told: Succeeded) -> Weight {
        match (self.judged.insert(told.by), self.denied.get(&told.by)) {
            (false, _) => Weight::Nothing,
            (true, Some(denied)) if *denied == told.fence => Weight::Denied,
            (true, _) => Weight::Doubt,
        }
    }

    /// It was judged.
    pub fn note(&mut self, told: Succeeded, judgement: Judgement) {
        self.judged.remove(&told.by);
        match judgement {
            Judgement::Denied => self.denied.insert(told.by, told.fence),
            Judgement::Superseded | Judgement::Removed(_) => self.denied.remove(&told.by),
        };
    }
}

impl Succeeded {
    /// Judges the word by what the others said who could be asked. `members` are the other members that this host knows, and
    /// the numbers of their memberships; `removals` are the hosts that any of them but the speaker tells to be removed;
    /// `holder` is how the one stands that is said to have been promoted, where that is another one than the speaker and
    /// could be asked. Nobody's silence stands against the word: two hosts that write are worse than none.
    #[must_use]
    pub fn judge(
        &self,
        members: &[(HostId, u64)],
        removals: &[(HostId, u64)],
        holder: Option<&Standing>,
    ) -> Judgement {
        let is_member = |host: HostId| {
            let known = members.iter().find(|(known, _)| *known == host);
            let is_removed = |known: u64| {
                let mut told = removals.iter().filter(|(removed, _)| *removed == host);
                told.any(|(_, told)| membership::is_removal(*told, known)) && !planted(Bug::BelieveRemoved)
            };
            known.is_some_and(|(_, known)| !is_removed(*known))
        };
        if let Some(removed) = [self.by, self.fence.holder].into_iter().find(|host| !is_member(*host)) {
            return Judgement::Removed(removed);
        }
        let is_third = self.fence.holder != self.by;
        if is_third && denies(holder, self.fence) { Judgement::Denied } else { Judgement::Superseded }
    }
}

/// Whether a host that stands so holds what is newer than `marker` of a copy with these generations, whose content ends
/// there.
#[must_use]
pub fn is_later(standing: &Standing, generations: &[GenerationId], marker: Position, ends: &Ends) -> bool {
    is_usable(standing)
        && (ends.lacks(standing.marker)
            || match lineage::relation(generations, &standing.lineage) {
                Relation::TheirsIsNewer => true,
                Relation::Same => {
                    standing.marker != marker
                        && lineage::later(generations, marker, standing.marker) == standing.marker
                }
                Relation::MineIsNewer | Relation::Forked(_) | Relation::Unrelated => false,
            })
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::layers::testing::catalog;
    use crate::layers::{Catalog, LayerId, Purpose};
    use crate::units::{BlockSize, CopyId, Epoch, Sequence, Session, VolumeId};

    fn host(number: u8) -> HostId {
        HostId([number; 32])
    }

    const A: HostId = HostId([1; 32]);
    const C: HostId = HostId([3; 32]);

    fn position(epoch: u64) -> Position {
        Position { generation: GenerationId([b'a'; 16]), epoch: Epoch(epoch), sequence: Sequence(0) }
    }

    /// A consistent replica b (2) of a (1) that was in sync in this mode, with this promise, for which c (3) counts.
    fn candidate(mode: Mode, promise: Promise) -> Candidate {
        let fence = Fence { counter: 3, holder: A };
        let superblock = Superblock {
            volume: VolumeId([1; 16]),
            copy: CopyId([2; 16]),
            size_bytes: 1 << 20,
            block_size: BlockSize::default(),
            role: Role::Replica,
            data: DataState::Consistent,
            session: Session(0),
            fence,
            position: position(7),
            source: fence,
            lineage: vec![GenerationId([b'a'; 16])],
            adopted: 1,
            layers: Catalog::default(),
            mode,
            given: Given { promise, counted: vec![C] },
            released: false,
            replaced: false,
            touched: false,
            run: Epoch(0),
            ends: Ends::default(),
            agreed: 3,
            heirs: Vec::new(),
        };
        Candidate { own: host(2), superblock, position: position(7), is_connected: false, is_promised: false }
    }

    fn waiting() -> Candidate {
        candidate(Mode::Sync, Promise::Replicas(1))
    }

    fn released() -> Candidate {
        let mut released = candidate(Mode::Async, Promise::None);
        released.superblock.released = true;
        released
    }

    /// How a replica stands that follows host A, whose last epoch there is this one.
    pub(crate) fn standing(epoch: u64) -> Standing {
        Standing {
            role: Role::Replica,
            data: DataState::Consistent,
            can_roll_back: false,
            fence: Fence { counter: 3, holder: A },
            lineage: vec![GenerationId([b'a'; 16])],
            marker: position(epoch),
            serves: false,
            silent_milliseconds: 0,
            dirty_bytes: 0,
            began: Vec::new(),
            ends: Ends::default(),
            replaced: false,
            given: Box::default(),
        }
    }

    /// How a host stands whose superblock says this.
    fn stands_as(superblock: &Superblock) -> Standing {
        let (data, can_roll_back) = counts_as(superblock);
        Standing { data, can_roll_back, ..standing(8) }
    }

    fn silent(host: HostId) -> Heard {
        Heard { host, standing: None }
    }

    fn says(host: HostId, standing: Standing) -> Heard {
        Heard { host, standing: Some(standing) }
    }

    #[test]
    fn what_loses_nothing_is_not_objected_to() {
        let promised = Candidate { is_promised: true, ..candidate(Mode::Sync, Promise::WhileHeard) };
        let failed = Standing { role: Role::Primary, ..standing(7) };
        let mut alone = waiting();
        alone.superblock.given.counted.clear();
        let mut demoted = candidate(Mode::Async, Promise::None);
        demoted.superblock.fence.holder = host(2);
        for (candidate, others) in [
            (alone.clone(), vec![silent(A)]),
            (waiting(), vec![silent(A), says(C, standing(7))]),
            // Two of three must have it: this one does not, so both others would.
            (candidate(Mode::Sync, Promise::Replicas(2)), vec![silent(A), silent(C)]),
            (promised, vec![silent(A), silent(C)]),
            (released(), vec![silent(A)]),
            (released(), vec![silent(A), says(C, standing(7))]),
            // A primary whose disk has failed serves nobody.
            (alone, vec![says(A, failed)]),
            (demoted, vec![says(C, standing(7))]),
            // It gave everything up, and is copied to.
            (waiting(), vec![silent(A), says(C, Standing { lineage: Vec::new(), ..standing(7) })]),
        ] {
            assert_eq!(candidate.objection(&others), None, "{candidate:?} {others:?}");
        }
    }

    #[test]
    fn whatever_may_lose_something_is_objected_to() {
        let serving = Standing { role: Role::Primary, serves: true, ..standing(7) };
        let mut behind = waiting();
        behind.superblock.fence.counter = 2;
        let mut gap = waiting();
        (gap.superblock.data, gap.superblock.layers) = (DataState::Inconsistent, catalog(4, 0));
        let mut demoted = candidate(Mode::Async, Promise::None);
        demoted.superblock.fence.holder = host(2);
        let newer = vec![GenerationId([b'b'; 16]), GenerationId([b'a'; 16])];
        let newer = Standing { lineage: newer, ..standing(1) };
        let forked =
            Standing { lineage: vec![GenerationId([b'x'; 16]), GenerationId([b'a'; 16])], ..standing(7) };
        let mixture = Standing { data: DataState::Inconsistent, ..standing(7) };
        let recovered = Standing { replaced: true, ..standing(7) };
        let mut recovered_here = demoted.clone();
        recovered_here.superblock.replaced = true;
        let connected = Candidate { is_connected: true, ..waiting() };
        let short = Ends::only(GenerationId([b'a'; 16]), Epoch(5));
        let older = Standing { ends: short.clone(), ..standing(4) };
        let older_went_on = Standing { lineage: newer.lineage.clone(), ..older.clone() };
        let mut went_on_here = candidate(Mode::Async, Promise::None);
        (went_on_here.superblock.lineage, went_on_here.superblock.ends) = (newer.lineage.clone(), short);
        let mut released_split = released();
        released_split.superblock.lineage.insert(0, GenerationId([b'b'; 16]));
        let mut split = waiting();
        split.superblock.lineage.insert(0, GenerationId([b'b'; 16]));
        let kept = |mut candidate: Candidate, history| {
            candidate.superblock.agreed = 2;
            candidate.superblock.layers.set(Purpose::Undo, LayerId::new(history));
            candidate
        };
        let unheard = |hosts: &[HostId]| Objection::Unheard(hosts.to_vec());
        let mut uncounted = waiting();
        uncounted.superblock.given.counted.clear();
        let touched = |mut candidate: Candidate| {
            candidate.superblock.touched = true;
            candidate
        };
        let touched_there = stands_as(&touched(waiting()).superblock);
        let promised = Candidate { is_promised: true, ..candidate(Mode::Sync, Promise::WhileHeard) };
        for (candidate, others, objection) in [
            // Something else wrote to it, and whatever was said of it before is of another content.
            (touched(released()), vec![silent(A)], Objection::Touched),
            (touched(released()), vec![silent(A), silent(C)], Objection::Touched),
            (touched(waiting()), vec![silent(A)], Objection::Touched),
            (touched(promised), vec![silent(A)], Objection::Touched),
            (touched(demoted.clone()), vec![says(A, standing(7))], Objection::Touched),
            (touched(kept(released(), 3)), vec![silent(A)], Objection::Touched),
            (touched(gap.clone()), vec![silent(A)], Objection::Touched),
            // The one that released it has all that it had.
            (touched(released()), vec![says(A, standing(7))], Objection::Demoted(A)),
            (touched(waiting()), vec![silent(A), says(C, standing(8))], Objection::Later(C)),
            // Nor is the copy of another host counted on that something else wrote to, whatever it was told.
            (
                candidate(Mode::Async, Promise::None),
                vec![says(A, touched_there.clone())],
                Objection::Unpromised,
            ),
            (waiting(), vec![silent(A), says(C, touched_there)], unheard(&[C])),
            (waiting(), vec![says(A, serving)], Objection::Serves(A)),
            (connected, vec![silent(A)], Objection::Connected),
            (behind, vec![silent(A), says(C, standing(7))], Objection::Promoted(A)),
            (waiting(), vec![silent(A), says(C, standing(8))], Objection::Later(C)),
            (waiting(), vec![silent(A), says(C, newer)], Objection::Later(C)),
            (split.clone(), vec![silent(A), says(C, forked.clone())], Objection::Split(C)),
            (released_split, vec![silent(A), says(C, forked)], Objection::Split(C)),
            // The primary was recovered from an older copy, went on and was demoted: neither has everything.
            (candidate(Mode::Async, Promise::None), vec![says(A, older_went_on)], Objection::Split(A)),
            (went_on_here, vec![says(A, standing(7)), says(C, standing(7))], Objection::Split(A)),
            // It has lost what was written since, and has written nothing.
            (candidate(Mode::Async, Promise::None), vec![says(A, older)], Objection::Unpromised),
            (gap.clone(), vec![silent(A)], Objection::Rollback),
            // A primary that nobody here agreed to might demote itself for this host.
            (kept(released(), 3), vec![silent(A)], Objection::Kept),
            (kept(waiting(), 3), vec![silent(A)], Objection::Kept),
            (kept(gap.clone(), 3), vec![silent(A)], Objection::Kept),
            (kept(gap, 4), vec![silent(A)], Objection::Rollback),
            (kept(waiting(), 3), vec![silent(A), says(C, standing(8))], Objection::Later(C)),
            (demoted, vec![silent(A), says(C, standing(7))], unheard(&[A])),
            // It was demoted while this copy was cut off.
            (candidate(Mode::Async, Promise::None), vec![says(A, standing(7))], Objection::Demoted(A)),
            // The one with everything, not just one with more.
            (
                candidate(Mode::Async, Promise::None),
                vec![says(C, standing(8)), says(A, standing(7))],
                Objection::Demoted(A),
            ),
            // Another host that was released may have been promoted, used and lost.
            (released(), vec![silent(A), silent(C)], unheard(&[C])),
            // It does not count, and may have been promoted by the primary's own operator.
            (uncounted, vec![silent(A), silent(C)], unheard(&[C])),
            // It counts, and was removed since: nobody is asked any more what it has.
            (waiting(), vec![silent(A), says(host(4), standing(7))], unheard(&[C])),
            // Writes went on with one of the two, and it need not have been this one.
            (waiting(), vec![silent(A), silent(C)], unheard(&[C])),
            (waiting(), vec![silent(A), says(C, mixture)], unheard(&[C])),
            // What it had may be lost with its disk.
            (waiting(), vec![silent(A), says(C, recovered.clone())], unheard(&[C])),
            (candidate(Mode::Async, Promise::None), vec![says(A, recovered)], Objection::Unpromised),
            (recovered_here, vec![says(A, standing(7)), says(C, standing(7))], Objection::Unpromised),
            // The primary went on alone, at the latest when its word was over.
            (candidate(Mode::Sync, Promise::WhileHeard), vec![silent(A)], Objection::Unpromised),
            (candidate(Mode::Async, Promise::None), vec![silent(A)], Objection::Unpromised),
            (candidate(Mode::SemiSync, Promise::None), vec![silent(A)], Objection::Unpromised),
        ] {
            assert_eq!(candidate.objection(&others), Some(objection), "{candidate:?} {others:?}");
        }
    }

    /// It asked nobody, and became a second primary beside one that was promoted out of the first one's reach.
    #[test]
    fn a_host_takes_over_unless_one_that_is_heard_knows_better() {
        let fence = Fence { counter: 4, holder: C };
        let promoted = Standing { fence, ..standing(7) };
        let serving = Standing { role: Role::Primary, serves: true, fence, ..standing(7) };
        let again = Standing { fence: Fence { holder: A, ..fence }, ..serving.clone() };
        let forked =
            Standing { lineage: vec![GenerationId([b'x'; 16]), GenerationId([b'a'; 16])], ..standing(7) };
        let mut split = released();
        split.superblock.lineage.insert(0, GenerationId([b'b'; 16]));
        let mut kept = released();
        (kept.superblock.agreed, kept.superblock.layers) = (2, catalog(0, 3));
        let connected = Candidate { is_connected: true, ..released() };
        let mut touched = released();
        touched.superblock.touched = true;
        for (candidate, others, objection) in [
            (released(), vec![], None),
            (connected, vec![says(C, standing(7))], None),
            (released(), vec![silent(C)], None),
            (released(), vec![says(C, serving)], Some(Objection::Serves(C))),
            (released(), vec![says(C, promoted)], Some(Objection::Promoted(C))),
            (released(), vec![says(A, standing(7))], None),
            (released(), vec![says(A, again.clone())], Some(Objection::Serves(A))),
            (released(), vec![says(A, Standing { serves: false, ..again })], Some(Objection::Promoted(A))),
            (split, vec![says(C, forked)], Some(Objection::Split(C))),
            (kept, vec![silent(C)], Some(Objection::Kept)),
            (touched, vec![silent(C)], Some(Objection::Touched)),
        ] {
            let decided = candidate.decide_to_succeed(&others);
            assert_eq!(decided.err(), objection, "{candidate:?} {others:?}");
        }
    }

    #[test]
    fn a_replica_in_the_mode_sync_counts_on_what_it_was_given_until_it_is_released() {
        let counting = waiting().superblock;
        assert_eq!(counts_on(&counting), counting.given);
        let released = Superblock { released: true, ..counting.clone() };
        let primary = Superblock { role: Role::Primary, ..counting.clone() };
        for other in [released, primary, Superblock { mode: Mode::SemiSync, ..counting }] {
            assert_eq!(counts_on(&other), Given::NOTHING, "{other:?}");
        }
    }

    #[test]
    fn what_was_decided_says_what_it_rests_on() {
        let heard = |candidate: &Candidate, is_forced| {
            candidate.decide(&[silent(A), says(C, standing(7))], is_forced).map(|decision| {
                assert_eq!((decision.is_forced, decision.heard), (is_forced, vec![(C, Given::NOTHING)]));
                decision.rests_on_word
            })
        };
        let unpromised = candidate(Mode::Sync, Promise::WhileHeard);
        let on_word = Candidate { is_promised: true, ..unpromised.clone() };
        assert_eq!(heard(&unpromised, false), Err(Objection::Unpromised));
        assert_eq!(heard(&on_word, false), Ok(true), "nothing else speaks for it");
        assert_eq!((heard(&waiting(), false), heard(&released(), false)), (Ok(false), Ok(false)));
        assert_eq!((heard(&unpromised, true), heard(&on_word, true)), (Ok(false), Ok(false)));
        // A forced promotion, too, is newer than all that was told of.
        let newer = Standing { fence: Fence { counter: 9, holder: C }, ..standing(7) };
        let forced = waiting().decide(&[says(C, newer)], true).unwrap();
        assert_eq!(forced.newest, Fence { counter: 9, holder: C });
    }

    /// A copy that was mounted and written was a source for others, and counted as later than a good one.
    #[test]
    fn a_copy_that_something_else_wrote_to_is_nobodys_source() {
        for (data, gap) in [(DataState::Consistent, 0), (DataState::Inconsistent, 4)] {
            let good = Superblock { data, layers: catalog(gap, 0), ..waiting().superblock };
            assert_eq!(counts_as(&good), (data, gap != 0));
            let touched = Superblock { touched: true, ..good };
            assert_eq!(counts_as(&touched), (DataState::Inconsistent, false));
            let standing = stands_as(&touched);
            assert!(!is_usable(&standing) && !holds_its_own(&standing) && !is_whole(&standing));
            let Superblock { lineage, ends, .. } = waiting().superblock;
            assert!(!is_later(&standing, &lineage, position(1), &ends));
        }
        let empty = Superblock { data: DataState::Empty, touched: true, ..waiting().superblock };
        assert_eq!(counts_as(&empty), (DataState::Empty, false));
    }

    #[test]
    fn a_copy_that_is_no_image_of_the_volume_is_never_promoted() {
        let mut mixture = waiting();
        mixture.superblock.data = DataState::Inconsistent;
        assert_eq!(mixture.obstacle(), Some(Obstacle::Mixture));
        mixture.superblock.layers = catalog(3, 0);
        assert_eq!(mixture.obstacle(), None);
        mixture.superblock.data = DataState::Empty;
        assert_eq!(mixture.obstacle(), Some(Obstacle::Empty));
    }

    /// A host that was removed and promoted itself stopped a primary that had not heard of the removal yet.
    #[test]
    fn a_word_of_a_promotion_counts_while_speaker_and_holder_are_members_and_none_denies_it() {
        use Judgement::{Denied, Removed, Superseded};
        let b = host(2);
        let members = [(b, 2), (C, 0)];
        let claims = |holder, by| Succeeded { fence: Fence { counter: 5, holder }, by };
        let knows = |counter| Standing { fence: Fence { counter, holder: C }, ..standing(7) };
        let (denies, confirms) = (knows(4), knows(5));
        for (what, word, removals, holder, judged) in [
            ("nobody else can be reached", claims(b, b), vec![], None, Superseded),
            ("the others know of no removal", claims(b, b), vec![(C, 1)], None, Superseded),
            ("one knows that it was removed", claims(b, b), vec![(b, 3)], None, Removed(b)),
            ("it has joined again since", claims(b, b), vec![(b, 1)], None, Superseded),
            ("that is no removal", claims(b, b), vec![(b, 4)], None, Superseded),
            ("that is out of bounds", claims(b, b), vec![(b, 3 + membership::STEP)], None, Superseded),
            ("it was removed here meanwhile", claims(A, A), vec![], None, Removed(A)),
            ("the holder is silent", claims(C, b), vec![], None, Superseded),
            ("the holder says so", claims(C, b), vec![], Some(&confirms), Superseded),
            ("the holder denies it", claims(C, b), vec![], Some(&denies), Denied),
            ("the holder was removed", claims(C, b), vec![(C, 1)], Some(&confirms), Removed(C)),
            ("the speaker was removed", claims(C, b), vec![(b, 3)], Some(&confirms), Removed(b)),
            ("the holder is none of the volume's", claims(host(9), b), vec![], None, Removed(host(9))),
        ] {
            assert_eq!(word.judge(&members, &removals, holder), judged, "{what}");
        }
    }

    /// A word that its subject denied stopped all answers once more each time that it was said again.
    #[test]
    fn a_word_that_was_denied_stops_no_answers_when_it_is_said_again() {
        let told = |counter| Succeeded { fence: Fence { counter, holder: C }, by: host(2) };
        let mut claims = Claims::default();
        assert_eq!(claims.hear(told(5)), Weight::Doubt);
        assert_eq!(claims.hear(told(5)), Weight::Nothing, "it is being judged");
        claims.note(told(5), Judgement::Denied);
        assert_eq!(claims.hear(Succeeded { by: host(4), ..told(5) }), Weight::Doubt, "another one says it");
        assert_eq!(claims.hear(told(5)), Weight::Denied);
        claims.note(told(5), Judgement::Denied);
        assert_eq!(claims.hear(told(6)), Weight::Doubt, "it may have been promoted since");
        claims.note(told(6), Judgement::Removed(C));
        assert_eq!(claims.hear(told(5)), Weight::Doubt);
    }

    /// One member could stop every primary by a fence that it made up, or that of a host that does not exist.
    #[test]
    fn a_fence_counts_in_bounds_as_its_holder_says() {
        let fence = |counter, holder| Fence { counter, holder: host(holder) };
        let tells = |number, fence| says(host(number), Standing { fence, ..standing(7) });
        let lost = Standing { data: DataState::Empty, fence: Fence::default(), ..standing(0) };
        for (what, others, newer) in [
            ("nobody knows of a later one", [tells(2, fence(4, 1)), tells(3, fence(4, 1))], None),
            ("its holder says so", [tells(2, fence(5, 2)), silent(host(3))], Some(fence(5, 2))),
            ("its holder is silent", [silent(host(2)), tells(3, fence(5, 2))], Some(fence(5, 2))),
            (
                "its holder was promoted again",
                [tells(2, fence(6, 2)), tells(3, fence(5, 2))],
                Some(fence(6, 2)),
            ),
            ("its holder denies it", [tells(2, fence(4, 1)), tells(3, fence(5, 2))], None),
            ("its holder lost its copy", [says(host(2), lost), tells(3, fence(5, 2))], Some(fence(5, 2))),
            ("its holder is none of the volume's", [silent(host(2)), tells(3, fence(5, 9))], None),
            ("it is this host's own", [silent(host(2)), tells(3, fence(5, 1))], None),
            ("it is out of bounds", [silent(host(2)), tells(3, fence(u64::MAX, 3))], None),
            ("it is too far ahead", [silent(host(2)), tells(3, fence(5 + Fence::STEP, 3))], None),
        ] {
            assert_eq!(newest_fence(fence(4, 1), &others), newer, "{what}");
        }
    }

    /// A host that was promoted, lost its state and joined again was promoted with a number that all others refused.
    #[test]
    fn a_promotion_is_newer_than_one_of_the_same_host_that_it_has_forgotten() {
        let fence = |counter, holder| Fence { counter, holder: host(holder) };
        let tells = |number, fence| says(host(number), Standing { fence, ..standing(7) });
        for (others, raised) in [
            ([tells(2, fence(4, 2)), tells(3, fence(4, 2))], fence(4, 2)),
            ([tells(2, fence(4, 2)), tells(3, fence(7, 1))], fence(7, 1)),
            ([tells(2, fence(8, 2)), tells(3, fence(7, 1))], fence(8, 2)),
            ([silent(host(2)), tells(3, fence(7 + Fence::STEP, 1))], fence(4, 2)),
        ] {
            assert_eq!(fence_to_raise(host(1), fence(4, 2), &others), raised);
        }
    }
}
