//! How much memory the requests of all clients of a volume may take.
//!
//! A request takes memory from the moment that its header was judged until the last byte of its reply is written, or, where
//! its client went away, until the volume has answered it. A connection has [`OWN_BYTES`] for itself; what it needs
//! beyond that comes from [`SHARED_BYTES`], which all connections have together. So requests of a small size go on
//! whatever other clients do, and those who take large ones and no answers only keep each other waiting.
//!
//! Invariants:
//!
//! - A request is admitted only where no more than [`SHARED_BYTES`] are lent out afterwards. Memory grows by admissions
//!   alone, so all connections together have at most `SHARED_BYTES` and `OWN_BYTES` for each that is open.
//! - What was left behind by clients that went away counts as lent out, and may make that more than there is. Then
//!   nobody is admitted until the volume, which needs no client for that, has answered enough of it.
//! - A client that keeps a loan and does nothing while others wait is given up (`stall`), so all who wait are admitted.
//! - Who waits for a loan is admitted in the order of arrival: small ones don't overtake a large one for ever. A request
//!   that needs no loan waits for nobody.
//!
//! All of it is on the volume's thread. Who must wait is woken when it may be admitted, and asks again.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::task::Waker;

/// What each connection can always have, in bytes. Enough for 8 requests of 128 KiB, the kernel's usual largest, and
/// for the largest that common programs make by themselves.
pub(super) const OWN_BYTES: u64 = 1 << 20;

/// What all connections of a volume can have beyond that, in bytes: two requests of the largest size.
pub(super) const SHARED_BYTES: u64 = 128 << 20;

/// What all connections of a volume have together.
#[derive(Default)]
pub(super) struct Budget {
    /// What is lent out, and what clients left behind, in bytes.
    lent: Cell<u64>,
    /// Who waits, in the order of arrival.
    waiting: RefCell<BTreeMap<u64, Waker>>,
    next_ticket: Cell<u64>,
}

impl Budget {
    fn next_ticket(&self) -> u64 {
        let ticket = self.next_ticket.get();
        self.next_ticket.set(ticket + 1);
        ticket
    }

    fn give_back(&self, bytes: u64) {
        if bytes == 0 {
            return;
        }
        let lent = self.lent.get();
        let left = lent.checked_sub(bytes).expect("what is given back was lent out");
        self.lent.set(left);
        if lent > SHARED_BYTES && left <= SHARED_BYTES {
            self.waiting.borrow().values().for_each(Waker::wake_by_ref);
        } else {
            self.wake_next();
        }
    }

    fn wake_next(&self) {
        if let Some(waker) = self.waiting.borrow().values().next() {
            waker.wake_by_ref();
        }
    }
}

/// What one connection has of a [`Budget`]; dropping it gives all of that back.
pub(super) struct Share {
    budget: Rc<Budget>,
    bytes: u64,
    /// Its place among those who wait.
    ticket: Option<u64>,
}

impl Share {
    pub(super) fn new(budget: Rc<Budget>) -> Self {
        Self { budget, bytes: 0, ticket: None }
    }

    /// How much the connection has, in bytes.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Whether another connection waits, and this one has what could help it.
    pub(super) fn is_wanted(&self) -> bool {
        let waiting = self.budget.waiting.borrow();
        loan(self.bytes) > 0 && waiting.keys().any(|ticket| Some(*ticket) != self.ticket)
    }

    /// Whether the connection has more than what it can always have.
    pub(super) fn has_loan(&self) -> bool {
        loan(self.bytes) > 0
    }

    /// Takes so many bytes more, or has `waker` called when it is time to ask again.
    pub(super) fn admit(&mut self, bytes: u64, waker: &Waker) -> bool {
        let loan = loan(self.bytes + bytes) - loan(self.bytes);
        if !self.is_next(loan) || self.budget.lent.get() + loan > SHARED_BYTES {
            let ticket = *self.ticket.get_or_insert_with(|| self.budget.next_ticket());
            self.budget.waiting.borrow_mut().insert(ticket, waker.clone());
            return false;
        }
        self.bytes += bytes;
        self.budget.lent.update(|lent| lent + loan);
        self.stop_waiting();
        true
    }

    /// Nobody who waits for a loan has come before.
    fn is_next(&self, loan: u64) -> bool {
        let waiting = self.budget.waiting.borrow();
        loan == 0 || waiting.keys().next().is_none_or(|first| Some(*first) == self.ticket)
    }

    /// Gives back all but so many bytes.
    pub(super) fn shrink_to(&mut self, bytes: u64) {
        let loan = loan(self.bytes) - loan(bytes);
        assert!(bytes <= self.bytes, "memory grows where it is admitted");
        self.bytes = bytes;
        self.budget.give_back(loan);
    }

    /// Ends the share, except for so many bytes of requests that the volume still has.
    pub(super) fn leave_behind(&mut self, bytes: u64) -> LeftBehind {
        self.shrink_to(bytes);
        let own = bytes - loan(bytes);
        self.bytes = 0;
        self.budget.lent.update(|lent| lent + own);
        LeftBehind { budget: self.budget.clone(), bytes }
    }

    fn stop_waiting(&mut self) {
        if let Some(ticket) = self.ticket.take() {
            self.budget.waiting.borrow_mut().remove(&ticket);
            self.budget.wake_next();
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.stop_waiting();
        self.shrink_to(0);
    }
}

/// The memory of requests whose client went away; dropping it gives it back.
pub(super) struct LeftBehind {
    budget: Rc<Budget>,
    bytes: u64,
}

impl Drop for LeftBehind {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes);
    }
}

/// How much of so many bytes is lent.
fn loan(bytes: u64) -> u64 {
    bytes.saturating_sub(OWN_BYTES)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::nbd::SERVERS_LIMIT;
    use crate::device::nbd::connection::{BYTE_LIMIT, memory_bytes};
    use crate::device::nbd::{CONNECTION_LIMIT, request::PAYLOAD_LIMIT_BYTES};
    use blockmirror_protocol::nbd::transmission::{CommandFlags, CommandKind, RequestHeader};
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::Wake;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn largest() -> u64 {
        let flags = CommandFlags::NONE;
        memory_bytes(&RequestHeader {
            flags,
            kind: CommandKind::Read,
            cookie: 0,
            offset: 0,
            length: PAYLOAD_LIMIT_BYTES,
        })
    }

    #[test]
    fn the_largest_request_fits_and_all_together_have_256_mib() {
        assert!(loan(BYTE_LIMIT - 1 + largest()) <= SHARED_BYTES, "one connection alone never waits");
        let connections = (SERVERS_LIMIT * CONNECTION_LIMIT) as u64;
        assert_eq!(SHARED_BYTES + connections * OWN_BYTES, 256 << 20);
    }

    #[test]
    fn large_requests_wait_in_the_order_of_arrival_and_small_ones_for_nobody() {
        let budget = Rc::<Budget>::default();
        let woken: Vec<Arc<Count>> = (0..4).map(|_| Arc::default()).collect();
        let wakers: Vec<Waker> = woken.iter().map(|count| Waker::from(count.clone())).collect();
        let mut shares: Vec<Share> = (0..4).map(|_| Share::new(budget.clone())).collect();
        assert!(shares[0].admit(largest(), &wakers[0]));
        assert!(shares[1].admit(largest(), &wakers[1]));
        assert!(!shares[2].admit(largest(), &wakers[2]), "that is more than there is");
        assert!(!shares[3].admit(2 << 20, &wakers[3]), "there is room, but another one came first");
        assert!(shares[0].admit(0, &wakers[0]), "what needs no loan goes on");
        assert_eq!(shares.iter().map(Share::is_wanted).collect::<Vec<_>>(), [true, true, false, false]);
        let mut small = Share::new(budget.clone());
        assert!(small.admit(OWN_BYTES, &wakers[0]), "a small request goes on");
        shares[0].shrink_to(largest());
        assert_eq!(woken[2].0.load(Ordering::Relaxed), 0, "nothing was given back");
        shares[0].shrink_to(0);
        assert_eq!(woken[2].0.load(Ordering::Relaxed), 1);
        assert!(!shares[3].admit(2 << 20, &wakers[3]), "the first has not been there yet");
        assert!(shares[2].admit(largest(), &wakers[2]));
        assert_eq!(woken[3].0.load(Ordering::Relaxed), 1, "the next one is told");
        assert!(shares[3].admit(2 << 20, &wakers[3]));
        shares.clear();
        assert_eq!(budget.lent.get(), 0);
        assert!(budget.waiting.borrow().is_empty());
    }

    #[test]
    fn who_waits_and_goes_away_makes_room_for_the_next() {
        let budget = Rc::<Budget>::default();
        let count = Arc::<Count>::default();
        let mut shares: Vec<Share> = (0..4).map(|_| Share::new(budget.clone())).collect();
        assert!(shares[0].admit(2 * largest(), Waker::noop()));
        assert!(!shares[1].admit(largest(), Waker::noop()));
        assert!(!shares[2].admit(2 << 20, &Waker::from(count.clone())));
        drop(shares.remove(1));
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert!(shares[1].admit(2 << 20, Waker::noop()));
    }

    /// A client that asks, goes away and comes again would have its own share anew each time.
    #[test]
    fn what_is_left_behind_keeps_newcomers_waiting() {
        let budget = Rc::<Budget>::default();
        let mut left = Vec::new();
        let mut share = Share::new(budget.clone());
        let count = Arc::<Count>::default();
        while share.admit(OWN_BYTES, &Waker::from(count.clone())) {
            left.push(share.leave_behind(OWN_BYTES));
            share = Share::new(budget.clone());
            assert!(left.len() as u64 <= SHARED_BYTES / OWN_BYTES + 1, "there is an end to that");
        }
        left.pop();
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
        assert!(share.admit(OWN_BYTES, Waker::noop()));
        left.clear();
        drop(share);
        assert_eq!(budget.lent.get(), 0);
    }

    #[derive(Debug, Clone)]
    enum Step {
        Ask(usize, u64),
        Shrink(usize, u64),
        Leave(usize, u64),
        Answer,
    }

    fn step() -> impl Strategy<Value = Step> {
        let sizes = || prop_oneof![0u64..4096, 0u64..(2 << 20), 0u64..=(64 << 20)];
        prop_oneof![
            4 => (0usize..6, sizes()).prop_map(|(who, bytes)| Step::Ask(who, bytes)),
            2 => (0usize..6, sizes()).prop_map(|(who, bytes)| Step::Shrink(who, bytes)),
            1 => (0usize..6, sizes()).prop_map(|(who, bytes)| Step::Leave(who, bytes)),
            1 => Just(Step::Answer),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        /// Six connections that do anything, beside a sum over all of them.
        #[test]
        fn together_they_never_have_more_than_there_is(steps in prop::collection::vec(step(), 1..200)) {
            let budget = Rc::<Budget>::default();
            let mut shares: Vec<Share> = (0..6).map(|_| Share::new(budget.clone())).collect();
            let mut left: Vec<LeftBehind> = Vec::new();
            for step in steps {
                match step {
                    Step::Ask(who, bytes) => drop(shares[who].admit(bytes, Waker::noop())),
                    Step::Shrink(who, bytes) => {
                        let bytes = bytes.min(shares[who].bytes);
                        shares[who].shrink_to(bytes);
                    }
                    Step::Leave(who, bytes) => {
                        let bytes = bytes.min(shares[who].bytes);
                        left.push(shares[who].leave_behind(bytes));
                        shares[who] = Share::new(budget.clone());
                    }
                    Step::Answer => drop(left.pop()),
                }
                let left_bytes: u64 = left.iter().map(|left| left.bytes).sum();
                let loans: u64 = shares.iter().map(|share| loan(share.bytes)).sum();
                let all: u64 = shares.iter().map(|share| share.bytes).sum::<u64>() + left_bytes;
                prop_assert_eq!(budget.lent.get(), loans + left_bytes);
                prop_assert!(all <= SHARED_BYTES + 6 * OWN_BYTES);
            }
        }
    }
}
