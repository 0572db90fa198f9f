//! A volume behind the RPC: the same answers as without, in any pieces; which head is asked, and what is
//! done about changes whose outcome is unknown.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use tokio::time::{Instant, sleep, timeout};

use super::{Net, VOLUME, until_up};
use crate::env::Env;
use crate::export::memory::MemoryTarget;
use crate::export::{BlockTarget, TargetError};
use crate::id::Epoch;
use crate::limits::RPC_VOLUME_PIECE_BYTES;
use crate::rpc::planted::{Bug, PLANTED};
use crate::rpc::{RemoteVolume, RpcConfig};
use crate::sim::pipe::PipeFaults;
use crate::sim::simulate;

const SIZE: u64 = 1 << 20;

/// A net whose server has the head of epoch 1.
fn served(config: RpcConfig, size: u64) -> (Rc<Net>, Rc<MemoryTarget>) {
    let net = Net::new(config);
    let target = Rc::new(MemoryTarget::new(size));
    net.shelf.serve(1, target.clone());
    (net, target)
}

fn error<T>(result: Result<T, TargetError>) -> TargetError {
    result.err().expect("an error")
}

/// A request that the seed chooses, in and around a small volume.
async fn one(target: &dyn BlockTarget, env: &Env) -> String {
    let small = |bound: u64| if env.chance(1, 2) { bound / 512 * 512 } else { bound };
    let offset = small(env.random_below(SIZE + 2000));
    let offset = if env.chance(1, 50) { u64::MAX - offset } else { offset };
    let len = small(env.random_below(60_000));
    let bytes = usize::try_from(len).unwrap();
    match env.random_below(8) {
        0..=2 => {
            let byte = u8::try_from(env.random_below(255)).unwrap();
            format!("{:?}", target.write(offset, vec![byte; bytes].into()).await)
        }
        3 | 4 => {
            let read = target.read(offset, bytes).await;
            let read = read.map(|pieces| pieces.concat());
            format!("{:?}", read.map(|data| (data.len(), crc32fast::hash(&data))))
        }
        5 => format!("{:?}", target.zero(offset, len, env.chance(1, 2)).await),
        6 => {
            let max = usize::try_from(1 + env.random_below(40)).unwrap();
            format!("{:?}", target.map(offset, len, max).await)
        }
        _ => format!("{:?} {} {}", target.flush().await, target.size(), target.read_only()),
    }
}

#[test]
fn the_same_answers_as_without() {
    let mut kinds = std::collections::BTreeSet::new();
    for seed in 0..40 {
        simulate(async {
            let (net, behind) = served(RpcConfig::default(), SIZE);
            let beside = MemoryTarget::new(SIZE);
            let env = Env::from_seed(seed);
            let faults = PipeFaults::random(Env::from_seed(seed));
            faults.write_max.set((seed % 3 > 0).then_some(1 << (4 + seed % 12)));
            net.next.borrow_mut().push_back(Rc::new(faults));
            let peer = net.peer(RpcConfig::default());
            let remote = RemoteVolume::attach(&peer, VOLUME).await.unwrap();
            for step in 0..150 {
                match step {
                    60 => [&*behind, &beside].map(|target| target.set_blocks_max(200)),
                    90 => [&*behind, &beside].map(|target| target.set_read_only(true)),
                    100 => [&*behind, &beside].map(|target| target.set_size(SIZE / 2)),
                    120 => {
                        let broken = TargetError::Io("the store burns".into());
                        [&*behind, &beside].map(|target| target.set_failure(Some(broken.clone())))
                    }
                    _ => [(), ()],
                };
                let seed = env.random_u64();
                let there = one(&remote, &Env::from_seed(seed)).await;
                let here = one(&beside, &Env::from_seed(seed)).await;
                // What a change of the size or the like did is told with the next good answer.
                if [90, 100].contains(&step) {
                    remote.flush().await.unwrap();
                } else {
                    assert_eq!(there, here, "step {step}");
                }
                let kind = |text: &str| text.split(' ').next().unwrap_or_default().to_owned();
                kinds.insert(if here.starts_with("Err") { here } else { kind(&here) });
            }
            assert!(peer.is_idle());
            let metrics = net.server.metrics();
            assert_eq!((metrics.violations.get(), metrics.running.get()), (0, 0));
        });
    }
    let all = format!("{kinds:?}");
    for kind in ["OutOfRange", "NoSpace", "ReadOnly", "the store burns", "MapExtent"] {
        assert!(all.contains(kind), "{kind} did not come to pass: {all}");
    }
}

#[test]
fn long_requests_go_in_pieces() {
    simulate(async {
        let most = RPC_VOLUME_PIECE_BYTES as u64;
        let (net, target) = served(RpcConfig::default(), 4 * most);
        let peer = net.peer(RpcConfig::default());
        let remote = RemoteVolume::attach(&peer, VOLUME).await.unwrap();
        let long: Bytes = (0..3 * most + 700).map(|n| u8::try_from(n % 251).unwrap()).collect();
        target.hold(true);
        let mut write = Box::pin(remote.write(100, long.clone()));
        assert!(timeout(Duration::from_secs(1), &mut write).await.is_err());
        assert!(target.running() >= 2, "side by side, as the window allows");
        target.hold(false);
        write.await.unwrap();
        let there = target.read(100, long.len()).await.unwrap().concat();
        assert!(there == long, "what was written");
        let read = remote.read(100, long.len()).await.unwrap();
        assert_eq!(read.len(), 4);
        assert!(read.concat() == long, "what was read");
        // Nothing of what does not fit is written, unless the volume has grown.
        let error = error(remote.write(2 * most, long.clone()).await);
        assert_eq!(error, TargetError::OutOfRange);
        let untouched = target.read(2 * most, 100).await.unwrap().concat();
        assert!(untouched == long.slice(2 * (4 << 20) - 100..2 * (4 << 20)), "untouched");
        target.set_size(8 * most);
        remote.write(2 * most, long.clone()).await.unwrap();
        assert_eq!(remote.size(), 8 * most);
    });
}

#[test]
fn in_a_narrow_window() {
    simulate(async {
        let config = RpcConfig { requests_max: 3, window_bytes: 40 << 10, ..RpcConfig::default() };
        let (net, _) = served(config, 16 << 20);
        let peer = net.peer(RpcConfig::default());
        let remote = RemoteVolume::attach(&peer, VOLUME).await.unwrap();
        let large: Bytes = vec![3; 5 << 20].into();
        let writes = (0..10).map(|n| remote.write(n << 20, large.clone()));
        let small = (0..50).map(|n| remote.write((15 << 20) + n * 512, vec![4; 512].into()));
        let reads = (0..10).map(|n| remote.read(n << 20, 1 << 20));
        let (writes, small, reads) =
            tokio::join!(join_all(writes), join_all(small), join_all(reads));
        assert!(writes.iter().chain(&small).all(Result::is_ok), "{writes:?} {small:?}");
        assert!(reads.iter().all(Result::is_ok));
        assert_eq!(net.server.metrics().violations.get(), 0);
        assert!(peer.is_idle());
    });
}

#[test]
fn a_volume_that_is_not_there_and_one_that_changes() {
    simulate(async {
        let net = Net::new(RpcConfig::default());
        let peer = net.peer(RpcConfig::default());
        let stopped = TargetError::Stopped;
        assert_eq!(error(RemoteVolume::attach(&peer, VOLUME).await), stopped);
        let target = Rc::new(MemoryTarget::new(SIZE));
        net.shelf.serve(4, target.clone());
        let remote = RemoteVolume::attach(&peer, VOLUME).await.unwrap();
        assert_eq!((remote.epoch(), remote.size(), remote.read_only()), (Epoch(4), SIZE, false));
        target.set_size(2 * SIZE);
        target.set_read_only(true);
        remote.flush().await.unwrap();
        assert_eq!((remote.size(), remote.read_only()), (2 * SIZE, true), "told with any answer");
        target.set_size(SIZE);
        let again = RemoteVolume::attach(&peer, VOLUME).await.unwrap();
        assert_eq!((again.size(), remote.size()), (SIZE, SIZE), "told to all");
        // Another head has its place: requests that are meant for the first do not reach it.
        target.set_read_only(false);
        net.shelf.serve(5, target.clone());
        assert_eq!(error(remote.read(0, 512).await), stopped);
        assert_eq!(error(remote.write(0, vec![1; 512].into()).await), stopped);
        assert_eq!(error(remote.zero(0, 512, true).await), stopped);
        assert_eq!(error(remote.map(0, 512, 1).await), stopped);
        assert_eq!(error(remote.flush().await), stopped);
        let newer = RemoteVolume::attach(&peer, VOLUME).await.unwrap();
        newer.write(0, vec![2; 512].into()).await.unwrap();
        assert_eq!(error(remote.write(0, vec![1; 512].into()).await), stopped);
        // An older one than was seen is not believed.
        net.shelf.serve(3, target);
        assert_eq!(error(RemoteVolume::attach(&peer, VOLUME).await), stopped);
        net.stop.send_replace(true);
        assert_eq!(error(RemoteVolume::attach(&peer, VOLUME).await), stopped);
    });
}

/// What `unknown` makes unknown is over before a later change of the same process begins.
fn nothing_lands_late(unknown: &impl AsyncFn(&Net, &RemoteVolume)) {
    simulate(async {
        let (net, target) = served(RpcConfig::default(), SIZE);
        let peer = net.peer(RpcConfig::default());
        let remote = RemoteVolume::attach(&peer, VOLUME).await.unwrap();
        target.hold(true);
        unknown(&net, &remote).await;
        until_up(&peer).await;
        // Reads and another one's writes do not tell; a write of this process waits.
        let again = RemoteVolume::attach(&peer, VOLUME);
        let mut later = Box::pin(remote.write(0, vec![2; 4096].into()));
        let waits = timeout(Duration::from_secs(5), &mut later).await;
        assert!(waits.is_err(), "the old copy is still in hand: {waits:?}");
        assert!(timeout(Duration::from_secs(5), again).await.is_err(), "as does a new attach");
        target.hold(false);
        later.await.unwrap();
        sleep(Duration::from_mins(2)).await;
        let data = target.read(0, 4096).await.unwrap().concat();
        assert!(data.iter().all(|byte| *byte == 2), "an old copy landed late: {}", data[0]);
        assert!(peer.is_idle());
        assert_eq!(net.server.metrics().running.get(), 0);
    });
}

#[test]
fn a_change_whose_answer_is_lost_does_not_land_late() {
    nothing_lands_late(&async |net, remote| {
        let mut lost = Box::pin(remote.write(0, vec![1; 4096].into()));
        assert!(timeout(Duration::from_millis(10), &mut lost).await.is_err());
        net.pipes.borrow()[0].cut();
        assert_eq!(lost.await, Err(TargetError::Stopped));
    });
}

#[test]
fn a_change_that_is_given_up_does_not_land_late() {
    nothing_lands_late(&async |_, remote| {
        for _ in 0..3 {
            let write = remote.write(0, vec![1; 4096].into());
            assert!(timeout(Duration::from_millis(10), write).await.is_err());
        }
    });
}

#[test]
fn a_change_that_takes_for_ever_does_not_land_late() {
    nothing_lands_late(&async |_, remote| {
        let write = remote.zero(0, 4096, false).await;
        assert_eq!(write, Err(TargetError::Stopped), "after the longest deadline");
    });
}

/// What is there in the end after a change whose connection ended while its head was looked for, one
/// that was made after it over a second connection, and the end of that.
fn looked_for_too_long(bug: Option<Bug>) -> u8 {
    PLANTED.set(bug);
    let byte = simulate(async {
        let (net, target) = served(RpcConfig::default(), SIZE);
        let peer = net.peer(RpcConfig::default());
        let remote = RemoteVolume::attach(&peer, VOLUME).await.unwrap();
        net.shelf.delay.set(Duration::from_secs(20));
        let mut lost = Box::pin(remote.write(0, vec![1; 4096].into()));
        assert!(timeout(Duration::from_millis(10), &mut lost).await.is_err());
        net.pipes.borrow()[0].cut();
        lost.await.unwrap_err();
        net.shelf.delay.set(Duration::ZERO);
        let began = Instant::now();
        remote.write(0, vec![2; 4096].into()).await.unwrap();
        assert!(began.elapsed() < Duration::from_secs(2), "nothing to wait for");
        net.pipes.borrow()[1].cut();
        sleep(Duration::from_mins(1)).await;
        target.read(0, 4096).await.unwrap().concat()[0]
    });
    PLANTED.set(None);
    byte
}

#[test]
fn a_change_that_is_not_begun_when_its_connection_ends_never_is() {
    assert_eq!(looked_for_too_long(None), 2, "an old copy landed late");
    assert_eq!(looked_for_too_long(Some(Bug::EndedAccepted)), 1, "the planted bug shows");
}

#[test]
fn a_process_that_starts_again_waits_for_what_it_left() {
    simulate(async {
        let (net, target) = served(RpcConfig::default(), SIZE);
        let peer = net.peer(RpcConfig::default());
        let remote = RemoteVolume::attach(&peer, VOLUME).await.unwrap();
        target.hold(true);
        let write = remote.write(0, vec![1; 4096].into());
        assert!(timeout(Duration::from_millis(10), write).await.is_err());
        drop((remote, peer));
        sleep(Duration::from_secs(1)).await;
        let peer = net.peer(RpcConfig::default());
        let mut attach = Box::pin(RemoteVolume::attach(&peer, VOLUME));
        assert!(timeout(Duration::from_secs(10), &mut attach).await.is_err());
        target.hold(false);
        attach.await.unwrap();
    });
}

/// Without checksums of its own, every bit that flips on the way must be noticed by the frame's.
#[test]
fn a_bit_may_flip_anywhere() {
    let all = work_over(PipeFaults::default());
    assert!(all > 30_000, "{all} bytes pass");
    for at in (0..1200).step_by(17).chain((1200..all).step_by(997)) {
        let faults = PipeFaults::default();
        faults.flip_at.set(Some(at));
        work_over(faults);
    }
}

#[test]
fn a_connection_may_be_cut_at_any_byte() {
    let all = work_over(PipeFaults::default());
    for at in (1..1200).step_by(13).chain((1200..all).step_by(797)) {
        let faults = PipeFaults::default();
        faults.cut_after.set(Some(at));
        work_over(faults);
    }
}

/// What an export does, over a first connection with `faults`; the bytes that passed over it.
fn work_over(faults: PipeFaults) -> u64 {
    simulate(async {
        let (net, target) = served(RpcConfig::default(), SIZE);
        let faults = Rc::new(faults);
        net.next.borrow_mut().push_back(faults.clone());
        let peer = net.peer(RpcConfig::default());
        let work = async {
            let Ok(remote) = RemoteVolume::attach(&peer, VOLUME).await else { return };
            for n in 0..4_u8 {
                let at = u64::from(n) * 8192 + 100;
                let written = remote.write(at, vec![n + 1; 8192].into()).await;
                let read = remote.read(at, 8192).await;
                if let (Ok(()), Ok(read)) = (&written, &read) {
                    assert!(read.concat().iter().all(|byte| *byte == n + 1), "what was written");
                }
                let known = |e: &TargetError| *e == TargetError::Stopped;
                assert!(written.as_ref().err().is_none_or(known), "{written:?}");
                assert!(read.as_ref().err().is_none_or(known), "{read:?}");
                drop(remote.map(0, SIZE, 100).await);
                let there = target.read(at, 8192).await.unwrap().concat();
                let clean = there.iter().all(|byte| *byte == there[0] && [0, n + 1].contains(byte));
                assert!(clean, "only what was written");
            }
        };
        timeout(Duration::from_mins(10), work).await.expect("no request hangs");
        sleep(Duration::from_mins(1)).await;
        assert!(peer.is_idle());
        assert_eq!(net.server.metrics().running.get(), 0);
        faults.written()
    })
}
