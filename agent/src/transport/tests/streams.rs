//! What streams carry.

use super::*;

#[tokio::test]
async fn messages_go_both_ways_and_a_last_one_arrives_before_the_end() {
    let pair = pair().await;
    let (mut sender, mut receiver) = pair.dialled.open_control().await.unwrap();
    sender.send(&acknowledgement(1)).await.unwrap();
    let (mut answering, mut asking) = accept_control(&pair.accepted).await;
    assert_eq!(asking.receive().await.unwrap(), acknowledgement(1));
    let refused = Message::from(Refused { refusal: Refusal::Token, text: "x".repeat(200_000) });
    let finishing = tokio::spawn(async move {
        answering.send(&acknowledgement(2)).await.unwrap();
        answering.send(&refused).await.unwrap();
        answering.finish().await
    });
    assert_eq!(receiver.receive().await.unwrap(), acknowledgement(2));
    let Message::Refused(refused) = receiver.receive().await.unwrap() else { panic!("another message") };
    assert_eq!(refused.text.len(), 200_000);
    assert!(matches!(receiver.receive().await, Err(ReceiveError::Ended(host)) if host == pair.acceptor.id()));
    finishing.await.unwrap().unwrap();
}

#[tokio::test]
async fn a_hundred_megabytes_of_frames_arrive_whole_on_another_thread() {
    const FRAMES: u64 = 100;
    let pair = pair().await;
    let connection = pair.dialled.clone();
    let sending = on_a_thread(move || async move {
        let mut sender = connection.open_frames(&preamble(StreamKind::Live)).await.unwrap();
        for sequence in 0..FRAMES {
            send_frame(&mut sender, sequence, 1 << 20).await;
        }
        sender.finish().await.unwrap();
    });
    let connection = pair.accepted.clone();
    let receiving = on_a_thread(move || async move {
        let pool = BufferPool::new(4 << 20);
        let (found, mut receiver) = accept_frames(&connection).await;
        assert_eq!(found, preamble(StreamKind::Live));
        for sequence in 0..FRAMES {
            let (found, bytes) = receiver.receive(&pool).await.unwrap();
            assert_eq!(found, header(sequence, 1 << 20));
            assert_eq!(bytes.as_ptr() as usize % ALIGNMENT, 0);
            assert!(bytes == payload(sequence, 1 << 20), "frame {sequence} differs");
        }
        assert!(matches!(receiver.receive(&pool).await, Err(ReceiveError::Ended(_))));
    });
    receiving.join().unwrap();
    sending.join().unwrap();
}

#[tokio::test]
async fn large_packets_are_bundled_without_loss() {
    // Little enough under way that no socket buffer overflows, whoever else is busy on this machine.
    let options = Options { stream_window_bytes: 1 << 20, ..Options::default() };
    let pair = pair_with(&options).await;
    let connection = pair.accepted.clone();
    let receiving = on_a_thread(move || async move {
        let pool = BufferPool::new(4 << 20);
        let (_, mut receiver) = accept_frames(&connection).await;
        while receiver.receive(&pool).await.is_ok() {}
    });
    let mut sender = pair.dialled.open_frames(&preamble(StreamKind::Bulk)).await.unwrap();
    let mut after_growth = 0;
    for sequence in 0..4096 {
        send_frame(&mut sender, sequence, 256 << 10).await;
        after_growth += u32::from(pair.dialled.statistics().packet_bytes > 6550);
        if after_growth == 64 {
            break;
        }
    }
    sender.finish().await.unwrap();
    receiving.join().unwrap();
    let statistics = pair.dialled.statistics();
    assert_eq!(after_growth, 64, "{statistics:?}");
    assert_eq!((statistics.lost_packets, statistics.black_holes), (0, 0), "{statistics:?}");
}

#[tokio::test]
async fn frames_of_all_sizes_arrive_in_batches() {
    let pair = pair().await;
    let pool = BufferPool::new(1 << 20);
    let mut sender = pair.dialled.open_frames(&preamble(StreamKind::Live)).await.unwrap();
    for (sequence, length) in [(1, 512), (2, 4096), (3, 69632)] {
        let payload = payload(sequence, length);
        sender.queue(&header(sequence, length).encode(&payload), payload);
    }
    sender.queue(&epoch_end().encode(&[]), Bytes::new());
    assert_eq!(sender.queued_bytes(), 4 * HEADER_BYTES + 512 + 4096 + 69632);
    sender.flush().await.unwrap();
    assert_eq!(sender.queued_bytes(), 0);

    let (_, mut receiver) = accept_frames(&pair.accepted).await;
    let mut frames = Vec::new();
    while frames.len() < 4 {
        frames.push(receiver.receive(&pool).await.unwrap());
        while let Some(frame) = receiver.receive_now(&pool).unwrap() {
            frames.push(frame);
        }
    }
    for ((found, bytes), (sequence, length)) in frames.iter().zip([(1, 512), (2, 4096), (3, 69632)]) {
        assert_eq!((*found, bytes), (header(sequence, length), &payload(sequence, length)));
    }
    assert_eq!(frames[3], (epoch_end(), Bytes::new()));
}

#[tokio::test]
async fn a_caller_that_stops_waiting_loses_nothing() {
    let pair = pair().await;
    let pool = BufferPool::new(1 << 20);
    let connection = pair.dialled.clone();
    let sending = tokio::spawn(async move {
        let mut stream = connection.quic.open_uni().await.unwrap();
        let payload = payload(3, 1024);
        let mut bytes = preamble(StreamKind::Live).encode().to_vec();
        bytes.extend_from_slice(&header(3, 1024).encode(&payload));
        bytes.extend_from_slice(&payload);
        for piece in bytes.chunks(7) {
            stream.write_all(piece).await.unwrap();
            tokio::task::yield_now().await;
        }
        stream.finish().unwrap();
        let (mut control, _) = connection.open_control().await.unwrap();
        control.send(&acknowledgement(4)).await.unwrap();
        control.finish().await.unwrap();
    });
    let (mut frames, mut control) = (None, None);
    while frames.is_none() || control.is_none() {
        tokio::select! {
            biased;
            incoming = pair.accepted.accept() => match incoming.unwrap() {
                Incoming::Frames(_, receiver) => frames = Some(receiver),
                Incoming::Control(_, receiver) => control = Some(receiver),
            },
            () = tokio::task::yield_now() => {}
        }
    }
    let (mut frames, mut control) = (frames.unwrap(), control.unwrap());
    let frame = loop {
        tokio::select! {
            biased;
            frame = frames.receive(&pool) => break frame.unwrap(),
            () = tokio::task::yield_now() => {}
        }
    };
    assert_eq!(frame, (header(3, 1024), payload(3, 1024)));
    let message = loop {
        tokio::select! {
            biased;
            message = control.receive() => break message.unwrap(),
            () = tokio::task::yield_now() => {}
        }
    };
    assert_eq!(message, acknowledgement(4));
    sending.await.unwrap();
}

#[tokio::test]
async fn a_read_is_asked_for_with_a_message_and_answered_with_frames() {
    let pair = pair().await;
    let pool = BufferPool::new(1 << 20);
    let (mut asking, receiver) = pair.dialled.open_control().await.unwrap();
    asking.send(&acknowledgement(1)).await.unwrap();
    let (answering, mut requests) = accept_control(&pair.accepted).await;
    let mut answering = answering.into_frames();
    let mut receiver = receiver.into_frames();
    for request in 1..4 {
        assert_eq!(requests.receive().await.unwrap(), acknowledgement(request));
        send_frame(&mut answering, request, 4096).await;
        assert_eq!(receiver.receive(&pool).await.unwrap().0, header(request, 4096));
        asking.send(&acknowledgement(request + 1)).await.unwrap();
    }
}

#[tokio::test]
async fn an_answer_of_messages_goes_on_with_frames_that_came_along() {
    let pair = pair().await;
    let pool = BufferPool::new(1 << 20);
    let (mut asking, mut receiver) = pair.dialled.open_control().await.unwrap();
    asking.send(&acknowledgement(1)).await.unwrap();
    let (mut answering, _requests) = accept_control(&pair.accepted).await;
    answering.send(&acknowledgement(2)).await.unwrap();
    let mut answering = answering.into_frames();
    send_frame(&mut answering, 1, 4096).await;
    let finishing = tokio::spawn(answering.finish());
    assert_eq!(receiver.receive().await.unwrap(), acknowledgement(2));
    let mut receiver = receiver.into_frames();
    assert_eq!(receiver.receive(&pool).await.unwrap(), (header(1, 4096), payload(1, 4096)));
    assert!(matches!(receiver.receive(&pool).await, Err(ReceiveError::Ended(_))));
    finishing.await.unwrap().unwrap();
}

#[tokio::test]
async fn volumes_on_threads_of_their_own_share_one_connection() {
    const VOLUMES: u64 = 3;
    const FRAMES: u64 = 40;
    let pair = pair().await;
    let senders: Vec<_> = (0..VOLUMES)
        .map(|volume| {
            let connection = pair.dialled.clone();
            on_a_thread(move || async move {
                let kind = if volume == 0 { StreamKind::Bulk } else { StreamKind::Live };
                let preamble = StreamPreamble { session: Session(volume), ..preamble(kind) };
                let mut sender = connection.open_frames(&preamble).await.unwrap();
                let (mut control, mut answers) = connection.open_control().await.unwrap();
                for sequence in 0..FRAMES {
                    send_frame(&mut sender, sequence << 8 | volume, 128 << 10).await;
                }
                control.send(&acknowledgement(volume)).await.unwrap();
                assert_eq!(answers.receive().await.unwrap(), acknowledgement(volume + 100));
                // A stream that is dropped before its end has come tells the other side to stop.
                assert!(matches!(answers.receive().await, Err(ReceiveError::Ended(_))));
                sender.finish().await.unwrap();
            })
        })
        .collect();
    let mut receivers = Vec::new();
    for _ in 0..2 * VOLUMES {
        match pair.accepted.accept().await.unwrap() {
            Incoming::Frames(preamble, mut receiver) => receivers.push(on_a_thread(move || async move {
                let pool = BufferPool::new(1 << 20);
                for sequence in 0..FRAMES {
                    let sequence = sequence << 8 | preamble.session.0;
                    let (found, bytes) = receiver.receive(&pool).await.unwrap();
                    assert_eq!(found, header(sequence, 128 << 10));
                    assert!(bytes == payload(sequence, 128 << 10));
                }
                assert!(matches!(receiver.receive(&pool).await, Err(ReceiveError::Ended(_))));
            })),
            Incoming::Control(mut sender, mut receiver) => receivers.push(on_a_thread(move || async move {
                let Message::Acknowledgement(found) = receiver.receive().await.unwrap() else {
                    panic!("another message")
                };
                sender.send(&acknowledgement(found.received.0 + 100)).await.unwrap();
                sender.finish().await.unwrap();
            })),
        }
    }
    for thread in senders.into_iter().chain(receivers) {
        thread.join().unwrap();
    }
}

/// Prints what the loopback interface carries: `cargo test --release -p blockmirror-agent --lib -- --ignored
/// --nocapture throughput`. The payloads take turns and are together larger than a processor's cache: the same
/// megabyte again and again goes about a third faster.
#[tokio::test]
#[ignore = "a measurement, not a test"]
async fn throughput_of_write_frames() {
    const FRAMES: usize = 8192;
    const DISTINCT: u64 = 128;
    let payloads: Arc<[Bytes]> = (0..DISTINCT).map(|sequence| payload(sequence, 1 << 20)).collect();
    for packet_limit_bytes in [1452, 8900, 16_000] {
        let pair = pair_with(&Options { packet_limit_bytes, ..Options::default() }).await;
        let (connection, payloads) = (pair.dialled.clone(), payloads.clone());
        let start = Instant::now();
        let sending = on_a_thread(move || async move {
            let mut sender = connection.open_frames(&preamble(StreamKind::Live)).await.unwrap();
            for (sequence, payload) in (0..).zip(payloads.iter().cycle().take(FRAMES)) {
                let head = header(sequence, 1 << 20).encode(payload);
                sender.send(&head, payload.clone()).await.unwrap();
            }
            sender.finish().await.unwrap();
        });
        let pool = BufferPool::new(4 << 20);
        let (_, mut receiver) = accept_frames(&pair.accepted).await;
        for _ in 0..FRAMES {
            receiver.receive(&pool).await.unwrap();
        }
        let rate = FRAMES as f64 / start.elapsed().as_secs_f64();
        assert!(matches!(receiver.receive(&pool).await, Err(ReceiveError::Ended(_))));
        sending.join().unwrap();
        eprintln!("{rate:.0} MiB/s; {:?}", pair.dialled.statistics());
    }
}
