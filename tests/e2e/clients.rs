//! The clients of others: qemu, libnbd, fio.

use super::support::{Node, Noise, SMALL, directory, run};

/// An image with noise, zeroes and holes.
fn image(path: &std::path::Path, bytes: u64) {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path).expect("an image");
    file.set_len(bytes).expect("its size");
    let mut noise = Noise(42);
    for _ in 0..200 {
        let len = 512 * (1 + noise.below(400));
        let at = noise.below(bytes - len) / 512 * 512;
        let len = usize::try_from(len).expect("small");
        file.write_all_at(&noise.bytes(len), at).expect("content");
    }
}

#[test]
fn an_image_goes_in_and_comes_out_identical() {
    let dir = directory();
    let node = Node::start(dir.path(), &["--disk-size", "512M", "--volume", "vol0:96M"]);
    let (input, output) = (dir.path().join("in.img"), dir.path().join("out.img"));
    image(&input, 96 << 20);
    let (input, output) = (input.to_str().expect("UTF-8"), output.to_str().expect("UTF-8"));
    run("qemu-img", &["convert", "-n", "-f", "raw", "-O", "raw", input, &node.uri]);
    run("qemu-img", &["compare", "-f", "raw", "-F", "raw", input, &node.uri]);
    node.stop();
    let node = Node::start(dir.path(), &[]);
    run("qemu-img", &["convert", "-f", "raw", "-O", "raw", &node.uri, output]);
    run("cmp", &[input, output]);
    node.stop();
}

#[test]
fn misaligned_patterns_are_merged() {
    let dir = directory();
    let node = Node::start(dir.path(), &SMALL);
    let commands = [
        "write -P 1 0 1M",
        "write -P 2 511 1026",
        "write -P 3 4095 2",
        "write -P 4 1000000 70000",
        "write -z 300000 100",
        "read -P 1 0 511",
        "read -P 2 511 1026",
        "read -P 1 1537 2558",
        "read -P 3 4095 2",
        "read -P 1 4097 295903",
        "read -P 0 300000 100",
        "read -P 1 300100 699900",
        "read -P 4 1000000 70000",
        "read -P 0 1070000 4096",
        "discard 0 1M",
        "read -P 0 0 1M",
        "read -P 4 1048576 21424",
        "flush",
    ];
    let mut args = vec!["-f", "raw", node.uri.as_str()];
    args.extend(commands.iter().flat_map(|command| ["-c", command]));
    let output = run("qemu-io", &args);
    assert!(!output.contains("Pattern verification failed"), "{output}");
    let last = format!("read -P 0 {} 512", (256 << 20) - 512);
    run("qemu-io", &["-f", "raw", &node.uri, "-c", &last]);
    node.stop();
}

#[test]
fn libnbd_lists_maps_and_copies() {
    let dir = directory();
    let node = Node::start(dir.path(), &SMALL);
    let list = run("nbdinfo", &["--list", &format!("nbd://{}", node.nbd)]);
    assert!(list.contains("export=\"vol0\""), "{list}");
    assert!(list.contains("can_multi_conn: true"), "{list}");
    run("nbdinfo", &[&format!("nbd://{}/default/vol0", node.nbd)]);

    let (input, output) = (dir.path().join("in.img"), dir.path().join("out.img"));
    image(&input, 256 << 20);
    let (input, output) = (input.to_str().expect("UTF-8"), output.to_str().expect("UTF-8"));
    run("nbdcopy", &["--connections=4", "--requests=16", input, &node.uri]);
    run("nbdcopy", &["--connections=4", &node.uri, output]);
    run("cmp", &[input, output]);

    run("qemu-io", &["-f", "raw", &node.uri, "-c", "write -P 5 64M 8M", "-c", "discard 66M 2M"]);
    let map = run("nbdinfo", &["--map", "--json", &node.uri]);
    let map: serde_json::Value = serde_json::from_str(&map).expect("JSON");
    let mib = 1_u64 << 20;
    let hole = map.as_array().expect("extents").iter().any(|extent| {
        let (at, len) = (extent["offset"].as_u64(), extent["length"].as_u64());
        extent["type"] == 3
            && at.is_some_and(|at| at <= 66 * mib)
            && at.zip(len).is_some_and(|(at, len)| at + len >= 68 * mib)
    });
    assert!(hole, "no hole at 66 MiB: {map}");
    node.stop();
}

#[test]
fn fio_verifies_mixed_sizes_and_trims() {
    let dir = directory();
    let node = Node::start(dir.path(), &SMALL);
    let uri = format!("--uri={}", node.uri);
    let common = ["--name=mix", "--ioengine=nbd", &uri, "--size=128M", "--io_size=96M"];
    let mixed = ["--rw=randwrite", "--bsrange=512-128k", "--bs_unaligned=0", "--iodepth=16"];
    let verify = [
        "--verify=crc32c",
        "--do_verify=1",
        "--verify_fatal=1",
        "--verify_state_save=0",
        "--randseed=7",
    ];
    run("fio", &[&common[..], &mixed, &verify].concat());
    let trims = ["--rw=randtrimwrite", "--bs=64k", "--iodepth=8"];
    run("fio", &[&common[..], &trims].concat());
    run("fio", &[&common[..], &mixed, &verify].concat());
    node.stop();
}
