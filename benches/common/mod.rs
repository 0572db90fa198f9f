//! What benchmarks of a whole volume share: a volume in process on files through `io_uring`.

use std::path::PathBuf;
use std::rc::Rc;

use sds::disk::uring::{OpenOptions, Ring, UringDevice};
use sds::disk::{Disk, FormatOptions};
use sds::env::Env;
use sds::id::{ClusterId, DiskId, VolumeId};
use sds::meta::memory::MemoryStore;
use sds::meta::record::ClusterRecord;
use sds::meta::{MetaStore, Txn, schema};
use sds::shard::Scheme;
use sds::shard::disks::Disks;
use sds::shard::domain::Domains;
use sds::shard::local::LocalClient;
use sds::volume::head::{HeadConfig, HeadContext, PoolPolicy};
use sds::volume::root::Root;
use sds::volume::rules::{LogSet, Member};
use sds::volume::takeover::take_over;
use sds::volume::target::HeadTarget;

/// How large a disk is, bytes.
#[derive(Clone, Copy)]
pub(crate) struct DiskSize {
    /// All of it.
    pub(crate) bytes: u64,
    /// A slot, if not the default.
    pub(crate) slot_bytes: Option<u64>,
}

/// Files that are removed in the end.
pub(crate) struct Files {
    dir: PathBuf,
    prefix: &'static str,
    names: Vec<PathBuf>,
}

impl Files {
    /// None yet, in the directory that `SDS_BENCH_DIR` names.
    pub(crate) fn new(prefix: &'static str) -> Self {
        let target = || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("target");
        let dir = std::env::var_os("SDS_BENCH_DIR").map_or_else(target, PathBuf::from);
        Self { dir, prefix, names: Vec::new() }
    }

    /// A file of so many bytes as a device.
    pub(crate) fn device(&mut self, ring: &Rc<Ring>, bytes: u64) -> UringDevice {
        let path = self.dir.join(format!("bench-{}-{}.tmp", self.prefix, self.names.len()));
        self.names.push(path.clone());
        let options = OpenOptions { create_size: Some(bytes), ..OpenOptions::default() };
        UringDevice::open(&path, ring, options).expect("a writable directory")
    }
}

impl Drop for Files {
    fn drop(&mut self) {
        for name in &self.names {
            std::fs::remove_file(name).expect("the benchmark's own file");
        }
    }
}

/// Fresh disks, as many as a scheme is wide.
pub(crate) struct Pool {
    env: Env,
    cluster: ClusterId,
    scheme: Scheme,
    members: Vec<Member>,
    disks: Rc<Disks>,
}

impl Pool {
    /// Formats files as disks.
    pub(crate) async fn new(
        files: &mut Files,
        ring: &Rc<Ring>,
        scheme: Scheme,
        size: DiskSize,
    ) -> Self {
        let env = Env::from_seed(u64::from(scheme.data));
        let cluster = ClusterId::from_bytes(env.random_bytes());
        let disks = Rc::new(Disks::default());
        let mut members = Vec::new();
        for domain in 0..u32::try_from(scheme.width()).expect("a few") {
            let device = files.device(ring, size.bytes);
            let disk = DiskId::from_bytes(env.random_bytes());
            let slot_bytes = size.slot_bytes;
            let options =
                FormatOptions { disk, cluster, slot_bytes, volumes_max: None, force: true };
            Disk::format(&device, options).await.expect("formatted");
            let disk = Disk::open(Rc::new(device)).await.expect("opened");
            let info = disk.info().expect("online");
            members.push(Member { disk: info.id, domain });
            disks.add(Rc::new(LocalClient::new(disk)), Domains::of_one_node(domain), info);
        }
        Self { env, cluster, scheme, members, disks }
    }

    /// Blocks of data segments that clients may fill: slots that no other class holds back.
    #[allow(dead_code, reason = "not every benchmark asks")]
    pub(crate) fn client_blocks(&self) -> u64 {
        let headroom = self.disks.headroom(self.scheme.width(), |_| true);
        let (slots, _) = headroom.expect("as many domains as the scheme is wide");
        let blocks = u64::from(slots) * u64::from(self.disks.slot_blocks_min());
        blocks * u64::from(self.scheme.data)
    }

    /// A volume, served.
    pub(crate) async fn volume(self, bytes: u64, config: HeadConfig) -> HeadTarget {
        let store = Rc::new(MemoryStore::new(self.env.clone()));
        let record = ClusterRecord { id: self.cluster, incarnation: 1 };
        schema::Schema::new(store.clone()).initialise(&record).await.expect("an empty store");
        let volume = VolumeId::from_bytes(self.env.random_bytes());
        let width = self.scheme.parity + 1;
        let set = LogSet::new(self.members, width).expect("as many domains as shards");
        let root = Root::fresh(volume, set, serde_json::Value::Null);
        let put = Txn::new().put(schema::root_key(volume), root.encode());
        store.txn(put).await.expect("stored");
        let context = HeadContext {
            env: self.env,
            disks: self.disks,
            store,
            config,
            pool: PoolPolicy { scheme: self.scheme, min_size: 1 },
        };
        HeadTarget(take_over(context, volume, bytes, &|_| ()).await.expect("taken over"))
    }
}
