//! A replica's view: whether its copy can be used, and whether it is kept up.

use super::{Judgement, NO_ACTION, is_usable, link, progress};
use crate::config::Role;
use crate::control::api::{Connection, CopyState, PeerStatus, VolumeFacts, VolumeState};
use crate::quantity::Seconds;

pub(super) fn judge(facts: &VolumeFacts) -> Judgement {
    let primary = facts.peers.iter().find(|peer| peer.role == Role::Primary);
    if let Some(error) = &facts.backing_error {
        let backing = facts.backing.display();
        let verdict =
            format!("failed: the backing {backing} has failed ({error}); this copy is no longer updated");
        let action = "check the disk, then: systemctl restart blockmirror-agent";
        return Judgement::new(VolumeState::Failed, verdict, action);
    }
    let Some(primary) = primary else {
        let verdict = format!("no primary is known; {}", copy(facts));
        return Judgement::new(VolumeState::Waiting, verdict, NO_ACTION);
    };
    match primary.connection {
        Connection::Connected => connected(facts, primary),
        Connection::Connecting | Connection::Disconnected | Connection::Paused => waiting(facts, primary),
    }
}

fn connected(facts: &VolumeFacts, primary: &PeerStatus) -> Judgement {
    let name = &primary.name;
    if is_usable(facts.data) {
        return Judgement::new(VolumeState::Following, format!("following {name}; consistent"), NO_ACTION);
    }
    let far = match &primary.resync {
        Some(job) => format!(", {}", progress(job)),
        None => String::new(),
    };
    let verdict = format!("resyncing from {name}{far}: not usable until complete");
    Judgement::new(VolumeState::Resyncing, verdict, NO_ACTION)
}

fn waiting(facts: &VolumeFacts, primary: &PeerStatus) -> Judgement {
    let name = &primary.name;
    let (link, action) = match primary.connection {
        Connection::Paused => (link(primary), format!("blockmirror resume {} {name}", facts.name)),
        _ => {
            let since = primary.connection_seconds.map(|seconds| format!(" since {}", Seconds(seconds)));
            let link = format!("is not connected{}{}", since.unwrap_or_default(), super::reason(primary));
            (link, format!("on {name}: blockmirror status {}", facts.name))
        }
    };
    let verdict = format!("primary {name} {link}; {}", copy(facts));
    Judgement::new(VolumeState::Waiting, verdict, action)
}

/// What this host's copy is good for.
pub(super) fn copy(facts: &VolumeFacts) -> String {
    match (facts.data, facts.epoch) {
        (Some(CopyState::Consistent), Some(epoch)) => format!("this copy is consistent as of epoch {epoch}"),
        (Some(CopyState::Consistent), None) => "this copy is consistent".to_owned(),
        (Some(CopyState::Inconsistent), _) => {
            "this copy is not usable: its resync is not complete".to_owned()
        }
        (Some(CopyState::Empty), _) => "this copy is not usable: nothing was copied yet".to_owned(),
        (None, _) => "it is not known what this copy holds".to_owned(),
    }
}
