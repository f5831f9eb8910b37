//! How hosts stand: asked of others before a promotion and at the start of a primary, and answered from what is durable
//! here.
//!
//! An answer is read from the state folder, not asked of the volume's thread: two hosts that start at the same time, or
//! are both in the middle of a change, ask each other and must not wait for each other.

use crate::config::{Name, PeerConfig, VolumeConfig};
use crate::state::generations;
use crate::state::stored;
use crate::transport::{AskError, Peers};
use crate::words::with_name;
use blockmirror_protocol::disk::superblock::Role;
use blockmirror_protocol::lineage;
use blockmirror_protocol::succession;
use blockmirror_protocol::units::{HostId, VolumeId};
use blockmirror_protocol::wire::message::{AskMembers, AskStanding, Members, Message, Removal, Standing};
use std::path::Path;
use std::time::Duration;
use tokio::task::JoinSet;

/// What a volume serves to applications.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Service {
    /// Whether they can write.
    pub serves: bool,
    /// For how long what they are served from has not answered, or was missed; zero where it is there.
    pub silent: Duration,
}

/// What a peer answered, or why it didn't, in words.
pub type Answered = Result<Standing, String>;

/// What all of a volume's other hosts said.
pub struct Told {
    /// How they stand. One that another one knows to be removed has no say (X3).
    pub answers: Vec<(PeerConfig, Answered)>,
    /// The hosts that any of them knows to be removed.
    pub removals: Vec<Removal>,
}

/// Asks all of a volume's other hosts at once how they stand; each has so long to answer. One that another one knows to be
/// removed has no say (X3).
pub async fn ask_all(
    peers: &Peers,
    volume: VolumeId,
    hosts: &[PeerConfig],
    limit: Duration,
) -> Vec<(PeerConfig, Answered)> {
    hear_all(peers, volume, hosts, limit).await.answers
}

/// As [`ask_all`], for whoever has to hear of removals as well: each host is asked once for either.
pub async fn hear_all(peers: &Peers, volume: VolumeId, hosts: &[PeerConfig], limit: Duration) -> Told {
    let mut asked = JoinSet::new();
    for peer in hosts {
        let (peers, peer) = (peers.clone(), peer.clone());
        asked.spawn(async move {
            let (answered, members) =
                tokio::join!(ask(&peers, volume, &peer, limit), ask_members(&peers, volume, &peer, limit));
            (peer, answered, members.unwrap_or_default().removed)
        });
    }
    let mut answers = asked.join_all().await;
    answers.sort_by(|(one, ..), (other, ..)| one.name.cmp(&other.name));
    let removals = answers.iter().flat_map(|(_, _, removed)| removed).cloned().collect();
    Told { answers: without_removed(answers), removals }
}

/// The answers, where those of hosts that another one knows to be removed don't count.
fn without_removed(answers: Vec<(PeerConfig, Answered, Vec<Removal>)>) -> Vec<(PeerConfig, Answered)> {
    let removal_of = |peer: &PeerConfig| {
        let others = answers.iter().filter(|(other, ..)| other.host != peer.host);
        let mut told = others.flat_map(|(_, _, removed)| removed);
        told.find(|removal| removal.host == peer.host && removal.version > peer.version).cloned()
    };
    let removals: Vec<_> = answers.iter().map(|(peer, ..)| removal_of(peer)).collect();
    let counted = answers.into_iter().zip(removals).map(|((peer, answered, _), removal)| {
        let answered = match removal {
            Some(removal) => Err(format!("it was removed from the volume by {}", Name::nearest(&removal.by))),
            None => answered,
        };
        (peer, answered)
    });
    counted.collect()
}

/// Asks a host who the volume's hosts are; nothing where it doesn't answer in time.
pub async fn ask_members(
    peers: &Peers,
    volume: VolumeId,
    peer: &PeerConfig,
    limit: Duration,
) -> Option<Members> {
    let conversation = converse(peers, peer, AskMembers { volume }.into());
    match tokio::time::timeout(limit, conversation).await.ok()?.ok()? {
        Message::Members(members) => Some(members),
        _ => None,
    }
}

/// Asks hosts at once which ones were removed; each has so long to answer.
pub async fn ask_removals(
    peers: &Peers,
    volume: VolumeId,
    hosts: Vec<PeerConfig>,
    limit: Duration,
) -> Vec<Removal> {
    let mut asked = JoinSet::new();
    for peer in hosts {
        let peers = peers.clone();
        asked.spawn(async move { ask_members(&peers, volume, &peer, limit).await });
    }
    asked.join_all().await.into_iter().flatten().flat_map(|members| members.removed).collect()
}

/// Asks one host.
///
/// # Errors
/// Why there is no answer, in words.
pub async fn ask(peers: &Peers, volume: VolumeId, peer: &PeerConfig, limit: Duration) -> Answered {
    let conversation = converse(peers, peer, AskStanding { volume }.into());
    match tokio::time::timeout(limit, conversation).await {
        Err(_) => Err("it does not answer".to_owned()),
        Ok(Err(error)) => Err(with_name(&error, peer.host, &peer.name)),
        Ok(Ok(Message::Standing(standing))) => Ok(standing),
        Ok(Ok(Message::Refused(no))) => Err(no.text),
        Ok(Ok(_)) => Err("it answered with something else; is it of another version?".to_owned()),
    }
}

/// Puts a question to a host, which may be put twice, and gives its answer.
///
/// # Errors
/// [`AskError`].
async fn converse(peers: &Peers, peer: &PeerConfig, message: Message) -> Result<Message, AskError> {
    let (_, answer) = peers.ask(peer.host, &addresses(peer), &message).await?;
    Ok(answer)
}

/// Tells a host to do something, once, and gives its answer.
///
/// # Errors
/// [`AskError`]: the host may have done it all the same.
pub async fn order(peers: &Peers, peer: &PeerConfig, message: Message) -> Result<Message, AskError> {
    let (_, answer) = peers.ask_once(peer.host, &addresses(peer), &message).await?;
    Ok(answer)
}

fn addresses(peer: &PeerConfig) -> Vec<String> {
    peer.addresses.iter().map(|address| address.as_str().to_owned()).collect()
}

/// How this host stands, for `asker`, as its state folder says; nothing where that can't be read.
#[must_use]
pub fn read(folder: &Path, config: &VolumeConfig, asker: HostId, service: Service) -> Option<Standing> {
    let stored = stored::read(folder, config);
    let superblock = stored.superblock?;
    let marker = stored.marker.unwrap_or_default();
    let undelivered = stored::undelivered(folder, config, &superblock, asker);
    let (data, can_roll_back) = succession::counts_as(&superblock);
    Some(Standing {
        role: superblock.role,
        data,
        can_roll_back,
        fence: superblock.fence,
        marker: match superblock.role {
            Role::Primary => superblock.stands(),
            Role::Replica => lineage::later(&superblock.lineage, superblock.position, marker),
        },
        serves: service.serves,
        silent_milliseconds: u64::try_from(service.silent.as_millis()).unwrap_or(u64::MAX),
        dirty_bytes: undelivered.map_or(u64::MAX, |undelivered| undelivered.bytes),
        began: generations::of_lineage(folder, &superblock.lineage),
        replaced: superblock.replaced,
        given: Box::new(succession::counts_on(&superblock)),
        ends: superblock.ends,
        lineage: superblock.lineage,
    })
}
