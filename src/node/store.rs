//! Opens the metadata store of a node, or makes that of a new cluster where nothing is yet.
//!
//! A store that is missing while a disk holds data was lost, and is never made anew here: that is
//! for `sdsd recover`, which [`put_back`] stores the outcome of.

use std::fs::File;
use std::io::{ErrorKind, Write};
use std::path::Path;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep};

use super::daemon::{DaemonError, STORE_FILE, error, fail};
use super::opener::{DeviceOpener, OpenFailure, open_patiently};
use crate::config::Config;
use crate::disk::probe_superblock;
use crate::env::Env;
use crate::id::{ClusterId, NodeId};
use crate::meta::embedded::EmbeddedStore;
use crate::meta::etcd::{EtcdOptions, EtcdStore};
use crate::meta::members::MEMBER_PREFIX;
use crate::meta::record::{self, ClusterRecord, NodeRecord};
use crate::meta::schema::{CLUSTER_KEY, NODE_KEY};
use crate::meta::{Condition, MetaError, MetaStore, Op, Txn, VALUE_BYTES_MAX};

/// How long the node waits for an etcd when it starts: both may start with the machine.
const START_PATIENCE: Duration = Duration::from_mins(1);
/// Pause between two tries.
const START_PAUSE: Duration = Duration::from_millis(500);
/// In the data directory: the record of the node.
const NODE_FILE: &str = "node";
/// What all keys of sds begin with.
const ALL_KEYS: &str = "/sds/";
/// Keys of one transaction when a store is put back.
const PUT_BACK_KEYS: usize = 64;

/// Opens the store that the configuration names.
///
/// # Errors
/// [`DaemonError`]: it cannot be used or reached, or was lost.
pub(super) async fn open(
    config: &Config,
    cluster: Option<ClusterId>,
    opener: &dyn DeviceOpener,
    env: &Env,
    paths: &[String],
) -> Result<Rc<dyn MetaStore>, DaemonError> {
    match config.store.etcd().map_err(error)? {
        None => open_embedded(&config.data_dir, opener, env, paths).await,
        Some(options) => {
            // A node of a cluster may have no disks, or know of them by the store alone.
            let ran = config.cluster.address.is_some() && config.data_dir.join(NODE_FILE).exists();
            let founder = Founder { cluster, ran };
            let store = open_etcd(&options, &founder, opener, env, paths).await?;
            if config.cluster.address.is_none() {
                claim(&*store, &node_record(&config.data_dir, env)?, &options).await?;
            }
            Ok(store)
        }
    }
}

async fn open_embedded(
    dir: &Path,
    opener: &dyn DeviceOpener,
    env: &Env,
    paths: &[String],
) -> Result<Rc<dyn MetaStore>, DaemonError> {
    let path = dir.join(STORE_FILE);
    if path.exists() {
        return Ok(Rc::new(EmbeddedStore::open(&path).map_err(error)?));
    }
    check_nothing_lost(&format!("in {}", dir.display()), opener, paths).await?;
    let content = vec![(CLUSTER_KEY.to_owned(), new_cluster(None, env)?)];
    Ok(Rc::new(EmbeddedStore::create(&path, content).map_err(error)?))
}

/// That no disk holds what a store knew that is missing.
async fn check_nothing_lost(
    place: &str,
    opener: &dyn DeviceOpener,
    paths: &[String],
) -> Result<(), DaemonError> {
    for disk in paths {
        let device = match open_patiently(opener, disk).await {
            Ok(device) => device,
            Err(OpenFailure::NotFound(_)) => continue,
            Err(why) => return fail(format!("{why}: nobody can tell whether it holds data")),
        };
        if let Ok(info) = probe_superblock(&*device).await {
            return fail(format!(
                "there is no metadata store {place}, but {disk} is disk {} of cluster {}: \
                 `sdsd recover` rebuilds the store from the disks",
                info.disk, info.cluster
            ));
        }
    }
    Ok(())
}

/// The record of a cluster that is new.
fn new_cluster(id: Option<ClusterId>, env: &Env) -> Result<Bytes, DaemonError> {
    let id = id.unwrap_or_else(|| ClusterId::from_bytes(env.random_bytes()));
    let cluster = ClusterRecord { id, incarnation: 1 };
    Ok(record::encode(&cluster).map_err(error)?.into())
}

fn connect(options: &EtcdOptions, env: &Env) -> Result<EtcdStore, DaemonError> {
    EtcdStore::new(options, env.clone()).map_err(|why| error(format!("store.{why}")))
}

/// Who finds an etcd empty.
struct Founder {
    /// The cluster of its credentials.
    cluster: Option<ClusterId>,
    /// Whether it was a node of a cluster before.
    ran: bool,
}

async fn open_etcd(
    options: &EtcdOptions,
    founder: &Founder,
    opener: &dyn DeviceOpener,
    env: &Env,
    paths: &[String],
) -> Result<Rc<dyn MetaStore>, DaemonError> {
    let store = connect(options, env)?;
    let place = format!("in the etcd at {}", options.endpoints.join(", "));
    let deadline = Instant::now() + START_PATIENCE;
    loop {
        let found = store.identity().await;
        match found {
            Ok(found) => {
                if let Some(wanted) = founder.cluster.filter(|wanted| *wanted != found.cluster) {
                    return fail(format!(
                        "the credentials of this node are those of cluster {wanted}, but {place} is \
                         cluster {}",
                        found.cluster
                    ));
                }
                return Ok(Rc::new(store));
            }
            Err(MetaError::Uninitialised) => {
                check_nothing_lost(&place, opener, paths).await?;
                if founder.ran {
                    return fail(format!(
                        "there is no metadata store {place}, but this node was one of a cluster before: \
                         `sdsd recover` rebuilds the store from the disks (docs/cluster.md, \"When etcd is lost\")"
                    ));
                }
                // Whatever comes of it: the next look at the identity tells.
                let txn = Txn::new()
                    .when(Condition::PrefixEmpty(ALL_KEYS.into()))
                    .put(CLUSTER_KEY, new_cluster(founder.cluster, env)?);
                let made = store.txn(txn).await;
                if made.is_ok_and(|outcome| outcome.committed().is_none())
                    && matches!(store.identity().await, Err(MetaError::Uninitialised))
                {
                    return fail(format!("{}: {place}", left_over(options)));
                }
            }
            Err(MetaError::Unavailable(why)) => {
                tracing::warn!(why, "waiting for etcd");
            }
            Err(why) => return fail(format!("{why}: {place}")),
        }
        if Instant::now() >= deadline {
            let why = store.identity().await.err().map_or_else(String::new, |e| e.to_string());
            return fail(format!("no metadata store {place}: {why}"));
        }
        sleep(START_PAUSE).await;
    }
}

/// Who this node is: made when it is first asked.
pub(super) fn node_record(data_dir: &Path, env: &Env) -> Result<NodeRecord, DaemonError> {
    let path = data_dir.join(NODE_FILE);
    let bad = |why: &dyn std::fmt::Display| error(format!("{}: {why}", path.display()));
    match std::fs::read(&path) {
        Ok(bytes) => return record::decode(&bytes).map_err(|why| bad(&why)),
        Err(why) if why.kind() == ErrorKind::NotFound => {}
        Err(why) => return Err(bad(&why)),
    }
    let host = std::fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let node = NodeRecord { id: NodeId::from_bytes(env.random_bytes()), host: host.trim().into() };
    let write = || {
        let draft = path.with_extension("new");
        let mut file = File::create(&draft)?;
        file.write_all(&record::encode(&node).map_err(std::io::Error::other)?)?;
        file.sync_all()?;
        std::fs::rename(&draft, &path)?;
        File::open(data_dir)?.sync_all()
    };
    write().map_err(|why| bad(&why))?;
    Ok(node)
}

/// Sees to it that no other node uses the store: each would take the volumes from the other, whose
/// disks it cannot reach.
async fn claim(
    store: &dyn MetaStore,
    node: &NodeRecord,
    options: &EtcdOptions,
) -> Result<(), DaemonError> {
    let bytes = Bytes::from(record::encode(node).map_err(error)?);
    if store.list(MEMBER_PREFIX).await.is_ok_and(|listing| !listing.entries.is_empty()) {
        return fail(format!(
            "the etcd at {} is that of a cluster: this node needs an address in [cluster] to be one \
             of its nodes",
            options.endpoints.join(", ")
        ));
    }
    let deadline = Instant::now() + START_PATIENCE;
    loop {
        match store.get(NODE_KEY).await {
            Ok(Some(found)) => {
                let user: NodeRecord = record::decode(&found.value)
                    .map_err(|why| error(format!("{NODE_KEY}: {why}")))?;
                if user.id == node.id {
                    return Ok(());
                }
                return fail(format!(
                    "the etcd at {} is used by the node on host {:?} ({}), and only the nodes of a \
                     cluster share one: give each an address in [cluster]; if that node is gone for good, `etcdctl del {}{NODE_KEY}` lets \
                     this one take its place",
                    options.endpoints.join(", "),
                    user.host,
                    user.id,
                    options.prefix
                ));
            }
            Ok(None) => {
                let none_yet = Txn::new()
                    .when(Condition::KeyMissing(NODE_KEY.into()))
                    .when(Condition::PrefixEmpty(MEMBER_PREFIX.into()));
                match store.txn(none_yet.put(NODE_KEY, bytes.clone())).await {
                    Ok(_) => continue,
                    Err(MetaError::Unavailable(_) | MetaError::Unknown(_)) => {}
                    Err(why) => return fail(why),
                }
            }
            Err(MetaError::Unavailable(_) | MetaError::Unknown(_)) => {}
            Err(why) => return fail(why),
        }
        if Instant::now() >= deadline {
            return fail("etcd does not answer");
        }
        sleep(START_PAUSE).await;
    }
}

/// What an operator is told who has keys but no cluster.
fn left_over(options: &EtcdOptions) -> String {
    let prefix = format!("{}{ALL_KEYS}", options.prefix);
    format!(
        "keys that begin with {prefix} are there, but no cluster: if they are left from a recovery \
         that was interrupted, remove them with `etcdctl del --prefix {prefix}`"
    )
}

/// Whether there is a place for a store that is put back.
///
/// # Errors
/// [`DaemonError`]: there is one, or the place cannot be looked at.
pub(super) async fn check_lost(config: &Config, env: &Env) -> Result<(), DaemonError> {
    if let Some(options) = config.store.etcd().map_err(error)? {
        let listing = connect(&options, env)?.list(ALL_KEYS).await.map_err(error)?;
        return match listing.entries.iter().any(|(key, _)| key == CLUSTER_KEY) {
            true => fail(format!(
                "there is a metadata store in the etcd at {}: it is recovered only when it is \
                 lost; if it is not usable, save it and remove it with `etcdctl del --prefix \
                 {}{ALL_KEYS}`",
                options.endpoints.join(", "),
                options.prefix
            )),
            false if listing.entries.is_empty() => Ok(()),
            false => fail(left_over(&options)),
        };
    }
    let path = config.data_dir.join(STORE_FILE);
    if path.exists() {
        return fail(format!(
            "there is a metadata store at {}: it is recovered only when it is lost; move it away \
             if it is not usable",
            path.display()
        ));
    }
    Ok(())
}

/// Makes a store of what was rebuilt.
///
/// # Errors
/// [`DaemonError`]: it was not made, or made by half and is no store until it is removed.
pub(super) async fn put_back(
    config: &Config,
    env: &Env,
    content: Vec<(String, Bytes)>,
) -> Result<(), DaemonError> {
    let Some(options) = config.store.etcd().map_err(error)? else {
        let path = config.data_dir.join(STORE_FILE);
        drop(EmbeddedStore::create(&path, content).map_err(error)?);
        return Ok(());
    };
    put_content(&connect(&options, env)?, content).await
}

/// Writes what was rebuilt into an empty store.
///
/// # Errors
/// As [`put_back`].
pub(super) async fn put_content(
    store: &dyn MetaStore,
    content: Vec<(String, Bytes)>,
) -> Result<(), DaemonError> {
    // The cluster comes last: until then it is no store.
    let (cluster, rest): (Vec<_>, Vec<_>) =
        content.into_iter().partition(|(key, _)| key == CLUSTER_KEY);
    let none_yet = || Txn::new().when(Condition::KeyMissing(CLUSTER_KEY.into()));
    let (mut txn, mut bytes) = (none_yet(), 0);
    for (key, value) in rest {
        let more = key.len() + value.len();
        if txn.ops.len() == PUT_BACK_KEYS || bytes + more > VALUE_BYTES_MAX {
            put_surely(store, std::mem::replace(&mut txn, none_yet())).await?;
            bytes = 0;
        }
        bytes += more;
        txn = txn.put(key, value);
    }
    put_surely(store, txn).await?;
    let last = cluster.into_iter().fold(none_yet(), |txn, (key, value)| txn.put(key, value));
    put_surely(store, last).await
}

/// Writes keys without a cluster; once more where the outcome is unknown.
async fn put_surely(store: &dyn MetaStore, txn: Txn) -> Result<(), DaemonError> {
    let deadline = Instant::now() + START_PATIENCE;
    let mut in_doubt = false;
    loop {
        match store.txn(txn.clone()).await {
            Ok(outcome) if outcome.committed().is_some() => return Ok(()),
            Ok(_) => {
                let Some(Op::Put { key, value, .. }) = txn.ops.last() else {
                    return fail("nothing was to be written");
                };
                let found = store.get(key).await.map_err(error)?;
                // The last one is in conflict with itself if it was made after all.
                if in_doubt && found.is_some_and(|found| found.value == *value) {
                    return Ok(());
                }
                return fail("somebody else makes a metadata store in this etcd");
            }
            Err(MetaError::Unknown(_)) if Instant::now() < deadline => in_doubt = true,
            Err(MetaError::Unavailable(_)) if Instant::now() < deadline => {}
            Err(why) => return fail(format!("the metadata store is not rebuilt: {why}")),
        }
        sleep(START_PAUSE).await;
    }
}
