//! What the operator configures: the agent itself, and one file per volume.
//!
//! The types here are the files: a value that was read has passed every check that one file allows. [`ConfigFolder`]
//! reads and writes the files; [`Mistake`] says where one is wrong and what was probably meant. Nothing here looks at
//! backings or the network: a configuration that fits no longer is found when the volume starts.

mod folder;
mod members;
mod mistake;
mod name;
mod removal;

pub use folder::{ConfigFolder, Volumes};
pub use members::{ADDRESSES, PEERS_LIMIT};
pub use mistake::{Contradiction, Mistake};
pub use name::{Address, NAME_LIMIT_BYTES, Name, NotAName, NotAnAddress};
pub use removal::RemovedConfig;

use crate::busy_poll;
use crate::quantity::Size;
use blockmirror_protocol::disk::activity_log::CAPACITY;
use blockmirror_protocol::replica::SpacePolicy;
use blockmirror_protocol::terms;
use blockmirror_protocol::tracker::LEAST_ACTIVE_EXTENTS;
use blockmirror_protocol::tracker::replies::ReplicaLoss;
use blockmirror_protocol::units::{BlockSize, EXTENT_BYTES, HostId, SECTOR_BYTES, VolumeId};
use blockmirror_protocol::wire::Packing;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use std::fmt;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// No volume is larger than this, in bytes: its extents are numbered in 32 bits.
pub const VOLUME_LIMIT_BYTES: u64 = EXTENT_BYTES << 32;

/// How much of the live stream the agent keeps unacknowledged in memory, where the volume's file names no `window`.
pub const DEFAULT_WINDOW: Size = Size(64 << 20);

/// A resync that is held shorter than this, in bytes a second, is better paused.
pub const LEAST_RESYNC_LIMIT: Size = Size(64 << 10);

/// The most that `busy_poll_microseconds` may be: to be woken costs less than that everywhere.
const MOST_BUSY_POLL_MICROSECONDS: u64 = 10_000;

/// How long a write waits for replicas at most, where it waits, in seconds.
pub const DEFAULT_BLOCK_SECONDS: u64 = 30;

/// How much room a replica's pre-images may take.
pub const DEFAULT_PRE_IMAGES: Size = Size(8 << 30);
/// What the activity log covers where nothing else is said: all that a record of it holds.
pub const DEFAULT_ACTIVITY_LOG: Size = Size(CAPACITY as u64 * EXTENT_BYTES);
const LEAST_ACTIVITY_LOG: Size = Size(LEAST_ACTIVE_EXTENTS as u64 * EXTENT_BYTES);

/// The agent's own settings: `agent.toml`. All of them have defaults.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AgentConfig {
    /// What this host is called by its peers; by default [`AgentConfig::host_name`].
    pub name: Option<Name>,
    /// Where the agent listens for peers; an argument of the daemon overrides it.
    pub listen: Option<SocketAddr>,
    /// Where peers reach this host: what tokens and introductions carry. Empty: the addresses of its interfaces.
    #[serde(default)]
    pub advertise: Vec<Address>,
    /// How fast this host sends to peers.
    #[serde(default)]
    pub congestion: Congestion,
    /// How many bytes a second all resyncs from this host may copy together; all that disk and link give by default.
    #[serde(default, deserialize_with = "resync_limit", skip_serializing_if = "Option::is_none")]
    pub resync_limit: Option<Size>,
    /// How long a busy thread looks for its next event before it sleeps, in microseconds; never where it is 0.
    #[serde(default, deserialize_with = "busy_poll_microseconds", skip_serializing_if = "Option::is_none")]
    pub busy_poll_microseconds: Option<u64>,
}

/// What decides how much may be on its way to a peer: QUIC's congestion control, by the names that it has there.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Congestion {
    /// RFC 9438: takes a lost packet for a full link, and shares links well.
    #[default]
    Cubic,
    /// RFC 9002, section 7: the same with a slower return to full speed.
    NewReno,
    /// Measures the link's rate and delay: for long links that lose packets without being full.
    Bbr,
}

/// Whether what goes to a peer is compressed where the link is slower than that takes.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Compression {
    /// It never is.
    #[default]
    Off,
    /// LZ4: some hundred megabytes a second, shrinks less.
    Lz4,
    /// Zstandard at its fastest: slower, shrinks more.
    Zstd,
}

impl Compression {
    /// The same for the wire.
    #[must_use]
    pub fn packing(self) -> Option<Packing> {
        match self {
            Self::Off => None,
            Self::Lz4 => Some(Packing::Lz4),
            Self::Zstd => Some(Packing::Zstd),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Off => "off",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        })
    }
}

impl AgentConfig {
    /// The configured name, or the nearest one to the kernel's host name.
    #[must_use]
    pub fn host_name(&self) -> Name {
        self.name
            .clone()
            .unwrap_or_else(|| Name::nearest(&rustix::system::uname().nodename().to_string_lossy()))
    }

    /// How long a busy thread looks for its next event before it sleeps.
    #[must_use]
    pub fn busy_poll(&self) -> Duration {
        self.busy_poll_microseconds.map_or(busy_poll::DEFAULT_LONGEST, Duration::from_micros)
    }
}

/// What a host is for a volume. One at most is the primary.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Its device is served and written to.
    Primary,
    /// It follows the primary.
    Replica,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Primary => "primary",
            Self::Replica => "replica",
        })
    }
}

/// A kind of device that applications open.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DeviceKind {
    /// An NBD export on a Unix socket, and on `nbd_listen` where that is set.
    Nbd,
    /// A loop device of the kernel, linked from `/dev/blockmirror/NAME`.
    Loop,
}

impl DeviceKind {
    /// All of them, in the order in which status tells of them.
    pub const ALL: [Self; 2] = [Self::Nbd, Self::Loop];

    /// What a volume gets when nothing was said.
    #[must_use]
    pub fn defaults() -> Vec<Self> {
        vec![Self::Nbd, Self::Loop]
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Nbd => "nbd",
            Self::Loop => "loop",
        })
    }
}

/// When writes and flushes are answered (W4).
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Mode {
    /// When they are done here.
    #[default]
    Async,
    /// When the replica has received them, too.
    SemiSync,
    /// A write when the replica has received it, a flush when the replica has it durably, too.
    Sync,
}

impl fmt::Display for Mode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Async => "async",
            Self::SemiSync => "semi-sync",
            Self::Sync => "sync",
        })
    }
}

impl From<terms::Mode> for Mode {
    fn from(mode: terms::Mode) -> Self {
        match mode {
            terms::Mode::Async => Self::Async,
            terms::Mode::SemiSync => Self::SemiSync,
            terms::Mode::Sync => Self::Sync,
        }
    }
}

impl From<Mode> for terms::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Async => Self::Async,
            Mode::SemiSync => Self::SemiSync,
            Mode::Sync => Self::Sync,
        }
    }
}

/// What happens while a replica that writes should wait for is not in sync.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OnReplicaLoss {
    /// Writes go on without it.
    #[default]
    Continue,
    /// Writes wait until `min_replicas` are in sync, and fail after `block_seconds`.
    Block,
}

/// What a primary does that starts and hears from too few of the others to know that none was promoted meanwhile.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StartAlone {
    /// It serves.
    Serve,
    /// Writes and flushes wait until a majority of the volume's hosts was heard, this one included.
    Wait,
}

/// What a replica does when there is no room for pre-images.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum WhenFull {
    /// The resync waits for room; the primary goes on, and marks.
    #[default]
    Pause,
    /// The resync goes on, and the replica can't be rolled back until it ends.
    GoOn,
}

impl From<WhenFull> for SpacePolicy {
    fn from(when_full: WhenFull) -> Self {
        match when_full {
            WhenFull::Pause => Self::Pause,
            WhenFull::GoOn => Self::GoOn,
        }
    }
}

/// One volume on this host: `volumes/NAME.toml`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VolumeConfig {
    /// The volume's name, the same as the file's.
    pub name: Name,
    /// The volume's identity, the same on all its hosts.
    #[serde(serialize_with = "show", deserialize_with = "volume_id")]
    pub id: VolumeId,
    /// What this host is for the volume.
    pub role: Role,
    /// What holds the bytes on this host: an image file or a block device, as an absolute path.
    #[serde(deserialize_with = "absolute_path")]
    pub backing: PathBuf,
    /// The volume's size in bytes, a multiple of 512.
    #[serde(deserialize_with = "size_bytes")]
    pub size_bytes: u64,
    /// The unit of tracking.
    #[serde(
        rename = "block_size_bytes",
        serialize_with = "block_size_bytes",
        deserialize_with = "block_size"
    )]
    pub block_size: BlockSize,
    /// What applications can open while this host is the primary.
    #[serde(default = "DeviceKind::defaults")]
    pub devices: Vec<DeviceKind>,
    /// Where the NBD export is also served over TCP.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nbd_listen: Option<SocketAddr>,
    /// The folder of the certificates with which that is encrypted, as an absolute path. Clients need one too then; without
    /// a folder nothing is encrypted and everybody is served.
    #[serde(default, deserialize_with = "tls_folder", skip_serializing_if = "Option::is_none")]
    pub nbd_tls: Option<PathBuf>,
    /// How much of the live stream is kept unacknowledged in memory (W7).
    #[serde(default = "default_window", deserialize_with = "window")]
    pub window: Size,
    /// How much of the volume can be active at once, in the activity log (W2).
    #[serde(default = "default_activity_log", deserialize_with = "activity_log")]
    pub activity_log: Size,
    /// What happens while a replica that writes should wait for is lost (W4).
    #[serde(default)]
    pub on_replica_loss: OnReplicaLoss,
    /// With `on_replica_loss = "block"`, how many replicas must be in sync for writes to go on.
    #[serde(default = "one")]
    pub min_replicas: usize,
    /// With `on_replica_loss = "block"`, after how many seconds a write or flush that waits fails.
    #[serde(default = "default_block_seconds")]
    pub block_seconds: u64,
    /// What a primary does that starts and hears from too few others (L5): by default it waits where `on_replica_loss` is
    /// `"block"`, and serves where it is `"continue"`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub start_alone: Option<StartAlone>,
    /// How much room the pre-images of a replica may take in the state folder (P2).
    #[serde(default = "default_pre_images")]
    pub pre_images: Size,
    /// What a replica does when that is used up.
    #[serde(default)]
    pub when_full: WhenFull,
    /// How often this host was taken in and removed before; see [`PeerConfig::version`].
    #[serde(default, skip_serializing_if = "is_nought")]
    pub version: u64,
    /// That this host is none of the volume's any more, as another one says.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removal: Option<RemovedConfig>,
    /// The volume's other hosts.
    #[serde(default, rename = "peer", skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<PeerConfig>,
    /// Hosts that were removed: nobody listens to them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub removed: Vec<RemovedConfig>,
}

/// Another host of a volume: `[[peer]]`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PeerConfig {
    /// What the host is called.
    pub name: Name,
    /// What it is for the volume.
    pub role: Role,
    /// The fingerprint of its key.
    #[serde(serialize_with = "show", deserialize_with = "host_id")]
    pub host: HostId,
    /// Where its agent is reached; the first that answers is used.
    #[serde(default)]
    pub addresses: Vec<Address>,
    /// Whether the operator has paused the mirroring between the two.
    #[serde(default)]
    pub paused: bool,
    /// When writes and flushes are answered while this host is the primary and that one is in sync (W4).
    #[serde(default)]
    pub mode: Mode,
    /// Whether what goes to it is compressed where that is faster.
    #[serde(default)]
    pub compression: Compression,
    /// How many bytes a second a resync of it may copy; all that disk and link give by default.
    #[serde(default, deserialize_with = "resync_limit", skip_serializing_if = "Option::is_none")]
    pub resync_limit: Option<Size>,
    /// How often it was taken in and removed before. What is told of a host with a higher number is newer; it is even for
    /// a member, and odd for a host that was removed.
    #[serde(default, skip_serializing_if = "is_nought")]
    pub version: u64,
}

impl PeerConfig {
    /// A peer of which nothing else was said.
    #[must_use]
    pub fn new(name: Name, role: Role, host: HostId, addresses: Vec<Address>) -> Self {
        Self {
            name,
            role,
            host,
            addresses,
            paused: false,
            mode: Mode::default(),
            compression: Compression::default(),
            resync_limit: None,
            version: 0,
        }
    }

    /// The peer and its mode, as the machines know it.
    #[must_use]
    pub fn wanted(&self) -> (HostId, terms::Mode) {
        (self.host, self.mode.into())
    }
}

impl VolumeConfig {
    /// A volume for which nothing else was said.
    #[must_use]
    pub fn new(
        name: Name,
        id: VolumeId,
        role: Role,
        backing: PathBuf,
        size_bytes: u64,
        block_size: BlockSize,
    ) -> Self {
        Self {
            name,
            id,
            role,
            backing,
            size_bytes,
            block_size,
            devices: DeviceKind::defaults(),
            nbd_listen: None,
            nbd_tls: None,
            window: DEFAULT_WINDOW,
            activity_log: DEFAULT_ACTIVITY_LOG,
            on_replica_loss: OnReplicaLoss::default(),
            min_replicas: one(),
            block_seconds: DEFAULT_BLOCK_SECONDS,
            start_alone: None,
            pre_images: DEFAULT_PRE_IMAGES,
            when_full: WhenFull::default(),
            version: 0,
            removal: None,
            peers: Vec::new(),
            removed: Vec::new(),
        }
    }

    /// The statements that contradict each other.
    #[must_use]
    pub fn contradictions(&self) -> Vec<Contradiction> {
        let mut found = Vec::new();
        for (index, peer) in self.peers.iter().enumerate() {
            let others = &self.peers[..index];
            if others.iter().any(|other| other.name == peer.name) {
                found.push(Contradiction::PeerTwice(peer.name.clone()));
            } else if let Some(other) = others.iter().find(|other| other.host == peer.host) {
                found.push(Contradiction::SameKey(other.name.clone(), peer.name.clone()));
            }
        }
        let primaries = self.peers.iter().map(|peer| peer.role).chain([self.role]);
        if primaries.filter(|role| *role == Role::Primary).count() > 1 {
            found.push(Contradiction::TwoPrimaries);
        }
        if self.nbd_tls.is_some() && self.nbd_listen.is_none() {
            found.push(Contradiction::TlsForNothing);
        }
        found
    }

    /// What this host is, and which other one is the primary, if any is.
    pub fn set_roles(&mut self, own: Role, primary: Option<HostId>) {
        self.role = own;
        for peer in &mut self.peers {
            let is_primary = own == Role::Replica && primary == Some(peer.host);
            peer.role = if is_primary { Role::Primary } else { Role::Replica };
        }
    }

    /// With `on_replica_loss = "block"`, what keeps that from being what it says: fewer replicas that writes could wait
    /// for than must be in sync.
    #[must_use]
    pub fn shortfall(&self) -> Option<Contradiction> {
        let count = self.peers.iter().filter(|peer| peer.mode != Mode::Async).count();
        let is_short = self.role == Role::Primary
            && self.on_replica_loss == OnReplicaLoss::Block
            && (count < self.min_replicas || self.min_replicas == 0);
        is_short.then_some(Contradiction::TooFewReplicas { wanted: self.min_replicas, count })
    }

    /// How many extents may be active at once.
    #[must_use]
    pub fn active_extents(&self) -> usize {
        usize::try_from(self.activity_log.0 / EXTENT_BYTES).expect("it was checked")
    }

    /// What the machines do while a replica is lost.
    #[must_use]
    pub fn replica_loss(&self) -> ReplicaLoss {
        match self.on_replica_loss {
            OnReplicaLoss::Continue => ReplicaLoss::Continue,
            OnReplicaLoss::Block => ReplicaLoss::Block {
                min_replicas: self.min_replicas,
                limit: Duration::from_secs(self.block_seconds),
            },
        }
    }

    /// Whether a primary that starts answers no write before a majority of the hosts was heard.
    #[must_use]
    pub fn awaits_majority(&self) -> bool {
        match self.start_alone {
            Some(choice) => choice == StartAlone::Wait,
            None => self.on_replica_loss == OnReplicaLoss::Block,
        }
    }

    /// The peer of that name.
    #[must_use]
    pub fn peer(&self, name: &Name) -> Option<&PeerConfig> {
        self.peers.iter().find(|peer| peer.name == *name)
    }
}

fn is_nought(number: &u64) -> bool {
    *number == 0
}

fn one() -> usize {
    1
}

fn default_block_seconds() -> u64 {
    DEFAULT_BLOCK_SECONDS
}

fn default_pre_images() -> Size {
    DEFAULT_PRE_IMAGES
}

fn default_activity_log() -> Size {
    DEFAULT_ACTIVITY_LOG
}

fn default_window() -> Size {
    DEFAULT_WINDOW
}

fn show<T: fmt::Display, S: Serializer>(value: &T, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.collect_str(value)
}

fn block_size_bytes<S: Serializer>(size: &BlockSize, serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_u64(size.bytes())
}

fn volume_id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<VolumeId, D::Error> {
    VolumeId::from_hex(&String::deserialize(deserializer)?)
        .map_err(|_| serde::de::Error::custom("the id of a volume is 32 hexadecimal digits"))
}

fn host_id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<HostId, D::Error> {
    HostId::from_hex(&String::deserialize(deserializer)?)
        .map_err(|_| serde::de::Error::custom("the fingerprint of a host's key is 64 hexadecimal digits"))
}

fn absolute_path<'de, D: Deserializer<'de>>(deserializer: D) -> Result<PathBuf, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    match path.is_absolute() {
        true => Ok(path),
        false => Err(serde::de::Error::custom("the path of a backing begins with \"/\"")),
    }
}

fn tls_folder<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<PathBuf>, D::Error> {
    let path = PathBuf::deserialize(deserializer)?;
    match path.is_absolute() {
        true => Ok(Some(path)),
        false => Err(serde::de::Error::custom(
            "nbd_tls is the folder of the certificates, a path that begins with \"/\"",
        )),
    }
}

fn size_bytes<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u64, D::Error> {
    let bytes = u64::deserialize(deserializer)?;
    match bytes {
        1..=VOLUME_LIMIT_BYTES if bytes.is_multiple_of(SECTOR_BYTES) => Ok(bytes),
        _ => Err(serde::de::Error::custom("a volume's size is a multiple of 512 bytes, up to 16384T")),
    }
}

fn block_size<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BlockSize, D::Error> {
    BlockSize::new(u64::deserialize(deserializer)?).map_err(serde::de::Error::custom)
}

/// The smallest window takes the largest frame with what that costs besides its payload; one that never has room would
/// break the stream off with each large write. What was allowed once counts as that.
fn window<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
    match Size::deserialize(deserializer)? {
        Size(..0x10_0000) => Err(serde::de::Error::custom("the window is at least 2M")),
        Size(..0x20_0000) => Ok(Size(0x20_0000)),
        window => Ok(window),
    }
}

fn resync_limit<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<Size>, D::Error> {
    match Size::deserialize(deserializer)? {
        limit if limit < LEAST_RESYNC_LIMIT => {
            Err(serde::de::Error::custom("the limit of a resync is at least 64K a second"))
        }
        limit => Ok(Some(limit)),
    }
}

fn busy_poll_microseconds<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u64>, D::Error> {
    match u64::deserialize(deserializer)? {
        microseconds @ ..=MOST_BUSY_POLL_MICROSECONDS => Ok(Some(microseconds)),
        _ => Err(serde::de::Error::custom(format!(
            "a thread looks for its next event for {MOST_BUSY_POLL_MICROSECONDS} microseconds at most"
        ))),
    }
}

fn activity_log<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Size, D::Error> {
    let size = Size::deserialize(deserializer)?;
    match (LEAST_ACTIVITY_LOG..=DEFAULT_ACTIVITY_LOG).contains(&size) {
        true => Ok(size),
        false => Err(serde::de::Error::custom("the activity log covers from 512M to 4064M")),
    }
}

#[cfg(test)]
mod tests;
