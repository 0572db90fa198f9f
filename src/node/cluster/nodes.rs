//! The nodes of the cluster, as operators see them and order them about.

use std::rc::Rc;
use std::time::Duration;

use tokio::time::sleep;

use super::{Cluster, Node, far};
use crate::admin::error::ApiError;
use crate::admin::nodes::{Node as Shown, NodeState};
use crate::admin::types::{DiskState, Removed};
use crate::meta::members::{MemberRecord, MemberState};
use crate::meta::record::{DiskRecord, DiskState as Kept};
use crate::node::parts::Views;
use crate::node::volumes::api_error;

/// How long an order is waited for to be seen here.
const SEEN_PATIENCE: Duration = Duration::from_secs(2);
/// Pause between two looks.
const SEEN_POLL: Duration = Duration::from_millis(20);

fn count(number: usize) -> u32 {
    u32::try_from(number).unwrap_or(u32::MAX)
}

impl Cluster {
    fn show(&self, name: &str, member: &MemberRecord, views: &Views) -> Shown {
        let view = self.view.borrow();
        let alive = view.alive.get(name).map(|(alive, _)| alive);
        let own = name == self.own.name;
        let answers = own || self.links.borrow().get(name).is_some_and(|l| far::is_up(&l.peer));
        let (state, state_reason) = match (alive.is_some(), answers) {
            (true, true) if member.state == MemberState::Draining => (NodeState::Draining, None),
            (true, true) => (NodeState::Up, None),
            (true, false) => (
                NodeState::Suspect,
                Some(format!("it does not answer {}, but has a lease", self.own.name)),
            ),
            (false, true) => (
                NodeState::Suspect,
                Some("it answers, but has no lease: is its store away?".into()),
            ),
            (false, false) => (NodeState::Down, None),
        };
        let disks = || views.disks.iter().filter(|disk| disk.node == name);
        let text = |pick: fn(&crate::meta::members::AliveRecord) -> &str| {
            alive.map_or_else(String::new, |alive| pick(alive).to_owned())
        };
        Shown {
            id: member.id,
            name: name.to_owned(),
            state,
            state_reason,
            manager: view.manager() == Some(name),
            host: member.host.clone(),
            rack: member.rack.clone(),
            address: text(|alive| &alive.address),
            admin: text(|alive| &alive.admin),
            version: text(|alive| &alive.version),
            disks: count(disks().count()),
            disks_online: count(disks().filter(|disk| disk.state.is_online()).count()),
            volumes: count(views.volumes.iter().filter(|volume| volume.node == name).count()),
        }
    }
}

impl Node {
    /// All nodes.
    pub(in crate::node) async fn list_nodes(&self) -> Vec<Shown> {
        let views = self.gather().await;
        let Some(cluster) = self.cluster.as_ref() else { return Vec::new() };
        let members: Vec<(String, MemberRecord)> = {
            let view = cluster.view.borrow();
            view.members.iter().map(|(name, member, _)| (name.to_owned(), member.clone())).collect()
        };
        members.iter().map(|(name, member)| cluster.show(name, member, &views)).collect()
    }

    /// One node.
    pub(in crate::node) async fn show_node(&self, name: &str) -> Result<Shown, ApiError> {
        let nodes = self.list_nodes().await;
        nodes.into_iter().find(|node| node.name == name).ok_or_else(|| self.no_such_node(name))
    }

    fn no_such_node(&self, name: &str) -> ApiError {
        let error = ApiError::not_found(format!("no such node: {name}"));
        match self.cluster {
            Some(_) => error.with_hint("`sdsctl node ls` lists them"),
            None => error.with_hint("this node is alone: it has no [cluster] in its configuration"),
        }
    }

    /// Has heads and shards leave a node, or uses it again.
    pub(in crate::node) async fn drain_node(
        self: &Rc<Self>,
        name: &str,
        drain: bool,
    ) -> Result<Shown, ApiError> {
        let Some(cluster) = self.cluster.as_ref() else { return Err(self.no_such_node(name)) };
        let _lock = self.changes.lock().await;
        let others = cluster.eligible().iter().any(|node| node != name);
        if drain && !others {
            return Err(ApiError::conflict(format!(
                "there is no other node that could serve the volumes of {name}"
            )));
        }
        let state = if drain { MemberState::Draining } else { MemberState::Active };
        for record in self.schema.drain_member(name, drain).await.map_err(api_error)? {
            let id = record.id;
            if let Some(slot) = self.disks.borrow().get(&id) {
                slot.record.replace(record);
            }
            self.take_up(id);
        }
        let seen = || {
            let view = cluster.view.borrow();
            view.members.get(name).is_some_and(|(member, _)| member.state == state)
        };
        for _ in 0..SEEN_PATIENCE.as_millis() / SEEN_POLL.as_millis() {
            if seen() {
                break;
            }
            sleep(SEEN_POLL).await;
        }
        self.mirror_catalog().await;
        self.show_node(name).await
    }

    fn disks_of(cluster: &Cluster, name: &str) -> Vec<DiskRecord> {
        let view = cluster.view.borrow();
        let own = view.disks.iter().filter(|(_, disk, _)| disk.node == name);
        own.map(|(_, disk, _)| disk.clone()).filter(|disk| disk.state != Kept::Removed).collect()
    }

    /// Does what the store says of a disk of this node, if that was said by another node.
    pub(super) fn take_up(self: &Rc<Self>, id: crate::id::DiskId) {
        let slot = self.disks.borrow().get(&id).cloned();
        let Some(slot) = slot.filter(|slot| slot.is_online()) else { return };
        let wanted = slot.record.borrow().state;
        match (wanted, slot.state.get()) {
            (Kept::Draining, DiskState::Online | DiskState::Slow) => {
                self.begin_draining(&slot);
                self.tell_lost(id);
            }
            (Kept::Online, DiskState::Draining) => {
                slot.state.set(DiskState::Online);
                slot.reason.borrow_mut().take();
                self.registry.set_draining(id, false);
                self.tell_returned(id);
            }
            _ => {}
        }
    }

    /// Takes up what other nodes ordered of this node's disks.
    pub(super) fn know_own_disks(self: &Rc<Self>, cluster: &Cluster) {
        for record in Self::disks_of(cluster, &self.options.name) {
            let slot = self.disks.borrow().get(&record.id).cloned();
            // Who changes something now knows better.
            let Some(slot) = slot.filter(|_| self.changes.try_lock().is_ok()) else { continue };
            if *slot.record.borrow() != record {
                slot.record.replace(record.clone());
                self.take_up(record.id);
            }
        }
    }

    /// Removes a node for good, with its disks, that was drained, holds nothing any more and does not run.
    pub(in crate::node) async fn remove_node(&self, name: &str) -> Result<Removed, ApiError> {
        let Some(cluster) = self.cluster.as_ref() else { return Err(self.no_such_node(name)) };
        let _lock = self.changes.lock().await;
        let disks = Self::disks_of(cluster, name);
        for disk in &disks {
            self.check_empty(disk).await?;
        }
        if !disks.is_empty() && cluster.view.borrow().alive.get(name).is_some() {
            return Err(ApiError::conflict(format!("node '{name}' runs: stop its sdsd first")));
        }
        for disk in &disks {
            self.update_disk(disk.id, |record| record.state = Kept::Removed).await?;
        }
        self.schema.remove_member(name).await.map_err(|error| match error {
            crate::meta::schema::SchemaError::Invalid(why) => ApiError::conflict(why),
            other => api_error(other),
        })?;
        self.mirror_catalog().await;
        Ok(Removed { kind: "node".into(), name: name.to_owned() })
    }

    /// Refuses to remove a node while a volume needs one of its disks, or could begin to.
    async fn check_empty(&self, disk: &DiskRecord) -> Result<(), ApiError> {
        let DiskRecord { node, path, .. } = disk;
        if disk.state != Kept::Draining {
            return Err(ApiError::conflict(format!("disk {path} of node {node} is in use"))
                .with_hint(format!("`sdsctl node drain {node}` empties it")));
        }
        let users = self.users_everywhere(disk.id).await?;
        if users.is_empty() {
            return Ok(());
        }
        Err(ApiError::conflict(format!(
            "disk {path} of node {node} still has data of {}, which is being rebuilt elsewhere",
            users.join(", ")
        ))
        .with_hint("`sdsctl status` tells how far that is"))
    }
}
