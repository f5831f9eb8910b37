//! Comparing the volume with one replica while both are in use.
//!
//! The volume is compared extent by extent. A hold takes its place among the writes here, and a digest request the
//! same place in the live stream: here the extent is read after every write that was sequenced before, and before
//! every later one, and the replica does the same with its frames. So both digests are of the same position, and a
//! difference is one: there are no false alarms. While the replica is not in sync no step begins. An extent that
//! differs is marked dirty at once (D1) and copied again. One that can't be read here is told as such, and is not marked:
//! there is nothing to copy. One that can't be read there differs, and the copy heals it.
//!
//! A compare that nobody waits for any more begins no further step, and has ended when those under way have: a replica
//! answers no more than a few digests at a time.

use super::{Action, Link, Peer, Phase, State};
use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use crate::units::{EXTENT_BYTES, Sequence};
use crate::wire::{Body, FrameHeader};
use std::collections::BTreeMap;

/// How many extents are compared at the same time.
const STEPS: usize = 2;

/// How a compare ended.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CompareResult {
    /// How many bytes were compared: all but those that could not be read here.
    pub compared_bytes: u64,
    /// Extents whose digests differ; they were marked and are copied again.
    pub different: Vec<ByteRange>,
    /// Extents that could not be read here, at least in part.
    pub unreadable: Vec<ByteRange>,
    /// The last write before the compare began, and before it ended.
    pub sequences: (Sequence, Sequence),
}

#[derive(Debug)]
pub(super) struct Verify {
    size_bytes: u64,
    /// The number of the first extent's step: steps of different compares have different numbers.
    first: u64,
    /// How many extents were begun with.
    next: u64,
    steps: BTreeMap<u64, Step>,
    compared: u64,
    different: Vec<ByteRange>,
    unreadable: Vec<ByteRange>,
    began: Sequence,
    /// Nobody waits for it any more.
    is_cancelled: bool,
}

#[derive(Debug, Default)]
struct Step {
    local: Option<Read>,
    remote: Option<[u8; 32]>,
}

/// What came of reading an extent here.
#[derive(Debug, Clone, Copy)]
enum Read {
    Digest([u8; 32]),
    Failed,
}

impl Verify {
    fn range(&self, number: u64) -> ByteRange {
        let index = number - self.first;
        ByteRange::between(index * EXTENT_BYTES, ((index + 1) * EXTENT_BYTES).min(self.size_bytes))
    }

    pub(super) fn progress(&self) -> (u64, u64) {
        ((self.compared * EXTENT_BYTES).min(self.size_bytes), self.size_bytes)
    }
}

impl Peer {
    /// Begins a compare. Says whether it did: not unless the replica is in sync and no other compare runs.
    #[must_use]
    pub(crate) fn begin_compare(&mut self, last: Sequence) -> bool {
        let (size_bytes, first) = (self.size_bytes, self.next_step);
        let State::Linked(link) = &mut self.state else { return false };
        if link.phase() != Phase::InSync || link.verify.is_some() {
            return false;
        }
        link.verify = Some(Verify {
            size_bytes,
            first,
            next: 0,
            steps: BTreeMap::new(),
            compared: 0,
            different: Vec::new(),
            unreadable: Vec::new(),
            began: last,
            is_cancelled: false,
        });
        self.next_step += size_bytes.div_ceil(EXTENT_BYTES);
        true
    }

    /// Nobody waits for the compare any more, if there is one.
    pub(crate) fn cancel_compare(&mut self) {
        let State::Linked(link) = &mut self.state else { return };
        if let Some(verify) = &mut link.verify {
            verify.is_cancelled = true;
        }
        link.end_cancelled_compare();
    }

    /// The hold of a step has its place among the writes: the request has the same one in the stream.
    pub(crate) fn handle_hold(&mut self, number: u64, range: ByteRange) {
        let State::Linked(link) = &mut self.state else { return };
        let header =
            FrameHeader { session: link.session, stream: link.stream, body: Body::Digest { range, number } };
        self.actions.push_back(Action::SendFrame { header, request: None });
    }

    /// Whether a step that the tracker holds now still waits for its digest.
    pub(crate) fn wants_digest(&mut self, number: u64) -> bool {
        self.step(number).is_some()
    }

    /// The digest of a held range here, unless it could not be read.
    pub(crate) fn handle_local_digest(&mut self, number: u64, digest: Option<[u8; 32]>) {
        if let Some(step) = self.step(number) {
            step.local = Some(digest.map_or(Read::Failed, Read::Digest));
            self.settle(number);
        }
    }

    pub(super) fn handle_peer_digest(&mut self, number: u64, digest: [u8; 32]) {
        if let Some(step) = self.step(number) {
            step.remote = Some(digest);
            self.settle(number);
        }
    }

    /// The compare's result, once it has ended and what it marked is durable. Nothing is left of it afterwards.
    pub(crate) fn take_compared(&mut self, last: Sequence) -> Option<CompareResult> {
        let is_written = self.is_written();
        let State::Linked(link) = &mut self.state else { return None };
        let verify = link.verify.as_ref().filter(|verify| !verify.is_cancelled)?;
        if verify.next * EXTENT_BYTES < verify.size_bytes || !verify.steps.is_empty() {
            return None;
        }
        if !is_written {
            self.write_map();
            return None;
        }
        let mut verify = link.verify.take()?;
        verify.different.sort_unstable_by_key(|range| range.offset);
        verify.unreadable.sort_unstable_by_key(|range| range.offset);
        let unreadable_bytes: u64 = verify.unreadable.iter().map(|range| range.length).sum();
        Some(CompareResult {
            compared_bytes: verify.size_bytes - unreadable_bytes,
            different: verify.different,
            unreadable: verify.unreadable,
            sequences: (verify.began, last),
        })
    }

    /// Whether a compare is under way.
    pub(crate) fn is_comparing(&self) -> bool {
        matches!(&self.state, State::Linked(link) if link.verify.is_some())
    }

    pub(super) fn drive_compare(&mut self) {
        let State::Linked(link) = &mut self.state else { return };
        let is_in_sync = link.phase() == Phase::InSync;
        let Some(verify) = link.verify.as_mut().filter(|_| is_in_sync) else {
            return;
        };
        while !verify.is_cancelled
            && verify.steps.len() < STEPS
            && verify.next * EXTENT_BYTES < verify.size_bytes
        {
            let number = verify.first + verify.next;
            verify.next += 1;
            verify.steps.insert(number, Step::default());
            let range = verify.range(number);
            self.actions.push_back(Action::Hold { number, range });
        }
    }

    fn step(&mut self, number: u64) -> Option<&mut Step> {
        let State::Linked(link) = &mut self.state else { return None };
        link.verify.as_mut()?.steps.get_mut(&number)
    }

    fn settle(&mut self, number: u64) {
        let State::Linked(link) = &mut self.state else { return };
        let Some(verify) = &mut link.verify else { return };
        let Some(Step { local: Some(here), remote: Some(there), .. }) = verify.steps.get(&number) else {
            return;
        };
        let (here, there) = (*here, *there);
        verify.steps.remove(&number);
        verify.compared += 1;
        let range = verify.range(number);
        match here {
            Read::Failed => verify.unreadable.push(range),
            Read::Digest(here) if here == there => {}
            Read::Digest(_) => {
                verify.different.push(range);
                // No write is to blame, so nothing is safe until the mark is durable.
                if planted(Bug::TellUnmarkedDifference) {
                    return;
                }
                self.distrust(range.blocks(self.block_size), Sequence(1));
            }
        }
        if let State::Linked(link) = &mut self.state {
            link.end_cancelled_compare();
        }
    }
}

impl Link {
    /// A compare that was cancelled has ended when nothing of it is under way.
    fn end_cancelled_compare(&mut self) {
        self.verify.take_if(|verify| verify.is_cancelled && verify.steps.is_empty());
    }
}
