//! What the node tells about itself: metrics and logs.
//!
//! [`metrics`] declares every metric once; [`sample`] has the plain numbers that the node fills in
//! when it is scraped; [`histogram`] is the one counter that the data path needs from here;
//! [`log`] sets `tracing` up, [`events`] keeps the newest of its lines; and [`throttle`] bounds what others can make it write. Must not know how a number came about.

pub mod events;
pub mod histogram;
pub mod log;
pub mod metrics;
pub mod sample;
pub mod throttle;

pub use metrics::Metrics;
