//! How streams, connections and endpoints end.

use super::*;

#[tokio::test]
async fn a_sender_that_is_dropped_gives_its_stream_up() {
    let pair = pair().await;
    let pool = BufferPool::new(0);
    let mut sender = pair.dialled.open_frames(&preamble(StreamKind::Live)).await.unwrap();
    send_frame(&mut sender, 1, 512).await;
    let (_, mut receiver) = accept_frames(&pair.accepted).await;
    receiver.receive(&pool).await.unwrap();
    drop(sender);
    assert!(matches!(receiver.receive(&pool).await, Err(ReceiveError::Abandoned(_))));
}

#[tokio::test]
async fn a_receiver_that_is_dropped_stops_its_sender() {
    let pair = pair().await;
    let mut sender = pair.dialled.open_frames(&preamble(StreamKind::Live)).await.unwrap();
    drop(accept_frames(&pair.accepted).await);
    let payload = payload(1, 4096);
    let head = header(1, 4096).encode(&payload);
    let error = loop {
        if let Err(error) = sender.send(&head, payload.clone()).await {
            break error;
        }
        tokio::task::yield_now().await;
    };
    assert!(matches!(error, SendError::Stopped(host) if host == pair.acceptor.id()), "{error:?}");
}

#[tokio::test]
async fn a_peer_that_stops_is_noticed_at_once_and_by_everybody() {
    let pair = pair().await;
    let (mut sender, mut receiver) = pair.dialled.open_control().await.unwrap();
    sender.send(&acknowledgement(1)).await.unwrap();
    let waiting = on_a_thread(move || async move { receiver.receive().await });
    pair.acceptor.close().await;
    let error = waiting.join().unwrap().unwrap_err();
    let ReceiveError::Lost(lost) = error else { panic!("{error:?}") };
    assert_eq!(lost.peer, pair.acceptor.id());
    assert!(matches!(lost.source, quinn::ConnectionError::ApplicationClosed(_)), "{lost:?}");
    assert!(matches!(sender.send(&acknowledgement(2)).await, Err(SendError::Lost(_))));
    assert!(matches!(pair.dialled.accept().await, Err(ReceiveError::Lost(_))));
    assert!(!pair.dialled.is_live());
    assert!(pair.acceptor.accept().await.is_none());
    let closed = pair.acceptor.connect(&[address_of(&pair.dialler)], pair.dialler.id()).await;
    assert!(matches!(closed, Err(ConnectError::ShuttingDown(_) | ConnectError::Unreachable { .. })));
}

#[tokio::test]
async fn an_endpoint_gives_its_port_back() {
    let Pair { dialler, acceptor, dialled, accepted } = pair().await;
    let address = acceptor.local_address();
    acceptor.close().await;
    drop((acceptor, accepted));
    Endpoint::bind(address, &HostKey::ephemeral().unwrap()).unwrap();
    dialled.closed().await;
    drop(dialler);
}

/// Passes datagrams on between one dialler and one acceptor until it is cut.
struct Link {
    address: SocketAddr,
    cut: Arc<AtomicBool>,
}

impl Link {
    fn to(acceptor: SocketAddr) -> Self {
        let socket = UdpSocket::bind(LOOPBACK).unwrap();
        let (address, cut) = (socket.local_addr().unwrap(), Arc::new(AtomicBool::new(false)));
        let is_cut = cut.clone();
        std::thread::spawn(move || {
            let (mut bytes, mut dialler) = (vec![0; 65_536], acceptor);
            while let Ok((length, from)) = socket.recv_from(&mut bytes) {
                if is_cut.load(Ordering::SeqCst) {
                    return;
                }
                let to = if from == acceptor {
                    dialler
                } else {
                    dialler = from;
                    acceptor
                };
                // What is too large for the way is lost, as on any link.
                let _ = socket.send_to(&bytes[..length], to);
            }
        });
        Self { address, cut }
    }
}

#[tokio::test]
async fn a_cut_link_is_noticed_at_both_ends() {
    let options = Options {
        keep_alive: Duration::from_millis(100),
        idle_timeout: Duration::from_millis(500),
        ..Options::default()
    };
    let (dialler, acceptor) = (endpoint(&options), endpoint(&options));
    let link = Link::to(acceptor.local_address());
    let dialled = dialler.connect(&[link.address.to_string()], acceptor.id()).await.unwrap();
    let accepted = acceptor.accept().await.unwrap();
    let (mut sender, _receiver) = dialled.open_control().await.unwrap();
    sender.send(&acknowledgement(1)).await.unwrap();
    let (_, mut receiver) = accept_control(&accepted).await;
    receiver.receive().await.unwrap();
    link.cut.store(true, Ordering::SeqCst);
    let error = receiver.receive().await.unwrap_err();
    let timed_out = |lost: &Lost| matches!(lost.source, quinn::ConnectionError::TimedOut);
    assert!(matches!(&error, ReceiveError::Lost(lost) if timed_out(lost)), "{error:?}");
    assert!(timed_out(&dialled.closed().await));
}
