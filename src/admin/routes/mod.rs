//! The handlers, one file per kind of thing, and the extractors that turn malformed input into
//! the API's own errors.

pub(super) mod disk;
pub(super) mod event;
pub(super) mod joining;
pub(super) mod node;
pub(super) mod pool;
pub(super) mod scrub;
pub(super) mod volume;

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection, QueryRejection};
use axum::extract::{self, FromRequest, FromRequestParts, Request, State};
use axum::http::request::Parts;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::de::DeserializeOwned;

use super::error::{ApiError, ErrorBody, ErrorCode};
use super::server::{Backend, openapi_json};
use super::types::{Health, HealthLevel, Status};

/// A JSON body, or the API's own error.
pub(super) struct Body<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let Json(value) = Json::from_request(request, state).await?;
        Ok(Self(value))
    }
}

/// Parts of the path, or the API's own error.
pub(super) struct Path<T>(pub(super) T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let extract::Path(value) = extract::Path::from_request_parts(parts, state).await?;
        Ok(Self(value))
    }
}

/// The query, or the API's own error.
pub(super) struct Query<T>(pub(super) T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequestParts<S> for Query<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let extract::Query(value) = extract::Query::from_request_parts(parts, state).await?;
        Ok(Self(value))
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        let code = match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => ErrorCode::PayloadTooLarge,
            StatusCode::UNSUPPORTED_MEDIA_TYPE => ErrorCode::UnsupportedMediaType,
            _ => ErrorCode::InvalidArgument,
        };
        Self { code, message: rejection.body_text(), hint: None }
    }
}

impl From<PathRejection> for ApiError {
    fn from(rejection: PathRejection) -> Self {
        Self::invalid(rejection.body_text())
    }
}

impl From<QueryRejection> for ApiError {
    fn from(rejection: QueryRejection) -> Self {
        Self::invalid(rejection.body_text())
    }
}

/// The node at a glance
#[utoipa::path(get, path = "/v1/status", tag = "node", responses(
    (status = 200, body = Status),
    (status = 503, description = "the node does not answer", body = ErrorBody)
))]
pub(super) async fn status(State(backend): State<Backend>) -> Result<Json<Status>, ApiError> {
    backend.status().await.map(Json)
}

/// Health, for load balancers and service managers: 503 only if critical
#[utoipa::path(get, path = "/healthz", tag = "node", responses(
    (status = 200, description = "ok or warning: everything is served", body = Health),
    (status = 503, description = "critical; or the node does not answer (an error body)",
     body = Health)
))]
pub(super) async fn healthz(State(backend): State<Backend>) -> Result<Response, ApiError> {
    let health = backend.health().await?;
    let status = match health.health {
        HealthLevel::Critical => StatusCode::SERVICE_UNAVAILABLE,
        HealthLevel::Ok | HealthLevel::Warning => StatusCode::OK,
    };
    Ok((status, Json(health)).into_response())
}

/// All metrics in the Prometheus text format 0.0.4
#[utoipa::path(get, path = "/metrics", tag = "node", responses(
    (status = 200, body = String, content_type = "text/plain; version=0.0.4"),
    (status = 503, description = "the node does not answer", body = ErrorBody)
))]
pub(super) async fn metrics(State(backend): State<Backend>) -> Result<Response, ApiError> {
    let text = backend.metrics().await?;
    Ok(([(header::CONTENT_TYPE, "text/plain; version=0.0.4")], text).into_response())
}

/// This document
#[utoipa::path(get, path = "/v1/openapi.json", tag = "node", responses(
    (status = 200, description = "the OpenAPI document", body = Object)
))]
pub(super) async fn openapi() -> Response {
    ([(header::CONTENT_TYPE, "application/json")], openapi_json()).into_response()
}
