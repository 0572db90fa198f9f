//! A volume that shrinks: what it had beyond its end is gone, whenever the node stops.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::sleep;

use super::{Machine, create_volume, node_target, run, until};
use crate::admin::error::ErrorCode;
use crate::admin::types::ResizeVolume;
use crate::export::TargetError;
use crate::node::Node;

const MIB: u64 = 1 << 20;

async fn resize(node: &Rc<Node>, size: u64, force: bool) -> Result<u64, ErrorCode> {
    let name = "p/v".parse().expect("a name");
    let volume = node.resize_volume(&name, ResizeVolume { size, force }).await;
    volume.map(|volume| volume.size).map_err(|error| error.code)
}

async fn served(node: &Rc<Node>) {
    let served = || node.volumes.borrow().values().all(|slot| slot.serving().is_some());
    until("served", Duration::from_mins(1), served).await;
}

async fn fill(node: &Rc<Node>) {
    let target = node_target(node).await;
    for at in 0..16 {
        let data = Bytes::from(vec![9; 1 << 20]);
        target.write(at * MIB, data).await.expect("written");
    }
}

/// Grows the volume to its old size again; what was cut off must read as zeroes, the rest as it was.
async fn check(node: &Rc<Node>, size: u64) {
    let cut = || node.list_volumes(None).expect("no pool is named")[0].cutting == 0;
    until("cut off", Duration::from_secs(30), cut).await;
    assert_eq!(resize(node, 16 * MIB, false).await, Ok(16 * MIB));
    let target = node_target(node).await;
    for at in 0..16 {
        let read = target.read(at * MIB, 1 << 20).await.expect("readable").concat();
        let byte = if at * MIB < size { 9 } else { 0 };
        assert!(read.iter().all(|found| *found == byte), "MiB {at}");
    }
    for head in node.heads() {
        head.checkpoint().await.expect("all is well");
        head.check().await.expect("consistent");
        let report = head.report();
        assert_eq!(report.allocated_bytes, size, "what was cut off takes no space");
    }
}

#[test]
fn a_shrink_is_confirmed_and_refused_while_a_client_is_attached() {
    run(async || {
        let machine = Machine::new(4).await;
        let node = machine.start().await;
        create_volume(&node).await;
        fill(&node).await;
        let target = node_target(&node).await;
        assert_eq!(resize(&node, 4 * MIB, true).await, Err(ErrorCode::Conflict));
        drop(target);
        assert_eq!(resize(&node, 4 * MIB, false).await, Err(ErrorCode::ConfirmationRequired));
        assert_eq!(resize(&node, 4 * MIB, true).await, Ok(4 * MIB));
        let target = node_target(&node).await;
        assert_eq!(target.size(), 4 * MIB);
        let data = Bytes::from(vec![1; 4096]);
        assert_eq!(target.write(4 * MIB, data).await, Err(TargetError::OutOfRange));
        drop(target);
        check(&node, 4 * MIB).await;
    });
}

#[test]
fn a_shrink_that_is_cut_short_at_any_time_is_finished_by_the_next_head() {
    for micros in [0, 100, 300, 1000, 2000, 3000, 4000, 6000, 9000, 15_000, 25_000, 40_000, 80_000]
    {
        run(async || {
            let machine = Machine::new(4).await;
            let node = machine.start().await;
            create_volume(&node).await;
            fill(&node).await;
            // The head ends without notice; the cut goes on with the next.
            let shrunk = node.clone();
            let shrink =
                tokio::task::spawn_local(async move { resize(&shrunk, 5 * MIB, true).await });
            sleep(Duration::from_micros(micros)).await;
            for head in node.heads() {
                head.abandon("a test");
            }
            shrink.await.expect("no panic").ok();
            sleep(Duration::from_secs(2)).await;
            served(&node).await;
            let size = node.list_volumes(None).expect("no pool is named")[0].size;
            assert!(size == 5 * MIB || size == 16 * MIB, "{size}");
            check(&node, size).await;
            node.stop().await;
            let node = machine.start().await;
            served(&node).await;
            check(&node, size).await;
        });
    }
}
