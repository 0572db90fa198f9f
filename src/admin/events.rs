//! Events as the admin API shows them.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};

/// Most events in one answer.
pub const EVENTS_MAX: u32 = 2_000;

/// How much an event matters.
#[derive(
    Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema,
)]
#[serde(rename_all = "lowercase")]
pub enum EventLevel {
    /// Something changed.
    #[default]
    Info,
    /// Somebody should look at it.
    Warning,
    /// Something does not work.
    Error,
}

impl std::fmt::Display for EventLevel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
        })
    }
}

/// Something that happened on a node.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Event {
    /// When, by the node's clock: milliseconds since 1970.
    pub at_unix_ms: u64,
    /// Name of the node; empty for a node that is alone.
    pub node: String,
    /// How much it matters.
    pub level: EventLevel,
    /// The part of the program that tells it.
    pub part: String,
    /// What happened.
    pub message: String,
    /// To what, and with what figures.
    pub fields: BTreeMap<String, String>,
}

/// Query of `GET /v1/events`.
#[derive(Debug, Clone, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
pub struct EventQuery {
    /// Only what happened from then on: milliseconds since 1970.
    #[serde(default)]
    pub since_unix_ms: u64,
    /// Only what matters as much.
    #[serde(default)]
    #[param(inline)]
    pub level: EventLevel,
    /// How many, the newest; at most 2,000.
    #[serde(default = "default_limit")]
    #[param(default = 200, minimum = 1, maximum = 2_000)]
    pub limit: u32,
}

const fn default_limit() -> u32 {
    200
}
