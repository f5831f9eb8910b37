//! How the host, its volumes and their peers stand.

use crate::config::{
    Address, Compression, DeviceKind, Mode, Name, PeerConfig, RemovedConfig, Role, VolumeConfig,
};
use crate::crashes::Panics;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Asks how things stand, for all volumes or one. Answered by [`StatusReply`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StatusRequest;

/// The schema of [`StatusReply`].
pub const STATUS_SCHEMA: &str = "blockmirror/status/v1";

/// How things stand.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StatusReply {
    /// [`STATUS_SCHEMA`].
    pub schema: String,
    /// This host.
    pub host: HostStatus,
    /// The volumes that were asked for, in the order of their names.
    pub volumes: Vec<VolumeStatus>,
}

/// This host and its agent.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct HostStatus {
    /// What peers call it.
    pub name: Name,
    /// The fingerprint of its key; null when the agent is not running.
    pub fingerprint: Option<String>,
    /// The agent's version; null when it is not running.
    pub version: Option<String>,
    /// Where the agent listens for peers; null when it is not running.
    pub listen: Option<SocketAddr>,
}

/// One volume in one word.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum VolumeState {
    /// Primary: every replica is in sync.
    Healthy,
    /// Primary: a replica is missing, paused, behind or failed, or there is none.
    Degraded,
    /// Primary: what a replica lacks is being copied.
    Syncing,
    /// This host's backing failed.
    Failed,
    /// The disk, or the volume's thread, does not answer.
    Hung,
    /// The disk or the file is not there; the volume is opened when it comes.
    Awaiting,
    /// Replica: consistent, and connected to the primary.
    Following,
    /// Replica: being copied to, and not usable.
    Resyncing,
    /// Replica: not connected to the primary.
    Waiting,
    /// The role of this host is just being changed.
    Changing,
    /// Primary: another host was promoted since, so this one takes no writes.
    Superseded,
    /// Both this host and another one wrote after they were last in sync: the operator decides whose content stays.
    SplitBrain,
    /// Replica: this host was removed from the volume.
    Removed,
    /// The agent is not running.
    Stopped,
}

/// A volume, and what its facts mean. Made by [`crate::verdict::running`] or [`crate::verdict::stopped`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// What is known.
    #[serde(flatten)]
    pub facts: VolumeFacts,
    /// In one word.
    pub state: VolumeState,
    /// In one sentence.
    pub verdict: String,
    /// The command to run, or `none`.
    pub action: String,
}

/// What is known about a volume on this host.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct VolumeFacts {
    /// The volume's name.
    pub name: Name,
    /// Its identity, in hexadecimal.
    pub id: String,
    /// What this host is for it.
    pub role: Role,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// The unit of tracking in bytes.
    pub block_size_bytes: u64,
    /// What holds the bytes on this host.
    pub backing: PathBuf,
    /// How the backing failed, if it did.
    pub backing_error: Option<String>,
    /// That something else wrote to it, and when, as long as not all of it was compared since.
    #[serde(default)]
    pub touched: Option<String>,
    /// Loop devices of others on it: what is written there is not mirrored.
    #[serde(default)]
    pub backing_users: Vec<PathBuf>,
    /// What carries out I/O, `io_uring` or `threads`; null when the agent is not running.
    pub storage: Option<String>,
    /// What applications can open.
    pub devices: Vec<DeviceStatus>,
    /// What this host's copy holds.
    pub data: Option<CopyState>,
    /// The last epoch that is durable here.
    pub epoch: Option<u64>,
    /// What there is to say of who may write.
    #[serde(default)]
    pub succession: Succession,
    /// On a primary whose writes wait, or would wait, until more replicas are in sync: how it stands with that.
    #[serde(default)]
    pub blocked: Option<Blocked>,
    /// On a primary whose disk is being filled from a replica: how far that is.
    #[serde(default)]
    pub rebuild: Option<Rebuild>,
    /// What keeps it from its service, or did.
    #[serde(default)]
    pub health: Health,
    /// The other hosts.
    pub peers: Vec<PeerStatus>,
}

/// A primary's disk that is being filled from a replica, which the volume is served from meanwhile.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Rebuild {
    /// The replica.
    pub source: String,
    /// How much is not on the disk yet, in bytes.
    pub missing_bytes: u64,
    /// Whether it goes on: the replica is connected.
    pub is_reached: bool,
    /// How many requests wait for what is not here.
    pub waiting: usize,
    /// How much of it the replica can't read, in bytes.
    pub unreadable_bytes: u64,
    /// Whether the state folder can't be written, so that flushes wait.
    pub is_unrecorded: bool,
    /// Whether the replica can be the source no more: its copy is another one, or it went on by itself.
    pub is_source_lost: bool,
}

/// What keeps a volume from its service, or did so since the agent's start.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Health {
    /// What does not answer.
    #[serde(default)]
    pub hung: Option<Hung>,
    /// What is not there yet.
    #[serde(default)]
    pub awaited: Option<Awaited>,
    /// Whether the volume is not open: what keeps it from that is the backing's error. It is tried again by itself.
    #[serde(default)]
    pub is_closed: bool,
    /// That the backing is smaller than the volume.
    #[serde(default)]
    pub shrunk: Option<Shrunk>,
    /// That the backing is larger than it was when the agent first opened it.
    #[serde(default)]
    pub grown: Option<Grown>,
    /// That the volume stays closed, since it ended the agent again and again.
    #[serde(default)]
    pub panics: Option<Panics>,
    /// Errors that there were, also where all is well again.
    #[serde(default)]
    pub errors: Option<Errors>,
    /// Who still has the device of an earlier run of the agent, which gives errors only.
    #[serde(default)]
    pub stale: Vec<String>,
    /// What is wrong with the volume's configuration, so that it is not served.
    #[serde(default)]
    pub mistake: Option<String>,
}

/// Errors that applications were given, and those of a replica's disk.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Errors {
    /// Reads of applications that failed.
    pub reads: u64,
    /// Their writes, trims and zeroings.
    pub writes: u64,
    /// Their flushes.
    pub flushes: u64,
    /// On a replica, what could not be written or read for the primary.
    pub copies: u64,
    /// How many of these found no space.
    pub no_room: u64,
    /// How long ago the first was.
    pub first_seconds: u64,
    /// How long ago the last was.
    pub last_seconds: u64,
    /// The last, in words.
    pub last: String,
}

/// What does not answer. Everything else in the facts is as it was last known.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hung {
    /// The file or device that the kernel was asked for, or the volume's thread.
    pub what: String,
    /// For how long.
    pub seconds: u64,
}

/// What a volume waits for to be opened.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Awaited {
    /// What is missing, as in "/srv/data.img is not there".
    pub what: String,
    /// For how long.
    pub seconds: u64,
}

/// A backing that has become smaller than the volume: what was beyond its end is not there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Shrunk {
    /// How many bytes it has.
    pub size_bytes: u64,
    /// How many the volume has, and the backing had.
    pub volume_bytes: u64,
}

/// A backing that has become larger. The volume does not.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Grown {
    /// How many bytes it has.
    pub size_bytes: u64,
    /// How many it had.
    pub before_bytes: u64,
}

impl VolumeFacts {
    /// A volume of which no more is known than its configuration.
    #[must_use]
    pub fn unknown(config: &VolumeConfig) -> Self {
        Self {
            name: config.name.clone(),
            id: config.id.to_string(),
            role: config.role,
            size_bytes: config.size_bytes,
            block_size_bytes: config.block_size.bytes(),
            backing: config.backing.clone(),
            backing_error: None,
            touched: None,
            backing_users: Vec::new(),
            storage: None,
            devices: Vec::new(),
            data: None,
            epoch: None,
            succession: Succession::default(),
            blocked: None,
            rebuild: None,
            health: Health::default(),
            peers: config.peers.iter().map(PeerStatus::unknown).collect(),
        }
    }
}

/// What writes wait for at present: that so many replicas are in sync (`on_replica_loss = "block"`), or that one hears
/// otherwise that was promised that they do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Blocked {
    /// How many replicas of a mode that writes wait for are in sync.
    pub in_sync: usize,
    /// How many it takes.
    pub required: usize,
    /// How many writes and flushes wait.
    pub requests: usize,
    /// How long the oldest of them has waited.
    pub oldest_seconds: u64,
    /// After how long they fail; null where they wait until the operator decides otherwise.
    pub limit_seconds: Option<u64>,
    /// The replica that was promised that nothing is answered without it, or without so many others, where the writes wait for
    /// it alone to hear otherwise.
    #[serde(default)]
    pub promised_to: Option<String>,
}

/// Who may write to a volume, who could, and what keeps a change of that from being whole.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Succession {
    /// How many promotions there were, as far as this host knows; null where it doesn't.
    pub fence: Option<u64>,
    /// A change of the role that is under way, as in "this host is just being promoted".
    pub change: Option<String>,
    /// Whether the primary was demoted when this replica had everything.
    pub released: bool,
    /// Whether this host was the last primary and was demoted.
    pub demoted: bool,
    /// While a resync makes this copy a mixture: when it was what a promotion would roll back to.
    pub rollback: Option<Rollback>,
    /// What is kept of what this copy was before its content was given up: an undo would bring it back.
    #[serde(default)]
    pub history: Option<Rollback>,
    /// On a replica that has not agreed to its primary: which host took over. What it overwrites is kept as `history`.
    #[serde(default)]
    pub unagreed: Option<String>,
    /// Whether a resync waits for room for pre-images, or until what they are to hold can be read.
    pub is_full: bool,
    /// What has no room then, and what makes some.
    #[serde(default)]
    pub shortage: Option<String>,
    /// On a primary that must not write any more: the host that was promoted since.
    pub superseded_by: Option<String>,
    /// On a primary that must not write any more: who has its devices open.
    pub openers: Vec<String>,
    /// On a replica that wrote alone: the host whose content it does not take.
    pub split_from: Option<String>,
    /// Since when.
    pub split_seconds: Option<u64>,
    /// Whether it wrote nothing alone, and that host lost what is here: it was recovered from an older copy or set back.
    #[serde(default)]
    pub is_beyond: bool,
    /// That this host was removed from the volume, as another one says.
    #[serde(default)]
    pub removed: Option<Removed>,
    /// On a replica without a primary: a host that was heard and is to be promoted rather than this one.
    #[serde(default)]
    pub better: Option<Better>,
    /// On a replica without a primary: a host that was heard of and went on elsewhere.
    #[serde(default)]
    pub elsewhere: Option<Elsewhere>,
    /// On a primary that was demoted and promoted again: hosts that may not know of that yet. No write and no flush is answered
    /// before they do.
    #[serde(default)]
    pub awaited: Vec<String>,
    /// On a primary that has heard from no other host since its start, or from too few.
    #[serde(default)]
    pub alone: Option<Alone>,
    /// What others call this host; null when the agent is not running.
    #[serde(default)]
    pub own_name: Option<String>,
}

/// That a host is none of the volume's any more.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Removed {
    /// The host on which the operator removed it.
    pub by: Name,
    /// When that was, in seconds since 1970.
    pub at_unix_seconds: u64,
}

impl From<&RemovedConfig> for Removed {
    fn from(removed: &RemovedConfig) -> Self {
        Self { by: removed.by.clone(), at_unix_seconds: removed.at_seconds }
    }
}

/// A host whose copy is better than this one.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Better {
    /// What it is called.
    pub name: String,
    /// Whether it was the primary, and was demoted while this copy was out of its reach.
    pub was_demoted: bool,
    /// Whether its disk is not there, or does not answer.
    #[serde(default)]
    pub is_away: bool,
}

/// A host that went on while this one was out of its reach: a promotion here would begin a second history.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Elsewhere {
    /// What it is called.
    pub name: String,
    /// How it went on.
    pub how: WentOn,
    /// Whether its disk is not there, or does not answer.
    pub is_away: bool,
}

/// How a host went on elsewhere.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WentOn {
    /// It is the primary, and serves the volume.
    Serves,
    /// It was promoted after this copy was last in touch with a primary, as it or another host says.
    Promoted,
    /// It went on with a primary that was recovered from an older copy, or set back: each copy has what the other lacks.
    Split,
}

/// How few hosts a primary has heard since its start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Alone {
    /// When another host was last heard, by this host's clock, in seconds since 1970; null where that is not known.
    pub heard_at_unix_seconds: Option<u64>,
    /// How long ago that was.
    pub heard_seconds: Option<u64>,
    /// How many hosts were heard since the start, this one included.
    pub hosts: usize,
    /// How many the volume has.
    pub of: usize,
    /// How many are a majority.
    pub majority: usize,
    /// Whether writes and flushes wait for a majority.
    pub is_awaited: bool,
}

/// A point that a copy can be rolled back to.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Rollback {
    /// When the copy was so, in seconds since 1970.
    pub at_unix_seconds: u64,
    /// How long ago that was.
    pub age_seconds: u64,
    /// How much room the pre-images take that lead back to it.
    pub bytes: u64,
}

/// What a copy holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CopyState {
    /// Nothing yet.
    Empty,
    /// A mixture that is not usable: a resync is under way or was interrupted.
    Inconsistent,
    /// A legal crash image of the volume.
    Consistent,
}

impl From<blockmirror_protocol::terms::DataState> for CopyState {
    fn from(state: blockmirror_protocol::terms::DataState) -> Self {
        use blockmirror_protocol::terms::DataState;
        match state {
            DataState::Empty => Self::Empty,
            DataState::Inconsistent => Self::Inconsistent,
            DataState::Consistent => Self::Consistent,
        }
    }
}

/// Something that applications can open.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DeviceStatus {
    /// What it is.
    pub kind: DeviceKind,
    /// How to connect to it, for what is served by a protocol.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uri: Option<String>,
    /// Where it is, for what has a place among the files.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Why it is not served, if it is not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What an operator should know who has it served like this.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub warning: Option<String>,
}

/// The link to a peer.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Connection {
    /// A session is open.
    Connected,
    /// One is being opened.
    Connecting,
    /// The last attempt failed, or the link was lost.
    Disconnected,
    /// The host can be reached. No session is needed between two that follow the same primary.
    Reachable,
    /// The operator paused it.
    Paused,
}

/// The way to another host, as the connection that this one has dialled shows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NetworkPath {
    /// Where the host was reached.
    pub address: Address,
    /// The largest packet that gets through, in bytes of UDP payload.
    pub packet_bytes: u16,
    /// How long an answer takes on the wire.
    pub round_trip_microseconds: u64,
    /// How many packets were sent since the connection began.
    pub sent_packets: u64,
    /// How many of them were lost.
    pub lost_packets: u64,
    /// How often packets of a size that had got through did so no longer, and nobody said so.
    pub black_holes: u64,
}

/// A replica, as the primary sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PeerState {
    /// It has everything but what is on its way (D4).
    InSync,
    /// What it lacks is being copied.
    Resyncing,
    /// It is connected and gets less than is written.
    Behind,
    /// It lacks something that is not being copied now.
    OutOfSync,
    /// Its backing failed.
    Failed,
    /// It wrote alone after the two were last in sync, as this host did: the operator decides whose content stays.
    SplitBrain,
    /// Its history has nothing in common with this host's.
    Stranger,
    /// Two hosts use its key: it can't be told which of them has what.
    Twins,
}

/// Another host of a volume, as this one sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PeerStatus {
    /// What it is called.
    pub name: Name,
    /// The fingerprint of its key.
    pub fingerprint: String,
    /// What it is for the volume.
    pub role: Role,
    /// Where its agent is reached.
    pub addresses: Vec<Address>,
    /// The link to it.
    pub connection: Connection,
    /// How long the link has been so.
    pub connection_seconds: Option<u64>,
    /// Whether it was paused on that host, not on this one.
    #[serde(default)]
    pub paused_there: bool,
    /// The way to it, while this host has a connection there.
    #[serde(default)]
    pub path: Option<NetworkPath>,
    /// What went wrong last, if the link or the peer is not well.
    pub error: Option<String>,
    /// Whether it was promised that nothing is answered without it, or without so many others, and need not have heard
    /// otherwise.
    #[serde(default)]
    pub promised: bool,
    /// When writes are answered while this host is the primary and that one is in sync.
    #[serde(default)]
    pub mode: Mode,
    /// Whether what this host sends to it is compressed where that is faster.
    #[serde(default)]
    pub compression: Compression,
    /// How many bytes a second a resync of it may copy; null: it has no limit of its own, apart from the agent's for all.
    #[serde(default)]
    pub resync_limit_bytes: Option<u64>,
    /// How far it is; null where this host doesn't know.
    pub state: Option<PeerState>,
    /// With a split brain, whether it has what this host lost, which was recovered from an older copy or set back.
    #[serde(default)]
    pub is_beyond: bool,
    /// What its copy held when it last told.
    pub data: Option<CopyState>,
    /// What may differ there: what is marked, and what is on its way as soon as the peer is not in sync.
    pub out_of_sync_bytes: Option<u64>,
    /// What is on its way and not acknowledged as durable.
    pub lag_bytes: Option<u64>,
    /// The age of the oldest of that.
    pub lag_seconds: Option<u64>,
    /// The last epoch that is durable there; to be compared with the volume's own.
    pub durable_epoch: Option<u64>,
    /// How often it has said since the agent started what it has durably; null where this host doesn't hear it. Each status
    /// asks it to say so.
    #[serde(default)]
    pub heard: Option<u64>,
    /// The copying of what it lacks, while that is under way.
    pub resync: Option<Progress>,
    /// A comparison of digests, while that is under way.
    pub compare: Option<Progress>,
}

impl PeerStatus {
    /// A peer of which this host knows nothing now.
    #[must_use]
    pub fn unknown(peer: &PeerConfig) -> Self {
        Self {
            name: peer.name.clone(),
            fingerprint: peer.host.to_string(),
            role: peer.role,
            addresses: peer.addresses.clone(),
            connection: if peer.paused { Connection::Paused } else { Connection::Disconnected },
            connection_seconds: None,
            paused_there: false,
            path: None,
            error: None,
            mode: peer.mode,
            compression: peer.compression,
            resync_limit_bytes: peer.resync_limit.map(|limit| limit.0),
            is_beyond: false,
            state: None,
            data: None,
            out_of_sync_bytes: None,
            lag_bytes: None,
            lag_seconds: None,
            durable_epoch: None,
            heard: None,
            promised: false,
            resync: None,
            compare: None,
        }
    }
}

/// How far a long job is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Progress {
    /// How much is done.
    pub done_bytes: u64,
    /// How much there is to do in all.
    pub total_bytes: u64,
    /// Bytes per second.
    pub rate: u64,
    /// How long the rest will take at this rate; null while nothing moves.
    pub eta_seconds: Option<u64>,
}

impl Progress {
    /// A job's progress at a rate in bytes per second; the time left follows from the two.
    #[must_use]
    pub fn new(done_bytes: u64, total_bytes: u64, rate: u64) -> Self {
        let left = total_bytes.saturating_sub(done_bytes);
        let eta_seconds = (rate > 0).then(|| left.div_ceil(rate));
        Self { done_bytes, total_bytes, rate, eta_seconds }
    }
}
