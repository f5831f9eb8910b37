//! What is copied, compared and left alone, without a tracker around it.

use super::*;
use crate::disk::dirty_map::Base;
use crate::units::{HostId, VolumeId};
use std::time::Duration;

const BLOCKS: u64 = 1024;

/// A resync of a replica of which every block is dirty and none is certain to differ.
struct Harness {
    resync: Resync,
    map: DirtyMap,
    certain: DirtyMap,
}

impl Harness {
    /// Where there are no holes, as is known.
    fn new() -> Self {
        let mut harness = Self::of(BLOCKS);
        harness.resync.expected = Expected::Data;
        harness
    }

    fn of(blocks: u64) -> Self {
        let size = BlockSize::default();
        let map = DirtyMap::full(VolumeId([1; 16]), HostId([2; 32]), blocks * size.bytes(), size);
        let certain = map.of_single_bits().clean(Base::default());
        let resync = Resync::new(size, blocks * size.bytes(), CopyRead(0), None, Time::default());
        Self { resync, map, certain }
    }

    /// The reads that it asks for, with whether a digest is wanted.
    fn picks(&mut self) -> Vec<(CopyRead, ByteRange, bool)> {
        self.picks_while(false)
    }

    fn picks_while(&mut self, application_is_active: bool) -> Vec<(CopyRead, ByteRange, bool)> {
        let order = Order::<u8>::new(512);
        let active = application_is_active;
        let picked = std::iter::from_fn(|| {
            match self.resync.pick(&self.map, &self.certain, (&order, None), active, Time::default())? {
                Action::ReadCopy { read, range, digest } => Some((read, range, digest)),
                action => panic!("it asks for {action:?}"),
            }
        });
        picked.collect()
    }

    fn read(&mut self, read: CopyRead, content: CopyContent) -> u64 {
        self.resync.read_ended(read, content, Time::default()).expect("it is sent").0
    }

    /// Asks about the next blocks, and gives the request's number and the blocks.
    fn ask(&mut self) -> (u64, Range<u64>) {
        let (read, range, digest) = self.picks()[0];
        assert!(digest);
        (self.read(read, CopyContent::Digest([1; 32])), range.blocks(BlockSize::default()))
    }

    fn compared(&mut self, number: u64, digest: [u8; 32]) -> Result<(), PeerError> {
        self.resync.compared(number, digest, &mut self.map, &mut self.certain)
    }

    fn durable(&mut self, number: u64) -> Result<(), PeerError> {
        self.resync.durable(number, &mut self.map, &mut self.certain, Time::default())
    }
}

#[test]
fn blocks_that_are_the_same_are_clean_once_that_is_durable() {
    let mut harness = Harness::new();
    let (number, blocks) = harness.ask();
    harness.resync.rewritten(&(3..5));
    harness.compared(number, [1; 32]).unwrap();
    assert!(harness.map.is_dirty(0), "what the replica read may be lost");
    harness.durable(number).unwrap();
    for block in blocks {
        assert_eq!(harness.map.is_dirty(block), (3..5).contains(&block), "block {block}");
    }
}

#[test]
fn blocks_that_differ_stay_dirty_and_are_copied() {
    let mut harness = Harness::new();
    let (number, blocks) = harness.ask();
    harness.compared(number, [2; 32]).unwrap();
    let picks = harness.picks();
    let is_copy =
        |(_, range, digest): &(_, ByteRange, _)| range.blocks(BlockSize::default()) == blocks && !digest;
    let (read, ..) = *picks.iter().find(|pick| is_copy(pick)).expect("they are picked again");
    harness.durable(number).unwrap();
    assert!(blocks.clone().all(|block| harness.map.is_dirty(block)));
    let copied = harness.read(read, CopyContent::Data);
    harness.durable(copied).unwrap();
    assert!(!blocks.clone().any(|block| harness.map.is_dirty(block) || harness.certain.is_dirty(block)));
    let bytes = (blocks.end - blocks.start) * BlockSize::default().bytes();
    assert_eq!(harness.resync.pace.done_bytes(), bytes, "they count once");
}

#[test]
fn holes_are_copied_in_large_ranges_and_nothing_else_is() {
    for are_certain in [true, false] {
        copy_a_half_that_is_a_hole(are_certain);
    }
}

fn copy_a_half_that_is_a_hole(are_certain: bool) {
    let blocks = 256 * BLOCKS;
    let mut harness = Harness::of(blocks);
    if are_certain {
        harness.certain.mark(0..blocks);
    }
    let mut longest = 0;
    let mut done = 0;
    // The second half is no hole.
    let half = blocks / 2 * BlockSize::default().bytes();
    while harness.map.dirty_blocks() > 0 {
        for (read, range, digest) in harness.picks() {
            longest = longest.max(range.length);
            let content = match () {
                () if range.end() <= half || range.length > COPY_BYTES => {
                    CopyContent::Hole(range.end().min(half).saturating_sub(range.offset))
                }
                () if digest => CopyContent::Digest([1; 32]),
                () => CopyContent::Data,
            };
            let sent = harness.resync.read_ended(read, content, Time::default());
            let Some((number, range)) = sent else {
                assert_eq!(content, CopyContent::Hole(0));
                continue;
            };
            if let CopyContent::Digest(digest) = content {
                harness.compared(number, digest).unwrap();
            }
            harness.durable(number).unwrap();
            done += range.length;
        }
    }
    assert_eq!((done, harness.map.dirty_blocks()), (2 * half, 0));
    assert_eq!(longest, ZERO_LIMIT_BYTES);
}

/// Copies a volume that is a hole but for these pieces, of which the replica has none, and gives how many reads and
/// how many comparisons of data that took. No read of data ends while anything else can be picked.
fn copy_pieces(harness: &mut Harness, pieces: &[ByteRange]) -> (usize, usize) {
    let (mut reads, mut comparisons) = (0, 0);
    let mut slow = VecDeque::new();
    while harness.map.dirty_blocks() > 0 {
        let mut answers = Vec::new();
        for (read, range, digest) in harness.picks() {
            reads += 1;
            let first = pieces.iter().find(|piece| piece.overlaps(range));
            match first {
                Some(_) if range.length <= COPY_BYTES => slow.push_back((read, digest)),
                Some(piece) => {
                    let bytes = piece.offset.saturating_sub(range.offset);
                    answers.push((read, CopyContent::Hole(bytes)));
                }
                None => answers.push((read, CopyContent::Hole(range.length))),
            }
        }
        if answers.is_empty() {
            let (read, digest) = slow.pop_front().expect("something is under way");
            comparisons += usize::from(digest);
            answers.push((read, if digest { CopyContent::Digest([1; 32]) } else { CopyContent::Data }));
        }
        for (read, content) in answers {
            let sent = harness.resync.read_ended(read, content, Time::default());
            let Some((number, _)) = sent else { continue };
            if content == CopyContent::Digest([1; 32]) {
                harness.compared(number, [2; 32]).unwrap();
            }
            harness.durable(number).unwrap();
        }
    }
    (reads, comparisons)
}

#[test]
fn a_lone_piece_of_data_in_a_hole_takes_few_reads() {
    let mut harness = Harness::of(4096 * BLOCKS);
    harness.certain.mark(0..4096 * BLOCKS);
    let pieces: Vec<_> = (0..160).map(|piece| ByteRange::new((piece * 100) << 20, 1 << 20)).collect();
    let (reads, _) = copy_pieces(&mut harness, &pieces);
    assert!(reads <= 160 * 4 + 16, "{reads} reads: the piece, and three times the hole behind it");
}

#[test]
fn a_long_stretch_of_data_in_a_hole_is_asked_about_a_few_times() {
    let mut harness = Harness::of(1024 * BLOCKS);
    harness.certain.mark(0..1024 * BLOCKS);
    let (reads, _) = copy_pieces(&mut harness, &[ByteRange::new(1 << 30, 1 << 30)]);
    let (data, holes) = (1024, 3 << 30 >> 26);
    assert!(reads <= data + holes + 50, "{reads} reads: 32 at most in the hole behind it");
}

#[test]
fn a_hole_brings_no_trial_nearer() {
    let mut harness = Harness::of(4096 * BLOCKS);
    let pieces: Vec<_> = (0..160).map(|piece| ByteRange::new((piece * 100) << 20, 1 << 20)).collect();
    let (_, comparisons) = copy_pieces(&mut harness, &pieces);
    assert_eq!(comparisons, 2 * 16, "at the beginning and after 64 MiB, and not yet after 128 more");
}

#[test]
fn a_write_in_a_large_range_narrows_it_no_further_than_a_copy() {
    let mut harness = Harness::of(4 * BLOCKS);
    harness.certain.mark(0..4 * BLOCKS);
    harness.resync.expected = Expected::HOLE;
    let mut order = Order::<u8>::new(512);
    let _ = order.admit(1, ByteRange::new(3 * COPY_BYTES, 4096));
    let picked = harness.resync.pick(&harness.map, &harness.certain, (&order, None), false, Time::default());
    let Some(Action::ReadCopy { range, .. }) = picked else { panic!("{picked:?}") };
    assert_eq!(range, ByteRange::new(0, COPY_BYTES));
}

#[test]
fn copies_and_comparisons_are_small_while_an_application_waits() {
    for (are_certain, active, bytes) in
        [(true, false, 1024), (true, true, 128), (false, false, 256), (false, true, 128)]
    {
        let mut harness = Harness::new();
        if are_certain {
            harness.certain.mark(0..BLOCKS);
        }
        let picks = harness.picks_while(active);
        let is_as_long = |(_, range, digest): &(_, ByteRange, bool)| {
            (range.length, *digest) == (bytes << 10, !are_certain)
        };
        assert!(!picks.is_empty() && picks.iter().all(is_as_long), "{picks:?}");
    }
}

#[test]
fn written_blocks_are_not_asked_about() {
    let mut harness = Harness::new();
    harness.certain.mark(0..10);
    let picks = harness.picks();
    assert_eq!((picks[0].1.blocks(BlockSize::default()), picks[0].2), (0..10, false));
    assert!(picks[1].2);
}

#[test]
fn a_replica_that_makes_digests_up_is_found_out() {
    let mut harness = Harness::new();
    let (number, _) = harness.ask();
    assert!(harness.compared(number + 1, [1; 32]).is_err(), "nothing of that number was asked");
    assert!(harness.compared(number - 1, [1; 32]).is_err());
    harness.compared(number, [1; 32]).unwrap();
    assert!(harness.compared(number, [1; 32]).is_err(), "it answered that already");
    let mut harness = Harness::new();
    let (unanswered, _) = harness.ask();
    assert!(harness.durable(unanswered).is_err(), "it has not answered that");
}

#[test]
fn a_limit_holds_copies_back_and_says_until_when() {
    let mut harness = Harness::new();
    harness.certain.mark(0..BLOCKS);
    harness.resync.set_limit(NonZeroU64::new(1 << 20));
    let picked = harness.picks();
    let bytes: u64 = picked.iter().map(|(_, range, _)| range.length).sum();
    assert_eq!((bytes, picked[0].1.length), (512 << 10, 128 << 10), "half a second's worth, in small copies");
    let numbers: Vec<u64> =
        picked.iter().map(|(read, _, _)| harness.read(*read, CopyContent::Data)).collect();
    let last = *numbers.last().expect("something was sent");
    harness.resync.durable(last, &mut harness.map, &mut harness.certain, Time::default()).unwrap();
    assert_eq!(harness.picks(), [], "its share of the time is not over");
    let until = Time::default().after(Duration::from_millis(500));
    assert_eq!(harness.resync.timeout(), Some(until));
    harness.map.clear(128..BLOCKS - 256);
    assert_eq!(harness.picks().len(), 4, "the last blocks don't wait");
    harness.resync.set_limit(None);
    assert_eq!(harness.resync.pace.copy_bytes(false), COPY_BYTES);
}

/// A disk that can't read these blocks.
struct BadDisk(Vec<u64>);

impl Harness {
    /// Copies all that can be read from such a disk at a moment, and gives how many reads that took.
    fn copy_from(&mut self, disk: &BadDisk, now: Time) -> usize {
        let order = Order::<u8>::new(512);
        let mut reads = 0;
        while let Some(action) = self.resync.pick(&self.map, &self.certain, (&order, None), false, now) {
            let Action::ReadCopy { read, range, digest } = action else { panic!("it asks for {action:?}") };
            reads += 1;
            let blocks = range.blocks(BlockSize::default());
            let content = match digest {
                _ if disk.0.iter().any(|bad| blocks.contains(bad)) => CopyContent::Failed,
                true => CopyContent::Digest([1; 32]),
                false => CopyContent::Data,
            };
            let Some((number, sent)) = self.resync.read_ended(read, content, now) else { continue };
            assert_eq!(sent, range);
            if digest {
                self.compared(number, [2; 32]).unwrap();
            }
            self.durable(number).unwrap();
        }
        reads
    }

    fn dirty(&self) -> Vec<u64> {
        (0..BLOCKS).filter(|block| self.map.is_dirty(*block)).collect()
    }

    fn unreadable(&self) -> Vec<u64> {
        let (ranges, is_all) = self.resync.unreadable();
        assert!(is_all);
        ranges.into_iter().flat_map(|range| range.blocks(BlockSize::default())).collect()
    }
}

#[test]
fn only_blocks_that_cant_be_read_stay_uncopied() {
    for are_certain in [true, false] {
        for bad in [vec![0], vec![300], vec![BLOCKS - 1], vec![299, 300, 301, 700], (512..768).collect()] {
            let mut harness = Harness::new();
            if are_certain {
                harness.certain.mark(0..BLOCKS);
            }
            let disk = BadDisk(bad);
            let reads = harness.copy_from(&disk, Time::default());
            assert_eq!((harness.dirty(), harness.unreadable()), (disk.0.clone(), disk.0.clone()));
            assert!(harness.resync.is_idle());
            // Each of them takes a chain of halves at the most.
            assert!(reads <= 64 + 20 * disk.0.len(), "{reads} reads for {} blocks", disk.0.len());
        }
    }
}

#[test]
fn a_block_that_cant_be_read_is_tried_again_alone_and_ever_more_seldom() {
    let mut harness = Harness::new();
    let disk = BadDisk(vec![300]);
    harness.copy_from(&disk, Time::default());
    let mut before = Time::default();
    for wait in [5, 10, 20, 40, 60, 60] {
        let due = harness.resync.timeout().expect("it is tried again");
        assert_eq!(due, before.after(Duration::from_secs(wait)));
        assert_eq!(harness.copy_from(&disk, Time(due.0 - Duration::from_millis(1))), 0);
        assert_eq!(harness.copy_from(&disk, due), 1);
        before = due;
    }
    let due = harness.resync.timeout().expect("it is tried again");
    assert_eq!(harness.copy_from(&BadDisk(vec![]), due), 1);
    assert_eq!((harness.dirty(), harness.unreadable()), (vec![], vec![]));
    assert_eq!(harness.resync.timeout(), None);
}

#[test]
fn a_write_to_a_block_that_cant_be_read_makes_it_be_copied_at_once() {
    let mut harness = Harness::new();
    harness.copy_from(&BadDisk(vec![300, 301]), Time::default());
    harness.resync.rewritten(&(300..301));
    harness.copy_from(&BadDisk(vec![301]), Time::default());
    assert_eq!((harness.dirty(), harness.unreadable()), (vec![301], vec![301]));
}

#[test]
fn a_read_that_failed_beside_a_write_to_its_block_is_made_again_at_once() {
    let mut harness = Harness::new();
    let disk = BadDisk(vec![300]);
    harness.copy_from(&disk, Time::default());
    let due = harness.resync.timeout().expect("it is tried again");
    let order = Order::<u8>::new(512);
    let pick = harness.resync.pick(&harness.map, &harness.certain, (&order, None), false, due);
    let Some(Action::ReadCopy { read, .. }) = pick else { panic!("it is read, and not {pick:?}") };
    harness.resync.rewritten(&(300..301));
    assert_eq!(harness.resync.read_ended(read, CopyContent::Failed, due), None);
    assert_eq!(harness.copy_from(&BadDisk(vec![]), due), 1);
    assert_eq!(harness.dirty(), Vec::<u64>::new());
}

#[test]
fn a_disk_that_reads_nothing_costs_bounded_memory_and_is_left_alone_between_attempts() {
    let blocks = 16 * BLOCKS;
    let mut harness = Harness::of(blocks);
    harness.resync.expected = Expected::Data;
    harness.certain.mark(0..blocks);
    let mut now = Time::default();
    for _ in 0..8 {
        harness.copy_from(&BadDisk((0..blocks).collect()), now);
        let due = harness.resync.timeout().expect("it is tried again");
        assert!(due >= now.after(Duration::from_secs(1)));
        let (ranges, is_all) = harness.resync.unreadable();
        assert!(!is_all && ranges.iter().map(|range| range.length / 4096).sum::<u64>() <= BLOCKS);
        now = due;
    }
    assert_eq!(harness.map.dirty_blocks(), blocks);
}
