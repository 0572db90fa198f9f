//! `/v1/node-tokens`, `/v1/joins`, `/v1/renewals`.

use std::sync::Arc;

use axum::extract::ConnectInfo;
use axum::http::StatusCode;
use axum::{Extension, Json};

use super::Body;
use crate::admin::access::{Caller, Who};
use crate::admin::admission::Admissions;
use crate::admin::error::{ApiError, ErrorBody, ErrorCode};
use crate::admin::joining::{CreateNodeToken, JoinNode, NodeCertificate, NodeToken, RenewNode};

/// Makes a join token, good for one node; the only time that it is shown
#[utoipa::path(post, path = "/v1/node-tokens", tag = "nodes", request_body = CreateNodeToken, responses(
    (status = 201, description = "a secret", body = NodeToken),
    (status = 400, description = "the time or the address", body = ErrorBody),
    (status = 403, description = "who asks is not an operator", body = ErrorBody),
    (status = 409, description = "this node has no key of the authority", body = ErrorBody),
    (status = 503, description = "too many tokens", body = ErrorBody)
))]
pub(in crate::admin) async fn create_token(
    Extension(admissions): Extension<Arc<Admissions>>,
    Body(request): Body<CreateNodeToken>,
) -> Result<(StatusCode, Json<NodeToken>), ApiError> {
    Ok((StatusCode::CREATED, Json(admissions.create_token(&request)?)))
}

/// Signs for a node that joins with a token; needs no certificate
#[utoipa::path(post, path = "/v1/joins", tag = "nodes", request_body = JoinNode, responses(
    (status = 201, description = "the token is used up", body = NodeCertificate),
    (status = 400, description = "the name or the request for a certificate", body = ErrorBody),
    (status = 403, description = "the token is not known, expired or used", body = ErrorBody),
    (status = 409, description = "the name is taken, or this node has no key of the authority",
     body = ErrorBody),
    (status = 429, description = "too many wrong tokens from this address", body = ErrorBody)
))]
pub(in crate::admin) async fn join(
    Extension(admissions): Extension<Arc<Admissions>>,
    ConnectInfo(caller): ConnectInfo<Caller>,
    Body(request): Body<JoinNode>,
) -> Result<(StatusCode, Json<NodeCertificate>), ApiError> {
    Ok((StatusCode::CREATED, Json(admissions.join(caller.address.ip(), &request)?)))
}

/// Signs once more for the node whose certificate is shown
#[utoipa::path(post, path = "/v1/renewals", tag = "nodes", request_body = RenewNode, responses(
    (status = 201, description = "for the same node", body = NodeCertificate),
    (status = 400, description = "the request for a certificate", body = ErrorBody),
    (status = 403, description = "no certificate of a node is shown", body = ErrorBody),
    (status = 409, description = "this node has no key of the authority", body = ErrorBody)
))]
pub(in crate::admin) async fn renew(
    Extension(admissions): Extension<Arc<Admissions>>,
    ConnectInfo(caller): ConnectInfo<Caller>,
    Body(request): Body<RenewNode>,
) -> Result<(StatusCode, Json<NodeCertificate>), ApiError> {
    match caller.who {
        Who::Member(holder) if holder.node().is_some() => {
            Ok((StatusCode::CREATED, Json(admissions.renew(&holder, &request.request)?)))
        }
        _ => Err(ApiError {
            code: ErrorCode::Forbidden,
            message: "only a node renews its certificate, which it shows".into(),
            hint: Some("run `sdsctl node renew` on the node".into()),
        }),
    }
}
