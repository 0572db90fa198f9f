//! `sdsd recover`, and `sdsd recover --lend`, as processes.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::rc::Rc;

use tokio::sync::watch;
use tokio::task::LocalSet;

use super::evidence::listed_paths;
use super::lend::{Shelf, borrow};
use super::{Found, Plan, Rebuilt, RecoverError, rebuild};
use crate::config::Config;
use crate::disk::Disk;
use crate::disk::uring::Ring;
use crate::env::Env;
use crate::id::{ClusterId, DiskId, NodeId};
use crate::meta::catalog;
use crate::meta::members::{MEMBER_PREFIX, MemberRecord};
use crate::meta::record;
use crate::node::cluster::process::{Door, trust};
use crate::node::daemon::{DaemonError, DirectoryLock, Signals, absolute, error, fail};
use crate::node::opener::{UringOpener, open_patiently};
use crate::node::store;
use crate::rpc::handshake::Target;
use crate::rpc::tcp::TcpDial;
use crate::rpc::tls::TlsDial;
use crate::rpc::{Directories, Identity, Peer, RpcConfig};
use crate::shard::Catalog;
use crate::shard::local::LocalClient;
use crate::trust::{Holder, NodeTls};

/// What an operator asks for.
pub struct Order<'a> {
    /// Nodes that lend their disks: `HOST:PORT`.
    pub from: &'a [String],
    /// Disks that are gone for good, by his word.
    pub missing: BTreeSet<DiskId>,
    /// Hears how far it is.
    pub progress: &'a dyn Fn(&str),
}

/// What a node lends.
#[derive(Debug)]
pub struct Lent {
    /// Where it is reached by other nodes.
    pub address: SocketAddr,
    /// Ids and paths of the disks.
    pub disks: Vec<(DiskId, String)>,
    /// Disks that cannot be lent, with the reason.
    pub problems: Vec<String>,
}

fn on_a_runtime<T>(work: impl Future<Output = Result<T, DaemonError>>) -> Result<T, DaemonError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|why| error(format!("cannot start the runtime: {why}")))?;
    LocalSet::new().block_on(&runtime, work)
}

/// Rebuilds the lost metadata store from the disks of the configuration, those at the paths that these
/// name for this node, and those of lenders.
///
/// # Errors
/// [`DaemonError`]: a store exists, a lender is not to be had, or [`RecoverError`].
pub fn recover(config: &Config, order: &Order<'_>) -> Result<Rebuilt, DaemonError> {
    on_a_runtime(recover_local(config, order))
}

async fn recover_local(config: &Config, order: &Order<'_>) -> Result<Rebuilt, DaemonError> {
    let clustered = config.cluster.address.is_some();
    if !clustered && !order.from.is_empty() {
        return fail("--from: this node has no address in [cluster], so there are no others");
    }
    let tls = trust(config)?;
    let _lock = DirectoryLock::take(&config.data_dir)?;
    let env = Env::from_entropy();
    store::check_lost(config, &env).await?;
    let (mut found, problems) = own_disks(config).await?;
    for problem in &problems {
        (order.progress)(&format!("not used: {problem}"));
    }
    if !order.from.is_empty() {
        let own = identity(config, &env, &found, tls.as_ref().map(NodeTls::holder)).await?;
        let mut asked = BTreeSet::new();
        for address in order.from.iter().filter(|address| asked.insert(address.as_str())) {
            let peer = connect(&own, &env, address, tls.as_ref())?;
            let lent = borrow(&peer).await.map_err(error)?;
            (order.progress)(&format!("{address} lends {} disks", lent.len()));
            add_lent(&mut found, lent)?;
        }
    }
    let plan = Plan { missing: &order.missing, clustered, progress: order.progress };
    let rebuilt = rebuild(&env, &found, &plan).await.map_err(error)?;
    (order.progress)("writing the new store");
    store::put_back(config, &env, rebuilt.content.clone()).await?;
    Ok(rebuilt)
}

fn add_lent(
    found: &mut BTreeMap<DiskId, Found>,
    lent: BTreeMap<DiskId, Found>,
) -> Result<(), DaemonError> {
    let place = |there: &Found| format!("{}:{}", there.node, there.path);
    for (disk, there) in lent {
        if let Some(first) = found.get(&disk) {
            let (first, second) = (place(first), place(&there));
            return fail(RecoverError::Twice { disk, first, second });
        }
        found.insert(disk, there);
    }
    Ok(())
}

/// The disks of this node, and sentences about those that cannot be used.
async fn own_disks(config: &Config) -> Result<(BTreeMap<DiskId, Found>, Vec<String>), DaemonError> {
    let ring = Ring::new().map_err(|why| error(format!("io_uring is not available: {why}")))?;
    let opener = UringOpener::new(ring);
    let mut paths = absolute(&config.disks)?;
    let node = config.cluster.address.is_some().then_some(config.node.as_str());
    let (mut found, mut problems) = (BTreeMap::<DiskId, Found>::new(), Vec::new());
    let mut tried = BTreeSet::new();
    while let Some(path) = paths.pop() {
        if !tried.insert(path.clone()) {
            continue;
        }
        match open(&opener, &config.node, &path).await {
            Ok(disk) => {
                let id = disk.client.disk();
                if let Some(first) = found.get(&id) {
                    let (first, second) = (first.path.clone(), path);
                    return fail(RecoverError::Twice { disk: id, first, second });
                }
                found.insert(id, disk);
            }
            Err(why) => problems.push(format!("{path}: {why}")),
        }
        if paths.is_empty() {
            paths = listed_paths(&newest_catalog(&found).await, node);
            paths.retain(|path| !tried.contains(path));
        }
    }
    Ok((found, problems))
}

async fn open(opener: &UringOpener, node: &str, path: &str) -> Result<Found, String> {
    let device = open_patiently(opener, path).await.map_err(|why| why.to_string())?;
    let disk = Disk::open(device).await.map_err(|why| why.to_string())?;
    let (size_bytes, slot_bytes) = (disk.geometry().size_bytes, disk.geometry().slot_bytes);
    let client = Rc::new(LocalClient::new(disk));
    Ok(Found { client, node: node.to_owned(), path: path.to_owned(), size_bytes, slot_bytes })
}

async fn newest_catalog(found: &BTreeMap<DiskId, Found>) -> Catalog {
    let mut newest = Catalog::default();
    for disk in found.values() {
        if let Ok(catalog) = disk.client.get_catalog().await
            && (catalog.incarnation, catalog.revision) > (newest.incarnation, newest.revision)
        {
            newest = catalog;
        }
    }
    newest
}

/// Who this node is, among those of its cluster: as its credentials say, or else its disks.
async fn identity(
    config: &Config,
    env: &Env,
    found: &BTreeMap<DiskId, Found>,
    holder: Option<&Holder>,
) -> Result<Identity, DaemonError> {
    let mut clusters: BTreeMap<ClusterId, DiskId> = BTreeMap::new();
    for (&disk, there) in found {
        let info = there.client.info().await.map_err(|why| error(format!("disk {disk}: {why}")))?;
        clusters.entry(info.cluster).or_insert(disk);
    }
    let cluster = match holder {
        Some(holder) => holder.cluster,
        None => match clusters.keys().next() {
            Some(cluster) => *cluster,
            None => return fail(RecoverError::NoDisks),
        },
    };
    if let Some((found, disk)) = clusters.iter().find(|(found, _)| **found != cluster) {
        return fail(format!(
            "disk {disk} belongs to cluster {found}, but this node is one of {cluster}: leave it out"
        ));
    }
    let node = match holder.and_then(Holder::node) {
        Some(node) => node,
        None => store::node_record(&config.data_dir, env)?.id,
    };
    Ok(Identity { cluster, node, name: config.node.clone(), core: 0 })
}

fn connect(
    own: &Identity,
    env: &Env,
    address: &str,
    tls: Option<&NodeTls>,
) -> Result<Peer, DaemonError> {
    // Whichever node of the cluster it is.
    let target = Target { node: None, core: 0 };
    let address = address.to_owned();
    let (label, own, config) = (address.clone(), own.clone(), RpcConfig::default());
    Ok(match tls {
        None => Peer::spawn(&label, own, target, TcpDial { address }, config, env.clone()),
        Some(tls) => {
            let dial = TlsDial::to_any(address, tls).map_err(error)?;
            Peer::spawn(&label, own, target, dial, config, env.clone())
        }
    })
}

/// Serves the disks of this node to the others, without a store and without heads, until SIGINT or
/// SIGTERM. `ready` is called once it does.
///
/// # Errors
/// [`DaemonError`]: there is nothing to lend, or nobody to lend it to.
pub fn lend(config: &Config, ready: &dyn Fn(&Lent)) -> Result<(), DaemonError> {
    on_a_runtime(lend_local(config, ready))
}

async fn lend_local(config: &Config, ready: &dyn Fn(&Lent)) -> Result<(), DaemonError> {
    let mut signals = Signals::listen()?;
    let _lock = DirectoryLock::take(&config.data_dir)?;
    let Some(door) = Door::open(config).await? else {
        return fail("--lend: this node has no address in [cluster], so there are no others");
    };
    let env = Env::from_entropy();
    let (found, problems) = own_disks(config).await?;
    if found.is_empty() {
        let why = problems.join("; ");
        return fail(format!(
            "{}{}{why}",
            RecoverError::NoDisks,
            if why.is_empty() { "" } else { ": " }
        ));
    }
    let own = identity(config, &env, &found, door.holder()).await?;
    let members = members(&newest_catalog(&found).await);
    let disks = found.iter().map(|(id, there)| (*id, there.path.clone())).collect();
    let lent = Lent { address: door.address, disks, problems };
    let shelf = Shelf::new(&config.node, found);
    let served = Directories { questions: shelf.clone(), ..Directories::from(shelf) };
    // Whoever was removed has a certificate all the same.
    let admits = move |id: NodeId| members.is_empty() || members.contains(&id);
    let (stop, stopped) = watch::channel(false);
    let served = tokio::task::spawn_local(door.serve_with(own, served, Rc::new(admits), stopped));
    ready(&lent);
    signals.wait().await;
    drop(stop);
    served.await.map_err(|why| error(format!("the server ended by a defect: {why}")))
}

/// The nodes of the cluster, as far as a catalog knows.
fn members(catalog: &Catalog) -> BTreeSet<NodeId> {
    let entries = catalog::decode(&catalog.data).unwrap_or_default();
    let members = entries.iter().filter(|(key, _)| key.starts_with(MEMBER_PREFIX));
    members.filter_map(|(_, value)| Some(record::decode::<MemberRecord>(value).ok()?.id)).collect()
}
