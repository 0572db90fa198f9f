//! Requests and answers about nodes that join, as they travel in JSON.

use std::fmt;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::types::clip;

/// What a join token is asked for with.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct CreateNodeToken {
    /// How long it is valid, seconds: 60 to 604,800; an hour if it is left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ttl_s: Option<u64>,
    /// `HOST:PORT` at which the new node reaches the admin API of this one; the configured one if it is
    /// left out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
}

/// A join token, which is shown only once.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeToken {
    /// For `sdsd join`: a secret.
    pub token: String,
    /// Seconds that it is valid for.
    pub ttl_s: u64,
    /// `HOST:PORT` at which the new node will ask.
    pub address: String,
}

impl fmt::Debug for NodeToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "NodeToken({}, {} s)", self.address, self.ttl_s)
    }
}

/// What a node joins with.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct JoinNode {
    /// The secret of a join token, 64 hexadecimal digits.
    pub secret: String,
    /// The name that the node is to have.
    pub name: String,
    /// A request for a certificate, PKCS #10 in PEM, of an ECDSA P-256 key.
    pub request: String,
}

impl fmt::Debug for JoinNode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinNode({:?})", clip(&self.name))
    }
}

/// What a node renews its certificate with.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct RenewNode {
    /// A request for a certificate, PKCS #10 in PEM, of an ECDSA P-256 key.
    pub request: String,
}

/// The certificate of a node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct NodeCertificate {
    /// The certificate, PEM.
    pub certificate: String,
    /// The cluster's authority, PEM.
    pub authority: String,
}
