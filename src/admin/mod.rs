//! The admin HTTP API: what an operator and their tools talk to.
//!
//! ```text
//!  sdsctl ──► client ──HTTP──► server ──► AdminBackend ──channel──► node (one thread, !Send)
//! ```
//!
//! [`access`] says who may ask for what, [`admission`] who may become a node. [`types`] is the contract, shared by server, client and command line; [`health`] is the one
//! place that decides what counts as healthy. The server checks the form of a request and
//! translates errors into HTTP; what a request means is up to the [`backend::AdminBackend`].
//!
//! Must not know: disks, segments, heads, the metadata store. Everything here is `Send`, may run
//! on any tokio runtime, and never touches the data path but through [`backend::Command`]s.

pub mod access;
pub mod admission;
pub mod backend;
pub mod client;
pub mod error;
pub mod events;
mod guard;
pub mod health;
pub mod joining;
pub mod nodes;
mod routes;
pub mod server;
pub mod space;
mod tls;
pub mod types;
