//! A node among others: who else there is, their disks, and which volumes are served here.
//!
//! ```text
//!  store ══► Follower ──► reconcile ──► far disks ──► registry ──► heads
//!  (etcd)                     │                                      ▲
//!                             ├──► places: volumes to take over or to hand over
//!                             └──► manager (one node): places for volumes without a living node
//! ```
//!
//! - `far.rs`: disks of other nodes, behind one connection per node;
//! - `places.rs`: takes over what is placed here, gives up what is placed elsewhere;
//! - `lease.rs`: says that this node runs; `manager.rs`: places the volumes of nodes that do not;
//!   `isolation.rs`: gives up what a node cannot serve that reaches too few others;
//! - `heads.rs`: volumes for clients, wherever they are served; `attract.rs`: brings them to clients of this machine; `nodes.rs`: orders of operators;
//!   `process.rs`: sockets.
//!
//! # Invariants
//!
//! - What the store says of places is advice. Two nodes that both believe to have a volume fence
//!   each other; the newer epoch wins, and nothing acknowledged is lost.
//! - While the store is away everything stays as it is: heads serve on, disks are used, nobody is
//!   judged. What was known is not forgotten, and nobody is judged dead before the store has answered for
//!   longer than a lease.
//! - A disk of another node is used only while the connection to its node is up and the disk itself said
//!   who it is.

mod attract;
mod far;
mod heads;
mod isolation;
mod lease;
mod manager;
mod nodes;
mod places;
pub(super) mod process;
#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeMap, BTreeSet};
use std::rc::Rc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout};

use super::relay::NodeQuestions;
use super::{Node, NodeError};
use crate::admin::types::HealthLevel;
use crate::id::{ClusterId, DiskId, NodeId, VolumeId};
use crate::meta::follow::Follower;
use crate::meta::members::{
    ALIVE_PREFIX, AliveRecord, MANAGER_KEY, MEMBER_PREFIX, ManagerRecord, MemberRecord,
    MemberState, PLACE_PREFIX, PlaceRecord,
};
use crate::meta::record::{self, DiskRecord, PoolRecord, Record, VolumeRecord};
use crate::meta::schema::{DISK_PREFIX, POOL_PREFIX, VOLUME_PREFIX};
use crate::meta::{LeaseId, Versioned};
use crate::rpc::{Directories, DiskDirectory, Identity, Peer};
use crate::shard::ShardClient;
use crate::shard::domain::Domains;

use attract::LocalClients;
pub(super) use far::FarDisk;
pub use heads::NodeVolumes;

/// How long the first look at the store may take.
const START_PATIENCE: Duration = Duration::from_secs(30);
/// Pause between two looks whether it is done.
const START_POLL: Duration = Duration::from_millis(20);
/// Longest time between two looks at what is to be done.
const LOOK_EVERY: Duration = Duration::from_secs(1);
/// The keys that are followed.
const FOLLOWED: [&str; 7] = [
    MEMBER_PREFIX,
    ALIVE_PREFIX,
    PLACE_PREFIX,
    MANAGER_KEY,
    DISK_PREFIX,
    POOL_PREFIX,
    VOLUME_PREFIX,
];

/// Makes connections to other nodes.
pub trait Wire {
    /// A connection to the node `target` at `address` (`host:port`), kept until it is dropped; `label`
    /// names it in logs.
    fn connect(&self, own: Identity, target: NodeId, label: &str, address: &str) -> Peer;
}

/// What makes a node one of a cluster.
pub struct ClusterOptions {
    /// The node.
    pub id: NodeId,
    /// Name of its host, for people.
    pub host: String,
    /// Name of its rack.
    pub rack: String,
    /// `host:port` at which other nodes reach its RPC.
    pub address: String,
    /// `host:port` of its admin API.
    pub admin: String,
    /// Where it serves NBD: around the name of an export, the text before and after it.
    pub exports: Vec<(String, String)>,
    /// Makes connections.
    pub wire: Rc<dyn Wire>,
    /// How long after its last sign of life a node counts as gone, as far as the store knows.
    pub lease: Duration,
    /// How long a node may be away before what is on its disks is rebuilt elsewhere.
    pub out_after: Duration,
}

/// Another node's connection.
struct Link {
    id: NodeId,
    instance: u64,
    address: String,
    peer: Peer,
}

/// A record as it was read from a key, kept as long as the key does not change.
struct Read<R> {
    revision: u64,
    record: Option<R>,
}

/// The records under a prefix.
struct Records<R> {
    prefix: &'static str,
    known: BTreeMap<String, Read<R>>,
}

impl<R: Record> Records<R> {
    const fn new(prefix: &'static str) -> Self {
        Self { prefix, known: BTreeMap::new() }
    }

    /// Reads what changed. A record that cannot be read is as if it were not there, and said once.
    fn update(&mut self, keys: &Follower) {
        let mut seen = BTreeSet::new();
        keys.each(self.prefix, |name, found: &Versioned| {
            seen.insert(name.to_owned());
            if self.known.get(name).is_some_and(|read| read.revision == found.revision) {
                return;
            }
            let record = record::decode::<R>(&found.value);
            if let Err(error) = &record {
                tracing::error!(key = format!("{}{name}", self.prefix), %error, "unreadable key");
            }
            let read = Read { revision: found.revision, record: record.ok() };
            self.known.insert(name.to_owned(), read);
        });
        self.known.retain(|name, _| seen.contains(name));
    }

    fn iter(&self) -> impl Iterator<Item = (&str, &R, u64)> {
        let known = self.known.iter();
        known.filter_map(|(name, read)| Some((name.as_str(), read.record.as_ref()?, read.revision)))
    }

    fn get(&self, name: &str) -> Option<(&R, u64)> {
        let read = self.known.get(name)?;
        Some((read.record.as_ref()?, read.revision))
    }
}

fn hash(name: &str) -> u32 {
    crc32fast::hash(name.as_bytes())
}

/// The failure domains of a disk of a node.
pub(super) fn domains(record: &DiskRecord, member: Option<&MemberRecord>) -> Domains {
    Domains {
        disk: record.domain,
        node: member.map_or_else(|| hash(&record.node), MemberRecord::node_domain),
        rack: member.map_or_else(|| hash("default"), MemberRecord::rack_domain),
    }
}

/// What is known of the cluster.
struct View {
    members: Records<MemberRecord>,
    alive: Records<AliveRecord>,
    places: Records<PlaceRecord>,
    manager: Records<ManagerRecord>,
    disks: Records<DiskRecord>,
    pools: Records<PoolRecord>,
    volumes: Records<VolumeRecord>,
}

impl View {
    const fn new() -> Self {
        Self {
            members: Records::new(MEMBER_PREFIX),
            alive: Records::new(ALIVE_PREFIX),
            places: Records::new(PLACE_PREFIX),
            manager: Records::new(MANAGER_KEY),
            disks: Records::new(DISK_PREFIX),
            pools: Records::new(POOL_PREFIX),
            volumes: Records::new(VOLUME_PREFIX),
        }
    }

    fn update(&mut self, keys: &Follower) {
        self.members.update(keys);
        self.alive.update(keys);
        self.places.update(keys);
        self.manager.update(keys);
        self.disks.update(keys);
        self.pools.update(keys);
        self.volumes.update(keys);
    }

    /// Name of the manager.
    fn manager(&self) -> Option<&str> {
        self.manager.get("").map(|(record, _)| record.node.as_str())
    }
}

/// The cluster as one of its nodes sees it.
pub(super) struct Cluster {
    options: ClusterOptions,
    own: Identity,
    lease: Cell<Option<LeaseId>>,
    keys: Rc<Follower>,
    view: RefCell<View>,
    links: RefCell<BTreeMap<String, Link>>,
    far: RefCell<BTreeMap<DiskId, Rc<FarDisk>>>,
    /// Volumes that are being handed over.
    leaving: RefCell<BTreeSet<VolumeId>>,
    /// When this node may judge others at the earliest.
    judges_from: Cell<Instant>,
    /// Clients of this node that are attached to volumes, wherever these are served.
    attached: RefCell<BTreeMap<VolumeId, u32>>,
    /// Those of them that are on this machine.
    local: RefCell<LocalClients>,
    /// Places that were ordered and may not be seen yet: instead of which revision, and when.
    ordered: RefCell<BTreeMap<VolumeId, (Option<u64>, Instant)>>,
}

impl Cluster {
    /// Makes the node one of the cluster, and follows what the store says.
    pub(super) async fn join(
        options: ClusterOptions,
        schema: &crate::meta::schema::Schema,
        cluster: ClusterId,
        name: &str,
        unix_seconds: u64,
    ) -> Result<Self, NodeError> {
        let member = MemberRecord {
            id: options.id,
            name: name.to_owned(),
            host: options.host.clone(),
            rack: options.rack.clone(),
            state: MemberState::Active,
            joined_at_unix_s: unix_seconds,
        };
        schema.join(&member).await?;
        let own = Identity { cluster, node: options.id, name: name.to_owned(), core: 0 };
        let keys = Follower::follow(schema.store(), &FOLLOWED);
        let complete = async {
            while !keys.is_complete() {
                sleep(START_POLL).await;
            }
        };
        if timeout(START_PATIENCE, complete).await.is_err() {
            return Err(NodeError::Meta(crate::meta::MetaError::Unavailable(
                "its keys cannot be listed".into(),
            )));
        }
        let mut view = View::new();
        view.update(&keys);
        Ok(Self {
            judges_from: Cell::new(Instant::now() + options.lease * 2),
            options,
            own,
            lease: Cell::default(),
            keys,
            view: RefCell::new(view),
            links: RefCell::default(),
            far: RefCell::default(),
            leaving: RefCell::default(),
            attached: RefCell::default(),
            local: RefCell::new(LocalClients::new()),
            ordered: RefCell::default(),
        })
    }

    /// The failure domains of a disk. Of a node that is not known they are guessed from its name, which
    /// keeps shards apart all the same.
    pub(super) fn domains_of(&self, record: &DiskRecord) -> Domains {
        let view = self.view.borrow();
        domains(record, view.members.get(&record.node).map(|(member, _)| member))
    }

    /// What is wrong with the metadata store, as far as this node sees.
    pub(super) fn store_trouble(&self) -> Option<(HealthLevel, String)> {
        if let Some(why) = self.keys.replaced() {
            let why = format!(
                "it was replaced ({why}) and is not believed: volumes are served without it; do not stop \
                 nodes before you have read \"When etcd is lost\" in docs/cluster.md"
            );
            return Some((HealthLevel::Critical, why));
        }
        let away = "it does not answer: volumes are served, what needs it waits";
        self.keys.answers_for().is_none().then(|| (HealthLevel::Warning, away.to_owned()))
    }

    /// All disks of other nodes.
    pub(super) fn far(&self) -> Vec<Rc<FarDisk>> {
        self.far.borrow().values().cloned().collect()
    }

    /// The connection to a node.
    pub(super) fn peer(&self, node: &str) -> Option<Peer> {
        self.links.borrow().get(node).map(|link| link.peer.clone())
    }

    /// The connections to all nodes.
    pub(super) fn peers(&self) -> Vec<Peer> {
        self.links.borrow().values().map(|link| link.peer.clone()).collect()
    }

    /// The nodes that answer, and the ways to them.
    pub(super) fn others(&self) -> Vec<(String, Peer)> {
        let links = self.links.borrow();
        let up = links.iter().filter(|(_, link)| far::is_up(&link.peer));
        up.map(|(name, link)| (name.clone(), link.peer.clone())).collect()
    }

    /// Opens connections to nodes that are new or moved. Those of nodes that are gone stay, because a
    /// node without a lease may well work.
    fn connect(&self) {
        let view = self.view.borrow();
        let mut links = self.links.borrow_mut();
        links.retain(|name, link| view.members.get(name).is_some_and(|(m, _)| m.id == link.id));
        for (name, alive, _) in view.alive.iter().filter(|(name, ..)| *name != self.own.name) {
            let known = links.get(name);
            let same = |link: &Link| {
                (link.id, link.instance, &link.address)
                    == (alive.id, alive.instance, &alive.address)
            };
            if known.is_some_and(same) {
                continue;
            }
            let peer = self.options.wire.connect(self.own.clone(), alive.id, name, &alive.address);
            let (id, instance, address) = (alive.id, alive.instance, alive.address.clone());
            let old = links.insert(name.to_owned(), Link { id, instance, address, peer });
            if let Some(old) = old {
                // A create that it still has must not arrive after the delete that the new one sends.
                old.peer.close();
            }
        }
    }

    /// Whether a node is to be counted on: it answers here, or has a lease and did not die for all that is known here. Who is
    /// wrong about that costs a move: whoever takes a volume over fences the head that may live.
    fn is_up(&self, node: &str) -> bool {
        if node == self.own.name {
            return true;
        }
        let links = self.links.borrow();
        match links.get(node) {
            Some(link) if far::is_up(&link.peer) => true,
            Some(link) if link.peer.is_refused() => false,
            _ => self.view.borrow().alive.get(node).is_some(),
        }
    }
}

impl Node {
    /// Begins to live among others.
    pub(super) fn start_cluster(self: &Rc<Self>) {
        let Some(cluster) = self.cluster.as_ref() else { return };
        cluster.connect();
        self.know_far_disks(cluster);
        tokio::task::spawn_local(self.clone().keep_lease());
        tokio::task::spawn_local(self.clone().attend_far_disks());
        tokio::task::spawn_local(self.clone().reconcile());
        tokio::task::spawn_local(self.clone().manage());
        tokio::task::spawn_local(self.clone().watch_isolation());
        tokio::task::spawn_local(self.clone().attract_heads());
    }

    /// Does what the store says, whenever that changes.
    async fn reconcile(self: Rc<Self>) {
        let Some(cluster) = self.cluster.as_ref() else { return };
        while !self.stopping.get() {
            let changed = cluster.keys.changed.notified();
            cluster.view.borrow_mut().update(&cluster.keys);
            cluster.connect();
            self.know_far_disks(cluster);
            self.know_own_disks(cluster);
            self.know_pools(cluster);
            self.reconcile_places(cluster);
            drop(timeout(LOOK_EVERY, changed).await);
        }
    }

    /// Whether a node is one of the cluster.
    fn is_member(&self, id: NodeId) -> bool {
        let Some(cluster) = self.cluster.as_ref() else { return false };
        let view = cluster.view.borrow();
        view.members.iter().any(|(_, member, _)| member.id == id)
    }

    /// The disks of other nodes.
    pub(super) fn far_disks(&self) -> Vec<Rc<FarDisk>> {
        self.cluster.as_ref().map(Cluster::far).unwrap_or_default()
    }

    fn know_pools(&self, cluster: &Cluster) {
        let view = cluster.view.borrow();
        // Who changes them right now knows better.
        if self.changes.try_lock().is_err() {
            return;
        }
        let pools = view.pools.iter().map(|(name, pool, _)| (name.to_owned(), pool.clone()));
        *self.pools.borrow_mut() = pools.collect();
    }
}

/// What a node serves to the others.
pub fn directories(node: &Rc<Node>) -> Directories {
    Directories {
        disks: Rc::new(NodeDisks(node.clone())),
        volumes: Rc::new(NodeVolumes(node.clone())),
        questions: Rc::new(NodeQuestions(node.clone())),
    }
}

/// The disks of a node, for other nodes.
pub struct NodeDisks(pub Rc<Node>);

impl DiskDirectory for NodeDisks {
    fn disk(&self, id: DiskId) -> Option<Rc<dyn ShardClient>> {
        let slot = self.0.disks.borrow().get(&id).cloned()?;
        let client = slot.local()?;
        Some(client as Rc<dyn ShardClient>)
    }
}
