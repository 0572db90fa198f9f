//! Every metric, declared once, and their text for Prometheus.
//!
//! Names follow the conventions of Prometheus: `sds_`, base units (`_bytes`, `_seconds`),
//! counters end in `_total`. A scrape sets every series from a [`Sample`] and renders at once, so
//! a thing that has gone leaves no series behind.

use prometheus::proto::{Bucket, Histogram, LabelPair, Metric, MetricFamily, MetricType};
use prometheus::{Counter, CounterVec, Encoder, Gauge, GaugeVec, Opts, Registry, TextEncoder};

use super::histogram::{BUCKET_BOUNDS_US, LatencySample};
use super::sample::{
    DiskSample, NbdSample, NodeSample, PoolSample, RpcPeerSample, RpcServerSample, Sample,
    VolumeSample,
};
use crate::admin::types::{DiskState, DiskTiming, Forecast, HealthLevel, Space};

const MICROSECOND: f64 = 1e-6;

const HEALTH_LEVELS: [HealthLevel; 3] =
    [HealthLevel::Ok, HealthLevel::Warning, HealthLevel::Critical];
const DISK_STATES: [DiskState; 7] = [
    DiskState::Online,
    DiskState::Slow,
    DiskState::Draining,
    DiskState::Offline,
    DiskState::SetAside,
    DiskState::Failed,
    DiskState::Missing,
];

macro_rules! declare {
    ($($(#[$doc:meta])* struct $group:ident {
        $($field:ident: $type:ident $name:literal $labels:tt $help:literal;)*
    })*) => {
        $($(#[$doc])* #[derive(Debug)] struct $group { $($field: $type,)* }
        impl $group {
            fn register(registry: &Registry) -> prometheus::Result<Self> {
                $(let $field = declare!(@make $type, $name, $labels, $help)?;
                registry.register(Box::new($field.clone()))?;)*
                Ok(Self { $($field),* })
            }
            fn reset(&self) {
                $(declare!(@reset $type, self.$field);)*
            }
        })*
    };
    (@make $type:ident, $name:literal, [], $help:literal) => {
        $type::with_opts(Opts::new($name, $help))
    };
    (@make $type:ident, $name:literal, $labels:tt, $help:literal) => {
        $type::new(Opts::new($name, $help), &$labels)
    };
    (@reset Gauge, $metric:expr) => { $metric.set(0.0) };
    (@reset $type:ident, $metric:expr) => { $metric.reset() };
}

declare! {
    struct NodeMetrics {
        uptime: Gauge "sds_node_uptime_seconds" [] "Time since the node started.";
        health: GaugeVec "sds_node_health" ["level"]
            "1 for the present level of health, 0 for the others.";
        info: GaugeVec "sds_build_info" ["version"] "1, with the version of the node.";
        repair_done: Gauge "sds_repair_done_bytes" []
            "Rebuilt so far in the present round of repair.";
        repair_pending: Gauge "sds_repair_pending_bytes" []
            "Still to be rebuilt in the present round of repair.";
        repair_rate: Gauge "sds_repair_rate_bytes" []
            "Rebuilt a second, over the last seconds.";
        rebuilt: Counter "sds_node_rebuilt_bytes_total" []
            "Bytes of the shards that the heads on the node rebuilt.";
        balance_done: Gauge "sds_balance_done_bytes" []
            "Moved so far to where there is room, in the present round of balance.";
        balance_pending: Gauge "sds_balance_pending_bytes" []
            "Still to be moved in the present round of balance.";
        balance_rate: Gauge "sds_balance_rate_bytes" []
            "Moved a second for balance, over the last seconds.";
        balanced: Counter "sds_node_balanced_bytes_total" []
            "Bytes of the shards that the heads on the node moved to where there is room.";
        limit: Gauge "sds_background_limit_bytes" []
            "What repair and scrub may read and write a second; +Inf while no client is at work.";
        slowdown: Gauge "sds_background_client_slowdown_ratio" []
            "What requests of clients take against what they take without repair and scrub; 0 if unknown.";
    }
    struct DiskMetrics {
        state: GaugeVec "sds_disk_state" ["disk", "path", "state"]
            "1 for the present state of the disk, 0 for the others.";
        capacity: GaugeVec "sds_disk_capacity_bytes" ["disk", "path"] "Bytes in all slots.";
        used: GaugeVec "sds_disk_used_bytes" ["disk", "path"] "Bytes in slots in use.";
        space: GaugeVec "sds_disk_space_bytes" ["disk", "path", "kind"]
            "Bytes of slots by kind: used, live, reserved, reclaimable.";
        slots: GaugeVec "sds_disk_slots" ["disk", "path"] "Slots of the disk.";
        slots_used: GaugeVec "sds_disk_slots_used" ["disk", "path"] "Slots in use.";
        errors: CounterVec "sds_disk_errors_total" ["disk", "path", "kind"]
            "Errors by kind: io, checksum, timeout.";
        appends: CounterVec "sds_disk_appends_total" ["disk", "path"] "Durable appends.";
        append_bytes: CounterVec "sds_disk_append_bytes_total" ["disk", "path"]
            "Bytes of durable appends.";
        append_seconds: CounterVec "sds_disk_append_seconds_total" ["disk", "path"]
            "Sum of the latencies of appends.";
        reads: CounterVec "sds_disk_reads_total" ["disk", "path"] "Reads.";
        read_bytes: CounterVec "sds_disk_read_bytes_total" ["disk", "path"] "Bytes of reads.";
        read_seconds: CounterVec "sds_disk_read_seconds_total" ["disk", "path"]
            "Sum of the latencies of reads.";
        flushes: CounterVec "sds_disk_flushes_total" ["disk", "path"] "Flushes of the device.";
        recent: GaugeVec "sds_disk_latency_recent_seconds" ["disk", "path", "class", "quantile"]
            "Latency of the latest requests by class: read, append, control.";
        peers: GaugeVec "sds_disk_peers_latency_recent_seconds"
            ["disk", "path", "class", "quantile"]
            "Median over the disk's peers of their latency of the latest requests.";
    }
    struct PoolMetrics {
        raw: GaugeVec "sds_pool_raw_bytes" ["pool"] "Raw space of the pool's disks.";
        used: GaugeVec "sds_pool_used_bytes" ["pool"] "Raw space in use.";
        free: GaugeVec "sds_pool_free_bytes" ["pool"] "Raw space that is free.";
        stored: GaugeVec "sds_pool_stored_bytes" ["pool"]
            "What clients stored, before redundancy.";
        usable: GaugeVec "sds_pool_usable_bytes" ["pool"]
            "What clients could store in all, before redundancy.";
        writable: GaugeVec "sds_pool_writable_bytes" ["pool"]
            "What clients can write before garbage has to be collected, before redundancy.";
        provisioned: GaugeVec "sds_pool_provisioned_bytes" ["pool"]
            "Sizes of the pool's volumes together.";
        thin: GaugeVec "sds_pool_thin_ratio" ["pool"]
            "Sizes of the pool's volumes as a share of what clients could store in all.";
        fill: GaugeVec "sds_pool_fill_ratio" ["pool"]
            "What cannot be given back, as a share of what clients may take.";
        level: GaugeVec "sds_pool_fill_level" ["pool"]
            "How full the pool is: 0 well, 1 a warning, 2 critical.";
        growth: GaugeVec "sds_pool_growth_rate_bytes" ["pool"]
            "Net growth on disks a second; absent while it is not known, 0 if there is none.";
        full_in: GaugeVec "sds_pool_full_in_seconds" ["pool"]
            "When the pool will be full at that rate; absent unless it grows.";
        space: GaugeVec "sds_pool_space_bytes" ["pool", "kind"]
            "Bytes of the slots of the pool's volumes by kind: used, live, reserved, reclaimable.";
        repair: GaugeVec "sds_pool_repair_pending_bytes" ["pool"] "Still to be rebuilt.";
    }
    struct VolumeMetrics {
        size: GaugeVec "sds_volume_size_bytes" ["volume"] "Size that clients see.";
        allocated: GaugeVec "sds_volume_allocated_bytes" ["volume"] "Bytes that have storage.";
        space: GaugeVec "sds_volume_space_bytes" ["volume", "kind"]
            "Bytes of slots by kind: used, live, reserved, reclaimable.";
        reads: CounterVec "sds_volume_reads_total" ["volume"] "Reads of clients.";
        writes: CounterVec "sds_volume_writes_total" ["volume"]
            "Writes, trims and zeroes of clients.";
        read_bytes: CounterVec "sds_volume_read_bytes_total" ["volume"] "Bytes read by clients.";
        write_bytes: CounterVec "sds_volume_write_bytes_total" ["volume"]
            "Bytes written by clients.";
        log_records: CounterVec "sds_volume_log_records_total" ["volume"] "Log records written.";
        checkpoint: GaugeVec "sds_volume_checkpoint_sequence" ["volume"]
            "Sequence of the newest checkpoint.";
        failovers: CounterVec "sds_volume_failovers_total" ["volume"]
            "Log segments left because a shard failed.";
        reduced: GaugeVec "sds_volume_reduced_segments" ["volume"] "Segments that lack shards.";
        repair: GaugeVec "sds_volume_repair_pending_bytes" ["volume"] "Still to be rebuilt.";
        rebuilt: CounterVec "sds_volume_rebuilt_bytes_total" ["volume"] "Bytes of rebuilt shards.";
    }
    struct ScrubMetrics {
        running: GaugeVec "sds_scrub_running" ["volume"] "1 while a round of scrub is under way.";
        read: CounterVec "sds_scrub_read_bytes_total" ["volume"] "Bytes read by scrubs.";
        found: CounterVec "sds_scrub_found_total" ["volume"]
            "Bad blocks and shards that scrubs found, and those of reads that were mended.";
        repaired: CounterVec "sds_scrub_repaired_total" ["volume"]
            "Of what was found, what was mended or built anew.";
        pending: GaugeVec "sds_scrub_pending_bytes" ["volume"]
            "Still to be read in the present round of scrub.";
        unchecked: GaugeVec "sds_scrub_unchecked_bytes" ["volume"]
            "Not checked in the present or last round, because its disk was away.";
        unrepairable: GaugeVec "sds_scrub_unrepairable" ["volume"]
            "Places at which no combination of shards yields what was written.";
        finished: GaugeVec "sds_scrub_finished_timestamp_seconds" ["volume"]
            "When the last round of scrub ended, seconds since 1970; 0 if none has.";
    }
    struct NbdMetrics {
        connections: Gauge "sds_nbd_connections" [] "Connections at present.";
        accepted: Counter "sds_nbd_connections_total" [] "Connections accepted.";
        requests: Counter "sds_nbd_requests_total" [] "Requests answered.";
        request_errors: Counter "sds_nbd_request_errors_total" []
            "Requests answered with an error.";
        protocol_errors: Counter "sds_nbd_protocol_errors_total" []
            "Connections closed because the client broke the protocol.";
    }
    struct RpcMetrics {
        up: GaugeVec "sds_rpc_peer_up" ["peer"] "1 while there is a connection to the node.";
        in_flight: GaugeVec "sds_rpc_peer_requests_in_flight" ["peer"] "Requests under way.";
        requests: CounterVec "sds_rpc_peer_requests_total" ["peer"] "Requests made.";
        unreachable: CounterVec "sds_rpc_peer_unreachable_total" ["peer"]
            "Requests whose outcome stayed unknown.";
        bytes: CounterVec "sds_rpc_peer_bytes_total" ["peer", "direction"]
            "Bytes sent and received.";
        connects: CounterVec "sds_rpc_peer_connects_total" ["peer"] "Connections made.";
        violations: CounterVec "sds_rpc_peer_protocol_errors_total" ["peer"]
            "Connections given up because the peer broke the protocol.";
        round_trip: GaugeVec "sds_rpc_peer_round_trip_seconds" ["peer"]
            "Round trip of pings, smoothed.";
        connections: Gauge "sds_rpc_server_connections" [] "Connections of other nodes.";
        refused: Counter "sds_rpc_server_refused_total" [] "Connections of nodes that were refused.";
        running: Gauge "sds_rpc_server_requests_running" [] "Requests of other nodes that run.";
        served: Counter "sds_rpc_server_requests_total" [] "Requests of other nodes answered.";
        errors: Counter "sds_rpc_server_request_errors_total" []
            "Requests of other nodes answered with an error.";
        broken: Counter "sds_rpc_server_protocol_errors_total" []
            "Connections closed because a node broke the protocol.";
    }
}

const READ_LATENCY: (&str, &str) =
    ("sds_volume_read_latency_seconds", "Latency of reads, as the volume sees it.");
const WRITE_LATENCY: (&str, &str) =
    ("sds_volume_write_latency_seconds", "Latency of writes, trims and zeroes until durable.");

/// The metrics of one node.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    node: NodeMetrics,
    disks: DiskMetrics,
    pools: PoolMetrics,
    volumes: VolumeMetrics,
    scrubs: ScrubMetrics,
    nbd: NbdMetrics,
    rpc: RpcMetrics,
}

impl Metrics {
    /// Declares all metrics.
    ///
    /// # Panics
    /// If two declarations in this file clash, which its test rules out.
    pub fn new() -> Self {
        Self::build().expect("the declarations of this file are valid and distinct")
    }

    fn build() -> prometheus::Result<Self> {
        let registry = Registry::new();
        Ok(Self {
            node: NodeMetrics::register(&registry)?,
            disks: DiskMetrics::register(&registry)?,
            pools: PoolMetrics::register(&registry)?,
            volumes: VolumeMetrics::register(&registry)?,
            scrubs: ScrubMetrics::register(&registry)?,
            nbd: NbdMetrics::register(&registry)?,
            rpc: RpcMetrics::register(&registry)?,
            registry,
        })
    }

    /// The text of a scrape (format 0.0.4): exactly what `sample` says, nothing older.
    ///
    /// # Errors
    /// Those of the encoder: a name or label that the format cannot carry; a defect.
    pub fn render(&self, sample: &Sample) -> prometheus::Result<String> {
        self.set_node(&sample.node);
        self.set_disks(&sample.disks);
        self.set_pools(&sample.pools);
        self.set_volumes(&sample.volumes);
        self.set_scrubs(&sample.volumes);
        self.set_nbd(&sample.nbd);
        self.set_rpc(&sample.rpc_peers, &sample.rpc_server);
        let mut families = self.registry.gather();
        if !sample.volumes.is_empty() {
            let volumes = &sample.volumes;
            families.push(histogram_family(READ_LATENCY, volumes, |v| &v.read_latency));
            families.push(histogram_family(WRITE_LATENCY, volumes, |v| &v.write_latency));
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&families, &mut text)?;
        String::from_utf8(text).map_err(|e| prometheus::Error::Msg(e.to_string()))
    }

    fn set_node(&self, sample: &NodeSample) {
        let metrics = &self.node;
        metrics.reset();
        metrics.uptime.set(sample.uptime_seconds);
        metrics.repair_done.set(sample.repair_done_bytes as f64);
        let pending = sample.repair_total_bytes.saturating_sub(sample.repair_done_bytes);
        metrics.repair_pending.set(pending as f64);
        metrics.repair_rate.set(sample.repair_bytes_per_second as f64);
        metrics.rebuilt.inc_by(sample.rebuilt_bytes as f64);
        metrics.balance_done.set(sample.balance_done_bytes as f64);
        let pending = sample.balance_total_bytes.saturating_sub(sample.balance_done_bytes);
        metrics.balance_pending.set(pending as f64);
        metrics.balance_rate.set(sample.balance_bytes_per_second as f64);
        metrics.balanced.inc_by(sample.balanced_bytes as f64);
        let limit = sample.background_limit_bytes_per_second;
        metrics.limit.set(limit.map_or(f64::INFINITY, |limit| limit as f64));
        metrics.slowdown.set(sample.client_slowdown_per_mille.unwrap_or(0) as f64 / 1000.0);
        metrics.info.with_label_values(&[env!("CARGO_PKG_VERSION")]).set(1.0);
        for level in HEALTH_LEVELS {
            let is = f64::from(u8::from(level == sample.health));
            metrics.health.with_label_values(&[&level.to_string()]).set(is);
        }
    }

    fn set_disks(&self, samples: &[DiskSample]) {
        let metrics = &self.disks;
        metrics.reset();
        for s in samples {
            let labels = [s.disk.as_str(), s.path.as_str()];
            for state in DISK_STATES {
                let labels = [labels[0], labels[1], &state.to_string()];
                let is = f64::from(u8::from(state == s.state));
                metrics.state.with_label_values(&labels).set(is);
            }
            let bytes = |slots: u64| slots as f64 * s.slot_bytes as f64;
            metrics.capacity.with_label_values(&labels).set(bytes(s.slots));
            metrics.used.with_label_values(&labels).set(bytes(s.slots_used));
            set_space(&metrics.space, &labels, s.space);
            metrics.slots.with_label_values(&labels).set(s.slots as f64);
            metrics.slots_used.with_label_values(&labels).set(s.slots_used as f64);
            for (kind, count) in [
                ("io", s.io_errors),
                ("checksum", s.checksum_errors),
                ("timeout", s.timeout_errors),
            ] {
                count_up(&metrics.errors, &[labels[0], labels[1], kind], count as f64);
            }
            count_up(&metrics.appends, &labels, s.appends as f64);
            count_up(&metrics.append_bytes, &labels, s.append_bytes as f64);
            count_up(&metrics.append_seconds, &labels, s.append_us as f64 * MICROSECOND);
            count_up(&metrics.reads, &labels, s.reads as f64);
            count_up(&metrics.read_bytes, &labels, s.read_bytes as f64);
            count_up(&metrics.read_seconds, &labels, s.read_us as f64 * MICROSECOND);
            count_up(&metrics.flushes, &labels, s.flushes as f64);
            let DiskTiming { read, append, control } = s.timing;
            for (class, figures) in [("read", read), ("append", append), ("control", control)] {
                let Some(f) = figures else { continue };
                for (quantile, own, peers) in
                    [("0.5", f.p50_us, f.peers_p50_us), ("0.99", f.p99_us, f.peers_p99_us)]
                {
                    let labels = [labels[0], labels[1], class, quantile];
                    let seconds = |us: u64| us as f64 * MICROSECOND;
                    metrics.recent.with_label_values(&labels).set(seconds(own));
                    metrics.peers.with_label_values(&labels).set(seconds(peers));
                }
            }
        }
    }

    fn set_pools(&self, samples: &[PoolSample]) {
        let metrics = &self.pools;
        metrics.reset();
        for s in samples {
            let labels = [s.pool.as_str()];
            metrics.raw.with_label_values(&labels).set(s.raw_bytes as f64);
            metrics.used.with_label_values(&labels).set(s.used_bytes as f64);
            metrics.free.with_label_values(&labels).set(s.free_bytes as f64);
            metrics.stored.with_label_values(&labels).set(s.stored_bytes as f64);
            metrics.usable.with_label_values(&labels).set(s.usable_bytes as f64);
            metrics.writable.with_label_values(&labels).set(s.fill.writable as f64);
            metrics.provisioned.with_label_values(&labels).set(s.fill.provisioned as f64);
            metrics.thin.with_label_values(&labels).set(s.fill.thin_percent as f64 / 100.0);
            metrics.fill.with_label_values(&labels).set(s.fill.percent as f64 / 100.0);
            let level = if s.fill.full { HealthLevel::Critical } else { s.fill.level };
            let number = HEALTH_LEVELS.iter().position(|known| *known == level);
            metrics.level.with_label_values(&labels).set(number.unwrap_or(0) as f64);
            match s.fill.forecast {
                Forecast::Unknown => {}
                Forecast::NotGrowing => metrics.growth.with_label_values(&labels).set(0.0),
                Forecast::Growing { bytes_per_day, full_in_s } => {
                    metrics.growth.with_label_values(&labels).set(bytes_per_day as f64 / 86_400.0);
                    metrics.full_in.with_label_values(&labels).set(full_in_s as f64);
                }
            }
            set_space(&metrics.space, &labels, s.space);
            metrics.repair.with_label_values(&labels).set(s.repair_remaining_bytes as f64);
        }
    }

    fn set_volumes(&self, samples: &[VolumeSample]) {
        let metrics = &self.volumes;
        metrics.reset();
        for s in samples {
            let labels = [s.volume.as_str()];
            metrics.size.with_label_values(&labels).set(s.size_bytes as f64);
            metrics.allocated.with_label_values(&labels).set(s.allocated_bytes as f64);
            set_space(&metrics.space, &labels, s.space);
            metrics.checkpoint.with_label_values(&labels).set(s.checkpoint_sequence as f64);
            metrics.reduced.with_label_values(&labels).set(s.reduced_segments as f64);
            metrics.repair.with_label_values(&labels).set(s.repair_remaining_bytes as f64);
            count_up(&metrics.rebuilt, &labels, s.rebuilt_bytes as f64);
            count_up(&metrics.reads, &labels, s.read_latency.count() as f64);
            count_up(&metrics.writes, &labels, s.write_latency.count() as f64);
            count_up(&metrics.read_bytes, &labels, s.read_bytes as f64);
            count_up(&metrics.write_bytes, &labels, s.write_bytes as f64);
            count_up(&metrics.log_records, &labels, s.log_records as f64);
            count_up(&metrics.failovers, &labels, s.failovers as f64);
        }
    }

    fn set_scrubs(&self, samples: &[VolumeSample]) {
        let metrics = &self.scrubs;
        metrics.reset();
        for VolumeSample { volume, scrub, .. } in samples {
            let labels = [volume.as_str()];
            metrics.running.with_label_values(&labels).set(f64::from(u8::from(scrub.running)));
            let pending = scrub.total_bytes.saturating_sub(scrub.done_bytes);
            metrics.pending.with_label_values(&labels).set(pending as f64);
            metrics.unchecked.with_label_values(&labels).set(scrub.unchecked_bytes as f64);
            metrics.unrepairable.with_label_values(&labels).set(scrub.unrepairable as f64);
            metrics.finished.with_label_values(&labels).set(scrub.finished_at_seconds as f64);
            count_up(&metrics.read, &labels, scrub.read_bytes as f64);
            count_up(&metrics.found, &labels, scrub.found as f64);
            count_up(&metrics.repaired, &labels, scrub.repaired as f64);
        }
    }

    fn set_rpc(&self, peers: &[RpcPeerSample], server: &RpcServerSample) {
        let metrics = &self.rpc;
        metrics.reset();
        for s in peers {
            let labels = [s.peer.as_str()];
            metrics.up.with_label_values(&labels).set(f64::from(u8::from(s.up)));
            metrics.in_flight.with_label_values(&labels).set(s.in_flight as f64);
            count_up(&metrics.requests, &labels, s.requests as f64);
            count_up(&metrics.unreachable, &labels, s.unreachable as f64);
            count_up(&metrics.bytes, &[labels[0], "sent"], s.sent_bytes as f64);
            count_up(&metrics.bytes, &[labels[0], "received"], s.received_bytes as f64);
            count_up(&metrics.connects, &labels, s.connects as f64);
            count_up(&metrics.violations, &labels, s.violations as f64);
            if let Some(us) = s.round_trip_us {
                metrics.round_trip.with_label_values(&labels).set(us as f64 * MICROSECOND);
            }
        }
        metrics.connections.set(server.connections as f64);
        metrics.refused.inc_by(server.refused as f64);
        metrics.running.set(server.running as f64);
        metrics.served.inc_by(server.requests as f64);
        metrics.errors.inc_by(server.errors as f64);
        metrics.broken.inc_by(server.violations as f64);
    }

    fn set_nbd(&self, sample: &NbdSample) {
        let metrics = &self.nbd;
        metrics.reset();
        metrics.connections.set(sample.connections as f64);
        metrics.accepted.inc_by(sample.connections_accepted as f64);
        metrics.requests.inc_by(sample.requests as f64);
        metrics.request_errors.inc_by(sample.request_errors as f64);
        metrics.protocol_errors.inc_by(sample.protocol_errors as f64);
    }
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

/// Sets a gauge of each kind of space.
fn set_space(gauges: &GaugeVec, labels: &[&str], space: Space) {
    let Space { used, live, reserved, reclaimable } = space;
    for (kind, bytes) in
        [("used", used), ("live", live), ("reserved", reserved), ("reclaimable", reclaimable)]
    {
        gauges.with_label_values(&[labels, &[kind]].concat()).set(bytes as f64);
    }
}

/// Sets a counter that was reset for this scrape.
fn count_up(counters: &CounterVec, labels: &[&str], value: f64) {
    counters.with_label_values(labels).inc_by(value);
}

/// The family of a histogram that was counted elsewhere, one series a volume.
fn histogram_family(
    (name, help): (&str, &str),
    volumes: &[VolumeSample],
    latency: impl Fn(&VolumeSample) -> &LatencySample,
) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(MetricType::HISTOGRAM);
    family.set_metric(volumes.iter().map(|v| histogram(&v.volume, latency(v))).collect());
    family
}

fn histogram(volume: &str, sample: &LatencySample) -> Metric {
    let mut cumulative = 0;
    let buckets = BUCKET_BOUNDS_US.iter().zip(sample.buckets).map(|(bound, count)| {
        cumulative += count;
        let mut bucket = Bucket::default();
        bucket.set_upper_bound(*bound as f64 * MICROSECOND);
        bucket.set_cumulative_count(cumulative);
        bucket
    });
    let mut histogram = Histogram::default();
    histogram.set_bucket(buckets.collect());
    histogram.set_sample_count(sample.count());
    histogram.set_sample_sum(sample.sum_us as f64 * MICROSECOND);
    let mut label = LabelPair::default();
    label.set_name("volume".to_owned());
    label.set_value(volume.to_owned());
    let mut metric = Metric::from_label(vec![label]);
    metric.set_histogram(histogram);
    metric
}
