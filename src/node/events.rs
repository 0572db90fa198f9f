//! What happened lately, on all nodes.

use std::time::Duration;

use futures_util::future::join_all;

use super::Node;
use super::cluster::Cluster;
use super::relay::Ask;
use crate::admin::events::{Event, EventLevel};
use crate::obs::events::recent;

/// How long another node may take to tell.
const PATIENCE: Duration = Duration::from_secs(2);

impl Node {
    /// The newest events of this node, the oldest first.
    pub(super) fn events_here(
        &self,
        since_unix_ms: u64,
        level: EventLevel,
        max: u32,
    ) -> Vec<Event> {
        let mut events = recent(since_unix_ms, usize::MAX);
        events.retain(|event| event.level >= level);
        let max = usize::try_from(max).unwrap_or(usize::MAX);
        events.drain(..events.len().saturating_sub(max));
        let node = self.shown_node();
        events.into_iter().map(|event| Event { node: node.clone(), ..event }).collect()
    }

    /// The newest events of all nodes that answer, the oldest first.
    pub(super) async fn events(
        &self,
        since_unix_ms: u64,
        level: EventLevel,
        max: u32,
    ) -> Vec<Event> {
        let mut events = self.events_here(since_unix_ms, level, max);
        let others = self.cluster.as_ref().map(Cluster::others).unwrap_or_default();
        let question = Ask::Events { since_unix_ms, level, max }.encode();
        let asked = others.into_iter().map(|(name, peer)| {
            let question = question.clone();
            async move {
                let answer = peer.ask(question, PATIENCE).await.map_err(|error| error.to_string());
                let told = answer.and_then(|bytes| {
                    serde_json::from_slice::<Vec<Event>>(&bytes).map_err(|error| error.to_string())
                });
                if let Err(why) = &told {
                    tracing::debug!(node = name, why, "a node does not tell its events");
                }
                told.unwrap_or_default()
            }
        });
        events.extend(join_all(asked).await.into_iter().flatten());
        events.sort_by_key(|event| event.at_unix_ms);
        let max = usize::try_from(max).unwrap_or(usize::MAX);
        events.drain(..events.len().saturating_sub(max));
        events
    }
}
