//! The simulation: the real code of a node on simulated devices, in virtual time, from one seed.

mod ahead;
mod bend;
pub mod client;
mod clock;
pub mod cluster;
#[cfg(test)]
mod damage_tests;
mod demands;
pub mod device;
mod ends;
mod grow;
#[cfg(test)]
mod narrow_tests;
mod nemesis;
pub mod oracle;
pub mod pipe;
mod resize;
mod rivals;
pub mod run;
mod slow;
#[cfg(test)]
mod width_tests;
mod wire;
pub mod world;

pub use clock::simulate;
