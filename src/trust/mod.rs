//! Who belongs to a cluster: its certificate authority, credentials, join tokens, and TLS on which both
//! ends prove who they are.
//!
//! ```text
//!  authority.rs ──signs──► files.rs (a directory: ca.pem, node.pem, node.key) ──► credentials.rs
//!       ▲                                                                               │
//!   token.rs: what a node that joins is told                         tls.rs ◄───────────┘
//!                                                     verify.rs, holder.rs: who is the other end?
//! ```
//!
//! # Invariants
//! - Who somebody is stands in the subject alternative name of their certificate ([`Holder`]), never
//!   elsewhere; the signature of the cluster's authority is what makes it true.
//! - A private key is in one file with mode 0600 and in memory, nowhere else: not in a log, not in an
//!   error, not in a [`std::fmt::Debug`].
//! - TLS 1.3 only. Nobody is believed for their address or the name in an URL.
//!
//! Keys, serial numbers and secrets come from ring's generator, not from [`crate::env::Env`], and
//! certificates are judged by the wall clock: neither is ever part of a simulation. Must not know:
//! nodes, the metadata store, HTTP, what is said on the connections. The argument is in
//! `docs/security.md`.

mod authority;
pub mod credentials;
pub mod files;
mod holder;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
mod tls;
pub mod token;
mod verify;

use std::path::PathBuf;

use rustls::pki_types::UnixTime;

pub use authority::{ADMIN_LIFETIME, Authority, NODE_LIFETIME, SigningRequest};
pub use credentials::{Credentials, RENEW_BEFORE};
pub use files::{Kind, Layout};
pub use holder::{Holder, Role};
pub use tls::{AdminTls, ClientTls, NodeConnector, NodeTls};
pub use token::JoinToken;
pub use verify::{Expected, reason};

use crate::id::{ClusterId, NodeId};

/// Why somebody is not trusted, or credentials cannot be used or made.
#[derive(Debug, thiserror::Error)]
pub enum TrustError {
    /// A file cannot be read, written, or should not be as it is.
    #[error("{}: {why}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong.
        why: String,
    },
    /// Not a certificate that sds made.
    #[error("not a certificate of an sds cluster: {0}")]
    Malformed(String),
    /// Of another cluster.
    #[error("the certificate is of {holder} of cluster {found}, this is cluster {expected}")]
    Cluster {
        /// The cluster here.
        expected: ClusterId,
        /// Its cluster.
        found: ClusterId,
        /// Whose it says it is.
        holder: String,
    },
    /// It names this cluster, but another authority signed it.
    #[error("the certificate was not signed by the authority of cluster {0}")]
    Issuer(ClusterId),
    /// Whose it is may not do this.
    #[error("the certificate is of {found}, not of {expected}")]
    Role {
        /// Who was expected.
        expected: &'static str,
        /// Who it is.
        found: String,
    },
    /// Another node than was meant.
    #[error("node {found} ({name}) is there, not {expected}")]
    Node {
        /// The node that was meant.
        expected: NodeId,
        /// The node that is there.
        found: NodeId,
        /// Its name.
        name: String,
    },
    /// The authority is not the one whose fingerprint is known.
    #[error(
        "no authority with the fingerprint of the token is there: this is another cluster, or somebody in between"
    )]
    Fingerprint,
    /// The other end showed no certificate, or another protocol is spoken there.
    #[error("{0}")]
    Refused(&'static str),
    /// TLS cannot be set up.
    #[error("{}", verify::told(.0))]
    Tls(#[from] rustls::Error),
    /// A certificate cannot be made.
    #[error("cannot make a certificate: {0}")]
    Make(#[from] rcgen::Error),
    /// A request for a certificate is no good.
    #[error("the signing request is no good: {0}")]
    Request(String),
}

/// The wall clock, for the validity of certificates.
pub fn now() -> UnixTime {
    UnixTime::now()
}

/// 32 random bytes of the operating system.
pub(crate) fn random() -> Result<[u8; 32], TrustError> {
    use ring::rand::SecureRandom;
    let mut bytes = [0; 32];
    ring::rand::SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| TrustError::Refused("the operating system gives no random numbers"))?;
    Ok(bytes)
}

/// SHA-256.
pub(crate) fn sha256(bytes: &[u8]) -> [u8; 32] {
    let mut hash = [0; 32];
    hash.copy_from_slice(ring::digest::digest(&ring::digest::SHA256, bytes).as_ref());
    hash
}

/// SHA-256 of a certificate.
pub fn fingerprint(certificate: &rustls::pki_types::CertificateDer<'_>) -> [u8; 32] {
    sha256(certificate)
}
