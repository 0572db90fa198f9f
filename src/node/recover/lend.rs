//! What a node that lends its disks and the node that recovers say to each other.
//!
//! A lender serves its disks as a node does, and answers one question: which they are. It has no store and no heads.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::time::timeout;

use super::Found;
use crate::id::DiskId;
use crate::node::relay::Ask;
use crate::rpc::{AskError, ConnectionState, DiskDirectory, Peer, Questions, RemoteDisk};
use crate::shard::{LocalFuture, ShardClient};

/// How long a lender may take to be reached, and then to tell what it lends.
const PATIENCE: Duration = Duration::from_secs(5);

/// A disk that is lent.
#[derive(Debug, Serialize, Deserialize)]
struct Offered {
    disk: DiskId,
    path: String,
    size_bytes: u64,
    slot_bytes: u64,
}

/// Answer to [`Ask::Lent`].
#[derive(Debug, Serialize, Deserialize)]
struct Offer {
    node: String,
    disks: Vec<Offered>,
}

/// What a lender has.
pub(super) struct Shelf {
    node: String,
    disks: BTreeMap<DiskId, Found>,
}

impl Shelf {
    pub(super) fn new(node: &str, disks: BTreeMap<DiskId, Found>) -> Rc<Self> {
        Rc::new(Self { node: node.to_owned(), disks })
    }

    fn offer(&self) -> Offer {
        let offered = |(id, there): (&DiskId, &Found)| Offered {
            disk: *id,
            path: there.path.clone(),
            size_bytes: there.size_bytes,
            slot_bytes: there.slot_bytes,
        };
        Offer { node: self.node.clone(), disks: self.disks.iter().map(offered).collect() }
    }
}

impl DiskDirectory for Shelf {
    fn disk(&self, id: DiskId) -> Option<Rc<dyn ShardClient>> {
        Some(self.disks.get(&id)?.client.clone())
    }
}

impl Questions for Shelf {
    fn ask(&self, question: Bytes) -> LocalFuture<'_, Result<Bytes, String>> {
        let answer = match serde_json::from_slice(&question) {
            Ok(Ask::Lent) => {
                serde_json::to_vec(&self.offer()).map(Bytes::from).map_err(|why| why.to_string())
            }
            _ => Err("this node only lends its disks to `sdsd recover`".into()),
        };
        Box::pin(std::future::ready(answer))
    }
}

/// The disks that a lender offers.
///
/// # Errors
/// A sentence that names the lender.
pub(super) async fn borrow(peer: &Peer) -> Result<BTreeMap<DiskId, Found>, String> {
    let at = peer.label();
    let mut connection = peer.connection();
    let up = connection.wait_for(|state| matches!(state, ConnectionState::Up { .. }));
    if !timeout(PATIENCE, up).await.is_ok_and(|state| state.is_ok()) {
        let reason = match &*peer.connection().borrow() {
            ConnectionState::Down { reason, .. } => reason.clone(),
            ConnectionState::Up { .. } => "it comes and goes".into(),
        };
        return Err(format!(
            "{at} cannot be reached: {reason}; does `sdsd recover --lend` run there?"
        ));
    }
    let answer = match peer.ask(Ask::Lent.encode(), PATIENCE).await {
        Ok(answer) => answer,
        Err(AskError::Refused(why)) => return Err(format!("{at}: {why}")),
        Err(AskError::Unreachable) => return Err(format!("{at} does not answer")),
    };
    let offer: Offer = serde_json::from_slice(&answer)
        .map_err(|why| format!("{at}: its offer is not understood: {why}"))?;
    let found = offer.disks.into_iter().map(|offered| {
        let found = Found {
            client: Rc::new(RemoteDisk::new(offered.disk, peer.clone())),
            node: offer.node.clone(),
            path: offered.path,
            size_bytes: offered.size_bytes,
            slot_bytes: offered.slot_bytes,
        };
        (offered.disk, found)
    });
    Ok(found.collect())
}
