//! `blockmirror recover`: copies a volume's content from a peer into a disk or an image file. Needs no agent on this
//! host: it is what is left to do when this host has lost everything but a disk.
//!
//! The peer's copy doesn't change while the connection lasts. What is durable in the target is noted on disk, so that
//! an interrupted recovery goes on where it was, as long as the peer's copy is still the same; a lost connection is
//! dialled again for a while. At the end both sides' digests of everything must agree; the target's is of what its disk
//! gives back, which is read while more is copied.

mod copy;
mod identity;
mod journal;
mod others;
mod own_volume;
mod peer;
mod progress;
mod read_back;
mod target;
mod verify;

use crate::client::Client;
use crate::offline;
use crate::output::{Error, Output, warn};
use blockmirror_agent::config::{Address, Name};
use blockmirror_agent::control::api::{CopyState, Failure, FailureKind};
use blockmirror_agent::quantity::{Seconds, Size};
use blockmirror_agent::recovery::Subtrees;
use blockmirror_agent::storage;
use blockmirror_agent::transport::CloseReason;
use blockmirror_protocol::disk::recovery::{Key, RecoveryState, Subject};
use blockmirror_protocol::units::HostId;
use blockmirror_protocol::wire::message::Recover;
use clap::Args;
use journal::Journal;
use own_volume::OwnVolume;
use peer::{Opened, Peer, Trouble};
use progress::Meter;
use serde::Serialize;
use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;
use target::{Found, Target};
use tokio::time::Instant;
use verify::Digests;

/// The schema of [`Report`].
const SCHEMA: &str = "blockmirror/recovery/v1";
/// How long is waited before the peer is dialled again; it doubles each time.
const FIRST_PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(15);

/// What to recover, from where and into what.
#[derive(Args)]
pub struct Arguments {
    /// The volume's name on the peer
    name: Name,
    /// Where the peer's agent listens; with a token, by default where the token says
    #[arg(long, value_name = "ADDR:PORT", required_unless_present_any = ["token", "token_file"])]
    from: Option<Address>,
    /// Where the content goes: an image file, made where it is missing, or a block device
    #[arg(long, value_name = "PATH")]
    to: PathBuf,
    /// What `blockmirror invite` printed, where the peer doesn't know this host's key; `-` reads it from standard input
    #[arg(long, conflicts_with_all = ["key", "peer_key", "token_file"])]
    token: Option<String>,
    /// A file that holds it
    #[arg(long, value_name = "FILE", conflicts_with_all = ["key", "peer_key"])]
    token_file: Option<PathBuf>,
    /// This host's key; by default the agent's
    #[arg(long, value_name = "FILE")]
    key: Option<PathBuf>,
    /// The fingerprint of the peer's key; by default what this host's configuration knows
    #[arg(long, value_name = "FINGERPRINT", value_parser = fingerprint)]
    peer_key: Option<HostId>,
    /// Take content that is not a legal image of the volume, too
    #[arg(long)]
    accept_inconsistent: bool,
    /// Take content, too, that is older than what another host has
    #[arg(long)]
    accept_older: bool,
    /// Use the target even if it holds data, which is lost
    #[arg(long)]
    overwrite: bool,
    /// Copy everything again, whatever an interrupted recovery has copied
    #[arg(long)]
    from_start: bool,
    /// Where to note how far it is; by default beside an image file, and with the agent's state for a device
    #[arg(long, value_name = "FILE")]
    state_file: Option<PathBuf>,
    /// How long to try again when the connection is lost and nothing moves
    #[arg(long, value_name = "TIME", default_value = "5m")]
    retry: Seconds,
    /// Print JSON when it is done
    #[arg(long)]
    json: bool,
}

/// What was recovered.
#[derive(Serialize)]
struct Report {
    schema: &'static str,
    volume: Name,
    id: String,
    copy: String,
    generation: String,
    epoch: u64,
    sequence: u64,
    data: CopyState,
    target: PathBuf,
    size_bytes: u64,
    /// How much this run copied; the rest of the size was there already.
    copied_bytes: u64,
    digest: String,
    peer: String,
    seconds: u64,
}

/// A recovery under way.
struct Work {
    name: Name,
    peer: Peer,
    target: Rc<Target>,
    journal: Journal,
    /// What was read back from the target.
    subtrees: Rc<Subtrees>,
    retry: Duration,
    /// How much content has come from the peer.
    copied_bytes: u64,
    /// How far the verification got over any connection, in bytes.
    verified_bytes: u64,
    /// When a connection got further than those before, the last time.
    advanced: Instant,
}

fn fingerprint(text: &str) -> Result<HostId, String> {
    HostId::from_hex(text).map_err(|_| "a fingerprint is 64 hexadecimal digits".to_owned())
}

/// Recovers, and tells what.
pub async fn run(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    // The storage wants to have its thread's tasks beside it.
    tokio::task::LocalSet::new().run_until(recover(arguments, client, output)).await
}

async fn recover(arguments: Arguments, client: &Client, output: &mut Output) -> Result<(), Error> {
    let started = Instant::now();
    let (path, overwrite, json) = (arguments.to.clone(), arguments.overwrite, arguments.json);
    let state_path = match &arguments.state_file {
        Some(path) => path.clone(),
        None => journal::default_path(&path, &offline::state_folder(client.run())?),
    };
    let found = Found::look(&path).await?;
    let kept = journal::load(&state_path)?;
    let mut kept = ours(kept, found.identity()?);
    if kept.is_none() && !overwrite {
        found.refuse_data()?;
    }
    let identity = identity::identify(&arguments, client, kept.as_ref())?;
    let peer = Peer {
        endpoint: peer::bind(&identity.key)?,
        addresses: identity.addresses,
        known: identity.known,
        volume: identity.volume,
        request: Recover {
            name: arguments.name.to_string(),
            secret: identity.secret,
            accept_inconsistent: arguments.accept_inconsistent,
        },
    };
    let accept_older = arguments.accept_older;
    // Before a token is used up for what is refused then.
    peer.survey(accept_older).await.map_err(Trouble::into_failure)?;
    let opened = peer.open().await.map_err(Trouble::into_failure)?;
    found.must_hold(opened.info.size_bytes)?;
    let ring = storage::open()?;
    let own = OwnVolume::find(opened.info.volume, &path, client)?;
    if kept.is_some() && own.as_ref().is_some_and(|own| own.has_served(&path)) {
        // What was written to it since is nobody else's.
        warn(
            "the target was the volume's backing after the interrupted recovery; this one begins from the start",
        );
        kept = None;
        if !overwrite {
            found.refuse_data()?;
        }
    }
    if let Some(own) = &own {
        // Before the first byte of the target is lost.
        own.begin(&path, opened.connection.peer())?;
    }
    let target = Rc::new(found.prepare(opened.info.size_bytes, kept.is_some(), ring)?);
    if let Some(own) = &own {
        // It may just have been made.
        own.begin(&path, opened.connection.peer())?;
    }
    let state = go_on_or_begin(&opened, kept, &target, identity.kept, arguments.from_start)?;
    let subtrees = Subtrees::new(state.subject.size_bytes);
    let journal = Journal::begin(state_path, state)?;
    let retry = Duration::from_secs(arguments.retry.0);
    let name = arguments.name;
    let mut work = Work {
        name,
        peer,
        target,
        journal,
        subtrees,
        retry,
        copied_bytes: 0,
        verified_bytes: 0,
        advanced: started,
    };
    let outcome = tokio::select! {
        outcome = work.finish(opened) => outcome.map(Some),
        signal = tokio::signal::ctrl_c() => signal.map(|()| None).map_err(|error| Trouble::failed(&error).into_failure()),
    };
    match outcome {
        Ok(Some((opened, digests))) => {
            let report = work.report(&opened, &digests, path, started.elapsed());
            must_agree(&digests)?;
            // A host may have come back meanwhile.
            let judged = work.peer.judge(&opened, accept_older).await.map_err(Trouble::into_failure);
            opened.connection.close(CloseReason::Done, "the recovery is complete");
            judged?;
            // The volume learns of it before the recovery's own notes are gone.
            if let Some(own) = &own {
                own.hand_over(&report.target, opened.connection.peer(), &opened.content())?;
            }
            work.complete().await?;
            Ok(tell(&report, json, output)?)
        }
        Ok(None) => Err(Error::Interrupted(work.interrupt().await)),
        Err(failure) => Err(work.stop(failure).await.into()),
    }
}

/// Whether the target is what the peer has.
fn must_agree(digests: &Digests) -> Result<(), Failure> {
    if digests.target != digests.peer {
        let (ours, theirs) = (digests.target.to_hex(), digests.peer.to_hex());
        let message = format!(
            "the target is not what the peer has: the digests are {} and {}; a disk or the memory of one host \
             is to blame, or the peer's copy changed; run the command again with --from-start",
            &ours[..16],
            &theirs[..16]
        );
        return Err(Failure::new(FailureKind::Failed, message));
    }
    Ok(())
}

/// The state of an unfinished recovery, if it is one into this target.
fn ours(kept: Option<RecoveryState>, target: Option<u64>) -> Option<RecoveryState> {
    let kept = kept?;
    if target == Some(kept.target) {
        return Some(kept);
    }
    if target.is_some() {
        warn("the interrupted recovery was into another file or disk; this one begins from the start");
    }
    None
}

/// Goes on with what is durable, if the peer's copy is still the one that it came from.
fn go_on_or_begin(
    opened: &Opened,
    kept: Option<RecoveryState>,
    target: &Target,
    key: Key,
    from_start: bool,
) -> Result<RecoveryState, Failure> {
    let subject = opened.subject();
    match kept {
        Some(mut state) if !from_start && state.subject == subject => {
            let (done, size) = (Size(state.done_bytes()), Size(subject.size_bytes));
            warn(&format!("going on where it was interrupted: {done} of {size} are there"));
            state.key = key;
            Ok(state)
        }
        kept => {
            if kept.is_some() && !from_start {
                warn(
                    "the peer's copy is not the one that the interrupted recovery was from; beginning from the start",
                );
            }
            Ok(RecoveryState::new(subject, target.identity()?, key))
        }
    }
}

impl Work {
    /// Copies and verifies, over as many connections as it takes.
    async fn finish(&mut self, mut opened: Opened) -> Result<(Opened, Digests), Failure> {
        let mut pause = FIRST_PAUSE;
        self.advanced = Instant::now();
        loop {
            let before = self.advanced;
            let trouble = match self.attempt(&mut opened).await {
                Ok(digests) => return Ok((opened, digests)),
                Err(trouble) => trouble,
            };
            // Nothing more may come over a connection that was given up.
            opened.connection.close(CloseReason::Done, "the recovery is tried again");
            if self.advanced > before {
                pause = FIRST_PAUSE;
            }
            opened = self.reopen(trouble, &mut pause).await?;
        }
    }

    /// Dials again until the peer answers or time is up.
    async fn reopen(&mut self, mut trouble: Trouble, pause: &mut Duration) -> Result<Opened, Failure> {
        loop {
            let failure = match trouble {
                Trouble::Passing(failure) if self.advanced.elapsed() < self.retry => failure,
                Trouble::Passing(failure) | Trouble::Final(failure) => return Err(failure),
            };
            warn(&format!("{failure}; trying again"));
            tokio::time::sleep(*pause).await;
            *pause = (*pause * 2).min(LONGEST_PAUSE);
            match self.peer.open().await {
                Ok(opened) => {
                    self.follow(opened.subject())?;
                    return Ok(opened);
                }
                Err(again) => trouble = again,
            }
        }
    }

    /// Begins from the start where the peer's copy has changed since.
    fn follow(&mut self, subject: Subject) -> Result<(), Failure> {
        let state = self.journal.state();
        if state.subject == subject {
            return Ok(());
        }
        if state.subject.size_bytes != subject.size_bytes {
            let message = "the peer's copy has another size now; run the command again";
            return Err(Failure::new(FailureKind::Failed, message));
        }
        warn("the peer's copy has changed meanwhile; beginning from the start");
        (self.subtrees, self.verified_bytes) = (Subtrees::new(subject.size_bytes), 0);
        self.journal.begin_anew(RecoveryState::new(subject, state.target, state.key.clone()))
    }

    async fn attempt(&mut self, opened: &mut Opened) -> Result<Digests, Trouble> {
        if self.journal.state().done_chunks() < self.journal.state().subject.chunks() {
            self.copy(opened).await?;
        }
        self.verify(opened).await
    }

    async fn copy(&mut self, opened: &mut Opened) -> Result<(), Trouble> {
        let (before, size_bytes) =
            (self.journal.state().done_bytes(), self.journal.state().subject.size_bytes);
        let meter = Rc::new(Meter::new(before, size_bytes));
        let copying = copy::copy_missing(opened, &self.target, &mut self.journal, &self.subtrees, &meter);
        let outcome = shown(&format!("recovering {}", self.name), &meter, copying).await;
        self.copied_bytes += meter.done_bytes() - before;
        self.journal.commit(&self.target).await?;
        if self.journal.state().done_bytes() > before {
            self.advanced = Instant::now();
        }
        outcome
    }

    async fn verify(&mut self, opened: &mut Opened) -> Result<Digests, Trouble> {
        let subject = self.journal.state().subject;
        let meter = Meter::new(0, subject.size_bytes);
        let verifying = verify::digests(opened, &self.target, subject.volume, &self.subtrees, &meter);
        let outcome = shown(&format!("verifying {}", self.name), &meter, verifying).await;
        if meter.done_bytes() > self.verified_bytes {
            (self.verified_bytes, self.advanced) = (meter.done_bytes(), Instant::now());
        }
        outcome
    }

    /// What to tell of a recovery that the operator interrupted. Whoever does so again does not want to wait for the disk.
    async fn interrupt(self) -> Failure {
        let stop = self.stop(Failure::new(FailureKind::Failed, "interrupted"));
        tokio::select! {
            failure = stop => failure,
            _ = tokio::signal::ctrl_c() => {
                let message = "interrupted; run the same command again to go on where it was, but for what was copied last";
                Failure::new(FailureKind::Failed, message)
            }
        }
    }

    /// What to tell of a recovery that has not come to its end.
    async fn stop(mut self, failure: Failure) -> Failure {
        self.target.drain().await;
        let failure = match self.journal.commit(&self.target).await {
            Ok(_) => failure,
            Err(worse) => Failure::new(failure.kind, format!("{failure}; {worse}")),
        };
        self.peer.endpoint.close().await;
        let state = self.journal.state();
        let (done, size) = (Size(state.done_bytes()), Size(state.subject.size_bytes));
        let advice = format!("{done} of {size} are there; run the same command again to go on where it was");
        Failure::new(failure.kind, format!("{failure}; {advice}"))
    }

    /// Forgets the recovery.
    async fn complete(self) -> Result<(), Failure> {
        self.peer.endpoint.close().await;
        self.journal.remove()
    }

    fn report(&self, opened: &Opened, digests: &Digests, target: PathBuf, took: Duration) -> Report {
        let Subject { volume, copy, size_bytes, position } = self.journal.state().subject;
        Report {
            schema: SCHEMA,
            volume: self.name.clone(),
            id: volume.to_string(),
            copy: copy.to_string(),
            generation: position.generation.to_string(),
            epoch: position.epoch.0,
            sequence: position.sequence.0,
            data: opened.info.data.into(),
            target,
            size_bytes,
            copied_bytes: self.copied_bytes,
            digest: digests.target.to_hex().to_string(),
            peer: opened.connection.peer().to_string(),
            seconds: took.as_secs(),
        }
    }
}

/// Shows a meter while the work is done.
async fn shown<T>(work: &str, meter: &Meter, done: impl Future<Output = T>) -> T {
    tokio::select! {
        outcome = done => outcome,
        never = progress::show(work, meter) => {
            let never: Infallible = never;
            match never {}
        }
    }
}

fn tell(report: &Report, json: bool, output: &mut Output) -> io::Result<()> {
    if json {
        return output.json(report);
    }
    let (size, target, took) = (Size(report.size_bytes), report.target.display(), Seconds(report.seconds));
    let copied = Size(report.copied_bytes);
    let mut lines = vec![
        format!(
            "recovered {} into {target}: {size}, identical to the peer's copy (copied {copied}, took {took})",
            report.volume
        ),
        format!("  digest:  {} (BLAKE3)", report.digest),
    ];
    if report.data != CopyState::Consistent {
        lines.push(
            "  warning: the peer's copy is a mixture of old and new blocks, or something else wrote to it; check it before \
             use"
                .into(),
        );
    }
    output.lines(&lines)
}
