//! The live stream's window: frames that were sent and that the replica has not acknowledged as durable (W7).
//!
//! The window holds no payload, only what is needed to put its blocks into the dirty map when the link drops. Its
//! limit counts the buffers of the payload all the same, because the transport and the replica hold those.

use crate::ranges::ByteRange;
use crate::units::{Epoch, Sequence, Time};
use crate::wire::BUFFER_BYTES;
use crate::wire::FRAME_COST_BYTES;
use std::collections::VecDeque;

/// Live frames that were sent and not acknowledged as durable: bounded memory (W7).
#[derive(Debug, Default)]
pub(super) struct Window {
    frames: VecDeque<WindowFrame>,
    cost_bytes: u64,
}

#[derive(Debug, Clone, Copy)]
struct WindowFrame {
    sequence: Sequence,
    epoch: Epoch,
    range: ByteRange,
    cost_bytes: u64,
    sent: Time,
}

/// What a frame with so much payload takes at the most, in bytes: a write of one sector holds a whole buffer.
pub(crate) fn frame_cost_bytes(payload_bytes: u64) -> u64 {
    let held_bytes = if payload_bytes == 0 { 0 } else { payload_bytes.next_power_of_two().max(BUFFER_BYTES) };
    held_bytes + FRAME_COST_BYTES
}

impl Window {
    /// Whether frames with so much payload each fit into `limit_bytes`; none always do. An empty window takes what the
    /// replica lets pass, which counts the payload alone: one that never has room would break the stream off each time.
    pub(super) fn has_room(&self, payload_bytes: impl Iterator<Item = u64>, limit_bytes: u64) -> bool {
        let (mut cost_bytes, mut bare_bytes) = (0, 0);
        for bytes in payload_bytes {
            cost_bytes += frame_cost_bytes(bytes);
            bare_bytes += bytes + FRAME_COST_BYTES;
        }
        self.cost_bytes + cost_bytes <= limit_bytes
            || cost_bytes == 0
            || self.frames.is_empty() && bare_bytes <= limit_bytes
    }

    pub(super) fn push(
        &mut self,
        sequence: Sequence,
        epoch: Epoch,
        range: ByteRange,
        payload_bytes: u64,
        sent: Time,
    ) {
        let cost_bytes = frame_cost_bytes(payload_bytes);
        self.cost_bytes += cost_bytes;
        self.frames.push_back(WindowFrame { sequence, epoch, range, cost_bytes, sent });
    }

    /// Everything up to this epoch is durable on the replica.
    pub(super) fn durable(&mut self, epoch: Epoch) {
        while let Some(frame) = self.frames.front().filter(|frame| frame.epoch <= epoch) {
            self.cost_bytes -= frame.cost_bytes;
            self.frames.pop_front();
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.frames.is_empty()
    }

    /// The oldest write that the replica may not have durably.
    pub(super) fn oldest(&self) -> Option<(Sequence, Time)> {
        self.frames.front().map(|frame| (frame.sequence, frame.sent))
    }

    /// Bytes of volume in the window.
    pub(super) fn bytes(&self) -> u64 {
        self.frames.iter().map(|frame| frame.range.length).sum()
    }

    /// All ranges in the window, oldest first.
    pub(super) fn ranges(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.frames.iter().map(|frame| frame.range)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_costs_the_buffer_that_holds_its_payload() {
        for (payload_bytes, held_bytes) in
            [(0, 0), (512, 4096), (4096, 4096), (4608, 8192), (128 << 10, 128 << 10), (768 << 10, 1 << 20)]
        {
            assert_eq!(frame_cost_bytes(payload_bytes), held_bytes + FRAME_COST_BYTES, "{payload_bytes}");
        }
    }

    #[test]
    fn an_empty_window_takes_whatever_the_replica_does() {
        let (limit_bytes, large_bytes) = (1 << 20, 768 << 10);
        let mut window = Window::default();
        assert!(window.has_room([large_bytes].into_iter(), limit_bytes));
        assert!(!window.has_room([limit_bytes].into_iter(), limit_bytes), "the replica would not");
        window.push(Sequence(1), Epoch(1), ByteRange::new(0, 512), 512, Time::default());
        assert!(!window.has_room([large_bytes].into_iter(), limit_bytes));
        assert!(window.has_room([4096, 4096].into_iter(), limit_bytes));
        assert!(window.has_room([].into_iter(), 0));
    }
}
