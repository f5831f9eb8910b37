//! The primary's view: how well its replicas cover it.

use super::{Judgement, NO_ACTION, elsewhere, is_in_sync, is_usable, link, listed, progress, reason};
use crate::config::Role;
use crate::control::api::{
    Alone, Blocked, Connection, CopyState, PeerState, PeerStatus, Rebuild, VolumeFacts, VolumeState,
};
use crate::quantity::{Seconds, Size, clock, per_cent};

pub(super) fn judge(facts: &VolumeFacts) -> Judgement {
    let (covering, lacking): (Vec<&PeerStatus>, Vec<&PeerStatus>) =
        facts.peers.iter().filter(|peer| peer.role == Role::Replica).partition(|peer| is_in_sync(peer));
    if let Some(holder) = &facts.succession.superseded_by {
        return superseded(facts, holder);
    }
    if let Some(error) = &facts.backing_error {
        return failed(facts, error, &covering, &lacking);
    }
    let mirrored = mirrored(facts, &covering, &lacking);
    match &facts.rebuild {
        Some(rebuild) => rebuilding(facts, rebuild, mirrored),
        None => mirrored,
    }
}

/// How well the replicas cover it.
fn mirrored(facts: &VolumeFacts, covering: &[&PeerStatus], lacking: &[&PeerStatus]) -> Judgement {
    if covering.is_empty() && lacking.is_empty() {
        let verdict = "at risk: no replica has joined; this host has the only copy";
        return Judgement::new(VolumeState::Degraded, verdict, format!("blockmirror invite {}", facts.name));
    }
    let clauses: Vec<String> =
        covered_by(covering).into_iter().chain(lacking.iter().map(|peer| lack(peer))).collect();
    let is_split = lacking.iter().any(|peer| peer.state == Some(PeerState::SplitBrain));
    let (state, word) = match (lacking.is_empty(), lacking.iter().all(|peer| is_being_copied_to(peer))) {
        _ if is_split => (VolumeState::SplitBrain, "split brain"),
        (true, _) => (VolumeState::Healthy, "healthy"),
        (false, true) => (VolumeState::Syncing, "syncing"),
        _ if facts.blocked.is_some()
            || is_waiting_for_hosts(facts)
            || !facts.succession.awaited.is_empty() =>
        {
            (VolumeState::Degraded, "blocked")
        }
        (false, false) if covering.is_empty() => (VolumeState::Degraded, "at risk"),
        (false, false) => (VolumeState::Degraded, "degraded"),
    };
    let action = lacking.iter().find_map(|peer| remedy(facts, peer)).unwrap_or_else(|| NO_ACTION.to_owned());
    let action = match is_waiting_for_hosts(facts) {
        true => format!(
            "{action}; where no other host was promoted: start_alone = \"serve\" in {}.toml, then: systemctl restart \
             blockmirror-agent",
            facts.name
        ),
        false => action,
    };
    let action = match facts.blocked.as_ref().and_then(|blocked| blocked.promised_to.as_ref()) {
        Some(host) => format!(
            "start {host}, or reach it; where it is lost for good: blockmirror remove-peer {} {host} --force",
            facts.name
        ),
        None => action,
    };
    let (action, released) = match facts.succession.awaited.as_slice() {
        [] => (action, String::new()),
        awaited => (
            format!(
                "start {names}, or reach it; where it is lost for good: blockmirror remove-peer {} {}",
                facts.name,
                awaited[0],
                names = listed(awaited)
            ),
            format!(
                "writes wait until {} has heard that this host is the primary again: it was told that it has \
                 everything, and may be promoted; ",
                listed(awaited)
            ),
        ),
    };
    let waiting = facts.blocked.as_ref().map(waiting).unwrap_or_default();
    let alone = facts.succession.alone.as_ref();
    let hosts = alone.filter(|_| is_waiting_for_hosts(facts)).map(hosts_awaited).unwrap_or_default();
    let alone = alone.map(nobody_heard).unwrap_or_default();
    let verdict = format!("{word}: {waiting}{released}{hosts}{alone}{}", clauses.join("; "));
    Judgement::new(state, verdict, action)
}

/// Whether writes wait for hosts alone. Where they wait for replicas, too, those are among the hosts.
fn is_waiting_for_hosts(facts: &VolumeFacts) -> bool {
    facts.blocked.is_none() && facts.succession.alone.is_some_and(|alone| alone.is_awaited)
}

fn hosts_awaited(alone: &Alone) -> String {
    let Alone { majority, of, .. } = alone;
    format!("writes wait until {majority} of {of} hosts were heard, this one included (start_alone); ")
}

/// That nobody tells this host whether it still is the primary.
fn nobody_heard(alone: &Alone) -> String {
    let company = match alone.heard_at_unix_seconds.zip(alone.heard_seconds) {
        _ if alone.hosts > 1 => return String::new(),
        Some((at, ago)) => format!("no other host was heard since {}, {} ago", clock(at), Seconds(ago)),
        None => "no other host was heard since the start".to_owned(),
    };
    format!("{company}: one may have been promoted; ")
}

/// `b holds an identical copy`, where there is one.
fn covered_by(covering: &[&PeerStatus]) -> Option<String> {
    let names: Vec<String> = covering.iter().map(|peer| peer.name.to_string()).collect();
    match names.as_slice() {
        [] => None,
        [only] => Some(format!("{only} holds an identical copy")),
        several => Some(format!("{} hold identical copies", listed(several))),
    }
}

/// What writes wait for, where the operator chose that they do, in front of what else there is to say.
fn waiting(blocked: &Blocked) -> String {
    let Blocked { in_sync, required, requests, oldest_seconds, .. } = *blocked;
    let replicas = if required == 1 { "replica is" } else { "replicas are" };
    let so_far = if in_sync > 0 { format!(" ({in_sync} now)") } else { String::new() };
    let those = match requests {
        0 => "none waits now".to_owned(),
        1 => format!("1 waits for {}", Seconds(oldest_seconds)),
        several => format!("{several} wait, the oldest for {}", Seconds(oldest_seconds)),
    };
    let fail = blocked.limit_seconds.map(|limit| format!(", and fail after {}", Seconds(limit)));
    let fail = fail.unwrap_or_default();
    match &blocked.promised_to {
        Some(host) => format!(
            "writes wait until {host} hears that they are answered without it{fail}: it was promised that they are not, and \
             could be promoted without them; {those}; "
        ),
        None => format!(
            "writes wait until {required} {replicas} in sync{so_far}{fail} (on_replica_loss); {those}; "
        ),
    }
}

/// This host's disk is being filled from a replica. `mirrored`: what is said of the volume otherwise.
fn rebuilding(facts: &VolumeFacts, rebuild: &Rebuild, mirrored: Judgement) -> Judgement {
    let Rebuild { source, missing_bytes, is_reached, waiting, unreadable_bytes, .. } = rebuild;
    let volume = &facts.name;
    let here = facts.size_bytes.saturating_sub(*missing_bytes);
    let share = per_cent(here, facts.size_bytes);
    let of = format!("{share} % ({} of {}) is on this host's disk", Size(here), Size(facts.size_bytes));
    let requests = match waiting {
        0 => "none waits now".to_owned(),
        1 => "1 waits".to_owned(),
        several => format!("{several} wait"),
    };
    if rebuild.is_unrecorded {
        let verdict = format!(
            "blocked: the state folder can't be written, where it is recorded which blocks are on this host's new disk: flushes \
             wait, and writes to the others; {of}"
        );
        let action = "mend the state folder; it goes on by itself".to_owned();
        return Judgement::new(VolumeState::Degraded, verdict, action);
    }
    if rebuild.is_source_lost {
        let verdict = format!(
            "blocked: the copy of {source} is not the one any more that this host's new disk is being filled from; reads of the rest \
             wait: {requests}; {of}"
        );
        let action = format!(
            "blockmirror rebuild {volume} --backing PATH --from HOST --overwrite, or stop this agent, and on a replica: blockmirror \
             promote {volume}"
        );
        return Judgement::new(VolumeState::Degraded, verdict, action);
    }
    if !is_reached {
        let peer = facts.peers.iter().find(|peer| peer.name.as_str() == source);
        let why = peer.and_then(|peer| peer.error.as_ref());
        let why = why.map(|error| format!(" ({error})")).unwrap_or_default();
        let verdict = format!(
            "blocked: {source} is not connected{why}, and alone has what this host's new disk lacks: reads of that wait for it; \
             {requests}; {of}"
        );
        return Judgement::new(VolumeState::Degraded, verdict, format!("start {source}, or reach it"));
    }
    let lost = match unreadable_bytes {
        0 => String::new(),
        bytes => format!("; {} of the rest can't be read there: what needs them fails", Size(*bytes)),
    };
    let said = format!(
        "the volume is served from {source} as far as it is not here yet; {of}; without {source} the rest is lost{lost}"
    );
    match (mirrored.state, lost.is_empty()) {
        (VolumeState::Healthy | VolumeState::Syncing, true) => {
            Judgement::new(VolumeState::Syncing, format!("rebuilding: {said}"), NO_ACTION.to_owned())
        }
        (VolumeState::Healthy | VolumeState::Syncing, false) => {
            let action =
                format!("on {source}: check the disk; what is overwritten here whole is not needed any more");
            Judgement::new(VolumeState::Degraded, format!("rebuilding: {said}"), action)
        }
        (state, _) => {
            Judgement::new(state, format!("{}; rebuilding: {said}", mirrored.verdict), mirrored.action)
        }
    }
}

/// Another host was promoted since.
fn superseded(facts: &VolumeFacts, holder: &str) -> Judgement {
    let openers = listed(&facts.succession.openers);
    let verdict = format!("superseded: {holder} was promoted, so this host takes no writes");
    let (verdict, action) = match openers.as_str() {
        "" => (format!("{verdict}; it becomes a replica of {holder}"), NO_ACTION.to_owned()),
        openers => (
            format!("{verdict}; it becomes a replica of {holder} when nobody has its device open: {openers}"),
            format!("close the device: {openers}"),
        ),
    };
    Judgement::new(VolumeState::Superseded, verdict, action)
}

fn is_being_copied_to(peer: &PeerStatus) -> bool {
    // Nothing known yet counts as being worked on: the handshake is under way.
    peer.connection == Connection::Connected
        && !matches!(
            peer.state,
            Some(
                PeerState::Behind
                    | PeerState::Failed
                    | PeerState::SplitBrain
                    | PeerState::Stranger
                    | PeerState::Twins
            )
        )
}

/// What is wrong with a replica that is not in sync, and what it is good for.
fn lack(peer: &PeerStatus) -> String {
    let name = &peer.name;
    match (peer.connection, peer.state) {
        (_, Some(PeerState::Failed)) => format!("{name} has failed{}; {}", reason(peer), worth(peer)),
        (_, Some(PeerState::SplitBrain)) if peer.is_beyond => format!(
            "{name} has what this host lost, which was set back or recovered from an older copy; \
             neither takes the other's content"
        ),
        (_, Some(PeerState::SplitBrain)) => {
            format!(
                "{name} and this host both wrote after they were last in sync, and neither takes the other's content"
            )
        }
        (_, Some(PeerState::Twins)) => format!("{name} does not count"),
        (_, Some(PeerState::Stranger)) => format!("{name} has no history in common with this host"),
        (Connection::Connected, Some(PeerState::Resyncing)) => {
            let far = peer.resync.as_ref().map_or_else(|| "a part".to_owned(), progress);
            let until = if is_usable(peer.data) { "" } else { " and is not usable until it has all" };
            format!("{name} has {far}{until}{}", reason(peer))
        }
        (Connection::Connected, Some(PeerState::Behind)) => {
            let age = peer.lag_seconds.map(|seconds| format!(" for {}", Seconds(seconds)));
            format!("{name} is behind{}; {}", age.unwrap_or_default(), worth(peer))
        }
        (Connection::Connected, None) => format!("{name} is connected and tells what it has"),
        (Connection::Connected, Some(PeerState::InSync | PeerState::OutOfSync)) => {
            format!("{name} waits to be copied to; {}", worth(peer))
        }
        (
            Connection::Connecting | Connection::Disconnected | Connection::Reachable | Connection::Paused,
            _,
        ) => {
            format!("{name} {}; {}", link(peer), worth(peer))
        }
    }
}

/// How much a replica lacks, and whether what it has can be used.
fn worth(peer: &PeerStatus) -> String {
    // What is on its way counts as marked too, once it is late; so the two are never added up.
    let missing = peer.out_of_sync_bytes.max(peer.lag_bytes);
    let missing = match missing {
        // Bytes that are on their way are known while the marked ones may not be.
        Some(0) if peer.out_of_sync_bytes.is_some() => "nothing was written since".to_owned(),
        None | Some(0) => "it is not known what it lacks".to_owned(),
        Some(bytes) => format!("{} not copied yet", Size(bytes)),
    };
    match peer.data {
        Some(CopyState::Empty) => format!("{missing}; it holds no copy"),
        Some(CopyState::Inconsistent) => format!("{missing}; its copy is not usable until it has all"),
        Some(CopyState::Consistent) | None => missing,
    }
}

/// The command that helps a replica; none where it is being helped.
fn remedy(facts: &VolumeFacts, peer: &PeerStatus) -> Option<String> {
    let (volume, name) = (&facts.name, &peer.name);
    match (peer.connection, peer.state) {
        (_, Some(PeerState::SplitBrain | PeerState::Stranger)) => {
            let own = facts.succession.own_name.as_deref().unwrap_or("HOST");
            Some(format!(
                "to keep this host's content, on {name}: blockmirror resolve {volume} --keep {own}; to keep {name}'s, \
                 here: blockmirror demote {volume}, then blockmirror resolve {volume} --keep {name}"
            ))
        }
        (Connection::Paused, _) if peer.paused_there => {
            let own = facts.succession.own_name.as_deref().unwrap_or("HOST");
            Some(format!("on {name}: blockmirror resume {volume} {own}"))
        }
        (Connection::Paused, _) => Some(format!("blockmirror resume {volume} {name}")),
        (Connection::Connected, state) if state != Some(PeerState::Failed) => None,
        _ => Some(format!("on {name}: blockmirror status {volume}{}", elsewhere(facts, peer))),
    }
}

/// The backing failed: where the data still is.
fn failed(facts: &VolumeFacts, error: &str, covering: &[&PeerStatus], lacking: &[&PeerStatus]) -> Judgement {
    let usable = || lacking.iter().copied().filter(|peer| is_usable(peer.data));
    let fullest = usable().min_by_key(|peer| peer.out_of_sync_bytes.unwrap_or(u64::MAX));
    let unheard = || lacking.iter().copied().filter(|peer| peer.data.is_none());
    let silent = unheard().min_by_key(|peer| peer.out_of_sync_bytes.unwrap_or(u64::MAX));
    let (action, clause) = match (covered_by(covering), fullest, silent) {
        (Some(clause), ..) => (rebuild_from(facts, covering[0]), clause),
        (None, Some(peer), _) => {
            (rebuild_from(facts, peer), format!("{} has a usable copy; {}", peer.name, worth(peer)))
        }
        (None, None, Some(peer)) => {
            let clause = match peer.out_of_sync_bytes {
                Some(0) => format!("{} had everything when it was last heard of", peer.name),
                Some(bytes) => format!("{} lacked {} when it was last heard of", peer.name, Size(bytes)),
                None => format!("what {} holds is not known here now", peer.name),
            };
            (format!("check the disk; if it is lost: {}", rebuild_from(facts, peer)), clause)
        }
        (None, None, None) => {
            let action = match facts.health.is_closed {
                true => "mend that, and it is opened by itself",
                false => "check the disk, then: systemctl restart blockmirror-agent",
            };
            (action.to_owned(), "no replica is known to hold a usable copy".to_owned())
        }
    };
    let verdict = match facts.health.is_closed {
        true => format!("failed: the volume can't be opened ({error}); {clause}"),
        false => format!("failed: the backing {} has failed ({error}); {clause}", facts.backing.display()),
    };
    Judgement::new(VolumeState::Failed, verdict, action)
}

/// The command that goes on from a replica's copy with another disk. One that is not usable is refused then.
fn rebuild_from(facts: &VolumeFacts, peer: &PeerStatus) -> String {
    format!("blockmirror rebuild {} --backing PATH --from {}", facts.name, peer.name)
}

/// The command that goes on from the replica that has the most, if one may have a usable copy.
pub(super) fn rebuild_of(facts: &VolumeFacts) -> Option<String> {
    let replicas = facts.peers.iter().filter(|peer| peer.role == Role::Replica);
    let usable = replicas.filter(|peer| peer.data.is_none() || is_usable(peer.data));
    let best = usable.min_by_key(|peer| peer.out_of_sync_bytes.unwrap_or(u64::MAX))?;
    Some(rebuild_from(facts, best))
}
