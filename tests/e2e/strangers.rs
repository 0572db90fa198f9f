//! Clients that do what they should not, beside one that works: they are told, it is not disturbed.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::support::{Client, Node, Noise, SMALL, directory, fails, run};

/// How long the good client may wait for one request; far more than it needs, on a busy machine.
const STALL_MAX: Duration = Duration::from_secs(10);
/// How many requests of the good client have to succeed at least.
const REQUESTS_MIN: u64 = 100;
/// How long a stranger waits until he is shown the door.
const PATIENCE: Duration = Duration::from_secs(20);
const VOLUME_BYTES: u64 = 256 << 20;

/// A client that writes and reads back all the while.
struct Steady {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<(u64, Duration)>,
}

impl Steady {
    fn start(node: &Node) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, address) = (stop.clone(), node.nbd.clone());
        let thread = std::thread::Builder::new()
            .spawn(move || Self::work(&address, &stopped))
            .expect("a thread");
        Self { stop, thread }
    }

    #[allow(clippy::disallowed_methods, reason = "measures real time")]
    fn work(address: &str, stopped: &AtomicBool) -> (u64, Duration) {
        let mut client = Client::attach(address, "vol0").expect("it is served");
        let (mut noise, mut requests, mut longest) = (Noise(77), 0, Duration::ZERO);
        // On a busy machine the strangers may be gone before it has done much.
        while !stopped.load(Ordering::Relaxed) || requests < REQUESTS_MIN {
            let len = usize::try_from(512 * (1 + noise.below(128))).expect("small");
            let at = 512 * noise.below(16384);
            let data = noise.bytes(len);
            let begun = Instant::now();
            assert_eq!(client.write(at, &data).expect("the connection lasts"), 0);
            assert!(client.read(at, len).expect("the connection lasts") == data, "wrong data");
            longest = longest.max(begun.elapsed());
            requests += 2;
        }
        (requests, longest)
    }

    /// Nothing ever failed; what to print of it.
    fn finish(self) -> String {
        self.stop.store(true, Ordering::Relaxed);
        let (requests, longest) = self.thread.join().expect("the good client was not disturbed");
        assert!(longest < STALL_MAX, "{requests} requests, {longest:?}");
        format!("good client: {requests} requests, longest pair {} ms", longest.as_millis())
    }
}

/// Waits until the other side has closed the connection.
fn is_closed(mut stream: TcpStream) {
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let mut rest = Vec::new();
    match stream.read_to_end(&mut rest) {
        Ok(_) => {}
        Err(error) => {
            let kind = error.kind();
            assert_eq!(kind, std::io::ErrorKind::ConnectionReset, "still open: {error}");
        }
    }
}

fn header(kind: u16, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513_u32.to_be_bytes().to_vec();
    bytes.extend_from_slice(&0_u16.to_be_bytes());
    bytes.extend_from_slice(&kind.to_be_bytes());
    bytes.extend_from_slice(&7_u64.to_be_bytes());
    bytes.extend_from_slice(&offset.to_be_bytes());
    bytes.extend_from_slice(&len.to_be_bytes());
    bytes
}

#[test]
fn what_strangers_send_is_refused_and_disturbs_nobody() {
    let dir = directory();
    let node = Node::start(dir.path(), &SMALL);
    let steady = Steady::start(&node);

    // Connections that say nothing, stop within the handshake, or within a request.
    let mut idle = Vec::new();
    for _ in 0..50 {
        idle.push(TcpStream::connect(&node.nbd).expect("accepted"));
        let mut begun = TcpStream::connect(&node.nbd).expect("accepted");
        begun.write_all(&[0, 0, 0]).expect("taken");
        idle.push(begun);
        let mut client = Client::attach(&node.nbd, "vol0").expect("served");
        client.stream.write_all(&header(1, 64 << 20, 1 << 20)).expect("taken");
        client.stream.write_all(&[9; 1000]).expect("taken");
        idle.push(client.stream);
    }

    let mut noise = Noise(5);
    for round in 0..20 {
        let mut before = TcpStream::connect(&node.nbd).expect("accepted");
        before.write_all(&noise.bytes(64 << 10)).ok();
        is_closed(before);
        let mut after = Client::attach(&node.nbd, "vol0").expect("served");
        after.stream.write_all(&noise.bytes(64 << 10)).ok();
        is_closed(after.stream);
        // A request that is cut off, in a place of its own: none of it is written.
        let mut cut = Client::attach(&node.nbd, "vol0").expect("served");
        cut.stream.write_all(&header(1, (128 << 20) + (round << 16), 65536)).expect("taken");
        cut.stream.write_all(&noise.bytes(30_000)).expect("taken");
    }

    let mut client = Client::attach(&node.nbd, "vol0").expect("served");
    let block = [1; 4096];
    let (no_space, invalid) = (28, 22);
    assert_eq!(client.write(VOLUME_BYTES, &block).expect("told"), no_space);
    assert_eq!(client.write(VOLUME_BYTES - 512, &block).expect("told"), no_space);
    assert_eq!(client.write(u64::MAX - 4095, &block).expect("told"), no_space);
    assert_eq!(client.read_refused(VOLUME_BYTES, 4096).expect("told"), invalid);
    assert_eq!(client.read_refused(u64::MAX - 1, 512).expect("told"), invalid);
    assert_ne!(client.read_refused(0, u32::MAX as usize).expect("told"), 0);
    assert_eq!(client.write(VOLUME_BYTES - 4096, &block).expect("told"), 0);
    assert_eq!(client.read(VOLUME_BYTES - 4096, 4096).expect("told"), block);
    let zeroes = client.read(128 << 20, 2 << 20).expect("told");
    assert!(zeroes.iter().all(|byte| *byte == 0), "half a request was written");

    for name in ["nosuch", "default/nosuch", "vol0/", "default/vol0/x", "..", "%2e%2e%2fvol0"] {
        let text = fails("nbdinfo", &[&format!("nbd://{}/{name}", node.nbd)]);
        assert!(text.contains("No such file or directory"), "{name}: {text}");
        assert!(Client::attach(&node.nbd, name).is_err(), "{name}");
    }

    assert_eq!(node.json(&["status"])["health"], "ok");
    println!("{}", steady.finish());
    drop(idle);
    node.stop();
}

/// Raises the limit of open files of this process; the limit in force.
fn raise_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a valid pointer to a structure that lives across them.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
        limit.rlim_cur = limit.rlim_max;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
    }
    limit.rlim_cur
}

#[test]
fn a_thousand_connections_leave_room_for_the_disks() {
    let dir = directory();
    let limit = raise_limit();
    // Less than a distribution's usual soft limit: the node raises it for itself.
    let node = Node::start_with_limit(dir.path(), 200, &SMALL);
    let steady = Steady::start(&node);
    if limit < 2000 {
        println!("ulimit -Hn is {limit}: fewer than 1,000 connections are made");
    }
    let count = usize::try_from(limit.saturating_sub(700)).expect("small").min(1000);
    let mut clients: Vec<Client> = (0..count)
        .map(|i| {
            let client = Client::attach(&node.nbd, "vol0");
            client.unwrap_or_else(|why| panic!("connection {i}: {why}"))
        })
        .collect();
    for (i, client) in (0_u64..).zip(&mut clients) {
        let at = (64 << 20) + i * 4096;
        assert_eq!(client.write(at, &i.to_le_bytes().repeat(64)).expect("served"), 0, "{i}");
    }
    for (i, client) in (0_u64..).zip(clients.iter_mut().rev()) {
        let data = client.read((64 << 20) + i * 4096, 512).expect("served");
        assert_eq!(data, i.to_le_bytes().repeat(64), "{i}");
    }

    // Beyond the limit a client is told; disks can still be opened.
    while clients.len() < 1100 {
        let Ok(client) = Client::attach(&node.nbd, "vol0") else { break };
        clients.push(client);
    }
    assert!(clients.len() < 1100, "there is no limit");
    let text = fails("qemu-img", &["info", &node.uri]);
    assert!(text.contains("limit of"), "{text}");
    let disk = node.disk_id(3);
    node.ctl(&["disk", "offline", &disk]);
    node.ctl(&["disk", "online", &disk]);
    node.wait_json("online again", &["status"], |status| status["disks"]["online"] == 6);

    drop(clients);
    println!("{}", steady.finish());
    for _ in 0..100 {
        if Client::attach(&node.nbd, "vol0").is_ok() {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    run("nbdinfo", &[&node.uri]);
    node.stop();
}
