//! `/v1/nodes`.

use axum::Json;
use axum::extract::State;

use super::Path;
use crate::admin::error::{ApiError, ErrorBody};
use crate::admin::nodes::Node;
use crate::admin::server::Backend;
use crate::admin::types::{Removed, check_name};

/// All nodes
#[utoipa::path(get, path = "/v1/nodes", tag = "nodes", responses(
    (status = 200, description = "sorted by name", body = [Node]),
    (status = 503, description = "the node does not answer", body = ErrorBody)
))]
pub(in crate::admin) async fn list(
    State(backend): State<Backend>,
) -> Result<Json<Vec<Node>>, ApiError> {
    backend.node_list().await.map(Json)
}

/// One node
#[utoipa::path(get, path = "/v1/nodes/{node}", tag = "nodes",
    params(("node" = String, Path, description = "name of the node")),
    responses(
        (status = 200, body = Node),
        (status = 400, description = "malformed name", body = ErrorBody),
        (status = 404, description = "no such node", body = ErrorBody),
        (status = 503, description = "the node does not answer", body = ErrorBody)
    ))]
pub(in crate::admin) async fn show(
    State(backend): State<Backend>,
    Path(node): Path<String>,
) -> Result<Json<Node>, ApiError> {
    check_name("node", &node)?;
    backend.node_show(node).await.map(Json)
}

/// Has heads and shards leave a node
///
/// Returns at once; the node stays one of the cluster.
#[utoipa::path(put, path = "/v1/nodes/{node}/drain", tag = "nodes",
    params(("node" = String, Path, description = "name of the node")),
    responses(
        (status = 200, body = Node),
        (status = 400, description = "malformed name", body = ErrorBody),
        (status = 404, description = "no such node", body = ErrorBody),
        (status = 409, description = "there is no other node", body = ErrorBody),
        (status = 503, description = "the node does not answer", body = ErrorBody)
    ))]
pub(in crate::admin) async fn drain(
    State(backend): State<Backend>,
    Path(node): Path<String>,
) -> Result<Json<Node>, ApiError> {
    check_name("node", &node)?;
    backend.node_drain(node).await.map(Json)
}

/// Uses a node again that was being drained
#[utoipa::path(put, path = "/v1/nodes/{node}/undrain", tag = "nodes",
    params(("node" = String, Path, description = "name of the node")),
    responses(
        (status = 200, body = Node),
        (status = 400, description = "malformed name", body = ErrorBody),
        (status = 404, description = "no such node", body = ErrorBody),
        (status = 503, description = "the node does not answer", body = ErrorBody)
    ))]
pub(in crate::admin) async fn undrain(
    State(backend): State<Backend>,
    Path(node): Path<String>,
) -> Result<Json<Node>, ApiError> {
    check_name("node", &node)?;
    backend.node_undrain(node).await.map(Json)
}

/// Removes a node for good
#[utoipa::path(delete, path = "/v1/nodes/{node}", tag = "nodes",
    params(("node" = String, Path, description = "name of the node")),
    responses(
        (status = 200, description = "removed", body = Removed),
        (status = 400, description = "malformed name", body = ErrorBody),
        (status = 404, description = "no such node", body = ErrorBody),
        (status = 409, description = "it runs, or is not drained", body = ErrorBody),
        (status = 503, description = "the node does not answer", body = ErrorBody)
    ))]
pub(in crate::admin) async fn remove(
    State(backend): State<Backend>,
    Path(node): Path<String>,
) -> Result<Json<Removed>, ApiError> {
    check_name("node", &node)?;
    backend.node_remove(node).await.map(Json)
}
