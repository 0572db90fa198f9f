//! Clusters for tests: authorities and credentials that are made when they are needed.

use std::path::Path;

use rustls::pki_types::UnixTime;

use super::{Authority, Credentials, Holder, Kind, Layout, NODE_LIFETIME, Role, SigningRequest};
use crate::id::{ClusterId, NodeId};

/// A new authority of a cluster.
pub(crate) fn authority(cluster: ClusterId) -> Authority {
    Authority::create(cluster, "test", super::now()).unwrap().0
}

/// A node of a cluster: its id is all `byte`s.
pub(crate) fn node(cluster: ClusterId, byte: u8) -> Holder {
    let role = Role::Node(NodeId::from_bytes([byte; 16]));
    Holder { cluster, role, name: format!("node{byte}") }
}

/// Signs for a holder at a time and writes it all into a directory.
pub(crate) fn write(authority: &Authority, holder: &Holder, now: UnixTime, dir: &Path) -> Layout {
    let kind = if holder.node().is_some() { Kind::Node } else { Kind::Admin };
    let request = SigningRequest::new().unwrap();
    let certificate = authority.sign(holder, &request.pem().unwrap(), NODE_LIFETIME, now).unwrap();
    let layout = Layout::of(dir, kind);
    layout.write(&certificate, &request.key_pem(), authority.pem()).unwrap();
    layout
}

/// Credentials that were signed at a time.
pub(crate) fn credentials(authority: &Authority, holder: &Holder, now: UnixTime) -> Credentials {
    let dir = tempfile::tempdir().unwrap();
    Credentials::load_files(&write(authority, holder, now, dir.path())).unwrap()
}
