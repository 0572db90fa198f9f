//! Switches that plant known bugs, to prove that the simulation finds them.
//!
//! Compiled in only with the feature `simulation` (or in unit tests of this crate); in a
//! normal build [`bug`] is the constant `false`.

/// A bug that can be planted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs, reason = "docs/simulation.md has a row for each")]
pub enum Bug {
    DropDurability,
    SkipFence,
    ApplyOutOfOrder,
    IgnoreCrc,
    ForgetFence,
    ReplayOtherEpoch,
    BelieveFailedSwap,
    AckBeforeAll,
    FreeBeforeSwap,
    ReuseBeforeReap,
    SkipChecksumAreaOnSeal,
    CheckpointNotExact,
    StaleShardAccepted,
    LoseTrimInReplay,
    ServeBeforeLease,
    MoveIgnoresNewer,
    ParityOfOldStripe,
    FenceTooFew,
    WidthIgnoresOpenSegments,
    ScrubSkips,
    NeverAvoidsSlow,
    NarrowLosesParity,
    NeverWidens,
    /// What a shrink cuts off is not deleted.
    ForgetCut,
    RepairFromStaleShard,
    /// Where several references to a segment go at once, one of them stays counted.
    MiscountLive,
    /// Of a shard that is moved to another disk, only one half is copied.
    MoveHalf,
    /// A checkpoint whose caller goes away loses what it was to merge.
    MergeGivenUp,
    /// The read lease is counted from the answer instead of the sending.
    LeaseFromAnswer,
    /// A head leaves `released` in the root that it takes over.
    StaysReleased,
    /// Who removes a disk does not ask other nodes whether their volumes need it.
    DrainedTooEarly,
    /// Heads are not told that a disk of another node is back.
    FarReturnUntold,
    /// A node never takes back a volume that it handed over.
    LeavesForGood,
}

impl Bug {
    /// Those that the simulation of a whole cluster finds.
    pub const CLUSTER: &'static [Self] = &[
        Self::SkipFence,
        Self::ServeBeforeLease,
        Self::DrainedTooEarly,
        Self::LeavesForGood,
        Self::LeaseFromAnswer,
        Self::StaysReleased,
        Self::FarReturnUntold,
    ];

    /// Every bug that the simulation of one node finds.
    pub const ALL: &'static [Self] = &[
        Self::DropDurability,
        Self::SkipFence,
        Self::ApplyOutOfOrder,
        Self::IgnoreCrc,
        Self::ForgetFence,
        Self::ReplayOtherEpoch,
        Self::BelieveFailedSwap,
        Self::AckBeforeAll,
        Self::FreeBeforeSwap,
        Self::ReuseBeforeReap,
        Self::SkipChecksumAreaOnSeal,
        Self::CheckpointNotExact,
        Self::StaleShardAccepted,
        Self::LoseTrimInReplay,
        Self::ServeBeforeLease,
        Self::MoveIgnoresNewer,
        Self::ParityOfOldStripe,
        Self::FenceTooFew,
        Self::WidthIgnoresOpenSegments,
        Self::ScrubSkips,
        Self::NeverAvoidsSlow,
        Self::NarrowLosesParity,
        Self::NeverWidens,
        Self::ForgetCut,
        Self::RepairFromStaleShard,
        Self::MiscountLive,
        Self::MoveHalf,
        Self::MergeGivenUp,
    ];
}

#[cfg(feature = "simulation")]
mod state {
    use std::cell::Cell;
    thread_local! {
        pub(super) static PLANTED: Cell<Option<super::Bug>> = const { Cell::new(None) };
    }
}

/// Plants `which` on this thread; none takes it out.
#[cfg(feature = "simulation")]
pub fn plant(which: Option<Bug>) {
    state::PLANTED.set(which);
}

/// Whether `which` is planted on this thread.
#[cfg(feature = "simulation")]
pub fn bug(which: Bug) -> bool {
    state::PLANTED.get() == Some(which)
}

/// Whether `which` is planted: never, in this build.
#[cfg(not(feature = "simulation"))]
#[inline(always)]
#[allow(clippy::inline_always, reason = "must vanish from the data path")]
pub const fn bug(_which: Bug) -> bool {
    false
}
