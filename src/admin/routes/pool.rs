//! `/v1/pools`.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::{Body, Path};
use crate::admin::error::{ApiError, ErrorBody};
use crate::admin::server::Backend;
use crate::admin::types::{CreatePool, Pool, Removed, check_name};

/// All pools
#[utoipa::path(get, path = "/v1/pools", tag = "pools", responses(
    (status = 200, description = "sorted by name", body = [Pool]),
    (status = 503, description = "the node does not answer", body = ErrorBody)
))]
pub(in crate::admin) async fn list(
    State(backend): State<Backend>,
) -> Result<Json<Vec<Pool>>, ApiError> {
    backend.pool_list().await.map(Json)
}

/// Creates a pool
#[utoipa::path(post, path = "/v1/pools", tag = "pools", request_body = CreatePool, responses(
    (status = 201, description = "created", body = Pool),
    (status = 400, description = "malformed name, scheme or min_size", body = ErrorBody),
    (status = 409, description = "the name is taken", body = ErrorBody),
    (status = 503, description = "the node does not answer", body = ErrorBody),
    (status = 507, description = "too few failure domains for the scheme", body = ErrorBody)
))]
pub(in crate::admin) async fn create(
    State(backend): State<Backend>,
    Body(request): Body<CreatePool>,
) -> Result<(StatusCode, Json<Pool>), ApiError> {
    request.check()?;
    let pool = backend.pool_create(request).await?;
    Ok((StatusCode::CREATED, Json(pool)))
}

/// One pool
#[utoipa::path(get, path = "/v1/pools/{pool}", tag = "pools",
    params(("pool" = String, Path, description = "name of the pool")),
    responses(
        (status = 200, body = Pool),
        (status = 400, description = "malformed name", body = ErrorBody),
        (status = 404, description = "no such pool", body = ErrorBody),
        (status = 503, description = "the node does not answer", body = ErrorBody)
    ))]
pub(in crate::admin) async fn show(
    State(backend): State<Backend>,
    Path(pool): Path<String>,
) -> Result<Json<Pool>, ApiError> {
    check_name("pool", &pool)?;
    backend.pool_show(pool).await.map(Json)
}

/// Removes an empty pool
#[utoipa::path(delete, path = "/v1/pools/{pool}", tag = "pools",
    params(("pool" = String, Path, description = "name of the pool")),
    responses(
        (status = 200, description = "removed", body = Removed),
        (status = 400, description = "malformed name", body = ErrorBody),
        (status = 404, description = "no such pool", body = ErrorBody),
        (status = 409, description = "it has volumes", body = ErrorBody),
        (status = 503, description = "the node does not answer", body = ErrorBody)
    ))]
pub(in crate::admin) async fn remove(
    State(backend): State<Backend>,
    Path(pool): Path<String>,
) -> Result<Json<Removed>, ApiError> {
    check_name("pool", &pool)?;
    backend.pool_remove(pool).await.map(Json)
}
