//! Parsers of arguments, for clap: their errors say what is wrong and what is right.

use crate::admin::error::ApiError;
use crate::admin::types::{PoolScheme, VolumeName, check_name, check_volume_size};
use crate::units::ByteSize;

fn text(error: ApiError) -> String {
    match error.hint {
        Some(hint) => format!("{} ({hint})", error.message),
        None => error.message,
    }
}

/// `POOL/NAME`.
pub(super) fn volume_name(s: &str) -> Result<VolumeName, String> {
    s.parse().map_err(text)
}

/// The name of a pool.
pub(super) fn pool_name(s: &str) -> Result<String, String> {
    check_name("pool", s).map_err(text)?;
    Ok(s.to_owned())
}

/// The name of a node.
pub(super) fn node_name(s: &str) -> Result<String, String> {
    check_name("node", s).map_err(text)?;
    Ok(s.to_owned())
}

/// The name of a cluster.
pub(super) fn cluster_name(s: &str) -> Result<String, String> {
    check_name("cluster", s).map_err(text)?;
    Ok(s.to_owned())
}

/// The name of an operator.
pub(super) fn admin_name(s: &str) -> Result<String, String> {
    check_name("admin", s).map_err(text)?;
    Ok(s.to_owned())
}

/// `HOST:PORT`.
pub(super) fn host_port(s: &str) -> Result<String, String> {
    crate::config::check_host_port(s)?;
    Ok(s.to_owned())
}

/// A size with a unit, in bytes.
pub(super) fn size(s: &str) -> Result<u64, String> {
    match s.parse::<ByteSize>() {
        Ok(ByteSize(0)) => Err("must be more than 0".to_owned()),
        Ok(ByteSize(bytes)) => Ok(bytes),
        Err(error) => Err(error.to_string()),
    }
}

/// A size that a volume can have, in bytes.
pub(super) fn volume_size(s: &str) -> Result<u64, String> {
    let bytes = size(s)?;
    check_volume_size(bytes).map_err(text)?;
    Ok(bytes)
}

/// `K+M`.
pub(super) fn erasure_code(s: &str) -> Result<PoolScheme, String> {
    let scheme = s
        .split_once('+')
        .and_then(|(data, parity)| {
            Some(PoolScheme::Ec { data: number(data)?, parity: number(parity)? })
        })
        .ok_or_else(|| "expected K+M, for example 4+2".to_owned())?;
    scheme.check().map_err(text)?;
    Ok(scheme)
}

/// A number of replicas.
pub(super) fn replicas(s: &str) -> Result<PoolScheme, String> {
    let copies = number(s).ok_or_else(|| "expected a number, for example 3".to_owned())?;
    let scheme = PoolScheme::Replicas { copies };
    scheme.check().map_err(text)?;
    Ok(scheme)
}

/// Plain digits: no sign, no space.
fn number(s: &str) -> Option<u8> {
    s.bytes().all(|b| b.is_ascii_digit()).then(|| s.parse().ok()).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schemes() {
        assert_eq!(erasure_code("4+2"), Ok(PoolScheme::Ec { data: 4, parity: 2 }));
        assert_eq!(replicas("3"), Ok(PoolScheme::Replicas { copies: 3 }));
        for bad in
            ["", "4", "4+", "+2", "4+2+1", "1+2", "17+1", "4+0", "4+5", "4++2", "-4+2", "4+ 2"]
        {
            erasure_code(bad).expect_err(bad);
        }
        for bad in ["", "0", "6", "-1", "+3", "300", "three"] {
            replicas(bad).expect_err(bad);
        }
    }

    #[test]
    fn sizes() {
        assert_eq!(volume_size("10G"), Ok(10 << 30));
        assert_eq!(volume_size("1024T"), Ok(1 << 50));
        for bad in ["", "0", "0G", "-1", "10X", "1025T", "99999999999999999999", "513", "G"] {
            volume_size(bad).expect_err(bad);
        }
    }

    #[test]
    fn names() {
        assert_eq!(volume_name("p/v").expect("a name").to_string(), "p/v");
        for bad in ["", "v", "/v", "p/", "p/v/w", "p /v", "p/.v", "p/ä", "../v"] {
            volume_name(bad).expect_err(bad);
        }
        pool_name(&"x".repeat(63)).expect("the longest name");
        pool_name(&"x".repeat(64)).expect_err("one more");
    }
}
