//! TLS of an NBD server: when it is asked for, and with which certificates.
//!
//! Certificates come as PEM text; reading files is the caller's business.

use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

/// Whether connections are encrypted.
#[derive(Clone, Default)]
pub enum TlsMode {
    /// Never; STARTTLS is refused.
    #[default]
    Off,
    /// If the client asks for it.
    Allow(TlsAcceptor),
    /// Always: nothing but STARTTLS and ABORT is answered before.
    Require(TlsAcceptor),
}

impl TlsMode {
    /// What to encrypt with, if at all.
    pub(super) fn acceptor(&self) -> Option<&TlsAcceptor> {
        match self {
            Self::Off => None,
            Self::Allow(acceptor) | Self::Require(acceptor) => Some(acceptor),
        }
    }

    pub(super) fn required(&self) -> bool {
        matches!(self, Self::Require(_))
    }
}

/// Why certificates cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The PEM text does not hold what it should.
    #[error("{what}: {source}")]
    Pem {
        /// Which of the three.
        what: &'static str,
        /// What is wrong with it.
        source: rustls::pki_types::pem::Error,
    },
    /// There is no certificate in the PEM text.
    #[error("{what}: there is no certificate in it")]
    Empty {
        /// Which of the three.
        what: &'static str,
    },
    /// Certificate and key do not fit, or cannot be used.
    #[error("the server's certificate and key cannot be used: {0}")]
    Certificate(#[from] rustls::Error),
    /// The clients' authority cannot be used.
    #[error("the clients' certificate authority cannot be used: {0}")]
    ClientAuthority(#[from] rustls::server::VerifierBuilderError),
}

/// Prepares TLS 1.2 and 1.3 from PEM texts: the server's certificate chain, its private key, and
/// the authority that clients' certificates must be signed by (none: clients need no certificate).
///
/// # Errors
/// [`TlsError`] says which text is at fault.
pub fn acceptor(
    certificates: &[u8],
    key: &[u8],
    client_authority: Option<&[u8]>,
) -> Result<TlsAcceptor, TlsError> {
    let certificates = parse_certificates("server certificate", certificates)?;
    let key = PrivateKeyDer::from_pem_slice(key)
        .map_err(|source| TlsError::Pem { what: "server key", source })?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
        .with_safe_default_protocol_versions()?;
    let builder = match client_authority {
        None => builder.with_no_client_auth(),
        Some(pem) => {
            let mut roots = RootCertStore::empty();
            for certificate in parse_certificates("client authority", pem)? {
                roots.add(certificate)?;
            }
            let verifier =
                WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?;
            builder.with_client_cert_verifier(verifier)
        }
    };
    Ok(TlsAcceptor::from(Arc::new(builder.with_single_cert(certificates, key)?)))
}

fn parse_certificates(
    what: &'static str,
    pem: &[u8],
) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates = CertificateDer::pem_slice_iter(pem)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| TlsError::Pem { what, source })?;
    if certificates.is_empty() { Err(TlsError::Empty { what }) } else { Ok(certificates) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (String, String) {
        let made = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
        (made.cert.pem(), made.signing_key.serialize_pem())
    }

    #[test]
    fn good_certificates_are_taken() {
        let (certificate, key) = pair();
        acceptor(certificate.as_bytes(), key.as_bytes(), None).unwrap();
        acceptor(certificate.as_bytes(), key.as_bytes(), Some(certificate.as_bytes())).unwrap();
    }

    #[test]
    fn bad_certificates_are_named() {
        let (certificate, key) = pair();
        let (_, other_key) = pair();
        let error = |cert: &str, key: &str, ca: Option<&str>| match acceptor(
            cert.as_bytes(),
            key.as_bytes(),
            ca.map(str::as_bytes),
        ) {
            Ok(_) => "none".to_owned(),
            Err(error) => error.to_string(),
        };
        assert!(error("", &key, None).starts_with("server certificate:"));
        assert!(error(&certificate, "nonsense", None).starts_with("server key:"));
        assert!(error(&certificate, &other_key, None).contains("cannot be used"));
        assert!(error(&certificate, &key, Some("")).starts_with("client authority:"));
    }
}
