//! `sdsctl node …`, and what `sdsd join` does.

use std::path::{Path, PathBuf};

use clap::Subcommand;

use super::output::{Output, Table, fields, non_empty};
use super::{Failure, parse};
use crate::admin::client::{Client, ClientError};
use crate::admin::joining::{CreateNodeToken, JoinNode, NodeCertificate, RenewNode};
use crate::admin::nodes::Node;
use crate::trust::credentials::check_issued;
use crate::trust::{
    self, ClientTls, Credentials, JoinToken, Kind, Layout, SigningRequest, TrustError,
};
use crate::units::TimeSpan;

/// Verbs on nodes.
#[derive(Debug, Subcommand)]
pub(super) enum NodeVerb {
    /// Lists the nodes
    Ls,
    /// Shows one node
    Show {
        /// Its name
        node: String,
    },
    /// Has volumes and data leave a node, which stays in the cluster; returns at once
    #[command(
        after_help = "`sdsctl node show NODE` tells how far it is; `sdsctl node undrain NODE` \
                            uses it again."
    )]
    Drain {
        /// Its name
        node: String,
    },
    /// Uses a node again that was drained
    Undrain {
        /// Its name
        node: String,
    },
    /// Removes a node for good, once it has no disks and does not run
    Rm {
        /// Its name
        node: String,
    },
    /// Makes a token with which one more node joins: a secret, good for one node
    #[command(
        after_help = "Example:\n  sdsctl node token --ttl 15m\nThen, on the new node:\n  sdsd join \
                            TOKEN --name node1 --dir /etc/sds/node"
    )]
    Token {
        /// How long it is valid: 1m to 7d
        #[arg(long, default_value = "1h")]
        ttl: TimeSpan,
        /// HOST:PORT at which the new node reaches the admin API of the node asked
        #[arg(long, value_name = "HOST:PORT", value_parser = parse::host_port)]
        address: Option<String>,
    },
    /// Renews the certificate of this node, whose credentials are shown; then restart sdsd
    #[command(after_help = "Example:\n  sdsctl --endpoint https://10.0.0.1:9770 node renew --dir \
                            /etc/sds/node")]
    Renew {
        /// Directory with ca.pem, node.pem and node.key
        #[arg(long, default_value = "/etc/sds/node")]
        dir: PathBuf,
    },
}

/// Lists the nodes.
pub(super) fn list(client: &Client, out: &mut Output) -> Result<(), Failure> {
    let nodes = client.nodes()?;
    out.show(&nodes, |nodes| {
        let titles = ["NAME", "STATE", "RACK", "DISKS", "VOLUMES", "ADDRESS", "VERSION", "ROLE"];
        let mut table = Table::new(&titles);
        for node in nodes {
            table.row(vec![
                node.name.clone(),
                node.state.to_string(),
                node.rack.clone(),
                format!("{}/{}", node.disks_online, node.disks),
                node.volumes.to_string(),
                non_empty(node.address.clone(), "-"),
                non_empty(node.version.clone(), "-"),
                if node.manager { "manager" } else { "" }.to_owned(),
            ]);
        }
        non_empty(table.render(), "this node is alone: it has no [cluster] in its configuration\n")
    })?;
    Ok(())
}

/// Shows one node.
pub(super) fn show(node: &str, client: &Client, out: &mut Output) -> Result<(), Failure> {
    let node = client.node(node)?;
    out.show(&node, details)?;
    Ok(())
}

fn details(node: &Node) -> String {
    let reason = node.state_reason.as_ref().map(|why| format!(": {why}")).unwrap_or_default();
    fields(&[
        ("name", node.name.clone()),
        ("id", node.id.to_string()),
        ("state", format!("{}{reason}", node.state)),
        ("manager", if node.manager { "yes" } else { "no" }.to_owned()),
        ("host", node.host.clone()),
        ("rack", node.rack.clone()),
        ("address", non_empty(node.address.clone(), "-")),
        ("admin", non_empty(node.admin.clone(), "-")),
        ("version", non_empty(node.version.clone(), "-")),
        ("disks", format!("{} of {} online", node.disks_online, node.disks)),
        ("volumes", node.volumes.to_string()),
    ])
}

/// Drains a node, or uses it again.
pub(super) fn drain(
    node: &str,
    drain: bool,
    client: &Client,
    out: &mut Output,
) -> Result<(), Failure> {
    let shown = if drain { client.drain_node(node)? } else { client.undrain_node(node)? };
    out.show(&shown, |shown| {
        if drain {
            format!("draining node {}: {} volumes leave it\n", shown.name, shown.volumes)
        } else {
            format!("node {} is used again\n", shown.name)
        }
    })?;
    Ok(())
}

/// Removes a node.
pub(super) fn remove(node: &str, client: &Client, out: &mut Output) -> Result<(), Failure> {
    let removed = client.remove_node(node)?;
    out.show(&removed, |removed| format!("removed node {}\n", removed.name))?;
    Ok(())
}

/// Makes a token.
pub(super) fn token(
    ttl: TimeSpan,
    address: Option<&String>,
    client: &Client,
    out: &mut Output,
) -> Result<(), Failure> {
    let request = CreateNodeToken { ttl_s: Some(ttl.0.as_secs()), address: address.cloned() };
    let token = client.create_node_token(&request)?;
    out.show(&token, |token| format!("{}\n", token.token))?;
    Ok(())
}

/// Renews the certificate in a directory, asking a node at an endpoint that has the authority's key.
pub(super) fn renew(endpoint: &str, dir: &Path, out: &mut Output) -> Result<(), Failure> {
    let layout = Layout::of(dir, Kind::Node);
    let credentials = Credentials::load(dir, Kind::Node)?;
    let client = Client::with_tls(endpoint, &ClientTls::new(&credentials)?)?;
    let request = SigningRequest::new()?;
    let answer = client.renew_node(&RenewNode { request: request.pem()? })?;
    let name = &credentials.holder().name;
    let fingerprint = credentials.authority_fingerprint();
    let NodeCertificate { certificate, authority } = &answer;
    let holder = check_issued(certificate, authority, (fingerprint, name), trust::now())?;
    if holder != *credentials.holder() {
        let found = holder.to_string();
        return Err(TrustError::Role { expected: "this node", found }.into());
    }
    layout.write(certificate, &request.key_pem(), authority)?;
    out.show(&answer, |_| {
        format!("the certificate of {holder} is renewed; sdsd reads it when it is started again\n")
    })?;
    Ok(())
}

/// Why a node did not join: a sentence, and what to do about it.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    /// Credentials cannot be made, or the member is not believed.
    #[error(transparent)]
    Trust(#[from] TrustError),
    /// The member refuses, or cannot be reached.
    #[error(transparent)]
    Client(#[from] ClientError),
}

impl JoinError {
    /// What to do about it, if anything is known to help.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Client(ClientError::Connect { .. }) => Some(
                "the token says where: is that address reached from here, and does sdsd run there?"
                    .to_owned(),
            ),
            Self::Client(error) => error.hint(),
            Self::Trust(_) => None,
        }
    }
}

/// Has a node join: asks the member that the token names for a certificate and writes credentials into
/// `dir`. Says what comes next.
///
/// # Errors
/// [`JoinError`]; nothing was written then, but the token may be used up.
pub fn join(token: &JoinToken, name: &str, dir: &Path) -> Result<String, JoinError> {
    let dir = std::path::absolute(dir)
        .map_err(|why| TrustError::File { path: dir.to_owned(), why: why.to_string() })?;
    let layout = Layout::of(&dir, Kind::Node);
    layout.check_absent()?;
    // Before the token is used up: whether the files can be written.
    layout.prepare()?;
    let tls = ClientTls::pinned(token.fingerprint)?;
    let client = Client::with_tls(&token.address, &tls)?;
    let request = SigningRequest::new()?;
    let answer = client.join_node(&JoinNode {
        secret: token.secret.reveal(),
        name: name.to_owned(),
        request: request.pem()?,
    })?;
    let NodeCertificate { certificate, authority } = &answer;
    let holder = check_issued(certificate, authority, (token.fingerprint, name), trust::now())?;
    layout.write(certificate, &request.key_pem(), authority)?;
    let dir = dir.display();
    Ok(format!(
        "{holder} has joined cluster {}\nits credentials: {dir}\nnext: in its configuration\n\n\
         node = \"{name}\"\n\n[cluster]\ncredentials = \"{dir}\"\naddress = \"0.0.0.0:9771\"\n\
         advertise = \"HOST:9771\"    # as the other nodes reach it\n\nthen: sdsd --config FILE\n",
        holder.cluster
    ))
}
