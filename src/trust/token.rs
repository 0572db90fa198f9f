//! Join tokens: what an operator carries from a member of the cluster to a node that is to join.
//!
//! ```text
//!  sds-join-1/HOST:PORT/FINGERPRINT/SECRET
//! ```
//!
//! The fingerprint (SHA-256 of the authority's certificate, hexadecimal) is how the new node knows the
//! cluster, the secret (32 random bytes) how the cluster knows the new node. Whoever has the token can join
//! until it is used or expired: it is as secret as a private key.

use std::fmt;
use std::str::FromStr;

use super::TrustError;

const PREFIX: &str = "sds-join-1";
/// Longest address in a token, bytes.
const ADDRESS_BYTES_MAX: usize = 300;

/// Secret of a token. Its hash is all that the member keeps.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret([u8; 32]);

impl Secret {
    /// A new one.
    ///
    /// # Errors
    /// The operating system gives no random numbers.
    pub fn new() -> Result<Self, TrustError> {
        Ok(Self(super::random()?))
    }

    /// Its hash, SHA-256.
    pub fn hash(&self) -> [u8; 32] {
        super::sha256(&self.0)
    }

    /// As it is sent.
    pub fn reveal(&self) -> String {
        hex(&self.0)
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

impl FromStr for Secret {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        unhex(text).map(Self).ok_or(())
    }
}

/// A join token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JoinToken {
    /// `HOST:PORT` of the member's admin API.
    pub address: String,
    /// Fingerprint of the cluster's authority.
    pub fingerprint: [u8; 32],
    /// What the member knows the hash of.
    pub secret: Secret,
}

impl JoinToken {
    /// The token as the operator carries it: a secret.
    pub fn reveal(&self) -> String {
        format!("{PREFIX}/{}/{}/{}", self.address, hex(&self.fingerprint), self.secret.reveal())
    }
}

impl FromStr for JoinToken {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        let mut parts = text.trim().split('/');
        if parts.next() != Some(PREFIX) {
            return Err("a token begins with sds-join-1/: make one with `sdsctl node token`");
        }
        let cut = "the token is not complete: it was perhaps cut when it was copied";
        let address = parts.next().filter(|it| (1..=ADDRESS_BYTES_MAX).contains(&it.len()));
        let fingerprint = parts.next().and_then(unhex);
        let secret = parts.next().and_then(|secret| secret.parse().ok());
        match (address, fingerprint, secret, parts.next()) {
            (Some(address), Some(fingerprint), Some(secret), None) => {
                Ok(Self { address: address.to_owned(), fingerprint, secret })
            }
            _ => Err(cut),
        }
    }
}

/// 64 hexadecimal digits.
pub fn hex(bytes: &[u8; 32]) -> String {
    use fmt::Write as _;
    let mut text = String::with_capacity(64);
    for byte in bytes {
        write!(text, "{byte:02x}").expect("a string takes everything");
    }
    text
}

fn unhex(text: &str) -> Option<[u8; 32]> {
    if text.len() != 64 || !text.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return None;
    }
    let mut bytes = [0; 32];
    for (byte, at) in bytes.iter_mut().zip((0..64).step_by(2)) {
        *byte = u8::from_str_radix(text.get(at..at + 2)?, 16).ok()?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_come_back_as_they_were() {
        let secret = Secret::new().unwrap();
        let token = JoinToken { address: "[fd00::1]:9770".into(), fingerprint: [0xa5; 32], secret };
        let text = token.reveal();
        assert_eq!(text.parse::<JoinToken>().unwrap(), token);
        assert_eq!(format!(" {text}\n").parse::<JoinToken>().unwrap(), token);
        assert!(!format!("{token:?}").contains(&token.secret.reveal()));
        for bad in [
            "",
            "x",
            &text[1..],
            &text[..text.len() - 1],
            &format!("{text}0"),
            &format!("{text}/"),
            &text.replace("a5a5", "zzzz"),
            &text.replace("[fd00::1]:9770", ""),
        ] {
            bad.parse::<JoinToken>().expect_err(bad);
        }
        assert_ne!(Secret::new().unwrap(), token.secret);
    }
}
