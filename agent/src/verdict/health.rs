//! What keeps a volume from its service: a disk that does not answer, one that is not there yet, errors that there were,
//! what an earlier run left.

use super::{Judgement, NO_ACTION, is_in_sync, is_usable, primary};
use crate::config::Role;
use crate::control::api::{Errors, Grown, Hung, Panics, PeerStatus, Shrunk, VolumeFacts, VolumeState};
use crate::quantity::Seconds;

/// The backing is not there yet.
pub(super) fn awaiting(facts: &VolumeFacts) -> Judgement {
    let awaited = facts.health.awaited.as_ref().expect("whoever calls has looked");
    let consequence = match facts.role {
        Role::Primary => "the device is served when it comes",
        Role::Replica => "this copy is kept up again when it comes",
    };
    let verdict = format!("awaiting: {}, for {}; {consequence}", awaited.what, Seconds(awaited.seconds));
    let action = match (facts.role, primary::rebuild_of(facts)) {
        (Role::Primary, Some(recovery)) => {
            format!("bring it back and it is taken up by itself; if it is lost: {recovery}")
        }
        _ => "bring it back and it is taken up by itself".to_owned(),
    };
    Judgement::new(VolumeState::Awaiting, verdict, action)
}

/// The backing is smaller than the volume, which is not opened.
pub(super) fn shrunk(facts: &VolumeFacts) -> Judgement {
    let shrunk = facts.health.shrunk.expect("whoever calls has looked");
    let (backing, volume_bytes) = (facts.backing.display(), shrunk.volume_bytes);
    let verdict = format!("failed: {}", shrinkage(facts, shrunk));
    let again = format!("make {backing} {volume_bytes} bytes long again and it is opened by itself");
    let action = match (facts.role, primary::rebuild_of(facts)) {
        (Role::Replica, _) => format!("{again}; what differs then is copied"),
        // It would be the source of all others, also of what is lost.
        (Role::Primary, Some(recovery)) => {
            format!(
                "with a disk of {volume_bytes} bytes or more: {recovery}; only where nothing was lost: {again}"
            )
        }
        (Role::Primary, None) => format!("only where nothing was lost: {again}"),
    };
    Judgement::new(VolumeState::Failed, verdict, action)
}

/// `the backing /dev/vdb has become smaller than the volume: ...`
fn shrinkage(facts: &VolumeFacts, shrunk: Shrunk) -> String {
    let Shrunk { size_bytes, volume_bytes } = shrunk;
    format!(
        "the backing {} has become smaller than the volume: it has {size_bytes} bytes, and had {volume_bytes}; what was \
         beyond its end is not there",
        facts.backing.display()
    )
}

/// `the backing /dev/vdb has become larger: ...`
pub(super) fn growth(facts: &VolumeFacts, grown: Grown) -> String {
    let Grown { size_bytes, before_bytes } = grown;
    format!(
        "the backing {} has become larger: it has {size_bytes} bytes, and had {before_bytes}; the volume keeps its {} bytes, \
         and what is beyond them is not mirrored",
        facts.backing.display(),
        facts.size_bytes
    )
}

/// What to do where the backing became smaller while the volume is open.
fn regrowth(facts: &VolumeFacts, shrunk: Shrunk) -> String {
    let (volume, backing, volume_bytes) = (&facts.name, facts.backing.display(), shrunk.volume_bytes);
    let replicas = || facts.peers.iter().filter(|peer| peer.role == Role::Replica);
    let usable = replicas().filter(|peer| peer.data.is_none() || is_usable(peer.data));
    let fullest = usable.min_by_key(|peer| peer.out_of_sync_bytes.unwrap_or(u64::MAX));
    match (facts.role, replicas().find(|peer| is_in_sync(peer)), fullest) {
        (Role::Replica, ..) => {
            format!(
                "make {backing} {volume_bytes} bytes long again; what differs then is copied from the primary"
            )
        }
        // What was lost here would be copied to the others.
        (Role::Primary, Some(peer), _) => format!(
            "stop what uses the device, then: blockmirror switch {volume} --to {}; {backing} can be made \
             {volume_bytes} bytes long again after that",
            peer.name
        ),
        (Role::Primary, None, Some(peer)) => format!(
            "stop what uses the device, then, on {}: blockmirror promote {volume} --force, which goes on with what it \
             has; {backing} can be made {volume_bytes} bytes long again after that",
            peer.name
        ),
        (Role::Primary, None, None) => format!(
            "copy what can be read to another disk; only where nothing was lost: make {backing} {volume_bytes} bytes \
             long again"
        ),
    }
}

/// The volume ended the agent again and again.
pub(super) fn panics(facts: &VolumeFacts) -> Judgement {
    let panics = facts.health.panics.as_ref().expect("whoever calls has looked");
    let Panics { times, last, notes } = panics;
    let verdict = format!(
        "failed: this volume ended the agent {times} times in a row, which is a mistake of Blockmirror's ({last}); it \
         stays closed, so that other volumes are served, and its state is kept"
    );
    let action = format!("to try again: rm {}; systemctl restart blockmirror-agent", notes.display());
    Judgement::new(VolumeState::Failed, verdict, action)
}

/// Adds what was wrong and may be so again, and what is in the way.
pub(super) fn add(facts: &VolumeFacts, judgement: &mut Judgement) {
    let mut actions = Vec::new();
    if let Some(shrunk) = facts.health.shrunk.filter(|_| !facts.health.is_closed) {
        judgement.verdict.push_str(&format!("; {}", shrinkage(facts, shrunk)));
        actions.push(regrowth(facts, shrunk));
    }
    if let Some(errors) = &facts.health.errors {
        judgement.verdict.push_str(&format!("; {}", in_words(errors)));
        actions.push(remedy(facts, errors));
    }
    for user in &facts.health.stale {
        judgement.verdict.push_str(&format!(
            "; the device of before the agent's start is still {user}, and gives errors only"
        ));
        actions.push("a stale mount: umount it, fsck the volume's device, mount that".to_owned());
    }
    if actions.is_empty() {
        return;
    }
    if judgement.state == VolumeState::Healthy {
        // The copies are, this host is not.
        judgement.state = VolumeState::Degraded;
        judgement.verdict = judgement.verdict.replacen("healthy", "degraded", 1);
    }
    if judgement.action == NO_ACTION {
        judgement.action = actions.swap_remove(0);
    }
}

/// `applications got errors (3 writes, the last 5s ago: no space left on device)`
fn in_words(errors: &Errors) -> String {
    let one_or_more = |count: u64, what: &str, plural: &str| match count {
        0 => None,
        1 => Some(format!("1 {what}")),
        several => Some(format!("{several} {plural}")),
    };
    let applications = [
        one_or_more(errors.reads, "read", "reads"),
        one_or_more(errors.writes, "write", "writes"),
        one_or_more(errors.flushes, "flush", "flushes"),
    ];
    let applications: Vec<String> = applications.into_iter().flatten().collect();
    let clause = match (applications.as_slice(), errors.copies) {
        ([], copies) => format!("the disk gave errors ({copies})"),
        (kinds, _) => format!("applications got errors ({})", kinds.join(", ")),
    };
    format!(
        "{clause}, the first {} and the last {} ago: {}",
        Seconds(errors.first_seconds),
        Seconds(errors.last_seconds),
        errors.last
    )
}

fn remedy(facts: &VolumeFacts, errors: &Errors) -> String {
    let backing = facts.backing.display();
    let disk = match errors.no_room {
        0 => format!("check the disk of {backing}"),
        _ => format!("make room for {backing}"),
    };
    let volume = &facts.name;
    match (facts.role, facts.peers.iter().find(|peer| peer.role == Role::Replica)) {
        (Role::Primary, Some(peer)) => format!(
            "{disk}, and fsck the file systems on the volume; a comparison that finds nothing ends this: \
             blockmirror compare {volume} {}",
            peer.name
        ),
        (Role::Primary, None) => {
            format!("{disk}, and fsck the file systems on the volume; a restart of the agent ends this")
        }
        (Role::Replica, _) => format!("{disk}; a restart of the agent ends this"),
    }
}

/// Something does not answer; what else there is to say is as it was last known.
pub(super) fn hung(facts: &VolumeFacts, hung: &Hung, known: Judgement) -> Judgement {
    let Judgement { verdict, .. } = known;
    let verdict =
        format!("hung: {} has not answered for {}; last known: {verdict}", hung.what, Seconds(hung.seconds));
    let has_copy = |peer: &&PeerStatus| peer.role == Role::Replica && is_in_sync(peer);
    let action = match (facts.role, facts.peers.iter().find(has_copy)) {
        (Role::Primary, Some(peer)) => format!(
            "check the disk; to go on without it, on {}: blockmirror promote {}",
            peer.name, facts.name
        ),
        _ => "check the disk".to_owned(),
    };
    Judgement::new(VolumeState::Hung, verdict, action)
}
