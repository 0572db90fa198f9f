//! How a connection begins: who is there, and which version both understand.
//!
//! Who connects sends a hello, the other answers with a welcome or a refusal with its reason; then
//! frames follow. Versions negotiate downward: the newest that both understand. The layout of
//! hello and welcome is for ever, since it is read before a version is known; see
//! [`super::frame::Preface`].

use std::io;
use std::ops::RangeInclusive;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, IntoBytes};

use super::frame::{HELLO_BYTES_MAX, Hello, PREFACE_MAGIC, Preface, Refusal, Welcome};
use crate::id::{ClusterId, NodeId};
use crate::limits::{RPC_MESSAGE_BYTES_MAX, RPC_REQUESTS_MAX};

/// Longest name of a node that is sent, bytes.
const NAME_BYTES_MAX: usize = 255;
/// Longest reason that is sent, bytes.
const REASON_BYTES_MAX: usize = 512;
/// What this build can beyond the version: nothing yet.
const FEATURES: u64 = 0;

/// Who a core is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// Its cluster.
    pub cluster: ClusterId,
    /// Its node.
    pub node: NodeId,
    /// The node's name, for logs.
    pub name: String,
    /// Its number within the node.
    pub core: u16,
}

/// Who was met, and what was agreed on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerIdentity {
    /// The other's node.
    pub node: NodeId,
    /// Its name; not to be trusted with more than a log line.
    pub name: String,
    /// Its core.
    pub core: u16,
    /// Version of the frames.
    pub version: u16,
    /// What both can beyond it.
    pub features: u64,
}

/// What one connection may have under way at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowSize {
    /// Requests.
    pub requests: u32,
    /// Bytes.
    pub bytes: usize,
}

/// Whom a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    /// The node; none if any will do.
    pub node: Option<NodeId>,
    /// Its core.
    pub core: u16,
}

/// Which connection of a process this is: a later one takes the place of an earlier one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Attempt {
    /// Random number of the process.
    pub instance: u64,
    /// Counts its connections.
    pub number: u64,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum HandshakeError {
    /// The stream broke.
    #[error("the connection broke during the handshake: {0}")]
    Io(#[from] io::Error),
    /// The other does not speak this protocol, or damaged.
    #[error("no handshake of sds: {0}")]
    Malformed(&'static str),
    /// The other refuses.
    #[error("refused by {name}: {reason}")]
    Refused {
        /// The other's name.
        name: String,
        /// Its words.
        reason: String,
        /// What kind of refusal; none if it is unknown here.
        refusal: Option<Refusal>,
    },
    /// This side refused the other.
    #[error("refused: {0}")]
    Refuses(String),
    /// It took too long.
    #[error("no connection within {0:?}")]
    TimedOut(std::time::Duration),
}

/// A hello as a server reads it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Caller {
    /// Who connects; the version is the newest that both understand.
    pub identity: PeerIdentity,
    /// Of which process, which connection.
    pub attempt: Attempt,
}

fn short(text: &str, max: usize) -> &str {
    &text[..text.floor_char_boundary(max)]
}

fn len(text: &str) -> U16 {
    U16::new(u16::try_from(text.len()).expect("shortened"))
}

async fn send<S: AsyncWrite + Unpin>(stream: &mut S, body: &[u8]) -> Result<(), HandshakeError> {
    let preface = Preface {
        magic: PREFACE_MAGIC,
        len: U32::new(u32::try_from(body.len()).expect("at most 4096 bytes")),
        crc: U32::new(crc32fast::hash(body)),
    };
    stream.write_all(&[preface.as_bytes(), body].concat()).await?;
    stream.flush().await?;
    Ok(())
}

async fn receive<S: AsyncRead + Unpin>(stream: &mut S) -> Result<Vec<u8>, HandshakeError> {
    let mut preface = [0; size_of::<Preface>()];
    stream.read_exact(&mut preface).await?;
    let preface = Preface::read_from_bytes(&preface[..]).expect("as long as it is");
    if preface.magic != PREFACE_MAGIC {
        return Err(HandshakeError::Malformed("it begins with something else"));
    }
    let len = usize::try_from(preface.len.get()).unwrap_or(usize::MAX);
    if len > HELLO_BYTES_MAX {
        return Err(HandshakeError::Malformed("it is too long"));
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body).await?;
    if crc32fast::hash(&body) != preface.crc.get() {
        return Err(HandshakeError::Malformed("its checksum does not match"));
    }
    Ok(body)
}

/// The next text of `rest`, which is shortened by it.
fn text(rest: &mut &[u8], len: U16) -> Result<String, HandshakeError> {
    let (text, tail) = rest
        .split_at_checked(usize::from(len.get()))
        .ok_or(HandshakeError::Malformed("it ends within a text"))?;
    *rest = tail;
    let clean: String = String::from_utf8_lossy(text).chars().filter(|c| !c.is_control()).collect();
    Ok(clean)
}

/// The newest version that both understand.
pub fn choose(ours: &RangeInclusive<u16>, theirs: &RangeInclusive<u16>) -> Option<u16> {
    let version = *ours.end().min(theirs.end());
    (ours.contains(&version) && theirs.contains(&version)).then_some(version)
}

/// Connects: says who we are and hears what the other gives.
pub async fn connect<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    own: &Identity,
    versions: &RangeInclusive<u16>,
    target: Target,
    attempt: Attempt,
) -> Result<(PeerIdentity, WindowSize), HandshakeError> {
    let name = short(&own.name, NAME_BYTES_MAX);
    let hello = Hello {
        version_min: U16::new(*versions.start()),
        version_max: U16::new(*versions.end()),
        core: U16::new(own.core),
        to_core: U16::new(target.core),
        features: U64::new(FEATURES),
        cluster: own.cluster.to_bytes(),
        node: own.node.to_bytes(),
        to_node: target.node.unwrap_or_default().to_bytes(),
        instance: U64::new(attempt.instance),
        attempt: U64::new(attempt.number),
        name_len: len(name),
        zero: [0; 6],
    };
    send(stream, &[hello.as_bytes(), name.as_bytes()].concat()).await?;
    let body = receive(stream).await?;
    let (welcome, mut rest) = Welcome::read_from_prefix(&body[..])
        .map_err(|_| HandshakeError::Malformed("it is too short"))?;
    let name = text(&mut rest, welcome.name_len)?;
    let reason = text(&mut rest, welcome.reason_len)?;
    let status = welcome.status.get();
    if status != 0 {
        let refusal = Refusal::ALL.get(usize::from(status - 1)).copied();
        return Err(HandshakeError::Refused { name, reason, refusal });
    }
    let identity = PeerIdentity {
        node: NodeId::from_bytes(welcome.node),
        name,
        core: welcome.core.get(),
        version: welcome.version.get(),
        features: welcome.features.get() & FEATURES,
    };
    let to_another = target.node.is_some_and(|node| node != identity.node);
    if welcome.cluster != own.cluster.to_bytes() || to_another || identity.core != target.core {
        return Err(HandshakeError::Malformed("another one answers than was meant"));
    }
    if !versions.contains(&identity.version) {
        return Err(HandshakeError::Malformed("it chose a version that was not offered"));
    }
    let window = WindowSize {
        requests: welcome.requests_max.get().clamp(1, RPC_REQUESTS_MAX),
        bytes: usize::try_from(welcome.bytes_max.get())
            .unwrap_or(usize::MAX)
            .clamp(1, RPC_MESSAGE_BYTES_MAX),
    };
    Ok((identity, window))
}

/// Hears who connects. [`HandshakeError::Refuses`] once the other was told why not.
pub async fn accept<S: AsyncRead + AsyncWrite + Unpin>(
    stream: &mut S,
    own: &Identity,
    versions: &RangeInclusive<u16>,
) -> Result<Caller, HandshakeError> {
    let body = receive(stream).await?;
    let Ok((hello, mut rest)) = Hello::read_from_prefix(&body[..]) else {
        return refuse(stream, own, versions, Refusal::Malformed, "the hello is too short").await;
    };
    let name = text(&mut rest, hello.name_len)?;
    let theirs = hello.version_min.get()..=hello.version_max.get();
    let wanted = NodeId::from_bytes(hello.to_node);
    let (refusal, reason) = if hello.cluster != own.cluster.to_bytes() {
        let theirs = ClusterId::from_bytes(hello.cluster);
        (Refusal::Cluster, format!("this is cluster {}, not {theirs}", own.cluster))
    } else if !wanted.is_nil() && wanted != own.node {
        (Refusal::Node, format!("this is node {} ({}), not {wanted}", own.node, own.name))
    } else if hello.to_core.get() != own.core {
        let asked = hello.to_core.get();
        (Refusal::Node, format!("core {asked} is not served here, but core {}", own.core))
    } else if let Some(version) = choose(versions, &theirs) {
        let identity = PeerIdentity {
            node: NodeId::from_bytes(hello.node),
            name,
            core: hello.core.get(),
            version,
            features: hello.features.get() & FEATURES,
        };
        let (instance, number) = (hello.instance.get(), hello.attempt.get());
        return Ok(Caller { identity, attempt: Attempt { instance, number } });
    } else {
        let ours = format!("{} to {}", versions.start(), versions.end());
        let theirs = format!("{} to {}", theirs.start(), theirs.end());
        (Refusal::Version, format!("versions {ours} are understood here, and {theirs} there"))
    };
    refuse(stream, own, versions, refusal, &reason).await
}

/// Tells who connected why not. Always an error.
pub async fn refuse<S: AsyncWrite + Unpin, T>(
    stream: &mut S,
    own: &Identity,
    versions: &RangeInclusive<u16>,
    refusal: Refusal,
    reason: &str,
) -> Result<T, HandshakeError> {
    let none = WindowSize { requests: 0, bytes: 0 };
    let (status, version) = (refusal as u16, *versions.end());
    answer(stream, own, (status, version, 0), none, reason).await?;
    Err(HandshakeError::Refuses(reason.to_owned()))
}

/// Takes who connected.
pub async fn welcome<S: AsyncWrite + Unpin>(
    stream: &mut S,
    own: &Identity,
    caller: &PeerIdentity,
    window: WindowSize,
) -> Result<(), HandshakeError> {
    answer(stream, own, (0, caller.version, caller.features), window, "").await
}

async fn answer<S: AsyncWrite + Unpin>(
    stream: &mut S,
    own: &Identity,
    (status, version, features): (u16, u16, u64),
    window: WindowSize,
    reason: &str,
) -> Result<(), HandshakeError> {
    let (name, reason) = (short(&own.name, NAME_BYTES_MAX), short(reason, REASON_BYTES_MAX));
    let welcome = Welcome {
        status: U16::new(status),
        version: U16::new(version),
        core: U16::new(own.core),
        name_len: len(name),
        reason_len: len(reason),
        zero: [0; 6],
        features: U64::new(features),
        cluster: own.cluster.to_bytes(),
        node: own.node.to_bytes(),
        requests_max: U32::new(window.requests),
        zero_2: U32::ZERO,
        bytes_max: U64::new(window.bytes as u64),
    };
    send(stream, &[welcome.as_bytes(), name.as_bytes(), reason.as_bytes()].concat()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_is_chosen() {
        assert_eq!(choose(&(1..=3), &(2..=5)), Some(3));
        assert_eq!(choose(&(2..=5), &(1..=3)), Some(3));
        assert_eq!(choose(&(1..=1), &(1..=9)), Some(1));
        assert_eq!(choose(&(3..=4), &(1..=2)), None);
        #[expect(clippy::reversed_empty_ranges, reason = "what a peer may send")]
        let nonsense = 5..=1;
        assert_eq!(choose(&(1..=9), &nonsense), None);
    }
}
