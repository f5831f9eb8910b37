//! Which word about a host's membership counts (X3).
//!
//! Each host's membership has a number that grows by one whenever the host is removed or taken in again: even for a member,
//! odd for one that was removed. Two that tell each other of a host both keep the higher number, whatever the order in
//! which they hear of things; so a host that joins again by a new token is a member again everywhere, and one that was
//! removed stays out whoever still lists it.

use crate::planted::{Bug, planted};

/// How much newer than what is known a word may be: nobody is to use the numbers up.
pub const STEP: u64 = 1 << 16;

/// Whether a word that a host was removed is newer than what is `known` of its membership.
#[must_use]
pub fn is_removal(told: u64, known: u64) -> bool {
    !told.is_multiple_of(2) && told > known && told - known <= STEP
}

/// Whether a host that is told to be a member counts as one, where its removal is `removed`, if it was.
#[must_use]
pub fn is_member(told: u64, removed: Option<u64>) -> bool {
    let is_newer = removed.is_none_or(|removed| told > removed) || planted(Bug::BelieveOldList);
    told.is_multiple_of(2) && told <= removed.unwrap_or(0).saturating_add(STEP) && is_newer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newer_word_counts_within_bounds() {
        for (told, known, counts) in
            [(1, 0, true), (3, 0, true), (1, 1, false), (1, 2, false), (2, 1, false), (STEP + 1, 0, false)]
        {
            assert_eq!(is_removal(told, known), counts, "{told} {known}");
        }
        assert!(is_removal(STEP - 1, 0) && !is_removal(u64::MAX, 0));
        for (told, removed, counts) in [
            (0, None, true),
            (0, Some(1), false),
            (2, Some(1), true),
            (1, None, false),
            (3, Some(1), false),
            (STEP + 2, None, false),
            (u64::MAX - 1, Some(1), false),
        ] {
            assert_eq!(is_member(told, removed), counts, "{told} {removed:?}");
        }
    }
}
