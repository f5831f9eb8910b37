//! Strangers who begin handshakes and don't go on.

use super::*;
use std::collections::HashSet;
use std::sync::atomic::AtomicUsize;
use tokio::net::UdpSocket;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::task::JoinSet;

/// Longer than any test.
const LONG: Duration = Duration::from_secs(600);

/// Whether a packet asks whoever dials to prove its address (RFC 9000, 17.2.5).
fn is_retry(packet: &[u8]) -> bool {
    packet[0] & 0xf0 == 0xf0
}

/// Hands packets of one handshake on, from an address of its own, until its address is proved and something is answered:
/// then it is under way, or refused, and nothing goes on.
async fn begin_and_stall(from: String, to: SocketAddr, front: UdpSocket, answered: UnboundedSender<()>) {
    let back = UdpSocket::bind(from).await.unwrap();
    back.connect(to).await.unwrap();
    let (mut one, mut other) = ([0; 2048], [0; 2048]);
    let mut dialler = None;
    loop {
        tokio::select! {
            received = front.recv_from(&mut one) => {
                let (length, address) = received.unwrap();
                dialler = Some(address);
                back.send(&one[..length]).await.unwrap();
            }
            received = back.recv(&mut other) => {
                let packet = &other[..received.unwrap()];
                if is_retry(packet) {
                    front.send_to(packet, dialler.expect("it has dialled")).await.unwrap();
                } else {
                    answered.send(()).unwrap();
                    return std::future::pending().await;
                }
            }
        }
    }
}

/// As many handshakes with a host as it takes at all are begun by strangers, and stall.
async fn stall(acceptor: &Endpoint, options: &Options) -> JoinSet<()> {
    let stranger = endpoint(options);
    let (answered, mut answers) = unbounded_channel();
    let mut stalled = JoinSet::new();
    // One network after the other, more than there is room for in all.
    for number in 0..160 {
        let front = UdpSocket::bind(LOOPBACK).await.unwrap();
        let addresses = [front.local_addr().unwrap().to_string()];
        let from = format!("127.0.0.{}:0", 2 + number / 16);
        stalled.spawn(begin_and_stall(from, acceptor.local_address(), front, answered.clone()));
        let (stranger, id) = (stranger.clone(), acceptor.id());
        stalled.spawn(async move { drop(stranger.connect(&addresses, id).await) });
        answers.recv().await.unwrap();
    }
    stalled
}

fn patient() -> Options {
    Options { idle_timeout: LONG, connect_timeout: LONG, ..Options::default() }
}

async fn assert_connects(member: &Endpoint, acceptor: &Endpoint) {
    let connection = member.connect(&[address_of(acceptor)], acceptor.id()).await.unwrap();
    assert_eq!(connection.peer(), acceptor.id());
    assert_eq!(acceptor.accept().await.unwrap().peer(), member.id());
}

#[tokio::test]
async fn a_known_host_connects_while_strangers_stall_as_many_handshakes_as_there_are() {
    let (acceptor, member) = (endpoint(&patient()), endpoint(&Options::default()));
    acceptor.keep_room_for([(member.id(), HashSet::from([[127, 0, 0, 1].into()]))].into());
    let _stalled = stall(&acceptor, &patient()).await;
    assert_connects(&member, &acceptor).await;
}

/// A host that is known by name shared the room for strangers.
#[tokio::test]
async fn a_host_that_was_dialled_by_name_connects_as_one_that_is_known_by_its_address() {
    let (acceptor, member) = (endpoint(&patient()), endpoint(&Options::default()));
    acceptor.keep_room_for([(member.id(), HashSet::new())].into());
    let name = format!("localhost:{}", member.local_address().port());
    let dialled = acceptor.connect(&[name], member.id()).await.unwrap();
    assert_eq!(member.accept().await.unwrap().peer(), acceptor.id());
    dialled.close(CloseReason::Done, "it goes away for a while");
    let _stalled = stall(&acceptor, &patient()).await;
    assert_connects(&member, &acceptor).await;
}

/// Anybody can make a key, and connect as often as there are places. What such a host sends and nobody reads has little room
/// until it is known who it is.
#[tokio::test]
async fn what_a_stranger_sends_unread_is_bounded_until_it_is_known() {
    let (dialler, acceptor) = (endpoint(&Options::default()), endpoint(&Options::default()));
    let dialled = dialler.connect(&[address_of(&acceptor)], acceptor.id()).await.unwrap();
    let accepted = acceptor.accept().await.unwrap();
    let sent = Arc::new(AtomicUsize::new(0));
    let mut writing = JoinSet::new();
    for _ in 0..settings::STRANGER_STREAMS {
        let (mut stream, sent) = (dialled.quic.open_uni().await.unwrap(), sent.clone());
        writing.spawn(async move {
            while let Ok(bytes) = stream.write(&[7; 4096]).await {
                sent.fetch_add(bytes, Ordering::Relaxed);
            }
        });
    }
    let bound = settings::STRANGER_WINDOW_BYTES as usize;
    while sent.load(Ordering::Relaxed) < bound {
        tokio::task::yield_now().await;
    }
    // More room would have been given with this.
    let mut there = accepted.quic.open_uni().await.unwrap();
    there.write_all(b"a round trip").await.unwrap();
    there.finish().unwrap();
    let mut here = dialled.quic.accept_uni().await.unwrap();
    assert_eq!(here.read_to_end(100).await.unwrap(), b"a round trip");
    assert_eq!(sent.load(Ordering::Relaxed), bound);
    accepted.trust(0);
    while sent.load(Ordering::Relaxed) == bound {
        tokio::task::yield_now().await;
    }
    // And streams beyond those of a stranger.
    dialled.quic.open_uni().await.unwrap();
}
