//! Requests and answers of the admin API, as they travel in JSON.
//!
//! Sizes are bytes, times seconds unless the name ends in another unit. Unknown fields of a
//! request are refused, so that a misspelled option never silently does nothing; unknown fields
//! of an answer are ignored, so that an older `sdsctl` can talk to a newer node.

mod disk;
mod pool;
mod scrub;
mod status;
mod volume;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

pub use self::disk::{
    AddDisk, Disk, DiskErrors, DiskLatency, DiskState, DiskTiming, LatencyFigures, Smart,
};
pub use self::pool::{CreatePool, FailureDomain, Pool, PoolScheme};
pub use self::scrub::{Scrub, ScrubState, StartScrub};
pub use self::status::{
    Capacity, DiskCounts, Health, HealthLevel, PoolCapacity, Reason, RepairProgress, Status,
    VolumeCounts,
};
pub use self::volume::{
    CreateVolume, Narrowed, Redundancy, ResizeVolume, Volume, VolumeName, VolumeQuery, VolumeState,
    check_volume_size,
};
use crate::admin::error::ApiError;
pub use crate::admin::space::{Fill, Forecast, Space};

/// Longest name of a pool or a volume, bytes.
pub const NAME_BYTES_MAX: usize = 63;
/// Longest path of a disk, bytes (`PATH_MAX`).
pub const PATH_BYTES_MAX: usize = 4096;

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

/// Answer to a removal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Removed {
    /// `disk`, `pool` or `volume`.
    pub kind: String,
    /// What was removed: the id of a disk, the name of a pool or a volume.
    pub name: String,
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

/// The start of a text that a user sent, short enough for an error message.
pub(crate) fn clip(text: &str) -> String {
    const CHARS_MAX: usize = 80;
    if text.chars().nth(CHARS_MAX).is_none() {
        return text.to_owned();
    }
    text.chars().take(CHARS_MAX).chain(['…']).collect()
}
