//! The numbers of a node for a scrape.

use super::Node;
use super::space::Sums;
use crate::admin::types::{RepairProgress, Space};
use crate::export::nbd::wire::{Command, Errno};
use crate::obs::sample::{
    DiskSample, NbdSample, NodeSample, PoolSample, RpcPeerSample, RpcServerSample, Sample,
    ScrubSample, VolumeSample,
};
use crate::volume::head::HeadStats;

impl Node {
    /// Everything that is measured, now.
    pub(super) async fn sample(&self) -> Sample {
        // What is of the whole cluster, one node tells.
        let whole = self.is_manager();
        let views = if whole { self.gather().await } else { self.views() };
        let health = self.health(&views).health;
        let usages = self.usages();
        let sums = self.sums(&usages);
        let repair = self.repair_progress(None).unwrap_or_default();
        let balance = self.balance_progress(None).unwrap_or_default();
        let budget = self.registry.budget.report();
        Sample {
            node: NodeSample {
                uptime_seconds: self.started.elapsed().as_secs_f64(),
                health,
                repair_done_bytes: repair.bytes_done,
                repair_total_bytes: repair.bytes_total,
                repair_bytes_per_second: repair.bytes_per_second,
                rebuilt_bytes: self.registry.rebuilt_bytes.get(),
                balance_done_bytes: balance.bytes_done,
                balance_total_bytes: balance.bytes_total,
                balance_bytes_per_second: balance.bytes_per_second,
                balanced_bytes: self.registry.balanced_bytes.get(),
                background_limit_bytes_per_second: budget.limit,
                client_slowdown_per_mille: budget.slowdown,
            },
            disks: self.slots().iter().map(|slot| sample_disk(self, slot, &sums)).collect(),
            pools: views
                .pools
                .into_iter()
                .filter(|_| whole)
                .map(|pool| PoolSample {
                    pool: pool.name,
                    raw_bytes: pool.capacity.raw,
                    used_bytes: pool.capacity.used,
                    free_bytes: pool.capacity.free,
                    stored_bytes: pool.stored,
                    usable_bytes: pool.usable,
                    space: pool.space,
                    fill: pool.fill,
                    repair_remaining_bytes: remaining(pool.repair.as_ref()),
                })
                .collect(),
            volumes: self
                .volumes
                .borrow()
                .values()
                .map(|slot| sample_volume(slot, Self::volume_space(&usages, slot.id)))
                .collect(),
            nbd: self.sample_nbd(),
            rpc_peers: self.cluster.as_ref().map_or_else(Vec::new, |cluster| {
                cluster.peers().iter().map(RpcPeerSample::of).collect()
            }),
            rpc_server: self
                .rpc
                .borrow()
                .as_ref()
                .map_or_else(RpcServerSample::default, |counts| RpcServerSample::of(counts)),
        }
    }

    fn sample_nbd(&self) -> NbdSample {
        let nbd = self.nbd.borrow();
        let Some(nbd) = nbd.as_ref() else { return NbdSample::default() };
        NbdSample {
            connections: nbd.connections.get(),
            connections_accepted: nbd.connections_total.get(),
            requests: Command::ALL.iter().map(|c| nbd.command(*c).requests.get()).sum(),
            request_errors: Errno::ALL.iter().map(|errno| nbd.errors(*errno)).sum(),
            protocol_errors: nbd.protocol_errors.get(),
        }
    }
}

fn remaining(repair: Option<&RepairProgress>) -> u64 {
    repair.map_or(0, |repair| repair.bytes_total - repair.bytes_done)
}

fn sample_disk(node: &Node, slot: &std::rc::Rc<super::disks::DiskSlot>, sums: &Sums) -> DiskSample {
    let view = node.view_disk_with(slot, sums.disks.get(&slot.id).copied().unwrap_or_default());
    let counted = slot.counted();
    DiskSample {
        disk: view.id.to_string(),
        path: view.path,
        state: view.state,
        slots: view.slots.into(),
        slots_used: view.slots_used.into(),
        slot_bytes: view.slot_bytes,
        space: view.space,
        io_errors: view.errors.io,
        checksum_errors: view.errors.checksum,
        timeout_errors: view.errors.timeout,
        appends: counted.appends.count,
        append_bytes: counted.appends.bytes,
        append_us: counted.appends.latency_us,
        reads: counted.reads.count,
        read_bytes: counted.reads.bytes,
        read_us: counted.reads.latency_us,
        flushes: 0,
        timing: view.timing,
    }
}

fn sample_volume(slot: &super::volumes::VolumeSlot, space: Space) -> VolumeSample {
    let head = slot.serving();
    let counted = slot.counted();
    let report = head.as_ref().map(|head| head.report());
    let scrub = head.as_ref().map(|head| head.scrub_report()).unwrap_or_default();
    let stat = |counter: fn(&HeadStats) -> &std::cell::Cell<u64>| {
        head.as_ref().map_or(0, |head| counter(&head.stats).get())
    };
    VolumeSample {
        volume: slot.name(),
        size_bytes: head.as_ref().map_or(0, |head| head.size_bytes()),
        allocated_bytes: report.as_ref().map_or(0, |report| report.allocated_bytes),
        space,
        read_bytes: slot.stats.read_bytes.get(),
        write_bytes: slot.stats.write_bytes.get(),
        read_latency: slot.stats.reads.snapshot(),
        write_latency: slot.stats.writes.snapshot(),
        log_records: counted.records,
        checkpoint_sequence: report.as_ref().map_or(0, |report| report.checkpoint_sequence),
        failovers: counted.failovers,
        reduced_segments: head.as_ref().map_or(0, |head| head.reduced().0 as u64),
        repair_remaining_bytes: head
            .as_ref()
            .and_then(|head| head.repair_report())
            .map_or(0, |report| report.remaining_bytes()),
        rebuilt_bytes: stat(|stats| &stats.rebuilt_bytes),
        scrub: ScrubSample {
            running: scrub.running,
            read_bytes: stat(|stats| &stats.scrub_bytes),
            found: stat(|stats| &stats.scrub_found),
            repaired: stat(|stats| &stats.scrub_repaired),
            done_bytes: scrub.done_bytes,
            total_bytes: scrub.total_bytes,
            unchecked_bytes: scrub.unchecked_bytes,
            unrepairable: scrub.unrepairable,
            finished_at_seconds: scrub.finished_at.unwrap_or(0),
        },
    }
}
