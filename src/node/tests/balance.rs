//! A disk is added to a node that is alone.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::sleep;

use super::{Machine, create_volume_in, disk, run, until};
use crate::admin::types::{AddDisk, CreateVolume, PoolScheme};
use crate::export::ExportDirectory;
use crate::node::Node;
use crate::node::exports::Exports;
use crate::placement::balance::{START, is_even};
use crate::volume::head::HeadConfig;

const PIECE: u64 = 1 << 20;
const PIECES: u64 = 48;

fn fills(node: &Node) -> Vec<(u32, u32)> {
    let views = node.slots().into_iter().map(|slot| node.view_disk(&slot));
    views.map(|disk| (disk.slots_used, disk.slots)).collect()
}

fn content(piece: u64) -> Bytes {
    vec![u8::try_from(piece + 1).expect("few"); usize::try_from(PIECE).expect("small")].into()
}

#[test]
fn shards_move_to_a_disk_that_is_added_and_go_on_after_a_restart() {
    run(async || {
        let mut machine = Machine::new(4).await;
        machine.balance_every = HeadConfig::default().balance_every;
        let node = machine.start_with(3).await;
        create_volume_in(&node, PoolScheme::Replicas { copies: 2 }).await;
        let volume = CreateVolume { name: "p/w".into(), size: PIECES * PIECE };
        node.create_volume(volume).await.expect("there is room");
        let target = Exports(node.clone()).open("p/w").await.expect("it is exported");
        for piece in 0..PIECES {
            target.write(piece * PIECE, content(piece)).await.expect("written");
        }
        drop(target);
        let even = || is_even(fills(&node).into_iter(), START);
        until("three disks are filled alike", Duration::from_mins(1), even).await;
        let added = AddDisk { path: "/disk3".into(), size: None, force: false };
        node.add_disk(added).await.expect("it is blank");
        assert!(!is_even(fills(&node).into_iter(), START), "{:?}", fills(&node));
        let moved = |node: &Node| node.registry.balanced_bytes.get();
        until("it has begun", Duration::from_mins(1), || moved(&node) > 0).await;
        let shown = || node.views().balance.is_some_and(|balance| balance.bytes_total > 0);
        until("it is shown", Duration::from_mins(1), shown).await;
        // What is more pressing comes first.
        machine.device(1).vanish();
        let waits = || node.status(&node.views()).balance_waits.is_some();
        until("it waits", Duration::from_secs(30), waits).await;
        let before = moved(&node);
        machine.device(1).bring_back();
        until("it goes on", Duration::from_mins(2), || moved(&node) > before).await;
        node.stop().await;

        let node = machine.start().await;
        let even = || is_even(fills(&node).into_iter(), START) && disk(&node, 3).is_online();
        until("the disks are filled alike", Duration::from_mins(2), even).await;
        sleep(Duration::from_secs(20)).await;
        let before = moved(&node);
        sleep(Duration::from_mins(1)).await;
        assert_eq!(moved(&node), before, "nothing is left to be moved");
        assert!(even(), "{:?}", fills(&node));
        assert!(node.views().balance.is_none());
        let served = || node.volumes.borrow().values().all(|slot| slot.serving().is_some());
        until("it is served", Duration::from_secs(10), served).await;
        let target = Exports(node.clone()).open("p/w").await.expect("it is exported");
        for piece in 0..PIECES {
            let read = target.read(piece * PIECE, content(piece).len()).await.expect("read");
            assert!(read.concat() == content(piece), "piece {piece}");
        }
    });
}
