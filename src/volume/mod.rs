//! Volumes: the head of a virtual disk.
//!
//! A volume is a log. The head batches writes into records, appends them to the open log segment
//! and maps blocks to places in a copy-on-write index. Knows segments, shards and the metadata
//! store; knows nothing of exports above it or of devices below.

mod balance;
pub mod check;
pub mod checkpoint;
mod dense;
mod discard;
mod gc;
pub mod head;
pub mod index;
mod log;
pub mod narrow;
pub mod overlay;
mod presence;
mod repair;
mod report;
pub mod root;
pub mod rules;
mod scrub;
pub mod segtab;
mod shrink;
mod space;
mod swap;
pub mod takeover;
pub mod target;
#[cfg(test)]
mod tests;
mod throttle;
pub mod usage;
mod walk;
mod width;

pub use repair::RepairReport;
pub use report::HeadReport;
pub use scrub::{DEFAULT_PERIOD as SCRUB_PERIOD, ScrubReport};
