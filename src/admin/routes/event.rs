//! `/v1/events`.

use axum::Json;
use axum::extract::State;

use super::Query;
use crate::admin::error::{ApiError, ErrorBody};
use crate::admin::events::{EVENTS_MAX, Event, EventQuery};
use crate::admin::server::Backend;

/// What happened lately
///
/// On all nodes that answer. Each node keeps the newest 2,000 events in memory; what happened before it was
/// started is in its log only.
#[utoipa::path(get, path = "/v1/events", tag = "events", params(EventQuery), responses(
    (status = 200, description = "the oldest first", body = [Event]),
    (status = 400, description = "malformed query", body = ErrorBody),
    (status = 503, description = "the node does not answer", body = ErrorBody)
))]
pub(in crate::admin) async fn list(
    State(backend): State<Backend>,
    Query(query): Query<EventQuery>,
) -> Result<Json<Vec<Event>>, ApiError> {
    if !(1..=EVENTS_MAX).contains(&query.limit) {
        return Err(ApiError::invalid(format!("limit is {}, not 1 to {EVENTS_MAX}", query.limit)));
    }
    backend.event_list(query.since_unix_ms, query.level, query.limit).await.map(Json)
}
