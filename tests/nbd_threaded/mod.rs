//! A server on memory in a thread of its own, listening on TCP and on a unix socket, for clients
//! that block; and certificates for it.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use sds::export::memory::MemoryDirectory;
use sds::export::nbd::{NbdConfig, Server, TlsMode, UnixSocket, tls};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::LocalSet;

use crate::nbd_support::VOLUME_BYTES;

pub(crate) struct Options {
    pub(crate) tls: TlsMode,
    pub(crate) volume_bytes: u64,
}

pub(crate) fn options() -> Options {
    Options { tls: TlsMode::Off, volume_bytes: VOLUME_BYTES }
}

impl Options {
    pub(crate) fn tls_required(self, acceptor: tokio_rustls::TlsAcceptor) -> Self {
        Self { tls: TlsMode::Require(acceptor), ..self }
    }

    pub(crate) fn tls_allowed(self, acceptor: tokio_rustls::TlsAcceptor) -> Self {
        Self { tls: TlsMode::Allow(acceptor), ..self }
    }
}

/// A running server; dropping it stops it in order.
pub(crate) struct Running {
    pub(crate) tcp: SocketAddr,
    pub(crate) unix: PathBuf,
    stop: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
    _dir: TempDir,
}

impl Running {
    pub(crate) fn start(options: Options) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let unix = dir.path().join("nbd.sock");
        let path = unix.clone();
        let (stop, stopped) = watch::channel(false);
        let (ready, started) = mpsc::channel();
        #[allow(clippy::disallowed_methods, reason = "clients of this test block")]
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            LocalSet::new().block_on(&runtime, async {
                let directory = Rc::new(MemoryDirectory::default());
                directory.add("vol0", options.volume_bytes);
                directory.add("vol1", options.volume_bytes);
                let config = NbdConfig { tls: options.tls, ..NbdConfig::default() };
                let server = Server::new(directory, config, stopped);
                let socket = UnixSocket::bind(&path).unwrap();
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                ready.send(listener.local_addr().unwrap()).unwrap();
                tokio::join!(server.serve_tcp(listener), server.serve_unix(socket));
            });
        });
        let tcp = started.recv().unwrap();
        Self { tcp, unix, stop, thread: Some(thread), _dir: dir }
    }

    /// Stops the server and waits for its end.
    pub(crate) fn stop(mut self) {
        self.end();
    }

    fn end(&mut self) {
        self.stop.send_replace(true);
        if let Some(thread) = self.thread.take() {
            let joined = thread.join();
            assert!(joined.is_ok() || std::thread::panicking(), "the server panicked");
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.end();
    }
}

/// An authority, and certificates by it for the server (127.0.0.1, localhost) and a client.
pub(crate) struct Identity {
    authority: String,
    server: (String, String),
    client: (String, String),
}

impl Identity {
    pub(crate) fn new() -> Self {
        use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, KeyUsagePurpose};
        let authority_key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.distinguished_name.push(rcgen::DnType::CommonName, "sds test authority");
        let authority = params.self_signed(&authority_key).unwrap().pem();
        let issuer = Issuer::new(params, authority_key);
        let sign = |names: &[&str], usage| {
            let key = KeyPair::generate().unwrap();
            let names: Vec<String> = names.iter().map(ToString::to_string).collect();
            let mut params = CertificateParams::new(names).unwrap();
            params.distinguished_name.push(rcgen::DnType::CommonName, "sds test");
            params.key_usages =
                vec![KeyUsagePurpose::DigitalSignature, KeyUsagePurpose::KeyEncipherment];
            params.extended_key_usages = vec![usage];
            (params.signed_by(&key, &issuer).unwrap().pem(), key.serialize_pem())
        };
        let server = sign(&["localhost", "127.0.0.1"], rcgen::ExtendedKeyUsagePurpose::ServerAuth);
        let client = sign(&["client"], rcgen::ExtendedKeyUsagePurpose::ClientAuth);
        Self { authority, server, client }
    }

    pub(crate) fn acceptor(&self, client_authority: bool) -> tokio_rustls::TlsAcceptor {
        let authority = client_authority.then_some(self.authority.as_bytes());
        tls::acceptor(self.server.0.as_bytes(), self.server.1.as_bytes(), authority).unwrap()
    }

    /// Writes what libnbd and qemu look for in a directory of certificates.
    pub(crate) fn write(&self, dir: &Path) {
        for (name, content) in [
            ("ca-cert.pem", &self.authority),
            ("client-cert.pem", &self.client.0),
            ("client-key.pem", &self.client.1),
        ] {
            std::fs::write(dir.join(name), content).unwrap();
        }
    }

    /// The client's side of TLS on a stream, with or without a certificate.
    pub(crate) fn connect(
        &self,
        stream: TcpStream,
        with_certificate: bool,
    ) -> rustls::StreamOwned<rustls::ClientConnection, TcpStream> {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(CertificateDer::from_pem_slice(self.authority.as_bytes()).unwrap()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots);
        let config = if with_certificate {
            let certificate = CertificateDer::from_pem_slice(self.client.0.as_bytes()).unwrap();
            let key = PrivateKeyDer::from_pem_slice(self.client.1.as_bytes()).unwrap();
            builder.with_client_auth_cert(vec![certificate], key).unwrap()
        } else {
            builder.with_no_client_auth()
        };
        let name = ServerName::try_from("localhost").unwrap();
        let connection = rustls::ClientConnection::new(Arc::new(config), name).unwrap();
        rustls::StreamOwned::new(connection, stream)
    }
}
