//! A connection with the export open: requests in, replies out, in any order.
//!
//! The connection is one future. Whenever the socket or the volume wakes it, it writes the replies that are there,
//! takes as many requests as one read brings, and submits each as soon as its last byte is here. There is no task and
//! no allocation per request, except the buffers that carry data.
//!
//! Bounds: while [`REQUEST_LIMIT`] requests, or [`BYTE_LIMIT`] bytes of payload and read data, are under way (from a
//! request's header to the last byte of its reply), no further request is begun, and the kernel's socket buffer fills
//! up instead. One request begun below the limit may exceed it, by at most 64 MiB. Nor is one begun that the memory of
//! all connections together has no room for (`budget`).
//!
//! When the connection ends early, the requests that the volume has keep their [`Replies`] alive until they are
//! answered; the answers go nowhere.

use super::budget::{Budget, LeftBehind, Share};
use super::input::{Input, poll_read};
use super::negotiate::Agreed;
use super::outgoing::{Frame, Outgoing};
use super::request::{Judged, judge};
use super::stall::Stall;
use crate::buffer::{self, Buffer, BufferPool};
use crate::busy_poll;
use crate::device::row::Row;
use crate::device::{Answer, Command, Errno, Geometry, Reply, Request, Volume};
use blockmirror_protocol::nbd::Malformed;
use blockmirror_protocol::nbd::transmission::{CommandKind, Failure, REQUEST_BYTES, RequestHeader};
use slab::Slab;
use std::cell::RefCell;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker, ready};
use tokio::io::{AsyncRead, AsyncWrite};

/// How many requests of one connection may be under way.
const REQUEST_LIMIT: usize = 128;

/// How many bytes of payload and read data of one connection may be under way before the next request must wait.
pub(super) const BYTE_LIMIT: u64 = 64 << 20;

/// From this length on a payload is read straight into its buffer. A shorter one is cheaper to copy than to fetch
/// with a system call of its own, which would bring no further request along.
const DIRECT_BYTES: usize = 32 << 10;

/// Why a connection ended before its time.
#[derive(Debug, thiserror::Error)]
pub(super) enum Ended {
    /// The client sent what the protocol does not allow.
    #[error("the client does not keep to the protocol")]
    Misbehaved(#[from] Malformed),
    /// The connection ended within a message.
    #[error("the client went away in the middle of a message")]
    Vanished,
    /// The client took too long to open the export.
    #[error("the client did not open the export in time")]
    TooSlow,
    /// Others waited for the memory of its requests for too long.
    #[error("the client neither took its answers nor sent on, and others wait for the memory of that")]
    Stalled,
    /// No TLS came about: the client has no certificate that is good here, or what it sent is no TLS.
    #[error("the client did not get through the tls handshake")]
    Handshake(#[source] io::Error),
    /// The socket failed.
    #[error("the socket failed")]
    Io(#[from] io::Error),
}

/// Drives a connection; see the module's documentation.
pub(super) struct Connection<S> {
    socket: S,
    volume: Rc<dyn Volume>,
    geometry: Geometry,
    pool: BufferPool,
    agreed: Agreed,
    input: Input,
    receiving: Receiving,
    /// The last request brought a payload that was long enough to be read by itself; the next one likely will, so
    /// its header is fetched alone.
    expects_long_payload: bool,
    submitted: Submitted,
    row: Row,
    replies: Rc<Replies>,
    answers: Vec<(u64, Result<Answer, Errno>)>,
    outgoing: Outgoing,
    memory: Share,
    stall: Stall,
    received_bytes: u64,
}

/// What the next bytes from the client are.
enum Receiving {
    /// A request's header.
    Header,
    /// Nothing yet: there is no memory for this request.
    Waiting(RequestHeader),
    /// The payload of a write, of which `filled` bytes are here.
    Payload { request: RequestHeader, fua: bool, buffer: Buffer, filled: usize },
    /// The payload of a write that fails; so many bytes are still to come.
    Discarded { cookie: u64, failure: Failure, remaining: u64 },
    /// Nothing: the client said that it leaves, or closed its half of the connection.
    Ended,
}

/// Why no further request can be taken right now.
#[derive(PartialEq, Eq)]
enum Stuck {
    /// The next message is not whole yet.
    WantsInput,
    /// Those that were taken are to go on first.
    RowComplete,
    /// Others must be finished first.
    AtLimit,
    /// There will be none.
    Ended,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Connection<S> {
    pub(super) fn new(
        socket: S,
        volume: Rc<dyn Volume>,
        pool: BufferPool,
        budget: Rc<Budget>,
        agreed: Agreed,
    ) -> Self {
        Self {
            socket,
            geometry: volume.geometry(),
            volume,
            pool,
            agreed,
            input: Input::new(),
            receiving: Receiving::Header,
            expects_long_payload: false,
            submitted: Submitted::default(),
            row: Row::first(),
            replies: Rc::default(),
            answers: Vec::new(),
            outgoing: Outgoing::default(),
            memory: Share::new(budget),
            stall: Stall::default(),
            received_bytes: 0,
        }
    }

    /// Turns the volume's new answers into replies to be written.
    fn collect_answers(&mut self) {
        std::mem::swap(&mut self.answers, &mut self.replies.answers.borrow_mut());
        for (key, answer) in self.answers.drain(..) {
            let request = self.submitted.remove(key);
            let frame = Frame::answering(&request, self.agreed, answer);
            self.outgoing.push(frame.holding(memory_bytes(&request)));
        }
    }

    /// Takes from the input as many requests as it has and the limits allow.
    fn take_requests(&mut self, waker: &Waker) -> Result<Stuck, Malformed> {
        loop {
            match &mut self.receiving {
                Receiving::Ended => return Ok(Stuck::Ended),
                Receiving::Header => {
                    if self.is_at_limit() {
                        return Ok(Stuck::AtLimit);
                    }
                    if self.row.is_complete() {
                        return Ok(Stuck::RowComplete);
                    }
                    let Some(header) = self.input.take_array::<REQUEST_BYTES>() else {
                        return Ok(Stuck::WantsInput);
                    };
                    self.judge(RequestHeader::parse(&header)?, waker);
                }
                Receiving::Waiting(request) => {
                    let request = *request;
                    self.receiving = Receiving::Header;
                    self.judge(request, waker);
                    if matches!(self.receiving, Receiving::Waiting(_)) {
                        return Ok(Stuck::AtLimit);
                    }
                }
                Receiving::Payload { buffer, filled, .. } => {
                    let here = self.input.take(buffer.len() - *filled);
                    buffer[*filled..*filled + here.len()].copy_from_slice(here);
                    *filled += here.len();
                    if *filled < buffer.len() {
                        return Ok(Stuck::WantsInput);
                    }
                    self.end_payload();
                }
                Receiving::Discarded { cookie, failure, remaining } => {
                    let limit = usize::try_from(*remaining).unwrap_or(usize::MAX);
                    *remaining -= self.input.take(limit).len() as u64;
                    if *remaining > 0 {
                        return Ok(Stuck::WantsInput);
                    }
                    self.outgoing.push(Frame::failed(*cookie, self.agreed, *failure));
                    self.receiving = Receiving::Header;
                }
            }
        }
    }

    fn is_at_limit(&self) -> bool {
        self.submitted.count() + self.outgoing.len() >= REQUEST_LIMIT || self.memory.bytes() >= BYTE_LIMIT
    }

    /// Gives back the memory of replies that are written.
    fn settle(&mut self) {
        let receives = match &self.receiving {
            Receiving::Payload { request, .. } => memory_bytes(request),
            _ => 0,
        };
        self.memory.shrink_to(receives + self.submitted.bytes + self.outgoing.memory_bytes());
    }

    /// Acts on a request's header.
    fn judge(&mut self, request: RequestHeader, waker: &Waker) {
        let judged = judge(&request, &self.geometry, self.agreed);
        let needs_memory = matches!(judged, Judged::Submit(_) | Judged::Receive { .. });
        if needs_memory && !self.memory.admit(memory_bytes(&request), waker) {
            self.receiving = Receiving::Waiting(request);
            return;
        }
        self.begin(request, judged);
    }

    fn begin(&mut self, request: RequestHeader, judged: Judged) {
        let brings_payload = request.kind == CommandKind::Write;
        self.expects_long_payload = brings_payload && request.length as usize >= DIRECT_BYTES;
        match judged {
            Judged::Submit(command) => self.submit(request, command),
            Judged::Receive { range, fua } => {
                let buffer = self.pool.take(range.length as usize);
                self.receiving = Receiving::Payload { request, fua, buffer, filled: 0 };
            }
            Judged::Nothing => self.outgoing.push(Frame::succeeded(request.cookie)),
            Judged::Disconnect => self.receiving = Receiving::Ended,
            Judged::Refuse(failure) if brings_payload => {
                let remaining = u64::from(request.length);
                self.receiving = Receiving::Discarded { cookie: request.cookie, failure, remaining };
            }
            Judged::Refuse(failure) => {
                self.outgoing.push(Frame::failed(request.cookie, self.agreed, failure));
            }
        }
    }

    /// Submits the write whose payload is complete.
    fn end_payload(&mut self) {
        let received = std::mem::replace(&mut self.receiving, Receiving::Header);
        let Receiving::Payload { request, fua, buffer, .. } = received else {
            unreachable!("a payload ends only where one was received")
        };
        self.submit(request, Command::Write { offset: request.offset, data: buffer.freeze(), fua });
    }

    fn submit(&mut self, request: RequestHeader, command: Command) {
        self.row.take();
        let cookie = self.submitted.insert(request);
        self.volume.submit(Request { command, reply: self.replies.clone(), cookie });
    }

    /// Reads once from the socket. Called when the input holds no whole message.
    fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Ended>> {
        let count = match &mut self.receiving {
            Receiving::Payload { buffer, filled, .. } if buffer.len() - *filled >= DIRECT_BYTES => {
                let count = ready!(poll_read(&mut self.socket, cx, &mut buffer[*filled..]))?;
                *filled += count;
                count
            }
            Receiving::Header if self.expects_long_payload => {
                let missing = REQUEST_BYTES - self.input.len();
                ready!(self.input.poll_fill(&mut self.socket, cx, missing))?
            }
            _ => ready!(self.input.poll_fill(&mut self.socket, cx, usize::MAX))?,
        };
        busy_poll::note_event();
        self.received_bytes += count as u64;
        if count == 0 {
            let between_requests = matches!(self.receiving, Receiving::Header) && self.input.is_empty();
            if !between_requests {
                return Poll::Ready(Err(Ended::Vanished));
            }
            self.receiving = Receiving::Ended;
        }
        Poll::Ready(Ok(()))
    }

    /// Ready when the client has to go, because it keeps others waiting.
    fn poll_stalled(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let is_its_turn = !self.outgoing.is_empty() || matches!(self.receiving, Receiving::Payload { .. });
        if !self.memory.has_loan() || !is_its_turn {
            return Poll::Pending;
        }
        let moved_bytes = self.received_bytes + self.outgoing.sent_bytes();
        self.stall.poll(cx, moved_bytes, self.memory.is_wanted())
    }

    /// Sends, takes and receives all that goes.
    fn poll_requests(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Ended>> {
        loop {
            self.collect_answers();
            let sent = self.outgoing.poll_send(&mut self.socket, cx)?.is_ready();
            self.settle();
            let stuck = self.take_requests(cx.waker())?;
            if sent && !self.outgoing.is_empty() {
                continue;
            }
            match stuck {
                Stuck::WantsInput => {
                    let received = self.poll_receive(cx);
                    if received.is_pending() {
                        self.row = Row::first();
                    }
                    ready!(received)?;
                }
                Stuck::RowComplete => {
                    // The storage, which was woken before, has its turn first.
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
                Stuck::Ended if sent && self.submitted.count() == 0 => {
                    // The client has left, so it does not matter what becomes of the goodbye.
                    let _ = ready!(Pin::new(&mut self.socket).poll_shutdown(cx));
                    return Poll::Ready(Ok(()));
                }
                Stuck::Ended | Stuck::AtLimit => return Poll::Pending,
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> Future for Connection<S> {
    type Output = Result<(), Ended>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let connection = self.get_mut();
        connection.replies.wake_by(cx.waker());
        connection.row.next();
        let ended = connection.poll_requests(cx);
        if ended.is_pending() && connection.poll_stalled(cx).is_ready() {
            return Poll::Ready(Err(Ended::Stalled));
        }
        ended
    }
}

impl<S> Drop for Connection<S> {
    fn drop(&mut self) {
        self.replies.close(self.memory.leave_behind(self.submitted.bytes));
    }
}

/// The requests that the volume has, each under the key that the volume knows it by.
#[derive(Default)]
struct Submitted {
    requests: Slab<RequestHeader>,
    bytes: u64,
}

impl Submitted {
    fn insert(&mut self, request: RequestHeader) -> u64 {
        self.bytes += memory_bytes(&request);
        self.requests.insert(request) as u64
    }

    /// Takes a request out that the volume has answered, which it does once.
    fn remove(&mut self, key: u64) -> RequestHeader {
        let request = self.requests.remove(key as usize);
        self.bytes -= memory_bytes(&request);
        request
    }

    fn count(&self) -> usize {
        self.requests.len()
    }
}

/// How much memory a request needs that was not refused, in bytes: that of its data, and a little in any case.
pub(super) fn memory_bytes(request: &RequestHeader) -> u64 {
    let moves_data = matches!(request.kind, CommandKind::Read | CommandKind::Write);
    let data = if moves_data { request.length as usize } else { 0 };
    buffer::capacity_for(data) as u64
}

/// Where the volume leaves its answers for the connection.
#[derive(Default)]
struct Replies {
    answers: RefCell<Vec<(u64, Result<Answer, Errno>)>>,
    waker: RefCell<Option<Waker>>,
    /// Set when nobody is left to read the answers.
    closed: RefCell<Option<LeftBehind>>,
}

impl Replies {
    fn wake_by(&self, waker: &Waker) {
        let mut kept = self.waker.borrow_mut();
        if !kept.as_ref().is_some_and(|kept| kept.will_wake(waker)) {
            *kept = Some(waker.clone());
        }
    }

    /// Nobody is left to read the answers. The requests that the volume has keep `memory` until the last is answered.
    fn close(&self, memory: LeftBehind) {
        *self.closed.borrow_mut() = Some(memory);
        self.waker.take();
        self.answers.take();
    }
}

impl Reply for Replies {
    fn complete(&self, cookie: u64, answer: Result<Answer, Errno>) {
        if self.closed.borrow().is_some() {
            return;
        }
        let mut answers = self.answers.borrow_mut();
        answers.push((cookie, answer));
        if answers.len() == 1
            && let Some(waker) = self.waker.borrow().as_ref()
        {
            waker.wake_by_ref();
        }
    }
}
