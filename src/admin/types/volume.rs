//! Volumes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

use super::pool::PoolScheme;
use super::status::RepairProgress;
use super::{check_name, clip};
use crate::admin::error::ApiError;
use crate::admin::space::Space;
use crate::id::{BLOCK_BYTES, VolumeId};
use crate::limits::VOLUME_BYTES_MAX;

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

/// Query of `GET /v1/volumes`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct VolumeQuery {
    /// Only the volumes of this pool.
    #[serde(default)]
    pub pool: Option<String>,
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
