//! Windows, hung disks, futures that are dropped, and what must not wait for what.

use std::time::Duration;

use futures_util::future::join_all;
use tokio::time::{Instant, sleep, timeout};

use super::{Net, OTHER_DISK, until_up};
use crate::disk::conformance::{DISK, VOLUME, append, authority, spec};
use crate::id::SegmentId;
use crate::rpc::{RemoteDisk, RpcConfig};
use crate::shard::{ShardClient, ShardError, ShardSpec, SlotClass};
use crate::sim::simulate;

#[test]
fn appends_arrive_in_the_order_they_were_made() {
    simulate(async {
        let net = Net::new(RpcConfig { requests_max: 8, ..RpcConfig::default() });
        net.disk(DISK).await;
        let remote = net.remote(RpcConfig::default());
        let head = authority(1);
        for segment in 1..=5 {
            remote.create(head, spec(segment, 10), SlotClass::Client).await.unwrap();
        }
        let appends = (0..16)
            .flat_map(|n| (1..=5).map(move |segment| (segment, n)))
            .map(|(segment, n)| remote.append(append(1, segment, n, 5, 1)));
        let answers = join_all(appends).await;
        assert!(answers.iter().all(Result::is_ok), "{answers:?}");
        assert_eq!(net.server.metrics().violations.get(), 0, "the window is kept");
        assert!(remote.peer().is_idle());
    });
}

#[test]
fn large_and_small_in_a_narrow_window() {
    simulate(async {
        let config = RpcConfig { requests_max: 3, window_bytes: 40 << 10, ..RpcConfig::default() };
        let net = Net::new(config);
        net.disk(DISK).await;
        let remote = net.remote(RpcConfig::default());
        remote.create(authority(1), spec(1, 10), SlotClass::Client).await.unwrap();
        remote.append(append(1, 1, 0, 5, 15)).await.unwrap();
        let reads = (0..60).map(|n| remote.read(VOLUME, SegmentId(1), 0, 1 + n % 15));
        let probes = (0..60).map(|_| remote.probe(authority(1)));
        let (reads, probes) = tokio::join!(join_all(reads), join_all(probes));
        assert!(reads.iter().all(|read| read.as_ref().is_ok_and(|r| r.data[0] == 5)));
        assert!(probes.iter().all(Result::is_ok));
        assert_eq!(net.server.metrics().violations.get(), 0);
        assert!(remote.peer().is_idle());
    });
}

#[test]
fn a_hung_disk_holds_up_no_other() {
    simulate(async {
        let net = Net::new(RpcConfig::default());
        let (hung, _) = net.disk(DISK).await;
        net.disk(OTHER_DISK).await;
        let remote = net.remote(RpcConfig::default());
        let other = RemoteDisk::new(OTHER_DISK, remote.peer().clone());
        let head = authority(1);
        let elsewhere = |segment| ShardSpec { members: vec![OTHER_DISK], ..spec(segment, 10) };
        remote.create(head, spec(1, 10), SlotClass::Client).await.unwrap();
        other.create(head, elsewhere(1), SlotClass::Client).await.unwrap();
        other.append(append(1, 1, 0, 1, 15)).await.unwrap();
        hung.hang();
        // Far more than the window holds, and nobody waits for half of it.
        let mut held = Vec::new();
        for n in 0..2000_u32 {
            let create = remote.create(head, spec(u64::from(100 + n), 10), SlotClass::Client);
            if n % 2 == 0 {
                held.push(create);
            }
        }
        for _ in 0..20 {
            let read = timeout(Duration::from_secs(1), other.read(VOLUME, SegmentId(1), 0, 15));
            assert_eq!(read.await.expect("it does not wait").unwrap().crcs.len(), 15);
            timeout(Duration::from_millis(100), other.probe(head)).await.unwrap().unwrap();
        }
        let began = Instant::now();
        let answers = join_all(held).await;
        let unknown = answers.iter().filter(|a| **a == Err(ShardError::Unreachable)).count();
        let full = answers.iter().filter(|a| **a == Err(ShardError::NoSpace)).count();
        assert!(unknown >= 50 && unknown + full == 1000, "{unknown} {full}");
        assert!(began.elapsed() <= RpcConfig::default().deadline + Duration::from_secs(1));
        assert!(!remote.peer().is_idle(), "what was sent keeps its place until it is answered");
        hung.heal();
        sleep(Duration::from_mins(1)).await;
        assert!(remote.peer().is_idle());
        assert_eq!(net.server.metrics().running.get(), 0);
        assert_eq!(remote.peer().metrics().connects.get(), 1);
        remote.info().await.unwrap();
    });
}

#[test]
fn a_dropped_future_leaves_its_request_running() {
    simulate(async {
        let net = Net::new(RpcConfig::default());
        net.disk(DISK).await;
        let remote = net.remote(RpcConfig::default());
        until_up(remote.peer()).await;
        let head = authority(1);
        remote.create(head, spec(1, 10), SlotClass::Client).await.unwrap();
        for n in 0..10 {
            drop(remote.append(append(1, 1, n, 5, 1)));
            drop(remote.read(VOLUME, SegmentId(1), 0, 1));
        }
        remote.append(append(1, 1, 10, 5, 1)).await.unwrap();
        assert_eq!(remote.list(VOLUME).await.unwrap().shards[0].blocks, 11);
        sleep(Duration::from_secs(1)).await;
        assert!(remote.peer().is_idle());
    });
}

#[test]
fn what_no_message_holds_is_refused_at_once() {
    simulate(async {
        let net = Net::new(RpcConfig::default());
        net.disk(DISK).await;
        let remote = net.remote(RpcConfig::default());
        let invalid = |result| matches!(result, Err(ShardError::Invalid(_)));
        assert!(invalid(remote.read(VOLUME, SegmentId(1), 0, u32::MAX).await.map(drop)));
        let many = ShardSpec { members: vec![DISK; 1000], ..spec(1, 1) };
        assert!(invalid(remote.create(authority(1), many, SlotClass::Client).await));
        remote.info().await.unwrap();
        assert_eq!(net.server.metrics().violations.get(), 0);
    });
}

#[test]
fn a_hung_disk_answers_nothing_for_ever() {
    simulate(async {
        let config = RpcConfig { deadline: Duration::from_secs(3), ..RpcConfig::default() };
        let net = Net::new(config.clone());
        let (device, _) = net.disk(DISK).await;
        let remote = net.remote(config);
        remote.create(authority(1), spec(1, 10), SlotClass::Client).await.unwrap();
        device.hang();
        let began = Instant::now();
        assert_eq!(remote.append(append(1, 1, 0, 5, 1)).await, Err(ShardError::Unreachable));
        assert!((3000..3200).contains(&began.elapsed().as_millis()));
        // The connection is well, and so are requests that need no I/O.
        remote.probe(authority(1)).await.unwrap();
        assert_eq!(remote.peer().metrics().connects.get(), 1);
    });
}
