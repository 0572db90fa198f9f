//! Connections that break anywhere, change bits, hold everything back, or are garbage.

use std::rc::Rc;
use std::time::Duration;

use futures_util::future::join_all;
use proptest::prelude::*;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::time::{Instant, sleep, timeout};

use super::{Net, Wire, until_down, until_up};
use crate::disk::conformance::{DISK, VOLUME, append, authority, spec};
use crate::env::Env;
use crate::id::SegmentId;
use crate::rpc::{Dial, RpcConfig};
use crate::shard::{ShardClient, ShardError, SlotClass};
use crate::sim::pipe::PipeFaults;
use crate::sim::simulate;

/// Longer than anything may take.
const HANG: Duration = Duration::from_mins(2);

/// What a head does, over a first connection with `faults`; the bytes that passed over it. Requests may
/// fail, but as they may: outcome unknown, never wrong.
fn work_over(faults: PipeFaults, checked: bool) -> u64 {
    simulate(async {
        let config = RpcConfig { checked_payload: checked, ..RpcConfig::default() };
        let net = Net::new(config.clone());
        let (_, disk) = net.disk(DISK).await;
        let faults = Rc::new(faults);
        net.next.borrow_mut().push_back(faults.clone());
        let remote = net.remote(config);
        let head = authority(1);
        let work = async {
            let made = remote.create(head, spec(1, 10), SlotClass::Client).await;
            assert!(matches!(made, Ok(()) | Err(ShardError::Unreachable)), "{made:?}");
            let appends = (0..4).map(|n| {
                let byte = u8::try_from(n).unwrap();
                remote.append(append(1, 1, n * 4, byte, 4))
            });
            let appended = join_all(appends).await;
            let read = remote.read(VOLUME, SegmentId(1), 0, 1).await;
            if let Ok(reply) = read {
                assert!(reply.data.iter().all(|byte| *byte == 0), "only what was written");
            }
            let listed = remote.list(VOLUME).await;
            assert!(matches!(listed, Ok(_) | Err(ShardError::Unreachable)));
            appended
        };
        let appended = timeout(HANG, work).await.expect("no request hangs");
        // From now on all is good: what was acknowledged is there.
        faults.cut_after.set(None);
        faults.flip_at.set(None);
        sleep(Duration::from_secs(10)).await;
        until_up(remote.peer()).await;
        let listed = remote.list(VOLUME).await.unwrap();
        let length = listed.shards.first().map_or(0, |shard| shard.blocks);
        let good = appended.iter().take_while(|answer| answer.is_ok()).count();
        assert!(length >= 4 * u32::try_from(good).unwrap(), "{length} {appended:?}");
        if length > 0 {
            let reply = remote.read(VOLUME, SegmentId(1), 0, length).await.unwrap();
            for (n, block) in reply.data.chunks(4096).enumerate() {
                assert!(block.iter().all(|byte| usize::from(*byte) == n / 4), "block {n}");
            }
        }
        sleep(Duration::from_secs(20)).await;
        assert!(remote.peer().is_idle(), "no slot and no byte of the window is leaked");
        let metrics = net.server.metrics();
        assert_eq!((metrics.running.get(), metrics.connections.get()), (0, 1));
        disk.check().unwrap();
        faults.written()
    })
}

#[test]
fn a_connection_may_be_cut_at_any_byte() {
    let all = work_over(PipeFaults::default(), false);
    assert!(all > 70_000, "{all} bytes pass without a fault");
    // Every byte of headers at the beginning, and a sample of the rest.
    let cuts = (1..1200).step_by(7).chain((1200..all).step_by(1511));
    for at in cuts {
        let faults = PipeFaults::default();
        faults.cut_after.set(Some(at));
        work_over(faults, false);
    }
}

#[test]
fn a_bit_may_flip_anywhere() {
    let all = work_over(PipeFaults::default(), true);
    let places = (0..1200).step_by(11).chain((1200..all).step_by(1777));
    for at in places {
        let faults = PipeFaults::default();
        faults.flip_at.set(Some(at));
        work_over(faults, true);
    }
}

#[test]
fn a_slow_way_is_no_failure() {
    simulate(async {
        let net = Net::new(RpcConfig::default());
        net.disk(DISK).await;
        let faults = PipeFaults::default();
        faults.delay.set(Duration::from_millis(400));
        net.next.borrow_mut().push_back(Rc::new(faults));
        let remote = net.remote(RpcConfig::default());
        for _ in 0..5 {
            remote.info().await.unwrap();
        }
        sleep(Duration::from_secs(5)).await;
        let metrics = remote.peer().metrics();
        assert_eq!((metrics.connects.get(), metrics.unreachable.get()), (1, 0));
        let round_trip = metrics.round_trip.get().unwrap();
        assert!((800..900).contains(&round_trip.as_millis()), "{round_trip:?}");
    });
}

#[test]
fn a_silent_peer_is_left_and_found_again() {
    simulate(async {
        let net = Net::new(RpcConfig::default());
        net.disk(DISK).await;
        let remote = net.remote(RpcConfig::default());
        remote.info().await.unwrap();
        net.pipes.borrow()[0].hold(true);
        net.unplugged.set(true);
        let began = Instant::now();
        assert_eq!(remote.info().await, Err(ShardError::Unreachable));
        assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
        until_down(remote.peer(), "connection refused").await;
        // While it is down: a while of patience, then none.
        assert_eq!(remote.info().await, Err(ShardError::Unreachable));
        sleep(Duration::from_secs(3)).await;
        let began = Instant::now();
        assert_eq!(remote.info().await, Err(ShardError::Unreachable));
        assert_eq!(began.elapsed(), Duration::ZERO);
        net.unplugged.set(false);
        until_up(remote.peer()).await;
        assert!(began.elapsed() < Duration::from_secs(6), "the pauses have a bound");
        remote.info().await.unwrap();
        assert!(remote.peer().is_idle());
    });
}

#[test]
fn what_an_old_connection_holds_never_arrives_late() {
    simulate(async {
        let net = Net::new(RpcConfig::default());
        net.disk(DISK).await;
        let remote = net.remote(RpcConfig::default());
        let head = authority(1);
        remote.fence(head, None).await.unwrap();
        net.pipes.borrow()[0].hold(true);
        let create = remote.create(head, spec(1, 10), SlotClass::Client);
        assert_eq!(create.await, Err(ShardError::Unreachable));
        let delete = remote.delete(head, SegmentId(1), 10).await;
        assert_eq!(delete, Err(ShardError::Gone), "the disk confirms: there is none");
        net.pipes.borrow()[0].hold(false);
        sleep(Duration::from_secs(5)).await;
        assert!(remote.list(VOLUME).await.unwrap().shards.is_empty(), "the create came late");
    });
}

#[test]
fn a_reconnect_sends_nothing_twice() {
    simulate(async {
        let net = Net::new(RpcConfig::default());
        net.disk(DISK).await;
        let remote = net.remote(RpcConfig::default());
        remote.create(authority(1), spec(1, 10), SlotClass::Client).await.unwrap();
        let sent = remote.append(append(1, 1, 0, 1, 1));
        // Sent and taken up, but the answer is on its way when the connection breaks.
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        net.pipes.borrow()[0].cut();
        assert_eq!(sent.await, Err(ShardError::Unreachable));
        until_up(remote.peer()).await;
        sleep(Duration::from_secs(1)).await;
        let length = remote.list(VOLUME).await.unwrap().shards[0].blocks;
        assert!(length <= 1, "{length}");
        assert_eq!(remote.peer().metrics().connects.get(), 2);
    });
}

/// Speaks to a server after a good handshake, or without one; what it answered.
fn talk(bytes: &[u8], greeted: bool) -> Vec<u8> {
    simulate(async {
        let net = Net::new(RpcConfig::default());
        net.disk(DISK).await;
        let mut stream = Wire(net.clone()).dial().await.unwrap();
        if greeted {
            let target = crate::rpc::handshake::Target { node: None, core: 0 };
            let attempt = crate::rpc::handshake::Attempt { instance: 1, number: 1 };
            let own = super::identity("fuzz", 9);
            crate::rpc::handshake::connect(&mut stream, &own, &(1..=1), target, attempt)
                .await
                .unwrap();
        }
        let mut answer = Vec::new();
        let (mut input, mut output) = tokio::io::split(stream);
        let send = async {
            for piece in bytes.chunks(300) {
                if output.write_all(piece).await.is_err() {
                    return;
                }
            }
            drop(output.shutdown().await);
        };
        let receive = async { drop(input.read_to_end(&mut answer).await) };
        timeout(HANG, async { tokio::join!(send, receive) }).await.expect("the server hangs");
        sleep(Duration::from_secs(20)).await;
        let metrics = net.server.metrics();
        assert_eq!((metrics.connections.get(), metrics.running.get()), (0, 0));
        assert_eq!(metrics.window_bytes.get(), 0);
        answer
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_server_survives_garbage(seed: u64, len in 0..3000_usize, greeted: bool) {
        let env = Env::from_seed(seed);
        let bytes: Vec<u8> = (0..len).map(|_| env.random_bytes()[0]).collect();
        talk(&bytes, greeted);
    }
}

#[test]
fn garbage_is_told_what_it_is() {
    let answer = talk(b"GET / HTTP/1.1\r\nHost: store\r\nUser-Agent: something\r\n\r\n", true);
    let text = String::from_utf8_lossy(&answer);
    assert!(text.contains("the peer broke the protocol: garbage instead of a frame"), "{text}");
}

#[test]
fn faults_of_the_stream_do_not_stay() {
    simulate(async {
        let net = Net::new(RpcConfig::default());
        net.disk(DISK).await;
        let remote = net.remote(RpcConfig::default());
        for _ in 0..20 {
            until_up(remote.peer()).await;
            net.pipes.borrow().last().unwrap().cut();
            sleep(Duration::from_secs(10)).await;
        }
        assert_eq!(remote.peer().metrics().connects.get(), 21);
        until_up(remote.peer()).await;
        remote.info().await.unwrap();
        assert_eq!(net.server.metrics().connections.get(), 1);
    });
}
