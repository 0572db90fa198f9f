//! `/v1/volumes`.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::{Body, Path, Query};
use crate::admin::error::{ApiError, ErrorBody};
use crate::admin::server::Backend;
use crate::admin::types::{
    CreateVolume, ForceQuery, Removed, ResizeVolume, Volume, VolumeName, VolumeQuery, check_name,
    check_volume_size,
};

/// All volumes
#[utoipa::path(get, path = "/v1/volumes", tag = "volumes", params(VolumeQuery), responses(
    (status = 200, description = "sorted by name", body = [Volume]),
    (status = 400, description = "malformed pool name", body = ErrorBody),
    (status = 404, description = "no such pool", body = ErrorBody),
    (status = 503, description = "the node does not answer", body = ErrorBody)
))]
pub(in crate::admin) async fn list(
    State(backend): State<Backend>,
    Query(query): Query<VolumeQuery>,
) -> Result<Json<Vec<Volume>>, ApiError> {
    if let Some(pool) = &query.pool {
        check_name("pool", pool)?;
    }
    backend.volume_list(query.pool).await.map(Json)
}

/// Creates and exports a volume
#[utoipa::path(post, path = "/v1/volumes", tag = "volumes", request_body = CreateVolume,
    responses(
        (status = 201, description = "created", body = Volume),
        (status = 400, description = "malformed name or size", body = ErrorBody),
        (status = 404, description = "no such pool", body = ErrorBody),
        (status = 409, description = "the name is taken", body = ErrorBody),
        (status = 503, description = "the node does not answer", body = ErrorBody),
        (status = 507, description = "the pool is full", body = ErrorBody)
    ))]
pub(in crate::admin) async fn create(
    State(backend): State<Backend>,
    Body(request): Body<CreateVolume>,
) -> Result<(StatusCode, Json<Volume>), ApiError> {
    request.check()?;
    let volume = backend.volume_create(request).await?;
    Ok((StatusCode::CREATED, Json(volume)))
}

/// One volume
#[utoipa::path(get, path = "/v1/volumes/{pool}/{name}", tag = "volumes",
    params(("pool" = String, Path, description = "name of the pool"),
           ("name" = String, Path, description = "name of the volume in the pool")),
    responses(
        (status = 200, body = Volume),
        (status = 400, description = "malformed name", body = ErrorBody),
        (status = 404, description = "no such volume", body = ErrorBody),
        (status = 503, description = "the node does not answer", body = ErrorBody)
    ))]
pub(in crate::admin) async fn show(
    State(backend): State<Backend>,
    Path((pool, name)): Path<(String, String)>,
) -> Result<Json<Volume>, ApiError> {
    backend.volume_show(VolumeName::new(&pool, &name)?).await.map(Json)
}

/// Changes the size of a volume while it is in use
#[utoipa::path(patch, path = "/v1/volumes/{pool}/{name}", tag = "volumes",
    params(("pool" = String, Path, description = "name of the pool"),
           ("name" = String, Path, description = "name of the volume in the pool")),
    request_body = ResizeVolume,
    responses(
        (status = 200, description = "resized", body = Volume),
        (status = 400, description = "malformed name or size", body = ErrorBody),
        (status = 404, description = "no such volume", body = ErrorBody),
        (status = 409, description = "it would become smaller and `force` is not set",
         body = ErrorBody),
        (status = 503, description = "the node does not answer", body = ErrorBody)
    ))]
pub(in crate::admin) async fn resize(
    State(backend): State<Backend>,
    Path((pool, name)): Path<(String, String)>,
    Body(request): Body<ResizeVolume>,
) -> Result<Json<Volume>, ApiError> {
    let volume = VolumeName::new(&pool, &name)?;
    check_volume_size(request.size)?;
    backend.volume_resize(volume, request).await.map(Json)
}

/// Removes a volume
#[utoipa::path(delete, path = "/v1/volumes/{pool}/{name}", tag = "volumes",
    params(("pool" = String, Path, description = "name of the pool"),
           ("name" = String, Path, description = "name of the volume in the pool"), ForceQuery),
    responses(
        (status = 200, description = "removed", body = Removed),
        (status = 400, description = "malformed name", body = ErrorBody),
        (status = 404, description = "no such volume", body = ErrorBody),
        (status = 409, description = "it holds data and `force` is not set, or is in use",
         body = ErrorBody),
        (status = 503, description = "the node does not answer", body = ErrorBody)
    ))]
pub(in crate::admin) async fn remove(
    State(backend): State<Backend>,
    Path((pool, name)): Path<(String, String)>,
    Query(query): Query<ForceQuery>,
) -> Result<Json<Removed>, ApiError> {
    backend.volume_remove(VolumeName::new(&pool, &name)?, query.force).await.map(Json)
}
