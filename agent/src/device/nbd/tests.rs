//! A connection over a socket that takes and gives a few bytes at a time, against a plain model of the volume.

use super::connection::{Connection, Ended};
use super::negotiate::Agreed;
use super::{Accepted, Listener, listen_tcp};
use crate::buffer::BufferPool;
use crate::device::{Answer, Command, Geometry, Reply, Request, Volume};
use blockmirror_protocol::nbd::transmission::*;
use proptest::prelude::*;
use rustix::net::sockopt;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

const SIZE: usize = 256 << 10;

type Waiting = (Rc<dyn Reply>, u64, Answer);

/// Acts at once; answers when told to, in any order.
struct Plain {
    content: RefCell<Vec<u8>>,
    pool: BufferPool,
    waiting: RefCell<Vec<Waiting>>,
}

impl Plain {
    fn answer_one(&self, choice: usize) {
        let count = self.waiting.borrow().len();
        if count > 0 {
            let (reply, cookie, answer) = self.waiting.borrow_mut().swap_remove(choice % count);
            reply.complete(cookie, Ok(answer));
        }
    }
}

impl Volume for Plain {
    fn geometry(&self) -> Geometry {
        Geometry { size_bytes: SIZE as u64, read_only: false, preferred_bytes: 4096 }
    }

    fn submit(&self, request: Request) {
        let mut content = self.content.borrow_mut();
        let answer = match request.command {
            Command::Read(range) => {
                let mut buffer = self.pool.take(range.length as usize);
                buffer.copy_from_slice(&content[range.offset as usize..range.end() as usize]);
                Answer::Data(buffer)
            }
            Command::Write { offset, data, .. } => {
                content[offset as usize..offset as usize + data.len()].copy_from_slice(&data);
                Answer::Done
            }
            other => panic!("{other:?} was never asked for"),
        };
        self.waiting.borrow_mut().push((request.reply, request.cookie, answer));
    }
}

/// Gives and takes at most `steps[n]` bytes at the n-th call, and none where that is 0.
struct Choppy {
    input: Vec<u8>,
    given: usize,
    output: Rc<RefCell<Vec<u8>>>,
    steps: Vec<usize>,
    calls: Cell<usize>,
}

impl Choppy {
    fn step(&self) -> Poll<usize> {
        let call = self.calls.get();
        self.calls.set(call + 1);
        match self.steps[call % self.steps.len()] {
            0 => Poll::Pending,
            step => Poll::Ready(step),
        }
    }
}

impl AsyncRead for Choppy {
    fn poll_read(
        mut self: Pin<&mut Self>,
        _: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.step().map(|step| {
            let end = self.input.len().min(self.given + step.min(buf.remaining()));
            buf.put_slice(&self.input[self.given..end]);
            self.given = end;
            Ok(())
        })
    }
}

impl AsyncWrite for Choppy {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.step().map(|step| {
            let bytes: Vec<u8> = pieces.iter().flat_map(|piece| piece.iter().copied()).take(step).collect();
            self.output.borrow_mut().extend_from_slice(&bytes);
            Ok(bytes.len())
        })
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

/// What a client sends, and what the replies to its requests must be, by cookie.
#[derive(Default)]
struct Script {
    bytes: Vec<u8>,
    content: Vec<u8>,
    wanted: BTreeMap<u64, Result<Vec<u8>, Failure>>,
}

impl Script {
    fn new() -> Self {
        Self { content: vec![0; SIZE], ..Self::default() }
    }

    fn ask(&mut self, writes: bool, sector: usize, sectors: usize) {
        let cookie = self.wanted.len() as u64;
        let (offset, length) = (sector * 512, sectors * 512);
        let kind = if writes { CommandKind::Write } else { CommandKind::Read };
        let header = RequestHeader {
            flags: CommandFlags::NONE,
            kind,
            cookie,
            offset: offset as u64,
            length: length as u32,
        };
        self.bytes.extend_from_slice(&header.encode());
        let payload: Vec<u8> = (0..length).map(|index| (index / 512 + cookie as usize + 1) as u8).collect();
        let fits = offset + length <= SIZE && length > 0;
        let failure = if writes && length > 0 { Failure::NoSpace } else { Failure::Invalid };
        let wanted = match (writes, fits) {
            (true, true) => {
                self.content[offset..offset + length].copy_from_slice(&payload);
                Ok(Vec::new())
            }
            (false, true) => Ok(self.content[offset..offset + length].to_vec()),
            (_, false) => Err(failure),
        };
        if writes {
            self.bytes.extend_from_slice(&payload);
        }
        self.wanted.insert(cookie, wanted);
    }

    /// Takes the replies apart.
    fn understand(&self, mut bytes: &[u8], agreed: Agreed) -> BTreeMap<u64, Result<Vec<u8>, Failure>> {
        let mut understood = BTreeMap::new();
        while !bytes.is_empty() {
            let (cookie, reply) = if let Ok(simple) = SimpleReply::parse(bytes.first_chunk().unwrap()) {
                bytes = &bytes[SIMPLE_REPLY_BYTES..];
                let follows = match &self.wanted[&simple.cookie] {
                    Ok(data) if simple.failure.is_none() => data.len(),
                    _ => 0,
                };
                let data = bytes.split_off(..follows).unwrap().to_vec();
                (simple.cookie, simple.failure.map_or(Ok(data), Err))
            } else {
                assert!(agreed.structured, "chunks are only for those who asked for them");
                let header = ChunkHeader::parse(bytes.first_chunk().unwrap()).unwrap();
                bytes = &bytes[CHUNK_HEADER_BYTES..];
                let payload = bytes.split_off(..header.length as usize).unwrap();
                let reply = match Chunk::parse(header.kind, payload).unwrap() {
                    Chunk::Data { data, .. } => Ok(data),
                    Chunk::Error { failure, .. } => Err(failure),
                    other => panic!("{other:?} answers neither a read nor a write"),
                };
                (header.cookie, reply)
            };
            assert!(understood.insert(cookie, reply).is_none(), "request {cookie} was replied to twice");
        }
        understood
    }
}

struct Setup {
    volume: Rc<Plain>,
    output: Rc<RefCell<Vec<u8>>>,
    connection: Connection<Choppy>,
}

fn set_up(input: Vec<u8>, steps: Vec<usize>, agreed: Agreed) -> Setup {
    let pool = BufferPool::new(1 << 20);
    let volume = Rc::new(Plain {
        content: RefCell::new(vec![0; SIZE]),
        pool: pool.clone(),
        waiting: RefCell::default(),
    });
    let output = Rc::<RefCell<Vec<u8>>>::default();
    let socket = Choppy { input, given: 0, output: output.clone(), steps, calls: Cell::new(0) };
    let connection = Connection::new(socket, volume.clone(), pool, Rc::default(), agreed);
    Setup { volume, output, connection }
}

fn drive(connection: Connection<Choppy>, volume: &Plain, choices: &[usize]) -> Result<(), Ended> {
    // A connection with much under way has a timer.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    let _entered = runtime.enter();
    let mut connection = pin!(connection);
    let mut context = Context::from_waker(Waker::noop());
    for choice in choices.iter().cycle() {
        if let Poll::Ready(ended) = connection.as_mut().poll(&mut context) {
            return ended;
        }
        volume.answer_one(*choice);
    }
    unreachable!("a cycle does not end")
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_request_is_replied_to_once_however_the_bytes_come(
        requests in prop::collection::vec((any::<bool>(), 0usize..600, prop_oneof![0usize..16, 60usize..200]), 1..150),
        steps in prop::collection::vec(prop_oneof![Just(0usize), 1usize..64, 1000usize..200_000], 1..20),
        choices in prop::collection::vec(any::<usize>(), 1..10),
        structured in any::<bool>(),
    ) {
        prop_assume!(steps.iter().any(|step| *step >= 1000));
        let mut script = Script::new();
        for (writes, sector, sectors) in requests {
            script.ask(writes, sector, sectors);
        }
        let agreed = Agreed { structured, allocation: structured };
        let Setup { volume, output, connection } = set_up(script.bytes.clone(), steps, agreed);
        prop_assert!(drive(connection, &volume, &choices).is_ok());
        prop_assert!(*volume.content.borrow() == script.content, "the writes came out otherwise");
        let understood = script.understand(&output.borrow(), agreed);
        prop_assert!(understood == script.wanted, "the replies are other ones");
        prop_assert_eq!(Rc::strong_count(&volume), 1);
    }

    #[test]
    fn an_input_cut_off_anywhere_ends_the_connection_and_nothing_else(
        cut in any::<prop::sample::Index>(),
        steps in prop::collection::vec(prop_oneof![1usize..64, 1000usize..200_000], 1..20),
    ) {
        let mut script = Script::new();
        for request in 0..6 {
            script.ask(request % 2 == 0, request, 8 * request + 1);
        }
        script.ask(true, 0, 100);
        let cut = cut.index(script.bytes.len());
        let input = script.bytes[..cut].to_vec();
        let Setup { volume, connection, .. } = set_up(input, steps, Agreed::default());
        let ended = drive(connection, &volume, &[0]);
        prop_assert!(matches!(ended, Ok(()) | Err(Ended::Vanished)), "{ended:?}");
        for choice in 0..10 {
            volume.answer_one(choice);
        }
        prop_assert_eq!(Rc::strong_count(&volume), 1);
    }
}

#[test]
fn an_answer_that_comes_after_the_connections_end_is_dropped() {
    let mut script = Script::new();
    script.ask(false, 0, 8);
    script.ask(true, 8, 8);
    let Setup { volume, output, connection } =
        set_up(script.bytes, vec![1 << 20, 0, 0, 0], Agreed::default());
    let mut connection = Box::pin(connection);
    let mut context = Context::from_waker(Waker::noop());
    // The first goes on by itself.
    for submitted in [1, 2] {
        assert!(connection.as_mut().poll(&mut context).is_pending());
        assert_eq!(volume.waiting.borrow().len(), submitted);
    }
    volume.answer_one(0);
    drop(connection);
    volume.answer_one(0);
    assert!(output.borrow().is_empty());
    assert!(volume.waiting.borrow().is_empty());
}

#[test]
fn a_tcp_client_that_vanishes_is_noticed_by_the_kernel_within_a_minute() {
    // A client whose host had lost its power counted as a user of the volume for ever.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let (listener, address) = listen_tcp("127.0.0.1:0".parse().unwrap()).unwrap();
        let _client = std::net::TcpStream::connect(address).unwrap();
        let Accepted::Tcp(socket, _) = Listener::Tcp(listener).accept().await.unwrap() else {
            panic!("a client over TCP comes over TCP");
        };
        assert!(sockopt::socket_keepalive(&socket).unwrap());
        let idle = sockopt::tcp_keepidle(&socket).unwrap();
        let questions = sockopt::tcp_keepintvl(&socket).unwrap() * sockopt::tcp_keepcnt(&socket).unwrap();
        let unacknowledged = Duration::from_millis(sockopt::tcp_user_timeout(&socket).unwrap().into());
        assert_eq!([idle + questions, unacknowledged], [Duration::from_secs(60); 2]);
    });
}
