//! The certificate authority of a cluster: makes itself, signs for nodes and operators.
//!
//! Keys are ECDSA P-256: a handshake costs tens of microseconds, so that it can be done on the thread of
//! the data path.

use std::path::Path;
use std::time::Duration;

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName,
    DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData,
    SanType, SerialNumber,
};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, UnixTime};

use super::files::{self, Layout};
use super::holder::{authority_uri, cluster_of_authority};
use super::{Holder, Role, TrustError, random};
use crate::id::ClusterId;

const DAY: Duration = Duration::from_hours(24);
/// How long an authority lives: a cluster's lifetime.
const AUTHORITY_LIFETIME: Duration = Duration::from_hours(20 * 365 * 24);
/// How long the certificate of a node is valid.
pub const NODE_LIFETIME: Duration = Duration::from_hours(2 * 365 * 24);
/// How long the certificate of an operator is valid.
pub const ADMIN_LIFETIME: Duration = Duration::from_hours(365 * 24);
/// Certificates are valid from so long before they were made, for clocks that are behind.
const CLOCKS_DIFFER: Duration = DAY;
/// Largest request for a certificate, bytes of PEM.
const REQUEST_BYTES_MAX: usize = 8 << 10;

/// The authority of a cluster, with its key.
pub struct Authority {
    cluster: ClusterId,
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pem: String,
}

/// A key that was just made, and what asks for a certificate for it.
pub struct SigningRequest {
    key: KeyPair,
}

impl SigningRequest {
    /// Makes a key.
    ///
    /// # Errors
    /// [`TrustError::Make`].
    pub fn new() -> Result<Self, TrustError> {
        Ok(Self { key: KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)? })
    }

    /// The request, PEM (PKCS #10): it proves that who asks has the key. Whose the certificate will be is
    /// not for the one who asks to say, so there is no name in it.
    ///
    /// # Errors
    /// [`TrustError::Make`].
    pub fn pem(&self) -> Result<String, TrustError> {
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        Ok(params.serialize_request(&self.key)?.pem()?)
    }

    /// The private key, PEM (PKCS #8): for a file of mode 0600 and nothing else.
    pub fn key_pem(&self) -> String {
        self.key.serialize_pem()
    }
}

/// `sds://…` and names as they stand in certificates.
fn ia5(text: &str) -> Result<rcgen::string::Ia5String, TrustError> {
    Ok(text.try_into()?)
}

fn params(
    common_name: &str,
    lifetime: Duration,
    now: UnixTime,
) -> Result<CertificateParams, TrustError> {
    let mut params = CertificateParams::default();
    let since_1970 = Duration::from_secs(now.as_secs());
    let epoch = rcgen::date_time_ymd(1970, 1, 1);
    params.not_before = epoch + since_1970.saturating_sub(CLOCKS_DIFFER);
    params.not_after = epoch + since_1970 + lifetime;
    let mut serial = random()?;
    // Positive, and not short.
    serial[0] = serial[0] & 0x7f | 0x40;
    params.serial_number = Some(SerialNumber::from_slice(&serial[..16]));
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    Ok(params)
}

impl Authority {
    /// Makes the authority of a cluster and its private key, PEM; `name` is for people.
    ///
    /// # Errors
    /// [`TrustError::Make`].
    pub fn create(
        cluster: ClusterId,
        name: &str,
        now: UnixTime,
    ) -> Result<(Self, String), TrustError> {
        let key = KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
        let mut params = params(&format!("sds cluster {name}"), AUTHORITY_LIFETIME, now)?;
        params.distinguished_name.push(DnType::OrganizationName, cluster.to_string());
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.subject_alt_names = vec![SanType::URI(ia5(&authority_uri(cluster))?)];
        let certificate = params.self_signed(&key)?;
        let (pem, key_pem) = (certificate.pem(), key.serialize_pem());
        let certificate = certificate.der().clone();
        Ok((Self { cluster, issuer: Issuer::new(params, key), certificate, pem }, key_pem))
    }

    /// Reads `ca.pem` and `ca.key` of a directory.
    ///
    /// # Errors
    /// [`TrustError`]: a file is not there, its mode is wrong, the two do not belong together.
    pub fn load(dir: &Path) -> Result<Self, TrustError> {
        let Layout { certificate: path, key, .. } = Layout::of_authority(dir);
        let pem = files::read(&path)?;
        let pem = String::from_utf8(pem).or_else(|why| files::fail(&path, why))?;
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes())
            .or_else(|why| files::fail(&path, why))?;
        let cluster = cluster_of_authority(&certificate).or_else(|why| files::fail(&path, why))?;
        let secret = files::read_secret(&key)?;
        let secret = String::from_utf8(secret).or_else(|_| files::fail(&key, "not PEM"))?;
        // What the library has to say could repeat what it was given.
        let pair = KeyPair::from_pem(&secret)
            .or_else(|_| files::fail(&key, "not a private key that can be used, PEM"))?;
        if !certificate_has_key(&certificate, &pair) {
            return files::fail(&key, format!("not the key of {}", path.display()));
        }
        let issuer = Issuer::from_ca_cert_der(&certificate, pair)?;
        Ok(Self { cluster, issuer, certificate, pem })
    }

    /// Its cluster.
    pub fn cluster(&self) -> ClusterId {
        self.cluster
    }

    /// Its certificate, PEM.
    pub fn pem(&self) -> &str {
        &self.pem
    }

    /// Its certificate.
    pub fn certificate(&self) -> &CertificateDer<'static> {
        &self.certificate
    }

    /// Signs for the key of a request, PEM: the certificate, PEM. Nothing but the key is taken from the
    /// request.
    ///
    /// # Errors
    /// [`TrustError::Request`]: the request is malformed, or not signed by its key.
    pub fn sign(
        &self,
        holder: &Holder,
        request: &str,
        lifetime: Duration,
        now: UnixTime,
    ) -> Result<String, TrustError> {
        if request.len() > REQUEST_BYTES_MAX {
            return Err(TrustError::Request(format!("more than {REQUEST_BYTES_MAX} bytes")));
        }
        let request = CertificateSigningRequestParams::from_pem(request)
            .map_err(|why| TrustError::Request(why.to_string()))?;
        if *request.public_key.algorithm() != rcgen::PKCS_ECDSA_P256_SHA256 {
            return Err(TrustError::Request("its key is not ECDSA P-256".into()));
        }
        self.issue(holder, &request.public_key, lifetime, now)
    }

    fn issue(
        &self,
        holder: &Holder,
        key: &impl PublicKeyData,
        lifetime: Duration,
        now: UnixTime,
    ) -> Result<String, TrustError> {
        let mut params = params(&holder.name, lifetime, now)?;
        params.subject_alt_names = vec![SanType::URI(ia5(&holder.uri())?)];
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        if let Role::Node(_) = holder.role {
            params.subject_alt_names.push(SanType::DnsName(ia5(&holder.name)?));
            params.extended_key_usages.push(ExtendedKeyUsagePurpose::ServerAuth);
        }
        params.is_ca = IsCa::ExplicitNoCa;
        params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
        params.use_authority_key_identifier_extension = true;
        Ok(params.signed_by(key, &self.issuer)?.pem())
    }
}

fn certificate_has_key(certificate: &CertificateDer<'_>, key: &KeyPair) -> bool {
    x509_parser::parse_x509_certificate(certificate).is_ok_and(|(_, parsed)| {
        parsed.public_key().subject_public_key.data.as_ref() == key.public_key_raw()
    })
}
