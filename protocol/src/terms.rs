//! The terms in which hosts speak of a volume: who may write, who plays which part, what a copy holds, when a write is
//! answered. What is on disk and what is on the wire is made of them.
//!
//! Which promotion is newer is told here alone (L5): [`Fence::against`] is the rule, and there is no order of fences beside it.

use crate::planted::{Bug, planted};
use crate::units::HostId;
use std::cmp::Ordering;

/// Who may write: raised by each promotion (L5). Fences have no order of their own: two of the same number are rivals, of
/// which neither is later. [`Fence::against`] is the only comparison. One that was decoded has a counter below
/// [`Fence::COUNTERS`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, bincode::Encode)]
pub struct Fence {
    /// The promotions so far.
    pub counter: u64,
    /// Who was promoted last.
    pub holder: HostId,
}

/// How a fence stands to another one (L5).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Claim {
    /// The other one was given to somebody since.
    Older,
    /// The same number was given to another host: neither of the two was promoted after the other.
    Rival,
    /// It is the same one.
    Same,
    /// It was given to somebody since.
    Newer,
}

impl Fence {
    /// All counters are below this: sessions are numbered within each ([`crate::disk::superblock`]).
    pub const COUNTERS: u64 = 1 << 24;
    /// No host misses more promotions than this: a fence further above what it knows is a mistake or a lie.
    pub const STEP: u64 = 1024;

    /// The fence of the next promotion; nothing where the counters are used up.
    #[must_use]
    pub fn raised(self, holder: HostId) -> Option<Self> {
        let counter = self.counter.checked_add(1).filter(|counter| *counter < Self::COUNTERS)?;
        Some(Self { counter, holder })
    }

    /// Whether a host that knows of this fence may be told of that one.
    #[must_use]
    pub fn may_become(self, told: Self) -> bool {
        told.is_in_bounds() && told.counter <= self.counter.saturating_add(Self::STEP)
    }

    /// Whether any fence has such a counter.
    #[must_use]
    pub fn is_in_bounds(self) -> bool {
        self.counter < Self::COUNTERS
    }

    /// How this fence stands to one that is `known` (L5).
    #[must_use]
    pub fn against(self, known: Self) -> Claim {
        match self.counter.cmp(&known.counter) {
            Ordering::Less => Claim::Older,
            Ordering::Greater => Claim::Newer,
            Ordering::Equal if self.holder == known.holder || planted(Bug::FollowEqualFence) => Claim::Same,
            Ordering::Equal => Claim::Rival,
        }
    }

    /// Whether no other host can have been promoted between the holder of `before` and this one's.
    #[must_use]
    pub fn is_next_after(self, before: Self) -> bool {
        self.counter <= before.counter.saturating_add(1)
    }

    /// Whether its holder was promoted after that of the one that is `known`, who then may not write any more.
    #[must_use]
    pub fn supersedes(self, known: Self) -> bool {
        self.against(known) == Claim::Newer
    }

    /// Whether its holder may not write where that other fence is `known`.
    #[must_use]
    pub fn is_refused_by(self, known: Self) -> bool {
        matches!(self.against(known), Claim::Older | Claim::Rival)
    }

    /// The one that was given last; of rivals, the first.
    #[must_use]
    pub fn newest(fences: impl IntoIterator<Item = Self>) -> Option<Self> {
        fences.into_iter().reduce(|newest, fence| if fence.supersedes(newest) { fence } else { newest })
    }
}

impl<Context> bincode::Decode<Context> for Fence {
    fn decode<D: bincode::de::Decoder>(decoder: &mut D) -> Result<Self, bincode::error::DecodeError> {
        let fence = Self { counter: u64::decode(decoder)?, holder: HostId::decode(decoder)? };
        match fence.is_in_bounds() {
            true => Ok(fence),
            false => Err(bincode::error::DecodeError::Other("no fence has so high a counter")),
        }
    }
}

bincode::impl_borrow_decode!(Fence);

/// When a write and a flush are answered (W4).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
pub enum Mode {
    /// After the local write; after the local sync.
    #[default]
    Async,
    /// When the replica has received it, too.
    SemiSync,
    /// A write when the replica has received it, a flush when the replica has it durably, too.
    Sync,
}

impl Mode {
    /// The byte that stands for it on disk.
    #[must_use]
    pub fn to_byte(self) -> u8 {
        match self {
            Self::Async => 0,
            Self::SemiSync => 1,
            Self::Sync => 2,
        }
    }

    /// The mode that a byte stands for.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Self> {
        [Self::Async, Self::SemiSync, Self::Sync].into_iter().find(|mode| mode.to_byte() == byte)
    }
}

/// How many hosts a volume has at most, the primary included.
pub const MEMBERS_LIMIT: usize = 33;

/// What a primary promises a replica about answering without it; see [`crate::promise`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
pub enum Promise {
    /// Nothing: the replica is not in the mode sync.
    #[default]
    None,
    /// It does not as long as its word holds that the replica asked for last.
    WhileHeard,
    /// It never does without so many of the replicas that count for it ([`crate::given::Given`]).
    Replicas(u32),
}

/// The role of a host for a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub enum Role {
    /// The one that takes writes.
    Primary,
    /// One that follows.
    Replica,
}

/// What a copy holds, as its host knows durably.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
pub enum DataState {
    /// Nothing yet: no full sync ever ended or began.
    #[default]
    Empty,
    /// A mixture: a resync is under way or was interrupted.
    Inconsistent,
    /// A legal crash image of the volume.
    Consistent,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_two_fences_the_higher_number_counts_and_equal_ones_are_rivals() {
        let fence = |counter, holder| Fence { counter, holder: HostId([holder; 32]) };
        let known = fence(4, 2);
        for (claim, expected) in [
            (fence(3, 9), Claim::Older),
            (fence(3, 2), Claim::Older),
            (fence(4, 1), Claim::Rival),
            (fence(4, 3), Claim::Rival),
            (fence(4, 2), Claim::Same),
            (fence(5, 1), Claim::Newer),
        ] {
            assert_eq!(claim.against(known), expected, "{claim:?}");
            assert_eq!(claim.supersedes(known), expected == Claim::Newer, "{claim:?}");
            assert_eq!(
                claim.is_refused_by(known),
                matches!(expected, Claim::Older | Claim::Rival),
                "{claim:?}"
            );
        }
        let newest = Fence::newest([fence(3, 1), fence(4, 1), fence(4, 3), fence(2, 9)]);
        assert_eq!(newest, Some(fence(4, 1)), "no rival takes the place of another");
        assert_eq!(Fence::newest([]), None);
    }
}
