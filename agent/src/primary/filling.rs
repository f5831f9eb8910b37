//! What a primary lacks of its own copy: reads that wait for it, and what the source sends (S4).

use super::link::LinkError;
use super::requests::Later;
use super::{Inner, Primary};
use crate::device::{Errno, Reply};
use crate::state::{State, StateError};
use crate::storage::Operation;
use crate::storage::file::File;
use crate::transport::FrameReceiver;
use blockmirror_protocol::peer::PeerError;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::rebuild::{Absent, Changes, FetchId, Fetched, Landing};
use blockmirror_protocol::tracker::RequestId;
use blockmirror_protocol::units::{HostId, Session};
use blockmirror_protocol::wire::{Body, FrameHeader};
use bytes::Bytes;
use std::collections::HashMap;
use std::rc::Rc;
use tokio::task::spawn_local;

/// What of a rebuild is in memory.
#[derive(Default)]
pub(super) struct Filling {
    file: Option<Rc<File>>,
    /// Reads that wait until what they read is here.
    reads: HashMap<RequestId, Waiting>,
    /// What was fetched and is being written, with where it begins; nothing for zeroes.
    fetched: HashMap<FetchId, (u64, Bytes)>,
}

struct Waiting {
    range: ByteRange,
    reply: Rc<dyn Reply>,
    cookie: u64,
}

impl Filling {
    /// What is absent, where a rebuild is under way.
    pub(super) async fn open(state: &State) -> Result<(Option<Absent>, Self), StateError> {
        let (absent, file) = state.open_absent().await?.unzip();
        Ok((absent, Self { file, ..Self::default() }))
    }

    /// What was fetched is on the backing, or of no use.
    pub(super) fn drop_fetched(&mut self, fetch: FetchId) {
        self.fetched.remove(&fetch);
    }

    /// A read is not carried out. Says whether there is one of this name.
    pub(super) fn fail_read(&mut self, request: RequestId) -> bool {
        let read = self.reads.remove(&request);
        read.inspect(|read| read.reply.complete(read.cookie, Err(Errno(libc::EIO)))).is_some()
    }
}

impl Primary {
    /// Whether a read may go to the backing now; else it is kept until it may.
    pub(super) fn reads_at_once(&self, range: ByteRange, reply: &Rc<dyn Reply>, cookie: u64) -> bool {
        if !self.inner.borrow().tracker.is_missing(range) {
            return true;
        }
        self.drive(|inner, now| {
            let id = RequestId(inner.next_request);
            inner.next_request += 1;
            // The tracker may answer at once, and no reply may come before this returns.
            let reply: Rc<dyn Reply> = Rc::new(Later(reply.clone()));
            inner.filling.reads.insert(id, Waiting { range, reply, cookie });
            let at_once = inner.tracker.handle_read(id, range, now);
            if at_once {
                inner.filling.reads.remove(&id);
            }
            at_once
        })
    }

    /// A read that waited is carried out.
    pub(super) fn read_filled(&self, inner: &mut Inner, request: RequestId) {
        let Waiting { range, reply, cookie } =
            inner.filling.reads.remove(&request).expect("a read is kept until it is carried out");
        match inner.tracker.is_in_doubt() {
            true => self.read_when_settled(range, reply, cookie),
            false => self.read_backing(range, reply, cookie),
        }
    }

    /// Whether a replica answers fetches.
    pub(super) fn may_fetch_from(&self, host: HostId) -> bool {
        self.inner.borrow().tracker.may_fetch_from(host)
    }

    /// Takes in what the source sends in answer to fetches, until the stream ends.
    ///
    /// # Errors
    /// [`LinkError`] when it can't be heard, or sends what nobody asked for.
    pub(super) async fn take_fetched(
        &self,
        session: Session,
        mut frames: FrameReceiver,
    ) -> Result<(), LinkError> {
        let source = frames.peer();
        loop {
            let (header, payload) = frames.receive(&self.pool).await?;
            self.fetched(source, session, header, payload)?;
        }
    }

    fn fetched(
        &self,
        source: HostId,
        session: Session,
        header: FrameHeader,
        payload: Bytes,
    ) -> Result<(), PeerError> {
        let (range, number, content) = match header.body {
            Body::Fetched { range, number } => (range, number, Fetched::Data),
            Body::FetchedZero { range, number } => (range, number, Fetched::Zero),
            _ => {
                return Err(PeerError::Misbehaved(
                    "it sent something else than the content that was asked for",
                ));
            }
        };
        if header.session != session {
            return Err(PeerError::Misbehaved("a frame carries another session than its stream"));
        }
        let fetch = FetchId(number);
        self.drive(|inner, now| {
            // What is to be written of it is written from here.
            let before = inner.filling.fetched.insert(fetch, (range.offset, payload));
            let taken = inner.tracker.handle_fetched(source, session, (fetch, range), content, now);
            match (&taken, before) {
                (Ok(true), _) => {}
                // Something of that name is being written.
                (_, Some(before)) => drop(inner.filling.fetched.insert(fetch, before)),
                (_, None) => drop(inner.filling.fetched.remove(&fetch)),
            }
            taken.map(|_| ())
        })
    }

    /// Writes a part of what was fetched.
    pub(super) fn land(&self, inner: &Inner, landing: u64, part: Landing, is_zero: bool) {
        let Landing { fetch, range } = part;
        let operation = match is_zero {
            true => Operation::Zero { range, may_unmap: true },
            false => {
                let (offset, data) = &inner.filling.fetched[&fetch];
                let start = usize::try_from(range.offset - offset).expect("a fetch fits into memory");
                let length = usize::try_from(range.length).expect("a fetch fits into memory");
                Operation::Write {
                    offset: range.offset,
                    data: data.slice(start..start + length),
                    durable: false,
                }
            }
        };
        self.submit(&self.backing, operation, move |primary, outcome| {
            let written = primary.note(outcome);
            primary.drive(|inner, now| inner.tracker.handle_landed(landing, written, now));
        });
    }

    pub(super) fn write_absent(&self, inner: &Inner, changes: Changes) {
        let (primary, file) =
            (self.me(), inner.filling.file.clone().expect("it is open as long as blocks are absent"));
        spawn_local(async move {
            let written = primary.state.write_absent(&file, &changes).await;
            if let Err(error) = &written {
                tracing::error!("{}", crate::words::with_causes(error));
            }
            primary.drive(|inner, now| inner.tracker.handle_absent_written(written.is_ok(), now));
        });
    }

    /// Nothing is absent any more.
    pub(super) fn filled(&self) {
        let primary = self.me();
        spawn_local(async move {
            let recorded = primary.state.end_absent().await;
            match &recorded {
                Ok(()) => {
                    tracing::info!("the rebuild is complete: all of the volume is on this host's backing")
                }
                Err(error) => tracing::error!("{}", crate::words::with_causes(error)),
            }
            primary.drive(|inner, now| {
                if recorded.is_ok() {
                    inner.filling.file = None;
                }
                inner.tracker.handle_filled(recorded.is_ok(), now);
            });
        });
    }
}
