//! The metrics: names by Prometheus' conventions, a text that parses, numbers that arrive.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sds::admin::types::{
    DiskState, DiskTiming, Fill, Forecast, HealthLevel, LatencyFigures, Space,
};
use sds::obs::Metrics;
use sds::obs::histogram::{BUCKETS, LatencyHistogram};
use sds::obs::sample::{
    DiskSample, NbdSample, NodeSample, PoolSample, Sample, ScrubSample, VolumeSample,
};

#[derive(Debug, Default)]
struct Family {
    help: String,
    kind: String,
    /// (name, labels) and value.
    series: Vec<(String, BTreeMap<String, String>, f64)>,
}

/// A strict reader of the text format 0.0.4, for labels without escaped quotes or backslashes.
fn parse(text: &str) -> BTreeMap<String, Family> {
    assert!(text.ends_with('\n'));
    let mut families = BTreeMap::<String, Family>::new();
    let mut current = String::new();
    for line in text.lines() {
        if let Some(rest) = line.strip_prefix("# HELP ") {
            let (name, help) = rest.split_once(' ').expect("a help text");
            assert!(!families.contains_key(name), "{name} is declared twice");
            families.entry(name.to_owned()).or_default().help = help.into();
        } else if let Some(rest) = line.strip_prefix("# TYPE ") {
            let (name, kind) = rest.split_once(' ').expect("a type");
            let family = families.entry(name.to_owned()).or_default();
            assert!(family.kind.is_empty() && family.series.is_empty(), "{line}");
            family.kind = kind.into();
            current = name.into();
        } else {
            let (series, value) = line.rsplit_once(' ').expect("a value");
            let (name, labels) = match series.split_once('{') {
                Some((name, labels)) => (name, labels.strip_suffix('}').expect("closed labels")),
                None => (series, ""),
            };
            let labels = labels.split_terminator(',').map(|label| {
                let (key, value) = label.split_once('=').expect("a label");
                (key.to_owned(), value.trim_matches('"').to_owned())
            });
            let base = ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s));
            assert!(name == current || base == Some(&current), "{line} is not below its type");
            let value = value.parse().expect("a number");
            let family = families.get_mut(&current).expect("declared");
            family.series.push((name.to_owned(), labels.collect(), value));
        }
    }
    families
}

fn sample() -> Sample {
    let histogram = LatencyHistogram::default();
    histogram.observe(Duration::from_micros(100));
    histogram.observe(Duration::from_secs(100));
    let figures =
        LatencyFigures { p50_us: 8_000, p99_us: 16_000, peers_p50_us: 96, peers_p99_us: 256 };
    Sample {
        node: NodeSample {
            uptime_seconds: 12.5,
            health: HealthLevel::Warning,
            repair_done_bytes: 1,
            repair_total_bytes: 3,
            repair_bytes_per_second: 4,
            rebuilt_bytes: 21,
            balance_done_bytes: 22,
            balance_total_bytes: 24,
            balance_bytes_per_second: 25,
            balanced_bytes: 26,
            background_limit_bytes_per_second: None,
            client_slowdown_per_mille: Some(1050),
        },
        disks: vec![DiskSample {
            disk: "d1".into(),
            path: "/dev/sdb".into(),
            state: DiskState::Slow,
            slots: 10,
            slots_used: 4,
            slot_bytes: 1 << 20,
            space: Space { used: 4 << 20, live: 2 << 20, reserved: 1 << 20, reclaimable: 1 << 20 },
            io_errors: 1,
            checksum_errors: 2,
            timeout_errors: 3,
            appends: 5,
            append_bytes: 20_480,
            append_us: 1_500_000,
            reads: 6,
            read_bytes: 24_576,
            read_us: 3_000_000,
            flushes: 7,
            timing: DiskTiming { append: Some(figures), ..DiskTiming::default() },
        }],
        pools: vec![PoolSample {
            pool: "p".into(),
            raw_bytes: 1 << 40,
            fill: Fill {
                percent: 85,
                level: HealthLevel::Warning,
                thin_percent: 310,
                forecast: Forecast::Growing { bytes_per_day: 86_400, full_in_s: 7 },
                ..Fill::default()
            },
            ..PoolSample::default()
        }],
        volumes: vec![VolumeSample {
            volume: "p/v".into(),
            reduced_segments: 9,
            repair_remaining_bytes: 13,
            rebuilt_bytes: 14,
            write_latency: histogram.snapshot(),
            scrub: ScrubSample {
                found: 12,
                repaired: 10,
                unrepairable: 2,
                ..ScrubSample::default()
            },
            ..VolumeSample::default()
        }],
        nbd: NbdSample { connections: 2, requests: 11, ..NbdSample::default() },
        ..Sample::default()
    }
}

fn value(families: &BTreeMap<String, Family>, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let family = ["_bucket", "_sum", "_count"].iter().find_map(|s| name.strip_suffix(s));
    let family = families.get(name).or_else(|| families.get(family?))?;
    let matches = |has: &BTreeMap<String, String>| {
        labels.iter().all(|(key, value)| has.get(*key).is_some_and(|v| v == value))
    };
    family.series.iter().find(|(n, has, _)| n == name && matches(has)).map(|(_, _, value)| *value)
}

#[test]
fn names_follow_the_conventions() {
    let families = parse(&Metrics::new().render(&sample()).unwrap());
    assert!(families.len() > 30, "all groups are there");
    for (name, family) in &families {
        let words: Vec<_> = name.split('_').collect();
        assert_eq!(words[0], "sds", "{name}");
        assert!(
            words.iter().all(|w| !w.is_empty()
                && w.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit())),
            "{name} is not snake case"
        );
        for unit in ["ms", "us", "milliseconds", "microseconds", "kb", "mb", "percent", "kib"] {
            assert!(!words.contains(&unit), "{name} is not in base units");
        }
        let total = words.last() == Some(&"total");
        assert_eq!(family.kind == "counter", total, "{name}: counters alone end in _total");
        for unit in ["bytes", "seconds"] {
            if let Some(at) = words.iter().position(|w| *w == unit) {
                assert_eq!(at + 1 + usize::from(total), words.len(), "{name}: the unit is last");
            }
        }
        assert!(family.help.ends_with('.') && family.help.len() > 5, "{name}: {:?}", family.help);
        assert!(!family.series.is_empty(), "{name} has a series");
        let distinct: BTreeSet<_> = family.series.iter().map(|(n, l, _)| (n, l)).collect();
        assert_eq!(distinct.len(), family.series.len(), "{name}: a series twice");
    }
}

#[test]
fn numbers_arrive_and_scrapes_do_not_add_up() {
    let metrics = Metrics::new();
    let first = metrics.render(&sample()).unwrap();
    assert_eq!(metrics.render(&sample()).unwrap(), first, "a scrape changes nothing");
    let families = parse(&first);
    let disk = [("disk", "d1"), ("path", "/dev/sdb")];
    let volume = [("volume", "p/v")];
    for (name, labels, expected) in [
        ("sds_node_uptime_seconds", &[][..], 12.5),
        ("sds_node_health", &[("level", "warning")], 1.0),
        ("sds_node_health", &[("level", "ok")], 0.0),
        ("sds_repair_pending_bytes", &[], 2.0),
        ("sds_repair_rate_bytes", &[], 4.0),
        ("sds_node_rebuilt_bytes_total", &[], 21.0),
        ("sds_balance_done_bytes", &[], 22.0),
        ("sds_balance_pending_bytes", &[], 2.0),
        ("sds_balance_rate_bytes", &[], 25.0),
        ("sds_node_balanced_bytes_total", &[], 26.0),
        ("sds_background_client_slowdown_ratio", &[], 1.05),
        ("sds_volume_repair_pending_bytes", &volume, 13.0),
        ("sds_volume_rebuilt_bytes_total", &volume, 14.0),
        ("sds_disk_used_bytes", &disk, 4_194_304.0),
        ("sds_disk_errors_total", &[("kind", "checksum")], 2.0),
        ("sds_disk_append_seconds_total", &disk, 1.5),
        ("sds_disk_flushes_total", &disk, 7.0),
        ("sds_disk_state", &[("state", "slow")], 1.0),
        ("sds_pool_raw_bytes", &[("pool", "p")], 1_099_511_627_776.0),
        ("sds_disk_space_bytes", &[("path", "/dev/sdb"), ("kind", "live")], 2_097_152.0),
        ("sds_pool_fill_ratio", &[("pool", "p")], 0.85),
        ("sds_pool_fill_level", &[("pool", "p")], 1.0),
        ("sds_pool_thin_ratio", &[("pool", "p")], 3.1),
        ("sds_pool_growth_rate_bytes", &[("pool", "p")], 1.0),
        ("sds_pool_full_in_seconds", &[("pool", "p")], 7.0),
        ("sds_volume_reduced_segments", &volume, 9.0),
        ("sds_volume_writes_total", &volume, 2.0),
        ("sds_volume_write_latency_seconds_count", &volume, 2.0),
        ("sds_volume_write_latency_seconds_sum", &volume, 100.000_1),
        ("sds_volume_write_latency_seconds_bucket", &[("le", "0.000128")], 1.0),
        ("sds_volume_write_latency_seconds_bucket", &[("le", "+Inf")], 2.0),
        ("sds_scrub_found_total", &volume, 12.0),
        ("sds_scrub_repaired_total", &volume, 10.0),
        ("sds_scrub_unrepairable", &volume, 2.0),
        ("sds_nbd_connections", &[], 2.0),
        ("sds_nbd_requests_total", &[], 11.0),
    ] {
        let got = value(&families, name, labels);
        let got = got.unwrap_or_else(|| panic!("{name} {labels:?} lacks in\n{first}"));
        assert!((got - expected).abs() < 1e-9, "{name} {labels:?}: {got}, not {expected}");
    }
    let buckets = &families["sds_volume_write_latency_seconds"].series;
    assert_eq!(buckets.iter().filter(|(n, _, _)| n.ends_with("_bucket")).count(), BUCKETS);
}

#[test]
fn what_has_gone_leaves_nothing_behind() {
    let metrics = Metrics::new();
    metrics.render(&sample()).unwrap();
    let text = metrics.render(&Sample::default()).unwrap();
    assert!(!text.contains("p/v") && !text.contains("/dev/sdb"), "{text}");
    assert!(text.contains("\nsds_nbd_requests_total 0\n"), "{text}");
}

#[test]
fn odd_labels_are_escaped() {
    let mut sample = sample();
    sample.disks[0].path = "/a\"b\\c\nd".into();
    let text = Metrics::new().render(&sample).unwrap();
    assert!(text.contains(r#"path="/a\"b\\c\nd""#), "{text}");
}
