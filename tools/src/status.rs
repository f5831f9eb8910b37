//! `blockmirror status`: which copies are good, what is at risk, what to do. One line for a volume that is well, and
//! for any other, or one that is asked for by name, the verdict, the action and what they rest on.

use crate::client::Client;
use crate::offline;
use crate::output::{Error, Output, aligned, warn};
use blockmirror_agent::config::{Mode, Name, Role};
use blockmirror_agent::control::api::{
    Connection, CopyState, DeviceStatus, Failure, FailureKind, PeerState, PeerStatus, StatusReply,
    VolumeState, VolumeStatus,
};
use blockmirror_agent::quantity::{Seconds, Size};
use blockmirror_agent::verdict::{NO_ACTION, progress};
use clap::Args;
use std::time::Duration;

/// Moves to the upper left and clears a terminal.
const CLEAR: &[u8] = b"\x1b[H\x1b[2J";

/// What to show.
#[derive(Args)]
pub struct Arguments {
    /// The volume to show, with all details; by default all volumes
    name: Option<Name>,
    /// Print JSON; with --watch, a line for each second
    #[arg(long)]
    json: bool,
    /// Show it anew each second, until interrupted
    #[arg(long)]
    watch: bool,
}

/// How things stand, and why it is not known better.
struct Picture {
    reply: StatusReply,
    warnings: Vec<String>,
    not_running: Option<Failure>,
}

/// Shows the status, once or each second.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    if arguments.watch {
        return watch(&arguments, client, output).await;
    }
    let picture = look(client, arguments.name.as_ref()).await?;
    match arguments.json {
        true => output.json(&picture.reply)?,
        false => output.lines(&text(&picture.reply, arguments.name.is_some()))?,
    }
    picture.warnings.iter().for_each(|warning| warn(warning));
    let mistake = picture.reply.volumes.iter().find_map(|volume| volume.facts.health.mistake.clone());
    let mistake = mistake.map(|mistake| Failure::new(FailureKind::Failed, mistake));
    picture.not_running.or(mistake).map_or(Ok(()), |failure| Err(failure.into()))
}

async fn watch(arguments: &Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let mut second = tokio::time::interval(Duration::from_secs(1));
    loop {
        second.tick().await;
        let picture = look(client, arguments.name.as_ref()).await?;
        if arguments.json {
            output.json_line(&picture.reply)?;
            continue;
        }
        let mut lines = text(&picture.reply, arguments.name.is_some());
        lines.extend(picture.warnings);
        lines.extend(picture.not_running.map(|failure| failure.message));
        if output.is_terminal() {
            output.bytes(CLEAR)?;
        }
        output.lines(&lines)?;
    }
}

/// Asks the agent, or its files where it is not running.
async fn look(client: &Client, name: Option<&Name>) -> Result<Picture, Failure> {
    match client.status(name).await {
        Ok(reply) => Ok(Picture { reply, warnings: Vec::new(), not_running: None }),
        Err(failure) if failure.kind == FailureKind::AgentNotRunning => {
            let (reply, warnings) = offline::status(client.run(), name)?;
            Ok(Picture { reply, warnings, not_running: Some(failure) })
        }
        Err(failure) => Err(failure),
    }
}

fn text(reply: &StatusReply, all_details: bool) -> Vec<String> {
    if reply.volumes.is_empty() {
        let create = "blockmirror create NAME --backing PATH";
        return vec![format!("no volumes on {}; make one with {create}", reply.host.name)];
    }
    if all_details {
        return details(&reply.volumes);
    }
    let well: Vec<&VolumeStatus> = reply.volumes.iter().filter(|volume| is_well(volume)).collect();
    let rows: Vec<Vec<String>> = well.iter().map(|volume| row(volume)).collect();
    let mut lines = Vec::new();
    for volume in reply.volumes.iter().filter(|volume| !is_well(volume)) {
        lines.extend(detail(volume));
    }
    lines.extend(aligned(&rows));
    lines
}

/// Whether one line says all there is to say.
fn is_well(volume: &VolumeStatus) -> bool {
    matches!(volume.state, VolumeState::Healthy | VolumeState::Following)
        && volume.action == NO_ACTION
        && volume.facts.devices.iter().all(|device| device.error.is_none())
}

/// `data  primary  in sync with b  100G  /dev/blockmirror/data`
fn row(volume: &VolumeStatus) -> Vec<String> {
    let facts = &volume.facts;
    let (words, place) = match facts.role {
        Role::Primary => (format!("in sync with {}", replicas(volume)), device(volume)),
        Role::Replica => (volume.verdict.clone(), None),
    };
    let place = place.unwrap_or_else(|| facts.backing.display().to_string());
    vec![facts.name.to_string(), facts.role.to_string(), words, Size(facts.size_bytes).to_string(), place]
}

fn replicas(volume: &VolumeStatus) -> String {
    let names: Vec<&str> = volume
        .facts
        .peers
        .iter()
        .filter(|peer| peer.role == Role::Replica)
        .map(|peer| peer.name.as_str())
        .collect();
    names.join(", ")
}

/// What to open: a device file rather than an address.
fn device(volume: &VolumeStatus) -> Option<String> {
    let devices = &volume.facts.devices;
    let with_path = devices.iter().find(|device| device.path.is_some());
    with_path.or(devices.first()).map(place)
}

fn place(device: &DeviceStatus) -> String {
    match (&device.path, &device.uri, &device.error) {
        (_, _, Some(error)) => format!("{} is not served ({error})", device.kind),
        (Some(path), ..) => path.display().to_string(),
        (None, Some(uri), None) => uri.clone(),
        (None, None, None) => device.kind.to_string(),
    }
}

/// All that is known about volumes, in words.
pub fn details(volumes: &[VolumeStatus]) -> Vec<String> {
    volumes.iter().flat_map(detail).collect()
}

fn detail(volume: &VolumeStatus) -> Vec<String> {
    let facts = &volume.facts;
    if facts.health.mistake.is_some() {
        let words = format!("{}  {}", facts.name, volume.verdict);
        return vec![words, format!("  action:  {}", volume.action)];
    }
    let mut lines = vec![
        format!("{}  {}  {}", facts.name, facts.role, volume.verdict),
        format!("  action:  {}", volume.action),
        format!("  backing: {}, {}{}", facts.backing.display(), Size(facts.size_bytes), data(facts.data)),
    ];
    let devices: Vec<String> = facts.devices.iter().map(place).collect();
    if facts.role == Role::Primary && !devices.is_empty() {
        lines.push(format!("  devices: {}", devices.join(", ")));
    }
    if let Some(storage) = facts.storage.as_deref().filter(|storage| *storage != "io_uring") {
        lines.push(format!("  storage: {storage}; io_uring cannot be used here and would be faster"));
    }
    let peers: Vec<Vec<String>> = facts.peers.iter().map(peer).collect();
    lines.extend(aligned(&peers).iter().map(|line| format!("  peer:    {line}")));
    let paths: Vec<Vec<String>> = facts.peers.iter().filter_map(path).collect();
    lines.extend(aligned(&paths).iter().map(|line| format!("  path:    {line}")));
    lines
}

/// How another host is reached.
fn path(peer: &PeerStatus) -> Option<Vec<String>> {
    let path = peer.path.as_ref()?;
    let milliseconds = path.round_trip_microseconds as f64 / 1000.0;
    let holes = match path.black_holes {
        0 => String::new(),
        1 => ", which shrank once".to_owned(),
        times => format!(", which shrank {times} times"),
    };
    let words = format!(
        "{milliseconds:.2} ms there and back, packets of {} bytes{holes}, {} of {} lost",
        path.packet_bytes, path.lost_packets, path.sent_packets
    );
    Some(vec![peer.name.to_string(), path.address.to_string(), words])
}

fn data(data: Option<CopyState>) -> &'static str {
    match data {
        Some(CopyState::Empty) => ", empty",
        Some(CopyState::Inconsistent) => ", not usable",
        Some(CopyState::Consistent) => ", consistent",
        None => "",
    }
}

fn peer(peer: &PeerStatus) -> Vec<String> {
    let since = peer.connection_seconds.map(|seconds| format!(" {}", Seconds(seconds))).unwrap_or_default();
    let mut far = Vec::new();
    if peer.role == Role::Replica && peer.mode != Mode::Async {
        far.push(peer.mode.to_string());
    }
    if let Some(bytes) = peer.out_of_sync_bytes {
        far.push(format!("{} out of sync", Size(bytes)));
    }
    if let (Some(bytes @ 1..), seconds) = (peer.lag_bytes, peer.lag_seconds.unwrap_or(0)) {
        far.push(format!("{} on the way for {}", Size(bytes), Seconds(seconds)));
    }
    far.extend(peer.resync.as_ref().map(|job| format!("resync {}", progress(job))));
    far.extend(peer.compare.as_ref().map(|job| format!("compare {}", progress(job))));
    far.extend(peer.error.clone());
    vec![
        peer.name.to_string(),
        peer.role.to_string(),
        format!("{}{since}", connection(peer.connection)),
        peer.state.map(state).unwrap_or_default().to_owned(),
        far.join(", "),
    ]
}

/// The word for a link.
pub fn connection(connection: Connection) -> &'static str {
    match connection {
        Connection::Connected => "connected",
        Connection::Connecting => "connecting",
        Connection::Disconnected => "disconnected",
        Connection::Reachable => "reachable",
        Connection::Paused => "paused",
    }
}

fn state(state: PeerState) -> &'static str {
    match state {
        PeerState::InSync => "in-sync",
        PeerState::Resyncing => "resyncing",
        PeerState::Behind => "behind",
        PeerState::OutOfSync => "out-of-sync",
        PeerState::Failed => "failed",
        PeerState::SplitBrain => "split-brain",
        PeerState::Stranger => "stranger",
        PeerState::Twins => "twins",
    }
}
