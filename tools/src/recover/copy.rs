//! Copies the chunks that the target lacks: several reads at a time, each frame written as soon as its checksum is
//! found right. Frames of one chunk are written one after the other, so a disk with large sectors is safe, and a slow
//! disk slows the network down. What is durable is read back meanwhile.

use super::journal::Journal;
use super::peer::{Opened, Trouble};
use super::progress::Meter;
use super::read_back::ReadBack;
use super::target::Target;
use blockmirror_agent::recovery::Subtrees;
use blockmirror_agent::transport::{Connection, ReceiveError};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::VolumeId;
use blockmirror_protocol::wire::Body;
use blockmirror_protocol::wire::message::ReadContent;
use std::rc::Rc;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;
use tokio::time::MissedTickBehavior;

/// How many chunks are under way at a time.
const READS: usize = 8;
/// How long what was written may wait until it is made durable and noted.
const COMMIT_INTERVAL: Duration = Duration::from_secs(2);
/// How much may wait, in bytes.
const MOST_COMMIT_BYTES: u64 = 1 << 30;
/// How much is enough, in bytes, where making it durable is cheap: only what is durable can be read back.
const LEAST_COMMIT_BYTES: u64 = 64 << 20;
/// It is cheap when it was done last so many times as long ago as it took then.
const COMMIT_SHARE: u32 = 100;
/// How long the peer may take to say why it gave a read up.
const REASON_TIMEOUT: Duration = Duration::from_secs(2);

/// Copies what is missing. Whatever the outcome, nothing is being written or read back when this returns; what was
/// written by then is for the caller to commit. `subtrees` has the values of the chunks that were read back by then.
pub async fn copy_missing(
    opened: &mut Opened,
    target: &Rc<Target>,
    journal: &mut Journal,
    subtrees: &Rc<Subtrees>,
    meter: &Rc<Meter>,
) -> Result<(), Trouble> {
    let (mut reads, mut read_back) = (JoinSet::new(), ReadBack::new(target.clone(), subtrees.clone()));
    let connection = opened.connection.clone();
    let outcome = tokio::select! {
        biased;
        trouble = opened.ended() => Err(trouble),
        outcome = drive(&connection, target, journal, meter, &mut reads, &mut read_back) => outcome,
    };
    reads.shutdown().await;
    read_back.stop().await;
    target.drain().await;
    match outcome {
        Err(trouble @ Trouble::Passing(_)) if opened.connection.is_live() => {
            // A read was given up: the peer says why where the recovery began.
            Err(tokio::time::timeout(REASON_TIMEOUT, opened.ended()).await.unwrap_or(trouble))
        }
        outcome => outcome,
    }
}

type Reads = JoinSet<Result<u64, Trouble>>;

async fn drive(
    connection: &Connection,
    target: &Rc<Target>,
    journal: &mut Journal,
    meter: &Rc<Meter>,
    reads: &mut Reads,
    read_back: &mut ReadBack,
) -> Result<(), Trouble> {
    let subject = journal.state().subject;
    let mut commits = tokio::time::interval(COMMIT_INTERVAL);
    commits.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut next, mut cheap_from) = (0, Instant::now());
    loop {
        while reads.len() < READS && next < subject.chunks() {
            if !journal.state().has(next) {
                let (connection, target, meter) = (connection.clone(), target.clone(), meter.clone());
                let (chunk, range) = (next, subject.chunk(next));
                read_back.forget(chunk);
                reads.spawn_local(async move {
                    copy_range(&connection, subject.volume, range, &target, &meter).await.map(|()| chunk)
                });
            }
            next += 1;
        }
        let mut is_due = false;
        tokio::select! {
            done = reads.join_next() => match done {
                None => return Ok(()),
                Some(done) => journal.written(done.expect("a read neither panics nor is cancelled")?),
            },
            _ = commits.tick() => is_due = true,
            done = read_back.next() => done?,
        }
        let least = if Instant::now() < cheap_from { MOST_COMMIT_BYTES } else { LEAST_COMMIT_BYTES };
        if is_due || journal.pending_bytes() >= least {
            let began = Instant::now();
            read_back.begin(journal.commit(target).await?);
            cheap_from = Instant::now() + began.elapsed() * COMMIT_SHARE;
            commits.reset();
        }
    }
}

async fn copy_range(
    connection: &Connection,
    volume: VolumeId,
    range: ByteRange,
    target: &Target,
    meter: &Meter,
) -> Result<(), Trouble> {
    let (mut sender, receiver) = connection.open_control().await?;
    sender.send(&ReadContent { volume, range }.into()).await?;
    let mut frames = receiver.into_frames();
    let mut rest = range;
    while !rest.is_empty() {
        let (header, payload) = frames.receive(target.pool()).await?;
        let part = header.body.range();
        if part.offset != rest.offset || !rest.contains(part) {
            return Err(Trouble::misbehaved("it sends another range than was asked for"));
        }
        let written = match header.body {
            Body::Content { .. } => target.write(part.offset, payload).await,
            Body::ContentZero { .. } => target.zero(part).await,
            _ => return Err(Trouble::misbehaved("it answers a read with another kind of frame")),
        };
        written.map_err(|error| Trouble::failed(&error))?;
        rest = ByteRange::between(part.end(), rest.end());
        meter.add(part.length);
    }
    match frames.receive(target.pool()).await {
        Err(ReceiveError::Ended(_)) => Ok(()),
        Ok(_) => Err(Trouble::misbehaved("it sends more than was asked for")),
        Err(error) => Err(error.into()),
    }
}
