//! Certificates of an authority of our own.

#![allow(dead_code, clippy::unwrap_used, reason = "each test binary uses its part")]

use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use sds::export::nbd::tls;

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

    /// Writes what a daemon is configured with into a directory: its certificate, its key, and the
    /// authority of its clients.
    pub(crate) fn write_server(&self, dir: &Path) -> [PathBuf; 3] {
        let files = [
            ("server-cert.pem", &self.server.0),
            ("server-key.pem", &self.server.1),
            ("authority.pem", &self.authority),
        ];
        files.map(|(name, content)| {
            std::fs::write(dir.join(name), content).unwrap();
            dir.join(name)
        })
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
