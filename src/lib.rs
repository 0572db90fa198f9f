//! sds: a software-defined block storage engine.
//!
//! A request travels downward only; each layer knows the one below it through a small trait and
//! nothing above it:
//!
//! ```text
//!  hypervisor ──► export ──► volume (head) ──► segment ──► shard ──► disk
//!                               │                (EC)      client    (slots)
//!                               └──────────► meta (metadata store)
//! ```
//!
//! All I/O goes through four seams, so that the whole node also runs inside one deterministic
//! simulation: [`disk::device::BlockDevice`], [`shard::ShardClient`], [`meta::MetaStore`], and
//! time and randomness ([`env`]). Nothing else in the library touches a file, a socket, a clock
//! or entropy, but for credentials ([`trust`]).

pub mod admin;
pub mod buffer;
pub mod cli;
pub mod config;
pub mod disk;
pub mod env;
pub mod export;
pub mod id;
pub mod limits;
pub mod meta;
pub mod node;
pub mod obs;
pub mod placement;
pub mod planted;
pub mod rpc;
pub mod segment;
pub mod shard;
#[cfg(any(test, feature = "simulation"))]
pub mod sim;
pub mod trust;
pub mod units;
pub mod volume;
