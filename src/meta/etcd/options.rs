//! Where an etcd is and how to be let in.

use std::path::{Path, PathBuf};
use std::time::Duration;

use etcd_client::{Certificate, ConnectOptions, Identity, TlsOptions};
use tonic::transport::Uri;

/// Most endpoints of one etcd.
pub const ENDPOINTS_MAX: usize = 16;
/// Longest prefix of all keys, bytes.
pub const PREFIX_BYTES_MAX: usize = 256;
/// Largest file with a certificate, key or password, bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// How long making a connection may take.
const CONNECT_PATIENCE: Duration = Duration::from_secs(2);
/// Pings while watches wait. etcd hangs up on clients that ping more often than every 5 s.
const PING_INTERVAL: Duration = Duration::from_secs(6);
/// How long the answer to a ping may take.
const PING_PATIENCE: Duration = Duration::from_secs(3);

/// Where an etcd is, and how to be let in.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EtcdOptions {
    /// URLs of its members (see [`check_endpoint`]), 1 to [`ENDPOINTS_MAX`], of one scheme.
    pub endpoints: Vec<String>,
    /// What stands before each key, for an etcd that several clusters share; mostly empty.
    pub prefix: String,
    /// Authority that the members' certificates must come from, PEM file; needed for `https`.
    pub authority: Option<PathBuf>,
    /// Certificate of this client and its private key, PEM files.
    pub identity: Option<(PathBuf, PathBuf)>,
    /// Name of the user, and the file with the password.
    pub user: Option<(String, PathBuf)>,
}

/// Why these options cannot be used: the field of the configuration, and a sentence.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {message}")]
pub struct OptionsError {
    /// Field below `store` of the configuration.
    pub field: &'static str,
    /// What is wrong with it.
    pub message: String,
}

fn refuse<T>(field: &'static str, message: impl Into<String>) -> Result<T, OptionsError> {
    Err(OptionsError { field, message: message.into() })
}

/// Whether the URL of a member is one: `http://HOST:PORT` or `https://HOST:PORT`. Gives whether
/// it asks for TLS.
///
/// # Errors
/// A sentence that names the URL.
pub fn check_endpoint(url: &str) -> Result<bool, String> {
    let example = "a member of etcd is written http://HOST:PORT or https://HOST:PORT";
    let bad = |why: &str| format!("'{url}': {why}: {example}");
    let uri: Uri = url.parse().map_err(|_| bad("not a URL"))?;
    let secure = match uri.scheme_str() {
        Some("http") => false,
        Some("https") => true,
        _ => return Err(bad("the scheme is neither http nor https")),
    };
    let authority = uri.authority().ok_or_else(|| bad("there is no host"))?;
    if authority.host().is_empty() {
        return Err(bad("there is no host"));
    }
    if authority.as_str().contains('@') {
        return Err(bad("a user goes into 'user'"));
    }
    if uri.port_u16().is_none_or(|port| port == 0) {
        return Err(bad("there is no port"));
    }
    if uri.path_and_query().is_some_and(|rest| rest.as_str() != "/") {
        return Err(bad("there is more than host and port"));
    }
    Ok(secure)
}

impl EtcdOptions {
    /// Checks what can be checked without files and network.
    ///
    /// # Errors
    /// [`OptionsError`].
    pub fn validate(&self) -> Result<(), OptionsError> {
        let count = self.endpoints.len();
        if !(1..=ENDPOINTS_MAX).contains(&count) {
            return refuse(
                "endpoints",
                format!("an etcd has 1 to {ENDPOINTS_MAX} members, {count} are named"),
            );
        }
        let mut secure = 0;
        for (index, url) in self.endpoints.iter().enumerate() {
            secure +=
                usize::from(check_endpoint(url).or_else(|message| refuse("endpoints", message))?);
            if self.endpoints[..index].contains(url) {
                return refuse("endpoints", format!("{url} is listed twice"));
            }
        }
        if secure != 0 && secure != count {
            return refuse("endpoints", "some with TLS, some without");
        }
        if secure != 0 && self.authority.is_none() {
            return refuse("ca", "https needs the authority of the members' certificates");
        }
        if secure == 0 && self.authority.is_some() {
            return refuse("ca", "TLS needs endpoints that begin with https://");
        }
        if secure == 0 && self.identity.is_some() {
            return refuse("certificate", "TLS needs endpoints that begin with https://");
        }
        if self.prefix.len() > PREFIX_BYTES_MAX || self.prefix.contains('\0') {
            return refuse("prefix", format!("at most {PREFIX_BYTES_MAX} bytes, and no NUL"));
        }
        if self.user.as_ref().is_some_and(|(name, _)| name.is_empty()) {
            return refuse("user", "the name is empty");
        }
        Ok(())
    }

    /// What the client takes; reads the files. Blocks.
    ///
    /// # Errors
    /// [`OptionsError`]: those of [`EtcdOptions::validate`], and files that cannot be read.
    pub(super) fn load(&self) -> Result<ConnectOptions, OptionsError> {
        self.validate()?;
        let mut options = ConnectOptions::new()
            .with_require_leader(true)
            .with_connect_timeout(CONNECT_PATIENCE)
            .with_keep_alive(PING_INTERVAL, PING_PATIENCE)
            .with_keep_alive_while_idle(false)
            .with_auto_token_refresh(true);
        if let Some(authority) = &self.authority {
            let pem = read("ca", authority)?;
            let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(pem));
            if let Some((certificate, key)) = &self.identity {
                let identity =
                    Identity::from_pem(read("certificate", certificate)?, read("key", key)?);
                tls = tls.identity(identity);
            }
            options = options.with_tls(tls);
        }
        if let Some((name, file)) = &self.user {
            let password = String::from_utf8(read("password_file", file)?)
                .or_else(|_| refuse("password_file", "the password is not UTF-8"))?;
            options = options.with_user(name, password.trim_end_matches(['\r', '\n']));
        }
        Ok(options)
    }
}

fn read(field: &'static str, path: &Path) -> Result<Vec<u8>, OptionsError> {
    let failed = |why: std::io::Error| OptionsError {
        field,
        message: format!("cannot read {}: {why}", path.display()),
    };
    if std::fs::metadata(path).map_err(failed)?.len() > FILE_BYTES_MAX {
        return Err(failed(std::io::Error::other("it is too large")));
    }
    std::fs::read(path).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        assert_eq!(check_endpoint("http://10.0.0.1:2379"), Ok(false));
        assert_eq!(check_endpoint("https://etcd-1.example:2379/"), Ok(true));
        assert_eq!(check_endpoint("http://[::1]:2379"), Ok(false));
        for (url, why) in [
            ("", "not a URL"),
            ("10.0.0.1:2379", "neither http nor https"),
            ("ftp://a:1", "neither http nor https"),
            ("http://a", "no port"),
            ("http://a:0", "no port"),
            ("http://a:99999", "no"),
            ("http://:2379", "no"),
            ("http://u:p@a:1", "goes into 'user'"),
            ("http://a:1/x", "more than host and port"),
            ("http://a:1/?x", "more than host and port"),
            ("http://a b:1", "not a URL"),
        ] {
            let said = check_endpoint(url).unwrap_err();
            assert!(said.contains(why) && said.contains("http://HOST:PORT"), "{url}: {said}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        let good = EtcdOptions { endpoints: vec!["http://a:1".into()], ..EtcdOptions::default() };
        good.validate().unwrap();
        let said = |change: &dyn Fn(&mut EtcdOptions)| {
            let mut options = good.clone();
            change(&mut options);
            options.validate().unwrap_err().to_string()
        };
        let secure = vec!["https://a:1".to_owned()];
        assert!(said(&|o| o.endpoints.clear()).starts_with("endpoints: an etcd has 1 to 16"));
        assert!(said(&|o| o.endpoints = vec!["http://a:1".into(); 2]).contains("twice"));
        assert!(said(&|o| o.endpoints.push("https://b:1".into())).contains("some with TLS"));
        assert!(said(&|o| o.endpoints.clone_from(&secure)).starts_with("ca: https needs"));
        assert!(said(&|o| o.authority = Some("ca".into())).contains("begin with https"));
        assert!(said(&|o| o.identity = Some(("c".into(), "k".into()))).contains("https"));
        assert!(said(&|o| o.prefix = "x".repeat(300)).starts_with("prefix: "));
        assert!(said(&|o| o.user = Some((String::new(), "p".into()))).starts_with("user: "));
    }

    #[test]
    fn files_that_are_not_there_are_named() {
        let options = EtcdOptions {
            endpoints: vec!["https://a:1".into()],
            authority: Some("/nowhere/ca.pem".into()),
            ..EtcdOptions::default()
        };
        let said = options.load().unwrap_err().to_string();
        assert!(said.starts_with("ca: cannot read /nowhere/ca.pem: "), "{said}");
    }
}
