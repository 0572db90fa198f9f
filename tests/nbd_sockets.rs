//! The NBD server over real sockets: TCP, unix, TLS, a thousand connections, and the crate `nbd`
//! as a client that somebody else wrote.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod nbd_support;
mod nbd_threaded;

use std::io::{Read, Seek, SeekFrom, Write};
use std::net::TcpStream;
use std::os::unix::net::{UnixListener, UnixStream};
use std::time::Duration;

use nbd::client::{NbdClient, handshake};
use nbd_support::pattern;
use nbd_threaded::{Identity, Running, options};
use sds::export::nbd::UnixSocket;

fn exercise<S: Read + Write>(mut stream: S, name: &str) {
    let export = handshake(&mut stream, name.as_bytes()).unwrap();
    assert_eq!(export.size, nbd_support::VOLUME_BYTES);
    assert!(!export.readonly && export.send_flush && export.send_trim);
    let mut client = NbdClient::new(stream, &export);
    let data = pattern(3, 200_000);
    client.seek(SeekFrom::Start(12_345)).unwrap();
    client.write_all(&data).unwrap();
    client.flush().unwrap();
    client.seek(SeekFrom::Start(12_345)).unwrap();
    let mut read = vec![0; data.len()];
    client.read_exact(&mut read).unwrap();
    assert_eq!(read, data);
    client.seek(SeekFrom::Start(export.size - 512)).unwrap();
    assert!(client.write_all(&[1; 1024]).is_err(), "beyond the end");
}

#[test]
fn the_nbd_crate_over_tcp_and_unix() {
    let server = Running::start(options());
    exercise(TcpStream::connect(server.tcp).unwrap(), "vol0");
    exercise(UnixStream::connect(&server.unix).unwrap(), "vol0");
}

#[test]
fn a_thousand_connections() {
    let server = Running::start(options());
    let (_, hard) = rlimit();
    // Both ends are in this process; some descriptors are for the rest of it.
    let count = usize::try_from(hard.saturating_sub(100) / 2).unwrap_or(1000).min(1000);
    assert!(count >= 100, "ulimit -n is too low to test anything");
    let mut clients: Vec<_> = (0..count)
        .map(|_| {
            let mut stream = TcpStream::connect(server.tcp).unwrap();
            stream.set_nodelay(true).unwrap();
            let export = handshake(&mut stream, b"vol0").unwrap();
            NbdClient::new(stream, &export)
        })
        .collect();
    for (i, client) in clients.iter_mut().enumerate() {
        client.seek(SeekFrom::Start(4096 * i as u64)).unwrap();
        client.write_all(&[u8::try_from(i % 251).unwrap(); 4096]).unwrap();
    }
    for (i, client) in clients.iter_mut().rev().enumerate() {
        let mut read = [0; 4096];
        client.seek(SeekFrom::Start(4096 * i as u64)).unwrap();
        client.read_exact(&mut read).unwrap();
        assert_eq!(read, [u8::try_from(i % 251).unwrap(); 4096]);
    }
}

/// The limits of open files: soft (raised to hard by this call) and hard.
fn rlimit() -> (u64, u64) {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: both calls get a valid pointer to a structure that lives across them.
    unsafe {
        assert_eq!(libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit), 0);
        limit.rlim_cur = limit.rlim_max;
        assert_eq!(libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit), 0);
    }
    (limit.rlim_cur, limit.rlim_max)
}

#[test]
fn stopping_closes_the_listeners() {
    let server = Running::start(options());
    let (tcp, unix) = (server.tcp, server.unix.clone());
    let mut idle = TcpStream::connect(tcp).unwrap();
    handshake(&mut idle, b"vol0").unwrap();
    server.stop();
    assert_eq!(idle.read(&mut [0; 1]).unwrap(), 0, "an orderly close");
    assert!(TcpStream::connect(tcp).is_err());
    assert!(!unix.exists(), "the socket's file is removed");
}

#[test]
fn unix_sockets_replace_only_the_dead() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let _entered = runtime.enter();
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("s");
    drop(UnixListener::bind(&path).unwrap());
    assert!(path.exists(), "a dead socket is left");
    let alive = UnixSocket::bind(&path).unwrap();
    let error = UnixSocket::bind(&path).err().unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::AddrInUse);
    drop(alive);
    assert!(!path.exists());
    std::fs::write(&path, "precious").unwrap();
    let error = UnixSocket::bind(&path).err().unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::AlreadyExists);
    assert_eq!(std::fs::read(&path).unwrap(), b"precious");
}

/// Speaks the handshake up to STARTTLS; the reply's type.
fn start_tls(stream: &mut TcpStream) -> u32 {
    let mut greeting = [0; 18];
    stream.read_exact(&mut greeting).unwrap();
    stream.write_all(&3_u32.to_be_bytes()).unwrap();
    option(stream, 5, b"")
}

fn option(stream: &mut (impl Read + Write), option: u32, data: &[u8]) -> u32 {
    let mut bytes = nbd_support::IHAVEOPT.to_be_bytes().to_vec();
    bytes.extend(option.to_be_bytes());
    bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
    bytes.extend(data);
    stream.write_all(&bytes).unwrap();
    loop {
        let mut header = [0; 20];
        stream.read_exact(&mut header).unwrap();
        let kind = u32::from_be_bytes(header[12..16].try_into().unwrap());
        let len = u32::from_be_bytes(header[16..].try_into().unwrap());
        let mut data = vec![0; usize::try_from(len).unwrap()];
        stream.read_exact(&mut data).unwrap();
        if kind == 1 || kind >= 1 << 31 {
            return kind;
        }
    }
}

fn connect(server: &Running) -> TcpStream {
    let stream = TcpStream::connect(server.tcp).unwrap();
    stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    stream
}

const TLS_REQUIRED: u32 = (1 << 31) | 5;
const INVALID: u32 = (1 << 31) | 3;

#[test]
fn required_tls_is_required() {
    let identity = Identity::new();
    let server = Running::start(options().tls_required(identity.acceptor(false)));
    let mut plain = connect(&server);
    plain.read_exact(&mut [0; 18]).unwrap();
    plain.write_all(&3_u32.to_be_bytes()).unwrap();
    for forbidden in [3, 6, 7, 8, 9, 10, 99] {
        assert_eq!(option(&mut plain, forbidden, b""), TLS_REQUIRED);
    }
    assert_eq!(option(&mut plain, 2, b""), 1, "ABORT is answered");
    assert!(handshake(connect(&server), b"vol0").is_err(), "EXPORT_NAME without TLS");

    let mut stream = connect(&server);
    assert_eq!(start_tls(&mut stream), 1);
    let mut tls = identity.connect(stream, false);
    assert_eq!(option(&mut tls, 5, b""), INVALID, "TLS is on already");
    let go = nbd_support::go_data("vol0", &[]);
    assert_eq!(option(&mut tls, 7, &go), 1);
    let data = pattern(5, 300_000);
    tls.write_all(&nbd_support::request(1, 0, 1, 77, 300_000)).unwrap();
    tls.write_all(&data).unwrap();
    tls.write_all(&nbd_support::request(0, 0, 2, 77, 300_000)).unwrap();
    let mut reply = [0; 16 + 16];
    tls.read_exact(&mut reply[..16]).unwrap();
    tls.read_exact(&mut reply[16..]).unwrap();
    let mut read = vec![0; data.len()];
    tls.read_exact(&mut read).unwrap();
    assert_eq!(reply[4..8], [0; 4]);
    tls.write_all(&nbd_support::request(2, 0, 3, 0, 0)).unwrap();
    assert_eq!(tls.read(&mut [0; 1]).unwrap(), 0, "TLS is closed in order");
}

#[test]
fn allowed_tls_forgets_what_was_said_in_clear() {
    let identity = Identity::new();
    let server = Running::start(options().tls_allowed(identity.acceptor(false)));
    exercise(connect(&server), "vol0");
    let mut stream = connect(&server);
    stream.read_exact(&mut [0; 18]).unwrap();
    stream.write_all(&3_u32.to_be_bytes()).unwrap();
    assert_eq!(option(&mut stream, 8, b""), 1);
    assert_eq!(option(&mut stream, 5, b""), 1);
    let mut tls = identity.connect(stream, false);
    let query = nbd_support::meta_query("vol0", &["base:allocation"]);
    assert_eq!(option(&mut tls, 10, &query), INVALID, "structured replies are forgotten");
}

/// An attacker in the middle who adds options behind STARTTLS in clear gets no answer to them.
#[test]
fn options_smuggled_behind_starttls_are_not_taken() {
    let identity = Identity::new();
    let server = Running::start(options().tls_required(identity.acceptor(false)));
    let mut stream = connect(&server);
    stream.read_exact(&mut [0; 18]).unwrap();
    let mut bytes = 3_u32.to_be_bytes().to_vec();
    for number in [5_u32, 3] {
        bytes.extend(nbd_support::IHAVEOPT.to_be_bytes());
        bytes.extend(number.to_be_bytes());
        bytes.extend([0; 4]);
    }
    stream.write_all(&bytes).unwrap();
    let mut reply = [0; 20];
    stream.read_exact(&mut reply).unwrap();
    let mut rest = Vec::new();
    let _unused = stream.read_to_end(&mut rest);
    assert!(!rest.windows(4).any(|window| window == b"vol0"), "the list was answered in clear");
}

#[test]
fn a_client_authority_is_enforced() {
    let identity = Identity::new();
    let server = Running::start(options().tls_required(identity.acceptor(true)));
    let mut stream = connect(&server);
    assert_eq!(start_tls(&mut stream), 1);
    assert_eq!(option(&mut identity.connect(stream, true), 3, b""), 1);
    let mut stream = connect(&server);
    assert_eq!(start_tls(&mut stream), 1);
    let mut nameless = identity.connect(stream, false);
    let refused = nameless
        .write_all(&nbd_support::IHAVEOPT.to_be_bytes())
        .and_then(|()| nameless.read_exact(&mut [0; 1]));
    assert!(refused.is_err());
}
