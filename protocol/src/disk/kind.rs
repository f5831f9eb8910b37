//! Which of our files some bytes are, told by their magic alone: also when the rest is damaged.

use super::{PAGE_BYTES, absent, activity_log, dirty_map, marker, pre_images, recovery, superblock};

/// A file of ours.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FileKind {
    /// See [`superblock`].
    Superblock,
    /// See [`marker`].
    Marker,
    /// See [`activity_log`].
    ActivityLog,
    /// See [`dirty_map`].
    DirtyMap,
    /// See [`pre_images`].
    PreImages,
    /// See [`recovery`].
    RecoveryState,
    /// See [`absent`].
    Absent,
}

impl FileKind {
    /// The kind of a file, from its first pages: one page with its magic is enough.
    #[must_use]
    pub fn recognise(file: &[u8]) -> Option<Self> {
        file.chunks(PAGE_BYTES).take(activity_log::RECORDS as usize).find_map(|page| {
            match *page.first_chunk::<8>()? {
                superblock::MAGIC => Some(Self::Superblock),
                marker::MAGIC => Some(Self::Marker),
                activity_log::MAGIC => Some(Self::ActivityLog),
                dirty_map::MAGIC => Some(Self::DirtyMap),
                pre_images::MAGIC | pre_images::BATCH_MAGIC => Some(Self::PreImages),
                recovery::MAGIC => Some(Self::RecoveryState),
                absent::MAGIC => Some(Self::Absent),
                _ => None,
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranges::ByteRange;
    use crate::units::Mark;

    #[test]
    fn a_file_is_recognised_by_any_whole_magic() {
        let mut file = [marker::encode(Mark::default(), 2), marker::encode(Mark::default(), 1)].concat();
        assert_eq!(FileKind::recognise(&file), Some(FileKind::Marker));
        file[..PAGE_BYTES].fill(0);
        assert_eq!(FileKind::recognise(&file), Some(FileKind::Marker));
        assert_eq!(FileKind::recognise(&file[PAGE_BYTES..PAGE_BYTES + 7]), None);
        assert_eq!(FileKind::recognise(&[]), None);
        let (layer, serial, at) = (crate::layers::testing::layer(1), 0, pre_images::FIRST_BATCH);
        let entries = vec![pre_images::Entry::of_zeroes(ByteRange::new(0, 512))];
        let batch = pre_images::Batch { layer, serial, at, entries };
        let layer = [[0; PAGE_BYTES], batch.encode()].concat();
        assert_eq!(FileKind::recognise(&layer), Some(FileKind::PreImages), "also when its header is gone");
        let log = activity_log::encode([], 1);
        assert_eq!(FileKind::recognise(&log), Some(FileKind::ActivityLog));
    }
}
