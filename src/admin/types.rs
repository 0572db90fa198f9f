//! Requests and answers of the admin API, as they travel in JSON.
//!
//! Sizes are bytes, times seconds unless the name ends in another unit. Unknown fields of a
//! request are refused, so that a misspelled option never silently does nothing; unknown fields
//! of an answer are ignored, so that an older `sdsctl` can talk to a newer node.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::error::ApiError;
pub use super::space::{Fill, Forecast, Space};
use crate::id::{BLOCK_BYTES, DiskId, PoolId, VolumeId};
use crate::limits::{DATA_SHARDS_MAX, PARITY_SHARDS_MAX, VOLUME_BYTES_MAX};

/// Longest name of a pool or a volume, bytes.
pub const NAME_BYTES_MAX: usize = 63;
/// Longest path of a disk, bytes (`PATH_MAX`).
pub const PATH_BYTES_MAX: usize = 4096;

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

/// How a pool makes its data redundant.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "kind", rename_all = "lowercase", deny_unknown_fields)]
pub enum PoolScheme {
    /// Erasure coding: survives the loss of any `parity` of `data + parity` shards.
    Ec {
        /// Data shards, 2 to 16.
        data: u8,
        /// Parity shards, 1 to 4.
        parity: u8,
    },
    /// Full copies: survives the loss of all but one.
    Replicas {
        /// Copies, 1 to 5.
        copies: u8,
    },
}

impl PoolScheme {
    /// Shards that may be lost without losing data.
    pub const fn tolerates(self) -> u8 {
        match self {
            Self::Ec { parity, .. } => parity,
            Self::Replicas { copies } => copies.saturating_sub(1),
        }
    }

    /// Failure domains that a full segment needs.
    pub const fn width(self) -> u8 {
        match self {
            Self::Ec { data, parity } => data.saturating_add(parity),
            Self::Replicas { copies } => copies,
        }
    }

    /// The `min_size` of a pool that asks for none: 2 copies, or 1 where there are at most two.
    pub const fn default_min_size(self) -> u8 {
        if self.tolerates() < 2 { 1 } else { 2 }
    }

    /// Checks the numbers.
    ///
    /// # Errors
    /// [`ApiError::invalid`], naming the bounds.
    pub fn check(self) -> Result<(), ApiError> {
        let ok = match self {
            Self::Ec { data, parity } => {
                (2..=DATA_SHARDS_MAX).contains(&usize::from(data))
                    && (1..=PARITY_SHARDS_MAX).contains(&usize::from(parity))
            }
            Self::Replicas { copies } => (1..=PARITY_SHARDS_MAX + 1).contains(&usize::from(copies)),
        };
        if ok {
            return Ok(());
        }
        Err(ApiError::invalid(format!("scheme {self} is out of range")).with_hint(format!(
            "erasure coding takes 2+1 to {DATA_SHARDS_MAX}+{PARITY_SHARDS_MAX}, replication 1 to \
             {} replicas",
            PARITY_SHARDS_MAX + 1
        )))
    }
}

impl fmt::Display for PoolScheme {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ec { data, parity } => write!(f, "ec {data}+{parity}"),
            Self::Replicas { copies: 1 } => f.write_str("1 replica"),
            Self::Replicas { copies } => write!(f, "{copies} replicas"),
        }
    }
}

/// What no two shards of a segment share.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum FailureDomain {
    /// A disk.
    #[default]
    Disk,
    /// A node.
    Node,
    /// A rack.
    Rack,
}

impl fmt::Display for FailureDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Disk => "disk",
            Self::Node => "node",
            Self::Rack => "rack",
        })
    }
}

/// A pool.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pool {
    /// Its id.
    #[schema(value_type = String, format = "uuid")]
    pub id: PoolId,
    /// Its name.
    pub name: String,
    /// Redundancy of its volumes.
    pub scheme: PoolScheme,
    /// What no two shards of a segment share.
    pub failure_domain: FailureDomain,
    /// Writes wait below this many copies.
    pub min_size: u8,
    /// Failure domains that are online.
    pub domains_online: u32,
    /// Raw space of the disks it may use.
    pub capacity: Capacity,
    /// What that is for, of its volumes; what is kept back of all disks is in `reserved`.
    #[serde(default)]
    pub space: Space,
    /// How full it is.
    #[serde(default)]
    pub fill: Fill,
    /// Bytes that clients could store in all, at the pool's scheme, on disks without anything on them.
    pub usable: u64,
    /// Bytes that clients have stored, before redundancy.
    pub stored: u64,
    /// Number of its volumes.
    pub volumes: u32,
    /// Present while redundancy of its volumes is being restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repair: Option<RepairProgress>,
}

/// Redundancy of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "state", rename_all = "lowercase")]
pub enum Redundancy {
    /// Every segment has all its shards.
    Full,
    /// Some segments lack shards.
    Reduced {
        /// How many segments.
        segments: u64,
        /// Further losses that the worst of them survives.
        tolerates: u8,
    },
}

impl fmt::Display for Redundancy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Full => f.pad("full"),
            Self::Reduced { segments, .. } => f.pad(&format!("reduced ({segments} segments)")),
        }
    }
}

/// How far a volume's data segments are from the pool's scheme, because failure domains are or were
/// too few for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Narrowed {
    /// Scheme in which data is written now.
    pub scheme: PoolScheme,
    /// Failure domains that count.
    pub domains: u32,
    /// Bytes of clients that are stored in a narrower scheme than the pool's.
    pub narrow_bytes: u64,
    /// Bytes of clients that are to be moved to a narrower scheme still, because a shard of them can
    /// be rebuilt nowhere.
    pub to_narrow_bytes: u64,
    /// Further losses of failure domains that all of the volume survives now.
    pub tolerates: u8,
}

/// State of a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum VolumeState {
    /// Its head serves it.
    Online,
    /// Its head is taking over: replaying the log or waiting for a lease to run out.
    Opening,
    /// Writes wait: fewer than `min_size` domains are healthy, or the pool is full.
    Stalled,
    /// It cannot be served; the failures say why.
    Failed,
    /// It was removed and its space is being freed.
    Deleting,
}

impl fmt::Display for VolumeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Online => "online",
            Self::Opening => "opening",
            Self::Stalled => "stalled",
            Self::Failed => "failed",
            Self::Deleting => "deleting",
        })
    }
}

/// A volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Volume {
    /// Its id, never used again.
    #[schema(value_type = String, format = "uuid")]
    pub id: VolumeId,
    /// Name of the node that serves it, or is to; empty where there is one node alone.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub node: String,
    /// `pool/name`.
    pub name: String,
    /// Size that clients see, bytes.
    pub size: u64,
    /// Bytes beyond that size that a shrink cut off and that are still being deleted; the volume does
    /// not grow before.
    #[serde(default)]
    pub cutting: u64,
    /// Bytes that have storage, before redundancy.
    pub allocated: u64,
    /// What its slots are for.
    #[serde(default)]
    pub space: Space,
    /// `incarnation.count` of its head's epoch.
    pub epoch: String,
    /// Whether every segment has all its shards.
    pub redundancy: Redundancy,
    /// Where clients attach it, as URIs.
    pub exports: Vec<String>,
    /// Whether it is served.
    pub state: VolumeState,
    /// Failures that are not over: what waits or fails, and for whom.
    pub failures: Vec<String>,
    /// Places that scrubs found at which no combination of shards yields what was written.
    #[serde(default)]
    pub unrepairable: u64,
    /// Whether its data is or was fitted to fewer failure domains than the pool asks for; none if all is as
    /// the pool asks for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub narrowed: Option<Narrowed>,
    /// Present while its redundancy is being restored.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub repair: Option<RepairProgress>,
    /// Present while its shards are moved from full disks to empty ones; its "rebuilt" is "moved".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub balance: Option<RepairProgress>,
}

/// Whether a scrub is under way.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum ScrubState {
    /// It waits for the next period.
    Idle,
    /// A round is under way.
    Running,
    /// The volume is not served.
    Unavailable,
}

impl fmt::Display for ScrubState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Idle => "idle",
            Self::Running => "running",
            Self::Unavailable => "unavailable",
        })
    }
}

/// The scrub of a volume. Counts of findings are of the present round, or of the last one since
/// the volume was taken over.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Scrub {
    /// `pool/name`.
    pub volume: String,
    /// Whether a round is under way.
    pub state: ScrubState,
    /// Bytes of the round that are done; 0 while idle.
    pub bytes_done: u64,
    /// Bytes of the round; 0 while idle.
    pub bytes_total: u64,
    /// Bytes that could not be checked, because their disk was away.
    pub bytes_unchecked: u64,
    /// Estimate of the time to the end of the round; none before there is a rate to judge by.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub eta_s: Option<u64>,
    /// When the last round ended, seconds since 1970; none if none has.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub finished_at: Option<u64>,
    /// Bad blocks, and shards that were not there or not whole.
    pub found: u64,
    /// Of them, those that are right again.
    pub repaired: u64,
    /// Places at which no combination of shards yields what was written, as far as known.
    pub unrepairable: u64,
}

/// Body of `POST /v1/scrubs`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct StartScrub {
    /// `pool/name`; without it, all volumes that are served.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<String>,
}

impl StartScrub {
    /// Checks the form.
    ///
    /// # Errors
    /// [`ApiError::invalid`].
    pub fn check(&self) -> Result<Option<VolumeName>, ApiError> {
        self.volume.as_deref().map(str::parse).transpose()
    }
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

/// Body of `POST /v1/pools`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreatePool {
    /// Its name: small letters, digits, `.`, `_`, `-`; at most 63, the first a letter or a digit.
    pub name: String,
    /// Redundancy of its volumes.
    pub scheme: PoolScheme,
    /// What no two shards of a segment share.
    #[serde(default)]
    pub failure_domain: FailureDomain,
    /// Writes wait below this many copies; see [`PoolScheme::default_min_size`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min_size: Option<u8>,
}

impl CreatePool {
    /// Checks the form.
    ///
    /// # Errors
    /// [`ApiError::invalid`].
    pub fn check(&self) -> Result<(), ApiError> {
        check_name("pool", &self.name)?;
        self.scheme.check()?;
        let copies = self.scheme.tolerates() + 1;
        match self.min_size {
            Some(n) if n == 0 || n > copies => Err(ApiError::invalid(format!(
                "min_size {n} is out of range for {}: 1 to {copies}",
                self.scheme
            ))),
            _ => Ok(()),
        }
    }

    /// The `min_size` asked for, or the default of the scheme.
    pub fn effective_min_size(&self) -> u8 {
        self.min_size.unwrap_or_else(|| self.scheme.default_min_size())
    }
}

/// Body of `POST /v1/volumes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// `pool/name`.
    pub name: String,
    /// Size that clients see, bytes: a positive multiple of 4096, at most 1 PiB.
    pub size: u64,
}

impl CreateVolume {
    /// Checks the form.
    ///
    /// # Errors
    /// [`ApiError::invalid`].
    pub fn check(&self) -> Result<VolumeName, ApiError> {
        let name = self.name.parse()?;
        check_volume_size(self.size)?;
        Ok(name)
    }
}

/// Body of `PATCH /v1/volumes/{pool}/{name}`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResizeVolume {
    /// The new size, bytes, with the bounds of [`CreateVolume::size`].
    pub size: u64,
    /// Must be set to make the volume smaller, which destroys what lies beyond the new end; refused
    /// all the same while a client is attached.
    #[serde(default)]
    pub force: bool,
}

/// Query of requests that may destroy data.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct ForceQuery {
    /// Go on although data is destroyed.
    #[serde(default)]
    #[param(required = false)]
    pub force: bool,
}

/// Query of `GET /v1/volumes`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct VolumeQuery {
    /// Only the volumes of this pool.
    #[serde(default)]
    pub pool: Option<String>,
}

/// Answer to a removal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Removed {
    /// `disk`, `pool` or `volume`.
    pub kind: String,
    /// What was removed: the id of a disk, the name of a pool or a volume.
    pub name: String,
}

/// `pool/name`, both checked.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(into = "String", try_from = "String")]
pub struct VolumeName {
    /// Name of the pool.
    pub pool: String,
    /// Name of the volume in the pool.
    pub name: String,
}

impl VolumeName {
    /// Puts together and checks the two parts.
    ///
    /// # Errors
    /// [`ApiError::invalid`].
    pub fn new(pool: &str, name: &str) -> Result<Self, ApiError> {
        check_name("pool", pool)?;
        check_name("volume", name)?;
        Ok(Self { pool: pool.to_owned(), name: name.to_owned() })
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.pool, self.name)
    }
}

impl From<VolumeName> for String {
    fn from(name: VolumeName) -> Self {
        name.to_string()
    }
}

impl TryFrom<String> for VolumeName {
    type Error = ApiError;
    fn try_from(name: String) -> Result<Self, ApiError> {
        name.parse()
    }
}

impl FromStr for VolumeName {
    type Err = ApiError;

    fn from_str(s: &str) -> Result<Self, ApiError> {
        let (pool, name) = s.split_once('/').ok_or_else(|| {
            ApiError::invalid(format!("volume name {:?} lacks its pool", clip(s)))
                .with_hint("a volume is named POOL/NAME, for example default/vol0")
        })?;
        Self::new(pool, name)
    }
}

/// Checks the name of a `what` (a pool, a volume).
///
/// # Errors
/// [`ApiError::invalid`] unless it is 1 to [`NAME_BYTES_MAX`] small ASCII letters, digits, `.`, `_`,
/// `-`, the first a letter or a digit.
pub fn check_name(what: &str, name: &str) -> Result<(), ApiError> {
    let small = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = name.as_bytes();
    let ok = (1..=NAME_BYTES_MAX).contains(&bytes.len())
        && small(bytes[0])
        && bytes.iter().all(|b| small(*b) || matches!(b, b'.' | b'_' | b'-'));
    if ok {
        return Ok(());
    }
    Err(ApiError::invalid(format!("{:?} is not a name for a {what}", clip(name))).with_hint(
        format!(
            "a name has 1 to {NAME_BYTES_MAX} small letters, digits, '.', '_' or '-', and begins with a \
         letter or a digit"
        ),
    ))
}

/// Checks the size of a volume, bytes.
///
/// # Errors
/// [`ApiError::invalid`] if it is 0, no multiple of [`BLOCK_BYTES`] or above
/// [`VOLUME_BYTES_MAX`].
pub fn check_volume_size(size: u64) -> Result<(), ApiError> {
    if size == 0 {
        return Err(ApiError::invalid("a volume of size 0 holds nothing"));
    }
    if size > VOLUME_BYTES_MAX {
        return Err(ApiError::invalid(format!(
            "a volume of {size} bytes is too large: at most {VOLUME_BYTES_MAX} bytes (1 PiB)"
        )));
    }
    if !size.is_multiple_of(BLOCK_BYTES) {
        return Err(ApiError::invalid(format!(
            "a size of {size} bytes is no multiple of {BLOCK_BYTES}"
        )));
    }
    Ok(())
}

/// The start of a text that a user sent, short enough for an error message.
pub(crate) fn clip(text: &str) -> String {
    const CHARS_MAX: usize = 80;
    if text.chars().nth(CHARS_MAX).is_none() {
        return text.to_owned();
    }
    text.chars().take(CHARS_MAX).chain(['…']).collect()
}
