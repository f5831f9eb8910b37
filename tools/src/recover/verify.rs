//! Compares the whole target, read back from its disk, with the whole content of the peer, by digests. Most of both was
//! hashed while it was copied; each side reads what it lacks.

use super::peer::{Opened, Trouble};
use super::progress::Meter;
use super::target::Target;
use blockmirror_agent::recovery::{Digesting, Subtrees};
use blockmirror_agent::transport::Connection;
use blockmirror_protocol::units::VolumeId;
use blockmirror_protocol::wire::message::{AskDigest, Message};
use std::cell::Cell;
use std::rc::Rc;

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
    /// Nothing before the peer has told it.
    peer: Cell<Option<u64>>,
}

impl Both<'_> {
    fn target_has(&self, bytes: u64) {
        self.target.set(bytes);
        if let Some(peer) = self.peer.get() {
            self.meter.set(peer.min(bytes));
        }
    }

    fn peer_has(&self, bytes: u64) {
        let done = bytes.min(self.target.get());
        match self.peer.replace(Some(bytes)) {
            Some(_) => self.meter.set(done),
            // That was done before.
            None => self.meter.begin_at(done),
        }
    }
}

/// Computes both digests at the same time. What is known of the target's is in `subtrees`, so that each chunk is read
/// once however often the connection is lost.
pub async fn digests(
    opened: &mut Opened,
    target: &Target,
    volume: VolumeId,
    subtrees: &Rc<Subtrees>,
    meter: &Meter,
) -> Result<Digests, Trouble> {
    let both = Both { meter, target: Cell::new(subtrees.known_bytes()), peer: Cell::new(None) };
    let connection = opened.connection.clone();
    let peers = async {
        tokio::select! {
            biased;
            digest = peers_digest(&connection, volume, &both) => digest,
            trouble = opened.ended() => Err(trouble),
        }
    };
    let (target, peer) = tokio::join!(targets_digest(target, subtrees, &both), peers);
    Ok(Digests { target: target?, peer: peer? })
}

async fn targets_digest(
    target: &Target,
    subtrees: &Rc<Subtrees>,
    both: &Both<'_>,
) -> Result<blake3::Hash, Trouble> {
    let (storage, file, pool) = (target.storage().clone(), target.file().clone(), target.pool().clone());
    let mut digesting = Digesting::new(storage, file, pool, subtrees.clone());
    loop {
        let digest = digesting.proceed(STEP_BYTES).await.map_err(|error| Trouble::failed(&error))?;
        both.target_has(digesting.done_bytes());
        if let Some(digest) = digest {
            return Ok(digest);
        }
    }
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
                both.peer_has(told.done_bytes);
                if let Some(digest) = told.digest {
                    return Ok(digest.into());
                }
            }
            Message::Refused(refused) => return Err(Trouble::refused(&refused)),
            _ => return Err(Trouble::misbehaved("it answers with another message")),
        }
    }
}
