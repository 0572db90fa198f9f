//! The node at a glance.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use crate::admin::space::{Fill, Space};

/// How well the node is, the worst of everything it knows.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum HealthLevel {
    /// Full redundancy, every disk online, space left.
    #[default]
    Ok,
    /// Everything is served, but something needs attention; redundancy may be reduced.
    Warning,
    /// Some data is not served, or the next failure or write may be refused.
    Critical,
}

impl fmt::Display for HealthLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Warning => "warning",
            Self::Critical => "critical",
        })
    }
}

/// One reason why the node is not `ok`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Reason {
    /// How bad it is; never `ok`.
    pub level: HealthLevel,
    /// What it is about: `disk /dev/sdb`, `pool default`, `volume default/vol0`.
    pub subject: String,
    /// What is wrong with it.
    pub message: String,
}

/// Health with its reasons: the worst first, none exactly if `ok`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Health {
    /// The worst level of the reasons.
    pub health: HealthLevel,
    /// Why.
    pub reasons: Vec<Reason>,
}

/// Raw space, before redundancy, bytes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Capacity {
    /// All slots of the online disks.
    pub raw: u64,
    /// In use, redundancy and what garbage collection has not freed yet included.
    pub used: u64,
    /// Still free: `raw - used`.
    pub free: u64,
}

/// How far the restoring of redundancy is, or the moving of shards to where there is room.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct RepairProgress {
    /// Rebuilt so far in this round, bytes.
    pub bytes_done: u64,
    /// To be rebuilt in this round, bytes; what is done included.
    pub bytes_total: u64,
    /// Bytes rebuilt a second, over the last seconds.
    #[serde(default)]
    pub bytes_per_second: u64,
    /// Estimate of the time left; none before there is a rate to judge by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_s: Option<u64>,
    /// Bytes a second that repair and scrub of the node may read and write now, so that clients keep
    /// their throughput; none while clients ask for nothing. What survives no further loss is rebuilt
    /// without a limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit_bytes_per_second: Option<u64>,
}

/// Counts of disks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskCounts {
    /// Disks that serve.
    pub online: u32,
    /// All disks of the node.
    pub total: u32,
}

/// Counts of volumes.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct VolumeCounts {
    /// All volumes.
    pub total: u32,
    /// Of them, those with reduced redundancy.
    pub reduced: u32,
    /// Of them, those that are not served now.
    pub unavailable: u32,
}

/// The space of one pool in [`Status`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct PoolCapacity {
    /// Name of the pool.
    pub name: String,
    /// Raw space of the disks it may use.
    pub capacity: Capacity,
    /// What that is for, of its volumes.
    #[serde(default)]
    pub space: Space,
    /// How full it is.
    #[serde(default)]
    pub fill: Fill,
    /// Present while redundancy of its volumes is being restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repair: Option<RepairProgress>,
}

/// The node at a glance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    /// Never `ok` while any redundancy is reduced.
    pub health: HealthLevel,
    /// Why, the worst first.
    pub reasons: Vec<Reason>,
    /// Raw space of all disks.
    pub capacity: Capacity,
    /// What that is for.
    #[serde(default)]
    pub space: Space,
    /// Raw space by pool, sorted by name.
    pub pools: Vec<PoolCapacity>,
    /// Counts of disks.
    pub disks: DiskCounts,
    /// Counts of volumes.
    pub volumes: VolumeCounts,
    /// Present while redundancy is being restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repair: Option<RepairProgress>,
    /// Present while shards are moved from full disks to empty ones; its "rebuilt" is "moved".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance: Option<RepairProgress>,
    /// Why no shards are moved though disks are not filled alike; none if they are, or shards are moved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance_waits: Option<String>,
    /// Version of `sdsd`.
    pub version: String,
    /// Seconds since the node started.
    pub uptime_s: u64,
}
