//! Who is reached, and how.

use super::*;

#[tokio::test]
async fn both_hosts_know_whom_they_talk_to() {
    let pair = pair().await;
    assert_eq!(pair.dialled.peer(), pair.acceptor.id());
    assert_eq!(pair.accepted.peer(), pair.dialler.id());
    assert_eq!(pair.dialled.remote_address(), pair.acceptor.local_address());
    assert_eq!(pair.accepted.remote_address(), pair.dialler.local_address());
    assert!(pair.dialled.is_live() && pair.accepted.is_live());
}

#[tokio::test]
async fn a_host_with_another_key_is_refused_by_name() {
    let (dialler, acceptor) = (endpoint(&Options::default()), endpoint(&Options::default()));
    let expected = HostId([1; 32]);
    let error = dialler.connect(&[address_of(&acceptor)], expected).await.unwrap_err();
    let text = error.to_string();
    assert!(text.contains(&expected.to_string()) && text.contains(&acceptor.id().to_string()), "{text}");
    let ConnectError::WrongKey { address, found, .. } = error else { panic!("{error:?}") };
    assert_eq!((address, found), (acceptor.local_address(), acceptor.id()));
}

#[tokio::test]
async fn a_host_is_reached_over_whichever_address_answers() {
    let silent = UdpSocket::bind(LOOPBACK).unwrap();
    let (dialler, acceptor) = (endpoint(&Options::default()), endpoint(&Options::default()));
    let stranger = endpoint(&Options::default());
    let addresses = [
        silent.local_addr().unwrap().to_string(),
        "no.such.host.invalid:1".into(),
        address_of(&stranger),
        address_of(&acceptor),
    ];
    let connection = dialler.connect(&addresses, acceptor.id()).await.unwrap();
    assert_eq!(connection.peer(), acceptor.id());
}

/// Two hosts with a bridge for containers have one address in common; the other's token names it, and this host answers.
#[tokio::test]
async fn an_address_that_is_ones_own_is_passed_over() {
    let (dialler, acceptor) = (endpoint(&Options::default()), endpoint(&Options::default()));
    let own = address_of(&dialler);
    let connection = dialler.connect(&[own.clone(), address_of(&acceptor)], acceptor.id()).await.unwrap();
    assert_eq!(connection.peer(), acceptor.id());
    let error = dialler.connect(std::slice::from_ref(&own), acceptor.id()).await.unwrap_err();
    assert!(matches!(error, ConnectError::Unreachable { .. }), "{error:?}");
    assert!(error.to_string().contains(&format!("{own}: that address is this host's own")), "{error}");
}

/// The first address of a host that had moved cost each dial its head start, for ever.
#[tokio::test]
async fn the_address_that_answered_last_is_tried_first() {
    let silent = UdpSocket::bind(LOOPBACK).unwrap();
    let (dialler, acceptor) = (endpoint(&Options::default()), endpoint(&Options::default()));
    let (host, there) = (acceptor.id(), acceptor.local_address());
    let peers = Peers::new(dialler, Limit::default());
    let mut opened = peers.opened();
    let addresses = [silent.local_addr().unwrap().to_string(), address_of(&acceptor)];
    let connection = peers.connection_to(host, &addresses).await.unwrap();
    assert_eq!(opened.recv().await, Ok(host));
    assert_eq!((peers.answered(host), peers.live(host).is_some()), (Some(there), true));
    connection.close(CloseReason::Done, "again");
    assert_eq!((peers.answered(host), peers.live(host).is_some()), (Some(there), false));
    let [a, b] = [silent.local_addr().unwrap(), there];
    for (first, order) in
        [(None, [a, b]), (Some(a), [a, b]), (Some(b), [b, a]), (Some("192.0.2.1:1".parse().unwrap()), [a, b])]
    {
        assert_eq!(dial::in_order(vec![a, b], first), order);
    }
}

#[tokio::test]
async fn a_dial_of_addresses_that_are_not_known_any_more_keeps_nobody_waiting() {
    let silent = UdpSocket::bind(LOOPBACK).unwrap();
    let patient = Options { connect_timeout: Duration::from_secs(3600), ..Options::default() };
    let (dialler, acceptor) = (endpoint(&patient), endpoint(&Options::default()));
    let peers = Peers::new(dialler, Limit::default());
    let old = [silent.local_addr().unwrap().to_string()];
    let mut waiting = std::pin::pin!(peers.connection_to(acceptor.id(), &old));
    assert!(futures_are_pending(waiting.as_mut()).await);
    peers.connection_to(acceptor.id(), &[address_of(&acceptor)]).await.unwrap();
}

/// Polls a future once.
async fn futures_are_pending<F: Future>(mut future: std::pin::Pin<&mut F>) -> bool {
    std::future::poll_fn(|context| std::task::Poll::Ready(future.as_mut().poll(context).is_pending())).await
}

#[tokio::test]
async fn a_host_that_cannot_be_reached_is_reported_with_each_address() {
    let silent = UdpSocket::bind(LOOPBACK).unwrap();
    let address = silent.local_addr().unwrap().to_string();
    let dialler = endpoint(&Options { connect_timeout: Duration::from_millis(300), ..Options::default() });
    let host = HostId([1; 32]);
    assert!(matches!(dialler.connect(&[], host).await, Err(ConnectError::NoAddress(_))));
    let error = dialler.connect(&[address.clone(), "no address".into()], host).await.unwrap_err();
    let text = error.to_string();
    let ConnectError::Unreachable { attempts, .. } = error else { panic!("{error:?}") };
    assert_eq!(attempts.len(), 2, "{attempts:?}");
    assert!(text.contains(&address) && text.contains("no address"), "{text}");
}

#[tokio::test]
async fn a_port_in_use_is_named() {
    let first = endpoint(&Options::default());
    let error = Endpoint::bind(first.local_address(), &HostKey::ephemeral().unwrap()).unwrap_err();
    assert!(matches!(error, BindError::InUse(address) if address == first.local_address()), "{error:?}");
}

#[tokio::test]
async fn one_endpoint_on_the_unspecified_address_serves_both_families() {
    let key = HostKey::ephemeral().unwrap();
    let acceptor = Endpoint::bind("[::]:0".parse().unwrap(), &key).unwrap();
    if acceptor.local_address().is_ipv4() {
        eprintln!("skipped: this host has no IPv6");
        return;
    }
    let port = acceptor.local_address().port();
    for (from, to) in [("127.0.0.1:0", format!("127.0.0.1:{port}")), ("[::]:0", format!("[::1]:{port}"))] {
        let dialler = Endpoint::bind(from.parse().unwrap(), &HostKey::ephemeral().unwrap()).unwrap();
        let connection = dialler.connect(std::slice::from_ref(&to), key.id()).await.unwrap();
        assert_eq!(connection.remote_address(), to.parse::<SocketAddr>().unwrap());
        let accepted = acceptor.accept().await.unwrap();
        assert_eq!(accepted.remote_address().is_ipv4(), to.starts_with("127"));
    }
}

#[tokio::test]
async fn one_guest_at_a_time_lives_on_the_transports_thread() {
    let refusal = || Message::from(Refused { refusal: Refusal::Token, text: "a guest speaks".to_owned() });
    let Pair { dialler, acceptor: _kept, dialled, accepted } = pair().await;
    let place = dialler.place().expect("nobody is there");
    assert!(dialler.place().is_none());
    let (told, tells) = tokio::sync::oneshot::channel();
    // The connection outlives the guest.
    let connection = dialled.clone();
    place.host(move || {
        Box::pin(async move {
            let (mut sender, _receiver) = connection.open_control().await.unwrap();
            sender.send(&refusal()).await.unwrap();
            sender.finish().await.unwrap();
            let local = tokio::task::spawn_local(async { std::thread::current().name().map(str::to_owned) });
            told.send(local.await.unwrap()).unwrap();
        })
    });
    assert_eq!(tells.await.unwrap().as_deref(), Some("transport"));
    let Ok(Incoming::Control(_, mut receiver)) = accepted.accept().await else { panic!("a stream came") };
    assert_eq!(receiver.receive().await.unwrap(), refusal());
    let freed = async {
        while dialler.place().is_none() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), freed)
        .await
        .expect("the place is free when the guest is gone");

    // Whoever doesn't use the place leaves it.
    drop(dialler.place().expect("it is free"));
    assert!(dialler.place().is_some());
}

#[tokio::test]
async fn volumes_that_want_the_same_host_share_one_dial_and_its_successor() {
    let (dialler, acceptor) = (endpoint(&Options::default()), endpoint(&Options::default()));
    let peers = Peers::new(dialler, Limit::default());
    let (host, addresses) = (acceptor.id(), [address_of(&acceptor)]);
    let (first, second) =
        tokio::join!(peers.connection_to(host, &addresses), peers.connection_to(host, &addresses));
    let (first, second) = (first.unwrap(), second.unwrap());
    assert_eq!(first.quic.stable_id(), second.quic.stable_id());
    let accepted = acceptor.accept().await.unwrap();
    accepted.close(CloseReason::Refused, "not now");
    first.closed().await;
    let third = peers.connection_to(host, &addresses).await.unwrap();
    assert!(third.is_live());
    acceptor.accept().await.unwrap();
    peers.disconnect(host);
    assert!(!third.is_live());
}

/// A host that had started again answered the first question with a reset, and the command that asked had failed.
#[tokio::test]
async fn a_question_whose_connection_turns_out_to_be_lost_is_put_on_a_new_one() {
    let (dialler, acceptor) = (endpoint(&Options::default()), endpoint(&Options::default()));
    let peers = Peers::new(dialler, Limit::default());
    let (host, addresses) = (acceptor.id(), [address_of(&acceptor)]);
    let message = |text: &str| Message::from(Refused { refusal: Refusal::Token, text: text.to_owned() });
    let question = message("question");
    let asked = peers.ask(host, &addresses, &question);
    let answered = async {
        for round in 0..2 {
            let accepted = acceptor.accept().await.unwrap();
            let Ok(Incoming::Control(mut sender, mut receiver)) = accepted.accept().await else {
                panic!("a stream came")
            };
            assert_eq!(receiver.receive().await.unwrap(), question);
            match round {
                0 => accepted.close(CloseReason::Done, "it is killed"),
                _ => sender.send(&message("answer")).await.unwrap(),
            }
            // It stays until the other side is done with it.
            accepted.closed().await;
        }
    };
    tokio::select! {
        biased;
        said = asked => assert_eq!(said.unwrap().1, message("answer")),
        () = answered => panic!("the question was not answered"),
    }
}

#[tokio::test]
async fn a_failed_dial_is_shared_and_tried_again_when_asked() {
    let silent = UdpSocket::bind(LOOPBACK).unwrap();
    let dialler = endpoint(&Options { connect_timeout: Duration::from_millis(300), ..Options::default() });
    let peers = Peers::new(dialler, Limit::default());
    let acceptor = endpoint(&Options::default());
    let dead = [silent.local_addr().unwrap().to_string()];
    let (first, second) =
        tokio::join!(peers.connection_to(acceptor.id(), &dead), peers.connection_to(acceptor.id(), &dead));
    assert!(Arc::ptr_eq(&first.unwrap_err(), &second.unwrap_err()));
    peers.connection_to(acceptor.id(), &[address_of(&acceptor)]).await.unwrap();
}
