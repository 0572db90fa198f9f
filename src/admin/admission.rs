//! Join tokens and the signing of certificates: who may become a node of the cluster.
//!
//! Works on the thread of the admin server, so that no signature delays the data path. Tokens are in the
//! memory of the member that made them, as hashes: with its end they end.
//!
//! # Invariants
//! - A token is good for one certificate, until it expires.
//! - Nothing of a request is looked at but its secret until that was found to be right.
//! - The name and the id in a certificate are the authority's word: who asks chooses a name that this
//!   member has not signed for yet, and nothing else.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::error::{ApiError, ErrorCode};
use super::joining::{CreateNodeToken, JoinNode, NodeCertificate, NodeToken};
use super::types::{check_name, clip};
use crate::id::NodeId;
use crate::trust::token::Secret;
use crate::trust::{self, Authority, Holder, JoinToken, NODE_LIFETIME, Role, TrustError};

/// How long a token is valid if nobody says.
pub const TTL_DEFAULT: Duration = Duration::from_hours(1);
/// Shortest and longest time that a token is valid.
const TTL: std::ops::RangeInclusive<Duration> =
    Duration::from_mins(1)..=Duration::from_hours(7 * 24);
/// So long after its end a token is remembered, to say what became of it.
const REMEMBERED: Duration = Duration::from_hours(1);
/// Tokens that are valid or remembered, at most.
const TOKENS_MAX: usize = 256;
/// Wrong secrets that an address may send within [`WRONG_WINDOW`].
const WRONG_MAX: u32 = 5;
const WRONG_WINDOW: Duration = Duration::from_mins(1);
/// Addresses with wrong secrets that are told apart, at most; further ones count as one.
const ADDRESSES_MAX: usize = 1024;
/// Longest address in a request for a token, bytes.
const ADDRESS_BYTES_MAX: usize = 300;

struct Token {
    expires: Instant,
    used: bool,
}

#[derive(Default)]
struct State {
    tokens: BTreeMap<[u8; 32], Token>,
    /// First wrong secret of an address within the window, and how many.
    wrong: BTreeMap<IpAddr, (Instant, u32)>,
    /// Names that certificates were signed for.
    names: BTreeMap<String, NodeId>,
}

/// What this member has to let nodes in with: perhaps nothing.
#[derive(Default)]
pub struct Admissions {
    authority: Option<Authority>,
    address: Option<String>,
    state: Mutex<State>,
}

fn no_authority<T>() -> Result<T, ApiError> {
    Err(ApiError::conflict("this node has no key of the cluster's authority, so it cannot sign")
        .with_hint("ask a node whose configuration has cluster.authority, with --endpoint"))
}

fn failed(why: &TrustError) -> ApiError {
    match why {
        TrustError::Request(_) => ApiError::invalid(why.to_string()),
        _ => ApiError::internal(why.to_string()),
    }
}

/// The addresses that one host can easily have count as one.
fn source(address: IpAddr) -> IpAddr {
    match address.to_canonical() {
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits() >> 64 << 64).into(),
        v4 @ IpAddr::V4(_) => v4,
    }
}

impl Admissions {
    /// A member that signs with `authority`; `own` is this member itself. `address`: `HOST:PORT` of its
    /// admin API as others reach it.
    pub fn new(authority: Authority, own: &Holder, address: Option<String>) -> Self {
        let names = own.node().map(|node| (own.name.clone(), node)).into_iter().collect();
        let state = Mutex::new(State { names, ..State::default() });
        Self { authority: Some(authority), address, state }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere leaves no half-done change behind.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a token.
    ///
    /// # Errors
    /// `conflict` without an authority, `invalid_argument`, `unavailable` if there are too many.
    pub fn create_token(&self, request: &CreateNodeToken) -> Result<NodeToken, ApiError> {
        let Some(authority) = &self.authority else { return no_authority() };
        let ttl = request.ttl_s.map_or(TTL_DEFAULT, Duration::from_secs);
        if !TTL.contains(&ttl) {
            return Err(ApiError::invalid("a token is valid for 60 seconds to 7 days"));
        }
        let Some(address) = request.address.clone().or_else(|| self.address.clone()) else {
            return Err(ApiError::invalid(
                "this node does not know its own address as others see it",
            )
            .with_hint("give it with --address HOST:PORT, or set cluster.advertise"));
        };
        if address.contains(['/', ' ']) || !(1..=ADDRESS_BYTES_MAX).contains(&address.len()) {
            return Err(ApiError::invalid(format!("{:?} is not HOST:PORT", clip(&address))));
        }
        let secret = Secret::new().map_err(|why| failed(&why))?;
        let mut state = self.state();
        let now = Instant::now();
        state.tokens.retain(|_, token| now < token.expires + REMEMBERED);
        if state.tokens.len() >= TOKENS_MAX {
            return Err(ApiError::unavailable(format!("there are {TOKENS_MAX} tokens already"))
                .with_hint("they expire; or use those that there are"));
        }
        state.tokens.insert(secret.hash(), Token { expires: now + ttl, used: false });
        let fingerprint = trust::fingerprint(authority.certificate());
        let token = JoinToken { address: address.clone(), fingerprint, secret }.reveal();
        Ok(NodeToken { token, ttl_s: ttl.as_secs(), address })
    }

    /// Signs for a node that joins from an address.
    ///
    /// # Errors
    /// `forbidden`: the secret is wrong, expired or used; `rate_limited`; `conflict`: the name is taken;
    /// `invalid_argument`.
    pub fn join(&self, from: IpAddr, request: &JoinNode) -> Result<NodeCertificate, ApiError> {
        let Some(authority) = &self.authority else { return no_authority() };
        let (mut state, now) = (self.state(), Instant::now());
        state.check_rate(source(from), now)?;
        let hash = request.secret.parse().map(|secret: Secret| secret.hash()).ok();
        let found = hash.and_then(|hash| Some((hash, state.tokens.get(&hash)?)));
        let forbidden = |why: &str| {
            let error = ApiError { code: ErrorCode::Forbidden, message: why.into(), hint: None };
            error.with_hint("`sdsctl node token` makes a new one")
        };
        let hash = match found {
            Some((_, token)) if token.used => return Err(forbidden("the token was used already")),
            Some((_, token)) if token.expires <= now => {
                return Err(forbidden("the token has expired"));
            }
            Some((hash, _)) => hash,
            None => {
                state.count_wrong(source(from), now);
                tracing::warn!(%from, "a node wanted to join with a token that is not known");
                return Err(forbidden(
                    "this node has made no such token, or was started again since",
                ));
            }
        };
        check_name("node", &request.name)?;
        if state.names.contains_key(&request.name) {
            let name = &request.name;
            return Err(ApiError::conflict(format!("there is a node {name} already"))
                .with_hint("choose another name; the token is still good"));
        }
        let random = trust::random().map_err(|why| failed(&why))?;
        let mut id = [0; 16];
        id.copy_from_slice(&random[..16]);
        let node = NodeId::from_bytes(id);
        let (cluster, name) = (authority.cluster(), request.name.clone());
        let holder = Holder { cluster, role: Role::Node(node), name };
        let signed = sign(authority, &holder, &request.request)?;
        state.tokens.entry(hash).and_modify(|token| token.used = true);
        state.names.insert(holder.name.clone(), node);
        tracing::info!(name = holder.name, %node, %from, "signed for a node that joins");
        Ok(signed)
    }

    /// Signs once more for a node that has shown its certificate.
    ///
    /// # Errors
    /// `forbidden`: it is not a node; `invalid_argument`; `conflict` without an authority.
    pub fn renew(&self, holder: &Holder, request: &str) -> Result<NodeCertificate, ApiError> {
        let Some(authority) = &self.authority else { return no_authority() };
        let signed = sign(authority, holder, request)?;
        tracing::info!(name = holder.name, "signed for a node once more");
        Ok(signed)
    }
}

fn sign(
    authority: &Authority,
    holder: &Holder,
    request: &str,
) -> Result<NodeCertificate, ApiError> {
    let certificate = authority.sign(holder, request, NODE_LIFETIME, trust::now());
    let certificate = certificate.map_err(|why| failed(&why))?;
    Ok(NodeCertificate { certificate, authority: authority.pem().to_owned() })
}

impl State {
    /// Whose count an address is in.
    fn bucket(&self, from: IpAddr) -> IpAddr {
        let known = self.wrong.contains_key(&from) || self.wrong.len() < ADDRESSES_MAX;
        if known { from } else { Ipv6Addr::UNSPECIFIED.into() }
    }

    fn check_rate(&mut self, from: IpAddr, now: Instant) -> Result<(), ApiError> {
        self.wrong.retain(|_, (since, _)| now < *since + WRONG_WINDOW);
        match self.wrong.get(&self.bucket(from)) {
            Some((_, count)) if *count >= WRONG_MAX => Err(ApiError {
                code: ErrorCode::RateLimited,
                message: "too many wrong tokens came from this address".into(),
                hint: Some("wait a minute".into()),
            }),
            _ => Ok(()),
        }
    }

    fn count_wrong(&mut self, from: IpAddr, now: Instant) {
        let bucket = self.bucket(from);
        self.wrong.entry(bucket).or_insert((now, 0)).1 += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::id::ClusterId;
    use crate::trust::SigningRequest;

    const HERE: IpAddr = IpAddr::V4(std::net::Ipv4Addr::LOCALHOST);

    fn admissions() -> Admissions {
        let cluster = ClusterId::from_bytes([1; 16]);
        let (authority, _) = Authority::create(cluster, "test", trust::now()).unwrap();
        let role = Role::Node(NodeId::from_bytes([2; 16]));
        let own = Holder { cluster, role, name: "first".into() };
        Admissions::new(authority, &own, Some("10.0.0.1:9770".into()))
    }

    fn request(secret: &str, name: &str) -> JoinNode {
        let request = SigningRequest::new().unwrap().pem().unwrap();
        JoinNode { secret: secret.into(), name: name.into(), request }
    }

    fn token(admissions: &Admissions) -> String {
        let token = admissions.create_token(&CreateNodeToken::default()).unwrap().token;
        token.parse::<JoinToken>().unwrap().secret.reveal()
    }

    fn refusal(result: Result<NodeCertificate, ApiError>) -> (ErrorCode, String) {
        let error = result.unwrap_err();
        (error.code, error.message)
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_is_good_for_one_node() {
        let admissions = admissions();
        let secret = token(&admissions);
        let (code, _) = refusal(admissions.join(HERE, &request(&secret, "first")));
        assert_eq!(code, ErrorCode::Conflict, "the member's own name");
        let (code, _) = refusal(admissions.join(HERE, &request(&secret, "No Name")));
        assert_eq!(code, ErrorCode::InvalidArgument);
        let nonsense = JoinNode { request: "nonsense".into(), ..request(&secret, "second") };
        assert_eq!(refusal(admissions.join(HERE, &nonsense)).0, ErrorCode::InvalidArgument);
        admissions.join(HERE, &request(&secret, "second")).expect("none of these used it up");
        let (code, why) = refusal(admissions.join(HERE, &request(&secret, "third")));
        assert_eq!((code, why.as_str()), (ErrorCode::Forbidden, "the token was used already"));
        let (code, _) = refusal(admissions.join(HERE, &request(&token(&admissions), "second")));
        assert_eq!(code, ErrorCode::Conflict);
    }

    #[tokio::test(start_paused = true)]
    async fn a_token_expires() {
        let admissions = admissions();
        let secret = token(&admissions);
        tokio::time::advance(TTL_DEFAULT).await;
        let (code, why) = refusal(admissions.join(HERE, &request(&secret, "second")));
        assert_eq!((code, why.as_str()), (ErrorCode::Forbidden, "the token has expired"));
        for ttl_s in [0, 59, 604_801, u64::MAX] {
            let request = CreateNodeToken { ttl_s: Some(ttl_s), address: None };
            let error = admissions.create_token(&request).unwrap_err();
            assert_eq!(error.code, ErrorCode::InvalidArgument, "{ttl_s}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn guessing_is_limited_by_address() {
        let admissions = admissions();
        let secret = token(&admissions);
        let wrong = request(&"0".repeat(64), "second");
        for _ in 0..WRONG_MAX {
            assert_eq!(refusal(admissions.join(HERE, &wrong)).0, ErrorCode::Forbidden);
        }
        let right = request(&secret, "second");
        assert_eq!(refusal(admissions.join(HERE, &right)).0, ErrorCode::RateLimited);
        let mapped = "::ffff:127.0.0.1".parse().unwrap();
        assert_eq!(refusal(admissions.join(mapped, &right)).0, ErrorCode::RateLimited);
        let elsewhere = "10.0.0.9".parse().unwrap();
        admissions.join(elsewhere, &right).expect("others are not held up");
        tokio::time::advance(WRONG_WINDOW).await;
        let other = request(&token(&admissions), "third");
        admissions.join(HERE, &other).expect("a minute later");
        // However many addresses there are, memory is bounded.
        for n in 0..4 * u32::try_from(ADDRESSES_MAX).unwrap() {
            let from = IpAddr::from(n.to_be_bytes());
            admissions.join(from, &wrong).expect_err("wrong");
        }
        assert!(admissions.state().wrong.len() <= ADDRESSES_MAX + 1);
    }

    #[tokio::test(start_paused = true)]
    async fn tokens_are_bounded() {
        let admissions = admissions();
        for _ in 0..TOKENS_MAX {
            token(&admissions);
        }
        let error = admissions.create_token(&CreateNodeToken::default()).unwrap_err();
        assert_eq!(error.code, ErrorCode::Unavailable);
        tokio::time::advance(TTL_DEFAULT + REMEMBERED).await;
        token(&admissions);
    }

    #[tokio::test(start_paused = true)]
    async fn without_the_authority_nothing_is_signed() {
        let none = Admissions::default();
        let error = none.create_token(&CreateNodeToken::default()).unwrap_err();
        assert_eq!(error.code, ErrorCode::Conflict);
        assert_eq!(refusal(none.join(HERE, &request("", "a"))).0, ErrorCode::Conflict);
    }
}
