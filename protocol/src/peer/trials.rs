//! Whether doubtful blocks are compared before they are copied (R4).
//!
//! A block is *doubtful* when its bit was set because it may differ, not because a write was left out: all blocks of a
//! copy that nobody vouches for, extents that were active at a crash, what the other side reports, what was in the
//! window when a link was lost. Comparing them costs a read there and one more here; where they differ, that is wasted
//! and the copy comes later. So it is tried: a few are compared, and what comes out decides about the next ones. A new
//! disk is copied with a few megabytes read in vain, and a disk that was seeded is copied only where it must be, also
//! where it begins with the blocks that changed.

/// How many comparisons are judged together, and how many are under way while it is open whether they pay: enough that
/// chance doesn't decide, and no more than 4 MiB to read.
const TRIAL: u32 = 16;
/// Where most of a trial differed, so much is copied without asking before the next one; each time twice as much, so
/// that trials are a vanishing share of a copy to a disk with nothing in common. What is being read when that is over
/// comes on top.
const FIRST_PAUSE_BYTES: u64 = 64 << 20;

/// What to do with doubtful blocks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Choice {
    /// Compare them first.
    Compare,
    /// Copy them.
    Copy,
    /// Decide when more is known: comparisons are under way.
    Wait,
}

/// What comparisons of doubtful blocks have shown lately.
#[derive(Debug)]
pub(super) struct Trials {
    /// Whether the last comparisons paid.
    is_worthwhile: bool,
    /// Comparisons under way.
    open: u32,
    /// Those of the trial that have ended, and how many of them found a difference.
    answered: u32,
    different: u32,
    /// How much is copied before the next trial.
    pause_bytes: u64,
    next_pause_bytes: u64,
}

impl Default for Trials {
    /// Nothing is known.
    fn default() -> Self {
        Self {
            is_worthwhile: false,
            open: 0,
            answered: 0,
            different: 0,
            pause_bytes: 0,
            next_pause_bytes: FIRST_PAUSE_BYTES,
        }
    }
}

impl Trials {
    pub(super) fn choice(&self) -> Choice {
        if self.pause_bytes > 0 {
            Choice::Copy
        } else if self.is_worthwhile || self.open + self.answered < TRIAL {
            Choice::Compare
        } else {
            Choice::Wait
        }
    }

    /// A comparison begins.
    pub(super) fn asked(&mut self) {
        self.open += 1;
    }

    /// A comparison came to nothing: there was no content to ask about.
    pub(super) fn taken_back(&mut self) {
        self.open -= 1;
    }

    /// A comparison has ended.
    pub(super) fn answered(&mut self, is_same: bool) {
        self.open -= 1;
        self.answered += 1;
        self.different += u32::from(!is_same);
        if self.answered < TRIAL {
            return;
        }
        self.is_worthwhile = self.different * 2 <= TRIAL;
        (self.answered, self.different) = (0, 0);
        if self.is_worthwhile {
            self.next_pause_bytes = FIRST_PAUSE_BYTES;
        } else if self.pause_bytes == 0 {
            self.pause_bytes = self.next_pause_bytes;
            self.next_pause_bytes = self.next_pause_bytes.saturating_mul(2);
        }
    }

    /// So much content was read for a copy. Zeroes are none: comparing them comes to nothing.
    pub(super) fn copied(&mut self, bytes: u64) {
        self.pause_bytes = self.pause_bytes.saturating_sub(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Picks so many bytes of doubtful blocks of a replica that differs where `differs` says, one after the other, and
    /// gives how many of the picks were comparisons.
    fn comparisons(trials: &mut Trials, differs: impl Fn(u64) -> bool, picks: u64) -> u64 {
        (0..picks)
            .filter(|pick| match trials.choice() {
                Choice::Compare => {
                    trials.asked();
                    trials.answered(!differs(*pick));
                    true
                }
                Choice::Copy => {
                    trials.copied(1 << 20);
                    false
                }
                Choice::Wait => panic!("nothing is under way"),
            })
            .count() as u64
    }

    #[test]
    fn a_new_disk_is_hardly_asked_about() {
        let asked = comparisons(&mut Trials::default(), |_| true, 1 << 20);
        assert!(asked < 300, "{asked} comparisons for a tebibyte");
    }

    #[test]
    fn a_copy_that_is_good_but_for_its_beginning_is_asked_about() {
        let asked = comparisons(&mut Trials::default(), |pick| pick < 16, 10_000);
        assert_eq!(asked, 10_000 - 64);
    }

    #[test]
    fn no_more_than_a_trial_is_asked_before_the_first_answers() {
        let mut trials = Trials::default();
        for _ in 0..TRIAL {
            assert_eq!(trials.choice(), Choice::Compare);
            trials.asked();
        }
        assert_eq!(trials.choice(), Choice::Wait);
        // What reads as zeroes here tells nothing.
        trials.taken_back();
        assert_eq!(trials.choice(), Choice::Compare);
    }
}
