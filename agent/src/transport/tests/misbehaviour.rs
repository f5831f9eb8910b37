//! What a peer must not send.

use super::*;

#[tokio::test]
async fn a_damaged_frame_is_refused() {
    let pair = pair().await;
    let mut sender = pair.dialled.open_frames(&preamble(StreamKind::Live)).await.unwrap();
    let head = header(1, 4096).encode(&payload(1, 4096));
    sender.send(&head, payload(2, 4096)).await.unwrap();
    let (_, mut receiver) = accept_frames(&pair.accepted).await;
    let error = receiver.receive(&BufferPool::new(0)).await.unwrap_err();
    let ReceiveError::PeerMisbehaved { peer, source } = error else { panic!("{error:?}") };
    assert_eq!(peer, pair.dialler.id());
    assert!(matches!(source, Misbehaviour::Frame(FrameError::Damaged { .. })), "{source:?}");
}

#[tokio::test]
async fn a_stream_that_ends_within_a_frame_is_refused() {
    let pair = pair().await;
    let mut bytes = preamble(StreamKind::Live).encode().to_vec();
    bytes.extend_from_slice(&header(1, 4096).encode(&payload(1, 4096)));
    bytes.extend_from_slice(&payload(1, 4095));
    misbehave_on_a_one_way_stream(&pair.dialled, &bytes).await;
    let (_, mut receiver) = accept_frames(&pair.accepted).await;
    let error = receiver.receive(&BufferPool::new(0)).await.unwrap_err();
    assert!(
        matches!(&error, ReceiveError::PeerMisbehaved { source: Misbehaviour::Unfinished, .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn garbage_instead_of_frames_is_refused() {
    let pair = pair().await;
    let mut sender = pair.dialled.open_frames(&preamble(StreamKind::Live)).await.unwrap();
    sender.send(&[0x55; HEADER_BYTES], Bytes::from_static(&[0x55; 4096])).await.unwrap();
    let (_, mut receiver) = accept_frames(&pair.accepted).await;
    let error = receiver.receive(&BufferPool::new(0)).await.unwrap_err();
    assert!(
        matches!(
            &error,
            ReceiveError::PeerMisbehaved { source: Misbehaviour::Frame(FrameError::NotAFrame), .. }
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn garbage_instead_of_a_preamble_is_refused_and_a_stream_given_up_is_passed_over() {
    let pair = pair().await;
    misbehave_on_a_one_way_stream(&pair.dialled, b"BMS1").await;
    misbehave_on_a_one_way_stream(&pair.dialled, &[0x55; 64]).await;
    let error = pair.accepted.accept().await.unwrap_err();
    assert!(
        matches!(
            &error,
            ReceiveError::PeerMisbehaved { source: Misbehaviour::Preamble(PreambleError::NotAPreamble), .. }
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_message_over_the_limit_is_refused_before_it_is_read() {
    let pair = pair().await;
    let (mut stream, _answers) = pair.dialled.quic.open_bi().await.unwrap();
    stream.write_all(&[0, 0, 0, 1]).await.unwrap();
    let (_, mut receiver) = accept_control(&pair.accepted).await;
    let error = receiver.receive().await.unwrap_err();
    assert!(
        matches!(
            &error,
            ReceiveError::PeerMisbehaved {
                source: Misbehaviour::Message(MessageError::TooLong(0x0100_0000)),
                ..
            }
        ),
        "{error:?}"
    );
}
