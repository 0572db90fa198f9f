//! Several volumes of one pool, filled to the brim by the clients of others.

use std::process::Stdio;
use std::time::{Duration, Instant};

use super::support::{Client, Node, Noise, directory, run};

/// `ENOSPC` on the wire.
const NO_SPACE: u32 = 28;
/// Written at once.
const PIECE: usize = 1 << 20;

/// Runs a tool; whether it succeeded, and what it said.
fn attempt(tool: &str, args: &[&str]) -> (bool, String) {
    let mut command = std::process::Command::new(tool);
    let output = command.args(args).stdin(Stdio::null()).output().expect("tools/setup installs it");
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text += &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

fn content(seed: u64, piece: u64) -> Vec<u8> {
    Noise(seed * 1_000_003 + piece + 1).bytes(PIECE)
}

/// Slots in use on all disks.
fn slots_used(node: &Node) -> u64 {
    let disks = node.json(&["disk", "ls"]);
    let disks = disks.as_array().expect("a list");
    disks.iter().map(|disk| disk["slots_used"].as_u64().expect("a number")).sum()
}

/// Writes pieces from `from` on until there is no space; how many there are then.
fn fill(client: &mut Client, seed: u64, from: u64) -> u64 {
    for piece in from.. {
        let written = client.write(piece * PIECE as u64, &content(seed, piece));
        match written.expect("the node lives") {
            0 => {}
            NO_SPACE => return piece,
            errno => panic!("piece {piece}: error {errno}"),
        }
    }
    unreachable!("no disk is so large")
}

fn check(client: &mut Client, seed: u64, pieces: u64) {
    for piece in 0..pieces {
        let read = client.read(piece * PIECE as u64, PIECE).expect("the node lives");
        assert!(read == content(seed, piece), "piece {piece} of volume {seed} is not what it was");
    }
}

/// Writes a piece, as soon as there is space for it.
fn write_at_last(client: &mut Client, seed: u64, piece: u64) {
    let since = Instant::now();
    loop {
        let written = client.write(piece * PIECE as u64, &content(seed, piece));
        match written.expect("the node lives") {
            0 => return,
            NO_SPACE if since.elapsed() < Duration::from_secs(20) => {
                std::thread::sleep(Duration::from_millis(200));
            }
            errno => panic!("piece {piece}: error {errno} after {:?}", since.elapsed()),
        }
    }
}

fn remove(node: &Node, volume: &str) {
    // The server may take a moment to notice that its last client is gone.
    node.wait_json(volume, &["volume", "ls"], |_| {
        node.ctl_raw(&["volume", "rm", volume, "--yes"]).0
    });
}

#[test]
fn volumes_filled_to_the_brim_get_no_space_and_give_all_of_it_back() {
    let dir = directory();
    let node = Node::start(dir.path(), &["--disk-size", "48M", "--volume", "vol0:512M"]);
    remove(&node, "default/vol0");
    node.wait_json("nothing is used", &["disk", "ls"], |_| slots_used(&node) == 0);
    for name in ["fio", "qemu", "plain"] {
        node.ctl(&["volume", "create", &format!("default/{name}"), "--size", "512M"]);
    }
    let uri = |name: &str| format!("nbd://{}/{name}", node.nbd);

    // All at once fill what there is; each is told that there is no space.
    let mut plain = Client::attach(&node.nbd, "plain").expect("it is exported");
    for piece in 0..16 {
        assert_eq!(plain.write(piece * PIECE as u64, &content(7, piece)).expect("it lives"), 0);
    }
    run("qemu-io", &["-f", "raw", &uri("qemu"), "-c", "write -P 5 0 24M"]);
    let uri_fio = format!("--uri={}", uri("fio"));
    let job = ["--name=fill", "--ioengine=nbd", &uri_fio, "--size=512M", "--bs=64k", "--iodepth=8"];
    let (ok, text) = attempt("fio", &[&job[..], &["--rw=randwrite", "--randseed=3"]].concat());
    assert!(!ok && text.contains("No space left"), "{text}");
    let (_, text) = attempt("qemu-io", &["-f", "raw", &uri("qemu"), "-c", "write -P 6 24M 400M"]);
    assert!(text.contains("No space left"), "{text}");
    let pieces = fill(&mut plain, 7, 16);

    // The node lives; reads, trims and deletions go on, and writes when there is space.
    let status = node.json(&["status"]);
    assert_eq!(status["health"], "critical", "{status:#}");
    assert!(node.ctl(&["status"]).contains("add disks, or trim"), "{status:#}");
    check(&mut plain, 7, pieces);
    let (ok, text) = attempt("qemu-io", &["-f", "raw", &uri("qemu"), "-c", "read -P 5 0 24M"]);
    assert!(ok && !text.contains("failed"), "{text}");
    run("qemu-io", &["-f", "raw", &uri("qemu"), "-c", "discard 0 16M"]);
    for piece in pieces..pieces + 4 {
        write_at_last(&mut plain, 7, piece);
    }
    let pieces = fill(&mut plain, 7, pieces + 4);
    let before = slots_used(&node);
    remove(&node, "default/fio");
    node.wait_json("its space comes back", &["disk", "ls"], |_| slots_used(&node) < before * 3 / 4);
    write_at_last(&mut plain, 7, pieces);
    let more = fill(&mut plain, 7, pieces + 1);
    assert!(more > pieces + 32, "{pieces} pieces, then {more}");
    check(&mut plain, 7, more);
    let (ok, text) = attempt("qemu-io", &["-f", "raw", &uri("qemu"), "-c", "read -P 5 16M 8M"]);
    assert!(ok && !text.contains("failed"), "{text}");

    drop(plain);
    remove(&node, "default/plain");
    remove(&node, "default/qemu");
    node.wait_json("no slot leaks", &["disk", "ls"], |_| slots_used(&node) == 0);
    node.wait_json("all is well again", &["status"], |status| status["health"] == "ok");
    assert_eq!(node.json(&["volume", "ls"]).as_array().map(Vec::len), Some(0));
    node.stop();
}
