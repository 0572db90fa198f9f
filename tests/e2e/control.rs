//! `sdsctl`, and input that is refused.

use super::support::{Client, Node, SMALL, directory, run};

#[test]
fn an_operators_day() {
    let dir = directory();
    let node = Node::start(dir.path(), &SMALL);
    let status = node.json(&["status"]);
    assert_eq!(status["health"], "ok", "{status}");
    assert_eq!(status["disks"]["online"], 6);

    node.ctl(&["pool", "create", "mirror", "--replicas", "3"]);
    node.ctl(&["volume", "create", "mirror/db", "--size", "64M"]);
    let uri = format!("nbd://{}/mirror/db", node.nbd);
    run("qemu-io", &["-f", "raw", &uri, "-c", "write -P 3 0 4M", "-c", "read -P 3 0 4M"]);
    node.ctl(&["volume", "resize", "mirror/db", "--size", "96M"]);
    assert_eq!(run("nbdinfo", &["--size", &uri]).trim(), (96 << 20).to_string());
    node.ctl(&["pool", "show", "mirror"]);
    node.ctl(&["volume", "show", "mirror/db"]);
    node.ctl(&["disk", "show", &node.disk_id(0)]);

    let refused = |args: &[&str], why: &str| {
        let (ok, text) = node.ctl_raw(args);
        assert!(!ok && text.contains(why), "{args:?}: {text}");
    };
    refused(&["volume", "create", "mirror/db", "--size", "64M"], "exists already");
    refused(&["volume", "create", "nopool/db", "--size", "64M"], "no such pool");
    refused(&["volume", "create", "mirror/a/b", "--size", "64M"], "not a name");
    refused(&["volume", "create", "mirror/x", "--size", "0"], "more than 0");
    refused(&["volume", "create", "mirror/x", "--size", "2000T"], "too large");
    refused(&["volume", "resize", "mirror/db", "--size", "1M"], "3MiB of it hold data");
    refused(&["pool", "create", "wide", "--ec", "16+4"], "needs 20 disks");
    refused(&["pool", "create", "n", "--replicas", "2", "--failure-domain", "node"], "one node");
    refused(&["pool", "rm", "mirror"], "holds volumes");
    refused(&["volume", "rm", "mirror/db"], "--yes");

    let attached = Client::attach(&node.nbd, "mirror/db").expect("it is exported");
    refused(&["volume", "rm", "mirror/db", "--yes"], "attached");
    refused(&["volume", "resize", "mirror/db", "--size", "1M", "--yes"], "attached");
    drop(attached);
    node.wait_json("the client is gone", &["volume", "ls"], |_| {
        node.ctl_raw(&["volume", "rm", "mirror/db", "--yes"]).0
    });
    node.wait_json("deleted everywhere", &["volume", "ls", "mirror"], |volumes| {
        volumes.as_array().is_some_and(Vec::is_empty)
    });
    assert!(Client::attach(&node.nbd, "mirror/db").is_err(), "it is exported no more");
    node.ctl(&["pool", "rm", "mirror"]);

    let extra = dir.path().join("extra.img").display().to_string();
    node.ctl(&["disk", "add", &extra, "--size", "512M"]);
    assert_eq!(node.json(&["status"])["disks"]["online"], 7);
    refused(&["disk", "add", &extra], "already");
    let disks = node.json(&["disk", "ls"]);
    let disks = disks.as_array().expect("a list");
    let id = disks.iter().find(|d| d["path"] == extra.as_str()).expect("listed")["id"].clone();
    node.ctl(&["disk", "rm", id.as_str().expect("text"), "--yes"]);
    assert_eq!(node.json(&["status"])["disks"]["total"], 6);
    node.stop();
    Node::start(dir.path(), &[]).stop();
}

#[test]
fn a_volume_shrinks_and_shows_zeroes_when_it_grows_again() {
    let dir = directory();
    let node = Node::start(dir.path(), &SMALL);
    let io = |commands: &[&str]| {
        let mut args = vec!["-f", "raw", node.uri.as_str()];
        args.extend(commands.iter().flat_map(|command| ["-c", command]));
        let text = run("qemu-io", &args);
        assert!(!text.contains("failed"), "{text}");
    };
    let slots = || -> u64 {
        let disks = node.json(&["disk", "ls"]);
        let disks = disks.as_array().expect("a list");
        disks.iter().map(|disk| disk["slots_used"].as_u64().expect("a number")).sum()
    };
    io(&["write -P 5 0 160M"]);
    let full = slots();
    let resize = |size: &str, yes: &[&str]| {
        node.ctl_code(&[&["volume", "resize", "default/vol0", "--size", size], yes].concat())
    };
    let (_, _, why) = resize("8M", &[]);
    assert!(why.contains("cuts off its last 248MiB") && why.contains("152MiB of it hold"), "{why}");
    // The server may take a moment to notice that its last client is gone.
    node.wait_json("nobody is attached", &["status"], |_| {
        let (code, said, why) = resize("8M", &["--yes"]);
        assert!(code == 0 || why.contains("attached"), "{why}");
        code == 0 && said.contains("has 8MiB now; its last 248MiB were cut off")
    });
    node.wait_json("its space comes back", &["volume", "ls"], |v| {
        v[0]["cutting"] == 0 && slots() < full / 4
    });
    assert_eq!(run("nbdinfo", &["--size", &node.uri]).trim(), (8 << 20).to_string());
    io(&["read -P 5 0 8M", "write -P 6 4M 4M"]);
    assert_eq!(resize("256M", &[]).0, 0);
    io(&["read -P 5 0 4M", "read -P 6 4M 4M", "read -P 0 8M 248M", "write -P 7 100M 1M"]);
    node.kill();
    let node = Node::start(dir.path(), &[]);
    let read = ["-c", "read -P 6 4M 4M", "-c", "read -P 0 8M 92M", "-c", "read -P 7 100M 1M"];
    let text = run("qemu-io", &[&["-f", "raw", node.uri.as_str()][..], &read].concat());
    assert!(!text.contains("failed"), "{text}");
    node.stop();
}

#[test]
fn a_disk_with_data_is_emptied_before_it_is_removed() {
    let dir = directory();
    let node = Node::start(dir.path(), &SMALL);
    let write = ["-c", "write -P 7 0 48M", "-c", "write -P 8 50M 4k"];
    run("qemu-io", &[&["-f", "raw", node.uri.as_str()][..], &write].concat());
    let first = node.disk_id(0);
    // Stripes of 4+2 lie on all six disks: nobody else can take its shards, so they become 3+2. The
    // order outlives the node.
    let (ok, text) = node.ctl_raw(&["disk", "rm", &first, "--yes"]);
    assert!(ok || text.contains("slots are still in use"), "{text}");
    node.stop();
    let node = Node::start(dir.path(), &[]);
    node.wait_json("removed", &["status"], |status| status["disks"]["total"] == 5);
    let volume = node.json(&["volume", "show", "default/vol0"]);
    assert_eq!(volume["narrowed"]["tolerates"], 2, "{volume}");
    assert_eq!(volume["narrowed"]["to_narrow_bytes"], 0, "{volume}");
    assert_eq!(volume["redundancy"]["state"], "full", "{volume}");
    let read = ["-c", "read -P 7 0 48M", "-c", "read -P 8 50M 4k"];
    let args = [&["-f", "raw", node.uri.as_str()][..], &read].concat();
    assert!(!run("qemu-io", &args).contains("failed"));
    node.stop();
}

#[test]
fn a_disk_is_drained_over_a_restart_and_taken_back() {
    let dir = directory();
    let node = Node::start(dir.path(), &SMALL);
    run("qemu-io", &["-f", "raw", &node.uri, "-c", "write -P 7 0 16M"]);
    let extra = dir.path().join("extra.img").display().to_string();
    node.ctl(&["disk", "add", &extra, "--size", "512M"]);
    let first = node.disk_id(0);
    assert!(node.ctl(&["disk", "drain", &first]).contains("is draining"));
    node.stop();
    let node = Node::start(dir.path(), &[]);
    assert_eq!(node.json(&["disk", "show", &first])["state"], "draining");
    node.wait_json("empty", &["disk", "show", &first], |disk| disk["slots_used"] == 0);
    let disk = node.json(&["disk", "show", &first]);
    assert!(disk["state_reason"].to_string().contains("it is empty"), "{disk}");
    assert!(node.ctl(&["disk", "online", &first]).contains("is online"));
    run("qemu-io", &["-f", "raw", &node.uri, "-c", "read -P 7 0 16M"]);
    node.wait_json("well", &["status"], |status| status["health"] == "ok");
    node.stop();
    let node = Node::start(dir.path(), &[]);
    assert_eq!(node.json(&["disk", "show", &first])["state"], "online");
    node.stop();
}

#[test]
fn contradictions_are_refused() {
    let dir = directory();
    let node = Node::start(dir.path(), &SMALL);
    let text = Node::refused(dir.path(), &[]);
    assert!(text.contains("another sdsd runs on"), "{text}");
    node.stop();
    for (args, why) in [
        (&["--ec", "2+1"][..], "pool default"),
        (&["--replicas", "3"], "pool default"),
        (&["--disks", "5"], "6 disks"),
        (&["--disk-size", "1G"], "not 1GiB"),
        (&["--volume", "vol0:1G"], "not 1GiB"),
        (&["--volume", "a/b/c:1G"], "not a name"),
        (&["--volume", "new:0"], "size 0"),
        (&["--ec", "4"], "K+M"),
    ] {
        let text = Node::refused(dir.path(), args);
        assert!(text.contains(why), "{args:?}: {text}");
    }
    Node::start(dir.path(), &["--ec", "4+2"]).stop();
}

#[test]
fn disks_that_are_not_what_they_should_be_are_told_and_not_used() {
    let (dir, other) = (directory(), directory());
    Node::start(dir.path(), &SMALL).stop();
    Node::start(other.path(), &SMALL).stop();
    let disk = |index: usize| dir.path().join(format!("disk{index}.img"));
    std::fs::copy(disk(0), disk(1)).expect("a copy with the same identity");
    std::fs::copy(other.path().join("disk2.img"), disk(2)).expect("a disk of another cluster");
    let node = Node::start(dir.path(), &[]);
    let disks = node.ctl(&["status"]);
    assert!(disks.contains("identity of disk"), "{disks}");
    assert!(disks.contains("another cluster"), "{disks}");
    let status = node.json(&["status"]);
    assert_eq!(status["disks"]["online"], 4, "{status}");
    run("qemu-io", &["-f", "raw", &node.uri, "-c", "write -P 3 0 1M", "-c", "read -P 3 0 1M"]);
    node.stop();
    std::fs::File::options().write(true).open(disk(3)).expect("it").set_len(1 << 20).expect("cut");
    let node = Node::start(dir.path(), &[]);
    let text = node.ctl(&["status"]);
    assert!(text.contains("formatted with"), "{text}");
    node.stop();
}

#[test]
fn every_list_is_json_and_every_mistake_is_told() {
    let dir = directory();
    let node = Node::start(dir.path(), &SMALL);
    run("qemu-io", &["-f", "raw", &node.uri, "-c", "write -P 3 0 1M"]);
    let disk = node.disk_id(0);
    for args in [
        &["status"][..],
        &["disk", "ls"],
        &["disk", "show", &disk],
        &["disk", "show", &disk[..8]],
        &["pool", "ls"],
        &["pool", "show", "default"],
        &["volume", "ls"],
        &["volume", "ls", "default"],
        &["volume", "show", "default/vol0"],
        &["inspect", "disk", node.disk(0).to_str().expect("UTF-8"), "--slots"],
    ] {
        let value = node.json(args);
        let is_list = args.get(1) == Some(&"ls");
        assert_eq!(value.is_array(), is_list, "{args:?}: {value}");
        assert!(value.as_array().is_none_or(|list| !list.is_empty()), "{args:?}");
    }
    let unmade = dir.path().join("unmade.img").display().to_string();
    let short = dir.path().join("short.img").display().to_string();
    std::fs::write(&short, [0; 8192]).expect("a file");
    let there = node.disk(0).display().to_string();
    for (args, code, why) in [
        (&["volum", "ls"][..], 2, "similar"),
        (&["volume", "lst"], 2, "'ls'"),
        (&["volume", "create", "x"], 2, "POOL/NAME"),
        (&["volume", "create", "default/a/b", "--size", "1G"], 2, "not a name"),
        (&["volume", "create", "default/x", "--size", "ten"], 2, "begin with a number"),
        (&["volume", "create", "default/x", "--size", "1025T"], 2, "too large"),
        (&["volume", "create", "default/x"], 2, "--size"),
        (&["volume", "show", "default/none"], 1, "sdsctl volume ls"),
        (&["volume", "rm", "default/vol0"], 2, "--yes"),
        (&["pool", "rm", "default"], 1, "holds volumes"),
        (&["disk", "rm", &disk], 2, "--yes"),
        (&["volume", "ls", "nopool"], 1, "sdsctl pool ls"),
        (&["pool", "create", "x"], 2, "--replicas"),
        (&["pool", "create", "x", "--ec", "9"], 2, "4+2"),
        (&["pool", "create", "a/b", "--replicas", "2"], 2, "not a name"),
        (&["pool", "create", "x", "--replicas", "2", "--min-size", "3"], 2, "out of range"),
        (&["pool", "create", "wide", "--ec", "16+4"], 1, "needs 20 disks, the node has 6"),
        (&["disk", "show", "zzzz"], 1, "sdsctl disk ls"),
        (&["disk", "add", &unmade], 1, "--size"),
        (&["disk", "add", "/nowhere/disk", "--size", "64M"], 1, "directory is not there"),
        (&["disk", "add", &unmade, "--size", "1M"], 1, "cannot be formatted"),
        (&["disk", "add", &unmade, "--size", "10"], 1, "multiple of 4096"),
        (&["disk", "add", &short, "--size", "64M"], 1, "8192 bytes, not 67108864"),
        (&["disk", "add", &short], 1, "cannot be formatted"),
        (&["disk", "add", &there], 1, "already"),
        (&["disk", "add", "/dev/null"], 1, "neither a regular file nor a block device"),
        (&["status", "-o", "xml"], 2, "table, json"),
        (&["inspect", "disk", &short], 1, "blank"),
        (&["inspect", "segment", &there, "default/none", "1"], 1, "inspect disk"),
    ] {
        let (found, out, err) = node.ctl_code(args);
        assert_eq!(found, code, "{args:?}: {err}");
        assert!(out.is_empty() && err.contains(why), "{args:?}: {out}{err}");
    }
    assert!(!std::path::Path::new(&unmade).exists(), "a refusal leaves no file behind");
    assert_eq!(node.json(&["status"])["health"], "ok", "nothing of it did harm");
    node.stop();
}
