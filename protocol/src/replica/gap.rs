//! Gap mode: while a resync makes the content illegal, what it was before is saved first, so that the replica can be
//! rolled back to it (P2).
//!
//! The gap begins with the announcement of a resync to a consistent replica, before any frame that follows a skipped
//! write, and ends with the commit. In it, every first overwrite of a block, by a copy or a live frame, waits until the
//! block's old content is durable in the layer of pre-images. What has been saved is also what differs from the
//! rollback point: a primary other than the one that resyncs must know of it (D3).

use super::{Action, FrameId, Replica, StateChange};
use crate::dirty_map::DirtyMap;
use crate::disk::dirty_map::Base;
use crate::disk::superblock::Superblock;
use crate::ranges::ByteRange;
use crate::units::{BlockSize, HostId};
use crate::wire::message::{Refusal, Refused};
use std::collections::VecDeque;

/// How many frames' blocks are saved together at most.
const SAVED_FRAMES: usize = 64;
/// How many bytes are saved together, unless a single frame has more.
const SAVED_BYTES: u64 = 8 << 20;

/// What happens when there is no room for pre-images.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SpacePolicy {
    /// The resync waits; the primary only marks.
    #[default]
    Pause,
    /// It goes on, and there is no way back.
    GoOn,
}

/// How saving ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Saved {
    /// Everything that was asked for is durable.
    Done,
    /// There is no room.
    Full,
    /// The disk failed.
    Failed,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Gap {
    /// Blocks with a pre-image: those that may differ from the rollback point.
    overwritten: DirtyMap,
    /// Frames whose turn has come and whose blocks are not saved yet.
    waiting: VecDeque<FrameId>,
    /// Frames whose blocks are being saved.
    saving: Option<(Vec<FrameId>, Vec<ByteRange>)>,
    /// The layer that is being made.
    pub(super) beginning: bool,
    /// Whether there was no room.
    pub(super) is_full: bool,
}

impl Gap {
    /// What was saved before a restart.
    pub(super) fn new(superblock: &Superblock, saved: &[ByteRange]) -> Self {
        let Superblock { volume, size_bytes, block_size, .. } = *superblock;
        let full = DirtyMap::full(volume, HostId::default(), size_bytes, block_size);
        let mut overwritten = full.clean(Base::default());
        for range in saved {
            overwritten.mark(range.blocks(block_size));
        }
        Self { overwritten, waiting: VecDeque::new(), saving: None, beginning: false, is_full: false }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.saving.is_none() && !self.beginning
    }

    /// Whether this range may be overwritten.
    fn has(&self, range: ByteRange, block_size: BlockSize) -> bool {
        self.overwritten.split(range.blocks(block_size)).all(|(is_saved, _)| is_saved)
    }

    /// What is missing of this range, in whole blocks.
    fn missing(&self, range: ByteRange, block_size: BlockSize, size_bytes: u64) -> Vec<ByteRange> {
        let parts = self.overwritten.split(range.blocks(block_size));
        parts
            .filter(|(is_saved, _)| !is_saved)
            .map(|(_, blocks)| ByteRange::of_blocks(blocks, block_size, size_bytes))
            .collect()
    }

    /// Ranges that may differ from the rollback point.
    pub(super) fn overwritten(
        &self,
        block_size: BlockSize,
        size_bytes: u64,
    ) -> impl Iterator<Item = ByteRange> {
        runs(&self.overwritten, block_size, size_bytes)
    }
}

/// The dirty ranges of a map.
pub(super) fn runs(
    map: &DirtyMap,
    block_size: BlockSize,
    size_bytes: u64,
) -> impl Iterator<Item = ByteRange> {
    let mut at = 0;
    std::iter::from_fn(move || {
        let run = map.next_dirty(at, u64::MAX)?;
        at = run.end;
        Some(ByteRange::of_blocks(run, block_size, size_bytes))
    })
}

impl Replica {
    /// Whether overwriting must be preceded by saving.
    pub(super) fn is_in_gap(&self) -> bool {
        self.superblock.gap != 0
    }

    /// A frame's turn has come in a gap: it is applied when its blocks are saved.
    pub(super) fn apply_when_saved(&mut self, frame: FrameId, range: ByteRange) {
        if self.gap.has(range, self.superblock.block_size) {
            self.apply(frame);
        } else {
            self.gap.waiting.push_back(frame);
        }
    }

    /// Saves the blocks of the frames that wait, many at once.
    pub(super) fn start_saving(&mut self) {
        if self.gap.saving.is_some() || self.gap.waiting.is_empty() || self.gap.is_full {
            return;
        }
        let (block_size, size_bytes) = (self.superblock.block_size, self.superblock.size_bytes);
        let (mut frames, mut ranges, mut bytes) = (Vec::new(), Vec::<ByteRange>::new(), 0);
        while let Some(frame) = self.gap.waiting.front().copied() {
            let missing = self.gap.missing(self.items[&frame].body.range(), block_size, size_bytes);
            let more: u64 = missing.iter().map(|range| range.length).sum();
            if frames.len() >= SAVED_FRAMES || !frames.is_empty() && bytes + more > SAVED_BYTES {
                break;
            }
            self.gap.waiting.pop_front();
            frames.push(frame);
            bytes += more;
            ranges.extend(missing);
        }
        // Two frames may touch the same block.
        ranges.sort_unstable_by_key(|range| range.offset);
        let mut merged: Vec<ByteRange> = Vec::new();
        for range in ranges {
            match merged.last_mut().filter(|last| range.offset <= last.end()) {
                Some(last) => *last = ByteRange::between(last.offset, last.end().max(range.end())),
                None => merged.push(range),
            }
        }
        if merged.is_empty() {
            return frames.into_iter().for_each(|frame| self.apply(frame));
        }
        self.actions.push_back(Action::SavePreImages { ranges: merged.clone() });
        self.gap.saving = Some((frames, merged));
    }

    /// The layer that [`Action::BeginLayer`] asked for is there, durably, or can't be had.
    pub fn handle_layer_begun(&mut self, begun: Saved) {
        assert!(std::mem::take(&mut self.gap.beginning), "a layer begins once");
        let gap = match begun {
            Saved::Done => self.superblock.layers + 1,
            Saved::Full if self.settings.space == SpacePolicy::GoOn => 0,
            Saved::Full => return self.pause(),
            Saved::Failed => return self.fail(),
        };
        self.gap = Gap::new(&self.superblock, &[]);
        self.record_begin(gap);
        self.go_on();
    }

    /// The pre-images that [`Action::SavePreImages`] asked for are durable, or can't be saved.
    pub fn handle_saved(&mut self, saved: Saved) {
        let (frames, ranges) = self.gap.saving.take().expect("pre-images are saved once");
        if !self.is_in_gap() {
            // A commit has ended the gap, so they may be applied however saving ended.
            frames.into_iter().for_each(|frame| self.apply(frame));
            return self.go_on();
        }
        match saved {
            Saved::Done => {
                for range in ranges {
                    self.gap.overwritten.mark(range.blocks(self.superblock.block_size));
                }
                frames.into_iter().for_each(|frame| self.apply(frame));
            }
            Saved::Full if self.settings.space == SpacePolicy::GoOn => {
                // The frames wait until it is recorded that there is no way back.
                frames.into_iter().rev().for_each(|frame| self.gap.waiting.push_front(frame));
                self.gap.is_full = true;
                self.change_state(StateChange::GiveRollbackUp, None);
            }
            Saved::Full => {
                self.forget(frames);
                return self.pause();
            }
            Saved::Failed => {
                self.forget(frames);
                return self.fail();
            }
        }
        self.go_on();
    }

    /// The operator made room, or wants resyncs to go on without.
    pub fn handle_room(&mut self, space: SpacePolicy) {
        self.settings.space = space;
        self.gap.is_full = false;
    }

    /// A commit has ended the gap: what waited for pre-images is applied without.
    pub(super) fn end_gap(&mut self, layer: u64) {
        let ended = std::mem::replace(&mut self.gap, Gap::new(&self.superblock, &[]));
        self.gap.saving = ended.saving;
        ended.waiting.into_iter().for_each(|frame| self.apply(frame));
        if layer != 0 {
            self.actions.push_back(Action::EndLayer(layer));
        }
    }

    /// There is no way back any more: what waited for pre-images is applied without, and the layer can go.
    pub(super) fn rollback_is_given_up(&mut self, layer: u64) {
        self.gap.is_full = false;
        let waiting = std::mem::take(&mut self.gap.waiting);
        waiting.into_iter().for_each(|frame| self.apply(frame));
        self.actions.push_back(Action::EndLayer(layer));
    }

    /// Gives up the frames that wait for pre-images, when their session ends.
    pub(super) fn drop_unsaved(&mut self) {
        let waiting: Vec<FrameId> = self.gap.waiting.drain(..).collect();
        self.forget(waiting);
    }

    /// There is no room: the primary goes on without this replica, and marks (P2, W7).
    fn pause(&mut self) {
        self.gap.is_full = true;
        self.actions.push_back(Action::Send(self.no_room().into()));
        self.unlink();
    }

    pub(super) fn no_room(&self) -> Refused {
        let text = "the replica has no room for pre-images; raise `pre_images` there, or set `when_full = \"go-on\"`";
        Refused { refusal: Refusal::Space, text: text.into() }
    }
}
