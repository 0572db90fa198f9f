//! The thread that owns the file and the content: takes requests in order, makes what they
//! change durable with one commit for all that wait, then answers.

use std::io::ErrorKind;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError};
use std::time::Duration;

use bytes::Bytes;
use redb::{Database, DatabaseError, ReadableDatabase, ReadableTable, StorageError, TableError};
use tokio::sync::oneshot;
use tokio::time::Instant;

use super::OpenError;
use super::format::{self, FORMAT_VERSION, HEAD, KEYS, LEASES, RowError, STORE};
use crate::meta::state::{Content, Dirty, State, check_txn};
use crate::meta::{
    LeaseId, Listing, MetaError, MetaResult, Op, StoreIdentity, Txn, TxnOutcome, Versioned, Watch,
};

/// Requests that share a commit, at most.
const BATCH_MAX: usize = 64;
/// Cache of redb, bytes: small, for reads never go to the file.
const CACHE_BYTES: usize = 1 << 20;
/// How long to wait for a request when no lease ends before.
const IDLE_WAIT: Duration = Duration::from_hours(1);

type Reply<T> = oneshot::Sender<MetaResult<T>>;

/// What the thread is asked for, and where the answer goes.
pub(super) enum Request {
    Get(String, Reply<Option<Versioned>>),
    List(String, Reply<Listing>),
    Txn(Txn, Reply<TxnOutcome>),
    Watch(String, u64, Reply<Watch>),
    LeaseGrant(Duration, Reply<LeaseId>),
    LeaseKeepAlive(LeaseId, Reply<Duration>),
    LeaseRevoke(LeaseId, Reply<()>),
    Identity(Reply<StoreIdentity>),
}

/// An answer that waits for the commit: called with the error if that failed.
type Answer = Box<dyn FnOnce(Option<&MetaError>)>;

/// An open file with its content.
pub(super) struct File {
    database: Database,
    state: State,
    path: PathBuf,
    /// Why the store refuses everything.
    failed: Option<String>,
}

impl File {
    pub(super) fn open(path: &Path) -> Result<Self, OpenError> {
        // redb asserts on some kinds of damage; that must not take the daemon down.
        let opened = catch_unwind(AssertUnwindSafe(|| {
            let database = builder().open(path).map_err(|error| database_error(error, path))?;
            let content = load(&database, path)?;
            Ok((database, content))
        }));
        let (database, content) = opened.unwrap_or_else(|_| {
            Err(OpenError::Corrupt(path.to_owned(), "its pages contradict each other".into()))
        })?;
        Ok(Self { database, state: State::new(content), path: path.to_owned(), failed: None })
    }

    pub(super) fn create(path: &Path, content: Vec<(String, Bytes)>) -> Result<Self, OpenError> {
        let io = |source| OpenError::Io { path: path.to_owned(), source };
        if path.try_exists().map_err(io)? {
            return Err(OpenError::Exists(path.to_owned()));
        }
        let mut state = State::new(Content::default());
        state.load_initial(content)?;
        let mut name = path.as_os_str().to_owned();
        name.push(".new");
        let new = PathBuf::from(name);
        match std::fs::remove_file(&new) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(io(error)),
            _ => {}
        }
        let database = builder().create(&new).map_err(|error| database_error(error, &new))?;
        let dirty = state.take_dirty();
        let other = |error: redb::Error| io(std::io::Error::other(error));
        commit(&database, state.content(), &dirty).map_err(other)?;
        // A link, unlike a rename, never replaces what another process put there meanwhile.
        std::fs::hard_link(&new, path).map_err(|error| match error.kind() {
            ErrorKind::AlreadyExists => OpenError::Exists(path.to_owned()),
            _ => io(error),
        })?;
        std::fs::remove_file(&new).map_err(io)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
        let folder = std::fs::File::open(folder.unwrap_or(Path::new("."))).map_err(io)?;
        folder.sync_all().map_err(io)?;
        Ok(Self { database, state, path: path.to_owned(), failed: None })
    }

    /// Serves until every sender is gone.
    pub(super) fn run(mut self, requests: &Receiver<Request>) {
        loop {
            let wait = self.state.next_deadline().map_or(IDLE_WAIT, |deadline| {
                // Rounded up, lest it spin through the last microseconds of a lease.
                deadline.saturating_duration_since(Instant::now()) + Duration::from_millis(1)
            });
            let first = match requests.recv_timeout(wait) {
                Ok(request) => Some(request),
                Err(RecvTimeoutError::Timeout) => None,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            let batch: Vec<Request> =
                first.into_iter().chain(requests.try_iter().take(BATCH_MAX - 1)).collect();
            self.serve(batch);
        }
    }

    fn serve(&mut self, batch: Vec<Request>) {
        if self.failed.is_none() {
            self.state.expire(Instant::now());
        }
        let answers: Vec<Answer> = batch.into_iter().map(|request| self.take_up(request)).collect();
        let dirty = self.state.take_dirty();
        let error = (!dirty.is_empty()).then(|| self.commit(&dirty)).and_then(Result::err);
        if error.is_none() {
            self.state.publish();
        }
        for answer in answers {
            answer(error.as_ref());
        }
    }

    /// Makes the request's change in memory and keeps the answer.
    fn take_up(&mut self, request: Request) -> Answer {
        let now = Instant::now();
        let failed = self.failed.clone();
        let state = &mut self.state;
        match request {
            Request::Get(key, reply) => hold(reply, failed, || state.get(&key)),
            Request::List(prefix, reply) => hold(reply, failed, || state.list(&prefix)),
            Request::Txn(txn, reply) => hold(reply, failed, || state.txn(txn)),
            Request::Watch(prefix, from, reply) => {
                hold(reply, failed, || state.watch(&prefix, from))
            }
            Request::LeaseGrant(ttl, reply) => hold(reply, failed, || state.lease_grant(ttl, now)),
            Request::LeaseKeepAlive(lease, reply) => {
                hold(reply, failed, || state.lease_keep_alive(lease, now))
            }
            Request::LeaseRevoke(lease, reply) => hold(reply, failed, || state.lease_revoke(lease)),
            Request::Identity(reply) => hold(reply, failed, || state.identity()),
        }
    }

    fn commit(&mut self, dirty: &Dirty) -> MetaResult<()> {
        let done = catch_unwind(AssertUnwindSafe(|| {
            commit(&self.database, self.state.content(), dirty).map_err(|error| error.to_string())
        }));
        let reason = match done {
            Ok(Ok(())) => return Ok(()),
            Ok(Err(reason)) => reason,
            Err(_) => "its pages contradict each other".into(),
        };
        tracing::error!(path = %self.path.display(), %reason, "cannot write the metadata store");
        self.failed = Some(format!("an earlier write failed: {reason}"));
        // The watchers saw what is durable; of the rest nobody knows.
        self.state = State::new(Content::default());
        Err(MetaError::Unknown(reason))
    }
}

fn hold<T: 'static>(
    reply: Reply<T>,
    failed: Option<String>,
    request: impl FnOnce() -> MetaResult<T>,
) -> Answer {
    let answer = match failed {
        Some(reason) => Err(MetaError::Unavailable(reason)),
        None => request(),
    };
    Box::new(move |error| {
        // What an error says of a request that was refused stays true when the commit failed.
        let answer = match (answer, error) {
            (Ok(_), Some(error)) => Err(error.clone()),
            (answer, _) => answer,
        };
        // Whoever dropped the future does not want the answer.
        reply.send(answer).ok();
    })
}

fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES);
    builder
}

fn commit(database: &Database, content: &Content, dirty: &Dirty) -> Result<(), redb::Error> {
    let transaction = database.begin_write()?;
    {
        let mut keys = transaction.open_table(KEYS)?;
        for key in &dirty.keys {
            match content.entries.get(key) {
                Some(entry) => keys.insert(&**key, &*format::encode_entry(key, entry))?,
                None => keys.remove(&**key)?,
            };
        }
        let mut leases = transaction.open_table(LEASES)?;
        for id in &dirty.leases {
            match content.leases.get(id) {
                Some(lease) => leases.insert(id.0, &*format::encode_lease(*id, lease.ttl))?,
                None => leases.remove(id.0)?,
            };
        }
        transaction.open_table(STORE)?.insert(HEAD, &*format::encode_head(content))?;
    }
    transaction.commit()?;
    Ok(())
}

fn database_error(error: DatabaseError, path: &Path) -> OpenError {
    let path = path.to_owned();
    match error {
        DatabaseError::DatabaseAlreadyOpen => OpenError::Locked(path),
        DatabaseError::UpgradeRequired(found) => {
            OpenError::Corrupt(path, format!("its redb format {found} is not supported"))
        }
        DatabaseError::Storage(error) => storage_error(error, path),
        error => OpenError::Corrupt(path, error.to_string()),
    }
}

fn storage_error(error: StorageError, path: PathBuf) -> OpenError {
    match error {
        StorageError::Io(error) => match error.kind() {
            ErrorKind::NotFound => OpenError::NotFound(path),
            ErrorKind::InvalidData => OpenError::Foreign(path),
            ErrorKind::UnexpectedEof => OpenError::Corrupt(path, "it is cut off".into()),
            _ => OpenError::Io { path, source: error },
        },
        error => OpenError::Corrupt(path, error.to_string()),
    }
}

/// Reads and verifies every row.
fn load(database: &Database, path: &Path) -> Result<Content, OpenError> {
    let corrupt = |reason: String| OpenError::Corrupt(path.to_owned(), reason);
    let storage = |error| storage_error(error, path.to_owned());
    let table = |error| match error {
        TableError::Storage(error) => storage_error(error, path.to_owned()),
        TableError::TableDoesNotExist(_) => OpenError::Foreign(path.to_owned()),
        error => OpenError::Corrupt(path.to_owned(), error.to_string()),
    };
    let row_error = |name: &str, error| match error {
        RowError::Newer(found) => {
            OpenError::Version { path: path.to_owned(), found, known: FORMAT_VERSION }
        }
        RowError::Bad(reason) => OpenError::Corrupt(path.to_owned(), format!("{name}: {reason}")),
    };
    let transaction = database
        .begin_read()
        .map_err(|error| OpenError::Corrupt(path.into(), error.to_string()))?;
    let head = transaction.open_table(STORE).map_err(table)?.get(HEAD).map_err(storage)?;
    let head = head.ok_or_else(|| corrupt("it has no head".into()))?;
    let head = format::decode_head(head.value()).map_err(|error| row_error(HEAD, error))?;
    let mut content =
        Content { revision: head.revision, lease_last: head.lease_last, ..Content::default() };
    let now = Instant::now();
    for row in transaction.open_table(LEASES).map_err(table)?.iter().map_err(storage)? {
        let (id, value) = row.map_err(storage)?;
        let id = LeaseId(id.value());
        let ttl =
            format::decode_lease(id, value.value()).map_err(|error| row_error("a lease", error))?;
        content.leases.insert(id, State::lease_from_file(ttl, now));
    }
    for row in transaction.open_table(KEYS).map_err(table)?.iter().map_err(storage)? {
        let (key, value) = row.map_err(storage)?;
        let entry = format::decode_entry(key.value(), value.value())
            .map_err(|error| row_error(key.value(), error))?;
        content.entries.insert(key.value().to_owned(), entry);
    }
    let counts = (content.entries.len() as u64, content.leases.len() as u64);
    if counts != (head.keys, head.leases) {
        return Err(corrupt(format!("{} keys are missing", head.keys.abs_diff(counts.0))));
    }
    State::link_leases(&mut content);
    Ok(content)
}

impl State {
    /// The content of a new store, as one transaction of any size.
    fn load_initial(&mut self, content: Vec<(String, Bytes)>) -> MetaResult<()> {
        let mut ops = Vec::new();
        for (key, value) in content {
            let op = Op::Put { key, value, lease: None };
            check_txn(&Txn { conditions: Vec::new(), ops: vec![op.clone()] })?;
            ops.push(op);
        }
        self.apply(ops);
        self.publish();
        Ok(())
    }
}
