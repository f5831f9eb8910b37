//! A replica's view: whether its copy can be used, and whether it is kept up.

use super::{Judgement, NO_ACTION, elsewhere, is_usable, link, progress};
use crate::config::Role;
use crate::control::api::{
    Connection, CopyState, Elsewhere, PeerStatus, Rollback, VolumeFacts, VolumeState, WentOn,
};
use crate::quantity::{Seconds, Size, clock};

pub(super) fn judge(facts: &VolumeFacts) -> Judgement {
    let primary = facts.peers.iter().find(|peer| peer.role == Role::Primary);
    if let Some(error) = &facts.backing_error {
        let (what, action) = match facts.health.is_closed {
            true => {
                (format!("the volume can't be opened ({error})"), "mend that, and it is opened by itself")
            }
            false => (
                format!("the backing {} has failed ({error})", facts.backing.display()),
                "check the disk; it is opened anew when the primary greets next, or this host is promoted",
            ),
        };
        let verdict = format!("failed: {what}; this copy is no longer updated");
        return Judgement::new(VolumeState::Failed, verdict, action);
    }
    if let Some(judgement) = succession(facts) {
        return judgement;
    }
    let Some(primary) = primary else {
        let verdict = format!("no primary is known; {}", copy(facts));
        return Judgement::new(VolumeState::Waiting, verdict, NO_ACTION);
    };
    match primary.connection {
        Connection::Connected => connected(facts, primary),
        Connection::Connecting | Connection::Disconnected | Connection::Reachable | Connection::Paused => {
            waiting(facts, primary)
        }
    }
}

fn connected(facts: &VolumeFacts, primary: &PeerStatus) -> Judgement {
    let name = &primary.name;
    if is_usable(facts.data) {
        let copy = if facts.touched.is_some() { "this copy is not compared yet" } else { "consistent" };
        return Judgement::new(VolumeState::Following, format!("following {name}; {copy}"), NO_ACTION);
    }
    let far = match &primary.resync {
        Some(job) => format!(", {}", progress(job)),
        None => String::new(),
    };
    let until = match &facts.succession.rollback {
        Some(point) if facts.touched.is_none() => format!("can be rolled back to {}", back(point)),
        _ => "not usable until complete".to_owned(),
    };
    let verdict = format!("resyncing from {name}{far}: {until}");
    Judgement::new(VolumeState::Resyncing, verdict, NO_ACTION)
}

fn waiting(facts: &VolumeFacts, primary: &PeerStatus) -> Judgement {
    let name = &primary.name;
    let (link, action) = match primary.connection {
        Connection::Paused if primary.paused_there => {
            let own = facts.succession.own_name.as_deref().unwrap_or("HOST");
            (link(primary), format!("on {name}: blockmirror resume {} {own}", facts.name))
        }
        Connection::Paused => (link(primary), format!("blockmirror resume {} {name}", facts.name)),
        _ => {
            // Just after the agent's start or a join nobody was waited for.
            let since = primary.connection_seconds.filter(|seconds| *seconds > 0);
            let since = since.map(|seconds| format!(" since {}", Seconds(seconds)));
            let link = format!("is not connected{}{}", since.unwrap_or_default(), super::reason(primary));
            let look = format!("on {name}: blockmirror status {}", facts.name);
            let has_image = is_usable(facts.data) || facts.succession.rollback.is_some();
            let link = match serves_elsewhere(facts, primary) {
                true => format!("{link}; it answers, and serves the volume"),
                false => link,
            };
            let action = match has_image && !serves_elsewhere(facts, primary) {
                true => format!("{look}; if {name} is gone: {}", promote(facts)),
                false => look,
            } + &elsewhere(facts, primary);
            (link, action)
        }
    };
    let verdict = format!("primary {name} {link}; {}", copy(facts));
    Judgement::new(VolumeState::Waiting, verdict, action)
}

/// What a replica says that no primary writes to now, and why.
fn succession(facts: &VolumeFacts) -> Option<Judgement> {
    let succession = &facts.succession;
    if let Some(other) = &succession.split_from {
        let since = succession.split_seconds.map(|seconds| format!(" since {}", Seconds(seconds)));
        let why = match succession.is_beyond {
            true => format!(
                "{other} was set back, or recovered from an older copy, and lacks what this host has; \
                 nothing is taken from it"
            ),
            false => format!(
                "this host wrote alone after it was last in sync with {other}, and takes nothing from it"
            ),
        };
        let verdict = format!("split brain{}: {why}; {}", since.unwrap_or_default(), copy(facts));
        let action = format!(
            "to keep {other}'s content: blockmirror resolve {} --keep {other}; --dry-run tells what that loses",
            facts.name
        );
        return Some(Judgement::new(VolumeState::SplitBrain, verdict, action));
    }
    if succession.is_full {
        let verdict = match &succession.unagreed {
            Some(primary) => {
                format!("paused: what {primary} would overwrite can't be kept; {}", copy(facts))
            }
            None => format!("paused: no room for pre-images; {}", copy(facts)),
        };
        if let Some(shortage) = &succession.shortage {
            let action = format!("{shortage}; it goes on by itself then");
            return Some(Judgement::new(VolumeState::Waiting, verdict, action));
        }
        let action = format!(
            "raise pre_images in volumes/{}.toml, or set when_full = \"go-on\" there; \
             then: systemctl restart blockmirror-agent",
            facts.name
        );
        return Some(Judgement::new(VolumeState::Waiting, verdict, action));
    }
    if succession.demoted && succession.history.is_some() {
        let verdict = "nobody is the primary: this host gave its content up, and follows the other when that is \
                       promoted";
        let action = format!("on the host whose content stays: blockmirror promote {} --force", facts.name);
        return Some(Judgement::new(VolumeState::Waiting, verdict, action));
    }
    if let Some(judgement) = went_on(facts) {
        return Some(judgement);
    }
    if let Some(better) = &succession.better {
        let name = &better.name;
        let verdict = match better.was_demoted {
            true => format!(
                "nobody is the primary: {name} was demoted while this copy was out of its reach, and has everything; {}",
                copy(facts)
            ),
            false => format!("{name} has later content than this copy; {}", copy(facts)),
        };
        let volume = &facts.name;
        let (verdict, action) = match better.is_away {
            false => (verdict, format!("on {name}: blockmirror promote {volume}")),
            true => (
                format!("{verdict}; the disk of {name} is not there or does not answer"),
                format!(
                    "bring the disk of {name} back, then there: blockmirror promote {volume}; if it is lost: blockmirror \
                     promote {volume} --force"
                ),
            ),
        };
        return Some(Judgement::new(VolumeState::Waiting, verdict, action));
    }
    let verdict = match (succession.released, succession.demoted) {
        (true, _) if facts.touched.is_some() => {
            format!("nobody is the primary: it was demoted, and this copy had everything; {}", copy(facts))
        }
        (true, _) => "nobody is the primary: it was demoted, and this copy has everything".to_owned(),
        (false, true) if facts.touched.is_some() => {
            format!("nobody is the primary: this host was demoted; {}", copy(facts))
        }
        (false, true) => "nobody is the primary: this host was demoted".to_owned(),
        (false, false) => return None,
    };
    let action = format!("to go on here: {}", promote(facts));
    Some(Judgement::new(VolumeState::Waiting, verdict, action))
}

/// Whether the primary that this replica follows says that it serves, though it does not write here.
fn serves_elsewhere(facts: &VolumeFacts, primary: &PeerStatus) -> bool {
    let elsewhere = facts.succession.elsewhere.as_ref();
    let is_it = |other: &Elsewhere| other.how == WentOn::Serves && primary.name.as_str() == other.name;
    primary.role == Role::Primary && elsewhere.is_some_and(is_it)
}

/// What a replica says that has heard of a host which went on out of its reach.
fn went_on(facts: &VolumeFacts) -> Option<Judgement> {
    let (volume, copy) = (&facts.name, copy(facts));
    let Elsewhere { name, how, is_away } = facts.succession.elsewhere.as_ref()?;
    if facts.peers.iter().any(|peer| serves_elsewhere(facts, peer)) {
        return None;
    }
    let look = format!("on {name}: blockmirror status {volume}");
    let second = "which begins a second history";
    let (verdict, action) = match how {
        WentOn::Serves => {
            (format!("{name} is the primary and serves, and does not write to this host"), look)
        }
        WentOn::Promoted => (
            format!("{name} was promoted while this host was out of its reach, and does not write to it"),
            format!("{look}; only if {name} is lost: blockmirror promote {volume} --force, {second}"),
        ),
        WentOn::Split => (
            format!(
                "{name} went on with a primary that was recovered from an older copy, or set back: each of the two copies \
                 has what the other lacks"
            ),
            format!(
                "on the host whose content stays: blockmirror promote {volume} --force; the other one keeps what only it \
                 has until blockmirror resolve {volume} gives that up there"
            ),
        ),
    };
    let (verdict, action) = match is_away {
        false => (format!("{verdict}; {copy}"), action),
        true => (
            format!("{verdict}; {copy}; the disk of {name} is not there or does not answer"),
            format!(
                "bring the disk of {name} back; only if it is lost: blockmirror promote {volume} --force, {second}"
            ),
        ),
    };
    Some(Judgement::new(VolumeState::Waiting, verdict, action))
}

/// How this host is promoted.
fn promote(facts: &VolumeFacts) -> String {
    let volume = &facts.name;
    match facts.touched {
        None => format!("blockmirror promote {volume}"),
        Some(_) => format!(
            "better promote another host that had everything; blockmirror promote {volume} --force takes this copy as it is"
        ),
    }
}

/// Adds what could be brought back, and the commands for that and for giving it up.
pub(super) fn add_kept(facts: &VolumeFacts, judgement: &mut Judgement) {
    let (name, succession) = (&facts.name, &facts.succession);
    match (&succession.history, &succession.unagreed) {
        (Some(history), Some(primary)) => {
            judgement.verdict.push_str(&format!(
                "; nobody here has agreed that {primary} took over: what was overwritten since {}, is kept ({}); \
                 blockmirror forget {name} agrees, blockmirror undo {name} brings it back",
                back(history),
                Size(history.bytes)
            ));
            if judgement.action == NO_ACTION {
                judgement.action = format!(
                    "if {primary} is to be the primary: blockmirror forget {name}; if not: blockmirror pause {name} \
                     {primary}, then: blockmirror undo {name}"
                );
            }
        }
        (Some(history), None) => judgement.verdict.push_str(&format!(
            "; {} kept for undo, of what this host had before {}: blockmirror undo {name}, or blockmirror forget {name}",
            Size(history.bytes),
            back(history)
        )),
        // Nobody agreed, and there is no room to keep anything.
        (None, Some(primary)) if succession.is_full => judgement.verdict.push_str(&format!(
            "; nobody here has agreed that {primary} took over: blockmirror forget {name} does"
        )),
        (None, _) => {}
    }
}

/// `14:03:11 UTC, 2m ago`
fn back(point: &Rollback) -> String {
    format!("{}, {} ago", clock(point.at_unix_seconds), Seconds(point.age_seconds))
}

/// What this host's copy is good for.
pub(super) fn copy(facts: &VolumeFacts) -> String {
    match (facts.data, &facts.succession.rollback) {
        (Some(CopyState::Consistent), _) | (Some(CopyState::Inconsistent), Some(_))
            if facts.touched.is_some() =>
        {
            "this copy is not to be relied on: something else wrote to it".to_owned()
        }
        (Some(CopyState::Consistent), _) => "this copy is consistent".to_owned(),
        (Some(CopyState::Inconsistent), Some(point)) => {
            format!("this copy can be rolled back to {}", back(point))
        }
        (Some(CopyState::Inconsistent), None) => {
            "this copy is not usable: its resync is not complete".to_owned()
        }
        (Some(CopyState::Empty), _) => "this copy is not usable: nothing was copied yet".to_owned(),
        (None, _) => "it is not known what this copy holds".to_owned(),
    }
}
