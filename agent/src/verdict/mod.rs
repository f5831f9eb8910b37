//! What a volume's facts mean to its operator: which copy is good, how much is at risk, what to run.
//!
//! Pure functions from facts to words, the same words for people and for `--json`. A verdict is never better than its
//! facts: a replica counts as in sync only while its map is known to be empty (D4), and a copy as usable only while
//! it is known to be consistent.

mod health;
mod primary;
mod replica;
mod resolution;
#[cfg(test)]
mod tests;

use crate::config::{Name, Role};
use crate::control::api::{
    Connection, CopyState, Health, PeerState, PeerStatus, Progress, Removed, Succession, VolumeFacts,
    VolumeState, VolumeStatus,
};
use crate::quantity::{Seconds, Size, clock, per_cent};
use std::path::PathBuf;

/// A host that moved is found by itself within this time, as long as either knows where the other is.
const MOVED_SECONDS: u64 = 300;

/// The action where there is nothing to do.
pub const NO_ACTION: &str = "none";

pub use resolution::resolution;

/// What facts mean.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Judgement {
    state: VolumeState,
    verdict: String,
    action: String,
}

impl Judgement {
    fn new(state: VolumeState, verdict: impl Into<String>, action: impl Into<String>) -> Self {
        Self { state, verdict: verdict.into(), action: action.into() }
    }

    fn of(self, facts: VolumeFacts) -> VolumeStatus {
        VolumeStatus { facts, state: self.state, verdict: self.verdict, action: self.action }
    }
}

/// Judges a volume whose agent runs.
#[must_use]
pub fn running(facts: VolumeFacts) -> VolumeStatus {
    let mut judgement = match (&facts.succession.change, facts.role) {
        _ if facts.health.awaited.is_some() => health::awaiting(&facts),
        _ if facts.health.shrunk.is_some() && facts.health.is_closed => health::shrunk(&facts),
        _ if facts.health.panics.is_some() => health::panics(&facts),
        (Some(change), _) => {
            Judgement::new(VolumeState::Changing, format!("changing: this host is just {change}"), NO_ACTION)
        }
        (None, Role::Primary) => primary::judge(&facts),
        (None, Role::Replica) => replica::judge(&facts),
    };
    if let Some((verdict, action)) = twins(&facts) {
        judgement.state = match judgement.state {
            VolumeState::Healthy | VolumeState::Syncing => VolumeState::Degraded,
            VolumeState::Following => VolumeState::Waiting,
            state => state,
        };
        judgement.verdict = format!("{verdict}; {}", judgement.verdict);
        action.clone_into(&mut judgement.action);
    }
    if let Some(removed) = &facts.succession.removed {
        judgement = removal(&facts, removed, judgement);
    }
    if let Some(hung) = &facts.health.hung {
        judgement = health::hung(&facts, hung, judgement);
    }
    replica::add_kept(&facts, &mut judgement);
    health::add(&facts, &mut judgement);
    if let Some(words) = &facts.touched {
        let backing = facts.backing.display();
        judgement.verdict.push_str(&format!(
            "; the backing {backing} was changed by something else ({words}): all of it is compared"
        ));
    }
    if let Some(grown) = facts.health.grown {
        judgement.verdict.push_str(&format!("; warning: {}", health::growth(&facts, grown)));
    }
    for device in &facts.backing_users {
        let (device, backing) = (device.display(), facts.backing.display());
        judgement.verdict.push_str(&format!(
            "; warning: {device} is on {backing} too, and what is written there is not mirrored: losetup -d {device}"
        ));
    }
    for device in &facts.devices {
        if let Some(error) = &device.error {
            judgement.verdict.push_str(&format!("; the {} device is not served ({error})", device.kind));
        }
        if let Some(warning) = &device.warning {
            judgement.verdict.push_str(&format!("; warning: {warning}"));
        }
    }
    judgement.of(facts)
}

/// Judges a volume that is not served because of what is wrong with its configuration.
#[must_use]
pub fn misconfigured(name: Name, mistake: String) -> VolumeStatus {
    let verdict = format!("failed: {mistake}");
    let action = "mend the file (blockmirror config check), then: systemctl restart blockmirror-agent";
    let facts = VolumeFacts {
        name,
        // What else there is to say stands in the file that can't be read.
        id: String::new(),
        role: Role::Replica,
        size_bytes: 0,
        block_size_bytes: 0,
        backing: PathBuf::new(),
        backing_error: None,
        rebuild: None,
        touched: None,
        backing_users: Vec::new(),
        storage: None,
        devices: Vec::new(),
        data: None,
        epoch: None,
        succession: Succession::default(),
        blocked: None,
        health: Health { mistake: Some(mistake), ..Health::default() },
        peers: Vec::new(),
    };
    Judgement::new(VolumeState::Failed, verdict, action).of(facts)
}

/// What a host is told that was removed from the volume. A primary goes on, and says so behind what else it has to say.
fn removal(facts: &VolumeFacts, removed: &Removed, judgement: Judgement) -> Judgement {
    let (volume, by) = (&facts.name, &removed.by);
    let words = format!("this host was removed from {volume} by {by} at {}", clock(removed.at_unix_seconds));
    let action = format!(
        "to take it in again, on the primary: blockmirror invite {volume}; here: blockmirror join - --backing {}",
        facts.backing.display()
    );
    match facts.role {
        Role::Primary => Judgement { verdict: format!("{}; {words}", judgement.verdict), ..judgement },
        Role::Replica if facts.succession.change.is_some() => judgement,
        Role::Replica => {
            let verdict = format!("removed: {words}, and is not kept up; {}", replica::copy(facts));
            Judgement::new(VolumeState::Removed, verdict, action)
        }
    }
}

/// Judges a volume whose agent does not run, from what is stored.
#[must_use]
pub fn stopped(facts: VolumeFacts) -> VolumeStatus {
    let consequence = match facts.role {
        Role::Primary => "the device is not served and nothing is mirrored",
        Role::Replica => "this copy is not updated",
    };
    let copy = match (facts.role, facts.data) {
        (Role::Replica, Some(_)) => format!("; {}", replica::copy(&facts)),
        _ => String::new(),
    };
    let verdict = format!("agent not running; {consequence}{copy}");
    Judgement::new(VolumeState::Stopped, verdict, "systemctl start blockmirror-agent").of(facts)
}

/// What a comparison's result means, and the command to run. `queued` tells whether the differences were marked, so
/// that they are copied again.
#[must_use]
pub fn comparison(
    volume: &Name,
    peer: &Name,
    compared_bytes: u64,
    different_bytes: u64,
    unreadable_bytes: u64,
    queued: bool,
) -> (String, String) {
    let (compared, different) = (Size(compared_bytes), Size(different_bytes));
    if unreadable_bytes > 0 {
        let rest = match (different_bytes, queued) {
            (0, _) => format!("no difference in the other {compared}"),
            (_, true) => format!("{different} of the other {compared} differ on {peer} and are copied again"),
            (_, false) => {
                format!("{different} of the other {compared} differ on {peer} and were not repaired")
            }
        };
        let verdict = format!("unreadable: regions of {} can't be read here; {rest}", Size(unreadable_bytes));
        let action = format!(
            "check the disk of this host; {peer} may have what can't be read here: blockmirror switch {volume} --to {peer}"
        );
        return (verdict, action);
    }
    if different_bytes == 0 {
        return (format!("identical: {compared} compared with {peer}, no difference"), NO_ACTION.to_owned());
    }
    let found = format!("different: {different} of {compared} differ on {peer}");
    match queued {
        true => (format!("{found} and are copied again"), format!("blockmirror wait {volume} --for in-sync")),
        false => (format!("{found} and were not repaired"), format!("blockmirror compare {volume} {peer}")),
    }
}

/// What the removal of a host does, or did.
#[must_use]
pub fn peer_removal(volume: &Name, peer: &Name, told: &[String], untold: &[String], done: bool) -> String {
    let (is_removed, is_told) =
        if done { ("was removed", "were told") } else { ("would be removed", "are told") };
    let mut verdict = format!(
        "{peer} {is_removed} from {volume}: its connections end, its key is refused, and nothing is kept for it"
    );
    if !told.is_empty() {
        verdict.push_str(&format!("; {} {is_told} at once", listed(told)));
    }
    if !untold.is_empty() {
        let hears = if untold.len() == 1 { "hears" } else { "hear" };
        verdict.push_str(&format!(
            "; {} {hears} of it from any other host, when it can be reached",
            listed(untold)
        ));
    }
    verdict
}

/// Whether a replica verifiably has everything but what is on its way.
#[must_use]
pub fn is_in_sync(peer: &PeerStatus) -> bool {
    peer.connection == Connection::Connected
        && peer.state == Some(PeerState::InSync)
        && peer.out_of_sync_bytes == Some(0)
}

/// A job's progress in words: `43 % (43G of 100G, 120M/s, 8m 6s left)`.
#[must_use]
pub fn progress(progress: &Progress) -> String {
    let Progress { done_bytes, total_bytes, rate, eta_seconds } = *progress;
    let left = match eta_seconds {
        Some(seconds) => format!("{}/s, {} left", Size(rate), Seconds(seconds)),
        None => "not moving".to_owned(),
    };
    let share = per_cent(done_bytes, total_bytes);
    format!("{share} % ({} of {}, {left})", Size(done_bytes), Size(total_bytes))
}

/// `is disconnected since 3m`, with the reason where one is known.
fn link(peer: &PeerStatus) -> String {
    let word = match peer.connection {
        Connection::Connected => "connected",
        Connection::Connecting | Connection::Disconnected | Connection::Reachable => "disconnected",
        Connection::Paused if peer.paused_there => "paused there",
        Connection::Paused => "paused",
    };
    let since = match peer.connection_seconds {
        Some(seconds) => format!(" since {}", Seconds(seconds)),
        None => String::new(),
    };
    format!("is {word}{since}{}", reason(peer))
}

/// Where a host can't be reached for so long that it may be elsewhere: how to say where it is.
fn elsewhere(facts: &VolumeFacts, peer: &PeerStatus) -> String {
    let is_lost = peer.connection == Connection::Disconnected
        && peer.path.is_none()
        && peer.connection_seconds.is_some_and(|seconds| seconds > MOVED_SECONDS);
    match is_lost {
        true => format!("; if it moved: blockmirror set-address {} {} ADDRESS:PORT", facts.name, peer.name),
        false => String::new(),
    }
}

/// Two hosts use the key of one: which they are, and what to do about that.
fn twins(facts: &VolumeFacts) -> Option<(String, &'static str)> {
    let peer = facts.peers.iter().find(|peer| peer.state == Some(PeerState::Twins))?;
    let (name, places) = (&peer.name, peer.error.as_deref().unwrap_or("at two places"));
    let verdict =
        format!("two hosts use the key of {name}: {places}; it can't be told which of them has what");
    let action = "on the one that was cloned: systemctl stop blockmirror-agent; with a key of its own it can join anew: \
                  rm -r /var/lib/blockmirror /etc/blockmirror/volumes";
    Some((verdict, action))
}

/// What went wrong last, in brackets.
fn reason(peer: &PeerStatus) -> String {
    match &peer.error {
        Some(error) => format!(" ({error})"),
        None => String::new(),
    }
}

fn is_usable(data: Option<CopyState>) -> bool {
    data == Some(CopyState::Consistent)
}

/// `b`, `b and c`, `b, c and d`.
fn listed(names: &[String]) -> String {
    match names {
        [] => String::new(),
        [only] => only.clone(),
        [first @ .., last] => format!("{} and {last}", first.join(", ")),
    }
}
