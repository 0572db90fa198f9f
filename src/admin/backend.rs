//! What the admin API asks of the node, and the channel that carries it there.
//!
//! The node runs on one thread and its futures are not `Send`; the HTTP server's must be. So a
//! request becomes a [`Command`] with a one-shot [`Reply`] on a bounded channel: the node takes
//! commands one by one and may answer at once or from a task of its own.
//!
//! Each operation is declared once, in the list at the end of this file, which yields the variant
//! of [`Command`], the method of [`AdminBackend`] and its implementation by [`ChannelBackend`].
//!
//! Rules for whoever answers: form was checked already (names, schemes, sizes); meaning was not
//! (does it exist, is it taken, does it fit). Dropping a reply answers "unavailable". A reply whose
//! asker has gone (it waited too long) is dropped silently; the operation still counts.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc, oneshot};

use super::error::ApiError;
use super::events::{Event, EventLevel};
use super::nodes::Node;
use super::types::{
    AddDisk, CreatePool, CreateVolume, Disk, Health, Pool, Removed, ResizeVolume, Scrub, Status,
    Volume, VolumeName,
};
use crate::id::DiskId;

/// Where the answer to a [`Command`] goes.
pub type Reply<T> = oneshot::Sender<Result<T, ApiError>>;

/// Result of an operation.
pub type ApiResult<T> = Result<T, ApiError>;

/// Commands that may wait for the node at once; further ones are refused after the time-out.
pub const COMMANDS_WAITING_MAX: usize = 64;

/// How long a command may take in all before its asker is told so.
pub const COMMAND_TIMEOUT: Duration = Duration::from_secs(30);

/// Sends commands to the node.
#[derive(Debug, Clone)]
pub struct ChannelBackend {
    commands: mpsc::Sender<Command>,
    timeout: Duration,
}

/// A backend and the end of its channel that the node reads.
pub fn channel(capacity: usize, timeout: Duration) -> (ChannelBackend, mpsc::Receiver<Command>) {
    let (commands, receiver) = mpsc::channel(capacity);
    (ChannelBackend { commands, timeout }, receiver)
}

impl ChannelBackend {
    async fn ask<T>(&self, make: impl FnOnce(Reply<T>) -> Command) -> ApiResult<T> {
        let deadline = tokio::time::Instant::now() + self.timeout;
        let permit = match tokio::time::timeout_at(deadline, self.commands.reserve()).await {
            Ok(Ok(permit)) => permit,
            Ok(Err(_)) => return Err(stopping()),
            Err(_) => {
                return Err(ApiError::unavailable("the node is busy; nothing was done")
                    .with_hint("try again; if it stays so, look at the log of sdsd"));
            }
        };
        let (reply, answer) = oneshot::channel();
        permit.send(make(reply));
        match tokio::time::timeout_at(deadline, answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) => Err(stopping()),
            Err(_) => Err(ApiError::timeout(format!(
                "the node did not answer within {:?}; the request may still take effect",
                self.timeout
            ))
            .with_hint("look at the present state before you repeat it")),
        }
    }
}

fn stopping() -> ApiError {
    ApiError::unavailable("the node is stopping").with_hint("start sdsd and try again")
}

fn encode<T: Serialize>(answer: &ApiResult<T>) -> Vec<u8> {
    serde_json::to_vec(answer).unwrap_or_else(|error| {
        let failed: ApiResult<()> = Err(ApiError::internal(format!("no answer: {error}")));
        serde_json::to_vec(&failed).unwrap_or_default()
    })
}

fn decode<T: DeserializeOwned>(bytes: &[u8]) -> ApiResult<T> {
    let answer: Result<ApiResult<T>, _> = serde_json::from_slice(bytes);
    answer.unwrap_or_else(|error| {
        Err(ApiError::internal(format!("the answer of another node is not understood: {error}")))
    })
}

macro_rules! operations {
    ($(
        $(#[$doc:meta])*
        $method:ident = $variant:ident { $($arg:ident: $type:ty),* } -> $answer:ty;
    )*) => {
        /// A request to the node.
        #[derive(Debug)]
        pub enum Command {
            $($(#[$doc])* $variant {
                $(
                    #[doc = concat!("See [`AdminBackend::", stringify!($method), "`].")]
                    $arg: $type,
                )*
                /// Where the answer goes.
                reply: Reply<$answer>,
            },)*
        }

        /// What the admin API asks of the node. Errors carry the code that fits (see
        /// [`super::error::ErrorCode`]) and name the thing they are about.
        pub trait AdminBackend: Send + Sync + 'static {
            $($(#[$doc])* fn $method(&self $(, $arg: $type)*) -> BoxFuture<'_, ApiResult<$answer>>;)*
        }

        /// A [`Command`] as one node passes it on to another, without who waits for the answer.
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum Question {
            $(
                #[doc = concat!("See [`AdminBackend::", stringify!($method), "`].")]
                $variant { $(
                    #[doc = concat!("See [`AdminBackend::", stringify!($method), "`].")]
                    $arg: $type,
                )* },
            )*
        }

        impl Question {
            /// The command, and what will be its answer, encoded.
            pub fn command(self) -> (Command, BoxFuture<'static, Vec<u8>>) {
                match self {
                    $(Self::$variant { $($arg),* } => {
                        let (reply, answer) = oneshot::channel();
                        let encoded = async move {
                            let answer: ApiResult<$answer> =
                                answer.await.unwrap_or_else(|_| Err(stopping()));
                            encode(&answer)
                        };
                        (Command::$variant { $($arg,)* reply }, Box::pin(encoded))
                    })*
                }
            }
        }

        impl Command {
            /// What is asked, and who takes the encoded answer, or why there is none.
            pub fn question(self) -> (Question, Box<dyn FnOnce(ApiResult<Bytes>)>) {
                match self {
                    $(Self::$variant { $($arg,)* reply } => {
                        let take = move |answer: ApiResult<Bytes>| {
                            let answer = answer.and_then(|bytes| decode::<$answer>(&bytes));
                            if reply.send(answer).is_err() {
                                tracing::debug!("an admin command was answered too late");
                            }
                        };
                        (Question::$variant { $($arg),* }, Box::new(take))
                    })*
                }
            }
        }

        impl AdminBackend for ChannelBackend {
            $(fn $method(&self $(, $arg: $type)*) -> BoxFuture<'_, ApiResult<$answer>> {
                Box::pin(self.ask(move |reply| Command::$variant { $($arg,)* reply }))
            })*
        }
    };
}

operations! {
    /// The node at a glance; see [`super::health::status`].
    status = Status {} -> Status;
    /// Health alone, cheap: what `/healthz` asks every few seconds.
    health = Health {} -> Health;
    /// All metrics in the Prometheus text format.
    metrics = Metrics {} -> String;

    /// The newest events that matter as much, from a time on (milliseconds since 1970), at most so many; the oldest
    /// first.
    event_list = EventList { since_unix_ms: u64, level: EventLevel, limit: u32 } -> Vec<Event>;

    /// All nodes, sorted by name.
    node_list = NodeList {} -> Vec<Node>;
    /// One node; `not_found`.
    node_show = NodeShow { node: String } -> Node;
    /// Has heads and shards leave a node, which stays in the cluster; returns at once. `conflict` if
    /// there is no other one.
    node_drain = NodeDrain { node: String } -> Node;
    /// Uses a node again that was being drained; succeeds if it is used.
    node_undrain = NodeUndrain { node: String } -> Node;
    /// Removes a node for good. `conflict` while it runs, or has disks.
    node_remove = NodeRemove { node: String } -> Removed;

    /// All disks, sorted by path.
    disk_list = DiskList {} -> Vec<Disk>;
    /// One disk; `not_found`.
    disk_show = DiskShow { disk: DiskId } -> Disk;
    /// Formats and opens a disk. `confirmation_required` if it carries anything and `force` is
    /// not set; `conflict` if it belongs to this node already; `not_found` if there is no such
    /// path; `no_space` if it is too small.
    disk_add = DiskAdd { request: AddDisk } -> Disk;
    /// Takes a disk out of the node for good. `confirmation_required` if it holds data and
    /// `force` is not set; `conflict` if data would be lost even so, or while it is being emptied:
    /// it is removed afterwards.
    disk_remove = DiskRemove { disk: DiskId, force: bool } -> Removed;
    /// Takes a disk out of service until it is put online again; succeeds if it is offline.
    disk_offline = DiskOffline { disk: DiskId } -> Disk;
    /// Has all data leave a disk, which stays in the node, until it is put online again; returns at
    /// once. `conflict` if the disk is not online.
    disk_drain = DiskDrain { disk: DiskId } -> Disk;
    /// Has a disk at a path, which is added if the node does not have it, take the place of another: what
    /// that one holds is rebuilt there, then it is removed. Returns the new disk at once. `conflict` if
    /// data would be lost, or the new one is not online; as `disk_add` besides.
    disk_replace = DiskReplace { disk: DiskId, request: AddDisk } -> Disk;
    /// Opens a disk again that is offline, failed or missing, and keeps one that drains; succeeds if
    /// it is online.
    disk_online = DiskOnline { disk: DiskId } -> Disk;

    /// All pools, sorted by name.
    pool_list = PoolList {} -> Vec<Pool>;
    /// One pool; `not_found`.
    pool_show = PoolShow { pool: String } -> Pool;
    /// Creates a pool. `conflict` if the name is taken; `no_space` if the failure domains are too
    /// few for its scheme.
    pool_create = PoolCreate { request: CreatePool } -> Pool;
    /// Removes an empty pool. `conflict` while it has volumes.
    pool_remove = PoolRemove { pool: String } -> Removed;

    /// All volumes, or those of one pool (`not_found` if there is no such pool), sorted by name.
    volume_list = VolumeList { pool: Option<String> } -> Vec<Volume>;
    /// One volume; `not_found`.
    volume_show = VolumeShow { volume: VolumeName } -> Volume;
    /// Creates and exports a volume. `not_found` if there is no such pool; `conflict` if the name
    /// is taken.
    volume_create = VolumeCreate { request: CreateVolume } -> Volume;
    /// Changes a volume's size; it grows online. `confirmation_required` to make it smaller without
    /// `force`, `conflict` to make it smaller while a client is attached, `unavailable` to make it larger
    /// while what was cut off is still being deleted.
    volume_resize = VolumeResize { volume: VolumeName, request: ResizeVolume } -> Volume;
    /// Removes a volume. `confirmation_required` if it holds data and `force` is not set;
    /// `conflict` while a client is attached.
    volume_remove = VolumeRemove { volume: VolumeName, force: bool } -> Removed;

    /// The scrubs of all volumes, sorted by name.
    scrub_list = ScrubList {} -> Vec<Scrub>;
    /// Begins a round of one volume, or of all that are served; one that is under way goes on.
    /// `not_found`; `unavailable` if the volume named is not served. Answers with those that run.
    scrub_start = ScrubStart { volume: Option<VolumeName> } -> Vec<Scrub>;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::admin::error::ErrorCode;

    const SECOND: Duration = Duration::from_secs(1);

    #[tokio::test(start_paused = true)]
    async fn an_answer_comes_back() {
        let (backend, mut commands) = channel(1, SECOND);
        let node = async {
            match commands.recv().await.expect("a command") {
                Command::PoolRemove { pool, reply } => {
                    reply.send(Ok(Removed { kind: "pool".into(), name: pool })).expect("an asker");
                }
                other => panic!("unexpected {other:?}"),
            }
        };
        let (answer, ()) = tokio::join!(backend.pool_remove("p".into()), node);
        assert_eq!(answer.expect("removed").name, "p");
    }

    #[tokio::test(start_paused = true)]
    async fn a_full_channel_is_unavailable_and_a_silent_node_a_time_out() {
        let (backend, mut commands) = channel(1, SECOND);
        let error = backend.status().await.expect_err("nobody answers");
        assert_eq!(error.code, ErrorCode::Timeout);
        let error = backend.status().await.expect_err("the channel is full");
        assert_eq!(error.code, ErrorCode::Unavailable);
        assert!(error.message.contains("busy"), "{error}");
        commands.recv().await.expect("the first command is still there");
    }

    #[tokio::test(start_paused = true)]
    async fn a_stopped_node_is_unavailable_at_once() {
        let (backend, commands) = channel(1, SECOND);
        drop(commands);
        let before = tokio::time::Instant::now();
        let error = backend.health().await.expect_err("the node is gone");
        assert_eq!(error.code, ErrorCode::Unavailable);
        assert_eq!(before.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_dropped_reply_is_unavailable() {
        let (backend, mut commands) = channel(1, SECOND);
        let node = async { drop(commands.recv().await) };
        let (answer, ()) = tokio::join!(backend.disk_list(), node);
        assert_eq!(answer.expect_err("dropped").code, ErrorCode::Unavailable);
    }
}
