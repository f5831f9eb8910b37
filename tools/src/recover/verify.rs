//! Compares the whole target, read back from its disk, with the whole content of the peer, by digests.

use super::peer::{Opened, Trouble};
use super::progress::Meter;
use super::target::Target;
use blockmirror_agent::recovery::Digesting;
use blockmirror_agent::transport::Connection;
use blockmirror_protocol::disk::recovery::Subject;
use blockmirror_protocol::units::VolumeId;
use blockmirror_protocol::wire::message::{AskDigest, Message};
use std::cell::Cell;

/// How often the progress of our own digest is noted, in bytes.
const STEP_BYTES: u64 = 16 << 20;

/// The digests of both sides.
pub struct Digests {
    /// The target's.
    pub target: blake3::Hash,
    /// The peer's.
    pub peer: blake3::Hash,
}

/// Both sides' progress, of which the slower counts.
struct Both<'a> {
    meter: &'a Meter,
    target: Cell<u64>,
    peer: Cell<u64>,
}

impl Both<'_> {
    fn show(&self) {
        self.meter.set(self.target.get().min(self.peer.get()));
    }
}

/// Computes both digests at the same time. The target's is kept in `ours`, so that it is computed once however often
/// the connection is lost.
pub async fn digests(
    opened: &mut Opened,
    target: &Target,
    subject: &Subject,
    ours: &mut Option<blake3::Hash>,
    meter: &Meter,
) -> Result<Digests, Trouble> {
    let both = Both { meter, target: Cell::new(0), peer: Cell::new(0) };
    let connection = opened.connection.clone();
    let peers = async {
        tokio::select! {
            biased;
            digest = peers_digest(&connection, subject.volume, &both) => digest,
            trouble = opened.ended() => Err(trouble),
        }
    };
    let (target, peer) = tokio::join!(targets_digest(target, subject.size_bytes, ours, &both), peers);
    Ok(Digests { target: target?, peer: peer? })
}

async fn targets_digest(
    target: &Target,
    size_bytes: u64,
    known: &mut Option<blake3::Hash>,
    both: &Both<'_>,
) -> Result<blake3::Hash, Trouble> {
    let (storage, file, pool) = (target.storage().clone(), target.file().clone(), target.pool().clone());
    let mut digesting = Digesting::new(storage, file, pool, size_bytes);
    while known.is_none() {
        *known = digesting.proceed(STEP_BYTES).await.map_err(|error| Trouble::failed(&error))?;
        both.target.set(digesting.done_bytes());
        both.show();
    }
    both.target.set(size_bytes);
    Ok(known.expect("the digest is complete"))
}

async fn peers_digest(
    connection: &Connection,
    volume: VolumeId,
    both: &Both<'_>,
) -> Result<blake3::Hash, Trouble> {
    let (mut sender, mut receiver) = connection.open_control().await?;
    sender.send(&AskDigest { volume }.into()).await?;
    loop {
        match receiver.receive().await? {
            Message::WholeDigest(told) => {
                both.peer.set(told.done_bytes);
                both.show();
                if let Some(digest) = told.digest {
                    return Ok(digest.into());
                }
            }
            Message::Refused(refused) => return Err(Trouble::refused(&refused)),
            _ => return Err(Trouble::misbehaved("it answers with another message")),
        }
    }
}
