//! `sdsd` with a configuration: what is wrong in it, TLS, and the loss of the store with a disk.

use std::path::{Path, PathBuf};
use std::process::Command;

use super::identity::Identity;
use super::support::{Client, Node, directory, fails, run};

/// Runs `sdsd` with arguments that it refuses; what it says.
fn refused(args: &[&str]) -> String {
    let output = Command::new(env!("CARGO_BIN_EXE_sdsd")).args(args).output().expect("sdsd starts");
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(1), "{args:?}: {text}");
    assert_eq!(text.lines().count(), 1, "one sentence: {text}");
    text
}

/// A configuration of a node on free ports in `dir`, with what `more` adds to it.
fn configure(dir: &Path, nbd: &str, more: &str) -> PathBuf {
    let path = dir.join("sdsd.toml");
    let data = dir.join("data");
    let text = format!(
        "node = \"n1\"\ndata_dir = \"{}\"\n{more}\n[nbd]\naddresses = [\"127.0.0.1:0\"]\n{nbd}\n\
         [admin]\naddress = \"127.0.0.1:0\"\n",
        data.display()
    );
    std::fs::write(&path, text).expect("a configuration");
    path
}

/// Adds disks to a fresh node, and a volume `p/v` of 64 MiB over three of them.
fn furnish(node: &Node) {
    for index in 0..3 {
        let path = node.dir.join(format!("disk{index}.img")).display().to_string();
        node.ctl(&["disk", "add", &path, "--size", "256M"]);
    }
    node.ctl(&["pool", "create", "p", "--ec", "2+1"]);
    node.ctl(&["volume", "create", "p/v", "--size", "64M"]);
}

#[test]
fn a_wrong_configuration_is_told_by_file_line_and_key() {
    let dir = directory();
    let path = dir.path().join("sdsd.toml");
    let text = path.to_str().expect("UTF-8");
    for (content, place, why) in [
        ("node = 3", "1: node: ", "expected a string"),
        ("\n\n[nbd]\nadress = []", "4: nbd: ", "unknown field `adress`"),
        ("[cache]\n\nindex = \"64Q\"", "3: cache.index: ", "not a size"),
        ("[cache]\nindex = \"4K\"", "2: cache.index: ", "less than 1MiB"),
        ("node = \"a/b\"", "1: node: ", "contains a slash"),
        ("\ndisks = [\"/a\", \"/a\"]", "2: disks: ", "listed twice"),
        ("[nbd]\naddresses = [\"127.0.0.1\"]", "2: nbd.addresses: ", "socket address"),
        ("[nbd]\naddresses = []", "1: nbd: ", "nothing could be attached"),
        ("[nbd]\ntls = { certificate = \"c\" }", "2: nbd.tls: ", "missing field `key`"),
        ("[nbd.tls]\ncertificate = \"c\"\nkey = \"\"", "3: nbd.tls.key: ", "the path is empty"),
        ("[log]\nlevel = \"sds=loud\"", "2: log.level: ", "loud"),
        ("[admin]\naddress = \"127.0.0.1:99999\"", "2: admin.address: ", "socket address"),
        ("a = = 3", "1: ", "extra"),
    ] {
        std::fs::write(&path, content).expect("a configuration");
        let said = refused(&["--config", text]);
        let place = format!("sdsd: {text}:{place}");
        assert!(said.starts_with(&place) && said.contains(why), "{content:?}: {said}");
    }
    let said = refused(&["run", "--config", "/nowhere/sdsd.toml"]);
    assert!(said.contains("cannot read /nowhere/sdsd.toml"), "{said}");
    std::fs::write(&path, [0xff; 40]).expect("bytes");
    assert!(refused(&["--config", text]).contains(&format!("cannot read {text}")));

    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("its address").to_string();
    let said = |nbd: &str| {
        let config = configure(dir.path(), nbd, "");
        refused(&["--config", config.to_str().expect("UTF-8")])
    };
    let busy = configure(dir.path(), "", "");
    let content = std::fs::read_to_string(&busy).expect("it").replace("127.0.0.1:0", &address);
    let content = content.replacen(&address, "127.0.0.1:0", 1);
    std::fs::write(&busy, content).expect("a configuration");
    let text = refused(&["--config", busy.to_str().expect("UTF-8")]);
    assert!(text.contains(&format!("cannot serve the admin API on {address}")), "{text}");
    let text = said("tls = { certificate = \"/nowhere/c.pem\", key = \"/nowhere/k.pem\" }");
    assert!(text.contains("nbd.tls.certificate: cannot read /nowhere/c.pem"), "{text}");
    let [certificate, key, _] = Identity::new().write_server(dir.path());
    let tls = |certificate: &Path, key: &Path| {
        let (certificate, key) = (certificate.display(), key.display());
        said(&format!("tls = {{ certificate = \"{certificate}\", key = \"{key}\" }}"))
    };
    assert!(tls(&key, &certificate).contains("there is no certificate in it"));
    assert!(tls(&certificate, &certificate).contains("nbd.tls: server key"));
    let other = directory();
    let [_, foreign, _] = Identity::new().write_server(other.path());
    assert!(tls(&certificate, &foreign).contains("cannot be used"));
}

#[test]
fn a_configured_node_serves_and_knows_its_disks_again() {
    let dir = directory();
    let config = configure(dir.path(), "", "");
    let node = Node::start_configured(&config, "p/v");
    furnish(&node);
    run("qemu-io", &["-f", "raw", &node.uri, "-c", "write -P 5 1000 3M"]);
    node.stop();
    let node = Node::start_configured(&config, "p/v");
    run("qemu-io", &["-f", "raw", &node.uri, "-c", "read -P 5 1000 3M"]);
    assert_eq!(node.json(&["status"])["disks"]["online"], 3);
    let disk = node.disk(1).display().to_string();
    node.stop();

    // The store is lost: one disk that is listed knows the others.
    std::fs::remove_file(dir.path().join("data/meta.redb")).expect("the store was there");
    let text = config.to_str().expect("UTF-8");
    assert!(refused(&["recover", "--config", text]).contains("name one at least"));
    let config = configure(dir.path(), "", &format!("disks = [\"{disk}\"]"));
    assert!(refused(&["--config", text]).contains("`sdsd recover` rebuilds"));
    run(env!("CARGO_BIN_EXE_sdsd"), &["recover", "--config", text]);
    let node = Node::start_configured(&config, "p/v");
    run("qemu-io", &["-f", "raw", &node.uri, "-c", "read -P 5 1000 3M"]);
    node.wait_json("healthy", &["status"], |status| status["health"] == "ok");
    node.stop();
}

#[test]
fn libnbd_and_qemu_over_tls_and_nobody_in_clear() {
    let dir = directory();
    let identity = Identity::new();
    let [certificate, key, authority] = identity.write_server(dir.path());
    let clients = dir.path().join("clients");
    std::fs::create_dir(&clients).expect("a directory");
    identity.write(&clients);
    let socket = dir.path().join("nbd.sock");
    let nbd = |required: bool| {
        format!(
            "socket = \"{}\"\ntls = {{ certificate = \"{}\", key = \"{}\", client_ca = \"{}\", \
             required = {required} }}",
            socket.display(),
            certificate.display(),
            key.display(),
            authority.display()
        )
    };
    let node = Node::start_configured(&configure(dir.path(), &nbd(true), ""), "p/v");
    furnish(&node);
    let port = node.nbd.rsplit(':').next().expect("a port").to_owned();
    let certificates = clients.display();
    let secure = format!("nbds://localhost:{port}/p/v?tls-certificates={certificates}");
    let info = run("nbdinfo", &["--json", &secure]);
    let info: serde_json::Value = serde_json::from_str(&info).expect("JSON");
    assert_eq!(info["TLS"], true, "{info}");

    // There by libnbd, and back by qemu.
    let (input, output) = (dir.path().join("in.img"), dir.path().join("out.img"));
    std::fs::write(&input, super::support::Noise(3).bytes(64 << 20)).expect("an image");
    let (input, output) = (input.to_str().expect("UTF-8"), output.to_str().expect("UTF-8"));
    run("nbdcopy", &["--connections=4", input, &secure]);
    let object = format!("tls-creds-x509,id=tls0,endpoint=client,dir={certificates}");
    let image = format!(
        "driver=nbd,host=localhost,port={port},export=p/v,tls-creds=tls0,tls-hostname=localhost"
    );
    run("qemu-img", &["convert", "--object", &object, "--image-opts", &image, "-O", "raw", output]);
    run("cmp", &[input, output]);

    // In clear, and without a certificate of the authority.
    let text = fails("nbdinfo", &[&node.uri]);
    assert!(text.contains("TLS") || text.contains("tls"), "it says what lacks: {text}");
    assert!(Client::attach(&node.nbd, "p/v").is_err());
    fails("qemu-img", &["info", &node.uri]);
    let strangers = dir.path().join("strangers");
    std::fs::create_dir(&strangers).expect("a directory");
    Identity::new().write(&strangers);
    let foreign = format!("nbds://localhost:{port}/p/v?tls-certificates={}", strangers.display());
    fails("nbdinfo", &[&foreign]);
    // The unix socket has the protection of the file system.
    let local = format!("nbd+unix:///p/v?socket={}", socket.display());
    run("nbdinfo", &[&local]);
    run("nbdinfo", &[&secure]);
    node.stop();

    let node = Node::start_configured(&configure(dir.path(), &nbd(false), ""), "p/v");
    run("nbdinfo", &[&node.uri]);
    let port = node.nbd.rsplit(':').next().expect("a port");
    let secure = format!("nbds://localhost:{port}/p/v?tls-certificates={certificates}");
    assert!(run("nbdinfo", &["--json", &secure]).contains("\"TLS\": true"));
    node.stop();
}

#[test]
fn a_node_with_credentials_obeys_operators_only() {
    let dir = directory();
    let trust = dir.path().join("trust");
    let path = |name: &str| trust.join(name).display().to_string();
    let sdsctl = env!("CARGO_BIN_EXE_sdsctl");
    let trust_dir = trust.display().to_string();
    run(sdsctl, &["cluster", "init", "--dir", &trust_dir, "--name", "east", "--node", "n1"]);
    let cluster = format!(
        "[cluster]\ncredentials = \"{}\"\nauthority = \"{}\"",
        path("node"),
        path("authority")
    );
    let config = configure(dir.path(), "", &cluster);
    let node = Node::start_configured(&config, "p/v");
    let admin = path("admin");
    assert!(node.ctl(&["--credentials", &admin, "status"]).contains("health:"));
    let (ok, said) = node.ctl_raw(&["status"]);
    assert!(!ok && said.contains("https://"), "{said}");

    let (ok, said) = node.ctl_raw(&["--credentials", &admin, "node", "token"]);
    assert!(!ok && said.contains("--address HOST:PORT"), "a loopback address: {said}");
    let nobody = ["--credentials", &path("node"), "status"];
    let (ok, said) = node.ctl_raw(&nobody);
    assert!(!ok && said.contains("admin.pem"), "{said}");
    node.stop();

    // Credentials of another node, and a key that others may read.
    let text = config.to_str().expect("UTF-8");
    let content = std::fs::read_to_string(&config).expect("written before");
    std::fs::write(&config, content.replace("\"n1\"", "\"n2\"")).expect("a configuration");
    assert!(refused(&["--config", text]).contains("they are of node n1"));
    std::fs::write(&config, content).expect("a configuration");
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o644);
    std::fs::set_permissions(trust.join("node/node.key"), mode).expect("a key");
    assert!(refused(&["--config", text]).contains("others than its owner may use"));
    std::fs::write(&config, "[admin]\naddress = \"0.0.0.0:0\"").expect("a configuration");
    assert!(refused(&["--config", text]).contains("without TLS anybody could give orders"));
}
