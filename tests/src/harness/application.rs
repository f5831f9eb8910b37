//! Applications on the primary's device: reads are not needed, since the checks look at the disks.

use super::world::{Event, World};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::tracker::{RequestId, Work};
use blockmirror_protocol::units::Time;
use std::collections::BTreeMap;
use std::time::Duration;

/// How long any request may take, whatever happens to replicas (W7).
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Requests so far and under way.
#[derive(Debug, Default)]
pub struct Application {
    /// The number of the last request, which is also its content.
    pub last_request: u64,
    /// When each request that waits for its answer was sent.
    pub waiting: BTreeMap<RequestId, Duration>,
    /// How many bytes of blocks were written, for each replica since its link came up.
    pub written_bytes: u64,
    /// Whether no new requests are made.
    pub is_quiet: bool,
}

impl World {
    /// Sends the next request, if there is room, and plans the one after.
    pub fn next_request(&mut self) {
        if self.application.is_quiet {
            return;
        }
        let pause = self.random.up_to(self.settings.think_time);
        self.plan(pause, Event::Request);
        if self.primary.tracker.is_some() && self.application.waiting.len() < self.settings.concurrency {
            let work = self.random_work();
            self.request(work);
        }
    }

    /// Sends a request.
    pub fn request(&mut self, work: Work) -> RequestId {
        self.application.last_request += 1;
        let number = self.application.last_request;
        let id = RequestId(number);
        let value = if matches!(work, Work::Zero { .. }) { 0 } else { number };
        self.note(|| format!("request {number}: {work:?}"));
        self.promises.issue(id, work, value);
        self.application.waiting.insert(id, self.now);
        if let Work::Write { range, .. } | Work::Zero { range, .. } = work {
            let blocks = range.blocks(self.settings.block_size);
            self.application.written_bytes += (blocks.end - blocks.start) * self.settings.block_size.bytes();
        }
        let now = Time(self.now);
        self.primary.tracker.as_mut().expect("the primary is up").handle_request(id, work, now);
        id
    }

    /// A request was answered.
    ///
    /// # Panics
    /// When it was answered before, or fails without a failing disk.
    pub fn replied(&mut self, id: RequestId, good: bool) {
        self.note(|| format!("reply to {}: {good}", id.0));
        self.application.waiting.remove(&id).expect("a request is answered once");
        assert!(good || self.settings.disk_failures > 0, "a request fails only with a disk");
        self.promises.reply(id, good);
    }

    fn random_work(&mut self) -> Work {
        let (flushes, zeroes) = (self.settings.flushes, self.settings.zeroes);
        let fua = self.random.once_in(self.settings.durable_writes);
        if self.random.once_in(flushes) {
            Work::Flush
        } else if self.random.once_in(zeroes) {
            let limit = if self.random.once_in(3) { self.settings.size_bytes } else { 256 << 10 };
            Work::Zero { range: self.random_range(limit), may_unmap: self.random.once_in(2), fua }
        } else {
            Work::Write { range: self.random_range(self.settings.write_bytes), fua }
        }
    }

    fn random_range(&mut self, longest: u64) -> ByteRange {
        let size = self.settings.size_bytes / 512;
        let at = if self.random.once_in(self.settings.cold_requests) {
            self.random.below(size)
        } else {
            let hot = self.random.pick(&self.settings.hot_spots) / 512;
            (hot + self.random.below(24)).min(size - 1)
        };
        let halvings = self.random.below(5);
        let length = 1 + self.random.below(((longest / 512) >> halvings).max(1));
        ByteRange::new(at * 512, length.min(size - at) * 512)
    }
}
