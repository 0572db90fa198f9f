//! TLS as the parts of sds use it: between nodes, to the admin API, and for a node that joins.
//!
//! TLS 1.3 only. Sessions are resumed, which spares both ends the signatures; who the other end is then
//! comes from the session, and is looked at again here, with the clock.

use std::io;
use std::sync::Arc;

use rustls::client::ResolvesClientCert;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, ServerConfig, SignatureScheme};
use tokio::net::TcpStream;
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

use super::verify::{Clients, Cluster, Pinned, Servers, provider, reason};
use super::{Credentials, Expected, Holder, TrustError, now};
use crate::id::NodeId;

/// The protocol between nodes.
const ALPN_RPC: &[u8] = b"sds-rpc/1";
/// The protocol of the admin API.
const ALPN_HTTP: &[u8] = b"http/1.1";

/// Shows one certificate to everybody.
#[derive(Debug)]
struct Only(Arc<CertifiedKey>);

impl ResolvesServerCert for Only {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }
}

impl ResolvesClientCert for Only {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.0.clone())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

fn server_config(
    credentials: &Credentials,
    clients: Clients,
    with_authority: bool,
    alpn: &[u8],
) -> Result<Arc<ServerConfig>, TrustError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(Arc::new(clients))
        .with_cert_resolver(Arc::new(Only(credentials.certified(with_authority))));
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(Arc::new(config))
}

fn client_config(
    credentials: &Credentials,
    cluster: Cluster,
    expected: Expected,
    alpn: &[u8],
) -> Result<Arc<ClientConfig>, TrustError> {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(Servers { cluster, expected }))
        .with_client_cert_resolver(Arc::new(Only(credentials.certified(false))));
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(Arc::new(config))
}

fn refuse<T>(why: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Result<T> {
    Err(io::Error::new(io::ErrorKind::PermissionDenied, why))
}

/// Who the other end is; the chain was judged when the session began.
fn met(cluster: &Cluster, certificates: Option<&[CertificateDer<'_>]>) -> io::Result<Holder> {
    let Some([certificate, ..]) = certificates else {
        return refuse(TrustError::Refused("the other end showed no certificate"));
    };
    // A certificate may have expired since the session began.
    cluster.check_client(certificate, &[], now()).or_else(refuse)
}

/// The same error in plain words.
fn explained(error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), reason(error))
}

fn spoken(alpn: Option<&[u8]>) -> io::Result<()> {
    if alpn == Some(ALPN_RPC) {
        return Ok(());
    }
    refuse(TrustError::Refused("the other end does not speak the protocol of nodes"))
}

/// What makes the connections between nodes: each knows which node the other end is. Clones share
/// everything.
#[derive(Clone)]
pub struct NodeTls {
    credentials: Credentials,
    cluster: Cluster,
    server: Arc<ServerConfig>,
}

impl NodeTls {
    /// With the credentials of this node.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn new(credentials: &Credentials) -> Result<Self, TrustError> {
        let cluster = Cluster::of(credentials.authority())?;
        let expected = Expected::AnyNode;
        let clients = Clients { cluster: cluster.clone(), expected, optional: false };
        let server = server_config(credentials, clients, false, ALPN_RPC)?;
        Ok(Self { credentials: credentials.clone(), cluster, server })
    }

    /// Who this node is.
    pub fn holder(&self) -> &Holder {
        self.credentials.holder()
    }

    /// What connects to one other node: keep it, since sessions are resumed with the same one only.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn client(&self, node: NodeId) -> Result<NodeConnector, TrustError> {
        let expected = Expected::Node(node);
        let config = client_config(&self.credentials, self.cluster.clone(), expected, ALPN_RPC)?;
        Ok(NodeConnector { node: Some(node), cluster: self.cluster.clone(), config })
    }

    /// What connects to any node of the cluster: for who knows addresses and no nodes.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn client_of_any(&self) -> Result<NodeConnector, TrustError> {
        let expected = Expected::AnyNode;
        let config = client_config(&self.credentials, self.cluster.clone(), expected, ALPN_RPC)?;
        Ok(NodeConnector { node: None, cluster: self.cluster.clone(), config })
    }

    /// Lets a node in over a connection, and says which it is.
    ///
    /// # Errors
    /// Of the stream; `PermissionDenied` and `InvalidData` with the reason for whom it is not let in.
    pub async fn accept(
        &self,
        stream: TcpStream,
    ) -> io::Result<(server::TlsStream<TcpStream>, NodeId)> {
        let accepting = TlsAcceptor::from(self.server.clone()).accept(stream);
        let stream = accepting.await.map_err(|error| explained(&error))?;
        let (_, connection) = stream.get_ref();
        spoken(connection.alpn_protocol())?;
        let holder = met(&self.cluster, connection.peer_certificates())?;
        match holder.node() {
            Some(node) => Ok((stream, node)),
            None => refuse(TrustError::Role { expected: "a node", found: holder.to_string() }),
        }
    }
}

/// Connects to one node.
#[derive(Clone)]
pub struct NodeConnector {
    /// None: any of the cluster.
    node: Option<NodeId>,
    cluster: Cluster,
    config: Arc<ClientConfig>,
}

impl NodeConnector {
    /// Proves who we are over a connection, and sees to it that the other end is the node it should be.
    ///
    /// # Errors
    /// Of the stream; `PermissionDenied` and `InvalidData` with the reason why it is not.
    pub async fn connect(&self, stream: TcpStream) -> io::Result<client::TlsStream<TcpStream>> {
        // Only the sessions are kept under this name, and it is one that no address says.
        let node = self.node.map_or_else(|| "any".to_owned(), |node| node.to_string());
        let name = ServerName::try_from(format!("{node}.sds.internal"));
        let name = name.or_else(refuse)?;
        let connector = TlsConnector::from(self.config.clone());
        let stream = connector.connect(name, stream).await.map_err(|error| explained(&error))?;
        let (_, connection) = stream.get_ref();
        spoken(connection.alpn_protocol())?;
        let holder = met(&self.cluster, connection.peer_certificates())?;
        match holder.node() {
            Some(node) if self.node.is_none_or(|meant| node == meant) => Ok(stream),
            _ => refuse(TrustError::Role { expected: "the node meant", found: holder.to_string() }),
        }
    }
}

/// TLS of the admin API: who connects may have a certificate of the cluster, and those who have none are
/// told apart. Clones share everything.
#[derive(Clone)]
pub struct AdminTls {
    cluster: Cluster,
    server: Arc<ServerConfig>,
}

impl AdminTls {
    /// With the credentials of this node.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn new(credentials: &Credentials) -> Result<Self, TrustError> {
        let cluster = Cluster::of(credentials.authority())?;
        let expected = Expected::Anybody;
        let clients = Clients { cluster: cluster.clone(), expected, optional: true };
        // The authority's certificate is for those who join, who know nothing but its fingerprint.
        let server = server_config(credentials, clients, true, ALPN_HTTP)?;
        Ok(Self { cluster, server })
    }

    /// Begins TLS on a connection; says who it is, if they showed a certificate.
    ///
    /// # Errors
    /// Of the stream, or of TLS; a certificate that is no good.
    pub async fn accept(
        &self,
        stream: TcpStream,
    ) -> io::Result<(server::TlsStream<TcpStream>, Option<Holder>)> {
        let stream = TlsAcceptor::from(self.server.clone()).accept(stream).await?;
        let (_, connection) = stream.get_ref();
        let holder = match connection.peer_certificates() {
            None => None,
            certificates => Some(met(&self.cluster, certificates)?),
        };
        Ok((stream, holder))
    }
}

/// TLS of who calls the admin API.
#[derive(Debug, Clone)]
pub struct ClientTls {
    /// For rustls.
    pub(crate) config: Arc<ClientConfig>,
}

impl ClientTls {
    /// Shows credentials of an operator, or of a node, and believes any node of their cluster.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn new(credentials: &Credentials) -> Result<Self, TrustError> {
        let cluster = Cluster::of(credentials.authority())?;
        let config = client_config(credentials, cluster, Expected::AnyNode, ALPN_HTTP)?;
        Ok(Self { config })
    }

    /// Shows nothing, and believes a node whose authority has this fingerprint.
    ///
    /// # Errors
    /// [`TrustError`].
    pub fn pinned(fingerprint: [u8; 32]) -> Result<Self, TrustError> {
        let verifier = Pinned { fingerprint, provider: provider() };
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_no_client_auth();
        config.alpn_protocols = vec![ALPN_HTTP.to_vec()];
        Ok(Self { config: Arc::new(config) })
    }
}
