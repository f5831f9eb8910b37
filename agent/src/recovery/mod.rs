//! A volume's content for the operator's tool: the serving side of `blockmirror recover`.
//!
//! The tool has been let in, and nothing writes to the backing while its connection lasts; both are the caller's duty.
//! Each read comes on a stream of its own and is answered there with frames of content, in order, zeroes as ranges. A
//! last stream asks for the digest of everything, so that the tool can tell that what it wrote is what was here. Reads
//! of whole chunks are hashed on their way out, and the digest reads only what was not sent like that.
//!
//! Memory is bounded: so many reads are served at a time ([`READS`]), each with a few pieces in its hands; further ones
//! wait. A backing that can't be read ends the stream; the reason goes to the caller, who tells it on the stream that
//! the recovery began with.

mod digest;
mod read_ahead;
#[cfg(test)]
mod tests;

pub use digest::{Digesting, Hashing, Reading, Subtrees};
pub use read_ahead::{PIECE_BYTES, Piece, ReadAhead};

use crate::buffer::{BufferPool, is_zero};
use crate::storage::file::File;
use crate::storage::{self, Storage};
use crate::transport::{ControlReceiver, ControlSender, FrameSender, SendError};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::{SECTOR_BYTES, Session, Stream, VolumeId};
use blockmirror_protocol::wire::message::{Message, Recovering, Refusal, Refused, WholeDigest};
use blockmirror_protocol::wire::{Body, FrameHeader, PAYLOAD_LIMIT_BYTES, ZERO_LIMIT_BYTES};
use bytes::Bytes;
use std::cell::Cell;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::sync::Semaphore;

/// How many reads of a source, digests among them, are served at a time.
pub const READS: usize = 16;

/// How many pieces each of them reads ahead.
const DEPTH: usize = 2;

/// The unit in which zeroes are looked for, in bytes: a smaller one costs more frames than it saves.
const ZERO_UNIT_BYTES: usize = 64 << 10;

/// How often the tool is told how far a digest is, in bytes.
const PROGRESS_BYTES: u64 = 256 << 20;

const _: () = assert!(PIECE_BYTES <= PAYLOAD_LIMIT_BYTES as u64);

/// The content that recoveries read.
pub struct Source {
    storage: Rc<dyn Storage>,
    backing: Rc<File>,
    pool: BufferPool,
    info: Recovering,
    subtrees: Rc<Subtrees>,
    reads: Semaphore,
    /// How many streams are being answered, and when the last answer ended.
    activity: Activity,
}

/// See [`Source::is_idle_for`].
#[derive(Debug)]
struct Activity {
    streams: Cell<usize>,
    last: Cell<Instant>,
}

/// An answer that is under way.
struct Answering<'source>(&'source Activity);

impl Activity {
    fn begin(&self) -> Answering<'_> {
        self.streams.set(self.streams.get() + 1);
        Answering(self)
    }

    /// How long nothing was asked for; nothing while something is being answered.
    fn idle_time(&self) -> Option<Duration> {
        (self.streams.get() == 0).then(|| self.last.get().elapsed())
    }
}

impl Drop for Answering<'_> {
    fn drop(&mut self) {
        self.0.streams.set(self.0.streams.get() - 1);
        self.0.last.set(Instant::now());
    }
}

/// Why a stream of a recovery ended early.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The tool went away.
    #[error("the recovery went away")]
    Send(#[from] SendError),
    /// The backing can't be read.
    #[error("the backing cannot be read for a recovery")]
    Storage(#[from] storage::Error),
    /// The tool asked for what it can't have.
    #[error("the recovery asked for something that is not here: {0}")]
    PeerMisbehaved(&'static str),
}

impl ServeError {
    /// What to tell the tool on the stream that the recovery began with; nothing where it went away.
    #[must_use]
    pub fn refusal(&self) -> Option<Refused> {
        match self {
            Self::Send(_) => None,
            Self::Storage(error) => Some(unreadable(error)),
            Self::PeerMisbehaved(text) => {
                Some(Refused { refusal: Refusal::Unrelated, text: (*text).to_owned() })
            }
        }
    }
}

impl Source {
    /// A backing's content, as `info` describes it.
    #[must_use]
    pub fn new(storage: Rc<dyn Storage>, backing: Rc<File>, pool: BufferPool, info: Recovering) -> Self {
        let subtrees = Subtrees::new(info.size_bytes);
        let activity = Activity { streams: Cell::new(0), last: Cell::new(Instant::now()) };
        Self { storage, backing, pool, info, subtrees, reads: Semaphore::new(READS), activity }
    }

    /// What the tool was told.
    #[must_use]
    pub fn info(&self) -> &Recovering {
        &self.info
    }

    /// Waits until nobody has read anything for so long.
    pub async fn is_idle_for(&self, limit: Duration) {
        loop {
            match self.activity.idle_time() {
                Some(idle) if idle >= limit => return,
                idle => tokio::time::sleep(limit - idle.unwrap_or_default()).await,
            }
        }
    }

    fn whole(&self) -> ByteRange {
        ByteRange::new(0, self.info.size_bytes)
    }
}

/// Answers a stream that began with `first`. Returns when the tool has the answer.
///
/// # Errors
/// [`ServeError`]; the stream has ended by then. [`ServeError::refusal`] is what the tool is to be told.
pub async fn serve(
    source: &Source,
    first: Message,
    sender: ControlSender,
    receiver: ControlReceiver,
) -> Result<(), ServeError> {
    let _answering = source.activity.begin();
    let served = match first {
        Message::ReadContent(read) => match check(source, read.volume, read.range) {
            Ok(()) => serve_content(source, read.range, sender).await,
            Err(what) => refuse(sender, what).await,
        },
        Message::AskDigest(ask) => match check(source, ask.volume, source.whole()) {
            Ok(()) => serve_digest(source, sender).await,
            Err(what) => refuse(sender, what).await,
        },
        _ => refuse(sender, "a stream of a recovery asks for content or for the digest").await,
    };
    // The tool's side of the stream stays open as long as the answer takes.
    drop(receiver);
    served
}

fn check(source: &Source, volume: VolumeId, range: ByteRange) -> Result<(), &'static str> {
    match () {
        () if volume != source.info.volume => Err("it is another volume that is being recovered"),
        () if range.is_empty() || !range.is_aligned(SECTOR_BYTES) => Err("a read is in whole sectors"),
        () if !source.whole().contains(range) => Err("the volume ends before the read does"),
        () => Ok(()),
    }
}

async fn refuse(sender: ControlSender, what: &'static str) -> Result<(), ServeError> {
    tell(sender, Refused { refusal: Refusal::Unrelated, text: what.to_owned() }).await;
    Err(ServeError::PeerMisbehaved(what))
}

/// Tells the tool why there is nothing more. One that goes away on hearing it, or before, doesn't change the reason.
async fn tell(mut sender: ControlSender, refused: Refused) {
    if sender.send(&refused.into()).await.is_ok() {
        let _ = sender.finish().await;
    }
}

fn unreadable(error: &storage::Error) -> Refused {
    Refused { refusal: Refusal::Backing, text: format!("{error}: {}", error.source) }
}

async fn serve_content(source: &Source, range: ByteRange, sender: ControlSender) -> Result<(), ServeError> {
    let _permit = source.reads.acquire().await.expect("the semaphore is never closed");
    let (storage, backing) = (source.storage.clone(), source.backing.clone());
    let mut pieces = ReadAhead::new(storage, backing, source.pool.clone(), range, DEPTH);
    let mut answer = Answer { sender: sender.into_frames(), zeroes: ByteRange::new(range.offset, 0) };
    let subtrees = &source.subtrees;
    let mut hashing = subtrees.are_chunks(range).then(|| Hashing::new(subtrees.clone(), range));
    while let Some(piece) = pieces.next().await? {
        if let Some(hashing) = &mut hashing {
            hash(hashing, &piece).await;
        }
        match piece {
            Piece::Hole(range) => answer.zeroes(range),
            Piece::Data(range, bytes) => answer.data(range, &bytes),
        }
        answer.sender.flush().await?;
        tokio::task::yield_now().await;
    }
    answer.end_zeroes();
    Ok(answer.sender.finish().await?)
}

/// Hashes a piece that was just read, while the processor's cache has it. A hole takes several turns.
async fn hash(hashing: &mut Hashing, piece: &Piece) {
    match piece {
        Piece::Data(_, bytes) => hashing.data(bytes),
        Piece::Hole(range) => {
            let mut rest_bytes = range.length;
            while rest_bytes > 0 {
                rest_bytes -= hashing.zeroes(rest_bytes);
                tokio::task::yield_now().await;
            }
        }
    }
}

/// Frames of content on their way out.
struct Answer {
    sender: FrameSender,
    /// Zeroes that were found and not queued yet, since more may follow.
    zeroes: ByteRange,
}

impl Answer {
    fn zeroes(&mut self, range: ByteRange) {
        if self.zeroes.is_empty() {
            self.zeroes = range;
        } else {
            assert_eq!(self.zeroes.end(), range.offset, "content is answered in order");
            self.zeroes.length += range.length;
        }
        while self.zeroes.length >= ZERO_LIMIT_BYTES {
            self.queue_zeroes(ZERO_LIMIT_BYTES);
        }
    }

    fn end_zeroes(&mut self) {
        if !self.zeroes.is_empty() {
            self.queue_zeroes(self.zeroes.length);
        }
    }

    fn queue_zeroes(&mut self, length: u64) {
        let range = ByteRange::new(self.zeroes.offset, length);
        self.zeroes = ByteRange::between(range.end(), self.zeroes.end());
        self.queue(Body::ContentZero { range }, Bytes::new());
    }

    fn data(&mut self, range: ByteRange, bytes: &Bytes) {
        for (zero, part) in zero_runs(bytes) {
            let at = ByteRange::new(range.offset + part.start as u64, part.len() as u64);
            if zero {
                self.zeroes(at);
            } else {
                self.end_zeroes();
                self.queue(Body::Content { range: at }, bytes.slice(part));
            }
        }
    }

    fn queue(&mut self, body: Body, payload: Bytes) {
        let header = FrameHeader { session: Session(0), stream: Stream(0), body };
        self.sender.queue(&header.encode(&payload), payload);
    }
}

/// The runs of units that are all zero, or all not.
fn zero_runs(bytes: &[u8]) -> Vec<(bool, std::ops::Range<usize>)> {
    let mut runs: Vec<(bool, std::ops::Range<usize>)> = Vec::new();
    let mut at = 0;
    for unit in bytes.chunks(ZERO_UNIT_BYTES) {
        let (zero, end) = (is_zero(unit), at + unit.len());
        match runs.last_mut() {
            Some((same, run)) if *same == zero => run.end = end,
            _ => runs.push((zero, at..end)),
        }
        at = end;
    }
    runs
}

async fn serve_digest(source: &Source, mut sender: ControlSender) -> Result<(), ServeError> {
    let _permit = source.reads.acquire().await.expect("the semaphore is never closed");
    let (storage, backing) = (source.storage.clone(), source.backing.clone());
    let mut digesting = Digesting::new(storage, backing, source.pool.clone(), source.subtrees.clone());
    // What is known already is told at once.
    let mut step_bytes = 0;
    loop {
        let digest = match digesting.proceed(step_bytes).await {
            Ok(digest) => digest,
            Err(error) => {
                tell(sender, unreadable(&error)).await;
                return Err(error.into());
            }
        };
        let digest = digest.map(|digest| *digest.as_bytes());
        let done = WholeDigest { done_bytes: digesting.done_bytes(), digest };
        sender.send(&done.into()).await?;
        if digest.is_some() {
            // A tool that leaves as soon as it has the digest has what it came for.
            let _ = sender.finish().await;
            return Ok(());
        }
        step_bytes = PROGRESS_BYTES;
    }
}
