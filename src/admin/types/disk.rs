//! Disks.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::{PATH_BYTES_MAX, clip};
use crate::admin::error::ApiError;
use crate::admin::space::Space;
use crate::id::DiskId;

/// State of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum DiskState {
    /// Serves.
    Online,
    /// Serves, but far slower than its peers: avoided for new data.
    Slow,
    /// Its data is being moved away, on an operator's order.
    Draining,
    /// Taken out of service by an operator; its data counts as missing until it is back.
    Offline,
    /// Taken out of service because it was slow or failing for long; `disk online` takes it back.
    #[serde(rename = "set-aside")]
    SetAside,
    /// Refuses work after an I/O error or because its tables are damaged.
    Failed,
    /// Known, but not found when the node started, or vanished since.
    Missing,
}

impl DiskState {
    /// Whether the disk serves reads and writes.
    pub const fn is_online(self) -> bool {
        matches!(self, Self::Online | Self::Slow | Self::Draining)
    }
}

impl fmt::Display for DiskState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Online => "online",
            Self::Slow => "slow",
            Self::Draining => "draining",
            Self::Offline => "offline",
            Self::SetAside => "set-aside",
            Self::Failed => "failed",
            Self::Missing => "missing",
        })
    }
}

/// Errors of a disk since the node started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskErrors {
    /// I/O errors of the device.
    pub io: u64,
    /// Blocks whose checksum did not match.
    pub checksum: u64,
    /// Requests that took longer than their time-out.
    pub timeout: u64,
}

impl DiskErrors {
    /// All of them.
    pub const fn total(&self) -> u64 {
        self.io.saturating_add(self.checksum).saturating_add(self.timeout)
    }
}

/// Mean latencies of a disk since the node started, microseconds; 0 before the first request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskLatency {
    /// Of durable appends.
    pub append_us: u64,
    /// Of reads.
    pub read_us: u64,
}

/// How one class of requests to a disk fares, and how its peers do: microseconds, of the last seconds
/// with requests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct LatencyFigures {
    /// Median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// Median of the peers' medians; 0 if nothing was measured there.
    pub peers_p50_us: u64,
    /// Median of the peers' 99th percentiles.
    pub peers_p99_us: u64,
}

/// The latest latencies of a disk by class of requests; absent before the first of a class.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct DiskTiming {
    /// Reads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read: Option<LatencyFigures>,
    /// Durable appends.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub append: Option<LatencyFigures>,
    /// Changes of tables: create, seal, delete.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub control: Option<LatencyFigures>,
}

/// What a device says of itself, by `smartctl`; absent what it does not say.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Smart {
    /// Its own judgement: false if it expects to fail.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub passed: Option<bool>,
    /// Its model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub model: Option<String>,
    /// Its temperature, degrees Celsius.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub temperature_c: Option<i64>,
    /// How long it has run, hours.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub power_on_hours: Option<u64>,
    /// Sectors that were replaced by spare ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reallocated_sectors: Option<u64>,
    /// Sectors that could not be read and wait to be written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pending_sectors: Option<u64>,
    /// Sectors that could not be read in its own tests.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uncorrectable_sectors: Option<u64>,
    /// Errors of the medium, of an `NVMe` device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_errors: Option<u64>,
    /// Share of its life that is used up, percent, of an `NVMe` device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub wear_percent: Option<u64>,
}

/// A disk.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Disk {
    /// Its id, from its superblock.
    #[schema(value_type = String, format = "uuid")]
    pub id: DiskId,
    /// Name of its node; empty where there is one node alone.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// Where it was last opened.
    pub path: String,
    /// Its state.
    pub state: DiskState,
    /// Why it is in that state, if there is more to say.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub state_reason: Option<String>,
    /// Size of the device, bytes.
    pub size: u64,
    /// Size of a slot, bytes.
    pub slot_bytes: u64,
    /// Number of slots.
    pub slots: u32,
    /// Slots in use.
    pub slots_used: u32,
    /// Bytes of the slots in use.
    pub used: u64,
    /// What the slots are for.
    #[serde(default)]
    pub space: Space,
    /// Errors since the node started.
    pub errors: DiskErrors,
    /// Those of them since the disk was last opened, which count for its health.
    #[serde(default)]
    pub recent_errors: DiskErrors,
    /// Mean latencies since the node started.
    pub latency: DiskLatency,
    /// Latest latencies, and those of its peers.
    #[serde(default)]
    pub timing: DiskTiming,
    /// What the device says of itself, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub smart: Option<Smart>,
}

impl Disk {
    /// Its path, with its node where there are several.
    pub fn place(&self) -> String {
        if self.node.is_empty() {
            self.path.clone()
        } else {
            format!("{}:{}", self.node, self.path)
        }
    }
}

/// Body of `POST /v1/disks`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct AddDisk {
    /// Absolute path on the node: a block device or a file.
    pub path: String,
    /// Size of the file to create when `path` does not exist; without it a missing file is an
    /// error. Not for block devices.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size: Option<u64>,
    /// Format it even if it carries something.
    #[serde(default)]
    pub force: bool,
}

impl AddDisk {
    /// Checks the form.
    ///
    /// # Errors
    /// [`ApiError::invalid`].
    pub fn check(&self) -> Result<(), ApiError> {
        if !self.path.starts_with('/') || self.path.contains('\0') {
            return Err(ApiError::invalid(format!(
                "disk path {:?} is not absolute",
                clip(&self.path)
            )));
        }
        if self.path.len() > PATH_BYTES_MAX {
            return Err(ApiError::invalid(format!(
                "the disk path is longer than {PATH_BYTES_MAX} bytes"
            )));
        }
        if self.size == Some(0) {
            return Err(ApiError::invalid("a disk of size 0 holds nothing"));
        }
        Ok(())
    }
}
