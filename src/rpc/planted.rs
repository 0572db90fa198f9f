//! Switches that plant known bugs in requests to volumes, to prove that the tests of this module find them.
//! Only tests can set one: in any other build [`is`] is the constant `false`.

/// A bug that can be planted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Bug {
    /// A client makes changes without knowing that earlier ones are over.
    RepeatAtOnce,
    /// A server gives a new turn while changes of the one before run.
    TurnTooSoon,
    /// A server begins changes whose turn is over.
    LateAccepted,
    /// A server begins what was meant for another head.
    AnyEpoch,
    /// A server begins what came by a connection that has ended.
    EndedAccepted,
}

#[cfg(test)]
impl Bug {
    /// Those that chance finds; the last one takes more than that.
    pub(super) const BY_CHANCE: [Self; 4] =
        [Self::RepeatAtOnce, Self::TurnTooSoon, Self::LateAccepted, Self::AnyEpoch];
}

#[cfg(test)]
thread_local! {
    pub(super) static PLANTED: std::cell::Cell<Option<Bug>> = const { std::cell::Cell::new(None) };
}

/// Whether this bug is planted.
#[cfg(test)]
pub(super) fn is(bug: Bug) -> bool {
    PLANTED.get() == Some(bug)
}

/// Whether this bug is planted.
#[cfg(not(test))]
pub(super) const fn is(_: Bug) -> bool {
    false
}
