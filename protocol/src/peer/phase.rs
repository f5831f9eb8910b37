//! What a link to a replica does at the moment, and the one table of what it may do next.
//!
//! [`Progress`] is the only thing that changes a [`Phase`], by a [`Step`]. A step that the table does not have for a phase is a
//! mistake in this program and panics, before anything is sent that the other side would take for something else.

use crate::units::{Epoch, GenerationId, Sequence};

/// How far a link is on its way to being in sync; [`super`] draws the phases.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Phase {
    /// Nothing is streamed, and what was streamed is waited for.
    Draining,
    /// The replica records that it is resynced.
    Beginning,
    /// Dirty blocks are copied, clean ones streamed.
    Resyncing,
    /// Nothing is dirty. `streams`: whether anything was copied in this session, or streamed. `closed` is the epoch that closed
    /// after the last copy; `sent` is what was committed once that was durable.
    Committing { closed: Option<(Epoch, Sequence)>, sent: Option<GenerationId>, streams: bool },
    /// It has everything that was acknowledged.
    InSync,
}

/// What happens to a link.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// It falls behind, or something was marked that it is not sent: it streams no more.
    BreakOff,
    /// The window is empty, and what the replica said of itself is durable in the map.
    Begin,
    /// The replica has recorded that it is resynced.
    Ready,
    /// Nothing is dirty any more.
    AllCopied,
    /// The first epoch closed that ends after the last copy; or, where nothing was copied, the last one that was.
    Close(Epoch, Sequence),
    /// The commit is sent, for this generation.
    Commit(GenerationId),
    /// The replica has recorded the commit.
    Committed,
}

impl Phase {
    /// The table: what a step leads to, if it may be taken.
    fn after(self, step: Step) -> Option<Self> {
        match (self, step) {
            (_, Step::BreakOff) => Some(Self::Draining),
            (Self::Draining, Step::Begin) => Some(Self::Beginning),
            (Self::Beginning, Step::Ready) => Some(Self::Resyncing),
            (Self::Resyncing, Step::AllCopied) => {
                Some(Self::Committing { closed: None, sent: None, streams: true })
            }
            (Self::Committing { closed: None, sent: None, streams }, Step::Close(epoch, sequence)) => {
                Some(Self::Committing { closed: Some((epoch, sequence)), sent: None, streams })
            }
            (Self::Committing { closed: Some(closed), sent: None, streams }, Step::Commit(generation)) => {
                Some(Self::Committing { closed: Some(closed), sent: Some(generation), streams })
            }
            (Self::Committing { sent: Some(_), .. }, Step::Committed) => Some(Self::InSync),
            _ => None,
        }
    }

    /// Whether the replica may count itself as one that follows the newest generation.
    pub(super) fn follows(self) -> bool {
        matches!(self, Self::InSync | Self::Committing { sent: Some(_), .. })
    }

    /// Whether writes to clean blocks are streamed.
    pub(super) fn streams(self) -> bool {
        matches!(self, Self::Resyncing | Self::Committing { streams: true, .. } | Self::InSync)
    }
}

/// The phase of one link, from its greeting on.
#[derive(Debug)]
pub(super) struct Progress(Phase);

impl Progress {
    /// A link to a replica that was greeted: of one that lacks nothing only the commit is missing.
    pub(super) fn new(is_clean: bool) -> Self {
        Self(match is_clean {
            true => Phase::Committing { closed: None, sent: None, streams: false },
            false => Phase::Draining,
        })
    }

    /// What it does.
    pub(super) fn phase(&self) -> Phase {
        self.0
    }

    /// It goes on.
    ///
    /// # Panics
    /// When the step may not be taken.
    pub(super) fn take(&mut self, step: Step) {
        self.0 = self
            .0
            .after(step)
            .unwrap_or_else(|| panic!("{step:?} is no step of a link that is {:?}", self.0));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GENERATION: GenerationId = GenerationId([1; 16]);
    const CLOSED: (Epoch, Sequence) = (Epoch(3), Sequence(9));
    const CLOSE: Step = Step::Close(CLOSED.0, CLOSED.1);
    const STEPS: [Step; 7] = [
        Step::BreakOff,
        Step::Begin,
        Step::Ready,
        Step::AllCopied,
        CLOSE,
        Step::Commit(GENERATION),
        Step::Committed,
    ];

    /// Every phase that can be reached, each with what may happen to it.
    #[test]
    fn a_link_is_in_sync_only_after_all_that_has_to_be_durable_before() {
        let committing = |closed, sent, streams| Phase::Committing { closed, sent, streams };
        let expected = [
            (Phase::Draining, vec![Step::Begin]),
            (Phase::Beginning, vec![Step::Ready]),
            (Phase::Resyncing, vec![Step::AllCopied]),
            (committing(None, None, true), vec![CLOSE]),
            (committing(None, None, false), vec![CLOSE]),
            (committing(Some(CLOSED), None, true), vec![Step::Commit(GENERATION)]),
            (committing(Some(CLOSED), None, false), vec![Step::Commit(GENERATION)]),
            (committing(Some(CLOSED), Some(GENERATION), true), vec![Step::Committed]),
            (committing(Some(CLOSED), Some(GENERATION), false), vec![Step::Committed]),
            (Phase::InSync, vec![]),
        ];
        let mut reached = vec![Progress::new(true).phase(), Progress::new(false).phase()];
        let mut at = 0;
        while let Some(phase) = reached.get(at).copied() {
            let (_, steps) =
                expected.iter().find(|(other, _)| *other == phase).expect("it is meant to be reached");
            for step in STEPS {
                let next = phase.after(step);
                assert_eq!(
                    next.is_some(),
                    step == Step::BreakOff || steps.contains(&step),
                    "{phase:?} {step:?}"
                );
                reached.extend(next.filter(|next| !reached.contains(next)));
            }
            at += 1;
        }
        assert_eq!(reached.len(), expected.len());
    }

    #[test]
    fn nothing_counts_as_followed_before_it_is_committed_and_nothing_streams_before_copying_may_begin() {
        let mut link = Progress::new(false);
        let steps =
            [Step::Begin, Step::Ready, Step::AllCopied, CLOSE, Step::Commit(GENERATION), Step::Committed];
        let mut seen = Vec::new();
        for step in steps {
            link.take(step);
            seen.push((link.phase().streams(), link.phase().follows()));
        }
        let expected =
            [(false, false), (true, false), (true, false), (true, false), (true, true), (true, true)];
        assert_eq!(seen, expected);
        link.take(Step::BreakOff);
        assert_eq!((link.phase(), link.phase().streams()), (Phase::Draining, false));
    }

    #[test]
    #[should_panic(expected = "Committed is no step of a link that is Draining")]
    fn a_step_that_leads_nowhere_is_not_taken() {
        Progress::new(false).take(Step::Committed);
    }
}
