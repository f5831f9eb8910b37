//! Random numbers from a seed: splitmix64, the same on every machine.

use std::time::Duration;

/// A stream of random numbers.
#[derive(Clone, Debug)]
pub struct Random(u64);

impl Random {
    /// The stream of this seed.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x9e6c_63d0_876a_7a35)
    }

    /// Any number.
    pub fn next_number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next_number() % limit
    }

    /// True once in `times`; never for 0.
    pub fn once_in(&mut self, times: u64) -> bool {
        times > 0 && self.below(times) == 0
    }

    /// One of these.
    pub fn pick<Item: Copy>(&mut self, items: &[Item]) -> Item {
        items[self.below(items.len() as u64) as usize]
    }

    /// A duration up to `longest`; short ones are more likely.
    pub fn up_to(&mut self, longest: Duration) -> Duration {
        let microseconds = longest.as_micros() as u64 + 1;
        let halvings = self.below(4);
        Duration::from_micros(self.below((microseconds >> halvings).max(1)))
    }
}
