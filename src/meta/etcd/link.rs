//! The members of an etcd: which one is asked, for how long, and whether it is still the same
//! etcd.
//!
//! # Invariants
//!
//! - Every request ends within a bounded time ([`PATIENCE`] for one that reads, twice that for one
//!   that changes), whatever the members do.
//! - A change is sent only to a member that answered a linearizable read within [`PROVEN_FOR`]:
//!   where etcd is stopped, paused or cut off, the change is refused, not in doubt.
//! - A change is sent again only where the first one surely was not made.
//! - Once a linearizable answer shows an older revision than one before it did, the store was
//!   replaced by an old copy: nothing but reading its identity is possible any more.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use etcd_client::{Client, ConnectOptions, Error, GetOptions, ResponseHeader};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};

use super::failure::Failure;
use crate::env::Env;

/// How long a request waits for an answer from any member.
pub(super) const PATIENCE: Duration = Duration::from_secs(5);
/// How long one member may take for a read before the next is asked.
const MEMBER_PATIENCE: Duration = Duration::from_secs(2);
/// How long an answer proves that a member is there, and is what it was: less than an etcd takes to
/// be stopped, restored from an old copy and started again.
const PROVEN_FOR: Duration = Duration::from_millis(200);
/// Proofs before a change, if members answer and are lost again.
const PROOFS_MAX: usize = 3;
/// Pauses after all members failed.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_millis(500));

/// One member.
struct Member {
    url: String,
    client: RefCell<Option<Client>>,
    /// When it last answered.
    proven: Cell<Option<Instant>>,
}

/// What answers have told of the etcd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Seen {
    pub(super) cluster: u64,
    pub(super) revision: u64,
}

/// The way to an etcd.
pub(super) struct Link {
    members: Vec<Member>,
    options: ConnectOptions,
    /// Index of the member that is asked first.
    current: Cell<usize>,
    seen: Cell<Option<Seen>>,
    /// Why the store may not be used any more.
    replaced: watch::Sender<Option<String>>,
    env: Env,
    /// A key that is read to see whether a member is there.
    probe_key: Vec<u8>,
}

/// An answer with the header that every answer of etcd has.
pub(super) trait Answer {
    /// The header.
    fn header(&self) -> Option<&ResponseHeader>;
}

impl Answer for etcd_client::GetResponse {
    fn header(&self) -> Option<&ResponseHeader> {
        self.header()
    }
}

impl<A: Answer> Answer for Option<A> {
    fn header(&self) -> Option<&ResponseHeader> {
        self.as_ref()?.header()
    }
}

impl Answer for etcd_client::TxnResponse {
    fn header(&self) -> Option<&ResponseHeader> {
        self.header()
    }
}

/// A number of etcd's, which are never negative.
pub(super) fn unsigned(number: i64) -> u64 {
    u64::try_from(number).unwrap_or(0)
}

impl Link {
    /// The way to the members at these URLs, of which there is at least one. Sends nothing.
    pub(super) fn new(
        urls: &[String],
        options: ConnectOptions,
        env: Env,
        probe_key: Vec<u8>,
    ) -> Self {
        let member = |url: &String| Member {
            url: url.clone(),
            client: RefCell::default(),
            proven: Cell::default(),
        };
        // Nodes spread over the members.
        let first = env.random_below(urls.len() as u64);
        Self {
            members: urls.iter().map(member).collect(),
            options,
            current: Cell::new(usize::try_from(first).unwrap_or(0)),
            seen: Cell::default(),
            replaced: watch::Sender::new(None),
            env,
            probe_key,
        }
    }

    /// Tells when the store was replaced.
    pub(super) fn replaced(&self) -> watch::Receiver<Option<String>> {
        self.replaced.subscribe()
    }

    /// Waits so long, and up to half of it more.
    pub(super) async fn pause(&self, time: Duration) {
        let half = u64::try_from(time.as_micros() / 2).unwrap_or(u64::MAX).max(1);
        sleep(time + Duration::from_micros(self.env.random_below(half))).await;
    }

    fn check_not_replaced(&self) -> Result<(), Failure> {
        match &*self.replaced.borrow() {
            Some(why) => Err(Failure::Refused(why.clone())),
            None => Ok(()),
        }
    }

    /// The client of a member; with a user, who is let in first.
    async fn client(&self, at: usize) -> Result<Client, Failure> {
        let member = &self.members[at];
        if let Some(client) = &*member.client.borrow() {
            return Ok(client.clone());
        }
        let connected = Client::connect([&member.url], Some(self.options.clone())).await;
        // Nothing that was asked for is sent yet.
        let client = connected.map_err(|error| match Failure::of(&error) {
            Failure::Refused(why) => Failure::Refused(why),
            failure => Failure::Elsewhere(failure.text()),
        })?;
        *member.client.borrow_mut() = Some(client.clone());
        Ok(client)
    }

    /// One request to one member.
    async fn ask<T>(
        &self,
        at: usize,
        patience: Duration,
        request: &impl AsyncFn(Client) -> Result<T, Error>,
    ) -> Result<T, Failure> {
        let start = Instant::now();
        let Ok(client) = timeout(patience, self.client(at)).await else {
            self.abandon(at);
            return Err(Failure::Elsewhere(format!("no connection in {patience:?}")));
        };
        let client = match client {
            Ok(client) => client,
            Err(failure) => {
                self.leave(at);
                return Err(failure);
            }
        };
        match timeout(patience.saturating_sub(start.elapsed()), request(client)).await {
            Ok(Ok(answer)) => {
                self.members[at].proven.set(Some(Instant::now()));
                Ok(answer)
            }
            Ok(Err(error)) => {
                let failure = Failure::of(&error);
                if !matches!(failure, Failure::Compacted | Failure::LeaseNotFound) {
                    self.leave(at);
                }
                Err(failure)
            }
            Err(_) => {
                self.abandon(at);
                Err(Failure::Unknown(format!("no answer in {patience:?}")))
            }
        }
    }

    /// Asks another member from now on.
    fn leave(&self, at: usize) {
        self.members[at].proven.set(None);
        if self.current.get() == at {
            self.current.set((at + 1) % self.members.len());
        }
    }

    /// The same, with a new connection when this one's turn comes again.
    fn abandon(&self, at: usize) {
        self.leave(at);
        self.members[at].client.take();
    }

    /// Asks for something that changes nothing, of one member after the other.
    ///
    /// # Errors
    /// [`Failure::Compacted`] and [`Failure::LeaseNotFound`] as etcd says; else
    /// [`Failure::Refused`] or [`Failure::Elsewhere`] of the last that was asked.
    pub(super) async fn read<T>(
        &self,
        request: impl AsyncFn(Client) -> Result<T, Error>,
    ) -> Result<T, Failure> {
        let deadline = Instant::now() + PATIENCE;
        let mut pause = PAUSE.0;
        let mut last = Failure::Elsewhere("no member was asked".into());
        loop {
            for _ in 0..self.members.len() {
                let at = self.current.get();
                let left = deadline.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    return Err(last);
                }
                match self.ask(at, left.min(MEMBER_PATIENCE), &request).await {
                    Err(Failure::Elsewhere(why) | Failure::Unknown(why)) => {
                        last = Failure::Elsewhere(format!("{}: {why}", self.members[at].url));
                    }
                    // One member may be set up otherwise than the others.
                    Err(Failure::Refused(why)) => {
                        last = Failure::Refused(format!("{}: {why}", self.members[at].url));
                    }
                    result => return result,
                }
            }
            if matches!(last, Failure::Refused(_)) || Instant::now() + pause >= deadline {
                return Err(last);
            }
            self.pause(pause).await;
            pause = (pause * 2).min(PAUSE.1);
        }
    }

    /// Reads linearizably, and notes what the answer tells of the etcd.
    pub(super) async fn read_newest<A: Answer>(
        &self,
        request: impl AsyncFn(Client) -> Result<A, Error>,
    ) -> Result<A, Failure> {
        self.check_not_replaced()?;
        let answer = self.read_whatever(request).await?;
        self.check_not_replaced()?;
        Ok(answer)
    }

    /// The same of whatever is there now, be it another etcd than before.
    pub(super) async fn read_whatever<A: Answer>(
        &self,
        request: impl AsyncFn(Client) -> Result<A, Error>,
    ) -> Result<A, Failure> {
        let before = self.seen.get();
        let answer = self.read(request).await?;
        if let Some(now) = seen(&answer) {
            self.note(before, now);
        }
        Ok(answer)
    }

    /// Compares what was seen before a request with what its answer shows.
    fn note(&self, before: Option<Seen>, now: Seen) {
        let newest = self.seen.get().unwrap_or(now);
        let least = before.map_or(0, |before| before.revision);
        let why = if newest.cluster != now.cluster {
            let (now, before) = (now.cluster, newest.cluster);
            format!("this etcd (cluster {now:x}) is not the one from before ({before:x})")
        } else if now.revision < least {
            format!("it went back from revision {least} to {}", now.revision)
        } else {
            let revision = newest.revision.max(now.revision);
            return self.seen.set(Some(Seen { revision, ..newest }));
        };
        if self.replaced.borrow().is_none() {
            let why = format!("{why}: its content was replaced, and is not believed");
            tracing::error!(why, "the metadata store is not used any more");
            self.replaced.send_replace(Some(why));
        }
    }

    /// Whether an answer may be of the etcd that is known.
    pub(super) fn is_known(&self, header: Option<&ResponseHeader>) -> bool {
        match (self.seen.get(), header) {
            (Some(seen), Some(header)) => seen.cluster == header.cluster_id(),
            _ => true,
        }
    }

    /// Sees whether a member is there; the revision it shows.
    ///
    /// # Errors
    /// Those of [`Link::read`].
    pub(super) async fn prove(&self) -> Result<u64, Failure> {
        let key = &self.probe_key;
        let probe = async |client: Client| {
            let options = GetOptions::new().with_keys_only();
            client.kv_client().get(&**key, Some(options)).await
        };
        let answer = self.read_newest(probe).await?;
        Ok(answer.header().map_or(0, |header| unsigned(header.revision())))
    }

    /// The member to send a change to.
    async fn proven(&self) -> Result<usize, Failure> {
        self.check_not_replaced()?;
        for _ in 0..PROOFS_MAX {
            let at = self.current.get();
            let proven = self.members[at].proven.get();
            if self.seen.get().is_some() && proven.is_some_and(|at| at.elapsed() < PROVEN_FOR) {
                return Ok(at);
            }
            self.prove().await?;
        }
        Err(Failure::Elsewhere("no member answers for long".into()))
    }

    /// Makes a change.
    ///
    /// # Errors
    /// [`Failure::LeaseNotFound`], [`Failure::Refused`] when it was not made, [`Failure::Unknown`].
    pub(super) async fn change<T>(
        &self,
        request: impl AsyncFn(Client) -> Result<T, Error>,
    ) -> Result<T, Failure> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let at = match self.proven().await {
                Ok(at) => at,
                // A probe changes nothing.
                Err(failure) => return Err(Failure::Refused(failure.text())),
            };
            match self.ask(at, PATIENCE, &request).await {
                Err(Failure::Elsewhere(why)) if Instant::now() >= deadline => {
                    return Err(Failure::Refused(format!("{}: {why}", self.members[at].url)));
                }
                Err(Failure::Elsewhere(_)) => self.pause(PAUSE.0).await,
                Err(Failure::Unknown(why)) => {
                    return Err(Failure::Unknown(format!("{}: {why}", self.members[at].url)));
                }
                result => return result,
            }
        }
    }

    /// The same for a change whose answer has the revision that it made.
    pub(super) async fn change_at<A: Answer>(
        &self,
        request: impl AsyncFn(Client) -> Result<A, Error>,
    ) -> Result<A, Failure> {
        let before = self.seen.get();
        let answer = self.change(request).await?;
        if let Some(now) = seen(&answer) {
            self.note(before, now);
        }
        // It was made, but in what replaced the store.
        self.check_not_replaced().map_err(|failure| Failure::Unknown(failure.text()))?;
        Ok(answer)
    }
}

/// What an answer tells of the etcd.
fn seen(answer: &impl Answer) -> Option<Seen> {
    let header = answer.header()?;
    Some(Seen { cluster: header.cluster_id(), revision: unsigned(header.revision()) })
}
