//! `/v1/disks`.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::{Body, Path, Query};
use crate::admin::error::{ApiError, ErrorBody};
use crate::admin::server::Backend;
use crate::admin::types::{AddDisk, Disk, ForceQuery, Removed, clip};
use crate::id::DiskId;

fn parse(id: &str) -> Result<DiskId, ApiError> {
    id.parse().map_err(|_| {
        ApiError::invalid(format!("{:?} is not the id of a disk", clip(id)))
            .with_hint("GET /v1/disks lists the disks with their ids")
    })
}

/// All disks
#[utoipa::path(get, path = "/v1/disks", tag = "disks", responses(
    (status = 200, description = "sorted by path", body = [Disk]),
    (status = 503, description = "the node does not answer", body = ErrorBody)
))]
pub(in crate::admin) async fn list(
    State(backend): State<Backend>,
) -> Result<Json<Vec<Disk>>, ApiError> {
    backend.disk_list().await.map(Json)
}

/// Formats a device or a file and adds it
#[utoipa::path(post, path = "/v1/disks", tag = "disks", request_body = AddDisk, responses(
    (status = 201, description = "added", body = Disk),
    (status = 400, description = "malformed", body = ErrorBody),
    (status = 404, description = "no such path on the node", body = ErrorBody),
    (status = 409, description = "it is in use, or carries data and `force` is not set",
     body = ErrorBody),
    (status = 503, description = "the node does not answer", body = ErrorBody),
    (status = 507, description = "it is too small", body = ErrorBody)
))]
pub(in crate::admin) async fn add(
    State(backend): State<Backend>,
    Body(request): Body<AddDisk>,
) -> Result<(StatusCode, Json<Disk>), ApiError> {
    request.check()?;
    let disk = backend.disk_add(request).await?;
    Ok((StatusCode::CREATED, Json(disk)))
}

/// One disk
#[utoipa::path(get, path = "/v1/disks/{disk}", tag = "disks",
    params(("disk" = String, Path, description = "id of the disk")),
    responses(
        (status = 200, body = Disk),
        (status = 400, description = "malformed id", body = ErrorBody),
        (status = 404, description = "no such disk", body = ErrorBody),
        (status = 503, description = "the node does not answer", body = ErrorBody)
    ))]
pub(in crate::admin) async fn show(
    State(backend): State<Backend>,
    Path(disk): Path<String>,
) -> Result<Json<Disk>, ApiError> {
    backend.disk_show(parse(&disk)?).await.map(Json)
}

/// Takes a disk out of the node for good
#[utoipa::path(delete, path = "/v1/disks/{disk}", tag = "disks",
    params(("disk" = String, Path, description = "id of the disk"), ForceQuery),
    responses(
        (status = 200, description = "removed", body = Removed),
        (status = 400, description = "malformed id", body = ErrorBody),
        (status = 404, description = "no such disk", body = ErrorBody),
        (status = 409, description = "it holds data and `force` is not set, or data would be lost, or \
         it is being emptied and removed afterwards", body = ErrorBody),
        (status = 503, description = "the node does not answer", body = ErrorBody)
    ))]
pub(in crate::admin) async fn remove(
    State(backend): State<Backend>,
    Path(disk): Path<String>,
    Query(query): Query<ForceQuery>,
) -> Result<Json<Removed>, ApiError> {
    backend.disk_remove(parse(&disk)?, query.force).await.map(Json)
}

/// Takes a disk out of service
#[utoipa::path(put, path = "/v1/disks/{disk}/offline", tag = "disks",
    params(("disk" = String, Path, description = "id of the disk")),
    responses(
        (status = 200, description = "offline now", body = Disk),
        (status = 400, description = "malformed id", body = ErrorBody),
        (status = 404, description = "no such disk", body = ErrorBody),
        (status = 503, description = "the node does not answer", body = ErrorBody)
    ))]
pub(in crate::admin) async fn offline(
    State(backend): State<Backend>,
    Path(disk): Path<String>,
) -> Result<Json<Disk>, ApiError> {
    backend.disk_offline(parse(&disk)?).await.map(Json)
}

/// Has all data leave a disk, which stays in the node
#[utoipa::path(put, path = "/v1/disks/{disk}/drain", tag = "disks",
    params(("disk" = String, Path, description = "id of the disk")),
    responses(
        (status = 200, description = "being emptied, until it is put online", body = Disk),
        (status = 400, description = "malformed id", body = ErrorBody),
        (status = 404, description = "no such disk", body = ErrorBody),
        (status = 409, description = "the disk is not online", body = ErrorBody),
        (status = 503, description = "the node does not answer", body = ErrorBody)
    ))]
pub(in crate::admin) async fn drain(
    State(backend): State<Backend>,
    Path(disk): Path<String>,
) -> Result<Json<Disk>, ApiError> {
    backend.disk_drain(parse(&disk)?).await.map(Json)
}

/// Puts a disk into service again
#[utoipa::path(put, path = "/v1/disks/{disk}/online", tag = "disks",
    params(("disk" = String, Path, description = "id of the disk")),
    responses(
        (status = 200, description = "online now", body = Disk),
        (status = 400, description = "malformed id", body = ErrorBody),
        (status = 404, description = "no such disk, or nothing at its path", body = ErrorBody),
        (status = 409, description = "another disk is at its path", body = ErrorBody),
        (status = 503, description = "the node does not answer", body = ErrorBody)
    ))]
pub(in crate::admin) async fn online(
    State(backend): State<Backend>,
    Path(disk): Path<String>,
) -> Result<Json<Disk>, ApiError> {
    backend.disk_online(parse(&disk)?).await.map(Json)
}

/// Has another disk take the place of one, which is removed once it is empty
#[utoipa::path(post, path = "/v1/disks/{disk}/replace", tag = "disks", request_body = AddDisk,
    params(("disk" = String, Path, description = "id of the disk that goes")),
    responses(
        (status = 200, description = "the disk that takes its place", body = Disk),
        (status = 400, description = "malformed", body = ErrorBody),
        (status = 404, description = "no such disk, or no such path on the node", body = ErrorBody),
        (status = 409, description = "data would be lost, or what is at the path is in use, is not online, or \
         carries data and `force` is not set", body = ErrorBody),
        (status = 503, description = "the node does not answer", body = ErrorBody),
        (status = 507, description = "it is too small", body = ErrorBody)
    ))]
pub(in crate::admin) async fn replace(
    State(backend): State<Backend>,
    Path(disk): Path<String>,
    Body(request): Body<AddDisk>,
) -> Result<Json<Disk>, ApiError> {
    request.check()?;
    backend.disk_replace(parse(&disk)?, request).await.map(Json)
}
