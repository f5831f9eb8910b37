//! What is found out before a promotion that an operator asked for is decided: whether the primary is gone, or only silent.
//!
//! A connection says less than it seems to. A dead one is noticed late, so one whose primary doesn't answer is watched for
//! some time before it counts. One whose primary has a disk that hangs lives, and yet nobody writes there; and one that has
//! just stopped answering may do either, so all are asked again until that is known. Only an [`Inquiry`] that has come to
//! its end has what a decision goes by ([`Known`]). Where the operator insists, nothing is waited for.

use crate::disk::superblock::Role;
use crate::succession::{Candidate, Decision, Heard, Objection};
use crate::units::Time;
use crate::wire::message::Standing;
use std::time::Duration;

/// How long a disk may be silent before it counts as hung.
pub const HUNG: Duration = Duration::from_secs(5);
/// How long a primary is watched whose disk has just stopped answering, until it counts as hung or goes on.
const HESITATION: Duration = Duration::from_secs(10);

/// What the shell does next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Next {
    /// Ask all others how they stand, after a moment; then [`Inquiry::handle_answers`].
    Ask,
    /// Wait for so long as it takes to notice that a connection is dead, or until it is lost; then
    /// [`Inquiry::handle_watched`].
    Watch,
    /// Decide.
    Decide(Known),
}

/// What is known of the primary's connection once nothing is waited for any more.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Known {
    is_forced: bool,
    is_connected: bool,
}

/// A promotion that is asked for and not decided.
#[derive(Clone, Copy, Debug)]
pub struct Inquiry {
    is_forced: bool,
    since: Time,
}

impl Inquiry {
    /// An operator wants a replica to be promoted; `is_forced` where he wants it whatever that loses.
    #[must_use]
    pub fn new(is_forced: bool, now: Time) -> Self {
        Self { is_forced, since: now }
    }

    /// All others were asked. `is_connected`: whether a primary is connected still.
    #[must_use]
    pub fn handle_answers(&self, others: &[Heard], is_connected: bool, now: Time) -> Next {
        let Self { is_forced, since } = *self;
        let any = |is_so: fn(&Standing) -> bool| {
            others.iter().filter_map(|other| other.standing.as_ref()).any(is_so)
        };
        if !is_forced && any(hesitates) && now < since.after(HESITATION) {
            return Next::Ask;
        }
        // Its connection lives, and says nothing of its disk.
        let is_connected = is_connected && !any(hangs);
        match is_connected && !is_forced && !any(serves) {
            true => Next::Watch,
            false => Next::Decide(Known { is_forced, is_connected }),
        }
    }

    /// The connection was watched, and is there still or not.
    #[must_use]
    pub fn handle_watched(&self, is_connected: bool) -> Known {
        Known { is_forced: self.is_forced, is_connected }
    }
}

impl Known {
    /// Decides on the promotion of a candidate as it stands now, given what the others said.
    ///
    /// # Errors
    /// The objection.
    pub fn decide(self, candidate: &Candidate, others: &[Heard]) -> Result<Decision, Objection> {
        let candidate = Candidate { is_connected: self.is_connected, ..candidate.clone() };
        candidate.decide(others, self.is_forced)
    }
}

fn serves(standing: &Standing) -> bool {
    standing.role == Role::Primary && standing.serves
}

/// Whether a primary that stands so has just stopped answering: it may be slow, or about to hang.
fn hesitates(standing: &Standing) -> bool {
    serves(standing) && standing.silent_milliseconds > 0
}

/// Whether a primary that stands so hangs: it serves nobody, and what it was told to do may still be done some day.
fn hangs(standing: &Standing) -> bool {
    let silent = Duration::from_millis(standing.silent_milliseconds);
    standing.role == Role::Primary && !standing.serves && silent >= HUNG
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::succession::tests::standing;
    use crate::units::HostId;

    fn at(seconds: u64) -> Time {
        Time(Duration::from_secs(seconds))
    }

    fn primary(serves: bool, silent_milliseconds: u64) -> Vec<Heard> {
        let standing = Standing { role: Role::Primary, serves, silent_milliseconds, ..standing(7) };
        vec![Heard { host: HostId([1; 32]), standing: Some(standing) }]
    }

    #[test]
    fn a_connection_counts_when_its_primary_serves_or_was_watched() {
        let silent = vec![Heard { host: HostId([1; 32]), standing: None }];
        let decides = |is_forced, is_connected| Next::Decide(Known { is_forced, is_connected });
        for (what, is_forced, others, is_connected, second, expected) in [
            ("nothing is connected", false, silent.clone(), false, 0, decides(false, false)),
            ("it may be dead", false, silent.clone(), true, 0, Next::Watch),
            ("its primary serves", false, primary(true, 0), true, 0, decides(false, true)),
            ("its disk has just fallen silent", false, primary(true, 1), true, 9, Next::Ask),
            ("its disk is slow", false, primary(true, 1), true, 10, decides(false, true)),
            ("its disk hangs", false, primary(false, 5000), true, 0, decides(false, false)),
            ("it is about to hang", false, primary(false, 4999), true, 0, Next::Watch),
            ("an operator insists", true, silent, true, 0, decides(true, true)),
            ("also while it hesitates", true, primary(true, 1), true, 0, decides(true, true)),
        ] {
            let inquiry = Inquiry::new(is_forced, at(0));
            assert_eq!(inquiry.handle_answers(&others, is_connected, at(second)), expected, "{what}");
        }
        let watched = Inquiry::new(false, at(0)).handle_watched(true);
        assert_eq!(watched, Known { is_forced: false, is_connected: true });
    }
}
