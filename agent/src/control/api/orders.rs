//! What the operator orders, and what came of it.

use super::{PeerStatus, VolumeStatus};
use crate::config::{Address, Compression, DeviceKind, Mode, Name};
use serde::{Deserialize, Serialize};
use std::path::PathBuf;

/// Makes a volume with this host as its primary. Answered by [`super::StatusReply`] with that volume alone.
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

/// Asks the primary for a one-time token. Answered by [`Invitation`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct InviteRequest {
    /// How long the token is good for.
    pub expires_seconds: u64,
    /// Where the new host reaches this one; by default what the agent advertises.
    pub addresses: Vec<Address>,
}

/// The schema of [`Invitation`].
pub const INVITATION_SCHEMA: &str = "blockmirror/invitation/v1";

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

/// Asks for the tokens of a volume, and what became of them. Answered by [`InvitationsReply`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct InvitationsRequest;

/// Takes a token back that was not used, and ends what it lets its bearer do. Answered by [`InvitationsReply`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RevokeRequest;

/// The schema of [`InvitationsReply`].
pub const INVITATIONS_SCHEMA: &str = "blockmirror/invitations/v1";

/// The invitations of a volume that are remembered.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct InvitationsReply {
    /// [`INVITATIONS_SCHEMA`].
    pub schema: String,
    /// The volume.
    pub volume: Name,
    /// The oldest first.
    pub invitations: Vec<InvitationStatus>,
}

/// An invitation, and what became of it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct InvitationStatus {
    /// What it is called: the beginning of its secret's hash.
    pub id: String,
    /// How it stands.
    pub state: InvitationState,
    /// How long it is good for yet; null where it is not.
    pub left_seconds: Option<u64>,
}

/// What became of an invitation.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum InvitationState {
    /// Whoever has its token is let in.
    Open,
    /// A host joined or recovered with it.
    Used,
    /// It was not used in time.
    Expired,
    /// The operator took it back.
    Revoked,
}

/// Removes a host from a volume. Answered by [`PeerRemoval`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RemovePeerRequest {
    /// Whether it is wanted even where that leaves the only copy, or another host should do it.
    pub force: bool,
    /// Whether it is only to be said what that would do.
    pub dry_run: bool,
}

/// The schema of [`PeerRemoval`].
pub const PEER_REMOVAL_SCHEMA: &str = "blockmirror/peer-removal/v1";

/// A host that is none of the volume's any more.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PeerRemoval {
    /// [`PEER_REMOVAL_SCHEMA`].
    pub schema: String,
    /// The volume.
    pub volume: Name,
    /// The host.
    pub peer: Name,
    /// Whether it was removed; false where it was only asked what that would do.
    pub done: bool,
    /// The other hosts that are told at once.
    pub told: Vec<String>,
    /// The others, which hear of it when they are back.
    pub untold: Vec<String>,
    /// In words.
    pub verdict: String,
}

/// Makes this host a replica. Answered by [`super::StatusReply`] with that volume alone.
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

/// The schema of [`Promotion`].
pub const PROMOTION_SCHEMA: &str = "blockmirror/promotion/v1";

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

/// Makes this primary a replica. Answered by [`Demotion`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct DemoteRequest;

/// The schema of [`Demotion`].
pub const DEMOTION_SCHEMA: &str = "blockmirror/demotion/v1";

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

/// The schema of [`Switch`].
pub const SWITCH_SCHEMA: &str = "blockmirror/switch/v1";

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
    /// Since when it was written, in seconds since 1970.
    pub since_unix_seconds: Option<u64>,
}

/// What a split costs, and whether it is resolved.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Resolved {
    /// What this host alone has, which goes.
    pub loses: Stake,
    /// What the other host alone has.
    pub spares: Stake,
    /// Whether this host's map does not reach back to the fork, so that everything is copied.
    pub copies_everything: bool,
    /// Whether the other host is the primary, and this one will follow it by itself.
    pub is_kept_primary: bool,
    /// Whether what is overwritten is kept, so that it can be undone.
    pub can_be_undone: bool,
}

/// The schema of [`Resolution`].
pub const RESOLUTION_SCHEMA: &str = "blockmirror/resolution/v1";

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

/// Brings back what this host had before its content was given up. Answered by [`Undoing`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct UndoRequest;

/// The schema of [`Undoing`].
pub const UNDOING_SCHEMA: &str = "blockmirror/undoing/v1";

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

/// Gives up for good what could be brought back. Answered by [`Forgetting`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ForgetRequest;

/// The schema of [`Forgetting`].
pub const FORGETTING_SCHEMA: &str = "blockmirror/forgetting/v1";

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

/// Has a primary take another disk for its own: it serves from a replica at once, and fills the disk meanwhile. Answered by
/// [`Rebuilding`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RebuildRequest {
    /// The disk or image file; an image is made.
    pub backing: PathBuf,
    /// The host to rebuild from; null for one that none has later content than.
    pub from: Option<Name>,
    /// Whether that is wanted also where this host's copy is a good one, and whatever is on the disk.
    pub overwrite: bool,
}

/// The schema of [`Rebuilding`].
pub const REBUILDING_SCHEMA: &str = "blockmirror/rebuilding/v1";

/// A rebuild that has begun.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Rebuilding {
    /// [`REBUILDING_SCHEMA`].
    pub schema: String,
    /// The volume, as it is served now.
    pub volume: VolumeStatus,
    /// The host that it is served from.
    pub source: Name,
    /// The hosts that did not say how up to date they are.
    pub silent: Vec<Name>,
}

/// Takes this host's loop device of the volume away. Answered by [`Release`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseRequest {
    /// Whether that is wanted even while it is in use.
    pub force: bool,
}

/// The schema of [`Release`].
pub const RELEASE_SCHEMA: &str = "blockmirror/release/v1";

/// A loop device that is gone.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Release {
    /// [`RELEASE_SCHEMA`].
    pub schema: String,
    /// The volume.
    pub volume: Name,
    /// Who had it open, in words, and gets I/O errors now.
    pub users: Vec<String>,
}

/// Stops mirroring to or from a peer until [`ResumeRequest`]; what it misses is marked. Answered by [`PeerStatus`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PauseRequest;

/// Goes on mirroring with a peer. Answered by [`PeerStatus`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ResumeRequest;

/// Sets when writes and flushes are answered while a peer is in sync. Answered by [`PeerStatus`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ModeRequest {
    /// The mode.
    pub mode: Mode,
}

/// Sets how what goes to a peer is sent; what isn't named stays. Answered by [`PeerStatus`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TuneRequest {
    /// Whether it is compressed where that is faster.
    pub compression: Option<Compression>,
    /// How many bytes a second a resync of it may copy; 0: no limit of its own.
    pub resync_limit_bytes: Option<u64>,
}

/// Sets where a host is reached, in all volumes that it shares with this one. Answered by [`PeerStatus`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AddressRequest {
    /// Its addresses, one at least. What the host itself says later takes their place.
    pub addresses: Vec<Address>,
}

/// Asks for the other hosts of a volume. Answered by [`PeersReply`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PeersRequest;

/// The schema of [`PeersReply`].
pub const PEERS_SCHEMA: &str = "blockmirror/peers/v1";

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

/// Compares all digests with a peer's. Answered by [`Comparison`], after as long as both hosts need to read the volume; how
/// far it is shows in the status.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CompareRequest;

/// The schema of [`Comparison`].
pub const COMPARISON_SCHEMA: &str = "blockmirror/comparison/v1";

/// What a comparison of all digests found.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Comparison {
    /// [`COMPARISON_SCHEMA`].
    pub schema: String,
    /// The volume.
    pub volume: Name,
    /// The peer whose copy was compared with this host's.
    pub peer: Name,
    /// How much was compared: all but what could not be read here.
    pub compared_bytes: u64,
    /// How much differs.
    pub different_bytes: u64,
    /// Where; the first of them, where they are many.
    pub ranges: Vec<Difference>,
    /// How much could not be read on this host, in whole extents.
    #[serde(default)]
    pub unreadable_bytes: u64,
    /// Where; the first of them, where they are many.
    #[serde(default)]
    pub unreadable: Vec<Difference>,
    /// How long it took.
    pub seconds: u64,
    /// What that means.
    pub verdict: String,
    /// The command to run, or `none`.
    pub action: String,
}

/// A range that differs, or could not be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Difference {
    /// Its first byte.
    pub offset: u64,
    /// How many bytes.
    pub length: u64,
}
