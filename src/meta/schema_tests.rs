//! Pools, volumes and roots in a store in memory.

use super::*;
use crate::env::Env;
use crate::id::{ClusterId, PoolId};
use crate::meta::memory::MemoryStore;
use crate::meta::record::FailureDomain;
use crate::shard::Scheme;

fn schema() -> (MemoryStore, Schema) {
    let store = MemoryStore::new(Env::from_seed(1));
    let client = store.client(Rc::default());
    (store, Schema::new(Rc::new(client)))
}

fn pool(name: &str) -> PoolRecord {
    PoolRecord {
        id: PoolId::from_bytes([1; 16]),
        name: name.into(),
        scheme: Scheme { data: 4, parity: 2 },
        failure_domain: FailureDomain::Disk,
        min_size: 2,
    }
}

fn volume(id: u8, pool: &str, name: &str) -> VolumeRecord {
    VolumeRecord {
        id: VolumeId::from_bytes([id; 16]),
        name: name.into(),
        pool: pool.into(),
        cut_from_bytes: None,
        size_bytes: 1 << 30,
        block_bytes: 4096,
        state: VolumeState::Active,
        created_at_unix_s: 0,
    }
}

#[tokio::test]
async fn a_pool_with_volumes_stays() {
    let (_, schema) = schema();
    let error = schema.create_volume(&volume(1, "p", "v"), None).await.unwrap_err();
    assert_eq!(error.to_string(), "there is no pool 'p'");
    schema.create_pool(&pool("p")).await.unwrap();
    let error = schema.create_pool(&pool("p")).await.unwrap_err();
    assert_eq!(error.to_string(), "pool 'p' exists already");
    schema.create_pool(&pool("p2")).await.unwrap();
    let v = volume(1, "p", "v");
    schema.create_volume(&v, Some(b"root")).await.unwrap();
    let error = schema.create_volume(&volume(2, "p", "v"), None).await.unwrap_err();
    assert_eq!(error.to_string(), "volume 'p/v' exists already");
    assert_eq!(schema.volumes().await.unwrap().len(), 1, "nothing is left of a refused creation");
    assert_eq!(schema.remove_pool("p").await, Err(SchemaError::PoolInUse("p".into())));
    schema.remove_pool("p2").await.unwrap();

    schema.delete_volume(v.id).await.unwrap();
    schema.remove_pool("p").await.unwrap();
    let error = schema.remove_pool("p").await.unwrap_err();
    assert_eq!(error.to_string(), "there is no pool 'p'");
}

#[tokio::test]
async fn a_deleted_volume_leaves_a_tombstone_and_no_root() {
    let (_, schema) = schema();
    schema.create_pool(&pool("p")).await.unwrap();
    let v = volume(1, "p", "v");
    schema.create_volume(&v, Some(b"root")).await.unwrap();
    let root = schema.root(v.id).await.unwrap().unwrap();
    assert_eq!(&root.record[..], b"root");
    assert!(schema.forget_volume(v.id).await.is_err(), "an active volume is not forgotten");

    schema.delete_volume(v.id).await.unwrap();
    schema.delete_volume(v.id).await.unwrap();
    assert!(matches!(schema.volume_by_name("p", "v").await, Err(SchemaError::NotFound(_))));
    let late = Txn::new()
        .when(Condition::KeyAt(root_key(v.id), root.revision))
        .put(root_key(v.id), "late");
    let outcome = schema.store().txn(late).await.unwrap();
    assert_eq!(outcome, crate::meta::TxnOutcome::Conflict, "a late head swaps nothing in");
    // The name is free, while the tombstone is kept.
    schema.create_volume(&volume(2, "p", "v"), None).await.unwrap();
    assert_eq!(schema.volumes().await.unwrap().len(), 2);
    schema.forget_volume(v.id).await.unwrap();
    schema.forget_volume(v.id).await.unwrap();
    assert_eq!(schema.volume(v.id).await.unwrap(), None);
    assert_eq!(schema.volume_by_name("p", "v").await.unwrap().record.id, volume(2, "", "").id);
}

#[tokio::test]
async fn bad_names_sizes_and_damage_are_reported() {
    let (_, schema) = schema();
    let error = schema.create_pool(&pool("a/b")).await.unwrap_err();
    assert!(error.to_string().contains("contains a slash"), "{error}");
    schema.create_pool(&pool("p")).await.unwrap();
    for (size, reason) in [(0, "zero"), (4097, "4096"), (1 << 51, "1PiB")] {
        let bad = VolumeRecord { size_bytes: size, ..volume(1, "p", "v") };
        let error = schema.create_volume(&bad, None).await.unwrap_err();
        assert!(error.to_string().contains(reason), "{error}");
    }
    let v = volume(1, "p", "v");
    schema.create_volume(&v, None).await.unwrap();
    assert!(schema.resize_volume(v.id, 5).await.is_err());
    assert_eq!(schema.resize_volume(v.id, 8192).await.unwrap().size_bytes, 8192);
    schema.store().txn(Txn::new().put(volume_key(v.id), b"junk".to_vec())).await.unwrap();
    let error = schema.volumes().await.unwrap_err();
    assert_eq!(error.to_string(), format!("{}: not a record of sds", volume_key(v.id)));
}

#[tokio::test]
async fn identity_is_the_clusters() {
    let (store, schema) = schema();
    assert_eq!(store.identity().await, Err(MetaError::Uninitialised));
    let cluster = ClusterRecord { id: ClusterId::from_bytes([3; 16]), incarnation: 2 };
    schema.initialise(&cluster).await.unwrap();
    assert!(matches!(schema.initialise(&cluster).await, Err(SchemaError::Exists(_))));
    let identity = store.identity().await.unwrap();
    assert_eq!((identity.cluster, identity.incarnation), (cluster.id, 2));
    assert_eq!(identity.revision, 1);
}
