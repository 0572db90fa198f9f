//! What somebody proves who they are with: certificate, private key and the cluster's authority.

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::sign::CertifiedKey;

use super::files::{self, Kind, Layout};
use super::holder::{cluster_of_authority, validity};
use super::verify::{Cluster, provider};
use super::{Holder, TrustError, fingerprint};

/// So long before its end a certificate is warned of.
pub const RENEW_BEFORE: Duration = Duration::from_hours(30 * 24);

/// Credentials of a node or an operator, checked to belong together.
#[derive(Clone)]
pub struct Credentials {
    holder: Holder,
    certified: Arc<CertifiedKey>,
    authority: CertificateDer<'static>,
    valid_until: u64,
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Credentials({})", self.holder.uri())
    }
}

impl Credentials {
    /// Reads those in a directory.
    ///
    /// # Errors
    /// As [`Self::load_files`]; they are of somebody else than a node, or an operator.
    pub fn load(dir: &Path, kind: Kind) -> Result<Self, TrustError> {
        let loaded = Self::load_files(&Layout::of(dir, kind))?;
        let (expected, fits) = match kind {
            Kind::Node => ("a node", loaded.holder.node().is_some()),
            Kind::Admin => ("an admin", loaded.holder.node().is_none()),
        };
        if fits {
            return Ok(loaded);
        }
        Err(TrustError::Role { expected, found: loaded.holder.to_string() })
    }

    /// Reads three files. That the certificate has expired is no error here: see [`Self::days_left`].
    ///
    /// # Errors
    /// [`TrustError`]: a file cannot be read, others may read the key, or the three do not belong together.
    pub fn load_files(files: &Layout) -> Result<Self, TrustError> {
        let certificate = read_certificate(&files.certificate)?;
        let authority = read_certificate(&files.ca)?;
        let holder =
            Holder::of(&certificate).or_else(|why| files::fail(&files.certificate, why))?;
        let cluster = Cluster::of(&authority).or_else(|why| files::fail(&files.ca, why))?;
        let (valid_from, valid_until) = validity(&certificate)?;
        // Judged within its validity: whether the authority signed it does not depend on the time.
        let then = UnixTime::since_unix_epoch(Duration::from_secs(valid_from));
        cluster
            .check_client(&certificate, &[], then)
            .or_else(|why| files::fail(&files.certificate, TrustError::from(why)))?;
        let certified = match with_key(&certificate, &files.key) {
            Err(TrustError::Tls(_)) if with_key(&certificate, &files.key_draft()).is_ok() => {
                files.finish_replacing()?;
                with_key(&certificate, &files.key)
            }
            certified => certified,
        };
        let certified = match certified {
            Err(TrustError::Tls(_)) => {
                let certificate = files.certificate.display();
                return files::fail(&files.key, format!("not the key of {certificate}"));
            }
            certified => Arc::new(certified?),
        };
        Ok(Self { holder, certified, authority, valid_until })
    }

    /// Whose they are.
    pub fn holder(&self) -> &Holder {
        &self.holder
    }

    /// The cluster's authority.
    pub fn authority(&self) -> &CertificateDer<'static> {
        &self.authority
    }

    /// Fingerprint of the cluster's authority: SHA-256.
    pub fn authority_fingerprint(&self) -> [u8; 32] {
        fingerprint(&self.authority)
    }

    /// Whole days until the certificate expires; none if it has.
    pub fn days_left(&self, now: UnixTime) -> Option<u64> {
        Some(self.valid_until.checked_sub(now.as_secs())? / (24 * 60 * 60))
    }

    /// Believes those whom another authority signed for.
    #[cfg(test)]
    pub(crate) fn trust_instead(&mut self, authority: CertificateDer<'static>) {
        self.authority = authority;
    }

    /// Certificate and key for rustls; with the authority's certificate in the chain or without.
    pub(super) fn certified(&self, with_authority: bool) -> Arc<CertifiedKey> {
        if !with_authority {
            return self.certified.clone();
        }
        let authority = std::slice::from_ref(&self.authority);
        let chain = [&self.certified.cert[..], authority].concat();
        Arc::new(CertifiedKey::new(chain, self.certified.key.clone()))
    }
}

/// Checks what a member that signs has answered: that the certificate is of `name` as a node, was signed
/// by the authority with the fingerprint, and is for the key. Both certificates are PEM.
///
/// # Errors
/// [`TrustError`]: it is anything else.
pub fn check_issued(
    certificate: &str,
    authority: &str,
    (fingerprinted, name): ([u8; 32], &str),
    now: UnixTime,
) -> Result<Holder, TrustError> {
    let parse = |pem: &str| {
        CertificateDer::from_pem_slice(pem.as_bytes())
            .map_err(|why| TrustError::Malformed(why.to_string()))
    };
    let (certificate, authority) = (parse(certificate)?, parse(authority)?);
    if fingerprint(&authority) != fingerprinted {
        return Err(TrustError::Fingerprint);
    }
    cluster_of_authority(&authority)?;
    let holder = Cluster::of(&authority)?.check_server(&certificate, &[], now)?;
    if holder.name != name {
        let found = holder.to_string();
        return Err(TrustError::Role { expected: "the node that was asked for", found });
    }
    Ok(holder)
}

fn read_certificate(path: &Path) -> Result<CertificateDer<'static>, TrustError> {
    let pem = files::read(path)?;
    CertificateDer::from_pem_slice(&pem).or_else(|why| files::fail(path, why))
}

/// The certificate with the key in a file. [`TrustError::Tls`] if they do not belong together.
fn with_key(
    certificate: &CertificateDer<'static>,
    path: &Path,
) -> Result<CertifiedKey, TrustError> {
    let pem = files::read_secret(path)?;
    // What the library has to say could repeat what it was given.
    let key = PrivateKeyDer::from_pem_slice(&pem)
        .or_else(|_| files::fail(path, "there is no private key in it"))?;
    let key = provider().key_provider.load_private_key(key);
    let key = key.or_else(|_| files::fail(path, "its private key cannot be used"))?;
    let certified = CertifiedKey::new(vec![certificate.clone()], key);
    certified.keys_match()?;
    Ok(certified)
}
