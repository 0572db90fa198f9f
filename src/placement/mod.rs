//! Where things go in a cluster: shards on disks, and what should move.
//!
//! Everything here is a pure function of what it is given: no I/O, no clock, no state; randomness
//! comes in as an [`Env`] or a seed. So every node that knows the same disks comes to the same sets,
//! and nobody has to store them.
//!
//! - [`choose`] draws the disks of a write set: never two in one failure domain; healthy ones before
//!   slow ones before suspects; spread over the domains of the next wider level as far as those have
//!   room; by weight within that.
//! - [`copysets`] bounds how many different write sets there are, so that the loss of a few disks
//!   at once rarely hits all of one set.
//! - [`heads`] says which node is to serve each volume.
//! - [`balance`] says how much a head should move from full disks to empty ones.
//!
//! Knows disks as numbers, sizes and failure domains, volumes as ids and places; nothing of clients, segments or pools.
//!
//! [`choose`]: choose::choose

pub mod balance;
pub mod choose;
pub mod copysets;
pub mod heads;

#[cfg(test)]
mod balance_tests;
#[cfg(test)]
mod tests;

/// There are fewer failure domains than a write set needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a write set needs {need} failure domains, there are {have}")]
pub struct TooFewDomains {
    /// Domains that there are.
    pub have: usize,
    /// Domains that a write set needs.
    pub need: usize,
}

/// 64 bits that depend on all bits of both numbers: the finaliser of `SplitMix64` (Steele, Lea and
/// Flood, 2014).
const fn mix(seed: u64, value: u64) -> u64 {
    let mut z = seed ^ value.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
