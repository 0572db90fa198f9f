//! A watch of etcd that outlives its connections.
//!
//! # Invariants
//!
//! - The watcher gets every change from the wanted revision on once, in order, each transaction's
//!   together, or is told why not.
//! - After a broken connection the watch goes on after the last revision that was delivered, or
//!   that etcd said is past.
//! - The changes of one revision are held until etcd has sent all of them: it cuts large responses
//!   into fragments, and marks all but the last.
//!
//! A watch is asked for from one revision earlier than wanted, and what comes of that is left out:
//! etcd before 3.4.34 and 3.5.16 loses, without a word, the deletion at a revision that was
//! compacted just then when a watch begins at that very revision; one that begins earlier is told
//! of the compaction.

use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use etcd_client::proto::PbWatchResponse;
use etcd_client::{Client, Error, EventType, WatchOptions, WatchResponse, WatchStream};

use super::failure::Failure;
use super::link::unsigned;
use super::{Keys, Shared, WatcherCount};
use crate::meta::state::Outlet;
use crate::meta::{Changes, Event, TXN_BYTES_MAX, WatchError};

/// Pauses between two tries to get a connection again.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(5));
/// Largest response that is taken, bytes: etcd cuts them at its own bound of a request, 1.5 MiB,
/// which an operator may have raised.
const RESPONSE_BYTES_MAX: usize = 64 << 20;

const _: () = assert!(TXN_BYTES_MAX < RESPONSE_BYTES_MAX);

/// Why a connection was left.
enum End {
    /// It broke: another one goes on.
    Broken(String),
    /// The watch is over.
    Over(WatchError),
    /// Nobody listens any more.
    Dropped,
}

/// Puts the parts together that changes arrive in.
struct Assembly {
    keys: Keys,
    /// First revision that is still to be delivered.
    next: u64,
    held: Option<Changes>,
}

/// What a response comes to.
#[derive(Debug, Default, PartialEq, Eq)]
struct Arrived {
    changes: Vec<Changes>,
    end: Option<WatchError>,
}

impl Assembly {
    fn new(keys: Keys, next: u64) -> Self {
        Self { keys, next, held: None }
    }

    /// Forgets the parts that a broken connection has left.
    fn restart(&mut self) {
        self.held = None;
    }

    /// Revision to ask for.
    fn begin(&self) -> u64 {
        self.next.saturating_sub(1).max(1)
    }

    /// Takes a response of the watch.
    fn take(&mut self, response: PbWatchResponse) -> Arrived {
        let mut arrived = Arrived::default();
        let revision = response.header.as_ref().map_or(0, |header| unsigned(header.revision));
        // Only a response without events says by its header what is past.
        let progress = response.events.is_empty() && !response.created && !response.canceled;
        for event in response.events {
            let deleted = event.r#type == EventType::Delete as i32;
            let Some(kv) = event.kv else { continue };
            let at = unsigned(kv.mod_revision);
            if at < self.next {
                continue;
            }
            let Some(key) = self.keys.strip(&kv.key) else {
                tracing::error!("etcd has a key below the prefix that is not UTF-8");
                arrived.end = Some(WatchError::Closed);
                return arrived;
            };
            let event = Event { key, value: (!deleted).then(|| Bytes::from(kv.value)) };
            match &mut self.held {
                Some(held) if held.revision == at => held.events.push(event),
                held => {
                    let earlier = held.replace(Changes { revision: at, events: vec![event] });
                    arrived.changes.extend(earlier);
                }
            }
        }
        if !response.fragment {
            arrived.changes.extend(self.held.take());
        }
        if let Some(last) = arrived.changes.last() {
            self.next = last.revision + 1;
        }
        if progress {
            self.next = self.next.max(revision + 1);
        }
        arrived
    }
}

/// A watch that is under way.
pub(super) struct Pump {
    shared: Rc<Shared>,
    prefix: String,
    assembly: Assembly,
    outlet: Outlet,
    _count: WatcherCount,
}

impl Pump {
    pub(super) fn new(
        shared: Rc<Shared>,
        prefix: &str,
        from: u64,
        outlet: Outlet,
        count: WatcherCount,
    ) -> Self {
        let assembly = Assembly::new(shared.keys.clone(), from);
        Self { shared, prefix: prefix.to_owned(), assembly, outlet, _count: count }
    }

    /// Asks a member for the changes. The first answer has come when this returns.
    ///
    /// # Errors
    /// Those of [`Link::read`](super::link::Link::read).
    pub(super) async fn connect(&self) -> Result<WatchStream, Failure> {
        let (key, end) = self.shared.keys.range(&self.prefix);
        let begin = i64::try_from(self.assembly.begin()).unwrap_or(i64::MAX);
        let create = async |client: Client| {
            let options = WatchOptions::new()
                .with_range(end.clone())
                .with_start_revision(begin)
                .with_progress_notify()
                .with_fragment();
            let mut watches = client.watch_client().max_decoding_message_size(RESPONSE_BYTES_MAX);
            let mut stream = watches.watch(key.clone(), Some(options)).await?;
            match stream.message().await? {
                Some(first) => Self::check_created(&self.shared, &first)?,
                None => return Err(Error::WatchError("etcd ended the watch".into())),
            }
            Ok(stream)
        };
        self.shared.link.read(create).await
    }

    fn check_created(shared: &Shared, first: &WatchResponse) -> Result<(), Error> {
        if first.canceled() {
            return Err(Error::WatchError(format!("no watch: {}", first.cancel_reason())));
        }
        if !shared.link.is_known(first.header()) {
            return Err(Error::WatchError("the member is of another etcd".into()));
        }
        Ok(())
    }

    /// Delivers changes until the watch is over.
    pub(super) async fn run(mut self, mut stream: WatchStream) {
        loop {
            match self.follow(&mut stream).await {
                End::Broken(why) => {
                    tracing::debug!(prefix = self.prefix, why, "a watch lost its connection");
                }
                End::Over(error) => return self.outlet.end(error),
                End::Dropped => return,
            }
            drop(stream);
            self.assembly.restart();
            stream = match self.reconnect().await {
                Ok(stream) => stream,
                Err(Some(error)) => return self.outlet.end(error),
                Err(None) => return,
            };
        }
    }

    async fn follow(&mut self, stream: &mut WatchStream) -> End {
        let mut replaced = self.shared.link.replaced();
        loop {
            let message = tokio::select! {
                biased;
                () = self.outlet.closed() => return End::Dropped,
                _ = replaced.wait_for(Option::is_some) => return End::Over(WatchError::Closed),
                message = stream.message() => message,
            };
            let response = match message {
                Ok(Some(WatchResponse(response))) => response,
                Ok(None) => return End::Broken("etcd ended the watch".into()),
                Err(error) => return End::Broken(error.to_string()),
            };
            if response.compact_revision > 0 {
                let since = unsigned(response.compact_revision);
                return End::Over(WatchError::Compacted(since));
            }
            if response.canceled {
                return End::Broken(response.cancel_reason);
            }
            let arrived = self.assembly.take(response);
            for changes in arrived.changes {
                if !self.outlet.send(&Arc::new(changes)) {
                    return End::Dropped;
                }
            }
            if let Some(error) = arrived.end {
                return End::Over(error);
            }
        }
    }

    /// A new connection, however long it takes.
    ///
    /// # Errors
    /// Why the watch is over; none if nobody listens any more.
    async fn reconnect(&self) -> Result<WatchStream, Option<WatchError>> {
        let mut replaced = self.shared.link.replaced();
        let mut pause = PAUSE.0;
        let connect = async {
            loop {
                self.shared.link.pause(pause).await;
                pause = (pause * 2).min(PAUSE.1);
                // What went back would wait for revisions that have come already.
                let connected = match self.shared.link.prove().await {
                    Ok(_) => self.connect().await,
                    Err(failure) => Err(failure),
                };
                match connected {
                    Ok(stream) => return stream,
                    Err(failure) => {
                        let why = failure.text();
                        tracing::debug!(prefix = self.prefix, why, "a watch has no connection");
                    }
                }
            }
        };
        tokio::select! {
            biased;
            () = self.outlet.closed() => Err(None),
            _ = replaced.wait_for(Option::is_some) => Err(Some(WatchError::Closed)),
            stream = connect => Ok(stream),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use etcd_client::proto::{PbEvent, PbKeyValue, PbResponseHeader};

    fn response(revision: i64, fragment: bool, events: &[(&str, i64)]) -> PbWatchResponse {
        let event = |(key, at): &(&str, i64)| PbEvent {
            r#type: i32::from(key.ends_with('-')),
            kv: Some(PbKeyValue {
                key: format!("/east{key}").into_bytes(),
                mod_revision: *at,
                ..PbKeyValue::default()
            }),
            prev_kv: None,
        };
        PbWatchResponse {
            header: Some(PbResponseHeader { revision, ..PbResponseHeader::default() }),
            fragment,
            events: events.iter().map(event).collect(),
            ..PbWatchResponse::default()
        }
    }

    /// What arrives, as `revision:keys`.
    fn text(arrived: &Arrived) -> Vec<String> {
        let keys = |changes: &Changes| -> String {
            let all: Vec<&str> = changes.events.iter().map(|event| event.key.as_str()).collect();
            format!("{}:{}", changes.revision, all.join(","))
        };
        arrived.changes.iter().map(keys).collect()
    }

    fn assembly(next: u64) -> Assembly {
        Assembly::new(Keys::new("/east"), next)
    }

    #[test]
    fn a_transaction_in_several_fragments_is_one() {
        let mut assembly = assembly(5);
        let first = assembly.take(response(9, true, &[("/a", 5), ("/b", 6)]));
        assert_eq!(text(&first), ["5:/a"], "of revision 6 there may be more");
        let second = assembly.take(response(9, true, &[("/c", 6)]));
        assert_eq!(text(&second), [""; 0]);
        let last = assembly.take(response(9, false, &[("/d", 6), ("/e-", 8)]));
        assert_eq!(text(&last), ["6:/b,/c,/d", "8:/e-"]);
        assert_eq!(last.changes[1].events[0].value, None);
        assert_eq!(assembly.next, 9, "the header of a response with events proves nothing");
    }

    #[test]
    fn what_a_broken_connection_left_is_asked_for_again() {
        let mut assembly = assembly(5);
        assembly.take(response(9, true, &[("/a", 5), ("/b", 6)]));
        assembly.restart();
        assert_eq!((assembly.next, assembly.begin()), (6, 5));
        let again = assembly.take(response(9, false, &[("/a", 5), ("/b", 6), ("/c", 6)]));
        assert_eq!(text(&again), ["6:/b,/c"], "revision 5 was delivered");
    }

    #[test]
    fn an_empty_response_says_what_is_past() {
        let mut assembly = assembly(1);
        assert_eq!(assembly.begin(), 1);
        assembly.take(PbWatchResponse { created: true, ..response(30, false, &[]) });
        assert_eq!(assembly.next, 1, "the answer to the request proves nothing");
        assembly.take(response(20, false, &[]));
        assert_eq!((assembly.next, assembly.begin()), (21, 20));
    }
}
