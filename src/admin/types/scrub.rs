//! Scrubs.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::volume::VolumeName;
use crate::admin::error::ApiError;

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
