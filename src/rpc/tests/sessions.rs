//! Who may connect, which version is spoken, and how a server stops.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{Net, Wire, identity, until_down, until_up};
use crate::disk::conformance::{DISK, append, authority, spec};
use crate::env::Env;
use crate::id::{ClusterId, NodeId};
use crate::rpc::handshake::Target;
use crate::rpc::{ConnectionState, Identity, Peer, RpcConfig};
use crate::shard::{ShardClient, ShardError, SlotClass};
use crate::sim::simulate;

const ANY: Target = Target { node: None, core: 0 };

async fn refused(own: Identity, target: Target, ours: RpcConfig, theirs: RpcConfig, why: &str) {
    let net = Net::new(theirs);
    let peer = Peer::spawn("store", own, target, Wire(net.clone()), ours, Env::from_seed(1));
    until_down(&peer, why).await;
    assert!(net.server.metrics().refused.get() > 0);
}

#[test]
fn refusals_say_why() {
    simulate(async {
        let config = RpcConfig::default;
        let stranger = Identity { cluster: ClusterId::from_bytes([9; 16]), ..identity("head", 1) };
        let why = "refused by store: this is cluster c1c1c1c1-";
        refused(stranger, ANY, config(), config(), why).await;
        let other = Target { node: Some(NodeId::from_bytes([8; 16])), core: 0 };
        let why = "refused by store: this is node 02020202-";
        refused(identity("head", 1), other, config(), config(), why).await;
        let core = Target { node: None, core: 3 };
        let why = "core 3 is not served here, but core 0";
        refused(identity("head", 1), core, config(), config(), why).await;
        let newer = RpcConfig { versions: 2..=3, ..config() };
        let why = "versions 1 to 1 are understood here, and 2 to 3 there";
        refused(identity("head", 1), ANY, newer, config(), why).await;
        let full = RpcConfig { server_bytes: 1 << 10, ..config() };
        let why = "as many connections as there is memory for";
        refused(identity("head", 1), ANY, config(), full, why).await;
    });
}

/// A rolling upgrade, seen from both sides: the newest version that both know is spoken.
#[test]
fn the_newer_speaks_as_the_older() {
    for (ours, theirs, spoken) in [(1..=1, 1..=4, 1), (1..=4, 1..=1, 1), (1..=3, 2..=5, 3)] {
        simulate(async {
            let net = Net::new(RpcConfig { versions: theirs, ..RpcConfig::default() });
            net.disk(DISK).await;
            let remote = net.remote(RpcConfig { versions: ours, ..RpcConfig::default() });
            remote.info().await.unwrap();
            let state = remote.peer().connection().borrow().clone();
            let ConnectionState::Up { peer, .. } = state else { panic!("{state:?}") };
            assert_eq!((peer.version, peer.name.as_str()), (spoken, "store"));
        });
    }
}

#[test]
fn a_server_that_stops_finishes_what_it_began() {
    simulate(async {
        let net = Net::new(RpcConfig::default());
        let (device, _) = net.disk(DISK).await;
        let remote = net.remote(RpcConfig::default());
        remote.create(authority(1), spec(1, 10), SlotClass::Client).await.unwrap();
        device.set_slow(1000);
        let running = remote.append(append(1, 1, 0, 1, 1));
        sleep(Duration::from_millis(50)).await;
        net.stop.send_replace(true);
        sleep(Duration::from_millis(50)).await;
        let told = remote.info().await.unwrap_err();
        assert_eq!(told, ShardError::Offline("node store is stopping".into()));
        running.await.expect("it was begun");
        until_down(remote.peer(), "").await;
        assert_eq!(net.server.metrics().connections.get(), 0);
    });
}

#[test]
fn a_connection_is_closed_with_its_last_holder() {
    simulate(async {
        let net = Net::new(RpcConfig::default());
        net.disk(DISK).await;
        let remote = net.remote(RpcConfig::default());
        until_up(remote.peer()).await;
        let asked = remote.info();
        assert_eq!(net.server.metrics().connections.get(), 1);
        drop(asked);
        drop(remote);
        sleep(Duration::from_secs(1)).await;
        assert_eq!(net.server.metrics().connections.get(), 0);
        assert_eq!(net.server.metrics().running.get(), 0);
    });
}

#[test]
fn a_newer_connection_of_a_core_takes_the_place_of_the_older() {
    simulate(async {
        let net = Net::new(RpcConfig::default());
        net.disk(DISK).await;
        let one = net.remote(RpcConfig::default());
        one.info().await.unwrap();
        // The node was restarted: another process with the same name.
        let env = Env::from_seed(2);
        let config = RpcConfig::default();
        let wire = Wire(net.clone());
        let other = Peer::spawn("store", identity("head", 1), ANY, wire, config, env);
        until_up(&other).await;
        until_down(one.peer(), "a newer connection has its place").await;
    });
}

#[test]
fn nobody_waits_long_for_a_server_that_is_away() {
    simulate(async {
        let net = Net::new(RpcConfig::default());
        net.unplugged.set(true);
        let remote = net.remote(RpcConfig::default());
        let began = Instant::now();
        assert_eq!(remote.info().await, Err(ShardError::Unreachable));
        let waited = began.elapsed();
        assert!(waited <= RpcConfig::default().down_patience + Duration::from_millis(100));
        // A disk that comes back within the patience is not noticed to have been away.
        net.unplugged.set(false);
        net.disk(DISK).await;
        until_up(remote.peer()).await;
        net.pipes.borrow().last().unwrap().cut();
        remote.info().await.unwrap();
        // One whose process died refuses connections.
        sleep(Duration::from_secs(2)).await;
        net.unplugged.set(true);
        net.pipes.borrow().last().unwrap().cut();
        sleep(Duration::from_millis(1)).await;
        let began = Instant::now();
        assert_eq!(remote.info().await, Err(ShardError::Unreachable));
        assert!(began.elapsed() <= Duration::from_millis(150), "{:?}", began.elapsed());
    });
}
