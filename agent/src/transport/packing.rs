//! Compressing payloads on their way to a peer, where that is faster.
//!
//! It is not on most links: a compressor does some hundred megabytes a second. So a [`Packer`] compares the link's speed,
//! as congestion control sees it, with its own, which it measures; and payloads that don't shrink are sent as they are
//! for a while. A link that isn't full doesn't show its speed; now and then plain payloads let it.
//!
//! What is unpacked is bounded by what the frame's header says, which is within the limits of a plain frame.

use blockmirror_protocol::wire::{FrameError, HEADER_BYTES, Packing, UncheckedFrame, packing};
use bytes::Bytes;
use std::time::Instant;

/// A frame in bytes.
pub type Frame = ([u8; HEADER_BYTES], Bytes);

/// The level of Zstandard: its fastest. Higher ones are slower than the links that they would help.
const ZSTD_LEVEL: i32 = 1;
/// What a compressor does in a second before it was measured, in bytes.
const ASSUMED_SPEED: f64 = 300e6;
/// How much of the speed's measure each batch replaces.
const SPEED_SHARE: f64 = 0.125;
/// A payload that doesn't get shorter than this share of itself, in eighths, isn't worth the receiver's time.
const WORTHWHILE_EIGHTHS: usize = 7;
/// How much is sent as it is after payloads that did not shrink, in bytes; it doubles as long as none does.
const PAUSE_BYTES: (u64, u64) = (4 << 20, 256 << 20);
/// After how much packed content, and for how much of it, the link may show how fast it is, in bytes.
const PROBE_BYTES: (u64, u64) = (128 << 20, 8 << 20);
/// Payloads that are shorter are not worth the call, in bytes.
const SHORTEST_BYTES: usize = 1024;

/// Packs what is sent to one peer.
pub struct Packer {
    packing: Packing,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    scratch: Vec<u8>,
    judge: Judge,
}

/// Whether packing pays.
#[derive(Debug)]
struct Judge {
    /// Of the compressor, in bytes a second.
    speed: f64,
    /// How much is still sent as it is.
    plain_bytes: u64,
    /// How long the next pause is, in bytes.
    pause_bytes: u64,
    /// How much was packed since the link could last show its speed.
    unproved_bytes: u64,
}

impl Packer {
    /// A packer that has seen nothing.
    #[must_use]
    pub fn new(packing: Packing) -> Self {
        let judge =
            Judge { speed: ASSUMED_SPEED, plain_bytes: 0, pause_bytes: PAUSE_BYTES.0, unproved_bytes: 0 };
        Self { packing, zstd: None, scratch: Vec::new(), judge }
    }

    /// How it packs.
    #[must_use]
    pub fn packing(&self) -> Packing {
        self.packing
    }

    /// Whether frames with so much payload in all are to be packed, for a link of that speed in bytes a second.
    pub fn wants(&mut self, payload_bytes: usize, link_speed: f64) -> bool {
        self.judge.wants(payload_bytes as u64, link_speed)
    }

    /// Packs those frames that get shorter. Takes its time: for much content, not on a thread that others wait for.
    pub fn pack(&mut self, frames: &mut [Frame]) {
        let began = Instant::now();
        let (mut before, mut after) = (0, 0);
        for (header, payload) in frames.iter_mut().filter(|(_, payload)| payload.len() >= SHORTEST_BYTES) {
            before += payload.len();
            if let Some(packed) = self.packed(payload) {
                packing::set(header, self.packing, packed.len());
                *payload = packed;
            }
            after += payload.len();
        }
        self.judge.packed(before, after, began.elapsed().as_secs_f64());
    }

    /// The payload in short, if that is short enough.
    fn packed(&mut self, payload: &[u8]) -> Option<Bytes> {
        let limit = payload.len() / 8 * WORTHWHILE_EIGHTHS;
        let length = match self.packing {
            Packing::Lz4 => {
                self.scratch.resize(lz4_flex::block::get_maximum_output_size(payload.len()), 0);
                lz4_flex::block::compress_into(payload, &mut self.scratch).ok()?
            }
            Packing::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(zstd::bulk::Compressor::new(ZSTD_LEVEL).ok()?),
                };
                self.scratch.resize(limit, 0);
                // It fails where the result would be longer.
                zstd.compress_to_buffer(payload, &mut self.scratch[..]).ok()?
            }
        };
        (length <= limit).then(|| Bytes::copy_from_slice(&self.scratch[..length]))
    }
}

impl Judge {
    fn wants(&mut self, bytes: u64, link_speed: f64) -> bool {
        if self.unproved_bytes >= PROBE_BYTES.0 {
            self.unproved_bytes = 0;
            self.plain_bytes = self.plain_bytes.max(PROBE_BYTES.1);
        }
        if self.plain_bytes > 0 {
            self.plain_bytes = self.plain_bytes.saturating_sub(bytes);
            return false;
        }
        link_speed < self.speed
    }

    fn packed(&mut self, before: usize, after: usize, seconds: f64) {
        if before == 0 {
            return;
        }
        self.unproved_bytes += before as u64;
        self.speed += (before as f64 / seconds.max(1e-9) - self.speed) * SPEED_SHARE;
        if after > before / 8 * WORTHWHILE_EIGHTHS {
            self.plain_bytes = self.pause_bytes;
            self.pause_bytes = (self.pause_bytes * 2).min(PAUSE_BYTES.1);
        } else {
            self.pause_bytes = PAUSE_BYTES.0;
        }
    }
}

/// Unpacks what one peer sends.
#[derive(Default)]
pub(super) struct Unpacker {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl std::fmt::Debug for Unpacker {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Unpacker").finish_non_exhaustive()
    }
}

impl Unpacker {
    /// Fills `payload`, which is as long as the frame says.
    pub(super) fn unpack(
        &mut self,
        frame: &UncheckedFrame,
        packing: Packing,
        packed: &[u8],
        payload: &mut [u8],
    ) -> Result<(), FrameError> {
        let length = match packing {
            Packing::Lz4 => lz4_flex::block::decompress_into(packed, payload).ok(),
            Packing::Zstd => self.zstd().and_then(|zstd| zstd.decompress_to_buffer(packed, payload).ok()),
        };
        if length == Some(payload.len()) { Ok(()) } else { Err(frame.not_unpacked()) }
    }

    fn zstd(&mut self) -> Option<&mut zstd::bulk::Decompressor<'static>> {
        match &mut self.zstd {
            Some(zstd) => Some(zstd),
            none => Some(none.insert(zstd::bulk::Decompressor::new().ok()?)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use blockmirror_protocol::ranges::ByteRange;
    use blockmirror_protocol::units::{Session, Stream};
    use blockmirror_protocol::wire::{Body, FrameHeader};
    use proptest::prelude::*;

    fn frame(payload: Vec<u8>) -> (FrameHeader, Frame) {
        let body = Body::Copy { range: ByteRange::new(0, payload.len() as u64), number: 1 };
        let header = FrameHeader { session: Session(1), stream: Stream(0), body };
        (header, (header.encode(&payload), payload.into()))
    }

    fn unpacked(header: &[u8; HEADER_BYTES], packed: &[u8]) -> Result<(FrameHeader, Vec<u8>), FrameError> {
        let frame = FrameHeader::decode(header)?;
        let mut payload = vec![0xff; frame.payload_bytes()];
        match frame.packed() {
            None => payload.copy_from_slice(packed),
            Some((packing, _)) => Unpacker::default().unpack(&frame, packing, packed, &mut payload)?,
        }
        Ok((frame.check(&payload)?, payload))
    }

    /// Text-like bytes of a stated variety: 1 repeats a byte, 256 is noise.
    fn content(seed: u64, variety: u64, length: usize) -> Vec<u8> {
        let mut state = seed | 1;
        std::iter::repeat_with(|| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            ((state >> 33) % variety) as u8
        })
        .take(length)
        .collect()
    }

    proptest! {
        #[test]
        fn what_was_packed_is_unpacked(seed: u64, variety in 1u64..=256, sectors in 1usize..64, zstd: bool) {
            let payload = content(seed, variety, sectors * 512);
            let (header, frame) = frame(payload.clone());
            let mut frames = [frame];
            Packer::new(if zstd { Packing::Zstd } else { Packing::Lz4 }).pack(&mut frames);
            let [(bytes, packed)] = &frames;
            prop_assert!(packed.len() <= payload.len());
            prop_assert_eq!(unpacked(bytes, packed), Ok((header, payload)));
        }

        #[test]
        fn garbage_is_refused_and_never_longer_than_the_header_says(
            garbage in proptest::collection::vec(any::<u8>(), 1..511),
            zstd: bool,
        ) {
            let (_, (mut header, _)) = frame(vec![7; 512]);
            packing::set(&mut header, if zstd { Packing::Zstd } else { Packing::Lz4 }, garbage.len());
            prop_assert!(unpacked(&header, &garbage).is_err());
        }
    }

    #[test]
    fn both_ways_shorten_what_repeats_and_leave_noise_and_sectors_alone() {
        for packing in [Packing::Lz4, Packing::Zstd] {
            let contents = [content(1, 1, 65536), content(2, 256, 65536), content(3, 1, 512)];
            let mut frames = contents.map(|content| frame(content).1);
            Packer::new(packing).pack(&mut frames);
            let [repeating, noise, sector] = &frames;
            assert!(repeating.1.len() < 1024, "{packing:?}: {}", repeating.1.len());
            assert_eq!((noise.1.len(), sector.1.len()), (65536, 512));
        }
    }

    #[test]
    fn a_bomb_fills_no_more_than_the_frame_promised() {
        let bomb = zstd::bulk::compress(&vec![0; 64 << 20], 1).unwrap();
        let (_, (mut header, _)) = frame(vec![0; 1 << 20]);
        packing::set(&mut header, Packing::Zstd, bomb.len());
        assert_eq!(unpacked(&header, &bomb), Err(FrameError::NotUnpacked { payload: 1 << 20 }));
    }

    #[test]
    fn a_link_that_is_faster_than_the_compressor_gets_payloads_as_they_are() {
        let mut judge = Packer::new(Packing::Lz4).judge;
        assert!(judge.wants(1 << 20, 12e6) && !judge.wants(1 << 20, 1e9));
        for _ in 0..100 {
            judge.packed(1 << 20, 1 << 10, (1 << 20) as f64 / 10e6);
        }
        judge.unproved_bytes = 0;
        assert!(!judge.wants(1 << 20, 12e6) && judge.wants(1 << 20, 8e6), "it was measured: {judge:?}");
    }

    #[test]
    fn content_that_does_not_shrink_is_let_alone_for_longer_and_longer() {
        let mut judge = Packer::new(Packing::Lz4).judge;
        let mut pauses = Vec::new();
        for _ in 0..3 {
            judge.packed(1 << 20, 1 << 20, 1e-3);
            pauses.push(
                std::iter::repeat_with(|| judge.wants(1 << 20, 1.0)).take_while(|wants| !wants).count(),
            );
        }
        assert_eq!(pauses, [4, 8, 16]);
        judge.packed(1 << 20, 1 << 10, 1e-3);
        assert!(judge.wants(1 << 20, 1.0));
    }

    #[test]
    fn now_and_then_the_link_may_show_its_speed() {
        let mut judge = Packer::new(Packing::Lz4).judge;
        let mut plain = 0;
        for _ in 0..1024 {
            if judge.wants(1 << 20, 1.0) {
                judge.packed(1 << 20, 1 << 10, 1e-3);
            } else {
                plain += 1;
            }
        }
        assert_eq!(plain, 56, "eight of each 136");
    }
}
