//! Two endpoints in one process, talking over the loopback interface.

mod endings;
mod misbehaviour;
mod reaching;
mod stalls;
mod streams;

use super::*;
use crate::buffer::{ALIGNMENT, BufferPool};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::{Epoch, HostId, Sequence, Session, Stream, VolumeId};
use blockmirror_protocol::wire::message::{Acknowledgement, Message, MessageError, Refusal, Refused};
use blockmirror_protocol::wire::preamble::PreambleError;
use blockmirror_protocol::wire::{Body, FrameError, FrameHeader, HEADER_BYTES, StreamKind, StreamPreamble};
use bytes::Bytes;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

const LOOPBACK: &str = "127.0.0.1:0";

/// Two endpoints and a connection between them.
struct Pair {
    dialler: Endpoint,
    acceptor: Endpoint,
    dialled: Connection,
    accepted: Connection,
}

fn endpoint(options: &Options) -> Endpoint {
    Endpoint::bind_with(LOOPBACK.parse().unwrap(), &HostKey::ephemeral().unwrap(), options).unwrap()
}

fn address_of(endpoint: &Endpoint) -> String {
    endpoint.local_address().to_string()
}

async fn pair_with(options: &Options) -> Pair {
    let (dialler, acceptor) = (endpoint(options), endpoint(options));
    let addresses = [address_of(&acceptor)];
    let dialled = dialler.connect(&addresses, acceptor.id()).await.unwrap();
    let accepted = acceptor.accept().await.unwrap();
    accepted.trust(0);
    Pair { dialler, acceptor, dialled, accepted }
}

async fn pair() -> Pair {
    pair_with(&Options::default()).await
}

fn preamble(kind: StreamKind) -> StreamPreamble {
    StreamPreamble { volume: VolumeId([5; 16]), session: Session(7), kind }
}

fn header(sequence: u64, length: usize) -> FrameHeader {
    let range = ByteRange::new(sequence << 20, length as u64);
    let body = Body::Write { range, epoch: Epoch(1), sequence: Sequence(sequence) };
    FrameHeader { session: Session(7), stream: Stream(1), body }
}

fn epoch_end() -> FrameHeader {
    let body = Body::EpochEnd { epoch: Epoch(1), sequence: Sequence(9), cut: false };
    FrameHeader { session: Session(7), stream: Stream(1), body }
}

fn payload(sequence: u64, length: usize) -> Bytes {
    (0..length).map(|at| (at as u64 ^ at as u64 >> 9 ^ sequence) as u8).collect::<Vec<_>>().into()
}

fn acknowledgement(received: u64) -> Message {
    Acknowledgement { received: Sequence(received), ..Acknowledgement::default() }.into()
}

async fn send_frame(sender: &mut FrameSender, sequence: u64, length: usize) {
    let payload = payload(sequence, length);
    sender.send(&header(sequence, length).encode(&payload), payload).await.unwrap();
}

async fn accept_frames(connection: &Connection) -> (StreamPreamble, FrameReceiver) {
    match connection.accept().await.unwrap() {
        Incoming::Frames(preamble, receiver) => (preamble, receiver),
        Incoming::Control(..) => panic!("a stream of frames was expected"),
    }
}

async fn accept_control(connection: &Connection) -> (ControlSender, ControlReceiver) {
    match connection.accept().await.unwrap() {
        Incoming::Control(sender, receiver) => (sender, receiver),
        Incoming::Frames(..) => panic!("a control stream was expected"),
    }
}

/// A stream that the peer opens by hand, to misbehave on.
async fn misbehave_on_a_one_way_stream(connection: &Connection, bytes: &[u8]) {
    let mut stream = connection.quic.open_uni().await.unwrap();
    stream.write_all(bytes).await.unwrap();
    stream.finish().unwrap();
}

/// Runs `work` on a thread with a runtime of its own, as a volume does.
fn on_a_thread<T: Send + 'static, F: Future<Output = T>>(
    work: impl FnOnce() -> F + Send + 'static,
) -> std::thread::JoinHandle<T> {
    std::thread::spawn(move || {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work())
    })
}
