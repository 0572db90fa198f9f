//! Space, as it is told of volumes, pools and disks: each word means the same everywhere.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::types::HealthLevel;

/// What the slots of a volume, a pool or a disk are for, bytes on disks: redundancy included.
///
/// Of a disk and of a pool, what volumes hold that are not served is in `used` (of the disk, or of the
/// pool's capacity) and nowhere else, because only their heads know it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Space {
    /// Slots that are taken. A slot is taken whole, however little of it was written.
    pub used: u64,
    /// Of `used`: what volumes refer to, their index included. What was overwritten or trimmed counts
    /// until the volume's next checkpoint.
    pub live: u64,
    /// Set aside for what comes next: the unwritten rest of the slots that volumes are writing to
    /// (part of `used`), and, of disks and pools, the free slots that are kept back from clients so
    /// that checkpoints, trims, garbage collection and repair can always run.
    pub reserved: u64,
    /// Of `used`: neither live nor such a rest. Checkpoints and garbage collection give it back when
    /// it is wanted, but for what they would move more for than they gain.
    pub reclaimable: u64,
}

impl Space {
    /// Adds another.
    pub fn add(&mut self, other: Self) {
        self.used = self.used.saturating_add(other.used);
        self.live = self.live.saturating_add(other.live);
        self.reserved = self.reserved.saturating_add(other.reserved);
        self.reclaimable = self.reclaimable.saturating_add(other.reclaimable);
    }
}

/// When a pool will be full if its net growth goes on.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum Forecast {
    /// It has not been watched for long enough.
    #[default]
    Unknown,
    /// It does not grow, or so slowly that it would not be full within ten years.
    NotGrowing,
    /// It grows.
    Growing {
        /// How fast, bytes on disks a day.
        bytes_per_day: u64,
        /// Seconds until clients get no space.
        full_in_s: u64,
    },
}

/// How full a pool is for its clients.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Fill {
    /// What cannot be given back, percent of what clients may take. Garbage is not counted.
    pub percent: u64,
    /// Which of the configured levels that has reached; it is left a little below.
    pub level: HealthLevel,
    /// Clients are refused space now.
    pub full: bool,
    /// New data that clients can write before garbage collection has to give anything back, bytes of
    /// theirs: about, because records have headers, and small writes to erasure-coded pools are copies
    /// at first.
    pub writable: u64,
    /// Sizes of the pool's volumes together, bytes.
    pub provisioned: u64,
    /// `provisioned`, percent of what clients could store in all: above 100 the volumes promise more
    /// than there is.
    pub thin_percent: u64,
    /// Whether that is more than was configured to be told.
    pub overcommitted: bool,
    /// When it will be full.
    pub forecast: Forecast,
}

impl fmt::Display for Forecast {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unknown => f.pad("not known yet"),
            Self::NotGrowing => f.pad("not growing"),
            Self::Growing { full_in_s, .. } => {
                let (days, hours) = (full_in_s / 86_400, full_in_s / 3_600);
                let text = match (days, hours) {
                    (2.., _) => format!("full in {days} days"),
                    (_, 2..) => format!("full in {hours} hours"),
                    _ => format!("full in {} minutes", full_in_s.div_ceil(60)),
                };
                f.pad(&text)
            }
        }
    }
}
