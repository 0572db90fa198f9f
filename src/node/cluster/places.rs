//! Which volumes are served here: as the store says.
//!
//! A volume that is placed here is taken over. One that is placed elsewhere is given up: its new head has
//! fenced it, or is about to. One that is to go elsewhere is released first, and only then does its place
//! change, so that the next head need not wait for the lease of this one.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Cluster, Node};
use crate::id::VolumeId;
use crate::meta::members::PlaceRecord;
use crate::meta::record::{VolumeRecord, VolumeState};
use crate::node::volumes::VolumeSlot;
use crate::planted::{Bug, bug};

/// How long it is tried to note that a volume was handed over.
const HAND_OVER_PATIENCE: Duration = Duration::from_secs(30);
/// Pause between two tries.
const HAND_OVER_PAUSE: Duration = Duration::from_millis(100);

/// A volume of the cluster, wherever it is.
pub(in crate::node) struct Placed {
    pub(in crate::node) record: VolumeRecord,
    /// Name of the node that serves it, or is to.
    pub(in crate::node) node: Option<String>,
}

impl Cluster {
    /// All active volumes.
    pub(in crate::node) fn volumes(&self) -> Vec<Placed> {
        let view = self.view.borrow();
        let active = view.volumes.iter().filter(|(_, v, _)| v.state == VolumeState::Active);
        let placed = active.map(|(key, record, _)| Placed {
            record: record.clone(),
            node: view.places.get(key).map(|(place, _)| place.node.clone()),
        });
        placed.collect()
    }

    /// Where a volume is placed.
    pub(in crate::node) fn place(&self, id: VolumeId) -> Option<String> {
        let view = self.view.borrow();
        view.places.get(&id.to_string()).map(|(place, _)| place.node.clone())
    }
}

impl Node {
    /// Where a new volume is to be served: here.
    pub(in crate::node) fn place_here(&self) -> Option<PlaceRecord> {
        self.cluster.as_ref()?;
        Some(PlaceRecord::on(&self.options.name))
    }

    /// Takes over and gives up volumes.
    pub(super) fn reconcile_places(self: &Rc<Self>, cluster: &Cluster) {
        let own: Vec<Rc<VolumeSlot>> = self.volumes.borrow().values().cloned().collect();
        let view = cluster.view.borrow();
        for slot in own {
            let key = slot.id.to_string();
            let Some((record, _)) = view.volumes.get(&key) else { continue };
            if record.state == VolumeState::Deleting {
                self.volumes.borrow_mut().remove(&slot.id);
                if let Some(head) = slot.close() {
                    head.abandon("the volume was deleted");
                }
                continue;
            }
            let Some((place, revision)) = view.places.get(&key) else { continue };
            if place.node != self.options.name {
                tracing::info!(
                    volume = slot.name(),
                    to = place.node,
                    "the volume is elsewhere now"
                );
                self.volumes.borrow_mut().remove(&slot.id);
                if let Some(head) = slot.close() {
                    head.abandon("another node has the volume");
                }
            } else if let Some(next) = &place.next {
                self.begin_hand_over(cluster, &slot, (next.clone(), place.at_client), revision);
            } else {
                self.note_record(&slot, record);
            }
        }
        for (key, record, _) in view.volumes.iter() {
            if record.state == VolumeState::Deleting {
                if view.manager() == Some(self.options.name.as_str())
                    && !self.deleting.borrow().contains_key(&record.id)
                {
                    self.reap(record.clone());
                }
                continue;
            }
            let here = view.places.get(key).is_some_and(|(p, _)| p.node == self.options.name);
            let taken = self.volumes.borrow().contains_key(&record.id);
            if !here || taken || cluster.leaving.borrow().contains(&record.id) {
                continue;
            }
            let pool = self.pools.borrow().get(&record.pool).cloned();
            if let Some(pool) = pool {
                self.adopt(record.clone(), pool);
            } else {
                tracing::error!(volume = record.name, pool = record.pool, "no such pool");
            }
        }
    }

    /// Takes up what another node changed of a volume that is served here.
    fn note_record(&self, slot: &VolumeSlot, record: &VolumeRecord) {
        if *slot.record.borrow() == *record || self.changes.try_lock().is_err() {
            return;
        }
        let size = record.size_bytes;
        if slot.record.replace(record.clone()).size_bytes != size
            && let Some(head) = slot.serving()
        {
            head.resize(size);
        }
    }

    fn begin_hand_over(
        self: &Rc<Self>,
        cluster: &Cluster,
        slot: &Rc<VolumeSlot>,
        next: (String, bool),
        revision: u64,
    ) {
        // Without the store nobody could take it over.
        let possible = cluster.keys.answers_for().is_some() && slot.serving().is_some();
        if possible && cluster.leaving.borrow_mut().insert(slot.id) {
            let (node, slot) = (self.clone(), slot.clone());
            tokio::task::spawn_local(async move { node.hand_over(slot, next, revision).await });
        }
    }

    /// Releases a volume because this node stops, and places it on another one that runs.
    pub(in crate::node) async fn part_with(&self, slot: &VolumeSlot, number: usize) {
        slot.release().await;
        let Some(cluster) = self.cluster.as_ref() else { return };
        let mut others = cluster.eligible();
        others.retain(|node| *node != self.options.name);
        let revision = {
            let view = cluster.view.borrow();
            let place = view.places.get(&slot.id.to_string());
            place.filter(|(p, _)| p.node == self.options.name).map(|(_, revision)| revision)
        };
        let Some(node) = others.get(number % others.len().max(1)).cloned() else { return };
        let Some(revision) = revision else { return };
        let place = PlaceRecord::on(&node);
        match self.schema.set_place(slot.id, &place, Some(revision)).await {
            Ok(true) => tracing::info!(volume = slot.name(), to = node, "placed elsewhere"),
            // The manager places it.
            Ok(false) => {}
            Err(error) => tracing::warn!(volume = slot.name(), %error, "not placed elsewhere"),
        }
    }

    async fn hand_over(
        self: Rc<Self>,
        slot: Rc<VolumeSlot>,
        (next, at_client): (String, bool),
        revision: u64,
    ) {
        let Some(cluster) = self.cluster.as_ref() else { return };
        let started = Instant::now();
        slot.release().await;
        self.volumes.borrow_mut().remove(&slot.id);
        let place = PlaceRecord { node: next.clone(), next: None, at_client };
        loop {
            match self.schema.set_place(slot.id, &place, Some(revision)).await {
                Ok(true) => {
                    let after_ms = started.elapsed().as_millis();
                    tracing::info!(volume = slot.name(), to = next, after_ms, "handed over");
                    break;
                }
                // Somebody else has placed it meanwhile, or this was done by a try with unknown outcome.
                Ok(false) => break,
                Err(error) if started.elapsed() > HAND_OVER_PATIENCE => {
                    tracing::warn!(volume = slot.name(), %error, "not handed over");
                    break;
                }
                Err(_) => sleep(HAND_OVER_PAUSE).await,
            }
        }
        // What the store said may take a moment to be seen here.
        let seen = || cluster.place(slot.id).is_none_or(|node| node != self.options.name);
        for _ in 0..20 {
            if seen() {
                break;
            }
            sleep(HAND_OVER_PAUSE).await;
        }
        if !bug(Bug::LeavesForGood) {
            cluster.leaving.borrow_mut().remove(&slot.id);
        }
    }
}
