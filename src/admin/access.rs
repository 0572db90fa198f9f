//! Who may ask the admin API what.
//!
//! | who | may |
//! | --- | --- |
//! | a client without TLS, where the node has none (loopback addresses only) | everything |
//! | an operator's certificate | everything |
//! | a node's certificate | renew it, join |
//! | no certificate | join, with a token |

use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::Request;
use axum::extract::connect_info::{ConnectInfo, Connected};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::serve::IncomingStream;

use super::admission::Admissions;
use super::error::{ApiError, ErrorCode};
use super::guard::GuardedListener;
use crate::config::Config;
use crate::trust::{
    self, AdminTls, Authority, Credentials, Holder, Kind, Layout, RENEW_BEFORE, Role,
};

/// Path on which a node joins.
pub(super) const JOINS: &str = "/v1/joins";
/// Path on which a node renews its certificate.
pub(super) const RENEWALS: &str = "/v1/renewals";

/// How the admin API is protected, and whom it lets in.
#[derive(Default)]
pub struct Access {
    /// TLS; none for a loopback address.
    pub tls: Option<AdminTls>,
    /// Credentials of this node among the others, as `cluster.credentials` has them.
    pub credentials: Option<Credentials>,
    /// What nodes join with.
    pub admissions: Arc<Admissions>,
}

/// Who sent a request.
#[derive(Debug, Clone)]
pub(super) struct Caller {
    pub(super) address: SocketAddr,
    pub(super) who: Who,
}

/// What is known of who connected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Who {
    /// Somebody on this host; there is no TLS.
    Local,
    /// Somebody over TLS without a certificate.
    Stranger,
    /// A member of the cluster.
    Member(Holder),
}

impl Connected<IncomingStream<'_, GuardedListener>> for Caller {
    fn connect_info(stream: IncomingStream<'_, GuardedListener>) -> Self {
        Self { address: *stream.remote_addr(), who: stream.io().who().clone() }
    }
}

impl Access {
    /// As a configuration has it.
    ///
    /// # Errors
    /// A sentence that names the field and the file.
    pub fn load(config: &Config) -> Result<Self, String> {
        let (cluster, admin) = (&config.cluster, &config.admin);
        let in_field = |field: &str, why: trust::TrustError| format!("{field}: {why}");
        let own = cluster.credentials.as_deref().map(|dir| Credentials::load(dir, Kind::Node));
        let own = own.transpose().map_err(|why| in_field("cluster.credentials", why))?;
        if let Some(own) = &own {
            check_name_of(own, &config.node)?;
            warn_of_the_end(own);
        }
        let files = admin.tls.as_ref().map(|tls| Layout {
            certificate: tls.certificate.clone(),
            key: tls.key.clone(),
            ca: tls.ca.clone(),
        });
        let other = files.map(|files| Credentials::load_files(&files)).transpose();
        let other = other.map_err(|why| in_field("admin.tls", why))?;
        let tls = other.as_ref().or(own.as_ref()).map(AdminTls::new).transpose();
        let tls = tls.map_err(|why| in_field("admin.tls", why))?;
        let admissions = match (&cluster.authority, &own) {
            (Some(dir), Some(own)) => {
                let in_field = |why| in_field("cluster.authority", why);
                let authority = Authority::load(dir).map_err(in_field)?;
                if authority.cluster() != own.holder().cluster {
                    return Err("cluster.authority: of another cluster than \
                                cluster.credentials"
                        .into());
                }
                Admissions::new(authority, own.holder(), reachable_at(config))
            }
            _ => Admissions::default(),
        };
        Ok(Self { tls, credentials: own, admissions: Arc::new(admissions) })
    }
}

fn check_name_of(own: &Credentials, name: &str) -> Result<(), String> {
    if own.holder().name == name {
        return Ok(());
    }
    let holder = own.holder();
    Err(format!("cluster.credentials: they are of {holder}, but `node` says that this is {name}"))
}

fn warn_of_the_end(own: &Credentials) {
    match own.days_left(trust::now()) {
        None => tracing::error!(
            "the certificate of this node has expired: others refuse it until it is renewed"
        ),
        Some(days) if days < RENEW_BEFORE.as_secs() / (24 * 60 * 60) => {
            tracing::warn!(days, "the certificate of this node expires soon: `sdsctl node renew`");
        }
        Some(_) => {}
    }
}

/// `HOST:PORT` of the admin API for other hosts.
fn reachable_at(config: &Config) -> Option<String> {
    let address = config.admin.address;
    if address.ip().is_loopback() {
        return None;
    }
    if !address.ip().is_unspecified() {
        return Some(address.to_string());
    }
    let advertised = config.cluster.advertised()?;
    let (host, _) = advertised.rsplit_once(':')?;
    Some(format!("{host}:{}", address.port()))
}

/// Refuses what who asks may not do.
pub(super) async fn authorise(request: Request, next: Next) -> Response {
    let caller = request.extensions().get::<ConnectInfo<Caller>>();
    let joins = request.method() == Method::POST && request.uri().path() == JOINS;
    let renews = request.method() == Method::POST && request.uri().path() == RENEWALS;
    let refusal = match caller.map(|ConnectInfo(caller)| &caller.who) {
        Some(Who::Local) => None,
        Some(Who::Member(holder)) => match holder.role {
            Role::Admin => None,
            Role::Node(_) if joins || renews => None,
            Role::Node(_) => Some(format!("{holder} is not an admin of the cluster")),
        },
        Some(Who::Stranger) if joins => None,
        Some(Who::Stranger) => Some("without a certificate of this cluster nothing is told".into()),
        None => Some("nothing is known of who asks".into()),
    };
    match refusal {
        None => next.run(request).await,
        Some(message) => ApiError { code: ErrorCode::Forbidden, message, hint: None }
            .with_hint("sdsctl shows the certificate of an operator: --credentials DIR")
            .into_response(),
    }
}
