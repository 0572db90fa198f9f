//! Set-up of the log: compact lines on standard error, filtered by `SDS_LOG`, and what is kept of it as events.

use std::io::{IsTerminal, stderr};

use tracing_subscriber::filter::filter_fn;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, fmt, registry};

use super::events::{Keeper, is_event};

/// The environment variable with the filter, such as `info,sds::disk=debug`.
pub const LOG_VARIABLE: &str = "SDS_LOG";

/// Why the log could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// The filter is malformed.
    #[error(
        "{LOG_VARIABLE}={value:?} is not a log filter: {reason} (example: info,sds::disk=debug)"
    )]
    Filter {
        /// As given.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A log was set up before in this process.
    #[error("the log is set up already")]
    Twice,
}

/// Starts logging for the process, with the filter in `SDS_LOG`, or `default` if it is unset or
/// empty. Call once, first thing in `main`.
///
/// # Errors
/// [`LogError`]; nothing is changed then.
pub fn init(default: &str) -> Result<(), LogError> {
    let value = std::env::var(LOG_VARIABLE).unwrap_or_default();
    let filter = filter(if value.is_empty() { default } else { &value })?;
    let lines = fmt::layer().compact().with_writer(stderr).with_ansi(stderr().is_terminal());
    registry()
        .with(lines.with_filter(filter))
        .with(Keeper.with_filter(filter_fn(is_event)))
        .try_init()
        .map_err(|_| LogError::Twice)
}

fn filter(value: &str) -> Result<EnvFilter, LogError> {
    EnvFilter::builder()
        .parse(value)
        .map_err(|e| LogError::Filter { value: value.to_owned(), reason: e.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_are_checked() {
        filter("info").expect("a level");
        filter("warn,sds::disk=trace").expect("a level and a module");
        let error = filter("sds=loud").expect_err("no such level");
        assert!(error.to_string().starts_with("SDS_LOG=\"sds=loud\""), "{error}");
    }
}
