//! The RPC between nodes over loopback TCP, both ends in one thread, against disks and a volume in memory; and in the same
//! rounds its floor: 4 KiB sent to and fro over such a connection by nothing but reads and writes.
//!
//! Prints microseconds per request and the ratio to the floor. `--case NAME --count N` runs one case
//! once, for `strace -c`.

#![allow(clippy::print_stdout, reason = "a benchmark reports on its standard output")]

use std::cell::Cell;
use std::future::ready;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use sds::buffer::AlignedBuf;
use sds::env::Env;
use sds::export::{BlockTarget, MapExtent, TargetError};
use sds::id::{BLOCK_SIZE, ClusterId, DiskId, Epoch, HeadId, NodeId, SegmentId, VolumeId};
use sds::rpc::handshake::Target;
use sds::rpc::tcp::{TcpDial, prepare};
use sds::rpc::{
    Directories, DiskDirectory, Identity, Peer, RemoteDisk, RemoteVolume, RpcConfig, Served,
    Server, VolumeDirectory,
};
use sds::shard::{
    Append, Authority, Catalog, DiskInfo, LocalFuture, Mirror, ReadReply, SealedShard, ShardClient,
    ShardError, ShardResult, ShardSpec, SlotClass, VolumeFence, VolumeOnDisk,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::LocalSet;

/// Rounds of which the median counts.
const ROUNDS: usize = 7;

/// A disk that keeps nothing: appends are taken, reads give zeroes.
struct Memory {
    id: DiskId,
    zeroes: Bytes,
}

fn no<T: 'static>() -> LocalFuture<'static, ShardResult<T>> {
    Box::pin(ready(Err(ShardError::Gone)))
}

impl Memory {
    fn blocks(&self, count: u32) -> LocalFuture<'static, ShardResult<ReadReply>> {
        let data = self.zeroes.slice(..count as usize * BLOCK_SIZE);
        Box::pin(ready(Ok(ReadReply { data, crcs: vec![0; count as usize] })))
    }
}

impl ShardClient for Memory {
    fn disk(&self) -> DiskId {
        self.id
    }
    fn info(&self) -> LocalFuture<'_, ShardResult<DiskInfo>> {
        no()
    }
    fn fence(&self, _: Authority, _: Option<Mirror>) -> LocalFuture<'_, ShardResult<VolumeOnDisk>> {
        no()
    }
    fn probe(&self, _: Authority) -> LocalFuture<'_, ShardResult<()>> {
        Box::pin(ready(Ok(())))
    }
    fn mirror(&self, _: Authority, _: Mirror) -> LocalFuture<'_, ShardResult<()>> {
        no()
    }
    fn create(&self, _: Authority, _: ShardSpec, _: SlotClass) -> LocalFuture<'_, ShardResult<()>> {
        no()
    }
    fn append(&self, append: Append) -> LocalFuture<'_, ShardResult<()>> {
        drop(append);
        Box::pin(ready(Ok(())))
    }
    fn seal(
        &self,
        _: Authority,
        _: SegmentId,
        _: u32,
        _: Option<Rc<[u32]>>,
    ) -> LocalFuture<'_, ShardResult<()>> {
        no()
    }
    fn delete(&self, _: Authority, _: SegmentId, _: u64) -> LocalFuture<'_, ShardResult<()>> {
        no()
    }
    fn read(
        &self,
        _: VolumeId,
        _: SegmentId,
        _: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>> {
        self.blocks(count)
    }
    fn read_raw(
        &self,
        _: VolumeId,
        _: SegmentId,
        _: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>> {
        self.blocks(count)
    }
    fn read_sealed(
        &self,
        _: SealedShard,
        _: u32,
        count: u32,
    ) -> LocalFuture<'_, ShardResult<ReadReply>> {
        self.blocks(count)
    }
    fn mend(
        &self,
        _: Authority,
        _: SealedShard,
        _: u32,
        _: Bytes,
        _: u32,
    ) -> LocalFuture<'_, ShardResult<()>> {
        no()
    }
    fn list(&self, _: VolumeId) -> LocalFuture<'_, ShardResult<VolumeOnDisk>> {
        no()
    }
    fn volumes(&self) -> LocalFuture<'_, ShardResult<Vec<VolumeFence>>> {
        no()
    }
    fn drop_volume(&self, _: VolumeId) -> LocalFuture<'_, ShardResult<()>> {
        no()
    }
    fn forget_volume(&self, _: VolumeId) -> LocalFuture<'_, ShardResult<()>> {
        no()
    }
    fn put_catalog(&self, _: Catalog) -> LocalFuture<'_, ShardResult<()>> {
        no()
    }
    fn get_catalog(&self) -> LocalFuture<'_, ShardResult<Catalog>> {
        no()
    }
    fn exercise(&self, _: bool) -> LocalFuture<'_, ShardResult<()>> {
        no()
    }
}

struct Only(Rc<Memory>);

impl DiskDirectory for Only {
    fn disk(&self, id: DiskId) -> Option<Rc<dyn ShardClient>> {
        (id == self.0.id).then(|| self.0.clone() as Rc<dyn ShardClient>)
    }
}

/// A volume that keeps nothing.
struct Void(Bytes);

impl BlockTarget for Void {
    fn size(&self) -> u64 {
        1 << 40
    }
    fn read_only(&self) -> bool {
        false
    }
    fn read(&self, _: u64, len: usize) -> LocalFuture<'_, Result<Vec<Bytes>, TargetError>> {
        Box::pin(ready(Ok(vec![self.0.slice(..len)])))
    }
    fn write(&self, _: u64, _: Bytes) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(ready(Ok(())))
    }
    fn zero(&self, _: u64, _: u64, _: bool) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(ready(Ok(())))
    }
    fn flush(&self) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(ready(Ok(())))
    }
    fn map(
        &self,
        _: u64,
        len: u64,
        _: usize,
    ) -> LocalFuture<'_, Result<Vec<MapExtent>, TargetError>> {
        Box::pin(ready(Ok(vec![MapExtent { len, allocated: true }])))
    }
}

struct OneVolume(Rc<Void>);

impl VolumeDirectory for OneVolume {
    fn volume(&self, _: VolumeId) -> LocalFuture<'_, Result<Served, TargetError>> {
        Box::pin(ready(Ok(Served { epoch: Epoch(1), target: self.0.clone() })))
    }
}

#[derive(Clone, Copy, PartialEq)]
enum Kind {
    Echo,
    Append,
    Read,
    VolumeWrite,
    VolumeRead,
}

/// What is measured: its name, what is done, bytes of each, depth, how often, and the case that is its
/// floor.
struct Case {
    name: &'static str,
    kind: Kind,
    bytes: usize,
    depth: usize,
    count: u64,
    floor: usize,
}

const fn case(
    (name, kind): (&'static str, Kind),
    bytes: usize,
    depth: usize,
    count: u64,
    floor: usize,
) -> Case {
    Case { name, kind, bytes, depth, count, floor }
}

const CASES: [Case; 15] = [
    case(("echo-4k-1", Kind::Echo), 4 << 10, 1, 20_000, 0),
    case(("append-4k-1", Kind::Append), 4 << 10, 1, 20_000, 0),
    case(("read-4k-1", Kind::Read), 4 << 10, 1, 20_000, 0),
    case(("echo-4k-32", Kind::Echo), 4 << 10, 32, 200_000, 3),
    case(("append-4k-32", Kind::Append), 4 << 10, 32, 200_000, 3),
    case(("read-4k-32", Kind::Read), 4 << 10, 32, 200_000, 3),
    case(("echo-128k-8", Kind::Echo), 128 << 10, 8, 10_000, 6),
    case(("append-128k-8", Kind::Append), 128 << 10, 8, 10_000, 6),
    case(("read-128k-8", Kind::Read), 128 << 10, 8, 10_000, 6),
    case(("vwrite-4k-1", Kind::VolumeWrite), 4 << 10, 1, 20_000, 0),
    case(("vread-4k-1", Kind::VolumeRead), 4 << 10, 1, 20_000, 0),
    case(("vwrite-4k-32", Kind::VolumeWrite), 4 << 10, 32, 200_000, 3),
    case(("vread-4k-32", Kind::VolumeRead), 4 << 10, 32, 200_000, 3),
    case(("vwrite-128k-8", Kind::VolumeWrite), 128 << 10, 8, 10_000, 6),
    case(("vread-128k-8", Kind::VolumeRead), 128 << 10, 8, 10_000, 6),
];

/// Sends `count` times `bytes` to an echo, at most `depth` of them on their way.
async fn echo(stream: &mut TcpStream, case: &Case, count: u64) {
    let window = case.bytes * case.depth;
    let data = vec![7; window];
    let mut scrap = vec![0; window];
    let total = case.bytes as u64 * count;
    let (mut sent, mut received) = (0_u64, 0_u64);
    let (mut input, mut output) = stream.split();
    while received < total {
        let room = (received + window as u64).min(total) - sent;
        if room > 0 {
            let room = usize::try_from(room).expect("a window");
            tokio::select! {
                biased;
                len = output.write(&data[..room]) => sent += len.expect("sent") as u64,
                len = input.read(&mut scrap) => received += len.expect("received") as u64,
            }
        } else {
            received += input.read(&mut scrap).await.expect("received") as u64;
        }
    }
}

async fn serve_echo(listener: TcpListener) {
    let (mut stream, _) = listener.accept().await.expect("a connection");
    prepare(&stream).expect("options");
    let mut data = vec![0; 1 << 20];
    while let Ok(len @ 1..) = stream.read(&mut data).await {
        stream.write_all(&data[..len]).await.expect("sent back");
    }
}

async fn requests(disk: Rc<RemoteDisk>, case: &Case, count: u64) {
    let left = Rc::new(Cell::new(count));
    let blocks = u32::try_from(case.bytes / BLOCK_SIZE).expect("few");
    let (bytes, kind) = (case.bytes, case.kind);
    let volume = VolumeId::from_bytes([3; 16]);
    let authority = Authority { volume, epoch: Epoch(1), head: HeadId::from_bytes([4; 16]) };
    let workers: Vec<_> = (0..case.depth)
        .map(|_| {
            let (disk, left) = (disk.clone(), left.clone());
            let data: Rc<[Bytes]> = Rc::from([AlignedBuf::zeroed(bytes).freeze()]);
            let crcs: Rc<[u32]> = vec![0; blocks as usize].into();
            tokio::task::spawn_local(async move {
                while let Some(rest) = left.get().checked_sub(1) {
                    left.set(rest);
                    if kind == Kind::Read {
                        disk.read(volume, SegmentId(1), 0, blocks).await.expect("read");
                    } else {
                        let (data, crcs) = (data.clone(), crcs.clone());
                        let segment = SegmentId(1);
                        let append = Append { authority, segment, block: 0, data, crcs };
                        disk.append(append).await.expect("appended");
                    }
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.expect("no panic");
    }
}

async fn volume_requests(volume: Rc<RemoteVolume>, case: &Case, count: u64) {
    let left = Rc::new(Cell::new(count));
    let (bytes, kind) = (case.bytes, case.kind);
    let workers: Vec<_> = (0..case.depth)
        .map(|_| {
            let (volume, left) = (volume.clone(), left.clone());
            let data = AlignedBuf::zeroed(bytes).freeze();
            tokio::task::spawn_local(async move {
                while let Some(rest) = left.get().checked_sub(1) {
                    left.set(rest);
                    if kind == Kind::VolumeRead {
                        volume.read(0, bytes).await.expect("read");
                    } else {
                        volume.write(0, data.clone()).await.expect("written");
                    }
                }
            })
        })
        .collect();
    for worker in workers {
        worker.await.expect("no panic");
    }
}

/// What the cases ask.
struct Ends {
    echoes: TcpStream,
    disk: Rc<RemoteDisk>,
    volume: Rc<RemoteVolume>,
}

#[expect(clippy::disallowed_methods, reason = "measures real time")]
async fn run(case: &Case, count: u64, ends: &mut Ends) -> Duration {
    let start = std::time::Instant::now();
    match case.kind {
        Kind::Echo => echo(&mut ends.echoes, case, count).await,
        Kind::Append | Kind::Read => requests(ends.disk.clone(), case, count).await,
        Kind::VolumeWrite | Kind::VolumeRead => {
            volume_requests(ends.volume.clone(), case, count).await;
        }
    }
    start.elapsed()
}

fn identity(name: &str, byte: u8) -> Identity {
    let cluster = ClusterId::from_bytes([1; 16]);
    Identity { cluster, node: NodeId::from_bytes([byte; 16]), name: name.to_owned(), core: 0 }
}

async fn listen() -> (TcpListener, String) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound").to_string();
    (listener, address)
}

fn argument(name: &str) -> Option<String> {
    std::env::args().skip_while(|argument| argument != name).nth(1)
}

/// Makes both ends of everything.
async fn ends(stopped: watch::Receiver<bool>) -> Ends {
    let (listener, address) = listen().await;
    tokio::task::spawn_local(serve_echo(listener));
    let echoes = TcpStream::connect(address).await.expect("an echo");
    prepare(&echoes).expect("options");

    let id = DiskId::from_bytes([2; 16]);
    let memory = Rc::new(Memory { id, zeroes: AlignedBuf::zeroed(1 << 20).freeze() });
    let config = RpcConfig::default();
    let volumes = Rc::new(OneVolume(Rc::new(Void(memory.zeroes.clone()))));
    let directories = Directories { volumes, ..Directories::from(Rc::new(Only(memory))) };
    let server = Server::new(identity("store", 2), directories, config.clone(), stopped);
    let (listener, address) = listen().await;
    tokio::task::spawn_local(async move { server.serve_tcp(listener).await });
    let target = Target { node: None, core: 0 };
    let dial = TcpDial { address };
    let peer = Peer::spawn("store", identity("head", 1), target, dial, config, Env::from_seed(1));
    let volume = RemoteVolume::attach(&peer, VolumeId::from_bytes([3; 16])).await;
    let volume = Rc::new(volume.expect("it is served"));
    Ends { echoes, disk: Rc::new(RemoteDisk::new(id, peer)), volume }
}

async fn measure() {
    let (_stop, stopped) = watch::channel(false);
    let mut ends = ends(stopped).await;
    if let Some(name) = argument("--case") {
        let case = CASES.iter().find(|case| case.name == name).expect("a known case");
        let count = argument("--count").map_or(case.count, |n| n.parse().expect("a number"));
        println!("{name}: {:?}", run(case, count, &mut ends).await);
        return;
    }
    let mut rounds: Vec<Vec<f64>> = vec![Vec::new(); CASES.len()];
    for _ in 0..ROUNDS {
        for (case, times) in CASES.iter().zip(&mut rounds) {
            let took = run(case, case.count, &mut ends).await;
            times.push(took.as_secs_f64() * 1e6 / case.count as f64);
        }
    }
    let medians: Vec<f64> = rounds
        .iter_mut()
        .map(|times| {
            times.sort_by(f64::total_cmp);
            times[ROUNDS / 2]
        })
        .collect();
    for (case, us) in CASES.iter().zip(&medians) {
        println!("{:14} {us:8.2} us  {:5.2} of its floor", case.name, us / medians[case.floor]);
    }
}

fn main() {
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime");
    LocalSet::new().block_on(&runtime, measure());
}
