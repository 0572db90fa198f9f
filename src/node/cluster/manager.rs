//! The manager: gives every volume a node that runs.
//!
//! One node holds the manager's key by its lease. It places volumes that have no place, or whose node
//! is gone: it has no lease any more, and does not answer this node either; or its process died: the connection broke,
//! and where it led others are refused. A node that answers but has
//! lost the store goes on serving, so its volumes are left alone. Nobody is judged until the store has
//! answered for two leases on end.
//!
//! Volumes leave a node that an operator drains, and spread over the nodes, a few at a time.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::{Cluster, Node};
use crate::meta::members::MemberState;
use crate::meta::record::VolumeState;
use crate::placement::heads::{Order, Seat, plan};

/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long an order is waited for before it is given again.
const ORDER_PATIENCE: Duration = Duration::from_secs(3);
/// How long the store may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// How long a node has to run before volumes move to it for balance.
const SETTLE: Duration = Duration::from_secs(5);

impl Node {
    /// Whether this node is the manager.
    pub(in crate::node) fn is_manager(&self) -> bool {
        let Some(cluster) = self.cluster.as_ref() else { return true };
        cluster.view.borrow().manager() == Some(self.options.name.as_str())
    }

    /// Stands for manager, and does its work while it is.
    pub(super) async fn manage(self: Rc<Self>) {
        let Some(cluster) = self.cluster.as_ref() else { return };
        let mut nodes_since = (Vec::new(), Instant::now());
        while !self.stopping.get() {
            let changed = cluster.keys.changed.notified();
            drop(timeout(LOOK_EVERY, changed).await);
            if cluster.keys.answers_for().is_none() {
                cluster.judges_from.set(Instant::now() + cluster.options.lease * 2);
                continue;
            }
            let nobody = cluster.view.borrow().manager().is_none();
            if nobody
                && let Some(lease) = cluster.lease.get()
                && let Ok(Ok(true)) =
                    timeout(PATIENCE, self.schema.stand_for_manager(&self.options.name, lease))
                        .await
            {
                tracing::info!("this node is the manager");
                continue;
            }
            if !self.is_manager() || cluster.lease.get().is_none() {
                continue;
            }
            if Instant::now() < cluster.judges_from.get() {
                continue;
            }
            let nodes = cluster.eligible();
            if nodes != nodes_since.0 {
                nodes_since = (nodes.clone(), Instant::now());
            }
            let settled = nodes_since.1.elapsed() >= SETTLE;
            let orders = plan(&cluster.seats(), &nodes, |node| cluster.is_up(node), settled);
            self.give(cluster, orders).await;
        }
    }

    async fn give(&self, cluster: &Cluster, orders: Vec<Order>) {
        let ordered = &cluster.ordered;
        ordered.borrow_mut().retain(|_, (_, since)| since.elapsed() < ORDER_PATIENCE);
        for Order { volume, place, revision } in orders {
            // What was ordered for this very place may not be seen here yet.
            if ordered.borrow().get(&volume).is_some_and(|(of, _)| *of == revision) {
                continue;
            }
            ordered.borrow_mut().insert(volume, (revision, Instant::now()));
            let (to, next) = (place.node.clone(), place.next.clone());
            match timeout(PATIENCE, self.schema.set_place(volume, &place, revision)).await {
                Ok(Ok(true)) => tracing::info!(%volume, to, next, "volume placed"),
                // It was placed, or deleted, meanwhile.
                Ok(Ok(false)) => drop(ordered.borrow_mut().remove(&volume)),
                Ok(Err(error)) => tracing::warn!(%volume, to, %error, "volume not placed"),
                Err(_) => {
                    tracing::warn!(%volume, to, "the store does not answer");
                    sleep(LOOK_EVERY).await;
                    return;
                }
            }
        }
    }
}

impl Cluster {
    /// The nodes that heads may be placed on. One without disks gets only those of its clients, unless there are
    /// no others.
    pub(super) fn eligible(&self) -> Vec<String> {
        let running = self.running();
        let view = self.view.borrow();
        let with_disks = |name: &&String| view.disks.iter().any(|(_, disk, _)| disk.node == **name);
        let storing: Vec<String> = running.iter().filter(with_disks).cloned().collect();
        if storing.is_empty() { running } else { storing }
    }

    /// The nodes that run, are reached, and are not drained.
    pub(super) fn running(&self) -> Vec<String> {
        let view = self.view.borrow();
        let links = self.links.borrow();
        let running = view.members.iter().filter(|(name, member, _)| {
            let reached = *name == self.own.name
                || links.get(*name).is_some_and(|link| super::far::is_up(&link.peer));
            member.state == MemberState::Active && view.alive.get(name).is_some() && reached
        });
        running.map(|(name, ..)| name.to_owned()).collect()
    }

    fn seats(&self) -> Vec<Seat> {
        let view = self.view.borrow();
        let active = view.volumes.iter().filter(|(_, v, _)| v.state == VolumeState::Active);
        let seats = active.map(|(key, record, _)| Seat {
            volume: record.id,
            place: view.places.get(key).map(|(place, revision)| (place.clone(), revision)),
        });
        seats.collect()
    }
}
