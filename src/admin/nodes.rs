//! Nodes as the admin API shows them.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::id::NodeId;

/// How a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// It runs and is reached.
    Up,
    /// It has a lease, but does not answer the node that was asked; or the other way round.
    Suspect,
    /// It neither has a lease nor answers.
    Down,
    /// It runs, and heads and shards leave it.
    Draining,
}

impl std::fmt::Display for NodeState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Up => "up",
            Self::Suspect => "suspect",
            Self::Down => "down",
            Self::Draining => "draining",
        })
    }
}

/// A node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Node {
    /// Its id.
    #[schema(value_type = String, format = "uuid")]
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// How it is, as the node that was asked sees it.
    pub state: NodeState,
    /// Why it is in that state, if there is more to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<String>,
    /// Whether it is the manager, which places volumes.
    pub manager: bool,
    /// Name of its host.
    pub host: String,
    /// Name of its rack.
    pub rack: String,
    /// `host:port` at which other nodes reach it; empty while it does not run.
    pub address: String,
    /// `host:port` of its admin API; empty while it does not run.
    pub admin: String,
    /// Its version; empty while it does not run.
    pub version: String,
    /// Its disks, and those of them that are in use.
    pub disks: u32,
    /// Disks in use.
    pub disks_online: u32,
    /// Volumes that it serves, or is to serve.
    pub volumes: u32,
}
