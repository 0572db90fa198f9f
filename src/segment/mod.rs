//! Segments: append-only, spread over the shards of a write set.

pub mod codec;
