//! Arbitrary bytes to both sides of the RPC between nodes: raw, and as well-formed frames (with right magics,
//! lengths and checksums) of arbitrary content.
#![no_main]

use std::cell::Cell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use sds::env::Env;
use sds::export::memory::MemoryTarget;
use sds::export::{BlockTarget, TargetError};
use sds::id::{ClusterId, DiskId, Epoch, NodeId, SegmentId, VolumeId};
use sds::rpc::handshake::{Attempt, Target, WindowSize, accept, connect, welcome};
use sds::rpc::{
    Dial, Directories, Identity, Peer, Refuses, RemoteDisk, RemoteVolume, RpcConfig, Served,
    Server, VolumeDirectory,
};
use sds::shard::{LocalFuture, ShardClient};
use sds::sim::simulate;
use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex};
use tokio::sync::watch;

/// Every wait of either side is shorter.
const HANG: Duration = Duration::from_secs(900);
const DISK: DiskId = DiskId::from_bytes([1; 16]);

/// One small volume whose id is zero, at epoch zero: what zeroes in a request mean.
struct OneVolume(Rc<MemoryTarget>);

impl VolumeDirectory for OneVolume {
    fn volume(&self, id: VolumeId) -> LocalFuture<'_, Result<Served, TargetError>> {
        let served = Served { epoch: Epoch(0), target: self.0.clone() };
        let known = id == VolumeId::default();
        Box::pin(std::future::ready(if known { Ok(served) } else { Err(TargetError::Stopped) }))
    }
}

fn directories() -> Directories {
    let volumes = Rc::new(OneVolume(Rc::new(MemoryTarget::new(100_000))));
    Directories { volumes, ..Directories::from(Rc::new(Refuses)) }
}

fn identity(byte: u8) -> Identity {
    let (cluster, node) = (ClusterId::from_bytes([7; 16]), NodeId::from_bytes([byte; 16]));
    Identity { cluster, node, name: "fuzz".into(), core: 0 }
}

/// Frames of arbitrary content made of `data`: one for each chunk, headed by its first bytes.
fn frames(mut data: &[u8], first_id: u64) -> Vec<u8> {
    let mut stream = Vec::new();
    while let Some((head, rest)) = data.split_first_chunk::<6>() {
        let [kind, flags, code, id, control, payload] = head.map(usize::from);
        let (content, rest) = rest.split_at(rest.len().min(control + payload));
        let (control, payload) = content.split_at(control.min(content.len()));
        data = rest;
        let flags = flags & 3;
        let mut header = [0; 48];
        header[..4].copy_from_slice(b"SDSf");
        header[4] = 1;
        header[6] = (kind % 8) as u8;
        header[7] = flags as u8;
        header[8] = (code % 66) as u8;
        header[12..16].copy_from_slice(&(control.len() as u32).to_le_bytes());
        header[16..24].copy_from_slice(&(first_id + id as u64 % 8).to_le_bytes());
        header[24..28].copy_from_slice(&(payload.len() as u32).to_le_bytes());
        let total = if flags & 1 == 1 { 300 } else { payload.len() as u32 };
        header[28..32].copy_from_slice(&total.to_le_bytes());
        if flags & 2 == 2 {
            header[36..40].copy_from_slice(&crc32fast::hash(payload).to_le_bytes());
        }
        let crc = crc32fast::hash(&[&header[..44], control].concat());
        header[44..].copy_from_slice(&crc.to_le_bytes());
        stream.extend([&header[..], control, payload].concat());
    }
    stream
}

fn to_server(bytes: &[u8], greeted: bool) {
    simulate(async {
        let (_stop, stopped) = watch::channel(false);
        let server = Server::new(identity(2), directories(), RpcConfig::default(), stopped);
        let (mut ours, theirs) = duplex(64 << 10);
        let talk = async {
            let target = Target { node: None, core: 0 };
            let attempt = Attempt { instance: 1, number: 1 };
            if greeted {
                connect(&mut ours, &identity(1), &(1..=1), target, attempt).await.expect("met");
            }
            let (mut input, mut output) = tokio::io::split(ours);
            let mut answer = Vec::new();
            let send = async {
                let _sent = output.write_all(bytes).await;
                let _closed = output.shutdown().await;
            };
            tokio::join!(send, async {
                let _read = input.read_to_end(&mut answer).await;
            });
        };
        let all = async { tokio::join!(server.serve_stream(theirs, "fuzz"), talk) };
        tokio::time::timeout(HANG, all).await.expect("the server hangs");
        tokio::task::yield_now().await;
        assert_eq!(server.metrics().connections.get(), 0);
        assert_eq!(server.metrics().running.get(), 0);
    });
}

/// Gives one stream, then no more.
struct Once(Cell<Option<DuplexStream>>);

impl Dial for Once {
    type Stream = DuplexStream;

    fn dial(&self) -> LocalFuture<'_, io::Result<DuplexStream>> {
        let stream = self.0.take().ok_or_else(|| io::ErrorKind::ConnectionRefused.into());
        Box::pin(std::future::ready(stream))
    }
}

async fn use_volume(peer: &Peer, volume: VolumeId) {
    let Ok(remote) = RemoteVolume::attach(peer, volume).await else { return };
    let (write, zero) = (remote.write(0, vec![1; 5].into()), remote.zero(0, 5, true));
    let (read, map) = (remote.read(3, 4), remote.map(0, 100, 10));
    let (_wrote, _zeroed, read, _mapped) = tokio::join!(write, zero, read, map);
    assert!(read.is_err() || read.is_ok_and(|pieces| pieces.concat().len() == 4));
}

fn to_client(bytes: &[u8], greeted: bool) {
    simulate(async {
        let (mut ours, theirs) = duplex(64 << 10);
        let once = Once(Cell::new(Some(theirs)));
        let target = Target { node: None, core: 0 };
        let env = Env::from_seed(1);
        let peer = Peer::spawn("fuzz", identity(1), target, once, RpcConfig::default(), env);
        let disk = RemoteDisk::new(DISK, peer.clone());
        let volume = VolumeId::from_bytes([3; 16]);
        let asked = async {
            tokio::join!(
                disk.info(),
                disk.list(volume),
                disk.read(volume, SegmentId(1), 0, 0),
                disk.volumes(),
                disk.get_catalog(),
                disk.drop_volume(volume),
                use_volume(&peer, volume),
                peer.ask("?".into(), Duration::from_secs(1)),
            )
        };
        let talk = async {
            if greeted {
                let own = identity(2);
                let caller = accept(&mut ours, &own, &(1..=1)).await.expect("it says hello");
                let window = WindowSize { requests: 8, bytes: 1 << 20 };
                welcome(&mut ours, &own, &caller.identity, window).await.expect("taken");
            }
            // It has asked when it is answered.
            let mut scrap = [0; 4096];
            let _heard = ours.read(&mut scrap).await;
            let _sent = ours.write_all(bytes).await;
            drop(ours);
        };
        let all = async { tokio::join!(asked, talk) };
        let _answers = tokio::time::timeout(HANG, all).await.expect("a request hangs");
    });
}

fuzz_target!(|data: &[u8]| {
    let Some((&mode, data)) = data.split_first() else { return };
    let greeted = mode & 1 != 0;
    let framed = mode & 2 != 0;
    if mode & 4 != 0 {
        // Ids of first requests: slots from 0 on.
        let stream = if framed { frames(data, 0) } else { data.to_vec() };
        to_client(&stream, greeted);
    } else {
        let stream = if framed { frames(data, 1) } else { data.to_vec() };
        to_server(&stream, greeted);
    }
});
