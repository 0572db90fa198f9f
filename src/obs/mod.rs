//! What the node tells about itself: metrics and logs.
//!
//! [`metrics`] declares every metric once; [`sample`] has the plain numbers that the node fills in
//! when it is scraped; [`histogram`] is the one counter that the data path needs from here; and
//! [`log`] sets `tracing` up. Must not know how a number came about.

pub mod histogram;
pub mod log;
pub mod metrics;
pub mod sample;

pub use metrics::Metrics;
