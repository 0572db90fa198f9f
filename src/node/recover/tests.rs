//! Recovery on simulated disks, with old heads and other operators at work meanwhile.

use std::rc::Rc;

use bytes::Bytes;
use tokio::task::LocalSet;

use super::*;
use crate::disk::{Disk, FormatOptions};
use crate::id::{Epoch, HeadId, PoolId};
use crate::meta::catalog;
use crate::meta::members::{MemberRecord, MemberState, member_key};
use crate::meta::record::{
    self, DiskRecord, DiskState, FailureDomain, PoolRecord, VolumeRecord, VolumeState,
};
use crate::meta::schema::{disk_key, root_key, volume_key};
use crate::node::volumes::description;
use crate::shard::local::LocalClient;
use crate::shard::{Authority, Catalog, Scheme};
use crate::sim::device::{SimConfig, SimDevice};
use crate::volume::root::Root;
use crate::volume::rules::{LogSet, Member};

/// Disks, each on a node of its own, and one volume on them.
struct Bench {
    env: Env,
    found: BTreeMap<DiskId, Found>,
    ids: Vec<DiskId>,
    volume: VolumeRecord,
    pool: PoolRecord,
}

fn run(test: impl AsyncFnOnce(Bench)) {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .start_paused(true)
        .build()
        .expect("a runtime");
    LocalSet::new().block_on(&runtime, async { test(Bench::new(4).await).await });
}

impl Bench {
    async fn new(disks: u8) -> Self {
        let env = Env::from_seed(5);
        let mut found = BTreeMap::new();
        for number in 0..disks {
            let device = Rc::new(SimDevice::new(env.clone(), SimConfig::default()));
            let id = DiskId::from_bytes([number + 1; 16]);
            let options = FormatOptions {
                disk: id,
                cluster: ClusterId::from_bytes([7; 16]),
                slot_bytes: None,
                volumes_max: None,
                force: false,
            };
            Disk::format(&*device, options).await.expect("formatted");
            let disk = Disk::open(device).await.expect("opened");
            let geometry = *disk.geometry();
            let there = Found {
                client: Rc::new(LocalClient::new(disk)),
                node: format!("n{number}"),
                path: format!("/disk{number}"),
                size_bytes: geometry.size_bytes,
                slot_bytes: geometry.slot_bytes,
            };
            found.insert(id, there);
        }
        let volume = VolumeRecord {
            id: VolumeId::from_bytes([9; 16]),
            name: "v".into(),
            pool: "p".into(),
            size_bytes: 1 << 20,
            cut_from_bytes: None,
            block_bytes: 512,
            state: VolumeState::Active,
            created_at_unix_s: 0,
        };
        let pool = PoolRecord {
            id: PoolId::from_bytes([4; 16]),
            name: "p".into(),
            scheme: Scheme::replicated(2),
            failure_domain: FailureDomain::Node,
            min_size: 1,
        };
        let ids = found.keys().copied().collect();
        Self { env, found, ids, volume, pool }
    }

    fn authority(&self, epoch: Epoch) -> Authority {
        let head = HeadId::from_bytes([u8::try_from(epoch.count()).expect("small"); 16]);
        Authority { volume: self.volume.id, epoch, head }
    }

    /// A root with the log set of these disks, two of which every segment is on.
    fn root(&self, disks: &[usize], epoch: Epoch, sequence: u64) -> Root {
        let member = |index: &usize| Member {
            disk: self.ids[*index],
            domain: u32::try_from(*index).expect("small"),
        };
        let set = LogSet::new(disks.iter().map(member).collect(), 2).expect("a set");
        let head = self.authority(epoch).head;
        let description = description(&self.volume, &self.pool);
        Root { epoch, head, sequence, ..Root::fresh(self.volume.id, set, description) }
    }

    /// A head brings a root to these disks, as far as it is not fenced there; to how many it came.
    async fn bring(&self, root: &Root, disks: &[usize]) -> usize {
        let authority = self.authority(root.epoch);
        let mut came = 0;
        for index in disks {
            let client = &self.found[&self.ids[*index]].client;
            came += usize::from(client.fence(authority, Some(root.mirror())).await.is_ok());
        }
        came
    }

    async fn put_catalog(&self, records: Vec<(String, Bytes)>) {
        let data = catalog::encode(&records).expect("few");
        for there in self.found.values() {
            let catalog = Catalog { incarnation: 1, revision: 8, data: data.clone() };
            there.client.put_catalog(catalog).await.expect("stored");
        }
    }

    fn without(&self, index: usize) -> BTreeMap<DiskId, Found> {
        let copy = |there: &Found| Found {
            client: there.client.clone(),
            node: there.node.clone(),
            path: there.path.clone(),
            ..*there
        };
        let others = self.found.iter().filter(|(disk, _)| **disk != self.ids[index]);
        others.map(|(disk, there)| (*disk, copy(there))).collect()
    }
}

fn plan(missing: &BTreeSet<DiskId>) -> Plan<'_> {
    Plan { missing, clustered: true, progress: &|_| {} }
}

fn found_root(rebuilt: &Rebuilt, volume: VolumeId) -> Root {
    let key = root_key(volume);
    let found = rebuilt.content.iter().find(|(name, _)| *name == key);
    Root::decode(&found.expect("the volume is back").1).expect("a root")
}

fn encoded<R: record::Record>(record: &R) -> Bytes {
    record::encode(record).expect("a record").into()
}

/// Hole 4 of the model: what counts is read after the fences.
#[test]
fn what_a_forgotten_head_brings_into_force_meanwhile_is_found() {
    run(async |bench| {
        let root = bench.root(&[0, 1, 2], Epoch::new(1, 1), 3);
        assert_eq!(bench.bring(&root, &[0, 1, 2]).await, 3);
        let none = BTreeSet::new();
        let first = look(&bench.found, &plan(&none)).await.expect("all is there");
        // The head still runs on a node that nobody thought of; its newest checkpoint may be trusted by clients.
        let late = bench.root(&[0, 1, 2], Epoch::new(1, 1), 4);
        assert_eq!(bench.bring(&late, &[1, 2]).await, 2);
        let rebuilt = settle(&bench.env, &bench.found, &plan(&none), first).await.expect("done");
        let root = found_root(&rebuilt, bench.volume.id);
        assert_eq!((root.sequence, root.epoch, rebuilt.incarnation), (4, Epoch::new(2, 0), 2));
        assert!(!root.released, "its read lease may still run");
        assert_eq!(
            bench.bring(&bench.root(&[0, 1, 2], Epoch::new(1, 9), 5), &[0, 1, 2, 3]).await,
            0
        );
        // The volume's next head is not fenced.
        assert_eq!(bench.bring(&bench.root(&[0, 1, 2], Epoch::new(2, 1), 5), &[0, 1, 2]).await, 3);
    });
}

#[test]
fn fences_are_raised_again_above_what_was_seen_meanwhile() {
    run(async |bench| {
        let root = bench.root(&[0, 1, 2], Epoch::new(1, 1), 3);
        bench.bring(&root, &[0, 1, 2]).await;
        let none = BTreeSet::new();
        let first = look(&bench.found, &plan(&none)).await.expect("all is there");
        // Another recovery made a store of the next incarnation, and its head was here already.
        let other = bench.root(&[0, 1, 2], Epoch::new(2, 7), 5);
        assert_eq!(bench.bring(&other, &[0, 1]).await, 2);
        let rebuilt = settle(&bench.env, &bench.found, &plan(&none), first).await.expect("done");
        let root = found_root(&rebuilt, bench.volume.id);
        assert_eq!((root.sequence, root.epoch, rebuilt.incarnation), (5, Epoch::new(3, 0), 3));
    });
}

#[test]
fn a_volume_that_was_first_heard_of_meanwhile_is_fenced_and_found() {
    run(async |bench| {
        let none = BTreeSet::new();
        let first = look(&bench.found, &plan(&none)).await.expect("all is there");
        let root = bench.root(&[0, 1, 2], Epoch::new(1, 1), 2);
        bench.bring(&root, &[0, 1, 2]).await;
        let rebuilt = settle(&bench.env, &bench.found, &plan(&none), first).await.expect("done");
        assert_eq!(rebuilt.volumes, ["p/v"]);
        assert_eq!(bench.bring(&bench.root(&[0, 1, 2], Epoch::new(1, 2), 3), &[0, 1, 2]).await, 0);
    });
}

#[test]
fn disks_that_are_needed_are_named_with_their_nodes() {
    run(async |bench| {
        let record = |index: usize| DiskRecord {
            id: bench.ids[index],
            path: format!("/dev/sd{index}"),
            node: format!("n{index}"),
            domain: 5,
            slot_bytes: 1 << 20,
            size_bytes: 1 << 30,
            state: DiskState::Online,
            added_at_unix_s: 0,
            removing: false,
            heir: None,
        };
        let records = (0..4).map(|index| (disk_key(bench.ids[index]), encoded(&record(index))));
        bench.put_catalog(records.collect()).await;
        let root = bench.root(&[0, 1, 2], Epoch::new(1, 1), 3);
        bench.bring(&root, &[0, 1, 2]).await;
        let found = bench.without(1);
        let none = BTreeSet::new();
        let error = rebuild(&bench.env, &found, &plan(&none)).await.expect_err("one is missing");
        let text = error.to_string();
        assert!(text.contains("n1:/dev/sd1") && text.contains("--lend"), "{text}");
        assert!(bench.bring(&root, &[0]).await == 1, "nothing was fenced");
        // Where they are found is where they are.
        let missing = BTreeSet::from([bench.ids[1]]);
        let rebuilt = rebuild(&bench.env, &found, &plan(&missing)).await.expect("one may miss");
        let key = disk_key(bench.ids[2]);
        let disk = rebuilt.content.iter().find(|(name, _)| *name == key).expect("it is known");
        let disk: DiskRecord = record::decode(&disk.1).expect("a record");
        assert_eq!((disk.node.as_str(), disk.path.as_str(), disk.domain), ("n2", "/disk2", 5));
        // A root of which fewer than a width of mirrors were made, on the one that was given up.
        let newer = bench.root(&[0, 1, 2], Epoch::new(1, 1), 4);
        assert!(newer.mirror().revision < found_root(&rebuilt, bench.volume.id).mirror().revision);
        let two = BTreeSet::from([bench.ids[1], bench.ids[2]]);
        let mut fewer = bench.without(1);
        fewer.remove(&bench.ids[2]);
        let error = rebuild(&bench.env, &fewer, &plan(&two)).await.expect_err("two are too many");
        assert!(matches!(error, RecoverError::TooManyMissing { .. }), "{error}");
    });
}

#[test]
fn nodes_come_back_and_a_volume_that_nobody_served_starts_anew() {
    run(async |bench| {
        let member = |number: u8| MemberRecord {
            id: crate::id::NodeId::from_bytes([number + 1; 16]),
            name: format!("n{number}"),
            host: "h".into(),
            rack: "r".into(),
            state: MemberState::Draining,
            joined_at_unix_s: 5,
        };
        let mut records: Vec<_> = (0..4)
            .map(|number| (member_key(&format!("n{number}")), encoded(&member(number))))
            .collect();
        records.push((volume_key(bench.volume.id), encoded(&bench.volume)));
        records.push((crate::meta::schema::pool_key("p"), encoded(&bench.pool)));
        bench.put_catalog(records).await;
        let none = BTreeSet::new();
        let rebuilt = rebuild(&bench.env, &bench.found, &plan(&none)).await.expect("done");
        let key = member_key("n3");
        let kept = rebuilt.content.iter().find(|(name, _)| *name == key).expect("it is known");
        assert_eq!(record::decode::<MemberRecord>(&kept.1).expect("a record"), member(3));
        let root = found_root(&rebuilt, bench.volume.id);
        let domains: BTreeSet<u32> =
            root.set.members().iter().map(|member| member.domain).collect();
        let nodes: BTreeSet<u32> = (0..4).map(|number| member(number).node_domain()).collect();
        assert_eq!((root.sequence, domains), (0, nodes), "a domain is a node");
        assert!(rebuilt.content.iter().all(|(key, _)| !key.starts_with("/sds/place/")));
    });
}

#[test]
fn what_no_root_was_found_of_is_told_and_left_alone() {
    run(async |bench| {
        let authority = bench.authority(Epoch::new(1, 1));
        let client = &bench.found[&bench.ids[0]].client;
        client.fence(authority, None).await.expect("fenced");
        let none = BTreeSet::new();
        let rebuilt = rebuild(&bench.env, &bench.found, &plan(&none)).await.expect("done");
        assert!(rebuilt.volumes.is_empty());
        let told = rebuilt.notes.iter().any(|note| note.contains(&bench.volume.id.to_string()));
        assert!(told, "{:?}", rebuilt.notes);
    });
}
