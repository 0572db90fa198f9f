//! The oracle: which histories of one block are linearizable.
//!
//! Writes carry the values 1, 2 and 3, the block begins as 0. A [`History`] is the set of all
//! pairs (content, writes still pending) that explain what clients have seen so far: every
//! acknowledged write took effect between its call and its answer, and a write that was never
//! answered may take effect once, at any later time, or never; but once its head is known to have
//! stopped, it has taken effect or never will. When nothing explains an answer,
//! the system has lied. This one check is "no acknowledged write lost", "no stale read" and "what
//! was in flight never flips back once read".

/// Highest value a write may carry.
pub const VALUES_MAX: u8 = 3;

/// A bit for each pair of content (2 bits) and mask of pending writes (3 bits).
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct History(u32);

impl History {
    /// The block is 0 and nothing is pending.
    pub const START: Self = Self(1);

    /// The pairs as (content, pending).
    fn pairs(self) -> impl Iterator<Item = (u32, u32)> {
        (0..32).filter(move |bit| self.0 >> bit & 1 == 1).map(|bit| (bit & 3, bit >> 2))
    }

    fn collect(pairs: impl Iterator<Item = (u32, u32)>) -> Self {
        Self(pairs.fold(0, |set, (content, pending)| set | 1 << (content | pending << 2)))
    }

    /// Adds what may be when pending writes take effect.
    fn closure(self) -> Self {
        let mut set = self;
        loop {
            let stepped = set.pairs().flat_map(|(_, pending)| {
                (1..=u32::from(VALUES_MAX))
                    .filter(move |value| pending >> (value - 1) & 1 == 1)
                    .map(move |value| (value, pending & !(1 << (value - 1))))
            });
            let next = Self(set.0 | Self::collect(stepped).0);
            if next == set {
                return set;
            }
            set = next;
        }
    }

    /// A client calls for the write of `value`.
    pub fn call(self, value: u8) -> Self {
        Self::collect(self.pairs().map(|(content, pending)| (content, pending | 1 << (value - 1))))
    }

    /// The write of `value` is acknowledged. None: impossible.
    pub fn acknowledge(self, value: u8) -> Option<Self> {
        let done = self.closure().pairs().filter(|(_, pending)| pending >> (value - 1) & 1 == 0);
        Self::collect(done).possible()
    }

    /// The head that had the write of `value` stopped: the write took effect, or never will.
    pub fn abandon(self, value: u8) -> Self {
        let settled = self.closure();
        let pairs =
            settled.pairs().map(|(content, pending)| (content, pending & !(1 << (value - 1))));
        Self::collect(pairs)
    }

    /// A read is answered with `value`. None: it may not be.
    pub fn read(self, value: u8) -> Option<Self> {
        let seen = self.closure().pairs().filter(|(content, _)| *content == u32::from(value));
        Self::collect(seen).possible()
    }

    fn possible(self) -> Option<Self> {
        (self.0 != 0).then_some(self)
    }
}

#[test]
fn the_oracle_knows_a_register() {
    let history = History::START.call(1);
    assert!(history.read(0).is_some() && history.read(1).is_some() && history.read(2).is_none());
    let seen = history.read(1).expect("pending writes may be seen");
    assert_eq!(seen.read(0), None, "what was read never flips back");
    let acknowledged = history.acknowledge(1).expect("allowed");
    assert_eq!(acknowledged.read(0), None, "an acknowledged write is not lost");
    let settled = history.abandon(1).call(2).acknowledge(2).expect("allowed");
    assert_eq!(settled.read(1), None, "a dead head's write does not return");
    let both = history.call(2).acknowledge(2).expect("allowed");
    assert!(both.read(1).is_some() && both.read(2).is_some() && both.read(0).is_none());
    assert_eq!(both.read(1).and_then(|h| h.read(2)), None, "2 was overwritten by 1");
}
