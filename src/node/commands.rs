//! The admin API's commands, each answered once.

use std::rc::Rc;

use super::Node;
use super::views::one_pool;
use crate::admin::backend::{Command, Reply};
use crate::admin::error::ApiError;

/// Answers; whoever asked may have gone.
fn send<T>(reply: Reply<T>, answer: Result<T, ApiError>) {
    if reply.send(answer).is_err() {
        tracing::debug!("an admin command was answered too late");
    }
}

impl Node {
    /// Carries out one command on this node.
    pub(super) async fn answer_here(self: &Rc<Self>, command: Command) {
        match command {
            Command::Status { reply } => send(reply, Ok(self.status(&self.gather().await))),
            Command::Health { reply } => {
                send(reply, Ok(self.health(&self.gather().await)));
            }
            Command::Metrics { reply } => {
                let text = self.metrics.render(&self.sample().await);
                send(reply, text.map_err(|error| ApiError::internal(error.to_string())));
            }
            Command::EventList { since_unix_ms, level, limit, reply } => {
                send(reply, Ok(self.events(since_unix_ms, level, limit).await));
            }
            Command::NodeList { reply } => send(reply, Ok(self.list_nodes().await)),
            Command::NodeShow { node, reply } => send(reply, self.show_node(&node).await),
            Command::NodeDrain { node, reply } => send(reply, self.drain_node(&node, true).await),
            Command::NodeUndrain { node, reply } => {
                send(reply, self.drain_node(&node, false).await);
            }
            Command::NodeRemove { node, reply } => send(reply, self.remove_node(&node).await),
            Command::DiskList { reply } => send(reply, Ok(self.gather().await.disks)),
            Command::DiskShow { disk, reply } => send(reply, self.show_disk(disk)),
            Command::DiskAdd { request, reply } => send(reply, self.add_disk(request).await),
            Command::DiskRemove { disk, force, reply } => {
                send(reply, self.remove_disk(disk, force).await);
            }
            Command::DiskOffline { disk, reply } => send(reply, self.disk_offline(disk).await),
            Command::DiskDrain { disk, reply } => send(reply, self.disk_drain(disk).await),
            Command::DiskReplace { disk, request, reply } => {
                send(reply, self.replace_disk(disk, request).await);
            }
            Command::DiskOnline { disk, reply } => send(reply, self.disk_online(disk).await),
            Command::PoolList { reply } => send(reply, Ok(self.gather().await.pools)),
            Command::PoolShow { pool, reply } => send(reply, one_pool(self.gather().await, &pool)),
            Command::PoolCreate { request, reply } => send(reply, self.create_pool(request).await),
            Command::PoolRemove { pool, reply } => send(reply, self.remove_pool(&pool).await),
            Command::VolumeList { pool, reply } => {
                let views = self.gather().await;
                send(reply, self.volumes_of(views, pool.as_deref()));
            }
            Command::VolumeShow { volume, reply } => {
                send(reply, self.find_volume(&volume).map(|slot| self.view_volume(&slot)));
            }
            Command::VolumeCreate { request, reply } => {
                send(reply, self.create_volume(request).await);
            }
            Command::VolumeResize { volume, request, reply } => {
                send(reply, self.resize_volume(&volume, request).await);
            }
            Command::VolumeRemove { volume, force, reply } => {
                send(reply, self.remove_volume(&volume, force).await);
            }
            Command::ScrubList { reply } => send(reply, Ok(self.gather().await.scrubs)),
            Command::ScrubStart { volume, reply } => {
                send(reply, self.start_scrubs(volume.as_ref()));
            }
        }
    }
}
