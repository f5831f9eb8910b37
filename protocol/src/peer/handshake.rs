//! How a session begins: greeting, the comparison of lineages (L3), the union of both sides' maps, the link.
//!
//! Nothing here clears a bit (D3): a handshake can only add. The replica answers a greeting after it has drained every
//! older session, so no frame of one lands after the first read for a copy (R1).

use super::{Action, Link, Peer, Progress, State};
use crate::disk::dirty_map::Base;
use crate::disk::superblock;
use crate::lineage::{self, Ends, Relation};
use crate::peer::resync::Resync;
use crate::peer::stream::Window;
use crate::planted::{Bug, planted};
use crate::terms::{DataState, Fence};
use crate::units::{BlockSize, CopyId, Epoch, GenerationId, Mark, Sequence, Session, Stream, Time, VolumeId};
use crate::wire::VERSIONS;
use crate::wire::message::{FEATURES, Hello, Member, Message, Refused, Union, Welcome};

/// Who greets: what a primary says of itself and the volume.
#[derive(Clone, Debug)]
pub struct Identity {
    /// The volume.
    pub volume: VolumeId,
    /// Its size in bytes.
    pub size_bytes: u64,
    /// Its tracking block.
    pub block_size: BlockSize,
    /// The primary's larger physical sector, in bytes.
    pub sector_bytes: u32,
    /// The primary's copy.
    pub copy: CopyId,
    /// How often it adopted another's content.
    pub adopted: u64,
    /// The primary's fence.
    pub fence: Fence,
    /// The primary's generations, newest first.
    pub lineage: Vec<GenerationId>,
    /// Every host of the volume, the primary first.
    pub members: Vec<Member>,
    /// Where the primary's content ends in generations that others may be further in.
    pub ends: Ends,
}

/// Why a session cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeerError {
    /// The replica broke the protocol.
    #[error("the replica broke the protocol: {0}")]
    Misbehaved(&'static str),
    /// The replica said no.
    #[error("the replica refused: {}", .0.text)]
    Refused(Refused),
    /// The two can't work together.
    #[error("the replica is incompatible: {0}")]
    Incompatible(&'static str),
    /// Another host was promoted since: this one must stop taking writes (L5).
    #[error("another host was promoted since, with fence {}", .0.counter)]
    Superseded(Fence),
    /// Both went on after a common past, or the replica did alone while it was no primary of this one's (L3).
    #[error("split brain: both hosts went on after they were last in sync")]
    SplitBrain,
    /// The replica knows sessions of this primary that it has no record of, since it was set back (X4). The next one has a
    /// higher number.
    #[error(
        "this host was set back: the replica knows later sessions with it; all is compared in the next one"
    )]
    Reused,
    /// The replica's copy is not the one any more that a rebuild of this host began with, or it went back: what is absent here is
    /// nowhere, as far as is known (S4, X4).
    #[error("its copy is not the one any more that this host is being rebuilt from")]
    SourceChanged,
    /// The two have no generation in common (L3).
    #[error("the replica's history has nothing in common with this host's")]
    NothingInCommon,
}

#[derive(Debug)]
pub(super) struct Greeting {
    session: Session,
    stream: Stream,
    fence: Fence,
    adopted: u64,
    lineage: Vec<GenerationId>,
    welcome: Option<Welcome>,
}

impl Peer {
    /// A connection is up: greet the replica. `session` is higher than any before, durably.
    pub fn handle_connected(&mut self, session: Session, identity: &Identity) {
        assert!(matches!(self.state, State::Away), "a session begins when the one before has ended");
        let stream = Stream(1);
        self.state = State::Greeting(Box::new(Greeting {
            session,
            stream,
            fence: identity.fence,
            adopted: identity.adopted,
            lineage: identity.lineage.clone(),
            welcome: None,
        }));
        let hello = Hello {
            versions: VERSIONS,
            features: FEATURES,
            volume: identity.volume,
            size_bytes: identity.size_bytes,
            block_size: identity.block_size,
            sector_bytes: identity.sector_bytes,
            copy: identity.copy,
            session,
            stream,
            fence: identity.fence,
            lineage: identity.lineage.clone(),
            mode: self.mode,
            members: identity.members.clone(),
            ends: identity.ends.clone(),
        };
        self.actions.push_back(Action::Send(hello.into()));
    }

    /// A control message of the replica. `last` is the newest write.
    ///
    /// # Errors
    /// [`PeerError`] when the session must end.
    pub fn handle_message(
        &mut self,
        message: Message,
        last: Sequence,
        now: Time,
    ) -> Result<Handled, PeerError> {
        let State::Greeting(greeting) = &mut self.state else {
            return self.handle_linked(message, now).map(|()| Handled::Nothing);
        };
        match message {
            Message::Welcome(welcome) if greeting.welcome.is_none() => {
                if welcome.session != greeting.session {
                    return Err(PeerError::Misbehaved("it answered a greeting of another session"));
                }
                if !(VERSIONS.0..=VERSIONS.1).contains(&welcome.version) {
                    return Err(PeerError::Incompatible("it chose a version that this agent does not speak"));
                }
                let sector_bytes = welcome.sector_bytes;
                if !sector_bytes.is_power_of_two() || !(512..=1 << 16).contains(&sector_bytes) {
                    return Err(PeerError::Misbehaved("its sector size is none"));
                }
                if welcome.data != DataState::Empty && !welcome.lineage.is_empty() {
                    match lineage::relation(&greeting.lineage, &welcome.lineage) {
                        Relation::Same | Relation::MineIsNewer => {}
                        Relation::TheirsIsNewer | Relation::Forked(_) => return Err(PeerError::SplitBrain),
                        Relation::Unrelated => return Err(PeerError::NothingInCommon),
                    }
                }
                // It says itself which one is its newest.
                self.newest.heard(welcome.lineage.first().copied());
                let vouches = greeting.vouches_for(self.marks.map.base(), &welcome);
                // One that went back, as where its host was restored from an older copy, may differ anywhere (X4).
                // So may one that had copies in sessions that this primary knows nothing of: it went back itself.
                let is_reused = welcome.mark.session >= greeting.session;
                let has_gone_back = is_reused
                    || greeting.forgot(self.marks.map.copied(), welcome.mark.session)
                    || lineage::went_back(&greeting.lineage, welcome.mark, self.marks.map.known());
                if self.marks.is_source && (!vouches || has_gone_back) {
                    return Err(PeerError::SourceChanged);
                }
                if !vouches {
                    // Nothing is known of what this copy holds (L2). All is dirty relative to any generation; with the
                    // copy's own, what is copied counts when the next greeting names that one still (R5).
                    let (ours, theirs) = (greeting.lineage.first(), welcome.lineage.first());
                    let generation = theirs.filter(|theirs| greeting.lineage.contains(theirs)).or(ours);
                    let generation = generation.copied().unwrap_or_default();
                    let adopted = greeting.adopted;
                    let base = Base { copy: welcome.copy, generation, adopted };
                    self.marks.begin_anew(base, last.next());
                    self.answered.forget();
                    self.marks.map.note_known(Mark::default());
                }
                if has_gone_back && !planted(Bug::IgnoreMark) {
                    self.went_back = true;
                    self.marks.begin_anew(self.marks.map.base(), last.next());
                    self.answered.forget();
                }
                if is_reused && superblock::may_have_numbered(greeting.fence, welcome.mark.session) {
                    // What it gets in this session would be named as what it had before, and a copy that goes back to
                    // that would be taken for further.
                    self.reused = Some(welcome.mark.session);
                    return Err(PeerError::Reused);
                }
                self.marks.map.note_known(welcome.mark);
                if planted(Bug::DropBitsAtHandshake) && welcome.data == DataState::Consistent {
                    self.marks.map.clear(0..u64::MAX);
                }
                greeting.welcome = Some(welcome);
                Ok(Handled::Sector(sector_bytes))
            }
            Message::Union(Union { ranges, last: is_last }) if greeting.welcome.is_some() => {
                if ranges.iter().any(|range| range.end() > self.size_bytes) {
                    return Err(PeerError::Misbehaved("it reports blocks past the volume's end"));
                }
                for range in ranges.into_iter().filter(|_| !planted(Bug::IgnoreUnion)) {
                    self.mark_suspect(range, last);
                }
                if is_last {
                    self.link(now);
                }
                Ok(Handled::Nothing)
            }
            Message::Refused(refused) => Err(PeerError::Refused(refused)),
            Message::Superseded(superseded) => Err(PeerError::Superseded(superseded.fence)),
            _ => Err(PeerError::Misbehaved("it sent a message that does not fit the handshake")),
        }
    }

    fn link(&mut self, now: Time) {
        let State::Greeting(greeting) = std::mem::replace(&mut self.state, State::Away) else {
            unreachable!("only a greeting becomes a link");
        };
        let welcome = greeting.welcome.expect("the union comes after the welcome");
        let progress = Progress::new(self.marks.map.is_clean());
        self.since = now;
        self.marks.union_comes();
        // Written with the union, before which nothing is copied.
        self.marks.map.note_copied(greeting.session);
        self.state = State::Linked(Box::new(Link {
            session: greeting.session,
            stream: greeting.stream,
            window_limit_bytes: welcome.window_bytes.min(self.window_limit_bytes),
            window: Window::default(),
            streamed: None,
            spilled: false,
            union_is_durable: false,
            resync: Resync::new(self.block_size, self.size_bytes, self.next_read, self.resync_limit, now),
            progress,
            verify: None,
            durable: Epoch(0),
            sent: Sequence(0),
            received: Sequence(0),
            tail_since: None,
            copy: welcome.copy,
            agreed: Epoch(0),
            agreed_twice: true,
            released: None,
            is_told_alone: false,
            features: welcome.features & FEATURES,
        }));
    }
}

impl Greeting {
    /// Whether the peer had copies in a session that this host numbered, after the last one with copies that it knows of. Of
    /// the numbers of other primaries it can't know: they are those of other fences.
    fn forgot(&self, copied: Option<Session>, had: Session) -> bool {
        let fence_of = superblock::fence_of_session;
        copied.is_some_and(|copied| {
            had > copied && [fence_of(copied), self.fence.counter].contains(&fence_of(had))
        }) && !planted(Bug::ForgetCopied)
    }

    /// Whether a map that is relative to `base` says what differs on the copy that answered (L2).
    fn vouches_for(&self, base: Base, welcome: &Welcome) -> bool {
        // Another primary's resync may have overwritten anything, unless the replica knows what it was before.
        let is_known = match welcome.data {
            DataState::Empty => false,
            DataState::Inconsistent => welcome.can_roll_back || welcome.source == self.fence,
            DataState::Consistent => true,
        };
        let is_same_copy = base.copy == welcome.copy || base.copy.is_none() && !base.generation.is_none();
        let theirs = welcome.lineage.first().copied().unwrap_or_default();
        let is_covered = match welcome.data {
            // A copy that was never in sync has no generation yet; its map was kept since its first session. One that
            // gave its generations up (L6) has none either, and followed another primary.
            DataState::Inconsistent if welcome.lineage.is_empty() => {
                base.copy == welcome.copy && welcome.source == self.fence
            }
            _ => lineage::map_covers(&self.lineage, base.generation, theirs),
        };
        is_known && is_same_copy && is_covered && base.adopted == self.adopted
    }
}

/// What a message asks of the tracker.
#[derive(Debug, PartialEq, Eq)]
pub enum Handled {
    /// Nothing.
    Nothing,
    /// To judge overlap in sectors of at least so many bytes (W1).
    Sector(u32),
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::units::HostId;

    pub(in super::super) fn lineage(text: &str) -> Vec<GenerationId> {
        text.bytes().map(|byte| GenerationId([byte; 16])).collect()
    }

    pub(in super::super) fn fence(holder: u8) -> Fence {
        Fence { counter: 2, holder: HostId([holder; 32]) }
    }

    /// What a replica answers that holds this of the primary with that fence.
    pub(in super::super) fn welcome(
        data: DataState,
        can_roll_back: bool,
        source: Fence,
        generations: &str,
    ) -> Welcome {
        Welcome {
            version: VERSIONS.1,
            features: 0,
            session: Session(1),
            copy: CopyId([2; 16]),
            data,
            can_roll_back,
            source,
            mark: Mark::default(),
            fence: fence(1),
            lineage: lineage(generations),
            sector_bytes: 512,
            window_bytes: 1 << 20,
        }
    }

    #[test]
    fn a_map_is_believed_only_for_what_the_copy_was_when_it_began() {
        let greeting = Greeting {
            session: Session(1),
            stream: Stream(1),
            fence: fence(1),
            adopted: 0,
            lineage: lineage("ba"),
            welcome: None,
        };
        let base = Base { copy: CopyId([2; 16]), generation: GenerationId([b'a'; 16]), adopted: 0 };
        let (consistent, mixture) = (DataState::Consistent, DataState::Inconsistent);
        for (welcome, is_believed) in [
            (welcome(consistent, false, fence(1), "a"), true),
            (welcome(consistent, false, fence(1), "x"), false),
            (welcome(consistent, false, fence(1), ""), false),
            (welcome(DataState::Empty, false, fence(1), ""), false),
            (welcome(mixture, true, fence(1), "a"), true),
            (welcome(mixture, true, fence(2), "a"), true),
            (welcome(mixture, false, fence(2), "a"), false),
            // Its first sync was interrupted.
            (welcome(mixture, false, fence(1), ""), true),
            // It followed another primary, and gave that history up in the middle of a resync.
            (welcome(mixture, true, fence(2), ""), false),
        ] {
            assert_eq!(greeting.vouches_for(base, &welcome), is_believed, "{welcome:?}");
        }
        // What a promotion wrote began with no copy at all.
        let promoted = Base { copy: CopyId::default(), ..base };
        assert!(greeting.vouches_for(promoted, &welcome(consistent, false, fence(1), "a")));
        assert!(!greeting.vouches_for(promoted, &welcome(mixture, false, fence(1), "")));
        let other = Base { copy: CopyId([3; 16]), ..base };
        assert!(!greeting.vouches_for(other, &welcome(consistent, false, fence(1), "a")));
        let adopted = Base { adopted: 1, ..base };
        assert!(!greeting.vouches_for(adopted, &welcome(consistent, false, fence(1), "a")));
    }
}
