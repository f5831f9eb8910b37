//! Where each piece of a write is, from its arrival to the end of its write here: one [`Place`] each, and one owner of them all.
//!
//! ```text
//!   Arrived ──> Claimed ──┐                        ┌──> AwaitsGeneration ──┐
//!      │                  v                        │                       v
//!      └────────────> (begun) ──> AwaitsCopy ──> (next) ───────────────> UnderWay ──> gone
//!                                                  │                       ^
//!                                                  └──> AwaitsBound ───────┘
//! ```
//!
//! One that overwrites a part of an absent block comes to `AwaitsFill` instead of beginning, and begins from there.
//!
//! A piece that waited for a generation or a bound claims its extents anew where they are no longer active. Within a place
//! pieces keep the order in which they came to it.

use super::RequestId;
use crate::ranges::ByteRange;
use crate::units::{Sequence, Time};
use std::collections::BTreeMap;

/// A part of a request, as large as one write may be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) request: RequestId,
    pub(super) range: ByteRange,
    /// For zeroes, whether the space may be given back.
    pub(super) zero: Option<bool>,
    pub(super) fua: bool,
}

/// The number of a piece's coming to a place where it waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) struct Turn(u64);

impl Turn {
    const LAST: Self = Self(u64::MAX);
}

/// Where a piece is, with what it waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Place {
    /// The active set may have no room for its extents; or nothing is begun yet.
    Arrived(Turn),
    /// A record of the activity log is to say first that its extents are active (W2).
    Claimed(Turn),
    /// The generation that it is the first write of is to be durable (L1).
    AwaitsGeneration(Turn),
    /// Replicas may not be told of its epoch yet (X4).
    AwaitsBound(Turn),
    /// What it overwrites a part of is to be here first (S4).
    AwaitsFill(Turn),
    /// A copy of what it overwrites is to be durable on a replica first (R2), until this time.
    AwaitsCopy(Turn, Time),
    /// It has its place in the one order (W1), and is written here as soon as nothing that overlaps is.
    UnderWay(Sequence),
}

/// What a piece waits for that has its extents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    /// A record of the activity log.
    Record,
    /// A copy, until this time at most.
    Copy(Time),
    /// A generation.
    Generation,
    /// That replicas may be told of its epoch.
    Bound,
    /// That absent blocks are here.
    Fill,
}

/// All pieces of writes that have not ended, each in one place.
#[derive(Debug, Default)]
pub(super) struct Pipeline {
    pieces: BTreeMap<Place, Piece>,
    next: Turn,
}

impl Pipeline {
    /// A piece arrives.
    pub(super) fn arrive(&mut self, piece: Piece) {
        let turn = self.turn();
        self.put(Place::Arrived(turn), piece);
    }

    /// The piece that arrived first, of those that are not begun.
    pub(super) fn first_arrived(&self) -> Option<Piece> {
        self.pieces.range(..=Place::Arrived(Turn::LAST)).next().map(|(_, piece)| *piece)
    }

    /// It is begun, or given up.
    ///
    /// # Panics
    /// When none has arrived.
    pub(super) fn take_first_arrived(&mut self) -> Piece {
        let (place, piece) = self.pieces.pop_first().expect("one has arrived");
        assert!(matches!(place, Place::Arrived(_)), "one has arrived");
        piece
    }

    /// A piece that has its extents waits.
    pub(super) fn wait(&mut self, piece: Piece, wait: Wait) {
        let turn = self.turn();
        let place = match wait {
            Wait::Record => Place::Claimed(turn),
            Wait::Copy(until) => Place::AwaitsCopy(turn, until),
            Wait::Generation => Place::AwaitsGeneration(turn),
            Wait::Bound => Place::AwaitsBound(turn),
            Wait::Fill => Place::AwaitsFill(turn),
        };
        self.put(place, piece);
    }

    /// A piece has its place in the one order.
    pub(super) fn sequence(&mut self, piece: Piece, sequence: Sequence) {
        self.put(Place::UnderWay(sequence), piece);
    }

    /// A piece that is under way.
    ///
    /// # Panics
    /// When there is none.
    pub(super) fn under_way(&self, sequence: Sequence) -> Piece {
        self.pieces[&Place::UnderWay(sequence)]
    }

    /// Its write has ended.
    ///
    /// # Panics
    /// When it was not under way.
    pub(super) fn end(&mut self, sequence: Sequence) -> Piece {
        self.pieces.remove(&Place::UnderWay(sequence)).expect("a write ends once")
    }

    /// The first write of those that are under way.
    pub(super) fn first_under_way(&self) -> Option<Sequence> {
        match self.pieces.range(Place::UnderWay(Sequence(0))..).next() {
            Some((Place::UnderWay(sequence), _)) => Some(*sequence),
            _ => None,
        }
    }

    /// Whether any has arrived that is not begun.
    pub(super) fn has_arrived(&self) -> bool {
        self.first_arrived().is_some()
    }

    /// Whether any waits for a record of the activity log.
    pub(super) fn awaits_record(&self) -> bool {
        self.is_any(Place::Claimed(Turn::default()), Place::Claimed(Turn::LAST))
    }

    /// Whether any waits until replicas may be told of its epoch.
    pub(super) fn awaits_bound(&self) -> bool {
        self.is_any(Place::AwaitsBound(Turn::default()), Place::AwaitsBound(Turn::LAST))
    }

    /// When the first of those that wait for copies has waited for long enough.
    pub(super) fn copies_due(&self) -> Option<Time> {
        let until = |place: &Place| match place {
            Place::AwaitsCopy(_, until) => Some(*until),
            _ => None,
        };
        self.pieces.range(FIRST_COPY..LAST_COPY).filter_map(|(place, _)| until(place)).min()
    }

    /// Those that wait for a record of the activity log go on.
    pub(super) fn take_claimed(&mut self) -> Vec<Piece> {
        self.take(Place::Claimed(Turn::default()), Place::Claimed(Turn::LAST))
    }

    /// Those that wait for copies and do so no more, since `is_over` says so of the piece and the time until which it waits.
    pub(super) fn take_from_copies(&mut self, mut is_over: impl FnMut(&Piece, Time) -> bool) -> Vec<Piece> {
        let waiting = self.pieces.range(FIRST_COPY..LAST_COPY);
        let over: Vec<Place> = waiting
            .filter(|(place, piece)| matches!(place, Place::AwaitsCopy(_, until) if is_over(piece, *until)))
            .map(|(place, _)| *place)
            .collect();
        over.into_iter().filter_map(|place| self.pieces.remove(&place)).collect()
    }

    /// Those that wait for a generation go on.
    pub(super) fn take_from_generation(&mut self) -> Vec<Piece> {
        self.take(Place::AwaitsGeneration(Turn::default()), Place::AwaitsGeneration(Turn::LAST))
    }

    /// Those that wait until replicas may be told of their epoch go on.
    pub(super) fn take_from_bound(&mut self) -> Vec<Piece> {
        self.take(Place::AwaitsBound(Turn::default()), Place::AwaitsBound(Turn::LAST))
    }

    /// Those that wait for absent blocks and do so no more.
    pub(super) fn take_from_fill(&mut self, mut is_over: impl FnMut(&Piece) -> bool) -> Vec<Piece> {
        let (first, last) = (Place::AwaitsFill(Turn::default()), Place::AwaitsFill(Turn::LAST));
        if !self.is_any(first, last) {
            return Vec::new();
        }
        self.pieces.extract_if(first..=last, |_, piece| is_over(piece)).map(|(_, piece)| piece).collect()
    }

    /// Those that arrived and are not begun will not be.
    pub(super) fn take_arrived(&mut self) -> Vec<Piece> {
        self.take(Place::Arrived(Turn::default()), Place::Arrived(Turn::LAST))
    }

    /// All that wait for anything are carried out no more; what is under way ends. Gives those that have their extents, then
    /// those that have none.
    pub(super) fn give_up(&mut self) -> (Vec<Piece>, Vec<Piece>) {
        let arrived = self.take_arrived();
        let under_way = self.pieces.split_off(&Place::UnderWay(Sequence(0)));
        let waiting = std::mem::replace(&mut self.pieces, under_way);
        (waiting.into_values().collect(), arrived)
    }

    fn turn(&mut self) -> Turn {
        self.next.0 += 1;
        self.next
    }

    fn put(&mut self, place: Place, piece: Piece) {
        let other = self.pieces.insert(place, piece);
        assert!(other.is_none(), "no two pieces are in one place");
    }

    fn is_any(&self, first: Place, last: Place) -> bool {
        self.pieces.range(first..=last).next().is_some()
    }

    fn take(&mut self, first: Place, last: Place) -> Vec<Piece> {
        if !self.is_any(first, last) {
            return Vec::new();
        }
        self.pieces.extract_if(first..=last, |_, _| true).map(|(_, piece)| piece).collect()
    }
}

const FIRST_COPY: Place = Place::AwaitsCopy(Turn(0), Time(std::time::Duration::ZERO));
const LAST_COPY: Place = Place::UnderWay(Sequence(0));

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn piece(number: u64) -> Piece {
        let range = ByteRange::new(number * 4096, 4096);
        Piece { request: RequestId(number), range, zero: None, fua: false }
    }

    fn numbers(pieces: &[Piece]) -> Vec<u64> {
        pieces.iter().map(|piece| piece.request.0).collect()
    }

    fn at(milliseconds: u64) -> Time {
        Time(Duration::from_millis(milliseconds))
    }

    /// One in each place, by number, in an order that is not that of the places.
    fn everywhere() -> Pipeline {
        let mut pipeline = Pipeline::default();
        pipeline.sequence(piece(9), Sequence(4));
        for (number, wait) in
            [(5, Wait::Bound), (4, Wait::Generation), (3, Wait::Copy(at(7))), (2, Wait::Record)]
        {
            pipeline.wait(piece(number), wait);
        }
        pipeline.arrive(piece(1));
        pipeline
    }

    #[test]
    fn a_piece_is_in_one_place_at_a_time_and_keeps_its_turn() {
        let mut pipeline = Pipeline::default();
        (0..3).for_each(|number| pipeline.arrive(piece(number)));
        assert_eq!(pipeline.first_arrived(), Some(piece(0)));
        for _ in 0..3 {
            let piece = pipeline.take_first_arrived();
            pipeline.wait(piece, Wait::Record);
        }
        assert!(!pipeline.has_arrived() && pipeline.awaits_record());
        let claimed = pipeline.take_claimed();
        assert_eq!(numbers(&claimed), [0, 1, 2]);
        assert!(!pipeline.awaits_record() && pipeline.take_claimed().is_empty());
        for (piece, sequence) in claimed.into_iter().zip([7, 5, 6]) {
            pipeline.sequence(piece, Sequence(sequence));
        }
        assert_eq!(
            (pipeline.first_under_way(), pipeline.under_way(Sequence(7))),
            (Some(Sequence(5)), piece(0))
        );
        assert_eq!(pipeline.end(Sequence(5)), piece(1));
        assert_eq!(pipeline.first_under_way(), Some(Sequence(6)));
    }

    #[test]
    fn each_wait_ends_for_those_alone_that_it_is_for() {
        let mut pipeline = everywhere();
        assert_eq!(numbers(&pipeline.take_from_generation()), [4]);
        assert_eq!(numbers(&pipeline.take_claimed()), [2]);
        assert!(pipeline.awaits_bound());
        assert_eq!(numbers(&pipeline.take_from_bound()), [5]);
        assert!(!pipeline.awaits_bound());
        assert_eq!(pipeline.copies_due(), Some(at(7)));
        assert!(pipeline.take_from_copies(|_, until| until > at(7)).is_empty());
        pipeline.wait(piece(6), Wait::Copy(at(6)));
        assert_eq!(pipeline.copies_due(), Some(at(6)));
        assert_eq!(
            numbers(&pipeline.take_from_copies(|piece, until| piece.range.offset > 0 && until == at(7))),
            [3]
        );
        assert_eq!(numbers(&pipeline.take_from_copies(|_, _| true)), [6]);
        assert_eq!((pipeline.copies_due(), numbers(&pipeline.take_arrived())), (None, vec![1]));
        assert_eq!(pipeline.first_under_way(), Some(Sequence(4)));
    }

    /// Whatever a piece waits for, it is found where all are given up.
    #[test]
    fn what_is_under_way_ends_and_everything_else_is_given_up() {
        let mut pipeline = everywhere();
        let (with_extents, without) = pipeline.give_up();
        assert_eq!((numbers(&with_extents), numbers(&without)), (vec![2, 4, 5, 3], vec![1]));
        assert_eq!(pipeline.end(Sequence(4)), piece(9));
        assert!(pipeline.pieces.is_empty());
    }

    #[test]
    #[should_panic(expected = "a write ends once")]
    fn a_write_ends_once() {
        let mut pipeline = everywhere();
        pipeline.end(Sequence(4));
        pipeline.end(Sequence(4));
    }
}
