//! Says that this node runs, as long as it does.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::{sleep, timeout};

use super::{Cluster, Node};
use crate::meta::members::AliveRecord;
use crate::meta::schema::SchemaError;
use crate::meta::{LeaseId, MetaError};

/// Pause after the store did not answer.
const RETRY: Duration = Duration::from_millis(250);
/// How many looks in a row may not find what was told before it is told again.
const UNKNOWN_MAX: u32 = 2;
/// How long the store may take.
const PATIENCE: Duration = Duration::from_secs(2);

impl Node {
    /// Keeps the lease, and takes a new one when it is lost.
    pub(super) async fn keep_lease(self: Rc<Self>) {
        let Some(cluster) = self.cluster.as_ref() else { return };
        let alive = AliveRecord {
            id: cluster.options.id,
            instance: self.options.env.random_u64(),
            address: cluster.options.address.clone(),
            admin: cluster.options.admin.clone(),
            exports: cluster.options.exports.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
        };
        while !self.stopping.get() {
            match self.take_lease(cluster, &alive).await {
                Ok(lease) => {
                    cluster.lease.set(Some(lease));
                    self.renew(cluster, &alive, lease).await;
                    cluster.lease.set(None);
                }
                Err(error) => tracing::warn!(%error, "the store is not told that this node runs"),
            }
            sleep(RETRY).await;
        }
    }

    async fn take_lease(
        &self,
        cluster: &Cluster,
        alive: &AliveRecord,
    ) -> Result<LeaseId, SchemaError> {
        let store = self.schema.store();
        let slow = || MetaError::Unavailable("no answer in time".into());
        let granted = timeout(PATIENCE, store.lease_grant(cluster.options.lease));
        let lease = granted.await.map_err(|_| slow()).flatten()?;
        let told = timeout(PATIENCE, self.schema.set_alive(&self.options.name, alive, lease));
        match told.await {
            Ok(Ok(())) => Ok(lease),
            Ok(Err(error)) => Err(error),
            Err(_) => Err(slow().into()),
        }
    }

    /// Renews the lease until it is lost.
    async fn renew(&self, cluster: &Cluster, alive: &AliveRecord, lease: LeaseId) {
        let mut unknown = 0;
        while !self.stopping.get() {
            sleep(cluster.options.lease / 4).await;
            unknown = if self.is_told(cluster, alive) { 0 } else { unknown + 1 };
            // What was told a moment ago may not have come back yet.
            if unknown > UNKNOWN_MAX {
                unknown = 0;
                self.tell_again(alive, lease).await;
            }
            match timeout(PATIENCE, self.schema.store().lease_keep_alive(lease)).await {
                Ok(Err(MetaError::LeaseNotFound(_))) => {
                    tracing::warn!("the lease of this node ended: others may take its volumes");
                    return;
                }
                Ok(Err(error)) => tracing::debug!(%error, "the lease is not renewed"),
                Ok(Ok(_)) | Err(_) => {}
            }
        }
    }

    /// Whether the store says that this process runs, as far as is known here. It does not where a change that an earlier
    /// process, or an earlier attempt, had sent was made late: then the key goes with the lease of that one.
    fn is_told(&self, cluster: &Cluster, alive: &AliveRecord) -> bool {
        let view = cluster.view.borrow();
        view.alive.get(&self.options.name).is_some_and(|(told, _)| told.instance == alive.instance)
    }

    async fn tell_again(&self, alive: &AliveRecord, lease: LeaseId) {
        tracing::warn!("the store does not say that this node runs: it is told again");
        let told = timeout(PATIENCE, self.schema.set_alive(&self.options.name, alive, lease)).await;
        // It is looked at again anyway.
        if let Ok(Err(error)) = told {
            tracing::warn!(%error, "the store is not told that this node runs");
        }
    }

    /// Tells the others at once that this node stops.
    pub(in crate::node) async fn leave(&self) {
        let Some(lease) = self.cluster.as_ref().and_then(|cluster| cluster.lease.take()) else {
            return;
        };
        let revoked = timeout(PATIENCE, self.schema.store().lease_revoke(lease)).await;
        if !matches!(revoked, Ok(Ok(()))) {
            tracing::warn!("the store is not told that this node stops: its lease will end");
        }
    }
}
