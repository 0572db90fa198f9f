//! The error of the admin API: a code for programs, a message and a hint for people.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// What kind of failure it was; fixes the HTTP status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// 400: the request is malformed or one of its values is out of range.
    InvalidArgument,
    /// 403: who asks may not do this; or a join token is not good.
    Forbidden,
    /// 404: no such disk, pool, volume or path.
    NotFound,
    /// 405: the path exists, the method does not.
    MethodNotAllowed,
    /// 409: the name is taken, or the thing is in use or in a state that forbids it.
    Conflict,
    /// 409: data would be lost; repeat with `force`.
    ConfirmationRequired,
    /// 413: the body is too large.
    PayloadTooLarge,
    /// 415: the body is not declared as `application/json`.
    UnsupportedMediaType,
    /// 429: too many wrong tries; wait.
    RateLimited,
    /// 500: a defect, or the device or store failed.
    Internal,
    /// 503: the node is starting, stopping or overloaded, or too few disks are online. Nothing
    /// was done.
    Unavailable,
    /// 503: no answer in time. The request may or may not take effect.
    Timeout,
    /// 507: not enough space or too few disks for what was asked.
    NoSpace,
    /// Any code that this version does not know (a newer server).
    #[serde(other)]
    Unknown,
}

impl ErrorCode {
    /// The HTTP status that carries this code.
    pub const fn http_status(self) -> u16 {
        match self {
            Self::InvalidArgument => 400,
            Self::Forbidden => 403,
            Self::NotFound => 404,
            Self::MethodNotAllowed => 405,
            Self::Conflict | Self::ConfirmationRequired => 409,
            Self::PayloadTooLarge => 413,
            Self::UnsupportedMediaType => 415,
            Self::RateLimited => 429,
            Self::Internal | Self::Unknown => 500,
            Self::Unavailable | Self::Timeout => 503,
            Self::NoSpace => 507,
        }
    }
}

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ApiError {
    /// For programs.
    pub code: ErrorCode,
    /// What failed, and where: one sentence without a full stop.
    pub message: String,
    /// What to do about it, if anything is known to help.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

macro_rules! constructors {
    ($($(#[$doc:meta])* $name:ident => $code:ident;)*) => {
        $($(#[$doc])* pub fn $name(message: impl Into<String>) -> Self {
            Self { code: ErrorCode::$code, message: message.into(), hint: None }
        })*
    };
}

impl ApiError {
    constructors! {
        /// A value is malformed or out of range.
        invalid => InvalidArgument;
        /// The thing does not exist.
        not_found => NotFound;
        /// The name is taken, or the thing's state forbids the request.
        conflict => Conflict;
        /// Data would be lost without `force`.
        confirmation_required => ConfirmationRequired;
        /// A defect, or a device or the store failed.
        internal => Internal;
        /// Not now; nothing was done.
        unavailable => Unavailable;
        /// No answer in time; the outcome is unknown.
        timeout => Timeout;
        /// Not enough space or disks.
        no_space => NoSpace;
    }

    /// The same error with a hint.
    #[must_use]
    pub fn with_hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }
}

/// Body of every answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ApiError,
}
