//! `sdsctl` run as a process: exit codes, tables, JSON, and what it says when it fails.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod admin_support;

use std::process::{Command, Output, Stdio};

use admin_support::{FakeNode, disk_id};
use sds::admin::error::{ErrorBody, ErrorCode};
use sds::admin::types::{Disk, Pool, Removed, Scrub, Status, Volume};

fn sdsctl(endpoint: &str, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_sdsctl"))
        .env("SDS_ENDPOINT", endpoint)
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Runs it, expects success, returns standard output.
fn ok(node: &FakeNode, args: &[&str]) -> String {
    let output = sdsctl(&node.endpoint(), args);
    assert_eq!(output.status.code(), Some(0), "{args:?}: {}", stderr(&output));
    assert_eq!(stderr(&output), "", "{args:?}");
    stdout(&output)
}

/// Runs it, expects this exit code and nothing on standard output, returns standard error.
fn fails(node: &FakeNode, code: i32, args: &[&str]) -> String {
    let output = sdsctl(&node.endpoint(), args);
    assert_eq!(output.status.code(), Some(code), "{args:?}: {}", stderr(&output));
    assert_eq!(stdout(&output), "", "{args:?}");
    stderr(&output)
}

fn json<T: serde::de::DeserializeOwned>(node: &FakeNode, args: &[&str]) -> T {
    let mut all = vec!["-o", "json"];
    all.extend(args);
    serde_json::from_str(&ok(node, &all)).unwrap()
}

#[test]
fn status_tells_health_by_text_and_exit_code() {
    let node = FakeNode::start();
    let text = ok(&node, &["status", "--exit-code"]);
    assert!(text.contains("health:   ok\n") && text.contains("up:       3m 20s\n"), "{text}");
    assert!(text.contains("6 of 6 online"), "{text}");
    let status: Status = json(&node, &["status"]);
    assert_eq!(status.disks.total, 6);

    ok(&node, &["disk", "offline", "/data/disk1"]);
    let text = ok(&node, &["status"]);
    assert!(text.contains("health:   warning\n"), "{text}");
    assert!(text.contains("volumes:  1, 1 reduced\n"), "{text}");
    assert!(text.contains("\nwarning   disk /data/disk1 is offline\n"), "{text}");
    let output = sdsctl(&node.endpoint(), &["status", "--exit-code"]);
    assert_eq!(output.status.code(), Some(4));
    assert!(stdout(&output).contains("warning"), "it is shown all the same");
}

#[test]
fn status_watch_repeats() {
    use std::io::{BufRead, BufReader};
    let node = FakeNode::start();
    let mut child = Command::new(env!("CARGO_BIN_EXE_sdsctl"))
        .args(["--endpoint", &node.endpoint(), "status", "--watch=1"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let seen = lines.filter(|line| line.as_ref().unwrap().starts_with("health:")).take(2).count();
    child.kill().unwrap();
    child.wait().unwrap();
    assert_eq!(seen, 2);
}

#[test]
fn disks() {
    let node = FakeNode::start();
    let table = ok(&node, &["disk", "ls"]);
    let lines: Vec<_> = table.lines().collect();
    assert_eq!(lines.len(), 7);
    let column = lines[0].find("STATE").unwrap();
    assert!(lines[1..].iter().all(|line| line[column..].starts_with("online")), "{table}");
    assert_eq!(ok(&node, &["disks", "list"]), table);
    let disks: Vec<Disk> = json(&node, &["disk", "ls"]);
    assert_eq!(disks.len(), 6);

    let id = disk_id(5).to_string();
    let text = ok(&node, &["disk", "show", &id]);
    assert!(text.contains("path:    /data/disk5\n"), "{text}");
    assert_eq!(ok(&node, &["disk", "show", "0505"]), text, "by the beginning of its id");
    assert_eq!(ok(&node, &["disk", "show", "/data/disk5"]), text, "by its path");
    assert!(fails(&node, 1, &["disk", "show", "05"]).contains("no disk \"05\""));
    assert!(fails(&node, 1, &["disk", "show", "/data/no"]).contains("sdsctl disk ls"));

    let added: Disk = json(&node, &["disk", "add", "/data/new", "--size", "4G"]);
    assert_eq!(added.path, "/data/new");
    let relative: Disk = json(&node, &["disk", "add", "some-file", "--size", "4GiB"]);
    assert!(relative.path.starts_with('/') && relative.path.ends_with("/some-file"));
    let error = fails(&node, 2, &["disk", "add", "/dev/foreign"]);
    assert!(error.contains("carries an ext4") && error.contains("add --yes"), "{error}");
    ok(&node, &["disk", "add", "/dev/foreign", "--yes"]);

    assert!(fails(&node, 2, &["disk", "rm", &id]).contains("--yes"));
    assert_eq!(ok(&node, &["disk", "rm", &id, "--yes"]), format!("removed disk {id}\n"));
    assert!(fails(&node, 1, &["disk", "offline", &id]).contains("no disk"));
    assert!(ok(&node, &["disk", "offline", "0404"]).ends_with("is offline\n"));
    assert!(ok(&node, &["disk", "online", "0404"]).ends_with("is online\n"));
}

#[test]
fn pools() {
    let node = FakeNode::start();
    assert_eq!(
        ok(&node, &["pool", "create", "fast", "--replicas", "3", "--failure-domain", "disk"]),
        "created pool fast (3 replicas)\n"
    );
    let pool: Pool = json(&node, &["pool", "create", "ec", "--ec", "2+1", "--min-size", "1"]);
    assert_eq!((pool.name.as_str(), pool.min_size), ("ec", 1));
    let table = ok(&node, &["pool", "ls"]);
    assert_eq!(table.lines().count(), 4);
    assert!(table.contains("default  ec 4+2"), "{table}");
    assert!(ok(&node, &["pool", "show", "fast"]).contains("survives 2 lost"));
    assert!(fails(&node, 1, &["pool", "create", "fast", "--replicas", "3"]).contains("exists"));
    assert!(fails(&node, 1, &["pool", "create", "wide", "--ec", "16+4"]).contains("more disks"));
    assert!(fails(&node, 1, &["pool", "rm", "default"]).contains("has volumes"));
    assert_eq!(ok(&node, &["pool", "delete", "fast"]), "removed pool fast\n");
    assert!(fails(&node, 1, &["pool", "show", "fast"]).contains("hint: see: sdsctl pool ls"));
    for args in [
        &["pool", "create", "x"][..],
        &["pool", "create", "x", "--ec", "4+2", "--replicas", "3"],
        &["pool", "create", "x", "--ec", "4"],
        &["pool", "create", "x", "--ec", "-4+2"],
        &["pool", "create", "x", "--ec", "17+1"],
        &["pool", "create", "x", "--replicas", "0"],
        &["pool", "create", "x", "--replicas", "-1"],
        &["pool", "create", "x", "--replicas", "3", "--min-size", "4"],
        &["pool", "create", "x", "--replicas", "3", "--failure-domain", "planet"],
        &["pool", "create", "a/b", "--replicas", "3"],
        &["pool", "create", "", "--replicas", "3"],
    ] {
        fails(&node, 2, args);
    }
}

#[test]
fn scrubs() {
    let node = FakeNode::start();
    let text = ok(&node, &["scrub", "status"]);
    assert!(text.contains("idle") && text.contains("2023-11-14T22:13:20Z"), "{text}");
    let text = ok(&node, &["scrub", "start"]);
    assert!(text.contains("running  1.00GiB  4.00GiB  25%  3m 20s"), "{text}");
    let scrubs: Vec<Scrub> = json(&node, &["scrub", "start", "--volume", "default/vol0"]);
    assert_eq!((scrubs.len(), scrubs[0].found, scrubs[0].repaired), (1, 3, 3));
    assert!(fails(&node, 1, &["scrub", "start", "--volume", "default/v9"]).contains("no volume"));
    fails(&node, 2, &["scrub", "start", "--volume", "v9"]);
}

#[test]
fn volumes() {
    let node = FakeNode::start();
    assert_eq!(
        ok(&node, &["volume", "create", "default/v", "--size", "10G"]),
        "created volume default/v of 10GiB\nattach it at nbd://127.0.0.1:10809/v\n"
    );
    let volume: Volume = json(&node, &["volume", "show", "default/v"]);
    assert_eq!(volume.size, 10 << 30);
    assert_eq!(ok(&node, &["volume", "ls"]).lines().count(), 3);
    assert_eq!(ok(&node, &["volumes", "list", "default"]).lines().count(), 3);
    assert!(fails(&node, 1, &["volume", "ls", "nowhere"]).contains("no pool nowhere"));
    let error = fails(&node, 1, &["volume", "create", "nowhere/v", "--size", "1G"]);
    assert!(error.contains("no pool nowhere"), "{error}");
    assert!(fails(&node, 1, &["volume", "create", "default/v", "--size", "1G"]).contains("exists"));

    let resized: Volume = json(&node, &["volume", "resize", "default/v", "--size", "20G"]);
    assert_eq!(resized.size, 20 << 30);
    assert!(fails(&node, 2, &["volume", "resize", "default/v", "--size", "1G"]).contains("--yes"));
    ok(&node, &["volume", "resize", "default/v", "--size", "1G", "--yes"]);

    assert_eq!(ok(&node, &["volume", "rm", "default/v"]), "removed volume default/v\n");
    let error = fails(&node, 2, &["volume", "rm", "default/vol0"]);
    assert!(error.contains("holds 1 GiB") && error.contains("add --yes"), "{error}");
    let removed: Removed = json(&node, &["volume", "delete", "default/vol0", "--yes"]);
    assert_eq!((removed.kind.as_str(), removed.name.as_str()), ("volume", "default/vol0"));
    assert!(fails(&node, 1, &["volume", "show", "default/vol0"]).contains("no volume"));
}

#[test]
fn bad_sizes_and_names_are_usage_errors_that_say_why() {
    let node = FakeNode::start();
    for (size, why) in [
        ("0", "more than 0"),
        ("-1", "'-1' is not a size"),
        ("10X", "'10X' is not a size"),
        ("1025T", "too large"),
        ("99999999999999999999E", "too large"),
        ("513", "no multiple of 4096"),
        ("", "size"),
    ] {
        let error = fails(&node, 2, &["volume", "create", "default/v", "--size", size]);
        assert!(error.contains(why), "{size}: {error}");
        fails(&node, 2, &["volume", "resize", "default/vol0", "--size", size]);
    }
    for (name, why) in [
        ("v", "POOL/NAME"),
        ("default/a/b", "\"a/b\" is not a name for a volume"),
        ("/v", "\"\" is not a name for a pool"),
        ("default/", "\"\" is not a name for a volume"),
        ("default/-x", "begins with a letter"),
        ("default/a b", "is not a name"),
        ("default/Vol", "small letters"),
    ] {
        for args in [&["volume", "show", name][..], &["volume", "create", name, "--size", "1G"]] {
            let error = fails(&node, 2, args);
            assert!(error.contains(why), "{name}: {error}");
        }
    }
}

#[test]
fn errors_in_json_have_the_form_of_the_api() {
    let node = FakeNode::start();
    let error = fails(&node, 2, &["-o", "json", "volume", "rm", "default/vol0"]);
    let body: ErrorBody = serde_json::from_str(&error).unwrap();
    assert_eq!(body.error.code, ErrorCode::ConfirmationRequired);
    let error = fails(&node, 1, &["volume", "show", "default/no", "--output", "json"]);
    let body: ErrorBody = serde_json::from_str(&error).unwrap();
    assert_eq!(body.error.code, ErrorCode::NotFound);
}

#[test]
fn no_connection_is_its_own_exit_code_and_names_the_endpoint() {
    // A port that was free a moment ago.
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let endpoint = format!("http://127.0.0.1:{port}");
    let output = sdsctl(&endpoint, &["status"]);
    assert_eq!(output.status.code(), Some(3));
    let error = stderr(&output);
    assert!(error.contains(&format!("cannot reach {endpoint}")), "{error}");
    assert!(error.contains("is sdsd running there?") && error.contains("SDS_ENDPOINT"), "{error}");
    assert_eq!(sdsctl("https://127.0.0.1:1", &["status"]).status.code(), Some(2));
    assert_eq!(sdsctl("http://127.0.0.1:1/v1", &["status"]).status.code(), Some(2));
}

#[test]
fn a_silent_node_is_a_failed_request() {
    let node = FakeNode::start();
    let error = fails(&node, 1, &["volume", "show", "default/hang"]);
    assert!(error.contains("may still take effect"), "{error}");
}

#[test]
fn help_and_completion_work_without_a_node() {
    let output = sdsctl("http://127.0.0.1:1", &["--help"]);
    assert_eq!(output.status.code(), Some(0));
    let help = stdout(&output);
    for part in ["Exit codes:", "3  cannot connect", "Examples:", "SDS_ENDPOINT"] {
        assert!(help.contains(part), "{part} lacks in {help}");
    }
    for shell in ["bash", "zsh", "fish"] {
        let output = sdsctl("not even a URL", &["completion", shell]);
        assert_eq!(output.status.code(), Some(0));
        assert!(stdout(&output).contains("volume"), "{shell}");
    }
    assert_eq!(sdsctl("http://127.0.0.1:1", &[]).status.code(), Some(2));
    assert_eq!(sdsctl("http://127.0.0.1:1", &["frobnicate"]).status.code(), Some(2));
}
