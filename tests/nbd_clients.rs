//! The clients that people use: libnbd's tools, qemu's tools, fio. A client that is not installed
//! fails its test: what needs a client is not tested without it.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod nbd_support;
mod nbd_threaded;

use std::path::Path;
use std::process::{Command, Output};

use nbd_support::pattern;
use nbd_threaded::{Identity, Options, Running, options};

/// The Debian package of each client.
const PACKAGES: [(&str, &str); 5] = [
    ("nbdinfo", "libnbd-bin"),
    ("nbdcopy", "libnbd-bin"),
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("fio", "fio"),
];

fn output(program: &str, arguments: &[&str]) -> Output {
    match Command::new(program).args(arguments).output() {
        Ok(output) => output,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let package = PACKAGES.iter().find(|(name, _)| *name == program);
            let package = package.map_or(program, |(_, package)| package);
            panic!("{program} is not installed: apt-get install {package}");
        }
        Err(error) => panic!("{program}: {error}"),
    }
}

/// Runs a client that has to succeed; what it printed.
fn run(program: &str, arguments: &[&str]) -> String {
    let output = output(program, arguments);
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}:\n{stdout}\n{stderr}");
    stdout
}

fn big() -> Options {
    Options { volume_bytes: 256 << 20, ..options() }
}

fn tcp_uri(server: &Running, export: &str) -> String {
    format!("nbd://{}/{export}", server.tcp)
}

fn unix_uri(server: &Running, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", server.unix.display())
}

/// A file with data, holes and an odd tail; a multiple of 512 bytes long.
fn image(path: &Path) {
    let mut content = vec![0; 96 << 20];
    let data = pattern(11, 20 << 20);
    content[..8 << 20].copy_from_slice(&data[..8 << 20]);
    content[40 << 20..52 << 20].copy_from_slice(&data[8 << 20..]);
    content.extend(pattern(12, 1536));
    std::fs::write(path, content).unwrap();
}

fn assert_same(left: &Path, right: &Path, len: usize) {
    let (left, right) = (std::fs::read(left).unwrap(), std::fs::read(right).unwrap());
    assert!(left[..len] == right[..len], "the contents differ");
}

#[test]
fn nbdinfo_sees_what_the_server_offers() {
    let server = Running::start(big());
    for uri in [tcp_uri(&server, "vol0"), unix_uri(&server, "vol0")] {
        let info: serde_json::Value =
            serde_json::from_str(&run("nbdinfo", &["--json", &uri])).unwrap();
        assert_eq!(info["protocol"], "newstyle-fixed");
        assert_eq!(info["TLS"], false);
        assert_eq!(info["structured"], true);
        let export = &info["exports"][0];
        assert_eq!(export["export-size"], 256 << 20);
        assert_eq!(export["is_read_only"], false);
        for can in ["cache", "df", "fast_zero", "flush", "fua", "multi_conn", "trim", "zero"] {
            assert_eq!(export[format!("can_{can}")], true, "{can}");
        }
        assert_eq!(export["block_size_minimum"], 1);
        assert_eq!(export["block_size_preferred"], 4096);
        assert_eq!(export["block_size_maximum"], 32 << 20);
        assert_eq!(export["contexts"][0], "base:allocation");
    }
    let list = run("nbdinfo", &["--list", &tcp_uri(&server, "")]);
    assert!(list.contains("export=\"vol0\"") && list.contains("export=\"vol1\""), "{list}");
    let unknown = output("nbdinfo", &[&tcp_uri(&server, "nope")]);
    let text = String::from_utf8_lossy(&unknown.stderr).into_owned();
    assert!(!unknown.status.success() && text.contains("nope"), "{text}");
}

#[test]
fn nbdcopy_there_and_back_with_several_connections() {
    let server = Running::start(big());
    let dir = tempfile::tempdir().unwrap();
    let (source, back) = (dir.path().join("source"), dir.path().join("back"));
    image(&source);
    let len = std::fs::metadata(&source).unwrap().len();
    let (source_name, back_name) = (source.to_str().unwrap(), back.to_str().unwrap());
    for uri in [tcp_uri(&server, "vol0"), unix_uri(&server, "vol1")] {
        run("nbdcopy", &["--connections=4", "--flush", source_name, &uri]);
        run("nbdcopy", &["--connections=4", &uri, back_name]);
        assert_same(&source, &back, usize::try_from(len).unwrap());
        std::fs::remove_file(&back).unwrap();
    }
    // From one export to the other, and the map of both.
    let (from, to) = (tcp_uri(&server, "vol0"), tcp_uri(&server, "vol1"));
    run("nbdcopy", &["--synchronous", &from, &to]);
    let map: serde_json::Value =
        serde_json::from_str(&run("nbdinfo", &["--map", "--json", &to])).unwrap();
    let extents: Vec<_> = map.as_array().unwrap().iter().collect();
    assert_eq!(extents[0]["type"], 0);
    assert_eq!(extents[0]["length"], 8 << 20);
    assert_eq!((&extents[1]["type"], &extents[1]["length"]), (&3.into(), &(32 << 20).into()));
}

#[test]
fn qemu_img_converts_there_and_back() {
    let server = Running::start(big());
    let dir = tempfile::tempdir().unwrap();
    let (source, back) = (dir.path().join("source"), dir.path().join("back"));
    image(&source);
    let len = usize::try_from(std::fs::metadata(&source).unwrap().len()).unwrap();
    let (source_name, back_name) = (source.to_str().unwrap(), back.to_str().unwrap());
    for uri in [tcp_uri(&server, "vol0"), unix_uri(&server, "vol1")] {
        run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", "-W", source_name, &uri]);
        run("qemu-img", &["convert", "-f", "raw", "-O", "raw", "-W", &uri, back_name]);
        assert_same(&source, &back, len);
    }
    let compared = run(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", source_name, &tcp_uri(&server, "vol0")],
    );
    assert!(compared.contains("Images are identical"), "{compared}");
    let map = run("qemu-img", &["map", "--output=json", "-f", "raw", &tcp_uri(&server, "vol0")]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    assert!(map.as_array().unwrap().iter().any(|extent| extent["zero"] == true), "{map}");
}

#[test]
fn qemu_io_patterns_at_odd_places() {
    let server = Running::start(big());
    for uri in [tcp_uri(&server, "vol0"), unix_uri(&server, "vol1")] {
        let script = [
            "write -P 0xaa 0 1M",
            "write -P 0xbb 4095 513",
            "write -P 0xcc -f 1000001 77777",
            "read -P 0xaa 0 4095",
            "read -P 0xbb 4095 513",
            "read -P 0xaa 4608 995393",
            "read -P 0xcc 1000001 77777",
            "discard 64k 64k",
            "write -z 200k 13k",
            "write -z -u 300k 64k",
            "read -P 0 200k 13k",
            "read -P 0 300k 64k",
            "read -P 0xaa 213k 87k",
            "aio_write -P 0xdd 10M 4M",
            "aio_write -P 0xee 14M 4M",
            "aio_flush",
            "read -P 0xdd 10M 4M",
            "read -P 0xee 14M 4M",
            "flush",
        ];
        let mut arguments = vec!["-f", "raw"];
        for command in &script {
            arguments.extend(["-c", command]);
        }
        arguments.push(&uri);
        let printed = run("qemu-io", &arguments);
        assert!(!printed.contains("verification failed"), "{printed}");
        assert!(!printed.contains("error"), "{printed}");
    }
}

#[test]
fn fio_verifies_what_it_wrote() {
    let server = Running::start(big());
    for uri in [tcp_uri(&server, "vol0"), unix_uri(&server, "vol1")] {
        let uri = format!("--uri={uri}");
        let job = [
            "--name=verify",
            "--ioengine=nbd",
            &uri,
            "--rw=randrw",
            "--bsrange=512-256k",
            "--bs_unaligned=1",
            "--iodepth=32",
            "--size=128M",
            "--io_size=64M",
            "--verify=crc32c",
            "--do_verify=1",
            "--verify_state_save=0",
            "--verify_fatal=1",
            "--randseed=7",
            "--fsync=64",
        ];
        run("fio", &job);
        let trim = [
            "--name=trim",
            "--ioengine=nbd",
            &uri,
            "--rw=randtrim",
            "--bs=4k",
            "--iodepth=16",
            "--size=64M",
            "--io_size=8M",
        ];
        run("fio", &trim);
    }
}

#[test]
fn libnbd_over_tls() {
    let identity = Identity::new();
    let dir = tempfile::tempdir().unwrap();
    identity.write(dir.path());
    let certificates = dir.path().display();
    let server = Running::start(big().tls_required(identity.acceptor(true)));
    let uri =
        format!("nbds://localhost:{}/vol0?tls-certificates={certificates}", server.tcp.port());
    let info: serde_json::Value = serde_json::from_str(&run("nbdinfo", &["--json", &uri])).unwrap();
    assert_eq!(info["TLS"], true);
    let (source, back) = (dir.path().join("source"), dir.path().join("back"));
    image(&source);
    let len = usize::try_from(std::fs::metadata(&source).unwrap().len()).unwrap();
    run("nbdcopy", &[source.to_str().unwrap(), &uri]);
    run("nbdcopy", &[&uri, back.to_str().unwrap()]);
    assert_same(&source, &back, len);
    let refused = output("nbdinfo", &[&tcp_uri(&server, "vol0")]);
    assert!(!refused.status.success(), "in clear");
}

#[test]
fn qemu_over_tls() {
    let identity = Identity::new();
    let dir = tempfile::tempdir().unwrap();
    identity.write(dir.path());
    let server = Running::start(big().tls_required(identity.acceptor(true)));
    let object = format!("tls-creds-x509,id=tls0,endpoint=client,dir={}", dir.path().display());
    let port = server.tcp.port();
    let node = format!(
        "driver=nbd,host=localhost,port={port},export=vol0,tls-creds=tls0,tls-hostname=localhost"
    );
    let printed = run(
        "qemu-io",
        &[
            "--object",
            &object,
            "-c",
            "write -P 0x5a 12345 3M",
            "-c",
            "read -P 0x5a 12345 3M",
            "--image-opts",
            &node,
        ],
    );
    assert!(!printed.contains("verification failed"), "{printed}");
}
