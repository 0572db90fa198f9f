//! Brings heads to their clients.
//!
//! A client that comes over the unix socket is on this very machine: a hypervisor with its virtual machine.
//! The head of its volume belongs here too, so that a request goes to the disks and not to another head first.
//! This node says so at the volume's place ([`PlaceRecord::at_client`]), and the head moves as it does by any other
//! order. It stays as long as the client does.
//!
//! # Invariants
//!
//! - A volume that somebody else uses as well is not moved.
//! - What is lost with a wrong move is time: who has a volume is decided by fences.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::{Cluster, Node};
use crate::id::VolumeId;
use crate::meta::members::{MemberState, PlaceRecord};

/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// How long a client has to be there before its head moves.
const SETTLE: Duration = Duration::from_secs(2);
/// How long a client may be away before its head may leave again.
const AWAY: Duration = Duration::from_secs(30);
/// How long the store may take.
const PATIENCE: Duration = Duration::from_secs(2);

/// Clients of this machine.
pub(super) struct LocalClients {
    /// When this node began to count.
    begun: Instant,
    /// How many each volume has, and since when it has any or none.
    volumes: BTreeMap<VolumeId, (u32, Instant)>,
}

impl LocalClients {
    pub(super) fn new() -> Self {
        Self { begun: Instant::now(), volumes: BTreeMap::new() }
    }

    pub(super) fn count(&mut self, volume: VolumeId, more: bool) {
        let (count, since) = self.volumes.entry(volume).or_insert((0, Instant::now()));
        let had = *count > 0;
        *count = if more { *count + 1 } else { count.saturating_sub(1) };
        if (*count > 0) != had {
            *since = Instant::now();
        }
    }

    /// Whether a volume has had clients for a while, or none.
    fn settled(&self, volume: VolumeId) -> Option<bool> {
        match self.volumes.get(&volume) {
            // Who was there before a restart of this node is waited for.
            None => (self.begun.elapsed() >= AWAY).then_some(false),
            Some((0, since)) => (since.elapsed() >= AWAY).then_some(false),
            Some((_, since)) => (since.elapsed() >= SETTLE).then_some(true),
        }
    }

    fn forget(&mut self) {
        self.volumes.retain(|_, (count, since)| *count > 0 || since.elapsed() < AWAY);
    }
}

impl Cluster {
    /// Places that are to change, with what they become: volumes with clients of this machine come here, those
    /// without are like others again.
    fn wishes(&self) -> Vec<(VolumeId, PlaceRecord, u64)> {
        let view = self.view.borrow();
        let local = self.local.borrow();
        let own = self.own.name.as_str();
        let member = view.members.get(own).map(|(member, _)| member.state);
        let open = member == Some(MemberState::Active);
        let wish = |(volume, (place, revision)): (VolumeId, (&PlaceRecord, u64))| {
            if place.next.is_some() {
                return None;
            }
            let here = place.node == own;
            let place = match local.settled(volume)? && open {
                true if here && place.at_client => return None,
                true if here => PlaceRecord { at_client: true, ..place.clone() },
                true => {
                    PlaceRecord { next: Some(own.to_owned()), at_client: true, ..place.clone() }
                }
                false if here && place.at_client => PlaceRecord::on(own),
                false => return None,
            };
            Some((volume, place, revision))
        };
        let volumes = view.volumes.iter().map(|(key, record, _)| (key, record.id));
        volumes.filter_map(|(key, id)| wish((id, view.places.get(key)?))).collect()
    }
}

impl Node {
    /// Has heads come to clients of this machine, and lets them go, until this node stops.
    pub(super) async fn attract_heads(self: Rc<Self>) {
        let Some(cluster) = self.cluster.as_ref() else { return };
        while !self.stopping.get() {
            sleep(LOOK_EVERY).await;
            cluster.local.borrow_mut().forget();
            if cluster.keys.answers_for().is_none() {
                continue;
            }
            for (volume, place, revision) in cluster.wishes() {
                let comes = place.next.is_some();
                if comes && self.attached_elsewhere(volume).await > self.attached_here(volume) {
                    continue;
                }
                let set = self.schema.set_place(volume, &place, Some(revision));
                match timeout(PATIENCE, set).await {
                    Ok(Ok(true)) if comes => {
                        tracing::info!(%volume, from = place.node, "the volume is to come to its client");
                    }
                    // Somebody else placed it meanwhile: it is looked at again.
                    Ok(Ok(_)) => {}
                    Ok(Err(error)) => tracing::debug!(%volume, %error, "the place stays"),
                    Err(_) => break,
                }
            }
        }
    }
}
