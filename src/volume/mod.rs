//! The volume's head: what turns block reads and writes into records of a log.
//!
//! Knows segments, shards and the root; knows nothing of the protocols that export a volume, nor
//! of what a disk does to keep a shard.

pub mod rules;
