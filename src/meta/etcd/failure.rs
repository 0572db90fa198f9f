//! What a failed request to etcd means: whether the change may have been made.
//!
//! etcd tells by the text of its status and, less finely, by its code. Sources: etcd 3.4,
//! `etcdserver/api/v3rpc/rpctypes/error.go`, and where the server raises each of them.

use etcd_client::Error;
use tonic::{Code, ConnectError, Status};

use crate::meta::MetaError;

/// Leases that etcd does not know.
const NO_LEASE: &str = "etcdserver: requested lease not found";
/// The same of a keep-alive, in the client's words.
const NO_LEASE_TO_KEEP: &str = "lease not found";
/// A revision that was compacted.
const COMPACTED: &str = "etcdserver: mvcc: required revision has been compacted";
/// Refusals by a member that did nothing, where another one, or the same later, may do it.
const NOT_NOW: [&str; 2] = ["etcdserver: no leader", "etcdserver: too many requests"];

/// Why one request to one member failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Failure {
    /// Nothing was done; another member, or the same later, may do it.
    Elsewhere(String),
    /// Nothing was done, and no member will.
    Refused(String),
    /// There is no such lease.
    LeaseNotFound,
    /// The revision asked for was compacted.
    Compacted,
    /// It may have been done, or still be.
    Unknown(String),
}

impl Failure {
    /// What an error of the client means, for a request that was not answered with success.
    pub(super) fn of(error: &Error) -> Self {
        match error {
            Error::GRpcStatus(status) => Self::of_status(status),
            Error::LeaseKeepAliveError(text) if text == NO_LEASE_TO_KEEP => Self::LeaseNotFound,
            // These come before anything is sent.
            Error::InvalidArgs(_) | Error::InvalidUri(_) | Error::InvalidMetadataValue(_) => {
                Self::Refused(error.to_string())
            }
            _ => Self::Unknown(error.to_string()),
        }
    }

    fn of_status(status: &Status) -> Self {
        let text = status.message().to_owned();
        if let Some(source) = std::error::Error::source(status) {
            // Not of etcd, but of the way there.
            return match connect_error(source) {
                Some(why) => Self::Elsewhere(why),
                None => Self::Unknown(text),
            };
        }
        match &*text {
            NO_LEASE => return Self::LeaseNotFound,
            COMPACTED => return Self::Compacted,
            _ if NOT_NOW.contains(&&*text) => return Self::Elsewhere(text),
            _ => {}
        }
        match status.code() {
            // Checked before a request is proposed to the members, or before it is applied. (Not
            // so "database space exceeded": the put that crosses the limit is made.)
            Code::InvalidArgument
            | Code::PermissionDenied
            | Code::Unauthenticated
            | Code::FailedPrecondition
            | Code::Unimplemented => Self::Refused(text),
            _ => Self::Unknown(text),
        }
    }

    /// The same of a member that cannot have done anything, since nothing but reads was asked.
    pub(super) fn text(&self) -> String {
        match self {
            Self::Elsewhere(text) | Self::Refused(text) | Self::Unknown(text) => text.clone(),
            Self::LeaseNotFound => NO_LEASE.to_owned(),
            Self::Compacted => COMPACTED.to_owned(),
        }
    }

    /// As the error of a read, which changes nothing.
    pub(super) fn of_read(&self) -> MetaError {
        MetaError::Unavailable(self.text())
    }
}

/// Why no connection was made, if that is what the error says: nothing was sent then.
fn connect_error(error: &(dyn std::error::Error + 'static)) -> Option<String> {
    let mut next = Some(error);
    while let Some(error) = next {
        if error.is::<ConnectError>() {
            return Some(innermost(error));
        }
        next = error.source();
    }
    None
}

fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut texts = vec![error.to_string()];
    let mut next = error.source();
    while let Some(error) = next {
        let text = error.to_string();
        if !texts.iter().any(|outer| outer.contains(&text)) {
            texts.push(text);
        }
        next = error.source();
    }
    texts.join(": ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(code: Code, text: &str) -> Failure {
        Failure::of(&Error::GRpcStatus(Status::new(code, text)))
    }

    #[test]
    fn only_what_surely_did_nothing_is_said_to_have_done_nothing() {
        let elsewhere = |text: &str| Failure::Elsewhere(text.into());
        let refused = |text: &str| Failure::Refused(text.into());
        let unknown = |text: &str| Failure::Unknown(text.into());
        for (code, text, failure) in [
            (Code::Unavailable, "etcdserver: no leader", &elsewhere as &dyn Fn(&str) -> Failure),
            (Code::ResourceExhausted, "etcdserver: too many requests", &elsewhere),
            (Code::InvalidArgument, "etcdserver: request is too large", &refused),
            (Code::PermissionDenied, "etcdserver: permission denied", &refused),
            (Code::Unauthenticated, "etcdserver: invalid auth token", &refused),
            (Code::ResourceExhausted, "etcdserver: mvcc: database space exceeded", &unknown),
            (Code::Unavailable, "etcdserver: request timed out", &unknown),
            (Code::Unavailable, "etcdserver: leader changed", &unknown),
            (Code::Unavailable, "etcdserver: server stopped", &unknown),
            (Code::Cancelled, "operation was canceled", &unknown),
            (Code::Internal, "h2 protocol error", &unknown),
            (Code::OutOfRange, "decoded message length too large", &unknown),
        ] {
            assert_eq!(of(code, text), failure(text), "{text}");
        }
        assert_eq!(of(Code::NotFound, NO_LEASE), Failure::LeaseNotFound);
        assert_eq!(of(Code::OutOfRange, COMPACTED), Failure::Compacted);
    }

    #[test]
    fn a_connection_that_was_not_made_carried_nothing() {
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let mut status = Status::unavailable("error trying to connect");
        status.set_source(std::sync::Arc::new(ConnectError(refused.into())));
        let failure = Failure::of(&Error::GRpcStatus(status));
        assert_eq!(failure, Failure::Elsewhere("connection refused".into()));
        let mut status = Status::unavailable("transport error");
        status.set_source(std::sync::Arc::new(std::io::Error::other("broken pipe")));
        let failure = Failure::of(&Error::GRpcStatus(status));
        assert_eq!(failure, Failure::Unknown("transport error".into()));
    }
}
