//! Control messages: handshake, acknowledgements, state, pairing, and the reads of the operator's tool.
//!
//! A message is sent as its length (u32), its tag (u16) and its body in bincode's fixed little-endian configuration.
//! Tags are given here by hand and never reused, so that the order of the variants means nothing. The receiver limits
//! the length to [`LIMIT_BYTES`] before it reads a body.

use crate::given::Given;
use crate::lineage::Ends;
use crate::ranges::ByteRange;
use crate::terms::{DataState, Fence, Mode, Role};
use crate::units::{
    BlockSize, CopyId, Epoch, Extent, GenerationId, HostId, Mark, Position, Sequence, Session, Stream,
    VolumeId,
};
use bincode::config::{Configuration, Fixint, Limit, LittleEndian};

/// No message is longer than this, tag included, in bytes.
pub const LIMIT_BYTES: usize = 256 << 10;

/// The size of a message's length field, in bytes.
pub const LENGTH_BYTES: usize = 4;

/// How many ranges one [`Union`] carries at most; more are sent as several.
pub const RANGES_PER_UNION: usize = 8192;

const CONFIGURATION: Configuration<LittleEndian, Fixint, Limit<LIMIT_BYTES>> =
    bincode::config::standard().with_fixed_int_encoding().with_limit::<LIMIT_BYTES>();

/// Bytes that are no message: the peer misbehaved or speaks a version that it did not announce.
#[derive(Debug, thiserror::Error)]
pub enum MessageError {
    /// The length field promises more than any message has.
    #[error("the peer announced a message of {0} bytes, more than the limit")]
    TooLong(usize),
    /// The tag is unknown in this version.
    #[error("the peer sent a message with the unknown tag {0}")]
    UnknownTag(u16),
    /// The body does not fit its tag.
    #[error("the peer sent a damaged message with the tag {tag}")]
    Damaged {
        /// The message's tag.
        tag: u16,
        /// What the decoder met; nothing where bytes were left over.
        source: Option<bincode::error::DecodeError>,
    },
}

/// A message of ours that no peer would take: what it tells of has grown beyond its bounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error(
    "a message of {0} bytes can't be sent: its limit is {LIMIT_BYTES}; does the volume's file name too many hosts?"
)]
pub struct OverLimit(pub usize);

/// A host of a volume, as the primary introduces it to the others.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Member {
    /// The name that the operator sees.
    pub name: String,
    /// The fingerprint of its key.
    pub host: HostId,
    /// Where its agent listens, `address:port`.
    pub addresses: Vec<String>,
    /// The mode in which the primary mirrors to it (W4).
    pub mode: Mode,
    /// How often it was taken in and removed before (X3): even, since it is in.
    pub version: u64,
}

/// That a host is none of the volume's any more (X3). It travels with the list of members, so that those who were away
/// when it was removed hear of it from anybody.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Removal {
    /// The fingerprint of its key, which nobody is to listen to.
    pub host: HostId,
    /// The name that it went by.
    pub name: String,
    /// The host on which the operator removed it.
    pub by: String,
    /// When that was, in seconds since 1970, by the clock there.
    pub at_seconds: u64,
    /// How often it was taken in and removed: odd, since it is out. What has the higher number is newer.
    pub version: u64,
}

pub use crate::terms::MEMBERS_LIMIT;

/// How long a host's name is at most, how many addresses it has, and how long each is.
const NAME_LIMIT_BYTES: usize = 63;
const ADDRESSES_LIMIT: usize = 16;
const ADDRESS_LIMIT_BYTES: usize = 260;

impl Member {
    /// Whether a name and addresses fit into the messages in which others are told of them.
    #[must_use]
    pub fn is_sound(name: &str, addresses: &[String]) -> bool {
        name.len() <= NAME_LIMIT_BYTES
            && addresses.len() <= ADDRESSES_LIMIT
            && addresses.iter().all(|address| address.len() <= ADDRESS_LIMIT_BYTES)
    }

    /// Whether a volume may have these hosts.
    #[must_use]
    pub fn are_sound(members: &[Self]) -> bool {
        members.len() <= MEMBERS_LIMIT
            && members.iter().all(|member| Self::is_sound(&member.name, &member.addresses))
    }
}

/// Among the features of [`Hello`] and [`Welcome`]: the replica answers [`Fetch`].
pub const FEATURE_FETCH: u64 = 1;
/// All features that this code has.
pub const FEATURES: u64 = FEATURE_FETCH;

/// The digest of what can't be read, in place of one: no content has it.
pub const UNREADABLE: [u8; 32] = [0; 32];

/// A primary opens a session with a replica. Its first message.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Hello {
    /// The oldest and newest version that the primary speaks.
    pub versions: (u16, u16),
    /// Optional features that it offers, a bit each: [`FEATURES`].
    pub features: u64,
    /// The volume.
    pub volume: VolumeId,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its tracking block.
    pub block_size: BlockSize,
    /// The primary's larger physical sector, in bytes (W1).
    pub sector_bytes: u32,
    /// The primary's copy.
    pub copy: CopyId,
    /// The number of the session that begins.
    pub session: Session,
    /// The live stream that begins with it.
    pub stream: Stream,
    /// The primary's fence.
    pub fence: Fence,
    /// The primary's generations, newest first.
    pub lineage: Vec<GenerationId>,
    /// The mode that the operator chose for this replica (W4).
    pub mode: Mode,
    /// Every host of the volume, the primary first.
    pub members: Vec<Member>,
    /// Where the primary's content ends in generations that others may be further in.
    pub ends: Ends,
}

/// The replica accepts the session. It has drained every older one, and writes nothing of it any more (R1).
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Welcome {
    /// The version that both speak from here on.
    pub version: u16,
    /// The features that both have.
    pub features: u64,
    /// The session that this answers.
    pub session: Session,
    /// The replica's copy.
    pub copy: CopyId,
    /// What the copy holds.
    pub data: DataState,
    /// Whether it can roll back to where it was before the resync that made it inconsistent (P2).
    pub can_roll_back: bool,
    /// The fence of the primary whose resync made it inconsistent.
    pub source: Fence,
    /// What is durable on the replica, as its marker says (P3).
    pub mark: Mark,
    /// The replica's fence.
    pub fence: Fence,
    /// The replica's generations, newest first.
    pub lineage: Vec<GenerationId>,
    /// The replica's physical sector, in bytes (W1).
    pub sector_bytes: u32,
    /// How many bytes of live frames the replica buffers at most.
    pub window_bytes: u64,
}

/// Blocks that the replica knows may differ: its own map for the primary and its activity log (D3). Sent after
/// [`Welcome`] in as many parts as needed.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Union {
    /// Ranges that may differ.
    pub ranges: Vec<ByteRange>,
    /// Whether these were the last.
    pub last: bool,
}

/// Why a host says no.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub enum Refusal {
    /// The volume is unknown here.
    UnknownVolume,
    /// The key is not one of the volume's members.
    UnknownKey,
    /// No common version.
    Version,
    /// Another volume, size or block size than ours.
    Unrelated,
    /// The role does not fit: there is a primary already, or none where one is needed.
    Role,
    /// Busy for a while: being recovered from, or still draining.
    Busy,
    /// The token is wrong, used or expired.
    Token,
    /// The backing failed or its content is not fit to be used.
    Backing,
    /// Anything else that the text explains.
    Other,
    /// Both hosts went on from a common past: the operator decides whose content stays (L6).
    SplitBrain,
    /// There is no room for pre-images, so nothing may be overwritten (P2).
    Space,
    /// The operator paused the mirroring on that host.
    Paused,
    /// As [`Refusal::SplitBrain`], where the primary lacks what the replica has, because it was recovered from an older copy
    /// or set back (X4).
    Beyond,
}

/// A host says no, and why.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Refused {
    /// Why, for the program.
    pub refusal: Refusal,
    /// Why, and what to do, for the operator.
    pub text: String,
}

/// The primary goes on without this replica, by its operator's wish: what it replies from now on may be missing there, so
/// the replica counts no more until a commit (W4).
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Parting {
    /// The session.
    pub session: Session,
    /// Whether the operator paused the mirroring; else another session follows.
    pub paused: bool,
}

/// The primary is about to send copies: the replica's data counts as inconsistent from now on.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct ResyncBegin {
    /// The session.
    pub session: Session,
    /// How many bytes are dirty.
    pub dirty_bytes: u64,
}

/// The replica has recorded [`ResyncBegin`] durably.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct ResyncReady {
    /// The session.
    pub session: Session,
}

/// The map is empty and everything up to `position` is durable on the replica: its data is consistent again.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Commit {
    /// The session.
    pub session: Session,
    /// The end of the epoch after the last copy's read.
    pub position: Position,
    /// The primary's generations, newest first, which the replica adopts.
    pub lineage: Vec<GenerationId>,
    /// Extents with writes that other replicas may not have yet (D5).
    pub active: Vec<Extent>,
    /// The mode that the replica counts in from now on (W4).
    pub mode: Mode,
    /// What it can count on when it is out of reach.
    pub given: Given,
}

/// The replica has recorded a [`Commit`] durably.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Committed {
    /// The session.
    pub session: Session,
    /// The position of the commit.
    pub position: Position,
}

/// What the replica has by now. Cumulative: an acknowledgement covers all before it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
pub struct Acknowledgement {
    /// The session.
    pub session: Session,
    /// The last live write received.
    pub received: Sequence,
    /// The last epoch that is durable.
    pub durable: Epoch,
    /// The last copy up to which all are durable.
    pub copies: u64,
    /// What its marker says, which lags a little.
    pub mark: Mark,
}

/// The digest of a range, asked for by a frame.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Digest {
    /// The session.
    pub session: Session,
    /// The request's number.
    pub number: u64,
    /// BLAKE3 of the range's bytes.
    pub digest: [u8; 32],
}

/// The digest of dirty blocks, asked for by a frame that is numbered as copies are.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct CopyDigest {
    /// The session.
    pub session: Session,
    /// The request's number.
    pub number: u64,
    /// BLAKE3 of the range's bytes.
    pub digest: [u8; 32],
}

/// There is a newer fence than that of whoever greeted, who must stop taking writes (L5).
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Superseded {
    /// The newest fence that is known.
    pub fence: Fence,
}

/// Everything up to the end of this epoch is durable on all hosts that follow the generation (D5).
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Agreed {
    /// The session.
    pub session: Session,
    /// The epoch.
    pub epoch: Epoch,
}

/// The primary is being demoted, and the replica has everything: whoever is promoted next loses nothing.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Release {
    /// The session.
    pub session: Session,
    /// The newest generation.
    pub generation: GenerationId,
}

/// The replica has recorded a [`Release`] durably.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct ReleaseRecorded {
    /// The session.
    pub session: Session,
}

/// A host asks another one how it stands: before a promotion, at the start of a primary, before a resolve.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct AskStanding {
    /// The volume.
    pub volume: VolumeId,
}

/// A replica asks its primary not to go on without it, for a time that begins when this comes.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Renew {
    /// The session.
    pub session: Session,
    /// The question's number.
    pub number: u64,
}

/// The primary won't, unless the replica is told before.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Grant {
    /// The session.
    pub session: Session,
    /// The question's number.
    pub number: u64,
    /// For how long.
    pub milliseconds: u64,
}

/// The primary is going to answer without the replica.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Alone {
    /// The session.
    pub session: Session,
}

/// The replica counts on nothing any more: the primary may go on without it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Parted {
    /// The session.
    pub session: Session,
}

/// The primary asks for an [`Acknowledgement`], to hear that the replica is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct AskMark {
    /// The session.
    pub session: Session,
}

/// How a host stands: what decides who may be promoted, and whose content counts.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Standing {
    /// The host's role.
    pub role: Role,
    /// What its copy holds.
    pub data: DataState,
    /// Whether it can roll back to a point before the resync that made it inconsistent.
    pub can_roll_back: bool,
    /// The newest fence that it knows.
    pub fence: Fence,
    /// Its generations, newest first.
    pub lineage: Vec<GenerationId>,
    /// On a replica, the last epoch that is durable there.
    pub marker: Position,
    /// On a primary, whether its device is being served.
    pub serves: bool,
    /// What this host has that the one that asks lacks, in bytes and at most; `u64::MAX` where it doesn't know.
    pub dirty_bytes: u64,
    /// When each generation of its lineage began, in seconds since 1970; 0 where it doesn't know.
    pub began: Vec<u64>,
    /// For how long its disk has not answered, or was missed, in milliseconds; 0 where it is there. Earlier releases tell
    /// and read it of primaries alone.
    pub silent_milliseconds: u64,
    /// On a primary, or one that was demoted, where its content ends in generations that others may be further in.
    pub ends: Ends,
    /// On a replica, whether it has lost what a primary may have counted on it for
    /// ([`crate::disk::superblock::Superblock::replaced`]).
    pub replaced: bool,
    /// What it counts on as a replica: whoever is promoted while it is not there keeps that word.
    pub given: Box<Given>,
}

impl Standing {
    /// Whether what it says is from its state folder alone: its disk is not there, or does not answer, so that its copy can
    /// be neither used nor read now.
    #[must_use]
    pub fn is_out_of_reach(&self) -> bool {
        self.silent_milliseconds > 0 && !self.serves
    }
}

/// The primary was demoted for this host, which is to be promoted in its place (`switch`).
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct TakeOver {
    /// The volume.
    pub volume: VolumeId,
}

/// The host is the primary now, and serves its device.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct TookOver {
    /// The fence that it holds.
    pub fence: Fence,
}

/// The hosts of the volume: told by its primary after each greeting and when they change, and by anybody who is asked.
#[derive(Clone, PartialEq, Eq, Debug, Default, bincode::Encode, bincode::Decode)]
pub struct Members {
    /// Every host of the volume, the primary first; in an answer, the one that is asked first.
    pub members: Vec<Member>,
    /// The hosts that were removed. One of them that asks is told of its own removal alone.
    pub removed: Vec<Removal>,
}

/// A host asks another one who the volume's hosts are. Answered by [`Members`].
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct AskMembers {
    /// The volume.
    pub volume: VolumeId,
}

/// A new host asks to become a replica, with the secret of an invitation.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Join {
    /// The volume.
    pub volume: VolumeId,
    /// The invitation's secret.
    pub secret: [u8; 32],
    /// The name that the new host goes by.
    pub name: String,
    /// Where its agent listens; an unspecified address stands for the one that the connection comes from.
    pub listen: Vec<String>,
    /// Whether the host only asks whether it could join; the secret is not used up.
    pub ask_only: bool,
}

/// The new host is a replica from now on; the primary will connect to it.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Joined {
    /// The volume.
    pub volume: VolumeId,
    /// Its name.
    pub name: String,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its tracking block.
    pub block_size: BlockSize,
    /// Every host of the volume, the primary first, the new one included.
    pub members: Vec<Member>,
}

/// The operator's tool asks for a volume's content, by its key or with an invitation's secret.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Recover {
    /// The volume's name.
    pub name: String,
    /// The secret of an invitation, where the key is unknown here.
    pub secret: Option<[u8; 32]>,
    /// Whether content that is no legal image of the volume is wanted all the same.
    pub accept_inconsistent: bool,
}

/// The content that a recovery will read; it does not change while the connection lasts.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Recovering {
    /// The volume.
    pub volume: VolumeId,
    /// The copy that is read.
    pub copy: CopyId,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its tracking block.
    pub block_size: BlockSize,
    /// What the copy holds.
    pub data: DataState,
    /// The position that the content is at.
    pub position: Position,
    /// The copy's generations, newest first: the history that the content is of.
    pub lineage: Vec<GenerationId>,
}

/// Before and after it reads, a recovery asks how all hosts of the volume stand, so that it doesn't take old content where
/// there is newer. Whoever could recover may ask; a secret is not used up.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct AskOthers {
    /// The volume's name.
    pub name: String,
    /// The secret of an invitation, where the key is unknown here.
    pub secret: Option<[u8; 32]>,
}

/// How the hosts of the volume stand.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Others {
    /// The one that answers.
    pub own: Box<Standing>,
    /// All others but the one that asks.
    pub others: Vec<Other>,
}

/// Another host of the volume.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Other {
    /// What it is called.
    pub name: String,
    /// Its key.
    pub host: HostId,
    /// Where its agent listens.
    pub addresses: Vec<String>,
    /// How it stands; nothing where it doesn't answer.
    pub standing: Option<Standing>,
}

/// One read of a recovery. Answered by frames of content for the whole range, in order.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct ReadContent {
    /// The volume.
    pub volume: VolumeId,
    /// What to read.
    pub range: ByteRange,
}

/// A recovery asks for the BLAKE3 digest of the whole content.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct AskDigest {
    /// The volume.
    pub volume: VolumeId,
}

/// How far the digest of the whole content is; complete when the digest is there.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct WholeDigest {
    /// How many bytes were read so far.
    pub done_bytes: u64,
    /// BLAKE3 of the whole content.
    pub digest: Option<[u8; 32]>,
}

/// A host tells another one who and where it is: on each connection that it dials to a host of one of its volumes, and again
/// when that changes. Answered by the same of the other.
#[derive(Clone, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Whereabouts {
    /// The name that it goes by.
    pub name: String,
    /// Where its agent listens; an unspecified address stands for the one that the connection comes from.
    pub listen: Vec<String>,
    /// Drawn when its agent started. Two agents that use one key have two.
    pub instance: [u8; 16],
}

/// A primary has lost its disk, and goes on from the copy of the replica that this is sent to. That one follows the fence durably, makes
/// all durable that it has, answers [`Recovering`], and keeps primaries away until the stream ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Lend {
    /// The volume.
    pub volume: VolumeId,
    /// The fence of the primary.
    pub fence: Fence,
}

/// The primary lacks this content, and wants it from the replica, which answers with one frame.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Fetch {
    /// The session.
    pub session: Session,
    /// Names the answer.
    pub number: u64,
    /// What is wanted.
    pub range: ByteRange,
    /// Whether somebody waits for it, so that it goes before what nobody waits for.
    pub is_awaited: bool,
}

/// A stream on which the replica is to answer each [`Fetch`] of a session, those that somebody waits for or all others: with
/// frames, which are all that follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct Fetching {
    /// The volume.
    pub volume: VolumeId,
    /// The session.
    pub session: Session,
    /// Whether it is for those that somebody waits for.
    pub is_awaited: bool,
}

/// The replica can't read what a [`Fetch`] asked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, bincode::Encode, bincode::Decode)]
pub struct FetchFailed {
    /// The session.
    pub session: Session,
    /// Which one.
    pub number: u64,
}

macro_rules! messages {
    ($($tag:literal => $name:ident),* $(,)?) => {
        /// Any control message.
        #[derive(Clone, PartialEq, Eq, Debug)]
        pub enum Message {
            $(#[doc = concat!("See [`", stringify!($name), "`].")] $name($name),)*
        }

        $(impl From<$name> for Message {
            fn from(body: $name) -> Self {
                Self::$name(body)
            }
        })*

        impl Message {
            /// The tags of all messages, in ascending order.
            pub const TAGS: &[u16] = &[$($tag),*];

            /// The message's bytes: length, tag, body.
            ///
            /// # Errors
            /// [`OverLimit`] when the message would be longer than [`LIMIT_BYTES`].
            pub fn encode(&self) -> Result<Vec<u8>, OverLimit> {
                let mut bytes = vec![0; LENGTH_BYTES];
                match self {
                    $(Self::$name(body) => {
                        bytes.extend_from_slice(&u16::to_le_bytes($tag));
                        encode_body(body, &mut bytes);
                    })*
                }
                let length = bytes.len() - LENGTH_BYTES;
                if length > LIMIT_BYTES {
                    return Err(OverLimit(length));
                }
                bytes[..LENGTH_BYTES].copy_from_slice(&(length as u32).to_le_bytes());
                Ok(bytes)
            }

            /// Reads tag and body: what followed the length.
            ///
            /// # Errors
            /// [`MessageError`] for bytes that no sender of this version could have made.
            pub fn decode(bytes: &[u8]) -> Result<Self, MessageError> {
                let Some((tag, body)) = bytes.split_first_chunk() else {
                    return Err(MessageError::Damaged { tag: 0, source: None });
                };
                match u16::from_le_bytes(*tag) {
                    $($tag => decode_body($tag, body).map(Self::$name),)*
                    tag => Err(MessageError::UnknownTag(tag)),
                }
            }
        }
    };
}

messages! {
    1 => Hello,
    2 => Welcome,
    3 => Union,
    4 => Refused,
    5 => ResyncBegin,
    6 => ResyncReady,
    7 => Commit,
    8 => Committed,
    9 => Acknowledgement,
    10 => Digest,
    11 => Members,
    12 => Join,
    13 => Joined,
    14 => Recover,
    15 => Recovering,
    16 => ReadContent,
    17 => AskDigest,
    18 => WholeDigest,
    19 => Superseded,
    20 => Agreed,
    21 => Release,
    22 => ReleaseRecorded,
    23 => AskStanding,
    24 => Standing,
    25 => TakeOver,
    26 => TookOver,
    27 => CopyDigest,
    28 => Parting,
    29 => Renew,
    30 => Grant,
    31 => Parted,
    32 => Alone,
    33 => AskMark,
    34 => Fetch,
    35 => FetchFailed,
    36 => Fetching,
    37 => Lend,
    40 => AskOthers,
    41 => Others,
    60 => AskMembers,
    75 => Whereabouts,
}

/// The length of a message from its length field.
///
/// # Errors
/// [`MessageError::TooLong`] when it is over the limit.
pub fn decode_length(bytes: [u8; LENGTH_BYTES]) -> Result<usize, MessageError> {
    let length = u32::from_le_bytes(bytes) as usize;
    if length > LIMIT_BYTES { Err(MessageError::TooLong(length)) } else { Ok(length) }
}

fn encode_body(body: &impl bincode::Encode, into: &mut Vec<u8>) {
    bincode::encode_into_std_write(body, into, CONFIGURATION).expect("a vector takes all bytes");
}

fn decode_body<Body: bincode::Decode<()>>(tag: u16, bytes: &[u8]) -> Result<Body, MessageError> {
    match bincode::decode_from_slice(bytes, CONFIGURATION) {
        Ok((body, used)) if used == bytes.len() => Ok(body),
        Ok(_) => Err(MessageError::Damaged { tag, source: None }),
        Err(source) => Err(MessageError::Damaged { tag, source: Some(source) }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::terms::Promise;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn messages_have_these_golden_bytes() {
        let generation = GenerationId([0xcd; 16]);
        let position = Position { generation, epoch: Epoch(6), sequence: Sequence(7) };
        let acknowledgement = Acknowledgement {
            session: Session(1),
            received: Sequence(0x0203),
            durable: Epoch(4),
            copies: 5,
            mark: Mark { position, session: Session(8), copies: 9 },
        };
        let refused = Refused { refusal: Refusal::Busy, text: "no".into() };
        let digest = CopyDigest { session: Session(6), number: 7, digest: [0xab; 32] };
        let whereabouts = Whereabouts { name: "b".into(), listen: vec!["h:1".into()], instance: [0xcd; 16] };
        let removal = Removal {
            host: HostId([7; 32]),
            name: "b".into(),
            by: "a".into(),
            at_seconds: 0x0102_0304,
            version: 1,
        };
        let members = Members { members: Vec::new(), removed: vec![removal] };
        let standing = Standing {
            role: Role::Replica,
            data: DataState::Consistent,
            can_roll_back: false,
            fence: Fence { counter: 2, holder: HostId([3; 32]) },
            lineage: vec![GenerationId([4; 16])],
            marker: Position { generation: GenerationId([4; 16]), epoch: Epoch(5), sequence: Sequence(6) },
            serves: false,
            dirty_bytes: 7,
            began: vec![8],
            silent_milliseconds: 12,
            ends: Ends::only(GenerationId([9; 16]), Epoch(10)),
            replaced: true,
            given: Box::new(Given { promise: Promise::Replicas(2), counted: vec![HostId([11; 32])] }),
        };
        let other =
            Other { name: "c".into(), host: HostId([1; 32]), addresses: vec!["c:1".into()], standing: None };
        let rows: [(Message, &str); 18] = [
            (
                acknowledgement.into(),
                "520000000900010000000000000003020000000000000400000000000000\
                 0500000000000000cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd060000000000\
                 0000070000000000000008000000000000000900000000000000",
            ),
            (
                refused.into(),
                "100000000400050000000200000000000000\
                 6e6f",
            ),
            (
                ReadContent { volume: VolumeId([9; 16]), range: ByteRange::new(512, 1024) }.into(),
                "220000001000090909090909090909090909090909090002000000000000\
                 0004000000000000",
            ),
            (Renew { session: Session(1), number: 2 }.into(), "120000001d0001000000000000000200000000000000"),
            (
                Grant { session: Session(1), number: 2, milliseconds: 3 }.into(),
                "1a0000001e000100000000000000020000000000000003000000\
                 00000000",
            ),
            (Parted { session: Session(1) }.into(), "0a0000001f000100000000000000"),
            (Alone { session: Session(1) }.into(), "0a00000020000100000000000000"),
            (AskMark { session: Session(1) }.into(), "0a00000021000100000000000000"),
            (
                Fetch { session: Session(1), number: 2, range: ByteRange::new(512, 1024), is_awaited: true }
                    .into(),
                "23000000220001000000000000000200000000000000000200000000000000040000000000\
                 0001",
            ),
            (
                FetchFailed { session: Session(1), number: 2 }.into(),
                "120000002300010000000000000002000000\
                 00000000",
            ),
            (
                Lend { volume: VolumeId([9; 16]), fence: Fence { counter: 2, holder: HostId([8; 32]) } }
                    .into(),
                "3a000000250009090909090909090909090909090909020000000000000008080808080808\
                 08080808080808080808080808080808080808080808080808",
            ),
            (
                Fetching { volume: VolumeId([9; 16]), session: Session(1), is_awaited: true }.into(),
                "1b00000024000909090909090909090909090909090901000000000000000\
                 1",
            ),
            (
                digest.into(),
                "320000001b0006000000000000000700000000000000abababababababab\
                 abababababababababababababababababababababababab",
            ),
            (
                whereabouts.into(),
                "2e0000004b00010000000000000062010000000000000003000000000000\
                 00683a31cdcdcdcdcdcdcdcdcdcdcdcdcdcdcdcd",
            ),
            (AskMembers { volume: VolumeId([9; 16]) }.into(), "120000003c0009090909090909090909090909090909"),
            (
                members.into(),
                "540000000b00000000000000000001000000000000000707070707070707\
                 07070707070707070707070707070707070707070707070701000000000000006201000000000000006104030201000000000100000000000000",
            ),
            (
                AskOthers { name: "data".into(), secret: Some([5; 32]) }.into(),
                "2f0000002800040000000000000064617461010505050505050505050505050505050505\
                 050505050505050505050505050505",
            ),
            (
                Others { own: Box::new(standing), others: vec![other] }.into(),
                "220100002900010000000200000000020000000000000003030303030303030303030303030303030303030303\
                 030303030303030303030100000000000000040404040404040404040404040404040404040404040404040404\
                 040404040405000000000000000600000000000000000700000000000000010000000000000008000000000000\
                 000c000000000000000100000000000000090909090909090909090909090909090a0000000000000001020000\
                 000200000001000000000000000b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b\
                 010000000000000001000000000000006301010101010101010101010101010101010101010101010101010101\
                 0101010101000000000000000300000000000000633a3100",
            ),
        ];
        for (message, bytes) in rows {
            assert_eq!(hex(&message.encode().unwrap()), bytes, "{message:?}");
            assert_eq!(Message::decode(&message.encode().unwrap()[LENGTH_BYTES..]).unwrap(), message);
        }
    }

    #[test]
    fn the_handshake_reads_back() {
        let member = Member {
            name: "a".into(),
            host: HostId([1; 32]),
            addresses: vec!["10.0.0.1:7447".into()],
            mode: Mode::Sync,
            version: 2,
        };
        let hello = Hello {
            versions: (1, 1),
            features: 0,
            volume: VolumeId([2; 16]),
            size_bytes: 1 << 40,
            block_size: BlockSize::default(),
            sector_bytes: 512,
            copy: CopyId([3; 16]),
            session: Session(4),
            stream: Stream(1),
            fence: Fence { counter: 1, holder: HostId([1; 32]) },
            lineage: vec![GenerationId([5; 16])],
            mode: Mode::Sync,
            members: vec![member],
            ends: Ends::only(GenerationId([5; 16]), Epoch(6)),
        };
        let message = Message::from(hello);
        assert_eq!(Message::decode(&message.encode().unwrap()[LENGTH_BYTES..]).unwrap(), message);
    }

    /// With one `u64::MAX` a member stopped every primary for good: the next promotion began at 0 again, or panicked.
    #[test]
    fn numbers_that_leave_no_room_for_a_next_one_are_no_messages() {
        let of = |counter| Message::from(Superseded { fence: Fence { counter, holder: HostId([1; 32]) } });
        let at = |epoch| Message::from(Agreed { session: Session(1), epoch: Epoch(epoch) });
        for (message, is_sound) in [
            (of(Fence::COUNTERS - 1), true),
            (of(Fence::COUNTERS), false),
            (of(u64::MAX), false),
            (at(Epoch::LIMIT - 1), true),
            (at(Epoch::LIMIT), false),
            (at(u64::MAX), false),
        ] {
            assert_eq!(
                Message::decode(&message.encode().unwrap()[LENGTH_BYTES..]).is_ok(),
                is_sound,
                "{message:?}"
            );
        }
    }

    #[test]
    fn a_fence_is_raised_and_believed_in_bounds() {
        let fence = |counter| Fence { counter, holder: HostId([1; 32]) };
        assert_eq!(fence(4).raised(HostId([1; 32])), Some(fence(5)));
        for used_up in [Fence::COUNTERS - 1, u64::MAX] {
            assert_eq!(fence(used_up).raised(HostId([1; 32])), None);
        }
        assert!(fence(4).may_become(fence(3)) && fence(4).may_become(fence(4 + Fence::STEP)));
        assert!(!fence(4).may_become(fence(5 + Fence::STEP)));
        assert!(!fence(Fence::COUNTERS - 1).may_become(fence(Fence::COUNTERS)));
    }

    /// A primary that was told of thousands of hosts could not greet any more: it ended the process.
    #[test]
    fn a_message_beyond_its_limit_is_an_error_and_no_end() {
        let member = |number: u32| Member {
            name: format!("host-{number}"),
            host: HostId([1; 32]),
            addresses: vec!["10.0.0.1:7447".into()],
            version: 0,
            mode: Mode::Async,
        };
        let told =
            |count| Message::from(Members { members: (0..count).map(member).collect(), removed: Vec::new() });
        assert!(matches!(told(5000).encode(), Err(OverLimit(bytes)) if bytes > LIMIT_BYTES));
        let longest = Member {
            name: "a".repeat(NAME_LIMIT_BYTES),
            addresses: vec!["a".repeat(ADDRESS_LIMIT_BYTES); ADDRESSES_LIMIT],
            ..member(1)
        };
        let most = vec![longest.clone(); MEMBERS_LIMIT];
        assert!(Member::are_sound(&most), "as many as there may be");
        assert!(
            Message::from(Members { members: most, removed: Vec::new() }).encode().is_ok(),
            "fit into a message"
        );
        assert!(!Member::are_sound(&vec![longest.clone(); MEMBERS_LIMIT + 1]));
        let name = "a".repeat(NAME_LIMIT_BYTES + 1);
        assert!(!Member::are_sound(&[Member { name, ..longest.clone() }]));
        let addresses = vec!["a".into(); ADDRESSES_LIMIT + 1];
        assert!(!Member::are_sound(&[Member { addresses, ..longest }]));
    }

    #[test]
    fn damaged_messages_are_refused() {
        let good = Message::from(ResyncReady { session: Session(1) }).encode().unwrap();
        let body = &good[LENGTH_BYTES..];
        assert!(matches!(Message::decode(&[]), Err(MessageError::Damaged { .. })));
        assert!(matches!(Message::decode(&[0xff, 0xff]), Err(MessageError::UnknownTag(0xffff))));
        assert!(matches!(
            Message::decode(&body[..body.len() - 1]),
            Err(MessageError::Damaged { tag: 6, .. })
        ));
        assert!(matches!(Message::decode(&[body, &[0]].concat()), Err(MessageError::Damaged { tag: 6, .. })));
        assert!(matches!(decode_length([0, 0, 0, 1]), Err(MessageError::TooLong(_))));
        // A vector that claims more elements than the message has bytes allocates nothing of that size.
        let mut bomb = vec![3, 0];
        bomb.extend_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(Message::decode(&bomb), Err(MessageError::Damaged { tag: 3, .. })));
    }
}
