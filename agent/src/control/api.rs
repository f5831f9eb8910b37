//! What the agent and the operator's tool say to each other, as JSON.
//!
//! Every answer that scripts may read carries the name and version of its schema; a field is added within a version,
//! never renamed or given another meaning. What a host doesn't know is null, never zero: a replica cannot tell how
//! much it lacks, and a stopped agent cannot tell how far its peers are.

use crate::config::{Address, DeviceKind, Mode, Name, PeerConfig, Role};
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;

/// The schema of [`StatusReply`].
pub const STATUS_SCHEMA: &str = "blockmirror/status/v1";
/// The schema of [`PeersReply`].
pub const PEERS_SCHEMA: &str = "blockmirror/peers/v1";
/// The schema of [`Invitation`].
pub const INVITATION_SCHEMA: &str = "blockmirror/invitation/v1";
/// The schema of [`Comparison`].
pub const COMPARISON_SCHEMA: &str = "blockmirror/comparison/v1";
/// The schema of [`Promotion`].
pub const PROMOTION_SCHEMA: &str = "blockmirror/promotion/v1";
/// The schema of [`Demotion`].
pub const DEMOTION_SCHEMA: &str = "blockmirror/demotion/v1";
/// The schema of [`Switch`].
pub const SWITCH_SCHEMA: &str = "blockmirror/switch/v1";
/// The schema of [`Resolution`].
pub const RESOLUTION_SCHEMA: &str = "blockmirror/resolution/v1";
/// The schema of [`Undoing`].
pub const UNDOING_SCHEMA: &str = "blockmirror/undoing/v1";
/// The schema of [`Forgetting`].
pub const FORGETTING_SCHEMA: &str = "blockmirror/forgetting/v1";

/// Why a request failed, for the program: it decides the tool's exit code.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// It was tried and went wrong.
    Failed,
    /// The request makes no sense.
    Usage,
    /// No agent answers.
    AgentNotRunning,
    /// This host has no such volume or peer.
    NoSuchVolume,
    /// It could destroy data, and was not asked for explicitly.
    Refused,
    /// It did not happen in time.
    Timeout,
}

impl FailureKind {
    /// The exit code of the tool.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Failed => 1,
            Self::Usage => 2,
            Self::AgentNotRunning => 3,
            Self::NoSuchVolume => 4,
            Self::Refused => 5,
            Self::Timeout => 6,
        }
    }
}

/// Why a request failed: one lower-case clause that says what to do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Failure {
    /// For the program.
    pub kind: FailureKind,
    /// For the operator.
    pub message: String,
}

impl Failure {
    /// A failure of some kind.
    #[must_use]
    pub fn new(kind: FailureKind, message: impl Into<String>) -> Self {
        Self { kind, message: message.into() }
    }

    /// The failure that an error and its sources tell: their messages in one clause.
    #[must_use]
    pub fn from_error(kind: FailureKind, error: &dyn std::error::Error) -> Self {
        let mut message = error.to_string();
        let mut source = error.source();
        while let Some(error) = source {
            message = format!("{message}: {error}");
            source = error.source();
        }
        Self { kind, message }
    }

    /// This host has no volume of that name.
    #[must_use]
    pub fn no_such_volume(name: &Name) -> Self {
        let message = format!("no volume \"{name}\" on this host; blockmirror status lists them");
        Self::new(FailureKind::NoSuchVolume, message)
    }

    /// The volume has no peer of that name.
    #[must_use]
    pub fn no_such_peer(volume: &Name, peer: &Name) -> Self {
        let message = format!("no peer \"{peer}\" of {volume}; blockmirror peers {volume} lists them");
        Self::new(FailureKind::NoSuchVolume, message)
    }
}

/// `RUN/agent.json`: where a running or stopped agent keeps what the tool can read without it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AgentRecord {
    /// The agent's process.
    pub pid: u32,
    /// The folder of its configuration.
    pub config: PathBuf,
    /// The folder of its metadata.
    pub state: PathBuf,
    /// Where it listens for peers.
    pub listen: SocketAddr,
}

/// Makes a volume with this host as its primary. Answered by [`StatusReply`] with that volume alone.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateRequest {
    /// The new volume's name.
    pub name: Name,
    /// An image file, made where it is missing, or a block device; as an absolute path.
    pub backing: PathBuf,
    /// The volume's size in bytes; by default all of the backing.
    pub size_bytes: Option<u64>,
    /// What applications can open.
    pub devices: Vec<DeviceKind>,
    /// The unit of tracking in bytes; by default 4096.
    pub block_size_bytes: Option<u64>,
}

/// Asks the primary for a one-time token.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InviteRequest {
    /// How long the token is good for.
    pub expires_seconds: u64,
    /// Where the new host reaches this one; by default what the agent advertises.
    pub addresses: Vec<Address>,
}

/// A one-time token.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Invitation {
    /// [`INVITATION_SCHEMA`].
    pub schema: String,
    /// The volume that it is for.
    pub volume: Name,
    /// What to paste on the new host.
    pub token: String,
    /// How long it is good for.
    pub expires_seconds: u64,
    /// The addresses that it carries.
    pub addresses: Vec<Address>,
}

/// Makes this host a replica. Answered by [`StatusReply`] with that volume alone.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    /// What the primary's operator was given.
    pub token: String,
    /// An image file, made where it is missing, or a block device; as an absolute path.
    pub backing: PathBuf,
    /// Whether a backing that holds data may be used all the same.
    pub overwrite: bool,
}

/// Makes this host the primary of a volume. Answered by [`Promotion`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PromoteRequest {
    /// Whether it is wanted even where something may be lost, or another host may go on as well.
    pub force: bool,
}

/// A promotion that was carried out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Promotion {
    /// [`PROMOTION_SCHEMA`].
    pub schema: String,
    /// The volume, as it stands now.
    pub volume: VolumeStatus,
    /// How long it took until the devices were served.
    pub milliseconds: u64,
    /// When the content was so that it was rolled back to, in seconds since 1970; null where nothing was.
    pub rolled_back_to: Option<u64>,
    /// The hosts that did not say how they stand.
    pub unanswered: Vec<String>,
}

/// A primary that was made a replica; nobody is the primary now.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Demotion {
    /// [`DEMOTION_SCHEMA`].
    pub schema: String,
    /// The volume, as it stands now.
    pub volume: VolumeStatus,
    /// The replicas that have everything, and can be promoted without losing anything.
    pub released: Vec<String>,
    /// The others.
    pub unreleased: Vec<String>,
}

/// Makes this primary a replica, and a replica the primary. Answered by [`Switch`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwitchRequest {
    /// The new primary.
    pub to: Name,
}

/// A switch that was carried out.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Switch {
    /// [`SWITCH_SCHEMA`].
    pub schema: String,
    /// The volume, as it stands on the old primary.
    pub volume: VolumeStatus,
    /// The new primary.
    pub to: Name,
    /// How long nobody could write.
    pub milliseconds_without_writes: u64,
}

/// Gives this host's content up for another's after a split brain. Answered by [`Resolution`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResolveRequest {
    /// The host whose content stays.
    pub keep: Name,
    /// Whether it is only to be said what that would lose.
    pub dry_run: bool,
}

/// What a host has that another one lacks; null where it isn't known. It is never more than this.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Stake {
    /// How many blocks.
    pub blocks: Option<u64>,
    /// How many bytes.
    pub bytes: Option<u64>,
}

/// A split that was resolved, or what resolving it would lose.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Resolution {
    /// [`RESOLUTION_SCHEMA`].
    pub schema: String,
    /// The volume, as it stands now.
    pub volume: VolumeStatus,
    /// The host whose content stays.
    pub keep: Name,
    /// Whether it was carried out.
    pub done: bool,
    /// What this host has that the other one lacks: it goes.
    pub loses: Stake,
    /// What the other one has that this host lacks: it would go if this host's content stayed.
    pub spares: Stake,
    /// When the two were last in sync, in seconds since 1970; null where that isn't known.
    pub in_sync_at: Option<u64>,
    /// Whether everything is copied, because this host's map does not reach back to where the two parted.
    pub copies_everything: bool,
    /// The command that brings back what this host had; null where that is not kept.
    pub undo: Option<String>,
    /// What the choice loses, in one sentence.
    pub verdict: String,
    /// What the opposite choice would lose, in one sentence.
    pub alternative: String,
    /// The command to run, or `none`.
    pub action: String,
}

/// A host that is again what it was before its content was given up.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Undoing {
    /// [`UNDOING_SCHEMA`].
    pub schema: String,
    /// The volume, as it stands now.
    pub volume: VolumeStatus,
    /// How much was restored.
    pub restored_bytes: u64,
    /// When the content was so, in seconds since 1970.
    pub back_to: u64,
}

/// A host that keeps nothing for an undo any more.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Forgetting {
    /// [`FORGETTING_SCHEMA`].
    pub schema: String,
    /// The volume, as it stands now.
    pub volume: VolumeStatus,
    /// How much had been kept.
    pub forgotten_bytes: u64,
}

/// Sets when writes and flushes are answered while a peer is in sync. Answered by [`PeerStatus`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModeRequest {
    /// The mode.
    pub mode: Mode,
}

/// The other hosts of a volume.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PeersReply {
    /// [`PEERS_SCHEMA`].
    pub schema: String,
    /// The volume.
    pub volume: Name,
    /// Its other hosts.
    pub peers: Vec<PeerStatus>,
}

/// What a comparison of all digests found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Comparison {
    /// [`COMPARISON_SCHEMA`].
    pub schema: String,
    /// The volume.
    pub volume: Name,
    /// The peer whose copy was compared with this host's.
    pub peer: Name,
    /// How much was compared.
    pub compared_bytes: u64,
    /// How much differs.
    pub different_bytes: u64,
    /// Where; the first of them, where they are many.
    pub ranges: Vec<Difference>,
    /// How long it took.
    pub seconds: u64,
    /// What that means.
    pub verdict: String,
    /// The command to run, or `none`.
    pub action: String,
}

/// A range that differs.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Difference {
    /// Its first byte.
    pub offset: u64,
    /// How many bytes.
    pub length: u64,
}

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
    /// The other hosts.
    pub peers: Vec<PeerStatus>,
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
    /// Whether a resync waits for room for pre-images.
    pub is_full: bool,
    /// On a primary that must not write any more: the host that was promoted since.
    pub superseded_by: Option<String>,
    /// On a primary that must not write any more: who has its devices open.
    pub openers: Vec<String>,
    /// On a replica that wrote alone: the host whose content it does not take.
    pub split_from: Option<String>,
    /// Since when.
    pub split_seconds: Option<u64>,
    /// What others call this host; null when the agent is not running.
    #[serde(default)]
    pub own_name: Option<String>,
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

impl From<blockmirror_protocol::wire::message::DataState> for CopyState {
    fn from(state: blockmirror_protocol::wire::message::DataState) -> Self {
        use blockmirror_protocol::wire::message::DataState;
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
    /// The operator paused it.
    Paused,
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
    /// What went wrong last, if the link or the peer is not well.
    pub error: Option<String>,
    /// When writes are answered while this host is the primary and that one is in sync.
    #[serde(default)]
    pub mode: Mode,
    /// How far it is; null where this host doesn't know.
    pub state: Option<PeerState>,
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
            error: None,
            mode: peer.mode,
            state: None,
            data: None,
            out_of_sync_bytes: None,
            lag_bytes: None,
            lag_seconds: None,
            durable_epoch: None,
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
