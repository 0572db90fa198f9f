//! What counts as healthy: one pure function from what the node knows to a level with reasons.
//!
//! Invariants:
//! - `ok` exactly if there is no reason.
//! - Never `ok` while the redundancy of any volume is reduced or a disk does not serve.
//! - What may lose or has lost service (no redundancy left, a volume that is not served, a pool
//!   that cannot place a segment or is full) is `critical`.

use super::types::{
    Capacity, Disk, DiskCounts, DiskState, Fill, Forecast, Health, HealthLevel, Narrowed, Pool,
    PoolCapacity, Reason, Redundancy, RepairProgress, Smart, Space, Status, Volume, VolumeCounts,
    VolumeState,
};
use crate::units::ByteSize;

/// Room is told in whole units of this.
const MIB: u64 = 1 << 20;

/// Judges disks, pools and volumes.
pub fn assess(disks: &[Disk], pools: &[Pool], volumes: &[Volume]) -> Health {
    let mut reasons = Vec::new();
    reasons.extend(disks.iter().filter_map(assess_disk));
    for pool in pools {
        assess_pool(pool, &mut reasons);
    }
    for volume in volumes {
        assess_volume(volume, &mut reasons);
    }
    reasons.sort_by_key(|reason| std::cmp::Reverse(reason.level));
    let health = reasons.first().map_or(HealthLevel::Ok, |worst| worst.level);
    Health { health, reasons }
}

/// Puts a [`Status`] together; its health and counts follow from the lists. Repair and balance are how far
/// these are.
pub fn status(
    disks: &[Disk],
    pools: &[Pool],
    volumes: &[Volume],
    (repair, balance): (Option<RepairProgress>, Option<RepairProgress>),
    uptime_s: u64,
) -> Status {
    let Health { health, reasons } = assess(disks, pools, volumes);
    let mut by_pool: Vec<_> = pools
        .iter()
        .map(|p| PoolCapacity {
            name: p.name.clone(),
            capacity: p.capacity,
            space: p.space,
            fill: p.fill,
            repair: p.repair,
        })
        .collect();
    by_pool.sort_by(|a, b| a.name.cmp(&b.name));
    Status {
        health,
        reasons,
        capacity: total_capacity(disks),
        space: disks.iter().fold(Space::default(), |mut sum, disk| {
            sum.add(disk.space);
            sum
        }),
        pools: by_pool,
        disks: DiskCounts {
            online: count(disks, |d| d.state.is_online()),
            total: count(disks, |_| true),
        },
        volumes: VolumeCounts {
            total: count(volumes, |_| true),
            reduced: count(volumes, |v| v.redundancy != Redundancy::Full),
            unavailable: count(volumes, |v| {
                matches!(v.state, VolumeState::Opening | VolumeState::Stalled | VolumeState::Failed)
            }),
        },
        repair,
        balance,
        balance_waits: None,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        uptime_s,
    }
}

fn count<T>(items: &[T], matches: impl Fn(&T) -> bool) -> u32 {
    u32::try_from(items.iter().filter(|item| matches(item)).count()).unwrap_or(u32::MAX)
}

/// Raw space of the online disks.
fn total_capacity(disks: &[Disk]) -> Capacity {
    let mut sum = Capacity::default();
    for disk in disks.iter().filter(|d| d.state.is_online()) {
        let raw = u64::from(disk.slots).saturating_mul(disk.slot_bytes);
        sum.raw = sum.raw.saturating_add(raw);
        sum.used = sum.used.saturating_add(disk.used.min(raw));
    }
    sum.free = sum.raw - sum.used;
    sum
}

fn is_failing(smart: &Smart) -> bool {
    smart.passed == Some(false)
}

fn assess_disk(disk: &Disk) -> Option<Reason> {
    let because = disk.state_reason.as_ref().map(|r| format!(": {r}")).unwrap_or_default();
    let message = match disk.state {
        DiskState::Online | DiskState::Slow if disk.smart.as_ref().is_some_and(is_failing) => {
            format!("expects to fail, says its SMART data{because}")
        }
        DiskState::Online if disk.recent_errors.total() > 0 => format!(
            "had errors since it was opened: {} I/O, {} checksum, {} time-out",
            disk.recent_errors.io, disk.recent_errors.checksum, disk.recent_errors.timeout
        ),
        DiskState::Online => return None,
        DiskState::Slow => format!("is much slower than its peers{because}"),
        DiskState::Draining => format!("is being drained{because}"),
        DiskState::Offline => format!("is offline{because}"),
        DiskState::SetAside => format!("was set aside{because}"),
        DiskState::Failed => format!("failed{because}"),
        DiskState::Missing => format!("is missing{because}"),
    };
    Some(Reason { level: HealthLevel::Warning, subject: format!("disk {}", disk.place()), message })
}

fn assess_pool(pool: &Pool, reasons: &mut Vec<Reason>) {
    let mut add = |level, message| {
        reasons.push(Reason { level, subject: format!("pool {}", pool.name), message });
    };
    let needed = u32::from(pool.scheme.width());
    if pool.domains_online < u32::from(pool.min_size) {
        add(
            HealthLevel::Critical,
            format!(
                "{} of {needed} failure domains are online, below min_size {}: writes wait",
                pool.domains_online, pool.min_size
            ),
        );
    } else if pool.domains_online < needed {
        add(
            HealthLevel::Warning,
            format!(
                "{} of {needed} failure domains that {} needs are online",
                pool.domains_online, pool.scheme
            ),
        );
    }
    let Fill { percent, level, full, writable, thin_percent, overcommitted, forecast, .. } =
        pool.fill;
    let advice = "add disks, or trim, shrink or delete volumes";
    if full {
        add(HealthLevel::Critical, format!("is full: writes get no space; {advice}"));
    } else if level > HealthLevel::Ok {
        let soon = match forecast {
            Forecast::Growing { .. } => format!(", {forecast} at this rate"),
            _ => String::new(),
        };
        let room = ByteSize(writable / MIB * MIB);
        add(level, format!("is {percent} % full, room for {room} at once{soon}; {advice}"));
    }
    if overcommitted {
        let ratio = format!("{}.{:02}", thin_percent / 100, thin_percent % 100);
        add(
            HealthLevel::Warning,
            format!(
                "can be filled up: its volumes promise {ratio} times what it holds; add disks, or watch it"
            ),
        );
    }
}

fn assess_volume(volume: &Volume, reasons: &mut Vec<Reason>) {
    let mut add = |level, message| {
        reasons.push(Reason { level, subject: format!("volume {}", volume.name), message });
    };
    if let Redundancy::Reduced { segments, tolerates } = volume.redundancy {
        let level = if tolerates == 0 { HealthLevel::Critical } else { HealthLevel::Warning };
        add(
            level,
            format!(
                "redundancy is reduced in {segments} segments; the worst survives {tolerates} \
                 further losses"
            ),
        );
    }
    if let Some(narrowed) = volume.narrowed {
        add(HealthLevel::Warning, describe_narrowed(narrowed));
    }
    if volume.unrepairable > 0 {
        let count = volume.unrepairable;
        add(
            HealthLevel::Critical,
            format!("{count} places cannot be repaired: no combination of shards yields them"),
        );
    }
    let failures = volume.failures.join("; ");
    match volume.state {
        VolumeState::Online | VolumeState::Deleting if failures.is_empty() => {}
        VolumeState::Online | VolumeState::Deleting => add(HealthLevel::Warning, failures),
        VolumeState::Opening => {
            add(HealthLevel::Warning, with_details("is being opened", &failures));
        }
        VolumeState::Stalled => add(HealthLevel::Critical, with_details("writes wait", &failures)),
        VolumeState::Failed => add(HealthLevel::Critical, with_details("is not served", &failures)),
    }
}

/// A pool that has domains enough again has its data widened.
fn describe_narrowed(narrowed: Narrowed) -> String {
    let Narrowed { scheme, domains, narrow_bytes, to_narrow_bytes, tolerates } = narrowed;
    let left = if to_narrow_bytes > 0 {
        format!("{to_narrow_bytes} bytes are still to be narrowed")
    } else {
        format!("{narrow_bytes} bytes are narrower than the pool asks for")
    };
    format!(
        "is written as {scheme} over {domains} failure domains; {left}; it survives {tolerates} \
         further losses"
    )
}

fn with_details(what: &str, failures: &str) -> String {
    if failures.is_empty() { what.to_owned() } else { format!("{what}: {failures}") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::admin::types::{
        DiskErrors, DiskLatency, DiskTiming, FailureDomain, LatencyFigures, PoolScheme,
    };
    use crate::id::{DiskId, PoolId, VolumeId};

    fn disk(state: DiskState) -> Disk {
        Disk {
            node: String::new(),
            id: DiskId::default(),
            path: "/d".into(),
            state,
            state_reason: None,
            size: 1 << 30,
            slot_bytes: 1 << 20,
            slots: 1_000,
            slots_used: 10,
            used: 10 << 20,
            space: Space::default(),
            errors: DiskErrors::default(),
            recent_errors: DiskErrors::default(),
            latency: DiskLatency::default(),
            timing: DiskTiming::default(),
            smart: None,
        }
    }

    fn pool(domains_online: u32, level: HealthLevel) -> Pool {
        Pool {
            id: PoolId::default(),
            name: "p".into(),
            scheme: PoolScheme::Ec { data: 4, parity: 2 },
            failure_domain: FailureDomain::Disk,
            min_size: 2,
            domains_online,
            capacity: Capacity { raw: 100, used: 50, free: 50 },
            space: Space::default(),
            fill: Fill { level, ..Fill::default() },
            usable: 66,
            stored: 0,
            volumes: 1,
            repair: None,
        }
    }

    fn volume(state: VolumeState, redundancy: Redundancy) -> Volume {
        Volume {
            node: String::new(),
            id: VolumeId::default(),
            name: "p/v".into(),
            size: 1 << 30,
            cutting: 0,
            allocated: 0,
            space: Space::default(),
            epoch: "0.1".into(),
            redundancy,
            exports: vec![],
            state,
            failures: vec![],
            unrepairable: 0,
            narrowed: None,
            repair: None,
            balance: None,
        }
    }

    const LEVELS: [HealthLevel; 3] = [HealthLevel::Ok, HealthLevel::Warning, HealthLevel::Critical];
    const STATES: [DiskState; 7] = [
        DiskState::Online,
        DiskState::Slow,
        DiskState::Draining,
        DiskState::Offline,
        DiskState::SetAside,
        DiskState::Failed,
        DiskState::Missing,
    ];
    const VOLUME_STATES: [VolumeState; 5] = [
        VolumeState::Online,
        VolumeState::Opening,
        VolumeState::Stalled,
        VolumeState::Failed,
        VolumeState::Deleting,
    ];

    proptest! {
        #[test]
        fn ok_means_full_redundancy_and_the_worst_comes_first(
            disks in proptest::collection::vec(proptest::sample::select(&STATES[..]), 0..7),
            domains in 0..8_u32,
            fill in proptest::sample::select(&LEVELS[..]),
            state in proptest::sample::select(&VOLUME_STATES[..]),
            reduced in proptest::option::of((1..9_u64, 0..3_u8)),
        ) {
            let disks: Vec<_> = disks.into_iter().map(disk).collect();
            let redundancy = reduced.map_or(Redundancy::Full, |(segments, tolerates)| {
                Redundancy::Reduced { segments, tolerates }
            });
            let status =
                status(&disks, &[pool(domains, fill)], &[volume(state, redundancy)], (None, None), 0);
            prop_assert_eq!(status.health == HealthLevel::Ok, status.reasons.is_empty());
            prop_assert!(status.reasons.is_sorted_by(|a, b| a.level >= b.level));
            prop_assert!(status.reasons.iter().all(|r| r.level != HealthLevel::Ok));
            if status.health == HealthLevel::Ok {
                prop_assert_eq!(redundancy, Redundancy::Full);
                prop_assert_eq!(status.volumes.reduced + status.volumes.unavailable, 0);
                prop_assert_eq!(status.disks.online, status.disks.total);
                prop_assert!(domains >= 6 && fill == HealthLevel::Ok);
            }
            let critical = fill == HealthLevel::Critical
                || domains < 2
                || matches!(state, VolumeState::Stalled | VolumeState::Failed)
                || matches!(redundancy, Redundancy::Reduced { tolerates: 0, .. });
            prop_assert_eq!(status.health == HealthLevel::Critical, critical);
        }
    }

    #[test]
    fn a_disk_that_had_errors_is_named() {
        let mut bad = disk(DiskState::Online);
        bad.recent_errors.checksum = 1;
        let health = assess(&[disk(DiskState::Online), bad], &[], &[]);
        assert_eq!(health.health, HealthLevel::Warning);
        assert_eq!(health.reasons[0].subject, "disk /d");
        assert!(health.reasons[0].message.contains("1 checksum"));
    }

    #[test]
    fn a_pool_that_fills_up_says_what_to_do() {
        let mut filling = pool(6, HealthLevel::Warning);
        filling.fill.percent = 83;
        filling.fill.writable = 5 << 30;
        filling.fill.forecast = Forecast::Growing { bytes_per_day: 1, full_in_s: 3 * 86_400 };
        let message = assess(&[], &[filling.clone()], &[]).reasons[0].message.clone();
        assert!(message.contains("83 % full, room for 5GiB at once, full in 3 days"), "{message}");
        assert!(message.contains("add disks"), "{message}");
        filling.fill.full = true;
        filling.fill.overcommitted = true;
        filling.fill.thin_percent = 310;
        let health = assess(&[], &[filling], &[]);
        assert_eq!(health.health, HealthLevel::Critical);
        assert!(health.reasons[0].message.starts_with("is full"));
        assert!(health.reasons[1].message.contains("3.10 times"));
    }

    #[test]
    fn what_cannot_be_repaired_is_critical() {
        let mut lost = volume(VolumeState::Online, Redundancy::Full);
        lost.unrepairable = 2;
        let health = assess(&[], &[], &[lost]);
        assert_eq!(health.health, HealthLevel::Critical);
        assert!(health.reasons[0].message.starts_with("2 places"));
    }

    #[test]
    fn a_narrowed_volume_tells_what_is_left_to_do() {
        let mut volume = volume(VolumeState::Online, Redundancy::Full);
        let scheme = PoolScheme::Ec { data: 2, parity: 2 };
        let mut narrowed = Narrowed {
            scheme,
            domains: 4,
            narrow_bytes: 8192,
            to_narrow_bytes: 4096,
            tolerates: 1,
        };
        volume.narrowed = Some(narrowed);
        let message = |volume: &Volume| {
            let health = assess(&[], &[], std::slice::from_ref(volume));
            assert_eq!(health.health, HealthLevel::Warning);
            health.reasons[0].message.clone()
        };
        assert!(message(&volume).contains("ec 2+2 over 4 failure domains; 4096 bytes are still"));
        narrowed.to_narrow_bytes = 0;
        volume.narrowed = Some(narrowed);
        assert!(message(&volume).contains("8192 bytes are narrower"));
        assert!(message(&volume).contains("survives 1 further losses"));
    }

    #[test]
    fn a_disk_that_expects_to_fail_is_named() {
        let mut bad = disk(DiskState::Slow);
        bad.smart = Some(Smart { passed: Some(false), ..Smart::default() });
        bad.timing.read = Some(LatencyFigures::default());
        let health = assess(&[disk(DiskState::Online), bad], &[], &[]);
        assert_eq!(health.health, HealthLevel::Warning);
        assert!(health.reasons[0].message.contains("SMART"));
    }

    #[test]
    fn capacity_is_that_of_the_disks_that_serve() {
        let disks = [disk(DiskState::Online), disk(DiskState::Failed)];
        let capacity = status(&disks, &[], &[], (None, None), 0).capacity;
        assert_eq!(capacity, Capacity { raw: 1_000 << 20, used: 10 << 20, free: 990 << 20 });
    }
}
