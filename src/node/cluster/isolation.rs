//! What a node does that reaches the store but too few other nodes: it gives up what it cannot serve.
//!
//! Its lease says that it runs, so nobody takes its volumes from it. It therefore places those whose
//! writes wait, or that it cannot take over, on a node with a lease. Whoever is right about the network, fences decide.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::{Cluster, Node};
use crate::meta::members::PlaceRecord;
use crate::node::volumes::VolumeSlot;

/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long less than half of the others have to be reached.
const ALONE_FOR: Duration = Duration::from_secs(2);
/// How long the store may take.
const PATIENCE: Duration = Duration::from_secs(2);

impl Cluster {
    /// Whether less than half of the other nodes that run are reached.
    fn is_alone(&self) -> bool {
        let view = self.view.borrow();
        let links = self.links.borrow();
        let others = || view.alive.iter().filter(|(name, ..)| *name != self.own.name);
        let reached = others().filter(|(name, ..)| {
            links.get(*name).is_some_and(|link| super::far::is_up(&link.peer))
        });
        reached.count() * 2 < others().count()
    }
}

impl Node {
    /// Gives volumes away while this node is cut off, until it stops.
    pub(super) async fn watch_isolation(self: Rc<Self>) {
        let Some(cluster) = self.cluster.as_ref() else { return };
        let mut alone_since = None;
        while !self.stopping.get() {
            sleep(LOOK_EVERY).await;
            if !cluster.is_alone() || cluster.keys.answers_for().is_none() {
                alone_since = None;
                continue;
            }
            let since = *alone_since.get_or_insert_with(Instant::now);
            if since.elapsed() >= ALONE_FOR {
                self.give_away(cluster).await;
            }
        }
    }

    async fn give_away(&self, cluster: &Cluster) {
        let slots: Vec<Rc<VolumeSlot>> = self.volumes.borrow().values().cloned().collect();
        let stuck = |slot: &&Rc<VolumeSlot>| {
            slot.serving().is_none_or(|head| head.report().stalled_for.is_some())
        };
        let others: Vec<String> = {
            let view = cluster.view.borrow();
            let names = view.alive.iter().map(|(name, ..)| name.to_owned());
            names.filter(|name| *name != self.options.name).collect()
        };
        if others.is_empty() {
            return;
        }
        for slot in slots.iter().filter(stuck) {
            let revision = {
                let view = cluster.view.borrow();
                let place = view.places.get(&slot.id.to_string());
                place.filter(|(p, _)| p.node == self.options.name).map(|(_, revision)| revision)
            };
            let Some(revision) = revision else { continue };
            let any = self.options.env.random_below(others.len() as u64);
            let node = others[usize::try_from(any).expect("below their number")].clone();
            tracing::warn!(
                volume = slot.name(),
                to = node,
                "given away: too few nodes are reached"
            );
            let place = PlaceRecord::on(node);
            let placed = timeout(PATIENCE, self.schema.set_place(slot.id, &place, Some(revision)));
            if !matches!(placed.await, Ok(Ok(_))) {
                return;
            }
        }
    }
}
