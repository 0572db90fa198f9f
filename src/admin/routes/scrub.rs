//! `/v1/scrubs`.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::Body;
use crate::admin::error::{ApiError, ErrorBody};
use crate::admin::server::Backend;
use crate::admin::types::{Scrub, StartScrub};

/// The scrubs of all volumes
#[utoipa::path(get, path = "/v1/scrubs", tag = "scrubs", responses(
    (status = 200, description = "sorted by name", body = [Scrub]),
    (status = 503, description = "the node does not answer", body = ErrorBody)
))]
pub(in crate::admin) async fn list(
    State(backend): State<Backend>,
) -> Result<Json<Vec<Scrub>>, ApiError> {
    backend.scrub_list().await.map(Json)
}

/// Begins to scrub a volume, or all; what is under way goes on
#[utoipa::path(post, path = "/v1/scrubs", tag = "scrubs", request_body = StartScrub, responses(
    (status = 202, description = "begun, or under way already: the scrubs asked for",
     body = [Scrub]),
    (status = 400, description = "malformed name", body = ErrorBody),
    (status = 404, description = "no such volume", body = ErrorBody),
    (status = 503, description = "the volume is not served, or the node does not answer",
     body = ErrorBody)
))]
pub(in crate::admin) async fn start(
    State(backend): State<Backend>,
    Body(request): Body<StartScrub>,
) -> Result<(StatusCode, Json<Vec<Scrub>>), ApiError> {
    let scrubs = backend.scrub_start(request.check()?).await?;
    Ok((StatusCode::ACCEPTED, Json(scrubs)))
}
