//! What a primary sends, taken in: greetings, which drain the session before, and frames, which are checked before any
//! of them is believed.
//!
//! A greeting is compared with this copy's history first (L3): where this host wrote what the primary's lineage does not
//! contain, as a primary that went on alone did, nothing is overwritten until the operator decides. Before a greeting is
//! answered whose holder nobody here has agreed to, there is a layer that keeps what it overwrites ([`consent`]).

use super::consent;
use super::gap::runs;
use super::resolve::Keep;
use super::{
    Action, COPY_LIMIT_BYTES, Copies, DIGEST_COST_BYTES, DIGEST_LIMIT, DIGEST_LIMIT_BYTES, FrameId, Item,
    Link, Marker, PrimaryMisbehaved, Replica, StateChange,
};
use crate::disk::superblock::{LINEAGE_LIMIT, Superblock, may_number};
use crate::layers::Purpose;
use crate::lineage::{self, Relation};
use crate::planted::{Bug, planted};
use crate::ranges::ByteRange;
use crate::terms::{DataState, Fence, Mode};
use crate::units::{Epoch, Sequence};
use crate::wire::FRAME_COST_BYTES;
use crate::wire::message::{
    FEATURES, Hello, Member, Message, RANGES_PER_UNION, Refusal, Refused, Superseded, Union, Welcome,
};
use crate::wire::{Body, FrameHeader, VERSIONS};
use std::collections::VecDeque;

/// No more ranges than this are told apart in a greeting; beyond it, any block may differ.
const UNION_LIMIT: usize = 1 << 20;

impl Replica {
    /// Takes a greeting in.
    ///
    /// # Errors
    /// [`PrimaryMisbehaved`] where its numbers are out of bounds; the session that is open goes on.
    pub(super) fn greet(&mut self, hello: Hello) -> Result<(), PrimaryMisbehaved> {
        self.check_numbers(&hello)?;
        if let Some(answer) = self.rejection(&hello) {
            self.note_rejected(&hello);
            self.actions.push_back(Action::Send(answer));
            return Ok(());
        }
        self.unlink();
        self.greeting = Some(hello);
        self.go_on();
        Ok(())
    }

    /// Whether the numbers of a greeting leave room for those of the primaries after this one. An empty copy has nothing
    /// to lose, and may be of a volume that was promoted many times.
    ///
    /// # Errors
    /// [`PrimaryMisbehaved`] where they don't.
    pub fn check_numbers(&self, hello: &Hello) -> Result<(), PrimaryMisbehaved> {
        let is_new = self.superblock.data == DataState::Empty && hello.fence.is_in_bounds();
        if !is_new && !self.superblock.fence.may_become(hello.fence) {
            return Err(PrimaryMisbehaved("its fence is further ahead than promotions go"));
        }
        if !may_number(hello.fence, hello.session) {
            return Err(PrimaryMisbehaved("its session's number is none of its fence's"));
        }
        if !Member::are_sound(&hello.members) {
            return Err(PrimaryMisbehaved("it tells of more hosts, names or addresses than a volume has"));
        }
        if hello.lineage.len().max(hello.ends.len()) > LINEAGE_LIMIT {
            return Err(PrimaryMisbehaved("its lineage is longer than any"));
        }
        Ok(())
    }

    /// Whether this copy may be told of an epoch.
    pub(super) fn may_follow(&self, epoch: Epoch) -> bool {
        lineage::may_follow(self.superblock.position.epoch.max(self.position.epoch), epoch)
    }

    /// What a greeting is answered with that is not taken. One that is taken takes the place of the session that is open.
    #[must_use]
    pub fn rejection(&self, hello: &Hello) -> Option<Message> {
        let refused = self.objection(hello).map(Message::from);
        refused.or_else(|| self.supersedes(hello.fence).map(Message::from))
    }

    /// A greeting was answered with a rejection. A primary gives its sessions higher and higher numbers, durably: one that
    /// gives an old one was set back to what it was before (X4). While a later session is open, it is one that came late.
    pub fn note_rejected(&mut self, hello: &Hello) {
        let is_of_before =
            hello.fence == self.superblock.fence && hello.session <= self.last_session && self.link.is_none();
        self.uncommitted.primary_went_back |= is_of_before && !planted(Bug::IgnoreEnds);
    }

    /// Why a greeting is refused, if it is. One from a host that another one was promoted after has another answer.
    #[must_use]
    pub fn objection(&self, hello: &Hello) -> Option<Refused> {
        let Superblock { volume, size_bytes, block_size, .. } = self.superblock;
        let refused = |refusal, text: &str| Some(Refused { refusal, text: text.into() });
        if hello.versions.0 > VERSIONS.1 || hello.versions.1 < VERSIONS.0 {
            return refused(Refusal::Version, "no common protocol version; upgrade the older agent");
        }
        if (hello.volume, hello.size_bytes, hello.block_size) != (volume, size_bytes, block_size) {
            return refused(Refusal::Unrelated, "the volume's identity, size or block size differs here");
        }
        if hello.fence.is_refused_by(self.superblock.fence) {
            // It is told so, whatever else there is to say, and becomes a replica (L5); whose content counts is decided
            // when another primary greets.
            return None;
        }
        if self.failed {
            return refused(Refusal::Backing, "the replica's backing failed; see the replica's log");
        }
        if hello.session <= self.last_session {
            return refused(Refusal::Other, "the session is not newer than the last one");
        }
        if self.superblock.data == DataState::Empty && !planted(Bug::EmptyObjects) {
            // Whatever its generations say, nothing of them is here any more (L3).
            return None;
        }
        match lineage::relation(&self.superblock.lineage, &hello.lineage) {
            Relation::MineIsNewer | Relation::Forked(_) => refused(
                Refusal::SplitBrain,
                "split brain: this host wrote alone after the two were last in sync",
            ),
            Relation::Same | Relation::TheirsIsNewer if hello.ends.lacks(self.position) => refused(
                Refusal::Beyond,
                "split brain: the primary was recovered from an older copy, or set back, and lacks what this host has",
            ),
            Relation::Same | Relation::TheirsIsNewer | Relation::Unrelated => None,
        }
    }

    /// Whether a greeting of this fence comes from a host that another one was promoted after (L5).
    #[must_use]
    pub fn supersedes(&self, fence: Fence) -> Option<Superseded> {
        let newest = self.superblock.fence;
        fence.is_refused_by(newest).then_some(Superseded { fence: newest })
    }

    /// Ends the session that is open, if one is. Nothing of one that had ended waits any longer either.
    pub(super) fn unlink(&mut self) {
        let queued = self.link.take().map(|link| link.queue).unwrap_or_default();
        // The ends of epochs were dropped on arrival.
        let held = queued
            .into_iter()
            .filter(|(_, body)| !matches!(body, Body::EpochEnd { .. } | Body::Generation { .. }));
        self.actions.extend(held.map(|(frame, _)| Action::Drop(frame)));
        for frame in self.order.drop_waiting() {
            self.items.remove(&frame);
            self.actions.push_back(Action::Drop(frame));
        }
        self.drop_unlogged();
        self.drop_unsaved();
        self.commit = None;
    }

    /// Answers a greeting once everything of the old session has ended.
    pub(super) fn welcome(&mut self) {
        if !self.is_idle() {
            return;
        }
        let Some(hello) = self.greeting.take() else { return };
        if let Some(answer) = self.rejection(&hello) {
            // What was being recorded when it came may have changed the lineage (L3).
            self.actions.push_back(Action::Send(answer));
            return;
        }
        let keep = consent::keep(&self.superblock, hello.fence);
        let agrees = keep == Keep::Nothing;
        let is_news = hello.fence != self.superblock.fence || self.superblock.released;
        if is_news || agrees && !consent::is_given(&self.superblock) {
            let follow = StateChange::Follow { fence: hello.fence, agrees };
            self.promise.give_up();
            self.greeting = Some(hello);
            return self.change_state(follow, None);
        }
        match keep {
            Keep::NewLayer => {
                self.greeting = Some(hello);
                return self.begin_layer(Purpose::Undo);
            }
            Keep::Layer(layer) if Some(layer) != self.superblock.layers.undo() => {
                self.greeting = Some(hello);
                return self.change_state(StateChange::Keep(layer), None);
            }
            Keep::Layer(_) | Keep::Nothing => {}
        }
        if self.superblock.mode != Mode::Async && hello.lineage.first() != self.superblock.lineage.first() {
            // Something was replied without this replica, which begins a generation (L1).
            self.greeting = Some(hello);
            return self.change_state(StateChange::Behind, None);
        }
        let is_behind = |told| hello.ends.iter().all(|(_, end)| end <= told);
        let is_told_more = hello.fence == self.superblock.source
            && self.uncommitted.told != Epoch(0)
            && is_behind(self.uncommitted.told);
        self.uncommitted.primary_went_back |= is_told_more && !planted(Bug::IgnoreEnds);
        self.log.is_wanted = hello.members.len() > 2 && !planted(Bug::TakeForEqual);
        self.last_session = hello.session;
        self.order.widen_sector(hello.sector_bytes.clamp(512, 1 << 16).next_power_of_two().into());
        self.marker = Marker { durable: self.marker.durable, is_told: true, ..Marker::default() };
        // Where there was no room, there may be some by now; the primary greets less often when there is none.
        self.gap.is_full = false;
        self.link = Some(Link {
            session: hello.session,
            stream: hello.stream,
            generation: hello.lineage.first().copied().unwrap_or_default(),
            generation_came: false,
            announced: false,
            release: None,
            beginning: false,
            mode: hello.mode,
            fence: hello.fence,
            received: Sequence(0),
            receipt: Sequence(0),
            open: None,
            closed: Epoch(0),
            ended: None,
            queue: VecDeque::new(),
            live_under_way: 0,
            live_bytes: 0,
            digests: 0,
            fetches: 0,
            durable: Epoch(0),
            copies: Copies::default(),
            resync: None,
        });
        let welcome = Welcome {
            version: VERSIONS.1.min(hello.versions.1),
            features: hello.features & FEATURES,
            session: hello.session,
            copy: self.superblock.copy,
            data: self.superblock.data,
            can_roll_back: self.is_in_gap(),
            source: self.superblock.source,
            mark: self.mark(),
            fence: self.superblock.fence,
            lineage: self.superblock.lineage.clone(),
            sector_bytes: self.settings.sector_bytes,
            window_bytes: self.settings.window_bytes,
        };
        self.actions.push_back(Action::Send(welcome.into()));
        self.send_union(hello.fence);
    }

    /// Says what may differ here from what the primary has: blocks that this host wrote as primary and that one lacks,
    /// extents that were active here (D3, D5), and what another primary's resync overwrote.
    fn send_union(&mut self, primary: Fence) {
        let Superblock { block_size, size_bytes, source, .. } = self.superblock;
        let mut ranges = self.log.suspects(size_bytes);
        if let Some(map) = self.maps.get(&primary.holder) {
            ranges.extend(runs(map, block_size, size_bytes).take(UNION_LIMIT + 1));
        }
        if self.is_in_gap() && source != primary {
            ranges.extend(self.gap.overwritten(block_size, size_bytes).take(UNION_LIMIT + 1));
        }
        if ranges.len() > UNION_LIMIT || self.uncommitted.primary_went_back {
            ranges = vec![ByteRange::new(0, size_bytes)];
        }
        let mut parts = ranges.chunks(RANGES_PER_UNION).peekable();
        if parts.peek().is_none() {
            self.actions.push_back(Action::Send(Union { ranges: Vec::new(), last: true }.into()));
        }
        while let Some(part) = parts.next() {
            let last = parts.peek().is_none();
            self.actions.push_back(Action::Send(Union { ranges: part.to_vec(), last }.into()));
        }
    }

    /// Takes a frame in. Says whether its payload is needed.
    pub(super) fn accept(&mut self, frame: FrameId, header: FrameHeader) -> Result<bool, PrimaryMisbehaved> {
        if planted(Bug::OldFrameLands) && self.link.as_ref().is_some_and(|link| link.session > header.session)
        {
            return Ok(self.land(frame, header.body));
        }
        let is_ahead = match header.body {
            Body::Write { epoch, .. } | Body::Zero { epoch, .. } | Body::EpochEnd { epoch, .. } => {
                !self.may_follow(epoch)
            }
            _ => false,
        };
        let Some(link) = self.link.as_mut().filter(|link| link.session == header.session) else {
            return Ok(false);
        };
        if is_ahead {
            return Err(PrimaryMisbehaved("an epoch is further ahead than runs go"));
        }
        if header.stream != link.stream {
            return Ok(false);
        }
        if header.body.range().end() > self.superblock.size_bytes {
            return Err(PrimaryMisbehaved("a frame reaches past the volume's end"));
        }
        // Ends of epochs take no room in the window, but there is at most one for each frame that does.
        if link.queue.len() as u64 * FRAME_COST_BYTES > 2 * self.settings.window_bytes {
            return Err(PrimaryMisbehaved("it sent more frames than the window holds"));
        }
        match header.body {
            Body::Write { epoch, sequence, .. } | Body::Zero { epoch, sequence, .. } => {
                link.live_bytes += header.body.payload_bytes() + FRAME_COST_BYTES;
                if link.live_bytes > self.settings.window_bytes {
                    return Err(PrimaryMisbehaved("it sent more than the window holds"));
                }
                if !link.is_open(epoch) || sequence < link.received {
                    return Err(PrimaryMisbehaved("a frame came outside its epoch or out of order"));
                }
                link.received = sequence;
                link.queue.push_back((frame, header.body));
                if self.superblock.data == DataState::Inconsistent {
                    self.uncommitted.told = self.uncommitted.told.max(epoch);
                }
                Ok(true)
            }
            Body::EpochEnd { epoch, cut, .. } => {
                if !link.is_open(epoch) {
                    return Err(PrimaryMisbehaved("an epoch ended that was not open"));
                }
                (link.open, link.closed) = (None, epoch);
                link.queue.push_back((frame, header.body));
                if cut {
                    self.part();
                }
                Ok(false)
            }
            Body::Generation { .. } => {
                if link.open.is_some() {
                    return Err(PrimaryMisbehaved("a generation began within an epoch"));
                }
                link.queue.push_back((frame, header.body));
                Ok(false)
            }
            Body::Digest { .. } => {
                link.digests += 1;
                if link.digests > DIGEST_LIMIT {
                    return Err(PrimaryMisbehaved("it compares more at once than agreed"));
                }
                link.queue.push_back((frame, header.body));
                Ok(true)
            }
            Body::Copy { number, .. } | Body::CopyZero { number, .. } => {
                if self.superblock.data == DataState::Consistent {
                    return Err(PrimaryMisbehaved("it sent a copy without announcing a resync"));
                }
                link.copies.begin(number)?;
                link.copies.under_way_bytes += header.body.weight_bytes();
                if link.copies.under_way_bytes > COPY_LIMIT_BYTES {
                    return Err(PrimaryMisbehaved("it sent more copies than agreed"));
                }
                self.admit(frame, header.body);
                Ok(true)
            }
            Body::CopyDigest { number, range } => {
                if self.superblock.data == DataState::Consistent {
                    return Err(PrimaryMisbehaved("it compares for a resync that it did not announce"));
                }
                link.copies.begin(number)?;
                link.copies.digest_bytes += range.length + DIGEST_COST_BYTES;
                if link.copies.digest_bytes > DIGEST_LIMIT_BYTES {
                    return Err(PrimaryMisbehaved("it asked for more digests than agreed"));
                }
                self.admit(frame, header.body);
                Ok(true)
            }
            Body::Content { .. }
            | Body::ContentZero { .. }
            | Body::Fetched { .. }
            | Body::FetchedZero { .. } => Err(PrimaryMisbehaved("it sent content that nobody asked for")),
        }
    }

    /// Writes a live frame of an older session: [`Bug::OldFrameLands`].
    fn land(&mut self, frame: FrameId, body: Body) -> bool {
        let is_write = matches!(body, Body::Write { .. } | Body::Zero { .. });
        if let Some(link) = self.link.as_mut().filter(|_| is_write) {
            link.live_under_way += 1;
            link.live_bytes += body.payload_bytes() + FRAME_COST_BYTES;
            self.admit(frame, body);
        }
        is_write
    }

    pub(super) fn admit(&mut self, frame: FrameId, body: Body) {
        let session = self.link.as_ref().expect("frames are admitted in a session").session;
        self.items.insert(frame, Item { session, body, claimed: None });
        if self.order.admit(frame, body.range()) {
            self.run(vec![frame]);
        }
    }
}
