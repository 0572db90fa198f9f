//! Whose a certificate is, as its subject alternative name says.
//!
//! ```text
//!  node       URI sds://CLUSTER/node/NODE     and DNS name NAME
//!  admin      URI sds://CLUSTER/admin/NAME
//!  authority  URI sds://CLUSTER/authority
//! ```
//!
//! What is read here is a claim: it is true if the cluster's authority signed it (`verify.rs`).

use std::fmt;

use rustls::pki_types::CertificateDer;
use x509_parser::prelude::{GeneralName, X509Certificate};

use super::TrustError;
use crate::id::{ClusterId, NodeId};
use crate::meta::record::check_name;

/// What the URIs begin with.
const SCHEME: &str = "sds://";

/// What somebody is in a cluster.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// A node: talks to others, serves, and may renew its own certificate.
    Node(NodeId),
    /// An operator: may give any order to any node.
    Admin,
}

/// Whose a certificate is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// The cluster.
    pub cluster: ClusterId,
    /// What they are in it.
    pub role: Role,
    /// Their name: as [`check_name`] has it.
    pub name: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.role {
            Role::Node(_) => write!(f, "node {}", self.name),
            Role::Admin => write!(f, "admin {}", self.name),
        }
    }
}

fn malformed<T>(why: impl Into<String>) -> Result<T, TrustError> {
    Err(TrustError::Malformed(why.into()))
}

/// The URI of an authority.
pub(super) fn authority_uri(cluster: ClusterId) -> String {
    format!("{SCHEME}{cluster}/authority")
}

impl Holder {
    /// The URI of the subject alternative name.
    pub fn uri(&self) -> String {
        let cluster = self.cluster;
        match self.role {
            Role::Node(node) => format!("{SCHEME}{cluster}/node/{node}"),
            Role::Admin => format!("{SCHEME}{cluster}/admin/{}", self.name),
        }
    }

    /// The node, if it is one.
    pub fn node(&self) -> Option<NodeId> {
        match self.role {
            Role::Node(node) => Some(node),
            Role::Admin => None,
        }
    }

    /// What a certificate says. Its signature is not looked at.
    ///
    /// # Errors
    /// [`TrustError::Malformed`].
    pub fn of(certificate: &CertificateDer<'_>) -> Result<Self, TrustError> {
        let parsed = parse(certificate)?;
        let (uri, dns) = names(&parsed)?;
        let (cluster, path) = split(uri)?;
        let holder = match path.split_once('/') {
            Some(("node", id)) => {
                let Ok(id) = id.parse() else { return malformed(format!("{uri:?}")) };
                let Some(name) = dns else { return malformed("a node without a name") };
                Self { cluster, role: Role::Node(id), name: name.to_owned() }
            }
            Some(("admin", name)) => Self { cluster, role: Role::Admin, name: name.to_owned() },
            _ => return malformed(format!("{uri:?} names neither a node nor an admin")),
        };
        check_name("holder", &holder.name).or_else(malformed)?;
        // An id has several spellings, an identity has one.
        if holder.uri() == uri { Ok(holder) } else { malformed(format!("{uri:?}")) }
    }
}

/// The cluster of an authority's certificate.
pub(super) fn cluster_of_authority(
    certificate: &CertificateDer<'_>,
) -> Result<ClusterId, TrustError> {
    let parsed = parse(certificate)?;
    let (uri, _) = names(&parsed)?;
    let (cluster, _) = split(uri)?;
    if !parsed.is_ca() || uri != authority_uri(cluster) {
        return malformed(format!("{uri:?} is no authority"));
    }
    Ok(cluster)
}

/// From when to when a certificate is valid, seconds since 1970.
pub(super) fn validity(certificate: &CertificateDer<'_>) -> Result<(u64, u64), TrustError> {
    let parsed = parse(certificate)?;
    let seconds = |at: x509_parser::time::ASN1Time| u64::try_from(at.timestamp()).unwrap_or(0);
    Ok((seconds(parsed.validity.not_before), seconds(parsed.validity.not_after)))
}

fn parse<'a>(certificate: &'a CertificateDer<'_>) -> Result<X509Certificate<'a>, TrustError> {
    match x509_parser::parse_x509_certificate(certificate) {
        Ok(([], parsed)) => Ok(parsed),
        Ok(_) => malformed("something follows it"),
        Err(why) => malformed(why.to_string()),
    }
}

/// The one URI of sds, and the DNS name if there is exactly one.
fn names<'a>(
    certificate: &'a X509Certificate<'a>,
) -> Result<(&'a str, Option<&'a str>), TrustError> {
    let Ok(Some(names)) = certificate.subject_alternative_name() else {
        return malformed("it has no subject alternative name");
    };
    let (mut uris, mut dns) = (Vec::new(), Vec::new());
    for name in &names.value.general_names {
        match name {
            GeneralName::URI(uri) => uris.push(*uri),
            GeneralName::DNSName(name) => dns.push(*name),
            _ => {}
        }
    }
    let dns = if dns.len() == 1 { dns.pop() } else { None };
    match uris[..] {
        [uri] => Ok((uri, dns)),
        _ => malformed(format!("it has {} URIs", uris.len())),
    }
}

/// The cluster of a URI, and what follows it.
fn split(uri: &str) -> Result<(ClusterId, &str), TrustError> {
    let parts = uri.strip_prefix(SCHEME).and_then(|rest| rest.split_once('/'));
    match parts.and_then(|(cluster, path)| Some((cluster.parse().ok()?, path))) {
        Some(parts) => Ok(parts),
        None => malformed(format!("{uri:?} does not begin with {SCHEME}CLUSTER/")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, KeyPair, SanType};

    fn certificate(uris: &[&str], dns: &[&str]) -> CertificateDer<'static> {
        let mut params = CertificateParams::default();
        let uris = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap()));
        let dns = dns.iter().map(|name| SanType::DnsName((*name).try_into().unwrap()));
        params.subject_alt_names = uris.chain(dns).collect();
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    const CLUSTER: &str = "11111111-1111-1111-1111-111111111111";
    const NODE: &str = "22222222-2222-2222-2222-222222222222";

    #[test]
    fn nodes_and_admins_are_read() {
        let node = format!("sds://{CLUSTER}/node/{NODE}");
        let holder = Holder::of(&certificate(&[&node], &["node-1"])).unwrap();
        assert_eq!(holder.role, Role::Node(NodeId::from_bytes([0x22; 16])));
        assert_eq!((holder.name.as_str(), holder.uri()), ("node-1", node));
        let holder = Holder::of(&certificate(&[&format!("sds://{CLUSTER}/admin/eve")], &[]));
        assert_eq!(holder.unwrap().to_string(), "admin eve");
    }

    #[test]
    fn anything_else_is_refused() {
        let node = format!("sds://{CLUSTER}/node/{NODE}");
        for (uris, dns) in [
            (vec![], vec!["node-1"]),
            (vec![node.as_str()], vec![]),
            (vec![&node], vec!["a", "b"]),
            (vec![&node, &node], vec!["a"]),
            (vec![&node], vec!["Upper"]),
            (vec!["https://example.org/node/1"], vec!["a"]),
            (vec!["sds://node/a"], vec!["a"]),
            (vec![&node.replace('-', "")], vec!["a"]),
            (vec![&format!("{node}/")], vec!["a"]),
            (vec![&format!("sds://{CLUSTER}/admin/")], vec![]),
            (vec![&format!("sds://{CLUSTER}/admin/a/b")], vec![]),
            (vec![&format!("sds://{CLUSTER}/authority")], vec!["a"]),
        ] {
            let error = Holder::of(&certificate(&uris, &dns)).expect_err(&format!("{uris:?}"));
            assert!(matches!(error, TrustError::Malformed(_)), "{error}");
        }
        Holder::of(&CertificateDer::from(vec![0x30, 0x03, 1, 2])).expect_err("no certificate");
        // Whatever is in it: an error at most.
        let good = certificate(&[&node], &["node-1"]);
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bent = good.to_vec();
                bent[at] ^= 1 << bit;
                drop(Holder::of(&CertificateDer::from(bent)));
            }
            drop(Holder::of(&CertificateDer::from(good[..at].to_vec())));
        }
        let end_entity = certificate(&[&format!("sds://{CLUSTER}/authority")], &[]);
        cluster_of_authority(&end_entity).expect_err("no authority");
    }
}
