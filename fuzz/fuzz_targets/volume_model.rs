//! A volume against an array of bytes: any sequence of writes, trims, reads, checkpoints, crashes
//! and orderly stops, on simulated disks without faults. What was acknowledged is what is read.
#![no_main]

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use libfuzzer_sys::fuzz_target;
use sds::env::Env;
use sds::export::BlockTarget;
use sds::shard::Scheme;
use sds::sim::simulate;
use sds::sim::world::{Running, World, WorldConfig};
use sds::volume::head::HeadConfig;
use sds::volume::target::HeadTarget;
use tokio::task::LocalSet;

const VOLUME_BYTES: usize = 3 << 18;
/// Operations of one run: more find nothing new and take long.
const OPS_MAX: usize = 60;

fn config(choice: u8) -> WorldConfig {
    let schemes = [
        Scheme::replicated(2),
        Scheme { data: 2, parity: 1 },
        Scheme { data: 4, parity: 2 },
        Scheme { data: 3, parity: 1 },
    ];
    let scheme = schemes[usize::from(choice) % schemes.len()];
    let tiny = choice & 8 != 0;
    let head = HeadConfig {
        overlay_extents_max: if tiny { 32 } else { 400 },
        checkpoint_log_blocks: if tiny { 16 } else { 200 },
        cache_bytes: 16 * 4096,
        lease: Duration::from_millis(300),
        straggler: Duration::from_millis(200),
        io_timeout: Duration::from_secs(60),
        large_write_blocks: 2 + usize::from(choice >> 4),
        pending_bytes_max: 256 << 10,
        ..HeadConfig::default()
    };
    WorldConfig {
        scheme,
        disks: scheme.width() + 1,
        spares: 0,
        disk_bytes: (64 << 10) * 96 + (2 << 20),
        slot_bytes: 64 << 10,
        volume_bytes: VOLUME_BYTES as u64,
        neighbour_bytes: None,
        overcommitted: false,
        log_disks: scheme.width() + 1,
        min_size: 1,
        latency: Duration::from_micros(50)..Duration::from_millis(1),
        head,
    }
}

/// One operation: what to do, where, how long, and with which byte.
struct Op {
    what: u8,
    offset: usize,
    len: usize,
    fill: u8,
}

impl Op {
    fn new(bytes: [u8; 6]) -> Self {
        let [what, a, b, c, d, fill] = bytes;
        // Mostly whole blocks; the lowest bits of `d` say by how much to miss them.
        let skew = if d & 3 == 0 { usize::from(d >> 2) * 17 } else { 0 };
        let offset = (usize::from(u16::from_le_bytes([a, b])) * 4096 + skew) % VOLUME_BYTES;
        let blocks = if c & 15 == 15 { usize::from(c) } else { usize::from(c & 15) };
        let len = (blocks * 4096 + if d & 4 == 0 { skew } else { 4096 - skew.min(4095) }).max(1);
        Self { what, offset, len: len.min(VOLUME_BYTES - offset), fill }
    }

    /// Content that tells where it was written, and by which operation.
    fn content(&self) -> Vec<u8> {
        (self.offset..self.offset + self.len)
            .map(|at| self.fill ^ (at >> 9) as u8 ^ (at as u8).rotate_left(3))
            .collect()
    }
}

async fn apply(target: &HeadTarget, model: &mut [u8], op: &Op) {
    let offset = op.offset as u64;
    match op.what % 16 {
        0..8 => {
            let content = op.content();
            target.write(offset, Bytes::from(content.clone())).await.expect("a write");
            model[op.offset..op.offset + op.len].copy_from_slice(&content);
        }
        8..10 => {
            target.zero(offset, op.len as u64, op.what & 16 == 0).await.expect("zeroes");
            model[op.offset..op.offset + op.len].fill(0);
        }
        10 => {
            // Neighbours at once: they share records, and blocks at their seams.
            let piece = (op.len / 4).max(1);
            let content = op.content();
            let writes = content.chunks(piece).enumerate().map(|(i, chunk)| {
                target.write(offset + (i * piece) as u64, Bytes::copy_from_slice(chunk))
            });
            join_all(writes).await.into_iter().for_each(|result| result.expect("a write"));
            model[op.offset..op.offset + op.len].copy_from_slice(&content);
        }
        11 => {
            let extents = target.map(offset, op.len as u64, 1000).await.expect("a map");
            let mut at = op.offset;
            for extent in extents {
                let end = at + extent.len as usize;
                assert!(extent.allocated || model[at..end].iter().all(|&b| b == 0), "a hole");
                at = end;
            }
            assert_eq!(at, op.offset + op.len);
        }
        12 => target.0.checkpoint().await.expect("a checkpoint"),
        _ => read(target, model, op.offset, op.len).await,
    }
}

async fn read(target: &HeadTarget, model: &[u8], offset: usize, len: usize) {
    let pieces = target.read(offset as u64, len).await.expect("a read");
    let found = pieces.concat();
    assert_eq!(found.len(), len);
    if let Some(at) = found.iter().zip(&model[offset..]).position(|(a, b)| a != b) {
        panic!("byte {}: {:#x}, not {:#x}", offset + at, found[at], model[offset + at]);
    }
}

/// How a life of the node ended.
enum End {
    /// By a crash or a power cut, after so many operations.
    Stopped { done: usize, power_cut: bool },
    /// Every operation was done and everything was right.
    Clean,
}

/// A life of the node: up to an operation that ends it.
async fn live(world: &World, model: &mut [u8], ops: &[Op]) -> End {
    world.open_disks().await;
    let node = world.node();
    node.heal();
    let taken = world.take_over(&node).await.expect("no fault keeps it from starting");
    let Running { head, .. } = &*taken;
    let target = HeadTarget(head.clone());
    for (index, op) in ops.iter().enumerate() {
        if op.what < 248 {
            apply(&target, model, op).await;
            continue;
        }
        if op.what >= 252 {
            head.release().await.expect("an orderly stop");
        }
        return End::Stopped { done: index + 1, power_cut: op.fill & 1 == 1 };
    }
    read(&target, model, 0, VOLUME_BYTES).await;
    head.checkpoint().await.expect("a checkpoint");
    head.check().await.expect("invariants");
    End::Clean
}

async fn run(choice: u8, mut ops: &[Op]) {
    let env = Env::from_seed(u64::from(choice));
    let world = LocalSet::new().run_until(World::create(config(choice), env)).await;
    let mut model = vec![0; VOLUME_BYTES];
    loop {
        let process = LocalSet::new();
        let life = live(&world, &mut model, ops);
        let life = tokio::time::timeout(Duration::from_secs(3600), life);
        let end = process.run_until(life).await.expect("something waits for ever");
        let End::Stopped { done, power_cut } = end else { return };
        world.stop_devices(power_cut);
        drop(process);
        ops = &ops[done..];
    }
}

fuzz_target!(|data: &[u8]| {
    let Some((&choice, rest)) = data.split_first() else { return };
    let ops: Vec<Op> = rest.as_chunks::<6>().0.iter().take(OPS_MAX).map(|c| Op::new(*c)).collect();
    simulate(run(choice, &ops));
});
