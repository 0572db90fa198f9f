//! A node that exists in memory only, behind the real server and the real command channel.

#![allow(dead_code, reason = "each test binary uses its part")]

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use sds::admin::access::Access;
use sds::admin::backend::{ApiResult, Command, channel};
use sds::admin::error::ApiError;
use sds::admin::types::{
    AddDisk, Capacity, CreatePool, CreateVolume, Disk, DiskErrors, DiskLatency, DiskState,
    DiskTiming, Fill, Pool, Redundancy, Removed, ResizeVolume, Scrub, ScrubState, Space, Volume,
    VolumeName, VolumeState,
};
use sds::admin::{health, server};
use sds::id::{DiskId, PoolId, VolumeId};
use sds::obs::Metrics;
use sds::obs::sample::Sample;
use tokio::net::TcpListener;
use tokio::sync::oneshot;

/// A running server; stops when dropped.
pub(crate) struct FakeNode {
    pub(crate) address: SocketAddr,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl FakeNode {
    /// Six disks, pool `default`, volume `default/vol0` with data.
    pub(crate) fn start() -> Self {
        Self::start_with(Access::default())
    }

    /// The same, for those whom `access` lets in.
    pub(crate) fn start_with(access: Access) -> Self {
        let (started, address) = std::sync::mpsc::channel();
        let (stop, stopping) = oneshot::channel();
        #[expect(clippy::disallowed_methods, reason = "no simulation here")]
        let thread = std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            runtime.unwrap().block_on(async move {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                started.send(listener.local_addr().unwrap()).unwrap();
                let (backend, mut commands) = channel(8, Duration::from_millis(300));
                let stopping = async { drop(stopping.await) };
                let backend = std::sync::Arc::new(backend);
                let serve = server::serve_with(listener, backend, access, stopping);
                let node = async {
                    let mut state = State::new();
                    while let Some(command) = commands.recv().await {
                        state.run(command);
                    }
                };
                tokio::select! {
                    biased;
                    result = serve => result.unwrap(),
                    () = node => {}
                }
            });
        });
        let address = address.recv().unwrap();
        Self { address, stop: Some(stop), thread: Some(thread) }
    }

    pub(crate) fn endpoint(&self) -> String {
        format!("http://{}", self.address)
    }
}

impl Drop for FakeNode {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            stop.send(()).ok();
        }
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || std::thread::panicking(), "the fake node panicked");
        }
    }
}

/// The id of the `n`th disk.
pub(crate) fn disk_id(n: u8) -> DiskId {
    let mut bytes = [0; 16];
    bytes[0] = n;
    bytes[1] = n;
    bytes[15] = 1;
    DiskId::from_bytes(bytes)
}

struct State {
    disks: Vec<Disk>,
    pools: BTreeMap<String, Pool>,
    volumes: BTreeMap<String, Volume>,
    held: Vec<Command>,
    scrubbing: bool,
}

fn disk(n: u8, path: String) -> Disk {
    Disk {
        node: String::new(),
        id: disk_id(n),
        path,
        state: DiskState::Online,
        state_reason: None,
        size: 4 << 30,
        slot_bytes: 4 << 20,
        slots: 1_000,
        slots_used: 100,
        used: 100 * (4 << 20),
        space: Space::default(),
        errors: DiskErrors::default(),
        recent_errors: DiskErrors::default(),
        latency: DiskLatency { append_us: 85, read_us: 60 },
        timing: DiskTiming::default(),
        smart: None,
    }
}

fn pool(request: &CreatePool) -> Pool {
    Pool {
        id: PoolId::from_bytes([7; 16]),
        name: request.name.clone(),
        scheme: request.scheme,
        failure_domain: request.failure_domain,
        min_size: request.effective_min_size(),
        domains_online: 6,
        capacity: Capacity { raw: 24 << 30, used: 2 << 30, free: 22 << 30 },
        space: Space::default(),
        fill: Fill::default(),
        usable: 16 << 30,
        stored: 1 << 30,
        volumes: 0,
        repair: None,
    }
}

fn volume(name: &str, size: u64, allocated: u64) -> Volume {
    let short = name.split_once('/').unwrap().1;
    Volume {
        node: String::new(),
        id: VolumeId::from_bytes([9; 16]),
        name: name.to_owned(),
        size,
        cutting: 0,
        allocated,
        space: Space::default(),
        epoch: "0.1".to_owned(),
        redundancy: Redundancy::Full,
        exports: vec![format!("nbd://127.0.0.1:10809/{short}")],
        state: VolumeState::Online,
        failures: vec![],
        unrepairable: 0,
        narrowed: None,
        repair: None,
        balance: None,
    }
}

impl State {
    fn new() -> Self {
        let default: CreatePool = serde_json::from_str(
            r#"{"name": "default", "scheme": {"kind": "ec", "data": 4, "parity": 2}}"#,
        )
        .unwrap();
        let mut pool = pool(&default);
        pool.volumes = 1;
        let volume = volume("default/vol0", 10 << 30, 1 << 30);
        Self {
            disks: (0..6).map(|n| disk(n, format!("/data/disk{n}"))).collect(),
            pools: [(pool.name.clone(), pool)].into(),
            volumes: [(volume.name.clone(), volume)].into(),
            held: vec![],
            scrubbing: false,
        }
    }

    fn run(&mut self, command: Command) {
        let disks = self.disks.clone();
        let pools: Vec<_> = self.pools.values().cloned().collect();
        let volumes: Vec<_> = self.volumes.values().cloned().collect();
        match command {
            Command::Status { reply } => {
                reply.send(Ok(health::status(&disks, &pools, &volumes, (None, None), 200))).ok();
            }
            Command::Health { reply } => {
                reply.send(Ok(health::assess(&disks, &pools, &volumes))).ok();
            }
            Command::Metrics { reply } => {
                reply.send(Ok(Metrics::new().render(&Sample::default()).unwrap())).ok();
            }
            Command::DiskList { reply } => drop(reply.send(Ok(disks))),
            Command::DiskShow { disk, reply } => drop(reply.send(self.disk(disk).cloned())),
            Command::DiskAdd { request, reply } => drop(reply.send(self.add_disk(request))),
            Command::DiskRemove { disk, force, reply } => {
                drop(reply.send(self.remove_disk(disk, force)));
            }
            Command::DiskOffline { disk, reply } => {
                drop(reply.send(self.set_disk(disk, DiskState::Offline)));
            }
            Command::DiskDrain { disk, reply } => {
                drop(reply.send(self.set_disk(disk, DiskState::Draining)));
            }
            Command::DiskReplace { disk, request, reply } => {
                let old = self.set_disk(disk, DiskState::Draining);
                drop(reply.send(old.and_then(|_| self.add_disk(request))));
            }
            Command::DiskOnline { disk, reply } => {
                drop(reply.send(self.set_disk(disk, DiskState::Online)));
            }
            other => self.run_pool(other, pools, volumes),
        }
    }

    fn run_pool(&mut self, command: Command, pools: Vec<Pool>, volumes: Vec<Volume>) {
        match command {
            Command::PoolList { reply } => drop(reply.send(Ok(pools))),
            Command::PoolShow { pool, reply } => drop(reply.send(self.pool(&pool).cloned())),
            Command::PoolCreate { request, reply } => drop(reply.send(self.create_pool(&request))),
            Command::PoolRemove { pool, reply } => drop(reply.send(self.remove_pool(&pool))),
            Command::VolumeList { pool, reply } => {
                let of =
                    |v: &Volume| pool.as_ref().is_none_or(|p| v.name.starts_with(&format!("{p}/")));
                let list = volumes.into_iter().filter(of).collect();
                let known = pool.as_ref().map_or(Ok(()), |p| self.pool(p).map(|_| ()));
                drop(reply.send(known.map(|()| list)));
            }
            Command::VolumeShow { volume, .. } if volume.name == "drop" => {}
            Command::VolumeShow { ref volume, .. } if volume.name == "hang" => {
                self.held.push(command);
            }
            Command::VolumeShow { volume, reply } => {
                drop(reply.send(self.volume(&volume).map(|v| v.clone())));
            }
            Command::VolumeCreate { request, reply } => {
                drop(reply.send(self.create_volume(&request)));
            }
            Command::VolumeResize { volume, request, reply } => {
                drop(reply.send(self.resize(&volume, request)));
            }
            Command::VolumeRemove { volume, force, reply } => {
                drop(reply.send(self.remove_volume(&volume, force)));
            }
            Command::ScrubList { reply } => drop(reply.send(Ok(self.scrubs(None)))),
            Command::ScrubStart { volume, reply } => {
                let started = match &volume {
                    Some(name) => self.volume(name).map(|v| v.name.clone()).map(Some),
                    None => Ok(None),
                };
                drop(reply.send(started.map(|name| {
                    self.scrubbing = true;
                    self.scrubs(name.as_deref())
                })));
            }
            Command::EventList { reply, .. } => drop(reply.send(Ok(Vec::new()))),
            Command::NodeList { reply } => drop(reply.send(Ok(Vec::new()))),
            Command::NodeShow { node, reply }
            | Command::NodeDrain { node, reply }
            | Command::NodeUndrain { node, reply } => {
                drop(reply.send(Err(ApiError::not_found(format!("no such node: {node}")))));
            }
            Command::NodeRemove { node, reply } => {
                drop(reply.send(Err(ApiError::not_found(format!("no such node: {node}")))));
            }
            other => panic!("unexpected {other:?}"),
        }
    }

    fn scrubs(&self, only: Option<&str>) -> Vec<Scrub> {
        let wanted = self.volumes.keys().filter(|name| only.is_none_or(|only| only == *name));
        wanted
            .map(|name| Scrub {
                volume: name.clone(),
                state: if self.scrubbing { ScrubState::Running } else { ScrubState::Idle },
                bytes_done: 1 << 30,
                bytes_total: 4 << 30,
                bytes_unchecked: 0,
                eta_s: Some(200),
                finished_at: Some(1_700_000_000),
                found: 3,
                repaired: 3,
                unrepairable: 0,
            })
            .collect()
    }

    fn disk(&mut self, id: DiskId) -> ApiResult<&mut Disk> {
        let found = self.disks.iter_mut().find(|d| d.id == id);
        found.ok_or_else(|| ApiError::not_found(format!("no disk {id}")))
    }

    fn set_disk(&mut self, id: DiskId, state: DiskState) -> ApiResult<Disk> {
        let disk = self.disk(id)?;
        disk.state = state;
        let disk = disk.clone();
        let online = self.disks.iter().filter(|d| d.state.is_online()).count();
        let redundancy = match self.disks.len() - online {
            0 => Redundancy::Full,
            lost => Redundancy::Reduced {
                segments: 12,
                tolerates: u8::try_from(2_usize.saturating_sub(lost)).unwrap(),
            },
        };
        self.volumes.values_mut().for_each(|v| v.redundancy = redundancy);
        Ok(disk)
    }

    fn add_disk(&mut self, request: AddDisk) -> ApiResult<Disk> {
        if request.path.contains("foreign") && !request.force {
            return Err(ApiError::confirmation_required(format!(
                "{} carries an ext4 file system",
                request.path
            )));
        }
        if self.disks.iter().any(|d| d.path == request.path) {
            return Err(ApiError::conflict(format!("{} is in use", request.path)));
        }
        if request.size.is_some_and(|size| size < 1 << 20) {
            return Err(ApiError::no_space(format!("{} is too small", request.path)));
        }
        let disk = disk(u8::try_from(self.disks.len()).unwrap(), request.path);
        self.disks.push(disk.clone());
        Ok(disk)
    }

    fn remove_disk(&mut self, id: DiskId, force: bool) -> ApiResult<Removed> {
        if self.disk(id)?.slots_used > 0 && !force {
            return Err(ApiError::confirmation_required(format!("disk {id} holds 100 shards")));
        }
        self.disks.retain(|d| d.id != id);
        Ok(Removed { kind: "disk".into(), name: id.to_string() })
    }

    fn pool(&mut self, name: &str) -> ApiResult<&mut Pool> {
        let found = self.pools.get_mut(name);
        found.ok_or_else(|| {
            ApiError::not_found(format!("no pool {name}")).with_hint("see: sdsctl pool ls")
        })
    }

    fn create_pool(&mut self, request: &CreatePool) -> ApiResult<Pool> {
        if self.pools.contains_key(&request.name) {
            return Err(ApiError::conflict(format!("pool {} exists already", request.name)));
        }
        if usize::from(request.scheme.width()) > self.disks.len() {
            return Err(ApiError::no_space(format!("{} needs more disks", request.scheme)));
        }
        let pool = pool(request);
        self.pools.insert(pool.name.clone(), pool.clone());
        Ok(pool)
    }

    fn remove_pool(&mut self, name: &str) -> ApiResult<Removed> {
        if self.pool(name)?.volumes > 0 {
            return Err(ApiError::conflict(format!("pool {name} has volumes")));
        }
        self.pools.remove(name);
        Ok(Removed { kind: "pool".into(), name: name.to_owned() })
    }

    fn volume(&mut self, name: &VolumeName) -> ApiResult<&mut Volume> {
        let found = self.volumes.get_mut(&name.to_string());
        found.ok_or_else(|| ApiError::not_found(format!("no volume {name}")))
    }

    fn create_volume(&mut self, request: &CreateVolume) -> ApiResult<Volume> {
        let name: VolumeName = request.name.parse()?;
        self.pool(&name.pool)?;
        if self.volumes.contains_key(&request.name) {
            return Err(ApiError::conflict(format!("volume {name} exists already")));
        }
        let volume = volume(&request.name, request.size, 0);
        self.volumes.insert(request.name.clone(), volume.clone());
        Ok(volume)
    }

    fn resize(&mut self, name: &VolumeName, request: ResizeVolume) -> ApiResult<Volume> {
        let volume = self.volume(name)?;
        if request.size < volume.size && !request.force {
            return Err(ApiError::confirmation_required(format!("{name} would become smaller")));
        }
        volume.size = request.size;
        Ok(volume.clone())
    }

    fn remove_volume(&mut self, name: &VolumeName, force: bool) -> ApiResult<Removed> {
        if self.volume(name)?.allocated > 0 && !force {
            return Err(ApiError::confirmation_required(format!("volume {name} holds 1 GiB")));
        }
        self.volumes.remove(&name.to_string());
        Ok(Removed { kind: "volume".into(), name: name.to_string() })
    }
}
