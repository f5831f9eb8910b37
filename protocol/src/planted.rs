//! Bugs on purpose, for the simulation to find: what it never finds, it does not check.
//!
//! Without the feature `planted` none exists: the switch is a constant. With it, one bug at a time is planted for the
//! calling thread.

#[cfg(feature = "planted")]
use std::cell::Cell;

/// A mistake that breaks a rule.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Bug {
    /// A bit is cleared when its copy is sent, not when the replica has it durably (D2).
    ClearOnSend,
    /// A replica starts an epoch before the one before it is durable (W3).
    NextEpochEarly,
    /// A write does not wait for its extents' record in the activity log (W2).
    SkipLog,
    /// An extent leaves the activity log before its writes are durable here (D1).
    ReleaseExtentEarly,
    /// The window's blocks are not put into the map when the link drops (W7, D3).
    ForgetWindow,
    /// Blocks are read for a copy while a write to them is under way here (D2).
    CopyWhileWriting,
    /// A frame of an older session is written (R1).
    OldFrameLands,
    /// What the other side says of its own map and log is ignored (D3).
    IgnoreUnion,
    /// A handshake clears bits (D3).
    DropBitsAtHandshake,
    /// A rollback restores blocks that no map remembers (P2).
    RollBackUnmarked,
    /// A write to a dirty block is streamed, although a copy of the block may be on its way: the replica gets both
    /// versions (R1, P3).
    SendBothVersions,
    /// A restarted primary goes on in the generation of before (L1).
    KeepGeneration,
    /// A replica counts as consistent with its last copy, not with the epoch after it (P2).
    CommitAtLastCopy,
    /// A fence of the same number is followed, whoever holds it (L5).
    FollowEqualFence,
    /// A replica counts for its mode while it is resynced (W4).
    CountResyncing,
    /// Two replicas of one generation are taken for equal, whatever each has applied (D5, L3).
    TakeForEqual,
    /// A block is overwritten in gap mode before its pre-image is durable (P2).
    OverwriteUnsaved,
    /// A flush in sync mode does not wait for the replica (W4).
    AnswerEarly,
    /// What was kept for undo does not get what is overwritten after the commit (L6).
    KeepUntilCommit,
    /// An undo restores blocks that no map remembers (L6, D3).
    UndoUnmarked,
    /// A bit is cleared when the digests agree, not when what they agree on is durable on the replica (D2).
    ClearOnMatch,
    /// Replicas are told of epochs before it is recorded that they may be (X4).
    TellUnrecorded,
    /// A replica takes a greeting of a primary that lacks what it has, because that was set back (X4).
    IgnoreEnds,
    /// A host that gives its content up goes on to refuse the winner, which was promoted as often (L6).
    KeepEqualFence,
    /// An empty copy refuses a primary for generations that it no longer has the content of (L3).
    EmptyObjects,
    /// A sector that can't be read on a replica ends it, whenever it is met (R2).
    UnreadableEndsReplica,
    /// A generation that a replica followed by stream is pruned as if nobody had it (L2).
    PruneFollowed,
    /// Overlap is judged in sectors of 512 bytes, whatever the disks have (W1).
    NarrowSectors,
    /// A replica whose log says that any block may differ, as where something else wrote to its disk, tells its primary of none
    /// (X4).
    TrustTouched,
    /// A copy that something else wrote to is promoted without force (X4).
    PromoteTouched,
    /// Such a copy counts for other hosts, and for whoever recovers from it, as what it was before (X4).
    CountTouched,
    /// What something else wrote to a copy before it was kept is brought back, and nobody is told (X4).
    UndoTouched,
    /// A replica counts on a primary's word by a clock that stands still while its machine sleeps (W4).
    SleepingWord,
    /// A primary that was demoted gives up what it had for whoever is promoted next (L6).
    AgreeToAnybody,
    /// A replica that has gone back is taken for what it was (X4).
    IgnoreMark,
    /// A primary that was set back takes a replica with copies of a later session for what it was (X4).
    ForgetCopied,
    /// A primary goes on without a replica that may count on it (W4).
    BreakWord,
    /// A promise that holds for ever is forgotten when the operator chooses otherwise (W4).
    ForgetPromise,
    /// A map's file says that nothing was answered, whatever was.
    DenyAnswered,
    /// What was done before a process was frozen is answered before it is asked whether it still leads.
    AnswerUnasked,
    /// A write goes on although its extents could not be recorded in the activity log (W2).
    GoOnUnrecorded,
    /// A host that was removed is a member again as soon as anybody lists it (X3).
    BelieveOldList,
    /// A running primary believes a host that another one knows to be removed (X3).
    BelieveRemoved,
    /// What a primary overwrites is given up for good, whoever it is (L6).
    FollowUnagreed,
    /// What a primary overwrote is given up for want of room before anybody agreed (L6).
    ForgetUnagreed,
    /// A primary goes by all its maps after its disk was recovered (D1).
    KeepMaps,
    /// A primary claims after a recovery what it had before (X4).
    ClaimLost,
    /// A copy that was recovered, or brought back, is counted on for what it was told before (W4).
    CountRecovered,
    /// A primary that had another host take over goes on where it got no answer and that one is no primary yet (L5).
    GoOnUnanswered,
    /// A primary that was demoted and promoted again writes before those follow it that had everything, and does not know
    /// after a restart whom it waited for (W4).
    WriteUnfollowed,
    /// A page of a map that a crash tore counts as clean (D1).
    TornPageIsClean,
    /// A write of metadata that hangs is taken for done (W2).
    TakeHungForDone,
    /// A replica tells of a marker that is only being written (P3).
    TellUnmarked,
    /// A replica that acknowledges nothing holds up whoever writes for as long as it likes (W7).
    AwaitLateReplica,
    /// A replica is said to be in sync, however late its acknowledgements are (D4).
    OverlookLag,
    /// Where the newest record of the activity log is not whole, the one before it counts (D1).
    TrustOlderRecord,
    /// What a compare finds is told, and not marked (D4).
    TellUnmarkedDifference,
    /// Where one header of a map is not whole, the other one counts, whatever it says (D1).
    TrustOlderHeader,
    /// Where the newest slot of a superblock is not whole, the older one counts, whatever its twin says (W4, L5, L6).
    ForgetTwins,
    /// What was fetched is written also where something newer was written meanwhile (S4).
    LandOverNewer,
    /// A write to an absent block is answered before its bit is cleared in the file (S4).
    AnswerAbsent,
    /// An absent block's bit is cleared before its content is durable (S4).
    ClearAbsentEarly,
    /// A resync copies absent blocks as they are on the primary's disk (S4).
    CopyAbsent,
    /// A primary of which something is absent becomes a replica whose copy counts as its new primary knows it (S4).
    DemoteAbsent,
    /// A copy is lent to a primary whose promotion the replica has not recorded (S4, L5).
    LendUnfollowed,
    /// What came to be here is read after the sync that was to cover it has failed (S4, W5).
    ReadUnsynced,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 66] = [
        Self::ClearOnSend,
        Self::NextEpochEarly,
        Self::SkipLog,
        Self::ReleaseExtentEarly,
        Self::ForgetWindow,
        Self::CopyWhileWriting,
        Self::OldFrameLands,
        Self::IgnoreUnion,
        Self::DropBitsAtHandshake,
        Self::RollBackUnmarked,
        Self::SendBothVersions,
        Self::KeepGeneration,
        Self::CommitAtLastCopy,
        Self::FollowEqualFence,
        Self::CountResyncing,
        Self::TakeForEqual,
        Self::OverwriteUnsaved,
        Self::AnswerEarly,
        Self::KeepUntilCommit,
        Self::UndoUnmarked,
        Self::ClearOnMatch,
        Self::KeepEqualFence,
        Self::EmptyObjects,
        Self::UnreadableEndsReplica,
        Self::PruneFollowed,
        Self::NarrowSectors,
        Self::TrustTouched,
        Self::PromoteTouched,
        Self::CountTouched,
        Self::UndoTouched,
        Self::SleepingWord,
        Self::AgreeToAnybody,
        Self::IgnoreMark,
        Self::ForgetCopied,
        Self::IgnoreEnds,
        Self::TellUnrecorded,
        Self::BreakWord,
        Self::ForgetPromise,
        Self::DenyAnswered,
        Self::AnswerUnasked,
        Self::GoOnUnrecorded,
        Self::BelieveOldList,
        Self::BelieveRemoved,
        Self::FollowUnagreed,
        Self::ForgetUnagreed,
        Self::KeepMaps,
        Self::ClaimLost,
        Self::CountRecovered,
        Self::GoOnUnanswered,
        Self::WriteUnfollowed,
        Self::TornPageIsClean,
        Self::TakeHungForDone,
        Self::TellUnmarked,
        Self::AwaitLateReplica,
        Self::OverlookLag,
        Self::TrustOlderRecord,
        Self::TellUnmarkedDifference,
        Self::TrustOlderHeader,
        Self::ForgetTwins,
        Self::LandOverNewer,
        Self::AnswerAbsent,
        Self::ClearAbsentEarly,
        Self::CopyAbsent,
        Self::DemoteAbsent,
        Self::LendUnfollowed,
        Self::ReadUnsynced,
    ];
}

#[cfg(feature = "planted")]
thread_local! {
    static PLANTED: Cell<Option<Bug>> = const { Cell::new(None) };
}

/// Plants a bug for this thread, in the place of the one before.
#[cfg(feature = "planted")]
pub fn plant(bug: Option<Bug>) {
    PLANTED.set(bug);
}

/// Whether this bug is planted. Shells ask as well, for mistakes that are theirs alone to make.
#[cfg(feature = "planted")]
#[must_use]
pub fn planted(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Whether this bug is planted: never, without the feature.
#[cfg(not(feature = "planted"))]
#[must_use]
pub const fn planted(_: Bug) -> bool {
    false
}
