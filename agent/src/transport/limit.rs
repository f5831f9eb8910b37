//! How fast all resyncs from this host may be together.

use std::num::NonZeroU64;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// A share of time for each byte, in the order in which they are asked for. Clones are handles to the same limit.
#[derive(Clone, Debug, Default)]
pub struct Limit {
    rate_bytes: Option<NonZeroU64>,
    free_at: Arc<Mutex<Option<Instant>>>,
}

impl Limit {
    /// A limit in bytes a second, or none.
    #[must_use]
    pub fn new(rate_bytes: Option<NonZeroU64>) -> Self {
        Self { rate_bytes, free_at: Arc::default() }
    }

    /// The limit, in bytes a second.
    #[must_use]
    pub fn rate_bytes(&self) -> Option<NonZeroU64> {
        self.rate_bytes
    }

    /// Waits until so many bytes may go.
    pub async fn wait_for(&self, bytes: u64) {
        if let Some(until) = self.reserve(bytes, Instant::now()) {
            tokio::time::sleep_until(until.into()).await;
        }
    }

    /// When these bytes may go, if not now. The time that they take counts from then.
    fn reserve(&self, bytes: u64, now: Instant) -> Option<Instant> {
        let rate = self.rate_bytes.filter(|_| bytes > 0)?;
        let mut free_at = self.free_at.lock().expect("no holder of the limit's lock panics");
        let from = free_at.map_or(now, |free_at| free_at.max(now));
        *free_at = Some(from + Duration::from_secs_f64(bytes as f64 / rate.get() as f64));
        (from > now).then_some(from)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_who_ask_share_the_time() {
        let limit = Limit::new(NonZeroU64::new(1000));
        let (other, now) = (limit.clone(), Instant::now());
        let after = |milliseconds| now + Duration::from_millis(milliseconds);
        assert_eq!(limit.reserve(500, now), None);
        assert_eq!(other.reserve(1000, now), Some(after(500)));
        assert_eq!(limit.reserve(1000, after(100)), Some(after(1500)));
        assert_eq!(limit.reserve(0, after(100)), None, "what has no content doesn't wait");
        assert_eq!(limit.reserve(1000, after(9000)), None, "time that was not used is not saved up");
        assert_eq!(Limit::default().reserve(u64::MAX, now), None);
    }
}
