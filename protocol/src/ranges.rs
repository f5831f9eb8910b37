//! Byte ranges of a volume.

use crate::units::{Block, BlockSize, EXTENT_BYTES, Extent};
use std::ops::Range;

/// A byte interval of a volume. Never longer than `u64::MAX - offset`.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default, bincode::Encode)]
pub struct ByteRange {
    /// The first byte.
    pub offset: u64,
    /// How many bytes.
    pub length: u64,
}

impl ByteRange {
    /// The range of `length` bytes from `offset` on.
    ///
    /// # Panics
    /// When the end does not fit into 64 bits.
    #[must_use]
    pub fn new(offset: u64, length: u64) -> Self {
        assert!(offset.checked_add(length).is_some(), "a range ends within 64 bits");
        Self { offset, length }
    }

    /// The range from `start` up to `end`, without it.
    ///
    /// # Panics
    /// When `end` lies before `start`.
    #[must_use]
    pub fn between(start: u64, end: u64) -> Self {
        assert!(start <= end, "a range does not end before it starts");
        Self { offset: start, length: end - start }
    }

    /// The first byte after the range.
    #[must_use]
    pub fn end(self) -> u64 {
        self.offset + self.length
    }

    /// Whether the range holds no byte.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.length == 0
    }

    /// Whether the two share a byte.
    #[must_use]
    pub fn overlaps(self, other: Self) -> bool {
        self.offset < other.end() && other.offset < self.end()
    }

    /// Whether every byte of `other` is in this range.
    #[must_use]
    pub fn contains(self, other: Self) -> bool {
        self.offset <= other.offset && other.end() <= self.end()
    }

    /// The bytes that both hold, if any.
    #[must_use]
    pub fn intersection(self, other: Self) -> Option<Self> {
        let (start, end) = (self.offset.max(other.offset), self.end().min(other.end()));
        (start < end).then(|| Self::between(start, end))
    }

    /// Whether both ends are multiples of `unit` bytes.
    #[must_use]
    pub fn is_aligned(self, unit: u64) -> bool {
        self.offset.is_multiple_of(unit) && self.length.is_multiple_of(unit)
    }

    /// The smallest range with both ends at multiples of `unit` that holds this one.
    #[must_use]
    pub fn widened(self, unit: u64) -> Self {
        let start = self.offset - self.offset % unit;
        Self::between(start, self.end().next_multiple_of(unit))
    }

    /// The part before multiples of `unit` bytes, the parts between them, the rest: in order, none crosses one.
    pub fn split_at_multiples(self, unit: u64) -> impl Iterator<Item = Self> {
        let mut start = self.offset;
        std::iter::from_fn(move || {
            (start < self.end()).then(|| {
                let end = self.end().min((start / unit + 1).saturating_mul(unit));
                let part = Self::between(start, end);
                start = end;
                part
            })
        })
    }

    /// The blocks that the range touches.
    #[must_use]
    pub fn blocks(self, size: BlockSize) -> Range<u64> {
        if self.is_empty() {
            return 0..0;
        }
        size.block_of(self.offset).0..size.blocks_in(self.end())
    }

    /// The bytes of some blocks, cut off at the volume's end.
    #[must_use]
    pub fn of_blocks(blocks: Range<u64>, size: BlockSize, volume_bytes: u64) -> Self {
        let end = size.offset_of(Block(blocks.end)).min(volume_bytes);
        Self::between(size.offset_of(Block(blocks.start)).min(end), end)
    }

    /// The extents that the range touches.
    pub fn extents(self) -> impl Iterator<Item = Extent> + Clone {
        let last = if self.is_empty() { 0 } else { self.end().div_ceil(EXTENT_BYTES) };
        let first = if self.is_empty() { 0 } else { self.offset / EXTENT_BYTES };
        (first..last).map(|index| Extent(u32::try_from(index).expect("a volume has at most 2^32 extents")))
    }
}

bincode::impl_borrow_decode!(ByteRange);

impl<Context> bincode::Decode<Context> for ByteRange {
    fn decode<D: bincode::de::Decoder>(decoder: &mut D) -> Result<Self, bincode::error::DecodeError> {
        let (offset, length) = (u64::decode(decoder)?, u64::decode(decoder)?);
        match offset.checked_add(length) {
            Some(_) => Ok(Self { offset, length }),
            None => Err(bincode::error::DecodeError::Other("a range that ends past 64 bits")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn any_range() -> impl Strategy<Value = ByteRange> {
        (0u64..300, 0u64..100).prop_map(|(offset, length)| ByteRange::new(offset, length))
    }

    fn bytes(range: ByteRange) -> Vec<u64> {
        (range.offset..range.end()).collect()
    }

    proptest! {
        #[test]
        fn ranges_agree_with_sets_of_bytes(a in any_range(), b in any_range(), unit in 1u64..40) {
            let shared: Vec<u64> = bytes(a).into_iter().filter(|byte| bytes(b).contains(byte)).collect();
            prop_assert_eq!(a.intersection(b).map(bytes).unwrap_or_default(), shared.clone());
            if !a.is_empty() && !b.is_empty() {
                prop_assert_eq!(a.overlaps(b), !shared.is_empty());
            }
            prop_assert!(a.widened(unit).contains(a) && a.widened(unit).is_aligned(unit));
            let parts: Vec<ByteRange> = a.split_at_multiples(unit).collect();
            prop_assert_eq!(parts.iter().copied().flat_map(bytes).collect::<Vec<_>>(), bytes(a));
            prop_assert!(parts.iter().all(|part| part.offset / unit == (part.end() - 1) / unit));
        }
    }

    #[test]
    fn a_range_touches_the_blocks_and_extents_of_all_its_bytes() {
        let size = BlockSize::default();
        assert_eq!(ByteRange::new(4095, 2).blocks(size), 0..2);
        assert_eq!(ByteRange::new(4096, 4096).blocks(size), 1..2);
        assert_eq!(ByteRange::new(4096, 0).blocks(size), 0..0);
        assert_eq!(ByteRange::of_blocks(1..3, size, 9000), ByteRange::new(4096, 4904));
        let extents: Vec<Extent> = ByteRange::new(EXTENT_BYTES - 1, 2).extents().collect();
        assert_eq!(extents, [Extent(0), Extent(1)]);
        assert_eq!(ByteRange::new(EXTENT_BYTES, 0).extents().count(), 0);
    }
}
