//! The simulation of a whole cluster: real nodes, each with its disks, on a simulated network and a
//! simulated metadata store, in virtual time, from one seed.
//!
//! ```text
//!  run ──► town (hosts, net, store) ──► nodes, as they are
//!   ├────► clients ──► exports of any node          judged by the oracle
//!   ├────► nemesis ──► network, storage, operator   what strikes
//!   │         └──────► usurp ──► duel               two heads at once
//!   └────► ends                                     everything heals and is judged
//! ```
//!
//! `town.rs`, `host.rs` and `net.rs` know nothing of seeds and faults to come: hand-written tests use
//! them too. Below the seams nothing is replaced: nodes follow the store, elect a manager, place and hand over
//! volumes, and reach each other's disks and heads over the RPC as they do in earnest.

mod clients;
mod context;
mod duel;
mod ends;
pub mod host;
mod nemesis;
pub mod net;
mod network;
mod operator;
mod run;
mod storage;
pub mod town;
mod usurp;

pub use run::run;
