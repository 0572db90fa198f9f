//! Pools and their schemes.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::check_name;
use super::status::{Capacity, RepairProgress};
use crate::admin::error::ApiError;
use crate::admin::space::{Fill, Space};
use crate::id::PoolId;
use crate::limits::{DATA_SHARDS_MAX, PARITY_SHARDS_MAX};

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
