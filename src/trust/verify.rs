//! Whether the other end of a connection belongs to the cluster, and is who was meant.
//!
//! First the chain: signed by the cluster's authority, valid now, for this use; rustls' own checks. Then
//! the identity in the subject alternative name. The name in the URL or the address is not looked at.

use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::verify_server_cert_signed_by_trust_anchor;
use rustls::crypto::{CryptoProvider, verify_tls12_signature, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    CertificateError, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    SignatureScheme,
};

use super::holder::cluster_of_authority;
use super::{Holder, Role, TrustError, fingerprint};
use crate::id::{ClusterId, NodeId};

/// Who the other end has to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expected {
    /// This node.
    Node(NodeId),
    /// Any node of the cluster.
    AnyNode,
    /// Any node or operator of the cluster.
    Anybody,
}

impl Expected {
    /// Whether it is they.
    fn check(self, holder: &Holder) -> Result<(), TrustError> {
        match (self, holder.role) {
            (Self::Anybody, _) | (Self::AnyNode, Role::Node(_)) => Ok(()),
            (Self::Node(expected), Role::Node(found)) if found == expected => Ok(()),
            (Self::Node(expected), Role::Node(found)) => {
                Err(TrustError::Node { expected, found, name: holder.name.clone() })
            }
            (Self::Node(_) | Self::AnyNode, Role::Admin) => {
                Err(TrustError::Role { expected: "a node", found: holder.to_string() })
            }
        }
    }
}

/// A cluster, and what its members prove that they are some with.
#[derive(Debug, Clone)]
pub(super) struct Cluster {
    id: ClusterId,
    roots: Arc<RootCertStore>,
    clients: Arc<dyn ClientCertVerifier>,
    provider: Arc<CryptoProvider>,
}

/// The cryptography of all connections.
pub(super) fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

impl Cluster {
    /// The cluster of an authority.
    pub(super) fn of(authority: &CertificateDer<'_>) -> Result<Self, TrustError> {
        let id = cluster_of_authority(authority)?;
        let mut roots = RootCertStore::empty();
        roots.add(authority.clone().into_owned())?;
        let (roots, provider) = (Arc::new(roots), provider());
        let clients = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(|why| TrustError::Malformed(why.to_string()))?;
        Ok(Self { id, roots, clients, provider })
    }

    /// Whose a certificate is whose chain was judged.
    pub(super) fn holder(
        &self,
        certificate: &CertificateDer<'_>,
        chain: Result<(), Error>,
    ) -> Result<Holder, Error> {
        if let Err(why) = chain {
            return Err(self.explain(certificate, why));
        }
        let holder = Holder::of(certificate).map_err(refused)?;
        if holder.cluster == self.id { Ok(holder) } else { Err(refused(self.of_another(&holder))) }
    }

    /// Says what is behind a signature of somebody else, as far as the certificate tells.
    fn explain(&self, certificate: &CertificateDer<'_>, why: Error) -> Error {
        let foreign = CertificateError::UnknownIssuer;
        let forged = CertificateError::BadSignature;
        if why != Error::InvalidCertificate(foreign) && why != Error::InvalidCertificate(forged) {
            return why;
        }
        match Holder::of(certificate) {
            Ok(holder) if holder.cluster != self.id => refused(self.of_another(&holder)),
            Ok(_) => refused(TrustError::Issuer(self.id)),
            Err(why) => refused(why),
        }
    }

    fn of_another(&self, holder: &Holder) -> TrustError {
        TrustError::Cluster { expected: self.id, found: holder.cluster, holder: holder.to_string() }
    }

    /// The chain of who was called.
    pub(super) fn check_server(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Holder, Error> {
        let algorithms = self.provider.signature_verification_algorithms.all;
        let chain = ParsedCertificate::try_from(certificate).and_then(|parsed| {
            let roots = &self.roots;
            verify_server_cert_signed_by_trust_anchor(
                &parsed,
                roots,
                intermediates,
                now,
                algorithms,
            )
        });
        self.holder(certificate, chain)
    }

    /// The chain of who called.
    pub(super) fn check_client(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<Holder, Error> {
        let chain = self.clients.verify_client_cert(certificate, intermediates, now).map(|_| ());
        self.holder(certificate, chain)
    }
}

/// What is behind an error of a connection with TLS.
pub fn reason(error: &std::io::Error) -> String {
    let inner = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>());
    inner.map_or_else(|| error.to_string(), told)
}

/// An error of TLS in plain words.
pub(super) fn told(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(CertificateError::Other(OtherError(why))) => why.to_string(),
        Error::NoCertificatesPresented => "it shows no certificate".into(),
        Error::InvalidMessage(_) => "TLS is not spoken there".into(),
        Error::AlertReceived(alert) => {
            format!("the other end breaks off (alert {alert:?}): does it accept our certificate?")
        }
        why => why.to_string(),
    }
}

/// The error that rustls carries to whoever asked for the connection.
pub(super) fn refused(why: TrustError) -> Error {
    Error::InvalidCertificate(CertificateError::Other(OtherError(Arc::new(why))))
}

/// Judges who was called.
#[derive(Debug)]
pub(super) struct Servers {
    pub(super) cluster: Cluster,
    pub(super) expected: Expected,
}

/// Judges who called.
#[derive(Debug)]
pub(super) struct Clients {
    pub(super) cluster: Cluster,
    pub(super) expected: Expected,
    /// Whether a certificate is asked for only, not demanded.
    pub(super) optional: bool,
}

/// Judges who was called by nothing but the fingerprint of their authority.
#[derive(Debug)]
pub(super) struct Pinned {
    pub(super) fingerprint: [u8; 32],
    pub(super) provider: Arc<CryptoProvider>,
}

macro_rules! signatures {
    ($($provider:ident).+) => {
        fn verify_tls12_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let algorithms = &self.$($provider).+.signature_verification_algorithms;
            verify_tls12_signature(message, certificate, signature, algorithms)
        }

        fn verify_tls13_signature(
            &self,
            message: &[u8],
            certificate: &CertificateDer<'_>,
            signature: &DigitallySignedStruct,
        ) -> Result<HandshakeSignatureValid, Error> {
            let algorithms = &self.$($provider).+.signature_verification_algorithms;
            verify_tls13_signature(message, certificate, signature, algorithms)
        }

        fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
            self.$($provider).+.signature_verification_algorithms.supported_schemes()
        }
    };
}

impl ServerCertVerifier for Servers {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let holder = self.cluster.check_server(end_entity, intermediates, now)?;
        self.expected.check(&holder).map_err(refused)?;
        Ok(ServerCertVerified::assertion())
    }

    signatures!(cluster.provider);
}

impl ClientCertVerifier for Clients {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.cluster.clients.root_hint_subjects()
    }

    fn client_auth_mandatory(&self) -> bool {
        !self.optional
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let holder = self.cluster.check_client(end_entity, intermediates, now)?;
        self.expected.check(&holder).map_err(refused)?;
        Ok(ClientCertVerified::assertion())
    }

    signatures!(cluster.provider);
}

impl ServerCertVerifier for Pinned {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let pinned =
            |certificate: &&CertificateDer<'_>| fingerprint(certificate) == self.fingerprint;
        let Some(authority) = intermediates.iter().find(pinned) else {
            return Err(refused(TrustError::Fingerprint));
        };
        let cluster = Cluster::of(authority).map_err(refused)?;
        let holder = cluster.check_server(end_entity, intermediates, now)?;
        Expected::AnyNode.check(&holder).map_err(refused)?;
        Ok(ServerCertVerified::assertion())
    }

    signatures!(provider);
}
