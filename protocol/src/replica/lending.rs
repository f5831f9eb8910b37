//! What is absent on a primary is what a replica has: that one's copy is lent (S4).
//!
//! A primary counts on a copy from the moment that it has recorded whose it is. Nobody else may write to it from then on, so the
//! replica knows that primary's promotion durably *before*: a primary that was promoted earlier, and has not heard of it, is
//! refused as it is by any host that follows the newer one (L5).

use super::change::StateChange;
use super::{Replica, consent};
use crate::planted::{Bug, planted};
use crate::terms::{DataState, Fence};
use crate::wire::message::{Message, Refusal, Refused, Superseded};

/// Why a copy is not lent.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NotLent {
    /// The holder of this fence was promoted since.
    Superseded(Fence),
    /// The fence is further ahead than promotions go.
    OutOfBounds,
    /// The copy is no image of the volume, or can't be read.
    NoImage,
}

impl From<NotLent> for Message {
    fn from(no: NotLent) -> Self {
        let refused = |refusal, text: &str| Refused { refusal, text: text.into() }.into();
        match no {
            NotLent::Superseded(fence) => Superseded { fence }.into(),
            NotLent::OutOfBounds => refused(Refusal::Other, "the fence is further ahead than promotions go"),
            NotLent::NoImage => refused(Refusal::Backing, "this copy is no image of the volume"),
        }
    }
}

impl Replica {
    /// A primary with this fence goes on from this copy. Where no session is open, and nothing is being written: it is lent once
    /// [`Replica::is_lent_to`] says so.
    ///
    /// # Errors
    /// [`NotLent`].
    pub fn lend(&mut self, fence: Fence) -> Result<(), NotLent> {
        assert!(self.link.is_none() && self.is_idle(), "a copy is lent as it is");
        let known = self.superblock.fence;
        if fence.is_refused_by(known) {
            return Err(NotLent::Superseded(known));
        }
        if !known.may_become(fence) {
            return Err(NotLent::OutOfBounds);
        }
        if self.failed || self.superblock.data != DataState::Consistent {
            return Err(NotLent::NoImage);
        }
        if fence != known && !planted(Bug::LendUnfollowed) {
            let agrees = consent::keep(&self.superblock, fence) == super::resolve::Keep::Nothing;
            self.promise.give_up();
            self.change_state(StateChange::Follow { fence, agrees }, None);
        }
        Ok(())
    }

    /// Whether nobody who was promoted before the holder of this fence may write here any more, durably.
    #[must_use]
    pub fn is_lent_to(&self, fence: Fence) -> bool {
        let is_known = self.superblock.fence == fence || planted(Bug::LendUnfollowed);
        is_known && self.is_idle() && !self.failed
    }
}
