//! What a choice after a split brain loses, in words (L6).

use super::NO_ACTION;
use crate::config::Name;
use crate::control::api::{Resolved, Stake};
use crate::quantity::{Seconds, Size, clock, unix_seconds};

/// What keeping that host's content loses, what keeping this one's would lose, and the command to run next.
#[must_use]
pub fn resolution(volume: &Name, keep: &Name, resolved: &Resolved, done: bool) -> (String, String, String) {
    let copied = match resolved.copies_everything {
        true => {
            format!("everything is copied from {keep}, because this host's map does not say what differs")
        }
        false => format!("what differs is copied from {keep}"),
    };
    let kept = match (resolved.can_be_undone, done) {
        (true, true) => {
            format!("; what is overwritten is kept, and comes back with: blockmirror undo {volume}")
        }
        (true, false) => "; what is overwritten is kept for an undo".to_owned(),
        (false, _) => "; it can't be undone, because this copy is a mixture already".to_owned(),
    };
    let gives_up = if done { "gave up" } else { "gives up" };
    let verdict = format!(
        "keeping {keep}'s content {gives_up} what only this host wrote: {}; {copied}{kept}",
        stake(resolved.loses)
    );
    let alternative = format!(
        "keeping this host's content would give up what only {keep} wrote: {}",
        stake(resolved.spares)
    );
    let action = match (done, resolved.is_kept_primary) {
        (false, _) => format!("blockmirror resolve {volume} --keep {keep}"),
        (true, true) => NO_ACTION.to_owned(),
        (true, false) => format!("on {keep}: blockmirror promote {volume} --force"),
    };
    (verdict, alternative, action)
}

/// `at most 40K in 10 blocks, since 14:03:11 UTC, 2m ago`
fn stake(stake: Stake) -> String {
    let much = match (stake.bytes, stake.blocks) {
        (Some(0), _) => return "nothing".to_owned(),
        (Some(bytes), Some(1)) => format!("at most {} in 1 block", Size(bytes)),
        (Some(bytes), Some(blocks)) => format!("at most {} in {blocks} blocks", Size(bytes)),
        (Some(bytes), None) => format!("at most {}", Size(bytes)),
        (None, _) => "it is not known how much".to_owned(),
    };
    match stake.since_unix_seconds {
        Some(since) => {
            let age = Seconds(unix_seconds().saturating_sub(since));
            format!("{much}, since {}, {age} ago", clock(since))
        }
        None => much,
    }
}
