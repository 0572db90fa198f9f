//! A volume wherever its head runs: requests follow it from node to node.
//!
//! [`Forwarder`] finds the head of a volume through [`Locate`], hands requests to it, and finds the
//! next one when it stops, cannot be reached or was replaced. Knows heads by their epochs and
//! nothing of connections or nodes.
//!
//! # Why a change may be repeated
//!
//! A head that stopped, or a connection that broke, leaves changes behind whose outcome is unknown.
//! An old copy must never be done after something that the client made later. Let `W` be such a
//! change, sent to the head of epoch `e`, and let it be repeated at a head of epoch `f`:
//!
//! - `f > e`: the head of `f` serves only after its take-over has fenced all heads before it on the
//!   disks, and has settled the log: what `e` wrote by then is in the state that `f` begins with;
//!   what it writes later is on no whole write set and void for ever. A copy of `W` that arrives at
//!   the node of `f` is refused, for it names `e`. So the old copy is done before `f` serves, or
//!   never; the repeated one and all that follow come later.
//! - `f = e`: the head runs on and may have the old copy in hand. [`Served::target`] begins no
//!   further change before the server has said that the old copy is done or never will be begun
//!   ([`super::RemoteVolume`] has how).
//! - `f < e` does not happen: a head older than one that was seen is not asked at all.
//!
//! The same holds for a change that failed for good here (an I/O error to the client, outcome
//! unknown) and for what the client writes afterwards: no write that follows is overtaken by it.
//!
//! A read may always be repeated. An old head answers none once the next one serves (the read
//! lease).

use std::cell::{Cell, RefCell};
use std::future::Future;
use std::pin::pin;
use std::rc::Rc;
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::Mutex;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::server::Served;
use crate::export::{BlockTarget, LocalFuture, MapExtent, TargetError};
use crate::id::{Epoch, VolumeId};

/// First pause before a head is looked for again; doubled each time.
const PAUSE_MIN: Duration = Duration::from_millis(10);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_millis(500);

/// Finds heads.
pub trait Locate {
    /// The head of this volume as far as is known now, here or on another node. What it gives may be out of date.
    ///
    /// # Errors
    /// [`TargetError::Stopped`] if there is none at present, [`TargetError::Io`] if that cannot be told:
    /// it is asked again. Others end the request that asks.
    fn locate(&self, volume: VolumeId) -> LocalFuture<'_, Result<Served, TargetError>>;
}

/// How long a [`Forwarder`] waits.
#[derive(Debug, Clone)]
pub struct ForwardConfig {
    /// Time for which a request is tried after its head failed it, until it fails with an I/O error.
    pub patience: Duration,
    /// Time that a request runs before it is asked whether the volume has a newer head.
    pub suspect_after: Duration,
}

impl Default for ForwardConfig {
    fn default() -> Self {
        Self { patience: Duration::from_secs(30), suspect_after: Duration::from_secs(3) }
    }
}

/// A volume, wherever its head runs.
pub struct Forwarder {
    volume: VolumeId,
    locate: Rc<dyn Locate>,
    config: ForwardConfig,
    /// The head that requests go to.
    present: RefCell<Option<Served>>,
    /// The newest epoch that was seen: nothing goes to an older one.
    newest: Cell<Epoch>,
    /// What the last head told.
    size: Cell<u64>,
    read_only: Cell<bool>,
    /// One request looks for the head, and all others wait for what it finds.
    looking: Mutex<()>,
    /// When a head was looked for last, and why none was found.
    failed: RefCell<Option<(Instant, String)>>,
    /// When it was asked last whether there is a newer one.
    suspected: Cell<Option<Instant>>,
}

/// Since when a request is in trouble, and why.
struct Trouble {
    since: Instant,
    pause: Duration,
    why: String,
}

impl Forwarder {
    /// The volume, once its head was found.
    ///
    /// # Errors
    /// [`TargetError::Io`] if there was none for [`ForwardConfig::patience`]; what [`Locate`] ends with.
    pub async fn open(
        volume: VolumeId,
        locate: Rc<dyn Locate>,
        config: ForwardConfig,
    ) -> Result<Self, TargetError> {
        let forwarder = Self {
            volume,
            locate,
            config,
            present: RefCell::default(),
            newest: Cell::default(),
            size: Cell::new(0),
            read_only: Cell::new(true),
            looking: Mutex::new(()),
            failed: RefCell::default(),
            suspected: Cell::new(None),
        };
        forwarder.head(&mut None).await?;
        Ok(forwarder)
    }

    /// The epoch of the newest head that was seen.
    pub fn epoch(&self) -> Epoch {
        self.newest.get()
    }

    /// What is known of the head is not believed any more, unless another one was found meanwhile.
    fn dismiss(&self, served: &Served) {
        self.note();
        let mut present = self.present.borrow_mut();
        if present.as_ref().is_some_and(|now| Rc::ptr_eq(&now.target, &served.target)) {
            *present = None;
        }
    }

    fn note(&self) {
        if let Some(served) = &*self.present.borrow() {
            self.size.set(served.target.size());
            self.read_only.set(served.target.read_only());
        }
    }

    /// Takes note of a head; whether it is not older than one that was seen.
    fn take(&self, served: Served) -> bool {
        if served.epoch < self.newest.get() {
            return false;
        }
        if served.epoch > self.newest.replace(served.epoch) {
            let (volume, epoch) = (self.volume, served.epoch);
            tracing::debug!(%volume, %epoch, "requests go to another head");
        }
        *self.present.borrow_mut() = Some(served);
        self.note();
        true
    }

    /// The head that requests go to. Without one, looks for it as long as patience lasts, which begins with the
    /// trouble of the request that asks.
    async fn head(&self, trouble: &mut Option<Trouble>) -> Result<Served, TargetError> {
        loop {
            if let Some(trouble) = trouble {
                self.endure(trouble).await?;
            }
            let asked = Instant::now();
            let _one = self.looking.lock().await;
            if let Some(served) = &*self.present.borrow() {
                return Ok(served.clone());
            }
            // Another request has looked in vain since.
            let told = self.failed.borrow().clone().filter(|(began, _)| *began >= asked);
            let why = match told {
                Some((_, why)) => why,
                None => match self.look(trouble.as_ref()).await? {
                    Ok(served) => return Ok(served),
                    Err(why) => why,
                },
            };
            note_trouble(trouble, why);
        }
    }

    /// Looks for the head once; why there is none otherwise.
    async fn look(&self, trouble: Option<&Trouble>) -> Result<Result<Served, String>, TargetError> {
        let began = Instant::now();
        let until = trouble.map_or(began, |trouble| trouble.since) + self.config.patience;
        let why = match timeout_at(until, self.locate.locate(self.volume)).await {
            Ok(Ok(served)) => {
                let (epoch, newest) = (served.epoch, self.newest.get());
                if self.take(served.clone()) {
                    return Ok(Ok(served));
                }
                format!("its head is said to be of epoch {epoch}, and was of {newest} before")
            }
            Ok(Err(TargetError::Stopped)) => "it has no head at present".to_owned(),
            Ok(Err(TargetError::Io(reason))) => reason,
            Ok(Err(error)) => return Err(error),
            Err(_) => trouble
                .map_or_else(|| "nobody says where its head is".into(), |known| known.why.clone()),
        };
        *self.failed.borrow_mut() = Some((began, why.clone()));
        Ok(Err(why))
    }

    /// Pauses, or gives up.
    async fn endure(&self, trouble: &mut Trouble) -> Result<(), TargetError> {
        let Trouble { since, pause, why } = trouble;
        if since.elapsed() + *pause > self.config.patience {
            let (volume, patience) = (self.volume, self.config.patience);
            let text = format!("volume {volume} was not served for {patience:?}: {why}");
            return Err(TargetError::Io(text));
        }
        sleep(*pause).await;
        *pause = (*pause * 2).min(PAUSE_MAX);
        Ok(())
    }

    /// Whether there is a newer head than this, as far as was known a moment ago.
    async fn is_replaced(&self, served: &Served) -> bool {
        let moment = self.config.suspect_after / 4;
        let lately = self.suspected.get().is_some_and(|last| last.elapsed() < moment);
        if self.newest.get() > served.epoch || lately {
            return self.newest.get() > served.epoch;
        }
        self.suspected.set(Some(Instant::now()));
        let located = timeout(self.config.suspect_after, self.locate.locate(self.volume)).await;
        match located {
            Ok(Ok(now)) if now.epoch > served.epoch => self.take(now),
            _ => false,
        }
    }

    /// Waits for an answer, as long as there is no newer head; none if there is one.
    async fn watched<T>(&self, served: &Served, request: impl Future<Output = T>) -> Option<T> {
        let mut request = pin!(request);
        loop {
            tokio::select! {
                biased;
                answer = &mut request => return Some(answer),
                () = sleep(self.config.suspect_after) => {}
            }
            let replaced = tokio::select! {
                biased;
                answer = &mut request => return Some(answer),
                replaced = self.is_replaced(served) => replaced,
            };
            if replaced {
                return None;
            }
        }
    }

    /// Asks the head, and those that come after it.
    async fn ask<T>(
        &self,
        request: impl Fn(Rc<dyn BlockTarget>) -> LocalFuture<'static, Result<T, TargetError>>,
    ) -> Result<T, TargetError> {
        let mut trouble = None;
        loop {
            let present = if trouble.is_none() { self.present.borrow().clone() } else { None };
            let served = match present {
                Some(served) => served,
                None => self.head(&mut trouble).await?,
            };
            let answer = self.watched(&served, request(served.target.clone())).await;
            match answer {
                Some(Err(TargetError::Stopped)) => {
                    self.dismiss(&served);
                    note_trouble(&mut trouble, "its head stopped, or cannot be reached".into());
                }
                // A head that its disks do not answer may have been replaced without knowing.
                Some(Err(TargetError::Io(reason))) => {
                    if !self.is_replaced(&served).await {
                        return Err(TargetError::Io(reason));
                    }
                    note_trouble(&mut trouble, reason);
                }
                Some(answer) => return answer,
                None => note_trouble(&mut trouble, "its head was replaced".into()),
            }
        }
    }
}

fn note_trouble(trouble: &mut Option<Trouble>, reason: String) {
    let new = Trouble { since: Instant::now(), pause: PAUSE_MIN, why: String::new() };
    trouble.get_or_insert(new).why = reason;
}

impl BlockTarget for Forwarder {
    fn size(&self) -> u64 {
        self.note();
        self.size.get()
    }

    fn read_only(&self) -> bool {
        self.note();
        self.read_only.get()
    }

    fn read(&self, offset: u64, len: usize) -> LocalFuture<'_, Result<Vec<Bytes>, TargetError>> {
        Box::pin(self.ask(move |head| Box::pin(async move { head.read(offset, len).await })))
    }

    fn write(&self, offset: u64, data: Bytes) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(self.ask(move |head| {
            let data = data.clone();
            Box::pin(async move { head.write(offset, data).await })
        }))
    }

    fn zero(&self, offset: u64, len: u64, unmap: bool) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(self.ask(move |head| Box::pin(async move { head.zero(offset, len, unmap).await })))
    }

    fn flush(&self) -> LocalFuture<'_, Result<(), TargetError>> {
        Box::pin(self.ask(|head| Box::pin(async move { head.flush().await })))
    }

    fn map(
        &self,
        offset: u64,
        len: u64,
        max: usize,
    ) -> LocalFuture<'_, Result<Vec<MapExtent>, TargetError>> {
        Box::pin(self.ask(move |head| Box::pin(async move { head.map(offset, len, max).await })))
    }
}
