//! The same requests to a disk directly and to one like it through the RPC: the same answers.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;

use super::{Net, fresh_disk, until_up};
use crate::disk::conformance::{DISK, VOLUME, append, authority, blocks, spec};
use crate::env::Env;
use crate::id::{Epoch, SegmentId, VolumeId};
use crate::rpc::RpcConfig;
use crate::shard::local::LocalClient;
use crate::shard::{Catalog, Mirror, ReadReply, SealedShard, ShardClient, ShardResult, SlotClass};
use crate::sim::pipe::PipeFaults;
use crate::sim::simulate;

fn told<T: std::fmt::Debug>(result: &ShardResult<T>) -> String {
    format!("{result:?}")
}

fn read(result: ShardResult<ReadReply>) -> String {
    let short = result.map(|reply| (crc32fast::hash(&reply.data), reply.data.len(), reply.crcs));
    told(&short)
}

/// A request that the seed chooses, in a small world where most errors there are come to pass.
async fn one(client: &dyn ShardClient, env: &Env) -> String {
    let pick = |bound: u64| u32::try_from(env.random_below(bound)).unwrap();
    let epoch = 1 + env.random_below(3);
    let (segment, block, count) = (1 + env.random_below(3), pick(5), pick(5));
    let block = if env.chance(1, 20) { u32::MAX - block } else { block };
    let creation = 10 + env.random_below(2);
    let sealed =
        SealedShard { volume: VOLUME, segment: SegmentId(segment), creation, blocks: pick(6) };
    let mirror = Mirror {
        revision: (Epoch(epoch), env.random_below(5)),
        data: Bytes::from(vec![7; if env.chance(1, 8) { 5000 } else { 100 }]),
    };
    let who = authority(epoch);
    let id = SegmentId(segment);
    match env.random_below(22) {
        0 => told(&client.info().await),
        1 => told(&client.fence(who, env.chance(1, 2).then_some(mirror)).await),
        2 => told(&client.probe(who).await),
        3 => told(&client.mirror(who, mirror).await),
        4 | 5 => {
            let mut spec = spec(segment, creation);
            spec.index = u8::from(env.chance(1, 9));
            if env.chance(1, 9) {
                spec.members.clear();
            }
            told(&client.create(who, spec, SlotClass::Client).await)
        }
        6..=9 => {
            let mut append =
                append(epoch, segment, block, 0x40 + u8::try_from(block % 8).unwrap(), 2);
            if env.chance(1, 9) {
                append.crcs = Rc::from([1, 2, 3]);
            }
            told(&client.append(append).await)
        }
        10 | 11 => {
            let crcs = env.chance(1, 3).then(|| vec![0x40; count as usize].into());
            told(&client.seal(who, id, count, crcs).await)
        }
        12 => told(&client.delete(who, id, creation).await),
        13 | 14 => read(client.read(VOLUME, id, block, count).await),
        15 => read(client.read_raw(VOLUME, id, block, count).await),
        16 => read(client.read_sealed(sealed, block, count).await),
        17 => told(&client.mend(who, sealed, block, blocks(0x41, 1), 0x41).await),
        18 => told(&client.list(VOLUME).await),
        19 => told(&client.volumes().await),
        20 => {
            let data = vec![3; 20_000 + count as usize].into();
            let catalog = Catalog { incarnation: 1, revision: env.random_below(50), data };
            told(&client.put_catalog(catalog).await)
                + &told(&client.get_catalog().await)
                + &told(&client.exercise(env.chance(1, 2)).await)
        }
        _ if env.chance(1, 10) => {
            let volume = if env.chance(1, 2) { VOLUME } else { VolumeId::default() };
            told(&client.drop_volume(volume).await) + &told(&client.forget_volume(volume).await)
        }
        _ => {
            let appends = (0..3).map(|n| client.append(append(epoch, segment, n * 2, 9, 2)));
            format!("{:?}", join_all(appends).await)
        }
    }
}

#[test]
fn the_same_answers_as_without() {
    let mut kinds = std::collections::BTreeSet::new();
    for seed in 0..60 {
        simulate(async {
            let net = Net::new(RpcConfig::default());
            let env = Env::from_seed(seed);
            // Whatever pieces the stream comes in.
            let faults = PipeFaults::random(Env::from_seed(seed));
            faults.write_max.set((seed % 3 > 0).then_some(1 << (3 + seed % 12)));
            net.next.borrow_mut().push_back(Rc::new(faults));
            let (_, behind) = net.disk(DISK).await;
            let remote = net.remote(RpcConfig::default());
            until_up(remote.peer()).await;
            let (_, beside) = fresh_disk(DISK).await;
            let direct = LocalClient::new(beside.clone());
            for step in 0..120 {
                let seed = env.random_u64();
                let there = one(&remote, &Env::from_seed(seed)).await;
                let here = one(&direct, &Env::from_seed(seed)).await;
                assert_eq!(there, here, "step {step}");
                kinds.insert(
                    here.split(['(', '{', ' ', ')', ',']).take(2).collect::<Vec<_>>().join(" "),
                );
            }
            behind.close("went away").await;
            beside.close("went away").await;
            for _ in 0..30 {
                let seed = env.random_u64();
                let there = one(&remote, &Env::from_seed(seed)).await;
                assert_eq!(there, one(&direct, &Env::from_seed(seed)).await);
            }
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert!(remote.peer().is_idle());
            let metrics = net.server.metrics();
            assert_eq!((metrics.violations.get(), metrics.running.get()), (0, 0));
            assert!(remote.peer().metrics().round_trip.get().is_some());
        });
    }
    for kind in ["Err Fenced", "Err Gone", "Err Exists", "Err WrongState", "Err WrongLength"] {
        assert!(kinds.contains(kind), "{kind} did not come to pass: {kinds:?}");
    }
    assert!(kinds.contains("Err Invalid") && kinds.len() > 10, "{kinds:?}");
}

#[test]
fn a_disk_that_is_not_there() {
    simulate(async {
        let net = Net::new(RpcConfig::default());
        let remote = net.remote(RpcConfig::default());
        let told = remote.info().await.unwrap_err().to_string();
        assert_eq!(told, format!("the disk is offline: node store has no disk {DISK}"));
    });
}
