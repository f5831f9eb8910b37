//! Whether a primary may overwrite this copy for good, or only where what it overwrites is kept until this host's operator
//! agrees (L6).
//!
//! Any host of the volume can be promoted: by its own operator, by a mistake, or because its key was stolen. The others
//! can't tell these apart, and follow whoever holds the newest fence (L5). So a copy gives nothing up on the word of
//! another host alone. After a change of primary in which this host took no part, all that is overwritten here is saved
//! first, in the history, beyond the commit. [`super::undo`] brings it back; the operator's word that he agrees gives the
//! room back.
//!
//! A host agrees to the holder of a fence
//! - whose content is the first that it gets, or takes the place of a mixture without a way back: nothing is lost;
//! - that is this host itself: its operator promoted it;
//! - that was promoted next after a primary which was demoted in order (`switch`, `demote`), where this host had recorded
//!   that it has everything, unless that primary was one that it had not agreed to; or where it was that primary, and has
//!   recorded that the other one has everything;
//! - to whom its operator gave this host's content up (`resolve`);
//! - whom it follows when its operator says so (`forget`), or when there was no room to keep anything and the operator had
//!   chosen that resyncs go on then.
//!
//! An `undo` takes that back: whoever overwrites what was brought back has it kept once more. A program that
//! promotes by itself counts as the operator where this host asks it, and tells so by [`super::Replica::agree`].

use super::change::StateChange;
use super::resolve::Keep;
use crate::disk::superblock::{HEIRS_LIMIT, Superblock};
use crate::planted::{Bug, planted};
use crate::terms::{DataState, Fence};
use crate::units::HostId;
use crate::wire::message::MEMBERS_LIMIT;

const _: () = assert!(HEIRS_LIMIT >= MEMBERS_LIMIT, "heirs are members");

/// Which layer must keep what the holder of this fence overwrites, before its greeting is answered: none where it may
/// overwrite this copy for good. An older history stays; it leads back to more.
#[must_use]
pub fn keep(superblock: &Superblock, fence: Fence) -> Keep {
    if is_agreed_to(superblock, fence) || planted(Bug::FollowUnagreed) {
        return Keep::Nothing;
    }
    match (superblock.data, superblock.layers.rollback(), superblock.layers.undo()) {
        (DataState::Empty, _, _) | (DataState::Inconsistent, None, None) => Keep::Nothing,
        (DataState::Consistent, _, None) => Keep::NewLayer,
        (DataState::Inconsistent, Some(rollback), None) => Keep::Layer(rollback),
        (_, _, Some(undo)) => Keep::Layer(undo),
    }
}

fn is_agreed_to(superblock: &Superblock, fence: Fence) -> bool {
    let is_next = fence.counter == superblock.fence.counter + 1;
    let Superblock { released, heirs, .. } = superblock;
    let is_heir = heirs.contains(&fence.holder) || !heirs.is_empty() && planted(Bug::AgreeToAnybody);
    fence.counter <= superblock.agreed || is_next && (is_heir || *released && is_given(superblock))
}

/// This host hears, before it is greeted, that the holder of this fence was promoted.
pub fn follow(superblock: &mut Superblock, fence: Fence) {
    let agrees = keep(superblock, fence) == Keep::Nothing;
    StateChange::Follow { fence, agrees }.apply(superblock);
}

/// This host was demoted in order, and these have recorded that they have all that it has.
pub fn bequeath(superblock: &mut Superblock, heirs: &[HostId]) {
    superblock.heirs = heirs.iter().copied().take(HEIRS_LIMIT).collect();
}

/// Whether this host agrees to the primary that it follows, or followed last.
#[must_use]
pub fn is_given(superblock: &Superblock) -> bool {
    superblock.agreed >= superblock.fence.counter
}

/// Whether the history keeps what a primary overwrote to whom this host has not agreed.
#[must_use]
pub fn is_awaited(superblock: &Superblock) -> bool {
    superblock.layers.undo().is_some() && !is_given(superblock)
}

/// The operator agrees to whom this host follows.
pub(super) fn give(superblock: &mut Superblock) {
    superblock.agreed = superblock.agreed.max(superblock.fence.counter);
}

/// The operator brings back what this host had: he agrees to nobody who overwrote it.
pub(super) fn withdraw(superblock: &mut Superblock) {
    superblock.agreed = superblock.agreed.min(superblock.fence.counter.saturating_sub(1));
    superblock.heirs.clear();
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layers::testing::{catalog, layer};
    use crate::layers::{Catalog, Purpose};
    use crate::replica::tests::superblock;
    use crate::replica::{StateChange, promotion, resolve, undo};
    use crate::units::{GenerationId, Position};

    fn fence(counter: u64, holder: u8) -> Fence {
        Fence { counter, holder: HostId([holder; 32]) }
    }

    /// A consistent replica of the host 1, to whom it agrees, of the fence 4.
    fn following() -> Superblock {
        Superblock { fence: fence(4, 1), agreed: 4, ..superblock("ba") }
    }

    #[test]
    fn what_a_primary_overwrites_to_whom_nobody_agreed_is_kept() {
        let released = || Superblock { released: true, ..following() };
        let unagreed = || Superblock { agreed: 3, ..following() };
        let history = || Superblock { layers: catalog(0, 7), ..following() };
        let gap = || Superblock { data: DataState::Inconsistent, layers: catalog(8, 0), ..following() };
        let mixture = || Superblock { layers: Catalog::default(), ..gap() };
        let empty = || Superblock { data: DataState::Empty, ..following() };
        let handed_on = Superblock { released: true, ..unagreed() };
        let demoted = Superblock { heirs: vec![HostId([2; 32])], ..following() };
        for (what, superblock, greeting, expected) in [
            ("whom it follows", following(), fence(4, 1), Keep::Nothing),
            ("a host that promoted itself", following(), fence(5, 2), Keep::NewLayer),
            ("one far ahead", following(), fence(400, 2), Keep::NewLayer),
            ("whom it recorded and has not met", unagreed(), fence(4, 1), Keep::NewLayer),
            ("the next after one that was demoted", released(), fence(5, 2), Keep::Nothing),
            ("a later one", released(), fence(6, 2), Keep::NewLayer),
            ("the next after one that nobody agreed to", handed_on, fence(5, 2), Keep::NewLayer),
            (
                "the next after this host itself, which has everything",
                demoted.clone(),
                fence(5, 2),
                Keep::Nothing,
            ),
            ("one that was not released", demoted.clone(), fence(5, 3), Keep::NewLayer),
            ("the one after that", demoted, fence(6, 2), Keep::NewLayer),
            ("the oldest history stays", history(), fence(5, 2), Keep::Layer(layer(7))),
            (
                "also in a resync",
                Superblock { layers: catalog(8, 7), ..gap() },
                fence(5, 2),
                Keep::Layer(layer(7)),
            ),
            ("a history that is kept for him already", history(), fence(4, 1), Keep::Nothing),
            ("the way back of a resync", gap(), fence(5, 2), Keep::Layer(layer(8))),
            ("a mixture", mixture(), fence(5, 2), Keep::Nothing),
            ("the first content", empty(), fence(5, 2), Keep::Nothing),
        ] {
            assert_eq!(keep(&superblock, greeting), expected, "{what}");
        }
    }

    /// What each change of the superblock makes of a host that follows, with a history, a primary whom nobody agreed to.
    #[test]
    fn each_word_of_the_operator_is_remembered() {
        let heirs = || vec![HostId([8; 32])];
        let unagreed = || {
            let layers = catalog(0, 7);
            Superblock { fence: fence(5, 2), layers, released: true, heirs: heirs(), ..following() }
        };
        let host = HostId([9; 32]);
        type Change = fn(&mut Superblock, HostId);
        let changes: [(&str, Change, u64); 11] = [
            ("forget", |it, _| StateChange::Forget.apply(it), 5),
            (
                "no room and no waiting for it",
                |it, _| {
                    it.layers.set(Purpose::Rollback, it.layers.undo());
                    StateChange::GiveRollbackUp.apply(it);
                },
                5,
            ),
            ("follow", |it, _| StateChange::Follow { fence: fence(6, 3), agrees: false }.apply(it), 4),
            (
                "follow one that was agreed to",
                |it, _| {
                    StateChange::Follow { fence: fence(6, 3), agrees: true }.apply(it);
                },
                6,
            ),
            ("promote", |it, host| promotion::record(it, host, Position::default()).expect("a number"), 6),
            (
                "demote",
                |it, host| {
                    promotion::record(it, host, Position::default()).expect("a number");
                    let own = it.fence;
                    promotion::record_demotion(it, own, Position::default(), None, None);
                },
                6,
            ),
            (
                "hear of a promotion",
                |it, _| {
                    bequeath(it, &[HostId([3; 32])]);
                    follow(it, fence(6, 4));
                },
                4,
            ),
            (
                "hear of an heir's promotion",
                |it, _| {
                    bequeath(it, &[HostId([3; 32])]);
                    follow(it, fence(6, 3));
                },
                6,
            ),
            (
                "superseded",
                |it, _| {
                    promotion::record_demotion(it, fence(6, 3), Position::default(), None, None);
                },
                4,
            ),
            ("resolve", |it, _| resolve::record(it, Vec::new(), Some(layer(7)), fence(6, 3)), 6),
            (
                "undo",
                |it, _| {
                    give(it);
                    undo::begin(it, &[], GenerationId([b'o'; 16]));
                },
                4,
            ),
        ];
        for (what, change, agreed) in changes {
            let mut superblock = unagreed();
            change(&mut superblock, host);
            assert_eq!(superblock.agreed, agreed, "{what}");
            // They are those of the next promotion after a demotion, and of no later one: of two that a resolve left, one was
            // agreed to with the fence after that of the winner.
            let stays = ["forget", "no room and no waiting for it"].contains(&what);
            assert_eq!(superblock.heirs, if stays { heirs() } else { Vec::new() }, "{what}");
        }
    }
}
