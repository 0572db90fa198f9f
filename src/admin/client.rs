//! A blocking client of the admin API: what `sdsctl` uses, and tests.

use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;
use ureq::http::{Method, Response, StatusCode, Uri};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{Connector, TcpConnector};
use ureq::{Agent, Body};

use super::error::{ApiError, ErrorBody, ErrorCode};
use super::events::{Event, EventLevel};
use super::joining::{CreateNodeToken, JoinNode, NodeCertificate, NodeToken, RenewNode};
use super::nodes::Node;
use super::tls::TlsConnector;
use super::types::{
    AddDisk, CreatePool, CreateVolume, Disk, Pool, Removed, ResizeVolume, Scrub, StartScrub,
    Status, Volume, VolumeName,
};
use crate::id::DiskId;
use crate::trust::ClientTls;

/// Where a node listens if nothing else is said.
pub const DEFAULT_ENDPOINT: &str = "http://127.0.0.1:9770";

/// Time to connect, all addresses of the host together.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Time of a whole request: more than the server's own limit, so that its error is heard.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(45);
/// Largest answer that is read, bytes: a list of tens of thousands of volumes.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The endpoint is not a URL that this client can use.
    #[error("endpoint {endpoint:?}: {reason}")]
    Endpoint {
        /// As given.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// No connection, or it broke before the answer was complete.
    #[error("cannot reach {endpoint}: {reason}")]
    Connect {
        /// The endpoint.
        endpoint: String,
        /// Why.
        reason: String,
    },
    /// The answer is not one of this API.
    #[error("{endpoint} does not answer like sdsd: {reason}")]
    Protocol {
        /// The endpoint.
        endpoint: String,
        /// What was odd.
        reason: String,
    },
    /// The node refused the request.
    #[error(transparent)]
    Api(#[from] ApiError),
}

/// A client of one endpoint.
#[derive(Debug, Clone)]
pub struct Client {
    agent: Agent,
    endpoint: String,
}

impl Client {
    /// A client of `endpoint`: `http://HOST:PORT`, or just `HOST:PORT`. Connects on first use; no
    /// proxy is asked.
    ///
    /// # Errors
    /// [`ClientError::Endpoint`].
    pub fn new(endpoint: &str) -> Result<Self, ClientError> {
        Self::with(endpoint, None)
    }

    /// A client of `endpoint` that shows credentials: `https://HOST:PORT`, or just `HOST:PORT`.
    /// Connects on first use; no proxy is asked.
    ///
    /// # Errors
    /// [`ClientError::Endpoint`].
    pub fn with_tls(endpoint: &str, tls: &ClientTls) -> Result<Self, ClientError> {
        Self::with(endpoint, Some(tls))
    }

    fn with(endpoint: &str, tls: Option<&ClientTls>) -> Result<Self, ClientError> {
        let fail = |reason: &str| ClientError::Endpoint {
            endpoint: endpoint.to_owned(),
            reason: reason.to_owned(),
        };
        let authority = match (endpoint.split_once("://"), tls) {
            (None, _) => endpoint,
            (Some(("http", authority)), None) | (Some(("https", authority)), Some(_)) => authority,
            (Some(("http", _)), Some(_)) => {
                return Err(fail("credentials are shown to https:// only"));
            }
            (Some(("https", _)), None) => return Err(fail("https:// needs credentials")),
            (Some(_), _) => return Err(fail("only http:// and https:// are supported")),
        };
        let scheme = if tls.is_some() { "https" } else { "http" };
        let url = format!("{scheme}://{}", authority.strip_suffix('/').unwrap_or(authority));
        let uri: Uri =
            url.parse().map_err(|_| fail(&format!("not a URL; expected {scheme}://HOST:PORT")))?;
        if uri.host().is_none_or(str::is_empty) {
            return Err(fail(&format!("no host; expected {scheme}://HOST:PORT")));
        }
        if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
            return Err(fail(&format!("has a path; expected {scheme}://HOST:PORT")));
        }
        let config = Agent::config_builder()
            .http_status_as_error(false)
            .proxy(None)
            .max_redirects(0)
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_global(Some(REQUEST_TIMEOUT))
            .user_agent(concat!("sdsctl/", env!("CARGO_PKG_VERSION")))
            .build();
        let agent = match tls {
            None => config.new_agent(),
            Some(tls) => {
                let connector = TcpConnector::default().chain(TlsConnector::new(tls));
                Agent::with_parts(config, connector, DefaultResolver::default())
            }
        };
        Ok(Self { agent, endpoint: url })
    }

    /// The endpoint as a URL without a slash at the end.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// The node at a glance.
    pub fn status(&self) -> Result<Status, ClientError> {
        self.get("/v1/status")
    }

    /// The newest events of all nodes that answer, the oldest first.
    pub fn events(
        &self,
        since_unix_ms: u64,
        level: EventLevel,
        limit: u32,
    ) -> Result<Vec<Event>, ClientError> {
        self.get(&format!("/v1/events?since_unix_ms={since_unix_ms}&level={level}&limit={limit}"))
    }

    /// All disks, sorted by path.
    pub fn disks(&self) -> Result<Vec<Disk>, ClientError> {
        self.get("/v1/disks")
    }
    /// One disk.
    pub fn disk(&self, disk: DiskId) -> Result<Disk, ClientError> {
        self.get(&format!("/v1/disks/{disk}"))
    }
    /// Formats and adds a disk.
    pub fn add_disk(&self, request: &AddDisk) -> Result<Disk, ClientError> {
        self.send(Method::POST, "/v1/disks", request)
    }
    /// Takes a disk out of the node for good.
    pub fn remove_disk(&self, disk: DiskId, force: bool) -> Result<Removed, ClientError> {
        self.call(Method::DELETE, &format!("/v1/disks/{disk}?force={force}"))
    }
    /// Takes a disk out of service.
    pub fn offline_disk(&self, disk: DiskId) -> Result<Disk, ClientError> {
        self.call(Method::PUT, &format!("/v1/disks/{disk}/offline"))
    }
    /// Has all data leave a disk.
    pub fn drain_disk(&self, disk: DiskId) -> Result<Disk, ClientError> {
        self.call(Method::PUT, &format!("/v1/disks/{disk}/drain"))
    }
    /// Has another disk take the place of one; the new one.
    pub fn replace_disk(&self, disk: DiskId, request: &AddDisk) -> Result<Disk, ClientError> {
        self.send(Method::POST, &format!("/v1/disks/{disk}/replace"), request)
    }
    /// Puts a disk into service again.
    pub fn online_disk(&self, disk: DiskId) -> Result<Disk, ClientError> {
        self.call(Method::PUT, &format!("/v1/disks/{disk}/online"))
    }

    /// All nodes, sorted by name.
    pub fn nodes(&self) -> Result<Vec<Node>, ClientError> {
        self.get("/v1/nodes")
    }
    /// One node.
    pub fn node(&self, node: &str) -> Result<Node, ClientError> {
        self.get(&format!("/v1/nodes/{}", checked_node(node)?))
    }
    /// Has heads and shards leave a node.
    pub fn drain_node(&self, node: &str) -> Result<Node, ClientError> {
        self.call(Method::PUT, &format!("/v1/nodes/{}/drain", checked_node(node)?))
    }
    /// Uses a node again.
    pub fn undrain_node(&self, node: &str) -> Result<Node, ClientError> {
        self.call(Method::PUT, &format!("/v1/nodes/{}/undrain", checked_node(node)?))
    }
    /// Removes a node for good.
    pub fn remove_node(&self, node: &str) -> Result<Removed, ClientError> {
        self.call(Method::DELETE, &format!("/v1/nodes/{}", checked_node(node)?))
    }

    /// All pools, sorted by name.
    pub fn pools(&self) -> Result<Vec<Pool>, ClientError> {
        self.get("/v1/pools")
    }
    /// One pool.
    pub fn pool(&self, pool: &str) -> Result<Pool, ClientError> {
        self.get(&format!("/v1/pools/{}", checked_pool(pool)?))
    }
    /// Creates a pool.
    pub fn create_pool(&self, request: &CreatePool) -> Result<Pool, ClientError> {
        self.send(Method::POST, "/v1/pools", request)
    }
    /// Removes an empty pool.
    pub fn remove_pool(&self, pool: &str) -> Result<Removed, ClientError> {
        self.call(Method::DELETE, &format!("/v1/pools/{}", checked_pool(pool)?))
    }

    /// All volumes, or those of one pool, sorted by name.
    pub fn volumes(&self, pool: Option<&str>) -> Result<Vec<Volume>, ClientError> {
        match pool {
            None => self.get("/v1/volumes"),
            Some(pool) => self.get(&format!("/v1/volumes?pool={}", checked_pool(pool)?)),
        }
    }
    /// One volume.
    pub fn volume(&self, volume: &VolumeName) -> Result<Volume, ClientError> {
        self.get(&format!("/v1/volumes/{volume}"))
    }
    /// Creates and exports a volume.
    pub fn create_volume(&self, request: &CreateVolume) -> Result<Volume, ClientError> {
        self.send(Method::POST, "/v1/volumes", request)
    }
    /// Changes the size of a volume.
    pub fn resize_volume(
        &self,
        volume: &VolumeName,
        request: &ResizeVolume,
    ) -> Result<Volume, ClientError> {
        self.send(Method::PATCH, &format!("/v1/volumes/{volume}"), request)
    }
    /// Removes a volume.
    pub fn remove_volume(&self, volume: &VolumeName, force: bool) -> Result<Removed, ClientError> {
        self.call(Method::DELETE, &format!("/v1/volumes/{volume}?force={force}"))
    }

    /// The scrubs of all volumes, sorted by name.
    pub fn scrubs(&self) -> Result<Vec<Scrub>, ClientError> {
        self.get("/v1/scrubs")
    }
    /// Begins to scrub a volume, or all.
    pub fn start_scrub(&self, request: &StartScrub) -> Result<Vec<Scrub>, ClientError> {
        self.send(Method::POST, "/v1/scrubs", request)
    }

    /// Makes a join token.
    pub fn create_node_token(&self, request: &CreateNodeToken) -> Result<NodeToken, ClientError> {
        self.send(Method::POST, "/v1/node-tokens", request)
    }
    /// Asks for the certificate of a node that joins.
    pub fn join_node(&self, request: &JoinNode) -> Result<NodeCertificate, ClientError> {
        self.send(Method::POST, super::access::JOINS, request)
    }
    /// Asks for a new certificate of the node whose credentials are shown.
    pub fn renew_node(&self, request: &RenewNode) -> Result<NodeCertificate, ClientError> {
        self.send(Method::POST, super::access::RENEWALS, request)
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path)
    }

    fn call<T: DeserializeOwned>(&self, method: Method, path: &str) -> Result<T, ClientError> {
        self.run(self.request(method, path).body(()), |request| self.agent.run(request))
    }

    fn send<T: DeserializeOwned>(
        &self,
        method: Method,
        path: &str,
        body: &impl Serialize,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| self.protocol(e.to_string()))?;
        let request =
            self.request(method, path).header("content-type", "application/json").body(body);
        self.run(request, |request| self.agent.run(request))
    }

    fn request(&self, method: Method, path: &str) -> ureq::http::request::Builder {
        ureq::http::Request::builder().method(method).uri(format!("{}{path}", self.endpoint))
    }

    fn run<B, T: DeserializeOwned>(
        &self,
        request: Result<ureq::http::Request<B>, ureq::http::Error>,
        run: impl FnOnce(ureq::http::Request<B>) -> Result<Response<Body>, ureq::Error>,
    ) -> Result<T, ClientError> {
        let request = request.map_err(|e| self.protocol(e.to_string()))?;
        let mut response = run(request).map_err(|e| self.failed(&e))?;
        let status = response.status();
        let body = response
            .body_mut()
            .with_config()
            .limit(ANSWER_BYTES_MAX)
            .read_to_vec()
            .map_err(|e| self.failed(&e))?;
        self.decode(status, &body)
    }

    fn decode<T: DeserializeOwned>(
        &self,
        status: StatusCode,
        body: &[u8],
    ) -> Result<T, ClientError> {
        if status.is_success() {
            return serde_json::from_slice(body).map_err(|e| self.protocol(e.to_string()));
        }
        match serde_json::from_slice::<ErrorBody>(body) {
            Ok(body) => Err(ClientError::Api(body.error)),
            Err(_) => Err(self.protocol(format!("HTTP status {status} without an error body"))),
        }
    }

    fn protocol(&self, reason: String) -> ClientError {
        ClientError::Protocol { endpoint: self.endpoint.clone(), reason }
    }

    fn failed(&self, error: &ureq::Error) -> ClientError {
        let reason = match error {
            ureq::Error::Io(e) => e.to_string(),
            ureq::Error::HostNotFound => "no such host".to_owned(),
            ureq::Error::Timeout(_) => "no answer in time".to_owned(),
            ureq::Error::BadUri(reason) => {
                return ClientError::Endpoint {
                    endpoint: self.endpoint.clone(),
                    reason: reason.clone(),
                };
            }
            ureq::Error::Protocol(_)
            | ureq::Error::BodyExceedsLimit(_)
            | ureq::Error::LargeResponseHeader(..) => return self.protocol(error.to_string()),
            other => other.to_string(),
        };
        ClientError::Connect { endpoint: self.endpoint.clone(), reason }
    }
}

/// The name if it can stand in a URL as it is.
fn checked_node(node: &str) -> Result<&str, ApiError> {
    super::types::check_name("node", node)?;
    Ok(node)
}

fn checked_pool(pool: &str) -> Result<&str, ApiError> {
    super::types::check_name("pool", pool)?;
    Ok(pool)
}

impl ClientError {
    /// What to do about it, if anything is known to help.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Endpoint { .. } => Some(format!("an endpoint looks like {DEFAULT_ENDPOINT}")),
            Self::Connect { .. } => Some(
                "is sdsd running there? Give its admin address with --endpoint or SDS_ENDPOINT"
                    .to_owned(),
            ),
            Self::Protocol { .. } => Some(
                "check that the endpoint is the admin address of sdsd, not another service; with TLS \
                 it begins with https://"
                    .to_owned(),
            ),
            Self::Api(error) => error.hint.clone(),
        }
    }

    /// The error in the form of the API, for JSON output.
    pub fn to_api_error(&self) -> ApiError {
        let code = match self {
            Self::Api(error) => return error.clone(),
            Self::Endpoint { .. } => ErrorCode::InvalidArgument,
            Self::Connect { .. } => ErrorCode::Unavailable,
            Self::Protocol { .. } => ErrorCode::Internal,
        };
        ApiError { code, message: self.to_string(), hint: self.hint() }
    }
}
