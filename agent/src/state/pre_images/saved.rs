//! Which bytes of a volume have a pre-image in a layer: ranges that neither overlap nor touch.

use blockmirror_protocol::ranges::ByteRange;
use std::collections::BTreeMap;

/// A set of bytes, whose memory grows with the number of separate ranges.
#[derive(Debug, Default)]
pub(super) struct Saved {
    /// The end of each range by its start.
    ends: BTreeMap<u64, u64>,
}

impl Saved {
    /// Adds a range, and joins it with those that it touches.
    pub(super) fn add(&mut self, range: ByteRange) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.offset, range.end());
        if let Some((before, before_end)) = self.ends.range(..start).next_back()
            && *before_end >= start
        {
            (start, end) = (*before, end.max(*before_end));
        }
        while let Some((next, next_end)) = self.ends.range(start..=end).next() {
            let next = *next;
            end = end.max(*next_end);
            self.ends.remove(&next);
        }
        self.ends.insert(start, end);
    }

    /// The parts of a range that are not in the set, in order.
    pub(super) fn missing(&self, range: ByteRange) -> Vec<ByteRange> {
        let mut missing = Vec::new();
        let before = self.ends.range(..=range.offset).next_back();
        let mut start = before.map_or(range.offset, |(_, end)| range.offset.max(*end));
        while start < range.end() {
            let next = self.ends.range(start..range.end()).next();
            let (stop, after) = next.map_or((range.end(), range.end()), |(next, end)| (*next, *end));
            if start < stop {
                missing.push(ByteRange::between(start, stop));
            }
            start = after;
        }
        missing
    }

    /// The ranges, in order.
    pub(super) fn ranges(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.ends.iter().map(|(start, end)| ByteRange::between(*start, *end))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    fn any_range() -> impl Strategy<Value = ByteRange> {
        (0u64..100, 0u64..20).prop_map(|(offset, length)| ByteRange::new(offset, length))
    }

    fn bytes(ranges: impl IntoIterator<Item = ByteRange>) -> BTreeSet<u64> {
        ranges.into_iter().flat_map(|range| range.offset..range.end()).collect()
    }

    proptest! {
        #[test]
        fn ranges_agree_with_sets_of_bytes(
            added in prop::collection::vec(any_range(), 0..12),
            asked in any_range(),
        ) {
            let mut saved = Saved::default();
            added.iter().for_each(|range| saved.add(*range));
            let set = bytes(added);
            prop_assert_eq!(&bytes(saved.ranges()), &set);
            let ranges: Vec<ByteRange> = saved.ranges().collect();
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end() < pair[1].offset));
            let missing = saved.missing(asked);
            prop_assert!(missing.windows(2).all(|pair| pair[0].end() < pair[1].offset));
            prop_assert!(missing.iter().all(|range| !range.is_empty()));
            prop_assert_eq!(bytes(missing), &bytes([asked]) - &set);
        }
    }
}
