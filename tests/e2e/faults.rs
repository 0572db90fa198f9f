//! Disks that are taken away while a client verifies.

use std::time::Duration;

use super::support::{Node, directory, finish, run, spawn};

const ARGS: [&str; 4] = ["--disk-size", "1G", "--volume", "vol0:256M"];

fn pause(seconds: u64) {
    std::thread::sleep(Duration::from_secs(seconds));
}

/// Overwrites a disk with garbage, as `dd conv=notrunc` would.
fn overwrite(node: &Node, index: usize) {
    let target = format!("of={}", node.disk(index).display());
    run("dd", &["if=/dev/urandom", &target, "bs=1M", "count=64", "conv=notrunc"]);
}

fn online(node: &Node, count: u64) {
    node.wait_json("disks online", &["status"], |status| status["disks"]["online"] == count);
}

#[test]
fn two_of_six_disks_are_lost_without_an_error() {
    let dir = directory();
    let node = Node::start(dir.path(), &ARGS);
    let uri = format!("--uri={}", node.uri);
    let job = ["--name=v", "--ioengine=nbd", &uri, "--size=192M", "--bsrange=4k-256k"];
    let verify =
        ["--verify=crc32c", "--verify_fatal=1", "--verify_backlog=256", "--verify_state_save=0"];
    let load = ["--rw=randrw", "--iodepth=8", "--time_based", "--runtime=24", "--rate_iops=400"];
    let fio = spawn("fio", &[&job[..], &verify, &load, &["--output-format=json"]].concat());
    pause(4);
    std::fs::File::options().write(true).open(node.disk(0)).expect("it").set_len(0).expect("cut");
    online(&node, 5);
    let status = node.json(&["status"]);
    assert_ne!(status["health"], "ok", "{status}");
    pause(4);
    overwrite(&node, 1);
    online(&node, 4);
    let text = finish("fio", fio);
    let from = text.find('{').expect("JSON");
    let report: serde_json::Value = serde_json::Deserializer::from_str(&text[from..])
        .into_iter()
        .next()
        .expect("one")
        .expect("JSON");
    let stall =
        |kind: &str| report["jobs"][0][kind]["clat_ns"]["max"].as_u64().unwrap_or(0) / 1_000_000;
    println!("longest stall: write {} ms, read {} ms", stall("write"), stall("read"));
    assert_eq!(report["jobs"][0]["error"], 0, "{report:#}");
    assert_ne!(node.json(&["status"])["health"], "ok");
    node.stop();
}

#[test]
fn with_a_third_disk_gone_clients_wait_and_nothing_is_lost() {
    let dir = directory();
    let node = Node::start(dir.path(), &ARGS);
    let write =
        ["-c", "write -P 17 0 64M", "-c", "write -P 18 100M 4k", "-c", "write -P 19 131072001 999"];
    run("qemu-io", &[&["-f", "raw", node.uri.as_str()][..], &write].concat());
    let away: Vec<_> = (0..3).map(|index| node.disk_id(index)).collect();
    for id in &away {
        node.ctl(&["disk", "offline", id]);
    }
    online(&node, 3);
    node.wait_json("critical", &["status"], |status| status["health"] == "critical");
    let read =
        ["-c", "read -P 17 0 64M", "-c", "read -P 18 100M 4k", "-c", "read -P 19 131072001 999"];
    let args = [&["-f", "raw", node.uri.as_str()][..], &read].concat();
    let mut waiting = spawn("qemu-io", &args);
    pause(3);
    for id in &away {
        node.ctl(&["disk", "online", id]);
    }
    online(&node, 6);
    waiting.wait().expect("it ends");
    let output = waiting.wait_with_output().expect("its output");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(!text.contains("Pattern verification failed"), "old or wrong data: {text}");
    assert!(!text.contains("failed"), "a client had an error instead of waiting: {text}");
    let text = run("qemu-io", &args);
    assert!(!text.contains("failed"), "{text}");
    node.wait_json("redundant again", &["status"], |status| status["health"] == "ok");
    node.stop();
}

#[test]
fn a_disk_that_vanishes_and_returns_is_used_again() {
    let dir = directory();
    let node = Node::start(dir.path(), &ARGS);
    run("qemu-io", &["-f", "raw", &node.uri, "-c", "write -P 5 0 32M"]);
    let away = dir.path().join("away");
    std::fs::rename(node.disk(4), &away).expect("it goes");
    online(&node, 5);
    run("qemu-io", &["-f", "raw", &node.uri, "-c", "write -P 6 8M 8M", "-c", "read -P 5 0 8M"]);
    pause(3);
    std::fs::rename(&away, node.disk(4)).expect("it comes back");
    online(&node, 6);
    node.wait_json("redundant again", &["status"], |status| status["health"] == "ok");
    let reads = ["-c", "read -P 5 0 8M", "-c", "read -P 6 8M 8M", "-c", "read -P 5 16M 16M"];
    run("qemu-io", &[&["-f", "raw", node.uri.as_str()][..], &reads].concat());
    node.stop();
}
