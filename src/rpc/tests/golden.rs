//! The bytes of each released version, as they were: `tests/rpc/v1.hex` and its like.
//!
//! One conversation, in which every request is made, is held in that version and recorded in both
//! directions. As long as it gives the same bytes, this build understands nodes of that version and is
//! understood by them. A file is never changed once its version was released; a new version gets a new
//! one (`SDS_BLESS=1` writes it).

use std::cell::RefCell;
use std::fmt::Write;
use std::io;
use std::path::PathBuf;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{sleep, timeout};

use super::{Net, Wire, identity};
use crate::disk::conformance::{DISK, VOLUME, append, authority, blocks, spec};
use crate::env::Env;
use crate::export::memory::MemoryTarget;
use crate::export::{BlockTarget, TargetError};
use crate::id::{Epoch, SegmentId};
use crate::rpc::handshake::Target;
use crate::rpc::{Dial, Peer, RemoteDisk, RemoteVolume, RpcConfig};
use crate::shard::{Catalog, LocalFuture, Mirror, SealedShard, ShardClient, SlotClass};
use crate::sim::pipe::PipeEnd;
use crate::sim::simulate;

#[derive(Default)]
struct Record {
    sent: RefCell<Vec<u8>>,
    received: RefCell<Vec<u8>>,
}

/// A stream that is recorded.
struct Tap(PipeEnd, Rc<Record>);

impl AsyncRead for Tap {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.0).poll_read(cx, buf))?;
        self.1.received.borrow_mut().extend_from_slice(&buf.filled()[before..]);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for Tap {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let len = ready!(Pin::new(&mut self.0).poll_write(cx, buf))?;
        self.1.sent.borrow_mut().extend_from_slice(&buf[..len]);
        Poll::Ready(Ok(len))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

struct TapDial(Wire, Rc<Record>);

impl Dial for TapDial {
    type Stream = Tap;

    fn dial(&self) -> LocalFuture<'_, io::Result<Tap>> {
        Box::pin(async { Ok(Tap(self.0.dial().await?, self.1.clone())) })
    }
}

/// Every request once, and some that fail.
async fn converse(disk: &RemoteDisk) {
    let head = authority(3);
    let mirror = |n| Mirror { revision: (Epoch(3), n), data: Bytes::from_static(b"the root") };
    let id = SegmentId(1);
    let sealed = SealedShard { volume: VOLUME, segment: id, creation: 10, blocks: 2 };
    disk.info().await.unwrap();
    disk.fence(head, Some(mirror(1))).await.unwrap();
    disk.probe(head).await.unwrap();
    disk.probe(authority(2)).await.unwrap_err();
    disk.mirror(head, mirror(2)).await.unwrap();
    disk.create(head, spec(1, 10), SlotClass::Checkpoint).await.unwrap();
    disk.create(head, spec(1, 10), SlotClass::Client).await.unwrap_err();
    disk.append(append(3, 1, 0, 0x5a, 2)).await.unwrap();
    disk.append(append(3, 1, 7, 0x5a, 1)).await.unwrap_err();
    disk.read(VOLUME, id, 0, 2).await.unwrap();
    disk.read_raw(VOLUME, id, 1, 1).await.unwrap();
    disk.seal(head, id, 2, None).await.unwrap();
    disk.seal(head, id, 1, Some(Rc::from([1]))).await.unwrap_err();
    disk.read_sealed(sealed, 1, 1).await.unwrap();
    disk.mend(head, sealed, 1, blocks(0x5a, 1), 0x5a).await.unwrap();
    disk.list(VOLUME).await.unwrap();
    disk.volumes().await.unwrap();
    let catalog = Catalog { incarnation: 1, revision: 9, data: Bytes::from_static(b"keys") };
    disk.put_catalog(catalog).await.unwrap();
    disk.get_catalog().await.unwrap();
    disk.exercise(false).await.unwrap();
    disk.delete(head, id, 10).await.unwrap();
    disk.delete(head, id, 10).await.unwrap_err();
    disk.drop_volume(VOLUME).await.unwrap();
    disk.forget_volume(VOLUME).await.unwrap();
}

/// Every request to a volume and to the node, and some that fail.
async fn converse_more(net: &Net, peer: &Peer) {
    let target = Rc::new(MemoryTarget::new(1 << 20));
    net.shelf.serve(7, target.clone());
    let volume = RemoteVolume::attach(peer, super::VOLUME).await.unwrap();
    volume.write(4096, vec![0x5a; 8192].into()).await.unwrap();
    volume.read(4000, 200).await.unwrap();
    volume.zero(8192, 4096, true).await.unwrap();
    volume.flush().await.unwrap();
    volume.map(0, 1 << 20, 10).await.unwrap();
    volume.write(1 << 20, vec![0; 1].into()).await.unwrap_err();
    target.set_blocks_max(0);
    volume.zero(0, 100, false).await.unwrap_err();
    target.set_read_only(true);
    volume.write(0, vec![0; 1].into()).await.unwrap_err();
    target.set_failure(Some(TargetError::Io("it burns".into())));
    volume.flush().await.unwrap_err();
    net.shelf.serve(8, target);
    volume.flush().await.unwrap_err();
    // A change that is given up: the next one is made in another turn.
    let target = Rc::new(MemoryTarget::new(1 << 20));
    net.shelf.serve(8, target.clone());
    let volume = RemoteVolume::attach(peer, super::VOLUME).await.unwrap();
    net.shelf.delay.set(Duration::from_secs(1));
    let write = volume.write(0, vec![0; 1].into());
    assert!(timeout(Duration::from_millis(500), write).await.is_err());
    net.shelf.delay.set(Duration::ZERO);
    volume.write(0, vec![1; 1].into()).await.unwrap();
    sleep(Duration::from_secs(1)).await;
    peer.ask(Bytes::from_static(b"live"), Duration::from_secs(1)).await.unwrap();
    peer.ask(Bytes::from_static(b"why?"), Duration::from_secs(1)).await.unwrap_err();
}

/// Bytes as text: in hexadecimal, equal ones as `5a*4096`.
fn text(name: &str, bytes: &[u8]) -> String {
    let mut text = format!("{name}:");
    let mut rest = bytes;
    let mut column = 100;
    while let Some(&byte) = rest.first() {
        if column > 96 {
            text.push('\n');
            column = 0;
        }
        let run = rest.iter().take_while(|other| **other == byte).count();
        let begin = text.len();
        if run >= 8 {
            write!(text, " {byte:02x}*{run}").unwrap();
            rest = &rest[run..];
        } else {
            write!(text, " {byte:02x}").unwrap();
            rest = &rest[1..];
        }
        column += text.len() - begin;
    }
    text + "\n"
}

fn conversation(version: u16) -> String {
    let record = Rc::<Record>::default();
    simulate(async {
        let config = RpcConfig {
            versions: version..=version,
            ping_interval: Duration::from_hours(1),
            ..RpcConfig::default()
        };
        let net = Net::new(config.clone());
        net.disk(DISK).await;
        let dial = TapDial(Wire(net.clone()), record.clone());
        let target = Target { node: None, core: 0 };
        let env = Env::from_seed(1);
        let peer = Peer::spawn("store", identity("head", 1), target, dial, config, env);
        super::until_up(&peer).await;
        converse(&RemoteDisk::new(DISK, peer.clone())).await;
        converse_more(&net, &peer).await;
    });
    let (sent, received) = (record.sent.take(), record.received.take());
    text("from the head", &sent) + &text("from the disk", &received)
}

#[test]
fn the_bytes_of_each_version() {
    for version in crate::rpc::frame::VERSION_MIN..=crate::rpc::frame::VERSION_MAX {
        let name = format!("tests/rpc/v{version}.hex");
        let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(&name);
        let now = conversation(version);
        if std::env::var_os("SDS_BLESS").is_some() && !path.exists() {
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, &now).unwrap();
        }
        let then = std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{name}: {error}"));
        let differs = now.lines().zip(then.lines()).enumerate().find(|(_, (a, b))| a != b);
        assert!(now == then, "{name}: other bytes than once were sent: {differs:?}");
    }
}
