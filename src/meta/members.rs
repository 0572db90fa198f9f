//! What a cluster's nodes say of themselves in the store, and where heads are to be.
//!
//! | key | record | lives |
//! | --- | --- | --- |
//! | `/sds/member/<name>` | [`MemberRecord`] | from the node's first start until it is removed |
//! | `/sds/alive/<name>` | [`AliveRecord`] | as long as the node keeps its lease |
//! | `/sds/manager` | [`ManagerRecord`] | as long as that node keeps its lease |
//! | `/sds/place/<volume id>` | [`PlaceRecord`] | as long as the volume |
//!
//! # Invariants
//!
//! - A name belongs to one node id for ever, or until an operator removes the node.
//! - All of this is advice: who has a volume is decided by its root and its fences alone. A node that is
//!   wrongly thought dead loses heads, never data.

use serde::{Deserialize, Serialize};

use super::envelope::Kind;
use super::record::{self, DiskRecord, DiskState, Record, check_name};
use super::schema::{NODE_KEY, Schema, SchemaError, SchemaResult, Stored, TRIES_MAX, disk_key};
use super::{Condition, LeaseId, Txn};
use crate::id::{NodeId, VolumeId};

/// Prefix of the keys of nodes.
pub const MEMBER_PREFIX: &str = "/sds/member/";
/// Prefix of the keys of nodes that run.
pub const ALIVE_PREFIX: &str = "/sds/alive/";
/// Prefix of the keys that say where heads are to be.
pub const PLACE_PREFIX: &str = "/sds/place/";
/// Key of the [`ManagerRecord`].
pub const MANAGER_KEY: &str = "/sds/manager";
/// Longest address, bytes.
const ADDRESS_BYTES_MAX: usize = 256;

/// Key of a node.
pub fn member_key(name: &str) -> String {
    format!("{MEMBER_PREFIX}{name}")
}
/// Key of a node that runs.
pub fn alive_key(name: &str) -> String {
    format!("{ALIVE_PREFIX}{name}")
}
/// Key of where a volume's head is to be.
pub fn place_key(id: VolumeId) -> String {
    format!("{PLACE_PREFIX}{id}")
}

/// What an operator wants of a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MemberState {
    /// It serves heads and its disks take shards.
    Active,
    /// Heads and shards leave it.
    Draining,
}

/// A node of the cluster.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemberRecord {
    /// The node.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Name of its host, for people.
    pub host: String,
    /// Name of its rack.
    pub rack: String,
    /// What an operator wants of it.
    pub state: MemberState,
    /// When it joined: seconds since 1970, for people only.
    pub joined_at_unix_s: u64,
}

impl MemberRecord {
    /// The number of the failure domain that the node is. Two nodes share one by accident so rarely
    /// that it does no harm: they then never hold two shards of one segment.
    pub fn node_domain(&self) -> u32 {
        fold(&self.id.to_bytes())
    }

    /// The number of the failure domain that its rack is.
    pub fn rack_domain(&self) -> u32 {
        crc32fast::hash(self.rack.as_bytes())
    }
}

/// A number of 32 bits for 16 random bytes.
pub fn fold(id: &[u8; 16]) -> u32 {
    crc32fast::hash(id)
}

impl Record for MemberRecord {
    const KIND: Kind = Kind::Member;
    const VERSION: u16 = 1;
    fn validate(&self) -> Result<(), String> {
        check_name("node", &self.name)?;
        check_name("rack", &self.rack)?;
        if self.id.is_nil() {
            return Err("the node's id is nil".into());
        }
        Ok(())
    }
}

/// A node that runs, and where it is reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AliveRecord {
    /// The node.
    pub id: NodeId,
    /// Random number of this run.
    pub instance: u64,
    /// `host:port` of its RPC.
    pub address: String,
    /// `host:port` of its admin API.
    pub admin: String,
    /// Where it serves NBD: around the name of an export, the text before and after it.
    pub exports: Vec<(String, String)>,
    /// Its version, for people.
    pub version: String,
}

impl Record for AliveRecord {
    const KIND: Kind = Kind::Alive;
    const VERSION: u16 = 1;
    fn validate(&self) -> Result<(), String> {
        if self.id.is_nil() {
            return Err("the node's id is nil".into());
        }
        if self.address.is_empty() || self.address.len() > ADDRESS_BYTES_MAX {
            return Err(format!("an address of {} bytes", self.address.len()));
        }
        Ok(())
    }
}

/// The node that does what needs a single actor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManagerRecord {
    /// Its name.
    pub node: String,
}

impl Record for ManagerRecord {
    const KIND: Kind = Kind::Manager;
    const VERSION: u16 = 1;
    fn validate(&self) -> Result<(), String> {
        check_name("node", &self.node)
    }
}

/// Where the head of a volume is to be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlaceRecord {
    /// Name of the node that serves it, or is to take it over.
    pub node: String,
    /// Where it is to go: `node` releases the volume and then makes this `node`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub next: Option<String>,
    /// Whether it is there, or is to go there, because the volume's client is on that machine. Such a place is not
    /// changed for balance.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub at_client: bool,
}

impl PlaceRecord {
    /// A place on a node, to stay.
    pub fn on(node: impl Into<String>) -> Self {
        Self { node: node.into(), next: None, at_client: false }
    }
}

impl Record for PlaceRecord {
    const KIND: Kind = Kind::Place;
    const VERSION: u16 = 1;
    fn validate(&self) -> Result<(), String> {
        check_name("node", &self.node)?;
        self.next.as_ref().map_or(Ok(()), |next| check_name("node", next))
    }
}

fn encode<R: Record>(record: &R) -> SchemaResult<Vec<u8>> {
    record::encode(record).map_err(|error| SchemaError::Invalid(error.to_string()))
}

impl Schema {
    /// Makes the node one of the cluster, or finds it there; its host and rack are brought up to
    /// date.
    ///
    /// # Errors
    /// [`SchemaError::Invalid`] if the name is another node's, or the store belongs to a node that
    /// shares it with nobody; [`SchemaError::Busy`], [`SchemaError::Store`], [`SchemaError::Record`].
    pub async fn join(&self, member: &MemberRecord) -> SchemaResult<MemberRecord> {
        let key = member_key(&member.name);
        let alone = self.store().get(NODE_KEY).await?;
        if let Some(alone) = &alone {
            let node: record::NodeRecord = record::decode(&alone.value)
                .map_err(|source| SchemaError::Record { key: NODE_KEY.into(), source })?;
            if node.id != member.id {
                return Err(SchemaError::Invalid(format!(
                    "the store belongs to the node on host {:?} ({}), which is not in a cluster: \
                     give that one an address in [cluster] and start it first",
                    node.host, node.id
                )));
            }
        }
        let found = self.store().get(&key).await?;
        let (condition, record) = match &found {
            None => (Condition::KeyMissing(key.clone()), member.clone()),
            Some(found) => {
                let old: MemberRecord = record::decode(&found.value)
                    .map_err(|source| SchemaError::Record { key: key.clone(), source })?;
                if old.id != member.id {
                    return Err(SchemaError::Invalid(format!(
                        "the name '{}' is that of node {} on host {:?}: this node needs another \
                         one, or that one is removed with `sdsctl node rm`",
                        member.name, old.id, old.host
                    )));
                }
                let (state, joined_at_unix_s) = (old.state, old.joined_at_unix_s);
                let record = MemberRecord { state, joined_at_unix_s, ..member.clone() };
                // A node that starts again and again leaves no trace in a store that it does not trust yet.
                if record == old && alone.is_none() {
                    return Ok(record);
                }
                (Condition::KeyAt(key.clone(), found.revision), record)
            }
        };
        let txn = Txn::new().when(condition).put(key, encode(&record)?).delete(NODE_KEY);
        match self.store().txn(txn).await?.committed() {
            Some(_) => Ok(record),
            None => Err(SchemaError::Busy(format!("node '{}'", member.name))),
        }
    }

    /// Says that the node runs, as long as `lease` is kept.
    ///
    /// A try whose outcome is unknown may be made late, after the next one. It must not bind the key to its own
    /// lease, which nobody renews; so each try changes what it has seen, or nothing.
    ///
    /// # Errors
    /// [`SchemaError::Store`], [`SchemaError::NotFound`] if the node was removed, [`SchemaError::Busy`] if a try
    /// made before was done meanwhile.
    pub async fn set_alive(
        &self,
        name: &str,
        alive: &AliveRecord,
        lease: LeaseId,
    ) -> SchemaResult<()> {
        let key = alive_key(name);
        let unchanged = match self.store().get(&key).await? {
            Some(seen) => Condition::KeyAt(key.clone(), seen.revision),
            None => Condition::KeyMissing(key.clone()),
        };
        let txn = Txn::new()
            .when(Condition::KeyExists(member_key(name)))
            .when(unchanged)
            .put_leased(key, encode(alive)?, lease);
        if self.store().txn(txn).await?.committed().is_some() {
            return Ok(());
        }
        let node = format!("node '{name}'");
        match self.store().get(&member_key(name)).await? {
            Some(_) => Err(SchemaError::Busy(node)),
            None => Err(SchemaError::NotFound(node)),
        }
    }

    /// Makes the node the manager, as long as `lease` is kept, if there is none; whether it is.
    ///
    /// # Errors
    /// [`SchemaError::Store`].
    pub async fn stand_for_manager(&self, name: &str, lease: LeaseId) -> SchemaResult<bool> {
        let record = encode(&ManagerRecord { node: name.to_owned() })?;
        let txn = Txn::new().when(Condition::KeyMissing(MANAGER_KEY.into())).put_leased(
            MANAGER_KEY,
            record,
            lease,
        );
        Ok(self.store().txn(txn).await?.committed().is_some())
    }

    /// Says where the head of an active volume is to be, if nobody said otherwise since `revision`
    /// (none: nobody ever did); whether it was so.
    ///
    /// # Errors
    /// [`SchemaError::Store`], [`SchemaError::Invalid`].
    pub async fn set_place(
        &self,
        id: VolumeId,
        place: &PlaceRecord,
        revision: Option<u64>,
    ) -> SchemaResult<bool> {
        let key = place_key(id);
        let condition = match revision {
            Some(revision) => Condition::KeyAt(key.clone(), revision),
            None => Condition::KeyMissing(key.clone()),
        };
        // A volume that was deleted has no root, and leaves no place behind.
        let txn = Txn::new()
            .when(condition)
            .when(Condition::KeyExists(super::schema::root_key(id)))
            .put(key, encode(place)?);
        Ok(self.store().txn(txn).await?.committed().is_some())
    }

    /// Has a node be drained, with its disks that are in use, or has it and them be used again: at once, so that of two
    /// orders one comes after the other. The disks that changed.
    ///
    /// # Errors
    /// [`SchemaError::NotFound`], [`SchemaError::Store`].
    pub async fn drain_member(&self, name: &str, drain: bool) -> SchemaResult<Vec<DiskRecord>> {
        check_name("node", name).map_err(SchemaError::Invalid)?;
        let (state, from, to) = if drain {
            (MemberState::Draining, DiskState::Online, DiskState::Draining)
        } else {
            (MemberState::Active, DiskState::Draining, DiskState::Online)
        };
        let missing = || SchemaError::NotFound(format!("node '{name}'"));
        for _ in 0..TRIES_MAX {
            let key = member_key(name);
            let member: Stored<MemberRecord> = self.read(&key).await?.ok_or_else(missing)?;
            let mut disks = self.disks().await?;
            disks.retain(|disk| {
                let disk = &disk.record;
                disk.node == name && disk.state == from && !disk.removing
            });
            let record = MemberRecord { state, ..member.record.clone() };
            if record == member.record && disks.is_empty() {
                return Ok(vec![]);
            }
            let mut txn = Txn::new()
                .when(Condition::KeyAt(key.clone(), member.revision))
                .put(key, encode(&record)?);
            for disk in &mut disks {
                disk.record.state = to;
                let key = disk_key(disk.record.id);
                let unchanged = Condition::KeyAt(key.clone(), disk.revision);
                txn = txn.when(unchanged).put(key, encode(&disk.record)?);
            }
            if self.commit(txn).await? {
                return Ok(disks.into_iter().map(|disk| disk.record).collect());
            }
        }
        Err(SchemaError::Busy(format!("node '{name}'")))
    }

    /// Removes a node that neither runs nor has disks.
    ///
    /// # Errors
    /// [`SchemaError::NotFound`], [`SchemaError::Invalid`] while it runs, [`SchemaError::Store`].
    pub async fn remove_member(&self, name: &str) -> SchemaResult<()> {
        check_name("node", name).map_err(SchemaError::Invalid)?;
        let txn = Txn::new()
            .when(Condition::KeyExists(member_key(name)))
            .when(Condition::KeyMissing(alive_key(name)))
            .delete(member_key(name));
        if self.store().txn(txn).await?.committed().is_some() {
            return Ok(());
        }
        if self.store().get(&member_key(name)).await?.is_none() {
            return Err(SchemaError::NotFound(format!("node '{name}'")));
        }
        Err(SchemaError::Invalid(format!("node '{name}' runs: stop its sdsd first")))
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;
    use std::time::Duration;

    use tokio::task::LocalSet;

    use super::*;
    use crate::env::Env;
    use crate::meta::MetaStore;
    use crate::meta::memory::MemoryStore;

    fn member(id: u8, name: &str) -> MemberRecord {
        MemberRecord {
            id: NodeId::from_bytes([id; 16]),
            name: name.into(),
            host: "h".into(),
            rack: "r1".into(),
            state: MemberState::Active,
            joined_at_unix_s: 5,
        }
    }

    fn store() -> (Rc<dyn MetaStore>, Schema) {
        let store = MemoryStore::new(Env::from_seed(1));
        let client: Rc<dyn MetaStore> = Rc::new(store.client(Rc::default()));
        (client.clone(), Schema::new(client))
    }

    #[tokio::test(start_paused = true)]
    async fn a_name_belongs_to_one_node() {
        let (_, schema) = store();
        schema.join(&member(1, "a")).await.expect("the name is free");
        schema.drain_member("a", true).await.expect("it is there");
        let again = MemberRecord { rack: "r2".into(), joined_at_unix_s: 9, ..member(1, "a") };
        let kept = schema.join(&again).await.expect("it is the same node");
        assert_eq!(
            (kept.rack.as_str(), kept.state, kept.joined_at_unix_s),
            ("r2", MemberState::Draining, 5)
        );
        let error = schema.join(&member(2, "a")).await.expect_err("the name is taken");
        assert!(matches!(error, SchemaError::Invalid(_)), "{error}");
        schema.remove_member("a").await.expect("it does not run");
        schema.join(&member(2, "a")).await.expect("the name is free again");
    }

    #[tokio::test(start_paused = true)]
    async fn there_is_one_manager_at_a_time() {
        LocalSet::new()
            .run_until(async {
                let (client, schema) = store();
                let lease = client.lease_grant(Duration::from_secs(2)).await.expect("granted");
                let other = client.lease_grant(Duration::from_mins(1)).await.expect("granted");
                assert!(schema.stand_for_manager("a", lease).await.expect("answered"));
                assert!(!schema.stand_for_manager("b", other).await.expect("answered"));
                tokio::time::sleep(Duration::from_secs(4)).await;
                assert!(schema.stand_for_manager("b", other).await.expect("answered"));
            })
            .await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_try_made_late_does_not_undo_the_next_one() {
        LocalSet::new()
            .run_until(async {
                let client = Rc::new(MemoryStore::new(Env::from_seed(1)));
                let (schema, faults) = (Schema::new(client.clone()), client.faults().clone());
                schema.join(&member(1, "a")).await.expect("the name is free");
                let ttl = Duration::from_secs(2);
                let first = client.lease_grant(ttl).await.expect("granted");
                faults.unknown_late.set(1000);
                faults.late.set(Duration::from_secs(1));
                schema.set_alive("a", &alive(), first).await.expect_err("nobody answers");
                faults.heal();
                let second = client.lease_grant(ttl).await.expect("granted");
                schema.set_alive("a", &alive(), second).await.expect("it is a node");
                for _ in 0..10 {
                    tokio::time::sleep(ttl / 2).await;
                    client.lease_keep_alive(second).await.expect("it is kept");
                    let told = client.get(&alive_key("a")).await.expect("it answers");
                    assert!(told.is_some(), "the node that runs is said to be gone");
                }
            })
            .await;
    }

    fn alive() -> AliveRecord {
        AliveRecord {
            id: NodeId::from_bytes([1; 16]),
            instance: 1,
            address: "a:1".into(),
            admin: "a:2".into(),
            exports: vec![],
            version: "0".into(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_node_that_runs_is_not_removed() {
        LocalSet::new()
            .run_until(async {
                let (client, schema) = store();
                let lease = client.lease_grant(Duration::from_mins(1)).await.expect("granted");
                let error = schema.set_alive("a", &alive(), lease).await.expect_err("no such node");
                assert!(matches!(error, SchemaError::NotFound(_)), "{error}");
                schema.join(&member(1, "a")).await.expect("the name is free");
                schema.set_alive("a", &alive(), lease).await.expect("it is a node");
                let error = schema.remove_member("a").await.expect_err("it runs");
                assert!(matches!(error, SchemaError::Invalid(_)), "{error}");
                client.lease_revoke(lease).await.expect("it is there");
                schema.remove_member("a").await.expect("it stopped");
            })
            .await;
    }
}
