//! The HTTP server: router, limits, errors in JSON, graceful stop, `OpenAPI` document.
//!
//! Every answer that is not a success has an [`ErrorBody`], also those of the router itself. A
//! request has a bounded body and a bounded time; connections are bounded in number and idle time.

use std::future::Future;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{DefaultBodyLimit, Request};
use axum::http::StatusCode;
use axum::middleware::{self, Next};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post, put};
use axum::{Extension, Router};
use tokio::net::TcpListener;
use utoipa::OpenApi;

use super::access::{Access, Caller, authorise};
use super::admission::Admissions;
use super::backend::{AdminBackend, COMMAND_TIMEOUT};
use super::error::{ApiError, ErrorBody, ErrorCode};
use super::guard::{ADMIN_CONNECTIONS_MAX, GuardedListener, IDLE_TIMEOUT};
use super::routes;

/// Largest body of a request, bytes: the largest legal one is a path of 4 KiB, escaped.
pub const BODY_BYTES_MAX: usize = 64 << 10;

/// Longest time of a request, from its head to its answer: a little more than a command's, so
/// that the command's own error is what the client sees.
pub const REQUEST_TIMEOUT: Duration = Duration::from_secs(35);

/// How long [`serve`] waits for requests under way once it was told to stop.
pub const STOP_TIMEOUT: Duration = Duration::from_secs(5);

const _: () = assert!(COMMAND_TIMEOUT.as_secs() < REQUEST_TIMEOUT.as_secs());
const _: () = assert!(REQUEST_TIMEOUT.as_secs() < IDLE_TIMEOUT.as_secs());

/// The backend as the handlers share it.
pub(super) type Backend = Arc<dyn AdminBackend>;

/// The `OpenAPI` document of the API.
#[derive(OpenApi)]
#[openapi(
    info(
        title = "sds admin API",
        description = "Disks, pools and volumes of an sds node. Sizes are bytes.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    paths(
        routes::status,
        routes::healthz,
        routes::metrics,
        routes::openapi,
        routes::event::list,
        routes::disk::list,
        routes::disk::add,
        routes::disk::show,
        routes::disk::remove,
        routes::disk::offline,
        routes::disk::drain,
        routes::disk::online,
        routes::disk::replace,
        routes::pool::list,
        routes::pool::create,
        routes::pool::show,
        routes::pool::remove,
        routes::volume::list,
        routes::volume::create,
        routes::volume::show,
        routes::volume::resize,
        routes::volume::remove,
        routes::scrub::list,
        routes::scrub::start,
        routes::node::list,
        routes::node::show,
        routes::node::drain,
        routes::node::undrain,
        routes::node::remove,
        routes::joining::create_token,
        routes::joining::join,
        routes::joining::renew,
    ),
    components(schemas(ErrorBody))
)]
struct ApiDoc;

/// The `OpenAPI` document, as `docs/openapi.json` has it: pretty JSON that ends with a newline.
pub fn openapi_json() -> String {
    let mut text = ApiDoc::openapi().to_pretty_json().expect("the document is plain data");
    text.push('\n');
    text
}

/// All routes over `backend`.
fn router(backend: Arc<dyn AdminBackend>, admissions: Arc<Admissions>) -> Router {
    use routes::{disk, event, joining, node, pool, scrub, volume};
    Router::new()
        .route("/healthz", get(routes::healthz))
        .route("/metrics", get(routes::metrics))
        .route("/v1/openapi.json", get(routes::openapi))
        .route("/v1/status", get(routes::status))
        .route("/v1/events", get(event::list))
        .route("/v1/disks", get(disk::list).post(disk::add))
        .route("/v1/disks/{disk}", get(disk::show).delete(disk::remove))
        .route("/v1/disks/{disk}/offline", put(disk::offline))
        .route("/v1/disks/{disk}/drain", put(disk::drain))
        .route("/v1/disks/{disk}/online", put(disk::online))
        .route("/v1/disks/{disk}/replace", post(disk::replace))
        .route("/v1/pools", get(pool::list).post(pool::create))
        .route("/v1/pools/{pool}", get(pool::show).delete(pool::remove))
        .route("/v1/scrubs", get(scrub::list).post(scrub::start))
        .route("/v1/volumes", get(volume::list).post(volume::create))
        .route(
            "/v1/volumes/{pool}/{name}",
            get(volume::show).patch(volume::resize).delete(volume::remove),
        )
        .route("/v1/nodes", get(node::list))
        .route("/v1/nodes/{node}", get(node::show).delete(node::remove))
        .route("/v1/nodes/{node}/drain", put(node::drain))
        .route("/v1/nodes/{node}/undrain", put(node::undrain))
        .route("/v1/node-tokens", post(joining::create_token))
        .route(super::access::JOINS, post(joining::join))
        .route(super::access::RENEWALS, post(joining::renew))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .layer(Extension(admissions))
        .layer(middleware::from_fn(authorise))
        .layer(middleware::from_fn(limit_time))
        .with_state(backend)
}

/// Serves the API without TLS: see [`serve_with`].
///
/// # Errors
/// Those of the listening socket.
pub async fn serve(
    listener: TcpListener,
    backend: Arc<dyn AdminBackend>,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    serve_with(listener, backend, Access::default(), stop).await
}

/// Serves the API on `listener` to those whom `access` lets in until `stop` completes; then takes no more connections and waits
/// up to [`STOP_TIMEOUT`] for requests under way. Needs a tokio runtime with I/O and time; its
/// tasks are `Send`, and on a current-thread runtime they run on that thread.
///
/// # Errors
/// Those of the listening socket.
pub async fn serve_with(
    listener: TcpListener,
    backend: Arc<dyn AdminBackend>,
    access: Access,
    stop: impl Future<Output = ()> + Send + 'static,
) -> io::Result<()> {
    let Access { tls, admissions, .. } = access;
    let listener = GuardedListener::new(listener, tls, ADMIN_CONNECTIONS_MAX, IDLE_TIMEOUT);
    let (stopped, mut stopping) = tokio::sync::oneshot::channel::<()>();
    let service = router(backend, admissions).into_make_service_with_connect_info::<Caller>();
    let server = axum::serve(listener, service).with_graceful_shutdown(async move {
        stop.await;
        drop(stopped);
    });
    let mut server = std::pin::pin!(server.into_future());
    tokio::select! {
        biased;
        result = &mut server => return result,
        _ = &mut stopping => {}
    }
    // Past the time-out the connections that are left are closed with the runtime's tasks.
    match tokio::time::timeout(STOP_TIMEOUT, server).await {
        Ok(result) => result,
        Err(_) => Ok(()),
    }
}

async fn limit_time(request: Request, next: Next) -> Response {
    match tokio::time::timeout(REQUEST_TIMEOUT, next.run(request)).await {
        Ok(response) => response,
        Err(_) => ApiError::timeout(format!("the request took longer than {REQUEST_TIMEOUT:?}"))
            .into_response(),
    }
}

async fn no_such_path(request: Request) -> ApiError {
    let path = super::types::clip(request.uri().path());
    ApiError::not_found(format!("no such path: {path}")).with_hint(
        "GET /v1/openapi.json lists all paths; a volume is /v1/volumes/POOL/NAME, and a name has \
         no slash",
    )
}

async fn no_such_method(request: Request) -> ApiError {
    ApiError {
        code: ErrorCode::MethodNotAllowed,
        message: format!(
            "{} is not possible on {}",
            request.method(),
            super::types::clip(request.uri().path())
        ),
        hint: None,
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.code.http_status())
            .expect("the codes of ErrorCode are HTTP statuses");
        (status, axum::Json(ErrorBody { error: self })).into_response()
    }
}
