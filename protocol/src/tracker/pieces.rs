//! The path of a write through the tracker: cut into pieces, extents claimed, sequenced, sent on its way, ended.

use super::holds::Hold;
use super::pipeline::{Piece, Wait};
use super::{
    Action, Admitted, EPOCH_BYTES, PAYLOAD_LIMIT_BYTES, PIECES, Peer, RequestId, Tracker, Work,
    ZERO_LIMIT_BYTES,
};
use crate::active_set::Claim;
use crate::peer;
use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use crate::units::{Sequence, Time};
use std::collections::{HashMap, VecDeque};
use std::time::Duration;

/// How long after its last request an application still counts as active, so that a resync makes way for the next one
/// (R3): longer than most pauses between requests that wait for each other.
const QUIET_TIME: Duration = Duration::from_millis(50);

#[derive(Debug)]
pub(super) struct Request {
    pub(super) work: Work,
    /// What no piece was made of yet.
    pub(super) rest: ByteRange,
    pub(super) pieces: u32,
    pub(super) failed: bool,
    /// Whether blocks that it wrote are absent as far as the file says.
    pub(super) is_unsettled: bool,
    /// The last write that the answer speaks for.
    pub(super) sequence: Sequence,
}

/// The requests that are not answered, by their names.
#[derive(Debug, Default)]
pub(super) struct Requests {
    open: HashMap<RequestId, Request>,
    /// When an application last asked for something, be it a read.
    asked_at: Option<Time>,
}

impl Requests {
    /// An application asks for something, of which nothing is done yet.
    pub fn begin(&mut self, id: RequestId, work: Work, rest: ByteRange, last: Sequence, now: Time) {
        self.note_asked(now);
        let request = Request { work, rest, pieces: 0, failed: false, is_unsettled: false, sequence: last };
        assert!(self.open.insert(id, request).is_none(), "a request has a name of its own");
    }

    /// An application asks for something.
    pub fn note_asked(&mut self, now: Time) {
        self.asked_at = Some(now);
    }

    /// Whether an application asked for something so lately that it may well ask again (R3).
    pub fn were_asked_lately(&self, now: Time) -> bool {
        self.asked_at.is_some_and(|asked| now.since(asked) < QUIET_TIME)
    }

    /// One that is not answered: it outlives its pieces.
    pub fn of(&mut self, id: RequestId) -> &mut Request {
        self.open.get_mut(&id).expect("it is not answered")
    }

    /// One is answered.
    pub fn end(&mut self, id: RequestId) {
        self.open.remove(&id).expect("a request is answered once");
    }

    /// Whether all are answered.
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }
}

impl Tracker {
    /// Makes pieces of a request, as many as may be under way.
    pub(super) fn cut(&mut self, id: RequestId) {
        let request = self.requests.of(id);
        let (zero, fua, limit) = match request.work {
            Work::Write { fua, .. } => (None, fua, u64::from(PAYLOAD_LIMIT_BYTES)),
            Work::Zero { may_unmap, fua, .. } => (Some(may_unmap), fua, ZERO_LIMIT_BYTES),
            Work::Flush => return,
        };
        while !request.rest.is_empty() && request.pieces < PIECES {
            let range = request.rest.split_at_multiples(limit).next().expect("the rest is not empty");
            request.rest = ByteRange::between(range.end(), request.rest.end());
            request.pieces += 1;
            self.pipeline.arrive(Piece { request: id, range, zero, fua });
        }
    }

    /// Claims extents for the pieces that arrived, in order, as far as the active set has room.
    pub(super) fn begin_arrivals(&mut self, now: Time) {
        if self.holds_arrivals(now) {
            return;
        }
        while let Some(piece) = self.pipeline.first_arrived() {
            if self.local.failed || self.leading.is_superseded {
                self.pipeline.take_first_arrived();
                self.done_piece(piece.request, false, now);
                continue;
            }
            match self.log.claim(piece.range.extents(), self.safe(), now) {
                Claim::Full => {
                    // Room comes when the oldest extents' writes are durable here and there (D1).
                    self.close_epoch();
                    self.local.wanted = true;
                    self.write_maps();
                    break;
                }
                claim => {
                    self.pipeline.take_first_arrived();
                    match claim {
                        Claim::Wait if !planted(Bug::SkipLog) => self.pipeline.wait(piece, Wait::Record),
                        _ => self.begin(piece, now),
                    }
                }
            }
        }
        self.write_log(false);
    }

    pub(super) fn begin_if_active(&mut self, piece: Piece, now: Time) {
        if self.local.failed || self.leading.is_superseded {
            self.give_piece_up(piece, now);
        } else if self.log.are_active(piece.range.extents()) {
            self.begin(piece, now);
        } else {
            self.pipeline.wait(piece, Wait::Record);
        }
    }

    /// The piece gets its place in the one order (W1), goes to every peer, and to the backing when it may.
    pub(super) fn begin(&mut self, piece: Piece, now: Time) {
        if !self.wait_for_fill(piece) && !self.wait_for_copy(piece, now) {
            self.sequence(piece, now);
        }
    }

    /// As [`Tracker::begin`], for a piece that waits for no copy.
    pub(super) fn sequence(&mut self, piece: Piece, now: Time) {
        if self.hold_for_generation(piece) || self.hold_for_told(piece) {
            return;
        }
        let sequence = self.last.next();
        self.last = sequence;
        self.pipeline.sequence(piece, sequence);
        let is_unsettled = self.overwrite_absent(sequence, piece.range);
        let request = self.requests.of(piece.request);
        request.sequence = sequence;
        request.is_unsettled |= is_unsettled;
        let Piece { request, range, zero, fua } = piece;
        let write = peer::LiveWrite { request, range, epoch: self.epoch.number, sequence, zero };
        for peer in self.peers.values_mut() {
            peer.handle_write(write, now);
        }
        self.epoch.since.get_or_insert(now);
        self.epoch.bytes += peer::frame_cost_bytes(if zero.is_some() { 0 } else { range.length });
        self.log.is_used(now);
        self.collect();
        if self.order.admit(Admitted::Write(sequence), range) {
            self.run(vec![Admitted::Write(sequence)]);
        }
        if fua || self.epoch.bytes >= self.epoch_limit_bytes() {
            self.close_epoch();
        }
    }

    /// An epoch is acknowledged as a whole, so the window must hold several.
    pub(super) fn epoch_limit_bytes(&self) -> u64 {
        let windows = self.peers.values().filter_map(Peer::window_limit_bytes);
        windows.map(|limit| limit / 4).chain([EPOCH_BYTES]).min().expect("the chain is not empty")
    }

    /// These may run now.
    pub(super) fn run(&mut self, admitted: Vec<Admitted>) {
        let mut admitted = VecDeque::from(admitted);
        while let Some(next) = admitted.pop_front() {
            match next {
                Admitted::Write(sequence) => {
                    let Piece { request, range, zero, fua } = self.pipeline.under_way(sequence);
                    self.actions.push_back(Action::WriteLocal {
                        sequence,
                        request,
                        range,
                        zero,
                        durable: fua,
                    });
                }
                Admitted::Landing(landing) => self.land(landing),
                Admitted::Hold(hold) => {
                    let Hold { follower, number, range } = self.holds.of(hold);
                    let wanted = self.peer_of(follower).is_some_and(|peer| peer.wants_digest(number));
                    if wanted {
                        self.actions.push_back(Action::ReadDigest { hold, range });
                    } else {
                        self.holds.end(hold);
                        admitted.extend(self.order.finish(Admitted::Hold(hold), range));
                    }
                }
            }
        }
    }

    /// What waits for anything is carried out no more, and what is under way ends: the backing failed, or another host leads.
    pub(super) fn give_pieces_up(&mut self, now: Time) {
        let (with_extents, without) = self.pipeline.give_up();
        for piece in with_extents {
            self.give_piece_up(piece, now);
        }
        for piece in without {
            self.done_piece(piece.request, false, now);
        }
    }

    /// A piece that has its extents is carried out no more.
    pub(super) fn give_piece_up(&mut self, piece: Piece, now: Time) {
        self.log.give_back(piece.range.extents(), None);
        self.done_piece(piece.request, false, now);
    }

    pub(super) fn done_piece(&mut self, id: RequestId, written: bool, now: Time) {
        let request = self.requests.of(id);
        request.pieces -= 1;
        request.failed |= !written;
        if request.failed {
            request.rest = ByteRange::default();
        }
        if !request.rest.is_empty() {
            self.cut(id);
        } else if request.pieces == 0 {
            let (sequence, work, is_unsettled) = (request.sequence, request.work, request.is_unsettled);
            let durable =
                matches!(work, super::Work::Write { fua: true, .. } | super::Work::Zero { fua: true, .. });
            match request.failed {
                true if self.leading.is_superseded => self.answer(id, Err(super::WriteFailed)),
                true => self.fail(id),
                false if is_unsettled && self.filling.is_some() => self.settle_absent(id, sequence, durable),
                false => self.owe(id, sequence, durable, now),
            }
        }
    }
}
