//! How a primary ends (L5): demoted by its operator, perhaps for another host that takes over, or superseded by one that
//! was promoted meanwhile.
//!
//! A [`Handover`] gives one [`Step`] at a time, and goes on with what came of it ([`Event`]). That this host is a replica is
//! durable before any other one is told that it may be promoted, so a crash between any two steps leaves no primary rather
//! than two. Where it is not known whether the other host was promoted, this one does not go on as if it were not: what it
//! was told may still be on its way.

use crate::disk::superblock::{Role, Superblock};
use crate::planted::{Bug, planted};
use crate::rebuild::Progress;
use crate::replica::promotion;
use crate::terms::Fence;
use crate::tracker::Tracker;
use crate::units::{GenerationId, HostId, Position};
use crate::wire::message::Standing;

/// How often a host is asked how it stands, until it counts as silent.
const QUESTIONS: u32 = 3;

/// What the shell does next.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Step {
    /// Take no more requests, and make durable what was taken.
    Close,
    /// Record durably that this host is a replica ([`End::record`]): in order, or because another host was promoted with this
    /// fence.
    Record(Option<Fence>),
    /// Tell the replicas in sync that they have everything, and wait for some time until they have recorded it. Record here who
    /// has ([`crate::replica::consent::bequeath`]): what another one lacks is not given up for it.
    Release,
    /// Have this host take over. It is told once: what comes late would count twice.
    TakeOver(HostId),
    /// Ask this host how it stands.
    Ask(HostId),
    /// Ask all hosts who leads.
    AskAll,
}

/// What came of a step.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// Everything is durable here, or it can't be.
    Closed(bool),
    /// Another host was promoted with this fence. Counts until it is recorded here that this host is a replica: whoever is a
    /// replica hears it from the greeting.
    Superseded(Fence),
    /// It is recorded, or that failed.
    Recorded(bool),
    /// These have recorded that they have everything.
    Released(Vec<HostId>),
    /// The other host says that it was promoted with this fence, and serves.
    TookOver(Fence),
    /// It says that it does not take over.
    Refused,
    /// It was told, and no answer came that makes sense.
    Unanswered,
    /// How the one stands that was asked; nothing where it is silent.
    Stands(Option<Box<Standing>>),
    /// The newest promotion that those know of who were asked, where it is a newer one
    /// ([`crate::succession::newest_fence`]).
    Leads(Option<Fence>),
}

/// How it ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Not everything could be made durable: this host is the primary still.
    Undurable,
    /// Whether this host is the primary still or a replica is what its superblock says.
    Unrecorded,
    /// This host is a replica, and these have everything.
    Demoted(Vec<HostId>),
    /// Another host was promoted with this fence, and this one follows it.
    TakenOver {
        /// The fence.
        fence: Fence,
        /// Whether it serves.
        serves: bool,
    },
    /// The other host was not promoted, nor will be by what it was told: this one is promoted again.
    GoesOn(Reason),
    /// The same, but a third host was promoted with this fence out of this one's reach: this one follows it.
    Superseded {
        /// The fence.
        fence: Fence,
        /// Why the other one did not take over.
        reason: Reason,
    },
    /// It was told to take over, and it is not known whether it did: this host is a replica.
    Unknown,
}

/// Why another host did not take over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reason {
    /// It did not record in time that it has everything.
    Unreleased,
    /// The same, and it is silent. It may have recorded it, and its operator may promote it: nothing is answered here
    /// before it follows again.
    UnreleasedAndSilent,
    /// It refused.
    Refused,
}

/// Whether a primary may be demoted in order, perhaps for another host. One whose own copy lacks something (S4) is no image, so it can't
/// be promoted again: not where it is to take over itself what another host does not, and not while it alone has what the source
/// lacks. With a source that is lost to it there is nothing to wait for.
///
/// # Errors
/// The host that has what is absent here.
pub fn may_begin(tracker: &Tracker, to: Option<HostId>) -> Result<(), HostId> {
    let Some(Progress { source, is_source_lost, .. }) = tracker.rebuild() else { return Ok(()) };
    let may_end = is_source_lost || tracker.is_in_sync(source);
    if to.is_none() && may_end { Ok(()) } else { Err(source) }
}

/// A primary that is being demoted, perhaps for another host.
#[derive(Debug)]
pub struct Handover {
    /// The fence of this primary.
    ours: Fence,
    /// Who is to take over, if anybody.
    to: Option<HostId>,
    phase: Phase,
}

#[derive(Debug)]
enum Phase {
    Closing,
    Recording,
    /// Another host was promoted with this fence before it was recorded.
    RecordingSuperseded(Fence),
    Releasing,
    TakingOver(HostId),
    /// Asking how it stands, for the time after so many; and what came before.
    Asking(HostId, u32, Before),
    /// It goes on, for this reason, unless somebody else leads.
    Confirming(Reason),
    Ended(Outcome),
}

/// What came before a host is asked how it stands.
#[derive(Clone, Copy, Debug)]
enum Before {
    Unreleased,
    Refused,
    Unanswered,
}

impl Handover {
    /// Of a primary with this fence; `to` is to take over.
    #[must_use]
    pub fn new(ours: Fence, to: Option<HostId>) -> Self {
        Self { ours, to, phase: Phase::Closing }
    }

    /// What to do now, or how it ended. The same until an event is handled.
    ///
    /// # Errors
    /// The outcome, when nothing is left to do.
    pub fn step(&self) -> Result<Step, &Outcome> {
        match &self.phase {
            Phase::Closing => Ok(Step::Close),
            Phase::Recording => Ok(Step::Record(None)),
            Phase::RecordingSuperseded(fence) => Ok(Step::Record(Some(*fence))),
            Phase::Releasing => Ok(Step::Release),
            Phase::TakingOver(host) => Ok(Step::TakeOver(*host)),
            Phase::Asking(host, ..) => Ok(Step::Ask(*host)),
            Phase::Confirming(_) => Ok(Step::AskAll),
            Phase::Ended(outcome) => Err(outcome),
        }
    }

    /// Who is to take over, if anybody.
    #[must_use]
    pub fn to(&self) -> Option<HostId> {
        self.to
    }

    /// Takes what came of the step; anything else is ignored.
    pub fn handle(&mut self, event: Event) {
        let next = match (&self.phase, event) {
            (Phase::Closing, Event::Closed(true)) => Phase::Recording,
            (Phase::Closing, Event::Closed(false)) => Phase::Ended(Outcome::Undurable),
            (Phase::Recording, Event::Recorded(true)) => Phase::Releasing,
            (Phase::Recording | Phase::RecordingSuperseded(_), Event::Recorded(false)) => {
                Phase::Ended(Outcome::Unrecorded)
            }
            // Nobody is released by it: what it answered is missing there.
            (Phase::Closing | Phase::Recording, Event::Superseded(fence)) if self.is_newer(fence) => {
                Phase::RecordingSuperseded(fence)
            }
            (Phase::RecordingSuperseded(fence), Event::Recorded(true)) => {
                Phase::Ended(Outcome::TakenOver { fence: *fence, serves: false })
            }
            (Phase::Releasing, Event::Released(released)) => match self.to {
                None => Phase::Ended(Outcome::Demoted(released)),
                Some(to) if released.contains(&to) => Phase::TakingOver(to),
                // It may have recorded it, and its operator may have promoted it at once.
                Some(to) => Phase::Asking(to, 0, Before::Unreleased),
            },
            (Phase::TakingOver(_), Event::TookOver(fence)) if self.is_newer(fence) => {
                Phase::Ended(Outcome::TakenOver { fence, serves: true })
            }
            (Phase::TakingOver(to), Event::Refused) => Phase::Asking(*to, 0, Before::Refused),
            (Phase::TakingOver(to), Event::Unanswered | Event::TookOver(_)) => {
                Phase::Asking(*to, 0, Before::Unanswered)
            }
            (Phase::Asking(.., before), Event::Stands(Some(standing))) => self.stands(*before, &standing),
            (Phase::Asking(to, asked, before), Event::Stands(None)) if asked + 1 < QUESTIONS => {
                Phase::Asking(*to, asked + 1, *before)
            }
            (Phase::Asking(_, _, Before::Unreleased), Event::Stands(None)) => {
                Phase::Confirming(Reason::UnreleasedAndSilent)
            }
            (Phase::Asking(..), Event::Stands(None)) => Phase::Ended(Outcome::Unknown),
            (Phase::Confirming(reason), Event::Leads(leads)) => {
                let superseded = leads.filter(|fence| self.is_newer(*fence));
                Phase::Ended(match superseded {
                    Some(fence) => Outcome::Superseded { fence, reason: *reason },
                    None => Outcome::GoesOn(*reason),
                })
            }
            _ => return,
        };
        self.phase = next;
    }

    fn is_newer(&self, fence: Fence) -> bool {
        fence.supersedes(self.ours) && self.ours.may_become(fence)
    }

    fn stands(&self, before: Before, standing: &Standing) -> Phase {
        if self.is_newer(standing.fence) {
            // Who was promoted and is a replica again was so by somebody who was promoted later.
            let serves = standing.role == Role::Primary && standing.serves;
            return Phase::Ended(Outcome::TakenOver { fence: standing.fence, serves });
        }
        match before {
            Before::Unreleased => Phase::Confirming(Reason::Unreleased),
            Before::Refused => Phase::Confirming(Reason::Refused),
            Before::Unanswered if planted(Bug::GoOnUnanswered) => Phase::Confirming(Reason::Refused),
            // What it was told may still be on its way.
            Before::Unanswered => Phase::Ended(Outcome::Unknown),
        }
    }
}

/// What a primary's superblock says once it is a replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct End {
    /// The fence that it goes by from then on.
    fence: Fence,
    /// Where its content stands.
    position: Position,
    /// Whether it answered what the host that was promoted lacks.
    lacks: bool,
    /// The newest generation in which anything was answered, where those after it go.
    answered: Option<GenerationId>,
}

impl End {
    /// Of a primary with this fence that is closed, and hands over in order: whoever is released has everything.
    #[must_use]
    pub fn in_order(tracker: &Tracker, ours: Fence) -> Self {
        Self { fence: ours, position: tracker.reached(), lacks: false, answered: None }
    }

    /// Of a primary with the fence `ours` that runs, and was superseded by the holder of `fence`.
    #[must_use]
    pub fn superseded(tracker: &Tracker, ours: Fence, fence: Fence) -> Self {
        // Where others were promoted in between, what that one holds may have come from any of them.
        let lacks = if fence.is_next_after(ours) {
            tracker.lacks_answered(fence.holder)
        } else {
            tracker.any_lacks_answered()
        };
        let answered = tracker.answered_generation(fence.holder);
        Self { fence, position: tracker.reached(), lacks, answered }
    }

    /// Of a primary that was superseded while it did not run. What it wrote last and never delivered is lost, as with any
    /// crash of a primary whose replica was promoted; it is saved as it is overwritten (L3).
    #[must_use]
    pub fn found(superblock: &Superblock, fence: Fence) -> Self {
        Self { fence, position: superblock.stands(), lacks: false, answered: None }
    }

    /// Whether a generation of its own is begun for what it answered alone: that is not lost without the operator's word
    /// (L3, L6).
    #[must_use]
    pub fn needs_generation(&self) -> bool {
        self.lacks
    }

    /// Makes the superblock say so. `own` names the generation that is begun, where it needs one.
    ///
    /// # Panics
    /// When it needs one and there is none.
    pub fn record(&self, superblock: &mut Superblock, own: Option<GenerationId>) {
        let own = own.filter(|_| self.lacks);
        assert!(own.is_some() || !self.lacks, "what was answered alone has a generation of its own");
        promotion::record_demotion(superblock, self.fence, self.position, own, self.answered);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lineage::Ends;
    use crate::promise::PATIENCE;
    use crate::terms::{DataState, Mode};
    use crate::tracker::replies::ReplicaLoss;

    const OTHER: HostId = HostId([2; 32]);
    const OURS: Fence = Fence { counter: 3, holder: HostId([1; 32]) };
    const THEIRS: Fence = Fence { counter: 4, holder: OTHER };

    fn standing(role: Role, fence: Fence) -> Event {
        Event::Stands(Some(Box::new(Standing {
            role,
            data: DataState::Consistent,
            can_roll_back: false,
            fence,
            lineage: Vec::new(),
            marker: Position::default(),
            serves: role == Role::Primary,
            silent_milliseconds: 0,
            dirty_bytes: 0,
            began: Vec::new(),
            ends: Ends::default(),
            replaced: false,
            given: Box::default(),
        })))
    }

    /// A handover to another host, after these events; each must be an answer to the step that was asked for.
    fn after(events: impl IntoIterator<Item = Event>) -> Handover {
        let mut handover = Handover::new(OURS, Some(OTHER));
        for event in events {
            let before = format!("{:?}", handover.phase);
            handover.handle(event.clone());
            assert_ne!(before, format!("{:?}", handover.phase), "{event:?} is no answer to {before}");
        }
        handover
    }

    fn released() -> [Event; 3] {
        [Event::Closed(true), Event::Recorded(true), Event::Released(vec![OTHER])]
    }

    fn unreleased() -> [Event; 3] {
        [Event::Closed(true), Event::Recorded(true), Event::Released(Vec::new())]
    }

    /// Another host, that lacked it, was promoted in between, and the newest holder had followed that one.
    #[test]
    fn what_any_host_may_lack_that_was_promoted_since_is_not_lost_without_a_word() {
        use crate::tracker::testing::{following, host, lagging, tracker};
        let sessions = vec![following(2, Mode::Async), lagging(3)];
        let tracker = tracker(sessions, ReplicaLoss::Continue, PATIENCE);
        for (holder, counter, is_lost) in [(2, 4, false), (3, 4, true), (2, 5, true), (4, 4, true)] {
            let end = End::superseded(&tracker, OURS, Fence { counter, holder: host(holder) });
            assert_eq!(end.needs_generation(), is_lost, "{holder} with {counter}");
        }
    }

    #[test]
    fn nobody_is_told_before_it_is_recorded_here() {
        let mut handover = Handover::new(OURS, Some(OTHER));
        for (event, step) in [
            (None, Step::Close),
            (Some(Event::Closed(true)), Step::Record(None)),
            (Some(Event::Recorded(true)), Step::Release),
            (Some(Event::Released(vec![OTHER])), Step::TakeOver(OTHER)),
        ] {
            event.into_iter().for_each(|event| handover.handle(event));
            assert_eq!(handover.step(), Ok(step));
            // What is no answer to that changes nothing.
            for stray in [Event::Stands(None), standing(Role::Primary, THEIRS)] {
                handover.handle(stray);
                assert_eq!(handover.step(), Ok(step));
            }
        }
        for (event, outcome) in
            [(Event::Closed(false), Outcome::Undurable), (Event::Recorded(false), Outcome::Unrecorded)]
        {
            let first = matches!(event, Event::Recorded(_)).then_some(Event::Closed(true));
            let handover = after(first.into_iter().chain([event]));
            assert_eq!(handover.step(), Err(&outcome));
        }
    }

    /// It was demoted in order, which agrees to whoever is promoted next, and what it had answered was overwritten.
    #[test]
    fn a_promotion_that_is_heard_of_before_it_is_recorded_ends_it() {
        let superseded = || Event::Superseded(THEIRS);
        let closed = [Event::Closed(true)];
        for before in [&closed[..0], &closed[..]] {
            let mut handover = after(before.iter().cloned());
            // One that is no newer, or that this host can't have been followed by, changes nothing.
            handover.handle(Event::Superseded(OURS));
            handover.handle(Event::Superseded(Fence { counter: u64::MAX, ..THEIRS }));
            assert!(matches!(handover.step(), Ok(Step::Close | Step::Record(None))), "{handover:?}");
            handover.handle(superseded());
            assert_eq!(handover.step(), Ok(Step::Record(Some(THEIRS))));
            handover.handle(Event::Recorded(true));
            assert_eq!(handover.step(), Err(&Outcome::TakenOver { fence: THEIRS, serves: false }));
        }
        let unrecorded = after([superseded(), Event::Recorded(false)]);
        assert_eq!(unrecorded.step(), Err(&Outcome::Unrecorded));
        // A replica hears it from the greeting.
        let mut recorded = after([Event::Closed(true), Event::Recorded(true)]);
        recorded.handle(superseded());
        assert_eq!(recorded.step(), Ok(Step::Release));
    }

    #[test]
    fn it_goes_on_only_where_the_other_one_was_not_promoted_nor_will_be() {
        let (replica, promoted) = (standing(Role::Replica, OURS), standing(Role::Primary, THEIRS));
        let silence = || vec![Event::Stands(None); QUESTIONS as usize];
        let taken = |serves| Outcome::TakenOver { fence: THEIRS, serves };
        let leads = |fence| Event::Leads(fence);
        let third = Fence { counter: 4, holder: HostId([3; 32]) };
        let unheard_of = Fence { counter: u64::MAX, holder: OTHER };
        for (events, outcome) in [
            ([&released()[..], &[Event::TookOver(THEIRS)]].concat(), taken(true)),
            (
                [&released()[..], &[Event::Refused, replica.clone(), leads(None)]].concat(),
                Outcome::GoesOn(Reason::Refused),
            ),
            (
                [&released()[..], &[Event::Refused, replica.clone(), leads(Some(third))]].concat(),
                Outcome::Superseded { fence: third, reason: Reason::Refused },
            ),
            (
                [&released()[..], &[Event::Refused, replica.clone(), leads(Some(unheard_of))]].concat(),
                Outcome::GoesOn(Reason::Refused),
            ),
            ([&released()[..], &[Event::Refused, promoted.clone()]].concat(), taken(true)),
            // It was promoted, and so was another one since.
            ([&released()[..], &[Event::Refused, standing(Role::Replica, THEIRS)]].concat(), taken(false)),
            ([&released()[..], &[Event::Refused], &silence()].concat(), Outcome::Unknown),
            // What it was told may arrive after it was asked.
            ([&released()[..], &[Event::Unanswered, replica.clone()]].concat(), Outcome::Unknown),
            ([&released()[..], &[Event::TookOver(OURS), replica.clone()]].concat(), Outcome::Unknown),
            ([&released()[..], &[Event::TookOver(unheard_of), replica.clone()]].concat(), Outcome::Unknown),
            ([&released()[..], &[Event::Unanswered, promoted.clone()]].concat(), taken(true)),
            ([&released()[..], &[Event::Unanswered], &silence()].concat(), Outcome::Unknown),
            ([&unreleased()[..], &[replica, leads(None)]].concat(), Outcome::GoesOn(Reason::Unreleased)),
            ([&unreleased()[..], &[Event::Stands(None), promoted]].concat(), taken(true)),
            (
                [&unreleased()[..], &silence(), &[leads(None)]].concat(),
                Outcome::GoesOn(Reason::UnreleasedAndSilent),
            ),
        ] {
            let handover = after(events.clone());
            assert_eq!(handover.step(), Err(&outcome), "{events:?}");
        }
    }

    #[test]
    fn a_demotion_tells_who_has_everything() {
        let mut handover = Handover::new(OURS, None);
        released().into_iter().for_each(|event| handover.handle(event));
        assert_eq!(handover.step(), Err(&Outcome::Demoted(vec![OTHER])));
    }
}
