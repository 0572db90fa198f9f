//! `[cluster]` of the configuration: where other nodes reach this one, and with which credentials.
//!
//! Without an address the node is alone: it listens for no other one. What is checked here is the form;
//! whether the credentials are any good is found when they are read.

use std::net::SocketAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{ConfigError, refuse};
use crate::meta::record::check_name;

/// Longest `HOST:PORT`, bytes: a name of the DNS, a colon and a port.
const ADVERTISE_BYTES_MAX: usize = 253 + 6;

/// This node among the others of its cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ClusterConfig {
    /// TCP address on which other nodes are listened to; none: there are no other nodes.
    pub address: Option<SocketAddr>,
    /// `HOST:PORT` under which other nodes reach this one; none: `address`.
    pub advertise: Option<String>,
    /// What fails together with this node: placement keeps redundancy across racks.
    pub rack: String,
    /// Directory with `ca.pem`, `node.pem` and `node.key`, as `sdsctl cluster init` and `sdsd join`
    /// make it.
    pub credentials: Option<PathBuf>,
    /// Directory with `ca.pem` and `ca.key`, where this node may sign for nodes that join.
    pub authority: Option<PathBuf>,
    /// How long a node may be away before what is on its disks is rebuilt elsewhere, seconds.
    pub out_after_seconds: u64,
    /// Shards of the volumes that this node serves move from full disks to empty ones, also where there is no
    /// other node.
    pub balance: bool,
    /// Nodes talk without TLS; for tests, on loopback addresses only.
    pub insecure: bool,
}

impl Default for ClusterConfig {
    fn default() -> Self {
        Self {
            address: None,
            advertise: None,
            rack: "default".into(),
            credentials: None,
            authority: None,
            out_after_seconds: 60,
            balance: true,
            insecure: false,
        }
    }
}

impl ClusterConfig {
    /// `HOST:PORT` under which other nodes reach this one; none if it listens for none.
    pub fn advertised(&self) -> Option<String> {
        let address = self.address?;
        Some(self.advertise.clone().unwrap_or_else(|| address.to_string()))
    }

    /// Checks what the types do not.
    pub(super) fn validate(&self) -> Result<(), ConfigError> {
        check_name("rack", &self.rack).or_else(|message| refuse("cluster.rack", message))?;
        for (field, path) in
            [("cluster.credentials", &self.credentials), ("cluster.authority", &self.authority)]
        {
            if path.as_ref().is_some_and(|path| path.as_os_str().is_empty()) {
                return refuse(field, "the path is empty");
            }
        }
        if self.authority.is_some() && self.credentials.is_none() {
            return refuse("cluster.authority", "without cluster.credentials");
        }
        if self.insecure && self.credentials.is_some() {
            return refuse("cluster.insecure", "there are cluster.credentials: use either");
        }
        let Some(address) = self.address else {
            return match (&self.advertise, self.insecure) {
                (Some(_), _) => refuse("cluster.advertise", "without cluster.address"),
                (None, true) => refuse("cluster.insecure", "without cluster.address"),
                (None, false) => Ok(()),
            };
        };
        if self.insecure && !address.ip().is_loopback() {
            return refuse(
                "cluster.insecure",
                format!("{address} is not a loopback address: other hosts need credentials"),
            );
        }
        if !self.insecure && self.credentials.is_none() {
            return refuse(
                "cluster.address",
                "without cluster.credentials, which `sdsctl cluster init` or `sdsd join` make",
            );
        }
        match &self.advertise {
            Some(advertise) => {
                check_host_port(advertise).or_else(|message| refuse("cluster.advertise", message))
            }
            None if address.ip().is_unspecified() => refuse(
                "cluster.address",
                format!("{address} is no address to call: name one in cluster.advertise"),
            ),
            None => Ok(()),
        }
    }
}

/// Whether `text` is a `HOST:PORT` that can be called.
///
/// # Errors
/// What is wrong with it.
pub fn check_host_port(text: &str) -> Result<(), String> {
    let wrong = |why: &str| Err(format!("'{}' is not HOST:PORT: {why}", text.escape_default()));
    if text.len() > ADVERTISE_BYTES_MAX {
        return Err(format!("HOST:PORT has at most {ADVERTISE_BYTES_MAX} characters"));
    }
    let Some((host, port)) = text.rsplit_once(':') else { return wrong("it has no port") };
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    if !digits || !port.parse::<u16>().is_ok_and(|port| port != 0) {
        return wrong("the port is none of 1 to 65535");
    }
    if let Ok(address) = text.parse::<SocketAddr>() {
        if address.ip().is_unspecified() {
            return wrong("the address is any address");
        }
        return Ok(());
    }
    let of_a_name = |c: char| c.is_ascii_alphanumeric() || ".-_".contains(c);
    if host.is_empty() || !host.chars().all(of_a_name) {
        return wrong("the host is neither an address nor a name");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hosts_and_ports() {
        for good in ["10.0.0.1:9771", "[fd00::1]:1", "node1:65535", "node-1.example.org:9771"] {
            check_host_port(good).expect(good);
        }
        for bad in [
            "",
            ":",
            "node1",
            "node1:",
            ":9771",
            "node1:0",
            "node1:65536",
            "node1:+1",
            "fd00::1:1",
            "0.0.0.0:1",
            "[::]:1",
            "no de:1",
            "a/b:1",
            "node1:9771 ",
        ] {
            check_host_port(bad).expect_err(bad);
        }
        check_host_port(&format!("{}:1", "x".repeat(300))).expect_err("too long");
    }
}
