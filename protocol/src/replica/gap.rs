//! Gap mode: while a resync makes the content illegal, what it was before is saved first, so that the replica can be
//! rolled back to it (P2).
//!
//! The gap begins with the announcement of a resync to a consistent replica, before any frame that follows a skipped
//! write, and ends with the commit. In it, every first overwrite of a block, by a copy or a live frame, waits until the
//! block's old content is durable in the layer of pre-images. What has been saved is also what differs from the
//! rollback point: a primary other than the one that resyncs must know of it (D3).
//!
//! What a host had before it gave its content up is kept in a layer of its own, the *history* (L6), beyond the commit:
//! every first overwrite is saved into it, until the operator has no use for it any more or there is no room. The first
//! resync after that shares its layer. A primary that comes back with writes which the new one lacks keeps the layer of
//! its resync as history (L3). What a primary overwrites to whom nobody here has agreed is kept in the same way
//! ([`consent`]), and is not given up for want of room, unless the operator chose that resyncs go on then.

use super::resolve::Keep;
use super::{Action, FrameId, Replica, StateChange, consent};
use crate::dirty_map::DirtyMap;
use crate::disk::dirty_map::Base;
use crate::disk::superblock::Superblock;
use crate::layers::{LayerId, Purpose};
use crate::planted::{Bug, planted};
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
    /// The content can't be read: nobody can be led back to it.
    Unreadable,
    /// The disk failed.
    Failed,
}

/// What is being saved.
#[derive(Debug)]
struct Saving {
    /// The frames that wait for it.
    frames: Vec<FrameId>,
    ranges: Vec<ByteRange>,
    /// The layer for an undo when it was begun.
    undo: Option<LayerId>,
}

/// What is saved of the content before it is overwritten.
#[derive(Debug)]
pub(super) struct Gap {
    /// Blocks with a pre-image: those that may differ from the rollback point.
    overwritten: DirtyMap,
    /// Blocks with a pre-image in the history.
    kept: DirtyMap,
    /// Frames whose turn has come and whose blocks are not saved yet.
    waiting: VecDeque<FrameId>,
    saving: Option<Saving>,
    /// What the layer is for that is being made.
    beginning: Option<Purpose>,
    /// Whether saving is held: there was no room, or it is being recorded that there is no way back.
    pub(super) is_full: bool,
    /// Whether there was no room at the last attempt.
    pub(super) was_full: bool,
    /// Whether it is being recorded that the history is given up.
    is_forgetting: bool,
}

impl Gap {
    /// What was saved before a restart.
    pub(super) fn new(superblock: &Superblock, saved: &[ByteRange], kept: &[ByteRange]) -> Self {
        Self {
            overwritten: map_of(superblock, saved),
            kept: map_of(superblock, kept),
            waiting: VecDeque::new(),
            saving: None,
            beginning: None,
            is_full: false,
            was_full: false,
            is_forgetting: false,
        }
    }

    pub(super) fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.saving.is_none() && self.beginning.is_none()
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

/// A map of these ranges.
fn map_of(superblock: &Superblock, ranges: &[ByteRange]) -> DirtyMap {
    let Superblock { volume, size_bytes, block_size, .. } = *superblock;
    let mut map = DirtyMap::full(volume, HostId::default(), size_bytes, block_size).clean(Base::default());
    for range in ranges {
        map.mark(range.blocks(block_size));
    }
    map
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
    /// Whether only rolling back gives a legal image.
    pub(super) fn is_in_gap(&self) -> bool {
        self.superblock.layers.rollback().is_some()
    }

    /// Whether overwriting must be preceded by saving.
    pub(super) fn saves(&self) -> bool {
        self.is_in_gap() || self.superblock.layers.undo().is_some() && !planted(Bug::KeepUntilCommit)
    }

    /// What must be saved before this range is overwritten, in whole blocks; some may come twice.
    fn missing(&self, range: ByteRange) -> Vec<ByteRange> {
        let Superblock { block_size, size_bytes, ref layers, .. } = self.superblock;
        let rollback = layers.rollback().map(|_| &self.gap.overwritten);
        let undo = layers.undo().map(|_| &self.gap.kept);
        let parts = rollback.into_iter().chain(undo);
        parts
            .flat_map(|map| map.split(range.blocks(block_size)))
            .filter(|(is_saved, _)| !is_saved)
            .map(|(_, blocks)| ByteRange::of_blocks(blocks, block_size, size_bytes))
            .collect()
    }

    /// A frame's turn has come where overwriting is preceded by saving: it is applied when its blocks are saved.
    pub(super) fn apply_when_saved(&mut self, frame: FrameId, range: ByteRange) {
        if self.missing(range).is_empty() {
            self.apply(frame);
        } else {
            self.gap.waiting.push_back(frame);
        }
    }

    /// Saves the blocks of the frames that wait, many at once.
    pub(super) fn start_saving(&mut self) {
        let is_held = self.gap.is_full || self.gap.is_forgetting;
        if self.gap.saving.is_some() || self.gap.waiting.is_empty() || is_held {
            return;
        }
        let (mut frames, mut ranges, mut bytes) = (Vec::new(), Vec::<ByteRange>::new(), 0);
        while let Some(frame) = self.gap.waiting.front().copied() {
            let missing = self.missing(self.items[&frame].body.range());
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
        self.gap.saving = Some(Saving { frames, ranges: merged, undo: self.superblock.layers.undo() });
    }

    pub(super) fn begin_layer(&mut self, purpose: Purpose) {
        self.gap.beginning = Some(purpose);
        self.actions.push_back(Action::BeginLayer(self.position));
    }

    /// The layer that [`Action::BeginLayer`] asked for is there, durably, or can't be had.
    pub fn handle_layer_begun(&mut self, begun: Saved) {
        let purpose = self.gap.beginning.take().expect("a layer begins once");
        self.gap.was_full &= begun != Saved::Done;
        match purpose {
            Purpose::Rollback => self.rollback_layer_begun(begun),
            Purpose::Undo => self.undo_layer_begun(begun),
        }
    }

    /// The layer for a greeting is there, unless that is gone: then the next layer takes its number.
    fn undo_layer_begun(&mut self, begun: Saved) {
        let greeted = self.greeting.as_ref().map(|hello| consent::keep(&self.superblock, hello.fence));
        let is_wanted = greeted == Some(Keep::NewLayer);
        match begun {
            Saved::Done if is_wanted => {
                self.change_state(StateChange::Keep(self.superblock.layers.next()), None)
            }
            Saved::Full if is_wanted && self.settings.space == SpacePolicy::GoOn => self.agree(),
            Saved::Full if is_wanted => {
                self.greeting = None;
                self.pause(begun);
            }
            Saved::Done | Saved::Full => {}
            Saved::Failed | Saved::Unreadable => self.fail(),
        }
        self.go_on();
    }

    /// This layer is the history from now on.
    pub(super) fn keeps(&mut self, layer: LayerId) {
        let Superblock { block_size, size_bytes, ref layers, .. } = self.superblock;
        let saved: Vec<ByteRange> = match layers.rollback() == Some(layer) {
            true => runs(&self.gap.overwritten, block_size, size_bytes).collect(),
            false => Vec::new(),
        };
        self.gap.kept = map_of(&self.superblock, &saved);
    }

    fn rollback_layer_begun(&mut self, begun: Saved) {
        let rollback = match begun {
            Saved::Done => Some(self.superblock.layers.next()),
            Saved::Full if self.superblock.layers.undo().is_some() && !self.must_keep() => {
                // What was kept makes room; then the resync that was announced begins.
                if let Some(link) = &mut self.link {
                    link.announced = true;
                }
                return self.agree();
            }
            Saved::Full if self.settings.space == SpacePolicy::GoOn => None,
            Saved::Full => return self.pause(begun),
            Saved::Failed | Saved::Unreadable => return self.fail(),
        };
        self.gap.overwritten = map_of(&self.superblock, &[]);
        let source = self.link.as_ref().map(|link| link.fence.holder);
        let is_undelivered =
            source.is_some_and(|host| self.undelivered_bytes(host).is_some_and(|bytes| bytes > 0));
        // What the operator gave up and then forgot is not kept once more.
        let may_keep = self.superblock.layers.undo().is_none() && !self.superblock.is_on_its_own();
        let keep = rollback.is_some() && may_keep && is_undelivered;
        if keep {
            self.gap.kept = map_of(&self.superblock, &[]);
        }
        self.record_begin(rollback, keep);
        self.go_on();
    }

    /// The layer that a resync shares with the history, where nothing was overwritten since that began.
    pub(super) fn unused_history(&self) -> Option<LayerId> {
        self.superblock.layers.undo().filter(|_| self.gap.kept.is_clean())
    }

    /// How much this host wrote as a primary that another one may lack, in bytes and at most; nothing where it does not
    /// know that it wrote anything.
    #[must_use]
    pub fn undelivered_bytes(&self, host: HostId) -> Option<u64> {
        let Superblock { block_size, size_bytes, .. } = self.superblock;
        let marked = runs(self.maps.get(&host)?, block_size, size_bytes);
        let ranges: Vec<ByteRange> = marked.chain(self.log.suspects(size_bytes)).collect();
        let map = map_of(&self.superblock, &ranges);
        Some((map.dirty_blocks() * block_size.bytes()).min(size_bytes))
    }

    /// The operator agrees to whom this host follows. What was kept for undo is given up, durably first; nothing waits for
    /// that but what must be saved.
    pub fn agree(&mut self) {
        let has_reason = self.superblock.layers.undo().is_some() || !consent::is_given(&self.superblock);
        if has_reason && !std::mem::replace(&mut self.gap.is_forgetting, true) {
            self.change_state(StateChange::Forget, None);
        }
        self.go_on();
    }

    /// Whether nothing may be overwritten that is not in the history: a resync pauses rather.
    #[must_use]
    pub fn must_keep(&self) -> bool {
        consent::is_awaited(&self.superblock)
            && self.settings.space == SpacePolicy::Pause
            && !planted(Bug::ForgetUnagreed)
    }

    /// The pre-images that [`Action::SavePreImages`] asked for are durable, or can't be saved.
    pub fn handle_saved(&mut self, saved: Saved) {
        let Saving { frames, ranges, undo } = self.gap.saving.take().expect("pre-images are saved once");
        if self.failed {
            return self.forget(frames);
        }
        if !self.saves() {
            // A commit has ended the gap, so they may be applied however saving ended.
            frames.into_iter().for_each(|frame| self.apply(frame));
            return self.go_on();
        }
        match saved {
            Saved::Done => {
                self.gap.was_full = false;
                for range in ranges {
                    let blocks = range.blocks(self.superblock.block_size);
                    self.gap.overwritten.mark(blocks.clone());
                    self.gap.kept.mark(blocks);
                }
                frames.into_iter().for_each(|frame| self.apply(frame));
            }
            Saved::Unreadable if planted(Bug::UnreadableEndsReplica) => {
                self.forget(frames);
                return self.fail();
            }
            // What was kept was given up meanwhile, which makes room.
            Saved::Full | Saved::Unreadable if self.superblock.layers.undo() != undo => {
                self.wait_again(frames)
            }
            Saved::Full | Saved::Unreadable if self.must_keep() => {
                self.forget(frames);
                return self.pause(saved);
            }
            Saved::Full | Saved::Unreadable
                if undo.is_some() && undo != self.superblock.layers.rollback() =>
            {
                self.wait_again(frames);
                return self.agree();
            }
            // Only what overwrites a sector that can't be read makes it readable.
            _ if saved == Saved::Unreadable
                || self.settings.space == SpacePolicy::GoOn && saved == Saved::Full =>
            {
                // The frames wait until it is recorded that there is no way back.
                self.wait_again(frames);
                self.gap.is_full = true;
                self.change_state(StateChange::GiveRollbackUp, None);
            }
            Saved::Unreadable => unreachable!("it was matched above"),
            Saved::Full => {
                self.forget(frames);
                return self.pause(saved);
            }
            Saved::Failed => {
                self.forget(frames);
                return self.fail();
            }
        }
        self.go_on();
    }

    /// Frames whose blocks could not be saved are the next ones again.
    fn wait_again(&mut self, frames: Vec<FrameId>) {
        frames.into_iter().rev().for_each(|frame| self.gap.waiting.push_front(frame));
    }

    /// The operator made room, or wants resyncs to go on without.
    pub fn handle_room(&mut self, space: SpacePolicy) {
        self.settings.space = space;
        (self.gap.is_full, self.gap.was_full) = (false, false);
    }

    /// A commit has ended the gap: what waited for pre-images is applied without.
    pub(super) fn end_gap(&mut self, layer: Option<LayerId>) {
        self.gap.overwritten = map_of(&self.superblock, &[]);
        self.layer_is_unused(layer);
    }

    /// What was kept is given up: its layer can go, unless it is that of the gap.
    pub(super) fn history_is_forgotten(&mut self, layer: Option<LayerId>) {
        self.gap.is_forgetting = false;
        self.gap.kept = map_of(&self.superblock, &[]);
        self.layer_is_unused(layer);
    }

    /// A layer has lost one of its uses. What waited only for it is applied without.
    fn layer_is_unused(&mut self, layer: Option<LayerId>) {
        if !self.saves() {
            let waiting = std::mem::take(&mut self.gap.waiting);
            waiting.into_iter().for_each(|frame| self.apply(frame));
        }
        if let Some(layer) = layer.filter(|layer| !self.superblock.layers.contains(*layer)) {
            self.actions.push_back(Action::EndLayer(layer));
        }
    }

    /// There is no way back any more: what waited for pre-images is applied without, and the layer can go.
    pub(super) fn rollback_is_given_up(&mut self, layer: Option<LayerId>) {
        self.gap.is_full = false;
        self.layer_is_unused(layer);
    }

    /// Gives up the frames that wait for pre-images, when their session ends.
    pub(super) fn drop_unsaved(&mut self) {
        let waiting: Vec<FrameId> = self.gap.waiting.drain(..).collect();
        self.forget(waiting);
    }

    /// What must be saved can't be: the primary goes on without this replica, and marks (P2, W7).
    fn pause(&mut self, saved: Saved) {
        (self.gap.is_full, self.gap.was_full) = (true, true);
        let text = match saved {
            Saved::Unreadable => {
                "the replica must keep what would be overwritten, and can't read it; `blockmirror status` there tells \
                 what leads on"
            }
            Saved::Done | Saved::Full | Saved::Failed => {
                "the replica has no room for pre-images; `blockmirror status` there tells where, and it goes on by \
                 itself when there is some"
            }
        };
        let refused = Refused { refusal: Refusal::Space, text: text.into() };
        self.actions.push_back(Action::Send(refused.into()));
        self.unlink();
        self.note_behind();
    }
}
