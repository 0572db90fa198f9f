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
//! or entropy.

pub mod buffer;
pub mod config;
pub mod disk;
pub mod env;
pub mod export;
pub mod id;
pub mod limits;
pub mod meta;
pub mod planted;
pub mod segment;
pub mod shard;
#[cfg(any(test, feature = "simulation"))]
pub mod sim;
pub mod units;
pub mod volume;

/// Log lines to standard error, filtered by the environment variable `SDS_LOG`.
pub fn obs_log() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("SDS_LOG").unwrap_or_default();
    drop(tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).without_time().try_init());
}
