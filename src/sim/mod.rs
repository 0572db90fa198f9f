//! The simulation: the real code of a node on simulated devices, in virtual time, from one seed.

pub mod device;
mod nemesis;
pub mod oracle;
pub mod run;
pub mod world;
