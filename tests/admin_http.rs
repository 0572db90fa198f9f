//! The admin API over loopback: every route, and every way to get it wrong.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod admin_support;

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::time::Duration;

use admin_support::{FakeNode, disk_id};
use sds::admin::client::{Client, ClientError};
use sds::admin::error::{ErrorBody, ErrorCode};
use sds::admin::types::{
    AddDisk, CreatePool, CreateVolume, DiskState, FailureDomain, Health, HealthLevel, PoolScheme,
    Redundancy, ResizeVolume,
};

struct Answer {
    status: u16,
    head: String,
    body: String,
}

fn raw(node: &FakeNode, bytes: &[u8]) -> Answer {
    let mut stream = TcpStream::connect(node.address).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(bytes).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Answer { status, head: head.to_ascii_lowercase(), body: body.to_owned() }
}

fn request(node: &FakeNode, method: &str, path: &str, body: &str) -> Answer {
    let head = format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
         content-type: application/json\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    raw(node, (head + body).as_bytes())
}

fn get(node: &FakeNode, path: &str) -> Answer {
    request(node, "GET", path, "")
}

fn error(answer: &Answer) -> ErrorBody {
    serde_json::from_str(&answer.body)
        .unwrap_or_else(|e| panic!("{e}: {} {}", answer.status, answer.body))
}

fn code<T: std::fmt::Debug>(result: Result<T, ClientError>) -> ErrorCode {
    match result.unwrap_err() {
        ClientError::Api(error) => error.code,
        other => panic!("not an error of the API: {other}"),
    }
}

#[test]
fn status_and_health_follow_redundancy() {
    let node = FakeNode::start();
    let client = Client::new(&node.endpoint()).unwrap();
    let status = client.status().unwrap();
    assert_eq!((status.health, status.reasons.len()), (HealthLevel::Ok, 0));
    assert_eq!((status.disks.online, status.disks.total, status.volumes.total), (6, 6, 1));
    assert_eq!(status.capacity.raw, 6 * 1_000 * (4 << 20));
    assert_eq!(get(&node, "/healthz").status, 200);

    client.offline_disk(disk_id(1)).unwrap();
    let status = client.status().unwrap();
    assert_eq!((status.health, status.volumes.reduced), (HealthLevel::Warning, 1));
    let answer = get(&node, "/healthz");
    let health: Health = serde_json::from_str(&answer.body).unwrap();
    assert_eq!((answer.status, health.health), (200, HealthLevel::Warning));

    client.offline_disk(disk_id(2)).unwrap();
    let answer = get(&node, "/healthz");
    let health: Health = serde_json::from_str(&answer.body).unwrap();
    assert_eq!((answer.status, health.health), (503, HealthLevel::Critical));
    assert_eq!(health.reasons[0].subject, "volume default/vol0");
    assert_eq!(
        client.volume(&"default/vol0".parse().unwrap()).unwrap().redundancy,
        Redundancy::Reduced { segments: 12, tolerates: 0 }
    );

    client.online_disk(disk_id(1)).unwrap();
    client.online_disk(disk_id(2)).unwrap();
    assert_eq!(client.status().unwrap().health, HealthLevel::Ok);
}

#[test]
fn disks() {
    let node = FakeNode::start();
    let client = Client::new(&node.endpoint()).unwrap();
    assert_eq!(client.disks().unwrap().len(), 6);
    assert_eq!(client.disk(disk_id(3)).unwrap().path, "/data/disk3");
    let add =
        |path: &str, size, force| client.add_disk(&AddDisk { path: path.to_owned(), size, force });
    let disk = add("/data/new", Some(4 << 30), false).unwrap();
    assert_eq!(disk.state, DiskState::Online);
    assert_eq!(code(add("/data/new", None, false)), ErrorCode::Conflict);
    assert_eq!(code(add("/dev/foreign", None, false)), ErrorCode::ConfirmationRequired);
    add("/dev/foreign", None, true).unwrap();
    assert_eq!(code(add("relative", None, false)), ErrorCode::InvalidArgument);
    assert_eq!(code(add("/a\0b", None, false)), ErrorCode::InvalidArgument);
    assert_eq!(code(add(&"/a".repeat(3_000), None, false)), ErrorCode::InvalidArgument);
    assert_eq!(code(add("/data/none", Some(0), false)), ErrorCode::InvalidArgument);
    assert_eq!(code(add("/data/tiny", Some(4_096), false)), ErrorCode::NoSpace);
    assert_eq!(code(client.remove_disk(disk.id, false)), ErrorCode::ConfirmationRequired);
    assert_eq!(client.remove_disk(disk.id, true).unwrap().name, disk.id.to_string());
    assert_eq!(code(client.disk(disk.id)), ErrorCode::NotFound);
    assert_eq!(code(client.offline_disk(disk.id)), ErrorCode::NotFound);
    assert_eq!(client.offline_disk(disk_id(0)).unwrap().state, DiskState::Offline);
    assert_eq!(code(client.drain_disk(disk.id)), ErrorCode::NotFound);
    assert_eq!(client.drain_disk(disk_id(1)).unwrap().state, DiskState::Draining);
    assert_eq!(client.online_disk(disk_id(0)).unwrap().state, DiskState::Online);
    let new = AddDisk { path: "/dev/new".into(), size: None, force: false };
    assert_eq!(code(client.replace_disk(disk.id, &new)), ErrorCode::NotFound);
    assert_eq!(client.replace_disk(disk_id(2), &new).unwrap().path, new.path);
    assert_eq!(client.disk(disk_id(2)).unwrap().state, DiskState::Draining);
    let relative = AddDisk { path: "new".into(), ..new };
    assert_eq!(code(client.replace_disk(disk_id(2), &relative)), ErrorCode::InvalidArgument);
}

#[test]
fn pools() {
    let node = FakeNode::start();
    let client = Client::new(&node.endpoint()).unwrap();
    let request = |name: &str, scheme, min_size| CreatePool {
        name: name.to_owned(),
        scheme,
        failure_domain: FailureDomain::Disk,
        min_size,
    };
    let three = PoolScheme::Replicas { copies: 3 };
    let pool = client.create_pool(&request("fast", three, None)).unwrap();
    assert_eq!((pool.scheme, pool.min_size), (three, 2));
    let two = PoolScheme::Replicas { copies: 2 };
    assert_eq!(client.create_pool(&request("two", two, None)).unwrap().min_size, 1);
    assert_eq!(code(client.create_pool(&request("fast", two, None))), ErrorCode::Conflict);
    let wide = PoolScheme::Ec { data: 8, parity: 2 };
    assert_eq!(code(client.create_pool(&request("wide", wide, None))), ErrorCode::NoSpace);
    for bad in [
        request("a/b", three, None),
        request("", three, None),
        request("min", three, Some(4)),
        request("min", three, Some(0)),
        request("none", PoolScheme::Replicas { copies: 0 }, None),
        request("six", PoolScheme::Replicas { copies: 6 }, None),
        request("thin", PoolScheme::Ec { data: 1, parity: 1 }, None),
        request("bare", PoolScheme::Ec { data: 4, parity: 0 }, None),
        request("huge", PoolScheme::Ec { data: 255, parity: 255 }, None),
    ] {
        assert_eq!(code(client.create_pool(&bad)), ErrorCode::InvalidArgument, "{bad:?}");
    }
    let names: Vec<_> = client.pools().unwrap().into_iter().map(|p| p.name).collect();
    assert_eq!(names, ["default", "fast", "two"]);
    assert_eq!(code(client.remove_pool("default")), ErrorCode::Conflict);
    client.remove_pool("fast").unwrap();
    assert_eq!(code(client.pool("fast")), ErrorCode::NotFound);
}

#[test]
fn volumes() {
    let node = FakeNode::start();
    let client = Client::new(&node.endpoint()).unwrap();
    let create =
        |name: &str, size| client.create_volume(&CreateVolume { name: name.to_owned(), size });
    let volume = create("default/v", 1 << 30).unwrap();
    assert_eq!(volume.exports, ["nbd://127.0.0.1:10809/v"]);
    assert_eq!(code(create("default/v", 1 << 30)), ErrorCode::Conflict);
    assert_eq!(code(create("nowhere/v", 1 << 30)), ErrorCode::NotFound);
    for (name, size) in [
        ("v", 4_096),
        ("default/a/b", 4_096),
        ("default/", 4_096),
        ("/v", 4_096),
        ("default/v w", 4_096),
        ("default/V", 4_096),
        ("default/zero", 0),
        ("default/odd", 4_096 + 512),
        ("default/huge", (1 << 50) + 4_096),
        ("default/huge", u64::MAX),
    ] {
        assert_eq!(code(create(name, size)), ErrorCode::InvalidArgument, "{name} {size}");
    }
    let name = "default/v".parse().unwrap();
    let resize = |size, force| client.resize_volume(&name, &ResizeVolume { size, force });
    assert_eq!(resize(2 << 30, false).unwrap().size, 2 << 30);
    assert_eq!(code(resize(1 << 30, false)), ErrorCode::ConfirmationRequired);
    assert_eq!(resize(1 << 30, true).unwrap().size, 1 << 30);
    assert_eq!(code(resize(0, true)), ErrorCode::InvalidArgument);
    assert_eq!(client.volumes(None).unwrap().len(), 2);
    assert_eq!(client.volumes(Some("default")).unwrap().len(), 2);
    assert_eq!(code(client.volumes(Some("nowhere"))), ErrorCode::NotFound);
    client.remove_volume(&name, false).unwrap();
    assert_eq!(code(client.volume(&name)), ErrorCode::NotFound);
    let full = "default/vol0".parse().unwrap();
    assert_eq!(code(client.remove_volume(&full, false)), ErrorCode::ConfirmationRequired);
    client.remove_volume(&full, true).unwrap();
}

#[test]
fn malformed_requests_are_refused_in_json() {
    let node = FakeNode::start();
    let long = format!("{{\"name\": \"{}\", \"size\": 1}}", "x".repeat(1 << 17));
    for (method, path, body, status, code) in [
        ("GET", "/nothing", "", 404, ErrorCode::NotFound),
        ("GET", "/v1/volumes/default/a/b", "", 404, ErrorCode::NotFound),
        ("GET", "/v1/volumes/default/a%2Fb", "", 400, ErrorCode::InvalidArgument),
        ("GET", "/v1/volumes/default/..", "", 400, ErrorCode::InvalidArgument),
        ("GET", "/v1/volumes/default/%ff", "", 400, ErrorCode::InvalidArgument),
        ("GET", "/v1/pools/%20", "", 400, ErrorCode::InvalidArgument),
        ("GET", "/v1/volumes?pool=a/b", "", 400, ErrorCode::InvalidArgument),
        ("GET", "/v1/volumes?pol=a", "", 400, ErrorCode::InvalidArgument),
        ("GET", "/v1/disks/sdb", "", 400, ErrorCode::InvalidArgument),
        ("DELETE", "/v1/volumes/default/vol0?force=maybe", "", 400, ErrorCode::InvalidArgument),
        ("DELETE", "/v1/volumes/default/vol0?froce=true", "", 400, ErrorCode::InvalidArgument),
        ("DELETE", "/v1/status", "", 405, ErrorCode::MethodNotAllowed),
        ("POST", "/v1/disks/x/offline", "", 405, ErrorCode::MethodNotAllowed),
        ("POST", "/v1/volumes", "", 400, ErrorCode::InvalidArgument),
        ("POST", "/v1/volumes", "{", 400, ErrorCode::InvalidArgument),
        ("POST", "/v1/volumes", "[]", 400, ErrorCode::InvalidArgument),
        ("POST", "/v1/volumes", r#"{"name": "default/v"}"#, 400, ErrorCode::InvalidArgument),
        (
            "POST",
            "/v1/volumes",
            r#"{"name": "default/v", "size": -1}"#,
            400,
            ErrorCode::InvalidArgument,
        ),
        (
            "POST",
            "/v1/volumes",
            r#"{"name": "default/v", "size": 1e400}"#,
            400,
            ErrorCode::InvalidArgument,
        ),
        (
            "POST",
            "/v1/volumes",
            r#"{"name": "default/v", "size": 512, "thick": true}"#,
            400,
            ErrorCode::InvalidArgument,
        ),
        ("POST", "/v1/volumes", &long, 413, ErrorCode::PayloadTooLarge),
        ("GET", "/v1/volumes/default/hang", "", 503, ErrorCode::Timeout),
        ("GET", "/v1/volumes/default/drop", "", 503, ErrorCode::Unavailable),
    ] {
        let answer = request(&node, method, path, body);
        assert_eq!(answer.status, status, "{method} {path}: {}", answer.body);
        assert_eq!(error(&answer).error.code, code, "{method} {path}");
        assert!(answer.head.contains("content-type: application/json"), "{}", answer.head);
    }
    let head = "POST /v1/volumes HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
                content-length: 2\r\n\r\n{}";
    let answer = raw(&node, head.as_bytes());
    assert_eq!((answer.status, error(&answer).error.code), (415, ErrorCode::UnsupportedMediaType));
    assert_eq!(get(&node, "/v1/status").status, 200, "and it still serves");
}

#[test]
fn garbage_and_half_open_connections_disturb_nobody() {
    let node = FakeNode::start();
    assert_eq!(raw(&node, b"\x00\xff\x13garbage\r\n\r\n").status, 400);
    let mut half = TcpStream::connect(node.address).unwrap();
    half.write_all(b"POST /v1/volumes HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{").unwrap();
    half.shutdown(Shutdown::Write).unwrap();
    let silent: Vec<_> = (0..20).map(|_| TcpStream::connect(node.address).unwrap()).collect();
    assert_eq!(get(&node, "/v1/status").status, 200);
    drop(silent);
}

#[test]
fn metrics_are_prometheus_text() {
    let node = FakeNode::start();
    let answer = get(&node, "/metrics");
    assert_eq!(answer.status, 200);
    assert!(answer.head.contains("content-type: text/plain; version=0.0.4"), "{}", answer.head);
    assert!(answer.body.contains("\nsds_node_health{level=\"ok\"} 1\n"), "{}", answer.body);
}

#[test]
fn a_stopped_server_frees_its_port_and_says_goodbye() {
    let node = FakeNode::start();
    let client = Client::new(&node.endpoint()).unwrap();
    client.status().unwrap();
    let endpoint = node.endpoint();
    drop(node);
    let error = Client::new(&endpoint).unwrap().status().unwrap_err();
    assert!(matches!(error, ClientError::Connect { .. }), "{error}");
    assert!(error.to_string().contains(&endpoint), "{error}");
}

#[test]
fn endpoints_are_checked() {
    for good in ["127.0.0.1:1", "http://localhost:1", "http://[::1]:1/"] {
        Client::new(good).unwrap_or_else(|e| panic!("{good}: {e}"));
    }
    for bad in
        ["", "https://x:1", "http://", "http://x:1/v1", "http://a b", "ftp://x", "http://x?y"]
    {
        let error = Client::new(bad).unwrap_err();
        assert!(matches!(error, ClientError::Endpoint { .. }), "{bad}: {error}");
    }
}

#[test]
fn another_service_is_recognised() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoint = format!("http://{}", listener.local_addr().unwrap());
    #[expect(clippy::disallowed_methods, reason = "no simulation here")]
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().unwrap();
        let mut request = [0; 1024];
        assert!(stream.read(&mut request).unwrap() > 0);
        let answer = "HTTP/1.1 500 Oops\r\ncontent-length: 4\r\nconnection: close\r\n\r\noops";
        stream.write_all(answer.as_bytes()).unwrap();
    });
    let error = Client::new(&endpoint).unwrap().status().unwrap_err();
    assert!(matches!(error, ClientError::Protocol { .. }), "{error}");
    server.join().unwrap();
}
