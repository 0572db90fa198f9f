//! A hand-written NBD client and a server on memory for the tests of the protocol. It is written
//! against the protocol document, with none of the server's constants, so that a wrong number on
//! the server's side is noticed.

#![allow(dead_code, reason = "each test binary uses a part of it")]

use std::rc::Rc;
use std::time::Duration;

use sds::export::memory::{MemoryDirectory, MemoryTarget};
use sds::export::nbd::{NbdConfig, NbdMetrics, Server};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::watch;
use tokio::task::{JoinHandle, spawn_local};

use clock::simulate;

// Not through the library: these tests are built without the simulation too.
#[allow(unreachable_pub, reason = "public where it belongs")]
#[path = "../../src/sim/clock.rs"]
mod clock;

pub(crate) const IHAVEOPT: u64 = 0x4948_4156_454F_5054;
pub(crate) const VOLUME_BYTES: u64 = 64 << 20;

/// A server on memory with one export `vol0`.
pub(crate) struct World {
    pub(crate) directory: Rc<MemoryDirectory>,
    pub(crate) target: Rc<MemoryTarget>,
    pub(crate) server: Server,
    pub(crate) stop: watch::Sender<bool>,
}

impl World {
    pub(crate) fn new(config: NbdConfig) -> Self {
        let directory = Rc::new(MemoryDirectory::default());
        let target = directory.add("vol0", VOLUME_BYTES);
        let (stop, stopped) = watch::channel(false);
        let server = Server::new(directory.clone(), config, stopped);
        Self { directory, target, server, stop }
    }

    pub(crate) fn metrics(&self) -> &NbdMetrics {
        self.server.metrics()
    }

    /// A connection to the server, and its task.
    pub(crate) fn connect_raw(&self) -> (Client<DuplexStream>, JoinHandle<()>) {
        let (ours, theirs) = duplex(256 << 10);
        let server = self.server.clone();
        let task = spawn_local(async move { server.serve_stream(theirs, "test").await });
        (Client { stream: ours, structured: false }, task)
    }

    /// A connection whose greeting is done.
    pub(crate) async fn connect(&self) -> Client<DuplexStream> {
        let (mut client, _) = self.connect_raw();
        client.greet(3).await;
        client
    }

    /// A connection in the transmission phase: structured replies, `base:allocation`.
    pub(crate) async fn attach(&self) -> Client<DuplexStream> {
        let mut client = self.connect().await;
        client.structured_reply().await;
        client.set_meta_context("vol0", &["base:allocation"]).await;
        client.go("vol0").await;
        client
    }

    /// A connection in the transmission phase with simple replies.
    pub(crate) async fn attach_simple(&self) -> Client<DuplexStream> {
        let mut client = self.connect().await;
        client.go("vol0").await;
        client
    }
}

/// Runs a test on one thread with a paused clock: time passes only when nothing else is to do.
pub(crate) fn run<F: Future<Output = ()>>(test: impl FnOnce(World) -> F) {
    run_with(NbdConfig::default(), test);
}

pub(crate) fn run_with<F: Future<Output = ()>>(config: NbdConfig, test: impl FnOnce(World) -> F) {
    simulate(async {
        let bounded = tokio::time::timeout(Duration::from_hours(1), test(World::new(config)));
        bounded.await.expect("the test hangs");
    });
}

pub(crate) struct Client<S> {
    pub(crate) stream: S,
    pub(crate) structured: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OptionReply {
    pub(crate) option: u32,
    pub(crate) kind: u32,
    pub(crate) data: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Reply {
    /// Error number (0: none).
    Simple(u64, u32),
    /// Flags, type, payload.
    Chunk(u64, u16, u16, Vec<u8>),
}

impl<S: AsyncRead + AsyncWrite + Unpin> Client<S> {
    pub(crate) async fn greet(&mut self, flags: u32) {
        let mut greeting = [0; 18];
        self.stream.read_exact(&mut greeting).await.unwrap();
        assert_eq!(&greeting, b"NBDMAGICIHAVEOPT\x00\x03");
        self.stream.write_u32(flags).await.unwrap();
    }

    pub(crate) async fn send_option(&mut self, option: u32, data: &[u8]) {
        let mut bytes = IHAVEOPT.to_be_bytes().to_vec();
        bytes.extend(option.to_be_bytes());
        bytes.extend(u32::try_from(data.len()).unwrap().to_be_bytes());
        bytes.extend(data);
        self.stream.write_all(&bytes).await.unwrap();
    }

    pub(crate) async fn option_reply(&mut self) -> OptionReply {
        assert_eq!(self.stream.read_u64().await.unwrap(), 0x0003_E889_0455_65A9);
        let option = self.stream.read_u32().await.unwrap();
        let kind = self.stream.read_u32().await.unwrap();
        let len = self.stream.read_u32().await.unwrap();
        let mut data = vec![0; usize::try_from(len).unwrap()];
        self.stream.read_exact(&mut data).await.unwrap();
        OptionReply { option, kind, data }
    }

    /// Sends an option and returns its replies up to the acknowledgement or error (included).
    pub(crate) async fn option(&mut self, option: u32, data: &[u8]) -> Vec<OptionReply> {
        self.send_option(option, data).await;
        let mut replies = Vec::new();
        loop {
            let reply = self.option_reply().await;
            assert_eq!(reply.option, option);
            let last = reply.kind == 1 || reply.kind >= 1 << 31;
            replies.push(reply);
            if last {
                return replies;
            }
        }
    }

    /// The error number (without bit 31) that an option is answered with, and its text.
    pub(crate) async fn option_error(&mut self, option: u32, data: &[u8]) -> (u32, String) {
        let reply = self.option(option, data).await.pop().unwrap();
        assert!(reply.kind >= 1 << 31, "an error was expected: {reply:?}");
        (reply.kind - (1 << 31), String::from_utf8(reply.data).unwrap())
    }

    pub(crate) async fn structured_reply(&mut self) {
        let replies = self.option(8, &[]).await;
        assert_eq!(replies.last().unwrap().kind, 1);
        self.structured = true;
    }

    pub(crate) async fn set_meta_context(
        &mut self,
        export: &str,
        queries: &[&str],
    ) -> Vec<OptionReply> {
        self.option(10, &meta_query(export, queries)).await
    }

    /// Enters the transmission phase; size and transmission flags.
    pub(crate) async fn go(&mut self, name: &str) -> (u64, u16) {
        let replies = self.option(7, &go_data(name, &[3])).await;
        assert_eq!(replies.last().unwrap().kind, 1, "{replies:?}");
        let export = replies.iter().find(|r| r.kind == 3 && r.data[..2] == [0, 0]).unwrap();
        let size = u64::from_be_bytes(export.data[2..10].try_into().unwrap());
        (size, u16::from_be_bytes(export.data[10..12].try_into().unwrap()))
    }

    pub(crate) async fn send(
        &mut self,
        command: u16,
        flags: u16,
        cookie: u64,
        offset: u64,
        len: u32,
    ) {
        self.stream.write_all(&request(command, flags, cookie, offset, len)).await.unwrap();
    }

    pub(crate) async fn reply(&mut self) -> Reply {
        let magic = self.stream.read_u32().await.unwrap();
        if magic == 0x6744_6698 {
            let error = self.stream.read_u32().await.unwrap();
            return Reply::Simple(self.stream.read_u64().await.unwrap(), error);
        }
        assert_eq!(magic, 0x668E_33EF);
        let flags = self.stream.read_u16().await.unwrap();
        let kind = self.stream.read_u16().await.unwrap();
        let cookie = self.stream.read_u64().await.unwrap();
        let len = self.stream.read_u32().await.unwrap();
        let mut data = vec![0; usize::try_from(len).unwrap()];
        self.stream.read_exact(&mut data).await.unwrap();
        Reply::Chunk(cookie, flags, kind, data)
    }

    /// Sends a request without payload and waits for its error number (0: success).
    pub(crate) async fn call(&mut self, command: u16, flags: u16, offset: u64, len: u32) -> u32 {
        self.send(command, flags, 77, offset, len).await;
        self.errno(77).await
    }

    /// Error number of the reply to come.
    pub(crate) async fn errno(&mut self, expected: u64) -> u32 {
        match self.reply().await {
            Reply::Simple(cookie, error) => {
                assert_eq!(cookie, expected);
                error
            }
            Reply::Chunk(cookie, 1, 0x8001, data) => {
                assert_eq!(cookie, expected);
                let text = usize::from(u16::from_be_bytes(data[4..6].try_into().unwrap()));
                assert_eq!(data.len(), 6 + text);
                u32::from_be_bytes(data[..4].try_into().unwrap())
            }
            other @ Reply::Chunk(..) => panic!("neither success nor an error: {other:?}"),
        }
    }

    pub(crate) async fn write(&mut self, offset: u64, data: &[u8]) -> u32 {
        self.write_flags(0, offset, data).await
    }

    pub(crate) async fn write_flags(&mut self, flags: u16, offset: u64, data: &[u8]) -> u32 {
        self.send(1, flags, 78, offset, u32::try_from(data.len()).unwrap()).await;
        self.stream.write_all(data).await.unwrap();
        self.errno(78).await
    }

    /// Reads a range; the number of content chunks (1 for a simple reply) and the data.
    pub(crate) async fn read_flags(
        &mut self,
        flags: u16,
        offset: u64,
        len: u32,
    ) -> (usize, Vec<u8>) {
        self.send(0, flags, 79, offset, len).await;
        let mut data = vec![0; usize::try_from(len).unwrap()];
        if !self.structured {
            assert_eq!(self.reply().await, Reply::Simple(79, 0));
            self.stream.read_exact(&mut data).await.unwrap();
            return (1, data);
        }
        let mut covered = 0;
        for chunks in 1.. {
            let Reply::Chunk(79, flags, 1, content) = self.reply().await else {
                panic!("no content chunk");
            };
            let at = u64::from_be_bytes(content[..8].try_into().unwrap()) - offset;
            let at = usize::try_from(at).unwrap();
            data[at..at + content.len() - 8].copy_from_slice(&content[8..]);
            covered += content.len() - 8;
            if flags & 1 != 0 {
                assert_eq!(covered, data.len());
                return (chunks, data);
            }
        }
        unreachable!()
    }

    pub(crate) async fn read(&mut self, offset: u64, len: u32) -> Vec<u8> {
        self.read_flags(0, offset, len).await.1
    }

    /// Extents (length, flags) of a range.
    pub(crate) async fn block_status(
        &mut self,
        flags: u16,
        offset: u64,
        len: u32,
    ) -> Vec<(u32, u32)> {
        self.send(7, flags, 80, offset, len).await;
        let Reply::Chunk(80, 1, 5, data) = self.reply().await else { panic!("no status chunk") };
        assert_eq!(data[..4], 1_u32.to_be_bytes());
        let number = |b: &[u8]| u32::from_be_bytes(b.try_into().unwrap());
        data[4..].chunks(8).map(|e| (number(&e[..4]), number(&e[4..]))).collect()
    }

    /// Waits for the server to close the connection; what it sent before.
    pub(crate) async fn closed(&mut self) -> Vec<u8> {
        let mut rest = Vec::new();
        match self.stream.read_to_end(&mut rest).await {
            Ok(_) => rest,
            Err(error) => {
                assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
                rest
            }
        }
    }
}

pub(crate) fn request(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> [u8; 28] {
    let mut bytes = [0; 28];
    bytes[..4].copy_from_slice(&0x2560_9513_u32.to_be_bytes());
    bytes[4..6].copy_from_slice(&flags.to_be_bytes());
    bytes[6..8].copy_from_slice(&command.to_be_bytes());
    bytes[8..16].copy_from_slice(&cookie.to_be_bytes());
    bytes[16..24].copy_from_slice(&offset.to_be_bytes());
    bytes[24..].copy_from_slice(&len.to_be_bytes());
    bytes
}

pub(crate) fn go_data(name: &str, infos: &[u16]) -> Vec<u8> {
    let mut data = u32::try_from(name.len()).unwrap().to_be_bytes().to_vec();
    data.extend(name.as_bytes());
    data.extend(u16::try_from(infos.len()).unwrap().to_be_bytes());
    data.extend(infos.iter().flat_map(|info| info.to_be_bytes()));
    data
}

pub(crate) fn meta_query(export: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = u32::try_from(export.len()).unwrap().to_be_bytes().to_vec();
    data.extend(export.as_bytes());
    data.extend(u32::try_from(queries.len()).unwrap().to_be_bytes());
    for query in queries {
        data.extend(u32::try_from(query.len()).unwrap().to_be_bytes());
        data.extend(query.as_bytes());
    }
    data
}

/// Bytes that tell their place.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    (0..len as u64).map(|i| ((i * 31 + i / 253 + seed * 7919) % 251).to_le_bytes()[0]).collect()
}
