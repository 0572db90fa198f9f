//! What nodes ask each other: each answers for its own disks and volumes.
//!
//! A command about one disk or volume is passed on to the node that has it, once: who gets a question from
//! another node answers it, or says that it is not there. Lists are put together by who is asked.

use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};

use super::Node;
use crate::admin::backend::{Command, Question};
use crate::admin::error::ApiError;
use crate::admin::events::EventLevel;
use crate::admin::types::VolumeName;
use crate::id::{DiskId, VolumeId};
use crate::planted::{Bug, bug};
use crate::rpc::{AskError, Questions};
use crate::shard::LocalFuture;

/// How long another node may take: as long as a command may.
const PATIENCE: Duration = Duration::from_secs(28);
/// How long another node may take to tell who needs a disk.
const USERS_PATIENCE: Duration = Duration::from_secs(3);

/// What one node asks another.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Ask {
    /// What it knows ([`super::parts::Parts`]).
    Parts,
    /// What happened there lately.
    Events {
        /// From when on, milliseconds since 1970.
        since_unix_ms: u64,
        /// What matters as much.
        level: EventLevel,
        /// The newest of them, at most so many.
        max: u32,
    },
    /// How many clients are attached there to a volume.
    Attached {
        /// Its id.
        volume: VolumeId,
    },
    /// Which volumes it serves, and which of them need a disk.
    Users {
        /// The disk.
        disk: DiskId,
    },
    /// Which disks it lends to `sdsd recover`.
    Lent,
    /// To do this.
    Do(Question),
}

impl Ask {
    /// As it is sent.
    pub(super) fn encode(&self) -> Bytes {
        serde_json::to_vec(self).map(Bytes::from).unwrap_or_default()
    }
}

/// Answer to [`Ask::Users`].
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Users {
    /// The volumes that are served there.
    pub(super) served: Vec<VolumeId>,
    /// Names of those that need the disk, as far as they can tell.
    pub(super) users: Vec<String>,
}

/// Answers what other nodes ask.
pub(super) struct NodeQuestions(pub Rc<Node>);

impl Questions for NodeQuestions {
    fn ask(&self, question: Bytes) -> LocalFuture<'_, Result<Bytes, String>> {
        Box::pin(async move {
            let ask: Ask = serde_json::from_slice(&question)
                .map_err(|error| format!("the question is not understood: {error}"))?;
            match ask {
                Ask::Parts => serde_json::to_vec(&self.0.parts())
                    .map(Bytes::from)
                    .map_err(|error| error.to_string()),
                Ask::Events { since_unix_ms, level, max } => {
                    let events = self.0.events_here(since_unix_ms, level, max);
                    serde_json::to_vec(&events).map(Bytes::from).map_err(|error| error.to_string())
                }
                Ask::Attached { volume } => Ok(self.0.attached_here(volume).to_string().into()),
                Ask::Users { disk } => serde_json::to_vec(&self.0.users_here(disk))
                    .map(Bytes::from)
                    .map_err(|error| error.to_string()),
                Ask::Lent => Err("it runs: stop its sdsd, and start `sdsd recover --lend`".into()),
                Ask::Do(question) => {
                    let (command, answer) = question.command();
                    self.0.answer_here(command).await;
                    Ok(answer.await.into())
                }
            }
        })
    }
}

impl Node {
    /// Carries out one command, here or where what it is about is.
    pub(super) async fn answer(self: &Rc<Self>, command: Command) {
        let Some(node) = self.elsewhere(&command) else { return self.answer_here(command).await };
        let (question, take) = command.question();
        let peer = self.cluster.as_ref().and_then(|cluster| cluster.peer(&node));
        let Some(peer) = peer else {
            return take(Err(ApiError::unavailable(format!("node {node} was never met"))));
        };
        take(match peer.ask(Ask::Do(question).encode(), PATIENCE).await {
            Ok(answer) => Ok(answer),
            Err(AskError::Refused(why)) => Err(ApiError::internal(format!("node {node}: {why}"))),
            Err(error) => Err(ApiError::timeout(format!("node {node}: {error}"))
                .with_hint("look at the present state before you repeat it")),
        });
    }

    fn users_here(&self, disk: DiskId) -> Users {
        let volumes = self.volumes.borrow();
        let served = volumes.values().filter(|slot| slot.serving().is_some());
        Users { served: served.map(|slot| slot.id).collect(), users: self.users_of(disk) }
    }

    /// Names of the volumes of the cluster that need a disk.
    ///
    /// # Errors
    /// A volume is served by nobody who answers: nobody knows what it needs.
    pub(super) async fn users_everywhere(&self, disk: DiskId) -> Result<Vec<String>, ApiError> {
        let mut users = self.users_of(disk);
        let Some(cluster) = self.cluster.as_ref() else { return Ok(users) };
        if bug(Bug::DrainedTooEarly) {
            return Ok(users);
        }
        let mut served = self.users_here(disk).served;
        for (_, peer) in cluster.others() {
            let answer = peer.ask(Ask::Users { disk }.encode(), USERS_PATIENCE).await;
            let told = answer.ok().and_then(|bytes| serde_json::from_slice::<Users>(&bytes).ok());
            if let Some(told) = told {
                served.extend(told.served);
                users.extend(told.users);
            }
        }
        match cluster.volumes().into_iter().find(|placed| !served.contains(&placed.record.id)) {
            None => Ok(users),
            Some(placed) => Err(ApiError::conflict(format!(
                "volume {}/{} is not served, and it alone knows what needs the disk",
                placed.record.pool, placed.record.name
            ))),
        }
    }

    /// The other node that a command is for.
    fn elsewhere(&self, command: &Command) -> Option<String> {
        self.cluster.as_ref()?;
        let node = match command {
            Command::DiskShow { disk, .. }
            | Command::DiskRemove { disk, .. }
            | Command::DiskOffline { disk, .. }
            | Command::DiskDrain { disk, .. }
            | Command::DiskReplace { disk, .. }
            | Command::DiskOnline { disk, .. } => self.node_of_disk(*disk),
            Command::VolumeShow { volume, .. }
            | Command::VolumeResize { volume, .. }
            | Command::VolumeRemove { volume, .. }
            | Command::ScrubStart { volume: Some(volume), .. } => self.node_of_volume(volume),
            _ => None,
        };
        node.filter(|node| *node != self.options.name)
    }

    fn node_of_disk(&self, disk: DiskId) -> Option<String> {
        let far = self.far_disks().into_iter().find(|far| far.id == disk)?;
        Some(far.record.borrow().node.clone())
    }

    fn node_of_volume(&self, name: &VolumeName) -> Option<String> {
        let volumes = self.cluster.as_ref()?.volumes();
        let named = |record: &crate::meta::record::VolumeRecord| {
            record.pool == name.pool && record.name == name.name
        };
        volumes.into_iter().find(|placed| named(&placed.record))?.node
    }
}
